"""The tokenizer's Rust core alone gives the ids that the tokenizer itself gives; long texts go through in pieces."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.data import plain_text
from adapt.data.documents import Document
from adapt.data.encode import Encoder
from adapt.data.plain_text import PlainText, pieces, through
from adapt.data.prepare import prepare
from tests.data.helpers import recipe, text_of
from tests.tiny import TEXT


def variants(tokenizer):
    """Tokenizers that put something around a text, or in front of its words."""
    from tokenizers import pre_tokenizers, processors

    yield tokenizer
    around = copy.deepcopy(tokenizer)
    around.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    yield around
    sentencepiece = copy.deepcopy(tokenizer)
    sentencepiece.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    yield sentencepiece


@given(st.lists(st.text(max_size=40) | st.sampled_from(["a<|endoftext|>b", "<|im_end|>", " <reserved_0>"])))
def test_the_ids_are_those_of_the_tokenizer(tokenizer, texts):
    for each in variants(tokenizer):
        plain = PlainText(each)
        assert plain.is_fast
        for special in (True, False):
            assert plain.ids(texts, special) == (through(each, texts, special) if texts else [])


def test_a_tokenizer_that_does_more_than_its_core_is_called_itself(tokenizer):
    class Lower:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, **options):
            return tokenizer([t.lower() for t in texts], **options)

        def __len__(self):
            return len(tokenizer)

    encoder = Encoder(Lower())
    assert not encoder.plain.is_fast
    ((encoded,),) = encoder.encode([Document(id="x", text="THE FOX")])
    assert tokenizer.decode(encoded.tokens) == "the fox<|endoftext|>"


@given(st.text(alphabet="ab \n", max_size=200), st.integers(5, 50))
def test_pieces_are_the_text(text, size):
    cut = list(pieces(text, size))
    assert "".join(cut) == text
    assert all(0 < len(p) <= size for p in cut) or not text


def test_a_long_text_has_the_ids_of_the_whole(tokenizer, monkeypatch):
    rng = random.Random(0)
    spaced = " ".join(rng.choices(TEXT.split(), k=3000))
    lines = spaced + "\n\n" + "line\n" * 300  # SentencePiece marks the start of a piece cut at a line end
    for each, text in zip(variants(tokenizer), (lines, lines, spaced), strict=True):
        plain = PlainText(each)
        (whole,) = plain.ids([text])
        monkeypatch.setattr(plain_text, "PIECE", 500)
        short, long, other = plain.ids(["a", text, "b"])
        monkeypatch.undo()
        assert isinstance(long, np.ndarray)
        assert long.tolist() == whole
        assert [short, other] == plain.ids(["a", "b"])


@pytest.mark.parametrize("spaced", [True, False])
def test_one_line_of_many_pieces(tokenizer, tmp_path, monkeypatch, spaced):
    """As a JSON line and as a text file; a text without any space, too."""
    monkeypatch.setattr(plain_text, "PIECE", 2000)
    text = ("word and " if spaced else "abcdefgh") * 5000
    (tmp_path / "line.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "line.txt").write_text(text)
    for name in ("line.jsonl", "line.txt"):
        shards = prepare(recipe([{"source": f"path:{tmp_path / name}"}]), tokenizer, progress=False).train[0]
        assert text_of(tokenizer, shards) == [text + "<|endoftext|>"]
        assert shards.manifest["bytes"] == len(text)
