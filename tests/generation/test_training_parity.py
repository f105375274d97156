"""What decoding computes against what training computes, through the attention that training really uses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adapt.generation.blocks import CONTEXTS, forward
from adapt.generation.contract import Contract
from adapt.generation.rows import Row, visible
from adapt.models import attention
from adapt.models.layout import Layout
from tests import tiny
from tests.batches import packed
from tests.generation.reference import KINDS, MASK, name

LENGTH = 19  # a multiple of no block size above 1: the last block is partial


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("b", (1, 2, 4, 8, 32))
def test_every_block_has_the_logits_it_was_trained_with(family, b):
    """Invariant 4: cached forward of a noisy block == noisy half of `[noisy | clean]`; commit == clean half, and both
    from one cache that never keeps a noisy slot."""
    from transformers import DynamicCache

    model = attention.use(tiny.tiny_model(family, dtype=torch.float64))
    torch.manual_seed(b)
    clean = torch.randint(4, 320, (1, LENGTH))
    noisy = torch.where(torch.rand(1, LENGTH) < 0.5, MASK, clean)
    pos = torch.arange(LENGTH)[None]
    layout = Layout.noisy_then_clean(torch.zeros_like(pos), pos, pos // b)
    cache = DynamicCache()
    with torch.no_grad():
        hidden = attention.hidden_states(model, torch.cat([noisy, clean], 1), torch.cat([pos, pos], 1), layout, "tiled")
        trained = model.lm_head(hidden)[0]
        for start in range(0, LENGTH, b):
            block = slice(start, min(start + b, LENGTH))
            width, real = block.stop - start, torch.ones(1, start, dtype=torch.bool)
            for ids, causal, expected in ((noisy, False, trained[block]), (clean, True, trained[LENGTH:][block])):
                seen = visible(real, width, causal=causal)
                logits = forward(model, cache, ids[:, block], pos[:, block], seen, keep=0)[0]
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
                if not causal:
                    cache.crop(-width)
            assert cache.get_seq_length() == block.stop


@pytest.mark.parametrize("b", (1, 4, 8))
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_every_kind_denoises_with_the_logits_it_was_trained_with(kind, b):
    """Invariant 4 for every contract, against the rows the objective itself builds: each token the training scores is
    predicted by the same logits in decoding, and the text decoding keeps is the clean half."""
    from adapt.objectives.base import Facts
    from adapt.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig

    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    document = kind.context_mask == "document"
    config = BlockDiffusionConfig(
        block_size=None if document else b,
        growth=None,
        ar_weight=0.0,
        context="block" if kind.context_mask == "block" else "causal",
        noisy_attention=kind.noisy_attention,
        prediction=kind.prediction,
        block_first=kind.block_first,
        phase="zero",
    )
    objective = BlockDiffusion(config, Facts(mask_token_id=MASK))
    contract = Contract.of(objective.export_fields())
    assert contract == replace(kind, block_size=config.block_size, mask_token_id=MASK)
    batch = packed([[LENGTH]], seed=b)
    clean = batch.input_ids
    inputs = objective.prepare(batch, seed=1, step=0).inputs
    if not len(inputs["masked/source"]):
        assert (b, kind.block_first) == (1, "ar"), "nothing to denoise"
        return
    with torch.no_grad():
        hidden = attention.hidden_states(model, inputs["input_ids"], inputs["position_ids"], inputs["layout"], "tiled")
        trained = model.lm_head(hidden)[0]
    noisy = inputs["input_ids"][0, :LENGTH]
    shift = int(kind.prediction == "shifted")
    scored = set((inputs["masked/source"] + shift).tolist())  # positions of the tokens that are predicted
    compared = 0
    for start in range(0, LENGTH, LENGTH if document else b):
        prompt = clean[0, : max(start, 1)].tolist()  # a prompt has a token at least
        row = Row(0, prompt, LENGTH - len(prompt), False, frozenset(), torch.Generator())
        if start == 0 and (kind.context_mask == "causal" or (b == 1 and not document)):
            continue  # blocks start behind the prompt
        with torch.no_grad():
            context = CONTEXTS[kind.context_mask](model, [row], contract)
            block = context.open([row])
            positions = block.positions[0]
            block.tokens[0] = noisy[positions]
            predicted = [i for i, p in enumerate(positions.tolist()) if p in scored]
            if shift and not document and 0 in predicted:
                predicted.remove(0)  # across the block's edge: decoding takes it from the head
            slots = torch.tensor(predicted, dtype=torch.long)
            logits = context.denoise(block, slots)[0]
            torch.testing.assert_close(logits, trained[positions[slots] - shift], rtol=0, atol=1e-12)
            compared += len(predicted)
            if not document:
                kept = context.extend([row], clean[:, positions], block.positions, keep=0)[0]
                torch.testing.assert_close(kept, trained[LENGTH + positions], rtol=0, atol=1e-12)
    assert compared or (b == 1 and shift)


@pytest.mark.parametrize("attention", ("flash_attention_2", "flash_attention_3", "flex_attention"))
def test_attention_that_ignores_our_masks_is_refused(attention):
    from adapt.components import samplers
    from adapt.errors import UserError

    model = tiny.tiny_model()
    model.config._attn_implementation = attention
    entry = samplers["block_diffusion"]
    with pytest.raises(UserError, match="sdpa"):
        entry.factory(entry.config_type(block_size=4, mask_token_id=MASK)).generate(model, [5, 6], max_new_tokens=4)
