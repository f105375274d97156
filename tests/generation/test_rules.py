"""Rules of revelation and sub-blocks: each against the slow reference, and what each promises."""

from __future__ import annotations

import itertools

import pytest
import torch

from adapt.components import samplers
from adapt.generation.contract import Contract
from adapt.generation.rules import RULES, Step, leftmost_group
from adapt.generation.sampling import Candidates
from tests import tiny
from tests.generation import reference
from tests.generation.reference import decode_kind, name, tell

PROMPT = [17, 45, 200, 31, 99, 7, 120]
KINDS = [
    Contract(),
    Contract(context_mask="block", prediction="inplace", block_first="noisy"),
    Contract(context_mask="document", prediction="shifted", block_first="noisy"),
]
CHOICES = {
    "confidence": (reference.confident(0.3), {"threshold": 0.3}),
    "topk": (reference.topk(3), {"steps": 3}),
    "entropy": (reference.entropy, {}),
    "margin": (reference.margin, {}),
    "sequential": (reference.sequential, {}),
}


def sampler(**fields):
    entry = samplers["block_diffusion"]
    return entry.factory(entry.config_type(**fields))


@pytest.fixture(scope="module")
def plain():
    return tiny.tiny_model("llama", seed=3, dtype=torch.float64)


@pytest.mark.parametrize("group", (None, 1, 3, 4))
@pytest.mark.parametrize("rule", CHOICES)
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_equals_the_uncached_reference(plain, kind, rule, group):
    choose, fields = CHOICES[rule]
    model = tell(plain, kind, 8)
    expected, forwards = decode_kind(model, kind, PROMPT, 20, b=8, choose=choose, group=group)
    got = sampler(rule=rule, sub_block=group, **fields).generate(model, PROMPT, max_new_tokens=20)
    assert (got.tokens, got.forwards) == (expected, forwards)


@pytest.mark.parametrize("rule", [*CHOICES, "random"])
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_batch_equals_each_row_alone(plain, kind, rule):
    fields = CHOICES.get(rule, (None, {}))[1]
    model = tell(plain, kind, 8)
    settings = sampler(rule=rule, sub_block=4, temperature=0.7, top_p=0.95, **fields)
    prompts = [PROMPT, PROMPT[:2], PROMPT * 2, PROMPT[:1]]
    together = settings.generate_batch(model, prompts, max_new_tokens=20, seed=7)
    for i, prompt in enumerate(prompts):
        alone = settings.generate(model, prompt, max_new_tokens=20, seed=7 + i)
        assert (together[i].tokens, together[i].reveal_order) == (alone.tokens, alone.reveal_order)


def test_random_is_a_matter_of_the_seed(plain):
    model = tell(plain, KINDS[1], 8)
    orders = [sampler(rule="random").generate(model, PROMPT, max_new_tokens=17, seed=s).reveal_order for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert len(orders[0]) == 17
    for block in (orders[0][1:9], orders[0][9:]):
        assert [step for _, step in block] == list(range(1, 9)), "one slot per step"


@pytest.mark.parametrize("steps", (1, 2, 3, 8, 50))
def test_topk_takes_no_more_than_its_steps(plain, steps):
    model = tell(plain, Contract(context_mask="document", prediction="inplace"), 8)
    got = sampler(rule="topk", steps=steps).generate(model, PROMPT, max_new_tokens=24)
    assert max(step for _, step in got.reveal_order) <= min(steps, 8)
    per_step = -(-8 // steps)
    assert got.forwards == 3 * -(-8 // per_step)


def test_sub_blocks_are_revealed_from_left_to_right(plain):
    model = tell(plain, KINDS[1], 8)
    got = sampler(rule="random", sub_block=2).generate(model, PROMPT, max_new_tokens=17)
    groups = [(len(PROMPT) + p) // 2 for p, _ in got.reveal_order]
    assert groups == sorted(groups)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_reveals_an_open_slot_of_every_row_that_has_one(rule):
    torch.manual_seed(0)
    probabilities = torch.rand(8, 3, 5).softmax(-1)
    candidates = Candidates(probabilities.argmax(-1), probabilities.max(-1).values, probabilities)
    open = torch.tensor(list(itertools.product([False, True], repeat=3)))
    step = Step(0.9, torch.full((8,), 2), torch.rand(8, 3))
    reveal = RULES[rule](candidates, open, step) & open
    assert torch.equal(reveal.any(1), open.any(1))
    many = 2 if rule == "topk" else 1
    assert torch.equal(reveal.sum(1), open.sum(1).clamp(max=many))


def test_leftmost_group():
    open = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    expected = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    assert torch.equal(leftmost_group(open, 2), expected)
    assert torch.equal(leftmost_group(open, None), open)


@pytest.mark.parametrize(
    "fields", ({"rule": "topk"}, {"steps": 3}, {"rule": "topk", "steps": 0}, {"sub_block": 0}, {"sub_block": -4})
)
def test_impossible_settings(fields):
    with pytest.raises(ValueError, match="steps|sub_block"):
        sampler(**fields)
