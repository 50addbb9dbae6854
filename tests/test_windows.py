"""Which sequences a step trains on, and that validation predicts each token once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gptlab.data.windows import Ids, StepsFrom, TrainSteps, ValBatches, share, window_starts


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


def test_sequences_are_consecutive_tokens():
    batch = steps()[7]
    assert batch.shape == (12, 9) and batch.dtype == torch.int64
    assert (batch.diff(dim=1) == 1).all()


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 12), (3, 12), (2, 7), (5, 7)])
def test_processes_share_the_same_global_batch(world_size, batch_size):
    whole = steps(batch_size=batch_size)[4]
    parts = [steps(world_size, rank, batch_size)[4] for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), whole)
    assert all(len(part) > 0 for part in parts)


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
    assert whole.shape == (batch_size, block_size + 1)
    assert whole.min() >= 0 and whole.max() < tokens and (whole.diff(dim=1) == 1).all()
    assert torch.equal(
        torch.cat([steps(world_size, r, batch_size, seed, tokens, block_size)[step] for r in range(world_size)]), whole
    )


@settings(deadline=None, max_examples=5)
@given(start=st.integers(0, 10**9), length=st.integers(1, 12), workers=st.integers(1, 2))
def test_any_number_of_workers_gives_the_stream_of_none(start, length, workers):
    sampler = StepsFrom(start, start + length)
    none, some = (DataLoader(steps(), sampler=sampler, batch_size=None, num_workers=n) for n in (0, workers))
    assert torch.equal(torch.cat(list(none)), torch.cat(list(some)))


def test_share_is_contiguous_and_even():
    for total in range(20):
        parts = [share(total, rank, 6) for rank in range(6)]
        assert [i for part in parts for i in part] == list(range(total))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("world_size", "tokens"),
    [(1, 2), (1, 9), (1, 10), (1, 17), *((w, t) for w in (1, 2, 3) for t in (18, 24, 25, 26, 801))],
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
    with pytest.raises(ValueError, match=r"data.val_windows.*trainer.devices"):
        ValBatches(numbers(100), 8, 2, 3, 0, 3)


def test_validation_on_the_first_windows():
    batches = ValBatches(numbers(100), 8, 5, 3, 0, 1)
    targets = [t for k in range(len(batches)) for t in batches[k][0][:, 1:].flatten().tolist()]
    assert targets == list(range(1, 41))
