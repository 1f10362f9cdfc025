// The backward kernels of the summary, and where calls meet them.
#include "summary_backward.h"

namespace interp_nn {

Workspace summary_backward_workspace(const SummaryBackward& arguments, const DeviceSpec& device) {
    if (problem(arguments, chip) != nullptr) return {};
    return dispatch<SummaryBackwardInstance, 16, 64, 128>(Workspace{}, arguments, chip);
}

const char* summary_backward(const SummaryBackward& arguments, const DeviceSpec& device, Stream stream) {
    if (const char* wrong = problem(arguments, chip)) return wrong;
    return dispatch<SummaryBackwardInstance, 16, 64, 128>(TOO_LITTLE_SHARED, arguments, chip, stream);
}

}  // namespace interp_nn
