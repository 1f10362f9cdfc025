// What the launchers know of a device, and of the CUDA that they stand on.
#include <mutex>

#include "primitives.h"

namespace interp_nn {

static Chip read_chip(int device) {
    Chip chip{};
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&chip.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&chip.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    chip.capability = 10 * major + minor;
    return chip;
}

Chip use_device(int device) {
    constexpr int MOST = 64;
    static Chip chips[MOST];
    static std::once_flag known[MOST];
    // This library has a CUDA runtime of its own, which keeps a current device of its own.
    if (cudaSetDevice(device) != cudaSuccess) return {};
    if (device >= MOST) return read_chip(device);
    std::call_once(known[device], [&] { chips[device] = read_chip(device); });
    return chips[device];
}

Versions cuda_versions() {
    Versions versions{};
    cudaRuntimeGetVersion(&versions.runtime);
    cudaDriverGetVersion(&versions.driver);
    return versions;
}

}  // namespace interp_nn
