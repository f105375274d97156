"""The `scripts` of continued BPE: letters of other scripts make no tokens, parts of characters follow their character."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.components import TokenizerMethodChoice
from adapt.config.decode import decode
from adapt.errors import UserError
from adapt.tokenization.byte_bpe import piece_bytes
from adapt.tokenization.scripts import Scripts
from tests.tokenization.byte_level import PORTUGUESE, base, words

MIXED = PORTUGUESE + "конфигурация системы, конфигурация; 日本語の日本語。 नमस्ते नमस्ते\n" * 4
LATIN, HAN = Scripts(["Latin"]), Scripts(["Han"])
ANY = st.characters(exclude_categories=["Cs"])


@pytest.mark.parametrize("text", ["ação", " ação", "a,b", "1a", "e\u0301", "🙂", "“a”", "µ", "\n\n", ""])
def test_latin_and_what_is_used_with_every_script(text):
    assert LATIN(text.encode())


@pytest.mark.parametrize("text", ["я", "aя", "日", "。", "ー", "α", " न", "\ue000"])
def test_other_scripts(text):
    assert not LATIN(text.encode())


def test_what_is_used_with_a_few_scripts_belongs_to_those():
    assert HAN("。日".encode())
    assert not HAN("aー".encode())
    assert Scripts(["Katakana"])("ラー".encode())


def test_common_alone_leaves_no_letters():
    allowed = Scripts(["Common"])
    assert allowed(b", ")
    assert not allowed(b"a")


def test_part_of_a_character_passes_where_a_character_that_passes_has_it():
    assert HAN(b"\xe6\x97")  # 日 is e6 97 a5
    assert HAN(b"\x97\xa5")
    assert HAN("日".encode() + b"\xe6\x9c")
    assert not LATIN(b"\xe6\x97")
    assert not HAN(b"\xe0\xa4")  # begins Devanagari only
    assert Scripts(["Devanagari"])(b"\xe0\xa4")
    assert LATIN(b" \xc3")
    assert not LATIN(b"\xd0")  # begins Cyrillic only
    assert not LATIN(b"a\xff")
    assert not LATIN(b"\xc3a")  # is in no text


@given(st.text(ANY, min_size=1, max_size=4), st.data())
def test_every_part_of_an_allowed_text_is_allowed(text, data):
    """So no allowed token is out of reach because what it is made of may not be made."""
    piece = text.encode()
    start = data.draw(st.integers(0, len(piece) - 1))
    end = data.draw(st.integers(start + 1, len(piece)))
    for allowed in (LATIN, HAN):
        assert not allowed(piece) or allowed(piece[start:end])


@given(st.text(ANY, max_size=6))
def test_a_text_is_allowed_as_its_characters_are(text):
    assert LATIN(text.encode()) == all(LATIN(c.encode()) for c in text)


def _letters(scripts):
    method = decode({"name": "continued_bpe", "scripts": scripts}, TokenizerMethodChoice).build()
    tokens = method(base(), words(base(), MIXED), 500).tokens
    return {c for t in tokens for c in piece_bytes(t).decode("utf-8", "ignore") if unicodedata.category(c)[0] == "L"}


def _written_in(letters, name):
    return {c for c in letters if unicodedata.name(c).startswith(name)}


def test_learning_keeps_to_the_scripts():
    assert _written_in(every := _letters(None), "CYRILLIC")
    assert _written_in(every, "CJK")
    latin = _letters(["Latin"])
    assert _written_in(latin, "LATIN") == latin
    assert latin > set("açã")
    assert _written_in(han := _letters(["Han"]), "CJK") == han != set()
    assert _written_in(_letters(["Devanagari"]), "DEVANAGARI") > set("नम")


@pytest.mark.parametrize(
    ("scripts", "told"), [(["Lattin"], "'Lattin' is no Unicode"), (["Lu}"], "no Unicode"), ([], r"scripts=\[\]")]
)
def test_what_is_no_script_is_refused(scripts, told):
    with pytest.raises(UserError, match=told):
        decode({"name": "continued_bpe", "scripts": scripts}, TokenizerMethodChoice)
