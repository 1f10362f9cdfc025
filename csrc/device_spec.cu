// The properties of devices, and the versions of CUDA.
#include <map>
#include <mutex>
#include <utility>

#include "primitives.h"

namespace interp_nn {

static DeviceSpec failed(cudaError_t error) { return {0, 0, 0, cudaGetErrorString(error)}; }

static DeviceSpec read_spec(int device) {
    DeviceSpec spec{};
    int major = 0, minor = 0;
    const std::pair<int*, cudaDeviceAttr> wanted[] = {
        {&spec.multiprocessors, cudaDevAttrMultiProcessorCount},
        {&spec.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin},
        {&major, cudaDevAttrComputeCapabilityMajor},
        {&minor, cudaDevAttrComputeCapabilityMinor},
    };
    for (const auto& [value, attribute] : wanted) {
        if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device)) return failed(error);
    }
    spec.capability = 10 * major + minor;
    return spec;
}

DeviceSpec use_device(int device) {
    static std::mutex mutex;
    static std::map<int, DeviceSpec> specs;  // of devices that could be read
    // This library contains its own CUDA runtime, with its own current device. The error may come from an earlier
    // launch, so its text is returned.
    if (const cudaError_t error = cudaSetDevice(device)) return failed(error);
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto known = specs.find(device); known != specs.end()) return known->second;
    const DeviceSpec spec = read_spec(device);
    if (spec.error == nullptr) specs[device] = spec;
    return spec;
}

Versions cuda_versions() {
    Versions versions{};
    cudaRuntimeGetVersion(&versions.runtime);
    cudaDriverGetVersion(&versions.driver);
    return versions;
}

}  // namespace interp_nn
