"""The run folder: the only record of a run, and all that tables, samples and resumes are made from."""

import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

LOCK = ".lock"
SAVED = ".saved"  # a mark: there has been a checkpoint
_locks: list[IO[str]] = []  # open until the process ends


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is either there whole or not at all, also after a crash or power cut."""
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


def lock(run: Path) -> None:
    """Keep the run folder for this process, until it ends, however it ends: the kernel lets go of it. (A lock of this kind
    is not passed on to workers, which can outlive a killed process by seconds.)

    Raises:
        ValueError: another process has it.
        OSError: nothing can be written there.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  (closing it would let go)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(
            f"{run} is being written to by another process ({file.read().strip() or 'just started'}): wait for its end, "
            "or end it (with kill, it saves first)"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        print(f"the file system of {run} has no locks: see to it yourself that no other process writes there")
    file.truncate(0)
    file.write(f"{os.getpid()} on {platform.node()}")
    file.flush()
    _locks.append(file)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def find_run(run: str) -> Path:
    """The run folder of that name.

    Raises:
        FileNotFoundError: no folder there, or none of ours.
    """
    folder = Path(run).expanduser()
    if not (folder / "config.yaml").is_file():
        missing = "is not a run folder (it has no config.yaml)" if folder.exists() else "does not exist"
        if not run:
            missing = "names no run folder"
        inside = [parent for parent in folder.resolve().parents[:2] if (parent / "run.json").is_file()]
        if inside and run and folder.exists():
            raise FileNotFoundError(f"{run} {missing}, but lies in one: give {shown(inside[0])}")
        found = [path for folder in ("outputs", "sweeps") for path in Path(folder).glob("**/config.yaml")]
        found = [path for path in found if path.with_name("run.json").is_file()]
        near = [shown(path.parent) for path in sorted(found, key=lambda path: -path.stat().st_mtime)]
        raise FileNotFoundError(
            f"{run or repr(run)} {missing}; the newest runs here: {', '.join(near[:3]) or 'none under outputs/ and sweeps/'}"
        )
    return folder


def shown(path: Path) -> str:
    """The path as a user would type it here."""
    path = path.resolve()
    near = path.is_relative_to(Path.cwd())
    return shlex.quote(os.path.relpath(path) if near else str(path))


def find_checkpoint(path: str, order: tuple[str, ...]) -> Path:
    """A checkpoint file: the path itself, or the first of `order` (best, last, previous) in a run folder.

    Raises:
        FileNotFoundError: nothing there; the text lists what is.
    """
    at = Path(path).expanduser()
    if at.is_file():
        return at
    folder = find_run(path) / "checkpoints"
    for name in order:
        if (folder / f"{name}.ckpt").is_file():
            return folder / f"{name}.ckpt"
    raise FileNotFoundError(
        f"{folder} holds none of {', '.join(f'{name}.ckpt' for name in order)}: the run saved nothing yet"
    )


def checkpoints(run: Path) -> list[Path]:
    """What a resume can go on from, in the order in which it is tried."""
    paths = (run / f"checkpoints/{name}.ckpt" for name in ("last", "previous", "best"))
    return [path for path in paths if path.is_file()]


def without_paths(resolved: dict[str, Any]) -> dict[str, Any]:
    """The config for a checkpoint, which may travel: without the places of this machine's files."""
    data = {key: None if key in ("path", "val_path", "folder") else value for key, value in resolved["data"].items()}
    return {**resolved, "data": data}


def record(
    run: Path, resolved: dict[str, Any], data: dict[str, str], tokenizer: dict, device: str, resumed_at: int | None
) -> None:
    """Write config.yaml, which a resume starts from, and run.json, which says how the run came about.

    What run.json said of a run's start is kept when it is resumed; lost, it begins anew.
    """
    import yaml

    about = run / "run.json"
    this_time = {
        "command": [Path(sys.executable).name, *sys.orig_argv[1:]],
        "versions": _versions(),
        "git": _git(),
        "device": device,
    }
    try:
        description = json.loads(about.read_text("utf-8")) if resumed_at is not None else None
    except (OSError, ValueError):
        description = None
    if description is None:
        vocabulary = hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode()).hexdigest()
        machine = {key: resolved["trainer"][key] for key in ("accelerator", "precision", "devices")}
        description = {
            **this_time,
            "resolved": machine,
            "data": data,
            "vocabulary_sha256": vocabulary,
            "tags": resolved["tags"],
        }
    if resumed_at is not None:
        description.setdefault("resumed", []).append({"step": resumed_at, **this_time})
    (run / "summary.json").unlink(missing_ok=True)  # its presence means finished
    content = yaml.safe_dump(_literal(resolved), sort_keys=False, allow_unicode=True)
    write_atomic(run / "config.yaml", content.encode("utf-8"))
    write_json(about, description)


def _literal(value: Any) -> Any:
    """As OmegaConf must read it to get it back: a resume composes from config.yaml, and ${...} in a text is no
    interpolation of ours."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


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
