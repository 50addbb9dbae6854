"""python -m gptlab.train: one training run, from a checked config to a finished run folder.

config -> data -> memory estimate -> module -> trainer -> fit -> summary.json
"""

import functools
import gc
import logging
import os
import shutil
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

from gptlab import cli, config, processes, report, resume
from gptlab.errors import UserError
from gptlab.run import Run, is_first_process

log = logging.getLogger("gptlab")


def train(cfg: config.Train) -> float | None:
    """Train as the config says; returns the best validation loss, which a sweeper minimizes (None without validation)."""
    from hydra.core.hydra_config import HydraConfig

    started = time.perf_counter()
    processes.end_with_parent()
    if not is_first_process():
        logging.disable()  # the first one speaks for all
    gc.disable()  # until training starts: tracing a million new objects would be a quarter of the start
    run = Run(HydraConfig.get().runtime.output_dir)
    import_lightning()
    from gptlab.loggers import make_loggers

    resolve_autos(cfg)
    ckpt, state = resume.find_state(run) if cfg.resume else (None, {})
    trust = bool(config.foreign_parts(cfg.model_dump()))  # what a resume will need
    if state and (summary := resume.finished_summary(run, state, cfg.trainer.max_steps, cfg.trainer.max_time)):
        report.already_finished(run, summary, trust=trust)
        return summary["best"].get("val/loss")

    source = open_source(cfg, state)
    data = make_data(cfg.data, cfg.seed, source.tokenizer if source else saved_tokenizer(state))
    if source:
        check_same_tokenizer(data, source)
    saved_config, tokenizer = {**cfg.model_dump(), "resume": None, "trust": False}, data.tokenizer.state()
    if state:
        resume.check_same_run(ckpt, state, saved_config, data.record, tokenizer)
    memory = check_memory(cfg, data)
    module = make_module(cfg, data, saved_config, source)
    trainer = make_trainer(cfg, run, data, make_loggers(cfg.logger, run, data.record, state, bool(cfg.resume)))
    start_step = state.get("global_step", 0)
    if trainer.is_global_zero:
        resumed_at = start_step if cfg.resume else None
        device = report.device_name(trainer)
        run.write_description(saved_config, data=data.record, tokenizer=tokenizer, device=device, resumed_at=resumed_at)
        report.announce(run, data, module, trainer, notes=cli.notes, memory=memory, resumed_at=resumed_at)
    fit(trainer, module, data, ckpt, run, trust)
    summary = report.summarize(run, trainer, module, data, seconds=time.perf_counter() - started)
    if trainer.is_global_zero:
        run.write_summary(summary)
        arguments = sample_arguments(cfg, tokenizer)
        report.conclude(run, data, summary, start_step, notes=cli.notes, sample_arguments=arguments, trust=trust)
    return summary["best"].get("val/loss")


def resolve_autos(cfg: config.Train) -> None:
    """Decide what the config leaves open, and write the decision into it.

    Raises:
        UserError: the machine lacks what was asked for: an accelerator, or a compiler.
    """
    import torch

    from gptlab import linear
    from gptlab.data.files import available_cores

    t, on_gpu = cfg.trainer, cfg.trainer.accelerator != "cpu"
    if on_gpu and not torch.accelerator.is_available():
        key = "trainer.accelerator" if cfg.resume else "hardware"
        raise UserError(f"{key}=gpu, but torch sees no accelerator; use {key}=cpu, or install a torch built for yours")
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if cfg.model.get("compile") and not on_gpu and not any(map(shutil.which, compilers)):
        raise UserError(
            f"model.compile=true needs a C++ compiler ({' or '.join(compilers)}); install one, or leave it out"
        )
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in 32 bits, as in nanoGPT
    cuda = on_gpu and torch.cuda.is_available()
    if t.precision == "auto":
        t.precision = "bf16" if not on_gpu and linear.fast_bf16() else "32"
        if cuda:
            half = "fp16" if cfg.optim.muon_lr is None else "32"  # Muon refuses fp16
            t.precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else half
    resolve_linear(cfg)
    if cfg.optim.warmup_steps == "auto":
        cfg.optim.warmup_steps = min(100, t.max_steps // 10)
    workers = cfg.data.get("workers", 0)
    if workers is None:
        cfg.data["workers"] = 2 if cuda else 0  # on a Mac, each would get a copy of the data
    elif workers > (cores := available_cores()):
        cli.notes.append(f"WARNING: data.workers={workers} is more than the {cores} available cores")
    if t.threads == "auto":
        share = 1 if "OMP_NUM_THREADS" in os.environ else t.devices
        t.threads = max(1, torch.get_num_threads() // share)
    if t.threads != torch.get_num_threads():
        torch.set_num_threads(t.threads)
    if t.devices > 1:
        os.environ["OMP_NUM_THREADS"] = str(t.threads)  # or Lightning would choose, for this process and its children
    if note := cli.busy_note(torch.get_num_threads()):
        cli.notes.append(note)


def resolve_linear(cfg: config.Train) -> None:
    """Decide about the linear layers, once the precision is known. Raises UserError if torch lacks those asked for."""
    from gptlab import linear, machine

    t = cfg.trainer
    if t.linear == "auto":
        t.linear = machine.fastest_linear() if machine.linear_matters(cfg) else "torch"
    elif t.linear == "onednn" and (t.accelerator != "cpu" or t.precision != "32" or cfg.model.get("compile")):
        t.linear = "torch"
        note = "trainer.linear=onednn: only for float32 on a CPU, without model.compile; torch's layers are used"
        cli.notes.append(note)
    if t.linear == "onednn" and not linear.has_operators():
        raise UserError("trainer.linear=onednn: this torch lacks oneDNN's operators; use trainer.linear=torch")


def import_lightning() -> None:
    """Import Lightning sooner and quieter: without advertisements, duplicated lines, and advice on loaders.

    torchmetrics imports all of scipy.signal, which takes a second, only to add a name of old versions to it.
    """
    placeholder = types.SimpleNamespace(hamming=None)
    absent = sys.modules.setdefault("scipy.signal", placeholder) is placeholder
    try:
        import lightning  # noqa: F401
    finally:
        if absent:
            del sys.modules["scipy.signal"]
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*does not have many workers", ".*dataloader is not resumable", ".*smaller than the logging interval",
                    ".*sync_dist=True", ".*LeafSpec"):  # fmt: skip
        warnings.filterwarnings("ignore", message)


def open_source(cfg: config.Train, state: dict[str, Any]) -> Any:
    """The weights that the run starts from; None if it starts from random ones, or from a checkpoint of its own."""
    if cfg.init_from is None or state:
        return None
    from gptlab import sources

    try:
        source = sources.load(cfg.init_from, meta=cfg.meta, trust=cfg.trust)
    except UserError as error:
        if cfg.resume:
            raise UserError(
                f"{error}\nnothing was saved yet, so that the run starts from these weights again; put them back, or start a new run"
            ) from None
        raise
    cli.notes.append(f"weights: those of {source.name}")
    kept, whole = cfg.data.get("block_size"), source.config["data"].get("block_size")
    if kept and kept != whole:
        cli.notes.append(
            f"data.block_size={kept}: the weights have {whole} positions, of which the first {kept} are kept; data.block_size={whole} keeps all"
        )
    return source


def saved_tokenizer(state: dict[str, Any]) -> Any:
    """That of the checkpoint that a run resumes from; None for a new run."""
    from gptlab.checkpoint import build_tokenizer

    return build_tokenizer(state["tokenizer"]) if state else None


def make_data(node: dict[str, Any], seed: int, tokenizer: Any = None) -> Any:
    """The prepared data module; what its preparation decided goes into the config's node. `tokenizer` is used where the
    node says so: tokenizer=init_from."""
    from gptlab.checkpoint import build_tokenizer
    from gptlab.contracts import check_data, check_tokenizer
    from gptlab.targets import instantiate
    from gptlab.tokenizer import BPETokenizer, CharTokenizer

    inherited = {"tokenizer": tokenizer} if node.get("tokenizer") == "init_from" else {}
    data = instantiate("data", node, seed=seed, **inherited)
    data.prepare_data()
    data.setup("fit")
    check_data(data)
    if not isinstance(data.tokenizer, CharTokenizer | BPETokenizer):
        check_tokenizer(data.tokenizer, build_tokenizer)
    node.update(data.resolved)
    return data


def check_same_tokenizer(data: Any, source: Any) -> None:
    """Raises UserError unless the data are in the tokens of the weights."""
    if data.tokenizer.state() != source.tokenizer.state():
        sizes = f"{data.tokenizer.vocab_size:,} and {source.tokenizer.vocab_size:,}"
        raise UserError(
            f"data={data.name} has other tokens than {source.name} ({sizes}); a text (data=text data.path=FILE) is encoded "
            "with the tokens of the weights: leave data.tokenizer out; other data must be prepared with them"
        )


def check_memory(cfg: config.Train, data: Any) -> str | None:
    """A line about the memory that training takes; None where it cannot be told.

    Raises:
        UserError: it does not fit. Nothing of that size has been allocated.
    """
    import torch

    from gptlab import memory
    from gptlab.checkpoint import build_model

    t = cfg.trainer
    device = torch.device("cpu") if t.accelerator == "cpu" else torch.accelerator.current_accelerator()
    processes = t.devices * t.num_nodes
    sequences = -(-data.batch_size // processes)
    targets = [callback["_target_"] for callback in (cfg.callbacks or {}).values() if callback]
    estimate = functools.partial(
        memory.estimate_step,
        functools.partial(build_model, cfg.model, data.tokenizer.vocab_size, data.block_size),
        block_size=data.block_size,
        sequences=sequences,
        precision=t.precision,
        optim_config=cfg.optim.model_dump(),
        device_type=device.type,
        averaged="gptlab.callbacks.ema.EMA" in targets,
        distributed=processes > 1 and not is_sharded(t),
        shards=processes if is_sharded(t) else 1,
    )
    micro_batch_size = min(data.micro_batch_size or sequences, sequences)
    available = memory.capacity(device) // (t.devices if device.type == "cpu" else 1)
    return memory.check_fits(lambda size: estimate(micro_batch_size=size), micro_batch_size, available)


def make_module(cfg: config.Train, data: Any, saved_config: dict[str, Any], source: Any = None) -> Any:
    """The LightningModule around the model, which starts from the weights of `source`; `saved_config` goes into
    checkpoints."""
    import lightning as L

    from gptlab import linear, optim
    from gptlab.checkpoint import GPT_TARGET, build_model, portable_config
    from gptlab.contracts import check_model
    from gptlab.module import GPTModule as Module

    if is_sharded(cfg.trainer):
        from gptlab.fsdp import ShardedGPTModule as Module
    L.seed_everything(cfg.seed, verbose=False)
    model = build_model(cfg.model, data.tokenizer.vocab_size, data.block_size)
    if cfg.model["_target_"] != GPT_TARGET:
        check_model(model, data.tokenizer.vocab_size, data.block_size)
        try:
            optim.build(model, fused=False, **cfg.optim.model_dump())
        except ValueError as error:
            raise UserError(f"optim.muon_lr, optim.embedding_lr, optim.head_lr: {error}; leave those out") from None
    if source:
        source.copy_to(model)
    if cfg.trainer.linear == "onednn":
        linear.use_onednn(model)
    if cfg.model.get("compile"):
        model.compile()  # in place: the parameters keep their names
    return Module(
        model,
        optim_config=cfg.optim.model_dump(),
        token_bytes=data.tokenizer.token_bytes(),
        seed=cfg.seed,
        micro_batch_size=data.micro_batch_size,
        log_every=cfg.trainer.log_every,
        metadata={"config": portable_config(saved_config), "tokenizer": data.tokenizer.state(), "data": data.record},
    )


def is_sharded(trainer: config.Trainer) -> bool:
    """With a single process there is nothing to share."""
    return trainer.strategy == "fsdp" and trainer.devices * trainer.num_nodes > 1


def make_trainer(cfg: config.Train, run: Run, data: Any, loggers: list[Any]) -> Any:
    """Lightning's Trainer for this run.

    Raises:
        UserError: Lightning refuses trainer.strategy or trainer.extra, or the tokenizer the prompt of sample_text.
    """
    import lightning as L
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import Timer

    from gptlab.callbacks.checkpointing import AtomicCheckpointIO
    from gptlab.callbacks.display import SampleText
    from gptlab.callbacks.interrupts import Interrupts
    from gptlab.targets import instantiate

    callbacks = [instantiate(f"callbacks.{name}", node) for name, node in (cfg.callbacks or {}).items() if node]
    for callback in callbacks:
        if isinstance(callback, SampleText):
            callback.encode_prompt(data.tokenizer)  # before anything of the run is written
    t, strategy = cfg.trainer, cfg.trainer.strategy
    if strategy == "fsdp":
        from gptlab.fsdp import FSDP

        strategy = FSDP(t.devices * t.num_nodes) if is_sharded(t) else "auto"
    callbacks += [Timer(t.max_time, verbose=False), Interrupts()]  # a timer without a limit, too: a resume may set one
    try:
        return L.Trainer(
            default_root_dir=run.folder,
            accelerator=t.accelerator,
            devices=t.devices,
            num_nodes=t.num_nodes,
            strategy=strategy,
            precision=config.PRECISIONS[t.precision],
            max_steps=t.max_steps,
            max_epochs=-1,
            val_check_interval=t.val_every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=-1,  # the whole validation at step 0
            logger=loggers,
            log_every_n_steps=t.log_every,
            callbacks=callbacks,
            enable_checkpointing=True,  # for Interrupts; what is saved, and when, is up to Checkpointing
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **t.extra,
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UserError(f"Lightning refuses these trainer.* values: {error}") from error


def fit(trainer: Any, module: Any, data: Any, ckpt: Path | None, run: Run, trust: bool) -> None:
    """Train; if anything ends that early, say how to resume and exit."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    from gptlab.callbacks.interrupts import Interrupted, Interrupts

    for logger in trainer.loggers:
        logger.log_hyperparams(module.metadata["config"])
    gc.freeze()
    gc.enable()
    interrupts = next(callback for callback in trainer.callbacks if isinstance(callback, Interrupts))
    others = processes.Processes(lambda failure: report.stopped(f"ERROR: {failure}", trainer, run, trust))
    try:
        with logging_redirect_tqdm(), others.watching(), interrupts.listening(trainer):
            trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    except (Exception, SystemExit, Interrupted) as error:
        sys.exit(report.ended_early(error, trainer, run, trust=trust))


def sample_arguments(cfg: config.Train, tokenizer: dict[str, Any]) -> str:
    """What `gptlab.sample` needs besides the run folder, for the advice at the end."""
    from gptlab.checkpoint import GPT_TARGET
    from gptlab.data.notation import notation_of
    from gptlab.targets import foreign_targets

    notation = notation_of(cfg.data)
    prompt = f"prompt='{notation.example}' temperature=0 " if notation else ""
    return prompt + "trust=true" * bool(foreign_targets(cfg.model, {GPT_TARGET}) + foreign_targets(tokenizer, ()))


if __name__ == "__main__":
    cli.main(train, "train")
