"""Packed documents do not see each other (spec invariant 7), and the start-up probe notices where they do."""

from __future__ import annotations

import pytest
import torch

from adapt.distributed.world import World
from adapt.errors import UserError
from adapt.models import attention
from adapt.models.layout import Layout
from adapt.train.probe import leak_probe
from adapt.train.root import Root
from tests import tiny
from tests.batches import packed

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
LENGTHS = [13, 7, 1, 10]
WORLD = World(0, 0, 1, 1, torch.device("cpu"))


@pytest.fixture
def plain_flex(monkeypatch):
    """FlexAttention as CPUs have it: forward only, uncompiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    monkeypatch.setattr(attention, "_compiled_block_mask", lambda: create_block_mask)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)


def logits(model, ids, doc, pos, kind: str) -> torch.Tensor:
    """[T, vocabulary] by our attention (`tiled`, `flex`), or transformers' own with the layout as a dense mask."""
    layout = Layout.causal(doc, pos)
    with torch.no_grad():
        if kind in ("eager", "sdpa"):
            mask = layout.dense()[:, None]
            if kind == "eager":
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            return model(ids, attention_mask=mask, position_ids=pos, use_cache=False).logits[0]
        hidden = attention.hidden_states(model, ids, pos, layout, kind)
        return (hidden @ attention.head_weight(model).T)[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["tiled", "flex", "eager", "sdpa"])
def test_packed_logits_are_the_logits_of_each_document_alone(kind, mode, family, plain_flex):
    model = tiny.tiny_model(family).train(mode == "train")
    model = attention.use(model) if kind in ("tiled", "flex") else model
    if kind in ("eager", "sdpa"):
        model.set_attn_implementation(kind)
    batch = packed([LENGTHS])
    together = logits(model, batch.input_ids, batch.doc_ids, batch.position_ids, kind)
    start = 0
    for length in LENGTHS:
        span = slice(start, start + length)
        alone = logits(model, batch.input_ids[:, span], torch.zeros(1, length).long(), torch.arange(length)[None], kind)
        torch.testing.assert_close(together[span], alone, atol=1e-4, rtol=0)
        start += length
    changed = batch.input_ids.clone()
    changed[:, : LENGTHS[0]] = (changed[:, : LENGTHS[0]] + 5) % 320
    moved = (logits(model, changed, batch.doc_ids, batch.position_ids, kind) - together).abs().amax(-1)
    assert moved[LENGTHS[0] :].max() == 0.0
    assert moved[: LENGTHS[0]].min() > 0.0


@pytest.mark.parametrize("backend", ["tiled", "flex"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_probe_passes_our_attention_and_leaves_the_model_as_it_was(family, backend, plain_flex):
    root = Root(attention.use(tiny.tiny_model(family, attention_dropout=0.3 if backend == "tiled" else 0.0))).train()
    state = torch.get_rng_state()
    assert leak_probe(root, backend, 320, WORLD) < 1e-4
    assert root.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_the_probe_fails_where_the_models_attention_knows_nothing_of_layouts(kind):
    """What it makes of the placeholder mask is not for us to say: everything seen, or nothing at all."""
    root = Root(tiny.tiny_model())
    root.student.set_attn_implementation(kind)
    with pytest.raises(UserError, match=r"model.base: .*does not honour the layout"):
        leak_probe(root, "auto", 320, WORLD)


def leaky(layout: Layout, backend: str):
    """Documents are ignored; everything else is right, so the loss would fall."""
    return attention._tile_plan(Layout(torch.zeros_like(layout.doc), layout.pos, layout.block, layout.stream))


def test_the_probe_fails_where_documents_are_ignored(monkeypatch):
    root = Root(attention.use(tiny.tiny_model()))
    monkeypatch.setattr(attention, "make_plan", leaky)
    with pytest.raises(UserError, match="packed documents see each other"):
        leak_probe(root, "auto", 320, WORLD)


def test_the_probe_fails_on_a_leak_in_training_mode_alone(monkeypatch):
    root = Root(attention.use(tiny.tiny_model()))
    honest = attention.make_plan
    monkeypatch.setattr(
        attention, "make_plan", lambda layout, backend: (leaky if root.training else honest)(layout, backend)
    )
    with pytest.raises(UserError, match="see each other in this model in training mode"):
        leak_probe(root, "auto", 320, WORLD)


def test_the_probe_fails_where_packing_moves_a_document(monkeypatch):
    """A change in one document reaches no other, yet a document's states depend on where in the row it stands."""
    root = Root(attention.use(tiny.tiny_model()))
    hidden = attention.hidden_states

    def shifted(model, ids, pos, layout, backend):
        return hidden(model, ids, pos * (1 + layout.doc), layout, backend)

    monkeypatch.setattr(attention, "hidden_states", shifted)
    with pytest.raises(UserError, match="packing, or a change in one"):
        leak_probe(root, "auto", 320, WORLD)
