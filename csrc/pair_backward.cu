// The backward kernels of the pair, and where calls meet them.
#include "pair_backward.h"

namespace interp_nn {

Workspace pair_backward_workspace(const PairBackward& arguments, const DeviceSpec& device) {
    if (problem(arguments, chip) != nullptr) return {};
    return dispatch<PairBackwardInstance, 16, 64, 128>(Workspace{}, arguments, chip);
}

const char* pair_backward(const PairBackward& arguments, const DeviceSpec& device, Stream stream) {
    if (const char* wrong = problem(arguments, chip)) return wrong;
    if (arguments.dp == nullptr && arguments.dy == nullptr) return "neither dp nor dy";
    return dispatch<PairBackwardInstance, 16, 64, 128>(TOO_LITTLE_SHARED, arguments, chip, stream);
}

}  // namespace interp_nn
