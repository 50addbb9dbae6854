"""Hugging Face's tokenizer.json <-> a tokenizer.

to_json      characters, byte-level BPE -> what transformers loads
from_json    untrusted: it must be what `to_json` writes for its vocabulary, but for parts that change no ids
"""

import math
import reprlib
from typing import Any

from gptlab.errors import UserError
from gptlab.tokenizer import BPETokenizer, CharTokenizer, _byte_of_character

BYTE_OF = _byte_of_character()
CHARACTER_OF = {byte: char for char, byte in BYTE_OF.items()}
LONGEST_TOKEN = 1024  # bytes, in a file (GPT-2's has 128): `find_merges` takes cubic time
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def to_json(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer.json that gives the same ids, and raises for an unknown character, too. One string is different:
    `<|endoftext|>` is plain text to `BPETokenizer`, the end of a text to Hugging Face (without split_special_tokens=True).

    Raises:
        UserError: a custom tokenizer, or a BPE vocabulary that merging pairs does not yield.
    """
    if type(tokenizer) is CharTokenizer:
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        vocab = {char: i for i, char in enumerate(tokenizer.chars)}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}  # not one of them: it raises
        return _file(split, {"type": "Fuse"}, model)
    if type(tokenizer) is not BPETokenizer:
        raise UserError(f"{type(tokenizer).__name__} is a custom tokenizer; a tokenizer.json holds characters or a BPE")
    end = BPETokenizer.END_OF_TEXT
    names = ["".join(CHARACTER_OF[byte] for byte in token) for token in tokenizer.tokens]
    if end in names:
        raise UserError(f"{end} is a token of text in this vocabulary; in a tokenizer.json it ends a text")
    vocab = {name: i for i, name in enumerate([*names, end])}
    merges = [[names[left], names[right]] for left, right in find_merges(tokenizer.tokens)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = {"id": tokenizer.end_of_text, "content": end, **flags, "special": True}
    return _file(BYTE_LEVEL, BYTE_LEVEL, {"type": "BPE", "vocab": vocab, "merges": merges}, special)


def from_json(value: Any) -> CharTokenizer | BPETokenizer:
    """The tokenizer that gives the same ids, of a file of `to_json` or of GPT-2's own.

    Raises:
        UserError: another kind of tokenizer, or damaged.
    """
    try:
        tokenizer = _from_vocabulary(value["model"].get("type", "BPE"), value["model"]["vocab"])
        given, expected = _essence(value), _essence(to_json(tokenizer))
    except UserError as error:
        raise UserError(f"tokenizer.json: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"tokenizer.json: of another kind, or damaged ({type(error).__name__}: {error!s:.80})"
        ) from None
    if others := sorted(key for key in given.keys() | expected.keys() if given.get(key) != expected.get(key)):
        raise UserError(
            f"tokenizer.json: {', '.join(others):.200} must be as for characters, or as in GPT-2 with its vocabulary"
        )
    return tokenizer


def find_merges(tokens: list[bytes]) -> list[tuple[int, int]]:
    """The two tokens that each one of several bytes is merged from, (id, id) in the order of the merged ids. It is the one
    pair that byte-pair encoding arrives at by merging the lowest ids first, in any text.

    Raises:
        UserError: a token that is not two earlier ones.
    """
    known = {token: i for i, token in enumerate(tokens) if len(token) == 1}
    merges: dict[tuple[int, int], int] = {}
    parts: dict[int, tuple[int, int]] = {}  # the inverse of `merges`
    for i, token in enumerate(tokens):
        if len(token) > 1:
            cuts = (at for at in range(1, len(token)) if token[:at] in known and token[at:] in known)
            pairs = ((known[token[:at]], known[token[at:]]) for at in cuts)
            if (pair := next((pair for pair in pairs if _stay_apart(*pair, merges, parts)), None)) is None:
                raise UserError(
                    f"token {i}, {token!r:.100}, is not two earlier tokens: no BPE learns such a vocabulary"
                )
            known[token], merges[pair], parts[i] = i, i, pair
    return list(merges)


def _stay_apart(left: int, right: int, merges: dict[tuple[int, int], int], parts: dict[int, tuple[int, int]]) -> bool:
    """Whether byte-pair encoding arrives at these two neighbors. Their merges are undone, the latest first (of equal ones,
    the right one): none across the border may have come before."""
    limit = math.inf
    while merges.get((left, right), limit) >= limit:
        last = max(left if left in parts else -1, right if right in parts else -1)
        if last == -1:  # two bytes
            return True
        if last == right:
            limit, right = last + 1, parts[right][0]
        else:
            limit, left = last, parts[left][1]
    return False


def _from_vocabulary(kind: str, vocab: dict[str, int]) -> CharTokenizer | BPETokenizer:
    tokens = sorted(vocab, key=vocab.get)
    if [vocab[token] for token in tokens] != [*range(len(tokens))]:
        raise UserError(f"the ids of its {len(tokens)} tokens must be 0 to {len(tokens) - 1}, each once")
    if kind == "WordLevel":
        return CharTokenizer("".join(tokens))
    if kind != "BPE":
        raise UserError(f"model.type={reprlib.repr(kind)} must be WordLevel (of characters) or BPE (as in GPT-2)")
    if max(map(len, tokens), default=0) > LONGEST_TOKEN:
        raise UserError(f"no token may have more than {LONGEST_TOKEN} bytes")
    return BPETokenizer([bytes(BYTE_OF[char] for char in token) for token in tokens[:-1]])


def _file(pre_tokenizer: dict, decoder: dict, model: dict, *added_tokens: dict) -> dict[str, Any]:
    unused = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    parts = {"pre_tokenizer": pre_tokenizer, "decoder": decoder, "model": model}
    return {"version": "1.0", **unused, "added_tokens": [*added_tokens], **parts}


def _essence(value: dict[str, Any]) -> dict[str, Any]:
    """The parts that decide ids and text, in one spelling; not what moves positions, or says that it is not there."""
    parts = {key: part for key, part in value.items() if key not in ("version", "truncation", "padding", "model")}
    match parts.get("pre_tokenizer"):
        case {"type": "ByteLevel", "add_prefix_space": False, **rest} if rest.get("use_regex", True):
            parts["pre_tokenizer"] = "ByteLevel"
    match parts.get("decoder"):
        case {"type": "ByteLevel"}:
            parts["decoder"] = "ByteLevel"
    match parts.get("post_processor"):  # transformers writes the second: a template without special tokens
        case {"type": "ByteLevel"} | {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}:
            del parts["post_processor"]
    # Without a normalizer, which is one of the parts, no token is normalized.
    parts["added_tokens"] = [{**token, "normalized": False} for token in value["added_tokens"]]
    parts |= {f"model.{key}": part for key, part in {"type": "BPE", **value["model"]}.items()}
    if isinstance(merges := parts.get("model.merges"), list):  # older files have "a b" for ["a", "b"]
        parts["model.merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return {key: part for key, part in parts.items() if part}
