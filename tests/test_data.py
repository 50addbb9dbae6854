"""Texts by characters: the split, what identifies them, and what is refused."""

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

from gptlab.data import files, text
from gptlab.data.text import TextData
from gptlab.errors import MissingFileError, UserError

TEXT = "To be, or not to be: that is the question.\n" * 20
SHA256 = hashlib.sha256(TEXT.encode()).hexdigest()


def char_data(**changes) -> TextData:
    data = TextData(**{"seed": 1, "name": "a_text", "block_size": 8, "batch_size": 4, **changes})
    data.prepare_data()
    data.setup("fit")
    return data


def decode(data: TextData) -> tuple[str, str]:
    return data.tokenizer.decode(data.train_ids), data.tokenizer.decode(data.val_ids)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_split_and_vocabulary(folder):
    """nanoGPT's: sorted characters, the first 90 % for training."""
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    data = char_data(path="a.txt")
    assert data.tokenizer.chars == "".join(sorted(set(TEXT)))
    split = int(len(TEXT) * 0.9)
    assert decode(data) == (TEXT[:split], TEXT[split:])
    assert data.record == {"name": "a_text", "sha256": SHA256}
    assert data.resolved == {"path": str(folder / "a.txt")}


def test_tiny_shakespeare_is_nanogpts(shakespeare):
    from omegaconf import OmegaConf

    from gptlab.config import CONF

    checksum = OmegaConf.load(CONF / "data/shakespeare_char.yaml").sha256
    data = char_data(path=shakespeare, sha256=checksum)
    assert (data.tokenizer.vocab_size, len(data.train_ids), len(data.val_ids)) == (65, 1_003_854, 111_540)


def test_python_docs_needs_nothing():
    assert len(char_data(name="python_docs").train_ids) > 300_000


def test_a_download_is_used_from_its_folder_or_an_error(tmp_path):
    """That it is fetched is tested with `fetch`. To train on the fallback in silence, under this name, was a fault: the
    choice is made before a run is composed."""
    source = {"url": "http://127.0.0.1:9/", "sha256": SHA256, "folder": str(tmp_path), "fallback": "python_docs"}
    with pytest.raises(MissingFileError, match=r"a_text.txt .*data.path=FILE"):
        char_data(**source)
    (tmp_path / "a_text.txt").write_text(TEXT)
    data = char_data(**source)
    assert data.record == {"name": "a_text", "sha256": SHA256} and data.resolved == {"folder": str(tmp_path)}


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 1 << 18])
def test_characters_survive_the_ends_of_pieces(folder, monkeypatch, piece):
    """Newlines of all kinds stay as they are."""
    monkeypatch.setattr(files, "PIECE", piece)
    rng = np.random.default_rng(piece)
    content = "\r\n" + "".join(rng.choice(list("ab\r\n\0é€🙂\ufeff\u2028"), size=300))
    for name, part in (("a.txt", content[:100]), ("b.txt", ""), ("c.txt", "c" + content[100:])):
        (folder / name).write_bytes(part.encode())
    data = char_data(path=str(folder))
    joined = content[:100] + "\n\nc" + content[100:]
    assert "".join(decode(data)) == joined
    assert data.tokenizer.chars == "".join(sorted(set(joined)))
    assert data.record["sha256"] == hashlib.sha256(joined.encode()).hexdigest()


@pytest.mark.parametrize(
    ("content", "changes", "error", "reason"),
    [
        (None, {}, MissingFileError, "data.path=a.txt: No such file"),
        (b"abc\xff", {}, UserError, "not UTF-8 text .byte 3"),
        (b"short text", {}, UserError, "validation split has 1 tokens"),
        (b"a" * 81, {"block_size": 80}, UserError, "training split has 72 tokens.*at least data.block_size . 1 = 81"),
        (TEXT.encode(), {"sha256": "0" * 64}, UserError, "has SHA-256 .*data=text data.path=a.txt"),
    ],
)
def test_files_that_cannot_be_used(folder, content, changes, error, reason):
    if content is not None:
        (folder / "a.txt").write_bytes(content)
    with pytest.raises(error, match=reason):
        char_data(path="a.txt", **changes)


@pytest.mark.parametrize(("size", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16), (66_000, np.uint32)])
def test_ids_take_the_smallest_type(folder, size, dtype):
    content = "".join(chr(0x10000 + i) for i in range(size)) * max(1, 200 // size)
    (folder / "a.txt").write_text(content, encoding="utf-8")
    data = char_data(path="a.txt")
    assert data.train_ids.dtype == data.val_ids.dtype == dtype and data.tokenizer.vocab_size == size


def test_memory_is_that_of_the_ids(folder):
    """16 MB of text may take 16 MB and small change; held whole, its code points alone would be four times that."""
    (folder / "a.txt").write_bytes(TEXT.encode() * (16_000_000 // len(TEXT)))
    tracemalloc.start()
    data = char_data(path="a.txt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.train_ids) + len(data.val_ids) > 15e6 and peak < 26e6


def test_the_checksum_is_of_what_was_encoded(folder, monkeypatch):
    """Of a text that something writes to between its two readings, too: the record says what is trained on."""
    (folder / "a.txt").write_text(TEXT)

    class Tokenizer(text.CharTokenizer):
        def __init__(self, chars):
            super().__init__(chars)
            (folder / "a.txt").write_text(TEXT * 2)

    monkeypatch.setattr(text, "CharTokenizer", Tokenizer)
    data = char_data(path="a.txt")
    encoded = "".join(decode(data))
    assert encoded == TEXT * 2 and data.record["sha256"] == hashlib.sha256(encoded.encode()).hexdigest()


def test_a_text_for_validation(folder):
    """All of the one for training, all of the other for validation, each with its checksum."""
    (folder / "a.txt").write_text(TEXT)
    (folder / "v1.txt").write_text("be not")
    (folder / "v2.txt").write_text("be that")
    data = char_data(path="a.txt", val_path="v*.txt")
    assert decode(data) == (TEXT, "be not\nbe that")
    assert data.record == {
        "name": "a_text",
        "sha256": SHA256,
        "val_sha256": hashlib.sha256(b"be not\nbe that").hexdigest(),
    }
    assert data.resolved == {"path": str(folder / "a.txt"), "val_path": f"{folder}/v*.txt"}


@pytest.mark.parametrize(
    ("val_texts", "needed"),
    [
        (["ab" * 9, "abé" + "€" * 10], ["3 characters", r"'\n' (U+000A)", "'é' (U+00E9)", "'€' (U+20AC)"]),
        (["bdefghijklm"], ["10 characters", "'f' (U+0066)"]),
        (["abc"], ["the validation split has 3 tokens"]),
    ],
)
def test_validation_texts_that_cannot_be_used(folder, val_texts, needed):
    """The model could not learn characters that training never shows."""
    (folder / "a.txt").write_text("abc" * 100)
    for i, val_text in enumerate(val_texts):
        (folder / f"v{i}.txt").write_text(val_text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        char_data(path="a.txt", val_path="v*.txt")
    for part in ("data.val_path=v*.txt", "data.path=a.txt", *needed):
        assert part in str(error.value)


def test_two_characters_and_a_validation_text_as_a_whole_run(gptlab, tmp_path):
    """Without a newline to begin a sample with; resumed from another folder, and refused once the text has changed."""
    (tmp_path / "my texts").mkdir()
    (tmp_path / "my texts/a.md").write_text("🙂é" * 200, encoding="utf-8")
    (tmp_path / "val.txt").write_text("é🙂" * 20, encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    paths = ["data=text", "data.path=my texts/*.md", "data.val_path=val.txt", "data.block_size=1"]
    gptlab("train", *TINY, *paths, "hydra.run.dir=run")
    gptlab("train", "resume=../run", "trainer.max_steps=6", cwd=tmp_path / "elsewhere")
    sample = gptlab("sample", "ckpt=run", "max_new_tokens=20", PYTHONUTF8="1").stdout
    assert sample.startswith("é") and len(sample.strip()) == 21 and set(sample.strip()) <= {"é", "🙂"}
    (tmp_path / "val.txt").write_text("é🙂" * 21, encoding="utf-8")
    assert "Traceback" not in gptlab("train", "resume=run", "trainer.max_steps=8", status=2).stderr
