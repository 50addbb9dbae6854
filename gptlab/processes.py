"""The processes of one run: if one dies, the run ends at once and says which; if the first dies, no other stays.

    first process --Lightning starts--> the others     a thread for each waits for its end
                  <--GPTLAB_PARENT-----                a thread in each looks for its parent

(torchrun's and SLURM's processes are watched by those.)
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

PARENT = "GPTLAB_PARENT"  # environment variable of the processes that Lightning starts
GRACE = 0.5  # seconds in which the first process may end by itself; in a collective of NCCL's it would hang
# What gloo, the store and NCCL say in the processes that remain.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote server shutdown",
        "ncclRemoteError")  # fmt: skip


class ProcessFailed(Exception):
    """Another process of the run has ended."""


class Processes:
    """Those that Lightning starts on this machine, watched in place of its own observer, which looks every 5 s and then kills
    all without a word."""

    def __init__(self, conclude: Callable[[str], None]) -> None:
        """`conclude` says why the run ended, if the main thread does not come back to say it."""
        self._conclude = conclude
        self._started: list[subprocess.Popen] = []
        self._failure, self._failed = "", threading.Event()
        self._concluded = threading.Lock()  # held for good by the thread that has the last word

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Raises ProcessFailed in place of the errors that the end of another process causes here."""
        from lightning.pytorch.strategies.launchers import subprocess_script

        subprocess_script._launch_process_observer = self._watch
        parent = os.environ.get(PARENT)
        os.environ[PARENT] = str(os.getpid())
        try:
            yield
        except Exception as error:
            if isinstance(error, RuntimeError) and any(text in str(error) for text in LOST):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, for those that remain: they end anyway
                if self._started:
                    self._failed.wait(1)
                raise ProcessFailed(self._failure or "lost the connection to another process; see its error") from None
            if parent:
                time.sleep(GRACE)  # where all fail alike, the first process speaks and kills the others
            self._kill()
            raise
        finally:
            self._concluded.acquire()
            os.environ.pop(PARENT)  # whatever this process starts from now on is not of the run
            if parent:
                os.environ[PARENT] = parent

    def _watch(self, started: list[subprocess.Popen]) -> None:
        self._started = started
        for rank, process in enumerate(started, 1 + int(os.environ["NODE_RANK"]) * (1 + len(started))):
            threading.Thread(target=self._wait_for, args=(rank, process), daemon=True).start()

    def _wait_for(self, rank: int, process: subprocess.Popen) -> None:
        status = process.wait()
        if status == 0 or self._failed.is_set():
            return
        killed = f"was killed by {signal.Signals(-status).name}" if status < 0 else ""
        self._failure = f"process {rank} " + (killed or f"ended with status {status}; see its error above")
        self._failed.set()
        self._kill()
        time.sleep(GRACE)
        if self._concluded.acquire(blocking=False):
            self._conclude(self._failure)
            os._exit(1)

    def _kill(self) -> None:
        for process in self._started:
            process.kill()


def end_with_parent() -> None:
    """In a process that Lightning started for a run: end when the first one has, whatever ended it."""
    parent = int(os.environ.get(PARENT, 0))

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(GRACE)
        os._exit(1)

    if parent:
        threading.Thread(target=look, daemon=True).start()
