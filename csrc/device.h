// The device of the binding's tensors: a CUDA device with its current stream, or the CPU under the emulator.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>

#include "launch.h"

namespace interp_nn {

using torch::stable::Tensor;

// A device with so many multiprocessors fewer, and at least one.
inline DeviceSpec without(DeviceSpec spec, int64_t carve_out) {
    spec.multiprocessors = static_cast<int>(std::max<int64_t>(1, spec.multiprocessors - carve_out));
    return spec;
}

#if !defined(INTERP_NN_EMULATED)

#define INTERP_NN_DISPATCH_KEY CUDA
inline int32_t device_type() { return aoti_torch_device_type_cuda(); }

// PyTorch's current stream on a device. Builds without CUDA lack the function, and must be able to load this library.
using CurrentStream = AOTITorchError (*)(int32_t, void**);
inline CurrentStream current_stream() {
    static const CurrentStream found = [] {
        void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
        return reinterpret_cast<CurrentStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream")
                                                       : nullptr);
    }();
    return found;
}

// Makes a device the current one, here and in PyTorch, and knows its stream. Others have `carve_out` multiprocessors.
struct Device {
    Device(const Tensor& x, int64_t carve_out)
        : guard(x.get_device_index()), spec(without(use_device(x.get_device_index()), carve_out)) {
        STD_TORCH_CHECK(current_stream() != nullptr, "this build of PyTorch has no CUDA");
        TORCH_ERROR_CODE_CHECK(current_stream()(x.get_device_index(), &stream));
    }
    torch::stable::accelerator::DeviceGuard guard;
    DeviceSpec spec;
    void* stream = nullptr;
};

inline void just_allocated(const Tensor&) {}

#else

#define INTERP_NN_DISPATCH_KEY CPU
inline int32_t device_type() { return aoti_torch_device_type_cpu(); }

struct Device {
    Device(const Tensor&, int64_t carve_out) : spec(without({3, 163 << 10, 80, nullptr}, carve_out)) {}
    DeviceSpec spec;
    void* stream = nullptr;
};

// Elements that no kernel writes are NaN.
inline void just_allocated(const Tensor& t) { std::memset(t.data_ptr(), 0xFF, t.numel() * t.element_size()); }

#endif

}  // namespace interp_nn
