"""python -m gptlab.sizing: parameters, FLOPs, memory, checkpoint and time of what `gptlab.train` would train.

FLOPs are those of matrix products, two per multiplication, as torch's FLOP counter counts them: causal attention in full
(PaLM, Chowdhery et al. 2022, appendix B), recomputation not at all. The backward pass takes twice the forward pass.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from gptlab import cli, config
from gptlab.errors import UserError

# Dense peak of bf16 and fp16 matrix products, FLOP/s per device, from the vendors' data sheets; the first that matches.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "4090": 165e12, "V100": 125e12, "T4": 65e12}  # fmt: skip
PARTS = {"wte.": "token embedding", "wpe.": "position embedding", "ngrams.": "n-gram tables", ".attn.": "attention", ".mlp.": "MLP",
         "ln_": "LayerNorms", "lm_head.": "head"}  # fmt: skip
EMBEDDINGS = ("token embedding", "position embedding", "n-gram tables")


def size(cfg: config.Sizing) -> None:
    import torch

    from gptlab import optim
    from gptlab.checkpoint import build_model

    vocab_size, block_size, batch_size, micro_batch_size = read_sizes(cfg)
    build = functools.partial(build_model, cfg.model, vocab_size, block_size)
    try:
        with torch.device("meta"):
            model = build()
            flops = forward_flops(model, block_size)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        target, reason = cfg.model["_target_"], str(error).partition("\n")[0]
        raise UserError(f"model._target_={target}: cannot run on tensors without data: {reason}") from error
    parts = count_parameters(model)
    n, embeddings = sum(parts.values()), sum(parts.get(part, 0) for part in EMBEDDINGS)
    lookups = parts.get("position embedding", 0)
    if hasattr(model, "lookup_tables"):
        lookups = sum(table.numel() for table in model.lookup_tables())
    rows = [(part, f"{count:,}", f"{count / n:.1%}") for part, count in parts.items()]
    rows += [("total", f"{n:,}"), ("without embeddings", f"{n - embeddings:,}")]
    table(f"parameters ({vocab_size:,} tokens, {block_size:,} positions)", rows)

    training, six_n = 3 * sum(flops.values()), 6 * (n - lookups)
    rows = [(part, f"{f:,}", f"{3 * f:,}", f"{3 * f / training:.1%}") for part, f in flops.items()]
    rows += [("total", f"{training // 3:,}", f"{training:,}")]
    rows += [("6 N, without tables that are looked up", "", f"{six_n:,}", f"{six_n / training:.1%}")]
    table("FLOPs per token: forward, training", rows)

    t, ema = cfg.trainer, any(c and c["_target_"].endswith(".EMA") for c in (cfg.callbacks or {}).values())
    processes = t.devices * t.num_nodes
    sequences = -(-batch_size // processes)
    size = {"sequences": sequences, "micro_batch_size": min(micro_batch_size or sequences, sequences)}
    groups = optim.parameter_groups(model, 0.0, 1.0, {"block": 1.0} if cfg.optim.muon_lr is not None else {})
    by_muon = sum(p.numel() for group in groups if group["kind"] == "block" for p in group["params"])
    moments = 8 * n - 4 * by_muon
    step = {"block_size": block_size, **size, "optim_config": cfg.optim.model_dump()}
    print_memory(build, t, n, moments, **step, averaged=ema, distributed=processes > 1)
    saved = (8 if ema else 4) * n + moments + 1200 * len([*model.parameters()])  # names and zip records of each tensor
    table("checkpoint", [("weights, optimizer state" + ", EMA" * ema, f"{saved:,} bytes")])

    tokens = cfg.tokens or t.max_steps * batch_size * block_size
    peaks = {"flops_per_s": cfg.flops_per_s} if cfg.flops_per_s else PEAK_FLOPS
    times = {name: tokens * training / (processes * peak * cfg.mfu) for name, peak in peaks.items()}
    rows = [(name, f"{peaks[name] / 1e12:g} TFLOP/s", format_time(time)) for name, time in times.items()]
    table(f"time for {tokens:,} tokens on {processes} x the peak of a device, at {cfg.mfu:.0%} of it", rows)


def read_sizes(cfg: config.Sizing) -> tuple[int, int, int, int | None]:
    """Vocabulary, block, batch and micro-batch size; data are read only for what the config does not say."""
    from gptlab.pretrained import GPT2

    data = cfg.data
    inherited = data.get("tokenizer") == "init_from"
    gpt2 = data["_target_"].endswith(".WindowData") or data.get("tokenizer") == "gpt2"
    gpt2 |= inherited and cfg.init_from in GPT2
    vocab_size = cfg.vocab_size or data.get("vocab_size") or (50257 if gpt2 else None)
    if vocab_size and data.get("block_size") and data.get("batch_size"):
        return vocab_size, data["block_size"], data["batch_size"], data.get("micro_batch_size")
    from gptlab import sources
    from gptlab.train import make_data

    try:
        tokenizer = sources.load(cfg.init_from, meta=cfg.meta, trust=cfg.trust).tokenizer if inherited else None
        loaded = make_data(cfg.data, cfg.seed, tokenizer)
    except UserError as error:
        sizes = "vocab_size=50257 for GPT-2's tokens, 65 for Tiny Shakespeare's characters"
        raise UserError(f"{error}\nor give the size of the vocabulary: {sizes}") from None
    vocab_size = cfg.vocab_size or loaded.tokenizer.vocab_size
    return vocab_size, loaded.block_size, loaded.batch_size, loaded.micro_batch_size


def count_parameters(model: Any) -> dict[str, int]:
    """By part where the names are GPT-2's, else by child of the model; shared ones where they are met first."""
    counts, seen = Counter(dict.fromkeys(PARTS.values(), 0)), set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part = next((part for key, part in PARTS.items() if key in name), name.partition(".")[0])
        counts[f"{part} (tied)" if parameter in seen else part] += 0 if parameter in seen else parameter.numel()
        seen.add(parameter)
    return {part: count for part, count in counts.items() if count or "tied" in part}


def forward_flops(model: Any, block_size: int) -> dict[str, int]:
    """Per token of a full block; by part for gptlab's GPT, else as torch counts them on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from gptlab.model import GPT

    if type(model) is not GPT:
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, block_size, dtype=torch.int64))
        return {"all matrix products": counter.get_total_flops() // block_size}
    (V, C), L = model.transformer.wte.weight.shape, len(model.transformer.h)
    return {"attention, projections": 8 * L * C * C, "attention, scores (grow with block_size)": 4 * L * C * block_size,
            "MLP": 16 * L * C * C, "head": 2 * V * C}  # fmt: skip


def print_memory(build: Callable[[], Any], t: config.Trainer, n: int, moments: int, **step: Any) -> None:
    """What an optimizer step takes in one process; for a GPU that torch does not see, estimated as on a CPU."""
    import torch

    from gptlab.linear import fast_bf16
    from gptlab.memory import estimate_step, format_bytes

    on_cpu = t.accelerator == "cpu" or not torch.accelerator.is_available()
    device_type = "cpu" if on_cpu else torch.accelerator.current_accelerator().type
    auto = "bf16" if t.accelerator != "cpu" or fast_bf16() else "32"
    precision = auto if t.precision == "auto" else t.precision
    estimate = estimate_step(build, device_type=device_type, precision=precision, **step)
    sizes = {"weights": 4 * n, "gradients": 4 * n, "optimizer state": moments}
    if estimate:
        sizes |= {"copies (EMA, DDP)": 4 * n * (step["averaged"] + step["distributed"])}
        sizes |= {"activations": estimate.peak - estimate.state, "peak": estimate.peak}
    rows = [(name, format_bytes(size)) for name, size in sizes.items() if size]
    table(f"memory, {step['micro_batch_size']} x {step['block_size']:,} tokens at a time, precision {precision}", rows)


def table(title: str, rows: list[tuple[str, ...]]) -> None:
    print(f"{title}\n" + "".join(f"  {name:42}{''.join(f'{cell:>19}' for cell in cells)}\n" for name, *cells in rows))


def format_time(seconds: float) -> str:
    units = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((unit for unit, length in units.items() if seconds >= 2 * length), "seconds")
    return f"{seconds / units[unit]:,.1f} {unit}"


if __name__ == "__main__":
    cli.main(size, "sizing")
