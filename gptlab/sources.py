"""Where weights come from, by one name:

    a run folder, a checkpoint of gptlab's, latest    checkpoint.py
    nanoGPT's ckpt.pt                                 nanogpt.py                        -> Source: model, tokenizer, config
    a folder in Hugging Face's format                 pretrained.py, tokenizer_json.py
    gpt2, gpt2-medium, gpt2-large, gpt2-xl            the same, downloaded from the hub

All files are untrusted.
"""

import contextlib
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
from gptlab.data.files import TIMEOUT, load_gpt2_tokenizer
from gptlab.errors import MissingFileError, UserError
from gptlab.run import Run, find_checkpoint

LARGEST_WEIGHT = 1e6  # real ones are below 1e3; a product of larger ones may overflow
LARGEST_JSON = 1 << 26  # bytes; GPT-2's tokenizer.json has 1.4 MB
OWN = ("dropout", "vocab_multiple", "activation_checkpointing", "compile")  # what weights leave to the user
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
            if self._is_custom:
                raise
            raise UserError(f"{self.name}: {error!s:.500}") from None


def choose(ckpt: str | None, init_from: str | None) -> str:
    """The one of them that is given; raises UserError unless exactly one is."""
    if (ckpt is None) == (init_from is None):
        fault = "is missing" if ckpt is None else "and init_from exclude each other"
        raise UserError(
            f"ckpt {fault}; give a run folder, a checkpoint file, or latest: ckpt=outputs/NAME/DATE; or pretrained "
            f"weights: init_from={'|'.join(pretrained.GPT2)}|FOLDER"
        )
    return ckpt or init_from


def load(name: str, *, meta: str | None = None, trust: bool = False) -> Source:
    """The weights `name`, checked.

    Args:
        meta: nanoGPT's meta.pkl; by default the one beside the checkpoint.
        trust: allows custom models and tokenizers, which is running their code.

    Raises:
        UserError: not there, damaged, or not what gptlab can express.
    """
    if meta and (name in pretrained.GPT2 or _hf_folder(name)):
        raise UserError(f"meta={meta}: describes the tokens of nanoGPT's checkpoint, and {name} is none")
    if name in pretrained.GPT2:
        return _load_folder(name, download(name))
    if (folder := _hf_folder(name)) is not None:
        return _load_folder(name, folder)
    path = find_file(name)
    content = checkpoint.read_file(path)
    if nanogpt.is_nanogpt(content):
        return _load_nanogpt(path, content, meta)
    if meta:
        raise UserError(f"meta={meta}: describes the tokens of nanoGPT's checkpoint, and {path} is none")
    return Source(str(path), *checkpoint.unpack(path, checkpoint.checked(path, content), trust=trust))


def architecture(name: str) -> tuple[dict[str, Any], int]:
    """The node `model` that the weights decide, and their block_size, from as little of the files as possible. Raises
    UserError."""
    if name in pretrained.GPT2:
        return {"_target_": checkpoint.GPT_TARGET, **pretrained.GPT2[name]}, pretrained.GPT2_BLOCK_SIZE
    if (folder := _hf_folder(name)) is not None:
        model, _, block_size = _readable(folder, lambda: pretrained.hf_architecture(_read_json(folder / "config.json")))
        return {"_target_": checkpoint.GPT_TARGET, **model}, block_size
    path = find_file(name)
    content = checkpoint.read_file(path, mmap=True)
    if nanogpt.is_nanogpt(content):
        weights = _readable(path, lambda: nanogpt.from_checkpoint(content))
        return {"_target_": checkpoint.GPT_TARGET, **weights.model}, weights.block_size
    config = checkpoint.checked(path, content)["config"]
    return {key: value for key, value in config["model"].items() if key not in OWN}, config["data"].get("block_size")


def run_config(name: str) -> dict[str, Any] | None:
    """The config of the run that a checkpoint of gptlab's is from, with the paths that only a run folder knows; None for
    other weights. Raises UserError."""
    if name in pretrained.GPT2 or _hf_folder(name) is not None:
        return None
    path = find_file(name)
    content = checkpoint.read_file(path, mmap=True)
    if nanogpt.is_nanogpt(content):
        return None
    run = Run(path.parent.parent)
    return run.read_config() if (run.folder / "config.yaml").is_file() else checkpoint.checked(path, content)["config"]


def locate(name: str) -> str:
    """The name from any working directory."""
    return name if name in pretrained.GPT2 else os.path.abspath(os.path.expanduser(name))


def _hf_folder(name: str) -> Path | None:
    folder = Path(os.path.expanduser(name))
    return folder if os.path.isfile(folder / "config.json") else None


def find_file(name: str) -> Path:
    try:
        return find_checkpoint(name)
    except MissingFileError as error:
        if os.path.exists(os.path.expanduser(name)) or name == "latest":
            raise
        raise MissingFileError(
            f"{error}; pretrained weights: {', '.join(pretrained.GPT2)}, or a folder with config.json"
        ) from None


def _readable(path: Path, read: Any) -> Any:
    """What `read` returns; its ValueError becomes a UserError about the file."""
    try:
        return read()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


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
    """That of tokenizer.json if gptlab can express it, else GPT-2's if the vocabulary has its size."""
    file = folder / "tokenizer.json"
    has_gpt2_size = vocab_size == pretrained.GPT2_VOCAB_SIZE
    try:
        if name in pretrained.GPT2 or (has_gpt2_size and not os.path.isfile(file)):
            return load_gpt2_tokenizer(NO_GPT2)
        return tokenizer_json.from_json(_read_json(file))
    except MissingFileError:
        raise
    except UserError as error:
        if has_gpt2_size:
            return load_gpt2_tokenizer(NO_GPT2)
        raise UserError(f"{file}: {error}") from None


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
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, files = f"openai-community/{name}", ("config.json", "model.safetensors")
    try:
        try:
            paths = [Path(hf_hub_download(repository, file, local_files_only=True)) for file in files]
        except LocalEntryNotFoundError:
            # Offline, this fails at once; the library would try again for a minute.
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
        if re.fullmatch("[0-9a-f]{64}", expected):
            sha256 = hashlib.sha256()
            with open(path, "rb") as content:
                while chunk := content.read(1 << 20):
                    sha256.update(chunk)
            if sha256.hexdigest() != expected:
                raise UserError(f"{path} is damaged; remove {path.resolve()}, and it is downloaded again")
    return paths[0].parent
