"""tokenizer.json of a SentencePiece model: made from it, checked against it, and extended with it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapt.errors import UserError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def dumped(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, indent=2)


def bare(data: dict[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` of the model alone, that takes pieces and not text."""
    from tokenizers import Tokenizer

    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": data["model"], **parts}))


def refused(data: dict[str, Any], proto: Any) -> Iterator[str]:
    """Why the two files are no pair that can be extended together."""
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict):
        yield "it holds no tokenizer: its `model` is missing"
        return
    wanted = {1: "Unigram", 2: "BPE"}[proto.trainer_spec.model_type]
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
    if kind != wanted:
        yield f"its model is {kind}, and the SentencePiece model beside it {wanted}: they are of two tokenizers"
        return
    vocab = _ids(model)
    pieces = [piece.piece for piece in proto.pieces]
    if moved := [piece for i, piece in enumerate(pieces) if vocab.get(piece) != i]:
        yield (
            f"{len(moved):,d} of the model's {len(pieces):,d} pieces have other ids here ({moved[0]!r} is "
            f"{vocab.get(moved[0])}, there {pieces.index(moved[0])}), as XLM-R shifts them: the two files cannot be "
            "extended alike. Remove the one that your model was not trained with"
        )
        return
    added = data.get("added_tokens") or []
    if others := vocab.keys() - set(pieces) - {token["content"] for token in added}:
        yield (
            f"its vocabulary has {len(others):,d} tokens ({min(others, key=vocab.__getitem__)!r} first) that the model beside "
            "it lacks: it was extended alone; give the model that it was made from, or the tokenizer.json of this one"
        )
        return
    if model.get("dropout"):
        yield f"it has merge dropout {model['dropout']}: the same text is tokenised differently each time; set it to null"
    if words := [t["content"] for t in added if not t["special"] and t["content"].strip().isalpha()]:
        yield (
            f"{len(words):,d} words ({', '.join(map(repr, words[:3]))}) were added with `add_tokens`: they are cut out of "
            "every text before it is tokenised, inside other words too. Start from the tokenizer as it was before"
        )
    for token in added:
        if vocab.get(token["content"], token["id"]) != token["id"]:
            yield f"{token['content']!r} has the id {token['id']} as an added token, and another in the vocabulary"
    ids = sorted((vocab | {token["content"]: token["id"] for token in added}).values())
    wrong = next((i for i, found in enumerate(ids) if found != i), None)
    if wrong is not None:
        fact = f"two tokens have the id {wrong - 1}" if ids[wrong] < wrong else f"no token has the id {wrong}"
        yield (
            f"{fact}: a SentencePiece model numbers its pieces without gaps, so that it could not be given the same ids; "
            "add the tokens again, one id after the other"
        )


def _ids(model: dict[str, Any]) -> dict[str, int]:
    if isinstance(model["vocab"], dict):
        return model["vocab"]
    return {piece: i for i, (piece, _) in enumerate(model["vocab"])}


def grown(data: dict[str, Any], old: Any, new: Any) -> dict[str, Any]:
    """tokenizer.json for the pieces of `new`, which are those of `old` and more (both ModelProto). Where new scores are not
    below all old ones, the merges are those of transformers' conversion, all anew."""
    pieces, model = list(new.pieces), data["model"]
    if isinstance(model["vocab"], list):
        vocab = [*model["vocab"], *([p.piece, p.score] for p in pieces[len(model["vocab"]) :])]
        return data | {"model": model | {"vocab": vocab}}
    vocab = model["vocab"] | {piece.piece: i for i, piece in enumerate(pieces)}
    mergeable = {p.piece: i for i, p in enumerate(pieces) if p.type == NORMAL}
    below = max(p.score for p in pieces[len(old.pieces) :] if p.type == NORMAL) < min(p.score for p in old.pieces)
    merges = _merges(model["merges"], mergeable, len(old.pieces), pieces) if below else _all_merges(new)
    return data | {
        "model": model
        | {
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [list(m) for m in merges],
        }
    }


def _merges(old: list, mergeable: dict[str, int], first_new: int, pieces: list) -> list[tuple[str, str]]:
    """The old merges in their order, and every merge with a new piece in it where its score puts it: SentencePiece
    merges whatever neighbours make a piece, so two new halves of an old piece make it at once, at the old one's turn."""
    old = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in old]
    last = {a + b: rank for rank, (a, b) in enumerate(old)}
    halves: dict[str, list[tuple[int, str, str]]] = {}
    for made, token in mergeable.items():
        for cut in range(1, len(made)):
            a, b = made[:cut], made[cut:]
            if a in mergeable and b in mergeable:
                newest = max(mergeable[a], mergeable[b])
                if max(newest, token) >= first_new:
                    halves.setdefault(made, []).append((newest, a, b))
    after: dict[int, list[tuple[str, str]]] = {}
    for made in sorted(halves, key=lambda made: (-pieces[mergeable[made]].score, mergeable[made])):
        if mergeable[made] >= first_new:
            place = len(old) - 1
        else:
            place = last[made] if made in last else _rank(made, mergeable, pieces, last)
        after.setdefault(place, []).extend((a, b) for _, a, b in sorted(halves[made]))  # later extensions come later
    found = after.get(-1, [])
    for rank, merge in enumerate(old):
        found += [merge, *after.get(rank, ())]
    return found


def _rank(made: str, mergeable: dict[str, int], pieces: list, last: dict[str, int]) -> int:
    """Of a piece that no old merge makes: after the last merge of a piece with a higher score."""
    score = pieces[mergeable[made]].score
    higher = (rank for other, rank in last.items() if other in mergeable and pieces[mergeable[other]].score > score)
    return max(higher, default=-1)


def converted(folder: Path, proto: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """(tokenizer.json, what the class adds to tokenizer_config.json) of a folder that has only the model.

    Vocabulary and merges are transformers' conversion, with the scores as priorities; specials and what is put around a
    text, those of the class that the folder names. Spaces and normalisation follow the model's own flags: no class of
    transformers reads all of them."""
    data, specials = _loaded(folder, proto)
    spec = proto.trainer_spec
    if spec.model_type == 1:
        model = {
            "type": "Unigram",
            "unk_id": spec.unk_id,
            "vocab": [[piece.piece, piece.score] for piece in proto.pieces],
            "byte_fallback": spec.byte_fallback,
        }
    else:
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": spec.unk_piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.piece: i for i, piece in enumerate(proto.pieces)},
            "merges": _all_merges(proto),
        }
    made = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(proto, data.get("added_tokens") or []),
        "normalizer": _normaliser(proto),
        "pre_tokenizer": None,
        "post_processor": data.get("post_processor"),
        "decoder": _decoder(proto),
        "model": model,
    }
    return made, specials


def _loaded(folder: Path, proto: Any) -> tuple[dict[str, Any], dict[str, str]]:
    from adapt.pretrained.load import read_tokenizer

    try:
        tokenizer = read_tokenizer(folder)
        named = dict(tokenizer.special_tokens_map) | {"padding_side": tokenizer.padding_side}
        if others := getattr(tokenizer, "extra_special_tokens", None):
            named["additional_special_tokens"] = list(map(str, others))
        return json.loads(tokenizer.backend_tokenizer.to_str()), named
    except (UserError, AttributeError):  # no class is named there, or one without a fast form
        spec = proto.trainer_spec
        names = {
            name: (getattr(spec, f"{name}_id"), getattr(spec, f"{name}_piece")) for name in ("bos", "eos", "unk", "pad")
        }
        return {}, {f"{name}_token": piece for name, (i, piece) in names.items() if i >= 0}


def _all_merges(proto: Any) -> list[list[str]]:
    from transformers.tokenization_utils_base import generate_merges

    kept = [p for p in proto.pieces if p.type == NORMAL]
    ids = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == NORMAL}
    return [list(m) for m in generate_merges(ids, {p.piece: p.score for p in kept})]


def _added(proto: Any, loaded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    found = {
        i: {"id": i, "content": piece.piece, **plain, "special": piece.type != USER_DEFINED}
        for i, piece in enumerate(proto.pieces)
        if piece.type in (2, CONTROL, USER_DEFINED)
    }
    found |= {token["id"]: token for token in loaded}
    return [found[i] for i in sorted(found)]


def _normaliser(proto: Any) -> dict[str, Any]:
    spec, suffix = proto.normalizer_spec, proto.trainer_spec.treat_whitespace_as_suffix
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix and not suffix:
        steps.append({"type": "Prepend", "prepend": "▁"})
    elif spec.add_dummy_prefix:
        steps.append({"type": "Replace", "pattern": {"Regex": r"(?<=[\s\S])\z"}, "content": "▁"})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(proto: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    if proto.trainer_spec.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if proto.normalizer_spec.add_dummy_prefix:
        end = proto.trainer_spec.treat_whitespace_as_suffix
        steps.append({"type": "Strip", "content": " ", "start": int(not end), "stop": int(end)})
    return {"type": "Sequence", "decoders": steps}
