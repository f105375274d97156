"""What the user came for: a run's model as a Hugging Face folder, and its samples on the terminal."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapt.config import Recipe, Resolved
from adapt.config.schema import Mesh
from adapt.console import printable
from adapt.distributed import checkpoint, healthy
from adapt.distributed import world as worlds
from adapt.distributed.world import World
from adapt.errors import Problem, UserError
from adapt.export.weights import Weights, Whole
from adapt.objectives.base import Objective
from adapt.runfolder import RunFolder
from adapt.train import interpolate
from adapt.train.build import build_root, facts_of, whole_student
from adapt.train.state import State


def decoding_fields(recipe: Recipe, objective: Objective) -> dict[str, Any]:
    """What an export says of its decoding: the objective's contract, with the threshold of the recipe's first sampler
    that has one."""
    fields = objective.export_fields()
    chosen = (getattr(sampler.config, "threshold", None) for sampler in recipe.generation.samplers)
    threshold = next((t for t in chosen if t is not None), None)
    return fields | {"threshold": threshold} if "threshold" in fields and threshold is not None else fields


def export(
    folder: RunFolder, resolved: Resolved, weights: Weights, tokenizer, results, fields: dict[str, Any], to: Path
) -> Path:
    """The Hugging Face folder of a finished run. Collective where the weights are on several ranks."""
    import json

    from adapt.export.folder import export_folder
    from adapt.pretrained import base_provenance

    manifest = folder.path / "data.json"
    data = json.loads(manifest.read_text()) if manifest.is_file() else {"train": [], "eval": {}}
    return export_folder(
        weights,
        tokenizer,
        to,
        recipe=resolved.recipe,
        resolved_yaml=resolved.to_yaml(),
        results=results,
        provenance={"base": base_provenance(resolved.recipe.model)},
        manifest=data,
        extra_config=fields,
        check=folder.guard,
    )


def export_run(run_dir: Path, to: Path, dtype: str | None = None) -> int:
    """`adapt export RUN --to DIR`: the newest checkpoint of a run as a Hugging Face folder. Under torchrun or srun the
    ranks share the model, whatever the run's own mesh was."""
    launched = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1
    world = worlds.start(1) if launched else World(0, 0, 1, 1, torch.device("cpu"))
    try:
        _export_run(world, Path(run_dir), Path(to), dtype)
        world.wait()
    finally:
        worlds.stop()
    return 0


def _export_run(world: World, run_dir: Path, to: Path, dtype: str | None) -> None:
    from adapt.pretrained import load_tokenizer
    from adapt.train.shards import Shards

    folder = RunFolder.open(run_dir)
    resolved = folder.resolved()
    saved = _newest(folder, world.main)
    recipe = resolved.stages[-1]
    recipe = replace(recipe, trainer=replace(recipe.trainer, mesh=Mesh()))
    if dtype is not None:
        recipe = replace(recipe, export=replace(recipe.export, dtype=dtype))
        resolved = Resolved((recipe,), resolved.names[-1:], resolved.plain)
    tokenizer = load_tokenizer(recipe)
    state = State.from_dict(checkpoint.read_state(saved))
    root = build_root(recipe, tokenizer, world, state.decided)
    facts = facts_of(recipe, root.student, tokenizer)
    checkpoint.load(saved, root, None, verify=False)
    results, said = dict(state.results), []
    found = read_sweep(folder)
    if done := interpolate.redo(folder, recipe.export.interpolation, saved, found, root):
        said.append(f"exporting {done}")
        if found.get("of") == saved.name:
            results |= {"interpolation": found, "after": interpolate.taken(found)}
    weights = Shards(root.eval(), recipe, world) if world.grouped else Whole(whole_student(recipe, root))
    fields = decoding_fields(recipe, recipe.objective.build(facts))
    said.append(str(export(folder, resolved, weights, tokenizer, results, fields, to)))
    if world.main:
        print(printable("\n".join(said)))


def reshard_run(run_dir: Path, to: Path, ranks: int, dtype: str | None) -> int:
    """`adapt export RUN --to DIR --reshard RANKS`: the newest checkpoint as DIR/step-N, for another number of ranks."""
    from adapt.distributed.reshard import reshard

    problems = []
    if ranks < 1:
        problems.append(Problem("--reshard", f"{ranks} must be 1 or more: the ranks that share the weights"))
    if dtype is not None:
        problems.append(Problem("--dtype", f"{dtype}: a checkpoint to go on from keeps its dtypes; leave it out"))
    if problems:
        raise UserError(problems)
    folder = RunFolder.open(Path(run_dir))
    path = reshard(_newest(folder), Path(to), ranks)
    print(path)
    print(f"To go on from it, put it in the place of the one in {folder.checkpoints} and --resume.")
    return 0


def _newest(folder: RunFolder, main: bool = True) -> Path:
    """The newest checkpoint that is whole. Collective."""
    saved, damaged = healthy.newest(folder.checkpoints)
    if not saved:
        raise UserError(f"{folder.path} has no checkpoint to export; finish the run with `adapt fit ... --resume`")
    for path, wrong in damaged.items() if main else ():
        print(f"warning: checkpoint {path.name} is damaged ({wrong}); exporting {saved.name} instead")
    return saved


def read_sweep(folder: RunFolder) -> dict[str, Any]:
    """What the run's sweep over alpha found; {} where there was none."""
    import json

    try:
        return json.loads((folder.path / interpolate.FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def print_table(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


def show_end(folder: RunFolder, state: State, samples: list[dict[str, Any]]) -> None:
    """What was measured, what the model writes, and where everything is."""
    from rich.console import Console

    from adapt.evaluate.runner import results_table
    from adapt.report import build
    from adapt.train.progress import duration

    console = Console()
    if state.results.get("after"):
        console.print(results_table(state.results.get("before", {}), state.results["after"]))
    show_samples(console, samples)
    report = build(folder.path, [], None)
    console.print(f"trained {state.step} steps in {duration(state.seconds)}")
    console.print(printable(f"report:         {report}"), soft_wrap=True, markup=False)
    console.print(printable(f"exported model: {folder.export}"), soft_wrap=True, markup=False)


def show_samples(console, samples: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.panel import Panel

    for item in samples:
        title = f"{item['sampler']} · {item['tokens_per_forward']:.2f} tokens per forward"
        prompt, text = (escape(printable(item[key])) for key in ("prompt", "text"))  # the model may write anything
        console.print(Panel(f"[bold]{prompt}[/bold]{text}", title=escape(title)))
