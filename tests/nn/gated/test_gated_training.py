"""Gated networks that are trained: on two processes as on one, and on real digits in the regimes that tell gates from weights."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from interp_nn.nn.gated.from_relu import to_dgn
from interp_nn.nn.gated.gates import HardGate
from interp_nn.nn.gated.networks import DGN, DLGN, DLGNValueTensor
from interp_nn.nn.gated.regimes import copy_gates, fix_gates, permute_gates


def small_networks():
    convolutions = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 2)
    ).double()
    return [
        (DLGN((6, 5, 5, 2), dtype=torch.float64), (6,)),
        (permute_gates(DGN((6, 5, 5, 2), bias=True, dtype=torch.float64), (1, 0)), (6,)),
        (fix_gates(DGN((6, 5, 5, 2), gate=HardGate(), dtype=torch.float64)), (6,)),
        (DLGNValueTensor((6, 5, 4, 2), dtype=torch.float64), (6,)),
        (to_dgn(convolutions), (1, 8, 8)),
        (to_dgn(convolutions, gating="relu", value_input="x"), (1, 8, 8)),
    ]


def trained(model, x, t, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
    return model


def data(shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, *shape, dtype=torch.float64, generator=generator)
    return x, torch.randint(2, (8,), generator=generator)


def one_of_two(rank, path):
    distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        for i, (model, shape) in enumerate(small_networks()):
            x, t = data(shape)
            mine = slice(4 * rank, 4 * rank + 4)
            trained(DistributedDataParallel(model), x[mine], t[mine])
            torch.save(model.state_dict(), f"{path}/{i}-{rank}")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow  # of which each imports everything
def test_two_processes_train_as_one_does(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    torch.manual_seed(0)
    for i, (model, shape) in enumerate(small_networks()):
        before = copy.deepcopy(model.state_dict())
        wanted = trained(model, *data(shape)).state_dict()
        assert any(not torch.equal(v, before[k]) for k, v in wanted.items())
        for rank in range(2):
            got = torch.load(tmp_path / f"{i}-{rank}", weights_only=True)
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


WIDTHS = (64, 64, 64, 64, 64, 10)


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    x, t = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, t = torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(t)[order]
    return x[:1400], t[:1400], x[1400:], t[1400:]


def accuracy(model, digits, epochs=12):
    x, t, x_test, t_test = digits
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), t[rows]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((model(x_test).argmax(1) == t_test).float().mean())


def relu_network():
    layers = []
    for i, o in pairwise(WIDTHS):
        layers += [nn.Linear(i, o, False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_gates_carry_what_a_network_learns_of_digits(digits):
    network = relu_network()
    relu = accuracy(network, digits)
    learned, random = DGN(WIDTHS, gate=HardGate()), DGN(WIDTHS, gate=HardGate())
    found = {
        "DLGN on ones": accuracy(DLGN(WIDTHS), digits),
        "learned gates": accuracy(fix_gates(copy_gates(network, learned)), digits),
        "random gates": accuracy(fix_gates(random), digits),
    }
    assert relu > 0.92 and found["DLGN on ones"] > 0.92
    assert found["learned gates"] > found["random gates"] > 0.85
