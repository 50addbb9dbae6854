"""What a config may hold: a dataclass for every node that gptlab owns, where conf/ is, and one check across keys.

The dataclasses give names and types; the values live in conf/. Only the standard library is imported here, so that
composing a config stays fast.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MISSING: Any = "???"  # OmegaConf's mark of a value that must be given
PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}  # ours -> Lightning's

_package = Path(__file__).resolve().parent
CONF = next(p for p in (_package / "conf", _package.parent / "conf") if p.is_dir())  # a wheel's, a checkout's


@dataclass
class GPTConfig:
    _target_: str = "gptlab.model.GPT"
    n_layer: int = MISSING
    n_head: int = MISSING
    n_embd: int = MISSING
    dropout: float = 0.0
    bias: bool = False
    gelu: str = "erf"  # or tanh, GPT-2's
    vocab_multiple: int = 1
    activation_checkpointing: bool = False  # less memory, about a third more time
    compile: bool = False  # torch.compile, in place


@dataclass
class WindowsConfig:
    """What every data set of token windows takes."""

    name: str = MISSING
    block_size: int = MISSING  # tokens that the model sees at once
    batch_size: int = MISSING  # sequences per optimizer step, over all processes
    micro_batch_size: int | None = None  # sequences per forward pass in one process; null: its whole share
    val_windows: int | None = None  # validate on the first so many windows; null: on all
    workers: int = 0  # processes that prepare batches


@dataclass
class CharConfig(WindowsConfig):
    _target_: str = "gptlab.data.char.CharData"
    path: str | None = None  # a text file, a glob, or a folder of .txt files
    val_path: str | None = None  # the same for validation; null: the last 10 % of the text
    url: str | None = None  # where to download it from otherwise
    sha256: str | None = None  # of that file
    fallback: str | None = None  # python_docs: train on that text if there is no file and no network; null: an error
    folder: str | None = None  # of downloads; null: $GPTLAB_DATA, or ~/.cache/gptlab


@dataclass
class OptimConfig:
    lr: float = MISSING
    min_lr: float = MISSING
    schedule: str = MISSING  # cosine | constant
    warmup_steps: int = MISSING
    decay_steps: int = MISSING
    weight_decay: float = MISSING
    betas: tuple[float, float] = MISSING
    grad_clip: float = MISSING  # norm; 0: off


@dataclass
class TrainerConfig:
    max_steps: int = MISSING
    val_every: int = MISSING
    log_every: int = MISSING
    checkpoint_every: int = MISSING
    accelerator: str = MISSING
    devices: int = MISSING
    num_nodes: int = MISSING
    strategy: str = MISSING
    precision: str = MISSING  # auto | 32 | bf16 | fp16
    max_time: str | None = None  # DD:HH:MM:SS of training, over all resumes; null: no limit
    extra: dict[str, Any] = field(default_factory=dict)  # passed to lightning.Trainer as it is


@dataclass
class ProgressConfig:
    _target_: str = "gptlab.callbacks.progress.Progress"


@dataclass
class SampleTextConfig:
    _target_: str = "gptlab.callbacks.sample_text.SampleText"
    prompt: str | None = None  # null: the line break, where the vocabulary has it
    max_new_tokens: int = MISSING
    temperature: float = MISSING
    top_k: int | None = None


@dataclass
class ThroughputConfig:
    _target_: str = "gptlab.callbacks.throughput.Throughput"


@dataclass
class CheckpointingConfig:
    _target_: str = "gptlab.callbacks.checkpointing.Checkpointing"
    every: int = MISSING


@dataclass
class EarlyStoppingConfig:
    _target_: str = "lightning.pytorch.callbacks.EarlyStopping"
    monitor: str = "val/loss"
    mode: str = "min"
    patience: int = MISSING  # validations without an improvement
    min_delta: float = 0.0


@dataclass
class EMAConfig:
    _target_: str = "gptlab.callbacks.ema.EMA"
    decay: float = MISSING


@dataclass
class OverfitConfig:
    _target_: str = "gptlab.callbacks.overfit.Overfit"
    target: float = MISSING  # training loss that counts as near 0, in nats per token


@dataclass
class ProfileConfig:
    _target_: str = "gptlab.callbacks.profile.Profile"
    skip_steps: int = MISSING
    steps: int = MISSING
    rows: int = MISSING  # of the table


@dataclass
class TensorBoardConfig:
    _target_: str = "lightning.pytorch.loggers.TensorBoardLogger"
    name: str = "tensorboard"
    version: str = ""
    default_hp_metric: bool = False


@dataclass
class WandbConfig:
    _target_: str = "lightning.pytorch.loggers.WandbLogger"
    project: str = MISSING
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    entity: str | None = None
    group: str | None = None
    notes: str | None = None
    offline: bool = False


@dataclass
class TrainConfig:
    name: str = MISSING
    seed: int = MISSING
    tags: list[str] = field(default_factory=list)
    resume: str | None = None
    model: Any = MISSING
    data: Any = MISSING
    optim: OptimConfig = MISSING
    trainer: TrainerConfig = MISSING
    callbacks: Any = None
    logger: Any = None


@dataclass
class SampleConfig:
    ckpt: str | None = None
    prompt: str | None = None
    prompt_file: str | None = None
    num_samples: int = MISSING
    max_new_tokens: int = MISSING
    temperature: float = MISSING
    top_k: int | None = None
    seed: int = MISSING
    device: str = MISSING


# The schemas that YAML files pull in, as /schema/NAME@_here_.
SCHEMAS = {
    "gpt": GPTConfig,
    "char": CharConfig,
    "progress": ProgressConfig,
    "sample_text": SampleTextConfig,
    "throughput": ThroughputConfig,
    "checkpointing": CheckpointingConfig,
    "early_stopping": EarlyStoppingConfig,
    "ema": EMAConfig,
    "overfit": OverfitConfig,
    "profile": ProfileConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
}


def register() -> None:
    """Make the schemas known to Hydra."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="sample_schema", node=SampleConfig)
    for name, node in SCHEMAS.items():
        store.store(group="schema", name=name, node=node)


def typed(cfg: Any) -> Any:
    """A config that was composed from a run folder has no types: the same with those of the schemas, checked."""
    from omegaconf import OmegaConf

    result = OmegaConf.merge(OmegaConf.structured(TrainConfig), cfg)
    schemas = {schema._target_: schema for schema in SCHEMAS.values()}
    for key in ("model", "data", "logger", *(f"callbacks.{name}" for name in cfg.callbacks or ())):
        node = OmegaConf.select(cfg, key)
        if node is not None and node.get("_target_") in schemas:
            schema = OmegaConf.structured(schemas[node._target_])
            OmegaConf.update(result, key, OmegaConf.merge(schema, node), merge=False)
    return result


def check(cfg: Any) -> None:
    """Every problem of the values that types cannot express, reported at once and before anything is loaded.

    Raises:
        ValueError: naming each key, what it is and what it may be.
    """
    data, optim, trainer = cfg.data, cfg.optim, cfg.trainer
    problems: list[str] = []

    def need(ok: bool, key: str, value: object, allowed: str) -> None:
        if not ok:
            problems.append(f"{key}={value}: it must be {allowed}")

    need(0 <= cfg.seed < 2**32, "seed", cfg.seed, "from 0 to 2**32 - 1")  # numpy's legacy generator takes no more
    for key in ("max_steps", "val_every", "log_every", "checkpoint_every", "devices", "num_nodes"):
        need(trainer[key] >= 1, f"trainer.{key}", trainer[key], "at least 1")
    allowed = ["auto", *PRECISIONS]
    need(trainer.precision in allowed, "trainer.precision", trainer.precision, "one of " + ", ".join(allowed))
    need(
        not (trainer.precision == "fp16" and trainer.accelerator == "cpu"),
        "trainer.precision", "fp16", "32 or bf16 on a CPU: fp16 needs hardware=gpu",
    )  # fmt: skip
    for key in ("block_size", "batch_size", "micro_batch_size", "val_windows"):
        value = data.get(key)
        need(value is None or value >= 1, f"data.{key}", value, "at least 1")
    need((data.get("workers") or 0) >= 0, "data.workers", data.get("workers"), "at least 0")
    processes = trainer.devices * trainer.num_nodes
    need(
        (data.get("batch_size") or processes) >= processes,
        "data.batch_size", data.get("batch_size"), f"at least the number of processes, {processes} (trainer.devices x trainer.num_nodes)",
    )  # fmt: skip
    need(optim.schedule in ("cosine", "constant"), "optim.schedule", optim.schedule, "cosine or constant")
    need(0 < optim.lr < math.inf, "optim.lr", optim.lr, "above 0 and finite")
    need(0 <= optim.min_lr <= optim.lr, "optim.min_lr", optim.min_lr, f"from 0 to optim.lr={optim.lr}")
    need(optim.warmup_steps >= 0, "optim.warmup_steps", optim.warmup_steps, "at least 0")
    need(optim.weight_decay >= 0, "optim.weight_decay", optim.weight_decay, "at least 0")
    betas_fit = len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas)
    need(betas_fit, "optim.betas", optim.betas, "two numbers from 0 up to below 1")
    need(optim.decay_steps >= 0, "optim.decay_steps", optim.decay_steps, "at least 0")
    need(optim.grad_clip >= 0, "optim.grad_clip", optim.grad_clip, "at least 0 (0 turns clipping off)")
    if problems:
        raise ValueError("\n".join(problems))
