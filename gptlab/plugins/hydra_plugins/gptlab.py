"""Hydra takes launchers and sweepers from this package alone. Imported at every start: nothing heavy up here."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper


class Local(Launcher):
    """Each job is a process of its own on this machine, `n_jobs` at a time."""

    def __init__(self, n_jobs: int = 1) -> None:
        from gptlab.errors import UserError

        if type(n_jobs) is not int or n_jobs < 1:
            raise UserError(f"n_jobs={n_jobs}: must be an integer >= 1")
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from gptlab import sweep

        folders = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            named = [given.partition("=")[2] for given in overrides if given.startswith("hydra.sweep.subdir=")]
            folders.append(Path(self.config.hydra.sweep.dir).resolve() / (named or [str(number)])[0])
        sweep.run_jobs(self.config.hydra.job.config_name, list(zip(job_overrides, folders, strict=True)), self.n_jobs)
        return [JobReturn(overrides=overrides, status=JobStatus.COMPLETED) for overrides in job_overrides]


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
            self.launcher.launch(combinations, initial_job_idx=0)
            return
        state = self.begin()
        todo = [job for job in state.place(combinations, self.compose) if not state.is_done(job)]
        self.launcher.launch([state.job_overrides(job) for job in todo], initial_job_idx=0)

    def parse(self, arguments: list[str]) -> list[Any]:
        """The overrides of the whole sweep; of a key that is given twice, the last one."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        params = [f"{key}={value}" for key, value in self.params.items()]
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
