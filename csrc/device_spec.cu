// The properties of devices, and the versions of CUDA.
#include <cuda.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#include "launch.h"

namespace interp_nn {

static DeviceSpec failed(const char* error) { return {0, 0, 0, error}; }

// A function of the driver, or nullptr where the driver is older. The library is not linked to the driver.
template <class Function> static Function of_driver(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &function, CUDA_VERSION, cudaEnableDefault, &found);
    return reinterpret_cast<Function>(error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function
                                                                                                   : nullptr);
}

// The multiprocessors of the current context: fewer than the device's in a green context. 0 if they cannot be read.
static int multiprocessors_of_context() {
    static const auto current = of_driver<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent");
    static const auto resource_of = of_driver<decltype(&cuCtxGetDevResource)>("cuCtxGetDevResource");
    CUcontext context = nullptr;
    CUdevResource resource{};
    if (current == nullptr || resource_of == nullptr || current(&context) != CUDA_SUCCESS || context == nullptr)
        return 0;
    if (resource_of(context, &resource, CU_DEV_RESOURCE_TYPE_SM) != CUDA_SUCCESS) return 0;
    return static_cast<int>(resource.sm.smCount);
}

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
        if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device)) {
            return failed(cudaGetErrorString(error));
        }
    }
    spec.capability = 10 * major + minor;
    return spec;
}

DeviceSpec use_device(int device) {
    static std::mutex mutex;
    static std::map<int, DeviceSpec> specs;  // of devices that could be read
    // This library contains its own CUDA runtime. Setting the device would replace a context that the caller has made
    // current. The error may come from an earlier launch, so its text is returned.
    int current = -1;
    cudaError_t error = cudaGetDevice(&current);
    if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
    if (error != cudaSuccess) return failed(cudaGetErrorString(error));
    DeviceSpec spec{};
    {
        const std::lock_guard<std::mutex> lock(mutex);
        const auto known = specs.find(device);
        spec = known != specs.end() ? known->second : read_spec(device);
        if (spec.error == nullptr) specs[device] = spec;
    }
    // A grid waits at its barrier for programs on all of these multiprocessors.
    const int multiprocessors = spec.error == nullptr ? multiprocessors_of_context() : 0;
    if (multiprocessors != 0 && multiprocessors < spec.multiprocessors) spec.multiprocessors = multiprocessors;
    return spec;
}

Versions cuda_versions() {
    Versions versions{};
    cudaRuntimeGetVersion(&versions.runtime);
    cudaDriverGetVersion(&versions.driver);
    return versions;
}

}  // namespace interp_nn
