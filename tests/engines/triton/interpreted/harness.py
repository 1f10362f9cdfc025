"""The triton engine on the interpreter: a device of the test's choice, guarded memory, and launches phase by phase."""

import contextlib

import torch
from interpreter import check_guards, guarded, guarded_like
from support import naive, naive_cross_entropy, naive_head_cross_entropy, naive_pair
from torch.utils._python_dispatch import TorchDispatchMode

import interp_nn
from interp_nn import functional
from interp_nn.engines.devices import DeviceSpec, spec_for
from interp_nn.engines.problem import Config
from interp_nn.engines.triton import configs, engine, launches
from interp_nn.ops import remembered

# Small tiles, so that small problems have several tiles and splits.
TINY = {
    "stream": Config((16, 16)),
    "pair_backward": Config((16, 16, 16, 16)),
    "summary_backward": Config((16, 16, 16)),
    "pair_loss": Config((16, 32, 16, 16, 16)),
    "latent_loss": Config((16, 32, 16, 16, 16)),
    "flat_loss": Config((16, 32, 16, 16, 16)),
    "phased_forward": Config((64, 64, 32)),
    "phased_backward": Config((64, 64, 32)),
}


@contextlib.contextmanager
def forced():
    """Force the triton engine, without plans of earlier tests."""
    remembered.plans.clear()
    with interp_nn.use_engine("triton"):
        yield
    remembered.plans.clear()


@contextlib.contextmanager
def device(monkeypatch, programs, tiny=False, scratch=False, rows=None):
    """Use a device with so many multiprocessors; tiny tiles, losses with scratch rows, so many rows in a split."""
    found = DeviceSpec((9, 0), programs, spec_for((9, 0)).shared, 1.0, 1.0)
    original = configs.choose

    def choose(spec, bucket):
        config = TINY[bucket.kernel] if tiny else original(spec, bucket)
        return config._replace(scratch=scratch) if tiny else config

    with monkeypatch.context() as patch:
        patch.setattr(launches, "spec_on", lambda device: found)
        patch.setattr(configs, "choose", choose)
        if rows is not None:
            patch.setattr(launches, "_ROWS_A_SPLIT", rows)
        forget()
        yield
    forget()


def forget():
    configs._forget()


class Launches:
    """Records launches and guards them: inputs and results lie between poisoned zones, and results start as poison."""

    def __init__(self, monkeypatch, phases=False):
        self.made, self.kernels, self.counters, self.phases = [], [], [], phases
        self._launch = engine.launch
        monkeypatch.setattr(engine, "workspace", self.workspace)
        monkeypatch.setattr(engine, "launch", self.launch)

    def workspace(self, shape, dtype, device, stride=None):
        self.made.append(guarded(shape, dtype, device, stride=stride))
        return self.made[-1]

    def launch(self, plan, device, *arguments):
        self.kernels.append(plan.kernel.__name__)
        own = {t.untyped_storage().data_ptr() for t in self.made}
        self.counters += [t for t in arguments if isinstance(t, torch.Tensor) and t.dtype == torch.int32]
        given = [self._guarded(t, own) for t in arguments]
        for constants in self._runs(plan.constants):
            self._launch(plan._replace(constants=constants), device, *given)
        check_guards(self.made)

    def _guarded(self, t, own):
        foreign = isinstance(t, torch.Tensor) and t.dtype != torch.int32 and t.dim() > 0
        return guarded_like(t) if foreign and t.untyped_storage().data_ptr() not in own else t

    def _runs(self, constants):
        """The constants of each launch: all phases in one, or one after another."""
        mask = constants.get("PHASES", 0)
        bits = [1 << i for i in range(mask.bit_length()) if mask >> i & 1]
        return [constants | {"PHASES": bit} for bit in bits] if self.phases and bits else [constants]


class Tf32(TorchDispatchMode):
    """Rounds the fp32 operands of PyTorch's products to ten bits, as a GPU does where tf32 is allowed."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            *base, left, right = args
            args = (*base, to_tf32(left), to_tf32(right))
        return operator(*args, **(kwargs or {}))


def to_tf32(t):
    if t.dtype != torch.float32:
        return t
    from interpreter import to_tf32 as rounded

    return torch.from_numpy(rounded(t.detach().contiguous().numpy()).copy())


def transposed(t):
    """Give a matrix the memory order of a layer's weight, differentiably."""
    return t.mT.contiguous().mT


def summary(x, b, bias):
    return functional.summary(x, transposed(b), bias)


def pair(x, b):
    return tuple(functional.summary_pair(x, b))


def projection_alone(x, b):
    return functional.summary_pair(x, b).projection


def summary_of_pair(x, b):
    return functional.summary_pair(x, transposed(b)).summary


def pair_loss(target, **options):
    return lambda x, b: functional.summary_cross_entropy(x, transposed(b), target, **options)


def pair_loss_reference(target, **options):
    return lambda x, b: naive_cross_entropy(x, b, target, **options)


def head_loss(target, **options):
    return lambda x, b, a, c: functional.summary_head_cross_entropy(x, b, a, c, target, **options)


def head_loss_reference(target, **options):
    return lambda x, b, a, c: naive_head_cross_entropy(x, b, a, c, target, **options)


def targets(n, classes):
    """Class indices, about every fifth row ignored and, where there are rows, not all of them."""
    target = torch.randint(classes, (n,))
    target[1::5] = -100
    return target


def inputs(n, d, k, m=None):
    """x, b and, with classes m, an output layer, in fp64 and at the scale of a trained network."""
    x, b = torch.randn(n, d, dtype=torch.float64), torch.randn(d, k, dtype=torch.float64) / max(d, k) ** 0.5
    if m is None:
        return [x, b]
    return [x, b, torch.randn(m, k, dtype=torch.float64) / k**0.5, torch.randn(m, dtype=torch.float64)]


REFERENCES = {summary: naive, pair: naive_pair}
