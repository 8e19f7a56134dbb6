r"""Figures of students: where the tokens look, how far, what they span, what students train on, and
whether they follow their teachers there.

(subjects, rt, flags of analyze.py) -> drawing.Figure. subjects: a list of loading.Subject. In
attention, distance and rank images are test images of the tail classes unless `classes` names
others.
"""
import os

import numpy as np
import torch
import torch.nn.functional as F

import augment
from analysis import drawing, quantities
from analysis.drawing import NAMES, TOKENS, Figure, plt
from engine.evaluation import predicted, student_heads, student_input, teacher_logits
from engine.networks import load_teacher, short_name, teacher_files
from engine.records import read_json
from engine.runtime import UserError
from images.operations import center_crop


# ---- Attention -----------------------------------------------------------------------------------

def attention(subjects, rt, classes=None, index=None, columns=8, images=None, seed=0):
    """Attention rollout of CLS and DIST on test images (Figures 1a and 5), networks in rows.

    quantities.attention_rollout. Shown are `columns` example images, or those of `index`. The paper
    shows single images; the table measures many (default 300), see measure_maps.
    """
    data = subjects[0].data
    for s in subjects[1:]:
        same_images = (torch.equal(s.data.test_labels, data.test_labels)
                       and s.args.holdout == subjects[0].args.holdout)
        if s.data.class_names != data.class_names or not same_images:
            raise UserError("attention shows the same test images to all networks: name runs on "
                            "the same data set")
    if index and not 0 <= min(index) <= max(index) < len(data.test_labels):
        raise UserError("--index: test images are numbered from 0 to "
                        f"{len(data.test_labels) - 1}")
    if index:
        shown, title = torch.tensor(index), f"test images {', '.join(map(str, index))}"
    else:
        wanted = drawing.chosen_classes(classes, data)
        shown = drawing.example_images(data, wanted, columns, seed)
        title = f"test images of {drawing.classes_text(classes, data)}"
    rows = 1 + sum(s.net.num_tokens for s in subjects)
    size = (max(6, 1.2 * len(shown) + 1), 1.38 * rows)
    figure, axes = plt.subplots(rows, len(shown), squeeze=False, figsize=size, layout="constrained")
    draw_images(axes[0], subjects[0], shown)
    table, row, n = [], 1, drawing.image_count(subjects, images, 300)
    for s in subjects:
        draw_maps(axes[row:row + s.net.num_tokens], s, shown)
        row += s.net.num_tokens
        table += attention_rows(s, drawing.measured_images(s, classes, n), seed)
    spread = []
    for entry in table:
        name = entry["token"] if len(subjects) == 1 else f"{entry['run']} {entry['token']}"
        spread.append(f"{name} {entry['patches']} of {entry['of']}")
    note = ("Attention rollout of each token, every map scaled to its own range (bright: most). "
            "Above each map, what that token predicts, bold when right. Patches that a map spreads "
            f"over, on average: {', '.join(spread)}.")
    drawing.finish(figure, f"Where the tokens look: {title}", subjects, note)
    note += (" Drop: the points of probability that the token's own prediction loses when the "
             "quarter of the patches that its map marks most, or a random quarter, is covered.")
    return Figure(figure, table, table, note)


def draw_images(row, subject, index):
    """A row of axes: test images, their classes above."""
    labels = subject.data.test_labels.cpu()[index].tolist()
    for axis, image, k in zip(row, drawing.student_images(subject, index), labels):
        drawing.show_image(axis, image, subject.data.class_names[k])
    drawing.row_label(row[0], "image")


def draw_maps(rows, subject, index):
    """A row of axes for each token: its rollout on test images, its predictions above."""
    data, images = subject.data, drawing.student_images(subject, index)
    labels = data.test_labels.cpu()[index].tolist()
    with torch.no_grad():
        heads = student_heads(subject.net, images)                  # {head: (n,K)}
    for row, (token, maps) in zip(rows, quantities.token_maps(subject.net, images).items()):
        predictions = heads[token].argmax(dim=1).tolist()
        for axis, image, heat, predicted, label in zip(row, images, maps, predictions, labels):
            drawing.show_map(axis, image, heat)
            right = predicted == label
            axis.set_title(drawing.short(data.class_names[predicted]), fontsize=8,
                           fontweight="bold" if right else "normal",
                           color="black" if right else "#777777")
        drawing.row_label(row[0], f"{subject.label} {NAMES[token]}".strip())


def attention_rows(subject, index, seed):
    """A row for each token: means of measure_maps over test images of these indices."""
    torch.manual_seed(seed)                                         # of the random patches covered
    batches = [measure_maps(subject.net, images)
               for images in drawing.image_batches(subject, index)]
    labels, rows = subject.data.test_labels.cpu()[index], []
    for token in batches[0]:
        values = {key: torch.cat([batch[token][key] for batch in batches]).cpu()
                  for key in batches[0][token]}                     # (n,) each
        right = values.pop("predicted") == labels
        mean = {key: float(value.double().mean()) for key, value in values.items()}
        rows.append({
            "run": subject.name, "token": NAMES[token], "images": len(index),
            "right %": round(100 * float(right.double().mean()), 1),
            "patches": round(mean["patches"], 2),
            "of": (subject.net.img_size // subject.net.patch_size) ** 2,
            "like CLS": round(mean["like CLS"], 3),
            "drop, marked": round(100 * mean["marked"], 1) + 0.0,   # + 0.0: no -0.0
            "drop, random": round(100 * mean["random"], 1) + 0.0})
    return rows


@torch.no_grad()
def measure_maps(net, images):
    """What the maps of a batch of images say, {token: {quantity: (B,)}}.

    predicted: the token's class. patches: on how many patches the map lies (effective_patches).
    like CLS: cosine of the map with that of CLS. marked, random: how much of its probability the
    prediction loses when the quarter of the patches that the map marks most, or a random quarter,
    is covered (quantities.cover).
    """
    def probabilities(x):
        return {head: logits.softmax(dim=1) for head, logits in student_heads(net, x).items()}
    maps = quantities.token_maps(net, images)                       # {token: (B,G,G)}
    clean = probabilities(images)
    random = probabilities(quantities.cover(images, torch.rand_like(maps["cls"])))
    measured = {}
    for token, heat in maps.items():
        p, predicted = clean[token].max(dim=1)                      # (B,) each
        marked = probabilities(quantities.cover(images, heat))
        similarity = F.cosine_similarity(heat.flatten(1), maps["cls"].flatten(1), dim=1)
        measured[token] = {"predicted": predicted, "patches": quantities.effective_patches(heat),
                           "like CLS": similarity}
        for name, covered in (("marked", marked), ("random", random)):
            left = covered[token].gather(1, predicted[:, None])[:, 0]
            measured[token][name] = p - left
    return measured


@torch.no_grad()
def distance(subjects, rt, classes=None, images=None):
    """Mean attention distance of every head in every block (Figure 4b, supplement F).

    quantities.attention_distance, in pixels of the network's own input, over `images` (default 300)
    test images. The dotted line: uniform attention. The paper's claim: DeiT-LT's early blocks have
    local heads, a plain ViT's look far.
    """
    rows, table, n = [], [], drawing.image_count(subjects, images, 300)
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for i, s in enumerate(subjects):
        G, P = s.net.img_size // s.net.patch_size, s.net.patch_size
        index = drawing.measured_images(s, classes, n)
        pixels = attention_distances(s, index).cpu().numpy()        # (blocks,H)
        even = float(quantities.patch_distances(G, P).mean())
        offset = 0.14 * (i - (len(subjects) - 1) / 2)               # runs side by side
        x = 1 + np.arange(len(pixels)) + offset
        axis.plot(x[:, None].repeat(pixels.shape[1], 1), pixels, "o", color=drawing.run_color(i),
                  markersize=4.5, alpha=0.65)
        axis.plot(x, pixels.mean(axis=1), color=drawing.run_color(i), linewidth=1.6,
                  label=drawing.join_label(s.label))
        axis.axhline(even, color="#888888", linestyle=":", linewidth=1)
        for block, heads in enumerate(pixels, 1):
            for head, px in enumerate(heads, 1):
                rows.append({"run": s.name, "block": block, "head": head,
                             "distance px": round(float(px), 3), "even px": round(even, 3)})
            table.append({"run": s.name, "block": block, "mean px": round(float(heads.mean()), 2),
                          "nearest": round(float(heads.min()), 2),
                          "farthest": round(float(heads.max()), 2), "even": round(even, 2)})
    drawing.whole_numbers(axis.xaxis)
    drawing.label_axes(axis, "block", "mean attention distance, px")
    if len(subjects) > 1:
        axis.legend(frameon=False, fontsize=9)
    whose = drawing.classes_text(classes, subjects[0].data)
    note = ("A dot per head, a line through their means; dotted: attention spread evenly over the "
            f"image. Over {len(index)} test images of {whose}.")
    drawing.finish(figure, "How far the heads look", subjects, note)
    return Figure(figure, table, rows, note)


def attention_distances(subject, index):
    """Mean attention distance of every head of every block over test images: (blocks,H) pixels."""
    net, total = subject.net, 0
    G = net.img_size // net.patch_size
    for images in drawing.image_batches(subject, index):
        _, attentions = net.forward_features(images, return_attention=True)     # blocks x (B,H,T,T)
        means = [quantities.attention_distance(a, G, net.patch_size) for a in attentions]
        total = total + len(images) * torch.stack(means)
    return total / len(index)


# ---- Features ------------------------------------------------------------------------------------

def rank(subjects, rt, classes=None, images=None):
    """Rank of the CLS and DIST features of each block, on all and on the tail classes (Figure 4c,
    supplement G), and what is lost with fewer directions (Figure 1b).

    quantities.feature_rank and reconstruction_error, of the tokens as they leave each block, over
    `images` (default 1,000) test images of either set. Where the curve of the last block crosses
    1 % is its rank. The paper's claim: students of SAM teachers have DIST features of lower rank on
    the tail. A set with fewer images than features cannot show a high rank.
    """
    table, errors = [], []
    rare = "chosen" if classes else drawing.rare_group(subjects[0].data)
    count = drawing.image_count(subjects, images, 1000)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained",
                                width_ratios=[1, 1, 1.15])
    for i, s in enumerate(subjects):
        every = drawing.images_of(s.data.test_labels, range(s.data.num_classes),
                                  count)
        measured = {"all": every, rare: drawing.measured_images(s, classes, count)}
        for axis, (name, index) in zip(axes, measured.items()):
            for token, features in token_features(s, index).items():            # (blocks,n,d)
                dashed = token == "DIST"
                style = dict(color=drawing.run_color(i), linestyle="--" if dashed else "-",
                             label=drawing.join_label(s.label, token))
                ranks = [quantities.feature_rank(x) for x in features]
                blocks = range(1, len(ranks) + 1)
                axis.plot(blocks, ranks, marker="s" if dashed else "o", **style)
                error = quantities.reconstruction_error(features[-1]).tolist()
                if name == rare:
                    axes[2].plot(range(1, len(error)), [100 * e for e in error[1:]], **style)
                entry = {"run": s.name, "token": token, "images": name, "n": len(index),
                         "features": features.shape[-1]}
                errors.append(entry | {"error": [round(e, 7) for e in error]})
                table.append(entry | {f"block {b}": r for b, r in zip(blocks, ranks)})
    whose = drawing.classes_text(classes, subjects[0].data)
    finish_rank(axes, whose)
    drawing.shared_legend(figure, axes[0], columns=3)
    n = {row["images"]: row["n"] for row in table}
    note = (f"Features of the tokens as they leave each block, of {n['all']} test images of all "
            f"classes and {n[rare]} of {whose}; each feature vector's own mean is subtracted. "
            "Dotted: 1 %, where the rank is read.")
    drawing.finish(figure, "How many directions the features span", subjects, note)
    return Figure(figure, table, {"rank": table, "reconstruction_error": errors}, note)


def finish_rank(axes, tail):
    """Labels and limits of the three panels: rank on all classes, on the tail, and the error."""
    highest = max(max(line.get_ydata()) for axis in axes[:2] for line in axis.lines)
    for axis, text in zip(axes, ("all classes", tail)):
        drawing.label_axes(axis, "block", "rank (99 % of squared singular values)", f"rank, {text}")
        drawing.whole_numbers(axis.xaxis)
        drawing.whole_numbers(axis.yaxis)
        axis.set_ylim(0, 1.08 * highest)
    axes[2].axhline(1, color="#888888", linestyle=":", linewidth=1)
    drawing.log_scale(axes[2])
    axes[2].set_ylim(0.1, 100)
    axes[2].set_xlim(0, 1.6 * highest)
    drawing.label_axes(axes[2], "directions kept", "lost of the squared length, %",
                       f"last block, {tail}")


def token_features(subject, index):
    """The tokens as they leave each block, on test images: {"CLS": (blocks,n,d), "DIST": the same}.

    Without "DIST" for a student that has no such token.
    """
    features = [quantities.block_tokens(subject.net, images)
                for images in drawing.image_batches(subject, index)]
    tokens = torch.cat(features, dim=1).unbind(dim=2)               # (blocks,n,tokens,d)
    return dict(zip(TOKENS.values(), tokens))


# ---- What the student trains on ------------------------------------------------------------------

def training_images(subjects, rt, columns=8, seed=0):
    """What a student trains on, and its teacher's labels (Figure 2): clean, strong, mixed images.

    A batch of `columns` training images, augmented and mixed as train_student.py does it, with the
    run's own settings. Above each image its label (of a mixed image the parts, without label
    smoothing) and the teacher's hard label.
    """
    subject, = subjects
    args, data, n = subject.args, subject.data, columns
    teacher = teacher_of(subject, rt)
    views = training_views(args, data, n, seed, rt)
    figure, axes = plt.subplots(len(views), n, figsize=(1.35 * n + 0.6, 0.2 + 1.8 * len(views)),
                                squeeze=False, layout="constrained")
    table = []
    for row, (view, (images, targets)) in zip(axes, views.items()):
        labels = [None] * n
        if teacher:
            labels = teacher_logits(teacher, images).argmax(dim=1).tolist()
        for axis, image, target, label in zip(row, images, targets, labels):
            table.append({"view": view} | draw_training_image(axis, image, target, label, data))
        drawing.row_label(row[0], view)
    title, note = "What the student trains on", "Above each image its label."
    if teacher:
        title += f", and how {short_name(args.teacher)} labels it"
        note += (" In colour the teacher's: bold blue where it names the class with the largest "
                 "part, orange where it does not.")
        if args.teacher_view == "weak":
            note += " (In this training the teacher was given weakly augmented images instead.)"
    drawing.finish(figure, title, subjects, note)
    return Figure(figure, table, table, note)


def teacher_of(subject, rt):
    """A student's teacher, or None. UserError if its training images are not known.

    What the teacher is is printed, with a warning if it has changed since.
    """
    args, path = subject.args, subject.path
    if not hasattr(args, "magnitude"):
        raise UserError(f"{path} does not say how its student was trained; name a run of "
                        "train_student.py")
    if args.method == "deit-iii":
        raise UserError(f"{path}: DeiT-III has an augmentation of its own, which is not drawn "
                        "here; name a run of train_student.py")
    if not args.teacher:
        return None
    teacher, text = load_teacher(args.teacher, subject.data, rt, args.teacher_norm,
                                 args.teacher_size)
    rt.print(f"Teacher {args.teacher}: {text}")
    if changed(teacher, path):
        rt.print(f"Warning: the teacher that {path} learned from has other weights")
    return teacher


def changed(teacher, path):
    """Has a Teacher other weights than that of the student in this run folder had in training?"""
    folder = teacher_files(path)[0]
    had = read_json(folder, "config.json").get("teachers") if os.path.isdir(folder) else None
    return bool(had) and [each["weights"] for each in had] != [
        each["weights"] for each in teacher.origin]


def training_views(args, data, n, seed, rt):
    """n training images as the student's settings make them: {view: ((n,3,S,S), targets (n,K))}."""
    torch.manual_seed(seed)
    index = torch.randperm(len(data.train_labels))[:n].to(rt.device)
    return views_of(data.train_images[index], data.train_labels[index], args, data.num_classes)


def views_of(images, labels, args, num_classes):
    """Images (n,3,H,W) as the student's settings make them: {view: ((n,3,S,S), targets (n,K))}."""
    clean = augment.resize(augment.to_float(images), args.img_size)
    if args.crop == "loader":           # test images are read larger than training images
        images = center_crop(images, args.img_size)
    strong = augment.strong_augment(images, args.img_size, args.crop, args.rand_ops, args.magnitude,
                                    args.erasing)
    target = augment.smooth_one_hot(labels, num_classes)
    views = {"clean": (clean, target), "strong": (strong, target)}
    mixed_once = args.drw_epoch > 0 or args.mix_drw
    if args.mixup + args.cutmix > 0 and mixed_once:
        views["mixed"] = augment.mixup_cutmix(strong, labels, num_classes, args.mixup, args.cutmix,
                                              smoothing=0.0)
    return views


def draw_training_image(axis, image, target, label, data):
    """Draw an image with its target (K,) and the teacher's label (or None); returns a table row."""
    fractions, classes = (values.tolist() for values in target.topk(2))
    parts = []
    for fraction, k in zip(fractions, classes):
        if fraction >= 0.995:
            parts.append(data.class_names[k])
        elif fraction > 0.005:
            parts.append(f"{100 * fraction:.0f} % {data.class_names[k]}")
    row = {"label": " + ".join(parts)}
    if label is not None:
        agrees = label == classes[0]
        row |= {"teacher": data.class_names[label], "agrees": agrees}
        axis.text(0.5, 1.02, drawing.short(data.class_names[label]), transform=axis.transAxes,
                  ha="center", va="bottom", fontsize=8, fontweight="bold" if agrees else "normal",
                  color=drawing.COLORS["cls" if agrees else "dist"])
        parts.append("")                                            # a line for the teacher's
    drawing.show_image(axis, image, "\n".join(parts))
    return row


# ---- Does it follow its teacher? -----------------------------------------------------------------

def agreement(subjects, rt, images=None):
    """How often a student names its teacher's class, and how often each of them is right.

    On training and on test images: clean; strong and mixed by the run's own settings. (Of a mixed
    image the class of the larger part is right.) A student that does not follow its teacher on the
    images that it was trained on underfits. Up to `images` (default 2,000) of each set.
    """
    table, n = [], drawing.image_count(subjects, images, 2000)
    figure, axes = plt.subplots(1, len(subjects), figsize=(max(7, 5.5 * len(subjects)), 4),
                                squeeze=False, sharey=True, layout="constrained")
    for axis, s in zip(axes[0], subjects):
        teacher = teacher_of(s, rt)
        if teacher is None:
            raise UserError(f"{s.path} was trained without a teacher")
        sets = {"training": (s.data.train_images, s.data.train_labels),
                "test": (s.data.test_images, s.data.test_labels)}
        rows = [{"run": s.name, "images": name, "view": view} | percentages
                for name, (x, labels) in sets.items()
                for view, percentages in compare(s, teacher, x, labels, n).items()]
        draw_agreement(axis, rows)
        drawing.label_axes(axis, "", "", s.label)
        table += rows
    axes[0, 0].set_ylabel("% of the images")
    drawing.shared_legend(figure, max(axes[0], key=lambda axis: len(axis.containers)), columns=4)
    note = ("Training and test images as the student is tested on them (clean; its teacher gets "
            "the same pixels), augmented (strong) and mixed too (mixed), as in its training, but "
            "for crops by the image loader. Bars: the student's class is its teacher's. Lines: the "
            "teacher is right, of a mixed image on the larger part.")
    drawing.finish(figure, "Does the student follow its teacher?", subjects, note)
    return Figure(figure, table, table, note)


@torch.no_grad()
def compare(subject, teacher, images, labels, n):
    """Percentages over (up to) n images (N,3,H,W), evenly from a set, in random batches of 10.

    {view: {"n": images, "teacher": right, "CLS", "DIST", "average": right, "CLS agrees", ...: with
    the teacher's class}}.
    """
    torch.manual_seed(0)
    args, found = subject.args, {}
    spread = torch.linspace(0, len(labels) - 1, min(n, len(labels))).long()
    for index in spread[torch.randperm(len(spread))].split(10):         # one mixture for each batch
        x, y = images[index.to(images.device)], labels[index.to(labels.device)]
        views = views_of(x, y, args, subject.data.num_classes)
        tested = student_input(augment.to_float(x), args.img_size, args.eval_crop)
        views["clean"] = tested, views["clean"][1]
        for view, (x, target) in views.items():
            label, y_t = target.argmax(dim=1), predicted(teacher_logits(teacher, x))    # (b,) each
            classes = {NAMES[head]: predicted(logits)
                       for head, logits in student_heads(subject.net, x).items()}
            right = {name: each == label for name, each in classes.items()}
            agrees = {f"{name} agrees": each == y_t for name, each in classes.items()}
            for name, each in ({"teacher": y_t == label} | right | agrees).items():
                found.setdefault(view, {}).setdefault(name, []).append(each)
    return {view: {"n": len(spread)} | {name: round(100 * float(torch.cat(each).double().mean()), 2)
                                        for name, each in columns.items()}
            for view, columns in found.items()}


def draw_agreement(axis, rows):
    """Bars of how often each head agrees with its teacher; a line where the teacher is right."""
    heads = list(NAMES) if "DIST agrees" in rows[0] else ["avg"]
    width, place = 0.8 / len(heads), np.arange(len(rows))
    for i, head in enumerate(heads):
        axis.bar(place + (i - (len(heads) - 1) / 2) * width,
                 [row[f"{NAMES[head]} agrees"] for row in rows], width,
                 color=drawing.COLORS[head], label=f"{NAMES[head]} agrees")
    axis.hlines([row["teacher"] for row in rows], place - 0.45, place + 0.45, color="#CC79A7",
                label="teacher is right")
    axis.set_xticks(place, [f"{row['images']}\n{row['view']}" for row in rows], fontsize=8)
    axis.set_ylim(0, 100)
