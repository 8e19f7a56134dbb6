r"""Policies, which draw an operation and its argument for every image of a batch.

    auto_augment    AutoAugment's policy for CIFAR-10                   1805.09501
    color_jitter    brightness, contrast, saturation, hue               as in torchvision
    cutout          a black square                                      1708.04552

All take uint8 images (B,3,H,W) in 0..255 on any device, return the same and leave their argument
unchanged. Decisions are drawn on the CPU from torch's global generator. RandAugment is in
augment.py; it shares `draw`.
"""
import torch

from images.operations import ID, MID_GRAY, apply_operations, box_mask, uniform


def draw(table, row, magnitude):
    """What an operation of a policy's table does at a magnitude, for each image.

    table: rows (operation, start, slope, how) of argument = start + slope * magnitude; how:
    "truncate" or "random sign" the second term, or "". row, magnitude (B,): the row drawn for each
    image. Returns (operation number, argument), (B,) each. All on the CPU.
    """
    op = torch.tensor([ID[name] for name, _, _, _ in table])[row]
    start = torch.tensor([float(start) for _, start, _, _ in table])[row]
    slope = torch.tensor([float(slope) for _, _, slope, _ in table])[row]
    truncate = torch.tensor([how == "truncate" for _, _, _, how in table])[row]
    random_sign = torch.tensor([how == "random sign" for _, _, _, how in table])[row]
    change = slope * magnitude
    change = torch.where(truncate, change.trunc(), change)
    negative = random_sign & (torch.rand(len(row)) < 0.5)
    return op, start + torch.where(negative, -change, change)


# ---- AutoAugment ---------------------------------------------------------------------------------

AUTO_AUGMENT_OPERATIONS = [                     # magnitude k: 0..9
    ("autocontrast", 0, 0, ""),                 # these three have no argument
    ("equalize", 0, 0, ""),
    ("invert", 0, 0, ""),
    ("posterize", 8, -0.5, "truncate"),         # bits kept, 8 down to 4
    ("solarize", 256, -256 / 9, ""),            # threshold, 256 down to 0
    ("color", 1, 0.1, "random sign"),           # factors, 0.1 to 1.9
    ("contrast", 1, 0.1, "random sign"),
    ("brightness", 1, 0.1, "random sign"),
    ("sharpness", 1, 0.1, "random sign"),
    ("rotate", 0, 30 / 9, ""),                  # degrees, never negative
    ("shear_y", 0, 0.3 / 9, "random sign"),
    ("translate_x", 0, 150 / 331 / 9, "random sign"),       # fraction of the side
    ("translate_y", 0, 150 / 331 / 9, "random sign"),
]
AUTO_AUGMENT = [        # the policy found for CIFAR-10: two times (operation, probability, k)
    ("invert", 0.1, 7, "contrast", 0.2, 6),
    ("rotate", 0.7, 2, "translate_x", 0.3, 9),
    ("sharpness", 0.8, 1, "sharpness", 0.9, 3),
    ("shear_y", 0.5, 8, "translate_y", 0.7, 9),
    ("autocontrast", 0.5, 8, "equalize", 0.9, 2),
    ("shear_y", 0.2, 7, "posterize", 0.3, 7),
    ("color", 0.4, 3, "brightness", 0.6, 7),
    ("sharpness", 0.3, 9, "brightness", 0.7, 9),
    ("equalize", 0.6, 5, "equalize", 0.5, 1),
    ("contrast", 0.6, 7, "sharpness", 0.6, 5),
    ("color", 0.7, 7, "translate_x", 0.5, 8),
    ("equalize", 0.3, 7, "autocontrast", 0.4, 8),
    ("translate_y", 0.4, 3, "sharpness", 0.2, 6),
    ("brightness", 0.9, 6, "color", 0.2, 8),
    ("solarize", 0.5, 2, "invert", 0.0, 3),
    ("equalize", 0.2, 0, "autocontrast", 0.6, 0),
    ("equalize", 0.2, 8, "equalize", 0.6, 4),
    ("color", 0.9, 9, "equalize", 0.6, 6),
    ("autocontrast", 0.8, 4, "solarize", 0.2, 8),
    ("brightness", 0.1, 3, "color", 0.7, 0),
    ("solarize", 0.4, 5, "autocontrast", 0.9, 3),
    ("translate_y", 0.9, 9, "translate_y", 0.7, 9),
    ("autocontrast", 0.9, 2, "solarize", 0.8, 3),
    ("equalize", 0.8, 8, "invert", 0.1, 3),
    ("translate_y", 0.7, 9, "autocontrast", 0.9, 1),
]


def auto_augment(images):
    """One of the 25 pairs of operations for each image, each of the two with its own probability.

    What comes in from outside is mid-gray; rotations and translations take the nearest pixel.
    """
    names = [name for name, _, _, _ in AUTO_AUGMENT_OPERATIONS]
    pair = torch.randint(0, len(AUTO_AUGMENT), (len(images),))                      # (B,)
    for column in (0, 3):                       # first and second operation of the pair
        row = torch.tensor([names.index(policy[column]) for policy in AUTO_AUGMENT])[pair]
        prob = torch.tensor([policy[column + 1] for policy in AUTO_AUGMENT])[pair]
        k = torch.tensor([policy[column + 2] for policy in AUTO_AUGMENT])[pair]
        op, value = draw(AUTO_AUGMENT_OPERATIONS, row, k)
        applied = torch.rand(len(images)) < prob
        op = torch.where(applied, op, -1)
        images = apply_operations(images, op, value, fill=MID_GRAY, nearest=True)
    return images


# ---- Colour jitter and Cutout --------------------------------------------------------------------

def color_jitter(images, brightness, contrast, saturation, hue=0.0):
    """torchvision's ColorJitter; each image has its own factors and its own order of operations.

    Brightness, contrast and saturation: factor U(max(0, 1 - s), 1 + s), s the strength given.
    Hue: U(-hue, hue) turns of the colour circle; 0 leaves it out.
    """
    B = len(images)
    ranges = {}
    for name, s in (("brightness", brightness), ("contrast", contrast), ("color", saturation)):
        ranges[name] = (max(0.0, 1 - s), 1 + s)
    if hue:
        ranges["hue"] = (-hue, hue)
    op = torch.tensor([ID[name] for name in ranges])                                # (4,) or (3,)
    value = [uniform(B, low, high) for low, high in ranges.values()]
    value = torch.stack(value, dim=1)                                               # (B,4)
    order = torch.rand(value.shape).argsort(dim=1)                      # (B,4), one per image
    for choice in order.T:                                              # (B,)
        images = apply_operations(images, op[choice], value[torch.arange(B), choice])
    return images


def cutout(images, size=16):
    """A black size x size square in every image, centred on any pixel, clipped at the border."""
    B, _, H, W = images.shape
    top = torch.randint(0, H, (B,)) - size // 2
    left = torch.randint(0, W, (B,)) - size // 2
    return images.masked_fill(box_mask(images, top, left, size, size), 0)
