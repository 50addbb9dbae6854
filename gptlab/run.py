"""The run folder: the only record of a run. Tables, samples and resumes are made from it.

outputs/NAME/DATE/
  config.yaml      the resolved config, which a resume starts from
  run.json         command, versions, git commit, machine, data; an entry for each resume
  metrics.jsonl    one line per log event
  checkpoints/     last, previous and best; step_00001000 and so on with trainer.keep_every
  summary.json     written last: a run that has one is finished
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from gptlab.errors import MissingFileError, UserError

LOCK = ".lock"
SAVED = ".saved"  # a mark: there has been a checkpoint
OURS = ("config.yaml", "run.json", "metrics.jsonl", "checkpoints", "summary.json")
WRITTEN_INTO = ("checkpoints", "train.log")  # the others are replaced as a whole

log = logging.getLogger(__name__)
_locks: dict[Path, IO[str]] = {}  # open until the process ends


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file that is either complete or absent, also after a crash or power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shell_path(path: Path) -> str:
    """The path as a user would type it in a shell here."""
    path = path.resolve()
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path))


def is_first_process() -> bool:
    """Whether this process writes to the run folder, among those that torchrun, srun or Lightning started for one run."""
    return all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


class Run:
    """A run folder, existing or to be made; `str(run)` is its path as a user would type it."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._is_new = False

    def __str__(self) -> str:
        return shell_path(self.folder)

    @classmethod
    def find(cls, name: str) -> "Run":
        """The run in the folder `name`, or the newest one here for `latest`.

        Raises:
            MissingFileError: there is none; the text lists the newest runs.
        """
        if name == "latest" and (newest := cls.newest(1)):
            return newest[0]
        folder = Path(os.path.expanduser(name))
        if name and os.path.isfile(folder / "config.yaml"):
            return cls(folder)
        exists = bool(name) and os.path.exists(folder)
        inside = (
            [parent for parent in folder.resolve().parents[:2] if (parent / "run.json").is_file()] if exists else []
        )
        if inside:
            raise MissingFileError(f"{name} is not a run folder, but lies in one: use {cls(inside[0])}")
        problem = "is not a run folder (no config.yaml)" if exists else "does not exist"
        newest_runs = ", ".join(map(str, cls.newest(3))) or "none under outputs/ and sweeps/"
        raise MissingFileError(f"run folder {name or repr(name)} {problem}; newest runs here: {newest_runs}")

    @classmethod
    def newest(cls, count: int) -> list["Run"]:
        """The newest runs under `outputs/` and `sweeps/` of the working directory, the newest first."""
        configs = [path for root in ("outputs", "sweeps") for path in Path(root).glob("**/config.yaml")]
        configs = [path for path in configs if path.with_name("run.json").is_file()]
        configs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        return [cls(path.parent) for path in configs[:count]]

    def claim(self, *, resuming: bool) -> None:
        """Reserve the folder for this process until it ends. Call it before anything is written there.

        Raises:
            UserError: another process has the folder, it holds a run or files of a user's own, or it is read-only.
        """
        try:
            if not resuming:
                self._check_unused()  # before the lock, so that nothing is left in somebody's folder
                self._is_new = not self.folder.exists()
            self._lock()
            if not resuming:
                self._check_unused()
            for path in (self.folder, *(self.folder / name for name in WRITTEN_INTO)):
                if path.exists() and not os.access(path, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        except OSError as error:
            fix = "resume a copy of the run" if resuming else "set hydra.run.dir=FOLDER"
            raise UserError(f"cannot write to {error.filename or self.folder} ({error.strerror}); {fix}") from None

    def _check_unused(self) -> None:
        if existing := [name for name in OURS if (self.folder / name).exists()]:
            raise UserError(
                f"{self} already holds a run ({', '.join(existing)}); continue it with resume={self}, or choose another "
                "hydra.run.dir (hydra.sweep.dir with -m)"
            )

    def _lock(self) -> None:
        """The kernel releases the lock when the process ends, however it ends. (A lock of this kind is not inherited by
        workers, which can outlive a killed process by seconds.)"""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  (closing it would release the lock)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "just started"
            raise UserError(
                f"{self} is in use by another process ({owner}); wait for it, or end it (kill lets it save first)"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"the file system of {self} has no locks: make sure that no other process writes there")
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        _locks[self.folder.resolve()] = file

    def release(self) -> None:
        """Undo `claim` before the process ends."""
        _locks.pop(self.folder.resolve()).close()

    def discard(self) -> None:
        """Remove the folder if `claim` made it and nothing was recorded: the run was refused or stopped before it began."""
        if not self._is_new or (self.folder / "config.yaml").exists():
            return
        for name in (LOCK, ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "train.log"):
            (self.folder / name).unlink(missing_ok=True)
        for folder in (self.folder / ".hydra", self.folder, self.folder.parent):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()

    def checkpoints(self) -> list[Path]:
        """The checkpoints that a resume can start from, in the order in which it tries them."""
        paths = (self.folder / f"checkpoints/{name}.ckpt" for name in ("last", "previous", "best"))
        return [path for path in paths if path.is_file()]

    def read_config(self) -> dict[str, Any]:
        """config.yaml as plain values. Anyone may have written it, so that `trust` is not taken from it.

        Raises:
            UserError: it is damaged.
        """
        import yaml

        path = self.folder / "config.yaml"
        try:
            config = yaml.safe_load(path.read_text("utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror})") from None
        except (yaml.YAMLError, ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise UserError(f"{path} is damaged; restore it (a checkpoint holds the same under 'config')")
        config.pop("trust", None)
        return config

    def write_record(
        self, config: dict[str, Any], *, data: dict[str, str], tokenizer: dict, device: str, resumed_at: int | None
    ) -> None:
        """Write config.yaml and run.json, and remove the summary: the run is not finished any more.

        Args:
            config: all of it, resolved to plain values.
            data: its name and checksums.
            tokenizer: its state.
            resumed_at: the step, which adds an entry to what run.json says of the start; None for a new run.
        """
        import yaml

        now = {
            "command": [Path(sys.executable).name, *sys.orig_argv[1:]],
            "versions": _versions(),
            "git": _git(),
            "device": device,
        }
        about = self._read_json("run.json") if resumed_at is not None else None
        if about is None:
            vocabulary = hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode()).hexdigest()
            machine = {key: config["trainer"][key] for key in ("accelerator", "devices", "precision")}
            about = {**now, "machine": machine, "data": data, "vocabulary_sha256": vocabulary, "tags": config["tags"]}
        if resumed_at is not None:
            about.setdefault("resumed", []).append({"step": resumed_at, **now})
        (self.folder / "summary.json").unlink(missing_ok=True)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        write_atomic(self.folder / "config.yaml", text.encode("utf-8"))
        write_json(self.folder / "run.json", about)

    def read_summary(self) -> dict[str, Any] | None:
        """None if the run is not finished."""
        return self._read_json("summary.json")

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.folder / "summary.json", summary)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        """None if the file is missing or damaged: these files are rewritten."""
        try:
            value = json.loads((self.folder / name).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None


def find_checkpoint(path: str) -> Path:
    """The checkpoint file `path`, or the best one of the run folder `path` (`latest`: the newest run).

    Raises:
        MissingFileError: there is none.
    """
    if os.path.isfile(file := os.path.expanduser(path)):
        return Path(file)
    run = Run.find(path)
    if not (checkpoints := run.checkpoints()):
        raise MissingFileError(f"{run} has no checkpoint: the run saved nothing yet")
    return next((file for file in checkpoints if file.name == "best.ckpt"), checkpoints[0])


class Metrics:
    """metrics.jsonl: a first line that says which data it is about, then `{"step": s, name: value, ...}` per log event.
    Values that are not finite are written as null.

    A run that starts at `start_step` drops the lines that it will write again: those of later steps, and with
    `validation_due` those of that step's validation.

    Attributes:
        kept: what earlier processes logged and this one will not log again.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path, data: dict[str, str], start_step: int = 0, validation_due: bool = False) -> None:
        self.path = path
        self._header, self._start_step, self._validation_due = {"step": 0, "data": data}, start_step, validation_due
        self._file: IO[str] | None = None
        self.kept = [entry for entry in self._read() if not self._comes_again(entry)]

    def _read(self) -> list[dict[str, Any]]:
        if self._start_step == 0:
            return []
        if not self.path.exists():
            log.warning("%s is missing: it restarts after step %d", self.path, self._start_step)
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)[1:]
        try:
            return [json.loads(line) for line in lines if line.endswith(b"\n")]  # a kill may have cut the last one
        except ValueError as error:
            raise UserError(
                f"{self.path} is damaged ({error}); repair it, or move it away to resume without it"
            ) from None

    def _comes_again(self, entry: dict[str, Any]) -> bool:
        step, validation = entry["step"], any(name.startswith("val/") for name in entry)
        return step > self._start_step or (step == self._start_step and validation and self._validation_due)

    def append(self, values: dict[str, float], step: int) -> None:
        if self._file is None:
            lines = [json.dumps(entry) + "\n" for entry in (self._header, *self.kept)]
            write_atomic(self.path, "".join(lines).encode("utf-8"))
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (stays open for the run)
        self._file.write(json.dumps({"step": step, **_finite(values)}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Bring all lines to the disk; before a checkpoint, which must never be ahead of the metrics."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def _versions() -> dict[str, str]:
    packages = ("gptlab", "torch", "lightning", "hydra-core", "omegaconf", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _git() -> dict[str, Any] | None:
    """Commit of the repository that gptlab lies in, else of the working directory's, and whether tracked files differ."""
    for folder in (Path(__file__).parent, Path.cwd()):
        try:
            commit, changes = (
                subprocess.run(("git", *arguments), cwd=folder, capture_output=True, text=True, check=True, timeout=10)
                for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
            )
            return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}
        except (OSError, subprocess.SubprocessError):
            continue
    return None
