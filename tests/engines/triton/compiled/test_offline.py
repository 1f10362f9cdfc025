"""What is read in compiled code is there when it should be, and not there when it should not."""

import dataclasses
import os
import pickle

import offline
import probe_kernels
import pytest
import torch
import triton
from offline import Launch
from torch import bfloat16, float32, int32

OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
CAPABILITIES = (80, 90)


def on_meta(*shape, dtype=bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def product(d=1024, k=128, offset=0, **options):
    x = on_meta(4096 * d + offset)[offset:]
    tiles = {"K": k, "ROWS": 64, "COLUMNS": 128, "DEPTH": 32}
    return Launch(probe_kernels.product, (x, on_meta(d, k), on_meta(4096, k), 4096, d), tiles, OPTIONS | options)


def reverse_twice(barrier):
    vectors = [on_meta(4096, dtype=float32) for _ in range(3)]
    constants = {"BLOCK": 512, "BARRIER": barrier}
    options = OPTIONS | {"launch_cooperative_grid": True}
    return Launch(probe_kernels.reverse_twice, (*vectors, on_meta(1, dtype=int32), 4096), constants, options)


def gather(**options):
    args = on_meta(4096), on_meta(4096, dtype=int32), on_meta(4096), 4096, 4096
    return Launch(probe_kernels.gather, args, {"BLOCK": 512}, OPTIONS | options)


def integers(first=3, second=3, third=3, large=3, kept=3, scale=0.5, flag=True, nothing=None, **constants):
    args = on_meta(1, dtype=float32), first, second, third, large, kept, scale, flag, nothing
    return Launch(probe_kernels.integers, args, constants, OPTIONS)


def even_only(width):
    return Launch(probe_kernels.even_only, (on_meta(16, dtype=int32),), {"BLOCK": 16, "WIDTH": width}, OPTIONS)


LAUNCHES = {
    "even strides": product(),
    "odd d": product(d=1023),
    "odd k": product(k=101),
    "both odd": product(d=1023, k=101),
    "shifted x": product(offset=1),
    "barrier": reverse_twice(True),
    "no barrier": reverse_twice(False),
    "assertion off": gather(),
    "assertion on": gather(debug=True, sanitize_overflow=False),
    "overflow on": gather(debug=True, sanitize_overflow=True),
    "even width": even_only(2),
    "odd width": even_only(3),
}


@pytest.fixture(scope="module")
def outcomes():
    return offline.compile_all(list(LAUNCHES.items()), CAPABILITIES)


@pytest.fixture(params=CAPABILITIES)
def built(request, outcomes):
    """The outcomes of one capability, by name."""
    return {tag: outcome for (tag, capability), outcome in outcomes.items() if capability == request.param}


def test_every_launch_has_its_outcome(outcomes):
    assert list(outcomes) == [(tag, capability) for tag in LAUNCHES for capability in CAPABILITIES]
    for (tag, capability), outcome in outcomes.items():
        assert (outcome.tag, outcome.capability) == (tag, capability)
        assert outcome.kernel == LAUNCHES[tag].kernel.__name__
        assert (outcome.error is None) == isinstance(outcome, offline.Compiled) == (tag != "odd width")
        assert outcome.seconds > 0


def test_the_matrix_unit_is_that_of_the_capability(outcomes):
    old, new = outcomes["even strides", 80], outcomes["even strides", 90]
    assert (old.dtype, new.dtype) == ("bf16", "bf16")
    assert old.hmma > 0 == old.hgmma
    assert new.hgmma > 0 == new.hmma
    assert (old.matrix_instructions(), new.matrix_instructions()) == (old.hmma, new.hgmma)
    assert new.matrix_instructions(80) == 0
    assert outcomes["barrier", 90].matrix_instructions() == 0
    newest = offline.compile(LAUNCHES["even strides"], 100)
    assert newest.matrix_instructions() == newest.tcgen05 > 0 == newest.hmma == newest.hgmma == new.tcgen05


def test_width_of_loads_follows_what_is_known_of_strides_and_addresses(built):
    both = built["even strides"]
    assert both.ldgsts == both.ldgsts_16 == both.vector_loads > 0
    assert built["both odd"].vector_loads == 0
    for tag in ("odd d", "odd k", "shifted x"):
        assert 0 < built[tag].ldgsts_16 < both.ldgsts_16, tag


def test_resources_are_plausible(built):
    for outcome in built.values():
        if outcome.error is None:
            assert 8 <= outcome.registers <= 255
            assert outcome.stack == outcome.spills == 0
    stages = built["even strides"].shared
    assert 0 < stages <= offline.SHARED_LIMIT[80]
    assert built["even strides"].fits_shared
    assert not dataclasses.replace(built["even strides"], shared=stages + offline.SHARED_LIMIT[90]).fits_shared
    assert built["even width"].shared == 0


def test_ordering_of_the_grid_barrier(built):
    assert built["barrier"].has_acquire_release
    assert not built["barrier"].has_non_coherent_loads
    assert not built["no barrier"].has_acquire_release


@pytest.mark.parametrize(
    ("line", "ordered", "non_coherent"),
    [
        ("ld.global.gpu.acquire.b32 %r1, [%rd1];", False, False),
        ("atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], 1;", False, False),
        ("atom.global.cta.acq_rel.add.u32 %r1, [%rd1], 1; ld.global.cta.acquire.b32 %r1, [%rd1];", False, False),
        ("red.global.gpu.release.add.u32 [%rd1], 1; ld.global.gpu.acquire.b32 %r1, [%rd1];", True, False),
        ("ld.global.nc.b32 %r1, [%rd1];", False, True),
        ("ld.global.L1::evict_last.nc.v4.b32 {%r1}, [%rd1];", False, True),
    ],
)
def test_what_is_read_in_ptx(outcomes, tmp_path, line, ordered, non_coherent):
    file = tmp_path / "kernel.ptx"
    file.write_text(line)
    compiled = dataclasses.replace(outcomes["barrier", 90], ptx_file=file)
    assert (compiled.has_acquire_release, compiled.has_non_coherent_loads) == (ordered, non_coherent)


def test_assertions_are_those_asked_for(built):
    """A debug build checks integers for overflow too, unless that is declined."""
    off, on, overflow = (built[tag] for tag in ("assertion off", "assertion on", "overflow on"))
    assert "__assertfail" not in off.ptx
    assert off.assertions == 0
    assert on.assertions == 1
    assert overflow.assertions > 1
    # A function that calls another one gets 24 registers at the least.
    assert off.registers <= on.registers <= max(off.registers + 8, 24)


def test_a_failure_is_a_result(built):
    failed = built["odd width"]
    assert isinstance(failed, offline.Failed)
    assert "the width is odd" in failed.error
    with pytest.raises(AttributeError, match="the width is odd"):
        _ = failed.registers


def test_why_a_pass_failed_is_told(monkeypatch, capfd):
    def passes(*args, **kwargs):
        os.write(2, b"kernel.py:7:1: error: 'tt.op' cannot be lowered\nmodule {\nkernel.py:1:1: error: a pass failed\n")
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(triton, "compile", passes)
    failed = offline.compile(LAUNCHES["even width"], 90)
    assert failed.error == "RuntimeError: PassManager::run failed\nkernel.py:7:1: error: 'tt.op' cannot be lowered"
    assert capfd.readouterr().err == ""
    os.write(2, b"open again")
    assert capfd.readouterr().err == "open again"


def test_in_this_process(outcomes):
    here = offline.compile(LAUNCHES["even strides"], 90)
    there = outcomes["even strides", 90]
    assert dataclasses.replace(here, tag=there.tag, seconds=there.seconds) == there
    assert "the width is odd" in offline.compile(LAUNCHES["odd width"], 90).error
    serial = offline.compile_all([("again", LAUNCHES["even strides"])], [90], workers=1)
    assert serial["again", 90].registers == there.registers


def test_a_compiler_that_dies_takes_nobody_along(outcomes):
    deadly = Launch(probe_kernels.deadly, (on_meta(1, dtype=int32),), {}, OPTIONS)
    found = offline.compile_all([("deadly", deadly), ("even width", LAUNCHES["even width"])], [90])
    assert found["deadly", 90].error == "the compiler's process died"
    assert found["even width", 90].registers == outcomes["even width", 90].registers


def test_integers_are_specialised_as_in_a_run():
    launch = integers(first=1, second=16, third=17, large=2**31, kept=16)
    found = offline.specialise(launch, 90)
    assert found.signature == {
        "x": "*fp32",
        "first": "constexpr",
        "second": "i32",
        "third": "i32",
        "large": "i64",
        "kept": "i32",
        "scale": "fp32",
        "flag": "u1",
        "nothing": "constexpr",
        "HALF": "constexpr",
    }
    divisible = {name for name in found.signature if found.is_divisible(name)}
    assert divisible == {"x", "second", "large"}
    assert found.constants == {(1,): 1, (8,): None, (9,): 2}
    assert found.is_constant("first") and not found.is_constant("kept")
    assert not offline.specialise(integers(kept=1), 90).is_constant("kept")
    assert offline.compile(launch, 90).error is None


def test_options_are_those_of_a_run():
    options = offline.specialise(LAUNCHES["barrier"], 90).options
    assert options["launch_cooperative_grid"] is True
    assert options["num_warps"] == 4
    assert options["debug"] is False
    with pytest.raises(KeyError, match="num_wraps"):
        offline.specialise(product(num_wraps=8), 90)


def test_arguments_must_be_the_kernels_own():
    launch = LAUNCHES["even strides"]
    constants = {name: value for name, value in launch.constants.items() if name != "K"}
    with pytest.raises(TypeError, match=r"product also needs K$"):
        offline.compile(launch._replace(constants=constants), 90)
    with pytest.raises(TypeError, match=r"product also needs d$"):
        offline.compile(launch._replace(args=launch.args[:-1]), 90)
    with pytest.raises(TypeError, match=r"product takes 5 arguments \(x, b, y, n, d\), got 6"):
        offline.compile_all([("extra", launch._replace(args=(*launch.args, 1)))], [90])
    with pytest.raises(TypeError, match="product has no constexpr WIDTH"):
        offline.compile(launch._replace(constants={**launch.constants, "WIDTH": 1}), 90)
    with pytest.raises(TypeError, match="product has no constexpr d"):
        offline.compile(launch._replace(args=launch.args[:-1], constants={**launch.constants, "d": 1024}), 90)
    with pytest.raises(TypeError, match="TRITON_INTERPRET"):
        offline.compile(launch._replace(kernel=launch.kernel.fn), 90)
    with pytest.raises(ValueError, match="the same by name"):
        offline.compile_all([("same", launch), ("same", launch)], [90])


def test_kernels_travel_by_name(monkeypatch):
    specialised = offline.specialise(LAUNCHES["even strides"], 90)
    assert pickle.loads(pickle.dumps(specialised)) == specialised
    monkeypatch.delattr(probe_kernels, "product")
    with pytest.raises(pickle.PicklingError, match="at the top of a module"):
        pickle.dumps(specialised)
    lost = offline.Specialised(LAUNCHES["even strides"].kernel, *specialised[1:])
    with pytest.raises(pickle.PicklingError, match=r"probe_kernels\.product does not lead"):
        offline._in_workers({("lost", 90): lost}, 2)


def test_a_tool_that_fails_is_not_a_zero(tmp_path, monkeypatch):
    broken = tmp_path / "kernel.cubin"
    broken.write_bytes(b"not a cubin")
    with pytest.raises(RuntimeError, match="exited with"):
        offline._disassemble(broken)
    whole = offline._disassemble
    monkeypatch.setattr(offline, "_disassemble", lambda cubin: whole(cubin).partition("code for")[0])
    with pytest.raises(RuntimeError, match="no code of even_only"):
        offline.compile(LAUNCHES["even width"], 90)
    monkeypatch.setattr(offline, "_disassemble", lambda cubin: "")
    with pytest.raises(RuntimeError, match="no resource usage of even_only"):
        offline.compile(LAUNCHES["even width"], 90)


def test_instructions_are_counted_by_whole_words():
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.LTC128B.128 [R3], [R2] ;  /* 0x0000000002037fae */
        /*0020*/              @!P0 LDGSTS.E.LTC128B [R3], [R2] ;             /* 0x0000000002037fae */
        /*0030*/             @!UPT LDG.E.128.STRONG.GPU R4, [R2] ;           /* 0x0000000002037fae */
        /*10040*/                  UTCHMMA gdesc[UR4], gdesc[UR6] ;          /* 0x0000000002037fae */
    """
    found = offline._instructions(sass)
    assert sum(found.values()) == 5
    assert offline._count(found, "LDGSTS") == 2
    assert offline._count(found, "LDGSTS", "128") == offline._count(found, "LDG", "128") == 1
    assert offline._count(found, r"UTC\w*MMA") == 1
    assert offline._count(found, "HMMA") == 0


def test_the_table(outcomes, tmp_path):
    path = tmp_path / "new" / "table.txt"
    offline.write_table(path, outcomes.values())
    version, heading, *rows = path.read_text().splitlines()
    assert version == f"Triton {triton.__version__}"
    assert len(rows) == len(outcomes)
    assert heading.split() == [
        *("kernel", "tag", "cc", "dtype"),
        *("registers", "stack", "spills", "shared", "matrix", "LDGSTS128", "seconds"),
    ]
    line = dict(zip(outcomes, rows, strict=True))["even strides", 90]
    one = outcomes["even strides", 90]
    numbers = one.registers, one.stack, one.spills, one.shared, one.hgmma, one.ldgsts_16, f"{one.seconds:.1f}"
    assert line.split() == ["product", "even", "strides", "90", "bf16", *map(str, numbers)]
    assert {len(row) for row in rows if "failed" not in row} == {len(heading)}
    failures = [row for row in rows if "failed: " in row]
    assert len(failures) == 2 and all("the width is odd" in row for row in failures)
    assert offline.table([]).split() == heading.split()
