r"""What a run says while there is time to stop it: one line each, with what to do.

    at the start        how right a constant answer is; a budget too short for the schedule
    after LOOK steps    a loss that does not fall; how few classes the network predicts
    at an evaluation    the latter again, and an accuracy that a constant answer has too

Each comes once, that about classes again if it gets much worse. Nothing here is in the run's log.
The device is waited for at three steps of a run and at evaluations only.
"""
import torch

import augment
from engine import evaluation
from engine.training import FEWEST_STEPS, fewest_epochs

# Steps after which the network is looked at: (at least, at most, share of the run).
LOOK = (200, 500, 0.1)
MEAN = 100                  # steps, below which their mean loss varies too much to be judged
PER_CLASS = 5               # or so many steps per class, where that is more than 500
IMAGES = 500                # test images that are looked at, as many of each class
STUCK = 0.98                # a loss above this share of the first one has not fallen
LEARNED = 0.995             # one above this share of a constant answer's has learned no image


def constant_answer(tests, class_names):
    """How right always answering the commonest class would be, for people. tests: images (K,)."""
    share, name, classes = commonest(tests, class_names)
    return (f"Always answering '{name}' would be right on {share:.1f} % of the test images "
            f"(balanced accuracy {100 / classes:.1f} %).")


def commonest(tests, class_names):
    """(percent of the test images, name) of their commonest class; how many classes have some."""
    k = int(tests.argmax())
    share = round(100 * tests[k].item() / tests.sum().item(), 3)       # as accuracies are
    return share, class_names[k], int((tests > 0).sum())


def constant_loss(args, counts):
    """Cross-entropy (nats) of always answering with the labels' frequencies: their entropy.

    Of smoothed labels, (1 - s) pi + s / K, while images are mixed. None where the run's loss is not
    the mean cross-entropy of these labels.
    """
    settings = vars(args)
    if settings.get("method") in ("vit-crt", "deit-iii"):
        return None
    if settings.get("loss", "ce") not in ("ce", "la"):
        return None
    if "method" in settings:
        mixed, smoothing = float(args.mixup + args.cutmix > 0), args.smoothing
    else:
        mixed = settings.get("mixing", 0.0)
        smoothing = 0.1 if args.loss == "ce" else 0.0
    smoothing *= mixed                      # in the mean over batches
    p = torch.tensor(counts, dtype=torch.double)
    p = (1 - smoothing) * (p / p.sum()) + smoothing / len(p)
    return -(p * p.log()).sum().item()


class EarlyWarnings:
    """Watches one run, in its main process. args: its settings; steps: of an epoch.

    metrics: names of a step's numbers, see Run.start. resumed: it is not watched from its start.
    """

    def __init__(self, args, data, metrics, steps, rt, resumed):
        self.args, self.data, self.steps, self.rt = args, data, steps, rt
        self.loss = metrics.index("loss_cls") if "loss_cls" in metrics else 0
        self.worst = {}                         # kind of warning -> the number that it was about
        total, warm_up = args.epochs * steps, round(args.warmup_epochs * steps)
        least, most, share = LOOK
        most = max(most, PER_CLASS * data.num_classes)
        self.look_at = min(total // 2, max(least, warm_up, min(most, round(share * total))))
        self.done = self.look_at if resumed else 0
        labels = data.test_labels.cpu()
        index = evaluation.balanced_sample(labels, IMAGES)
        self.labels, self.index = labels[index], index.to(rt.device)
        self.tests = torch.bincount(labels, minlength=data.num_classes)     # images by class (K,)
        self.sum, self.sums = torch.zeros(2, device=rt.device), []      # loss, finite steps
        rt.print(constant_answer(self.tests, data.class_names))
        if not resumed:
            self.check_budget(total)

    def say(self, kind, number, text):
        """Print a warning, once; again when its number is below half of what it was."""
        if kind not in self.worst or number < self.worst[kind] / 2:
            self.worst[kind] = number
            self.rt.print(f"Warning: {text}")

    def check_budget(self, total):
        args = self.args
        if total < FEWEST_STEPS:
            longer = FEWEST_STEPS / total
            advice = f"--epochs {fewest_epochs(self.steps)}"
            if args.minutes is not None:            # of a student's teacher they are a share
                advice = f"{longer:.1f} times the --minutes"
            self.say("budget", 0, f"{total} steps of the optimizer (--epochs {args.epochs}, "
                     f"{self.steps} steps each) are too few to learn much; {advice} makes "
                     f"{FEWEST_STEPS}, as does a smaller --batch")
        elif args.warmup_epochs >= args.epochs:
            self.say("budget", 0, f"the warm-up, {args.warmup_epochs:g} epochs, does not end in "
                     f"{args.epochs}: fewer --warmup-epochs, or more epochs")

    def after_step(self, epoch, values, finite, net):
        """values: a step's numbers, a tensor; finite: 0.0 for a step that was undone."""
        if self.done >= self.look_at:
            return
        self.done += 1
        loss = values[self.loss]
        self.sum += torch.where(finite > 0, torch.stack([loss, torch.ones_like(loss)]), 0)
        if self.done in (self.look_at // 5, self.look_at // 2, self.look_at):
            self.sums.append(self.sum.tolist())
        if self.done == self.look_at and len(self.sums) == 3:
            self.check_loss()
            self.check_classes(epoch, net)

    def after_epoch(self, epoch, net, results):
        """results: of the epoch's evaluation, or None."""
        if results and (self.done >= self.look_at or epoch + 1 == self.args.epochs):
            self.check_classes(epoch, net, results)

    def check_loss(self):
        """Mean loss of the second half of the first steps against their first fifth."""
        args, ((fifth, n_fifth), (half, n_half), (total, n)) = self.args, self.sums
        if self.look_at < MEAN:
            return
        first, now = fifth / max(1, n_fifth), (total - half) / max(1, n - n_half)
        if args.drw_epoch * self.steps < self.look_at and args.beta > 0:
            return                              # re-weighted meanwhile: another loss
        advice = (f"try another --lr than {args.lr:g}, a tenth of it or ten times, and look at the "
                  "images and their labels")
        constant = constant_loss(args, self.data.counts)
        if now > STUCK * first and not getattr(args, "finetune", None):
            self.say("loss", 0, f"the loss does not fall: {first:.3f} in the first "
                     f"{self.look_at // 5} steps, {now:.3f} up to step {self.look_at}; {advice}")
        elif constant is not None and now > LEARNED * constant:
            self.say("loss", 0, f"after {self.look_at} steps the loss, {now:.3f}, is no lower than "
                     f"the class frequencies alone give, {constant:.3f}; {advice}")

    def check_classes(self, epoch, net, results=None):
        """How many classes are predicted for test images, and is that better than one answer?

        results: of an evaluation; else accuracies are those of the images that are looked at.
        """
        args, data = self.args, self.data
        labels, answers = self.labels, self.answers(net).cpu()
        number = torch.bincount(answers[answers >= 0], minlength=data.num_classes)
        predicted, k = int((number > 0).sum()), int(number.argmax())
        share, name, classes = commonest(self.tests, data.class_names)
        seen = len(self.labels.unique())            # of many classes not all are looked at
        when = f"epoch {epoch + 1}"
        # Deferred re-weighting is to find the rare classes: until then an eighth is enough.
        ahead = (args.beta > 0 and epoch < args.drw_epoch < args.epochs
                 and getattr(args, "distill", "") != "none")
        if predicted < min(seen, max(2, seen / 8 if ahead else seen / 2)):
            advice = "train longer (--epochs, --minutes)"
            if args.recipe not in ("ours", "gpu"):
                advice += " or try --recipe ours"
            often = 100 * number[k].item() / len(labels)
            self.say("classes", predicted, f"{when}: the network predicts {predicted} of {seen} "
                     f"classes, '{data.class_names[k]}' for {often:.0f} % of the test images, each "
                     f"class counted alike; {advice}")
        if results:
            overall = results["avg"]["overall"]
            balanced = torch.tensor(results["avg"]["per_class"]).nanmean().item()
        else:
            overall, balanced = estimates(labels, answers, self.tests)
        # Near chance c: odds below twice its own, as in evaluation.accuracy_on_clean.
        near_chance = balanced * (1 - 1 / classes) < 2 / classes * (100 - balanced)
        if overall < share and near_chance:
            self.say("accuracy", 0, f"{when}: {overall:.1f} % of the test images are right, fewer "
                     f"than by always answering '{name}', {share:.1f} %, and the balanced "
                     f"accuracy, {balanced:.1f} %, is near chance; train longer, or try another "
                     "--lr")
        elif overall < share and results and epoch + 1 >= args.epochs / 2:
            self.say("accuracy", 0, f"{when}: {overall:.1f} % of the test images are right, fewer "
                     f"than by always answering '{name}', {share:.1f} %: training makes rare "
                     f"classes count as much as frequent ones; judge by the balanced accuracy, "
                     f"{balanced:.1f} % (of one answer: {100 / classes:.1f} %)")

    @torch.no_grad()
    def answers(self, net):
        """The predicted classes (n,) of the test images that are looked at."""
        args, found = self.args, []
        training = net.training
        net.eval()
        for index in self.index.split(100):
            x = augment.to_float(self.data.test_images[index])
            with self.rt.autocast():
                if hasattr(args, "method"):                             # a student
                    x = evaluation.student_input(x, args.img_size, args.eval_crop)
                    logits = evaluation.student_heads(net, x)["avg"]
                else:
                    logits = net(evaluation.teacher_input(x, net.img_size))
            found.append(evaluation.predicted(logits))
        net.train(training)
        return torch.cat(found)


def estimates(labels, answers, tests):
    """(overall, balanced accuracy) in percent by a sample of the test images (n,).

    overall: the classes' recalls, each as often as it is in the test set, `tests` (K,).
    """
    right = torch.bincount(labels[answers == labels], minlength=len(tests))
    seen = torch.bincount(labels, minlength=len(tests))
    recall, share = (100 * right / seen)[seen > 0], tests[seen > 0].double()
    return (share * recall).sum().item() / share.sum().item(), recall.mean().item()
