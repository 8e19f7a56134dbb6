r"""augment.py against PIL and torchvision image by image, and against the formulas in plain Python loops.

Colours are compared in levels, 255ths of the range. Everything is seeded, so that the frequencies below are the same in every
run; their tolerances are at least three standard deviations (or what corresponds to that for `distance`) wide.
"""
import itertools
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, RandomResizedCrop
from torchvision.transforms import functional as tv

import augment

H, W = 64, 48                                                             # not square: an exchange of the two sides would show
FILL, GREY = (124, 116, 104), (128, 128, 128)                             # 255 times ImageNet's mean, rounded; AutoAugment's
OPERATION = {operation.__name__: (operation, argument) for operation, argument in augment.RAND_AUGMENT}
AUTO = dict(augment.AUTO_AUGMENT_OPERATIONS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def noise(n, low=0, high=255, h=H, w=W):
    return torch.randint(low, high + 1, (n, 3, h, w), dtype=torch.uint8)


def smooth(n):
    """Pictures of a few slow waves, on which all bicubic kernels nearly agree: uint8 (n,3,H,W)."""
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    fx, fy, phase = torch.rand(3, n, 3, 1, 1, 1) * torch.tensor([0.08, 0.08, 6]).view(3, 1, 1, 1, 1, 1) + 0.03
    return (127.5 + 120 * torch.sin(fx * x + fy * y + phase)[:, :, 0]).to(torch.uint8)


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def levels(picture):
    """PIL picture -> float (3,H,W) in 0..255."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


def as_expected(count, n, p):
    """Whether each number of n draws is what its probability p says, to 4.5 standard deviations and one draw."""
    count, p = torch.as_tensor(count).double(), torch.as_tensor(p).double()
    return ((count - n * p).abs() <= 4.5 * (n * p * (1 - p)).sqrt() + 1).all()


def distance(a, b):
    """Kolmogorov-Smirnov: the largest difference of two samples' cumulative frequencies."""
    a, b = np.sort(np.asarray(a)), np.sort(np.asarray(b))
    at = np.concatenate([a, b])
    return np.abs(np.searchsorted(a, at, side="right") / len(a) - np.searchsorted(b, at, side="right") / len(b)).max()


# ---- RandAugment's operations --------------------------------------------------------------------------------------------

FACTORS = [0.1, 0.19, 0.7, 1.0, 1.4, 1.81, 1.9]
COLOUR = {  # operation: (the same in PIL, arguments to try, levels by which 8-bit rounding inside PIL may differ)
    "autocontrast": (lambda im, v: ImageOps.autocontrast(im), [0], 1),
    "equalize": (lambda im, v: ImageOps.equalize(im), [0], 0),
    "invert": (lambda im, v: ImageOps.invert(im), [0], 0),
    "posterize": (lambda im, v: im.point([i >> (8 - int(v)) << (8 - int(v)) for i in range(256)] * 3), [0, 1, 2, 3, 4, 8], 0),
    "solarize": (lambda im, v: ImageOps.solarize(im, int(v)), [0, 1, 26, 128, 255, 256], 0),
    "solarize_add": (lambda im, v: im.point([min(255, i + int(v)) if i < 128 else i for i in range(256)] * 3),
                     [0, 1, 99, 110, 128], 0),
    "color": (lambda im, v: ImageEnhance.Color(im).enhance(v), FACTORS, 1.5),
    "contrast": (lambda im, v: ImageEnhance.Contrast(im).enhance(v), FACTORS, 1.5),
    "brightness": (lambda im, v: ImageEnhance.Brightness(im).enhance(v), FACTORS, 1),
    "sharpness": (lambda im, v: ImageEnhance.Sharpness(im).enhance(v), FACTORS, 1.5),
}


@pytest.mark.parametrize("name", COLOUR)
def test_a_colour_operation_does_to_every_image_what_pil_does(name):
    """Another formula, a wrong level at a threshold, or one image's argument or statistics used for another."""
    pictures = torch.cat([noise(2), noise(2, 40, 200), noise(1, 0, 60), noise(1, 97, 98), smooth(2)])
    pictures[0, 1], pictures[4, 2] = 77, 0                                # channels of one level
    pictures[3, 0], pictures[7, 2] = pictures[3, 0] // 2, pictures[7, 2] // 3                         # channels of other ranges
    pil, arguments, tolerance = COLOUR[name]
    for shift in range(len(arguments)):                                   # every picture meets every argument
        values = [float(arguments[(i + shift) % len(arguments)]) for i in range(len(pictures))]
        ours = OPERATION[name][0](augment.to_float(pictures), torch.tensor(values)) * 255
        for picture, value, result in zip(pictures, values, ours):
            assert (result - levels(pil(to_pil(picture), value))).abs().max() <= tolerance + 1e-3, value


def by_matrix(matrix):
    return lambda im, v, **kwargs: im.transform(im.size, Image.Transform.AFFINE, matrix(v), **kwargs)


AFFINE = {  # operation: (the same in PIL with timm's matrices, arguments to try)
    "rotate": (lambda im, v, **kwargs: im.rotate(v, **kwargs), [-30, -27, -3, 3, 13, 27, 30]),
    "shear_x": (by_matrix(lambda v: (1, v, 0, 0, 1, 0)), [-0.3, -0.27, -0.05, 0.05, 0.27, 0.3]),
    "shear_y": (by_matrix(lambda v: (1, 0, 0, v, 1, 0)), [-0.3, -0.27, -0.05, 0.05, 0.27, 0.3]),
    "translate_x": (by_matrix(lambda v: (1, 0, v * W, 0, 1, 0)), [-0.45, -0.405, -0.05, 0.05, 0.405, 0.45]),
    "translate_y": (by_matrix(lambda v: (1, 0, 0, 0, 1, v * H)), [-0.45, -0.405, -0.05, 0.05, 0.405, 0.45]),
}


@pytest.mark.parametrize("name, table, fill", [(n, OPERATION, FILL) for n in AFFINE] + [("shear_y", AUTO, GREY)])
def test_a_bicubic_operation_moves_every_image_as_pil_does(name, table, fill):
    """A wrong direction, amount, centre or fill colour. Half a pixel too far would be 4 to 9 levels on these pictures."""
    pil, values = AFFINE[name]
    pictures = smooth(len(values))
    ours = table[name][0](augment.to_float(pictures), torch.tensor(values, dtype=torch.float32)) * 255
    white, framed = Image.new("L", (W, H), 255), Image.new("L", (W, H), 0)
    framed.paste(255, (3, 3, W - 3, H - 3))
    for picture, value, result in zip(pictures, values, ours):
        inside = np.array(pil(framed, value)) > 0                         # comes from 3 pixels or more inside the picture
        outside = np.array(pil(white, value).filter(ImageFilter.MaxFilter(7))) == 0   # 3 pixels or more outside it
        theirs = levels(pil(to_pil(picture), value, resample=Image.Resampling.BICUBIC, fillcolor=fill))
        assert (result - theirs).abs().amax(dim=0)[inside].max() <= 2.5
        assert torch.equal(result.round().permute(1, 2, 0)[outside], torch.tensor(fill).expand(outside.sum(), 3).float())
        assert inside.mean() > 0.4 and (outside.any() or abs(value) in (3, 0.05))


@pytest.mark.parametrize("name", ["rotate", "translate_x", "translate_y"])
def test_a_nearest_operation_takes_the_pixels_that_pil_takes(name):
    """Interpolation, another fill, half a pixel of shift: on noise any of them changes nearly every pixel."""
    values = {"rotate": [30 * k / 9 for k in range(10)]}.get(name, [s * 150 / 331 * k / 9 for k in range(10) for s in (1, -1)])
    pictures = noise(len(values))
    ours = AUTO[name][0](augment.to_float(pictures), torch.tensor(values)) * 255
    for picture, value, result in zip(pictures, values, ours):
        theirs = levels(AFFINE[name][0](to_pil(picture), value, resample=Image.Resampling.NEAREST, fillcolor=GREY))
        differ = ((result - theirs).abs() > 0.01).any(dim=0).float().mean()
        assert differ <= (0.01 if name == "rotate" else 0), value         # a turned pixel may lie between two


@pytest.mark.parametrize("h, w", [(H, W), (3, 2)])
def test_blur_is_pils_gaussian_blur_with_its_own_sigma_for_every_image(h, w):
    """A wrong width, a border that is not repeated, rows blurred as columns, one sigma for all.

    PIL rounds to 8 bits after each of its six passes: on this noise up to 3 levels, 1.1 on average; none for a sigma of 0.
    """
    sigma = [0.0, 0.1, 0.3, 0.7, 1.0, 1.5, 2.0, 3.3, 5.0]
    pictures = noise(len(sigma), h=h, w=w)
    ours = augment.gaussian_blur(augment.to_float(pictures), torch.tensor(sigma)) * 255
    for picture, s, result in zip(pictures, sigma, ours):
        off = (result - levels(to_pil(picture).filter(ImageFilter.GaussianBlur(s)))).abs()
        assert off.max() < 3.5 * (s > 0) + 1e-3 and off.mean() < 1.2, s


def test_blurs_variance_is_sigma_squared():
    """The same without PIL: a white dot's image is symmetric, keeps its light, and has this variance along both sides."""
    sigma, at = torch.tensor([0.1, 0.5, 1.0, 2.0]), torch.arange(31.0) - 15
    dot = torch.zeros(4, 3, 31, 31)
    dot[:, :, 15, 15] = 1
    out = augment.gaussian_blur(dot, sigma)
    torch.testing.assert_close(out, out.flip(2, 3))
    for side in (out[:, 0].sum(1), out[:, 0].sum(2)):
        torch.testing.assert_close(side.sum(1), torch.ones(4))
        torch.testing.assert_close((side * at ** 2).sum(1), sigma ** 2, rtol=1e-4, atol=1e-5)


def test_hue_turns_every_image_as_torchvision_does():
    """Another colour circle or direction, one turn for all images, greys that change; pixels with equal channels are there."""
    turns = torch.tensor([-0.5, -0.3, -0.1, 0.0, 0.05, 0.1, 0.33, 0.5])
    pictures = augment.to_float(torch.cat([noise(4), noise(2, 100, 102), smooth(2)]))
    pictures[:, :, 0] = pictures[:, :1, 0]                                # a row of greys
    for result, picture, turn in zip(augment.hue(pictures, turns), pictures, turns.tolist()):
        assert (result - tv.adjust_hue(picture, turn)).abs().max() < 1e-5
        torch.testing.assert_close(result[:, 0], picture[:, 0])


def test_operations_take_the_published_arguments_at_magnitudes_0_9_and_10():
    """A wrong row of the table: at 9 these are the values of timm's rand-m9-inc1; signs and directions are drawn."""
    factor, shear = ([1], [0.19, 1.81], [0.1, 1.9]), ([0], [-0.27, 0.27], [-0.3, 0.3])
    translate = ([0], [-0.405, 0.405], [-0.45, 0.45])
    published = {
        "rotate": ([0], [-27, 27], [-30, 30]), "posterize": ([4], [1], [0]), "solarize": ([256], [26], [0]),
        "solarize_add": ([0], [99], [110]), "color": factor, "contrast": factor, "brightness": factor, "sharpness": factor,
        "shear_x": shear, "shear_y": shear, "translate_x": translate, "translate_y": translate,
    }
    assert set(OPERATION) == set(published) | {"autocontrast", "equalize", "invert"} and len(augment.RAND_AUGMENT) == 15
    m = torch.tensor([0.0, 9.0, 10.0]).repeat(200)
    for name, rows in published.items():
        drawn = OPERATION[name][1](m) + 0.0                               # -0 becomes 0
        for i, expected in enumerate(rows):
            assert drawn[i::3].unique().tolist() == pytest.approx(expected, abs=1e-5), (name, i)


def test_step_arguments_follow_timms_integer_formulas():
    """Rounding where timm cuts off: posterize keeps 1 bit from m = 7.5 on, not from 6.25 or 8.75."""
    m = torch.rand(500) * 10
    formulas = {"posterize": lambda v: 4 - int(v / 10 * 4), "solarize": lambda v: 256 - min(256, int(v / 10 * 256)),
                "solarize_add": lambda v: min(128, int(v / 10 * 110))}
    for name, formula in formulas.items():
        assert OPERATION[name][1](m).tolist() == [formula(v) for v in m.tolist()]


def test_signs_are_drawn_for_every_image_with_equal_chance():
    """One sign for the whole batch, or a lopsided coin (3 standard deviations of 4000 tosses are 0.024)."""
    for name in ("rotate", "color", "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"):
        centre = 1 if name in ("color", "contrast", "brightness", "sharpness") else 0
        up = (OPERATION[name][1](torch.full((4000,), 9.0)) > centre).float().mean().item()
        assert abs(up - 0.5) < 0.025, name


# ---- RandAugment's draws -------------------------------------------------------------------------------------------------

def test_two_operations_of_fifteen_with_replacement_each_with_probability_one_half():
    """Operation k appends the digit k + 1 in base 16 to its image, so that the result spells what was done to each image."""
    table = [(lambda x, m, k=k: x * 16 + (k + 1), lambda m: m) for k in range(15)]
    B = 30_000
    spelled = augment.rand_augment(torch.zeros(B, 3, 1, 1), operations=table)[:, 0, 0, 0].long()
    first, second = spelled // 16, spelled % 16                           # with one digit only, first is 0
    number = (first > 0).int() + (second > 0).int()
    assert torch.bincount(number).div(B).tolist() == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    counts = torch.bincount(torch.cat([first, second]), minlength=16)[1:]
    assert counts.tolist() == pytest.approx([B / 15] * 15, abs=150)                                   # 43 is one deviation
    assert (first == second)[number == 2].float().mean().item() == pytest.approx(1 / 15, abs=0.01)


@pytest.mark.parametrize("magnitude, spread", [(9.0, 0.5), (1.0, 2.0)])
def test_magnitudes_are_normal_for_every_image_and_clipped_to_0_10(magnitude, spread):
    """One magnitude for the batch, the variance taken for the deviation, or no clipping."""
    table = [(lambda x, m: x + m.view(-1, 1, 1, 1), lambda m: m)]
    drawn = augment.rand_augment(torch.zeros(5000, 3, 1, 1), 1, magnitude, spread, prob=1, operations=table)[:, 0, 0, 0]
    expected = [min(10, max(0, random.gauss(magnitude, spread))) for _ in range(20_000)]
    assert distance(drawn, expected) < 0.03
    assert drawn.max() == 10 if magnitude == 9 else drawn.min() == 0


def test_copies_of_one_image_come_out_different_and_reseeding_replays_them():
    """One draw for the whole batch, or an operation whose strength is not drawn for each image."""
    images = augment.to_float(smooth(1).expand(64, -1, -1, -1).contiguous())
    torch.manual_seed(5)
    out = augment.rand_augment(images)
    assert len({x.numpy().tobytes() for x in out}) > 32                   # 64 less the quarter left alone, less coincidences
    torch.manual_seed(5)
    assert torch.equal(augment.rand_augment(images), out)


def test_probability_zero_does_nothing_and_one_does_everything():
    images = augment.to_float(noise(32))
    assert torch.equal(augment.rand_augment(images, prob=0.0), images)
    inverted = augment.rand_augment(images, num_ops=3, prob=1.0, operations=[(augment.invert, lambda m: m)])
    torch.testing.assert_close(inverted, 1 - images)


# ---- AutoAugment ---------------------------------------------------------------------------------------------------------

# A transcription of the policy in the names of the published code: operation k probability, then the second.
POLICY = [line.split() for line in """
invert 7 .1 contrast 6 .2|rotate 2 .7 translateX 9 .3|sharpness 1 .8 sharpness 3 .9|shearY 8 .5 translateY 9 .7
autocontrast 8 .5 equalize 2 .9|shearY 7 .2 posterize 7 .3|color 3 .4 brightness 7 .6|sharpness 9 .3 brightness 9 .7
equalize 5 .6 equalize 1 .5|contrast 7 .6 sharpness 5 .6|color 7 .7 translateX 8 .5|equalize 7 .3 autocontrast 8 .4
translateY 3 .4 sharpness 6 .2|brightness 6 .9 color 8 .2|solarize 2 .5 invert 3 0|equalize 0 .2 autocontrast 0 .6
equalize 8 .2 equalize 4 .6|color 9 .9 equalize 6 .6|autocontrast 4 .8 solarize 8 .2|brightness 3 .1 color 0 .7
solarize 5 .4 autocontrast 3 .9|translateY 9 .9 translateY 9 .7|autocontrast 2 .9 solarize 3 .8|equalize 8 .8 invert 3 .1
translateY 9 .7 autocontrast 1 .9""".strip().replace("\n", "|").split("|")]
POLICY = [[(op.replace("X", "_x").replace("Y", "_y"), int(k), float(p)) for op, k, p in (r[:3], r[3:])] for r in POLICY]
BITS = [8, 8, 7, 7, 6, 6, 5, 5, 4, 4]
SIGNED = {"color", "contrast", "brightness", "sharpness", "shear_y", "translate_x", "translate_y"}


def published_argument(name, k, sign):
    """What the published code computes from index k: NumPy's grids of ten values, and a sign."""
    grid = {"rotate": np.linspace(0, 30, 10), "shear_y": sign * np.linspace(0, 0.3, 10), "posterize": BITS,
            "solarize": np.linspace(256, 0, 10)}
    for axis in "xy":
        grid[f"translate_{axis}"] = sign * np.linspace(0, 150 / 331, 10)
    return float(grid.get(name, 1 + sign * np.linspace(0, 0.9, 10))[k])


def test_the_policy_is_the_published_one():
    """A digit mistyped in one of the 25 rows: against the transcription above and against torchvision's own table."""
    ours = [[(row[i], row[i + 2], row[i + 1]) for i in (0, 3)] for row in augment.AUTO_AUGMENT]
    assert ours == POLICY
    theirs = AutoAugment(AutoAugmentPolicy.CIFAR10).policies              # None: the operation has no strength
    assert len(theirs) == len(ours) == 25
    for row, pair in zip(ours, theirs):
        for (name, k, prob), (their_name, their_prob, their_k) in zip(row, pair):
            assert (name.replace("_", ""), prob) == (their_name.lower(), their_prob) and their_k in (None, k)


def test_every_index_gives_the_published_argument_with_a_fair_sign():
    """A grid that ends elsewhere, steps of tenths for ninths, a sign for rotation or none for another, one for the batch."""
    n = 2000
    for name in set(AUTO) - {"autocontrast", "equalize", "invert"}:
        for k in range(10):
            drawn = AUTO[name][1](torch.full((n,), k))
            plus, minus = published_argument(name, k, 1), published_argument(name, k, -1)
            is_plus, is_minus = (drawn - plus).abs() < 1e-4, (drawn - minus).abs() < 1e-4
            assert (is_plus | is_minus).all(), (name, k)
            if name in SIGNED and k > 0:
                assert as_expected(is_plus.sum(), n, 0.5), (name, k)
            else:
                assert is_plus.all(), (name, k)


def test_pairs_operations_and_indices_occur_as_often_as_the_policy_says(monkeypatch):
    """A pair never drawn, one coin for both operations or for the whole batch, an index or a coin of another row.

    Operation number i (1..13) at index k appends the digit 16 i + k in base 256 to its image, so that the result spells what
    was done. Every one of the possible results is counted, and there are no others.
    """
    number = {name: i + 1 for i, name in enumerate(AUTO)}
    spelling = {name: (lambda x, k, i=i: x * 256 + (16 * i + k).view(-1, 1, 1, 1), lambda k: k) for name, i in number.items()}
    monkeypatch.setattr(augment, "AUTO_AUGMENT_OPERATIONS", spelling)
    expected = torch.zeros(256 * 256).double()
    for (op1, k1, p1), (op2, k2, p2) in POLICY:
        first, second = 16 * number[op1] + k1, 16 * number[op2] + k2
        for spelled, p in ((0, (1 - p1) * (1 - p2)), (first, p1 * (1 - p2)), (second, (1 - p1) * p2),
                           (256 * first + second, p1 * p2)):
            expected[spelled] += p / 25
    n = 200_000
    spelled = augment.auto_augment(torch.zeros(n, 3, 1, 1))[:, 0, 0, 0].long()
    counts = torch.bincount(spelled, minlength=256 * 256)
    assert counts[expected == 0].sum() == 0 and as_expected(counts, n, expected)
    assert (counts > 0).sum() == (expected > 0).sum() > 60


def pil_operation(name, picture, value):
    if name == "posterize":
        return ImageOps.posterize(picture, int(value))
    if name in COLOUR:
        return COLOUR[name][0](picture, value) if name != "solarize" else ImageOps.solarize(picture, value)
    how = Image.Resampling.BICUBIC if name == "shear_y" else Image.Resampling.NEAREST
    return AFFINE[name][0](picture, value, resample=how, fillcolor=GREY)


def test_a_whole_auto_augment_does_what_pil_does_with_the_same_draws(monkeypatch):
    """The two operations in the wrong order, an argument of the wrong one, a result that the second does not start from.

    What is drawn is written down by the table's functions of k; PIL then computes with the published argument for that k and
    sign. PIL rounds to 8 bits in between, which a stretch can enlarge, and its bicubic kernel is another: hence 1 level on
    average and 99 % of the pixels within 6, or with a shear 3 on average. Another operation on this noise is tens away.
    """
    log = []
    watched = {name: (op, lambda k, name=name, f=f: log.append((name, k.item(), f(k))) or log[-1][-1])
               for name, (op, f) in AUTO.items()}
    monkeypatch.setattr(augment, "AUTO_AUGMENT_OPERATIONS", watched)
    seen = set()
    for picture in noise(150):
        log.clear()
        ours = augment.auto_augment(augment.to_float(picture[None]))[0] * 255
        theirs = to_pil(picture)
        for name, k, value in log:
            sign = -1 if value < (1 if name in COLOUR else 0) else 1
            theirs = pil_operation(name, theirs, published_argument(name, k, sign))
        off = (ours - levels(theirs)).abs()
        names = tuple(name for name, *_ in log)
        assert off.mean() < 3 if "shear_y" in names else off.mean() < 1 and (off < 6).float().mean() > 0.99, log
        seen.add(names)
    assert len(seen) > 25 and max(map(len, seen)) == 2 and () in seen


# ---- Operations for some images, colour jitter ---------------------------------------------------------------------------

def test_every_image_meets_the_operation_and_the_level_chosen_for_it():
    """Results or levels written back to other images of the batch; an image with choice -1 that changes."""
    images, choice, level = torch.rand(50, 3, 4, 4), torch.randint(-1, 3, (50,)), torch.rand(50)
    before = images.clone()
    table = [(lambda x, v: x + v.view(-1, 1, 1, 1), lambda m: 10 * m), (lambda x, v: x * v.view(-1, 1, 1, 1), lambda m: m),
             (lambda x, _: 1 - x, lambda m: m)]
    out = augment.apply_chosen(images, choice, level, table)
    for x, c, m, result in zip(images, choice.tolist(), level, out):
        torch.testing.assert_close(result, {-1: x, 0: x + 10 * m, 1: x * m, 2: 1 - x}[c])
    assert torch.equal(images, before)


def test_sometimes_is_a_coin_for_every_image():
    """One coin for the batch, 1 - p for p, or images that lose the coin and change all the same."""
    images, n = torch.rand(4000, 3, 2, 2), 4000
    for prob in (0.0, 0.2, 0.8, 1.0):
        out = augment.sometimes(images, prob, lambda x: x + 2)
        changed = (out == images + 2).flatten(1).all(dim=1)
        assert torch.equal(out[~changed], images[~changed]) and as_expected(changed.sum(), n, prob)


def test_jitter_draws_every_factor_from_its_range_and_all_24_orders_equally_often(monkeypatch):
    """A fixed order, an order for the whole batch, one strength used for another, factors drawn together, one not applied.

    Operation i writes its amount and its place in the order into channel i; the pictures have four channels for that.
    """
    def writes(i):
        def operation(x, amount):
            place = (x != 0).any(dim=(2, 3)).sum(dim=1)                   # how many have written before
            x = x.clone()
            x[:, i] = (10 * (place + 1) + amount).view(-1, 1, 1)
            return x
        return operation, lambda amount: amount

    monkeypatch.setattr(augment, "COLOR_JITTER", [writes(i) for i in range(4)])
    n = 24_000
    written = augment.color_jitter(torch.zeros(n, 4, 1, 1), 0.3, 0.8, 1.5, 0.1)[:, :, 0, 0].double()  # (n,4)
    place = (written / 10).round()                                        # amounts are below 5
    code = (place * torch.tensor([1000, 100, 10, 1])).sum(dim=1).long()
    orders, counts = code.unique(return_counts=True)
    assert sorted(orders.tolist()) == sorted(int("".join(p)) for p in itertools.permutations("1234"))
    assert as_expected(counts, n, 1 / 24)
    amount = (written - 10 * place).T
    for drawn, low, high in zip(amount, (0.7, 0.2, 0.0, -0.1), (1.3, 1.8, 2.5, 0.1)):
        assert low - 1e-5 <= drawn.min() and drawn.max() <= high + 1e-5
        assert distance(drawn, np.random.uniform(low, high, 100_000)) < 0.015
    assert abs(np.corrcoef(amount.numpy()) - np.eye(4)).max() < 0.03
    without = augment.color_jitter(torch.zeros(600, 4, 1, 1), 0.4, 0.4, 0.4)[:, :, 0, 0]              # no hue: six orders
    assert (without[:, 3] == 0).all() and len((without[:, :3] / 10).round().unique(dim=0)) == 6


def test_jitter_is_torchvisions_with_the_same_factors_in_the_same_order(monkeypatch):
    """A stand-in for one of the four, or operations applied in another order than drawn."""
    log = []
    watched = [(op, lambda v, op=op: log.append((op.__name__, v.item())) or v) for op, _ in augment.COLOR_JITTER]
    monkeypatch.setattr(augment, "COLOR_JITTER", watched)
    theirs = {"brightness": tv.adjust_brightness, "contrast": tv.adjust_contrast, "color": tv.adjust_saturation,
              "hue": tv.adjust_hue}
    for picture in augment.to_float(noise(60)):
        log.clear()
        ours, expected = augment.color_jitter(picture[None], 0.4, 0.4, 0.4, 0.1)[0], picture
        for name, value in log:
            expected = theirs[name](expected, value)
        assert len(log) == 4 and (ours - expected).abs().max() < 1e-3     # torchvision rounds the weights of its grey


# ---- Crops ---------------------------------------------------------------------------------------------------------------

def boxes(n):
    """n boxes (top, left, height, width) in whole pixels, from 2 pixels to the whole picture."""
    height, width = torch.randint(2, H + 1, (n,)), torch.randint(2, W + 1, (n,))
    height[0], width[0] = H, W
    top, left = (torch.rand(n) * (H - height + 1)).floor(), (torch.rand(n) * (W - width + 1)).floor()
    return torch.stack([top, left, height, width]).float()


@pytest.mark.parametrize("out", [5, 32, 100])
def test_crop_and_resize_equals_torchvisions_antialiased_bicubic_to_the_last_digits(out):
    """A wrong kernel, half a pixel of shift, no antialiasing when shrinking, or pixels from outside the box."""
    pictures, box = augment.to_float(noise(24)), boxes(24)
    ours = augment.crop_resize(pictures, *box, out)
    for picture, (t, l, h, w), result in zip(pictures, box.int().T.tolist(), ours):
        theirs = tv.resized_crop(picture, t, l, h, w, [out, out], tv.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        assert (result - theirs).abs().max() < 1e-4, (t, l, h, w)


@pytest.mark.parametrize("out", [5, 32, 100])
def test_crop_and_resize_equals_pils_bicubic_within_a_level(out):
    """The same, against what timm really uses; PIL rounds to 8 bits after each of its two passes."""
    pictures, box = noise(24, 60, 195), boxes(24)
    ours = augment.crop_resize(augment.to_float(pictures), *box, out) * 255
    for picture, (t, l, h, w), result in zip(pictures, box.int().T.tolist(), ours):
        theirs = levels(to_pil(picture).crop((l, t, l + w, t + h)).resize((out, out), Image.Resampling.BICUBIC))
        assert (result - theirs).abs().max() < 1.5, (t, l, h, w)


def test_a_mirrored_crop_is_the_crop_mirrored():
    """A mirror of the wrong axis, or of the wrong images."""
    pictures, box, mirror = augment.to_float(noise(8)), boxes(8), torch.arange(8) % 3 == 0
    plain, mirrored = augment.crop_resize(pictures, *box, 32), augment.crop_resize(pictures, *box, 32, mirror=mirror)
    for i in range(8):
        torch.testing.assert_close(mirrored[i], plain[i].flip(2) if mirror[i] else plain[i])


def drawn_boxes(B, h, w, **kwargs):
    """Run random_resized_crop on pictures of their own coordinates; read each crop's (top, left, height, width, mirrored).

    Bicubic enlarging keeps straight lines straight, so that the slope in the middle is box / out and the middle its centre.
    """
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    out = 2 * max(h, w)
    crops = augment.random_resized_crop(torch.stack([y / h, x / w, 0 * x]).expand(B, 3, h, w), out, **kwargs)
    middle = crops[:, :, out // 2 - 1:out // 2 + 1, out // 2 - 1:out // 2 + 1]                        # (B,3,2,2)
    (y0, y1), (x0, x1) = (h * middle[:, 0, :, 0]).T, (w * middle[:, 1, 0, :]).T
    height, width = (y1 - y0) * out, (x1 - x0) * out
    top, left = (y0 + y1) / 2 - height / 2, (x0 + x1) / 2 - width.abs() / 2
    return [v.round().int() for v in (top, left, height, width.abs())] + [width < 0]


def test_random_resized_crops_are_distributed_as_torchvisions():
    """Another range or law of area, shape or place; a rejected try that is used; a mirror that is not a fair coin."""
    ours = torch.stack([v for v in drawn_boxes(2000, 32, 32)]).double().numpy()
    picture, scale, ratio = torch.zeros(3, 32, 32), (0.08, 1.0), (3 / 4, 4 / 3)
    theirs = np.array([RandomResizedCrop.get_params(picture, scale, ratio) for _ in range(4000)]).T
    top, left, height, width, mirrored = ours
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all()
    for quantity in (lambda t, l, h, w: h * w, lambda t, l, h, w: w / h, lambda t, l, h, w: t, lambda t, l, h, w: l):
        assert distance(quantity(*ours[:4]), quantity(*theirs)) < 0.05
    assert abs(mirrored.mean() - 0.5) < 0.035
    assert len(set(zip(*ours.tolist()))) > 1500                           # every image has its own


def test_random_resized_crops_follow_the_scale_and_ratio_given():
    top, left, height, width, mirrored = drawn_boxes(500, 40, 40, scale=(0.25, 0.3), ratio=(2.0, 3.0), flip=0.0)
    area, ratio = height * width / 1600, width / height
    assert 0.23 < area.min() and area.max() < 0.32 and 1.85 < ratio.min() and ratio.max() < 3.2 and not mirrored.any()


@pytest.mark.parametrize("h, w, scale, box", [
    (8, 64, (0.5, 1.0), (0, 26, 8, 11)), (64, 8, (0.5, 1.0), (26, 0, 11, 8)), (40, 40, (1.1, 2.0), (0, 0, 40, 40))])
def test_where_no_crop_fits_the_largest_central_one_within_the_ratio_is_taken(h, w, scale, box):
    """Falling through to a try that does not fit would read outside the picture. 11 is 8 * 4/3, rounded; torchvision agrees."""
    pictures = augment.to_float(noise(4, h=h, w=w))
    assert RandomResizedCrop.get_params(pictures, scale, (3 / 4, 4 / 3)) == box
    ours = augment.random_resized_crop(pictures, 16, scale, flip=0.0)
    theirs = tv.resized_crop(pictures, *box, [16, 16], tv.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    assert (ours - theirs).abs().max() < 1e-4


def test_padded_crops_are_slices_of_the_padded_picture_and_all_81_places_and_both_sides_occur():
    """Each of 4000 crops is looked up among all 162 of its picture: rows of another, a wrong pad or a missed place fail."""
    pictures, n = augment.to_float(noise(4, h=16, w=12)), 4000
    possible = []                                                         # per picture: bytes of the crop -> what it is
    for picture in pictures.numpy():
        padded = np.pad(picture, ((0, 0), (4, 4), (4, 4)))
        cut = {(t, l): padded[:, t:t + 16, l:l + 12] for t in range(9) for l in range(9)}
        possible.append({x[:, :, ::s].tobytes(): (t, l, s) for (t, l), x in cut.items() for s in (1, -1)})
    out = augment.random_crop_flip(pictures.repeat(n // 4, 1, 1, 1)).numpy()
    found = [possible[i % 4][x.tobytes()] for i, x in enumerate(out)]
    places = {(t, l): 0 for t in range(9) for l in range(9)}
    for t, l, _ in found:
        places[t, l] += 1
    assert min(places.values()) > 20 and max(places.values()) < 85        # 49 each, one deviation is 7
    assert abs(sum(s == -1 for *_, s in found) / n - 0.5) < 0.025


def test_padding_and_flip_rate_of_padded_crops_can_be_set():
    pictures = augment.to_float(noise(50))
    assert torch.equal(augment.random_crop_flip(pictures, padding=0, flip=0.0), pictures)
    assert torch.equal(augment.random_crop_flip(pictures, padding=0, flip=1.0), pictures.flip(3))


@pytest.mark.parametrize("size", [20, 56, 130])
def test_resize_and_centre_crop_equal_torchvisions(size):
    """The crop of an odd margin shifted by a pixel, or a resize that keeps the shape instead of filling the square."""
    pictures = augment.to_float(noise(4))
    theirs = tv.resize(pictures, [size, size], tv.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    assert (augment.resize(pictures, size) - theirs).abs().max() < 1e-4
    for smaller in (size, size - 1, size - 6, size - 11, 7):
        assert torch.equal(augment.center_crop(theirs, smaller), tv.center_crop(theirs, [smaller, smaller]))


def test_resizing_to_the_same_size_changes_nothing():
    pictures = augment.to_float(noise(2, h=32, w=32))
    assert torch.equal(augment.resize(pictures, 32), pictures)


# ---- Erasing -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [(0.02, 1 / 3), (0.3, 0.9)])
def test_erasing_draws_its_box_as_the_formula_and_leaves_the_rest_untouched(share):
    """timm's loop, written out, against the boxes found by comparing input and output: rate, area, shape and place.

    Of boxes of 30 to 90 % of the picture many do not fit, so that the later tries count too.
    """
    B, h, w = 8000, 32, 24
    pictures = torch.rand(B, 3, h, w)
    changed = (augment.random_erasing(pictures, area=share) != pictures).any(dim=1)                   # (B,h,w)
    erased = changed.flatten(1).any(dim=1)
    assert abs(erased.float().mean().item() - 0.25) < 0.015
    ours = []
    for mask in changed[erased].numpy():
        y, x = np.nonzero(mask)
        top, left, height, width = y.min(), x.min(), np.ptp(y) + 1, np.ptp(x) + 1
        assert mask.sum() == height * width                               # a full box, so all outside is the old picture
        ours.append((top, left, height, width))
    theirs = []
    for _ in range(8000):
        for _ in range(10):
            area, aspect = random.uniform(*share) * h * w, math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < h and width < w:
                theirs.append((random.randint(0, h - height), random.randint(0, w - width), height, width))
                break
    ours, theirs = np.array(ours).T, np.array(theirs).T
    for quantity in (lambda t, l, h, w: h * w, lambda t, l, h, w: h / w, lambda t, l, h, w: t, lambda t, l, h, w: l):
        assert distance(quantity(*ours), quantity(*theirs)) < 0.05


def test_erased_pixels_are_normal_noise_in_imagenet_units_clipped_each_its_own():
    """Uniform noise, one colour per box, or noise that is not brought back from normalised units."""
    pictures = torch.full((400, 3, 16, 16), 2.0)                          # a value that the noise cannot have
    out = augment.random_erasing(pictures, prob=1.0)
    for channel, mean, std in zip(range(3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)):
        drawn = out[:, channel][out[:, channel] != 2]
        expected = [min(1, max(0, random.gauss(mean, std))) for _ in range(20_000)]
        assert distance(drawn[:10_000], expected) < 0.025
        between = drawn[(drawn > 0) & (drawn < 1)]
        assert len(between.unique()) > 0.99 * len(between)
    red, green, _ = out.permute(1, 0, 2, 3)
    assert abs(np.corrcoef(red[red != 2], green[red != 2])[0, 1]) < 0.03


def test_erasing_rate_can_be_set_and_zero_is_off():
    pictures = torch.rand(500, 3, 16, 16)
    assert torch.equal(augment.random_erasing(pictures, prob=0.0), pictures)
    assert (augment.random_erasing(pictures, prob=1.0) != pictures).flatten(1).any(dim=1).all()


def test_cutout_is_a_black_square_centred_on_any_pixel_and_clipped():
    """Centres that keep the square inside, another side, a colour, an image without one, or the same place for all.

    Along a side of n pixels the centre c gives the box [c - 8, c + 8) inside 0..n: each of the n boxes equally often.
    """
    n, h, w = 24_000, 32, 24
    kept = augment.cutout(torch.ones(n, 3, h, w))
    black = kept[:, 0] == 0
    assert torch.equal(kept, (~black).float()[:, None].expand(-1, 3, -1, -1))   # all channels, and the rest as it was
    rows, cols = black.any(dim=2), black.any(dim=1)
    assert torch.equal(black, rows[:, :, None] & cols[:, None, :])        # a full box
    for line, side in ((rows, h), (cols, w)):
        start, length = line.int().argmax(dim=1), line.sum(dim=1)
        assert torch.equal(line, (torch.arange(side) >= start[:, None]) & (torch.arange(side) < (start + length)[:, None]))
        possible = [(max(c - 8, 0), min(c + 8, side) - max(c - 8, 0)) for c in range(side)]
        drawn = torch.bincount(start * 100 + length, minlength=3300)
        counts = drawn[[100 * s + l for s, l in possible]]
        assert counts.sum() == n and as_expected(counts, n, 1 / side)
        assert (length == 16).float().mean().item() == pytest.approx((side - 15) / side, abs=0.02)    # not clipped
    middle = black[:, 16, 12].float().mean().item()
    assert middle == pytest.approx(16 / 32 * 16 / 24, abs=0.02)           # rows and columns are drawn independently
    assert len(black.flatten(1).unique(dim=0)) == h * w                   # all the places together
    assert (augment.cutout(torch.ones(50, 3, 9, 9), 6) == 0).sum(dim=(2, 3)).max() == 36


# ---- Whole recipes -------------------------------------------------------------------------------------------------------

def test_pacos_query_view_is_a_padded_crop_then_auto_augment_then_cutout(monkeypatch):
    """Another order: with a policy that only inverts, the padding is white and the square still black."""
    monkeypatch.setattr(augment, "AUTO_AUGMENT", [("invert", 1.0, 0, "posterize", 0.0, 0)])
    out = augment.paco_query_view(torch.full((3000, 3, 32, 32), 0.75))
    assert out.unique().tolist() == [0, 0.25, 1]                          # square, inverted picture, inverted padding
    area = (out[:, 0] == 0).sum(dim=(1, 2))
    assert 64 <= area.min() and area.max() == 256
    white = (out[:, 0, 12] == 1).sum(dim=1)                               # in a middle row: 0 to 4 columns, less the square
    assert white.max() == 4 and (white == 0).any()


def test_simclrs_view_has_the_published_rates_strengths_and_order(monkeypatch):
    """Another probability, range or strength; grey before jitter (a grey picture would get its colour cast back)."""
    jitter, blur, crop = [], [], []
    real_blur, real_crop = augment.gaussian_blur, augment.random_resized_crop
    monkeypatch.setattr(augment, "gaussian_blur", lambda x, sigma: blur.append((len(x), sigma)) or real_blur(x, sigma))
    monkeypatch.setattr(augment, "random_resized_crop", lambda x, *a, **kw: crop.append((a, kw)) or real_crop(x, *a, **kw))
    monkeypatch.setattr(augment, "color_jitter", lambda x, *strength: (
        jitter.append((len(x), strength)) or x + torch.tensor([0.2, 0.0, 0.0]).view(3, 1, 1)))
    n = 4000
    pictures = torch.rand(n, 1, 6, 6).expand(-1, 3, -1, -1) * 0.5 + torch.tensor([0.0, 0.1, 0.2]).view(3, 1, 1)
    out = augment.simclr_view(pictures, 8)
    grey = (out[:, 0] - out[:, 1]).abs().amax(dim=(1, 2)) < 1e-5
    assert as_expected(grey.sum(), n, 0.2) and torch.equal(out[grey][:, 0], out[grey][:, 2])
    assert [s for _, s in jitter] == [(0.4, 0.4, 0.4, 0.1)] and as_expected(jitter[0][0], n, 0.8)
    (count, sigma), = blur
    assert as_expected(count, n, 0.5) and len(sigma) == count
    assert distance(sigma, np.random.uniform(0.1, 2, 100_000)) < 0.035
    assert crop == [((8,), {"scale": (0.2, 1.0)})]                        # and the usual aspect ratios and flip
    cast = ((out[:, 0] - out[:, 1])[~grey] > 0).flatten(1).float().mean(dim=1)
    assert as_expected((cast > 0.5).sum(), len(cast), 0.8)                # jitter's red cast, independent of grey


def test_strong_augment_is_crop_then_rand_augment_then_erasing(monkeypatch):
    """An argument that does not arrive, a padding other than an eighth, a RandAugment that runs when switched off."""
    calls, pictures = [], torch.rand(4, 3, 32, 32)
    monkeypatch.setattr(augment, "random_resized_crop", lambda x, size: calls.append(("box", size)) or x + 1)
    monkeypatch.setattr(augment, "random_crop_flip", lambda x, padding: calls.append(("pad", padding)) or x + 2)
    monkeypatch.setattr(augment, "resize", lambda x, size: calls.append(("resize", size)) or x * 2)
    monkeypatch.setattr(augment, "rand_augment", lambda x, magnitude: calls.append(("rand", magnitude)) or x + 4)
    monkeypatch.setattr(augment, "random_erasing", lambda x, prob: calls.append(("erase", prob)) or x * 8)
    torch.testing.assert_close(augment.strong_augment(pictures, 64), ((pictures + 2) * 2 + 4) * 8)
    assert calls == [("pad", 4), ("resize", 64), ("rand", 9.0), ("erase", 0.25)]
    calls.clear()
    torch.testing.assert_close(augment.strong_augment(pictures, 64, "resized", -1.0, 0.1), (pictures + 1) * 8)
    assert calls == [("box", 64), ("erase", 0.1)]


VIEWS = {
    "strong": lambda x: augment.strong_augment(x, 40), "strong, resized": lambda x: augment.strong_augment(x, 40, "resized"),
    "query": augment.paco_query_view, "key": lambda x: augment.simclr_view(x, 40), "auto": augment.auto_augment,
    "cutout": augment.cutout, "jitter": lambda x: augment.color_jitter(x, 0.4, 0.4, 0.4, 0.1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_draws_anew_for_every_image_is_replayed_by_its_seed_and_leaves_its_argument_alone(name):
    """One draw for the whole batch, a draw from elsewhere than torch's generator, colours out of range, a wrong shape."""
    picture = augment.to_float(noise(1, 0, 255, 32, 32))
    pictures = picture.repeat(64, 1, 1, 1)
    torch.manual_seed(3)
    out = VIEWS[name](pictures)
    size = 40 if "strong" in name or name == "key" else 32
    assert out.shape == (64, 3, size, size) and out.min() >= 0 and out.max() <= 1 and torch.isfinite(out).all()
    assert torch.equal(pictures, picture.expand(64, -1, -1, -1))
    assert len({x.numpy().tobytes() for x in out}) > (20 if name == "auto" else 55)   # auto has few outcomes, nothing is one
    torch.manual_seed(3)
    random.seed(9), np.random.seed(9)
    assert torch.equal(VIEWS[name](pictures), out)
    assert not torch.equal(VIEWS[name](pictures), out)


# ---- Mixing --------------------------------------------------------------------------------------------------------------

def mixed(n=1, B=6, h=32, w=24, **kwargs):
    """n mixed batches of pictures with the constant colour i / 16 and label i, image i: list of (images, targets)."""
    images = (torch.arange(B) / 16).view(B, 1, 1, 1).expand(B, 3, h, w).contiguous()
    return [augment.mixup_cutmix(images, torch.arange(B), 8, **kwargs) for _ in range(n)]


def expected_target(lam, i, j, smoothing=0.1, K=8):
    target = [smoothing / K] * K
    target[i] += lam * (1 - smoothing)
    target[j] += (1 - lam) * (1 - smoothing)
    return target


@pytest.mark.parametrize("B", [6, 5])
def test_mixup_blends_image_i_with_image_B_minus_1_minus_i_and_labels_in_the_same_share(B):
    """Another partner, lambda and 1 - lambda exchanged, or labels and images mixed in different shares. B = 5: the middle
    image meets itself."""
    images, labels = torch.rand(B, 3, 8, 8), torch.arange(B)
    out, target = augment.mixup_cutmix(images, labels, 8, mixup=0.8, cutmix=0.0, smoothing=0.1)
    lam = ((target[0, 0] - 0.1 / 8) / 0.9).item()
    assert 0 < lam < 1
    for i in range(B):
        torch.testing.assert_close(out[i], lam * images[i] + (1 - lam) * images[B - 1 - i])
        assert target[i].tolist() == pytest.approx(expected_target(lam, i, B - 1 - i), abs=1e-6)


@pytest.mark.parametrize("B", [6, 5])
def test_cutmix_pastes_one_box_and_its_lambda_is_the_area_really_kept(B):
    """Lambda not corrected for a clipped box, a box from the wrong image, or a box that differs inside the batch."""
    for images, target in mixed(60, B, mixup=0.0):
        own = (torch.arange(B) / 16).view(B, 1, 1, 1)
        kept = images == own
        assert torch.equal(images, torch.where(kept, own, own.flip(0)))                               # nothing but i and B-1-i
        lam = kept[0].float().mean().item()
        for i in range(B):
            assert torch.equal(kept[i], kept[0]) or 2 * i == B - 1
            assert target[i].tolist() == pytest.approx(expected_target(lam, i, B - 1 - i), abs=1e-6)
        y, x = torch.where(~kept[0, 0])
        assert len(y) == 0 or len(y) == (y.max() - y.min() + 1) * (x.max() - x.min() + 1)             # a full box


def test_targets_sum_to_one_and_smoothing_gives_the_published_on_and_off_values():
    assert augment.smooth_one_hot(torch.tensor([2]), 5, 0.1)[0].tolist() == pytest.approx([0.02, 0.02, 0.92, 0.02, 0.02])
    assert augment.smooth_one_hot(torch.tensor([1]), 3)[0].tolist() == [0, 1, 0]
    for _, target in mixed(50):
        torch.testing.assert_close(target.sum(dim=1), torch.ones(6))
        assert (target >= 0.1 / 8 - 1e-7).all()


def test_without_mixing_images_stay_and_labels_are_only_smoothed():
    images, target = mixed(mixup=0, cutmix=0)[0]
    assert torch.equal(images[:, 0, 0, 0], torch.arange(6) / 16)
    torch.testing.assert_close(target, 0.9 * torch.eye(8)[:6] + 0.1 / 8)


def share_of_first(batches):
    """Lambda of each batch as its targets have it."""
    return np.array([(t[0, 0].item() - 0.1 / 8) / 0.9 for _, t in batches])


@pytest.mark.parametrize("strength", [0.8, 1.0, 0.2])
def test_mixups_lambda_is_beta_distributed(strength):
    """Mean 1/2 and variance 1 / (8a + 4) of Beta(a, a); a strength that is not used."""
    lam = share_of_first(mixed(3000, B=2, h=2, w=2, mixup=strength, cutmix=0.0))
    assert lam.mean() == pytest.approx(0.5, abs=0.02) and lam.var() == pytest.approx(1 / (8 * strength + 4), rel=0.06)
    assert distance(lam, np.random.beta(strength, strength, 20_000)) < 0.04


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_cutmixs_box_is_drawn_as_the_formula(strength):
    """timm's lines, written out: side fraction sqrt(1 - lambda), centre anywhere, clipped; also where the box lies."""
    h, w, ours, theirs = 32, 24, [], []
    for images, _ in mixed(2500, B=2, h=h, w=w, mixup=0.0, cutmix=strength):
        y, x = torch.where(images[0, 0] != 0)
        ours.append((len(y), y.float().mean(), x.float().mean()) if len(y) else (0, -1, -1))
    for lam in np.random.beta(strength, strength, 10_000):
        cut_h, cut_w = int(h * math.sqrt(1 - lam)), int(w * math.sqrt(1 - lam))
        cy, cx = random.randrange(h), random.randrange(w)
        y = range(max(0, cy - cut_h // 2), min(h, cy + cut_h // 2))
        x = range(max(0, cx - cut_w // 2), min(w, cx + cut_w // 2))
        theirs.append((len(y) * len(x), (y[0] + y[-1]) / 2, (x[0] + x[-1]) / 2) if len(y) * len(x) else (0, -1, -1))
    for a, b in zip(np.array(ours).T, np.array(theirs).T):
        assert distance(a, b) < 0.045


def test_mixup_and_cutmix_take_turns_with_equal_chance_each_with_its_own_strength():
    """A coin that favours one, or draws for each image: on constant pictures only mixup makes new colours."""
    batches = mixed(2000, h=8, w=8, mixup=8.0, cutmix=1.0)
    is_mixup = np.array([not torch.isin(images, torch.arange(6) / 16).all().item() for images, _ in batches])
    assert abs(is_mixup.mean() - 0.5) < 0.035
    assert distance(share_of_first(batches)[is_mixup], np.random.beta(8, 8, 20_000)) < 0.06


# ---- All together --------------------------------------------------------------------------------------------------------

def test_extreme_pictures_stay_in_the_range_of_colours_and_arguments_are_left_alone():
    """Bicubic overshoot, noise or a factor above 1 that is not clipped; a function that writes into its argument."""
    pictures = torch.randint(0, 2, (48, 3, 32, 32)).float()               # black and white: the most that can overshoot
    pictures[0], pictures[1] = 0, 1
    steps = [augment.random_crop_flip, lambda x: augment.random_resized_crop(x, 40), lambda x: augment.resize(x, 20),
             lambda x: augment.rand_augment(x, num_ops=4, prob=1.0), lambda x: augment.rand_augment(x, magnitude=10.0),
             lambda x: augment.color_jitter(x, 0.9, 0.9, 0.9, 0.5), lambda x: augment.random_erasing(x, prob=1.0),
             lambda x: augment.gaussian_blur(x, torch.linspace(0, 3, 48)), augment.auto_augment, augment.paco_query_view,
             lambda x: augment.simclr_view(x, 40), lambda x: augment.strong_augment(x, 40), augment.cutout,
             lambda x: augment.mixup_cutmix(x, torch.arange(48) % 10, 10)[0]]
    for i, step in enumerate(steps):
        before = pictures.clone()
        out = step(pictures)
        assert torch.isfinite(out).all() and out.min() >= 0 and out.max() <= 1, i
        assert torch.equal(pictures, before), i


def test_a_seed_replays_the_whole_chain():
    """Randomness from NumPy, Python or the time: the contract is that torch's seed alone decides a step."""
    pictures = augment.to_float(noise(16, h=32, w=32))

    def chain(seed):
        torch.manual_seed(seed)
        x = augment.rand_augment(augment.random_resized_crop(augment.random_crop_flip(pictures), 32))
        x = augment.random_erasing(augment.color_jitter(x, 0.4, 0.4, 0.4, 0.1))
        return augment.mixup_cutmix(x, torch.arange(16) % 10, 10)

    first, again, other = chain(7), (random.seed(1), np.random.seed(1), chain(7))[-1], chain(8)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_to_float_maps_levels_0_to_255_onto_0_to_1():
    torch.testing.assert_close(augment.to_float(torch.arange(256, dtype=torch.uint8)), torch.linspace(0, 1, 256))
