"""Block-diffusion decoding the slow way: no cache, a dense mask, one row, logits of everything, every time.

Written from the method's description alone; shares no code with the sampler.
"""

from __future__ import annotations

import torch

MASK, EOS = 3, 0


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
