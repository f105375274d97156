"""Block diffusion: from an autoregressive model to one that denoises a block of tokens at a time.

The row goes in twice, noisy copy first: `[x~ | x]`, both with the same positions. Noisy tokens see their own noisy
block and the clean blocks before it. The defaults are NBDiff's (arXiv 2512.06776, eq. 1-5): clean tokens are plainly
causal, so the same pass yields the AR logits and an AR loss; the output at i-1 predicts x_i in both streams; block-first
tokens are never masked, since the AR stream predicts them, as it does in decoding; blocks grow. At block size 1 nothing
is masked and the objective is exactly `ar_weight` x the AR loss. Every switch away from that is a published recipe's;
`configs/presets/` has them by name.

Legend: B rows, T clean tokens of a row, b block size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from adapt.components import BlockSizesChoice, objectives
from adapt.data.batch import TARGET, Batch
from adapt.data.noise import generator
from adapt.errors import Problem
from adapt.generation.contract import Contract
from adapt.losses.linear_cross_entropy import linear_cross_entropy, token_cross_entropy
from adapt.models import attention
from adapt.models.layout import CLEAN, Layout
from adapt.objectives.base import Facts, Models, Prepared, Targets, Term, flat_rows
from adapt.objectives.blocks import FINE, Blocks, Phase, noise_keys
from adapt.objectives.growth.geometric import GeometricConfig
from adapt.objectives.masking import Mask, Noise, draw


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionConfig:
    block_size: int | None = 32
    """Target block size b; what decoding will use. null: the whole document is one block (LLaDA, Dream)."""
    growth: BlockSizesChoice | None = field(default_factory=lambda: BlockSizesChoice("geometric", GeometricConfig()))
    """How the block size grows; null trains at `block_size` from the first step."""
    context: Literal["causal", "block"] = "causal"
    """What clean tokens see. `causal`: those before them (NBDiff, I-DLM), which allows the AR loss and a prompt of any
    length; `block`: their whole block and those before it (BD3-LM, SDAR, Fast-dLLM v2, dLLM)."""
    noisy_attention: Literal["bidirectional", "causal"] = "bidirectional"
    """What noisy tokens see of their own block: all of it, or (I-DLM) what stands before them."""
    prediction: Literal["shifted", "inplace"] = "shifted"
    """Which output predicts a masked token: that of the position before it, as the pretrained model does it, or
    (`inplace`: BD3-LM, SDAR, dLLM, LLaDA) that of the masked position itself."""
    block_first: Literal["ar", "noisy"] = "ar"
    """`ar`: first tokens of blocks are never masked; the AR stream learns them, and decoding takes them from the AR
    head. `noisy`: they are masked like all others (with `shifted` predicted across the block's edge: Fast-dLLM v2)."""
    phase: Phase = "response"
    """Where blocks begin in a document: at its start (`zero`), at an offset drawn per document and pass (`random`), or
    (`response`) at its start and anew wherever given and learned tokens meet, as decoding will."""
    noise: Noise = field(default_factory=Noise)
    """How masks are drawn."""
    weighting: Literal["uniform", "elbo"] = "uniform"
    """Weight of a masked token: 1 (NBDiff), or 1 / its masking probability, which makes the loss the negative ELBO."""
    normalizer: Literal["supervised", "masked"] = "supervised"
    """Number the diffusion loss is divided by: all supervised tokens, or (Fast-dLLM v2, LLaDA2) the masked ones."""
    ar_weight: float = 0.5
    """Weight of the AR loss on the clean stream, relative to the diffusion loss; both are divided by the same number
    of supervised tokens, so 0.5 matches the expected half of the tokens that are masked."""
    ar_weight_end: float | None = None
    """AR weight at the target block size; in between it follows the logarithm of the block size. null: constant."""
    annealed: int | None = None
    """Steps over which the mask of block size 1 gives way to the target's, token by token at random (NBDiff's
    "annealed mask" baseline). null: off."""

    def problems(self, recipe) -> Iterator[Problem]:
        if self.block_size is not None and self.block_size < 1:
            yield Problem("objective.block_size", f"{self.block_size} tokens is no block; 8 to 32 is usual")
        elif self.block_size is not None and self.block_size > recipe.data.seq_len:
            yield Problem(
                "objective.block_size",
                f"{self.block_size} is longer than a row (data.seq_len={recipe.data.seq_len}), so no block would ever "
                f"be whole; lower it or raise data.seq_len",
            )
        for key in ("ar_weight", "ar_weight_end"):
            value = getattr(self, key)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                yield Problem(f"objective.{key}", f"{value} must be a finite number, 0 or more")
        if self.annealed is not None and self.annealed < 1:
            yield Problem("objective.annealed", f"{self.annealed} must be 1 or more optimizer steps, or null")
        yield from self.noise.problems()
        if self.noise.search and not any(s.name == "noise_interval" for s in recipe.evaluation.suites):
            yield Problem(
                "objective.noise.search", "needs the suite that measures it: add noise_interval to evaluation.suites"
            )
        if self.growth is None or not any(self.growth.config.problems(recipe)):
            yield from self._pairs()
        if not any(c.name == "mask_token" for c in recipe.model.conversions):
            yield Problem(
                "model.conversions",
                "block diffusion needs a mask token; add `- mask_token` (or `- {name: mask_token, token: ...}`)",
            )

    def _pairs(self) -> Iterator[Problem]:
        """Settings that make no sense together."""
        if self.context == "block" and self.has_ar:
            yield Problem(
                "objective.ar_weight",
                "with context=block a clean token sees those behind it in its block, the one it should predict among "
                "them: set ar_weight=0, or context=causal",
            )
        if self.block_size is None:
            if self.growth is not None:
                yield Problem("objective.growth", "a block that is the whole document cannot grow: set growth=null")
            if self.annealed is not None or self.ar_weight_end is not None:
                yield Problem(
                    "objective.block_size", "annealed and ar_weight_end need a target block size to go to; give one"
                )
        elif self.first_size == 1 and self.ar_weight == 0 and self.block_first == "ar":
            yield Problem(
                "objective.growth.start" if self.growth is not None else "objective.block_size",
                "at block size 1 nothing can be masked, and with ar_weight=0 there is no loss at all: start at 2, or "
                "give ar_weight",
            )
        if self.annealed is not None and self.growth is not None:
            yield Problem("objective.annealed", "blocks grow or the mask anneals, not both: set growth=null")
        if self.annealed is not None and self.context == "block":
            yield Problem(
                "objective.annealed",
                "at block size 1 a token sees the clean ones before it, and with context=block those have seen it: "
                "set context=causal",
            )
        if self.noise.complementary and self.weighting == "elbo":
            yield Problem(
                "objective.weighting",
                "elbo weights are 1 / the masking probability, and what a complementary view hides has another one: "
                "set weighting=uniform, or noise.complementary=false",
            )

    @property
    def has_ar(self) -> bool:
        return self.ar_weight > 0 or bool(self.ar_weight_end)

    @property
    def copies(self) -> int:
        """Times that a row goes through the student: its noisy views, and the clean tokens where somebody looks at them
        (adapt.plan.work)."""
        return (2 if self.noise.complementary else 1) + (self.block_size is not None or self.has_ar)

    @property
    def scored(self) -> float:
        """Expected rows of logits for each clean token (adapt.plan.work)."""
        hidden = 1.0 if self.noise.complementary else (self.noise.t_min + self.noise.t_max) / 2
        if self.block_first == "ar" and self.block_size is not None:
            hidden *= 1 - 1 / self.block_size
        return hidden + self.has_ar

    @property
    def heads(self) -> int:
        """Calls of the head in a microbatch (adapt.plan.work)."""
        return 1 + self.has_ar

    def visible(self, length: int) -> float:
        """Pairs of queries and keys that see each other in a row that is one document, at the target block size
        (adapt.plan.work)."""
        views, clean = (2 if self.noise.complementary else 1), self.copies > (2 if self.noise.complementary else 1)
        if self.block_size is None:
            return views * length**2 + clean * length**2 / 2
        own = length * self.block_size
        noisy = length**2 / 2 + (own if self.noisy_attention == "bidirectional" else own / 2)
        return views * noisy + length**2 / 2 + (own / 2 if self.context == "block" else 0)

    @property
    def first_size(self) -> int | None:
        return self.size_at(0)

    def size_at(self, step: int) -> int | None:
        """b(s), a pure function of the optimizer step."""
        return self.block_size if self.growth is None else self.growth.build(self.block_size).at(step)

    def ar_weight_at(self, step: int) -> float:
        if self.ar_weight_end is None:
            return self.ar_weight
        span = math.log(self.block_size / self.first_size)
        done = 1.0 if span == 0 else math.log(self.size_at(step) / self.first_size) / span
        return self.ar_weight + done * (self.ar_weight_end - self.ar_weight)


class BlockDiffusion:
    needs_teacher = False

    def __init__(self, config: BlockDiffusionConfig, facts: Facts, fixed: float | None = None):
        """`fixed` = t measures instead of trains: every block gets this t, and the count is that of hidden tokens."""
        if facts.mask_token_id is None:
            raise ValueError("block diffusion needs a model with a mask token (conversion `mask_token`)")
        self.config, self.fixed, self.noise = config, fixed, config.noise
        self.mask_token_id, self.backend = facts.mask_token_id, facts.attention

    def prepare(self, batch: Batch, *, seed: int, step: int) -> Prepared:
        config = self.config
        size, ar_weight = config.size_at(step), config.ar_weight_at(step)
        blocks = Blocks.of(batch, size, config.phase, seed)
        maskable = self.hideable(batch, blocks)
        views = [draw(batch, blocks, maskable, self.noise, seed, self.fixed)]
        if config.noise.complementary:
            views.append(views[0].complement(maskable))
        return self.lay_out(batch, blocks, views, size=size, ar_weight=ar_weight, fine=self._fine(batch, seed, step))

    def hideable(self, batch: Batch, blocks: Blocks) -> Tensor:
        """[B, T] bool: supervised tokens, less those the AR head gives."""
        learned = (batch.role == TARGET) & self._supervised(batch)
        return learned & ~blocks.first if self.config.block_first == "ar" else learned

    def _supervised(self, batch: Batch) -> Tensor:
        """[B, T] bool: tokens with a label. A mask token in the text teaches nothing: its logit is not in the softmax,
        so as a target its loss would be infinite."""
        return (batch.labels != -100) & (batch.labels != self.mask_token_id)

    def lay_out(
        self,
        batch: Batch,
        blocks: Blocks,
        views: list[Mask],
        *,
        size: int | None,
        ar_weight: float = 0.0,
        fine: Tensor | None = None,
    ) -> Prepared:
        """The model's inputs and the loss's targets for given masks, one noisy copy for each of `views`."""
        config = self.config
        noisy, clean = [self._targets(batch, view) for view in views], Targets.of(batch, self._supervised(batch))
        hidden = sum(len(n.ids) for n in noisy)
        # Without a masked token the noisy copies teach nothing, and leaving them out changes no clean logit. Nor is
        # there a clean copy where nobody looks at it: a block that is the whole document has no context.
        streams = tuple(range(1, len(views) + 1)) if hidden else ()
        if not hidden or size is not None or ar_weight > 0:
            streams = (*streams, CLEAN)
        length = batch.input_ids.shape[1]
        width = length * len(streams)
        copies = [torch.where(v.hidden, self.mask_token_id, batch.input_ids) for v in views if hidden]
        if CLEAN in streams:
            copies.append(batch.input_ids)
        inputs: dict[str, Any] = {
            "input_ids": torch.cat(copies, 1),
            "position_ids": batch.position_ids.repeat(1, len(streams)),
            "layout": Layout.copies(
                batch.doc_ids,
                batch.position_ids,
                blocks.number,
                streams,
                fine=fine,
                clean_blocks=config.context == "block",
                noisy_causal=config.noisy_attention == "causal",
            ),
        }
        shift = int(config.prediction == "shifted")
        sources = [n.row * width + index * length + n.col - shift for index, n in enumerate(noisy)]
        inputs |= _scored("masked", sources, noisy)
        # The terms are divided by the number of supervised clean tokens, so that ar_weight means what it says.
        by_hidden = self.fixed is not None or config.normalizer == "masked"
        terms = {"masked": Term(hidden if by_hidden else len(views) * len(clean.ids))}
        if ar_weight > 0:
            inputs |= _scored("ar", [clean.row * width + (len(streams) - 1) * length + clean.col - 1], [clean])
            terms["ar"] = Term(len(clean.ids), ar_weight)
        info = {"masked_fraction": hidden / max(1, len(clean.ids) * len(views))}
        return Prepared(inputs, terms, info if size is None else {"block_size": size, **info})

    def _targets(self, batch: Batch, view: Mask) -> Targets:
        found = Targets.of(batch, view.hidden)
        if self.config.weighting == "uniform":
            return found
        weight = 1 / view.probability[found.row, found.col]
        return dataclasses.replace(found, weight=weight if found.weight is None else weight * found.weight)

    def _fine(self, batch: Batch, seed: int, step: int) -> Tensor | None:
        """[B, T] bool: tokens that still see what they would at block size 1; fewer and fewer of them."""
        if self.config.annealed is None:
            return None
        share = 1 - min(1.0, step / self.config.annealed)
        length = batch.input_ids.shape[1]
        return torch.stack(
            [torch.from_numpy(generator(seed, *key, FINE).random(length) < share) for key in noise_keys(batch)]
        )

    def __call__(self, models: Models, inputs: dict[str, Any]) -> dict[str, Tensor]:
        student = models.student
        hidden = attention.hidden_states(
            student, inputs["input_ids"], inputs["position_ids"], inputs["layout"], self.backend
        )
        head = attention.head_weight(student)
        sums = {}
        for term, exclude in (("masked", self.mask_token_id), ("ar", None)):
            if f"{term}/source" not in inputs:
                continue
            rows = flat_rows(hidden, inputs[f"{term}/source"])
            target, weight = inputs[f"{term}/target"], inputs[f"{term}/weight"]
            sums[term] = linear_cross_entropy(rows, head, target, weight=weight, exclude=exclude)
        return sums

    def token_nats(self, models: Models, inputs: dict[str, Any]) -> Tensor:
        """[N] CE of each hidden token, unweighted, in the order of `masked/target`; for measuring."""
        student = models.student
        hidden = attention.hidden_states(
            student, inputs["input_ids"], inputs["position_ids"], inputs["layout"], self.backend
        )
        rows = flat_rows(hidden, inputs["masked/source"])
        return token_cross_entropy(rows, attention.head_weight(student), inputs["masked/target"], self.mask_token_id)

    def observe(self, results: dict[str, float]) -> dict[str, Any]:
        """After an evaluation: with `noise.search`, draw t from the interval it found. Returns what a resume needs."""
        low, high = results.get("noise_interval/low"), results.get("noise_interval/high")
        if self.config.noise.search and low is not None:
            self.restore({"t_min": low, "t_max": high})
        return {"t_min": self.noise.t_min, "t_max": self.noise.t_max}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `observe` left off."""
        self.noise = dataclasses.replace(self.noise, **state)

    def largest_step(self) -> int:
        growth = self.config.growth
        return 0 if growth is None else growth.build(self.config.block_size).largest_step()

    def export_fields(self) -> dict[str, Any]:
        config = self.config
        contract = Contract(
            block_size=config.block_size,
            mask_token_id=self.mask_token_id,
            prediction=config.prediction,
            context_mask="document" if config.block_size is None else config.context,
            noisy_attention=config.noisy_attention,
            block_first=config.block_first,
        )
        return {k: v for k, v in dataclasses.asdict(contract).items() if v is not None}


def _scored(term: str, sources: list[Tensor], targets: list[Targets]) -> dict[str, Tensor | None]:
    """Flat indices of the outputs that predict, and what; of all views together."""
    weights = [t.weight for t in targets]
    if any(w is not None for w in weights):
        weights = [torch.ones_like(t.ids, dtype=torch.float32) if t.weight is None else t.weight for t in targets]
    return {
        f"{term}/source": torch.cat(sources),
        f"{term}/target": torch.cat([t.ids for t in targets]),
        f"{term}/weight": None if weights[0] is None else torch.cat(weights),
    }


@objectives.register("block_diffusion")
def block_diffusion(config: BlockDiffusionConfig, facts: Facts) -> BlockDiffusion:
    return BlockDiffusion(config, facts)


def fixed_t(contract: Contract, facts: Facts, t: float) -> BlockDiffusion:
    """The measuring form: masked cross-entropy as the contract decodes, every token but block-first ones hidden with
    probability t. (Block-first ones stay visible for every kind of model, so that all are asked the same.)"""
    return BlockDiffusion(dataclasses.replace(as_decoded(contract), block_first="ar"), facts, t)


def as_decoded(contract: Contract) -> BlockDiffusionConfig:
    """Masks, prediction, block size and hidden tokens as decoding meets them, without anything that only trains."""
    return BlockDiffusionConfig(
        block_size=contract.block_size,
        growth=None,
        ar_weight=0.0,
        context="block" if contract.context_mask == "block" else "causal",
        prediction=contract.prediction,
        noisy_attention=contract.noisy_attention,
        block_first="ar" if contract.head_first else "noisy",
    )
