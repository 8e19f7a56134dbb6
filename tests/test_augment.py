r"""augment.py against PIL, torchvision and timm image by image, and against the formulas in plain Python loops.

Pictures are levels 0..255. Everything is seeded, so that the frequencies below are the same in every run; their tolerances
are five standard deviations wide (`as_expected`), or what a Kolmogorov-Smirnov test at 1 in 10^6 would allow (`same_law`).
"""
import colorsys
import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, RandomResizedCrop
from torchvision.transforms import functional as tv

import augment

FILL, GREY = (124, 116, 104), (128, 128, 128)                             # 255 times ImageNet's mean, rounded; AutoAugment's
COARSE = {"fill": GREY, "coarse": True}                                   # AutoAugment's manner
NEAREST, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BICUBIC


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def noise(n, h=32, w=32, low=0, high=255):
    return torch.randint(low, high + 1, (n, 3, h, w), dtype=torch.uint8)


def smooth(n, h=32, w=32):
    """Pictures of a few slow waves, on which all bicubic kernels nearly agree: uint8 (n,3,h,w)."""
    y, x = torch.arange(h).view(h, 1), torch.arange(w)
    fx, fy, phase = torch.rand(3, n, 3, 1, 1) * torch.tensor([0.08, 0.08, 6]).view(3, 1, 1, 1, 1) + 0.03
    return (127.5 + 120 * torch.sin(fx * x + fy * y + phase)).to(torch.uint8)


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def levels(picture):
    """PIL picture -> uint8 (3,H,W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def off(ours, theirs):
    """By how many levels ours is brighter."""
    return ours.int() - theirs.int()


def each(name, images, values, **how):
    """The operation `name` for all images, with values[i] for image i."""
    return augment.apply(images, torch.full((len(images),), augment.ID[name]), torch.tensor(values).float(), **how)


def crossed(pictures, values):
    """Every picture with every value."""
    return pictures.repeat_interleave(len(values), dim=0), list(values) * len(pictures)


def as_expected(count, n, p):
    """Whether each number of n draws is what its probability p says, to five standard deviations and one draw."""
    count, p = torch.as_tensor(count).double(), torch.as_tensor(p).double()
    return bool(((count - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all())


def same_law(a, b):
    """Whether two samples' cumulative frequencies differ by no more than chance explains (Kolmogorov-Smirnov)."""
    a, b = (np.sort(np.asarray(v, dtype=float).round(4)) for v in (a, b))
    at = np.concatenate([a, b])
    largest = np.abs(np.searchsorted(a, at, side="right") / len(a) - np.searchsorted(b, at, side="right") / len(b)).max()
    return bool(largest < 2.7 * math.sqrt(1 / len(a) + 1 / len(b)))


def record(monkeypatch, name, result=lambda real, *args, **how: real(*args, **how)):
    """Let augment's function `name` write down its arguments: the list of (arguments, keywords) that it fills."""
    calls, real = [], getattr(augment, name)
    monkeypatch.setattr(augment, name, lambda *args, **how: calls.append((args, how)) or result(real, *args, **how))
    return calls


def draws_of(monkeypatch, n, policy, *args):
    """What a policy draws for n images: operations (n,calls), their arguments (n,calls), and the keywords of each call."""
    calls = record(monkeypatch, "apply", lambda _, images, *args, **how: images)                      # nothing is done
    policy(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), *args)
    (_, ops, values), how = zip(*(args for args, _ in calls)), [how for _, how in calls]
    return torch.stack(ops, dim=1), torch.stack(values, dim=1), how


# ---- Operations ----------------------------------------------------------------------------------------------------------

def by_levels(function):
    return lambda im, v: im.point([function(i, v) for i in range(256)] * 3)


FACTORS = [0.0, 0.1, 0.19, 0.7, 1.0, 1.37, 1.81, 1.9, 3.0]
EXACT = {  # operation: (the same in PIL, arguments to try); PIL refuses to keep 0 bits, its older versions made black of it
    "invert": (lambda im, v: ImageOps.invert(im), [0]),
    "autocontrast": (lambda im, v: ImageOps.autocontrast(im), [0]),
    "equalize": (lambda im, v: ImageOps.equalize(im), [0]),
    "posterize": (lambda im, v: ImageOps.posterize(im, int(v)) if v else by_levels(lambda i, _: 0)(im, v), range(9)),
    "solarize": (lambda im, v: ImageOps.solarize(im, v), [0, 1, 26, 128, 199.1, 255, 256]),
    "solarize_add": (by_levels(lambda i, v: min(255, i + int(v)) if i < 128 else i), [0, 1, 99, 110, 128]),
    "color": (lambda im, v: ImageEnhance.Color(im).enhance(v), FACTORS),
    "contrast": (lambda im, v: ImageEnhance.Contrast(im).enhance(v), FACTORS),
    "brightness": (lambda im, v: ImageEnhance.Brightness(im).enhance(v), FACTORS),
    "sharpness": (lambda im, v: ImageEnhance.Sharpness(im).enhance(v), FACTORS),
}


@pytest.mark.parametrize("h, w", [(32, 32), (27, 40), (40, 27), (3, 4), (2, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("name", EXACT)
def test_a_tone_or_colour_operation_gives_pils_picture_to_the_bit(name, h, w):
    """Another formula or rounding, a level at a threshold, one image's statistics or argument used for another."""
    flat = torch.tensor([0, 255, 93], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, h, w)
    means = [(torch.arange(h * w) < n).to(torch.uint8).add(10).view(1, 1, h, w).expand(1, 3, h, w)    # 10.5, just below, 10
             for n in (h * w // 2, (h * w - 1) // 2, 1)]
    pictures = torch.cat([noise(3, h, w), noise(2, h, w, 40, 200), noise(1, h, w, 97, 98), smooth(2, h, w), flat, *means])
    pictures[0, 1], pictures[3, 2], pictures[1, 0] = 77, 0, pictures[1, 0] // 2   # one-level channels; another range
    pil, values = EXACT[name]
    pictures, values = crossed(pictures, values)
    for i, (picture, value, ours) in enumerate(zip(pictures, values, each(name, pictures, values))):
        theirs = levels(pil(to_pil(picture), value))
        assert torch.equal(ours, theirs), (i, value, off(ours, theirs).abs().max())


def by_matrix(matrix):
    return lambda im, v, **how: im.transform(im.size, Image.Transform.AFFINE, matrix(v, *im.size), **how)


SHEARS, SHIFTS = [-0.3, -0.27, -0.05, 0, 0.07, 0.27, 0.3], [s * 150 / 331 * k / 9 for k in range(10) for s in (1, -1)]
AFFINE = {  # operation: (the same in PIL with timm's matrices, arguments to try)
    "rotate": (lambda im, v, **how: im.rotate(v, **how), [-30, -27, -3, 3, 13, 27, 30]),
    "shear_x": (by_matrix(lambda v, w, h: (1, v, 0, 0, 1, 0)), SHEARS),
    "shear_y": (by_matrix(lambda v, w, h: (1, 0, 0, v, 1, 0)), SHEARS),
    "translate_x": (by_matrix(lambda v, w, h: (1, 0, v * w, 0, 1, 0)), SHIFTS + [-0.45, -0.405, -0.11, 0.07, 0.405, 0.45]),
    "translate_y": (by_matrix(lambda v, w, h: (1, 0, 0, 0, 1, v * h)), SHIFTS + [-0.45, -0.405, -0.11, 0.07, 0.405, 0.45]),
}


@pytest.mark.parametrize("how", [{}, {"fill": (255, 0, 9)}, COARSE])
@pytest.mark.parametrize("h, w", [(32, 32), (41, 28), (28, 41)])
@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y"])
def test_shears_and_translations_are_pils_rounded_where_pil_cuts_off(name, h, w, how):
    """A wrong direction, amount, fixed point, kernel or fill: ours is 0 or 1 level brighter, at the border as within.

    Coarse translations are PIL's nearest pixels to the bit; shears stay bicubic even then, as published.
    """
    pil, values = AFFINE[name]
    values = values + [random.uniform(-0.4, 0.4) for _ in range(6)]
    pictures, values = crossed(torch.cat([noise(2, h, w), smooth(1, h, w)]), values)
    nearest = how is COARSE and "translate" in name
    for picture, value, ours in zip(pictures, values, each(name, pictures, values, **how)):
        theirs = levels(pil(to_pil(picture), value, resample=NEAREST if nearest else BICUBIC, fillcolor=how.get("fill", FILL)))
        assert 0 <= off(ours, theirs).min() and off(ours, theirs).max() <= (0 if nearest else 1), value


@pytest.mark.parametrize("h, w", [(64, 48), (48, 64), (56, 56)])
def test_a_rotation_is_pils_on_smooth_pictures_and_the_coarse_one_on_any(h, w):
    """A wrong direction, angle, centre or fill. Half a pixel too far would be 4 to 9 levels on these pictures."""
    rotate, values = AFFINE["rotate"]
    pictures, (white, framed) = smooth(len(values), h, w), (Image.new("L", (w, h), v) for v in (255, 0))
    framed.paste(255, (3, 3, w - 3, h - 3))
    for picture, value, ours in zip(pictures, values, each("rotate", pictures, values)):
        inside = np.array(rotate(framed, value)) > 0                      # comes from 3 pixels or more inside the picture
        outside = np.array(rotate(white, value).filter(ImageFilter.MaxFilter(7))) == 0   # 3 pixels or more outside it
        theirs = levels(rotate(to_pil(picture), value, resample=BICUBIC, fillcolor=FILL))
        assert off(ours, theirs).abs().amax(dim=0)[inside].max() <= 2
        assert (ours.permute(1, 2, 0)[outside] == torch.tensor(FILL)).all()
        assert inside.mean() > 0.4 and (outside.any() or abs(value) == 3)
    pictures, values = crossed(noise(2, h, w), values + [30 * k / 9 for k in range(10)])
    for picture, value, ours in zip(pictures, values, each("rotate", pictures, values, **COARSE)):
        differ = off(ours, levels(rotate(to_pil(picture), value, resample=NEAREST, fillcolor=GREY))) != 0
        assert differ.any(dim=0).float().mean() <= 0.01, value            # where a place lies between two pixels


def test_hue_turns_every_pixel_as_colorsys_does():
    """Another colour circle or direction, one turn for all images, greys that change; pixels with equal channels are there."""
    pictures = torch.cat([noise(3, 8, 8), noise(2, 8, 8, 100, 102), smooth(1, 8, 8)])
    pictures[:, :, 0] = pictures[:, :1, 0]                                # a row of greys
    pictures, turns = crossed(pictures, [-0.5, -0.3, -0.1, 0.0, 0.05, 0.1, 0.33, 0.5])
    for ours, picture, turn in zip(each("hue", pictures, turns), pictures, turns):
        for (r, g, b), new in zip(picture.flatten(1).T.double().div(255).tolist(), ours.flatten(1).T.tolist()):
            h, s, v = colorsys.rgb_to_hsv(r, g, b)
            exact = [255 * c for c in colorsys.hsv_to_rgb((h + turn) % 1, s, v)]
            assert new == pytest.approx(exact, abs=0.501), (r, g, b, turn)                            # rounded
        assert turn or torch.equal(ours, picture)


def test_grey_is_pils_luma_to_the_bit():
    """Other weights or another rounding, which a few levels of a million would show."""
    picture = noise(1, 1000, 1000)
    assert torch.equal(augment.grayscale(picture)[0, 0], torch.from_numpy(np.array(to_pil(picture[0]).convert("L"))))


@pytest.mark.parametrize("h, w", [(40, 28), (9, 30), (3, 2)])
def test_blur_is_three_box_blurs_and_pils_with_its_own_sigma_for_every_image(h, w):
    """A wrong width, a border that is not repeated, rows blurred as columns, one sigma for all.

    The formula in float64 must be met to the rounding; PIL rounds after each of its six passes, up to 3 levels in all.
    """
    pictures, sigma = crossed(torch.cat([noise(1, h, w), smooth(1, h, w)]), [0.0, 0.1, 0.3, 0.7, 1.1, 1.5, 2.0, 3.3, 5.0])
    for picture, s, ours in zip(pictures, sigma, augment.gaussian_blur(pictures, torch.tensor(sigma))):
        exact = picture.double().numpy()
        for axis in (1, 2, 1, 2, 1, 2):
            l = math.floor((math.sqrt(4 * s * s + 1) - 1) / 2)            # whole pixels to either side, a part of the next
            part = ((s * s / 3) * (2 * l + 1) - (2 * l + 1) * l * (l + 1) / 3) / (2 * ((l + 1) ** 2 - s * s / 3))
            x = np.pad(exact, [(l + 1, l + 1) if i == axis else (0, 0) for i in range(3)], mode="edge")
            parts = [x.take(range(i, i + exact.shape[axis]), axis) for i in range(2 * l + 3)]
            exact = (sum(parts[1:-1]) + part * (parts[0] + parts[-1])) / (2 * l + 1 + 2 * part)
        assert np.abs(ours.numpy() - exact).max() < 0.502, s
        apart = off(ours, levels(to_pil(picture).filter(ImageFilter.GaussianBlur(s)))).abs()
        assert apart.max() <= 3 * (s > 0) and apart.float().mean() < 1.1, s


@pytest.mark.parametrize("how", [{}, COARSE])
def test_a_batch_with_all_operations_gives_every_image_what_it_gets_alone(how):
    """Results, arguments or statistics that reach other images, -1 that changes something, an input that is written into."""
    values = {name: EXACT.get(name, AFFINE.get(name, (None, [-0.2, 0.3])))[1] for name in augment.OPERATIONS}
    assert {*EXACT, *AFFINE, "hue"} == set(augment.OPERATIONS) == set(augment.ID)
    wanted = [(augment.ID[name], float(random.choice(v))) for name, v in values.items() for _ in range(3)] + [(-1, 0.5)] * 5
    random.shuffle(wanted)
    images, (op, value) = noise(len(wanted), 12, 9), map(torch.tensor, zip(*wanted))
    before = [v.clone() for v in (images, op, value)]
    out = augment.apply(images, op, value, **how)
    assert all(torch.equal(v, old) for v, old in zip((images, op, value), before))
    assert out.dtype == torch.uint8 and out.shape == images.shape and out.is_contiguous()
    for i, (number, v) in enumerate(wanted):
        alone = images[i:i + 1] if number < 0 else each(augment.OPERATIONS[number], images[i:i + 1], [v], **how)
        assert torch.equal(out[i:i + 1], alone), augment.OPERATIONS[number]


def test_sometimes_replaces_the_chosen_images_and_only_them():
    """Results that land on other images, a slip when nobody is chosen, or everybody."""
    images = noise(50, 2, 2)
    for chosen in (torch.rand(50) < 0.4, torch.zeros(50).bool(), torch.ones(50).bool()):
        out = augment.sometimes(images, chosen, lambda x: 255 - x)
        assert torch.equal(out, torch.where(chosen.view(-1, 1, 1, 1), 255 - images, images))


def test_to_float_maps_levels_0_to_255_onto_0_to_1_and_leaves_floats():
    """A range of 0..255 or 0..255/256 that reaches the network, or floats divided a second time."""
    floats = augment.to_float(torch.arange(256, dtype=torch.uint8))
    torch.testing.assert_close(floats, torch.linspace(0, 1, 256))
    assert augment.to_float(floats) is floats


# ---- RandAugment ---------------------------------------------------------------------------------------------------------

NAMES = [name for name, *_ in augment.RAND_AUGMENT]
NAME = {name.replace("_", ""): name for name in augment.OPERATIONS}       # from the names of timm and torchvision, lower case
ENHANCE = ["color", "contrast", "brightness", "sharpness"]
AT_9 = {  # operation: its arguments at magnitude 9, both signs
    "rotate": [-27, 27], "posterize": [1], "solarize": [26], "solarize_add": [99], **dict.fromkeys(ENHANCE, [0.19, 1.81]),
    **dict.fromkeys(["shear_x", "shear_y"], [-0.27, 0.27]), **dict.fromkeys(["translate_x", "translate_y"], [-0.405, 0.405]),
    **dict.fromkeys(["autocontrast", "equalize", "invert"], [0]),
}


def published(name, m, sign):
    """The argument by timm's formulas, which cut off to whole numbers where Python's int does."""
    if name in ENHANCE:
        return max(0.1, 1 + sign * m / 10 * 0.9)
    signed = {"rotate": 30, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45, "translate_y": 0.45}
    whole = {"posterize": 4 - int(m / 10 * 4), "solarize": 256 - int(m / 10 * 256), "solarize_add": min(128, int(m / 10 * 110))}
    return whole.get(name, sign * m / 10 * signed.get(name, 0))


def arguments(name, m):
    """Ours at the magnitudes m (a list)."""
    op, value = augment.draw(augment.RAND_AUGMENT, torch.full((len(m),), NAMES.index(name)), torch.tensor(m).float())
    assert (op == augment.ID[name]).all()
    return (value + 0.0).tolist()                                         # -0 becomes 0


def test_operations_take_the_published_arguments():
    """A wrong row of the table, rounding where timm cuts off: posterize keeps 1 bit from m = 7.5 on, not from 6.25 or 8.75."""
    assert sorted(NAMES) == sorted(AT_9) and len(NAMES) == 15
    for name, expected in AT_9.items():
        assert sorted({round(v, 5) for v in arguments(name, [9.0] * 50)}) == expected, name
        m = [0.0, 10.0] + [random.uniform(0, 10) for _ in range(300)]
        for v, ours in zip(m, arguments(name, m)):
            assert min(abs(ours - published(name, v, s)) for s in (1, -1)) < 1e-4, (name, v)


def test_operations_and_arguments_are_those_of_timms_own_table():
    """The hand-written tables of this file may be wrong too: the same with timm's functions, down to the picture."""
    timm = pytest.importorskip("timm.data.auto_augment")
    theirs = timm.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": FILL, "interpolation": BICUBIC})
    assert theirs.num_layers == 2 and len(theirs.ops) == len(NAMES)
    for operation, m in itertools.product(theirs.ops, (0.0, 2.6, 5.1, 7.4, 9.0)):
        name = NAME[operation.name.replace("Increasing", "").replace("Rel", "").lower()]
        assert (operation.prob, operation.magnitude, operation.magnitude_std) == (0.5, 9, 0.5)
        drawn = [operation.level_fn(m, operation.hparams) if operation.level_fn else () for _ in range(30)]
        assert {round(*v, 4) + 0.0 if v else 0 for v in drawn} == {round(v, 4) for v in arguments(name, [m] * 30)}, (name, m)
        picture = smooth(1, 41, 28)
        result = levels(operation.aug_fn(to_pil(picture[0]), *drawn[0], **operation.kwargs))
        apart = off(each(name, picture, drawn[0] or [0.0])[0], result).abs()
        assert apart.max() <= (name not in EXACT) or name == "rotate" and apart.float().mean() < 4, (name, m)


@pytest.mark.parametrize("settings", [(), (2, 1.0, 2.0, 0.3)])
def test_two_of_fifteen_operations_each_with_its_probability_and_a_magnitude_for_every_image(monkeypatch, settings):
    """Draws without replacement, a rate other than 1/2, one magnitude or sign for the batch, no clipping to 0..10, the
    variance taken for the deviation, an uneven coin for the sign, the second operation tied to the first."""
    n, (_, magnitude, spread, prob) = 150_000, settings or (2, 9.0, 0.5, 0.5)
    ops, values, how = draws_of(monkeypatch, n, augment.rand_augment, *settings)
    assert how == [{}, {}]                                                # ImageNet's mean as fill, bicubic
    rate = torch.zeros(len(augment.OPERATIONS) + 1).double()
    rate[[0] + [augment.ID[name] + 1 for name in NAMES]] = torch.tensor([1 - prob] + [prob / 15] * 15).double()
    counts = torch.bincount((ops[:, 0] + 1) * len(rate) + ops[:, 1] + 1, minlength=len(rate) ** 2)
    assert as_expected(counts, n, (rate[:, None] * rate).flatten())
    for name, usual in AT_9.items():
        drawn = values[ops == augment.ID[name]]
        m = (magnitude + spread * np.random.randn(20_000)).clip(0, 10)
        assert same_law(drawn, [published(name, v, random.choice((1, -1))) for v in m]), name
        middle = sum(usual) / 2
        assert len(usual) == 1 or as_expected((drawn > middle).sum(), (drawn != middle).sum(), 0.5), name


# ---- AutoAugment ---------------------------------------------------------------------------------------------------------

POLICY = [[(NAME[name.lower()], p, k) for name, p, k in pair] for pair in AutoAugment(AutoAugmentPolicy.CIFAR10).policies]


def auto_argument(name, k, sign):
    """What the published code computes from index k (None: the operation has no strength): grids of ten, and a sign."""
    if k is None:
        return 0
    own = {"posterize": 8 - k // 2, "solarize": 256 - 256 * k / 9, "rotate": 30 * k / 9, "shear_y": sign * 0.3 * k / 9}
    return 1 + sign * 0.1 * k if name in ENHANCE else own.get(name, sign * 150 / 331 * k / 9)


def test_the_policy_is_the_published_one():
    """A digit mistyped in one of the 25 rows: against torchvision's own table. None: the operation has no strength."""
    assert len(augment.AUTO_AUGMENT) == len(POLICY) == 25
    for row, pair in zip(augment.AUTO_AUGMENT, POLICY):
        for (name, prob, k), theirs in zip((row[:3], row[3:]), pair):
            assert (name, prob) == theirs[:2] and theirs[2] in (None, k)


def test_pairs_operations_and_arguments_occur_as_often_as_the_policy_says(monkeypatch):
    """A pair never drawn, one coin for both operations or for the whole batch, a grid that ends elsewhere, an unfair sign.

    Every possible outcome (first operation and argument, second ones; -1: none) is counted, and there are no others.
    """
    expected, n = {}, 200_000
    for pair in POLICY:
        halves = [[(-1, 0, 1 - p)] + [(augment.ID[name], round(1000 * auto_argument(name, k, s)), p / 2) for s in (1, -1)]
                  for name, p, k in pair]
        for (op1, v1, p1), (op2, v2, p2) in itertools.product(*halves):
            if p1 * p2 > 0:                                               # one operation has the probability 0
                expected[op1, op2, v1, v2] = expected.get((op1, op2, v1, v2), 0) + p1 * p2 / 25
    ops, values, how = draws_of(monkeypatch, n, augment.auto_augment)
    assert how == [COARSE, COARSE]
    outcomes = torch.cat([ops, (1000 * values).round().long() * (ops >= 0)], dim=1)
    outcomes, counts = outcomes.unique(dim=0, return_counts=True)
    assert sorted(map(tuple, outcomes.tolist())) == sorted(expected) and len(expected) > 90
    assert as_expected(counts, n, [expected[tuple(v)] for v in outcomes.tolist()])


@pytest.mark.parametrize("policy, exact", [(augment.rand_augment, {*EXACT}), (augment.auto_augment, {*EXACT, "translate_x"}),
                                           (lambda x: augment.color_jitter(x, 0.4, 0.4, 0.4), {*EXACT})])
def test_a_whole_policy_does_what_pil_does_with_the_same_draws(monkeypatch, policy, exact):
    """Operations in the wrong order, an argument of the wrong one, a result that the second does not start from: to the bit.

    Pictures that were sheared, rotated, or moved by parts of a pixel are left out.
    """
    calls, pictures, compared = record(monkeypatch, "apply"), noise(250, 24, 17), 0
    for i, ours in enumerate(policy(pictures)):
        steps = [(augment.OPERATIONS[op[i]], value[i].item()) for (_, op, value), _ in calls if op[i] >= 0]
        if all(name in exact for name, _ in steps):
            theirs, how = to_pil(pictures[i]), {"resample": NEAREST, "fillcolor": GREY}
            for name, value in steps:
                theirs = EXACT[name][0](theirs, value) if name in EXACT else AFFINE[name][0](theirs, value, **how)
            assert torch.equal(ours, levels(theirs)), steps
            compared += len(steps) > 0
    assert compared > 90


# ---- Colour jitter, 3-Augment --------------------------------------------------------------------------------------------

def test_jitter_draws_every_factor_from_its_range_and_all_orders_equally_often(monkeypatch):
    """A fixed order, an order for the whole batch, one strength used for another, factors drawn together, one not applied."""
    n, names = 24_000, ("brightness", "contrast", "color", "hue")
    for hue in (0.1, 0.0):
        here = [augment.ID[name] for name in names if hue or name != "hue"]
        ops, values, _ = draws_of(monkeypatch, n, augment.color_jitter, 0.3, 0.8, 1.5, hue)           # (n,4), (n,3)
        orders, counts = ops.unique(dim=0, return_counts=True)
        assert sorted(map(tuple, orders.tolist())) == sorted(itertools.permutations(here))
        assert as_expected(counts, n, 1 / math.factorial(len(here)))
        amounts = [values[ops == number] for number in here]                                          # by image
        for drawn, low, high in zip(amounts, (0.7, 0.2, 0.0, -0.1), (1.3, 1.8, 2.5, 0.1)):
            assert low <= drawn.min() + 1e-6 and drawn.max() <= high + 1e-6
            assert same_law((drawn - low) / (high - low), np.random.rand(100_000))
        together = np.corrcoef([*amounts, (ops == here[0]).int().argmax(dim=1), (ops == here[1]).int().argmax(dim=1)])
        assert abs(together[:len(here)] - np.eye(len(together))[:len(here)]).max() < 0.035            # five deviations


def test_three_augment_is_grey_or_solarised_or_blurred_by_thirds_and_then_jittered(monkeypatch):
    """Two of the three at once or none, other shares, another threshold or range of sigma, jitter first or another strength."""
    blur = record(monkeypatch, "gaussian_blur")
    jitter = record(monkeypatch, "color_jitter", lambda _, images, *strength: 255 - images)
    n, pictures = 6000, noise(1, 6, 5).repeat(6000, 1, 1, 1)
    out = 255 - augment.three_augment(pictures)                           # what came to the jitter
    assert len(jitter) == 1 and jitter[0][0][1:] == (0.3, 0.3, 0.3) and torch.equal(jitter[0][0][0], out)
    picture = to_pil(pictures[0])
    grey, solarised = picture.convert("L").convert("RGB"), ImageOps.solarize(picture, 128)
    same = [(out == levels(p)).flatten(1).all(dim=1) for p in (grey, solarised)]
    assert as_expected(same[0].sum(), n, 1 / 3) and as_expected(same[1].sum(), n, 1 / 3)
    ((_, sigma), _), = blur
    rest = out[~same[0] & ~same[1]]
    assert len(rest) == len(sigma) and same_law(sigma, np.random.uniform(0.1, 2, 100_000))
    for ours, s in zip(rest[:100], sigma.tolist()):
        assert off(ours, levels(picture.filter(ImageFilter.GaussianBlur(s)))).abs().max() <= 3


# ---- Crops ---------------------------------------------------------------------------------------------------------------

def boxes(n, h, w):
    """n boxes (top, left, height, width) in whole pixels, from 2 pixels to the whole picture: float (4,n)."""
    height, width = torch.randint(2, h + 1, (n,)), torch.randint(2, w + 1, (n,))
    height[0], width[0] = h, w
    top, left = (torch.rand(n) * (h - height + 1)).floor(), (torch.rand(n) * (w - width + 1)).floor()
    return torch.stack([top, left, height, width]).float()


@pytest.mark.parametrize("low, high", [(0, 255), (60, 195)])
@pytest.mark.parametrize("out", [5, 32, 90])
def test_crop_and_resize_of_levels_is_pils_and_of_floats_the_exact_one(out, low, high):
    """A wrong kernel, half a pixel of shift, no antialiasing when shrinking, pixels from outside the box, a wrong mirror.

    Levels on a CPU are rounded and cut off to 0..255 between rows and columns, as PIL does: of noise in 0..255 that changes a
    few pixels by up to 25 levels against floats (and against a PIL that does the columns first), of noise in 60..195 none.
    """
    h, w = 64, 48
    pictures, box, mirror = noise(24, h, w, low, high), boxes(24, h, w), torch.arange(24) % 3 == 0
    ours, floats = (augment.crop_resize(x, *box, out, mirror=mirror) for x in (pictures, augment.to_float(pictures)))
    assert ours.dtype == torch.uint8 and ours.shape == floats.shape == (24, 3, out, out)
    for i, (t, l, bh, bw) in enumerate(box.int().T.tolist()):
        cut = pictures[i:i + 1, :, t:t + bh, l:l + bw].double()
        exact = F.interpolate(cut, (out, out), mode="bicubic", antialias=True)[0].clamp(0, 255)
        rows = F.interpolate(cut, (bh, out), mode="bicubic", antialias=True).round().clamp(0, 255)
        both = F.interpolate(rows, (out, out), mode="bicubic", antialias=True)[0].round().clamp(0, 255)
        pil = levels(to_pil(pictures[i]).crop((l, t, l + bw, t + bh)).resize((out, out), BICUBIC))
        exact, both, pil = (v.flip(2) if mirror[i] else v for v in (exact, both, pil))
        assert (255 * floats[i] - exact).abs().max() < 5e-3, i
        for theirs in (both, pil, exact.round())[:3 if low else 1]:
            assert off(ours[i], theirs).abs().max() <= 2 and (off(ours[i], theirs).abs() > 1).float().mean() < 1e-3, i
    plain = augment.crop_resize(pictures, *box, out)
    assert torch.equal(ours, torch.where(mirror.view(-1, 1, 1, 1), plain.flip(3), plain))


@pytest.mark.parametrize("kwargs", [{}, {"scale": (0.2, 1.0)}, {"scale": (0.5, 0.9), "ratio": (1.5, 3.0), "flip": 0.2}])
def test_random_resized_crops_are_distributed_as_torchvisions(monkeypatch, kwargs):
    """Another range or law of area, shape or place; a rejected try that is used; a mirror that is not that coin."""
    h, w, n, calls = 32, 40, 20_000, record(monkeypatch, "crop_resize", lambda _, images, *args, **how: images)
    augment.random_resized_crop(torch.zeros(n, 3, h, w, dtype=torch.uint8), 7, **kwargs)
    ((_, *ours, out), how), = calls
    scale, ratio = kwargs.get("scale", (0.08, 1.0)), kwargs.get("ratio", (3 / 4, 4 / 3))
    theirs = np.array([RandomResizedCrop.get_params(torch.zeros(3, h, w), scale, ratio) for _ in range(4000)]).T
    top, left, height, width = ours = [v.double().numpy() for v in ours]
    assert out == 7 and (top >= 0).all() and (left >= 0).all() and (top + height <= h).all() and (left + width <= w).all()
    assert all((v == v.round()).all() and len(v) == n for v in ours)      # whole pixels
    for quantity in (lambda t, l, h, w: h * w, lambda t, l, h, w: w / h, lambda t, l, h, w: t, lambda t, l, h, w: l):
        assert same_law(quantity(*ours), quantity(*theirs))
    assert as_expected(how["mirror"].sum(), n, kwargs.get("flip", 0.5))
    assert abs(np.corrcoef(how["mirror"], left)[0, 1]) < 0.036            # five deviations


@pytest.mark.parametrize("h, w, scale, box", [
    (8, 64, (0.5, 1.0), (0, 26, 8, 11)), (64, 8, (0.5, 1.0), (26, 0, 11, 8)), (8, 66, (0.5, 1.0), (0, 27, 8, 11)),
    (40, 40, (1.1, 2.0), (0, 0, 40, 40))])
def test_where_no_crop_fits_the_largest_central_one_within_the_ratio_is_taken(monkeypatch, h, w, scale, box):
    """Falling through to a try that does not fit would read outside the picture. 11 is 8 * 4/3, rounded; torchvision agrees."""
    pictures, calls = noise(4, h, w), record(monkeypatch, "crop_resize")
    assert RandomResizedCrop.get_params(pictures, scale, (3 / 4, 4 / 3)) == box
    assert augment.random_resized_crop(pictures, 16, scale).shape == (4, 3, 16, 16)
    assert torch.stack(calls[0][0][1:5], dim=1).tolist() == [list(box)] * 4


@pytest.mark.parametrize("padding, flip", [(4, 0.5), (1, 1.0), (0, 0.0)])
def test_padded_crops_are_slices_of_the_padded_picture_and_all_places_and_both_sides_occur(padding, flip):
    """Each of 8100 crops is looked up among all of its picture: rows of another, a wrong pad or a missed place fail."""
    pictures, n, places = noise(4, 16, 12), 8100, range(2 * padding + 1)
    possible = []                                                         # per picture: bytes of the crop -> what it is
    for picture in pictures.numpy():
        padded = np.pad(picture, ((0, 0), (padding, padding), (padding, padding)))
        cut = {(t, l): padded[:, t:t + 16, l:l + 12] for t in places for l in places}
        possible.append({x[:, :, ::s].tobytes(): (t, l, s) for (t, l), x in cut.items() for s in (1, -1)})
    how = {} if padding == 4 else {"padding": padding, "flip": flip}      # 4 and 1/2 are the defaults
    out = augment.random_crop_flip(pictures.repeat(n // 4, 1, 1, 1), **how).numpy()
    found = [possible[i % 4][x.tobytes()] for i, x in enumerate(out)]
    for side, p in ((1, 1 - flip), (-1, flip)):
        counts = [found.count((t, l, side)) for t in places for l in places]
        assert as_expected(counts, len(out), p / len(places) ** 2)


@pytest.mark.parametrize("size", [20, 56, 90])
def test_resize_is_pils_and_the_centre_crop_torchvisions(size):
    """The crop of an odd margin shifted by a pixel, or a resize that keeps the shape instead of filling the square."""
    pictures = noise(4, 64, 48, 60, 195)
    ours = augment.resize(pictures, size)
    for picture, result in zip(pictures, ours):
        assert off(result, levels(to_pil(picture).resize((size, size), BICUBIC))).abs().max() <= 2
    assert augment.resize(ours, size) is ours                             # nothing to do
    for smaller in (size, size - 1, size - 6, size - 11, 7):
        assert torch.equal(augment.center_crop(ours, smaller), tv.center_crop(ours, [smaller, smaller]))


# ---- Boxes ---------------------------------------------------------------------------------------------------------------

def erased_twice(n, h, w, **kwargs):
    """The same draws on black and on white pictures, which agree where, and only where, there is noise: (noise, mask)."""
    pictures, out = [torch.full((n, 3, h, w), level, dtype=torch.uint8) for level in (0, 255)], []
    for x in pictures:
        torch.manual_seed(1)
        out.append(augment.random_erasing(x, **kwargs))
    mask = (out[0] == out[1]).all(dim=1)
    outside = ~mask[:, None].expand(n, 3, h, w)
    assert (out[0][outside] == 0).all() and (out[1][outside] == 255).all()                            # to the bit
    assert (pictures[0] == 0).all() and (pictures[1] == 255).all()        # the arguments too
    return out[0], mask


@pytest.mark.parametrize("share, prob", [((0.02, 1 / 3), 0.25), ((0.3, 0.9), 0.6)])
def test_erasing_draws_its_box_as_the_formula_and_leaves_the_rest_untouched(share, prob):
    """timm's loop, written out, against the boxes found: rate, area, shape and place.

    Of boxes of 30 to 90 % of the picture many do not fit, so that the later tries count too.
    """
    n, h, w = 6000, 32, 24
    _, mask = erased_twice(n, h, w, **({} if prob == 0.25 else {"area": share, "prob": prob}))        # the first: defaults
    erased = mask.flatten(1).any(dim=1)
    assert as_expected(erased.sum(), n, prob)
    ours, theirs = [], []
    for one in mask[erased].numpy():
        y, x = np.nonzero(one)
        ours.append((y.min(), x.min(), np.ptp(y) + 1, np.ptp(x) + 1))
        assert one.sum() == ours[-1][2] * ours[-1][3]                     # a full box
    for _ in range(10_000):
        for _ in range(10):
            area, aspect = random.uniform(*share) * h * w, math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < h and width < w:
                theirs.append((random.randint(0, h - height), random.randint(0, w - width), height, width))
                break
    ours, theirs = np.array(ours).T, np.array(theirs).T
    for quantity in (lambda t, l, h, w: h * w, lambda t, l, h, w: h / w, lambda t, l, h, w: t, lambda t, l, h, w: l):
        assert same_law(quantity(*ours), quantity(*theirs))


def test_erased_pixels_are_normal_noise_in_imagenet_units_rounded_and_clipped_each_its_own():
    """Uniform noise, one colour per box, noise not brought back from normalised units, channels exchanged or tied together."""
    out, mask = erased_twice(2000, 16, 16, prob=1.0)
    drawn = [out[:, c][mask].numpy() for c in range(3)]
    for values, mean, std in zip(drawn, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)):
        assert same_law(values[:50_000], (255 * (mean + std * np.random.randn(200_000))).clip(0, 255).round())
    follow = [values[1:] for values in drawn] + [drawn[0][:-1]]           # and the pixel before
    assert abs(np.corrcoef(follow) - np.eye(4)).max() < 0.025


def test_erasing_can_be_switched_off_or_always_on_and_does_without_a_box_that_fits():
    """A box in spite of probability 0, or one drawn although none of ten tries lies inside the picture."""
    pictures = noise(300, 16, 16)
    assert torch.equal(augment.random_erasing(pictures, prob=0.0), pictures)
    assert torch.equal(augment.random_erasing(pictures, prob=1.0, area=(1.5, 2.0)), pictures)
    assert (augment.random_erasing(pictures, prob=1.0) != pictures).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("size, h, w", [(16, 32, 24), (6, 9, 9)])
def test_cutout_is_a_black_square_centred_on_any_pixel_and_clipped(size, h, w):
    """Centres that keep the square inside, another side, a colour, an image without one, or the same place for all."""
    n, squares = 20_000, {}                                               # bytes of what stays -> chance
    for y, x in itertools.product(range(h), range(w)):
        kept = np.full((3, h, w), 9, dtype=np.uint8)
        kept[:, max(0, y - size // 2):y + size // 2, max(0, x - size // 2):x + size // 2] = 0
        squares[kept.tobytes()] = squares.get(kept.tobytes(), 0) + 1 / (h * w)
    out = augment.cutout(torch.full((n, 3, h, w), 9, dtype=torch.uint8), *([] if size == 16 else [size]))
    counts = dict.fromkeys(squares, 0)
    for image in out.numpy():
        counts[image.tobytes()] += 1                                      # any other picture is an error
    assert as_expected(list(counts.values()), n, list(squares.values()))


# ---- Whole recipes -------------------------------------------------------------------------------------------------------

def test_pacos_query_view_is_a_padded_crop_then_auto_augment_then_cutout(monkeypatch):
    """Another order: with a policy that only inverts, the padding is white and the square still black."""
    monkeypatch.setattr(augment, "AUTO_AUGMENT", [("invert", 1.0, 0, "posterize", 0.0, 0)])
    out = augment.paco_query_view(torch.full((2000, 3, 32, 32), 200, dtype=torch.uint8))
    assert out.unique().tolist() == [0, 55, 255]                          # square, inverted picture, inverted padding
    area = (out[:, 0] == 0).sum(dim=(1, 2))
    assert 64 <= area.min() and area.max() == 256
    white = (out[:, 0, 12] == 255).sum(dim=1)                             # in a middle row: 0 to 4 columns, less the square
    assert white.max() == 4 and (white == 0).any()


def test_simclrs_view_has_the_published_rates_strengths_and_order(monkeypatch):
    """Another probability, range or strength; grey before jitter (a grey picture would get its colour cast back)."""
    blur, crop = record(monkeypatch, "gaussian_blur"), record(monkeypatch, "random_resized_crop")
    jitter = record(monkeypatch, "color_jitter", lambda _, x, *strength: x + torch.tensor([90, 0, 0]).to(x).view(3, 1, 1))
    n = 4000
    pictures = noise(n, 6, 6, 0, 100)[:, :1] + torch.tensor([0, 30, 60], dtype=torch.uint8).view(3, 1, 1)
    out = augment.simclr_view(pictures, 8)
    assert out.shape == (n, 3, 8, 8) and [(args[1:], how) for args, how in crop] == [((8,), {"scale": (0.2, 1.0)})]
    grey = (out == out[:, :1]).flatten(1).all(dim=1)
    assert as_expected(grey.sum(), n, 0.2)
    assert [args[1:] for args, _ in jitter] == [(0.4, 0.4, 0.4, 0.1)] and as_expected(len(jitter[0][0][0]), n, 0.8)
    ((blurred, sigma), _), = blur
    assert as_expected(len(blurred), n, 0.5) and len(sigma) == len(blurred)
    assert same_law(sigma, np.random.uniform(0.1, 2, 100_000))
    cast = (off(out[:, 0], out[:, 1])[~grey] > 0).flatten(1).float().mean(dim=1)
    assert as_expected((cast > 0.5).sum(), len(cast), 0.8)                # jitter's red cast, independent of grey


def test_strong_augment_is_crop_then_rand_augment_then_erasing(monkeypatch):
    """An argument that does not arrive, a padding other than an eighth, a RandAugment that runs when switched off."""
    calls, pictures = [], noise(4)
    for name in ("random_resized_crop", "random_crop_flip", "resize", "rand_augment", "three_augment", "random_erasing"):
        monkeypatch.setattr(augment, name, lambda x, *args, name=name, **how: (
            calls.append((name, *args, *how.values())) or x + 1))         # 255 + 1 is 0
    torch.testing.assert_close(augment.strong_augment(pictures, 64), (pictures + 4) / 255)
    assert calls == [("random_crop_flip", 4), ("resize", 64), ("rand_augment", 9.0), ("random_erasing", 0.25)]
    calls.clear()
    torch.testing.assert_close(augment.strong_augment(pictures, 64, "resized", "none", erasing=0.1), (pictures + 2) / 255)
    assert calls == [("random_resized_crop", 64), ("random_erasing", 0.1)]
    calls.clear()
    torch.testing.assert_close(augment.strong_augment(pictures, 64, "loader", "three"), (pictures + 2) / 255)
    assert calls == [("three_augment",), ("random_erasing", 0.25)]


VIEWS = {  # name: (function, side of what it gives, how many of 64 copies of one picture differ at least)
    "padded": (lambda x: augment.strong_augment(x, 40), 40, 50), "same size": (lambda x: augment.strong_augment(x, 32), 32, 50),
    "resized": (lambda x: augment.strong_augment(x, 40, "resized"), 40, 50), "query": (augment.paco_query_view, 32, 50),
    "plain": (lambda x: augment.strong_augment(x, 40, policy="none"), 40, 40), "auto": (augment.auto_augment, 32, 20),
    "key": (lambda x: augment.simclr_view(x, 40), 40, 50), "three": (augment.three_augment, 32, 50),
    "rand": (augment.rand_augment, 32, 32), "erasing": (augment.random_erasing, 32, 9),
    "jitter": (lambda x: augment.color_jitter(x, 0.4, 0.4, 0.4, 0.1), 32, 50),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_draws_anew_for_every_image_and_is_replayed_by_its_seed_on_any_number_of_threads(name):
    """One draw for the whole batch, a draw from elsewhere than torch's generator, an argument written into, a wrong shape."""
    view, size, fewest = VIEWS[name]
    picture, threads = noise(1), torch.get_num_threads()
    pictures, runs = picture.repeat(64, 1, 1, 1), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            torch.manual_seed(3)
            random.seed(n), np.random.seed(n)
            runs.append(view(pictures))
    finally:
        torch.set_num_threads(threads)
    out, floats = runs[0], name in ("padded", "same size", "resized", "plain")
    assert torch.equal(*runs) and not torch.equal(view(pictures), out)
    assert torch.equal(pictures, picture.expand(64, -1, -1, -1))
    assert out.shape == (64, 3, size, size) and out.is_contiguous() and out.dtype == (torch.float32 if floats else torch.uint8)
    assert not floats or 0 <= out.min() and 0.7 < out.max() <= 1
    assert len({x.numpy().tobytes() for x in out}) >= fewest


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_a_cpu_gives():
    """Levels that a GPU resizes by matrix products, and operations whose arithmetic a GPU rounds in another way."""
    pictures, box, mirror = noise(60, 40, 28, 60, 195), boxes(60, 40, 28), torch.arange(60) % 3 == 0
    for out in (16, 64):
        ours = [augment.crop_resize(x, *box, out, mirror=mirror).cpu() for x in (pictures, pictures.cuda())]
        assert off(*ours).abs().max() <= 2 and (off(*ours).abs() > 1).float().mean() < 1e-3
    for name, (_, values) in {**EXACT, **AFFINE}.items():
        images, values = crossed(noise(4, 40, 28), values)
        apart = off(each(name, images, values), each(name, images.cuda(), values).cpu()).abs()
        assert (apart > (name in AFFINE)).float().mean() <= (1e-3 if name in AFFINE else 0), name


# ---- Mixing --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("smoothing", [0.1, 0.0])
@pytest.mark.parametrize("mode, B, independent", [
    ("batch", 6, 1), ("batch", 5, 1), ("pair", 6, 3), ("pair", 5, 2), ("elem", 6, 6), ("elem", 5, 4)])
def test_images_and_labels_are_mixed_in_the_same_share_by_the_formulas(mode, B, independent, smoothing):
    """Another partner, lambda and 1 - lambda exchanged, lambda not corrected for a clipped box, draws shared by more or by
    fewer images than the mode says, an argument written into. B = 5: the middle image meets itself."""
    images, labels, rounds, different = torch.rand(B, 3, 8, 6), torch.arange(B), 60, 0
    before, smooth = images.clone(), (1 - smoothing) * np.eye(8) + smoothing / 8
    for _ in range(rounds):
        out, target = augment.mixup_cutmix(images, labels, 8, smoothing=smoothing, mode=mode)
        draws = {}
        for i, j in zip(range(B), reversed(range(B))):
            kept, pasted = (out[i] == images[i]).all(dim=0), (out[i] == images[j]).all(dim=0)         # (8,6)
            lam = 1.0 if i == j else (target[i, i].item() - smoothing / 8) / (1 - smoothing)
            assert target[i].tolist() == pytest.approx(lam * smooth[i] + (1 - lam) * smooth[j], abs=1e-6)
            if (kept | pasted).all():                                     # CutMix
                y, x = torch.where(~kept)
                assert lam == pytest.approx(kept.float().mean().item(), abs=1e-6)
                assert len(y) == 0 or len(y) == (y.max() - y.min() + 1) * (x.max() - x.min() + 1)     # a full box
            else:
                assert not kept.any() and 0 <= lam <= 1
                torch.testing.assert_close(out[i], lam * images[i] + (1 - lam) * images[j])
            if i != j:
                draws[i] = (*(~kept).flatten().tolist(), round(lam, 5))
        assert mode != "batch" or len(set(draws.values())) == 1
        assert mode != "pair" or all(draws[i] == draws[B - 1 - i] for i in draws)
        different += len(set(draws.values()))
    assert 0.85 * rounds * independent < different <= rounds * independent
    assert torch.equal(images, before) and torch.equal(labels, torch.arange(B))


def test_smoothing_gives_the_published_on_and_off_values_and_strengths_of_0_switch_off():
    """Smoothing left out, or spread over the other classes only; a mixing although both strengths are 0."""
    assert augment.smooth_one_hot(torch.tensor([2]), 5, 0.1)[0].tolist() == pytest.approx([0.02, 0.02, 0.92, 0.02, 0.02])
    images = torch.rand(6, 3, 4, 4)
    out, target = augment.mixup_cutmix(images, torch.arange(6), 8, mixup=0, cutmix=0)
    assert torch.equal(out, images)
    torch.testing.assert_close(target, 0.9 * torch.eye(8)[:6] + 0.1 / 8)


def halves(n, h, w, mixup, cutmix):
    """n black images mixed with white ones, a draw each: (share of black in the target, what is white of the picture)."""
    own = (torch.arange(2 * n) >= n).long()
    images = own.float().view(-1, 1, 1, 1).expand(2 * n, 3, h, w).contiguous()
    out, target = augment.mixup_cutmix(images, own, 2, mixup, cutmix, smoothing=0.0, mode="elem")
    return target[:n, 0].numpy(), out[:n, 0]


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 1.0), (8.0, 0.3), (2.0, 0.0), (0.0, 1.0), (0.0, 0.3)])
def test_lambda_is_beta_distributed_and_cutmixs_box_drawn_as_the_formula_with_equal_chance(mixup, cutmix):
    """A coin that favours one, a strength not used or taken for the other, one kind although it is off.

    timm's lines for the box, written out: side fraction sqrt(1 - lambda), centre anywhere, clipped; also where the box lies.
    """
    h, w, n, ours, theirs = 32, 24, 5000, [], []
    lam, white = halves(n, h, w, mixup, cutmix)
    grey = ((white > 0) & (white < 1)).flatten(1).all(dim=1).numpy()      # only mixup makes greys
    assert as_expected(grey.sum(), n, 0.5 if mixup and cutmix else float(cutmix == 0))
    if mixup:
        assert same_law(lam[grey], np.random.beta(mixup, mixup, 50_000))
    for black, box in zip(lam[~grey], white[~grey]):
        y, x = torch.where(box == 1)
        assert black == pytest.approx(1 - len(y) / (h * w), abs=1e-6)
        ours.append((len(y), y.float().mean(), x.float().mean()) if len(y) else (0, -1, -1))
    for share in np.random.beta(cutmix, cutmix, 20_000) if cutmix else []:
        cut_h, cut_w = int(h * math.sqrt(1 - share)), int(w * math.sqrt(1 - share))
        cy, cx = random.randrange(h), random.randrange(w)
        y = range(max(0, cy - cut_h // 2), min(h, cy + cut_h // 2))
        x = range(max(0, cx - cut_w // 2), min(w, cx + cut_w // 2))
        theirs.append((len(y) * len(x), (y[0] + y[-1]) / 2, (x[0] + x[-1]) / 2) if len(y) * len(x) else (0, -1, -1))
    assert all(same_law(a, b) for a, b in zip(np.array(ours).T, np.array(theirs).T))


def test_autocast_does_not_coarsen_a_resize():
    """Test images are resized inside autocast: in bfloat16 they would be up to two levels off."""
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        resized = augment.resize(images, 48)
    assert resized.dtype == torch.float32 and torch.equal(resized, augment.resize(images, 48))
