"""Temperatures: fitted right, on the right images, kept beside their network, used by predict."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import analyze
from analysis import accuracy, calibration, loading, predict
from conftest import script
from engine import runtime
from engine.checkpoints import load_checkpoint, save_checkpoint
from engine.runtime import UserError
from finished_runs import RT, rows_of, runs  # noqa: F401: a fixture


def draw(n, K, temperature, seed=0):
    """Logits (n,K) and labels drawn from their softmax at a temperature."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, K, generator=generator)
    p = (logits / temperature).softmax(dim=1)
    return logits, torch.multinomial(p, 1, generator=generator)[:, 0]


def likeliest(logits, labels, weights=None):
    """The temperature of the largest likelihood among 4,000, tried one by one in float64.

    Half an image more is wrong: the mean image, labelled as its second class.
    """
    weights = torch.ones(len(labels)) if weights is None else weights
    n, second = len(labels), logits.argsort(dim=1)[:, -2]
    temperatures = torch.logspace(-2, 2, 4001, dtype=torch.double).tolist()

    def likelihood(t):
        log_p = (logits.double() / t).log_softmax(dim=1)
        right, wrong = (log_p[torch.arange(n), k] for k in (labels, second))
        return float((weights * (right + 0.5 / n * wrong)).sum())
    return max(temperatures, key=likelihood)


# ---- Fitting -------------------------------------------------------------------------------------

@pytest.mark.parametrize("true", [0.4, 1.0, 2.5])
def test_the_temperature_is_that_of_the_largest_likelihood(true):
    """1 / T for T, a minimum, weights that do not count, an image that is not finite."""
    logits, labels = draw(40, 5, true)
    weights = torch.rand(40, generator=torch.Generator().manual_seed(1))
    for w in (None, weights):
        assert calibration.fit_temperature(logits, labels, w) == pytest.approx(
            likeliest(logits, labels, w), rel=2e-3)
    many, truth = draw(20000, 5, true, seed=2)
    assert calibration.fit_temperature(many, truth) == pytest.approx(true, rel=0.05)
    lost = torch.cat([logits, torch.full((1, 5), math.nan)])
    assert calibration.fit_temperature(lost, torch.cat([labels, labels[:1]])) == (
        calibration.fit_temperature(logits, labels))


@pytest.mark.parametrize("n", [1, 20, 500])
def test_where_nothing_is_wrong_half_an_image_is(n):
    """T = 1 that nobody fitted, of a network that is right on all images and 73 % sure; a handful
    of images, all right, that make every later answer 100 % sure; a wrong one of a class that does
    not count; no image at all, or a network that says nothing."""
    logits, labels = torch.tensor([[1.0, 0]]).repeat(n, 1), torch.zeros(n, dtype=torch.long)
    p = n / (n + 0.5)                                                   # by hand
    temperature = calibration.fit_temperature(logits, labels)
    assert temperature == pytest.approx(1 / math.log(p / (1 - p)), rel=1e-6)
    more, truth = torch.cat([logits, logits[:1]]), torch.cat([labels, labels[:1] + 1])
    assert calibration.fit_temperature(more, truth, 1.0 - truth) == temperature
    assert calibration.fit_temperature(logits[:0], labels[:0]) == 1.0
    assert calibration.fit_temperature(torch.full((n, 2), 3.0), labels) == 1.0


def test_a_half_without_a_mistake_is_fitted_as_the_other_is():
    """T = 1 for the half that is judged by images that are all right, the other's by their fit."""
    labels = torch.zeros(40, dtype=torch.long)
    half = calibration.half_of(labels)
    logits = torch.tensor([[1.0, 0]]).repeat(40, 1)
    logits[half.nonzero()[0]] = torch.tensor([0.0, 1])                  # the only mistake
    how = {"holdout": 0.2, "holdout_by": None}
    network = SimpleNamespace(config=how, configs=())
    found = calibration.calibrate(network, SimpleNamespace(**how),
                                  SimpleNamespace(test_labels=labels), RT, logits)
    for judged, right in ((half, 20), (~half, 19)):
        p = right / 20.5                    # of the other half; its mistake has the second as truth
        expected = 1 / math.log(p / (1 - p))
        assert found.temperatures[judged].tolist() == pytest.approx([expected] * 20, rel=0.03)
    assert found.halves and "each half of them by the temperature of the other" in found.text


def test_no_held_out_image_is_judged_by_a_temperature_fitted_on_it():
    """The calibration error of a fit on the very images it is measured on. Rows are (half, ...):
    the halves are made of other temperatures, so each must get the other's."""
    labels = torch.arange(4).repeat(50)
    half = calibration.half_of(labels)
    assert torch.bincount(labels[half]).tolist() == [25] * 4
    logits = torch.empty(200, 4)
    for mask, true, seed in ((half, 0.5, 0), (~half, 4.0, 1)):
        noise = 3 * torch.randn(100, 4, generator=torch.Generator().manual_seed(seed))
        logits[mask] = noise + 3 / true * nn.functional.one_hot(labels[mask], 4)
    data = SimpleNamespace(test_labels=labels)
    how = {"holdout": 0.2, "holdout_by": None}
    network = SimpleNamespace(config=how, configs=())
    found = calibration.calibrate(network, SimpleNamespace(**how), data, RT, logits)
    for mine, other in ((half, ~half), (~half, half)):
        t = likeliest(logits[other], labels[other])
        expected = (logits[mine] / t).softmax(dim=1).amax(dim=1)
        torch.testing.assert_close(found.after[mine], expected, atol=2e-3, rtol=0)
    assert found.temperature == pytest.approx(likeliest(logits, labels), rel=2e-3)
    assert "200 held-out images (after: each half of them by" in found.text
    assert "may be too low" not in found.text
    torch.testing.assert_close(found.before, logits.softmax(dim=1).amax(dim=1))


class Constant(nn.Module):
    """Says of every image that it is class 0, with this logit; that of class 1 is 0."""
    img_size = 8

    def __init__(self, logit):
        super().__init__()
        self.logits = torch.tensor([logit, 0.0])

    def forward(self, x):
        return self.logits.expand(len(x), 2)


def says(logit, **more):
    return SimpleNamespace(net=Constant(logit), teacher=None, kind="teacher", **more)


def two_classes(tested):
    """Data: 3 and 1 black training images of two classes, `tested` and 1 to test on."""
    return SimpleNamespace(train_images=torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
                           train_labels=torch.tensor([0, 0, 0, 1]), num_classes=2,
                           test_labels=torch.tensor([0] * tested + [1]))


def test_training_images_count_as_their_classes_do_in_the_test_set():
    """Images of the test set used; classes as frequent as in training. By hand: 9 of 10 test images
    are in class 0, of the training images 3 of 4. Of these 4, half a one more is wrong, which makes
    0.9 to 0.8, and ln(0.8 / 0.2) is 1 / T."""
    network, args = says(1.0, config={}, configs=()), SimpleNamespace(holdout=None)
    logits = torch.tensor([[1.0, 0.0]]).expand(10, 2)
    found = calibration.calibrate(network, args, two_classes(9), RT, logits)
    assert found.temperature == pytest.approx(1 / math.log(4), rel=1e-3)
    assert found.errors[1] == pytest.approx(0.9 - 0.8, abs=1e-3) and "may be too low" in found.text
    assert not found.halves and "after:" not in found.text
    p = math.e / (1 + math.e)                                           # before: one bin
    assert found.errors[0] == pytest.approx(0.9 - p, abs=1e-5)


@pytest.mark.parametrize("trained", [{}, {"holdout": 0.1}, {"holdout": 0.2, "holdout_by": "x"}])
def test_images_that_training_did_not_hold_out_are_not_called_so(trained):
    """Images of the training, named held-out because a flag or another network says so."""
    how = {"holdout": 0.2, "holdout_by": None}
    network = says(1.0, config=how, configs=[how, trained])
    logits = torch.tensor([[1.0, 0.0]]).expand(10, 2)
    found = calibration.calibrate(network, SimpleNamespace(**how), two_classes(9), RT, logits)
    assert "held-out" not in found.text and " training images, weighted" in found.text


@pytest.mark.parametrize("logit, expected", [(1.0, 1.0), (9.0, 9 / math.log(0.88 / 0.12))])
def test_a_network_that_knows_its_images_by_heart_is_not_made_surer(logit, expected):
    """Certainty of what was memorised, taken for certainty of new images: 99 of 100 are right, 88
    with half a wrong one of four. Or T = 1 also for a network that is far too sure: logit 9 is
    99.99 %."""
    temperature, source = calibration.fit_on_training_images(says(logit), two_classes(99), RT)
    assert temperature == pytest.approx(expected, rel=1e-3)
    assert ("T stays 1" in source) == (expected == 1)


# ---- Kept beside the network ---------------------------------------------------------------------

@pytest.fixture
def own_run(runs, tmp_path):
    """A copy of the finished ViT, that nobody has evaluated."""
    folder = tmp_path / "vit"
    folder.mkdir()
    for name in ("last.pt", "config.json", "result.json"):
        (folder / name).write_bytes((runs["vit"] / name).read_bytes())
    return folder


def predictions(monkeypatch, tmp_path, run, image, *flags):
    """The row that predict writes for one image."""
    script(analyze, monkeypatch, "predict", "--checkpoint", run, image, "--topk", 10, "--csv",
           tmp_path / "p.csv", *flags)
    row, = rows_of(tmp_path / "p.csv")
    return row


def test_predict_uses_what_eval_has_kept(own_run, tiny_cifar, tmp_path, monkeypatch, capsys):
    """A temperature of other weights, or of the network without its mirror images; one that is
    multiplied; a probability that is not said to be calibrated, or said to be so."""
    image = tiny_cifar / "test" / "class9" / "0.png"
    before = predictions(monkeypatch, tmp_path, own_run, image)
    assert "not calibrated" in capsys.readouterr().err
    script(analyze, monkeypatch, "eval", own_run)
    entry, = json.loads((own_run / "calibration.json").read_text()).values()
    t = entry["temperature"]
    capsys.readouterr()
    after = predictions(monkeypatch, tmp_path, own_run, image)
    assert f"temperature {t:.3g}" in capsys.readouterr().err
    x = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)[None] / 255
    rt = runtime.setup("cpu")                              # bfloat16 where the script takes it
    with rt.autocast():
        logits = predict.Predictor(loading.load_alone(str(own_run), rt))(x)[0].double()
    for row, p in ((before, logits.softmax(dim=0)), (after, (logits / t).softmax(dim=0))):
        found = [float(row[f"probability{r}"]) for r in RANKS]
        assert found == pytest.approx(p.sort(descending=True).values.tolist(), abs=1e-4)
    assert after["class"] == before["class"] and abs(t - 1) > 0.05
    predictions(monkeypatch, tmp_path, own_run, image, "--mirror")
    advice = capsys.readouterr().err
    assert "has none for this network" in advice and f"eval {own_run} --mirror`" in advice
    script(analyze, monkeypatch, "eval", own_run, "--mirror")
    assert len(json.loads((own_run / "calibration.json").read_text())) == 2
    state = load_checkpoint(str(own_run))
    state["model"]["head.bias"] += 0.01
    save_checkpoint(own_run / "last.pt", **state)
    capsys.readouterr()
    predictions(monkeypatch, tmp_path, own_run, image)
    assert "not calibrated" in capsys.readouterr().err
    script(analyze, monkeypatch, "eval", own_run)
    assert len(json.loads((own_run / "calibration.json").read_text())) == 1     # stale ones go


def test_eval_on_other_data_leaves_the_temperature_alone(own_run, tiny_cifar, monkeypatch, capsys):
    """A temperature of other data, or of training images that count as held out, in the place of
    the network's own."""
    script(analyze, monkeypatch, "eval", own_run)
    kept = (own_run / "calibration.json").read_bytes()
    for flags in (("--imb", 10), ("--holdout", 0.5)):
        capsys.readouterr()
        script(analyze, monkeypatch, "eval", own_run, *flags)
        assert "the temperature is not saved" in capsys.readouterr().out
        assert (own_run / "calibration.json").read_bytes() == kept
    state = load_checkpoint(str(own_run))
    save_checkpoint(own_run / "last.pt", **state | {"data": "another folder's"})
    script(analyze, monkeypatch, "eval", own_run, "--data-dir", tiny_cifar)
    assert "the temperature is not saved" in capsys.readouterr().out
    assert (own_run / "calibration.json").read_bytes() == kept
    save_checkpoint(own_run / "last.pt", **state)
    (own_run / "calibration.json").unlink()
    script(analyze, monkeypatch, "eval", own_run, "--imb", 4, "--data-dir", tiny_cifar)
    assert (own_run / "calibration.json").read_bytes() == kept          # its own data, named


def test_a_temperature_of_1_is_not_called_a_calibration(own_run, tiny_cifar, tmp_path, monkeypatch,
                                                        capsys):
    """"Calibrated by temperature 1, fitted on" of a network of which nothing was fitted."""
    name = calibration.identity(loading.load_alone(str(own_run), RT))
    source = "9 training images, over 98 % of which are right: T stays 1"
    (own_run / "calibration.json").write_text(json.dumps(
        {name: {"temperature": 1.0, "fitted on": source}}))
    predictions(monkeypatch, tmp_path, own_run, tiny_cifar / "test" / "class9" / "0.png")
    err = capsys.readouterr().err
    assert f"probabilities are the network's own, temperature 1, from {source}" in err
    assert "calibrated" not in err and "fitted" not in err
    two = torch.ones(2)
    found = calibration.Calibration(1.0, source, two, two, two, two > 0)
    assert f"temperature 1, from {source}" in found.text and "fitted" not in found.text


RANKS = ["", *(f" {rank}" for rank in range(2, 11))]


@pytest.mark.parametrize("text", ["{", "[]", '{"x": 1}', "IDENTITY: -1", "IDENTITY: 1e9",
                                  "IDENTITY: NaN", "IDENTITY: true", 'IDENTITY: "2"'])
def test_a_damaged_calibration_is_refused(text, own_run, tiny_cifar, monkeypatch, capsys):
    """A traceback, or probabilities by a temperature that is none."""
    network = loading.load_alone(str(own_run), RT)
    if text.startswith("IDENTITY"):
        name = json.dumps(calibration.identity(network))
        text = f'{{{name}: {{"temperature": {text.split(": ")[1]}}}}}'
    (own_run / "calibration.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        script(analyze, monkeypatch, "predict", "--checkpoint", own_run,
               tiny_cifar / "test" / "class1")
    assert stopped.value.code == 2
    assert "remove it, and eval writes it again" in capsys.readouterr().err


def test_below_the_least_probability_the_answer_is_unsure(runs, tiny_cifar, tmp_path, monkeypatch,
                                                          capsys):
    """An answer at p < P, none at p = P; the class lost from the table; a P above 1."""
    rows = [predict.prediction_row("x", [0.75, 0.25], [1, 0], ["a", "b"], p)
            for p in (None, 0.75, 0.7501)]
    assert "answer" not in rows[0] and [row["class"] for row in rows] == ["b"] * 3
    assert [row["answer"] for row in rows[1:]] == ["b", "unsure"]
    assert predict.prediction_text(rows[1]) == "x: b 75.0 %, a 25.0 %"
    assert predict.prediction_text(rows[2]) == "x: unsure (b 75.0 %, a 25.0 %)"
    image = tiny_cifar / "test" / "class9" / "0.png"
    row = predictions(monkeypatch, tmp_path, runs["vit"], image, "--min-probability", "1")
    assert row["answer"] == "unsure" and row["class"].startswith("class")
    assert ": unsure (class" in capsys.readouterr().out
    for wrong in ("1.01", "-0.1", "nan"):
        with pytest.raises(SystemExit):
            predictions(monkeypatch, tmp_path, runs["vit"], image, "--min-probability", wrong)
        assert "--min-probability must be" in capsys.readouterr().err


def test_eval_of_somebody_elses_run_ends_well(own_run, tmp_path, monkeypatch, capsys):
    """All numbers lost because the temperature cannot be kept."""
    (own_run / "calibration.json").mkdir()
    script(analyze, monkeypatch, "eval", own_run, "--out", tmp_path / "x.csv")
    assert "predict cannot use the temperature" in capsys.readouterr().out


# ---- What is confused ----------------------------------------------------------------------------

def test_confusions_and_confident_mistakes():
    """Truth for prediction; right answers among them; shares of the predictions; an image that is
    predicted as no class."""
    data = SimpleNamespace(class_names=["a", "b", "c"],
                           test_labels=torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]))
    answers = torch.tensor([0, 1, 1, 2, 0, 1, 2, -1])
    rows = accuracy.confusion_rows(accuracy.confusion(answers, data.test_labels, 3),
                                   data.class_names)
    assert [list(row.values()) for row in rows] == [
        ["a", "b", 2, 4, 50.0], ["b", "a", 1, 2, 50.0], ["a", "c", 1, 4, 25.0]]
    assert accuracy.confusions_text(rows, 2).endswith("a as b (2 of 4), b as a (1 of 2)")
    p = torch.tensor([0.99, 0.5, 0.7, 0.4, 0.9, 0.9, 0.9, 1.0])
    index, wrong = accuracy.confident_mistakes(answers, p, data, 3)
    assert index.tolist() == [4, 2, 1]
    assert wrong[0] == {"true": "b", "predicted": "a", "probability": pytest.approx(0.9)}


# ---- A student with its teacher ------------------------------------------------------------------

def test_a_student_and_its_teacher_predict_together(runs, tiny_cifar, tmp_path, monkeypatch,
                                                    capsys):
    """One of them alone; images of the student's size for the teacher; another order of its
    classes; another mean than that of probabilities; a prior adjusted by what the student alone
    expects. 37 and 16 px here."""
    state = load_checkpoint(str(runs["teacher"]))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    state["class_names"] = [state["class_names"][k] for k in order]
    state["model"]["linear.weight"] = state["model"]["linear.weight"][:, order]
    state["config"] |= dict(beta=0.9999, drw_epoch=0)           # re-weighted, unlike the student
    save_checkpoint(tmp_path / "t.pt", **state)
    student, teacher = str(runs["deit-lt"]), str(tmp_path / "t.pt")
    both = loading.load_alone(f"{student},{teacher}", RT)
    x = torch.rand(3, 3, 37, 37)
    own = [predict.Predictor(loading.load_alone(path, RT)) for path in (student, runs["teacher"])]
    p = sum(model(x).detach().double().softmax(dim=1) for model in own) / 2
    found = predict.Predictor(both)(x).double().softmax(dim=1)
    torch.testing.assert_close(found, p, atol=1e-5, rtol=1e-4)
    assert predict.Predictor(both).size == 37 and own[1].size == 16
    swapped = loading.load_alone(f"{teacher},{student}", RT)
    assert swapped.kind == "student" and both.what == swapped.what

    script(analyze, monkeypatch, "eval", f"{student},{teacher}", "--out", tmp_path / "e.csv",
           "--test-prior", "uniform")
    out = capsys.readouterr().out
    assert "not adjusted: the networks expect different frequencies" in out
    loaded, _, data = loading.load(f"{student},{teacher}", RT)
    right = accuracy.test_logits(loaded, data, RT).argmax(dim=1) == data.test_labels
    line, = [line for line in out.splitlines() if line.startswith("avg + teacher")]
    assert float(line.split()[3]) == pytest.approx(100 * float(right.double().mean()), abs=0.06)
    with pytest.raises(UserError, match="two students"):
        loading.load_alone(f"{runs['vit']},{student}", RT)
    with pytest.raises(UserError, match="file.pth has no class names"):
        loading.load_alone(f"{student},{runs['file.pth']}", RT)


def test_both_are_exported_together(runs, tiny_cifar, tmp_path, monkeypatch, capsys):
    """A file of the student alone; a teacher whose size is frozen into the student's."""
    monkeypatch.setattr(predict, "ONNX", ("no_such_package",))
    path = f"{runs['vit']},{runs['teacher']}"
    script(analyze, monkeypatch, "export", path, "--out", tmp_path / "m")
    model = predict.Predictor(loading.load_alone(path, RT))
    x = torch.rand(3, 3, model.size, model.size)
    program = torch.export.load(str(tmp_path / "m.pt2")).module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), rtol=1e-3, atol=1e-3)
    assert json.loads((tmp_path / "m.json").read_text())["size"] == model.size


@pytest.mark.parametrize("before, after, worse", [(0.5, 1.0, True), (1.0, 0.5, False)])
def test_a_temperature_that_does_not_help_is_called_so(before, after, worse):
    """"No better on the test set" of one that is better."""
    right, two = torch.tensor([True, False]), torch.ones(2)
    found = calibration.Calibration(1.0, "2 held-out images", two, before * two, after * two, right)
    assert ("no better" in found.text) == worse
