"""Plans for GPUs that are not at hand, the table of configurations, and engines that are off: nothing here needs a GPU."""

import importlib.metadata
import importlib.util
import itertools
import json
import math
import threading
import types

import pytest
import torch

import interp_nn
from interp_nn.engines import barrier, cost, devices, limits, select
from interp_nn.engines.devices import KNOWN, DeviceSpec
from interp_nn.engines.limits import unsupported_reason
from interp_nn.engines.problem import Config, Plan, Problem
from interp_nn.engines.triton import configs
from interp_nn.engines.triton.configs import Bucket

HOPPER = devices.spec_for((9, 0))
TRITONS = [spec for spec in KNOWN if spec.capability >= (8, 0)]  # that its kernels serve
TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a user's table and names it in the environment."""

    def write(**content):
        path = tmp_path / f"table{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(content))
        monkeypatch.setenv("INTERP_NN_TABLE", str(path))

    return write


def entry(**changes):
    where = {"capabilities": [[9, 0]], "itemsize": 2, "columns": 128, "classes": 128, "rows": 0}
    return {**where, **changes}


# Plans


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gpu", [spec.name for spec in TRITONS])
def test_a_plan_for_each_known_gpu(gpu, dtype):
    plan = interp_nn.plan(65536, 512, 64, pair=True, classes=64, dtype=dtype, device=gpu)
    assert (plan.engine, plan.order, plan.saves) == ("triton", "(Xb)G", True)
    assert [kernel for kernel, _ in plan.tiles] == ["pair_loss"]
    assert plan.seconds > 0 and plan.bytes >= 3 * 65536 * 512 * dtype.itemsize
    text = str(plan)
    assert "in one launch each" in text and " MFLOP, " in text and "warps" in text


@pytest.mark.parametrize(
    ("arguments", "order", "saves", "kernels"),
    [
        ({}, "(Xb)G", False, ["stream", "summary_backward"]),
        ({"grad": ()}, "(Xb)G", False, ["stream"]),
        ({"pair": True}, "(Xb)G", True, ["stream", "pair_backward"]),
        ({"pair": True, "classes": 64}, "(Xb)G", True, ["pair_loss"]),
        ({"classes": 10}, "logits_from_x", False, ["flat_loss"]),
        ({"classes": 60}, "logits_from_latent", False, ["latent_loss"]),
    ],
    ids=str,
)
def test_the_order_and_the_kernels_of_a_problem(arguments, order, saves, kernels):
    plan = interp_nn.plan(4096, 512, 64, dtype=torch.bfloat16, device="sm_90", **arguments)
    assert (plan.engine, plan.order, plan.saves) == ("triton", order, saves)
    assert [kernel for kernel, _ in plan.tiles] == kernels


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"k": 256}, "cuBLAS is faster than a kernel of one launch for k > 128"),
        ({"dtype": torch.float64}, "it has no float64 kernels"),
        ({"k": 200, "pair": True, "classes": 200}, "at most 128 columns and classes, not 200 and 200"),
        ({"classes": 1000}, "at most 128 columns and classes, not 64 and 1000"),
        ({"d": 2**30}, "beyond 32-bit offsets"),
        ({"n": 2**31 - 1023}, "not triton: n or d k is beyond 32-bit offsets"),
        ({"device": "sm_75"}, "not cuda: below compute capability 8.0 it has only fp32 kernels of at most 64 columns"),
        ({"k": 100, "dtype": torch.float32, "device": "sm_86"}, "fp32 kernels for more than 64 columns need 160 KiB"),
        ({"k": 65, "classes": 65, "dtype": torch.float32, "device": "sm_80"}, "64 columns and 64 classes need 200 KiB"),
    ],
    ids=str,
)
def test_what_the_eager_engine_computes_and_why(arguments, reason):
    sizes = {"n": 4096, "d": 512, "k": 64, "dtype": torch.bfloat16, "device": "sm_90", **arguments}
    plan = interp_nn.plan(sizes.pop("n"), sizes.pop("d"), sizes.pop("k"), **sizes)
    assert plan.engine == "eager" and reason in plan.reason and plan.tiles == ()


@pytest.mark.parametrize("device", ["sm_70", "sm_", "sm_x0", "sm_9"])
def test_a_gpu_that_no_kernel_serves_cannot_be_planned_for(device):
    with pytest.raises(ValueError, match="plan: device must be"):
        interp_nn.plan(8, 4, 2, device=device)


def test_losses_on_blackwell_have_tiles_that_every_triton_compiles():
    """Triton 3.6 and 3.7 compile no first phase of a loss with more than 32 rows for compute capability 10."""
    for n, k, m in itertools.product((4096, 16384, 65536), (16, 64, 128), (10, 128)):
        given = {"dtype": torch.bfloat16, "device": "sm_100"}
        for plan in (
            interp_nn.plan(n, 512, k, classes=m, **given), interp_nn.plan(n, 512, k, pair=True, classes=k, **given)
        ):  # fmt: skip
            ((_, config),) = plan.tiles
            assert plan.engine == "triton" and config.tiles[0] == 32


def test_logits_come_from_the_latent_code_where_shared_memory_is_small():
    from_x, from_latent = "logits_from_x", "logits_from_latent"

    def order(capability, k, classes, dtype=torch.bfloat16):
        spec = devices.spec_for(capability)
        problem = Problem(4096, 64, k, classes=classes, head=True, dtype=dtype, spec=spec)
        chosen = select._kernel_plan(problem, "triton").order
        for_any = select._plan_for_any_rows("triton", problem).order
        assert for_any == (from_latent if 2 * classes >= k else chosen)
        return chosen

    assert [order((9, 0), 128, 50), order((8, 6), 128, 50), order((8, 6), 128, 10)] == [from_x, from_latent, from_x]
    assert [order((9, 0), 128, 100), order((8, 0), 128, 100)] == [from_x, from_latent]
    for capability, fits, too_wide in (
        ((9, 0), (128, 30), (128, 50)),
        ((8, 0), (64, 50), (128, 10)),
        ((8, 6), (64, 30), (32, 100)),
    ):
        assert [order(capability, *sizes, torch.float32) for sizes in (fits, too_wide)] == [from_x, from_latent]


def test_classes_that_do_not_fit_a_pair():
    with pytest.raises(ValueError, match="the loss of a pair has k = 4 classes, got classes=3"):
        interp_nn.plan(8, 4, 4, pair=True, classes=3)


def test_on_a_cpu_the_plan_predicts_no_time():
    plan = interp_nn.plan(4096, 512, 64, classes=10)
    assert (plan.engine, plan.order, plan.autograd) == ("eager", "logits_from_x", True)
    assert (plan.seconds, plan.bytes) == (None, None)


def test_the_choice_is_the_lesser_prediction():
    for n, d, k in itertools.product((32, 4096, 65536), (64, 512, 4096), (10, 64, 128)):
        for pair, classes in ((False, None), (True, None), (True, k), (False, 7)):
            problem = Problem(n, d, k, pair, True, True, classes, classes == 7, torch.bfloat16, HOPPER, "sm_90")
            ours = cost.predict_fused(problem, select._kernel_plan(problem, "triton"), HOPPER).seconds
            theirs = cost.predict_eager(problem, select._eager_plan(problem, False), HOPPER).seconds
            assert select.choose_engine(problem)[0] == ("triton" if ours <= theirs else "eager")


def test_rows_that_are_no_whole_vectors_are_predicted_slow_and_logged_once(monkeypatch, caplog):
    plans = [interp_nn.plan(65536, d, 64, dtype=torch.bfloat16, device="sm_90") for d in (512, 511)]
    assert [plan.engine for plan in plans] == ["triton", "eager"]
    monkeypatch.setattr(select, "requested", lambda: "triton")
    monkeypatch.setattr(select, "_logged", set())
    monkeypatch.setattr(select, "unsupported_reason", lambda *_: None)
    for d, k in ((511, 64), (509, 64), (512, 64), (512, 200)):
        assert select.choose_engine(Problem(8, d, k, dtype=torch.bfloat16, spec=HOPPER, device="cuda"))[0] == "triton"
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        "d = 511 is not a multiple of 16, so X is not read in vectors",
        "k = 200 > 128 is slower than cuBLAS",
    ]


def test_predictions_grow_with_the_problem():
    def seconds(n, dtype=torch.bfloat16):
        return cost.predict_fused(Problem(n, 1024, 128, dtype=dtype), Plan("triton", "(Xb)G"), HOPPER).seconds

    assert seconds(2**20) > 3 * seconds(2**18) > 9 * seconds(2**16) > 0
    assert seconds(2**20, torch.float32) > 1.9 * seconds(2**20)


# The table


def test_the_nearest_older_capability_of_a_generation_serves_another():
    served = {(12, 1): (12, 0), (8, 7): (8, 6), (10, 3): (10, 0), (7, 0): None, (11, 0): None}
    assert {capability: devices.table_capability(capability) for capability in served} == served
    assert devices.spec_for((7, 0)) is None and devices.spec_for((9, 0)).name == "sm_90"
    assert devices.spec_for((13, 0)).capability == (13, 0)


def test_the_table_covers_every_kernel_of_every_known_gpu():
    for spec, kernel, itemsize, columns, rows in itertools.product(
        TRITONS, ("stream", "pair_backward", "summary_backward", "pair_loss"), (2, 4), (16, 64, 128), (1, 100_000)
    ):
        bucket = Bucket(kernel, itemsize, columns, 16, rows)
        assert any(e["kernel"] == kernel and configs._matches(e, spec, bucket) for e in configs._own_table().kernels)


def test_larger_row_tiles_from_2048_and_16384_rows():
    for name in ("sm_80", "sm_90", "sm_100"):
        spec = next(spec for spec in devices.KNOWN if spec.name == name)
        rows = [configs.choose(spec, Bucket("stream", 2, 128, 16, n)).tiles[0] for n in (2047, 2048, 16383, 16384)]
        assert rows == [32, 64, 64, 128]


def test_only_the_forward_shares_a_multiprocessor():
    """The others wait at a barrier, where a program that finds no room would be waited for."""
    shared = {e["kernel"] for e in configs._own_table().kernels if e["blocks_per_sm"] > 1}
    assert shared == {"stream"}


@pytest.mark.parametrize("kernel", configs.TILES)
def test_the_rule_for_what_the_table_lacks_fits_and_shrinks(kernel, monkeypatch):
    monkeypatch.setattr(configs, "_own_table", configs.Table)
    large = configs.choose(HOPPER, Bucket(kernel, 2, 128, 16, 4096))
    small = configs.choose(HOPPER._replace(shared=48_000), Bucket(kernel, 4, 128, 16, 4096))
    assert len(large.tiles) == len(small.tiles) == len(configs.TILES[kernel])
    assert configs.fits(HOPPER, large, Bucket(kernel, 2, 128, 16, 4096))
    assert small.tiles[0] <= large.tiles[0] and small != large


def test_a_users_table_comes_first(table):
    bucket = Bucket("stream", 2, 64, 16, 4096)
    table(kernels=[entry(kernel="stream", tiles=[64, 16], warps=4, stages=2, blocks_per_sm=2)])
    assert configs.choose(HOPPER, bucket) == Config((64, 16), 4, 2, False, 2)
    for other in (bucket._replace(itemsize=4), bucket._replace(columns=256), bucket._replace(kernel="pair_backward")):
        assert configs.choose(HOPPER, other).tiles != (64, 16)
    assert configs.choose(devices.spec_for((8, 0)), bucket).tiles != (64, 16)


def test_a_measured_engine_overrules_the_model(table):
    assert interp_nn.plan(4096, 512, 64, dtype=torch.bfloat16, device="sm_90").engine == "triton"
    table(kernels=[], engines=[entry(problem="summary", engine="eager")])
    plan = interp_nn.plan(4096, 512, 64, dtype=torch.bfloat16, device="sm_90")
    assert plan.engine == "eager" and "measured faster" in plan.reason
    assert interp_nn.plan(4096, 512, 64, pair=True, dtype=torch.bfloat16, device="sm_90").engine == "triton"


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"kernels": 3},
        {"kernels": [{"kernel": "stream"}]},
        {"kernels": [entry(kernel="stream", tiles=[1], warps=4, stages=2)]},
        {"kernels": [entry(kernel="warp", tiles=[16, 16], warps=4, stages=2)]},
        {"kernels": [], "engines": [entry(problem="summary")]},
    ],
    ids=str,
)
def test_a_bad_table_is_refused_by_name(content, table):
    table(**content)
    with pytest.raises(ValueError, match=r"INTERP_NN_TABLE: .*table0\.json"):
        configs.choose(HOPPER, Bucket("stream", 2, 64, 16, 4096))


STREAM = entry(kernel="stream", tiles=[64, 32], warps=4, stages=2)
ENGINE = entry(problem="summary", engine="eager")


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        *(
            ("kernels", {"tiles": tiles}, "tiles")
            for tiles in ([-7, 3], [64, 48], [64, 2**40], [64.0, 32], ["64", 32], 3, "ab")
        ),
        *(("kernels", {"stages": stages}, "stages") for stages in (-1, 0, 2.0, True, "2", None, math.nan)),
        *(("kernels", {"warps": warps}, "warps") for warps in (0, 3, 64, "4", [4])),
        *(("kernels", {"kernel": kernel}, "kernel") for kernel in (["stream"], {}, 1, "warp")),
        *(("kernels", {"scratch": scratch}, "scratch") for scratch in (1, "yes", None)),
        *(("kernels", {"blocks_per_sm": blocks}, "blocks_per_sm") for blocks in (0, 1.5, "1")),
        *(("kernels", {"stages_a": stages}, "stages_a") for stages in (0, 17, 5.0, "5", True)),
        *(("kernels", {"capabilities": found}, "capabilities") for found in ([], [9, 0], [[9]], [["9", "0"]], "90", 9)),
        *(
            (name, {"rows": rows}, "rows")
            for name in ("kernels", "engines")
            for rows in (math.nan, math.inf, -1, "0", None)
        ),
        *((name, {"itemsize": size}, "itemsize") for name in ("kernels", "engines") for size in (3, "2", 2.0)),
        *((name, {"columns": columns}, "columns") for name in ("kernels", "engines") for columns in (0, {}, False)),
        *(("engines", {"engine": engine}, "engine") for engine in ("reference", 1, ["eager"])),
        *(("engines", {"problem": problem}, "problem") for problem in ("sum", 1, None)),
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_refused_by_name(name, change, field, table):
    good = STREAM if name == "kernels" else ENGINE
    table(**{"kernels": [], name: [good, {**good, **change}]})
    where = rf"INTERP_NN_TABLE: a bad entry of .*table0\.json: {name}\[1\]: {field} is .*, want "
    with pytest.raises(ValueError, match=where):
        configs.choose(HOPPER, Bucket("stream", 2, 64, 16, 4096))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, '{"kernels": ' + "[" * 100_000, "[]", "3", '"kernels"', '{"kernels": "stream"}', '{"kernels": {"a": 1}}',
        '{"kernels": [3]}', '{"kernels": ["stream"]}', '{"kernels": [null]}', '{"kernels": [], "engines": "eager"}',
        '{"kernels": [], "engines": [[]]}', "\0", "",
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_nonsense_is_refused_by_name(text, tmp_path, monkeypatch):
    (tmp_path / "table.json").write_text(text)
    monkeypatch.setenv("INTERP_NN_TABLE", str(tmp_path / "table.json"))
    with pytest.raises(ValueError, match=r"INTERP_NN_TABLE: .*table\.json"):
        configs.choose(HOPPER, Bucket("stream", 2, 64, 16, 4096))


def test_a_table_that_is_not_there(monkeypatch):
    monkeypatch.setenv("INTERP_NN_TABLE", "/nowhere/table.json")
    with pytest.raises(ValueError, match=r"INTERP_NN_TABLE: /nowhere/table\.json is not a table"):
        configs.choose(HOPPER, Bucket("stream", 2, 64, 16, 4096))


# Engines that are off


def why_off(monkeypatch, triton="3.6.0", numpy="2.3.5", interpreting=False, cuda="13.0", devices=()):
    """The reason on a machine that is made up."""
    versions = {"triton": triton, "numpy": numpy}

    def version(name):
        if versions.get(name) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    found = dict(enumerate(devices))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if triton is None else object())
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(limits, "interpreting", lambda: interpreting)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(limits, "spec_of", lambda device: DeviceSpec(found[device.index], 1, 0, 1.0, 1.0))
    return limits._triton_machine_reason()


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"triton": None}, "Triton is not installed"),
        ({"triton": "3.5.1"}, "Triton 3.5 is older than 3.6"),
        ({"cuda": None}, "PyTorch is built without CUDA"),
        ({}, "no CUDA device"),
        ({"devices": [(7, 5)]}, "no CUDA device of compute capability 8.0 or newer"),
        ({"interpreting": True, "numpy": "2.4.0"}, "needs numpy < 2.4"),
        ({"interpreting": True}, None),
        ({"interpreting": True, "numpy": "2.4.0", "triton": "3.7.1"}, None),
        ({"devices": [(7, 5), (9, 0)]}, None),
    ],
    ids=str,
)
def test_the_reason_why_the_engine_is_off(machine, reason, monkeypatch):
    found = why_off(monkeypatch, **machine)
    assert found is None if reason is None else reason in found


def test_a_device_that_the_engine_does_not_serve(monkeypatch):
    def reason(spec, device):
        return unsupported_reason("triton", Problem(8, 4, 2, spec=spec, device=device))

    monkeypatch.setattr(limits, "_machine_reason", lambda engine: None)
    assert reason(None, "cpu") == "it needs a CUDA device, and x is on cpu"
    assert reason(DeviceSpec((7, 5), 1, 0, 1.0, 1.0), "cuda") == "it needs compute capability 8.0, and cuda has 7.5"
    assert reason(HOPPER, "cuda") is None


def test_bfloat16_is_refused_on_tritons_own_interpreter(monkeypatch):
    """Kind: wrong numbers without a word; the interpreter's bfloat16 is wrong by a factor of 10^9."""
    monkeypatch.setattr(limits, "interpreting", lambda: True)
    monkeypatch.setattr(limits, "interpreter_has_bfloat16", False)
    monkeypatch.setattr(limits, "_machine_reason", lambda engine: None)
    for dtype, refused in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, False)):
        reason = unsupported_reason("triton", Problem(8, 4, 2, dtype=dtype, spec=HOPPER, device="cpu"))
        assert (reason is not None and "bfloat16" in reason) == refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="the engine is on")
def test_forcing_an_engine_that_is_off_raises_with_the_reason():
    reason = unsupported_reason("triton")
    with pytest.raises(RuntimeError, match="use_engine: the triton engine is off: ") as caught:
        interp_nn.use_engine("triton")
    assert reason in str(caught.value) and select.requested() == "auto"


# The counters of the barrier


def test_a_counter_for_each_stream_and_for_each_captured_launch(monkeypatch):
    state = types.SimpleNamespace(stream=1, capturing=False, blocks=0, free={}, makers=set())

    def zeros(size, dtype, device):
        state.blocks += 1
        state.makers.add(threading.get_ident())
        return torch.empty(size, dtype=dtype)

    def synchronize():
        assert not any(state.free.values())  # no other thread can take a word before it is zero

    def stream(device):
        return types.SimpleNamespace(cuda_stream=state.stream, synchronize=synchronize)

    for name, value in {"_in_use": {}, "_free": state.free, "_blocks": []}.items():
        monkeypatch.setattr(barrier, name, value)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(barrier, "_current_stream", lambda index: state.stream)
    device = torch.device("cuda", 0)

    def word():
        return barrier.counter(device).data_ptr()

    first = word()
    assert word() == first
    state.stream = 2
    second = word()
    assert second != first and word() == second
    state.capturing = True
    captured = [word() for _ in range(5)]
    assert len({first, second, *captured}) == 7
    state.capturing, state.stream = False, 1
    assert word() == first and state.blocks == 1 and not state.makers & {threading.get_ident()}
    state.capturing = True
    captured += [word() for _ in range(1017)]
    assert state.blocks == 1 and not state.free[device]
    (block,) = barrier._blocks  # which the graphs count in: no allocator gets it back
    assert all(0 <= address - block.data_ptr() < block.nbytes for address in captured)
    assert word() != word() and state.blocks == 3  # the graph's own, for want of spare ones
    state.capturing = False
    assert word() == first and state.blocks == 4 and len(state.free[device]) == 1024
    assert {(address - first) % 16 for address in (second, *captured)} == {0}


def test_a_device_at_hand_is_read_and_its_carve_out_kept(monkeypatch):
    found = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=66, shared_memory_per_block_optin=1000, memory_clock_rate=3201000,
        memory_bus_width=6144,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(devices, "_specs", {})
    device, known = torch.device("cuda", 0), devices.spec_for((9, 0))
    expected = DeviceSpec((9, 0), 66, 1000, pytest.approx(4.917e12, rel=1e-3), known.matrix_rate / 2)
    assert devices.spec_of(device) == expected
    before = torch._C._get_sm_carveout_experimental()
    try:
        torch._C._set_sm_carveout_experimental(10)
        assert devices.spec_of(device).multiprocessors == 56
    finally:
        torch._C._set_sm_carveout_experimental(before)
    assert devices.spec_of(device).multiprocessors == 66
    del found.memory_clock_rate  # an older PyTorch
    devices._specs.clear()
    assert devices.spec_of(device).bandwidth == known.bandwidth
