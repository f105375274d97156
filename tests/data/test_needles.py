"""Generated texts: as long as asked, with what is to be found in them once, where it should be."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt.data import needles
from adapt.data.needles import Haystack, Passkeys, draw_needles, fit, key_of, niah, passkey_text, split_of, trial_rng
from adapt.data.questions import Asker
from adapt.errors import UserError
from tests import tiny

ESSAY = "It was a long day. Nobody had seen the harbour so empty! Why had they come? The boats lay still. " * 30


@pytest.fixture(scope="module")
def asker():
    return Asker(tiny.tiny_tokenizer())


@settings(max_examples=25, deadline=None)
@given(length=st.integers(300, 700), depth=st.floats(0, 1), key=st.integers(10_000, 99_999))
def test_a_passkey_row_has_exactly_the_tokens_asked_for(length, depth, key):
    asker = Asker(tiny.tiny_tokenizer())
    trial = Passkeys(asker.count)(length, depth, key, str(key))
    assert asker.count(trial.prompt, str(key)) == length


@settings(max_examples=50, deadline=None)
@given(size=st.integers(0, 5000), depth=st.floats(0, 1), key=st.integers(10_000, 99_999))
def test_a_passkey_stands_once_at_its_depth_in_five_lines(size, depth, key):
    trial = passkey_text(key, size, depth)
    _, before, needle, after, question = lines = trial.prompt.split("\n")
    assert len(lines) == 5
    assert needle == f"The pass key is {key}. Remember it. {key} is the pass key."
    assert trial.prompt.count(needle) == 1
    assert (len(before), len(before) + len(after)) == (round(size * depth), size)
    assert question.endswith("The pass key is")
    assert str(key) not in before + after + question


def test_training_and_held_out_keys_are_disjoint():
    rng = trial_rng(0, 1)
    train, held_out = ({key_of(rng, split) for _ in range(5000)} for split in ("train", "held-out"))
    assert not train & held_out
    assert ({split_of(k) for k in train}, {split_of(k) for k in held_out}) == ({"train"}, {"held-out"})
    assert {len(str(k)) for k in train | held_out} == {5}


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_both_halves_of_the_keys_have_every_digit_in_every_place(split):
    """As often as the other half: a model trained on one has no digit to learn for the other."""
    keys = [str(k) for k in range(needles.FIRST_KEY, needles.LAST_KEY + 1)]
    for place in range(5):
        for digit in "0123456789"[place == 0 :]:
            with_it = [k for k in keys if k[place] == digit]
            share = sum(split_of(int(k)) == split for k in with_it) / len(with_it)
            assert share == pytest.approx(0.5, abs=0.03), (place, digit)


def test_a_prompt_that_cannot_be_so_short(asker):
    with pytest.raises(UserError, match="20 are too few"):
        Passkeys(asker.count)(20, 0.5, 12345, "12345")


@settings(max_examples=50)
@given(slope=st.integers(1, 9), base=st.integers(0, 50), room=st.integers(0, 3000), guess=st.integers(0, 2000))
def test_fit_finds_the_largest_size_from_any_guess(slope, base, room, guess):
    def tokens(size):
        return base + size // slope

    size = fit(tokens, base + room, "it", guess)
    assert tokens(size) <= base + room < tokens(size + 1)


@pytest.mark.parametrize("haystack", (Haystack.noise(), Haystack.essays(ESSAY)), ids=("noise", "essay"))
@pytest.mark.parametrize("kind", ("number", "uuid"))
def test_needles_stand_once_each_at_their_depth(asker, haystack, kind):
    parts = [0, 2, 4]
    found = draw_needles(trial_rng(3, 1), haystack, kind, parts, 5)
    trial, size = niah(haystack, found, found[1:2], kind, 900, asker.count)
    text = trial.prompt.split("\n", 1)[1]
    for needle, part in zip(found, parts, strict=True):
        line = f"One of the special magic {kind}s for {needle.key} is: {needle.value}."
        assert text.count(line) == trial.prompt.count(needle.value) == 1
        assert part / 5 <= needle.depth <= (part + 1) / 5
    pieces = haystack.cut(size)
    assert len(pieces) == size
    before = text[: text.index(f"One of the special magic {kind}s for {found[1].key} ")]
    count = sum(before.count(piece) for piece in set(haystack.pieces))
    assert count == pytest.approx(found[1].depth * size, abs=1)
    assert trial.answers == (found[1].value,)
    assert len({n.key for n in found}) == 3


def test_needles_of_essays_stand_at_forty_percentiles():
    haystack = Haystack.essays(ESSAY)
    assert len(haystack.depths) == 40
    assert (min(haystack.depths), max(haystack.depths)) == (0, 1)
    parts = [haystack.places(part, 10) for part in range(10)]
    assert sorted(d for places in parts for d in places) == list(haystack.depths)
    assert all(parts)


def test_niah_is_the_longest_that_fits(asker):
    haystack = Haystack.noise()
    found = draw_needles(trial_rng(0, 2), haystack, "number", [0], 1)
    trial, size = niah(haystack, found, found, "number", 500, asker.count)
    longer = needles.niah_text(haystack, found, found, size + 1, "number")
    assert asker.count(trial.prompt, found[0].value) <= 500 < asker.count(longer.prompt, found[0].value)


def test_values_are_seven_digits_or_uuids():
    rng = trial_rng(0)
    assert all(re.fullmatch(r"\d{7}", needles.value_of(rng, "number")) for _ in range(50))
    assert all(
        re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", needles.value_of(rng, "uuid")) for _ in range(9)
    )


def test_everything_is_a_function_of_the_seed():
    one, two, other = (draw_needles(trial_rng(s, 5), Haystack.noise(), "uuid", [0, 1], 2) for s in (1, 1, 2))
    assert one == two != other
