"""Text <-> token ids. A tokenizer's state is plain JSON, so that a checkpoint carries it."""

import base64
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from gptlab.config import MAX_VOCAB_SIZE


class CharTokenizer:
    """One token per character; the ids follow the order of `chars`. (`CharTokenizer("0123456789")`: digits.)

    Raises:
        ValueError: `chars` is empty or repeats a character.
    """

    def __init__(self, chars: str) -> None:
        if not isinstance(chars, str) or not chars or len(set(chars)) != len(chars):
            raise ValueError("a character vocabulary must be a string of at least one character, none twice")
        if any("\ud800" <= char <= "\udfff" for char in chars):
            raise ValueError("a character vocabulary must have no lone surrogates, which are no characters")
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
        return ids.astype(id_type(self.vocab_size))

    def _unknown(self, text: str, at: int) -> str:
        char = text[at]
        if "\ud800" <= char <= "\udfff":
            return _lone_surrogate(text, at)
        few = f"{self.chars[:100]!r}" + (f" and {self.vocab_size - 100} more" if self.vocab_size > 100 else "")
        return (
            f"the character {char!r} (U+{ord(char):04X}, at position {at}) is not in the vocabulary of "
            f"{self.vocab_size} characters: {few}"
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text; U+FFFD for an id that there is not."""
        return "".join(self.chars[i] if 0 <= i < len(self.chars) else "\ufffd" for i in ids)

    def token_bytes(self) -> np.ndarray:
        """How many bytes of UTF-8 each token stands for, (vocab_size,): what bits per byte are counted with."""
        return np.array([len(char.encode("utf-8")) for char in self.chars])

    def state(self) -> dict[str, Any]:
        return {"type": "char", "chars": self.chars}


class BPETokenizer:
    """Byte-level byte-pair encoding, as in GPT-2 (Radford et al. 2019): the text is cut into words, numbers, signs and
    blanks by GPT-2's pattern, and in each the pairs of neighbouring tokens are merged, the lowest id first. Done by
    tiktoken; any text can be encoded.

    Args:
        tokens: what each id stands for, the single bytes among them, merged ones in the order in which they were
            learned. One more id follows: the end of a text, which stands for no text and is never encoded from any.

    Raises:
        ValueError: a token twice, a byte missing, or more tokens than MAX_VOCAB_SIZE.
    """

    # GPT-2's, as tiktoken writes it: without backtracking where none can help.
    PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    start = "\n"  # what an empty prompt stands for, as in nanoGPT's sample.py
    END_OF_TEXT = "<|endoftext|>"

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens
        if not 256 <= len(tokens) < MAX_VOCAB_SIZE:
            raise ValueError(f"a BPE vocabulary has 256 to {MAX_VOCAB_SIZE - 1:,} tokens, not {len(tokens):,}")
        if len(set(tokens)) != len(tokens) or b"" in tokens:
            raise ValueError("a BPE vocabulary must have no token twice, and no empty one")
        if missing := {bytes([i]) for i in range(256)}.difference(tokens):
            raise ValueError(f"a BPE vocabulary must have every single byte, and lacks {sorted(missing)[0]!r}")
        self._text_of_id = [*tokens, self.END_OF_TEXT.encode()]

    @property
    def vocab_size(self) -> int:
        return len(self.tokens) + 1

    @property
    def end_of_text(self) -> int:
        """The id between documents: nanoGPT puts it at the end of each."""
        return len(self.tokens)

    @cached_property
    def _encoding(self) -> Any:
        import tiktoken

        ranks = {token: i for i, token in enumerate(self.tokens)}
        special = {self.END_OF_TEXT: self.end_of_text}  # none at all would make encode_to_numpy slow
        return tiktoken.Encoding("gptlab", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, in the smallest unsigned type that holds the vocabulary; `<|endoftext|>` in it is text.

        Raises:
            ValueError: a lone surrogate; the text names its place.
        """
        try:
            ids = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in _without_long_blanks(text)]
        except UnicodeEncodeError as error:
            raise ValueError(_lone_surrogate(text, text.index(error.object[error.start]))) from None
        return np.concatenate(ids).astype(id_type(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        """The text; U+FFFD for bytes that are no whole character, and for an id that there is not."""
        known = self._text_of_id
        return b"".join(known[i] if 0 <= i < len(known) else b"\xff" for i in ids).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        """How many bytes of text each token stands for, (vocab_size,): the end of a text for none."""
        return np.array([*map(len, self.tokens), 0])

    def state(self) -> dict[str, Any]:
        # One string: a checkpoint's reader is slow with a list of 50,000.
        return {"type": "bpe", "tokens": " ".join(base64.b64encode(token).decode() for token in self.tokens)}


def _without_long_blanks(text: str) -> Iterator[str]:
    """The text in one part, unless it has hundreds of thousands of blanks in a row, at which tiktoken would crash: it is
    cut in there."""
    most, start = 400_000, 0
    for end in range(most, len(text), most):
        if text[end - most : end + 1].isspace():
            yield text[start:end]
            start = end
    yield text[start:]


def whole_words(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that can be encoded one by one: cut between a word and a blank, where no token of
    BPETokenizer lies across."""
    held: list[str] = []
    for piece in pieces:
        if cut := re.match(r"(?s).*\S(?=[ \t\r\n])", piece):  # the last such place
            yield "".join([*held, cut[0]])
            held = [piece[cut.end() :]]
        else:
            held.append(piece)
    if rest := "".join(held):
        yield rest


def from_state(state: dict[str, Any]) -> CharTokenizer | BPETokenizer:
    """The tokenizer whose `state()` this is.

    Raises:
        ValueError: a state that no tokenizer of ours wrote.
    """
    if not isinstance(state, dict):
        raise ValueError(f"a tokenizer's state must be a mapping, not {type(state).__name__}")
    kind = state.get("type")
    if not isinstance(kind, str):  # shown, it might have no end
        raise ValueError(f"a tokenizer's type must be a text, not {type(kind).__name__}")
    if kind == "char":
        return CharTokenizer(state.get("chars"))
    if kind != "bpe":
        raise ValueError(f"unknown tokenizer {kind!r:.100}; known: char, bpe, and classes of one's own, by _target_")
    tokens = state.get("tokens")
    if not isinstance(tokens, str):
        raise ValueError(f"a BPE vocabulary must be a string of tokens in base64, not {type(tokens).__name__}")
    try:
        return BPETokenizer([base64.b64decode(token, validate=True) for token in tokens.split(" ")])
    except ValueError as error:
        raise ValueError(f"the BPE vocabulary is damaged: {error}") from None


def id_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds the ids of such a vocabulary."""
    return np.min_scalar_type(vocab_size - 1)


def _lone_surrogate(text: str, at: int) -> str:
    return (
        f"{text[at]!r} (at position {at}) is a lone surrogate and not a character: it stands for a byte that is not "
        "UTF-8; give the text in UTF-8"
    )


def code_points(text: str) -> np.ndarray:
    """Unicode numbers of the characters, (len(text),) uint32; read-only."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
