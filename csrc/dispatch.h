// From the sizes of a call to the instance of a kernel, its grid and its shared memory.
#pragma once

#include "primitives.h"

namespace interp_nn {

// What is wrong with a call, or nullptr.
template <class Arguments> const char* problem(const Arguments& arguments, const Chip& chip) {
    if (arguments.n < 0 || arguments.d < 1 || arguments.k < 1) return "sizes must be n >= 0, d >= 1, k >= 1";
    if (arguments.k > MOST_COLUMNS) return "more than 128 columns";
    if (chip.multiprocessors < 1) return "no CUDA device";
    if (arguments.kind != Kind::F32 && chip.capability < 80) return "this GPU has matrix products of fp32 alone (below 8.0)";
    return nullptr;
}

// Call Instance<KIND, BK, B_T>::call(arguments, rest...) for the kind, padded columns and memory order of b.
template <template <Kind, int, bool> class Instance, Kind KIND, int BK, class Arguments, class... Rest>
auto dispatch_order(const Arguments& arguments, Rest... rest) {
    return arguments.b_transposed ? Instance<KIND, BK, true>::call(arguments, rest...)
                                  : Instance<KIND, BK, false>::call(arguments, rest...);
}
template <template <Kind, int, bool> class Instance, Kind KIND, class Arguments, class... Rest>
auto dispatch_columns(const Arguments& arguments, Rest... rest) {
    if (arguments.k <= 16) return dispatch_order<Instance, KIND, 16>(arguments, rest...);
    if (arguments.k <= 32) return dispatch_order<Instance, KIND, 32>(arguments, rest...);
    if (arguments.k <= 64) return dispatch_order<Instance, KIND, 64>(arguments, rest...);
    return dispatch_order<Instance, KIND, 128>(arguments, rest...);
}
template <template <Kind, int, bool> class Instance, class Arguments, class... Rest>
auto dispatch(const Arguments& arguments, Rest... rest) {
    switch (arguments.kind) {
        case Kind::F16:
            return dispatch_columns<Instance, Kind::F16>(arguments, rest...);
        case Kind::BF16:
            return dispatch_columns<Instance, Kind::BF16>(arguments, rest...);
        case Kind::TF32:
            return dispatch_columns<Instance, Kind::TF32>(arguments, rest...);
        default:
            return dispatch_columns<Instance, Kind::F32>(arguments, rest...);
    }
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One program a multiprocessor, or one a job where those are fewer.
inline int programs_for(const Chip& chip, int64_t jobs) {
    return jobs < 1 ? 1 : jobs < chip.multiprocessors ? static_cast<int>(jobs) : chip.multiprocessors;
}

// The most stages, from `most` down to `least`, whose shared memory the chip has; 0 if even the least do not fit.
template <class Shared> int stages_for(const Chip& chip, int least, int most, Shared shared) {
    for (int stages = most; stages >= least; --stages) {
        if (shared(stages) <= static_cast<size_t>(chip.shared)) return stages;
    }
    return 0;
}

constexpr const char* TOO_LITTLE_SHARED = "this GPU has too little shared memory for so many columns of this type";

}  // namespace interp_nn
