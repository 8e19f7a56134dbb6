r"""The figures by their command in analyze.py, and what is loaded for them.

Each is a function of one file, which draws and returns a drawing.Figure with its numbers. What is
measured is in quantities.py. Paper: DeiT-LT, Rangwani et al., CVPR 2024, arXiv 2404.02900.
"""
from analysis import run_figures, student_figures, teacher_figures
from analysis.loading import load_logs, load_networks

# command: (function, what it is given: student, teacher or log, the flags that it takes)
FIGURES = {
    "attention": (student_figures.attention, "student",
                  ("classes", "index", "columns", "images", "seed")),
    "distance": (student_figures.distance, "student", ("classes", "images")),
    "rank": (student_figures.rank, "student", ("classes", "images")),
    "augment": (student_figures.training_images, "student", ("columns", "seed")),
    "agreement": (student_figures.agreement, "student", ("images",)),
    "entropy": (teacher_figures.entropy, "teacher", ("images",)),
    "sharpness": (teacher_figures.sharpness, "teacher", ("images", "seed")),
    "diversity": (run_figures.diversity, "log", ()),
    "imbalance": (run_figures.imbalance, "log", ("labels",)),
    "curves": (run_figures.curves, "log", ()),
}


def draw(command, paths, rt, labels, flags, load_flags):
    """Draw the figure of a command: a drawing.Figure.

    paths: run folders or checkpoints. labels: their names in the figure, or None. flags: {name:
    value} of analyze.py, of which the figure takes its own. load_flags: see loading.load.
    """
    function, kind, names = FIGURES[command]
    if kind == "log":
        subjects = load_logs(paths, labels)
    else:
        subjects = load_networks(kind, paths, rt, labels, **load_flags)
    return function(subjects, rt, **{name: flags[name] for name in names})
