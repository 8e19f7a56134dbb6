"""Run folders as finished trainings leave them, made in a second, without a training.

The networks have random weights; their classifiers are fitted in closed form, so that predictions
differ from image to image. As in DeiT-LT, CLS knows the head classes and DIST the tail.
"""
import csv
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import augment
import vit
from engine.checkpoints import save_checkpoint
from engine.records import save_json
from engine.datasets import load_data
from engine.evaluation import (COLUMNS, evaluate_student, evaluate_teacher, student_input,
                               teacher_input, teacher_summary, token_cosine)
from engine.networks import build_student, build_teacher
from engine.runtime import Runtime

RT = Runtime(torch.device("cpu"))
DATA = dict(format=2, dataset="cifar10", imb=4.0, imb_type="exp", holdout=None, train_list=None,
            test_list=None, skip_bad=False, epochs=3, seed=0, recipe="cpu")
STUDENT = DATA | dict(
    method="deit-lt", model="micro", img_size=32, patch_size=8, stem="patch", tokens=2,
    layer_scale=0.0, drop_path=0.0, eval_crop=1.0, crop="padded", rand_ops=2, magnitude=9.0,
    erasing=0.25, mixup=0.8, cutmix=1.0, teacher=None, teacher_norm=None, teacher_size=None,
    teacher_view="same", logit_adjustment=False, drw_epoch=2, mix_drw=False)
TEACHER = DATA | dict(arch="resnet32", loss="ldam", max_margin=0.5, img_size=16, norm="cifar")


made = {}       # name: path


@pytest.fixture(scope="session")
def runs(tiny_cifar, tmp_path_factory):
    """{"teacher", "deit-lt", "vit": run folder, "file.pth": a bare ViT}, on tiny_cifar.

    Made once, although every test file that imports this has its own copy of the fixture.
    """
    if made:
        return made
    root = tmp_path_factory.mktemp("runs")
    for name in ("teacher", "deit-lt", "vit"):
        (root / name).mkdir()
    torch.manual_seed(0)
    make_teacher(root / "teacher", TEACHER | dict(data_dir=str(tiny_cifar)))
    own = dict(data_dir=str(tiny_cifar), teacher=str(root / "teacher"), eval_crop=0.875)
    make_student(root / "deit-lt", STUDENT | own)
    make_student(root / "vit", STUDENT | dict(data_dir=str(tiny_cifar), method="vit", tokens=1))
    net = vit.MODELS["tiny"](img_size=32, patch_size=16, num_classes=10, depth=2)
    torch.save({"model": net.state_dict()}, root / "file.pth")
    made.update({path.name: path for path in root.iterdir()})
    return made


def read_result(folder):
    return json.loads((folder / "result.json").read_text())


def read_lines(folder):
    """The epochs of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def rows_of(path):
    """The rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@torch.no_grad()
def make_teacher(folder, config):
    data = load_data(SimpleNamespace(**config), RT)
    net = build_teacher(config, data.num_classes)
    x = teacher_input(augment.to_float(data.train_images), net.img_size)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0                               # the next batch's statistics
    net(x)
    net.eval()
    _, features = net(x, return_features=True)                  # (n,64)
    fit_cosine(net.classifier, features, data.train_labels)
    results = evaluate_teacher(net, data, RT)
    summary = teacher_summary(net, data, RT)
    finish(folder, config, net, data, results, method="ldam", model="resnet32", teacher=None,
           training_images=summary)


@torch.no_grad()
def make_student(folder, config):
    data = load_data(SimpleNamespace(**config), RT)
    net = build_student(config, data.num_classes, distilled=config["tokens"] == 2).eval()
    net.patch_embed.proj.weight *= 5                            # tokens that depend on the image
    x = student_input(augment.to_float(data.train_images), config["img_size"], config["eval_crop"])
    tokens, _ = net.forward_features(x)                         # (n,T,D)
    head_expert, tail_expert = data.train_labels.clone(), data.train_labels.clone()
    head_expert[head_expert > 7] = 0                            # CLS calls the rarest two class 0
    tail_expert[tail_expert == 0] = 1                           # DIST does not know class 0
    fit(net.head, tokens[:, 0], head_expert)
    if net.distilled:
        fit(net.head_dist, tokens[:, 1], tail_expert)
    results = evaluate_student(net, data, config["img_size"], config["eval_crop"], RT)
    cosine = token_cosine(net, data, config["img_size"], config["eval_crop"], RT)
    finish(folder, config, net, data, results, cosine, method=config["method"], model="micro",
           teacher=config["teacher"])


def fit(layer, features, labels):
    """Ridge regression of the labels (n,) on features (n,d) -> weight and bias of a Linear."""
    X = F.pad(features, (0, 1), value=1.0).double()             # (n,d+1)
    Y = F.one_hot(labels, layer.out_features).double()
    W = torch.linalg.solve(X.T @ X + 1e-4 * torch.eye(X.shape[1]), X.T @ Y)     # (d+1,K)
    layer.weight.copy_(10 * W[:-1].T)
    layer.bias.copy_(10 * W[-1])


def fit_cosine(layer, features, labels):
    """The same for a CosineClassifier, which has no bias: orthogonal to the mean feature."""
    mean = features.double().mean(dim=0)
    X = features.double() - mean                                # (n,d)
    Y = F.one_hot(labels, 10).double()
    W = torch.linalg.solve(X.T @ X + 1e-2 * torch.eye(X.shape[1]), X.T @ (Y - Y.mean(dim=0)))
    layer.weight.copy_(W - torch.outer(mean, mean @ W) / mean.square().sum())   # (d,K)


def finish(folder, config, net, data, results, cosine=None, **more):
    """Write the four files. Of the log's three epochs the first was not evaluated, the last has
    re-weighting, and its accuracies are the result's."""
    save_checkpoint(folder / "last.pt", model=net.state_dict(), config=config,
                    data=data.fingerprint, class_names=data.class_names, counts=data.counts,
                    groups=data.groups, epoch=3, step=0)
    save_json(folder / "config.json", config | dict(classes=data.class_names, counts=data.counts))
    lines = []
    for epoch in range(3):
        record = dict(epoch=epoch, lr=0.003 - 0.001 * epoch, skipped=0, drw=epoch == 2,
                      loss=2.5 - 0.5 * epoch, seconds=1.0)
        if epoch > 0:
            record["cosine"] = cosine if epoch == 2 or cosine is None else 0.75
            for head, result in results.items():
                share = 1.0 if epoch == 2 else 0.5
                record[head] = {column: share * result[column] for column in COLUMNS}
        lines.append(json.dumps(record))
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    result = dict(dataset=data.label, imb=config["imb"], recipe="cpu", epochs=3, seed=0,
                  command="python train.py --imb 4", hardware="1 thread", seconds=90.0,
                  date="2026-01-01") | more
    result |= {head: {column: r[column] for column in COLUMNS} for head, r in results.items()}
    result["per_class"] = {head: r["per_class"] for head, r in results.items()}
    save_json(folder / "result.json", result)


class Ended:
    """In place of a child process that has ended well."""
    returncode = 0

    def poll(self):
        return 0
