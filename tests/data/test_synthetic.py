"""Synthetic samples: each a pure function of its number, and something to learn from them."""

import pytest
import torch

from pipetrain.data.synthetic import SyntheticBatches
from pipetrain.errors import ConfigError


def batches(split: str = "train", samples: int = 20, seed: int = 0, batch_size: int = 8) -> SyntheticBatches:
    return SyntheticBatches([3, 4, 4], 5, samples, split, batch_size=batch_size, seed=seed)


def test_a_batch_is_a_function_of_seed_split_and_number() -> None:
    (inputs,), targets = batches().batch(1)
    assert (inputs.shape, inputs.dtype, targets.shape, targets.dtype) == (
        (8, 3, 4, 4),
        torch.float32,
        (8,),
        torch.int64,
    )
    again = batches()
    again.batch(0)
    assert torch.equal(again.batch(1)[0][0], inputs)
    for other in (batches(seed=1), batches(split="valid")):
        assert not torch.equal(other.batch(1)[0][0], inputs)
    assert torch.equal(batches(batch_size=4).batch(2)[0][0], inputs[:4])  # the batch size only groups the samples


def test_epochs_drop_or_keep_the_rest() -> None:
    train, valid = batches(), batches("valid")
    assert (train.num_batches, train.rows(1), train.rows(2)) == (2, 8, 8)
    assert (valid.num_batches, valid.rows(2), len(valid.batch(2)[1])) == (3, 4, 4)
    assert torch.equal(train.batch(2)[0][0], train.batch(0)[0][0])


def test_what_is_learned_from_one_split_holds_in_the_other() -> None:
    """The nearest mean colour tells the class of far more samples than chance does."""
    (inputs,), targets = batches(samples=200, batch_size=200).batch(0)
    means = torch.stack([inputs[targets == c].mean((0, 2, 3)) for c in range(5)])
    (inputs,), targets = batches("valid", samples=100, batch_size=100).batch(0)
    guessed = torch.cdist(inputs.mean((2, 3)), means).argmin(1)
    assert float((guessed == targets).float().mean()) > 0.8
    assert set(targets.tolist()) == set(range(5))


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.samples=7 do not fill one batch of batch_size=8; use data.samples=8"):
        batches(samples=7)
