"""Texts with something to find in them, made up for a given number of tokens.

Passkey retrieval: a number hidden in repeated filler (Mohtashami and Jaggi 2023, arXiv 2305.16300; the cutting of the
filler follows LongLoRA's generator). The task statement is in our own words, the filler is the usual five sentences.
Needles in a haystack: RULER's single, multi-key and multi-query tasks (Hsieh et al. 2024, arXiv 2404.06654), their
prompts in our own words.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from adapt.data.noise import generator
from adapt.errors import UserError

VERSION = 2
"""Part of the fingerprint of sources: raise it when a text changes."""
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
STATEMENT = (
    "Important information is hidden in a lot of irrelevant text. Find it and memorise it: there will be a question."
)
FIRST_KEY, LAST_KEY = 10_000, 99_999
NEAR = 96
"""Characters around the end of a bisection in which an exact fit is looked for."""

Split = Literal["train", "held-out"]


@dataclass(frozen=True)
class Trial:
    prompt: str
    answers: tuple[str, ...]
    """What has to be found."""
    depths: tuple[float, ...]
    """Where each answer stands in the text before the question, from 0 to 1."""


def split_of(key: int) -> Split:
    """Which keys are for training and which for measuring: a model that has learned keys by heart finds none of the
    others. Half of them each, by a hash: a cut of the range would keep first digits from training, a rule on digits
    would show in the last one."""
    digest = hashlib.blake2b(str(key).encode(), digest_size=1).digest()
    return "train" if digest[0] % 2 else "held-out"


def key_of(rng: Any, split: Split) -> int:
    """Five digits, of the split's own half of the numbers."""
    while True:
        key = int(rng.integers(FIRST_KEY, LAST_KEY + 1))
        if split_of(key) == split:
            return key


def as_answer(text: str, chat: bool) -> str:
    """After a prompt that ends in the middle of a sentence a word follows; a turn of its own begins with no space."""
    return text if chat else f" {text}"


def passkey_text(key: int, size: int, depth: float) -> Trial:
    """Five lines, with `size` characters of filler around the key, `depth` of them before it."""
    before = round(size * depth)
    endless = (" ".join(FILLER) + " ") * (size // 80 + 1)
    lines = (
        STATEMENT,
        endless[:before],
        f"The pass key is {key}. Remember it. {key} is the pass key.",
        endless[: size - before],
        "What is the pass key? The pass key is",
    )
    return Trial("\n".join(lines), (str(key),), (depth,))


class Passkeys:
    """Passkey trials of exactly so many tokens, as `count(prompt, response)` counts them."""

    def __init__(self, count: Callable[[str, str], int]):
        self.count, self.last = count, {}

    def __call__(self, length: int, depth: float, key: int, response: str) -> Trial:
        """Filler is bisected to the length in tokens; where no cut gives exactly that, the longest one below it."""

        def tokens(size: int) -> int:
            return self.count(passkey_text(key, size, depth).prompt, response)

        size = fit(tokens, length, "a passkey prompt", self.last.get(length, 4 * length), slack=NEAR)
        self.last[length] = size
        return passkey_text(key, size, depth)


def fit(tokens: Callable[[int], int], target: int, what: str, guess: int = 64, slack: int = 0) -> int:
    """The largest size whose `tokens(size)` are at most `target`, found by bisection from a guess (tokens hardly ever
    shrink as a text grows). With `slack`, sizes around it are tried for an exact fit. Raises UserError where even size
    0 is too long."""
    step = max(1, guess // 16)
    low, high = guess, guess + step
    while low > 0 and tokens(low) > target:
        low, high, step = max(0, low - step), low, 2 * step
    if low == 0 and (least := tokens(0)) > target:
        raise UserError(f"{what} has {least:,d} tokens without any filler, so {target:,d} are too few")
    while tokens(high) <= target:
        low, high, step = high, high + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= target else (low, middle)
    near = sorted(range(max(0, low - slack), low + slack + 1), key=lambda size: abs(size - low))
    return next((size for size in near if tokens(size) == target), low)


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = words(
    "amber brave calm dusty eager faint gentle hollow idle jolly keen lively mellow narrow odd pale quiet rapid silent "
    "tidy urban vivid wary young zesty bitter clever distant early frozen golden humble inner"
)
NOUNS = words(
    "anchor bridge candle desert engine forest garden harbour island jacket kettle ladder meadow needle orchard pencil "
    "quarry river saddle tunnel umbrella valley window yard zebra basket canyon drawer emblem falcon glacier hammer "
    "insect jungle kitchen lantern mirror"
)


@dataclass(frozen=True, kw_only=True)
class Haystack:
    """What needles are hidden in: `pieces` (lines, sentences) repeated as often as needed, put together by `joint`."""

    pieces: tuple[str, ...]
    joint: str
    depths: tuple[float, ...] | None = None
    """Where needles may stand, from 0 to 1; None: anywhere."""

    @staticmethod
    def noise() -> Haystack:
        """The five sentences of filler, one per line (RULER's niah_single_1)."""
        return Haystack(pieces=FILLER, joint="\n")

    @staticmethod
    def essays(text: str) -> Haystack:
        """Sentences of a text; needles stand at 40 evenly spaced percentiles (niah_single_2 and _3)."""
        sentences = tuple(s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s)
        if not sentences:
            raise UserError("the text that should be the haystack is empty")
        return Haystack(pieces=sentences, joint=" ", depths=tuple(round(100 * i / 39) / 100 for i in range(40)))

    def places(self, part: int, parts: int) -> tuple[float, ...] | None:
        """The depths that lie in one of `parts` equal parts; None: any does."""
        if self.depths is None:
            return None
        return tuple(d for d in self.depths if min(int(d * parts), parts - 1) == part)

    def cut(self, size: int) -> list[str]:
        repeated = self.pieces * (size // len(self.pieces) + 1)
        return list(repeated[:size])


@dataclass(frozen=True)
class Needle:
    key: str
    value: str
    depth: float


def value_of(rng: Any, kind: str) -> str:
    """A 7-digit number, or a UUID."""
    if kind == "number":
        return str(int(rng.integers(10**6, 10**7)))
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def depth_of(rng: Any, haystack: Haystack, part: int, parts: int) -> float:
    places = haystack.places(part, parts)
    if places is None:
        return (part + float(rng.random())) / parts
    return places[int(rng.integers(len(places)))]


def draw_needles(rng: Any, haystack: Haystack, kind: str, parts: list[int], num_parts: int) -> list[Needle]:
    """A needle for each entry of `parts` (the part of the text that it stands in), with keys of their own."""
    pairs = rng.choice(len(ADJECTIVES) * len(NOUNS), size=len(parts), replace=False)
    keys = [f"{ADJECTIVES[int(p) // len(NOUNS)]}-{NOUNS[int(p) % len(NOUNS)]}" for p in pairs]
    values: list[str] = []
    while len(values) < len(parts):
        value = value_of(rng, kind)
        if value not in values:
            values.append(value)
    depths = [depth_of(rng, haystack, part, num_parts) for part in parts]
    return [Needle(k, v, d) for k, v, d in zip(keys, values, depths, strict=True)]


def niah_text(haystack: Haystack, needles: list[Needle], asked: list[Needle], size: int, kind: str) -> Trial:
    """`size` pieces of haystack with the needles in it, and the question for those `asked`."""
    pieces = haystack.cut(size)
    placed = sorted(needles, key=lambda n: n.depth)
    for already, needle in enumerate(placed):
        line = f"One of the special magic {kind}s for {needle.key} is: {needle.value}."
        pieces.insert(round(needle.depth * size) + already, line)
    several = len(asked) > 1
    names = asked[0].key if not several else ", ".join(n.key for n in asked[:-1]) + f" and {asked[-1].key}"
    plural, verb = ("s", "are") if several else ("", "is")
    prompt = "\n".join(
        (
            f"Special magic {kind}s are hidden in the following text. Memorise them: there will be a question.",
            haystack.joint.join(pieces),
            f"What {verb} the special magic {kind}{plural} for {names} mentioned in the text above? "
            f"The special magic {kind}{plural} for {names} mentioned in the text above {verb}",
        )
    )
    return Trial(prompt, tuple(n.value for n in asked), tuple(n.depth for n in asked))


def niah(
    haystack: Haystack,
    needles: list[Needle],
    asked: list[Needle],
    kind: str,
    length: int,
    count: Callable[[str, str], int],
    guess: int = 16,
) -> tuple[Trial, int]:
    """The longest such text whose prompt has at most `length` tokens, and its size in pieces."""
    answer = ", ".join(n.value for n in asked)

    def tokens(size: int) -> int:
        return count(niah_text(haystack, needles, asked, size, kind).prompt, answer)

    size = fit(tokens, length, "a text with needles", guess)
    return niah_text(haystack, needles, asked, size, kind), size


def trial_rng(seed: int, *key: int) -> Any:
    return generator(seed, 0x6E65_6564_6C65, *key)
