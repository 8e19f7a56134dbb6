r"""Which test images look nearly like a training image: frames of one video, crops of one picture.

Images are compared by the gradients of 16 x 16 gray thumbnails, of which the mean over the data set
is taken away (a vignette, a fixed background); two look alike where the cosine is above 0.95. That
finds a part of such pairs only, but hardly any of pictures that were taken apart, which a hash of
64 gradients' signs does not tell from them on photographs of one place.
"""
import os
import re

import numpy as np
import torch
import torch.nn.functional as F

from images.files import shown

SIDE = 16           # of a thumbnail, pixels
LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]          # of red, green, blue
ALIKE = 0.95        # cosine of two images that look alike
FLAT = 1.0          # levels: pictures with weaker gradients (root mean square) are like all others
MOST = 200_000      # images; more are not compared
WORTH_SAYING = 0.005        # share of the test images


def thumbnails(images):
    """uint8 (N,3,H,W), a tensor or a Stream -> gray thumbnails, float16 (N,SIDE,SIDE)."""
    parts = []
    chunk = min(1024, max(1, 2 ** 26 // images[:1].numel()))    # 256 MiB of float32
    for start in range(0, len(images), chunk):
        colors = F.adaptive_avg_pool2d(images[start:start + chunk].float(), SIDE).cpu()
        parts.append((colors * LUMA).sum(1).half())
    return torch.cat(parts)


def gradients(thumbnails):
    """(n,SIDE,SIDE) -> unit vectors (n,2*SIDE*(SIDE-1)); zero for flat pictures."""
    x = thumbnails.float()
    right = (x[:, :, 1:] - x[:, :, :-1]).flatten(1)
    down = (x[:, 1:] - x[:, :-1]).flatten(1)
    right, down = (part - part.mean(1, keepdim=True) for part in (right, down))
    vectors = torch.cat([right, down], dim=1)
    size = vectors.pow(2).mean(1, keepdim=True).sqrt()
    return F.normalize(vectors, dim=1) * (size >= FLAT)


def nearly_the_same(train, train_labels, test, test_labels):
    """(test image, the training image of its class that looks most like it) of those alike, (n,2).

    train, test: images as for thumbnails, labels (N,) arrays.
    """
    train, test = thumbnails(train), thumbnails(test)
    flat = (gradients(train).norm(dim=1) == 0), (gradients(test).norm(dim=1) == 0)
    mean = torch.cat([train, test]).float().mean(0)
    pairs = []
    for k in np.unique(test_labels):
        i = torch.from_numpy(np.where(test_labels == k)[0])
        j = torch.from_numpy(np.where(train_labels == k)[0])
        i, j = i[~flat[1][i]], j[~flat[0][j]]
        if len(i) == 0 or len(j) == 0:
            continue
        known = gradients(train[j].float() - mean)
        for part in i.split(max(1, 2 ** 24 // len(j))):
            cosine, nearest = (gradients(test[part].float() - mean) @ known.T).max(dim=1)
            alike = cosine > ALIKE
            pairs.append(torch.stack([part[alike], j[nearest[alike]]], dim=1))
    return torch.cat(pairs).numpy() if pairs else np.empty((0, 2), dtype=np.int64)


# ---- What to do about them -----------------------------------------------------------------------

def remark_on(train_files, test_files, pairs, root, held_out, by=None):
    """A line about near-duplicates, or None if they are too few to matter.

    held_out: are the test images held out by --holdout, so that --holdout-by can help? by: the
    --holdout-by that was given, and has not kept these together, or None.
    """
    if len(pairs) < max(1, WORTH_SAYING * len(test_files)):
        return None
    i, j = pairs[0]
    line = (f"{len(pairs):,} of {len(test_files):,} test images look nearly the same as a training "
            f"image, such as {shown(test_files.paths[i])} and {shown(train_files.paths[j])}: new "
            "pictures will do worse than these.")
    if not held_out:
        return line + " Keep what was taken together (a video, a plate, a patient) in one part."
    pattern = guess_pattern(train_files, test_files, pairs, root)
    if by:
        other = f", such as '{pattern}'" if pattern not in (None, by) else ""
        return (f"{line} --holdout-by '{shown(by)}' does not keep these together: if they were "
                f"taken together, another pattern may be needed{other}.")
    if pattern:
        return f"{line} Use --holdout-by '{pattern}', if that names what was taken together."
    return (f"{line} Use --holdout-by PATTERN, whose first (group) names in a file's path what was "
            "taken together (a video, a plate, a patient).")


def guess_pattern(train_files, test_files, pairs, root):
    """A regular expression for --holdout-by that puts images alike into one group, or None.

    Tried are each number of the file's name, its beginning before the last number, and the folder
    it lies in; wanted is the one with the most groups that has nine of ten pairs together, two
    groups or more in nine of ten classes of two images or more (pairs are of one class, so a class
    in one group has all together, and is not tested), and on average two images in a group.
    """
    train_names, test_names = ([os.fsdecode(name) for name in files.names(root)]
                               for files in (train_files, test_files))
    labels = [*train_files.labels, *test_files.labels]
    best, most = None, len(set(labels))
    for pattern in candidates(train_names[0]):
        def group(name):
            match = re.search(pattern, name)
            return match and match[1]
        trained, tested = list(map(group, train_names)), list(map(group, test_names))
        together = [tested[i] is not None and tested[i] == trained[j] for i, j in pairs]
        groups = len({*trained, *tested})
        of_class = {}
        for label, name in zip(labels, trained + tested):
            of_class.setdefault(label, []).append(name)
        divided = np.mean([len(set(names)) > 1 for names in of_class.values() if len(names) > 1])
        enough = len(pairs) >= 3 and np.mean(together) >= 0.9 and divided >= 0.9
        if enough and most < groups <= len(labels) / 2:
            best, most = pattern, groups
    return best


def candidates(name):
    """Regular expressions for paths like this one; the first group of each is another part."""
    stem = os.path.splitext(os.path.basename(name))[0]
    words = re.split(r"(\d+)", stem)                    # text, number, text, number, ..., text
    patterns = [r"([^/]+)/[^/]*$", r"([^/]*?)[-_ ]*\d+\D*$"]
    for k in range(1, len(words), 2):
        parts = [r"\d+" if i % 2 else re.escape(word) for i, word in enumerate(words)]
        parts[k] = r"(\d+)"
        end = "" if words[0] else r"[^/]*$"             # so that it is no number of a folder
        patterns.insert(0, "".join(parts).replace(r"\-", "-") + end)
    return patterns
