"""Block-diffusion decoding the slow way: no cache, a dense mask, one row, logits of everything, every time.

Written from the method's description alone; shares no code with the sampler.
"""

from __future__ import annotations

import itertools
import math

import torch

from adapt.generation.contract import Contract

MASK, EOS = 3, 0

KINDS = [
    Contract(prediction=p, context_mask=c, noisy_attention=n, block_first=f)
    for c, p, f, n in itertools.product(
        ("causal", "block", "document"), ("shifted", "inplace"), ("ar", "noisy"), ("bidirectional", "causal")
    )
    if n == "bidirectional" or c == "causal"  # no recipe is causal inside its blocks and not outside them
]
"""Every contract a published recipe has, and those between them."""


def name(kind: Contract) -> str:
    return f"{kind.context_mask}-{kind.prediction}-{kind.block_first}-{kind.noisy_attention}"


def tell(model, kind: Contract, b: int | None = None):
    """The model, its config stating the contract."""
    for key in ("context_mask", "prediction", "block_first", "noisy_attention"):
        setattr(model.config, key, getattr(kind, key))
    model.config.mask_token_id, model.config.block_size = MASK, b
    return model


def forward(model, ids: list[int], start: int, kind: Contract, b: int) -> torch.Tensor:
    """[len(ids), V] probabilities; tokens from `start` on are a noisy block, those before it committed text."""
    q, k = torch.arange(len(ids))[:, None], torch.arange(len(ids))[None]
    inner = k <= q if kind.noisy_attention == "causal" else torch.ones_like(k <= q)
    clean = k // b <= q // b if kind.context_mask == "block" else k <= q
    mask = inner if kind.context_mask == "document" else torch.where(q >= start, (k < start) | inner, clean)
    mask = mask & ((k < start) | (q >= start)) if kind.context_mask != "document" else mask
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), attention_mask=mask[None, None], use_cache=False).logits[0]
    out[:, MASK] = float("-inf")
    return out.softmax(-1)


def decode_kind(model, kind: Contract, prompt, new, *, b, choose, group=None) -> tuple[list[int], int]:
    """Any contract, any rule. choose(candidates {slot: probabilities [V]}, width) -> slots to reveal; `group` slots of
    a block are revealed before the next. -> (new tokens, forwards of the cached algorithm)"""
    text, limit, forwards = list(prompt), len(prompt) + new, 0
    shift = int(kind.prediction == "shifted")
    document = kind.context_mask == "document"
    head = not document and (kind.prediction == "shifted" or kind.block_first == "ar")
    b = b or new
    while len(text) < limit:
        start = len(text) // b * b if kind.context_mask == "block" else len(text)
        end = min(start + b, limit)
        if not document and start:
            forwards += 1  # prefill or commit
        ids = text + [MASK] * (limit - len(text) if document else end - len(text))
        if head and start == len(text):
            ids[start] = int(forward(model, text, len(text), kind, b)[-1].argmax())
        while MASK in ids[start:end]:
            forwards += 1
            out = forward(model, ids, start, kind, b)
            hidden = [i for i in range(start, end) if ids[i] == MASK]
            if group:
                hidden = [i for i in hidden if (i - start) // group == (hidden[0] - start) // group]
            for i in choose({i: out[i - shift] for i in hidden}, end - start):
                ids[i] = int(out[i - shift].argmax())
        text = ids[:end]
    return text[len(prompt) :], forwards


def confident(tau: float):
    def choose(candidates, width):
        best = max(candidates, key=lambda i: candidates[i].max().item())
        return {best} | {i for i, p in candidates.items() if p.max().item() > tau}

    return choose


def topk(steps: int):
    def choose(candidates, width):
        ordered = sorted(candidates, key=lambda i: -candidates[i].max().item())
        return ordered[: math.ceil(width / steps)]

    return choose


def entropy(candidates, width):
    return [min(candidates, key=lambda i: torch.special.entr(candidates[i]).sum().item())]


def margin(candidates, width):
    two = {i: p.topk(2).values for i, p in candidates.items()}
    return [max(two, key=lambda i: (two[i][0] - two[i][1]).item())]


def sequential(candidates, width):
    return [min(candidates)]


def logits_of(model, text: list[int], block: list[int]) -> torch.Tensor:
    """[len(text) + len(block), V]: causal over `text`; the tokens of `block` see everything."""
    total, start = len(text) + len(block), len(text)
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    mask[start:] = True
    with torch.no_grad():
        out = model(input_ids=torch.tensor([text + block]), attention_mask=mask[None, None], use_cache=False).logits[0]
    out[:, MASK] = float("-inf")
    return out


def decode(model, prompt, new, *, b, tau=0.9, rule="confidence", eos=()) -> tuple[list[int], int]:
    """-> (new tokens up to the first EOS, forwards counted as the cached algorithm would make them)."""
    text, forwards = list(prompt), 0
    while len(text) - len(prompt) < new:
        forwards += 1  # prefill or commit
        width = min(b, new - (len(text) - len(prompt)))
        block = [int(logits_of(model, text, [])[-1].argmax())] + [MASK] * (width - 1)
        while MASK in block:
            if any(t in eos for t in block[: block.index(MASK)]):
                break
            forwards += 1
            out = logits_of(model, text, block)[len(text) :].softmax(-1)
            guess = {i: out[i - 1].max(-1) for i in range(1, width) if block[i] == MASK}
            if rule == "sequential":
                chosen = [min(guess)]
            else:
                best = max(guess, key=lambda i: guess[i].values.item())
                chosen = {best} | {i for i, g in guess.items() if g.values.item() > tau}
            for i in chosen:
                block[i] = int(guess[i].indices)
        for token in block:
            text.append(token)
            if token in eos:
                return text[len(prompt) :], forwards
    return text[len(prompt) :], forwards
