"""What all figures share: colours, axes, the text around a figure, choosing images, PNG files."""
import json
import sys
import textwrap
import warnings
from dataclasses import dataclass
from io import BytesIO
from itertools import islice, zip_longest

import numpy as np
import torch

import augment
from analysis.tables import as_csv, write
from engine.evaluation import student_input
from engine.runtime import UserError, one_line

try:
    import matplotlib
    if "matplotlib.pyplot" not in sys.modules:      # else it is a notebook's
        matplotlib.use("Agg")               # draw into files, also without a display
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm
except ImportError:
    raise UserError("pictures need a package: pip install matplotlib") from None
except ValueError as error:                 # of MPLBACKEND, or a matplotlibrc
    raise UserError(f"matplotlib's settings: {one_line(error)}") from None
# Names are drawn as they are: a "$" in one begins no formula, which might not be a valid one.
matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False})
warnings.filterwarnings("ignore", "Glyph .* missing from")      # drawn as a box

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = {"cls": "#0072B2", "dist": "#D55E00", "avg": "#000000",
          "overall": "#000000", "balanced": "#000000",
          "head": "#56B4E9", "mid": "#009E73", "tail": "#E69F00",
          "clean": "#0072B2", "strong": "#E69F00", "mixed": "#D55E00"}
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TOKENS = {"cls": "CLS", "dist": "DIST"}
NAMES = TOKENS | {"avg": "average"}         # heads, for people
FEW_IMAGES = 30     # test images, below which a percentage says of how many it is


def head_names(rows):
    """{head: its name} of the heads to show of {head: anything}: without DIST, the prediction."""
    if "dist" in rows:
        return NAMES
    return {"avg": "the student" if "avg+teacher" in rows else "the network"}


@dataclass
class Figure:
    """A drawn figure with its numbers.

    table: the rows to print. numbers: all of them (rows: written as CSV; a dict: as JSON).
    note: how to read the figure.
    """
    figure: plt.Figure
    table: list
    numbers: object
    note: str

    def save(self, path):
        """Write the picture to `path` (.png) and its numbers beside it; returns both paths."""
        stem = path.removesuffix(".png")
        picture = write(f"{stem}.png", as_png(self.figure))
        if isinstance(self.numbers, list):
            return picture, write(f"{stem}.csv", as_csv(self.numbers))
        return picture, write(f"{stem}.json", json.dumps(self.numbers, indent=1) + "\n")


# ---- Around the axes -----------------------------------------------------------------------------

def finish(figure, title, logs, note):
    """Put the title on top; below: how to read the figure, and which runs and data it shows."""
    runs = " · ".join(log.source for log in logs)
    if len(logs) > 6:
        runs = f"{len(logs)} runs, named in the file of numbers"
    data = "; ".join(dict.fromkeys(log.data_text for log in logs))          # each once
    width = int(17 * figure.get_size_inches()[0])                   # characters in a line of 8 pt
    lines = [line for text in (note, runs, data) for line in textwrap.wrap(text, width)]
    figure.suptitle(textwrap.fill(title, int(11 * figure.get_size_inches()[0])), fontsize=12)
    bottom = -0.01
    for legend in figure.legends:                                   # shared_legend's, below
        figure.draw_without_rendering()
        bottom -= legend.get_window_extent().height / figure.bbox.height
    figure.text(0.5, bottom, "\n".join(lines), ha="center", va="top", fontsize=8, color="#444444",
                linespacing=1.35)


def without_text(figure):
    """The figure without its title and the lines below it, for a page that has them itself."""
    figure.suptitle("")
    for text in figure.texts[1:]:                                   # the first is the title
        text.remove()
    return figure


def as_png(figure):
    """The figure as the bytes of a PNG file; it is closed."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", pad_inches=0.12)
    plt.close(figure)
    return buffer.getvalue()


def shared_legend(figure, axis, columns=2):
    """One legend for all panels, below the figure."""
    figure.legend(*axis.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0),
                  ncols=columns, frameon=False, fontsize=9)


def legend_above(axis, columns, **style):
    axis.legend(fontsize=8, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0),
                frameon=False, **style)


def name_classes(axis, names, counts):
    """Classes and their training images below an x axis from 0 to K - 1: slanted if they overlap.
    """
    labels = [f"{short(name)}\n{n}" for name, n in zip(names, counts)]
    axis.set_xticks(range(len(names)), labels, fontsize=8)
    axis.set_xlabel("class, and its training images")
    axis.figure.draw_without_rendering()                            # else they have no place yet
    boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
    if any(box.x1 > following.x0 for box, following in zip(boxes, boxes[1:])):
        labels = [f"{short(name, 14)} {n}" for name, n in zip(names, counts)]
        axis.set_xticks(range(len(names)), labels, fontsize=7, rotation=20, ha="right",
                        rotation_mode="anchor")
        axis.set_xlabel(axis.get_xlabel(), fontsize=8, labelpad=0)      # they need more height


def label_axes(axis, xlabel, ylabel, title=""):
    """Labels, a light horizontal grid, and no frame on top and on the right."""
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)


def whole_numbers(axis):
    """Ticks of an x or y axis (axis.xaxis, axis.yaxis) at whole numbers only."""
    axis.set_major_locator(matplotlib.ticker.MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def log_scale(axis):
    """Make a y axis logarithmic, with plain numbers: matplotlib's own are formulas."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")


def short(name, length=24):
    """A name with at most `length` characters, of its beginning and its end."""
    if len(name) <= length:
        return name
    end = length // 3
    return f"{name[:length - end - 1]}…{name[-end:]}"


def join_label(label, text=""):
    """A legend entry: the run's label, unless it is empty, and what the line shows."""
    entry = ", ".join(part for part in (short(label, 60), text) if part)
    return f" {entry}" if entry.startswith("_") else entry      # matplotlib hides those with a "_"


def run_color(i):
    return RUN_COLORS[i % len(RUN_COLORS)]


# ---- Images --------------------------------------------------------------------------------------

def show_image(axis, image, title=""):
    """An image (3,S,S) in [0,1] under its title, of which each line is kept short."""
    axis.imshow(image.permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")
    axis.set_title("\n".join(map(short, title.split("\n"))), fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def show_map(axis, image, heat):
    """An image (3,S,S) in gray under a heat map (G,G), which is scaled to its own range."""
    size = image.shape[-1]
    axis.imshow(image.mean(dim=0).cpu().numpy(), cmap="gray", vmin=-0.3, vmax=1.3)
    edges = (-0.5, size - 0.5, size - 0.5, -0.5)                    # the map covers the whole image
    axis.imshow(heat.cpu().numpy(), cmap="inferno", alpha=0.6, interpolation="bilinear",
                extent=edges)
    axis.set_xticks([])
    axis.set_yticks([])


def row_label(axis, text):
    """Name a row of images, on the left of its first one."""
    axis.set_ylabel(textwrap.fill(short(text, 40), 13, break_long_words=False), fontsize=8,
                    rotation=0, ha="right", va="center")


# ---- Choosing images -----------------------------------------------------------------------------

def rare_group(data):
    """"tail", or "mid" or "head" if the rarer ones have no test images."""
    tested = set(data.test_labels.tolist())
    return next(name for name in ("tail", "mid", "head") if tested & set(data.groups[name]))


def rare_classes(data):
    """The classes of the rare group that have test images."""
    tested = set(data.test_labels.tolist())
    return [k for k in data.groups[rare_group(data)] if k in tested]


def few_images(data, group):
    """" (7 test images)" for a group that has fewer than FEW_IMAGES of them, else ""."""
    n = int(torch.isin(data.test_labels.cpu(), torch.tensor(data.groups[group])).sum())
    if n >= FEW_IMAGES:
        return ""
    return f" ({n} test image{'s' if n != 1 else ''})"


def chosen_classes(names, data):
    """Numbers of the classes of --classes, by default the rare ones. UserError for a wrong name."""
    if not names:
        return rare_classes(data)
    unknown = [name for name in names if name not in data.class_names]
    if unknown:
        raise UserError(f"--classes: there is no {unknown[0]}; the classes are "
                        f"{', '.join(data.class_names[:20])}")
    classes = [data.class_names.index(name) for name in names]
    tested = set(data.test_labels.tolist())
    untested = [data.class_names[k] for k in classes if k not in tested]
    if untested:
        raise UserError(f"--classes: {untested[0]} has no test image")
    return classes


def classes_text(names, data):
    """What chosen_classes has chosen, for people."""
    return ", ".join(names) if names else f"the {rare_group(data)} classes"


def images_of(labels, classes, n):
    """Indices of (up to) n images of these classes, evenly spread: LongTensor on the CPU."""
    index = torch.isin(labels.cpu(), torch.tensor(classes)).nonzero()[:, 0]
    return index[torch.linspace(0, len(index) - 1, min(n, len(index))).long()]


def example_images(data, classes, n, seed=0):
    """Indices of (up to) n random test images, each once, taking the classes in turn.

    `seed` alone decides which. Of the classes the first n, which have test images.
    """
    rng, labels = np.random.RandomState(seed), data.test_labels.cpu().numpy()
    own = [rng.permutation(np.where(labels == k)[0]) for k in classes[:n]]
    in_turn = (i for turn in zip_longest(*own) for i in turn if i is not None)
    return torch.tensor(list(islice(in_turn, n)))


def measured_images(subject, classes, n):
    """Indices of (up to) n test images to measure on: of --classes, else of the rare ones."""
    return images_of(subject.data.test_labels, chosen_classes(classes, subject.data), n)


def image_count(subjects, images, default):
    """--images, else the default, or a sixth if any network's images are large (minutes on a CPU).

    The same for all networks of a figure: ranks of few images cannot be as high.
    """
    if images:
        return images
    return default if all(s.net.img_size <= 64 for s in subjects) else default // 6


def student_images(subject, index):
    """Test images by their indices (n,), as the student is tested on them: (n,3,S,S) in [0,1]."""
    images = subject.data.test_images[index.to(subject.data.test_images.device)]
    return student_input(augment.to_float(images), subject.args.img_size, subject.args.eval_crop)


def image_batches(subject, index, size=25):
    """The same in small batches: the attention of all blocks takes much memory."""
    for part in index.split(size):
        yield student_images(subject, part)
