"""Checkpoints survive a failing write, samples disturb nothing, speed is checked by hand, the bar fits its terminal."""

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_module import make_module, make_trainer

from gptlab.callbacks import throughput
from gptlab.callbacks.checkpointing import AtomicCheckpointIO, Checkpointing
from gptlab.callbacks.display import Progress, SampleText
from gptlab.callbacks.interrupts import Interrupts
from gptlab.callbacks.throughput import Throughput, peak_flops
from gptlab.data.windows import WindowData
from gptlab.loggers import TensorBoard
from gptlab.terminal import printable
from gptlab.tokenizer import CharTokenizer


class Data(WindowData):
    """Three dozen letters, in memory."""

    def __init__(self):
        super().__init__(
            seed=1, name="letters", block_size=6, batch_size=4, micro_batch_size=None, val_windows=None, workers=0
        )
        self.tokenizer = CharTokenizer("abcdefghijk")
        self.train_ids = np.arange(300) % 11
        self.val_ids = np.arange(50) % 11


def validated(every):
    return {"val_check_interval": every, "check_val_every_n_epoch": None}


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)

    def half(checkpoint, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        io.save_checkpoint({"step": 2}, path)
    assert io.load_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_best_last_and_previous(tmp_path):
    """Losses are dictated: the best is at step 4, and later saves leave it alone."""
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5}
    module = make_module()
    module.val_metrics.compute = lambda: {"loss": losses.get(module.trainer.global_step, 9.0)}
    trainer = make_trainer(tmp_path, 8, callbacks=[Checkpointing(every=2)], **validated(2),
                           enable_checkpointing=True, plugins=[AtomicCheckpointIO()])  # fmt: skip
    trainer.fit(module, datamodule=Data())
    for name, step in {"best": 4, "last": 8, "previous": 6}.items():
        assert torch.load(tmp_path / f"checkpoints/{name}.ckpt", weights_only=True)["global_step"] == step


def test_sampling_disturbs_neither_weights_nor_random_numbers(tmp_path):
    def run(callbacks):
        module = make_module(dropout=0.3)
        trainer = make_trainer(tmp_path, 4, callbacks=callbacks, **validated(2))
        trainer.fit(module, datamodule=Data())
        return torch.cat([p.flatten() for p in module.model.parameters()])

    class Watched(SampleText):
        def on_validation_end(self, trainer, pl_module):
            before = torch.get_rng_state()
            super().on_validation_end(trainer, pl_module)
            assert torch.equal(before, torch.get_rng_state())

    assert torch.equal(run([]), run([Watched("a", 20, 1.0, None)]))


def test_tensorboard_has_samples_and_the_losses_first(tmp_path):
    logger = TensorBoard(tmp_path)
    trainer = make_trainer(tmp_path, 4, callbacks=[SampleText("ab", 20, 0.0, None), Throughput()], logger=logger, **validated(2))  # fmt: skip
    trainer.fit(make_module(), datamodule=Data())
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path)).Reload()
    samples = events.Tensors("samples/text_summary")
    assert [event.step for event in samples] == [2, 4]
    assert samples[0].tensor_proto.string_val[0].decode().startswith("    ab")
    assert [event.step for event in events.Scalars("val/loss")] == [2, 4]
    shown = sorted(events.Tags()["scalars"])  # the order of TensorBoard
    assert shown[:3] == ["train/loss", "train/lr", "val/bits_per_byte"] and shown[-1].startswith("watch/")


def test_samples_cannot_command_the_terminal(tmp_path, caplog):
    """A text file may hold control characters, and a model learns to write them."""
    assert printable("a\tb\n\x1b[2J\r\x00\x7f\x9bé日") == "a\tb\n\\x1b[2J\\x0d\\x00\\x7f\\x9bé日"
    data = Data()
    data.tokenizer = CharTokenizer("\x1b\x07\x9b\n\tabcdef")
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(tmp_path, 2, callbacks=[SampleText(None, 200, 5.0, None)], **validated(2))  # fmt: skip
        trainer.fit(make_module(), datamodule=data)
    (sample,) = (message for message in caplog.messages if message.startswith("\n    "))
    assert "\\x1b" in sample and all(char in "\n\t" or char.isprintable() for char in sample)


def test_a_sample_is_cut_short_where_a_cluster_would_not_wait(tmp_path, caplog):
    asked = Interrupts()
    asked.asked_at = float("-inf")
    with caplog.at_level(logging.INFO):
        callbacks = [SampleText("ab", 500, 0.0, None), asked]
        trainer = make_trainer(tmp_path, 2, callbacks=callbacks, **validated(2),
                               enable_checkpointing=True)  # fmt: skip
        trainer.fit(make_module(), datamodule=Data())
    (sample,) = (message for message in caplog.messages if message.startswith("\n    "))
    assert len(sample.strip()) <= len("ab") + 1


def test_throughput_and_mfu_by_hand(tmp_path, monkeypatch):
    """A clock that advances by 0.1 s a look, a device whose peak is 1e6, 24 tokens per step. Each step but the first, whose
    batch is there when the clock starts, has two looks of the loader in between: 0.3 s, of which 0.1 s of waiting. A clock
    that stands still, as in some virtual machines, gives no speed, and no division by zero."""
    clock = iter(np.arange(1, 1000) / 10)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 1e6)
    module, callback = make_module(), Throughput()
    make_trainer(tmp_path, 3, callbacks=[callback], limit_val_batches=0).fit(module, datamodule=Data())
    assert module.logged["train/tokens_per_s"] == pytest.approx(24 / 0.3)
    assert module.logged["train/mfu"] == pytest.approx(80 * module.model.flops_per_token() / 1e6)
    assert module.logged["train/data_wait"] == pytest.approx(1 / 3)
    assert callback.tokens_per_s == pytest.approx(3 * 24 / 0.7)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: 1.0)
    module, callback = make_module(), Throughput()
    make_trainer(tmp_path, 3, callbacks=[callback], limit_val_batches=0).fit(module, datamodule=Data())
    assert callback.tokens_per_s is None and "train/tokens_per_s" not in module.logged


def test_the_clock_stands_still_during_validation(tmp_path):
    class Slow(SampleText):
        def on_validation_end(self, trainer, pl_module):
            time.sleep(0.1)

    callback = Throughput()
    trainer = make_trainer(tmp_path, 4, callbacks=[callback, Slow("a", 1, 1.0, None)], **validated(1))
    started = time.perf_counter()
    trainer.fit(make_module(), datamodule=Data())
    assert callback.seconds < time.perf_counter() - started - 0.4


def test_peak_is_only_claimed_where_it_is_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = SimpleNamespace(type="cuda")
    assert peak_flops(cuda, "bf16-mixed") == 989e12
    assert peak_flops(cuda, "32-true") is None
    assert peak_flops(torch.device("cpu"), "bf16-mixed") is None
    for name in ("Some Card", "NVIDIA L40", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA T400"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda, "bf16-mixed") is None, name


def test_progress_bar_on_a_narrow_terminal(tmp_path, monkeypatch):
    """In a pseudo-terminal of 60 columns: time left, step, loss and speed on one line that does not wrap."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        trainer = make_trainer(tmp_path, 150, callbacks=[Progress(), Throughput()], limit_val_batches=0)
        trainer.fit(make_module(), datamodule=Data())
        stderr.flush()
        bars = [part for part in os.read(main, 100_000).decode().split("\r") if "%|" in part]
    assert any(re.search(r"\| \d\d:\d\d left, step \d+/150, loss \d.\d{3}, [\d,]+ tok/s$", bar) for bar in bars)
    assert all(len(bar) <= 60 for bar in bars)
