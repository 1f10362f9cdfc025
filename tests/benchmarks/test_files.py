"""Files: hostile pickles run nothing, a full disk, a second writer and a SIGKILL lose nothing."""

import contextlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from support import needs_records
from torch import nn

from benchmarks.__main__ import main
from benchmarks.experiments import common, datasets, training
from benchmarks.records import files, rows
from benchmarks.records.environment import ROOT
from interp_nn import tuning

FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]

# Pickles of CIFAR


class Runs:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def cifar10(folder, first=None, protocol=2, old=False):
    """Write one image a file; `first` replaces the bytes of data_batch_1. Returns the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    for i, file in enumerate(FILES):
        content = {
            b"data": pixels[i : i + 1],
            b"labels": [i],
            b"batch_label": b"batch 1",
            "names": ["a", 1.5, True, None],
        }
        raw = pickle.dumps(content, protocol)
        (folder / file).write_bytes(raw.replace(b"numpy._core", b"numpy.core") if old else raw)
    if first is not None:
        (folder / "data_batch_1").write_bytes(first)
    return pixels


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("old", [False, True])
def test_arrays_of_every_protocol_and_of_both_module_names(protocol, old, tmp_path):
    if old and protocol > 3:
        pytest.skip("later protocols have the lengths of names")
    pixels = cifar10(tmp_path, protocol=protocol, old=old)
    images = datasets.load("cifar10", tmp_path)
    wanted = torch.from_numpy(pixels.reshape(-1, 3, 32, 32)).float() / 127.5 - 1
    assert torch.equal(images.x_train, wanted[:5]) and torch.equal(images.x_test, wanted[5:])
    assert images.y_train.tolist() == list(range(5))


def test_a_pickle_of_python_2(tmp_path):
    head = b"(dS'labels'\n(lI7\nasS'data'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    kind = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    raw = head + b"(I1\n(I1\nI3072\nt" + kind + b"I00\nS'" + b"\\x05" * 3072 + b"'\ntbs."
    cifar10(tmp_path, raw)
    images = datasets.load("cifar10", tmp_path)
    assert images.y_train.tolist()[0] == 7 and (images.x_train[0] == 5 / 127.5 - 1).all()


def hostile(marker):
    numbers = np.zeros(3072, np.uint8)
    return {
        "shell": Runs(os.system, f"touch {marker}"),
        "eval": Runs(eval, f"open({str(marker)!r}, 'w')"),
        "in the labels": {b"data": numbers, b"labels": [Runs(os.system, f"touch {marker}")]},
        "a file": Runs(Path.touch, marker),
        "a pickle within": Runs(pickle.loads, pickle.dumps(Runs(os.system, f"touch {marker}"))),
        "memory at any address": Runs(np.ndarray, (1,), "O", b"\x00" * 8),
        "objects": {b"data": np.array([{}], dtype=object), b"labels": [0]},
        "a codec": {b"data": Runs(__import__("_codecs").encode, "a", "punycode"), b"labels": [0]},
        "a list": [1, 2],
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", hostile(Path("x")))
def test_a_pickle_that_would_run_code_is_refused_by_name(name, protocol, tmp_path, capsys):
    marker = tmp_path / "ran"
    cifar10(tmp_path, pickle.dumps(hostile(marker)[name], protocol))
    with pytest.raises(ValueError, match=r"cifar10: the files in .* are damaged: ValueError: data_batch_1: "):
        datasets.load("cifar10", tmp_path)
    assert main(["demo", "--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "data_batch_1" in told.err and not marker.exists()


# A full disk


@contextlib.contextmanager
def full_disk(size=64):
    """No file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save(path, value):
    network = nn.Linear(8, 8)
    with torch.no_grad():
        network.weight.fill_(value)
    adam, history = torch.optim.Adam(network.parameters()), training.Trained({"loss": [value]}, [])
    training._save(path, {"label": "x"}, network, adam, torch.Generator(), history)


def draw(path, value):
    figure = plt.figure()
    figure.text(0.5, 0.5, str(value))
    with files.replacing(path) as part:
        figure.savefig(part)
    plt.close(figure)


TABLE = {"origin": "x" * 100, "kernels": [], "engines": []}
MARKS = "<!-- begin: python -m benchmarks x -->\n{}\n<!-- end -->\n"
WRITERS = {
    "record.json": lambda path, value: rows.write_json(path, {"value": [value] * 100}),
    "table.json": lambda path, value: tuning.write(path, TABLE | {"origin": str(value) * 100}),
    "checkpoint.pt": save,
    "figure.png": draw,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file_whole(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path, 1.0)
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError, match="File too large"):
        WRITERS[name](path, 2.0)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [name]


def test_a_full_disk_leaves_pages_whole_and_prints_records(tmp_path, capsys):
    from benchmarks.records import report

    page = tmp_path / "page.md"
    page.write_text(MARKS.format("old"))
    with full_disk(), pytest.raises(OSError, match="File too large"):
        report.between(page, "x", "new " * 100)
    assert page.read_text() == MARKS.format("old")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        rows.write_json(tmp_path / "record.json", {"value": list(range(100))})
    assert json.loads(capsys.readouterr().out) == {"value": list(range(100))}
    assert [file.name for file in tmp_path.iterdir()] == ["page.md"]


def test_a_figure_that_cannot_be_written_costs_no_results(tmp_path, capsys):
    given = common.parser("two_regimes", "").parse_args(["--quick", "--output", str(tmp_path)])
    run = common.Run("name", given)
    figure = plt.figure()
    with full_disk():
        run.figure(figure, "plane")
    run.finish({}, {"value": 1})
    assert json.loads((tmp_path / "name.json").read_text())["figures"] == []
    assert "name-plane.png: not written" in capsys.readouterr().err


def test_lines_survive_a_full_disk(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    writer = rows.Writer(path, {})
    writer.write(name="first")
    with full_disk(40), pytest.raises(OSError, match="File too large"):
        writer.write(name="second", why="x" * 100)
    assert b"second" in path.read_bytes()  # cut short
    writer.write(name="third")
    assert [row["name"] for row in rows.lines(path)] == ["first", "third"]
    assert capsys.readouterr().err == f"{path}, line 2: skipped, not a whole row in JSON\n"


@pytest.mark.parametrize("cut", ['{"name": "cu', "\0\0\0", '{"a": "\xff', "[" * 100_000, "12", "{}x\n"])
def test_a_cut_line_costs_itself_only(cut, tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"name": "a"}\n' + cut.encode("latin1"))
    rows.Writer(path, {}).write(name="b")
    rows.Writer(path, {}).write(name="c")
    assert [row["name"] for row in rows.lines(path)] == ["a", "b", "c"]
    assert capsys.readouterr().err == f"{path}, line 2: skipped, not a whole row in JSON\n"


def test_a_link_stays_and_what_is_no_file_is_not_replaced(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("old")
    link.symlink_to(path)
    files.write_text(link, "new")
    assert link.is_symlink() and path.read_text() == "new"
    for other in (tmp_path, Path("/dev/null")):
        with pytest.raises(OSError, match="not a file"):
            files.write_text(other, "new")


# Several writers


LOOP = """
import json, sys
from pathlib import Path
import files
path, lines, count, name = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
for i in range(count):
    files.write_text(path, json.dumps({"name": name, "value": [i] * 4_000}))
    files.append_line(lines, json.dumps({"name": name, "value": i, "more": "x" * 20_000}))
    print(i, flush=True)
"""


def writing(folder, count, name="one"):
    """Start a process that writes a file and a line so often, and prints the number of each."""
    command = [sys.executable, "-c", LOOP, folder / "file.json", folder / "lines.jsonl", str(count), name]
    # `files` stands alone: without its package the process starts without PyTorch.
    return subprocess.Popen(
        command, cwd=Path(files.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def whole(path):
    value = json.loads(path.read_text())["value"]
    assert len(value) == 4_000 and len(set(value)) == 1


def test_two_processes_write_100_times_each(tmp_path, capsys):
    processes = [writing(tmp_path, 100, name) for name in ("one", "two")]
    while any(process.poll() is None for process in processes):
        if (tmp_path / "file.json").exists():
            whole(tmp_path / "file.json")
        time.sleep(0.002)
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0 and not err and out.split() == [str(i) for i in range(100)]
    found = rows.lines(tmp_path / "lines.jsonl")
    for name in ("one", "two"):
        assert [row["value"] for row in found if row["name"] == name] == list(range(100))
    assert not capsys.readouterr().err and len(list(tmp_path.iterdir())) == 2


def test_a_process_that_is_killed_loses_nothing(tmp_path, capsys):
    done = 0
    for turn in range(4):
        process = writing(tmp_path, 10**6, f"{turn}")
        for _ in range(3):  # of the writes
            assert process.stdout.readline()
        time.sleep(0.003 * turn)
        process.send_signal(signal.SIGKILL)
        done += 3 + len(process.communicate()[0].splitlines())
        whole(tmp_path / "file.json")
        assert len(rows.lines(tmp_path / "lines.jsonl")) >= done
    capsys.readouterr()
    files.write_text(tmp_path / "file.json", json.dumps({"value": [0] * 4_000}))
    whole(tmp_path / "file.json")


@pytest.mark.parametrize("name", ["table.json", "checkpoint.pt"])
def test_two_threads_write_tables_and_checkpoints(name, tmp_path):
    errors = []

    def write(value):
        try:
            for _ in range(30 if name == "checkpoint.pt" else 200):
                WRITERS[name](tmp_path / name, value)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [file.name for file in tmp_path.iterdir()] == [name]


# Outputs are tried first


@pytest.fixture
def places(tmp_path):
    """Folders that cannot be written, by name; `x` would be the folder of the output."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder" / "record").mkdir(parents=True)
    return {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "no folder": Path("/proc/nowhere/x")}


@needs_records
@pytest.mark.parametrize("place", ["a file", "below a file", "no folder"])
@pytest.mark.parametrize(
    ("arguments", "work"),
    [
        (["demo", "--output"], "benchmarks.demo.train"),
        (["experiments", "two_regimes", "--quick", "--output"], "benchmarks.experiments.tabular.mlp"),
        (["experiments", "gated_digits", "--quick", "--output"], "benchmarks.experiments.training.train"),
        (
            ["experiments", "gated_digits", "--output", "{there}", "--checkpoints"],
            "benchmarks.experiments.training.train",
        ),
        (["plot", "{record}", "--output"], "benchmarks.records.figures.draw"),
        (["gpu", "--device", "cpu", "--output"], "benchmarks.gpu.job._off"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    arguments, work, place, places, tmp_path, monkeypatch, capsys
):
    def never(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr(work, never)
    record = ROOT / "benchmarks" / "results" / "cpu" / "suites.jsonl"
    arguments = [text.format(there=tmp_path / "there", record=record) for text in arguments]
    assert main([*arguments, str(places[place])]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "no folder that can be written" in told
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "work"),
    [(["host", "--output"], "benchmarks.timing.host.run"), (["run", "--out"], "benchmarks.timing.operator_suite.run")],
    ids=["host", "run"],
)
def test_a_file_that_cannot_be_written_is_found_before_the_work(arguments, work, places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(work, lambda *_, **__: pytest.fail("the work began"))
    for place in (places["below a file"], places["no folder"], tmp_path / "folder"):
        assert main([*arguments, str(place)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_demo_refuses_a_folder_in_the_place_of_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.demo.train", lambda *_, **__: pytest.fail("the work began"))
    (tmp_path / "demo-digits.png").mkdir()
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"benchmarks demo: {tmp_path}/demo-digits.png: not a file\n"
