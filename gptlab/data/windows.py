"""Windows of token ids: which sequences a step trains on, as a pure function of (seed, index), and validation.

    token ids    0 . . . . . . . . . . . . . . . . . . . . . . . . N
    training           [---3---]      [---0---]   [--1--...          sequence i starts where (seed, i) says
    validation   [---0---]                                           side by side: each token but the first is
                         [---1---]                                   predicted once
                                 [---2---] . . .

Step s takes the sequences s * batch_size ... (s + 1) * batch_size - 1, and each process a contiguous share of them. So
what a step sees depends neither on the number of processes or workers nor on where a run was interrupted.
"""

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gptlab.errors import UserError

Batch = Tensor | tuple[Tensor, Tensor]


def window_starts(seed: int, first: int, count: int, positions: int) -> np.ndarray:
    """Start positions, in [0, positions), of the sequences first ... first + count - 1 of a run, (count,) int64.

    Philox is a counter-based generator (Salmon et al. 2011): sequence i reads the block of random bits at counter i,
    so any range of sequences is drawn at once and without those before it.
    """
    blocks = np.random.Philox(key=seed, counter=first).random_raw(4 * count)  # a counter's block is 4 words
    return (blocks[::4] % np.uint64(positions)).astype(np.int64)


def share(total: int, rank: int, world_size: int) -> range:
    """The contiguous part of range(total) for one of `world_size` processes; sizes differ by at most 1."""
    return range(total * rank // world_size, total * (rank + 1) // world_size)


def val_share(total: int, val_windows: int | None, rank: int, world_size: int) -> range:
    """One process's part of the first `val_windows` of all validation windows."""
    total = min(total, val_windows or total)
    if total < world_size:
        raise UserError(
            f"validation has {total} windows and must have one per process, {world_size}; raise data.val_windows, or "
            "lower data.block_size or trainer.devices"
        )
    return share(total, rank, world_size)


class Ids:
    """Token ids in memory or in a file, read as int64 at any positions."""

    def __init__(self, ids: np.ndarray, vocab_size: int) -> None:
        self.ids, self.vocab_size = ids, vocab_size

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Raises UserError for an id outside the vocabulary, at which a GPU would only crash."""
        ids = self.ids[positions].astype(np.int64)
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            wrong = (ids < 0) | (ids >= self.vocab_size)
            raise UserError(
                f"token {positions[wrong][0]:,} of the data is {ids[wrong][0]}, outside the vocabulary of "
                f"{self.vocab_size}; prepare the data again"
            )
        return ids


class TrainSteps(Dataset):
    """Item s: one process's share of the sequences of optimizer step s, (b, T + 1) int64."""

    def __init__(self, ids: Ids, block_size: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.ids, self.seed, self.batch_size = ids, seed, batch_size
        self.offsets = np.arange(block_size + 1)
        self.share = share(batch_size, rank, world_size)

    def __getitem__(self, step: int) -> Tensor:
        first = step * self.batch_size + self.share.start
        starts = window_starts(self.seed, first, len(self.share), len(self.ids) - len(self.offsets) + 1)
        return torch.from_numpy(self.ids[starts[:, None] + self.offsets])


class StepsFrom(Sampler[int]):
    """The remaining steps. Its length counts the finished ones too: that is how Lightning keeps its place."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop


class ValBatches(Dataset):
    """Windows side by side, so that each token but the first is predicted exactly once.

    Item k is (ids (b, T + 1) int64, mask (b, T + 1) bool); the mask is False where the last window is padded.
    """

    def __init__(
        self, ids: Ids, block_size: int, windows: int | None, batch_size: int, rank: int, world_size: int
    ) -> None:
        self.ids, self.block_size, self.batch_size = ids, block_size, batch_size
        self.windows = val_share(-(-(len(ids) - 1) // block_size), windows, rank, world_size)

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch_size)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        windows = self.windows[k * self.batch_size : (k + 1) * self.batch_size]
        at = np.asarray(windows)[:, None] * self.block_size + np.arange(self.block_size + 1)
        mask = at < len(self.ids)
        return torch.from_numpy(self.ids[np.where(mask, at, 0)]), torch.from_numpy(mask)


class TimedLoader(DataLoader):
    """A DataLoader that adds up the seconds spent waiting for it, in `waited`."""

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:
        batches = super().__iter__()
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches, None)
            except UserError as error:  # from a worker process, its text is a whole traceback
                raise UserError(str(error).rpartition("UserError: ")[2]) from error
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch


def ids_and_mask(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The two parts of a batch; raises UserError if it is none, as described in WindowData's docstring."""
    ids, mask = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise UserError(
            "the data set yields pairs, such as inputs and targets; it must yield ids (b, T + 1), or ids and a mask of "
            "type bool: gptlab shifts the targets by one itself"
        )
    shapes = [str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in (ids, mask)]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2 or shapes[1] not in ("NoneType", shapes[0]):
        raise UserError(f"a batch must be ids (b, T + 1), or ids and a mask of the same shape, not {', '.join(shapes)}")
    return ids, mask


class WindowData(L.LightningDataModule):
    """Training and validation windows over two sequences of token ids, and all that gptlab asks of a data set.

    For custom ids, subclass this. `__init__` gets the keys of the config's `data` node (but _target_), and seed; pass
    those of WindowData on (`super().__init__(**windows)`). `setup(stage)` sets `tokenizer` (such as
    `gptlab.tokenizer.CharTokenizer("abc...")`), `train_ids`, `val_ids` (1-D numpy arrays of integers) and `record`.

    For other batches, this is what gptlab uses:

    - `prepare_data()` and `setup("fit")`: called in every process, and by Lightning once more, to no effect.
    - `train_dataloader()`: one batch per optimizer step, this process's share of it, from step
      `self.trainer.global_step` on; its length counts the steps before that too. (The callback Overfit wants a
      DataLoader with a `dataset` and a `sampler` of step numbers.)
    - `val_dataloader()`: this process's share of the validation.
    - A batch is ids (b, T + 1) int64, tokens 1 ... T the targets of 0 ... T - 1, with 1 <= T <= block_size; or
      (ids, mask) with a mask (b, T + 1) bool that is False on tokens which do not count as targets.
    - `block_size`, `batch_size` (sequences per optimizer step, over all processes), `micro_batch_size` (sequences per
      forward pass, or None): those of the config.
    - `record`: plain values that identify the data, at least `name` and `sha256`; they go into every file of a run, and
      a resume refuses data with another record.
    - `resolved`: existing keys of the config's `data` node that preparing decided, such as a path made absolute, for a
      resume; {} if none.
    - `tokenizer`: `vocab_size`; `encode(text)` -> ids (n,), an integer array, ValueError for what it cannot encode;
      `decode(ids)` -> str, of an iterable of int, with U+FFFD for incomplete characters; `start`, the text that
      replaces an empty prompt; `token_bytes()`, the bytes of text per token, an array (vocab_size,) of integers;
      `state()`, plain JSON that rebuilds it from a checkpoint: for a custom class
      `{"_target_": "my_pkg.MyTokenizer", ...}` with its keyword arguments.
    """

    def __init__(
        self,
        *,
        seed: int,
        name: str,
        block_size: int,
        batch_size: int,
        micro_batch_size: int | None = None,
        val_windows: int | None = None,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        self.seed, self.name, self.block_size, self.batch_size = seed, name, block_size, batch_size
        self.micro_batch_size, self.val_windows, self.workers = micro_batch_size, val_windows, workers or 0
        self.resolved: dict[str, Any] = {}
        self.checked = False

    def check_lengths(self, source: str) -> None:
        """Raises UserError unless both splits hold at least one window."""
        self.checked = True
        for split, name in (("training", "train_ids"), ("validation", "val_ids")):
            ids = getattr(self, name, None)
            if not (isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu"):
                raise UserError(f"{source}: {name} must be a 1-D numpy array of integers, not {type(ids).__name__}")
            if len(ids) < self.block_size + 1:
                raise UserError(
                    f"{source}: the {split} split has {len(ids)} tokens and must have at least data.block_size + 1 = "
                    f"{self.block_size + 1}; give a longer text or a smaller data.block_size"
                )

    def train_dataloader(self) -> DataLoader:
        steps = self.train_steps(self.trainer.global_rank, self.trainer.world_size)
        return self._loader(steps, StepsFrom(self.trainer.global_step, self.trainer.max_steps))

    def val_dataloader(self) -> DataLoader:
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        # Without gradients larger batches fit, and are faster; up to 64 Ki tokens, and logits of 1 GiB in 32 bits.
        tokens = min(1 << 16, (1 << 28) // self.tokenizer.vocab_size)
        share = -(-self.batch_size // world_size)
        batch_size = self.micro_batch_size or max(share, min(64, tokens // self.block_size))
        batches = self.val_batches(batch_size, rank, world_size)
        return self._loader(batches, range(len(batches)))

    def train_steps(self, rank: int, world_size: int) -> Dataset:
        """Item s: the process's part of the batch of optimizer step s."""
        ids = Ids(self.train_ids, self.tokenizer.vocab_size)
        return TrainSteps(ids, self.block_size, self.batch_size, self.seed, rank, world_size)

    def val_batches(self, batch_size: int, rank: int, world_size: int) -> Any:
        """The process's part of the validation: item k is its k-th batch."""
        ids = Ids(self.val_ids, self.tokenizer.vocab_size)
        return ValBatches(ids, self.block_size, self.val_windows, batch_size, rank, world_size)

    def _loader(self, dataset: Dataset, sampler: Any) -> DataLoader:
        if self.workers:
            atexit.register(kill_workers)  # else multiprocessing would wait for a worker that hangs, forever
        return TimedLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            worker_init_fn=_start_worker,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",  # copied while the GPU computes
        )


def _start_worker(worker: int) -> None:
    """Signals from a terminal or cluster reach all processes of a run, but the main process still needs batches for
    its last step: a worker ignores them, and ends with the main process, whatever it is doing."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent and multiprocessing.parent_process().is_alive():  # the parent may be a fork server
        time.sleep(1)
    os._exit(1)


def kill_workers() -> None:
    """When everything is saved and the process ends. Workers ignore SIGTERM, with which Python would end them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's handler raises for each worker that dies
    torch.utils.data._utils.python_exit_status = True  # and the loader, which may be half made, is not to clean up
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
