"""A finetuning recipe as torchtune's, of two processes: FSDP2 from the meta device, accumulation, clipping, DCP, fold, export."""

import copy

import pytest
import torch
import torch.distributed as dist
from relative_error import error
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from interp_nn.convert import fold, summarize
from interp_nn.nn import follow

pytestmark = pytest.mark.slow
STEPS, HALF = 4, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def plain():
    return nn.Sequential(nn.Embedding(20, 8), Block(), Block(), nn.Linear(8, 20))


def convert(model, kind, preserve="function"):
    options = {"select": "3"} if kind == "head" else {"polynomial": "newton-schulz"}
    summarize(model, preserve=preserve, **options)
    return model


def data(step):
    """Return the two microbatches of this process."""
    tokens = torch.randint(20, (2, 4, 6), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
    return zip(tokens, tokens.roll(-1, -1), strict=True)


class Recipe:
    """The state of one process: a sharded model, its optimizer and schedule."""

    def __init__(self, kind):
        torch.manual_seed(0)
        state = convert(plain(), kind).state_dict() if dist.get_rank() == 0 else {}
        with torch.device("meta"):
            self.model = convert(plain(), kind, "weight")
        for module in (self.model[1], self.model[2], self.model):
            fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        self.model.to_empty(device="cpu")
        set_model_state_dict(
            self.model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        follow(self.optimizer, self.model)

    def train(self, first, last):
        for step in range(first, last):
            for index, (tokens, target) in enumerate(data(step)):
                self.model.set_requires_gradient_sync(index == 1)
                loss = nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), target.flatten())
                (loss / 2).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()

    def state(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}

    def save(self, folder):
        dcp.save(self.state(), checkpoint_id=folder)

    def load(self, folder):
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def whole(self):
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    for kind in ("head", "whole"):
        check(kind, folder / kind)
    dist.destroy_process_group()


def check(kind, folder):
    """Check that a resumed run has the bits of an uninterrupted one, and the folded and exported model."""
    recipe, resumed = Recipe(kind), Recipe(kind)
    start = copy.deepcopy(recipe.whole())
    recipe.train(0, HALF)
    recipe.save(folder)
    recipe.train(HALF, STEPS)
    resumed.load(folder)
    resumed.train(HALF, STEPS)
    states = recipe.whole(), resumed.whole()
    if dist.get_rank() == 0:
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name]), name
            assert not name.endswith((".b", ".gain", ".scale")) or not torch.equal(value, start[name]), name
        model = convert(plain(), kind)
        model.load_state_dict(states[0])
        assert all(torch.equal(value, states[0][name]) for name, value in model.state_dict().items())
        tokens = torch.arange(20).view(2, 10)
        wanted, folded = model(tokens), copy.deepcopy(model)
        assert not fold(folded).skipped
        assert error(torch.export.export(folded, (tokens,)).module()(tokens), wanted) <= 1e-5
    dist.barrier()


def test_a_recipe_of_two_processes(tmp_path):
    torch.multiprocessing.spawn(run, (tmp_path,), nprocs=2)
