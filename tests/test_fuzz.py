"""Damaged and foreign input: a config or a tokenizer that works, or one clean UserError; never anything else.

Half of all inputs are small changes of valid ones, which reach the inner checks; the others have no sense. A seed and a
number name each input, for a failure to be repeated.
"""

import base64
import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from composed import compose_entry, composed, leaf_keys

from gptlab import cli, config
from gptlab.config import CONF
from gptlab.data.files import python_docs
from gptlab.errors import UserError
from gptlab.tokenizer import BPETokenizer, CharTokenizer, from_state

SEED = 7
SECONDS = 20  # that one input may take; most take a hundredth of a second
SOME = [40, pytest.param(10_000, marks=pytest.mark.slow)]  # command lines, a tenth of a second each
STATES = [1500, pytest.param(15_000, marks=pytest.mark.slow)]


class TooLong(BaseException):
    """No Exception, so that nothing explains it."""


def judge(inputs: Iterator[Any], verdict: Callable[[Any], str]) -> Counter[str]:
    """How often each verdict was given: accepted, refused, or another that is right; fails for whatever is not."""

    def too_long(*_: Any) -> None:
        raise TooLong

    previous = signal.signal(signal.SIGALRM, too_long)
    verdicts, wrong = Counter(), []
    for number, given in enumerate(inputs):
        signal.alarm(SECONDS)
        try:
            verdicts[verdict(given)] += 1
        except BaseException as error:  # tiktoken's crashes are no Exception
            wrong.append(f"seed {SEED}, input {number}: {given!a:.300}: {type(error).__name__}: {error!s:.300}")
        finally:
            signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    print(dict(verdicts), len(wrong), "wrong")
    assert not wrong, "\n".join(wrong)
    return verdicts


def changed(rng: random.Random, text: str, alphabet: str) -> str:
    """One character more, less or another, or a part taken out, repeated or moved."""
    at, end = sorted(rng.randint(0, len(text)) for _ in range(2))
    new = rng.choice(alphabet)
    return rng.choice(
        [text[:at] + new + text[at:], text[:at] + text[at + 1 :], text[:at] + new + text[at + 1 :], text[:at] + text[end:],
         text[:end] + text[at:], text[at:] + text[:at]]
    )  # fmt: skip


# Command lines.

GROUPS = {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in CONF.iterdir() if path.is_dir()}
CHOICES = [f"{group}={name}" for group, names in GROUPS.items() for name in names if group not in ("hydra", "recipe")]
# Valid, and of every kind that there is; those of single keys are read off the configs.
VALID = {
    "train": [
        *CHOICES, "callbacks=[early_stopping,ema]", "experiment=[addition,sort]", "optim.betas=[0.9,0.95]", "tags=[a,b]",
        "data=text data.path=text.txt", "data=text data.path=*.txt data.val_path=text.txt", "~logger", "~callbacks.sample_text",
        "data=shakespeare_bpe data.tokenizer=bpe data.vocab_size=300", "trainer.max_time=00:01:00:00", "resume=run",
        "resume=run trainer.max_steps=30", "trainer.extra.limit_val_batches=2", "+trainer.extra.profiler=simple",
        "hydra.run.dir=outputs/here", "name=a/b", "model._target_=my.Model +model.width=3", "callbacks.mine={_target_:my.Callback}",
        "callbacks.sample_text.prompt=To be, or 'not'", "seed=${trainer.max_steps}", "data.batch_size=${trainer.devices}",
        "+callbacks.early_stopping={_target_:gptlab.callbacks.early_stopping.EarlyStopping,patience:3}", "hydra.verbose=true",
        "optim.warmup_steps=0 trainer.max_steps=10", "++trainer.devices=2", "debug=overfit model=gpt2", "hardware=gpu",
    ],
    "sample": ["ckpt=run", "prompt=To be", "prompt_file=text.txt", "top_k=null", "device=cpu", "trust=true"],
    "prepare": ["path=*.txt out=here", "tokenizer=bpe vocab_size=300", "processes=2", "out=here hub=a/b hub_config=c"],
}  # fmt: skip
FLAGS = [
    ["-m"],
    ["--cfg", "job"],
    ["--config-dir", "c"],
    ["--"],
    ["-"],
    ["-x"],
    ["--seed=1"],
    ["-c=job"],
    ["--config-dir=x"],
    ["-h"],
]
VALUES = [
    "", " ", "null", "true", "False", "yes", "~", "0", "-0", "-1", "01", "+1", "1_000", "0x10", "1.0", "-0.0", ".5", "1e3",
    "1e-999", "1e999", "-1e999", "nan", "inf", "-inf", "NaN", str(2**31), str(2**63), "9" * 400, "-" + "9" * 400, "9" * 5000,
    "''", '""', "'a", '"', "\\", "'\\'", "[]", "{}", "[1]", "[1,2,3]", "[a,b", "[[1],[2]]", "[null,null]", "[nan,inf]", "{a:1}",
    "{a:{b:[1]}}", "{_target_:x}", "{_target_:os.system,a:1}", "[" * 50, "[" * 50 + "]" * 50, "[" * 200 + "]" * 200, "{1:2}",
    "${seed}", "${nope}", "${", "}", "${}", "${.}", "${..}", "${name}", "${model}", "${data.name}", "${oc.env:HOME}", "${oc.env:NOPE}",
    "${oc.env:NOPE,1}", "${oc.decode:1}", "${oc.decode:'['}", "${now:%Y}", "${hydra:runtime.cwd}", "${hydra:nope}", "${nope:1}",
    "${oc.select:seed}", "${${name}}", "${oc.create:{a:1}}", "???", "1,2", "a,b", ",", "a=b", "a:b", "a b", "@", "a@b", "/a", "../..",
    "range(1,3)", "choice(1,2)", "glob(*)", "int(2.5)", "int(nan)", "str([1])", "float(a)", "json_str({a:1})", "sort(2,1)",
    "shuffle(1,2)", "tag(a,1)", "interval(0,1)", "int(1e999)", "extend_list(1)", "nope(1)", "gpt2", "adamw", "cosine", "cpu",
    "my.Model", "gptlab.model.GPT", "os.system", "__main__.X", "builtins.eval", ".x", "x.", "a..b", "é.x", "sys.x", "__mp_main__.X",
    "é", "🙂", "\0", "\n", "\t", "\x1b[31m", "\u2028", "\ufeff", "\ud800", "\udcff", "a\0b", "x" * 5000, "~\0", "*\0", "*" + "/a" * 2000,
    "[", "*", "**", "?", "[!", "%", "%s", "{0}", "00:00:00:00", "00:01:00:00", "99999:00:00:00", "nowhere", "text.txt", ".", "run",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """A working directory with a text and a run; whatever was done, it must be as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as cli.main
    monkeypatch.setattr(cli, "notes", [])
    monkeypatch.setattr("gptlab.data.files._download", no_network)
    (tmp_path / "text.txt").write_text("to be or not to be")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(composed("train")[0]))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    yield tmp_path
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "something was written"


def no_network(*_: Any) -> None:
    raise OSError("no network")


def settings(entry: str) -> list[str]:
    """`key=value` for every value of an entry's config."""
    values, _ = composed(entry)
    pairs = [(key, config.select(values, key)) for key in leaf_keys(values)]
    return [
        f"{key}={config.YAML_NAMES.get(str(value), value)}"
        for key, value in pairs
        if not isinstance(value, (dict, list))
    ]


def command_lines(count: int) -> Iterator[tuple[str, list[str]]]:
    for number in range(count):
        rng = random.Random(f"{SEED}/{number}")
        entry = rng.choice(["train"] * 6 + ["sample", "prepare"])
        yield entry, (random_line if number % 2 else mutated_line)(rng, entry)


def mutated_line(rng: random.Random, entry: str) -> list[str]:
    """A valid command line with one small change."""
    known, letters = settings(entry), "ab.=+~-@/ ,:'\"\\[]{}()$\n\0é\ud800"
    chosen = [rng.choice(rng.choice([VALID[entry], known, known])) for _ in range(rng.choice([1, 1, 2]))]
    arguments = [part for line in chosen for part in (line.split(" ") if line.count("=") > 1 else [line])]
    at = rng.randrange(len(arguments))
    key, _, value = arguments[at].partition("=")
    other = rng.choice(known).partition("=")[0]
    arguments[at] = rng.choice([
        changed(rng, arguments[at], letters), f"{key}={changed(rng, value, letters)}", f"{key}={changed(rng, value, '0123456789.e-')}",
        f"{key}={rng.choice(VALUES)}", f"{key}={rng.choice(VALUES)}",
        rng.choice(["+", "++", "~", "hydra.", "trainer.", "_", ".", "trainer.extra."]) + arguments[at],
        rng.choice([key, f"~{key}", f"{other}={value}", f"{key}.{other}={value}", f"{key}@{other}={value}", f"{key}.0={value}"]),
        rng.choice([f"{key}=[{value}]", f"{key}={{{value}}}", f"{key}={value},{value}", f"{key}='{value}'", f'{key}="{value}',
                    f"{key}=${{{other}}}", f"{key}=${{{key}}}"]),
    ])  # fmt: skip
    return arguments


def random_line(rng: random.Random, entry: str) -> list[str]:
    """Strings without sense, and settings of any keys and values; some with a flag among them."""
    arguments = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        key = rng.choice([rng.choice(settings(entry)).partition("=")[0], rng.choice(list(GROUPS)), rng.choice(VALUES)])
        nonsense = "".join(rng.choices("ab.=+~-@/ ,:'\"\\[]{}()$\n\0é\ud800", k=rng.randrange(12)))
        setting = f"{rng.choice(['', '', '+', '++', '~'])}{key}={random_value(rng, 2)}"
        arguments.append(rng.choice([nonsense, setting, setting, f"{key}={rng.choice(VALUES)}"]))
    if rng.random() < 0.15:
        at = rng.randrange(len(arguments) + 1)
        arguments[at:at] = rng.choice(FLAGS)
    return arguments


def random_value(rng: random.Random, depth: int) -> str:
    if not depth or rng.random() < 0.4:
        return rng.choice(VALUES)
    parts = [random_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    shape = rng.choice(["[{}]", "{{{}}}", "${{{}}}", "'{}'", "f({})", "{}"])
    return shape.format(",".join(f"a{i}:{part}" if shape == "{{{}}}" else part for i, part in enumerate(parts)))


def verdict_on_line(line: tuple[str, list[str]]) -> str:
    """As cli.main does it, but for the run folder: accepted, refused, or arranged (a flag leaves the rest to Hydra)."""
    entry, arguments = line
    composing = True
    try:
        overrides = cli.prepare_overrides(list(arguments), entry)
        if any(override.startswith("-") for override in overrides):
            return "arranged"
        cfg = compose_entry(entry, *overrides)
        composing = False
        cli.load_config(cfg, entry, overrides)
        return "accepted"
    except Exception as error:
        text = cli.error_text(error, composing)
        assert text and text.strip(), f"not explained: {error!r:.300}"
        assert composing or isinstance(error, UserError), f"not ours: {error!r:.300}"
        return "refused"


@pytest.mark.parametrize("count", SOME)
def test_command_lines(folder, count):
    """Some are accepted: else nothing says that the checks are reached."""
    verdicts = judge(command_lines(count), verdict_on_line)
    assert verdicts["accepted"] >= count / 30 and verdicts["refused"] > count / 2


# Found: what was accepted and then failed, or whose error said nothing, or nothing of what was given.
FOUND = {
    "a choice that refers to nothing": ("train", ["debug=${..}"]),
    "a hardware that refers to itself": ("train", ["hardware=${.}"]),
    "an experiment that is a number": ("train", ["experiment=1e3"]),
    "a debug that is infinite": ("train", ["debug=inf"]),
    "a logger that is true": ("train", ["logger=true"]),
    "lists in a list of experiments": ("train", ["experiment=[[1],[2]]"]),
    "a callback that is a list": ("train", ["+callbacks.mine=[1]"]),
    "a callback that refers to a list": ("train", ["callbacks.progress=${tags}"]),
    "betas that refer to nothing": ("train", ["optim.betas=${data.sha256}"]),
    "a profile of one's own": ("train", ["+callbacks.profile={_target_:a.b,skip_steps:a,steps:1}"]),
    "a profile of one's own, with a list": ("train", ["+callbacks.profile={_target_:a.b,skip_steps:[1],steps:1}"]),
    "a number in a list of debugs": ("train", ["+debug=[nan,inf]"]),
    "no optimizer": ("train", ["+optim=null"]),
    "a model that refers to nothing": ("train", ["model=${oc.select:seed}"]),
    "a group left out by a number": ("train", ["~data=-9"]),
    "a group left out by a list": ("sample", ["~model=[1,2,3]"]),
    "no key": ("train", ["~=-0"]),
    "5,000 digits": ("train", ["seed=" + "9" * 5000]),
    "5,000 digits in a text": ("sample", ["device=" + "9" * 5000]),
    "2,000 lists in each other": ("prepare", ["hub_revision=" + "[" * 2000 + "]" * 2000]),
    "200 lists in each other": ("train", ["tags=" + "[" * 200 + "]" * 200]),
    "a glob of 2,000 folders": ("train", ["data=text", "data.path=*" + "/a" * 2000]),
    "more processes than can be shown": ("train", [f"trainer.{key}=" + "9" * 4000 for key in ("devices", "num_nodes")]),
    "more steps than 64 bits count": ("train", ["trainer.max_steps=" + "9" * 30]),
    "a batch of more than 64 bits count": ("train", ["data.batch_size=" + "9" * 30]),
    "a micro-batch of more than 64 bits count": ("train", ["data.micro_batch_size=" + "9" * 30]),
    "a vocabulary of more than 64 bits count": ("train", ["model.vocab_multiple=" + "9" * 30]),
    "more channels than 64 bits count": ("train", ["model.n_embd=" + "9" * 30, "model.n_head=1"]),
}


def test_command_lines_that_were_found(folder):
    assert judge(iter(FOUND.values()), verdict_on_line).keys() == {"refused"}


@pytest.mark.parametrize("arguments", [["seed=3"], ["resume=run"], ["resume=run", "trainer.max_steps=3000"]])
def test_valid_command_lines(folder, arguments):
    assert verdict_on_line(("train", arguments)) == "accepted"


# Tokenizer states, as checkpoints hold them.

TEXT = "Zoë said: “naïve” 🙂\n\ttwice  <|endoftext|> a1b22\u2028"


def mutated_states(rng: random.Random, count: int) -> Iterator[str]:
    """JSON of valid states, most of them with one to three small changes: in the JSON itself, in the characters, or in
    a token."""
    states = [
        CharTokenizer.from_text(TEXT).state(),
        CharTokenizer("0123456789").state(),
        BPETokenizer.learn([python_docs()[:5000]], 257).state(),
        BPETokenizer.learn([python_docs()[:5000]], 300).state(),
    ]
    for _ in range(count):
        state = dict(rng.choice(states))
        kind = rng.randrange(3)
        if kind == 1:
            change_value(rng, state)
        if kind == 2 and "tokens" in state:
            change_token(rng, state)
        text = json.dumps(state, ensure_ascii=rng.random() < 0.5)
        if kind == 0:
            for _ in range(rng.randint(1, 3)):
                text = changed(rng, text, '{}[]":,\\ue0+/= aA\ud800\xff')
        yield text


def change_value(rng: random.Random, state: dict) -> None:
    key = rng.choice(list(state))
    if rng.random() < 0.8:
        for _ in range(rng.randint(1, 3)):
            state[key] = changed(rng, state[key], "aZ0+/= \n\t\0\xff🙂\ud800\udc00")
    elif rng.random() < 0.5:
        state[key] = random_json(rng, 2)
    else:
        del state[key]


def change_token(rng: random.Random, state: dict) -> None:
    """The base64 stays valid; tokens may come to lack a byte, be there twice, empty, long, or in another order."""
    tokens = [base64.b64decode(token) for token in state["tokens"].split(" ")]
    for _ in range(rng.randint(1, 3)):
        i, j = rng.randrange(len(tokens)), rng.randrange(len(tokens))
        new = rng.choice([b"", b"<|endoftext|>", rng.randbytes(rng.randint(1, 3)), tokens[j], tokens[i] * 100])
        step = rng.randrange(4)
        if step == 0:
            tokens[i], tokens[j] = tokens[j], tokens[i]
        elif step == 1:
            tokens[i] = new
        elif step == 2:
            tokens.insert(i, new)
        else:
            del tokens[i]
    state["tokens"] = " ".join(base64.b64encode(token).decode() for token in tokens)


def random_json(rng: random.Random, depth: int):
    """Any value, objects often with a state's own keys."""
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        keys = rng.sample(["type", "chars", "tokens", "_target_", "", "a"], rng.randrange(5))
        return {key: random_json(rng, depth - 1) for key in keys}
    return [
        None,
        rng.choice([True, False]),
        rng.choice([0, -1, 7, 2**70, 1.5, -0.0, 1e300, float("inf"), float("nan")]),
        rng.choice(["char", "bpe", "gpt2", "", "YQ==", "YQ== Yg=="]),
        "".join(map(chr, rng.choices([*range(128), *range(0xD7F0, 0xD810), 0x1F642], k=rng.randrange(12)))),
        base64.b64encode(rng.randbytes(rng.randrange(12))).decode(),
    ][kind]


def random_states(rng: random.Random, count: int) -> Iterator[str]:
    for i in range(count):
        value = random_json(rng, 3)
        if i % 2:  # half of them are objects with a known type
            value = {"type": rng.choice(["char", "bpe"]), **{rng.choice(["chars", "tokens"]): value}}
        yield json.dumps(value)


def verdict_on_state(text: str) -> str:
    try:
        state = json.loads(text)
    except json.JSONDecodeError:
        return "no JSON"
    try:
        tokenizer = from_state(state)
    except ValueError as error:
        assert type(error) in (ValueError, UserError) and str(error)
        return "refused"
    check_consistency(tokenizer, state)
    return f"accepted {state['type']}"


@pytest.mark.parametrize("count", STATES)
@pytest.mark.parametrize("states", [mutated_states, random_states])
def test_tokenizer_states(states, count):
    """Some of each kind are accepted: else most of the assertions would say nothing."""
    verdicts = judge(states(random.Random(SEED), count), verdict_on_state)
    assert verdicts["refused"] > count / 7 and verdicts["accepted char"] > count / 70
    assert states is random_states or verdicts["accepted bpe"] > count / 35


def check_consistency(tokenizer: Any, state: dict[str, Any]) -> None:
    rng, size = random.Random(SEED), tokenizer.vocab_size
    ids = [rng.randrange(size) for _ in range(20)]
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (size,) and sizes.dtype.kind in "iu" and sizes.min() >= 0
    assert isinstance(tokenizer.decode([*ids, -1, size, 2**70]), str)
    text = tokenizer.decode(ids) if state["type"] == "char" else TEXT
    encoded = tokenizer.encode(text)
    assert isinstance(encoded, np.ndarray) and encoded.max() < size
    assert tokenizer.decode(encoded.tolist()) == text
    assert sizes[encoded].sum() == len(text.encode("utf-8", "surrogatepass"))
    assert len(tokenizer.encode(tokenizer.start)) > 0
    again = from_state(json.loads(json.dumps(tokenizer.state())))
    assert again.vocab_size == size and again.decode(ids) == tokenizer.decode(ids)
