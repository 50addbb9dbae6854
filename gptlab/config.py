"""What a config may hold: a dataclass for every node that gptlab owns, where conf/ is, and one check across keys.

The dataclasses give names and types; the values live in conf/. Only the standard library is imported here, so that
composing a config stays fast.
"""

import importlib.util
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MISSING: Any = "???"  # OmegaConf's mark of a value that must be given
VALIDATED = ("val/loss", "val/perplexity", "val/bits_per_byte")  # what each validation measures
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
    _target_: str = "gptlab.callbacks.early_stopping.EarlyStopping"
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
    trust: bool = False  # build classes that the checkpoint names and gptlab does not define


# The schemas that YAML files pull in, as /hydra/schema/NAME@_here_: in a group of Hydra, --help does not list them.
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
        store.store(group="hydra/schema", name=name, node=node)


def typed(cfg: Any, entry: str) -> Any:
    """The same config with the types of the schemas: refuses keys and values that composing let through (`+key=value`,
    and everything that was composed from a run folder, which has no schemas).

    Raises:
        omegaconf.errors.OmegaConfBaseException: an unknown key or a value of a wrong type.
    """
    from omegaconf import DictConfig, OmegaConf

    root = OmegaConf.structured({"train": TrainConfig, "sample": SampleConfig}[entry])
    result = OmegaConf.merge(root, OmegaConf.to_container(cfg))  # plain, or a key added to a typed node would pass
    schemas = {schema._target_: schema for schema in SCHEMAS.values()}
    for key in ("model", "data", "logger", *(f"callbacks.{name}" for name in cfg.get("callbacks") or ())):
        node = OmegaConf.select(cfg, key)
        if isinstance(node, DictConfig) and node.get("_target_") in schemas:
            OmegaConf.update(result, key, schemas[node._target_], merge=False)
            OmegaConf.update(result, key, OmegaConf.to_container(node))
    return result


def check(cfg: Any) -> None:
    """Every problem of a training config that types cannot express, reported at once and before anything is loaded.

    Raises:
        ValueError: naming each key, what it is and what it may be.
    """
    model = {key: value for key, value in cfg.model.items() if key not in ("_target_", "compile")}
    of_model = model_problems(**model) if cfg.model.get("_target_") == GPTConfig._target_ else []
    found = [_target_problems(cfg), _run_problems(cfg), of_model, _data_problems(cfg), _optim_problems(cfg), _callback_problems(cfg)]  # fmt: skip
    problems = [problem for problems in found for problem in problems]
    if problems:
        raise ValueError("\n".join(problems))


def model_problems(
    *, n_layer: int, n_head: int, n_embd: int, dropout: float, gelu: str, vocab_multiple: int, **switches: bool
) -> Iterator[str]:
    """What is wrong with the sizes of a GPT, one text each."""
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_multiple": vocab_multiple}
    yield from (f"model.{key}={size}: it must be at least 1" for key, size in sizes.items() if size < 1)
    if n_head >= 1 and n_embd % n_head:
        yield f"model.n_embd={n_embd} is not a multiple of model.n_head={n_head}: the heads share it evenly"
    if not 0 <= dropout < 1:
        yield f"model.dropout={dropout}: it must be at least 0 and below 1"
    if gelu not in ("erf", "tanh"):
        yield f"model.gelu={gelu}: it must be erf or tanh"


def sampling_problems(max_new_tokens: int, temperature: float, top_k: int | None, prefix: str = "") -> Iterator[str]:
    """What is wrong with the settings of sampling, one text each."""
    if max_new_tokens < 0:
        yield f"{prefix}max_new_tokens={max_new_tokens}: it must be at least 0"
    if not 0 <= temperature < math.inf:
        yield f"{prefix}temperature={temperature}: it must be a number from 0 (greedy) up"
    if top_k is not None and top_k < 1:
        yield f"{prefix}top_k={top_k}: it must be at least 1, or null for the whole vocabulary"


def _target_problems(cfg: Any) -> Iterator[str]:
    """Nodes that are built from a class need one, and its package must be there; looked for without importing it."""
    nodes = {"model": cfg.model, "data": cfg.data, "logger": cfg.logger}
    nodes |= {f"callbacks.{name}": node for name, node in (cfg.callbacks or {}).items()}
    for key, node in nodes.items():
        target = node.get("_target_") if hasattr(node, "get") else None
        if node is None and key not in ("model", "data"):
            continue
        if not isinstance(target, str):
            yield f"{key}={node}: it must be a mapping with a _target_, the class to build, such as my_package.MyClass"
            continue
        package, *names = target.split(".")
        if not names or not package.isidentifier() or importlib.util.find_spec(package) is None:
            yield (
                f"{key}._target_={target}: there is no package {package!r} here; it must be PACKAGE.CLASS, installed "
                "or in the working directory"
            )


def _run_problems(cfg: Any) -> Iterator[str]:
    trainer = cfg.trainer
    if not 0 <= cfg.seed < 2**32:  # numpy's legacy generator takes no more
        yield f"seed={cfg.seed}: it must be from 0 to 2**32 - 1"
    for key in ("max_steps", "val_every", "log_every", "checkpoint_every", "devices", "num_nodes"):
        if trainer[key] < 1:
            yield f"trainer.{key}={trainer[key]}: it must be at least 1"
    allowed = ["auto", *PRECISIONS]
    if trainer.precision not in allowed:
        yield f"trainer.precision={trainer.precision}: it must be one of {', '.join(allowed)}"
    if trainer.precision == "fp16" and trainer.accelerator == "cpu":
        yield "trainer.precision=fp16: it must be 32 or bf16 on a CPU; fp16 needs hardware=gpu"
    if trainer.max_time is not None and not re.fullmatch(r"\d+:[0-5]\d:[0-5]\d:[0-5]\d", trainer.max_time):
        yield f"trainer.max_time={trainer.max_time}: it must be DD:HH:MM:SS, as 00:01:30:00 for an hour and a half"


def _data_problems(cfg: Any) -> Iterator[str]:
    data, processes = cfg.data, cfg.trainer.devices * cfg.trainer.num_nodes
    numbers = {"block_size": 1, "batch_size": 1, "micro_batch_size": 1, "val_windows": 1, "workers": 0}
    for key, least in numbers.items():
        value = data.get(key)
        if value is not None and not (isinstance(value, int) and value >= least):  # a user's own data have no types
            yield f"data.{key}={value}: it must be a whole number, at least {least}"
    if data.get("_target_") == CharConfig._target_:
        yield from _text_problems(data)
    batch_size = data.get("batch_size")
    if isinstance(batch_size, int) and 1 <= batch_size < processes:
        yield (
            f"data.batch_size={batch_size}: it must be at least the number of processes, {processes} "
            "(trainer.devices x trainer.num_nodes)"
        )


def _text_problems(data: Any) -> Iterator[str]:
    from gptlab.data.corpora import PYTHON_DOCS, text_files

    if data.path is None and data.url is None and data.name != PYTHON_DOCS:
        yield f"data.path is missing: data={data.name} needs data.path=FILE, a folder of .txt files or a glob"
    for key in ("path", "val_path"):
        try:
            if data[key] is not None:
                text_files(data[key], f"data.{key}")
        except (ValueError, FileNotFoundError) as error:
            yield str(error)


def _optim_problems(cfg: Any) -> Iterator[str]:
    optim, end = cfg.optim, cfg.trainer.max_steps
    if optim.schedule not in ("cosine", "constant"):
        yield f"optim.schedule={optim.schedule}: it must be cosine or constant"
    if not 0 < optim.lr < math.inf:
        yield f"optim.lr={optim.lr}: it must be above 0 and finite"
    elif not 0 <= optim.min_lr <= optim.lr:
        yield f"optim.min_lr={optim.min_lr}: it must be from 0 to optim.lr={optim.lr}"
    for key in ("warmup_steps", "decay_steps", "weight_decay", "grad_clip"):
        if not 0 <= optim[key] < math.inf:
            hint = " (0 turns clipping off)" if key == "grad_clip" else ""
            yield f"optim.{key}={optim[key]}: it must be at least 0{hint}"
    if not (len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas)):
        yield f"optim.betas={optim.betas}: it must be two numbers from 0 up to below 1"
    ends = {"trainer.max_steps": end} | ({"optim.decay_steps": optim.decay_steps} if optim.schedule == "cosine" else {})
    key = min(ends, key=ends.get)
    if 1 <= ends[key] <= optim.warmup_steps:
        yield (
            f"optim.warmup_steps={optim.warmup_steps} does not end before {key}={ends[key]}: the learning rate would "
            f"never reach optim.lr; add optim.warmup_steps={ends[key] // 10}"
        )


def _callback_problems(cfg: Any) -> Iterator[str]:
    for name, c in (cfg.callbacks or {}).items():
        target = c.get("_target_") if hasattr(c, "get") else None
        if target == SampleTextConfig._target_:
            yield from sampling_problems(c.max_new_tokens, c.temperature, c.top_k, f"callbacks.{name}.")
        elif target == CheckpointingConfig._target_ and c.every < 1:
            yield f"callbacks.{name}.every={c.every}: it must be at least 1 (trainer.checkpoint_every sets it)"
        elif target == EMAConfig._target_ and not 0 <= c.decay < 1:
            yield f"callbacks.{name}.decay={c.decay}: it must be from 0 up to below 1"
        elif target == EarlyStoppingConfig._target_:
            if c.monitor not in VALIDATED:
                yield f"callbacks.{name}.monitor={c.monitor}: it must be one of {', '.join(VALIDATED)}"
            if c.mode not in ("min", "max"):
                yield f"callbacks.{name}.mode={c.mode}: it must be min or max"
            if c.patience < 1 or not 0 <= c.min_delta < math.inf:
                yield f"callbacks.{name}: patience={c.patience} must be at least 1, min_delta={c.min_delta} at least 0"
