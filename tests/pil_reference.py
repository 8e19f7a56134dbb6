"""For several test files: pictures, PIL's version of every operation, statistical checks."""
import math
import random

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from images import operations

FILL = (124, 116, 104)                          # 255 times ImageNet's mean, rounded
GRAY = (128, 128, 128)
AUTO = {"fill": GRAY, "nearest": True}          # how AutoAugment applies its operations
NEAREST, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BICUBIC


# ---- Pictures: uint8 (n,3,h,w) -------------------------------------------------------------------

def noise(n, h=32, w=32, low=0, high=255):
    return torch.randint(low, high + 1, (n, 3, h, w), dtype=torch.uint8)


def smooth(n, h=32, w=32):
    """A few slow waves, on which all bicubic kernels nearly agree."""
    y, x = torch.arange(h).view(h, 1), torch.arange(w)
    draws = torch.rand(3, n, 3, 1, 1)
    fx, fy, phase = draws * torch.tensor([0.08, 0.08, 6]).view(3, 1, 1, 1, 1) + 0.03
    return (127.5 + 120 * torch.sin(fx * x + fy * y + phase)).to(torch.uint8)


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pil(picture):
    """PIL picture -> uint8 (3,H,W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def difference(ours, theirs):
    return ours.int() - theirs.int()


def apply_one(name, images, values, **how):
    """The operation `name` for all images, with values[i] for image i."""
    op = torch.full((len(images),), operations.ID[name])
    return operations.apply_operations(images, op, torch.tensor(values).float(), **how)


def every_pair(pictures, values):
    """Every picture with every value: (pictures, values) of the same length."""
    return pictures.repeat_interleave(len(values), dim=0), list(values) * len(pictures)


# ---- The same operations in PIL ------------------------------------------------------------------

def by_value(function):
    """PIL operation that maps each of the 256 values by function(value, argument)."""
    return lambda im, a: im.point([function(value, a) for value in range(256)] * 3)


def pil_posterize(im, bits):
    if bits == 0:                               # refused by PIL; its older versions made it black
        return im.point([0] * 768)
    return ImageOps.posterize(im, int(bits))


FACTORS = [0.0, 0.1, 0.19, 0.7, 1.0, 1.37, 1.81, 1.9, 3.0]
EXACT = {                                       # operation: (the same in PIL, arguments to try)
    "invert": (lambda im, a: ImageOps.invert(im), [0]),
    "autocontrast": (lambda im, a: ImageOps.autocontrast(im), [0]),
    "equalize": (lambda im, a: ImageOps.equalize(im), [0]),
    "posterize": (pil_posterize, range(9)),
    "solarize": (lambda im, a: ImageOps.solarize(im, a), [0, 1, 26, 128, 199.1, 255, 256]),
    "solarize_add": (by_value(lambda value, a: min(255, value + int(a)) if value < 128 else value),
                     [0, 1, 99, 110, 128]),
    "color": (lambda im, a: ImageEnhance.Color(im).enhance(a), FACTORS),
    "contrast": (lambda im, a: ImageEnhance.Contrast(im).enhance(a), FACTORS),
    "brightness": (lambda im, a: ImageEnhance.Brightness(im).enhance(a), FACTORS),
    "sharpness": (lambda im, a: ImageEnhance.Sharpness(im).enhance(a), FACTORS),
}


def by_matrix(matrix):
    """PIL operation by timm's affine matrix(argument, w, h)."""
    def operation(im, a, **how):
        return im.transform(im.size, Image.Transform.AFFINE, matrix(a, *im.size), **how)
    return operation


SHEARS = [-0.3, -0.27, -0.05, 0, 0.07, 0.27, 0.3]
SHIFTS = [sign * 150 / 331 * k / 9 for k in range(10) for sign in (1, -1)]
SHIFTS += [-0.45, -0.405, -0.11, 0.07, 0.405, 0.45]
AFFINE = {
    "rotate": (lambda im, a, **how: im.rotate(a, **how), [-30, -27, -3, 3, 13, 27, 30]),
    "shear_x": (by_matrix(lambda a, w, h: (1, a, 0, 0, 1, 0)), SHEARS),
    "shear_y": (by_matrix(lambda a, w, h: (1, 0, 0, a, 1, 0)), SHEARS),
    "translate_x": (by_matrix(lambda a, w, h: (1, 0, a * w, 0, 1, 0)), SHIFTS),
    "translate_y": (by_matrix(lambda a, w, h: (1, 0, 0, 0, 1, a * h)), SHIFTS),
}


# ---- Statistics ----------------------------------------------------------------------------------

def as_expected(count, n, p):
    """Is each count of n draws within five standard deviations (and one draw) of n p?"""
    count, p = torch.as_tensor(count).double(), torch.as_tensor(p).double()
    return bool(((count - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all())


def same_distribution(a, b):
    """Kolmogorov-Smirnov: do two samples differ by no more than chance explains (1 in 10^6)?"""
    a, b = (np.sort(np.asarray(v, dtype=float).round(4)) for v in (a, b))
    at = np.concatenate([a, b])
    frequency_a = np.searchsorted(a, at, side="right") / len(a)
    frequency_b = np.searchsorted(b, at, side="right") / len(b)
    largest = np.abs(frequency_a - frequency_b).max()
    return bool(largest < 2.7 * math.sqrt(1 / len(a) + 1 / len(b)))


# ---- What a function is called with --------------------------------------------------------------

def record(monkeypatch, module, name, instead=None):
    """Let module.name write down its arguments: the list of (arguments, keywords) that it fills.

    instead(*arguments): replaces the function.
    """
    calls, real = [], getattr(module, name)

    def recorder(*args, **keywords):
        calls.append((args, keywords))
        return (instead or real)(*args, **keywords)
    monkeypatch.setattr(module, name, recorder)
    return calls


def draws_of(monkeypatch, module, n, policy, *args):
    """What a policy of `module` draws for n images, without doing it.

    Returns operations (n,calls), their arguments (n,calls), and the keywords of each call.
    """
    calls = record(monkeypatch, module, "apply_operations",
                   lambda images, op, value, **how: images)
    policy(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), *args)
    ops = torch.stack([op for (_, op, _), _ in calls], dim=1)
    values = torch.stack([value for (_, _, value), _ in calls], dim=1)
    return ops, values, [how for _, how in calls]


def seed_everything():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
