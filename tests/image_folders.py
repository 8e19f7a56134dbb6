"""Folders of pictures such as people have, whole and damaged, for several test files."""
import os
import struct

import numpy as np
from PIL import Image


def picture(w=40, h=30, seed=0):
    """A smooth random RGB picture, without two equal corners."""
    small = np.random.RandomState(seed).randint(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((w, h), Image.BICUBIC)


def close(image, other, by=3):
    """Do two pictures differ by less than `by` of 255 on average?"""
    return np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).mean() < by


def write_tiff(path, levels, photometric=1, orientation=1):
    """A TIFF file of any integers (H,W), in their own byte order, signed or not, uncompressed."""
    order = ">" if levels.dtype.byteorder == ">" else "<"
    h, w = levels.shape
    content = levels.tobytes()
    tags = {256: w, 257: h, 258: 8 * levels.itemsize, 259: 1, 262: photometric, 273: 8,
            274: orientation, 277: 1, 278: h, 279: len(content),
            339: 2 if levels.dtype.kind == "i" else 1}
    directory = struct.pack(order + "H", len(tags))
    for tag, value in tags.items():
        directory += struct.pack(order + "HHII", tag, 4, 1, value)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    path.write_bytes(magic + struct.pack(order + "I", 8 + len(content)) + content + directory
                     + bytes(4))


def write_pgm(path, levels, white):
    """A PGM file of levels (H,W) from 0 to white, which it states."""
    h, w = levels.shape
    path.write_bytes(b"P5 %d %d %d\n" % (w, h, white) + levels.astype(">u2").tobytes())


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


def make_lists(root):
    """Lists called as ImageNet-LT's, and their pictures, of five classes, one of them empty."""
    for split, counts in (("train", (4, 9, 0, 9, 1)), ("test", (2, 2, 0, 2, 2))):
        lines = []
        for k, n in enumerate(counts):
            for i in range(n):
                name, seed = f"{split}_{k}_{i}.jpg", 100 * k + i + 1000 * (split == "test")
                picture(80, 60, seed).save(root / name, quality=95)
                lines.append(f"{name} {k}\n")
        (root / f"ImageNet_LT_{split}.txt").write_text("".join(lines))


def deepen(folder, step=16):
    """Make all pictures below a folder gray, as PNG files of 8 bits beside ones of 16 bits with
    `step` times the level. Returns ([paths of 8 bits], [paths of 16 bits])."""
    eight, deep = [], []
    for path in sorted(folder.rglob("*.*")):
        levels = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
        path.unlink()
        for paths, ending, image in ((eight, ".8.png", levels.astype(np.uint8)),
                                     (deep, ".16.png", levels * step)):
            paths.append(path.with_suffix(ending))
            Image.fromarray(image).save(paths[-1])
    return eight, deep


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
