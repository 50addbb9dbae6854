"""Paths to texts, downloads that fail in every way, GPT-2's files, and the cores there are."""

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiktoken

from gptlab.data import files
from gptlab.data.files import TextFiles, available_cores, fetch, load_gpt2_tokenizer, make_absolute, text_files
from gptlab.errors import MissingFileError, UserError

TEXT = b"To be, or not to be: that is the question.\n" * 20
SHA256 = hashlib.sha256(TEXT).hexdigest()


def test_imports_neither_torch_nor_numpy():
    """Configs are checked before torch is imported, to fail within a second."""
    code = "import sys, gptlab.data.files; print({'torch', 'numpy', 'lightning'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# --- paths


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
def test_a_path_is_a_file_a_folder_or_a_glob(texts, path, names, monkeypatch):
    """Each file once, sorted, hidden ones left out unless named, and a file's own brackets are no glob. Made absolute,
    it is the same from another working directory: that is how a resume finds it."""
    wanted = [Path("texts", name) for name in names]
    assert text_files(path, "data.path") == wanted
    assert "".join(TextFiles(path, "data.path")) == "\n".join(file.read_text() for file in wanted)
    absolute = make_absolute(path)
    monkeypatch.chdir("/")
    assert [file.resolve() for file in text_files(absolute, "data.path")] == [texts.parent / file for file in wanted]


def test_globs_of_folders_that_look_like_globs(tmp_path, monkeypatch):
    """Made absolute without care, "run[1]/*.txt" would look into run1."""
    for folder in ("run1", "run[1]"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    monkeypatch.chdir(tmp_path / "run[1]")
    monkeypatch.setenv("HOME", str(tmp_path / "run1"))
    assert [file.read_text() for file in text_files(make_absolute("*.txt"), "data.path")] == ["run[1]"]
    assert text_files("~/*.txt", "data.path") == [tmp_path / "run1/a.txt"]
    assert make_absolute("~/a.txt") == str(tmp_path / "run1/a.txt")


def test_links_that_lead_back_add_nothing(texts):
    """A folder's walk would never end, or a glob read the same text forty times."""
    (texts / "a/back").symlink_to(texts)
    assert text_files("texts", "data.path") == [Path("texts/a/c.txt"), Path("texts/b.txt")]
    assert text_files("texts/**/*.txt", "data.path") == [Path("texts/a/c.txt"), Path("texts/b.txt")]


@pytest.mark.parametrize(
    ("path", "error", "reason"),
    [
        ("", UserError, "data.val_path is missing"),
        ("text", MissingFileError, "No such file"),
        ("texts/b.txt/x", MissingFileError, "No such file"),
        ("texts/*.rst", MissingFileError, "matches no file"),
        ("texts/dangling", MissingFileError, "No such file"),
        ("texts/empty", UserError, "is empty"),
        ("texts/empt*", UserError, "is empty"),
        ("texts/pipe", UserError, "not a regular file"),
        ("texts/p*", UserError, "texts/pipe is not a regular file"),
        ("/dev/zero", UserError, "not a regular file"),
        ("markdown", MissingFileError, "a folder of .txt files"),
        ("a\0b", MissingFileError, "No such file"),
        ("a" * 5000, MissingFileError, "No such file"),
        ("a/*" * 1000, MissingFileError, "too long"),
    ],
)
def test_paths_that_lead_to_no_text(texts, path, error, reason):
    """One error with the key, before anything is opened: a pipe would hang."""
    (texts / "empty").touch()
    (texts / "dangling").symlink_to("nowhere")
    os.mkfifo(texts / "pipe")
    (texts.parent / "markdown").mkdir()
    (texts.parent / "markdown/a.md").write_text("x")
    with pytest.raises(error, match=reason) as caught:
        text_files(path, "data.val_path")
    assert "data.val_path" in str(caught.value)


# --- texts in pieces

BAD_UTF8 = [b"\xff", b"\x80", b"\xc3", b"\xc3(", b"\xe2\x82", b"\xf0\x9f\x98x", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"]


@pytest.mark.parametrize("bad", BAD_UTF8)
@pytest.mark.parametrize(("mark", "end"), [(b"", b""), (b"\xef\xbb\xbf", b" more")])
def test_the_first_bad_byte_is_named_wherever_pieces_end(tmp_path, monkeypatch, bad, mark, end):
    """Pieces of 4 bytes cut characters everywhere; the place must be the one that decoding the whole names."""
    monkeypatch.setattr(files, "PIECE", 4)
    file = tmp_path / "my text.txt"
    for before in range(9):
        content = mark + "aé€🙂b".encode() + b"x" * before + bad + end
        with pytest.raises(UnicodeDecodeError) as expected:
            content.decode()
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"data.path: .*not UTF-8 text \(byte {expected.value.start}\).*iconv"):
            list(TextFiles(str(file), "data.path"))


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 1 << 18])
def test_a_byte_order_mark_is_no_text_at_the_start_of_a_file_alone(tmp_path, monkeypatch, piece):
    """Windows writes it; it would become a token. Elsewhere U+FEFF is a character."""
    monkeypatch.setattr(files, "PIECE", piece)
    contents = {
        "a.txt": b"\xef\xbb\xbfone\xef\xbb\xbf",
        "b.txt": b"\xef\xbb\xbf",
        "c.txt": b"\xef\xbb\xbf\xef\xbb\xbftwo",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert "".join(TextFiles(str(tmp_path), "data.path")) == "one\ufeff\n\n\ufefftwo"


# --- downloads


@pytest.fixture
def server():
    """A local web server; `reply(handler)` answers each request, `asked` lists the names that were asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path.removeprefix("/"))
            with contextlib.suppress(OSError):  # whoever asked has hung up
                self.server.reply(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url, server.asked, server.stopped = f"http://127.0.0.1:{server.server_port}/", [], threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()


def answer(handler, body: bytes, status: int = 200, length: int | None = None) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def trickle(handler) -> None:
    answer(handler, b"", length=1000)
    for _ in range(60):
        handler.wfile.write(b"x")
        if handler.server.stopped.wait(0.1):
            return


REPLIES = {
    "hangs": lambda handler: handler.server.stopped.wait(10),
    "trickles": trickle,
    "not found": functools.partial(answer, body=b"no such file", status=404),
    "another file": functools.partial(answer, body=b"x" * len(TEXT)),
    "cut off": functools.partial(answer, body=TEXT[:-1], length=len(TEXT)),
    "no HTTP": lambda handler: handler.wfile.write(b"\0\xff" * 100 + b"\r\n"),
    "hangs up": lambda handler: handler.connection.close(),
}


def test_a_download_is_kept_and_another_file_replaced_only_on_request(server, tmp_path):
    server.reply, file = functools.partial(answer, body=TEXT), tmp_path / "cache/a.txt"
    for _ in range(2):
        assert fetch(server.url, SHA256, file) == file and file.read_bytes() == TEXT
    assert len(server.asked) == 1 and os.listdir(file.parent) == ["a.txt"]
    file.write_bytes(TEXT[:-1])
    with pytest.raises(UserError, match="exists, but its SHA-256 is not"):
        fetch(server.url, SHA256, file)
    assert file.read_bytes() == TEXT[:-1]
    assert fetch(server.url, SHA256, file, replace=True).read_bytes() == TEXT and len(server.asked) == 2


@pytest.mark.parametrize("trouble", [*REPLIES, "no server", "no URL"])
def test_a_failed_download_ends_in_what_to_do(server, tmp_path, trouble, monkeypatch):
    """Within seconds, whatever the server does, and with nothing left behind."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(files, "TIMEOUT", 0.3)
    monkeypatch.setattr(files, "DEADLINE", 0.6)
    server.reply, file = REPLIES.get(trouble), tmp_path / "cache/a.txt"
    url = {"no server": "http://127.0.0.1:9/", "no URL": "nonsense"}.get(trouble, server.url)
    started = time.monotonic()
    with pytest.raises(MissingFileError) as error:
        fetch(url, SHA256, file)
    assert time.monotonic() - started < 4
    for needed in (url, SHA256, str(file), "put it there, or give your copy as data.path=FILE"):
        assert needed in str(error.value)
    assert not file.parent.exists() or os.listdir(file.parent) == []


# --- GPT-2's files, under the names by which tiktoken looks for them: SHA-1 of their addresses, in the order of the fetching

CACHED = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


@pytest.fixture
def cache(server, gpt2_files, tmp_path, monkeypatch):
    """An empty cache of tiktoken's, and OpenAI's server replaced by the local one, which has the real files. tiktoken
    forgets what it has read before, and its own download, which knows no timeout, is an error."""

    def not_tiktokens(url):
        raise AssertionError(f"tiktoken itself reads {url}")

    def local(url: str) -> bytes:
        return download(url.replace(files.GPT2_URL, server.url))

    download = files._download
    monkeypatch.setattr(files, "_download", local)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tiktoken.load.read_file", not_tiktokens)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    server.reply = lambda handler: answer(handler, Path(gpt2_files, CACHED[server.asked[-1]]).read_bytes())
    return tmp_path / "cache"


def test_fetched_once_and_read_from_the_cache(gpt2_files, server, cache):
    tokenizer = load_gpt2_tokenizer("")
    assert tokenizer.vocab_size == 50_257 and tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert server.asked == ["vocab.bpe", "encoder.json"]
    contents = {file.name: file.read_bytes() for file in cache.iterdir()}
    assert contents == {name: Path(gpt2_files, name).read_bytes() for name in CACHED.values()}
    tiktoken.registry.ENCODINGS.clear()
    assert load_gpt2_tokenizer("").tokens == tokenizer.tokens and len(server.asked) == 2


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content.replace(b"t h", b"h t", 1) + b"\n"])  # fmt: skip
def test_a_changed_file_is_fetched_again_or_refused(gpt2_files, server, cache, name, damage):
    """Also one that tiktoken could read: with merges in another order, ids would mean something else."""
    cache.mkdir()
    for file in CACHED.values():
        shutil.copyfile(Path(gpt2_files, file), cache / file)
    right = (cache / CACHED[name]).read_bytes()
    (cache / CACHED[name]).write_bytes(damage(right))
    reply, server.reply = server.reply, REPLIES["not found"]
    with pytest.raises(MissingFileError, match="HTTP Error 404") as error:
        load_gpt2_tokenizer("ask a friend")
    for needed in (files.GPT2_URL + name, str(cache / CACHED[name]), files.GPT2_FILES[name], "or ask a friend"):
        assert needed in str(error.value)
    server.reply = reply
    assert load_gpt2_tokenizer("").encode("Hello world").tolist() == [15496, 995]
    assert server.asked == [name, name] and (cache / CACHED[name]).read_bytes() == right


# --- cores


@pytest.mark.parametrize(
    ("cgroup", "limits", "cores"),
    [
        (None, {}, 8),
        ("0::/a/b\n", {"cpu.max": "max 100000\n", "a/b/cpu.max": "150000 100000\n"}, 2),
        ("0::/a/b\n", {"cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/../elsewhere\n", {"cpu.max": "10000 100000\n"}, 1),
        ("5:memory:/x\n0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "nonsense"}, 8),
    ],
)
def test_cores_are_limited_by_control_groups(cgroup, limits, cores, tmp_path, monkeypatch):
    """Of a machine with 8: the quota of the group itself, as of a batch job, or of the container."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, content in {f"sys/fs/cgroup/{name}": content for name, content in limits.items()}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    if cgroup is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
    assert available_cores(tmp_path) == cores
