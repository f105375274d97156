"""`adapt generate` on tiny model folders: what is printed, what is refused."""

from __future__ import annotations

import argparse
import io
import json

import pytest

from adapt.errors import UserError
from adapt.generation import verb
from adapt.generation.base import Event, Generation
from adapt.generation.terminal import Stream, order_view, pieces
from tests import tiny

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A model folder as an export leaves it: block size and mask token in its config, tau in its generation config."""
    folder = tiny.save_tiny(tmp_path_factory.mktemp("generate") / "model")
    for name, extra in (("config", {"block_size": 8, "mask_token_id": 3}), ("generation_config", {"threshold": 0.25})):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    return folder


def run(*argv) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.generate(parser.parse_args([str(a) for a in argv]))


def expected(folder, sampler, new, **fields) -> Generation:
    from transformers import AutoModelForCausalLM

    from adapt.components import samplers

    model = AutoModelForCausalLM.from_pretrained(folder)
    entry = samplers[sampler]
    return entry.factory(entry.config_type(**fields)).generate(
        model, tiny.tiny_tokenizer()(PROMPT)["input_ids"], max_new_tokens=new, eos_ids=(0,)
    )


def test_an_adapted_model_decodes_by_block_diffusion(adapted, capfd):
    assert run(adapted, "--prompt", PROMPT, "--max-new-tokens", 20) == 0
    out, err = capfd.readouterr()
    result = expected(adapted, "block_diffusion", 20, threshold=0.25)
    assert out == tiny.tiny_tokenizer().decode(result.tokens, skip_special_tokens=True) + "\n"
    figures = (
        f"{len(result.tokens)} tokens, {result.forwards} forwards, {result.tokens_per_forward:.2f} tokens per forward"
    )
    assert err.startswith(f"block_diffusion: {figures}, ")


def test_a_plain_model_decodes_autoregressively(tiny_base, capfd):
    run(tiny_base, "--prompt", PROMPT, "--max-new-tokens", 20)
    out, err = capfd.readouterr()
    assert out == tiny.tiny_tokenizer().decode(expected(tiny_base, "ar", 20).tokens, skip_special_tokens=True) + "\n"
    assert "1.00 tokens per forward" in err


def test_settings_reach_the_sampler(adapted, capfd):
    run(adapted, "--prompt", PROMPT, "--block-size", 1, "--max-new-tokens", 12)
    one = capfd.readouterr().out
    run(adapted, "--prompt", PROMPT, "--sampler", "ar", "--max-new-tokens", 12)
    assert capfd.readouterr().out == one
    drawn = []
    for seed in (1, 1, 2):
        run(adapted, "--prompt", PROMPT, "--temperature", 1.5, "--top-p", 0.95, "--seed", seed, "--max-new-tokens", 24)
        drawn.append(capfd.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


def test_rules_reach_the_sampler(adapted, capfd):
    run(adapted, "--prompt", PROMPT, "--rule", "topk", "--steps", 2, "--sub-block", 4, "--max-new-tokens", 16)
    out, err = capfd.readouterr()
    result = expected(adapted, "block_diffusion", 16, rule="topk", steps=2, sub_block=4)
    assert out == tiny.tiny_tokenizer().decode(result.tokens, skip_special_tokens=True) + "\n"
    assert f"{len(result.tokens)} tokens, {result.forwards} forwards" in err


def test_stop_strings(adapted, capfd):
    run(adapted, "--prompt", PROMPT, "--max-new-tokens", 20)
    whole = capfd.readouterr().out.removesuffix("\n")
    stop = next(whole[i : i + 2] for i in range(5, len(whole)) if "\ufffd" not in whole[i : i + 2])
    run(adapted, "--prompt", PROMPT, "--max-new-tokens", 20, "--stop", "not in there", "--stop", stop)
    out, err = capfd.readouterr()
    assert out == whole[: whole.find(stop)] + "\n"
    assert "stopped by --stop" in err


def test_prompt_from_stdin_chat_and_order(adapted, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    run(adapted, "--prompt", "-", "--max-new-tokens", 9, "--show-order")
    out, err = capfd.readouterr()
    run(adapted, "--prompt", PROMPT, "--max-new-tokens", 9)
    assert capfd.readouterr().out == out
    assert "⁰" in err  # the AR head's tokens; the terminal of a test has no colours
    run(adapted, "--prompt", PROMPT, "--chat", "--max-new-tokens", 9)
    assert capfd.readouterr().out != out


def test_run_folder_means_its_export(adapted, tmp_path, capfd):
    (tmp_path / "config.yaml").write_text("run: {name: x}\n")
    with pytest.raises(UserError, match="no export yet"):
        run(tmp_path, "--prompt", PROMPT)
    (tmp_path / "export").symlink_to(adapted)
    run(tmp_path, "--prompt", PROMPT, "--max-new-tokens", 20)
    out = capfd.readouterr().out
    run(adapted, "--prompt", PROMPT, "--max-new-tokens", 20)
    assert capfd.readouterr().out == out


def test_empty_prompt_is_bos(adapted, capfd):
    assert run(adapted, "--prompt", "", "--max-new-tokens", 4) == 0
    assert "tokens" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("argv", "letter"),
    (
        (["--threshold", "1.5"], "threshold"),
        (["--threshold", "0"], "threshold"),
        (["--sampler", "ar", "--threshold", "0.5"], "threshold"),
        (["--sampler", "blok_diffusion"], "Did you mean 'block_diffusion'"),
        (["--rule", "confidenc"], "Did you mean 'confidence'"),
        (["--rule", "topk"], "needs steps"),
        (["--rule", "entropy", "--steps", "4"], "steps=4 means nothing"),
        (["--rule", "topk", "--steps", "0"], "steps=0"),
        (["--sub-block", "0"], "sub_block=0"),
        (["--sub-block", "9"], r"sub_block: 9 slots are more than a block has \(8\)"),
        (["--block-size", "0"], "block_size"),
        (["--stop", ""], "stop string is empty"),
        (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", "-3"], "negative"),
        (["--prompt", "fox " * 600], "512"),
    ),
)
def test_bad_input(adapted, argv, letter):
    with pytest.raises(UserError, match=letter):
        run(adapted, "--prompt", PROMPT, *argv)


def test_block_diffusion_of_a_plain_model_is_refused(tiny_base):
    with pytest.raises(UserError, match="mask_token_id"):
        run(tiny_base, "--prompt", PROMPT, "--sampler", "block_diffusion")


def test_a_tokenizer_with_another_mask_token_is_refused(adapted, tmp_path, capfd):
    import shutil

    folder = shutil.copytree(adapted, tmp_path / "model")
    tokenizer = tiny.tiny_tokenizer()
    other = type(tokenizer).from_pretrained(folder)
    other.mask_token = "<|im_start|>"
    other.save_pretrained(folder)
    with pytest.raises(UserError, match=r"mask_token_id=3 .*'<\|im_start\|>' is 1"):
        run(folder, "--prompt", PROMPT)


def test_self_speculation_writes_what_ar_writes(adapted, capfd):
    run(adapted, "--prompt", PROMPT, "--sampler", "ar", "--max-new-tokens", 20)
    one = capfd.readouterr().out
    run(adapted, "--prompt", PROMPT, "--sampler", "self_speculation", "--steps", 1, "--max-new-tokens", 20)
    out, err = capfd.readouterr()
    assert out == one
    assert err.startswith("self_speculation: ")


def test_missing_model_is_named_without_a_recipe_key():
    with pytest.raises(UserError, match="nowhere") as caught:
        run("./nowhere", "--prompt", PROMPT)
    assert "model.base" not in str(caught.value)


def test_stream_never_shows_half_a_character():
    tokenizer = tiny.tiny_tokenizer()
    text = "naïve 🙂 日本 end"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text)
    written = []
    stream = Stream(tokenizer, written.append)
    for i, token in enumerate(ids):
        stream(Event("reveal", (i,), (token,), 0))
        stream(Event("commit", (i,), (token,), 0))
    stream.finish()
    assert "".join(written) == text
    assert "\ufffd" not in "".join(written)
    assert len(written) > 5
    assert "".join(piece for piece, _ in pieces(tokenizer, ids)) == text


def test_order_view_has_every_character_and_step():
    tokenizer = tiny.tiny_tokenizer()
    ids = tokenizer("def add(a, b): 🙂")["input_ids"]
    order = [(i, i % 3) for i in range(len(ids))]
    generation = Generation(ids, 7, order, "length", 1.0)
    coloured = order_view(tokenizer, generation, colour=True)
    assert coloured.plain.startswith("def add(a, b): 🙂")
    counts = [sum(s == step for _, s in order) for step in range(3)]
    assert [f"AR head: {counts[0]}" in coloured.plain, f"step 2: {counts[2]}" in coloured.plain] == [True, True]
    assert len({span.style for span in coloured.spans}) >= 3
    plain = order_view(tokenizer, generation, colour=False).plain
    assert all(step in plain for step in "⁰¹²")


def test_helpers_import_without_torch():
    import subprocess
    import sys

    code = "import sys, adapt.generation.verb, adapt.evaluate.verb; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_eos_ids_are_collected():
    from adapt.generation.load import eos_ids

    model = tiny.tiny_model()
    model.generation_config.eos_token_id = [2, 5]
    assert eos_ids(model, tiny.tiny_tokenizer()) == (0, 2, 5)
