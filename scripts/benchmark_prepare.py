"""The part `prepare` of benchmark.py: how fast documents become token files."""

import argparse
import contextlib
import filecmp
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmark_programs import Measurement, Plan, kill, start, tail

from gptlab.data.files import available_cores


def prepare(options: argparse.Namespace, folder: Path) -> Plan:
    """Tokens per second and peak memory of scripts/prepare_openwebtext.py against nanoGPT's prepare.py on the same
    documents, one process per core; both must write the same bytes. Beside them, tiktoken alone on documents in memory."""
    documents, cores = options.documents, available_cores()
    if documents is None:
        documents = folder / "documents.jsonl"
        write_documents(documents, options.megabytes * 1_000_000)
    documents = documents.resolve()
    script = Path(__file__).with_name("prepare_openwebtext.py")

    def measure(name: str, command: Callable[[Path], list[str]]) -> Measurement:
        out = folder / name

        def speed() -> dict[str, float]:
            shutil.rmtree(out, ignore_errors=True)
            seconds, memory = time_and_memory(command(out), folder / "output.txt")
            for other, split in itertools.product(folder.glob("*/train.bin"), ("train.bin", "val.bin")):
                if not filecmp.cmp(out / split, other.with_name(split), shallow=False):
                    sys.exit(f"{out / split} differs from {other.with_name(split)}")
            for cache in out.glob("json"):  # of `datasets`: a next run must not profit from it
                shutil.rmtree(cache)
            tokens = sum((out / split).stat().st_size // 2 for split in ("train.bin", "val.bin"))
            return {name: tokens / seconds, f"{name}, peak MB": memory / 1e6}

        return speed

    measurements = [
        measure("gptlab", lambda out: [sys.executable, str(script), f"path={documents}", f"out={out}", f"processes={cores}"]),
        measure("nanoGPT", lambda out: nanogpt_prepare(options.peer, documents, out, cores)),
        lambda: {"tiktoken alone": tiktoken_speed(documents, cores)},
    ]  # fmt: skip
    return Plan("tokens/s", measurements, [("gptlab", "nanoGPT"), ("gptlab", "tiktoken alone")])


def nanogpt_prepare(peer: Path, documents: Path, out: Path, cores: int) -> list[str]:
    """The command that runs nanoGPT's script as it is but for three places: it reads the documents from the file, its 8
    processes become one per core, and its 1,024 batches no more than there are documents."""
    source = (peer / "data/openwebtext/prepare.py").read_text("utf-8")
    changes = {
        'load_dataset("openwebtext", num_proc=num_proc_load_dataset)': f'load_dataset("json", data_files={str(documents)!r}, cache_dir={str(out)!r})',
        "num_proc = 8": f"num_proc = {cores}",
        "total_batches = 1024": "total_batches = min(1024, len(dset))",
    }
    for old, new in changes.items():
        if source.count(old) != 1:
            sys.exit(f"{peer}: unknown version of nanoGPT; its prepare.py lacks {old!r}")
        source = source.replace(old, new)
    out.mkdir()
    (out / "prepare.py").write_text(source, "utf-8")
    return [sys.executable, str(out / "prepare.py")]


def write_documents(path: Path, size: int) -> None:
    """About `size` bytes of JSON lines: the sources of Python's standard library, again and again."""
    library = Path(os.__file__).parent
    files = [file for file in sorted(library.rglob("*.py")) if "site-packages" not in file.parts]
    texts = [text for file in files if (text := file.read_text("utf-8", errors="replace"))]
    with open(path, "w", encoding="utf-8") as out:
        for text in itertools.cycle(texts):
            if out.tell() >= size:
                break
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def time_and_memory(command: list[str], output: Path) -> tuple[float, int]:
    """Seconds, and the most memory in bytes of all its processes together (PSS)."""
    began, most = time.perf_counter(), 0
    process = start(command, Path.cwd(), output, {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})
    try:
        while process.poll() is None:
            most = max(most, memory_of_session(process.pid))
            time.sleep(0.2)
    finally:
        kill(process)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nended with status {process.returncode}:\n{tail(output)}")
    return time.perf_counter() - began, most


def memory_of_session(session: int) -> int:
    """Proportional share of memory (PSS, Linux) of its processes, in bytes."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.getsid(int(folder.name)) == session:
                shares = re.findall(r"^Pss: +(\d+)", (folder / "smaps_rollup").read_text(), re.MULTILINE)
                total += 1024 * sum(map(int, shares))
    return total


def tiktoken_speed(documents: Path, cores: int) -> float:
    """The ceiling: up to 40 MB of documents per core in memory, encoded by tiktoken alone."""
    with open(documents, encoding="utf-8") as file:
        lines = file.readlines(40_000_000 * cores)
    shares = [[json.loads(line)["text"] for line in lines[i::cores]] for i in range(cores)]
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        return sum(pool.map(encode, shares, chunksize=1))


def encode(texts: list[str]) -> float:
    """Tokens per second of one process."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    began = time.perf_counter()
    tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    return tokens / (time.perf_counter() - began)
