"""A user's function is a provider: in records, tables and figures, compared with fp64, refused by name where it does not fit."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from processes import python

from benchmarks import provider, to_pandas
from benchmarks.__main__ import main
from benchmarks.records import figures, rows
from benchmarks.timing import custom, operator_suite, peers
from benchmarks.timing.roofline import Ceiling

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = ["run", "--device", "cpu", "--suite", "ops", "--shape", "16,8,4", "--samples", "5", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def none_known(monkeypatch):
    monkeypatch.setattr(custom, "FOUND", {})
    monkeypatch.setattr(operator_suite, "measure_rates", lambda *_: Ceiling(1e10, 1e11))


def timed(tmp_path, *arguments):
    """The rows of a run, without those of the device."""
    file = tmp_path / "record.jsonl"
    main([*RUN, "--out", str(file), *arguments])
    return file, [row for row in rows.read([file]) if row["op"] != "ceiling"]


def written(tmp_path, body, name="mine"):
    file = tmp_path / "own.py"
    file.write_text(
        f"import torch\nfrom benchmarks import provider\n@provider({name!r}, about='a rival')\ndef f{body}\n"
    )
    return f"{file}:{name}"


def test_the_examples_run_and_are_drawn_in_colours_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **_: Path(path).touch()
    )  # rendered by the tests of figures
    names = ["right-to-left", "one-stack"]
    arguments = [text for name in names for text in ("--provider", f"{EXAMPLES / 'provider.py'}:{name}")]
    file, found = timed(tmp_path, *arguments, "--mode", "fwdbwd", "--mode", "loss")
    assert {row["status"] for row in found} == {"ok"}
    of = {op: {row["provider"] for row in found if row["op"] == op} for op in ("summary", "cross_entropy")}
    beside = {"ours", "linear", "unfused", "repeat"}  # where no others are named
    assert of == {"summary": {*beside, "right-to-left"}, "cross_entropy": {*beside, "one-stack"}}
    assert {row["about"] for row in found if row["provider"] in names} == {one.about for one in custom.FOUND.values()}
    printed = capsys.readouterr().out
    assert "right-to-left / ours" in printed and "one-stack / ours" in printed and "Noise floor: identical" in printed
    colours = figures._colours(found)
    assert len({*colours.values()}) == len(colours) and {*names} <= colours.keys()
    assert main(["plot", str(file), "--output", str(tmp_path)]) == 0
    assert {f"to-{name}.png" for name in names} | {"latency.png", "loss-latency.png"} <= {
        p.name for p in tmp_path.iterdir()
    }
    frame = to_pandas(file)
    assert list(frame.columns) == list(rows.FIELDS) and (frame.provider == "one-stack").sum() == 1


@pytest.mark.slow
def test_the_example_with_a_kernel_is_right():
    """In Triton's interpreter, in a process of its own."""
    code = """
import torch
from benchmarks.timing import custom, tolerances
function = custom.FOUND[custom.load("examples/triton_provider.py:triton-product", frozenset())].function
x, w = torch.randn(70, 40), torch.randn(20, 40)
assert tolerances.errors(function(x, w.mT), tolerances.naive(x.double(), w.double().mT))[0] < 1e-6
"""
    done = python("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("body", "status", "note"),
    [
        ("(x, b): return 1.00001 * (x @ b @ (b.mT @ b))", "wrong", "value: Frobenius error"),
        (
            "(x, b): return (x @ b @ (b.mT @ b)).detach()",
            "unsupported",
            "its result has no gradient: time --mode infer",
        ),
        ("(x, b): return x @ b.mT", "failed", "RuntimeError: "),
        ("(x, b):\n    return torch.mm(x, b).nothing", "failed", "AttributeError: "),
        (
            "(x, b): return x",
            "failed",
            "ValueError: mine returned a tensor of shape (16, 8), want a tensor of shape (16, 4)",
        ),
        (
            "(x, b): return (x @ b @ (b.mT @ b)).double()",
            "failed",
            "ValueError: mine returned torch.float64, want the dtype of",
        ),
        ("(x, b): return None", "failed", "ValueError: mine returned NoneType, want a tensor of shape (16, 4)"),
        ("(x, b, target): return torch.nn.functional.cross_entropy(x @ b, target)", "wrong", "value: relative error"),
    ],
)
def test_a_function_that_does_not_fit_is_a_row_that_says_so(body, status, note, tmp_path, capsys):
    file = tmp_path / "record.jsonl"
    modes = ["--mode", "fwdbwd", "--mode", "loss"]
    exit_status = main([*RUN, "--out", str(file), "--provider", written(tmp_path, body), *modes])
    found = rows.read([file])
    assert exit_status == int(status != "unsupported")
    (row,) = [row for row in found if row["provider"] == "mine"]
    assert (row["status"], row["ms_p50"]) == (status, None) and row["note"].startswith(note)
    assert row["note"] in capsys.readouterr().out
    assert row["note"].endswith("(own.py, line 5)") is ("nothing" in body)


def test_a_provider_that_nothing_asks_for_is_named(tmp_path, capsys):
    own = written(tmp_path, "(x, b): return x @ b @ (b.mT @ b)")
    for arguments in (["--op", "head", "--mode", "loss"], ["--mode", "loss"], ["--op", "cross_entropy"]):
        file = tmp_path / "none.jsonl"
        assert main([*RUN, "--out", str(file), "--provider", own, "--provider", "ours", *arguments]) == 2
        told = capsys.readouterr().err
        assert "--provider: mine computes the op summary" in told and told.count("\n") == 1 and not file.exists()


def test_a_built_in_provider_alone_has_baselines(tmp_path, capsys):
    _, found = timed(tmp_path, "--provider", "multi-dot", "--mode", "infer")
    assert {row["provider"] for row in found} == {"ours", "linear", "unfused", "multi-dot", "repeat"}
    assert "multi-dot / ours" in capsys.readouterr().out


def test_figures_name_whom_they_leave_out(tmp_path):
    _, found = timed(tmp_path, "--provider", written(tmp_path, "(x, b): return x"), "--mode", "infer")
    assert figures._conditions(found).endswith("; not drawn: mine (failed)")
    late = [row | {"status": "wrong", "note": "after timing", "ms_p50": 1.0} for row in found]  # it was timed
    assert not any(figures._right(rows.grouped(late)).values())
    assert "not drawn" not in figures._conditions([row for row in found if row["provider"] != "mine"])


def test_the_docstring_says_what_a_provider_is(monkeypatch):
    monkeypatch.setattr(custom, "_marked", [])

    @provider("documented")
    def documented(x, b):
        """Multiply from the right.

        And more.
        """

    assert custom._marked[-1].about == "Multiply from the right."


def test_a_reference_replaces_the_summary(tmp_path):
    own = """
from benchmarks import provider
@provider("p", about="x b", reference=lambda x, b: x @ b)
def p(x, b): return {} * (x @ b)
"""
    for factor, status in ((1, "ok"), (2, "wrong")):
        custom.FOUND.clear()
        (tmp_path / "own.py").write_text(own.format(factor))
        _, found = timed(tmp_path, "--provider", f"{tmp_path / 'own.py'}:p", "--mode", "fwdbwd")
        assert [(row["status"], row["sol_frac"]) for row in found if row["provider"] == "p"][-1] == (status, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{folder}/nowhere.py:mine", "there is no file"),
        ("{own}", "want FILE.py:NAME with a name of the file: mine"),
        ("{folder}/broken.py:mine", "ZeroDivisionError: division by zero"),
        (
            "{folder}/taken.py:ours",
            "the name 'ours' is taken by a built-in provider, which `python -m benchmarks list` describes",
        ),
        ("{folder}/twice.py:a", "a name is there twice: a, a"),
        ("liger", "liger: liger_kernel is not installed"),
        ("our", "invalid choice: 'our'; did you mean ours"),
    ],
)
def test_a_provider_that_is_not_there_is_named(text, message, tmp_path, capsys):
    own = written(tmp_path, "(x, b): return x").replace(":mine", ":yours")
    mark = "from benchmarks import provider\nprovider({0!r}, about='a')(lambda x, b: x)\n"
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "taken.py").write_text(mark.format("ours"))
    (tmp_path / "twice.py").write_text(2 * mark.format("a"))
    with pytest.raises(SystemExit) as stopped:
        main([*RUN, "--provider", text.format(folder=tmp_path, own=own)])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and message in told and told.count("\n") == 1


def test_what_is_marked_is_checked():
    with pytest.raises(ValueError, match="provider: name: got 'a b', want letters, digits"):
        provider("a b", about="x")
    with pytest.raises(TypeError, match="provider: about: got '', want a sentence"):
        provider("a", about="")
    with pytest.raises(TypeError, match="provider: about: got None, and a has no docstring; want a sentence"):
        provider("a")(lambda x, b: x)
    with pytest.raises(
        TypeError, match=r"provider: a has 1 arguments, want f\(x, b\) -> y or f\(x, b, target\) -> loss"
    ):
        provider("a", about="x")(lambda x: x)


def test_peers_compute_what_their_references_say(monkeypatch):
    x, w, target = torch.randn(9, 8), torch.randn(4, 8), torch.randint(4, (9,))
    # Their calls, played by PyTorch: quack's product is x wᵀ, and the iteration is the polar factor's.
    linear = type("quack.linear", (), {"linear_func": staticmethod(torch.nn.functional.linear)})
    monkeypatch.setitem(sys.modules, "quack.linear", linear)
    assert torch.allclose(peers._quack(x, w.mT), x @ w.mT @ (w @ w.mT), rtol=1e-4)
    monkeypatch.setattr(peers, "_iteration", lambda: (None, 12 * [(1.875, -1.25, 0.375)]))
    left, _, right = torch.linalg.svd(w, full_matrices=False)
    assert torch.allclose(peers._newton_schulz(x, w.mT), x @ (left @ right).mT, atol=1e-3)
    assert peers._linear_cross_entropy(x, w.mT, target).shape == ()


def test_names_of_all_kinds_are_different():
    from benchmarks.timing import layer_providers, providers

    names = [*providers.ABOUT, *layer_providers.ABOUT, *peers.NAMES]
    assert not [a for a, b in itertools.combinations(names, 2) if a == b]
