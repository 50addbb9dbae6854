"""Problems with one right answer: addition and sorting, minGPT's demos. The answer alone counts in the loss, and the
share of held-out problems answered exactly is measured.

Problem number i of a run is drawn from (seed, i), as windows are (see `gptlab.data.windows`); whether a problem is for
training or held out follows from a hash of the problem itself. So nothing is listed, and no problem is on both sides.
"""

import hashlib
import itertools
import json
import string
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gptlab.data.notation import Addition, Sorting
from gptlab.data.windows import WindowData, share, val_share
from gptlab.errors import UserError
from gptlab.tokenizer import CharTokenizer

LIST_ALL = 10_000  # up to so many problems are listed to find all held-out ones
HELD_OUT = 5_000  # of more, so many are measured


class ProblemData(WindowData):
    """Questions of `n_question` symbols, drawn uniformly, and the answers, of `n_answer`; each problem is one window. A
    tenth (`held_out_share`) of all problems is held out and never trained on.

    A kind of problem is a subclass with `answer`, `notation` and, where problems can be the same though they look
    different, `canonical`. `symbols` has one character per token.
    """

    notation: Any  # such as gptlab.data.notation.Addition
    held_out_share = 0.1

    def __init__(
        self, *, symbols: str, n_question: int, n_answer: int, name: str, block_size: int | None, **windows
    ) -> None:
        needed = n_question + n_answer - 1  # the last symbol of the answer is only ever predicted
        if block_size not in (None, needed):
            raise UserError(f"data.block_size={block_size} must be {needed}, as long as a problem, or null")
        super().__init__(name=name, block_size=needed, **windows)
        self.tokenizer = CharTokenizer(symbols)
        self.n_question, self.n_answer = n_question, n_answer
        self.resolved = {"block_size": needed}

    def answer(self, questions: np.ndarray) -> np.ndarray:
        """(N, n_question) -> (N, n_answer) symbols."""
        raise NotImplementedError

    def written(self, problem: list[int]) -> tuple[str, str]:
        """Question and answer, (T + 1) symbols, as people write them."""
        tokens, n = self.tokenizer.decode(problem), self.n_question
        return self.notation.format_question(tokens[:n]), self.notation.format_answer(tokens[n:])

    def canonical(self, questions: np.ndarray) -> np.ndarray:
        """(N, n_question) -> the same shape; equal rows for questions that must not be on both sides."""
        return questions

    def __getstate__(self) -> dict[str, Any]:
        """Without the trainer, which cannot be sent to worker processes."""
        return {key: value for key, value in self.__dict__.items() if key != "trainer"}

    def setup(self, stage: str | None = None) -> None:
        if not hasattr(self, "record"):
            self.held_out = self._find_held_out()
            identity = json.dumps([type(self).__name__, self.held_out.tolist()])
            self.record = {"name": self.name, "sha256": hashlib.sha256(identity.encode()).hexdigest()}
        self.checked = True

    def problems(self, first: int, count: int) -> np.ndarray:
        """Training problems first ... first + count - 1 of the run, (count, T + 1) int64."""
        questions = self._draw(self.seed, first, count)
        for attempt in itertools.count(1):
            held_out = self.is_held_out(questions)
            if not held_out.any():
                return self.with_answers(questions)
            questions[held_out] = self._draw(self.seed + (attempt << 64), first, count)[held_out]

    def is_held_out(self, questions: np.ndarray) -> np.ndarray:
        """(N,) bool."""
        return _hash(self.canonical(questions)) < self.held_out_share * 2.0**64

    def with_answers(self, questions: np.ndarray) -> np.ndarray:
        return np.concatenate((questions, self.answer(questions)), axis=1)

    def _draw(self, key: int, first: int, count: int) -> np.ndarray:
        """(count, n_question) symbols; a problem's number is the counter of a counter-based generator."""
        blocks = -(-self.n_question // 4)  # of 4 words
        words = np.random.Philox(key=key, counter=first * blocks).random_raw(4 * blocks * count)
        words = words.reshape(count, -1)[:, : self.n_question]
        return (words % np.uint64(self.tokenizer.vocab_size)).astype(np.int64)

    def _find_held_out(self) -> np.ndarray:
        """All held-out problems, or 5,000 of them, each once, (N, T + 1) int64; the same for every seed."""
        symbols = self.tokenizer.vocab_size
        if symbols**self.n_question <= LIST_ALL:
            questions = np.indices((symbols,) * self.n_question).reshape(self.n_question, -1).T
            questions = questions[self.is_held_out(questions)]
            return self.with_answers(questions[_hash(questions).argsort()])  # shuffled: val_windows takes the first few
        questions, count = np.empty((0, self.n_question), dtype=np.int64), 2 * HELD_OUT
        for first in itertools.count(0, count):
            drawn = self._draw(2**127, first, count)  # a key that no seed has
            questions = np.concatenate((questions, drawn[self.is_held_out(drawn)]))
            first_places = np.unique(questions, axis=0, return_index=True)[1]
            questions = questions[np.sort(first_places)]
            if len(questions) >= HELD_OUT or first > 100 * count:  # by then nearly all, if there are fewer
                return self.with_answers(questions[:HELD_OUT])

    def mask(self, count: int) -> Tensor:
        """True on the answers, (count, T + 1)."""
        return (torch.arange(self.block_size + 1) >= self.n_question).expand(count, -1)

    def train_steps(self, rank: int, world_size: int) -> Dataset:
        return ProblemSteps(self, rank, world_size)

    def val_batches(self, batch_size: int, rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
        mine = val_share(len(self.held_out), self.val_windows, rank, world_size)
        batches = torch.from_numpy(self.held_out[mine.start : mine.stop]).split(batch_size)
        return [(ids, self.mask(len(ids))) for ids in batches]


class ProblemSteps(Dataset):
    """Item s: one process's share of the problems of optimizer step s, and their mask, (b, T + 1)."""

    def __init__(self, data: ProblemData, rank: int, world_size: int) -> None:
        self.data, self.share = data, share(data.batch_size, rank, world_size)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        ids = self.data.problems(step * self.data.batch_size + self.share.start, len(self.share))
        return torch.from_numpy(ids), self.data.mask(len(ids))


class AdditionData(ProblemData):
    """n-digit addition (minGPT's adder). Tokens are digits alone: those of a, those of b, and those of the sum in
    reverse, the order in which carries arise.

    With ndigit=2, 85 + 50 = 135 is the problem 8 5 5 0 5 3 1: the model gets 8 5 5 0 5 3 and predicts

        input     8  5  5  0  5  3
        target    -  -  -  5  3  1      ("-": part of the question, masked out of the loss)

    so the block size is 2n + (n + 1) - 1 = 3n. a + b and b + a are on the same side of the split.
    """

    def __init__(self, *, ndigit: int, **windows) -> None:
        self.ndigit, self.notation = ndigit, Addition(ndigit)
        super().__init__(symbols=string.digits, n_question=2 * ndigit, n_answer=ndigit + 1, **windows)

    def answer(self, questions: np.ndarray) -> np.ndarray:
        total = questions[:, : self.ndigit] + questions[:, self.ndigit :]
        digits, carry = np.empty((len(questions), self.ndigit + 1), dtype=np.int64), 0
        for place in range(self.ndigit):  # from the last digit on, as on paper: no number is too long
            carry, digits[:, place] = np.divmod(total[:, -1 - place] + carry, 10)
        digits[:, self.ndigit] = carry
        return digits

    def canonical(self, questions: np.ndarray) -> np.ndarray:
        a, b = questions[:, : self.ndigit], questions[:, self.ndigit :]
        first_difference = (a != b).argmax(axis=1)[:, None]
        swap = np.take_along_axis(a, first_difference, 1) > np.take_along_axis(b, first_difference, 1)
        return np.where(swap, np.concatenate((b, a), axis=1), questions)


class SortData(ProblemData):
    """Sorting `length` symbols out of `n_symbols` (minGPT's demo): 2 0 1 is answered 0 1 2."""

    def __init__(self, *, length: int, n_symbols: int, **windows) -> None:
        symbols, self.notation = (string.digits + string.ascii_letters)[:n_symbols], Sorting(length)
        super().__init__(symbols=symbols, n_question=length, n_answer=length, **windows)

    def answer(self, questions: np.ndarray) -> np.ndarray:
        return np.sort(questions, axis=1)


def _hash(rows: np.ndarray) -> np.ndarray:
    """(N, n) small integers -> (N,) uint64, spread like random ones: SplitMix64 (Steele, Lea and Flood 2014), once per
    column."""
    state = np.full(len(rows), 133, dtype=np.uint64)  # with this start, about a tenth is held out even of 100 problems
    for column in rows.T.astype(np.uint64):
        state = (state ^ column) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state
