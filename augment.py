r"""Augmentation of a whole batch on its device, with a different draw for every image.

    uint8 (B,3,H,W) --to_float--> [0,1] --random_crop_flip | random_resized_crop--> --rand_augment--> --random_erasing-->
    (B,3,S,S) in [0,1]  --mixup_cutmix--> mixed images (B,3,S,S), soft labels (B,K)

    strong_augment     crop, RandAugment, random erasing: the student's images
    paco_query_view    padded crop, AutoAugment, Cutout: the classified view of a PaCo teacher, 2107.12028
    simclr_view        resized crop, colour jitter, grey, blur (MoCo v2, 2003.04297): the other view, for its contrasts

RandAugment 1909.13719 as timm's `rand-m9-mstd0.5-inc1` · AutoAugment's CIFAR-10 policy 1805.09501 · Cutout 1708.04552 ·
random erasing 1708.04896 · mixup 1710.09412 · CutMix 1905.04899.

Images are float in [0,1] before and after every function here; each network normalises for itself. Every image of the batch
has its own operations, magnitudes, crops and boxes. The decisions (a few numbers per image) are drawn on the CPU from torch's
global generator, so that the choice of which images an operation touches never waits for a GPU; pixels stay on the device.
Reseed torch before each step and the step can be replayed.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEAN_COLOUR, MID_GREY = (124 / 255, 116 / 255, 104 / 255), (128 / 255,) * 3   # ImageNet's mean in whole levels; half way


def to_float(images):
    """uint8 (B,3,H,W) in 0..255 -> float32 in [0,1]."""
    return images.float().div_(255)


def uniform(n, low, high):
    """n independent draws from U(low, high), on the CPU."""
    return low + (high - low) * torch.rand(n)


def log_uniform(n, low, high):
    """n independent draws whose logarithm is uniform, on the CPU."""
    return uniform(n, math.log(low), math.log(high)).exp()


def random_sign(n):
    """n independent +1 or -1, on the CPU."""
    return torch.randint(0, 2, (n,)) * 2.0 - 1.0


def rgb(values, images):
    """Three numbers -> (3,1,1) on the images' device, without waiting for it."""
    return torch.tensor(values).to(images.device, images.dtype, non_blocking=True).view(3, 1, 1)


def per_image(values, images):
    """(B,) on the CPU -> (B,1,1,1) on the images' device, without waiting for it."""
    return values.to(images.device, images.dtype, non_blocking=True).view(-1, 1, 1, 1)


# ---- Crops -------------------------------------------------------------------------------------------------------------

def random_crop_flip(images, padding=4, flip=0.5):
    """Pad with black, crop back to the old size at a random place, mirror with probability `flip`. (B,3,H,W) -> same."""
    B, _, H, W = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, B))
    cols = torch.arange(W).expand(B, W)
    cols = torch.where(torch.rand(B, 1) < flip, cols.flip(1), cols) + left[:, None]                   # (B,W)
    rows = torch.arange(H) + top[:, None]                                                             # (B,H)
    batch, rows, cols = (i.to(images.device, non_blocking=True) for i in (torch.arange(B), rows, cols))
    padded = F.pad(images, (padding,) * 4)
    return padded[batch[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2).contiguous()


def cubic(x):
    """The bicubic kernel with a = -1/2 (Keys 1981), the one PIL uses."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resize_matrix(start, length, size, out):
    """One axis of PIL's antialiased bicubic resize of [start, start + length) to `out` pixels, as (B,out,size) weights.

    start, length (B,): whole pixels, length may differ per image. Rows sum to 1; pixels outside the box get no weight.
    """
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length / out                                                  # source pixels per new pixel
    centre = start + (torch.arange(out, device=start.device).view(1, -1, 1) + 0.5) * scale            # (B,out,1)
    pixel = torch.arange(size, device=start.device).view(1, 1, -1) + 0.5                              # (1,1,size)
    weight = cubic((pixel - centre) / scale.clamp(min=1))                 # wider kernel when shrinking = antialiasing
    weight = weight * ((pixel > start) & (pixel < start + length))
    return weight / weight.sum(dim=2, keepdim=True)


def crop_resize(images, top, left, height, width, out, mirror=None):
    """Cut box (top, left, height, width), (B,) float each, from every image; resize it to out x out, bicubic, antialiased.

    A separable resize is two matrix products, rows @ image @ cols^T; a mirrored image is one whose cols are reversed.
    mirror: (B,) bool or None. (B,3,H,W) -> (B,3,out,out).
    """
    H, W = images.shape[-2:]
    top, left, height, width = (v.to(images.device, non_blocking=True) for v in (top, left, height, width))
    rows, cols = resize_matrix(top, height, H, out), resize_matrix(left, width, W, out)               # (B,out,H), (B,out,W)
    if mirror is not None:
        cols = torch.where(mirror.to(images.device, non_blocking=True).view(-1, 1, 1), cols.flip(1), cols)
    return (rows[:, None] @ images @ cols[:, None].transpose(-2, -1)).clamp_(0, 1)


def random_resized_crop(images, out, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5):
    """Crop a box of random area and shape, resize it to out x out (bicubic), mirror with probability `flip`.

    Area U(scale) of the image, log aspect ratio uniform in `ratio`; the first of 10 tries that fits inside the image, else
    the largest central crop within `ratio`. (B,3,H,W) -> (B,3,out,out).
    """
    B, _, H, W = images.shape
    area = H * W * uniform((B, 10), *scale)
    aspect = log_uniform((B, 10), *ratio)
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()                             # (B,10)
    fits = (w >= 1) & (h >= 1) & (w <= W) & (h <= H)
    first = fits.int().argmax(dim=1, keepdim=True)                        # 0 where nothing fits
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]             # (B,)
    none = ~fits.any(dim=1)
    w = torch.where(none, torch.tensor(float(min(W, round(H * ratio[1])))), w)
    h = torch.where(none, torch.tensor(float(min(H, round(W / ratio[0])))), h)
    top = torch.where(none, ((H - h) / 2).round(), (torch.rand(B) * (H - h + 1)).floor())
    left = torch.where(none, ((W - w) / 2).round(), (torch.rand(B) * (W - w + 1)).floor())
    return crop_resize(images, top, left, h, w, out, mirror=torch.rand(B) < flip)


def resize(images, size):
    """Bicubic, antialiased resize of the whole image to size x size; the same images if they have that size."""
    H, W = images.shape[-2:]
    if (H, W) == (size, size):
        return images
    box = [torch.full((1,), float(v)) for v in (0, 0, H, W)]
    return crop_resize(images, *box, size)


def center_crop(images, size):
    """The central size x size pixels."""
    top, left = round((images.shape[-2] - size) / 2), round((images.shape[-1] - size) / 2)
    return images[..., top:top + size, left:left + size]


# ---- Operations of the policies: (images, argument per image) -> images ------------------------------------------------

def grayscale(images):
    """Luma 0.299 R + 0.587 G + 0.114 B, (B,3,H,W) -> (B,1,H,W)."""
    return (images * rgb([0.299, 0.587, 0.114], images)).sum(dim=1, keepdim=True)


def blend(other, images, factor):
    """other + factor * (images - other), clipped: factor 0 gives other, 1 the images, more exaggerates them."""
    return (other + per_image(factor, images) * (images - other)).clamp_(0, 1)


def brightness(images, factor):
    return blend(torch.zeros_like(images), images, factor)


def contrast(images, factor):
    return blend(grayscale(images).mean(dim=(1, 2, 3), keepdim=True), images, factor)


def color(images, factor):
    return blend(grayscale(images), images, factor)


def sharpness(images, factor):
    """Blend with a smoothed copy, kernel [1 1 1; 1 5 1; 1 1 1] / 13; the border pixels of the copy are not smoothed."""
    kernel = torch.ones(3, 1, 3, 3, device=images.device, dtype=images.dtype)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = F.conv2d(images, kernel / 13, groups=3)
    return blend(smooth, images, factor)


def invert(images, _=None):
    return 1 - images


def solarize(images, threshold):
    """Invert the pixels at or above threshold (0..256 of 255 levels)."""
    return torch.where(images >= per_image(threshold / 255, images) - 1e-4, 1 - images, images)


def solarize_add(images, amount):
    """Add amount (0..255) to the pixels below level 128."""
    brighter = (images + per_image(amount / 255, images)).clamp_(max=1)
    return torch.where(images < 127.5 / 255, brighter, images)


def posterize(images, bits):
    """Keep the first `bits` bits (0..8) of every 8-bit value; 0 bits is a black image."""
    step = per_image(2.0 ** (8 - bits), images)
    level = (images * 255).round_()
    return (level / step).floor_() * step / 255


def autocontrast(images, _=None):
    """Stretch every channel to 0..1; constant channels stay."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def equalize(images, _=None):
    """Histogram equalisation of every channel over 256 levels, PIL's integer formula."""
    B, C, H, W = images.shape
    level = (images * 255).round_().long().view(B * C, H * W)
    histogram = torch.zeros(B * C, 256, dtype=torch.long, device=images.device)
    histogram.scatter_add_(1, level, torch.ones_like(level))
    last = 255 - (histogram.flip(1) > 0).int().argmax(dim=1, keepdim=True)                            # brightest level in use
    step = (H * W - histogram.gather(1, last)) // 255                     # (BC,1) pixels per new level
    below = histogram.cumsum(dim=1) - histogram                           # pixels darker than the level
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)    # (BC,256) old level -> new level
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return (table.gather(1, level).to(images.dtype) / 255).view(B, C, H, W)


def affine(images, a, b, c, d, tx, ty, mode="bicubic", fill=MEAN_COLOUR):
    """Warp about the centre; new pixel (x, y) is taken from (a x + b y + tx, c x + d y + ty), in pixels.

    a..ty: numbers or (B,) each. mode: "bicubic" or "nearest". What comes from outside the image has the colour `fill`.
    """
    B, _, H, W = images.shape
    a, b, c, d, tx, ty = (torch.as_tensor(v, dtype=torch.float32).expand(B) for v in (a, b, c, d, tx, ty))
    rows = [torch.stack([a, b * H / W, 2 * tx / W], dim=1), torch.stack([c * W / H, d, 2 * ty / H], dim=1)]
    theta = torch.stack(rows, dim=1).to(images.device, images.dtype, non_blocking=True)               # (B,2,3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    fill = rgb(fill, images)
    warped = F.grid_sample(images - fill, grid, mode=mode, padding_mode="zeros", align_corners=False)
    return (warped + fill).clamp_(0, 1)


def rotate(images, degrees, **how):
    """Counter-clockwise, as PIL."""
    angle = degrees * (math.pi / 180)
    return affine(images, angle.cos(), -angle.sin(), angle.sin(), angle.cos(), 0, 0, **how)


def shear_x(images, level, **how):
    """PIL's shear: fixed at the top left corner, so the centre moves by level * H/2."""
    return affine(images, 1, level, 0, 1, level * images.shape[-2] / 2, 0, **how)


def shear_y(images, level, **how):
    return affine(images, 1, 0, level, 1, 0, level * images.shape[-1] / 2, **how)


def translate_x(images, fraction, **how):
    return affine(images, 1, 0, 0, 1, fraction * images.shape[-1], 0, **how)


def translate_y(images, fraction, **how):
    return affine(images, 1, 0, 0, 1, 0, fraction * images.shape[-2], **how)


def hue(images, turns):
    """Turn the hue of every pixel by `turns` of the colour circle; its largest channel and its chroma stay.

    Hue and back, in sixths of a turn: 0 red, 2 green, 4 blue;  channel = max - chroma * clamp(min(k, 4 - k), 0, 1),
    k = (hue + 5, 3, 1 for R, G, B) mod 6.
    """
    r, g, b = images.unbind(dim=1)                                        # (B,H,W)
    largest = images.amax(dim=1)
    chroma = largest - images.amin(dim=1)
    below = chroma.clamp(min=1e-8)
    angle = torch.where(largest == r, (g - b) / below, torch.where(largest == g, 2 + (b - r) / below, 4 + (r - g) / below))
    k = (angle[:, None] + 6 * per_image(turns, images) + rgb([5.0, 3.0, 1.0], images)) % 6            # (B,3,H,W)
    return (largest[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)).clamp_(0, 1)


def blur_matrix(sigma, size, reach):
    """One axis of PIL's Gaussian blur, as (B,size,size) weights: three box blurs which together have the variance sigma^2.

    Each box has 2 l + 1 pixels of weight 1 and one of weight a < 1 at either end; past the border the last pixel repeats.
    sigma (B,) in pixels; reach: a whole number above every l.
    """
    variance = (sigma ** 2 / 3).view(-1, 1, 1)                            # of one box
    l = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()
    a = (2 * l + 1) * (3 * variance - l * (l + 1)) / (6 * ((l + 1) ** 2 - variance))
    source, new = torch.arange(-reach, size + reach, device=sigma.device), torch.arange(size, device=sigma.device)
    away = (source - new[:, None]).abs()                                  # (size,size+2 reach)
    box = (away <= l) + a * (away == l + 1)                               # (B,size,size+2 reach)
    inside = (source.clamp(0, size - 1)[:, None] == new).to(box.dtype)    # (size+2 reach,size): the pixel that is there
    return torch.linalg.matrix_power(box / box.sum(dim=2, keepdim=True) @ inside, 3)


def gaussian_blur(images, sigma):
    """Gaussian blur as PIL's GaussianBlur(sigma), sigma (B,) in pixels on the CPU."""
    reach, sigma = math.ceil(sigma.max()) + 1, sigma.to(images.device, images.dtype, non_blocking=True)
    rows, cols = (blur_matrix(sigma, size, reach)[:, None] for size in images.shape[-2:])             # (B,1,H,H), (B,1,W,W)
    return (rows @ images @ cols.transpose(-2, -1)).clamp_(0, 1)


# ---- Policies: which image meets which operation -----------------------------------------------------------------------

def apply_chosen(images, choice, level, operations):
    """Apply operations[choice[i]] to image i, with argument(level[i]); a choice of -1 leaves it alone.

    choice, level (B,) on the CPU; operations: list of (operation, argument). The argument tensor is left untouched.
    """
    out = images.clone()
    for k, (operation, argument) in enumerate(operations):
        chosen = (choice == k).nonzero()[:, 0]                            # on the CPU: no wait
        if len(chosen):
            where = chosen.to(images.device, non_blocking=True)
            out[where] = operation(images[where], argument(level[chosen]))
    return out


def sometimes(images, prob, operation):
    """Apply operation (images -> images) to each image with probability `prob`."""
    choice = torch.where(torch.rand(len(images)) < prob, 0, -1)
    return apply_chosen(images, choice, choice, [(lambda x, _: operation(x), lambda _: None)])


def signed(n, value):
    return random_sign(n) * value


# RandAugment's operations and the argument of each as a function of the magnitude m (B,), 0..10; the "increasing" set, in
# which a larger m is always a stronger change.
RAND_AUGMENT = [
    (autocontrast, lambda m: m),                                          # the first three have no strength
    (equalize, lambda m: m),
    (invert, lambda m: m),
    (rotate, lambda m: signed(len(m), 3.0 * m)),                          # degrees, up to 30
    (posterize, lambda m: 4 - (0.4 * m).floor()),                         # bits kept, 4 down to 0
    (solarize, lambda m: 256 - (25.6 * m).floor()),                       # threshold, 256 down to 0
    (solarize_add, lambda m: (11.0 * m).floor().clamp(max=128)),          # levels added, up to 110
    (color, lambda m: (1 + signed(len(m), 0.09 * m)).clamp(min=0.1)),     # factor, 0.1 to 1.9
    (contrast, lambda m: (1 + signed(len(m), 0.09 * m)).clamp(min=0.1)),
    (brightness, lambda m: (1 + signed(len(m), 0.09 * m)).clamp(min=0.1)),
    (sharpness, lambda m: (1 + signed(len(m), 0.09 * m)).clamp(min=0.1)),
    (shear_x, lambda m: signed(len(m), 0.03 * m)),                        # up to 0.3
    (shear_y, lambda m: signed(len(m), 0.03 * m)),
    (translate_x, lambda m: signed(len(m), 0.045 * m)),                   # fraction of the side, up to 0.45
    (translate_y, lambda m: signed(len(m), 0.045 * m)),
]


def rand_augment(images, num_ops=2, magnitude=9.0, noise=0.5, prob=0.5, operations=RAND_AUGMENT):
    """RandAugment: num_ops times, one operation of the table drawn for each image and applied with probability `prob`.

    Its magnitude is N(magnitude, noise^2), clipped to 0..10. (B,3,H,W) in [0,1] -> same; the argument is left untouched.
    """
    B = len(images)
    for _ in range(num_ops):
        choice = torch.where(torch.rand(B) < prob, torch.randint(0, len(operations), (B,)), torch.tensor(-1))
        m = (magnitude + noise * torch.randn(B)).clamp_(0, 10)
        images = apply_chosen(images, choice, m, operations)
    return images


# AutoAugment's operations and the argument of each as a function of the index k (B,), 0..9.
AUTO_AUGMENT_OPERATIONS = {
    "autocontrast": (autocontrast, lambda k: k),                          # the first three have no strength
    "equalize": (equalize, lambda k: k),
    "invert": (invert, lambda k: k),
    "posterize": (posterize, lambda k: 8 - k // 2),                       # bits kept, 8 down to 4
    "solarize": (solarize, lambda k: 256 - 256 * k / 9),                  # threshold, 256 down to 0
    "color": (color, lambda k: 1 + signed(len(k), 0.1 * k)),              # factor, 0.1 to 1.9
    "contrast": (contrast, lambda k: 1 + signed(len(k), 0.1 * k)),
    "brightness": (brightness, lambda k: 1 + signed(len(k), 0.1 * k)),
    "sharpness": (sharpness, lambda k: 1 + signed(len(k), 0.1 * k)),
    "rotate": (partial(rotate, mode="nearest", fill=MID_GREY), lambda k: 30 * k / 9),                 # degrees, never negative
    "shear_y": (partial(shear_y, fill=MID_GREY), lambda k: signed(len(k), 0.3 * k / 9)),
    "translate_x": (partial(translate_x, mode="nearest", fill=MID_GREY), lambda k: signed(len(k), 150 / 331 * k / 9)),
    "translate_y": (partial(translate_y, mode="nearest", fill=MID_GREY), lambda k: signed(len(k), 150 / 331 * k / 9)),
}
AUTO_AUGMENT = [  # the policy found for CIFAR-10: (operation, probability, k, and then the same again), one of them per image
    ("invert", 0.1, 7, "contrast", 0.2, 6),          ("rotate", 0.7, 2, "translate_x", 0.3, 9),
    ("sharpness", 0.8, 1, "sharpness", 0.9, 3),      ("shear_y", 0.5, 8, "translate_y", 0.7, 9),
    ("autocontrast", 0.5, 8, "equalize", 0.9, 2),    ("shear_y", 0.2, 7, "posterize", 0.3, 7),
    ("color", 0.4, 3, "brightness", 0.6, 7),         ("sharpness", 0.3, 9, "brightness", 0.7, 9),
    ("equalize", 0.6, 5, "equalize", 0.5, 1),        ("contrast", 0.6, 7, "sharpness", 0.6, 5),
    ("color", 0.7, 7, "translate_x", 0.5, 8),        ("equalize", 0.3, 7, "autocontrast", 0.4, 8),
    ("translate_y", 0.4, 3, "sharpness", 0.2, 6),    ("brightness", 0.9, 6, "color", 0.2, 8),
    ("solarize", 0.5, 2, "invert", 0.0, 3),          ("equalize", 0.2, 0, "autocontrast", 0.6, 0),
    ("equalize", 0.2, 8, "equalize", 0.6, 4),        ("color", 0.9, 9, "equalize", 0.6, 6),
    ("autocontrast", 0.8, 4, "solarize", 0.2, 8),    ("brightness", 0.1, 3, "color", 0.7, 0),
    ("solarize", 0.4, 5, "autocontrast", 0.9, 3),    ("translate_y", 0.9, 9, "translate_y", 0.7, 9),
    ("autocontrast", 0.9, 2, "solarize", 0.8, 3),    ("equalize", 0.8, 8, "invert", 0.1, 3),
    ("translate_y", 0.7, 9, "autocontrast", 0.9, 1),
]


def auto_augment(images):
    """One of AutoAugment's 25 pairs of operations for each image, both applied with their own probabilities.

    (B,3,H,W) in [0,1] -> same; the argument is left untouched.
    """
    names, operations = list(AUTO_AUGMENT_OPERATIONS), list(AUTO_AUGMENT_OPERATIONS.values())
    pair = torch.randint(0, len(AUTO_AUGMENT), (len(images),))            # (B,)
    for half in (slice(0, 3), slice(3, 6)):
        name, prob, k = zip(*(row[half] for row in AUTO_AUGMENT))         # 25 each
        number = torch.tensor([names.index(n) for n in name])
        applied = torch.rand(len(images)) < torch.tensor(prob)[pair]
        images = apply_chosen(images, torch.where(applied, number[pair], -1), torch.tensor(k)[pair], operations)
    return images


COLOR_JITTER = [(operation, lambda amount: amount) for operation in (brightness, contrast, color, hue)]


def color_jitter(images, brightness, contrast, saturation, hue=0.0):
    """torchvision's ColorJitter, each image with its own factors and its own order of the operations.

    Brightness, contrast and saturation: factor U(max(0, 1 - s), 1 + s), s the strength given. Hue: U(-hue, hue) turns.
    """
    B = len(images)
    ranges = [(max(0.0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)] + ([(-hue, hue)] if hue else [])
    amount = torch.stack([uniform(B, low, high) for low, high in ranges], dim=1)                      # (B,4), (B,3) without hue
    for choice in torch.rand(amount.shape).argsort(dim=1).T:              # (B,) each: what every image meets next
        images = apply_chosen(images, choice, amount[torch.arange(B), choice], COLOR_JITTER)
    return images


# ---- Boxes -------------------------------------------------------------------------------------------------------------

def box_mask(images, top, left, height, width):
    """True inside each image's box, whose corner and sides are (B,) on the CPU or numbers: (B,1,H,W) on the images' device."""
    H, W = images.shape[-2:]
    in_rows = (torch.arange(H) >= top[:, None]) & (torch.arange(H) < (top + height)[:, None])         # (B,H)
    in_cols = (torch.arange(W) >= left[:, None]) & (torch.arange(W) < (left + width)[:, None])        # (B,W)
    in_rows, in_cols = (i.to(images.device, non_blocking=True) for i in (in_rows, in_cols))
    return (in_rows[:, :, None] & in_cols[:, None, :])[:, None]


def cutout(images, size=16):
    """A black size x size square in every image, centred on any of its pixels, cut off at the border."""
    B, _, H, W = images.shape
    top, left = torch.randint(0, H, (B,)) - size // 2, torch.randint(0, W, (B,)) - size // 2
    return images.masked_fill(box_mask(images, top, left, size, size), 0)


def random_erasing(images, prob=0.25, area=(0.02, 1 / 3), aspect=0.3):
    """Overwrite a box in a fraction `prob` of the images with noise.

    Box area U(area) of the image, log aspect ratio uniform in (aspect, 1/aspect), the first of 10 tries that fits, else none.
    Every pixel is drawn from N(0, 1) in ImageNet-normalised units, as in timm, here clipped to [0,1].
    """
    B, _, H, W = images.shape
    size = H * W * uniform((B, 10), *area)
    ratio = log_uniform((B, 10), aspect, 1 / aspect)
    h, w = (size * ratio).sqrt().round(), (size / ratio).sqrt().round()   # (B,10)
    fits = (h < H) & (w < W)
    first = fits.int().argmax(dim=1, keepdim=True)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]             # (B,)
    erase = (torch.rand(B) < prob) & fits.any(dim=1)
    top, left = (torch.rand(B) * (H - h + 1)).floor(), (torch.rand(B) * (W - w + 1)).floor()
    box = box_mask(images, top, left, h * erase, w)                       # no rows where nothing is erased
    noise = (rgb(IMAGENET_MEAN, images) + rgb(IMAGENET_STD, images) * torch.randn_like(images)).clamp_(0, 1)
    return torch.where(box, noise, images)


# ---- Whole recipes -----------------------------------------------------------------------------------------------------

def strong_augment(images, size, crop="padded", magnitude=9.0, erasing=0.25):
    """Crop and flip, RandAugment (left out if magnitude < 0), erasing: (B,3,H,W) -> (B,3,size,size).

    crop: "resized", a random box (ImageNet's way), or "padded", padding by an eighth, cropping back, resizing (CIFAR's).
    """
    if crop == "resized":
        images = random_resized_crop(images, size)
    else:
        images = resize(random_crop_flip(images, images.shape[-1] // 8), size)
    if magnitude >= 0:
        images = rand_augment(images, magnitude=magnitude)
    return random_erasing(images, erasing)


def paco_query_view(images):
    """The view that PaCo classifies, for CIFAR: (B,3,H,W) -> same."""
    return cutout(auto_augment(random_crop_flip(images)))


def simclr_view(images, size):
    """SimCLR's view as in MoCo v2, which PaCo takes for its keys: (B,3,H,W) -> (B,3,size,size)."""
    images = random_resized_crop(images, size, scale=(0.2, 1.0))
    images = sometimes(images, 0.8, lambda x: color_jitter(x, 0.4, 0.4, 0.4, 0.1))
    images = sometimes(images, 0.2, grayscale)                            # one channel, written to all three
    return sometimes(images, 0.5, lambda x: gaussian_blur(x, uniform(len(x), 0.1, 2.0)))


# ---- Mixing ------------------------------------------------------------------------------------------------------------

def smooth_one_hot(labels, num_classes, smoothing=0.0):
    """Labels (B,) -> (B,K): 1 - e + e/K at the label, e/K elsewhere, e = smoothing; rows sum to 1."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mixup_cutmix(images, labels, num_classes, mixup=0.8, cutmix=1.0, smoothing=0.1):
    """Mix image i with image B-1-i, one draw for the whole batch: mixup or CutMix with probability 1/2 each.

        mixup:   lam ~ Beta(mixup, mixup),   x <- lam x_i + (1 - lam) x_j
        CutMix:  lam ~ Beta(cutmix, cutmix), a box of (1 - lam) of the area is taken from x_j; lam <- area really kept
        target:  lam S(y_i) + (1 - lam) S(y_j),   S = smoothed one-hot

    A strength of 0 leaves that kind out; with both 0 only the labels are smoothed. CutMix's box is centred anywhere and
    clipped at the border. images (B,3,H,W), labels (B,) -> (B,3,H,W), (B,K), rows of which sum to 1.
    """
    H, W = images.shape[-2:]
    target = smooth_one_hot(labels, num_classes, smoothing)
    if mixup == 0 and cutmix == 0:
        return images, target
    use_cutmix = cutmix > 0 and (mixup == 0 or torch.rand(()).item() < 0.5)                           # CPU draws: no wait
    strength = cutmix if use_cutmix else mixup
    lam = torch.distributions.Beta(strength, strength).sample().item()
    partner = images.flip(0)
    if use_cutmix:
        cut_h, cut_w = int(H * math.sqrt(1 - lam)), int(W * math.sqrt(1 - lam))
        y, x = torch.randint(0, H, ()).item(), torch.randint(0, W, ()).item()                         # centre of the box
        y1, y2, x1, x2 = max(y - cut_h // 2, 0), min(y + cut_h // 2, H), max(x - cut_w // 2, 0), min(x + cut_w // 2, W)
        images = images.clone()
        images[:, :, y1:y2, x1:x2] = partner[:, :, y1:y2, x1:x2]
        lam = 1 - (y2 - y1) * (x2 - x1) / (H * W)
    else:
        images = lam * images + (1 - lam) * partner
    return images, lam * target + (1 - lam) * target.flip(0)
