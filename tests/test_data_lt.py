"""data_lt.py against the published numbers and counting."""
import numpy as np
import pytest
import torch

import data_lt
from engine.groups import group_classes
from data_lt import DataError
from images import shapes

SETS = {"cifar10": (5000, 10), "cifar100": (500, 100)}          # n_max, K


# ---- Counts and groups ---------------------------------------------------------------------------

def test_cifar10_counts_are_the_published_ones():
    counts = data_lt.long_tailed_counts
    assert counts(5000, 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert counts(5000, 10, 50) == [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
    assert counts(5000.0, 10, 100, "step") == [5000] * 5 + [50] * 5


def test_cifar100_counts_are_the_published_ones():
    """Rounding instead of truncating, or K instead of K - 1 in the exponent, already changes the
    second number."""
    c100 = data_lt.long_tailed_counts(500, 100, 100)
    c50 = data_lt.long_tailed_counts(500, 100, 50)
    assert c100[:6] == [500, 477, 455, 434, 415, 396] and c100[-6:] == [6, 6, 5, 5, 5, 5]
    assert [c100[k] for k in (35, 36, 70, 71)] == [98, 93, 19, 18]
    assert c50[:6] == [500, 480, 462, 444, 426, 410] and c50[-6:] == [12, 11, 11, 10, 10, 10]
    assert [c50[k] for k in (35, 36, 70, 71)] == [125, 120, 31, 30]
    assert data_lt.long_tailed_counts(500, 100, 100, "step") == [500] * 50 + [5] * 50
    assert data_lt.long_tailed_counts(49, 2, 49) == [49, 1]             # 49 * (1 / 49) < 1


@pytest.mark.parametrize("dataset, totals", [
    ("cifar10", {1: 50000, 10: 20431, 20: 17023, 50: 13996, 100: 12406, 200: 11203}),
    ("cifar100", {1: 50000, 10: 19573, 20: 15907, 50: 12608, 100: 10847, 200: 9502})])
def test_totals_at_other_imbalances_are_the_published_ones(dataset, totals):
    for imb, total in totals.items():
        assert sum(data_lt.long_tailed_counts(*SETS[dataset], imb)) == total


@pytest.mark.parametrize("imb", [0, 0.5, -100, float("nan")])
def test_an_imbalance_below_one_is_refused(imb):
    """0.01, the published spelling of 100, would make the first class the rarest; NaN compares
    false with everything."""
    with pytest.raises(DataError, match="at least 1"):
        data_lt.long_tailed_counts(5000, 10, imb)


def test_an_unknown_kind_of_imbalance_is_refused():
    with pytest.raises(DataError, match="exp or step, not 'steep'"):
        data_lt.long_tailed_counts(5000, 10, 100, "steep")


@pytest.mark.parametrize("kind", ["exp", "step"])
def test_an_imbalance_that_leaves_a_class_empty_is_refused(kind):
    with pytest.raises(DataError, match="without a training image; lower --imb"):
        data_lt.long_tailed_counts(1000, 10, 5000, kind)


def test_published_groups_do_not_depend_on_the_imbalance():
    for imb in (1, 50, 100):
        for dataset in ("cifar10", "shapes"):
            counts = data_lt.long_tailed_counts(5000, 10, imb)
            groups = group_classes(dataset, counts)
            assert groups == {"head": [0, 1, 2], "mid": [3, 4, 5, 6], "tail": [7, 8, 9]}
        groups = group_classes("cifar100", data_lt.long_tailed_counts(500, 100, imb))
        assert groups == {"head": [*range(36)], "mid": [*range(36, 71)], "tail": [*range(71, 100)]}


# ---- Which images --------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["class after class", "alternating"])
@pytest.mark.parametrize("dataset, published", [
    ("cifar10", {0: [398, 3833, 4836, 4572, 636], 1: [597, 332, 521, 3935, 4800],
                 9: [2204, 3816, 2206, 2507, 1926]}),
    ("cifar100", {0: [90, 254, 283, 445, 461], 1: [277, 307, 436, 88, 261],
                  99: [348, 153, 363, 361, 299]})])
def test_the_first_images_of_a_class_are_those_of_the_published_code(dataset, published, layout):
    """Positions within the class, from running the published code: another generator, seed or
    order of classes gives others."""
    n, K = SETS[dataset]
    labels = np.repeat(np.arange(K), n)
    if layout == "alternating":
        labels = np.tile(np.arange(K), n)
    counts = data_lt.long_tailed_counts(n, K, 100)
    kept = data_lt.long_tailed_indices(labels, counts)
    assert labels[kept].tolist() == np.repeat(np.arange(K), counts).tolist()
    assert len(set(kept)) == sum(counts)
    for k, first in published.items():
        members = np.flatnonzero(labels == k).tolist()
        assert [members.index(i) for i in kept[labels[kept] == k][:5]] == first


@pytest.mark.parametrize("dataset", SETS)
def test_the_selection_for_100_lies_inside_that_for_50(dataset):
    """A generator advanced by the number of kept images would break this, and with it comparisons
    between imbalances."""
    n, K = SETS[dataset]
    labels = np.repeat(np.arange(K), n)
    smaller, larger = [
        set(data_lt.long_tailed_indices(labels, data_lt.long_tailed_counts(n, K, imb)))
        for imb in (100, 50)]
    assert smaller < larger


def test_selection_and_orders_leave_the_global_generators_alone():
    """The published code reseeds NumPy's global generator here, so that all seeds and ranks mix the
    same images."""
    np.random.seed(123)
    torch.manual_seed(123)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    data_lt.long_tailed_indices(np.repeat(np.arange(10), 50), [20] * 10)
    data_lt.shuffled(10, 0, 0)
    data_lt.repeated_augmentation(10, 0, 0)
    assert np.random.get_state()[1].tolist() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_asking_for_more_images_than_a_class_has_is_refused():
    with pytest.raises(DataError, match="class 1 has 3 images, 4 are needed"):
        data_lt.long_tailed_indices([0] * 5 + [1] * 3, [5, 4])


# ---- The order of an epoch -----------------------------------------------------------------------

@pytest.mark.parametrize("order", [data_lt.shuffled, data_lt.repeated_augmentation])
def test_an_order_depends_on_seed_and_epoch_and_on_nothing_else(order):
    """An epoch that is not used repeats the same order for the whole run; a global generator would
    end exact resuming."""
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 7), (7, 2)]
    first = [order(1000, *key).tolist() for key in keys]
    torch.manual_seed(99)
    np.random.seed(99)
    assert [order(1000, *key).tolist() for key in reversed(keys)] == first[::-1]
    assert len({tuple(o) for o in first}) == len(keys)


def test_shuffled_shows_every_image_once():
    assert sorted(data_lt.shuffled(1000, 3, 4).tolist()) == list(range(1000))


@pytest.mark.parametrize("n, distinct", [(12406, 4096), (13996, 4608), (10847, 3584), (12608, 4182),
                                         (256, 86), (511, 86)])
def test_repeated_augmentation_shows_the_published_number_of_images_three_times_in_a_row(n,
                                                                                       distinct):
    order = data_lt.repeated_augmentation(n, 0, 0)
    samples = n // 256 * 256
    assert len(order) == samples and len(set(order.tolist())) == distinct == -(-samples // 3)
    assert order.tolist() == [i for i in order[::3].tolist() for _ in range(3)][:samples]
    assert 0 <= order.min() and order.max() < n


@pytest.mark.parametrize("n", [1, 2, 30, 255])
def test_repeated_augmentation_of_fewer_than_256_images_is_not_empty(n):
    """The published sampler gives no batch at all here."""
    order = data_lt.repeated_augmentation(n, 0, 0).tolist()
    assert len(order) == n and len(set(order)) == -(-n // 3)


@pytest.mark.parametrize("n", [7, 100, 257])
@pytest.mark.parametrize("batch", [8, 100, 1024])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_all_parts_of_all_batches_have_one_size(n, batch, micro_batches):
    """An image never seen; batches that shift between processes; a size for which kernels and
    graphs are made again; a mean of processes whose parts count unequally."""
    order = data_lt.shuffled(n, 0, 0)
    steps = (n + batch - 1) // batch
    assert data_lt.steps_per_epoch(n, batch) == steps
    for world in (1, 2, 4):
        parts = [data_lt.shard(order, batch, rank, world, micro_batches) for rank in range(world)]
        together = torch.stack(parts, dim=2).flatten()
        assert torch.equal(together[:n], order)
        surplus = len(together) - n
        assert 0 <= surplus < steps * world * micro_batches
        assert together[n:].tolist() == (order.tolist() * 2)[:surplus]
        for part in parts:
            assert part.shape == (steps, len(together) // (steps * world))
            assert part.shape[1] % micro_batches == 0
    assert data_lt.shard(order, batch).shape[1] <= batch


def test_more_processes_than_images_have_one_each():
    """An empty part: a division by zero in one process, while the others wait for it."""
    assert [data_lt.shard(torch.arange(3), 4, rank, 4).tolist() for rank in range(4)] == [
        [[0]], [[1]], [[2]], [[0]]]


# ---- A data set ----------------------------------------------------------------------------------

@pytest.fixture
def few_shapes(monkeypatch):
    """The built-in set with 20 images of the largest class: the real 1000 would take a second."""
    monkeypatch.setattr(shapes, "SHAPES_MAX", 20)
    monkeypatch.setattr(shapes, "SHAPES_TEST", 2)
    return data_lt.load_shapes(10)


def test_the_built_in_set_has_the_counts_it_says_and_a_balanced_test_set(few_shapes):
    """Labels of other images; training images in the test set."""
    data = few_shapes
    assert data.counts == data_lt.long_tailed_counts(20, 10, 10)
    assert torch.bincount(data.train_labels).tolist() == data.counts and data.imb == 10
    assert torch.bincount(data.test_labels).tolist() == [2] * 10
    arrows = shapes.draw_shapes([1] * 9 + [2], 0)[0][9:]
    assert torch.equal(data.train_images[data.train_labels == 9], arrows)
    assert torch.equal(data.test_images, shapes.draw_shapes([2] * 10, 1)[0])
    assert data.class_names == list(shapes.SHAPES) and data.class_ids == list(range(10))
    assert data.label == data.name == "shapes"
    assert data.groups == {"head": [0, 1, 2], "mid": [3, 4, 5, 6], "tail": [7, 8, 9]}


def test_to_moves_the_four_tensors_and_keeps_the_rest(few_shapes):
    moved = few_shapes.to("meta")
    for tensor in (moved.train_images, moved.train_labels, moved.test_images, moved.test_labels):
        assert tensor.is_meta
    for name in ("counts", "groups", "class_names", "class_ids", "fingerprint", "num_classes"):
        assert getattr(moved, name) == getattr(few_shapes, name)
    assert not few_shapes.train_images.is_meta


def test_batches_pair_the_images_with_their_labels(few_shapes):
    """A resumed epoch begins at a later step: its number, images and labels belong together."""
    steps = list(enumerate(data_lt.shuffled(len(few_shapes.train_labels), 0, 1).split(20)))[2:]
    batches = list(few_shapes.batches(steps, (0, 1, 0)))
    assert [step for step, _, _ in batches] == [step for step, _ in steps]
    for (_, index), (_, images, labels) in zip(steps, batches):
        assert torch.equal(images, few_shapes.train_images[index])
        assert torch.equal(labels, few_shapes.train_labels[index])
