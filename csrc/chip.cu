// What the launchers know of the current device.
#include "primitives.h"

namespace interp_nn {

Chip current_chip() {
    int device = 0, major = 0, minor = 0;
    Chip chip{};
    if (cudaGetDevice(&device) != cudaSuccess) return chip;
    cudaDeviceGetAttribute(&chip.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&chip.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    chip.capability = 10 * major + minor;
    return chip;
}

}  // namespace interp_nn
