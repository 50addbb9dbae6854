"""Text <-> token ids. A tokenizer's state is plain JSON, so that a checkpoint carries it."""

import base64
import os
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from gptlab.errors import UserError

MAX_VOCAB_SIZE = 2**20  # five times the largest vocabulary in use


class CharTokenizer:
    """One token per character; ids follow the order of `chars`, such as `CharTokenizer("0123456789")`."""

    def __init__(self, chars: str) -> None:
        if (
            not isinstance(chars, str)
            or not chars
            or len(set(chars)) != len(chars)
            or re.search("[\ud800-\udfff]", chars)
        ):
            raise UserError("a character vocabulary must be a string of characters, none twice, no lone surrogates")
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
        """What an empty prompt is replaced by: a newline, else the first character."""
        return "\n" if "\n" in self.chars else self.chars[0]

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text's characters, in the smallest unsigned type that holds the vocabulary.

        Raises:
            UserError: a character that the vocabulary lacks.
        """
        ids = self._id_of_code[code_points(text)]
        if (ids < 0).any():
            at = int(np.argmax(ids < 0))
            if "\ud800" <= text[at] <= "\udfff":
                raise UserError(_describe_surrogate(text, at))
            raise UserError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}, at position {at}) is not in the vocabulary of "
                f"{self.vocab_size} characters: {self.chars!r:.100}"
            )
        return ids.astype(id_type(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        """The text; U+FFFD for an unknown id."""
        return "".join(self.chars[i] if 0 <= i < len(self.chars) else "\ufffd" for i in ids)

    def token_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 per token, (vocab_size,): what bits per byte are counted with."""
        return np.array([len(char.encode("utf-8")) for char in self.chars])

    def state(self) -> dict[str, Any]:
        return {"type": "char", "chars": self.chars}


class BPETokenizer:
    """Byte-level byte-pair encoding, as in GPT-2 (Radford et al. 2019): GPT-2's pattern splits the text into words,
    numbers, punctuation and whitespace, and in each the pairs of neighboring tokens are merged, the lowest id first.
    tiktoken does it; any text can be encoded.

    Args:
        tokens: the bytes of each id: the 256 single bytes, and merged tokens in the order in which they were learned.
            One more id follows, the end of a text, which no text is encoded to.
    """

    # GPT-2's, as tiktoken writes it: possessive where backtracking cannot help.
    PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    start = "\n"  # what an empty prompt is replaced by, as in nanoGPT's sample.py
    END_OF_TEXT = "<|endoftext|>"

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens
        if len(tokens) >= MAX_VOCAB_SIZE or len(set(tokens)) != len(tokens) or b"" in tokens:
            raise UserError(f"a BPE vocabulary must have < {MAX_VOCAB_SIZE:,} tokens, none twice and none empty")
        if missing := {bytes([i]) for i in range(256)}.difference(tokens):
            raise UserError(f"a BPE vocabulary must have every single byte, and lacks {sorted(missing)[0]!r}")
        self._bytes_of_id = [*tokens, self.END_OF_TEXT.encode()]

    @classmethod
    def learn(cls, pieces: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """`vocab_size` tokens, the end of a text included, learned from a text in pieces (Sennrich et al. 2016) by
        Hugging Face's tokenizers. The same text gives the same tokens. Raises UserError if it yields fewer."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, it warns about worker processes started later
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(align_to_words(pieces), trainer)
        ids = tokenizer.get_vocab()
        if len(ids) + 1 < vocab_size:
            raise UserError(f"vocab_size={vocab_size} must be at most {len(ids) + 1}: the text yields no more tokens")
        byte_of = _byte_of_character()
        return cls([bytes(byte_of[char] for char in token) for token in sorted(ids, key=ids.get)])

    @property
    def vocab_size(self) -> int:
        return len(self.tokens) + 1

    @property
    def end_of_text(self) -> int:
        """The id between documents; nanoGPT puts it at the end of each."""
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
            UserError: a lone surrogate.
        """
        try:
            ids = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in _split_long_whitespace(text)]
        except UnicodeEncodeError as error:
            raise UserError(_describe_surrogate(text, text.index(error.object[error.start]))) from None
        return np.concatenate(ids).astype(id_type(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        """The text; U+FFFD for bytes that are not a whole character, and for an unknown id."""
        known = self._bytes_of_id
        return b"".join(known[i] if 0 <= i < len(known) else b"\xff" for i in ids).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        """Bytes of text per token, (vocab_size,); 0 for the end of a text."""
        return np.array([*map(len, self.tokens), 0])

    def state(self) -> dict[str, Any]:
        # One string: a checkpoint's reader is slow with a list of 50,000.
        return {"type": "bpe", "tokens": " ".join(base64.b64encode(token).decode() for token in self.tokens)}


def _byte_of_character() -> dict[str, int]:
    """GPT-2's bytes written as visible characters: themselves where they are visible, else from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _split_long_whitespace(text: str) -> Iterator[str]:
    """The text, but split within runs of hundreds of thousands of whitespace characters: tiktoken would crash."""
    most, start = 400_000, 0
    for end in range(most, len(text), most):
        if text[end - most : end + 1].isspace():
            yield text[start:end]
            start = end
    yield text[start:]


def align_to_words(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that can be encoded one by one: they end between a word and whitespace, which no token
    of a BPETokenizer spans."""
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
    """The tokenizer with this `state()`, which may come from an untrusted file.

    Raises:
        UserError: a state that gptlab did not write.
    """
    state = state if isinstance(state, dict) else {}
    kind, tokens = state.get("type"), state.get("tokens")
    if kind == "char":
        return CharTokenizer(state.get("chars"))
    if kind != "bpe" or not isinstance(tokens, str):
        raise UserError("unknown tokenizer; known: char, bpe (tokens in base64), and custom classes, by _target_")
    try:
        return BPETokenizer([base64.b64decode(token, validate=True) for token in tokens.split(" ")])
    except ValueError as error:
        raise UserError(f"the BPE vocabulary is damaged: {error}") from None


def id_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds the ids of such a vocabulary."""
    return np.min_scalar_type(vocab_size - 1)


def _describe_surrogate(text: str, at: int) -> str:
    return f"{text[at]!r} (at position {at}) is a lone surrogate, a byte that is not UTF-8; give the text in UTF-8"


def code_points(text: str) -> np.ndarray:
    """Unicode numbers of the characters, (len(text),) uint32; read-only."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
