// The launchers of csrc under the emulator, for Python. A matrix is a numpy array, of integers for 16-bit types, or
// None.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "emulator.h"
#include "launch.h"

namespace py = pybind11;
using namespace interp_nn;

namespace {

template <class T = void> T* at(const py::object& array) {
    if (array.is_none()) return nullptr;
    return static_cast<T*>(const_cast<void*>(py::array(array).data()));
}

void raise(const char* error) {
    if (error != nullptr) throw py::value_error(error);
}

Stream of_seed(unsigned seed) { return reinterpret_cast<Stream>(static_cast<uintptr_t>(seed)); }

struct Sizes {
    int64_t n;
    int d, k;
    int64_t b_feature, b_column;  // strides of b; its gradient is transposed where b is
    Kind kind;
    Polynomial q{};
    void* q_of_g = nullptr;
    float* dcoefficients = nullptr;
};

template <class Arguments> void set(Arguments& a, const Sizes& sizes) {
    a.n = sizes.n, a.d = sizes.d, a.k = sizes.k, a.kind = sizes.kind, a.q = sizes.q;
    a.b_feature = sizes.b_feature, a.b_column = sizes.b_column;
    if constexpr (std::is_base_of_v<Gradients, Arguments>) a.dcoefficients = sizes.dcoefficients;
}

// The squares that a backward reads: the summary's G is its own q(G).
template <class Arguments> void set_squares(Arguments& a, const py::object& g, const Sizes& sizes) {
    const bool polynomial = sizes.q.coefficients != nullptr;
    a.g = polynomial ? at(g) : nullptr;
    a.q_of_g = polynomial ? sizes.q_of_g : at(g);
}

// Run with workspaces full of NaN. The counter must be ready for the next launch: only its sign may differ.
template <class Arguments, class Run> void with_workspace(Arguments& a, const Workspace& sizes, Run run) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> work(sizes.floats, nan), rows(sizes.rows, nan);  // rows: at least as large as any type needs
    std::memset(rows.data(), 0xFF, rows.size() * sizeof(float));
    uint32_t counter = 0;
    a.work = work.data();
    a.rows = rows.data();
    a.counter = &counter;
    raise(run());
    if ((counter & 0x7FFFFFFF) != 0) throw std::runtime_error("the counter was left at " + std::to_string(counter));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    py::enum_<Kind>(m, "Kind")
        .value("F16", Kind::F16)
        .value("BF16", Kind::BF16)
        .value("TF32", Kind::TF32)
        .value("F32", Kind::F32);
    py::class_<DeviceSpec>(m, "DeviceSpec").def(py::init([](int multiprocessors, int shared, int capability) {
        return DeviceSpec{multiprocessors, shared, capability, multiprocessors > 0 ? nullptr : "no CUDA device"};
    }));
    m.def("skip_kernels", [](bool skip) { emulator::skip_kernels = skip; });
    m.def("reset_counts", [] { emulator::counts = {}; });
    m.def("blocks", [] { return emulator::counts.blocks; });
    m.def("counts", [] {
        return py::make_tuple(emulator::counts.matrices, emulator::counts.conflicts, emulator::counts.switches);
    });
    py::class_<Sizes>(m, "Sizes")
        .def(py::init([](int64_t n, int d, int k, int64_t b_feature, int64_t b_column, Kind kind) {
            return Sizes{n, d, k, b_feature, b_column, kind};
        }))
        .def("polynomial",
             [](Sizes sizes, py::object coefficients, py::object scale, py::object q_of_g, py::object dcoefficients) {
                 sizes.q = {at<const float>(coefficients), at<const float>(scale),
                            static_cast<int>(py::len(coefficients)) - 1};
                 sizes.q_of_g = at(q_of_g), sizes.dcoefficients = at<float>(dcoefficients);
                 return sizes;
             });
    m.def("forward", [](py::object x, py::object b, py::object bias, py::object p, py::object y, py::object g,
                        const Sizes& sizes, const DeviceSpec& device, unsigned seed) {
        Forward a{};
        a.x = at(x), a.b = at(b), a.bias = at(bias), a.p = at(p), a.y = at(y), a.g = at(g), a.q_of_g = sizes.q_of_g;
        set(a, sizes);
        raise(forward(a, device, of_seed(seed)));
    });
    m.def("pair_backward", [](py::object x, py::object b, py::object p, py::object g, py::object dp, py::object dy,
                              py::object dx, py::object db, bool db_transposed, const Sizes& sizes,
                              const DeviceSpec& device, unsigned seed) {
        PairBackward a{};
        a.x = at(x), a.b = at(b), a.p = at(p), a.dp = at(dp), a.dy = at(dy), a.dx = at(dx), a.db = at(db);
        a.db_transposed = db_transposed;
        set(a, sizes), set_squares(a, g, sizes);
        with_workspace(a, pair_backward_workspace(a, device), [&] { return pair_backward(a, device, of_seed(seed)); });
    });
    m.def("summary_backward",
          [](py::object x, py::object b, py::object g, py::object dy, py::object dx, py::object db, py::object dbias,
             bool db_transposed, const Sizes& sizes, const DeviceSpec& device, unsigned seed) {
              SummaryBackward a{};
              a.x = at(x), a.b = at(b), a.dy = at(dy), a.dx = at(dx), a.db = at(db), a.dbias = at(dbias);
              a.db_transposed = db_transposed;
              set(a, sizes), set_squares(a, g, sizes);
              with_workspace(a, summary_backward_workspace(a, device),
                             [&] { return summary_backward(a, device, of_seed(seed)); });
          });
    py::enum_<Reduction>(m, "Reduction")
        .value("none", Reduction::NONE)
        .value("mean", Reduction::MEAN)
        .value("sum", Reduction::SUM);
    py::class_<LossTerms>(m, "LossTerms")
        .def(py::init([](py::object target, py::object upstream, py::object value, int64_t ignore_index, float w1,
                         float w2, float w3, Reduction reduction) {
            return LossTerms{at<const int64_t>(target),
                             at<const float>(upstream),
                             at<float>(value),
                             ignore_index,
                             w1,
                             w2,
                             w3,
                             reduction};
        }));
    m.def("pair_loss", [](py::object x, py::object b, const LossTerms& terms, py::object dx, py::object db,
                          bool db_transposed, const Sizes& sizes, const DeviceSpec& device, unsigned seed) {
        PairLoss a{};
        a.x = at(x), a.b = at(b), a.terms = terms, a.dx = at(dx), a.db = at(db), a.db_transposed = db_transposed;
        set(a, sizes);
        with_workspace(a, pair_loss_workspace(a, device), [&] { return pair_loss(a, device, of_seed(seed)); });
    });
    m.def("head_loss", [](py::object x, py::object b, py::object weight, py::object bias, const LossTerms& terms,
                          py::object dx, py::object db, py::object da, py::object dc, int classes, bool db_transposed,
                          const Sizes& sizes, const DeviceSpec& device, unsigned seed) {
        HeadLoss a{};
        a.x = at(x), a.b = at(b), a.a = at(weight), a.c = at(bias), a.terms = terms, a.m = classes;
        a.dx = at(dx), a.db = at(db), a.da = at(da), a.dc = at(dc), a.db_transposed = db_transposed;
        set(a, sizes);
        with_workspace(a, head_loss_workspace(a, device), [&] { return head_loss(a, device, of_seed(seed)); });
    });
    m.def("scale",
          [](py::object upstream, const std::vector<py::object>& gradients, Kind kind, const DeviceSpec& device) {
              Scale a{};
              a.upstream = at<const float>(upstream), a.kind = kind;
              for (size_t i = 0; i < gradients.size(); ++i) {
                  a.gradients[i] = at(gradients[i]);
                  a.sizes[i] = py::array(gradients[i]).size();
                  a.wide[i] = py::array(gradients[i]).itemsize() == 4;
              }
              raise(scale(a, device, of_seed(1)));
          });
}
