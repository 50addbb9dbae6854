"""Documents -> token files: nanoGPT's bytes, whatever interrupts it, whatever the documents are like."""

import errno
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from gptlab.data import documents as reading
from gptlab.data import prepare
from gptlab.data.documents import parts_of, parts_of_dataset, read
from gptlab.data.memmap import MemmapData
from gptlab.errors import UserError
from gptlab.tokenizer import BPETokenizer

SCRIPT = Path(__file__).parents[1] / "scripts/prepare_openwebtext.py"
SAMPLE = "don't  stop,\n\n\tit's 12 à la\u3000 carte \xa0 at 3½!\r\n \x85 漢字 🙂  <|endoftext|>\u2028 "
FILES = ("train.bin", "val.bin", "meta.json")


@functools.cache
def tokenizer() -> BPETokenizer:
    """Has tokens of two and three whitespace characters of all kinds, also before a word."""
    spaces = (
        "".join(some) + word for some in itertools.product(" \n\t\xa0\x85\u3000", repeat=3) for word in ("it", "à", "!")
    )
    return BPETokenizer.learn([SAMPLE * 9, *spaces], 340)


def documents(count: int) -> list[str]:
    odd = ["", " ", "\n\n", "<|endoftext|>", SAMPLE, "x" * 500, " \n" * 100, "a\r\nb\rc\x00"]
    return [f"{odd[i % 8] if i % 3 == 0 else 'word '}{i} {SAMPLE[i % 40 :]}" * (1 + i % 4) for i in range(count)]


def write_jsonl(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def make(out: Path, files: list[Path], **changes) -> dict[str, bytes]:
    """Prepare `out`; returns its files."""
    settings = {"source": {}, "val_share": 0.1, "split_seed": 2357, "processes": 1}
    prepare.prepare(out, changes.pop("parts", None) or parts_of(files), tokenizer(), **{**settings, **changes})
    assert sorted(os.listdir(out)) == sorted(FILES)
    return {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture
def small_parts(monkeypatch):
    """Many parts of a small source, and the progress saved after each second one or so."""
    monkeypatch.setattr(reading, "PART", 2000)
    monkeypatch.setattr(prepare, "time", SimpleNamespace(monotonic=itertools.count(0, 2.5).__next__))


# --- nanoGPT's bytes


def nanogpts(texts: Path, share: float, cache: Path) -> dict[str, bytes]:
    """What nanoGPT's data/openwebtext/prepare.py makes of these documents."""
    import tiktoken
    from datasets import load_dataset

    dataset = load_dataset("json", data_files=str(texts), split="train", cache_dir=str(cache))
    splits = dataset.train_test_split(test_size=share, seed=2357, shuffle=True)
    gpt2 = tiktoken.get_encoding("gpt2")

    def ids(rows):
        return np.concatenate([[*gpt2.encode_ordinary(row["text"]), gpt2.eot_token] for row in rows])

    return {
        f"{ours}.bin": ids(splits[its]).astype("<u2").tobytes() for ours, its in (("val", "test"), ("train", "train"))
    }


def script(*arguments: str, cwd: Path, status: int = 0) -> str:
    """Run the script as a user without a network would; returns what it printed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "GPTLAB_DATA": str(cwd / "data")}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["jsonl", pytest.param("hub", marks=pytest.mark.slow)])
def test_the_files_are_nanogpts(kind, tmp_path, gpt2_files):
    """4,001 documents, so that the share for validation is no whole number of them; in parts, in two processes."""
    texts = documents(4001)
    whole = write_jsonl(tmp_path / "whole.json", texts)
    (tmp_path / "in").mkdir()
    for i, some in enumerate((texts[:1500], texts[1500:])):
        write_jsonl(tmp_path / f"in/{i}.jsonl", some)
    source = f"hub={tmp_path / 'in'}" if kind == "hub" else "path=in/*.jsonl"
    script(source, "out=out", "processes=2", cwd=tmp_path)
    expected = nanogpts(whole, 0.0005, tmp_path / "cache")
    for name, content in expected.items():
        assert (tmp_path / "out" / name).read_bytes() == content, name
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert (meta["val"]["documents"], meta["train"]["documents"], meta["unreadable"]) == (3, 3998, 0)


@pytest.mark.parametrize(("count", "share"), [(2, 0.0005), (10, 0.3), (100, 0.29), (10, 0.9)])
def test_documents_are_dealt_as_datasets_does(count, share, tmp_path):
    """Its rounding and its shuffle, for shares that are no binary fractions too."""
    from datasets import Dataset

    texts = [f"document {i}" for i in range(count)]
    expected = Dataset.from_dict({"text": texts}).train_test_split(test_size=share, seed=2357, shuffle=True)
    made = make(tmp_path / "out", [write_jsonl(tmp_path / "a.jsonl", texts)], val_share=share)
    for name, split in (("val.bin", "test"), ("train.bin", "train")):
        found = tokenizer().decode(np.frombuffer(made[name], "<u2").tolist()).split("<|endoftext|>")
        assert found == [*expected[split]["text"], ""]


def test_processes_and_kinds_of_source_do_not_matter(tmp_path, small_parts):
    from datasets import Dataset

    texts = documents(300)
    jsonl, table = write_jsonl(tmp_path / "a.jsonl", texts), pyarrow.table({"text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    dataset = Dataset.from_dict({"text": texts})
    one = make(tmp_path / "1", [jsonl])
    two = make(tmp_path / "2", [jsonl], processes=2)
    rows = make(tmp_path / "3", [], parts=parts_of_dataset(dataset, 110), dataset=dataset)
    assert one == two == rows == make(tmp_path / "4", [tmp_path / "a.parquet"])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "<u2"), (65537, "<u4")])
def test_ids_are_wide_where_the_vocabulary_is(vocab_size, dtype, tmp_path):
    """Tokens of two bytes each; the last id is that of the end of a text."""
    pairs = [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    wide = BPETokenizer([*(bytes([i]) for i in range(256)), *reversed(pairs[-(vocab_size - 257) :])])
    texts = ["hello there", "\x02 and \x01\x02", "zz"] * 5
    parts = parts_of([write_jsonl(tmp_path / "a.jsonl", texts)])
    prepare.prepare(tmp_path, parts, wide, source={}, val_share=0.2, split_seed=2357, processes=1)
    order = np.random.default_rng(2357).permutation(15)[3:]
    ids = np.concatenate([[*wide.encode(texts[i]), vocab_size - 1] for i in order])
    assert ids.max() == vocab_size - 1 and (tmp_path / "train.bin").read_bytes() == ids.astype(dtype).tobytes()
    data = MemmapData(path=str(tmp_path), seed=1, name="wide", block_size=4, batch_size=2)
    data.prepare_data()
    data.setup()
    assert data.train_ids.tolist() == ids.tolist()


# --- interrupted

KILLED = """
import itertools, json, os, shutil, signal, sys
from pathlib import Path
from types import SimpleNamespace
from gptlab.data import documents, prepare
from gptlab.tokenizer import from_state

out, source, state = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
documents.PART = 2000
prepare.time = SimpleNamespace(monotonic=itertools.count(0, 2.5).__next__)
events, moment = itertools.count(1), 0

def event():
    if next(events) == moment:
        os.kill(os.getpid(), signal.SIGKILL)

def with_event(function):
    def called(*args, **kwargs):
        event()
        return function(*args, **kwargs)
    return called

steps = ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (prepare, "_append"))
for place, name in steps:
    setattr(place, name, with_event(getattr(place, name)))
pread, reads = os.pread, itertools.count()
os.pread = lambda *args: (event() if next(reads) % 16 == 0 else None) or pread(*args)

while True:
    moment += 1
    child = os.fork()
    if child == 0:
        parts = documents.parts_of([source])
        prepare.prepare(out / str(moment), parts, from_state(state), source={}, val_share=0.1, split_seed=2357, processes=1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""


def test_killed_at_any_moment_it_goes_on(tmp_path, small_parts, monkeypatch):
    """Once before each step that can be seen from outside: a part encoded, a file synced, renamed or removed, some
    documents copied. What is there then is no finished folder unless it is the right one; the next run completes it."""
    source = write_jsonl(tmp_path / "a.jsonl", documents(80))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer().state()))
    whole = make(tmp_path / "whole", [source])
    command = [sys.executable, "-c", KILLED, tmp_path, source, tmp_path / "tokenizer.json"]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])})
    folders = [folder for folder in tmp_path.iterdir() if folder.name.isdigit()]
    seen, encoded = [], []
    append = prepare._append
    monkeypatch.setattr(prepare, "_append", lambda *args: encoded.append(1) or append(*args))
    for folder in sorted(folders, key=lambda folder: int(folder.name)):
        there = [name for name in FILES if (folder / name).exists()]
        if "train.bin" in there:
            assert {name: (folder / name).read_bytes() for name in there} == whole
        done, state = 0, folder / ".partial/state.json"
        if state.exists():
            done = json.loads(state.read_text())["parts"]
        encoded.clear()
        if (folder / ".partial").exists():
            assert make(folder, [source]) == whole, folder.name
            assert "train.bin" in there or done + len(encoded) == len(parts_of([source]))
        seen.append((done, *there))
    assert len(seen) > 60 and len({done for done, *_ in seen}) > 5  # so it did go on from many places
    assert {tuple(there) for _, *there in seen} == {(), ("meta.json",), ("val.bin", "meta.json"), FILES}


def interrupt(monkeypatch, at: int) -> None:
    """Ctrl-C when that many parts have been encoded."""
    append, calls = prepare._append, itertools.count(1)

    def stop(*args):
        if next(calls) == at:
            monkeypatch.setattr(prepare, "_append", append)
            raise KeyboardInterrupt
        append(*args)

    monkeypatch.setattr(prepare, "_append", stop)


@pytest.mark.parametrize("kind", ["file", "dataset"])
def test_changed_documents_are_not_mixed(kind, tmp_path, small_parts, monkeypatch):
    """Their beginning is encoded: with the rest of other documents, also of the same size, the data would be neither."""
    from datasets import Dataset

    def attempt(texts: list[str]) -> dict[str, bytes]:
        if kind == "file":
            return make(tmp_path / "out", [write_jsonl(tmp_path / "a.jsonl", texts)])
        dataset = Dataset.from_dict({"text": texts})
        return make(tmp_path / "out", [], parts=parts_of_dataset(dataset, 10), dataset=dataset)

    texts = documents(160)
    interrupt(monkeypatch, at=10)
    with pytest.raises(KeyboardInterrupt):
        attempt(texts)
    assert json.loads((tmp_path / "out/.partial/state.json").read_text())["parts"] >= 5
    with pytest.raises(UserError, match=r"unfinished work of .* documents that have changed since; delete .*partial"):
        attempt([text.replace("word", "fork") for text in texts])
    assert (tmp_path / "out/.partial/ids").stat().st_size > 0  # it may have taken hours


# --- what cannot be read

BAD_ROWS = {
    "no JSON": b"{bad",
    "cut off": b'{"text": "abc',
    "no object": b"[1, 2]",
    "null": b"null",
    "a number": b'{"text": 3}',
    "null text": b'{"text": null}',
    "a list": b'{"text": ["a"]}',
    "no key": b'{"body": "a"}',
    "half a pair": b'{"text": "a \\ud83d b"}',
    "a surrogate's bytes": b'{"text": "a \xed\xa0\x80 b"}',
    "no UTF-8": b'{"text": "caf\xe9"}',
    "deep": b'{"text": ' + b"[" * 200_000,
    "a huge number": b'{"text": "a", "n": ' + b"1" * 5000 + b"}",
    "zeros": b"\0" * 100,
    "another encoding": '{"text": "abc"}'.encode("utf-16"),
}


def test_unreadable_rows_are_counted_and_the_rest_kept(tmp_path):
    rows = [row for bad in BAD_ROWS.values() for row in (b'{"text": "good"}', bad)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    meta = json.loads(make(tmp_path / "out", [tmp_path / "a.jsonl"], val_share=0.5)["meta.json"])
    assert meta["unreadable"] == sum(1 + bad.count(b"\n") for bad in BAD_ROWS.values())
    assert meta["val"]["documents"] + meta["train"]["documents"] == len(BAD_ROWS)
    assert meta["val"]["bytes"] + meta["train"]["bytes"] == len(BAD_ROWS) * len("good")


def test_unreadable_rows_of_parquet(tmp_path):
    """Null, bytes that are no UTF-8, a column of another type, no such column, a damaged row group."""
    raw = pyarrow.array([b"good", None, b"caf\xe9", b"x"], pyarrow.binary())
    unchecked = pyarrow.StringArray.from_buffers(4, *raw.buffers()[1:], raw.buffers()[0])
    tables = [{"text": unchecked}, {"text": [1, 2]}, {"text": [["a"], None]}, {"body": ["a", "b"]}, {"text": ["y"] * 9}]
    files = []
    for i, table in enumerate(tables):
        files.append(tmp_path / f"{i}.parquet")
        parquet.write_table(pyarrow.table(table), files[-1], use_dictionary=False, compression="none", row_group_size=5)
    content = bytearray(files[4].read_bytes())
    content[4:30] = b"\xff" * 26  # in the first row group, of five; the second is whole
    files[4].write_bytes(content)
    found = [[text for part in parts_of([file]) for text in read(part, "text")] for file in files]
    assert found == [["good", None, None, "x"], [None] * 2, [None] * 2, [None] * 2, [None] * 5 + ["y"] * 4]


def test_text_files_are_documents_without_their_byte_order_mark(tmp_path):
    """One that is not UTF-8, even the first one, is left out whole: with a hole it would be trained on as if it had none."""
    for i, content in enumerate([b"one, caf\xe9, two", b"\xef\xbb\xbfone", b"", "zwölf\r\n\ufeff".encode()]):
        (tmp_path / f"{i}.txt").write_bytes(content)
    made = make(tmp_path / "out", sorted(tmp_path.glob("*.txt")), val_share=0.5)
    meta = json.loads(made["meta.json"])
    assert meta["unreadable"] == 1 and meta["val"]["documents"] + meta["train"]["documents"] == 3
    ids = np.frombuffer(made["val.bin"] + made["train.bin"], "<u2").tolist()
    assert sorted(tokenizer().decode(ids).split("<|endoftext|>")) == ["", "", "one", "zwölf\r\n\ufeff"]


@pytest.mark.parametrize("size", [10, 200, 10**6])
def test_row_groups_of_any_size_are_cut_by_rows(size, tmp_path, monkeypatch):
    """A row group may be larger than memory; each of its rows is read exactly once, in order."""
    monkeypatch.setattr(reading, "PARQUET_PART", size)
    texts = [f"{i} and so on" * (i % 5) for i in range(50)]
    parquet.write_table(pyarrow.table({"n": range(50), "text": texts}), tmp_path / "a.parquet", row_group_size=20)
    parts = parts_of([tmp_path / "a.parquet"])
    assert [text for part in parts for text in read(part, "text")] == texts
    assert (len(parts) == 3) == (size == 10**6)


def test_a_file_of_another_kind_is_refused(tmp_path):
    for name, reason in (("a.json", "must be .jsonl"), ("a.parquet", "not a Parquet file")):
        (tmp_path / name).write_text('{"text": "some"}\n')
        with pytest.raises(UserError, match=f"path: .*{name} .*{reason}"):
            parts_of([tmp_path / name])


# A line, and the texts that are found in it.
ROWS = st.tuples(st.text(max_size=8), st.booleans()).map(
    lambda row: (json.dumps({"text": row[0]}, ensure_ascii=row[1]), [row[0]])
) | st.sampled_from(
    [("", []), ("  \t", []), ("{bad", [None]), ("[]", [None]), ('{"x": 1}', [None]), ('{"text": 1}', [None])]
)


@settings(max_examples=100, deadline=None)
@given(st.lists(ROWS, max_size=12), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(1, 60))
def test_each_row_is_read_once_however_the_file_is_cut(tmp_path_factory, rows, line_break, ends, size):
    file = tmp_path_factory.mktemp("rows") / "a.jsonl"
    file.write_bytes((line_break.join(line for line, _ in rows) + line_break * ends).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PART", size)
        parts = parts_of([file])
    assert [text for part in parts for text in read(part, "text")] == [text for _, texts in rows for text in texts]
    shutil.rmtree(file.parent)


# --- disk, memory, other processes


def test_no_room_is_said_before_it_is_needed(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", documents(160))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=source.stat().st_size - 1))
    with pytest.raises(UserError, match=r"out needs about .* GB .*free"):
        make(tmp_path / "out", [source])
    assert os.listdir(tmp_path / "out") == [".partial"]


def test_a_full_disk_at_any_moment(tmp_path, small_parts, monkeypatch):
    """Whenever it fills up: one clear error, no folder that looks finished, and with room again the run goes on."""
    source, fsync, calls = write_jsonl(tmp_path / "a.jsonl", documents(60)), os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(file) or fsync(file))
    whole, count = make(tmp_path / "whole", [source]), len(calls)
    assert count > 10
    for at in range(count):
        out, calls = tmp_path / str(at), itertools.count()

        def full(file, calls=calls, at=at):
            if next(calls) == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(file)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"the disk is full.*to resume"):
            make(out, [source])
        monkeypatch.setattr(os, "fsync", fsync)
        assert not (out / "train.bin").exists()
        assert make(out, [source]) == whole


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    """Four times the text: the ids alone, if they were kept, would be several times the allowance."""
    monkeypatch.setattr(reading, "PART", 1 << 16)

    def peak(count: int) -> int:
        source = write_jsonl(tmp_path / f"{count}.jsonl", [text * 8 for text in documents(count)])
        run = {"source": {}, "val_share": 0.1, "split_seed": 1, "processes": 1}
        tracemalloc.start()
        prepare.prepare(tmp_path / str(count), parts_of([source]), tokenizer(), **run)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    peak(50)  # what is imported on the way
    small, large = peak(500), peak(2000)
    ids = (tmp_path / "2000/train.bin").stat().st_size
    assert large - small < ids / 8, (small, large, ids)


def test_parts_are_encoded_only_a_few_ahead(tmp_path, small_parts):
    """Else the encoded ones would pile up in memory where the disk is slower than the processors."""
    parts = parts_of([write_jsonl(tmp_path / "a.jsonl", documents(160))])
    assert len(parts) > 20
    taken = []
    encoded = prepare.encode_all((taken.append(part) or part for part in parts), 2, tokenizer(), "text", None)
    next(encoded)
    assert len(taken) <= 5
    encoded.close()


def test_a_folder_that_cannot_be_written(tmp_path):
    """It holds something, or is a file."""
    source = write_jsonl(tmp_path / "a.jsonl", documents(20))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/val.bin").write_text("precious")
    with pytest.raises(UserError, match="already holds val"):
        make(tmp_path / "out", [source])
    assert os.listdir(tmp_path / "out") == ["val.bin"] and (tmp_path / "out/val.bin").read_text() == "precious"
    with pytest.raises(UserError, match=r"out=.*a.jsonl cannot be made \(File exists\)"):
        make(source, [source])


def test_two_processes_on_one_folder(tmp_path):
    """The second is refused, or waits; who comes later and would have waited accepts what is there."""
    source, out, made = write_jsonl(tmp_path / "a.jsonl", documents(20)), tmp_path / "out", []
    out.mkdir()
    with prepare._lock(out, wait=False):
        with pytest.raises(UserError, match=r"out: another process is writing it"):
            make(out, [source])
        waiting = threading.Thread(target=lambda: made.append(make(out, [source], wait=True)))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and not (out / "train.bin").exists()
    waiting.join(60)
    assert make(out, [write_jsonl(tmp_path / "b.jsonl", documents(10))], wait=True) == made[0]


# --- errors of the script


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["path=b.jsonl"], "path=b.jsonl: No such file or directory"),
        (["path=a.jsonl"], "or learn a vocabulary from the documents with tokenizer=bpe vocab_size=8192"),
        (["hub=no/such_set", "tokenizer=bpe", "vocab_size=300"], "hub=no/such_set cannot be loaded"),
        (["path=a.jsonl", "tokenizer=bpe", "vocab_size=257"], "val_share=0.0005 cannot split 1 documents"),
        (
            ["path=a.jsonl", "tokenizer=bpe", "vocab_size=257", "text_key=body"],
            "text_key=body: no text in the first rows",
        ),
    ],
)
def test_errors_are_short_and_name_keys_that_there_are(arguments, said, tmp_path, monkeypatch):
    """Without a network and GPT-2's files; its advice was once that of training, whose keys begin with data."""
    write_jsonl(tmp_path / "a.jsonl", ["one document"])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9/")
    output = script("out=out", *arguments, cwd=tmp_path, status=2)
    error = output[output.index("\nerror: ") :].strip()
    assert said in error and "Traceback" not in output
    assert len(error) < 600 and error.count("\n") == 0 and (" data." not in error or "gptlab.train" in error)
    assert not any((tmp_path / "out" / name).exists() for name in FILES)


POOL = """
import multiprocessing, sys, time
from pathlib import Path
from gptlab.data import documents, prepare
from gptlab.tokenizer import BPETokenizer

if __name__ == "__main__":
    bytes_ = BPETokenizer([bytes([i]) for i in range(256)])
    encoded = prepare.encode_all(documents.parts_of([Path(sys.argv[1])]) * 50, 2, bytes_, "text", None)
    next(encoded)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="tells by it which processes there are")
def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    source, environment = write_jsonl(tmp_path / "a.jsonl", documents(20)), {"PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, "-c", POOL, source]
    with subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(worker) for worker in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while (left := [worker for worker in workers if Path(f"/proc/{worker}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left
