"""Going on with a run: which checkpoint, and whether it is this run's and there is anything left to do."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlab import cli
from gptlab import report as reports
from gptlab import run as runs

PLAIN = ("global_step", "config", "tokenizer", "data", "callbacks", "watch")  # of what is in a checkpoint
OF_A_STEP = ("seed", "model.", "data.", "optim.", "trainer.", "callbacks.")  # config that decides what a run computes

log = logging.getLogger("gptlab")


def last_state(run: Path) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint that a resume goes on from, and what is in it but for its tensors, which would stay in memory beside
    those of the run; (None, {}) if the run was stopped before it saved anything, and starts again. What turns out to be
    damaged is set aside under another name.

    Raises:
        ValueError: there are checkpoints, and none of them can be read; or there were some, and they are gone: beginning
            anew, the run would write over what it logged.
    """
    from gptlab import checkpoint

    problems: dict[Path, str] = {}
    for path in runs.checkpoints(run):
        try:
            saved = checkpoint.read(path)
        except ValueError as error:
            problems[path] = str(error)
            continue
        for damaged in problems:
            set_aside(damaged)
        if path.name != "last.ckpt":
            why = "\n".join(problems.values()) or "there is no last.ckpt"
            log.warning("%s: going on from %s, of step %d", why, path.name, saved["global_step"])
        return path, {key: saved[key] for key in PLAIN if key in saved}
    if problems:
        raise ValueError("\n".join([*problems.values(), "there is nothing to go on from: start a new run"]))
    if (run / runs.SAVED).exists():
        raise ValueError(
            f"{run / 'checkpoints'} holds no checkpoint any more, and the run has had some: put them back, or start a new "
            f"run (to begin anew in this folder, remove {run / runs.SAVED})"
        )
    return None, {}


def set_aside(damaged: Path) -> None:
    """Under another name, and with it the best checkpoint if that is the same file."""
    if not cli.is_first_process():
        return
    best = damaged.with_name("best.ckpt")
    for path in [best, damaged] if best.exists() and best.samefile(damaged) else [damaged]:
        path.rename(path.with_name(f"{path.name}.damaged"))


def leaves(config: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of all values, with keys as on the command line."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from leaves(value, f"{at}.{key}".lstrip("."))
    else:
        yield at, config


def check_same_run(ckpt: Path, saved: dict[str, Any], resolved: dict[str, Any]) -> None:
    """Raises ValueError if the checkpoint is not of the run whose config this is, or cannot be gone on from."""
    if "watch" not in saved:
        raise ValueError(f"{ckpt} is of an older gptlab: it can be sampled from, but not gone on with")
    was, now = (dict(leaves(config)) for config in (saved["config"], runs.without_paths(resolved)))
    free = (*cli.RESUME_MAY_CHANGE, "callbacks.checkpointing.every", "data.fallback")
    for key in {**was, **now}:
        if key.startswith(OF_A_STEP) and key not in free and was.get(key) != now.get(key):
            raise ValueError(
                f"{ckpt} is of another run: {key} is {was.get(key)} in it, and {now.get(key)} in config.yaml"
            )


def check_same_data(saved: dict[str, Any], data: Any) -> None:
    """Before anything in the run folder is touched: a resume must go on with the data that the run began with.

    Raises:
        ValueError: the text has changed since.
    """
    was, now = (
        ", ".join(f"{key} {str(value)[:20]}" for key, value in record.items())
        for record in (saved["data"], data.record)
    )
    if saved["data"] != data.record:
        raise ValueError(
            f"the run was trained on other data ({was}) than what is there now ({now}): put the old text back, or start "
            "a new run"
        )
    if saved["tokenizer"] != data.tokenizer.state():
        raise ValueError(f"the run had another tokenizer than what makes tokens of {now} now: start a new run")


def already_finished(run: Path, limits: Any, saved: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do, after saying so; None if there is something left.

    Raises:
        ValueError: it is to end before the step that it has reached.
    """
    from lightning.pytorch.callbacks import Timer

    path, step = run / "summary.json", saved["global_step"]
    if limits.max_steps < step:
        raise ValueError(f"trainer.max_steps={limits.max_steps}: the run has reached step {step} already")
    try:
        summary = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    timer = Timer(limits.max_time)
    timer.load_state_dict(saved["callbacks"].get("Timer", {}))
    if summary["ended"] in ("early_stopping", "callback"):
        log.info("this run has stopped at step %d and is finished: %s", step, summary["why"])
    elif step >= limits.max_steps:
        more = f"{reports.resume_command(run)} trainer.max_steps={2 * step}"
        log.info("this run has finished its %d steps; to train longer:\n  %s", step, more)
    elif summary["ended"] == "max_time" and reports.time_is_over(timer):
        more = f"{reports.resume_command(run)} trainer.max_time=null"
        log.info("this run has stopped at step %d: %s; to train longer:\n  %s", step, summary["why"], more)
    else:
        return None
    return summary
