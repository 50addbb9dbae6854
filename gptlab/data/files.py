"""Where data lies: text files, token folders, Python's own documentation, and downloads with a checksum.

Imports only the standard library, so that paths can be checked before torch is imported.
"""

import codecs
import glob
import hashlib
import http.client
import math
import os
import shlex
import stat
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
        UserError: empty, not readable, or not regular files.
    """
    if not path:
        raise UserError(f"{key} is missing; give a file, a folder of .txt files, or a glob such as texts/**/*.md")
    given, place = f"{key}={path}", os.path.expanduser(path)
    if os.path.isdir(place):
        files = _txt_files(place, given)
    elif place.count(os.sep) > 200:  # glob would recurse as deep
        raise MissingFileError(f"{key}: path too long")
    elif _is_glob(place):
        matches = [match for match in glob.glob(place, recursive=True) if not os.path.isdir(match)]
        matches.sort(key=lambda match: (-len(match), match))
        files = sorted({os.path.realpath(match): Path(match) for match in matches}.values())  # `**` follows links
        if not files:
            raise MissingFileError(f"{given}: no such file, and no match as a glob")
    else:
        files = [Path(place)]
    sizes = [_file_size(file, given) for file in files]
    if not any(sizes):
        raise UserError(f"{given} is empty; give a text")
    return files


def _is_glob(place: str) -> bool:
    return glob.escape(place) != place and not os.path.lexists(place)


def _txt_files(folder: str, given: str) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{given}: folder {error.filename} cannot be read ({error.strerror})") from None

    files = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if name.endswith(".txt") and not name.startswith(".")]
    if not files:
        raise MissingFileError(f"{given} is a folder without .txt files; give a file, or a glob such as FOLDER/**/*.md")
    return sorted(files)


def _file_size(file: Path, given: str) -> int:
    """In bytes; raises as `text_files` does."""
    try:
        status = file.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise MissingFileError(
            f"{given}: {getattr(error, 'strerror', None) or error}; give the path of a text"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{given}: {file} is not a regular file, and a text is read more than once; write it to a file")
    if not os.access(file, os.R_OK):
        raise UserError(f"{given}: {file}: Permission denied")
    return status.st_size


def make_absolute(path: str) -> str:
    """The same for `text_files` from any working directory."""
    place = os.path.expanduser(path)
    if _is_glob(place):
        return os.path.join(glob.escape(os.getcwd()), place)  # an absolute glob stays as it is
    return str(Path(place).resolve())


class TextFiles:
    """The text of `text_files(path, key)`, joined with newlines; each iteration reads it anew, in pieces. A byte-order
    mark at the start of a file is not part of it.

    Raises:
        UserError: while iterating; a file cannot be read, or is not UTF-8.
    """

    def __init__(self, path: str, key: str) -> None:
        self.files, self.key = text_files(path, key), key

    def __iter__(self) -> Iterator[str]:
        for i, file in enumerate(self.files):
            if i:
                yield "\n"
            yield from self._read(file)

    def _read(self, file: Path) -> Iterator[str]:
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
                f"{self.key}: {file} is not UTF-8 text (byte {at}); convert it with "
                f"iconv -f ENCODING -t UTF-8 {shlex.quote(str(file))} > NEW_FILE"
            ) from None


def python_docs() -> str:
    """The documentation topics of the standard library's `pydoc_data` (about 0.5 MB of English and code).

    Raises:
        MissingFileError: some operating systems ship a Python without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise MissingFileError(
            "this Python lacks the standard library's pydoc_data; install it, or use a text: data=text data.path=FILE"
        ) from None
    return "\n".join(topics[name] for name in sorted(topics))


def token_files(path: str | None) -> Path:
    """The folder `data.path`, else the default output of scripts/prepare_openwebtext.py.

    Raises:
        MissingFileError: it does not hold both token files.
    """
    folder = Path(os.path.expanduser(path)) if path else data_folder(None) / "openwebtext"
    missing = [name for name in ("train.bin", "val.bin") if not os.path.isfile(folder / name)]
    if not missing:
        return folder
    given = f"data.path={path}" if path else f"data.path is missing, and {folder}"
    if os.path.isdir(folder / ".partial"):
        raise MissingFileError(f"{given}: its preparation is unfinished; run the same command again")
    raise MissingFileError(
        f"{given} has no {' and no '.join(missing)}; prepare OpenWebText with python scripts/prepare_openwebtext.py, "
        "or your documents with python scripts/prepare_openwebtext.py path=DOCUMENTS out=FOLDER"
    )


def data_folder(folder: str | None) -> Path:
    """`data.folder`, else $GPTLAB_DATA, else ~/.cache/gptlab."""
    return Path(os.path.expanduser(folder or os.environ.get("GPTLAB_DATA") or "~/.cache/gptlab"))


def fetch(
    url: str,
    sha256: str,
    path: Path,
    *,
    alternative: str = "give your copy as data.path=FILE",
    timeout: float = 10.0,
    deadline: float = 120.0,
) -> Path:
    """`path`, downloaded unless a file with this SHA-256 is there; written as a whole or not at all.

    Args:
        alternative: to downloading it, for the error.
        timeout: seconds without an answer.
        deadline: seconds for the whole download.

    Raises:
        MissingFileError: no network, too slow, another file; the text says where to put it by hand.
    """
    try:
        if not (path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256):
            content = _download(url, timeout, deadline)
            if (actual := hashlib.sha256(content).hexdigest()) != sha256:
                raise OSError(f"the file there has SHA-256 {actual}")
            write_atomic(path, content)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: not a URL
        raise MissingFileError(
            f"{path} with SHA-256 {sha256} is missing, and {url} cannot be downloaded ({error}); put it there, or "
            f"{alternative}"
        ) from None
    return path


def _download(url: str, timeout: float, deadline: float) -> bytes:
    content, end = bytearray(), time.monotonic() + deadline
    with urllib.request.urlopen(url, timeout=timeout) as response:
        while chunk := response.read1(1 << 16):
            content += chunk
            if time.monotonic() > end:
                raise TimeoutError(f"not finished after {deadline:.0f} seconds")
    return bytes(content)


def load_gpt2_tokenizer(alternative: str) -> Any:
    """A `BPETokenizer` of GPT-2's 50,257 tokens. Its two files are fetched once into tiktoken's cache: tiktoken's own
    download has no timeout.

    Raises:
        MissingFileError: they cannot be fetched; the text names `alternative`.
        UserError: tiktoken's cache is turned off.
    """
    import tiktoken

    from gptlab.tokenizer import BPETokenizer

    folder = next((os.environ[key] for key in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR") if key in os.environ), None)
    if folder == "":
        raise UserError(
            "TIKTOKEN_CACHE_DIR is empty, which turns tiktoken's cache off; set it to a folder, or unset it"
        )
    cache = Path(folder or os.path.join(tempfile.gettempdir(), "data-gym-cache"))
    for name, sha256 in GPT2_FILES.items():
        url = GPT2_URL + name
        fetch(url, sha256, cache / hashlib.sha1(url.encode()).hexdigest(), alternative=alternative)  # tiktoken's name
    ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    return BPETokenizer(sorted(ranks, key=ranks.get))


def available_cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may use: its affinity, and the CPU quota of its control groups, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *(max(math.ceil(quota), 1) for quota in _cpu_quotas(root))])


def _cpu_quotas(root: Path) -> Iterator[float]:
    """In cores, of each control group (v1 and v2) that the process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        place = top / group.strip("/")  # a container may see its own group as the top, and not this one
        for folder in (place, *(parent for parent in place.parents if parent.is_relative_to(top))):
            try:
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if quota != "max" and int(quota) > 0:
                    yield int(quota) / int(period)
            except (OSError, ValueError):
                continue
