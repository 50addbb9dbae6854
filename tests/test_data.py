"""Texts: from the standard library, from files, from downloads that fail in every way."""

import hashlib
import os
import subprocess
import sys
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

from gptlab.data import files
from gptlab.data.files import TextFiles, data_folder, download, from_anywhere, python_docs, text_files
from gptlab.data.text import TextData

TEXT = "To be, or not to be: that is the question.\n" * 20
SHA256 = hashlib.sha256(TEXT.encode()).hexdigest()


def char_data(**changes) -> TextData:
    defaults = {
        "seed": 1,
        "name": "a_text",
        "block_size": 8,
        "batch_size": 4,
        "micro_batch_size": None,
        "val_windows": None,
        "workers": 0,
    }
    data = TextData(**{**defaults, **changes})
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture
def server():
    """A local web server; its `reply` decides what the next requests get, `requests` counts them."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            status, body = self.server.reply
            self.send_response(status)
            self.send_header("Content-Length", str(len(TEXT)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.reply, server.requests = (200, TEXT.encode()), 0
    server.url = f"http://127.0.0.1:{server.server_port}/input.txt"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_split_and_vocabulary(tmp_path):
    """nanoGPT's: sorted characters, the first 90 % for training."""
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    data = char_data(path=str(tmp_path / "a.txt"))
    assert data.tokenizer.chars == "".join(sorted(set(TEXT)))
    split = int(len(TEXT) * 0.9)
    assert data.tokenizer.decode(data.train_ids) == TEXT[:split]
    assert data.tokenizer.decode(data.val_ids) == TEXT[split:]
    assert data.record == {"name": "a_text", "sha256": SHA256}


def test_tiny_shakespeare_is_nanogpts(shakespeare):
    from omegaconf import OmegaConf

    from gptlab.config import CONF

    checksum = OmegaConf.load(CONF / "data/shakespeare_char.yaml").sha256
    data = char_data(path=shakespeare, sha256=checksum)
    assert (data.tokenizer.vocab_size, len(data.train_ids), len(data.val_ids)) == (65, 1_003_854, 111_540)


def test_line_ends_and_unicode_stay_as_they_are(tmp_path):
    text = "one\r\ntwo\rthree\n\u2028 Zoë 🙂 " * 20
    (tmp_path / "a.txt").write_bytes(text.encode())
    data = char_data(path=str(tmp_path / "a.txt"))
    assert data.tokenizer.decode(data.train_ids) + data.tokenizer.decode(data.val_ids) == text


def test_python_docs_needs_nothing():
    data = char_data(name="python_docs")
    assert data.warning is None and len(data.train_ids) > 300_000
    assert "assert" in python_docs()


def test_download_is_kept_and_checked(server, tmp_path):
    for _ in range(2):
        data = char_data(url=server.url, sha256=SHA256, folder=str(tmp_path / "cache"))
        assert data.record == {"name": "a_text", "sha256": SHA256}
        assert data.resolved == {"folder": str(tmp_path / "cache")}
    assert server.requests == 1
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["a_text.txt"]


def test_damaged_copy_is_fetched_again(server, tmp_path):
    (tmp_path / "a_text.txt").write_text("half a file")
    char_data(url=server.url, sha256=SHA256, folder=str(tmp_path))
    assert (tmp_path / "a_text.txt").read_text() == TEXT


@pytest.mark.parametrize("reply", [(404, b""), (200, b"x" * len(TEXT)), (200, b"cut off")])
def test_failed_download_falls_back_under_another_name(server, tmp_path, reply):
    """Never a trace of the text that was asked for, and nothing left in the folder."""
    server.reply = reply
    data = char_data(url=server.url, sha256=SHA256, folder=str(tmp_path), fallback="python_docs")
    assert data.record["name"] == "python_docs" and data.record["sha256"] != SHA256
    assert "NOT training on a_text" in data.warning
    assert data.resolved == {"name": "python_docs", "url": None, "file": None, "sha256": None, "fallback": None}
    assert list(tmp_path.iterdir()) == []


def test_failed_download_without_fallback_says_everything(server, tmp_path):
    server.reply = (500, b"")
    with pytest.raises(FileNotFoundError) as error:
        char_data(url=server.url, sha256=SHA256, folder=str(tmp_path))
    for needed in (server.url, SHA256, str(tmp_path / "a_text.txt"), "data.path=FILE"):
        assert needed in str(error.value)


def test_a_server_that_hangs_or_trickles_is_given_up(tmp_path):
    """One socket accepts and never answers; then an answer that keeps trickling past the deadline."""
    import socket
    import time

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(OSError):
            download(url, SHA256, tmp_path / "a.txt", timeout=0.2)

    def trickle(listener):
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(30):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=trickle, args=(listener,), daemon=True).start()
        started = time.monotonic()
        with pytest.raises(OSError, match="not finished"):
            download(
                f"http://127.0.0.1:{listener.getsockname()[1]}/", SHA256, tmp_path / "a.txt", timeout=5, deadline=0.5
            )
        assert time.monotonic() - started < 2.5
    assert list(tmp_path.iterdir()) == []


def test_folder_comes_from_config_then_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path))
    assert data_folder(None) == tmp_path
    assert str(data_folder("/elsewhere")) == "/elsewhere"
    monkeypatch.delenv("GPTLAB_DATA")
    assert data_folder(None).parts[-2:] == (".cache", "gptlab")


@pytest.mark.parametrize(
    ("content", "changes", "error", "text"),
    [
        (None, {}, FileNotFoundError, "No such file"),
        (b"", {}, ValueError, "is empty"),
        (b"abc\xff", {}, ValueError, "not UTF-8 text .byte 3"),
        (b"short text", {}, ValueError, "validation split has 1 tokens"),
        (b"a" * 81, {"block_size": 80}, ValueError, "training split has 72 tokens.*data.block_size=80"),
        (TEXT.encode(), {"sha256": "0" * 64}, ValueError, "SHA-256"),
        (TEXT.encode(), {"name": "python_docs"}, ValueError, "data=text data.path="),
        (TEXT.encode(), {"fallback": "something"}, ValueError, "data.fallback=something"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, changes, error, text):
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=text):
        char_data(path=str(file), **changes)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A working directory with a folder of files, two of them .txt, one of those nested, and hidden ones."""
    for name in ("b.txt", "a/c.txt", "a/d.md", "a/[x]*.md", ".hidden.txt", ".hidden/e.txt"):
        file = tmp_path / "texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"I am {name}. ".encode() * 50)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "texts"


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("texts", ["a/c.txt", "b.txt"]),
        ("texts/", ["a/c.txt", "b.txt"]),
        ("texts/b.txt", ["b.txt"]),
        ("texts/*.txt", ["b.txt"]),
        ("texts/**/?.*", ["a/c.txt", "a/d.md", "b.txt"]),
        ("texts/**/**/*.txt", ["a/c.txt", "b.txt"]),
        ("texts/.*.txt", [".hidden.txt"]),
        ("texts/a/[x]*.md", ["a/[x]*.md"]),
        ("texts/a/[[]*.md", ["a/[x]*.md"]),
    ],
)
def test_a_path_is_a_file_a_folder_or_a_glob(texts, path, names):
    """Each file once, sorted, hidden ones left out unless asked for, and a file's own brackets are no glob. All of it
    the same from another working directory: that is how a resume finds it."""
    wanted = [Path("texts", name) for name in names]
    assert text_files(path, "data.path") == wanted
    data = char_data(path=path)
    text = "\n".join(file.read_bytes().decode() for file in wanted)
    assert data.tokenizer.decode(data.train_ids) + data.tokenizer.decode(data.val_ids) == text
    assert data.record["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    os.chdir("/")
    assert [file.resolve() for file in text_files(data.resolved["path"], "data.path")] == [
        texts.parent / file for file in wanted
    ]


def test_globs_of_folders_that_look_like_globs(tmp_path, monkeypatch):
    """Made absolute without care, "run[1]/*.txt" would look into run1."""
    for folder in ("run1", "run[1]"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    monkeypatch.chdir(tmp_path / "run[1]")
    monkeypatch.setenv("HOME", str(tmp_path / "run1"))
    assert [file.read_text() for file in text_files(from_anywhere("*.txt"), "data.path")] == ["run[1]"]
    assert text_files("~/*.txt", "data.path") == [tmp_path / "run1/a.txt"]
    assert from_anywhere("~/a.txt") == str(tmp_path / "run1/a.txt")


def test_links_that_lead_back_add_nothing(texts):
    """A folder's walk would never end, or a glob read the same text forty times."""
    (texts / "a/back").symlink_to(texts)
    assert text_files("texts", "data.path") == [Path("texts/a/c.txt"), Path("texts/b.txt")]
    assert text_files("texts/**/*.txt", "data.path") == [Path("texts/a/c.txt"), Path("texts/b.txt")]


@pytest.mark.parametrize(
    ("path", "error", "needed"),
    [
        ("", ValueError, ["data.val_path is missing", "glob"]),
        ("text", FileNotFoundError, ["data.val_path=text", "No such file", "did you mean texts?"]),
        ("texts/B.TXT", FileNotFoundError, ["did you mean texts/b.txt?"]),
        ("texts/b.txt/x", FileNotFoundError, ["Not a directory"]),
        ("texts/zzzzzz/x", FileNotFoundError, ["texts holds a, b.txt, dangling, empty, pipe"]),
        ("texts/*.rst", FileNotFoundError, ["data.val_path=texts/*.rst", "glob", "b.txt"]),
        ("texts/empty", ValueError, ["data.val_path=texts/empty", "is empty"]),
        ("texts/empt*", ValueError, ["nothing but empty files, 1"]),
        ("texts/dangling", FileNotFoundError, ["No such file", "a link to nowhere"]),
        ("texts/pipe", ValueError, ["not a regular file", "write it to a file"]),
        ("texts/p*", ValueError, ["texts/pipe is not a regular file"]),
        ("/dev/zero", ValueError, ["not a regular file"]),
        ("markdown", FileNotFoundError, ["2 .md, 1 without an extension", "'data.val_path=markdown/**/*.md'"]),
        ("markdown/none", FileNotFoundError, ["data.val_path=markdown/none", "its files: none"]),
        ("a\0b", FileNotFoundError, ["null byte"]),
        ("a" * 5000, FileNotFoundError, ["too long"]),
    ],
)
def test_paths_that_lead_to_no_text(texts, path, error, needed):
    """One error without reading anything (a pipe would hang), with the key, what was given and what lies near it."""
    (texts / "empty").touch()
    (texts / "dangling").symlink_to("nowhere")
    os.mkfifo(texts / "pipe")
    (texts.parent / "markdown/none").mkdir(parents=True)
    for name in ("a.md", "b.md", "LICENSE"):
        (texts.parent / "markdown" / name).write_text("x")
    with pytest.raises(error) as caught:
        text_files(path, "data.val_path")
    for text in needed:
        assert text in str(caught.value)


def test_files_without_permission(texts, monkeypatch):
    """Asked of a made-up answer, as root may read everything."""
    monkeypatch.setattr(os, "access", lambda file, mode: "b.txt" not in str(file))
    with pytest.raises(ValueError, match=r"data.path=texts/b.txt: Permission denied"):
        text_files("texts/b.txt", "data.path")
    with pytest.raises(ValueError, match=r"data.path=texts: texts/b.txt: Permission denied"):
        text_files("texts", "data.path")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_folders_without_permission(texts):
    """os.walk would leave them out in silence."""
    (texts / "a").chmod(0)
    try:
        with pytest.raises(ValueError, match="texts/a cannot be read"):
            text_files("texts", "data.path")
    finally:
        (texts / "a").chmod(0o700)


BAD_UTF8 = [b"\xff", b"\x80", b"\xc3", b"\xc3(", b"\xe2\x82", b"\xf0\x9f\x98x", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"]


@pytest.mark.parametrize("bad", BAD_UTF8)
@pytest.mark.parametrize("end", [b"", b" more"])
def test_the_first_bad_byte_is_named_wherever_pieces_end(tmp_path, monkeypatch, bad, end):
    """Pieces of 4 bytes cut characters everywhere; the place must be the one that decoding the whole names."""
    monkeypatch.setattr(files, "PIECE", 4)
    file = tmp_path / "my text.txt"
    for before in range(9):
        content = "aé€🙂b".encode() + b"x" * before + bad + end
        with pytest.raises(UnicodeDecodeError) as expected:
            content.decode()
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"data.path: .*not UTF-8 text \(byte {expected.value.start}\).*iconv.*my text"
        ):
            list(TextFiles(str(file), "data.path"))


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 1 << 18])
def test_characters_survive_the_ends_of_pieces(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(files, "PIECE", piece)
    rng = np.random.default_rng(piece)
    text = "".join(rng.choice(list("ab\r\n\0é€🙂\ufeff\u2028"), size=300))
    for name, part in (("a.txt", text[:100]), ("b.txt", ""), ("c.txt", text[100:])):
        (tmp_path / name).write_bytes(part.encode())
    data = char_data(path=str(tmp_path))
    joined = text[:100] + "\n\n" + text[100:]
    assert data.tokenizer.decode(np.concatenate((data.train_ids, data.val_ids))) == joined
    assert data.tokenizer.chars == "".join(sorted(set(joined)))
    assert data.record["sha256"] == hashlib.sha256(joined.encode()).hexdigest()


@pytest.mark.parametrize(("size", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16), (66_000, np.uint32)])
def test_ids_take_the_smallest_type(tmp_path, size, dtype):
    text = "".join(chr(0x10000 + i) for i in range(size)) * max(1, 200 // size)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    data = char_data(path=str(tmp_path / "a.txt"))
    assert data.train_ids.dtype == data.val_ids.dtype == dtype and data.tokenizer.vocab_size == size


def test_memory_is_that_of_the_ids(tmp_path):
    """32 MB of text may take 32 MB and small change; held whole, its code points alone would be four times that."""
    (tmp_path / "a.txt").write_bytes(TEXT.encode() * (32_000_000 // len(TEXT)))
    tracemalloc.start()
    data = char_data(path=str(tmp_path / "a.txt"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.train_ids) + len(data.val_ids) > 31e6 and peak < 48e6


@pytest.mark.parametrize("change", ["longer", "shorter", "other", "new character", "not UTF-8", "gone"])
def test_a_text_that_changes_between_the_two_readings_is_refused(tmp_path, monkeypatch, change):
    """Trained on in silence, its ids would be neither the old nor the new text's."""
    from gptlab.data import text

    file = tmp_path / "a.txt"
    file.write_text(TEXT)
    changes = {
        "longer": lambda: file.write_text(TEXT + "be"),
        "shorter": lambda: file.write_text(TEXT[:-1]),
        "other": lambda: file.write_text(TEXT.replace("or", "ro", 1)),
        "new character": lambda: file.write_text(TEXT[:-1] + "é", encoding="utf-8"),
        "not UTF-8": lambda: file.write_bytes(TEXT.encode() + b"\xff"),
        "gone": file.unlink,
    }

    class Tokenizer(text.CharTokenizer):
        def __init__(self, chars):
            super().__init__(chars)
            changes[change]()

    monkeypatch.setattr(text, "CharTokenizer", Tokenizer)
    with pytest.raises(ValueError, match=r"data.path: the text changed"):
        char_data(path=str(file))


def test_a_text_for_validation(texts):
    """All of the one for training, all of the other for validation, each with its checksum."""
    (texts / "val.txt").write_text("I am a txt. " * 4)
    data = char_data(path="texts/b.txt", val_path="texts/v*.txt")
    assert data.tokenizer.decode(data.train_ids) == (texts / "b.txt").read_text()
    assert data.tokenizer.decode(data.val_ids) == (texts / "val.txt").read_text()
    sums = [hashlib.sha256((texts / name).read_bytes()).hexdigest() for name in ("b.txt", "val.txt")]
    assert data.record == {"name": "a_text", "sha256": sums[0], "val_sha256": sums[1]}
    assert data.resolved == {"path": str(texts / "b.txt"), "val_path": f"{texts.parent}/texts/v*.txt"}


@pytest.mark.parametrize(
    ("val_texts", "needed"),
    [
        (["ab" * 9, "abé" + "€" * 10], ["'é' (U+00E9) at position 2 of", "v1.txt", "as it does 2 more"]),
        (["ab" * 9, "ab]^-\\"], ["']' (U+005D) at position 2 of", "as it does 4 more"]),
        (["ab^"], ["'^' (U+005E) at position 2 of", "lacks: the model"]),
        (["ab" * 9, "ab"], ["'\\n' (U+000A) between its files"]),
        (["abc"], ["the validation split has 3 tokens", "data.val_path="]),
    ],
)
def test_validation_texts_that_cannot_be_used(tmp_path, monkeypatch, val_texts, needed):
    """Characters that training never shows are named with their place, also in a later piece of a later file."""
    monkeypatch.setattr(files, "PIECE", 2)
    (tmp_path / "a.txt").write_text("abc" * 100)
    for i, text in enumerate(val_texts):
        (tmp_path / f"v{i}.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        char_data(path=str(tmp_path / "a.txt"), val_path=str(tmp_path / "v*.txt"))
    for text in ("data.val_path=", "data.path=", *needed):
        assert text in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"name": "python_docs"}, {"url": "http://127.0.0.1:9/"}, {"url": "x", "path": "a"}]
)
def test_known_texts_keep_their_split(changes):
    """Under one name, losses must be comparable."""
    with pytest.raises(ValueError, match=r"data.val_path=v.txt.*data=text data.path=\w+ data.val_path=v.txt"):
        TextData(**{"seed": 1, "name": "a_text", "block_size": 8, "batch_size": 4, **changes}, val_path="v.txt")


@pytest.mark.parametrize(
    ("text", "block_size", "lengths"),
    [("ab" * 10, 1, (18, 2)), ("🙂é" * 10, 1, (18, 2)), ("ab" * 10, 2, None), ("a", 1, None), ("aaab", 1, None)],
)
def test_tiny_texts(tmp_path, text, block_size, lengths):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    if lengths:
        data = char_data(path=str(tmp_path / "a.txt"), block_size=block_size)
        assert (len(data.train_ids), len(data.val_ids)) == lengths
    else:
        with pytest.raises(ValueError, match=rf"data.path=.*split has \d tokens.*at least {block_size + 1}"):
            char_data(path=str(tmp_path / "a.txt"), block_size=block_size)


def test_finding_files_needs_neither_torch_nor_numpy():
    """Configs are checked before torch is imported, to fail within a second."""
    code = "import sys, gptlab.data.files; print({'torch', 'numpy', 'lightning'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_two_characters_and_a_validation_text_as_a_whole_run(gptlab, tmp_path):
    """Without a line break to begin a sample with; resumed from another folder, and refused once the text has changed."""
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


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["data.path=pipe"], "data.path=pipe is not a regular file"),
        (["data.path=a.txt", "data.val_path=b.txt"], "'é' (U+00E9) at position 4 of"),
    ],
)
def test_mistakes_are_texts_with_status_2(gptlab, tmp_path, arguments, needed):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT[:4] + "é" + TEXT, encoding="utf-8")
    stderr = gptlab("train", *TINY, "data=text", *arguments, status=2).stderr
    assert needed in stderr and "Traceback" not in stderr
    assert not (tmp_path / "outputs").exists() or not list((tmp_path / "outputs").glob("**/run.json"))
