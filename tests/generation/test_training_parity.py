"""What decoding computes against what training computes, through the attention that training really uses."""

from __future__ import annotations

import pytest
import torch

from adapt.generation.block_diffusion import forward
from adapt.generation.rows import visible
from adapt.models import attention
from adapt.models.layout import Layout
from tests import tiny
from tests.generation.reference import MASK

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


@pytest.mark.parametrize("name", ("flash_attention_2", "flash_attention_3", "flex_attention"))
def test_attention_that_ignores_our_masks_is_refused(name):
    from adapt.components import samplers
    from adapt.errors import UserError

    model = tiny.tiny_model()
    model.config._attn_implementation = name
    entry = samplers["block_diffusion"]
    with pytest.raises(UserError, match="sdpa"):
        entry.factory(entry.config_type(block_size=4, mask_token_id=MASK)).generate(model, [5, 6], max_new_tokens=4)
