"""The processes of a sweep, with small programs in the place of training runs."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from gptlab import jobs
from gptlab.errors import UserError
from gptlab.run import Run

FINISHED = """
import json
json.dump({"steps": 3, "ended": "max_steps", "why": None, "best": {}}, open("summary.json", "w"))
"""


def job(folder: Path, code: str) -> jobs.Process:
    start = f"import os, signal, sys, time; os.chdir({str(folder)!r})\n"
    return jobs.Process(folder, [sys.executable, "-c", start + textwrap.dedent(code)], f"seed={folder.name}")


def test_each_job_has_its_log_and_its_end(tmp_path, capfd):
    """A job that fails ends neither the others nor the sweep; its reason is in its folder, and gone when it is repeated."""
    code = {
        "0": FINISHED + "print('out'); print('err', file=sys.stderr)",
        "1": "print('error: optim.lr=0 is bad', file=sys.stderr); print('advice'); sys.exit(2)",
        "2": "os.kill(os.getpid(), signal.SIGKILL)",
        "3": "sys.exit(143)",
        "4": "raise KeyError('\\x1b[2J')",
        "5": "",  # status 0, and no run
    }
    running = []
    processes = [job(tmp_path / name, text) for name, text in code.items()]
    assert jobs.run(processes, n_jobs=2, on_change=running.append) is None
    errors = {name: path.read_text() for name in code if (path := tmp_path / name / "error.txt").exists()}
    assert errors == {
        "1": "optim.lr=0 is bad\n",
        "2": "killed by SIGKILL (out of memory?)\n",
        "4": "KeyError: '\\x1b[2J'\n",
        "5": "status 0\n",
    }
    assert (tmp_path / "0/job.log").read_text().split() in (["out", "err"], ["err", "out"])
    said = capfd.readouterr().out
    assert "job 0 (seed=0): finished at step 3" in said and "job 1 (seed=1): FAILED: optim.lr=0 is bad; see " in said
    assert "job 3 (seed=3): interrupted" in said and "out\n" not in said and "\x1b" not in said
    assert max(map(len, running)) == 2 and running[-1] == set()
    jobs.run([job(tmp_path / "1", FINISHED)], n_jobs=1)
    assert not (tmp_path / "1/error.txt").exists() and "advice" in (tmp_path / "1/job.log").read_text()


def test_the_reason_is_of_the_last_start(tmp_path):
    for code, reason in (("sys.exit('error: old')", "old\n"), ("print('new'); sys.exit(1)", "new\n")):
        jobs.run([job(tmp_path / "0", code)], n_jobs=1)
        assert (tmp_path / "0/error.txt").read_text() == reason


def test_the_reason_is_not_the_advice_that_follows_it():
    log = b"error: warmup\nTraceback (most recent call last):\n  File x\npkg.OwnError: no\n\nnothing was saved yet; to resume:\n  cmd"
    assert jobs._reason(log, 1) == "pkg.OwnError: no"


def test_a_resume_may_have_changed_the_number_of_steps(tmp_path):
    """config.yaml is the old one until the job has started; and one from elsewhere may hold anything."""
    process = jobs.Process(tmp_path, [], "job")
    for text, max_steps in (("trainer: {max_steps: 40}", 40), ("trainer: {max_steps: 60}", 60), ("trainer: 5", None)):
        (tmp_path / "config.yaml").write_text(text)
        process.look()
        assert process.max_steps == max_steps
    (tmp_path / "config.yaml").write_text("[")
    process.look()


def test_a_signal_ends_the_wait_for_a_locked_job(tmp_path):
    """Another process may hold its folder for hours."""
    Run(tmp_path / "0").lock()
    code = f"""
        from pathlib import Path
        from gptlab import jobs
        print("waiting", flush=True)
        print(jobs.run([jobs.Process(Path({str(tmp_path / "0")!r}), ["false"], "job 0")], n_jobs=1))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(0.3)
        process.terminate()
        assert process.communicate(timeout=10)[0] == f"{signal.SIGTERM}\n"
    assert not (tmp_path / "0/job.log").exists()


def test_a_log_that_is_a_link_is_not_followed(tmp_path):
    """Somebody else's sweep folder could let a resume write anywhere."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0/job.log").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"job\.log"):
        jobs.run([job(tmp_path / "0", "")], n_jobs=1)
    assert not (tmp_path / "precious").exists()


TRAPS = """
from gptlab import jobs
jobs.stop_with_sweep()
def save(signum, _):
    open("got", "a").write(f"{signum} ")
    time.sleep(0.3)
    open("saved", "w").close()
    sys.exit(128 + signum)
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, save)
open("ready", "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_parent_its_jobs_save(tmp_path, signum):
    """Each gets one signal, also where the parent cannot send it any more; no further job starts, and nothing is left."""
    if signum == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("elsewhere a job looks itself, every log interval")
    parent = f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from gptlab import jobs
        from test_jobs import TRAPS, job
        print("stopped by", jobs.run([job(Path(name), TRAPS) for name in "012"], n_jobs=2), flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(parent)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: all((tmp_path / name / "ready").exists() for name in "01"))
    process.send_signal(signum)
    said, _ = process.communicate(timeout=30)
    wait_for(lambda: all((tmp_path / name / "saved").exists() for name in "01"))
    sent = signal.SIGTERM if signum == signal.SIGKILL else signum
    assert all((tmp_path / name / "got").read_text() == f"{int(sent)} " for name in "01")
    assert not (tmp_path / "2").exists()
    assert signum == signal.SIGKILL or f"stopped by {int(signum)}" in said


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_job_whose_parent_is_gone_does_not_start(tmp_path):
    environment = {**os.environ, jobs.PARENT: "1"}
    code = "from gptlab import jobs; jobs.stop_with_sweep(); print('started')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 143 and done.stdout == ""


def test_a_job_waits_for_the_one_that_still_saves(tmp_path):
    """The parent was killed, and its job still writes when the resume begins: two writers would spoil the run."""
    holder = """
        import fcntl, time
        file = open("0/.lock", "w")
        fcntl.lockf(file, fcntl.LOCK_EX)
        print("locked", flush=True)
        time.sleep(1)
        open("0/released", "w").close()
    """
    (tmp_path / "0").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(holder)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    code = "sys.exit(None if os.path.exists('released') else 'too early')\n"
    jobs.run([job(tmp_path / "0", FINISHED + code)], n_jobs=1)
    process.communicate()
    assert not (tmp_path / "0/error.txt").exists()


@pytest.mark.parametrize(
    ("visible", "n_jobs", "shares"),
    [
        ("0,1,2,3", 2, ["0,2", "1,3"]),
        ("4,7", 3, ["4", "7", "4"]),
        ("5", 2, [None, None]),
        ("", 2, [None, None]),
    ],
)
def test_gpus_are_dealt_out(monkeypatch, visible, n_jobs, shares):
    """All jobs would share the first one otherwise, and the others idle."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [share.get("CUDA_VISIBLE_DEVICES") for share in jobs.gpu_shares(n_jobs)] == shares


def test_what_the_screen_says(tmp_path, capsys, monkeypatch):
    """Two jobs of ten seconds, of which one is halfway, and two more to come: 5 and 10 s left of them, and 10 s each."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    now = time.monotonic()
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now)
    live = [jobs.Process(tmp_path / str(i), [], f"seed={i}", started=now - 5, max_steps=100) for i in range(2)]
    for process in live:
        process.look = lambda: None
        process._first, process.step, process.losses = (0, now - 5), 50, {"train/loss": 1.5}
    screen = jobs.Screen(total=5, done=1)
    screen.refresh(live, n_jobs=2)
    assert capsys.readouterr().out == (
        "\x1b[Jjob 0: step 50 of 100, train/loss 1.5000, 0:00:05 left (seed=0)\n"
        "job 1: step 50 of 100, train/loss 1.5000, 0:00:05 left (seed=1)\n"
        "1 of 5 jobs done, 0:00:15 left\x1b[2F"
    )


@pytest.mark.parametrize(
    "content", [b"", b"not json\n\n", b'header\n{"step": 5, "val/loss": 2.0}\n{"step": 6', b"\xff\xfe\n[]\n\n"]
)
def test_a_look_at_metrics_that_are_being_written(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    process = jobs.Process(tmp_path, [], "job")
    process.look()
    assert process.losses in ({}, {"val/loss": 2.0})
