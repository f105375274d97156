"""What continued BPE promises, on small tokenizers of every byte-level style."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt.data.documents import BadRecord, Document
from adapt.errors import UserError
from adapt.tokenization.byte_bpe import BYTES, ByteBpe, added_pattern, piece_bytes, unreachable
from adapt.tokenization.continued_bpe import LOW, SHIFT, Filter, Learned, learn, merged
from adapt.tokenization.words import WordWork, count_words
from tests.tokenization.byte_level import (
    ENGLISH,
    PORTUGUESE,
    SPECIALS,
    STYLES,
    base,
    extended,
    filter_of,
    learned,
    words,
)

UNICODE = st.text(
    st.one_of(st.sampled_from("açãoéõíú e\t\n  ́"), st.characters(exclude_categories=["Cs"])), max_size=50
) | st.lists(st.sampled_from([*PORTUGUESE.split(" "), *SPECIALS, "\n", " ", "🙂", "e\u0301", "日本"])).map(" ".join)


def boundaries(tokenizer, text: str) -> set[int]:
    """Where one token ends and another begins, in bytes of the decoded text."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    ends, position = set(), 0
    for i in ids:
        piece = tokenizer.id_to_token(i)
        position += len(piece.encode()) if piece in SPECIALS else len(piece_bytes(piece))
        ends.add(position)
    return ends


def naive(counts: Counter[str], bpe: ByteBpe, num_tokens: int, allowed) -> Learned:
    """Every pair counted again after each merge, every word tokenised again from its letters: slow, and clear."""
    ids = dict(bpe.vocab)
    ranks = {ids[a] << SHIFT | ids[b]: (rank, ids[a + b]) for rank, (a, b) in enumerate(bpe.merges)}
    result = Learned()
    while len(result.tokens) < num_tokens:
        pieces = {i: piece for piece, i in ids.items()}
        pairs: Counter[int] = Counter()
        for word, count in counts.items():
            symbols = merged([ids[letter] for letter in word], ranks)
            for a, b in itertools.pairwise(symbols):
                pairs[a << SHIFT | b] += count
        candidates = []
        for pair, count in pairs.items():
            made = pieces[pair >> SHIFT] + pieces[pair & LOW]
            if count >= 2 and ((made in ids and made not in bpe.added) or allowed(made)):
                candidates.append((-count, pair, made))
        if not candidates:
            break
        count, pair, made = min(candidates)
        result.merges.append((pieces[pair >> SHIFT], pieces[pair & LOW]))
        result.counts.append(-count)
        if made not in ids:
            ids[made] = bpe.next_id + len(result.tokens)
            result.tokens.append(made)
        ranks[pair] = (len(ranks), ids[made])
    return result


@pytest.mark.parametrize("style", STYLES)
def test_the_fast_learner_equals_one_that_counts_everything_again(style):
    bpe = base(style)
    assert learned(bpe, 50) == naive(words(bpe), bpe, 50, filter_of(bpe))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.sampled_from("abcd"), min_size=1, max_size=8), min_size=1, max_size=12), st.integers(1, 30))
def test_equal_to_the_slow_one_where_merges_make_tokens_that_exist(texts, n):
    """Four letters only: many pairs make a token that another pair made, and old merges run after new ones."""
    bpe = _letters()
    counts = Counter(texts)
    assert learn(counts, bpe, n, lambda piece: True) == naive(counts, bpe, n, lambda piece: True)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.sampled_from("abcd"), min_size=1, max_size=8), min_size=1, max_size=12), st.integers(0, 8))
def test_the_first_tokens_are_those_of_a_smaller_extension(texts, n):
    counts = Counter(texts)
    assert learn(counts, _letters(), 12, lambda piece: True).first(n) == learn(
        counts, _letters(), n, lambda piece: True
    )


@given(st.text(st.sampled_from("abcd"), min_size=1, max_size=30))
def test_our_merging_is_that_of_the_tokenizers_library(text):
    bpe = _letters()
    ranks = {bpe.vocab[a] << SHIFT | bpe.vocab[b]: (rank, bpe.vocab[a + b]) for rank, (a, b) in enumerate(bpe.merges)}
    assert merged([bpe.vocab[c] for c in text], ranks) == bpe.segmenter().encode(text).ids


def _letters() -> ByteBpe:
    vocab = {c: i for i, c in enumerate(["a", "b", "c", "d", "ab", "bc", "abc", "cd", "bcd", "dab"])}
    merges = [["a", "b"], ["c", "d"], ["b", "c"], ["a", "bc"], ["b", "cd"], ["d", "ab"]]
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return ByteBpe.parse(json.dumps({"model": model, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": []}))


def test_some_merges_make_a_token_that_exists_and_cost_no_vocabulary():
    found = learn(Counter({"abcd": 5, "abc": 3}), _letters(), 3, lambda piece: True)
    assert len(found.merges) > len(found.tokens)
    assert not set(found.tokens) & set(_letters().vocab)


@pytest.mark.parametrize("style", STYLES)
def test_ids_and_ranks_of_old_tokens_and_merges_stay(style):
    old, new = base(style), extended(style)
    assert all(new.ids[token] == i for token, i in old.ids.items())
    assert new.merges[: len(old.merges)] == old.merges
    assert sorted(new.ids.values()) == list(range(len(old.ids) + 50))


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=50, deadline=None)
@given(text=UNICODE)
def test_boundaries_are_only_removed(style, text):
    old, new = base(style).tokenizer(), extended(style).tokenizer()
    assert boundaries(new, text) <= boundaries(old, text)
    if not any(i >= base(style).next_id for i in new.encode(text).ids):
        assert new.encode(text).ids == old.encode(text).ids
    assert new.decode(new.encode(text).ids, skip_special_tokens=False) == old.decode(
        old.encode(text).ids, skip_special_tokens=False
    )


@pytest.mark.parametrize("style", STYLES)
def test_every_new_token_is_reached(style):
    """By the merges alone, whether or not whole words may bypass them."""
    old, new = base(style), extended(style)
    tokens = [token for token, i in new.vocab.items() if i >= old.next_id]
    assert len(tokens) == 50
    assert unreachable(new, tokens) == []
    bypassing = new.segmenter(ignore_merges=True)
    assert [bypassing.encode(t).ids for t in tokens] == [[new.vocab[t]] for t in tokens]


def test_an_appended_vocabulary_is_found_unreachable():
    """What most guides do: tokens whose parts no merge can make."""
    assert unreachable(base().extended([], ["the", "xyzzy"]), ["the", "xyzzy"]) == ["xyzzy"]


@pytest.mark.parametrize("style", STYLES)
def test_specials_above_the_vocabulary_keep_their_ids_after_loading(style):
    """Without their entry in the model's vocabulary they would be renumbered, onto new words (spec B.3.2)."""
    new = extended(style)
    loaded = new.tokenizer()
    for special, i in base(style).added.items():
        assert loaded.token_to_id(special) == i
        assert loaded.encode(f"não{special}é", add_special_tokens=False).ids.count(i) == 1
    again = json.loads(loaded.to_str())
    assert {t["content"]: t["id"] for t in again["added_tokens"]} == base(style).added
    assert len(set(loaded.get_vocab().values())) == len(loaded.get_vocab()) == loaded.get_vocab_size()


@pytest.mark.parametrize("style", STYLES)
def test_text_comes_back_as_often_as_before(style):
    old, new = base(style).tokenizer(), extended(style).tokenizer()
    for text in (
        PORTUGUESE,
        "🙂👩‍👩‍👧",
        "a\u0303o coração",
        "\t\t  x\n\n",
        "日本語",
        "\ud800".encode("utf-8", "replace").decode(),
    ):
        assert new.decode(new.encode(text).ids) == old.decode(old.encode(text).ids)


def test_the_order_of_the_corpus_changes_nothing():
    lines = PORTUGUESE.splitlines()
    random.Random(0).shuffle(lines)
    assert learned(base(), 40, *lines) == learned(base(), 40, *PORTUGUESE.splitlines())


def test_nothing_to_add_leaves_the_file_byte_for_byte():
    assert base().extended([], []).text == base().text


@pytest.mark.parametrize("style", STYLES)
def test_extending_twice_is_extending_once_by_the_sum(style):
    first = learned(base(style), 25)
    half = base(style).extended(first.merges, first.tokens)
    second = learned(half, 25)
    assert half.extended(second.merges, second.tokens).data == extended(style).data


def test_a_corpus_that_is_too_small_gives_fewer_tokens():
    found = learned(base(), 10_000)
    assert 0 < len(found.tokens) < 10_000
    assert min(found.counts) >= 2


def test_what_may_not_become_a_token():
    allowed = Filter(max_token_bytes=9, digits=False, forbidden=frozenset(["<|end|>", "coração"]))
    letters = {b: c for c, b in BYTES.items()}
    piece = lambda text: "".join(letters[b] for b in text.encode())  # noqa: E731
    assert allowed(piece(" ação"))
    for refused in ("  ", "\n\n", "a1", "<|x", "x|>", "coração", "abcdefghij"):
        assert not allowed(piece(refused)), refused
    assert Filter(max_token_bytes=6, digits=True, forbidden=frozenset())(piece("a1"))
    assert not Filter(max_token_bytes=64, digits=False, forbidden=frozenset(["coração"]))(piece("coração"))


def test_decomposed_text_is_counted_as_the_tokenizer_normalises_it():
    """NFD passes Qwen's NFC first; the others have no normaliser and see the letters as they come."""
    import unicodedata

    decomposed = unicodedata.normalize("NFD", PORTUGUESE)
    assert words(base("qwen"), decomposed) == words(base("qwen"), PORTUGUESE)
    assert words(base("gpt2"), decomposed) != words(base("gpt2"), PORTUGUESE)


def test_added_tokens_in_the_corpus_are_cut_out_and_not_learned_from():
    assert words(base(), "não <|end|> é") == words(base(), "não ", " é")
    assert added_pattern([]) is None


def test_invalid_unicode_does_not_stop_the_count():
    assert words(base(), "n\ud800o")


class _Texts:
    where = "texts"

    def __init__(self, *texts: str):
        self.texts = texts

    def documents(self):
        yield BadRecord("texts:1", "no text")
        for i, text in enumerate(self.texts):
            yield Document(id=str(i), text=text)


def test_workers_count_what_one_process_counts(monkeypatch):
    monkeypatch.setattr("adapt.data.workers.START", 1)
    monkeypatch.setattr("adapt.tokenization.words.BATCH", 100)
    from adapt.components import CleanerChoice
    from adapt.config.decode import decode

    cleaners = tuple(decode(name, CleanerChoice) for name in ("unicode", "lines"))
    texts = [f"{ENGLISH} número {i}" for i in range(6)]
    one, two = (count_words(_Texts(*texts), WordWork(base().text, base().added, cleaners), n) for n in (1, 2))
    assert one == two
    assert one[0].total() > 0
    part = count_words(_Texts(*texts), WordWork(base().text, base().added), 1, max_bytes=100)
    assert part[1] < one[1] or part[0].total() < count_words(_Texts(*texts), WordWork(base().text, ()), 1)[0].total()


def test_a_worker_that_dies_is_named_under_the_key_of_the_tokenizers_recipe(monkeypatch):
    monkeypatch.setattr("adapt.data.workers.START", 0)
    from adapt.components import CleanerChoice
    from adapt.config.decode import decode

    die = decode({"name": "tests.data.steps.die", "how": "kill"}, CleanerChoice)
    with pytest.raises(UserError, match="was killed by signal 9.* need less: workers=1; with workers=1") as refused:
        count_words(_Texts(ENGLISH, ENGLISH), WordWork(base().text, base().added, (die,)), 2)
    assert "goes on" not in str(refused.value)  # counting begins again


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "WordPiece"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "Unigram"),
        ({"model": {"byte_fallback": True}}, "byte_fallback"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix"),
        ({"model": {"dropout": 0.1}}, "dropout 0.1"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "over characters"),
        ({"pre_tokenizer": None, "normalizer": {"type": "ByteLevel"}}, "no pre-tokenizer"),
        ({"added_tokens": [{"id": 900, "content": " administração", "special": False}]}, "add_tokens"),
        ({"added_tokens": [{"id": 5, "content": "<|x|>", "special": True}]}, "two tokens have the id 5"),
        ({"added_tokens": [{"id": 900, "content": "a", "special": True}]}, "'a' has the id 900"),
    ],
)
def test_what_cannot_be_extended_is_refused_by_name(changes, told):
    data = json.loads(base("gpt2").text)
    data["model"] |= changes.pop("model", {})
    with pytest.raises(UserError, match=re.escape(told)) as refused:
        ByteBpe.parse(json.dumps(data | changes))
    assert refused.value.problems[0].where == "base"


def test_folders_without_a_usable_file_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        ByteBpe.read(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="SentencePiece"):
        ByteBpe.read(tmp_path)
    for text, told in (
        ("{", "not valid JSON"),
        ("[]", "holds no tokenizer"),
        (_without_a_letter(), "cannot be loaded"),
    ):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=told):
            ByteBpe.read(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        ByteBpe.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text(base().text)
    assert ByteBpe.read(tmp_path).data == base().data


def _without_a_letter() -> str:
    data = json.loads(base("gpt2").text)
    del data["model"]["vocab"]["t"]
    return json.dumps(data)


def test_merges_written_as_text_are_read_too():
    """The old form; pairs are written as lists, since a piece may hold a space (spec B.3.9)."""
    data = json.loads(base("gpt2").text)
    data["model"]["merges"] = [" ".join(m) for m in data["model"]["merges"]]
    old = ByteBpe.parse(json.dumps(data))
    assert old.merges == base("gpt2").merges
    assert old.extended([("t", "x")], ["tx"]).data["model"]["merges"][-1] == ["t", "x"]


def test_words_with_bytes_that_the_vocabulary_lacks_are_left_out():
    """They would be lost, and their neighbours would seem adjacent."""
    assert learn(Counter({"aéb": 9}), _letters(), 3, lambda piece: True) == Learned()


def test_a_source_without_text_is_told():
    with pytest.raises(UserError, match="no text"):
        count_words(_Texts(), WordWork(base().text, base().added), 1)
