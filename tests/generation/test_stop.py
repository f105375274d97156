"""Stop strings: the text ends before the first of them, whatever blocks and tokens it spans."""

from __future__ import annotations

import pytest
import torch

from adapt.components import samplers
from adapt.errors import UserError
from adapt.generation.contract import Contract
from adapt.generation.stop import Stop
from adapt.generation.terminal import Stream, text_of
from tests import tiny
from tests.generation.reference import tell

PROMPT = [17, 45, 200, 31, 99, 7, 120]
NEW = 30


def decode(tokens: list[int]) -> str:
    return text_of(tiny.tiny_tokenizer(), tokens)


def build(name: str, **fields):
    entry = samplers[name]
    return entry.factory(entry.config_type(**fields))


@pytest.fixture(scope="module")
def model():
    return tell(tiny.tiny_model("llama", seed=5, dtype=torch.float64), Contract(), 8)


@pytest.mark.parametrize("name", ("ar", "block_diffusion"))
def test_every_piece_of_the_text_as_a_stop_string(model, name):
    """All substrings of up to 6 characters: inside a token, over token and block boundaries, at the very start."""
    sampler = build(name)
    free = sampler.generate(model, PROMPT, max_new_tokens=NEW)
    text, tried = decode(free.tokens), 0
    for start in range(0, len(text), 2):
        for length in (1, 3, 6):
            stop = text[start : start + length]
            if "\ufffd" in stop or not stop:
                continue
            tried += 1
            events = []
            got = sampler.generate(
                model,
                PROMPT,
                max_new_tokens=NEW,
                stop=["nowhere to be found", stop],
                decode=decode,
                on_event=events.append,
            )
            assert got.text == text[: text.find(stop)]
            assert got.stopped_by == "stop"
            assert got.tokens == free.tokens[: len(got.tokens)]
            assert got.text.startswith(decode(got.tokens)), "only tokens that lie wholly before it"
            longer = decode(free.tokens[: len(got.tokens) + 1])
            assert len(longer) > len(got.text) or not text.startswith(longer)
            committed = [t for e in events if e.kind == "commit" for t in e.tokens]
            assert committed == got.tokens, "nothing is told that is taken back"
            assert got.forwards <= free.forwards
    assert tried > 10


def test_the_earliest_of_several_wins_and_none_changes_nothing(model):
    sampler = build("block_diffusion")
    free = sampler.generate(model, PROMPT, max_new_tokens=NEW)
    assert free.text is None
    text = decode(free.tokens)
    places = [i for i in range(len(text)) if "\ufffd" not in text[i : i + 2]]
    early, late = text[places[3] :][:2], text[places[-3] :][:2]
    got = sampler.generate(model, PROMPT, max_new_tokens=NEW, stop=[late, early], decode=decode)
    assert len(got.text) == min(text.find(early), text.find(late))
    other = sampler.generate(model, PROMPT, max_new_tokens=NEW, stop=["not in it at all"], decode=decode)
    assert (other.tokens, other.text, other.stopped_by) == (free.tokens, text, "length")


def test_batch_equals_each_row_alone(model):
    sampler = build("block_diffusion")
    prompts = [PROMPT, PROMPT[:3], PROMPT[::-1], PROMPT[2:]]
    text = decode(sampler.generate(model, PROMPT, max_new_tokens=NEW).tokens)
    stop = [next(c for c in text[len(text) // 2 :] if c != "\ufffd")]
    together = sampler.generate_batch(model, prompts, max_new_tokens=NEW, stop=stop, decode=decode)
    for prompt, row in zip(prompts, together, strict=True):
        alone = sampler.generate(model, prompt, max_new_tokens=NEW, stop=stop, decode=decode)
        assert (row.tokens, row.text, row.stopped_by, row.forwards) == (
            alone.tokens,
            alone.text,
            alone.stopped_by,
            alone.forwards,
        )
    assert len({row.stopped_by for row in together}) == 2 or len({len(row.tokens) for row in together}) > 1


def test_an_eos_before_the_stop_string_ends_the_text(model):
    sampler = build("ar")
    free = sampler.generate(model, PROMPT, max_new_tokens=NEW).tokens
    late = next(c for c in decode(free[6:]) if c not in decode(free[:6]) + "\ufffd")
    got = sampler.generate(model, PROMPT, max_new_tokens=NEW, stop=[late], decode=decode, eos_ids=(free[5],))
    assert (got.stopped_by, got.text) == ("eos", decode(got.tokens))


def test_a_stream_shows_no_beginning_of_a_stop_string():
    """Token by token: what may become a stop string is held back, and shown when it does not."""
    tokenizer = tiny.tiny_tokenizer()
    stop = Stop.of(["<end>", "\n\n"], decode)
    from adapt.generation.rows import Row

    shown: list[str] = []
    stream = Stream(tokenizer, shown.append)
    text = "a <e b\nc <en"
    tokens = tokenizer(text + "d> never")["input_ids"]
    row = Row(0, [5], 99, False, frozenset(), torch.Generator(), stream, stop)
    for token in tokens:
        if row.result is None:
            row.commit([token])
            seen = "".join(shown)
            assert text.startswith(seen) or seen == ""
            assert not seen.endswith("<en")
    stream.finish(row.result.text)
    assert "".join(shown) == row.result.text == "a <e b\nc "
    assert row.result.stopped_by == "stop"


def test_what_is_sure():
    stop = Stop.of(["abc", "b!"], decode)
    for text, sure in (
        ("xab", 1),
        ("xa", 1),
        ("xb", 1),
        ("xc", 2),
        ("ab", 0),
        ("", 0),
        ("ab\ufffd", 0),
        ("x\ufffd", 1),
    ):
        assert stop.sure(text) == sure, text


def test_bad_stop_strings(model):
    sampler = build("ar")
    with pytest.raises(UserError, match="empty"):
        sampler.generate(model, PROMPT, max_new_tokens=4, stop=["a", ""], decode=decode)
    with pytest.raises(ValueError, match="decode"):
        sampler.generate(model, PROMPT, max_new_tokens=4, stop=["a"])
    with pytest.raises(ValueError, match="list"):
        sampler.generate(model, PROMPT, max_new_tokens=4, stop="ab", decode=decode)
