"""Masked Thought: its ratio over a stage (spec invariant 12), its options, and that it resumes and shards exactly.

Compared once with the authors' code (ChangyuChen347/MaskedThought at 9a467af), run as it is beside ours:
- `mask_policy_utils.py`, `get_gpt_masked_input` on 400 rows of 10 prompt and 60 answer tokens, p = 0.4, replace_rate 0.3
  (theirs | ours): masked prompt tokens 0 | 0, fraction of answer tokens 0.4016 | 0.4034 (standard error 0.0032), variance
  of the count over the binomial's 0.963 | 1.054 (0.071), replaced by a random id 0.303 | 0.294 (0.0047), last answer
  token 0.428 | 0.360 (0.0245). A binomial count, then a uniform choice: the law of independent draws.
- `trainer_436.py`, its two lines for `mask_rate`, at every step of 10, 1000 and 4321 (p = 0.4, w = 0.66): the largest
  difference is 6e-17.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from adapt.config import resolve
from adapt.errors import StopRequested, UserError
from adapt.models import attention
from adapt.objectives.base import Models
from adapt.objectives.masked_thought import MaskedThought, MaskedThoughtConfig
from adapt.train.fit import fit
from adapt.train.validate import check
from tests import tiny
from tests.batches import packed
from tests.objectives.test_corruption import FACTS, MASK, loss_of, thought
from tests.objectives.test_meap import chats
from tests.recipes import tiny_recipe
from tests.train.test_fit import launch, losses, stop_after, weights


def recipe(base: Path, folder: Path, **over) -> dict:
    """On answers, six steps; its ratio rises over four of them."""
    made = tiny_recipe(base, folder, **{"objective": {"name": "masked_thought"}} | over)
    made["data"] |= chats(folder / "chats.jsonl")
    made["evaluation"] = {"suites": ["bpb"], "limit": 2}
    made["generation"] = {"prompts": ["the model"], "max_new_tokens": 8, "samplers": ["ar"]}
    return made


def ratios(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["mask_ratio"] for line in lines if "mask_ratio" in line}


def test_prompts_are_never_corrupted_and_eos_may_be():
    batch = packed([[30, 20], [50]], prompt=7, pad=3)
    ids, where = thought(ratio=1.0).corrupted(batch, 1.0, seed=0, step=0)
    assert torch.equal(where, batch.role == 2), "down to the last answer token"
    assert torch.equal(ids[~where], batch.input_ids[~where])


def test_the_default_is_the_papers():
    config = MaskedThoughtConfig()
    assert [config.ratio_at(s, 100) for s in (0, 33, 67, 99)] == [0, 0.4 * 33 / 67, 0.4, 0.4]
    assert (config.eligible, config.exclude, config.loss_on, config.replace_rate) == ("assistant", (), "all_targets", 0)


def test_random_ratio_is_one_draw_per_step_below_the_ratio():
    goal = MaskedThought(MaskedThoughtConfig(random_ratio=True, ratio_schedule=None), FACTS)
    drawn = [goal.ratio_at(0, step) for step in range(2000)]
    assert 0 <= min(drawn) < max(drawn) < 0.4
    assert abs(sum(drawn) / 2000 - 0.2) < 4 * 0.4 / 12**0.5 / 2000**0.5
    assert drawn[5] == goal.ratio_at(0, 5) != goal.ratio_at(1, 5), "a function of (seed, step): alike on all ranks"


def test_drop_mask_hides_mask_tokens_from_all_others():
    """As if they were not there: the states of intact tokens are those of a row from which they are cut out (positions
    kept). A masked token itself sees the intact ones before it and itself."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    batch = packed([[24, 10]], prompt=4)
    prepared = thought(ratio=0.4, drop_mask=True).prepare(batch, seed=0, step=0)
    ids, layout = prepared.inputs["input_ids"], prepared.inputs["layout"]
    masked = ids[0] == MASK
    assert masked.any()
    dense = layout.dense()[0]
    causal = thought(ratio=0.4).prepare(batch, seed=0, step=0).inputs["layout"].dense()[0]
    assert torch.equal(dense, causal & (~masked[None, :] | torch.eye(34, dtype=torch.bool)))
    with torch.no_grad():
        states = attention.hidden_states(model, ids, batch.position_ids, layout)[0]
        model.set_attn_implementation("sdpa")
        here = (batch.doc_ids[0] == 0) & ~masked
        alone = model.model(ids[:, here], position_ids=batch.position_ids[:, here]).last_hidden_state[0]
    torch.testing.assert_close(states[here], alone, atol=1e-12, rtol=0)


def test_loss_equals_a_plain_reference():
    """Full logits, explicit loops: mean over all answer tokens, clean labels, corrupted inputs, the mask not in the
    softmax; `clean_prefix` and `corrupted_input` are its two parts."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    batch, goal = packed([[28]], prompt=6), thought(ratio=0.4, replace_rate=0.5)
    prepared = goal.prepare(batch, seed=0, step=0)
    found = goal(Models(model), prepared.inputs)
    ids = prepared.inputs["input_ids"]
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        logits = model(ids).logits[0]
        logits[:, MASK] = -torch.inf
    expected = {"clean_prefix": 0.0, "corrupted_input": 0.0}
    for t in range(6, 28):
        part = "clean_prefix" if ids[0, t - 1] == batch.input_ids[0, t - 1] else "corrupted_input"
        expected[part] -= float(logits[t - 1].log_softmax(-1)[batch.input_ids[0, t]])
    assert {n: float(v.detach()) for n, v in found.items()} == pytest.approx(expected, rel=1e-5)
    assert {t.count for t in prepared.terms.values()} == {22}
    attention.use(model)
    assert float(loss_of(model, goal, batch).detach()) == pytest.approx(sum(expected.values()) / 22, rel=1e-5)


def test_a_rising_ratio_needs_the_stages_steps():
    goal = MaskedThought(MaskedThoughtConfig(), dataclasses.replace(FACTS, total_steps=None))
    with pytest.raises(ValueError, match="number of its steps"):
        goal.prepare(packed([[9]]), seed=0, step=0)


def test_random_tokens_alone_need_no_mask_token(tiny_base, tmp_path):
    made = recipe(
        tiny_base, tmp_path, objective={"name": "masked_thought", "replace_rate": 1.0, "ratio_schedule": None}
    )
    made["model"]["conversions"] = []
    assert check(resolve(made), offline=True).problems == []
    made["trainer"]["steps"] = 2
    assert fit(resolve(made)) == 0
    made["objective"]["replace_rate"] = 0.9
    assert [p.where for p in check(resolve(made), offline=True).problems] == ["model.conversions"]
    made["objective"] |= {"replace_rate": 1.0, "drop_mask": True}
    assert [p.where for p in check(resolve(made), offline=True).problems] == ["objective.drop_mask"]


@pytest.mark.parametrize("options", [{}, {"random_ratio": True, "replace_rate": 0.5}, {"drop_mask": True}])
def test_interrupted_in_its_warm_up_and_resumed_is_bit_exact(options, tmp_path, monkeypatch):
    """Invariants 6 and 12: the ratio goes on where it was, and so do the masks; dropout on."""
    base = tiny.save_tiny(tmp_path / "base", attention_dropout=0.2)
    objective = {"name": "masked_thought", **options}
    straight = recipe(base, tmp_path, run={"name": "straight"}, objective=objective)
    fit(resolve(straight))
    broken = recipe(base, tmp_path, run={"name": "broken"}, objective=objective)
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match="after step 3"):
        stop_after(patched, 3)
        fit(resolve(broken))
    fit(resolve(broken), "yes")
    runs = tmp_path / "runs"
    assert losses(runs / "straight") == losses(runs / "broken")
    assert ratios(runs / "straight") == ratios(runs / "broken")
    if not options:
        rise = [0.4 * s / (0.66 * 6 + 1) for s in range(5)]
        assert list(ratios(runs / "broken").values()) == pytest.approx([*rise, 0.4])
    a, b = weights(runs / "straight"), weights(runs / "broken")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_each_stage_has_a_ramp_of_its_own(tiny_base, tmp_path):
    made = recipe(tiny_base, tmp_path)
    made["stages"] = [
        {"name": "a", "trainer": {"steps": 2}, "objective": "next_token"},
        {"name": "b", "trainer": {"steps": 3}},
    ]
    fit(resolve(made))
    assert ratios(tmp_path / "runs" / "tiny") == pytest.approx({3: 0, 4: 0.4 / 2.98, 5: 0.8 / 2.98})


@pytest.mark.parametrize("objective", ["masked_thought", "meap"])
def test_two_ranks_equal_one(objective, tmp_path):
    """FSDP2 on two processes, LoRA, other microbatches: the same masks, hence the same trajectory within float32 noise."""
    base = tiny.save_tiny(tmp_path / "base")
    chosen = {"name": objective} | ({"sft_layout": "separate", "min_answer_tokens": 8} if objective == "meap" else {})
    over = {"trainable": {"lora": {"rank": 4, "targets": ["q_proj", "up_proj"]}}, "objective": chosen}
    for name, devices in (("one", 1), ("two", 2)):
        trainer = {"devices": devices, "steps": 4, "microbatch": 3 - devices}
        made = recipe(base, tmp_path, run={"name": name}, trainer=trainer, **over)
        if devices == 1:
            assert fit(resolve(made)) == 0
        else:
            done = launch(made, tmp_path)
            assert done.returncode == 0, done.stderr
    a, b = (losses(tmp_path / "runs" / n) for n in ("one", "two"))
    assert max(abs(a[s] - b[s]) for s in a) < 2e-5 * max(a.values())
    x, y = weights(tmp_path / "runs" / "one"), weights(tmp_path / "runs" / "two")
    assert max((x[k] - y[k]).abs().max() for k in x) < 1e-4


def test_a_mask_token_in_the_data_ends_the_run_with_a_letter(tiny_base, tmp_path):
    """Invariant 14 in a run: the text of a conversation cannot contain it, a chat template's can."""
    made = recipe(tiny_base, tmp_path)
    made["model"]["conversions"] = [{"name": "mask_token", "token": "<|im_start|>"}]
    with pytest.raises(UserError, match=r"data\.train\[0\]: row \d+ contains the mask token \(id 1\)"):
        fit(resolve(made))
