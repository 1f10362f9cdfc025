"""Records keep to their schema, survive interruptions, and tables and figures say what they hold."""

import csv
import json
import math
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from support import needs_records

from benchmarks import to_pandas
from benchmarks.__main__ import main
from benchmarks.records import environment, figures, intervals, report, rows, stale
from benchmarks.timing import compare

MISSING = {"samples": 0, "ms_p50": None, "ms_p20": None, "ms_p80": None}


def written(tmp_path, *given, name="record.jsonl", spread=None):
    """A record whose rows are of the summary's forward and backward, in milliseconds by provider for each n."""
    writer = rows.Writer(tmp_path / name, rows.common())
    for n, times in given:
        for provider, ms in times.items():
            writer.write(
                op="summary", provider=provider, mode="fwdbwd", dtype="fp32", n=n, d=8, k=4, status="ok", samples=7,
                timer="wall", l2="hot", ms_p50=ms, ms_p20=0.9 * ms, ms_p80=1.1 * ms, peak_delta_mb=1.0, sol_frac=0.5,
                plan="ours" if provider == "repeat" else "A", ms_groups=spread and [ms * (1 + spread * i) for i in range(-3, 4)],
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
        found[-1] | MISSING | {"provider": "compile", "status": "wrong", "note": "dx: off", "n": 16},
        found[-1] | MISSING | {"n": 99, "status": "skipped", "note": "over the FLOP budget: 206 of 150 GFLOP"},
    ]
    text = report.markdown(found)
    # 2/1 and 1/2: mean 1, worst 2; 6/2 and 1.5/1: mean sqrt(4.5), worst 1.5; the fastest inverse 3/2
    assert "| summary, forward + backward | 1.00 (2.00) | 2.12 (1.50) | 1.50 (1.50) |" in text
    assert "| 16, 8, 4 | A | 2 | 2.00 | 3.00 | 1.50 |" in text
    assert "- compile, summary, forward + backward, (64, 8, 4) fp32: wrong: dx: off (also at 1 more n)" in text
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
    (names,) = re.findall(rf"{report.BEGIN} compare (.*) (.*) -->", marks["benchmarks/results/cpu/suites.jsonl"])
    assert (
        compare.differences(*(environment.ROOT / name for name in names))
        in marks["benchmarks/results/cpu/suites.jsonl"]
    )


def test_figures_are_drawn_of_what_there_is(tmp_path, monkeypatch):
    path = written(tmp_path, (16, {"ours": 2.0, "linear": 1.0, "unfused": 3.0}), (64, {"ours": 3.0, "linear": 2.0}))
    assert main(["plot", str(path), "--output", str(tmp_path / "figures")]) == 0
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert names == {f"{n}.png" for n in ("latency", "to-linear", "to-unfused", "memory")}
    assert (tmp_path / "figures" / "latency.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())  # the same figures once more
    ceiling = rows.read([path])[0] | {"op": "ceiling", "provider": "device", "gbps": 10.0, "tflops": 0.1}
    of = [row | {"gflop": 0.01, "least_mb": 1.0} for row in rows.read([path])]
    assert tmp_path / "more" / "roofline.png" in figures.draw([ceiling, *of], tmp_path / "more")
    assert figures.draw([], tmp_path / "none") == []


def test_the_ratios_of_many_problems_are_panels_over_rows(tmp_path):
    from matplotlib import pyplot as plt

    found = rows.read([written(tmp_path, *((2**i, {"ours": 2.0, "linear": 1.0}) for i in range(7)), spread=0.1)])
    found += [row | {"k": 16} for row in found]
    figure = figures._ratios(plt, rows.grouped(found), report.COLUMNS[0])
    assert [axis.get_title() for axis in figure.axes] == ["d = 8, k = 4, fp32", "d = 8, k = 16, fp32"]
    assert [len(axis.collections[0].get_offsets()) for axis in figure.axes] == [7, 7]
    plt.close(figure)


def test_two_records_are_compared_by_their_ratios(tmp_path, monkeypatch, capsys):
    one = written(tmp_path, (16, {"ours": 2.0, "linear": 1.0}), (64, {"ours": 1.0, "linear": 1.0}), name="one.jsonl")
    # 2 % and 10 % off
    other = written(tmp_path, (16, {"ours": 4.08, "linear": 2.0}), (64, {"ours": 1.1, "linear": 1.0}), name="two.jsonl")
    assert main(["compare", str(one), str(other)]) == 0
    line = "| ours / linear | 1.059 | 6.0% | 8.4% | 10.0% | 2 |"
    assert line in capsys.readouterr().out
    page, marks = tmp_path / "page.md", "<!-- begin: python -m benchmarks compare {} {} -->\nold\n<!-- end -->\n"
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    page.write_text(marks.format("one.jsonl", "two.jsonl"))
    assert main(["compare", str(one), str(other), "--page", str(page)]) == 0
    assert line in page.read_text() and "old" not in page.read_text()
    assert main(["compare", str(other), str(one), "--page", str(page)]) == 2  # it has no such marks
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["compare", str(one), str(tmp_path / "empty.jsonl")]) == 2


def test_intervals_hold_the_ratio_and_are_wider_with_more_noise():
    draw, widths, held = np.random.default_rng(0), [], 0
    for spread in (0.02, 0.1):
        for _ in range(50):
            over, under = (scale * (1 + spread * draw.standard_normal(25)) for scale in (3.0, 2.0))
            low, high = intervals.interval(intervals.resampled(over, under))
            widths.append((spread, high - low))
            held += low <= 1.5 <= high
    assert 88 <= held <= 100
    means = [np.mean([width for given, width in widths if given == spread]) for spread in (0.02, 0.1)]
    assert means[1] > 3 * means[0]
    slower = np.linspace(1, 2, 9)  # a machine that slows down: the same rounds are drawn for both
    assert intervals.interval(intervals.resampled(3 * slower, 2 * slower)) == pytest.approx((1.5, 1.5))
    assert str(report.mean([report.Ratio(2.0, None), report.Ratio(0.5, None)])) == "1.00"


TIMES = st.lists(st.floats(0.1, 100), min_size=5, max_size=8)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(TIMES, TIMES, st.floats(0.1, 100)), min_size=1, max_size=3))
def test_an_estimate_lies_in_its_interval(problems):
    """The median over rounds, ms_p50, is not that of the groups that the interval is of."""
    ratios = []
    for ours, linear, p50 in problems:
        found = {
            name: {"status": "ok", "samples": 99, "ms_p50": p50, "ms_groups": groups}
            for name, groups in (("ours", ours), ("linear", linear))
        }
        ratios.append(report.ratio(found, report.COLUMNS[0]))
        assert ratios[-1].value == pytest.approx(np.median(ours) / np.median(linear))
    change = compare._Change((), report.COLUMNS[0], ratios[0], ratios[-1]).ratio
    for one in (*ratios, report.mean(ratios), change):
        low, high = one.ends
        assert low <= one.value <= high


def test_the_table_has_intervals_the_noise_and_what_to_doubt(tmp_path):
    times = {"ours": 2.0, "linear": 1.0, "repeat": 2.1, "best-eager": 1.9, "inverse-inv": 3.0, "mine": 4.0}
    found = rows.read([written(tmp_path, (16, times), spread=0.01)])
    for row in found:
        row |= {"mine": {"about": "a rival", "sol_frac": 1.2}}.get(row["provider"], {})
        row |= {"inverse-inv": {"samples": 4}, "linear": {"sol_frac": 2.0}}.get(row["provider"], {})
    text = report.markdown(found)
    assert "≈" not in text
    assert "| 16, 8, 4 | A | 2 | 2.00 [2.00, 2.00] | 0.95 [0.95, 0.95] | 2.00 [2.00, 2.00] |" in text
    assert "best-eager / ours | mine / ours |" in text and "inverse / ours" not in text
    assert "Noise floor: identical providers differ by 5.0% at the median, 5.0% at the 95th percentile and 5.0%" in text
    assert (
        "Fewer than 5 samples, and so not in the ratios:\n\n- summary, forward + backward, (16, 8, 4) fp32: inverse-inv"
        in text
    )
    assert "busy while the rates were measured:\n\n- summary, forward + backward, (16, 8, 4) fp32: mine 1.20\n" in text
    near = [row | {"provider": "unfused", "ms_groups": [1.8, 1.9, 2.0, 2.1, 2.2, 2.3, 2.4]} for row in found[:1]]
    text_of_near = report.markdown([*found, *near])
    assert (
        re.search(r"≈1\.05 \[0\.\d\d, 1\.\d\d\]", text_of_near)
        and "≈: the interval holds 1, so the run does not tell" in text_of_near
    )
    plan = [row | {"provider": "best-plan", "plan": "X"} for row in found if row["provider"] == "best-eager"]
    text = report.markdown([*found, *plan])
    assert (
        "ours / best-plan 1.05 [1.05, 1.05] as geometric mean of 1 problems and modes, with the fastest plan in 0"
        in text
    )
    assert "- summary, forward + backward, (16, 8, 4) fp32: 1.05 [1.05, 1.05], A; fastest X" in text


def test_a_record_of_schema_1_is_read(tmp_path):
    """Its training steps compared with another network, which now has another name."""
    path = written(tmp_path, (16, {"ours": 1.0, "linear": 1.0}))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line |= {"schema": 1, "op": "train_cnn"}
        for name in ("about", "parameters", "paths", "ms_groups"):
            del line[name]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = rows.read([path])
    assert [row["provider"] for row in found] == ["ours", "base-head"] and found[0]["ms_groups"] is None


def test_records_are_judged_by_intervals_beyond_the_noise(tmp_path, capsys):
    before = {"ours": 2.0, "linear": 1.0, "unfused": 2.0, "repeat": 2.02}
    one = written(tmp_path, (16, before), (64, before), name="one.jsonl", spread=0.002)
    for slower, status in ((1.01, 0), (1.3, 1), (0.7, 0)):
        after = before | {"ours": slower * 2.0, "repeat": slower * 2.02}
        other = written(tmp_path, (16, after), (64, before), name=f"{slower}.jsonl", spread=0.002)
        assert main(["compare", str(one), str(other)]) == status
        printed = capsys.readouterr().out
        line = next(line for line in printed.splitlines() if line.startswith("summary (16, 8, 4) fp32 fwdbwd"))
        assert line.endswith({1.01: "same within the noise", 1.3: "SLOWER", 0.7: "faster"}[slower])
        assert f"{slower:.2f} [{slower:.2f}, {slower:.2f}]" in line and "noise floor: " in printed


def test_a_users_provider_is_compared_too(tmp_path, capsys):
    def record(name, mine):
        path = written(tmp_path, (16, {"ours": 2.0, "linear": 1.0, "mine": mine}), name=name, spread=0.002)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[-1]["about"] = "a rival"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return str(path)

    assert main(["compare", record("one.jsonl", 4.0), record("two.jsonl", 6.0)]) == 1
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "fwdbwd" in line and "mine / ours" in line]
    assert "1.50 [1.50, 1.50]" in line and line.endswith("SLOWER")
    assert "| mine / ours | 1.500 | 50.0% |" in printed


def test_records_of_a_busy_machine_are_too_noisy_to_judge(tmp_path, capsys):
    before = {"ours": 2.0, "linear": 1.0, "repeat": 3.6}
    one = written(tmp_path, (16, before), (64, before), name="one.jsonl", spread=0.002)
    for slower, verdict, status in ((1.3, "too noisy to judge", 2), (3.0, "SLOWER", 1)):
        after = before | {"ours": slower * 2.0, "repeat": slower * 3.6}
        other = written(tmp_path, (16, after), (64, before), name=f"{slower}.jsonl", spread=0.002)
        assert main(["compare", str(one), str(other)]) == status
        told = capsys.readouterr()
        line = next(line for line in told.out.splitlines() if line.startswith("summary (16, 8, 4) fp32 fwdbwd"))
        assert line.endswith(verdict) and "same within the noise" not in told.out
        assert ("too noisy to judge: identical or unchanged providers differ by 80.0%" in told.err) == (status == 2)
    calm = {"ours": 2.0, "linear": 1.0, "repeat": 2.0}
    one = written(tmp_path, (16, calm), name="calm.jsonl", spread=0.002)
    other = written(tmp_path, (16, calm), name="wide.jsonl", spread=0.002)
    lines = [json.loads(line) for line in other.read_text().splitlines()]
    lines[0]["ms_groups"] = [1.2, 1.3, 1.4, 2.0, 4.0, 5.0, 6.0]  # of ours, with an interval that holds twice the time
    other.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main(["compare", str(one), str(other), "--threshold", "1"]) == 0
    assert "too noisy to judge" in capsys.readouterr().out


def test_a_record_as_csv_and_as_a_data_frame(tmp_path, capsys):
    path = written(tmp_path, (16, {"ours": 1.0, "linear": 2.0}), spread=0.1)
    assert main(["table", str(path), "--csv"]) == 0
    read = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["ms_p50"] for row in read] == ["1.0", "2.0"] and read[0].keys() == rows.FIELDS.keys()
    assert read[0]["ms_groups"].split()[0] == "0.7" and read[0]["note"] == ""
    frame = to_pandas(path)
    assert list(frame.ms_p50) == [1.0, 2.0] and frame.ms_groups[0][0] == 0.7


def test_the_page_of_records_has_every_field():
    text = (environment.ROOT / "docs" / "howto" / "read_a_record.md").read_text(encoding="utf-8")
    table = text.partition("## Fields of a record")[2]
    documented = {
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert documented == set(rows.FIELDS)


def test_a_record_older_than_what_it_measures_is_named(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=test", "-c", "user.email=test@example.org"]

    def commit(name):
        (tmp_path / name).write_text(name)
        for arguments in (["add", name], ["commit", "--quiet", "--message", name]):
            subprocess.run([*git, *arguments], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    made, record = commit("kernels.py"), tmp_path / "record.jsonl"
    record.write_text(
        json.dumps({"git_sha": made, "paths": ["kernels.py"]}) + "\n" + json.dumps({"git_sha": made}) + "\n"
    )
    commit("other.py")
    assert list(stale.stale(record, tmp_path)) == []
    (tmp_path / "kernels.py").unlink()
    commit("kernels.py.new")
    subprocess.run([*git, "commit", "--quiet", "--all", "--message", "changed"], check=True)
    assert list(stale.stale(record, tmp_path)) == [
        f"stale: record.jsonl: 1 commits since {made[:7]} have changed kernels.py"
    ]
    record.write_text(json.dumps({"git_sha": 40 * "0", "paths": ["kernels.py"]}))  # of no known commit
    assert list(stale.stale(record, tmp_path)) == []


def test_only_changes_outside_the_results_are_dirty(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    figure, code = tmp_path / "benchmarks/results/cpu/figure.png", tmp_path / "code.py"
    figure.parent.mkdir(parents=True)
    figure.write_text("")
    code.write_text("")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    figure.write_text("drawn again")
    assert environment.facts()["dirty"] is False
    code.write_text("changed")
    assert environment.facts()["dirty"] is True


def test_the_environment_without_git(monkeypatch):
    monkeypatch.setattr(environment, "_run", lambda *_: None)
    found = environment.facts(revision="f00d")
    assert (found["git_sha"], found["dirty"]) == ("f00d", None)
    assert environment.now("f00dfeed").endswith("-f00dfee") and environment.now().endswith("-unknown")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert environment.device_slug("cuda") == "nvidia-h200" and environment.device_slug("cpu") == "cpu"
