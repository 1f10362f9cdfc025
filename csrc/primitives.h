// The primitives that kernels are made of: PTX instructions on a GPU, calls of the tests' emulator on a CPU.
//
// Only this file differs between the two. The kernels themselves are plain C++.
#pragma once

#undef NDEBUG  // for the declaration of __assert_fail
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "launch.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
#define NOINLINE inline __device__ __noinline__
#define HOST_DEVICE inline __host__ __device__
#define KERNEL __global__ void __launch_bounds__(interp_nn::THREADS, 1)
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
#define PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(count) PRAGMA(unroll(count))
#define TRAP() __trap()
#else
#include "emulator.h"

#define DEVICE inline
#define NOINLINE inline
#define HOST_DEVICE inline
#define KERNEL void
#define UNROLL
#define NO_UNROLL
#define UNROLL_BY(count)
#define TRAP()
#endif

// The body of a kernel for products P. Code that was compiled for a GPU without their instructions traps. Without the
// trap the launch would succeed and compute nothing.
#define RUN_IF_AVAILABLE(P, ...)  \
    if constexpr (P::available) { \
        __VA_ARGS__;              \
    } else {                      \
        TRAP();                   \
    }

namespace interp_nn {

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;

constexpr uint32_t TF32_BITS = 0xFFFFE000;  // sign, exponent and ten bits after the point

// A 16-bit number in memory, bfloat16 or IEEE half; a kernel learns at run time which (Mode::is_bf16).
struct Half {
    uint16_t bits;
};

#if defined(__CUDACC__)

DEVICE int thread() { return threadIdx.x % THREADS; }  // so that compilers know its range
DEVICE int program() { return blockIdx.x; }
DEVICE int programs() { return gridDim.x; }

DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

DEVICE float widen(Half v, bool is_bf16) {
    return is_bf16 ? __uint_as_float(uint32_t{v.bits} << 16) : __half2float(__ushort_as_half(v.bits));
}
DEVICE Half narrow(float v, bool is_bf16) {
    return {is_bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(v)) : __half_as_ushort(__float2half_rn(v))};
}

// Two 16-bit numbers in one register, the first in its lower half.
DEVICE uint32_t pack(float low, float high, bool is_bf16) {
    if (is_bf16) {
        const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&both);
    }
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}

DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copy BYTES (4 or 16) from global to shared memory without waiting. Where not valid, write zeros and read nothing.
template <int BYTES> DEVICE void copy_async(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
    const uint32_t to = shared_address(shared);
    const int size = valid ? BYTES : 0;
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(size)
                     : "memory");
    }
#else
    auto* to = static_cast<uint32_t*>(shared);
    const auto* from = static_cast<const uint32_t*>(global);
    UNROLL for (int i = 0; i < BYTES / 4; ++i) to[i] = valid ? from[i] : 0u;
#endif
}

DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int PENDING> DEVICE void wait_for_all_but() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Wait until at most `pending` of this thread's groups of copies are under way.
DEVICE void wait_copies(int pending) {
    if (pending <= 0) {
        wait_for_all_but<0>();
    } else if (pending == 1) {
        wait_for_all_but<1>();
    } else {
        wait_for_all_but<2>();
    }
}

// Four 8 x 8 matrices of 16-bit numbers; lane 8 i + r gives the address of row r of matrix i.
template <bool TRANSPOSED> DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
}

// c (16 x 8) += a (16 x 16 in 16 bits, 16 x 8 in tf32) b, each spread over the warp. Of a tf32 operand only the bits of
// TF32_BITS count. Kernels below 8.0 compile it but never call it.
#if __CUDA_ARCH__ >= 800
#define INTERP_NN_MULTIPLY(SHAPE_AND_TYPES)                                                                   \
    asm volatile("mma.sync.aligned." SHAPE_AND_TYPES " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#else
#define INTERP_NN_MULTIPLY(SHAPE_AND_TYPES) TRAP()
#endif
template <bool IS_BF16> DEVICE void multiply_16(float (&c)[4], const uint32_t* a, const uint32_t* b) {
    if constexpr (IS_BF16) {
        INTERP_NN_MULTIPLY("m16n8k16.row.col.f32.bf16.bf16.f32");
    } else {
        INTERP_NN_MULTIPLY("m16n8k16.row.col.f32.f16.f16.f32");
    }
}
DEVICE void multiply_tf32(float (&c)[4], const uint32_t* a, const uint32_t* b) {
    INTERP_NN_MULTIPLY("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef INTERP_NN_MULTIPLY

// e^v to about two units in the last place; zero where that is no normal number.
DEVICE float exponential(float v) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v * 1.4426950408889634f));
    return power;
}

DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

// Keep later loads after this point: the compiler would otherwise load a whole loop's operands first and spill
// registers.
DEVICE void in_order() { asm volatile("" ::: "memory"); }

DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }

// Stop the launch where a condition does not hold, as PyTorch's own kernels do. assert() would also store this file's
// path, and builds in two folders would differ.
DEVICE void demand(bool holds, const char* what) {
    if (!holds) __assert_fail(what, "interp_nn", 0, "demand");
}

DEVICE uint32_t add_and_order(uint32_t* word, uint32_t value) {
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
    return before;
}

DEVICE uint32_t look_in_order(const uint32_t* word) {
    uint32_t now;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
    return now;
}

// Start a kernel. Return the text of an error, or nullptr. A cooperative grid that is not resident at once is an error.
template <class... Parameters> const char* start(void (*kernel)(Parameters...), int blocks, size_t shared,
                                                 bool cooperative, Stream stream, Parameters... parameters) {
    if (shared > 48 << 10) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = cooperative;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters...);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#else  // the emulator

inline int thread() { return emulator::current->thread; }
inline int program() { return emulator::current->block; }
inline int programs() { return static_cast<int>(emulator::grid.blocks.size()); }
inline unsigned char* shared_memory() { return emulator::block().shared.get(); }

inline uint32_t bits_of(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}
inline float as_float(uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}

inline float widen(Half v, bool is_bf16) {
    if (is_bf16) return as_float(uint32_t{v.bits} << 16);
    _Float16 half;
    std::memcpy(&half, &v.bits, 2);
    return static_cast<float>(half);
}
inline Half narrow(float v, bool is_bf16) {
    if (is_bf16) {
        if (std::isnan(v)) return {0x7FC0};
        const uint32_t bits = bits_of(v);
        return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
    }
    const auto half = static_cast<_Float16>(v);
    Half result;
    std::memcpy(&result.bits, &half, 2);
    return result;
}
inline uint32_t pack(float low, float high, bool is_bf16) {
    return uint32_t{narrow(high, is_bf16).bits} << 16 | narrow(low, is_bf16).bits;
}

template <int BYTES> void copy_async(void* shared, const void* global, bool valid) {
    emulator::copy_async(shared, global, BYTES, valid);
}
inline void commit_copies() { emulator::commit_copies(); }
inline void wait_copies(int pending) { emulator::wait_copies(pending); }

template <bool TRANSPOSED> void load_matrices(uint32_t (&r)[4], const void* row) {
    emulator::load_matrices(r, row, TRANSPOSED);
}

template <bool IS_BF16> void multiply_16(float (&c)[4], const uint32_t* a, const uint32_t* b) {
    emulator::multiply<16>("multiply_16", c, a, b, [](uint32_t word, int place) {
        return widen({static_cast<uint16_t>(word >> 16 * place)}, IS_BF16);
    });
}
inline void multiply_tf32(float (&c)[4], const uint32_t* a, const uint32_t* b) {
    emulator::multiply<8>("multiply_tf32", c, a, b, [](uint32_t word, int) { return as_float(word & TF32_BITS); });
}

inline float exponential(float v) { return std::exp2(v * 1.4426950408889634f); }

inline void block_barrier() { emulator::block_barrier(); }
inline void warp_barrier() { emulator::warp_barrier(); }
inline void in_order() {}
inline float shuffle(float value, int lane) { return emulator::shuffle(value, lane); }
inline void demand(bool holds, const char* what) {
    if (!holds) emulator::fail(what);
}

inline uint32_t add_and_order(uint32_t* word, uint32_t value) {
    emulator::poll();
    const uint32_t before = *word;
    *word += value;
    return before;
}
inline uint32_t look_in_order(const uint32_t* word) {
    emulator::poll();
    return *word;
}

template <class... Parameters> const char* start(void (*kernel)(Parameters...), int blocks, size_t shared, bool,
                                                 Stream stream, Parameters... parameters) {
    const auto seed = static_cast<unsigned>(reinterpret_cast<uintptr_t>(stream));
    emulator::run(blocks, THREADS, shared, seed, [=] { kernel(parameters...); });
    return nullptr;
}

#endif

DEVICE float widen(float v, bool) { return v; }
template <class T> DEVICE T round_to(float v, bool is_bf16) {
    if constexpr (sizeof(T) == 2) {
        return narrow(v, is_bf16);
    } else {
        return v;
    }
}

DEVICE int lane() { return thread() % 32; }
DEVICE int warp() { return thread() / 32; }

// Wait until every program of the grid has arrived; all of them must be resident at once. The first program adds 2^31 -
// (programs - 1) and each other program adds 1. The sign bit flips when all have arrived, and the counter needs no
// reset: it is ready for the next barrier, the next launch, or a replayed graph.
NOINLINE void grid_barrier(uint32_t* counter) {
    block_barrier();  // the program's own stores come before its arrival
    if (thread() == 0) {
        const uint32_t step = program() == 0 ? 0x80000000u - static_cast<uint32_t>(programs() - 1) : 1u;
        const uint32_t before = add_and_order(counter, step);
        while (((before ^ look_in_order(counter)) & 0x80000000u) == 0) {
        }
    }
    block_barrier();
}

}  // namespace interp_nn
