// The forward kernels, and the functions of launch.h for them.
#include "forward.h"

namespace interp_nn {

const char* forward(const Forward& arguments, const DeviceSpec& device, Stream stream) {
    return Kernels<ForwardInstance, 16, 64, 128>::launch(arguments, device, stream);
}

}  // namespace interp_nn
