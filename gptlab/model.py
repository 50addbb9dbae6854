"""A GPT: the decoder-only transformer of GPT-2 (Radford et al. 2019), in pure PyTorch and with GPT-2's names.

Shapes: B sequences, T positions, C channels (n_embd), H heads, V rows of the (padded) vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gptlab import loss
from gptlab.attention import Dropout, attention

HASH = 1_000_003  # odd, so that each token changes the hash of an n-gram modulo a power of 2


class KVCache:
    """Keys and values of the positions so far, per layer (B, H, length, C // H): all that a next token needs of the
    ones before it. The first call fills in a prompt, each later one adds a position."""

    def __init__(self, n_layer: int, shape: tuple[int, int, int, int]) -> None:
        self.shape, self.length = shape, 0
        self.recent: Tensor | None = None  # ids (B, n - 1) that the next n-gram begins with
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, H, T, C // H); returns all so far."""
        if self._layers[layer] is None:  # autocast decides about their type
            self._layers[layer] = (k.new_empty(self.shape), v.new_empty(self.shape))
        start, end = self.length, self.length + k.shape[2]
        for kept, new in zip(self._layers[layer], (k, v), strict=True):
            kept[:, :, start:end] = new
        keys, values = self._layers[layer]
        return keys[:, :, :end], values[:, :, :end]


class NGrams(nn.Module):
    """A vector for the last n tokens of each position, summed over `sizes` n: a row of a table of at most `rows`, which
    several n-grams share by a hash where there are more (hash n-gram embeddings, Pagnoni et al. 2024). Tables start at zero.
    Dropout leaves out whole vectors, so that the model does without those it has memorized."""

    def __init__(self, sizes: Sequence[int], rows: int, dropout: float, vocab_size: int, n_embd: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout1d(dropout)  # of (B, T, C): each position's vector, or nothing
        self.sizes, self.before_text = tuple(sizes), vocab_size  # an id for positions before the first token
        self.tables = nn.ModuleList(nn.Embedding(min((vocab_size + 1) ** n, rows), n_embd) for n in sizes)

    def forward(self, idx: Tensor, cache: KVCache | None) -> Tensor:
        """idx (B, T) -> (B, T, C)."""
        (B, T), reach = idx.shape, max(self.sizes) - 1
        before = cache.recent if cache is not None and cache.length else idx.new_full((B, reach), self.before_text)
        ids = torch.cat((before, idx), dim=1).long()  # (B, reach + T)
        if cache is not None:
            cache.recent = ids[:, T:]
        total = 0
        for n, table in zip(self.sizes, self.tables, strict=True):
            rows = table.num_embeddings
            base = self.before_text + 1 if (self.before_text + 1) ** n <= rows else HASH
            keys = sum(ids[:, reach - i : reach - i + T] * pow(base, i, 2**31) for i in range(n))
            total = total + self.dropout(table(keys % rows))
        return total


class Rotary(nn.Module):
    """Turns pairs of channels of queries and keys by angles that grow with the position, so that their products depend on
    the distance (RoPE, Su et al. 2021)."""

    def __init__(self, head_size: int, block_size: int) -> None:
        super().__init__()
        frequencies = 10_000.0 ** -(torch.arange(0, head_size, 2) / head_size)
        angles = torch.arange(block_size)[:, None] * frequencies  # (T, D / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, start: int) -> Tensor:
        """x (..., T, D), whose first position is `start`."""
        cos, sin = (part[start : start + x.shape[-2]] for part in (self.cos, self.sin))
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, dropout: float, bias: bool, rotary: Rotary | None) -> None:
        super().__init__()
        self.n_head, self.dropout, self.rotary = n_head, dropout, rotary
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.resid_dropout = Dropout(dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, C // H)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if self.rotary is not None:
            q, k = self.rotary(torch.stack((q, k)), cache.length if cache is not None else 0)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        causal = cache is None or T > 1  # a single new position sees all of them
        y = attention(q, k, v, dropout=self.dropout if self.training else 0.0, causal=causal)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, n_embd: int, dropout: float, bias: bool, gelu: str) -> None:
        super().__init__()
        self.approximate = {"erf": "none", "tanh": "tanh"}[gelu]
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate=self.approximate)  # (B, T, 4 C)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, n_embd: int, bias: bool, attn: CausalSelfAttention, mlp: MLP) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, bias=bias)
        self.attn = attn
        self.ln_2 = nn.LayerNorm(n_embd, bias=bias)
        self.mlp = mlp

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token ids (B, T) -> logits (B, T, V). The keywords are the keys of `conf/model/*.yaml` and the data's sizes.

    `vocab_multiple` pads the vocabulary (faster matrix products on GPUs) with logits of -inf, which take no part in any
    loss and are never sampled. With `activation_checkpointing`, the backward pass recomputes all but each block's input
    (Chen et al. 2016): the same numbers, less memory, about a third more time.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        block_size: int,
        n_layer: int,
        n_head: int,
        n_embd: int,
        dropout: float = 0.0,
        bias: bool = False,
        gelu: str = "erf",  # exact (nanoGPT's, faster on CPUs), or tanh, GPT-2's approximation
        vocab_multiple: int = 1,
        activation_checkpointing: bool = False,
        position: str = "learned",  # a vector per position, or rotary
        tie_weights: bool = True,  # the head is the token embedding
        ngrams: Sequence[int] = (),  # sizes n of n-grams that are embedded beside the tokens
        ngram_rows: int = 16384,  # most rows of each of their tables
        ngram_dropout: float = 0.0,  # of their vectors
    ) -> None:
        super().__init__()
        if min(vocab_size, block_size, n_layer, n_head, n_embd, vocab_multiple) < 1 or n_embd % n_head:
            raise ValueError(f"sizes must be >= 1, and n_embd={n_embd} must be divisible by n_head={n_head}")
        if position not in ("learned", "rotary") or (position == "rotary" and n_embd % (2 * n_head)):
            raise ValueError(f"position={position!r}: learned, or rotary with an even number of channels per head")
        self.vocab_size, self.block_size = vocab_size, block_size
        self.activation_checkpointing = activation_checkpointing
        padded = math.ceil(vocab_size / vocab_multiple) * vocab_multiple
        rotary = Rotary(n_embd // n_head, block_size) if position == "rotary" else None
        parts = {"wte": nn.Embedding(padded, n_embd)}
        if ngrams:
            parts["ngrams"] = NGrams(ngrams, ngram_rows, ngram_dropout, vocab_size, n_embd)
        if rotary is None:
            parts["wpe"] = nn.Embedding(block_size, n_embd)
        parts["drop"] = Dropout(dropout)

        def block() -> Block:
            attn = CausalSelfAttention(n_embd, n_head, dropout, bias, rotary)
            return Block(n_embd, bias, attn, MLP(n_embd, dropout, bias, gelu))

        parts["h"] = nn.ModuleList(block() for _ in range(n_layer))
        self.transformer = nn.ModuleDict({**parts, "ln_f": nn.LayerNorm(n_embd, bias=bias)})
        self.lm_head = nn.Linear(n_embd, padded, bias=False)
        if tie_weights:
            self.lm_head.weight = self.transformer.wte.weight  # as in GPT-2
        if padded > vocab_size:  # as a bias: one pass over the logits, not two
            padding = torch.zeros(padded).index_fill(0, torch.arange(vocab_size, padded), -math.inf)
            del self.lm_head.bias
            self.lm_head.register_buffer("bias", padding, persistent=False)
        self._init_weights(n_layer)

    @torch.no_grad()
    def _init_weights(self, n_layer: int) -> None:
        """GPT-2's: N(0, 0.02), projections into the residual stream scaled by 1 / sqrt(their number); biases 0."""
        for name, parameter in self.named_parameters():
            if ".ngrams." in name or name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("c_proj.weight"):
                parameter.normal_(0.0, 0.02 / math.sqrt(2 * n_layer))
            elif parameter.dim() == 2:
                parameter.normal_(0.0, 0.02)

    def new_cache(self, B: int, length: int | None = None) -> KVCache:
        """For `forward`, with B sequences of up to `length` tokens; by default of block_size, which is the most."""
        n_head = self.transformer.h[0].attn.n_head
        length = min(length or self.block_size, self.block_size)
        shape = (B, n_head, length, self.transformer.wte.embedding_dim // n_head)
        return KVCache(len(self.transformer.h), shape)

    def forward(self, idx: Tensor, cache: KVCache | None = None, targets: Tensor | None = None) -> Tensor:
        """Logits for the token after each position of `idx` (B, T), int64 or int32; with a cache, `idx` continues what it
        holds, and the logits are those after the last position alone, (B, 1, V). With `targets` (B, T), int64, -100 where
        none counts: their summed loss in nats, for which the logits need not exist all at once. Data sets and `generate`
        check that 0 <= id < vocab_size: here, a GPU would have to wait for it in every step."""
        T, start = idx.shape[1], cache.length if cache is not None else 0
        if self.block_size < start + T:
            raise ValueError(f"a sequence of {start + T} tokens is longer than block_size={self.block_size}")
        if start and T > 1:
            raise ValueError(f"a cache takes one token at a time after its first call, not {T}")
        x = self.transformer.wte(idx)  # (B, T, C)
        if "ngrams" in self.transformer:
            x = x + self.transformer.ngrams(idx, cache)
        if "wpe" in self.transformer:
            x = x + self.transformer.wpe.weight[start : start + T]
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            if self.activation_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache, layer)
        if cache is not None:
            cache.length += T
            x = x[:, -1:]
        x = self.transformer.ln_f(x)
        if targets is not None and (rows := loss.chunk_size(targets.numel(), self.lm_head.weight)):
            return loss.summed_nats(x.flatten(0, 1), self.lm_head, targets.flatten(), rows)
        logits = self.lm_head(x)  # (B, T, V)
        return logits if targets is None else loss.of_logits(logits, targets)

    def lookup_tables(self) -> list[nn.Parameter]:
        """The parameters that no matrix product uses."""
        tables = [module.weight for module in self.modules() if isinstance(module, nn.Embedding)]
        return [table for table in tables if table is not self.lm_head.weight]

    def flops_per_token(self) -> int:
        """Floating-point operations of one training step per token, forward and backward: 6 N for the matrices and
        12 L C T for attention at full length (PaLM, Chowdhery et al. 2022, appendix B)."""
        matrices = sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in self.lookup_tables())
        return 6 * matrices + 12 * len(self.transformer.h) * self.transformer.wte.embedding_dim * self.block_size


def nats(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Summed loss of predicting each counted token of ids (B, T + 1) from those before it, by a GPT or a custom model."""
    idx, targets = ids[:, :-1], ids[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(~mask[:, 1:], -100)
    if type(model).forward is GPT.forward:  # a subclass with a forward pass of its own may take no targets
        return model(idx, targets=targets)
    return loss.of_logits(model(idx), targets)
