"""The run folder: the only record of a run. Tables, samples and resumes are made from it.

outputs/NAME/DATE/
  config.yaml      the resolved config, which a resume starts from
  run.json         command, versions, git commit, machine, data; an entry for each resume
  metrics.jsonl    one line per log event
  checkpoints/     last, previous and best; step_00001000 and so on with trainer.keep_every
  summary.json     written last: a run that has one is finished
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from gptlab.errors import MissingFileError, UserError

LOCK = ".lock"
ERROR = "error.txt"  # why a job of a sweep failed
SAVED = ".saved"  # a mark: there has been a checkpoint
OURS = ("config.yaml", "run.json", "metrics.jsonl", "checkpoints", "summary.json")

PACKAGES = ("gptlab", "torch", "lightning", "hydra-core", "omegaconf", "numpy")

_locks: list[IO[str]] = []  # open until the process ends


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


def is_first_process() -> bool:
    """Whether this process writes to the run folder, among those that torchrun, srun or Lightning started for one run."""
    return all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


class Run:
    """A run folder, existing or to be made; `str(run)` is its path as a user would type it."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._is_new = False

    def __str__(self) -> str:
        path = self.folder.resolve()
        return shlex.quote(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path))

    @classmethod
    def find(cls, name: str) -> "Run":
        """The run in the folder `name`; for `latest`, the newest one under outputs/ and sweeps/ of the working directory.
        Raises MissingFileError, which lists the newest runs."""
        folder = Path(os.path.expanduser(name))
        if name and os.path.isfile(folder / "config.yaml"):
            return cls(folder)
        newest = cls.newest()
        if name == "latest" and newest:
            return newest[0]
        if name == "latest":
            raise MissingFileError(f"latest: no runs under {Path.cwd()}/outputs and sweeps; run it where you trained")
        newest_runs = ", ".join(map(str, newest[:3])) or "none under outputs/ and sweeps/"
        raise MissingFileError(
            f"{name or repr(name)} is not a run folder (no config.yaml); newest runs here: {newest_runs}"
        )

    @classmethod
    def newest(cls) -> list["Run"]:
        """The runs under outputs/ and sweeps/ of the working directory, the newest first."""
        records = [path for root in ("outputs", "sweeps") for path in Path(root).glob("**/run.json")]
        return [cls(path.parent) for path in sorted(records, key=os.path.getmtime, reverse=True)]

    def claim(self, *, resuming: bool, trust: bool = False) -> None:
        """Reserve the folder for this process until it ends. Call it before anything is written there.

        Raises:
            UserError: the folder is locked, not empty, or read-only.
        """
        links = [path for path in self.folder.rglob("*") if path.is_symlink()]
        if links and not trust:
            raise UserError(
                f"{links[0]} is a symbolic link, which gptlab would write through; remove it, or add trust=true"
            )
        try:
            if not resuming:
                self._check_unused()  # before the lock, so that nothing is left in somebody's folder
                self._is_new = not self.folder.exists()
            self.lock()
            if not resuming:
                self._check_unused()  # again: another process may have been faster
        except OSError as error:
            fix = "resume a copy of the run" if resuming else "set hydra.run.dir=FOLDER"
            raise UserError(f"cannot write to {error.filename or self.folder} ({error.strerror}); {fix}") from None

    def _check_unused(self) -> None:
        if existing := [name for name in OURS if (self.folder / name).exists()]:
            raise UserError(
                f"{self} already holds a run ({', '.join(existing)}); continue it with resume={self}, or set another "
                "hydra.run.dir (hydra.sweep.dir with -m)"
            )

    def lock(self) -> None:
        """Reserve the folder. The kernel releases it when the process ends; workers, which can outlive a killed process, do
        not inherit it. Raises UserError if another process has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  (closing it would release the lock)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "just started"
            raise UserError(f"{self} is locked by process {owner}; wait, or `kill` it (it saves first)") from None
        except OSError:
            print(f"the file system of {self} has no locks: make sure that no other process writes there")
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        _locks.append(file)

    def is_locked(self) -> bool:
        """Whether another process writes there: a job of a sweep that was killed still saves."""
        with contextlib.suppress(OSError), open(self.folder / LOCK, "a", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def discard(self) -> None:
        """Remove the folder if `claim` made it and the run was refused or stopped before it began."""
        if self._is_new and not (self.folder / "config.yaml").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty
                self.folder.parent.rmdir()

    def checkpoints(self) -> list[Path]:
        """The checkpoints that a resume can start from, in the order in which it tries them."""
        paths = (self.folder / f"checkpoints/{name}.ckpt" for name in ("last", "previous", "best"))
        return [path for path in paths if path.is_file()]

    def read_config(self) -> dict[str, Any]:
        """config.yaml as plain values, without `trust`: anyone may have written it. Raises UserError if it is damaged."""
        import yaml

        from gptlab.config import with_added

        path = self.folder / "config.yaml"
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the other takes minutes for nested brackets
        try:
            text = path.read_text("utf-8")
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
                raise ValueError("it has aliases, which gptlab never writes")
            config = dict(yaml.load(text, loader))
        except (OSError, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"cannot read {path}; restore it (checkpoints hold it as 'config'): {error}") from None
        config.pop("trust", None)
        return with_added(config)

    def write_description(
        self, config: dict[str, Any], *, data: dict[str, str], tokenizer: dict, device: str, resumed_at: int | None
    ) -> None:
        """Write config.yaml and run.json, and remove the summary: the run is not finished any more. Arguments are plain
        values; `resumed_at` is None for a new run."""
        import yaml

        command = [Path(sys.executable).name, *sys.orig_argv[1:]]
        versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
        now = {"command": command, "versions": versions, "git": _git(), "device": device}
        vocabulary = hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode()).hexdigest()
        machine = {key: config["trainer"][key] for key in ("accelerator", "devices", "precision")}
        about = {**now, "machine": machine, "data": data, "vocabulary_sha256": vocabulary, "tags": config["tags"]}
        if resumed_at is not None:
            about = self._read_json("run.json") or about
            about.setdefault("resumed", []).append({"step": resumed_at, **now})
        (self.folder / "summary.json").unlink(missing_ok=True)
        unshared = json.loads(json.dumps(config))  # or YAML would write aliases, which `read_config` refuses
        text = yaml.safe_dump(unshared, sort_keys=False, allow_unicode=True)
        write_atomic(self.folder / "config.yaml", text.encode("utf-8"))
        write_json(self.folder / "run.json", about)

    def read_description(self) -> dict[str, Any] | None:
        """What run.json holds."""
        return self._read_json("run.json")

    def read_summary(self) -> dict[str, Any] | None:
        """None if the run is not finished."""
        summary = self._read_json("summary.json")
        return summary if summary and {"steps", "ended", "why", "best"} <= summary.keys() else None

    def state(self) -> str:
        """waiting, interrupted, failed, finished or pruned, as far as the folder tells."""
        if summary := self.read_summary():
            return "pruned" if summary["ended"] == "pruned" else "finished"
        if (self.folder / ERROR).is_file():
            return "failed"
        return "interrupted" if (self.folder / "config.yaml").exists() else "waiting"

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.folder / "summary.json", summary)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        """None if the file is missing or damaged: these files are rewritten."""
        try:
            value = json.loads((self.folder / name).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


def find_checkpoint(path: str) -> Path:
    """The checkpoint file `path`, or the best one of the run folder `path` (`latest`: the newest run that has one)."""
    if os.path.isfile(file := os.path.expanduser(path)):
        return Path(file)
    run = Run.find(path)
    if path == "latest":
        run = next((newest for newest in Run.newest() if newest.checkpoints()), run)
    if not (checkpoints := run.checkpoints()):
        raise MissingFileError(f"{run} has no checkpoint: the run saved nothing yet")
    return next((file for file in checkpoints if file.name == "best.ckpt"), checkpoints[0])


class Metrics:
    """metrics.jsonl: a first line that says which data it is about, then `{"step": s, name: value, ...}` per log event.
    Values that are not finite are written as null.

    A run that starts at `start_step` drops the lines that it will write again: those of later steps, and with
    `validation_due` those of that step's validation. `kept` are the others.
    """

    def __init__(self, path: Path, data: dict[str, str], start_step: int = 0, validation_due: bool = False) -> None:
        self.path, self._header = path, {"step": 0, "data": data}
        self._file: IO[str] | None = None

        def comes_again(entry: dict[str, Any]) -> bool:
            step, is_validation = entry["step"], any(name.startswith("val/") for name in entry)
            return step > start_step or (step == start_step and is_validation and validation_due)

        entries = read_metrics(path) if start_step > 0 and path.exists() else []
        self.kept = [entry for entry in entries if not comes_again(entry)]

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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The log events in metrics.jsonl, without a last line that a kill has cut; raises UserError if it is damaged."""
    lines = path.read_bytes().splitlines(keepends=True)[1:]
    try:
        entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
        if not all(isinstance(entry, dict) and isinstance(entry.get("step"), int) for entry in entries):
            raise ValueError("a line without a step")
        return entries
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); repair it, or move it away to resume without it") from None


def _git() -> dict[str, Any] | None:
    """Commit of the repository that gptlab lies in, else of the working directory's, and whether tracked files differ."""
    for folder in (Path(__file__).parent, Path.cwd()):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
            commit, _, dirty = done.stdout.strip().partition("-")
            return {"commit": commit, "dirty": bool(dirty)}
    return None
