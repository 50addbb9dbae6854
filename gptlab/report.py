"""What a run says at its start and at its end, and how it can be continued."""

import contextlib
import logging
import os
import signal
import subprocess
import traceback
from typing import Any

from gptlab.errors import UserError
from gptlab.run import Run

log = logging.getLogger("gptlab")


def announce(
    run: Run, data: Any, module: Any, trainer: Any, *, notes: list[str], memory: str | None, resumed_at: int | None
) -> None:
    """Say what is about to run; `notes` are texts about the machine, `resumed_at` is a step or None for a new run."""
    from gptlab.callbacks.checkpointing import Checkpointing

    for note in notes:
        log.info(note)
    by = ", linear layers by oneDNN" if module.metadata["config"]["trainer"]["linear"] == "onednn" else ""
    log.info("device: %d x %s, precision %s%s", trainer.world_size, device_name(trainer), trainer.precision, by)
    log.info("data: %s, vocabulary of %d tokens", data.record["name"], data.tokenizer.vocab_size)
    log.info("model: %s parameters", f"{sum(p.numel() for p in module.model.parameters()):,}")
    if memory:
        log.info("memory: %s", memory)
    tokens = f"{data.batch_size * data.block_size:,}"
    log.info("tokens per optimizer step: %s (%d sequences x %d tokens)", tokens, data.batch_size, data.block_size)
    o = module.optim_config
    end = {
        "constant": "",
        "cosine": f", cosine to {o['min_lr']:g} at step {o['decay_steps']}",
        "linear": f", linear to {o['min_lr']:g} in the last {o['cooldown']:.0%} of {o['decay_steps']} steps",
    }[o["schedule"]]
    own = {"blocks by Muon": "muon_lr", "embeddings": "embedding_lr", "head": "head_lr"}
    others = ", ".join(f"{what} {o[key]:g}" for what, key in own.items() if o[key] is not None)
    log.info("learning rate: %g%s after %d warm-up steps%s", o["lr"], others and f" ({others})", o["warmup_steps"], end)
    log.info("run folder: %s", run)
    if not any(isinstance(callback, Checkpointing) for callback in trainer.callbacks):
        log.warning(
            "NO CHECKPOINT will be saved: callbacks.checkpointing is missing (callbacks=[default,NAME] adds NAME)"
        )
    if resumed_at is not None:
        log.info("resuming at step %d%s", resumed_at, "" if resumed_at else ": nothing was saved yet")


def device_name(trainer: Any) -> str:
    import torch

    device = trainer.strategy.root_device
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def summarize(run: Run, trainer: Any, module: Any, data: Any, seconds: float) -> dict[str, Any]:
    """What summary.json holds."""
    from gptlab.callbacks.throughput import Throughput

    checkpoints = ("checkpoints/best.ckpt", "checkpoints/last.ckpt")
    ended, why = _ending(trainer)
    speeds = (callback.tokens_per_s for callback in trainer.callbacks if isinstance(callback, Throughput))
    return {
        "status": "finished",
        "steps": trainer.global_step,
        "ended": ended,  # max_steps | early_stopping | pruned | max_time | callback
        "why": why,
        "best": module.best,
        "last": module.validated,
        "tokens_per_s": next(speeds, None),
        "seconds": seconds,
        "data": data.record,
        "checkpoint": next((path for path in checkpoints if (run.folder / path).exists()), None),
    }


def _ending(trainer: Any) -> tuple[str, str | None]:
    """What ended the run; and a text, where that was not its last step."""
    from lightning.pytorch.callbacks import Timer

    from gptlab.callbacks.early_stopping import EarlyStopping
    from gptlab.callbacks.pruning import MedianPruning

    for kind, ended in ((EarlyStopping, "early_stopping"), (MedianPruning, "pruned")):
        for callback in trainer.callbacks:
            if isinstance(callback, kind) and callback.why:
                return ended, callback.why
    if trainer.global_step >= trainer.max_steps:
        return "max_steps", None
    timer = next(callback for callback in trainer.callbacks if isinstance(callback, Timer))
    if timer.time_remaining() is not None and timer.time_remaining() <= 0:
        return "max_time", "reached trainer.max_time"
    return "callback", "a callback ended it"


def conclude(
    run: Run,
    data: Any,
    summary: dict[str, Any],
    start_step: int,
    *,
    notes: list[str],
    sample_arguments: str,
    trust: bool,
) -> None:
    """Say how the run ended and what to do next, and repeat the warnings among the `notes` of its start. `trust`: whether
    resuming the run takes trust=true."""
    best = summary["best"]
    speed = f", {summary['tokens_per_s']:,.0f} tokens/s while training" if summary["tokens_per_s"] else ""
    if summary["why"]:
        log.info("\nstopped at step %d: %s", summary["steps"], summary["why"])
    log.info("\n%d steps in %.0f s%s", summary["steps"] - start_step, summary["seconds"], speed)
    if best:
        log.info("best validation loss on %s, at step %d:", data.record["name"], best["step"])
        log.info("  %.4f nats per token, %.4f bits per byte", best["val/loss"], best["val/bits_per_byte"])
    if "val/accuracy" in summary["last"]:
        log.info("exact answers at the last step: %.2f %%", 100 * summary["last"]["val/accuracy"])
    for note in notes:
        if "WARNING" in note:
            log.warning(note)
    log.info("run folder: %s", run)
    commands = []
    if summary["checkpoint"]:
        commands += [f"python -m gptlab.sample ckpt={run} {sample_arguments}".rstrip()]
        commands += train_longer(run, summary, trust)
    if any(run.folder.glob("events.out.tfevents.*")):
        commands += [f"tensorboard --logdir {run}"]
    if commands:
        log.info("\nnext:\n  %s", "\n  ".join(commands))


def already_finished(run: Run, summary: dict[str, Any], trust: bool) -> None:
    log.info("this run is finished: %s", summary["why"] or f"all {summary['steps']} steps are done")
    for command in train_longer(run, summary, trust):
        log.info("to train longer:\n  %s", command)


def train_longer(run: Run, summary: dict[str, Any], trust: bool) -> list[str]:
    """The command that lifts the limit which ended the run, if it was one of trainer's."""
    more, optim = 2 * summary["steps"], run.read_config()["optim"]
    decays_to_zero = optim["schedule"] != "constant" and optim["min_lr"] == 0
    steps = f"trainer.max_steps={more}" + f" optim.decay_steps={more}" * decays_to_zero
    limits = {"max_steps": steps, "max_time": "trainer.max_time=null"}
    return [f"{resume_command(run, trust)} {limit}" for ended, limit in limits.items() if ended == summary["ended"]]


def resume_command(run: Run, trust: bool) -> str:
    return f"python -m gptlab.train resume={run}" + " trust=true" * trust


def stopped(what: str, trainer: Any, run: Run, trust: bool, skipped: int | None = None) -> None:
    """Say what ended a run early, and how to resume it; `skipped`: the non-finite steps to skip then."""
    from gptlab import checkpoint

    saved, again, more = "nothing was saved yet", "to start it again", ""
    for path in run.checkpoints()[:1]:
        with contextlib.suppress(UserError):  # damaged, which the resume will say: not to hide what ended the run
            saved = f"the last checkpoint is of step {checkpoint.read(path, mmap=True)['global_step']}"
        again = "to resume"
    if skipped is not None:
        again, more = "to skip its update and resume", f" optim.skip_nonfinite={skipped}"
    step = trainer.global_step  # 0, too, where a resume has yet to read its checkpoint
    log.info("\n%s\n%s%s; %s:", what, f"at step {step}; " if step else "", saved, again)
    log.info("  %s%s", resume_command(run, trust), more)


def ended_early(error: BaseException, trainer: Any, run: Run, trust: bool) -> int:
    """Say what ended a run early, and how to resume it; returns this process's exit status, or raises the error if it is
    shown elsewhere. Where several processes stop together, the first speaks for all, and the others return 0: Lightning
    would kill it if they failed."""
    from gptlab.callbacks.interrupts import Interrupted
    from gptlab.memory import LESS_MEMORY, out_of_memory
    from gptlab.processes import ProcessFailed
    from gptlab.watch import Diverged

    first = trainer.is_global_zero
    if isinstance(error, Interrupted):
        what, status = f"stopped by {error}", 143 if error.signum == signal.SIGUSR1 else 128 + error.signum
    elif isinstance(error, SystemExit) and trainer.interrupted:  # Ctrl-C twice; Lightning would exit with 1
        what, status = "interrupted", 130
    elif isinstance(error, UserError | SystemExit):
        raise error
    elif isinstance(error, RuntimeError) and out_of_memory(error):
        what, status = f"ERROR: {error}\n{LESS_MEMORY}", 1
    elif isinstance(error, Diverged | OSError | ProcessFailed):
        what, status = f"ERROR: {error}", 1
    elif not first:
        traceback.print_exception(error)
        return 1
    else:
        what, status = "".join(traceback.format_exception(error)).rstrip(), 1
    if first:
        stopped(what, trainer, run, trust, skipped=error.skipped if isinstance(error, Diverged) else None)
        if isinstance(error, Interrupted) and error.signum == signal.SIGUSR1:
            requeue()
    return status if first or not isinstance(error, Interrupted | Diverged) else 0


def requeue() -> None:
    """Have SLURM start this job again, of an array the one task."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=20)
        log.info("requeued SLURM job %s", job)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("could not requeue SLURM job %s: %s", job, error)
