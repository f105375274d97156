"""A run that teaches a model an extended SentencePiece tokenizer, from recipe to export."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from adapt.config import resolve
from adapt.pretrained.load import read_tokenizer
from adapt.tokenization import folder as folders
from adapt.tokenization.sentencepiece_proofs import lines_of
from adapt.train.fit import fit
from adapt.train.validate import check
from tests import tiny
from tests.recipes import tiny_recipe
from tests.tokenization.byte_level import ENGLISH, PORTUGUESE
from tests.tokenization.piece_models import folder_of, learned, read


def model_folder(path, **how):
    """A tiny Llama whose tokenizer is SentencePiece, as Llama-2's folder."""
    folder_of("llama", path, **how)
    tiny.tiny_model(vocab_size=read(path).next_id, bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(path)
    return path


@pytest.mark.parametrize("fast", [True, False], ids=["both files", "tokenizer.model alone"])
def test_the_export_carries_both_files_and_three_libraries_agree(tmp_path, fast):
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = model_folder(tmp_path / "base", fast=fast)
    old = read(base)
    new = old.grown(learned(old, 40))
    folders.write(base, new, tmp_path / "extended")
    new.write(tmp_path / "extended")
    corpus = tmp_path / "pt.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": PORTUGUESE[i:]}) for i in range(12)))
    recipe = tiny_recipe(
        base,
        tmp_path,
        model={"conversions": [{"name": "vocabulary", "pad_to_multiple": 8}]},
        tokenizer={"path": str(tmp_path / "extended")},
        data={"train": [{"source": {"name": "jsonl", "path": str(corpus)}}], "eval": [], "exact_dedup": False},
        objective="next_token",
        trainer={"steps": 2},
        evaluation={"suites": []},
        generation={"prompts": [], "samplers": []},
    )
    assert check(resolve(recipe)).problems == []
    assert fit(resolve(recipe)) == 0
    export = tmp_path / "runs/tiny/export"
    assert (export / "tokenizer.model").read_bytes() == new.stored
    shutil.rmtree(tmp_path / "extended")
    auto, raw = AutoTokenizer.from_pretrained(export), Tokenizer.from_file(str(export / "tokenizer.json"))
    model = SentencePieceProcessor(model_file=str(export / "tokenizer.model"))
    for text in lines_of(new, [PORTUGUESE, ENGLISH]):
        ids = model.encode(text)
        assert (
            ids == auto(text, add_special_tokens=False)["input_ids"] == raw.encode(text, add_special_tokens=False).ids
        )
    trained = AutoModelForCausalLM.from_pretrained(export)
    assert trained.config.vocab_size % 8 == 0
    assert trained.config.vocab_size >= new.next_id
    assert torch.isfinite(trained(torch.tensor([model.encode(PORTUGUESE)[:60]])).logits).all()


def test_the_model_of_another_tokenizer_is_not_exported(tmp_path):
    from adapt.export.pieces import copy_model

    base = model_folder(tmp_path / "base")
    tokenizer = read_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mask|>"]})
    (tmp_path / "out").mkdir()
    assert copy_model(tokenizer, tmp_path / "out") == tmp_path / "out" / "tokenizer.model"  # the mask lies above it
    other = read(base).grown(learned(read(base), 20))
    (base / "tokenizer.model").write_bytes(other.stored)
    assert copy_model(tokenizer, tmp_path / "out") is None
    (base / "tokenizer.model").write_text("IQ== 0\n")
    assert copy_model(tokenizer, tmp_path / "out") is None
    assert copy_model(tiny.tiny_tokenizer(), tmp_path / "out") is None
