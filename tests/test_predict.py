"""From a trained network to predictions, exported files and honest error bars."""
import csv
import importlib.util
import json
import sys
import types

import pytest
import torch
from PIL import Image

import analyze
import engine
import image_files
import networks
import predict
import quantities
import run_folder
import train_student
import train_teacher
from conftest import script

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def runs(tiny_cifar, learned_by_heart, tmp_path_factory):
    """{"teacher", "student": run folder}; the student knows tiny_cifar well."""
    folder = tmp_path_factory.mktemp("predict")
    with pytest.MonkeyPatch.context() as patch:
        script(train_teacher, patch, "--data-dir", tiny_cifar, "--imb", 1, "--epochs", 1, "--out", folder / "teacher")
    return {"teacher": folder / "teacher", "student": learned_by_heart}


def test_predictions_of_files_folders_and_patterns(runs, tiny_cifar, tmp_path, monkeypatch, capsys):
    """Classes by another order, images shifted against their names by a bad one, a batch's second half lost."""
    for k in range(10):
        for i in range(2):
            Image.open(tiny_cifar / "test" / f"class{k}" / f"{i}.png").resize((70, 64)).save(tmp_path / f"class{k} {i}.jpg")
    (tmp_path / "class3 0.jpg").write_text("no image")
    monkeypatch.setattr(predict.predict, "__defaults__", (5, 8))          # batches of 8
    script(analyze, monkeypatch, "predict", "--checkpoint", runs["student"], tmp_path, "--topk", 3, "--csv", tmp_path / "p.csv")
    out, err = capsys.readouterr()
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert len(rows) == 19 == out.count(" %, ") // 2 and "class3 0.jpg: no image" in err
    assert sum(row["class"] in row["image"] for row in rows) >= 17
    assert all(float(row["probability"]) >= float(row["probability 2"]) >= float(row["probability 3"]) for row in rows)
    assert predict.find_images([str(tmp_path / "class1 *.jpg")]) == [str(tmp_path / f"class1 {i}.jpg") for i in range(2)]
    assert len(predict.find_images([str(tmp_path)])) == 20


def test_predictions_are_those_of_the_evaluation(runs, tiny_cifar):
    """Another resize, crop, normalisation or head than the reported accuracy has."""
    rt = engine.Runtime(torch.device("cpu"))
    for run in runs.values():
        found, args, data = analyze.load(str(run), rt)
        logits = analyze.test_logits(found, data, args, rt)
        files = image_files.list_folder(tiny_cifar / "test")
        rows = predict.predict(found, [path.decode() for path in files.paths], rt, topk=1)
        assert [row["class"] for row in rows] == [data.class_names[k] for k in logits.argmax(dim=1)]
        overall = 100 * (logits.argmax(dim=1) == data.test_labels).float().mean()
        assert float(overall) == pytest.approx(analyze.evaluated(found, data, args, rt)["avg"]["overall"], abs=0.01)


@pytest.mark.parametrize("flags, words", [([], "--checkpoint"), (["--checkpoint", "{student}", "nowhere/*.jpg"], "nowhere"),
                                          (["--checkpoint", "{student}", "{text}"], "none of the images")])
def test_a_prediction_of_nothing_says_why(flags, words, runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "x.jpg").write_text("no image")
    flags = [flag.format(student=runs["student"], text=tmp_path / "x.jpg") for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        script(analyze, monkeypatch, "predict", *flags or ["x.jpg"])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_an_exported_network_is_the_network_for_any_number_of_images(kind, runs, tmp_path, monkeypatch, capsys):
    """A batch size frozen into the file, the normalisation left out, CLS alone exported."""
    script(analyze, monkeypatch, "export", runs[kind], "--out", tmp_path / "m")
    assert "logits agree" in capsys.readouterr().out
    extra = {"class_names.json": ""}
    program = torch.export.load(str(tmp_path / "m.pt2"), extra_files=extra).module()
    found = networks.load_network(str(runs[kind]))
    x = torch.rand(7, 3, 32, 32)
    with torch.no_grad():
        logits = train_student.heads(found.net, x)["avg"] if kind == "student" else found.net(x)
    torch.testing.assert_close(program(x), logits, rtol=1e-3, atol=1e-3)
    assert json.loads(extra["class_names.json"]) == [f"class{k}" for k in range(10)]
    assert (tmp_path / "m.onnx").exists() == all(importlib.util.find_spec(n) for n in ("onnx", "onnxscript", "onnxruntime"))


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_mirrored_network_does_not_care_which_side_is_left(kind, runs, tiny_cifar, tmp_path, monkeypatch, capsys):
    """An image turned upside down, a head left out of the mean, files that keep to one side."""
    net = networks.load_network(str(runs[kind])).net
    x, both = torch.rand(4, 3, 32, 32), networks.Mirrored(net).eval()
    with torch.no_grad():
        for name, logits in train_student.heads(both, x).items() if kind == "student" else [("avg", both(x))]:
            mean = [train_student.heads(net, v)[name] if kind == "student" else net(v) for v in (x, x.flip(-1))]
            torch.testing.assert_close(logits, sum(mean) / 2)
            assert not torch.equal(*mean)
    image = Image.open(tiny_cifar / "test" / "class2" / "0.png")
    for name, side in (("left", image), ("right", image.transpose(Image.FLIP_LEFT_RIGHT))):
        side.save(tmp_path / f"{name}.png")
    script(analyze, monkeypatch, "predict", "--checkpoint", runs[kind], tmp_path, "--mirror", "--csv", tmp_path / "p.csv")
    left, right = csv.DictReader((tmp_path / "p.csv").open())
    assert left["class"] == right["class"]
    assert float(left["probability"]) == pytest.approx(float(right["probability"]), abs=1e-3)
    script(analyze, monkeypatch, "eval", runs[kind], "--mirror", "--out", tmp_path / "per_class.csv")
    assert "image and mirror image" in capsys.readouterr().out
    script(analyze, monkeypatch, "export", runs[kind], "--mirror", "--out", tmp_path / "m")
    program = torch.export.load(str(tmp_path / "m.pt2")).module()
    torch.testing.assert_close(program(x), program(x.flip(-1)), rtol=1e-3, atol=1e-3)
    with pytest.raises(SystemExit):
        script(analyze, monkeypatch, "rank", runs[kind], "--mirror")


def test_an_export_that_differs_is_refused():
    with pytest.raises(engine.UserError, match="other logits"):
        predict.agreement(torch.tensor([1.0, 2.01]), torch.tensor([1.0, 2.0]), "x")


def test_the_evaluation_writes_classes_and_confusion(runs, tmp_path, monkeypatch, capsys):
    script(analyze, monkeypatch, "eval", runs["student"], "--out", tmp_path / "per_class.csv")
    out = capsys.readouterr().out
    assert "95 % of 1,000" in out and "calibration error" in out
    assert (tmp_path / "confusion.png").stat().st_size > 5000
    assert len((tmp_path / "per_class.csv").read_text().splitlines()) == 11


# ---- Quantities ----------------------------------------------------------------------------------------------------------

def test_the_calibration_error_of_known_cases():
    """A signed gap that cancels between bins; bins weighted alike instead of by their images."""
    confidence = torch.tensor([0.9] * 10 + [0.5] * 30)
    right = torch.tensor([1] * 9 + [0] + [1] * 15 + [0] * 15, dtype=torch.bool)
    assert quantities.calibration_error(confidence, right) == pytest.approx(0, abs=1e-6)
    right[:10] = True                                                     # 0.9 said, 1.0 true: 0.1 of a quarter of the images
    right[10:] = torch.tensor([True] * 12 + [False] * 18)                 # 0.5 said, 0.4 true
    assert quantities.calibration_error(confidence, right) == pytest.approx(0.25 * 0.1 + 0.75 * 0.1, abs=1e-6)
    assert quantities.calibration_error(torch.ones(4), torch.zeros(4, dtype=torch.bool)) == 1


def test_a_balanced_head_is_the_likelihood_of_bayes_rule():
    """The prior added, or another's: p(y|x) = p(x|y) pi_y / p(x), so CLS - ln pi is ln p(x|y) but for a constant."""
    torch.manual_seed(0)
    likelihood, counts = torch.rand(6, 3, dtype=torch.double), [70, 20, 10]
    cls = (likelihood * torch.tensor([0.7, 0.2, 0.1])).log() + torch.randn(6, 1, dtype=torch.double)
    ways = quantities.combinations(cls, torch.zeros(6, 3), counts)
    right = likelihood / likelihood.sum(dim=1, keepdim=True)
    torch.testing.assert_close(ways["balanced CLS"].softmax(dim=1), right)
    torch.testing.assert_close(ways["balanced CLS + DIST, logits"].softmax(dim=1), right)
    torch.testing.assert_close(ways["balanced CLS + DIST, probabilities"], right + 1 / 3)


def test_heads_are_combined_as_their_names_say():
    """CLS is loud and wrong about all that DIST knows: logits follow the loud one, probabilities are bounded."""
    cls, dist = torch.tensor([[30.0, 0.0, 29.0]]), torch.tensor([[-2.0, 1.0, 3.0]])
    ways = quantities.combinations(cls, dist, [1, 1, 1])
    torch.testing.assert_close(ways["CLS + DIST, logits"], torch.tensor([[28.0, 1, 32]], dtype=torch.double))
    louder = quantities.combinations(100 * cls, dist, [1, 1, 1])["CLS + DIST, equal spread"]
    torch.testing.assert_close(ways["CLS + DIST, equal spread"], louder)
    assert 0 < ways["CLS + DIST, probabilities"].min() and ways["CLS + DIST, probabilities"].sum() == pytest.approx(2)
    torch.testing.assert_close(ways["balanced CLS"].softmax(dim=1), cls.double().softmax(dim=1))      # nothing to balance
    adjusted = quantities.combinations(cls, dist, None)                   # balanced by its loss, not twice
    assert set(adjusted) == {name for name in ways if "balanced" not in name}
    assert all(torch.equal(scores, ways[name]) for name, scores in adjusted.items())


def test_the_bootstrap_is_as_wide_as_the_binomial():
    """Resampled labels (too wide), or percentiles of something else: a class of n images scatters by sqrt(p (1 - p) / n)."""
    labels = torch.arange(4).repeat_interleave(torch.tensor([400, 400, 100, 0]))
    right = torch.zeros(900, dtype=torch.bool)
    right[:200] = right[400:800] = right[800:810] = True                  # 50 %, 100 %, 10 %
    low, high = quantities.bootstrap(right, labels, {"head": [0], "mid": [1, 3], "tail": [2]})
    for name, p, n in (("head", 0.5, 400), ("tail", 0.1, 100)):
        half = 100 * 1.96 * (p * (1 - p) / n) ** 0.5
        assert low[name] == pytest.approx(100 * p - half, abs=0.7) and high[name] == pytest.approx(100 * p + half, abs=0.7)
    assert (low["mid"], high["mid"]) == (100, 100) and low["overall"] < 100 * 610 / 900 < high["overall"]
    assert (high["overall"] - low["overall"]) / 100 * 900 == pytest.approx(2 * 1.96 * (400 * 0.25 + 100 * 0.09) ** 0.5, rel=0.1)


# ---- Trackers ------------------------------------------------------------------------------------------------------------

TINY = "--method vit --model micro --epochs 2 --drw-epoch 1 --eval-every 2 --imb 4".split()


def test_weights_and_biases_is_told_every_epoch(tiny_cifar, tmp_path, monkeypatch):
    """Steps from zero, nested numbers that it cannot draw, a second run after --resume."""
    told, begun = [], []
    fake = types.SimpleNamespace(init=lambda **kw: begun.append(kw) or types.SimpleNamespace(
        log=lambda numbers, step: told.append((step, numbers))))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    script(train_student, monkeypatch, *TINY, "--data-dir", tiny_cifar, "--out", tmp_path / "run", "--wandb")
    assert [step for step, _ in told] == [1, 2] and len(begun[0]["id"]) == 8 and begun[0]["resume"] == "allow"
    assert told[1][1]["avg/tail"] >= 0 and all(isinstance(v, float) for v in told[1][1].values())


def test_tensorboard_gets_the_log(tiny_cifar, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    script(train_student, monkeypatch, *TINY, "--data-dir", tiny_cifar, "--out", tmp_path / "run", "--tensorboard")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(i + 1, pytest.approx(r["loss"])) for i, r in enumerate(log)]


@pytest.mark.parametrize("flag, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_tracker_that_is_not_installed_says_so(flag, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    args = types.SimpleNamespace(wandb=False, tensorboard=False, out=str(tmp_path), name="x")
    setattr(args, flag, True)
    with pytest.raises(engine.UserError, match=f"pip install {flag}"):
        run_folder.trackers(args, False)
