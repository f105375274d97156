"""A sliding window over a model's softmax layers, against dense masks: packed, padded, cached."""

from __future__ import annotations

import pytest
import torch

from adapt.generation.ar import ArConfig, ArSampler
from adapt.models import attention
from adapt.models.layout import Layout
from adapt.models.window import windowed
from tests import tiny
from tests.batches import packed
from tests.models.linear import ids

WINDOWS = {0: 5, 2: 9}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request):
    return attention.use(tiny.tiny_model(request.param, dtype=torch.float64, num_hidden_layers=3))


def stated(model, tokens, windows=WINDOWS):
    """[1, S, V] logits with a dense mask for each layer, one after the other by hand."""
    length = tokens.shape[1]
    apart = torch.arange(length)[:, None] - torch.arange(length)[None]
    handles = []
    for i, layer in enumerate(model.model.layers):
        mask = (apart >= 0) & (apart < windows.get(i, length))

        def use(module, args, kwargs, mask=mask):
            return args, kwargs | {"attention_mask": mask[None, None]}

        handles.append(layer.self_attn.register_forward_pre_hook(use, with_kwargs=True))
    try:
        with torch.no_grad():
            return model(tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def test_a_window_is_a_band_of_the_mask(model):
    """Longer than a tile, so that borders of tiles count, too."""
    tokens = ids(2, 150)
    with torch.no_grad(), windowed(model, WINDOWS):
        found = model(tokens, use_cache=False).logits
    torch.testing.assert_close(found, stated(model, tokens), atol=1e-10, rtol=0)
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
    torch.testing.assert_close(plain, stated(model, tokens, {}), atol=1e-10, rtol=0)
    assert (found - plain).abs().max() > 1e-3


def test_packed_documents_have_windows_of_their_own(model):
    batch = packed([[40, 3, 17], [60]], pad=3)
    layout = Layout.causal(batch.doc_ids, batch.position_ids)
    with torch.no_grad(), windowed(model, WINDOWS):
        hidden = attention.hidden_states(model, batch.input_ids, batch.position_ids, layout, "tiled")
        logits = model.lm_head(hidden)
    for row in range(batch.num_rows):
        for doc in batch.doc_ids[row].unique():
            where = batch.doc_ids[row] == doc
            alone = stated(model, batch.input_ids[row, where][None])[0]
            torch.testing.assert_close(logits[row, where], alone, atol=1e-10, rtol=0)


def test_cached_decoding_of_padded_rows_is_that_of_each_alone(model):
    prompts = [row.tolist() for row in (*ids(1, 140, seed=1), *ids(1, 3, seed=2), *ids(1, 30, seed=3))]
    with torch.no_grad(), windowed(model, WINDOWS):
        rows = ArSampler(ArConfig()).generate_batch(model, prompts, max_new_tokens=8)
    for prompt, row in zip(prompts, rows, strict=True):
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(int(stated(model, torch.tensor([tokens]))[0, -1].argmax()))
        assert row.tokens == tokens[len(prompt) :]


def test_a_window_as_long_as_the_text_changes_nothing(model):
    tokens = ids(1, 60)
    with torch.no_grad(), windowed(model, dict.fromkeys(range(3), 60)):
        found = model(tokens, use_cache=False).logits
    torch.testing.assert_close(found, stated(model, tokens, {}), atol=1e-10, rtol=0)


def test_windows_end_with_their_context(model):
    with pytest.raises(KeyError), windowed(model, WINDOWS):
        raise KeyError
    assert not any(hasattr(layer.self_attn, "window") for layer in model.model.layers)
    with pytest.raises(ValueError, match="a window of 0 tokens"), windowed(model, {1: 0}):
        pass
