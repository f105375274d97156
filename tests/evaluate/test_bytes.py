from __future__ import annotations

import copy
import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from adapt.evaluate.bytes import byte_lengths
from tests import tiny

TEXTS = [
    tiny.TEXT,
    "naïve façade — “quotes” … 日本語のテキスト ελληνικά 🙂🏳️‍🌈\t\ttabs\r\n  spaces   ",
    "Ġ is a letter too, and so is Ċ",
    "",
]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama 2's and Mistral's shape: spaces as ▁, bytes outside the vocabulary as <0xNN>."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    raw.train_from_iterator(
        [tiny.TEXT],
        trainers.BpeTrainer(vocab_size=380, special_tokens=specials, show_progress=False),
    )
    plain = json.loads(raw.to_str())  # the trainer makes the byte tokens added tokens; real vocabularies do not
    plain["added_tokens"] = [{**t, "special": True} for t in plain["added_tokens"][:3]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", (tiny.tiny_tokenizer, sentencepiece_like))
def test_lengths_add_up_to_the_text(make, text):
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert int(byte_lengths(tokenizer)[ids].sum()) == len(text.encode())


def test_special_tokens_are_no_text_and_added_words_are_literal():
    tokenizer = copy.deepcopy(tiny.tiny_tokenizer())
    tokenizer.add_tokens([AddedToken("größer", special=False)])
    table = byte_lengths(tokenizer)
    assert table[:4].tolist() == [0, 0, 0, 0]
    text = "ein größerer Satz<|endoftext|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("größer") in ids
    assert int(table[ids].sum()) == len("ein größerer Satz".encode())


@pytest.mark.parametrize("text", TEXTS[:2])
def test_bare_sentencepiece_model(tmp_path, text):
    """A `tokenizer.model` that transformers runs without the tokenizers library."""
    import sentencepiece
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.TEXT.splitlines() * 5),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    tokenizer = SentencePieceBackend(vocab_file=str(tmp_path / "tokenizer.model"))
    tokenizer.legacy = False  # the old way drops white space before the model sees it
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert int(byte_lengths(tokenizer)[ids].sum()) == len(text.encode())
