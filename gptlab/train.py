"""python -m gptlab.train: one training run, from a composed config to a run folder."""

import dataclasses
import gc
import logging
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from gptlab import cli, config, report, resume
from gptlab.run import Run

log = logging.getLogger("gptlab")


def train(cfg: Any) -> float | None:
    """Train as the config says; returns the best validation loss, which a sweeper minimises (None without validation)."""
    from hydra.core.hydra_config import HydraConfig

    started = time.perf_counter()
    gc.disable()  # until training starts: going through a million new objects would be a quarter of the start
    run = Run(HydraConfig.get().runtime.output_dir)
    resuming = cfg.resume is not None
    config.check(cfg)
    from gptlab import checkpoint, targets
    from gptlab.loggers import make_loggers

    quiet_lightning()
    settle_machine(cfg)
    ckpt, saved = resume.find_state(run) if resuming else (None, {})
    start_step = saved.get("global_step", 0)
    t = cfg.trainer
    if saved and (finished := resume.finished_summary(run, saved, t.max_steps, t.max_time)):
        report.already_finished(run, finished)
        return finished["best"].get("val/loss")

    data = make_data(cfg, resuming)
    resolved, tokenizer = plain(cfg), data.tokenizer.state()
    if saved:
        resume.check_same_run(ckpt, saved, resolved, data.record, tokenizer)
    memory = check_memory(resolved, data)
    module = make_module(resolved, data)
    trust = bool(targets.foreign_targets(resolved, cli.KNOWN))
    loggers = make_loggers(resolved["logger"], run, data.record, saved, resuming)
    trainer = make_trainer(cfg, run.folder, data, loggers)
    resumed_at = start_step if resuming else None
    if trainer.is_global_zero:
        device = report.device_name(trainer)
        run.write_record(resolved, data=data.record, tokenizer=tokenizer, device=device, resumed_at=resumed_at)
        report.announce(run, data, module, trainer, hardware=cli.hardware_note, memory=memory, resumed_at=resumed_at)
    fit(trainer, module, data, ckpt, run, trust)
    summary = report.summarize(run, trainer, module, data, seconds=time.perf_counter() - started)
    if trainer.is_global_zero:
        run.write_summary(summary)
        custom = targets.foreign_targets([resolved["model"], tokenizer], {checkpoint.GPT_TARGET})
        report.conclude(run, data, summary, start_step, sample_arguments="trust=true" if custom else "", trust=trust)
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
        key = "hardware" if cfg.resume is None else "trainer.accelerator"
        raise ValueError(f"{key}=gpu, but torch sees no accelerator: use {key}=cpu, or install a torch built for yours")
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
    from gptlab.contracts import check_data, check_tokenizer
    from gptlab.tokenizer import BPETokenizer, CharTokenizer

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

    return {**OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True), "resume": None, "trust": False}


def check_memory(resolved: dict[str, Any], data: Any) -> str | None:
    """An estimate in words, made before anything of that size is allocated; None for a model of a user's own.

    Raises:
        ValueError: it cannot fit; the text has the numbers.
    """
    import torch

    from gptlab import memory
    from gptlab.checkpoint import GPT_TARGET

    t = resolved["trainer"]
    if resolved["model"]["_target_"] != GPT_TARGET:
        return None
    device = torch.device("cpu") if t["accelerator"] == "cpu" else torch.accelerator.current_accelerator()
    share = -(-data.batch_size // (t["devices"] * t["num_nodes"]))
    targets = [callback["_target_"] for callback in (resolved["callbacks"] or {}).values() if callback is not None]
    averaged = config.EMAConfig._target_ in targets

    def estimate_of(micro_batch_size: int) -> memory.Estimate:
        sizes = (data.tokenizer.vocab_size, data.block_size, micro_batch_size)
        several = micro_batch_size < share
        estimate = memory.estimate(resolved["model"], *sizes, t["precision"], device.type, accumulates=several)
        return dataclasses.replace(estimate, parameters=(1 + averaged) * estimate.parameters)

    size, room = min(data.micro_batch_size or share, share), memory.capacity(device)
    memory.check_fits(estimate_of, size, room)
    return f"{memory.in_words(estimate_of(size))} besides Python's and torch's own; there are {memory.human(room)}"


def make_module(resolved: dict[str, Any], data: Any) -> Any:
    import lightning as L

    from gptlab.checkpoint import GPT_TARGET, build_model, portable_config
    from gptlab.contracts import check_model
    from gptlab.module import GPTModule

    L.seed_everything(resolved["seed"], verbose=False)
    model = build_model(resolved["model"], data.tokenizer.vocab_size, data.block_size)
    if resolved["model"]["_target_"] != GPT_TARGET:
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
        record={"config": portable_config(resolved), "tokenizer": data.tokenizer.state(), "data": data.record},
    )


def make_trainer(cfg: Any, run: Path, data: Any, loggers: list[Any]) -> Any:
    """Lightning's Trainer for this run.

    Raises:
        ValueError: Lightning refuses trainer.strategy, trainer.extra or the like, or the data's tokenizer the prompt.
    """
    import lightning as L
    from hydra.utils import instantiate
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import Timer

    from gptlab.callbacks.checkpointing import AtomicCheckpointIO
    from gptlab.callbacks.interrupts import Interrupts
    from gptlab.callbacks.sample_text import SampleText

    callbacks = [instantiate(callback) for callback in (cfg.callbacks or {}).values() if callback is not None]
    for callback in callbacks:
        if isinstance(callback, SampleText):
            callback.encode_prompt(data.tokenizer)  # before anything of the run is written
    t = cfg.trainer
    callbacks.append(Timer(t.max_time, verbose=False))  # without a limit too: a resume may set one
    callbacks.append(Interrupts())
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
            logger=loggers,
            log_every_n_steps=t.log_every,
            callbacks=callbacks,
            enable_checkpointing=True,  # for Interrupts; what is saved, and when, is Checkpointing's
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **t.extra,
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ValueError(f"Lightning cannot be set up with these trainer.* values: {error}") from error


def fit(trainer: Any, module: Any, data: Any, ckpt: Path | None, run: Run, trust: bool) -> None:
    """Train; whatever ends that early, say how to go on."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    from gptlab.callbacks.interrupts import Interrupted, Interrupts

    describe(trainer, module.record["config"])
    gc.freeze()
    gc.enable()
    interrupts = next(callback for callback in trainer.callbacks if isinstance(callback, Interrupts))
    try:
        with logging_redirect_tqdm(), interrupts.listening(trainer):
            trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    except (Exception, SystemExit, Interrupted) as error:
        sys.exit(report.ended_early(error, trainer, run, trust=trust))


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


if __name__ == "__main__":
    cli.main(train, "train")
