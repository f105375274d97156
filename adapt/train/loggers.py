"""Where a run's numbers go: metrics.jsonl and log.txt always, TensorBoard and W&B through Lightning's own loggers."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from adapt.config.schema import Recipe
from adapt.errors import Problem, UserError
from adapt.runfolder import ENVIRONMENT, LOG, METRICS


def build_loggers(recipe: Recipe, path: Path, step: int = 0) -> list[Logger]:
    """The loggers of the run in folder `path`. Lines after `step` are dropped: a resumed run writes them again."""
    path = Path(path)
    fresh = step == 0 and not any((path / "checkpoints").glob("step-*"))
    jsonl = JsonlLogger(path / METRICS)
    jsonl.rewind(-1 if fresh else step)
    loggers: list[Logger] = [jsonl, TextLogger(path / LOG)]
    if recipe.logging.tensorboard:
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(save_dir=str(path), name="", version="tensorboard"))
    if recipe.logging.wandb is not None:
        loggers.append(_wandb(recipe, path))
    return loggers


def _wandb(recipe: Recipe, path: Path) -> Logger:
    if find_spec("wandb") is None:
        raise UserError(
            Problem("logging.wandb", "needs the wandb package: pip install 'adapt-lm[loggers]', or logging.wandb=null")
        )
    from lightning.pytorch.loggers import WandbLogger

    try:
        run_id = json.loads((path / ENVIRONMENT).read_text())["id"]
    except (OSError, ValueError, KeyError):
        run_id = None
    return WandbLogger(
        project=recipe.logging.wandb, name=recipe.run.name, id=run_id, resume="allow", save_dir=str(path)
    )


class JsonlLogger(Logger):
    """One JSON object per call, on disk when the call returns. Numbers that are not finite become null."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = Path(path)
        self._failed = False

    name = "jsonl"
    version = 0

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The resolved recipe lies beside the metrics already."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values = {k: plain(v) for k, v in metrics.items() if k != "epoch"}
        line = {"step": step if step is not None else values.pop("step", None)} | values
        line.setdefault("time", time.time())
        self._append(json.dumps(line, allow_nan=False))

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Forget what was logged after `step` (and a line that was cut in the middle)."""
        if not self.path.exists():
            return
        kept = [
            line for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if _upto(line, step)
        ]
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, self.path)

    def _append(self, line: str) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:  # a full disk must not end a run before its checkpoint does
            if not self._failed:
                warnings.warn(f"{self.path} cannot be written ({error.strerror}); its lines are lost", stacklevel=2)
            self._failed = True


class TextLogger(JsonlLogger):
    """The same as lines of a lab notebook, in log.txt."""

    name = "text"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        from adapt.train.progress import notebook_line

        values = {k: plain(v) for k, v in metrics.items()}
        if "loss" in values:
            self._append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {notebook_line(step, None, values)}")


def plain(value: Any) -> Any:
    """Tensors and numpy scalars -> numbers JSON has."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _upto(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False
