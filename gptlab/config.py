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
MAX_VOCAB_SIZE = 2**20  # five times the largest vocabulary in use; a model of more could not be meant
OPENWEBTEXT = "Skylion007/openwebtext"  # on the Hugging Face hub
PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}  # ours -> Lightning's

# What numbers and choices may be, by config key; null is for the types to refuse.
AT_LEAST = {
    "seed": 0,
    **dict.fromkeys([f"trainer.{key}" for key in ("max_steps", "val_every", "log_every", "checkpoint_every")], 1),
    **dict.fromkeys(["trainer.devices", "trainer.num_nodes"], 1),
    **dict.fromkeys([f"data.{key}" for key in ("block_size", "batch_size", "micro_batch_size", "val_windows")], 1),
    "data.workers": 0,
    "data.ndigit": 1,
    "data.length": 2,
    "data.n_symbols": 2,
    "callbacks.exact_match.show": 0,
    **dict.fromkeys(
        [
            f"optim.{key}"
            for key in ("min_lr", "warmup_steps", "decay_steps", "weight_decay", "grad_clip", "skip_nonfinite")
        ],
        0,
    ),
    "callbacks.checkpointing.every": 1,
    **{f"{at}max_new_tokens": 0 for at in ("", "callbacks.sample_text.")},
    **{f"{at}temperature": 0 for at in ("", "callbacks.sample_text.")},
    **{f"{at}top_k": 1 for at in ("", "callbacks.sample_text.")},
    "num_samples": 1,
    "split_seed": 0,
    "processes": 1,
    "callbacks.early_stopping.patience": 1,
    "callbacks.early_stopping.min_delta": 0,
    "callbacks.ema.decay": 0,
    "callbacks.overfit.target": 0,
    "callbacks.profile.skip_steps": 0,
    "callbacks.profile.steps": 1,
    "callbacks.profile.rows": 1,
}
# What gptlab itself tells Lightning's Trainer, so that trainer.extra cannot.
NOT_EXTRA = ("accelerator", "devices", "num_nodes", "strategy", "precision", "max_steps", "max_epochs", "max_time",
             "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "logger", "log_every_n_steps",
             "callbacks", "enable_checkpointing", "plugins", "use_distributed_sampler", "default_root_dir",
             "enable_progress_bar", "enable_model_summary")  # fmt: skip
BELOW = {
    "seed": 2**32,  # numpy's legacy generator takes no larger one
    "callbacks.ema.decay": 1,
    "data.ndigit": 101,  # far more than any model here adds
    "data.length": 257,
    "data.n_symbols": 63,  # digits and letters
}
ONE_OF = {
    "trainer.precision": ("auto", *PRECISIONS),
    "optim.schedule": ("cosine", "constant"),
    "callbacks.early_stopping.monitor": (*VALIDATED, "val/accuracy"),
    "trainer.accelerator": ("cpu", "gpu", "cuda", "mps"),
}

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
    workers: int | None = None  # processes that prepare batches; null: two on CUDA, else none


@dataclass
class TextConfig(WindowsConfig):
    _target_: str = "gptlab.data.text.TextData"
    path: str | None = None  # a text file, a glob, or a folder of .txt files
    val_path: str | None = None  # the same for validation; null: the last 10 % of the text
    url: str | None = None  # where to download it from otherwise
    file: str | None = None  # its name in `folder`; null: that of the data, and .txt
    sha256: str | None = None  # of that file
    fallback: str | None = None  # python_docs: train on that text if there is no file and no network; null: an error
    folder: str | None = None  # of downloads; null: $GPTLAB_DATA, or ~/.cache/gptlab
    tokenizer: str = "char"  # or gpt2, or bpe: learned from the text
    vocab_size: int | None = None  # for bpe


@dataclass
class MemmapConfig(WindowsConfig):
    _target_: str = "gptlab.data.memmap.MemmapData"
    path: str | None = None  # a folder with train.bin and val.bin; null: where prepare_openwebtext.py puts it
    tokenizer: str | None = None  # gpt2, where there is no meta.json that says it


@dataclass
class PythonStdlibConfig(WindowsConfig):
    _target_: str = "gptlab.data.memmap.PythonStdlibData"
    vocab_size: int = MISSING
    folder: str | None = None  # for what is made; null: $GPTLAB_DATA, or ~/.cache/gptlab


@dataclass
class AdditionConfig(WindowsConfig):
    _target_: str = "gptlab.data.problems.AdditionData"
    block_size: int | None = None  # follows
    ndigit: int = MISSING


@dataclass
class SortConfig(WindowsConfig):
    _target_: str = "gptlab.data.problems.SortData"
    block_size: int | None = None  # follows
    length: int = MISSING  # symbols to be sorted
    n_symbols: int = MISSING  # out of so many


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
    skip_nonfinite: int = 0  # steps that may be left out


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
class ExactMatchConfig:
    _target_: str = "gptlab.callbacks.exact_match.ExactMatch"
    show: int = MISSING  # mistakes to print


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
    trust: bool = False
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


@dataclass
class PrepareConfig:
    out: str | None = None
    path: str | None = None
    hub: str = MISSING
    hub_config: str | None = None
    hub_split: str = MISSING
    hub_revision: str | None = None
    text_key: str = MISSING
    tokenizer: str = MISSING
    vocab_size: int | None = None
    val_share: float = MISSING
    split_seed: int = MISSING
    processes: int | None = None


ENTRIES = {"train": TrainConfig, "sample": SampleConfig, "prepare": PrepareConfig}

# The schemas that YAML files pull in, as /hydra/schema/NAME@_here_: in a group of Hydra, --help does not list them.
SCHEMAS = {
    "gpt": GPTConfig,
    "text": TextConfig,
    "memmap": MemmapConfig,
    "python_stdlib": PythonStdlibConfig,
    "addition": AdditionConfig,
    "sort": SortConfig,
    "progress": ProgressConfig,
    "sample_text": SampleTextConfig,
    "exact_match": ExactMatchConfig,
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
    for name, node in ENTRIES.items():
        store.store(name=f"{name}_schema", node=node)
    for name, node in SCHEMAS.items():
        store.store(group="hydra/schema", name=name, node=node)


def typed(cfg: Any, entry: str) -> Any:
    """The same config with the types of the schemas: refuses keys and values that composing let through (`+key=value`,
    and everything that was composed from a run folder, which has no schemas).

    Raises:
        omegaconf.errors.OmegaConfBaseException: an unknown key, a value of a wrong type, or none.
    """
    from omegaconf import DictConfig, OmegaConf

    root = OmegaConf.structured(ENTRIES[entry])
    result = OmegaConf.merge(root, OmegaConf.to_container(cfg))  # plain, or a key added to a typed node would pass
    schemas = {schema._target_: schema for schema in SCHEMAS.values()}
    for key in ("model", "data", "logger", *(f"callbacks.{name}" for name in cfg.get("callbacks") or ())):
        node = OmegaConf.select(cfg, key)
        if isinstance(node, DictConfig) and node.get("_target_") in schemas:
            OmegaConf.update(result, key, schemas[node._target_], merge=False)
            OmegaConf.update(result, key, OmegaConf.to_container(node))
    OmegaConf.to_container(result, resolve=True, throw_on_missing=True)  # every value is there, every ${...} has one
    return result


def check(cfg: Any) -> None:
    """Every problem of a training config that types cannot express, reported at once and before anything is loaded.

    Raises:
        ValueError: naming each key, what it is and what it may be.
    """
    model = {key: value for key, value in cfg.model.items() if key not in ("_target_", "compile")}
    of_model = model_problems(**model) if cfg.model.get("_target_") == GPTConfig._target_ else []
    across = (_cross_problems(cfg), _optim_problems(cfg), _data_problems(cfg.data))
    found = (_target_problems(cfg), of_model, value_problems(cfg), *across)
    if problems := [problem for problems in found for problem in problems]:
        raise ValueError("\n".join(problems))


def model_problems(
    *, n_layer: int, n_head: int, n_embd: int, dropout: float, gelu: str, vocab_multiple: int, **switches: bool
) -> Iterator[str]:
    """What is wrong with the sizes of a GPT, one text each."""
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_multiple": vocab_multiple}
    yield from (f"model.{key}={size}: it must be at least 1" for key, size in sizes.items() if size < 1)
    yield from (f"model.{key}={size}: it must be below {2**31}" for key, size in sizes.items() if size >= 2**31)
    if n_head >= 1 and n_embd % n_head:
        yield f"model.n_embd={n_embd} is not a multiple of model.n_head={n_head}: the heads share it evenly"
    if not 0 <= dropout < 1:
        yield f"model.dropout={dropout}: it must be at least 0 and below 1"
    if gelu not in ("erf", "tanh"):
        yield f"model.gelu={gelu}: it must be erf or tanh"


def _target_problems(cfg: Any) -> Iterator[str]:
    """Nodes that are built from a class need one, and its package must be there; looked for without importing it."""
    from omegaconf import DictConfig

    nodes = {"model": cfg.model, "data": cfg.data, "logger": cfg.logger}
    nodes |= {f"callbacks.{name}": node for name, node in (cfg.callbacks or {}).items()}
    for key, node in nodes.items():
        target = node.get("_target_") if isinstance(node, DictConfig) else None
        if node is None and key not in ("model", "data"):
            continue
        if not isinstance(target, str):
            yield f"{key}={node}: it must be a mapping with a _target_, the class to build, such as my_package.MyClass"
            continue
        if key == "model" and (other := [name for name in node if name.startswith("_") and name != "_target_"]):
            yield f"model.{other[0]}: a model is built from _target_ and plain values alone"
        package, *names = target.split(".")
        if not names:
            yield f"{key}._target_={target}: it must be PACKAGE.CLASS, such as my_package.MyClass"
        elif not package.isidentifier() or importlib.util.find_spec(package) is None:
            yield (
                f"{key}._target_={target}: there is no package {package!r} here; it must be PACKAGE.CLASS, installed "
                "or in the working directory"
            )


def value_problems(cfg: Any) -> Iterator[str]:
    """Values outside what AT_LEAST, BELOW and ONE_OF allow. A user's own classes have no schema, so types may be wrong."""
    from omegaconf import OmegaConf

    for key, least in AT_LEAST.items():
        value, below = OmegaConf.select(cfg, key), BELOW.get(key, 2**31)
        if value is not None and not (isinstance(value, (int, float)) and least <= value < below):
            too_large = isinstance(value, (int, float)) and value >= below
            limit = f" and below {below}" if key in BELOW or too_large else ""
            yield f"{key}={value}: it must be a number, at least {least}{limit}"
    for key, allowed in ONE_OF.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and value not in allowed:
            yield f"{key}={value}: it must be one of {', '.join(allowed)}"


def _cross_problems(cfg: Any) -> Iterator[str]:
    """Values that do not go together, and those that are more than a number in a range."""
    from omegaconf import DictConfig, OmegaConf

    trainer = cfg.trainer
    if trainer.precision == "fp16" and trainer.accelerator == "cpu":
        yield "trainer.precision=fp16: it must be 32 or bf16 on a CPU; fp16 needs hardware=gpu"
    time = trainer.max_time
    if time is not None and not (re.fullmatch(r"\d+:[0-2]\d:[0-5]\d:[0-5]\d", time) and re.search("[1-9]", time)):
        yield f"trainer.max_time={time}: it must be DD:HH:MM:SS (in YAML in quotes) and not 0, as 00:01:30:00 for 90 minutes"
    processes, batch_size = trainer.devices * trainer.num_nodes, cfg.data.get("batch_size")
    if isinstance(batch_size, int) and 1 <= batch_size < processes:
        yield (
            f"data.batch_size={batch_size}: it must be at least the number of processes, {processes} "
            "(trainer.devices x trainer.num_nodes)"
        )
    val_windows = cfg.data.get("val_windows")
    if isinstance(val_windows, int) and 1 <= val_windows < processes:
        yield f"data.val_windows={val_windows}: it must be at least the number of processes, {processes}"
    for key in set(trainer.extra) & set(NOT_EXTRA):
        yield f"trainer.extra.{key}: gptlab sets it itself" + (f", from trainer.{key}" if key in trainer else "")
    of_wandb = isinstance(cfg.logger, DictConfig) and cfg.logger.get("_target_") == WandbConfig._target_
    if of_wandb and importlib.util.find_spec("wandb") is None:
        yield "logger=wandb needs Weights & Biases: pip install 'gptlab[wandb]'"
    profile = OmegaConf.select(cfg, "callbacks.profile")
    ours = isinstance(profile, DictConfig) and profile.get("_target_") == ProfileConfig._target_
    if ours and cfg.resume is None and (profiled := profile.skip_steps + profile.steps) > trainer.max_steps:
        yield (
            f"callbacks.profile needs skip_steps + steps = {profiled} steps, more than trainer.max_steps="
            f"{trainer.max_steps}: add trainer.max_steps={profiled}"
        )
    monitor, target = OmegaConf.select(cfg, "callbacks.early_stopping.monitor"), str(cfg.data.get("_target_"))
    measured = (
        target in (AdditionConfig._target_, SortConfig._target_)
        and OmegaConf.select(cfg, "callbacks.exact_match") is not None
    )
    if monitor == "val/accuracy" and target.startswith("gptlab.") and not measured:
        yield (
            f"callbacks.early_stopping.monitor={monitor}: it must be one of {', '.join(VALIDATED)} here: only "
            "problems, as of data=addition or data=sort, have right answers, and callbacks.exact_match counts them"
        )


def _optim_problems(cfg: Any) -> Iterator[str]:
    """What is wrong with the optimizer's numbers, and with the ends of its schedule."""
    trainer, optim = cfg.trainer, cfg.optim
    if not 0 < optim.lr < math.inf:
        yield f"optim.lr={optim.lr}: it must be above 0 and finite"
    elif optim.schedule == "cosine" and optim.min_lr > optim.lr:
        yield f"optim.min_lr={optim.min_lr}: it must be at most optim.lr={optim.lr}"
    if not (optim.betas is not None and len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas)):
        yield f"optim.betas={optim.betas}: it must be two numbers from 0 up to below 1"
    resuming = cfg.resume is not None
    ends = {} if resuming else {"trainer.max_steps": trainer.max_steps}  # to end a run earlier than planned is fine
    if optim.schedule == "cosine":
        ends["optim.decay_steps"] = optim.decay_steps
    for key in sorted(ends, key=ends.get)[:1]:
        if 1 <= ends[key] <= optim.warmup_steps:
            remedy = f"take a larger {key}" if resuming else f"add optim.warmup_steps={ends[key] // 10}"
            yield (
                f"optim.warmup_steps={optim.warmup_steps} does not end before {key}={ends[key]}: the learning rate would "
                f"never reach optim.lr; {remedy}"
            )


def prepare_problems(cfg: Any) -> Iterator[str]:
    """What is wrong with a config of scripts/prepare_openwebtext.py."""
    yield from value_problems(cfg)
    if cfg.tokenizer not in ("gpt2", "bpe"):
        yield f"tokenizer={cfg.tokenizer}: it must be gpt2 or bpe"
    elif (cfg.vocab_size is None) == (cfg.tokenizer == "bpe"):
        yield f"vocab_size={cfg.vocab_size}: it goes with tokenizer=bpe, and that needs it, such as vocab_size=8192"
    yield from _vocab_size_problems("vocab_size", cfg.vocab_size)
    if not 0 < cfg.val_share < 1:
        yield f"val_share={cfg.val_share}: it must be above 0 and below 1"
    if cfg.out is None and (cfg.path is not None or cfg.hub != OPENWEBTEXT):
        yield "out is missing: a folder for what is made of these documents, such as out=my_docs"


def _vocab_size_problems(key: str, size: int | None) -> Iterator[str]:
    if size is not None and not 257 <= size <= MAX_VOCAB_SIZE:
        yield f"{key}={size}: it must be at least 257 (256 bytes and the end of text) and at most {MAX_VOCAB_SIZE}"


def _data_problems(data: Any) -> Iterator[str]:
    """What can be said of gptlab's own data sets without reading the data."""
    target = data.get("_target_")
    if target in (TextConfig._target_, PythonStdlibConfig._target_):
        yield from _vocab_size_problems("data.vocab_size", data.vocab_size)
    if target == TextConfig._target_:
        yield from _text_problems(data)
    elif target == MemmapConfig._target_:
        from gptlab.data.files import token_files

        if data.tokenizer not in (None, "gpt2"):
            yield f"data.tokenizer={data.tokenizer}: it must be gpt2, or null where meta.json says what it is"
        try:
            token_files(data.path)
        except FileNotFoundError as error:
            yield str(error)


def _text_problems(data: Any) -> Iterator[str]:
    from gptlab.data.files import PYTHON_DOCS, text_files

    if data.tokenizer not in ("char", "gpt2", "bpe"):
        yield f"data.tokenizer={data.tokenizer}: it must be char, gpt2 or bpe"
    if data.tokenizer == "bpe" and data.vocab_size is None:
        yield "data.tokenizer=bpe needs data.vocab_size, such as data.vocab_size=1024"
    elif data.tokenizer != "bpe" and data.vocab_size is not None:
        yield f"data.vocab_size={data.vocab_size} is for data.tokenizer=bpe; that of {data.tokenizer} follows by itself"
    own = data.url is None and data.name != PYTHON_DOCS
    for key in ("path", "val_path"):
        try:
            if data[key] is not None or (key == "path" and own):
                text_files(data[key], f"data.{key}")
        except (ValueError, FileNotFoundError) as error:
            yield str(error)
