"""The processes of a sweep: started, shown, stopped.

Each is a session of its own, which gets a signal once, from here, and has time to save. This process waits in a plain
loop, without threads. Where it is killed, the kernel ends the jobs as SIGTERM would, and they save (`stop_with_sweep`).
"""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from gptlab import config
from gptlab.errors import UserError
from gptlab.run import ERROR, Run
from gptlab.terminal import printable

LOG = "job.log"  # in the folder of a job: all that it prints
PARENT = "GPTLAB_SWEEP_PROCESS"  # environment variable of a job
POLL, REFRESH, UPDATE = 0.05, 0.5, 60.0  # seconds
STOPS = (
    129,
    130,
    143,
    -signal.SIGHUP,
    -signal.SIGINT,
    -signal.SIGTERM,
    -signal.SIGUSR1,
)  # exit status of a job that was asked to end
# A job is no part of the distributed run, or of the SLURM step, that this process may belong to.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
         "PL_GLOBAL_SEED", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_NAME")  # fmt: skip


@dataclass(eq=False)
class Process:
    """A job's process, and how far its run is."""

    folder: Path
    command: list[str]
    values: str  # of the swept keys
    process: Any = None
    gpus: dict[str, str] = field(default_factory=dict)  # environment variables
    started: float = 0.0
    step: int = 0
    max_steps: int | None = None
    losses: dict[str, float] = field(default_factory=dict)
    _first: tuple[int, float] | None = None  # step and time of the first look
    _log_start: int = 0

    @property
    def label(self) -> str:
        return f"job {self.folder.name} ({self.values})"

    def start(self, environment: dict[str, str]) -> None:
        """Raises UserError if nothing can be written there."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ERROR).unlink(missing_ok=True)
            # A link in a folder from elsewhere is not followed.
            log = os.open(self.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise UserError(f"cannot write to {error.filename} ({error.strerror})") from None
        self._log_start = os.fstat(log).st_size
        with os.fdopen(log, "a") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            self.process = subprocess.Popen(self.command, env=environment, start_new_session=True, **streams)
        self.started = time.monotonic()

    def look(self) -> None:
        """Read step and loss from the run folder."""
        with contextlib.suppress(UserError):  # not started yet, or damaged, which the job will say
            steps = config.select(Run(self.folder).read_config(), "trainer.max_steps")
            self.max_steps = steps if isinstance(steps, int) else None  # a resume may have changed it
        for entry in _last_entries(self.folder / "metrics.jsonl"):
            self.step = entry["step"]
            self.losses |= {
                name: value for name, value in entry.items() if name.endswith("/loss") and isinstance(value, float)
            }
        if self._first is None and self.losses:
            self._first = (self.step, time.monotonic())

    def seconds_left(self) -> float | None:
        if self._first is None or self.max_steps is None or not self._first[0] < self.step <= self.max_steps:
            return None
        return (self.max_steps - self.step) * (time.monotonic() - self._first[1]) / (self.step - self._first[0])

    def describe(self) -> str:
        if not self.max_steps:
            return f"{self.label}: starting"
        losses = "".join(
            f", {name} {self.losses[name]:.4f}" for name in ("train/loss", "val/loss") if name in self.losses
        )
        left = self.seconds_left()
        end = "" if left is None else f", {_duration(left)} left"
        return f"job {self.folder.name}: step {self.step:,} of {self.max_steps:,}{losses}{end} ({self.values})"

    def conclude(self, status: int) -> str:
        """What became of it, in words; the reason of a failure is written to error.txt."""
        summary = Run(self.folder).read_summary()
        if status == 0 and summary:
            self.look()
            return f"{summary['ended'] if summary['ended'] != 'max_steps' else 'finished'} at step {summary['steps']:,}"
        if status in STOPS:
            return "interrupted"
        reason = _reason((self.folder / LOG).read_bytes()[self._log_start :], status)
        (self.folder / ERROR).write_text(reason + "\n", "utf-8")
        return f"FAILED: {reason}; see {Run(self.folder)}/{LOG}"


def run(
    jobs: Iterable[Process],
    n_jobs: int,
    *,
    total: int = 1,
    done: int = 0,
    on_change: Callable[[set[str]], None] = lambda running: None,
) -> int | None:
    """Run them all, `n_jobs` at a time; `done` of the `total` have ended before. The next one is asked for when it can
    start. `on_change` gets the folders of those that run now, also every minute.

    Returns:
        The signal that ended this early, or None.
    """
    environment = {key: value for key, value in os.environ.items() if key not in (*RANKS, "HYDRA_FULL_ERROR")}
    environment[PARENT] = str(os.getpid())
    waiting, live, screen, updated = iter(jobs), [], Screen(total, done), time.monotonic()
    shares = list(gpu_shares(n_jobs))
    with forwarding(live) as signals:
        while True:
            changed = False
            for job in [job for job in live if job.process.poll() is not None]:
                live.remove(job)
                shares.append(job.gpus)
                screen.ended(job, job.conclude(job.process.returncode))
                changed = True
            while len(live) < n_jobs and not signals and (job := next(waiting, None)):
                while Run(job.folder).is_locked() and not signals:
                    time.sleep(POLL)
                if signals:
                    break
                job.gpus = shares.pop(0)
                job.start(environment | job.gpus)
                live.append(job)
                if signals:  # while it started
                    job.process.send_signal(signals[-1])
                screen.started(job)
                changed = True
            if changed or time.monotonic() - updated > UPDATE:
                on_change({job.folder.name for job in live})
                updated = time.monotonic()
            if not live:
                break
            screen.refresh(live, n_jobs)
            time.sleep(POLL)
    return signals[-1] if signals else None


def gpu_shares(n_jobs: int) -> Iterator[dict[str, str]]:
    """Environment variables that deal out the NVIDIA GPUs among so many jobs at a time."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = sorted(Path("/proc/driver/nvidia/gpus").glob("*"))
    gpus = visible.split(",") if visible else [str(number) for number in range(len(found))]
    for slot in range(n_jobs):
        share = gpus[slot::n_jobs] or gpus[slot % len(gpus) :][:1] if gpus else []
        yield {"CUDA_VISIBLE_DEVICES": ",".join(share)} if len(gpus) > 1 else {}


@contextlib.contextmanager
def forwarding(live: list[Process]) -> Iterator[list[int]]:
    """While inside, signals go to the jobs; yields the list of those that came."""
    signals: list[int] = []

    def forward(signum: int, _: Any) -> None:
        signals.append(signum)
        if signum == signal.SIGHUP:  # the terminal is gone: what writes to it would fail
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if live and signals == [signum]:
            with contextlib.suppress(OSError):
                start = b"\r\x1b[J" if os.isatty(1) else b""  # over the echo of ^C and the lines of `Screen`
                os.write(1, start + b"stopping: the running jobs save first; Ctrl-C again stops at once\n")
        for job in live:
            job.process.send_signal(signum)

    handled = (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else []),
    )
    before = {signum: signal.signal(signum, forward) for signum in handled}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Screen:
    """A line per running job and one for the sweep, on a terminal updated in place; elsewhere a line when a job starts
    and one when it ends."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._in_place, self._height, self._next = sys.stdout.isatty(), 0, 0.0
        self._seconds: list[float] = []  # of the jobs that have ended

    def started(self, job: Process) -> None:
        if not self._in_place:
            self._print(f"{job.label}: started")

    def ended(self, job: Process, how: str) -> None:
        self.done += 1
        self._seconds.append(time.monotonic() - job.started)
        loss = f", val/loss {job.losses['val/loss']:.4f}" if "val/loss" in job.losses else ""
        self._print(f"{job.label}: {how}{loss}, {_duration(self._seconds[-1])}")

    def _print(self, text: str) -> None:
        self._write(("\x1b[J" if self._in_place else "") + printable(text) + "\n")  # over the lines of `refresh`

    def _write(self, text: str) -> None:
        try:
            print(text, end="", flush=True)
        except BrokenPipeError:  # `| head` has seen enough; the jobs have not
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def refresh(self, live: list[Process], n_jobs: int) -> None:
        if not self._in_place or time.monotonic() < self._next or not live:
            return
        self._next = time.monotonic() + REFRESH
        for job in live:
            job.look()
        left = self.seconds_left(live, max(0, self.total - self.done - len(live)), n_jobs)
        end = "" if left is None else f", {_duration(left)} left"
        columns, rows = shutil.get_terminal_size()
        lines = [*(job.describe() for job in live), f"{self.done} of {self.total} jobs done{end}"][1 - rows :]
        # The cursor returns to the first line, so that whatever is printed next takes its place.
        self._write("\x1b[J" + "\n".join(printable(line)[: columns - 1] for line in lines) + f"\x1b[{len(lines) - 1}F")

    def seconds_left(self, live: list[Process], waiting: int, n_jobs: int) -> float | None:
        """Of the whole sweep; None while there is nothing to judge by."""
        running = {job: left for job in live if (left := job.seconds_left()) is not None}
        totals = self._seconds + [left + time.monotonic() - job.started for job, left in running.items()]
        if not totals or len(running) < len(live):
            return None
        in_all = sum(running.values()) + waiting * sum(totals) / len(totals)
        return max(*running.values(), in_all / n_jobs)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _last_entries(path: Path) -> list[dict[str, Any]]:
    """The whole lines among the last 4 kB of metrics.jsonl."""
    with contextlib.suppress(OSError, ValueError):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().split(b"\n")[1:-1]
        entries = [entry for line in lines if isinstance(entry := json.loads(line), dict)]
        return [entry for entry in entries if isinstance(entry.get("step"), int)]
    return []


def _reason(log: bytes, status: int) -> str:
    """Why a job failed, in one line."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}" + (" (out of memory?)" if status == -signal.SIGKILL else "")
    lines = [line.strip() for line in log.decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(?i:error: )|[\w.]+(Error|Exception): ", line)]  # advice may follow
    return (errors or lines or [f"status {status}"])[-1].removeprefix("error: ").removeprefix("ERROR: ")[:500]


_parent: int | None = None


def stop_with_sweep() -> None:
    """In a job: when the process of the sweep dies, get SIGTERM, and save."""
    global _parent
    if (value := os.environ.pop(PARENT, None)) is None:
        return
    _parent = int(value)
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if sweep_is_gone():
        os._exit(128 + signal.SIGTERM)


def sweep_is_gone() -> bool:
    """Whether the process of the sweep has died; for systems whose kernel does not say so."""
    return _parent is not None and os.getppid() != _parent
