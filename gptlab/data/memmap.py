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
from gptlab.data.windows import WindowData
from gptlab.errors import UserError
from gptlab.tokenizer import BPETokenizer, from_state, id_type

HASHED = 1 << 30  # bytes: larger files are not read from end to end before training


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
            ids, record[key] = read_ids(self.folder / f"{split}.bin", self.tokenizer.vocab_size, meta.get(split))
            setattr(self, f"{split}_ids", ids)
        self.check_lengths(f"data.path={self.folder}")
        self.record = record


def read_meta(folder: Path, kind: str | None) -> tuple[Any, dict[str, tuple[int, str]]]:
    """The tokenizer, and each split's number of tokens and SHA-256 as in meta.json; {} if there is no such file.

    Raises:
        UserError: a damaged file, one that contradicts data.tokenizer, or neither of them.
    """
    file = folder / "meta.json"
    if not file.exists():
        if kind is None:
            raise UserError(
                f"data.path={folder} has no meta.json; for GPT-2's ids, as nanoGPT writes them, add data.tokenizer=gpt2; for characters use their text: data=text data.path=FILE"
            )
        return load_gpt2_tokenizer("train on another data set"), {}
    try:
        meta = json.loads(file.read_bytes())
        tokenizer = from_state(meta["tokenizer"])
        dtype = id_type(tokenizer.vocab_size).name
        if (meta["format"], meta["dtype"]) != (1, dtype):
            raise ValueError(f"format must be 1, and dtype {dtype}")
        splits = {split: (int(meta[split]["tokens"]), str(meta[split]["sha256"])) for split in ("train", "val")}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error!s:.200}"
        raise UserError(f"{file} is damaged ({reason}); prepare the folder again") from None
    if kind == "gpt2" and tokenizer.vocab_size != 50257:
        raise UserError(f"{file} describes {tokenizer.vocab_size} tokens; leave data.tokenizer=gpt2 out")
    return tokenizer, splits


def read_ids(file: Path, vocab_size: int, described: tuple[int, str] | None) -> tuple[TokenFile, str]:
    """A file mapped into memory, and its SHA-256; of a file over 1 GiB, that of its size and its first GiB.

    Raises:
        UserError: an empty or incomplete file, or not the one that meta.json describes.
    """
    dtype, size = id_type(vocab_size).newbyteorder("<"), file.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise UserError(f"{file} has {size:,} bytes; it must have {dtype.itemsize} per id, and at least one id")
    ids = TokenFile(file, dtype, "r")
    whole = size <= HASHED
    sha256 = hashlib.sha256(b"" if whole else str(size).encode())
    sha256.update(ids[: HASHED // dtype.itemsize])
    if described and (len(ids) != described[0] or (whole and sha256.hexdigest() != described[1])):
        raise UserError(f"{file} is not the file that meta.json describes: it was changed; prepare the folder again")
    return ids, sha256.hexdigest()


class PythonStdlibData(MemmapData):
    """The source code of the running Python's standard library, a document per module, in `vocab_size` byte-level BPE
    tokens learned from it. Prepared once for each Python, in `folder`."""

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
            tokenizer = BPETokenizer.learn(texts, self.vocab_size)
            settings = {"val_share": 0.05, "split_seed": 2357, "processes": 1}  # it takes a few seconds
            prepare(folder, parts_of(files), tokenizer, source={"python": version}, wait=True, **settings)
        self.path = str(folder)
        super().prepare_data()
        self.resolved = {"folder": str(self.cache.resolve())}


def stdlib_files() -> list[Path]:
    """The modules of the standard library, without its tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return sorted(file for file in root.rglob("*.py") if not others & set(file.relative_to(root).parts))
