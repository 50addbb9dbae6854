"""Documents -> token files: train.bin and val.bin, raw ids as nanoGPT writes them, and meta.json, which says what they are.

Twice through the data, on memory that does not grow with it (but for 16 bytes per document). First, several processes read
and encode a part of the sources each; one file gets all ids in the order of the sources, another the length of each
document. Then the documents are dealt to the two splits, shuffled as nanoGPT's script does, and copied there. Until all is
written and synced, it lies in the folder `.partial`; a run that is interrupted goes on from there.
"""

import collections
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import mmap
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from gptlab.data.documents import Part, read
from gptlab.run import write_json
from gptlab.tokenizer import BPETokenizer, from_state, id_type

COPY = 1 << 20  # tokens that are copied at a time
ENOUGH = 4 << 20  # bytes of sources, to tell from how many tokens there will be


class Encoded(NamedTuple):
    ids: bytes
    documents: list[tuple[int, int]]  # tokens, and bytes of text; the last one may go on in the next part
    complete: bool  # or does it
    unreadable: int


class Encoder:
    """Part -> its token ids, the end of the text after each document."""

    def __init__(self, tokenizer_state: dict[str, Any], text_key: str, dataset: Any) -> None:
        self.tokenizer: BPETokenizer = from_state(tokenizer_state)
        self.text_key, self.dataset = text_key, dataset
        self.dtype = id_type(self.tokenizer.vocab_size).newbyteorder("<")

    def __call__(self, part: Part) -> Encoded:
        end = np.array([self.tokenizer.end_of_text])
        ids: list[np.ndarray] = [np.empty(0, self.dtype)]
        documents, unreadable, complete = [], 0, True
        for text, ends in read(part, self.text_key, self.dataset):
            try:
                new = self.tokenizer.encode(text)
            except (ValueError, TypeError):  # a lone surrogate, or None
                unreadable += 1
                continue
            ids += [new, end] if ends else [new]
            documents.append((len(new) + ends, len(text.encode("utf-8"))))
            complete = ends
        return Encoded(np.concatenate(ids).astype(self.dtype).tobytes(), documents, complete, unreadable)


def _start_worker(*arguments: Any) -> None:
    global _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started us
    _encoder = Encoder(*arguments)


def _end_with_parent() -> None:
    """A parent that was killed ends nobody, and its workers would wait for its next part for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(part: Part) -> Encoded:
    return _encoder(part)


def encode_all(parts: list[Part], processes: int, *encoder: Any) -> Iterator[Encoded]:
    """The parts encoded, in order; a few of them ahead of what is asked for, so that memory stays flat."""
    if processes == 1:
        yield from map(Encoder(*encoder), parts)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(processes, context, _start_worker, encoder) as pool:
        try:
            pending: collections.deque = collections.deque()
            for part in parts:
                pending.append(pool.submit(_encode, part))
                if len(pending) > 2 * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise ValueError(
                "a process that encodes was killed, perhaps because memory was short: give fewer with processes=N; the "
                "same command goes on"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class State:
    """How far the first pass has come; `ids` and `documents` count what its two files hold."""

    asked: str  # what the command asks for
    job: str  # and what the sources were like
    parts: int = 0
    ids: int = 0
    documents: int = 0
    open_document: list[int] = field(default_factory=lambda: [0, 0])
    unreadable: int = 0


def prepare(
    out: Path,
    parts: list[Part],
    tokenizer: BPETokenizer,
    *,
    source: dict[str, Any],
    text_key: str = "text",
    dataset: Any = None,
    val_share: float,
    split_seed: int,
    processes: int,
    wait: bool = False,
) -> dict[str, Any]:
    """Write the folder `out`, and return what its meta.json says.

    Args:
        source: what meta.json is to say of where the documents come from.
        val_share: of the documents, for validation.
        wait: for another process that is writing the same folder.

    Raises:
        ValueError: no room for it, no documents for one of the splits, or a folder that holds something else.
    """
    work = out / ".partial"
    if not wait:
        check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out, wait), _room_explained(out):
        if not (out / "train.bin").exists():
            work.mkdir(exist_ok=True)
            sources = _identity(parts, dataset)
            asked = _digest([{**source, "files": 0, "bytes": 0}, tokenizer.vocab_size, text_key])
            state = State(asked, _digest([parts, sources, tokenizer.state(), text_key]))
            state = _first_pass(work, state, parts, tokenizer, text_key, dataset, processes)
            if _identity(parts, dataset) != sources:
                raise ValueError("a file changed while it was being read; start again once nothing writes to it")
            _second_pass(out, work, state, tokenizer, source, val_share, split_seed)
        shutil.rmtree(work, ignore_errors=True)
    return json.loads((out / "meta.json").read_text("utf-8"))


def check_folder(out: Path) -> None:
    """Raises ValueError if a folder cannot be made, or holds what is not to be overwritten."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out} cannot be made ({error.strerror}): give another folder") from None
    there = [name for name in ("train.bin", "val.bin", "meta.json") if (out / name).exists()]
    if there and not (out / ".partial").exists():
        raise ValueError(f"{out} holds {' and '.join(there)} already: train on it, or give another folder")


def _identity(parts: list[Part], dataset: Any) -> list[Any]:
    """What changes if a source does."""
    about = [os.stat(file) for file in sorted({part.file for part in parts if part.file})]
    return [getattr(dataset, "_fingerprint", None), *((stat.st_size, stat.st_mtime_ns) for stat in about)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@contextlib.contextmanager
def _alone(out: Path, wait: bool) -> Iterator[None]:
    """A lock on the folder, which leaves nothing behind."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"another process is writing {out}: wait for it, or give another folder") from None
    finally:
        os.close(folder)


@contextlib.contextmanager
def _room_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"the disk of {out} is full: make room and give the same command again, it will go on"
        ) from None


def _first_pass(
    work: Path, state: State, parts: list[Part], tokenizer: BPETokenizer, text_key: str, dataset: Any, processes: int
) -> State:
    """Encode all parts into work/ids and work/documents, or those that an earlier run did not get to."""
    state = _earlier(work, state)
    encoder, left = (tokenizer.state(), text_key, dataset), parts[state.parts :]
    dtype = id_type(tokenizer.vocab_size)
    with open(work / "ids", "ab") as ids, open(work / "documents", "ab") as documents:
        ids.truncate(state.ids * dtype.itemsize)  # what was written after the last note of it
        documents.truncate(16 * state.documents)

        def save() -> None:
            for file in (ids, documents):
                file.flush()
                os.fsync(file.fileno())
            write_json(work / "state.json", asdict(state))

        done, to_read, seen = sum(part.size for part in parts[: state.parts]), sum(part.size for part in left), 0
        ids_before, started, saved = state.ids, time.monotonic(), time.monotonic()
        with _bar(done + to_read, initial=done, desc="encoding", unit="B") as bar:
            for part, encoded in zip(left, encode_all(left, processes, *encoder), strict=True):
                if state.parts == 0:
                    _check_text_key(part, encoded, text_key)
                _append(encoded, state, ids, documents)
                new, seen = state.ids - ids_before, seen + part.size
                if seen >= min(ENOUGH, to_read):
                    to_come = new / max(seen, 1) * (to_read - seen)
                    _check_room(work, (2 * to_come + state.ids) * dtype.itemsize)
                bar.set_postfix_str(f"{new / (time.monotonic() - started) / 1e6:.2f} M tokens/s", refresh=False)
                bar.update(part.size)
                if time.monotonic() - saved > 10:
                    save()
                    saved = time.monotonic()
        save()
    return state


def _check_text_key(part: Part, encoded: Encoded, text_key: str) -> None:
    """Raises ValueError if the first part has rows and none of them has a text."""
    if encoded.unreadable and not encoded.documents and part.kind in ("jsonl", "parquet", "rows"):
        raise ValueError(
            f"none of the first {encoded.unreadable} rows of {part.file or 'the data set'} has text under "
            f"text_key={text_key}: give another text_key"
        )


def _earlier(work: Path, state: State) -> State:
    """What an earlier run of the same command has left of the same sources; else the new state.

    Raises:
        ValueError: another command has left its work here, which may have taken hours.
    """
    try:
        before = State(**json.loads((work / "state.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return state
    if before.asked != state.asked and before.parts:
        raise ValueError(
            f"{work.parent} holds the unfinished work of another command: give that one again, or another folder, or delete "
            f"{work}"
        )
    return before if before.job == state.job else state


def _bar(total: int, **options: Any) -> tqdm:
    """With rate and time left; where it goes to a file, once a minute."""
    seconds = 0.2 if sys.stderr.isatty() else 60.0
    return tqdm(total=total, unit_scale=True, mininterval=seconds, delay=seconds, **options)


def _append(encoded: Encoded, state: State, ids: Any, documents: Any) -> None:
    ids.write(encoded.ids)
    for i, (tokens, size) in enumerate(encoded.documents):
        state.open_document = [state.open_document[0] + tokens, state.open_document[1] + size]
        state.ids += tokens
        if encoded.complete or i + 1 < len(encoded.documents):
            documents.write(np.array(state.open_document, "<i8").tobytes())
            state.open_document, state.documents = [0, 0], state.documents + 1
    state.parts, state.unreadable = state.parts + 1, state.unreadable + encoded.unreadable


def _check_room(work: Path, needed: float) -> None:
    """Raises ValueError unless the disk has room: for all ids to come twice, and once more for those that are there."""
    needed *= 1.05
    free = shutil.disk_usage(work).free
    if free < needed:
        raise ValueError(
            f"{work.parent} needs about {needed / 1e9:.3g} GB while it is written, and its disk has {free / 1e9:.3g} GB free: "
            "make room, or give a folder on another disk"
        )


def _second_pass(
    out: Path, work: Path, state: State, tokenizer: BPETokenizer, source: dict, val_share: float, split_seed: int
) -> None:
    """Deal the documents to val.bin and train.bin, and say so in meta.json; train.bin appears last."""
    n_val = math.ceil(val_share * state.documents)
    if not 1 <= n_val < state.documents:
        raise ValueError(
            f"{state.documents} documents cannot be split into training and validation (val_share={val_share}), and "
            f"{state.unreadable} more could not be read (rows without text, files that are not UTF-8); for a single text: "
            "python -m gptlab.train data=text data.path=FILE data.tokenizer=gpt2"
        )
    # The very order of datasets' train_test_split(test_size=val_share, seed=split_seed, shuffle=True).
    order = np.random.default_rng(split_seed).permutation(state.documents)
    documents = Documents(work, id_type(tokenizer.vocab_size).newbyteorder("<"))
    with _bar(state.ids, desc="copying", unit=" tokens") as bar:
        val = documents.copy(order[:n_val], work / "val.bin", bar)
        train = documents.copy(order[n_val:], work / "train.bin", bar)
    meta = {
        "format": 1,
        "dtype": documents.dtype.name,
        "tokenizer": tokenizer.state(),
        "train": train,
        "val": val,
        "source": source,
        "val_share": val_share,
        "split_seed": split_seed,
        "unreadable": state.unreadable,
    }
    write_json(work / "meta.json", meta)
    for name in ("meta.json", "val.bin", "train.bin"):
        os.replace(work / name, out / name)


class Documents:
    """What the first pass has left: the ids of all documents one after another, and how long each is."""

    def __init__(self, work: Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        with open(work / "ids", "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.ids = np.frombuffer(self.map, dtype)
        self.sizes = np.memmap(work / "documents", "<i8", mode="r").reshape(-1, 2)
        self.ends = self.sizes[:, 0].cumsum()

    def copy(self, chosen: np.ndarray, to: Path, bar: tqdm) -> dict[str, Any]:
        """Write the ids of these documents one after another; returns what meta.json is to say of that."""
        sha256, tokens, size = hashlib.sha256(), 0, 0
        with open(to, "wb") as file:
            for some in np.split(chosen, range(1 << 16, len(chosen), 1 << 16)):
                lengths = self.sizes[some, 0]
                for ids in self._stretches(self.ends[some] - lengths, lengths):
                    file.write(ids.data)
                    sha256.update(ids.data)
                    self.map.madvise(mmap.MADV_DONTNEED)  # read once: not to be counted as our memory
                    bar.update(len(ids))
                tokens, size = tokens + int(lengths.sum()), size + int(self.sizes[some, 1].sum())
            file.flush()
            os.fsync(file.fileno())
        return {"tokens": tokens, "documents": len(chosen), "bytes": size, "sha256": sha256.hexdigest()}

    def _stretches(self, starts: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """The ids of documents, about COPY at a time."""
        ends, first = lengths.cumsum(), 0
        while first < len(lengths):
            before = ends[first] - lengths[first]
            last = int(np.searchsorted(ends, before + COPY, side="right"))
            if last <= first:  # a document that may be larger than all memory
                for at in range(0, int(lengths[first]), COPY):
                    yield self.ids[starts[first] + at : starts[first] + min(at + COPY, lengths[first])]
                last = first + 1
            else:
                shift = starts[first:last] - (ends[first:last] - lengths[first:last] - before)
                yield self.ids[np.repeat(shift, lengths[first:last]) + np.arange(ends[last - 1] - before)]
            first = last
