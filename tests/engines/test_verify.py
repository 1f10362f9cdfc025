"""Verification at first use, with stand-ins for kernels on the CPU: right, wrong, failing, and ending their process."""

import json
import types
import warnings

import pytest
import torch
from processes import python

import interp_nn
from interp_nn import engines
from interp_nn.engines import plain, select, verified_files, verify
from interp_nn.engines.devices import spec_for
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.problem import LossOptions, Plan
from interp_nn.ops import summary

CPU = torch.device("cpu")
SUMMARY, PAIR, QUADRATIC = Plan("triton", "(Xb)G"), Plan("triton", "(Xb)G", True), Plan("triton", "(Xb)q")
LATENT = Plan("triton", "logits_from_latent")
OPTIONS = LossOptions((1.0, 1.0, 1.0), -100, "mean")
ALL = (True,) * 4
N, D, K, M = 5, 12, 4, 3


class Kernels:
    """An engine by PyTorch's operations, which counts its calls and changes the results of one function."""

    def __init__(self, change=None, of="backward"):
        self.calls = 0
        self.change, self.of = change, of

    def __getattr__(self, name):
        def call(*args):
            self.calls += 1
            result = getattr(plain, name)(*args)
            return self.change(result) if self.change and name == self.of else result

        return call


def off_by_a_percent(grads):
    return (grads[0] * 1.01, *grads[1:])


def out_of_bounds(_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """Kernels run on the CPU; nothing is known of any variant, and the folder is empty."""
    monkeypatch.setattr(verify, "_everywhere", True)
    monkeypatch.setattr(verify, "_MOST_ROWS", 61)
    monkeypatch.setattr(verify, "verdicts", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verify._passed.clear()
    yield
    verify._passed.clear()


def tensors(n=N, dtype=torch.float32):
    return torch.randn(n, D, dtype=dtype), torch.randn(K, D, dtype=dtype).t(), torch.randn(n, K, dtype=dtype)


def backward(engine, n=N, dtype=torch.float32):
    x, b, dy = tensors(n, dtype)
    saved = plain.forward(x, b, None, SUMMARY, False)[2]
    found = engine.backward(None, dy, x, b, saved, SUMMARY, True, True)
    return found, plain.backward(None, dy, x, b, saved, SUMMARY, True, True)


def equal(found, expected):
    return all(f is e is None or torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_a_right_kernel_is_compared_once_and_then_used():
    kernels = Kernels()
    engine = verify.Verified("triton", kernels)
    assert equal(*backward(engine)) and kernels.calls == 2
    assert equal(*backward(engine)) and equal(*backward(engine, 9)) and kernels.calls == 4  # of any number of rows
    backward(engine, dtype=torch.bfloat16)
    assert kernels.calls == 6
    assert set(interp_nn.verify().values()) == {"passed"} and len(interp_nn.verify()) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (off_by_a_percent, "dX: Frobenius error 0.01, PyTorch's"),
        (out_of_bounds, "RuntimeError: CUDA error: an illegal"),
    ],
)
def test_a_wrong_kernel_is_named_once_and_left(change, reason):
    kernels = Kernels(change)
    engine = verify.Verified("triton", kernels)
    with pytest.warns(
        RuntimeWarning, match=f"triton backward in float32, d = 12, k = 4, .* fails on this GPU: {reason}"
    ):
        found, expected = backward(engine)
    assert equal(found, expected) and kernels.calls == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(*backward(engine, 11)) and kernels.calls == 1
    engine.forward(*tensors()[:2], None, SUMMARY, False)  # its other functions stay
    assert kernels.calls == 3
    assert sorted(verdict[:3] for verdict in interp_nn.verify().values()) == sorted([reason[:3], "pas"])
    assert not [path for path in verified_files.folder().iterdir() if path.suffix != ".json"]


@pytest.mark.parametrize("name", ["forward", "backward", "loss", "scale"])
def test_only_what_has_passed_is_prepared(name):
    """A prepared call goes to the kernels past this class."""
    x, b, dy = tensors()
    given = {
        "forward": (x, b, None, SUMMARY),
        "backward": (None, dy, x, b, plain.forward(x, b, None, SUMMARY, False)[2], SUMMARY, (True, True, False)),
        "loss": (x, b, None, None, torch.zeros(N, dtype=torch.int64), OPTIONS, PAIR, (True, True, False, False)),
        "scale": ([x, b.contiguous()], torch.ones(())),
    }[name]
    for change in (None, out_of_bounds):
        kernels = Kernels(change, name)
        setattr(kernels, f"prepared_{name}", lambda *_: "prepared")
        prepare = getattr(verify.Verified("triton", kernels), f"prepared_{name}")
        if change is None:
            assert prepare(*given) == "prepared"
        else:
            with pytest.warns(RuntimeWarning, match=f"triton {name}.*fails on this GPU"):
                assert prepare(*given) is None
        verify.verdicts.clear()
        verify._passed.clear()
        for file in verified_files.folder().iterdir():
            file.unlink()


def test_a_failure_is_an_error_where_the_engine_was_asked_for(monkeypatch):
    monkeypatch.setattr(select, "unsupported_reason", lambda *_: None)
    engine = verify.Verified("triton", Kernels(off_by_a_percent))
    asked = pytest.raises(RuntimeError, match=r"triton engine was asked for, but triton backward in float32.*Frobenius")
    with interp_nn.use_engine("triton"), pytest.warns(RuntimeWarning, match="fails .* auto engine leaves it"), asked:
        backward(engine)


def test_a_kernel_of_the_wrong_shape_or_of_nan_fails():
    for change, match in (
        (lambda grads: (grads[0][:-1], *grads[1:]), r"dX has shape \(60, 12\), not \(61, 12\)"),
        (lambda grads: (grads[0] * torch.nan, *grads[1:]), "dX: Frobenius error inf"),
    ):
        verify.verdicts.clear()
        with pytest.warns(RuntimeWarning, match=match):
            backward(verify.Verified("triton", Kernels(change)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_function_and_its_stand_in_pass(dtype):
    """PyTorch's own operations are as accurate as they have to be, polynomials included."""
    kernels = Kernels()
    engine = verify.Verified("triton", kernels)
    x, b, dy = tensors(dtype=dtype)
    a, c, target = torch.randn(M, K).to(dtype), torch.randn(M).to(dtype), torch.randint(M, (N,))
    q = Polynomial(torch.tensor([1.0, 0.5, -0.25]), torch.tensor(0.5))
    _, _, saved = engine.forward(x, b, dy[0], SUMMARY, False)
    engine.backward(None, dy, x, b, saved, SUMMARY, True, True, True)
    _, _, saved = engine.forward(x, b, None, PAIR, True)
    engine.backward(dy, dy, x, b, saved, PAIR, True, True)
    engine.backward(dy, None, x, b, saved, PAIR, True, False)
    _, _, saved = engine.forward(x, b, None, QUADRATIC, False, q)
    assert len(engine.backward(None, dy, x, b, saved, QUADRATIC, True, True, True, True, q)) == 4
    upstream = torch.tensor(2.0)
    engine.loss(x, b, None, None, target, OPTIONS, PAIR, None, (True, True, False, False))
    engine.loss(x, b, a, c, target, OPTIONS._replace(reduction="none"), LATENT, torch.ones(N), ALL)
    _, grads = engine.loss(x, b, a, None, target, OPTIONS, LATENT, upstream, (True, False, True, False))
    assert len(grads) == 2
    value, grads = engine.loss(
        x, b, None, None, target, OPTIONS, QUADRATIC, upstream, (True, True, False, False, True), q
    )
    assert value.dim() == 0 and [g.shape for g in grads] == [x.shape, b.shape, (3,)]
    engine.loss(x, b, a, c, target, OPTIONS, LATENT, None, None, q)
    engine.scale([x.clone(), b.clone()], upstream)
    assert set(interp_nn.verify().values()) == {"passed"} and len(interp_nn.verify()) == kernels.calls // 2 == 13


def test_a_polynomial_is_left_to_pytorch_too():
    q = Polynomial(torch.tensor([1.0, 0.5, -0.25]), None)
    x, b, _ = tensors()
    plan = QUADRATIC._replace(saves=True)
    failing = verify.Verified("triton", Kernels(lambda out: (out[0], out[1] * 2, out[2]), "forward"))
    with pytest.warns(RuntimeWarning, match=r"polynomial of degree 2, .* fails"):
        _, y, saved = failing.forward(x, b, None, plan, True, q)
    g = b.mT @ b
    torch.testing.assert_close(saved[2], torch.eye(K) + 0.5 * g - 0.25 * g @ g)
    torch.testing.assert_close(y, x @ b @ saved[2])


def test_what_passed_is_remembered_for_these_versions_only(monkeypatch):
    kernels = Kernels()
    backward(verify.Verified("triton", kernels))
    (file,) = verified_files.folder().iterdir()
    assert json.loads(file.read_text())["variant"].startswith("triton backward in float32, d = 12, k = 4")
    verify.verdicts.clear()
    verify._passed.clear()
    backward(verify.Verified("triton", kernels))
    assert kernels.calls == 3  # believed from the file
    assert len(verified_files.passed_before(CPU)) == 1
    machine = dict(verified_files.machine("triton", CPU))
    for field in ("device", "driver", "torch", "triton", "interp_nn", "sources"):
        monkeypatch.setattr(verified_files, "machine", lambda *_, field=field: machine | {field: "another"})
        verify.verdicts.clear()
        verify._passed.clear()
        assert verified_files.passed_before(CPU) == []
        before = kernels.calls
        backward(verify.Verified("triton", kernels))
        assert kernels.calls == before + 2, field


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # root may write anywhere, but not into a file
    kernels = Kernels()
    assert equal(*backward(verify.Verified("triton", kernels))) and kernels.calls == 2
    assert verified_files.passed_before(CPU) == []
    monkeypatch.setattr(verified_files, "folder", lambda: None)
    verify.verdicts.clear()
    verify._passed.clear()
    assert equal(*backward(verify.Verified("triton", kernels))) and kernels.calls == 4

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr("pathlib.Path.write_text", full)
    verified_files.write(tmp_path / "part", "text")
    assert not (tmp_path / "part").exists()


def test_a_folder_that_may_not_be_read_is_no_verdict(monkeypatch):
    def denied(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    for name in ("exists", "is_dir"):
        monkeypatch.setattr(f"pathlib.Path.{name}", denied)
    assert not verified_files.has_passed(verified_files.folder() / "file")
    assert verified_files.passed_before(CPU) == []


def test_a_broken_file_is_no_verdict():
    verified_files.folder().mkdir(parents=True)
    (verified_files.folder() / "broken.json").write_text("{")
    assert verified_files.passed_before(CPU) == []


def test_nothing_is_compared_during_capture(monkeypatch):
    monkeypatch.setattr(verify, "_capturing", lambda device: True)
    kernels = Kernels()
    engine = verify.Verified("triton", kernels)
    assert equal(*backward(engine)) and kernels.calls == 0 and interp_nn.verify() == {}
    monkeypatch.setattr(verify, "_capturing", lambda device: False)
    backward(engine)
    assert kernels.calls == 2
    monkeypatch.setattr(verify, "_capturing", lambda device: True)
    backward(engine)
    assert kernels.calls == 3


def test_short_memory_is_no_verdict():
    def short(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = verify.Verified("triton", Kernels(short))
    assert equal(*backward(engine)) and interp_nn.verify() == {}


def test_empty_tensors_are_not_compared():
    kernels = Kernels()
    verify.Verified("triton", kernels).forward(torch.empty(0, D), torch.empty(D, K), None, SUMMARY, False)
    assert kernels.calls == 1


def test_modes_and_random_numbers_of_the_caller_change_nothing():
    kernels = Kernels()
    engine = verify.Verified("triton", kernels)
    x, b, dy = tensors()
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        engine.forward(x, b, None, SUMMARY, False)
    assert torch.equal(torch.get_rng_state(), state)
    engine.backward(None, dy, x, b, plain.forward(x, b, None, SUMMARY, False)[2], SUMMARY, True, True)
    assert set(interp_nn.verify().values()) == {"passed"}


def test_operators_take_verified_engines(monkeypatch):
    kernels = Kernels(lambda out: (out[0], out[1] * 2, out[2]), "forward")
    monkeypatch.setitem(engines._engines, "triton", verify.Verified("triton", kernels))
    x, b, _ = tensors()
    with pytest.warns(RuntimeWarning, match="triton forward"):
        y, _ = summary.summary(x.requires_grad_(), b, None, SUMMARY)
    torch.testing.assert_close(y, x @ b @ (b.mT @ b))


CRASH = """
import os, sys, torch
from interp_nn.engines import plain, verify
from interp_nn.engines.problem import Plan
verify._everywhere, verify._MOST_ROWS = True, 61
plan = Plan("triton", "(Xb)G")
class Kernels:
    def forward(self, x, b, bias, plan, pair, q):
        if sys.argv[1] == "crash" and len(x) == 61:
            os._exit(3)
        return plain.forward(x, b, bias, plan, pair, q)
torch.manual_seed(0)
x, b = torch.randn(5, 12), torch.randn(4, 12).t()
_, y, _ = verify.Verified("triton", Kernels()).forward(x, b, None, plan, False)
assert torch.equal(y, x @ b @ (b.mT @ b))
print(list(verify.verify().values()))
"""


@pytest.mark.slow
def test_a_kernel_that_ended_its_process_is_not_tried_again_by_itself(tmp_path):
    def run(way):
        return python("-W", "always", "-c", CRASH, way, XDG_CACHE_HOME=str(tmp_path))

    assert run("crash").returncode == 3
    second = run("crash")
    assert (
        second.returncode == 0 and "ended while it verified this" in second.stderr and "verify tries" in second.stdout
    )
    verified_files.forget_the_dead()
    third = run("right")
    assert third.returncode == 0 and third.stdout == "['passed']\n"


@pytest.mark.slow
def test_two_processes_at_once_do_not_wait_for_each_other(tmp_path):
    """This process is alive and verifying the variant; another one does the same, and both believe the result."""
    x, b, _ = tensors()

    class Slow(Kernels):
        def __getattr__(self, name):
            other = python("-c", CRASH, "right", XDG_CACHE_HOME=str(tmp_path))
            assert other.stdout == "['passed']\n", other.stderr
            return super().__getattr__(name)

    verify.Verified("triton", Slow()).forward(x, b, None, SUMMARY, False)
    assert list(interp_nn.verify().values()) == ["passed"]
    assert len(list(verified_files.folder().glob("*"))) == 1


def test_a_group_has_one_verdict(monkeypatch):
    """A variant that fails on one rank is left by all; a rank of its own warns nothing twice."""
    kernels = Kernels()
    engine = verify.Verified("triton", kernels)
    backward(engine)
    (variant,) = (variant for _, variant in verify.verdicts)

    def gather(found, mine, group):
        assert mine == {} and group == "group"
        found[:] = [mine, {variant: "dX: wrong"}]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.warns(RuntimeWarning, match="on rank 1: dX: wrong"):
        assert interp_nn.verify("group") == {str(variant): "on rank 1: dX: wrong"}
    before = kernels.calls
    assert equal(*backward(engine)) and kernels.calls == before


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setattr(engines, "_engines", {})
    monkeypatch.setattr(engines, "unverified", lambda name: types.SimpleNamespace(name=name))
    assert isinstance(engines.get("triton"), verify.Verified)
    engines._engines.clear()
    monkeypatch.setenv("INTERP_NN_VERIFY", "0")
    assert engines.get("triton") == types.SimpleNamespace(name="triton")


def judged(outcomes):
    """Workers that return these outcomes."""

    class Pool:
        def __init__(self, count, function, limit):
            assert function.func is verify.judge_apart

        def run(self, tasks, seconds):
            return [outcomes.get(variant.call, ("", 2.0, 0.01)) for variant in tasks]

    return Pool


def test_the_command_prints_a_table(monkeypatch, capsys):
    from interp_nn import __main__ as command

    monkeypatch.setattr(verify, "unsupported_reason", lambda engine, problem=None: "no" if engine == "cuda" else None)
    monkeypatch.setattr(verify, "spec_of", lambda device: spec_for((9, 0)))
    monkeypatch.setattr(command, "Workers", judged({}))
    assert command.verify_all(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "45 of 45 kernels passed on cpu"
    assert lines[1].startswith(
        "passed    2.0 s, again   10.0 ms  triton forward in bfloat16, d = 512, k = 64, (Xb)G, bias, stream"
    )
    monkeypatch.setattr(command, "Workers", judged({"loss": ("db: wrong", 2.0, 0.0), "scale": "not done within 120 s"}))
    assert command.verify_all(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "24 of 45 kernels passed" in out and "  db: wrong\n" in out and "  not done within 120 s\n" in out
    assert out.count("FAILED") == 21
    monkeypatch.setattr(command, "Workers", judged({"loss": "out of time"}))
    assert command.verify_all(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert out.count("missed") == 18 and "FAILED" not in out
    assert command.verify_all([]) == 2 and "no CUDA device" in capsys.readouterr().err


def test_the_command_says_why_it_compares_nothing(monkeypatch, capsys):
    from interp_nn import __main__ as command

    monkeypatch.setattr(verify, "unsupported_reason", lambda engine, problem=None: "it is not built")
    monkeypatch.setattr(command.engines, "unsupported_reason", verify.unsupported_reason)
    assert command.verify_all(["--device", "cpu"]) == 2
    assert capsys.readouterr().err.strip().endswith("cpu: triton is off: it is not built; cuda is off: it is not built")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for option, value, wish in (
        ("--device", "nonsense", "'nonsense', want cuda, or"),
        ("--device", "cuda:1", "'cuda:1', want an index below 1"),
        ("--minutes", "-1", "-1, want a number from 0 on"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.verify_all([f"{option}={value}"])
        assert stop.value.code == 2 and f"{option}: got {wish}" in capsys.readouterr().err


def test_a_variant_is_judged_apart(monkeypatch):
    monkeypatch.setattr(engines, "unverified", lambda name: plain)
    (variant, *_) = [verify.Variant("triton", "scale", (torch.float32, torch.float16))]
    before = torch.backends.cuda.matmul.fp32_precision
    reason, first, again = verify.judge_apart(CPU, before, variant)
    assert reason == "" and first > 0 < again
    monkeypatch.setattr(engines, "unverified", lambda name: Kernels(lambda grads: [g + 1 for g in grads], "scale"))
    verified_files.file_of(repr(variant), "triton", CPU).unlink()
    assert verify.judge_apart(CPU, before, variant)[0].startswith("gradient 0: Frobenius")
