"""The command line before Hydra sees it, and what importing costs."""

import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from gptlab import cli


@pytest.mark.parametrize(
    "text",
    ["hello", "a, b", "First Citizen:", "a=b", "it's", 'say "hi" now', "tail\\", "\\'", "\\\\'x", "{a: [1]}", "${seed}", "\\${x}",
     "$x", "1.5", "true", "  spaces ", "line\nbreak\ttab", "#%&|;<>()", "", "'a' and 'b'", '"quoted"', "'", "a\\\n", "é🙂", "C:\\temp\\new"],
)  # fmt: skip
def test_free_text_reaches_the_config_word_for_word(text):
    override = OverridesParser.create().parse_override(f"prompt={cli._quote(text)}")
    assert OmegaConf.create({"prompt": override.value(), "seed": 7}).prompt == text


def test_null_stays_null():
    assert cli._quote("null") == "null"


def test_texts_are_quoted_except_in_sweeps():
    assert cli._prepare(["data.path=my (1), text.txt", "hardware=cpu"], "train")[0] == "data.path='my (1), text.txt'"
    assert "data.path=a,b" in cli._prepare(["-m", "data.path=a,b", "hardware=cpu"], "train")


def test_flags_come_first():
    arguments = ["experiment=x", "-m", "a=1,2", "--config-dir", "conf", "b=3", "--cfg", "job"]
    assert cli._split(arguments) == (["-m", "--config-dir", "conf", "--cfg", "job"], ["experiment=x", "a=1,2", "b=3"])


def test_hardware_is_asked_once_and_only_if_not_given(monkeypatch):
    monkeypatch.setattr(cli, "_detect_hardware", lambda: "gpu")
    assert cli._prepare(["seed=1"], "train") == ["seed=1", "hardware=gpu"]
    assert cli._prepare(["hardware=cpu", "-m", "seed=1,2"], "train") == ["-m", "hardware=cpu", "seed=1,2"]
    assert cli._prepare(["ckpt=x"], "sample") == ["ckpt='x'"]


def modules_after(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_pure_files_import_neither_lightning_nor_hydra():
    loaded = modules_after("import gptlab.model, gptlab.generate, gptlab.optim, gptlab.checkpoint")
    assert "torch" in loaded
    assert not loaded & {"lightning", "hydra", "omegaconf", "pytorch_lightning"}


def test_the_entries_import_nothing_heavy():
    loaded = modules_after("import gptlab.train, gptlab.sample, gptlab.cli, gptlab.config")
    assert not loaded & {"torch", "lightning", "numpy", "hydra"}


def test_composing_needs_no_torch():
    code = "import sys; sys.argv = ['train', '--cfg', 'job', 'hardware=cpu']\nfrom gptlab import cli\ncli.main(print, 'train')"
    assert not modules_after(code) & {"torch", "lightning"}


def test_schemas_are_what_the_classes_take():
    """A key that a schema offers and nothing takes, or the other way round, would be a lie."""
    import inspect
    from dataclasses import fields

    from gptlab import config
    from gptlab.config import GPTConfig
    from gptlab.data import memmap, problems
    from gptlab.data.text import TextData
    from gptlab.data.windows import WindowData
    from gptlab.model import GPT

    def names(config):
        return {field.name for field in fields(config)} - {"_target_"}

    def arguments(*classes):
        return {
            name for c in classes for name, p in inspect.signature(c).parameters.items() if p.kind is p.KEYWORD_ONLY
        }

    assert names(GPTConfig) - {"compile"} == arguments(GPT) - {"vocab_size", "block_size"}
    base = arguments(WindowData) - {"seed"}
    assert names(config.TextConfig) == base | arguments(TextData)
    assert names(config.MemmapConfig) == base | arguments(memmap.MemmapData)
    assert names(config.PythonStdlibConfig) == base | arguments(memmap.PythonStdlibData)
    assert names(config.AdditionConfig) == base | arguments(problems.AdditionData)
    assert names(config.SortConfig) == base | arguments(problems.SortData)


def test_what_lightning_is_told_is_what_extra_may_not_say():
    """NOT_EXTRA is checked before Lightning is imported, so it repeats the names; here they are held together."""
    import ast
    import inspect
    import textwrap

    from gptlab import config, train

    tree = ast.parse(textwrap.dedent(inspect.getsource(train.make_trainer)))
    (call,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "L.Trainer"]
    assert {keyword.arg for keyword in call.keywords} - {None} | {"max_time"} == set(config.NOT_EXTRA)


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),  # torchrun's first process of the second machine
        ({"SLURM_PROCID": "1"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # Lightning's second process in an interactive job
    ],
)
def test_the_first_process_of_a_run(monkeypatch, environment, first):
    """The only one that takes the lock and writes: a second one would fail on it."""
    for rank in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.delenv(rank, raising=False)
    for rank, value in environment.items():
        monkeypatch.setenv(rank, value)
    assert cli.is_first_process() is first
