"""python -m gptlab.train: one training run, from a composed config to a run folder."""

import gc
import json
import logging
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from gptlab import cli, config, runs

log = logging.getLogger("gptlab")


def train(cfg: Any) -> float | None:
    """Train as the config says; returns the best validation loss, which a sweeper minimises (None without validation)."""
    from hydra.core.hydra_config import HydraConfig

    started = time.perf_counter()
    gc.disable()  # until training starts: going through a million new objects would be a quarter of the start
    run = Path(HydraConfig.get().runtime.output_dir)
    resuming = cfg.resume is not None
    config.check(cfg)
    from gptlab import checkpoint

    quiet_lightning()
    settle_machine(cfg)
    ckpt = runs.newest_checkpoint(run) if resuming else None
    saved = checkpoint.read(ckpt, mmap=True) if ckpt else {}
    start_step = saved.get("global_step", 0)
    if saved and (finished := already_finished(run, cfg.trainer, saved)):
        return finished["best"].get("val/loss")

    data = make_data(cfg, resuming)
    if saved:
        check_same_data(saved, data)
    resolved, tokenizer = plain(cfg), data.tokenizer.state()
    module = make_module(resolved, data)
    trainer = make_trainer(cfg, run, data, resuming, start_step)
    if trainer.is_global_zero:
        device = device_name(trainer)
        runs.record(run, resolved, data.record, tokenizer, device, resumed_at=start_step if resuming else None)
        announce(run, data, module, trainer, resuming, start_step)
    fit(trainer, module, data, ckpt, run)
    summary = summarise(run, trainer, module, data, seconds=time.perf_counter() - started)
    if trainer.is_global_zero:
        runs.write_json(run / "summary.json", summary)
        trust = bool(checkpoint.foreign_classes(resolved["model"], tokenizer))
        conclude(run, data, summary, start_step, trust)
    return summary["best"].get("val/loss")


def settle_machine(cfg: Any) -> None:
    """Decide what was left to the machine, and write the decision into the config.

    Raises:
        ValueError: the machine lacks what was asked for: an accelerator, or a compiler.
    """
    import torch

    on_gpu = cfg.trainer.accelerator != "cpu"
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if cfg.model.get("compile") and not on_gpu and not any(shutil.which(compiler) for compiler in compilers):
        raise ValueError(
            f"model.compile=true needs a C++ compiler, and there is neither {' nor '.join(compilers)}: install one, or "
            "leave model.compile=false"
        )
    if on_gpu and not torch.accelerator.is_available():
        raise ValueError(
            "hardware=gpu, but torch sees no accelerator: use hardware=cpu, or install a torch built for yours"
        )
    if cfg.trainer.precision == "auto":
        cuda = on_gpu and torch.cuda.is_available()
        cfg.trainer.precision = (
            ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if cuda else "32"
        )
    if cfg.data.get("workers", 0) is None:
        cfg.data.workers = 2 if on_gpu and torch.cuda.is_available() else 0  # a Mac's would each get a copy of the data
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in 32 bits, as nanoGPT


def quiet_lightning() -> None:
    """Silence what a user can do nothing about: an advert, a second copy of each line, advice on loaders."""
    import lightning  # noqa: F401  (its import installs the handlers)

    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*does not have many workers", ".*dataloader is not resumable", ".*smaller than the logging interval",
                    ".*sync_dist=True", ".*LeafSpec"):  # fmt: skip
        warnings.filterwarnings("ignore", message)


def make_data(cfg: Any, resuming: bool) -> Any:
    """The prepared data module; what preparing it decided goes into the config."""
    from hydra.utils import instantiate

    from gptlab.checkpoint import build_tokenizer
    from gptlab.data.windows import check_data
    from gptlab.tokenizer import BPETokenizer, CharTokenizer, check_tokenizer

    if resuming and cfg.data.get("fallback") is not None:
        cfg.data.fallback = None  # it was not needed then; now it would be another text
    data = instantiate(cfg.data, seed=cfg.seed, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    check_data(data)
    if not isinstance(data.tokenizer, (CharTokenizer, BPETokenizer)):
        check_tokenizer(data.tokenizer, build_tokenizer)
    for key, value in data.resolved.items():
        cfg.data[key] = value
    return data


def plain(cfg: Any) -> dict[str, Any]:
    """The config as plain values, without interpolations, as it is saved."""
    from omegaconf import OmegaConf

    return {**OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True), "resume": None}


def make_module(resolved: dict[str, Any], data: Any) -> Any:
    import lightning as L

    from gptlab.checkpoint import build_model, foreign_classes
    from gptlab.module import GPTModule, check_model

    L.seed_everything(resolved["seed"], verbose=False)
    model = build_model(resolved["model"], data.tokenizer.vocab_size, data.block_size)
    if foreign_classes(resolved["model"], {}):
        check_model(model, data.tokenizer.vocab_size, data.block_size)
    if resolved["model"].get("compile"):
        model.compile()  # in place: the parameters keep their names
    return GPTModule(
        model,
        optim_config=resolved["optim"],
        token_bytes=data.tokenizer.token_bytes(),
        seed=resolved["seed"],
        micro_batch_size=data.micro_batch_size,
        log_every=resolved["trainer"]["log_every"],
        record={"config": runs.without_paths(resolved), "tokenizer": data.tokenizer.state(), "data": data.record},
    )


def make_trainer(cfg: Any, run: Path, data: Any, resuming: bool, start_step: int) -> Any:
    """Lightning's Trainer for this run.

    Raises:
        ValueError: Lightning refuses trainer.strategy, trainer.extra or the like, or the data's tokenizer the prompt.
    """
    import lightning as L
    from hydra.utils import instantiate
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import Checkpoint, Timer

    from gptlab.callbacks.checkpointing import AtomicCheckpointIO
    from gptlab.callbacks.sample_text import SampleText

    callbacks = [instantiate(callback) for callback in (cfg.callbacks or {}).values() if callback is not None]
    for callback in callbacks:
        if isinstance(callback, SampleText):
            callback.encode_prompt(data.tokenizer)  # before anything of the run is written
    t = cfg.trainer
    callbacks.append(Timer(t.max_time, verbose=False))  # without a limit too: a resume may set one
    try:
        return L.Trainer(
            default_root_dir=run,
            accelerator=t.accelerator,
            devices=t.devices,
            num_nodes=t.num_nodes,
            strategy=t.strategy,
            precision=config.PRECISIONS[t.precision],
            max_steps=t.max_steps,
            max_epochs=-1,
            val_check_interval=t.val_every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=-1,  # the whole validation at step 0
            logger=make_loggers(cfg, run, data.record, resuming, start_step),
            log_every_n_steps=t.log_every,
            callbacks=callbacks,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **t.extra,
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ValueError(f"Lightning cannot be set up with these trainer.* values: {error}") from error


def make_loggers(cfg: Any, run: Path, data_record: dict[str, str], resuming: bool, start_step: int) -> list[Any]:
    from hydra.utils import instantiate

    from gptlab.metrics_file import MetricsFile

    loggers = [MetricsFile(run / "metrics.jsonl", start_step, data_record)]
    if cfg.logger is not None:
        # TensorBoard hides what an interrupted run wrote after its last checkpoint
        purge = (
            {"purge_step": start_step and start_step + 1} if resuming and "TensorBoard" in cfg.logger._target_ else {}
        )
        loggers.append(instantiate(cfg.logger, save_dir=str(run), **purge))
    return loggers


def fit(trainer: Any, module: Any, data: Any, ckpt: Path | None, run: Path) -> None:
    from tqdm.contrib.logging import logging_redirect_tqdm

    describe(trainer, module.record["config"])
    gc.freeze()
    gc.enable()
    try:
        with logging_redirect_tqdm():
            trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    except SystemExit:
        if not trainer.interrupted:
            raise
        # Ctrl-C: Lightning has cleaned up, and would exit with 1
        again = "go on from there" if runs.newest_checkpoint(run) else "start it again"
        log.info("\ninterrupted at step %d; %s; to %s:", trainer.global_step, saved_so_far(run), again)
        log.info("  %s", resume_command(run))
        sys.exit(130)


def describe(trainer: Any, resolved: dict[str, Any]) -> None:
    """Tell the loggers what is run; TensorBoard gets the config as a text, and its numbers as hyper-parameters."""
    import yaml
    from lightning.pytorch.loggers import TensorBoardLogger

    for logger in trainer.loggers:
        logger.log_hyperparams(resolved)
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            from torch.utils.tensorboard.summary import hparams

            text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
            logger.experiment.add_text("config", "    " + text.replace("\n", "\n    "))  # indented: Markdown for code
            experiment, start, _end = hparams(hyper_parameters(resolved), dict.fromkeys(config.VALIDATED, 0.0))
            for summary in (experiment, start):
                logger.experiment.file_writer.add_summary(summary)


def hyper_parameters(resolved: dict[str, Any]) -> dict[str, Any]:
    """What experiments differ in, flat and short enough for a table."""
    of_no_effect = ("_target_", "compile", "activation_checkpointing")
    chosen = {"model": resolved["model"], "optim": resolved["optim"], "": {"seed": resolved["seed"]}}
    for group, keys in (("data", ("name", "block_size", "batch_size")), ("trainer", ("max_steps", "precision"))):
        chosen[group] = {key: resolved[group].get(key) for key in keys}
    return {
        f"{group}.{key}".lstrip("."): value if type(value) in (int, float) else str(value)
        for group, values in chosen.items()
        for key, value in values.items()
        if key not in of_no_effect and value is not None
    }


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
    """The summary of a run that has nothing left to do, after saying so; None if there is something left."""
    from lightning.pytorch.callbacks import Timer

    path, step = run / "summary.json", saved["global_step"]
    if not path.exists():
        return None
    summary = json.loads(path.read_text("utf-8"))
    timer = Timer(limits.max_time)
    timer.load_state_dict(saved["callbacks"].get("Timer", {}))
    if summary["ended"] in ("early_stopping", "callback"):
        log.info("this run has stopped at step %d and is finished: %s", step, summary["why"])
    elif step >= limits.max_steps:
        more = f"{resume_command(run)} trainer.max_steps={2 * step}"
        log.info("this run has finished its %d steps; to train longer:\n  %s", step, more)
    elif summary["ended"] == "max_time" and time_is_over(timer):
        more = f"{resume_command(run)} trainer.max_time=null"
        log.info("this run has stopped at step %d: %s; to train longer:\n  %s", step, summary["why"], more)
    else:
        return None
    return summary


def device_name(trainer: Any) -> str:
    import torch

    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def announce(run: Path, data: Any, module: Any, trainer: Any, resuming: bool, start_step: int) -> None:
    if data.warning:
        log.warning("\n*** WARNING: %s ***\n", data.warning)
    parameters = sum(p.numel() for p in module.model.parameters())
    if cli.hardware_note:
        log.info(cli.hardware_note)
    log.info("device: %d x %s, precision %s", trainer.world_size, device_name(trainer), trainer.precision)
    log.info("data: %s, vocabulary of %d tokens", data.record["name"], data.tokenizer.vocab_size)
    log.info("model: %s parameters", f"{parameters:,}")
    tokens = f"{data.batch_size * data.block_size:,}"
    log.info("tokens per optimizer step: %s (%d sequences x %d tokens)", tokens, data.batch_size, data.block_size)
    log.info("run folder: %s", shown(run))
    if resuming:
        log.info("going on at step %d: %s", start_step, saved_so_far(run))


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


def conclude(run: Path, data: Any, summary: dict[str, Any], start_step: int, trust: bool) -> None:
    best, place = summary["best"], shown(run)
    speed = f", {summary['tokens_per_s']:,.0f} tokens/s while training" if summary["tokens_per_s"] else ""
    if summary["why"]:
        log.info("\nstopped at step %d: %s", summary["steps"], summary["why"])
    log.info("\n%d steps in %.0f s%s", summary["steps"] - start_step, summary["seconds"], speed)
    if best:
        log.info("best validation loss on %s, at step %d:", data.record["name"], best["step"])
        log.info("  %.4f nats per token, %.4f bits per byte", best["val/loss"], best["val/bits_per_byte"])
    if "val/accuracy" in summary["last"]:
        log.info("answered exactly, at the last step: %.2f %%", 100 * summary["last"]["val/accuracy"])
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


def resume_command(run: Path) -> str:
    return f"python -m gptlab.train resume={shown(run)}"


def saved_so_far(run: Path) -> str:
    from gptlab import checkpoint

    if ckpt := runs.newest_checkpoint(run):
        return f"the last checkpoint is of step {checkpoint.read(ckpt, mmap=True)['global_step']}"
    return "nothing was saved yet"


def shown(path: Path) -> str:
    """The path as a user would type it here."""
    import shlex

    near = path.is_relative_to(Path.cwd())
    return shlex.quote(os.path.relpath(path) if near else str(path))


if __name__ == "__main__":
    cli.main(train, "train")
