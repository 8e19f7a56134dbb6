r"""How fast is it here? Every figure is measured now, on this machine, side by side with what it is compared to.

    python bench.py                      all of it
    python bench.py --only augment       or: step

Quote ratios from one run, not single numbers: machines are shared and noisy. Each comparison calls its variants in turn, round
after round, and reports the median round with the slowest and fastest in brackets.
"""
import argparse
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import augment
import engine
import resnet
import train_student
import vit
from losses import PaCo, PaCoLoss
from sam import SAM, frozen_batchnorm_statistics


def rounds(variants, n, rt):
    """{name: function} -> {name: seconds of each of n calls}; one round calls every variant once, the first is not counted."""
    times = {name: [] for name in variants}
    for _ in range(n + 1):
        for name, function in variants.items():
            start = time.perf_counter()
            function()
            if rt.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: t[1:] for name, t in times.items()}


def print_rates(title, times, images, baseline=None):
    """images/s of every variant, and its ratio to the baseline's median."""
    print(f"\n{title}")
    reference = statistics.median(times[baseline]) if baseline else None
    for name, t in times.items():
        median = statistics.median(t)
        ratio = f"   {reference / median:5.2f} x" if baseline else ""
        print(f"  {name:44s} {images / median:9.0f} images/s  ({images / max(t):.0f} .. {images / min(t):.0f}){ratio}")


def pil_pipeline(size):
    """A similar policy as users have it today: PIL images one by one, torchvision's transforms, in this process.

    torchvision's RandAugment always applies its operations, ours each with probability 1/2: so it gets one, not two.
    """
    crop = [transforms.RandomCrop(size, padding=size // 8), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*crop, transforms.RandAugment(1, 9), transforms.ToTensor(),
                               transforms.RandomErasing(0.25, value="random")])


def bench_augment(rt, n):
    images = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8, device=rt.device)
    pictures = [Image.fromarray(np.ascontiguousarray(i.permute(1, 2, 0).cpu().numpy())) for i in images]
    pil = pil_pipeline(32)
    args = argparse.Namespace(crop="padded", img_size=32, magnitude=9.0, erasing=0.25)
    times = rounds({
        "torchvision on PIL images, one by one": lambda: torch.stack([pil(p) for p in pictures]),
        "augment.py on the batch, a draw per image": lambda: train_student.strong_augment(augment.to_float(images), args),
    }, n, rt)
    print_rates("Augmentation, 32 px: crop, flip, RandAugment, erasing (128 images)", times, 128,
                baseline="torchvision on PIL images, one by one")


def matmul_peak(rt):
    """FLOP/s of a 2048 x 2048 matrix product in the type the networks train in."""
    a, b = (torch.randn(2048, 2048, device=rt.device, dtype=rt.amp or torch.float32) for _ in range(2))
    return 2 * 2048 ** 3 / statistics.median(rounds({"": lambda: a @ b}, 7, rt)[""])


def training_flops(net, x):
    """Floating point operations of a forward and backward pass, per image: three times the forward's."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x[:2])
    return 3 * counter.get_total_flops() / 2


def teacher_step(x, rt, paco, use_sam):
    """A function that takes one training step of a ResNet-32 teacher on images x (B,3,32,32)."""
    x, labels = x.contiguous(memory_format=torch.channels_last), torch.arange(len(x), device=rt.device) % 10
    net = resnet.resnet32(10).to(rt.device, memory_format=torch.channels_last)
    whole = PaCo(net, 64).to(rt.device) if paco else net
    criterion = PaCoLoss([100] * 10).to(rt.device) if paco else F.cross_entropy
    sgd = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    sam = SAM(sgd, 0.1)

    def backward(keys):
        with rt.autocast():
            if paco:
                logits, v = whole(x)
                loss = criterion(logits, v, labels, *whole.bank(v, keys, labels))
            else:
                loss = criterion(whole(x), labels)
        loss.backward()

    def step():
        with rt.autocast():
            keys = whole.keys(x) if paco else None
        backward(keys)
        if use_sam:
            sam.first_step()
            with frozen_batchnorm_statistics(whole):
                backward(keys)
            sam.second_step()
        else:
            sgd.step()
            sgd.zero_grad()
        if paco:
            whole.enqueue(keys, labels)
    return step


def bench_step(rt, n):
    peak, x = matmul_peak(rt), torch.rand(128, 3, 32, 32, device=rt.device)
    print(f"\nMatrix product of 2048: {peak / 1e9:.0f} GFLOP/s in {str(rt.amp or torch.float32)[6:]}")
    steps, flops = {}, {}
    for name, make in (("mini", vit.vit_mini), ("tiny", vit.vit_tiny)):
        net = make(img_size=32, patch_size=4, num_classes=10).to(rt.device)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)

        def step(net=net, optimizer=optimizer):
            with rt.autocast():
                cls_logits, dist_logits = net(x)
                loss = cls_logits.logsumexp(1).mean() + dist_logits.logsumexp(1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        steps[f"student ViT {name}, patch 4: step"], flops[f"student ViT {name}, patch 4: step"] = step, training_flops(net, x)
    for paco in (False, True):
        for use_sam in (False, True):
            name = f"teacher ResNet-32{' with PaCo' * paco}: step{' with SAM' * use_sam}"
            steps[name] = teacher_step(x, rt, paco, use_sam)
            passes = 1 + use_sam + paco / 3                               # the keys of PaCo: a forward pass
            flops[name] = passes * training_flops(resnet.resnet32(10), x.cpu())
    times = rounds(steps, n, rt)
    print_rates("Training step, 32 px, batch 128", times, 128)
    for name in ("ResNet-32", "ResNet-32 with PaCo"):
        plain, sam = (times[f"teacher {name}: step{with_sam}"] for with_sam in ("", " with SAM"))
        ratio = statistics.median(b / a for a, b in zip(plain, sam))      # pairs of the same round
        print(f"  {name}: a step with SAM takes {ratio:.2f} times as long as one without")
    for name, t in times.items():
        print(f"  {name:44s} {flops[name] * 128 / statistics.median(t) / peak:6.0%} of the matrix product's rate")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"augment": bench_augment, "step": bench_step}
    parser.add_argument("--only", choices=sections)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="auto", choices=["auto", "bf16", "none"])
    options = parser.parse_args()
    rt = engine.setup(options.device, options.amp)
    print(f"torch {torch.__version__} on {rt.hardware()}")
    for name in [options.only] if options.only else sections:
        sections[name](rt, options.rounds)


if __name__ == "__main__":
    engine.run_main(main)
