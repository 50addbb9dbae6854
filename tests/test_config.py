"""Every key of every config: spelling, type, range; and the conditions on several keys. Nothing here starts a process."""

import ast
import importlib
import importlib.util
import inspect
import itertools
import math
import re
import textwrap
import time

import pytest
from composed import composed, errors, leaf_keys

from gptlab import cli, config, train
from gptlab import rules as config_rules
from gptlab.config import CONF, NODES

INF, NAN = math.inf, math.nan
HUGE = 2**31


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def entry_choices() -> list[tuple[str, ...]]:
    """(entry, choices...), so that each option of each group is chosen once, several in one config."""
    options_of = {group: options(group) for group in ("model", "data", "callbacks", "logger")}
    options_of["data"].remove("windows")  # a base, no choice by itself
    options_of["logger"].remove("wandb")  # may not be installed
    options_of["callbacks"] = [f"[default,{name}]" for name in options_of["callbacks"] if name != "default"]
    columns = [[f"{group}={name}" for name in names] for group, names in options_of.items()]
    together = [tuple(filter(None, row)) for row in itertools.zip_longest(*columns)]
    alone = [(f"{group}={name}",) for group in ("experiment", "debug") for name in options(group)]
    return [
        ("train",),
        ("sample",),
        ("prepare",),
        ("sizing",),
        ("export_hf",),
        *(("train", *row) for row in [*together, *alone, (WANDB,)]),
        ("evaluate", "data=text"),
    ]


WANDB = "logger=wandb"
CHOICES = entry_choices()


def choice_with(*chosen: str) -> tuple[str, ...]:
    """The one of CHOICES in which these are chosen."""
    return next(choice for choice in CHOICES if {*chosen} <= {*choice})


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("gptlab.data.files.available_cores", lambda: 2)
    (tmp_path / "here.txt").write_text("to be or not to be")
    (tmp_path / "tokens").mkdir()
    for name in ("train.bin", "val.bin"):
        (tmp_path / f"tokens/{name}").touch()


def wrong(choice: tuple[str, ...], changes: dict) -> list[str]:
    """The lines of the error; data that wait for a path get one."""
    paths = {"data=text": "here.txt", "data=openwebtext": "tokens", "experiment=gpt2_124m": "tokens"}
    path = next((paths[name] for name in choice if name in paths), None)
    return errors(choice[0], choice[1:], ({"data.path": path} if path else {}) | changes)


def keys_of(choice: tuple[str, ...]) -> list[str]:
    return [key for key in leaf_keys(composed(*choice)[0]) if not key.startswith("trainer.extra.")]  # Lightning's


@pytest.mark.parametrize("choice", CHOICES, ids=" ".join)
def test_every_choice_is_valid(choice):
    if WANDB in choice and importlib.util.find_spec("wandb") is None:
        assert wrong(choice, {}) == ["logger=wandb needs Weights & Biases: pip install 'gptlab[wandb]'"]
    else:
        assert wrong(choice, {}) == []


def all_keys(entry: str) -> list[tuple[tuple[str, ...], str]]:
    """Every key of everything that can be composed, each key of a class once, with a choice that has it."""
    found: dict[tuple[str, str], tuple] = {}
    for choice in CHOICES:
        values, _ = composed(*choice)
        for key in keys_of(choice) if choice[0] == entry else ():
            node = config.select(values, key.rpartition(".")[0]) or {}
            found.setdefault((key, node.get("_target_", "")), (choice, key))
    return list(found.values())


@pytest.mark.parametrize("entry", config.ENTRIES)
def test_every_key_misspelled(entry):
    """A key that no schema covers would be accepted, and the default used in silence."""
    for choice, key in all_keys(entry):
        at, dot, name = key.rpartition(".")
        typo = at + dot + (name[:-2] + name[-1] + name[-2] if len(name) > 3 and name[-1] != name[-2] else name + "x")
        lines = [line for line in wrong(choice, {typo: 1}) if line.startswith(f"unknown key {typo};")]
        assert len(lines) == 1 and re.search(rf"(did you mean|or|known:|,) {re.escape(key)}\b", lines[0]), (key, lines)


@pytest.mark.parametrize("entry", config.ENTRIES)
def test_every_key_of_a_wrong_type(entry):
    """A string for numbers, switches, lists and mappings; a list for strings; a list of lists for everything."""
    for choice, key in all_keys(entry):
        given = config.select(composed(*choice)[0], key)
        for value in ("a-string", [[1]]):
            lines = wrong(choice, {key: value})
            is_free = value == "a-string" and (isinstance(given, str) or given is None)
            assert is_free or count_refused(lines, key) == 1, (key, value, lines)


def count_refused(lines: list[str], key: str) -> int:
    """Lines about the key alone, or an item of its list."""
    return sum(re.match(rf"{re.escape(key)}(\.\d+)?=.*: must ", line) is not None for line in lines)


# Smallest and largest values that are taken, and the nearest that are not. None stands for null.
COUNT = ([1, HUGE - 1, 1e3], [0, -1, HUGE, 1.5, INF, NAN, True, None, "1"])
COUNT_OR_AUTO = (["auto", *COUNT[0]], ["all", *COUNT[1]])
OPTIONAL_COUNT = ([None, *COUNT[0]], [bad for bad in COUNT[1] if bad is not None])
SIZE = ([0, HUGE - 1], [-1, HUGE, 0.5, INF, NAN, False, None, "0"])
AMOUNT = ([0, 0.0, 1e30], [-1e-9, INF, NAN, None, True, "1"])
FRACTION = ([0, 0.0, 0.999], [-1e-9, 1, 1.0, INF, NAN, None, True, "0.5"])
SWITCH = ([True, False], [1, 0, None, "yes", "true"])
STRING = (["a", "", "ä b", 2026, 1.5], [None, True, [], {}])
OPTIONAL_STRING = ([None, *STRING[0]], [True, [], {}])
FOLDER = (["a", "a/b", "..a", 2026], ["", ".", "..", "../a", "a/../b", "/a", "a//b", "a/", None, True, ["a"]])
VOCAB = ([257, 100_000], [256, -1, HUGE, True, "300"])
STEPS_OR_AUTO = ([0, "auto", HUGE - 1, 1e2], [-1, HUGE, 0.5, NAN, "automatic", None, True, "5"])
CALLBACK, DATA = "callbacks.", "data."
RANGES = {
    "name": FOLDER, "seed": ([0, 2**32 - 1], [-1, 2**32, 0.5, NAN, True, None, "1"]), "tags": ([[], ["a", 1]], [None, "a", [None], [["a"]]]),
    "init_from": OPTIONAL_STRING, "meta": OPTIONAL_STRING, "resume": OPTIONAL_STRING, "trust": SWITCH,
    **dict.fromkeys(("model.n_layer", "model.n_head", "model.n_embd", "model.vocab_multiple"), COUNT),
    **dict.fromkeys(("model.bias", "model.activation_checkpointing", "model.compile"), SWITCH),
    "model.dropout": FRACTION, "model.gelu": (["erf", "tanh"], ["Tanh", "", None, True, 1]),
    "data.name": FOLDER, "data.block_size": COUNT, "data.batch_size": COUNT, "data.micro_batch_size": OPTIONAL_COUNT,
    "data.val_windows": OPTIONAL_COUNT, "data.workers": ([None, 0, 8], [-1, HUGE, 0.5, True, "2"]),
    **dict.fromkeys(("data.path", "data.val_path", "data.url", "data.sha256", "data.folder", "data.fallback"), OPTIONAL_STRING),
    "data.file": (["a.txt"], ["../a", "/a", ".a", "", None, 5]), "data.tokenizer": (["char", "gpt2", "bpe", "init_from"], ["word", "", None, True]), "data.vocab_size": ([None, *VOCAB[0]], VOCAB[1]),
    "optim.lr": ([1e-9, 1e30], [0, -1, INF, NAN, None, True, "1"]), "optim.min_lr": AMOUNT, "optim.weight_decay": AMOUNT, "optim.grad_clip": AMOUNT,
    "optim.schedule": (["cosine", "linear", "constant"], ["step", None, True]), "optim.cooldown": ([0.1, 1], [0, 1.1, NAN, None]), "optim.momentum": FRACTION,
    **dict.fromkeys(("optim.muon_lr", "optim.embedding_lr", "optim.head_lr"), ([None, 1e-9, 3], [0, -1, INF, True, "1"])), "optim.newton_schulz_steps": ([1, 20], [0, 21, 1.5, None]),
    "model.position": (["learned", "rotary"], ["alibi", None, True]), "model.tie_weights": SWITCH, "model.ngrams": ([[], [2], [2, 3, 8]], [[1], [9], ["2"], None, 2]), "model.ngram_rows": ([1, 2**24], [0, 2**24 + 1, None]), "model.ngram_dropout": FRACTION,
    "optim.warmup_steps": STEPS_OR_AUTO, "trainer.threads": COUNT_OR_AUTO, "trainer.linear": (["auto", "torch", "onednn"], ["mkl", "", None, True, 1]), "optim.decay_steps": SIZE,
    "optim.skip_nonfinite": SIZE, "optim.betas": ([[0, 0.999], [0.9, 0.0]], [[], [0.9], [0.9, 0.9, 0.9], [0.9, 1], [-0.1, 0.9], [NAN, 0.9], [0.9, "0.9"], None, 0.9]),
    **dict.fromkeys(("trainer.max_steps", "trainer.val_every", "trainer.log_every", "trainer.checkpoint_every", "trainer.devices", "trainer.num_nodes"), COUNT),
    "trainer.keep_every": OPTIONAL_COUNT,
    "trainer.max_time": ([None, "00:01:30:00", "1h30m", "90m", "2d", "1d1h1m1s", "45s"], ["", "1", "h", "1h30", "30m1h", "00:00:00:00", "0h", "-1h", "00:30:00:00", "1:2:3", 60, True, [1]]),
    "trainer.accelerator": (["cpu", "gpu", "cuda", "mps"], ["tpu", "auto", None, True]), "trainer.strategy": STRING,
    "trainer.precision": (["auto", "32", 32, "bf16", "fp16"], ["64", 16, "bf16-mixed", None, True]), "trainer.extra": ([{}, {"a": [1]}], [None, [], 1, "a"]),
    "callbacks.exact_match.show": SIZE, "callbacks.throughput": ([None], [1, "a", []]),
    **dict.fromkeys(("callbacks.sample_text.prompt",), OPTIONAL_STRING), "callbacks.sample_text.max_new_tokens": SIZE,
    "callbacks.sample_text.temperature": AMOUNT, "callbacks.sample_text.top_k": OPTIONAL_COUNT,
    "callbacks.checkpointing.every": COUNT, "callbacks.checkpointing.keep_every": OPTIONAL_COUNT,
}  # fmt: skip
WEIGHTS = {**dict.fromkeys(("ckpt", "init_from", "meta"), OPTIONAL_STRING), "trust": SWITCH}
OTHERS = {
    "data=addition": {"data.block_size": OPTIONAL_COUNT, "data.ndigit": ([1, 100], [0, 101, 1.5, None, True])},
    "data=sort": {"data.block_size": OPTIONAL_COUNT, "data.length": ([2, 256], [1, 257, None]), "data.n_symbols": ([2, 62], [1, 63, None])},
    "data=openwebtext": {"data.path": ([], [True, [], {}]), "data.tokenizer": ([None, "gpt2"], ["char", True, 1])},
    "data=python_stdlib_bpe": {"data.vocab_size": (VOCAB[0], [*VOCAB[1], None]), "data.folder": OPTIONAL_STRING},
    "callbacks=[default,ema]": {"callbacks.ema.decay": FRACTION},
    "callbacks=[default,early_stopping]": {
        "callbacks.early_stopping.monitor": (["val/loss", "val/perplexity", "val/bits_per_byte", "val/accuracy"], ["loss", None, True]),
        "callbacks.early_stopping.patience": COUNT, "callbacks.early_stopping.min_delta": AMOUNT,
    },
    "callbacks=[default,median_pruning]": {
        "callbacks.median_pruning.monitor": (["val/loss", "val/perplexity", "val/bits_per_byte", "val/accuracy"], ["loss", None, True]),
        "callbacks.median_pruning.startup": COUNT,
    },
    "debug=overfit": {"callbacks.overfit.target": AMOUNT},
    "debug=profile": {"callbacks.profile.skip_steps": SIZE, "callbacks.profile.steps": COUNT, "callbacks.profile.rows": COUNT},
    "logger=wandb": {
        "logger.project": STRING, "logger.name": OPTIONAL_STRING, "logger.tags": ([[], ["a"]], ["a", None, [None]]),
        "logger.entity": OPTIONAL_STRING, "logger.group": OPTIONAL_STRING, "logger.notes": OPTIONAL_STRING, "logger.offline": SWITCH,
    },
    "sample": {
        **WEIGHTS, **dict.fromkeys(("prompt", "prompt_file"), OPTIONAL_STRING), "stop": OPTIONAL_STRING, "num_samples": COUNT, "max_new_tokens": SIZE, "temperature": AMOUNT,
        "top_k": OPTIONAL_COUNT, "top_p": ([None, 1e-9, 1], [0, -0.1, 1.1, NAN, True, "1"]), "min_p": ([None, 0, 1], [-0.1, 1.1, NAN, True, "1"]),
        "context": (["full", "half"], ["quarter", None, 1]), "precision": (["auto", "32", 32, "bf16"], ["fp16", "64", None, True]),
        "seed": ([0, 2**32 - 1], [-1, 2**32, None]), "device": STRING,
    },
    "evaluate": {
        **WEIGHTS, **{key: RANGES[key] for key in RANGES if key.startswith("data.")}, "split": (["val", "train"], ["test", None, 1]),
        "precision": ([None, "32", 32, "bf16", "fp16"], ["auto", "64", True]), "device": STRING, "out": OPTIONAL_STRING,
    },
    "export_hf": {**WEIGHTS, "out": OPTIONAL_STRING},
    "prepare": {
        **dict.fromkeys(("out", "path", "hub_config", "hub_revision"), OPTIONAL_STRING), **dict.fromkeys(("hub", "hub_split", "text_key"), STRING),
        "tokenizer": (["gpt2", "bpe"], ["char", None]), "vocab_size": ([None, *VOCAB[0]], VOCAB[1]),
        "val_share": ([1e-9, 0.999], [0, 1, -0.1, 1.5, INF, NAN, None]), "split_seed": SIZE, "processes": OPTIONAL_COUNT,
    },
    "sizing": {
        **{key: RANGES[key] for key in RANGES if key.startswith(("name", "seed", "tags", "init_from", "meta", "trust", "model.", "optim.", "trainer.", "callbacks."))},
        **{key: RANGES[key] for key in ("data.name", "data.block_size", "data.batch_size", "data.micro_batch_size", "data.val_windows", "data.workers")},
        "vocab_size": OPTIONAL_COUNT, "tokens": ([None, 1, 300e9], [0, -1, 1.5, INF, True, "1", 2**63]),
        "flops_per_s": ([None, 1, 312e12], [0, -1, INF, NAN, True, "1"]), "mfu": ([1e-9, 1], [0, -0.1, 1.1, NAN, None, True]),
    },
}  # fmt: skip


@pytest.mark.parametrize("chosen", ["train", *OTHERS])
def test_every_range_at_both_ends(chosen):
    """What is taken and what is refused, written down a second time, apart from the schemas."""
    choice = choice_with(chosen)
    for key, (good, bad) in (RANGES if chosen == "train" else OTHERS[chosen]).items():
        for value in good:
            assert count_refused(lines := wrong(choice, {key: value}), key) == 0, (key, value, lines)
        for value in bad:
            assert count_refused(lines := wrong(choice, {key: value}), key) == 1, (key, value, lines)


def test_every_key_has_a_range():
    """A key that is new in conf/ belongs into the tables above."""
    tables = {"train": [RANGES, *(OTHERS[chosen] for chosen in OTHERS if "=" in chosen)]}
    for entry in config.ENTRIES:
        known = {key for table in tables.get(entry) or [OTHERS[entry]] for key in table}
        assert {key for _, key in all_keys(entry) if not key.endswith("_target_")} <= known


@pytest.mark.parametrize(
    ("key", "given", "kept"),
    [
        ("trainer.max_steps", 1e3, 1000),
        ("trainer.max_time", "1h30m", "00:01:30:00"),
        ("trainer.max_time", "90s", "00:00:01:30"),
        ("trainer.max_time", "49h", "02:01:00:00"),
        ("trainer.max_time", "03:00:00:00", "03:00:00:00"),
        ("trainer.precision", 32, "32"),
        ("optim.warmup_steps", 1e2, 100),
        ("optim.lr", 1, 1.0),
        ("name", 2026, "2026"),
        ("tags", [1, "b"], ["1", "b"]),
    ],
)
def test_what_people_type_becomes_the_type_of_the_key(key, given, kept):
    values = config.with_value(composed("train")[0], key, given)
    valid = config.select(config.validate(values, "train").model_dump(), key)
    assert valid == kept and type(valid) is type(kept)


def test_durations_are_ones_that_lightning_takes():
    from lightning.pytorch.callbacks import Timer

    for given, seconds in {"1h30m": 5400, "2d": 172_800, "25h1s": 90_001}.items():
        values = config.with_value(composed("train")[0], "trainer.max_time", given)
        assert Timer(config.validate(values, "train").trainer.max_time)._duration == seconds


TEXT, OPENWEBTEXT, PROFILE = choice_with("data=text"), choice_with("data=openwebtext"), choice_with("debug=profile")
EARLY = ("train", "callbacks=[default,early_stopping]")
PRUNED = ("train", "callbacks=[default,median_pruning]")
SORTING = ("train", "data=sort", "callbacks=[default,early_stopping]")
ACCURACY = {"callbacks.early_stopping.monitor": "val/accuracy"}
FSDP = {"trainer.strategy": "fsdp", "trainer.devices": 2}
# Per rule: entry and choices, changes, what is said (None: nothing).
RULES = {
    "heads_share_the_channels": [
        (("train",), {"model.n_head": 5}, "model.n_embd=128 must be divisible by model.n_head=5"),
        (("train",), {"model.n_head": 8}, None),
        (("train",), {"model": {"_target_": "textwrap.X", "n_head": "many", "n_embd": [1]}}, None),
    ],
    "model_takes_plain_values": [
        (("train",), {"model": {"_target_": "textwrap.X", "_convert_": "all"}}, "unknown key model._convert_;"),
        (("train",), {"model": {"_target_": "textwrap.X", "width_": 1}}, None),
    ],
    "packages_are_installed": [
        (("train",), {"model": {"_target_": "no_such.X"}}, "model._target_=no_such.X: package 'no_such' not found"),
        (("train",), {"data": {"_target_": "no_such.X"}}, "data._target_=no_such.X: package"),
        (("train",), {"logger": {"_target_": "no_such.X"}}, "logger._target_=no_such.X: package"),
        (("train",), {"callbacks.mine": {"_target_": "no_such.X"}}, "callbacks.mine._target_=no_such.X: package"),
        (("train",), {"callbacks.mine": {"_target_": "textwrap.X"}}, None),
        (("train",), {"callbacks.mine": {"_target_": "gptlab.loggers.CSVTable"}}, "this class does not belong there"),
    ],
    "cpus_have_no_fp16": [
        (("train",), {"trainer.precision": "fp16"}, "trainer.precision=fp16 needs a GPU; on a CPU use 32 or bf16"),
        (("train",), {"trainer.precision": "fp16", "trainer.accelerator": "gpu"}, None),
    ],
    "each_process_has_work": [
        (("train",), {"trainer.num_nodes": 13}, "data.batch_size=12 must be >= the number of processes, 13"),
        (("train",), {"trainer.devices": 3, "trainer.num_nodes": 5}, "must be >= the number of processes, 15"),
        (("train",), {"trainer.devices": 4, "data.val_windows": 3}, "data.val_windows=3 must be >= the number"),
        (("train",), {"trainer.devices": 4, "trainer.num_nodes": 3, "data.val_windows": 12}, None),
    ],
    "fsdp_has_limits": [
        (("train",), {**FSDP, "trainer.precision": "fp16", "trainer.accelerator": "gpu"}, "use bf16, 32 or trainer.strategy=ddp"),
        (("train", "callbacks=ema"), FSDP, "fsdp does not work with EMA (callbacks.ema); use trainer.strategy=ddp, or leave EMA out"),
        (("train", "callbacks=ema"), {**FSDP, "trainer.devices": 1}, None),
        (("train",), FSDP, None),
    ],
    "processes_have_cores": [
        (("train",), {"data.workers": 9}, "data.workers=9 must be <= 8, four times the 2 available cores"),
        (("train",), {"data.workers": 8}, None),
        (("train",), {"trainer.devices": 9}, "trainer.devices=9 must be <= 8"),
        (("train",), {"trainer.devices": 9, "trainer.accelerator": "gpu"}, None),
    ],
    "preparing_has_cores": [
        (("prepare",), {"processes": 9}, "processes=9 must be <= 8"),
        (("prepare",), {"processes": 8}, None),
    ],
    "extra_is_not_ours": [
        (("train",), {"trainer.extra": {"max_steps": 3}}, "trainer.extra.max_steps is set by gptlab; use trainer.max_steps"),
        (("train",), {"trainer.extra": {"plugins": []}}, "trainer.extra.plugins is set by gptlab"),
        (("train",), {"trainer.extra": {"limit_val_batches": 3}}, None),
    ],
    "schedule_falls": [
        (("train",), {"optim.min_lr": 0.01}, "optim.min_lr=0.01 must be <= optim.lr=0.001"),
        (("train",), {"optim.min_lr": 0.001}, None),
        (("train",), {"optim.min_lr": 0.01, "optim.schedule": "constant"}, None),
    ],
    "warmup_ends": [
        (("train",), {"optim.warmup_steps": 2000}, "optim.warmup_steps=2000 must be less than"),
        (("train",), {"optim.warmup_steps": 20, "optim.decay_steps": 10}, "must be less than optim.decay_steps=10; try optim.warmup_steps=auto"),
        (("train",), {"optim.warmup_steps": 20, "optim.decay_steps": 10, "optim.schedule": "constant"}, None),
        (("train",), {"optim.warmup_steps": 1999}, None),
        (("train",), {"trainer.max_steps": 1}, None),  # auto always fits
        (("train",), {"optim.warmup_steps": 20, "trainer.max_steps": 10, "resume": "run"}, None),  # to end a run early
        (("train",), {"optim.warmup_steps": 20, "optim.decay_steps": 10, "resume": "run"}, "use a larger optim.decay_steps"),
    ],
    "muon_has_limits": [
        (("train",), {"optim.muon_lr": 0.02, "trainer.strategy": "fsdp", "trainer.devices": 2}, "optim.muon_lr needs whole matrices"),
        (("train",), {"optim.muon_lr": 0.02, "trainer.strategy": "fsdp"}, None),
        (("train",), {"optim.muon_lr": 0.02, "trainer.devices": 2}, None),
        (("train",), {"optim.muon_lr": 0.02, "trainer.precision": "fp16", "trainer.accelerator": "gpu"}, "optim.muon_lr does not work with trainer.precision=fp16"),
    ],
    "tied_heads_are_embeddings": [
        (("train",), {"optim.head_lr": 0.01}, "optim.head_lr=0.01: the head is tied to the embedding; use optim.embedding_lr"),
        (("train",), {"optim.head_lr": 0.01, "model.tie_weights": False}, None),
    ],
    "rotary_turns_pairs": [
        (("train",), {"model.position": "rotary", "model.n_embd": 12}, "model.n_embd=12 must be divisible by 8"),
        (("train",), {"model.position": "rotary"}, None),
        (("train",), {"model.n_embd": 12}, None),
    ],
    "profile_fits": [
        (PROFILE, {"trainer.max_steps": 14}, "callbacks.profile needs 15 steps; add trainer.max_steps=15"),
        (PROFILE, {"trainer.max_steps": 15}, None),
        (PROFILE, {"trainer.max_steps": 14, "resume": "run"}, None),
        (("train",), {"callbacks.profile": {"_target_": "textwrap.X", "skip_steps": "a", "steps": [1]}}, None),
    ],
    "accuracy_is_measured": [
        (EARLY, ACCURACY, "callbacks.early_stopping.monitor=val/accuracy requires data=addition or data=sort"),
        (SORTING, {**ACCURACY, "callbacks.exact_match": None}, "requires data=addition or data=sort"),
        (SORTING, ACCURACY, None),
        (EARLY, {**ACCURACY, "data": {"_target_": "textwrap.X"}}, None),
        (PRUNED, {"callbacks.median_pruning.monitor": "val/accuracy"}, "callbacks.median_pruning.monitor=val/accuracy requires"),
    ],
    "data_files_exist": [
        (TEXT, {"data.path": None}, "data.path is missing; give a file"),
        (TEXT, {"data.path": "nowhere.txt"}, "data.path=nowhere.txt: No such file"),
        (TEXT, {"data.val_path": "nowhere.txt"}, "data.val_path=nowhere.txt: No such file"),
        (TEXT, {"data.tokenizer": "bpe"}, "data.tokenizer=bpe needs data.vocab_size, such as data.vocab_size=1024"),
        (TEXT, {"data.vocab_size": 300}, "data.vocab_size=300 needs data.tokenizer=bpe"),
        (TEXT, {"data.tokenizer": "bpe", "data.vocab_size": 300}, None),
        (OPENWEBTEXT, {"data.path": "."}, "has no train.bin and no val.bin"),
        (("train",), {"data.path": "a.txt"}, "data=python_docs has its own text and split; use yours with data=text data.path=a.txt"),
        (choice_with("data=shakespeare_char"), {"data.val_path": "a.txt"}, "use yours with data=text data.path=FILE data.val_path=a.txt"),
        (choice_with("data=shakespeare_char"), {}, None),  # its download is not the config's business
    ],
    "weights_bring_a_tokenizer": [
        (TEXT, {"data.tokenizer": "init_from"}, "data.tokenizer=init_from needs init_from; else use char, bpe or gpt2"),
        (TEXT, {"data.tokenizer": "init_from", "init_from": "gpt2"}, None),
    ],
    "meta_describes_weights": [
        (("train",), {"meta": "meta.pkl"}, "meta=meta.pkl: describes the tokens of nanoGPT's checkpoint; it needs init_from"),
        (("train",), {"meta": "meta.pkl", "init_from": "ckpt.pt"}, None),
    ],
    "bpe_has_a_size": [
        (("prepare",), {"tokenizer": "bpe"}, "tokenizer=bpe needs vocab_size, such as vocab_size=8192"),
        (("prepare",), {"vocab_size": 300}, "vocab_size=300 needs tokenizer=bpe"),
        (("prepare",), {"tokenizer": "bpe", "vocab_size": 300}, None),
    ],
    "out_is_named": [
        (("prepare",), {"path": "*.txt"}, "out is missing: name a folder for the token files"),
        (("prepare",), {"hub": "a/b"}, "out is missing"),
        (("prepare",), {"path": "*.txt", "out": "here"}, None),
    ],
}  # fmt: skip


def test_every_rule_is_tried():
    assert {check.__name__ for rules in config_rules.RULES.values() for _, check in rules} == RULES.keys()


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    assert any(said for *_, said in RULES[name]) and not all(said for *_, said in RULES[name])
    for choice, changes, said in RULES[name]:
        lines = wrong(choice, changes)
        assert (lines == []) if said is None else (len(lines) == 1 and said in lines[0]), (changes, lines)


@pytest.mark.parametrize(
    ("started", "changes", "said"),
    [
        ("4", {}, "4 processes were started (WORLD_SIZE), but trainer.devices=1 x trainer.num_nodes=1 is 1; add trainer.devices=4"),
        ("8", {"trainer.num_nodes": 2}, "add trainer.devices=4"),
        ("3", {"trainer.num_nodes": 2}, "add trainer.devices=3 trainer.num_nodes=1"),
        ("4", {"trainer.devices": 2, "trainer.num_nodes": 2}, None),
        ("1", {}, None),
    ],
)  # fmt: skip
def test_torchruns_processes_are_those_of_the_config(monkeypatch, started, changes, said):
    monkeypatch.setenv("WORLD_SIZE", started)
    lines = wrong(("train",), changes)
    assert (lines == []) if said is None else (len(lines) == 1 and lines[0].endswith(said)), lines


def test_everything_is_reported_at_once():
    """Unknown keys, types, ranges and rules; a rule over a key that is wrong by itself stays silent."""
    changes = {
        "optim.lrr": 1, "seed": "x", "model.dropout": 1, "callbacks.sample_text.top_k": 0, "trainer.num_nodes": 20,
        "model.n_head": 5, "logger.nme": 1, "optim.min_lr": -1, "nonsense": 1,
    }  # fmt: skip
    lines = wrong(("train",), changes)
    starts = ["unknown key optim.lrr", "seed=x", "model.dropout=1", "callbacks.sample_text.top_k=0", "data.batch_size=12",
              "model.n_embd=128", "unknown key logger.nme", "optim.min_lr=-1", "unknown key nonsense"]  # fmt: skip
    assert len(lines) == len(starts) and all(any(line.startswith(start) for line in lines) for start in starts)


def test_a_value_that_others_repeat_is_reported_once_where_it_was_given():
    """decay_steps, checkpoint_every and others are `${...}` of the key with the mistake."""
    for key, value in (("trainer.max_steps", -1), ("trainer.val_every", "x"), ("data.name", "..")):
        values, references = composed("train")
        for repeated in (key, *(r for r in references if config.select(values, r) == config.select(values, key))):
            values = config.with_value(values, repeated, value)
        with pytest.raises(config.UserError) as raised:
            config.validate(values, "train", references)
        assert str(raised.value).startswith(f"{key}={value}: ") and "\n" not in str(raised.value)
    assert wrong(("train",), {"optim.decay_steps": -1})[0].startswith("optim.decay_steps=-1: ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_steps": 10}, "unknown key max_steps; did you mean trainer.max_steps?"),
        ({"model.block_size": 8}, "unknown key model.block_size; did you mean data.block_size?"),
        ({"modle": "gpt2"}, "unknown key modle; did you mean model?"),
        ({"nonsense.deeply": 1}, "unknown key nonsense; known: "),
        ({"trainer.limit_val_batches": 2}, "for Lightning's Trainer: trainer.extra.limit_val_batches=VALUE"),
        ({"optim": 5}, "optim=5: must be a mapping"),
        ({"optim": None}, "optim=null: must be a mapping"),
        ({"model": "gpt2"}, "model=gpt2: must be a mapping; to choose gpt2, its defaults list says `override /model: gpt2`"),
        ({"callbacks.progress": 5}, "callbacks.progress=5: must be a mapping"),
        ({"experiment": {"optim": {"lr": 1}}}, "experiment=optim: the first line of its YAML must be `# @package _global_`"),
        ({"experiment": {}}, "the first line of its YAML must be `# @package _global_`"),
        ({"model": {"n_layer": 2}}, "model._target_ is missing; name the class to build, such as my_package.MyClass"),
        ({"model": {"_target_": "X"}}, "model._target_=X: must be PACKAGE.CLASS"),
        ({"data.name": "???"}, "data.name is missing; add data.name=VALUE"),
        ({"trainer.max_time": "1 hour"}, "trainer.max_time=1 hour: must be a duration such as 90m, 1h30m, 2d, or DD:HH:MM:SS"),
        ({"optim.betas": [0.9, 2]}, "optim.betas.1=2: must be < 1"),
        ({"trainer.max_steps": 0}, "trainer.max_steps=0: must be >= 1"),
        ({"trainer.max_steps": None}, "trainer.max_steps=null: must be an integer"),
        ({"model.bias": "yes"}, "model.bias=yes: must be true or false"),
        ({"optim.schedule": "step"}, "optim.schedule=step: must be cosine, linear or constant"),
    ],
)  # fmt: skip
def test_hints(changes, said):
    lines = wrong(("train",), changes)
    assert len(lines) == 1 and said in lines[0] and len(lines[0]) < 400, lines


def parameters(target: str) -> set[str]:
    """The keyword arguments of a class, and those of the base that it hands the rest to."""
    module, _, name = target.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    names = {p.name for p in signature if p.kind is not p.VAR_KEYWORD}
    base = {"gptlab.data": "gptlab.data.windows.WindowData"}.get(".".join(target.split(".")[:2]))
    return names | (parameters(base) if base and base != target else set())


@pytest.mark.parametrize("target", NODES)
def test_schemas_are_what_the_classes_take(target):
    """A key that a schema offers and no class takes, or the other way round, would be a lie."""
    if target.endswith(".WandbLogger"):
        pytest.importorskip("wandb")
    keys, taken = set(NODES[target].model_fields), parameters(target)
    if target.startswith("lightning."):  # which take more
        assert keys <= taken
    else:  # but for what the run knows, and what is done with the model once it is built
        given = {"gptlab.model.GPT": {"vocab_size", "block_size"}}.get(target, {"seed", "save_dir", "purge_step"})
        assert keys - {"compile"} == taken - given


def test_schemas_are_what_conf_lists():
    """Each key stands in conf/, so that it can be seen and changed; each class is offered by some choice."""
    offered = set()
    for choice in CHOICES:
        values, _ = composed(*choice)
        schema = config.ENTRIES[choice[0]]
        assert values.keys() == schema.model_fields.keys(), choice
        for at in ("optim", "trainer") if choice[0] == "train" else ():
            assert values[at].keys() == config.ENTRIES["train"].model_fields[at].annotation.model_fields.keys()
        for at, node in config._built_nodes(values):
            offered.add(node["_target_"])
            assert node.keys() - {"_target_"} == NODES[node["_target_"]].model_fields.keys(), (choice, at)
    assert offered == NODES.keys()


def test_every_key_is_explained_in_conf():
    """`--help` and the YAML are the reference of keys."""
    for group in ("model", "data", "optim", "trainer", "callbacks", "logger", "debug"):
        for name in options(group):
            explained = set(cli._explanations([CONF], group, name))
            text = (CONF / group / f"{name}.yaml").read_text()
            keys = re.findall(r"^ *(\w+): (?!\{|\[\w+, _self_)\S", text, re.MULTILINE)
            assert set(keys) - explained - {"_target_", "defaults", "name"} == set(), f"{group}/{name}"
    for entry in config.ENTRIES:
        explained = cli._explanations([CONF], "", entry)
        assert {key for key in leaf_keys(composed(entry)[0]) if "." not in key} - explained.keys() == set(), entry


def test_what_lightning_is_told_is_what_extra_may_not_say():
    """NOT_EXTRA is asked before Lightning is imported, so it repeats the names."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(train.make_trainer)))
    (call,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "L.Trainer"]
    assert {keyword.arg for keyword in call.keywords} - {None} | {"max_time"} == set(config_rules.NOT_EXTRA)


def test_a_validation_takes_milliseconds():
    """It is done for every job of a sweep before the first one starts. The bound is 20 times what it takes."""
    wrong(("train",), {})
    started = time.process_time()
    for _ in range(10):
        wrong(("train",), {})
    assert (time.process_time() - started) / 10 < 0.1
