// The kernels of the pair's loss, and where calls meet them.
#include "pair_loss.h"

namespace interp_nn {

Workspace pair_loss_workspace(const PairLoss& arguments, const DeviceSpec& device) {
    if (problem(arguments, chip) != nullptr) return {};
    return dispatch<PairLossInstance, 16, 128>(Workspace{}, arguments, chip);
}

const char* pair_loss(const PairLoss& arguments, const DeviceSpec& device, Stream stream) {
    if (const char* wrong = problem(arguments, chip)) return wrong;
    return dispatch<PairLossInstance, 16, 128>(TOO_LITTLE_SHARED, arguments, chip, stream);
}

}  // namespace interp_nn
