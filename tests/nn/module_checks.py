"""PyTorch's own checks of nn.Linear and nn.Conv2d, on them and on our layers: all of its cases, and each check of its list.

The cases are those of torch.testing._internal, which is private: where it cannot be imported all of this is skipped. The checks
that its test suite has around them, but does not install, are written here under its names. `test_module_checks.py` runs this
file in a process of its own, because that import freezes PyTorch's flags and takes seconds.
"""

import copy
import inspect
import io
import itertools

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from interp_nn.nn import SummaryConv2d, SummaryLinear

try:
    from torch.testing._internal.common_modules import module_db
    from torch.testing._internal.common_nn import NewModuleTest, NNTestCase, get_new_module_tests, module_tests
    from torch.testing._internal.common_utils import freeze_rng_state, gradcheck, gradgradcheck
except ImportError as error:  # private names move, and need packages of PyTorch's own test suite
    pytest.skip(f"torch.testing._internal: {error}", allow_module_level=True)
OURS = {nn.Linear: SummaryLinear, nn.Conv2d: SummaryConv2d}
CLASSES = [c for pair in OURS.items() for c in pair]
DTYPES = [torch.float32, torch.float64]


def param(cls, *values, id):
    """The checks of PyTorch's own layers, which show that the checks are PyTorch's, are slow tests."""
    return pytest.param(cls, *values, id=id, marks=[pytest.mark.slow] * (cls in OURS))


by_class = pytest.mark.parametrize("cls", [param(cls, id=cls.__name__) for cls in CLASSES])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp64"])
by_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def theirs(cls):
    return next((plain for plain, ours in OURS.items() if ours is cls), cls)


def info_of(cls):
    (info,) = (info for info in module_db if info.module_cls is theirs(cls))
    return info


def cases(cls, dtype=torch.float64, grad=False, training=True, device="cpu"):
    info = info_of(cls)
    found = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=grad, training=training)
    assert len(found) >= 3 and all(case.forward_input is not None for case in found)
    return found


def build(cls, case, dtype=torch.float64, training=True):
    """Return a layer, and the arguments of a call. Our b is drawn far from orthonormal, where it differs from the weight."""
    given = case.constructor_input
    module = cls(*given.args, **given.kwargs).to(dtype).train(training)
    if cls in OURS.values():
        with torch.no_grad():
            module.b.mul_(torch.linspace(0.5, 1.5, module.b.numel(), dtype=dtype).view_as(module.b))
    return module, case.forward_input.args, case.forward_input.kwargs


def assert_same(got, want, **tolerance):
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-5}  # those of PyTorch's suite
    for g, w in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(g, w, **tolerance)


# The cases of common_nn, with PyTorch's class for one case: reference, strides, pickling, gradients of both orders and modes


def common_cases():
    wanted = {plain.__name__: plain for plain in OURS}
    for case in (*module_tests, *get_new_module_tests()):
        case = dict(case)
        plain = wanted.get(case.pop("module_name", case.get("fullname", "").partition("_")[0]))
        if plain is None:
            continue
        made = case.pop("constructor", None)
        for cls in (plain, OURS[plain]):
            if made is None:
                yield cls, case, cls
            else:  # of a closure over nn.<plain>, for which ours stands in while it runs
                yield cls, case, _standing_in(made, plain, cls)


def _standing_in(make, plain, cls):
    def constructor(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn, plain.__name__, cls)
            return make(*args, **kwargs)

    return constructor


class _Case(NNTestCase):
    """PyTorch's test case, with the methods that its test suite defines for modules."""

    def _forward(self, module, input):
        with freeze_rng_state():
            return module(*input) if isinstance(input, tuple) else module(input)

    def _backward(self, module, input, output, grad_output, create_graph=False):
        output.backward(grad_output, retain_graph=True, create_graph=create_graph)
        return tree_map(lambda t: t.grad, input)

    def _get_parameters(self, module):
        parameters = list(module.parameters())
        return parameters, [p.grad for p in parameters]

    def _zero_grad_parameters(self, module):
        module.zero_grad()

    def _zero_grad_input(self, input):
        for t in tree_leaves(input):
            t.grad = None


COMMON = list(common_cases())


def test_the_cases_are_whole():
    assert len(COMMON) >= 2 * (3 + 20)
    assert {cls for cls, *_ in COMMON} == set(CLASSES)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("cls", "case", "constructor"),
    [
        param(*given, id=f"{given[0].__name__}-{given[1].get('fullname', given[1].get('desc', 'plain'))}")
        for given in COMMON
    ],
)
def test_common_nn(cls, case, constructor):
    if cls in OURS.values() and case.get("reference_fn"):
        reference = case["reference_fn"]

        def of_weight(i, parameters, module):
            return reference(i, [module.weight, *parameters[1:]], module)

        case = case | {"reference_fn": of_weight}
    case = {name: value for name, value in case.items() if name not in ("cpp_constructor_args", "fullname")}
    NewModuleTest(constructor=constructor, fullname="case", **case)(_Case())


# The checks of test_modules, by its names. Not here: test_check_inplace, as no layer of these has that argument, and test_errors,
# as PyTorch lists no errors of these modules


@by_class
@by_dtype
@by_mode
def test_forward(cls, dtype, training):
    for case in cases(cls, dtype, training=training):
        module, args, kwargs = build(cls, case, dtype, training)
        out = module(*args, **kwargs)
        if cls is nn.Linear or (cls is nn.Conv2d and case.reference_fn is not None):
            assert_same(out, case.reference_fn(module, *args, **kwargs))
        if cls in OURS.values():
            plain = theirs(cls)(*case.constructor_input.args, **case.constructor_input.kwargs).to(dtype)
            plain.load_state_dict({"weight": module.weight} | ({} if module.bias is None else {"bias": module.bias}))
            assert_same(out, plain(*args, **kwargs))
        getattr(module, "float" if dtype == torch.float32 else "double")()
        assert_same(module(*args, **kwargs), out)
        assert all(p.dtype == dtype for p in module.parameters())


@by_class
@by_dtype
def test_factory_kwargs(cls, dtype):
    for case, device in itertools.product(cases(cls, dtype), ("cpu", "meta")):
        given = case.constructor_input
        module = cls(*given.args, **given.kwargs, device=device, dtype=dtype)
        assert all(p.device.type == device and p.dtype == dtype for p in module.parameters())


@by_class
def test_repr(cls):
    for case in cases(cls):
        module, plain = (build(c, case)[0] for c in (cls, theirs(cls)))
        assert repr(module) == str(module) == repr(plain).replace(theirs(cls).__name__, cls.__name__)


@by_class
@by_dtype
def test_save_load(cls, dtype):
    for case in cases(cls, dtype):
        module, args, kwargs = build(cls, case, dtype)
        out = module(*args, **kwargs)
        for saved, weights_only in ((module, False), (module.state_dict(), True)):
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=weights_only)
            assert_same(
                loaded if weights_only else loaded(*args, **kwargs), saved if weights_only else out, rtol=0, atol=0
            )


@by_class
@by_dtype
def test_non_contiguous_tensors(cls, dtype):
    def strided(t):
        return t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(t.requires_grad)

    for case in cases(cls, dtype, grad=True):
        module, args, kwargs = build(cls, case, dtype)
        out = module(*args, **kwargs)
        upstream = torch.randn_like(out)
        inputs = [*tree_leaves((args, kwargs)), *module.parameters()]
        want = torch.autograd.grad(out, inputs, upstream)
        for change, change_upstream in itertools.product((lambda t: t, strided), repeat=2):
            new_args, new_kwargs = tree_map(change, (args, kwargs))
            got = module(*new_args, **new_kwargs)
            inputs = [*tree_leaves((new_args, new_kwargs)), *module.parameters()]
            assert_same(got, out)
            assert_same(torch.autograd.grad(got, inputs, change_upstream(upstream)), want, rtol=1e-5, atol=1e-4)


def check_gradients(cls, check):
    for case in cases(cls, grad=True):
        module, args, kwargs = build(cls, case)
        names, parameters = zip(*module.named_parameters(), strict=True)
        held = tuple(p.requires_grad for p in parameters)
        for chosen in (held, *((i == j for j in range(len(held))) for i in range(len(held)))):
            for p, needs in zip(parameters, chosen, strict=True):
                p.requires_grad_(needs)
            tensors = (*args, *kwargs.values(), *parameters)

            def call(*given, module=module, args=args, kwargs=kwargs, names=names):
                inputs, values = given[: len(args) + len(kwargs)], given[len(args) + len(kwargs) :]
                new = dict(zip(kwargs, inputs[len(args) :], strict=True))
                return torch.func.functional_call(
                    module, dict(zip(names, values, strict=True)), inputs[: len(args)], new
                )

            assert check(call, tensors, nondet_tol=0.0)


@by_class
def test_grad(cls):
    check_gradients(cls, gradcheck)


@by_class
def test_gradgrad(cls):
    check_gradients(cls, gradgradcheck)


FORMATS = [torch.contiguous_format, torch.channels_last]


@by_class
@by_dtype
@by_mode
def test_memory_format(cls, dtype, training):
    if theirs(cls) is nn.Linear:
        pytest.skip("PyTorch skips it: nn.Linear has no channels_last")

    def last(t):
        return t.is_contiguous(memory_format=torch.channels_last)

    for case in cases(cls, dtype, grad=True, training=training):
        module, args, kwargs = build(cls, case, dtype, training)
        (x,) = tree_leaves((args, kwargs))
        out = module(x)
        upstream = torch.randn_like(out)
        want = torch.autograd.grad(out, (x, *module.parameters()), upstream)
        images = x.dim() == 4
        # As in PyTorch's list, a module keeps the format of the pass before under preserve_format.
        for of_input, of_module in itertools.product(
            FORMATS[: 1 + images], [torch.preserve_format, *FORMATS[: 1 + images]]
        ):
            module.to(memory_format=of_module)
            given = x.detach().to(memory_format=of_input).requires_grad_()
            got = module(given)
            assert_same(got, out)
            found = torch.autograd.grad(got, (given, *module.parameters()), torch.empty_like(got).copy_(upstream))
            assert_same(found, want)
            for t in (got, *found):
                if t.dim() == 4 and torch.channels_last in (of_input, of_module):
                    assert last(t), (of_input, of_module)
                elif t.dim() == 4 and of_module == torch.contiguous_format:
                    assert t.is_contiguous()
            # and beyond it, the gradient that is accumulated has its parameter's strides
            module(given).backward(torch.empty_like(got).copy_(upstream))
            assert all(p.grad.stride() == p.stride() for p in module.parameters())
            module.zero_grad()


@by_class
@by_dtype
def test_if_train_and_eval_modes_differ(cls, dtype):
    assert not info_of(cls).train_and_eval_differ
    for case in cases(cls, dtype):
        module, args, kwargs = build(cls, case, dtype)
        del module.training
        module(*args, **kwargs)


@by_class
@by_dtype
def test_device_ctx_init(cls, dtype):
    for case in cases(cls, dtype):
        given = case.constructor_input
        module = cls(*given.args, **given.kwargs)
        with torch.device("meta"):
            meta = cls(*given.args, **given.kwargs)
        for (name, p), (other, q) in zip(module.named_parameters(), meta.named_parameters(), strict=True):
            assert q.is_meta and name == other
            assert (p.shape, p.stride(), p.dtype, p.requires_grad) == (q.shape, q.stride(), q.dtype, q.requires_grad)


@pytest.fixture(params=[False, True], ids=["copied", "swapped"])
def swap(request):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(before)


@by_class
@pytest.mark.parametrize("set_grad", [False, True], ids=["bare", "with gradients"])
def test_to(cls, set_grad, swap):
    for case in cases(cls, torch.float32):
        module, args, kwargs = build(cls, case, torch.float32)
        for p in module.parameters():
            p.grad = torch.randn_like(p) if set_grad else None
        if swap and not set_grad:
            module(*args, **kwargs).sum().backward()
            module.half().float()
            module.zero_grad()
        for dtype in (*info_of(cls).dtypes, torch.float32):
            before = [(id(p), p._cdata) for p in module.parameters()]
            module.to(device="cpu", dtype=dtype)
            for p, (identity, cdata) in zip(module.parameters(), before, strict=True):
                assert type(p) is nn.Parameter and p.dtype == dtype and id(p) == identity
                assert (p._cdata != cdata) == swap
                assert p.grad is None or p.grad.dtype == dtype
        assert set_grad or all(p.grad is None for p in module.parameters())


@by_class
def test_to_empty(cls, swap):
    for case in cases(cls, torch.float32):
        given = case.constructor_input
        with torch.device("meta"):
            module = cls(*given.args, **given.kwargs)
        before = list(map(id, module.parameters()))
        module.to_empty(device="cpu")
        assert not any(p.is_meta for p in module.parameters())
        assert not swap or list(map(id, module.parameters())) == before
        module.reset_parameters()
        assert all(p.isfinite().all() for p in module.parameters())


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@by_class
@by_dtype
def test_multiple_device_transfer(cls, dtype):
    for case in cases(cls, dtype):
        module, args, kwargs = build(cls, case, dtype)
        for device in ("cuda", "cpu", "cuda"):
            module.to(device)
            args, kwargs = tree_map(lambda t, device=device: t.to(device), (args, kwargs))
            assert module(*args, **kwargs).device.type == device
            assert all(p.device.type == device and p.dtype == dtype for p in module.parameters())


@gpu
@by_class
@by_dtype
def test_cpu_gpu_parity(cls, dtype):
    for case in cases(cls, dtype, grad=True):
        module, args, kwargs = build(cls, case, dtype)
        found = []
        for device in ("cpu", "cuda"):
            other = copy.deepcopy(module).to(device)
            given = tree_map(lambda t, device=device: t.detach().to(device).requires_grad_(), (args, kwargs))
            out = other(*given[0], **given[1])
            grads = torch.autograd.grad(out, (*tree_leaves(given), *other.parameters()), torch.ones_like(out))
            found.append([t.cpu() for t in (out, *grads)])
        assert_same(*found, atol=5e-2 if dtype == torch.float32 else 4e-4, rtol=0)


def test_pytorchs_list_has_no_further_check():
    """Of the modules that PyTorch names for its checks, ours are these; a new kind of error or argument should be seen here."""
    for cls in OURS:
        assert info_of(cls).module_error_inputs_func is None
        assert "inplace" not in inspect.signature(cls).parameters
        assert info_of(cls).supports_gradgrad
