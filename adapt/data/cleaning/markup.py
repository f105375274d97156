"""HTML and manual pages -> the text in them; see `adapt.data.html_text` and `adapt.data.roff`."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from adapt.components import cleaners
from adapt.data.cleaning.base import map_strings
from adapt.data.documents import Document

PAGE = re.compile(
    r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)
LINK = re.compile(r"(?<!!)\[([^\[\]\n]+)\]\((?:https?://|/|#|\.)[^()\s]*\)")


@dataclass(frozen=True, kw_only=True)
class MarkupConfig:
    kind: Literal["auto", "html", "man", "none"] = "auto"
    """`html`, `man`: every text is of that kind. `auto`: as the source says (`meta["media"]`), or else by how the text
    begins; plain text stays as it is. `none`: leave everything as it is."""
    links: bool = True
    """Of Markdown links in plain text keep the words alone."""


class Markup:
    sequential = False

    def __init__(self, config: MarkupConfig):
        self.config = config

    def __call__(self, document: Document) -> Document | str:
        stated = document.meta.get("media") if self.config.kind == "auto" else self.config.kind
        changed = map_strings(document, lambda text: self._convert(text, stated))
        if changed is document:
            return document
        if not any(text.strip() for text in changed.strings()):
            return "no text in the markup"
        return dataclasses.replace(changed, meta=changed.meta | {"media": "text"})

    def _convert(self, text: str, kind: str | None) -> str:
        text = convert(text, kind)
        return LINK.sub(r"\1", text) if self.config.links and kind != "none" and "](" in text else text


def convert(text: str, kind: str | None) -> str:
    """`kind` None: found by how the text begins."""
    from adapt.data.html_text import html_text
    from adapt.data.roff import is_roff, roff_text

    if kind is None:
        kind = "html" if PAGE.match(text[:4096]) else "man" if text[:1] in (".", "'") and is_roff(text) else "text"
    convert = {"html": html_text, "man": roff_text}.get(kind)
    return convert(text) if convert else text


@cleaners.register("markup")
def markup(config: MarkupConfig) -> Markup:
    return Markup(config)
