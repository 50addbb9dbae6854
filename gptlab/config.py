"""What a config may hold. Hydra composes it from conf/ and the command line; `validate` checks all of it at once.

    conf/*.yaml + command line --Hydra--> plain values --validate--> Train | Sample | Prepare

Types and ranges are pydantic models, one per node of the config; a node with a `_target_` is checked by the model of
that class (`NODES`), any other class is custom and takes what it takes. A condition on several keys is a `rule`.
"""

import difflib
import importlib.util
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from gptlab.errors import UserError
from gptlab.tokenizer import MAX_VOCAB_SIZE

VALIDATED = ("val/loss", "val/perplexity", "val/bits_per_byte")  # what each validation measures
OPENWEBTEXT = "Skylion007/openwebtext"  # on the Hugging Face hub
PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}  # ours -> Lightning's

_package = Path(__file__).resolve().parent
CONF = next(p for p in (_package / "conf", _package.parent / "conf") if p.is_dir())  # a wheel's, a checkout's


def _integral(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # trainer.max_steps=1e3


def _string(value: Any) -> Any:
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value  # name=2026


def _duration(value: Any) -> Any:
    """1h30m or DD:HH:MM:SS -> DD:HH:MM:SS."""
    if value is None or (isinstance(value, str) and re.fullmatch(r"\d+:[0-2]\d:[0-5]\d:[0-5]\d", value)):
        parts = [int(part) for part in value.split(":")] if value else [1]
    elif match := re.fullmatch(r"(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", str(value)):
        seconds = sum(int(n or 0) * unit for n, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))
        parts = [seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60, seconds % 60]
        value = ":".join(f"{part:02d}" for part in parts)
    else:
        raise ValueError("must be a duration such as 90m, 1h30m, 2d, or DD:HH:MM:SS")
    if not any(parts):
        raise ValueError("must be longer than 0; null: no limit")
    return value


def _steps_or_auto(value: Any) -> Any:
    value = _integral(value)
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31):
        raise ValueError("must be an integer >= 0, or auto")
    return value


def _folder_name(value: Any) -> Any:
    if isinstance(value, str) and (value.startswith("/") or {"", ".", ".."} & set(value.split("/"))):
        raise ValueError("must be the name of a folder inside outputs/")
    return value


Int = Annotated[int, BeforeValidator(_integral)]
Count = Annotated[Int, Field(ge=1, lt=2**31)]
Size = Annotated[Int, Field(ge=0, lt=2**31)]
VocabSize = Annotated[Int, Field(ge=257, le=MAX_VOCAB_SIZE)]  # 256 bytes and the end of text
Seed = Annotated[Int, Field(ge=0, lt=2**32)]  # numpy's legacy generator takes no larger one
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Str = Annotated[str, BeforeValidator(_string)]
FolderName = Annotated[Str, BeforeValidator(_folder_name)]


WarmupSteps = Annotated[Any, BeforeValidator(_steps_or_auto)]


class Node(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True, protected_namespaces=())


class GPT(Node):
    n_layer: Count
    n_head: Count
    n_embd: Count
    dropout: Fraction
    bias: bool
    gelu: Literal["erf", "tanh"]
    vocab_multiple: Count
    activation_checkpointing: bool
    compile: bool


class Windows(Node):
    name: FolderName
    block_size: Count
    batch_size: Count
    micro_batch_size: Count | None
    val_windows: Count | None
    workers: Size | None


class Text(Windows):
    path: Str | None
    val_path: Str | None
    tokenizer: Literal["char", "gpt2", "bpe"]
    vocab_size: VocabSize | None
    url: Str | None
    sha256: Str | None
    file: Str
    folder: Str | None
    fallback: Str | None


class Memmap(Windows):
    path: Str | None
    tokenizer: Literal["gpt2"] | None


class PythonStdlib(Windows):
    vocab_size: VocabSize
    folder: Str | None


class Addition(Windows):
    block_size: Count | None
    ndigit: Annotated[Int, Field(ge=1, le=100)]


class Sort(Windows):
    block_size: Count | None
    length: Annotated[Int, Field(ge=2, le=256)]
    n_symbols: Annotated[Int, Field(ge=2, le=62)]  # digits and letters


class Optim(Node):
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    min_lr: Amount
    schedule: Literal["cosine", "constant"]
    warmup_steps: WarmupSteps
    decay_steps: Size
    weight_decay: Amount
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    grad_clip: Amount
    skip_nonfinite: Size


class Trainer(Node):
    max_steps: Count
    max_time: Annotated[str | None, BeforeValidator(_duration)]
    val_every: Count
    log_every: Count
    checkpoint_every: Count
    keep_every: Count | None
    accelerator: Literal["cpu", "gpu", "cuda", "mps"]
    devices: Count
    num_nodes: Count
    strategy: Str
    precision: Annotated[Literal["auto", "32", "bf16", "fp16"], BeforeValidator(_string)]
    extra: dict[str, Any]


class SampleText(Node):
    prompt: Str | None
    max_new_tokens: Size
    temperature: Amount
    top_k: Count | None


class EarlyStopping(Node):
    monitor: Literal["val/loss", "val/perplexity", "val/bits_per_byte", "val/accuracy"]
    patience: Count
    min_delta: Amount


class Wandb(Node):
    project: Str
    name: Str | None
    tags: list[Str]
    entity: Str | None
    group: Str | None
    notes: Str | None
    offline: bool


def _node(schema: str, /, **fields: Any) -> type[Node]:
    return create_model(schema, __base__=Node, **fields)


# The classes that conf/ builds, and the only ones that a run folder or checkpoint may name without trust=true.
NODES = {
    "gptlab.model.GPT": GPT,
    "gptlab.data.text.TextData": Text,
    "gptlab.data.memmap.MemmapData": Memmap,
    "gptlab.data.memmap.PythonStdlibData": PythonStdlib,
    "gptlab.data.problems.AdditionData": Addition,
    "gptlab.data.problems.SortData": Sort,
    "gptlab.callbacks.display.Progress": _node("Progress"),
    "gptlab.callbacks.display.SampleText": SampleText,
    "gptlab.callbacks.exact_match.ExactMatch": _node("ExactMatch", show=Size),
    "gptlab.callbacks.throughput.Throughput": _node("Throughput"),
    "gptlab.callbacks.checkpointing.Checkpointing": _node("Checkpointing", every=Count, keep_every=Count | None),
    "gptlab.callbacks.early_stopping.EarlyStopping": EarlyStopping,
    "gptlab.callbacks.ema.EMA": _node("EMA", decay=Fraction),
    "gptlab.callbacks.debug.Overfit": _node("Overfit", target=Amount),
    "gptlab.callbacks.debug.Profile": _node("Profile", skip_steps=Size, steps=Count, rows=Count),
    "gptlab.loggers.TensorBoard": _node("TensorBoard"),
    "lightning.pytorch.loggers.WandbLogger": Wandb,
    "gptlab.loggers.CSVTable": _node("CSVTable"),
}


class Custom(Node):
    """A node that builds a custom class."""

    model_config = ConfigDict(extra="allow")
    target: Annotated[str, Field(alias="_target_", pattern=r"^[^\W\d]\w*(\.\w+)+$")]


class Train(Node):
    name: FolderName
    seed: Seed
    tags: list[Str]
    resume: Str | None
    trust: bool
    model: dict[str, Any]
    data: dict[str, Any]
    optim: Optim
    trainer: Trainer
    callbacks: dict[str, dict[str, Any] | None] | None = None  # `~callbacks` leaves them out
    logger: dict[str, Any] | None = None


class Sample(SampleText):
    ckpt: Str | None
    prompt_file: Str | None
    num_samples: Count
    seed: Seed
    device: Str
    trust: bool


class Prepare(Node):
    out: Str | None
    path: Str | None
    hub: Str
    hub_config: Str | None
    hub_split: Str
    hub_revision: Str | None
    text_key: Str
    tokenizer: Literal["gpt2", "bpe"]
    vocab_size: VocabSize | None
    val_share: Annotated[float, Field(gt=0, lt=1)]
    split_seed: Size
    processes: Count | None


ENTRIES = {"train": Train, "sample": Sample, "prepare": Prepare}
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


@rule("model", "data", "callbacks", "logger")
def packages_are_installed(model: dict, data: dict, callbacks: dict | None, logger: dict | None) -> Iterator[str]:
    nodes = {"model": model, "data": data, "logger": logger}
    nodes |= {f"callbacks.{name}": node for name, node in (callbacks or {}).items()}
    for key, node in nodes.items():
        if node and importlib.util.find_spec(package := node["_target_"].partition(".")[0]) is None:
            yield f"{key}._target_={node['_target_']}: no package {package!r} here; install it, or run in its folder"
    if logger and logger["_target_"].endswith(".WandbLogger") and importlib.util.find_spec("wandb") is None:
        yield "logger=wandb needs Weights & Biases: pip install 'gptlab[wandb]'"


@rule("trainer.precision", "trainer.accelerator")
def cpus_have_no_fp16(precision: str, accelerator: str) -> Iterator[str]:
    if precision == "fp16" and accelerator == "cpu":
        yield "trainer.precision=fp16 needs a GPU; on a CPU use 32 or bf16"


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


@rule("data.workers")
def workers_have_cores(workers: Any) -> Iterator[str]:
    from gptlab.data.files import available_cores

    most = 4 * available_cores()
    if isinstance(workers, int) and workers > most:
        yield f"data.workers={workers} must be <= {most}, four times the {most // 4} available cores"


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
def cosine_falls(lr: float, min_lr: float, schedule: str) -> Iterator[str]:
    if schedule == "cosine" and min_lr > lr:
        yield f"optim.min_lr={min_lr} must be <= optim.lr={lr}"


@rule("optim.warmup_steps", "optim.decay_steps", "optim.schedule", "trainer.max_steps", "resume")
def warmup_ends(warmup: int | str, decay: int, schedule: str, max_steps: int, resume: str | None) -> Iterator[str]:
    ends = {} if resume else {"trainer.max_steps": max_steps}  # a resume may end a run earlier than planned
    ends |= {"optim.decay_steps": decay} if schedule == "cosine" else {}
    for key in sorted(ends, key=ends.get)[:1]:
        if warmup != "auto" and ends[key] <= warmup:
            fix = f"use a larger {key}" if resume else "try optim.warmup_steps=auto"
            yield f"optim.warmup_steps={warmup} must be less than {key}={ends[key]}; {fix}"


@rule("callbacks.profile", "trainer.max_steps", "resume")
def profile_fits(profile: dict | None, max_steps: int, resume: str | None) -> Iterator[str]:
    if profile and is_known(profile) and not resume:
        needed = profile["skip_steps"] + profile["steps"]
        if needed > max_steps:
            yield f"callbacks.profile needs {needed} steps; add trainer.max_steps={needed}"


@rule("callbacks.early_stopping", "callbacks.exact_match", "data._target_")
def accuracy_is_measured(early_stopping: dict | None, exact_match: dict | None, target: str) -> Iterator[str]:
    measured = target.startswith("gptlab.data.problems.") and exact_match
    if early_stopping and early_stopping.get("monitor") == "val/accuracy" and target in NODES and not measured:
        yield (
            "callbacks.early_stopping.monitor=val/accuracy needs data with right answers (data=addition, data=sort) and "
            "callbacks.exact_match"
        )


@rule("data")
def data_files_exist(data: dict) -> Iterator[str]:
    from gptlab.data import files

    kind = NODES.get(data["_target_"])
    try:
        if kind is Memmap:
            files.token_files(data["path"])
        elif kind is Text:
            if (data["tokenizer"] == "bpe") != (data["vocab_size"] is not None):
                yield _vocab_size_text("data.", data, 1024)
            if data["path"] is not None or (data["url"] is None and data["name"] != files.PYTHON_DOCS):
                files.text_files(data["path"], "data.path")
            if data["val_path"] is not None:
                files.text_files(data["val_path"], "data.val_path")
    except UserError as error:
        yield str(error)


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


def validate(values: dict[str, Any], entry: str, references: Collection[str] = ()) -> Any:
    """The typed config (Train, Sample or Prepare) made from a composed config's plain values.

    Args:
        references: keys that only repeat another key's value (`${...}`); the other key is reported.

    Raises:
        UserError: everything that is wrong, one line each.
    """
    problems: dict[str, str] = {}
    valid = values = _without_missing(values)
    for at, node in _built_nodes(values):
        schema = NODES[node["_target_"]] if is_known(node) else Custom
        known = {key: value for key, value in node.items() if key != "_target_" or schema is Custom}
        checked, wrong = _check(schema, known, f"{at}.", values)
        problems |= wrong
        if checked and schema is not Custom:
            valid = with_value(valid, at, {"_target_": node["_target_"], **checked.model_dump()})
    config, wrong = _check(ENTRIES[entry], valid, "", values)
    problems |= wrong
    if any(key not in references for key in problems):
        problems = {key: text for key, text in problems.items() if key not in references}
    texts = list(problems.values())
    for keys, check in RULES[entry]:
        if not any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in keys for b in problems):
            texts += check(*(select(valid, key) for key in keys))
    if texts:
        raise UserError("\n".join(texts))
    return config


def is_known(node: dict[str, Any]) -> bool:
    return isinstance(target := node.get("_target_"), str) and target in NODES


def _built_nodes(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, node) of every node that builds an object."""
    callbacks = values.get("callbacks")
    names = callbacks if isinstance(callbacks, dict) else ()
    for key in ("model", "data", "logger", *(f"callbacks.{name}" for name in names)):
        if isinstance(node := select(values, key), dict):
            yield key, node


def _check(schema: type[Node], node: dict, at: str, values: dict) -> tuple[Node | None, dict[str, str]]:
    """The validated node, or the problems by key."""
    try:
        return schema.model_validate(node), {}
    except ValidationError as invalid:
        found = {at + ".".join(map(str, error["loc"])): error for error in invalid.errors(include_url=False)}
        return None, {key: _describe(key, error, values) for key, error in found.items()}


def _describe(key: str, error: Any, values: dict[str, Any]) -> str:
    given, kind = error["input"], error["type"]
    if kind == "extra_forbidden":
        if key in ("experiment", "debug", "hardware", "recipe"):
            return f"{key}={next(iter(given), '')}: the first line of its YAML must be `# @package _global_`"
        return f"unknown key {key}{did_you_mean(key, _all_keys(values, but=key))}"
    if kind == "missing":
        fix = "name the class to build, such as my_package.MyClass" if "_target_" in key else f"add {key}=VALUE"
        return f"{key} is missing; {fix}"
    if isinstance(given, int) and abs(given) >= 2**64:
        given = hex(given)  # Python refuses to write thousands of digits
    shown = f"{key}={YAML_NAMES.get(repr(given), given)!s:.80}"
    if kind in ("dict_type", "model_type"):
        choose = (
            f"; to choose {given}, its defaults list says `override /{key}: {given}`" if (CONF / key).is_dir() else ""
        )
        return f"{shown}: must be a mapping{choose}"
    text = error["msg"].removeprefix("Value error, ")
    if kind == "string_pattern_mismatch":
        text = "must be PACKAGE.CLASS, such as my_package.MyClass"
    for pydantic, ours in WORDING.items():
        text = text.replace(pydantic, ours)
    return f"{shown}: {text}"


YAML_NAMES = {"None": "null", "True": "true", "False": "false"}
WORDING = {"Input should be": "must be", "a valid integer": "an integer", "a valid string": "a string",
           "a valid number": "a number", "a valid boolean": "true or false", "a valid list": "a list", " after validation": "", "List should have": "must have",
           "greater than or equal to": ">=", "less than or equal to": "<=", "greater than": ">", "less than": "<",
           "'": ""}  # fmt: skip


def did_you_mean(given: str, known: list[str]) -> str:
    """Keys or options like the given one: of the same node, else with the same or a similar last part; else all."""
    node, _, name = given.rpartition(".")
    beside = [key for key in known if key.rpartition(".")[0] == node]
    for candidates, cutoff in ((beside, 0.6), (known, 0.75)):
        by_name = {key.rpartition(".")[2]: key for key in reversed(candidates)}
        near = [other for other in by_name if other.startswith(name)] or difflib.get_close_matches(
            name, by_name, 3, cutoff
        )
        if near and name:
            best = near if len(near) <= 3 else near[:3]
            return f"; did you mean {' or '.join(by_name[other] for other in best)}?"
    listed = f"; known: {', '.join(key.rpartition('.')[2] for key in beside)}" if beside else ""
    return listed + (f"; for Lightning's Trainer: trainer.extra.{name}=VALUE" if node == "trainer" else "")


def _all_keys(node: dict[str, Any], but: str, at: str = "") -> list[str]:
    keys = []
    for name, value in node.items():
        if f"{at}{name}" != but:
            keys.append(f"{at}{name}")
            keys += _all_keys(value, but, f"{at}{name}.") if isinstance(value, dict) else []
    return keys


def _without_missing(value: Any) -> Any:
    """Without values that are still to be given (`???`)."""
    if isinstance(value, dict):
        return {key: _without_missing(item) for key, item in value.items() if item != "???"}
    return value


def select(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def with_value(values: Any, key: str, value: Any) -> dict[str, Any]:
    """A copy of nested dicts with another value at the key; what is no dict on the way there is replaced."""
    first, _, rest = key.partition(".")
    values = values if isinstance(values, dict) else {}
    return {**values, first: with_value(values.get(first), rest, value) if rest else value}
