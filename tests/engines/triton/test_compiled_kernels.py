"""The page of the compiled kernels is that of its record, and loops are read from machine code."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

import compiled_kernels
import offline

ROOT = Path(__file__).parents[3]
RECORD, PAGE = ROOT / "benchmarks/results/compiled/triton.json", ROOT / "docs/compiled-kernels.md"

# Addresses and encodings as cuobjdump prints them: a loop around two, of which one multiplies and one waits, then a trap.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x00000a0000017a02 */
        /*0010*/                   LDG.E R2, [R4.64] ;                    /* 0x0000000004027981 */
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8] ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4] ;
        /*0050*/              @!P1 BRA 0x40 ;
        /*0060*/               @P2 BRA 0x10 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
"""


def lengths(sass):
    return [loop.count("\n") for loop in offline.loops_of_products(sass)]


def test_loops_of_products_are_counted():
    assert lengths(SASS) == [2]
    assert lengths(SASS.replace("BRA 0x20", "BRA 0x60")) == [6]
    assert lengths(SASS.replace("HGMMA", "FFMA")) == []
    assert lengths(SASS.replace("SYNCS.PHASECHK.TRANS64.TRYWAIT", "UTCHMMA")) == [2, 2]


@pytest.mark.skipif(not RECORD.exists(), reason="a source archive has no records")
def test_the_page_is_that_of_the_record():
    record = compiled_kernels.read(RECORD)
    assert PAGE.read_text(encoding="utf-8") == compiled_kernels.page(record)
    plain = [row for row in record["kernels"] if row["name"] in compiled_kernels.WITHOUT_SPILLS]
    in_16_bits = [row for row in plain if row["dtype"] != "fp32"]
    assert len(in_16_bits) >= 4 * 6 * 3 and all(row["spills"] == 0 for row in in_16_bits)
    assert not any(any(row["spills_in_loops"]) for row in record["kernels"] if row["dtype"] != "fp32")
    assert all("spills_in_loops" in row or "error" in row for row in record["kernels"] + record["before"])
    before = {compiled_kernels.key_of(row) for row in record["before"]}
    assert before == {compiled_kernels.key_of(row) for row in record["kernels"] if row["name"] != "forward with P"}
    assert all(row["shared"] <= offline.SHARED_LIMIT[row["capability"]] for row in record["kernels"])


def test_an_older_commit_is_compiled_by_the_same_triton(tmp_path):
    record = tmp_path / "record.json"
    record.write_text('{"triton": "3.5.0", "kernels": []}')
    with pytest.raises(SystemExit, match=r"record\.json is of Triton 3\.5\.0, and this is Triton "):
        compiled_kernels.main("before", str(record), "abc")


def test_rows_of_another_older_commit_are_compiled_again(tmp_path, monkeypatch):
    key = {"name": "forward", "kernel": "stream", "dtype": "bf16", "shape": [32, 512, 100], "capability": 90}
    record = {"triton": compiled_kernels.triton.__version__, "kernels": [key], "before_sha": "abc", "before": [key]}
    file = tmp_path / "record.json"
    compiled_kernels.write(file, record)
    failed = offline.Failed(tag="", kernel="stream", capability=90, dtype="bf16", seconds=0.0, error="as asked")
    monkeypatch.setattr(compiled_kernels, "launch_of", lambda *key: "launch")
    monkeypatch.setattr(offline, "compile_all", lambda jobs, capabilities: {(tag, 90): failed for tag, _ in jobs})
    compiled_kernels.main("before", str(file), "def")
    assert compiled_kernels.read(file) == record | {"before_sha": "def", "before": [{**key, "error": "as asked"}]}
