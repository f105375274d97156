"""Manual pages (roff with the `man` or `mdoc` macros) -> text.

Not a typesetter: requests that only arrange are left out, macros that carry text give it, and escapes become the characters
they mean (groff_char(7), groff_man(7)). Paragraphs come out as one line each, literal blocks as they stand.
"""

from __future__ import annotations

import re

CHARACTERS = {
    "aq": "'", "dq": '"', "cq": "’", "oq": "‘", "lq": "“", "rq": "”", "em": "—", "en": "–", "hy": "-", "mi": "−",
    "bu": "•", "co": "©", "rg": "®", "tm": "™", "ha": "^", "ti": "~", "rs": "\\", "ga": "`", "fm": "′", "de": "°",
    "+-": "±", "mu": "×", "di": "÷", "->": "→", "<-": "←", "<=": "≤", ">=": "≥", "!=": "≠", "==": "≡", "if": "∞",
    "sc": "§", "ps": "¶", "Fo": "«", "Fc": "»", "fo": "‹", "fc": "›", "ss": "ß", "ae": "æ", "AE": "Æ", "oe": "œ",
    "/o": "ø", "/O": "Ø", "oa": "å", "oA": "Å", "ul": "_", "ba": "|", "br": "|", "sl": "/", "at": "@", "sh": "#",
    "Do": "$", "Po": "£", "Eu": "€", "ct": "¢", "12": "½", "14": "¼", "34": "¾", "S1": "¹", "S2": "²", "S3": "³",
    "OK": "✓", "lB": "[", "rB": "]", "lC": "{", "rC": "}", "la": "⟨", "ra": "⟩", "**": "*", "*p": "π", "*m": "μ",
}  # fmt: skip
ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", ":": "\u0308", "~": "\u0303", ",": "\u0327", "o": "\u030a"}
STRINGS = {"lq": "“", "rq": "”", "L\"": "“", "R\"": "”", "Aq": "'", "C`": "", "C'": "", "--": "—", "PI": "π", "Tm": "™",
           "R": "®", "S": "", "-": "-", "'": "'", "<": "<", ">": ">"}  # fmt: skip
ESCAPE = re.compile(
    r"\\(?:"
    r"(?P<nothing>[&)%:|^/,{}]|[scu]?(?=$)|c|f(?:\[[^\]]*\]|\(..|.)|F(?:\[[^\]]*\]|\(..|.)|m(?:\[[^\]]*\]|\(..|.)"
    r"|s(?:\[[^\]]*\]|\([^)]?.|[-+]?\d{1,2}|'[^']*')|[hvwblLoxXDNCRSAHz]'[^']*'|n[-+]?(?:\[[^\]]*\]|\(..|.)|[dpkzruta])"
    r"|(?P<string>\*(?:\[[^\]]*\]|\(..|.))"
    r"|\[(?P<long>[^\]]*)\]|\((?P<short>..)|(?P<one>.)"
    r")"
)
COMMENT = re.compile(r'\\["#].*')
WORDS = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')
SILENT = {
    "ad", "na", "hy", "nh", "ne", "ft", "fam", "tr", "ta", "ti", "in", "ll", "po", "ps", "vs", "so", "nr", "rr", "rm", "als",
    "DT", "PD", "HP", "ev", "evc", "di", "da", "ec", "eo", "cc", "pl", "pn", "bp", "ie", "if", "el", "while", "UE", "ME",
    "IX", "Dd", "Os", "Dt", "TH", "Bk", "Ek", "\\}", "color", "defcolor", "hw", "hla", "mso", "lf", "ss", "warn", "do",
    "char", "fchar", "rchar", "cu", "ul", "shift", "return", "nop", "AT", "UC", "it", "itc", 
}  # fmt: skip
PARAGRAPH = {"PP", "P", "LP", "sp", "Sp", "Pp", "RS", "RE", "Bl", "El", "Lp", "YS", "SY", "Ps", "Pe"}
LITERAL_ON, LITERAL_OFF = {"nf", "EX", "Vb", "Bd"}, {"fi", "EE", "Ve", "Ed"}
JOINED = {"BR", "RB", "BI", "IB", "IR", "RI"}
BULLETS = ("•", "-", "*", "o", "·", "–", "+", "")
MDOC_QUOTES = {"Op": ("[", "]"), "Oo": ("[", ""), "Oc": ("]", ""), "Dq": ("“", "”"), "Sq": ("‘", "’"), "Pq": ("(", ")"),
               "Qq": ('"', '"'), "Aq": ("<", ">"), "Bq": ("[", "]"), "Ql": ("‘", "’"), "Brq": ("{", "}")}  # fmt: skip
MDOC = {"Nm", "Nd", "Ar", "Fl", "Cm", "Dv", "Ev", "Er", "Fa", "Fn", "Fo", "Fc", "Ft", "Fd", "In", "Ic", "Li", "Pa", "Sy",
        "Em", "Ns", "No", "Xr", "Va", "Vt", "Tn", "Ux", "Bx", "Fx", "Nx", "Ox", "An", "Aq", "Ad", "Lk", "Mt", "St", "Sx",
        "Ms", "Cd", "Lb", "Rv", "Ex", "Xo", "Xc", "Rs", "Re", "%A", "%T", "%B", "%D", "%J", "%R", "%O", "%I", *MDOC_QUOTES}  # fmt: skip


def is_roff(text: str) -> bool:
    """Whether the first lines that are no comment are those of a manual page."""
    lines = (line for line in text.splitlines()[:400] if not line.startswith(('.\\"', "'\\\"")))
    return any(re.match(r"[.'](?:TH|Dd|Dt|SH|Sh)\b", line) for line in lines)


def roff_text(source: str) -> str:
    """The page as text: headings, paragraphs and literal blocks, an empty line between them."""
    return _Page().read(source)


class _Page:
    def __init__(self):
        self.blocks: list[str] = []
        self.words: list[str] = []
        self.strings = dict(STRINGS)
        self.literal = False
        self.tag = False
        self.name = ""

    def read(self, source: str) -> str:
        lines = iter(source.replace("\\\n", " ").splitlines())
        for line in lines:
            line = COMMENT.sub("", line) if "\\" in line else line
            request = re.match(r"[.']\s*([^\s\\]+|\\})?\s*(.*)", line)
            if request is None:
                self._text(self._plain(line))
                continue
            name, rest = request[1] or "", request[2]
            if name in ("de", "de1", "am", "ig"):
                end = f".{rest.split()[1]}" if len(rest.split()) > 1 else ".."
                while (skipped := next(lines, None)) is not None and skipped.strip() != end:
                    pass
            elif name in ("if", "ie", "el", "while"):
                self._skip(rest, lines)
            elif name in ("TS", "EQ", "PS"):
                self._table(lines, {"TS": ".TE", "EQ": ".EN", "PS": ".PE"}[name], name == "TS")
            elif name in ("ds", "ds1"):
                key, _, value = rest.partition(" ")
                self.strings[key] = self._plain(value.removeprefix('"'))
            else:
                self._request(name, rest)
        self._end()
        return "\n\n".join(self.blocks)

    def _skip(self, rest: str, lines) -> None:
        """A conditional holds typesetting, not text: it is passed over with all its braces."""
        depth = rest.count("\\{") - rest.count("\\}")
        while depth > 0 and (line := next(lines, None)) is not None:
            depth += line.count("\\{") - line.count("\\}")

    def _table(self, lines, end: str, shown: bool) -> None:
        self._end()
        rows: list[str] = []
        body = False
        for line in lines:
            if line.startswith(end):
                break
            if body and line and line[0] not in ".'" and not re.fullmatch(r"[_=\s]*|T[{}].?", line):
                cells = (self._plain(cell).strip() for cell in re.split(r"\t|T[{}]", line))
                rows.append(" | ".join(cell for cell in cells if cell))
            body = body or line.rstrip().endswith(".")
        if shown and rows:
            self.blocks.append("\n".join(rows))

    def _request(self, name: str, rest: str) -> None:
        arguments = [self._plain((quoted or plain).replace('""', '"')) for quoted, plain in WORDS.findall(rest)]
        if name in ("SH", "SS", "Sh", "Ss"):
            self._end()
            self.literal = False
            if arguments:
                self.blocks.append(" ".join(arguments))
        elif name in LITERAL_ON or name in LITERAL_OFF:
            self._end()
            self.literal = name in LITERAL_ON and not (
                name == "Bd" and "-literal" not in rest and "-unfilled" not in rest
            )
        elif name in ("TP", "TQ"):
            self._end()
            self.tag = True
        elif name in ("IP", "It"):
            self._end()
            if arguments:
                self._tagged(" ".join(arguments[:1] if name == "IP" else self._mdoc(arguments)))
        elif name in PARAGRAPH:
            self._end()
        elif name == "br":
            if self.words:
                self.words.append("\n")
        elif name in ("UR", "MT", "URL", "MTO"):
            self._text(" ".join(arguments[:1]))
        elif name in JOINED:
            self._text("".join(arguments))
        elif name == "Nm" and not arguments:
            self._text(self.name)
        elif name in MDOC:
            if name == "Nm" and not self.name and arguments:
                self.name = arguments[0]
            self._text(" ".join(self._mdoc([name, *arguments])))
        elif name and name not in SILENT and arguments:
            self._text(" ".join(arguments))

    def _mdoc(self, words: list[str]) -> list[str]:
        """Macros may stand among their own arguments: flags get their dash, quotes their marks, the rest is text."""
        out = [""]
        closing = ""
        glued = True
        for word in words:
            if word == "Nd":
                word, glue = "-", False
            elif word == "Fl":  # a flag's dash belongs to the next word
                word, glue = "-", True
            elif word in MDOC_QUOTES:
                word, end = MDOC_QUOTES[word]
                closing, glue = end + closing, True
            elif word in MDOC:
                continue
            else:
                glue = False
            if glued or re.fullmatch(r"[.,;:)\]]", word):
                out[-1] += word
            else:
                out.append(word)
            glued = glue
        out[-1] += closing
        return out

    def _tagged(self, text: str) -> None:
        if text.strip() in BULLETS:
            self.words.append("-" if text.strip() else "")
        else:
            self.words += [text, "\n"]

    def _text(self, text: str) -> None:
        if self.literal:
            self.words.append(text.rstrip())
        elif not text.strip():
            self._end()
        elif self.tag:
            self.tag = False
            self._tagged(text)
        else:
            self.words.append(text)

    def _end(self) -> None:
        if self.literal:
            block = "\n".join(self.words).strip("\n")
        else:
            lines = " ".join(self.words).split("\n")
            block = "\n".join(line for line in (" ".join(line.split()) for line in lines) if line)
        if block.strip():
            self.blocks.append(block)
        self.words = []

    def _plain(self, text: str) -> str:
        return ESCAPE.sub(self._escape, text) if "\\" in text else text

    def _escape(self, match: re.Match) -> str:
        if match["nothing"] is not None:
            return ""
        if match["string"] is not None:
            name = (
                match["string"][1:].strip("[]")
                if match["string"][1:2] == "["
                else match["string"][1:].removeprefix("(")
            )
            return self.strings.get(name, "")
        if match["one"] is not None:
            return {"e": "\\", "\\": "\\", "-": "-", "~": " ", " ": " ", "0": " ", "'": "'", "`": "`", ".": ".", "_": "_",
                    '"': ""}.get(match["one"], match["one"])  # fmt: skip
        name = match["long"] if match["long"] is not None else match["short"]
        if re.fullmatch(r"u[0-9A-Fa-f]{4,6}(?:_[0-9A-Fa-f]{4,6})*", name):
            points = [int(p, 16) for p in name[1:].split("_")]
            return "".join(chr(p) for p in points if p < 0x110000 and not 0xD800 <= p < 0xE000)
        if name in CHARACTERS:
            return CHARACTERS[name]
        if len(name) == 2 and name[0] in ACCENTS and name[1].isalpha():
            import unicodedata

            return unicodedata.normalize("NFC", name[1] + ACCENTS[name[0]])
        return ""
