"""Where weights come from, by one name:

    a run folder, a checkpoint of gptlab's, latest    checkpoint.py
    nanoGPT's ckpt.pt                                 nanogpt.py                        -> Source: model, tokenizer, config
    a folder in Hugging Face's format                 pretrained.py, tokenizer_json.py
    gpt2, gpt2-medium, gpt2-large, gpt2-xl            the same, downloaded from the hub

All files are untrusted.
"""

import contextlib
import difflib
import functools
import hashlib
import json
import math
import os
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gptlab import checkpoint, nanogpt, pretrained, tokenizer_json
from gptlab.config import with_added
from gptlab.data.files import TIMEOUT, load_gpt2_tokenizer
from gptlab.errors import MissingFileError, UserError
from gptlab.run import Run, find_checkpoint

LARGEST_WEIGHT = 1e6  # real ones are below 1e3; a product of larger ones may overflow
LARGEST_JSON = 1 << 26  # bytes; GPT-2's tokenizer.json has 1.4 MB
# What weights leave to the user.
OWN = ("dropout", "ngram_dropout", "vocab_multiple", "activation_checkpointing", "compile")
NO_GPT2 = "give its vocabulary as tokenizer.json"


@dataclass(frozen=True)
class Source:
    """A model's weights and what belongs to them. `config` is that of the run, or as much of one as is known."""

    name: str
    config: dict[str, Any]
    tokenizer: Any
    weights: dict[str, Tensor]

    @functools.cached_property
    def model(self) -> nn.Module:
        """In eval mode, on the CPU. Raises UserError if its weights are damaged."""
        block_size = self.config["data"]["block_size"]
        with self._faults_named():
            model = checkpoint.build_model(self.config["model"], self.tokenizer.vocab_size, block_size)
        self.copy_to(model)
        return model.eval()

    def copy_to(self, model: nn.Module) -> None:
        """Load the weights into a model, which may have a shorter context and a padded vocabulary. Raises UserError."""
        with self._faults_named():
            model.load_state_dict(self.weights) if self._is_custom else pretrained.copy_weights(self.weights, model)
        limit = math.inf if self._is_custom else LARGEST_WEIGHT
        if not all((parameter.abs() < limit).all() for parameter in model.parameters()):
            raise UserError(
                f"{self.name}: its weights are not finite, or huge: the run diverged; try an earlier checkpoint"
            )

    @property
    def _is_custom(self) -> bool:
        return self.config["model"]["_target_"] != checkpoint.GPT_TARGET

    @contextlib.contextmanager
    def _faults_named(self) -> Iterator[None]:
        """Exceptions become a UserError about the file, but for those of a custom class."""
        try:
            yield
        except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
            if self._is_custom and "state_dict" not in str(error):
                raise
            fix = f"; a custom model cannot be cropped: use data.block_size={self.config['data']['block_size']}"
            raise UserError(f"{self.name}: {error!s:.500}{fix * self._is_custom}") from None


def load(name: str, *, meta: str | None = None, trust: bool = False) -> Source:
    """The weights `name`, checked.

    Args:
        meta: nanoGPT's meta.pkl; by default the one beside the checkpoint.
        trust: allows custom models and tokenizers, which is running their code.

    Raises:
        UserError: not there, damaged, or not what gptlab can express.
    """
    if name in pretrained.GPT2 or _hf_folder(name) is not None:
        _refuse_meta(meta, name)
        return _load_folder(name, download(name) if name in pretrained.GPT2 else _hf_folder(name))
    path = find_file(name)
    content = checkpoint.read_file(path)
    if nanogpt.is_nanogpt(content):
        return _load_nanogpt(path, content, meta)
    _refuse_meta(meta, name)
    return Source(str(path), *checkpoint.unpack(path, checkpoint.checked(path, content), trust=trust))


def architecture(name: str, meta: str | None = None) -> tuple[dict[str, Any], int]:
    """The node `model` that the weights decide, and their block_size, from as little of the files as possible. Raises
    UserError, also for a `meta` that they do not need."""
    if name in pretrained.GPT2:
        _refuse_meta(meta, name)
        return gpt(pretrained.GPT2[name]), pretrained.GPT2_BLOCK_SIZE
    if (folder := _hf_folder(name)) is not None:
        _refuse_meta(meta, name)
        model, _, block_size = _readable(folder, lambda: pretrained.hf_architecture(_read_json(folder / "config.json")))
        return gpt(model), block_size
    path = find_file(name)
    content = checkpoint.read_file(path, mmap=True)
    if nanogpt.is_nanogpt(content):
        weights = _readable(path, lambda: nanogpt.from_checkpoint(content))
        return gpt(weights.model), weights.block_size
    _refuse_meta(meta, name)
    config = checkpoint.checked(path, content)["config"]
    model = {key: value for key, value in config["model"].items() if key not in OWN}
    if "_target_" not in model or not all(isinstance(key, str) for key in model):
        raise checkpoint.DamagedError(path, ValueError("it does not say which model it is"))
    return gpt(model) if model["_target_"] == checkpoint.GPT_TARGET else model, config["data"].get("block_size")


def gpt(model: dict[str, Any]) -> dict[str, Any]:
    """The node of a GPT that weights decide, with the keys that they, or an older gptlab, do not know of."""
    added = with_added({"model": {"_target_": checkpoint.GPT_TARGET, **model}})["model"]
    return {key: value for key, value in added.items() if key not in OWN}


def _refuse_meta(meta: str | None, name: str) -> None:
    if meta:
        raise UserError(
            f"meta={meta}: describes the tokens of nanoGPT's checkpoint, and {name} is none; leave meta out (a meta.pkl "
            "beside ckpt.pt needs no key)"
        )


def run_config(name: str) -> dict[str, Any] | None:
    """The config of the run that a checkpoint of gptlab's is from, with the paths that only a run folder knows; None for
    other weights. Raises UserError."""
    if name in pretrained.GPT2 or _hf_folder(name) is not None:
        return None
    path = find_file(name)
    content = checkpoint.read_file(path, mmap=True)
    if nanogpt.is_nanogpt(content):
        return None
    run, config = Run(path.parent.parent), checkpoint.checked(path, content)["config"]
    if path.parent.name == "checkpoints" and (run.folder / "config.yaml").is_file():
        config = run.read_config()
        if not isinstance(config.get("data"), dict):
            raise UserError(
                f"{run.folder / 'config.yaml'} is damaged: data must be a mapping; restore it, or move it away"
            )
    return config


def locate(name: str) -> str:
    """The name from any working directory."""
    return name if name in pretrained.GPT2 else os.path.abspath(os.path.expanduser(name))


def _hf_folder(name: str) -> Path | None:
    folder = Path(os.path.expanduser(name))
    return folder if os.path.isfile(folder / "config.json") else None


def find_file(name: str) -> Path:
    """The checkpoint `name`; raises MissingFileError, which says what else might be meant."""
    path = Path(os.path.expanduser(name))
    if path.name in ("model.safetensors", "config.json", "tokenizer.json") and os.path.isfile(path):
        raise UserError(f"{name} is one file of a model in Hugging Face's format; give its folder: {path.parent}")
    try:
        return find_checkpoint(name)
    except MissingFileError as error:
        if os.path.isfile(path / "ckpt.pt"):
            raise MissingFileError(
                f"{name} is not a run folder; for nanoGPT's checkpoint give {path / 'ckpt.pt'}"
            ) from None
        if name == "latest" or os.path.isfile(path / "config.yaml"):
            raise
        near = difflib.get_close_matches(path.name, pretrained.GPT2, 1)
        known = (
            f"did you mean {near[0]}?"
            if near
            else f"pretrained: {', '.join(pretrained.GPT2)}, or a folder with config.json"
        )
        raise MissingFileError(f"{error}; {known}") from None


def _readable(path: Path, read: Any) -> Any:
    """What `read` returns; its ValueError becomes a UserError about the file."""
    try:
        return read()
    except ValueError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _load_nanogpt(path: Path, content: dict[str, Any], meta: str | None) -> Source:
    weights = _readable(path, lambda: nanogpt.from_checkpoint(content))
    file = Path(os.path.expanduser(meta)) if meta else path.parent / "meta.pkl"
    if meta and not os.path.isfile(file):
        raise MissingFileError(f"meta={meta}: No such file")
    if os.path.isfile(file):
        tokenizer = nanogpt.read_meta(file)
        if tokenizer.vocab_size != weights.vocab_size:
            raise UserError(
                f"{file} has {tokenizer.vocab_size} tokens, {path} has {weights.vocab_size}; give its own meta=FILE"
            )
    elif weights.vocab_size in (pretrained.GPT2_VOCAB_SIZE, 50304):  # nanoGPT pads GPT-2's to a multiple of 64
        tokenizer = load_gpt2_tokenizer("nanoGPT's meta.pkl with meta=FILE")
    else:
        raise UserError(
            f"{path} has {weights.vocab_size} tokens and no meta.pkl beside it, which says what they are; give the one in "
            "nanoGPT's data folder: meta=FILE"
        )
    return _source(str(path), weights, tokenizer)


def _load_folder(name: str, folder: Path) -> Source:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if os.path.isfile(index):
        weight_map = _read_json(index).get("weight_map")
        names = [*weight_map.values()] if isinstance(weight_map, dict) else [None]
        if not all(isinstance(file, str) and re.fullmatch(r"[\w.-]+\.safetensors", file) for file in names):
            raise UserError(f"{index} must name files of this folder")
    tensors: dict[str, Tensor] = {}
    for file in sorted({*names}):
        if not os.path.isfile(folder / file):
            convert = "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            raise MissingFileError(
                f"{folder} has no {file}; gptlab reads safetensors only: transformers' {convert} writes them"
            )
        try:
            tensors |= load_file(folder / file)  # mapped into memory
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder / file} is damaged, or no safetensors file ({error})") from None
    weights = _readable(folder, lambda: pretrained.from_hf(_read_json(folder / "config.json"), tensors))
    tokenizer = _folder_tokenizer(name, folder, weights.vocab_size)
    if tokenizer.vocab_size > weights.vocab_size:
        raise UserError(f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, the model {weights.vocab_size}")
    return _source(str(name), weights, tokenizer)


def _folder_tokenizer(name: str, folder: Path, vocab_size: int) -> Any:
    """That of tokenizer.json if gptlab can express it; GPT-2's if the folder's vocabulary is GPT-2's, or it has none and
    there are 50,257 tokens. Raises UserError."""
    file, older = folder / "tokenizer.json", folder / "vocab.json"
    if name in pretrained.GPT2:
        return load_gpt2_tokenizer(NO_GPT2)
    given = None
    if os.path.isfile(file):
        value = _read_json(file)
        try:
            return tokenizer_json.from_json(value)
        except UserError as error:
            unknown = UserError(f"{file}: {error}")
            given = (value["model"].get("vocab") if isinstance(value.get("model"), dict) else None) or {}
    elif os.path.isfile(older):
        unknown = UserError(
            f"{older} alone is read if it is GPT-2's; save a tokenizer.json with transformers' AutoTokenizer"
        )
        given = _read_json(older)
    elif vocab_size != pretrained.GPT2_VOCAB_SIZE:
        raise MissingFileError(f"{file}: No such file; it says what the {vocab_size:,} tokens are")
    if given is not None and vocab_size != pretrained.GPT2_VOCAB_SIZE:
        raise unknown
    tokenizer = load_gpt2_tokenizer(NO_GPT2)
    if given is not None and given != tokenizer_json.to_json(tokenizer)["model"]["vocab"]:
        raise unknown
    return tokenizer


def _source(name: str, weights: pretrained.Pretrained, tokenizer: Any) -> Source:
    model = {"_target_": checkpoint.GPT_TARGET, **weights.model}
    return Source(name, {"model": model, "data": {"block_size": weights.block_size}}, tokenizer, weights.weights)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError("too large")
        value = json.loads(file.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not a mapping")
        return value
    except FileNotFoundError:
        raise MissingFileError(f"{file}: No such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error!s:.200})") from None


def download(name: str) -> Path:
    """The folder of OpenAI's weights `name`, from the hub unless they are in its cache.

    Raises:
        MissingFileError: they are in neither.
        UserError: a file in the cache is damaged.
    """
    from huggingface_hub import constants, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, files = f"openai-community/{name}", ("config.json", "model.safetensors")
    try:
        try:
            cached = [hf_hub_download(repository, file, local_files_only=True) for file in files]
            return Path(cached[0]).parent
        except LocalEntryNotFoundError:
            if not constants.HF_HUB_OFFLINE:  # without a network this fails at once; the library would try for a minute
                urllib.request.urlopen(hf_hub_url(repository, files[0]), timeout=TIMEOUT).close()
            paths = [Path(hf_hub_download(repository, file)) for file in files]
    except Exception as error:  # of the library's many kinds, all mean that there are no such files
        reason = str(error).strip().partition("\n")[0][:200]
        raise MissingFileError(
            f"{name} is not in Hugging Face's cache and cannot be downloaded ({type(error).__name__}: {reason}); put its "
            "config.json and model.safetensors into a folder: init_from=FOLDER"
        ) from None
    for path in paths:
        expected = path.resolve().name  # in the cache, large files are named by their SHA-256
        sha256 = hashlib.sha256()
        with open(path, "rb") as content:
            while chunk := content.read(1 << 20):
                sha256.update(chunk)
        if re.fullmatch("[0-9a-f]{64}", expected) and sha256.hexdigest() != expected:
            path.resolve().unlink()
            raise UserError(f"{name}: the download of {path.name} was damaged; run the command again")
    return paths[0].parent
