"""EleutherAI's lm-evaluation-harness on our models: `adapt evaluate MODEL --lm-eval arc_easy,my_task`.

    lm_eval/<task>/<metric>   as the harness reports it; `<metric>,<filter>` where a task has filters of its own

It gets the loaded model and tokenizer as they are, and tokenises without a chat template.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adapt.errors import UserError, nearest

BATCH = 8
"""Sequences of a forward."""
RESAMPLES = 1000
"""Bootstrap draws for the standard errors of metrics that have no formula for them."""


def task_manager(tasks: Iterable[str], include: str | None) -> tuple[Any, list[str]]:
    """The harness's index of tasks, and the names asked for (patterns `mmlu_*` resolved). Raises UserError where the
    library or a task is missing; nothing is downloaded."""
    if find_spec("lm_eval") is None:
        raise UserError("--lm-eval needs the lm-evaluation-harness: pip install 'adapt-lm[eval]'")
    if include is not None and not Path(include).is_dir():
        raise UserError(f"--lm-eval-include {include}: there is no such folder; it holds YAML files of tasks")
    wanted = list(dict.fromkeys(name.strip() for name in tasks if name.strip()))
    if not wanted:
        raise UserError("--lm-eval names no task; e.g. --lm-eval arc_easy,hellaswag")
    if include is not None:  # the harness's own tasks are thousands of files: not read where nothing needs them
        manager = index_of(include, defaults=False)
        if all(name in manager.all_subtasks for name in wanted):
            return manager, wanted
    manager = index_of(include, defaults=True)
    found = {name: manager.match_tasks([name]) for name in wanted}
    unknown = [name for name, matches in found.items() if not matches]
    if unknown:
        known = manager.all_tasks
        letters = [f"the harness has no task {name!r}.{nearest(name, known)}" for name in unknown]
        raise UserError(
            " ".join(letters) + f" It knows {len(known):,d} (lm-eval ls tasks); --lm-eval-include DIR adds your own"
        )
    return manager, list(dict.fromkeys(task for matches in found.values() for task in matches))


@cache
def index_of(include: str | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include, include_defaults=defaults)


def measure(
    model: Any, tokenizer: Any, manager: Any, tasks: list[str], limit: int | None, seed: int
) -> dict[str, float]:
    """`limit`: documents per task. Raises UserError for models that do not read from left to right, and where a task's
    data cannot be had."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from adapt.generation.contract import Contract

    seen = Contract.of(model.config).context_mask
    if seen != "causal":
        raise UserError(
            f"--lm-eval scores texts from left to right, and this model's context is not causal (context_mask: {seen}): "
            f"the figures would mean nothing; measure it with the suites elbo and masked_ce"
        )
    try:
        manager.load(tasks)
    except Exception as error:  # datasets, fsspec, HTTP and YAML errors share no base class
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--lm-eval {','.join(tasks)}: a task cannot be loaded: {first}") from error
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    found = simple_evaluate(
        wrapped,
        tasks=tasks,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=RESAMPLES,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return metrics_of(found["results"])


def metrics_of(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The harness's `{task: {"acc,none": value}}` by our names."""
    return {
        f"lm_eval/{task}/{key.removesuffix(',none')}": float(value)
        for task, values in results.items()
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key
    }
