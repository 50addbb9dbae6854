"""From the command line to a validated config, for every entry point.

    sys.argv -> prepare_overrides() -> Hydra composes -> Gatekeeper: load_config(), claim the run folder -> task(config)

In a sweep, Gatekeeper checks all jobs before the first starts, and each job is a process of its own, started as a user
would start it. Exit status: 0 done, 1 failed, 2 a user's mistake, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import atexit
import contextlib
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from gptlab import config, inherit, jobs, resume, targets
from gptlab.config import SWEEP_KEYS, did_you_mean
from gptlab.errors import JobError, UserError
from gptlab.run import Run, is_first_process
from gptlab.terminal import printable

DATA_PATHS = ("data.path", "data.val_path", "data.folder")
# Free text: taken word for word, except in sweeps, where Hydra's grammar rules.
TEXT_KEYS = ("prompt", "prompt_file", "stop", "ckpt", "init_from", "meta", "resume", *DATA_PATHS, "path", "out", "hub_split", "callbacks.sample_text.prompt")  # fmt: skip
FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"

_claimed: Run | None = None  # the run folder of this process
_config: Any = None  # and its config, from Gatekeeper to the task
_started: tuple[float, float, float] | None = None
notes: list[str] = []  # what was chosen for the user and why, for the log


def main(task: Callable[[Any], float | None], entry: str) -> None:
    """Compose `conf/<entry>.yaml` with the command line, check it, and hand the typed config to `task`."""
    prepare_process()
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from gptlab import sweep

    register_resolvers()
    sys.path.append(str(Path(__file__).parent / "plugins"))  # where Hydra looks for hydra_plugins
    composed = False

    def job(cfg: Any) -> float | None:
        nonlocal composed
        composed = True
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return sweep.run_job(entry, cfg)
        with errors_as_text():  # here, or Hydra would add a line of its own
            return task(_config)

    job.__module__ = "__main__"  # Hydra names the job after the module
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors arrive here as they are; Hydra prints none itself
    with errors_as_text(lambda: not composed):
        sys.argv[1:] = prepare_overrides(sys.argv[1:], entry)
        try:
            hydra.main(version_base="1.3", config_path=str(config.CONF), config_name=entry)(job)()
        finally:
            failed = sweep.conclude()
        if failed:
            sys.exit(1)


def prepare_process() -> None:
    """Make streams, arguments, threads and the end of a sweep's process behave, before torch is imported."""
    global _started
    jobs.stop_with_sweep()
    for descriptor in (0, 1, 2):  # daemons and cron may close them
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")  # a terminal may lack characters
    sys.argv[1:] = [os.fsencode(argument).decode("utf-8", "surrogateescape") for argument in sys.argv[1:]]
    # libgomp's threads spin while they wait, and two runs on the same cores starve each other. 1000 spins cost a lone run
    # about 3 % and make two at once 10 to 50 times as fast; the results are the same to the bit.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    with contextlib.suppress(OSError):
        _started = _cpu_seconds()


def _cpu_seconds() -> tuple[float, float, float]:
    """Clock, CPU time of all processes on the machine, and of this one, in seconds. Linux only."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, file.readline().split()[1:])
    ours = os.times()
    everyone = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), everyone, ours.user + ours.system


def busy_note(threads: int) -> str | None:
    """Says so if other processes have taken CPU cores since the start that `threads` of this one want."""
    if _started is None:
        return None
    seconds, everyone, ours = (now - then for now, then in zip(_cpu_seconds(), _started, strict=True))
    others = (everyone - ours) / max(seconds, 1e-3)
    if others < 0.3 or os.cpu_count() - others > threads - 0.3:
        return None
    return (
        f"other processes use {others:.1f} of {os.cpu_count()} cores; this run will be slower than on an idle machine"
    )


@contextlib.contextmanager
def errors_as_text(composing: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Print a `UserError` without traceback; exit status 2."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except JobError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        text = None if FULL_ERROR else error_text(error, composing())
        if _claimed:
            _claimed.discard()
        if text is None:
            raise
        print(f"\nerror: {printable(text)}", file=sys.stderr)
        sys.exit(2)


def error_text(error: BaseException, composing: bool = False) -> str | None:
    """Message for a user error; None for a bug. While composing, every error is the user's."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if ours := next((e for e in chain if isinstance(e, UserError)), None):
        return str(ours)
    match error:
        case MissingConfigException(missing_cfg_file=str(file)) if "/" in file:
            group, _, name = file.rpartition("/")
            options = error.options or sorted(path.stem for path in (config.CONF / group).glob("*.yaml"))
            if not options and (config.CONF / (nearest := Path(group).name)).is_dir():
                return f"{group}={name}: no such group; the defaults list of {Path(group).parent} says `override /{nearest}: {name}`"
            hint = did_you_mean(name, options)
            return f"{group}={name}: unknown option{hint}" + f" All: {', '.join(options)}" * hint.endswith("?")
        case OverrideParseException(override=given) if "=" in given:
            key, _, value = given.lstrip("+").partition("=")
            return f"{key}={value}: cannot be parsed; quote special characters for the shell and for Hydra: \"{key}='{value}'\""
        case OverrideParseException(override=given):
            options = [f"{path.parent.name}={given}" for path in sorted(config.CONF.glob(f"*/{given}.yaml"))]
            if given and Path(given).exists():
                options = [f"resume={given} (train)", f"ckpt={given} (sample, evaluate)"]
            meant = (
                f"; did you mean {' or '.join(options)}?" if options else "; quote values with spaces: 'KEY=two words'"
            )
            return f"{given}: settings are KEY=VALUE{meant}"
    for name, key in SWEEP_KEYS.items():
        if f"full_key: {key}\n" in f"{error.__cause__ or error}\n":
            return (
                f"{name}: this sweep has no such setting; n_jobs is for hydra/launcher=local, n_trials for sweep=optuna"
            )
    if composing or isinstance(error, HydraException | OmegaConfBaseException | YAMLError):
        texts = [str(e) for e in chain if str(e)] or [repr(error)]
        detail = next((str(e) for e in chain if isinstance(e, OmegaConfBaseException | YAMLError)), "")
        lines = (texts[0] if detail in texts[0] else f"{texts[0]}\n{detail}").split("\n")
        return "\n".join(lines[:4]).replace("++", "") + "\n(HYDRA_FULL_ERROR=1 shows where it comes from)"
    return None


def prepare_overrides(argv: list[str], entry: str) -> list[str]:
    """The command line as Hydra needs it: flags first, free text quoted, hardware chosen.

    Keys get `++`, so that Hydra accepts every key and `load_config` reports all that is wrong at once.
    """
    from hydra._internal.utils import get_args_parser

    from gptlab import sweep

    parser = get_args_parser()
    parser.error = _refuse_flags
    parsed = parser.parse_intermixed_args(argv)
    resumed_sweep = sweep.find(parsed.overrides) if entry == "train" else None
    is_job = "hydra.mode=RUN" in parsed.overrides  # of a sweep
    preset = any(o.startswith("sweep=") for o in parsed.overrides) and not (is_job or parsed.cfg or parsed.info)
    multirun = parsed.multirun or preset or resumed_sweep is not None
    groups = {path.name for folder in (config.CONF, Path(parsed.config_dir or config.CONF)) if folder.is_dir()
              for path in folder.iterdir() if path.is_dir()}  # fmt: skip
    given = [override for override in parsed.overrides if not (resumed_sweep and override.startswith("resume="))]
    overrides = [_prepare_override(override, groups, multirun) for override in given]
    if not multirun and (several := [o for o in overrides if is_sweep(o)]):
        raise UserError(f"{several[0].lstrip('+')}: several values are a sweep; add -m (a list is written [a,b])")
    if resumed_sweep:
        return sweep.replay(resumed_sweep, overrides)
    flags = ["-m"] * multirun + flags_of(argv)
    resuming = any(override.startswith("++resume=") for override in overrides)
    if multirun:
        sweep.check_flags(entry, overrides, resuming)
    is_ddp_child = any("train_ddp_process_" in override for override in overrides)  # Lightning names the folder itself
    if resuming and not is_ddp_child and any(override.startswith("hydra.run.dir=") for override in overrides):
        raise UserError("a resumed run stays in its folder; leave out hydra.run.dir")
    if not is_first_process():  # the first one writes and speaks for all
        if not (resuming or is_ddp_child):
            scratch = tempfile.mkdtemp()
            atexit.register(shutil.rmtree, scratch, ignore_errors=True)
            overrides.append(f"hydra.run.dir={quote(scratch)}")
        overrides += ["hydra.output_subdir=null", "hydra/job_logging=none"]
    if entry == "train" and not resuming:
        if not any(override.startswith("hardware=") for override in overrides):
            overrides.append(f"hardware={detect_hardware()}")
        if is_first_process():
            overrides += fallback_overrides(overrides, parsed.config_dir)
        if multirun and notes:
            print("\n".join(notes))
    return flags + overrides


def flags_of(argv: list[str]) -> list[str]:
    """The flags among the arguments, with their values, but for -m."""
    from hydra._internal.utils import get_args_parser

    overrides = get_args_parser().parse_intermixed_args(argv).overrides
    return [argument for argument in argv if argument not in ("-m", "--multirun", *overrides)]


def is_sweep(override: str) -> bool:
    """Whether it gives a key several values; what cannot be parsed is reported by Hydra."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    with contextlib.suppress(HydraException):
        return OverridesParser.create().parse_override(override).is_sweep_override()
    return False


def _refuse_flags(message: str) -> None:
    raise UserError(f"{message}; settings have no dashes: KEY=VALUE, not --KEY VALUE; --help lists them")


def _prepare_override(override: str, groups: set[str], multirun: bool) -> str:
    key, is_setting, value = override.partition("=")
    if key in SWEEP_KEYS:
        if not multirun:
            raise UserError(f"{override}: only a sweep has {key}; add -m")
        return f"{SWEEP_KEYS[key]}={value}"
    if key in ("callbacks", "logger") and value == "null":
        raise UserError(f"{override}: choose an option; to leave {key} out: '~{key}'")
    if not is_setting or key.startswith(("++", "~", "hydra")) or key in groups or not re.fullmatch(r"\+?[\w.]+", key):
        return override
    key = key.removeprefix("+")
    if key == "resume" and value not in ("", "null"):
        value = str(Run.find(value).folder)  # latest, ~, relative paths
    if key == "init_from" and "latest" in value.split(","):  # here: in a sweep, its own jobs would be the newest runs
        value = ",".join(str(Run.find(name).folder) if name == "latest" else name for name in value.split(","))
    return f"++{key}={quote(value) if key in TEXT_KEYS and not multirun else value}"


def quote(text: str) -> str:
    """As a quoted string of Hydra's grammar, word for word; null stays null."""
    if text == "null":
        return text
    escaped = re.sub(r"(\\*)('|\$\{|\Z)", lambda m: 2 * m[1] + ("\\" + m[2] if m[2] else ""), text)
    return f"'{escaped}'"


def detect_hardware() -> str:
    """gpu or cpu. Imports torch only if something hints at an accelerator: composing stays fast without one."""
    files = (path for path in ("/proc/driver/nvidia", "/dev/kfd") if Path(path).exists())
    driver = next(files, None) or shutil.which("nvidia-smi")
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        driver = "Apple silicon"
    hardware, reason = "cpu", "no accelerator found"
    if driver:
        import torch

        if torch.accelerator.is_available():
            hardware, reason = "gpu", f"torch sees a {torch.accelerator.current_accelerator().type} device"
        else:
            reason = f"{driver} exists, but this build of torch sees no accelerator"
    other = "cpu" if hardware == "gpu" else "gpu"
    notes.append(f"hardware={hardware}: {reason} (hardware={other} forces the other)")
    return hardware


def fallback_overrides(overrides: list[str], config_dir: str | None) -> list[str]:
    """`data=FALLBACK name=FALLBACK` if the chosen data need a download that fails and name a fallback; else nothing.

    Decided once, in a sweep by its parent, and recorded as overrides like any other. Not where data themselves vary.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from gptlab.data import files

    if not any(override.startswith(("experiment=", "data=")) for override in overrides):
        return []
    try:
        fixed = [override for override in overrides if not is_sweep(override)]
        searched = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
        with initialize_config_dir(str(config.CONF), version_base="1.3"):
            data = load_config(compose("train", [*fixed, *searched]), "train", fixed).data
    except (UserError, HydraException, OmegaConfBaseException):
        return []  # reported where the config is composed for the run
    fallback = data.get("fallback")
    if not fallback or data["path"] or not data["url"]:
        return []
    try:
        files.fetch(data["url"], data["sha256"], files.data_folder(data["folder"]) / data["file"])
        return []
    except UserError as error:
        warning = f"training on {fallback}, not {data['name']}; data.path=FILE uses your copy, data.fallback=null makes this an error"
        notes.append(f"\n*** WARNING: {warning} ***\n({error})\n")
        return [
            f"data={fallback}",
            *([] if any(o.startswith("++name=") for o in overrides) else [f"++name={fallback}"]),
        ]


def _stop_before_training(signum: int, _: Any) -> None:
    """For signals until training listens."""
    _claimed.discard()
    os._exit(128 + signum)


class Gatekeeper(Callback):
    """Before Hydra makes any folder: the config is checked, and a run claims its folder."""

    @staticmethod
    @contextlib.contextmanager
    def _stopping() -> Iterator[None]:
        """End the process on a bug: Hydra would make a warning of it, and start the task."""
        try:
            yield
        except Exception as error:
            if error_text(error) is None:
                traceback.print_exc()
                sys.exit(1)
            raise

    def on_run_start(self, config: Any, **_: Any) -> None:
        global _claimed, _config
        with errors_as_text(), self._stopping():
            _config = load_config(config, config.hydra.job.config_name, config.hydra.overrides.task)
            if config.hydra.job.config_name == "train" and is_first_process():
                _claimed = Run(config.hydra.run.dir)
                for signum in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(signum, _stop_before_training)
                _claimed.claim(resuming=_config.resume is not None, trust=_config.trust)


def load_config(cfg: Any, entry: str, overrides: list[str]) -> Any:
    """The typed config of one run; on a resume, the run folder's with the changes of the command line."""
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError

    task = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    try:
        values = OmegaConf.to_container(task, resolve=True)
    except InterpolationResolutionError as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    if entry == "train" and values.get("resume"):
        values = resume_config(values, overrides)
    elif entry in ("train", "sizing") and isinstance(values.get("init_from"), str):
        values = inherit.train_config(values, keys_of(overrides))
    elif entry == "evaluate":
        values = inherit.evaluation_config(values, keys_of(overrides))
    return config.validate(values, entry, references=set(_references(task)))


def resume_config(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The config in the run folder, with what this command line may change of it.

    Raises:
        UserError: it may not change that; or the folder names code that is not gptlab's, without trust=true.
    """
    run = Run(values["resume"])
    keys = [key for key in keys_of(overrides) if key not in ("resume", "trust")]
    if "init_from" in keys:
        raise UserError("init_from and resume exclude each other: a resumed run continues from its own checkpoint")
    keys = ["trainer.accelerator" if key == "hardware" else key for key in keys]
    resume.check_changes(keys)
    saved = {**run.read_config(), "resume": values["resume"], "trust": values["trust"]}
    targets.require_trust(run, config.foreign_parts(saved), values["trust"] is True)
    for key in keys:
        saved = config.with_value(saved, key, config.select(values, key))
    for key, follower in (("trainer.checkpoint_every", "every"), ("trainer.keep_every", "keep_every")):
        if key in keys and config.select(saved, "callbacks.checkpointing"):
            saved = config.with_value(saved, f"callbacks.checkpointing.{follower}", config.select(values, key))
    return saved


def keys_of(overrides: list[str]) -> list[str]:
    """Keys and groups that a command line gives a value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return [override.key_or_group for override in OverridesParser.create().parse_overrides(list(overrides))]


def _references(node: Any, at: str = "") -> Iterator[str]:
    """Keys whose value is an interpolation."""
    from omegaconf import DictConfig, OmegaConf

    for key in node:
        if OmegaConf.is_interpolation(node, key):
            yield f"{at}{key}"
        elif isinstance(child := node._get_node(key), DictConfig) and not child._is_none() and not child._is_missing():
            yield from _references(child, f"{at}{key}.")


def register_resolvers() -> None:
    """What the hydra node of conf/ refers to."""
    from omegaconf import OmegaConf

    resolvers = {
        "run_dir": lambda run, new: run or new,
        "new_run_only": lambda run, value: None if run else value,
        "explained_config": explain_config,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(f"gptlab.{name}", resolver, replace=True)


def explain_config(*, _root_: Any) -> str:
    """The composed config as YAML, with the explanations that stand in the YAML files, for --help."""
    from omegaconf import OmegaConf

    folders = [Path(source.path) for source in _root_.hydra.runtime.config_sources if source.schema == "file"]
    explained = {"": _explanations(folders, "", _root_.hydra.job.config_name)}
    for group, option in _root_.hydra.runtime.choices.items():
        for name in re.findall(r"[\w-]+", str(option)):
            explained.setdefault(group, {}).update(_explanations(folders, group, name))
    lines = []
    for key in _root_:
        if key != "hydra":
            block = OmegaConf.to_yaml(OmegaConf.masked_copy(_root_, [key])).rstrip("\n").split("\n")
            texts = (len(block) > 1 and explained.get(key)) or explained[""]
            for line in block:
                text = texts.get(line.partition(":")[0].strip())
                lines.append(f"{line}  # {text}" if text else line)
    return "\n".join(lines).replace("$", "$$")  # for the template's own substitution


def _explanations(folders: list[Path], group: str, option: str) -> dict[str, str]:
    """Key -> the comment beside it, in an option's YAML file and those it is based on."""
    import yaml

    file = next((file for folder in folders if (file := folder / group / f"{option}.yaml").is_file()), None)
    if file is None:
        return {}
    text, found = file.read_text("utf-8"), {}
    for base in (yaml.safe_load(text) or {}).get("defaults", []):
        if isinstance(base, str) and base != "_self_" and group:
            found |= _explanations(folders, group, base)
    return found | dict(re.findall(r"^ *(\w+):.*? # (.+)$", text, re.MULTILINE))
