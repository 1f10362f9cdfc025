"""The cost of a layer on the host: what is measured, and what is printed of it."""

import pytest
import torch

from benchmarks.timing import host


def test_layers_beside_their_products(monkeypatch):
    monkeypatch.setattr(host, "_SECONDS", 0.0)
    threads = torch.get_num_threads()
    layer = host._layers()
    assert torch.get_num_threads() == threads
    assert (layer["shape"], layer["threads"]) == ([32, 512, 100], 1)
    assert len(layer["median"]) == 9 and min(layer["median"].values()) > 0
    for mode, above in layer["above by hand"].items():
        ours, by_hand = (layer["median"][f"{name}, {mode}"] for name in ("SummaryLinear", "by hand"))
        assert above == pytest.approx(ours - by_hand, abs=0.011)
    text = host.table({"median": {"engine: forward": 1.25}, "layer": layer})
    assert "engine: forward" in text and "n, d, k = 32, 512, 100, one thread:" in text
    assert "forward and backward, above by hand" in text


def test_by_hand_is_the_layer():
    by_hand, x = host._ByHand(7, 3), torch.randn(5, 7)
    with torch.no_grad():
        by_hand.weight.normal_()
    layer = host.SummaryLinear(7, 3)
    layer.load_state_dict(by_hand.state_dict())
    torch.testing.assert_close(by_hand(x), layer(x))
