"""Language modeling on a text, by characters or subwords. In memory are its ids, 1 byte each for vocabularies of up to
256 tokens and 2 for those of up to 65,536; the text itself is read in pieces, as often as needed. For texts that do not
fit: `gptlab.data.memmap`."""

import array
import hashlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gptlab.data.files import (
    PYTHON_DOCS,
    TextFiles,
    data_folder,
    fetch,
    load_gpt2_tokenizer,
    make_absolute,
    python_docs,
)
from gptlab.data.windows import WindowData
from gptlab.errors import UserError
from gptlab.tokenizer import BPETokenizer, CharTokenizer, align_to_words, code_points, id_type


class TextData(WindowData):
    """The first 90 % of a text's characters for training, the last 10 % for validation (nanoGPT's split); or all of it
    for training, and the text `val_path` for validation.

    The text is `path` (a file, a glob or a folder, see `text_files`; files are joined with newlines), else the download
    `url`, kept in `folder`; under the name python_docs it is the standard library's documentation. Known texts
    (python_docs, downloads) keep their own split, so that losses under one name are comparable: they refuse `val_path`.

    The tokens are its characters (`tokenizer="char"`), GPT-2's (`"gpt2"`), or `vocab_size` byte-level ones learned from
    the training part (`"bpe"`). The split is made before, so that all tokenizers are measured on the same text.

    Args:
        fallback: read by `gptlab.cli`, which replaces a text that cannot be had before the run is composed.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        val_path: str | None = None,
        url: str | None = None,
        file: str | None = None,
        sha256: str | None = None,
        fallback: str | None = None,
        folder: str | None = None,
        tokenizer: Any = "char",
        vocab_size: int | None = None,
        **windows,
    ) -> None:
        super().__init__(**windows)
        self.path, self.val_path, self.url, self.sha256 = path, val_path, url, sha256
        self.file, self.folder = file or f"{self.name}.txt", folder
        self.kind, self.vocab_size = tokenizer, vocab_size

    def prepare_data(self) -> None:
        self._text: Iterable[str]  # in pieces
        if self.name == PYTHON_DOCS:
            self._text = [python_docs()]
        elif self.path is None and self.url is not None:
            file = fetch(self.url, self.sha256, data_folder(self.folder) / self.file)
            self._text = TextFiles(str(file), "data.folder")
            self.resolved = {"folder": str(file.parent.resolve())}
        else:
            self._text = TextFiles(self.path, "data.path")
            self.resolved = {"path": make_absolute(self.path)}
        if self.val_path is not None:
            self._val_text = TextFiles(self.val_path, "data.val_path")
            self.resolved["val_path"] = make_absolute(self.val_path)

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "record"):
            return
        chars, length = scan_text(self._text)
        split = int(0.9 * length) if self.val_path is None else length
        self.tokenizer = self._make_tokenizer(chars, split)
        source = f"data.path={self.path}" if self.path else f"data={self.name}"
        if isinstance(self.tokenizer, CharTokenizer):
            check_characters(chars, self.tokenizer.chars, f"{source}: not in the vocabulary of the weights")
        self.train_ids, self.val_ids, sha256 = encode_text(self._text, self.tokenizer, split)
        if self.path is not None and self.sha256 and sha256 != self.sha256:
            raise UserError(
                f"data.path={self.path} has SHA-256 {sha256}, but {self.name} has {self.sha256}; use your text with "
                f"data=text data.path={self.path}"
            )
        record = {"name": self.name, "sha256": sha256}
        if self.val_path is not None:
            source += f", data.val_path={self.val_path}"
            val_chars, val_length = scan_text(self._val_text)
            if isinstance(self.tokenizer, CharTokenizer):
                check_characters(val_chars, self.tokenizer.chars, f"{source}: in the validation text only")
            self.val_ids, _, record["val_sha256"] = encode_text(self._val_text, self.tokenizer, val_length)
        self.check_lengths(source)
        self.record = record

    def _make_tokenizer(self, chars: str, split: int) -> Any:
        if self.kind == "gpt2":
            return load_gpt2_tokenizer("learn a vocabulary with data.tokenizer=bpe data.vocab_size=1024")
        if self.kind == "bpe":
            return BPETokenizer.learn(slice_text(self._text, 0, split), self.vocab_size)
        return CharTokenizer(chars) if self.kind == "char" else self.kind


def check_characters(chars: str, known: str, fault: str) -> None:
    """Raises UserError for characters that a vocabulary lacks."""
    if unknown := sorted({*chars} - {*known}):
        some = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in unknown[:5])
        raise UserError(f"{fault}: {len(unknown)} characters, such as {some}; remove them from the text")


def scan_text(text: Iterable[str]) -> tuple[str, int]:
    """The sorted characters of a text in pieces, each once, and its length."""
    seen, length = np.zeros(sys.maxunicode + 1, dtype=bool), 0
    for piece in text:
        seen[code_points(piece)] = True
        length += len(piece)
    return "".join(map(chr, np.flatnonzero(seen))), length


def encode_text(text: Iterable[str], tokenizer: Any, split: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Ids of the first `split` characters of a text in pieces, those of the rest, and the SHA-256 of its UTF-8."""
    sha256, parts = hashlib.sha256(), []
    dtype = id_type(tokenizer.vocab_size)
    for start, stop in ((0, split), (split, None)):
        ids = array.array(dtype.char)  # grows in place
        for piece in align_to_words(slice_text(text, start, stop)):
            ids.frombytes(tokenizer.encode(piece).tobytes())
            sha256.update(piece.encode("utf-8"))
        parts.append(np.frombuffer(ids, dtype))
    return parts[0], parts[1], sha256.hexdigest()


def slice_text(text: Iterable[str], start: int, stop: int | None) -> Iterator[str]:
    """text[start:stop] of a text in pieces, in pieces."""
    at = 0
    for piece in text:
        part = piece[max(start - at, 0) : None if stop is None else max(stop - at, 0)]
        at += len(piece)
        if part:
            yield part
        if stop is not None and at >= stop:
            return
