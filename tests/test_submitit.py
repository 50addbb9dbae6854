"""Sweeps on a cluster, with submitit's local executor in the place of SLURM."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, metrics

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs pip install 'gptlab[slurm]'")
pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "gptlab.train"]
LAUNCHER = ["-m", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep"]
# What SLURM says to a job of two tasks; none of it is about the runs that start there.
SLURM = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
         "SLURM_JOB_NAME": "sweep", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}  # fmt: skip


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with a text, and scontrol, which notes what it is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path / "data"))
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    Path("good.txt").write_text("The quick brown fox jumps over the lazy dog. " * 300)
    Path("bad.txt").write_bytes(b"caf\xe9" * 100)
    Path("bin").mkdir()
    Path("bin/scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/scontrol.txt\n")
    Path("bin/scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")


def test_jobs_are_those_of_one_machine(cluster):
    """Also with two processes each; one that fails does not end the sweep."""
    chosen = [*TINY, "data=text", "data.block_size=8", "trainer.devices=2"]
    done = subprocess.run(
        [*COMMAND, *LAUNCHER, *chosen, "data.path=good.txt,bad.txt"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr
    assert "bad.txt is not UTF-8 text" in Path("sweep/1/error.txt").read_text()
    assert "1 finished, 1 failed" in done.stdout and "resume=sweep" in done.stdout
    alone = subprocess.run([*COMMAND, *chosen, "data.path=good.txt", "hydra.run.dir=alone"], env=without_ranks())
    assert alone.returncode == 0 and metrics(Path("sweep/0")) == metrics(Path("alone"))


def without_ranks() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in SLURM}


def test_a_cluster_ends_jobs(cluster):
    """One is killed, one warned, the parent stopped: the runs save, the warned one asks for another start, and the resume
    of the sweep continues both, exactly."""
    chosen = [*TINY, "data=text", "data.block_size=8", "data.path=good.txt", "model.n_layer=1", "trainer.max_steps=800",
              "trainer.val_every=400", "optim.decay_steps=800"]  # fmt: skip
    sweep = subprocess.Popen([*COMMAND, *LAUNCHER, *chosen, "seed=1,2"], stdout=subprocess.PIPE, text=True)
    logs = [Path(f"sweep/{job}/metrics.jsonl") for job in "01"]
    wait_for(lambda: all(log.exists() and len(log.read_text().splitlines()) > 30 for log in logs))
    killed, warned = sorted(int(folder.name) for folder in Path("sweep/.submitit").iterdir() if folder.name.isdigit())
    tasks = [child_of(executor) for executor in (killed, warned)]
    os.kill(tasks[0], signal.SIGKILL)
    os.kill(tasks[1], signal.SIGUSR1)
    said, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 1 and "2 interrupted" in said and "resume=sweep" in said
    assert Path("scontrol.txt").read_text() == "requeue 77\n"

    resume = [*COMMAND, "resume=sweep"]
    sweep = subprocess.Popen(resume, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: all("resumed" in log.with_name("run.json").read_text() for log in logs))
    sweep.send_signal(signal.SIGTERM)
    said, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 143 and "resume=sweep" in said
    assert subprocess.run(resume, timeout=200).returncode == 0  # waits for those that still run
    assert all(len(json.loads(log.with_name("run.json").read_text())["resumed"]) == 1 for log in logs)
    alone = subprocess.run([*COMMAND, *chosen, "seed=2", "hydra.run.dir=alone"], env=without_ranks())
    assert alone.returncode == 0 and metrics(Path("sweep/1")) == metrics(Path("alone"))


def wait_for(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def child_of(executor: int) -> int:
    """The process of a job, which submitit's local executor has started."""
    return int(Path(f"/proc/{executor}/task/{executor}/children").read_text().split()[0])
