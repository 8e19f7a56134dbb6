r"""What networks predict, and how often they are right.

A student's prediction is the mean of its heads' logits. Accuracies: overall is plain top-1; head,
mid and tail are means of their classes' recalls. Published test sets are balanced. Of one that is
not, balanced is the mean of all classes' recalls, which is shown first, and macro F1 the mean of

    F1_k = 2 precision_k recall_k / (precision_k + recall_k) = 2 right_k / (answers_k + images_k)
"""
import math
import os
import shlex

import torch
import torch.nn.functional as F

import augment
import data_lt
from engine.groups import groups_text, split_by_count
from engine.runtime import all_sum, share_buffers
from engine.training import fewest_epochs
from images.decode import Stream
from images.operations import center_crop

COLUMNS = ("overall", "head", "mid", "tail")                            # of a balanced test set
SKEWED_COLUMNS = ("balanced", *COLUMNS, "macro_f1")                     # of another
SUMMARY_IMAGES = 20000      # on which a teacher is summarised, at most
TITLES = {"macro_f1": "macro F1", "teacher_avg": "teacher", "avg+teacher": "avg + teacher"}


# ---- What a network is given ---------------------------------------------------------------------

def student_input(x, img_size, eval_crop):
    """Clean float images (B,3,H,W) -> what the student is tested on, (B,3,S,S).

    Resized to img_size / eval_crop, of which the centre is cut out.
    """
    return center_crop(augment.resize(x, round(img_size / eval_crop)), img_size)


def teacher_input(x, img_size):
    """Clean float images (B,3,H,W), resized to the teacher's own size, (B,3,S,S)."""
    return augment.resize(x, img_size).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def teacher_logits(teacher, x):
    """Logits (B,K) of the teacher for the student's training images x (B,3,S,S) in [0,1].

    x is resized to the teacher's size without antialiasing, as in the published code: 224 -> 32 px
    keeps every seventh pixel, noise and all.
    """
    if x.shape[-1] != teacher.img_size:
        x = F.interpolate(x, size=teacher.img_size, mode="bicubic", antialias=False).clamp(0, 1)
    return teacher(x.contiguous(memory_format=torch.channels_last))


# ---- What it predicts ----------------------------------------------------------------------------

def student_heads(net, x):
    """Logits (B,K) of every head that the student has, and "avg", their mean: its prediction."""
    cls_logits, dist_logits = net(x)
    if dist_logits is None:
        return {"cls": cls_logits, "avg": cls_logits}
    return {"cls": cls_logits, "dist": dist_logits, "avg": (cls_logits + dist_logits) / 2}


def combined(student, teacher):
    """Logits (B,K) of two networks as one, of theirs (B,K): ln of the mean of their probabilities.

    As an ensemble of teachers has it. The mean of logits, or of their log-softmax, which has the
    same largest class, would be decided by the network whose logits are larger: LDAM's are 30 times
    a cosine. Not finite where one of the two is not.
    """
    log_p, log_q = (x.float().log_softmax(dim=1) for x in (student, teacher))
    finite = 0 * (student + teacher).float()                            # 0, or NaN
    return torch.logaddexp(log_p, log_q) - math.log(2) + finite


def predicted(logits):
    """The class of each image (B,), of logits (B,K): -1, which is no class, where one of an image's
    logits is not finite. (argmax takes the first NaN, often class 0, the most frequent one.)
    """
    return torch.where(logits.isfinite().all(dim=1), logits.argmax(dim=1), -1)


def entropy(logits):
    """-sum_k p_k ln p_k, p = softmax(logits): (B,K) -> (B,) in nats, 0 (certain) to ln K."""
    log_p = logits.float().log_softmax(dim=1)
    return -(log_p.exp() * log_p.clamp(min=-1e30)).sum(dim=1)           # 0 ln 0 = 0


# ---- How often that is right ---------------------------------------------------------------------

def evaluate(predict, images, labels, groups, rt):
    """Accuracies of every head on a test set, over all processes, each image counted once.

    predict: float images (B,3,H,W) in [0,1] -> {head: logits (B,K)}. images uint8 (N,3,H,W),
    labels (N,). Returns {head: accuracies}, see there.
    """
    mine, found = answers(predict, images, labels, rt)
    labels = labels.cpu()
    return {head: count_accuracies(classes, mine, labels, groups, rt)
            for head, classes in found.items()}


def images_at_a_time(images):
    """How many of uint8 (N,3,H,W) are evaluated together: 500, or as much memory of larger ones."""
    H, W = images.shape[-2:]
    return max(1, 500 * 224 ** 2 // max(224 ** 2, H * W))


@torch.no_grad()
def answers(predict, images, labels, rt):
    """What each head predicts for this process's images: (labels (n,), {head: classes (n,)}).

    predict, images, labels: see evaluate. Class -1: see predicted. Both are on the CPU.
    """
    mine = torch.arange(len(labels), device=labels.device)[rt.rank::rt.world]
    indices, found = mine.split(images_at_a_time(images)), {}
    if isinstance(images, Stream):                          # decodes ahead
        batches = (batch for _, _, batch in images.batches(enumerate(indices)))
    else:
        batches = (images[index] for index in indices)
    for batch in batches:
        with rt.autocast():
            heads = predict(augment.to_float(batch))
        for head, logits in heads.items():
            found.setdefault(head, []).append(predicted(logits))
    classes = torch.stack([torch.cat(parts) for parts in found.values()]).cpu()     # (heads,n)
    return labels[mine].cpu(), dict(zip(found, classes))


def count_accuracies(classes, mine, labels, groups, rt):
    """Accuracies of one head: its classes (n,) for this process's images, which have labels `mine`
    (n,), of all test images with labels (N,). All on the CPU.
    """
    num_classes = sum(map(len, groups.values()))
    counts = all_sum(torch.stack(count_answers(classes, mine, num_classes)), rt)        # (2,K)
    total = torch.bincount(labels, minlength=num_classes)
    return accuracies(*counts, total, groups)


def count_answers(classes, labels, num_classes):
    """(right (K,), answers (K,)): how often each class is predicted rightly, and at all."""
    right = torch.bincount(labels[classes == labels], minlength=num_classes)
    return right, torch.bincount(classes[classes >= 0], minlength=num_classes)


def accuracies(right, answers, total, groups, skewed=None):
    """Right answers, answers and test images of each class (K,) -> accuracies in percent.

    Counts may be weighted. A class without test images is NaN and left out of its group, of
    balanced accuracy and macro F1; so is a group of such classes. skewed: are there these two?
    None: if the test set is not balanced. predicted_classes: how many classes are answered at all.
    """
    recall, _, f1 = class_scores(right, answers, total)
    tested = total > 0
    out = {"overall": round(float(100 * right.sum() / total.sum()), 3)}
    if skewed or (skewed is None and total.min() != total.max()):
        out["balanced"] = round(float(recall[tested].mean()), 3)
        out["macro_f1"] = round(float(f1[tested].mean()), 3)
    for name, classes in groups.items():
        out[name] = round(float(recall[classes].nanmean()), 3)
    return out | {"predicted_classes": int((answers > 0).sum()),
                  "per_class": [round(float(r), 2) for r in recall]}


def class_scores(right, answers, total):
    """Recall, precision and F1 of each class in percent, (K,) each, of its right answers, answers
    and test images. Recall is NaN without test images, precision without answers; F1 without both.
    """
    right = right.double()
    return 100 * right / total, 100 * right / answers, 200 * right / (answers + total)


def evaluate_student(net, data, img_size, eval_crop, rt, averaged=None):
    """{"cls", "dist", "avg": accuracies} of a student on the test set, see `evaluate`.

    averaged: the same network with averaged weights (EMA), or None; its prediction is "ema".
    """
    for network in [net] if averaged is None else [net, averaged]:
        network.eval()
        share_buffers(network, rt)                          # of a stem with BatchNorm

    def predict(x):
        x = student_input(x, img_size, eval_crop)
        heads = student_heads(net, x)
        if averaged is not None:
            heads["ema"] = student_heads(averaged, x)["avg"]
        return heads
    return evaluate(predict, data.test_images, data.test_labels, data.groups, rt)


def evaluate_teacher(net, data, rt):
    """{"avg": accuracies} of a teacher on the test set."""
    net.eval()
    share_buffers(net, rt)                                  # the statistics that are saved

    def predict(x):
        return {"avg": net(teacher_input(x, net.img_size))}
    return evaluate(predict, data.test_images, data.test_labels, data.groups, rt)


def with_teacher(results, net, teacher, data, img_size, eval_crop, rt):
    """A student's results with a row of its teacher before, and of both together behind them.

    "teacher_avg": the teacher's accuracies, "avg+teacher": those of `combined`; each has a
    "margin", half of the 95 % interval of how far its balanced accuracy is from avg's,
    avg+teacher's from the better one's of the two. Without a teacher the results alone.
    """
    if teacher is None:
        return results
    net.eval()

    def predict(x):
        student = student_heads(net, student_input(x, img_size, eval_crop))["avg"]
        g = teacher(teacher_input(x, teacher.img_size))
        return {"avg": student, "teacher_avg": g, "avg+teacher": combined(student, g)}
    labels, found = answers(predict, data.test_images, data.test_labels, rt)
    all_labels = data.test_labels.cpu()
    rows = {name: count_accuracies(classes, labels, all_labels, data.groups, rt)
            for name, classes in found.items()}
    total = torch.bincount(all_labels, minlength=data.num_classes)
    best = max(("avg", "teacher_avg"), key=lambda name: main_accuracy(rows[name]))
    for name, other in (("teacher_avg", "avg"), ("avg+teacher", best)):
        mine, theirs = found[name] == labels, found[other] == labels
        better, worse = (all_sum(torch.bincount(labels[alone], minlength=data.num_classes), rt)
                         for alone in (mine & ~theirs, theirs & ~mine))
        rows[name]["margin"] = round(margin(better, worse, total), 3)
    return {"teacher_avg": rows["teacher_avg"]} | results | {"avg+teacher": rows["avg+teacher"]}


def margin(better, worse, total):
    """Half of the 95 % interval of the difference of two networks' balanced accuracies, in points.

    better, worse, total (K,): test images of each class of which only the one is right, only the
    other, and all. The difference in a class is that of paired proportions, with half an image
    added to each of the four cases (Agresti and Min, Biometrics 2005), so that classes of a few
    images do not count as certain; classes are independent.
    """
    tested = total > 0
    b, c, n = (counts[tested].double() for counts in (better, worse, total))
    b, c, n = b + 0.5, c + 0.5, n + 2
    variance = (b + c - (b - c).square() / n) / n.square()              # of a class's difference
    return float(100 * 1.96 * variance.sum().sqrt() / len(n))


def main_accuracy(result):
    """Balanced accuracy, which overall accuracy is on a balanced test set."""
    return result.get("balanced", result["overall"])


@torch.no_grad()
def token_cosine(net, data, img_size, eval_crop, rt):
    """Mean cosine similarity of the final CLS and DIST tokens on a tenth of the test images.

    At most 1,000 of them. None without a DIST token. Figure 4a of the paper.
    """
    if not net.distilled:
        return None
    n = min(1000, -(-len(data.test_labels) // 10))          # a tenth, rounded up
    spread = torch.linspace(0, len(data.test_labels) - 1, n).long().to(rt.device)
    cosines = []
    for index in spread.split(500):
        x = student_input(augment.to_float(data.test_images[index]), img_size, eval_crop)
        with rt.autocast():
            tokens, _ = net.forward_features(x)             # (B,T,D)
        cosines.append(F.cosine_similarity(tokens[:, 0].float(), tokens[:, 1].float(), dim=1))
    return round(torch.cat(cosines).mean().item(), 4)


@torch.no_grad()
def teacher_on_training_images(net, data, rt, kinds=("clean", "strong", "mixed"),
                               limit=SUMMARY_IMAGES, batch=64):
    """A teacher on (up to `limit`) training images as a student's augmentation makes them.

    kinds: "clean"; "strong": padded, cropped, RandAugmented, erased; "mixed": those, mixed. At
    the data's own size. Returns {kind: (correct (n,) bool, entropy (n,) in nats)}; a mixed image's
    label is the one with the larger share. Table 1 and Figure 3 of the paper.
    """
    net.eval()
    torch.manual_seed(0)
    n = min(limit, len(data.train_labels))
    spread = torch.linspace(0, len(data.train_labels) - 1, n).long()
    found = {kind: ([], []) for kind in kinds}
    steps = data_lt.steps_per_epoch(n, batch)
    for index in torch.tensor_split(spread[torch.randperm(n)].to(rt.device), steps):
        images, labels = data.train_images[index], data.train_labels[index]
        strong = augment.strong_augment(images, images.shape[-1])
        mixed, target = augment.mixup_cutmix(strong, labels, data.num_classes)
        views = {"clean": (augment.to_float(images), labels), "strong": (strong, labels),
                 "mixed": (mixed, target.argmax(dim=1))}
        for kind, (correct, entropies) in found.items():
            x, label = views[kind]
            with rt.autocast():
                logits = net(teacher_input(x, net.img_size))
            correct.append(predicted(logits) == label)
            entropies.append(entropy(logits))
    return {kind: (torch.cat(correct), torch.cat(entropies))
            for kind, (correct, entropies) in found.items()}


def balanced_sample(labels, n):
    """(Up to) n of the images with these labels (N,), the same number of each class if it has them.

    Of more classes than n, some. Returns their indices, the same ones each time.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]                   # class after class
    counts = torch.bincount(labels)
    first = (counts.cumsum(0) - counts)[labels[order]]                  # where its class begins
    place = torch.arange(len(labels)) - first                           # 0, 1, ... in its class
    draw = torch.rand(len(labels), generator=generator)                 # which classes come first
    return order[(place + draw).argsort()[:n]]


def accuracy_on_clean(net, data, rt, n=500):
    """How often a teacher is right on (up to) n clean training images, for people: catches classes
    in another order, or wrong pixel statistics, before a student learns from them.

    Chance is 1 / classes, counting those that are in the sample: the mean recall of any answer that
    does not depend on the image. It warns if the odds of being right are below twice chance's:
    67 % of 2 classes, 18 % of 10, 2 % of 100.
    """
    index = balanced_sample(data.train_labels.cpu(), n).to(rt.device)
    images, labels = data.train_images[index], data.train_labels[index]

    def predict(x):
        return {"avg": net(teacher_input(x, net.img_size))}
    result = evaluate(predict, images, labels, data.groups, rt)["avg"]
    recalls = [recall for recall in result["per_class"] if not math.isnan(recall)]
    mean, chance = sum(recalls) / len(recalls), 1 / len(recalls)
    text = (f"{result['overall']:.1f} % of {len(index)} clean training images right, {mean:.1f} % "
            f"in the mean over classes (chance: {100 * chance:.1f} %)")
    if mean * (1 - chance) < 2 * chance * (100 - mean):
        text += ("; warning: that is near chance: its classes may be in another order than these, "
                 "its pixel statistics others (--teacher-norm), or its training may have failed")
    return text


def teacher_summary(net, data, rt):
    """How right and how sure a teacher is on training images, for result.json.

    {"clean", "mixed": {"accuracy": percent, "entropy": nats}}: means over images, so over the
    long-tailed distribution.
    """
    found = teacher_on_training_images(net, data, rt, ("clean", "mixed"))
    return {kind: {"accuracy": round(100 * float(correct.double().mean()), 2),
                   "entropy": round(float(entropies.double().mean()), 4)}
            for kind, (correct, entropies) in found.items()}


def teacher_summary_text(summary):
    """The summary for people."""
    names = {"clean": "clean", "mixed": "augmented and mixed"}
    parts = [f"{names[kind]} {s['accuracy']:.1f} % right, entropy {s['entropy']:.2f} nats"
             for kind, s in summary.items()]
    return "on its training images: " + "; ".join(parts)


# ---- Tables for people ---------------------------------------------------------------------------

def group_by_count(results, data):
    """The large sets' results with groups by training images, > 100, 20 to 100, < 20; else {}.

    Published tables mix these groups and those of the published code, which split the classes by
    their order (data_lt.PUBLISHED_GROUPS).
    """
    if data.name not in data_lt.LISTS:
        return {}
    groups, regrouped = split_by_count(data.counts, 100, 20), {}
    for head, result in results.items():
        recall = torch.tensor(result["per_class"])
        regrouped[head] = {"overall": result["overall"]}
        for group, classes in groups.items():
            regrouped[head][group] = round(float(recall[classes].nanmean()), 3)
    return regrouped


def tables(results, title, data):
    """The table of results and, for the large sets, the one with groups by count, as text.

    Below it, what the groups are, unless they are the published ones.
    """
    text, regrouped = table(results, title), group_by_count(results, data)
    if regrouped:
        text += f"\nby training images (> 100, 20 to 100, < 20)\n{table(regrouped, title)}"
    published = data.name in data_lt.PUBLISHED_GROUPS
    if not published or data.groups != data_lt.published_groups(data.name):
        text += f"\n{groups_text(data.counts, data.groups)}"
    return text


def final_table(results, title, data):
    """The table of a student's run, and what it shows."""
    text = tables(results, title, data)
    return f"{text}\n{heads_compared(results)}" if "dist" in results else text


def heads_compared(results):
    """What the table shows of CLS and DIST, a sentence; ties and untested groups are left out."""
    sentences = []
    for group in ("head", "tail"):
        cls, dist = results["cls"][group], results["dist"][group]
        if cls == dist or math.isnan(cls):
            continue
        better = "CLS" if cls > dist else "DIST"
        sentences.append(f"{better} is better on the {group} "
                         f"({max(cls, dist):.1f} against {min(cls, dist):.1f} %)")
    return "; ".join([*sentences, "avg, the mean of their logits, is the prediction"]) + "."


def advice(results, folder, teacher, settings):
    """Which network of a student's finished run to use, and how: one line for its end.

    results: as with_teacher returns them, of the run in `folder`. teacher: its path or None.
    settings: those of the run and its "counts" of images, a dict. The better of student and
    teacher; both together only if that is clearly better, by more than the 95 % interval of the
    difference, see `margin`: on other test images of the same classes. (The intervals of eval are
    for other classes as well.)
    """
    name = "balanced accuracy" if "balanced" in results["avg"] else "accuracy"
    images = "held-out images" if settings.get("holdout") else "test images"
    given = ((flag, settings.get(f"teacher_{flag}")) for flag in ("norm", "size"))
    flags = "".join(f" --{flag} {value}" for flag, value in given if value is not None)
    note = "; a file without class names needs them beside it, x.pth in x.classes.txt"
    if all(map(os.path.isdir, (teacher or folder).split(","))):     # runs say their own
        left_out = flags.replace(" --", " --teacher-")
        flags, note = "", f"; measured with{left_out}, without it here" if flags else ""
    s = main_accuracy(results["avg"])
    if "teacher_avg" not in results:
        return f"Use the network: {predict_command(folder)} ({name} {s:.1f} % on the {images})"
    t, c = (main_accuracy(results[row]) for row in ("teacher_avg", "avg+teacher"))
    margin, margin_c = (results[row]["margin"] for row in ("teacher_avg", "avg+teacher"))
    text = f"{name} on the {images}: student {s:.1f} %, teacher {t:.1f} %"
    interval = "95 % interval of the difference for these classes: +-"
    if c - max(s, t) > margin_c:
        return (f"Use both together: {predict_command(f'{folder},{teacher}', flags)} ({text}, both "
                f"{c:.1f} %; {interval}{margin_c:.1f}{note})")
    clear = "" if abs(s - t) > margin else "no clear difference; "
    text = f"{clear}{text}; {interval}{margin:.1f}"
    if t > s:
        epochs = max(2 * settings["epochs"], epochs_to_learn(settings))
        return (f"Use the teacher: {predict_command(teacher, flags)} ({text}{note}). A longer "
                f"training may let the student catch up: --epochs {epochs}, or more --minutes.")
    return f"Use the student: {predict_command(folder)} ({text})"


def epochs_to_learn(settings):
    """The epochs that a run of these settings needs at least, as it is warned of at its start."""
    n = sum(settings["counts"])                             # images in an epoch
    if settings["repeats"] > 1:
        n = len(data_lt.repeated_augmentation(n, 0, 0))
    return fewest_epochs(data_lt.steps_per_epoch(n, settings["batch"]))


def predict_command(path, flags=""):
    """The command that predicts with the network of this run folder or file."""
    return f"python analyze.py predict --checkpoint {shlex.quote(path)}{flags} PICTURES"


def columns(results):
    """The columns of a table of {row name: accuracies}: more where a test set is not balanced."""
    if any("balanced" in result for result in results.values()):
        return SKEWED_COLUMNS
    return COLUMNS


def saved(result):
    """What result.json keeps of a row of results, without its classes."""
    return {name: result[name] for name in (*SKEWED_COLUMNS, "margin") if name in result}


def table(results, title=""):
    """The head/mid/tail table as text, a row per entry of {row name: accuracies}."""
    names = [TITLES.get(name, name) for name in results]
    width = max([6, len(title), *map(len, names)])
    shown = columns(results)
    lines = [f"{title:<{width}}" + "".join(f"{TITLES.get(c, c):>9}" for c in shown)]
    for name, result in zip(names, results.values()):
        values = [result.get(column, math.nan) for column in shown]
        cells = [f"{'-':>9}" if math.isnan(value) else f"{value:9.1f}" for value in values]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def brief(result):
    """A row of results in a few words, for an epoch's line: 52.2 (66.4 47.6 44.2)."""
    groups = ["-" if math.isnan(result[group]) else f"{result[group]:.1f}"
              for group in ("head", "mid", "tail")]
    text = f"{result['overall']:.1f} ({' '.join(groups)})"
    return f"{result['balanced']:.1f}, overall {text}" if "balanced" in result else text
