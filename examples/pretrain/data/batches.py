"""Tokens to the sequences of training steps and of validations."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.data.corpus import Tokens


class Batches:
    """The order of training: which tokens sample n has depends on the seed and n alone.

    The text is a ring.  An epoch cuts it at a random place and from there into ``len(tokens) //
    sequence_length`` windows, which come in random order.  So each token is predicted once in an epoch, but for
    the ``len(tokens) % sequence_length`` up to the cut.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, seed: int) -> None:
        if len(tokens) <= sequence_length:
            raise ValueError(f"{len(tokens)} tokens are too few for sequence_length {sequence_length}")
        self._tokens, self._length, self._seed = tokens, sequence_length, seed
        self.windows = len(tokens) // sequence_length
        self._epoch = -1
        self._starts: NDArray[np.int64] = np.empty(0, np.int64)

    def __call__(self, first_sample: int, count: int) -> torch.Tensor:
        """Samples `first_sample` and following: (count, sequence_length + 1) tokens, int64."""
        starts = np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(first_sample + done, self.windows)
            part = self._epoch_starts(epoch)[place : place + count - done]
            starts[done : done + len(part)] = part
            done += len(part)
        where = (starts[:, None] + np.arange(self._length + 1)) % len(self._tokens)
        return torch.from_numpy(self._tokens[where].astype(np.int64))

    def _epoch_starts(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            random = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            cut = random.integers(len(self._tokens))
            self._starts = cut + self._length * random.permutation(self.windows)
            self._epoch = epoch
        return self._starts


def held_out_windows(tokens: Tokens, sequence_length: int, eval_tokens: int) -> torch.Tensor:
    """The first windows of the text, enough to predict `eval_tokens`, none twice.

    (windows, sequence_length + 1) tokens, int64; each begins with the last token that the one before predicts.
    """
    windows = math.ceil(eval_tokens / sequence_length)
    where = sequence_length * np.arange(windows)[:, None] + np.arange(sequence_length + 1)
    return torch.from_numpy(tokens[where].astype(np.int64))
