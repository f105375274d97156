"""How many tokens a forward pass yields: greedy block-diffusion decoding of held-out beginnings.

    tokens_per_forward/tau<threshold>   new tokens / forward passes (prefill and commits included); AR
    decoding has 1

Every prompt yields `new_tokens` tokens (EOS does not stop it), so that two models are measured on equally
much text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest

from adapt.components import suites
from adapt.data.batch import PAD, Batch
from adapt.errors import Problem, UserError
from adapt.evaluate.context import EvalContext, Suite
from adapt.evaluate.suites.masked_ce import contract_at, size_problem

Beginning = tuple[tuple[int, int], list[int]]
"""(row of the dataset, column), first tokens of the document."""


@dataclass(frozen=True, kw_only=True)
class TokensPerForwardConfig:
    thresholds: tuple[float, ...] = (0.9,)
    """Confidence thresholds tau to decode at."""
    num_prompts: int = 8
    """How many documents to continue, taken from the held-out datasets in turn."""
    prompt_tokens: int = 64
    """Length of the beginnings; shorter documents are used where too few are long enough."""
    new_tokens: int = 32
    """Tokens decoded per prompt."""
    block_size: int | None = None
    """Block size to decode with; null takes the objective's (or the model's) target."""

    def __post_init__(self) -> None:
        if not self.thresholds or not all(0 < tau <= 1 for tau in self.thresholds):
            raise ValueError(f"thresholds={list(self.thresholds)} must be one or more numbers in (0, 1]")
        for key in ("num_prompts", "prompt_tokens", "new_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be 1 or more")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be 1 or more")

    def problems(self, recipe) -> Iterator[Problem]:
        yield from size_problem("tokens_per_forward", self.block_size, recipe)

    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        return [f"tokens_per_forward/tau{tau:g}" for tau in self.thresholds]


@suites.register("tokens_per_forward")
def tokens_per_forward(config: TokensPerForwardConfig) -> Suite:
    return lambda context: measure(config, context)


def measure(config: TokensPerForwardConfig, context: EvalContext) -> dict[str, float]:
    from adapt.generation.block_diffusion import BlockDiffusionConfig, BlockDiffusionSampler

    size = contract_at("tokens_per_forward", config.block_size, context).block_size
    found = prompts(config, context)
    results = {}
    for tau in config.thresholds:
        settings = BlockDiffusionConfig(block_size=size, threshold=tau, mask_token_id=context.facts.mask_token_id)
        # All ranks decode the same prompts: a sharded model needs them in step.
        rows = context.call(decode, BlockDiffusionSampler(settings), found, config.new_tokens)
        tokens, forwards = sum(len(r.tokens) for r in rows), sum(r.forwards for r in rows)
        results[f"tokens_per_forward/tau{tau:g}"] = tokens / forwards
    return results


def decode(models, sampler, found: list[list[int]], new_tokens: int):
    return sampler.generate_batch(models.student, found, max_new_tokens=new_tokens)


def prompts(config: TokensPerForwardConfig, context: EvalContext) -> list[list[int]]:
    """Beginnings of held-out documents: the same on every rank, for any number of ranks."""
    by_dataset = []
    for label in context.datasets:
        mine = [found for batch in context.batches(label) for found in beginnings(batch, config.prompt_tokens)]
        best = context.gather(sorted(mine, key=longest_first)[: config.num_prompts])
        by_dataset.append(sorted(best, key=longest_first))
    in_turn = chain.from_iterable(zip_longest(*by_dataset))
    chosen = [ids for _, ids in filter(None, in_turn)][: config.num_prompts]
    if not chosen:
        raise UserError("suite tokens_per_forward found no document to continue; are the data.eval sets empty?")
    return chosen


def longest_first(found: Beginning) -> tuple[int, tuple[int, int]]:
    """Long enough documents, in the order of the data; then shorter ones."""
    return -len(found[1]), found[0]


def beginnings(batch: Batch, length: int) -> Iterator[Beginning]:
    """Of every document of a batch."""
    for row in range(batch.num_rows):
        starts = ((batch.position_ids[row] == 0) & (batch.role[row] != PAD)).nonzero()[:, 0].tolist()
        for start in starts:
            same = batch.doc_ids[row, start : start + length] == batch.doc_ids[row, start]
            ids = batch.input_ids[row, start : start + length][same].tolist()
            yield (int(batch.sample_index[row]), start), ids
