"""Explanations beside other threads of the process: that draw random numbers, or explain too."""

import threading

import pytest
import torch
from explained_networks import functional
from torch import nn
from torch.nn import functional as F

from interp_nn.explain import UnsupportedOperation, frozen, linearize, record, supported_ops

DTYPE = torch.float64


def in_a_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


class Interrupted(nn.Module):
    """While it runs, another thread draws."""

    def __init__(self):
        super().__init__()
        self.linear, self.drawn = nn.Linear(6, 4), []

    def forward(self, x):
        self.drawn.append(float(in_a_thread(lambda: torch.rand(()))))
        return F.relu(self.linear(x))


@pytest.mark.parametrize("function", [record, supported_ops, frozen, linearize])
def test_draws_of_other_threads_are_left_alone(function):
    model, x = Interrupted().to(DTYPE), torch.randn(1, 6, dtype=DTYPE)
    torch.manual_seed(0)
    wanted = torch.rand(3, dtype=torch.float32).tolist()
    torch.manual_seed(0)
    for _ in range(2):
        function(model, x)
    assert [*model.drawn, float(torch.rand(()))] == pytest.approx(wanted)


DRAWS = {
    "of the input": lambda x, weight: F.dropout(x),
    "of a weight": lambda x, weight: x @ F.dropout(weight, 0.5, True),
    "as a tensor's method": lambda x, weight: x * torch.empty_like(weight[0]).uniform_(),
    "slopes": lambda x, weight: x @ F.rrelu(weight, training=True),
    "numbers": lambda x, weight: x + torch.rand(6, dtype=DTYPE),
}


class Drawing(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(6, 6, dtype=DTYPE)), function

    def forward(self, x):
        return self.function(x, self.weight)


@pytest.mark.parametrize("name", DRAWS)
def test_models_that_draw_are_refused_and_the_generator_is_as_it_was(name):
    model, x = Drawing(DRAWS[name]), torch.randn(2, 6, dtype=DTYPE)
    before = torch.get_rng_state()
    for function in (record, linearize, frozen):
        with pytest.raises(UnsupportedOperation, match="it draws random numbers"):
            function(model, x)
    assert "not treated" in str(supported_ops(model, x))
    assert torch.equal(torch.get_rng_state(), before)


def test_maps_are_right_in_several_threads():
    model, x = functional(), torch.randn(4, 6, dtype=DTYPE)
    affine = linearize(model, x)
    wanted, parts = torch.einsum("nkd,nd->nk", affine.weight, x), affine.bias_by_layer()
    tangent = frozen(model, x, mode="tangent")(2 * x)

    def explained():
        for _ in range(20):
            new = linearize(model, x)
            torch.testing.assert_close(new.matvec(x), wanted)
            torch.testing.assert_close(new.bias_by_layer(), parts)
            torch.testing.assert_close(frozen(model, x, mode="tangent")(2 * x), tangent)
        return True

    results = []
    threads = [threading.Thread(target=lambda: results.append(explained())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 3


def test_models_compile_again_when_the_last_thread_is_done():
    entered, first_is_done = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def forward(self, x):
            if threading.current_thread() is second:
                entered.set()
                first_is_done.wait(10)
            else:
                second.start()
                entered.wait(10)
            return F.relu(x)

    def stance():
        return torch._dynamo.eval_frame._stance.stance

    model, x = Waiting(), torch.randn(1, 6, dtype=DTYPE)
    second = threading.Thread(target=lambda: record(model, x))
    record(model, x)
    inside = stance()
    first_is_done.set()
    second.join()
    assert (inside, stance()) == ("force_eager", "default")
