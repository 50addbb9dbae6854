"""Where texts come from: files, the documentation inside every Python, and downloads with a checksum."""

import codecs
import difflib
import errno
import glob
import hashlib
import os
import re
import shlex
import stat
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from gptlab.run import write_atomic

PYTHON_DOCS = "python_docs"
PIECE = 1 << 18  # bytes read at a time: what is made of them stays in the processor's cache


def text_files(path: str | None, key: str) -> list[Path]:
    """The files that the config key `data.path` or `data.val_path` stands for, in sorted order: a file, the *.txt in a
    folder and below it, or what a glob matches (`**` is recursive). Hidden ones only where they are named. Neither
    reads nor opens a file.

    Raises:
        FileNotFoundError: nothing is there; the text says what lies near it.
        ValueError: what is there is empty, not readable or not a regular file.
    """
    if not path:
        raise ValueError(f"{key} is missing: give a file, a folder of .txt files, or a glob such as texts/**/*.md")
    given, place = f"{key}={path}", os.path.expanduser(path)
    if os.path.isdir(place):
        files = _in_folder(place, key, given)
    elif place.count(os.sep) > 200:  # glob goes as deep as the path, and would not come back
        raise FileNotFoundError(f"{key}: there is no path of {place.count(os.sep)} folders")
    elif _is_glob(place):
        matches = [match for match in glob.glob(place, recursive=True) if not os.path.isdir(match)]
        matches.sort(key=lambda match: (-len(match), match))
        files = sorted({os.path.realpath(match): Path(match) for match in matches}.values())  # links may lead back
        if not files:
            raise FileNotFoundError(f"{given}: no file has this name or matches it as a glob; {_near(Path(place))}")
    else:
        files = [Path(place)]
    single = files == [Path(place)]
    sizes = [_size(file, given if single else f"{given}: {file}") for file in files]
    if not any(sizes):
        what = "is empty" if single else f"holds nothing but empty files, {len(files)} of them"
        raise ValueError(f"{given} {what}; give the path of a text")
    return files


def from_anywhere(path: str) -> str:
    """The same for `text_files`, whatever the working directory."""
    place = os.path.expanduser(path)
    if _is_glob(place):
        return os.path.join(glob.escape(os.getcwd()), place)  # an absolute glob stays as it is
    return str(Path(place).resolve())


def _is_glob(place: str) -> bool:
    return glob.escape(place) != place and not os.path.lexists(place)


def _in_folder(folder: str, key: str, given: str) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"{given}: the folder {error.filename} cannot be read ({error.strerror})") from None

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    texts = sorted(file for file in found if file.suffix == ".txt")
    if not texts:
        suffixes = Counter(file.suffix for file in found).most_common(4)
        holds = ", ".join(f"{count} {suffix or 'without an extension'}" for suffix, count in suffixes)
        hint = "give a file, or another folder"
        if found:
            pattern = os.path.join(glob.escape(folder), "**", f"*{glob.escape(suffixes[0][0])}")
            hint += f", or a glob such as {shlex.quote(f'{key}={pattern}')}"
        raise FileNotFoundError(f"{given} is a folder without .txt files (its files: {holds or 'none'}); {hint}")
    return texts


def _size(file: Path, given: str) -> int:
    """In bytes; raises as `text_files` does."""
    try:
        status = file.stat()
    except (OSError, ValueError) as error:  # ValueError: no file could have such a name
        reason = getattr(error, "strerror", None) or str(error)
        if os.path.islink(file):
            hint = f"it is a link to {os.readlink(file)}"
        elif getattr(error, "errno", None) in (errno.ENOENT, errno.ENOTDIR):
            hint = _near(file)
        else:
            hint = "give the path of a text that can be read"
        raise FileNotFoundError(f"{given}: {reason}; {hint}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(
            f"{given} is not a regular file but a pipe, socket or device, and a text is read more than once: write it "
            "to a file first"
        )
    if not os.access(file, os.R_OK):
        raise ValueError(f"{given}: Permission denied; make it readable (chmod u+r) or give another text")
    return status.st_size


def _near(missing: Path) -> str:
    """What there is instead: the names most like the missing one in the nearest folder, else a few of all."""
    try:
        folder = next(parent for parent in missing.parents if os.path.isdir(parent))
        names = {name.lower(): name for name in sorted(os.listdir(folder)) if not name.startswith(".")}
    except (OSError, StopIteration):
        return "give the path of a text"
    if close := difflib.get_close_matches(missing.relative_to(folder).parts[0].lower(), names):
        return f"did you mean {' or '.join(str(folder / names[name]) for name in close)}?"
    some, more = list(names.values())[:5], len(names) - 5
    return f"{folder.resolve()} holds {', '.join(some) or 'nothing'}{f' and {more} more' if more > 0 else ''}"


class TextFiles:
    """The text of `text_files(path, key)`, joined with line breaks: iterating reads it in pieces, each time anew.

    Raises:
        ValueError: while iterating; a file cannot be read, or is not UTF-8.
    """

    def __init__(self, path: str, key: str) -> None:
        self.files, self.key = text_files(path, key), key

    def __iter__(self) -> Iterator[str]:
        for i, file in enumerate(self.files):
            if i:
                yield "\n"
            yield from self._pieces(file)

    def _pieces(self, file: Path) -> Iterator[str]:
        decoder, end = codecs.getincrementaldecoder("utf-8")(), 0
        try:
            with open(file, "rb", buffering=0) as stream:
                while chunk := stream.read(PIECE):
                    end += len(chunk)
                    yield decoder.decode(chunk)
            decoder.decode(b"", final=True)  # complains if the last character is cut off
        except OSError as error:
            raise ValueError(f"{self.key}: {file} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            at = end - len(error.object) + error.start  # the object begins with what was left of the piece before
            raise ValueError(
                f"{self.key}: {file} is not UTF-8 text (byte {at}); give a text file, and convert it if it has another "
                f"encoding: iconv -f ENCODING -t UTF-8 {shlex.quote(str(file))} > NEW_FILE"
            ) from None

    def find(self, chars: Iterable[str]) -> tuple[str, str]:
        """The first of these characters, which occur in the text, and words that say where."""
        wanted = re.compile(f"[{re.escape(''.join(chars))}]")
        for file in self.files:
            at = 0
            for piece in self._pieces(file):
                if match := wanted.search(piece):
                    return match[0], f"at position {at + match.start()} of {file}"
                at += len(piece)
        return "\n", "between its files"


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


def token_files(path: str | None) -> Path:
    """The folder that data.path names, else the one that scripts/prepare_openwebtext.py fills unless told otherwise.

    Raises:
        FileNotFoundError: it does not hold both token files.
    """
    folder = Path(os.path.expanduser(path)) if path else data_folder(None) / "openwebtext"
    missing = [name for name in ("train.bin", "val.bin") if not os.path.isfile(folder / name)]
    if not missing:
        return folder
    given = f"data.path={path}" if path else f"data.path is not given, and {folder}"
    if os.path.isdir(folder / ".partial"):
        raise FileNotFoundError(f"{given}: its preparation has not come to its end; give the same command again")
    raise FileNotFoundError(
        f"{given} holds no {' and no '.join(missing)}: give a folder that has been prepared, OpenWebText with "
        "python scripts/prepare_openwebtext.py, documents of your own with "
        "python scripts/prepare_openwebtext.py path=DOCUMENTS out=FOLDER"
    )


def data_folder(folder: str | None) -> Path:
    """`data.folder`, else $GPTLAB_DATA, else ~/.cache/gptlab."""
    return Path(os.path.expanduser(folder or os.environ.get("GPTLAB_DATA") or "~/.cache/gptlab"))


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
    answer: list[bytes | BaseException] = []
    # In a thread: its start and each single answer may be slow in ways that no timeout of urllib's covers.
    thread = threading.Thread(target=_read_url, args=(url, timeout, answer), daemon=True)
    thread.start()
    thread.join(deadline)
    if not answer:
        raise TimeoutError(f"not finished after {deadline:.0f} seconds")
    if isinstance(content := answer[0], BaseException):
        raise content
    if digest(content) != checksum:
        raise OSError(f"the file there has SHA-256 {digest(content)}, not the expected {checksum}")
    write_atomic(to, content)


def _read_url(url: str, timeout: float, answer: list) -> None:
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            answer.append(response.read())
    except BaseException as error:
        answer.append(error)
