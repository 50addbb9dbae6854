"""Runs of several processes: DDP, FSDP, torchrun, and processes that die. The reference is always a single process."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import DROPOUT, TINY, assert_same_end, metrics, same, weights
from test_own import FILES, OWN

from gptlab import checkpoint, processes, sources
from gptlab.processes import Processes, ProcessFailed
from gptlab.run import Run

HERE = str(Path(__file__).parent)  # where disturb.py is
# An odd batch and uneven micro-batches; the second process has more validation batches than the first.
UNEVEN = ["data.batch_size=7", "data.micro_batch_size=2", "data.val_windows=9", "trainer.log_every=1"]
CALM = [*TINY, *UNEVEN, "trainer.max_steps=12", "trainer.val_every=4"]
RUNS = {
    "one": ["trainer.devices=1"],
    "ddp": ["trainer.devices=2", "trainer.strategy=ddp"],
    "fsdp": ["trainer.devices=2", "trainer.strategy=fsdp"],
}


def send(at: int, signum: int, when: str = "after", rank: int = 1, **settings) -> list[str]:
    given = {"_target_": "disturb.Send", "at": at, "signum": int(signum), "when": when, "rank": rank, **settings}
    return [f"+callbacks.send.{key}={value}" for key, value in given.items()]


@pytest.fixture
def train(gptlab):
    return lambda *arguments, **rest: gptlab("train", *arguments, PYTHONPATH=HERE, **rest)


@pytest.fixture
def continue_run(train):
    return lambda *arguments, run="run", **rest: train(f"resume={run}", "trust=true", *arguments, **rest)


def assert_close(run: Path, whole: Path, rel: float = 1e-5) -> None:
    """The same metrics at the same steps, but for rounding."""
    ours, theirs = metrics(run), metrics(whole)
    assert len(ours) == len(theirs) > 5
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert a == {name: pytest.approx(value, rel=rel) for name, value in b.items()}


def leftovers(folder: Path) -> list[str]:
    """Processes whose working directory is this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder.resolve():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def test_ddp_computes_what_one_process_does(train, continue_run, tmp_path):
    """The same losses, norms and validations; gradients are added up once per step, though there are two micro-batches; and
    a run moves from one to two processes and back."""
    common = [*CALM, "trainer.max_steps=4", "trainer.val_every=2"]
    train(*common, "hydra.run.dir=one")
    said = train(*common, *RUNS["ddp"], "hydra.run.dir=two", "+callbacks.count._target_=disturb.CountSyncs").stdout
    assert (tmp_path / "syncs").read_text() == "4 8"
    assert said.count("step 4: validation loss") == said.count("run folder: two") - 1 == 1
    assert_close(tmp_path / "two", tmp_path / "one", rel=1e-4)
    continue_run("trainer.max_steps=6", *RUNS["one"], run="two")
    continue_run("trainer.max_steps=6", run="one")
    assert_close(tmp_path / "two", tmp_path / "one", rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_the_fast_recipe_on_two_processes(train, tmp_path, way):
    """n-gram tables, rotary positions, an untied head; Muon too where matrices are whole, and refused where they are not."""
    fast = [
        "model.position=rotary",
        "model.n_head=4",
        "model.ngrams=[2,3]",
        "model.tie_weights=false",
        "optim.embedding_lr=0.01",
        "optim.grad_clip=0",
    ]
    common = [*CALM, *fast, "trainer.max_steps=4", "trainer.val_every=2", "model.n_embd=32"]
    if way == "fsdp":
        refused = train(*common, *RUNS["fsdp"], "optim.muon_lr=0.02", "hydra.run.dir=no", status=2)
        assert "optim.muon_lr needs whole matrices" in refused.stderr
    muon = ["optim.muon_lr=0.02"] * (way == "ddp")
    train(*common, *muon, "hydra.run.dir=one")
    train(*common, *muon, *RUNS[way], "hydra.run.dir=two")
    assert_close(tmp_path / "two", tmp_path / "one", rel=1e-3)


@pytest.mark.slow
def test_fsdp_computes_what_one_process_does(train, continue_run, tmp_path):
    """To a last digit or two of float32, with fewer validation batches in one process and samples in one alone. Its
    checkpoint is one that a single process samples and resumes from; and a process that dies is named, at once."""
    train(*CALM, "hydra.run.dir=one")
    kill = send(7, signal.SIGKILL)
    done = train(*CALM, *RUNS["fsdp"], *kill, "hydra.run.dir=run", "trainer.checkpoint_every=3", status=1)
    assert (
        "\nERROR: process 1 was killed by SIGKILL\nat step 7; the last checkpoint is of step 6; to resume:"
        in done.stdout
    )
    assert done.stderr == "" and not leftovers(tmp_path)
    names = checkpoint.read(tmp_path / "run/checkpoints/last.ckpt")["state_dict"].keys()
    assert list(names) == list(weights(tmp_path / "one"))
    assert sources.load(str(tmp_path / "run/checkpoints/last.ckpt")).model
    continue_run(*RUNS["one"])
    assert_close(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("path", ["fsdp ddp one", "one fsdp ddp", "ddp one fsdp", "fsdp fsdp one"])
def test_a_run_moves_between_strategies(train, continue_run, tmp_path, path):
    """Adam's moments would be those of other parameters if their order were taken for that of another strategy."""
    train(*CALM, "hydra.run.dir=one", "trainer.checkpoint_every=100")
    first, second, third = path.split()
    train(*CALM, *RUNS[first], "hydra.run.dir=run", "trainer.max_steps=4")
    continue_run(*RUNS[second], "trainer.max_steps=8")
    continue_run(*RUNS[third], "trainer.max_steps=12")
    assert_close(tmp_path / "run", tmp_path / "one")
    ours, theirs = (torch.load(tmp_path / f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("run", "one"))
    moments = [[s["exp_avg"] for s in c["optimizer_states"][0]["state"].values()] for c in (ours, theirs)]
    if third != "fsdp":  # numbered otherwise there
        torch.testing.assert_close(moments[0], moments[1], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], atol=1e-5, rtol=1e-4)


LAYERS = """
from torch import nn

class Layers(nn.Module):
    def __init__(self, vocab_size, block_size, width):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width).requires_grad_(False)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids):
        x = self.embed(ids).cumsum(1)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["my_model.MyRNN", "layers.Layers"])
def test_fsdp_trains_custom_models(train, continue_run, gptlab, tmp_path, model):
    """One that holds its weights in a flat list as well, and one with a frozen part."""
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line[8:] for line in content.splitlines()) if name.endswith(".py") else content)
    (tmp_path / "layers.py").write_text(LAYERS)
    tiny = [s for s in CALM if not s.startswith(("model=", "data."))]
    own = [*OWN, *tiny, f"model._target_={model}"]
    train(*own, "hydra.run.dir=one")
    train(*own, *RUNS["fsdp"], "hydra.run.dir=run", "trainer.max_steps=8")
    gptlab("sample", "ckpt=run", "prompt=ab", "max_new_tokens=5", "trust=true")
    continue_run(*RUNS["one"], "trainer.max_steps=10")
    continue_run(*RUNS["fsdp"], "trainer.max_steps=12")
    ours, theirs = (
        {m["step"]: m["train/loss"] for m in metrics(tmp_path / run) if "train/loss" in m} for run in ("run", "one")
    )
    assert ours == {step: pytest.approx(loss, rel=1e-5) for step, loss in theirs.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "rel"),
    [
        (["trainer.precision=bf16"], 1e-3),
        (["trainer.linear=onednn"], 1e-5),
        (["model.activation_checkpointing=true"], 1e-5),
        (["data=addition", "callbacks=problems", "data.batch_size=7", "data.val_windows=9"], 1e-5),
        (["model.compile=true"], 1e-5),
    ],
)
def test_fsdp_with(train, tmp_path, settings, rel):
    """What else touches the forward pass; exact answers are measured in validations of different lengths."""
    calm = [setting for setting in CALM if "sample_text" not in setting]  # which problems do not have
    train(*calm, *settings, "hydra.run.dir=one")
    count = ["+callbacks.count._target_=disturb.CountSyncs"] if "compile" not in settings[0] else []
    train(*calm, *settings, *RUNS["fsdp"], *count, "hydra.run.dir=run")
    assert_close(tmp_path / "run", tmp_path / "one", rel)
    if count:  # once per step for each block, and for the rest
        n_layer = Run(tmp_path / "run").read_config()["model"]["n_layer"]
        assert (tmp_path / "syncs").read_text() == f"{12 * (n_layer + 1)} 24"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "step", "when", "rank"),
    [(signal.SIGTERM, 5, "in", 1), (signal.SIGTERM, 8, "validation", 0), (signal.SIGINT, 11, "in", 1)],
)
def test_a_stopped_fsdp_run_saves_and_resumes_exactly(train, continue_run, tmp_path, signum, step, when, rank):
    """To the bit, dropout on: also where it is saved in the middle of a validation, while all weights are gathered."""
    small = [*DROPOUT, *RUNS["fsdp"], "data.val_windows=20"]
    train(*small, "hydra.run.dir=whole")
    train(*small, *send(step, signum, when, rank, late=1.0), "hydra.run.dir=run", status=128 + signum)
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == step
    continue_run()
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_all_of_fsdps_processes_skip_a_step_that_is_not_finite_in_one(train, continue_run, tmp_path):
    poison = ["+callbacks.poison._target_=disturb.Poison", "+callbacks.poison.at=3", "+callbacks.poison.rank=1"]
    done = train(*CALM, *RUNS["fsdp"], *poison, "hydra.run.dir=run", status=1)
    assert "step 3: the loss is nan and the gradient norm nan" in done.stdout and done.stderr == ""
    done = continue_run("optim.skip_nonfinite=1", "trainer.max_steps=4")
    assert (done.stdout + done.stderr).count("the update was skipped") == 1
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "run").values())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_hundred_losses_are_those_of_one_process(train, tmp_path, strategy):
    common = [
        "hardware=cpu",
        "trainer.max_steps=100",
        "trainer.log_every=1",
        "trainer.val_every=50",
        "data.val_windows=40",
    ]
    train(*common, "hydra.run.dir=one")
    train(*common, *RUNS[strategy], "hydra.run.dir=two")
    one, two = (
        {m["step"]: m["train/loss"] for m in metrics(tmp_path / run) if "train/loss" in m} for run in ("one", "two")
    )
    assert len(one) == 100 and one == {step: pytest.approx(loss, abs=1e-4) for step, loss in two.items()}
    print(f"{strategy}: largest difference {max(abs(one[step] - two[step]) for step in one):.2g}")


# --- processes that die


def started(*scripts: str) -> list[subprocess.Popen]:
    return [subprocess.Popen(["sh", "-c", script]) for script in scripts]


@pytest.fixture
def watched(monkeypatch):
    """What was said and with which status the process would have ended; Processes, and a way to wait for its threads."""
    monkeypatch.setenv("NODE_RANK", "0")
    ended, over = [], threading.Event()
    monkeypatch.setattr(processes.os, "_exit", lambda status: (ended.append(status), over.set()))
    return ended, over, Processes(ended.append)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("kill -9 $$", "process 2 was killed by SIGKILL"),
        ("exit 3", "process 2 ended with status 3; see its error above"),
    ],
)
def test_a_process_that_dies_ends_the_run_within_a_second(watched, script, said):
    """Even if the first one hangs in a collective and never comes back; the others are killed, and do not count as dead."""
    ended, over, others = watched
    began, children = time.monotonic(), started("exec sleep 60", script, "exit 0")
    others._watch(children)
    assert over.wait(10) and ended == [said, 1]
    assert time.monotonic() - began < 3 and children[0].wait(5) == -signal.SIGKILL


def test_an_error_that_another_process_caused_names_it(watched, monkeypatch):
    """Not gloo's text. The watching thread leaves it to the main thread, which has come back."""
    ended, over, others = watched
    monkeypatch.delenv("GPTLAB_PARENT", raising=False)
    with pytest.raises(ProcessFailed, match="process 1 was killed by SIGTERM"), others.watching():
        others._watch(started("kill -15 $$"))
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [::1]:17: Connection reset by peer. GLHF!")
    assert not over.wait(0.7) and ended == []


def test_an_error_of_its_own_is_passed_on_and_ends_the_others(watched, monkeypatch):
    ended, over, others = watched
    monkeypatch.delenv("GPTLAB_PARENT", raising=False)
    children = started("exec sleep 60")
    with pytest.raises(RuntimeError, match="a fault"), others.watching():
        others._watch(children)
        raise RuntimeError("a fault")
    assert children[0].wait(5) == -signal.SIGKILL and not over.wait(0.7) and ended == []


def test_a_process_ends_with_its_parent():
    """Also if that was killed before the look began: then another process is the parent already."""
    look = "import time; from gptlab import processes; processes.end_with_parent(); time.sleep(60)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", look], env={**os.environ, "GPTLAB_PARENT": "1"}, timeout=30)
    assert done.returncode == 1 and time.monotonic() - began < 10


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_error_in_one_process_is_shown_once(train, continue_run, tmp_path, strategy):
    fail = ["+callbacks.fail._target_=disturb.Fail", "+callbacks.fail.rank=1"]
    done = train(*CALM, *RUNS[strategy], *fail, "hydra.run.dir=run", status=1)
    assert done.stderr.count("Traceback") == 1 and "a fault in a callback" in done.stderr
    assert "ERROR: process 1 ended with status 1; see its error above" in done.stdout and "Traceback" not in done.stdout
    continue_run()


@pytest.mark.slow
def test_an_error_in_all_processes_is_shown_once(train, tmp_path):
    done = train(*CALM, *RUNS["ddp"], "+callbacks.scarce._target_=disturb.Scarce", "+callbacks.scarce.room=1", status=2)
    assert done.stderr.count("error: out of memory") == 1 and not leftovers(tmp_path)


@pytest.mark.slow
def test_nothing_is_left_where_the_first_process_dies(train, continue_run, tmp_path):
    """While the second is in the middle of something that takes long."""
    train(*CALM, *RUNS["ddp"], *send(7, signal.SIGKILL, rank=0, late=30), "hydra.run.dir=run", status=-signal.SIGKILL)
    until = time.monotonic() + 3
    while leftovers(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert not leftovers(tmp_path)
    continue_run()


# --- torchrun


def torchrun(folder: Path, *arguments: str, node: int | None = None, port: int = 0) -> subprocess.Popen:
    nodes = (
        ["--standalone"]
        if node is None
        else [f"--node-rank={node}", "--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    )
    per_node = 2 if node is None else 1
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *nodes,
        f"--nproc-per-node={per_node}",
        "-m",
        "gptlab.train",
        *arguments,
    ]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")]),
        "GPTLAB_DATA": str(folder / "data"),
    }
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_torchrun_on_one_machine_and_on_two(train, tmp_path, strategy):
    """One folder, one log: only the first process of the first machine prints and writes, and the numbers are those of two
    processes that Lightning starts, to the bit."""
    train(*CALM, *RUNS[strategy], "hydra.run.dir=two")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    single = [torchrun(tmp_path, *CALM, *RUNS[strategy], "name=single")]
    single[0].wait(200)
    several = [*CALM, *RUNS[strategy], "trainer.devices=1", "trainer.num_nodes=2", "name=several"]
    jobs = {"single": single, "several": [torchrun(tmp_path, *several, node=n, port=port) for n in (0, 1)]}
    for name, launched in jobs.items():
        said = [job.communicate(timeout=200) for job in launched]
        assert [job.returncode for job in launched] == [0] * len(launched), said
        assert sum(out.count("step 12: validation loss") for out, _ in said) == 1
        (run,) = (tmp_path / "outputs" / name).iterdir()
        assert metrics(run)[1:] == metrics(tmp_path / "two")[1:]
        assert same(weights(run), weights(tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_of_torchruns_that_dies(continue_run, tmp_path, rank):
    """torchrun names it; the first process, which torchrun ends then, says how to resume, and nothing of gloo's."""
    job = torchrun(
        tmp_path,
        *CALM,
        *RUNS["ddp"],
        *send(7, signal.SIGKILL, rank=rank),
        "hydra.run.dir=run",
        "trainer.checkpoint_every=3",
    )
    said, errors = job.communicate(timeout=200)
    assert job.returncode == 1 and "gloo" not in errors + said and "Signal 9 (SIGKILL)" in errors
    if rank == 1:
        assert "ERROR: lost the connection to another process" in said and "resume=run" in said
    continue_run()
