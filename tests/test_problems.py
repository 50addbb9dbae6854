"""Addition and sorting: right answers, sides that never mix, a stream that depends on nothing else, exact match by
greedy generation; and what is logged and resolved around them."""

import json
import logging
import pickle
import re
import string
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from composed import compose_entry
from hypothesis import given, settings
from hypothesis import strategies as st
from test_module import make_trainer
from torch.utils.data import DataLoader

from gptlab import checkpoint, optim, sources
from gptlab.callbacks.display import Progress
from gptlab.callbacks.early_stopping import EarlyStopping
from gptlab.callbacks.ema import EMA
from gptlab.callbacks.exact_match import ExactMatch
from gptlab.callbacks.throughput import Throughput
from gptlab.data.problems import AdditionData, ProblemData, SortData
from gptlab.data.windows import StepsFrom, share
from gptlab.errors import UserError
from gptlab.generate import Sampler, generate
from gptlab.model import GPT
from gptlab.module import GPTModule

SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=25, deadline=None)
OPTIM = {"lr": 5e-3, "min_lr": 1e-4, "schedule": "constant", "warmup_steps": 10, "decay_steps": 0, "weight_decay": 0.0,
         "betas": [0.9, 0.95], "grad_clip": 1.0, "skip_nonfinite": 0, "cooldown": 1.0}  # fmt: skip


def addition(ndigit: int, seed=1, batch_size=12, **windows) -> AdditionData:
    return AdditionData(ndigit=ndigit, name="addition", block_size=None, seed=seed, batch_size=batch_size, **windows)


def sorting(length: int, n_symbols: int, seed=1, batch_size=12, **windows) -> SortData:
    return SortData(length=length, n_symbols=n_symbols, name="sort", block_size=None, seed=seed, batch_size=batch_size,
                    **windows)  # fmt: skip


def prepared(data: ProblemData) -> ProblemData:
    data.setup("fit")
    return data


def numbers(questions: np.ndarray, ndigit: int) -> list[tuple[int, int]]:
    """Rows of digits as (a, b), read by Python."""
    texts = ["".join(map(str, row)) for row in questions.tolist()]
    return [(int(text[:ndigit]), int(text[ndigit : 2 * ndigit])) for text in texts]


def rows(pairs: list[tuple[int, int]], ndigit: int) -> np.ndarray:
    return np.array([[int(digit) for digit in f"{a:0{ndigit}}{b:0{ndigit}}"] for a, b in pairs])


def all_pairs(ndigit: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(10**ndigit) for b in range(10**ndigit)]


def test_the_worked_example_of_the_docstring():
    """Every number of it: 85 + 50 = 135 as the model gets it, and as people write it."""
    data = addition(2)
    problem = data.with_answers(np.array([[8, 5, 5, 0]]))
    ids, mask = torch.from_numpy(problem), data.mask(1)
    assert ids.tolist() == [[8, 5, 5, 0, 5, 3, 1]] and data.tokenizer.encode("8550531").tolist() == ids[0].tolist()
    assert ids[0, :-1].tolist() == [8, 5, 5, 0, 5, 3]
    shown = [str(i) if counted else "-" for i, counted in zip(ids[0, 1:].tolist(), mask[0, 1:].tolist(), strict=True)]
    assert " ".join(shown) == "- - - 5 3 1"
    for text in ("8  5  5  0  5  3\n", "-  -  -  5  3  1 "):
        assert text in AdditionData.__doc__
    assert data.block_size == 3 * 2 and data.written(problem[0].tolist()) == ("85 + 50 = ", "135")


@settings(deadline=None)
@given(st.one_of(st.integers(1, 18), st.just(40), st.just(100)), st.data())
def test_sums_are_pythons(ndigit, drawn):
    """Beyond 18 digits no machine integer holds them."""
    number = st.one_of(st.integers(0, 10**ndigit - 1), st.sampled_from([0, 1, 10**ndigit - 1]))
    pairs = drawn.draw(st.lists(st.tuples(number, number), min_size=1, max_size=20))
    data = addition(ndigit)
    problems = data.with_answers(rows(pairs, ndigit))
    assert problems.shape == (len(pairs), 3 * ndigit + 1) and problems.dtype == np.int64
    for (a, b), problem in zip(pairs, problems.tolist(), strict=True):
        assert int("".join(map(str, problem[: 2 * ndigit - 1 : -1]))) == a + b  # read from the end
        assert data.written(problem) == (f"{a} + {b} = ", str(a + b))


@FEW
@given(SEEDS, st.integers(0, 2**31), st.integers(1, 18))
def test_no_unordered_pair_is_on_both_sides(seed, step, ndigit):
    """By the numbers, not by the function that splits them: what training draws, in either order, is never among the
    problems that are measured. For few digits a wrong split would show at once, for many by is_held_out."""
    data = prepared(addition(ndigit, seed=seed))
    trained = numbers(data.train_steps(0, 1)[step][0].numpy(), ndigit)
    measured = {frozenset(pair) for pair in numbers(data.held_out, ndigit)}
    assert not measured & {frozenset(pair) for pair in trained}
    for pairs, side in ((trained, False), (numbers(data.held_out[:200], ndigit), True)):
        swapped = [(b, a) for a, b in pairs]
        assert (data.is_held_out(rows(pairs, ndigit)) == side).all()
        assert (data.is_held_out(rows(swapped, ndigit)) == side).all()


@pytest.mark.parametrize("ndigit", [1, 2])
def test_every_small_problem_is_on_exactly_one_side(ndigit):
    """All of them: the measured ones are all that are held out, each once; training draws all others and no more
    (300,000 draws of about 9,000: a given one is missed with a probability of e^-33)."""
    data = prepared(addition(ndigit))
    pairs = all_pairs(ndigit)
    held_out = {pair for pair, out in zip(pairs, data.is_held_out(rows(pairs, ndigit)), strict=True) if out}
    measured = numbers(data.held_out, ndigit)
    assert len(measured) == len(held_out) and set(measured) == held_out
    assert held_out == {(b, a) for a, b in held_out}
    assert 0.05 < len(held_out) / len(pairs) < 0.15
    weights = 10 ** np.arange(2 * ndigit)[::-1]
    seen = np.unique(data.problems(0, 300_000)[:, : 2 * ndigit] @ weights)
    assert set(seen.tolist()) == {a * 10**ndigit + b for a, b in set(pairs) - held_out}


@pytest.mark.parametrize("ndigit", [3, 40])
def test_a_tenth_of_the_large_ones_is_held_out_and_5000_are_measured(ndigit):
    """20,000 draws: 0.1 has a standard error of 0.002."""
    data = prepared(addition(ndigit))
    assert len({tuple(row) for row in data.held_out.tolist()}) == len(data.held_out) >= 5000
    assert data.is_held_out(data.held_out[:, : 2 * ndigit]).all()
    assert abs(data.is_held_out(data._draw(3, 0, 20_000)).mean() - 0.1) < 0.011


@pytest.mark.parametrize("make", [lambda seed: addition(2, seed), lambda seed: addition(7, seed), lambda seed: sorting(6, 3, seed)])  # fmt: skip
def test_what_is_measured_is_the_same_for_every_seed(make):
    first, second = prepared(make(1)), prepared(make(2))
    assert np.array_equal(first.held_out, second.held_out) and first.record == second.record
    assert not np.array_equal(first.problems(0, 50), second.problems(0, 50))
    assert first.record != prepared(sorting(6, 4)).record  # other problems are other data


@FEW
@given(SEEDS, st.integers(0, 2**31), st.integers(1, 18), st.lists(st.integers(1, 7), min_size=1, max_size=8))
def test_a_problem_depends_on_seed_and_index_alone(seed, first, ndigit, pieces):
    """Drawn at once, one by one, or in odd pieces, the last first. With one digit in ten drawn a second time, a redraw
    that depended on its neighbours would show."""
    data = addition(ndigit, seed=seed)
    ends = np.cumsum([0, *pieces])
    at_once = data.problems(first, int(ends[-1]))
    for start, count in reversed(list(zip(ends[:-1].tolist(), pieces, strict=True))):
        assert np.array_equal(data.problems(first + start, count), at_once[start : start + count])
    one_by_one = [data.problems(first + i, 1) for i in range(len(at_once))]
    assert np.array_equal(np.concatenate(one_by_one), at_once)


@pytest.mark.parametrize("data", [addition(3, batch_size=11), sorting(5, 7, batch_size=11)])
def test_processes_and_workers_do_not_change_the_stream(data):
    def stream(rank: int, world_size: int, workers: int) -> list[torch.Tensor]:
        steps = data.train_steps(rank, world_size)
        loader = DataLoader(steps, sampler=StepsFrom(3, 9), batch_size=None, num_workers=workers)
        batches = list(loader)
        assert all(mask.tolist() == data.mask(len(ids)).tolist() for ids, mask in batches)
        return [ids for ids, _ in batches]

    expected = torch.from_numpy(data.problems(3 * 11, 6 * 11)).split(11)
    for world_size, workers in ((1, 0), (1, 2), (2, 0), (3, 0), (3, 2)):
        parts = [stream(rank, world_size, workers) for rank in range(world_size)]
        together = [torch.cat(of_step) for of_step in zip(*parts, strict=True)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(together, expected, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_held_out_problem_is_measured_once(world_size):
    data = prepared(addition(2))
    batches = [data.val_batches(64, rank, world_size) for rank in range(world_size)]
    ids = torch.cat([part[k][0] for part in batches for k in range(len(part))])
    assert ids.tolist() == data.held_out.tolist()


def chi_squared(counts: np.ndarray) -> float:
    """How many standard deviations Pearson's statistic lies from its mean, for cells that are to be equally likely."""
    expected = counts.mean()
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_questions_are_uniform():
    """Each digit of two numbers of 18, and each pair of neighbours; and for one digit each problem that may be trained
    on. The seed is fixed: nothing here is left to chance."""
    questions = addition(18).problems(0, 40_000)[:, :36]
    for place in range(36):
        assert abs(chi_squared(np.bincount(questions[:, place], minlength=10))) < 5, place
    for place in range(35):
        pairs = questions[:, place] * 10 + questions[:, place + 1]
        assert abs(chi_squared(np.bincount(pairs, minlength=100))) < 5, place
    small = addition(1).problems(0, 40_000)[:, :2] @ [10, 1]
    _, counts = np.unique(small, return_counts=True)
    assert len(counts) >= 80 and abs(chi_squared(counts)) < 5


@FEW
@given(SEEDS, st.integers(2, 40), st.integers(2, 62), st.integers(0, 2**31))
def test_sorted_symbols(seed, length, n_symbols, first):
    """Against Python's sorted."""
    data = sorting(length, n_symbols, seed=seed)
    assert data.block_size == 2 * length - 1 and data.tokenizer.vocab_size == n_symbols
    assert data.mask(1).tolist() == [[False] * length + [True] * length]
    assert sorting(3, 62).tokenizer.chars == string.digits + string.ascii_letters
    for problem in data.problems(first, 5).tolist():
        question, answer = problem[:length], problem[length:]
        assert set(question) <= set(range(n_symbols)) and answer == sorted(question)
        symbols = data.tokenizer.decode(problem)
        assert data.written(problem) == (" ".join(symbols[:length]) + " -> ", " ".join(symbols[length:]))


@pytest.mark.parametrize(("length", "n_symbols"), [(6, 3), (2, 10), (10, 3), (3, 62)])
def test_held_out_inputs_of_sorting_are_never_trained_on(length, n_symbols):
    """20,000 draws meet nearly all of the small kinds: a side that leaked would show."""
    data = prepared(sorting(length, n_symbols))
    measured = {tuple(row) for row in data.held_out[:, :length].tolist()}
    trained = {tuple(row) for row in data.problems(0, 20_000)[:, :length].tolist()}
    assert len(measured) == len(data.held_out) and not measured & trained
    total = n_symbols**length
    if total <= 10_000:  # all that there are: a tenth, give or take four standard errors
        assert len(measured) > 0 and abs(len(measured) / total - 0.1) < 4 * (0.09 / total) ** 0.5
    else:
        assert len(measured) >= 5000


@pytest.mark.parametrize(("make", "block_size"), [(AdditionData, 6), (SortData, 11)])
def test_the_block_size_follows_and_a_clash_is_an_error(make, block_size):
    keys = {"ndigit": 2} if make is AdditionData else {"length": 6, "n_symbols": 3}
    for given_size in (None, block_size):
        data = make(**keys, name="x", seed=1, batch_size=1, block_size=given_size)
        assert data.block_size == block_size and data.resolved == {"block_size": block_size}
        assert data.problems(0, 1).shape == (1, block_size + 1)
    for wrong in (block_size - 1, block_size + 1):
        with pytest.raises(UserError, match=f"data.block_size={wrong} must be {block_size}"):
            make(**keys, name="x", seed=1, batch_size=1, block_size=wrong)


# A whole run, as a user starts it.

RUN = ["experiment=addition", "hardware=cpu", "model=gpt-nano", "trainer.val_every=2", "trainer.log_every=1",
       "optim.warmup_steps=1", "optim.decay_steps=20"]  # fmt: skip


def test_what_a_run_decided_and_measured_is_in_its_files_and_it_can_be_asked(gptlab, tmp_path):
    gptlab("train", *RUN, "trainer.max_steps=4", "hydra.run.dir=run")
    run = tmp_path / "run"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    kept = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert saved["data"]["block_size"] == kept["config"]["data"]["block_size"] == 6
    assert saved["data"]["workers"] == 0  # null, on a CPU

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["val/accuracy"] for line in lines if "val/loss" in line]
    assert len(accuracies) == 3 and all(0 <= accuracy <= 1 for accuracy in accuracies)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["last"]["val/accuracy"] == accuracies[-1]
    assert summary["best"]["val/accuracy"] == accuracies[summary["best"]["step"] // 2]
    log = (run / "train.log").read_text()
    for step, accuracy in zip((0, 2, 4), accuracies, strict=True):
        assert re.search(rf"step {step}: .*, {100 * accuracy:.2f} % answered exactly", log)

    shown = gptlab("sample", "ckpt=run", "prompt=8550", "max_new_tokens=3", "temperature=0").stdout.strip()
    source = sources.load(str(run / "checkpoints/best.ckpt"))
    assert shown == "8550" + source.tokenizer.decode(greedy(source.model, torch.tensor([[8, 5, 5, 0]]), 3)[0].tolist())


@pytest.mark.slow
def test_two_processes_measure_what_one_would(gptlab, tmp_path):
    """1,041 problems: uneven shares, so that a mean of two accuracies would be another number. With averaged weights,
    which are what the checkpoint holds: it is loaded and asked here."""
    more = ["trainer.max_steps=40", "trainer.val_every=40", "optim.lr=1e-2", "trainer.devices=2", "hydra.run.dir=run"]
    done = gptlab("train", *RUN, *more, "callbacks=[problems,ema]", "callbacks.sample_text=null")
    assert done.stderr == ""
    model = sources.load(str(tmp_path / "run/checkpoints/last.ckpt")).model
    measured = json.loads((tmp_path / "run/summary.json").read_text())["last"]["val/accuracy"]
    assert measured == accuracy(model, prepared(addition(2))) > 0


# Exact match, in this process.


def greedy(model: torch.nn.Module, questions: torch.Tensor, n_answer: int) -> torch.Tensor:
    return torch.tensor(list(generate(model, questions, n_answer, sampler=Sampler(temperature=0)))).T


def accuracy(model: torch.nn.Module, data: ProblemData) -> float:
    """By real generation of every held-out problem, token by token."""
    problems = torch.from_numpy(data.held_out)
    given_answers = greedy(model, problems[:, : data.n_question], data.n_answer)
    return (given_answers == problems[:, data.n_question :]).all(dim=1).double().mean().item()


class Generated(L.Callback):
    """What each validation measured, and what generation gives with the same weights."""

    def __init__(self) -> None:
        self.measured, self.generated = [], []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.measured.append(pl_module.validated["val/accuracy"])
        self.generated.append(accuracy(pl_module.model, trainer.datamodule))


def learner(data: ProblemData, log_every=10, **optim_config) -> GPTModule:
    torch.manual_seed(0)
    model = GPT(vocab_size=data.tokenizer.vocab_size, block_size=data.block_size, n_layer=2, n_head=2, n_embd=32)
    return GPTModule(
        model, optim_config={**OPTIM, **optim_config}, token_bytes=data.tokenizer.token_bytes(), seed=1,
        micro_batch_size=None, log_every=log_every, metadata={"data": {}, "tokenizer": {}},
    )  # fmt: skip


def fit(folder: Path, data: ProblemData, steps: int, val_every: int, callbacks: list, **module) -> GPTModule:
    trainer = make_trainer(folder, steps, callbacks=callbacks, val_check_interval=val_every,
                           check_val_every_n_epoch=None, num_sanity_val_steps=-1)  # fmt: skip
    trainer.fit(trained := learner(data, **module), datamodule=data)
    return trained


def test_accuracy_is_that_of_greedy_generation(tmp_path, caplog):
    """Untrained, half-trained and trained, on every held-out problem; mistakes are shown as long as there are some, but
    not of the untrained model."""
    seen = Generated()
    with caplog.at_level(logging.INFO):
        module = fit(tmp_path, sorting(3, 10, batch_size=64), 400, 40, [Progress(), ExactMatch(2), seen])
    assert seen.measured == seen.generated
    assert seen.measured[0] < 0.1 < 0.9 < seen.measured[-1] and any(0.1 < a < 0.9 for a in seen.measured)
    assert caplog.text.count("wrong answers:") == sum(accuracy < 1 for accuracy in seen.measured[1:])
    end = module.validated
    line = f"step 400: validation loss {end['val/loss']:.4f}, {100 * end['val/accuracy']:.2f} % answered exactly"
    assert line in caplog.messages


@pytest.mark.slow
def test_mistakes_are_sums_and_really_wrong(tmp_path, caplog):
    """At most `show` of them, here 4; where more may be shown than there are, all of them and nothing else."""
    data = addition(2, batch_size=128, val_windows=100)
    with caplog.at_level(logging.INFO):
        module = fit(tmp_path, data, 250, 250, [ExactMatch(4), ExactMatch(1000)])
    wrong_ones = round(100 * (1 - module.validated["val/accuracy"]))
    assert 5 < wrong_ones < 95
    shown = re.findall(r"(\d+) \+ (\d+) = (\d+), not (\d+)$", caplog.text, re.MULTILINE)
    assert len(shown) == caplog.text.count(", not ") == 4 + wrong_ones and len(set(shown)) == wrong_ones
    measured = numbers(data.held_out[:100], 2)
    for a, b, right, wrong in (map(int, line) for line in shown):
        assert (a, b) in measured and a + b == right != wrong
        answer = greedy(module.model, torch.from_numpy(rows([(a, b)], 2)), 3)[0].tolist()
        assert wrong == answer[0] + 10 * answer[1] + 100 * answer[2]


class Wreck(L.Callback):
    """The weights themselves are of no use once the last step is averaged; it stands after EMA."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_) -> None:
        if trainer.global_step == trainer.max_steps:
            with torch.no_grad():
                torch._foreach_zero_(list(pl_module.model.parameters()))
            self.left = accuracy(pl_module.model, trainer.datamodule)


def test_averaged_weights_are_measured(tmp_path, caplog):
    """Of a model whose own weights answer nothing; and its mistakes are those of the average: a model of zeros gives
    0 0 0 to all. That order of callbacks is the one which is composed."""
    order = list(compose_entry("train", "callbacks=[problems,ema]").callbacks)
    assert order.index("exact_match") < order.index("ema")
    seen, data = Generated(), sorting(3, 10, batch_size=64)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, data, 200, 200, [ExactMatch(5), seen, EMA(0.99), wreck := Wreck()])
    assert wreck.left < 0.05
    assert seen.measured == seen.generated and seen.measured[-1] > 0.3
    assert ", not 0 0 0" not in caplog.text


def test_early_stopping_once_accuracy_stops_growing(tmp_path, caplog):
    """It must grow at first: taken for a loss, it would end the run then."""
    seen, stop = Generated(), EarlyStopping("val/accuracy", patience=3, min_delta=0.0)
    with caplog.at_level(logging.INFO):
        module = fit(tmp_path, sorting(3, 10, batch_size=64), 2000, 40, [ExactMatch(0), seen, stop])
    history = seen.measured[1:]  # without step 0, which is before any training
    grew = [i for i, value in enumerate(history) if value > max(history[:i], default=-1.0)]
    assert len(grew) >= 3 and len(history) == grew[-1] + 1 + 3 and max(history) > 0.8
    assert module.trainer.global_step == 40 * len(history) < 2000 and "val/accuracy has not improved" in stop.why
    assert "mistakes" not in caplog.text  # none were asked for


class Slow(AdditionData):
    def problems(self, first: int, count: int) -> np.ndarray:
        time.sleep(0.5)
        return super().problems(first, count)


def test_waiting_for_data_is_measured(tmp_path):
    """0.5 s of making a batch against some milliseconds of training on it."""
    data = Slow(ndigit=1, name="x", seed=1, batch_size=16, block_size=None)
    module = fit(tmp_path, data, 3, 3, [Throughput()], log_every=3)
    assert 0.8 <= module.logged["train/data_wait"] <= 1.0


# GPT-2 on OpenWebText: nanoGPT's config/train_gpt2.py and the defaults of its train.py.


def test_gpt2_124m_is_nanogpts_recipe():
    cfg = compose_entry("train", "hardware=gpu", "experiment=gpt2_124m", "trainer.devices=8")
    m, d, o, t = cfg.model, cfg.data, cfg.optim, cfg.trainer
    assert (m.n_layer, m.n_head, m.n_embd, m.bias, m.dropout, m.gelu) == (12, 12, 768, False, 0.0, "erf")
    assert (d.name, d.block_size, d.micro_batch_size) == ("openwebtext", 1024, 12)
    assert d.batch_size * d.block_size == 491_520 == 5 * 8 * 12 * 1024  # gradient_accumulation_steps * batch_size * ...
    assert {len(share(d.batch_size, rank, 8)) for rank in range(8)} == {5 * 12}  # five micro-batches on each of 8 GPUs
    assert (o.lr, o.min_lr, o.schedule, o.warmup_steps, o.decay_steps) == (6e-4, 6e-5, "cosine", 2000, 600_000)
    assert (list(o.betas), o.weight_decay, o.grad_clip) == ([0.9, 0.95], 0.1, 1.0)
    assert (t.max_steps, t.val_every, t.log_every, t.accelerator, t.devices) == (600_000, 1000, 10, "gpu", 8)

    with torch.device("meta"):
        model = checkpoint.build_model(cfg.model, vocab_size=50257, block_size=d.block_size)
    sizes = {tuple(parameter.shape) for parameter in model.parameters()}
    assert (50304, 768) in sizes and not any(50257 in size for size in sizes)
    # nanoGPT prints 123.59 M, and does not count the 1024 x 768 of the positions.
    assert sum(parameter.numel() for parameter in model.parameters()) == 123_587_328 + 1024 * 768

    schedule = {key: o[key] for key in ("schedule", "lr", "min_lr", "warmup_steps", "decay_steps")}
    rates = [optim.learning_rate(step, **schedule) for step in (0, 2000, 301_000, 600_000, 700_000)]
    assert rates == pytest.approx([6e-4 / 2001, 6e-4, (6e-4 + 6e-5) / 2, 6e-5, 6e-5])


def test_worker_processes_get_no_trainer():
    """It cannot be pickled, which matters wherever workers are not forked (macOS, and Python 3.14 on Linux)."""
    data = prepared(addition(2))
    data.trainer = SimpleNamespace(loop=(i for i in range(3)))
    steps = pickle.loads(pickle.dumps(data.train_steps(0, 1)))
    assert torch.equal(steps[3][0], data.train_steps(0, 1)[3][0])
