"""Parts taken out of a converted model, and put back."""

from __future__ import annotations

import json
import re

import pytest
import torch

from adapt.config import resolve
from adapt.config.schema import Lora
from adapt.errors import UserError
from adapt.evaluate.ablated import PARTS, recurrent, without
from adapt.models import attention
from adapt.objectives.base import Models
from adapt.train.fit import fit
from adapt.train.validate import problems
from tests import tiny
from tests.evaluate.test_suites import SETS, context, suite
from tests.models.linear import ids, student
from tests.recipes import tiny_recipe

SMALL = {"lengths": [260], "depths": 2, "trials": 1}


def hybrid(mixer="gated_linear"):
    return student(mixer, layers=(0, 2), num_hidden_layers=3)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("mixer", ["gated_linear", "mamba2"])
@pytest.mark.parametrize(("part", "silent"), [("recurrent", (0, 2)), ("attention", (1,))])
def test_layers_without_output_leave_the_stream_alone(part, silent, mixer):
    model, tokens = hybrid(mixer), ids(2, 40)
    with without(model, part):
        found = logits(model, tokens)
    for i in silent:
        model.model.layers[i].self_attn.register_forward_hook(lambda m, a, out: (torch.zeros_like(out[0]), out[1]))
    torch.testing.assert_close(found, logits(model, tokens), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mixer", ["gated_linear", "mamba2"])
def test_without_decays_nothing_is_forgotten(mixer):
    model, x = hybrid(mixer), torch.randn(1, 7, 32, dtype=torch.float64)
    recurrence = model.model.layers[0].self_attn.recurrence
    with torch.no_grad():
        assert (recurrence.log_decays(x) < 0).all()
        with without(model, "decays"):
            assert (recurrence.log_decays(x) == 0).all()


@pytest.mark.parametrize("mixer", ["gated_linear", "mamba2"])
def test_without_convolutions_tokens_pass_through(mixer):
    from adapt.models.short_convolution import ShortConvolution
    from adapt.models.tokens import Tokens

    model = hybrid(mixer)
    convolutions = [m for m in model.modules() if isinstance(m, ShortConvolution)]
    assert convolutions
    with torch.no_grad(), without(model, "convolutions"):
        for module in convolutions:
            x = torch.randn(2, 9, module.weight.shape[0], dtype=torch.float64)
            torch.testing.assert_close(module(x, Tokens())[0], x, atol=0, rtol=0)


@pytest.mark.parametrize("mixer", ["gated_linear", "mamba2"])
@pytest.mark.parametrize("part", PARTS)
def test_every_weight_comes_back_bit_for_bit(part, mixer):
    from adapt.pretrained.lora import add_lora

    model = add_lora(hybrid(mixer), Lora(rank=2, targets=("q_proj", "o_proj")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before, tokens = {n: p.detach().clone() for n, p in model.named_parameters()}, ids(1, 30)
    whole = logits(model, tokens)
    with pytest.raises(KeyError), without(model, part):
        assert (logits(model, tokens) - whole).abs().max() > 1e-4
        raise KeyError
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_silent_layer_has_no_adapter_that_speaks():
    from adapt.pretrained.lora import add_lora

    model = add_lora(hybrid(), Lora(rank=2, targets=("o_proj",)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        with without(model, "recurrent"):
            projection = model.model.layers[0].self_attn.o_proj
            assert not projection(torch.randn(3, 32, dtype=torch.float64)).any()


def beside(model, **over):
    def call(fn, *args):
        with torch.no_grad():
            return fn(Models(attention.use(model)), *args)

    return context(None, call=call, **over)


def test_the_whole_is_what_other_suites_measure():
    model = hybrid()
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in SMALL.items()}
    found = suite("ablation", **fields)(beside(model))
    assert {k.split("/")[1] for k in found} == {"whole", *PARTS}
    assert found["ablation/whole/passkey_nll"] == suite("passkey", **fields)(beside(model))["passkey_nll"]
    bpb = suite("bpb")(beside(model))
    for label in SETS:
        assert found[f"ablation/whole/bpb/{label}"] == bpb[f"bpb/{label}"]
        assert len({found[f"ablation/{part}/bpb/{label}"] for part in ("whole", *PARTS)}) == 5


def test_parts_a_model_has_not_are_left_out():
    fields = {**SMALL, "lengths": (260,), "parts": ("attention", "decays")}
    found = suite("ablation", **fields)(beside(student(layers=(0, 1))))
    assert {k.split("/")[1] for k in found} == {"whole", "decays"}
    with pytest.raises(UserError, match="no recurrent layers"):
        suite("ablation", **fields)(context(None, start={}))
    with pytest.raises(ValueError, match="parts="):
        suite("ablation", parts=("decays", "decays"))


def test_the_start_is_left_out_unless_asked_for():
    fields = {**SMALL, "lengths": (260,), "parts": ("decays",)}
    assert suite("ablation", **fields)(beside(hybrid(), start={})) == {}
    made = suite("ablation", **fields, at_start=True)
    found = made(beside(hybrid(), start={}))
    assert set(found) == set(made.config.metrics(None, list(SETS)))


def recipe(base, folder, conversions, suites):
    return tiny_recipe(
        base, folder,
        model={"base": str(base), "conversions": conversions},
        objective="next_token", trainer={"steps": 2},
        evaluation={"suites": suites, "limit": 2},
        generation={"prompts": [], "samplers": []},
    )  # fmt: skip


def test_a_run_measures_it_at_its_end_and_the_report_shows_it(tiny_base, tmp_path):
    suites = [{"name": "ablation", **SMALL}, {"name": "half_lives", "longest": 256}]
    made = recipe(tiny_base, tmp_path, [{"name": "lawcat", "layers": [0]}], suites)
    assert fit(resolve(made)) == 0
    run = tmp_path / "runs" / "tiny"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (line for line in lines if "eval/log2_half_life" in line)
    assert not [k for k in first if "ablation" in k]
    assert {k.split("/")[2] for k in last if "ablation" in k} == {"whole", *PARTS}
    html = (run / "report.html").read_text()
    section = html[html.index('<section id="ablation">') :]
    section = section[: section.index("</section>")]
    assert "without recurrent layers" in section
    assert section.count("<svg") == 2
    layers = html[html.index('<section id="layers">') :]
    words = re.findall(r">([^<>]+)</text>", layers[: layers.index("</section>")])
    assert [w for w in words if w.startswith("step ")] == ["step 0", "step 2"]
    assert "256" in words


@pytest.mark.parametrize("name", ["ablation", "half_lives"])
def test_models_without_recurrent_layers_are_refused(name, tiny_base, tmp_path):
    fields = SMALL if name == "ablation" else {}
    for conversions, wrong in (([], 1), ([{"name": "lawcat"}], 0)):
        made = recipe(tiny_base, tmp_path, conversions, [{"name": name, **fields}])
        assert sum("looks into recurrent layers" in p.what for p in problems(resolve(made))) == wrong


def test_layers_with_a_state_are_found():
    assert [i for i, _ in recurrent(hybrid())] == [0, 2]
    with pytest.raises(UserError, match="no recurrent layers"):
        recurrent(tiny.tiny_model())
