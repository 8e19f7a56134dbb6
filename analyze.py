r"""Look inside a trained network: tables and pictures from a run folder or a published checkpoint, in one command each.

    python analyze.py eval      runs/NAME             accuracies of every head, overall and per class; of a teacher too
    python analyze.py eval      --checkpoint FILE --dataset cifar10 --imb 100          the same of a file (see networks.py)
    python analyze.py summary   runs/NAME             one picture: who knows which classes, the training, where the tokens look
    python analyze.py attention runs/NAME             where CLS and DIST look, on images of the rarest classes
    python analyze.py augment   runs/NAME             what the student trains on: clean, strong, mixed, with the teacher's label

What to expect if DeiT-LT works: CLS is better on the head classes, DIST on the tail, the average near the better of both.
Pictures and numbers are written into the run folder (or beside the file) unless --out says where. Only this file needs
matplotlib.
"""
import argparse
import csv
import json
import os
import textwrap

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")  # draw to files, also without a display
import matplotlib.pyplot as plt

import augment
import data_lt
import engine
import train_student
import train_teacher
from networks import NORMALISATIONS, load_network, match_classes

# Okabe and Ito's colour-blind safe palette.
COLORS = {"cls": "#0072B2", "dist": "#D55E00", "avg": "#000000", "ema": "#009E73",
          "overall": "#000000", "head": "#56B4E9", "mid": "#009E73", "tail": "#E69F00"}
NAMES = {"cls": "CLS (head expert)", "dist": "DIST (tail expert)", "avg": "average"}


# ---- Loading -------------------------------------------------------------------------------------------------------------

def load(path, rt, options=None):
    """Run folder or checkpoint -> (Network in evaluation mode on the device, its settings, its data).

    A file from elsewhere has no settings: the data are what `options` (command line) say, CIFAR by default, and test images are
    resized and cropped as usual for its size. Raises UserError for a file that is not understood or does not fit the data.
    """
    found = load_network(path, getattr(options, "norm", None), getattr(options, "size", None))
    if not found.config and not getattr(options, "dataset", None) and found.num_classes not in (10, 100):
        raise engine.UserError(f"{path} knows {found.num_classes} classes, neither CIFAR's 10 nor 100: name its --dataset")
    dataset = "cifar100" if found.num_classes == 100 else "cifar10"
    assumed = {"dataset": dataset, "imb": 100.0, "imb_type": "exp", "data_dir": "data", "img_size": found.net.img_size,
               "holdout": None, "train_list": None, "test_list": None, "skip_bad": True,
               "eval_crop": 0.875 if found.net.img_size > 64 else 1.0}
    given = {key: value for key in DATA_FLAGS if (value := getattr(options, key, None)) is not None}
    args = argparse.Namespace(**assumed | found.config | given)
    data = engine.load_data(args, rt)
    match_classes(found, data, path)
    found.net.to(rt.device)
    return found, args, data


DATA_FLAGS = ("dataset", "imb", "imb_type", "data_dir", "holdout", "train_list", "test_list")


def load_student(path, rt, options=None):
    """As load, but (the student itself, its settings, its data); raises UserError for a teacher."""
    found, args, data = load(path, rt, options)
    if found.kind != "student":
        raise engine.UserError(f"{path} is not a student: it is {found.what}")
    return found.net, args, data


def beside(path, name):
    """Where an output called `name` goes: into the run folder, or beside the checkpoint file, with its name in front."""
    return os.path.join(path, name) if os.path.isdir(path) else f"{os.path.splitext(path)[0]}_{name}"


def read_log(folder):
    with open(os.path.join(folder, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


def examples(data, classes, n, seed=0):
    """Numbers of n test images of the given classes, the classes in turn, drawn with a seed of their own."""
    rng = np.random.RandomState(seed)
    labels = data.test_labels.cpu().numpy()
    return torch.tensor([rng.choice(np.where(labels == classes[i % len(classes)])[0]) for i in range(n)])


# ---- Quantities: tensors in, arrays out ----------------------------------------------------------------------------------

def attention_rollout(attentions):
    """How much each token of the input reaches each token of the output (Abnar and Zuidema 2020, arXiv 2005.00928).

        A_l = mean over heads,  R = Â_L ... Â_1,  Â_l = (A_l + I) / 2

    The identity stands for the residual branch. attentions: per block (B,H,T,T), rows sum to 1 -> R (B,T,T), rows sum to 1.
    """
    T = attentions[0].shape[-1]
    rollout = torch.eye(T, device=attentions[0].device)
    for attention in attentions:
        rollout = (attention.float().mean(dim=1) + torch.eye(T, device=rollout.device)) / 2 @ rollout
    return rollout


@torch.no_grad()
def token_maps(net, images):
    """Attention rollout of the leading tokens over the image: {"cls": (B,G,G), "dist": (B,G,G)}, G patches a side.

    The columns of CLS and DIST themselves are left out. images (B,3,S,S) in [0,1].
    """
    _, attentions = net.forward_features(images, return_attention=True)
    rollout = attention_rollout(attentions)
    G = net.img_size // net.patch_size
    names = ["cls", "dist"][:net.num_tokens]
    return {name: rollout[:, i, net.num_tokens:].unflatten(1, (G, G)) for i, name in enumerate(names)}


# ---- Pictures ------------------------------------------------------------------------------------------------------------

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


def draw_attention(axes, net, args, data, index):
    """Rows of axes: the images, then one row per token with its rollout. The titles say class and predictions."""
    images = train_student.test_images(augment.to_float(data.test_images[index.to(data.test_images.device)]), args)
    maps = token_maps(net, images)
    with torch.no_grad():
        predictions = {k: v.argmax(dim=1).tolist() for k, v in train_student.heads(net, images).items()}
    for column, i in enumerate(index.tolist()):
        show(axes[0, column], images[column], data.class_names[int(data.test_labels[i])])
        for row, name in enumerate(maps, 1):
            show_map(axes[row, column], images[column], maps[name][column])
            right = predictions[name][column] == int(data.test_labels[i])
            weight, color = ("bold", "black") if right else ("normal", "#888888")
            axes[row, column].set_title(data.class_names[predictions[name][column]], fontsize=8, fontweight=weight, color=color)
    for row, name in enumerate(["image", *(NAMES[n] for n in maps)]):
        axes[row, 0].set_ylabel(textwrap.fill(name, 12), fontsize=8, rotation=0, ha="right", va="center")


def draw_classes(axis, result, config):
    """Accuracy of every head on every class, most common class on the left."""
    counts, per_class = config["counts"], result["per_class"]
    x = np.arange(len(counts))
    for head in ("cls", "dist", "avg"):
        if head in per_class and not (head == "cls" and "dist" not in per_class):
            axis.plot(x, per_class[head], color=COLORS[head], marker="o" if len(x) <= 20 else None, label=NAMES[head],
                      linewidth=2.5 if head == "avg" else 1.5)
    axis.set_ylim(0, 100)
    axis.set_ylabel("test accuracy, %")
    if len(x) <= 20:
        axis.set_xticks(x, [f"{c}\n{n}" for c, n in zip(config["classes"], counts)], fontsize=8)
        axis.set_xlabel("class, and its training images")
    else:
        axis.set_xlabel("class, from most to least common")
    edges = np.cumsum([len(g) for g in config["groups"].values()])[:-1] - 0.5
    for edge in edges:
        axis.axvline(edge, color="#bbbbbb", linewidth=0.8)
    axis.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def draw_curves(axis, log, head="avg"):
    """Test accuracy of the average by group over training, with the DRW switch."""
    shown = [r for r in log if head in r]
    epochs = [r["epoch"] + 1 for r in shown]
    for group in engine.COLUMNS:
        axis.plot(epochs, [r[head][group] for r in shown], color=COLORS[group], marker=".", label=group)
    switch = next((r["epoch"] for r in log if r["drw"]), None)
    if switch is not None:
        axis.axvline(switch, color="#888888", linestyle="--", linewidth=1)
        axis.text(switch, 2, " DRW", fontsize=8, color="#666666")
    axis.set_ylim(0, 100)
    axis.set_xlabel("epoch")
    axis.set_ylabel(f"test accuracy of the {NAMES[head]}, %")
    axis.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, columnspacing=1)


def save_figure(figure, path):
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def summary(folder, out=None):
    """One picture of a finished run; returns its path."""
    rt = engine.Runtime(torch.device("cpu"))                              # alone, also when called by one of several processes
    net, args, data = load_student(folder, rt)
    try:
        with open(os.path.join(folder, "result.json")) as f, open(os.path.join(folder, "config.json")) as g:
            result, config = json.load(f), json.load(g)
    except FileNotFoundError:
        raise engine.UserError(f"the run in {folder} is not finished; continue it with --resume") from None
    columns = 10
    figure = plt.figure(figsize=(13, 8.2))
    grid = figure.add_gridspec(2, 1, height_ratios=[1.25, 1], hspace=0.32)
    top = grid[0].subgridspec(1, 2, width_ratios=[1.6, 1], wspace=0.16)
    draw_classes(figure.add_subplot(top[0]), result, config)
    draw_curves(figure.add_subplot(top[1]), read_log(folder))
    axes = grid[1].subgridspec(1 + net.num_tokens, columns, hspace=0.3, wspace=0.08).subplots()
    draw_attention(axes, net, args, data, examples(data, data.groups["tail"] or data.groups["mid"], columns))
    figure.suptitle("{method} {model} on {dataset}, imbalance {imb:g}, {epochs} epochs: ".format(**result)
                    + "{overall:.1f} % overall, {tail:.1f} % on the tail classes".format(**result["avg"]), fontsize=12, y=0.95)
    figure.text(0.5, 0.065, "Bottom: test images of the tail classes, and where each token looks (attention rollout). Above "
                "each map what that token predicts, in bold when right.", ha="center", fontsize=8)
    return save_figure(figure, out or os.path.join(folder, "summary.png"))


def command_summary(options, rt):
    print(summary(options.run, options.out))


def command_attention(options, rt):
    net, args, data = load_student(options.run, rt, options)
    n = 10
    figure, axes = plt.subplots(1 + net.num_tokens, n, figsize=(1.3 * n, 1.5 * (1 + net.num_tokens)))
    draw_attention(axes, net, args, data, examples(data, data.groups["tail"] or data.groups["mid"], n, options.seed))
    figure.suptitle(f"{options.run}: attention rollout; above each map what that token predicts, bold when right", fontsize=9)
    print(save_figure(figure, options.out or beside(options.run, "attention.png")))


def command_augment(options, rt):
    net, args, data = load_student(options.run, rt, options)
    if not hasattr(args, "magnitude"):
        raise engine.UserError(f"{options.run} does not say how its student was trained; name a run of train_student.py")
    teacher = train_student.read_teacher(args, data, rt) if net.distilled else None
    torch.manual_seed(options.seed)
    n = 10
    index = torch.randperm(len(data.train_labels))[:n]
    images, labels = data.train_images[index], data.train_labels[index]
    clean, strong = augment.to_float(images), train_student.strong_augment(images, args)
    mixed, target = augment.mixup_cutmix(strong, labels, data.num_classes, args.mixup, args.cutmix, args.smoothing)
    figure, axes = plt.subplots(3, n, figsize=(1.5 * n, 5.6))
    for row, (name, images) in enumerate([("clean", clean), ("strong", strong), ("mixed", mixed)]):
        says = train_student.teacher_labels(teacher, images).tolist() if teacher else [None] * n
        for column in range(n):
            parts = target[column].topk(2).indices.tolist()
            title = data.class_names[int(labels[column])] if row < 2 else " + ".join(
                f"{100 * target[column, k]:.0f}% {data.class_names[k]}" for k in parts if target[column, k] > 0.02)
            if teacher:
                title = f"{textwrap.fill(title, 14)}\nteacher: {data.class_names[says[column]]}"
            show(axes[row, column], images[column], title)
        axes[row, 0].set_ylabel(name)
    print(save_figure(figure, options.out or beside(options.run, "augment.png")))


def command_eval(options, rt):
    found, args, data = load(options.run, rt, options)
    print(f"{options.run}: {found.what}; on {engine.describe(data, args)}")
    if found.kind == "student":
        results = train_student.evaluate(found.net, None, data, args, rt)
        print(engine.table(results, "student"))
    else:
        results = train_teacher.evaluate(found.net, data, rt)
        print(engine.table(results, "teacher"))
        print(train_teacher.say_on_training_images(train_teacher.on_training_images(found.net, data, rt)))
    path = options.out or beside(options.run, "per_class.csv")
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["class", "training images", *results])
        for k, name in enumerate(data.class_names):
            writer.writerow([name, data.counts[k], *(r["per_class"][k] for r in results.values())])
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"eval": command_eval, "summary": command_summary, "attention": command_attention, "augment": command_augment}
    parser.add_argument("command", choices=commands)
    parser.add_argument("run", nargs="?", help="run folder or checkpoint file (summary: a finished run folder)")
    parser.add_argument("--checkpoint", help="the same, as a flag")
    parser.add_argument("--out", help="file to write (default: in the run folder, or beside the file)")
    parser.add_argument("--seed", type=int, default=0, help="which example images")
    parser.add_argument("--device", default="auto")
    data = parser.add_argument_group("data", "which data to use; default: what the run was trained on, for other files CIFAR")
    data.add_argument("--dataset", choices=data_lt.DATASETS)
    data.add_argument("--imb", type=float)
    data.add_argument("--imb-type", choices=["exp", "step"])
    data.add_argument("--data-dir")
    data.add_argument("--holdout", type=float)
    data.add_argument("--train-list")
    data.add_argument("--test-list")
    network = parser.add_argument_group("network", "for files from elsewhere")
    network.add_argument("--norm", choices=NORMALISATIONS, help="pixel statistics to normalise with (default: as recognised)")
    network.add_argument("--size", type=int, help="side of a CNN's images, pixels (default: as recognised)")
    options = parser.parse_args()
    if bool(options.checkpoint) == bool(options.run):
        parser.error("name one run folder or checkpoint file")
    options.run = options.checkpoint or options.run
    commands[options.command](options, engine.setup(options.device))


if __name__ == "__main__":
    engine.run_main(main)
