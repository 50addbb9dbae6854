"""Token files that may be larger than memory, as scripts/prepare_openwebtext.py and nanoGPT's scripts write them."""

import hashlib
import json
import os
import platform
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.data.documents import parts_of
from gptlab.data.files import data_folder, load_gpt2_tokenizer, token_files
from gptlab.data.prepare import prepare
from gptlab.data.windows import READ_WHOLE, WindowData
from gptlab.errors import MissingFileError, UserError
from gptlab.tokenizer import BPETokenizer, from_state, id_type


class TokenFile(np.memmap):
    """The ids in a file, mapped into memory: what is read of it is in the system's cache, not in the process."""

    def __reduce__(self) -> Any:
        """Worker processes get the file's name, not its contents."""
        whole = self.filename and self.ndim == 1 and self.nbytes == os.path.getsize(self.filename)
        return (TokenFile, (self.filename, self.dtype, "r")) if whole else super().__reduce__()


class MemmapData(WindowData):
    """Windows of the token files train.bin and val.bin in the folder `path`: raw little-endian ids.

    meta.json, which `gptlab.data.prepare` writes, describes them. Folders without one, such as nanoGPT's, hold GPT-2's
    ids in uint16, and need `tokenizer="gpt2"`.

    Raises:
        MissingFileError: no such files.
        UserError: files that are damaged, or contradict meta.json.
    """

    def __init__(self, *, path: str | None = None, tokenizer: str | None = None, **windows) -> None:
        super().__init__(**windows)
        self.path, self.kind = path, tokenizer

    def prepare_data(self) -> None:
        self.folder = token_files(self.path).resolve()
        self.resolved = {"path": str(self.folder)}

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "record"):
            return
        self.tokenizer, meta = read_meta(self.folder, self.kind)
        record = {"name": self.name}
        for split, key in (("train", "sha256"), ("val", "val_sha256")):
            ids = open_ids(self.folder / f"{split}.bin", self.tokenizer.vocab_size, meta.get(split))
            setattr(self, f"{split}_ids", ids)
            record[key] = check_sha256(ids, meta.get(split))
        self.check_lengths(f"data.path={self.folder}")
        self.record = record


def read_meta(folder: Path, kind: str | None) -> tuple[Any, dict[str, Any]]:
    """The tokenizer, and the entry of each split in meta.json; {} if there is no such file.

    Raises:
        UserError: a damaged file, one that contradicts data.tokenizer, or neither of them.
    """
    file = folder / "meta.json"
    if not file.exists():
        if kind is None:
            raise UserError(
                f"data.path={folder} has no meta.json; if its ids are GPT-2's, as nanoGPT's are, add data.tokenizer=gpt2"
            )
        return load_gpt2_tokenizer("train on another data set"), {}
    try:
        meta = json.loads(file.read_bytes())
        if meta["format"] != 1:
            raise ValueError(f"unknown format {meta['format']!r:.100}")
        tokenizer = from_state(meta["tokenizer"])
        if meta["dtype"] != id_type(tokenizer.vocab_size).name:
            raise ValueError(f"dtype {meta['dtype']!r} does not fit a vocabulary of {tokenizer.vocab_size} tokens")
        for split in ("train", "val"):
            tokens, sha256 = meta[split]["tokens"], meta[split]["sha256"]
            if type(tokens) is not int or type(sha256) is not str:
                raise ValueError(f"{split}: tokens={tokens!r}, sha256={sha256!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error!s:.200}); prepare the folder again"
        ) from None
    if kind == "gpt2" and tokenizer.vocab_size != 50257:
        raise UserError(
            f"data.tokenizer=gpt2, but {file} describes {tokenizer.vocab_size} tokens; leave data.tokenizer out"
        )
    return tokenizer, meta


def open_ids(file: Path, vocab_size: int, entry: dict[str, Any] | None) -> TokenFile:
    """Map a file into memory; `entry` is that of meta.json.

    Raises:
        UserError: an empty or incomplete file.
    """
    dtype, size = id_type(vocab_size).newbyteorder("<"), file.stat().st_size
    if size == 0:
        raise UserError(f"{file} is empty; prepare the folder again")
    if entry and size != entry["tokens"] * dtype.itemsize:
        raise UserError(
            f"{file} has {size:,} bytes, but meta.json says {entry['tokens']:,} tokens of {dtype.itemsize} bytes; prepare "
            "the folder again"
        )
    if size % dtype.itemsize:
        raise UserError(f"{file} has {size:,} bytes, not a multiple of {dtype.itemsize}, the bytes of an id")
    return TokenFile(file, dtype, "r")


def check_sha256(ids: TokenFile, entry: dict[str, Any] | None) -> str:
    """The SHA-256 of a file of up to 1 GiB, else of its size and its first GiB; `entry` is that of meta.json.

    Raises:
        UserError: meta.json says another one.
    """
    with open(ids.filename, "rb") as file:
        if ids.nbytes <= READ_WHOLE:
            sha256 = hashlib.file_digest(file, "sha256")
        else:
            sha256 = hashlib.sha256(str(ids.nbytes).encode())
            for _ in range(0, READ_WHOLE, 1 << 20):
                sha256.update(file.read(1 << 20))
    if entry and ids.nbytes <= READ_WHOLE and sha256.hexdigest() != entry["sha256"]:
        raise UserError(
            f"{ids.filename} has SHA-256 {sha256.hexdigest()}, but meta.json says {entry['sha256']}: it was changed; "
            "prepare the folder again"
        )
    return sha256.hexdigest()


class PythonStdlibData(MemmapData):
    """The source code of the running Python's standard library, a document per module, in `vocab_size` byte-level BPE
    tokens learned from it. Prepared once for each Python, in `folder`."""

    VAL_SHARE = 0.05

    def __init__(self, *, vocab_size: int, folder: str | None = None, **windows) -> None:
        super().__init__(**windows)
        self.vocab_size, self.cache = vocab_size, data_folder(folder)

    def prepare_data(self) -> None:
        files = stdlib_files()
        version, sizes = platform.python_version(), json.dumps([[str(file), file.stat().st_size] for file in files])
        contents = hashlib.sha256(sizes.encode()).hexdigest()[:8]
        folder = self.cache / f"python_stdlib_{version}_{contents}_bpe_{self.vocab_size}"
        if not (folder / "train.bin").exists():
            texts = (file.read_text("utf-8", errors="replace") for file in files)
            prepare(
                folder,
                parts_of(files),
                BPETokenizer.learn(texts, self.vocab_size),
                source={"python": version},
                val_share=self.VAL_SHARE,
                split_seed=2357,
                processes=1,  # it takes a few seconds
                wait=True,
            )
        self.path = str(folder)
        super().prepare_data()
        self.resolved = {"folder": str(self.cache.resolve())}


def stdlib_files() -> list[Path]:
    """The modules of the standard library, without its tests and installed packages.

    Raises:
        MissingFileError: a Python that was installed without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = sorted(file for file in root.rglob("*.py") if not others & set(file.relative_to(root).parts))
    if len(files) < 100:
        raise MissingFileError(
            f"{root} lacks the source of Python's standard library; use a text: data=text data.path=FILE"
        )
    return files
