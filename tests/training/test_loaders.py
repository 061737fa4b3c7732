"""Batches: the same global batches for any number of workers, and exact weights of their shares."""

import numpy as np
import pytest
import torch

from robustft.data.base import Split
from robustft.errors import ConfigError
from robustft.training.loaders import Loader, rows

CPU = torch.device("cpu")


def make_split(count: int, *, writeable: bool = True) -> Split:
    images = np.arange(count * 4, dtype=np.uint8).reshape(count, 1, 2, 2)
    images.flags.writeable = writeable
    return Split(images, np.arange(count) % 3, np.arange(count) + 1000)


def test_one_epoch_yields_every_example_once_and_keeps_the_partial_batch() -> None:
    loader = Loader(make_split(10), batch_size=4, seed=0, device=CPU)
    batches = list(loader.epoch(0))
    assert [len(batch.ids) for batch in batches] == [4, 4, 2]
    assert len(loader) == 3
    ids = torch.cat([batch.ids for batch in batches])
    assert sorted(ids.tolist()) == list(range(1000, 1010))
    assert [batch.scale for batch in batches] == [1.0, 1.0, 1.0]


def test_inputs_are_the_rows_of_their_ids_in_zero_one() -> None:
    split = make_split(10)
    for batch in Loader(split, batch_size=3, seed=0, device=CPU).epoch(2):
        expected = torch.from_numpy(split.images[batch.ids.numpy() - 1000]).float() / 255
        assert torch.equal(batch.inputs, expected)
        assert torch.equal(batch.labels, torch.from_numpy(split.labels[batch.ids.numpy() - 1000]))


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        loader = Loader(make_split(30), batch_size=7, seed=seed, device=CPU)
        return torch.cat([batch.ids for batch in loader.epoch(epoch)]).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_workers_share_the_global_batches(world_size: int) -> None:
    split = make_split(11)
    whole = list(Loader(split, batch_size=4, seed=3, device=CPU).epoch(1))
    shares = [
        list(
            Loader(split, batch_size=4, seed=3, device=CPU, rank=rank, world_size=world_size).epoch(
                1
            )
        )
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [shares[rank][step] for rank in range(world_size)]
        real = [part for part in parts if part.count]
        assert sorted(i for part in real for i in part.ids.tolist()) == sorted(batch.ids.tolist())
        assert sum(part.count for part in parts) == len(batch.ids)
        # Every worker takes part in every step, also where the batch has fewer rows than workers.
        assert all(len(part.ids) == max(part.count, 1) for part in parts)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_mean_of_scaled_gradients_is_the_gradient_of_the_whole_batch(world_size: int) -> None:
    split = make_split(11)
    weight = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()

    def gradient(inputs: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        logits = inputs.double().flatten(1) @ weight.T
        loss = torch.nn.functional.cross_entropy(logits, labels) * scale
        return torch.autograd.grad(loss, weight)[0]

    loaders = [
        Loader(split, batch_size=4, seed=3, device=CPU, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    whole = Loader(split, batch_size=4, seed=3, device=CPU)
    for batch, *parts in zip(whole.epoch(0), *(loader.epoch(0) for loader in loaders), strict=True):
        expected = gradient(batch.inputs, batch.labels, 1.0)
        mean = sum(gradient(p.inputs, p.labels, p.scale) for p in parts) / world_size
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-14)


def test_read_only_arrays_are_read_without_a_warning_or_a_write() -> None:
    split = make_split(6, writeable=False)
    before = split.images.copy()
    for batch in Loader(split, batch_size=4, seed=0, device=CPU).epoch(0):
        batch.inputs.zero_()
    inputs, labels, ids = rows(split, np.array([5, 0]), device=CPU)
    assert ids.tolist() == [1005, 1000]
    assert labels.tolist() == [2, 0]
    assert torch.equal(inputs[1], torch.from_numpy(before[0]).float() / 255)
    assert np.array_equal(split.images, before)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="training split is empty"):
        Loader(make_split(0), batch_size=4, seed=0, device=CPU)
