r"""How fast is it here? Every figure is measured now, on this machine, side by side with what it is compared to.

    python bench.py                      all of it: about ten minutes on four CPU threads
    python bench.py --only augment       images/s of the augmentation, against the pipelines that users have
    python bench.py --only files         images/s read from JPEG files, against ImageFolder in a DataLoader
    python bench.py --only student       the training step: parts, share of the machine's peak, memory; against timm's ViT
    python bench.py --only teacher       ResNet-32 with and without SAM and PaCo, against float32 in the usual layout
    python bench.py --only scaling       batch, resolution, depth and processes, against ideal

timm's pipeline and network are measured where timm is installed (`pip install timm`); nothing else here needs it.

Quote ratios from one run, not single numbers: machines are shared and noisy. Each comparison calls its variants in turn, round
after round, and reports the median round with the slowest and fastest in brackets. A share of the peak is relative to the best
matrix product (2048 x 2048) of the same minute in the type that the networks train in.
"""
import argparse
import os
import socket
import statistics
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms
from torchvision.transforms import v2

import augment
import data_lt
import engine
import image_files
import networks
import resnet
import train_student
import vit
from losses import PaCo, PaCoLoss, distillation_loss
from sam import SAM, frozen_batchnorm_statistics

try:
    import timm
    import timm.data
    from timm.models.deit import VisionTransformerDistilled
except ImportError:
    timm = None


# ---- Measuring -----------------------------------------------------------------------------------------------------------

def wait(rt):
    if rt.device.type == "cuda":
        torch.cuda.synchronize()


def rounds(variants, n, rt):
    """{name: function} -> {name: seconds of each of n calls}; one round calls every variant once, the first is not counted."""
    times = {name: [] for name in variants}
    for _ in range(n + 1):
        for name, function in variants.items():
            wait(rt)
            start = time.perf_counter()
            function()
            wait(rt)
            times[name].append(time.perf_counter() - start)
    return {name: t[1:] for name, t in times.items()}


def print_rates(title, times, images, baseline=None):
    """images/s of every variant, and its ratio to the baseline: the median over rounds of the two in the same round."""
    print(f"\n{title}")
    for name, t in times.items():
        ratio = statistics.median(b / a for a, b in zip(t, times[baseline])) if baseline else 0
        print(f"  {name:58s} {images / statistics.median(t):9.0f} images/s  ({images / max(t):.0f} .. {images / min(t):.0f})"
              + (f"   {ratio:5.2f} x" if baseline else ""), flush=True)


def matmul_peak(rt, dtype=None):
    """FLOP/s of a large matrix product in dtype, by default the one the networks train in, the best of 9."""
    n = 8192 if rt.device.type == "cuda" else 2048                        # a smaller one is over before a GPU is at full speed
    a, b = (torch.randn(n, n, device=rt.device, dtype=dtype or rt.amp or torch.float32) for _ in range(2))
    return 2 * n ** 3 / min(rounds({"": lambda: a @ b}, 9, rt)[""])


def forward_flops(net, x):
    """Floating point operations per image of a forward pass (a training step has three times as many)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x[:2])
    return counter.get_total_flops() / 2


class PeakMemory:
    """`with PeakMemory(rt) as peak: ...`, then peak.gib: of the GPU's tensors; without a GPU, of the whole process (Linux)."""

    def __init__(self, rt):
        self.rt, self.gib = rt, float("nan")

    def __enter__(self):
        if self.rt.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif os.path.exists("/proc/self/clear_refs"):
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")                                              # "the peak is what is in use now"
        return self

    def __exit__(self, *_):
        if self.rt.device.type == "cuda":
            self.gib = torch.cuda.max_memory_allocated() / 2 ** 30
        elif os.path.exists("/proc/self/status"):
            with open("/proc/self/status") as f:
                self.gib = next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2 ** 20


# ---- Augmentation --------------------------------------------------------------------------------------------------------

def pil_pipeline(size, crop):
    """What users have for PIL pictures: timm's transforms as DeiT sets them, or torchvision's without timm.

    torchvision's RandAugment always applies its operations, DeiT's each with probability 1/2: so it gets one, not two.
    """
    if timm:
        pipeline = timm.data.create_transform(size, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25,
                                              re_mode="pixel", re_count=1, interpolation="bicubic")
        if crop == "padded":
            pipeline.transforms[0] = transforms.RandomCrop(size, padding=size // 8)
        return "timm on PIL pictures, one by one", pipeline
    first = (transforms.RandomCrop(size, padding=size // 8) if crop == "padded" else
             transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BICUBIC))
    return "torchvision on PIL pictures, one by one", transforms.Compose([
        first, transforms.RandomHorizontalFlip(), transforms.RandAugment(1, 9), transforms.ToTensor(),
        transforms.RandomErasing(0.25, value="random")])


def batch_pipeline(size, crop):
    """torchvision's v2 transforms on a batch of tensors: fast at 32 px, but all images get the same draw."""
    first = v2.RandomCrop(size, padding=size // 8) if crop == "padded" else v2.RandomResizedCrop(
        size, interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([first, v2.RandomHorizontalFlip(), v2.RandAugment(1, 9), v2.ToDtype(torch.float32, scale=True),
                       v2.RandomErasing(0.25, value="random")])


class Pictures(torch.utils.data.Dataset):
    """PIL pictures through a pipeline, for a DataLoader and its worker processes."""

    def __init__(self, pictures, pipeline, length):
        self.pictures, self.pipeline, self.length = pictures, pipeline, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        while True:
            try:
                return self.pipeline(self.pictures[i % len(self.pictures)])
            except ValueError:                                            # timm asks for 0 bits, which Pillow 13 refuses
                continue


def bench_augment(rt, n):
    images = data_lt.load_data("shapes", 1, "exp", "").train_images       # uint8 (N,3,32,32)
    threads = torch.get_num_threads()
    for size, crop, batch in ((32, "padded", 128), (32, "padded", 1024), (224, "resized", 32)):
        x, name_and_pipeline = images[:batch], pil_pipeline(size, crop)
        pictures = [Image.fromarray(np.ascontiguousarray(i.permute(1, 2, 0).numpy())) for i in x]
        one_by_one = Pictures(pictures, name_and_pipeline[1], batch)
        together = batch_pipeline(size, crop)
        variants = {
            name_and_pipeline[0]: lambda: torch.stack([one_by_one[i] for i in range(batch)]),
            "torchvision v2, one draw for the whole batch": lambda: together(x),
            "augment.py, a draw per image": lambda: augment.strong_augment(x, size, crop),
        }
        torch.set_num_threads(1)
        times = rounds(variants, 3 * n, engine.Runtime(torch.device("cpu")))
        torch.set_num_threads(threads)
        print_rates(f"Augmentation, {size} px, {batch} images at a time, one CPU thread: crop, flip, RandAugment, erasing",
                    times, batch, baseline=name_and_pipeline[0])
        if batch != 128:
            compare_all_cores(x, size, crop, one_by_one, name_and_pipeline[0], threads, n)
        if rt.device.type == "cuda":
            on_gpu = x.repeat(4, 1, 1, 1).to(rt.device)
            times = rounds({"augment.py": lambda: augment.strong_augment(on_gpu, size, crop)}, 3 * n, rt)
            print_rates(f"Augmentation, {size} px, {len(on_gpu)} images at a time, on the GPU", times, len(on_gpu))


def compare_all_cores(x, size, crop, one_by_one, name, threads, n):
    """The pipeline of PIL pictures in worker processes, one per thread, against augment.py on that many threads."""
    one_by_one.length = len(x) * threads * 4
    loader = torch.utils.data.DataLoader(one_by_one, len(x), num_workers=threads, persistent_workers=True)

    def epoch():
        for _ in loader:
            pass

    def ours():
        for _ in range(one_by_one.length // len(x)):
            augment.strong_augment(x, size, crop)
    times = rounds({f"{name}, in {threads} worker processes": epoch, f"augment.py on {threads} threads": ours}, max(n // 2, 2),
                   engine.Runtime(torch.device("cpu")))
    print_rates(f"The same on all cores, {size} px, {len(x)} images at a time", times, one_by_one.length,
                baseline=f"{name}, in {threads} worker processes")


# ---- Image files ---------------------------------------------------------------------------------------------------------

def draw_photographs(folder, n):
    """n JPEG files of ImageNet's usual size, 500 x 375 px and some 100 kB, in two class folders."""
    rng = np.random.default_rng(0)
    for k in range(2):
        os.makedirs(os.path.join(folder, str(k)))
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((500, 375), Image.BICUBIC)) + rng.normal(0, 8, (375, 500, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(os.path.join(folder, str(i % 2), f"{i}.jpg"), quality=90)


def bench_files(rt, n, images=2048, batch=64):
    """Decode, cut a random box to 224 px and mirror: ImageFolder in DataLoader's worker processes, and image_files.Stream."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        draw_photographs(folder, 256)
        crop = transforms.RandomResizedCrop(224, interpolation=transforms.InterpolationMode.BICUBIC)
        cropped = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
        kinds = {"torchvision's ImageFolder and transforms": cropped}
        if timm:
            kinds["ImageFolder and timm's transform"] = timm.data.create_transform(224, is_training=True, color_jitter=None,
                                                                                   interpolation="bicubic")
        loaders = {f"{name}, {threads} worker processes": torch.utils.data.DataLoader(
            datasets.ImageFolder(folder, transform), batch, num_workers=threads, persistent_workers=True,
            sampler=torch.arange(images) % 256) for name, transform in kinds.items()}
        files = image_files.list_folder(folder)
        stream = image_files.Stream(files, 224, rt.device)

        def ours():
            steps = enumerate((torch.arange(images) % 256).split(batch))
            for _ in stream.batches(steps, (0, 0, 0)):
                pass
        variants = {name: lambda loader=loader: [None for _ in loader] for name, loader in loaders.items()}
        variants[f"image_files.Stream, {image_files.THREADS} threads"] = ours
        times = rounds(variants, n, rt)
        print_rates("JPEG files of 500 x 375 px, a random box of each at 224 px", times, images, baseline=next(iter(variants)))
        many = image_files.Files(np.tile(files.paths, 80), np.tile(files.labels, 80), files.class_names)
        times = rounds({"look at files (beginning and end)": lambda: image_files.check(many)}, n, rt)
        print_rates(f"{len(many):,} files", times, len(many))


# ---- The student's step --------------------------------------------------------------------------------------------------

def settings(model, img_size, patch_size, recipe):
    """The resolved settings of train_student.py for a network."""
    args = train_student.parse(["--dataset", "cifar10", "--recipe", recipe, "--model", model, "--img-size", str(img_size),
                                "--patch-size", str(patch_size)])
    engine.resolve_recipe(args, train_student.RECIPES, None)
    return args


def student_row(model, img_size, patch_size, batch, recipe, device, amp, threads, n):
    """A whole training step, part by part (in a process of its own, for its memory): prints a row of the table."""
    rt = engine.setup(device, amp)
    torch.set_num_threads(threads)
    args = settings(model, img_size, patch_size, recipe)
    teacher = resnet.resnet32(10).eval().requires_grad_(False).to(rt.device, memory_format=torch.channels_last)
    net = networks.build_student(vars(args), 10, True).to(rt.device).train()
    optimizer = torch.optim.AdamW(train_student.parameter_groups(net, args.weight_decay), lr=1e-4, fused=True)
    ema = engine.EMA(net, args.ema) if args.ema else None
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, device=rt.device)
    labels = torch.arange(batch, device=rt.device) % 10
    flops = 3 * forward_flops(net, torch.rand(2, 3, img_size, img_size, device=rt.device))
    flops += forward_flops(teacher, torch.rand(2, 3, 32, 32, device=rt.device))
    laps = {"augment": [], "teacher": [], "forward": [], "backward": [], "optimizer": []}

    def step(lap):
        x = train_student.strong_augment(images, args)
        x, target = augment.mixup_cutmix(x, labels, 10)
        lap("augment")
        with rt.autocast():
            y_t = train_student.teacher_says(teacher, x, images, args)
            lap("teacher")
            loss, *_ = distillation_loss(*net(x), target, y_t, args.alpha, tau=args.tau)
        lap("forward")
        loss.backward()
        lap("backward")
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.update(net)
        lap("optimizer")

    def timed_step():
        wait(rt)
        last = time.perf_counter()

        def lap(name):
            nonlocal last
            wait(rt)
            laps[name].append(time.perf_counter() - last)
            last = time.perf_counter()
        step(lap)
    with PeakMemory(rt) as peak_memory:
        seconds = statistics.median(rounds({"": lambda: step(lambda name: None)}, n, rt)[""])
    for _ in range(n):
        timed_step()
    parts = {name: statistics.median(t) for name, t in laps.items()}
    peak, rate = matmul_peak(rt), flops * batch / seconds
    shares = "  ".join(f"{part / sum(parts.values()):8.0%}" for part in parts.values())
    print(f"  {model:6s} {args.stem:6s} {img_size:4d} {patch_size:5d} {batch:6d} {batch / seconds:10.1f} {rate / 1e9:8.0f} "
          f"{rate / peak:7.0%} {peak_memory.gib:9.2f}  {shares}", flush=True)


def in_its_own_process(function, *args):
    """Run function(*args) in a new process: memory is counted from nothing, and one measurement cannot disturb the next."""
    process = torch.multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__}{args} failed")


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


def timms_vit(img_size, patch_size, fused):
    net = VisionTransformerDistilled(img_size=img_size, patch_size=patch_size, num_classes=10, embed_dim=192, depth=12,
                                     num_heads=3)
    net.set_distilled_training(True)
    for block in net.blocks:
        block.attn.fused_attn = fused
    return net


def compare_networks(img_size, patch_size, batch, rt, n):
    """vit.py against timm's network of the same size, each in float32 and with autocast."""
    x = torch.rand(batch, 3, img_size, img_size, device=rt.device)
    float32, best = engine.Runtime(rt.device), str(rt.amp or torch.float32)[6:]
    ours = vit.vit_tiny(img_size=img_size, patch_size=patch_size, num_classes=10).to(rt.device)
    variants, flops = {f"vit.py, {best}": network_step(ours, x, rt)}, 3 * forward_flops(ours, x)
    if timm:
        for name, fused, runtime in (("float32", True, float32), (f"{best} autocast", True, rt),
                                     (f"{best} autocast, attention not fused", False, rt)):
            variants[f"timm, {name}"] = network_step(timms_vit(img_size, patch_size, fused).to(rt.device), x, runtime)
    peak, times = matmul_peak(rt), rounds(variants, n, rt)
    title = f"ViT 192 x 12 x 3, two tokens, {img_size} px, patch {patch_size}, batch {batch}: forward, backward, AdamW"
    print_rates(title, times, batch, baseline="timm, float32" if timm else None)
    for name, t in times.items():
        print(f"  {name:58s} {flops * batch / statistics.median(t) / peak:9.0%} of the peak, counting what vit.py computes")


def bench_student(rt, n):
    float32, bfloat16 = (matmul_peak(rt, dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16))
    print(f"\nMatrix product: {float32:.0f} GFLOP/s in float32, {bfloat16:.0f} in bfloat16; the networks train in "
          f"{str(rt.amp or torch.float32)[6:]}")
    for img_size, patch_size, batch in ((32, 4, 128), (224, 16, 32)):
        compare_networks(img_size, patch_size, batch, rt, n)
    print("\nThe whole training step of DeiT-LT with a ResNet-32 teacher, and what share of it each part takes (augment: with "
          "mixing; optimizer: with EMA at 224 px)\n  model  stem     px patch  batch   images/s  GFLOP/s of peak  mem. GiB   "
          "augment   teacher   forward  backward  optimizer")
    gpu = rt.device.type == "cuda"
    for model, img_size, patch_size, batch, recipe in (
            ("mini", 32, 8, 64, "cpu"), ("mini", 32, 8, 64, "best"), ("mini", 32, 4, 128, "cpu"), ("tiny", 32, 4, 128, "cpu"),
            ("tiny", 224, 16, 32, "paper"), ("small", 224, 16, 32, "paper"), ("base", 224, 16, 16, "paper")):
        batch = 128 if gpu else batch
        in_its_own_process(student_row, model, img_size, patch_size, batch, recipe, str(rt.device),
                           "bf16" if rt.amp else "none", torch.get_num_threads(), n)
    net = vit.vit_tiny(img_size=32, patch_size=4, num_classes=10).to(rt.device).eval()
    images = torch.randint(0, 256, (10_000, 3, 32, 32), dtype=torch.uint8, device=rt.device)
    labels, groups = torch.arange(10_000, device=rt.device) % 10, {"head": [0, 1, 2], "mid": [3, 4, 5, 6], "tail": [7, 8, 9]}
    start = time.perf_counter()
    engine.evaluate(lambda x: train_student.heads(net, x), images, labels, groups, rt)
    print(f"  Evaluating tiny (32 px, patch 4) on 10,000 images takes {time.perf_counter() - start:.1f} s")


# ---- The teacher's step --------------------------------------------------------------------------------------------------

def teacher_step(x, rt, paco=False, use_sam=False, memory_format=torch.channels_last):
    """A function that takes one training step of a ResNet-32 teacher on images x (B,3,32,32)."""
    x, labels = x.contiguous(memory_format=memory_format), torch.arange(len(x), device=rt.device) % 10
    net = resnet.resnet32(10).to(rt.device, memory_format=memory_format)
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


def bench_teacher(rt, n):
    x, as_usual, float32 = torch.rand(128, 3, 32, 32, device=rt.device), torch.contiguous_format, engine.Runtime(rt.device)
    one_pass = 3 * forward_flops(resnet.resnet32(10), x.cpu())
    steps = {"ResNet-32, float32, usual layout, SAM": (teacher_step(x, float32, use_sam=True, memory_format=as_usual), 2)}
    for paco in (False, True):
        for use_sam in (False, True):
            name = f"ResNet-32{' with PaCo' * paco}{', SAM' * use_sam}"
            steps[name] = teacher_step(x, rt, paco, use_sam), 1 + use_sam + paco / 3                  # keys: a forward pass
    peak, times = matmul_peak(rt), rounds({name: step for name, (step, _) in steps.items()}, n, rt)
    print_rates("Training step of the teacher, 32 px, batch 128", times, 128, baseline="ResNet-32, float32, usual layout, SAM")
    for name, t in times.items():
        rate = steps[name][1] * one_pass * 128 / statistics.median(t)
        print(f"  {name:58s} {rate / peak:9.0%} of the peak")
    for name in ("ResNet-32", "ResNet-32 with PaCo"):
        ratio = statistics.median(b / a for a, b in zip(times[name], times[f"{name}, SAM"]))
        print(f"  {name}: a step with SAM takes {ratio:.2f} times as long as one without")


# ---- Scaling -------------------------------------------------------------------------------------------------------------

def bench_scaling(rt, n):
    """The network's step for growing batch, resolution and depth; ideal is the same FLOP/s in all rows."""
    rows = {"batch": [dict(batch=b) for b in (8, 32, 128, 512)], "resolution": [dict(px=p) for p in (16, 32, 64, 96)],
            "depth": [dict(depth=d) for d in (3, 6, 12, 24)]}
    for what, variants in rows.items():
        steps, work = {}, {}
        for row in variants:
            setting = dict(batch=64, px=32, depth=12) | row
            net = vit.vit_tiny(img_size=setting["px"], patch_size=4, num_classes=10, depth=setting["depth"]).to(rt.device)
            x = torch.rand(setting["batch"], 3, setting["px"], setting["px"], device=rt.device)
            name = f"{what} {row.popitem()[1]}"
            steps[name], work[name] = network_step(net, x, rt), 3 * forward_flops(net, x) * len(x)
        times = {name: statistics.median(t) for name, t in rounds(steps, max(n // 2, 2), rt).items()}
        best = max(work[name] / times[name] for name in times)
        print(f"\nScaling with {what} (ViT 192 wide, patch 4; otherwise batch 64, 32 px, depth 12)")
        for name, seconds in times.items():
            rate = work[name] / seconds
            print(f"  {name:16s} {seconds * 1e3:9.1f} ms {work[name] / 1e9:9.1f} GFLOP {rate / 1e9:9.0f} GFLOP/s "
                  f"{rate / best:6.0%} of the best row", flush=True)
    if rt.device.type == "cpu":
        threads = torch.get_num_threads()
        print(f"\nScaling with processes (ViT 192 x 12 x 3, 32 px, patch 4; in all 128 images a step and {threads} threads)")
        for world in (1, 2):
            if threads >= world:
                with socket.socket() as s:
                    s.bind(("localhost", 0))
                    port = s.getsockname()[1]
                torch.multiprocessing.spawn(process_step, (world, threads // world, port, n), nprocs=world)


def process_step(rank, world, threads, port, n):
    """One of `world` processes that take the same training steps together."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))
    rt = engine.setup("cpu")
    torch.set_num_threads(threads)
    net = engine.trainable(vit.vit_tiny(img_size=32, patch_size=4, num_classes=10), rt)
    step = network_step(net, torch.rand(128 // world, 3, 32, 32), rt)
    seconds = statistics.median(rounds({"": step}, n, rt)[""])
    rt.print(f"  {world} process{'es' * (world > 1)} of {threads} threads: {128 / seconds:.0f} images/s")
    if world > 1:
        torch.distributed.destroy_process_group()
        engine.leave()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"augment": bench_augment, "files": bench_files, "student": bench_student, "teacher": bench_teacher,
                "scaling": bench_scaling}
    parser.add_argument("--only", choices=sections)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="auto", choices=["auto", "bf16", "none"])
    options = parser.parse_args()
    rt = engine.setup(options.device, options.amp)
    print(f"torch {torch.__version__}{f', timm {timm.__version__}' if timm else ', without timm'}, on {rt.hardware()}")
    for name in [options.only] if options.only else sections:
        sections[name](rt, options.rounds)


if __name__ == "__main__":
    engine.run_main(main)
