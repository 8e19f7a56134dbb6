r"""DeiT-III (Touvron et al., ECCV 2022, arXiv 2204.07118): a ViT without a teacher.

    python -m experiments.deit3 --dataset cifar10 --imb 100          flags as of train_student.py

Changes to the recipe: 3-Augment instead of RandAugment and erasing, LayerScale, binary
cross-entropy without label smoothing and logit adjustment, always mixup and CutMix. Optimizer,
crop, sizes, epochs and stochastic depth stay the recipe's (published: LAMB, a simple random crop,
192 px for 800 epochs and 224 px for 20, tests on the whole image, stronger stochastic depth;
DeiT-LT's copy of it has no LayerScale, and pads before it crops).
"""
import torch
import torch.nn.functional as F

import augment
import train_student
from engine import runtime
from engine.runtime import UserError
from engine.settings import flag
from images.operations import ID, apply_operations, apply_where
from images.policies import color_jitter


def three_augment(images):
    """Each image gray, solarized from 128 on, or blurred (sigma U(0.1, 2) px); then color jitter.

    uint8 (B,3,H,W) -> the same; the argument is left as it is.
    """
    kind = torch.randint(0, 3, (len(images),))
    images = apply_where(images, kind == 0, augment.gray)
    images = apply_where(images, kind == 2, augment.simclr_blur)
    solarized = torch.where(kind == 1, ID["solarize"], -1)
    images = apply_operations(images, solarized, torch.full((len(images),), 128.0))
    return color_jitter(images, 0.3, 0.3, 0.3)


def augment_images(images, args):
    """uint8 (B,3,H,W) -> (B,3,S,S) in [0,1]: the recipe's crop and flip, then 3-Augment."""
    if args.crop == "resized":
        images = augment.random_resized_crop(images, args.img_size)
    elif args.crop == "padded":
        images = augment.random_crop_flip(images, images.shape[-1] // 8)
        images = augment.resize(images, args.img_size)
    return augment.to_float(augment.random_erasing(three_augment(images), args.erasing))


def binary_cross_entropy(logits, target):
    """Is class k in the image, yes or no? Mean over all B*K answers.

    logits (B,K); target: labels (B,), or soft labels (B,K), where all classes above 0 are a yes.
    """
    if target.ndim == 2:
        present = target > 0
    else:
        present = F.one_hot(target, logits.shape[1])
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, present.to(logits.dtype))


def parse(argv=None):
    """The settings of train_student.py. UserError for those that DeiT-III does not have."""
    args = train_student.parse(argv, __doc__)
    if args.method != "deit-lt":                    # the default: none was given
        raise UserError(f"--method {args.method} is not DeiT-III: python train_student.py has it")
    args.method = "deit-iii"
    for name in ("smoothing", "rand_ops", "magnitude"):
        if getattr(args, name):
            raise UserError(f"{flag(name)} is not for DeiT-III: of a smoothed label every class "
                            "would be present, and 3-Augment replaces RandAugment")
    if args.distill not in (None, "none"):
        raise UserError("--distill is not for DeiT-III, which has no teacher")
    return args


def main():
    args = parse()
    rt = runtime.setup(args.device, args.amp)
    train_student.run_student(args, rt, augment_images=augment_images,
                              label_loss=binary_cross_entropy)


if __name__ == "__main__":
    runtime.run_main(main)
