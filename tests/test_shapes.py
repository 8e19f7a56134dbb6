"""images/shapes.py: the built-in set against geometry, and which random numbers it shares."""
import numpy as np
import pytest
import torch

from images import shapes


def test_shapes_cover_the_area_that_geometry_gives_them():
    """A shape drawn wrong: a hole, a missing arm, nothing at all. The unit is a radius."""
    sin, cos, sqrt, pi = np.sin, np.cos, np.sqrt, np.pi
    d, R, r = 0.45, 0.95, 0.75                  # the crescent: a disc less one beside it
    a = np.arccos((d * d + R * R - r * r) / (2 * d * R))
    b = np.arccos((d * d + r * r - R * R) / (2 * d * r))
    lens = R * R * (a - sin(a) * cos(a)) + r * r * (b - sin(b) * cos(b))
    triangle = 3 * sqrt(3) / 4
    area = {
        "disc": pi * 0.9 ** 2,
        "square": 1.56 ** 2,
        "triangle": triangle,
        "cross": 2 * 0.6 * 1.9 - 0.6 ** 2,
        "ring": pi * (0.92 ** 2 - 0.52 ** 2),
        "star": 5 * 0.45 * sin(pi / 5),
        "crescent": pi * R * R - lens,
        "hourglass": 4 * (0.15 * 0.9 + 0.75 * 0.9 ** 2 / 2),
        "tee": 1.7 * 0.54 + 0.54 * 1.6 - 0.54 * 0.27,
        "arrow": triangle * 0.85 * 0.65 + 0.44 * 1.1 - 0.44 * 0.125,
    }
    assert list(area) == list(shapes.SHAPES)
    grid = np.arange(-1.2, 1.2, 0.005)
    v, u = np.meshgrid(grid, grid, indexing="ij")
    for name, shape in shapes.SHAPES.items():
        covered = (shape(u, v) > 0).sum() * 0.005 ** 2
        assert covered == pytest.approx(area[name], rel=0.01), name


def test_images_of_two_classes_differ_exactly_where_the_shapes_differ():
    """With the same random numbers two classes share background, blobs and noise; a label that is
    not what was drawn fails."""
    def draw(shape):
        return shapes.draw_one(shape, np.random.default_rng(1), 32).astype(int)
    filled = draw(lambda u, v: 9 + 0 * u)       # inside everywhere
    empty = draw(lambda u, v: -9 + 0 * u)       # nowhere
    disc = draw(shapes.SHAPES["disc"])
    from_shape, from_ground = (disc == filled).all(axis=0), (disc == empty).all(axis=0)
    assert (from_shape | from_ground).mean() > 0.9              # the rest is the soft edge
    y, x = np.nonzero(from_shape & ~from_ground)
    assert len(y) > 0.05 * 32 * 32
    assert np.hypot(y - y.mean(), x - x.mean()).max() < 0.5 * 32


def test_every_call_draws_the_same_and_a_classs_first_images_at_every_count():
    """A data set that changes between runs, or test images that move into training with --imb."""
    images, labels = shapes.draw_shapes([5] * 10, 0)
    again, _ = shapes.draw_shapes([5] * 10, 0)
    assert torch.equal(images, again) and images.dtype == torch.uint8
    assert labels.tolist() == np.repeat(np.arange(10), 5).tolist()
    fewer, fewer_labels = shapes.draw_shapes([4, 3, 3, 2, 2, 2, 1, 1, 1, 1], 0)
    for k in range(10):
        part = fewer[fewer_labels == k]
        assert len(part) > 0 and torch.equal(part, images[labels == k][:len(part)])


def test_no_two_images_share_pixels_and_so_no_test_image_is_trained_on():
    """One stream of random numbers for both splits, or for two classes, would repeat whole images
    or their backgrounds."""
    images = torch.cat([shapes.draw_shapes([3] * 10, split)[0] for split in (0, 1)])    # (60,...)
    equal = (images[:, None] == images[None]).all(dim=2)
    fraction = equal.float().mean(dim=(2, 3))                   # (60,60), of equal pixels
    assert (fraction - torch.eye(60)).max() < 0.1


def test_drawing_leaves_the_global_generator_alone():
    """A data set that reseeds NumPy would give all runs and processes the same augmentation."""
    np.random.seed(123)
    before = np.random.get_state()[1].tolist()
    shapes.draw_shapes([1, 1], 0)
    assert np.random.get_state()[1].tolist() == before
