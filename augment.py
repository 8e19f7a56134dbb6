r"""Augmentation of a whole batch on its device, with a different draw for every image.

    levels (B,3,H,W) --random_crop_flip | random_resized_crop--> --rand_augment--> --random_erasing--> levels (B,3,S,S)
    --to_float--> (B,3,S,S) in [0,1] --mixup_cutmix--> mixed images (B,3,S,S), soft labels (B,K)

    strong_augment     crop, RandAugment or 3-Augment, random erasing: the student's images
    paco_query_view    padded crop, AutoAugment, Cutout: the classified view of a PaCo teacher, 2107.12028
    simclr_view        resized crop, colour jitter, grey, blur (MoCo v2, 2003.04297): the other view, for its contrasts
    three_augment      grey, solarised or blurred, then colour jitter: DeiT-III, 2204.07118

RandAugment 1909.13719 as timm's `rand-m9-mstd0.5-inc1` · AutoAugment's CIFAR-10 policy 1805.09501 · Cutout 1708.04552 ·
random erasing 1708.04896 · mixup 1710.09412 · CutMix 1905.04899.

Until they are mixed, images are 8-bit levels, uint8 in 0..255, as the pictures of the published code are: a quarter of the
bytes moves, and nearly all operations give PIL's result to the bit. An operation is done at once for all images that drew
one of its family, each with its own argument: tones are a table of 256 levels per channel, shears a shift per row.

Every image of the batch has its own operations, magnitudes, crops and boxes. The decisions (a few numbers per image) are drawn
on the CPU from torch's global generator, so that the choice of which images an operation touches never waits for a GPU; pixels
stay on the device. Reseed torch before each step and the step can be replayed.
"""
import math
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEAN_COLOUR, MID_GREY = (124, 116, 104), (128, 128, 128)                  # levels: ImageNet's mean, half way


def to_float(images):
    """uint8 (B,3,H,W) in 0..255 -> float32 in [0,1]; floats as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def clip(values):
    """Floats in 0..255 -> levels, cut off as PIL does: towards zero, at 0 and at 255."""
    return values.clamp_(0, 255).to(torch.int32).to(torch.uint8)          # by way of int32, torch is faster on a CPU


def uniform(n, low, high):
    """n independent draws from U(low, high), on the CPU."""
    return low + (high - low) * torch.rand(n)


def log_uniform(n, low, high):
    """n independent draws whose logarithm is uniform, on the CPU."""
    return uniform(n, math.log(low), math.log(high)).exp()


def rgb(values, images):
    """Three numbers -> float (3,1,1) on the images' device, without waiting for it."""
    return torch.tensor(values).to(images.device, torch.float32, non_blocking=True).view(3, 1, 1)


def per_image(values, images):
    """(B,) on the CPU -> (B,1,1,1) on the images' device, without waiting for it."""
    return values.to(images.device, torch.float32, non_blocking=True).view(-1, 1, 1, 1)


def select(images, chosen):
    """images[chosen], chosen (n,) on the CPU: whole images are copied, which is far faster than their pixels by an index."""
    return images.index_select(0, chosen.to(images.device, non_blocking=True))


def replace(images, chosen, new):
    """A copy of the images with new[k] in the place of image chosen[k]."""
    source = torch.arange(len(images))
    source[chosen] = len(images) + torch.arange(len(chosen))
    return select(torch.cat([images, new]), source)


# ---- Crops -------------------------------------------------------------------------------------------------------------

def random_crop_flip(images, padding=4, flip=0.5):
    """Pad with black, crop back to the old size at a random place, mirror with probability `flip`. (B,3,H,W) -> same."""
    B, C, H, W = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, B))
    draws = torch.stack([top, left, torch.rand(B) < flip]).to(images.device, non_blocking=True)
    top, left, mirrored = draws[..., None]                                                            # (B,1) each
    rows, cols = (torch.arange(size, device=images.device) for size in (H, W))
    rows, cols = rows + top, torch.where(mirrored > 0, cols.flip(0), cols) + left                     # (B,H), (B,W)
    pixel = rows[:, :, None] * (W + 2 * padding) + cols[:, None, :]       # (B,H,W): where it lies in the padded picture
    padded = F.pad(images, (padding,) * 4).view(B, C, -1)
    return padded.gather(2, pixel.view(B, 1, -1).expand(B, C, -1)).view(B, C, H, W)


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
    mirror: (B,) bool or None. (B,3,H,W) -> (B,3,out,out), levels if levels were given.
    """
    H, W = images.shape[-2:]
    if images.device.type == "cpu" and images.dtype == torch.uint8:
        return crop_resize_cpu(images, top, left, height, width, out, mirror)
    top, left, height, width = (v.to(images.device, non_blocking=True) for v in (top, left, height, width))
    rows, cols = resize_matrix(top, height, H, out), resize_matrix(left, width, W, out)               # (B,out,H), (B,out,W)
    if mirror is not None:
        cols = torch.where(mirror.to(images.device, non_blocking=True).view(-1, 1, 1), cols.flip(1), cols)
    with torch.autocast(images.device.type, enabled=False):               # bfloat16 would be two levels off
        resized = images.float() @ cols[:, None].transpose(-2, -1)        # (B,3,H,out)
        if images.is_floating_point():
            return (rows[:, None] @ resized).clamp_(0, 1)
        return clip((rows[:, None] @ clip(resized.add_(0.5)).float()).add_(0.5))                      # levels between, as PIL


def crop_resize_cpu(images, top, left, height, width, out, mirror):
    """The same, to two levels, by torch's 8-bit kernel, image by image: several times faster on a CPU."""
    boxes = torch.stack([v.expand(len(images)) for v in (top, left, top + height, left + width)]).long().T.tolist()
    mirror = [False] * len(images) if mirror is None else mirror.tolist()
    new = images.new_empty(len(images), 3, out, out)
    for image, (y1, x1, y2, x2), turned, place in zip(images.split(1), boxes, mirror, new.split(1)):
        box = image[:, :, y1:y2, x1:x2]
        box = (box.flip(3) if turned else box).contiguous(memory_format=torch.channels_last)
        place.copy_(F.interpolate(box, (out, out), mode="bicubic", antialias=True))
    return new


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
    top = torch.where(none, ((H - h) / 2).floor(), (torch.rand(B) * (H - h + 1)).floor())
    left = torch.where(none, ((W - w) / 2).floor(), (torch.rand(B) * (W - w + 1)).floor())
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


# ---- Operations: levels (n,3,H,W) and an argument per image -> levels ---------------------------------------------------

def grayscale(images):
    """PIL's luma, 0.299 R + 0.587 G + 0.114 B in 16-bit fractions, rounded: levels (B,3,H,W) -> levels (B,1,H,W)."""
    r, g, b = images.int().unbind(dim=1)
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16)[:, None].to(torch.uint8)


def blend(other, images, factor):
    """other + factor * (images - other): factor 0 gives other, 1 the images, more exaggerates them."""
    return other + factor * (images - other)


# A tone curve says what becomes of each level: (all levels L (256,), images x (n,3,H,W), arguments v (n,1,1)) -> (n,3|1,256).
def contrast_curve(L, x, v):
    mean = (grayscale(x).mean(dim=(2, 3), dtype=torch.double) + 0.5).floor().float()[:, :, None]      # (n,1,1)
    return blend(mean, L, v)


def autocontrast_curve(L, x, _):
    """Stretch every channel to 0..255; channels of one level stay."""
    low, high = x.flatten(2).amin(2)[:, :, None].double(), x.flatten(2).amax(2)[:, :, None].double()  # (n,3,1)
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)         # 255 / x would be 255 * (1 / x): not PIL's last bit
    return torch.where(high > low, L * scale - low * scale, L.double())


def equalize_curve(L, x, _):
    """Histogram equalisation of every channel, PIL's integer formula."""
    n, C, H, W = x.shape
    offset = 256 * torch.arange(n * C, device=x.device, dtype=torch.int32).view(n, C, 1)
    histogram = torch.zeros(n * C * 256, dtype=torch.long, device=x.device)
    histogram.scatter_add_(0, (x.flatten(2) + offset).long().flatten(), torch.ones_like(histogram[:1]).expand(x.numel()))
    histogram = histogram.view(n, C, 256)
    last = 255 - (histogram.flip(2) > 0).int().argmax(dim=2, keepdim=True)                            # brightest level in use
    step = (H * W - histogram.gather(2, last)) // 255                     # (n,C,1) pixels per new level
    below = histogram.cumsum(dim=2) - histogram                           # pixels darker than the level
    return torch.where(step > 0, (below + step // 2) // step.clamp(min=1), L.long())


TONES = {
    "invert": lambda L, x, v: 255 - L,
    "brightness": lambda L, x, v: v * L,                                  # v: factor
    "contrast": contrast_curve,                                           # factor
    "autocontrast": autocontrast_curve,                                   # no argument
    "equalize": equalize_curve,                                           # no argument
    "posterize": lambda L, x, v: (L / 2 ** (8 - v)).floor() * 2 ** (8 - v),                           # bits kept, 0 to 8
    "solarize": lambda L, x, v: torch.where(L < v, L, 255 - L),           # threshold: levels from there on are inverted
    "solarize_add": lambda L, x, v: torch.where(L < 128, L + v, L),       # added to the dark half
}


def tone(images, op, value):
    """Each image's levels looked up in the curve of its operation: (n,3,H,W), sorted op (n,) in order of TONES, value (n,)."""
    n, C, H, W = images.shape
    L, v = torch.arange(256.0, device=images.device), per_image(value, images)[:, 0]                  # (256,), (n,1,1)
    curves, i = torch.empty(n, C, 256, dtype=torch.double, device=images.device), 0
    for curve, count in zip(TONES.values(), torch.bincount(op, minlength=len(TONES)).tolist()):
        if count:
            curves[i:i + count] = curve(L, images[i:i + count], v[i:i + count])
            i += count
    return clip(curves).view(n * C, 256).gather(1, images.view(n * C, -1).long()).view_as(images)


def color(images, _, factor):
    """Blend with the grey picture."""
    return clip(blend(grayscale(images).float(), images.float(), per_image(factor, images)))


def sharpness(images, _, factor):
    """Blend with a smoothed copy, kernel [1 1 1; 1 5 1; 1 1 1] / 13; the border pixels of the copy are not smoothed."""
    x = images.float()
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    middle = x[..., 1:-1, 1:-1]
    smooth = x.clone()
    smooth[..., 1:-1, 1:-1] = ((rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * middle) / 13 + 0.5).floor()
    return clip(blend(smooth, x, per_image(factor, images)))


def hue(images, _, turns):
    """Turn the hue of every pixel by `turns` of the colour circle; its largest channel and its chroma stay.

    Hue and back, in sixths of a turn: 0 red, 2 green, 4 blue;  channel = max - chroma * clamp(min(k, 4 - k), 0, 1),
    k = (hue + 5, 3, 1 for R, G, B) mod 6.
    """
    r, g, b = images.float().unbind(dim=1)                                # (n,H,W)
    largest = torch.maximum(torch.maximum(r, g), b)
    chroma = largest - torch.minimum(torch.minimum(r, g), b)
    below = chroma.clamp(min=1)
    angle = torch.where(largest == r, (g - b) / below, torch.where(largest == g, 2 + (b - r) / below, 4 + (r - g) / below))
    k = (angle[:, None] + 6 * per_image(turns, images) + rgb([5.0, 3.0, 1.0], images)) % 6            # (n,3,H,W)
    return clip(largest[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1) + 0.5)


def rotate(images, _, degrees, fill=MEAN_COLOUR, coarse=False):
    """Turn each image counter-clockwise about its centre, bicubic; coarse: to the nearest pixel."""
    n, _, H, W = images.shape
    turn = per_image(degrees * (math.pi / 180), images)[:, 0]             # (n,1,1)
    x, y = (torch.arange(size, device=images.device) - (size - 1) / 2 for size in (W, H))
    y = y.view(-1, 1)
    x, y = turn.cos() * x - turn.sin() * y, turn.sin() * x + turn.cos() * y                           # (n,H,W): where from
    grid = torch.stack([x * (2 / W), y * (2 / H)], dim=3)                 # (n,H,W,2), in units of half the side
    fill, mode = rgb(fill, images), "nearest" if coarse else "bicubic"
    turned = F.grid_sample(images - fill, grid, mode=mode, padding_mode="zeros", align_corners=False)
    return clip(turned.add_(fill + 0.5))


def slide(images, along, slope, fill):
    """Take the pixels of row y from along + slope (y + 1/2) further right. levels (n,3,H,W), numbers (n,) on the CPU -> levels.

    Between pixels PIL's cubic (a = -1) along the row, beside the picture the colour `fill`.
    """
    n, C, H, W = images.shape
    along, slope = per_image(along, images)[..., 0], per_image(slope, images)[..., 0]                 # (n,1,1)
    shift = along + slope * torch.arange(0.5, H, device=images.device)[:, None]                       # (n,H,1)
    whole = shift.floor()
    t = (shift - whole)[:, None]                                          # (n,1,H,1)
    u = 1 - t
    column = torch.arange(-1, W + 2, device=images.device) + whole.long()                             # (n,H,W+3)
    pixels = images.gather(3, column.clamp_(0, W - 1)[:, None].expand(-1, C, -1, -1)).float()
    out = pixels[..., :W] * (-t * u * u)
    for i, weight in enumerate((u * (1 + t - t * t), t * (1 + u - u * u), -u * t * t), start=1):
        out.addcmul_(pixels[..., i:i + W], weight)
    place, fill = torch.arange(0.5, W, device=images.device) + shift, rgb(fill, images)               # (n,H,W)
    inside = ((place >= 0) & (place < W))[:, None].float()
    return clip(out.sub_(fill).mul_(inside).add_(fill + 0.5))


def move_x(images, op, value, fill=MEAN_COLOUR, coarse=False):
    """translate_x by a fraction of the width (coarse: whole pixels), or shear_x, which leaves the top left corner in place.

    On images turned on their side (`move_y`) the same are translate_y and shear_y.
    """
    pixels = value * images.shape[-1]
    pixels = (pixels + 0.5).floor() if coarse else pixels
    shear = (op == ID["shear_x"]) | (op == ID["shear_y"])
    return slide(images, torch.where(shear, 0, pixels), torch.where(shear, value, 0), fill)


def move_y(images, *rest, **how):
    """translate_y or shear_y: the same for columns."""
    return move_x(images.transpose(2, 3).contiguous(), *rest, **how).transpose(2, 3)


OPERATIONS = [*TONES, "color", "sharpness", "hue", "rotate", "translate_x", "shear_x", "translate_y", "shear_y"]
ID = {name: i for i, name in enumerate(OPERATIONS)}


def untouched(images, op, value):
    return images


def apply(images, op, value, fill=MEAN_COLOUR, coarse=False):
    """Do operation op[i] with the argument value[i] to image i; -1 leaves it alone. Levels (B,3,H,W) -> same.

    op (B,): numbers of OPERATIONS; value (B,); both on the CPU. fill: the colour of what comes in from outside. coarse:
    rotations and translations take the nearest pixel (shears interpolate, bicubic, as all do otherwise).
    """
    how = dict(fill=fill, coarse=coarse)
    families = [(untouched, 1), (tone, len(TONES)), (color, 1), (sharpness, 1), (hue, 1), (partial(rotate, **how), 1),
                (partial(move_x, **how), 2), (partial(move_y, **how), 2)]         # and how many operations: -1, then OPERATIONS
    op, order = op.sort(stable=True)                                      # the images of a family side by side
    counts = iter(torch.bincount(op + 1, minlength=len(OPERATIONS) + 1).tolist())
    sizes = [sum(islice(counts, number)) for _, number in families]
    x, value = select(images, order), value[order]
    parts = zip(families, x.split(sizes), op.split(sizes), value.split(sizes))
    done = torch.cat([family(*part) if len(part[0]) else part[0] for (family, _), *part in parts])
    return select(done, order.argsort())


def gaussian_blur(images, sigma):
    """Gaussian blur as PIL's GaussianBlur(sigma), but rounded once. sigma (B,) in pixels on the CPU: levels (B,3,H,W) -> same.

    Three box blurs along each axis, which together have the variance sigma^2. A box has 2 l + 1 pixels of weight 1 and one
    of weight a < 1 at either end; past the border the last pixel repeats.
    """
    B, C, H, W = images.shape
    variance = (sigma ** 2 / 3)[:, None]                                  # of one box
    l = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()
    a = (2 * l + 1) * (3 * variance - l * (l + 1)) / (6 * ((l + 1) ** 2 - variance))
    reach = int(l.max()) + 1
    away = torch.arange(-reach, reach + 1).abs()
    box = (away <= l) + a * (away == l + 1)                               # (B,2 reach + 1)
    box = (box / box.sum(dim=1, keepdim=True)).T.to(images.device, non_blocking=True)                 # (2 reach + 1,B)
    x = images.float()
    for dim, size, pad in ((3, W, (reach, reach, 0, 0)), (2, H, (0, 0, reach, reach))):
        for _ in range(3):
            padded, x = F.pad(x, pad, mode="replicate"), torch.zeros_like(x)
            for i, weight in enumerate(box):
                x.addcmul_(padded.narrow(dim, i, size), weight.view(B, 1, 1, 1))
    return clip(x.add_(0.5))


def sometimes(images, chosen, operation):
    """operation (levels -> levels) for the images where chosen (B,), bool on the CPU, is true; the others as they are."""
    chosen = chosen.nonzero()[:, 0]
    return replace(images, chosen, operation(select(images, chosen))) if len(chosen) else images


# ---- Policies: which image meets which operation -----------------------------------------------------------------------

# RandAugment's operations and their arguments as functions of the magnitude m, 0..10: start + slope * m, its second term
# truncated ("int") or of random sign ("+-"). It is the "increasing" set: a larger m is always a stronger change.
RAND_AUGMENT = [
    ("autocontrast", 0, 0, ""), ("equalize", 0, 0, ""), ("invert", 0, 0, ""),                         # have no strength
    ("rotate", 0, 3.0, "+-"),                                             # degrees, up to 30
    ("posterize", 4, -0.4, "int"),                                        # bits kept, 4 down to 0
    ("solarize", 256, -25.6, "int"),                                      # threshold, 256 down to 0
    ("solarize_add", 0, 11.0, "int"),                                     # levels added, up to 110
    ("color", 1, 0.09, "+-"), ("contrast", 1, 0.09, "+-"),                # factors, 0.1 to 1.9
    ("brightness", 1, 0.09, "+-"), ("sharpness", 1, 0.09, "+-"),
    ("shear_x", 0, 0.03, "+-"), ("shear_y", 0, 0.03, "+-"),               # up to 0.3
    ("translate_x", 0, 0.045, "+-"), ("translate_y", 0, 0.045, "+-"),     # fraction of the side, up to 0.45
]


def draw(table, row, m):
    """Operation number and argument, (B,) each, of row[i] of a policy's table at magnitude m[i]; all on the CPU."""
    names, start, slope, how = zip(*table)
    op, start, slope = torch.tensor([ID[name] for name in names])[row], torch.tensor(start)[row], torch.tensor(slope)[row]
    change = slope * m
    change = torch.where(torch.tensor([h == "int" for h in how])[row], change.trunc(), change)
    down = torch.tensor([h == "+-" for h in how])[row] & (torch.rand(len(row)) < 0.5)
    return op, start + torch.where(down, -change, change)


def rand_augment(images, num_ops=2, magnitude=9.0, noise=0.5, prob=0.5, table=RAND_AUGMENT):
    """RandAugment: num_ops times, one operation of the table drawn for each image and applied with probability `prob`.

    Its magnitude is N(magnitude, noise^2), clipped to 0..10. Levels (B,3,H,W) -> same.
    """
    B = len(images)
    for _ in range(num_ops):
        m = (magnitude + noise * torch.randn(B)).clamp_(0, 10)
        op, value = draw(table, torch.randint(0, len(table), (B,)), m)
        images = apply(images, torch.where(torch.rand(B) < prob, op, -1), value)
    return images


# The same for AutoAugment's operations and the index k, 0..9.
AUTO_AUGMENT_OPERATIONS = [
    ("autocontrast", 0, 0, ""), ("equalize", 0, 0, ""), ("invert", 0, 0, ""),
    ("posterize", 8, -0.5, "int"),                                        # bits kept, 8 down to 4
    ("solarize", 256, -256 / 9, ""),                                      # threshold, 256 down to 0
    ("color", 1, 0.1, "+-"), ("contrast", 1, 0.1, "+-"),                  # factors, 0.1 to 1.9
    ("brightness", 1, 0.1, "+-"), ("sharpness", 1, 0.1, "+-"),
    ("rotate", 0, 30 / 9, ""),                                            # degrees, never negative
    ("shear_y", 0, 0.3 / 9, "+-"),
    ("translate_x", 0, 150 / 331 / 9, "+-"), ("translate_y", 0, 150 / 331 / 9, "+-"),                 # fraction of the side
]
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

    Levels (B,3,H,W) -> same; the argument is left untouched.
    """
    B = len(images)
    names = [row[0] for row in AUTO_AUGMENT_OPERATIONS]
    pair = torch.randint(0, len(AUTO_AUGMENT), (B,))
    for half in (slice(0, 3), slice(3, 6)):
        name, prob, k = zip(*(row[half] for row in AUTO_AUGMENT))         # 25 each
        row = torch.tensor([names.index(n) for n in name])[pair]
        op, value = draw(AUTO_AUGMENT_OPERATIONS, row, torch.tensor(k)[pair])
        applied = torch.rand(B) < torch.tensor(prob)[pair]
        op = torch.where(applied, op, -1)
        images = apply(images, op, value, fill=MID_GREY, coarse=True)
    return images


def color_jitter(images, brightness, contrast, saturation, hue=0.0):
    """torchvision's ColorJitter, each image with its own factors and its own order of the operations.

    Brightness, contrast and saturation: factor U(max(0, 1 - s), 1 + s), s the strength given. Hue: U(-hue, hue) turns.
    Levels (B,3,H,W) -> same; the argument is left untouched.
    """
    B = len(images)
    ranges = {"brightness": brightness, "contrast": contrast, "color": saturation}
    ranges = {name: (max(0.0, 1 - s), 1 + s) for name, s in ranges.items()} | ({"hue": (-hue, hue)} if hue else {})
    op = torch.tensor([ID[name] for name in ranges])                      # (4,), (3,) without hue
    amount = torch.stack([uniform(B, low, high) for low, high in ranges.values()], dim=1)             # (B,4)
    for choice in torch.rand(amount.shape).argsort(dim=1).T:              # (B,) each: what every image meets next
        images = apply(images, op[choice], amount[torch.arange(B), choice])
    return images


def three_augment(images):
    """DeiT-III's 3-Augment: each image grey, solarised from level 128 on, or blurred (sigma U(0.1, 2)), then colour jitter 0.3.

    Levels (B,3,H,W) -> same; the argument is left untouched.
    """
    kind = torch.randint(0, 3, (len(images),))
    images = sometimes(images, kind == 0, lambda x: grayscale(x).expand_as(x))
    images = sometimes(images, kind == 2, lambda x: gaussian_blur(x, uniform(len(x), 0.1, 2.0)))
    images = apply(images, torch.where(kind == 1, ID["solarize"], -1), torch.full((len(images),), 128.0))
    return color_jitter(images, 0.3, 0.3, 0.3)


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
    Every pixel is drawn from N(0, 1) in ImageNet-normalised units, as in timm, here rounded to a level in 0..255.
    Levels (B,3,H,W) -> same; the argument is left untouched.
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
    chosen = erase.nonzero()[:, 0]                                        # (n,)
    mask = box_mask(images, *(v[chosen] for v in (top, left, h, w)))      # (n,1,H,W)
    noise = torch.randn(3, int((h * w)[chosen].sum()), device=images.device)                          # (3, all boxes' pixels)
    noise = noise.mul_(rgb(IMAGENET_STD, images)[..., 0]).add_(rgb(IMAGENET_MEAN, images)[..., 0])
    planes = select(images, chosen).transpose(0, 1).contiguous()          # (3,n,H,W)
    planes.masked_scatter_(mask.transpose(0, 1), clip(noise.mul_(255).add_(0.5)))
    return replace(images, chosen, planes.transpose(0, 1))


# ---- Whole recipes -----------------------------------------------------------------------------------------------------

def strong_augment(images, size, crop="padded", policy="rand", magnitude=9.0, erasing=0.25):
    """Crop and flip, RandAugment or 3-Augment, erasing: levels (B,3,H,W) -> float (B,3,size,size) in [0,1].

    crop: "resized", a random box (ImageNet's way), "padded", padding by an eighth, cropping back, resizing (CIFAR's), or
    "loader": the images are cropped, resized and mirrored already. policy: "rand" (of that magnitude), "three" or "none".
    """
    if crop == "resized":
        images = random_resized_crop(images, size)
    elif crop == "padded":
        images = resize(random_crop_flip(images, images.shape[-1] // 8), size)
    if policy == "rand":
        images = rand_augment(images, magnitude=magnitude)
    elif policy == "three":
        images = three_augment(images)
    return to_float(random_erasing(images, erasing))


def paco_query_view(images):
    """The view that PaCo classifies, for CIFAR: levels (B,3,H,W) -> same."""
    return cutout(auto_augment(random_crop_flip(images)))


def simclr_view(images, size):
    """SimCLR's view as in MoCo v2, which PaCo takes for its keys: levels (B,3,H,W) -> levels (B,3,size,size)."""
    B = len(images)
    images = random_resized_crop(images, size, scale=(0.2, 1.0))
    images = sometimes(images, torch.rand(B) < 0.8, lambda x: color_jitter(x, 0.4, 0.4, 0.4, 0.1))
    images = sometimes(images, torch.rand(B) < 0.2, lambda x: grayscale(x).expand_as(x))
    return sometimes(images, torch.rand(B) < 0.5, lambda x: gaussian_blur(x, uniform(len(x), 0.1, 2.0)))


# ---- Mixing ------------------------------------------------------------------------------------------------------------

def smooth_one_hot(labels, num_classes, smoothing=0.0):
    """Labels (B,) -> (B,K): 1 - e + e/K at the label, e/K elsewhere, e = smoothing; rows sum to 1."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mixup_cutmix(images, labels, num_classes, mixup=0.8, cutmix=1.0, smoothing=0.1, mode="batch"):
    """Mix image i with image j = B-1-i, by mixup or CutMix with probability 1/2 each.

        mixup:   lam ~ Beta(mixup, mixup),   x <- lam x_i + (1 - lam) x_j
        CutMix:  lam ~ Beta(cutmix, cutmix), a box of (1 - lam) of the area is taken from x_j; lam <- area really kept
        target:  lam S(y_i) + (1 - lam) S(y_j),   S = smoothed one-hot

    mode, as in timm: one draw for the whole "batch" (published), for each "pair" i, j, or for each image ("elem").
    A strength of 0 leaves that kind out; with both 0 only the labels are smoothed. CutMix's box is centred anywhere and
    clipped at the border. images (B,3,H,W) in [0,1], labels (B,) -> (B,3,H,W), (B,K), rows of which sum to 1.
    """
    B, _, H, W = images.shape
    target = smooth_one_hot(labels, num_classes, smoothing)
    if mixup == 0 and cutmix == 0:
        return images, target
    n = {"batch": 1, "pair": (B + 1) // 2, "elem": B}[mode]
    is_cutmix = torch.rand(n) < (0.5 if mixup > 0 and cutmix > 0 else float(cutmix > 0))
    lam = torch.where(is_cutmix, *(torch.distributions.Beta(s or 1.0, s or 1.0).sample((n,)) for s in (cutmix, mixup)))
    cut_h, cut_w = ((side * (1 - lam).sqrt()).int() // 2 for side in (H, W))                          # half the box's sides
    y, x = torch.randint(0, H, (n,)), torch.randint(0, W, (n,))           # its centre
    y1, y2, x1, x2 = (y - cut_h).clamp(min=0), (y + cut_h).clamp(max=H), (x - cut_w).clamp(min=0), (x + cut_w).clamp(max=W)
    lam = torch.where(is_cutmix, 1 - (y2 - y1) * (x2 - x1) / (H * W), lam)
    box = box_mask(images, y1, x1, y2 - y1, x2 - x1)                      # (n,1,H,W)
    share = torch.where(per_image(is_cutmix, images) > 0, (~box).float(), per_image(lam, images))     # of x_i in each pixel
    lam = lam[:, None].to(images.device, non_blocking=True)               # (n,1)
    if mode == "pair":                                                    # j has the draw of i
        share, lam = (torch.cat([v, v[:B // 2].flip(0)]) for v in (share, lam))
    return images.flip(0).lerp_(images, share), target.flip(0).lerp_(target, lam)
