"""HTML -> the text a reader sees, without the furniture around it: menus, headers, footers, scripts, forms.

Blocks become lines with an empty line between them; list items keep a dash, a table row is a line, `pre` keeps its spaces.
Marks are put around elements, the text is taken in one go, and the marks become line breaks: it is the parser's own code
that walks the tree, and nothing is removed from it (a handle to a removed node would dangle).
"""

from __future__ import annotations

import re

TAGS = (
    "script", "style", "noscript", "template", "svg", "nav", "footer", "aside", "form", "button", "select", "textarea",
    "iframe", "object", "label", "body > header", "[role=navigation]", "[role=search]", "[role=banner]",
    "[role=contentinfo]", "[hidden]", "math annotation",
)  # fmt: skip
NAMES = (
    "nav", "navbar", "navigation", "navheader", "navfooter", "navlinks", "docnav", "breadcrumb", "breadcrumbs", "sidebar",
    "sphinxsidebar", "related", "toc", "toctree-wrapper", "TOC", "menu", "footer", "banner", "skip-link", "skiplink",
    "pagination", "pager", "cookie-notice", "copyright", "legalnotice", "searchbox", "search", "headerlink", "indexterm",
    "footer-nav", "site-header", "site-footer", "share", "social", "advertisement", "admonition-see-also", "editsection",
    "mw-editsection", "noprint",
)  # fmt: skip
"""Classes and ids of furniture, as Sphinx, DocBook, Publican, MediaWiki and common site templates name it."""
FURNITURE = ", ".join((*TAGS, *(f".{n}, #{n}" for n in NAMES)))
MAIN = ("main", "[role=main]", "#DisplayArea", ".document .body", "#content", "#main-content", "article")
"""Where the text lies, if exactly one place of the page says so."""
BLOCKS = (
    "p, div, h1, h2, h3, h4, h5, h6, ul, ol, dl, table, blockquote, section, article, figure, figcaption, header, hr, "
    "fieldset, details, summary, address, caption, main"
)

BLOCK, LINE, ITEM, CELL, DROP, DROPPED, PRE, PREFORMATTED = map(chr, range(0xE000, 0xE008))
"""Marks out of Unicode's private use area. A page that has them itself loses them first."""
MARK = re.compile("([\ue000-\ue007])")
SPACES = re.compile(r"[ \t\r\n\f\u00a0]+")


def html_text(html: str) -> str:
    """The text of a page; empty where there is none."""
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(MARK.sub("", html))
    if tree.body is None:
        return ""
    root = next((found[0] for name in MAIN if len(found := tree.body.css(name)) == 1), tree.body)
    for selector, before, after in (
        (BLOCKS, BLOCK, BLOCK),
        ("dt, dd, tr, br", LINE, ""),
        ("li", ITEM, LINE),
        ("td, th", CELL, ""),
        ("pre", PRE, PREFORMATTED),
        (FURNITURE, DROP, DROPPED),
    ):
        for node in root.css(selector):
            if node.mem_id == root.mem_id:
                continue
            node.insert_before(before)
            if after:
                node.insert_after(after)
    return _Lines().read(root.text(deep=True, separator=""))


class _Lines:
    def __init__(self):
        self.lines: list[str] = []
        self.current: list[str] = []
        self.prefix, self.gap = "", False

    def read(self, marked: str) -> str:
        dropped = preformatted = 0
        for piece in MARK.split(marked):
            if piece in (DROP, DROPPED):
                dropped += 1 if piece == DROP else -1
            elif dropped > 0:
                continue
            elif piece in (PRE, PREFORMATTED):
                self._end(preformatted > 0, gap=True)
                preformatted += 1 if piece == PRE else -1
            elif preformatted > 0:
                self.current.append("\n" if piece in (BLOCK, LINE, ITEM) else "  " if piece == CELL else piece)
            elif piece == CELL:
                self.current += [" | "] if "".join(self.current).strip() else []
            elif piece in (BLOCK, LINE, ITEM):
                self._end(gap=piece == BLOCK and not self.prefix)
                self.prefix = "- " if piece == ITEM else self.prefix
            else:
                self.current.append(piece)
        self._end(preformatted > 0)
        return "\n".join(self.lines)

    def _end(self, preformatted: bool = False, gap: bool = False) -> None:
        """The current line ends; `gap`: what follows is another block."""
        text = "".join(self.current)
        self.current = []
        if preformatted:
            lines = [line.rstrip() for line in text.replace("\t", "    ").strip("\r\n").splitlines()]
        else:
            lines = [SPACES.sub(" ", text).strip().removesuffix(" |")]
        if any(lines):
            if self.gap and self.lines:
                self.lines.append("")
            self.lines += [f"{self.prefix}{lines[0]}", *lines[1:]]
            self.prefix, self.gap = "", False
        self.gap = self.gap or gap
