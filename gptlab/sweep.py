"""A sweep: which jobs it has, what became of them, and what a resume does.

    command line -> Grid or Optuna (plugins/) -> place(): compose, check, identify -> sweep.json -> launcher -> jobs.run()

sweep.json is written before the first job starts. A job is identified by a hash of its config, so that
`optim.lr=0.003` and `3e-3` are one job, and keeps its number for good. Launchers only start processes: whether a job
starts or resumes follows from its folder, on a cluster as here.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from gptlab import cli, config, jobs, machine, resume, rules, targets
from gptlab.errors import JobError, MissingFileError, UserError
from gptlab.run import ERROR, Run, is_first_process, write_atomic, write_json

INDEX = "sweep.json"
HARMLESS = {
    *config.SWEEP_KEYS.values(),
    "hydra.sweeper.n_jobs",
    "hydra.sweeper.study",
    "hydra/launcher",
    "hydra/sweeper",
}  # what sweep.json may say to Hydra without trust
LIMITS = ("trainer.max_steps", "trainer.max_time", "optim.decay_steps")

replayed: "Sweep | None" = None  # the one that this command line resumes
current: "Sweep | None" = None  # the one that this process runs, once all its jobs are known to be right


class Job(config.Node):
    folder: Annotated[str, Field(pattern=r"^\d{1,9}$")]  # inside the sweep's
    id: str
    values: dict[str, Any]  # of the swept keys
    overrides: list[str]
    threads: int | None
    linear: Literal["torch", "onednn"] | None = None  # sweeps of an older gptlab have none


class Sweep(config.Node):
    """A sweep folder, and what its sweep.json holds."""

    overrides: list[str]  # of the whole sweep
    flags: list[str]  # such as --config-dir
    varied: list[str]  # the swept keys
    changes: list[str] = Field([])  # overrides that resumes have brought, for every job
    metric: config.Monitor | None = None  # None: chosen by the data
    at: Literal["last", "best"] = "last"
    cores_per_job: int | None = None
    linear: Literal["torch", "onednn"] | None = None
    jobs: list[Job] = Field([])
    folder: Annotated[Path, Field(exclude=True)] = Path()
    trust: Annotated[bool | None, Field(exclude=True)] = None  # the user's, on a resume; None: a new sweep
    # Jobs that a search has yet to propose; one that failed is not repeated. None: not a search.
    proposals: Annotated[int | None, Field(exclude=True)] = None

    @classmethod
    def read(cls, folder: Path) -> "Sweep":
        """Raises UserError if sweep.json is missing or damaged."""
        try:
            sweep = cls.model_validate_json((folder / INDEX).read_bytes())
        except FileNotFoundError:
            raise MissingFileError(f"{folder} is not a sweep folder (no {INDEX})") from None
        except (OSError, ValidationError) as error:
            raise UserError(f"cannot read {folder / INDEX}; restore it: {str(error)[:300]}") from None
        return sweep.model_copy(update={"folder": folder})

    def write(self) -> None:
        """Raises UserError if another process runs this sweep."""
        global current
        if current is None and replayed is None:
            Run(self.folder).lock()
            _check_new(self.folder)  # again: another process may have been faster
        write_json(self.folder / INDEX, self.model_dump())
        current = self

    def run_of(self, job: Job) -> Run:
        return Run(self.folder / job.folder)

    def is_done(self, job: Job) -> bool:
        """Whether nothing is left to do, also with the limits that a resume has changed."""
        run = self.run_of(job)
        if (state := run.state()) not in ("finished", "pruned"):
            return state == "failed" and self.proposals is not None
        ended = f"trainer.{run.read_summary()['ended']}"
        limits = [change.partition("=")[2] for change in self.changes if key_of(change) == ended]
        return not limits or limits[-1] == str(self.saved(job, ended))

    def saved(self, job: Job, key: str) -> Any:
        """From config.yaml; None if that is missing or damaged, which the job will say when it resumes."""
        with contextlib.suppress(UserError):
            return config.select(self.run_of(job).read_config(), key)
        return None

    def resume_command(self) -> str:
        trust = self.foreign_overrides() or any("_target_" in text for job in self.jobs for text in job.overrides)
        return f"python -m gptlab.train resume={Run(self.folder)}" + " trust=true" * bool(trust)

    def foreign_overrides(self) -> list[str]:
        """What could reach beyond gptlab's own conf/."""

        def is_foreign(override: str) -> bool:
            key, _, value = override.lstrip("+~").partition("=")
            if key.startswith("-"):  # a flag
                return True
            if key.startswith("hydra"):
                return key not in HARMLESS or not re.fullmatch(r"[\w/.-]*", value) or ".." in value
            is_option = "." not in key and key not in ("init_from", "meta")  # or a plain key at the top
            return key in ("resume", "trust") or "@" in key or (is_option and bool(re.search(r"\.\.|(^|\W)/", value)))

        texts = [*self.overrides, *self.changes, *(text for job in self.jobs for text in job.overrides)]
        return self.flags + [text for text in texts if is_foreign(text)]

    def first_cores(self) -> int | None:
        """Threads of all processes of the first job that has started."""
        for job in self.jobs:
            threads, devices = self.saved(job, "trainer.threads"), self.saved(job, "trainer.devices")
            if isinstance(threads, int) and isinstance(devices, int):
                return threads * devices
        return None

    def place(self, combinations: Sequence[Sequence[str]], compose: Callable[[list[str]], Any]) -> list[Job]:
        """The jobs of these combinations of overrides, known or with the next free numbers; written to sweep.json.

        Raises:
            UserError: some of the configs are wrong, need trust, or are not what they were when the sweep began.
        """
        known = {tuple(job.overrides): job for job in self.jobs}
        unfinished = [list(c) for c in combinations if not (tuple(c) in known and self.is_done(known[tuple(c)]))]
        configs = check_all([[*overrides, *self.changes] for overrides in unfinished], compose)
        for overrides, cfg in zip(unfinished, configs, strict=True):
            targets.require_trust(self.folder / INDEX, config.foreign_parts(cfg.model_dump()), self.trust is not False)
            rules.check_metric(self.metric, cfg.data["_target_"])
            values = self._values(overrides, cfg)
            job_id = identity(cfg, values)
            job = known.get(tuple(overrides)) or next((job for job in self.jobs if job.id == job_id), None)
            if job is None:
                job = Job(folder=self._free(), id=job_id, values=values, overrides=overrides, threads=None)
                self.jobs.append(job)
            elif job.id != job_id and not (self.folder / job.folder / "config.yaml").exists():
                raise UserError(
                    f"job {job.folder} of {self.folder} composes to another config than when the sweep began: conf/ or "
                    "gptlab has changed; restore it, or start a new sweep"
                )
            elif (done := self.run_of(job).read_summary()) and cfg.trainer.max_steps < done["steps"]:
                limit = f"trainer.max_steps={cfg.trainer.max_steps}"
                raise UserError(f"{limit}: job {job.folder} has already reached step {done['steps']}")
            job.threads = job.threads or self._threads(cfg)
            job.linear = job.linear or self._linear(cfg)
            job.overrides = overrides  # those that were checked: a sweep.json from elsewhere may hold others
            known[tuple(overrides)] = job
        self.write()
        return list({job.folder: job for c in combinations for job in [known[tuple(c)]]}.values())

    def place_invalid(self, overrides: list[str], values: dict[str, Any], reason: str) -> Job:
        """The job of a search whose config is wrong: it fails without having started."""
        job = next((job for job in self.jobs if job.overrides == overrides), None)
        if job is None:
            job_id = hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:16]
            job = Job(folder=self._free(), id=job_id, values=values, overrides=overrides, threads=None)
            self.jobs.append(job)
            self.write()
        write_atomic(self.folder / job.folder / ERROR, f"{reason}\n".encode())
        return job

    def _free(self) -> str:
        return str(max((int(job.folder) for job in self.jobs), default=-1) + 1)

    def _values(self, overrides: list[str], cfg: config.Train) -> dict[str, Any]:
        """The swept keys with their values; for a group such as model, its option."""
        saved, values = cfg.model_dump(), {}
        for override in overrides:
            if (key := key_of(override)) in self.varied:
                value = config.select(saved, key)
                values[key] = override.partition("=")[2] if isinstance(value, dict | None) else value
        return values

    def _threads(self, cfg: config.Train) -> int | None:
        """Of each process: the bits of a run depend on it, so that all jobs of a sweep share the first one's answer."""
        if cfg.trainer.threads != "auto" or self.cores_per_job is None:
            return None
        return max(1, self.cores_per_job // cfg.trainer.devices)

    def _linear(self, cfg: config.Train) -> str | None:
        """They are part of a run's bits, too, so that one answer is given to all jobs."""
        if cfg.trainer.linear != "auto" or not machine.linear_matters(cfg):
            return None
        self.linear = self.linear or machine.fastest_linear()
        return self.linear

    def job_overrides(self, job: Job) -> list[str]:
        """What a launcher gets."""
        resolved = {"threads": job.threads, "linear": job.linear}
        given = [f"++trainer.{key}={value}" for key, value in resolved.items() if value]
        given += ["++trust=true"] * bool(self.trust)
        return [*job.overrides, *given, *self.changes, f"hydra.sweep.subdir={job.folder}"]

    def goal(self, job: Job) -> float | None:
        """What a search minimizes; None if the job has not finished."""
        summary = self.run_of(job).read_summary()
        values = (summary or {}).get(self.at) or {}
        metric = self.metric or ("val/accuracy" if "val/accuracy" in values else "val/loss")
        value = values.get(metric)
        return -value if value is not None and metric == "val/accuracy" else value


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def identity(cfg: config.Train, values: dict[str, Any]) -> str:
    """Hash of a config, but for what a resume may change, unless it is swept."""
    free = {*resume.RESUME_MAY_CHANGE, *resume.FOLLOWS, "resume", "trust"} - values.keys()
    all_values = dict(resume.leaf_values(cfg.model_dump()))
    kept = {key: value for key, value in all_values.items() if key not in free}
    kept = {key: value for key, value in kept.items() if key not in config.ADDED or value != config.ADDED[key]}
    options = {key: value for key, value in values.items() if key not in all_values or key in free}
    return hashlib.sha256(json.dumps([kept, options], sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_flags(entry: str, overrides: list[str], resuming: bool) -> None:
    """Raises UserError for what a sweep cannot be combined with."""
    if entry in ("prepare", "export_hf"):
        raise UserError("-m: one folder is written at a time")
    if resuming:
        raise UserError("resume=RUN cannot be combined with a sweep (-m); resume=SWEEP resumes a sweep")
    for key, instead in (("run.dir", "with -m use hydra.sweep.dir=FOLDER"), ("sweep.subdir", "jobs are numbered")):
        if any(key_of(override) == f"hydra.{key}" for override in overrides):
            raise UserError(f"hydra.{key}: not allowed in a sweep; {instead}")
    if not is_first_process() or os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("a sweep is one process, which starts those of its jobs; leave out torchrun or srun")
    other = Path.cwd() / "gptlab/__init__.py"
    if other.exists() and other.resolve().parent != Path(__file__).resolve().parent:
        raise UserError(f"{other.parent} is another package named gptlab, which the jobs would import; run elsewhere")


def check_all(jobs: Sequence[list[str]], compose: Callable[[list[str]], Any]) -> list[Any]:
    """The config of each job; raises UserError if any is wrong, with a text that lists all of them."""
    configs, wrong = [], {}  # problem -> jobs
    for number, job in enumerate(jobs):
        try:
            configs.append(compose(job))
        except Exception as error:
            varied = [given.lstrip("+") for i, given in enumerate(job) if len({other[i] for other in jobs}) > 1]
            wrong.setdefault(cli.error_text(error, composing=True), []).append(f"job {number} ({', '.join(varied)})")
    if not wrong:
        return configs
    bad = sum(map(len, wrong.values()))
    if len(wrong) == 1 and bad == len(jobs):
        raise UserError(next(iter(wrong)))
    texts = [f"{', '.join(names)}:\n{problem}" for problem, names in wrong.items()]
    raise UserError(f"{bad} of {len(jobs)} jobs cannot run, so none was started\n" + "\n".join(texts))


def begin(folder: Path, overrides: list[str], varied: list[str], *, metric: Any, at: Any, n_jobs: int) -> Sweep:
    """A new sweep, or the one that `replay` has read. Raises UserError if the folder holds one already, or metric or at are
    wrong."""
    from gptlab.data.files import available_cores

    if replayed is None:
        _check_new(folder)
    values = {"flags": cli.flags_of(sys.argv[1:]), "varied": varied, "folder": folder}
    if n_jobs > 1:
        values["cores_per_job"] = max(1, available_cores() // n_jobs)
    if replayed is not None:
        decided = {
            "cores_per_job": replayed.cores_per_job or replayed.first_cores(),
            "linear": replayed.linear or "torch",
        }
        values = {**dict(replayed), **decided}
    try:
        return Sweep.model_validate({**values, "overrides": overrides, "metric": metric, "at": at})
    except ValidationError as error:
        (problem, *_) = error.errors()
        raise UserError(
            f"{problem['loc'][0]}={problem['input']}: {problem['msg']}".replace("Input should", "must")
        ) from None


def _check_new(folder: Path) -> None:
    if (folder / INDEX).exists():
        raise UserError(f"{Run(folder)} already holds a sweep; continue it with resume={Run(folder)}")


def find(arguments: list[str]) -> Path | None:
    """The sweep folder that `resume=` names; for `latest`, the one of the newest run, if that is a job."""
    for value in [argument.partition("=")[2] for argument in arguments if argument.startswith("resume=")]:
        folder = Path(value).expanduser()
        if value == "latest" and (newest := Run.newest()):
            folder = newest[0].folder.parent
        if (folder / INDEX).is_file():
            return folder
    return None


def replay(folder: Path, given: list[str]) -> list[str]:
    """The command line of a sweep that is resumed: that of its start, with the changes that are `given` now.

    Raises:
        UserError: another process runs it, sweep.json is damaged or needs trust, or a key cannot be changed.
    """
    global replayed
    values = {key_of(override): override.partition("=")[2] for override in given}
    trust = values.pop("trust", "").lower() == "true"
    Run(folder).claim(resuming=True, trust=trust)
    sweep = Sweep.read(folder)
    sweep.trust = trust
    targets.require_trust(folder / INDEX, sweep.foreign_overrides(), sweep.trust)
    overrides = {key_of(override): override for override in sweep.overrides}
    changes = {key_of(change): change for change in sweep.changes}
    refused = []
    for key, value in values.items():
        if key not in sweep.varied and cli.is_sweep(f"{key}={value}"):
            raise UserError(f"{key}={value}: the sweep does not vary {key}; give one value, or start a new sweep")
        if key == "hardware" and key not in sweep.varied:
            key = "trainer.accelerator"
        if key.startswith(("hydra.launcher", "hydra.sweeper", "hydra/")):
            overrides[key] = f"{key}={value}"
        elif key in sweep.varied:
            overrides[key] = _with_values(overrides[key], f"{key}={value}")
        elif key in resume.RESUME_MAY_CHANGE:
            changes[key] = f"++{key}={_normalized(key, value)}"
        else:
            refused.append(key)
    if refused:
        hints = [f"{key}{config.did_you_mean(key, [*sweep.varied, *resume.RESUME_MAY_CHANGE])}" for key in refused]
        raise UserError(
            f"a resumed sweep keeps its config: cannot change {', '.join(hints)}\nIt can get more values of "
            f"{', '.join(sweep.varied)}, and what a run's resume may change, such as trainer.max_steps or trainer.devices; else start a new sweep"
        )
    resume.check_changes([key_of(change) for change in changes.values()])
    sweep.changes = list(changes.values())
    replayed = sweep
    print(f"resuming {Run(folder)}")
    return ["-m", *sweep.flags, *overrides.values(), f"hydra.sweep.dir={cli.quote(str(folder))}"]


def _normalized(key: str, value: str) -> str:
    """A limit as config.yaml has it (1e3 -> 1000, 1h -> 00:01:00:00); what is wrong is reported where it is composed."""
    with contextlib.suppress(ValueError, OverflowError):
        if key == "trainer.max_steps":
            return str(int(value) if value.isdigit() else config._integral(float(value)))
        if key == "trainer.max_time":
            return config._duration(value)
    return value


def _with_values(swept: str, added: str) -> str:
    """`seed=1,2` with `seed=2,3` is `seed=1,2,3`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    values = {}
    for override in OverridesParser.create().parse_overrides([swept, added]):
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise UserError(f"{added}: {swept.lstrip('+')} is a range, which a resume keeps; start a new sweep")
        is_list = override.is_sweep_override() and override.is_discrete_sweep()
        values |= dict.fromkeys(override.sweep_string_iterator() if is_list else [override.get_value_element_as_str()])
    return f"{swept.partition('=')[0]}={','.join(values)}"


def process(entry: str, overrides: Sequence[str], folder: Path) -> jobs.Process:
    """A job as a process, started as a user would start it, or resumed if there is a run in the folder already."""
    sweep = Sweep.read(folder.parent) if (folder.parent / INDEX).exists() else None
    job = next((job for job in sweep.jobs if job.folder == folder.name), None) if sweep else None
    flags = sweep.flags if sweep else cli.flags_of(sys.argv[1:])
    command = [sys.executable, *subprocess._args_from_interpreter_flags(), "-m", f"gptlab.{entry}"]
    if (folder / "config.yaml").exists():
        trust = [override for override in overrides if key_of(override) == "trust"]
        command += [f"resume={folder}", *(sweep.changes if sweep else []), *trust]
    else:
        own = [override for override in overrides if not override.startswith("hydra.")]
        command += [*flags, *own, "hydra.mode=RUN", f"hydra.run.dir={cli.quote(str(folder))}"]
    values = (
        {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in job.values.items()} if job else {}
    )
    return jobs.Process(folder, command, " ".join(f"{key}={value}" for key, value in values.items()))


def run_jobs(entry: str, given: Iterable[tuple[Sequence[str], Path]], n_jobs: int) -> None:
    """Run jobs, (overrides, folder) each, as processes of this machine; of a sweep of runs, or one that another machine
    has given to this one.

    Raises:
        SystemExit: stopped by a signal.
        JobError: a job that leaves no run folder has failed; those of a sweep of runs leave their status there.
    """
    processes = (process(entry, overrides, folder) for overrides, folder in given)
    if entry != "train":  # their output is what the user wants to see
        statuses = [subprocess.run(job.command).returncode for job in processes]
        if any(statuses):
            raise JobError(f"{sum(map(bool, statuses))} of {len(statuses)} jobs failed; see above")
        return
    total, done = 1, 0
    if current:
        total, done = len(current.jobs) + (current.proposals or 0), sum(map(current.is_done, current.jobs))
    if signum := jobs.run(processes, n_jobs, total=total, done=done, on_change=_update_results):
        sys.exit(128 + signum)


def _update_results(running: set[str]) -> None:
    from gptlab import results

    if current:
        with contextlib.suppress(OSError):  # a full disk ends no job; `conclude` tries again, and says so
            results.update(current, running, picture=False)


def run_job(entry: str, cfg: Any) -> float | None:
    """Run one job for another launcher, which calls this on the machine it has chosen."""
    from hydra.core.hydra_config import HydraConfig

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    run_jobs(entry, [(hydra_config.overrides.task, folder)], n_jobs=1)
    summary = Run(folder).read_summary()
    return summary["best"].get("val/loss") if summary else None


def conclude() -> int:
    """Write and show the results of this process's sweep, and say how to continue; the number of jobs that failed or are
    not finished."""
    from gptlab import results

    if current is None:
        return 0
    print(f"\n{results.update(current)}\n\nresults: {Run(current.folder)}/results.md")
    to_propose = current.proposals or 0
    if left := to_propose + sum(not current.is_done(job) for job in current.jobs):
        total = len(current.jobs) + to_propose
        print(f"\n{left} of {total} jobs are not finished; to resume:\n  {current.resume_command()}")
    return left or sum(current.run_of(job).state() == "failed" for job in current.jobs)
