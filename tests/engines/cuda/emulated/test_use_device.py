"""csrc/device_spec.cu with a CUDA runtime and a driver that the test plays."""

import ctypes
import subprocess

import emulator_build
import pytest

# The runtime: device 1 has 132 multiprocessors. The driver: the current context has `of_context` of them.
RUNTIME = """
#include <cstring>
#define CUDA_VERSION 12090
using CUcontext = void*;
struct CUdevResource { struct { unsigned smCount; } sm; };
enum CUresult { CUDA_SUCCESS };
enum { CU_DEV_RESOURCE_TYPE_SM, cudaEnableDefault };
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
inline int current, sets, of_context;  // of_context 0: a driver before green contexts
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
    if (device > 1) return cudaErrorInvalidDevice;
    return current = device, ++sets, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const int values[] = {132, 232448, 9, 0};
    return *value = values[attribute], cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int*) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int*) { return cudaSuccess; }
inline CUresult cuCtxGetCurrent(CUcontext* context) { return *context = &current, CUDA_SUCCESS; }
inline CUresult cuCtxGetDevResource(CUcontext, CUdevResource* resource, int) {
    return resource->sm.smCount = of_context, CUDA_SUCCESS;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* found) {
    const bool first = std::strcmp(name, "cuCtxGetCurrent") == 0;
    *function = first ? (void*)&cuCtxGetCurrent : of_context == 0 ? nullptr : (void*)&cuCtxGetDevResource;
    *found = *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
"""
CALLS = """
#include "device_spec.cu"
extern "C" void context(int device, int multiprocessors) { current = device, sets = 0, of_context = multiprocessors; }
extern "C" const char* use(int device) { return interp_nn::use_device(device).error; }
extern "C" int multiprocessors(int device) { return interp_nn::use_device(device).multiprocessors; }
extern "C" int sets_of_device() { return sets; }
"""


@pytest.fixture
def library(tmp_path):
    (tmp_path / "cuda.h").write_text("#pragma once\n" + RUNTIME)
    (tmp_path / "cuda_runtime.h").write_text('#include "cuda.h"\n')
    (tmp_path / "calls.cpp").write_text(CALLS)
    flags = ["-std=c++17", "-shared", "-fPIC", "-fno-gnu-unique", f"-I{tmp_path}", f"-I{emulator_build.CSRC}"]
    subprocess.run(["g++", *flags, tmp_path / "calls.cpp", "-o", tmp_path / "calls.so"], check=True)
    library = ctypes.CDLL(str(tmp_path / "calls.so"))
    library.use.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("of_context", [0, 132], ids=["old driver", "whole device"])
def test_the_device_is_set_only_where_it_is_another(library, of_context):
    """Setting it would replace a context that the caller has made current."""
    library.context(0, of_context)
    assert library.use(0) is None and library.sets_of_device() == 0
    assert library.use(1) is None and library.sets_of_device() == 1
    assert library.multiprocessors(1) == 132 and library.sets_of_device() == 1
    assert library.use(2) == b"invalid device ordinal"


def test_a_context_with_a_part_of_the_device_has_fewer_multiprocessors(library):
    """A grid for the whole device would not start in a green context."""
    library.context(0, 64)
    assert library.use(0) is None and library.multiprocessors(0) == 64
    library.context(0, 132)
    assert library.multiprocessors(0) == 132
