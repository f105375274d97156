"""Weight of a document: an expression over its record's other fields, as `"2 if domain == 'clinical' else 1"`.

Metadata-driven weights are Biomed-Enriched's recipe (arXiv 2506.20331): labels that a model gave to paragraphs decide
how often each is read.
"""

from __future__ import annotations

import ast
import math

from adapt.data.documents import Document
from adapt.errors import UserError, nearest

FUNCTIONS = {"min": min, "max": max, "abs": abs, "round": round, "float": float, "int": int, "len": len}


class DocumentWeight:
    def __init__(self, expression: str):
        """Raises UserError if it is no expression."""
        from simpleeval import InvalidExpression, SimpleEval

        self.expression = expression
        self._evaluator = SimpleEval(functions=FUNCTIONS)
        try:
            ast.parse(expression.strip(), mode="eval")  # statements are none
            self._parsed = self._evaluator.parse(expression)
        except (SyntaxError, InvalidExpression) as error:
            raise UserError(
                f"{expression!r} is no expression ({error}); write one over the record's fields, "
                "such as \"2 if domain == 'clinical' else 1\""
            ) from None

    def __call__(self, document: Document) -> float:
        """Raises UserError that names the document."""
        from simpleeval import NameNotDefined

        self._evaluator.names = document.meta
        try:
            value = self._evaluator.eval(self.expression, self._parsed)
        except NameNotDefined as error:
            known = sorted(document.meta)
            raise self._wrong(
                document,
                f"it has no field {error.name!r} (short text, a number, true or false)."
                f"{nearest(error.name, known)} Known: {', '.join(known) or 'none'}",
            ) from None
        except Exception as error:  # what an expression may raise on a value is anything
            raise self._wrong(document, str(error)) from None
        if isinstance(value, bool | int | float) and math.isfinite(value) and value >= 0:
            return float(value)
        raise self._wrong(document, f"it gives {value!r}; a weight is a finite number of 0 or more")

    def _wrong(self, document: Document, what: str) -> UserError:
        return UserError(f"{document.id}: document_weight {self.expression!r}: {what}")
