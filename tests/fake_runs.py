"""Run folders as a training leaves them, without training."""

import json
import math
from pathlib import Path
from typing import Any

import yaml
from composed import composed

from gptlab import config


def write_run(
    folder: Path,
    changes: dict[str, Any] | None = None,
    loss: float | None = 2.0,
    *,
    ended: str | None = "max_steps",
    sha256: str = "d" * 64,
    vocabulary: str = "v" * 64,
    best: float | None = None,
    error: str = "",
    metrics: dict[str, float] | None = None,
    choices: tuple[str, ...] = (),
) -> None:
    """A run that ended with this validation loss; `ended=None`: not finished; `error`: how its process ended."""
    values, _ = composed("train", *choices)
    for key, value in ({"data.val_windows": None} | (changes or {})).items():
        values = config.with_value(values, key, value)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False))
    data = {"name": values["data"]["name"], "sha256": sha256}
    (folder / "run.json").write_text(
        json.dumps({"data": data, "vocabulary_sha256": vocabulary, "tags": values["tags"]})
    )
    steps = values["trainer"]["max_steps"]
    end = loss if isinstance(loss, float) and math.isfinite(loss) else 9.0
    lines = [{"step": 0, "data": data}]
    lines += [{"step": s, "val/loss": end + 2.2 * math.exp(-5 * s / steps)} for s in range(0, steps + 1, steps // 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if error:
        (folder / "error.txt").write_text(error)
    if ended:

        def of(value):
            return {"step": steps, "val/loss": value, "val/bits_per_byte": value and value * 1.44, **(metrics or {})}

        summary = {"status": "finished", "steps": steps, "ended": ended, "why": None, "last": of(loss),
                   "best": of(loss if best is None else best), "tokens_per_s": 31000.4, "seconds": 61.5, "data": data}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))


def write_sweep(folder: Path, jobs: list[dict[str, Any]], losses: list[float | None], **sweep: Any) -> None:
    """A sweep whose jobs have these values of the varied keys. A loss of None: that job has not been started."""
    varied = list(dict.fromkeys(key for job in jobs for key in job))
    entries = [
        {"folder": str(i), "id": str(i), "values": job, "overrides": [], "threads": None} for i, job in enumerate(jobs)
    ]
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(
        json.dumps(
            {"overrides": [], "flags": [], "varied": varied, "metric": None, "at": "last", "jobs": entries} | sweep
        )
    )
    for i, (job, loss) in enumerate(zip(jobs, losses, strict=True)):
        if loss is not None:
            write_run(folder / str(i), job, loss)
