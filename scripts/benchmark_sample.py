"""The part `sample` of benchmark.py: tokens per second of generated text, in this process."""

import contextlib
import copy
import functools
import importlib.util
import io
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from gptlab import linear
from gptlab.generate import Sampler, generate
from gptlab.model import GPT, KVCache
from gptlab.pretrained import GPT2, to_hf

SAMPLER = Sampler(temperature=0.8, top_k=200)  # nanoGPT's sample.py
ELEMENTS = 2**26  # 256 MiB, larger than any cache
Engine = Callable[[int, int], Any]  # generates so many tokens in each of `batch` rows, after a prompt of one token


@dataclass(frozen=True)
class Size:
    vocab_size: int
    block_size: int
    model: dict[str, Any]
    tokens: int  # new ones per row


SIZES = {  # nanoGPT's config/train_shakespeare_char.py; GPT-2
    "baby": Size(65, 256, {"n_layer": 6, "n_head": 6, "n_embd": 384}, 250),
    "124M": Size(50257, 1024, GPT2["gpt2"], 100),
}


def columns(
    sizes: list[str], batches: list[int], peer: Path | None, profile: bool, device: str
) -> tuple[list[Callable[[], dict[str, float]]], list[tuple[str, str]]]:
    """Measurements, and the ratios of interest: gptlab against each other engine of the same precision."""
    measurements: list[Callable[[], dict[str, float]]] = [memory_speed] if device == "cpu" else []
    ratios = []
    for name in sizes:
        size = SIZES[name]
        torch.manual_seed(1)
        model = GPT(vocab_size=size.vocab_size, block_size=size.block_size, **size.model).eval()
        theirs = hugging_face(model)
        for batch in batches:
            engines = make_engines(model, theirs, size, batch, peer, device)
            case = f"{name}, batch {batch}: "
            for column, (engine, read) in engines.items():
                engine(batch, 2 if device == "cpu" else size.tokens)  # the first call is slow; on a GPU, of each kernel
                measurements.append(speed_of(case + column, engine, batch, size.tokens, read))
                if not column.startswith("gptlab"):
                    ours = [name for name in engines if name.startswith("gptlab")]
                    ratios += [(case + name, case + column) for name in ours]
            if profile and device == "cpu":
                measurements.append(
                    functools.partial(timed_parts(linear.pack(model, rows=batch)), batch, size.tokens, case)
                )
    return measurements, ratios


def make_engines(
    model: GPT, theirs: nn.Module, size: Size, batch: int, peer: Path | None, device: str
) -> dict[str, tuple[Engine, int]]:
    """Column -> engine, bytes of weights that a step must read. All have the same weights; bf16 on GPUs, and where the CPU
    multiplies it in hardware."""
    numbers = sum(p.numel() for p in model.parameters()) - sum(t.numel() for t in model.lookup_tables())
    engines = {}
    on_gpu = device != "cpu"
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))[: 1 + (on_gpu or linear.fast_bf16())]:
        read = numbers * dtype.itemsize
        ours = copy.deepcopy(model).to(device, dtype) if on_gpu else linear.pack(model, dtype, batch)
        engines[f"gptlab {name}"] = gptlab_engine(ours), read
        engines[f"Hugging Face {name}"] = hugging_face_engine(copy.deepcopy(theirs).to(device, dtype)), read
    if peer:
        engines["nanoGPT fp32"] = nanogpt_engine(nanogpt(model, size, peer).to(device)), 4 * numbers
    return engines


def speed_of(column: str, engine: Engine, batch: int, tokens: int, read: int) -> Callable[[], dict[str, float]]:
    def measure() -> dict[str, float]:
        began = time.perf_counter()
        engine(batch, tokens)
        seconds = time.perf_counter() - began
        return {column: batch * tokens / seconds, f"{column}, GB/s of weights": read * tokens / seconds / 1e9}

    return measure


def gptlab_engine(model: nn.Module) -> Engine:
    def run(batch: int, tokens: int) -> None:
        with torch.inference_mode():  # as gptlab.sample
            steps = generate(model, [[0]] * batch, tokens, sampler=SAMPLER, seeds=range(batch))
            assert len([*steps]) == tokens

    return run


def hugging_face(model: GPT) -> nn.Module:
    """Hugging Face's GPT-2 with the model's weights."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        sys.exit("the part sample compares with Hugging Face's transformers: pip install transformers")
    config, weights = to_hf(model)
    theirs = GPT2LMHeadModel(GPT2Config(**config))
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    return theirs.eval()


def hugging_face_engine(model: nn.Module) -> Engine:
    from transformers import GenerationConfig

    def run(batch: int, tokens: int) -> None:
        how = GenerationConfig(
            do_sample=True, temperature=SAMPLER.temperature, top_k=SAMPLER.top_k, use_cache=True, max_new_tokens=tokens,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        idx = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        out = model.generate(idx, attention_mask=torch.ones_like(idx), generation_config=how)
        assert out.shape == (batch, 1 + tokens)

    return run


def nanogpt(model: GPT, size: Size, peer: Path) -> nn.Module:
    """nanoGPT's GPT with the model's weights; its GELU is always the exact one."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", peer / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    keys = {"bias": False} | {key: value for key, value in size.model.items() if key != "gelu"}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        theirs = module.GPT(
            module.GPTConfig(vocab_size=size.vocab_size, block_size=size.block_size, dropout=0.0, **keys)
        )
    theirs.load_state_dict(model.state_dict())
    return theirs.eval()


def nanogpt_engine(model: nn.Module) -> Engine:
    def run(batch: int, tokens: int) -> None:
        idx = torch.zeros(batch, 1, dtype=torch.int64, device=model.lm_head.weight.device)
        out = model.generate(idx, tokens, temperature=SAMPLER.temperature, top_k=SAMPLER.top_k)
        assert out.shape == (batch, 1 + tokens)

    return run


def memory_speed() -> dict[str, float]:
    """What the machine can read (the sum of an array) and copy (bytes read and written), in GB/s."""
    a, b = torch.ones(ELEMENTS), torch.ones(ELEMENTS)

    def best(function: Callable[[], Any], size: int) -> float:
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - began)
        return size / min(seconds) / 1e9

    return {"memory read, GB/s": best(a.sum, a.nbytes), "memory copy, GB/s": best(lambda: b.copy_(a), 2 * a.nbytes)}


def timed_parts(model: nn.Module) -> Callable[[int, int, str], dict[str, float]]:
    """Where a step's time goes, in % of it; the model is changed. Timers around the parts take 1 us per call."""
    spent: Counter[str] = Counter()

    def timed(part: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent[part] += time.perf_counter() - began
            return result

        return run

    for module in model.modules():
        if isinstance(module, (nn.Linear, linear.PackedLinear)):
            part = "lm_head" if module is model.lm_head else "linear layers"
            module.forward = timed(part, module.forward)
        elif isinstance(module, nn.LayerNorm):
            module.forward = timed("LayerNorm", module.forward)

    @contextlib.contextmanager
    def timers() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for owner, name, part in (
                (F, "scaled_dot_product_attention", "attention"),
                (F, "gelu", "GELU"),
                (KVCache, "extend", "cache"),
                (Sampler, "__call__", "sampling"),
            ):
                stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
            yield

    def measure(batch: int, tokens: int, case: str) -> dict[str, float]:
        spent.clear()
        with timers():
            timed("total", gptlab_engine(model))(batch, tokens)
        total = spent.pop("total")
        spent["rest"] = total - spent.total()
        return {f"{case}gptlab fp32, % {part}": 100 * seconds / total for part, seconds in spent.items()}

    return measure
