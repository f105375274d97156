"""Text as it was meant: mojibake undone, composed characters (NFC), no control characters.

ftfy (Speer 2019) finds text that was decoded with the wrong charset. Typographic quotes, ligatures and full-width forms are
text, not damage, and stay.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Literal

from adapt.components import cleaners
from adapt.data.cleaning.base import map_strings
from adapt.data.documents import Document

PLAIN = re.compile(r"[\n\t -~“”‘’–—…•]*")
"""Nothing to repair: damage needs letters beyond ASCII, or control characters. Most lines are like that."""
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff\ufff9-\ufffb]")
"""Control characters, soft hyphens, zero-width spaces, byte-order marks, annotations. Joiners stay: some scripts need them."""
LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\u2028\u2029]")
ROUNDS = 8
"""One repair may reveal another; it has never taken more than three."""


@dataclass(frozen=True, kw_only=True)
class UnicodeConfig:
    mojibake: bool = True
    """Undo decoding with the wrong charset ("Ã©" for "é")."""
    form: Literal["NFC", "NFKC"] | None = "NFC"
    """Unicode normalisation form; null: as it comes."""


class Unicode:
    sequential = False

    def __init__(self, config: UnicodeConfig):
        self.config = config

    def __call__(self, document: Document) -> Document | str:
        return map_strings(document, self.repair)

    def repair(self, text: str) -> str:
        if PLAIN.fullmatch(text):
            return text
        for _ in range(ROUNDS):
            repaired = self._once(text)
            if repaired == text:
                break
            text = repaired
        return text

    def _once(self, text: str) -> str:
        import ftfy
        from ftfy.badness import is_bad

        lines = LINE_ENDS.sub("\n", text).split("\n")
        options = _options(self.config.mojibake)
        for i, line in enumerate(lines):
            if not PLAIN.fullmatch(line) and (CONTROLS.search(line) or (self.config.mojibake and is_bad(line))):
                lines[i] = ftfy.fix_text(line, options)
        text = "\n".join(lines)
        text = INVISIBLE.sub("", text)  # not before: a soft hyphen may be half of a damaged letter
        return unicodedata.normalize(self.config.form, text) if self.config.form else text


@cache
def _options(mojibake: bool):
    import ftfy

    return ftfy.TextFixerConfig(
        unescape_html=False,
        fix_encoding=mojibake,
        restore_byte_a0=mojibake,
        replace_lossy_sequences=mojibake,
        decode_inconsistent_utf8=mojibake,
        fix_c1_controls=mojibake,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        normalization=None,
        explain=False,
    )


@cleaners.register("unicode")
def unicode(config: UnicodeConfig) -> Unicode:
    return Unicode(config)
