"""What all entry points share: the command line before Hydra sees it, sweep jobs as processes, errors as text.

Exit status: 0 done, 1 failed, 2 a user's mistake, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import contextlib
import difflib
import functools
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from gptlab import config, mistakes
from gptlab import run as runs
from gptlab.errors import UserError
from gptlab.resume import check_changes
from gptlab.run import is_first_process
from gptlab.targets import require_trust

# Hydra's flags, those that take a value first.
VALUE_FLAGS = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
               "--experimental-rerun", "--info", "-i")  # fmt: skip
FLAGS = (*VALUE_FLAGS, "--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m",
         "--shell-completion", "-sc")  # fmt: skip
DATA_PATHS = ("data.path", "data.val_path", "data.folder")
# Free text, which Hydra's grammar would trip over: taken word for word, except in sweeps.
TEXT_KEYS = ("prompt", "prompt_file", "ckpt", *DATA_PATHS, "path", "out", "hub_split", "callbacks.sample_text.prompt")
LONGEST, DEEPEST = 2000, 50  # characters and brackets of an override that is no text

KNOWN = {schema._target_ for schema in config.SCHEMAS.values()} | {"gptlab.loggers.CSVTable"}

hardware_note = ""  # which hardware was chosen and why, for the log


def main(task: Callable[[Any], float | None], entry: str) -> None:
    """Compose the config `conf/<entry>.yaml` with the command line and hand it to `task`."""
    import hydra

    composing = True
    show_all = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # while composing: errors come here as they are, and Hydra prints none itself

    def as_it_was() -> None:
        os.environ.pop("HYDRA_FULL_ERROR", None) if show_all is None else os.environ.update(HYDRA_FULL_ERROR=show_all)

    @functools.wraps(task)
    def job(cfg: Any) -> float | None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        nonlocal composing
        as_it_was()
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return _sweep_job(entry, cfg)
        try:
            with _mistakes_as_text(show_all == "1", lambda: composing):
                cfg = config.typed(cfg, entry)
                composing = False
                return task(cfg)
        except SystemExit as stop:
            if stop.code in (2, 130):
                _remove_unused(Path(HydraConfig.get().runtime.output_dir))
            raise

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    logging.raiseExceptions = False  # `| head` closes the terminal's stream; the run and its train.log go on
    config.register()
    try:
        with _mistakes_as_text(show_all == "1", lambda: composing):
            sys.argv[1:] = _prepare(sys.argv[1:], entry)
            hydra.main(version_base="1.3", config_path=str(config.CONF), config_name=entry)(job)()
    finally:
        as_it_was()


@contextlib.contextmanager
def _mistakes_as_text(show_all: bool, composing: Callable[[], bool]) -> Iterator[None]:
    """Print a user's mistake as its text alone and exit with 2; `composing` says whether the task has yet to begin."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        text = None if show_all else mistakes.explain(error, composing())
        if text is None:
            raise
        print(f"\nerror: {text}", file=sys.stderr)
        sys.exit(2)


def _remove_unused(run: Path) -> None:
    """The folder that Hydra made, under the name that train.yaml gives it, for a run that was refused before it began."""
    made = {runs.LOCK, ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "train.log"}
    there = {str(path.relative_to(run)) for path in run.rglob("*") if not path.is_dir()}
    if re.fullmatch(r"[\d-]{10}_[\d-]{8}_\d{6}", run.name) and there == made and not (run / "train.log").stat().st_size:
        for name in made:
            (run / name).unlink()
        with contextlib.suppress(OSError):  # not empty, after all
            (run / ".hydra").rmdir()
            run.rmdir()
            run.parent.rmdir()  # if it was the first of its name


def _prepare(argv: list[str], entry: str) -> list[str]:
    """The command line as Hydra needs it: flags first, free text quoted, hardware chosen, a resume redirected."""
    global hardware_note
    flags, overrides = _split(argv)
    _check_overrides(overrides)
    overrides = [f"++{o}" if o.startswith("trainer.extra.") else o for o in overrides]  # Lightning's keys: no schema
    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    if given.get("hydra.job.name", "").startswith("train_ddp_process_"):  # Lightning started us with what it says below
        return [*flags, *overrides, "hydra/job_logging=none"]
    sweep = bool({"-m", "--multirun"} & set(flags))
    if not sweep:
        overrides = [
            f"{key}={_quote(text)}" if key in TEXT_KEYS else o for o in overrides for key, _, text in [o.partition("=")]
        ]
    if sweep and entry == "prepare":
        raise ValueError("data are prepared one folder at a time: leave -m out")
    if sweep and "hydra.run.dir" in given:
        raise ValueError(
            "hydra.run.dir is the folder of a single run; with -m, hydra.sweep.dir=FOLDER holds all of them"
        )
    if entry != "train":
        return flags + overrides
    if given.get("resume", "null") != "null":
        if bare := [o for o in overrides if "=" not in o and o[0] != "~"]:
            raise ValueError(
                f"{bare[0]}: settings are given as KEY=VALUE, and values with blanks in quotes: 'resume=outputs/my run'"
            )
        flags, overrides = _resume(given.pop("resume"), flags, given)
    else:
        if "hardware" not in given:
            overrides.append(f"hardware={_detect_hardware()}")
        else:
            hardware_note = f"hardware={given['hardware']}"
        if sweep:
            print(hardware_note)
        if not is_first_process():  # composed here, the folder's name would come from this process's own clock
            overrides += ["hydra.output_subdir=null", f"hydra.run.dir={_quote(tempfile.mkdtemp())}"]
    if not is_first_process():
        overrides.append("hydra/job_logging=none")  # the first process speaks for all
    return flags + overrides


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Flags (with their values) and overrides, in whatever order they were typed."""
    flags, overrides, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flag, _, value = argument.partition("=")
        if flag not in FLAGS:
            near = difflib.get_close_matches(flag, FLAGS, n=1, cutoff=0.8)
            instead = f"settings have no dashes: {flag.lstrip('-')}={value or 'VALUE'}"
            raise ValueError(f"unknown flag {flag}; " + (f"did you mean {near[0]}?" if near else instead))
        flags.append(argument)
        if argument in ("--info", "-i") and (not rest or "=" in rest[0]):
            flags.append("all")
        elif argument in VALUE_FLAGS and rest:
            flags.append(rest.pop(0))
        if flag in ("--cfg", "-c") and (value or flags[-1]) not in ("job", "hydra", "all"):
            raise ValueError(f"{flag} shows the config of: job, hydra or all")
    return flags, overrides


def _check_overrides(overrides: list[str]) -> None:
    """What Hydra would not name the key of, or stumble over while it writes the run folder.

    Raises:
        ValueError: bytes that are not UTF-8, a name that is no folder's, or a group that is given no option.
    """
    groups = [path.name for path in config.CONF.iterdir() if path.is_dir()]
    for override in overrides:
        key, _, value = override.partition("=")
        if not key.strip("+~"):
            raise ValueError(f"{override!r}: it names no key; settings are given as KEY=VALUE")
        if not override.isascii() and any("\ud800" <= char <= "\udfff" for char in override):
            raise ValueError(f"{override!a} is not valid text: it holds bytes that are not UTF-8, or half a character")
        if key.lstrip("+~") not in TEXT_KEYS:  # Hydra would end in Python's own limits, and name no key
            if len(override) > LONGEST:
                raise ValueError(f"{override[:60]}...: {len(override)} characters; at most {LONGEST} are allowed")
            if sum(map(value.count, "[{(")) > DEEPEST:
                raise ValueError(f"{override[:60]}...: more than {DEEPEST} brackets")
        if key in DATA_PATHS and "${" in value:  # Hydra resolves it when it builds the data set, however it is quoted
            raise ValueError(f"{override}: files with ${{ in their names are not taken: rename it")
        if key == "name" and (value.startswith("/") or {"", ".", ".."} & set(value.split("/"))):
            raise ValueError(f"{override}: it names the folder of the run under outputs/, and must lie in there")
        group = key.lstrip("~+")
        left_out = override == f"~{group}=null"  # as a sweep says it to its jobs
        if group in groups and value and not left_out and not _is_choice(override, group, value):
            leaves_out = f" (and '~{group}' leaves it out)" if group in ("callbacks", "logger") else ""
            raise ValueError(f"{override}: it must be one of {', '.join(mistakes.options(group))}{leaves_out}")


def _is_choice(override: str, group: str, value: str) -> bool:
    """Whether what a group is given can be the name of an option, a list of such names where the group takes several,
    or a sweep over names. (What cannot be read at all is for Hydra to say.)"""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob, QuotedString, Sweep
    from hydra.errors import HydraException

    try:
        choice = OverridesParser.create().parse_override(override)._value
    except HydraException:
        return True
    names = choice if isinstance(choice, list) and group in ("callbacks", "experiment", "debug") else [choice]
    return "${" not in value and all(isinstance(name, (str, QuotedString, Sweep, Glob)) for name in names)


def _quote(text: str) -> str:
    """As a quoted string of Hydra's grammar, word for word; null stays null."""
    if text == "null":
        return text
    escaped = re.sub(r"(\\*)('|\$\{|\Z)", lambda m: 2 * m[1] + ("\\" + m[2] if m[2] else ""), text)
    return f"'{escaped}'"


def _resume(run: str, flags: list[str], given: dict[str, str]) -> tuple[list[str], list[str]]:
    """Compose from the run folder's resolved config instead of conf/, into that folder."""
    if {"-m", "--multirun"} & set(flags):
        raise ValueError("resume goes on with one run; it cannot be combined with a sweep (-m)")
    trust = given.pop("trust", "false")
    check_changes(given)
    folder = runs.Run.find(run).folder.resolve()
    saved = runs.Run(folder).read_config()
    require_trust(run, saved, KNOWN, trust == "true")
    if "trainer.checkpoint_every" in given and (saved.get("callbacks") or {}).get("checkpointing"):  # a number by now
        given["callbacks.checkpointing.every"] = given["trainer.checkpoint_every"]
    flags = [*flags, "--config-path", str(folder), "--config-name", "config", "--config-dir", str(config.CONF)]
    overrides = [
        f"{'++' * key.startswith(('data.', 'callbacks.'))}{key}={_quote(value) if key in TEXT_KEYS else value}"
        for key, value in given.items()
    ]
    place = _quote(str(folder))
    return flags, [
        *overrides,
        f"trust={trust}",
        f"resume={place}",
        f"hydra.run.dir={place}",
        "hydra.output_subdir=null",
        "hydra/job_logging=gptlab",
        "hydra/callbacks=gptlab",
    ]


def _detect_hardware() -> str:
    """gpu or cpu. torch is imported only if something hints at an accelerator, so composing stays fast without."""
    global hardware_note
    driver = next((p for p in ("/proc/driver/nvidia", "/dev/kfd") if Path(p).exists()), None) or shutil.which(
        "nvidia-smi"
    )
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        driver = "Apple silicon"
    if driver is None:
        hardware, why = "cpu", "no accelerator found"
    else:
        import torch

        if torch.accelerator.is_available():
            hardware, why = "gpu", f"torch sees a {torch.accelerator.current_accelerator().type} device"
        else:
            hardware, why = "cpu", f"{driver} is here, but this build of torch sees no accelerator"
    other = "cpu" if hardware == "gpu" else "gpu"
    hardware_note = f"hardware={hardware}: {why} (hardware={other} forces the other)"
    return hardware


def _wait_for(process: subprocess.Popen) -> int:
    """The exit status of a job in a session of its own, which gets each signal once, from here: time to save, which
    Python's own way of waiting would not give it, and no second Ctrl-C that it would take for impatience."""
    forwarded = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    if threading.current_thread() is not threading.main_thread():
        return process.wait()
    before = {signum: signal.signal(signum, lambda number, _: process.send_signal(number)) for signum in forwarded}
    try:
        return process.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _sweep_job(entry: str, cfg: Any) -> float | None:
    """Run one job of a sweep in a process of its own, started as a user would start it; its metric is read from
    the run folder."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import CompactHydraException
    from omegaconf import OmegaConf

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    flags, _ = _split(sys.argv[1:])
    flags = [f for f in flags if f not in ("-m", "--multirun")]
    texts = {key: OmegaConf.select(cfg, key) for key in TEXT_KEYS}  # as plain text again: the job quotes it
    texts = {key: "null" if text is None else text for key, text in texts.items()}
    overrides = [
        f"{key}={texts[key]}" if (key := o.partition("=")[0]) in TEXT_KEYS else o for o in hydra_config.overrides.task
    ]
    command = [sys.executable, "-m", f"gptlab.{entry}", *flags, *overrides, f"hydra.run.dir={_quote(str(folder))}"]
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "PL_GLOBAL_SEED")
    environment = {key: value for key, value in os.environ.items() if key not in ranks}
    status = _wait_for(subprocess.Popen(command, env=environment, start_new_session=True))
    if status in (129, 130, 143, -signal.SIGHUP, -signal.SIGINT, -signal.SIGTERM):
        print(f"the sweep stops here: no job after {folder} was started", file=sys.stderr)
        sys.exit(status if status > 0 else 128 - status)
    if status != 0:
        raise CompactHydraException(f"the job in {folder} ended with status {status}; what it said is above")
    summary = folder / "summary.json"  # sampling leaves none
    return json.loads(summary.read_text("utf-8"))["best"].get("val/loss") if summary.exists() else None


class RunFolder(Callback):
    """Claims the run folder before Hydra writes anything into it."""

    def on_run_start(self, config: Any, **_: Any) -> None:
        if is_first_process():
            try:
                runs.Run(config.hydra.run.dir).claim(resuming=config.resume is not None)
            except UserError as error:
                print(f"\nerror: {error}", file=sys.stderr)  # an exception would become a warning of Hydra's
                sys.exit(2)
