"""GPT-2's vocabulary: fetched once into tiktoken's cache, checked, and never used unless it is OpenAI's."""

import contextlib
import functools
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiktoken

from gptlab.data import bpe
from gptlab.data.files import download

# Where tiktoken looks for them: SHA-1 of their addresses, in the order in which they are fetched.
CACHED = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


@pytest.fixture
def server():
    """A local web server; `reply(handler)` answers each request, `asked` lists the names that were asked for.
    `patience`: how long `download` is to wait for it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path.removeprefix("/"))
            with contextlib.suppress(OSError):  # whoever asked has hung up
                self.server.reply(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.stopped = [], threading.Event()
    server.patience = {}
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(server, tmp_path, monkeypatch):
    """An empty cache of tiktoken's, and OpenAI's server replaced by the local one. tiktoken forgets what it has read
    before, and its own download, which knows no timeout, is an error."""

    def local(url: str, checksum: str, to: Path) -> None:
        assert url.startswith(bpe.GPT2_URL)
        url = url.replace(bpe.GPT2_URL, f"http://127.0.0.1:{server.server_port}/")
        download(url, checksum, to, **server.patience)

    def not_tiktokens(url):
        raise AssertionError(f"tiktoken itself reads {url}")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(bpe, "download", local)
    monkeypatch.setattr("tiktoken.load.read_file", not_tiktokens)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    return tmp_path / "cache"


def answer(handler, body: bytes, status: int = 200, length: int | None = None) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def from_folder(folder: str, handler) -> None:
    """The real file."""
    answer(handler, Path(folder, CACHED[handler.path.removeprefix("/")]).read_bytes())


def trickle(handler, what: bytes) -> None:
    for _ in range(60):
        handler.wfile.write(what)
        if handler.server.stopped.wait(0.1):
            return


def hang(handler) -> None:
    handler.server.stopped.wait(10)


def trickle_body(handler) -> None:
    answer(handler, b"", length=1000)
    trickle(handler, b"x")


def trickle_headers(handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    trickle(handler, b"X-Header: x\r\n")


REPLIES = {
    "hangs": hang,
    "trickles": trickle_body,
    "trickles headers": trickle_headers,
    "not found": functools.partial(answer, body=b"no such file", status=404),
    "broken": functools.partial(answer, body=b"", status=500),
    "another file": functools.partial(answer, body=b"#version: 0.2\n" * 1000),
    "empty": functools.partial(answer, body=b""),
    "cut off": functools.partial(answer, body=b"#version: 0.2\n", length=456_318),
    "no HTTP": lambda handler: handler.wfile.write(b"\0\xff" * 100 + b"\r\n"),
    "hangs up": lambda handler: handler.connection.close(),
}


@pytest.mark.parametrize("trouble", list(REPLIES))
def test_a_failed_download_ends_in_what_to_do(server, cache, trouble):
    """Within seconds, whatever the server does, and with nothing left in the cache."""
    server.reply, server.patience = REPLIES[trouble], {"timeout": 0.3, "deadline": 0.6}
    started = time.monotonic()
    with pytest.raises(FileNotFoundError) as error:
        bpe.gpt2()
    assert time.monotonic() - started < 4
    says_what_to_do(str(error.value), cache, "vocab.bpe")
    assert server.asked == ["vocab.bpe"]
    assert not cache.exists() or list(cache.iterdir()) == []


def says_what_to_do(text: str, cache: Path, name: str) -> None:
    """What to fetch, where to put it, how to know that it is right, and what does without."""
    for needed in (bpe.GPT2_URL + name, str(cache / CACHED[name]), bpe.GPT2_FILES[name], "data.tokenizer=bpe"):
        assert needed in text


def test_without_a_server(cache, monkeypatch):
    """Nobody listens there, as without a network; and no proxy is asked."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        bpe, "download", lambda url, checksum, to: download("http://127.0.0.1:9/", checksum, to, timeout=1)
    )
    with pytest.raises(FileNotFoundError, match="refused") as error:
        bpe.gpt2()
    says_what_to_do(str(error.value), cache, "vocab.bpe")
    assert not cache.exists()


def test_the_error_names_the_file_that_is_missing(gpt2_files_here, server, cache):
    """The first is there; the second is asked for, and what is written of it does not stay."""
    cache.mkdir()
    shutil.copy(Path(gpt2_files_here, CACHED["vocab.bpe"]), cache)
    server.reply = REPLIES["cut off"]
    with pytest.raises(FileNotFoundError) as error:
        bpe.gpt2()
    says_what_to_do(str(error.value), cache, "encoder.json")
    assert server.asked == ["encoder.json"] and [file.name for file in cache.iterdir()] == [CACHED["vocab.bpe"]]


@pytest.fixture
def gpt2_files_here(gpt2_files) -> str:
    """The real files, whose place is remembered before `cache` names another."""
    return gpt2_files


def test_fetched_once_and_read_from_the_cache(gpt2_files_here, server, cache):
    server.reply = functools.partial(from_folder, gpt2_files_here)
    tokenizer = bpe.gpt2()
    assert tokenizer.vocab_size == 50_257 and tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert server.asked == ["vocab.bpe", "encoder.json"]
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == {
        name: Path(gpt2_files_here, name).read_bytes() for name in CACHED.values()
    }
    tiktoken.registry.ENCODINGS.clear()
    assert bpe.gpt2().tokens == tokenizer.tokens and len(server.asked) == 2


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize(
    "damage", [lambda content: b"", lambda content: content[:-1], lambda content: content.replace(b"t h", b"h t", 1) + b"\n"]
)  # fmt: skip
def test_a_changed_file_is_fetched_anew(gpt2_files_here, server, cache, name, damage):
    """Also one that tiktoken could read: with merges in another order, ids would mean something else."""
    cache.mkdir()
    for file in CACHED.values():
        shutil.copyfile(Path(gpt2_files_here, file), cache / file)
    right = (cache / CACHED[name]).read_bytes()
    (cache / CACHED[name]).write_bytes(damage(right))
    server.reply = functools.partial(from_folder, gpt2_files_here)
    assert bpe.gpt2().encode("Hello world").tolist() == [15496, 995]
    assert server.asked == [name] and (cache / CACHED[name]).read_bytes() == right
    assert sorted(file.name for file in cache.iterdir()) == sorted(CACHED.values())


@pytest.mark.parametrize("name", CACHED)
def test_a_changed_file_is_not_used_where_it_cannot_be_fetched(gpt2_files_here, server, cache, name):
    cache.mkdir()
    for file in CACHED.values():
        shutil.copyfile(Path(gpt2_files_here, file), cache / file)
    with open(cache / CACHED[name], "ab") as file:
        file.write(b"\n")
    server.reply = REPLIES["broken"]
    with pytest.raises(FileNotFoundError, match="HTTP Error 500") as error:
        bpe.gpt2()
    says_what_to_do(str(error.value), cache, name)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written(gpt2_files_here, server, cache):
    cache.mkdir()
    cache.chmod(0o500)
    server.reply = functools.partial(from_folder, gpt2_files_here)
    try:
        with pytest.raises(FileNotFoundError, match="Permission denied") as error:
            bpe.gpt2()
    finally:
        cache.chmod(0o700)
    says_what_to_do(str(error.value), cache, "vocab.bpe")


def test_a_cache_in_the_way_of_a_file(server, cache):
    """What stands at the cache's place is no folder, or at a file's place a folder."""
    server.reply = REPLIES["broken"]
    cache.write_text("")
    with pytest.raises(FileNotFoundError) as error:
        bpe.gpt2()
    says_what_to_do(str(error.value), cache, "vocab.bpe")
    cache.unlink()
    (cache / CACHED["vocab.bpe"]).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="directory") as error:
        bpe.gpt2()
    says_what_to_do(str(error.value), cache, "vocab.bpe")


@pytest.mark.parametrize("keys", [("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"), ("DATA_GYM_CACHE_DIR",), ()])
def test_the_cache_is_where_tiktoken_looks(server, cache, monkeypatch, tmp_path, keys):
    for key in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for key in keys:
        monkeypatch.setenv(key, str(tmp_path / key))
    server.reply = REPLIES["not found"]
    with pytest.raises(FileNotFoundError) as error:
        bpe.gpt2()
    says_what_to_do(str(error.value), tmp_path / (keys[0] if keys else "data-gym-cache"), "vocab.bpe")


def test_no_cache_at_all_is_refused(server, cache, monkeypatch):
    """tiktoken would download by itself, each time."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(ValueError, match=r"TIKTOKEN_CACHE_DIR is empty.*set it to a folder, or unset it"):
        bpe.gpt2()
    assert server.asked == []
