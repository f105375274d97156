"""New text on a terminal: streamed as it is committed, and afterwards with the order of its revelation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adapt.generation.base import Event, Generation
from adapt.generation.stop import UNFINISHED

if TYPE_CHECKING:
    from rich.text import Text

COLOURS = ("bold white", "green", "bright_green", "yellow", "bright_yellow", "magenta", "bright_magenta", "red")
"""By denoising step; later steps share the last."""
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class Stream:
    """Writes committed text, holding back characters whose bytes are not all there."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object]):
        self.tokenizer, self.write = tokenizer, write
        self.tokens: list[int] = []
        self.shown = ""

    def __call__(self, event: Event) -> None:
        if event.kind == "commit" and event.row == 0:
            self.tokens += event.tokens
            self._show(text_of(self.tokenizer, self.tokens).rstrip(UNFINISHED))

    def finish(self, text: str | None = None) -> None:
        """Show the rest: of `text`, where a stop string has cut it, else of the tokens."""
        self._show(text_of(self.tokenizer, self.tokens) if text is None else text)

    def _show(self, text: str) -> None:
        if text.startswith(self.shown) and len(text) > len(self.shown):
            self.write(text[len(self.shown) :])
            self.shown = text


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer: Any, tokens: list[int]) -> list[tuple[str, int]]:
    """(text, index of its last token), splitting between tokens but never inside a character."""
    found, shown = [], ""
    for i in range(len(tokens)):
        text = tokenizer.decode(tokens[: i + 1], clean_up_tokenization_spaces=False)
        if text.endswith(UNFINISHED) and i + 1 < len(tokens):
            continue
        found.append((text[len(shown) :], i))
        shown = text
    return found


def order_view(tokenizer: Any, generation: Generation, *, colour: bool) -> Text:
    """The text with each token in the colour of its denoising step, and how many each step revealed; without colours the
    step stands behind the token."""
    from rich.text import Text

    steps = dict(generation.reveal_order)
    view = Text()
    for text, index in pieces(tokenizer, generation.tokens):
        step = steps.get(index, 0)
        view.append(text, style=style(step) if colour else "")
        if not colour:
            view.append(str(step).translate(SUPERSCRIPT))
    if colour:
        view.append("\n")
        tokens_at = Counter(min(s, len(COLOURS) - 1) for s in steps.values())
        for step in sorted(tokens_at):
            more = "+" if step == len(COLOURS) - 1 else ""
            what = "AR head" if step == 0 else f"step {step}{more}"
            view.append(f" {what}: {tokens_at[step]} ", style=f"{style(step)} reverse")
    return view


def style(step: int) -> str:
    return COLOURS[min(step, len(COLOURS) - 1)]


def summary(generation: Generation) -> str:
    why = {
        "eos": "ended by itself",
        "stop": "stopped by --stop",
        "length": "stopped by --max-new-tokens",
        "context": "the context is full",
    }
    return (
        f"{len(generation.tokens)} tokens, {generation.forwards} forwards, "
        f"{generation.tokens_per_forward:.2f} tokens per forward, {generation.tokens_per_second:.1f} tokens/s, "
        f"{why[generation.stopped_by]}"
    )
