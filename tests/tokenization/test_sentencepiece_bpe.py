"""What continued BPE promises for SentencePiece (spec C.4), on small models of every style."""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt.components import TokenizerMethodChoice
from adapt.config.decode import decode
from adapt.tokenization import sentencepiece_proofs as proofs
from adapt.tokenization.sentencepiece_bpe import missing_characters
from adapt.tokenization.sentencepiece_model import BYTE, NORMAL, Pieces, SentencePiece
from adapt.tokenization.sentencepiece_rules import PieceRules
from tests.tokenization.byte_level import ENGLISH, PORTUGUESE
from tests.tokenization.piece_models import STYLES, base, extended, filter_of, learned, words

UNICODE = st.text(
    st.one_of(st.sampled_from("açãoéõíú e\t\n  ́▁"), st.characters(exclude_categories=["Cs"])), max_size=50
) | st.lists(st.sampled_from([*PORTUGUESE.split(" "), "\n", " ", "  ", "🙂", "e\u0301", "日本", "12"])).map(" ".join)
PLAIN = st.lists(st.sampled_from([*PORTUGUESE.split(), *ENGLISH.split(), "", "é", "ç"])).map(" ".join)
"""Texts on which the normaliser of `tokenizers` (by grapheme) is that of sentencepiece."""


def naive(base: SentencePiece, num_tokens: int, *texts: str) -> Pieces:
    """Everything taken apart again by sentencepiece itself after each new piece: slow, and clear."""
    counted = words(base, *texts)
    allowed = filter_of(base)
    result = Pieces()
    for letter, count in missing_characters(counted, base, 2)[:num_tokens]:
        result.merges.append(("", letter))
        result.tokens.append(letter)
        result.counts.append(count)
    while len(result.tokens) < num_tokens:
        now = base.grown(Pieces(tokens=result.tokens, scores=base.next_scores(len(result.tokens))))
        pairs: Counter[tuple[int, int]] = Counter()
        for word, ids in zip(counted, now.bare().encode(list(counted), out_type=int), strict=True):
            for a, b in itertools.pairwise(ids):
                pairs[a, b] += counted[word]
        pieces = [piece.piece for piece in now.proto.pieces]
        found = [
            (-count, pair)
            for pair, count in pairs.items()
            if count >= 2 and all(now.types[i] == NORMAL for i in pair) and allowed(pieces[pair[0]] + pieces[pair[1]])
        ]
        if not found:
            break
        count, (a, b) = min(found)
        result.merges.append((pieces[a], pieces[b]))
        result.tokens.append(pieces[a] + pieces[b])
        result.counts.append(-count)
    result.scores.extend(base.next_scores(len(result.tokens)))
    return result


@pytest.mark.parametrize("style", STYLES)
def test_the_fast_learner_equals_one_that_asks_sentencepiece_after_each_piece(style):
    assert learned(base(style), 60) == naive(base(style), 60)


LETTERS = st.lists(st.text(st.sampled_from("abcd"), min_size=1, max_size=8), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(LETTERS, st.integers(1, 30))
def test_equal_to_the_slow_one_where_pieces_are_made_in_several_ways(texts, n):
    """Few letters: the same piece from different halves, and new halves that make an old piece."""
    text = " ".join(texts)
    assert learned(_letters(), n, text) == naive(_letters(), n, text)


@settings(max_examples=60, deadline=None)
@given(LETTERS, st.integers(1, 30), st.text(st.sampled_from("abcd "), max_size=40))
def test_both_files_agree_where_pieces_are_made_in_several_ways(texts, n, other):
    found = learned(_letters(), n, " ".join(texts))
    new = _letters().grown(found)
    assert new.unreachable(found.tokens) == []
    assert proofs.both_alike(new, [other]) == []
    assert proofs.boundaries_only_removed(_letters(), new, [other]) == []


def _letters() -> SentencePiece:
    """The base's letters, and pieces of four of them that nothing below makes alone."""
    if not hasattr(_letters, "made"):
        tokens = ["cd", "bc", "abcd", "dda", "bcda"]
        _letters.made = base().grown(Pieces(tokens=tokens, scores=base().next_scores(len(tokens))))
    return _letters.made


@pytest.mark.parametrize("style", STYLES)
def test_every_old_piece_keeps_its_id_score_and_type(style):
    assert proofs.pieces_kept(base(style), extended(style)) == []
    ids = [extended(style).ids[t] for t in learned(base(style), 50).tokens]
    assert ids == list(range(base(style).next_id, base(style).next_id + 50))


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60, deadline=None)
@given(text=UNICODE)
def test_boundaries_are_only_removed(style, text):
    """With that, the number of tokens never rises; except where an unknown run is no longer one."""
    old, new = base(style), extended(style)
    assert proofs.boundaries_only_removed(old, new, [text]) == []
    if STYLES[style].get("byte_fallback"):
        ((before, _),), ((after, _),) = proofs.boundaries(old, [text]), proofs.boundaries(new, [text])
        assert len(after) <= len(before)
        assert (len(after) and after[-1]) == (len(before) and before[-1])


@pytest.mark.parametrize("style", [s for s in STYLES if s != "no_bytes"])
@settings(max_examples=60, deadline=None)
@given(text=UNICODE)
def test_sentencepiece_and_tokenizers_give_the_same_ids(style, text):
    """C.4.6. Texts with a special token aside (`lines_of`)."""
    new = extended(style)
    lines = proofs.lines_of(new, [text])
    assert proofs.both_alike(new, lines) == proofs.both_alike(base(style), lines) == []


@settings(max_examples=60, deadline=None)
@given(PLAIN)
def test_they_do_with_a_normaliser_too(text):
    assert proofs.both_alike(extended("no_bytes"), [text]) == []
    decomposed = unicodedata.normalize("NFD", text)
    assert extended("no_bytes").processor().encode(decomposed) == extended("no_bytes").processor().encode(text)


@pytest.mark.parametrize("style", STYLES)
def test_new_pieces_are_reached_and_old_ones_as_before(style):
    old, new = base(style), extended(style)
    assert new.unreachable(new.vocab[t] and t for t in learned(old, 50).tokens) == []
    normal = [p for p, i in old.vocab.items() if old.types[i] == NORMAL]
    before = {p: ids for p, ids in zip(normal, old.bare().encode(normal), strict=True) if ids != [old.vocab[p]]}
    after = {p: ids for p, ids in zip(normal, new.bare().encode(normal), strict=True) if ids != [old.vocab[p]]}
    assert before.keys() == after.keys()


@pytest.mark.parametrize("lowest", [-300.0, -1e9, -3e38])
def test_new_scores_are_distinct_and_below_the_old_ones(lowest):
    """Mistral's runs of spaces have -1e9, where float32 has no whole numbers left."""
    old = _with_score(base("whitespace"), "▁▁", lowest)
    new = old.grown(learned(old, 50))
    assert proofs.scores_below(old, new) == []
    read = type(new.proto)()
    read.ParseFromString(new.stored)
    scores = np.array([p.score for p in read.pieces[old.next_id :]], np.float32)
    assert (np.diff(scores) < 0).all()
    assert scores[0] < lowest
    assert proofs.boundaries_only_removed(old, new, ["é   não  configuração", PORTUGUESE]) == []


def _with_score(base: SentencePiece, piece: str, score: float) -> SentencePiece:
    proto = type(base.proto)()
    proto.CopyFrom(base.proto)
    proto.pieces[base.vocab[piece]].score = score
    return SentencePiece(proto, proto.SerializeToString(), base.data, base.text)


def test_the_same_words_in_any_order_give_the_same_pieces():
    lines = PORTUGUESE.splitlines()
    assert learned(base(), 50, *lines) == learned(base(), 50, *lines[::-1])


def test_no_tokens_are_the_same_bytes():
    assert base().grown(learned(base(), 0)) is base()


def test_twenty_and_then_thirty_are_fifty():
    first = base().grown(learned(base(), 20))
    assert first.grown(learned(first, 30)).stored == extended().stored
    assert first.grown(learned(first, 30)).text == extended().text
    assert learned(base(), 50).first(20) == learned(base(), 20)


@pytest.mark.parametrize("style", STYLES)
def test_texts_come_back_as_often_as_before(style):
    texts = [PORTUGUESE, "🙂 e\u0301", "a\tb", "x   y", "日本", "\ud83d".encode("utf-8", "replace").decode()]
    for tool in (SentencePiece.processor, SentencePiece.tokenizer):
        old, new = tool(base(style)), tool(extended(style))
        for text in texts:
            ids = [t.encode(text) if tool is SentencePiece.processor else t.encode(text).ids for t in (old, new)]
            if old.decode(ids[0]) == text:
                assert new.decode(ids[1]) == text


def test_frequent_characters_without_a_piece_get_one_first():
    old = base()
    found = learned(old, 50)
    letters = [c for c, n in missing_characters(words(old), old, 2)]
    assert found.tokens[: len(letters)] == letters
    assert {"ã", "ç"} <= set(letters)
    assert found.counts[0] == PORTUGUESE.count(letters[0])
    new = extended()
    ids = new.processor().encode("não")
    assert not any(new.types[i] == BYTE for i in ids)


def test_pieces_follow_the_flags_of_the_trainer():
    rules = PieceRules(16, True, True, True, True, False)
    allowed = ["▁a", "ab", "1", "é", "e\u0301", "日本", "カー", "...", "▁e\u0301"]
    refused = ["a▁", "a▁b", "▁▁", "▁", "a1", "12", "aб", "日a", "a.", "x" * 17, "a\tb", "▁1"]
    assert [p for p in allowed if not rules.allows(p)] == []
    assert [p for p in refused if rules.allows(p)] == []
    loose = PieceRules(20, False, False, False, False, False)
    assert all(loose.allows(p) for p in ["a1", "12", "aб", "a▁b", "x" * 17])
    assert not loose.allows("a▁")
    numbers = PieceRules(16, False, False, True, True, False)
    assert numbers.allows("a1")
    assert not PieceRules(16, False, True, True, True, False).allows("a1")
    suffix = PieceRules(16, True, True, True, True, True)
    assert suffix.allows("a▁")
    assert not suffix.allows("▁a")


@pytest.mark.parametrize("style", STYLES)
def test_the_trainer_itself_makes_only_pieces_that_the_rules_allow(style):
    model = base(style)
    made = [p for p, i in model.vocab.items() if model.types[i] == NORMAL and p.strip("▁") and len(p) > 1]
    assert [p for p in made if not model.rules.allows(p)] == []
    assert len(made) > 50


def test_decomposed_text_is_learned_from_as_the_model_normalises_it():
    nfd = unicodedata.normalize("NFD", PORTUGUESE)
    assert learned(base("no_bytes"), 50, nfd) == learned(base("no_bytes"), 50)
    found = learned(base(), 50, nfd)  # identity: marks are characters of their own
    assert "\u0303" in found.tokens
    assert any("\u0303" in token and len(token) > 1 for token in found.tokens)


def test_a_lone_surrogate_is_no_text():
    counted = words(base(), "n\ud800ão não")
    assert counted == words(base(), "n?ão não")
    assert learned(base(), 5, "n\ud800ão não " * 4).tokens


@pytest.mark.parametrize("style, symbols", [("user", ("<sep>", "[INST]")), ("control", ("<mask>", "<s>"))])
def test_user_defined_symbols_and_specials_are_in_no_new_piece(style, symbols):
    found = learned(base(style), 50, "não{}não {}é ".format(*symbols) * 9 + PORTUGUESE)
    assert not [t for t in found.tokens if set(t) & set("<>[]")]
    if style == "user":
        new = base(style).grown(found)
        assert new.vocab["<sep>"] in new.processor().encode("não<sep>é")


def test_new_pieces_are_of_the_scripts_that_are_asked_for():
    text = PORTUGUESE + " Москва слова слова Москва 日本 日本" * 3
    some = [
        decode({"name": "continued_bpe", "scripts": names}, TokenizerMethodChoice).build()
        for names in (["Latin"], None)
    ]
    latin, every = (method(base(), words(base(), text), 60).tokens for method in some)
    assert latin
    assert all(unicodedata.name(c).startswith("LATIN") for piece in latin for c in piece if c.isalpha())
    assert any("日" in piece or "М" in piece for piece in every)
