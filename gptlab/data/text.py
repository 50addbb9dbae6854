"""Language modelling on a text, by characters or subwords. In memory are its ids, 1 byte each for vocabularies of up to 256
tokens and 2 for those of up to 65,536; the text itself is read in pieces, as often as needed. For texts that do not fit:
`gptlab.data.memmap`."""

import array
import hashlib
import http.client
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gptlab.data import bpe
from gptlab.data.files import PYTHON_DOCS, TextFiles, data_folder, download, from_anywhere, python_docs
from gptlab.data.windows import WindowData
from gptlab.tokenizer import CharTokenizer, code_points, id_type, whole_words


class TextData(WindowData):
    """The first 90 % of a text's characters for training, the last 10 % for validation (nanoGPT's split); or all of it
    for training, and the text `val_path` for validation.

    The text is `path` (a file, a glob or a folder, see `text_files`; several files are joined with line breaks), else
    the download `url`, kept in `folder`; under the name python_docs it is the standard library's documentation. Where
    a download fails, `fallback=python_docs` goes on with that documentation, under its own name and with a warning.
    A text that gptlab knows by name (python_docs, downloads) keeps its own split: there, `val_path` is refused, as
    losses under one name must be comparable.

    The tokens are its characters (`tokenizer="char"`), GPT-2's (`"gpt2"`), or `vocab_size` byte-level ones learned from
    the part for training (`"bpe"`). The split is made before, so that all tokenizers are measured on the same text.

    Raises:
        FileNotFoundError: no such file, or no way to get it.
        ValueError: not a text, not the expected checksum, too short, or validation characters that training lacks.
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
        tokenizer: str = "char",
        vocab_size: int | None = None,
        **windows,
    ) -> None:
        super().__init__(**windows)
        if fallback not in (None, PYTHON_DOCS):
            raise ValueError(f"data.fallback={fallback}: it must be {PYTHON_DOCS} or null")
        if self.name == PYTHON_DOCS and path is not None:
            raise ValueError(
                f"data={PYTHON_DOCS} takes no data.path; for a text of your own: data=text data.path={path}"
            )
        if val_path is not None and (self.name == PYTHON_DOCS or url is not None):
            raise ValueError(
                f"data.val_path={val_path}: data={self.name} has a validation split of its own; for texts of your own: "
                f"data=text data.path={path or 'FILE'} data.val_path={val_path}"
            )
        self.path, self.val_path, self.url, self.sha256 = path, val_path, url, sha256
        self.file = file or f"{self.name}.txt"
        self.fallback, self.folder = fallback, folder
        self.kind, self.vocab_size = tokenizer, vocab_size
        self._text: Iterable[str] | None = None  # pieces of it

    def prepare_data(self) -> None:
        if self._text is not None:
            return
        if self.name == PYTHON_DOCS:
            self._text = [python_docs()]
        elif self.path is None and self.url is not None:
            self._text = self._fetch()
        else:
            self._text = TextFiles(self.path, "data.path")
            self.resolved = {"path": from_anywhere(self.path)}
        if self.val_path is not None:
            self._val_text = TextFiles(self.val_path, "data.val_path")
            self.resolved["val_path"] = from_anywhere(self.val_path)

    def _fetch(self) -> Iterable[str]:
        file = data_folder(self.folder) / self.file
        try:
            download(self.url, self.sha256, file)
            self.resolved = {"folder": str(file.parent.resolve())}
            return TextFiles(str(file), "data.folder")
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: no URL at all
            trouble = (
                f"{self.name} is not at {file} and cannot be downloaded from {self.url} ({error}). Put the file there "
                f"or give it as data.path=FILE; its SHA-256 is {self.sha256}"
            )
        if self.fallback is None:
            raise FileNotFoundError(trouble)
        self.warning = f"NOT training on {self.name}: {trouble}. Training on {self.fallback} instead."
        self.name = self.fallback
        self.resolved = {"name": self.name, "url": None, "file": None, "sha256": None, "fallback": None}
        return [python_docs()]

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "record"):
            return
        found = survey(self._text)
        if self.path is not None and self.sha256 and found.sha256 != self.sha256:
            raise ValueError(
                f"data.path={self.path} has SHA-256 {found.sha256}, but {self.name} has {self.sha256}: "
                "it is another text or a changed copy. For a text of your own: data=text data.path=FILE"
            )
        split = int(0.9 * found.length) if self.val_path is None else found.length
        self.tokenizer = self._make_tokenizer(found, split)
        record = {"name": self.name, "sha256": found.sha256}
        source = f"data.path={self.path}" if self.path else self.name
        self.train_ids, rest = encode(self._text, self.tokenizer, found, split, "data.path")
        if self.val_path is None:
            self.val_ids = rest
        else:
            val_found = survey(self._val_text)
            if self.kind == "char":
                self._check_characters(val_found.chars)
            self.val_ids, _ = encode(self._val_text, self.tokenizer, val_found, val_found.length, "data.val_path")
            record["val_sha256"] = val_found.sha256
            source += f", data.val_path={self.val_path}"
        self.check_lengths(source)
        self.record = record

    def _make_tokenizer(self, found: "Survey", split: int) -> Any:
        if self.kind == "gpt2":
            return bpe.gpt2()
        if self.kind == "bpe":
            return bpe.learn(between(self._text, 0, split), self.vocab_size)
        return CharTokenizer(found.chars)

    def _check_characters(self, val_chars: str) -> None:
        """Raises ValueError if the validation text has characters that the training text lacks."""
        unknown = set(val_chars) - set(self.tokenizer.chars)
        if not unknown:
            return
        char, place = self._val_text.find(unknown)
        others = f", as it does {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(
            f"data.val_path={self.val_path} has the character {char!r} (U+{ord(char):04X}) {place}, which the training "
            f"text data.path={self.path} lacks{others}: the model could not learn it. Take it out of the validation "
            "text, or give a training text that has it"
        )


class Survey(NamedTuple):
    """What a first reading of a text finds: its sorted characters, their number in all, and the SHA-256 of its UTF-8."""

    chars: str
    length: int
    sha256: str


def survey(text: Iterable[str]) -> Survey:
    """Reads a text that comes in pieces."""
    seen, length, sha256 = np.zeros(sys.maxunicode + 1, dtype=bool), 0, hashlib.sha256()
    for piece in text:
        seen[code_points(piece)] = True
        length += len(piece)
        sha256.update(piece.encode("utf-8"))
    return Survey("".join(map(chr, np.flatnonzero(seen))), length, sha256.hexdigest())


def encode(text: Iterable[str], tokenizer: Any, found: Survey, split: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the first `split` characters of a text that comes in pieces, and of the rest.

    Raises:
        ValueError: it is no longer the text that was surveyed; `key` names it.
    """
    sha256, parts = hashlib.sha256(), []
    dtype = id_type(tokenizer.vocab_size)
    try:
        for start, stop in ((0, split), (split, None)):
            ids = array.array(dtype.char)  # grows in place
            for piece in whole_words(between(text, start, stop)):
                ids.frombytes(tokenizer.encode(piece).tobytes())
                sha256.update(piece.encode("utf-8"))
            parts.append(np.frombuffer(ids, dtype))
    except ValueError:  # characters that were not there before
        parts.clear()
    if not parts or sha256.hexdigest() != found.sha256:
        raise ValueError(f"{key}: the text changed while it was being read; start again once nothing writes to it")
    return parts[0], parts[1]


def between(text: Iterable[str], start: int, stop: int | None) -> Iterator[str]:
    """The characters from `start` on and before `stop` of a text that comes in pieces, in pieces."""
    at = 0
    for piece in text:
        part = piece[max(start - at, 0) : None if stop is None else max(stop - at, 0)]
        at += len(piece)
        if part:
            yield part
        if stop is not None and at >= stop:
            return
