"""How often a network is right on its test set, class by class, and how well it knows that."""
import math

import torch

from analysis import quantities, tables
from analysis.calibration import confidence
from analysis.predict import logits_of
from engine.evaluation import (COLUMNS, SKEWED_COLUMNS, TITLES, class_scores, count_answers,
                               evaluate, evaluate_student, evaluate_teacher, predicted,
                               student_input, with_teacher)

FEW_CLASSES = 30        # that a table in a terminal shows one by one


def accuracies(network, args, data, rt):
    """{head: accuracies} of a Network on the test set, see engine.evaluation.evaluate.

    Of a student with a teacher also the rows of engine.evaluation.with_teacher.
    """
    if network.kind == "teacher":
        return evaluate_teacher(network.net, data, rt)
    results = evaluate_student(network.net, data, args.img_size, args.eval_crop, rt)
    return with_teacher(results, network.net, network.teacher, data, args.img_size, args.eval_crop,
                        rt)


def head_combinations(network, args, data, rt):
    """{name: accuracies} of the heads of a Network, a student, and of ways to combine them."""
    adjusted = getattr(args, "logit_adjustment", False)             # then CLS is balanced already
    counts = None if adjusted else network.counts or data.counts    # that it was trained with

    def predict(x):
        x = student_input(x, args.img_size, args.eval_crop)
        return quantities.combinations(*network.net(x), counts)
    return evaluate(predict, data.test_images, data.test_labels, data.groups, rt)


def class_rows(results, data, answers=None):
    """A row per class: its training images, and every head's accuracy, its recall, in percent.

    With the predicted classes of the test images, answers (N,), also how many of its test images
    are right, the 95 % interval of that, precision and F1, which are NaN where nothing is answered,
    or tested.
    """
    rows = []
    for k, name in enumerate(data.class_names):
        row = {"class": name, "training images": data.counts[k]}
        rows.append(row | {head: result["per_class"][k] for head, result in results.items()})
    if answers is None:
        return rows
    labels = data.test_labels.cpu()
    total = torch.bincount(labels, minlength=data.num_classes)
    right, given = count_answers(answers, labels, data.num_classes)
    scores = torch.stack(class_scores(right, given, total), dim=1).tolist()             # (K,3)
    for row, n, hits, (recall, precision, f1) in zip(rows, total.tolist(), right.tolist(), scores):
        low, high = quantities.wilson(hits, n)
        f1 = f1 if n else math.nan
        row |= {"test images": n, "right": hits, "recall": round(recall, 2),
                "recall low": round(low, 2), "recall high": round(high, 2),
                "precision": round(precision, 2), "F1": round(f1, 2)}
    return rows


def class_text(rows, path):
    """The rows of a few classes as a table; else a line that says where they are.

    rows: of class_rows, with answers. path: the file that they are written to.
    """
    if len(rows) > FEW_CLASSES:
        few = sum(0 < row["test images"] < 100 for row in rows)
        return (f"{path} has the 95 % interval of the recall of each of the {len(rows)} classes; "
                f"{few} of them have fewer than 100 test images")
    lines = []
    for row in rows:
        low, high = row["recall low"], row["recall high"]
        interval = "-" if math.isnan(low) else f"{low:.1f} to {high:.1f}"
        scores = {name: round(row[name], 1) for name in ("recall", "precision", "F1")}
        lines.append({"class": row["class"], "training images": row["training images"],
                      "test images": row["test images"], "right": row["right"]} | scores
                     | {"95 % interval of recall": interval})
    return tables.as_text(lines)


def test_logits(network, data, rt):
    """Logits (N,K) of a Network's prediction on the test set, on the CPU."""
    return logits_of(network, data.test_images, torch.arange(len(data.test_labels)), rt)


def uncertainty_text(logits, labels, groups, binary=False):
    """Error bars and confidence of logits (N,K) with labels (N,), two lines for people.

    binary: the loss was a binary cross-entropy for each class, so that a softmax was never learned.
    """
    mean = confidence(logits).mean()
    answers = predicted(logits)
    low, high = quantities.bootstrap(answers, labels, groups)
    tests = torch.bincount(labels, minlength=logits.shape[1])
    names = COLUMNS if tests.min() == tests.max() else SKEWED_COLUMNS
    ranges = ", ".join(f"{TITLES.get(name, name)} {low[name]:.1f} to {high[name]:.1f}"
                       for name in names if name in low)
    text = ("95 % bootstrap intervals (1,000 resamplings of each class's test images, for means "
            f"over classes of the classes too): {ranges}\n"
            f"mean confidence {100 * mean:.1f} %")
    if binary:
        text += ", by the softmax; the loss was a binary cross-entropy for each class"
    return text


def confusion(predicted, labels, num_classes):
    """How often each class (row) is predicted as each class (column): (N,), (N,) -> (K,K).

    Without the images that are predicted as none, -1.
    """
    K = num_classes
    predicted, labels = predicted[predicted >= 0], labels[predicted >= 0]
    return torch.bincount(labels * K + predicted, minlength=K * K).view(K, K)


def confusion_rows(confusion, class_names):
    """A row for each true class and another that is predicted for it, the most frequent first.

    confusion (K,K): see above. "of": the class's test images, predicted as any class.
    """
    totals, wrong = confusion.sum(dim=1).tolist(), confusion.clone().fill_diagonal_(0)
    rows = []
    for label, answer in wrong.nonzero().tolist():
        n = int(wrong[label, answer])
        rows.append({"class": class_names[label], "predicted": class_names[answer], "images": n,
                     "of": totals[label], "%": round(100 * n / totals[label], 1)})
    return sorted(rows, key=lambda row: (-row["images"], -row["%"]))


def confusions_text(rows, n=5):
    """The most frequent confusions, a line for people."""
    if not rows:
        return "no test image is predicted as another class"
    pairs = [f"{row['class']} as {row['predicted']} ({row['images']} of {row['of']})"
             for row in rows[:n]]
    return "most frequent confusions (true class as predicted class): " + ", ".join(pairs)


def confident_mistakes(answers, confidence, data, n):
    """(Up to) n test images with wrong answers, the surest first: their indices, and a row each.

    answers, confidence (N,): the predicted classes and their probabilities. Answers of -1, none,
    are left out.
    """
    wrong = ((answers != data.test_labels.cpu()) & (answers >= 0)).nonzero()[:, 0]
    index = wrong[confidence[wrong].argsort(descending=True, stable=True)[:n]]
    labels, names = data.test_labels.cpu()[index].tolist(), data.class_names
    return index, [{"true": names[label], "predicted": names[answer], "probability": round(p, 4)}
                   for label, answer, p in zip(labels, answers[index].tolist(),
                                               confidence[index].tolist())]
