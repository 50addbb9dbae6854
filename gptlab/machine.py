"""What `trainer.linear=auto` means on this machine, measured once. Imports torch only to measure."""

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gptlab.data.files import data_folder
from gptlab.run import write_json

CPUINFO = Path("/proc/cpuinfo")
CHOICES = ("torch", "onednn")
SHAPES = ((768, 128, 512), (256, 384, 1536))  # rows, inputs, outputs: layers of the Shakespeare models
TRIES, MARGIN = 3, 1.15  # oneDNN must be so much faster: its answer changes a run's bits


def linear_matters(cfg: Any) -> bool:
    """Whether the linear layers of a run, config.Train, can be oneDNN's. Several processes might measure different answers."""
    t = cfg.trainer
    alone, in_float32 = t.devices * t.num_nodes == 1, t.precision == "32"
    if t.precision == "auto":
        in_float32 = not {"avx512_bf16", "amx_tile"} & {*cpu_info().get("flags", "").split()}  # as linear.fast_bf16
    return alone and in_float32 and t.accelerator == "cpu" and not cfg.model.get("compile")


def fastest_linear() -> str:
    """The faster one of CHOICES in float32, forward and backward. Measured (0.3 s) once per CPU model and version of torch, and
    kept in gptlab's folder for downloads."""
    file, key, known = data_folder(None) / "linear.json", f"{cpu_model()}, torch {version('torch')}", {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_text("utf-8"))
        known = content if isinstance(content, dict) else {}
    if known.get(key) not in CHOICES:
        known[key] = measure_linear()
        with contextlib.suppress(OSError):  # a read-only home: measured again next time
            write_json(file, known)
    return known[key]


def cpu_info() -> dict[str, str]:
    """What Linux says about the first CPU."""
    lines = []
    with contextlib.suppress(OSError):
        lines = CPUINFO.read_text("utf-8", errors="replace").splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}


def cpu_model() -> str:
    """Its name, and a hash of its features: virtual machines hide either."""
    found = cpu_info()
    features = hashlib.sha256(found.get("flags", "").encode()).hexdigest()[:8]
    return f"{found.get('model name') or platform.processor()} {features}"


def measure_linear() -> str:
    """The CPU time of one thread counts, which other processes hardly change; the best of several alternating tries."""
    import torch

    from gptlab import linear

    if not linear.has_operators():
        return "torch"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = dict.fromkeys(CHOICES, 0.0)
    for rows, inputs, outputs in SHAPES:
        x, weight = torch.ones(rows, inputs, requires_grad=True), torch.ones(outputs, inputs, requires_grad=True)
        grad = torch.ones(rows * outputs)
        layers = {"torch": torch.nn.functional.linear, "onednn": linear.OneDNNProduct.apply}
        tries = [[_seconds(layers[name], (x, weight, None), grad) for name in CHOICES] for _ in range(1 + TRIES)]
        for name, times in zip(CHOICES, zip(*tries[1:], strict=True), strict=True):  # the first compiles kernels
            seconds[name] += min(times)
    torch.set_num_threads(threads)
    return "onednn" if seconds["torch"] > MARGIN * seconds["onednn"] else "torch"


def _seconds(layer: Callable[..., Any], arguments: tuple[Any, ...], grad: Any) -> float:
    started = time.thread_time()
    layer(*arguments).flatten().dot(grad).backward()  # with a gradient as an argument, backward() would import sympy
    return time.thread_time() - started
