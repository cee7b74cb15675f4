"""What an epoch adds up to, whole and in parts."""

import pytest
import torch

from tinytl_hf.train import epoch_sums
from tinytl_hf.train.epoch_sums import PARTS, EpochSums


def sums_of(batches, before=(), start=0):
    """Sums of an epoch whose batch ``i`` of two images has loss ``i`` and one right answer, the last ones two."""
    sums = EpochSums(batches, torch.device("cpu"), before, 0)
    for i in range(start, batches):
        sums.add(i, torch.tensor(float(i)), torch.tensor([1.0, float(i >= batches // 2)]))
    return sums


def test_an_epoch_is_the_mean_of_its_parts():
    sums = [sums_of(40).parts.tolist()]
    assert epoch_sums.figures(sums) == {"loss": 19.5, "accuracy": 0.75}
    curve = epoch_sums.curve(sums)
    assert curve["loss"] == [0.5 + 2 * i for i in range(PARTS)]
    assert curve["accuracy"] == [0.5] * 10 + [1.0] * 10


@pytest.mark.parametrize("batches", [1, 3, 19, 21, 59])
def test_no_part_is_empty(batches):
    parts = sums_of(batches).parts
    assert len(parts) == min(batches, PARTS) and (parts[:, 2] >= 2).all() and parts[:, 2].sum() == 2 * batches


def test_a_checkpoint_goes_on_where_it_was():
    whole = sums_of(30).parts.tolist()
    half = EpochSums(30, torch.device("cpu"), (), 0)
    for i in range(17):
        half.add(i, torch.tensor(float(i)), torch.tensor([1.0, float(i >= 15)]))
    assert sums_of(30, before=[half.parts.tolist()], start=17).parts.tolist() == whole


def test_processes_add_up_by_their_images():
    one, two = [[6.0, 1.0, 2.0], [2.0, 2.0, 2.0]], [[0.0, 1.0, 1.0], [0.0, 0.0, 2.0]]
    assert epoch_sums.figures([one, two]) == {"loss": 8 / 7, "accuracy": 4 / 7}
    assert epoch_sums.curve([one, two]) == {"loss": [2.0, 0.5], "accuracy": [0.6667, 0.5]}
