"""The README's Python runs."""

import re
from pathlib import Path

import pytest
import torch

import interp_nn

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:40] for block in BLOCKS])
def test_block(block, capsys):
    exec(compile(block, "README.md", "exec"), {"torch": torch, "interp_nn": interp_nn})
    capsys.readouterr()


def test_there_are_blocks():
    assert len(BLOCKS) >= 3
