"""The order of training, and what is validated on."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pretrain.data.batches import Batches, held_out_windows


def numbered(count):
    return np.arange(count, dtype=np.uint16)


@given(st.integers(1, 9), st.integers(1, 100), st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_predicts_each_token_once(length, more, seed, epoch):
    """Guards against tokens that are trained on twice or never; the few that do not fill a window are together."""
    count = length + more
    batches = Batches(numbered(count), length, seed)
    windows = batches(epoch * batches.windows, batches.windows)
    assert windows.dtype == torch.int64
    assert windows.shape == (count // length, length + 1)
    assert ((windows[:, 1:] - windows[:, :-1]) % count == 1).all(), "a window is not consecutive text"
    predicted = sorted(windows[:, 1:].flatten().tolist())
    assert len(predicted) == len(set(predicted)) == count - count % length
    left = set(range(count)) - set(predicted)
    assert sum((token + 1) % count not in left for token in left) == bool(left), (
        "what is left is not together"
    )


def test_each_epoch_and_each_seed_has_its_own_order_and_cuts():
    """Guards against an epoch that repeats the last one, and windows that always begin at the same tokens."""
    batches = Batches(numbered(4003), 40, 0)
    epochs = [batches(i * 100, 100)[:, 0] for i in range(3)] + [Batches(numbered(4003), 40, 1)(0, 100)[:, 0]]
    assert len({tuple(starts.tolist()) for starts in epochs}) == 4
    assert len({starts.min().item() for starts in epochs}) == 4
    assert all((starts.diff().abs() > 40).float().mean() > 0.9 for starts in epochs), "windows come in order"


@given(st.lists(st.integers(1, 40), max_size=12))
def test_order_does_not_depend_on_batches_before(counts):
    """Guards against micro-batches, other batch sizes or a resumed run that see other text."""
    tokens = numbered(100)
    whole, parts = Batches(tokens, 7, 3), Batches(tokens, 7, 3)
    total = sum(counts)
    found = [parts(sum(counts[:i]), count) for i, count in enumerate(counts)]
    expected = whole(0, total)
    assert torch.equal(torch.cat([expected[:0], *found]), expected)
    if total:  # resumed: no sample was asked for before
        assert torch.equal(Batches(tokens, 7, 3)(total - 1, 1), expected[-1:])


def test_order_stays_what_it_was():
    """Guards against a change that makes a resumed run go on with other text."""
    assert Batches(numbered(20), 4, 5)(3, 4).tolist() == [
        [5, 6, 7, 8, 9],
        [13, 14, 15, 16, 17],
        [10, 11, 12, 13, 14],  # the second epoch
        [2, 3, 4, 5, 6],
    ]


@given(st.integers(1, 9), st.integers(1, 60))
def test_held_out_windows_predict_the_first_tokens_once(length, eval_tokens):
    """Guards against a validation that counts tokens twice or leaves some out."""
    windows = held_out_windows(numbered(100), length, eval_tokens)
    assert windows.dtype == torch.int64
    predicted = windows[:, 1:].flatten()
    assert torch.equal(predicted, torch.arange(1, len(predicted) + 1))
    assert torch.equal(windows[:, :-1] + 1, windows[:, 1:])
    assert eval_tokens <= len(predicted) < eval_tokens + length


def test_too_little_text_for_a_window():
    with pytest.raises(ValueError, match="8 tokens are too few for sequence_length 8"):
        Batches(numbered(8), 8, 0)
