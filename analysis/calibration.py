r"""Probabilities that mean something: how far confidences are from accuracies, and a temperature.

    p = softmax(logits / T)                                     Guo et al. 2017, arXiv 1706.04599

T > 1 makes a network less sure of itself, T < 1 surer; it changes no prediction. It is fitted by
maximum likelihood, as if half an image more had been wrong: a few images that are all right do not
make later answers certain. Never on what the network is judged by:

    run with --holdout   on the held-out images. They are the test images as well, so each half of
                         them is judged with the temperature of the other half. What is kept is
                         fitted on all.
    other data           on clean training images, weighted so that classes are as frequent as in
                         the test set. The network was trained on them and knows them better than
                         new images, so that T may be too low; the test set's error tells. T is
                         not set below 1 for one that has more than 98 % of them right.

`python analyze.py eval` keeps it in calibration.json beside the network, with the digest of the
weights that it is for; predict and export use it from there. What it finds on other data
than the network's own (loading.names_other_data) is printed only.
"""
import math
import os
import shlex
import sys
from dataclasses import dataclass

import torch

from analysis.predict import logits_of
from analysis.quantities import BINS, calibration_error
from analysis.tables import beside
from engine.checkpoints import is_number
from engine.evaluation import balanced_sample, predicted
from engine.networks import teacher_files
from engine.records import parse, read_bytes, save_json
from engine.runtime import UserError
from images.files import shown

LOWEST, HIGHEST = 0.01, 100.0       # temperatures
HELD_OUT = "held-out images"
BY_HEART = 0.98                     # share of its training images that a network gets right
MORE_WRONG = 0.5                    # images that are taken to be wrong, beyond those that are


@dataclass
class Calibration:
    """A temperature, what it was fitted on, and the test set's confidences with it.

    temperatures: of each test image (N,), one that was not fitted on it. before, after: its largest
    probability (N,), without and with that.
    """
    temperature: float
    source: str                     # for people: "841 held-out images"
    temperatures: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    right: torch.Tensor             # was that class the true one (N,)?

    @property
    def errors(self):
        """Expected calibration error before and after, in [0,1]."""
        return tuple(calibration_error(p, self.right) for p in (self.before, self.after))

    @property
    def halves(self):
        """Is each half of the test images judged by the temperature of the other half?"""
        return self.source.endswith(HELD_OUT)

    @property
    def text(self):
        """For people, a line or two."""
        before, after = (100 * error for error in self.errors)
        text = (f"Expected calibration error ({BINS} bins): {before:.1f} points before and "
                f"{after:.1f} after dividing the logits by {origin(self.temperature, self.source)}")
        if self.halves:
            text += " (after: each half of them by the temperature of the other half)"
        if after > before:
            text += "; no better on the test set than without it"
        if not self.halves:
            text += ("\nA network is more confident on its training images than on new ones: this "
                     "temperature may be too low. Training with --holdout keeps images for it.")
        return text


def origin(temperature, source):
    """Which temperature, and what it is from, for people: 1 is none that was fitted."""
    return f"temperature {temperature:.3g}, {'from' if temperature == 1 else 'fitted on'} {source}"


# ---- Fitting -------------------------------------------------------------------------------------

def fit_temperature(logits, labels, weights=None):
    """The temperature of the largest likelihood of labels (N,) by logits (N,K).

    weights (N,): of the images, all alike by default. In b = 1 / T the mean log-likelihood is
    concave, with the derivative mean(z_y - sum_k p_k z_k), p = softmax(b z): its zero is found by
    bisection. Where every image is right it would rise for ever. So half an image more is taken to
    be wrong: of each of the N labels the share 0.5 / (N + 0.5) goes to the network's second class.
    Images whose logits are not finite are left out; 1 if none is left, or none says anything.
    """
    w = torch.ones(len(labels)) if weights is None else weights
    known = logits.isfinite().all(dim=1) & (w > 0)
    z, y, w = logits[known].double(), labels[known], w[known]
    if bool((z.amax(dim=1) == z.amin(dim=1)).all()):
        return 1.0
    own, second = z.gather(1, y[:, None])[:, 0], z.topk(2, dim=1).values[:, 1]      # (N,) each
    truth = (len(y) * own + MORE_WRONG * second) / (len(y) + MORE_WRONG)
    low, high = LOWEST, HIGHEST
    for _ in range(50):
        middle = math.sqrt(low * high)
        p = (z / middle).softmax(dim=1)
        if (w * (truth - (p * z).sum(dim=1))).sum() > 0:          # the likelihood rises with 1 / T
            high = middle
        else:
            low = middle
    return middle


def half_of(labels):
    """Every second image of each class: a mask (N,)."""
    order = labels.argsort(stable=True)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[order[::2]] = True
    return mask


def calibrate(network, args, data, rt, logits):
    """The Calibration of a Network. logits (N,K): of its answers on the test set, on the CPU."""
    labels = data.test_labels.cpu()
    configs = network.configs or [network.config]
    if args.holdout and all((config.get("holdout"), config.get("holdout_by"))
                            == (args.holdout, args.holdout_by) for config in configs):
        half, temperatures = half_of(labels), torch.empty(len(labels))
        for fitted, judged in ((half, ~half), (~half, half)):
            temperatures[judged] = fit_temperature(logits[fitted], labels[fitted])
        temperature, source = fit_temperature(logits, labels), f"{len(labels)} {HELD_OUT}"
    else:
        temperature, source = fit_on_training_images(network, data, rt)
        temperatures = torch.full((len(labels),), temperature)
    right = predicted(logits) == labels
    after = confidence(logits / temperatures[:, None])
    return Calibration(temperature, source, temperatures, confidence(logits), after, right)


def confidence(logits):
    """The largest probability of each image, (N,K) -> (N,); 0 where logits are not finite."""
    return logits.softmax(dim=1).amax(dim=1).nan_to_num()


def fit_on_training_images(network, data, rt, n=5000):
    """(temperature, what it was fitted on): (up to) n clean training images of all classes."""
    index = balanced_sample(data.train_labels.cpu(), n)
    logits = logits_of(network, data.train_images, index, rt)
    labels = data.train_labels.cpu()[index]
    wanted = torch.bincount(data.test_labels.cpu(), minlength=data.num_classes).double()
    weights = (wanted / torch.bincount(labels, minlength=data.num_classes))[labels]
    source = f"{len(index)} training images, weighted to the classes of the test set"
    temperature = fit_temperature(logits, labels, weights)
    right = (weights * (predicted(logits) == labels)).sum() / weights.sum()
    if temperature < 1 and right > BY_HEART:        # it may be as sure of these as it likes
        return 1.0, f"{source}, over 98 % of which are right: T stays 1"
    return temperature, source


# ---- Kept beside the network ---------------------------------------------------------------------

def calibration_file(path):
    """Where the calibration of a run folder or file is kept; of several, with the first."""
    return beside(teacher_files(path)[0], "calibration.json")


def identity(network):
    """What a temperature belongs to: these weights, used in this way."""
    return f"{network.weights} {network.what}"


def entries(where):
    """{identity: entry} of a calibration file, empty if there is none. UserError for a damaged one.
    """
    if not os.path.exists(where):
        return {}
    found = parse(read_bytes(where), where)
    if found is None or not all(isinstance(entry, dict) and is_number(
            entry.get("temperature"), LOWEST, HIGHEST) for entry in found.values()):
        raise UserError(f"{shown(where)} is damaged: remove it, and eval writes it again")
    return dict(found)


def save(path, network, calibration):
    """Keep a Network's calibration beside it; returns the file. UserError if it cannot be written.

    What the file knows of the network together with others, or of its mirror images, is kept; what
    is of other weights is removed.
    """
    where, before, after = calibration_file(path), *calibration.errors
    first = network.weights.partition("+")[0]
    kept = {key: entry for key, entry in entries(where).items() if first in key}
    kept[identity(network)] = {
        "temperature": calibration.temperature, "fitted on": calibration.source,
        "calibration error before": before, "calibration error after": after}
    save_json(where, kept)
    return where


def load_temperature(path, network):
    """The temperature that eval has kept for a Network, else 1; which one is said on stderr."""
    where = calibration_file(path)
    entry = entries(where).get(identity(network))
    if entry is None:
        why = "has none for this network" if os.path.exists(where) else "is not there"
        command = f"python analyze.py eval {shown(shlex.quote(path))}"
        if "mirror image" in network.what:
            command += " --mirror"
        print(f"probabilities are not calibrated: {shown(where)} {why}; `{command}` writes it",
              file=sys.stderr)
        return 1.0
    temperature, source = entry["temperature"], shown(str(entry.get("fitted on")))
    how = "the network's own," if temperature == 1 else "calibrated by"
    print(f"probabilities are {how} {origin(temperature, source)}", file=sys.stderr)
    return temperature
