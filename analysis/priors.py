r"""Accuracy where classes are as frequent as in the field, and logits adjusted to that.

A test set says how often each class k is recognised; with field frequencies p_k accuracy is
sum_k p_k recall_k. A network whose training made it expect frequencies q_k should by Bayes' rule
answer argmax_k f_k(x) / T + ln p_k - ln q_k (Menon et al., ICLR 2021, arXiv 2007.07314). The rule
holds for probabilities that mean something, so T is the temperature of analysis/calibration.py.
"""
import csv
import math

import torch

from engine.evaluation import accuracies, predicted, table
from engine.runtime import UserError, one_line
from images.files import class_name, shown, some

TRAIN, EQUAL = "the training frequencies", "equal frequencies"
INVERSE = "the inverse training frequencies"


def test_prior(spec, data, counts):
    """Frequencies p (K,), sum 1, in the order of the data's classes.

    spec: "uniform", "train" (those of counts (K,), the training images of each class) or a CSV file
    of "class,frequency" lines, with or without a header, which names every class once. UserError
    for another file.
    """
    if spec == "uniform":
        p = torch.ones(data.num_classes, dtype=torch.double)
    elif spec == "train":
        p = torch.tensor(counts, dtype=torch.double)
    else:
        found = read_frequencies(spec)
        unknown = sorted(found.keys() - set(data.class_names))
        missing = [name for name in data.class_names if name not in found]
        for names, problem in ((unknown, "not classes of these data"), (missing, "missing")):
            if names:
                raise UserError(f"{shown(spec)}: {problem}: {some(names)}; every class of "
                                f"{data.label} needs one line class,frequency")
        p = torch.tensor([found[name] for name in data.class_names], dtype=torch.double)
        if p.sum() == 0:
            raise UserError(f"{shown(spec)}: all frequencies are 0")
    return p / p.sum()


def read_frequencies(path):
    """{class: frequency} of a CSV file. UserError for a line that is none, or a class named twice.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [(i, row) for i, row in enumerate(csv.reader(file), 1) if any(row)]
    except (OSError, ValueError, csv.Error) as error:                   # ValueError: not UTF-8
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"--test-prior {shown(path)}: {reason}; it is uniform, train, or a CSV "
                        "file of lines class,frequency") from None
    found = {}
    for place, (i, row) in enumerate(rows):
        try:
            name, text = row
            frequency = float(text)
        except ValueError:
            if place == 0 and len(row) == 2:                            # the header
                continue
            name, frequency = "", math.nan
        name = class_name(name.strip())
        if name in found:
            raise UserError(f"{shown(path)}, line {i}: {name} is there twice")
        if not 0 <= frequency < math.inf:
            raise UserError(f"{shown(path)}, line {i}: '{shown(','.join(row))}' is no class with a "
                            "frequency of 0 or more: class,frequency")
        found[name] = frequency
    return found


def assumed_prior(config):
    """What a run's training made its network expect: (exponent, words), of frequencies pi^exponent.

    pi: of the training images. By the settings (a dict): logit adjustment, PaCo's and vector
    scaling's log prior, and class-balanced batches make it expect equal frequencies; so does about
    deferred re-weighting; a plain cross-entropy those of the training. A student learns from labels
    and from its teacher's labels, and the logarithms of what these imply are averaged. None for a
    file from elsewhere, which does not say how it was trained.
    """
    if not config:
        return None
    reweighted = config.get("beta", 0) > 0 and config.get("drw_epoch", 0) < config["epochs"]
    if "method" not in config:                                          # a teacher
        if config["loss"] in ("la", "vs") and reweighted:
            return -1.0, f"about {INVERSE} (the log prior in its loss and re-weighting)"
        if config["loss"] in ("la", "vs", "paco"):
            return 0.0, f"{EQUAL} (the log prior in its loss)"
        return (0.0, f"about {EQUAL} (re-weighting)") if reweighted else (1.0, TRAIN)
    if config.get("logit_adjustment") and reweighted and config.get("distill") != "none":
        return -0.5, f"between {EQUAL} (labels) and about {INVERSE} (teacher's labels)"
    if config.get("logit_adjustment"):
        return 0.0, f"{EQUAL} (logit adjustment)"
    if config["method"] == "vit-crt":
        return 0.0, f"{EQUAL} (its classifier saw class-balanced batches)"
    if config.get("distill", "none") == "none" or not reweighted:
        return 1.0, TRAIN
    return 0.5, f"between {TRAIN} (labels) and about {EQUAL} (re-weighted teacher's labels)"


def adjusted(logits, p, counts, exponent):
    """Classes (N,) of calibrated logits (N,K) of a network that expects frequencies
    counts^exponent, where they are p (K,). A class of frequency 0 is never answered; -1: see
    predicted.
    """
    pi = torch.tensor(counts, dtype=torch.double)
    scores = logits.double() + p.log() - exponent * (pi / pi.sum()).log()
    return torch.where(predicted(logits) >= 0, scores.argmax(dim=1), -1)


def weighted_accuracies(classes, labels, p, groups):
    """Accuracies of predicted classes (N,) of test images (N,), each class weighted to p (K,).

    A class of frequency 0 counts as one without test images.
    """
    K = len(p)
    weights = p / torch.bincount(labels, minlength=K)                   # of an image of each class
    right, given = classes == labels, classes >= 0
    right = torch.bincount(labels[right], weights[labels[right]], minlength=K)
    answers = torch.bincount(classes[given], weights[labels[given]], minlength=K)
    return accuracies(right, answers, p, groups, skewed=True)


def joint_prior(configs):
    """What networks whose answers are combined expect: (exponent, words), or (None, why not).

    configs: the settings of each. Only what they all expect can be taken out of their answers.
    """
    assumed = [assumed_prior(config) for config in configs]
    if None in assumed:
        return None, "which frequencies the network expects is not known"
    if len({exponent for exponent, _ in assumed}) > 1:
        return None, "the networks expect different frequencies"
    words = dict.fromkeys(words for _, words in assumed)                # each once
    return assumed[0][0], "; ".join(words)


def prior_text(spec, p, configs, counts, logits, labels, data, temperatures=None):
    """The accuracies of logits (N,K) under a test prior, unadjusted and adjusted, for people.

    spec, p: see test_prior. configs: the settings of the networks that answer together. counts: how
    many images of each class they were trained with, None if they differ, or it is not known.
    temperatures: of the images (N,), see calibration.Calibration; by default 1.
    UserError if no class that occurs has test images.
    """
    tested = torch.bincount(labels, minlength=data.num_classes) > 0
    share = float(p[tested].sum())
    if share == 0:
        raise UserError(f"--test-prior {shown(spec)}: the classes that occur have no test images")
    weights = torch.where(tested, p / share, 0)
    rows = {"unadjusted": weighted_accuracies(predicted(logits), labels, weights, data.groups)}
    exponent, words = joint_prior(configs)
    if exponent and counts is None:
        exponent, words = None, "the training frequencies are not known, or not the same for all"
    text = f"not adjusted: {words}"
    if exponent is not None:
        calibrated = logits if temperatures is None else logits / temperatures[:, None]
        classes = adjusted(calibrated, p, counts or data.counts, exponent)  # exponent 0: any counts
        rows["adjusted"] = weighted_accuracies(classes, labels, weights, data.groups)
        text = ("adjusted: logits / temperature + ln(test prior) - ln(prior implied by training: "
                f"{words})")
    if share < 1 - 1e-9:
        text += f"; {100 * (1 - share):.1f} % of the prior is of classes without test images"
    if left_out := int((weights[labels.unique()] == 0).sum()):
        text += f"; classes left out, for their frequency is 0: {left_out}"
    return (f"test images weighted to the class frequencies --test-prior {shown(spec)}\n"
            f"{table(rows, 'prior')}\n{text}")
