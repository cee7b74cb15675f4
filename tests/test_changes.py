"""Mixup, cutmix and TrivialAugment, and the loss of what they make."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch.utils._python_dispatch import TorchDispatchMode

from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.run import Config
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.data.changes import Changes, changing_epochs
from tinytl_hf.step import Loss, right_answers

IMAGES = 400


def make_changes(auto_augment="none", **options):
    train = TrainConfig(lr=1e-3, epochs=10, **options)
    return Changes(IMAGES, Config(data=DataConfig(auto_augment=auto_augment), train=train, seed=3))


def noise(count, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_the_last_fifth_of_the_epochs_sees_images_as_they_are():
    assert [changing_epochs(epochs) for epochs in (1, 2, 3, 5, 10, 16)] == [1, 2, 2, 4, 8, 13]
    changes = make_changes(mixup=0.2)
    acts = []
    for epoch in range(10):
        changes.set_epoch(epoch)
        acts.append(changes.acts)
    assert acts == [True] * 8 + [False] * 2
    assert make_changes().epochs == 0


def test_mixup_blends_neighbours_by_the_share_of_each_pair():
    changes, images, index = make_changes(mixup=0.4), noise(6), torch.tensor([5, 9, 0, 7, 2, 3])
    mixed, shares = changes.mix(images, index), changes.shares(index, 16)
    assert torch.equal(shares[0::2], shares[1::2]) and len(shares.unique()) == 3
    for i, partner in enumerate((1, 0, 3, 2, 5, 4)):
        torch.testing.assert_close(mixed[i], shares[i] * images[i] + (1 - shares[i]) * images[partner])


def test_shares_of_mixup_follow_their_beta_distribution():
    shares = make_changes(mixup=0.2).shares(torch.arange(IMAGES), 16)[::2]
    assert 0.42 < shares.mean() < 0.58  # 200 draws of variance 0.18: one standard error is 0.03
    assert ((shares < 0.1) | (shares > 0.9)).float().mean() == pytest.approx(0.68, abs=0.1)  # by Beta(0.2, 0.2)


def test_cutmix_puts_a_rectangle_of_the_neighbour_in_and_counts_its_pixels():
    changes, index = make_changes(cutmix=1.0), torch.arange(IMAGES)
    images = torch.zeros(IMAGES, 3, 16, 16)
    images[1::2] = 1.0
    mixed, shares = changes.mix(images, index), changes.shares(index, 16)
    assert set(mixed.unique().tolist()) == {0.0, 1.0}  # no blend
    torch.testing.assert_close(mixed[0::2].mean((1, 2, 3)), 1 - shares[0::2])
    torch.testing.assert_close(mixed[1::2], 1 - mixed[0::2])  # each has the other's
    for image in mixed[0::2, 0]:
        rows, columns = image.any(1), image.any(0)
        assert torch.equal(image.bool(), rows[:, None] & columns[None])
    assert 0.55 < shares.mean() < 0.75  # half the area on average, less what lies outside the image


def test_with_both_a_coin_decides_for_each_pair():
    images = torch.zeros(IMAGES, 3, 16, 16)
    images[1::2] = 1.0
    mixed = make_changes(mixup=1.0, cutmix=1.0).mix(images, torch.arange(IMAGES))[0::2]
    blended = ((mixed > 0) & (mixed < 1)).any((1, 2, 3) if torch.__version__ >= "2.2" else 3)
    assert 0.4 < blended.float().mean() < 0.6


def test_parts_of_a_batch_on_other_processes_are_mixed_as_in_the_whole():
    changes, images, index = make_changes(mixup=1.0, cutmix=1.0), noise(8), torch.randperm(8)
    whole = changes.mix(images, index)
    parts = [changes.mix(images[part], index[part]) for part in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(parts), whole)


def test_an_operation_depends_on_seed_epoch_and_image_alone_and_moves_no_other_draw():
    changes = make_changes("trivial")
    pixels = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)).expand(40, 3, 24, 24) * 255
    before = torch.get_rng_state()
    first = changes.operate(pixels, torch.arange(40))
    assert torch.equal(torch.get_rng_state(), before)
    part = changes.operate(pixels[:3], torch.tensor([7, 0, 31]))
    assert torch.equal(part, first[[7, 0, 31]])
    assert len(first.unique(dim=0)) > 20  # of 14 operations and 31 strengths
    changes.set_epoch(1)
    assert not torch.equal(changes.operate(pixels, torch.arange(40)), first)
    changes.set_epoch(0)
    assert torch.equal(changes.operate(pixels, torch.arange(40)), first)


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3], [-2.0, 1.0, 0.0], [1.0, 1.0, -1.0]])
LABELS = torch.tensor([0, 2, 1, 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_blend_counts_both_labels_by_their_shares(smoothing):
    changes, options = make_changes(mixup=1.0), TrainConfig(label_smoothing=smoothing)
    batch = {"labels": LABELS, "index": torch.tensor([8, 1, 4, 2])}
    shares = changes.shares(batch["index"], 16)[:, None]
    targets = shares * F.one_hot(LABELS, 3) + (1 - shares) * F.one_hot(LABELS[[1, 0, 3, 2]], 3)
    loss = Loss(options, LABELS, 3)(LOGITS, batch, 16, changes)
    torch.testing.assert_close(loss, F.cross_entropy(LOGITS, targets, label_smoothing=smoothing))


def test_an_answer_on_a_blend_is_as_right_as_the_share_of_its_label():
    changes, batch = make_changes(mixup=1.0), {"labels": LABELS, "index": torch.tensor([8, 1, 4, 2])}
    shares = changes.shares(batch["index"], 16)
    right = right_answers(LOGITS, batch, 16, changes)  # the answers are 0, 2, 1 and 0, all of the image's own label
    torch.testing.assert_close(right, shares)
    swapped = right_answers(LOGITS[[1, 0, 3, 2]], batch, 16, changes)  # and here of its neighbour's
    torch.testing.assert_close(swapped, 1 - shares)
    assert right_answers(torch.eye(3)[[1, 1, 0, 1]], batch, 16, changes).tolist()[:2] == [0, 0]
    changes.set_epoch(9)
    assert right_answers(LOGITS, batch, 16, changes).tolist() == [1, 1, 1, 1]


def test_balanced_classes_weigh_alike_whatever_their_number_of_images():
    labels = torch.tensor([0] * 6 + [1] * 2 + [3] * 1)  # and none of class 2
    loss = Loss(TrainConfig(class_weights="balanced"), labels, 4)
    expected = compute_class_weight("balanced", classes=torch.tensor([0, 1, 3]).numpy(), y=labels.numpy())
    torch.testing.assert_close(loss.weights[[0, 1, 3]].double(), torch.tensor(expected))
    logits, changes = torch.zeros(9, 4), make_changes()
    of_class = [
        float(loss(logits[labels == c], {"labels": labels[labels == c]}, 16, changes) * (labels == c).sum())
        for c in (0, 1, 3)
    ]
    assert of_class == pytest.approx([of_class[0]] * 3)
    halves = [loss(logits[part], {"labels": labels[part]}, 16, changes) for part in (slice(0, 4), slice(4, 8))]
    whole = loss(logits[:8], {"labels": labels[:8]}, 16, changes)
    torch.testing.assert_close(sum(halves) / 2, whole)  # as processes average their gradients


class Moves(TorchDispatchMode):
    """Counts what is copied to another device or type."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.aten._to_copy.default
        return operation(*args, **(kwargs or {}))


def test_weights_of_classes_go_to_a_device_once_as_each_time_would_wait_for_it():
    labels, changes = torch.tensor([0, 0, 1, 2]), make_changes()
    loss, batch = Loss(TrainConfig(class_weights="balanced"), labels, 3), {"labels": labels.to("meta")}
    logits = torch.zeros(4, 3, device="meta")
    with Moves() as moves:
        for _ in range(3):
            assert loss(logits, batch, 16, changes).device.type == "meta"
    assert moves.count == 1
