// The kernels of the summary's backward, and the functions of launch.h for them.
#include "summary_backward.h"

namespace interp_nn {

using SummaryBackwardKernels = Kernels<SummaryBackwardInstance, 16, 64, 128>;

Workspace summary_backward_workspace(const SummaryBackward& arguments, const DeviceSpec& device) {
    return SummaryBackwardKernels::workspace(arguments, device);
}
const char* summary_backward(const SummaryBackward& arguments, const DeviceSpec& device, Stream stream) {
    return SummaryBackwardKernels::launch(arguments, device, stream);
}

}  // namespace interp_nn
