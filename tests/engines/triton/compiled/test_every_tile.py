"""Every tile of the table, for every GPU that it serves and every width of columns: an hour on two idle cores."""

import offline
import pytest
import triton
from recording import recording
from test_all_kernels import ARTEFACTS, BF16, CAPABILITIES, FP32, HEADS, NAMES, WITHOUT_SPILLS, problem

from interp_nn.engines.devices import spec_for
from interp_nn.engines.limits import can_form_logits_from_x, padded, unsupported_reason
from interp_nn.engines.problem import Problem
from interp_nn.engines.triton import configs
from interp_nn.engines.triton.configs import Bucket

D = 512
# Most loads and stores of spilled registers on GPUs whose tiles were chosen for few: of forwards and backwards of at most 128
# columns in 16 bits, of other kernels in 16 bits, and in fp32. `auto` takes no loss in fp32. Heads with 100 classes have most;
# with 10 classes none in 16 bits has 100.
BOUNDED = (80, 90, 100, 120)
MOST_SPILLS = {"plain": 8, "16 bits": 400, "fp32": 2800}


def most_spills(outcome):
    plain = outcome.kernel in WITHOUT_SPILLS
    return MOST_SPILLS["fp32" if outcome.dtype == "fp32" else "plain" if plain else "16 bits"]


def refused(capability, name, dtype, n, k, m, d=D):
    """Return True if dispatch leaves the problem to another engine or another kernel."""
    spec, head = spec_for(divmod(capability, 10)), name in HEADS
    classes = m if head else k if name == "pair_loss" else None
    pair = name.startswith("pair")
    asked = Problem(n, d, k, pair, True, True, classes, head, dtype, spec, f"sm_{capability}")
    flat = name == "flat_loss" and not can_form_logits_from_x("triton", asked)
    return flat or unsupported_reason("triton", asked) is not None


def wanted(capability):
    """Return (tag, launch) of each kernel, dtype, width and config."""
    spec, found = spec_for(divmod(capability, 10)), {}
    for dtype, precision in ((BF16, None), (FP32, "ieee"), (FP32, "tf32")):
        for name in NAMES:
            for k in (256,) if name.startswith("phased") else (16, 32, 64, 128):
                for m in (10, 100) if name in HEADS else (1,):
                    for n in (4096, 65536):
                        bucket = Bucket(name, dtype.itemsize, padded(k), padded(m), n)
                        key = name, dtype, precision, k, m, configs.choose(spec, bucket)
                        if key in found or refused(capability, name, dtype, n, k, m):
                            continue
                        with recording(capability, precision) as launches:
                            problem(name, dtype, n, k, m, d=D)
                        tag = f"{name} {str(dtype)[6:]} {precision or ''} n{n} k{k} m{m}"
                        found[key] = [(f"{tag} {i}", launch) for i, launch in enumerate(launches)]
    return [one for some in found.values() for one in some]


@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{}".format)
def test_every_tile_compiles_and_fits(capability):
    made = offline.compile_all(wanted(capability), [capability])
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    offline.write_table(ARTEFACTS / f"every-tile-sm_{capability}-triton-{triton.__version__}.txt", made.values())
    assert not {key[0]: o.error for key, o in made.items() if o.error}
    assert not {key[0]: o.shared for key, o in made.items() if not o.fits_shared}
    assert not {key[0]: o.spills for key, o in made.items() if capability in BOUNDED and o.spills > most_spills(o)}
    assert not [key[0] for key, o in made.items() if o.kernel != "stream" and not o.has_acquire_release]
