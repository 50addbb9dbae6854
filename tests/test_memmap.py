"""Token files: read without being loaded, and refused with one clear error where they are not what they seem."""

import functools
import hashlib
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_token_files
from torch.utils.data import DataLoader

from gptlab.data import memmap, windows
from gptlab.data.files import load_gpt2_tokenizer
from gptlab.data.memmap import MemmapData, PythonStdlibData, TokenFile, stdlib_files
from gptlab.data.windows import StepsFrom
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


def test_gpt2s_own_vocabulary(tmp_path, gpt2_files):
    text = "To be, or not to be: that is the question."
    ids = load_gpt2_tokenizer("").encode(text * 9)
    for name in FILES[:2]:
        ids.astype("<u2").tofile(tmp_path / name)
    assert memmap_data(tmp_path, "gpt2").tokenizer.decode(ids) == text * 9


def test_ids_are_little_endian_everywhere(prepared):
    """The type says so itself: on a machine of the other kind numpy turns the bytes round."""
    ids = memmap_data(prepared).train_ids
    first = (prepared / "train.bin").read_bytes()[:2]
    assert ids.dtype == np.dtype("<u2") and ids[0] == first[0] + 256 * first[1]


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


@pytest.mark.parametrize(("workers", "start"), [(2, None), (1, "spawn")])
def test_workers_read_the_same_stream(workers, start, prepared):
    data = memmap_data(prepared)
    assert torch.equal(batches(data, 12, workers, start), batches(data, 12))


READING = """
import re, sys
from pathlib import Path
from gptlab.data.memmap import open_ids
from gptlab.data.windows import Ids, TrainSteps

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = anonymous()
steps = TrainSteps(Ids(open_ids(Path(sys.argv[1]), 50257, None), 50257), 1024, 12, 1, 0, 1)
for step in range(2000):
    steps[step]
print(anonymous() - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="tells a process's own memory from the system's cache"
)
def test_reading_takes_no_memory_of_its_own(tmp_path):
    """200 MB, of which 2,000 batches touch a fifth; what stays in memory of it is the system's to drop."""
    with open(tmp_path / "ids.bin", "wb") as file:
        file.truncate(200_000_000)
    command = [sys.executable, "-c", READING, tmp_path / "ids.bin"]
    environment = os.environ | {"PYTHONPATH": str(Path(memmap.__file__).parents[2])}
    grown = int(subprocess.run(command, check=True, capture_output=True, env=environment, timeout=60).stdout)
    assert grown < 8_000, f"{grown} kB"


# --- what is refused


def refused(folder: Path, said: str, kind: str | None = None, error: type[Exception] = UserError) -> None:
    with pytest.raises(error, match=said) as caught:
        memmap_data(folder, kind)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_nothing_there(tmp_path, prepared, monkeypatch):
    refused(tmp_path / "none", "none has no train.bin and no val.bin; prepare", error=MissingFileError)
    (prepared / "val.bin").unlink()
    refused(prepared, r"ids has no val.bin; prepare", error=MissingFileError)
    (prepared / ".partial").mkdir()
    refused(prepared, "its preparation is unfinished", error=MissingFileError)
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path / "data"))
    with pytest.raises(MissingFileError, match=r"data.path is missing, and .*openwebtext has no train.bin"):
        MemmapData(seed=1, name="ids", block_size=8, batch_size=4).prepare_data()


def test_data_tokenizer_must_say_what_meta_json_does_not(nanogpts, prepared):
    refused(nanogpts, "no meta.json; .*data.tokenizer=gpt2")
    refused(prepared, "data.tokenizer=gpt2, but .*meta.json describes 300 tokens", kind="gpt2")


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: b"", "is empty"),
        (lambda content: content[:-1], "has .* bytes, but meta.json says"),
        (lambda content: content + content, "has .* bytes, but meta.json says"),
        (lambda content: content[:-2] + b"\0\0", "has SHA-256 .*, but meta.json says .* changed"),
    ],
)
def test_files_that_contradict_meta_json(name, change, said, prepared):
    content = (prepared / name).read_bytes()
    (prepared / name).write_bytes(change(content))
    refused(prepared, f"{name} {said}")


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"123", "not a multiple of 2"),
        (np.array([0, 50257] * 50, "<u2").tobytes(), "token id 50257 is outside the vocabulary of 50257"),
        (bytes(16), "split has 8 tokens and must have at least data.block_size"),
    ],
)
def test_files_without_meta_json_that_are_no_token_ids(name, content, said, nanogpts):
    (nanogpts / name).write_bytes(content)
    refused(nanogpts, said, kind="gpt2")


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
        (("dtype",), "uint32", "damaged .*dtype 'uint32' does not fit a vocabulary of 300 tokens"),
        (("dtype",), edit, "damaged .*dtype"),
        (("tokenizer",), CharTokenizer("abc").state(), "damaged .*'uint16' does not fit a vocabulary of 3 tokens"),
        (("tokenizer",), BPETokenizer([bytes([i]) for i in range(256)]).state(), "outside the vocabulary of 257"),
        (("tokenizer",), "bpe", "damaged"),
        (("tokenizer",), "char", "damaged"),
        (("tokenizer",), None, "damaged"),
        (("tokenizer",), {"type": "bpe", "tokens": "YQ== YQ=="}, "damaged"),
        (("tokenizer",), edit, "damaged .*tokenizer"),
        (("train", "tokens"), 1, "train.bin has .* bytes, but meta.json says 1 tokens of 2 bytes"),
        (("val", "tokens"), -1, "val.bin has .* bytes, but meta.json says -1 tokens of 2 bytes"),
        (("val", "tokens"), "7", "damaged .*val: tokens='7'"),
        (("val", "tokens"), 7.0, "damaged .*val: tokens=7.0"),
        (("val", "tokens"), True, "damaged .*val: tokens=True"),
        (("train", "tokens"), edit, "damaged .*tokens"),
        (("train", "sha256"), "0" * 64, "train.bin has SHA-256 .* but meta.json says 0000"),
        (("val", "sha256"), "", "val.bin has SHA-256"),
        (("val", "sha256"), None, "damaged .*sha256=None"),
        (("val",), [], "damaged"),
        (("val",), edit, "damaged .*val"),
    ],
)
def test_a_meta_json_that_contradicts(keys, value, said, prepared):
    edit(prepared, *keys, value=value)
    refused(prepared, said)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe", b"[" * 200_000, b"{}"])
def test_a_meta_json_that_is_none(content, prepared):
    (prepared / "meta.json").write_bytes(content)
    refused(prepared, "meta.json is damaged .*prepare the folder again")


def test_large_files_are_checked_where_they_are_read(nanogpts, monkeypatch):
    """They are not read from end to end before training; a GPU would crash at an id outside the vocabulary."""
    monkeypatch.setattr(windows, "READ_WHOLE", 19_999)
    ids = np.zeros(10_000, "<u2")
    ids[5000] = 60_000
    ids.tofile(nanogpts / "train.bin")
    steps = memmap_data(nanogpts, "gpt2").train_steps(0, 1)
    with pytest.raises(UserError, match="token 5,000 of the data is 60000, outside the vocabulary of 50257"):
        for step in range(5000):
            assert steps[step].max() == 0


@pytest.mark.parametrize("with_meta", [True, False])
def test_the_checksum_of_a_large_file(with_meta, nanogpts, monkeypatch):
    """It is that of the size and the beginning, whatever meta.json says: a resume must notice other data."""
    monkeypatch.setattr(memmap, "READ_WHOLE", 2 << 20)
    ids = np.zeros(10 << 20, "<u2")
    entry = {"sha256": "as it says"} if with_meta else None

    def checksum() -> str:
        ids.tofile(nanogpts / "train.bin")
        return memmap.check_sha256(TokenFile(nanogpts / "train.bin", "<u2", "r"), entry)

    first = checksum()
    assert first == checksum() == hashlib.sha256(str(20 << 20).encode() + bytes(2 << 20)).hexdigest()
    ids[(1 << 20) - 1] = 1
    assert checksum() != first
    ids[(1 << 20) - 1] = 0
    ids = ids[:-1]
    assert checksum() != first


# --- the standard library's source


def test_the_standard_library_is_prepared_once(tmp_path, monkeypatch):
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


def test_the_standard_library_is_source_code():
    files = stdlib_files()
    assert {"argparse.py", "random.py"} <= {file.name for file in files}
    assert not any({"site-packages", "test", "tests"} & set(file.parts[-4:-1]) for file in files)


# --- fuzzing


def small_folder(rng: random.Random) -> dict[str, bytes]:
    """A valid one: characters, the single bytes, or nanoGPT's kind; with or without meta.json."""
    kind = rng.choice(["char", "bpe", "none"])
    vocab = {"char": CharTokenizer("abcdefgh"), "bpe": BPETokenizer([bytes([i]) for i in range(256)])}.get(kind)
    dtype = "u1" if kind == "char" else "<u2"
    files, meta = {}, {"format": 1, "dtype": np.dtype(dtype).name}
    for split in ("train", "val"):
        ids = np.array([rng.randrange(vocab.vocab_size if vocab else 50257) for _ in range(rng.randint(9, 60))], dtype)
        files[f"{split}.bin"] = ids.tobytes()
        meta[split] = {"tokens": len(ids), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}
    if vocab:
        files["meta.json"] = json.dumps({**meta, "tokenizer": vocab.state()}).encode()
    return files


VALUES = [None, True, -1, 0, 1.5, 10**30, "", "char", "bpe", [], {}, [[]], {"type": "char"}, "\ud800", "a b", "uint8"]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Another byte, a piece lost, doubled or cut off; of JSON also a value replaced by one of another kind; or nonsense."""
    at, size = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 3, 20])
    changes = [
        lambda: (
            content[:at]
            + rng.choice([rng.randbytes(1), bytes([rng.choice(b'0123456789"{}[],-e')])])
            + content[at + 1 :]
        ),
        lambda: content[:at] + content[at + size :],
        lambda: content[: at + size] + content[at:],
        lambda: content[:at],
        lambda: rng.randbytes(rng.randrange(200)),
        lambda: b"".join(
            rng.choices([b"{", b"}", b'"train"', b":", b"[", b"1", b"null", b",", b"\xff"], k=rng.randrange(40))
        ),
    ]
    if content.startswith(b'{"format"') and rng.random() < 0.4:
        value = json.loads(content)
        place = rng.choice([value, value["train"], value["val"], value["tokenizer"]])
        place[rng.choice(list(place))] = rng.choice(VALUES)
        return json.dumps(value).encode()
    return rng.choice(changes)()


@pytest.mark.parametrize(("seed", "count"), [(1, 1_000), pytest.param(2, 20_000, marks=pytest.mark.slow)])
def test_any_files_are_read_or_refused(seed, count, tmp_path, monkeypatch):
    """Most differ little from valid ones, and a few are valid. Whatever is accepted gives batches of the vocabulary's ids."""
    monkeypatch.setattr(memmap, "load_gpt2_tokenizer", lambda alternative: gpt2_sized())
    rng, accepted, said = random.Random(seed), 0, set()
    for i in range(count):
        files = small_folder(rng)
        name = rng.choice(list(files))
        if rng.random() < 0.9:
            files[name] = damaged(files[name], rng)
        for other in FILES:
            (tmp_path / other).unlink(missing_ok=True)
            if other in files:
                (tmp_path / other).write_bytes(files[other])
        try:
            data = memmap_data(tmp_path, rng.choice([None, "gpt2", "gpt2"]))
            read = batches(data, 2)
            accepted += 1
            assert read.min() >= 0 and read.max() < data.tokenizer.vocab_size
        except UserError as error:
            said.add(str(error).replace(str(tmp_path), "")[:40])
            assert len(str(error)) < 700, f"seed {seed}, input {i}: {error}"
        except Exception as error:
            raise AssertionError(f"seed {seed}, input {i}: {type(error).__name__}: {error}") from error
    assert count / 20 < accepted < count / 2 and len(said) > 12, (accepted, len(said))
