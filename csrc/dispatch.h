// From the sizes of a call to the instance of a kernel, its grid and its shared memory.
//
// interp_nn/engines decides which problems this library gets, and says why not. The checks here only keep a call that
// it should have refused from reading or writing what is not there.
#pragma once

#include "fragments.h"

namespace interp_nn {

constexpr const char* NO_KERNEL = "no CUDA kernel for these sizes and this type on this GPU";

// Return why the operands cannot be used, or nullptr.
inline const char* invalid_operands(const Operands& arguments, const DeviceSpec& device) {
    if (arguments.n < 0 || arguments.d < 1 || arguments.k < 1) return "sizes must be n >= 0, d >= 1, k >= 1";
    if (device.error != nullptr) return device.error;
    // The kernels for such a device would read 16-bit numbers as fp32.
    if (arguments.kind != Kind::F32 && device.capability < 80) return NO_KERNEL;
    if (arguments.q.coefficients != nullptr && (arguments.q.degree < 1 || arguments.q.degree >= MOST_COEFFICIENTS)) {
        return "a polynomial must have degree 1 to 4";
    }
    return nullptr;
}
// Kernels with other arguments to check overload this.
template <class Arguments> const char* invalid(const Arguments& arguments, const DeviceSpec& device) {
    return invalid_operands(arguments, device);
}

// Call Instance<P, BK>::call(arguments, device, rest...) for the products of the kind and the smallest BK that holds
// the columns. Return `none` where there is no such instance.
template <template <class, int> class Instance, class P, int BK, int... MORE, class Result, class Arguments,
          class... Rest>
Result dispatch_columns(Result none, const Arguments& arguments, const DeviceSpec& device, Rest... rest) {
    // GPUs without matrix units have too little shared memory for 128 columns of fp32.
    if constexpr (BK < 128 || !std::is_same_v<P, ProductsF32>) {
        if (arguments.k <= BK) return Instance<P, BK>::call(arguments, device, rest...);
    }
    if constexpr (sizeof...(MORE) > 0) {
        return dispatch_columns<Instance, P, MORE...>(none, arguments, device, rest...);
    } else {
        return none;
    }
}
template <template <class, int> class Instance, int... COLUMNS, class Result, class Arguments, class... Rest>
Result dispatch(Result none, const Arguments& arguments, const DeviceSpec& device, Rest... rest) {
    if (device.capability < 80) {
        return dispatch_columns<Instance, ProductsF32, COLUMNS...>(none, arguments, device, rest...);
    }
    if (arguments.kind == Kind::F16 || arguments.kind == Kind::BF16) {
        return dispatch_columns<Instance, Products16, COLUMNS...>(none, arguments, device, rest...);
    }
    return dispatch_columns<Instance, ProductsTF32, COLUMNS...>(none, arguments, device, rest...);
}

// The functions of launch.h for a kernel with instances of these padded columns.
template <template <class, int> class Instance, int... COLUMNS> struct Kernels {
    template <class Arguments> static Workspace workspace(const Arguments& arguments, const DeviceSpec& device) {
        if (invalid(arguments, device) != nullptr) return {};
        return dispatch<Instance, COLUMNS...>(Workspace{}, arguments, device);
    }
    template <class Arguments>
    static const char* launch(const Arguments& arguments, const DeviceSpec& device, Stream stream) {
        if (const char* reason = invalid(arguments, device)) return reason;
        return dispatch<Instance, COLUMNS...>(NO_KERNEL, arguments, device, stream);
    }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One program a multiprocessor, or one a job where those are fewer.
inline int programs_for(const DeviceSpec& device, int64_t jobs) {
    return jobs < 1 ? 1 : jobs < device.multiprocessors ? static_cast<int>(jobs) : device.multiprocessors;
}

// The most stages, 4 to 2, whose shared memory the device has; 0 if even two do not fit.
template <class Shared> int stages_for(const DeviceSpec& device, Shared shared) {
    for (int stages = 4; stages >= 2; --stages) {
        if (shared(stages) <= static_cast<size_t>(device.shared)) return stages;
    }
    return 0;
}

}  // namespace interp_nn
