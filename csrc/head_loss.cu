// The kernels of the head's loss, and the functions of launch.h for them.
#include "head_loss.h"

namespace interp_nn {

using HeadLossKernels = Kernels<HeadLossOfColumns, 128>;

Workspace head_loss_workspace(const HeadLoss& arguments, const DeviceSpec& device) {
    return HeadLossKernels::workspace(arguments, device);
}
const char* head_loss(const HeadLoss& arguments, const DeviceSpec& device, Stream stream) {
    return HeadLossKernels::launch(arguments, device, stream);
}

}  // namespace interp_nn
