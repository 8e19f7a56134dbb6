r"""data_lt.py against the published numbers, counting, and small image folders whose pixels are known."""
import pickle

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar
from PIL import Image

import data_lt
from data_lt import DataError

SETS = {"cifar10": (5000, 10), "cifar100": (500, 100)}


# ---- Counts and groups ---------------------------------------------------------------------------------------------------

def test_cifar10_counts_are_the_published_ones():
    assert data_lt.long_tailed_counts(5000, 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert data_lt.long_tailed_counts(5000, 10, 50) == [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
    assert data_lt.long_tailed_counts(5000.0, 10, 100, "step") == [5000] * 5 + [50] * 5


def test_cifar100_counts_are_the_published_ones():
    """Rounding instead of cutting off, or K instead of K - 1 in the exponent, already changes the second number."""
    c100, c50 = data_lt.long_tailed_counts(500, 100, 100), data_lt.long_tailed_counts(500, 100, 50)
    assert c100[:6] == [500, 477, 455, 434, 415, 396] and c100[-6:] == [6, 6, 5, 5, 5, 5]
    assert [c100[k] for k in (35, 36, 70, 71)] == [98, 93, 19, 18]
    assert c50[:6] == [500, 480, 462, 444, 426, 410] and c50[-6:] == [12, 11, 11, 10, 10, 10]
    assert [c50[k] for k in (35, 36, 70, 71)] == [125, 120, 31, 30]
    assert data_lt.long_tailed_counts(500, 100, 100, "step") == [500] * 50 + [5] * 50


@pytest.mark.parametrize("dataset, totals", [
    ("cifar10", {1: 50000, 10: 20431, 20: 17023, 50: 13996, 100: 12406, 200: 11203}),
    ("cifar100", {1: 50000, 10: 19573, 20: 15907, 50: 12608, 100: 10847, 200: 9502})])
def test_totals_at_other_imbalances_are_the_published_ones(dataset, totals):
    for imb, total in totals.items():
        assert sum(data_lt.long_tailed_counts(*SETS[dataset], imb)) == total


@pytest.mark.parametrize("imb", [0, 0.5, -100, float("nan")])
def test_an_imbalance_below_one_is_refused(imb):
    """0.01, the published spelling of 100, would otherwise make the first class the rarest; NaN compares false with all."""
    with pytest.raises(DataError, match="at least 1"):
        data_lt.long_tailed_counts(5000, 10, imb)


def test_an_unknown_kind_of_imbalance_is_refused():
    with pytest.raises(DataError, match="exp or step, not 'steep'"):
        data_lt.long_tailed_counts(5000, 10, 100, "steep")


def test_published_groups_do_not_depend_on_the_imbalance():
    for imb in (1, 50, 100):
        for dataset in ("cifar10", "shapes"):
            groups = data_lt.head_mid_tail(dataset, data_lt.long_tailed_counts(5000, 10, imb))
            assert groups == {"head": [0, 1, 2], "mid": [3, 4, 5, 6], "tail": [7, 8, 9]}
        groups = data_lt.head_mid_tail("cifar100", data_lt.long_tailed_counts(500, 100, imb))
        assert groups == {"head": [*range(36)], "mid": [*range(36, 71)], "tail": [*range(71, 100)]}


def test_other_sets_are_grouped_by_training_images():
    """More than 100 is head, 20 to 100 mid, less than 20 tail; also for a CIFAR name with another number of classes."""
    expected = {"head": [0, 1], "mid": [2, 3], "tail": [4, 5]}
    assert data_lt.head_mid_tail("folder", [500, 101, 100, 20, 19, 1]) == expected
    assert data_lt.head_mid_tail("cifar10", [500, 101, 100, 20, 19, 1]) == expected
    assert data_lt.head_mid_tail("folder", [50, 20]) == {"head": [], "mid": [0, 1], "tail": []}


# ---- Which images --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["class after class", "alternating"])
@pytest.mark.parametrize("dataset, published", [
    ("cifar10", {0: [398, 3833, 4836, 4572, 636], 1: [597, 332, 521, 3935, 4800], 9: [2204, 3816, 2206, 2507, 1926]}),
    ("cifar100", {0: [90, 254, 283, 445, 461], 1: [277, 307, 436, 88, 261], 99: [348, 153, 363, 361, 299]})])
def test_the_first_images_of_a_class_are_those_of_the_published_code(dataset, published, layout):
    """Positions within the class, from running the published code: another generator, seed or order of classes gives others."""
    n, K = SETS[dataset]
    labels = np.repeat(np.arange(K), n) if layout == "class after class" else np.tile(np.arange(K), n)
    counts = data_lt.long_tailed_counts(n, K, 100)
    kept = data_lt.long_tailed_indices(labels, counts)
    assert labels[kept].tolist() == np.repeat(np.arange(K), counts).tolist() and len(set(kept)) == sum(counts)
    for k, first in published.items():
        positions = np.flatnonzero(labels == k).tolist()
        assert [positions.index(i) for i in kept[labels[kept] == k][:5]] == first


@pytest.mark.parametrize("dataset", SETS)
def test_the_selection_for_100_lies_inside_that_for_50(dataset):
    """A generator used up by the number of images kept would break this, and with it comparisons between imbalances."""
    n, K = SETS[dataset]
    labels = np.repeat(np.arange(K), n)
    smaller, larger = (set(data_lt.long_tailed_indices(labels, data_lt.long_tailed_counts(n, K, imb))) for imb in (100, 50))
    assert smaller < larger


def test_selecting_and_drawing_leave_the_global_generators_alone():
    """The published code reseeds NumPy's global generator here, so that all seeds and ranks mix the same images."""
    np.random.seed(123), torch.manual_seed(123)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    data_lt.long_tailed_indices(np.repeat(np.arange(10), 50), [20] * 10)
    data_lt.draw_shapes([1, 1], 0)
    data_lt.shuffled(10, 0, 0), data_lt.repeated_augmentation(10, 0, 0), data_lt.class_balanced([0, 1], 0, 0)
    assert np.random.get_state()[1].tolist() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_asking_for_more_images_than_a_class_has_is_refused():
    with pytest.raises(DataError, match="class 1 has 3 images, 4 are needed"):
        data_lt.long_tailed_indices([0] * 5 + [1] * 3, [5, 4])


# ---- Order of an epoch ---------------------------------------------------------------------------------------------------

ORDERS = {
    "shuffled": lambda seed, epoch: data_lt.shuffled(1000, seed, epoch),
    "repeated_augmentation": lambda seed, epoch: data_lt.repeated_augmentation(1000, seed, epoch),
    "class_balanced": lambda seed, epoch: data_lt.class_balanced([0] * 900 + [1] * 100, seed, epoch),
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_depends_on_seed_and_epoch_and_on_nothing_else(name):
    """An epoch that is not set repeats the same images for the whole run; a global generator would end exact resuming."""
    order = ORDERS[name]
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 7), (7, 2)]
    first = [order(*key).tolist() for key in keys]
    torch.manual_seed(99), np.random.seed(99)
    assert [order(*key).tolist() for key in reversed(keys)] == first[::-1]
    assert len({tuple(o) for o in first}) == len(keys)


def test_shuffled_shows_every_image_once():
    assert sorted(data_lt.shuffled(1000, 3, 4).tolist()) == list(range(1000))


@pytest.mark.parametrize("n, distinct", [(12406, 4096), (13996, 4608), (10847, 3584), (12608, 4182), (256, 86), (511, 86)])
def test_repeated_augmentation_shows_the_published_number_of_distinct_images_three_times_in_a_row(n, distinct):
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


def test_class_balanced_draws_every_class_and_every_image_of_a_class_equally_often():
    """Weights 1 / n_k applied to classes instead of images, or draws without replacement, would keep the long tail."""
    labels = np.array([0] * 200 + [1] * 20_000 + [2] * 2000)              # not in order of count
    drawn = data_lt.class_balanced(labels, 0, 0).numpy()
    assert len(drawn) == len(labels)
    assert np.bincount(labels[drawn]) / len(drawn) == pytest.approx([1 / 3] * 3, abs=0.01)            # a deviation is 0.0032
    rarest = np.bincount(drawn, minlength=200)[:200]                      # 37 each, a deviation is 6
    assert rarest.min() > 15 and rarest.max() < 65


@pytest.mark.parametrize("n", [7, 100, 257])
@pytest.mark.parametrize("batch", [8, 100, 1024])
def test_processes_together_see_exactly_the_batches_of_one_process(n, batch):
    """A sample seen twice or never, batches that shift between processes, or a tiny last batch."""
    order = data_lt.shuffled(n, 0, 0)
    whole = data_lt.shard(order, batch)
    assert torch.equal(torch.cat(whole), order)
    sizes = [len(b) for b in whole]
    assert len(whole) == data_lt.steps_per_epoch(n, batch) == (n + batch - 1) // batch
    assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1
    for world in (2, 3, 4):
        parts = [data_lt.shard(order, batch, rank, world) for rank in range(world)]
        assert {len(p) for p in parts} == {len(whole)}
        for step, everything in enumerate(whole):
            pieces = [p[step].tolist() for p in parts]
            assert sorted(sum(pieces, [])) == sorted(everything.tolist())
            assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_a_batch_too_small_for_the_processes_is_refused():
    """An empty share would divide by zero on one process while the others wait for it."""
    with pytest.raises(data_lt.DataError, match="batch of 4 is too small for 4 processes"):
        data_lt.shard(torch.arange(9), 4, 0, 4)


# ---- The built-in set ----------------------------------------------------------------------------------------------------

def test_shapes_cover_the_area_that_geometry_gives_them():
    """A shape drawn wrong: a hole, a missing arm, nothing at all. Points of a fine grid are counted; the unit is a radius."""
    sin, cos, sqrt, pi = np.sin, np.cos, np.sqrt, np.pi
    d, R, r = 0.45, 0.95, 0.75                                            # the crescent: a disc less one beside it
    a, b = np.arccos((d * d + R * R - r * r) / (2 * d * R)), np.arccos((d * d + r * r - R * R) / (2 * d * r))
    lens = R * R * (a - sin(a) * cos(a)) + r * r * (b - sin(b) * cos(b))
    area = {
        "disc": pi * 0.9 ** 2, "square": 1.56 ** 2, "triangle": 3 * sqrt(3) / 4, "cross": 2 * 0.6 * 1.9 - 0.6 ** 2,
        "ring": pi * (0.92 ** 2 - 0.52 ** 2), "star": 5 * 0.45 * sin(pi / 5), "crescent": pi * R * R - lens,
        "hourglass": 4 * (0.15 * 0.9 + 0.75 * 0.9 ** 2 / 2), "tee": 1.7 * 0.54 + 0.54 * 1.6 - 0.54 * 0.27,
        "arrow": 3 * sqrt(3) / 4 * 0.85 * 0.65 + 0.44 * 1.1 - 0.44 * 0.125,
    }
    assert list(area) == list(data_lt.SHAPES)
    v, u = np.meshgrid(np.arange(-1.2, 1.2, 0.004), np.arange(-1.2, 1.2, 0.004), indexing="ij")
    for name, inside in data_lt.SHAPES.items():
        assert (inside(u, v) > 0).sum() * 0.004 ** 2 == pytest.approx(area[name], rel=0.01), name


def test_a_drawing_differs_from_one_of_another_class_exactly_where_the_shapes_differ():
    """With the same random numbers two classes share background, blobs and noise; a label that is not what was drawn fails."""
    everywhere, nowhere = lambda u, v: 9 + 0 * u, lambda u, v: -9 + 0 * u
    filled, empty, disc = (data_lt.draw_one(f, np.random.default_rng(1), 32).astype(int)
                           for f in (everywhere, nowhere, data_lt.SHAPES["disc"]))
    from_shape, from_ground = (disc == filled).all(axis=0), (disc == empty).all(axis=0)
    assert (from_shape | from_ground).mean() > 0.9                        # the rest is the soft edge
    y, x = np.nonzero(from_shape & ~from_ground)
    assert len(y) > 0.05 * 32 * 32 and np.hypot(y - y.mean(), x - x.mean()).max() < 0.5 * 32


def test_shapes_are_the_same_in_every_call_and_a_classs_first_images_at_every_count():
    images, labels = data_lt.draw_shapes([5] * 10, 0)
    again, _ = data_lt.draw_shapes([5] * 10, 0)
    fewer, fewer_labels = data_lt.draw_shapes([4, 3, 3, 2, 2, 2, 1, 1, 1, 1], 0)
    assert torch.equal(images, again) and labels.tolist() == np.repeat(np.arange(10), 5).tolist()
    for k in range(10):
        mine = fewer[fewer_labels == k]
        assert torch.equal(mine, images[labels == k][:len(mine)]) and len(mine) > 0


def test_no_two_pictures_share_pixels_and_so_no_test_picture_was_seen_in_training():
    """One stream of random numbers for both splits, or for two classes, would repeat whole pictures or their backgrounds."""
    pictures = torch.cat([data_lt.draw_shapes([3] * 10, split)[0] for split in (0, 1)])               # (60,3,32,32)
    same = (pictures[:, None] == pictures[None]).all(dim=2).float().mean(dim=(2, 3))                  # (60,60) share of pixels
    assert (same - torch.eye(60)).max() < 0.1


def test_the_built_in_set_has_the_counts_it_says_and_a_balanced_test_set(monkeypatch):
    monkeypatch.setattr(data_lt, "SHAPES_MAX", 60)                        # the real 1000 would take a second
    monkeypatch.setattr(data_lt, "SHAPES_TEST", 4)
    data = data_lt.load_data("shapes", 10)
    assert data.counts == data_lt.long_tailed_counts(60, 10, 10) == torch.bincount(data.train_labels).tolist()
    assert torch.bincount(data.test_labels).tolist() == [4] * 10
    assert torch.equal(data.train_images[data.train_labels == 9], data_lt.draw_shapes([1] * 9 + [6], 0)[0][9:])
    assert data.class_names == list(data_lt.SHAPES) and data.label == data.name == "shapes"
    assert data.groups == {"head": [0, 1, 2], "mid": [3, 4, 5, 6], "tail": [7, 8, 9]}


def test_to_moves_the_four_tensors_and_keeps_the_rest(monkeypatch):
    monkeypatch.setattr(data_lt, "SHAPES_MAX", 10), monkeypatch.setattr(data_lt, "SHAPES_TEST", 1)
    data = data_lt.load_data("shapes", 1)
    moved = data.to("meta")
    assert all(t.is_meta for t in (moved.train_images, moved.train_labels, moved.test_images, moved.test_labels))
    assert (moved.counts, moved.groups, moved.class_names) == (data.counts, data.groups, data.class_names)
    assert not data.train_images.is_meta and moved.num_classes == 10


# ---- Loading -------------------------------------------------------------------------------------------------------------

NAMES = [f"kind{k}" for k in range(1, 11)]                                # kind10 is last, though the alphabet puts it second


def pictures(n, seed):
    return np.random.RandomState(seed).randint(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def write_folder(root, split, images, labels, names=NAMES, kind="png"):
    """Image files root/split/<class>/<i>.<kind>, numbered within their class from 0 on, not zero-padded."""
    counts = [0] * len(names)
    for pixels, k in zip(images, labels):
        (root / split / names[k]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / split / names[k] / f"{counts[k]}.{kind}")
        counts[k] += 1


@pytest.fixture
def folder(tmp_path):
    """12 training and 2 test images of each of 10 classes."""
    write_folder(tmp_path, "train", pictures(120, 0), np.arange(120) % 10)
    write_folder(tmp_path, "test", pictures(20, 1), np.arange(20) % 10)
    return tmp_path


def published_selection(labels, counts):
    """As the published code writes it, with NumPy's global generator."""
    np.random.seed(0)
    kept = []
    for k, n in enumerate(counts):
        positions = np.where(labels == k)[0]
        np.random.shuffle(positions)
        kept.extend(positions[:n])
    return kept


def as_tensor(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def test_a_folder_loads_the_published_selection_of_its_images(folder):
    """Class 10 before class 2, file 10 before file 2, height and width or the colours exchanged, labels of other images."""
    data, labels = data_lt.load_data("cifar10", 4, data_dir=str(folder)), np.arange(120) % 10
    assert data.counts == [12, 10, 8, 7, 6, 5, 4, 4, 3, 3] == torch.bincount(data.train_labels).tolist()
    kept = published_selection(labels, data.counts)
    assert torch.equal(data.train_images, as_tensor(pictures(120, 0)[kept]))
    assert data.train_labels.tolist() == labels[kept].tolist()
    in_order = np.argsort(np.arange(20) % 10, kind="stable")
    assert torch.equal(data.test_images, as_tensor(pictures(20, 1)[in_order]))
    assert data.test_labels.tolist() == [k for k in range(10) for _ in range(2)]
    assert data.class_names == NAMES and (data.name, data.label) == ("cifar10", "CIFAR-10")
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64


def test_holding_images_out_of_cifar_leaves_the_test_set_alone(folder):
    """An image both trained and tested on, the real test set used, a share of the long tail in place of the whole class."""
    data, labels = data_lt.load_data("cifar10", 3, data_dir=str(folder), holdout=0.25), np.arange(120) % 10
    assert data.counts[0] == 9 and data.counts[-1] == 3 and torch.bincount(data.test_labels).tolist() == [3] * 10
    held = np.concatenate([np.where(labels == k)[0][9:] for k in range(10)])
    as_set = lambda images: {image.numpy().tobytes() for image in images}
    assert as_set(data.test_images) == as_set(as_tensor(pictures(120, 0)[held]))
    assert as_set(data.train_images) <= as_set(as_tensor(pictures(120, 0))) - as_set(data.test_images)
    assert data.label == "CIFAR-10 validation"


def write_torchvision(root, K, images, labels, test_images, test_labels, names):
    """The pickled files that torchvision unpacks from the original archives: a row is 1024 reds, greens, blues."""
    def write(file, images, labels):
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
        (root / file).write_bytes(pickle.dumps({"data": rows, "labels" if K == 10 else "fine_labels": labels.tolist(),
                                                "coarse_labels": [0] * len(labels)}))
    root = root / {10: "cifar-10-batches-py", 100: "cifar-100-python"}[K]
    root.mkdir()
    parts = np.array_split(np.arange(len(images)), 5 if K == 10 else 1)
    for i, part in enumerate(parts):
        write(f"data_batch_{i + 1}" if K == 10 else "train", images[part], labels[part])
    write("test_batch" if K == 10 else "test", test_images, test_labels)
    meta = ("batches.meta", "label_names") if K == 10 else ("meta", "fine_label_names")
    (root / meta[0]).write_bytes(pickle.dumps({meta[1]: names}))


@pytest.mark.parametrize("K, n, holdout", [(10, 12, None), (100, 3, None), (10, 12, 0.25)])
def test_torchvisions_files_and_a_folder_give_the_same_data(tmp_path, monkeypatch, K, n, holdout):
    """The order within a class is all that the selection may depend on; the colours must not be read as rows."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)               # the checksums
    names = [f"kind{k}" for k in range(K)]
    labels = np.random.RandomState(2).permutation(np.repeat(np.arange(K), n))
    train, test = (pictures(K * n, 3), labels), (pictures(K, 4), np.arange(K))
    (tmp_path / "files").mkdir()
    write_torchvision(tmp_path / "files", K, *train, *test, names)
    write_folder(tmp_path / "folder", "train", *train, names)
    write_folder(tmp_path / "folder", "test", *test, names)
    a, b = (data_lt.load_data(f"cifar{K}", 2, data_dir=str(tmp_path / d), holdout=holdout) for d in ("files", "folder"))
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    if not holdout:
        assert torch.equal(a.train_images, as_tensor(train[0][published_selection(labels, a.counts)]))
    assert (a.counts, a.class_names, a.groups, a.label) == (b.counts, b.class_names, b.groups, b.label)
    assert a.label == f"CIFAR-{K}" + " validation" * bool(holdout) and sum(a.counts) < K * n


def test_a_train_folder_is_read_instead_of_downloading_and_jpegs_are_labelled_as_a_copy(tmp_path):
    """Lossy copies must not pass for the published images in a table."""
    for split, n in (("train", 2), ("test", 1)):
        write_folder(tmp_path, split, pictures(10 * n, 5), np.arange(10 * n) % 10, kind="jpg")
    assert data_lt.load_data("cifar10", 1, data_dir=str(tmp_path)).label == "CIFAR-10 (JPEG copy)"


def test_step_imbalance_reaches_the_data(folder):
    assert data_lt.load_data("cifar10", 3, "step", str(folder)).counts == [12] * 5 + [4] * 5


def test_names_sort_naturally_and_never_fail():
    """Comparing a number with a word is an error in Python, and so is int("²"), although "²".isdigit()."""
    names = ["10", "2", "b", "a10", "a2", "a", "2b", "", "1.5", "1.10", "5²"]
    assert sorted(names, key=data_lt.natural) == ["", "1.5", "1.10", "2", "2b", "5²", "10", "a", "a2", "a10", "b"]


# ---- What a person can get wrong -----------------------------------------------------------------------------------------

def message(data_dir, dataset="cifar10", imb=1, kind="exp"):
    """The one line that load_data ends with."""
    with pytest.raises(DataError) as error:
        data_lt.load_data(dataset, imb, kind, str(data_dir))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_test_folder_is_named(folder):
    (folder / "test").rename(folder / "tests")
    assert message(folder) == f"there is no folder {folder / 'test'}"


def test_a_folder_without_classes_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    assert f"{tmp_path / 'train'} has no class folders" in message(tmp_path)


def test_an_empty_class_is_named(folder):
    for file in (folder / "train" / "kind3").iterdir():
        file.rename(file.with_suffix(".txt"))
    assert f"{folder / 'train' / 'kind3'} has no images" in message(folder)


def test_a_wrong_number_of_classes_is_named(folder):
    for split in ("train", "test"):
        (folder / split / "kind10").rename(folder / f"{split}-10")
    assert message(folder) == f"{folder / 'train'} has 9 class folders, 10 are expected"


def test_classes_that_differ_between_train_and_test_are_named(folder):
    (folder / "test" / "kind4").rename(folder / "test" / "sort4")
    assert message(folder) == f"train and test under {folder} have different classes: kind4, sort4"


@pytest.mark.parametrize("damage", ["not an image", "cut off"])
def test_an_image_that_cannot_be_read_is_named(folder, damage):
    """In a folder of 60,000 files a traceback from inside PIL helps nobody."""
    path = folder / "train" / "kind7" / "5.png"
    path.write_bytes(b"hello" if damage == "not an image" else path.read_bytes()[:900])
    assert message(folder).startswith(f"{path}: ")


def test_an_image_of_another_size_is_named_with_its_width_and_height(folder):
    path = folder / "test" / "kind2" / "1.png"
    Image.new("RGB", (40, 24)).save(path)
    assert message(folder).startswith(f"{path}: is 40x24, not 32x32")


def test_grey_and_transparent_images_are_read_as_colour(folder):
    Image.new("L", (32, 32), 90).save(folder / "test" / "kind1" / "0.png")
    Image.new("RGBA", (32, 32), (1, 2, 3, 0)).save(folder / "test" / "kind1" / "1.png")
    test = data_lt.load_data("cifar10", 1, data_dir=str(folder)).test_images
    assert (test[0] == 90).all() and test[1, :, 5, 6].tolist() == [255, 255, 255]           # transparent: on white


def test_a_class_with_too_few_images_is_refused(folder):
    for i in range(6):
        (folder / "train" / "kind2" / f"{i}.png").unlink()
    assert "class 1 has 6 images, 11 are needed" in message(folder)


@pytest.mark.parametrize("dataset", ["cifar10", "shapes"])
def test_an_imbalance_that_leaves_a_class_empty_is_refused(folder, dataset):
    assert "without a training image; lower --imb" in message(folder, dataset, imb=5000)


def test_an_unknown_data_set_is_refused(tmp_path):
    assert message(tmp_path, "mnist") == ("unknown data set 'mnist': choose one of cifar10, cifar100, shapes, "
                                          "folder, imagenet_lt, inat18")


def test_a_download_that_fails_says_where_to_put_the_files(tmp_path, monkeypatch):
    """The usual first run on a machine without a network."""
    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    text = message(tmp_path / "nothing", "cifar100")
    assert f"CIFAR-100 is not under {tmp_path / 'nothing'}" in text and "no network" in text and "--data-dir" in text
