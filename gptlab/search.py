"""The study of an Optuna sweep: which values the next trial gets, and what became of the earlier ones.

A trial is added in one transaction, with all its values, so that a kill leaves the whole of it or nothing. What is
proposed is a function of the trials so far: a study that was killed ends in the same trials, with one job at a time.
"""

import contextlib
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlab.errors import UserError

try:
    import optuna
    import sqlalchemy.exc
except ImportError as error:
    raise UserError("hydra/sweeper=optuna needs pip install 'gptlab[optuna]'") from error
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

optuna.logging.set_verbosity(optuna.logging.WARNING)

FILE = "optuna.db"  # in the sweep folder
STATES = {"pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


def distribution(given: Any) -> BaseDistribution:
    """What Hydra's override draws from. Raises UserError if that is empty."""
    value = given.value()
    try:
        if given.is_interval_sweep():
            kind = IntDistribution if isinstance(value.start, int) else FloatDistribution
            return kind(value.start, value.end, log="log" in value.tags)
        if given.is_range_sweep():
            options = sorted(given.sweep_iterator())
            kind = IntDistribution if isinstance(options[0], int) else FloatDistribution
            return kind(options[0], options[-1], step=abs(value.step))
        return CategoricalDistribution(list(dict.fromkeys(given.sweep_string_iterator())))
    except (ValueError, IndexError) as error:
        raise UserError(f"{given.input_line}: {error if isinstance(error, ValueError) else 'no values'}") from None


class Study:
    """`storage` is a URL that several sweeps can share, if they agree on `name`; None: a file in the sweep's folder."""

    def __init__(
        self, folder: Path, storage: str | None, name: str | None, space: dict[str, BaseDistribution], seed: int
    ) -> None:
        # Machines that start together are to propose different values.
        self.space, self.seed = space, seed + (zlib.crc32(folder.name.encode()) if storage else 0)
        self.owner = folder.name if storage else "sweep"
        self.storage = (
            storage or sqlalchemy.URL.create("sqlite", database=str(folder.resolve() / FILE)).render_as_string()
        )
        if (folder / FILE).is_symlink():
            raise UserError(f"{folder / FILE} is a symbolic link; remove it")
        options = {"storage": self.storage, "study_name": name or self.owner, "load_if_exists": True}
        with self._errors():
            try:
                self._study = optuna.create_study(**options)
            except sqlalchemy.exc.DBAPIError:  # another machine may be making the tables
                time.sleep(0.5)
                self._study = optuna.create_study(**options)
            if self._study.directions != [optuna.study.StudyDirection.MINIMIZE]:
                raise UserError(f"hydra.sweeper.study={name}: that study maximizes, or has several goals")

    def trials(self) -> list[FrozenTrial]:
        """Also those of other sweeps. Raises UserError if they draw from something else."""
        with self._errors():
            trials = self._study.get_trials(deepcopy=False)
        for trial in trials:
            for key in self.space.keys() & trial.distributions.keys():
                try:
                    optuna.distributions.check_distribution_compatibility(trial.distributions[key], self.space[key])
                except ValueError as error:
                    raise UserError(
                        f"{key} was drawn from another set in trial {trial.number} of this study ({error}); start a new one"
                    ) from None
        return trials

    def running(self) -> list[FrozenTrial]:
        """This sweep's trials that have not been told."""
        return [
            trial
            for trial in self.trials()
            if trial.state == TrialState.RUNNING
            and trial.user_attrs.get("sweep") == self.owner
            and trial.params.keys() == self.space.keys()
        ]

    def propose(self) -> None:
        """Add a trial. (`Study.ask` adds one first and its values later.)"""
        trials = self.trials()
        sampler = optuna.samplers.TPESampler(seed=(self.seed + len(trials)) % 2**32)
        scratch = optuna.create_study(direction="minimize", sampler=sampler)
        scratch.add_trials(trials)  # those that run too: no value is proposed twice
        params = scratch.ask(self.space).params
        attributes = {"sweep": self.owner}
        with self._errors():
            self._study.add_trial(
                optuna.create_trial(
                    state=TrialState.RUNNING, params=params, distributions=self.space, user_attrs=attributes
                )
            )

    def tell(self, trial: FrozenTrial, state: str, goal: float | None) -> None:
        """A finished one without a goal, which may have been NaN, has failed."""
        told = STATES.get(state, TrialState.COMPLETE if goal is not None else TrialState.FAIL)
        with self._errors():
            self._study.tell(trial.number, goal if told == TrialState.COMPLETE else None, state=told)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, ImportError, RuntimeError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
            text = f"hydra.sweeper.storage={self.storage}: {str(cause).splitlines()[0]}"
            raise UserError(re.sub(r"//[^/\s]*@", "//***@", text)) from None


def samples(space: dict[str, BaseDistribution], n: int) -> list[dict[str, Any]]:
    """Random points."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [study.ask(space).params for _ in range(n)]
