"""Every rank reads its own rows of the layers: the same model as one process has, which no rank ever holds whole."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from adapt.config import resolve
from adapt.conversion.base import planned_tokenizer
from adapt.distributed.world import World
from adapt.errors import UserError
from adapt.pretrained import load, outline
from adapt.train import build
from adapt.train.teacher import build_teacher
from tests import tiny
from tests.ranks import on_ranks
from tests.recipes import tiny_recipe

LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}


def world(ranks: int) -> World:
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    return World(rank, rank, ranks, ranks, torch.device("cpu"))


def all_start_alike(recipes: list[dict], ranks: int) -> None:
    for recipe in recipes:
        starts_alike(recipe, ranks)


def starts_alike(recipe: dict, ranks: int) -> None:
    wanted = resolve(recipe).recipe
    tokenizer = planned_tokenizer(wanted)
    whole = build.build_student(wanted, tokenizer)
    with pytest.MonkeyPatch.context() as patched:
        for module in (build, load):
            patched.setattr(module, "load_model", lambda *args, **kwargs: pytest.fail("a rank read the whole model"))
        root = build.build_root(wanted, planned_tokenizer(wanted), world(ranks))
    assert root.student.config.to_dict() | {"use_cache": True} == whole.config.to_dict() | {"use_cache": True}
    expected, found = dict(whole.named_parameters()), dict(root.student.named_parameters())
    assert expected.keys() == found.keys()
    for name, parameter in found.items():
        assert isinstance(parameter, DTensor)
        assert parameter.requires_grad == expected[name].requires_grad, name
        assert torch.equal(parameter.full_tensor(), expected[name]), name
    buffers = dict(root.student.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in whole.named_buffers())
    tied = root.student.get_output_embeddings().weight is root.student.get_input_embeddings().weight
    assert tied == whole.config.tie_word_embeddings
    ids = torch.arange(12)[None] + 5
    with torch.no_grad():
        assert torch.allclose(root(lambda models: models.student(ids).logits), whole(ids).logits, atol=1e-5)


LINEAR = [{"name": "lawcat", "layers": [1]}]
CONVERSIONS = (
    [{"name": "mask_token", "token": "<|new|>"}],
    LINEAR,
    [*LINEAR, {"name": "mamba2", "layers": [0], "init": "mamba_in_llama"}],
)


def test_sharded_start_is_the_whole_start_in_every_family(tmp_path):
    families = ("llama", "qwen2", "qwen3", "mistral")
    bases = [tiny.save_tiny(tmp_path / family, family) for family in families]
    on_ranks(2, tmp_path, all_start_alike, [recipe_of(base, tmp_path, []) for base in bases], 2)


@pytest.mark.parametrize("lora", [None, LORA], ids=["all", "lora"])
def test_with_what_conversions_and_adapters_add(lora, tiny_base, tmp_path):
    recipes = [recipe_of(tiny_base, tmp_path, conversions, lora) for conversions in CONVERSIONS]
    on_ranks(2, tmp_path, all_start_alike, recipes, 2)


def test_with_copies_of_the_shards(tiny_base, tmp_path):
    recipe = recipe_of(tiny_base, tmp_path, LINEAR, LORA)
    recipe["trainer"]["mesh"] = {"replicate": 2}
    on_ranks(4, tmp_path, starts_alike, recipe, 4)


def teacher_alike(recipe: dict) -> None:
    wanted = resolve(recipe).recipe
    tokenizer = planned_tokenizer(wanted)
    expected = dict(load.load_model(wanted).named_parameters())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("adapt.train.teacher.load_model", lambda *args: pytest.fail("a rank read the whole model"))
        teacher = build_teacher(wanted, tokenizer, world(2)).model
    for name, parameter in teacher.named_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter.full_tensor(), expected[name]), name


def test_the_teacher_too(tiny_base, tmp_path):
    recipe = recipe_of(tiny_base, tmp_path, []) | {"teacher": {"base": "self"}, "objective": "logit_distillation"}
    on_ranks(2, tmp_path, teacher_alike, recipe)


def test_only_the_rows_asked_for_are_read(tiny_base, monkeypatch):
    files = outline.WeightFiles.of(tiny_base)
    name = "model.layers.0.self_attn.q_proj.weight"
    (part,) = files.rows({name: (3, 7)})
    (whole,) = files.rows({name: None})
    assert part[0] == whole[0] == name
    assert torch.equal(part[1], whole[1][3:7])


def recipe_of(base, folder, conversions: list[dict], lora: dict | None = None) -> dict:
    recipe = tiny_recipe(base, folder, objective="next_token", model={"conversions": conversions})
    recipe |= {"evaluation": {}, "generation": {}}
    if lora:
        recipe["trainable"] = {"lora": lora}
    return recipe


@contextmanager
def grown() -> Iterator[list[int]]:
    """Afterwards its one entry is by how many bytes RssAnon grew at the most: what a rank holds, without the pages of files
    it has looked at."""
    peak, before, done, found = 0, held(), threading.Event(), []

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
    found.append(peak - before)


def grows_less(recipe: dict) -> None:
    wanted = resolve(recipe).recipe
    tokenizer = planned_tokenizer(wanted)
    with grown() as peak:
        root = build.build_root(wanted, tokenizer, world(2))
    weights = sum(p.numel() for p in root.student.parameters()) * 4
    assert 0.45 * weights < peak[0] < 0.75 * weights, peak[0] / weights


def held() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_rank_holds_much_more_than_its_half(tmp_path):
    on_ranks(2, tmp_path, grows_less, large_recipe(tmp_path))


def large_recipe(folder) -> dict:
    """100M parameters; the embedding (4 % of them) is whole on the way."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 6000}
    return recipe_of(tiny.save_tiny(folder / "base", **sizes), folder, [])


def test_offloading_needs_a_device_to_offload_from(tiny_base, tmp_path):
    wanted = resolve(recipe_of(tiny_base, tmp_path, []) | {"trainer": {"steps": 1, "mesh": {"offload": True}}}).recipe
    with pytest.raises(UserError, match=r"trainer\.mesh\.offload.*one CPU process"):
        build.build_root(wanted, planned_tokenizer(wanted), world(1))
