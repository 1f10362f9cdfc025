"""A user's mistake on a command line is one line on stderr and exit status 2; a fault of the program has its traceback."""

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.records import rows
from interp_nn import tuning

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
RUN = ["run", "--suite", "ops", "--shape", "8,4,2", "--device", "cpu"]


def outcome(command, arguments, capsys):
    """Return exit status and stderr."""
    capsys.readouterr()
    try:
        status = command(arguments)
    except SystemExit as stopped:
        status = stopped.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--device", "foo"], "--device: got 'foo', want a device of this machine: "),
        (["demo", "--device", "meta"], "--device: got 'meta', want a device"),
        (["demo", "--device", "cuda:99"], "--device: got 'cuda:99', want a device"),
        (["demo", "--data", "nowhere"], "not found in nowhere"),
        (["demo", "--data", "nowhere", "--dataset", "mnist"], "mnist: not found in nowhere"),
        (["demo", "--epochs", "0"], "--epochs: got 0, want at least 1"),
        (["demo", "--epochs", "many"], "--epochs: "),
        pytest.param(["run", "--device", "cuda"], "--device: got 'cuda', want a device", marks=NO_CUDA),
        pytest.param(["roofline", "--device", "cuda"], "--device: got 'cuda', want a device", marks=NO_CUDA),
        pytest.param(["compare", "HEAD", "--device", "cuda"], "--device: got 'cuda', want a device", marks=NO_CUDA),
        ([*RUN, "--samples", "-1"], "--samples: got -1, want at least 5"),
        ([*RUN, "--samples", "4"], "--samples: got 4, want at least 5"),
        ([*RUN, "--seconds", "nan"], "--seconds: got nan, want a number above 0"),
        ([*RUN, "--seconds", "0"], "--seconds: got 0, want a number above 0"),
        ([*RUN, "--minutes", "-1"], "--minutes: got -1, want a number from 0 on"),
        ([*RUN, "--minutes", "nan"], "--minutes: got nan, want a number from 0 on"),
        ([*RUN, "--budget", "nan"], "--budget: got nan, want a number above 0"),
        ([*RUN, "--provider", "nobody"], "--provider: invalid choice: 'nobody'"),
        ([*RUN, "--op", "nothing"], "--op: invalid choice: 'nothing'"),
        ([*RUN, "--mode", "fast"], "--mode: invalid choice: 'fast'"),
        ([*RUN, "--suite", "all"], "--suite: invalid choice: 'all'"),
        ([*RUN, "--engine", "steam"], "--engine: invalid choice: 'steam'"),
        ([*RUN, "--timer", "graph"], "--timer: got graph, want wall on cpu"),
        ([*RUN, "--shape", "1,2"], "--shape: got '1,2', want N,D,K"),
        (["compare", "HEAD", "--threshold", "nan"], "--threshold: got nan, want a number from 0 on"),
        (["compare", "nowhere", "HEAD"], "nowhere: "),
        (["compare", "{folder}/nowhere.jsonl", "HEAD"], "nowhere.jsonl: there is no such record"),
        (["compare", "{folder}/empty.jsonl"], "empty.jsonl: want two records"),
        (["compare", "HEAD", "--page", "x.md"], "--page: got it without two records"),
        (
            ["profile", "--op", "head", "--shape", "8,4,2"],
            "head: want a mode of loss, and a shape N,D,K, or N,D,K,M for head",
        ),
        (["roofline", "--op", "head", "--shape", "8,4,2"], "no problem has this op and shape together"),
        (["gpu", "--minutes", "nan"], "--minutes: got nan, want a number from 0 on"),
        (["gpu", "--workers", "0"], "--workers: got 0, want at least 1"),
        (["table", "{folder}/nowhere.jsonl"], "No such file"),
        (["table", "{folder}"], "Is a directory"),
        (["table", "{folder}/empty.jsonl"], "empty.jsonl: has no timings"),
        (["table", "{folder}/checks.jsonl"], "checks.jsonl: has no timings"),
        (["table", "{folder}/other.jsonl"], "other.jsonl, line 1: row: missing fields"),
        (["table", "{folder}/empty.jsonl", "--page", "{folder}/empty.jsonl"], "is not in the subpath"),
        (["table", "{folder}/empty.jsonl", "--csv", "--page", "x.md"], "--csv: got it with --page"),
        (["plot", "{folder}/nowhere.jsonl"], "No such file"),
        (["plot", "{folder}/empty.jsonl"], "empty.jsonl: has no timings"),
        (["compare", "{folder}/empty.jsonl", "{folder}/empty.jsonl"], "empty.jsonl: has no timings"),
        (["papers", "--page", "{folder}/nowhere.md"], "No such file"),
        (["model", "--page", "{folder}/nowhere.md"], "No such file"),
        (["experiments", "nothing"], "nothing: no such experiment"),
        (["experiments", "gated_digits", "--minutes", "nan"], "--minutes: got nan, want a number from 0 on"),
        (["experiments", "gated_digits", "--minutes", "-1"], "--minutes: got -1, want a number from 0 on"),
        (["experiments", "gated_digits", "--device", "foo"], "--device: got 'foo', want a device"),
        (["experiments", "two_regimes", "--seed", "-1"], "--seed: got -1, want 0 to 2147483647"),
        (["experiments", "summary_vgg", "--data", "nowhere"], "cifar10: not found in nowhere"),
        (["experiments", "gated_images", "--data", "nowhere"], "not found in nowhere"),
        (["experiments", "mnist_tsne", "--data", "nowhere"], "mnist: not found in nowhere"),
        (["experiments", "titanic", "--data", "nowhere"], "titanic: not found in nowhere"),
        (["nothing"], "invalid choice: 'nothing'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "other.jsonl").write_text("{}\n")
    rows.Writer(tmp_path / "checks.jsonl", {"part": "checks"}).write(name="a check")
    status, told = outcome(main, [text.format(folder=tmp_path) for text in arguments], capsys)
    assert status == 2 and message in told and told.count("\n") == 1


def test_a_checkpoint_of_something_else_is_a_mistake(tmp_path, capsys):
    arguments = ["experiments", "gated_digits", "--quick", "--epochs", "1", "--output", str(tmp_path / "out")]
    file = tmp_path / "gated-digits-ReLU-0.pt"
    file.write_bytes(b"no checkpoint")
    status, told = outcome(main, [*arguments, "--checkpoints", str(tmp_path)], capsys)
    assert status == 2 and f"{file}: not a whole checkpoint" in told and "Traceback" not in told


def test_a_reader_that_has_gone_ends_a_command_quietly(monkeypatch, capsys):
    def gone():
        raise BrokenPipeError

    monkeypatch.setattr("benchmarks.timing.run.listing", gone)
    assert outcome(main, ["list"], capsys) == (1, "")


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError, KeyError])
def test_a_fault_of_the_program_has_its_traceback(error, tmp_path, monkeypatch):
    def faulty(*_, **__):
        raise error("a bug")

    monkeypatch.setattr("benchmarks.demo.train", faulty)
    with pytest.raises(error, match="a bug"):
        main(["demo", "--output", str(tmp_path)])
    monkeypatch.setattr("benchmarks.experiments.tabular.mlp", faulty)
    with pytest.raises(error, match="a bug"):
        main(["experiments", "two_regimes", "--quick", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "{folder}"], "not a file"),
        (["--output", "{folder}/file/table.json"], "no folder that can be written"),
        (["--output", "/proc/nowhere/table.json"], "no folder that can be written"),
        (["--output", "{folder}/t.json", "--minutes", "nan"], "--minutes: got nan, want a number from 0 on"),
        (["--output", "{folder}/t.json", "--minutes", "-1"], "--minutes: got -1, want a number from 0 on"),
    ],
)
def test_a_mistake_of_tuning_is_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    status, told = outcome(tuning.main, [text.format(folder=tmp_path) for text in arguments], capsys)
    assert status == 2 and message in told and told.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "kernels"),
    [
        ([], "regex:^(stream|summary_backward)$"),
        ([], "--clock-control=none"),
        (["--mode", "infer"], "regex:^(stream)$"),
        (["--op", "head", "--shape", "32,64,16,10", "--engine", "cuda"], "regex:^(head_loss_kernel)$"),
        (["--op", "head", "--engine", "cuda"], " 65536 512 64 10 bf16"),
        (["--tool", "nsys", "--op", "cross_entropy"], "--capture-range=cudaProfilerApi"),
    ],
    ids=" ".join,
)
@NO_CUDA
def test_the_command_of_a_profile_names_our_kernels(arguments, kernels, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["profile", *arguments]) == 0
    told = capsys.readouterr()
    assert kernels in told.out and "benchmarks.timing.kernel_profile" in told.out
    assert told.err.startswith("not run: ") and told.err.endswith(" is not on the PATH\n")
