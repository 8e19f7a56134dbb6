r"""The built-in data set: ten shapes, drawn by code, so that nothing has to be downloaded.

A bright shape of random place, size, tilt and colour lies on a dark background of two colours,
among five blobs of any colour, under noise: uint8 images (N,3,32,32).
"""
import numpy as np
import torch

SHAPES_MAX = 1000       # training images of the largest class
SHAPES_TEST = 100       # test images per class


# ---- Shapes --------------------------------------------------------------------------------------
# Functions of coordinates u, v that say how far inside the shape a point lies (negative: outside).
# Shapes fill about the unit circle; v points down.

def bar(u, v, half_width, half_height):
    return np.minimum(half_width - np.abs(u), half_height - np.abs(v))


def polygon(u, v, n):
    """Regular, n corners on the unit circle, one of them at the top."""
    theta = np.arctan2(u, -v) % (2 * np.pi / n) - np.pi / n     # from the middle of a side
    return np.cos(np.pi / n) - np.hypot(u, v) * np.cos(theta)


def disc(u, v):
    return 0.9 - np.hypot(u, v)


def square(u, v):
    return bar(u, v, 0.78, 0.78)


def triangle(u, v):
    return polygon(u, v, 3)


def cross(u, v):
    return np.maximum(bar(u, v, 0.3, 0.95), bar(u, v, 0.95, 0.3))


def ring(u, v):
    return 0.2 - np.abs(np.hypot(u, v) - 0.72)


def star(u, v, points=5, inner=0.45):
    theta = (np.arctan2(u, -v) + np.pi / points) % (2 * np.pi / points) - np.pi / points
    theta = np.abs(theta)                                       # from the nearest tip
    x, y = np.hypot(u, v) * np.cos(theta), np.hypot(u, v) * np.sin(theta)
    tip = np.array([1.0, 0.0])
    notch = inner * np.array([np.cos(np.pi / points), np.sin(np.pi / points)])
    edge = notch - tip
    return -(edge[0] * (tip[1] - y) - (tip[0] - x) * edge[1]) / np.hypot(*edge)


def crescent(u, v):
    return np.minimum(0.95 - np.hypot(u, v), np.hypot(u - 0.45, v) - 0.75)


def hourglass(u, v):
    return np.minimum(0.9 - np.abs(v), 0.15 + 0.75 * np.abs(v) - np.abs(u))


def tee(u, v):
    return np.maximum(bar(u, v + 0.65, 0.85, 0.27), bar(u, v - 0.15, 0.27, 0.8))


def arrow(u, v):
    tip = polygon(u / 0.85, (v + 0.35) / 0.65, 3) * 0.65
    return np.maximum(bar(u, v - 0.4, 0.22, 0.55), tip)


# In the order of the training counts: "disc" is the most frequent class, "arrow" the rarest.
SHAPES = {
    "disc": disc, "square": square, "triangle": triangle, "cross": cross, "ring": ring,
    "star": star, "crescent": crescent, "hourglass": hourglass, "tee": tee, "arrow": arrow,
}


# ---- Drawing -------------------------------------------------------------------------------------

def paint(image, inside, color):
    """Paint (H,W,3) where `inside` (H,W), in pixels from the edge, is positive; edges are soft."""
    cover = np.clip(inside + 0.5, 0, 1)[..., None]
    return image * (1 - cover) + color * cover


def paint_blob(image, x, y, rng):
    """An ellipse of random place, size, tilt and colour."""
    size = len(image)
    dx, dy = x - rng.uniform(0, size), y - rng.uniform(0, size)
    dx, dy = rotate(dx, dy, rng.uniform(0, np.pi))
    radius = rng.uniform(1, 3)
    inside = radius - np.hypot(dx, dy / rng.uniform(0.3, 1))
    return paint(image, inside, rng.random(3))


def rotate(x, y, angle):
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def draw_one(shape, rng, size):
    """One image of a shape, uint8 (3,size,size)."""
    y, x = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5, indexing="ij")
    color = rng.uniform(0.5, 1, 3)                              # bright on dark, any hue
    left, right = rng.uniform(0, 0.5, (2, 3))
    along, _ = rotate(x - size / 2, y - size / 2, rng.uniform(0, 2 * np.pi))
    mix = np.clip(along / size + 0.5, 0, 1)[..., None]          # background: a gradient
    image = left * (1 - mix) + right * mix
    for _ in range(4):
        image = paint_blob(image, x, y, rng)
    radius = size * rng.uniform(0.28, 0.42)
    cx, cy = rng.uniform(0.9 * radius, size - 0.9 * radius, 2)
    tilt = np.deg2rad(rng.uniform(-30, 30))
    u, v = rotate((x - cx) / radius, (y - cy) / radius, tilt)
    image = paint(image, shape(u, v) * radius, color)
    image = paint_blob(image, x, y, rng)                        # may cover a part of the shape
    image = image + rng.normal(0, 0.06, image.shape)
    image = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    return image.transpose(2, 0, 1)


def draw_shapes(counts, split, size=32):
    """Draw counts[k] images of shape k -> (uint8 (N,3,size,size), labels (N,) array).

    The same call gives the same images. split 0 (training) and 1 (test) draw from different
    streams, and the first images of a class are the same whatever its count.
    """
    images, labels = [], []
    for k, (n, shape) in enumerate(zip(counts, SHAPES.values())):
        rng = np.random.default_rng([split, k])
        images += [draw_one(shape, rng, size) for _ in range(n)]
        labels += [k] * n
    return torch.from_numpy(np.stack(images)), np.array(labels, np.int64)
