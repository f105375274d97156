"""A byte-level BPE tokenizer as `tokenizer.json` has it (GPT-2, Llama-3, Qwen, SmolLM2), and what cannot be extended."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from adapt.errors import Problem, UserError

if TYPE_CHECKING:
    from adapt.components import CleanerChoice
    from adapt.tokenization.base import Method
    from adapt.tokenization.continued_bpe import Learned
    from adapt.tokenization.words import WordWork

FILE = "tokenizer.json"
Merge = tuple[str, str]


def _alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTES = _alphabet()
"""Letter of a byte-level piece -> the byte."""


def piece_bytes(piece: str) -> bytes:
    """The bytes that a byte-level piece stands for."""
    return bytes(BYTES[letter] for letter in piece)


@dataclass(frozen=True, eq=False)
class ByteBpe:
    """`tokenizer.json`, read. Nothing in it is changed; `extended` gives a new one."""

    data: dict[str, Any]
    text: str
    """The file as it was read."""
    kind: ClassVar[str] = "byte-level BPE"

    @staticmethod
    def read(folder: Path, where: str = "base") -> ByteBpe:
        """Raises UserError, naming `where`, for a folder without tokenizer.json or with another kind of tokenizer."""
        file = folder / FILE
        if not file.is_file():
            raise UserError(Problem(where, _no_file(folder)))
        try:
            bpe = ByteBpe.parse(file.read_text("utf-8"), where, str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(Problem(where, f"{file} cannot be read: {error}")) from None
        try:
            bpe.tokenizer()
        except Exception as error:  # the Rust tokenizers raise bare Exceptions
            raise UserError(Problem(where, f"{file} cannot be loaded: {error}")) from None
        return bpe

    @staticmethod
    def parse(text: str, where: str = "base", name: str = FILE) -> ByteBpe:
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UserError(Problem(where, f"{name} is not valid JSON: {error}")) from None
        if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
            raise UserError(Problem(where, f"{name} holds no tokenizer: its `model` is missing"))
        if problems := [Problem(where, f"{name}: {what}") for what in _refused(data)]:
            raise UserError(problems)
        return ByteBpe(data, text)

    @cached_property
    def vocab(self) -> dict[str, int]:
        return self.data["model"]["vocab"]

    @cached_property
    def merges(self) -> list[Merge]:
        """In order of priority."""
        return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in self.data["model"]["merges"]]

    @cached_property
    def added(self) -> dict[str, int]:
        """Tokens that are cut out of the text before anything else (specials and others)."""
        return {token["content"]: token["id"] for token in self.data.get("added_tokens") or []}

    @cached_property
    def next_id(self) -> int:
        return max([*self.vocab.values(), *self.added.values()], default=-1) + 1

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id of all, the added ones included."""
        return self.vocab | self.added

    def letters(self) -> ByteBpe:
        """The same without any merge: only the letters of the vocabulary, and the added tokens."""
        vocab = {piece: i for piece, i in self.vocab.items() if len(piece) == 1 or piece in self.added}
        data = self.data | {"model": self.data["model"] | {"vocab": vocab, "merges": []}}
        return ByteBpe(data, json.dumps(data, ensure_ascii=False))

    def segmenter(self, ignore_merges: bool = False) -> Any:
        """A `tokenizers.Tokenizer` that takes pieces (bytes in GPT-2's letters, no text) apart by the merges alone."""
        from tokenizers import Tokenizer

        model = self.data["model"] | {"ignore_merges": ignore_merges, "dropout": None}
        parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
        return Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model, **parts}))

    def tokenizer(self) -> Any:
        """The whole of it, as a `tokenizers.Tokenizer`."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.text)

    def extended(self, merges: Iterable[Merge], tokens: Iterable[str]) -> ByteBpe:
        """With new merges, all of lower priority than the old ones, and the new tokens under the next free ids.

        Every added token is entered in the model's vocabulary too, under the id it has: those whose ids lie above the
        vocabulary would otherwise be renumbered, silently, when the longer vocabulary is loaded (spec B.3.2)."""
        merges, tokens = list(merges), list(tokens)
        if not merges and not tokens:
            return self
        vocab = self.vocab | self.added
        vocab |= {token: self.next_id + i for i, token in enumerate(tokens)}
        model = self.data["model"] | {
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [list(m) for m in (*self.merges, *merges)],
        }
        data = self.data | {"model": model}
        return ByteBpe(data, json.dumps(data, ensure_ascii=False, indent=2))

    def grown(self, learned: Learned) -> ByteBpe:
        return self.extended(learned.merges, learned.tokens)

    def unreachable(self, tokens: Iterable[str]) -> list[str]:
        return unreachable(self, tokens)

    def work(self, cleaners: tuple[CleanerChoice, ...]) -> WordWork:
        from adapt.tokenization.words import WordWork

        return WordWork(self.text, self.added, cleaners)

    def write(self, folder: Path) -> None:
        """tokenizer.json is all there is."""

    def prove(
        self, new: ByteBpe, base: Path, folder: Path, texts: Sequence[str], method: Method
    ) -> dict[str, list[str]]:
        from adapt.tokenization import proofs

        return proofs.prove(self, new, base, folder, texts, coarsens=method.coarsens)

    def warnings(self, new: ByteBpe, texts: Sequence[str]) -> list[str]:
        return []


def unreachable(bpe: ByteBpe, tokens: Iterable[str]) -> list[str]:
    """Those of these byte-level pieces that the merges, given their own bytes, do not put together again."""
    tokens = list(tokens)
    encoded = bpe.segmenter().encode_batch_fast(tokens, add_special_tokens=False)
    return [token for token, e in zip(tokens, encoded, strict=True) if e.ids != [bpe.vocab[token]]]


def _no_file(folder: Path) -> str:
    if list(folder.glob("*.model")):
        return (
            f"{folder} has no tokenizer.json; fetch it from the model's repository: a tokenizer.model that is no "
            "SentencePiece model (Llama-3's original) cannot be extended"
        )
    return (
        f"{folder} has no tokenizer.json, so there is no tokenizer to extend; give the folder that has it, or a Hub id"
    )


def _refused(data: dict[str, Any]) -> Iterator[str]:
    """Why this tokenizer cannot be extended by continued BPE."""
    model = data["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind == "Unigram":
        yield (
            "its model is SentencePiece Unigram, and its folder has no SentencePiece model, which would not learn the new "
            "pieces and would then give other ids; fetch spiece.model or tokenizer.model from the base's repository into it"
        )
        return
    if kind != "BPE":
        yield f"its model is {kind}; merges can be continued for BPE only, and this one has none"
        return
    if model.get("byte_fallback"):
        yield (
            "it is SentencePiece BPE (byte_fallback), and its folder has no tokenizer.model, which would not learn the new "
            "pieces and would then give other ids; fetch tokenizer.model from the base's repository into it"
        )
        return
    letters = [list(_kinds(data.get(part))) for part in ("pre_tokenizer", "normalizer")]
    if "ByteLevel" not in letters[0] + letters[1]:
        yield "it is BPE over characters: what its vocabulary lacks is lost; only byte-level BPE can be extended"
    if data.get("pre_tokenizer") is None:
        yield "it has no pre-tokenizer: a whole text is one word to it, and there are no words to count"
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            yield f"its pieces have a {key} ({model[key]!r}), and what two of them make is not their concatenation"
    if model.get("dropout"):
        yield f"it has merge dropout {model['dropout']}: the same text is tokenised differently each time; set it to null"
    if words := [
        t["content"] for t in data.get("added_tokens") or [] if not t["special"] and t["content"].strip().isalpha()
    ]:
        yield (
            f"{len(words):,d} words ({', '.join(map(repr, words[:3]))}) were added with `add_tokens`: they are cut out of "
            "every text before it is tokenised, inside other words too. Start from the tokenizer as it was before"
        )
    ids = [*model["vocab"].values()]
    ids += [t["id"] for t in data.get("added_tokens") or [] if t["content"] not in model["vocab"]]
    if len(ids) != len(set(ids)):
        twice = min(i for i, times in Counter(ids).items() if times > 1)
        yield f"two tokens have the id {twice}; one of them is never decoded"
    for token in data.get("added_tokens") or []:
        if model["vocab"].get(token["content"], token["id"]) != token["id"]:
            yield f"{token['content']!r} has the id {token['id']} as an added token, and another in the vocabulary"


def _kinds(part: Any) -> Iterator[str]:
    """Types of a (nested) normaliser or pre-tokenizer."""
    if isinstance(part, dict):
        yield part.get("type", "")
        for inner in (*(part.get("pretokenizers") or ()), *(part.get("normalizers") or ())):
            yield from _kinds(inner)


def added_pattern(added: Iterable[str]) -> re.Pattern[str] | None:
    """Where added tokens stand in a text (the longest first, as the tokenizer cuts them out)."""
    contents = sorted(filter(None, added), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, contents))) if contents else None
