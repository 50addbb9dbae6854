"""Token files that may be larger than memory, as scripts/prepare_openwebtext.py and nanoGPT's scripts write them."""

import hashlib
import json
import os
import platform
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.data import bpe
from gptlab.data.documents import parts_of
from gptlab.data.files import data_folder, token_files
from gptlab.data.prepare import prepare
from gptlab.data.windows import WindowData, spread
from gptlab.tokenizer import from_state, id_type

READ_WHOLE = 1 << 30  # bytes: larger files are not read from end to end before training
# How files begin that are no raw token ids.
FOREIGN = {b"PK": "a zip or PyTorch file", b"\x93NUMPY": "a NumPy file", b"\x1f\x8b": "compressed with gzip",
           b"PAR1": "a Parquet file", (20240520).to_bytes(4, "little"): "in the format of llm.c, with a header"}  # fmt: skip


class TokenFile(np.memmap):
    """The ids in a file, mapped into memory: what is read of it is in the system's cache, not in the process."""

    def __reduce__(self) -> Any:
        """A worker process opens the file: it is not to be sent to it."""
        whole = self.filename and self.ndim == 1 and self.nbytes == os.path.getsize(self.filename)
        return (TokenFile, (self.filename, self.dtype, "r")) if whole else super().__reduce__()


class MemmapData(WindowData):
    """Windows of the token files train.bin and val.bin in the folder `path`: raw little-endian ids.

    What they are is said in meta.json, which `gptlab.data.prepare` writes. Folders without, such as nanoGPT's, hold
    GPT-2's ids in uint16, and `tokenizer="gpt2"` must say so.

    Raises:
        FileNotFoundError: no such files.
        ValueError: files that are damaged, contradict meta.json, or hold something else.
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
        self.record = {"name": self.name}
        for split, name in (("train", "sha256"), ("val", "val_sha256")):
            ids = open_ids(self.folder / f"{split}.bin", self.tokenizer.vocab_size, meta.get(split))
            setattr(self, f"{split}_ids", ids)
            self.record[name] = check_sha256(ids, meta.get(split))
        self.check_lengths(f"data.path={self.folder}")


def read_meta(folder: Path, kind: str | None) -> tuple[Any, dict[str, Any]]:
    """The tokenizer, and what else meta.json says of each split: nothing, if there is none.

    Raises:
        ValueError: it is damaged, contradicts itself or data.tokenizer; or there is none, and no data.tokenizer either.
    """
    file = folder / "meta.json"
    if not file.exists():
        if kind is None:
            pickled = (folder / "meta.pkl").exists()
            hint = "it looks like nanoGPT's characters: train on the text itself, data=text data.path=input.txt" if pickled else (
                "if its ids are GPT-2's, as nanoGPT's are, add data.tokenizer=gpt2")  # fmt: skip
            raise ValueError(f"data.path={folder} has no meta.json that says what its ids stand for; {hint}")
        return bpe.gpt2(), {}
    try:
        meta = json.loads(file.read_bytes())
        if meta["format"] != 1:
            raise ValueError(f"format {meta['format']!r:.100} is not known here")
        tokenizer = from_state(meta["tokenizer"])
        vocab_size = tokenizer.vocab_size
        if meta["dtype"] != id_type(vocab_size).name:
            raise ValueError(f"dtype {meta['dtype']!r} is not that of a vocabulary of {vocab_size} tokens")
        for split in ("train", "val"):
            tokens, sha256 = meta[split]["tokens"], meta[split]["sha256"]
            if type(tokens) is not int or type(sha256) is not str:
                raise ValueError(f"{split}: tokens={tokens!r}, sha256={sha256!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error!s:.200}); prepare the folder anew"
        ) from None
    if kind == "gpt2" and vocab_size != 50257:
        raise ValueError(
            f"data.tokenizer=gpt2, but {file} says that it is one of {vocab_size} tokens: leave data.tokenizer out"
        )
    return tokenizer, meta


def open_ids(file: Path, vocab_size: int, said: dict[str, Any] | None) -> TokenFile:
    """The ids in a file, of the size that meta.json said.

    Raises:
        ValueError: it is empty, cut off, or something else.
    """
    dtype, size = id_type(vocab_size).newbyteorder("<"), file.stat().st_size
    if size == 0:
        raise ValueError(f"{file} is empty; prepare the folder anew")
    if said and size != said["tokens"] * dtype.itemsize:
        raise ValueError(
            f"{file} has {size:,} bytes, and meta.json says {said['tokens']:,} tokens of {dtype.itemsize} bytes: it is cut "
            "off or another file; prepare the folder anew"
        )
    with open(file, "rb") as opened:
        head = opened.read(4096)
    foreign = next((what for start, what in FOREIGN.items() if head.startswith(start)), None)
    if foreign is None and size >= 64 and min(head) >= 9:  # text has no such byte; the ids of any text have many
        foreign = "text"
    if foreign and not said:
        raise ValueError(f"{file} is {foreign}, not raw token ids: make it with scripts/prepare_openwebtext.py")
    if size % dtype.itemsize:
        raise ValueError(
            f"{file} has {size:,} bytes, no multiple of the {dtype.itemsize} of an id: it is cut off, or no token ids"
        )
    return TokenFile(file, dtype, "r")


def check_sha256(ids: TokenFile, said: dict[str, Any] | None) -> str:
    """The SHA-256 of a file of up to 1 GiB; of a larger one that of its size and 1,024 pieces of 1 MiB spread over it.

    Raises:
        ValueError: it is not what meta.json says.
    """
    sha256, piece = hashlib.sha256(), 1 << 20
    if ids.nbytes > READ_WHOLE:
        sha256.update(str(ids.nbytes).encode())
    with open(ids.filename, "rb") as file:
        for start in spread(ids.nbytes, piece, READ_WHOLE // piece):
            file.seek(start)
            sha256.update(file.read(piece))
    if said and ids.nbytes <= READ_WHOLE and sha256.hexdigest() != said["sha256"]:
        raise ValueError(
            f"{ids.filename} has SHA-256 {sha256.hexdigest()}, and meta.json says {said['sha256']}: it was changed; prepare "
            "the folder anew"
        )
    return sha256.hexdigest()


class PythonStdlibData(MemmapData):
    """The source code of the running Python's standard library, a document each module, in `vocab_size` byte-level BPE tokens
    learned from it. Prepared once for each Python, in `folder`."""

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
                bpe.learn(texts, self.vocab_size),
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
    """The modules of the standard library, but for its tests and what is installed beside it.

    Raises:
        FileNotFoundError: a Python that was installed without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = sorted(file for file in root.rglob("*.py") if not others & set(file.relative_to(root).parts))
    if len(files) < 100:
        raise FileNotFoundError(
            f"{root} does not hold the source of Python's standard library; train on a text of your own: data=text data.path=FILE"
        )
    return files
