"""Which sequences a step trains on, that validation predicts each token once, and that workers end with their run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gptlab.data.windows import Ids, StepsFrom, TrainSteps, ValBatches, WindowData, window_starts
from gptlab.errors import UserError


def numbers(tokens):
    """Ids that say where they stand."""
    return Ids(np.arange(tokens, dtype=np.uint16), vocab_size=tokens)


def steps(world_size=1, rank=0, batch_size=12, seed=5, tokens=1000, block_size=8):
    return TrainSteps(numbers(tokens), block_size, batch_size, seed, rank, world_size)


def test_a_start_depends_on_seed_and_index_alone():
    """Drawn in one go, one by one or in odd pieces: the same starts."""
    at_once = window_starts(3, 0, 50, 992)
    assert at_once.tolist() == [window_starts(3, i, 1, 992)[0] for i in range(50)]
    assert at_once[17:29].tolist() == window_starts(3, 17, 12, 992).tolist()
    assert at_once.tolist() != window_starts(4, 0, 50, 992).tolist()


def test_workers_do_not_change_the_stream():
    def stream(workers):
        return torch.cat(list(DataLoader(steps(), sampler=StepsFrom(3, 9), batch_size=None, num_workers=workers)))

    assert torch.equal(stream(0), stream(2))
    assert torch.equal(stream(0)[:12], steps()[3])  # and it starts where the run goes on


@pytest.mark.parametrize(("tokens", "block_size"), [(9, 8), (10, 8), (17, 8), (30, 8), (2, 1), (7, 1), (1000, 64)])
def test_windows_stay_inside_and_reach_both_ends(tokens, block_size):
    starts = window_starts(0, 0, 5000, tokens - block_size)
    assert starts.min() == 0 and starts.max() == tokens - block_size - 1


@settings(deadline=None)
@given(
    tokens=st.integers(2, 300),
    block_size=st.integers(1, 299),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**40),
    world_size=st.integers(1, 5),
)
def test_any_step_of_any_run_is_whole_windows_shared_without_gap(
    tokens, block_size, batch_size, seed, step, world_size
):
    """For any sizes: consecutive tokens inside the data, and the processes' parts are the batch of one process."""
    block_size, world_size = min(block_size, tokens - 1), min(world_size, batch_size)
    whole = steps(1, 0, batch_size, seed, tokens, block_size)[step]
    assert whole.shape == (batch_size, block_size + 1) and whole.dtype == torch.int64
    assert whole.min() >= 0 and whole.max() < tokens and (whole.diff(dim=1) == 1).all()
    assert torch.equal(
        torch.cat([steps(world_size, r, batch_size, seed, tokens, block_size)[step] for r in range(world_size)]), whole
    )


@pytest.mark.parametrize(
    ("world_size", "tokens"),
    [(1, 2), (1, 9), (1, 10), *((w, t) for w in (1, 2, 3) for t in (24, 25, 26, 801))],
)
def test_validation_predicts_each_token_but_the_first_once(tokens, world_size):
    targets = []
    for rank in range(world_size):
        batches = ValBatches(numbers(tokens), 8, None, 3, rank, world_size)
        for ids, mask in (batches[k] for k in range(len(batches))):
            assert ids.shape[1] == 9 and ids.shape == mask.shape
            targets += ids[:, 1:][mask[:, 1:]].tolist()
    assert sorted(targets) == list(range(1, tokens))


def test_more_processes_than_validation_windows():
    with pytest.raises(UserError, match=r"data.val_windows.*trainer.devices"):
        ValBatches(numbers(100), 8, 2, 3, 0, 3)


def test_validation_on_the_first_windows():
    batches = ValBatches(numbers(100), 8, 5, 3, 0, 1)
    targets = [t for k in range(len(batches)) for t in batches[k][0][:, 1:].flatten().tolist()]
    assert targets == list(range(1, 41))


@pytest.mark.parametrize(
    ("vocab_size", "block_size", "expected"), [(65, 256, 64), (4096, 1024, 64), (50_257, 1024, 8), (50_257, 256, 20)]
)
def test_validation_batches_do_not_outgrow_their_logits(vocab_size, block_size, expected):
    """50,257 logits of 64 x 1,024 tokens are 13 GB; a batch that training holds at once is never cut."""
    data = WindowData(seed=1, name="ids", block_size=block_size, batch_size=8)
    data.tokenizer, data.val_ids = SimpleNamespace(vocab_size=vocab_size), np.zeros(70 * block_size + 1, np.uint16)
    root_device = torch.device("cpu")
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=SimpleNamespace(root_device=root_device))
    assert len(next(iter(data.val_dataloader()))[0]) == expected


RUN = """
import sys, time
import torch
from torch.utils.data import Dataset
from gptlab.data.windows import WindowData

class Hangs(Dataset):
    def __getitem__(self, i):
        if i > 0:
            time.sleep(300)
        return torch.zeros(2, 2)

if __name__ == "__main__":
    data = WindowData(seed=1, name="hangs", block_size=1, batch_size=2, workers=2)
    class trainer: strategy = type("", (), {"root_device": torch.device("cpu")})
    data.trainer = trainer
    batches = iter(data._loader(Hangs(), range(9)))
    next(batches)
    print(*(worker.pid for worker in torch.multiprocessing.active_children()), flush=True)
    sys.stdin.readline()
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes there")
@pytest.mark.parametrize("end", [pytest.param("exits", marks=pytest.mark.slow), "is killed"])
def test_workers_that_hang_end_with_the_main_process_and_not_before(end, tmp_path):
    """A cluster's signal must leave them alone, as the run still needs batches to reach its checkpoint. Ignoring it,
    they would keep the main process from exiting, or outlive it."""
    (tmp_path / "run.py").write_text(RUN)  # a file: a spawned worker could not import a string
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, tmp_path / "run.py"], **pipes) as main:
        workers = [int(pid) for pid in main.stdout.readline().split()]
        assert len(workers) == 2
        time.sleep(1)  # the second one has started, too
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
        time.sleep(0.2)
        assert all(map(is_running, workers))
        main.kill() if end == "is killed" else main.stdin.close()
        deadline = time.monotonic() + 20
        try:
            main.wait(20)
            while any(map(is_running, workers)) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not any(map(is_running, workers))
        finally:
            for process in filter(is_running, (main.pid, *workers)):
                os.kill(process, signal.SIGKILL)
