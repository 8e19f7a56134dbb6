"""images/near_copies.py: test images that look nearly like training images, and what is advised."""
import io

import numpy as np
import pytest
import torch
from PIL import Image

from image_folders import picture
from images.files import Files
from images.near_copies import guess_pattern, nearly_the_same, remark_on, thumbnails


def tensors(pictures):
    """PIL pictures, resized -> uint8 (N,3,32,32)."""
    arrays = [np.asarray(p.convert("RGB").resize((32, 32), Image.BICUBIC)) for p in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def noisy(levels, seed):
    """A gray picture of these levels (H,W) under noise of 2 levels."""
    noise = np.random.RandomState(seed).normal(0, 2, (64, 64))
    return Image.fromarray(np.clip(levels + noise, 0, 255).astype(np.uint8))


def found(train, test, train_labels=None, test_labels=None):
    """[(test image, training image)] that look alike; all of one class by default."""
    labels = [np.array(given if given is not None else [0] * len(pictures))
              for given, pictures in ((train_labels, train), (test_labels, test))]
    pairs = nearly_the_same(tensors(train), labels[0], tensors(test), labels[1])
    return [tuple(pair) for pair in pairs.tolist()]


def saved(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


PICTURES = [picture(64, 64, seed) for seed in range(30)]


@pytest.mark.parametrize("change", [
    lambda p: saved(p, 40), lambda p: p.resize((50, 50)), lambda p: p.crop((1, 1, 63, 64)),
    lambda p: p.point(lambda level: level * 0.8 + 10), lambda p: p.convert("L")])
def test_a_picture_under_another_file_is_found(change):
    """Saved again, at another size, a pixel aside, darker, gray: what a hash of bytes misses."""
    test = [change(PICTURES[7]), picture(64, 64, seed=100), change(PICTURES[3])]
    assert found(PICTURES, test) == [(0, 7), (2, 3)]


def test_other_pictures_are_not_alike():
    """A line of alarm for every data set."""
    assert found(PICTURES, [picture(64, 64, seed) for seed in range(100, 160)]) == []


def test_only_pictures_of_one_class_are_compared():
    """A quadratic search; near-duplicates in another class, which are something else."""
    train, test = [0] * 15 + [1] * 15, [1, 0, 2]
    assert found(PICTURES, PICTURES[:2] + PICTURES[5:6], train, test) == [(1, 1)]


@pytest.mark.parametrize("levels", [
    np.full((64, 64), 128), np.full((64, 64), 255), np.zeros((64, 64)),
    128 + np.linspace(-60, 60, 64) * np.ones((64, 1)),
    200 - 0.05 * np.add.outer(np.linspace(-32, 32, 64) ** 2, np.linspace(-32, 32, 64) ** 2)])
def test_flat_pictures_are_not_alike(levels):
    """Sky, plain metal, an even slide, all under the same light: every picture "a duplicate"."""
    train = [noisy(levels, seed) for seed in range(30)]
    assert found(train, [noisy(levels, seed) for seed in range(100, 110)]) == []


def test_a_small_thing_on_white_is_not_another():
    """Product photographs, which agree in all of their background."""
    def product(seed):
        image = Image.new("RGB", (64, 64), "white")
        image.paste(picture(24, 24, seed), (20, 20))
        return image
    train = [product(seed) for seed in range(30)]
    assert found(train, [product(100), saved(product(4), 60), product(101)]) == [(1, 4)]


# ---- What is advised -----------------------------------------------------------------------------

def listed(names):
    """Files below /d; their class is their first folder."""
    classes = sorted({name.split("/")[0] for name in names})
    return Files(np.array([f"/d/{name}".encode() for name in names]),
                 np.array([classes.index(name.split("/")[0]) for name in names]), classes)


@pytest.mark.parametrize("name, pattern", [
    ("a/fish_{g:03}_{i:05}.jpg", r"fish_(\d+)_\d+"),
    ("a/{i:05}-v{g}.png", r"\d+-v(\d+)[^/]*$"),
    ("a/patient{g}/{i}.png", r"([^/]+)/[^/]*$"),
    ("a/{w}-{i}.png", r"([^/]*?)[-_ ]*\d+\D*$"),
    ("a/{i}.png", None)])
def test_the_part_of_the_name_that_pairs_share_is_advised(name, pattern):
    """The number of the image, which is another for each; a pattern that cannot be used."""
    places = [(g, 10 * g + i) for g in range(10) for i in range(4)]
    names = [name.format(g=g, i=i, w="qwertyuiop"[g]) for g, i in places]
    train, test = listed(names[0::2]), listed(names[1::2])
    pairs = np.array([(i, i) for i in range(0, 20, 3)])
    assert guess_pattern(train, test, pairs, "/d") == pattern
    line = remark_on(train, test, pairs, "/d", held_out=True)
    advice = f"--holdout-by '{pattern}', if" if pattern else "--holdout-by PATTERN, whose first"
    assert line.startswith("7 of 20 test images look nearly the same as a training image, such as ")
    assert advice in line and "\n" not in line
    assert "--holdout-by" not in remark_on(train, test, pairs, "/d", held_out=False)


def test_what_was_given_already_is_not_advised():
    """--holdout-by advised to someone who has given it, with a pattern that missed."""
    names = [f"a/t{g}_{i}.jpg" for g in range(10) for i in range(4)]
    train, test = listed(names[0::2]), listed(names[1::2])
    pairs = np.array([(i, i) for i in range(0, 20, 3)])
    line = remark_on(train, test, pairs, "/d", True, r"_(\d+)\.")
    assert "Use --holdout-by" not in line
    assert r"--holdout-by '_(\d+)\.' does not keep these together" in line
    assert line.endswith(r"another pattern may be needed, such as 't(\d+)_\d+'.")
    line = remark_on(train, test, pairs, "/d", True, r"t(\d+)_\d+")
    assert line.endswith("another pattern may be needed.")


def test_pairs_that_share_nothing_lead_to_no_pattern():
    """Advice from chance: two pairs in one track, and ten in others."""
    names = [f"a/t{g}_{i}.jpg" for g in range(10) for i in range(4)]
    train, test = listed(names[0::2]), listed(names[1::2])
    pairs = np.array([(i, (i + 7) % 20) for i in range(12)])
    assert guess_pattern(train, test, pairs, "/d") is None


@pytest.mark.parametrize("name", ["{c}/IMG_{i:04}.png", "{c}/{c}_{i:03}.png", "{c}/{c}.{i}.png"])
def test_a_class_is_not_what_was_taken_together(name):
    """Advice to keep a class on one side, which is refused: pairs are always of one class."""
    names = [name.format(c=c, i=i) for c in ("cat", "dog", "owl") for i in range(20)]
    train, test = listed(names[0::2]), listed(names[1::2])
    pairs = np.array([(i, i) for i in range(0, 30, 3)])
    assert "--holdout-by PATTERN" in remark_on(train, test, pairs, "/d", held_out=True)


@pytest.mark.parametrize("name", ["{c}/{i}.png", "{c}/{c}-day{g}/{i}.png"])
def test_one_class_with_folders_does_not_speak_for_all(name):
    """--holdout-by with which only the class with folders of its own would be tested."""
    places = [(c, i) for c in ("cat", "dog", "owl", "yak") for i in range(20)]
    names = [name.format(c=c, g=i // 4, i=i) for c, i in places]
    names[60:] = [f"yak/yak-day{i // 4}/{i}.png" for i in range(20)]
    names += ["emu/emu-day0/0.png", "hen/hen-day0/0.png"]       # one image each: not tested anyway
    train, test = listed(names[0::2]), listed(names[1::2])
    pairs = np.array([(i, i) for i in range(0, 40, 3)])
    pattern = r"([^/]+)/[^/]*$" if "day" in name else None
    assert guess_pattern(train, test, pairs, "/d") == pattern


@pytest.mark.parametrize("size", [(20, 20), (600, 600)])
def test_thumbnails_are_made_of_a_bounded_number_of_images_at_a_time(size, monkeypatch):
    """Gigabytes of float32 for a thousand images of 448 px."""
    asked = []

    class Images:
        def __len__(self):
            return 300

        def __getitem__(self, chosen):
            n = len(range(300)[chosen])
            asked.append(n * 3 * size[0] * size[1])
            return torch.zeros(1, 3, *size, dtype=torch.uint8).expand(n, 3, *size)
    assert len(thumbnails(Images())) == 300
    assert max(asked) <= 2 ** 26 and len(asked) == (2 if size == (20, 20) else 6)


def test_a_few_pairs_among_thousands_are_not_said():
    """An alarm about two fish of 5,593."""
    test = listed([f"a/{i}.jpg" for i in range(1000)])
    pairs = np.array([(i, i) for i in range(5)])
    assert remark_on(test, test, pairs[:4], "/d", True) is None
    assert remark_on(test, test, pairs, "/d", True) is not None
    assert remark_on(test, test, pairs[:0], "/d", True) is None
