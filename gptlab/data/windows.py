"""Windows of token ids: which sequences a step trains on, as a pure function of (seed, index), and validation.

Sequence number i of a run starts at a position drawn from (seed, i). Step s takes the sequences
s * batch_size ... (s + 1) * batch_size - 1, and each process a contiguous share of them. So what a step sees depends
neither on the number of processes or workers nor on where a run was interrupted.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


def window_starts(seed: int, first: int, count: int, positions: int) -> np.ndarray:
    """Start positions, in [0, positions), of the sequences first ... first + count - 1 of a run, (count,) int64.

    Philox is a counter-based generator (Salmon et al. 2011): sequence i reads the block of random bits at counter i,
    so any range of sequences is drawn at once and without those before it.
    """
    blocks = np.random.Philox(key=seed, counter=first).random_raw(4 * count)  # a counter's block is 4 words
    return (blocks[::4] % np.uint64(positions)).astype(np.int64)


def share(total: int, rank: int, world_size: int) -> range:
    """The contiguous part of range(total) that falls to one of `world_size` processes; sizes differ by at most 1."""
    return range(total * rank // world_size, total * (rank + 1) // world_size)


class TrainSteps(Dataset):
    """Item s: one process's share of the sequences of optimizer step s, (b, T + 1) int64."""

    def __init__(
        self, ids: np.ndarray, block_size: int, batch_size: int, seed: int, rank: int, world_size: int
    ) -> None:
        self.ids, self.seed, self.batch_size = ids, seed, batch_size
        self.offsets = np.arange(block_size + 1)
        self.share = share(batch_size, rank, world_size)

    def __getitem__(self, step: int) -> Tensor:
        first = step * self.batch_size + self.share.start
        starts = window_starts(self.seed, first, len(self.share), len(self.ids) - len(self.offsets) + 1)
        return torch.from_numpy(self.ids[starts[:, None] + self.offsets].astype(np.int64))


class StepsFrom(Sampler[int]):
    """The steps that are left. Its length counts the finished ones too: that is how Lightning keeps its place."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop


class ValBatches(Dataset):
    """Windows side by side, so that each token but the first is predicted exactly once.

    Item k is (ids (b, T + 1) int64, mask (b, T + 1) bool); the mask is False where the last window is filled up.
    """

    def __init__(
        self, ids: np.ndarray, block_size: int, windows: int | None, batch_size: int, rank: int, world_size: int
    ) -> None:
        total = -(-(len(ids) - 1) // block_size)
        if min(total, windows or total) < world_size:
            raise ValueError(
                f"validation has {min(total, windows or total)} windows of data.block_size={block_size} for {world_size} "
                "processes: each needs one; raise data.val_windows, or lower trainer.devices"
            )
        self.ids, self.block_size, self.batch_size = ids, block_size, batch_size
        self.windows = share(min(total, windows or total), rank, world_size)

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch_size)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        windows = self.windows[k * self.batch_size : (k + 1) * self.batch_size]
        at = np.asarray(windows)[:, None] * self.block_size + np.arange(self.block_size + 1)
        mask = at < len(self.ids)
        ids = self.ids[np.where(mask, at, 0)].astype(np.int64)
        return torch.from_numpy(ids), torch.from_numpy(mask)


class WindowData(L.LightningDataModule):
    """Training and validation windows over two sequences of token ids, and all that gptlab asks of a data set.

    For ids of your own, subclass this. `__init__` gets the keys of the config's `data` node (but _target_), and seed;
    those of WindowData go on to it (`super().__init__(**windows)`), those of your own are your own. `setup(stage)` sets
    `tokenizer` (such as `gptlab.tokenizer.CharTokenizer("abc...")`), `train_ids`, `val_ids` (1-D numpy arrays of
    integers) and `record`. For other batches, this is what gptlab
    uses:

    - `prepare_data()` and `setup("fit")`: called in every process, and by Lightning once more: the second time they
      must change nothing.
    - `train_dataloader()`: one batch per optimizer step, this process's share of it, beginning with that of step
      `self.trainer.global_step`; its length counts the steps before that too. (The callback Overfit wants a
      DataLoader with a `dataset` and a `sampler` of step numbers.) `val_dataloader()`: this process's share of the
      validation.
    - A batch is ids (b, T + 1) int64, tokens 1 ... T the targets of 0 ... T - 1, with 1 <= T <= block_size; or
      (ids, mask) with a mask (b, T + 1) bool that is False on tokens which do not count as targets.
    - `block_size`, `batch_size` (sequences per optimizer step, over all processes), `micro_batch_size` (sequences per
      forward pass, or None). The config's `data.block_size` must say the same: a checkpoint is loaded with it; and
      `data.name` names the run's folder.
    - `record`: plain values that say what the data is, `name` and `sha256` at least; they go into every file of a run,
      and a resume refuses data with another record. `resolved`: the config keys of `data`, existing ones, that
      preparing it decided, for a resume, such as a path made absolute: {} if none. `warning`: what the user must be told at the start and again at
      the end, or None.
    - `tokenizer`: `vocab_size`; `encode(text)` -> ids (n,), an integer array, ValueError for what it cannot encode;
      `decode(ids)` -> str, of an iterable of int, "\ufffd" for what is no whole character; `start`, the text that an empty prompt stands for; `token_bytes()`, the
      bytes of text per token, an array (vocab_size,) of integers; `state()`, a dict of plain JSON from which a checkpoint makes it
      again: for a class of your own `{"_target_": "my_pkg.MyTokenizer", ...}` with its keyword arguments.
    """

    tokenizer: Any
    train_ids: np.ndarray
    val_ids: np.ndarray
    record: dict[str, Any]

    def __init__(
        self,
        *,
        seed: int,
        name: str,
        block_size: int,
        batch_size: int,
        micro_batch_size: int | None = None,
        val_windows: int | None = None,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.seed, self.name, self.block_size, self.batch_size = seed, name, block_size, batch_size
        self.micro_batch_size, self.val_windows, self.workers = micro_batch_size, val_windows, workers
        self.resolved: dict[str, Any] = {}
        self.warning: str | None = None
        self.checked = False

    def check_lengths(self, source: str | Path) -> None:
        """Raises ValueError unless both splits hold at least one window and only ids of the vocabulary."""
        self.checked = True
        for split, name in (("training", "train_ids"), ("validation", "val_ids")):
            ids = getattr(self, name, None)
            if not (isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu"):
                what = f"{ids.dtype} {tuple(ids.shape)}" if hasattr(ids, "dtype") else type(ids).__name__
                raise ValueError(f"{source}: {name} must be a 1-D numpy array of integers, not {what}")
            if len(ids) < self.block_size + 1:
                raise ValueError(
                    f"{source}: the {split} split has {len(ids)} tokens, and data.block_size={self.block_size} needs "
                    f"at least {self.block_size + 1}: give a longer text or a smaller data.block_size"
                )
            least, most = ids.min(), ids.max()
            if least < 0 or most >= self.tokenizer.vocab_size:  # a GPU would notice only by crashing
                wrong = least if least < 0 else most
                raise ValueError(f"{source}: token id {wrong} is outside the vocabulary of {self.tokenizer.vocab_size}")

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        steps = TrainSteps(
            self.train_ids, self.block_size, self.batch_size, self.seed, trainer.global_rank, trainer.world_size
        )
        return self._loader(steps, StepsFrom(trainer.global_step, trainer.max_steps))

    def val_dataloader(self) -> DataLoader:
        trainer = self.trainer
        # Without gradients larger batches fit, and are faster; but no more than 64 Ki tokens, for the logits' sake.
        share = -(-self.batch_size // trainer.world_size)
        batch_size = self.micro_batch_size or max(share, min(64, 65536 // self.block_size))
        batches = ValBatches(
            self.val_ids, self.block_size, self.val_windows, batch_size, trainer.global_rank, trainer.world_size
        )
        return self._loader(batches, range(len(batches)))

    def _loader(self, dataset: Dataset, sampler: Any) -> DataLoader:
        return DataLoader(
            dataset, sampler=sampler, batch_size=None, num_workers=self.workers, persistent_workers=self.workers > 0
        )


def check_data(data: Any) -> None:
    """Whether a user's own data set offers what WindowData's docstring asks for; its tokenizer has a check of its own.

    Raises:
        ValueError: the text says what is missing or wrong.
    """
    name = f"data._target_: {type(data).__name__}"
    needed = ("tokenizer", "record", "resolved", "warning", "block_size", "batch_size", "micro_batch_size")
    if missing := [part for part in needed if not hasattr(data, part)]:
        raise ValueError(f"{name} lacks {', '.join(missing)}; all that is needed is in the docstring of WindowData")
    if isinstance(data, WindowData) and not data.checked:
        data.check_lengths(f"data={data.name}")
    try:
        json.dumps(data.record)
    except TypeError as error:
        raise ValueError(f"{name}: record must hold plain values: {error}") from None
    if not {"name", "sha256"} <= data.record.keys():
        raise ValueError(f"{name}: record must have name and sha256, and has {', '.join(data.record)}")
