"""Registers, spills, shared memory and loops of the Triton kernels in a record, and the page of them. Needs no GPU.

    export PYTHONPATH=.:tests/engines/triton/compiled
    python tests/tools/compiled_kernels.py compile RECORD    # of this checkout, what RECORD lacks: half an hour on two idle cores
    python tests/tools/compiled_kernels.py page RECORD PAGE

`before RECORD COMMIT` compiles the same kernels of an older commit. Run it with that commit's root and folders of tests in
PYTHONPATH, and with copies of this file and of offline.py in a folder of their own.
"""

import itertools
import json
import sys
from pathlib import Path

import offline
import torch
import triton

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CAPABILITIES = (80, 90, 100)
CLASSES = 10
KERNELS = {
    "forward": "stream",
    "forward with P": "stream",
    "backward": "summary_backward",
    "pair backward": "pair_backward",
    "pair loss": "pair_loss",
    "head loss": None,  # the one that planning takes
}
PATHS = [f"interp_nn/engines/triton/{name}" for name in (
    "backward.py", "configs.py", "cross_entropy.py", "forward.py", "grid.py", "head.py", "table.json", "tiles.py",
)]  # fmt: skip
WITHOUT_SPILLS = ("forward", "forward with P", "backward", "pair backward")
_KEY = ("name", "kernel", "dtype", "shape", "capability")


def wanted():
    """Yield the key of each kernel that dispatch takes: its name, the kernel's own, dtype, shape and capability."""
    from test_all_kernels import head
    from test_every_tile import refused

    from benchmarks.timing.performance_model import SHAPES
    from interp_nn.engines import select
    from interp_nn.engines.triton import configs

    for dtype, capability, shape, (name, kernel) in itertools.product(DTYPES, CAPABILITIES, SHAPES, KERNELS.items()):
        if dtype == "fp16" and name not in WITHOUT_SPILLS:
            continue  # fp16's losses have the tiles of bf16's
        if kernel is None:
            plan = select._kernel_plan(head(capability, DTYPES[dtype], *shape, CLASSES), "triton")
            kernel = configs.LOSS_KERNELS[plan.order]
        n, d, k = shape
        if refused(capability, kernel, DTYPES[dtype], n, k, CLASSES, d):
            continue
        yield name, kernel, dtype, shape, capability


def launch_of(name, kernel, dtype, shape, capability):
    """Return the launch of a kernel; None in a commit that has it not."""
    from recording import recording
    from test_all_kernels import problem

    n, d, k = shape
    with recording(capability, "ieee" if dtype == "fp32" else None) as launches:
        problem(kernel, DTYPES[dtype], n, k, CLASSES, d=d)
    place = int(name == "forward with P")
    return launches[place] if place < len(launches) else None


def row(key, outcome):
    """Return a row of the record."""
    found = dict(zip(_KEY, key, strict=True))
    if outcome.error is not None:
        return found | {"error": outcome.error.splitlines()[0]}
    measured = {name: getattr(outcome, name) for name in ("registers", "spills", "shared")}
    return found | measured | {name: list(getattr(outcome, name)) for name in ("loops", "spills_in_loops")}


def add(record, rows, keys):
    """Compile the kernels that the rows lack, a few at a time, and write the record after each time."""
    having = {key_of(row) for row in rows}
    jobs = [(key, launch_of(*key)) for key in keys if key not in having]
    jobs = [(key, launch) for key, launch in jobs if launch is not None]
    for first in range(0, len(jobs), 8):
        for capability in CAPABILITIES:
            some = {str(key): (key, launch) for key, launch in jobs[first : first + 8] if key[-1] == capability}
            made = offline.compile_all([(tag, launch) for tag, (_, launch) in some.items()], [capability])
            rows += [row(some[tag][0], outcome) for (tag, _), outcome in made.items()]
        yield record


def key_of(row):
    return (*(row[name] for name in _KEY[:3]), tuple(row["shape"]), row["capability"])


def read(file):
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"kernels": []}


def write(file, record):
    """Write the record, a line for each kernel."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lists = {name: value for name, value in record.items() if isinstance(value, list)}
    parts = [f'"{name}": {json.dumps(value)}' for name, value in record.items() if name not in lists]
    for name, rows in lists.items():
        parts.append(f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    file.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


def page(record):
    """Return the page of a record."""
    now = {key_of(row): row for row in record["kernels"]}
    before = {key_of(row): row for row in record.get("before", [])}
    return "\n".join(_lines(record, now, before)) + "\n"


def _lines(record, now, before):
    yield "# The compiled Triton kernels\n"
    yield (
        "A kernel that spills registers waits for memory in its loops, and one with more shared memory than a block may have "
        "does not start.\nThese figures are of the machine code. No GPU has run it, and none of them is a time."
    )
    yield "\n".join(_claims(now)) + "\n"
    yield (
        f"Triton {record['triton']}, commit {record['git_sha'][:7]}. An arrow comes from commit {record['before_sha'][:7]}, "
        "where the figure was another; a star\nmarks what was not compiled there. A loop is an innermost one that multiplies "
        "matrices, counted in instructions; kernels have several.\nThe first loop of a forward, and of a pair loss, forms G: it "
        "runs once a program, over the features, whatever the number of rows.\nSpills are loads and stores of registers in the "
        "code, and in parentheses those in a loop. Others run at most once for each tile.\nA kernel that needs more tensor "
        "memory than there is counts as one that does not compile: the compiler puts a trap in its place.\nLosses are of k "
        "classes for a pair, of ten for a head."
    )
    yield "\n<!-- begin: python tests/tools/compiled_kernels.py page benchmarks/results/compiled/triton.json -->"
    shown_dtypes = [dtype for dtype in DTYPES if any(key[2] == dtype for key in now)]
    yield from _comparison(now, before, shown_dtypes)
    for dtype, capability in itertools.product(shown_dtypes, CAPABILITIES):
        yield f"\n## {dtype}, sm_{capability}\n"
        yield "| kernel | (n, d, k) | registers | spills | shared, KiB | loops |"
        yield "|---|---|--:|--:|--:|---|"
        for key, found in now.items():
            if key[2] == dtype and key[4] == capability:
                cells = zip(_cells(before.get(key)), _cells(found), strict=True)
                shown = " | ".join(_changed(old, new) for old, new in cells)
                mark = "" if key in before else " *"
                yield f"| {key[0]}{mark} | {key[3]} | {shown} |"
    yield "\n<!-- end -->"


def _comparison(now, before, dtypes):
    """Yield a table of the spills of the kernels that both commits have."""
    yield "\n## The kernels that both commits have\n"
    yield "| kernels | number | do not compile | with spills | most spills | all spills | with spills in a loop |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for dtype, (kind, plain) in itertools.product(dtypes, (("forwards and backwards", True), ("losses", False))):
        keys = [key for key in now if key in before and key[2] == dtype and (key[0] in WITHOUT_SPILLS) is plain]
        if keys:
            both = ([f"{figure:,}" for figure in _spills([rows[key] for key in keys])] for rows in (before, now))
            cells = " | ".join(_changed(old, new) for old, new in zip(*both, strict=True))
            yield f"| {dtype}, {kind} | {len(keys)} | {cells} |"


def _spills(rows):
    """Return how many of the kernels do not compile, how many spill, the most and all spills, how many spill in a loop."""
    spills = [row["spills"] for row in rows if "error" not in row]
    inside = sum(any(row["spills_in_loops"]) for row in rows if "error" not in row)
    return len(rows) - len(spills), sum(map(bool, spills)), max(spills, default=0), sum(spills), inside


def _changed(old, new):
    return new if old in (None, new) else f"{old} → {new}"


def _cells(row):
    if row is None:
        return (None,) * 4
    if "error" in row:
        return "does not compile", "-", "-", "-"
    loops = zip(row["loops"], row["spills_in_loops"], strict=True)
    loops = " + ".join(f"{n} ({of})" if of else str(n) for n, of in loops) or "-"
    return str(row["registers"]), str(row["spills"]), f"{row['shared'] / 1024:.0f}", loops


def _claims(now):
    """Yield what holds of the kernels, as lines of a list."""
    of = {dtype: [row for row in now.values() if row["dtype"] == dtype] for dtype in DTYPES}
    in_16_bits = [dtype for dtype in ("bf16", "fp16") if of[dtype]]
    plain = [row for dtype in in_16_bits for row in of[dtype] if row["name"] in WITHOUT_SPILLS]
    yield f"\n- Forwards and backwards in {' and '.join(in_16_bits)}: {_spilling(plain)}"
    yield f"- Losses in bf16: {_spilling([row for row in of['bf16'] if row['name'] not in WITHOUT_SPILLS])}"
    if of["fp32"]:
        plain = [row for row in of["fp32"] if row["name"] in WITHOUT_SPILLS]
        losses = [row for row in of["fp32"] if row["name"] not in WITHOUT_SPILLS]
        yield f"- Forwards and backwards in fp32, where tf32 is not allowed: {_spilling(plain)}"
        yield f"- Losses in fp32, which `auto` leaves to PyTorch until a GPU has timed them: {_spilling(losses)}"


def _spilling(rows):
    spilling = [row for row in rows if row.get("spills")]
    text = f"{len(spilling)} of {len(rows)} kernels spill"
    if not spilling:
        return f"{text}."
    inside = [row for row in spilling if any(row["spills_in_loops"])]
    where = f"{len(inside)} of them" if inside else "none"
    return f"{text}, at most {max(row['spills'] for row in spilling)} instructions; {where} in a loop that multiplies matrices."


def main(command, record, *arguments):
    file = Path(record)
    found = read(file)
    if command == "page":
        Path(arguments[0]).write_text(page(found), encoding="utf-8")
        return
    if command == "before":
        if found["triton"] != triton.__version__:
            sys.exit(f"{record} is of Triton {found['triton']}, and this is Triton {triton.__version__}")
        if found.get("before_sha") != arguments[0]:
            found |= {"before_sha": arguments[0], "before": []}
        rows = found["before"]
        keys = [key_of(row) for row in found["kernels"]]
    else:
        from benchmarks.records import environment

        sha = environment.facts()["git_sha"]
        if found.get("git_sha") != sha:
            found["kernels"] = []
        found |= {"git_sha": sha, "paths": PATHS, "triton": triton.__version__}
        rows, keys = found["kernels"], list(wanted())
    for changed in add(found, rows, keys):
        rows.sort(key=lambda row: keys.index(key_of(row)))
        write(file, changed)


if __name__ == "__main__":
    main(*sys.argv[1:])
