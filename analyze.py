r"""Look inside a trained network: the paper's figures and more, one command each.

    python analyze.py eval RUN             accuracies per class; calibrates predict and export
    python analyze.py heads RUN            ways to combine CLS and DIST into one prediction
    python analyze.py summary RUN          one picture: classes, training, where the tokens look
    python analyze.py report RUN           one HTML page with all of this that applies
    python analyze.py predict --checkpoint RUN IMAGES ...           classes of your own pictures
    python analyze.py export RUN           the network for other programs: torch.export and ONNX

    python analyze.py attention RUN ...    where CLS and DIST look, on rare classes     Fig. 1a, 5
    python analyze.py distance RUN ...     how far the heads of each block look         Fig. 4b
    python analyze.py rank RUN ...         how many directions the features span        Fig. 1b, 4c
    python analyze.py augment RUN          training images and the teacher's labels     Fig. 2
    python analyze.py agreement RUN ...    how often a student says what its teacher says
    python analyze.py entropy RUN ...      how sure a teacher is of what it labels      Fig. 3
    python analyze.py sharpness RUN ...    how fast a teacher's loss rises around it    Sec. 3.2
    python analyze.py diversity RUN ...    how CLS and DIST diverge over the training   Fig. 4a
    python analyze.py imbalance RUN ...    tail accuracy against the imbalance          Fig. 1c
    python analyze.py curves RUN ...       loss, learning rate, accuracies by epoch

    python analyze.py runs RUN ...         a line of markdown for each finished run
    python analyze.py tensorboard RUN ...  the log as event files for TensorBoard

RUN: a run folder, of a student or a teacher, or a checkpoint file, of this project or published
(engine/networks.py); for eval, predict, export and report several networks joined by commas (a
student and its teacher, several teachers) predict together. `...`: several make one picture.
diversity, imbalance, curves, runs and tensorboard need no checkpoint. Each figure prints a table
and writes NAME.png and, with its numbers, NAME.csv (rank: .json), eval per_class.csv and
confusion.csv, into the first run's folder or beside the file unless --out says where; eval and
export with --mirror: mirror_NAME. Figures, report and summary need matplotlib, nothing else does.
"""
import os
import re
from math import inf

import torch

import data_lt
from analysis import accuracy, calibration, loading, priors, tables, tensorboard
from analysis.loading import DATA_FLAGS
from analysis.predict import export, predict, prediction_text
from engine.datasets import describe
from engine.evaluation import (predicted, table as accuracy_table, tables as accuracy_tables,
                               teacher_summary, teacher_summary_text)
from engine.networks import NORMALISATIONS, short_name, teacher_files
from engine.records import read_json
from engine.runtime import Runtime, UserError, run_main, setup
from engine.settings import Parser, check_ranges, flag, group_limits
from images.files import class_name, shown


# ---- Commands that print or write numbers --------------------------------------------------------

def command_eval(options, rt):
    path, = options.runs
    out, flags = output_path(options, "per_class.csv"), load_flags(options)
    network, args, data = loading.load(path, rt, **flags)
    if options.test_prior:
        prior = priors.test_prior(options.test_prior, data, network.counts or data.counts)
    rt.print(f"{path}: {network.what}; on {describe(data, args)}")
    results = accuracy.accuracies(network, args, data, rt)
    rt.print(accuracy_tables(results, network.kind, data))
    logits, labels = accuracy.test_logits(network, data, rt), data.test_labels.cpu()
    binary = network.config.get("method") == "deit-iii"
    rt.print(accuracy.uncertainty_text(logits, labels, data.groups, binary))
    calibrated = calibration.calibrate(network, args, data, rt, logits)
    rt.print(calibrated.text)
    if options.test_prior:
        rt.print(priors.prior_text(options.test_prior, prior, network.configs or [network.config],
                                   network.counts, logits, labels, data,
                                   calibrated.temperatures))
    class_rows = accuracy.class_rows(results, data, predicted(logits))
    rt.print(accuracy.class_text(class_rows, out))
    confusion = accuracy.confusion(predicted(logits), labels, data.num_classes)
    confused = accuracy.confusion_rows(confusion, data.class_names)
    rt.print(accuracy.confusions_text(confused))
    if network.kind == "teacher":
        rt.print(teacher_summary_text(teacher_summary(network.net, data, rt)))
    rt.print(tables.write(out, tables.as_csv(class_rows)))
    confusion_csv = tables.as_csv(confused) if confused else "class,predicted,images,of,%\n"
    if not tables.is_device(out):                                       # /dev/null, /dev/stdout
        rt.print(tables.write(confusion_path(out), confusion_csv))
    changed = network.data and network.data != data.fingerprint
    if changed or loading.names_other_data(network, flags["data_flags"]):
        rt.print("the temperature is not saved for predict and export: these may not be the data "
                 "that the network was trained on")
        return
    try:
        rt.print(calibration.save(path, network, calibrated))
    except UserError as error:                  # somebody else's folder: the rest is done
        rt.print(f"predict cannot use the temperature: {error}")


def confusion_path(out):
    """per_class.csv -> confusion.csv, x_per_class.csv -> x_confusion.csv, y -> y_confusion.csv"""
    stem = os.path.splitext(out)[0]
    if stem.endswith("per_class"):
        return stem.removesuffix("per_class") + "confusion.csv"
    return f"{stem}_confusion.csv"


def command_heads(options, rt):
    path, = options.runs
    out = output_path(options, "heads.csv")
    network, args, data = loading.load(path, rt, **load_flags(options))
    if network.kind != "student" or not network.net.distilled:
        raise UserError(f"{path} has no DIST token: it is {network.what}")
    results = accuracy.head_combinations(network, args, data, rt)
    rt.print(accuracy_table(results, f"{data.label} (imb {data.imb:.4g})"))
    rt.print(tables.write(out, tables.as_csv(accuracy.class_rows(results, data))))


def command_predict(options, rt):
    if not options.checkpoint:
        raise UserError("predict needs --checkpoint RUN, then images")
    run, images = options.checkpoint, options.runs
    network = loading.load_alone(run, rt, options.norm, options.size, options.mirror)
    temperature = calibration.load_temperature(run, network)
    rows = []
    for row in predict(network, images, rt, options.topk, temperature=temperature,
                       min_probability=options.min_probability):
        rt.print(prediction_text(row))
        rows.append(row)
    if options.csv:
        rt.print(tables.write(options.csv, tables.as_csv(rows)))


def command_export(options, rt):
    path, = options.runs
    stem = re.sub(r"\.(pt2|onnx|json)$", "", output_path(options, "model"))
    network = loading.load_alone(path, rt, options.norm, options.size, options.mirror)
    temperature = calibration.load_temperature(path, network)
    rt.print("\n".join(export(network, stem, temperature)))


def command_runs(options, rt):
    tables.print_runs(options.runs, rt)


def command_tensorboard(options, rt):
    names = [short_name(path) for path in options.runs]
    twice = [name for name in names if names.count(name) > 1]
    if options.out and twice:
        raise UserError(f"two of the runs are called {twice[0]}, and would be one in {options.out}")
    for path, name in zip(options.runs, names):
        folder = os.path.join(options.out, name) if options.out else path
        tensorboard.write_events(path, folder)
        rt.print(f"tensorboard --logdir {folder}")


# ---- Commands that draw: they import matplotlib --------------------------------------------------

def command_figure(options, rt):
    from analysis import figures
    out = output_path(options, f"{options.command}.png")
    figure = figures.draw(options.command, options.runs, rt, options.labels, vars(options),
                          load_flags(options))
    rt.print(tables.as_text(figure.table))
    rt.print(figure.note)
    for path in figure.save(out):
        rt.print(path)


def command_report(options, rt):
    from analysis import report
    path, = options.runs
    out, flags = output_path(options, "report.html"), load_flags(options)
    network, args, data = loading.load(path, rt, **flags)
    page = report.build(path, network, args, data, rt, options.labels, vars(options), flags)
    rt.print(tables.write(out, page))


def command_summary(options, rt):
    path, = options.runs
    rt.print(summary(path, output_path(options, "summary.png"), **load_flags(options)))


def summary(folder, out=None, **flags):
    """One picture of a student's finished run; returns its path. flags: of loading.load."""
    from analysis import drawing, run_figures
    result = loading.run_result(folder, "method", "model", "dataset", "imb", "epochs", "avg",
                                "per_class")
    log = loading.run_log(folder)
    rt = Runtime(torch.device("cpu"))       # alone, also when one of several processes calls it
    subject = loading.Subject("", folder, *loading.load_kind("student", folder, rt, **flags))
    classes = read_json(folder, "config.json").get("classes")
    figure = run_figures.summary(subject, result, log, classes)
    return tables.write(out or os.path.join(folder, "summary.png"), drawing.as_png(figure))


# ---- Flags ---------------------------------------------------------------------------------------

COMMANDS = {
    "eval": command_eval, "heads": command_heads, "summary": command_summary,
    "report": command_report, "predict": command_predict, "export": command_export,
    "attention": command_figure, "distance": command_figure, "rank": command_figure,
    "augment": command_figure, "agreement": command_figure, "entropy": command_figure,
    "sharpness": command_figure, "diversity": command_figure, "imbalance": command_figure,
    "curves": command_figure, "runs": command_runs, "tensorboard": command_tensorboard,
}
ONE_RUN = ("eval", "heads", "summary", "report", "export", "augment")
ONLY_FOR = {"mirror": ("eval", "predict", "export"), "test_prior": ("eval",), "csv": ("predict",),
            "topk": ("predict",), "min_probability": ("predict",)}


def parse():
    parser = Parser(__doc__)
    parser.usage = "python %(prog)s COMMAND RUN ... [--flag value ...]"
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the above")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folder or checkpoint file")
    parser.add_argument("--checkpoint", metavar="RUN", help="the same, as a flag: predict needs it")
    parser.add_argument("--out", metavar="FILE", help="output file or folder [beside the run]")
    parser.add_argument("--topk", type=int, metavar="N", help="predict: classes [5]")
    parser.add_argument("--min-probability", type=float, metavar="P", help="predict: the answer is "
                        "'unsure' below this probability, 0 to 1")
    parser.add_argument("--csv", metavar="FILE", help="predict: write the predictions here too")
    parser.add_argument("--mirror", action="store_true", help="eval, predict, export: average over "
                        "an image and its mirror image, for twice the work")
    parser.add_argument("--labels", nargs="+", metavar="NAME",
                        help="names of the runs in a picture")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="attention, distance, rank: "
                        "test images of these classes [the tail classes]")
    parser.add_argument("--index", nargs="+", type=int, metavar="N",
                        help="attention: these test images, by their numbers")
    parser.add_argument("--columns", type=int, default=8, metavar="N",
                        help="attention, augment: images to show [8]")
    parser.add_argument("--images", type=int, metavar="N", help="images to measure on [as many as "
                        "the figure needs; a sixth of them for a ViT of more than 64 px]")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of the choice of example images and random directions [0]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    data = parser.add_argument_group("data [the run's; for other files CIFAR]")
    data.add_argument("--dataset", choices=data_lt.DATASETS, metavar="NAME",
                      help=", ".join(data_lt.DATASETS))
    data.add_argument("--imb", type=float, metavar="N", help="imbalance n_max / n_min")
    data.add_argument("--imb-type", choices=("exp", "step"), metavar="TYPE", help="exp or step")
    data.add_argument("--data-dir", metavar="DIR")
    data.add_argument("--holdout", type=float, metavar="SHARE")
    data.add_argument("--holdout-by", metavar="GROUP")
    data.add_argument("--train-list", metavar="FILE")
    data.add_argument("--test-list", metavar="FILE")
    data.add_argument("--list-columns", metavar="NAMES")
    data.add_argument("--groups", type=group_limits, metavar="A,B")
    data.add_argument("--test-prior", metavar="PRIOR", help="eval: weight the test images to these "
                      "class frequencies, and adjust the logits: uniform, train, or a CSV file")
    network = parser.add_argument_group("network [as recognised], for files from elsewhere")
    network.add_argument("--norm", choices=NORMALISATIONS, metavar="NAME",
                         help=f"pixel statistics: {', '.join(NORMALISATIONS)}")
    network.add_argument("--size", type=int, metavar="N", help="side of a CNN's images, pixels")
    options = parser.parse_intermixed_args()
    if options.checkpoint and options.command != "predict":
        options.runs.append(options.checkpoint)
    if options.command in ONE_RUN and len(options.runs) != 1:
        parser.error("name one run folder or checkpoint file")
    if not options.runs:
        parser.error("name the images: files, folders or patterns" if options.command == "predict"
                     else "name one run folder or checkpoint file, or more")
    for name, commands in ONLY_FOR.items():
        given = getattr(options, name)
        if given is not None and given is not False and options.command not in commands:
            parser.error(f"{flag(name)} is for {', '.join(commands)}, not for {options.command}")
    options.topk = 5 if options.topk is None else options.topk
    if options.out and options.command in ("predict", "runs"):
        parser.error("--out is not for predict, where it is --csv, nor for runs")
    if options.labels:
        options.labels = [shown(label) for label in options.labels]
    if options.classes:
        options.classes = [class_name(name) for name in options.classes]
    if options.labels and len(options.labels) != len(options.runs):
        parser.error(f"--labels needs one name for each of the {len(options.runs)} runs")
    check_ranges(options, columns=(1, 100), topk=(1, inf), seed=(0, 10 ** 9))
    if options.min_probability is not None:
        check_ranges(options, min_probability=(0, 1))
    if options.images is not None:
        check_ranges(options, images=(1, inf))
    return options


def load_flags(options):
    """The flags that loading.load takes."""
    given = {name: getattr(options, name) for name in DATA_FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    return dict(data_flags=given, norm=options.norm, size=options.size, mirror=options.mirror)


def output_path(options, name):
    """--out, or `name` in it if it is a folder; else `name` in the first run's folder, or beside a
    file: x.pth -> x_name. With --mirror: mirror_name. Of several joined by commas:
    with_OTHERS_name, with the first.
    """
    path, *others = teacher_files(options.runs[0])
    if options.mirror:
        name = f"mirror_{name}"
    if others:
        name = f"with_{short_name(','.join(others))}_{name}"
    if options.out and os.path.isdir(options.out):
        return os.path.join(options.out, name)
    return options.out or tables.beside(path, name)


def check_outputs(options):
    """UserError if the output cannot be written: now, rather than after minutes of work."""
    paths = [options.csv] if options.csv else []
    if options.command not in ("predict", "runs", "tensorboard"):
        if options.out or os.path.exists(teacher_files(options.runs[0])[0]):
            paths.append(output_path(options, options.command))
    for path in paths:
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder):
            raise UserError(f"cannot write {path}: there is no folder {folder}")
        if os.path.isdir(path):
            raise UserError(f"cannot write {path}: it is a folder")
        if not os.path.exists(path) and not os.access(folder, os.W_OK):
            raise UserError(f"cannot write in {folder}: it is read-only, or not yours; name "
                            "another place by --out")


def main():
    options = parse()
    check_outputs(options)
    torch.backends.cudnn.allow_tf32 = False     # it rounds by as much as `sharpness` moves weights
    COMMANDS[options.command](options, setup(options.device))


if __name__ == "__main__":
    run_main(main)
