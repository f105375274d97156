"""The plan of one stage on a cluster: what fits, what travels, how long it takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adapt.config.schema import Mesh, Recipe
from adapt.errors import Problem, UserError
from adapt.plan import arithmetic, traffic
from adapt.plan.arithmetic import Arithmetic
from adapt.plan.cluster import GIB, Cluster, Grid
from adapt.plan.memory import Moment, Setup, held_bytes, moments
from adapt.plan.model import PlannedModel
from adapt.plan.optimizer import OptimizerPlan, plan_optimizer
from adapt.plan.traffic import Sent
from adapt.plan.work import Work
from adapt.train.mixing import total_steps


def grid_of(mesh: Mesh, gpus: int) -> Grid:
    """Raises UserError where the numbers do not multiply to the GPUs there are."""
    shards = gpus // mesh.replicate if mesh.shard == "auto" else mesh.shard
    if shards < 1 or shards * mesh.replicate != gpus:
        what = f"shard={mesh.shard} x replicate={mesh.replicate} does not make {gpus} GPUs; give numbers whose product it is"
        raise UserError(Problem("trainer.mesh", what))
    return Grid(shards, mesh.replicate)


@dataclass(frozen=True)
class StagePlan:
    name: str
    recipe: Recipe
    cluster: Cluster
    student: PlannedModel
    teacher: PlannedModel | None

    @cached_property
    def grid(self) -> Grid:
        return grid_of(self.recipe.trainer.mesh, self.cluster.gpus)

    @cached_property
    def setup(self) -> Setup:
        compute = 4 if self.recipe.trainer.precision == "fp32" else 2  # `auto` is bf16 on every GPU here
        trainer = self.recipe.trainer
        return Setup(self.grid, compute, "cuda", trainer.activation_checkpointing, trainer.mesh.offload)

    @cached_property
    def work(self) -> Work:
        return Work.of(self.recipe)

    @cached_property
    def optimizer(self) -> OptimizerPlan:
        return plan_optimizer(self.recipe, self.student, self.grid, 2)

    @cached_property
    def models(self) -> tuple[PlannedModel, ...]:
        return (self.student,) if self.teacher is None else (self.student, self.teacher)

    @property
    def rows_a_step(self) -> int:
        """Of all ranks; every rank has as many."""
        rows = self.recipe.trainer.batch_tokens // self.recipe.data.seq_len
        least = self.grid.ranks * self.work.unit
        return max(1, round(rows / least)) * least

    @property
    def rows_a_rank(self) -> int:
        return self.rows_a_step // self.grid.ranks

    @property
    def tokens_a_step(self) -> int:
        return self.rows_a_step * self.recipe.data.seq_len

    def moments(self, rows: int) -> list[Moment]:
        return moments(
            self.student, self.teacher, self.work, self.optimizer, self.setup, rows, accumulated=rows < self.rows_a_rank
        )

    def worst(self, rows: int) -> Moment:
        return max(self.moments(rows), key=lambda moment: moment.total)

    @property
    def room(self) -> float:
        """Bytes."""
        return (self.cluster.memory - self.cluster.reserve) * GIB

    @cached_property
    def largest(self) -> int:
        """Rows of the largest microbatch that fits; 0: not even one (of preference pairs: one pair)."""
        unit = self.work.unit
        low, high = 0, self.rows_a_rank // unit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.worst(middle * unit).total <= self.room else (low, middle - 1)
        return low * unit

    @cached_property
    def rows(self) -> int:
        """Of the microbatch that is planned: the recipe's, or the largest that fits."""
        wanted = self.recipe.trainer.microbatch
        return min(self.rows_a_rank, max(self.work.unit, self.largest) if wanted == "auto" else wanted)

    @property
    def fits(self) -> bool:
        return self.worst(self.rows).total <= self.room

    @property
    def microbatches(self) -> int:
        return -(-self.rows_a_rank // self.rows)

    @cached_property
    def sent(self) -> list[Sent]:
        """Of one microbatch."""
        return traffic.microbatch(self.models, self.grid, self.setup.compute)

    @cached_property
    def arithmetic(self) -> Arithmetic:
        return arithmetic.of_row(self.student, self.teacher, self.work, self.setup)

    @property
    def rate(self) -> float:
        """Operations a second of one GPU."""
        kind = self.cluster.kind
        return (kind.flops if self.setup.compute == 2 else kind.flops_fp32) * self.cluster.efficiency

    @property
    def compute_seconds(self) -> float:
        """Of a step."""
        return self.rows_a_rank * self.arithmetic.total / self.rate

    @property
    def traffic_seconds(self) -> float:
        """Of a step, if nothing were computed meanwhile."""
        return self.microbatches * traffic.seconds(self.sent, self.grid, self.cluster)

    @property
    def host_bytes(self) -> float:
        """Of a rank in its host's memory: what `trainer.mesh.offload` puts there. (A microbatch's activations: kept_away.)"""
        if not self.setup.offload:
            return 0.0
        return sum(held_bytes(self.student, self.teacher, self.optimizer, self.setup).values())

    @property
    def kept_away(self) -> float:
        """Bytes of layers' inputs that a microbatch keeps in the host's memory."""
        if self.setup.checkpointing != "offload":
            return 0.0
        return self.setup.compute * self.student.dims.D * len(self.student.backward) * self.rows * self.work.read

    @property
    def host_seconds(self) -> float:
        """Of a step: weights to the GPU, gradients from it, layers' inputs both ways."""
        moved = 2 * self.kept_away
        if self.setup.offload:
            for model in self.models:
                often = traffic.gathers(model)
                for group in model.groups:
                    moved += often[group.layer] * sum(
                        traffic.local([w], self.grid) * model.bytes_each(w) for w in group.weights
                    )
                    moved += traffic.REDUCED * traffic.local(model.learning(group), self.grid)
        return self.microbatches * moved / (self.cluster.kind.host * self.cluster.network)

    @property
    def optimizer_seconds(self) -> float:
        """Exchanges and Newton-Schulz; a rank's shards and their state read and written once, its gradients read twice (the
        norm, the step) and set to zero. With `offload` that is in the host's memory, and not in the plan."""
        exchange = self.optimizer.sent / (self.cluster.rate(self.grid, "shard") / max(1, self.in_node))
        held = held_bytes(self.student, None, self.optimizer, self.setup)
        learned = sum(
            traffic.local([w], self.grid) * self.student.bytes_each(w)
            for group in self.student.groups
            for w in self.student.learning(group)
        )
        moved = 0.0 if self.setup.offload else 2 * (learned + held["optimizer"]) + 3 * held["gradients"]
        return self.optimizer.flops / self.grid.ranks / self.rate + exchange + moved / self.cluster.kind.memory

    @property
    def in_node(self) -> int:
        """Ranks that share a ring's way out of a node; an all-to-all has its own card only."""
        return 1 if self.grid.shards <= self.cluster.per_node else min(self.grid.shards, self.cluster.per_node)

    @property
    def step_seconds(self) -> float:
        """Collectives and what shards send to the host and back run beside the arithmetic, and the longest counts;
        the optimizer comes after."""
        return max(self.compute_seconds, self.traffic_seconds, self.host_seconds) + self.optimizer_seconds

    @property
    def steps(self) -> int:
        return total_steps(self.recipe)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_a_step / self.step_seconds

    @property
    def days(self) -> float:
        return self.steps * self.step_seconds / 86400

    def changed(self, cluster: Cluster | None = None, **trainer: Any) -> StagePlan:
        """The same stage with other trainer keys, or on another cluster."""
        recipe = dataclasses.replace(self.recipe, trainer=dataclasses.replace(self.recipe.trainer, **trainer))
        return dataclasses.replace(self, recipe=recipe, cluster=cluster or self.cluster)
