r"""PIL's image operations on a batch: uint8 images (B,3,H,W) on any device, an argument per image.

Nearly all operations give PIL's result to the bit. An operation is done at once for all images that
drew one of its family: brightness, contrast, solarize, ... are a lookup table of 256 values per
channel, shears and translations a shift of every row.

Arguments (B,) are drawn on the CPU, so that the choice of which images an operation touches never
waits for a GPU; pixels stay on their device.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEAN_COLOR = (124, 116, 104)                    # ImageNet's mean in 0..255
MID_GRAY = (128, 128, 128)


# ---- Small helpers -------------------------------------------------------------------------------

def to_float(images):
    """uint8 (B,3,H,W) in 0..255 -> float32 in [0,1]; floats are returned as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def to_uint8(values):
    """Floats (overwritten) -> uint8, clipped to 0..255 and truncated as PIL does."""
    return values.clamp_(0, 255).to(torch.int16).to(torch.uint8)    # via int16: faster on a CPU


def uniform(n, low, high):
    """n independent draws from U(low, high), on the CPU."""
    return low + (high - low) * torch.rand(n)


def log_uniform(n, low, high):
    """n independent draws whose logarithm is uniform, on the CPU."""
    return uniform(n, math.log(low), math.log(high)).exp()


def rgb(values, images):
    """Three numbers -> float (3,1,1) on the images' device, without waiting for it."""
    color = torch.tensor(values).to(images.device, torch.float32, non_blocking=True)
    return color.view(3, 1, 1)


def per_image(values, images):
    """(B,) on the CPU -> float (B,1,1,1) on the images' device, without waiting for it."""
    return values.to(images.device, torch.float32, non_blocking=True).view(-1, 1, 1, 1)


def select(images, chosen):
    """images[chosen], chosen (n,) on the CPU. (index_select copies whole images: much faster.)"""
    return images.index_select(0, chosen.to(images.device, non_blocking=True))


def replace(images, chosen, new):
    """A copy of the images in which image chosen[k] is new[k]; chosen (n,) on the CPU."""
    source = torch.arange(len(images))
    source[chosen] = len(images) + torch.arange(len(chosen))
    return select(torch.cat([images, new]), source)


def apply_where(images, chosen, operation):
    """operation(images) for the images where chosen (B,), bool on the CPU; the rest unchanged."""
    chosen = chosen.nonzero()[:, 0]
    if len(chosen) == 0:
        return images
    return replace(images, chosen, operation(select(images, chosen)))


def box_mask(images, top, left, height, width):
    """True inside each image's box: (B,1,H,W) on the images' device.

    top, left (B,) on the CPU; height, width (B,) on the CPU or numbers; in pixels.
    """
    H, W = images.shape[-2:]
    top, left = top[:, None], left[:, None]                                         # (B,1)
    bottom = top + torch.as_tensor(height).view(-1, 1)
    right = left + torch.as_tensor(width).view(-1, 1)
    in_rows = (torch.arange(H) >= top) & (torch.arange(H) < bottom)                 # (B,H)
    in_cols = (torch.arange(W) >= left) & (torch.arange(W) < right)                 # (B,W)
    in_rows = in_rows.to(images.device, non_blocking=True)
    in_cols = in_cols.to(images.device, non_blocking=True)
    return (in_rows[:, :, None] & in_cols[:, None, :])[:, None]


# ---- Crop and resize -----------------------------------------------------------------------------

def cubic(x):
    """The bicubic kernel with a = -1/2 (Keys 1981), the one PIL uses."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1                                  # |x| < 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2                            # 1 <= |x| < 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resize_matrix(start, length, size, out):
    """One axis of PIL's antialiased bicubic resize of [start, start + length) to `out` pixels.

    start, length (B,): whole pixels; length may differ per image. Returns weights (B,out,size):
    rows sum to 1, pixels outside the box have weight 0.
    """
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length / out                                                # source pixels per new one
    new_pixel = torch.arange(out, device=start.device).view(1, -1, 1) + 0.5
    center = start + new_pixel * scale                                              # (B,out,1)
    pixel = torch.arange(size, device=start.device).view(1, 1, -1) + 0.5            # (1,1,size)
    weight = cubic((pixel - center) / scale.clamp(min=1))   # wider when shrinking: antialiasing
    weight = weight * ((pixel > start) & (pixel < start + length))
    return weight / weight.sum(dim=2, keepdim=True)


def crop_resize(images, top, left, height, width, out, mirror=None):
    """Cut a box from every image, resize it to out x out (bicubic, antialiased), maybe mirror it.

    top, left, height, width (B,) or (1,) float: whole pixels; mirror: (B,) bool or None.
    (B,3,H,W) -> (B,3,out,out), uint8 or float in [0,1] as given.
    """
    if images.device.type == "cpu" and images.dtype == torch.uint8:
        return crop_resize_cpu(images, top, left, height, width, out, mirror)
    H, W = images.shape[-2:]
    box = [v.to(images.device, non_blocking=True) for v in (top, left, height, width)]
    top, left, height, width = box
    rows = resize_matrix(top, height, H, out)                                       # (B,out,H)
    cols = resize_matrix(left, width, W, out)                                       # (B,out,W)
    if mirror is not None:
        mirror = mirror.to(images.device, non_blocking=True).view(-1, 1, 1)
        cols = torch.where(mirror, cols.flip(1), cols)
    # A separable resize is two matrix products, rows @ image @ cols^T.
    with torch.autocast(images.device.type, enabled=False):     # bfloat16 would be off by two
        resized = images.float() @ cols[:, None].transpose(-2, -1)                  # (B,3,H,out)
        if images.is_floating_point():
            return (rows[:, None] @ resized).clamp_(0, 1)
        resized = to_uint8(resized.add_(0.5)).float()           # PIL too rounds between the two
        return to_uint8((rows[:, None] @ resized).add_(0.5))


def crop_resize_cpu(images, top, left, height, width, out, mirror):
    """The same within 2/255, image by image with torch's uint8 kernel: much faster on a CPU."""
    B = len(images)
    boxes = torch.stack([v.expand(B) for v in (top, left, top + height, left + width)], dim=1)
    mirrored = [False] * B if mirror is None else mirror.tolist()
    resized = torch.empty(B, 3, out, out, dtype=torch.uint8, memory_format=torch.channels_last)
    for image, new, box, flip in zip(images.split(1), resized.split(1), boxes.tolist(), mirrored):
        y1, x1, y2, x2 = map(int, box)
        crop = image[:, :, y1:y2, x1:x2]
        if flip:
            crop = crop.flip(3)
        crop = crop.contiguous(memory_format=torch.channels_last)
        new.copy_(F.interpolate(crop, (out, out), mode="bicubic", antialias=True))
    return torch.from_numpy(np.ascontiguousarray(resized.numpy()))      # faster than torch's


def resize(images, size):
    """Bicubic, antialiased resize to size x size; the same images if they have that size."""
    H, W = images.shape[-2:]
    if (H, W) == (size, size):
        return images
    zero, height, width = torch.zeros(1), torch.tensor([float(H)]), torch.tensor([float(W)])
    return crop_resize(images, zero, zero, height, width, size)


def center_crop(images, size):
    """The central size x size pixels."""
    top = round((images.shape[-2] - size) / 2)
    left = round((images.shape[-1] - size) / 2)
    return images[..., top:top + size, left:left + size]


# ---- Grayscale and blur --------------------------------------------------------------------------

def grayscale(images):
    """PIL's luma, 0.299 R + 0.587 G + 0.114 B in 16-bit fractions: uint8 (B,3,H,W) -> (B,1,H,W)."""
    r, g, b = images.int().unbind(dim=1)
    luma = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16
    return luma[:, None].to(torch.uint8)


def gaussian_blur(images, sigma):
    """Gaussian blur as PIL's GaussianBlur(sigma), but rounded only once. uint8 (B,3,H,W) -> same.

    sigma (B,) in pixels, on the CPU. Three box blurs along each axis together have the variance
    sigma^2. A box has 2 l + 1 pixels of weight 1 and one of weight a < 1 at either end; beyond the
    border the last pixel repeats.
    """
    B, C, H, W = images.shape
    variance = (sigma ** 2 / 3)[:, None]                                    # (B,1), of one box
    l = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()
    a = (2 * l + 1) * (3 * variance - l * (l + 1)) / (6 * ((l + 1) ** 2 - variance))
    radius = int(l.max()) + 1
    distance = torch.arange(-radius, radius + 1).abs()
    box = (distance <= l) + a * (distance == l + 1)                         # (B,2 radius + 1)
    box = (box / box.sum(dim=1, keepdim=True)).T.to(images.device, non_blocking=True)
    x = images.float()
    for dim, size, padding in ((3, W, (radius, radius, 0, 0)), (2, H, (0, 0, radius, radius))):
        for _ in range(3):
            padded = F.pad(x, padding, mode="replicate")
            x = torch.zeros_like(x)
            for i, weight in enumerate(box):                                # weight (B,)
                x.addcmul_(padded.narrow(dim, i, size), weight.view(B, 1, 1, 1))
    return to_uint8(x.add_(0.5))


# ---- Lookup tables: what becomes of each of the 256 values ---------------------------------------
# A curve takes all values v (256,) = 0..255, the images x (n,3,H,W) and their arguments a (n,1,1),
# and returns what becomes of each value, (n,1,256) or (n,3,256) where the channels differ.

def blend(other, images, factor):
    """other + factor * (images - other): factor 0 is other, 1 the images, above 1 exaggerates."""
    return other + factor * (images - other)


def invert_curve(v, x, a):
    return 255 - v


def brightness_curve(v, x, factor):
    return factor * v


def contrast_curve(v, x, factor):
    """Blend with the mean of the gray image, rounded."""
    mean = grayscale(x).mean(dim=(2, 3), dtype=torch.double)                        # (n,1)
    mean = (mean + 0.5).floor().float()[:, :, None]
    return blend(mean, v, factor)


def autocontrast_curve(v, x, a):
    """Stretch every channel to 0..255; constant channels stay."""
    pixels = x.flatten(2)                                                           # (n,3,H*W)
    low, high = pixels.amin(2)[:, :, None].double(), pixels.amax(2)[:, :, None].double()
    # 255 / x would be computed as 255 * (1 / x), which differs from PIL in the last bit.
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    return torch.where(high > low, v * scale - low * scale, v.double())


def equalize_curve(v, x, a):
    """Histogram equalisation of every channel, PIL's integer formula."""
    n, C, H, W = x.shape
    offset = 256 * torch.arange(n * C, device=x.device, dtype=torch.int32).view(n, C, 1)
    bins = (x.flatten(2) + offset).long().flatten()
    histogram = torch.zeros(n * C * 256, dtype=torch.int32, device=x.device)
    histogram.scatter_add_(0, bins, torch.ones_like(histogram[:1]).expand(x.numel()))
    histogram = histogram.view(n, C, 256)
    brightest = 255 - (histogram.flip(2) > 0).int().argmax(dim=2, keepdim=True)     # (n,C,1)
    step = (H * W - histogram.gather(2, brightest)) // 255              # pixels per new value
    darker = histogram.cumsum(dim=2) - histogram                        # pixels below each value
    equalized = (darker + step // 2) // step.clamp(min=1)
    return torch.where(step > 0, equalized, v)


def posterize_curve(v, x, bits):
    """Keep the upper bits, 0 to 8."""
    step = 1 << (8 - bits).int()            # exact on every device, which ** is not
    return (v / step).floor() * step


def solarize_curve(v, x, threshold):
    """Invert the values from the threshold on."""
    return torch.where(v < threshold, v, 255 - v)


def solarize_add_curve(v, x, amount):
    """Brighten the dark half."""
    return torch.where(v < 128, v + amount, v)


CURVES = {
    "invert": invert_curve,
    "brightness": brightness_curve,
    "contrast": contrast_curve,
    "autocontrast": autocontrast_curve,
    "equalize": equalize_curve,
    "posterize": posterize_curve,
    "solarize": solarize_curve,
    "solarize_add": solarize_add_curve,
}


# ---- Families of operations ----------------------------------------------------------------------
# All have the same parameters: uint8 images (n,3,H,W); op (n,), sorted numbers of OPERATIONS; an
# argument per image (n,); the colour `fill` of what comes in from outside; `nearest`: take the
# nearest pixel instead of interpolating.

def apply_lut(images, op, value, fill, nearest):
    """Look every pixel up in the table that the curve of its image's operation makes."""
    n, C, H, W = images.shape
    v = torch.arange(256.0, device=images.device)
    a = per_image(value, images)[:, 0]                                              # (n,1,1)
    table = torch.empty(n, C, 256, dtype=torch.double, device=images.device)
    end = 0
    for curve, count in zip(CURVES.values(), torch.bincount(op, minlength=len(CURVES)).tolist()):
        start, end = end, end + count
        if count:
            table[start:end] = curve(v, images[start:end], a[start:end])
    table = to_uint8(table).view(n * C, 256)
    return table.gather(1, images.view(n * C, -1).long()).view_as(images)


def color(images, op, factor, fill, nearest):
    """Blend with the gray image."""
    gray = grayscale(images).float()
    return to_uint8(blend(gray, images.float(), per_image(factor, images)))


def sharpness(images, op, factor, fill, nearest):
    """Blend with a copy smoothed by [1 1 1; 1 5 1; 1 1 1] / 13, whose border stays as it is."""
    x = images.float()
    inner = x[..., 1:-1, 1:-1]
    rows = (x[..., :-2, :] + x[..., 1:-1, :]).add_(x[..., 2:, :])
    boxes = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:])      # sums of 3 x 3 pixels
    smooth = boxes.add_(inner, alpha=4).div_(13).add_(0.5).floor_()
    inner.sub_(smooth).mul_(per_image(factor, images)).add_(smooth)     # blend, in place
    return to_uint8(x)


def hue(images, op, turns, fill, nearest):
    """Turn every pixel's hue by `turns` of the colour circle; its maximum and chroma stay.

    The hue h in sixths of a turn is 0 for red, 2 for green, 4 for blue; and back,
    channel = max - chroma * clip(min(k, 4 - k), 0, 1),  k = (h + 5, 3, 1) mod 6 for R, G, B.
    """
    r, g, b = images.float().unbind(dim=1)                                          # (n,H,W)
    largest = torch.maximum(torch.maximum(r, g), b)
    chroma = largest - torch.minimum(torch.minimum(r, g), b)
    divisor = chroma.clamp(min=1)                                       # gray: any hue will do
    green_or_blue = torch.where(largest == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    h = torch.where(largest == r, (g - b) / divisor, green_or_blue)[:, None]
    k = (h + 6 * per_image(turns, images) + rgb([5.0, 3.0, 1.0], images)) % 6       # (n,3,H,W)
    saturation = torch.minimum(k, 4 - k).clamp_(0, 1)
    return to_uint8(largest[:, None] - chroma[:, None] * saturation + 0.5)


def rotate(images, op, degrees, fill, nearest):
    """Turn counter-clockwise about the centre, bicubic (grid_sample's kernel, not quite PIL's)."""
    n, _, H, W = images.shape
    angle = per_image(degrees * (math.pi / 180), images)[:, 0]                      # (n,1,1)
    x = torch.arange(W, device=images.device) - (W - 1) / 2                         # (W,)
    y = (torch.arange(H, device=images.device) - (H - 1) / 2).view(-1, 1)           # (H,1)
    source_x = angle.cos() * x - angle.sin() * y                                    # (n,H,W)
    source_y = angle.sin() * x + angle.cos() * y
    grid = torch.stack([source_x * (2 / W), source_y * (2 / H)], dim=3)     # in half sides
    fill = rgb(fill, images)
    rotated = F.grid_sample(images - fill, grid, mode="nearest" if nearest else "bicubic",
                            padding_mode="zeros", align_corners=False)
    return to_uint8(rotated.add_(fill + 0.5))


def shift_rows(images, shift, slope, fill):
    """Take the pixels of row y from `shift + slope (y + 1/2)` further right. uint8 -> uint8.

    shift (in pixels), slope (n,) on the CPU. Between pixels PIL's cubic (a = -1) along the row;
    the colour `fill` beside the image.
    """
    n, C, H, W = images.shape
    shift = per_image(shift, images)[..., 0]                                        # (n,1,1)
    slope = per_image(slope, images)[..., 0]
    shift = shift + slope * torch.arange(0.5, H, device=images.device)[:, None]     # (n,H,1)
    whole = shift.floor()
    t = (shift - whole)[:, None]                                                    # (n,1,H,1)
    u = 1 - t
    column = torch.arange(-1, W + 2, device=images.device) + whole.long()           # (n,H,W+3)
    column = column.clamp_(0, W - 1)[:, None].expand(-1, C, -1, -1)
    pixels = images.gather(3, column).float()                                       # (n,3,H,W+3)
    shifted = pixels[..., :W] * (-t * u * u)
    shifted.addcmul_(pixels[..., 1:W + 1], u * (1 + t - t * t))
    shifted.addcmul_(pixels[..., 2:W + 2], t * (1 + u - u * u))
    shifted.addcmul_(pixels[..., 3:W + 3], -u * t * t)
    source = (torch.arange(0.5, W, device=images.device) + shift).floor_()          # (n,H,W)
    inside = source.clamp(0, W - 1).eq_(source)[:, None]            # 1 inside the image, else 0
    fill = rgb(fill, images)
    return to_uint8(shifted.sub_(fill).mul_(inside).add_(fill + 0.5))


def translate_or_shear_x(images, op, value, fill, nearest):
    """Translate by a fraction of the width (nearest: whole pixels), or shear.

    A shear leaves the top left corner in place and always interpolates, as published.
    """
    shear = (op == ID["shear_x"]) | (op == ID["shear_y"])
    pixels = value * images.shape[-1]
    if nearest:
        pixels = (pixels + 0.5).floor()
    return shift_rows(images, torch.where(shear, 0, pixels), torch.where(shear, value, 0), fill)


def translate_or_shear_y(images, op, value, fill, nearest):
    """The same for columns."""
    transposed = images.transpose(2, 3).contiguous()
    return translate_or_shear_x(transposed, op, value, fill, nearest).transpose(2, 3)


FAMILIES = {                                    # function: the operations that it does
    apply_lut: list(CURVES),
    color: ["color"],
    sharpness: ["sharpness"],
    hue: ["hue"],
    rotate: ["rotate"],
    translate_or_shear_x: ["translate_x", "shear_x"],
    translate_or_shear_y: ["translate_y", "shear_y"],
}
OPERATIONS = [name for names in FAMILIES.values() for name in names]
ID = {name: number for number, name in enumerate(OPERATIONS)}


def apply_operations(images, op, value, fill=MEAN_COLOR, nearest=False):
    """Do operation op[i] with the argument value[i] to image i. uint8 (B,3,H,W) -> same.

    op (B,): numbers of OPERATIONS, or -1 for an image that stays as it is; value (B,); both on the
    CPU. fill: colour of what comes in from outside. nearest: rotations and translations take the
    nearest pixel instead of interpolating.
    """
    op, order = op.sort(stable=True)                # the images of a family side by side
    x, value = select(images, order), value[order]      # x is a copy, to be changed in place
    # Images before each operation's: first those without one, then those of operation 0, 1, ...
    before = torch.bincount(op + 1, minlength=len(OPERATIONS) + 1).cumsum(0).tolist()
    for family, names in FAMILIES.items():
        start, end = before[ID[names[0]]], before[ID[names[-1]] + 1]
        part = slice(start, end)
        if start < end:
            x[part] = family(x[part], op[part], value[part], fill, nearest)
    return select(x, order.argsort())
