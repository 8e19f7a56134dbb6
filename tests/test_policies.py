"""images/policies.py (and RandAugment) against torchvision's tables, PIL, and every possible
outcome counted."""
import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

import augment
from images import operations, policies
from pil_reference import (AFFINE, AUTO, EXACT, GRAY, NEAREST, as_expected, draws_of, from_pil,
                           noise, record, same_distribution, seed_everything, to_pil)

NAME = {name.replace("_", ""): name for name in operations.OPERATIONS}  # from torchvision's names
POLICY = [[(NAME[name.lower()], prob, k) for name, prob, k in pair]
          for pair in AutoAugment(AutoAugmentPolicy.CIFAR10).policies]


@pytest.fixture(autouse=True)
def seeded():
    seed_everything()


def published_argument(name, k, sign):
    """What AutoAugment's code computes from k (None: the operation has no argument) and a sign."""
    if k is None:
        return 0
    if name in ("color", "contrast", "brightness", "sharpness"):
        return 1 + sign * 0.1 * k
    own = {"posterize": 8 - k // 2, "solarize": 256 - 256 * k / 9, "rotate": 30 * k / 9,
           "shear_y": sign * 0.3 * k / 9}
    return own.get(name, sign * 150 / 331 * k / 9)


def test_the_policy_is_the_published_one():
    """A digit mistyped in one of the 25 rows: against torchvision's own table."""
    assert len(policies.AUTO_AUGMENT) == len(POLICY) == 25
    for row, pair in zip(policies.AUTO_AUGMENT, POLICY):
        for (name, prob, k), theirs in zip((row[:3], row[3:]), pair):
            assert (name, prob) == theirs[:2] and theirs[2] in (None, k)


def test_pairs_operations_and_arguments_occur_as_often_as_the_policy_says(monkeypatch):
    """A pair never drawn, one coin for both operations or for the whole batch, a range that ends
    elsewhere, an unfair sign.

    Every possible outcome (two operations, two arguments; -1: not applied) is counted, and there
    are no others.
    """
    expected, n = {}, 120_000
    for pair in POLICY:
        halves = []
        for name, prob, k in pair:
            halves.append([(-1, 0, 1 - prob)])
            for sign in (1, -1):
                argument = round(1000 * published_argument(name, k, sign))
                halves[-1].append((operations.ID[name], argument, prob / 2))
        for (op1, v1, p1), (op2, v2, p2) in itertools.product(*halves):
            if p1 * p2 > 0:                                     # one operation has probability 0
                outcome = op1, op2, v1, v2
                expected[outcome] = expected.get(outcome, 0) + p1 * p2 / 25
    ops, values, how = draws_of(monkeypatch, policies, n, policies.auto_augment)
    assert how == [AUTO, AUTO]
    arguments = (1000 * values).round().long() * (ops >= 0)
    outcomes, counts = torch.cat([ops, arguments], dim=1).unique(dim=0, return_counts=True)
    outcomes = [tuple(outcome) for outcome in outcomes.tolist()]
    assert sorted(outcomes) == sorted(expected) and len(expected) > 90
    assert as_expected(counts, n, [expected[outcome] for outcome in outcomes])


def jitter(images):
    return policies.color_jitter(images, 0.4, 0.4, 0.4)


@pytest.mark.parametrize("module, policy, exact", [
    (policies, policies.auto_augment, [*EXACT, "translate_x"]), (policies, jitter, EXACT),
    (augment, augment.rand_augment, EXACT)])
def test_a_whole_policy_does_what_pil_does_with_the_same_draws(monkeypatch, module, policy, exact):
    """Operations in the wrong order, the argument of another one, a second operation that does not
    start from the first one's result. Pictures with operations that are not exact are left out."""
    calls = record(monkeypatch, module, "apply_operations")
    pictures, compared = noise(250, 24, 17), 0
    for i, ours in enumerate(policy(pictures)):
        steps = [(operations.OPERATIONS[op[i]], value[i].item())
                 for (_, op, value), _ in calls if op[i] >= 0]
        if not all(name in exact for name, _ in steps):
            continue
        theirs = to_pil(pictures[i])
        for name, value in steps:
            if name in EXACT:
                theirs = EXACT[name][0](theirs, value)
            else:
                theirs = AFFINE[name][0](theirs, value, resample=NEAREST, fillcolor=GRAY)
        assert torch.equal(ours, from_pil(theirs)), steps
        compared += len(steps) > 0
    assert compared > 90


@pytest.mark.parametrize("hue", [0.1, 0.0])
def test_jitter_draws_every_factor_from_its_range_and_all_orders_equally_often(monkeypatch, hue):
    """A fixed order, one order for the whole batch, one strength used for another, factors drawn
    together, one not applied."""
    n, names = 24_000, ["brightness", "contrast", "color", "hue"]
    ids = [operations.ID[name] for name in names if hue or name != "hue"]
    ops, values, _ = draws_of(monkeypatch, policies, n, policies.color_jitter, 0.3, 0.8, 1.5, hue)
    orders, counts = ops.unique(dim=0, return_counts=True)      # ops (n,4) or (n,3)
    assert sorted(map(tuple, orders.tolist())) == sorted(itertools.permutations(ids))
    assert as_expected(counts, n, 1 / math.factorial(len(ids)))
    amounts = [values[ops == number] for number in ids]         # (n,) each, by image
    for drawn, low, high in zip(amounts, (0.7, 0.2, 0.0, -0.1), (1.3, 1.8, 2.5, 0.1)):
        assert low <= drawn.min() + 1e-6 and drawn.max() <= high + 1e-6
        assert same_distribution((drawn - low) / (high - low), np.random.rand(100_000))
    places = [(ops == number).int().argmax(dim=1) for number in ids[:2]]
    correlation = np.corrcoef([*amounts, *places])
    off_diagonal = correlation[:len(ids)] - np.eye(len(correlation))[:len(ids)]
    assert abs(off_diagonal).max() < 0.035                      # five standard deviations


@pytest.mark.parametrize("size, h, w", [(16, 32, 24), (6, 9, 9)])
def test_cutout_is_a_black_square_centered_on_any_pixel_and_clipped(size, h, w):
    """Centers that keep the square inside, another side, a color, an image without a square, the
    same place for all."""
    n, chance = 10_000, {}                                      # bytes of a result -> probability
    for y, x in itertools.product(range(h), range(w)):
        kept = np.full((3, h, w), 9, dtype=np.uint8)
        kept[:, max(0, y - size // 2):y + size // 2, max(0, x - size // 2):x + size // 2] = 0
        chance[kept.tobytes()] = chance.get(kept.tobytes(), 0) + 1 / (h * w)
    pictures = torch.full((n, 3, h, w), 9, dtype=torch.uint8)
    out = policies.cutout(pictures) if size == 16 else policies.cutout(pictures, size)
    counts = dict.fromkeys(chance, 0)
    for image in out.numpy():
        counts[image.tobytes()] += 1                            # any other picture is an error
    assert as_expected(list(counts.values()), n, list(chance.values()))
