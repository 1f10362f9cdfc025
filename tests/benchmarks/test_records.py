"""Rows keep to their schema, and what is made of them is what they say."""

import json
import math

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.records import environment, report, rows
from benchmarks.timing import compare

CPU = torch.device("cpu")


def written(tmp_path, *given, name="record.jsonl"):
    """A record whose rows are of the summary's forward and backward, in milliseconds by provider for each n."""
    writer = rows.Writer(tmp_path / name, CPU, "wall", "hot")
    for n, times in given:
        for provider, ms in times.items():
            writer.write(
                op="summary", provider=provider, mode="fwdbwd", dtype="fp32", n=n, d=8, k=4, plan="A", status="ok",
                samples=7, ms_p50=ms, ms_p20=0.9 * ms, ms_p80=1.1 * ms, peak_delta_mb=1.0, sol_frac=0.5,
            )  # fmt: skip
    return tmp_path / name


def test_a_row_has_every_field_and_what_its_run_shares(tmp_path):
    (row,) = rows.read([written(tmp_path, (16, {"ours": 1.23456789}))])
    assert row.keys() == rows.FIELDS.keys()
    assert {"schema", "utc", "git_sha", "dirty", "device", "driver", "cuda", "torch", "triton"} <= row.keys()
    assert row["torch"] == torch.__version__ and row["timer"] == "wall" and row["l2"] == "hot"
    assert row["ms_p50"] == 1.2346


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ms_p50": "1"}, "ms_p50 is '1', want int or float or NoneType"),
        ({"n": True}, "n is True, want int"),
        ({"ms_p50": math.nan}, "ms_p50 is nan, which JSON does not have"),
        ({"status": "fine"}, "status is 'fine', want one of ok, wrong"),
        ({"status": "wrong"}, "status is 'wrong' without a note that says why"),
        ({"ms_p50": None}, "status is 'ok' without a time"),
        ({"schema": 7}, "schema is 7, want 1"),
        ({"colour": 1}, r"unknown fields \['colour'\]"),
    ],
)
def test_a_row_that_is_not_of_the_schema_is_refused(change, message, tmp_path):
    (row,) = rows.read([written(tmp_path, (16, {"ours": 1.0}))])
    with pytest.raises(ValueError, match=message):
        rows.validate(row | change)
    with pytest.raises(ValueError, match=r"missing fields \['n'\]"):
        rows.validate({name: value for name, value in row.items() if name != "n"})


def test_reading_names_file_and_line(tmp_path, capsys):
    path = written(tmp_path, (16, {"ours": 1.0, "linear": 1.0}))
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(ValueError, match=r"record.jsonl, line 3: row: missing fields"):
        rows.read([path])
    assert main(["table", str(path)]) == 2
    assert "line 3" in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "nowhere.jsonl")]) == 2


def test_the_table_has_geometric_means_worst_cases_and_what_is_left_out(tmp_path):
    path = written(
        tmp_path,
        (16, {"ours": 2.0, "linear": 1.0, "unfused": 6.0, "inverse-inv": 4.0, "inverse-cholesky": 3.0}),
        (64, {"ours": 1.0, "linear": 2.0, "unfused": 1.5}),
    )
    found = rows.read([path])
    missing = found[-1] | {"samples": 0, "ms_p50": None, "ms_p20": None, "ms_p80": None}
    found += [
        missing | {"provider": "compile", "status": "wrong", "note": "dx: off"},
        missing | {"n": 99, "status": "skipped", "note": "over the FLOP budget: 206 of 150 GFLOP"},
    ]
    text = report.markdown(found)
    # 2/1 and 1/2: mean 1, worst 2; 6/2 and 1.5/1: mean sqrt(4.5), worst 1.5; the fastest inverse 3/2
    assert "| summary, forward + backward | 1.00 (2.00) | 2.12 (1.50) | 1.50 (1.50) |" in text
    assert "| 16, 8, 4 | A | 2 | 2.00 | 3.00 | 1.50 |" in text
    assert "- compile, summary, forward + backward, (64, 8, 4) fp32: wrong: dx: off" in text
    assert "- (99, 8, 4): over the FLOP budget: 206 of 150 GFLOP (1 rows)" in text
    assert "| 99," not in text


def test_a_table_is_written_between_its_marks(tmp_path):
    path = written(tmp_path, (16, {"ours": 2.0, "linear": 1.0}))
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- begin: python -m benchmarks table environment.jsonl -->\nold\n<!-- end -->\nafter\n"
    )
    report.fill(readme, path, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n") and "old" not in text
    assert report.markdown(rows.read([path]), brief=True) in text
    report.fill(readme, path, tmp_path)
    assert readme.read_text() == text
    readme.write_text("nothing")
    with pytest.raises(
        ValueError, match=r"has no lines '<!-- begin: python -m benchmarks table environment.jsonl -->'"
    ):
        report.fill(readme, path, tmp_path)


def test_figures_are_drawn_of_what_there_is(tmp_path):
    path = written(
        tmp_path, (16, {"ours": 2.0, "linear": 1.0, "unfused": 3.0}), (64, {"ours": 3.0, "linear": 2.0, "unfused": 4.0})
    )
    assert main(["plot", str(path), "--output", str(tmp_path / "figures")]) == 0
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    figures = ("latency", "to-linear", "to-unfused", "speed-of-light", "memory")
    assert names == {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    assert (tmp_path / "figures" / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert figures.draw([], tmp_path / "none") == []


def test_two_records_are_compared_by_their_ratios(tmp_path, capsys):
    one = written(tmp_path, (16, {"ours": 2.0, "linear": 1.0}), (64, {"ours": 1.0, "linear": 1.0}), name="one.jsonl")
    # 2 % and 10 % off
    other = written(tmp_path, (16, {"ours": 4.08, "linear": 2.0}), (64, {"ours": 1.1, "linear": 1.0}), name="two.jsonl")
    assert main(["compare", str(one), str(other)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ours / linear"))
    assert line.split()[3:] == ["1.059", "6.0%", "8.4%", "10.0%", "2"]
    for given, message in (
        (["--op", "head"], "no problem has the ops, modes and shapes asked for"),
        (["--op", "summary", "--mode", "loss"], "no problem has the ops, modes and shapes asked for"),
    ):
        assert main(["compare", "HEAD", *given]) == 2
        assert message in capsys.readouterr().err
    for given in (["--mode", "fast"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            main(["compare", "HEAD", *given])
        assert f"argument {given[0]}: " in capsys.readouterr().err
    empty = written(tmp_path, name="empty.jsonl")
    empty.write_text("")
    assert main(["compare", str(one), str(empty)]) == 2


def test_a_record_that_is_broken_off_is_readable(tmp_path):
    path = tmp_path / "record.jsonl"
    writer = rows.Writer(path, CPU, "wall", "hot")
    writer.write(op="summary", provider="ours", mode="fwd", dtype="fp32", n=1, d=1, k=1, status="skipped", note="why")
    assert len(rows.read([path])) == 1 and json.loads(path.read_text())["samples"] == 0
    with pytest.raises(ValueError, match=r"unknown fields \['speed'\]"):
        writer.write(op="summary", provider="ours", mode="fwd", dtype="fp32", n=1, d=1, k=1, status="ok", speed=1)


def test_a_record_has_null_for_what_json_has_no_number_for(tmp_path):
    file = tmp_path / "record.json"
    environment.write(file, {"a": [1.5, math.nan, (math.inf, "NaN")], "b": {"c": -math.inf, 3: None, "d": True}})
    assert json.loads(file.read_text(), parse_constant=pytest.fail) == {
        "a": [1.5, None, [None, "NaN"]],
        "b": {"c": None, "3": None, "d": True},
    }


@pytest.mark.parametrize(
    "file", sorted((environment.ROOT / "benchmarks" / "results").rglob("*.json")), ids=lambda file: file.stem
)
def test_records_are_json(file):
    json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_slower_is_by_the_medians_by_most_samples_and_beyond_what_noise_does():
    class Side:
        def __init__(self, ours, linear):
            self.given = {"ours": ours, "linear": linear}

        def ask(self, **question):
            return self.given[question["sample"]] if "sample" in question else []

    def slower(base, head):
        return compare._compared(compare.Problem("summary", 1, 1, 1), "fwd", (Side(*base), Side(*head)), 5, 0.05).slower

    assert slower((1.0, 1.0), (1.2, 1.0))
    assert not slower((1.0, 1.0), (1.04, 1.0))
    assert not slower((1.0, 1.0), (1.2, 1.2))
    assert not slower((1.2, 1.0), (1.0, 1.0))
