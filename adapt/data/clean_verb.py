"""`adapt data clean -c RECIPE --to DIR`: the cleaning steps of a recipe's training sets on datatrove, here or on SLURM.

What it writes, `DIR/<dataset>/*.jsonl.gz`, is a source like any other (`path:DIR/<dataset>`). An interrupted run goes on
with the tasks that were not finished.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adapt.errors import Problem, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("clean")
    group.add_argument("--to", type=Path, metavar="DIR", help="folder to write into")
    group.add_argument("--executor", choices=["local", "slurm"], default="local", help="where the tasks run")
    group.add_argument("--tasks", type=int, default=1, metavar="N", help="parts that each dataset is worked on in")
    group.add_argument("--workers", type=int, default=-1, metavar="N", help="tasks at a time (default: all)")
    group = parser.add_argument_group("clean --executor slurm")
    group.add_argument("--partition", metavar="NAME", help="partition of the jobs")
    group.add_argument("--time", metavar="HH:MM:SS", help="time limit of a task")
    group.add_argument("--cpus-per-task", type=int, default=1, metavar="N", help="default: 1")
    group.add_argument("--mem-per-cpu", type=int, default=2, metavar="GB", help="default: 2")
    group.add_argument("--qos", default="", metavar="NAME", help="quality of service")
    group.add_argument("--venv", metavar="FILE", help="`activate` script sourced on the nodes (default: this one's)")
    group.add_argument("--depends", metavar="JOBID", help="start once this job has ended well")
    group.add_argument(
        "--run-on-dependency-fail", action="store_true", help="start also when the job of --depends failed"
    )
    group.add_argument(
        "--sbatch", action="append", default=[], metavar="KEY=VALUE", help="further line of the batch script"
    )


def refuse_options(args: argparse.Namespace) -> None:
    """For the other verbs: an option of `clean` given there would do nothing."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([]))
    given = [name for name, value in defaults.items() if getattr(args, name, value) != value]
    if given:
        raise UserError(
            [
                Problem(f"--{n.replace('_', '-')}", f"is for `adapt data clean`; {args.what} has no such option")
                for n in given
            ]
        )


def clean(resolved: Any, args: argparse.Namespace) -> int:
    problems = list(_problems(args))
    if problems:
        raise UserError(problems)
    from adapt.data import scale
    from adapt.data.prepare import open_sources

    recipe = resolved.recipe
    _, training = open_sources(recipe.data)
    labels = [dataset.name or source.label for _, dataset, source in training]
    if twice := sorted({x for x in labels if labels.count(x) > 1}):
        raise UserError(Problem("data.train", f"two entries are called {twice[0]!r}; give each a `name` of its own"))
    for label, (where, dataset, source) in zip(labels, training, strict=True):
        task = scale.Task.of(label, dataset, source, recipe.data.max_bad_lines)
        if task.left_out:
            print(f"{label}: not run here, because they look at all documents in order: {', '.join(task.left_out)}")
        if not task.steps:
            print(f"{label}: has no other cleaning step ({where.removesuffix('.source')}.clean); its texts are copied")
        _same_task(args.to, label, task)
        executor = scale.executor(task, args)
        executor.run()
        print(f"{label}: {'submitted, ' if args.executor == 'slurm' else ''}{args.to / label}")
    return 0


def _problems(args: argparse.Namespace):
    if find_spec("datatrove") is None:
        yield Problem("adapt data clean", "needs datatrove: pip install 'adapt-lm[scale]'")
    if args.to is None:
        yield Problem("--to", "say which folder to write into")
    if args.tasks < 1:
        yield Problem("--tasks", f"{args.tasks} must be 1 or more")
    if args.workers == 0 or args.workers < -1:
        yield Problem("--workers", f"{args.workers} must be 1 or more")
    if args.executor == "slurm":
        for name in ("partition", "time"):
            if getattr(args, name) is None:
                yield Problem(f"--{name}", "a SLURM job needs it")
    for item in args.sbatch:
        if "=" not in item:
            yield Problem("--sbatch", f"{item!r} should be KEY=VALUE, such as account=lab")


def _same_task(folder: Path, label: str, task: Any) -> None:
    """Finished tasks are not run again, so they must be of the same sources and steps."""
    facts = json.dumps(task.facts(), indent=1, sort_keys=True) + "\n"
    file = folder / f"{label}.json"
    try:
        if file.is_file() and file.read_text() != facts:
            raise UserError(f"{file}: the folder has texts of another source or of other steps; choose another --to")
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(facts)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
