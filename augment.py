r"""Augmentation of a whole batch on its device; every image has its own draws, except for mixing.

    uint8 images (B,3,H,W) in 0..255
      -> random_resized_crop, or random_crop_flip and resize       (B,3,S,S)
      -> rand_augment -> random_erasing -> to_float                float (B,3,S,S) in [0,1]
      -> mixup_cutmix                                              and soft targets (B,K)

`strong_augment` is all up to `to_float`. Mixing image i with image j = B-1-i (smooth: smoothed
one-hot):

    mixup    lam ~ Beta(a, a),  x = lam x_i + (1 - lam) x_j                     (1)    1710.09412
    CutMix   lam ~ Beta(b, b),  x = x_i, but x_j inside a box of (1 - lam) H W  (2)    1905.04899
             lam = the part of the area outside the box, once it is clipped at the border
    target   y = lam smooth(y_i) + (1 - lam) smooth(y_j)                        (3)

RandAugment 1909.13719 as timm's `rand-m9-mstd0.5-inc1`, random erasing 1708.04896. PaCo's teacher
(2107.12028) has two views: `paco_query_view` (AutoAugment, Cutout) and `simclr_view` (MoCo v2,
2003.04297).

The published code augments PIL images one by one. Here images stay uint8 until they are mixed, and
images/operations.py gives PIL's results, nearly all to the bit. Decisions are drawn on the CPU from
torch's global generator (a GPU is never waited for): the same seed replays a step.
"""
import torch
import torch.nn.functional as F

from images.operations import (IMAGENET_MEAN, IMAGENET_STD, apply_operations, apply_where, box_mask,
                               crop_resize, gaussian_blur, grayscale, log_uniform, replace, resize,
                               rgb, select, to_float, to_uint8, uniform)
from images.policies import auto_augment, color_jitter, cutout, draw


# ---- Crop and flip -------------------------------------------------------------------------------

def random_crop_flip(images, padding=4, flip=0.5):
    """Pad with black, crop back to the old size at a random place, mirror with probability `flip`.

    (B,3,H,W) -> same.
    """
    B, C, H, W = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, B))
    draws = torch.stack([top, left, torch.rand(B) < flip])
    top, left, mirror = draws.to(images.device, non_blocking=True)[..., None]       # (B,1) each
    rows = torch.arange(H, device=images.device) + top                              # (B,H)
    cols = torch.arange(W, device=images.device)
    cols = torch.where(mirror > 0, cols.flip(0), cols) + left                       # (B,W)
    # Where each new pixel lies in the flattened padded image: (B,H,W).
    source = rows[:, :, None] * (W + 2 * padding) + cols[:, None, :]
    padded = F.pad(images, (padding, padding, padding, padding)).view(B, C, -1)
    return padded.gather(2, source.view(B, 1, -1).expand(B, C, -1)).view(B, C, H, W)


def random_resized_crop(images, out, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5):
    """Crop a box of random area and shape, resize it to out x out (bicubic), maybe mirror it.

    Area U(scale) of the image, aspect ratio log-uniform in `ratio`; the first of 10 tries that fits
    inside the image, else the largest central crop within `ratio`. (B,3,H,W) -> (B,3,out,out).
    """
    B, _, H, W = images.shape
    area = H * W * uniform((B, 10), *scale)
    aspect = log_uniform((B, 10), *ratio)                                           # w / h
    w = (area * aspect).sqrt().round()                                              # (B,10)
    h = (area / aspect).sqrt().round()
    fits = (w >= 1) & (h >= 1) & (w <= W) & (h <= H)
    w, h = first_that_fits(fits, w, h)                                              # (B,)
    top = (torch.rand(B) * (H - h + 1)).floor()
    left = (torch.rand(B) * (W - w + 1)).floor()
    # Where no try fits: the central crop.
    largest_w = float(min(W, round(H * ratio[1])))
    largest_h = float(min(H, round(W / ratio[0])))
    none = ~fits.any(dim=1)
    w, h = w.masked_fill(none, largest_w), h.masked_fill(none, largest_h)
    top = torch.where(none, ((H - h) / 2).floor(), top)
    left = torch.where(none, ((W - w) / 2).floor(), left)
    return crop_resize(images, top, left, h, w, out, mirror=torch.rand(B) < flip)


def first_that_fits(fits, w, h):
    """Widths and heights (B,10) -> (B,): of the first try that fits; of the first if none does."""
    first = fits.int().argmax(dim=1, keepdim=True)
    return w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]


# ---- RandAugment ---------------------------------------------------------------------------------

# Argument = start + slope * m at magnitude m, 0..10, slope * m truncated or of random sign where
# the last column says so. The "increasing" set: a larger m is always a stronger change.
RAND_AUGMENT = [
    ("autocontrast", 0, 0, ""),                     # these three have no argument
    ("equalize", 0, 0, ""),
    ("invert", 0, 0, ""),
    ("rotate", 0, 3.0, "random sign"),              # degrees, up to 30
    ("posterize", 4, -0.4, "truncate"),             # bits kept, 4 down to 0
    ("solarize", 256, -25.6, "truncate"),           # invert values from here on, 256 down to 0
    ("solarize_add", 0, 11.0, "truncate"),          # added to values below 128, up to 110
    ("color", 1, 0.09, "random sign"),              # factors, 0.1 to 1.9
    ("contrast", 1, 0.09, "random sign"),
    ("brightness", 1, 0.09, "random sign"),
    ("sharpness", 1, 0.09, "random sign"),
    ("shear_x", 0, 0.03, "random sign"),            # pixels per pixel, up to 0.3
    ("shear_y", 0, 0.03, "random sign"),
    ("translate_x", 0, 0.045, "random sign"),       # fraction of the side, up to 0.45
    ("translate_y", 0, 0.045, "random sign"),
]


def rand_augment(images, num_ops=2, magnitude=9.0, noise=0.5, prob=0.5):
    """num_ops times: draw an operation for each image, apply it with probability `prob`.

    Its magnitude is N(magnitude, noise^2), clipped to 0..10. uint8 (B,3,H,W) -> same.
    """
    B = len(images)
    for _ in range(num_ops):
        m = (magnitude + noise * torch.randn(B)).clamp_(0, 10)
        row = torch.randint(0, len(RAND_AUGMENT), (B,))
        op, value = draw(RAND_AUGMENT, row, m)                                      # (B,) each
        op = torch.where(torch.rand(B) < prob, op, -1)                              # -1: unchanged
        images = apply_operations(images, op, value)
    return images


# ---- Random erasing ------------------------------------------------------------------------------

def random_erasing(images, prob=0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3)):
    """Overwrite a box with noise in a fraction `prob` of the images. uint8 (B,3,H,W) -> same.

    Box area U(scale) of the image, aspect ratio log-uniform in `ratio`; the first of 10 tries that
    fits, else none. Pixels are N(0, 1) in ImageNet-normalised units as in timm, here clipped to
    0..255 and rounded.
    """
    B, _, H, W = images.shape
    area = H * W * uniform((B, 10), *scale)
    aspect = log_uniform((B, 10), *ratio)                                           # h / w
    h = (area * aspect).sqrt().round()                                              # (B,10)
    w = (area / aspect).sqrt().round()
    fits = (h < H) & (w < W)
    w, h = first_that_fits(fits, w, h)                                              # (B,)
    erase = (torch.rand(B) < prob) & fits.any(dim=1)
    top = (torch.rand(B) * (H - h + 1)).floor()
    left = (torch.rand(B) * (W - w + 1)).floor()

    chosen = erase.nonzero()[:, 0]                                                  # (n,)
    top, left, h, w = top[chosen], left[chosen], h[chosen], w[chosen]
    mask = box_mask(images, top, left, h, w)                                        # (n,1,H,W)
    noise = torch.randn(3, int((h * w).sum()), device=images.device)    # (3, pixels of all boxes)
    mean, std = rgb(IMAGENET_MEAN, images)[..., 0], rgb(IMAGENET_STD, images)[..., 0]       # (3,1)
    noise = to_uint8((noise * std + mean) * 255 + 0.5)
    channels = select(images, chosen).transpose(0, 1).contiguous()                  # (3,n,H,W)
    channels.masked_scatter_(mask.transpose(0, 1), noise)
    return replace(images, chosen, channels.transpose(0, 1))


# ---- Whole pipelines -----------------------------------------------------------------------------

def strong_augment(images, size, crop="padded", rand_ops=2, magnitude=9.0, erasing=0.25):
    """The student's images: uint8 (B,3,H,W) -> float (B,3,size,size) in [0,1].

    crop: "resized", a box of random area and shape (the paper's, 224 px); "padded", pad by an
    eighth, crop back, resize (for 32 px); "loader", cropped and mirrored when read from disk.
    """
    if crop == "resized":
        images = random_resized_crop(images, size)
    elif crop == "padded":
        images = random_crop_flip(images, padding=images.shape[-1] // 8)
        images = resize(images, size)
    images = rand_augment(images, rand_ops, magnitude)
    images = random_erasing(images, erasing)
    return to_float(images)


def paco_query_view(images):
    """The view that PaCo classifies, for CIFAR: uint8 (B,3,H,W) -> same."""
    return cutout(auto_augment(random_crop_flip(images)))


def simclr_view(images, size):
    """SimCLR's view as in MoCo v2, PaCo's keys: uint8 (B,3,H,W) -> uint8 (B,3,size,size)."""
    B = len(images)
    images = random_resized_crop(images, size, scale=(0.2, 1.0))
    images = apply_where(images, torch.rand(B) < 0.8, simclr_jitter)
    images = apply_where(images, torch.rand(B) < 0.2, gray)
    return apply_where(images, torch.rand(B) < 0.5, simclr_blur)


def simclr_jitter(images):
    return color_jitter(images, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


def gray(images):
    return grayscale(images).expand_as(images)


def simclr_blur(images):
    return gaussian_blur(images, sigma=uniform(len(images), 0.1, 2.0))


# ---- Mixing --------------------------------------------------------------------------------------

def smooth_one_hot(labels, num_classes, smoothing=0.0):
    """Labels (B,) -> (B,K): 1 - e + e/K at the label, e/K elsewhere, e = smoothing."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mixup_cutmix(images, labels, num_classes, mixup=0.8, cutmix=1.0, smoothing=0.1):
    """Mix image i with image j = B-1-i by mixup or CutMix, each with probability 1/2.

    One draw for the whole batch (timm's mode "batch"). mixup, cutmix: a and b of (1) and (2); 0
    leaves that kind out; one of them must be above 0.
    images (B,3,H,W) in [0,1], labels (B,) -> (B,3,H,W), targets (B,K) whose rows sum to 1.
    """
    if mixup == 0 and cutmix == 0:
        raise ValueError("nothing to do: mixup and cutmix are both 0")
    target = smooth_one_hot(labels, num_classes, smoothing)
    H, W = images.shape[-2:]
    # All numbers are drawn, whichever kind is used, so that later draws do not depend on it.
    coin = torch.rand(1).item()
    lam_cutmix, lam_mixup = sample_beta(cutmix), sample_beta(mixup)                 # (1,)
    row, col = torch.randint(0, H, (1,)).item(), torch.randint(0, W, (1,)).item()   # box center

    if mixup == 0 or (cutmix > 0 and coin < 0.5):
        half_h = int(H * (1 - lam_cutmix).sqrt()) // 2
        half_w = int(W * (1 - lam_cutmix).sqrt()) // 2
        top, bottom = max(row - half_h, 0), min(row + half_h, H)        # clipped at the border
        left, right = max(col - half_w, 0), min(col + half_w, W)
        mixed = images.clone()                                                              # (2)
        mixed[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
        lam = 1 - torch.tensor((bottom - top) * (right - left)) / (H * W)   # what x_i really keeps
    else:
        lam = lam_mixup
        mixed = images.flip(0).lerp_(images, lam.item())        # (1)  as x_j + lam (x_i - x_j)
    return mixed, target.flip(0).lerp_(target, lam.item())                                  # (3)


def sample_beta(strength):
    """lam ~ Beta(strength, strength), (1,) on the CPU. (Strength 0: drawn, but not used.)"""
    strength = strength or 1.0
    return torch.distributions.Beta(strength, strength).sample((1,))
