"""Resuming a run: what may change, whether the checkpoint is of this run and its data, and whether anything is left to do."""

import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from gptlab.errors import UserError
from gptlab.run import SAVED, Run, is_first_process

# How long to train, and what is the machine's: neither changes what a step does. (Data are compared by their checksums.)
RESUME_MAY_CHANGE = (
    "trainer.max_steps", "trainer.max_time", "optim.decay_steps", "optim.skip_nonfinite", "trainer.accelerator",
    "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.log_every", "trainer.checkpoint_every",
    "trainer.keep_every", "trainer.threads", "trainer.linear", "data.workers", "data.micro_batch_size", "data.path", "data.val_path", "data.folder",
)  # fmt: skip
FOLLOWS = ("callbacks.checkpointing.every", "callbacks.checkpointing.keep_every")  # from the above
OF_A_STEP = ("seed", "model.", "data.", "optim.", "trainer.", "callbacks.")  # config that decides what a run computes
STATE = ("global_step", "config", "tokenizer", "data", "callbacks", "watch")  # the non-tensors of a checkpoint

log = logging.getLogger("gptlab")


def check_changes(keys: Collection[str]) -> None:
    """Raises UserError for keys of the command line that a resume cannot change."""
    if refused := [key for key in keys if key not in RESUME_MAY_CHANGE]:
        raise UserError(
            f"a resumed run keeps its config; cannot change {', '.join(refused)}; can change "
            f"{', '.join(RESUME_MAY_CHANGE)}; for anything else start a new run"
        )
    if "optim.decay_steps" in keys and "trainer.max_steps" not in keys:
        raise UserError("optim.decay_steps requires trainer.max_steps")


def find_state(run: Run) -> tuple[Path | None, dict[str, Any]]:
    """The newest readable checkpoint and its non-tensor state; `(None, {})` if nothing was saved yet. Damaged newer ones
    are renamed. Raises UserError if all are lost: restarting would overwrite what the run logged."""
    from gptlab import checkpoint

    damaged: dict[Path, str] = {}
    for path in run.checkpoints():
        try:
            content = checkpoint.read(path)
        except checkpoint.DamagedError as error:
            damaged[path] = str(error)
            continue
        if is_first_process():
            _rename_damaged(damaged)
        if not content.keys() >= set(STATE):
            raise UserError(f"{path} was saved by an older gptlab; it can be sampled, not resumed")
        if path.name != "last.ckpt":
            why = "\n".join(damaged.values()) or "last.ckpt is missing"
            log.warning("%s: resuming from %s, of step %d", why, path.name, content["global_step"])
        return path, {key: content[key] for key in STATE}
    if damaged:
        raise UserError("\n".join([*damaged.values(), "no checkpoint left to resume from; start a new run"]))
    if (run.folder / SAVED).exists():
        raise UserError(f"{run} has lost its checkpoints; restore them, or start a new run")
    return None, {}


def _rename_damaged(paths: Collection[Path]) -> None:
    for damaged in paths:
        best = damaged.with_name("best.ckpt")
        for path in {damaged, *([best] if best.exists() and best.samefile(damaged) else [])}:
            path.rename(path.with_name(f"{path.name}.damaged"))


def leaf_values(config: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of all values of a nested config, with keys as on the command line."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from leaf_values(value, f"{at}.{key}".lstrip("."))
    else:
        yield at, config


def check_same_run(
    ckpt: Path, state: dict[str, Any], config: dict[str, Any], data: dict[str, str], tokenizer: dict[str, Any]
) -> None:
    """Raise UserError if a checkpoint's state is not of this run: its config, the data on disk (name and checksums), and
    the tokenizer's state."""
    from gptlab.config import with_added

    was, now = dict(leaf_values(with_added(state["config"]))), dict(leaf_values(config))
    for key in {**was, **now}:
        free = key in (*RESUME_MAY_CHANGE, *FOLLOWS) or not key.startswith(OF_A_STEP)
        if not free and was.get(key) != now.get(key):
            raise UserError(
                f"{ckpt} does not match config.yaml: {key}={was.get(key)} in the checkpoint, {now.get(key)} in config.yaml (another run?)"
            )
    if state["data"] != data:
        raise UserError(f"the run trained on {state['data']}, now the data is {data}; restore it, or start a new run")
    if state["tokenizer"] != tokenizer:
        raise UserError(f"the tokenizer of data={data['name']} changed since the run began; start a new run")


def finished_summary(run: Run, state: dict[str, Any], max_steps: int, max_time: str | None) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do; None if there is something left. Raises UserError if it is to end
    before the step that it has reached."""
    step, summary = state["global_step"], run.read_summary()
    if max_steps < step:
        raise UserError(f"trainer.max_steps={max_steps}: the run has already reached step {step}")
    if summary is None or step < summary["steps"]:
        return None
    limits, ended = {"max_steps": max_steps, "max_time": max_time}, summary["ended"]
    was_lifted = ended in limits and limits[ended] != state["config"]["trainer"][ended]
    return None if was_lifted else summary
