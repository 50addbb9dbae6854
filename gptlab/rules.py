"""Conditions that involve several keys of a config, or the machine. config.py asks them where their own keys are right."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

from gptlab.config import ENTRIES, NODES, Memmap, Text, Trainer, is_known
from gptlab.errors import UserError

OPENWEBTEXT = "Skylion007/openwebtext"  # on the Hugging Face hub
RULES: dict[str, list[tuple[tuple[str, ...], Callable[..., Iterator[str]]]]] = {entry: [] for entry in ENTRIES}


def rule(*keys: str, entry: str = "train") -> Callable:
    """A check of several keys together, which yields what is wrong; skipped where one of the keys is wrong by itself."""

    def register(check: Callable) -> Callable:
        RULES[entry].append((keys, check))
        return check

    return register


@rule("model.n_embd", "model.n_head")
def heads_share_the_channels(n_embd: int | None, n_head: int | None) -> Iterator[str]:
    if isinstance(n_embd, int) and isinstance(n_head, int) and n_head and n_embd % n_head:
        yield f"model.n_embd={n_embd} must be divisible by model.n_head={n_head}"


@rule("model")
def model_takes_plain_values(model: dict) -> Iterator[str]:
    for key in model:
        if key.startswith("_") and key != "_target_":
            yield f"unknown key model.{key}; a model is built from _target_ and plain values"


PLACES = {"model": "gptlab.model.", "data": "gptlab.data.", "callbacks": "gptlab.callbacks.",
          "logger": ("gptlab.loggers.", "lightning.pytorch.loggers.")}  # fmt: skip


@rule("model", "data", "callbacks", "logger")
def packages_are_installed(model: dict, data: dict, callbacks: dict | None, logger: dict | None) -> Iterator[str]:
    nodes = {"model": model, "data": data, "logger": logger}
    nodes |= {f"callbacks.{name}": node for name, node in (callbacks or {}).items()}
    for key, node in nodes.items():
        target = node["_target_"] if node else ""
        if node and importlib.util.find_spec(package := target.partition(".")[0]) is None:
            yield f"{key}._target_={target}: package {package!r} not found; install it or run from its folder"
        if target in NODES and not target.startswith(PLACES[key.partition(".")[0]]):
            yield f"{key}._target_={target}: this class does not belong there"
    if logger and logger["_target_"].endswith(".WandbLogger") and importlib.util.find_spec("wandb") is None:
        yield "logger=wandb needs Weights & Biases: pip install 'gptlab[wandb]'"


@rule("trainer.precision", "trainer.accelerator")
def cpus_have_no_fp16(precision: str, accelerator: str) -> Iterator[str]:
    if precision == "fp16" and accelerator == "cpu":
        yield "trainer.precision=fp16 needs a GPU; on a CPU use 32 or bf16"


@rule("trainer.strategy", "trainer.devices", "trainer.num_nodes", "trainer.precision", "callbacks")
def fsdp_has_limits(
    strategy: str, devices: int, num_nodes: int, precision: str, callbacks: dict | None
) -> Iterator[str]:
    if strategy != "fsdp" or devices * num_nodes == 1:
        return
    if precision == "fp16":
        yield "trainer.strategy=fsdp does not work with trainer.precision=fp16; use bf16, 32 or trainer.strategy=ddp"
    for name, node in (callbacks or {}).items():
        if node and node["_target_"] == "gptlab.callbacks.ema.EMA":
            yield f"trainer.strategy=fsdp does not work with EMA (callbacks.{name}); use trainer.strategy=ddp, or leave EMA out"


@rule("trainer.devices", "trainer.num_nodes", "data.batch_size", "data.val_windows")
def each_process_has_work(devices: int, num_nodes: int, batch_size: Any, val_windows: Any) -> Iterator[str]:
    processes = devices * num_nodes
    for key, value in (("batch_size", batch_size), ("val_windows", val_windows)):
        if isinstance(value, int) and value < processes:
            yield f"data.{key}={value} must be >= the number of processes, {processes}"
    started = os.environ.get("WORLD_SIZE", "")  # torchrun's
    if started.isdigit() and int(started) != processes:
        per_node = int(started) // num_nodes if int(started) % num_nodes == 0 else f"{started} trainer.num_nodes=1"
        yield (
            f"{started} processes were started (WORLD_SIZE), but trainer.devices={devices} x trainer.num_nodes="
            f"{num_nodes} is {processes}; add trainer.devices={per_node}"
        )


@rule("data.workers", "trainer.devices", "trainer.accelerator")
def processes_have_cores(workers: Any, devices: int, accelerator: str) -> Iterator[str]:
    keys = {"data.workers": workers} | ({"trainer.devices": devices} if accelerator == "cpu" else {})
    yield from _more_than_cores(keys)


@rule("processes", entry="prepare")
def preparing_has_cores(processes: int | None) -> Iterator[str]:
    yield from _more_than_cores({"processes": processes})


def _more_than_cores(keys: dict[str, Any]) -> Iterator[str]:
    from gptlab.data.files import available_cores

    most = 4 * available_cores()
    for key, value in keys.items():
        if isinstance(value, int) and value > most:
            yield f"{key}={value} must be <= {most}, four times the {most // 4} available cores"


# What gptlab itself tells Lightning's Trainer.
NOT_EXTRA = ("accelerator", "devices", "num_nodes", "strategy", "precision", "max_steps", "max_epochs", "max_time",
             "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "logger", "log_every_n_steps",
             "callbacks", "enable_checkpointing", "plugins", "use_distributed_sampler", "default_root_dir",
             "enable_progress_bar", "enable_model_summary")  # fmt: skip


@rule("trainer.extra")
def extra_is_not_ours(extra: dict) -> Iterator[str]:
    for key in sorted(extra.keys() & NOT_EXTRA):
        instead = f"; use trainer.{key}" if key in Trainer.model_fields else ""
        yield f"trainer.extra.{key} is set by gptlab{instead}"


@rule("optim.lr", "optim.min_lr", "optim.schedule")
def schedule_falls(lr: float, min_lr: float, schedule: str) -> Iterator[str]:
    if schedule != "constant" and min_lr > lr:
        yield f"optim.min_lr={min_lr} must be <= optim.lr={lr}"


@rule("optim.warmup_steps", "optim.decay_steps", "optim.schedule", "trainer.max_steps", "resume")
def warmup_ends(warmup: int | str, decay: int, schedule: str, max_steps: int, resume: str | None) -> Iterator[str]:
    ends = {} if resume else {"trainer.max_steps": max_steps}  # a resume may end a run earlier than planned
    ends |= {"optim.decay_steps": decay} if schedule != "constant" else {}
    for key in sorted(ends, key=ends.get)[:1]:
        if warmup != "auto" and ends[key] <= warmup:
            fix = f"use a larger {key}" if resume else "try optim.warmup_steps=auto"
            yield f"optim.warmup_steps={warmup} must be less than {key}={ends[key]}; {fix}"


@rule("optim.muon_lr", "trainer.strategy", "trainer.devices", "trainer.num_nodes", "trainer.precision")
def muon_has_limits(
    muon_lr: float | None, strategy: str, devices: int, num_nodes: int, precision: str
) -> Iterator[str]:
    if muon_lr is not None and strategy == "fsdp" and devices * num_nodes > 1:
        yield "optim.muon_lr needs whole matrices, trainer.strategy=fsdp splits them; use trainer.strategy=ddp"
    if muon_lr is not None and precision == "fp16":
        yield "optim.muon_lr does not work with trainer.precision=fp16; use bf16 or 32"


@rule("optim.head_lr", "model.tie_weights", "model._target_")
def tied_heads_are_embeddings(head_lr: float | None, tie_weights: Any, target: str) -> Iterator[str]:
    if head_lr is not None and target in NODES and tie_weights:
        yield f"optim.head_lr={head_lr}: the head is tied to the embedding; use optim.embedding_lr, or model.tie_weights=false"


@rule("model.position", "model.n_embd", "model.n_head", "model._target_")
def rotary_turns_pairs(position: Any, n_embd: Any, n_head: Any, target: str) -> Iterator[str]:
    if position == "rotary" and target in NODES and n_embd % (2 * n_head):
        yield f"model.position=rotary needs an even number of channels per head; model.n_embd={n_embd} must be divisible by {2 * n_head}"


@rule("callbacks.profile", "trainer.max_steps", "resume")
def profile_fits(profile: dict | None, max_steps: int, resume: str | None) -> Iterator[str]:
    if profile and is_known(profile) and not resume:
        needed = profile["skip_steps"] + profile["steps"]
        if needed > max_steps:
            yield f"callbacks.profile needs {needed} steps; add trainer.max_steps={needed}"


@rule("callbacks.early_stopping", "callbacks.median_pruning", "callbacks.exact_match", "data._target_")
def accuracy_is_measured(
    early_stopping: dict | None, median_pruning: dict | None, exact_match: dict | None, target: str
) -> Iterator[str]:
    measured = target.startswith("gptlab.data.problems.") and exact_match
    for name, callback in (("early_stopping", early_stopping), ("median_pruning", median_pruning)):
        if callback and callback.get("monitor") == "val/accuracy" and target in NODES and not measured:
            yield f"callbacks.{name}.monitor=val/accuracy requires data=addition or data=sort, and callbacks.exact_match"


def check_metric(metric: str | None, target: str) -> None:
    """Raises UserError if a sweep compares by what its data do not measure."""
    if metric == "val/accuracy" and target in NODES and not target.startswith("gptlab.data.problems."):
        raise UserError("metric=val/accuracy requires data=addition or data=sort")


@rule("data")
def data_files_exist(data: dict) -> Iterator[str]:
    from gptlab.data import files

    kind = NODES.get(data["_target_"])
    try:
        if kind is Memmap:
            files.token_files(data["path"])
        elif kind is Text:
            docs, path, val_path = data["name"] == files.PYTHON_DOCS, data["path"], data["val_path"]
            if (path and docs) or (val_path and (docs or data["url"])):
                paths = f"data.path={path or 'FILE'}{f' data.val_path={val_path}' if val_path else ''}"
                yield f"data={data['name']} has its own text and split; use yours with data=text {paths}"
                return
            if (data["tokenizer"] == "bpe") != (data["vocab_size"] is not None):
                yield _vocab_size_text("data.", data, 1024)
            if data["path"] is not None or (data["url"] is None and data["name"] != files.PYTHON_DOCS):
                files.text_files(data["path"], "data.path")
            if data["val_path"] is not None:
                files.text_files(data["val_path"], "data.val_path")
    except UserError as error:
        yield str(error)


@rule("data", "init_from")
def weights_bring_a_tokenizer(data: dict, init_from: str | None) -> Iterator[str]:
    if data.get("tokenizer") == "init_from" and not init_from:
        yield "data.tokenizer=init_from needs init_from; else use char, bpe or gpt2"


@rule("init_from", "meta")
def meta_describes_weights(init_from: str | None, meta: str | None) -> Iterator[str]:
    if meta is not None and init_from is None:
        yield f"meta={meta}: describes the tokens of nanoGPT's checkpoint; it needs init_from"


@rule("tokenizer", "vocab_size", entry="prepare")
def bpe_has_a_size(tokenizer: str, vocab_size: int | None) -> Iterator[str]:
    if (tokenizer == "bpe") != (vocab_size is not None):
        yield _vocab_size_text("", {"tokenizer": tokenizer, "vocab_size": vocab_size}, 8192)


@rule("out", "path", "hub", entry="prepare")
def out_is_named(out: str | None, path: str | None, hub: str) -> Iterator[str]:
    if out is None and (path is not None or hub != OPENWEBTEXT):
        yield "out is missing: name a folder for the token files, such as out=my_docs"


def _vocab_size_text(at: str, node: dict, example: int) -> str:
    if node["vocab_size"] is None:
        return f"{at}tokenizer=bpe needs {at}vocab_size, such as {at}vocab_size={example}"
    return f"{at}vocab_size={node['vocab_size']} needs {at}tokenizer=bpe"


# Sizing often reads no files; an evaluation has data and nothing else of a run.
RULES["sizing"] = [(keys, check) for keys, check in RULES["train"] if check is not data_files_exist]
RULES["evaluate"] = [(keys, check) for keys, check in RULES["train"] if check is data_files_exist]
