"""`layers: auto`: the layers that are hardest to imitate keep their attention, the same ones wherever a run goes on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from adapt.config import resolve
from adapt.conversion import transfer_errors as measuring
from adapt.conversion.base import apply_conversions, plan_conversions
from adapt.conversion.lawcat import Lawcat, LawcatConfig
from adapt.conversion.layer_map import AutoMap, planned
from adapt.conversion.transfer_errors import transfer_errors
from adapt.errors import StopRequested, UserError
from adapt.pretrained import load_config, load_model, load_tokenizer
from adapt.train.deliver import export_run
from adapt.train.fit import fit
from adapt.train.validate import check, problems
from tests import tiny
from tests.batches import packed
from tests.pretrained.recipes import recipe
from tests.ranks import on_ranks
from tests.recipes import tiny_recipe
from tests.train.test_fit import assert_same_run, launch, losses, stop_after

HARD = 1
AUTO = {"name": "lawcat", "layers": "auto", "auto_steps": 12, "gate_bias": 6}


@torch.no_grad()
def made_hard(model, layer: int = HARD):
    """`layer` looks single tokens up; the others take the mean of what they see, which is what a recurrence does."""
    for index, block in enumerate(model.model.layers):
        block.self_attn.q_proj.weight.mul_(12.0 if index == layer else 0.0)
    return model


@torch.no_grad()
def made_easy(model, but: int):
    """All layers `but` one have the same queries, keys and values at every token, by their biases."""
    for index, block in enumerate(model.model.layers):
        if index != but:
            a = block.self_attn
            for p in (a.q_proj, a.k_proj, a.v_proj):
                p.weight.zero_()
                p.bias.fill_(0.5)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    made_hard(tiny.tiny_model(num_hidden_layers=4)).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


def text(steps: int):
    return [packed([[40, 24], [64]], seed=i) for i in range(steps)]


def auto(name: str = "lawcat", **over):
    from adapt.conversion.mamba2 import Mamba2, Mamba2Config

    kind, config = (Lawcat, LawcatConfig) if name == "lawcat" else (Mamba2, Mamba2Config)
    fields = {"layers": "auto", "auto_steps": 12} | ({"gate_bias": 6} if name == "lawcat" else {})
    return kind(config(**fields | over), seed=3, rows=text)


@pytest.mark.parametrize("name", ["lawcat", "mamba2"])
@pytest.mark.parametrize("hard", [1, 3])
def test_the_layer_made_hard_to_imitate_keeps_its_attention(name, hard):
    model = made_easy(tiny.tiny_model("qwen2", num_hidden_layers=4), but=hard)
    found = auto(name).decide(model, tiny.tiny_tokenizer())
    errors = found["errors"]
    assert found["layers"] == [i for i in range(4) if i != hard]
    assert all(errors[hard] > 10 * errors[i] for i in found["layers"]), errors
    assert f"layers {hard} keep their attention" in found["text"]


def test_what_is_measured_falls_with_steps_and_touches_nothing():
    """The layers do learn; neither the teacher nor recurrences that were there before move."""
    model = Lawcat(LawcatConfig(layers=(2,), gate_bias=6), seed=3).apply(tiny.tiny_model(num_hidden_layers=3), None)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    made = auto(attention_share=0.3)
    short, long = (
        transfer_errors(
            made.started(model, planned(model.config, "gated_linear", (0, 1), made.options(model.config)), None),
            text(n),
            (0, 1),
            seed=0,
        )
        for n in (2, 80)
    )
    assert all(long[i] < 0.9 * short[i] for i in (0, 1)), (short, long)
    found = made.decide(model, None)
    assert found["errors"][2] is None
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())
    assert not model.training
    assert model.config._attn_implementation != "adapt"


def test_a_layer_that_diverges_is_the_hardest(monkeypatch):
    monkeypatch.setattr(measuring, "RATE", 1e30)
    model = tiny.tiny_model(num_hidden_layers=2)
    found = auto(attention_share=0.5).decide(model, None)
    assert all(0 < e <= measuring.WORST for e in found["errors"])


def test_the_student_is_the_one_of_the_list(base):
    """Bit for bit: measuring leaves no trace."""
    (one, other) = (
        apply_conversions(made, load_model(made), load_tokenizer(made), decided)
        for made, decided in (
            (resolve(run_recipe(base, base.parent)).recipe, {}),
            (resolve(run_recipe(base, base.parent, {"layers": [0, 2, 3]})).recipe, {}),
        )
    )
    assert one.config.token_mixers == other.config.token_mixers
    assert one.config.transfer_errors[HARD] == max(one.config.transfer_errors)
    theirs = other.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in one.state_dict().items())


def test_keep_is_part_of_what_stays():
    model = made_hard(tiny.tiny_model(num_hidden_layers=4))
    assert auto(keep=(3,)).decide(model, None)["layers"] == [0, 1, 2]  # a quarter is one layer, and it is named
    found = auto(keep=(3,), attention_share=0.5).decide(model, None)
    assert found["layers"] == [0, 2]
    assert found["errors"][3] is None


def test_beside_latent_layers(base, tmp_path):
    """Zebra-Llama's layers, and of the others the hardest keeps its attention."""
    made = run_recipe(base, tmp_path, {"name": "mamba2", "gate_bias": None})
    made["model"]["conversions"].insert(0, {"name": "xecomla", "layers": [0], "kv_rank": 16})
    made = resolve(made).recipe
    student = apply_conversions(made, load_model(made), load_tokenizer(made))
    latent, *errors = student.config.transfer_errors
    assert latent is None
    wanted = ["attention" if e == max(errors) else "mamba2" for e in errors]
    assert student.config.token_mixers == ["latent", *wanted]


@given(
    st.lists(st.floats(0, 10), min_size=2, max_size=12).flatmap(
        lambda e: st.tuples(st.just(e), st.integers(1, len(e) - 1))
    )
)
def test_those_that_stay_have_the_largest_errors(case):
    errors, stay = dict(enumerate(case[0])), case[1]
    found = AutoMap(tuple(errors), stay)
    chosen, kept = found.easiest(errors), set(errors) - set(found.easiest(errors))
    assert len(kept) == stay == len(errors) - len(found.spread())
    assert min(errors[i] for i in kept) >= max(errors[i] for i in chosen)


def run_recipe(base, folder, conversion=None, **over):
    made = {k: v for k, v in (AUTO | (conversion or {})).items() if v is not None}
    over = {
        "model": {"base": str(base), "conversions": [made]},
        "objective": {"name": "attention_transfer"},
        "trainable": {"include": ["*.recurrence.*"]},
        "evaluation": {"suites": ["bpb"], "limit": 2},
        "generation": {"prompts": ["the model"], "samplers": ["ar"], "max_new_tokens": 4},
        "trainer": {"steps": 3},
    } | over
    return tiny_recipe(base, folder, **over)


def disagreeing(base, folder):
    """On a rank: what it measures itself is not what the others do."""
    made = resolve(run_recipe(base, folder)).recipe
    if dist.get_rank() == 1:
        measuring.transfer_errors = lambda student, batches, layers, seed: {i: float(i == 2) for i in layers}
    decided = {}
    student = apply_conversions(made, load_model(made), load_tokenizer(made), decided)
    assert student.config.token_mixers.index("attention") == HARD
    assert decided["model.conversions[0]"]["layers"] == [0, 2, 3]


def test_ranks_that_measure_otherwise_convert_the_same_layers(base, tmp_path):
    on_ranks(2, tmp_path, disagreeing, base, tmp_path)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ADAPT_CACHE", str(folder / "cache"))
        assert fit(resolve(run_recipe(base, folder))) == 0
    return folder / "runs" / "tiny"


def test_the_choice_is_told_logged_and_exported(run):
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["token_mixers"] == ["gated_linear", "attention", "gated_linear", "gated_linear"]
    errors = config["transfer_errors"]
    assert errors[HARD] == max(errors)
    log = (run / "log.txt").read_text()
    assert "model.conversions[0]: layers 1 keep their attention" in log
    assert f"{HARD} {errors[HARD]:.3g}" in log


def test_a_run_that_goes_on_measures_nothing(base, run, tmp_path, monkeypatch, capsys):
    """Its checkpoints know; and it is the run that went straight through."""
    made = run_recipe(base, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 1)
        fit(resolve(made))
    monkeypatch.setattr(measuring, "transfer_errors", lambda *a: pytest.fail("measured again"))
    assert fit(resolve(made), "yes") == 0
    assert_same_run(run, tmp_path / "runs" / "tiny")
    assert "layers 1 keep their attention" in capsys.readouterr().out
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "runs" / "tiny", moved)
    assert export_run(moved, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["token_mixers"][HARD] == "attention"


def test_two_ranks_train_the_layers_of_one(base, run, tmp_path):
    made = run_recipe(base, tmp_path)
    made["trainer"] |= {"devices": 2, "microbatch": 1}
    done = launch(made, tmp_path)
    assert done.returncode == 0, done.stderr
    a, b = losses(run), losses(tmp_path / "runs" / "tiny")
    assert max(abs(a[s] - b[s]) / a[s] for s in a) < 1e-4
    exported = (tmp_path / "runs" / "tiny" / "export" / "config.json").read_text()
    assert json.loads(exported)["token_mixers"][HARD] == "attention"


def test_it_is_planned_without_weights(base, tmp_path):
    """As many layers as there will be; nothing is measured, nothing loaded."""
    made = recipe(base, conversions=[{"name": "lawcat", "layers": "auto"}])
    config, _ = plan_conversions(made, load_config(made.model), None)
    assert config.token_mixers == ["gated_linear"] * 3 + ["attention"]
    with torch.device("meta"):
        empty = tiny.tiny_model(num_hidden_layers=4)
    student = apply_conversions(made, empty, None)
    assert student.config.token_mixers == config.token_mixers
    assert all(p.is_meta for p in student.parameters())
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base / "config.json", bare)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, bare)
    report = check(resolve(run_recipe(bare, tmp_path)))
    assert {p.where for p in report.problems} == {"model.base"}  # which has no weights


BEFORE = {"name": "mamba2", "layers": [0]}
REFUSED = {
    "keep names more": ({"keep": [0, 1]}, ".keep", "names 2 layers, and of 4 only 1 keep their attention"),
    "nothing left": ({"keep": [0], "attention_share": 0.9}, ".attention_share", "lower 0.9"),
    "a share without auto": ({"layers": "all", "attention_share": 0.5}, "", "attention_share=0.5 is how many"),
    "a share of all": ({"attention_share": 1.0}, "", "attention_share=1.0 must be above 0 and below 1"),
    "no steps": ({"auto_steps": 0}, "", "auto_steps=0 must be 1 or more"),
    "keep auto": ({"keep": "auto"}, ".keep", "'auto' is no layer map"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(case, base, tmp_path):
    wish, where, words = REFUSED[case]
    found = [p for p in problems(resolve(run_recipe(base, tmp_path, wish))) if words in p.what]
    assert [p.where for p in found] == [f"model.conversions[0]{where}"]


def test_conversions_that_name_layers_come_before(base, tmp_path):
    made = run_recipe(base, tmp_path)
    made["model"]["conversions"].append(BEFORE)
    (found,) = [p for p in problems(resolve(made)) if "put model.conversions[1] (mamba2) first" in p.what]
    assert found.where == "model.conversions[0]"
    made["model"]["conversions"].reverse()
    assert not problems(resolve(made))


def test_latent_layers_are_not_chosen_so(base, tmp_path):
    made = run_recipe(base, tmp_path, trainable={}, objective={"name": "next_token"})
    made["model"]["conversions"] = [{"name": "xecomla", "layers": "auto", "kv_rank": 16}]
    (found,) = problems(resolve(made))
    assert found.where == "model.conversions[0].layers"
    assert "for lawcat and mamba2" in found.what


def test_text_with_tokens_of_a_later_conversion_is_refused(base):
    model, batch = tiny.tiny_model(), packed([[64]])
    batch.input_ids[0, 3] = 500
    with pytest.raises(UserError, match="token 500, and the model only 320 rows so far"):
        Lawcat(LawcatConfig(layers="auto", attention_share=0.5), seed=3, rows=lambda n: [batch]).decide(model, None)
