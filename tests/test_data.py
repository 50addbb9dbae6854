"""Texts: from the standard library, from files, from downloads that fail in every way."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from gptlab.data.char import CharData
from gptlab.data.corpora import data_folder, download, python_docs

TEXT = "To be, or not to be: that is the question.\n" * 20
SHA256 = hashlib.sha256(TEXT.encode()).hexdigest()


def char_data(**changes) -> CharData:
    defaults = {
        "seed": 1,
        "name": "a_text",
        "block_size": 8,
        "batch_size": 4,
        "micro_batch_size": None,
        "val_windows": None,
        "workers": 0,
    }
    data = CharData(**{**defaults, **changes})
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
    assert data.resolved == {"name": "python_docs", "url": None, "sha256": None, "fallback": None}
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


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="directory"):
        char_data(path=str(tmp_path))
