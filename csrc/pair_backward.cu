// The kernels of the pair's backward, and the functions of launch.h for them.
#include "pair_backward.h"

namespace interp_nn {

using PairBackwardKernels = Kernels<PairBackwardInstance, 16, 64, 128>;

Workspace pair_backward_workspace(const PairBackward& arguments, const DeviceSpec& device) {
    return PairBackwardKernels::workspace(arguments, device);
}
const char* pair_backward(const PairBackward& arguments, const DeviceSpec& device, Stream stream) {
    return PairBackwardKernels::launch(arguments, device, stream);
}

}  // namespace interp_nn
