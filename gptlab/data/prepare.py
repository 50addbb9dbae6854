"""Documents -> token files: train.bin and val.bin, raw ids as nanoGPT writes them, and meta.json, which describes them.

    parts of the sources --(processes encode)--> .partial/ids, .partial/lengths --(shuffled)--> train.bin, val.bin

Two passes, whose memory does not grow with the data (but for 16 bytes per document). First, processes read and encode a
part each; one file gets all ids in the order of the sources, another the length of each document. Then the documents
are dealt to the two splits in the order of nanoGPT's script and copied. Until all is written and synced, it lies in the
folder `.partial`; an interrupted run resumes from there.
"""

import collections
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from gptlab.data.documents import Part, read
from gptlab.errors import UserError
from gptlab.run import write_json
from gptlab.tokenizer import BPETokenizer, id_type

FILES = ("meta.json", "val.bin", "train.bin")  # in the order in which they appear
SAVE_EVERY = 10.0  # seconds


@dataclass
class State:
    """Progress of the first pass; `ids` and `documents` count what its two files hold."""

    job: str  # hash of the command and its sources
    parts: int = 0
    ids: int = 0
    documents: int = 0
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
    """Write the folder `out`; returns the contents of its meta.json.

    Args:
        source: where the documents come from, for meta.json.
        val_share: share of the documents for validation.
        wait: for another process that is writing the same folder, and accept what it wrote.

    Raises:
        UserError: no space, no documents for one of the splits, or a folder that holds something else.
    """
    if not wait:
        check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    work = out / ".partial"
    try:
        with _lock(out, wait):
            if not (out / "train.bin").exists():
                work.mkdir(exist_ok=True)
                sources = _fingerprint(parts, dataset)
                job = hashlib.sha256(json.dumps([parts, sources, tokenizer.state(), text_key]).encode()).hexdigest()
                state = _encode_parts(work, job, parts, tokenizer, text_key, dataset, processes)
                if _fingerprint(parts, dataset) != sources:
                    raise UserError(f"the documents changed while they were read; delete {work} and start again")
                _deal_documents(out, work, state, tokenizer, source, val_share, split_seed)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"out={out}: the disk is full; make space and run the same command again to resume") from None
    return json.loads((out / "meta.json").read_text("utf-8"))


def check_folder(out: Path) -> None:
    """Raises UserError if the folder cannot be made, or holds a finished data set."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be made ({error.strerror}); give another folder") from None
    existing = [name for name in FILES if (out / name).exists()]
    if existing and not (out / ".partial").exists():
        raise UserError(f"out={out} already holds {', '.join(existing)}; train on it, or give another folder")


def _fingerprint(parts: list[Part], dataset: Any) -> list[Any]:
    """Changes if a source does."""
    stats = [os.stat(file) for file in sorted({part.file for part in parts if part.file})]
    return [getattr(dataset, "_fingerprint", None), *((stat.st_size, stat.st_mtime_ns) for stat in stats)]


@contextlib.contextmanager
def _lock(out: Path, wait: bool) -> Iterator[None]:
    """Lock the folder itself, which leaves no file behind."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"out={out}: another process is writing it; wait for it, or give another folder") from None
    finally:
        os.close(folder)


# --- the first pass: parts -> ids


class Encoded(NamedTuple):
    ids: bytes
    lengths: bytes  # (documents, 2) int64: tokens, and bytes of text
    unreadable: int


def encode_part(part: Part, tokenizer: BPETokenizer, text_key: str, dataset: Any) -> Encoded:
    """The ids of the part's documents, with the end of text after each."""
    dtype = id_type(tokenizer.vocab_size).newbyteorder("<")
    end = np.array([tokenizer.end_of_text], dtype)
    ids: list[np.ndarray] = [np.empty(0, dtype)]
    lengths, unreadable = [], 0
    for text in read(part, text_key, dataset):
        try:
            new = tokenizer.encode(text)
        except (ValueError, TypeError):  # a lone surrogate, or None
            unreadable += 1
            continue
        ids += [new, end]
        lengths.append((len(new) + 1, len(text.encode("utf-8"))))
    return Encoded(np.concatenate(ids).astype(dtype).tobytes(), np.array(lengths, "<i8").tobytes(), unreadable)


def _start_worker(*arguments: Any) -> None:
    global _arguments
    _arguments = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, the workers of a killed process would wait for their next part forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(part: Part) -> Encoded:
    return encode_part(part, *_arguments)


def encode_all(parts: Iterable[Part], processes: int, *arguments: Any) -> Iterator[Encoded]:
    """The parts encoded, in order; only a few of them ahead, so that memory stays flat."""
    if processes == 1:
        yield from (encode_part(part, *arguments) for part in parts)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(processes, context, _start_worker, arguments) as pool:
        try:
            pending: collections.deque = collections.deque()
            for part in parts:
                pending.append(pool.submit(_encode_in_worker, part))
                if len(pending) > 2 * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "an encoding process was killed, perhaps out of memory; resume with fewer, processes=N"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)  # waits: threads of a pool that still works make noise when Python ends


def _encode_parts(
    work: Path, job: str, parts: list[Part], tokenizer: BPETokenizer, text_key: str, dataset: Any, processes: int
) -> State:
    """Encode all parts into work/ids and work/lengths, or those that an interrupted run did not reach."""
    state = _load_state(work, job)
    remaining, id_size, ids_before = parts[state.parts :], id_type(tokenizer.vocab_size).itemsize, state.ids
    done, to_read = (sum(part.size for part in some) for some in (parts[: state.parts], remaining))
    if not done and (free := shutil.disk_usage(work).free) < to_read:  # ids take about half of it, twice
        raise UserError(f"out={work.parent} needs about {to_read / 1e9:.3g} GB of disk; {free / 1e9:.3g} GB are free")
    with open(work / "ids", "ab") as ids, open(work / "lengths", "ab") as lengths:
        ids.truncate(state.ids * id_size)  # what was written after the state was saved
        lengths.truncate(16 * state.documents)
        started = saved = time.monotonic()
        with _progress_bar(done + to_read, initial=done, desc="encoding", unit="B") as bar:
            encoded_parts = encode_all(remaining, processes, tokenizer, text_key, dataset)
            for part, encoded in zip(remaining, encoded_parts, strict=True):
                if state.parts == 0 and encoded.unreadable and not encoded.lengths and part.kind != "text":
                    raise UserError(f"text_key={text_key}: no text in the first rows of {part.file or 'the data set'}")
                _append(encoded, state, id_size, ids, lengths)
                speed = (state.ids - ids_before) / (time.monotonic() - started)
                bar.set_postfix_str(f"{speed / 1e6:.2f} M tokens/s", refresh=False)
                bar.update(part.size)
                if time.monotonic() - saved > SAVE_EVERY:
                    _save_state(work, state, ids, lengths)
                    saved = time.monotonic()
        _save_state(work, state, ids, lengths)
    return state


def _load_state(work: Path, job: str) -> State:
    """The progress of an interrupted run of the same job, else a new state.

    Raises:
        UserError: the work of another job, which may have taken hours.
    """
    try:
        state = State(**json.loads((work / "state.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return State(job)
    if state.job != job:
        raise UserError(
            f"out={work.parent} holds unfinished work of another command, or of documents that have changed since; "
            f"delete {work}, or give another folder"
        )
    return state


def _save_state(work: Path, state: State, *files: IO[bytes]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    write_json(work / "state.json", asdict(state))


def _append(encoded: Encoded, state: State, id_size: int, ids: IO[bytes], lengths: IO[bytes]) -> None:
    ids.write(encoded.ids)
    lengths.write(encoded.lengths)
    state.parts += 1
    state.ids += len(encoded.ids) // id_size
    state.documents += len(encoded.lengths) // 16
    state.unreadable += encoded.unreadable


def _progress_bar(total: int, **options: Any) -> tqdm:
    """With rate and time left; in a log file, a line per minute."""
    seconds = 0.2 if sys.stderr.isatty() else 60.0
    return tqdm(total=total, unit_scale=True, mininterval=seconds, delay=seconds, **options)


# --- the second pass: ids -> train.bin and val.bin


def _deal_documents(
    out: Path, work: Path, state: State, tokenizer: BPETokenizer, source: dict, val_share: float, split_seed: int
) -> None:
    """Copy the documents to val.bin and train.bin and describe them in meta.json; train.bin appears last."""
    n_val = math.ceil(val_share * state.documents)
    if not 1 <= n_val < state.documents:
        raise UserError(
            f"val_share={val_share} cannot split {state.documents} documents ({state.unreadable} more could not be read);"
            " train on a single text with python -m gptlab.train data=text data.path=FILE"
        )
    # The very order of datasets' train_test_split(test_size=val_share, seed=split_seed, shuffle=True).
    order = np.random.default_rng(split_seed).permutation(state.documents)
    dtype = id_type(tokenizer.vocab_size)
    with _progress_bar(state.ids * dtype.itemsize, desc="copying", unit="B") as bar:
        val = _copy_documents(work, order[:n_val], dtype.itemsize, work / "val.bin", bar)
        train = _copy_documents(work, order[n_val:], dtype.itemsize, work / "train.bin", bar)
    meta = {"format": 1, "dtype": dtype.name, "tokenizer": tokenizer.state(), "train": train, "val": val,
            "source": source, "val_share": val_share, "split_seed": split_seed, "unreadable": state.unreadable}  # fmt: skip
    write_json(work / "meta.json", meta)
    for name in FILES:
        os.replace(work / name, out / name)


def _copy_documents(work: Path, chosen: np.ndarray, id_size: int, to: Path, bar: tqdm) -> dict[str, Any]:
    """Write the ids of the chosen documents one after another; returns their entry in meta.json."""
    lengths = np.fromfile(work / "lengths", "<i8").reshape(-1, 2)  # tokens, and bytes of text
    sizes = lengths[:, 0] * id_size
    starts, sha256 = sizes.cumsum() - sizes, hashlib.sha256()
    with open(work / "ids", "rb") as ids, open(to, "wb") as file:
        for some in np.split(chosen, range(64, len(chosen), 64)):
            places = zip(sizes[some].tolist(), starts[some].tolist(), strict=True)
            content = b"".join([os.pread(ids.fileno(), size, start) for size, start in places])
            assert len(content) == sizes[some].sum()
            file.write(content)
            sha256.update(content)
            bar.update(len(content))
        file.flush()
        os.fsync(file.fileno())
    tokens, size = lengths[chosen].sum(axis=0).tolist()
    return {"tokens": tokens, "documents": len(chosen), "bytes": size, "sha256": sha256.hexdigest()}
