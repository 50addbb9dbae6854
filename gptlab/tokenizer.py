"""Text <-> token ids. A tokenizer's state is plain JSON, so that a checkpoint carries it."""

import json
import sys
from collections.abc import Callable, Iterable
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
        self._id_of_code = np.full(sys.maxunicode + 1, -1, dtype=np.int32)
        self._id_of_code[code_points(chars)] = np.arange(len(chars))

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The sorted characters that occur in the text."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    @property
    def start(self) -> str:
        """What an empty prompt stands for, as a model needs a first token: the line break, else the first character."""
        return "\n" if "\n" in self.chars else self.chars[0]

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text's characters, in the smallest unsigned type that holds the vocabulary.

        Raises:
            ValueError: a character that the vocabulary lacks; the text names the first one and its place.
        """
        ids = self._id_of_code[code_points(text)]
        if (ids < 0).any():
            raise ValueError(self._unknown(text, int(np.argmax(ids < 0))))
        return ids.astype(np.min_scalar_type(self.vocab_size - 1))

    def _unknown(self, text: str, at: int) -> str:
        char = text[at]
        if "\ud800" <= char <= "\udfff":
            return (
                f"{char!r} (at position {at}) is a lone surrogate and not a character: it stands for a byte that is not "
                "UTF-8; give the text in UTF-8"
            )
        few = f"{self.chars[:100]!r}" + (f" and {self.vocab_size - 100} more" if self.vocab_size > 100 else "")
        return (
            f"the character {char!r} (U+{ord(char):04X}, at position {at}) is not in the vocabulary of "
            f"{self.vocab_size} characters: {few}"
        )

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
        raise ValueError(
            f"unknown tokenizer {state.get('type') if isinstance(state, dict) else state!r}; known: char, and classes of one's own, by _target_"
        )
    return CharTokenizer(state.get("chars"))


def check_tokenizer(tokenizer: Any, build: Callable[[dict], Any]) -> None:
    """Whether a user's own tokenizer offers what WindowData's docstring asks for; `build` makes it from its state.

    Raises:
        ValueError: the text says what is missing or wrong.
    """
    name = f"data._target_: its tokenizer {type(tokenizer).__name__}"
    needed = ("vocab_size", "encode", "decode", "token_bytes", "start", "state")
    if missing := [part for part in needed if not hasattr(tokenizer, part)]:
        raise ValueError(f"{name} lacks {', '.join(missing)}; all that is needed is in the docstring of WindowData")
    ids, sizes = tokenizer.encode(tokenizer.start), tokenizer.token_bytes()
    if not (isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu" and len(ids)):
        raise ValueError(f"{name}: encode(start) must be a numpy array of at least one integer, not {ids!r}")
    if not isinstance(tokenizer.decode(ids.tolist()), str):
        raise ValueError(f"{name}: decode(ids) must be a str")
    if not (isinstance(sizes, np.ndarray) and sizes.shape == (tokenizer.vocab_size,) and sizes.dtype.kind in "iu"):
        raise ValueError(f"{name}: token_bytes() must be a numpy array of {tokenizer.vocab_size} integers")
    try:
        json.dumps(tokenizer.state())
    except TypeError as error:
        raise ValueError(f"{name}: state() must hold plain values: {error}") from None
    again = build(tokenizer.state())
    if again.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"{name} has {tokenizer.vocab_size} tokens, and {again.vocab_size} when made from its state()")


def code_points(text: str) -> np.ndarray:
    """Unicode numbers of the characters, (len(text),) uint32; read-only."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
