// The forward kernels, and where calls meet them.
#include "forward.h"

namespace interp_nn {

const char* forward(const Forward& arguments, const DeviceSpec& device, Stream stream) {
    if (const char* wrong = problem(arguments, chip)) return wrong;
    return dispatch<ForwardInstance, 16, 64, 128>(TOO_LITTLE_SHARED, arguments, chip, stream);
}

}  // namespace interp_nn
