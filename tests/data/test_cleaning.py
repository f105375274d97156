"""Cleaning steps: what each repairs, what each drops and why, and what none may break."""

from __future__ import annotations

import dataclasses
import unicodedata
from array import array
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt.components import CleanerChoice, cleaners
from adapt.config.decode import decode
from adapt.data.cleaning.quality import STOP_WORDS, duplicate_ngrams, top_ngram
from adapt.data.cleaning.secrets import HINTS, KEYS, PASSWORDS
from adapt.data.documents import Document
from adapt.errors import UserError
from tests.data.cleaning import clean, step

PORTUGUESE = "Este manual descreve a configuração do sistema e explica como os arquivos são organizados no disco."
ENGLISH = "This manual describes the configuration of the system and explains how the files are arranged on disk."
GERMAN = "Dieses Handbuch beschreibt die Einrichtung des Systems und erklärt, wie die Dateien auf der Platte liegen."
FORMS = [
    Document(id="a", text="x é y"),
    Document(id="b", messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "é y"}]),
    Document(id="c", prompt="x é", response="y"),
    Document(id="d", prompt="x", chosen="é", rejected="y"),
]
CHOICES = {"language": {"name": "language", "keep": ["pt"], "among": ["en", "pt"]}}


def doc(text: str, **meta) -> Document:
    return Document(id="x", text=text, meta=meta)


def choice(name: str):
    return CHOICES.get(name, name)


@pytest.mark.parametrize("name", cleaners.names())
@pytest.mark.parametrize("form", FORMS, ids=lambda d: d.id)
def test_every_step_takes_every_form_and_changes_no_original(name, form):
    before = repr(form)
    result = step(choice(name))(form)
    assert repr(form) == before
    assert isinstance(result, str) or (result.id, len(list(result.strings()))) == (form.id, len(list(form.strings())))


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=300), name=st.sampled_from(cleaners.names()))
def test_a_step_drops_keeps_or_changes_any_text(text, name):
    document = doc(text)
    result = step(choice(name))(document)
    assert isinstance(result, Document | str)
    if isinstance(result, Document) and result.text == text and result.meta == document.meta:
        assert result is document  # the engine counts changes by identity


@pytest.mark.parametrize("name", sorted({*cleaners.names()} - {"lines"}))
def test_only_steps_that_remember_are_sequential(name):
    assert not step(choice(name)).sequential


def test_unknown_keys_and_names_are_named():
    with pytest.raises(UserError, match="Did you mean 'quality'"):
        step("qualty")
    with pytest.raises(UserError, match="no such key"):
        step({"name": "length", "min_word": 3})


# unicode


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("a configuraÃ§Ã£o", "a configuração"),
        ("donâ€™t", "don’t"),
        ("cafe\u0301", "café"),
        ("a\x00b\x07c\x1b[0md", "abcd"),
        ("one\r\ntwo\u2028three\x0cfour", "one\ntwo\nthree\nfour"),
        ("soft\u00adhyphen \ufeffmark", "softhyphen mark"),
        ("“quotes” ﬁne &amp; １２", "“quotes” ﬁne &amp; １２"),
    ],
)
def test_unicode_repairs_damage_and_leaves_typography(text, repaired):
    assert step("unicode")(doc(text)).text == repaired


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_unicode_is_idempotent(text):
    once = step("unicode")(doc(text))
    assert step("unicode")(once) is once
    assert unicodedata.is_normalized("NFC", once.text)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in once.text)


WORDS = ["não", "coração", "informações", "útil", "português", "você", "à", "país", "ênfase", "avô", "pinguïm", "Índia"]


@given(st.lists(st.sampled_from(WORDS), min_size=2, max_size=9))
def test_unicode_undoes_mojibake(words):
    text = f"uma {' e '.join(words)} bela"
    assert step("unicode")(doc(text.encode().decode("latin-1"))).text == text


def test_unicode_options():
    assert step({"name": "unicode", "mojibake": False})(doc("Ã© \x00")).text == "Ã© "
    assert step({"name": "unicode", "form": "NFKC"})(doc("ﬁ")).text == "fi"
    assert step({"name": "unicode", "form": None})(doc("cafe\u0301")).text == "cafe\u0301"


# length, language


def test_length_counts_words():
    few = step({"name": "length", "min_words": 2, "max_words": 3})
    assert few(doc("one")) == "too short"
    assert few(doc("one two three four")) == "too long"
    kept = doc("one two")
    assert few(kept) is kept


def test_language_keeps_what_is_wanted():
    only = step({"name": "language", "keep": ["pt"]})
    kept = doc(PORTUGUESE)
    assert only(kept) is kept
    assert only(doc(ENGLISH)) == "language en"
    assert only(doc(GERMAN)) == "language de"
    chat = Document(id="x", messages=[{"role": "user", "content": ENGLISH}, {"role": "assistant", "content": ENGLISH}])
    assert only(chat) == "language en"


def test_language_of_short_text_is_undecided():
    short = doc("Ok, yes.")
    assert step({"name": "language", "keep": ["pt"]})(short) is short
    strict = step({"name": "language", "keep": ["pt"], "undecided": "drop"})
    assert strict(short) == "language undecided"
    doubtful = step({"name": "language", "keep": ["pt"], "undecided": "drop", "min_probability": 1.0})
    assert doubtful(doc(f"{PORTUGUESE} {ENGLISH}")) == "language undecided"


def test_language_takes_out_untranslated_paragraphs():
    by_paragraph = step({"name": "language", "keep": ["pt"], "among": ["en", "pt"], "unit": "paragraph"})
    mixed = doc(f"Título\n\n{PORTUGUESE}\n\n{ENGLISH}\n\n    ls -l")
    assert by_paragraph(mixed).text == f"Título\n\n{PORTUGUESE}\n\n    ls -l"
    assert by_paragraph(doc(f"Title\n\n{ENGLISH}")) == "no paragraph in the languages wanted"
    kept = doc(f"Título\n\n{PORTUGUESE}")
    assert by_paragraph(kept) is kept


def test_language_codes_are_checked():
    with pytest.raises(UserError, match="keep has 'xx', which is not known"):
        step({"name": "language", "keep": ["xx"]})
    with pytest.raises(UserError, match="among must contain"):
        step({"name": "language", "keep": ["pt"], "among": ["en"]})
    with pytest.raises(UserError, match="keep is empty"):
        step({"name": "language", "keep": []})


# quality

GOOD = "\n".join(f"{ENGLISH} Sentence number {n} says something that no other sentence {n * n} says, in its own way."
                 .replace("configuration", f"part{n}").replace("files", f"pages{n}x") for n in range(9))  # fmt: skip
OFF = {f.name: None for f in dataclasses.fields(cleaners["quality"].config_type)}
"""Every rule turned off."""
DEFAULTS = decode({"name": "quality"}, CleanerChoice).config


def only(rule: str, **more) -> dict:
    return {"name": "quality", **OFF, rule: getattr(DEFAULTS, rule), **more}


@pytest.mark.parametrize(
    ("rule", "text", "more"),
    [
        ("min_words", "the end of it", {}),
        ("max_words", GOOD, {"max_words": 60}),
        ("min_mean_word_length", "a b c d " * 20, {}),
        ("max_mean_word_length", "internationalisation " * 60, {}),
        ("max_symbol_ratio", "#tag word " * 30, {}),
        ("max_symbol_ratio", "word and so on… " * 30, {}),
        ("max_bullet_lines", "\n".join(f"- the item of list {n} and that" for n in range(20)), {}),
        ("max_ellipsis_lines", "\n".join(f"the teaser {n} of words and of that which ends..." for n in range(20)), {}),
        ("min_words_with_letter", "word 12345 6789 " * 30, {}),
        ("min_stop_words", "noun verb adjective " * 30, {"stop_words": "en"}),
        ("min_stop_words", PORTUGUESE * 5, {"stop_words": ["the", "of"]}),
    ],
)
def test_the_reason_is_the_rule_and_null_turns_it_off(rule, text, more):
    assert step(only(rule, **more))(doc(text)) == rule
    kept = doc(text)
    assert step(only(rule, **more) | {rule: None})(kept) is kept


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("max_duplicate_lines", "\n".join([*["so it is with all of these"] * 8, *GOOD.splitlines()])),
        ("max_duplicate_line_characters", "\n".join([*[ENGLISH] * 9, *GOOD.splitlines()])),
        ("max_duplicate_paragraphs", "\n\n".join([*["so\nit"] * 8, *GOOD.splitlines()])),
        ("max_duplicate_paragraph_characters", "\n\n".join([*[ENGLISH] * 9, *GOOD.splitlines()])),
        ("max_top_ngrams", "see there " * 60 + GOOD),
        ("max_duplicate_ngrams", " ".join([ENGLISH] * 3) + GOOD),
    ],
)
def test_repetition_has_a_rule_for_every_unit(rule, text):
    assert step(only(rule))(doc(text)) == rule
    assert isinstance(step({"name": "quality", **OFF})(doc(text)), Document)


def test_good_prose_passes_every_rule():
    kept = doc(GOOD)
    assert step({"name": "quality", "stop_words": "en", "max_duplicate_ngrams": None})(kept) is kept


def test_stop_words_are_known_languages_or_a_list():
    with pytest.raises(UserError, match="known are de, en"):
        step({"name": "quality", "stop_words": "xx"})
    assert all(len(words.split()) >= 8 for words in STOP_WORDS.values())


def test_ngram_shares_are_those_of_the_definition():
    words = ["a", "b", "c", "a", "b", "d"]
    assert top_ngram(words, 2) == 2 * 2 / 6
    assert top_ngram(["a", "b", "c", "d"], 2) == 0
    assert duplicate_ngrams(words, 2) == 2 / 6
    assert duplicate_ngrams(["a", "a", "a", "a", "a", "a"], 2) == 5 / 6
    assert duplicate_ngrams([], 5) == top_ngram([], 3) == 0


@given(st.lists(st.sampled_from("ab"), max_size=30), st.integers(2, 6))
def test_shares_lie_between_nothing_and_everything(words, n):
    assert 0 <= duplicate_ngrams(words, n) <= 1


# lines


def test_lines_seen_before_are_removed_once_kept():
    menu, one, two = "menu of the site " * 4, "the first page says this " * 4, "the second page says that " * 4
    first, second = clean([doc(f"{menu}\n{one}"), doc(f"{menu.upper()}\n\n\n{two}")], ["lines"])[0]
    assert first.text == f"{menu}\n{one}"
    assert second.text == two


def test_short_and_indented_lines_and_conversations_stay():
    text = "Heading\n    int function(int a, int b, int c, int d, int e);"
    chat = [{"role": "assistant", "content": "the same long answer " * 5}]
    kept, _ = clean([doc(text), doc(text), Document(id="m", messages=chat), Document(id="n", messages=chat)], ["lines"])
    assert [d.text for d in kept] == [text, text, None, None]
    assert kept[3].messages == chat


def test_documents_of_seen_lines_are_dropped():
    line = "a line that is long enough to be remembered by the step"
    kept, dropped = clean([doc(line), doc(f"{line}\nshort")], ["lines"])
    assert [d.text for d in kept] == [line]
    assert dropped["lines"] == Counter({"only lines seen before": 1})


LONG = st.integers(0, 12).map(lambda n: f"line number {n} of the book, long enough to be remembered")


@given(st.lists(st.lists(LONG, min_size=1, max_size=6), max_size=8))
def test_no_line_is_kept_twice(documents):
    kept, _ = clean([doc("\n".join(lines)) for lines in documents], [{"name": "lines", "min_words": 1}])
    lines = [line for d in kept for line in d.text.split("\n") if line]
    assert len(lines) == len(set(lines))
    assert set(lines) == {line for document in documents for line in document}


@given(st.lists(st.lists(LONG, min_size=1, max_size=6), max_size=8), st.integers(0, 8))
def test_lines_go_on_from_their_memory(documents, cut):
    whole = [doc("\n".join(lines)) for lines in documents]
    through = step("lines")
    expected = [through(d) for d in whole]
    first, second = step("lines"), step("lines")
    assert first.sequential
    results = [first(d) for d in whole[:cut]]
    second.restore(array("Q", first.memory))
    results += [second(d) for d in whole[cut:]]
    assert results == expected
    assert second.memory == through.memory


# secrets

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def planted(alphabet: str, size: int):
    return st.text(alphabet=alphabet, min_size=size, max_size=size)


SECRETS = st.one_of(
    planted("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", 16).map(lambda x: f"AKIA{x}"),
    planted(LETTERS, 36).map(lambda x: f"ghp_{x}"),
    planted(LETTERS, 40).map(lambda x: f"github_pat_{x}"),
    planted(LETTERS, 20).map(lambda x: f"glpat-{x}"),
    planted(LETTERS, 24).map(lambda x: f"xoxb-{x}"),
    planted(LETTERS, 24).map(lambda x: f"sk_live_{x}"),
    planted(LETTERS, 35).map(lambda x: f"AIza{x}"),
    planted(LETTERS, 34).map(lambda x: f"hf_{x}"),
    planted(LETTERS, 36).map(lambda x: f"npm_{x}"),
    planted(LETTERS, 60).map(lambda x: f"pypi-AgEI{x}"),
    planted(LETTERS, 22).map(lambda x: f"SG.{x}.{x}{x[:20]}"),
    planted(LETTERS, 48).map(lambda x: f"sk-proj-{x}"),
    planted(LETTERS, 30).map(lambda x: f"eyJ{x}.eyJ{x}.{x}"),
    planted(LETTERS, 64).map(lambda x: f"-----BEGIN RSA PRIVATE KEY-----\n{x}\n-----END RSA PRIVATE KEY-----"),
    planted(LETTERS, 64).map(lambda x: f"-----BEGIN OPENSSH PRIVATE KEY-----\n{x}\n"),
    planted("abcdefghijklmnopqrstuvwxyz", 9).map(lambda x: f"{x}@{x}.example.org"),
)
AROUND = st.sampled_from(["", " ", "\n", "key: ", "(", '"', "= "])


@settings(max_examples=300, deadline=None)
@given(SECRETS, AROUND, AROUND, st.sampled_from(["text", "messages", "prompt"]))
def test_no_planted_secret_survives(secret, before, after, form):
    text = f"The log says {before}{secret}{after} here." if "BEGIN" not in secret else f"{before}{secret}{after}"
    document = {
        "text": doc(text),
        "messages": Document(
            id="x", messages=[{"role": "user", "content": text}, {"role": "assistant", "content": "y"}]
        ),
        "prompt": Document(id="x", prompt=text, response="y"),
    }[form]
    cleaned = step("secrets")(document)
    said = "\n".join(cleaned.strings())
    core = max(secret.replace("-----", "\n").splitlines(), key=len)
    assert core not in said
    assert sum(cleaned.meta["secrets"].values()) >= 1
    assert step("secrets")(cleaned) is cleaned  # nothing in a placeholder looks like a secret


def test_secrets_become_their_placeholders():
    text = (
        "Write to Jane <jane.doe@mail.example.org> or bob@example.com.\npassword = 'correct-horse'\n"
        '"api_key": "0123456789abcdef"\ncurl https://root:hunter2hunter2@host/x\nThe password: see below.'
    )
    cleaned = step("secrets")(doc(text))
    assert cleaned.text == (
        'Write to Jane <EMAIL> or <EMAIL>.\npassword = "<SECRET>"\n"api_key": "<SECRET>"\n'
        "curl https://<CREDENTIALS>@host/x\nThe password: see below."
    )
    assert cleaned.meta["secrets"] == {"EMAIL": 2, "SECRET": 2, "CREDENTIALS": 1}


def test_kinds_of_secrets_can_be_left_alone():
    text = "jane@example.org AKIAIOSFODNN7EXAMPLE password='abcdefgh'"
    none = {"name": "secrets", "keys": False, "passwords": False, "emails": False}
    kept = doc(text)
    assert step(none)(kept) is kept
    assert step(none | {"emails": True})(kept).text == text.replace("jane@example.org", "<EMAIL>")


def test_ibans_by_their_check_digits_and_phone_numbers_on_request():
    text = "GB82 WEST 1234 5698 7654 32 and GB83 WEST 1234 5698 7654 32, call +49 30 1234 5678."
    kept = doc(text)
    assert step("secrets")(kept) is kept
    every = step({"name": "secrets", "ibans": True, "phones": True})
    assert every(kept).text == "<IBAN> and GB83 WEST 1234 5698 7654 32, call <PHONE>."


def test_public_keys_and_ordinary_words_are_no_secrets():
    text = (
        "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----\nrisk-averse, sk-learn, user@localhost, a@b, @ home"
    )
    kept = doc(text)
    assert step("secrets")(kept) is kept


def test_every_hint_belongs_to_a_pattern():
    assert set(HINTS) <= {*KEYS, *PASSWORDS, "EMAIL"}


def test_counts_of_two_runs_add_up():
    once = step("secrets")(doc("a@example.org"))
    again = step("secrets")(dataclasses.replace(once, text=f"{once.text} b@example.org"))
    assert again.meta["secrets"] == {"EMAIL": 2}
