"""What an optimizer's step sends on real ranks is what its footprint says."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from adapt.config.schema import Mesh
from adapt.distributed.shard import make_mesh, shard
from adapt.distributed.world import World
from adapt.optim.exchange import traffic
from adapt.plan.cluster import Grid
from adapt.plan.model import PlannedModel
from adapt.plan.optimizer import plan_optimizer
from tests.plan.stages import recipe_of
from tests.ranks import on_ranks

OPTIMIZERS = {
    "muon": {},
    "cosmos": {"rank": 8},
    "soap": {"precondition_frequency": 2},
}
STEPS = 2
"""After the first, which starts bases: one that turns SOAP's and one that does not."""


def step_and_compare(name: str, options: dict, replicate: int) -> None:
    from transformers import AutoModelForCausalLM

    from adapt.pretrained.arch import arch_config

    recipe = recipe_of(arch={"num_hidden_layers": 2}, optimizer={"name": name, "lr": 1e-3, **options})
    config, size = arch_config(recipe.model.arch), dist.get_world_size()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    world = World(dist.get_rank(), dist.get_rank(), size, size, torch.device("cpu"))
    shard(model, [model], make_mesh(world, Mesh(replicate=replicate)), torch.float32)
    optimizer = recipe.optimizer.build(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    traffic.clear()
    for _ in range(STEPS):
        optimizer.step()
    sent = torch.tensor([float(traffic.total())])
    dist.all_reduce(sent)
    plan = plan_optimizer(recipe, PlannedModel.student(recipe, config), Grid(size // replicate, replicate), 4)
    assert float(sent) / size / STEPS == pytest.approx(plan.sent, rel=0.02)


@pytest.mark.parametrize("ranks, replicate", [(2, 1), (2, 2)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_sends_what_the_plan_says(name, ranks, replicate, tmp_path):
    on_ranks(ranks, tmp_path, step_and_compare, name, OPTIMIZERS[name], replicate)
