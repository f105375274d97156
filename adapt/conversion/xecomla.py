"""X-EcoMLA (arXiv 2503.11132): the attention of a pretrained model becomes multi-head latent attention, whose cache holds
one latent and one RoPE key per token for all heads. The start is an SVD of the teacher's own weights; distillation does
the rest.

Where the student is what transformers' `DeepseekV3ForCausalLM` is (every layer converted, the latent normalised, no
biases, one rank), it is one, all layers dense, and its exports need no code of ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from adapt.components import conversions
from adapt.config.schema import Recipe
from adapt.conversion import latent_config
from adapt.conversion.latent_ranks import evenly, latent_room
from adapt.conversion.latent_shape import MULTIPLE, TeacherShape, full_q_rank, most_kv_rank, rank_for
from adapt.conversion.layer_map import chosen_layers
from adapt.errors import Problem, UserError


@dataclass(frozen=True, kw_only=True)
class XEcomlaConfig:
    layers: str | tuple[int, ...] = "all"
    """Layers to convert: `all`, a list of ids from 0, or `every_N` (0, N, 2N, ...); the others stay as they are."""
    kv_cache: float | None = None
    """Size of a converted layer's cache over the teacher's, at most. null: 0.5, unless one of the next three says how
    large the latents are."""
    kv_budget: float | None = None
    """Size of the whole model's cache over the teacher's, at most; layers that stay count whole. Layers share it out: each
    8 of rank go where they keep most of the energy of the singular values (with `svd: covariance`, of the outputs)."""
    kv_rank: int | None = None
    """Size of the latent of a token and layer; a multiple of 8."""
    kv_energy: float | None = None
    """Each layer gets the smallest rank that keeps this share of its singular values' energy, rounded up to a multiple
    of 8."""
    q_rank: int | None = None
    """Rank of the queries while they train; a multiple of 8. null: one dense projection, which is what exports to the
    stock class hold in any case."""
    rope_dim: int | None = None
    """Dimensions of a head that carry positions, and size of the key that all heads share. null: half of a head."""
    nope_dim: int | None = None
    """Dimensions of a head without positions. null: the others. More than those only with `rope: last`."""
    rope: Literal["high", "stride", "last"] = "high"
    """Which dimensions carry positions: those of the teacher's `high` frequencies, of every n-th (`stride`), or the
    `last` ones as they stand, as published, which for half-split RoPE keeps no frequency (the latent is then made for
    whole keys, as published too, though some of their dimensions are dropped)."""
    rope_scaling: Literal["base", "yarn"] = "base"
    """How positions beyond the base's first context are scaled: as the `base` does it, or by YaRN with the base's factor,
    as published (whatever the base's own scaling is; nothing compensates for YaRN's larger scores)."""
    yarn_context: int = 4096
    """Context that YaRN stretches. The authors' X-EcoMLA models have 4096, their later ones 8192, which is Llama 3's."""
    shared_key: Literal["mean", "pca"] = "pca"
    """How one key stands for those of all heads: their `mean` (as published), or per frequency the mixture that keeps
    the most of them (`pca`)."""
    svd: Literal["weight", "covariance"] = "covariance"
    """What the low ranks are best for: the weights (as published), or the layer's outputs on the training text
    (`covariance`)."""
    sigma: Literal["down", "up", "sqrt"] = "down"
    """Which factor carries the singular values: the same function, but not the same to the optimizer. The paper prints
    `up`; the authors' models were made with `down`."""
    latent_norm: Literal["ballast", "calibrated", "ones", "none"] = "ballast"
    """Stock classes normalise the latent, which harms tokens whose latent is far smaller or larger than the others' (the
    first of a row takes much attention by a small value). `ballast`: a channel with a large constant makes the norm the
    identity, by a bias, which vLLM's class lacks. `calibrated`: the identity on the mean token only. `ones`: not even
    that (for comparison). `none`: no norm, as published, which no stock class loads."""
    start: Literal["svd", "random"] = "svd"
    """`random`: the new matrices are drawn, for comparison; all else is the teacher's."""
    biases: Literal["keep", "drop"] = "keep"
    """Of a base whose projections have them (Qwen2). No stock class has a place for them; `drop` leaves them out, and
    distillation has to make up for it."""
    calibration_tokens: int = 4096
    """Training tokens that `covariance`, `ballast`, `calibrated` and bases with QK-norm are measured on."""

    @property
    def ballast(self) -> bool:
        """Whether a channel of the latent is a constant."""
        return self.latent_norm == "ballast" and self.start == "svd"

    @property
    def free_ranks(self) -> bool:
        """Whether each layer's rank follows from its weights."""
        return self.kv_energy is not None or self.kv_budget is not None

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        given = {k: v for k in ("kv_cache", "kv_budget", "kv_rank", "kv_energy") if (v := getattr(self, k)) is not None}
        if len(given) > 1:
            both = " and ".join(f"{k}={v}" for k, v in given.items())
            yield Problem("", f"xecomla: {both} all say how large the latent is; give one of them")
        for key in ("kv_cache", "kv_budget", "kv_energy"):
            share = getattr(self, key)
            if share is not None and not 0 < share <= 1:
                yield Problem("", f"xecomla: {key}={share} is a share: above 0, at most 1")
        for key in ("kv_rank", "q_rank"):
            rank = getattr(self, key)
            if rank is not None and (rank < MULTIPLE or rank % MULTIPLE):
                near = max(MULTIPLE, round(rank / MULTIPLE) * MULTIPLE)
                yield Problem("", f"xecomla: {key}={rank} must be a multiple of {MULTIPLE}; try {near}")
        if self.yarn_context < 1:
            yield Problem(
                "", f"xecomla: yarn_context={self.yarn_context} must be 1 or more tokens; 4096 is the authors'"
            )
        elif self.yarn_context != 4096 and self.rope_scaling != "yarn":
            what = f"xecomla: yarn_context={self.yarn_context} is for rope_scaling: yarn; leave it out, or set that"
            yield Problem("", what)
        if self.calibration_tokens < 1:
            yield Problem("", f"xecomla: calibration_tokens={self.calibration_tokens} must be 1 or more; 4096 is usual")
        if self.start == "random" and self.free_ranks:
            key = "kv_energy" if self.kv_energy is not None else "kv_budget"
            yield Problem("", f"xecomla: {key} is of singular values, and start=random takes none; give kv_rank")


class XEcomla:
    converts_layers = True
    reads_layers = True
    decided: dict[str, Any] | None = None

    def __init__(self, config: XEcomlaConfig, recipe: Recipe):
        self.config, self.recipe = config, recipe
        self.starts: Any = None
        """Of the layers, where `decide` had to look at all of them."""

    def plan(self, config, tokenizer):
        """The student's config: ranks, RoPE and all, from the shape alone. What each layer gets of a budget is known with
        the weights only: here all get the same, and of an energy all there is."""
        return latent_config.student_config(config, self.layout(config)), tokenizer

    def decide(self, model, tokenizer) -> dict[str, Any] | None:
        """`kv_ranks` of the converted layers."""
        if not self.config.free_ranks or model.device.type == "meta":
            return None
        from adapt.conversion.latent_student import free_ranks, starts_of

        layout = self.layout(model.config)
        self.starts = list(starts_of(model, layout, self.config, self.recipe))
        ranks = free_ranks([start.layer for _, start in self.starts], layout, self.config, model.config)
        layout = dataclasses.replace(layout, kv_ranks=tuple(ranks))
        return {"kv_ranks": ranks, "text": latent_config.told(model.config, layout, self.recipe.export.target)}

    def apply(self, model, tokenizer):
        from adapt.conversion.latent_student import build

        self.decided = self.decided or self.decide(model, tokenizer)
        layout, starts, self.starts = self.layout(model.config), self.starts, None
        if self.decided:
            layout = dataclasses.replace(layout, kv_ranks=tuple(self.decided["kv_ranks"]))
        return build(model, layout, self.config, self.recipe, starts)

    def layout(self, config) -> latent_config.Layout:
        """Raises UserError with every problem of the base, and of the wishes on it."""
        wish, teacher, problems = self.config, TeacherShape.of(config), []
        try:
            layers = chosen_layers(wish.layers, "none", config.num_hidden_layers)
        except UserError as error:
            layers, problems = (), list(error.problems)
        yarn = wish.yarn_context if wish.rope_scaling == "yarn" else None
        problems += latent_config.teacher_problems(config, layers, yarn=yarn is not None)
        rope_dim = teacher.head_dim // 2 if wish.rope_dim is None else wish.rope_dim
        nope_dim = teacher.head_dim - rope_dim if wish.nope_dim is None else wish.nope_dim
        problems += _dim_problems(rope_dim, nope_dim, wish.rope, teacher.head_dim)
        if wish.kv_budget is None:
            kv_rank, found = self._kv_rank(teacher, nope_dim, rope_dim)
            kv_ranks = (kv_rank,) * len(layers)
        else:
            kv_ranks, found = self._shared_out(teacher, nope_dim, rope_dim, len(layers), config.num_hidden_layers)
        problems += found
        if wish.q_rank is not None and wish.q_rank > (full := full_q_rank(teacher)):
            what = f"{wish.q_rank} is more than the full rank of this base's queries, {full}; leave it out"
            problems.append(Problem("q_rank", what))
        found = latent_config.Layout(
            layers=layers,
            kv_ranks=kv_ranks,
            q_rank=wish.q_rank,
            nope_dim=nope_dim,
            rope_dim=rope_dim,
            rope=latent_config.rope_of(config, wish.rope, rope_dim, yarn),
            kv_norm=wish.latent_norm != "none",
            biases=latent_config.has_biases(config) and wish.biases == "keep",
            ballast=wish.ballast,
            free_ranks=wish.free_ranks,
        )
        problems += latent_config.target_problems(config, found, self.recipe.export.target)
        if problems:
            raise UserError(problems)
        return found

    def _kv_rank(self, teacher: TeacherShape, nope_dim: int, rope_dim: int) -> tuple[int, list[Problem]]:
        wish = self.config
        full = self._most(teacher, nope_dim)
        if wish.kv_energy is not None:
            return full, []
        share = 0.5 if wish.kv_cache is None else wish.kv_cache
        rank = rank_for(share, teacher, rope_dim) if wish.kv_rank is None else wish.kv_rank
        key = "kv_cache" if wish.kv_rank is None else "kv_rank"
        if rank < MULTIPLE:
            least = math.ceil(1000 * (MULTIPLE + rope_dim) / teacher.cache) / 1000
            what = (
                f"{share} of the base's {teacher.cache} numbers per token and layer leaves no room for a latent beside the "
                f"RoPE key of {rope_dim}; {least} is the least here, or lower rope_dim"
            )
            return rank, [Problem(key, what)]
        if rank > full:
            what = f"a latent of {rank} is more than the full rank of this base's keys and values, {full}"
            most = full // MULTIPLE * MULTIPLE
            usable = f"use at most {most} (a share of {(most + rope_dim) / teacher.cache:.3f})"
            return rank, [Problem(key, f"{what}; {usable}")]
        return rank, []

    def _most(self, teacher: TeacherShape, nope_dim: int) -> int:
        """Full rank of what is decomposed: with `rope: last` whole keys, as published."""
        keys = teacher.head_dim if self.config.rope == "last" else nope_dim
        return most_kv_rank(teacher, keys, ballast=self.config.ballast)

    def _shared_out(
        self, teacher: TeacherShape, nope_dim: int, rope_dim: int, converted: int, layers: int
    ) -> tuple[tuple[int, ...], list[Problem]]:
        """Ranks of a budget as far as they are known without weights: all layers alike."""
        budget = self.config.kv_budget
        room = latent_room(budget, teacher, layers, converted, rope_dim)
        most = self._most(teacher, nope_dim) // MULTIPLE * MULTIPLE
        stay = (layers - converted) * teacher.cache
        least, usable = ((stay + converted * (rank + rope_dim)) / (layers * teacher.cache) for rank in (MULTIPLE, most))
        if converted and room < MULTIPLE * converted:
            what = f"{budget} of the base's cache leaves no room for a latent in each of {converted} converted layers beside "
            what += f"their RoPE keys of {rope_dim}" + (f" and {layers - converted} layers that stay" if stay else "")
            return (), [
                Problem("kv_budget", f"{what}; {math.ceil(1000 * least) / 1000} is the least here, or lower rope_dim")
            ]
        if room >= (most + MULTIPLE) * converted:
            what = f"{budget} is more than all layers need at the full rank of their keys and values, {most}"
            return (), [Problem("kv_budget", f"{what}; use at most {math.floor(1000 * usable) / 1000}")]
        return tuple(evenly(converted, room, most)), []


def _dim_problems(rope_dim: int, nope_dim: int, rope: str, head_dim: int) -> list[Problem]:
    if rope_dim < 2 or rope_dim % 2 or rope_dim > head_dim:
        what = f"{rope_dim} must be even and at most the head's {head_dim} dimensions; half of them is usual"
        return [Problem("rope_dim", what)]
    if rope == "stride" and head_dim % rope_dim:
        what = f"{rope_dim} does not divide the head's {head_dim} dimensions, so no stride picks its frequencies"
        return [Problem("rope_dim", f"{what}; use {head_dim // 2}, or rope: high")]
    if rope != "last" and nope_dim != head_dim - rope_dim:
        what = f"{nope_dim} is not what rope_dim={rope_dim} leaves of the head's {head_dim} dimensions; leave it out"
        return [Problem("nope_dim", what)]
    if not 0 <= nope_dim <= head_dim:
        return [Problem("nope_dim", f"{nope_dim} must be from 0 to the head's {head_dim} dimensions")]
    return []


@conversions.register("xecomla")
def xecomla(config: XEcomlaConfig, recipe: Recipe) -> XEcomla:
    return XEcomla(config, recipe)
