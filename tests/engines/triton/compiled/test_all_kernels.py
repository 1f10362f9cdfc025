"""Every kernel compiles for every known GPU, in the tiles the table gives it, and what comes out is fit to run."""

import itertools
import os
import warnings
from pathlib import Path

import offline
import pytest
import torch
import triton
from recording import recording

from interp_nn.engines import limits, select
from interp_nn.engines.devices import spec_for
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.problem import LossOptions, Plan, Problem
from interp_nn.engines.triton import configs, engine

ARTEFACTS = Path(os.environ.get("INTERP_NN_ARTEFACTS", Path(__file__).parents[4] / "build" / "compile"))
WARN = os.environ.get("INTERP_NN_COMPILE_WARN") == "1"
CAPABILITIES = (80, 90, 100) if WARN else (80, 86, 89, 90, 100, 120)  # one a generation where a Triton is on trial


SUMMARY, PAIR, WEIGHT = Plan("triton", "(Xb)G"), Plan("triton", "(Xb)G", saves=True), Plan("triton", "X(bG)")
HEADS = {"latent_loss": Plan("triton", "logits_from_latent"), "flat_loss": Plan("triton", "logits_from_x")}


def problem(name, dtype, n, k, m, transposed=True, needs=(True,) * 4, reduction="mean", d=512, degree=None):
    """Launches one kernel for tensors on the meta device. degree: that of a polynomial, with a scale and all gradients."""

    def empty(*shape, of=dtype):
        return torch.empty(shape, dtype=of, device="meta")

    x, p, g = empty(n, d), empty(n, k), empty(k, k)
    b = empty(k, d).t() if transposed else empty(d, k)
    options = LossOptions((1.0, 1.0, 1.0), -100, reduction)
    upstream = empty(n if reduction == "none" else 1, of=torch.float32) if reduction != "mean" else None
    target = empty(n, of=torch.int64)
    q, more, both = None, (), [g]
    if degree is not None:
        q, more, both = Polynomial(empty(degree + 1, of=torch.float32), empty(of=torch.float32)), (True,), [g, g]
    if name == "stream":
        engine.forward(x, b, empty(k), SUMMARY, False, q)
        engine.forward(x, b, None, PAIR, True, q)  # P is stored too, through more shared memory
    elif name == "summary_backward":
        engine.backward(None, p, x, b, both, SUMMARY, *needs[:3], *more, q=q)
    elif name == "pair_backward":
        engine.backward(p, p, x, b, [p, *both], PAIR, *needs[:2], False, *more, q=q)
    elif name == "phased_forward":
        engine.forward(x, b, empty(k), WEIGHT, False)
        engine.forward(x, b, None, PAIR, True)
    elif name == "phased_backward":
        engine.backward(None, p, x, b, [g, empty(d, k)], WEIGHT, True, True, True)
        engine.backward(p, p, x, b, [p, g], PAIR, True, True)
    elif name == "pair_loss":
        engine.loss(x, b, None, None, target, options, PAIR, upstream, (*needs[:2], False, False, *more), q)
    else:
        engine.loss(x, b, empty(m, k), empty(m), target, options, HEADS[name], upstream, (*needs, *more), q)


NAMES = (
    "stream",
    "summary_backward",
    "pair_backward",
    "pair_loss",
    "latent_loss",
    "flat_loss",
    "phased_forward",
    "phased_backward",
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (dtype, n, k, m, fp32 precision, other arguments): both sizes of tiles, columns around the powers of two, both memory
# orders of b; on one GPU more: fp16, tf32, some gradients only, values only, rows of losses.
EVERYWHERE = [
    (BF16, 65536, 128, 10, None, {}),
    (BF16, 4096, 100, 60, None, {"transposed": False}),
    (FP32, 65536, 64, 10, "ieee", {}),
    (BF16, 65536, 64, 10, None, {}),
]
HERE = [
    (FP16, 4096, 65, 100, None, {}),
    (BF16, 65536, 10, 3, None, {"transposed": False, "reduction": "none"}),
    (FP32, 4096, 128, 10, "ieee", {"transposed": False}),
    (FP32, 65536, 100, 10, "tf32", {}),
    (BF16, 4096, 64, 10, None, {"needs": (True, False, False, False), "reduction": "sum"}),
    (BF16, 4096, 64, 10, None, {"needs": (False, True, False, True)}),
    (BF16, 4096, 64, 10, None, {"needs": (False,) * 4, "reduction": "none"}),
]
# (capability, kernel, dtype, k, m, fp32 precision, needs): what hardly fits into the shared memory of its chip, heads in the form
# that dispatch takes. Values and dX alone lay out other matrices than all gradients. With few features more heads are flat.
ALL, DX, VALUE = (True,) * 4, (True, False, False, False), (False,) * 4
TIGHT = [
    (90, "head", FP32, 128, 60, "ieee", DX),
    (90, "head", FP32, 128, 100, "ieee", ALL),
    (90, "head", FP32, 128, 100, "ieee", VALUE),
    (90, "head", FP32, 128, 100, "tf32", ALL),
    (86, "head", FP32, 64, 60, "ieee", DX),
    (86, "head", FP32, 64, 100, "tf32", ALL),
    (86, "head", BF16, 128, 100, None, DX),
    (80, "head", FP32, 128, 10, "ieee", ALL),
    (80, "head", BF16, 128, 100, None, ALL),
    (80, "stream", FP32, 128, 1, "ieee", ALL),
    (86, "stream", BF16, 100, 1, None, ALL),
    (100, "stream", FP32, 128, 1, "ieee", ALL),  # its products lie in tensor memory too
]
# Polynomials of degree 1, whose products are the summary's, and 4: (capability, kernel, dtype, k, degree).
POLYNOMIALS = [
    *((capability, name, BF16, 128, 4) for capability in (80, 90, 100) for name in ("stream", "summary_backward")),
    *((capability, "pair_backward", BF16, 128, degree) for capability, degree in ((80, 1), (90, 4), (100, 1))),
    *((capability, "pair_loss", BF16, 128, degree) for capability, degree in ((80, 4), (90, 1))),
    *((capability, "latent_loss", BF16, 128, degree) for capability, degree in ((80, 1), (90, 4))),
    *((capability, "flat_loss", BF16, 128, degree) for capability, degree in ((80, 4), (90, 1))),
    (90, "stream", FP32, 128, 4),
    (90, "summary_backward", FP32, 128, 1),
    (86, "summary_backward", BF16, 128, 4),
]
# Rows and columns of layers in 16 bits, beside those of EVERYWHERE.
LAYERS = [(32, 100), (4096, 64), (4096, 100), (65536, 100)]
WITHOUT_SPILLS = ("stream", "summary_backward", "pair_backward")
# Instructions that move registers to memory and back: most of them outside of the loops over features.
MOST_SPILLS = {2: 220, 4: 400}


def head(capability, dtype, n, d, k, m):
    return Problem(n, d, k, classes=m, head=True, dtype=dtype, spec=spec_for(divmod(capability, 10)))


def wanted():
    """(tag, capability, launch) of every compilation."""
    for capability in CAPABILITIES:
        for name in NAMES:
            for dtype, n, k, m, precision, more in EVERYWHERE[::2] if WARN else EVERYWHERE + HERE * (capability == 90):
                if name.startswith("phased"):
                    if k not in (128, 64) or (dtype, n, k) == (BF16, 65536, 64):  # the last is the first with k = 256
                        continue
                    k = 256
                if name == "flat_loss" and not limits.can_form_logits_from_x(
                    "triton", head(capability, dtype, n, 512, k, m)
                ):
                    continue  # dispatch takes the latent form
                tag = f"{name} {str(dtype)[6:]} {precision or ''} n{n} k{k} m{m} {more or ''}"
                with recording(capability, precision) as launches:
                    problem(name, dtype, n, k, m, **more)
                for i, launch in enumerate(launches):
                    yield f"{tag} {i}", capability, launch
    for capability, name, (n, k) in itertools.product((80, 90, 100), WITHOUT_SPILLS, LAYERS):
        with recording(capability) as launches:
            problem(name, BF16, n, k, 10)
        for i, launch in enumerate(launches):
            yield f"{name} layer n{n} k{k} {i}", capability, launch
    for capability, name, dtype, k, m, precision, needs in TIGHT if not WARN else []:
        n, d = 65536, 64
        if name == "head":
            name = configs.LOSS_KERNELS[select._kernel_plan(head(capability, dtype, n, d, k, m), "triton").order]
        with recording(capability, precision) as launches:
            problem(name, dtype, n, k, m, needs=needs, d=d)
        yield f"{name} tight {str(dtype)[6:]} {precision or ''} k{k} m{m} {needs}", capability, launches[-1]
    for capability, name, dtype, k, degree in POLYNOMIALS if not WARN else []:
        with recording(capability, "ieee" if dtype == FP32 else None) as launches:
            problem(name, dtype, 65536, k, 10, degree=degree)
        yield f"{name} {str(dtype)[6:]} k{k} degree {degree}", capability, launches[0]
    for name in NAMES[1:] if not WARN else []:  # as with TRITON_DEBUG=1
        with recording(90) as launches:
            problem(name, BF16, 4096, 256 if name.startswith("phased") else 64, 10)
        made = launches[0]
        yield f"{name} debug", 90, made._replace(options={**made.options, "debug": True})


@pytest.fixture(scope="module")
def compiled():
    """Every outcome, written as a table too."""
    outcomes = {}
    by_capability = {}
    for tag, capability, launch in wanted():
        by_capability.setdefault(capability, []).append((tag, launch))
    for capability, launches in by_capability.items():
        outcomes |= offline.compile_all(launches, [capability])
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    offline.write_table(ARTEFACTS / f"triton-{triton.__version__}.txt", outcomes.values())
    return outcomes


def expect(bad, what):
    """Fails, or only warns where the newest Triton is on trial."""
    if bad and WARN:
        warnings.warn(f"{what}: {bad}", stacklevel=2)
    else:
        assert not bad, what


pytestmark = [pytest.mark.filterwarnings("default")] if WARN else []


def test_everything_compiles(compiled):
    expect([(key, o.error) for key, o in compiled.items() if o.error], "does not compile")


def good(compiled):
    return {key: o for key, o in compiled.items() if not o.error}


def test_shared_memory_is_within_the_limit_of_the_chip(compiled):
    expect({key: o.shared for key, o in good(compiled).items() if not o.fits_shared}, "too much shared memory")


def test_spills_are_bounded(compiled):
    usual = {key: o for key, o in good(compiled).items() if " tight " not in key[0] and " debug" not in key[0]}
    most = {key: o.spills for key, o in usual.items() if o.spills > MOST_SPILLS[4 if o.dtype == "fp32" else 2]}
    expect(most, "too many spills")


def test_forwards_and_backwards_in_16_bits_do_not_spill(compiled):
    """On the GPUs whose tiles were chosen for it. Polynomials multiply larger matrices."""
    usual = {key: o for key, o in good(compiled).items() if key[1] in (80, 90, 100) and o.dtype in ("bf16", "fp16")}
    plain = {
        key: o for key, o in usual.items() if not any(word in key[0] for word in (" tight ", " debug", " degree "))
    }
    expect({key: o.spills for key, o in plain.items() if o.kernel in WITHOUT_SPILLS and o.spills}, "spills")


def test_products_use_the_matrix_units(compiled):
    """Hopper's own for tiles of 64 rows and more, the older ones for smaller tiles."""
    expect([key for key, o in good(compiled).items() if not o.hgmma + o.hmma + o.tcgen05], "no matrix instructions")


def test_rows_are_loaded_in_vectors_and_in_advance(compiled):
    expect([key for key, o in good(compiled).items() if not o.vector_loads], "no 16-byte loads")


def test_the_barrier_orders_memory(compiled):
    """What a phase writes the next one reads: acquire and release at the barrier, and no cache that may be stale."""
    barriers = {key: o for key, o in good(compiled).items() if o.kernel != "stream"}
    one_phase = {key for key in barriers if "False, False, False)" in key[0]}
    expect([key for key, o in barriers.items() if not o.has_acquire_release and key not in one_phase], "no ordering")
    expect([key for key, o in barriers.items() if o.has_non_coherent_loads], "loads past the barrier's order")
