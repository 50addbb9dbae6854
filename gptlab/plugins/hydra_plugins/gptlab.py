"""Hydra takes launchers and sweepers from this package alone. Imported at every start: nothing heavy up here."""

import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper


class Local(Launcher):
    """Each job is a process of its own on this machine, `n_jobs` at a time."""

    def __init__(self, n_jobs: int = 1) -> None:
        self.n_jobs = at_least_1("n_jobs", n_jobs)

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.config = config

    def launch(self, job_overrides: Iterable[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Takes the next one when a process is free, so that it can follow from those that have ended."""
        from gptlab import sweep

        started = []

        def jobs() -> Iterator[tuple[Sequence[str], Path]]:
            for number, overrides in enumerate(job_overrides, start=initial_job_idx):
                named = [given.partition("=")[2] for given in overrides if given.startswith("hydra.sweep.subdir=")]
                started.append(overrides)
                yield overrides, Path(self.config.hydra.sweep.dir).resolve() / (named or [str(number)])[0]

        sweep.run_jobs(self.config.hydra.job.config_name, jobs(), self.n_jobs)
        return [JobReturn(overrides=overrides, status=JobStatus.COMPLETED) for overrides in started]


class Grid(Sweeper):
    """All combinations of the values given; jobs that have finished are left alone."""

    def __init__(self, params: Any = None, metric: Any = None, at: Any = "last") -> None:
        self.params, self.metric, self.at = params or {}, metric, at

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        from hydra.core.plugins import Plugins

        self.loader, self.config = hydra_context.config_loader, config
        self.entry = config.hydra.job.config_name
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if "submitit" in type(self.launcher).__module__:
            prepare_submitit()

    def sweep(self, arguments: list[str]) -> None:
        from gptlab import sweep
        from gptlab.errors import UserError

        choices = {}
        for given in self.parse(arguments):
            if not given.is_sweep_override():
                choices[given.key_or_group] = [given.input_line]
            elif given.is_discrete_sweep():
                key = given.get_key_element()
                choices[given.key_or_group] = [f"{key}={value}" for value in given.sweep_string_iterator()]
            else:
                raise UserError(
                    f"{given.input_line.lstrip('+')}: a grid takes single values; add sweep=optuna for a range"
                )
        combinations = [list(combination) for combination in itertools.product(*choices.values())]
        if self.entry != "train":
            sweep.check_all(combinations, self.compose)
            self.launch(combinations)
            return
        state = self.begin()
        todo = [job for job in state.place(combinations, self.compose) if not state.is_done(job)]
        self.launch([state.job_overrides(job) for job in todo])

    def launch(self, jobs: Iterable[list[str]]) -> None:
        if jobs:
            self.launcher.launch(jobs, initial_job_idx=0)
        else:
            print("all jobs have finished")

    def parse(self, arguments: list[str]) -> list[Any]:
        """The overrides of the whole sweep; of a key that is given twice, the last one."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        # Hydra accepts any key with `++`, so that `load_config` reports all that is wrong; a group cannot have it.
        is_group = {key: bool(self.loader.get_group_options(key)) for key in self.params}
        params = [f"{'' if is_group[key] else '++'}{key}={value}" for key, value in self.params.items()]
        parsed = OverridesParser.create(self.loader).parse_overrides([*params, *arguments])
        self.overrides = list({given.key_or_group: given for given in parsed}.values())
        return self.overrides

    def begin(self) -> Any:
        from gptlab import sweep

        hydra = [
            given
            for given in self.config.hydra.overrides.hydra
            if sweep.key_of(given) not in ("hydra.mode", "hydra.sweep.dir")
        ]
        return sweep.begin(
            Path(self.config.hydra.sweep.dir),
            [*(given.input_line for given in self.overrides), *hydra],
            [given.key_or_group for given in self.overrides if given.is_sweep_override()],
            metric=self.metric,
            at=self.at,
            n_jobs=self.config.hydra.launcher.get("n_jobs", 1),
        )

    def compose(self, overrides: list[str]) -> Any:
        from gptlab import cli

        return cli.load_config(self.loader.load_sweep_config(self.config, list(overrides)), self.entry, overrides)


class Optuna(Grid):
    """Values that Optuna proposes from what earlier trials have reached; `n_trials` in all, also after a resume."""

    def __init__(
        self, n_trials: Any, n_jobs: Any = 1, storage: Any = None, study: Any = None, params: Any = None,
        metric: Any = None, at: Any = "last",
    ) -> None:  # fmt: skip
        super().__init__(params, metric, at)
        self.n_trials, self.n_jobs = at_least_1("n_trials", n_trials), at_least_1("hydra.sweeper.n_jobs", n_jobs)
        self.storage, self.name = storage, study
        self.jobs: dict[int, Any] = {}  # by the number of the trial

    def sweep(self, arguments: list[str]) -> None:
        from gptlab import search, sweep

        if self.entry != "train":
            raise sweep.UserError("hydra/sweeper=optuna: only training has a goal; use hydra/sweeper=grid")
        given = self.parse(arguments)
        self.fixed = [override.input_line for override in given if not override.is_sweep_override()]
        swept = [override for override in given if override.is_sweep_override()]
        if not swept:
            raise sweep.UserError("no values to choose from; give some: 'optim.lr=tag(log,interval(1e-4,1e-2))'")
        self.keys = {override.key_or_group: override.get_key_element() for override in swept}
        space = {override.key_or_group: search.distribution(override) for override in swept}
        self.state = self.begin()
        if limits := [change for change in self.state.changes if sweep.key_of(change) in sweep.LIMITS]:
            raise sweep.UserError(
                f"{limits[0].lstrip('+')}: all trials of a study train equally long; start a new sweep"
            )
        if not self.state.jobs:
            self.check([self.combination(params) for params in search.samples(space, 5)])
        if self.storage is None:
            self.state.folder.mkdir(parents=True, exist_ok=True)
        self.study = search.Study(self.state.folder, self.storage, self.name, space, self.config.seed)
        self.state.proposals = self.left()
        self.state.write()
        trials = self.trials()
        if isinstance(self.launcher, Local):
            self.launch(trials)
        else:
            while batch := list(itertools.islice(trials, self.n_jobs)):
                self.launch(batch)
        self.tell()

    def trials(self) -> Iterator[list[str]]:
        """What to start next: trials that were interrupted, then new ones."""
        started: set[str] = set()
        while True:
            self.state.proposals = self.left()
            if todo := [job for job in self.tell() if job.folder not in started]:
                started.add(todo[0].folder)
                yield self.state.job_overrides(todo[0])
            elif self.state.proposals:
                self.study.propose()
            else:
                return

    def left(self) -> int:
        """How many trials are to be proposed, by whichever machine."""
        return max(0, self.n_trials - len(self.study.trials()))

    def tell(self) -> list[Any]:
        """Tell the study of the trials that have ended; returns the jobs of the others."""
        others = []
        for trial in self.study.running():
            if trial.number not in self.jobs:
                self.jobs[trial.number] = self.place(trial.params)
            job = self.jobs[trial.number]
            if (state := self.state.run_of(job).state()) in ("finished", "pruned", "failed"):
                self.study.tell(trial, state, self.state.goal(job))
            else:
                others.append(job)
        return others

    def place(self, params: dict[str, Any]) -> Any:
        from gptlab import cli

        overrides = self.combination(params)
        try:
            cfg = self.compose([*overrides, *self.state.changes])
        except Exception as error:  # fails this trial alone
            return self.state.place_invalid(overrides, params, cli.error_text(error, composing=True))
        return self.state.place([overrides], lambda _: cfg)[0]

    def combination(self, params: dict[str, Any]) -> list[str]:
        return [*self.fixed, *(f"{element}={params[key]}" for key, element in self.keys.items())]

    def check(self, samples: list[list[str]]) -> None:
        """Raises UserError if none of them is right: then it is the command line that is wrong."""
        from gptlab import sweep

        for overrides in samples:
            with contextlib.suppress(Exception):
                self.compose(overrides)
                return
        sweep.check_all(samples[:1], self.compose)


def at_least_1(key: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        from gptlab.errors import UserError

        raise UserError(f"{key}={value}: must be an integer >= 1")
    return value


def prepare_submitit() -> None:
    """SLURM's warning is to be the signal on which runs save, and a job that was killed must not end the sweep: others
    still run. What became of each is read from its folder."""
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # before the import, which reads it
    from submitit import Job

    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # as on Ctrl-C: the results are shown
    results = Job.results

    def results_or_none(job: Any) -> list[Any]:
        try:
            return results(job)
        except Exception as error:
            print(" ".join(str(error).split())[:300], flush=True)
            return [None]

    Job.results = results_or_none
