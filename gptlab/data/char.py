"""Character-level language modelling on one text, held in memory."""

import http.client
from pathlib import Path

from gptlab.data.corpora import PYTHON_DOCS, data_folder, digest, download, python_docs
from gptlab.data.windows import WindowData
from gptlab.tokenizer import CharTokenizer


class CharData(WindowData):
    """The first 90 % of a text's characters for training, the last 10 % for validation (nanoGPT's split).

    The text is the file `path`, else the download `url`, kept in `folder`; under the name python_docs it is the
    standard library's documentation. Where a download fails, `fallback=python_docs` goes on with that documentation,
    under its own name and with a warning.

    Raises:
        FileNotFoundError: no such file, or no way to get it.
        ValueError: not the expected checksum, not UTF-8, or too short.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        url: str | None = None,
        sha256: str | None = None,
        fallback: str | None = None,
        folder: str | None = None,
        **windows,
    ) -> None:
        super().__init__(**windows)
        if fallback not in (None, PYTHON_DOCS):
            raise ValueError(f"data.fallback={fallback}: it must be {PYTHON_DOCS} or null")
        self.path, self.url, self.sha256, self.fallback, self.folder = path, url, sha256, fallback, folder
        self._text: str | None = None

    def prepare_data(self) -> None:
        if self._text is not None:
            return
        if self.name == PYTHON_DOCS:
            if self.path is not None:
                raise ValueError(
                    f"data={PYTHON_DOCS} takes no data.path; for a text of your own: data=text data.path={self.path}"
                )
            self._text = python_docs()
        elif self.path is not None:
            self._text = self._read(Path(self.path).expanduser())
        elif self.url is not None:
            self._text = self._fetch()
        else:
            raise ValueError(f"data.path is missing: data={self.name} needs data.path=FILE")

    def _read(self, path: Path) -> str:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise FileNotFoundError(f"data.path={path}: {error.strerror}; give the path of a text file") from None
        if not content:
            raise ValueError(f"data.path={path} is empty; give the path of a text file")
        if self.sha256 and digest(content) != self.sha256:
            raise ValueError(
                f"data.path={path} has SHA-256 {digest(content)}, but {self.name} has {self.sha256}: "
                "it is another text or a changed copy. For a text of your own: data=text data.path=FILE"
            )
        self.resolved = {"path": str(path.resolve())}
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"data.path={path} is not UTF-8 text (byte {error.start})") from None

    def _fetch(self) -> str:
        file = data_folder(self.folder) / f"{self.name}.txt"
        try:
            download(self.url, self.sha256, file)
            self.resolved = {"folder": str(file.parent.resolve())}
            return file.read_bytes().decode("utf-8")
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: no URL at all
            trouble = (
                f"{self.name} is not at {file} and cannot be downloaded from {self.url} ({error}). Put the file there "
                f"or give it as data.path=FILE; its SHA-256 is {self.sha256}"
            )
        if self.fallback is None:
            raise FileNotFoundError(trouble)
        self.warning = f"NOT training on {self.name}: {trouble}. Training on {self.fallback} instead."
        self.name = self.fallback
        self.resolved = {"name": self.name, "url": None, "sha256": None, "fallback": None}
        return python_docs()

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "record"):
            return
        text = self._text
        self.tokenizer = CharTokenizer.from_text(text)
        ids = self.tokenizer.encode(text)
        split = int(0.9 * len(ids))
        self.train_ids, self.val_ids = ids[:split], ids[split:]
        self.record = {"name": self.name, "sha256": digest(text.encode("utf-8"))}
        self.check_lengths(self.path or self.name)
