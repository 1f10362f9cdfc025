"""Gated networks on real digits, in the regimes that tell gates from weights."""

from benchmarks.experiments import datasets, training
from benchmarks.experiments.gating_regimes import relu_mlp
from interp_nn.nn.gated.gates import HardGate
from interp_nn.nn.gated.networks import DGN, DLGN
from interp_nn.nn.gated.regimes import copy_gates, fix_gates

WIDTHS = (64, 64, 64, 64, 64, 10)


def accuracy(model):
    images = datasets.digits()
    x, x_test = ((part.flatten(1) + 1) / 2 for part in (images.x_train, images.x_test))
    training.train(model, x, images.y_train, training.Recipe(12, 64, 3e-3), label="digits")
    return training.accuracy(model, x_test, images.y_test)


def test_gates_carry_what_a_network_learns_of_digits():
    network = relu_mlp(*WIDTHS)
    relu = accuracy(network)
    learned, random = DGN(WIDTHS, gate=HardGate()), DGN(WIDTHS, gate=HardGate())
    found = {
        "DLGN on ones": accuracy(DLGN(WIDTHS)),
        "learned gates": accuracy(fix_gates(copy_gates(network, learned))),
        "random gates": accuracy(fix_gates(random)),
    }
    assert relu > 0.92 and found["DLGN on ones"] > 0.92
    assert found["learned gates"] > found["random gates"] > 0.85
