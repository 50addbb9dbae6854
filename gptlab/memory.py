"""How much memory training takes, computed from the sizes alone, and what a machine has.

What is counted are the tensors that are alive at the worst moment of an optimizer step of `gptlab.module`, of a model
of `gptlab.model`. Shapes: B sequences, T positions, N = B T tokens, C channels, H heads, V rows of the (padded)
vocabulary, L blocks. Not counted: the program and its libraries, the data, a GPU library's workspace (some hundred
MB together).

On a CPU under Linux the C library adds its share. It maps tensors of 32 MiB or more one by one and gives them back at
once; smaller ones share its heap, which keeps what is freed and is never packed tightly. Measured with glibc
2.36: with one mapping per tensor (MALLOC_MMAP_THRESHOLD_=200000; 20 configurations) a process grows by the tensors'
bytes and 0 to 7 % more; as glibc comes (27 configurations) to up to 2.4 times them, which `_heap_waste` describes to
within 15 %; the same run differs by up to 11 % from its next.
"""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

TOLERANCE = 0.15  # how far the estimate may be off; check_fits refuses only what is beyond it
WIDE = 4  # bytes of a float32
HEAP_WASTE = 0.45  # of what comes and goes with each step; measured 0.3 to 0.9
MAPPED = 32 * 2**20  # bytes from which glibc gives a tensor a mapping of its own (DEFAULT_MMAP_THRESHOLD_MAX)
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # v2, v1

LESS_MEMORY = "use a smaller model or data.block_size, model.activation_checkpointing=true, or trainer.precision=bf16 (in a new run)"

Tensors = list[tuple[int, int]]  # how many, bytes of each


@dataclass(frozen=True)
class Estimate:
    """Bytes. `activations` is what the worst moment holds besides whole parameters, gradients and optimizer state;
    `allocator` what a CPU's heap keeps beyond that (see above)."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    allocator: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.allocator


@dataclass(frozen=True)
class Sizes:
    """What the formulas need; `narrow` is the bytes of a number where autocast may choose, `WIDE` where it may not."""

    B: int
    T: int
    C: int
    H: int
    V: int
    L: int
    narrow: int
    dropout: bool
    bias: bool
    checkpointing: bool
    cuda: bool

    @property
    def N(self) -> int:
        return self.B * self.T

    @property
    def stream(self) -> int:
        """Bytes of (B, T, C) in float32: the residual stream, which autocast leaves alone."""
        return self.N * self.C * WIDE


def estimate(
    model_config: dict,
    vocab_size: int,
    block_size: int,
    micro_batch_size: int,
    precision: str,
    device_type: str = "cpu",
    accumulates: bool = False,
) -> Estimate:
    """The memory that training takes at its peak.

    Args:
        model_config: the keys of `gptlab.config.GPTConfig`; `_target_` and `compile` are of no account.
        precision: 32, bf16 or fp16.
        accumulates: whether a step has more than one micro-batch, so that the gradients of the first are there while
            the second goes forward.
    """
    c = model_config
    multiple = c.get("vocab_multiple", 1)
    s = Sizes(
        B=micro_batch_size,
        T=block_size,
        C=c["n_embd"],
        H=c["n_head"],
        V=math.ceil(vocab_size / multiple) * multiple,
        L=c["n_layer"],
        narrow=4 if precision == "32" else 2,
        dropout=c.get("dropout", 0.0) > 0,
        bias=c.get("bias", False),
        checkpointing=c.get("activation_checkpointing", False),
        cuda=device_type == "cuda",
    )
    weights = parameters(s)
    held = weights + [(2 * n, size) for n, size in weights]  # and AdamW's two moments
    moments = _moments(s, accumulates)
    if precision == "fp16":  # AdamW is not fused: the square roots of the second moments, all at once
        moments.append((weights, weights))
    whole = _bytes(weights)
    peak = max(_bytes(grads + kept) for grads, kept in moments)
    result = Estimate(whole, whole, 2 * whole, max(0, peak - whole))
    if device_type == "cpu" and sys.platform.startswith("linux"):
        return replace(result, allocator=_allocator(s, moments, held, result.total))
    return result


def parameters(s: Sizes) -> Tensors:
    """GPT's, in float32."""
    vectors = 2 if s.bias else 1  # a LayerNorm's
    return [
        (1, s.V * s.C * WIDE),  # wte, which is lm_head too
        (1, s.T * s.C * WIDE),  # wpe
        *_block_parameters(s, s.L),
        (vectors, s.C * WIDE),  # ln_f
    ]


def _block_parameters(s: Sizes, blocks: int) -> Tensors:
    matrix, vector = s.C * s.C * WIDE, s.C * WIDE
    result = [
        (blocks, 3 * matrix),  # c_attn
        (blocks, matrix),  # c_proj of attention
        (2 * blocks, 4 * matrix),  # c_fc and c_proj of the MLP
        (2 * blocks, vector),  # ln_1 and ln_2
    ]
    if s.bias:
        # ln_1, ln_2 and both c_proj; c_attn; c_fc
        result += [(4 * blocks, vector), (blocks, 3 * vector), (blocks, 4 * vector)]
    return result


def _moments(s: Sizes, accumulates: bool) -> list[tuple[Tensors, Tensors]]:
    """The candidates for the peak, as the gradients that are there and the rest.

    Memory grows through the forward pass; through the backward pass each block frees its activations and leaves its
    gradients. That is a straight line, so that the peak is at one of its ends.
    """
    whole, copies = parameters(s), _weight_copies(s)
    matrix = (1, s.V * s.C * WIDE)  # lm_head's gradient, which waits for that of wte, the same weight
    at_loss = whole if accumulates else []
    first = [*at_loss, matrix]
    last = first if accumulates else [matrix, *_block_parameters(s, s.L - 1)]
    return [
        (at_loss, copies + _kept(s) + _loss(s)),
        *((first, copies + _backward_begins(s, part)) for part in _block_backward(s)),
        *((last, copies + _embedding(s) + part) for part in _block_backward(s)),
        ([*whole, matrix] if accumulates else whole, [*copies, matrix]),  # wte's comes last, and is as large
    ]


def _weight_copies(s: Sizes) -> Tensors:
    """Under autocast: the matrices of the linear maps in 16 bits, kept through forward and backward pass."""
    if s.narrow == WIDE:
        return []
    linear = [(1, s.V * s.C * WIDE), *_block_parameters(s, s.L)]
    return [(n, size // WIDE * s.narrow) for n, size in linear]


def _embedding(s: Sizes) -> Tensors:
    """What the first block starts from."""
    result = [(1, s.stream)]
    if s.dropout:
        result.append((1, _mask(s, WIDE)))
    return result


def _kept(s: Sizes) -> Tensors:
    """What autograd keeps when the forward pass has come to the logits."""
    ln_f = (1, s.N * s.C * s.narrow)
    if s.checkpointing:
        return [*_embedding(s), (s.L, s.stream), ln_f]  # each block's result, which is the next one's input
    block = [(s.L * n, size) for n, size in _block(s)]
    return [*_embedding(s), *block, (s.L, s.stream), ln_f]


def _loss(s: Sizes) -> Tensors:
    """Backward of cross_entropy, in float32: log_softmax's result and the gradients of both its result and its input.
    The logits are gone by then."""
    return [(3, s.N * s.V * WIDE)]


def _block(s: Sizes) -> Tensors:
    """What autograd keeps of a block, besides its input and its result."""
    return [*_attention(s), (1, s.stream), *_mlp(s)]  # between them, the residual stream


def _attention(s: Sizes) -> Tensors:
    narrow = s.N * s.C * s.narrow
    result = [(1, narrow)]  # ln_1's result, as c_attn takes it
    if (
        s.dropout and not s.cuda
    ):  # outside CUDA no fused attention knows dropout: it is computed step by step, in float32
        matrix = s.B * s.H * s.T * s.T * WIDE
        result += [
            (3, s.stream),  # q and k scaled, and v
            (3, matrix),  # softmax's result, dropout's mask and their product
            (1, narrow),  # the heads side by side
        ]
    else:
        result += [
            (1, 3 * narrow),  # c_attn's result: q, k and v
            (1, narrow),  # attention's result
            (1, s.B * s.H * s.T * WIDE),  # and the log of its sums
        ]
    if s.dropout:
        result.append((1, _mask(s, s.narrow)))  # resid_dropout
    return result


def _mlp(s: Sizes) -> Tensors:
    narrow = s.N * s.C * s.narrow
    result = [
        (1, narrow),  # ln_2's result, as c_fc takes it
        (2, 4 * narrow),  # what goes into GELU and what comes out
    ]
    if s.dropout:
        result.append((1, _mask(s, s.narrow)))
    return result


def _mask(s: Sizes, of: int) -> int:
    """Dropout's mask for (B, T, C) numbers of `of` bytes: CUDA's kernel keeps booleans, the others factors."""
    return s.N * s.C * (1 if s.cuda else of)


def _block_backward(s: Sizes) -> list[Tensors]:
    """The two heavy moments of a block's backward pass: with all that it keeps and its gradients."""
    result = (1, s.stream)  # the gradient of its result, which goes on past it
    branch = (1, s.N * s.C * s.narrow)  # the same as it enters the branch
    mlp = [*_block(s), result, branch, (1, 4 * s.N * s.C * s.narrow)]  # of GELU's result
    moments = [mlp]
    if s.dropout and not s.cuda:  # the MLP is done; the gradient of the dropped-out attention matrix
        moments.append([*_attention(s), result, branch, (1, s.B * s.H * s.T * s.T * WIDE)])
    return moments


def _backward_begins(s: Sizes, last: Tensors) -> Tensors:
    """What is kept when the backward pass is in the last block: of that one `last`, of the others everything."""
    before = [*_embedding(s), (s.L - 1, s.stream)]
    if not s.checkpointing:
        before += [((s.L - 1) * n, size) for n, size in _block(s)]
    return before + last


def _bytes(tensors: Tensors) -> int:
    return sum(n * size for n, size in tensors)


def _small(tensors: Tensors) -> Tensors:
    return [(n, size) for n, size in tensors if size < MAPPED]


def _allocator(s: Sizes, moments: list[tuple[Tensors, Tensors]], held: Tensors, tensors: int) -> int:
    """By how many bytes a process on a CPU grows beyond its tensors."""
    small = [(_bytes(_small(grads)), _bytes(_small(kept))) for grads, kept in moments]
    mapped = max(_bytes(grads + kept) - sum(part) for (grads, kept), part in zip(moments, small, strict=True))
    # The heap never shrinks: its worst moment and that of the mapped tensors add up, even if they differ.
    heap = max(sum(part) for part in small)
    wasted = max(HEAP_WASTE * grads + _heap_waste(s) * kept for grads, kept in small)
    return max(0, _bytes(held) + mapped + heap + int(wasted) - tensors)


def _heap_waste(s: Sizes) -> float:
    """What glibc's heap keeps, as a share of the small activations: where sizes alternate, holes fit nothing."""
    if s.checkpointing:
        return 1.5  # measured 0.9 to 1.7: each block is computed again into what another left
    if s.dropout and s.narrow < WIDE:
        return 1.0  # measured 0.8 to 1.1: attention goes to float32 and back
    return HEAP_WASTE


def capacity(device: torch.device) -> int:
    """Bytes of memory that the device has: a GPU's own; else the machine's, or its container's where that has less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in CGROUP_LIMITS:
        text = file.read_text().strip() if file.is_file() else "max"
        if text != "max":
            limits.append(int(text))
    return min(limits)


def check_fits(estimate_of: Callable[[int], Estimate], micro_batch_size: int, capacity: int) -> None:
    """Whether training with so many sequences at a time can fit.

    Args:
        estimate_of: the estimate for a micro-batch size.

    Raises:
        ValueError: the estimate exceeds the capacity by more than it can be wrong; the text says by which sizes, and
            what would fit.
    """
    limit = (1 + TOLERANCE) * capacity
    needed = estimate_of(micro_batch_size)
    if needed.total <= limit:
        return
    smaller = micro_batch_size // 2
    while smaller >= 1 and estimate_of(smaller).total > limit:
        smaller //= 2
    if smaller:
        remedy = f"data.micro_batch_size={smaller} would fit: the same steps, in smaller pieces"
    else:
        remedy = (
            "the model is too large for it whatever data.micro_batch_size is: choose a smaller model.n_layer or "
            "model.n_embd, a smaller vocabulary, or a shorter data.block_size"
        )
    raise ValueError(
        f"training with data.micro_batch_size={micro_batch_size} takes {in_words(needed)}; there are "
        f"{human(capacity)}: {remedy}"
    )


def in_words(needed: Estimate) -> str:
    parts = {
        "parameters": needed.parameters,
        "gradients": needed.gradients,
        "optimizer state": needed.optimizer,
        "activations": needed.activations,
    }
    if needed.allocator:
        parts["heap overhead"] = needed.allocator
    shown = ", ".join(f"{name} {human(size)}" for name, size in parts.items())
    return f"about {human(needed.total)} ({shown})"


def human(size: float) -> str:
    """Bytes in a unit that leaves few digits: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.{0 if size >= 100 else 1}f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def out_of_memory(error: RuntimeError) -> bool:
    """CPUs and Apple's GPUs have no class of their own for it."""
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)
