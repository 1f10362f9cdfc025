import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp_nn.explain import ActivationPatterns


@given(st.integers(0, 40), st.integers(0, 70), st.integers(0, 2**31))
def test_packing_goes_back(n, width, seed):
    gates = torch.rand(n, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    patterns = ActivationPatterns.from_gates(gates)
    assert len(patterns) == n and patterns.packed.shape == (n, -(-width // 8))
    assert torch.equal(patterns.unpack(), gates)
    assert torch.equal(patterns.active(), gates.sum(1))


def test_layers_follow_one_another_and_zero_is_off():
    first, second = torch.tensor([[1.0, -1.0], [0.0, 2.0]]), torch.tensor([[[3.0]], [[-0.0]]])
    gates = ActivationPatterns.from_preactivations([first, second]).unpack()
    assert gates.tolist() == [[True, False, True], [False, True, False]]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 40))
def test_overlap_and_hamming(n, m, width):
    a, b = torch.rand(n, width) < 0.4, torch.rand(m, width) < 0.6
    left, right = ActivationPatterns.from_gates(a), ActivationPatterns.from_gates(b)
    assert torch.equal(left.overlap(right), (a.unsqueeze(1) & b).sum(2))
    assert torch.equal(left.hamming(right), (a.unsqueeze(1) ^ b).sum(2))
    assert torch.equal(left.hamming().diagonal(), torch.zeros(n, dtype=torch.int64))


def test_overlap_in_parts(monkeypatch):
    gates = torch.rand(50, 20) < 0.5
    patterns = ActivationPatterns.from_gates(gates)
    whole = patterns.overlap()
    monkeypatch.setattr("interp_nn.gates.patterns._BITS_AT_ONCE", 130)
    assert torch.equal(patterns.overlap(), whole) and torch.equal(patterns.active(), gates.sum(1))


def test_groups_are_numbered_as_they_appear():
    gates = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    groups = ActivationPatterns.from_gates(gates).groups()
    assert groups.labels.tolist() == [0, 1, 0, 2, 1]
    assert groups.counts.tolist() == [2, 2, 1] and groups.first.tolist() == [0, 1, 3]
    assert torch.equal(groups.patterns.unpack(), gates[groups.first])


@given(st.integers(0, 200), st.integers(0, 12))
def test_groups_are_those_of_the_rows(n, width):
    gates = torch.rand(n, width) < 0.5
    groups = ActivationPatterns.from_gates(gates).groups()
    assert torch.equal(groups.patterns.unpack()[groups.labels], gates)
    assert len({tuple(row) for row in gates.tolist()}) == len(groups.counts)
    assert torch.equal(groups.labels.bincount(minlength=len(groups.counts)), groups.counts)


def test_samples_are_selected_compared_and_hashed():
    patterns = ActivationPatterns.from_gates(torch.rand(6, 9) < 0.5)
    assert (
        patterns[2]
        == patterns[2:3]
        == patterns[torch.tensor([2])]
        == patterns[torch.tensor(2)]
        == patterns[np.int64(2)]
    )
    assert len({patterns, patterns[:], patterns[:3]}) == 2
    assert patterns[-1] == patterns[5:] and patterns != "patterns"
    assert repr(patterns) == "ActivationPatterns(6 samples, 9 units)"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: ActivationPatterns.from_gates(torch.ones(2, 3)),
            TypeError,
            "gates: got torch.float32, want torch.bool",
        ),
        (lambda: ActivationPatterns.from_gates([]), ValueError, "gates: got no layers"),
        (
            lambda: ActivationPatterns.from_gates([torch.ones(2, 3).bool(), torch.ones(3, 3).bool()]),
            ValueError,
            r"gates: got shapes \[\(2, 3\), \(3, 3\)\]",
        ),
        (lambda: ActivationPatterns(torch.ones(2, 3), 17), TypeError, "packed: got torch.float32"),
        (
            lambda: ActivationPatterns(torch.ones(2, 3, dtype=torch.uint8), 9),
            ValueError,
            r"packed: got shape \(2, 3\), want \(n, 2\) for 9 units",
        ),
        (
            lambda: ActivationPatterns.from_gates(torch.ones(2, 3).bool()).hamming(
                ActivationPatterns.from_gates(torch.ones(2, 4).bool())
            ),
            ValueError,
            "other: got patterns of 4 units, want 3",
        ),
    ],
)
def test_bad_input_is_named(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_sample_that_is_not_there():
    """An index past the end raises, which is what ends a loop over the samples."""
    patterns = ActivationPatterns.from_gates(torch.rand(3, 9) < 0.5)
    assert [len(p) for p in patterns] == [1, 1, 1]
    assert patterns[-3] == patterns[0]
    for sample in (3, -4):
        with pytest.raises(IndexError, match=f"sample: got {sample}, want one of 3"):
            patterns[sample]
