r"""The paper's figures: each function draws one and gives its numbers. analyze.py loads what they look at and writes the files.

    attention   where CLS and DIST look                        Figures 1a, 5         of students
    distance    how far the heads look                         Figure 4b             of students
    rank        how many directions the features fill          Figures 1b, 4c        of students
    entropy     how sure a teacher is, and how often right     Figure 3, Table 1     of teachers
    sharpness   how fast the loss rises around the weights     Section 3.2           of teachers
    diversity   how CLS and DIST part                          Figure 4a             of logs of students with both
    imbalance   tail accuracy against the imbalance            Figure 1c             of results
    curves      the course of a training                       (ours)                of logs
    augmented   what a student trains on                       Figure 2              of one student

All take (subjects, options, rt): Subjects or Logs, analyze.py's flags, where to compute. What is measured is in quantities.py.
Paper: DeiT-LT, Rangwani et al., CVPR 2024, arXiv 2404.02900.
"""
import argparse
import json
import os
import textwrap
from dataclasses import dataclass
from io import BytesIO

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

matplotlib.use("Agg")  # draw to files, also without a display
import matplotlib.pyplot as plt

import augment
import data_lt
import engine
import run_folder
import quantities
import train_student
import train_teacher

# Okabe and Ito's colour-blind safe palette.
COLORS = {"cls": "#0072B2", "dist": "#D55E00", "avg": "#000000", "ema": "#009E73",
          "overall": "#000000", "head": "#56B4E9", "mid": "#009E73", "tail": "#E69F00",
          "clean": "#0072B2", "strong": "#E69F00", "mixed": "#D55E00"}
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TOKENS = {"cls": "CLS", "dist": "DIST"}
NAMES = TOKENS | {"avg": "average"}


# ---- What is looked at -------------------------------------------------------------------------------------------------

@dataclass
class Log:
    """One of the runs in a picture, of which only what its folder says is read. label: for a legend; empty if it is alone."""
    label: str
    path: str

    @property
    def name(self):
        """What it is called in tables."""
        return self.label or train_teacher.name_of(self.path)

    @property
    def source(self):
        return f"{self.label}: {train_teacher.name_of(self.path)}".removeprefix(": ")

    @property
    def on(self):
        config, finished = read_json(self.path, "config.json"), os.path.exists(os.path.join(self.path, "result.json"))
        dataset = (read_json(self.path, "result.json") if finished else config)["dataset"]            # "CIFAR-10 (JPEG copy)"
        return f"{dataset} (imb {max(config['counts']) / min(config['counts']):.4g}, {sum(config['counts']):,} images)"


@dataclass
class Subject(Log):
    """One of the networks in a picture, its settings and its data."""
    net: nn.Module
    args: argparse.Namespace
    data: data_lt.LongTailData

    @property
    def on(self):
        return engine.describe(self.data, self.args)


def read_json(folder, name):
    try:
        with open(os.path.join(folder, name)) as f:
            return json.load(f, object_hook=run_folder.nan_for_null)
    except (FileNotFoundError, NotADirectoryError):
        raise engine.UserError(f"{folder} has no {name}: it is no run folder, or its run is not finished; continue it with "
                               "--resume") from None


def read_log(folder):
    """The epochs of a run, a dict each. Raises UserError if there are none."""
    try:
        with open(os.path.join(folder, "log.jsonl")) as f:
            log = [json.loads(line, object_hook=run_folder.nan_for_null) for line in f]
    except (FileNotFoundError, NotADirectoryError):
        log = []
    if not log:
        raise engine.UserError(f"{folder} has no log.jsonl with an epoch in it: name the folder of a run")
    return log


def examples(data, classes, n, seed=0):
    """Numbers of n test images of the given classes, the classes in turn, drawn with a seed of their own."""
    rng = np.random.RandomState(seed)
    labels = data.test_labels.cpu().numpy()
    return torch.tensor([rng.choice(np.where(labels == classes[i % len(classes)])[0]) for i in range(n)])


def of_classes(labels, classes, n):
    """Numbers of (up to) n images of the given classes, spread evenly over them: LongTensor on the CPU."""
    found = torch.isin(labels.cpu(), torch.tensor(classes)).nonzero()[:, 0]
    return found[torch.linspace(0, len(found) - 1, min(n, len(found))).long()]


def rare_classes(data):
    """The tail classes that have test images, or what comes nearest in data that has none."""
    tested = set(data.test_labels.tolist())
    return next(classes for name in ("tail", "mid", "head") if (classes := [k for k in data.groups[name] if k in tested]))


def wanted_classes(options, data):
    """--classes, by default the rare ones. Raises UserError for a class that is not there."""
    if not options.classes:
        return rare_classes(data)
    unknown = [name for name in options.classes if name not in data.class_names]
    if unknown:
        raise engine.UserError(f"--classes: there is no {unknown[0]}; the classes are {', '.join(data.class_names[:20])}")
    classes = [data.class_names.index(name) for name in options.classes]
    if untested := [data.class_names[k] for k in classes if k not in set(data.test_labels.tolist())]:
        raise engine.UserError(f"--classes: {untested[0]} has no test image")
    return classes


def classes_text(options):
    return ", ".join(options.classes) if options.classes else "the tail classes"


def measured(options, subject, n):
    """Numbers of the test images of the wanted classes to measure on, by default n."""
    return of_classes(subject.data.test_labels, wanted_classes(options, subject.data), how_many(options, subject, n))


def how_many(options, subject, n):
    """--images, by default n; a sixth of that for a network of large images, which then takes a minute or two on a CPU too."""
    return options.images or (n if subject.net.img_size <= 64 else n // 6)


def student_images(subject, index):
    """Test images by their numbers, as the student is tested on them."""
    images = subject.data.test_images[index.to(subject.data.test_images.device)]
    return train_student.test_images(augment.to_float(images), subject.args)


def batches(subject, index, size=25):
    """The same in small batches, since attention maps of all blocks are large."""
    return (student_images(subject, part) for part in index.split(size))


# ---- What an analysis gives ----------------------------------------------------------------------------------------------

@dataclass
class Analysis:
    """figure, the table to print (rows: dicts), all its numbers (rows: CSV; a dict: JSON) and how to read it."""
    figure: plt.Figure
    table: list
    numbers: object
    note: str


def finish(figure, title, subjects, note):
    """Title on top; below, how to read the figure and which checkpoints and data it came from."""
    width = int(17 * figure.get_size_inches()[0])                         # characters of the small type in a line
    few = len(subjects) < 7
    names = " · ".join(s.source for s in subjects) if few else f"{len(subjects)} runs, named in the table of numbers"
    data = "; ".join(dict.fromkeys(s.on for s in subjects))
    lines = [line for text in (note, names, data) for line in textwrap.wrap(text, width)]
    figure.suptitle(title, fontsize=12)
    bottom = -0.01
    for legend in figure.legends:                                         # what shared_legend has hung below the figure
        figure.draw_without_rendering()
        bottom -= legend.get_window_extent().height / figure.bbox.height
    figure.text(0.5, bottom, "\n".join(lines), ha="center", va="top", fontsize=8, color="#444444", linespacing=1.35)


def as_png(figure):
    """The figure as a PNG file's bytes; it is closed."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", pad_inches=0.12)
    plt.close(figure)
    return buffer.getvalue()


def without_words(figure):
    """The figure without its title and the lines below it, for a page that has them."""
    figure.suptitle("")
    for text in figure.texts[1:]:
        text.remove()
    return figure


def tidy(axis, xlabel, ylabel, title=""):
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)


def shared_legend(figure, axis, columns=2):
    """One legend for all panels, below the figure."""
    figure.legend(*axis.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns, frameon=False,
                  fontsize=9)


def color_of(i):
    return RUN_COLORS[i % len(RUN_COLORS)]


# ---- Attention -----------------------------------------------------------------------------------------------------------

def show(axis, image, title=""):
    axis.imshow(image.permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def show_map(axis, image, heat):
    """An image in gray under a heat map (G,G), scaled to its own range."""
    size = image.shape[-1]
    axis.imshow(image.mean(dim=0).cpu().numpy(), cmap="gray", vmin=-0.3, vmax=1.3)
    edges = (-0.5, size - 0.5, size - 0.5, -0.5)                          # lay the G x G map over the whole image
    axis.imshow(heat.cpu().numpy(), cmap="inferno", alpha=0.6, interpolation="bilinear", extent=edges)
    axis.set_xticks([])
    axis.set_yticks([])


def row_label(axis, text):
    axis.set_ylabel(textwrap.fill(text, 13, break_long_words=False), fontsize=8, rotation=0, ha="right", va="center")


def draw_attention(axes, subject, index, image_row=True):
    """Rows of axes: the images (if image_row), then one row per token with its rollout. Titles: class, and predictions."""
    data, images = subject.data, student_images(subject, index)
    truth, axes = data.test_labels.cpu()[index].tolist(), list(axes)
    if image_row:
        row = axes.pop(0)
        for column, image in enumerate(images):
            show(row[column], image, data.class_names[truth[column]])
        row_label(row[0], "image")
    with torch.no_grad():
        predictions = {k: v.argmax(dim=1).tolist() for k, v in train_student.heads(subject.net, images).items()}
    for row, (token, maps) in zip(axes, quantities.token_maps(subject.net, images).items()):
        for axis, image, heat, predicted, true in zip(row, images, maps, predictions[token], truth):
            show_map(axis, image, heat)
            weight, color = ("bold", "black") if predicted == true else ("normal", "#777777")
            axis.set_title(data.class_names[predicted], fontsize=8, fontweight=weight, color=color)
        row_label(row[0], f"{subject.label} {NAMES[token]}".strip())


@torch.no_grad()
def measure_maps(subject, images, share=0.25):
    """Of a batch of images, for each leading token: its map's numbers, {token: {column: (B,)}}."""
    maps = quantities.token_maps(subject.net, images)

    def sure(x):
        return {k: v.softmax(dim=1) for k, v in train_student.heads(subject.net, x).items()}              # (B,K) each
    clean, random = sure(images), sure(quantities.cover(images, torch.rand_like(maps["cls"]), share))
    out = {}
    for token, heat in maps.items():
        p, predicted = clean[token].max(dim=1)
        left = {"marked": sure(quantities.cover(images, heat, share)), "random": random}
        out[token] = {"predicted": predicted, "patches": quantities.effective_patches(heat),
                      "like CLS": F.cosine_similarity(heat.flatten(1), maps["cls"].flatten(1), dim=1),
                      **{name: p - q[token].gather(1, predicted[:, None])[:, 0] for name, q in left.items()}}
    return out


def attention(subjects, options, rt):
    """Attention rollout of CLS and DIST on test images of the tail (Figures 1a and 5), several networks below each other.

    quantities.attention_rollout. The paper shows single images; the table measures --images (default 300) of these classes:
    on how many patches a map lies (effective_patches), how alike the two tokens' maps are (cosine), and how much of its
    probability a token's prediction loses when the quarter of the patches that its map marks most is covered, or, to compare,
    a random quarter (quantities.cover).
    """
    first = subjects[0].data
    if any(s.data.class_names != first.class_names or len(s.data.test_labels) != len(first.test_labels) for s in subjects):
        raise engine.UserError("attention shows the same test images to all networks: name runs on the same data set")
    n, chosen = options.columns, options.index
    if chosen and not 0 <= min(chosen) <= max(chosen) < len(first.test_labels):
        raise engine.UserError(f"--index: test images are numbered from 0 to {len(first.test_labels) - 1}")
    classes = wanted_classes(options, first)
    index = torch.tensor(chosen) if chosen else examples(first, classes, n, options.seed)
    rows = 1 + sum(s.net.num_tokens for s in subjects)
    size = (max(6, 1.2 * len(index) + 1), 1.38 * rows)
    figure, axes = plt.subplots(rows, len(index), squeeze=False, figsize=size, layout="constrained")
    table, at = [], 0
    for i, s in enumerate(subjects):
        used = s.net.num_tokens + (i == 0)
        draw_attention(axes[at:at + used], s, index, image_row=i == 0)
        at += used
        table += attention_table(s, options)
    spread = ", ".join(f"{row['run'] + ' ' if len(subjects) > 1 else ''}{row['token']} {row['patches']}" for row in table)
    note = ("Attention rollout of each token, every map scaled to its own range (bright: most). Above each map what that token "
            f"predicts, bold when right. Patches that a map spreads over, of {table[0]['of']}, in the mean: {spread}.")
    what = f"test images {', '.join(map(str, chosen))}" if chosen else f"test images of {classes_text(options)}"
    finish(figure, f"Where the tokens look: {what}", subjects, note)
    return Analysis(figure, table, table, note + " Drop: the points of probability that the token's own prediction loses when "
                    "the quarter of the patches that the map marks most, or a random quarter, is covered.")


def attention_table(subject, options):
    torch.manual_seed(options.seed)                                       # of the patches covered at random
    index = measured(options, subject, 300)
    seen = [measure_maps(subject, images) for images in batches(subject, index)]
    truth, table = subject.data.test_labels.cpu()[index], []
    for token in seen[0]:
        of = {key: torch.cat([s[token][key] for s in seen]).cpu() for key in seen[0][token]}
        mean = {key: float(values.double().mean()) for key, values in of.items()}
        table.append({"run": subject.name, "token": NAMES[token], "images": len(index),
                      "right %": round(100 * float((of["predicted"] == truth).double().mean()), 1),
                      "patches": round(mean["patches"], 2), "of": (subject.net.img_size // subject.net.patch_size) ** 2,
                      "like CLS": round(mean["like CLS"], 3), "drop, marked": round(100 * mean["marked"], 1) + 0.0,
                      "drop, random": round(100 * mean["random"], 1) + 0.0})
    return table


@torch.no_grad()
def distance(subjects, options, rt):
    """Mean attention distance of every head in every block, on test images of the tail (Figure 4b, supplement F).

    quantities.attention_distance, in pixels of the network's own input, over --images (default 300). The dotted line: heads
    that look everywhere alike. The paper's claim: DeiT-LT's early blocks have local heads, a plain ViT's look far.
    """
    rows, table = [], []
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for i, s in enumerate(subjects):
        G, P = s.net.img_size // s.net.patch_size, s.net.patch_size
        index, total = measured(options, s, 300), 0
        for images in batches(s, index):
            _, attentions = s.net.forward_features(images, return_attention=True)
            total = total + len(images) * torch.stack([quantities.attention_distance(a, G, P) for a in attentions])
        px = (total / len(index)).cpu().numpy()                           # (blocks,H)
        even = float(quantities.patch_distances(G, P).mean())
        x = 1 + np.arange(len(px)) + 0.14 * (i - (len(subjects) - 1) / 2)
        axis.plot(x[:, None].repeat(px.shape[1], 1), px, "o", color=color_of(i), markersize=4.5, alpha=0.65)
        axis.plot(x, px.mean(axis=1), color=color_of(i), linewidth=1.6, label=s.label)
        axis.axhline(even, color="#888888", linestyle=":", linewidth=1)
        rows += [{"run": s.name, "block": b + 1, "head": h + 1, "distance px": round(float(v), 3), "even px": round(even, 3)}
                 for b, heads in enumerate(px) for h, v in enumerate(heads)]
        table += [{"run": s.name, "block": b + 1, "mean px": round(float(v.mean()), 2), "nearest": round(float(v.min()), 2),
                   "farthest": round(float(v.max()), 2), "even": round(even, 2)} for b, v in enumerate(px)]
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    tidy(axis, "block", "mean attention distance, px")
    if len(subjects) > 1:
        axis.legend(frameon=False, fontsize=9)
    note = ("A dot per head, a line through their means; dotted: attention spread evenly over the image. Over "
            f"{len(index)} test images of {classes_text(options)}.")
    finish(figure, "How far the heads look", subjects, note)
    return Analysis(figure, table, rows, note)


# ---- Features ------------------------------------------------------------------------------------------------------------

def token_features(subject, index):
    """Of test images: {"CLS": (blocks,n,d), and, where there is one, "DIST": the same}, as the tokens leave each block."""
    features = torch.cat([quantities.block_tokens(subject.net, x) for x in batches(subject, index)], dim=1)
    return dict(zip(TOKENS.values(), features.unbind(dim=2)))             # (blocks,n,tokens,d) -> (blocks,n,d) each


def rank(subjects, options, rt):
    """Rank of the CLS and DIST features of each block, on all and on tail classes (Figure 4c, supplement G), and what is lost
    with fewer directions (Figure 1b).

    quantities.feature_rank and reconstruction_error, of the tokens as they leave each block, over --images (default 1,000)
    test images of either set; where the curve of the last block crosses 1 % is its rank. The paper's claim: students of SAM
    teachers have DIST features of lower rank on the tail. A set with fewer images than features cannot show a high rank.
    """
    table, curves = [], []
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained", width_ratios=[1, 1, 1.15])
    for i, s in enumerate(subjects):
        every = of_classes(s.data.test_labels, range(s.data.num_classes), how_many(options, s, 1000))
        rare = "chosen" if options.classes else "tail"
        for axis, images, index in zip(axes, ("all", rare), (every, measured(options, s, 1000))):
            for (token, features), line, marker in zip(token_features(s, index).items(), ("-", "--"), "os"):
                style = dict(color=color_of(i), linestyle=line, label=f"{s.label}, {token}".removeprefix(", "))
                ranks = [quantities.feature_rank(x) for x in features]
                axis.plot(range(1, len(ranks) + 1), ranks, marker=marker, **style)
                error = quantities.reconstruction_error(features[-1]).tolist()
                if images == rare:
                    axes[2].plot(range(1, len(error)), [100 * e for e in error[1:]], **style)
                what = {"run": s.name, "token": token, "images": images, "n": len(index), "features": features.shape[-1]}
                curves.append(what | {"error": [round(e, 7) for e in error]})
                table.append(what | {f"block {b}": r for b, r in enumerate(ranks, 1)})
    tail = classes_text(options)
    for axis, what in zip(axes, ("all classes", tail)):
        tidy(axis, "block", "rank (99 % of squared singular values)", f"rank, {what}")
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axis.set_ylim(0, 1.08 * max(max(line.get_ydata()) for a in axes[:2] for line in a.lines))
    axes[2].axhline(1, color="#888888", linestyle=":", linewidth=1)
    axes[2].set_yscale("log")
    axes[2].set_ylim(0.1, 100)
    axes[2].set_xlim(0, 1.6 * max(max(row[k] for k in row if k.startswith("block")) for row in table))
    tidy(axes[2], "directions kept", "lost of the squared length, %", f"last block, {tail}")
    shared_legend(figure, axes[0], columns=3)
    n = {row["images"]: row["n"] for row in table}
    note = (f"Features of the tokens as they leave each block, of {n['all']} test images of all classes and {n[rare]} of "
            f"{tail}; each feature vector's own mean is subtracted. Dotted: 1 %, where the rank is read.")
    finish(figure, "How many directions the features fill", subjects, note)
    return Analysis(figure, table, {"rank": table, "reconstruction_error": curves}, note)


# ---- Teachers ------------------------------------------------------------------------------------------------------------

def entropy(subjects, options, rt):
    """Entropy of a teacher's predictions on the training images, as they are and as its student sees them (Figure 3), and how
    often it is right on them (Table 1).

    train_teacher.seen_by_student: clean; strong (cropped, RandAugmented, erased); mixed (those, by mixup or CutMix). A teacher
    that saw only crops and flips has never seen the last two. The paper's claim: the entropy is higher out of distribution.
    Up to --images (default 20,000) images, evenly from the long-tailed set.
    """
    table, rows = [], []
    size = (max(6, 4.3 * len(subjects)), 3.9)
    figure, axes = plt.subplots(1, len(subjects), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, s in zip(axes[0], subjects):
        edges = np.linspace(0, np.log(s.data.num_classes), 21)
        seen = train_teacher.seen_by_student(s.net, s.data, rt, limit=options.images or 20000)
        for kind, (right, nats) in seen.items():
            accuracy, mean = 100 * float(right.double().mean()), float(nats.double().mean())
            share = 100 * np.histogram(nats.cpu().numpy().clip(0, edges[-1]), edges)[0] / len(nats)
            style = dict(fill=True, alpha=0.35) if kind == "clean" else dict(linewidth=1.8)
            label = f"{kind}: {accuracy:.1f} % right, mean {mean:.2f} nats"
            axis.stairs(share, edges, color=COLORS[kind], label=label, **style)
            what = {"teacher": s.name, "images": kind}
            table.append(what | {"n": len(nats), "right %": round(accuracy, 2), "entropy": round(mean, 4)})
            rows += [what | {"from nats": round(a, 4), "to nats": round(b, 4), "share %": round(v, 3)}
                     for a, b, v in zip(edges, edges[1:], share)]
        axis.set_yscale("log")
        axis.set_ylim(0.1, 150)
        axis.set_xlim(0, edges[-1])
        tidy(axis, f"entropy, nats (at most ln {s.data.num_classes} = {edges[-1]:.2f})", "", s.label)
        axis.legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("share of the images, %")
    note = ("Training images as they are (clean), augmented (strong), augmented and mixed as in the student's training "
            "(mixed). The scale of shares is logarithmic.")
    finish(figure, "How sure a teacher is of what its student asks", subjects, note)
    return Analysis(figure, table, rows, note)


STEPS = {"SAM": (0, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02), "random": (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)}


def sharpness(subjects, options, rt):
    """How fast the loss rises around a teacher's weights w: is the SAM teacher's minimum flatter (Section 3.2)?

    The loss that the teacher was trained on (PaCo, files: cross-entropy), over training images, equally many of every class
    (--images, default 500, in all), as re-weighting has it at the end of a training. It is taken at w + r ||w|| d for a unit
    direction d: SAM's, up the gradient (quantities.gradient_direction), and the mean of 3 random ones whose filters are as long
    as w's (quantities.random_direction). r is relative to the length of w's matrices and kernels, since BatchNorm makes a
    network's function nearly independent of that length. The network is in evaluation mode, as its student asks it.
    """
    rows, table, used = [], [], []
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained")
    for i, s in enumerate(subjects):
        loss = getattr(s.args, "loss", "ce").replace("paco", "ce")
        used.append(f"{s.name}: {loss}" if s.label else loss)
        for axis, (direction, losses) in zip(axes, sharpness_of(s, loss, options).items()):
            steps = STEPS[direction]
            for classes, at, style in zip(("all", "tail"), losses.T, ("-", "--")):                        # (steps,)
                what, rise = {"teacher": s.name, "direction": direction, "classes": classes}, at - at[0]
                label = f"{s.label}, {classes} classes".removeprefix(", ")
                axis.plot(steps, rise, style, color=color_of(i), marker=".", label=label)
                rows += [what | {"loss name": loss, "radius": r, "loss": round(float(v), 5)} for r, v in zip(steps, at)]
                table.append(what | {"loss": round(float(at[0]), 3), "radii": " ".join(f"{r:g}" for r in steps[2::2]),
                                     "rise there": " ".join(f"{v:.3f}" for v in rise[2::2])})
    for axis, title, steps in zip(axes, ("up the gradient, as SAM climbs", "random directions, mean of 3"), STEPS.values()):
        tidy(axis, "length of the step, relative to the weights", "rise of the loss, nats", title)
        axis.set_xticks(steps[::2])
    shared_legend(figure, axes[0])
    note = ("Mean loss of training images, equally many of every class (solid), and of the tail classes among them (dashed), "
            f"above its value at the trained weights. Losses: {', '.join(used)}.")
    finish(figure, "How fast the loss rises around the weights", subjects, note)
    return Analysis(figure, table, rows, note)


def sharpness_of(subject, loss, options):
    """Losses at STEPS from a teacher's weights, mean over all and over tail classes: {direction: array (len(steps), 2)}."""
    net, data = subject.net, subject.data
    criterion = train_teacher.LOSSES[loss](data.counts, subject.args)
    criterion = criterion.to(data.train_labels.device) if isinstance(criterion, nn.Module) else criterion
    per_class = max(1, (options.images or 500) // data.num_classes)
    index = [of_classes(data.train_labels, [k], per_class).to(data.train_labels.device) for k in range(data.num_classes)]
    tail = [index[k] for k in rare_classes(data)]
    rest = [index[k] for k in range(data.num_classes) if k not in rare_classes(data)]
    params = [p.requires_grad_() for p in net.parameters()]
    size = quantities.length([p for p in params if p.ndim > 1])

    def sums(images):
        """Summed losses of images given by their numbers, class by class: one part's graph is in memory at a time."""
        for part in (part for of_class in images for part in of_class.split(100)):
            x = train_teacher.teacher_images(augment.to_float(data.train_images[part]), net)
            yield len(part) * criterion(net(x), data.train_labels[part])

    def means():
        """(2,): over all classes, over the tail."""
        of_tail, of_rest = sum(sums(tail)), sum(sums(rest))
        return torch.stack([(of_tail + of_rest) / sum(map(len, index)), of_tail / sum(map(len, tail))])

    def along(direction, name):
        return quantities.loss_along(means, params, direction, [r * float(size) for r in STEPS[name]]).cpu().numpy()
    torch.manual_seed(options.seed)
    sam = along(quantities.gradient_direction(sums(index), params), "SAM")
    units = ([d / size for d in quantities.random_direction(params)] for _ in range(3))
    random = np.mean([along(unit, "random") for unit in units], axis=0)
    net.requires_grad_(False)
    return {"SAM": sam, "random": random}


# ---- Accuracies ----------------------------------------------------------------------------------------------------------

def draw_classes(axis, per_class, data):
    """Accuracy of every head on every class, {head: [K percents]}, most common class on the left."""
    counts = data.counts
    x = np.arange(len(counts))
    for head in ("cls", "dist", "avg"):
        if head in per_class and not (head == "cls" and "dist" not in per_class):
            axis.plot(x, per_class[head], color=COLORS[head], marker="o" if len(x) <= 20 else None,
                      label=NAMES[head] if "dist" in per_class else "the network", linewidth=2.5 if head == "avg" else 1.5)
    axis.set_ylim(0, 100)
    axis.set_ylabel("test accuracy, %")
    if len(x) <= 20:
        axis.set_xticks(x, [f"{c}\n{n}" for c, n in zip(data.class_names, counts)], fontsize=8)
        axis.set_xlabel("class, and its training images")
    else:
        axis.set_xlabel("class, from most to least common")
    edges = np.cumsum([len(g) for g in data.groups.values()])[:-1] - 0.5
    for edge in edges:
        axis.axvline(edge, color="#bbbbbb", linewidth=0.8)
    axis.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def draw_curves(axis, log, head="avg"):
    """Test accuracy of the average by group over training, with the switch to the last stage."""
    shown = [r for r in log if head in r]
    epochs = [r["epoch"] + 1 for r in shown]
    for group in engine.COLUMNS:
        axis.plot(epochs, [r[head][group] for r in shown], color=COLORS[group], marker=".", label=group)
    mark_drw(axis, log, text=True)
    axis.set_ylim(0, 100)
    axis.set_xlabel("epoch")
    axis.set_ylabel(f"test accuracy of the {NAMES[head]}, %")
    axis.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, columnspacing=1)


def class_figure(results, data):
    """Figure of the accuracies {head: {"per_class": [K percents]}} on every class."""
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    draw_classes(axis, {head: r["per_class"] for head, r in results.items()}, data)
    return figure


def confusion_figure(confusion, data, title):
    """Figure of a confusion matrix (K,K), rows truth, columns prediction, in percent of each row."""
    K, share = len(confusion), 100 * confusion.double() / confusion.sum(dim=1, keepdim=True)
    figure, axis = plt.subplots(figsize=(7.2, 6.2), layout="constrained")
    picture = axis.imshow(share.numpy(), cmap="viridis", vmin=0, vmax=100)
    figure.colorbar(picture, ax=axis, label="% of the test images of a class")
    if K <= 30:
        axis.set_xticks(range(K), data.class_names, rotation=90)
        axis.set_yticks(range(K), data.class_names)
    if K <= 12:
        for truth in range(K):
            for predicted in range(K):
                value = float(share[truth, predicted])
                if value > 0.5:                                           # not of a class without test images, NaN
                    axis.text(predicted, truth, f"{value:.0f}", ha="center", va="center", fontsize=8,
                              color="black" if value > 60 else "white")
    axis.set_xlabel("predicted class, most to least common")
    axis.set_ylabel("true class, most to least common")
    axis.set_title(textwrap.fill(title, 80), fontsize=10)
    return figure


def summary(subject, result, log):
    """Of a student's run, on one page: accuracy per class, over the training, and attention on tail images."""
    data, columns = subject.data, 10
    figure = plt.figure(figsize=(13, 8.2))
    grid = figure.add_gridspec(2, 1, height_ratios=[1.25, 1], hspace=0.32)
    top = grid[0].subgridspec(1, 2, width_ratios=[1.6, 1], wspace=0.16)
    draw_classes(figure.add_subplot(top[0]), result["per_class"], data)
    draw_curves(figure.add_subplot(top[1]), log)
    axes = grid[1].subgridspec(1 + subject.net.num_tokens, columns, hspace=0.3, wspace=0.08).subplots()
    draw_attention(axes, subject, examples(data, rare_classes(data), columns))
    figure.suptitle("{method} {model} on {dataset}, imbalance {imb:g}, {epochs} epochs: ".format(**result)
                    + "{overall:.1f} % overall, {tail:.1f} % on the tail classes".format(**result["avg"]), fontsize=12, y=0.95)
    figure.text(0.5, 0.065, "Bottom: test images of the tail classes, and where each token looks (attention rollout). Above "
                "each map what that token predicts, in bold when right.", ha="center", fontsize=8)
    return figure


# ---- From a run's log ----------------------------------------------------------------------------------------------------

def mark_drw(axis, log, color="#888888", text=False):
    """A vertical line where the last stage began: --drw-epoch, whether the method weighs classes from then on or not."""
    switch = next((r["epoch"] for r in log if r["drw"]), None)
    if switch is not None and switch > 0:
        axis.axvline(switch, color=color, linestyle="--", linewidth=1)
        if text:
            axis.text(switch, 0.98, " drw-epoch", fontsize=8, color="#666666", va="top", transform=axis.get_xaxis_transform())


def diversity(subjects, options, rt):
    """Cosine distance of the final CLS and DIST tokens, and head and tail accuracy of both heads, over training (Figure 4a).

    1 - "cosine" of the log, the mean over test images (train_student.token_cosine). The paper's claim: the tokens part, and
    more so from the DRW epoch on, CLS towards the head classes, DIST towards the tail. Reads the log alone.
    """
    rows, table = [], []
    size = (max(6.5, 4.2 * len(subjects)), 6)
    figure, axes = plt.subplots(2, len(subjects), figsize=size, squeeze=False, sharey="row", sharex="col", layout="constrained")
    for (top, bottom), s in zip(axes.T, subjects):
        log = read_log(s.path)
        shown = [r for r in log if r.get("cosine") is not None]
        if not shown:
            raise engine.UserError(f"{s.path} has no distances of CLS and DIST in its log: name runs of a student with both")
        mine = [{"run": s.name, "epoch": r["epoch"] + 1, "drw": r["drw"], "cosine distance": round(1 - r["cosine"], 4),
                 **{f"{name} {g} %": r[token][g] for token, name in TOKENS.items() for g in ("head", "tail")}} for r in shown]
        epochs = [row["epoch"] for row in mine]
        top.plot(epochs, [row["cosine distance"] for row in mine], color="#000000", marker=".")
        for token, name in TOKENS.items():
            for group, style in (("head", "-"), ("tail", "--")):
                bottom.plot(epochs, [row[f"{name} {group} %"] for row in mine], style, color=COLORS[token], marker=".",
                            label=f"{name}, {group} classes")
        for axis in (top, bottom):
            mark_drw(axis, log, text=True)
        tidy(top, "", "", s.label)
        tidy(bottom, "epoch", "")
        rows, table = rows + mine, table + first_switch_last(mine)
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylim(-3, 103)
    axes[0, 0].set_ylabel("cosine distance of CLS and DIST")
    axes[1, 0].set_ylabel("test accuracy, %")
    shared_legend(figure, axes[1, 0])
    note = ("Cosine distance: mean over test images of 1 - cos(CLS, DIST), the two tokens after the last norm. DRW: from here "
            "on the teacher's labels are re-weighted.")
    finish(figure, "How CLS and DIST part", subjects, note)
    return Analysis(figure, table, rows, note)


def first_switch_last(rows):
    """Of a run's epochs the first, the last before re-weighting, and the last."""
    before = [i for i, row in enumerate(rows) if not row["drw"]]
    return [rows[i] for i in sorted({0, before[-1] if before else 0, len(rows) - 1})]


def imbalance(subjects, options, rt):
    """Tail accuracy against the imbalance factor (Figure 1c), a line per label, the mean over its runs (seeds).

    From each run's result.json: the average head's tail accuracy at the last epoch. Labels, where --labels does not name
    them: method and model. Runs of one label and one imbalance are taken for repetitions.
    """
    results = [read_json(s.path, "result.json") for s in subjects]
    names = options.labels or [f"{r['method']} {r['model']}" for r in results]
    rows = [{"series": name, "run": train_teacher.name_of(s.path), "imbalance": r["imb"], "seed": r["seed"],
             "overall %": r["avg"]["overall"], "tail %": r["avg"]["tail"]} for name, s, r in zip(names, subjects, results)]
    rows.sort(key=lambda row: row["imbalance"])
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    table = []
    for i, name in enumerate(dict.fromkeys(names)):
        points = {}                                                       # imbalance -> tail accuracies
        for row in rows:
            if row["series"] == name:
                points.setdefault(row["imbalance"], []).append(row["tail %"])
        axis.plot(list(points), [np.mean(v) for v in points.values()], color=color_of(i), marker="os^Dv"[i % 5], label=name)
        for imb, values in points.items():
            axis.plot([imb] * len(values), values, ".", color=color_of(i), markersize=4, alpha=0.6)
            table.append({"series": name, "imbalance": imb, "runs": len(values), "tail %": round(float(np.mean(values)), 1),
                          "lowest": round(min(values), 1), "highest": round(max(values), 1)})
    ticks = sorted({row["imbalance"] for row in rows})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()
    axis.set_ylim(0, 100)
    tidy(axis, "imbalance: images of the largest class / of the smallest", "test accuracy of the tail classes, %")
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    note = "Small dots: single runs; large marks: their mean. Accuracy of the average of the heads, at the last epoch."
    finish(figure, "Rare classes against the imbalance", subjects, note)
    return Analysis(figure, table, rows, note)


def curves(subjects, options, rt):
    """Loss, learning rate, and accuracy overall and by group over the training, a line per run; dashed: its DRW switch.

    From log.jsonl: the mean training loss of each epoch, its last learning rate, and the test accuracies of the average of the
    heads. Losses of different methods (or of LDAM and PaCo) are not of one kind: compare their course, not their height.
    """
    rows, table = [], []
    panels = {"loss": "training loss", "lr": "learning rate", **{c: f"test accuracy, {c}, %" for c in engine.COLUMNS}}
    figure, axes = plt.subplots(2, 3, figsize=(11.5, 6.4), layout="constrained")
    for i, s in enumerate(subjects):
        log = read_log(s.path)
        mine = [{"run": s.name, "epoch": r["epoch"] + 1, "drw": r["drw"], "loss": r["loss"], "lr": r["lr"],
                 **{c: r["avg"][c] for c in engine.COLUMNS if "avg" in r}} for r in log]
        for axis, key in zip(axes.flat, panels):
            shown = [row for row in mine if key in row]
            axis.plot([row["epoch"] for row in shown], [row[key] for row in shown], color=color_of(i), label=s.label,
                      marker="." if key in engine.COLUMNS else None)
            mark_drw(axis, log, color_of(i))
        rows += mine
        table += [row | {"loss": round(row["loss"], 4), "lr": f"{row['lr']:.1e}"} for row in mine if "overall" in row][-1:]
    for axis, (key, name) in zip(axes.flat, panels.items()):
        tidy(axis, "epoch", name)
        if key in engine.COLUMNS:
            axis.set_ylim(-3, 103)
    axes[0, 1].ticklabel_format(axis="y", scilimits=(0, 0))
    if len(subjects) > 1:
        shared_legend(figure, axes[0, 0])
    note = ("Accuracies are those of the average of the heads on the test set. Dashed: the DRW epoch, from which on rare "
            "classes weigh more, where the method does that, and a student's images are no longer mixed (but with --mix-drw).")
    finish(figure, "The course of the training", subjects, note)
    return Analysis(figure, table, rows, note)


# ---- What the student sees -----------------------------------------------------------------------------------------------

def augmented(subjects, options, rt):
    """What a student trains on, and what its teacher says of it (Figure 2): rows of clean, strong and mixed images.

    A batch of --columns training images, augmented and mixed as train_student.py does it, with the run's own settings. Above
    each its label (of mixed images the parts, label smoothing left out) and the teacher's hard label.
    """
    subject, = subjects
    args, data, n = subject.args, subject.data, options.columns
    if not hasattr(args, "magnitude"):
        raise engine.UserError(f"{subject.path} does not say how its student was trained; name a run of train_student.py")
    teacher = train_student.read_teacher(args, data, rt) if args.teacher else None
    torch.manual_seed(options.seed)
    index = torch.randperm(len(data.train_labels))[:n].to(rt.device)
    images, labels = data.train_images[index], data.train_labels[index]
    strong = train_student.strong_augment(images, args)
    mixed, target = augment.mixup_cutmix(strong, labels, data.num_classes, args.mixup, args.cutmix, smoothing=0.0)
    whole = augment.smooth_one_hot(labels, data.num_classes)
    views = {"clean": (student_sized(images, args), whole), "strong": (strong, whole), "mixed": (mixed, target)}
    if args.mixup + args.cutmix == 0:
        del views["mixed"]
    rows = len(views)
    figure, axes = plt.subplots(rows, n, figsize=(1.35 * n + 0.6, 0.2 + 1.8 * rows), squeeze=False, layout="constrained")
    table = []
    mirrored = getattr(args, "teacher_sees", "same") == "mirrored"
    for row, (name, (x, parts)) in zip(axes, views.items()):
        says = train_student.teacher_logits(teacher, x, mirrored).argmax(dim=1).tolist() if teacher else [None] * n
        for axis, image, part, said in zip(row, x, parts, says):
            share, kinds = (v.tolist() for v in part.topk(2))
            truth = [f"{100 * v:.0f} % {data.class_names[k]}" if v < 0.995 else data.class_names[k]
                     for v, k in zip(share, kinds) if v > 0.005]
            entry = {"view": name, "label": " + ".join(truth)}
            if teacher:
                right = said == kinds[0]
                entry |= {"teacher": data.class_names[said], "agrees": right}
                color, weight = (COLORS["cls"], "bold") if right else (COLORS["dist"], "normal")
                axis.text(0.5, 1.02, data.class_names[said], transform=axis.transAxes, ha="center", va="bottom", fontsize=8,
                          color=color, fontweight=weight)
                truth.append("")                                          # the line where that stands
            show(axis, image, "\n".join(truth))
            table.append(entry)
        row_label(row[0], name)
    note = "Above each image its label."
    if teacher:
        note += " In colour the teacher's: bold blue where it names the class with the largest part, orange where it does not."
        note += " (It was asked about weakly augmented images.)" * (getattr(args, "teacher_sees", "same") == "weak")
    says = f", and what {train_teacher.name_of(args.teacher)} says of it" if teacher else ""
    finish(figure, f"What the student trains on{says}", subjects, note)
    return Analysis(figure, table, table, note)


def student_sized(images, args):
    """Training images as they are, at the student's size."""
    return augment.resize(augment.to_float(images), args.img_size)
