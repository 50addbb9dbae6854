"""The jobs of a sweep: all are checked before the first starts, and each runs in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from gptlab import cli
from gptlab.errors import JobError, UserError
from gptlab.run import Run


def check_flags(entry: str, overrides: list[str], resuming: bool) -> None:
    if entry == "prepare":
        raise UserError("-m: data are prepared one folder at a time")
    if resuming:
        raise UserError("resume continues one run and cannot be combined with a sweep (-m)")
    if any(override.startswith("hydra.run.dir=") for override in overrides):
        raise UserError("hydra.run.dir is the folder of a single run; with -m use hydra.sweep.dir=FOLDER")
    other = Path.cwd() / "gptlab/__init__.py"
    if other.exists() and other.resolve().parent != Path(__file__).resolve().parent:
        raise UserError(f"{other.parent} is another package named gptlab, which the jobs would import; run elsewhere")


def check_jobs(master: Any) -> None:
    """Raises UserError if any job of a sweep is wrong; the text lists all of them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    loader = GlobalHydra.instance().config_loader()
    if not master.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return  # chooses its jobs as it goes; each is checked when it starts
    params = [f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides([*params, *master.hydra.overrides.task])
    (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    wrong: dict[str, list[str]] = {}  # problems -> jobs
    for number, job in enumerate(jobs):
        try:
            cli.load_config(loader.load_sweep_config(master, job), master.hydra.job.config_name, job)
        except Exception as error:
            varied = [given.lstrip("+") for i, given in enumerate(job) if len({other[i] for other in jobs}) > 1]
            wrong.setdefault(cli.error_text(error, composing=True), []).append(f"job {number} ({', '.join(varied)})")
    if not wrong:
        return
    bad = sum(map(len, wrong.values()))
    if len(wrong) == 1 and bad == len(jobs):
        raise UserError(next(iter(wrong)))
    texts = [f"{', '.join(names)}:\n{problem}" for problem, names in wrong.items()]
    raise UserError(f"{bad} of {len(jobs)} jobs cannot run, so none was started\n" + "\n".join(texts))


def run_job(entry: str, cfg: Any) -> float | None:
    """Run one job of a sweep in a process of its own; its metric is read from the run folder."""
    from hydra._internal.utils import get_args_parser
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    parsed = get_args_parser().parse_args(sys.argv[1:])
    flags = [flag for flag in sys.argv[1:] if flag not in ("-m", "--multirun", *parsed.overrides)]
    overrides = []
    for override in hydra_config.overrides.task:
        key = override.partition("=")[0].lstrip("+")
        is_text = key in cli.TEXT_KEYS  # as plain text again: the job quotes it
        text = OmegaConf.select(cfg, key) if is_text else None
        overrides.append(f"{key}={'null' if text is None else text}" if is_text else override)
    command = [sys.executable, "-m", f"gptlab.{entry}", *flags, *overrides, f"hydra.run.dir={cli.quote(str(folder))}"]
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "PL_GLOBAL_SEED")
    environment = {key: value for key, value in os.environ.items() if key not in (*ranks, "HYDRA_FULL_ERROR")}
    if cli.FULL_ERROR:
        environment["HYDRA_FULL_ERROR"] = "1"
    status = _run(command, environment)
    if status in (129, 130, 143, -signal.SIGHUP, -signal.SIGINT, -signal.SIGTERM):
        print(f"sweep stopped; no job after {folder} was started", file=sys.stderr)
        sys.exit(status if status > 0 else 128 - status)
    if status != 0:
        raise JobError(f"the job in {folder} ended with status {status}; see its messages above")
    summary = Run(folder).read_summary()  # sampling leaves none
    return summary["best"].get("val/loss") if summary else None


def _run(command: list[str], environment: dict[str, str]) -> int:
    """The exit status of a job in a session of its own; it gets each signal once, from here, and time to save."""
    process, early = None, []

    def forward(signum: int, _: Any) -> None:
        process.send_signal(signum) if process else early.append(signum)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    on_main_thread = threading.current_thread() is threading.main_thread()  # only there can signals be handled
    before = {signum: signal.signal(signum, forward) for signum in signals} if on_main_thread else {}
    try:
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        for signum in early:
            process.send_signal(signum)
        return process.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
