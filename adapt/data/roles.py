"""Values of a token's `role`, apart from the batch so that preparation loads no torch."""

PAD, CONTEXT, TARGET = 0, 1, 2
"""Padding, text that is given (prompts), text that is learned (answers; all of plain text)."""
