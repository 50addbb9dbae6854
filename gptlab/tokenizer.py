"""Text <-> token ids. A tokenizer's state is plain JSON, so that a checkpoint carries it."""

from collections.abc import Iterable
from typing import Any

import numpy as np


class CharTokenizer:
    """One token per character; the ids follow the order of `chars`.

    Raises:
        ValueError: `chars` is empty or repeats a character.
    """

    def __init__(self, chars: str) -> None:
        if not isinstance(chars, str) or not chars or len(set(chars)) != len(chars):
            raise ValueError("a character vocabulary must be a string of at least one character, none twice")
        self.chars = chars
        codes = _code_points(chars)
        self._id_of_code = np.full(int(codes.max()) + 1, -1, dtype=np.int32)
        self._id_of_code[codes] = np.arange(len(chars))

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The sorted characters that occur in the text."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text's characters, in the smallest unsigned type that holds the vocabulary.

        Raises:
            ValueError: a character that the vocabulary lacks; the text names the first one and its place.
        """
        codes = _code_points(text)
        known = codes < len(self._id_of_code)
        ids = np.where(known, self._id_of_code[np.where(known, codes, 0)], -1)
        if (ids < 0).any():
            at = int(np.argmax(ids < 0))
            raise ValueError(
                f"the character {text[at]!r} (at position {at}) is not in the vocabulary of {self.vocab_size} "
                f"characters: {self.chars!r}"
            )
        return ids.astype(np.min_scalar_type(self.vocab_size - 1))

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.chars[i] for i in ids)

    def token_bytes(self) -> np.ndarray:
        """How many bytes of UTF-8 each token stands for, (vocab_size,): what bits per byte are counted with."""
        return np.array([len(char.encode("utf-8", "surrogatepass")) for char in self.chars])

    def state(self) -> dict[str, Any]:
        return {"type": "char", "chars": self.chars}


def from_state(state: dict[str, Any]) -> CharTokenizer:
    """The tokenizer whose `state()` this is.

    Raises:
        ValueError: a state that no tokenizer of ours wrote.
    """
    if not isinstance(state, dict) or state.get("type") != "char":
        raise ValueError(f"unknown tokenizer {state.get('type') if isinstance(state, dict) else state!r}; known: char")
    return CharTokenizer(state.get("chars"))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
