// The kernels of the pair's loss, and the functions of launch.h for them.
#include "pair_loss.h"

namespace interp_nn {

using PairLossKernels = Kernels<PairLossInstance, 16, 128>;

Workspace pair_loss_workspace(const PairLoss& arguments, const DeviceSpec& device) {
    return PairLossKernels::workspace(arguments, device);
}
const char* pair_loss(const PairLoss& arguments, const DeviceSpec& device, Stream stream) {
    return PairLossKernels::launch(arguments, device, stream);
}

}  // namespace interp_nn
