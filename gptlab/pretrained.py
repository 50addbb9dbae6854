"""GPT weights in other formats: Hugging Face's GPT-2, read and written. config.json is untrusted.

Hugging Face stores the matrices of a block as (in, out), a `Conv1D`, where `nn.Linear` has (out, in); all else is alike.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptlab.model import GPT

GPT2 = {
    name: {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "bias": True, "gelu": "tanh"}
    for name, n_layer, n_head, n_embd in (
        ("gpt2", 12, 12, 768),
        ("gpt2-medium", 24, 16, 1024),
        ("gpt2-large", 36, 20, 1280),
        ("gpt2-xl", 48, 25, 1600),
    )
}
GPT2_VOCAB_SIZE, GPT2_BLOCK_SIZE = 50_257, 1024

WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers that older files carry
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

LIMIT = 2**24  # of any size: products of several stay far below 2**63
GELU_OF = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
SIZES = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": GPT2_VOCAB_SIZE, "n_positions": GPT2_BLOCK_SIZE}
FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
DEFAULTS = {**SIZES, **FIXED, "model_type": None, "activation_function": "gelu_new", "n_inner": None}
ALIASES = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd",
           "max_position_embeddings": "n_positions"}  # fmt: skip


@dataclass(frozen=True)
class Pretrained:
    model: dict[str, Any]  # n_layer, n_head, n_embd, bias, gelu: the keys of conf/model that weights decide
    vocab_size: int  # rows of the embedding; may be more than the tokenizer's
    block_size: int
    weights: dict[str, Tensor]  # as in `GPT.state_dict()`


def hf_architecture(config: Any) -> tuple[dict[str, Any], int, int]:
    """Keys of conf/model, vocabulary and block size of a GPT-2 config.json; absent keys have GPT-2's values.

    Raises:
        ValueError: everything in it that `GPT` cannot express.
    """
    if not isinstance(config, dict):
        raise ValueError("config.json must be an object")
    config = DEFAULTS | config | {key: config[alias] for alias, key in ALIASES.items() if alias in config}
    n_embd, n_head = config["n_embd"], config["n_head"]
    allowed = {key: (value,) for key, value in FIXED.items()} | {"activation_function": (*GELU_OF,)}
    wrong = [
        f"{key}={reprlib.repr(config[key])} must be an integer from 1 to {LIMIT}"
        for key in SIZES
        if type(config[key]) is not int or not 1 <= config[key] <= LIMIT
    ]
    if not wrong:
        allowed["n_inner"] = (None, 4 * n_embd)
        wrong = [f"n_embd={n_embd} must be divisible by n_head={n_head}"] if n_embd % n_head else []
    wrong += [
        f"{key}={reprlib.repr(config[key])} must be {' or '.join(map(str, values))}"
        for key, values in allowed.items()
        if config[key] not in values
    ]
    if wrong:
        raise ValueError(f"config.json: not a GPT-2 that gptlab can express: {'; '.join(wrong)}")
    model = {key: config[key] for key in ("n_layer", "n_head", "n_embd")}
    gelu = GELU_OF[config["activation_function"]]
    return {**model, "bias": True, "gelu": gelu}, config["vocab_size"], config["n_positions"]


def from_hf(config: Any, weights: Mapping[str, Tensor]) -> Pretrained:
    """The GPT of a config.json and its weights, under the names of `GPT2LMHeadModel` or of the bare `GPT2Model`. Matrices
    are transposed views of what is given.

    Raises:
        ValueError: an architecture that `GPT` cannot express, or weights of other names, shapes or types than it says.
    """
    model, vocab_size, block_size = hf_architecture(config)
    prefix = "" if WTE in weights else "transformer."
    named = {
        name if name == HEAD else prefix + name: _transpose(name, weight)
        for name, weight in weights.items()
        if not name.endswith(MASKS)
    }
    named |= {HEAD: named[WTE]} if WTE in named else {}  # tied; a file may have it or not
    if model["n_layer"] > len(named):  # the table below would not end
        raise ValueError(f"n_layer={model['n_layer']} must not be more than the {len(named)} weights that there are")
    _require_shapes(named, shapes_of(model, vocab_size, block_size))
    return Pretrained(model, vocab_size, block_size, named)


@torch.no_grad()
def to_hf(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and weights of the `GPT2LMHeadModel` with the same logits: padding of the vocabulary is dropped, biases
    that the model lacks are zeros. The config names no special tokens.

    Raises:
        ValueError: the model has what GPT-2 has not.
    """
    has = {
        "model.position=rotary": "wpe" not in model.transformer,
        "model.ngrams": "ngrams" in model.transformer,
        "model.tie_weights=false": model.lm_head.weight is not model.transformer.wte.weight,
    }
    if any(has.values()):
        raise ValueError(f"{', '.join(key for key in has if has[key])}: Hugging Face's GPT-2 has no such option")
    weights = {}
    for name, weight in model.state_dict().items():
        if name != HEAD:  # tied
            weight = weight[: model.vocab_size] if name == WTE else weight
            weights[name] = _transpose(name, weight).contiguous()
            bias = name.removesuffix("weight") + "bias"
            if name not in (WTE, WPE) and name.endswith("weight"):
                weights.setdefault(bias, weight.new_zeros(weight.shape[0]))
    blocks, dropout = model.transformer.h, model.transformer.drop.p
    config = {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED,
        "n_layer": len(blocks),
        "n_head": blocks[0].attn.n_head,
        "n_embd": model.transformer.wte.embedding_dim,
        "n_positions": model.block_size,
        "vocab_size": model.vocab_size,
        "activation_function": "gelu" if blocks[0].mlp.approximate == "none" else "gelu_new",
        **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id")),  # or they would be GPT-2's
    }
    return config, weights


@torch.no_grad()
def copy_weights(weights: Mapping[str, Tensor], model: GPT) -> None:
    """Copy into a GPT that may have fewer positions and fewer tokens than the weights; its padding stays as it is.

    Raises:
        ValueError: weights that the model lacks, or of other shapes; nothing is copied then.
    """
    rows = {WTE: model.vocab_size, HEAD: model.vocab_size, WPE: model.block_size}
    sources, targets = (
        {name: tensor[: rows.get(name)] if name in rows else tensor for name, tensor in tensors.items()}
        for tensors in (weights, model.state_dict())
    )
    _require_shapes(sources, {name: target.shape for name, target in targets.items()})
    for name, target in targets.items():
        target.copy_(sources[name])


def shapes_of(model: Mapping[str, Any], vocab_size: int, block_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes in the `state_dict()` of a GPT with these keys of conf/model: computed, so that huge ones take nothing."""
    C, options = model["n_embd"], {"vocab_multiple": 1, "position": "learned", "ngrams": (), **model}
    padded = math.ceil(vocab_size / options["vocab_multiple"]) * options["vocab_multiple"]
    tables = {WTE: padded, HEAD: padded} | ({WPE: block_size} if options["position"] == "learned" else {})
    for i, n in enumerate(options["ngrams"]):
        tables[f"transformer.ngrams.tables.{i}.weight"] = min((vocab_size + 1) ** n, model["ngram_rows"])
    block = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C),
             "ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}  # fmt: skip
    layers = {f"transformer.h.{i}.{name}": shape for i in range(model["n_layer"]) for name, shape in block.items()}
    layers["transformer.ln_f"] = (C,)
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in layers.items()} if model["bias"] else {}
    return {**{name: (rows, C) for name, rows in tables.items()}, **weights, **biases}


def _transpose(name: str, weight: Tensor) -> Tensor:
    """Between (in, out) and (out, in), where the two formats differ."""
    return weight.t() if name.endswith(TRANSPOSED) and weight.dim() == 2 else weight


def _require_shapes(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError, which names what is missing, unknown, of another shape, or not of floating-point numbers."""
    wrong = {
        "missing": shapes.keys() - weights.keys(),
        "unknown": weights.keys() - shapes.keys(),
        "of another shape or type": {
            f"{name} {(*weight.shape,)} {weight.dtype}, not {(*shapes[name],)}"
            for name, weight in weights.items()
            if name in shapes and (weight.shape != shapes[name] or weight.dtype not in DTYPES)
        },
    }
    if texts := [f"{what}: {_some(names)}" for what, names in wrong.items() if names]:
        raise ValueError(f"the weights do not fit the model; {'; '.join(texts)}")


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"{name:.200}" for name in names[:3]) + more
