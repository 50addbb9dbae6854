"""Where data lies: text files, token folders, Python's own documentation, and downloads with a checksum.

Imports only the standard library, so that paths can be checked before torch is imported.
"""

import codecs
import contextlib
import glob
import hashlib
import http.client
import math
import os
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlab.errors import MissingFileError, UserError
from gptlab.run import write_atomic

PYTHON_DOCS = "python_docs"
PIECE = 1 << 18  # bytes read at a time: what is computed from them stays in the processor's cache
TIMEOUT, DEADLINE = 10.0, 120.0  # seconds without an answer, and for a whole download

# OpenAI's files of GPT-2, and their SHA-256.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def text_files(path: str | None, key: str) -> list[Path]:
    """The sorted files that the config key `key` names: a file, the *.txt in and below a folder, or the matches of a
    glob (`**` recurses). Hidden files only where named. Opens none of them.

    Raises:
        MissingFileError: nothing is there.
        UserError: empty, or not regular files: a pipe would hang, and a text is read more than once.
    """
    if not path:
        raise UserError(f"{key} is missing; give a file, a folder of .txt files, or a glob such as texts/**/*.md")
    place = os.path.expanduser(path)
    if place.count(os.sep) > 200:  # glob would recurse as deep
        raise MissingFileError(f"{key}: path too long")
    if os.path.isdir(place):
        visible = (file for file in Path(place).rglob("*.txt") if "/." not in f"/{file.relative_to(place)}")
        files = sorted(file for file in visible if not file.is_dir())
    elif _is_glob(place):
        matches = sorted(glob.glob(place, recursive=True), key=lambda match: (-len(match), match))
        once = {os.path.realpath(match): Path(match) for match in matches if not os.path.isdir(match)}
        files = sorted(once.values())  # `**` follows links
    else:
        files = [Path(place)]
    if not files:
        raise MissingFileError(f"{key}={path} matches no file; give a file, a folder of .txt files, or a glob")
    for file in files:
        if not os.path.exists(file):
            raise MissingFileError(f"{key}={path}: No such file or directory")
        if not os.path.isfile(file):
            raise UserError(f"{key}={path}: {file} is not a regular file")
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{key}={path} is empty")
    return files


def _is_glob(place: str) -> bool:
    return glob.escape(place) != place and not os.path.lexists(place)


def make_absolute(path: str) -> str:
    """The same for `text_files` from any working directory."""
    place = os.path.expanduser(path)
    if _is_glob(place):
        return os.path.join(glob.escape(os.getcwd()), place)  # an absolute glob stays as it is
    return str(Path(place).resolve())


class TextFiles:
    """The text of `text_files(path, key)`, joined with newlines; each iteration reads it anew, in pieces. A byte-order
    mark at the start of a file is not part of it. Raises UserError while iterating if a file is not UTF-8."""

    def __init__(self, path: str, key: str) -> None:
        self.files, self.key = text_files(path, key), key

    def __iter__(self) -> Iterator[str]:
        for i, file in enumerate(self.files):
            if i:
                yield "\n"
            decoder, end = codecs.getincrementaldecoder("utf-8-sig")(), 0
            try:
                with open(file, "rb", buffering=0) as stream:
                    while chunk := stream.read(PIECE):
                        end += len(chunk)
                        yield decoder.decode(chunk)
                decoder.decode(b"", final=True)  # complains if the last character is cut off
            except OSError as error:
                raise UserError(f"{self.key}: {file} cannot be read ({error.strerror})") from None
            except UnicodeDecodeError as error:
                at = end - len(error.object) + error.start  # the object begins with what was left of the piece before
                raise UserError(
                    f"{self.key}: {file} is not UTF-8 text (byte {at}); convert it with iconv -f ENCODING -t UTF-8"
                ) from None


def python_docs() -> str:
    """The documentation topics of the standard library's `pydoc_data` (about 0.5 MB of English and code).

    Raises:
        MissingFileError: some operating systems ship a Python without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise MissingFileError("this Python lacks pydoc_data; use a text with data=text data.path=FILE") from None
    return "\n".join(topics[name] for name in sorted(topics))


def token_files(path: str | None) -> Path:
    """The folder `data.path`, else the default output of scripts/prepare_openwebtext.py.

    Raises:
        MissingFileError: it does not hold both token files.
    """
    folder = Path(os.path.expanduser(path)) if path else data_folder(None) / "openwebtext"
    missing = [name for name in ("train.bin", "val.bin") if not os.path.isfile(folder / name)]
    if missing:
        fix = "prepare your documents with python scripts/prepare_openwebtext.py path=DOCUMENTS out=FOLDER"
        if os.path.isdir(folder / ".partial"):
            fix = "its preparation is unfinished; run the same command again"
        raise MissingFileError(f"data.path={path or folder} has no {' and no '.join(missing)}; {fix}")
    return folder


def data_folder(folder: str | None) -> Path:
    """`data.folder`, else $GPTLAB_DATA, else ~/.cache/gptlab."""
    return Path(os.path.expanduser(folder or os.environ.get("GPTLAB_DATA") or "~/.cache/gptlab"))


def fetch(
    url: str, sha256: str, path: Path, alternative: str = "give your copy as data.path=FILE", replace: bool = False
) -> Path:
    """`path`, downloaded unless a file with this SHA-256 is there; written as a whole or not at all.

    Raises:
        MissingFileError: no network, too slow, another file; the text says where to put it by hand, or `alternative`.
        UserError: there is another file at `path`, without `replace`.
    """
    try:
        if not (path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256):
            if path.exists() and not replace:
                raise UserError(f"{path} exists, but its SHA-256 is not {sha256}; remove it, or {alternative}")
            content = _download(url)
            if (actual := hashlib.sha256(content).hexdigest()) != sha256:
                raise OSError(f"the file there has SHA-256 {actual}")
            write_atomic(path, content)
    except UserError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: not a URL
        raise MissingFileError(
            f"{path} with SHA-256 {sha256} is missing, and {url} cannot be downloaded ({error}); put it there, or "
            f"{alternative}"
        ) from None
    return path


def _download(url: str) -> bytes:
    content, end = bytearray(), time.monotonic() + DEADLINE
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        while chunk := response.read1(1 << 16):
            content += chunk
            if time.monotonic() > end:
                raise TimeoutError(f"not finished after {DEADLINE:.0f} seconds")
    return bytes(content)


def load_gpt2_tokenizer(alternative: str) -> Any:
    """A `BPETokenizer` of GPT-2's 50,257 tokens. Its two files are fetched once into tiktoken's cache: tiktoken's own
    download has no timeout.

    Raises:
        MissingFileError: they cannot be fetched; the text names `alternative`.
    """
    import tiktoken

    from gptlab.tokenizer import BPETokenizer

    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = Path(folder or os.path.join(tempfile.gettempdir(), "data-gym-cache"))
    for name, sha256 in GPT2_FILES.items():
        url = GPT2_URL + name
        fetch(url, sha256, cache / hashlib.sha1(url.encode()).hexdigest(), alternative, replace=True)  # its name
    ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    return BPETokenizer(sorted(ranks, key=ranks.get))


def available_cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may use: its affinity, and the quota of its container or control group (v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError):
        own = (root / "proc/self/cgroup").read_text().strip().rpartition("::")[2].strip("/")
        for group in ("", own):
            with contextlib.suppress(OSError, ValueError):  # no such file; no quota: "max"
                quota, period = map(int, (root / "sys/fs/cgroup" / group / "cpu.max").read_text().split())
                cores = min(cores, math.ceil(quota / period))
    return cores
