r"""Look inside a trained network: the paper's figures, from a run folder or a published checkpoint, in one command each.

    python analyze.py eval       RUN             accuracies of every head, overall and per class; of a teacher too
    python analyze.py eval       --checkpoint FILE --dataset cifar10 --imb 100         the same of a file (see networks.py)
    python analyze.py heads      RUN             ways to make one prediction of CLS and DIST, compared
    python analyze.py summary    RUN             one picture: who knows which classes, the training, where the tokens look
    python analyze.py report     RUN             one HTML page with all of this that applies
    python analyze.py predict    --checkpoint RUN IMAGES ...       classes of your own pictures: files, folders or patterns
    python analyze.py export     RUN             the network for other programs: torch.export, and ONNX (see predict.py)

    python analyze.py attention  RUN ...         where CLS and DIST look, on images of the rarest classes        Figures 1a, 5
    python analyze.py distance   RUN ...         how far the heads of each block look                            Figure 4b
    python analyze.py rank       RUN ...         how many directions the features of each block fill             Figures 1b, 4c
    python analyze.py entropy    TEACHER ...     how sure a teacher is of what its student asks                  Figure 3
    python analyze.py sharpness  TEACHER ...     how fast a teacher's loss rises around its weights              Section 3.2
    python analyze.py diversity  RUN ...         how CLS and DIST part during the training                       Figure 4a
    python analyze.py imbalance  RUN ...         tail accuracy against the imbalance                             Figure 1c
    python analyze.py curves     RUN ...         loss, learning rate and accuracies over the training
    python analyze.py runs       RUN ...         a line of markdown for each finished run: accuracies, seed, time, command
    python analyze.py augment    RUN             what the student trains on, with the teacher's labels           Figure 2

RUN, TEACHER: run folder or checkpoint file; for eval, entropy and report also several teachers joined by commas, as one;
`...`: several make one picture. diversity, imbalance, curves, runs need no checkpoint. Each prints a table (runs: no more) and
writes a PNG of its name (heads: none) and, with its numbers, a CSV (rank: JSON) beside it, into the first run's folder or
beside the file, unless --out says where. What is measured is in quantities.py, how it is drawn in figures.py, which needs
matplotlib.
"""
import argparse
import csv
import json
import math
import os
import sys
from io import StringIO
from math import inf

import torch

import augment
import data_lt
import engine
import figures
import predict
import quantities
import report
import run_folder
import train_student
import train_teacher
from figures import Log, Subject
from networks import NORMALISATIONS, Mirrored, load_network, match_classes


# ---- Loading -------------------------------------------------------------------------------------------------------------

def load(path, rt, options=None):
    """Run folder or checkpoint -> (Network in evaluation mode on the device, its settings, its data).

    Several teachers joined by commas are one (train_teacher.Committee), with the settings of the first. A file from elsewhere
    has no settings: the data are what `options` (command line) say, CIFAR by default, and test images are resized and cropped
    as usual for its size. Raises UserError for a file that is not understood or does not fit the data.
    """
    files, own = train_teacher.members(path), (getattr(options, "norm", None), getattr(options, "size", None))
    if len(files) > 1 and not getattr(options, "out", None):
        raise engine.UserError(f"{path}: of several, say where the output goes by --out")
    found = load_network(files[0], *own)
    if not found.config and not getattr(options, "dataset", None) and found.num_classes not in (10, 100):
        raise engine.UserError(f"{path} knows {found.num_classes} classes, neither CIFAR's 10 nor 100: name its --dataset")
    dataset = "cifar100" if found.num_classes == 100 else "cifar10"
    assumed = {"dataset": dataset, "imb": 100.0, "imb_type": "exp", "data_dir": "data", "img_size": found.net.img_size,
               "holdout": None, "train_list": None, "test_list": None, "skip_bad": True, "policy": "rand",
               "eval_crop": found.net.img_size / predict.decoded_size(found)}
    given = {key: value for key in DATA_FLAGS if (value := getattr(options, key, None)) is not None}
    args = argparse.Namespace(**assumed | found.config | given)
    sizes = (args.img_size, getattr(args, "eval_crop", 1)) if args.dataset in ("folder", *data_lt.LISTS) else ()
    loaded, key = getattr(options, "loaded", {}), (*(getattr(args, key) for key in DATA_FLAGS), *sizes)
    data = loaded[key] = loaded.get(key) or engine.load_data(args, rt)    # several runs on the same data read them once
    if len(files) > 1:
        found.net, found.what = train_teacher.load_teacher(path, data, rt, *own)
    else:
        match_classes(found, data, path)
    mirror_if_asked(found, options)
    if found.data and found.data != data.fingerprint and not given:
        print(f"{path}: its images have changed since it was trained; some that are tested may have been trained on",
              file=sys.stderr)
    found.net.to(rt.device)
    return found, args, data


def mirror_if_asked(found, options):
    """Make of a Network, with --mirror, the mean over an image and its mirror image."""
    if getattr(options, "mirror", False):
        found.net, found.what = Mirrored(found.net).eval(), f"{found.what}; image and mirror image"


DATA_FLAGS = ("dataset", "imb", "imb_type", "data_dir", "holdout", "train_list", "test_list")


def load_student(path, rt, options=None):
    """As load, but (the student itself, its settings, its data); raises UserError for a teacher."""
    found, args, data = load(path, rt, options)
    if found.kind != "student":
        raise engine.UserError(f"{path} is not a student: it is {found.what}")
    return found.net, args, data


def students(options, rt):
    """The runs as Subjects; raises UserError for a teacher."""
    return [Subject(label, path, *load_student(path, rt, options)) for label, path in zip(labels(options), options.runs)]


def teachers(options, rt):
    """The runs as Subjects; raises UserError for a student."""
    out = []
    for label, path in zip(labels(options), options.runs):
        found, args, data = load(path, rt, options)
        if found.kind != "teacher":
            raise engine.UserError(f"{path} is not a teacher: it is {found.what}")
        out.append(Subject(label, path, found.net, args, data))
    return out


def logs(options, rt):
    """The runs as Logs; nothing is loaded."""
    return [Log(label, path) for label, path in zip(labels(options), options.runs)]


def labels(options):
    """What the runs are called in a picture: --labels, or what sets their names apart; nothing if there is only one."""
    if options.labels:
        return options.labels
    names = [train_teacher.name_of(path) for path in options.runs]
    if len(names) == 1:
        return [""]
    common = set.intersection(*(set(name.split("_")) for name in names))
    short = ["_".join(part for part in name.split("_") if part not in common) for name in names]
    return short if all(short) and len(set(short)) == len(short) else names


def beside(path, name):
    """Where an output called `name` goes: into the run folder, or beside the checkpoint file, with its name in front."""
    return os.path.join(path, name) if os.path.isdir(path) else f"{os.path.splitext(path)[0]}_{name}"


# ---- Writing -------------------------------------------------------------------------------------------------------------

def as_text(rows):
    """Rows as an aligned text table, numbers to the right."""
    cells = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    align = [str.ljust if isinstance(v, str) else str.rjust for v in rows[0].values()]
    return "\n".join("  ".join(put(c, w) for put, c, w in zip(align, line, widths)).rstrip() for line in cells)


def as_csv(rows):
    text = StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(path, content):
    run_folder.write_atomically(path, lambda f: f.write(content if isinstance(content, bytes) else content.encode()))
    return path


def write_analysis(analysis, path):
    """The picture at `path` and its numbers beside it; returns both paths."""
    stem, as_rows = path.removesuffix(".png"), isinstance(analysis.numbers, list)
    numbers = as_csv(analysis.numbers) if as_rows else json.dumps(analysis.numbers, indent=1) + "\n"
    return write(stem + ".png", figures.as_png(analysis.figure)), write(stem + (".csv" if as_rows else ".json"), numbers)


# ---- Commands ------------------------------------------------------------------------------------------------------------

ANALYSES = {  # command -> what draws it, how its runs are loaded
    "attention": (figures.attention, students),
    "distance": (figures.distance, students),
    "rank": (figures.rank, students),
    "entropy": (figures.entropy, teachers),
    "sharpness": (figures.sharpness, teachers),
    "diversity": (figures.diversity, logs),
    "imbalance": (figures.imbalance, logs),
    "curves": (figures.curves, logs),
    "augment": (figures.augmented, students),
}


def command_runs(options, rt):
    cells = ["run", "data", *engine.COLUMNS, "epochs", "seed", "minutes", "hardware", "date", "command"]
    print(f"| {' | '.join(cells)} |\n{'| --- ' * len(cells)}|")
    for path in options.runs:
        if not os.path.exists(os.path.join(path, "result.json")):
            print(f"{path}: no finished run", file=sys.stderr)
            continue
        r = figures.read_json(path, "result.json")
        accuracies = ["-" if math.isnan(r["avg"][c]) else f"{r['avg'][c]:.1f}" for c in engine.COLUMNS]
        print("|", " | ".join([f"`{train_teacher.name_of(path)}`", f"{r['dataset']}, imb {r['imb']:g}", *accuracies,
                               str(r["epochs"]), str(r["seed"]), f"{r['seconds'] / 60:.0f}", r["hardware"], r.get("date", ""),
                               f"`{r['command']}`"]), "|")


def analyse(name, options, rt):
    """One of ANALYSES on the runs of the command line -> figures.Analysis."""
    draw, read = ANALYSES[name]
    return draw(read(options, rt), options, rt)


def command_analysis(options, rt):
    analysis = analyse(options.command, options, rt)
    print(as_text(analysis.table))
    for path in write_analysis(analysis, options.out or beside(options.runs[0], f"{options.command}.png")):
        print(path)


def evaluated(found, data, args, rt):
    """{head: accuracies} of a student or a teacher on the test set."""
    if found.kind == "student":
        return train_student.evaluate(found.net, None, data, args, rt)
    return train_teacher.evaluate(found.net, data, rt)


def class_rows(results, data):
    """A row per class: its training images and every head's accuracy in percent."""
    return [{"class": name, "training images": data.counts[k], **{head: r["per_class"][k] for head, r in results.items()}}
            for k, name in enumerate(data.class_names)]


def test_logits(found, data, args, rt, batch=500):
    """Logits (N,K) of a network's prediction on the test set, on the CPU."""
    model, out = predict.Predictor(found), []
    with torch.no_grad():
        for index in torch.arange(len(data.test_labels), device=rt.device).split(batch):
            x = augment.to_float(data.test_images[index])
            x = train_student.test_images(x, args) if model.student else train_teacher.teacher_images(x, found.net)
            with rt.autocast():
                out.append(model(x).float().cpu())
    return torch.cat(out)


def command_eval(options, rt):
    path, = options.runs
    found, args, data = load(path, rt, options)
    print(f"{path}: {found.what}; on {engine.describe(data, args)}")
    results = evaluated(found, data, args, rt)
    print(engine.tables(results, found.kind, data))
    logits, labels = test_logits(found, data, args, rt), data.test_labels.cpu()
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    low, high = quantities.bootstrap(predicted == labels, labels, data.groups)
    ranges = ", ".join(f"{name} {low[name]:.1f} to {high[name]:.1f}" for name in low)
    print(f"95 % of 1,000 resamplings of the test images: {ranges}")
    error = quantities.calibration_error(confidence, predicted == labels)
    print(f"mean confidence {100 * confidence.mean():.1f} %, expected calibration error {100 * error:.1f} points"
          + ", by the softmax; it was trained with a yes or no for each class" * (found.config.get("cls_loss") == "bce"))
    if found.kind == "teacher":
        print(train_teacher.say_on_training_images(train_teacher.on_training_images(found.net, data, rt)))
    out = options.out or beside(path, "per_class.csv")
    print(write(out, as_csv(class_rows(results, data))))
    K = data.num_classes
    confusion = torch.bincount(labels * K + predicted, minlength=K * K).view(K, K)
    picture = figures.as_png(figures.confusion_figure(confusion, data, f"{train_teacher.name_of(path)} on {data.label}"))
    stem = os.path.splitext(out)[0]
    print(write(stem.removesuffix("per_class") + "_" * (not stem.endswith("per_class")) + "confusion.png", picture))


def command_heads(options, rt):
    path, = options.runs
    net, args, data = load_student(path, rt, options)
    if not net.distilled:
        raise engine.UserError(f"{path} has no DIST token")
    counts = None if getattr(args, "adjust", "none") in ("cls", "both") else data.counts
    ways = lambda x: quantities.combinations(*net(train_student.test_images(x, args)), counts)
    results = engine.evaluate(ways, data.test_images, data.test_labels, data.groups, rt)
    print(engine.table(results, engine.describe(data, args).partition(",")[0] + ")"))
    print(write(options.out or beside(path, "heads.csv"), as_csv(class_rows(results, data))))


def command_predict(options, rt):
    if not options.checkpoint:
        raise engine.UserError("predict needs --checkpoint RUN, then images")
    found = load_network(options.checkpoint, options.norm, options.size)
    mirror_if_asked(found, options)
    found.net.to(rt.device)
    rows = predict.predict(found, options.runs, rt, options.topk)
    for row in rows:
        ranked = list(row.values())[1:]
        print(f"{row['image']}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in zip(ranked[::2], ranked[1::2])))
    if options.csv:
        print(write(options.csv, as_csv(rows)))


def command_export(options, rt):
    path, = options.runs
    found = load_network(path, options.norm, options.size)
    mirror_if_asked(found, options)
    print("\n".join(predict.export(found, (options.out or beside(path, "model")).removesuffix(".pt2"))))


def summary(folder, out=None):
    """One picture of a finished run; returns its path."""
    rt = engine.Runtime(torch.device("cpu"))                              # alone, also when called by one of several processes
    subject = Subject("", folder, *load_student(folder, rt))
    figure = figures.summary(subject, figures.read_json(folder, "result.json"), figures.read_log(folder))
    return write(out or os.path.join(folder, "summary.png"), figures.as_png(figure))


def command_summary(options, rt):
    path, = options.runs
    print(summary(path, options.out))


# ---- Report --------------------------------------------------------------------------------------------------------------

REPORTED = {  # analysis -> its heading; those that do not fit a run are left out
    "student": {"curves": "The course of the training", "diversity": "How CLS and DIST part",
                "attention": "Where the tokens look", "distance": "How far the heads look", "rank": "Rank of the features",
                "augment": "What the student trains on"},
    "teacher": {"curves": "The course of the training", "entropy": "How sure the teacher is",
                "sharpness": "Flatness of the minimum"},
}


def command_report(options, rt):
    """One HTML page of a run or a file: result, every analysis that applies, settings."""
    path, = options.runs
    found, args, data = load(path, rt, options)
    results = evaluated(found, data, args, rt)
    shown = results if "dist" in results else {"avg": results["avg"]}
    table = [{"prediction of": figures.NAMES[head] if len(shown) > 1 else "the network",
              **{f"{c} %": round(r[c], 1) for c in engine.COLUMNS}} for head, r in shown.items()]
    means = "Accuracy on the test set; head, mid and tail are means over the classes of a group."
    sections = [report.Section("Result", means, table),
                report.Section("Accuracy per class", "", class_rows(results, data),
                               figures.as_png(figures.class_figure(results, data)), folded=True)]
    left_out = []
    for name, heading in REPORTED[found.kind].items():
        rt.print(f"{name} ...")
        try:
            analysis = analyse(name, options, rt)
        except engine.UserError as error:
            left_out.append({"analysis": name, "why": str(error)})
            continue
        picture = figures.as_png(figures.without_words(analysis.figure))
        sections.append(report.Section(heading, analysis.note, analysis.table, picture, folded=True))
    settings = [{"setting": key, "value": str(value)} for key, value in sorted(found.config.items())]
    sections += [report.Section("Settings", "", settings)] if settings else []
    sections += [report.Section("Left out", "What does not apply to this file.", left_out)] if left_out else []
    page = report.page(train_teacher.name_of(path), f"{found.what}; on {engine.describe(data, args)}.", sections)
    print(write(options.out or beside(path, "report.html"), page))


ONE_RUN = {"eval": command_eval, "heads": command_heads, "summary": command_summary, "report": command_report,
           "augment": command_analysis, "export": command_export}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = dict.fromkeys(ANALYSES, command_analysis) | ONE_RUN | {"predict": command_predict, "runs": command_runs}
    parser.add_argument("command", choices=commands)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folder or checkpoint file (summary: a finished run folder)")
    parser.add_argument("--checkpoint", help="the same, as a flag")
    parser.add_argument("--out", help="file to write (default: in the first run's folder, or beside the file)")
    parser.add_argument("--topk", type=int, default=5, help="predict: classes to name (default: %(default)s)")
    parser.add_argument("--csv", help="predict: file to write the predictions to")
    parser.add_argument("--mirror", action="store_true", help="eval, predict, export: the mean over an image and its mirror "
                        "image, for twice the work")
    parser.add_argument("--labels", nargs="+", help="what the runs are called in a picture, one for each")
    parser.add_argument("--classes", nargs="+", help="test images of these classes (default: of the tail classes)")
    parser.add_argument("--index", nargs="+", type=int, help="attention: these test images, by their numbers")
    parser.add_argument("--columns", type=int, default=8, help="attention, augment: images to show (default: %(default)s)")
    parser.add_argument("--images", type=int, help="images to measure on (default: the analysis's own number, a sixth of "
                        "it for a ViT of more than 64 px)")
    parser.add_argument("--seed", type=int, default=0, help="which example images, which random directions")
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
    options = parser.parse_intermixed_args()
    if options.checkpoint and options.command != "predict":
        options.runs.append(options.checkpoint)
    if not options.runs or (options.command in ONE_RUN and len(options.runs) > 1):
        parser.error("name one run folder or checkpoint file" + " or more" * (options.command not in ONE_RUN))
    if options.mirror and options.command not in ("eval", "predict", "export"):
        parser.error(f"--mirror is for eval, predict and export, not for {options.command}")
    if options.labels and len(options.labels) != len(options.runs):
        parser.error(f"--labels needs one name for each of the {len(options.runs)} runs")
    engine.check_ranges(options, columns=(1, 100), topk=(1, inf), **{"images": (1, inf)} if options.images is not None else {})
    options.loaded = {}                                                   # data sets read so far
    commands[options.command](options, engine.setup(options.device))


if __name__ == "__main__":
    engine.run_main(main)
