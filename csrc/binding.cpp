// The kernels as private operators of PyTorch, through its stable ABI: a library compiled once serves every PyTorch
// from 2.10 on. interp_nn/engines/cuda/engine.py has their schemas and fake kernels, and is their only caller. It has
// checked the arguments; the checks here only keep a call from reading what is not there.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "device.h"

namespace {

using interp_nn::Device;
using interp_nn::Kind;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// engine.py knows an error of a launch by these words.
void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "not launched: ", error != nullptr ? error : ""); }

int32_t dtype_of(const Tensor& t) {
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
    return dtype;
}

Kind kind_of(const Tensor& t, bool tf32) {
    const int32_t dtype = dtype_of(t);
    if (dtype == aoti_torch_dtype_float16()) return Kind::F16;
    if (dtype == aoti_torch_dtype_bfloat16()) return Kind::BF16;
    STD_TORCH_CHECK(dtype == aoti_torch_dtype_float32(), "a dtype without kernels");
    return tf32 ? Kind::TF32 : Kind::F32;
}

Tensor empty(const Tensor& like, int32_t dtype, const std::vector<int64_t>& sizes,
             const std::vector<int64_t>& strides) {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                    dtype, interp_nn::device_type(), like.get_device_index(), &handle));
    Tensor made(handle);
    interp_nn::just_allocated(made);
    return made;
}

// The results of an operator: memory for those that are needed, in order, and null pointers for the others.
struct Results {
    const Tensor& like;
    int32_t dtype;
    std::vector<Tensor> tensors;

    void* add(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
        tensors.push_back(empty(like, dtype, sizes, strides));
        return tensors.back().data_ptr();
    }
    void* matrix(bool needed, int64_t rows, int64_t columns, bool transposed = false) {
        if (!needed) return nullptr;
        return transposed ? add({rows, columns}, {1, rows}) : add({rows, columns}, {columns, 1});
    }
    void* vector(bool needed, int64_t size) { return needed ? add({size}, {1}) : nullptr; }
};

int to_int(int64_t size) {
    STD_TORCH_CHECK(size == static_cast<int>(size), "d, k and the number of classes must fit in 32 bits");
    return static_cast<int>(size);
}

// The data of an optional contiguous tensor with so many elements of a dtype.
void* data(const MaybeTensor& t, int64_t elements, int32_t dtype) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->is_contiguous() && t->numel() == elements && dtype_of(*t) == dtype,
                    "a tensor of another shape or dtype");
    return t->data_ptr();
}

// Set the sizes, operands and kind of any call. Without units for tf32, fp32 products are exact.
template <class Arguments>
int32_t set(Arguments& a, const Device& device, const Tensor& x, const Tensor& b, bool tf32) {
    STD_TORCH_CHECK(x.dim() == 2 && b.dim() == 2 && x.size(1) == b.size(0), "x must be (n, d) and b (d, k)");
    const int32_t dtype = dtype_of(x);
    STD_TORCH_CHECK(dtype_of(b) == dtype, "x and b must have one dtype");
    a.x = data(x, x.numel(), dtype);
    a.b = b.data_ptr();
    a.n = x.size(0);
    a.d = to_int(x.size(1));
    a.k = to_int(b.size(1));
    a.b_feature = b.stride(0);
    a.b_column = b.stride(1);
    a.kind = kind_of(x, tf32 && device.spec.capability >= 80);
    return dtype;
}

// Set the polynomial of a call, if it has one.
void set_polynomial(interp_nn::Operands& a, const MaybeTensor& coefficients, const MaybeTensor& scale) {
    STD_TORCH_CHECK(coefficients || !scale, "a scale needs coefficients");
    if (!coefficients) return;
    const int32_t fp32 = aoti_torch_dtype_float32();
    a.q.coefficients = static_cast<const float*>(data(coefficients, coefficients->numel(), fp32));
    a.q.scale = static_cast<const float*>(data(scale, 1, fp32));
    a.q.degree = to_int(coefficients->numel()) - 1;
}

// The workspaces of a call in one allocation: first the fp32 numbers, then the rows.
struct Memory {
    template <class Arguments>
    Memory(Arguments& a, const interp_nn::Workspace& sizes, const Tensor& x, const Tensor& counter) {
        constexpr int64_t LINE = 32;  // floats in 128 bytes
        const bool wide = a.kind == Kind::TF32 || a.kind == Kind::F32;
        const int64_t floats = (sizes.floats + LINE - 1) / LINE * LINE;
        work = empty(x, aoti_torch_dtype_float32(), {floats + (wide ? sizes.rows : (sizes.rows + 1) / 2)}, {1});
        a.work = static_cast<float*>(work.data_ptr());
        a.counter = static_cast<uint32_t*>(counter.data_ptr());
        a.rows = a.work + floats;
    }
    Tensor work;
};

// [Y, G], then P for a pair, then q(G) for a polynomial.
std::vector<Tensor> cuda_forward(const Tensor& x, const Tensor& b, const MaybeTensor& bias,
                                 const MaybeTensor& coefficients, const MaybeTensor& scale, bool pair, bool tf32,
                                 int64_t carve_out) {
    const Device device(x, carve_out);
    interp_nn::Forward a{};
    const int32_t dtype = set(a, device, x, b, tf32);
    set_polynomial(a, coefficients, scale);
    Results results{x, dtype, {}};
    a.bias = data(bias, a.k, dtype);
    a.y = results.matrix(true, a.n, a.k);
    a.g = results.matrix(true, a.k, a.k);
    a.p = results.matrix(pair, a.n, a.k);
    a.q_of_g = results.matrix(coefficients.has_value(), a.k, a.k);
    check(interp_nn::forward(a, device.spec, device.stream));
    return results.tensors;
}

// The squares of a backward, as forward has returned them.
struct Squares {
    const MaybeTensor &g, &q_of_g, &coefficients, &scale;

    template <class Arguments> void set(Arguments& a, int32_t dtype) const {
        STD_TORCH_CHECK(q_of_g.has_value() == coefficients.has_value(), "a polynomial needs q(G)");
        const int64_t size = int64_t{a.k} * a.k;
        set_polynomial(a, coefficients, scale);
        a.g = data(g, size, dtype);
        a.q_of_g = coefficients ? data(q_of_g, size, dtype) : a.g;
    }
};

// The gradient of the coefficients, in fp32.
void add_coefficients(interp_nn::Gradients& a, const Tensor& x, bool needed, std::vector<Tensor>& results) {
    if (!needed) return;
    STD_TORCH_CHECK(a.q.coefficients != nullptr, "no coefficients");
    results.push_back(empty(x, aoti_torch_dtype_float32(), {a.q.degree + 1}, {1}));
    a.dcoefficients = static_cast<float*>(results.back().data_ptr());
}

std::vector<Tensor> pair_backward(const MaybeTensor& dp, const MaybeTensor& dy, const Tensor& x, const Tensor& b,
                                  const MaybeTensor& p, const Squares& squares, const Tensor& counter, bool need_x,
                                  bool need_b, bool need_coefficients, bool transposed, bool tf32, int64_t carve_out) {
    const Device device(x, carve_out);
    interp_nn::PairBackward a{};
    const int32_t dtype = set(a, device, x, b, tf32);
    STD_TORCH_CHECK(!dy || (p && squares.g), "dy needs p and g");
    Results results{x, dtype, {}};
    a.p = data(p, a.n * a.k, dtype);
    squares.set(a, dtype);
    a.dp = data(dp, a.n * a.k, dtype);
    a.dy = data(dy, a.n * a.k, dtype);
    a.dx = results.matrix(need_x, a.n, a.d);
    a.db = results.matrix(need_b, a.d, a.k, transposed);
    a.db_transposed = transposed;
    add_coefficients(a, x, need_coefficients, results.tensors);
    const Memory memory(a, interp_nn::pair_backward_workspace(a, device.spec), x, counter);
    check(interp_nn::pair_backward(a, device.spec, device.stream));
    return results.tensors;
}

std::vector<Tensor> summary_backward(const MaybeTensor& dy, const Tensor& x, const Tensor& b, const Squares& squares,
                                     const Tensor& counter, bool need_x, bool need_b, bool need_bias,
                                     bool need_coefficients, bool transposed, bool tf32, int64_t carve_out) {
    const Device device(x, carve_out);
    interp_nn::SummaryBackward a{};
    const int32_t dtype = set(a, device, x, b, tf32);
    STD_TORCH_CHECK(dy && squares.g, "a summary's backward needs dy and g");
    Results results{x, dtype, {}};
    squares.set(a, dtype);
    a.dy = data(dy, a.n * a.k, dtype);
    a.dx = results.matrix(need_x, a.n, a.d);
    a.db = results.matrix(need_b, a.d, a.k, transposed);
    a.dbias = results.vector(need_bias, a.k);
    a.db_transposed = transposed;
    add_coefficients(a, x, need_coefficients, results.tensors);
    const Memory memory(a, interp_nn::summary_backward_workspace(a, device.spec), x, counter);
    check(interp_nn::summary_backward(a, device.spec, device.stream));
    return results.tensors;
}

// The gradients among [dX, db, dbias, dcoefficients] that are needed, of a pair or of a summary.
std::vector<Tensor> cuda_backward(const MaybeTensor& dp, const MaybeTensor& dy, const Tensor& x, const Tensor& b,
                                  const MaybeTensor& p, const MaybeTensor& g, const MaybeTensor& q_of_g,
                                  const MaybeTensor& coefficients, const MaybeTensor& scale, const Tensor& counter,
                                  bool pair, bool need_x, bool need_b, bool need_bias, bool need_coefficients,
                                  bool transposed, bool tf32, int64_t carve_out) {
    const Squares squares{g, q_of_g, coefficients, scale};
    if (pair) {
        return pair_backward(dp, dy, x, b, p, squares, counter, need_x, need_b, need_coefficients, transposed, tf32,
                             carve_out);
    }
    return summary_backward(dy, x, b, squares, counter, need_x, need_b, need_bias, need_coefficients, transposed, tf32,
                            carve_out);
}

// The loss, and the gradients among [dX, db, dA, dc, dcoefficients] that are needed. Without `weight` it is the loss of
// a pair.
std::vector<Tensor> cuda_loss(const Tensor& x, const Tensor& b, const MaybeTensor& weight, const MaybeTensor& bias,
                              const MaybeTensor& coefficients, const MaybeTensor& scale, const Tensor& target,
                              const MaybeTensor& upstream, const Tensor& counter, double w1, double w2, double w3,
                              int64_t ignore_index, int64_t reduction, bool need_x, bool need_b, bool need_weight,
                              bool need_bias, bool need_coefficients, bool transposed, bool tf32,
                              int64_t carve_out) {
    const Device device(x, carve_out);
    const auto launch = [&](auto a, auto workspace, auto start) {
        const int32_t dtype = set(a, device, x, b, tf32), fp32 = aoti_torch_dtype_float32();
        set_polynomial(a, coefficients, scale);
        a.terms.reduction = static_cast<interp_nn::Reduction>(reduction);
        const bool by_row = a.terms.reduction == interp_nn::Reduction::NONE;
        Results value{x, fp32, {}}, gradients{x, dtype, {}};
        a.terms.target = static_cast<const int64_t*>(data(target, a.n, aoti_torch_dtype_int64()));
        a.terms.upstream = static_cast<const float*>(data(upstream, by_row ? a.n : 1, fp32));
        a.terms.value = static_cast<float*>(by_row ? value.vector(true, a.n) : value.add({}, {}));
        a.terms.ignore_index = ignore_index;
        a.terms.w1 = static_cast<float>(w1), a.terms.w2 = static_cast<float>(w2), a.terms.w3 = static_cast<float>(w3);
        a.dx = gradients.matrix(need_x, a.n, a.d);
        a.db = gradients.matrix(need_b, a.d, a.k, transposed);
        a.db_transposed = transposed;
        if constexpr (std::is_same_v<decltype(a), interp_nn::HeadLoss>) {
            a.m = to_int(weight->size(0));
            a.a = data(weight, int64_t{a.m} * a.k, dtype);
            a.c = data(bias, a.m, dtype);
            a.da = gradients.matrix(need_weight, a.m, a.k);
            a.dc = gradients.vector(need_bias, a.m);
        }
        add_coefficients(a, x, need_coefficients, gradients.tensors);
        const Memory memory(a, workspace(a, device.spec), x, counter);
        check(start(a, device.spec, device.stream));
        value.tensors.insert(value.tensors.end(), gradients.tensors.begin(), gradients.tensors.end());
        return value.tensors;
    };
    if (weight) return launch(interp_nn::HeadLoss{}, interp_nn::head_loss_workspace, interp_nn::head_loss);
    return launch(interp_nn::PairLoss{}, interp_nn::pair_loss_workspace, interp_nn::pair_loss);
}

// gradients *= upstream in place. Some may be of fp32 beside others of 16 bits.
void cuda_scale(const Tensor& upstream, const std::vector<Tensor>& gradients, int64_t carve_out) {
    const Device device(upstream, carve_out);
    STD_TORCH_CHECK(!gradients.empty() && gradients.size() <= interp_nn::MOST_GRADIENTS, "one to five gradients");
    interp_nn::Scale a{};
    a.upstream = static_cast<const float*>(data(upstream, 1, aoti_torch_dtype_float32()));
    a.kind = kind_of(gradients[0], false);
    for (size_t i = 0; i < gradients.size(); ++i) {
        const int32_t dtype = dtype_of(gradients[i]);
        a.wide[i] = dtype == aoti_torch_dtype_float32();
        STD_TORCH_CHECK(a.wide[i] || dtype == dtype_of(gradients[0]), "gradients of one dtype, or of fp32");
        a.gradients[i] = gradients[i].data_ptr();  // dense, in any memory order
        a.sizes[i] = gradients[i].numel();
    }
    check(interp_nn::scale(a, device.spec, device.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(interp_nn, INTERP_NN_DISPATCH_KEY, m) {
    m.impl("cuda_forward", TORCH_BOX(&cuda_forward));
    m.impl("cuda_backward", TORCH_BOX(&cuda_backward));
    m.impl("cuda_loss", TORCH_BOX(&cuda_loss));
    m.impl("cuda_scale", TORCH_BOX(&cuda_scale));
}

#if !defined(INTERP_NN_EMULATED)
static std::vector<int64_t> cuda_versions() {
    const interp_nn::Versions versions = interp_nn::cuda_versions();
    return {versions.runtime, versions.driver, interp_nn::current_stream() != nullptr};
}

STABLE_TORCH_LIBRARY_IMPL(interp_nn, CompositeExplicitAutograd, m) {
    m.impl("cuda_versions", TORCH_BOX(&cuda_versions));
}
#endif
