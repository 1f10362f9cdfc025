"""The offline compiler reports spills, too much shared memory, narrow loads, a missing barrier and failed compilations."""

import dataclasses

import offline
import probe_kernels
import pytest
import torch
from offline import Launch
from torch import bfloat16, float32, int32

OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
CAPABILITIES = (80, 90)


def on_meta(*shape, dtype=bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def product(d=1024, k=128, offset=0, tiles=(64, 128, 32), **options):
    x = on_meta(4096 * d + offset)[offset:]
    constants = {"K": k, **dict(zip(("ROWS", "COLUMNS", "DEPTH"), tiles, strict=True))}
    return Launch(probe_kernels.product, (x, on_meta(d, k), on_meta(4096, k), 4096, d), constants, OPTIONS | options)


def reverse_twice(barrier):
    args = *(on_meta(4096, dtype=float32) for _ in range(3)), on_meta(1, dtype=int32), 4096
    options = OPTIONS | {"launch_cooperative_grid": True}
    return Launch(probe_kernels.reverse_twice, args, {"BLOCK": 512, "BARRIER": barrier}, options)


def even_only(width):
    return Launch(probe_kernels.even_only, (on_meta(16, dtype=int32),), {"BLOCK": 16, "WIDTH": width}, OPTIONS)


LAUNCHES = {
    "even strides": product(),
    "odd d": product(d=1023),
    "odd k": product(k=101),
    "both odd": product(d=1023, k=101),
    "shifted x": product(offset=1),
    "too large": product(tiles=(128, 256, 64), num_stages=6),
    "barrier": reverse_twice(True),
    "no barrier": reverse_twice(False),
    "odd width": even_only(3),
    "deadly": Launch(probe_kernels.deadly, (on_meta(1, dtype=int32),), {}, OPTIONS),
    "even width": even_only(2),
}


@pytest.fixture(scope="module")
def outcomes():
    return offline.compile_all(list(LAUNCHES.items()), CAPABILITIES)


@pytest.fixture(params=CAPABILITIES)
def built(request, outcomes):
    """The outcomes of one capability, by name."""
    return {tag: outcome for (tag, capability), outcome in outcomes.items() if capability == request.param}


def test_a_failure_or_a_death_of_the_compiler_costs_its_launch_only(built):
    assert list(built) == list(LAUNCHES)
    assert "the width is odd" in built["odd width"].error
    assert built["deadly"].error == "the compiler's process died"
    for tag, outcome in built.items():
        assert (outcome.error is None) == isinstance(outcome, offline.Compiled) == (tag not in ("odd width", "deadly"))


def test_spills_and_too_much_shared_memory_are_reported(built):
    fine, large = built["even strides"], built["too large"]
    assert fine.spills == fine.stack == 0 < fine.shared and fine.fits_shared
    assert large.spills > 0 and not large.fits_shared
    assert built["even width"].shared == 0


def test_the_matrix_unit_is_that_of_the_capability(outcomes):
    old, new = outcomes["even strides", 80], outcomes["even strides", 90]
    newest = offline.compile(LAUNCHES["even strides"], 100)
    assert old.hmma > 0 == old.hgmma == old.tcgen05
    assert new.hgmma > 0 == new.hmma == new.tcgen05
    assert newest.tcgen05 > 0 == newest.hmma == newest.hgmma


def test_the_width_of_loads_follows_strides_and_addresses(built):
    both = built["even strides"]
    assert both.ldgsts == both.ldgsts_16 == both.vector_loads > 0
    assert built["both odd"].vector_loads == 0
    for tag in ("odd d", "odd k", "shifted x"):
        assert 0 < built[tag].ldgsts_16 < both.ldgsts_16, tag


def test_the_order_of_a_grid_barrier_is_read(built):
    assert built["barrier"].has_acquire_release and not built["barrier"].has_non_coherent_loads
    assert not built["no barrier"].has_acquire_release


@pytest.mark.parametrize(
    ("line", "ordered", "non_coherent"),
    [
        ("ld.global.gpu.acquire.b32 %r1, [%rd1];", False, False),
        ("atom.global.cta.acq_rel.add.u32 %r1, [%rd1], 1; ld.global.cta.acquire.b32 %r1, [%rd1];", False, False),
        ("red.global.gpu.release.add.u32 [%rd1], 1; ld.global.gpu.acquire.b32 %r1, [%rd1];", True, False),
        ("ld.global.L1::evict_last.nc.v4.b32 {%r1}, [%rd1];", False, True),
    ],
)
def test_ptx_of_the_gpus_scope_counts_as_ordered(outcomes, tmp_path, line, ordered, non_coherent):
    file = tmp_path / "kernel.ptx"
    file.write_text(line)
    compiled = dataclasses.replace(outcomes["barrier", 90], ptx_file=file)
    assert (compiled.has_acquire_release, compiled.has_non_coherent_loads) == (ordered, non_coherent)


def test_the_table_has_a_row_for_each_outcome(outcomes, tmp_path):
    offline.write_table(tmp_path / "new" / "table.txt", outcomes.values())
    _, *rows = (line.split("\t") for line in (tmp_path / "new" / "table.txt").read_text().splitlines()[1:])
    assert [row[1:3] for row in rows] == [[tag, str(capability)] for tag, capability in outcomes]
    assert [row[-1] for row in rows if row[1] == "deadly"] == ["failed: the compiler's process died"] * 2


def test_an_empty_disassembly_is_an_error(monkeypatch):
    disassemble = offline._disassemble
    for end, missing in (("Resource usage", "no resource usage"), ("code for", "no code")):
        monkeypatch.setattr(offline, "_disassemble", lambda cubin, end=end: disassemble(cubin).partition(end)[0])
        with pytest.raises(RuntimeError, match=f"{missing} of even_only"):
            offline.compile(LAUNCHES["even width"], 90)
