"""Threads and tasks do not see one another's engine, nor one another's transforms."""

import asyncio
import threading

import pytest
import torch
from torch.autograd import forward_ad

import interp_nn
from interp_nn import functional
from interp_nn.engines import select


def test_engines_of_threads_that_overlap_are_their_own():
    """Kind: a setting of one thread that another one reads, or restores too late."""
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        with interp_nn.use_engine("eager"):
            first_is_in.set()
            second_is_in.wait(10)
            seen["first"] = select.requested()
        first_is_out.set()
        seen["first, after"] = select.requested()

    def second():
        first_is_in.wait(10)
        seen["second, before"] = select.requested()
        with interp_nn.use_engine("auto"):
            second_is_in.set()
            first_is_out.wait(10)
        seen["second, after"] = select.requested()

    threads = [threading.Thread(target=function) for function in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": "eager", "first, after": "auto", "second, before": "auto", "second, after": "auto"}
    assert select.requested() == "auto"


def test_engines_of_tasks_that_overlap_are_their_own():
    async def task(name, seen):
        with interp_nn.use_engine(name):
            await asyncio.sleep(0.01)
            seen.append((name, select.requested()))

    async def both():
        seen = []
        await asyncio.gather(task("eager", seen), task("auto", seen))
        return seen

    assert sorted(asyncio.run(both())) == [("auto", "auto"), ("eager", "eager")]
    assert select.requested() == "auto"


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_a_compiled_function_follows_the_engine(monkeypatch):
    x, b = torch.randn(6, 5), torch.randn(5, 4)
    asked = []
    original = select.choose_engine
    monkeypatch.setattr(select, "choose_engine", lambda problem: asked.append(select.requested()) or original(problem))
    compiled = torch.compile(lambda x, b: functional.summary(x, b), backend="eager")
    with interp_nn.use_engine("eager"):
        compiled(x, b)
    compiled(x, b)
    assert asked[0] == "eager" and asked[-1] == "auto"


def test_a_thread_in_forward_mode_leaves_the_bits_of_another_one():
    """Kind: a process-wide level of forward-mode AD that is taken for this thread's own."""
    x, b = torch.randn(64, 48), torch.randn(48, 10)
    target = torch.randint(10, (64,))

    def losses():
        given = [t.clone().requires_grad_() for t in (x.half(), b.half())]
        loss = functional.summary_cross_entropy(*given, target)
        return [loss.detach(), *torch.autograd.grad(loss, given)]

    alone, entered, leave = losses(), threading.Event(), threading.Event()

    def in_forward_mode():
        with forward_ad.dual_level():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=in_forward_mode)
    thread.start()
    entered.wait(10)
    try:
        beside = losses()
        assert functional.summary(x.requires_grad_(), b).grad_fn is not None
    finally:
        leave.set()
        thread.join()
    assert all(torch.equal(a, c) for a, c in zip(alone, beside, strict=True))
