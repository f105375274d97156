"""Growing blocks and other documents are new data: what torch.compile made of the attention stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from adapt.components import BlockSizesChoice
from adapt.config import decode
from adapt.models import attention
from adapt.models.layout import Layout
from adapt.objectives.base import Facts, Models
from adapt.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig
from tests.batches import packed

GROWTH = decode({"name": "geometric", "start": 2, "every": 1}, BlockSizesChoice)


@pytest.fixture
def counters(monkeypatch):
    """The functions the flex path compiles, with a compiler that counts its graphs (no C++ compiler needed)."""
    torch.compiler.reset()
    counts = {"mask": CompileCounter(), "attention": CompileCounter()}
    compiled_mask = torch.compile(create_block_mask, backend=counts["mask"])
    compiled_flex = torch.compile(flex_attention, backend=counts["attention"])
    monkeypatch.setattr(attention, "_compiled_block_mask", lambda: compiled_mask)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: compiled_flex)
    yield counts
    torch.compiler.reset()


def test_no_recompilation_across_growth_steps(counters):
    """Invariant 10, last part: blocks 2, 4, 8, other noise and other documents go through the first step's code."""
    config = BlockDiffusionConfig(block_size=8, growth=GROWTH)
    objective = BlockDiffusion(config, Facts(mask_token_id=3))
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 256, 16), torch.randn(2, 2, 256, 16), torch.randn(2, 2, 256, 16)
    seen = []
    for step, documents in enumerate([[[70, 58], [128]], [[128], [70, 58]], [[20, 30, 78], [1, 127]]]):
        prepared = objective.prepare(packed(documents), seed=0, step=step)
        layout = prepared.inputs["layout"]
        plan = attention.make_plan(layout, "flex")
        flex, _ = attention.attention(None, q, k, v, None, scaling=0.25, plan=plan)
        tiled, _ = attention.attention(None, q, k, v, None, scaling=0.25, plan=attention.make_plan(layout, "tiled"))
        torch.testing.assert_close(flex, tiled, atol=1e-5, rtol=0)
        seen.append((prepared.info["block_size"], {n: c.frame_count for n, c in counters.items()}))
    assert [size for size, _ in seen] == [2, 4, 8]
    assert min(seen[0][1].values()) >= 1, "nothing was compiled, so the test says nothing"
    assert seen[0][1] == seen[1][1] == seen[2][1]


def test_one_mask_per_batch_for_all_layers_and_recomputation(monkeypatch):
    """The plan is made once for a batch, whatever the number of layers, and again neither by activation checkpointing
    nor by a growth step."""
    from tests import tiny

    made = []
    original = attention.make_plan
    monkeypatch.setattr(attention, "make_plan", lambda *a: made.append(1) or original(*a))
    objective = BlockDiffusion(BlockDiffusionConfig(block_size=8, growth=GROWTH), Facts(mask_token_id=3))
    for layers, recompute in ((2, False), (4, True)):
        model = attention.use(tiny.tiny_model(num_hidden_layers=layers)).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for step in range(3):
            made.clear()
            sums = objective(Models(model), objective.prepare(packed([[20, 12]]), seed=0, step=step).inputs)
            sum(sums.values()).backward()
            assert len(made) == 1
