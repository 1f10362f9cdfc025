// The kernels as functions of plain pointers and sizes. A binding needs only this header.
//
// X is (n, d) and b (d, k), whose element (f, c) is at b[f * b_feature + c * b_column]: fastest where b_feature is 1,
// as for a layer's weight. All other matrices are row-major. n may be 0, d and k may not. Optional pointers may be
// null; the kernel then leaves out what they stand for. Row offsets are 64-bit.
//
//     symbol      shape            meaning
//     X           (n, d)           input
//     b           (d, k)           weight
//     P, G, Y                      a X b (n, k), a² bᵀb (k, k), P q(G) (n, k)
//     a, q                         a scale and a polynomial; a = 1 and q(G) = G for the summary
//     dX, ...     the symbol's     a d before a symbol: the gradient of the loss with respect to it
//     D           (n, k)           gradient of the projection through both outputs, dP + dY q(G)
//     S, T        (d, k), (k, k)   Xᵀ dY, Pᵀ dY
//     M           (k, k)           derivative of q at G along T + Tᵀ; this itself for the summary
//     BN, BD, BK                   rows, features and padded columns of a tile
//
// 16-bit operands are multiplied as they are, fp32 operands as tf32 or as two tf32 parts. Every sum is fp32.
//
// Functions return nullptr, or the text of an error. They launch one kernel on the current device and do not wait for
// it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace interp_nn {

// A cudaStream_t; under the emulator, the seed of a schedule.
using Stream = void*;

// Storage and products of the operands. TF32 is fp32 in memory. F32 is multiplied as two tf32 parts or, below compute
// capability 8.0, as it is. All others need 8.0.
enum class Kind { F16, BF16, TF32, F32 };

// The properties of a device that a launch depends on. Grids are a function of these and of the sizes, so results never
// depend on load.
struct DeviceSpec {
    int multiprocessors;  // of the current context, less the carve-out; each takes one program
    int shared;           // most bytes of shared memory a program may ask for
    int capability;       // 10 major + minor
    const char* error;    // why the properties are unknown, or nullptr
};

// Make a device the current one of this library.
DeviceSpec use_device(int device);

// As 1000 major + 10 minor: the CUDA runtime that the library contains, and the newest one that the driver serves, or
// 0.
struct Versions {
    int runtime, driver;
};
Versions cuda_versions();

// The sizes of the memory through which a kernel's phases exchange data. The caller allocates it, with any contents.
struct Workspace {
    int64_t floats = 0;  // of `work`
    int64_t rows = 0;    // of `rows`, in elements of X's type
};

// q(G) = c0 I + c1 G + ... of degree 1 or more, and the scale a of b. They are read on the device.
constexpr int MOST_COEFFICIENTS = 5;
struct Polynomial {
    const float* coefficients;  // (degree + 1); null for the summary, whose q(G) is G and whose scale is 1
    const float* scale;         // null for 1
    int degree;
};

// The operands of every kernel.
struct Operands {
    const void* x;
    const void* b;
    int64_t n;
    int64_t b_feature, b_column;
    int d, k;
    Kind kind;
    Polynomial q;
};

// The further arguments of kernels with gradients.
struct Gradients : Operands {
    void* dx;  // (n, d), optional
    void* db;  // row-major (d, k), or (k, d) where db_transposed; optional
    bool db_transposed;
    float* dcoefficients;  // (degree + 1), optional, of a polynomial
    void* rows;            // workspaces
    float* work;
    uint32_t* counter;  // zero at first, then as the last launch left it; concurrent launches need one each
};

// Y = P q(G) + bias, and optionally P, G and q(G), rounded to X's type. One program a multiprocessor, no barrier.
struct Forward : Operands {
    const void* bias;  // (k), optional
    void* p;           // (n, k), optional
    void* y;           // (n, k)
    void* g;           // (k, k), optional
    void* q_of_g;      // (k, k), optional, of a polynomial
};
const char* forward(const Forward& arguments, const DeviceSpec& device, Stream stream);

// dX = a D bᵀ and db = a Xᵀ D + a² b M with D = dP + dY q(G) and T = Pᵀ dY.
struct PairBackward : Gradients {
    const void* p;       // (n, k), as forward stored it
    const void* g;       // (k, k), as forward stored it; null for the summary
    const void* q_of_g;  // (k, k), as forward stored it: G for the summary
    const void* dp;      // (n, k), optional, but not without dy
    const void* dy;      // (n, k), optional: D is then dP itself, and p, g and q_of_g are not read
};
Workspace pair_backward_workspace(const PairBackward& arguments, const DeviceSpec& device);
const char* pair_backward(const PairBackward& arguments, const DeviceSpec& device, Stream stream);

// dX = dY Wᵀ with W = a b q(G), db = a S q(G) + a² b M with S = Xᵀ dY and T = a bᵀ S, dbias = the column sums of dY.
struct SummaryBackward : Gradients {
    const void* g;       // (k, k), as forward stored it; null for the summary
    const void* q_of_g;  // (k, k), as forward stored it: G for the summary
    const void* dy;      // (n, k)
    void* dbias;         // (k), optional
};
Workspace summary_backward_workspace(const SummaryBackward& arguments, const DeviceSpec& device);
const char* summary_backward(const SummaryBackward& arguments, const DeviceSpec& device, Stream stream);

// w1 CE(o1, t) + w2 CE(o2, t) + w3 MSE(o1, o2) of two logits a class. Rows with target ignore_index do not count.
enum class Reduction { NONE, MEAN, SUM };
struct LossTerms {
    const int64_t* target;  // (n), in [0, classes) or ignore_index; another one stops the kernel
    const float* upstream;  // one number, or (n) for Reduction::NONE; null for 1
    float* value;           // one number, or (n) for Reduction::NONE
    int64_t ignore_index;
    float w1, w2, w3;
    Reduction reduction;
};

// The loss of (P, Y) and the gradients that are asked for. The columns are the classes.
struct PairLoss : Gradients {
    LossTerms terms;
};
Workspace pair_loss_workspace(const PairLoss& arguments, const DeviceSpec& device);
const char* pair_loss(const PairLoss& arguments, const DeviceSpec& device, Stream stream);

// The same for (P Aᵀ + c, Y Aᵀ + c), behind an output layer.
struct HeadLoss : Gradients {
    const void* a;  // (m, k)
    const void* c;  // (m), optional
    LossTerms terms;
    void* da;  // (m, k), optional
    void* dc;  // (m), optional
    int m;     // classes
};
Workspace head_loss_workspace(const HeadLoss& arguments, const DeviceSpec& device);
const char* head_loss(const HeadLoss& arguments, const DeviceSpec& device, Stream stream);

// gradients *= upstream in place; an upstream of 1 leaves memory untouched. Sizes are in elements, and may be zero.
constexpr int MOST_GRADIENTS = 5;
struct Scale {
    const float* upstream;
    void* gradients[MOST_GRADIENTS];
    int64_t sizes[MOST_GRADIENTS];
    bool wide[MOST_GRADIENTS];  // in fp32, as of the coefficients; the others are of the kind
    Kind kind;
};
const char* scale(const Scale& arguments, const DeviceSpec& device, Stream stream);

}  // namespace interp_nn
