"""Problems as people write them: 85+50= <-> the tokens 8550, and the answer 135 <-> 531.

Pure Python, so that sampling, which reads nothing but a checkpoint, does not import Lightning.
"""

import re
from typing import Any, NamedTuple

from gptlab.errors import UserError


class Addition(NamedTuple):
    """Two numbers of `ndigit` digits; the digits of the sum come in reverse."""

    ndigit: int

    @property
    def n_answer(self) -> int:
        return self.ndigit + 1

    @property
    def example(self) -> str:
        return f"{85 % 10**self.ndigit}+{50 % 10**self.ndigit}="

    def parse(self, text: str) -> str | None:
        """`85+50=` -> `8550`; None if the text is something else. Raises UserError for a number that is too long."""
        match = re.fullmatch(r"\s*([0-9]+)\s*\+\s*([0-9]+)\s*=?\s*", text)
        if not match:
            return None
        numbers = [number.lstrip("0").zfill(self.ndigit) for number in match.groups()]
        if max(map(len, numbers)) > self.ndigit:
            raise UserError(f"{text!r:.50}: numbers must have at most data.ndigit={self.ndigit} digits")
        return "".join(numbers)

    def format_question(self, tokens: str) -> str:
        """`8550` -> `85 + 50 = `."""
        a, b = (number.lstrip("0") or "0" for number in (tokens[: self.ndigit], tokens[self.ndigit :]))
        return f"{a} + {b} = "

    def format_answer(self, tokens: str) -> str:
        """`531` -> `135`. (Not by int(), which refuses more than 4,300 digits.)"""
        return tokens[::-1].lstrip("0") or "0"


class Sorting(NamedTuple):
    """`length` symbols."""

    length: int

    @property
    def n_answer(self) -> int:
        return self.length

    @property
    def example(self) -> str:
        return " ".join(("10" * self.length)[: self.length])

    def parse(self, text: str) -> str | None:
        """`2 0 1` or `201` -> `201`; None if the text is something else. Raises UserError for another length."""
        symbols = text.split()
        if len("".join(symbols)) == self.length:
            return "".join(symbols)
        if len(symbols) > 1 and all(len(symbol) == 1 for symbol in symbols):
            raise UserError(f"{text!r:.50} must have data.length={self.length} symbols")
        return None

    def format_question(self, tokens: str) -> str:
        return " ".join(tokens) + " -> "

    def format_answer(self, tokens: str) -> str:
        return " ".join(tokens)


def notation_of(data: dict[str, Any]) -> Addition | Sorting | None:
    """The notation of a checkpoint's config["data"], which may be untrusted; None if it is no problem of gptlab's."""
    for name, kind in (("AdditionData", Addition), ("SortData", Sorting)):
        size = data.get(kind._fields[0])
        if data.get("_target_") == f"gptlab.data.problems.{name}" and isinstance(size, int) and 1 <= size <= 1000:
            return kind(size)
    return None
