r"""Figures of results: what runs say of themselves in log.jsonl and result.json, and accuracies.

diversity, imbalance, curves: (logs, rt) -> drawing.Figure. logs: a list of loading.Log; no network
is loaded. class_accuracy, confusion_matrix, reliability, mistakes, summary: bare figures for report
and summary.
"""
from collections import Counter

import numpy as np

import augment
from analysis import drawing, student_figures
from analysis.drawing import COLORS, TOKENS, Figure, PowerNorm, plt
from analysis.loading import run_log, run_result
from analysis.quantities import BINS
from engine.evaluation import COLUMNS
from engine.networks import short_name
from engine.runtime import UserError


# ---- Over the training ---------------------------------------------------------------------------

def mark_drw(axis, log, color="#888888", text=False):
    """A vertical line at --drw-epoch, where the last stage of the training began.

    Whether the method re-weights classes from then on or not. log: the epochs of run_log.
    """
    switch = next((record["epoch"] for record in log if record["drw"]), 0)
    if switch == 0:
        return
    axis.axvline(switch, color=color, linestyle="--", linewidth=1)
    if text:
        axis.text(switch, 0.98, " drw-epoch", fontsize=8, color="#666666", va="top",
                  transform=axis.get_xaxis_transform())


def diversity(logs, rt):
    """Cosine distance of the final CLS and DIST tokens, and head and tail accuracy of both heads,
    over the training (Figure 4a).

    1 - "cosine" of the log, the mean over test images (engine.evaluation.token_cosine). The paper's
    claim: the tokens diverge, and more so from the DRW epoch on, CLS towards the head classes, DIST
    towards the tail.
    """
    rows, table = [], []
    figure, axes = plt.subplots(2, len(logs), figsize=(max(6.5, 4.2 * len(logs)), 6), squeeze=False,
                                sharey="row", sharex="col", layout="constrained")
    for (top, bottom), run in zip(axes.T, logs):
        log = run_log(run.path)
        run_rows = diversity_rows(run, log)
        if not run_rows:
            raise UserError(f"{run.path} has no distances of CLS and DIST in its log: name runs "
                            "of a student with both")
        epochs = [row["epoch"] for row in run_rows]
        top.plot(epochs, [row["cosine distance"] for row in run_rows], color="black", marker=".")
        for token, name in TOKENS.items():
            for group, line in (("head", "-"), ("tail", "--")):
                bottom.plot(epochs, [row[f"{name} {group} %"] for row in run_rows], line,
                            color=COLORS[token], marker=".", label=f"{name}, {group} classes")
        for axis in (top, bottom):
            mark_drw(axis, log, text=True)
        drawing.label_axes(top, "", "", run.label)
        drawing.label_axes(bottom, "epoch", "")
        drawing.whole_numbers(bottom.xaxis)
        rows += run_rows
        table += first_switch_last(run_rows)
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylim(-3, 103)
    axes[0, 0].set_ylabel("cosine distance of CLS and DIST")
    axes[1, 0].set_ylabel("test accuracy, %")
    drawing.shared_legend(figure, axes[1, 0])
    note = ("Cosine distance: 1 - cos(CLS, DIST) of the two tokens after the last norm, mean over "
            "a tenth of the test images. Dashed vertical: --drw-epoch, from which on images are no "
            "longer mixed (unless by --mix-drw) and the teacher's labels are re-weighted, if the "
            "method re-weights.")
    drawing.finish(figure, "How CLS and DIST diverge", logs, note)
    return Figure(figure, table, rows, note)


def diversity_rows(run, log):
    """A row for each evaluated epoch of a student with both tokens."""
    rows = []
    for record in log:
        if record.get("cosine") is None or not TOKENS.keys() <= record.keys():
            continue
        row = {"run": run.name, "epoch": record["epoch"] + 1, "drw": record["drw"],
               "cosine distance": round(1 - record["cosine"], 4)}
        for token, name in TOKENS.items():
            for group in ("head", "tail"):
                row[f"{name} {group} %"] = record[token][group]
        rows.append(row)
    return rows


def first_switch_last(rows):
    """Of a run's epochs: the first, the last one before re-weighting, and the last."""
    before = [i for i, row in enumerate(rows) if not row["drw"]]
    chosen = {0, before[-1] if before else 0, len(rows) - 1}
    return [rows[i] for i in sorted(chosen)]


def curves(logs, rt):
    """Loss, learning rate and accuracies over the training, a line per run.

    From log.jsonl: the mean training loss of each epoch, its last learning rate, and the test
    accuracies of the prediction. Losses of different methods (or of LDAM and PaCo) are not of one
    kind: compare their course, not their height.
    """
    rows, table, read = [], [], [run_log(run.path) for run in logs]
    columns = shown_columns([record for log in read for record in log])
    panels = {"loss": "training loss", "lr": "learning rate"}
    panels |= {column: f"test accuracy, {column}, %" for column in columns}
    figure, axes = plt.subplots(2, 3, figsize=(11.5, 6.4), layout="constrained")
    for i, (run, log) in enumerate(zip(logs, read)):
        color = drawing.run_color(i)
        run_rows = curve_rows(run, log, columns)
        for axis, column in zip(axes.flat, panels):
            shown = [row for row in run_rows if column in row]
            axis.plot([row["epoch"] for row in shown], [row[column] for row in shown], color=color,
                      marker="." if column in columns else None,
                      label=drawing.join_label(run.label))
            mark_drw(axis, log, color)
        rows += run_rows
        evaluated = [row for row in run_rows if "tail" in row]
        row = (evaluated or run_rows)[-1]
        table.append(row | {"loss": round(row["loss"], 4), "lr": f"{row['lr']:.1e}"}
                     | {column: round(row[column], 1) for column in columns if column in row})
    for axis, (column, name) in zip(axes.flat, panels.items()):
        drawing.label_axes(axis, "epoch", name)
        drawing.whole_numbers(axis.xaxis)
        if column in columns:
            axis.set_ylim(-3, 103)
    axes[0, 1].ticklabel_format(axis="y", scilimits=(0, 0))
    if len(logs) > 1:
        drawing.shared_legend(figure, axes[0, 0])
    note = ("Accuracies: of the prediction (of a student, the average of its heads) on the test "
            "set. Dashed: --drw-epoch, from which on rare classes weigh more, if the method "
            "re-weights, and a student's images are no longer mixed (unless by --mix-drw).")
    drawing.finish(figure, "Training curves", logs, note)
    return Figure(figure, table, rows, note)


def shown_columns(records):
    """Which accuracies of a log's records to draw: on a skewed test set "balanced" for overall."""
    found = [record["avg"] for record in records if "avg" in record]
    skewed = found and all("balanced" in accuracies for accuracies in found)
    return ("balanced", *COLUMNS[1:]) if skewed else COLUMNS


def curve_rows(run, log, columns):
    """A row for each epoch; only those of evaluated epochs have accuracies."""
    rows = []
    for record in log:
        row = {"run": run.name, "epoch": record["epoch"] + 1, "drw": record["drw"],
               "loss": record["loss"], "lr": record["lr"]}
        if "avg" in record:
            row |= {column: record["avg"][column] for column in columns}
        rows.append(row)
    return rows


# ---- Over several runs ---------------------------------------------------------------------------

def imbalance(logs, rt, labels=None):
    """Tail accuracy against the imbalance factor (Figure 1c), a line per label.

    From each run's result.json: the prediction's tail accuracy at the last epoch. Without `labels`,
    runs are labelled by method and model, and by data set and recipe where these differ. Runs of
    one label and one imbalance are repetitions: UserError if two of them have the same seed.
    """
    results = [run_result(run.path, "method", "model", "imb", "seed", "avg") for run in logs]
    fields = ["method", "model", *(name for name in ("dataset", "recipe")
                                   if len({result.get(name) for result in results}) > 1)]
    names = labels or [" ".join(str(result.get(name)) for name in fields) for result in results]
    points = Counter((name, r["imb"], r["seed"]) for name, r in zip(names, results))
    (name, imb, seed), n = points.most_common(1)[0]
    if n > 1:
        raise UserError(f"{n} runs are called {name} at imbalance {imb:g} and have seed {seed}: "
                        "they are no repetitions; tell them apart by --labels")
    rows = [{"series": name, "run": short_name(run.path), "imbalance": result["imb"],
             "seed": result["seed"], "overall %": result["avg"]["overall"],
             "tail %": result["avg"]["tail"]} for name, run, result in zip(names, logs, results)]
    rows.sort(key=lambda row: row["imbalance"])
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    table = []
    for i, name in enumerate(dict.fromkeys(names)):
        points = {}                                                 # imbalance -> tail accuracies
        for row in rows:
            if row["series"] == name:
                points.setdefault(row["imbalance"], []).append(row["tail %"])
        color = drawing.run_color(i)
        axis.plot(list(points), [np.mean(tail) for tail in points.values()], color=color,
                  marker="os^Dv"[i % 5], label=drawing.join_label(name))
        for imb, tail in points.items():
            axis.plot([imb] * len(tail), tail, ".", color=color, markersize=4, alpha=0.6)
            table.append({"series": name, "imbalance": imb, "runs": len(tail),
                          "tail %": round(float(np.mean(tail)), 1), "lowest": round(min(tail), 1),
                          "highest": round(max(tail), 1)})
    ticks = sorted({row["imbalance"] for row in rows})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{imb:g}" for imb in ticks])
    axis.minorticks_off()
    axis.set_ylim(-3, 103)
    drawing.label_axes(axis, "imbalance: images of the largest class / of the smallest",
                       "test accuracy of the tail classes, %")
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    note = ("Small dots: single runs; large marks: their mean. Accuracy of the prediction (of a "
            "student: the average of its heads), at the last epoch.")
    drawing.finish(figure, "Tail accuracy against the imbalance factor", logs, note)
    return Figure(figure, table, rows, note)


# ---- Accuracies of one network -------------------------------------------------------------------

def draw_classes(axis, per_class, data):
    """Accuracy of every head on every class, {head: [K percents]}, most common class first."""
    x = np.arange(len(data.counts))
    for head, name in drawing.head_names(per_class).items():
        axis.plot(x, per_class[head], color=COLORS[head], label=name,
                  marker="o" if len(x) <= 20 else None, linewidth=2.5 if head == "avg" else 1.5)
    axis.set_ylim(0, 100)
    axis.set_ylabel("test accuracy, %")
    if len(x) <= 20:
        drawing.name_classes(axis, data.class_names, data.counts)
    else:
        axis.set_xlabel("class, from most to least common")
    for edge in np.cumsum([len(group) for group in data.groups.values()])[:-1]:
        axis.axvline(edge - 0.5, color="#bbbbbb", linewidth=0.8)
    drawing.legend_above(axis, columns=3)


def draw_curves(axis, log):
    """Test accuracy of the prediction by group over the training, and its DRW epoch."""
    evaluated = [record for record in log if "avg" in record]
    epochs = [record["epoch"] + 1 for record in evaluated]
    for column in shown_columns(log):
        axis.plot(epochs, [record["avg"][column] for record in evaluated], color=COLORS[column],
                  marker=".", label=column)
    mark_drw(axis, log, text=True)
    axis.set_ylim(0, 100)
    axis.set_xlabel("epoch")
    drawing.whole_numbers(axis.xaxis)
    axis.set_ylabel("test accuracy of the prediction, %")
    drawing.legend_above(axis, columns=4, columnspacing=1)


def class_accuracy(results, data):
    """Figure of the accuracies {head: {"per_class": [K percents]}} on every class."""
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    draw_classes(axis, {head: result["per_class"] for head, result in results.items()}, data)
    return figure


LABELLED, NUMBERED = 60, 30      # so many classes have room for their names, and for numbers


def confusion_matrix(confusion, data):
    """Figure of a confusion matrix (K,K): rows truth, columns prediction, percent of each row.

    Names and numbers where there is room for them; of more classes the groups.
    """
    K = len(confusion)
    percent = 100 * confusion.double() / confusion.sum(dim=1, keepdim=True)     # NaN: no test image
    side = min(4 + 0.3 * K, 11)                                                 # inches
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    # The root, for a few percent of a class are worth seeing, and are nearly white otherwise.
    picture = axis.imshow(percent.numpy(), cmap="Blues", interpolation="nearest",
                          norm=PowerNorm(0.5, 0, 100))
    figure.colorbar(picture, ax=axis, label="% of the test images of a class", shrink=0.6)
    edges = np.cumsum([len(group) for group in data.groups.values()])
    for edge in edges[:-1]:
        axis.axvline(edge - 0.5, color="#999999", linewidth=0.6)
        axis.axhline(edge - 0.5, color="#999999", linewidth=0.6)
    if K <= LABELLED:
        names, size = [drawing.short(name) for name in data.class_names], 8 if K <= NUMBERED else 6
        axis.set_xticks(range(K), names, rotation=90, fontsize=size)
        axis.set_yticks(range(K), names, fontsize=size)
    else:
        middles = [sum(group) / len(group) for group in data.groups.values() if group]
        names = [name for name, group in data.groups.items() if group]
        axis.set_xticks(middles, names)
        axis.set_yticks(middles, names, rotation=90, va="center")
        axis.tick_params(length=0)
    if K <= NUMBERED:
        for label, predicted in (percent > 0.5).nonzero().tolist():
            value = float(percent[label, predicted])
            axis.text(predicted, label, f"{value:.0f}", ha="center", va="center",
                      fontsize=8 if K <= 12 else 6, color="white" if value > 40 else "black")
    axis.set_xlabel("predicted class, most to least common")
    axis.set_ylabel("true class, most to least common")
    return figure


def reliability(panels):
    """Figure of reliability diagrams, {title: rows of analysis.quantities.reliability}.

    A bar's height is how often the answers of a bin are right, the diagonal how often they should
    be by their confidence; below, the share of the test images in each bin.
    """
    figure, axes = plt.subplots(2, len(panels), figsize=(4.2 * len(panels), 4.8), squeeze=False,
                                sharex=True, sharey="row", layout="constrained",
                                height_ratios=[3, 1])
    for (top, bottom), (title, rows) in zip(axes.T, panels.items()):
        total, width = sum(n for n, _, _ in rows), 1 / BINS
        for n, confidence, right in rows:
            left = min(int(confidence * BINS), BINS - 1) * width
            top.bar(left, 100 * right, width, align="edge", color=COLORS["cls"], edgecolor="white")
            bottom.bar(left, 100 * n / total, width, align="edge", color="#999999",
                       edgecolor="white")
        top.plot([0, 1], [0, 100], color="black", linewidth=1, linestyle="--")
        drawing.label_axes(top, "", "", title)
        drawing.label_axes(bottom, "probability of the answer", "")
    axes[0, 0].set_xlim(0, 1)
    axes[0, 0].set_ylim(0, 100)
    axes[0, 0].set_ylabel("right, %")
    axes[1, 0].set_ylabel("images, %")
    return figure


def mistakes(images, rows, columns=6):
    """Figure of images, uint8 (n,3,H,W), each under "true", "predicted" and "probability"."""
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(1.9 * columns, 2.5 * lines),
                                squeeze=False, layout="constrained")
    for axis in axes.flat[len(rows):]:
        axis.set_visible(False)
    for axis, image, row in zip(axes.flat, augment.to_float(images), rows):
        title = f"{row['predicted']}\n{100 * row['probability']:.0f} %, but it is\n{row['true']}"
        drawing.show_image(axis, image, title)
    return figure


def summary(subject, result, log, classes=None):
    """A student's run on one page: accuracy per class, over the training, and attention maps.

    subject: a loading.Subject. result: its result.json. log: the epochs of its log.jsonl. classes:
    names of the classes in the result's order, if that may differ from the data's.
    """
    data, columns = subject.data, 10
    if classes and sorted(classes) == sorted(data.class_names):
        order = [classes.index(name) for name in data.class_names]
        per_class = {head: [accuracies[k] for k in order]
                     for head, accuracies in result["per_class"].items()
                     if len(accuracies) == len(classes)}
        result = result | {"per_class": result["per_class"] | per_class}
    for head, accuracies in result["per_class"].items():
        if len(accuracies) != data.num_classes:
            raise UserError(f"{subject.path}: result.json is of another run: it has {head} on "
                            f"{len(accuracies)} classes, the run has {data.num_classes}")
    figure = plt.figure(figsize=(13, 8.2))
    grid = figure.add_gridspec(2, 1, height_ratios=[1.25, 1], hspace=0.32)
    top = grid[0].subgridspec(1, 2, width_ratios=[1.6, 1], wspace=0.16)
    draw_classes(figure.add_subplot(top[0]), result["per_class"], data)
    draw_curves(figure.add_subplot(top[1]), log)
    rows = 1 + subject.net.num_tokens
    axes = grid[1].subgridspec(rows, columns, hspace=0.3, wspace=0.08).subplots()
    index = drawing.example_images(data, drawing.rare_classes(data), columns)
    student_figures.draw_images(axes[0], subject, index)
    student_figures.draw_maps(axes[1:], subject, index)
    for axis in axes[:, len(index):].flat:                  # there are no more test images
        axis.set_visible(False)
    for axis in axes.flat:
        axis.title.set_text(drawing.short(axis.get_title(), 16))        # as wide as a column
    avg, kind = result["avg"], "balanced" if "balanced" in result["avg"] else "overall"
    rare = drawing.rare_group(data)
    title = ("{method} {model} on {dataset}, imbalance {imb:g}, {epochs} epochs: ".format(**result)
             + f"{avg[kind]:.1f} % {kind}, {avg[rare]:.1f} % on the {rare} classes"
             + drawing.few_images(data, rare))
    figure.suptitle(title, fontsize=12, y=0.95)
    figure.text(0.5, 0.065, f"Bottom: test images of the {rare} classes, and where each token looks"
                " (attention rollout; each map has its own scale). Above each map, what that token "
                "predicts, bold when right.",
                ha="center", fontsize=8)
    return figure
