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
        """A question, for advice."""
        return f"{85 % 10**self.ndigit}+{50 % 10**self.ndigit}="

    def parse(self, text: str) -> str | None:
        """`85+50=` -> `8550`; None if the text is something else.

        Raises:
            UserError: a number with more than `ndigit` digits.
        """
        match = re.fullmatch(r"\s*([0-9]+)\s*\+\s*([0-9]+)\s*=?\s*", text)
        if not match:
            return None
        numbers = [number.lstrip("0") for number in match.groups()]
        if too_long := [number for number in numbers if len(number) > self.ndigit]:
            raise UserError(
                f"{too_long[0]:.50} must have at most {self.ndigit} digits: the model has data.ndigit={self.ndigit}"
            )
        return "".join(number.zfill(self.ndigit) for number in numbers)

    def format_question(self, tokens: str) -> str:
        """`8550` -> `85 + 50 = `."""
        return f"{_number(tokens[: self.ndigit])} + {_number(tokens[self.ndigit :])} = "

    def format_answer(self, tokens: str) -> str:
        """`531` -> `135`."""
        return _number(tokens[::-1])


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
        """`2 0 1` or `201` -> `201`; None if the text is something else.

        Raises:
            UserError: symbols with whitespace between them, but not `length` of them.
        """
        symbols = text.split()
        if len("".join(symbols)) == self.length:
            return "".join(symbols)
        if len(symbols) > 1 and all(len(symbol) == 1 for symbol in symbols):
            raise UserError(f"{text!r:.50} must have {self.length} symbols: the model has data.length={self.length}")
        return None

    def format_question(self, tokens: str) -> str:
        """`201` -> `2 0 1 -> `."""
        return " ".join(tokens) + " -> "

    def format_answer(self, tokens: str) -> str:
        """`012` -> `0 1 2`."""
        return " ".join(tokens)


def _number(digits: str) -> str:
    """Without leading zeros. (Not int(): it refuses more than 4,300 digits.)"""
    return digits.lstrip("0") or "0"


def notation_of(data: dict[str, Any]) -> Addition | Sorting | None:
    """The notation of a checkpoint's config["data"], which may be untrusted; None if it is not a problem of gptlab's."""
    kinds = {"AdditionData": (Addition, "ndigit"), "SortData": (Sorting, "length")}
    for name, (kind, key) in kinds.items():
        size = data.get(key)
        if data.get("_target_") == f"gptlab.data.problems.{name}" and isinstance(size, int) and 1 <= size <= 1000:
            return kind(size)
    return None
