"""The Lightning side of a stage: a thin adapter without formulas. The step is step.py's."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import repeat
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn

from adapt.config.schema import Recipe
from adapt.data.stream import TrainStream
from adapt.distributed.world import World
from adapt.errors import UserError
from adapt.objectives.base import Objective
from adapt.optim.exchange import traffic
from adapt.optim.following import Following
from adapt.optim.state_bytes import state_bytes
from adapt.train.frozen_rows import FrozenRows
from adapt.train.probe import out_of_memory
from adapt.train.signals import StopFlag
from adapt.train.spikes import remember, spike
from adapt.train.state import State
from adapt.train.step import StepResult, gradients, loss_values, not_finite


class Stage(L.LightningModule):
    """Trains one stage from `state.stage_step` to `total_steps`, or until it is asked to stop."""

    automatic_optimization = False

    def __init__(
        self,
        *,
        root: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        frozen: FrozenRows,
        following: Following,
        stream: TrainStream,
        recipe: Recipe,
        state: State,
        world: World,
        microbatch: int,
        total_steps: int,
        flag: StopFlag,
        hooks: Any,
    ):
        super().__init__()
        self.__dict__["root"] = root  # not a submodule: Lightning moves its modules to the CPU when a fit ends, and a
        # sharded module that moves gets new parameters, which its optimizer does not know
        self.objective, self.stream, self.recipe, self.state, self.world = (
            objective,
            stream,
            recipe,
            state,
            world,
        )
        self.microbatch, self.total_steps, self.flag, self.hooks = microbatch, total_steps, flag, hooks
        self.following, self.ready_optimizer, self.frozen = following, optimizer, frozen
        self.rows_per_step = recipe.trainer.batch_tokens // recipe.data.seq_len
        self.since, self.sent = (time.perf_counter(), state.tokens), traffic.total()
        self.measured = state.stage_step > 0  # a run that goes on has told it

    def configure_model(self) -> None:
        """The root arrives built and sharded: evaluation and export need it outside of a fit, too."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.ready_optimizer

    def train_dataloader(self) -> Iterable[int]:
        """Steps find their rows themselves; how many there are is decided in training_step (a rewind adds some)."""
        return repeat(0)

    def on_train_start(self) -> None:
        self.flag.install()

    def training_step(self, _: int, index: int) -> None:
        state, started = self.state, time.perf_counter()
        step = state.stage_step
        self.world.at("step", state.step)
        optimizer = self.optimizers()
        hyper = self.following.set(step, self.total_steps)
        batch = self.stream.step_batch(step + state.skipped, self.rows_per_step, self.world.rank, self.world.size)
        result = gradients(
            self.root,
            self.objective,
            batch,
            microbatch=self.microbatch,
            seed=self.recipe.run.seed,
            step=step,
            world=self.world,
            clip=self.recipe.trainer.clip,
            backward=self.manual_backward,
            clear=self.frozen.clear,
            stop=self.hooks.wants_stop(),
            save=self.hooks.wants_save(),
        )
        rewound = False
        if wrong := self._wrong(result):
            rewound = self.hooks.bad_update(wrong)
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not rewound:
            state.stage_step, state.step = step + 1, state.step + 1
            state.tokens += self.rows_per_step * self.recipe.data.seq_len
        state.seconds += time.perf_counter() - started
        if not wrong and not self.measured:
            self._tell_memory()
        if (state.step % self.recipe.logging.every == 0 or state.stage_step == self.total_steps) and not rewound:
            self._log(result, hyper)
        if not rewound:
            self.hooks.after_step(self, save=result.save)
        if result.stop or state.stage_step >= self.total_steps:
            self.trainer.should_stop = True

    def _wrong(self, result: StepResult) -> str:
        """What forbids this update, in words; the same on all ranks."""
        if not result.finite:
            return not_finite(result)
        if (above := self.recipe.trainer.spike) is None:
            return ""
        norm = float(result.grad_norm)  # the device has been waited for: `finite` came from it
        wrong = spike(norm, self.state.norms, above)
        if not wrong:
            remember(norm, self.state.norms)
        return wrong

    def _tell_memory(self) -> None:
        """Once, when the first update has made the optimizer's state. Collective."""
        self.measured = True
        (total,) = self.world.sum([state_bytes(self.ready_optimizer)])
        self.hooks.fact({"stage": self.state.stage, "optimizer_state_bytes": total})

    def _log(self, result: Any, hyper: dict[str, float]) -> None:
        now, (then, tokens) = time.perf_counter(), self.since
        self.since = (now, self.state.tokens)
        steps, sent = max(1, (self.state.tokens - tokens) // self.recipe.trainer.batch_tokens), traffic.total()
        moved, self.sent = {"optimizer_mb_sent": (sent - self.sent) / steps / 1e6} if traffic else {}, sent
        values = {
            "stage": self.state.stage,
            "tokens": self.state.tokens,
            "seconds": self.state.seconds,
            **loss_values(result),
            **hyper,
            "grad_norm": float(result.grad_norm),
            "tokens_per_s": (self.state.tokens - tokens) / max(1e-9, now - then),
            **result.info,
            **moved,
            "time": time.time(),
        }
        self.hooks.log(values)


def train(module: Stage) -> None:
    """One Lightning fit. Raises UserError where the memory does not suffice."""
    trainer = L.Trainer(
        **_lightning_world(module.world),
        max_epochs=1,
        max_steps=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        plugins=[],
    )
    try:
        trainer.fit(module)
    except torch.OutOfMemoryError:
        raise UserError(out_of_memory(module.microbatch, module.recipe.data.seq_len)) from None


def _lightning_world(world: World) -> dict[str, Any]:
    """The processes exist already (world.py), so Lightning finds them as it finds torchrun's."""
    kind = "gpu" if world.device.type == "cuda" else "cpu"
    if not world.grouped:
        return {"accelerator": kind, "devices": 1}
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=world.size, tensor_parallel_size=1)
    strategy.cluster_environment = TorchElasticEnvironment()
    return {
        "accelerator": kind,
        "devices": world.local_size,
        "num_nodes": world.size // world.local_size,
        "strategy": strategy,
    }
