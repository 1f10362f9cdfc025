// From the sizes of a call to the instance of a kernel, its grid and its shared memory.
#pragma once

#include "fragments.h"

namespace interp_nn {

// What is wrong with a call, or nullptr.
template <class Arguments> const char* problem(const Arguments& arguments, const DeviceSpec& device) {
    if (arguments.n < 0 || arguments.d < 1 || arguments.k < 1) return "sizes must be n >= 0, d >= 1, k >= 1";
    if (arguments.k > MOST_COLUMNS) return "more than 128 columns";
    if (chip.error != nullptr) return chip.error;
    if (arguments.kind != Kind::F32 && chip.capability < 80)
        return "this GPU has matrix products of fp32 alone (below 8.0)";
    return nullptr;
}

constexpr const char* TOO_LITTLE_SHARED = "this GPU has too little shared memory for so many columns of this type";

// Call Instance<P, BK>::call(arguments, chip, rest...) for the products of its kind and the first of the padded columns
// that is enough; `none` where there is no such instance.
template <template <class, int> class Instance, class P, int BK, int... MORE, class Result, class Arguments,
          class... Rest>
Result dispatch_columns(Result none, const Arguments& arguments, const DeviceSpec& device, Rest... rest) {
    // GPUs without matrix units have too little shared memory for 128 columns of fp32.
    if constexpr (BK < 128 || !std::is_same_v<P, ProductsF32>) {
        if (arguments.k <= BK) return Instance<P, BK>::call(arguments, chip, rest...);
    }
    if constexpr (sizeof...(MORE) > 0) {
        return dispatch_columns<Instance, P, MORE...>(none, arguments, chip, rest...);
    } else {
        return none;
    }
}
template <template <class, int> class Instance, int... COLUMNS, class Result, class Arguments, class... Rest>
Result dispatch(Result none, const Arguments& arguments, const DeviceSpec& device, Rest... rest) {
    if (chip.capability < 80)
        return dispatch_columns<Instance, ProductsF32, COLUMNS...>(none, arguments, chip, rest...);
    if (arguments.kind == Kind::F16 || arguments.kind == Kind::BF16) {
        return dispatch_columns<Instance, Products16, COLUMNS...>(none, arguments, chip, rest...);
    }
    return dispatch_columns<Instance, ProductsTF32, COLUMNS...>(none, arguments, chip, rest...);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One program a multiprocessor, or one a job where those are fewer.
inline int programs_for(const DeviceSpec& device, int64_t jobs) {
    return jobs < 1 ? 1 : jobs < chip.multiprocessors ? static_cast<int>(jobs) : chip.multiprocessors;
}

// The most stages, from `most` down to `least`, whose shared memory the chip has; 0 if even the least do not fit.
template <class Shared> int stages_for(const DeviceSpec& device, int least, int most, Shared shared) {
    for (int stages = most; stages >= least; --stages) {
        if (shared(stages) <= static_cast<size_t>(chip.shared)) return stages;
    }
    return 0;
}

}  // namespace interp_nn
