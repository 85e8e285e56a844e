"""Strict extraction of the one delimited block of a model output (spec core §1.7)."""

from __future__ import annotations

ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"


def extract(text: str, opening: str = ANSWER_OPEN, *, closing: str = ANSWER_CLOSE) -> str | None:
    """The text between two delimiters that both occur exactly once, or None.

    Counts are of plain, case-sensitive substrings over the whole text, so quoting a delimiter in
    the reasoning is an error as well. The block need not end the text. Linear time.

    >>> extract("I try <answer> a+b </answer> now")
    ' a+b '
    >>> extract("<answer>a</answer><answer>b</answer>") is None
    True
    """
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start = text.index(opening) + len(opening)
    end = text.find(closing, start)
    return text[start:end] if end >= 0 else None
