"""Records keep to their schema, survive interruptions, and tables and figures say what they hold."""

import json
import math

import pytest
import torch
from support import needs_records

from benchmarks.__main__ import main
from benchmarks.records import environment, figures, report, rows

MISSING = {"samples": 0, "ms_p50": None, "ms_p20": None, "ms_p80": None}


def written(tmp_path, *given, name="record.jsonl"):
    """A record whose rows are of the summary's forward and backward, in milliseconds by provider for each n."""
    writer = rows.Writer(tmp_path / name, rows.common())
    for n, times in given:
        for provider, ms in times.items():
            writer.write(
                op="summary", provider=provider, mode="fwdbwd", dtype="fp32", n=n, d=8, k=4, plan="A", status="ok", samples=7,
                timer="wall", l2="hot", ms_p50=ms, ms_p20=0.9 * ms, ms_p80=1.1 * ms, peak_delta_mb=1.0, sol_frac=0.5,
            )  # fmt: skip
    return tmp_path / name


def test_a_row_has_every_field_and_the_shared_ones(tmp_path):
    (row,) = rows.read([written(tmp_path, (16, {"ours-reference": 1.23456789}))])
    assert row.keys() == rows.FIELDS.keys() and row["torch"] == torch.__version__ and row["ms_p50"] == 1.2346
    assert row["provider"] == "ours-eager"  # under its name of today


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ms_p50": "1"}, "ms_p50 is '1', want int or float or NoneType"),
        ({"n": True}, "n is True, want int"),
        ({"status": "fine"}, "status is 'fine', want one of ok, wrong"),
        ({"status": "wrong"}, "status is 'wrong' without a note with the reason"),
        ({"ms_p50": None}, "status is 'ok' without a time"),
        ({"colour": 1}, r"unknown fields \['colour'\]"),
    ],
)
def test_a_row_that_is_not_of_the_schema_is_refused(change, message, tmp_path):
    path = written(tmp_path, (16, {"ours": 1.0}))
    (row,) = rows.read([path])
    with pytest.raises(ValueError, match=message):
        rows.validate(row | change)


def test_an_interrupted_record_is_readable_and_goes_on(tmp_path, capsys):
    path = written(tmp_path, (16, {"ours": 1.0, "linear": 1.0}))
    path.write_text(path.read_text() + '{"schema": 1, "run')
    assert len(rows.read([path])) == 2
    rows.Writer(path, {"part": "checks"}).write(name="a check", status="ok", shape=(1, 2), dtype=torch.float16)
    written(tmp_path, (64, {"ours": 1.0}))
    assert [row["n"] for row in rows.read([path])] == [16, 16, 64]  # without the check
    assert rows.lines(path)[2] == {
        "part": "checks",
        "name": "a check",
        "status": "ok",
        "shape": [1, 2],
        "dtype": "torch.float16",
    }
    damaged = tmp_path / "damaged.jsonl"
    for damage, message, status in (
        ("{}\n", "line 6: row: missing fields", 2),
        ("[1, \n", f"{damaged}, line 3, 6: skipped, not a whole row in JSON\n", 0),
    ):
        damaged.write_text(path.read_text() + damage)
        assert main(["table", str(damaged)]) == status and message in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "nowhere.jsonl")]) == 2


def test_a_record_has_null_for_what_json_has_no_number_for(tmp_path):
    file = tmp_path / "record.json"
    rows.write_json(file, {"a": [1.5, math.nan, (math.inf, "NaN")], "b": {"c": -math.inf, 3: None, "d": True}})
    found = {"a": [1.5, None, [None, "NaN"]], "b": {"c": None, "3": None, "d": True}}
    assert json.loads(file.read_text(), parse_constant=pytest.fail) == found


def test_the_table_has_geometric_means_worst_cases_and_what_is_left_out(tmp_path):
    path = written(
        tmp_path,
        (16, {"ours": 2.0, "linear": 1.0, "unfused": 6.0, "inverse-inv": 4.0, "inverse-cholesky": 3.0}),
        (64, {"ours": 1.0, "linear": 2.0, "unfused": 1.5}),
    )
    found = rows.read([path])
    found += [
        found[-1] | MISSING | {"provider": "compile", "status": "wrong", "note": "dx: off"},
        found[-1] | MISSING | {"n": 99, "status": "skipped", "note": "over the FLOP budget: 206 of 150 GFLOP"},
    ]
    text = report.markdown(found)
    # 2/1 and 1/2: mean 1, worst 2; 6/2 and 1.5/1: mean sqrt(4.5), worst 1.5; the fastest inverse 3/2
    assert "| summary, forward + backward | 1.00 (2.00) | 2.12 (1.50) | 1.50 (1.50) |" in text
    assert "| 16, 8, 4 | A | 2 | 2.00 | 3.00 | 1.50 |" in text
    assert "- compile, summary, forward + backward, (64, 8, 4) fp32: wrong: dx: off" in text
    assert "- (99, 8, 4): over the FLOP budget: 206 of 150 GFLOP (1 rows)" in text and "| 99," not in text


def test_a_table_is_written_between_its_marks(tmp_path):
    path, page = written(tmp_path, (16, {"ours": 2.0, "linear": 1.0})), tmp_path / "README.md"
    page.write_text("before\n<!-- begin: python -m benchmarks table record.jsonl -->\nold\n<!-- end -->\nafter\n")
    report.fill(page, path, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n") and "old" not in text
    assert report.markdown(rows.read([path]), brief=True) in text
    page.write_text("nothing")
    with pytest.raises(ValueError, match=r"has no lines '<!-- begin: python -m benchmarks table record.jsonl -->'"):
        report.fill(page, path, tmp_path)


@needs_records
def test_pages_say_what_their_record_says():
    marks = {}
    for page in (environment.ROOT / "README.md", *(environment.ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        marks |= {line.split()[-2]: text for line in text.splitlines() if line.startswith(f"{report.BEGIN} table")}
    assert marks
    for name, text in marks.items():
        assert report.markdown(rows.read([environment.ROOT / name]), brief=True) in text


def test_figures_are_drawn_of_what_there_is(tmp_path):
    path = written(tmp_path, (16, {"ours": 2.0, "linear": 1.0, "unfused": 3.0}), (64, {"ours": 3.0, "linear": 2.0}))
    assert main(["plot", str(path), "--output", str(tmp_path / "figures")]) == 0
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert names == {f"{n}.png" for n in ("latency", "to-linear", "to-unfused", "speed-of-light", "memory")}
    assert (tmp_path / "figures" / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert figures.draw([], tmp_path / "none") == []


def test_two_records_are_compared_by_their_ratios(tmp_path, capsys):
    one = written(tmp_path, (16, {"ours": 2.0, "linear": 1.0}), (64, {"ours": 1.0, "linear": 1.0}), name="one.jsonl")
    # 2 % and 10 % off
    other = written(tmp_path, (16, {"ours": 4.08, "linear": 2.0}), (64, {"ours": 1.1, "linear": 1.0}), name="two.jsonl")
    assert main(["compare", str(one), str(other)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ours / linear"))
    assert line.split()[3:] == ["1.059", "6.0%", "8.4%", "10.0%", "2"]
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["compare", str(one), str(tmp_path / "empty.jsonl")]) == 2


def test_the_environment_without_git(monkeypatch):
    monkeypatch.setattr(environment, "_run", lambda *_: None)
    found = environment.facts(revision="f00d")
    assert (found["git_sha"], found["dirty"]) == ("f00d", None)
    assert environment.now("f00dfeed").endswith("-f00dfee") and environment.now().endswith("-unknown")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert environment.device_slug("cuda") == "nvidia-h200" and environment.device_slug("cpu") == "cpu"
