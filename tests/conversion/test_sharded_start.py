"""Conversions and FSDP2: what ranks hold is what one process makes, bit for bit (x-ecomla spec, invariant 18; LAWCAT spec,
invariant 14); and on the meta device there are the same names and shapes, and no number."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from adapt.config.schema import Mesh
from adapt.conversion.base import apply_conversions
from adapt.distributed.shard import make_mesh
from adapt.distributed.shard import shard as shard_root
from adapt.distributed.world import World
from adapt.pretrained import load_model, load_tokenizer
from adapt.train.root import Root
from tests import tiny
from tests.models.linear import ids
from tests.ranks import on_ranks

CONVERSIONS = {
    "latents, the stock class": [{"name": "xecomla", "kv_rank": 16}],
    "latents without a norm, low-rank queries": [{"name": "xecomla", "kv_rank": 16, "q_rank": 24, "latent_norm": "none"}],
    "latents of an energy": [{"name": "xecomla", "kv_energy": 0.8}],
    "latents of a budget": [{"name": "xecomla", "kv_budget": 0.75, "rope_dim": 4}],
    "drawn latents": [{"name": "xecomla", "kv_rank": 16, "start": "random"}],
    "lawcat": [{"name": "lawcat", "layers": [0, 2], "tied": False}],
    "mamba2 beside latents": [{"name": "xecomla", "layers": [0], "kv_rank": 16}, {"name": "mamba2", "layers": [2]}],
}  # fmt: skip


def recipe_of(base, folder, conversions):
    from adapt.config import resolve
    from tests.recipes import tiny_recipe

    over = {"objective": {"name": "next_token"}, "generation": {"samplers": ["ar"]}, "evaluation": {"suites": []}}
    return resolve(tiny_recipe(base, folder, model={"conversions": conversions}, **over)).recipe


def student_of(recipe, decided=None):
    return apply_conversions(recipe, load_model(recipe), load_tokenizer(recipe), decided)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_tiny(tmp_path_factory.mktemp("base"), num_hidden_layers=3)


def whole_on_two_ranks(base, folder):
    world = World(dist.get_rank(), dist.get_rank(), 2, 2, torch.device("cpu"))
    for name, conversions in CONVERSIONS.items():
        decided = {}
        student = student_of(recipe_of(base, folder, conversions), decided)
        alone = {key: weight.clone() for key, weight in student.state_dict().items()}
        root = Root(student)
        shard_root(root, [student], make_mesh(world, Mesh()), torch.float32)
        local = sum(p.to_local().numel() for p in root.parameters())
        assert local < 0.6 * sum(p.numel() for p in root.parameters()), "every rank holds all of it"
        full = get_model_state_dict(root, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            assert {f"student.{key}" for key in alone} == full.keys(), name
            wrong = [key for key, weight in alone.items() if not torch.equal(full[f"student.{key}"], weight)]
            assert not wrong, (name, wrong)
            saved = torch.load(folder / f"{list(CONVERSIONS).index(name)}.pt")
            assert all(torch.equal(full[f"student.{key}"], weight) for key, weight in saved["weights"].items()), name
            again = student_of(recipe_of(base, folder, conversions), decided)  # as an export does, on rank 0 alone
            again.load_state_dict({key.removeprefix("student."): weight for key, weight in full.items()})
            with torch.no_grad():
                assert torch.equal(again(ids(2, 24), use_cache=False).logits, saved["logits"]), name


def test_invariant_18_sharded_students_are_those_of_one_process(base, tmp_path):
    """Weights and, once gathered, logits; of one process without a group, on this one."""
    for index, conversions in enumerate(CONVERSIONS.values()):
        student = student_of(recipe_of(base, tmp_path, conversions))
        with torch.no_grad():
            logits = student(ids(2, 24), use_cache=False).logits
        torch.save({"weights": student.state_dict(), "logits": logits}, tmp_path / f"{index}.pt")
    on_ranks(2, tmp_path, whole_on_two_ranks, base, tmp_path)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_on_the_meta_device_there_is_the_shape_of_it(name, base, tmp_path):
    recipe = recipe_of(base, tmp_path, CONVERSIONS[name])
    empty = apply_conversions(recipe, load_model(recipe, device="meta"), None)
    assert all(p.is_meta for p in empty.parameters())
    real = student_of(recipe)
    assert type(empty) is type(real)
    assert [n for n, _ in empty.named_parameters()] == [n for n, _ in real.named_parameters()]
    if "energy" not in name and "budget" not in name:  # of which the weights decide
        assert [p.shape for p in empty.parameters()] == [p.shape for p in real.parameters()]
    elif "budget" in name:
        sizes = [sum(p.numel() for n, p in m.named_parameters() if "kv_a_proj" in n) for m in (empty, real)]
        assert sizes[0] == sizes[1]  # shared out otherwise, not more and not less
