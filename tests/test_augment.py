"""augment.py against PIL, torchvision and timm, and against the formulas in plain Python loops.

Everything is seeded, so that the frequencies below are the same in every run. Their tolerances are
five standard deviations (`as_expected`), or those of a Kolmogorov-Smirnov test at 1 in 10^6
(`same_distribution`).
"""
import itertools
import math
import random

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

import augment
from images import operations, policies
from pil_reference import (BICUBIC, EXACT, FILL, apply_one, as_expected, difference, draws_of,
                           from_pil, noise, record, same_distribution, seed_everything, smooth,
                           to_pil)


@pytest.fixture(autouse=True)
def seeded():
    seed_everything()


# ---- Crop and flip -------------------------------------------------------------------------------

QUANTITIES = {
    "area": lambda top, left, height, width: height * width,
    "shape": lambda top, left, height, width: width / height,
    "top": lambda top, left, height, width: top,
    "left": lambda top, left, height, width: left,
}


@pytest.mark.parametrize("settings", [
    {}, {"scale": (0.2, 1.0)}, {"scale": (0.5, 0.9), "ratio": (1.5, 3.0), "flip": 0.2}])
def test_random_resized_crops_are_distributed_as_torchvisions(monkeypatch, settings):
    """Another range or distribution of area, shape or place; a rejected try that is used; a mirror
    that is not that coin."""
    h, w, n = 32, 40, 20_000
    calls = record(monkeypatch, augment, "crop_resize", lambda images, *args, **how: images)
    augment.random_resized_crop(torch.zeros(n, 3, h, w, dtype=torch.uint8), 7, **settings)
    ((_, *box, out), how), = calls
    scale, ratio = settings.get("scale", (0.08, 1.0)), settings.get("ratio", (3 / 4, 4 / 3))
    picture = torch.zeros(3, h, w)
    theirs = np.array([RandomResizedCrop.get_params(picture, scale, ratio) for _ in range(3000)]).T
    top, left, height, width = ours = [v.double().numpy() for v in box]
    assert out == 7 and (top >= 0).all() and (left >= 0).all()
    assert (top + height <= h).all() and (left + width <= w).all()
    for v in ours:
        assert len(v) == n and (v == v.round()).all()           # whole pixels
    for name, quantity in QUANTITIES.items():
        assert same_distribution(quantity(*ours), quantity(*theirs)), name
    assert as_expected(how["mirror"].sum(), n, settings.get("flip", 0.5))
    assert abs(np.corrcoef(how["mirror"], left)[0, 1]) < 0.036  # five standard deviations


@pytest.mark.parametrize("h, w, scale, box", [
    (8, 64, (0.5, 1.0), (0, 26, 8, 11)), (64, 8, (0.5, 1.0), (26, 0, 11, 8)),
    (8, 66, (0.5, 1.0), (0, 27, 8, 11)), (40, 40, (1.1, 2.0), (0, 0, 40, 40))])
def test_where_no_crop_fits_the_largest_central_one_is_taken(monkeypatch, h, w, scale, box):
    """A try that does not fit would read outside the picture. 11 is 8 * 4/3, rounded."""
    pictures, calls = noise(4, h, w), record(monkeypatch, augment, "crop_resize")
    assert RandomResizedCrop.get_params(pictures, scale, (3 / 4, 4 / 3)) == box
    assert augment.random_resized_crop(pictures, 16, scale).shape == (4, 3, 16, 16)
    assert torch.stack(calls[0][0][1:5], dim=1).tolist() == [list(box)] * 4


@pytest.mark.parametrize("padding, flip", [(4, 0.5), (1, 1.0), (0, 0.0)])
def test_padded_crops_are_slices_of_the_padded_picture_at_all_places_on_both_sides(padding, flip):
    """Each of 8100 crops is looked up among all of its picture: rows of another picture, a wrong
    padding or a missed place fail."""
    pictures, n, places = noise(4, 16, 12), 8100, range(2 * padding + 1)
    possible = []                               # for each picture {bytes of a crop: what it is}
    for picture in pictures.numpy():
        padded = np.pad(picture, ((0, 0), (padding, padding), (padding, padding)))
        crops = {}
        for top, left, side in itertools.product(places, places, (1, -1)):
            crop = padded[:, top:top + 16, left:left + 12][:, :, ::side]
            crops[crop.tobytes()] = top, left, side
        possible.append(crops)
    how = {} if padding == 4 else {"padding": padding, "flip": flip}        # 4, 1/2: the defaults
    out = augment.random_crop_flip(pictures.repeat(n // 4, 1, 1, 1), **how).numpy()
    found = [possible[i % 4][x.tobytes()] for i, x in enumerate(out)]
    for side, p in ((1, 1 - flip), (-1, flip)):
        counts = [found.count((top, left, side)) for top in places for left in places]
        assert as_expected(counts, len(out), p / len(places) ** 2)


# ---- RandAugment ---------------------------------------------------------------------------------

NAMES = [name for name, *_ in augment.RAND_AUGMENT]
FACTORS = ["color", "contrast", "brightness", "sharpness"]
AT_9 = {                                        # arguments at magnitude 9, of both signs
    "autocontrast": [0], "equalize": [0], "invert": [0], "rotate": [-27, 27], "posterize": [1],
    "solarize": [26], "solarize_add": [99], "color": [0.19, 1.81], "contrast": [0.19, 1.81],
    "brightness": [0.19, 1.81], "sharpness": [0.19, 1.81], "shear_x": [-0.27, 0.27],
    "shear_y": [-0.27, 0.27], "translate_x": [-0.405, 0.405], "translate_y": [-0.405, 0.405],
}


def published_argument(name, m, sign):
    """timm's formulas, which truncate to whole numbers as Python's int does."""
    if name in FACTORS:
        return max(0.1, 1 + sign * m / 10 * 0.9)
    whole = {"posterize": 4 - int(m / 10 * 4), "solarize": 256 - int(m / 10 * 256),
             "solarize_add": min(128, int(m / 10 * 110))}
    if name in whole:
        return whole[name]
    largest = {"rotate": 30, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45,
               "translate_y": 0.45}
    return sign * m / 10 * largest.get(name, 0)


def our_arguments(name, magnitudes):
    """A list, one for each of the magnitudes."""
    row = torch.full((len(magnitudes),), NAMES.index(name))
    op, value = policies.draw(augment.RAND_AUGMENT, row, torch.tensor(magnitudes).float())
    assert (op == operations.ID[name]).all()
    return (value + 0.0).tolist()               # -0 becomes 0


def test_operations_take_the_published_arguments():
    """A wrong row of the table; rounding where timm truncates: posterize keeps 1 bit from m = 7.5
    on, not from 6.25 or 8.75."""
    assert sorted(NAMES) == sorted(AT_9) and len(NAMES) == 15
    for name, expected in AT_9.items():
        assert sorted({round(v, 5) for v in our_arguments(name, [9.0] * 50)}) == expected, name
        magnitudes = [0.0, 10.0] + [random.uniform(0, 10) for _ in range(300)]
        for m, ours in zip(magnitudes, our_arguments(name, magnitudes)):
            error = min(abs(ours - published_argument(name, m, sign)) for sign in (1, -1))
            assert error < 1e-4, (name, m)


def test_operations_and_arguments_are_those_of_timms_own_table():
    """The tables above are written by hand and may be wrong too: the same with timm's functions,
    down to the picture."""
    timm = pytest.importorskip("timm.data.auto_augment")
    settings = {"img_mean": FILL, "interpolation": BICUBIC}
    theirs = timm.rand_augment_transform("rand-m9-mstd0.5-inc1", settings)
    assert theirs.num_layers == 2 and len(theirs.ops) == len(NAMES)
    our_name = {name.replace("_", ""): name for name in operations.OPERATIONS}
    for operation, m in itertools.product(theirs.ops, (0.0, 2.6, 5.1, 7.4, 9.0)):
        name = our_name[operation.name.replace("Increasing", "").replace("Rel", "").lower()]
        assert (operation.prob, operation.magnitude, operation.magnitude_std) == (0.5, 9, 0.5)
        arguments = [()] * 30                   # for operations without one
        if operation.level_fn:
            arguments = [operation.level_fn(m, operation.hparams) for _ in range(30)]
        expected = {round(*a, 4) + 0.0 if a else 0 for a in arguments}
        assert expected == {round(v, 4) for v in our_arguments(name, [m] * 30)}, (name, m)
        picture = smooth(1, 41, 28)
        result = operation.aug_fn(to_pil(picture[0]), *arguments[0], **operation.kwargs)
        ours = apply_one(name, picture, arguments[0] or [0.0])[0]
        apart = difference(ours, from_pil(result)).abs()
        if name == "rotate":                    # another bicubic kernel
            assert apart.float().mean() < 4, m
        else:
            assert apart.max() <= (0 if name in EXACT else 1), (name, m)


@pytest.mark.parametrize("settings", [(), (2, 1.0, 2.0, 0.3)])
def test_two_of_fifteen_operations_with_own_coin_magnitude_and_sign_for_every_image(monkeypatch,
                                                                                    settings):
    """Draws without replacement, a rate other than 1/2, one magnitude or sign for the batch, no
    clipping to 0..10, variance for deviation, an unfair sign, two operations drawn together."""
    n, (_, magnitude, deviation, prob) = 100_000, settings or (2, 9.0, 0.5, 0.5)
    ops, values, how = draws_of(monkeypatch, augment, n, augment.rand_augment, *settings)
    assert how == [{}, {}]                      # ImageNet's mean as fill, bicubic
    rate = torch.zeros(len(operations.OPERATIONS) + 1).double()             # of -1, 0, 1, ...
    rate[0] = 1 - prob
    rate[[operations.ID[name] + 1 for name in NAMES]] = prob / 15
    pairs = (ops[:, 0] + 1) * len(rate) + ops[:, 1] + 1
    counts = torch.bincount(pairs, minlength=len(rate) ** 2)
    assert as_expected(counts, n, (rate[:, None] * rate).flatten())
    for name, both_signs in AT_9.items():
        drawn = values[ops == operations.ID[name]]
        m = (magnitude + deviation * np.random.randn(20_000)).clip(0, 10)
        expected = [published_argument(name, v, random.choice((1, -1))) for v in m]
        assert same_distribution(drawn, expected), name
        if len(both_signs) == 2:
            middle = sum(both_signs) / 2
            assert as_expected((drawn > middle).sum(), (drawn != middle).sum(), 0.5), name


# ---- Random erasing ------------------------------------------------------------------------------

def erase(n, h, w, **settings):
    """The same draws on black and on white pictures, which agree only where there is noise.

    Returns (pictures, mask of the noise).
    """
    black = torch.zeros(n, 3, h, w, dtype=torch.uint8)
    white = torch.full_like(black, 255)
    torch.manual_seed(1)
    on_black = augment.random_erasing(black, **settings)
    torch.manual_seed(1)
    on_white = augment.random_erasing(white, **settings)
    mask = (on_black == on_white).all(dim=1)                    # (n,h,w)
    outside = ~mask[:, None].expand(n, 3, h, w)
    assert (on_black[outside] == 0).all() and (on_white[outside] == 255).all()
    assert (black == 0).all() and (white == 255).all()          # the arguments are unchanged
    return on_black, mask


@pytest.mark.parametrize("area, prob", [((0.02, 1 / 3), 0.25), ((0.3, 0.9), 0.6)])
def test_erasing_draws_its_box_as_the_formula_and_leaves_the_rest_untouched(area, prob):
    """timm's loop, written out, against the boxes found: rate, area, shape and place.

    Of boxes of 30 to 90 % of the picture many do not fit, so that the later tries count too.
    """
    n, h, w = 2000, 32, 24
    settings = {} if prob == 0.25 else {"scale": area, "prob": prob}         # first: the defaults
    _, mask = erase(n, h, w, **settings)
    erased = mask.flatten(1).any(dim=1)
    assert as_expected(erased.sum(), n, prob)
    ours, theirs = [], []
    for box in mask[erased].numpy():
        y, x = np.nonzero(box)
        ours.append((y.min(), x.min(), np.ptp(y) + 1, np.ptp(x) + 1))
        assert box.sum() == ours[-1][2] * ours[-1][3]           # a full box
        assert ours[-1][2] < h and ours[-1][3] < w              # as in timm, never a whole side
    for _ in range(10_000):
        for _ in range(10):
            size = random.uniform(*area) * h * w
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
            if height < h and width < w:
                top, left = random.randint(0, h - height), random.randint(0, w - width)
                theirs.append((top, left, height, width))
                break
    ours, theirs = np.array(ours).T, np.array(theirs).T
    for name, quantity in QUANTITIES.items():
        assert same_distribution(quantity(*ours), quantity(*theirs)), name


def test_erased_pixels_are_normal_noise_in_imagenet_units_rounded_and_clipped_each_its_own():
    """Uniform noise, one color per box, noise not brought back from normalised units, channels
    exchanged or tied together."""
    out, mask = erase(2000, 16, 16, prob=1.0)
    channels = [out[:, c][mask].numpy() for c in range(3)]
    for drawn, mean, std in zip(channels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)):
        expected = 255 * (mean + std * np.random.randn(200_000))
        assert same_distribution(drawn[:50_000], expected.clip(0, 255).round())
    columns = [drawn[1:] for drawn in channels] + [channels[0][:-1]]        # and the pixel before
    assert abs(np.corrcoef(columns) - np.eye(4)).max() < 0.025


def test_erasing_can_be_always_on_or_off_and_does_without_a_box_that_fits():
    """A box in spite of probability 0, or although none of ten tries lies inside the picture."""
    pictures = noise(300, 16, 16)
    assert torch.equal(augment.random_erasing(pictures, prob=0.0), pictures)
    assert torch.equal(augment.random_erasing(pictures, prob=1.0, scale=(1.5, 2.0)), pictures)
    changed = augment.random_erasing(pictures, prob=1.0) != pictures
    assert changed.flatten(1).any(dim=1).all()


# ---- Whole pipelines -----------------------------------------------------------------------------

def test_pacos_query_view_is_a_padded_crop_then_auto_augment_then_cutout(monkeypatch):
    """Another order: with a policy that only inverts, the padding is white, the square black."""
    invert = [("invert", 1.0, 0, "posterize", 0.0, 0)]
    monkeypatch.setattr(policies, "AUTO_AUGMENT", invert)
    out = augment.paco_query_view(torch.full((2000, 3, 32, 32), 200, dtype=torch.uint8))
    assert out.unique().tolist() == [0, 55, 255]                # square, picture, padding
    area = (out[:, 0] == 0).sum(dim=(1, 2))
    assert 64 <= area.min() and area.max() == 256
    white = (out[:, 0, 12] == 255).sum(dim=1)   # in a middle row: 0 to 4, less the square
    assert white.max() == 4 and (white == 0).any()


def test_simclrs_view_has_the_published_rates_strengths_and_order(monkeypatch):
    """Another probability, range or strength; gray before jitter (a gray picture would get its
    color cast back)."""
    def add_red(images, **strengths):
        return images + torch.tensor([90, 0, 0]).to(images).view(3, 1, 1)
    blur = record(monkeypatch, augment, "gaussian_blur")
    crop = record(monkeypatch, augment, "random_resized_crop")
    jitter = record(monkeypatch, augment, "color_jitter", add_red)
    n = 4000
    ramp = torch.tensor([0, 30, 60], dtype=torch.uint8).view(3, 1, 1)
    out = augment.simclr_view(noise(n, 6, 6, 0, 100)[:, :1] + ramp, 8)
    assert out.shape == (n, 3, 8, 8)
    assert [(args[1:], how) for args, how in crop] == [((8,), {"scale": (0.2, 1.0)})]
    gray = (out == out[:, :1]).flatten(1).all(dim=1)
    assert as_expected(gray.sum(), n, 0.2)
    ((jittered,), strengths), = jitter
    assert strengths == {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    assert as_expected(len(jittered), n, 0.8)
    ((blurred,), how), = blur
    assert as_expected(len(blurred), n, 0.5) and len(how["sigma"]) == len(blurred)
    assert same_distribution(how["sigma"], np.random.uniform(0.1, 2, 100_000))
    red = (difference(out[:, 0], out[:, 1])[~gray] > 0).flatten(1).float().mean(dim=1)
    assert as_expected((red > 0.5).sum(), len(red), 0.8)        # jitter, independent of gray


def test_strong_augment_is_crop_then_rand_augment_then_erasing(monkeypatch):
    """An argument that does not arrive, another order, a padding other than an eighth."""
    calls, pictures = [], noise(4)

    def replacement(name):
        def step(images, *args, **how):
            calls.append((name, *args, *how.values()))
            return images + 1                                   # 255 + 1 is 0
        return step
    for name in ("random_resized_crop", "random_crop_flip", "resize", "rand_augment",
                 "random_erasing"):
        monkeypatch.setattr(augment, name, replacement(name))
    out = augment.strong_augment(pictures, 64)
    torch.testing.assert_close(out, (pictures + 4) / 255)
    assert calls == [("random_crop_flip", 4), ("resize", 64), ("rand_augment", 2, 9.0),
                     ("random_erasing", 0.25)]
    calls.clear()
    out = augment.strong_augment(pictures, 64, "resized", rand_ops=1, magnitude=5.0, erasing=0.1)
    torch.testing.assert_close(out, (pictures + 3) / 255)
    assert calls == [("random_resized_crop", 64), ("rand_augment", 1, 5.0), ("random_erasing", 0.1)]
    calls.clear()
    augment.strong_augment(pictures, 64, "loader")
    assert calls == [("rand_augment", 2, 9.0), ("random_erasing", 0.25)]


def test_without_operations_rand_augment_changes_nothing():
    """rand_ops = 0 switches it off."""
    pictures = noise(20)
    assert augment.rand_augment(pictures, num_ops=0) is pictures


VIEWS = {       # name: (function, side of its images, fewest different ones of 64 copies)
    "padded": (lambda x: augment.strong_augment(x, 40), 40, 50),
    "same size": (lambda x: augment.strong_augment(x, 32), 32, 50),
    "resized": (lambda x: augment.strong_augment(x, 40, "resized"), 40, 50),
    "plain": (lambda x: augment.strong_augment(x, 40, rand_ops=0), 40, 40),
    "rand": (augment.rand_augment, 32, 32),
    "erasing": (augment.random_erasing, 32, 9),
    "query": (augment.paco_query_view, 32, 50),
    "auto": (policies.auto_augment, 32, 20),
    "key": (lambda x: augment.simclr_view(x, 40), 40, 50),
    "jitter": (augment.simclr_jitter, 32, 50),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_draws_anew_for_every_image_and_is_replayed_by_its_seed(name):
    """One draw for the whole batch, a draw from elsewhere than torch's generator or that depends on
    the number of threads, an argument that is overwritten, a wrong shape."""
    view, size, fewest = VIEWS[name]
    picture, threads, runs = noise(1), torch.get_num_threads(), []
    pictures = picture.repeat(64, 1, 1, 1)
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            random.seed(n)
            np.random.seed(n)
            torch.manual_seed(3)
            runs.append(view(pictures))
    finally:
        torch.set_num_threads(threads)
    out, floats = runs[0], name in ("padded", "same size", "resized", "plain")
    assert torch.equal(*runs) and not torch.equal(view(pictures), out)
    assert torch.equal(pictures, picture.expand(64, -1, -1, -1))
    assert out.shape == (64, 3, size, size) and out.is_contiguous()
    assert out.dtype == (torch.float32 if floats else torch.uint8)
    if floats:
        assert 0 <= out.min() and 0.7 < out.max() <= 1
    assert len({x.numpy().tobytes() for x in out}) >= fewest


# ---- Mixing --------------------------------------------------------------------------------------

@pytest.mark.parametrize("smoothing", [0.1, 0.0])
@pytest.mark.parametrize("B", [6, 5])
def test_images_and_labels_are_mixed_in_the_same_proportion_by_the_formulas(B, smoothing):
    """Another partner, lambda and 1 - lambda exchanged, lambda not corrected for a clipped box,
    different draws within a batch, the same draw for every batch, an argument that is overwritten.
    B = 5: the middle image is mixed with itself."""
    images, labels, K, draws, kinds = torch.rand(B, 3, 8, 6), torch.arange(B), 8, set(), set()
    before, smoothed = images.clone(), (1 - smoothing) * np.eye(K) + smoothing / K
    for _ in range(60):
        out, target = augment.mixup_cutmix(images, labels, K, smoothing=smoothing)
        in_batch = set()
        for i, j in zip(range(B), reversed(range(B))):
            lam = 1.0
            if i != j:
                lam = (target[i, i].item() - smoothing / K) / (1 - smoothing)
            expected = lam * smoothed[i] + (1 - lam) * smoothed[j]
            assert target[i].tolist() == pytest.approx(expected, abs=1e-6)
            own = (out[i] == images[i]).all(dim=0)              # (8,6)
            pasted = (out[i] == images[j]).all(dim=0)
            if (own | pasted).all():                            # CutMix
                y, x = torch.where(~own)
                assert lam == pytest.approx(own.float().mean().item(), abs=1e-6)
                if len(y):                                      # a full box
                    assert len(y) == (y.max() - y.min() + 1) * (x.max() - x.min() + 1)
            else:
                assert not own.any() and 0 <= lam <= 1
                torch.testing.assert_close(out[i], lam * images[i] + (1 - lam) * images[j])
            if i != j:
                kinds.add(bool((own | pasted).all()))
                in_batch.add((*own.flatten().tolist(), round(lam, 5)))
        assert len(in_batch) == 1
        draws |= in_batch
    assert len(draws) > 50 and kinds == {True, False}
    assert torch.equal(images, before) and torch.equal(labels, torch.arange(B))


def test_smoothing_gives_the_published_on_and_off_values():
    """Smoothing left out or spread over the other classes only."""
    smoothed = augment.smooth_one_hot(torch.tensor([2]), 5, 0.1)[0]
    assert smoothed.tolist() == pytest.approx([0.02, 0.02, 0.92, 0.02, 0.02])


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 1.0), (8.0, 0.3), (2.0, 0.0), (0.0, 0.3)])
def test_lambda_is_beta_distributed_and_cutmixs_box_drawn_as_the_formula_with_equal_chance(mixup,
                                                                                           cutmix):
    """A coin that favors one, a strength not used or taken for the other, one kind although it is
    off. timm's lines for the box, written out: side sqrt(1 - lambda), center anywhere, clipped."""
    h, w, n, mixup_lams, ours, theirs = 32, 24, 600, [], [], []
    black_and_white = torch.zeros(2, 3, h, w)
    black_and_white[1] = 1
    for _ in range(n):
        out, target = augment.mixup_cutmix(black_and_white, torch.tensor([0, 1]), 2, mixup, cutmix,
                                           smoothing=0.0)
        black, white = target[0, 0].item(), out[0, 0] == 1
        if not (white | (out[0, 0] == 0)).all():                # gray: mixup
            mixup_lams.append(black)
            continue
        y, x = torch.where(white)
        assert black == pytest.approx(1 - len(y) / (h * w), abs=1e-6)
        box = (len(y), y.float().mean(), x.float().mean()) if len(y) else (0, -1, -1)
        ours.append(box)
    chance = 0.5
    if not mixup or not cutmix:
        chance = float(mixup > 0)
    assert as_expected(len(mixup_lams), n, chance)
    if mixup:
        assert same_distribution(mixup_lams, np.random.beta(mixup, mixup, 50_000))
    for lam in np.random.beta(cutmix, cutmix, 5_000) if cutmix else []:
        cut_h, cut_w = int(h * math.sqrt(1 - lam)), int(w * math.sqrt(1 - lam))
        cy, cx = random.randrange(h), random.randrange(w)
        y = range(max(0, cy - cut_h // 2), min(h, cy + cut_h // 2))
        x = range(max(0, cx - cut_w // 2), min(w, cx + cut_w // 2))
        center = (-1, -1)
        if len(y) * len(x):
            center = (y[0] + y[-1]) / 2, (x[0] + x[-1]) / 2
        theirs.append((len(y) * len(x), *center))
    for a, b in zip(np.array(ours).T, np.array(theirs).T):
        assert same_distribution(a, b)
