"""What nanoGPT leaves, read as untrusted: `ckpt.pt` (its dict, once loaded) and the vocabulary in `meta.pkl`."""

import pickletools
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptlab.errors import MissingFileError, UserError
from gptlab.pretrained import Pretrained, shapes_of
from gptlab.tokenizer import CharTokenizer

LARGEST = {"n_layer": 2**10, "n_head": 2**24, "n_embd": 2**24, "block_size": 2**24, "vocab_size": 2**24}
VOCABULARY = 2**16  # characters: the ids in nanoGPT's data are uint16
META_BYTES = 2**21  # a vocabulary of that size takes 1.6 MB


def is_nanogpt(checkpoint: Any) -> bool:
    return isinstance(checkpoint, dict) and "model" in checkpoint and "model_args" in checkpoint


def from_checkpoint(checkpoint: dict[str, Any]) -> Pretrained:
    """The GPT of a checkpoint that nanoGPT's train.py saved, compiled or not. Its tensors are not copied.

    nanoGPT's first versions used GELU's tanh approximation, which no file tells: all are read as the exact function.

    Raises:
        ValueError: not nanoGPT's model, or its weights do not fit its model_args.
    """
    parts = [checkpoint["model_args"], checkpoint["model"]]
    if not all(isinstance(part, dict) and all(isinstance(name, str) for name in part) for part in parts):
        raise UserError("model_args and model must be dicts with names as keys")
    arguments = _check_arguments({"bias": True, **parts[0]})  # GPTConfig's default, for files older than the key
    # torch.compile's prefix; the causal mask, a buffer where torch lacked flash attention.
    weights = {name.removeprefix("_orig_mod."): w for name, w in parts[1].items() if not name.endswith(".attn.bias")}
    _check_weights(weights, arguments)
    model = {key: arguments.pop(key) for key in ("n_layer", "n_head", "n_embd", "bias")} | {"gelu": "erf"}
    return Pretrained(model, weights=weights | {"lm_head.weight": weights["transformer.wte.weight"]}, **arguments)


def _check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments but dropout."""
    if unknown := arguments.keys() - {*LARGEST, "bias", "dropout"}:
        raise UserError(f"unknown model_args {_join(unknown)}: this is not nanoGPT's model")
    for name, largest in LARGEST.items():
        size = arguments.get(name)
        if type(size) is not int or not 1 <= size <= largest:
            raise UserError(f"model_args: {name}={reprlib.repr(size)} must be an integer from 1 to {largest:,}")
    if arguments["n_embd"] % arguments["n_head"]:
        raise UserError(f"model_args: n_embd={arguments['n_embd']} must be divisible by n_head={arguments['n_head']}")
    if type(arguments["bias"]) is not bool:
        raise UserError(f"model_args: bias={reprlib.repr(arguments['bias'])} must be True or False")
    return {name: arguments[name] for name in (*LARGEST, "bias")}


def _check_weights(weights: dict[str, Any], arguments: dict[str, Any]) -> None:
    if wrong := [name for name, weight in weights.items() if not _is_plain(weight)]:
        raise UserError(f"{_join(wrong)} must be dense tensors of float64, float32, float16 or bfloat16")
    shapes = shapes_of(arguments, arguments["vocab_size"], arguments["block_size"])
    if missing := shapes.keys() - weights.keys():
        raise UserError(f"no weights {_join(missing)}, which model_args imply")
    if unknown := weights.keys() - shapes.keys():
        raise UserError(f"unknown weights {_join(unknown)}: this is not nanoGPT's model")
    for name, weight in weights.items():
        if weight.shape != shapes[name]:
            raise UserError(f"{name} is {tuple(weight.shape)}; model_args imply {shapes[name]}")
    head, embedding = weights["lm_head.weight"], weights["transformer.wte.weight"]
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights.values()}
    if sum(weight.nbytes for weight in weights.values()) - head.nbytes > sum(storages.values()):
        raise UserError("the weights share memory, as nanoGPT's do not")  # a small file, huge once copied
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise UserError("lm_head.weight must equal transformer.wte.weight: nanoGPT's are tied")


def _is_plain(weight: Any) -> bool:
    """Whether it is a tensor with values, one per element."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        and weight.layout is torch.strided
        and not (weight.is_nested or weight.is_meta)
    )


def _join(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(f"{name!r:.80}" for name in shown[:3]) + (f" and {len(shown) - 3} more" if shown[3:] else "")


def read_meta(path: Path) -> CharTokenizer:
    """The vocabulary that nanoGPT's prepare.py writes for characters; the pickle is parsed, never executed.

    Raises:
        MissingFileError: no such file.
        UserError: not such a vocabulary, or unreadable.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; nanoGPT's prepare.py writes meta.pkl beside train.bin")
    try:
        with open(path, "rb") as file:
            pickled = file.read(META_BYTES + 1)
        if len(pickled) > META_BYTES:
            raise ValueError(f"more than {META_BYTES:,} bytes")
        return _tokenizer(_parse(pickled))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # the last three: operations on wrong values
        reason = str(error) if isinstance(error, ValueError) else "a damaged pickle"
        raise UserError(
            f"{path} is not a character vocabulary as nanoGPT's prepare.py writes it: {reason:.300}"
        ) from None


def _parse(pickled: bytes) -> Any:
    """The value of a pickle of dicts, strings and ids, in any protocol. Any other opcode is a ValueError."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []
    for opcode, arg, _ in pickletools.genops(pickled):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(arg)
            case "INT" | "BININT" | "BININT1" | "BININT2" if 0 <= arg <= VOCABULARY:  # larger keys could all collide
                stack.append(arg)
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                marks.append(len(stack))
            case "DICT" | "SETITEM" | "SETITEMS":
                start = len(stack) - 2 if opcode.name == "SETITEM" else marks.pop()
                items = stack[start:]
                del stack[start:]
                if opcode.name == "DICT":
                    stack.append({})
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE" if arg in (None, len(memo)):
                memo.append(stack[-1])
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"{name} in its pickle; dicts, strings and ids are allowed")


def _tokenizer(meta: Any) -> CharTokenizer:
    """Raises ValueError: not the three keys of meta.pkl, or they contradict each other."""
    if not isinstance(meta, dict) or not {"vocab_size", "itos", "stoi"} <= meta.keys():
        raise ValueError("it must be a dict of vocab_size, itos and stoi")
    itos = meta["itos"]
    if not isinstance(itos, dict) or itos.keys() != set(range(len(itos))):
        raise ValueError("the keys of itos must be 0, 1, 2, ...")
    chars = [itos[i] for i in range(len(itos))]
    if not all(isinstance(char, str) and len(char) == 1 for char in chars):
        raise ValueError("the values of itos must be single characters")
    if meta["stoi"] != {char: i for i, char in enumerate(chars)}:
        raise ValueError("stoi must be the inverse of itos")
    if meta["vocab_size"] != len(chars):
        raise ValueError(f"vocab_size={reprlib.repr(meta['vocab_size'])}, but itos has {len(chars):,} characters")
    return CharTokenizer("".join(chars))
