r"""Figures of teachers: how sure they are of a student's images, how flat their minimum is.

(subjects, rt, flags of analyze.py) -> drawing.Figure. subjects: a list of loading.Subject.
"""
import numpy as np
import torch
from torch import nn

import augment
from analysis import drawing, quantities
from analysis.drawing import Figure, plt
from engine.evaluation import SUMMARY_IMAGES, teacher_input, teacher_on_training_images
from engine.networks import Ensemble
from engine.runtime import UserError
from losses import LDAMLoss, VSLoss, cross_entropy, focal_loss
from resnet import FastNet


# ---- Entropy -------------------------------------------------------------------------------------

def entropy(subjects, rt, images=None):
    """Entropy of a teacher's predictions on training images, clean and as students at 32 px get
    them (Figure 3), and how often it is right on them (Table 1).

    engine.evaluation.teacher_on_training_images: clean; strong (cropped, RandAugmented, erased);
    mixed (those, by mixup or CutMix). A teacher trained with crops and flips only has never seen
    the last two. The paper's claim: the entropy is higher out of distribution. Up to `images`
    (default 20,000) images, evenly from the long-tailed set.
    """
    table, rows = [], []
    figure, axes = plt.subplots(1, len(subjects), figsize=(max(6, 4.3 * len(subjects)), 3.9),
                                squeeze=False, sharey=True, layout="constrained")
    for axis, s in zip(axes[0], subjects):
        K = s.data.num_classes
        edges = np.linspace(0, np.log(K), 21)
        limit = images or SUMMARY_IMAGES
        measured = teacher_on_training_images(s.net, s.data, rt, limit=limit)
        for kind, (right, nats) in measured.items():                # (n,) each
            accuracy, mean = 100 * float(right.double().mean()), float(nats.double().mean())
            share = percent_in_bins(nats, edges)
            style = dict(fill=True, alpha=0.35) if kind == "clean" else dict(linewidth=1.8)
            axis.stairs(share, edges, color=drawing.COLORS[kind], **style,
                        label=f"{kind}: {accuracy:.1f} % right, mean {mean:.2f} nats")
            entry = {"teacher": s.name, "images": kind}
            table.append(entry | {"n": len(nats), "right %": round(accuracy, 2),
                                  "entropy": round(mean, 4)})
            for low, high, value in zip(edges, edges[1:], share):
                rows.append(entry | {"from nats": round(low, 4), "to nats": round(high, 4),
                                     "share %": round(value, 3)})
        drawing.log_scale(axis)
        axis.set_ylim(0.1, 150)
        axis.set_xlim(0, edges[-1])
        drawing.label_axes(axis, f"entropy, nats (at most ln {K} = {edges[-1]:.2f})", "", s.label)
        axis.legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("share of the images, %")
    note = ("Training images as they are (clean), cropped with padding, RandAugmented and erased "
            "as students' images at 32 px (strong), and mixed too (mixed). The scale of shares is "
            "logarithmic.")
    drawing.finish(figure, "How sure a teacher is of its student's images", subjects, note)
    return Figure(figure, table, rows, note)


def percent_in_bins(nats, edges):
    """Percentages of the values (n,) in the bins between `edges`; outliers go to the outer bins."""
    values = nats.cpu().numpy().clip(edges[0], edges[-1])
    return 100 * np.histogram(values, edges)[0] / len(values)


# ---- Sharpness -----------------------------------------------------------------------------------

# Lengths of the steps away from the weights w, relative to ||w||.
STEPS = {"SAM": (0, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02),
         "random": (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)}
TITLES = {"SAM": "up the gradient, as SAM climbs", "random": "random directions, mean of 3"}


def sharpness(subjects, rt, images=None, seed=0):
    """How fast the loss rises around a teacher's weights w: is SAM's minimum flatter (Section 3.2)?

    The loss that the teacher was trained with (PaCo and files from elsewhere: cross-entropy), over
    training images, equally many of every class as far as there are (`images`, default 500, in
    all), nearly as re-weighting has it at the end of a training. It is taken at w + r ||w|| d for a
    unit direction d: SAM's, up the gradient, and the mean of 3 random ones whose filters are as
    long as w's (quantities). r is relative to the length of w's matrices and kernels, since
    BatchNorm makes a network's function nearly independent of that length. The network is in
    evaluation mode, as a student uses it.
    """
    rows, table, losses_used = [], [], []
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained")
    for i, s in enumerate(subjects):
        name, criterion = teacher_loss(s)
        losses_used.append(f"{s.name}: {name}" if s.label else name)
        losses = losses_around(s, criterion, images, seed)
        for axis, (direction, at_steps) in zip(axes, losses.items()):           # (steps,2)
            steps = STEPS[direction]
            groups = ("all", drawing.rare_group(s.data))
            for classes, loss, line in zip(groups, at_steps.T, ("-", "--")):    # (steps,)
                entry = {"teacher": s.name, "direction": direction, "classes": classes}
                rise = loss - loss[0]
                axis.plot(steps, rise, line, color=drawing.run_color(i), marker=".",
                          label=drawing.join_label(s.label, f"{classes} classes"))
                for radius, value in zip(steps, loss):
                    rows.append(entry | {"loss name": name, "radius": radius,
                                         "loss": round(float(value), 5)})
                table.append(entry | {"loss": round(float(loss[0]), 3),
                                      "radii": " ".join(f"{r:g}" for r in steps[2::2]),
                                      "rise there": " ".join(f"{v:.3f}" for v in rise[2::2])})
    for axis, (direction, steps) in zip(axes, STEPS.items()):
        drawing.label_axes(axis, "length of the step, relative to the weights",
                           "rise of the loss, nats", TITLES[direction])
        axis.set_xticks(steps[::2])
    drawing.shared_legend(figure, axes[0])
    note = ("Rise of the mean loss above its value at the trained weights, over training images: "
            "as many of each class, or all it has (solid), and those of the rare classes among "
            "them (dashed). Losses: "
            f"{', '.join(losses_used)}.")
    drawing.finish(figure, "How fast the loss rises around the weights", subjects, note)
    return Figure(figure, table, rows, note)


def teacher_loss(subject):
    """Name and criterion(logits, labels) of a teacher's loss; PaCo's needs a queue: "ce"."""
    if isinstance(subject.net, Ensemble):
        raise UserError("sharpness is measured for one network: name one teacher")
    name, counts = getattr(subject.args, "loss", "ce"), subject.data.counts
    if name == "ldam":
        criterion = LDAMLoss(counts, subject.args.max_margin)
    elif name == "la":
        criterion = VSLoss(counts, gamma=0)
    elif name == "vs":
        criterion = VSLoss(counts)
    elif name == "focal":
        criterion = focal_loss
    elif name in ("ce", "paco"):
        name, criterion = "ce", cross_entropy
    else:
        raise UserError(f"sharpness does not know the teacher's loss {name}")
    if isinstance(criterion, nn.Module):
        criterion = criterion.to(subject.data.train_labels.device)
    return name, criterion


def trained_parameters(net):
    """Parameters that a teacher's training moves: without FastNet's stem, computed from the data.

    After loading, requires_grad no longer says so.
    """
    fixed = set()
    for module in net.modules():
        if isinstance(module, FastNet):
            fixed.update(module.stem.parameters())
    return [p for p in net.parameters() if p not in fixed]


def losses_around(subject, criterion, images, seed):
    """Losses at STEPS from a teacher's weights: {direction: (steps, 2)}, all and tail classes."""
    net, data = subject.net, subject.data
    per_class = max(1, (images or 500) // data.num_classes)
    index = torch.cat([drawing.images_of(data.train_labels, [k], per_class)
                       for k in range(data.num_classes)]).to(data.train_labels.device)
    rare = torch.tensor(drawing.rare_classes(data), device=index.device)
    is_rare = torch.isin(data.train_labels[index], rare)
    tail, rest = index[is_rare], index[~is_rare]
    params = [p.requires_grad_() for p in trained_parameters(net)]
    length = quantities.norm([p for p in params if p.ndim > 1])

    def summed_losses(chosen):
        """In parts of 100 images: the graph of one part is in memory at a time."""
        for part in chosen.split(100):
            if len(part):
                x = teacher_input(augment.to_float(data.train_images[part]), net.img_size)
                yield len(part) * criterion(net(x), data.train_labels[part])

    def means():
        """(2,): over all classes, over the tail."""
        tail_sum, rest_sum = sum(summed_losses(tail)), sum(summed_losses(rest))
        return torch.stack([(tail_sum + rest_sum) / len(index), tail_sum / len(tail)])

    def along(direction, name):
        radii = [r * float(length) for r in STEPS[name]]
        return quantities.loss_along(means, params, direction, radii).cpu().numpy()
    torch.manual_seed(seed)
    sam = along(quantities.gradient_direction(summed_losses(index), params), "SAM")
    random = []
    for _ in range(3):
        unit = [d / length for d in quantities.random_direction(params)]
        random.append(along(unit, "random"))
    net.requires_grad_(False)
    return {"SAM": sam, "random": np.mean(random, axis=0)}
