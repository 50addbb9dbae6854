"""Damaged and malicious checkpoints: a model that works or one clean error. Nothing in a file is run, and it takes no
time or memory beyond what its size explains.

A judge in a process of its own (this file as a program) looks at each input, as what is looked for may end the process,
or never end.
"""

import contextlib
import copy
import faulthandler
import io
import json
import math
import os
import pickle
import random
import resource
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab import checkpoint, sources
from gptlab.errors import UserError

SEED, FEW, MANY = 5, 80, 12_000
SECONDS, MEGABYTES = 10, 100  # that judging one input may take, on top of what the process has
MARKER = "executed"  # a file that appears if code in a checkpoint is run
PARTS = ["config", "data", "tokenizer", "state_dict"]


class Evil:
    """Unpickled, it calls `function` with `argument`."""

    def __init__(self, function: Callable, argument: Any) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


EVILS = [Evil(os.system, f"touch {MARKER}"), Evil(eval, f"open({MARKER!r}, 'w')"), Evil(os.mkdir, MARKER)]
WAYS = ["pickle", "zip", "nested", "legacy"]


def evil_file(evil: Evil, way: str, valid: dict, content: bytes) -> bytes:
    pickled = pickle.dumps(evil, protocol=2)
    if way == "pickle":
        return pickled
    if way == "zip":
        return with_pickle(content, pickled)
    return saved({**valid, "config": {**valid["config"], "evil": evil}}, legacy=way == "legacy")


def saved(value: Any, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def repack(content: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with its files changed, their checksums right: what a damaged disk cannot do, but an attacker."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w", compression) as new:
        for part in old.infolist():
            new.writestr(part.filename, change(part.filename, old.read(part)))
    return result.getvalue()


def with_pickle(content: bytes, pickled: bytes) -> bytes:
    return repack(content, lambda name, data: pickled if name.endswith("data.pkl") else data)


def laughs() -> list:
    """A few hundred bytes in a file, whose str() has 2**35 parts."""
    value: list = ["ha"]
    for _ in range(35):
        value = [value, value]
    return value


def junk(rng: random.Random, depth: int = 2) -> Any:
    """Any value that a checkpoint may hold."""
    kind = rng.randrange(9)
    if kind == 0 and depth:
        return [junk(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 1 and depth:
        keys = rng.sample(["_target_", "type", "chars", "config", "model", "data", "", "a", 1, None], rng.randrange(4))
        return {key: junk(rng, depth - 1) for key in keys}
    if kind == 2:
        return tensor(rng)
    if kind == 3:
        return rng.choice([2**31, 2**63, 10**9, 10**30, 10**400, 3, 16, 100, -3, 1.5, 1e300, math.nan, math.inf, -0.0])
    if kind == 4:
        return rng.choice([laughs(), b"ab", {1, 2}, 1j, torch.float32, torch.Size([2]), (), EVILS[0].call[1]])
    if kind == 5:
        return rng.choice(["", "a", "char", "bpe", "${oc.env:HOME}", "gptlab.model.GPT", "os.system", "evil.Model", "..",
                           "\ud800.\0", "x" * 10**4])  # fmt: skip
    return rng.choice([None, True, False, 0, 1, -1, 2, 8])


def tensor(rng: random.Random) -> torch.Tensor:
    shape = rng.choice([(), (0,), (8,), (15, 8), (8, 8), (24, 8), (8, 32), (16, 8), (1, 1, 2)])
    whole = torch.full(shape, rng.choice([0.0, 0.02, 1.0, -3.0, math.nan, math.inf, -math.inf]))
    strange = [whole.to_sparse(), torch.empty(shape, device="meta"), whole.nan_to_num(0, 0, 0).to(torch.int8), whole.double(),
               whole.to(torch.complex64), torch.zeros(1, 1).expand(8, 8), torch.zeros(1, 1).expand(10**9, 8)]  # fmt: skip
    return rng.choice(strange) if rng.random() < 0.3 else whole


def near(rng: random.Random, value: Any) -> Any:
    """The value with a small change."""
    if isinstance(value, torch.Tensor) and value.numel() and value.is_contiguous() and not value.is_meta:
        changed = value.clone()
        changed.view(-1)[rng.randrange(value.numel())] = rng.choice([0, -1, 30, math.nan, math.inf])
        return rng.choice([changed, value[:-1] if value.dim() else value, value.T.contiguous() if value.dim() == 2 else value,
                           value.double(), value.to_sparse(), value.unsqueeze(0), value.flatten(), value * 3])  # fmt: skip
    if isinstance(value, (bool, int, float)):
        return rng.choice([not value, value + 1, value - 1, -value, value * 10**8, float(value), str(value), [value]])
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice([value[:at] + rng.choice("aZ\0é\ud800 ${}.") + value[at:], value[:at] + value[at + 1 :], value * 2,
                           value.upper(), value.encode(errors="replace"), [value], None])  # fmt: skip
    return copy.deepcopy(value) if rng.random() < 0.5 else junk(rng)


def change_values(rng: random.Random, valid: dict) -> dict:
    """One to three values changed, most of them where loading looks."""
    places = [["config", "model"]] * 3 + [["config", "data"], ["config"], ["tokenizer"], ["state_dict"], []]
    for _ in range(rng.choice([1, 1, 2, 3])):
        node: Any = valid
        for key in rng.choice(places):
            node = node[key] if isinstance(node, dict) and key in node else {}
        if not isinstance(node, dict) or not node:
            continue
        key, kind = rng.choice(list(node)), rng.randrange(8)
        if kind == 0:
            del node[key]
        elif kind == 1:
            node[rng.choice([str(key) + "x", "model.x", 3, None, (1, 2), "_target_"])] = node.pop(key)
        elif kind == 2:
            node[rng.choice(["extra", "model.extra", 7, "_target_"])] = junk(rng)
        else:
            node[key] = junk(rng) if kind == 3 else near(rng, node[key])
    return valid


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.choice([rng.randrange(len(content) + 1), rng.randrange(min(200, len(content)) + 1)])
        end = min(len(content), at + rng.choice([1, 1, 4, 100, 10**4]))
        part = content[at:end]
        new = [b"", bytes(len(part)), part * 2, b"\xff" * len(part), rng.randbytes(len(part)), rng.randbytes(8) + part]
        content = content[:at] + rng.choice(new) + content[end:]
    return content


def change_records(rng: random.Random, content: bytes) -> bytes:
    chosen = rng.choice(["data.pkl", "data.pkl", "data.pkl", "data/0", "version", "byteorder", ".storage_alignment"])
    compression = rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])
    return repack(content, lambda name, data: change_bytes(rng, data) if name.endswith(chosen) else data, compression)


def random_pickle(rng: random.Random) -> bytes:
    """Operations of a pickle in any order, with arguments that fit or do not."""
    names = ["collections\nOrderedDict", "collections\nCounter", "torch._utils\n_rebuild_tensor_v2", "torch\nFloatStorage",
             "torch\nTensor", "torch._utils\n_rebuild_parameter", "torch\nSize", "torch\ndevice", "builtins\nset", "os\nsystem",
             "_codecs\nencode", "torch.storage\n_load_from_bytes", "builtins\neval"]  # fmt: skip
    parts = [b"]", b"}", b")", b"(", b"N", b"\x88", b"0", b"a", b"e", b"s", b"u", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b", b"Q",
             b"\x81", b"K\x01", b"M\x01\x02", b"J\xff\xff\xff\xff", b"G" + bytes(8), b"q\x00", b"h\x00", b"h\x63", b"\x8a\x08" + b"\xff" * 8,
             b"X\x06\x00\x00\x00config", b"X\x07\x00\x00\x00storage", b"X\xff\xff\xff\x7fa", b"U\x02ab"]  # fmt: skip
    parts += [b"c" + name.encode() + b"\n" for name in names]
    return b"\x80" + rng.choice([b"\x02", b"\x02", b"\x04"]) + b"".join(rng.choices(parts, k=rng.randrange(30))) + b"."


def random_sizes(rng: random.Random, valid: dict) -> dict:
    sizes = {key: rng.choice([1, 2, 8, junk(rng)]) for key in valid["config"]["model"] if key != "_target_"}
    model = {"_target_": "gptlab.model.GPT", **sizes}
    return {**valid, "config": {"model": model, "data": {"block_size": rng.choice([8, junk(rng)])}}}


def generate(key: str, valid: dict, content: bytes) -> bytes:
    """The input of that key: the name of one in CASES, or a seed. Half of the seeds change a valid checkpoint a little."""
    valid, rng = copy.deepcopy(valid), random.Random(f"{SEED}/{key}")
    if key in CASES:
        result = CASES[key](valid)
        return result if isinstance(result, bytes) else saved(result)
    if int(key) % 2 == 0:
        kind = rng.randrange(6)
        if kind < 2:
            return (change_bytes, change_records)[kind](rng, content)
        return saved(change_values(rng, valid))
    starts = [b"", b"PK\x03\x04", b"\x80\x02", content[:30]]
    ways = [
        lambda: rng.choice(starts) + rng.randbytes(rng.choice([0, 3, 5000])),
        lambda: random_pickle(rng),
        lambda: with_pickle(content, random_pickle(rng)),
        lambda: saved(junk(rng)),
        lambda: saved({**valid, rng.choice(PARTS): junk(rng)}, legacy=rng.random() < 0.2),
        lambda: evil_file(rng.choice(EVILS), rng.choice(WAYS), valid, content),
        lambda: pickle.dumps({key: junk(rng) for key in valid}, protocol=rng.choice([0, 2, 4, 5])),
        lambda: saved(random_sizes(rng, valid)),
    ]
    return rng.choice(ways)()


def verdict(path: Path) -> str:
    """accepted, refused, or what was wrong: anything but one error of ours about this file, or a model that works."""
    outcome = ""
    for load in (lambda: checkpoint.read(path, mmap=True), lambda: use(path)):
        try:
            load()
            outcome = "accepted"
        except BaseException as error:
            text = str(error)
            ours = isinstance(error, UserError) and path.name in text and len(text) <= 2000
            if not ours or "allocate" in text or "MemoryError" in text:
                return f"{type(error).__name__}: {text[:300]}"
            outcome = "refused"
    return outcome


def use(path: Path) -> None:
    source = sources.load(str(path))
    model, tokenizer = source.model, source.tokenizer
    for length in (1, model.block_size):
        logits = model(torch.arange(length)[None] % tokenizer.vocab_size)[..., : tokenizer.vocab_size]
        assert logits.shape == (1, length, tokenizer.vocab_size) and torch.isfinite(logits).all()
    assert isinstance(tokenizer.decode(range(tokenizer.vocab_size)), str)
    assert max(tokenizer.encode(tokenizer.start)) < tokenizer.vocab_size


def judge_all(valid_path: str, keys: list[str]) -> None:
    """Print a verdict for each key, as JSON lines; too much time ends the process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    content, valid = Path(valid_path).read_bytes(), torch.load(valid_path, weights_only=True)
    use(Path(valid_path))  # all that is imported on the way
    path = Path("judged.ckpt")
    for key in keys:
        path.write_bytes(generate(key, valid, content))
        with limits():
            result = verdict(path)
        print(json.dumps([key, result]), flush=True)


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """MEGABYTES more than there are: an error, which `verdict` sees. After SECONDS the process ends."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEGABYTES * 2**20, resource.RLIM_INFINITY))
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def judge(valid: Path, keys: list[str], folder: Path) -> dict[str, str]:
    """The verdict for each key. A process that ended at one of them is followed by another for the rest."""
    verdicts: dict[str, str] = {}
    while rest := keys[len(verdicts) :]:
        command = [sys.executable, __file__, str(valid), *rest]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        verdicts |= dict(json.loads(line) for line in done.stdout.splitlines())
        if len(verdicts) < len(keys):
            verdicts[keys[len(verdicts)]] = f"ended with status {done.returncode}: {done.stderr[-1500:]}"
    return verdicts


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    """What loading looks at of a tiny model's checkpoint."""
    from gptlab.model import GPT
    from gptlab.tokenizer import CharTokenizer

    tokenizer = CharTokenizer(" ,.abehinoqrstu")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "dropout": 0.0, "bias": False, "gelu": "erf", "vocab_multiple": 1}
    model = GPT(vocab_size=tokenizer.vocab_size, block_size=8, **sizes)
    path = tmp_path_factory.mktemp("valid") / "valid.ckpt"
    config = {"model": {"_target_": checkpoint.GPT_TARGET, **sizes, "compile": False}, "data": {"block_size": 8}}
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    record = {"config": config, "tokenizer": tokenizer.state(), "data": {"name": "text"}, "global_step": 2}
    path.write_bytes(saved({"state_dict": weights, **record}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where checkpoints are judged; importing `evil` there leaves a trace."""
    place = tmp_path_factory.mktemp("judged")
    (place / "evil.py").write_text(f"open({MARKER!r}, 'w')")
    return place


@pytest.fixture(scope="module")
def few(valid, folder) -> dict[str, str]:
    """The verdicts on what a process of its own would cost too much for."""
    return judge(valid, [*CASES, *map(str, range(FEW))], folder)


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_checkpoints(valid, folder, few, count):
    """Half of them small changes of a valid one. Some of those are accepted: else nothing says that models still work."""
    verdicts = {seed: few[seed] for seed in map(str, range(FEW))}
    verdicts |= judge(valid, [str(seed) for seed in range(FEW, count)], folder)
    wrong = {seed: text for seed, text in verdicts.items() if text not in ("accepted", "refused")}
    accepted, refused = (list(verdicts.values()).count(text) for text in ("accepted", "refused"))
    print(f"{accepted} accepted, {refused} refused, {len(wrong)} wrong")
    assert not wrong, "\n".join(f"seed {seed}: {text}" for seed, text in wrong.items())
    assert not (folder / MARKER).exists(), "code in a checkpoint was run"
    assert accepted > count / 20 and refused > count / 2


def changed(*path: str, to: Any) -> Callable[[dict], dict]:
    """A case: the value at this place of a valid checkpoint is another."""

    def change(valid: dict) -> dict:
        node = valid
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = to
        return valid

    return change


def rotary(valid: dict, position: str, block_size: int) -> dict:
    """Positions without weights of their own, which would show how many there are."""
    del valid["state_dict"]["model.transformer.wpe.weight"]
    valid["config"]["data"]["block_size"], valid["config"]["model"]["position"] = block_size, position
    return valid


def bomb(name: str) -> Callable[[dict], bytes]:
    """One of the archive's files has 150 MB of zeros, in less than a MB."""
    grown = lambda part, data: data + bytes(150 * 2**20) if part.endswith(name) else data  # noqa: E731
    return lambda valid: repack(saved(valid), grown, zipfile.ZIP_DEFLATED)


def with_operations(operations: bytes) -> Callable[[dict], bytes]:
    return lambda valid: with_pickle(saved(valid), b"\x80\x02" + operations + b".")


# What was found, or had to be: each must be refused.
CASES: dict[str, Callable[[dict], Any]] = {
    "a tensor instead of the whole": lambda valid: torch.zeros(3),
    "a pickle cut within a number": with_operations(b"G\0"),
    "a pickle with a storage that is none": with_operations(b"K\x01Q"),
    "a pickle 100,000 lists deep": with_operations(b"]" * 10**5 + b"a" * (10**5 - 1)),
    "a weight that has no name": changed("state_dict", 3, to=torch.zeros(3)),
    "half a head": changed("config", "model", "n_head", to=2.0),
    "a class of a billion laughs": changed("config", "model", "_target_", to=laughs()),
    "a key of a billion laughs": changed("config", "model", "extra", to=laughs()),
    "a tokenizer of a billion laughs": changed("tokenizer", "type", to=laughs()),
    "a class within the model": changed("config", "model", "extra", to={"_target_": "evil.Model"}),
    "a billion layers": changed("config", "model", "n_layer", to=10**9),
    "a hundred million positions": changed("config", "data", "block_size", to=10**8),
    "a billion rotary positions": lambda valid: rotary(valid, "rotary", 10**9),
    "positions of an unknown kind": lambda valid: rotary(valid, "x", 10**8),
    "rotary positions of half a pair": lambda valid: changed("config", "model", "n_head", to=8)(rotary(valid, "rotary", 8)),
    "a vocabulary padded to a hundred million": changed("config", "model", "vocab_multiple", to=10**8),
    "a hundred thousand channels": changed("config", "model", "n_embd", to=10**5),
    "positions that share one number": lambda valid: changed("config", "data", "block_size", to=10**8)(
        changed("state_dict", "model.transformer.wpe.weight", to=torch.zeros(1, 1).expand(10**8, 8))(valid)
    ),
    "weights near the largest number": changed("state_dict", "model.transformer.ln_f.weight", to=torch.full((8,), 3e38)),
    "a bomb in the pickle": bomb("data.pkl"),
    "a bomb in a file that is not read": bomb("serialization_id"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_malicious_checkpoints(few, name):
    assert few[name] == "refused"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("evil", EVILS, ids=lambda evil: evil.call[0].__name__)
def test_code_in_a_checkpoint_is_not_run(valid, tmp_path, monkeypatch, evil, way):
    """The same file, read by a reader that trusts it, does run the code: the file is what it should be."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.ckpt"
    path.write_bytes(evil_file(evil, way, torch.load(valid, weights_only=True), valid.read_bytes()))
    for mmap in (False, True):
        reason = "in the format of torch < 1.6" if way == "legacy" else "damaged, or not a checkpoint of gptlab"
        with pytest.raises(UserError, match=f"evil.ckpt is {reason}"):
            checkpoint.read(path, mmap=mmap)
    assert not Path(MARKER).exists()
    pickle.loads(path.read_bytes()) if way == "pickle" else torch.load(path, weights_only=False)
    assert Path(MARKER).exists()


@pytest.mark.parametrize("place", ["model", "tokenizer"])
@pytest.mark.parametrize("target", ["evil.Model", "os.system", "gptlab.model.math.sqrt"])
def test_a_class_in_a_checkpoint_is_not_run(valid, tmp_path, monkeypatch, place, target):
    """Neither called nor imported; with trust it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    (tmp_path / "evil.py").write_text(f"open({MARKER!r}, 'w')")
    whole = torch.load(valid, weights_only=True)
    node = {"_target_": target, **({"command": f"touch {MARKER}"} if target == "os.system" else {})}
    (whole["config"] if place == "model" else whole)[place] = node
    torch.save(whole, "evil.ckpt")
    with pytest.raises(UserError, match=f"evil.ckpt needs {target}, which gptlab does not define.*trust=true"):
        sources.load("evil.ckpt")
    assert not Path(MARKER).exists()
    with pytest.raises((ValueError, AttributeError)):
        assert sources.load("evil.ckpt", trust=True).model
    assert Path(MARKER).exists() == (target == "evil.Model" or (place, target) == ("tokenizer", "os.system"))


if __name__ == "__main__":
    judge_all(sys.argv[1], sys.argv[2:])
