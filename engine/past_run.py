r"""A run's folder before training: whose it is, what is in it, and whether a run may go on there.

A run that is over is only read: its table is printed, whoever owns the folder. Any other folder is
locked (engine/lock.py), and then begun, resumed from its checkpoint, or refused: one that holds
another run, was begun with other settings, on other images or by another teacher. engine/run_folder
goes on from here.
"""
import copy
import glob
import hashlib
import math
import os
import sys
import time

from engine import runtime
from engine.checkpoints import load_checkpoint
from engine.datasets import fingerprint_of_files, has_files
from engine.evaluation import COLUMNS, advice, table
from engine.lock import Lock, held
from engine.networks import check_origin, retrained, teacher_files
from engine.records import is_like, read_json, read_log_lines
from engine.runtime import PRECISIONS, UserError, all_max, exit_together
from engine.settings import DATA_SETTINGS, NOT_RESUMED, defaults, flag, set_epochs
from engine.training import check_compiler
from images.files import shown

FORMAT = 2          # of a run folder's settings: runs of another one are not resumed or shown
RESTART = 60        # seconds that torchrun's new worker waits for the old one to let the run go
# What can be done about a run in the way, and about a teacher that another script would train.
AGAIN = "--overwrite starts it again, --out names another folder"
REMOVE = "remove that folder to train this teacher again, or name another with --teacher"
LACKS = "the log lacks epochs"      # in `forced` of a run that went on with such a log
# All files that this project writes into a run's folder: what --overwrite removes, in this order.
FIGURES = ("attention", "distance", "rank", "augment", "agreement", "entropy", "sharpness",
           "diversity", "imbalance", "curves")
BEGUN_AGAIN = "overwriting"     # file of a run that --overwrite has locked but not begun yet
OWN_FILES = ("result.json", "last.pt", "previous.pt", "log.jsonl", "config.json",
             "summary.png", "per_class.csv", "confusion.csv", "confusion.png", "calibration.json",
             "heads.csv", "report.html", "model.pt2", "model.json", "model.onnx",
             "model_predict.py", "events.out.tfevents.*",
             *(f"{figure}.{ending}" for figure in FIGURES for ending in ("png", "csv", "json")),
             BEGUN_AGAIN)       # last: without it a restarted worker resumes what is still there
# Without these a checkpoint is not resumed.
RESUMED = ("model", "config", "epoch", "step", "world", "amp", "hardware", "teachers", "forced",
           "data", "white", "class_names", "counts")
# What config.json says besides the settings.
ABOUT = ("classes", "counts", "class_groups", "versions", "hardware", "amp_dtype", "forced",
         "fingerprint", "teachers")


class PastRun:
    """What a run's folder holds, of which only the main process writes.

    The folder is this run's own from here on, unless its run is over. settings: the script's table
    of them. wait: for another process that trains there, as several students may need the same
    teacher.
    """

    def __init__(self, folder, args, rt, settings, wait):
        self.folder, self.rt, self.log_path = folder, rt, os.path.join(folder, "log.jsonl")
        self.checkpoint = os.path.join(folder, "last.pt")
        self.previous = os.path.join(folder, "previous.pt")
        self.resumed, self.fallback, self.forced, self.log = None, False, [], []
        self.teachers, self.wait, self.hardware = [], wait, rt.hardware()
        place = list(PRECISIONS).index(rt.amp) if rt.main else 0
        self.precision = [*PRECISIONS.values()][all_max([place], rt)[0]]    # the main process's
        self.start_epoch, self.start_step = 0, 0
        self.defaults = defaults(settings)
        # torchrun counts restarts on each machine; one that was replaced counts from 0.
        restarts, = all_max([int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))], rt)
        self.restarted = restarts > 0
        self.resume = args.resume or self.restarted         # its command is that of the start
        again, = all_max([int(os.path.exists(os.path.join(folder, BEGUN_AGAIN)))], rt)
        self.overwrite = args.overwrite and (again > 0 or not self.restarted)
        runtime.trains = True
        # --minutes: the time of a teacher that another script trains begins here.
        self.began = time.monotonic() if wait else runtime.began
        self.measured = False               # with --minutes: are the epochs known?
        self.lock, self.over, self.others = None, False, ""
        self.check_sources(args)
        self.own(args, wait)
        if args.compile and not self.over:
            check_compiler(rt.device)           # before anything is read, trained or overwritten
        if self.over or self.overwrite:
            return
        if os.path.exists(self.checkpoint) or os.path.exists(self.previous):
            if self.others:
                raise UserError(f"{folder} is a finished run with other settings, {self.others}: "
                                f"{AGAIN}")
            if not self.resume:
                raise UserError(f"{folder} already holds a run: --resume continues it, {AGAIN}")
            self.read_state(args)
        elif self.finished:
            raise UserError(f"{folder} holds another run's result, and no checkpoint to go on "
                            f"from: {AGAIN}")
        if args.resume and not self.resumed and not wait:
            rt.print(f"There is nothing to resume in {folder}: beginning{self.unfinished(args)}")
        self.check_place()

    def unfinished(self, args):
        """Runs of these data and recipe that could have been meant, a text."""
        parent, name = os.path.split(self.folder)
        begin, recipe, _ = name.partition(f"_{args.recipe}_")       # kind_data_recipe_changes_seed
        if not recipe:
            return ""                                               # a name of --out
        runs = sorted(glob.glob(glob.escape(os.path.join(parent, begin + recipe)) + "*"))
        runs = [run for run in runs if os.path.exists(os.path.join(run, "last.pt"))
                and not os.path.exists(os.path.join(run, "result.json"))]
        if not runs:
            return ""
        return (f". To go on with {' or '.join(runs[:5])}, which is not finished, repeat its "
                "settings")

    # ---- Whose folder it is ----------------------------------------------------------------------

    def check_sources(self, args):
        """UserError if the run would replace the network that it builds on."""
        own = [os.path.realpath(path) for path in (self.folder, self.checkpoint, self.previous)]
        for name in ("teacher", "finetune"):
            path = getattr(args, name, None)
            for file in teacher_files(path) if path else []:
                if os.path.realpath(file) in own:
                    raise UserError(f"the run and its {flag(name)} cannot share the folder "
                                    f"{self.folder}: --out names another")

    def own(self, args, wait):
        """Lock the folder until `finish`, unless its run is over. The main process finds out.

        UserError if another process trains there.
        """
        patience = RESTART if self.restarted else 0
        if wait:
            patience = math.inf
        began, waiting, begun = time.monotonic(), False, None

        def attempt():
            nonlocal waiting, begun
            begun, fitted = self.epochs_begun_with(args), copy.copy(args)
            if begun:                       # only for now: another process may begin it again
                set_epochs(fitted, *begun)
            self.over = self.is_over(fitted)
            if self.over:
                return
            mine = held.get(os.path.realpath(self.folder))      # of an earlier Run
            lock = mine or Lock(self.folder)
            try:
                taken = mine or lock.take()
            except OSError as error:
                hint = "" if wait else "; --out names another folder"
                raise UserError(f"cannot write in {self.folder}: {error.strerror}{hint}") from None
            if taken:
                self.lock = lock
                runtime.at_end.append(lock.release)
                # For a worker that torchrun restarts: the files are not its own.
                if self.overwrite and "TORCHELASTIC_RESTART_COUNT" in os.environ:
                    with open(os.path.join(self.folder, BEGUN_AGAIN), "w"):
                        pass
                return
            if time.monotonic() - began >= patience:
                raise UserError(f"{self.folder} is being trained by {lock.holder()}; wait for it, "
                                "or --out names another folder")
            if not waiting:
                self.rt.print(f"Waiting for {self.folder}, which is being trained by "
                              f"{lock.holder()}")
            waiting = True

        while True:
            self.write(attempt)
            over, locked, stop, *epochs = all_max([int(self.over), int(self.lock is not None),
                                                   runtime.stop_signal, *(begun or (0, 0))],
                                                  self.rt)
            self.over = bool(over)
            if over or locked:
                if epochs[0]:
                    self.take_epochs(args, *epochs)
                return
            if stop:
                sys.exit(128 + stop)
            time.sleep(0.5)

    def epochs_begun_with(self, args):
        """--minutes: (epochs, eval_every) of a run that is over, or goes on; None for another."""
        known = os.path.exists(os.path.join(self.folder, "config.json"))
        if (args.minutes is None or not known or self.overwrite
                or not (self.resume or self.finished)):
            return None
        config = read_json(self.folder, "config.json")
        if config.get("minutes") != args.minutes:
            return None
        saved = self.finished or any(map(os.path.exists, (self.checkpoint, self.previous)))
        free = (*NOT_RESUMED, *ABOUT, "amp", "processes", *args.fitted.split(","))
        if not saved and self.changes(config, args, free):      # saved ones are compared later
            return None
        return config["epochs"], config.get("eval_every", args.eval_every)

    def remove_files(self):
        """Remove what this project has written into the folder, for --overwrite."""
        for name in OWN_FILES:
            for pattern in (name, f"mirror_{name}", f"with_*_{name}"):      # analyze.output_path
                for path in glob.glob(os.path.join(glob.escape(self.folder), pattern)):
                    if not os.path.isdir(path):
                        os.remove(path)

    def take_epochs(self, args, epochs, eval_every):
        """--minutes: as many epochs as the run was begun with."""
        if args.minutes is not None and not self.measured:
            set_epochs(args, epochs, eval_every)
            self.measured = True

    def is_over(self, args):
        """Is the run finished, with these settings, so that nothing is left to train?

        Reads result.json and config.json only: the checkpoints may be gone, the folder another's.
        UserError for one of another format, or to resume one with other settings.
        """
        if not self.finished or self.overwrite:
            return False
        if not os.path.exists(os.path.join(self.folder, "config.json")):
            return False                                    # --resume writes it again
        config = read_json(self.folder, "config.json")
        self.check_format(config)
        if read_json(self.folder, "result.json")["epochs"] < args.epochs:
            return False
        changes = self.changes(config, args, (*NOT_RESUMED, *ABOUT, "amp", "processes"))
        if changes and not self.resume:
            same_script = ("method" in config) == hasattr(args, "method")
            self.others = ", ".join(changes.values()) if same_script else "of the other script"
            return False
        if changes:
            self.check_force(args, changes)
            self.rt.print(f"--force: nothing is left to train with {', '.join(changes.values())}")
        return True

    def check_format(self, config):
        """UserError for the settings of a run of another format."""
        if config.get("format") != FORMAT:
            raise UserError(f"{self.folder} was begun by an earlier version of this code: "
                            f"{REMOVE if self.wait else AGAIN}")

    def read_state(self, args):
        self.resumed = state = load_checkpoint(self.folder, RESUMED)
        self.fallback = state.pop("fallback", False)    # last.pt is damaged, previous.pt was taken
        self.start_epoch, self.start_step = state["epoch"], state["step"]       # done already
        self.forced = state["forced"]
        if not is_like([self.start_epoch, self.start_step], [0]) or not is_like(self.forced, [""]):
            raise UserError(f"{self.checkpoint} is damaged: it does not say how far the run is")
        self.check_format(state["config"])
        old = state["config"] | {"processes": state["world"], "amp": state["amp"]}
        if args.minutes not in (None, old.get("minutes")):
            begun = "without --minutes"
            if old.get("minutes") is not None:
                begun = f"with --minutes {old['minutes']}"
            raise UserError(f"{self.folder} was begun {begun}, which cannot be changed: " +
                            (REMOVE if self.wait else "--resume --force --epochs N trains it for "
                             "N epochs"))
        self.take_epochs(args, old["epochs"], old["eval_every"])    # where config.json is lost
        if ("method" in old) != hasattr(args, "method"):
            kinds = ("student", "teacher") if "method" in old else ("teacher", "student")
            raise UserError(f"{self.checkpoint} is a {kinds[0]}'s, not a {kinds[1]}'s: --out names "
                            "another folder")
        # A teacher is its weights, which are compared later, under whatever path it is given; but
        # no other one is trained for that.
        free = NOT_RESUMED
        if (state["teachers"] and args.teacher
                and all(map(is_there, teacher_files(args.teacher)))):
            free = (*free, "teacher")
        if state["hardware"].split(", then ")[-1] != self.hardware:
            self.hardware = f"{state['hardware']}, then {self.hardware}"
        begun = self.start_epoch + (self.start_step > 0)
        changes = self.changes(old, args, free)
        if changes:
            self.force(args, changes)
            if begun > args.epochs:
                raise UserError(f"{self.folder} has begun {begun} epochs already: --epochs "
                                f"{begun} or more")
            self.start_step = 0         # the steps of a half-done epoch may be others now
        self.read_past_log(args)

    def check_place(self):
        """UserError if processes go on from different places: on machines without this folder."""
        if self.differs([self.start_epoch, self.start_step]):
            exit_together(UserError(
                f"not all processes find the same checkpoint in {self.folder}: put it where all "
                "machines see it, or a copy of it on each of them"), self.rt)

    def differs(self, numbers):
        """Do the processes have different whole numbers, a list in each?"""
        return all_max(numbers, self.rt) != [-n for n in all_max([-n for n in numbers], self.rt)]

    def changes(self, old, args, free):
        """{"lr": "--lr 0.1 -> 0.05", ...}: settings that are others now, but for those in `free`.

        A setting that the run did not know yet counts as changed unless it is off, or has its
        table's value: what runs did before there was a choice.
        """
        new = vars(args) | {"processes": self.rt.world, "amp": self.precision, "format": FORMAT}
        names = []
        if self.wait:                                   # a student's groups are not its teacher's
            free = (*free, "groups")
        for name in sorted((old.keys() | new.keys()) - set(free)):
            if name in ("teacher", "finetune", "train_list", "test_list"):  # "runs/t/" is "runs/t"
                same = real_paths(old.get(name)) == real_paths(new.get(name))
            elif name in old:
                same = old[name] == new.get(name)
            else:
                same = new[name] in (None, False, self.defaults.get(name))
            if not same:
                names.append(name)
        return {name: f"{name if name == 'processes' else flag(name)} {old.get(name)} -> "
                      f"{new.get(name)}" for name in names}

    def check_force(self, args, changes):
        """UserError for changed settings, {name: text}, unless --force."""
        if not args.force:
            # With other images --force is refused, too.
            same_images = changes.keys().isdisjoint(set(DATA_SETTINGS) - {"groups"})
            ways = "repeat them, or start another run"
            if same_images:
                ways += ", or go on all the same with --force"
            if self.wait:
                ways = REMOVE
                if same_images:
                    ways = f"train_teacher.py --resume --force finishes it; or {REMOVE}"
            raise UserError(f"{self.folder} was begun with other settings: "
                            f"{', '.join(changes.values())}; {ways}")

    def force(self, args, changes):
        """UserError for changed settings, or, with --force, a line about them."""
        self.check_force(args, changes)
        text = ", ".join(changes.values())
        self.forced = [*self.forced, f"after epoch {self.start_epoch}: {text}"]
        self.rt.print(f"--force: going on {self.forced[-1]}")

    def read_past_log(self, args):
        """Keep the log's lines of the epochs that the checkpoint has, and check that all are there.

        Later ones are of epochs that are trained again; damaged lines are named and left out.
        """
        lines = read_log_lines(self.log_path)
        damaged = [str(i) for i, line in enumerate(lines, 1) if not is_epoch(line)]
        if damaged:
            self.rt.print(f"{self.log_path} is damaged; left out: line {', '.join(damaged[:9])}")
        self.log = [line for line in lines if is_epoch(line) and line["epoch"] < self.start_epoch]
        complete = [line["epoch"] for line in self.log] == list(range(self.start_epoch))
        if not complete and not any(text.endswith(LACKS) for text in self.forced):
            if not args.force:
                raise UserError(f"{self.log_path} does not have one line for each of the "
                                f"{self.start_epoch} epochs that the checkpoint has: put back a "
                                "copy of it, or --resume --force goes on with the lines it has")
            self.forced = [*self.forced, f"after epoch {self.start_epoch}: {LACKS}"]
        by_epoch = {line["epoch"]: line for line in self.log}
        self.log = [by_epoch[epoch] for epoch in sorted(by_epoch)]

    @property
    def finished(self):
        """Has the run in this folder written its result?"""
        return os.path.exists(os.path.join(self.folder, "result.json"))

    def check_data(self, data):
        """UserError if the run that is resumed was trained on other images, levels or classes.

        Also if the processes have different images: each would number the classes for itself.
        """
        here = dict(data=data.fingerprint, white=data.white, class_names=data.class_names,
                    counts=data.counts)                 # which differ where files no longer open
        self.write(lambda: self.check_images(self.resumed or {}, here))
        mine = hashlib.sha256(repr(here).encode()).hexdigest()
        if self.differs([int(mine[:12], 16)]):
            exit_together(UserError("not all processes have the same images: each machine needs "
                                    "the same files in its --data-dir"), self.rt)

    def check_images(self, there, here):
        """UserError if what is known of the run's images, `there`, is not as `here`: dicts."""
        if any(there.get(name, value) != value for name, value in here.items()):
            raise UserError(f"{self.folder} was trained on other images than these, or with "
                            "another white level or other classes: "
                            f"{REMOVE if self.wait else AGAIN}")

    def check_teacher(self, args, teacher, data):
        """Remember which networks the teacher is: their files, hashes of weights, and data.

        UserError if one is not finished, or if the run that is resumed has learned from others;
        with --force the latter is printed.
        """
        for known in teacher.origin:
            check_origin(f"the teacher {known['file']}", known, data, self.rt)
        self.teachers = teacher.origin
        if self.resumed and self.resumed["teachers"] != self.hashes():
            change = f"the teacher's weights {self.resumed['teachers']} -> {self.hashes()}"
            self.force(args, {"teacher": change})

    def hashes(self):
        """Of the teachers' weights, for the checkpoint: a text, which is compared as it is."""
        return ",".join(known["weights"] for known in self.teachers)

    def print_if_finished(self, args, title, draw=None):
        """True, after printing its table, if nothing is left to train.

        draw(folder): draws the run's picture, if that is missing and can be drawn. UserError if
        its images are files, and others now.
        """
        if not self.over:
            return False
        if has_files(args):
            self.write(lambda: self.check_images(read_json(self.folder, "config.json"),
                                                 {"fingerprint": fingerprint_of_files(args)}))
        result = read_json(self.folder, "result.json")
        rows = {name: r for name, r in result.items()
                if is_like(r, {"": 0.0}) and set(COLUMNS) <= r.keys()}
        config = read_json(self.folder, "config.json")
        precision = str(config.get("amp_dtype")).removeprefix("torch.").replace("None", "float32")
        self.rt.print(f"{self.folder} is finished ({result['epochs']} epochs) in {precision}; its "
                      "result:\n" + table(rows, title))
        for file in retrained(config):
            self.rt.print(f"Its teacher {shown(file)} has been trained again since then: "
                          "--overwrite trains this one again, too")
        picture = os.path.join(self.folder, "summary.png")
        if (draw and self.rt.main and os.path.exists(self.checkpoint)
                and not os.path.exists(picture)):
            draw(self.folder)
        compared = all("margin" in rows.get(name, {}) for name in ("teacher_avg", "avg+teacher"))
        if draw and "avg" in rows and (compared or result.get("teacher") is None):
            self.rt.print(advice(rows, self.folder, result["teacher"], config))
        return True

    def write(self, action):
        """Call action() in the main process; if it cannot write, all processes end."""
        error = None
        if self.rt.main:
            try:
                if self.lock and self.lock.file is not None and not self.lock.in_place():
                    raise UserError(f"cannot write in {self.folder}: it was removed, or is "
                                    "another run's now")
                action()
            except UserError as caught:
                error = caught
            except OSError as caught:
                error = UserError(f"cannot write in {self.folder}: {caught.strerror}; what was "
                                  "written before is intact")
        failed, = all_max([int(error is not None)], self.rt)
        if failed:
            exit_together(error, self.rt)


def is_there(path):
    """Is a teacher's file, or the result of its run, there, so that none is trained?"""
    return os.path.isfile(path) or os.path.exists(os.path.join(path, "result.json"))


def real_paths(teacher):
    """The setting `teacher`, paths by commas or None, in one spelling."""
    return teacher and [os.path.realpath(path) for path in teacher_files(teacher)]


def is_epoch(line):
    """Is a line of the log, a dict or None, what after_epoch has written?"""
    return line is not None and all(isinstance(line.get(name), (int, float))
                                    for name in ("epoch", "seconds"))
