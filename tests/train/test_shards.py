"""The export of a sharded run is that of one process, which no rank ever holds whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapt.config import resolve
from adapt.conversion.base import planned_tokenizer
from adapt.distributed.world import World
from adapt.errors import UserError
from adapt.export.code import own_class
from adapt.export.folder import export_folder
from adapt.export.weights import Whole
from adapt.train import shards
from adapt.train.build import build_root, build_student, whole_student
from tests import tiny
from tests.plan.reality import GIVEN_BACK
from tests.ranks import on_ranks
from tests.recipes import tiny_recipe
from tests.train.test_fit import ROOT, launch
from tests.train.test_sharded_start import grown, large_recipe

LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}
LATENT = {"name": "xecomla", "kv_cache": 0.5}
CASES = {
    "plain": {},
    "tied and replicated": {"base": {"tie_word_embeddings": True}, "mesh": {"replicate": 2}},
    "adapters": {"lora": LORA},
    "linear": {"conversions": [{"name": "lawcat", "layers": [1]}], "dtype": "bfloat16"},
    "latent, adapters": {"conversions": [LATENT], "lora": LORA},
    "latent for vllm": {
        "conversions": [LATENT | {"latent_norm": "calibrated"}],
        "target": "vllm",
        "base": {"tie_word_embeddings": True},
        "dtype": "bfloat16",
    },
}


def recipe_of(folder, case: dict) -> dict:
    base = tiny.save_tiny(folder / "base", **({"tie_word_embeddings": False} | case.get("base", {})))
    recipe = tiny_recipe(base, folder, objective="next_token", model={"conversions": case.get("conversions", [])})
    recipe |= {"evaluation": {}, "generation": {}}
    recipe["export"] = {"dtype": case.get("dtype", "float32"), "target": case.get("target", "hf")}
    recipe["trainer"]["mesh"] = case.get("mesh", {})
    return recipe | ({"trainable": {"lora": case["lora"]}} if "lora" in case else {})


@torch.no_grad()
def moved(root) -> None:
    """Weights away from their start, the same on any number of ranks: adapters begin as zeros."""
    for number, parameter in enumerate(root.student.parameters()):
        parameter.add_(0.01 * (number % 7 - 3))


def export(recipe: dict, out, ranks: int, **kwargs):
    resolved = resolve(recipe)
    wanted, tokenizer = resolved.recipe, planned_tokenizer(resolved.recipe)
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    world = World(rank, rank, ranks, ranks, torch.device("cpu"))
    if ranks == 1:  # one process knows no mesh
        wanted = replace(wanted, trainer=replace(wanted.trainer, mesh=type(wanted.trainer.mesh)()))
    root = build_root(wanted, tokenizer, world)
    moved(root)
    weights = shards.Shards(root, wanted, world) if ranks > 1 else Whole(whole_student(wanted, root))
    rest = {"resolved_yaml": "", "results": {}, "provenance": {"base": {}}}
    return export_folder(weights, tokenizer, out, recipe=wanted, **rest, **kwargs)


def export_in_small_files(recipe: dict, out) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "FILE", 20_000)
        export(recipe, out, torch.distributed.get_world_size())


def tensors(folder) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_export_what_one_does(case, tmp_path):
    recipe = recipe_of(tmp_path, CASES[case])
    one = export(recipe, tmp_path / "one", 1)
    on_ranks(2, tmp_path, export_in_small_files, recipe, tmp_path / "two")
    two = tmp_path / "two"
    index = json.loads((two / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(two.glob("*.safetensors"))) > 2
    ours, theirs = tensors(two), tensors(one)
    assert ours.keys() == theirs.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in ours.values())
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    own = {"model.safetensors", "adapt.json", "README.md"}
    assert {f.name for f in one.iterdir()} - own <= {f.name for f in two.iterdir()}
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "recipe.yaml"):
        assert (two / file).read_text() == (one / file).read_text()
    said, alone = (json.loads((folder / "adapt.json").read_text())["export"] for folder in (two, one))
    for key in ("dtype", "target", "cache_bytes_per_token", "state_bytes"):
        assert said[key] == alone[key]
    assert said["rounding_difference"] == pytest.approx(alone["rounding_difference"], abs=1e-4)
    loader = own_class(two) or AutoModelForCausalLM
    ids = torch.arange(12)[None] + 5
    a, b = (loader.from_pretrained(folder, dtype="auto").eval() for folder in (one, two))
    with torch.no_grad():
        assert torch.equal(a(ids).logits, b(ids).logits)


def test_ranks_of_torchrun_export_a_run_of_one_process(tiny_base, tmp_path):
    """`adapt export` of a run without its export: on two ranks what it is on one."""
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 2, "batch_tokens": 256, "microbatch": 2})
    recipe |= {"evaluation": {}, "generation": {}}
    assert launch(recipe, tmp_path).returncode == 0
    run = tmp_path / "runs" / "tiny"
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    verb = ["-m", "adapt", "export", str(run), "--to", str(tmp_path / "again")]
    done = subprocess.run(
        [*ranks, *verb], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "again")]
    ours, theirs = tensors(tmp_path / "again"), tensors(run / "export")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def full_on_one_rank(recipe: dict, out) -> None:
    """Rank 1's disk is full: both ranks end, one of them with the reason."""
    rank = torch.distributed.get_rank()
    write = shards._write

    def full(path, *args):
        if rank == 1:
            raise OSError(28, "No space left on device")
        write(path, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "FILE", 20_000)
        patched.setattr(shards, "_write", full)
        with pytest.raises(UserError if rank == 0 else SystemExit) as raised:
            export(recipe, out, 2)
    if rank == 0:
        assert "No space left on device; nothing was left behind" in str(raised.value)


def another_model(recipe: dict, out) -> None:
    """The files hold other weights than the run has."""
    fill = shards.fill

    @torch.no_grad()
    def fill_wrongly(model, *args, **kwargs):
        fill(model, *args, **kwargs)
        model.lm_head.weight.mul_(-1)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "fill", fill_wrongly)
        with pytest.raises(RuntimeError, match="not the trained model"):
            export(recipe, out, 2)


@pytest.mark.parametrize("trouble", [full_on_one_rank, another_model])
def test_what_goes_wrong_leaves_no_folder(trouble, tmp_path):
    on_ranks(2, tmp_path, trouble, recipe_of(tmp_path, {}), tmp_path / "two")
    assert not [path for path in tmp_path.iterdir() if "two" in path.name]


def grows_little(recipe: dict, out) -> None:
    """In bfloat16: a file in float32 and cast, and this rank's half of what is read back."""
    resolved = resolve(recipe)
    wanted, tokenizer = resolved.recipe, planned_tokenizer(resolved.recipe)
    rank = torch.distributed.get_rank()
    world = World(rank, rank, 2, 2, torch.device("cpu"))
    root = build_root(wanted, tokenizer, world)
    with pytest.MonkeyPatch.context() as patched, grown() as peak:
        patched.setattr(shards, "FILE", 20_000_000)
        weights = shards.Shards(root, wanted, world)
        rest = {"resolved_yaml": "", "results": {}, "provenance": {"base": {}}}
        export_folder(weights, tokenizer, out, recipe=wanted, **rest)
    size = sum(p.numel() for p in root.student.parameters()) * 4
    assert 0.2 * size < peak[0] < 0.6 * size, peak[0] / size


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_rank_holds_the_whole_model(tmp_path, monkeypatch):
    for name, value in GIVEN_BACK.items():  # glibc would keep what is freed
        monkeypatch.setenv(name, value)
    recipe = large_recipe(tmp_path)
    recipe["export"] = {"dtype": "bfloat16"}
    on_ranks(2, tmp_path, grows_little, recipe, tmp_path / "two")


ADAPTERS = LORA | {"targets": ["up_proj", "down_proj"]}
CONVERSIONS = (
    [{"name": "mask_token", "token": "<|new|>"}],
    [{"name": "lawcat", "layers": [0]}, {"name": "mamba2", "layers": [1]}],
    [LATENT | {"layers": [1]}],
    [{"name": "xecomla", "kv_budget": 0.4, "q_rank": 16}],
    [{"name": "xecomla", "kv_rank": 8, "rope": "last"}],
    [LATENT | {"layers": [0]}, {"name": "mamba2", "layers": [1]}],
)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("conversions", CONVERSIONS)
def test_the_config_of_every_student_says_what_it_is_made_of(conversions, lora, tmp_path):
    """Or a run would train and have no export."""
    recipe = recipe_of(tmp_path, {"conversions": conversions} | ({"lora": ADAPTERS} if lora else {}))
    wanted = resolve(recipe).recipe
    student = build_student(wanted, planned_tokenizer(wanted))
    assert sum("lora_A" in n for n, _ in student.named_parameters()) == 4 * lora
    skeleton = shards._skeleton(student, wanted)
    assert not any(isinstance(p, torch.Tensor) and not p.is_meta for p in skeleton.parameters())
    assert {n for n, _ in skeleton.named_parameters()} == {n for n, _ in student.named_parameters()}
