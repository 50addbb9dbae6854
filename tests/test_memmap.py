"""Token files: read without being loaded, and refused with one clear error where they are not what they seem."""

import functools
import hashlib
import itertools
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_token_files
from torch.utils.data import DataLoader

from gptlab.data import memmap
from gptlab.data.memmap import MemmapData, PythonStdlibData, TokenFile, stdlib_files
from gptlab.data.windows import Ids, StepsFrom, TrainSteps
from gptlab.errors import MissingFileError, UserError
from gptlab.tokenizer import BPETokenizer, CharTokenizer

FILES = ("train.bin", "val.bin", "meta.json")


def memmap_data(folder: Path, kind: str | None = None, **changes) -> MemmapData:
    defaults = {"seed": 1, "name": "ids", "block_size": 8, "batch_size": 4}
    data = MemmapData(path=str(folder), tokenizer=kind, **{**defaults, **changes})
    data.prepare_data()
    data.setup("fit")
    return data


@functools.cache
def gpt2_sized() -> BPETokenizer:
    """As many tokens as GPT-2 has; which they are does not matter here."""
    pairs = (bytes(pair) for pair in itertools.product(range(256), repeat=2))
    return BPETokenizer([*(bytes([i]) for i in range(256)), *itertools.islice(pairs, 50_000)])


@pytest.fixture
def prepared(tmp_path) -> Path:
    """A folder as scripts/prepare_openwebtext.py makes it."""
    write_token_files(tmp_path / "ids")
    return tmp_path / "ids"


@pytest.fixture
def nanogpts(tmp_path, monkeypatch) -> Path:
    """A folder as nanoGPT's scripts make it: no meta.json."""
    monkeypatch.setattr(memmap, "load_gpt2_tokenizer", lambda alternative: gpt2_sized())
    for name, count in (("train", 900), ("val", 90)):
        ids = np.random.default_rng(count).integers(0, 3000, count)
        ids[:3] = (50256, 0, 40000)
        ids.astype("<u2").tofile(tmp_path / f"{name}.bin")
    return tmp_path


def batches(data: MemmapData, count: int, workers: int = 0, start: str | None = None) -> torch.Tensor:
    """Of the first steps, and of the validation."""
    steps = DataLoader(
        data.train_steps(0, 1),
        sampler=StepsFrom(0, count),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=start,
    )
    validation = data.val_batches(4, 0, 1)
    return torch.cat([*steps, *(validation[k][0] for k in range(len(validation)))])


# --- what is read


def test_a_prepared_folder(prepared):
    data = memmap_data(prepared)
    meta = json.loads((prepared / "meta.json").read_text())
    for ids, split in ((data.train_ids, "train"), (data.val_ids, "val")):
        content = (prepared / f"{split}.bin").read_bytes()
        assert isinstance(ids, TokenFile) and not ids.flags.writeable
        assert ids.tobytes() == content and len(ids) == meta[split]["tokens"]
        assert ids.dtype == np.dtype("<u2") and ids[0] == content[0] + 256 * content[1]  # on any machine
    assert data.tokenizer.state() == meta["tokenizer"]
    assert "green bottles, hanging on the wall" in data.tokenizer.decode(data.train_ids)
    train, val = (hashlib.sha256((prepared / name).read_bytes()).hexdigest() for name in FILES[:2])
    assert data.record == {"name": "ids", "sha256": train, "val_sha256": val}
    assert data.resolved == {"path": str(prepared.resolve())}


def test_a_folder_of_nanogpts(nanogpts):
    data = memmap_data(nanogpts, "gpt2")
    assert data.tokenizer.vocab_size == 50257
    assert data.train_ids[:3].tolist() == [50256, 0, 40000]
    assert batches(data, 3).max() < 50257


def test_the_file_is_not_sent_to_workers(prepared):
    """What a worker gets is the file's name: of 50 GB, nothing else would do. Parts and copies are sent as they are."""
    ids = memmap_data(prepared).train_ids
    sent = pickle.dumps(ids)
    assert len(sent) < 1000 < ids.nbytes
    again = pickle.loads(sent)
    assert isinstance(again, TokenFile) and not again.flags.writeable and again.tolist() == ids.tolist()
    for part in (ids[3:9], ids[np.array([5, 2])], ids.astype(np.int64)):
        assert pickle.loads(pickle.dumps(part)).tolist() == part.tolist()
    assert len(pickle.dumps(memmap_data(prepared).train_steps(0, 1))) < 3000


@pytest.mark.parametrize(("workers", "start"), [(2, None), pytest.param(1, "spawn", marks=pytest.mark.slow)])
def test_workers_read_the_same_stream(workers, start, prepared):
    data = memmap_data(prepared)
    assert torch.equal(batches(data, 12, workers, start), batches(data, 12))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads there what is a process's own memory")
def test_reading_takes_no_memory_of_its_own(tmp_path):
    """200 MB, of which 2,000 batches touch a fifth; what stays in memory of it is the system's to drop."""
    with open(tmp_path / "ids.bin", "wb") as file:
        file.truncate(200_000_000)

    def own_memory() -> int:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    steps = TrainSteps(Ids(TokenFile(tmp_path / "ids.bin", "<u2", "r"), 50257), 1024, 12, 1, 0, 1)
    steps[0]
    before = own_memory()
    for step in range(1, 2000):
        steps[step]
    assert own_memory() - before < 8_000, "kB"


# --- what is refused


def refused(folder: Path, said: str, kind: str | None = None, error: type[Exception] = UserError) -> None:
    with pytest.raises(error, match=said) as caught:
        memmap_data(folder, kind)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_nothing_there(tmp_path, prepared, monkeypatch):
    refused(tmp_path / "none", "none has no train.bin and no val.bin; prepare", error=MissingFileError)
    (prepared / "val.bin").unlink()
    (prepared / ".partial").mkdir()
    refused(prepared, "ids has no val.bin; its preparation is unfinished", error=MissingFileError)
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path / "data"))
    with pytest.raises(MissingFileError, match=r"data/openwebtext has no train.bin"):
        MemmapData(seed=1, name="ids", block_size=8, batch_size=4).prepare_data()


def test_data_tokenizer_must_say_what_meta_json_does_not(nanogpts, prepared):
    refused(nanogpts, "no meta.json; .*data.tokenizer=gpt2")
    refused(prepared, "meta.json describes 300 tokens; leave data.tokenizer=gpt2 out", kind="gpt2")


NOT_IT = "is not the file that meta.json describes"


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: b"", "has 0 bytes"),
        (lambda content: content[:-1], "bytes; it must have 2 per id"),
        (lambda content: content + content, NOT_IT),
        (lambda content: content[:-2] + b"\0\0", NOT_IT),
    ],
)
def test_files_that_contradict_meta_json(name, change, said, prepared):
    content = (prepared / name).read_bytes()
    (prepared / name).write_bytes(change(content))
    refused(prepared, f"{name} .*{said}")


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "has 0 bytes"), (b"123", "must have 2 per id"), (bytes(16), "split has 8 tokens and must have at least")],
)
def test_files_without_meta_json_that_are_no_token_ids(name, content, said, nanogpts):
    (nanogpts / name).write_bytes(content)
    refused(nanogpts, said, kind="gpt2")


def test_ids_outside_the_vocabulary_are_found_where_they_are_read(nanogpts):
    """Large files are not read from end to end before training; a GPU would crash at such an id."""
    ids = np.zeros(10_000, "<u2")
    ids[5000] = 60_000
    ids.tofile(nanogpts / "train.bin")
    steps = memmap_data(nanogpts, "gpt2").train_steps(0, 1)
    with pytest.raises(UserError, match="token 5,000 of the data is 60000, outside the vocabulary of 50257"):
        for step in range(5000):
            assert steps[step].max() == 0


def edit(folder: Path, *keys: str, value) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    place = functools.reduce(dict.__getitem__, keys[:-1], meta)
    if value is edit:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("dtype",), "uint32", "damaged .*dtype uint16"),
        (("dtype",), edit, "damaged .*dtype"),
        (("format",), 2, "damaged .*format must be 1"),
        (("tokenizer",), CharTokenizer("abc").state(), "damaged .*dtype uint8"),
        (("tokenizer",), "bpe", "damaged"),
        (("tokenizer",), {"type": "bpe", "tokens": "YQ== YQ=="}, "damaged"),
        (("tokenizer",), edit, "damaged .*tokenizer"),
        (("train", "tokens"), 1, NOT_IT),
        (("val", "tokens"), -1, NOT_IT),
        (("val", "tokens"), "many", "damaged"),
        (("val", "tokens"), 1e999, "damaged"),
        (("val", "tokens"), None, "damaged"),
        (("train", "sha256"), "0" * 64, NOT_IT),
        (("val", "sha256"), None, NOT_IT),
        (("val",), [], "damaged"),
        (("val",), edit, "damaged .*val"),
    ],
)
def test_a_meta_json_that_contradicts(keys, value, said, prepared):
    edit(prepared, *keys, value=value)
    refused(prepared, said)


@pytest.mark.parametrize("content", [b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 200_000, b"{}"])
def test_a_meta_json_that_is_none(content, prepared):
    (prepared / "meta.json").write_bytes(content)
    refused(prepared, "meta.json is damaged .*prepare the folder again")


@pytest.mark.parametrize("described", [(10 << 20, "as it says"), None])
def test_the_checksum_of_a_large_file(described, nanogpts, monkeypatch):
    """It is that of the size and the beginning, whatever meta.json says: a resume must notice other data."""
    monkeypatch.setattr(memmap, "HASHED", 2 << 20)
    ids = np.zeros(10 << 20, "<u2")

    def checksum(ids: np.ndarray) -> str:
        ids.tofile(nanogpts / "train.bin")
        return memmap.read_ids(nanogpts / "train.bin", 50257, described)[1]

    first = checksum(ids)
    assert first == checksum(ids) == hashlib.sha256(str(20 << 20).encode() + bytes(2 << 20)).hexdigest()
    ids[(1 << 20) - 1] = 1
    assert checksum(ids) != first
    if described is None:
        assert checksum(np.zeros((10 << 20) - 1, "<u2")) != first


# --- the standard library's source


def test_the_standard_library_is_prepared_once(tmp_path, monkeypatch):
    assert {"argparse.py", "random.py"} <= {file.name for file in stdlib_files()}
    few = [file for file in stdlib_files() if file.parent.name == "json"] + stdlib_files()[:20]
    monkeypatch.setattr(memmap, "stdlib_files", lambda: few)

    def attempt() -> tuple[PythonStdlibData, dict[str, int]]:
        windows = {"seed": 1, "name": "stdlib", "block_size": 8, "batch_size": 4}
        data = PythonStdlibData(vocab_size=400, folder=str(tmp_path), **windows)
        data.prepare_data()
        data.setup("fit")
        assert sorted(os.listdir(data.path)) == sorted(FILES) and data.resolved == {"folder": str(tmp_path.resolve())}
        return data, {name: (Path(data.path) / name).stat().st_mtime_ns for name in FILES}

    data, written = attempt()
    text = data.tokenizer.decode(data.train_ids) + data.tokenizer.decode(data.val_ids)
    assert sorted(text.split("<|endoftext|>")[:-1]) == sorted(file.read_bytes().decode() for file in few)
    again, still = attempt()
    assert still == written and again.record == data.record and len(os.listdir(tmp_path)) == 1
    few.pop()  # another Python: not to be mixed up with this one
    other, _ = attempt()
    assert other.path != data.path and other.record != data.record
