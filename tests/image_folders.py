"""Folders of pictures such as people have, whole and damaged, for several test files."""
import os

import numpy as np
from PIL import Image


def picture(w=40, h=30, seed=0):
    """A smooth random RGB picture, without two equal corners."""
    small = np.random.RandomState(seed).randint(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((w, h), Image.BICUBIC)


def close(image, other, by=3):
    """Do two pictures differ by less than `by` of 255 on average?"""
    return np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).mean() < by


def write_files(root, counts):
    """Write n files of different content, named as images, for each {folder: n}. Returns root."""
    for folder, n in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            (root / folder / f"{i}.jpg").write_text(f"{folder} {i}")
    return root


def make_folder(root, n=6, size=(36, 40), classes=("apple pie", "Bär", "c,3")):
    """root/train and root/test with n - k and 2 pictures of class k. Returns root.

    Picture i of class k is picture(seed=100 * k + i); 1000 more for testing.
    """
    for split, start in (("train", 0), ("test", 1000)):
        for k, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n - k if split == "train" else 2):
                ending = "jpg" if i % 2 else "png"
                picture(*size, seed=start + 100 * k + i).save(folder / f"{i}.{ending}", quality=95)
    return root


def damage(root):
    """Damage a folder in every way. Returns {file name: words that its line must have}."""
    folder = root / "train" / "apple pie"
    Image.new("RGB", (64, 64)).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:60])
    picture(300, 300).save(folder / "half.jpg")
    (folder / "half.jpg").write_bytes((folder / "half.jpg").read_bytes()[:3000])
    (folder / "text.jpg").write_text("this is no image")
    (folder / "empty.png").touch()
    Image.fromarray(np.random.rand(8, 8).astype(np.float32)).save(folder / "float.tif")
    Image.new("1", (14000, 14000)).save(folder / "huge.png")
    os.symlink(folder / "nowhere.png", folder / "lost.png")
    (root / "train" / "void").mkdir()
    (root / "test" / "unknown").mkdir()
    picture().save(root / "test" / "unknown" / "u.png")
    return {"cut.png": "truncated", "half.jpg": "truncated", "text.jpg": "no image",
            "empty.png": "empty", "float.tif": "floating-point", "huge.png": "179 million pixels",
            "lost.png": "No such file", "void": "has no images", "unknown": "is not in"}
