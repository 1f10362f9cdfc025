// From the sizes of a call to the instance of a kernel, its grid and its shared memory.
#pragma once

#include "fragments.h"

namespace interp_nn {

// What is wrong with a call, or nullptr.
template <class Arguments> const char* problem(const Arguments& arguments, const Chip& chip) {
    if (arguments.n < 0 || arguments.d < 1 || arguments.k < 1) return "sizes must be n >= 0, d >= 1, k >= 1";
    if (arguments.k > MOST_COLUMNS) return "more than 128 columns";
    if (chip.multiprocessors < 1) return "no CUDA device";
    if (arguments.kind != Kind::F32 && chip.capability < 80) return "this GPU has matrix products of fp32 alone (below 8.0)";
    return nullptr;
}

// Call Instance<P, BK>::call(arguments, chip, rest...) for the products of its kind and the first of the padded columns that
// is enough.
template <template <class, int> class Instance, class P, int BK, int... MORE, class Arguments, class... Rest>
auto dispatch_columns(const Arguments& arguments, const Chip& chip, Rest... rest) {
    if constexpr (sizeof...(MORE) > 0) {
        if (arguments.k > BK) return dispatch_columns<Instance, P, MORE...>(arguments, chip, rest...);
    }
    return Instance<P, BK>::call(arguments, chip, rest...);
}
template <template <class, int> class Instance, int... COLUMNS, class Arguments, class... Rest>
auto dispatch(const Arguments& arguments, const Chip& chip, Rest... rest) {
    if (chip.capability < 80) return dispatch_columns<Instance, ProductsF32, COLUMNS...>(arguments, chip, rest...);
    if (arguments.kind == Kind::F16 || arguments.kind == Kind::BF16) {
        return dispatch_columns<Instance, Products16, COLUMNS...>(arguments, chip, rest...);
    }
    return dispatch_columns<Instance, ProductsTF32, COLUMNS...>(arguments, chip, rest...);
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
