r"""How fast is it here? Each figure is measured now, beside what it is compared to.

    python -m experiments.bench                     all; 10 minutes on 4 threads, then growth
    python -m experiments.bench --only augment      augmentation, against timm's of PIL pictures
    python -m experiments.bench --only files        decoding of JPEG files, against ImageFolder
    python -m experiments.bench --only student      the ViT's step, against timm's; DeiT-LT's step
    python -m experiments.bench --only teacher      ResNet-32's step, with SAM and without
    python -m experiments.bench --only growth       cost against sizes, files and processes: minutes

timm's augmentation and network are measured too where timm is installed (`pip install timm`).

Quote ratios from one run, not single numbers: machines are shared and noisy. Variants are called in
turn, round after round. Printed are the median round, the slowest and the fastest, and the ratio to
the baseline (the median over rounds). A share of the peak is relative to a large matrix product,
measured in the same minute in the type that the networks train in.
"""
import argparse
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder

import augment
import data_lt
import losses
import resnet
import train_student
import vit
from engine import datasets, evaluation, runtime
from engine.networks import build_student
from engine.records import read_log
from engine.runtime import Runtime
from engine.training import EMA, FiniteScaler
from images import decode, files, lists
from sam import SAM, frozen_batchnorm_statistics

try:
    import timm
    from timm.data import create_transform
    from timm.models.deit import VisionTransformerDistilled
except ImportError:
    timm = None

CPU = Runtime(torch.device("cpu"))


# ---- Measuring -----------------------------------------------------------------------------------

def measure(variants, n, rt):
    """{name: function} -> {name: seconds of n calls}, after one that is not counted.

    A round calls every variant once. A GPU is waited for around each call, which training does not
    do: experiments/steps.py times steps as they follow one another.
    """
    times = {name: [] for name in variants}
    for _ in range(n + 1):
        for name, function in variants.items():
            start = rt.now()
            function()
            times[name].append(rt.now() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def print_rates(title, times, images, baseline=None):
    """Images per second of each variant, of times {name: seconds for `images` images}."""
    print(f"\n{title}")
    for name, seconds in times.items():
        rates = sorted(images / each for each in seconds)
        line = (f"  {name:50s} {statistics.median(rates):9.0f} images/s  "
                f"({rates[0]:.0f} .. {rates[-1]:.0f})")
        if baseline:
            pairs = zip(times[baseline], seconds)
            line += f"  {statistics.median(theirs / own for theirs, own in pairs):6.2f} x"
        print(line, flush=True)


def type_name(rt):
    """The type that the networks train in: bfloat16, float32."""
    return str(rt.amp or torch.float32).removeprefix("torch.")


def matmul_peak(rt, dtype=None):
    """FLOP/s of a large matrix product, the best of 9; dtype: see type_name.

    float32 on a GPU is without TF32, which cuDNN takes for convolutions: they may exceed this.
    """
    n = 8192 if rt.device.type == "cuda" else 2048
    dtype = dtype or rt.amp or torch.float32
    a, b = torch.randn(2, n, n, device=rt.device).to(dtype)

    def product():
        return a @ b
    return 2 * n ** 3 / min(measure({"": product}, 9, rt)[""])


def in_new_process(function, *given):
    """What a function returns in a process of its own, whose memory can be measured."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *given).result()


def forward_flops(net, size, rt):
    """FLOP per image of a forward pass; a training step has three times as many."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.rand(2, 3, size, size, device=rt.device))
    return counter.get_total_flops() / 2


def peak_memory(rt):
    """GiB: of the GPU's tensors; without a GPU, of this process (Linux; elsewhere NaN)."""
    if rt.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if not os.path.exists("/proc/self/status"):
        return float("nan")
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\s*(\d+) kB", file.read())[1]) / 2 ** 20


# ---- Augmentation --------------------------------------------------------------------------------

def timm_pipeline(size, crop):
    """timm's transform of PIL pictures, as DeiT sets it."""
    pipeline = create_transform(size, is_training=True, auto_augment="rand-m9-mstd0.5-inc1",
                                re_prob=0.25, re_mode="pixel", interpolation="bicubic")
    if crop == "padded":
        pipeline.transforms[0] = transforms.RandomCrop(size, padding=size // 8)
    return pipeline


def apply_and_stack(pipeline, pictures):
    """n PIL pictures -> (n,3,S,S)."""
    images = []
    while len(images) < len(pictures):
        try:
            images.append(pipeline(pictures[len(images)]))
        except ValueError:              # timm posterizes to 0 bits, which Pillow 13 refuses: again
            continue
    return torch.stack(images)


def every_batch_of(loader):
    """A function that reads all batches of a DataLoader."""
    def read():
        for _ in loader:
            pass
    return read


def bench_augment(rt, n):
    """Crop, flip, RandAugment and erasing, with random draws of each image's own."""
    images = data_lt.load_shapes(imb=1).train_images                    # uint8 (N,3,32,32)
    compare_augmentation(images[:128], 32, "padded", rt, n)
    compare_augmentation(images[:1024], 32, "padded", rt, n)
    compare_augmentation(images[:32], 224, "resized", rt, n)


def compare_augmentation(images, size, crop, rt, n):
    """augment.py against timm: on one thread, then on all of them; and on the GPU, if there is."""
    batch, threads = len(images), torch.get_num_threads()
    title = f"Augmentation, {size} px, {batch} images at a time"

    def ours():
        augment.strong_augment(images, size, crop)

    def ours_repeatedly():
        for _ in range(4 * threads):
            ours()
    one_thread, all_threads = {"augment.py": ours}, {"augment.py": ours_repeatedly}
    baseline = None
    if timm:
        baseline = "timm on PIL pictures"
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy().copy()) for image in images]
        augment_and_stack = partial(apply_and_stack, timm_pipeline(size, crop))
        one_thread[baseline] = every_batch_of(DataLoader(
            pictures, batch, collate_fn=augment_and_stack))
        all_threads[baseline] = every_batch_of(DataLoader(
            pictures * 4 * threads, batch, collate_fn=augment_and_stack, num_workers=threads,
            persistent_workers=True))
    torch.set_num_threads(1)
    times = measure(one_thread, 3 * n, CPU)
    torch.set_num_threads(threads)
    print_rates(f"{title}, one CPU thread", times, batch, baseline)
    times = measure(all_threads, max(n // 2, 2), CPU)
    print_rates(f"{title}, {threads} CPU threads or worker processes", times, 4 * threads * batch,
                baseline)
    if rt.device.type == "cuda":
        on_gpu = images.repeat(4, 1, 1, 1).to(rt.device)

        def on_the_gpu():
            augment.strong_augment(on_gpu, size, crop)
        times = measure({"augment.py": on_the_gpu}, 3 * n, rt)
        print_rates(f"Augmentation, {size} px, {len(on_gpu)} images at a time, GPU", times,
                    len(on_gpu))


# ---- Image files ---------------------------------------------------------------------------------

def draw_photographs(folder, n):
    """n JPEG files of ImageNet's usual size, 500 x 375 px and 100 kB, in two class folders."""
    rng = np.random.default_rng(0)
    for k in range(2):
        os.makedirs(os.path.join(folder, str(k)))
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.BICUBIC))
        pixels = (pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        path = os.path.join(folder, str(i % 2), f"{i}.jpg")
        Image.fromarray(pixels).save(path, quality=90)


def bench_files(rt, n, drawn=256, images=2048, batch=64):
    """Decode a file, cut a random box to 224 px, mirror it or not."""
    threads = torch.get_num_threads()
    order = torch.arange(images) % drawn                                # which file is read when
    transform = transforms.Compose([
        transforms.RandomResizedCrop(224, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
    with tempfile.TemporaryDirectory() as folder:
        draw_photographs(folder, drawn)
        loader = DataLoader(ImageFolder(folder, transform), batch, sampler=order,
                            num_workers=threads, persistent_workers=True)
        stream = decode.Stream(files.list_folder(folder), 224, rt.device)

        def ours():
            for _ in stream.batches(enumerate(order.split(batch)), key=(0, 0, 0)):
                pass
        baseline = f"ImageFolder, {threads} worker processes"
        times = measure({baseline: every_batch_of(loader),
                         f"images/decode.py, {decode.THREADS} threads": ours}, n, rt)
        print_rates("JPEG files of 500 x 375 px, a random box of each at 224 px", times, images,
                    baseline)


# ---- The student's step --------------------------------------------------------------------------

def network_step(net, x, rt):
    """A function that takes a training step of a two-headed ViT: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)

    def step():
        with rt.autocast():
            cls_logits, dist_logits = net(x)
            loss = cls_logits.logsumexp(1).mean() + dist_logits.logsumexp(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def timm_vit(img_size, patch_size, fused):
    """timm's network of vit_tiny's size, with PyTorch's fused attention or written out."""
    net = VisionTransformerDistilled(img_size=img_size, patch_size=patch_size, num_classes=10,
                                     embed_dim=192, depth=12, num_heads=3)
    net.set_distilled_training(True)
    for block in net.blocks:
        block.attn.fused_attn = fused
    return net


def compare_networks(img_size, patch_size, batch, rt, n):
    """vit.py's step against that of timm's network of the same size."""
    x = torch.rand(batch, 3, img_size, img_size, device=rt.device)
    net = vit.MODELS["tiny"](img_size=img_size, patch_size=patch_size, num_classes=10)
    net.to(rt.device)
    flops = 3 * forward_flops(net, img_size, rt)
    ours, baseline = f"vit.py, {type_name(rt)}", None
    variants = {ours: network_step(net, x, rt)}
    if timm:
        baseline = "timm, float32"
        for name, fused, its_rt in ((baseline, True, Runtime(rt.device)),
                                    (f"timm, {type_name(rt)}", True, rt),
                                    (f"timm, {type_name(rt)}, attention not fused", False, rt)):
            theirs = timm_vit(img_size, patch_size, fused).to(rt.device)
            variants[name] = network_step(theirs, x, its_rt)
    peak, times = matmul_peak(rt), measure(variants, n, rt)
    print_rates(f"ViT 192 x 12 x 3, two tokens, {img_size} px, patch {patch_size}, batch {batch}: "
                "forward, backward, AdamW", times, batch, baseline)
    rate = flops * batch / statistics.median(times[ours])
    print(f"  {ours}: {rate / peak:.0%} of the peak")


def student_step(args, batch, rt, K=10, depth=None):
    """(step(lap), FLOP per image) of train_student.train with a ResNet-32 teacher on random images.

    lap(part), if given, is called at the end of each part. args: settings, resolved. K: number of
    classes. depth: the first so many blocks of the student, None: all.
    """
    net = build_student(vars(args), K, distilled=True).to(rt.device).train()
    net.blocks = net.blocks[:depth]
    teacher = resnet.resnet32(K).eval().requires_grad_(False)
    teacher.to(rt.device, memory_format=torch.channels_last)
    groups = train_student.parameter_groups(net, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    prior = torch.full((K,), 1 / K, device=rt.device)
    scaler = FiniteScaler(net, optimizer, rt, prior)
    ema = EMA(net, args.ema) if args.ema > 0 else None
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, device=rt.device)
    labels = torch.arange(batch, device=rt.device) % K
    flops = 3 * forward_flops(net, args.img_size, rt) + forward_flops(teacher, 32, rt)

    def step(lap=lambda part: None):
        x = train_student.strong_augment(images, args)
        x, target = augment.mixup_cutmix(x, labels, K)
        lap("augment")
        with rt.autocast():
            g = evaluation.teacher_logits(teacher, x)
            y_t = g if args.distill == "soft" else g.argmax(dim=1)
            lap("teacher")
            cls_logits, dist_logits = net(x)
            if args.logit_adjustment:
                cls_logits = cls_logits + train_student.log_prior_of(prior)
                train_student.update_prior(prior, y_t, args.tau, 1, rt)
                dist_logits = dist_logits + args.tau * train_student.log_prior_of(prior)
            loss, *_ = losses.distillation_loss(cls_logits, dist_logits, target, y_t, args.alpha,
                                                tau=args.tau)
        lap("forward")
        scaler.scale(loss).backward()
        lap("backward")
        scaler.unscale_()
        scaler.step(optimizer)
        optimizer.zero_grad()
        finite = scaler.update()
        if ema:
            ema.update(finite)
        lap("optimizer")
    return step, flops


def measure_student(recipe, model, img_size, patch_size, batch, rt, n):
    """A row of the table of whole steps, as text, for in_new_process: it reads its memory."""
    runtime.setup(str(rt.device))                                       # allocator, cuDNN
    args = train_student.parse(["--dataset", "cifar10", "--recipe", recipe, "--model", model,
                                "--img-size", str(img_size), "--patch-size", str(patch_size)])
    train_student.resolve(args, rt)
    step, flops = student_step(args, batch, rt)
    parts = {"augment": [], "teacher": [], "forward": [], "backward": [], "optimizer": []}

    def step_in_parts():
        start = rt.now()

        def lap(part):
            nonlocal start
            now = rt.now()
            parts[part].append(now - start)
            start = now
        step(lap)
    seconds = statistics.median(measure({"": step}, n, rt)[""])
    memory = peak_memory(rt)
    measure({"": step_in_parts}, n, rt)
    medians = [statistics.median(part[1:]) for part in parts.values()]
    shares = "".join(f"{each / sum(medians):10.0%}" for each in medians)
    rate = flops * batch / seconds                                      # FLOP/s
    return (f"  {model:6s}{args.stem:>7s}{img_size:6d}{patch_size:7d}{batch:7d}"
            f"{batch / seconds:10.1f}{rate / matmul_peak(rt):9.0%}{memory:11.2f}{shares}")


def bench_student(rt, n):
    """The network's step against timm's, and DeiT-LT's whole step with its parts."""
    print(f"\nMatrix product: {matmul_peak(rt, torch.float32) / 1e9:.0f} GFLOP/s in float32")
    if rt.amp:                          # else it may be emulated: minutes
        print(f"  {matmul_peak(rt) / 1e9:.0f} in {type_name(rt)}, in which the networks train")
    compare_networks(32, 4, 128, rt, n)
    compare_networks(224, 16, 32, rt, n)

    print("\nDeiT-LT's whole training step with a ResNet-32 teacher, and the share of each part\n"
          "  model    stem    px  patch  batch  images/s  of peak  mem. (GiB)   augment   teacher"
          "   forward  backward optimizer")
    for recipe, model, img_size, patch_size, batch in (
            ("cpu", "mini", 32, 8, 64), ("ours", "mini", 32, 8, 64), ("cpu", "mini", 32, 4, 128),
            ("cpu", "tiny", 32, 4, 128), ("paper", "tiny", 224, 16, 32),
            ("paper", "small", 224, 16, 32), ("paper", "base", 224, 16, 16)):
        if rt.device.type == "cuda":
            batch = 128
        print(in_new_process(measure_student, recipe, model, img_size, patch_size, batch, rt, n),
              flush=True)


# ---- The teacher's step --------------------------------------------------------------------------

def teacher_step(x, rt, rho, memory_format=torch.channels_last):
    """A function that takes a training step of a ResNet-32 on images x (B,3,32,32); rho: of SAM."""
    x = x.contiguous(memory_format=memory_format)
    labels = torch.arange(len(x), device=rt.device) % 10
    net = resnet.resnet32(10).to(rt.device, memory_format=memory_format)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, fused=True)
    sam = SAM(sgd, rho)

    def backward():
        with rt.autocast():
            loss = F.cross_entropy(net(x), labels)
        loss.backward()

    def step():
        backward()
        if rho > 0:
            sam.first_step()
            with frozen_batchnorm_statistics(net):
                backward()
            sam.second_step()
        else:
            sgd.step()
            sgd.zero_grad()
    return step


def bench_teacher(rt, n, batch=128):
    """SAM's two passes against one; channels last and autocast against neither."""
    x = torch.rand(batch, 3, 32, 32, device=rt.device)
    plain, sam = f"channels last, {type_name(rt)}", f"channels last, {type_name(rt)}, SAM"
    baseline = "channels first, float32, SAM"
    variants = {
        baseline: teacher_step(x, Runtime(rt.device), 0.1, torch.contiguous_format),
        sam: teacher_step(x, rt, 0.1),
        plain: teacher_step(x, rt, 0.0),
    }
    flops = 3 * forward_flops(resnet.resnet32(10).to(rt.device), 32, rt)
    peak, times = matmul_peak(rt), measure(variants, n, rt)
    print_rates(f"ResNet-32's training step, 32 px, batch {batch}", times, batch, baseline)
    rate = flops * batch / statistics.median(times[plain])
    ratio = statistics.median(two / one for one, two in zip(times[plain], times[sam]))
    print(f"  {plain}: {rate / peak:.0%} of the peak\n"
          f"  A step with SAM takes {ratio:.2f} times as long as one without")


# ---- How cost grows ------------------------------------------------------------------------------

USUAL = {"batch": 32, "pixels": 32, "blocks": 6, "classes": 10}
GROWTH = {"batch": (8, 32, 128), "pixels": (32, 64, 96), "blocks": (3, 6, 12),
          "classes": (10, 100, 1000, 8142)}


def growth_of_steps(rt, n, growth=GROWTH):
    """The student's step as one of its sizes grows and the others are as USUAL."""
    print(f"\nDeiT-LT's training step, ViT 192 wide, patch 8, ResNet-32 teacher; {USUAL} but for\n"
          "                   images/s  (slowest .. fastest)  GFLOP/image   time/image  FLOP/image")
    for name, values in growth.items():
        steps, flops = {}, {}
        for value in values:
            sizes = USUAL | {name: value}
            args = train_student.parse(["--dataset", "cifar10", "--recipe", "cpu", "--model",
                                        "tiny", "--img-size", str(sizes["pixels"])])
            train_student.resolve(args, rt)
            steps[value], flops[value] = student_step(args, sizes["batch"], rt, sizes["classes"],
                                                      sizes["blocks"])
        first = None
        for value, seconds in measure(steps, n, rt).items():
            images = (USUAL | {name: value})["batch"]
            rates = sorted(images / each for each in seconds)
            rate = statistics.median(rates)
            first = first or rate
            spread = f"({rates[0]:.0f} .. {rates[-1]:.0f})"
            print(f"  {name:8s}{value:7,d}{rate:11.1f}  {spread:24s}{flops[value] / 1e9:9.3f}"
                  f"{first / rate:11.2f} x{flops[value] / flops[values[0]]:10.2f} x", flush=True)


def write_listing(folder, n, with_files):
    """The two lists of iNaturalist 2018's layout, of n images of 1,000 classes; one in ten to test.

    with_files: the files too, a small image and its number, all of one size: as among a million
    photographs, each has others of its size and must be opened to see that it is no copy.
    """
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "JPEG")
    names = [os.path.join(folder, name) for name in datasets.LIST_NAMES["inat18"]]
    with open(names[0], "w") as train, open(names[1], "w") as test:
        for i in range(n):
            k = i // 10 % 1000
            path = f"train_val2018/Aves/{k}/{i:032x}.jpg"
            (train if i % 10 else test).write(f"{path} {k}\n")
            if with_files:
                path = os.path.join(folder, path)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as file:
                    file.write(picture.getvalue() + i.to_bytes(8, "big") + b"\xff\xd9")


def read_lists(folder):
    """The lines of both lists; no file is opened."""
    lists.find_listed(*(os.path.join(folder, name) for name in datasets.LIST_NAMES["inat18"]),
                      folder)


def read_folders(folder):
    """The names in the class folders; no file is opened."""
    files.list_folder(os.path.join(folder, "train_val2018", "Aves"))


def start_run(folder):
    """All that a run does with its files before the first step: lists, copies, sizes, damage.

    As the second process of a run does it, which prints nothing and compares no thumbnails.
    """
    args = train_student.parse(["--dataset", "inat18", "--recipe", "paper", "--data-dir", folder])
    train_student.resolve(args, CPU)
    datasets.load(args, Runtime(CPU.device, rank=1))


READERS = {"lists, no file opened": read_lists, "folders, no file opened": read_folders,
           "a run's start": start_run}


def measure_listing(reader, folder):
    """(seconds, GiB at its peak, GiB before), for in_new_process: a peak only grows."""
    runtime.setup("cpu")                                                # allocator
    before, start = peak_memory(CPU), CPU.now()
    READERS[reader](folder)
    return CPU.now() - start, peak_memory(CPU), before


def growth_of_listing(sizes=(10_000, 100_000, 1_000_000), most=100_000):
    """Time and peak memory of what is done with n file names; `most`: so many files are written."""
    print("\nFile names of iNaturalist 2018's layout; bytes: of each file more than in the size "
          "before\n  reader                       files   seconds   us/file   peak (GiB)   "
          "bytes/file")
    last = {}                           # {reader: (files, GiB)}
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_listing(folder, n, with_files=n <= most)
            for reader in READERS if n <= most else ["lists, no file opened"]:
                seconds, peak, before = in_new_process(measure_listing, reader, folder)
                fewer, lower = last.get(reader, (0, before))
                last[reader] = n, peak
                each = (peak - lower) * 2 ** 30 / (n - fewer)
                print(f"  {reader:24s}{n:10,d}{seconds:10.2f}{seconds / n * 1e6:10.1f}{peak:13.2f}"
                      f"{each:13.0f}", flush=True)


def growth_of_processes(processes=(1, 2), flags=("--epochs", "2")):
    """images/s of a plain ViT on `shapes` in its faster epoch, under torchrun on the CPU."""
    print("\nA plain ViT on shapes under torchrun (gloo), one thread in each process")
    first = None
    for n in processes:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}",
                       "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", train_student.__file__,
                       "--dataset", "shapes", "--method", "vit", "--recipe", "cpu", "--device",
                       "cpu", "--out", folder, *flags]
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
                           stdout=subprocess.DEVNULL)
            # The epochs without an evaluation are the fast ones.
            rate = max(epoch["images_per_second"] for epoch in read_log(folder))
        first = first or rate
        print(f"  {n} process(es){rate:9.0f} images/s{rate / first:9.2f} x", flush=True)


def bench_growth(rt, n):
    """Cost against batch, resolution, depth, classes, files and processes."""
    growth_of_steps(rt, n)
    growth_of_listing()
    growth_of_processes()


SECTIONS = {"augment": bench_augment, "files": bench_files, "student": bench_student,
            "teacher": bench_teacher, "growth": bench_growth}


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "none"))
    options = parser.parse_args()
    rt = runtime.setup(options.device, options.amp)
    about_timm = f"timm {timm.__version__}" if timm else "without timm"
    print(f"torch {torch.__version__}, {about_timm}, on {rt.hardware()}")
    for name in [options.only] if options.only else SECTIONS:
        SECTIONS[name](rt, options.rounds)


if __name__ == "__main__":
    runtime.run_main(main)
