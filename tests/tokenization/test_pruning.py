"""What pruning promises, on small tokenizers of every byte-level style."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adapt.errors import UserError
from adapt.tokenization import prune_proofs
from adapt.tokenization.byte_bpe import BYTES, ByteBpe, unreachable
from adapt.tokenization.prune_proofs import come_back, compare, ids_compact, reached_as_before
from adapt.tokenization.pruning import Closure, choose, find, occurrences, pruned
from tests.tokenization.byte_level import ENGLISH, PORTUGUESE, SPECIALS, STYLES, base, words
from tests.tokenization.test_continued_bpe import UNICODE

VOCAB = 480
SOME = "the quick brown dog is in the documentation of another model, and numbers 12\n"
TEXT = UNICODE | st.lists(st.sampled_from([*ENGLISH.split(" "), *SPECIALS])).map(" ".join)


@cache
def old(style: str = "smollm2") -> ByteBpe:
    return base(style, VOCAB)


@cache
def new(style: str = "smollm2", strict: bool = False, text: str = SOME) -> ByteBpe:
    return pruned(old(style), kept(style, strict, text))


def kept(style: str = "smollm2", strict: bool = False, text: str = SOME) -> set[str]:
    return choose(Closure(old(style), strict=strict), occurrences(old(style), words(old(style), text)), 1, None)


def toy(merges: list[tuple[str, str]], **model) -> ByteBpe:
    """All bytes, these merges, and words of letters."""
    pieces = [*BYTES, *dict.fromkeys("".join(m) for m in merges)]
    data = json.loads(base("gpt2").text)
    data["model"] |= {"vocab": {p: i for i, p in enumerate(pieces)}, "merges": [list(m) for m in merges], **model}
    data["added_tokens"] = []
    return ByteBpe(data, json.dumps(data))


def tokens(bpe: ByteBpe, text: str) -> list[str]:
    names = {i: token for token, i in bpe.ids.items()}
    return [names[i] for i in bpe.tokenizer().encode(text, add_special_tokens=False).ids]


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_compact_in_the_old_order_and_no_token_is_lost_that_was_wanted(style):
    bpe = new(style)
    assert ids_compact(old(style), bpe) == []
    assert sorted(bpe.ids.values()) == list(range(len(bpe.ids)))
    assert {*SPECIALS, *BYTES} <= bpe.ids.keys()
    assert occurrences(old(style), words(old(style), SOME)).keys() <= bpe.ids.keys()
    assert 260 < len(bpe.ids) < len(old(style).ids) - 60
    assert all({a, b, a + b} <= bpe.vocab.keys() for a, b in bpe.merges)
    ranks = [old(style).merges.index(m) for m in bpe.merges]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("style", STYLES)
def test_kept_tokens_are_reached_as_before(style):
    assert reached_as_before(old(style), new(style)) == []
    assert unreachable(new(style), [t for t in new(style).vocab if t not in SPECIALS]) == []


@pytest.mark.parametrize("style", STYLES)
@given(text=TEXT)
def test_text_of_kept_tokens_has_the_same_tokens(style, text):
    before = tokens(old(style), text)
    if set(before) <= new(style).ids.keys():
        assert tokens(new(style), text) == before
    assert compare(old(style), new(style), [text]).changed == []


@pytest.mark.parametrize("style", STYLES)
@given(text=TEXT)
def test_every_text_comes_back(style, text):
    assert come_back(old(style), new(style), [text]) == []
    if style in ("gpt2", "llama3", "smollm2"):  # no prefix space, no normaliser
        tokenizer = new(style).tokenizer()
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("style", STYLES)
@given(text=TEXT)
def test_strict_boundaries_are_only_added(style, text):
    result = compare(old(style), new(style, True), [text])
    assert result.moved == result.fewer == result.changed == []
    assert len(tokens(new(style, True), text)) >= len(tokens(old(style), text))


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=40), st.data())
def test_strict_holds_for_any_corpus_and_any_tokens(corpus, data):
    """Small alphabets make merges compete. The tokenizer is learned, so that ranks rise."""
    from adapt.tokenization.continued_bpe import learn

    found = learn({"".join(corpus): 1}, toy([]), 12, lambda piece: True, 1)
    bpe = toy(found.merges)
    assume(len(bpe.merges) > 2)
    wanted = data.draw(st.sets(st.sampled_from(["".join(m) for m in bpe.merges])))
    text = data.draw(st.text("abcd", max_size=30))
    for strict in (False, True):
        less = pruned(bpe, Closure(bpe, strict=strict)(wanted))
        result = compare(bpe, less, [text], words=True)
        assert result.changed == []
        assert not strict or result.moved == result.fewer == []


def test_without_strict_a_text_may_have_fewer_tokens():
    """Why `strict` is there: BPE takes the first merge, and `ab` stood in the way of `bcd`."""
    bpe = toy([("a", "b"), ("b", "c"), ("bc", "d")])
    less = pruned(bpe, Closure(bpe)(["bcd"]))
    assert tokens(bpe, "abcd") == ["ab", "c", "d"]
    assert tokens(less, "abcd") == ["a", "bcd"]
    result = compare(bpe, less, ["abcd", "abc"])
    assert (result.fewer, result.moved) == (["abcd"], ["abcd", "abc"])
    assert "ab" in Closure(bpe, strict=True)(["bcd"])
    assert "ab" not in Closure(bpe, strict=True)(["c"])


def test_what_is_made_on_the_way_is_kept():
    bpe = toy([("a", "b"), ("c", "d"), ("ab", "cd"), ("abcd", "e"), ("b", "e")])
    assert Closure(bpe)(["abcde"]) == {*BYTES, "ab", "cd", "abcd", "abcde"}
    assert pruned(bpe, Closure(bpe)(["abcd"])).merges == [("a", "b"), ("c", "d"), ("ab", "cd")]


def test_a_token_with_several_merges_needs_those_that_run():
    """As vocabularies have them that came from tiktoken: every split of a token is a merge."""
    bpe = toy([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")])
    assert Closure(bpe)(["abc"]) == {*BYTES, "ab", "abc"}
    assert Closure(bpe, strict=True)(["abc"]) == {*BYTES, "ab", "abc"}
    assert tokens(pruned(bpe, Closure(bpe)(["abc"])), "abcabc") == ["abc", "abc"]


def test_a_whole_word_of_the_vocabulary_needs_no_merge_where_merges_are_ignored():
    bpe = toy([("a", "b"), ("c", "d")], ignore_merges=True)
    bpe.vocab["abdc"] = len(bpe.vocab)
    bpe = ByteBpe(bpe.data, json.dumps(bpe.data))
    counts = occurrences(bpe, Counter({"abdc": 3, "ab": 1}))
    assert counts == {"abdc": 3, "ab": 1}
    less = pruned(bpe, choose(Closure(bpe), counts, 2, None))
    assert "ab" not in less.vocab
    assert tokens(less, "abdc") == ["abdc"]
    assert reached_as_before(bpe, less) == []
    assert compare(bpe, less, ["abdc", "abdcab"]).changed == []


def test_the_most_frequent_that_fit():
    bpe = toy([("a", "b"), ("c", "d"), ("ab", "cd"), ("e", "f")])
    counts = {"abcd": 9, "ef": 5, "cd": 1}
    closure = Closure(bpe)
    sizes = {n: choose(closure, counts, 1, n) - set(BYTES) for n in (256, 257, 259, 260)}
    assert sizes == {256: set(), 257: set(), 259: {"ab", "cd", "abcd"}, 260: {"ab", "cd", "abcd", "ef"}}
    assert choose(closure, counts, 6, None) - set(BYTES) == {"ab", "cd", "abcd"}
    with pytest.raises(UserError, match=r"tokens: 255 is too few: 256 are kept always"):
        choose(closure, counts, 1, 255)


def test_tokens_to_keep_are_named_as_text_or_as_the_vocabulary_has_them():
    assert find(old(), [" the", "Ġthe", "<|end|>", "a"]) == ["Ġthe", "Ġthe", "<|end|>", "a"]
    with pytest.raises(UserError) as refused:
        find(old(), [" the", "xyzzy", "日"])
    assert [p.where for p in refused.value.problems] == ["keep[1]", "keep[2]"]
    assert "is no token of the base, but 5: x y z z y" in str(refused.value)


def test_ids_in_the_rest_of_the_file_follow():
    from tokenizers import processors

    raw = old("gpt2").tokenizer()
    end, start, pad = SPECIALS
    raw.post_processor = processors.Sequence(
        [
            processors.ByteLevel(),
            processors.TemplateProcessing(
                single=f"{start} $0 {end}", special_tokens=[(t, raw.token_to_id(t)) for t in (start, end)]
            ),
        ]
    )
    raw.enable_padding(pad_id=raw.token_to_id(pad), pad_token=pad)
    bpe = ByteBpe.parse(raw.to_str())
    less = pruned(bpe, Closure(bpe)([])).tokenizer()
    assert [less.token_to_id(t) for t in SPECIALS] == [256, 257, 258]
    assert less.encode("a").ids == [257, less.token_to_id("a"), 256]
    assert less.encode_batch(["a", "ab"])[0].ids[-1] == 258
    raw.post_processor = processors.RobertaProcessing((end, raw.token_to_id(end)), (start, raw.token_to_id(start)))
    bpe = ByteBpe.parse(raw.to_str())
    assert pruned(bpe, Closure(bpe)([])).tokenizer().encode("a").ids[0] == 257


def test_tokens_of_a_template_are_kept_though_no_text_has_them():
    from tokenizers import processors

    raw = old("gpt2").tokenizer()
    word = "Ġthe"
    raw.post_processor = processors.TemplateProcessing(
        single=f"{word} $0", special_tokens=[(word, raw.token_to_id(word))]
    )
    bpe = ByteBpe.parse(raw.to_str())
    assert word in Closure(bpe)([])
    assert word not in Closure(old("gpt2"))([])


def test_pruning_again_by_the_same_text_changes_nothing():
    again = choose(Closure(new()), occurrences(new(), words(new(), SOME)), 1, None)
    assert pruned(new(), again).data == new().data


def test_proofs_find_what_is_broken():
    data = json.loads(new("gpt2").text)
    vocab = data["model"]["vocab"]
    moved = data | {"model": data["model"] | {"vocab": vocab | {"a": vocab["b"], "b": vocab["a"]}}}
    found = ids_compact(old("gpt2"), ByteBpe(moved, json.dumps(moved)))
    assert any("'b' has the id" in what for what in found)
    merges = data["model"]["merges"]
    lost = data | {"model": data["model"] | {"merges": merges[5:]}}
    broken = ByteBpe(lost, json.dumps(lost))
    assert reached_as_before(old("gpt2"), broken)
    assert compare(old("gpt2"), broken, [SOME]).changed == [SOME]
    other = data | {"decoder": None}
    assert come_back(old("gpt2"), ByteBpe(other, json.dumps(other)), ["a b"]) == [
        repr(prune_proofs.proofs.PROBE[:60]),
        repr("a b"),
    ]
    assert compare(old("gpt2"), new("gpt2"), [PORTUGUESE]).other == 1
