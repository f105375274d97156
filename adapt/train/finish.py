"""What the user came for, after the last stage: the best weights, samples, export, report. Everything was saved before, and
a resumed run makes it again."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from adapt.config.schema import Recipe
from adapt.distributed import checkpoint
from adapt.distributed import world as worlds
from adapt.train import interpolate
from adapt.train.build import facts_of, whole_student
from adapt.train.deliver import decoding_fields, export, print_table, show_end
from adapt.train.root import look

if TYPE_CHECKING:
    from adapt.train.fit import _Run


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
    model = whole_student(recipe, run.tokenizer, run.root, run.world, run.state.decided)
    # The export comes first: a prompt that cannot be decoded must not cost it.
    worlds.on_main(
        run.world,
        lambda: export(folder, run.resolved, model, run.tokenizer, results, fields, folder.export),
    )
    samples = _samples(run, recipe)
    if run.world.main:
        folder.write_json("samples.json", samples)
        for logger in run.loggers:
            logger.finalize("success")
        show_end(folder, run.state, samples)
    run.world.wait()


def _take_best(run: _Run, recipe: Recipe, objective) -> None:
    """Export the best checkpoint, and say of it what was measured of it."""
    path = run.folder.checkpoints / f"step-{run.state.best_step}"
    if run.state.best_step != run.state.step and path.is_dir():
        checkpoint.load(path, run.root, None)
        run.say(f"exporting the best checkpoint, {path.name}: {recipe.evaluation.best} {run.state.best:.4g}")
        run.root.eval()
        run.state.results["after"] = run.measure(recipe, objective)


def _interpolate(run: _Run, recipe: Recipe, objective) -> dict[str, Any]:
    """The sweep over alpha; the model and the run's results become those of the alpha taken."""
    state = run.state
    of = state.best_step if recipe.evaluation.best and state.best_step is not None else state.step
    run.root.eval()
    measure = partial(run.measure, recipe, objective) if recipe.evaluation.suites else dict
    wanted, folder = recipe.export.interpolation, run.folder
    known = {alpha: state.results[end] for alpha, end in ((0.0, "before"), (1.0, "after")) if end in state.results}
    if len({frozenset(found) for found in known.values()}) > 1:  # resumed with other suites
        known.pop(0.0)
    found = interpolate.sweep(run.root, folder.checkpoints, f"step-{of}", wanted, measure, known, run.world)
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

            def decode(models, prompt=prompt, choice=choice):
                return sample(models.student, run.tokenizer, prompt, choice, recipe.generation.max_new_tokens)

            found.append(look(run.root, decode))
    return found
