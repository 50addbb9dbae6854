"""Tokens per second of scripts/prepare_openwebtext.py against nanoGPT's data/openwebtext/prepare.py, on the same documents.

    python scripts/benchmark_prepare.py PATH_OF_NANOGPT DOCUMENTS.jsonl [--rounds 3]

Whole processes, in turns, each with a process per core; the files they write are compared byte by byte. nanoGPT's script runs
as it is but for three places: the documents are read from the file, its 8 processes are as many as there are cores, and its
1,024 batches no more than there are documents. Also measured: tiktoken alone, on texts in memory, a process per core, which
is the ceiling. Memory is the proportional share (PSS) of all processes together at its highest (Linux).
"""

import argparse
import filecmp
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gptlab.data.documents import Part, read

SPLITS = ("train.bin", "val.bin")


def nanogpt(nano: Path, documents: Path, out: Path, cores: int) -> list[str]:
    """The command that runs nanoGPT's script."""
    source = (nano / "data/openwebtext/prepare.py").read_text("utf-8")
    changes = {
        'load_dataset("openwebtext", num_proc=num_proc_load_dataset)': f'load_dataset("json", data_files={str(documents)!r}, cache_dir={str(out)!r})',
        "num_proc = 8": f"num_proc = {cores}",
        "total_batches = 1024": "total_batches = min(1024, len(dset))",
    }
    for old, new in changes.items():
        if source.count(old) != 1:
            sys.exit(f"{nano} is another nanoGPT than this script knows: it lacks {old!r}")
        source = source.replace(old, new)
    (out / "prepare.py").write_text(source, "utf-8")
    return [sys.executable, str(out / "prepare.py")]


def gptlab(documents: Path, out: Path, cores: int) -> list[str]:
    script = Path(__file__).parent / "prepare_openwebtext.py"
    return [sys.executable, str(script), f"path={documents}", f"out={out}", f"processes={cores}"]


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds, and the most memory in bytes."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    started, most = time.perf_counter(), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
        while process.poll() is None:
            most = max(most, memory_of_session(process.pid))
            time.sleep(0.2)
        if process.returncode:
            said.seek(0)
            sys.exit(said.read().decode())
    return time.perf_counter() - started, most


def memory_of_session(session: int) -> int:
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session:
                total += next(
                    int(line.split()[1]) << 10
                    for line in (folder / "smaps_rollup").read_text().splitlines()
                    if line.startswith("Pss:")
                )
        except (OSError, StopIteration):
            continue
    return total


def raw_tiktoken(texts: list[str]) -> float:
    """Tokens per second of one process, with nothing but tiktoken."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    started = time.perf_counter()
    tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    return tokens / (time.perf_counter() - started)


def ceiling(documents: Path, cores: int) -> float:
    size = min(documents.stat().st_size // cores, 40_000_000)
    parts = [Part("jsonl", str(documents), i * size, (i + 1) * size, size) for i in range(cores)]
    shares = [[text for text in read(part, "text")] for part in parts]
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        return sum(pool.map(raw_tiktoken, shares, chunksize=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path)
    parser.add_argument("documents", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="for what is written (default: the temporary one)")
    arguments = parser.parse_args()
    documents, cores = arguments.documents.resolve(), len(os.sched_getaffinity(0))
    ratios, speeds = [], []
    for _ in range(arguments.rounds):
        top = ceiling(documents, cores)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            theirs, ours = Path(folder, "nanogpt"), Path(folder, "gptlab")
            theirs.mkdir()
            seconds, memory = timed(nanogpt(arguments.nanogpt, documents, theirs, cores))
            shutil.rmtree(theirs / "json", ignore_errors=True)
            our_seconds, our_memory = timed(gptlab(documents, ours, cores))
            meta = json.loads((ours / "meta.json").read_text("utf-8"))
            tokens = meta["train"]["tokens"] + meta["val"]["tokens"]
            same = all(filecmp.cmp(theirs / name, ours / name, shallow=False) for name in SPLITS)
        ratios.append(seconds / our_seconds)
        speeds.append(tokens / our_seconds / top)
        print(
            f"{tokens / 1e6:.1f} M tokens, {cores} cores: nanoGPT {tokens / seconds / 1e6:.2f} M tokens/s, {memory / 1e6:.0f} MB; "
            f"gptlab {tokens / our_seconds / 1e6:.2f} M tokens/s, {our_memory / 1e6:.0f} MB; ratio {ratios[-1]:.2f}; "
            f"tiktoken alone {top / 1e6:.2f} M tokens/s, of which {speeds[-1]:.0%}; files {'equal' if same else 'DIFFER'}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.2f}, median share of the ceiling {statistics.median(speeds):.0%}")


if __name__ == "__main__":
    main()
