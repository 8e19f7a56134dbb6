"""The figures: what is drawn is what was measured, and their numbers say the same."""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import augment
from analysis import drawing, loading, quantities, run_figures, student_figures, teacher_figures
from engine.evaluation import student_heads, teacher_input, teacher_logits, teacher_summary
from engine.networks import Ensemble, load_teacher
from engine.runtime import UserError
from finished_runs import RT, read_lines, read_result, rows_of, runs  # noqa: F401: a fixture
from images.operations import center_crop
from losses import LDAMLoss
from resnet import FastNet

PNG = b"\x89PNG\r\n\x1a\n"
CLASSES = [f"class{k}" for k in range(10)]


@pytest.fixture(scope="module")
def networks(runs):
    """{name: loading.Subject} of the finished runs."""
    students = loading.load_networks("student", [str(runs["vit"]), str(runs["deit-lt"])], RT)
    teachers = loading.load_networks("teacher", [str(runs["teacher"])], RT)
    return dict(zip(("vit", "deit-lt", "teacher"), students + teachers))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    drawing.plt.close("all")


def lines(axis):
    """{label: ([x], [y])} of the lines of an axis that have one."""
    return {line.get_label(): tuple(list(map(float, v)) for v in line.get_data())
            for line in axis.lines if not line.get_label().startswith("_")}


def vertical_lines(axis):
    """x of the lines without a label and with two points: mark_drw's."""
    return {float(line.get_xdata()[0]) for line in axis.lines
            if line.get_linestyle() == "--" and line.get_xdata()[0] == line.get_xdata()[-1]}


# ---- Attention -----------------------------------------------------------------------------------

def test_attention_maps_are_those_of_the_shown_images(networks):
    """Another image's map, CLS and DIST exchanged, another head's prediction above a map."""
    vit, deit = networks["vit"], networks["deit-lt"]
    figure = student_figures.attention([vit, deit], RT, index=[59, 0], images=6).figure
    axes = [figure.axes[i:i + 2] for i in range(0, 8, 2)]       # rows of two images
    assert [axis.get_title() for axis in axes[0]] == ["class9", "class0"]
    rows = [axes[0][0].get_ylabel().split()] + [row[0].get_ylabel().split() for row in axes[1:]]
    assert rows == [["image"], ["vit", "CLS"], ["deit-lt", "CLS"], ["deit-lt", "DIST"]]
    for column, i in enumerate((59, 0)):
        images = drawing.student_images(vit, torch.tensor([i]))
        test_image = augment.to_float(vit.data.test_images[i:i + 1])
        assert torch.equal(images, test_image)
        cropped = drawing.student_images(deit, torch.tensor([i]))           # its eval_crop: 0.875
        assert torch.equal(cropped, center_crop(augment.resize(test_image, 37), 32))
        shown = torch.tensor(axes[0][column].images[0].get_array())
        assert torch.allclose(shown, images[0].permute(1, 2, 0))
        for row, subject, token in ((1, vit, "cls"), (2, deit, "cls"), (3, deit, "dist")):
            axis, images = axes[row][column], drawing.student_images(subject, torch.tensor([i]))
            heat = quantities.token_maps(subject.net, images)[token][0]
            assert torch.allclose(torch.tensor(axis.images[1].get_array()), heat)
            predicted = int(student_heads(subject.net, images)[token].argmax())
            label = int(subject.data.test_labels[i])
            assert axis.get_title() == CLASSES[predicted]
            assert (axis.title.get_fontweight() == "bold") == (predicted == label)
    titles = [axes[row][column].get_title() for row in (2, 3) for column in (0, 1)]
    assert titles == ["class0", "class0", "class9", "class1"]   # CLS knows the head, DIST the tail


def test_the_table_of_attention_is_measured_on_the_chosen_classes(networks, runs):
    """A token forgotten, the wrong images, means of means over batches."""
    subjects = [networks["vit"], networks["deit-lt"]]
    table = student_figures.attention(subjects, RT, classes=["class0", "class9"], columns=2).table
    assert [(r["run"], r["token"]) for r in table] == [("vit", "CLS"), ("deit-lt", "CLS"),
                                                       ("deit-lt", "DIST")]
    assert all(row["images"] == 12 and row["of"] == 16 for row in table)
    per_class = read_result(runs["deit-lt"])["per_class"]
    for row, head in zip(table[1:], ("cls", "dist")):
        accuracy = (per_class[head][0] + per_class[head][9]) / 2
        assert row["right %"] == pytest.approx(accuracy, abs=0.1)
    deit, index = subjects[1], drawing.images_of(subjects[1].data.test_labels, [0, 9], 12)
    images = drawing.student_images(deit, index)
    maps = quantities.token_maps(deit.net, images)
    spread = quantities.effective_patches(maps["dist"]).mean().item()
    alike = F.cosine_similarity(maps["dist"].flatten(1), maps["cls"].flatten(1)).mean().item()
    assert table[2]["patches"] == pytest.approx(spread, abs=0.006)
    assert table[2]["like CLS"] == pytest.approx(alike, abs=6e-4) and table[1]["like CLS"] == 1
    measured = student_figures.measure_maps(deit.net, images)["dist"]["marked"]
    assert table[2]["drop, marked"] == pytest.approx(100 * measured.mean().item(), abs=0.06)


def test_drops_are_those_of_the_marked_patch(monkeypatch):
    """Another class's probability, a map that covers nothing, the random cover for the map's.

    White upper left patch on black, logits (10 x its mean, 0). Covered with the image's mean, 1/4,
    they are (2.5, 0); the random cover hits another patch, which changes nothing.
    """
    images = torch.zeros(1, 3, 4, 4)
    images[:, :, :2, :2] = 1
    elsewhere = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])
    maps = {"cls": elsewhere, "dist": elsewhere.flip(1, 2)}
    monkeypatch.setattr(quantities, "token_maps", lambda net, x: maps)
    monkeypatch.setattr(torch, "rand_like", lambda x: elsewhere)

    def net(x):
        logits = F.pad(10 * x[:, 0, :2, :2].mean().view(1, 1), (0, 1))
        return logits, logits
    measured = student_figures.measure_maps(net, images)
    drop = torch.sigmoid(torch.tensor(10.0)) - torch.sigmoid(torch.tensor(2.5))
    assert measured["dist"]["marked"].item() == pytest.approx(drop.item(), rel=1e-4)
    assert measured["dist"]["random"].item() == measured["cls"]["marked"].item() == 0
    assert measured["dist"]["like CLS"].item() == measured["dist"]["predicted"].item() == 0


def test_distance_draws_every_head_of_every_block(networks):
    """A head or block lost, means over the wrong axis, the runs' colours or names exchanged."""
    subjects = [networks["vit"], networks["deit-lt"]]
    drawn = student_figures.distance(subjects, RT)
    axis, rows = drawn.figure.axes[0], drawn.numbers
    assert len(rows) == 2 * 6 * 3
    for i, s in enumerate(subjects):
        index = drawing.images_of(s.data.test_labels, [7, 8, 9], 18)
        _, attentions = s.net.forward_features(drawing.student_images(s, index),
                                               return_attention=True)
        for block, attention in enumerate(attentions, 1):
            pixels = quantities.attention_distance(attention, G=4, P=8).tolist()
            mine = [r["distance px"] for r in rows if (r["run"], r["block"]) == (s.name, block)]
            assert mine == pytest.approx(pixels, abs=1e-3)
        numbers = torch.tensor([r["distance px"] for r in rows if r["run"] == s.name]).view(6, 3)
        x, y = lines(axis)[s.label]
        assert [round(value) for value in x] == [1, 2, 3, 4, 5, 6]
        assert y == pytest.approx(numbers.mean(dim=1).tolist(), abs=1e-3)
        dots = [line.get_ydata().tolist() for line in axis.lines
                if line.get_marker() == "o" and line.get_color() == drawing.run_color(i)]
        assert sorted(sum(dots, [])) == pytest.approx(sorted(numbers.flatten().tolist()), abs=1e-3)
    dotted = [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"]
    assert dotted == pytest.approx([16.06] * 2, abs=0.01)       # even attention, 4 x 4 patches


def test_distance_does_not_depend_on_the_batches(networks, monkeypatch):
    """Means of means over batches of 25 and 5 images would weight the last five more."""
    whole = student_figures.distance([networks["vit"]], RT, CLASSES[:5]).numbers
    batches = drawing.image_batches
    monkeypatch.setattr(drawing, "image_batches", lambda s, index: batches(s, index, size=7))
    again = student_figures.distance([networks["vit"]], RT, CLASSES[:5]).numbers
    pixels = [row["distance px"] for row in whole]
    assert pixels == pytest.approx([row["distance px"] for row in again], abs=2e-3)
    assert len(set(pixels)) > 1


# ---- Features ------------------------------------------------------------------------------------

def test_rank_is_drawn_as_measured_and_agrees_with_its_curve(networks):
    """A rank of other features than the curve: it is the first m that loses less than 1 %."""
    drawn = student_figures.rank([networks["vit"], networks["deit-lt"]], RT)
    ranks, errors = drawn.numbers["rank"], drawn.numbers["reconstruction_error"]
    assert [(r["run"], r["token"], r["images"], r["n"]) for r in ranks] == [
        ("vit", "CLS", "all", 60), ("vit", "CLS", "tail", 18),
        ("deit-lt", "CLS", "all", 60), ("deit-lt", "DIST", "all", 60),
        ("deit-lt", "CLS", "tail", 18), ("deit-lt", "DIST", "tail", 18)]
    every, tail, curve = map(lines, drawn.figure.axes)
    for row, error in zip(ranks, (row["error"] for row in errors)):
        assert row["block 6"] == next(m for m, e in enumerate(error) if e < 0.01)
        name = f"{row['run']}, {row['token']}"
        blocks, values = (every if row["images"] == "all" else tail)[name]
        assert blocks == [1, 2, 3, 4, 5, 6] and values == [row[f"block {b}"] for b in range(1, 7)]
        if row["images"] == "tail":
            directions, percent = curve[name]
            assert directions == list(range(1, len(error)))
            assert percent == pytest.approx([100 * e for e in error[1:]], abs=1e-4)
    deit = networks["deit-lt"]
    index = drawing.images_of(deit.data.test_labels, [7, 8, 9], 18)
    tokens = quantities.block_tokens(deit.net, drawing.student_images(deit, index))
    assert ranks[-1]["block 3"] == quantities.feature_rank(tokens[2, :, 1])


# ---- What the student trains on ------------------------------------------------------------------

def test_training_images_are_shown_with_their_teachers_labels(networks, runs):
    """Labels of other images, "agrees" that compares something else, colours exchanged."""
    deit = networks["deit-lt"]
    drawn = student_figures.training_images([deit], RT, columns=4, seed=1)
    table, axes = drawn.table, drawn.figure.axes
    assert [row["view"] for row in table] == ["clean"] * 4 + ["strong"] * 4 + ["mixed"] * 4
    torch.manual_seed(1)
    index = torch.randperm(len(deit.data.train_labels))[:4]
    teacher, _ = load_teacher(str(runs["teacher"]), deit.data, RT)
    clean = augment.to_float(deit.data.train_images[index])
    labels = teacher_logits(teacher, clean).argmax(dim=1).tolist()
    assert [row["teacher"] for row in table[:4]] == [CLASSES[k] for k in labels]
    truth = [CLASSES[k] for k in deit.data.train_labels[index]]
    assert [row["label"] for row in table[:8]] == truth * 2
    views = student_figures.training_views(deit.args, deit.data, 4, 1, RT)
    for i, axis in enumerate(axes):
        images, _ = views[table[i]["view"]]
        shown = torch.tensor(axis.images[0].get_array())
        assert torch.allclose(shown, images[i % 4].permute(1, 2, 0))
        assert axis.get_title().strip().replace("\n", " + ") == table[i]["label"]
        written, = axis.texts
        assert written.get_text() == table[i]["teacher"]
        assert written.get_color() == drawing.COLORS["cls" if table[i]["agrees"] else "dist"]
    for row in table:
        largest = row["label"].split(" + ")[0].split(" % ")[-1]
        if "50 %" not in row["label"]:
            assert row["agrees"] == (row["teacher"] == largest)
    assert any(not torch.equal(a, b) for a, b in zip(views["strong"][0], clean))
    targets = views["mixed"][1]
    assert torch.allclose(targets.sum(dim=1), torch.ones(4))
    assert ((targets > 0).sum(dim=1) <= 2).all()                # no label smoothing


@pytest.mark.parametrize("settings, labels, note", [
    (dict(mixup=0.0, cutmix=0.0, teacher_view="weak"), ["clean", "strong"], "weakly augmented"),
    (dict(drw_epoch=0, mix_drw=False), ["clean", "strong"], "In colour the teacher's"),
    (dict(teacher=None), ["clean", "strong", "mixed"], "Above each image its label.")])
def test_training_images_follow_the_runs_settings(settings, labels, note, networks):
    """A row of mixed images for a run without mixing, or a note about another teacher's input."""
    deit = networks["deit-lt"]
    args = SimpleNamespace(**vars(deit.args) | settings)
    subject = loading.Subject("", deit.path, deit.net, args, deit.data)
    drawn = student_figures.training_images([subject], RT, columns=2)
    assert [row["view"] for row in drawn.table] == [name for name in labels for _ in range(2)]
    assert note in drawn.note and ("teacher" in drawn.table[0]) == (args.teacher is not None)
    assert not drawn.figure.axes[0].texts or args.teacher


@pytest.mark.parametrize("teachers, warned", [
    (None, False), ("its own", False), ([{"weights": "0123"}], True)])
def test_another_teacher_than_that_of_training_is_said(teachers, warned, networks, tmp_path,
                                                       capsys):
    """Labels of a teacher that only has the same path, in another folder."""
    deit = networks["deit-lt"]
    if teachers == "its own":
        teacher, _ = load_teacher(deit.args.teacher, deit.data, RT)
        teachers = teacher.origin
    (tmp_path / "config.json").write_text(json.dumps({"teachers": teachers}))
    subject = loading.Subject("", str(tmp_path), deit.net, deit.args, deit.data)
    student_figures.training_images([subject], RT, columns=2)
    assert ("learned from has other weights" in capsys.readouterr().out) == warned


# ---- Does it follow its teacher? -----------------------------------------------------------------

class Channels(torch.nn.Module):
    """A student: CLS says the image's brightest channel, DIST its darkest, classes 0 to 2."""

    def forward(self, x):
        means = x.mean(dim=(2, 3))                                      # (B,3)
        cls, dist = (F.pad(logits, (0, 7), value=-9.0) for logits in (means, 0.5 - 2 * means))
        return cls, dist


def test_agreement_is_counted_image_by_image(networks):
    """Agreement with the label instead of the teacher's class; heads exchanged; a student that sees
    another crop, or another partner, than its teacher is asked about."""
    def teacher(x):                                                     # the channel in the middle
        return F.pad(-x.mean(dim=(2, 3)).argsort().argsort().sub(1).abs(), (0, 7), value=-9)
    teacher.img_size = 32
    subject = replace(networks["deit-lt"], net=Channels())
    levels = torch.rand(60, 3).argsort(dim=1).mul(80).add(40).to(torch.uint8)       # distinct
    images, labels = levels[:, :, None, None].expand(-1, -1, 32, 32), torch.randint(0, 3, (60,))
    counts, names = [], ("teacher", "CLS", "DIST", "average")
    for image, label in zip(images, labels, strict=True):
        order = augment.to_float(image).mean(dim=(1, 2)).argsort().tolist()
        dark, middle, bright = order
        # The mean of both heads, x and 1/2 - 2 x, is largest where x is smallest.
        said = dict(zip(names, (middle, bright, dark, dark)))
        counts.append([int(said[name] == label) for name in names])
    views = student_figures.compare(subject, teacher, images, labels, 10 ** 6)
    assert list(views) == ["clean", "strong", "mixed"]
    expected = (100 * torch.tensor(counts).double().mean(dim=0)).tolist()
    assert [views["clean"][name] for name in names] == pytest.approx(expected, abs=0.006)
    assert views["clean"]["n"] == len(images)
    assert all(views["clean"][f"{name} agrees"] == 0 for name in names[1:])

    def teacher(x):
        return Channels()(x)[1]
    teacher.img_size = 32
    for percentages in student_figures.compare(subject, teacher, images, labels, 25).values():
        assert percentages["n"] == 25 and percentages["teacher"] == percentages["DIST"]
        assert percentages["DIST agrees"] == 100 > percentages["CLS agrees"]
    sides = set()

    class Sides(Channels):
        def forward(self, x):
            sides.add(x.shape[-1])
            return super().forward(x)
    args = SimpleNamespace(**vars(subject.args) | dict(crop="loader", img_size=28, eval_crop=7 / 8))
    large_sets = replace(subject, net=Sides(), args=args)       # tested on images of 32 px
    student_figures.compare(large_sets, teacher, images, labels, 10)
    assert sides == {28}


def test_agreement_is_drawn_as_it_was_counted(networks, runs):
    """The training images tested twice, another teacher, bars of another head or view."""
    deit = networks["deit-lt"]
    drawn = student_figures.agreement([deit], RT)
    teacher, _ = load_teacher(str(runs["teacher"]), deit.data, RT)
    sets = {"training": (deit.data.train_images, deit.data.train_labels),
            "test": (deit.data.test_images, deit.data.test_labels)}
    rows = [{"images": name, "view": view} | percentages for name, given in sets.items()
            for view, percentages in student_figures.compare(deit, teacher, *given, 2000).items()]
    assert drawn.table == [{"run": deit.name} | row for row in rows]
    assert {row["n"] for row in rows} == {len(labels) for _, labels in sets.values()}
    axis, = drawn.figure.axes
    for bars, head in zip(axis.containers, ("CLS", "DIST", "average"), strict=True):
        assert bars.get_label() == f"{head} agrees"
        assert [bar.get_height() for bar in bars] == [row[f"{head} agrees"] for row in rows]
    heights = [segment[0][1] for segment in axis.collections[0].get_segments()]
    assert heights == [row["teacher"] for row in rows]


def test_agreement_needs_a_teacher(networks):
    with pytest.raises(UserError, match="without a teacher"):
        student_figures.agreement([networks["vit"]], RT)


# ---- Teachers ------------------------------------------------------------------------------------

def test_entropy_draws_all_images_and_repeats_the_runs_own_numbers(networks, runs):
    """A histogram that loses images, another draw, or kinds of images exchanged."""
    drawn = teacher_figures.entropy([networks["teacher"]], RT)
    axis, = drawn.figure.axes
    kinds = ("clean", "strong", "mixed")
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    for kind, steps, row, label in zip(kinds, axis.patches, drawn.table, labels, strict=True):
        percent = [r["share %"] for r in drawn.numbers if r["images"] == kind]
        assert list(steps.get_data().values) == pytest.approx(percent, abs=1e-3)
        assert sum(percent) == pytest.approx(100, abs=0.1) and row["n"] == 128
        assert label.startswith(f"{kind}: {row['right %']:.1f} % right, mean {row['entropy']:.2f}")
        middles = [(r["from nats"] + r["to nats"]) / 2 for r in drawn.numbers
                   if r["images"] == kind]
        mean = sum(p * m for p, m in zip(percent, middles)) / 100
        assert mean == pytest.approx(row["entropy"], abs=math.log(10) / 40)     # half a bin
    result = read_result(runs["teacher"])["training_images"]
    for here, there in ((0, "clean"), (2, "mixed")):
        assert drawn.table[here]["right %"] == pytest.approx(result[there]["accuracy"], abs=0.8)
        assert drawn.table[here]["entropy"] == pytest.approx(result[there]["entropy"], abs=0.01)
    teacher = networks["teacher"]
    assert teacher_summary(teacher.net, teacher.data, RT)["clean"]["accuracy"] == 100


def test_sharpness_starts_at_the_teachers_own_loss(networks, monkeypatch):
    """Another loss than the trained one, other images, a climb that goes down, lines exchanged."""
    monkeypatch.setattr(teacher_figures, "STEPS", {"SAM": (0, 0.0025), "random": (0, 0.1, 0.3)})
    teacher = networks["teacher"]
    drawn = teacher_figures.sharpness([teacher], RT, images=20)
    rows = drawn.numbers
    loss = {(r["direction"], r["classes"], r["radius"]): r["loss"] for r in rows}
    assert len(rows) == len(loss) == 2 * 2 + 2 * 3 and {r["loss name"] for r in rows} == {"ldam"}
    data, net = teacher.data, teacher.net
    for classes, numbers in (("tail", (7, 8, 9)), ("all", range(10))):
        index = torch.cat([drawing.images_of(data.train_labels, [k], 2) for k in numbers])
        logits = net(teacher_input(augment.to_float(data.train_images[index]), 16))
        own = LDAMLoss(data.counts, 0.5)(logits, data.train_labels[index]).item()
        assert loss["SAM", classes, 0] == pytest.approx(own, rel=1e-4)
        assert loss["random", classes, 0] == loss["SAM", classes, 0]
    assert loss["SAM", "all", 0.0025] > loss["SAM", "all", 0]
    for axis, direction in zip(drawn.figure.axes, ("SAM", "random")):
        for classes in ("all", "tail"):
            radii, rise = lines(axis)[f"{classes} classes"]
            assert tuple(radii) == teacher_figures.STEPS[direction]
            expected = [loss[direction, classes, r] - loss[direction, classes, 0] for r in radii]
            assert rise == pytest.approx(expected, abs=2e-5)
    assert not any(p.requires_grad for p in net.parameters())


def test_sharpness_leaves_a_computed_stem_where_it_is(networks, monkeypatch):
    """A climb along weights that no training moves: FastNet's stem, alone or in an ensemble."""
    monkeypatch.setattr(teacher_figures, "STEPS", {"SAM": (0, 0.0025), "random": (0, 0.1)})
    moved, loss_along = [], quantities.loss_along

    def watched(loss, params, *given):
        moved.extend(params)
        return loss_along(loss, params, *given)
    monkeypatch.setattr(quantities, "loss_along", watched)
    torch.manual_seed(0)
    net = FastNet(10, img_size=8)
    wanted = {id(p) for p in net.parameters() if p.requires_grad}       # as in training
    for each in (net, Ensemble([net])):
        moved.clear()
        each.eval().requires_grad_(False)                               # as loading leaves it
        subject = replace(networks["teacher"], net=each)
        teacher_figures.losses_around(subject, F.cross_entropy, 10, 0)
        assert {id(p) for p in moved} == wanted


@pytest.mark.parametrize("name, used", [("ce", "ce"), ("paco", "ce"), ("la", "la"), ("vs", "vs"),
                                        ("focal", "focal"), ("ldam", "ldam")])
def test_a_teachers_loss_is_the_one_it_was_trained_with(name, used):
    """A loss of another name: each gives its own value on the same logits."""
    counts = [80, 15, 5]
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    data = SimpleNamespace(counts=counts, train_labels=labels)
    subject = SimpleNamespace(args=SimpleNamespace(loss=name, max_margin=0.5), data=data, net=None)
    found, criterion = teacher_figures.teacher_loss(subject)
    n = torch.tensor(counts, dtype=torch.float)
    prior, ce = (n / n.sum()).log(), F.cross_entropy(logits, labels, reduction="none")
    margins = 0.5 * (n / n.min()) ** -0.25
    expected = {
        "ce": ce.mean(), "focal": ((1 - (-ce).exp()) * ce).mean(),
        "la": F.cross_entropy(logits + prior, labels),
        "vs": F.cross_entropy(logits / (n.max() / n) ** 0.3 + prior, labels),
        "ldam": F.cross_entropy(logits - 30 * margins[labels, None] * F.one_hot(labels, 3), labels)}
    assert found == used
    torch.testing.assert_close(criterion(logits, labels), expected[used], rtol=1e-4, atol=1e-5)
    subject.net = Ensemble([FastNet(3), FastNet(3)])        # its outputs are no one's logits
    with pytest.raises(UserError, match="for one network"):
        teacher_figures.teacher_loss(subject)


# ---- From logs and results -----------------------------------------------------------------------

def test_diversity_is_the_logs(runs):
    """Similarity for distance, heads or groups exchanged, epochs that were not evaluated."""
    logs = loading.load_logs([str(runs["deit-lt"])] * 2, ["a", "b"])
    drawn = run_figures.diversity(logs, RT)
    log = read_lines(runs["deit-lt"])[1:]
    rows = [row for row in drawn.numbers if row["run"] == "a"]
    assert [(row["epoch"], row["drw"]) for row in rows] == [(2, False), (3, True)]
    cosines = [r["cosine"] for r in log]
    assert [row["cosine distance"] for row in rows] == pytest.approx([1 - c for c in cosines])
    top, bottom = drawn.figure.axes[0], drawn.figure.axes[2]
    assert list(top.lines[0].get_ydata()) == [row["cosine distance"] for row in rows]
    for head, name in (("cls", "CLS"), ("dist", "DIST")):
        for group in ("head", "tail"):
            epochs, percent = lines(bottom)[f"{name}, {group} classes"]
            assert epochs == [2, 3] and percent == [r[head][group] for r in log]
            assert percent == [row[f"{name} {group} %"] for row in rows]
    assert vertical_lines(top) == vertical_lines(bottom) == {2.0}       # before epoch 3


def test_the_table_of_diversity_shows_first_switch_and_last():
    """The epoch after the switch shown for the one before it."""
    rows = [{"epoch": epoch, "drw": epoch > 3} for epoch in range(1, 7)]
    assert [row["epoch"] for row in run_figures.first_switch_last(rows)] == [1, 3, 6]
    assert [row["epoch"] for row in run_figures.first_switch_last(rows[3:])] == [4, 6]


def test_curves_are_the_logs(runs):
    """One run's epochs under another's name, a panel's column exchanged, accuracies made up."""
    names = ["deit-lt", "teacher"]
    drawn = run_figures.curves(loading.load_logs([str(runs[name]) for name in names]), RT)
    panels = dict(zip(("loss", "lr", "overall", "head", "mid", "tail"), drawn.figure.axes))
    for name in names:
        log = read_lines(runs[name])
        rows = [row for row in drawn.numbers if row["run"] == name]
        for column, axis in panels.items():
            epochs, values = lines(axis)[name]
            shown = [row for row in rows if column in row]
            assert epochs == [row["epoch"] for row in shown]
            assert values == [row[column] for row in shown]
            assert axis.get_ylabel().startswith({"lr": "learning rate", "loss": "training loss"}
                                                .get(column, f"test accuracy, {column}"))
            if column in ("loss", "lr"):
                assert values == [record[column] for record in log]
            else:
                assert epochs == [2, 3] and values == [r["avg"][column] for r in log[1:]]
            assert vertical_lines(axis) == {2.0}
    assert [row["epoch"] for row in drawn.table] == [3, 3]
    assert all(len(str(row[column])) <= len("100.0") for row in drawn.table
               for column in ("overall", "head", "mid", "tail"))


def test_imbalance_is_the_mean_over_seeds(tmp_path):
    """Runs of two imbalances in one mean, or of two methods in one line."""
    given = (("vit", 10, 0, 40.0), ("vit", 10, 1, 50.0), ("vit", 100, 0, 5.0),
             ("deit-lt", 100, 0, 45.0))
    for i, (method, imb, seed, tail) in enumerate(given):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "config.json").write_text(json.dumps(
            {"dataset": "x", "counts": [100, 1]}))
        (tmp_path / str(i) / "result.json").write_text(json.dumps(
            {"dataset": "CIFAR-10-LT", "method": method, "model": "micro", "imb": imb, "seed": seed,
             "avg": {"overall": 60.0, "tail": tail}}))
    logs = loading.load_logs([str(tmp_path / str(i)) for i in (2, 1, 0, 3)])
    drawn = run_figures.imbalance(logs, RT)
    table = [tuple(row.values()) for row in drawn.table]
    assert table == [("vit micro", 10, 2, 45.0, 40.0, 50.0), ("vit micro", 100, 1, 5.0, 5.0, 5.0),
                     ("deit-lt micro", 100, 1, 45.0, 45.0, 45.0)]
    axis, = drawn.figure.axes
    assert lines(axis) == {"vit micro": ([10, 100], [45, 5]), "deit-lt micro": ([100], [45])}
    dots = {(x, y) for line in axis.lines if line.get_marker() == "."
            for x, y in zip(*line.get_data())}
    assert dots == {(imb, tail) for _, imb, _, tail in given}
    other = json.loads((tmp_path / "0" / "result.json").read_text()) | {"recipe": "other"}
    (tmp_path / "0" / "result.json").write_text(json.dumps(other))
    assert len({row["series"] for row in run_figures.imbalance(logs, RT).table}) == 3
    again = run_figures.imbalance(logs, RT, labels=["a", "a", "a", "b"])
    assert [row["series"] for row in again.table] == ["a", "a", "b"]
    with pytest.raises(UserError, match="2 runs are called a at imbalance 100 and have seed 0"):
        run_figures.imbalance(logs, RT, labels=["a"] * 4)       # of two methods


def test_a_log_says_which_data_it_came_from(tmp_path):
    """A folder's name for a data set's: it is in result.json or, before that is there, config."""
    (tmp_path / "run").mkdir()
    config = {"dataset": "cifar10", "imb": 100.0, "counts": [5000, 50]}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    log = loading.Log("ours", str(tmp_path / "run"))
    assert (log.source, log.name) == ("ours: run", "ours")
    assert log.data_text == "cifar10 (imb 100, 5,050 images)"
    (tmp_path / "run" / "result.json").write_text(json.dumps({"dataset": "CIFAR-10 validation"}))
    assert log.data_text == "CIFAR-10 validation (imb 100, 5,050 images)"
    assert loading.Log("", "a/run/").source == loading.Log("run", "a/run").source == "run"


# ---- Accuracies of one network -------------------------------------------------------------------

def test_the_confusion_matrix_has_truth_in_rows():
    """Transposed, or in percent of the predictions: of class a's 4 images 3 are called b."""
    data = SimpleNamespace(class_names=["a", "b", "c"], groups={"head": [0], "tail": [1, 2]})
    confusion = torch.tensor([[1, 3, 0], [0, 2, 0], [0, 0, 0]])         # c has no test image
    axis = run_figures.confusion_matrix(confusion, data).axes[0]
    texts = {(text.get_position(), text.get_text()) for text in axis.texts}
    assert texts == {((0, 0), "25"), ((1, 0), "75"), ((1, 1), "100")}   # ((predicted, true), %)
    shown = torch.tensor(axis.images[0].get_array().filled(math.nan))
    expected = torch.tensor([[25.0, 75, 0], [0, 100, 0], [math.nan] * 3], dtype=torch.double)
    assert torch.allclose(shown, expected, equal_nan=True)
    assert (axis.get_xlabel().split()[0], axis.get_ylabel().split()[0]) == ("predicted", "true")


@pytest.mark.parametrize("K, names, numbers", [(6, True, True), (23, True, True),
                                               (50, True, False), (200, False, False)])
def test_a_confusion_matrix_is_readable_at_any_size(K, names, numbers):
    """Names or numbers over one another; a picture that grows with the classes; no groups."""
    groups = {"head": list(range(2)), "mid": [], "tail": list(range(2, K))}
    data = SimpleNamespace(class_names=[f"class {k}" for k in range(K)], groups=groups)
    figure = run_figures.confusion_matrix(torch.eye(K, dtype=torch.long), data)
    axis = figure.axes[0]
    ticks = [text.get_text() for text in axis.get_yticklabels()]
    assert ticks == (data.class_names if names else ["head", "tail"])
    assert len(axis.texts) == (K if numbers else 0) and max(figure.get_size_inches()) <= 12
    if not names:
        assert list(axis.get_yticks()) == [0.5, (2 + K - 1) / 2]        # the middles of the groups
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in zip(boxes, boxes[1:]))
    drawing.plt.close(figure)


def test_the_reliability_diagram_has_the_bins_of_the_error():
    """A bar at another place or height than its bin; an empty bin drawn as one that is never right.
    Of four images, by hand: two at 0.50, one of them right, one right at 0.95, one wrong at 1."""
    confidence = torch.tensor([0.5, 0.5, 0.95, 1.0])
    right = torch.tensor([True, False, True, False])
    rows = quantities.reliability(confidence, right)
    assert [n for n, _, _ in rows] == [2, 2]
    assert rows[0][1:] == (0.5, 0.5) and rows[1][1:] == (pytest.approx(0.975), 0.5)
    assert quantities.calibration_error(confidence, right) == pytest.approx(0.475 / 2)
    figure = run_figures.reliability({"before": rows, "after": rows})
    for top in figure.axes[:2]:
        bars = [(bar.get_x(), bar.get_height()) for bar in top.patches]
        assert [height for _, height in bars] == [50, 50]
        assert [x for x, _ in bars] == pytest.approx([7 / 15, 14 / 15])
    drawing.plt.close(figure)


def test_the_summary_shows_result_log_and_maps(networks, runs):
    """One head's accuracies under another's name, another epoch's, maps of other images."""
    deit = networks["deit-lt"]
    result, log = read_result(runs["deit-lt"]), read_lines(runs["deit-lt"])
    subject = loading.Subject("", deit.path, deit.net, deit.args, deit.data)
    figure = run_figures.summary(subject, result, log)
    classes, curves, *images = figure.axes
    for head, name in (("cls", "CLS"), ("dist", "DIST"), ("avg", "average")):
        assert lines(classes)[name] == (list(range(10)), result["per_class"][head])
    counts = [text.get_text() for text in classes.get_xticklabels()]
    assert counts == [f"class{k}\n{n}" for k, n in enumerate(deit.data.counts)]
    for column in ("overall", "head", "mid", "tail"):
        assert lines(curves)[column] == ([2, 3], [record["avg"][column] for record in log[1:]])
    assert len(images) == 3 * 10
    assert {axis.get_title() for axis in images[:10]} == {"class7", "class8", "class9"}
    assert [images[i].get_ylabel() for i in (0, 10, 20)] == ["image", "CLS", "DIST"]
    title = figure.get_suptitle()
    assert f"{result['avg']['overall']:.1f} % overall, {result['avg']['tail']:.1f} %" in title
    plain = run_figures.class_accuracy({"cls": {"per_class": [1.0] * 10},
                                        "avg": {"per_class": [2.0] * 10}}, deit.data)
    assert lines(plain.axes[0]) == {"the network": (list(range(10)), [2.0] * 10)}


# ---- Files, choices, text ------------------------------------------------------------------------

def test_a_figure_is_saved_with_its_numbers(networks, tmp_path):
    """The numbers written over the picture, rounded, or a dict written as CSV."""
    figure = student_figures.distance([networks["vit"]], RT)
    picture, numbers = figure.save(str(tmp_path / "a.b"))
    assert (picture, numbers) == (str(tmp_path / "a.b.png"), str(tmp_path / "a.b.csv"))
    content = (tmp_path / "a.b.png").read_bytes()
    assert content.startswith(PNG) and int.from_bytes(content[16:20], "big") > 400   # pixels wide
    assert [float(row["distance px"]) for row in rows_of(numbers)] == [
        row["distance px"] for row in figure.numbers]
    figure = drawing.Figure(drawing.plt.figure(), [], {"rank": [1, 2]}, "")
    _, numbers = figure.save(str(tmp_path / "rank.png"))
    assert json.loads((tmp_path / "rank.json").read_text()) == {"rank": [1, 2]}
    assert numbers == str(tmp_path / "rank.json")


def test_below_a_figure_stand_note_runs_and_data(tmp_path):
    """A run or data set left out, one named twice, or text that stays in a report's picture."""
    log = SimpleNamespace(source="a: run_a", data_text="CIFAR-10-LT")
    other = SimpleNamespace(source="b: run_b", data_text="CIFAR-10-LT")
    figure, axis = drawing.plt.subplots()
    drawing.finish(figure, "Title", [log, other], "How to read it.")
    _, below = figure.texts                                     # the first is the title
    assert below.get_text() == "How to read it.\na: run_a · b: run_b\nCIFAR-10-LT"
    assert figure.get_suptitle() == "Title"
    drawing.without_text(figure)
    assert figure.get_suptitle() == "" and len(figure.texts) == 1
    figure, axis = drawing.plt.subplots()
    drawing.finish(figure, "Title", [log] * 7, "Note.")
    assert "7 runs, named in the file" in figure.texts[1].get_text()


def test_images_are_chosen_evenly_and_from_classes_that_have_some():
    """One class alone, an index beyond the last, a rare class without test images."""
    labels = torch.tensor([0, 1, 2] * 10)
    index = drawing.images_of(labels, [0, 2], 7)
    assert len(index) == 7 and set(labels[index].tolist()) == {0, 2}
    assert index[0] == 0 and index[-1] == 29 and len(drawing.images_of(labels, [1], 99)) == 10
    data = SimpleNamespace(test_labels=labels, groups={"head": [0], "mid": [1, 2], "tail": [3]})
    assert drawing.rare_classes(data) == [1, 2]
    shown = drawing.example_images(data, [1, 2], 5, seed=3)
    assert labels[shown].tolist() == [1, 2, 1, 2, 1] and len(set(shown.tolist())) == 5
    assert torch.equal(shown, drawing.example_images(data, [1, 2], 5, seed=3))
    small, large = (SimpleNamespace(net=SimpleNamespace(img_size=size)) for size in (64, 224))
    assert drawing.image_count([small], None, 300) == drawing.image_count([large], 300, 600) == 300
    assert drawing.image_count([large], None, 300) == 50
    assert drawing.image_count([small, large], None, 300) == 50     # one number for a figure


def test_no_image_is_shown_twice(runs):
    """The one test image of a rare class, ten times in a row as if it were ten; a percentage of
    three images that looks like one of three hundred."""
    labels = torch.tensor([0] * 40 + [1] * 3 + [2])
    groups = {"head": [0], "mid": [1], "tail": [2]}
    data = SimpleNamespace(test_labels=labels, groups=groups)
    shown = drawing.example_images(data, [1, 2], 10)
    assert sorted(shown.tolist()) == [40, 41, 42, 43] and labels[shown].tolist() == [1, 2, 1, 1]
    assert drawing.example_images(data, [2], 10).tolist() == [43]
    assert [drawing.few_images(data, group) for group in groups] == [
        "", " (3 test images)", " (1 test image)"]

    deit = loading.load_networks("student", [str(runs["deit-lt"])], RT)[0]
    rare = drawing.rare_classes(deit.data)
    kept = torch.stack([(deit.data.test_labels == k).nonzero()[0, 0] for k in rare])
    few = replace(deit.data, test_images=deit.data.test_images[kept],
                  test_labels=deit.data.test_labels[kept])
    figure = run_figures.summary(replace(deit, data=few), read_result(runs["deit-lt"]),
                                 read_lines(runs["deit-lt"]))
    visible = [axis for axis in figure.axes[2:] if axis.get_visible()]
    assert len(visible) == 3 * len(rare) and len(figure.axes) == 2 + 3 * 10
    assert all(axis.images for axis in visible)
    assert figure.get_suptitle().endswith(f"% on the tail classes ({len(rare)} test images)")


@pytest.mark.parametrize("names, slanted", [
    ([f"class{k}" for k in range(10)], False), (["cat", "dog"], False),
    ([f"Dascyllus reticulatus {k}" for k in range(7)], True),
    (["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
     False), ([f"a longer name {k}" for k in range(20)], True)])
def test_class_names_below_the_bars_do_not_overlap(names, slanted):
    """Long names printed over each other; short ones slanted for nothing."""
    figure, axis = drawing.plt.subplots(figsize=(9, 4.2))
    axis.set_xlim(-0.5, len(names) - 0.5)
    drawing.name_classes(axis, names, [100 - k for k in range(len(names))])
    figure.draw_without_rendering()
    labels = axis.get_xticklabels()
    assert {label.get_rotation() for label in labels} == {20.0 if slanted else 0.0}
    if not slanted:
        boxes = [label.get_window_extent() for label in labels]
        assert all(box.x1 <= following.x0 for box, following in zip(boxes, boxes[1:]))
    assert labels[0].get_text().split()[-1] == "100"
    drawing.plt.close(figure)


def test_every_figure_of_the_table_takes_its_flags():
    """A figure that analyze.py cannot draw: a flag that its function lacks."""
    import inspect

    import analyze
    from analysis.figures import FIGURES
    assert set(FIGURES) == {name for name, command in analyze.COMMANDS.items()
                            if command is analyze.command_figure}
    for function, kind, flags in FIGURES.values():
        assert tuple(inspect.signature(function).parameters)[2:] == flags
        assert kind in ("student", "teacher", "log")


# ---- Names in pictures ---------------------------------------------------------------------------

HOSTILE = ["$\\frac{$", "$x^2$", "\\", "%s {0}", "<b>", "emoji \U0001f600", "_hidden", "",
           r"\x1b[2J", "n" * 300]


def test_names_are_drawn_as_they_are(networks, recwarn):
    """A formula in a name that ends the picture, or that is drawn as another name; a picture as
    wide as its longest name; warnings for a letter that the font lacks."""
    data = replace(networks["vit"].data, class_names=HOSTILE)
    subject = replace(networks["vit"], label="$\\frac{$", data=data)
    per_class = {"avg": {"per_class": [50.0] * 10}}
    confusion = run_figures.confusion_matrix(torch.eye(10), data)
    bare = [run_figures.class_accuracy(per_class, data), confusion]
    drawn = [student_figures.attention([subject], RT, index=[0, 59], images=2),
             student_figures.distance([subject, replace(subject, label="_b")], RT, images=2)]
    for figure in [*bare, *(each.figure for each in drawn)]:
        png = drawing.as_png(figure)
        width, height = (int.from_bytes(png[i:i + 4], "big") for i in (16, 20))
        assert png.startswith(PNG) and width < 2000 and height < 1500
    assert [text.get_text() for text in confusion.axes[0].get_yticklabels()][:8] == HOSTILE[:8]
    legend = drawn[1].figure.axes[0].get_legend()
    assert [text.get_text().strip() for text in legend.get_texts()] == ["$\\frac{$", "_b"]
    assert not [each for each in recwarn.list if "glyph" in str(each.message).lower()
                or "font" in str(each.message).lower()]


def test_numbers_of_a_logarithmic_axis_are_plain():
    """Ticks that show their formula, $\\mathdefault{10^{1}}$, since names may begin none."""
    figure, axis = drawing.plt.subplots()
    axis.plot([1, 2], [0.1, 100])
    drawing.log_scale(axis)
    figure.draw_without_rendering()
    texts = [text.get_text() for text in axis.get_yticklabels() + axis.get_yticklabels(minor=True)]
    assert {"0.1", "1", "10", "100"} <= set(texts) and not any("$" in text for text in texts)


def test_short_names_keep_both_ends():
    assert drawing.short("cat") == "cat" and drawing.short("n" * 24) == "n" * 24
    assert drawing.short("beginning" + "." * 50 + "end", 12) == "beginni….end"


def test_the_summarys_classes_may_be_in_another_order(runs):
    """Accuracies under other classes' names."""
    deit = loading.load_networks("student", [str(runs["deit-lt"])], RT)[0]
    result, log = read_result(runs["deit-lt"]), read_lines(runs["deit-lt"])
    names, order = deit.data.class_names, [3, 0, 7, 1, 9, 2, 5, 8, 4, 6]    # no inverse of itself
    other = result | {"per_class": {head: [recalls[k] for k in order]
                                    for head, recalls in result["per_class"].items()}}
    figure = run_figures.summary(deit, other, log, [names[k] for k in order])
    line, = [x for x in figure.axes[0].lines if x.get_label() == "average"]
    assert list(line.get_ydata()) == result["per_class"]["avg"]
