// What the launchers know of a device, and of the CUDA that they stand on.
#include <map>
#include <mutex>
#include <utility>

#include "primitives.h"

namespace interp_nn {

static DeviceSpec failed(cudaError_t error) { return {0, 0, 0, cudaGetErrorString(error)}; }

static DeviceSpec read_chip(int device) {
    DeviceSpec chip{};
    int major = 0, minor = 0;
    const std::pair<int*, cudaDeviceAttr> wanted[] = {
        {&chip.multiprocessors, cudaDevAttrMultiProcessorCount},
        {&chip.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin},
        {&major, cudaDevAttrComputeCapabilityMajor},
        {&minor, cudaDevAttrComputeCapabilityMinor},
    };
    for (const auto& [value, attribute] : wanted) {
        if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device)) return failed(error);
    }
    chip.capability = 10 * major + minor;
    return chip;
}

DeviceSpec use_device(int device) {
    static std::mutex mutex;
    static std::map<int, DeviceSpec> chips;  // those that could be read
    // This library has a CUDA runtime of its own, which keeps a current device of its own. The error may be an earlier
    // launch's, which is why its text is kept.
    if (const cudaError_t error = cudaSetDevice(device)) return failed(error);
    const std::lock_guard<std::mutex> alone(mutex);
    if (const auto known = chips.find(device); known != chips.end()) return known->second;
    const DeviceSpec chip = read_chip(device);
    if (chip.error == nullptr) chips[device] = chip;
    return chip;
}

Versions cuda_versions() {
    Versions versions{};
    cudaRuntimeGetVersion(&versions.runtime);
    cudaDriverGetVersion(&versions.driver);
    return versions;
}

}  // namespace interp_nn
