"""What a config may hold. Hydra composes it from conf/ and the command line; `validate` checks all of it at once.

    conf/*.yaml + command line --Hydra--> plain values --validate--> Train | Sample | Evaluate | Prepare | Sizing

Types and ranges are pydantic models, one per node of the config; a node with a `_target_` is checked by the model of
that class (`NODES`), any other class is custom and takes what it takes. Conditions on several keys are in rules.py.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from gptlab.errors import UserError
from gptlab.targets import foreign_targets
from gptlab.tokenizer import MAX_VOCAB_SIZE

# Short names on the command line of a sweep.
SWEEP_KEYS = {"n_jobs": "hydra.launcher.n_jobs", "n_trials": "hydra.sweeper.n_trials",
              "metric": "hydra.sweeper.metric", "at": "hydra.sweeper.at"}  # fmt: skip
VALIDATED = ("val/loss", "val/perplexity", "val/bits_per_byte")  # what each validation measures
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


def _or_auto(least: int) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        value = _integral(value)
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31):
            raise ValueError(f"must be an integer >= {least}, or auto")
        return value

    return check


def _distinct(values: list[Any]) -> list[Any]:
    if len(values) > len({*values}):
        raise ValueError("must be different sizes")
    return values


def _folder_name(value: Any) -> Any:
    if isinstance(value, str) and ({"", ".", ".."} & set(value.split("/")) or not value.isprintable()):
        raise ValueError("must be the name of a folder inside outputs/")
    return value


def _file_name(value: Any) -> Any:
    if not isinstance(value, str) or value[:1] in ("", ".") or "/" in value or not value.isprintable():
        raise ValueError("must be the name of a file, without a folder")
    return value


Int = Annotated[int, BeforeValidator(_integral)]
Count = Annotated[Int, Field(ge=1, lt=2**31)]
Size = Annotated[Int, Field(ge=0, lt=2**31)]
VocabSize = Annotated[Int, Field(ge=257, le=MAX_VOCAB_SIZE)]  # 256 bytes and the end of text
Seed = Annotated[Int, Field(ge=0, lt=2**32)]  # numpy's legacy generator takes no larger one
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LearningRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Str = Annotated[str, BeforeValidator(_string)]
FolderName = Annotated[Str, BeforeValidator(_folder_name)]
Monitor = Literal["val/loss", "val/perplexity", "val/bits_per_byte", "val/accuracy"]


WarmupSteps = Annotated[Any, BeforeValidator(_or_auto(0))]
Threads = Annotated[Any, BeforeValidator(_or_auto(1))]


class Node(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True, protected_namespaces=())


class GPT(Node):
    n_layer: Count
    n_head: Count
    n_embd: Count
    dropout: Fraction
    bias: bool
    gelu: Literal["erf", "tanh"]
    # Runs of an older gptlab have no keys with a default.
    position: Literal["learned", "rotary"] = "learned"
    tie_weights: bool = True
    ngrams: Annotated[list[Annotated[Int, Field(ge=2, le=8)]], AfterValidator(_distinct)] = []
    ngram_rows: Annotated[Int, Field(ge=1, le=2**24)] = 16384
    ngram_dropout: Fraction = 0.0
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
    tokenizer: Literal["char", "gpt2", "bpe", "init_from"]
    vocab_size: VocabSize | None
    url: Str | None
    sha256: Str | None
    file: Annotated[Str, BeforeValidator(_file_name)]
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
    lr: LearningRate
    min_lr: Amount
    schedule: Literal["cosine", "linear", "constant"]
    warmup_steps: WarmupSteps
    decay_steps: Size
    weight_decay: Amount
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    grad_clip: Amount
    skip_nonfinite: Size
    cooldown: Annotated[float, Field(gt=0, le=1)] = 1.0
    muon_lr: LearningRate | None = None
    momentum: Fraction = 0.95
    newton_schulz_steps: Annotated[Int, Field(ge=1, le=20)] = 5
    embedding_lr: LearningRate | None = None
    head_lr: LearningRate | None = None


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
    threads: Threads = "auto"  # runs of an older gptlab have none
    linear: Literal["auto", "torch", "onednn"] = "torch"  # which was all there was
    extra: dict[str, Any]


class SampleText(Node):
    prompt: Str | None
    max_new_tokens: Size
    temperature: Amount
    top_k: Count | None


class EarlyStopping(Node):
    monitor: Monitor
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
    "gptlab.data.windows.WindowData": Windows,
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
    "gptlab.callbacks.pruning.MedianPruning": _node("MedianPruning", monitor=Monitor, startup=Count),
    "gptlab.callbacks.ema.EMA": _node("EMA", decay=Fraction),
    "gptlab.callbacks.debug.Overfit": _node("Overfit", target=Amount),
    "gptlab.callbacks.debug.Profile": _node("Profile", skip_steps=Size, steps=Count, rows=Count),
    "gptlab.loggers.TensorBoard": _node("TensorBoard"),
    "lightning.pytorch.loggers.WandbLogger": Wandb,
    "gptlab.loggers.CSVTable": _node("CSVTable"),
}


# Keys that runs of an older gptlab lack, and the values that they had in effect.
ADDED = {f"{at}.{name}": field.default for at, node in (("model", GPT), ("optim", Optim))
         for name, field in node.model_fields.items() if not field.is_required()}  # fmt: skip


class Custom(Node):
    """A node that builds a custom class."""

    model_config = ConfigDict(extra="allow")
    target: Annotated[str, Field(alias="_target_", pattern=r"^[^\W\d]\w*(\.\w+)+$")]


class Experiment(Node):
    name: FolderName
    seed: Seed
    tags: list[Str]
    model: dict[str, Any]
    data: dict[str, Any]
    optim: Optim
    trainer: Trainer
    callbacks: dict[str, dict[str, Any] | None] | None = None  # `~callbacks` leaves them out
    logger: dict[str, Any] | None = None
    init_from: Str | None = None  # runs of an older gptlab have none
    meta: Str | None = None
    trust: bool


class Train(Experiment):
    resume: Str | None


class Sizing(Experiment):
    vocab_size: Count | None
    tokens: Annotated[Int, Field(ge=1, lt=2**63)] | None
    flops_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    mfu: Annotated[float, Field(gt=0, le=1)]


class Weights(Node):
    ckpt: Str | None
    init_from: Str | None
    meta: Str | None
    trust: bool


class Sample(SampleText, Weights):
    prompt_file: Str | None
    num_samples: Count
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    min_p: Annotated[float, Field(ge=0, le=1)] | None
    stop: Str | None
    context: Literal["full", "half"]
    seed: Seed
    device: Str
    precision: Annotated[Literal["auto", "32", "bf16"], BeforeValidator(_string)]


class Evaluate(Weights):
    data: dict[str, Any]
    split: Literal["val", "train"]
    precision: Annotated[Literal["32", "bf16", "fp16"] | None, BeforeValidator(_string)]
    device: Str
    out: Str | None


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


class Export(Weights):
    out: Str | None


ENTRIES = {
    "train": Train,
    "sample": Sample,
    "evaluate": Evaluate,
    "prepare": Prepare,
    "sizing": Sizing,
    "export_hf": Export,
}


def validate(values: dict[str, Any], entry: str, references: Collection[str] = ()) -> Any:
    """The typed config (one of ENTRIES) made from a composed config's plain values.

    Args:
        references: keys that only repeat another key's value (`${...}`); the other key is reported.

    Raises:
        UserError: everything that is wrong, one line each.
    """
    from gptlab.rules import RULES

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


def foreign_parts(values: dict[str, Any]) -> list[str]:
    """What a config from outside names and conf/ does not: classes, and a download."""
    texts = [file.read_text("utf-8") for file in (CONF / "data").glob("*.yaml")]
    url = select(values, "data.url")
    known = url is None or any(f"\nurl: {url}\n" in text for text in texts)
    return foreign_targets(values, NODES) + ([] if known else [str(url)[:100]])


def with_added(values: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the keys that an older gptlab did not have."""
    own_model = select(values, "model._target_") == "gptlab.model.GPT"
    for key, default in ADDED.items():
        node = select(values, key.partition(".")[0])
        if isinstance(node, dict) and key.partition(".")[2] not in node and (own_model or key.startswith("optim.")):
            values = with_value(values, key, default)
    return values


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
        keys = _all_keys(values, but=[key for key, error in found.items() if error["type"] == "extra_forbidden"])
        return None, {key: _describe(key, error, keys) for key, error in found.items()}


def _describe(key: str, error: Any, keys: list[str]) -> str:
    given, kind = error["input"], error["type"]
    if kind == "extra_forbidden":
        if key in ("experiment", "sweep", "debug", "hardware", "recipe"):
            return f"{key}={next(iter(given), '')}: the first line of its YAML must be `# @package _global_`"
        return f"unknown key {key}{did_you_mean(key, [*keys, *SWEEP_KEYS])}"
    if kind == "missing":
        fix = "name the class to build, such as my_package.MyClass" if "_target_" in key else f"add {key}=VALUE"
        return f"{key} is missing; {fix}"
    if isinstance(given, int) and abs(given) >= 2**64:
        given = hex(given)  # Python refuses to write thousands of digits
    assignment = f"{key}={YAML_NAMES.get(repr(given), given)!s:.80}"
    if kind in ("dict_type", "model_type"):
        choose = (
            f"; to choose {given}, its defaults list says `override /{key}: {given}`" if (CONF / key).is_dir() else ""
        )
        return f"{assignment}: must be a mapping{choose}"
    text = error["msg"].removeprefix("Value error, ")
    if kind == "string_pattern_mismatch":
        text = "must be PACKAGE.CLASS, such as my_package.MyClass"
    for pydantic, ours in WORDING.items():
        text = text.replace(pydantic, ours)
    return f"{assignment}: {text}"


YAML_NAMES = {"None": "null", "True": "true", "False": "false"}
WORDING = {"Input should be": "must be", "a valid integer": "an integer", "a valid string": "a string",
           "a valid number": "a number", "a valid boolean": "true or false", "a valid list": "a list", " after validation": "", "List should have": "must have",
           "greater than or equal to": ">=", "less than or equal to": "<=", "greater than": ">", "less than": "<",
           "'": ""}  # fmt: skip


# nanoGPT's and other habits.
ALIASES = {"learning_rate": "optim.lr", "eval_interval": "trainer.val_every", "log_interval": "trainer.log_every",
           "warmup_iters": "optim.warmup_steps", "lr_decay_iters": "optim.decay_steps", "max_iters": "trainer.max_steps",
           "epochs": "trainer.max_steps", "device": "hardware", "start": "prompt", "ckpt": "init_from or resume", "wandb_log": "logger=wandb", "out_dir": "name"}  # fmt: skip


def did_you_mean(given: str, known: list[str]) -> str:
    """Keys or options like the given one: of the same node, else with the same or a similar last part; else all."""
    node, _, name = given.rpartition(".")
    if name in ALIASES:
        return f"; did you mean {ALIASES[name]}?"
    beside = [key for key in known if key.rpartition(".")[0] == node]
    for candidates, cutoff in ((beside, 0.6), (known, 0.75)):
        by_name = {key.rpartition(".")[2]: key for key in reversed(candidates)}
        near = sorted((other for other in by_name if other.startswith(name)), key=len) or difflib.get_close_matches(
            name, by_name, 3, cutoff
        )
        if near and name:
            best = near if len(near) <= 3 else near[:3]
            return f"; did you mean {' or '.join(by_name[other] for other in best)}?"
    listed = f"; known: {', '.join(key.rpartition('.')[2] for key in beside)}" if beside else ""
    return listed + (f"; for Lightning's Trainer: trainer.extra.{name}=VALUE" if node == "trainer" else "")


def _all_keys(node: dict[str, Any], but: Collection[str], at: str = "") -> list[str]:
    keys = []
    for name, value in node.items():
        if f"{at}{name}" not in but:
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
