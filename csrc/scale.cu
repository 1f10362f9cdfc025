// Gradients of a loss times an upstream gradient that is read on the device.
#include "dispatch.h"

namespace interp_nn {

template <class T> DEVICE void scale_gradient(const Scale& arguments, int i, float upstream, bool is_bf16) {
    auto* const gradient = static_cast<T*>(arguments.gradients[i]);
    const int64_t step = static_cast<int64_t>(programs()) * THREADS;
    NO_UNROLL for (int64_t j = static_cast<int64_t>(program()) * THREADS + thread(); j < arguments.sizes[i]; j += step) {
        gradient[j] = round_to<T>(widen(gradient[j], is_bf16) * upstream, is_bf16);
    }
}

KERNEL scale_kernel(Scale arguments, Mode mode) {
    const float upstream = *arguments.upstream;
    if (upstream == 1.f) return;
    NO_UNROLL for (int i = 0; i < MOST_GRADIENTS; ++i) {
        if (arguments.wide[i]) {
            scale_gradient<float>(arguments, i, upstream, mode.is_bf16);
        } else {
            scale_gradient<Half>(arguments, i, upstream, mode.is_bf16);
        }
    }
}

const char* scale(const Scale& arguments, const DeviceSpec& device, Stream stream) {
    if (device.error != nullptr) return device.error;
    int64_t most = 0;
    for (int i = 0; i < MOST_GRADIENTS; ++i) most = arguments.sizes[i] > most ? arguments.sizes[i] : most;
    const int64_t jobs = divide_up(most, 8 * THREADS), room = 4 * int64_t{device.multiprocessors};
    const int blocks = static_cast<int>(jobs < 1 ? 1 : jobs < room ? jobs : room);
    return start(scale_kernel, blocks, 0, false, stream, arguments, mode_of(arguments.kind));
}

}  // namespace interp_nn
