"""Resuming a run: what may change, whether the checkpoint is of this run and its data, and whether anything is left to do."""

import difflib
import json
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
    "trainer.keep_every", "data.workers", "data.micro_batch_size", "data.path", "data.val_path", "data.folder",
)  # fmt: skip
FOLLOWS = ("callbacks.checkpointing.every", "callbacks.checkpointing.keep_every", "data.fallback")  # from the above
OF_A_STEP = ("seed", "model.", "data.", "optim.", "trainer.", "callbacks.")  # config that decides what a run computes
STATE = ("global_step", "config", "tokenizer", "data", "callbacks", "watch")  # the non-tensors of a checkpoint

log = logging.getLogger("gptlab")


def check_changes(keys: Collection[str]) -> None:
    """Raises UserError for keys of the command line that a resume cannot change."""
    refused = [key for key in keys if key not in RESUME_MAY_CHANGE]
    if refused:
        names = {key.rpartition(".")[2]: key for key in RESUME_MAY_CHANGE}
        close = [difflib.get_close_matches(key.rpartition(".")[2], names, 1, 0.8) for key in refused]
        meant = ", ".join(names[match] for matches in close for match in matches)
        raise UserError(
            f"a resumed run keeps its config; cannot change {', '.join(refused)}"
            + (f" (did you mean {meant}?)" if meant else "")
            + f"; can change {', '.join(RESUME_MAY_CHANGE)}; for anything else start a new run"
        )
    if "optim.decay_steps" in keys and "trainer.max_steps" not in keys:
        raise UserError("optim.decay_steps is the schedule of a longer run: give trainer.max_steps with it")


def find_state(run: Run) -> tuple[Path | None, dict[str, Any]]:
    """The newest readable checkpoint and its non-tensor state; `(None, {})` if nothing was saved yet. Damaged newer ones
    are renamed.

    Raises:
        UserError: no checkpoint can be read, it is of an older gptlab, or all were lost: restarting would overwrite what
            the run logged.
    """
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
            raise UserError(f"{path} is of an older gptlab: it can be sampled from, but not resumed")
        if path.name != "last.ckpt":
            why = "\n".join(damaged.values()) or "last.ckpt is missing"
            log.warning("%s: resuming from %s, of step %d", why, path.name, content["global_step"])
        return path, {key: content[key] for key in STATE}
    if damaged:
        raise UserError("\n".join([*damaged.values(), "no checkpoint left to resume from; start a new run"]))
    if (run.folder / SAVED).exists():
        raise UserError(
            f"{run} has lost its checkpoints; restore them, or start a new run (to restart in this folder, remove "
            f"{run.folder / SAVED})"
        )
    return None, {}


def _rename_damaged(paths: Collection[Path]) -> None:
    for damaged in paths:
        best = damaged.with_name("best.ckpt")
        for path in [best, damaged] if best.exists() and best.samefile(damaged) else [damaged]:
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
    """Compare a checkpoint with the run that is to be resumed, before anything in its folder is touched.

    Args:
        config: plain values; data: name and checksums of what is on disk now; tokenizer: its state.

    Raises:
        UserError: the checkpoint is of another run or of other data.
    """
    was, now = dict(leaf_values(state["config"])), dict(leaf_values(config))
    for key in {**was, **now}:
        free = key in RESUME_MAY_CHANGE or key in FOLLOWS or not key.startswith(OF_A_STEP)
        if not free and was.get(key) != now.get(key):
            raise UserError(
                f"{ckpt} is of another run: {key} is {was.get(key)} in it, and {now.get(key)} in config.yaml"
            )
    if state["data"] != data:
        before, after = (json.dumps({k: str(v)[:20] for k, v in record.items()}) for record in (state["data"], data))
        raise UserError(
            f"the run trained on {before}, and the data is {after} now; restore the old data, or start a new run"
        )
    if state["tokenizer"] != tokenizer:
        raise UserError(f"the tokenizer of data={data['name']} changed since the run began; start a new run")


def finished_summary(run: Run, state: dict[str, Any], max_steps: int, max_time: str | None) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do; None if there is something left.

    Raises:
        UserError: it is to end before the step that it has reached.
    """
    step, summary = state["global_step"], run.read_summary()
    if max_steps < step:
        raise UserError(f"trainer.max_steps={max_steps}: the run has already reached step {step}")
    if summary is None or step < summary["steps"]:
        return None
    limits, before = {"max_steps": max_steps, "max_time": max_time}, state["config"]["trainer"]
    ended = summary["ended"]
    return None if ended in limits and limits[ended] != before[ended] else summary
