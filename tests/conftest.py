"""Shared by the tests: a run as a user starts it, and inputs that exist without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gptlab
from gptlab.data import documents, prepare
from gptlab.tokenizer import BPETokenizer

sys.path.append(str(Path(gptlab.__file__).parent / "plugins"))  # Hydra looks once in a process, maybe before cli.main
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests at a time: threads that wait for each other spin
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as cli.py sets it for users

# A model and a run so small that a whole process takes a few seconds; a schedule that does not depend on max_steps.
TINY = [
    "hardware=cpu",
    "trainer.precision=32",  # neither is measured, so that tests are the same on every CPU
    "trainer.linear=torch",
    "model=gpt-nano",
    "trainer.max_steps=4",
    "trainer.val_every=2",
    "trainer.log_every=1",
    "data.val_windows=20",
    "optim.warmup_steps=2",
    "optim.decay_steps=20",
    "callbacks.sample_text.max_new_tokens=20",
]

DROPOUT = [
    *TINY,
    "model.dropout=0.2",
    "data.micro_batch_size=5",
    "trainer.max_steps=11",
    "trainer.val_every=4",
    "trainer.log_every=3",
]


def weights(run: Path, name="last") -> dict:
    import torch

    return torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]


def same(a: dict, b: dict) -> bool:
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without those that only measure the machine's speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/tokens_per_s" not in line]


def pieces(tokenizer, prompt: list[int], new: list[int]) -> list[str]:
    """What sampling shows, one after the other, as the new ids arrive."""
    from gptlab.sample import TextStream

    stream = TextStream(tokenizer, prompt, None)
    return [piece for piece in [*(stream.add(i) for i in new), stream.finish()] if piece]


def assert_same_end(run: Path, whole: Path) -> None:
    """Weights, optimizer, metrics, best and summary bitwise the same, but for times and speed."""
    import torch

    for name in ("last", "best"):
        ours, theirs = (torch.load(at / f"checkpoints/{name}.ckpt", weights_only=True) for at in (run, whole))
        assert ours["global_step"] == theirs["global_step"]
        groups = [[optimizer.pop("param_groups") for optimizer in end["optimizer_states"]] for end in (ours, theirs)]
        assert groups[0] == groups[1]
        for key in ("state_dict", "optimizer_states", "watch", "best", "validated", "recent"):
            torch.testing.assert_close(ours[key], theirs[key], atol=0, rtol=0, equal_nan=True, msg=key)
    assert metrics(run) == metrics(whole)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, whole)]
    for summary in summaries:
        del summary["seconds"], summary["tokens_per_s"]
    assert summaries[0] == summaries[1]


@pytest.fixture(scope="session")
def warm():
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("warm.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield server
    server.stdin.close()
    server.wait()


def run_warm(warm, output: Path, entry: str, arguments: tuple[str, ...], cwd: Path, environment: dict[str, str]):
    """`python -m gptlab.<entry> arguments` in a fork of the server; the finished process. `output`: an empty folder."""
    request = {"module": f"gptlab.{entry}", "arguments": [*map(os.fsdecode, arguments)], "cwd": str(cwd),
               "environment": environment,
               "stdout": str(output / "stdout"), "stderr": str(output / "stderr")}  # fmt: skip
    warm.stdin.write(json.dumps(request) + "\n")
    warm.stdin.flush()
    returned = int(warm.stdout.readline())
    said, errors = ((output / name).read_text("utf-8", errors="replace") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(arguments, returned, said, errors)


@pytest.fixture(name="gptlab")
def _gptlab(warm, tmp_path, tmp_path_factory, monkeypatch):
    """Run `python -m gptlab.<entry> arguments` in an empty folder, as a user would; returns the finished process."""
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path / "data"))
    output = tmp_path_factory.mktemp("output")

    def run(entry: str, *arguments: str, status: int = 0, cwd: Path = tmp_path, **environment: str):
        if "PYTHONPATH" in environment and "PYTHONPATH" in os.environ:  # a copy that is under test stays it
            environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
        done = run_warm(warm, output, entry, arguments, cwd, os.environ | environment)
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


TEXT = "".join(f"{i} green bottles hanging on the wall, {i * i} of them.\n" for i in range(120))


@pytest.fixture(scope="session")
def bottles(warm, tmp_path_factory) -> Path:
    """A folder with a run (`run`) on the characters of `my.txt`, with averaged weights; tests change neither."""
    folder, output = (tmp_path_factory.mktemp(name) for name in ("bottles", "output"))
    (folder / "my.txt").write_text(TEXT)
    arguments = (*TINY, "data=text", "data.path=my.txt", "callbacks=[default,ema]", "hydra.run.dir=run")
    done = run_warm(warm, output, "train", arguments, folder, dict(os.environ))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def new_process(tmp_path, monkeypatch):
    """The same in a new process, as a user starts it: where what is said while importing counts, too."""
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path / "data"))

    def run(entry: str, *arguments: str):
        command = [sys.executable, "-m", f"gptlab.{entry}", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def shakespeare() -> str:
    """The real Tiny Shakespeare, which the tests do not download."""
    path = os.environ.get("GPTLAB_TEST_SHAKESPEARE", "")
    if not Path(path).is_file():
        pytest.skip("GPTLAB_TEST_SHAKESPEARE does not name a copy of Tiny Shakespeare")
    return path


def write_token_files(folder: Path) -> None:
    """What scripts/prepare_openwebtext.py makes of 200 small documents and a BPE of 300 tokens."""
    texts = folder.parent / "texts"
    texts.mkdir(parents=True)
    for i in range(200):
        (texts / f"{i:03}.txt").write_text(
            f"{i} green bottles, hanging on the wall of house number {i * i}.\n" * (1 + i % 7)
        )
    files = sorted(texts.iterdir())
    tokenizer = BPETokenizer.learn((file.read_text() for file in files), 300)
    parts = documents.parts_of(files)
    prepare.prepare(folder, parts, tokenizer, source={}, val_share=0.1, split_seed=1, processes=1)


@pytest.fixture
def gpt2_files() -> str:
    """GPT-2's vocabulary, which the tests do not download."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", "")
    if not (Path(folder) / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").is_file():
        pytest.skip("TIKTOKEN_CACHE_DIR does not name a folder with GPT-2's vocabulary")
    return folder
