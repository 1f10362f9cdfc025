// The kernels of the head's loss, and where calls meet them.
#include "head_loss.h"

namespace interp_nn {

static const char* wrong_with(const HeadLoss& arguments, const DeviceSpec& device) {
    if (arguments.m < 1 || arguments.m > MOST_COLUMNS) return "classes must be 1 to 128";
    return problem(arguments, chip);
}

Workspace head_loss_workspace(const HeadLoss& arguments, const DeviceSpec& device) {
    if (wrong_with(arguments, chip) != nullptr) return {};
    return dispatch<HeadLossOfColumns, 128>(Workspace{}, arguments, chip);
}

const char* head_loss(const HeadLoss& arguments, const DeviceSpec& device, Stream stream) {
    if (const char* wrong = wrong_with(arguments, chip)) return wrong;
    return dispatch<HeadLossOfColumns, 128>(TOO_LITTLE_SHARED, arguments, chip, stream);
}

}  // namespace interp_nn
