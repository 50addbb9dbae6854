"""What a run says about itself: at its start, at its end, and in its summary."""

import logging
import os
import signal
import subprocess
import textwrap
import traceback
from pathlib import Path
from typing import Any

from gptlab import cli, mistakes
from gptlab import run as runs

log = logging.getLogger("gptlab")


def announce(run: Path, data: Any, module: Any, trainer: Any, memory: str | None, resumed_at: int | None) -> None:
    from gptlab.callbacks.checkpointing import Checkpointing

    if data.warning:
        log.warning("\n*** WARNING: %s ***\n", data.warning)
    parameters = sum(p.numel() for p in module.model.parameters())
    if cli.hardware_note:
        log.info(cli.hardware_note)
    log.info("device: %d x %s, precision %s", trainer.world_size, device_name(trainer), trainer.precision)
    log.info("data: %s, vocabulary of %d tokens", data.record["name"], data.tokenizer.vocab_size)
    log.info("model: %s parameters", f"{parameters:,}")
    if memory:
        log.info(textwrap.fill(f"memory: {memory}", 80, subsequent_indent="  "))
    tokens = f"{data.batch_size * data.block_size:,}"
    log.info("tokens per optimizer step: %s (%d sequences x %d tokens)", tokens, data.batch_size, data.block_size)
    log.info("run folder: %s", runs.shown(run))
    if not any(isinstance(callback, Checkpointing) for callback in trainer.callbacks):
        log.warning(
            "NO CHECKPOINT will be there to resume or sample from: callbacks.checkpointing is left out (in a new run, "
            "callbacks=[default,NAME] adds to the usual ones)"
        )
    if resumed_at is not None:
        log.info("going on at step %d%s", resumed_at, "" if resumed_at else ": nothing was saved yet")


def device_name(trainer: Any) -> str:
    import torch

    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def conclude(run: Path, data: Any, summary: dict[str, Any], start_step: int, hint: str | None, trust: bool) -> None:
    best, place = summary["best"], runs.shown(run)
    speed = f", {summary['tokens_per_s']:,.0f} tokens/s while training" if summary["tokens_per_s"] else ""
    if summary["why"]:
        log.info("\nstopped at step %d: %s", summary["steps"], summary["why"])
    log.info("\n%d steps in %.0f s%s", summary["steps"] - start_step, summary["seconds"], speed)
    if best:
        log.info("best validation loss on %s, at step %d:", data.record["name"], best["step"])
        log.info("  %.4f nats per token, %.4f bits per byte", best["val/loss"], best["val/bits_per_byte"])
    if "val/accuracy" in summary["last"]:
        log.info("answered exactly, at the last step: %.2f %%", 100 * summary["last"]["val/accuracy"])
    if hint:
        log.info(hint)
    if data.warning:
        log.warning("\n*** WARNING: %s ***", data.warning)
    log.info("run folder: %s", place)
    commands = []
    if summary["checkpoint"]:
        longer = {"max_steps": f"trainer.max_steps={2 * summary['steps']}", "max_time": "trainer.max_time=null"}
        commands += [f"python -m gptlab.sample ckpt={place}{' trust=true' * trust}"]
        commands += [f"{resume_command(run)} {longer[summary['ended']]}"] if summary["ended"] in longer else []
    if (run / "tensorboard").is_dir():
        commands += [f"tensorboard --logdir {place}"]
    if commands:
        log.info("\nnext:\n  %s", "\n  ".join(commands))


def ended_early(error: BaseException, trainer: Any, run: Path) -> int:
    """Say what ended a run before its time, and how to go on with it; the exit status, of this process. Where several
    stop together, the first speaks for all, and the others end with 0: Lightning would kill it for their failing.

    Raises:
        BaseException: the error itself, if it is a user's mistake, which is shown elsewhere, or another process's.
    """
    from gptlab.callbacks.interrupts import Interrupted
    from gptlab.memory import LESS_MEMORY, out_of_memory
    from gptlab.watch import Diverged

    first = trainer.is_global_zero
    if isinstance(error, Interrupted):
        what, status = f"stopped by {error}", 143 if error.signum == signal.SIGUSR1 else 128 + error.signum
    elif isinstance(error, SystemExit) and trainer.interrupted:  # Ctrl-C twice; Lightning would exit with 1
        what, status = "interrupted", 130
    elif isinstance(error, RuntimeError) and out_of_memory(error):
        what, status = f"ERROR: {error}\n{LESS_MEMORY}", 1
    elif isinstance(error, (Diverged, OSError)):
        what, status = f"ERROR: {error}", 1
    else:
        mistake = mistakes.explain(error, composing=False) is not None
        what, status = "" if mistake else traceback.format_exc().rstrip(), 1
        if mistake or isinstance(error, SystemExit) or not first:
            raise error
    if first:
        again, more = "to go on from there" if runs.checkpoints(run) else "to start it again", ""
        if isinstance(error, Diverged):
            again, more = "to leave its update out and go on", f" optim.skip_nonfinite={error.skipped}"
        step = trainer.global_step  # 0, too, where a resume has yet to read its checkpoint
        reached = f"at step {step}; " if step else ""
        log.info("\n%s\n%s%s; %s:", what, reached, saved_so_far(run), again)
        log.info("  %s%s", resume_command(run), more)
        if isinstance(error, Interrupted) and error.signum == signal.SIGUSR1:
            requeue()
    return status if first or not isinstance(error, (Interrupted, Diverged)) else 0


def requeue() -> None:
    """Have SLURM start this job again, as it asked for with its signal."""
    job, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=20)
        log.info("requeued SLURM job %s", job)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("SLURM job %s could not be requeued: %s", job, error)


def resume_command(run: Path) -> str:
    return f"python -m gptlab.train resume={runs.shown(run)}"


def saved_so_far(run: Path) -> str:
    from gptlab import checkpoint

    for ckpt in runs.checkpoints(run)[:1]:
        try:
            return f"the last checkpoint is of step {checkpoint.read(ckpt, mmap=True)['global_step']}"
        except ValueError as error:
            return str(error)
    return "nothing was saved yet"


def summarise(run: Path, trainer: Any, module: Any, data: Any, seconds: float) -> dict[str, Any]:
    from gptlab.callbacks.throughput import Throughput

    checkpoints = [f"checkpoints/{name}.ckpt" for name in ("best", "last")]
    ended, why = ending(trainer)
    speeds = [callback.tokens_per_s for callback in trainer.callbacks if isinstance(callback, Throughput)]
    return {
        "status": "finished",
        "steps": trainer.global_step,
        "ended": ended,  # max_steps | early_stopping | max_time | callback
        "why": why,
        "best": module.best,
        "last": module.validated,
        "tokens_per_s": speeds[0] if speeds else None,
        "seconds": seconds,
        "data": data.record,
        "checkpoint": next((path for path in checkpoints if (run / path).exists()), None),
    }


def ending(trainer: Any) -> tuple[str, str | None]:
    """What ended the run; and in words, where it was not the last of its steps."""
    from lightning.pytorch.callbacks import Timer

    from gptlab.callbacks.early_stopping import EarlyStopping

    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and callback.why:
            return "early_stopping", callback.why
    if trainer.global_step >= trainer.max_steps:
        return "max_steps", None
    if any(time_is_over(callback) for callback in trainer.callbacks if isinstance(callback, Timer)):
        return "max_time", "the time that trainer.max_time allows is over"
    return "callback", "a callback ended it"


def time_is_over(timer: Any) -> bool:
    remaining = timer.time_remaining()
    return remaining is not None and remaining <= 0
