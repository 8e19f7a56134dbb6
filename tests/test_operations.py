"""images/operations.py against PIL, torchvision and colorsys, image by image."""
import colorsys
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torchvision.transforms import functional as tv

from images import operations
from pil_reference import (AFFINE, AUTO, BICUBIC, EXACT, FILL, GRAY, NEAREST, apply_one, difference,
                           every_pair, from_pil, noise, seed_everything, smooth, to_pil)


@pytest.fixture(autouse=True)
def seeded():
    seed_everything()


# ---- Operations ----------------------------------------------------------------------------------

@pytest.mark.parametrize("h, w", [(32, 32), (27, 40), (3, 4), (2, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("name", EXACT)
def test_a_tone_or_color_operation_gives_pils_picture_to_the_bit(name, h, w):
    """Another formula or rounding; one image's statistics or argument used for another."""
    flat = torch.tensor([0, 255, 93], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, h, w)
    means = []                                  # whose mean is 10.5, just below, and 10
    for n in (h * w // 2, (h * w - 1) // 2, 1):
        picture = (torch.arange(h * w) < n).to(torch.uint8).add(10)
        means.append(picture.view(1, 1, h, w).expand(1, 3, h, w))
    pictures = torch.cat([noise(3, h, w), noise(2, h, w, 40, 200), noise(1, h, w, 97, 98),
                          smooth(2, h, w), flat, *means])
    pictures[0, 1], pictures[3, 2] = 77, 0                      # constant channels
    pictures[1, 0] = pictures[1, 0] // 2                        # a channel of another range
    pil, values = EXACT[name]
    pictures, values = every_pair(pictures, values)
    for picture, value, ours in zip(pictures, values, apply_one(name, pictures, values)):
        theirs = from_pil(pil(to_pil(picture), value))
        assert torch.equal(ours, theirs), (value, difference(ours, theirs).abs().max())


@pytest.mark.parametrize("how", [{}, {"fill": (255, 0, 9)}, AUTO])
@pytest.mark.parametrize("h, w", [(32, 32), (41, 28)])
@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y"])
def test_shears_and_translations_are_pils_rounded_where_pil_truncates(name, h, w, how):
    """A wrong direction, amount, fixed point, kernel or fill, inside or at the border.

    Ours is 0 or 1 brighter. Nearest translations are PIL's to the bit; shears are bicubic even
    then, as published.
    """
    pil, values = AFFINE[name]
    values = values + [random.uniform(-0.4, 0.4) for _ in range(6)]
    pictures, values = every_pair(torch.cat([noise(2, h, w), smooth(1, h, w)]), values)
    nearest = how is AUTO and "translate" in name
    pil_how = {"resample": NEAREST if nearest else BICUBIC, "fillcolor": how.get("fill", FILL)}
    for picture, value, ours in zip(pictures, values, apply_one(name, pictures, values, **how)):
        brighter = difference(ours, from_pil(pil(to_pil(picture), value, **pil_how)))
        assert 0 <= brighter.min() and brighter.max() <= (0 if nearest else 1), value


@pytest.mark.parametrize("h, w", [(64, 48), (56, 56)])
def test_a_rotation_is_pils_on_smooth_pictures_and_the_nearest_one_on_any(h, w):
    """A wrong direction, angle, center or fill. Half a pixel of shift would be 4 to 9 values."""
    rotate, values = AFFINE["rotate"]
    pictures = smooth(len(values), h, w)
    white, framed = Image.new("L", (w, h), 255), Image.new("L", (w, h), 0)
    framed.paste(255, (3, 3, w - 3, h - 3))
    for picture, value, ours in zip(pictures, values, apply_one("rotate", pictures, values)):
        inside = np.array(rotate(framed, value)) > 0            # 3 pixels or more from the border
        outside = np.array(rotate(white, value).filter(ImageFilter.MaxFilter(7))) == 0
        theirs = from_pil(rotate(to_pil(picture), value, resample=BICUBIC, fillcolor=FILL))
        assert difference(ours, theirs).abs().amax(dim=0)[inside].max() <= 2
        assert (ours.permute(1, 2, 0)[outside] == torch.tensor(FILL)).all()
        assert inside.mean() > 0.4 and (outside.any() or abs(value) == 3)
    values = values + [30 * k / 9 for k in range(10)]
    pictures, values = every_pair(noise(2, h, w), values)
    rotated = apply_one("rotate", pictures, values, **AUTO)
    for picture, value, ours in zip(pictures, values, rotated):
        theirs = from_pil(rotate(to_pil(picture), value, resample=NEAREST, fillcolor=GRAY))
        differ = difference(ours, theirs) != 0                  # a source between two pixels
        assert differ.any(dim=0).float().mean() <= 0.01, value


def test_hue_turns_every_pixel_as_colorsys_does():
    """Another color circle or direction, one turn for all images, grays that change."""
    pictures = torch.cat([noise(3, 8, 8), noise(2, 8, 8, 100, 102), smooth(1, 8, 8)])
    pictures[:, :, 0] = pictures[:, :1, 0]                      # a row of grays
    pictures, turns = every_pair(pictures, [-0.5, -0.3, -0.1, 0.0, 0.05, 0.1, 0.33, 0.5])
    for ours, picture, turn in zip(apply_one("hue", pictures, turns), pictures, turns):
        before = picture.flatten(1).T.double().div(255).tolist()
        for (r, g, b), after in zip(before, ours.flatten(1).T.tolist()):
            h, s, v = colorsys.rgb_to_hsv(r, g, b)
            exact = [255 * c for c in colorsys.hsv_to_rgb((h + turn) % 1, s, v)]
            assert after == pytest.approx(exact, abs=0.501), (r, g, b, turn)        # rounded
        assert turn or torch.equal(ours, picture)


def test_grayscale_is_pils_luma_to_the_bit():
    """Other weights or another rounding, which would show in a few of a million pixels."""
    picture = noise(1, 1000, 1000)
    theirs = torch.from_numpy(np.array(to_pil(picture[0]).convert("L")))
    assert torch.equal(operations.grayscale(picture)[0, 0], theirs)


@pytest.mark.parametrize("h, w", [(40, 28), (9, 30), (3, 2)])
def test_blur_is_three_box_blurs_with_an_own_sigma_for_every_image(h, w):
    """A wrong width, a border that is not repeated, rows blurred as columns, one sigma for all.

    The formula in float64 must be met to the rounding; PIL rounds after each of its six passes,
    up to 3 in all.
    """
    sigmas = [0.0, 0.1, 0.3, 0.7, 1.1, 1.5, 2.0, 3.3, 5.0]
    pictures, sigmas = every_pair(torch.cat([noise(1, h, w), smooth(1, h, w)]), sigmas)
    blurred = operations.gaussian_blur(pictures, torch.tensor(sigmas))
    for picture, s, ours in zip(pictures, sigmas, blurred):
        exact = picture.double().numpy()
        l = math.floor((math.sqrt(4 * s * s + 1) - 1) / 2)      # whole pixels to either side
        edge = (s * s / 3) * (2 * l + 1) - (2 * l + 1) * l * (l + 1) / 3    # weight of the next
        edge /= 2 * ((l + 1) ** 2 - s * s / 3)
        for axis in (1, 2, 1, 2, 1, 2):
            padding = [(0, 0), (0, 0), (0, 0)]
            padding[axis] = (l + 1, l + 1)
            x = np.pad(exact, padding, mode="edge")
            parts = [x.take(range(i, i + exact.shape[axis]), axis) for i in range(2 * l + 3)]
            exact = sum(parts[1:-1]) + edge * (parts[0] + parts[-1])
            exact /= 2 * l + 1 + 2 * edge
        assert np.abs(ours.numpy() - exact).max() < 0.502, s
        pils = from_pil(to_pil(picture).filter(ImageFilter.GaussianBlur(s)))
        apart = difference(ours, pils).abs()
        assert apart.max() <= (3 if s else 0) and apart.float().mean() < 1.1, s


@pytest.mark.parametrize("how", [{}, AUTO])
def test_a_batch_of_all_operations_gives_every_image_what_it_gets_alone(how):
    """Results, arguments or statistics that reach other images; -1 that changes something; an
    argument that is overwritten."""
    values = {"hue": [-0.2, 0.3]}
    values |= {name: list(tried) for name, (_, tried) in {**EXACT, **AFFINE}.items()}
    assert set(values) == set(operations.OPERATIONS) == set(operations.ID)
    wanted = [(-1, 0.5)] * 5
    for name, tried in values.items():
        wanted += [(operations.ID[name], float(random.choice(tried))) for _ in range(3)]
    random.shuffle(wanted)
    images = noise(len(wanted), 12, 9)
    op, value = torch.tensor([o for o, _ in wanted]), torch.tensor([v for _, v in wanted])
    before = [v.clone() for v in (images, op, value)]
    out = operations.apply_operations(images, op, value, **how)
    for now, old in zip((images, op, value), before):
        assert torch.equal(now, old)
    assert out.dtype == torch.uint8 and out.shape == images.shape and out.is_contiguous()
    for i, (number, v) in enumerate(wanted):
        alone = images[i:i + 1]
        if number >= 0:
            alone = apply_one(operations.OPERATIONS[number], alone, [v], **how)
        assert torch.equal(out[i:i + 1], alone), operations.OPERATIONS[number]


def test_apply_where_replaces_the_chosen_images_and_only_them():
    """Results that land on other images; an error when no image is chosen, or all are."""
    images = noise(50, 2, 2)
    for chosen in (torch.rand(50) < 0.4, torch.zeros(50).bool(), torch.ones(50).bool()):
        out = operations.apply_where(images, chosen, lambda x: 255 - x)
        assert torch.equal(out, torch.where(chosen.view(-1, 1, 1, 1), 255 - images, images))


def test_to_float_maps_0_to_255_onto_0_to_1_and_leaves_floats():
    """A range of 0..255 or 0..255/256 that reaches the network; floats divided a second time."""
    floats = operations.to_float(torch.arange(256, dtype=torch.uint8))
    torch.testing.assert_close(floats, torch.linspace(0, 1, 256))
    assert operations.to_float(floats) is floats


# ---- Crop and resize -----------------------------------------------------------------------------

def random_boxes(n, h, w):
    """n boxes (top, left, height, width) of 2 pixels up to the whole picture: float (4,n)."""
    height, width = torch.randint(2, h + 1, (n,)), torch.randint(2, w + 1, (n,))
    height[0], width[0] = h, w
    top = (torch.rand(n) * (h - height + 1)).floor()
    left = (torch.rand(n) * (w - width + 1)).floor()
    return torch.stack([top, left, height, width]).float()


def torch_resize(image, size):
    return F.interpolate(image, size, mode="bicubic", antialias=True)


@pytest.mark.parametrize("low, high", [(0, 255), (60, 195)])
@pytest.mark.parametrize("out", [5, 32, 90])
def test_crop_and_resize_of_uint8_is_pils_and_of_floats_the_exact_one(out, low, high):
    """A wrong kernel, half a pixel of shift, no antialiasing, pixels from outside the box, a wrong
    mirror.

    uint8 on a CPU is rounded and clipped between rows and columns, as in PIL: of noise in 0..255
    that changes a few pixels by up to 25 against floats, of noise in 60..195 none.
    """
    h, w = 64, 48
    pictures, box = noise(24, h, w, low, high), random_boxes(24, h, w)
    mirror = torch.arange(24) % 3 == 0
    ours = operations.crop_resize(pictures, *box, out, mirror=mirror)
    floats = operations.crop_resize(operations.to_float(pictures), *box, out, mirror=mirror)
    assert ours.dtype == torch.uint8 and ours.shape == floats.shape == (24, 3, out, out)
    for i, (top, left, bh, bw) in enumerate(box.int().T.tolist()):
        cut = pictures[i:i + 1, :, top:top + bh, left:left + bw].double()
        exact = torch_resize(cut, (out, out))[0].clamp(0, 255)
        rows = torch_resize(cut, (bh, out)).round().clamp(0, 255)
        twice_rounded = torch_resize(rows, (out, out))[0].round().clamp(0, 255)
        pil = to_pil(pictures[i]).crop((left, top, left + bw, top + bh))
        pil = from_pil(pil.resize((out, out), BICUBIC))
        if mirror[i]:
            exact, twice_rounded, pil = exact.flip(2), twice_rounded.flip(2), pil.flip(2)
        assert (255 * floats[i] - exact).abs().max() < 5e-3, i
        references = [twice_rounded, pil, exact.round()] if low else [twice_rounded]
        for theirs in references:
            apart = difference(ours[i], theirs).abs()
            assert apart.max() <= 2 and (apart > 1).float().mean() < 1e-3, i
    plain = operations.crop_resize(pictures, *box, out)
    assert torch.equal(ours, torch.where(mirror.view(-1, 1, 1, 1), plain.flip(3), plain))


@pytest.mark.parametrize("size", [20, 56, 90])
def test_resize_is_pils_and_the_center_crop_torchvisions(size):
    """The crop of an odd margin shifted by a pixel; a resize that keeps the shape instead of
    filling the square."""
    pictures = noise(4, 64, 48, 60, 195)
    ours = operations.resize(pictures, size)
    for picture, resized in zip(pictures, ours):
        theirs = from_pil(to_pil(picture).resize((size, size), BICUBIC))
        assert difference(resized, theirs).abs().max() <= 2
    assert operations.resize(ours, size) is ours                # nothing to do
    for smaller in (size, size - 1, size - 6, size - 11, 7):
        theirs = tv.center_crop(ours, [smaller, smaller])
        assert torch.equal(operations.center_crop(ours, smaller), theirs)


def test_autocast_does_not_coarsen_a_resize():
    """Test images are resized inside autocast: bfloat16 would change them by up to 2/255."""
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        resized = operations.resize(images, 48)
    assert resized.dtype == torch.float32 and torch.equal(resized, operations.resize(images, 48))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU in CUDA_VISIBLE_DEVICES")
def test_a_gpu_gives_what_a_cpu_gives():
    """Matrix products instead of the CPU's resize; arithmetic that a GPU rounds in another way."""
    pictures, box = noise(60, 40, 28, 60, 195), random_boxes(60, 40, 28)
    mirror = torch.arange(60) % 3 == 0
    for out in (16, 64):
        ours = [operations.crop_resize(x, *box, out, mirror=mirror).cpu()
                for x in (pictures, pictures.cuda())]
        apart = difference(*ours).abs()
        assert apart.max() <= 2 and (apart > 1).float().mean() < 1e-3
    for name, (_, values) in {**EXACT, **AFFINE}.items():
        images, values = every_pair(noise(4, 40, 28), values)
        on_gpu = apply_one(name, images.cuda(), values).cpu()
        apart = difference(apply_one(name, images, values), on_gpu).abs()
        if name in AFFINE:
            assert (apart > 1).float().mean() <= 1e-3, name
        else:
            assert apart.max() == 0, name
