"""Where texts come from: the documentation inside every Python, and downloads with a checksum."""

import hashlib
import os
import time
import urllib.request
from pathlib import Path

from gptlab.runs import write_atomic

PYTHON_DOCS = "python_docs"


def python_docs() -> str:
    """The documentation topics of the standard library's `pydoc_data` (about 0.5 MB of English and code).

    Raises:
        FileNotFoundError: some operating systems ship a Python without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(
            "this Python lacks the standard library's pydoc_data; install the full standard library, or train on a "
            "text of your own: data=text data.path=FILE"
        ) from None
    return "\n".join(topics[name] for name in sorted(topics))


def data_folder(folder: str | None) -> Path:
    """`data.folder`, else $GPTLAB_DATA, else ~/.cache/gptlab."""
    return Path(folder or os.environ.get("GPTLAB_DATA") or "~/.cache/gptlab").expanduser()


def digest(content: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def download(url: str, checksum: str, to: Path, *, timeout: float = 10.0, deadline: float = 120.0) -> None:
    """Fetch a file once: written beside its target and renamed only if its SHA-256 is right.

    Args:
        timeout: seconds without an answer; `deadline`: seconds for the whole file.

    Raises:
        OSError: no network, too slow, or a wrong checksum; the text says which.
    """
    if to.exists() and digest(to.read_bytes()) == checksum:
        return
    started = time.monotonic()
    chunks = []
    with urllib.request.urlopen(url, timeout=timeout) as response:
        while chunk := response.read1(1 << 16):  # read() would wait for the whole
            chunks.append(chunk)
            if time.monotonic() - started > deadline:
                raise TimeoutError(f"not finished after {deadline:.0f} seconds")
    content = b"".join(chunks)
    if digest(content) != checksum:
        raise OSError(f"the file there has SHA-256 {digest(content)}, not the expected {checksum}")
    write_atomic(to, content)
