"""A SentencePiece tokenizer as a folder has it: `tokenizer.model`, and the `tokenizer.json` that gives the same ids.

SentencePiece BPE has no list of merges: of all neighbours whose concatenation is a piece, those of the highest score are
merged first (Kudo & Richardson 2018, arXiv 1808.06226). Unigram takes the segmentation of the highest total score."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adapt.components import CleanerChoice
from adapt.errors import Problem, UserError
from adapt.tokenization import sentencepiece_json as fast
from adapt.tokenization.base import Method
from adapt.tokenization.byte_bpe import FILE
from adapt.tokenization.continued_bpe import Learned
from adapt.tokenization.folder import CONFIG
from adapt.tokenization.sentencepiece_rules import SPACE, PieceRules
from adapt.tokenization.sentencepiece_words import PieceWork

BPE, UNIGRAM = "SentencePiece BPE", "SentencePiece Unigram"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces, as sentencepiece_model.proto numbers them."""
KINDS = {1: UNIGRAM, 2: BPE}


@dataclass(frozen=True)
class Pieces(Learned):
    """New pieces with their scores; `merges` and `counts` are there where merges made them."""

    scores: list[float] = field(default_factory=list)
    """Of each token; the file keeps them as float32."""

    def first(self, num_tokens: int) -> Pieces:
        return Pieces(
            merges=self.merges[:num_tokens],
            tokens=self.tokens[:num_tokens],
            counts=self.counts[:num_tokens],
            scores=self.scores[:num_tokens],
        )


@dataclass(frozen=True, eq=False)
class SentencePiece:
    """Both files, read. Nothing in them is changed; `grown` gives a new one."""

    proto: Any
    """`sentencepiece_model_pb2.ModelProto`"""
    stored: bytes
    """The model as it was read."""
    data: dict[str, Any]
    """tokenizer.json; made from the model where the folder has none."""
    text: str
    """The same as text; where it was read, as it was read."""
    file: str = "tokenizer.model"
    specials: dict[str, Any] = field(default_factory=dict)
    """Special tokens and the padding side for tokenizer_config.json, where the folder may not give them."""

    @staticmethod
    def read(folder: Path, where: str = "base") -> SentencePiece | None:
        """Null where the folder has no SentencePiece model. Raises UserError, naming `where`, for one that cannot be
        extended."""
        for file in sorted(folder.glob("*.model"), key=lambda path: (path.name != "tokenizer.model", path.name)):
            try:
                stored = file.read_bytes()
            except OSError as error:
                raise UserError(Problem(where, f"{file} cannot be read: {error}")) from None
            if (proto := _parsed(stored)) is not None:
                return SentencePiece._checked(folder, file, stored, proto, where)
        return None

    @staticmethod
    def _checked(folder: Path, file: Path, stored: bytes, proto: Any, where: str) -> SentencePiece:
        problems = [Problem(where, f"{file}: {what}") for what in _refused(proto)]
        if not problems:
            try:
                processor(stored)
            except Exception as error:  # sentencepiece has RuntimeErrors of its own
                problems = [Problem(where, f"{file} cannot be loaded: {' '.join(str(error).split())[-200:]}")]
        if problems:
            raise UserError(problems)
        text, own, specials = None, folder / FILE, {}
        if own.is_file():
            try:
                text = own.read_text("utf-8")
                data = json.loads(text)
            except (OSError, ValueError) as error:
                raise UserError(Problem(where, f"{own} cannot be read: {error}")) from None
        else:
            data, specials = fast.converted(folder, proto)
        if problems := [Problem(where, f"{own}: {what}") for what in fast.refused(data, proto)]:
            raise UserError(problems)
        base = SentencePiece(proto, stored, data, text or fast.dumped(data), file.name, specials)
        try:
            base.tokenizer()
        except Exception as error:  # the Rust tokenizers raise bare Exceptions
            raise UserError(Problem(where, f"{own} cannot be loaded: {error}")) from None
        return base

    @property
    def kind(self) -> str:
        return KINDS[self.proto.trainer_spec.model_type]

    @cached_property
    def vocab(self) -> dict[str, int]:
        """All pieces of the model."""
        return {piece.piece: i for i, piece in enumerate(self.proto.pieces)}

    @cached_property
    def types(self) -> list[int]:
        return [piece.type for piece in self.proto.pieces]

    @cached_property
    def scores(self) -> list[float]:
        return [piece.score for piece in self.proto.pieces]

    @cached_property
    def added(self) -> dict[str, int]:
        """Tokens that tokenizer.json cuts out of the text, and those that the model does: specials and user-defined ones."""
        own = {token["content"]: token["id"] for token in self.data.get("added_tokens") or []}
        return own | {p: i for p, i in self.vocab.items() if self.types[i] in (CONTROL, USER_DEFINED)}

    @cached_property
    def ids(self) -> dict[str, int]:
        return self.vocab | self.added

    @cached_property
    def next_id(self) -> int:
        return max(self.ids.values()) + 1

    @cached_property
    def merges(self) -> list:
        return self.data["model"].get("merges") or []

    @cached_property
    def rules(self) -> PieceRules:
        return PieceRules.of(self.proto.trainer_spec)

    @cached_property
    def taken(self) -> frozenset[str]:
        """Texts that no new piece may have."""
        return frozenset(self.ids)

    def tokenizer(self) -> Any:
        """tokenizer.json as a `tokenizers.Tokenizer`."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.text)

    def processor(self) -> Any:
        """The model as a `sentencepiece.SentencePieceProcessor`."""
        return processor(self.stored)

    def bare(self) -> Any:
        """The same, but it takes pieces apart as they stand: nothing is normalised, no prefix put before them."""
        proto = type(self.proto)()
        proto.CopyFrom(self.proto)
        proto.normalizer_spec.precompiled_charsmap = b""
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        return processor(proto.SerializeToString())

    def next_scores(self, num_pieces: int) -> list[float]:
        """Scores below all there are, one less each time, all different as float32 (which has no whole numbers left
        where a model gives -1e9)."""
        lowest = np.float32(min(self.scores))
        found = []
        for _ in range(num_pieces):
            below = np.float32(lowest - np.float32(1))
            lowest = below if below < lowest else np.nextafter(lowest, np.float32(-np.inf))
            found.append(float(lowest))
        return found

    def grown(self, pieces: Pieces) -> SentencePiece:
        """With new pieces under the next free ids, in both files.

        Added tokens that tokenizer.json has above the model's pieces become pieces of the model, under the ids they have:
        without them the two files would give new pieces different ids (compare spec B.3.2)."""
        if not pieces.tokens:
            return self
        proto = type(self.proto)()
        proto.CopyFrom(self.proto)
        proto.DiscardUnknownFields()  # the self-test of older versions: samples of how the old model tokenises
        special = {token["content"]: token["special"] for token in self.data.get("added_tokens") or []}
        for token, i in sorted(self.ids.items(), key=lambda item: item[1])[len(self.vocab) :]:
            assert i == len(proto.pieces)
            proto.pieces.add(piece=token, score=0.0, type=CONTROL if special[token] else USER_DEFINED)
        for token, score in zip(pieces.tokens, pieces.scores, strict=True):
            proto.pieces.add(piece=token, score=score, type=NORMAL)
        data = fast.grown(self.data, self.proto, proto)
        return SentencePiece(proto, proto.SerializeToString(), data, fast.dumped(data), self.file, self.specials)

    def unreachable(self, tokens: Iterable[str]) -> list[str]:
        """Those of these pieces that their own characters do not give, by sentencepiece or by tokenizer.json."""
        tokens = list(tokens)
        encoded = fast.bare(self.data).encode_batch_fast(tokens, add_special_tokens=False)
        lost = {token for token, e in zip(tokens, encoded, strict=True) if e.ids != [self.vocab[token]]}
        lost.update(self.bare_lost(tokens))
        return [token for token in tokens if token in lost]

    def bare_lost(self, tokens: Sequence[str]) -> list[str]:
        """The same by sentencepiece alone."""
        found = self.bare().encode(list(tokens), out_type=int)
        return [token for token, ids in zip(tokens, found, strict=True) if ids != [self.vocab[token]]]

    def work(self, cleaners: tuple[CleanerChoice, ...]) -> PieceWork:
        rules = self.rules
        return PieceWork(self.stored, self.added, cleaners, suffix=rules.suffix, split=rules.split_by_whitespace)

    def write(self, folder: Path) -> None:
        """Beside the tokenizer.json and tokenizer_config.json that are there already."""
        (folder / self.file).write_bytes(self.stored)
        config = folder / CONFIG
        fields = self.specials | json.loads(config.read_text("utf-8"))
        config.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def prove(self, new: SentencePiece, base: Path, folder: Path, texts: Sequence[str], method: Method):
        from adapt.tokenization import sentencepiece_proofs

        return sentencepiece_proofs.prove(self, new, base, folder, texts, method)

    def warnings(self, new: SentencePiece, texts: Sequence[str]) -> list[str]:
        from adapt.tokenization import sentencepiece_proofs

        return sentencepiece_proofs.warnings(self, new, texts)


def processor(stored: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=stored)


def _parsed(stored: bytes) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(stored)
    except DecodeError:
        return None
    return proto if len(proto.pieces) else None


def _refused(proto: Any) -> Iterator[str]:
    names: Sequence[str] = [piece.piece for piece in proto.pieces]
    if proto.trainer_spec.model_type not in KINDS:
        yield "it is a model of words or characters, which has nothing to go on from; only BPE and Unigram can be extended"
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        yield f"the piece {twice!r} is there twice; merge the models again, without it"
    if unused := [piece.piece for piece in proto.pieces if piece.type == UNUSED]:
        yield (
            f"{len(unused):,d} pieces ({unused[0]!r} first) are marked UNUSED: they are merged and then split again, so "
            "that new pieces could not be built on them; give the model as it was trained"
        )
    if not proto.normalizer_spec.escape_whitespaces:
        yield f"it does not write spaces as {SPACE!r} (escape_whitespaces is off), so words cannot be told apart"
