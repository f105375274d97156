"""What the user came for, after the last stage: the best weights, samples, export, report. Everything was saved before,
so a signal ends it at once, and a resumed run makes it again."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from adapt.config.schema import Recipe
from adapt.distributed import checkpoint
from adapt.export.weights import Whole
from adapt.train import interpolate
from adapt.train.build import facts_of, whole_student
from adapt.train.deliver import decoding_fields, export, print_table, show_end
from adapt.train.measure import measure
from adapt.train.root import look
from adapt.train.shards import Shards
from adapt.train.signals import stop_point

if TYPE_CHECKING:
    from adapt.train.fit import _Run

WHERE = "after the last step; everything but the export is saved"


def finish(run: _Run, recipe: Recipe) -> None:
    run.facts = facts_of(recipe, run.root.student, run.tokenizer)
    run.teach(recipe)
    objective = recipe.objective.build(run.facts)
    fields = decoding_fields(recipe, objective)
    run.root.student.config.update(fields)  # what samplers need to know
    if recipe.evaluation.best and run.state.best_step is not None:
        _take_best(run, recipe, objective)
    results, folder = run.state.results, run.folder
    if recipe.export.interpolation is not None:
        results = results | _interpolate(run, recipe, objective)
    stop_point(run.flag, run.world, WHERE)
    # The export comes first: a prompt that cannot be decoded must not cost it.
    with run.flag.at_once(WHERE) if run.world.size == 1 else nullcontext():
        weights = (
            Shards(run.root, recipe, run.world, run.flag)
            if run.world.grouped
            else Whole(whole_student(recipe, run.root))
        )
        export(folder, run.resolved, weights, run.tokenizer, results, fields, folder.export)
    samples = _samples(run, recipe)
    if run.world.main:
        folder.write_json("samples.json", samples)
        for logger in run.loggers:
            logger.finalize("success")
        if folder.attempt is not None:
            folder.attempt.end(0, "done")  # before the report, which shows it
        show_end(folder, run.state, samples)
    run.world.wait()


def _take_best(run: _Run, recipe: Recipe, objective) -> None:
    """Export the best checkpoint, and say of it what was measured of it."""
    path = run.folder.checkpoints / f"step-{run.state.best_step}"
    if run.state.best_step != run.state.step and path.is_dir():
        checkpoint.load(path, run.root, None)
        run.say(f"exporting the best checkpoint, {path.name}: {recipe.evaluation.best} {run.state.best:.4g}")
        run.root.eval()
        run.state.results["after"] = measure(run, recipe, objective)


def _interpolate(run: _Run, recipe: Recipe, objective) -> dict[str, Any]:
    """The sweep over alpha; the model and the run's results become those of the alpha taken."""
    state = run.state
    of = state.best_step if recipe.evaluation.best and state.best_step is not None else state.step
    run.root.eval()
    measured = partial(measure, run, recipe, objective) if recipe.evaluation.suites else dict
    wanted, folder = recipe.export.interpolation, run.folder
    known = {alpha: state.results[end] for alpha, end in ((0.0, "before"), (1.0, "after")) if end in state.results}
    if len({frozenset(found) for found in known.values()}) > 1:  # resumed with other suites
        known.pop(0.0)
    found = interpolate.sweep(run.root, folder.checkpoints, f"step-{of}", wanted, measured, known, run.world)
    state.results["after"] = found.results
    if run.world.main:
        folder.write_json(interpolate.FILE, found.to_dict())
        print_table(interpolate.table(found))
    run.say(f"exporting {interpolate.describe(found.alpha, found.why)}")
    return {"after": found.results, "interpolation": found.to_dict()}


def _samples(run: _Run, recipe: Recipe) -> list[dict[str, Any]]:
    """Every prompt through every sampler, on all ranks alike (the model may be sharded)."""
    from adapt.train.samples import sample

    run.root.eval()
    run.root.student.config.use_cache = True
    found = []
    for prompt in recipe.generation.prompts:
        for choice in recipe.generation.samplers:
            stop_point(run.flag, run.world, WHERE)

            def decode(models, prompt=prompt, choice=choice):
                return sample(models.student, run.tokenizer, prompt, choice, recipe.generation.max_new_tokens)

            found.append(look(run.root, decode))
    return found
