"""Questions with known answers: decoded greedily, scored by likelihood.

All of it is the same on every rank: work is dealt out in batches, and every rank calls the models equally often.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from adapt.data.batch import CONTEXT, PAD, TARGET, Batch
from adapt.data.questions import Question
from adapt.errors import UserError
from adapt.evaluate.context import EvalContext

BATCH_TOKENS = 8192
"""Tokens of a batch, padding included."""
MOST_ROWS = 32
"""Rows that are decoded together at most."""


def require_causal(suite: str, context: EvalContext) -> None:
    """Raises UserError for models whose context is not causal: left to right is not what they were trained for."""
    seen = context.contract.context_mask
    if seen != "causal":
        raise UserError(
            f"suite {suite} reads and writes from left to right, and this model's context is not causal "
            f"(context_mask: {seen}): its answers would mean nothing; leave the suite out, and use elbo and masked_ce"
        )


def greedy(
    context: EvalContext, prompts: Sequence[list[int]], new_tokens: Sequence[int], eos_ids: Iterable[int] = ()
) -> list[list[int]]:
    """The most probable `new_tokens[i]` tokens after each prompt, one by one with the cache; without what follows the
    first of `eos_ids`, itself included. Collective."""
    from adapt.generation.ar import ArConfig, ArSampler

    limit, longest, most = context.call(_max_positions), max(map(len, prompts)), max(new_tokens)
    if limit is not None and longest + most > limit:
        raise UserError(
            f"a prompt of {longest:,d} tokens and {most:,d} new ones do not fit into the model's context of "
            f"{limit:,d} (max_position_embeddings): ask for shorter texts"
        )
    ends, sampler = set(eos_ids), ArSampler(ArConfig())
    # Rows end early where that saves time and no other rank waits for the models to be called.
    early = tuple(ends) if context.rank_and_world[1] == 1 else ()

    def work(batch: list[int]) -> list[list[int]]:
        # As many tokens in every batch: ranks that share a sharded model work on different ones at the same time.
        rows = context.call(partial(_decode, early=early), sampler, [prompts[i] for i in batch], most)
        return [row[: new_tokens[i]] for i, row in zip(batch, rows, strict=True)]

    batches = groups([len(p) + most for p in prompts])
    found: dict[int, list[int]] = {}
    for batch, rows in zip(batches, context.dealt(batches, work), strict=True):
        found |= dict(zip(batch, rows, strict=True))
    return [_until(found[i], ends) for i in range(len(prompts))]


def ends(context: EvalContext, questions: Iterable[Question]) -> set[int]:
    """Tokens that end a text: the model's and the tokenizer's, and those that end answers in training. Collective."""
    from adapt.generation.load import eos_ids

    known = context.call(lambda models: eos_ids(models.student, context.tokenizer))
    return {*known, *(end for question in questions for end in question.ends)}


def _max_positions(models) -> int | None:
    return getattr(models.student.config, "max_position_embeddings", None)


def _decode(models, sampler, prompts, new_tokens: int, *, early) -> list[list[int]]:
    rows = sampler.generate_batch(models.student, prompts, max_new_tokens=new_tokens, eos_ids=early)
    return [row.tokens for row in rows]


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    at = next((i for i, t in enumerate(tokens) if t in ends), len(tokens))
    return tokens[:at]


def groups(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of rows that go together: of like length, within BATCH_TOKENS and MOST_ROWS."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and len(batches[-1]) < min(MOST_ROWS, max(1, BATCH_TOKENS // longest)):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def answer_nats(context: EvalContext, questions: Sequence[Question]) -> list[float]:
    """Negative log-likelihood of each answer given its prompt. Questions are packed as documents of rows that do not
    see each other. Collective."""

    def work(rows: list[list[int]]) -> list[float]:
        batch, document = pack(rows, questions, width, pad)
        return context.call(partial(_nats, facts=context.facts, count=document.max() + 1), batch, document)

    pad = context.tokenizer.pad_token_id if context.tokenizer.pad_token_id is not None else 0
    width = max((q.length for q in questions), default=0)
    width = max(width, min(BATCH_TOKENS // 4, sum(q.length for q in questions)))
    rows = first_fit([q.length for q in questions], width)
    per_batch = max(1, BATCH_TOKENS // max(1, width))
    batches = [rows[i : i + per_batch] for i in range(0, len(rows), per_batch)]
    found: dict[int, float] = {}
    for batch, nats in zip(batches, context.dealt(batches, work), strict=True):
        found |= dict(zip((i for row in batch for i in row), nats, strict=True))
    return [found[i] for i in range(len(questions))]


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Indices of the sequences of each row, longest first into the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((i for i, free in enumerate(room) if free >= lengths[index]), None)
        if at is None:
            rows.append([])
            room.append(width)
            at = -1
        rows[at].append(index)
        room[at] -= lengths[index]
    return rows


def pack(rows: list[list[int]], questions: Sequence[Question], width: int, pad: int) -> tuple[Batch, torch.Tensor]:
    """Rows of `width` tokens with the answers as labels, and for each target the number of its question in the batch."""
    shape = (len(rows), width)
    ids, labels = torch.full(shape, pad), torch.full(shape, -100)
    doc, pos = torch.zeros(shape, dtype=torch.long), torch.arange(width).repeat(len(rows), 1)
    role = torch.full(shape, PAD, dtype=torch.int8)
    document, number = [], 0
    for r, row in enumerate(rows):
        at = 0
        for d, index in enumerate(row):
            question = questions[index]
            given, stop = at + len(question.prompt), at + question.length
            ids[r, at:stop] = torch.tensor(question.prompt + question.answer)
            labels[r, given:stop] = ids[r, given:stop]
            doc[r, at:stop], pos[r, at:stop] = d, torch.arange(question.length)
            role[r, at:given], role[r, given:stop] = CONTEXT, TARGET
            document += [number] * len(question.answer)
            at, number = stop, number + 1
        doc[r, at:], pos[r, at:] = len(row), torch.arange(width - at)
    nothing = torch.zeros(len(rows), dtype=torch.long)
    batch = Batch(
        input_ids=ids,
        labels=labels,
        doc_ids=doc,
        position_ids=pos,
        role=role,
        loss_weight=(role == TARGET).float(),
        sample_index=nothing,
        epoch=nothing,
        source=nothing,
        pair_index=nothing - 1,
    )
    return batch, torch.tensor(document)


def _nats(models, batch: Batch, document: torch.Tensor, *, facts, count) -> list[float]:
    from adapt.evaluate.likelihood import ar_token_nats
    from adapt.objectives.base import Targets

    nats = ar_token_nats(models, batch, Targets.of(batch), facts).double().cpu()
    return torch.zeros(int(count), dtype=torch.float64).index_add_(0, document, nats).tolist()


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
