// The kernels as functions of plain pointers and sizes: what a binding needs to know, and all of it.
//
// X is (n, d) and b (d, k), whose element (f, c) is at b[f * b_feature + c * b_column]: fastest where b_feature is 1,
// as for a layer's weight. All other matrices are row-major. P = X b, G = bᵀb, Y = P G; a D before a name is a
// gradient. k is at most 128; n may be 0, d and k may not. Pointers that are said to be optional may be null, and what
// they stand for is then left out. 16-bit operands are multiplied as they are, fp32 ones as tf32 or as two such parts;
// every sum is fp32. Row offsets are 64-bit.
//
// Functions return nullptr, or the text of an error. They launch one kernel on the current device and wait for nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace interp_nn {

// A cudaStream_t; under the emulator, the seed of a schedule.
using Stream = void*;

// How the operands are stored and multiplied. TF32 is fp32 in memory, F32 the sum of two tf32 parts or, below compute
// capability 8.0, multiplied as it is; all others need 8.0.
enum class Kind { F16, BF16, TF32, F32 };

constexpr int MOST_COLUMNS = 128;

// The device as the launchers see it: what they decide is a function of it and of the sizes, so results never depend
// on load.
struct DeviceSpec {
    int multiprocessors;  // how many, each taking one program
    int shared;           // most bytes of shared memory a program may ask for
    int capability;       // 10 major + minor
    const char* error;    // why nothing is known of it, or nullptr
};

// Makes a device the current one of this library.
DeviceSpec use_device(int device);

// As 1000 major + 10 minor: the CUDA that the library has linked in, and the newest one that the driver serves, or 0.
struct Versions {
    int runtime, driver;
};
Versions cuda_versions();

// Memory a kernel hands its numbers from phase to phase in, which the caller allocates; contents before and after do
// not matter.
struct Workspace {
    int64_t floats = 0;  // of `work`
    int64_t rows = 0;    // of `rows`, in elements of X's type
};

// What every kernel works on.
struct Operands {
    const void* x;
    const void* b;
    int64_t n;
    int64_t b_feature, b_column;
    int d, k;
    Kind kind;
};

// What those with gradients have besides: these, and what passes from phase to phase.
struct Gradients : Operands {
    void* dx;  // (n, d), optional
    void* db;  // row-major (d, k), or (k, d) where db_transposed; optional
    bool db_transposed;
    void* rows;  // workspaces
    float* work;
    uint32_t* counter;  // zero at first, and then as a launch left it; no two launches at a time may share it
};

// Y = X b G + bias, with P and G where asked, rounded to X's type. One program a multiprocessor, no barrier.
struct Forward : Operands {
    const void* bias;  // (k), optional
    void* p;           // (n, k), optional
    void* y;           // (n, k)
    void* g;           // (k, k), optional
};
const char* forward(const Forward& arguments, const DeviceSpec& device, Stream stream);

// dX = D bᵀ and db = Xᵀ D + b (T + Tᵀ) with D = dP + dY G and T = Pᵀ dY.
struct PairBackward : Gradients {
    const void* p;   // (n, k), as forward stored it
    const void* g;   // (k, k), as forward stored it
    const void* dp;  // (n, k), optional, but not without dy
    const void* dy;  // (n, k), optional: D is then dP itself, and p and g are not read
};
Workspace pair_backward_workspace(const PairBackward& arguments, const DeviceSpec& device);
const char* pair_backward(const PairBackward& arguments, const DeviceSpec& device, Stream stream);

// dX = dY Wᵀ with W = b G, db = S G + b (T + Tᵀ) with S = Xᵀ dY and T = bᵀ S, dbias = the column sums of dY.
struct SummaryBackward : Gradients {
    const void* g;   // (k, k), as forward stored it
    const void* dy;  // (n, k)
    void* dbias;     // (k), optional
};
Workspace summary_backward_workspace(const SummaryBackward& arguments, const DeviceSpec& device);
const char* summary_backward(const SummaryBackward& arguments, const DeviceSpec& device, Stream stream);

// w1 CE(o1, t) + w2 CE(o2, t) + w3 MSE(o1, o2) of two logits a class. Rows whose target is ignore_index do not count.
enum class Reduction { NONE, MEAN, SUM };
struct LossTerms {
    const int64_t* target;  // (n), in [0, classes) or ignore_index: else the kernel stops
    const float* upstream;  // one number, or (n) for Reduction::NONE; null for 1
    float* value;           // likewise
    int64_t ignore_index;
    float w1, w2, w3;
    Reduction reduction;
};

// The loss of (P, Y), and its gradients where they are asked for; of up to 128 columns, which are the classes.
struct PairLoss : Gradients {
    LossTerms terms;
};
Workspace pair_loss_workspace(const PairLoss& arguments, const DeviceSpec& device);
const char* pair_loss(const PairLoss& arguments, const DeviceSpec& device, Stream stream);

// The loss of (P Aᵀ + c, Y Aᵀ + c) behind an output layer, likewise.
struct HeadLoss : Gradients {
    const void* a;  // (m, k)
    const void* c;  // (m), optional
    LossTerms terms;
    void* da;  // (m, k), optional
    void* dc;  // (m), optional
    int m;     // classes, up to 128
};
Workspace head_loss_workspace(const HeadLoss& arguments, const DeviceSpec& device);
const char* head_loss(const HeadLoss& arguments, const DeviceSpec& device, Stream stream);

// gradients *= upstream, in place; for an upstream of 1 nothing is touched. Sizes are in elements, and may be zero.
struct Scale {
    const float* upstream;
    void* gradients[4];
    int64_t sizes[4];
    Kind kind;
};
const char* scale(const Scale& arguments, const DeviceSpec& device, Stream stream);

}  // namespace interp_nn
