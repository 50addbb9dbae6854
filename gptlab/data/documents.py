"""Documents to be tokenised: rows of .jsonl and .parquet files and of Hugging Face's data sets, and text files. They are read
in parts of a few MB, so that several processes can share the work and memory does not grow with the files."""

import bisect
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.data.files import TextFiles

PART = 4 << 20  # bytes of a file
PARQUET_PART = 64 << 20  # there each part is looked for from the beginning of its row group
# Where a text can be cut, see `whole_words`: after a visible character of ASCII, or one of two or three bytes, that a blank
# follows. Left out are all characters that Unicode counts as blanks, and some others.
BORDER = re.compile(rb"(?:[!-~]|[\xc3-\xdf][\x80-\xbf]|\xe3\x80[\x81-\xbf]|\xe3[\x81-\xbf][\x80-\xbf]|[\xe4-\xef][\x80-\xbf]{2})(?=[ \t\r\n])")  # fmt: skip


class Part(NamedTuple):
    """A piece of a source: bytes start ... stop of a text or .jsonl file, or those rows of a Parquet file or a data set."""

    kind: str  # text | jsonl | parquet | rows, or unreadable: a file
    file: str
    start: int
    stop: int
    size: int  # bytes, about


def parts_of(files: list[Path]) -> list[Part]:
    """What is to be read, in order: of .jsonl and .parquet files each row is a document, any other file is one itself.

    Raises:
        ValueError: a .parquet that is none, or a kind of file that cannot be read here.
    """
    found: list[Part] = []
    for file in files:
        suffix = file.suffix.lower()
        if suffix == ".parquet":
            found += _parquet_parts(file)
        elif suffix in (".json", ".gz", ".zst", ".bz2", ".xz", ".zip", ".arrow"):
            raise ValueError(
                f"path: {file} cannot be read as it is; give .jsonl (a JSON object in each line), .parquet or text files, "
                "unpacked"
            )
        else:
            kind, size = "jsonl" if suffix in (".jsonl", ".ndjson") else "text", file.stat().st_size
            if kind == "text" and size > PART and not _is_utf8(file):  # a smaller one is read at once
                found.append(Part("unreadable", str(file), 0, size, size))
                continue
            starts = range(0, max(size, 1), PART)
            found += [Part(kind, str(file), at, min(at + PART, size), min(PART, size - at)) for at in starts]
    return found


def _is_utf8(file: Path) -> bool:
    try:
        for _ in TextFiles(str(file), "path"):
            pass
    except ValueError:
        return False
    return True


def _parquet_parts(file: Path) -> list[Part]:
    import pyarrow
    from pyarrow import parquet

    try:
        metadata = parquet.ParquetFile(file).metadata
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"path: {file} is no Parquet file ({error})") from None
    parts, first = [], 0
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        n = max(-(-group.total_byte_size // PARQUET_PART), 1)
        ends = [first + group.num_rows * i // n for i in range(n + 1)]
        parts += [Part("parquet", str(file), *rows, group.total_byte_size // n) for rows in itertools.pairwise(ends)]
        first = ends[-1]
    return parts


def rows_of(dataset: Any, rows: int = 1000) -> list[Part]:
    """The parts of a data set of Hugging Face's `datasets`."""
    size = (dataset.data.nbytes or 0) // max(len(dataset), 1)
    starts = range(0, len(dataset), rows)
    return [Part("rows", "", at, min(at + rows, len(dataset)), size * min(rows, len(dataset) - at)) for at in starts]


def read(part: Part, text_key: str, dataset: Any = None) -> Iterator[tuple[str | None, bool]]:
    """The texts of a part, None for what cannot be read, and for each whether its document ends with it."""
    if part.kind == "text":
        yield _read_text(part)
        return
    if part.kind == "jsonl":
        values = _read_jsonl(part, text_key)
    elif part.kind == "parquet":
        values = _read_parquet(part, text_key)
    elif part.kind == "rows":
        values = _values(dataset.with_format("arrow")[part.start : part.stop][text_key])
    else:
        values = [None]
    yield from ((value if isinstance(value, str) else None, True) for value in values)


def _read_text(part: Part) -> tuple[str | None, bool]:
    with open(part.file, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start, stop = _border(file, part.start, size), _border(file, part.stop, size)
        file.seek(start)
        raw = file.read(stop - start)
    try:
        return raw.decode("utf-8"), part.stop == size
    except UnicodeDecodeError:  # only where the part is the whole file: see `parts_of`
        return None, True


def _border(file: Any, at: int, size: int) -> int:
    """The first place from `at` on where the text can be cut."""
    if at == 0:
        return 0
    while at < size:
        file.seek(at)
        window = file.read(1 << 16)
        if found := BORDER.search(window):
            return at + found.end()
        at += max(len(window) - 3, 1)  # a character may lie across
    return size


def _read_jsonl(part: Part, text_key: str) -> Iterator[Any]:
    """Of the lines that begin in the part."""
    with open(part.file, "rb") as file:
        at = max(part.start - 1, 0)
        file.seek(at)
        if part.start > 0:
            at += len(file.readline())
        while at < part.stop and (line := file.readline()):
            at += len(line)
            if line.isspace():
                continue
            try:
                yield json.loads(line)[text_key]
            except (ValueError, KeyError, TypeError, RecursionError):
                yield None


def _read_parquet(part: Part, text_key: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    at = part.start
    try:
        file = parquet.ParquetFile(part.file, memory_map=True, buffer_size=1 << 20)  # read as far as it is needed
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        group = bisect.bisect_right(ends, part.start)
        first = ends[group] - sizes[group]
        for batch in file.iter_batches(256, row_groups=[group], columns=[text_key]):
            column = batch.column(0).slice(max(at - first, 0))[: part.stop - at]
            first += len(batch)
            at += len(column)
            yield from _values(column)
            if at == part.stop:
                return
    except (pyarrow.ArrowException, OSError, IndexError):  # IndexError: no such column
        yield from [None] * (part.stop - at)


def _values(column: Iterable[Any]) -> Iterator[Any]:
    """Of a column of Arrow."""
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            yield None


def sample(parts: list[Part], text_key: str, dataset: Any = None, most: int = 100_000_000) -> Iterator[str]:
    """Texts from parts spread over all, up to about `most` bytes: enough to learn a vocabulary from."""
    step = max(-(-sum(part.size for part in parts) // most), 1)
    for part in parts[::step]:
        for text, _ in read(part, text_key, dataset):
            if text is not None and not re.search("[\ud800-\udfff]", text):  # a lone surrogate is no character
                yield text
