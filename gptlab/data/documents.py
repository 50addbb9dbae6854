"""Documents to tokenize: text files, rows of .jsonl and .parquet files, and rows of Hugging Face data sets.

They are read in parts of a few MB, so that processes can share the work and memory stays flat. (Not through
`datasets`: one malformed row would make it refuse a whole file, and it first copies everything to its cache.)
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.errors import UserError

PART = 4 << 20  # bytes of a .jsonl file
PARQUET_PART = 64 << 20  # more: each part of a row group is read from its beginning


class Part(NamedTuple):
    """What one process reads at a time."""

    kind: str  # text | jsonl | parquet | dataset
    file: str  # "" for a data set
    start: int  # bytes of .jsonl, whose lines begin in start ... stop; rows of a data set or a Parquet row group
    stop: int
    size: int  # bytes, about
    row_group: int = 0


def parts_of(files: list[Path]) -> list[Part]:
    """The parts in order; in .jsonl and .parquet files each row is a document, any other file is one itself.

    Raises:
        UserError: a file that cannot be read as documents.
    """
    parts: list[Part] = []
    for file in files:
        suffix, size = file.suffix.lower(), file.stat().st_size
        if suffix == ".parquet":
            parts += _parquet_parts(file)
        elif suffix in (".jsonl", ".ndjson"):
            starts = range(0, size, PART)
            parts += [Part("jsonl", str(file), at, min(at + PART, size), min(PART, size - at)) for at in starts]
        elif suffix in (".json", ".gz", ".zst"):
            raise UserError(f"path: {file} must be .jsonl (a JSON object per line), .parquet or a text file")
        else:
            parts.append(Part("text", str(file), 0, size, size))
    return parts


def _parquet_parts(file: Path) -> Iterator[Part]:
    import pyarrow
    from pyarrow import parquet

    try:
        metadata = parquet.ParquetFile(file).metadata
    except pyarrow.ArrowException as error:
        raise UserError(f"path: {file} is not a Parquet file ({error})") from None
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        n = max(-(-group.total_byte_size // PARQUET_PART), 1)
        for start, stop in itertools.pairwise(group.num_rows * k // n for k in range(n + 1)):
            yield Part("parquet", str(file), start, stop, group.total_byte_size // n, i)


def parts_of_dataset(dataset: Any, rows: int = 1000) -> list[Part]:
    """The parts of a data set of Hugging Face's `datasets`."""
    n = len(dataset)
    size = (dataset.data.nbytes or 0) // max(n, 1)
    return [Part("dataset", "", at, min(at + rows, n), size * min(rows, n - at)) for at in range(0, n, rows)]


def read(part: Part, text_key: str, dataset: Any = None) -> Iterator[str | None]:
    """The documents of a part; None for one that cannot be read."""
    if part.kind == "text":
        values = _decode([Path(part.file).read_bytes()], lambda content: content.decode("utf-8-sig"))
    elif part.kind == "jsonl":
        values = _decode(_read_lines(part), lambda line: json.loads(line)[text_key])
    elif part.kind == "parquet":
        values = _read_parquet(part, text_key)
    else:
        column = dataset.with_format("arrow")[part.start : part.stop][text_key]
        values = _decode(column, lambda value: value.as_py())
    return (value if isinstance(value, str) else None for value in values)


def _decode(values: Iterable[Any], decode: Callable[[Any], Any]) -> Iterator[Any]:
    """None for values that are not UTF-8, or no JSON object with a text."""
    for value in values:
        try:
            yield decode(value)
        except (ValueError, KeyError, TypeError, RecursionError):
            yield None


def _read_lines(part: Part) -> Iterator[bytes]:
    """The lines that begin in the part."""
    with open(part.file, "rb") as file:
        at = max(part.start - 1, 0)
        file.seek(at)
        if part.start > 0:
            at += len(file.readline())
        while at < part.stop and (line := file.readline()):
            at += len(line)
            if not line.isspace():
                yield line


def _read_parquet(part: Part, text_key: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    at = 0  # rows of the group
    try:
        file = parquet.ParquetFile(part.file, memory_map=True, buffer_size=1 << 20)  # read as far as it is needed
        for batch in file.iter_batches(256, row_groups=[part.row_group], columns=[text_key]):
            rows = batch.column(0)[max(part.start - at, 0) : max(part.stop - at, 0)]
            yield from _decode(rows, lambda value: value.as_py())
            at += len(batch)
            if at >= part.stop:
                return
    except (pyarrow.ArrowException, OSError, IndexError):  # IndexError: no such column
        yield from [None] * (part.stop - max(at, part.start))


def sample(parts: list[Part], text_key: str, dataset: Any = None, most: int = 100_000_000) -> Iterator[str]:
    """Documents from parts all over the data, up to about `most` bytes: enough to learn a vocabulary from."""
    step = max(-(-sum(part.size for part in parts) // most), 1)
    for part in parts[::step]:
        for text in read(part, text_key, dataset):
            if text is not None and not re.search("[\ud800-\udfff]", text):  # lone surrogates cannot be encoded
                yield text
