"""Damaged and foreign command lines: a config that has passed every check, or one clean error."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gptlab import cli, config, mistakes
from gptlab.config import CONF

SEED, FEW = 6, 50
SECONDS = 20  # that one command line may take; they take a tenth of a second

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
FLAGS = [*cli.FLAGS, "--", "-", "---", "-x", "--seed", "--seed=1", "-c=job", "--cfg=jbo", "--config-dir=x", "-mm"]
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


class TooLong(BaseException):
    """No Exception, so that nothing explains it."""


def leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a config and its value, as on a command line."""
    texts = {None: "null", True: "true", False: "false"}
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        elif not isinstance(value, (dict, list)):
            yield f"{prefix}{key}", texts[value] if value is None or isinstance(value, bool) else str(value)


@pytest.fixture(scope="module")
def known() -> dict[str, list[str]]:
    """`key=value` for every value of an entry's config, as it stands there."""
    config.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = {entry: OmegaConf.to_container(compose(entry)) for entry in VALID}
    return {entry: [f"{key}={value}" for key, value in leaves(cfg)] for entry, cfg in composed.items()}


@pytest.fixture(scope="module")
def run_config() -> str:
    config.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_yaml(compose("train"), resolve=True)


@pytest.fixture
def folder(tmp_path, monkeypatch, run_config) -> Iterator[Path]:
    """A working directory with a text and a run; whatever was done, it must be as it was. What hangs is ended."""

    def too_long(*_: Any) -> None:
        raise TooLong

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as cli.main
    (tmp_path / "text.txt").write_text("to be or not to be")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(run_config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    previous = signal.signal(signal.SIGALRM, too_long)
    yield tmp_path
    signal.signal(signal.SIGALRM, previous)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "something was written"


def changed_text(rng: random.Random, text: str) -> str:
    """One character more, less or another, or a part taken out or repeated."""
    at, end = sorted(rng.randint(0, len(text)) for _ in range(2))
    new = rng.choice("aZ09.,=:+~-_@/ '\"\\[]{}()$#%*?!&|<>\t\n\0é🙂\ud800\udcff")
    return rng.choice([text[:at] + new + text[at:], text[:at] + text[at + 1 :], text[:at] + new + text[at + 1 :],
                       text[:at] + text[end:], text[:end] + text[at:]])  # fmt: skip


def changed_number(rng: random.Random, text: str) -> str:
    return rng.choice(
        [f"{text}0", f"-{text}", f"{text}.0", f"{text}.5", f"0{text}", f"{text}e3", f"{text}e-3", f"{text}1"]
    )


def mutated(rng: random.Random, known: dict[str, list[str]], entry: str) -> list[str]:
    """A valid command line with one small change."""
    chosen = [rng.choice(rng.choice([VALID[entry], known[entry], known[entry]])) for _ in range(rng.choice([1, 1, 2]))]
    arguments = [part for line in chosen for part in (line.split(" ") if line.count("=") > 1 else [line])]
    at = rng.randrange(len(arguments))
    key, _, value = arguments[at].partition("=")
    other = rng.choice(known[entry]).partition("=")[0]
    ways = [
        lambda: changed_text(rng, arguments[at]),
        lambda: f"{key}={changed_text(rng, value)}",
        lambda: f"{key}={changed_number(rng, value)}",
        lambda: f"{key}={rng.choice(VALUES)}",
        lambda: f"{key}={rng.choice(VALUES)}",
        lambda: rng.choice(["+", "++", "~", "hydra.", "trainer.", "_", ".", "trainer.extra."]) + arguments[at],
        lambda: rng.choice([key, f"~{key}", f"{other}={value}", f"{key}.{other}={value}", f"{key}@{other}={value}",
                            f"{key}.0={value}"]),
        lambda: rng.choice([f"{key}=[{value}]", f"{key}={{{value}}}", f"{key}={value},{value}", f"{key}='{value}'",
                            f'{key}="{value}', f"{key}=${{{other}}}", f"{key}=${{{key}}}"]),
    ]  # fmt: skip
    arguments[at] = rng.choice(ways)()
    return arguments


def random_line(rng: random.Random, known: dict[str, list[str]], entry: str) -> list[str]:
    """Texts without sense, and settings of any keys and values; some with a flag among them."""
    arguments = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        key = rng.choice([rng.choice(known[entry]).partition("=")[0], rng.choice(list(GROUPS)), rng.choice(VALUES)])
        nonsense = "".join(rng.choices("ab.=+~-@/ ,:'\"\\[]{}()$\n\0é\ud800", k=rng.randrange(12)))
        setting = f"{rng.choice(['', '', '+', '++', '~'])}{key}={random_value(rng, 2)}"
        arguments.append(rng.choice([nonsense, setting, setting, f"{key}={rng.choice(VALUES)}"]))
    if rng.random() < 0.15:
        arguments.insert(rng.randrange(len(arguments) + 1), rng.choice(FLAGS))
    return arguments


def random_value(rng: random.Random, depth: int) -> str:
    if not depth or rng.random() < 0.4:
        return rng.choice(VALUES)
    parts = [random_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    shape = rng.choice(["[{}]", "{{{}}}", "${{{}}}", "'{}'", "f({})", "{}"])
    return shape.format(",".join(f"a{i}:{part}" if shape == "{{{}}}" else part for i, part in enumerate(parts)))


def made(seed: int, known: dict[str, list[str]]) -> tuple[str, list[str]]:
    """Entry and arguments; those of even seeds are a small change from valid ones."""
    rng = random.Random(f"{SEED}/{seed}")
    entry = rng.choice(["train"] * 6 + ["sample", "prepare"])
    return entry, (random_line if seed % 2 else mutated)(rng, known, entry)


def verdict(entry: str, arguments: list[str]) -> str:
    """accepted, refused, prepared (with a flag it is not composed: Hydra does what the flag says), or what is wrong.
    Done as cli.main does it, but for the run folder."""
    composing = True
    signal.alarm(SECONDS)
    try:
        flags, overrides = cli._split(cli._prepare(list(arguments), entry))
        if any(argument.startswith("-") for argument in arguments):
            return "prepared"
        cfg = config.typed(composed(entry, flags, overrides), entry)
        composing = False
        return "refused" if problems(cfg, entry) else "accepted"
    except BaseException as error:
        return of_error(error, composing, arguments)
    finally:
        signal.alarm(0)


def composed(entry: str, flags: list[str], overrides: list[str]) -> Any:
    """As hydra.main does; a resume's flags name its folder."""
    GlobalHydra.instance().clear()
    if "--config-path" not in flags:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(entry, overrides=overrides)
    with initialize_config_dir(flags[flags.index("--config-path") + 1], version_base="1.3"):
        return compose("config", overrides=[f"hydra.searchpath=[file://{CONF}]", *overrides])


def problems(cfg: Any, entry: str) -> list[str]:
    """What the entry says of the config before anything is loaded."""
    if entry == "train":
        config.check(cfg)
        return []
    return list({"sample": config.value_problems, "prepare": config.prepare_problems}[entry](cfg))


def of_error(error: BaseException, composing: bool, arguments: list[str]) -> str:
    """refused, if the user is told something: what another library's own exceptions say must name a key or value."""
    what = f"{type(error).__name__}: {str(error)[:300]}"
    try:
        text = mistakes.explain(error, composing) if isinstance(error, Exception) else None
    except Exception as another:
        return f"explaining {what} fails: {another!r}"
    said = (text or "").partition("\n(HYDRA_FULL_ERROR")[0]
    parts = [part for argument in arguments for part in argument.lstrip("+~").partition("=")[::2]]
    names = any(part[:20] in said for part in parts if part.strip()) and "Override(" not in said  # Hydra's own object
    known_kind = isinstance(error, (HydraException, OmegaConfBaseException, YAMLError)) or mistakes._is_ours(error)
    return "refused" if said.strip() and (known_kind or names) else f"{what} -> {said[:200]!r}"


@pytest.mark.parametrize("count", [FEW, pytest.param(10_000, marks=pytest.mark.slow)])
def test_command_lines(folder, known, count):
    """Half of them small changes of valid ones. Some are accepted: else nothing says that the checks are reached."""
    lines = {seed: made(seed, known) for seed in range(count)}
    verdicts = {seed: verdict(*line) for seed, line in lines.items()}
    right = ("accepted", "refused", "prepared")
    wrong = {seed: text for seed, text in verdicts.items() if text not in right}
    counts = {text: list(verdicts.values()).count(text) for text in right}
    print(f"{counts}, {len(wrong)} wrong")
    assert not wrong, "\n".join(f"seed {seed}: {lines[seed]!a:.300}: {text!a}" for seed, text in wrong.items())
    assert counts["accepted"] >= count / 30 and counts["refused"] > count / 2


@pytest.mark.parametrize("arguments", [["seed=3"], ["resume=run"], ["resume=run", "trainer.max_steps=3000"]])
def test_valid_command_lines(folder, arguments):
    assert verdict("train", arguments) == "accepted"


# Found: what was accepted and then failed, or whose error said nothing, or nothing of what was given.
CASES = {
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


@pytest.mark.parametrize("name", CASES)
def test_what_was_found(folder, name):
    assert verdict(*CASES[name]) == "refused"
