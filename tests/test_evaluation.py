"""engine/evaluation.py: what networks are given, what they predict, how often that is right."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import augment
import data_lt
from engine import evaluation, training
from engine.runtime import Runtime
from images.decode import Stream
from images.files import Files

CPU = Runtime(torch.device("cpu"))
GROUPS = {"head": [0], "mid": [1, 2], "tail": [3]}


def small_data(n=16, side=32, name="shapes", counts=(8, 4, 2, 2)):
    torch.manual_seed(0)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.randint(0, 256, (len(labels), 3, side, side), dtype=torch.uint8)
    return data_lt.LongTailData(name, name, images, labels, images, labels,
                                [f"class{k}" for k in range(len(counts))], list(counts), GROUPS)


class Student(nn.Module):
    """Answers with given logits, and keeps the images that it was given."""

    def __init__(self, cls_logits, dist_logits):
        super().__init__()
        self.answers, self.images = (cls_logits, dist_logits), []

    def forward(self, x):
        self.images.append(x)
        return tuple(a if a is None else a.expand(len(x), -1) for a in self.answers)


class Teacher(Student):
    def __init__(self, logits, img_size):
        super().__init__(logits, None)
        self.img_size = img_size

    def forward(self, x):
        return super().forward(x)[0]


# ---- What a network is given ---------------------------------------------------------------------

@pytest.mark.parametrize("side, n", [(32, 500), (224, 500), (384, 170), (1024, 23), (6000, 1)])
def test_large_images_are_evaluated_fewer_at_a_time(side, n):
    """500 of 1,024 px, a GPU's memory, whatever --micro-batch says; none at all."""
    images = torch.zeros(1, dtype=torch.uint8).expand(9, 3, side, side)
    assert evaluation.images_at_a_time(images) == n


def test_files_are_decoded_ahead(tmp_path, monkeypatch):
    """A GPU that waits while the files of its next batch are decoded; other files' images."""
    for i in range(24):
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    listed = [str(path).encode() for path in sorted(tmp_path.iterdir())]
    stream = Stream(Files(np.array(listed), np.zeros(24, dtype=np.int64), ["a"]), 16)
    submitted, asked = [], []
    monkeypatch.setattr(evaluation, "images_at_a_time", lambda images: 5)
    monkeypatch.setattr(Stream, "submit", lambda self, draws, submit=Stream.submit:
                        submitted.append(len(draws)) or submit(self, draws))

    def predict(x):
        asked.append(len(submitted))
        return {"avg": x.flatten(1)[:, :9]}

    labels = torch.arange(24)
    mine, found = evaluation.answers(predict, stream, labels, CPU)
    assert submitted == [5, 5, 5, 5, 4] and asked[0] == 5
    again, expected = evaluation.answers(predict, stream[:], labels, CPU)
    assert torch.equal(mine, again) and torch.equal(found["avg"], expected["avg"])


def test_a_student_is_tested_on_the_centre_of_a_larger_image():
    """The whole image, a corner of it, or a crop that is resized: 28 / 0.875 = 32, 2 px cut off."""
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(evaluation.student_input(x, 28, 0.875), x[:, :, 2:30, 2:30])
    assert torch.equal(evaluation.student_input(x, 32, 1.0), x)


def test_the_evaluation_crop_reaches_the_network():
    """--eval-crop or the image size ignored in what is reported."""
    data, net = small_data(), Student(torch.eye(4)[:1], None)
    evaluation.evaluate_student(net, data, 28, 0.875, CPU)
    seen = torch.cat(net.images)
    assert torch.equal(seen, data.test_images[:, :, 2:30, 2:30] / 255)


def test_a_teacher_in_training_is_given_every_seventh_pixel():
    """Antialiasing, which would smooth away noise that the published teacher sees: 224 -> 32."""
    x = torch.rand(2, 3, 224, 224)
    teacher = Teacher(torch.eye(4)[:1], 32)
    evaluation.teacher_logits(teacher, x)
    seen, = teacher.images
    assert seen.shape == (2, 3, 32, 32) and 0 <= seen.min() and seen.max() <= 1
    # Each output pixel's centre is at 7 i + 3: bicubic interpolation gives that very pixel.
    torch.testing.assert_close(seen, x[:, :, 3::7, 3::7], rtol=0, atol=1e-5)


def test_a_teacher_of_the_students_size_is_given_its_very_images():
    """A resize that is not needed, or a clone that is augmented again."""
    x, teacher = torch.rand(2, 3, 32, 32), Teacher(torch.eye(4)[:1], 32)
    assert torch.equal(evaluation.teacher_logits(teacher, x), torch.eye(4)[:1].expand(2, -1))
    assert torch.equal(teacher.images[0], x)


def test_a_teacher_labels_without_a_graph():
    """Memory for gradients that nobody takes, or a teacher that the student's loss trains."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
    net.img_size = 4
    assert not evaluation.teacher_logits(net, torch.rand(2, 3, 4, 4)).requires_grad


# ---- What it predicts ----------------------------------------------------------------------------

def test_the_prediction_is_the_mean_of_logits_not_of_probabilities():
    """Here the mean of logits says class 1, the mean of the heads' probabilities class 0."""
    cls_logits = torch.tensor([[10.0, 4.0, 0.0]])
    dist_logits = torch.tensor([[-12.0, 3.0, 3.5]])
    heads = evaluation.student_heads(Student(cls_logits, dist_logits), torch.zeros(2, 3, 4, 4))
    assert heads["cls"].tolist() == [[10, 4, 0]] * 2
    assert heads["dist"].tolist() == [[-12, 3, 3.5]] * 2
    assert heads["avg"].tolist() == [[-1, 3.5, 1.75]] * 2
    p = (cls_logits.softmax(1) + dist_logits.softmax(1)) / 2
    assert p.argmax() == 0 and heads["avg"].argmax(dim=1).tolist() == [1, 1]


def test_a_student_of_one_token_predicts_with_it():
    """A second head that is not there, or its logits halved."""
    heads = evaluation.student_heads(Student(torch.eye(3)[:1], None), torch.zeros(1, 3, 4, 4))
    assert list(heads) == ["cls", "avg"] and heads["avg"] is heads["cls"]


def test_student_and_teacher_are_combined_by_their_probabilities():
    """The mean of logits, or of log-probabilities, which loud logits decide whatever they say."""
    student = torch.tensor([[0.1, 3.0, 0.0]])               # p about (0.05, 0.90, 0.05)
    teacher = torch.tensor([[30.0, 10.0, 29.5]])            # p about (0.62, 0.00, 0.38), loud
    p = student[0].double().softmax(0) / 2 + teacher[0].double().softmax(0) / 2
    logits = evaluation.combined(student, teacher)
    assert logits.exp()[0].tolist() == pytest.approx(p.tolist(), rel=1e-5)
    assert logits.argmax() == 1 and (student + teacher).argmax() == 0
    for bad in (math.nan, math.inf, -math.inf):
        lost = teacher.index_fill(1, torch.tensor([2]), bad)
        assert evaluation.predicted(evaluation.combined(student, lost)).tolist() == [-1]
        assert evaluation.predicted(evaluation.combined(lost, student)).tolist() == [-1]


def test_every_head_has_its_own_accuracy():
    """CLS's accuracies under DIST's name, or the mean's under either."""
    cls_logits, dist_logits = torch.tensor([[9.0, 8, 0, 0]]), torch.tensor([[0.0, 8, 0, 9]])
    results = evaluation.evaluate_student(Student(cls_logits, dist_logits), small_data(), 32, 1.0,
                                          CPU)
    found = {head: [r["per_class"].index(100.0), r["overall"]] for head, r in results.items()}
    assert found == {"cls": [0, 50.0], "dist": [3, 12.5], "avg": [1, 25.0]}


def test_entropy_runs_from_0_to_ln_k():
    """Bits for nats; 0 ln 0 = NaN."""
    logits = torch.tensor([[0.0, 0, 0, 0], [0, -math.inf, -math.inf, -math.inf],
                           [math.log(3), 0, -math.inf, -math.inf]])
    by_hand = [math.log(4), 0, -0.75 * math.log(0.75) - 0.25 * math.log(0.25)]
    assert evaluation.entropy(logits).tolist() == pytest.approx(by_hand, abs=1e-6)


# ---- How often that is right ---------------------------------------------------------------------

def test_evaluation_equals_a_loop_over_images():
    """Groups are means of recalls, overall is top-1: with unequal test counts they differ."""
    torch.manual_seed(0)
    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 5 + [3])
    images = torch.randint(0, 256, (len(labels), 3, 4, 4), dtype=torch.uint8)
    weight = torch.randn(3 * 4 * 4, 4)

    def predict(x):
        return {"avg": x.flatten(1) @ weight}
    result = evaluation.evaluate(predict, images, labels, GROUPS, CPU)["avg"]
    right = [[] for _ in range(4)]
    for image, label in zip(images, labels.tolist()):
        predicted = int((image.float().flatten() / 255 @ weight).argmax())
        right[label].append(predicted == label)
    recall = [100 * sum(r) / len(r) for r in right]
    assert result["per_class"] == pytest.approx(recall, abs=0.006)
    overall = 100 * sum(map(sum, right)) / len(labels)
    assert result["balanced"] == pytest.approx(sum(recall) / 4, abs=1e-3)
    assert result["overall"] == pytest.approx(overall, abs=1e-3)
    assert result["mid"] == pytest.approx((recall[1] + recall[2]) / 2, abs=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [[0], [3], [0, 1, 2, 3]])
def test_what_is_not_finite_is_never_right(bad, where):
    """NaN logits that count as class 0, or +inf as its own class: 50 % overall, 100 % on the head,
    for a network that says nothing."""
    logits = torch.tensor([[9.0, 0, 0, 0]]).index_fill(1, torch.tensor(where), bad)
    assert evaluation.predicted(logits).tolist() == [-1]
    data, finite = small_data(), torch.tensor([[9.0, 0, 0, 0]])
    results = evaluation.evaluate_teacher(Teacher(logits, 32), data, CPU)
    assert results["avg"]["overall"] == 0 and results["avg"]["per_class"] == [0] * 4
    results = evaluation.evaluate_student(Student(finite, logits), data, 32, 1.0, CPU)
    assert {head: r["overall"] for head, r in results.items()} == dict(cls=50, dist=0, avg=0)
    summary = evaluation.teacher_summary(Teacher(logits, 32), data, CPU)
    assert summary["clean"]["accuracy"] == summary["mixed"]["accuracy"] == 0


def test_one_answer_that_is_not_finite_spoils_no_other():
    """A whole batch that counts as wrong because of one image."""
    logits = torch.tensor([[1.0, 2], [math.nan, 5], [4, 3]])
    assert evaluation.predicted(logits).tolist() == [1, -1, 0]


def test_classes_without_test_images_are_left_out_of_their_group():
    """A recall of 0 / 0 that makes a group NaN, or counts as 0."""
    right, answers = torch.tensor([3.0, 1, 0, 0]), torch.tensor([3, 2, 1, 0])
    result = evaluation.accuracies(right, answers, torch.tensor([4, 2, 0, 0]), GROUPS)
    assert result["balanced"] == 62.5 and result["macro_f1"] == pytest.approx(67.857)   # 6/7, 1/2
    assert result["predicted_classes"] == 3
    assert (result["overall"], result["head"], result["mid"]) == (66.667, 75, 50)
    assert math.isnan(result["tail"]) and math.isnan(result["per_class"][2])


def test_networks_are_evaluated_in_evaluation_mode():
    """BatchNorm that normalises with the test batch, or drop path in what is reported."""
    class Net(Student):
        distilled = False

        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            return super().forward(x)
    net = Net(torch.eye(4)[:1], None).train()
    evaluation.evaluate_student(net, small_data(), 32, 1.0, CPU)

    class OfTeacher(Teacher):
        def forward(self, x):
            assert not self.training
            return super().forward(x)
    teacher = OfTeacher(torch.eye(4)[:1], 16).train()
    results = evaluation.evaluate_teacher(teacher, small_data(), CPU)
    assert results["avg"]["overall"] == 50 and teacher.images[0].shape[-1] == 16


def test_the_cosine_of_cls_and_dist():
    """The patches' tokens, or an unnormalised product."""
    class Tokens(nn.Module):
        distilled = True

        def forward_features(self, x):
            tokens = torch.tensor([[[3.0, 4.0], [6.0, 0.0], [0.0, 9.0]]])
            return tokens.expand(len(x), -1, -1), []
    net = Tokens()
    assert evaluation.token_cosine(net, small_data(), 32, 1.0, CPU) == pytest.approx(0.6)
    net.distilled = False
    assert evaluation.token_cosine(net, small_data(), 32, 1.0, CPU) is None


def test_the_cosine_is_of_images_of_all_classes_as_they_are_tested():
    """The first images only, which are of one class where files are sorted; another crop."""
    data = small_data(side=4, counts=(400, 300, 200, 100))
    data.test_images[:] = data.test_labels.to(torch.uint8)[:, None, None, None]
    sizes = []

    class Tokens(nn.Module):
        distilled = True

        def forward_features(self, x):
            sizes.append(x.shape[-1])
            of_class_0 = (x[:, 0, 0, 0] == 0).float()
            tokens = torch.zeros(len(x), 2, 2)
            tokens[:, 0, 0], tokens[:, 1, 0], tokens[:, 1, 1] = 1, of_class_0, 1 - of_class_0
            return tokens, []
    found = evaluation.token_cosine(Tokens(), data, 2, 0.5, CPU)
    assert found == pytest.approx(0.4, abs=0.01) and sizes == [2]


def test_a_teacher_is_described_by_what_it_says_of_training_images():
    """Accuracy of the clean images under the mixed ones' name; entropy in other units."""
    data = small_data(counts=(8, 4, 2, 2))
    teacher = Teacher(torch.tensor([[math.log(3), 0, -200, -200]]), 32)
    found = evaluation.teacher_on_training_images(teacher, data, CPU)
    assert {kind: len(c) for kind, (c, _) in found.items()} == dict(clean=16, strong=16, mixed=16)
    summary = evaluation.teacher_summary(teacher, data, CPU)
    assert list(summary) == ["clean", "mixed"]
    assert summary["clean"] == {"accuracy": 50.0, "entropy": 0.5623}
    assert "50.0 % right, entropy 0.56 nats" in evaluation.teacher_summary_text(summary)


def test_images_of_different_classes_are_mixed_although_their_files_are_sorted(monkeypatch):
    """Batches of one class, whose mixtures are easier than those that a student asks about; the
    first images only, of which all are of the most frequent classes."""
    batches, mixup_cutmix = [], augment.mixup_cutmix

    def recorded(x, y, K):
        batches.append(y)
        return mixup_cutmix(x, y, K)
    monkeypatch.setattr(augment, "mixup_cutmix", recorded)
    data = small_data(side=8, counts=(100, 60, 30, 10))
    teacher = Teacher(torch.eye(4)[:1], 8)
    evaluation.teacher_on_training_images(teacher, data, CPU, limit=100, batch=20)
    assert [len(set(y.tolist())) > 1 for y in batches] == [True] * 5
    assert torch.bincount(torch.cat(batches)).tolist() == pytest.approx([50, 30, 15, 5], abs=1)


def test_a_mixed_images_label_is_that_of_its_larger_part(monkeypatch):
    """The label of the unmixed image, by which every teacher knows mixed images less well."""
    monkeypatch.setattr(augment, "mixup_cutmix", lambda x, y, K: (
        x, nn.functional.one_hot(torch.ones_like(y), K).float()))
    always_1 = Teacher(torch.eye(4)[1:2], 32)
    found = evaluation.teacher_on_training_images(always_1, small_data(), CPU)
    assert found["mixed"][0].all() and found["strong"][0].float().mean() == 0.25


# ---- A teacher on clean training images ----------------------------------------------------------

@pytest.mark.parametrize("counts, n, drawn", [
    ([40, 20, 3, 1], 12, [4, 4, 3, 1]), ([9, 9], 4, [2, 2]), ([5, 1], 500, [5, 1]),
    ([3] * 50, 10, None)])
def test_a_sample_has_as_many_images_of_each_class(counts, n, drawn):
    """A sample of the long tail, in which rare classes do not occur; an image twice; of more
    classes than the sample has images, only the frequent ones."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    index = evaluation.balanced_sample(labels, n)
    assert len(set(index.tolist())) == len(index)
    found = torch.bincount(labels[index], minlength=len(counts))
    if drawn:
        assert sum(abs(a - b) for a, b in zip(found.tolist(), drawn)) <= 2
        assert len(index) == min(n, sum(counts)) and found.min() > 0
    else:
        assert found.max() == 1 and labels[index].max() > 10
    assert torch.equal(index, evaluation.balanced_sample(labels, n))


class ByPixel(nn.Module):
    """The class that an image's first pixel is, or another one, is sure to be predicted."""
    img_size = 1

    def __init__(self, answers):
        super().__init__()
        self.answers = torch.as_tensor(answers)

    def forward(self, x):
        pixels = (x[:, :2, 0, 0] * 255).round().long()
        logits = torch.zeros(len(x), len(self.answers))
        return logits.scatter_(1, self.answers[256 * pixels[:, 0] + pixels[:, 1]][:, None], 9.0)


def labelled_data(counts):
    """Images of one pixel, which says their class."""
    K = len(counts)
    labels = torch.arange(K).repeat_interleave(torch.tensor(counts))
    images = torch.stack([labels // 256, labels % 256, 0 * labels], dim=1).to(torch.uint8)
    images = images[:, :, None, None]
    groups = {"head": list(range(K)), "mid": [], "tail": []}
    return data_lt.LongTailData("x", "x", images, labels, images, labels,
                                [str(k) for k in range(K)], counts, groups)


@pytest.mark.parametrize("answers, mean, warned", [
    ([0, 1], 100, False), ([1, 0], 0, True), ([0, 0], 50, True),
    (list(range(12)), 100, False), ([0, 9, 10, 11, *range(1, 9)], 8.3, True), ([0] * 12, 8.3, True),
    (list(range(8142)), 100, False), ([*range(1, 8142), 0], 0, True), ([7] * 8142, None, True),
    ([*range(4071), *range(1, 4072)], None, False)],
    ids=["two", "two swapped", "two, one answer", "12", "12 sorted as text", "12, one answer",
         "8142", "8142 shifted", "8142, one answer", "8142, half of them shifted"])
def test_a_teacher_near_chance_is_warned_of(answers, mean, warned):
    """Classes in another order, and no word before the student has learned from them; a good
    teacher of thousands of classes warned of because it has but a few images of them."""
    K = len(answers)
    data = labelled_data([max(1, 40 // (1 + k)) for k in range(K)])
    text = evaluation.accuracy_on_clean(ByPixel(answers), data, CPU)
    assert ("warning" in text) == warned and "\n" not in text, text
    assert mean is None or f"right, {mean:.1f} % in the mean over classes" in text
    assert f"chance: {100 / min(K, 500):.1f} %" in text


def test_a_teacher_of_no_numbers_is_near_chance():
    """NaN for class 0, which is half of a sample of two classes."""
    teacher = Teacher(torch.tensor([[math.nan, 0]]), 1)
    text = evaluation.accuracy_on_clean(teacher, labelled_data([9, 9]), CPU)
    assert text.startswith("0.0 % of 18") and "warning" in text


def test_all_processes_evaluate_with_the_same_statistics(monkeypatch):
    """BatchNorm's statistics, which each process gathers from its own images."""
    shared, net = [], Student(torch.eye(4)[:1], None)
    monkeypatch.setattr(evaluation, "share_buffers", lambda net, rt: shared.append(net))
    evaluation.evaluate_student(net, small_data(), 32, 1.0, CPU)
    teacher = Teacher(torch.eye(4)[:1], 32)
    evaluation.evaluate_teacher(teacher, small_data(), CPU)
    assert shared == [net, teacher]


# ---- Tables --------------------------------------------------------------------------------------

def test_large_sets_are_also_grouped_by_count():
    """The published code's order of classes where the literature's counts are meant."""
    counts = [500, 100, 20, 19]
    results = {"avg": dict(overall=40.0, head=1, mid=2, tail=3,
                           per_class=[80.0, 60.0, 40.0, 20.0])}
    data = small_data(name="inat18", counts=(8, 4, 2, 2))
    data.counts = counts
    by_count = evaluation.group_by_count(results, data)
    assert by_count == {"avg": dict(overall=40.0, head=80, mid=50, tail=20)}
    data.name = "cifar10"
    assert evaluation.group_by_count(results, data) == {}
    data.name = "inat18"
    assert "by training images" in evaluation.tables(results, "vit", data)


def test_tables_name_their_columns_and_show_no_nan():
    """A column under another's name."""
    rows = {"cls": dict(overall=62.64, head=1, mid=2, tail=math.nan)}
    head, line = evaluation.table(rows, "vit").splitlines()
    assert head.split() == ["vit", "overall", "head", "mid", "tail"]
    assert line.split() == ["cls", "62.6", "1.0", "2.0", "-"]
    assert evaluation.brief(rows["cls"]) == "62.6 (1.0 2.0 -)"


def test_a_skewed_test_set_is_shown_by_balanced_accuracy_first():
    """70.9 %, which is always the same class; a teacher of an older run without these numbers that
    ends the table; its row under its name in result.json."""
    skewed = dict(overall=70.9, balanced=16.7, macro_f1=13.8, head=100, mid=0, tail=0)
    rows = {"teacher_avg": dict(overall=50.0, head=1, mid=2, tail=3), "avg+teacher": skewed}
    head, first, second = evaluation.table(rows, "vit").splitlines()
    assert head.split() == ["vit", "balanced", "overall", "head", "mid", "tail", "macro", "F1"]
    assert first.split() == ["teacher", "-", "50.0", "1.0", "2.0", "3.0", "-"]
    assert second.split() == ["avg", "+", "teacher", "16.7", "70.9", "100.0", "0.0", "0.0", "13.8"]
    assert evaluation.brief(skewed) == "16.7, overall 70.9 (100.0 0.0 0.0)"
    full = skewed | {"margin": 1.5, "per_class": [1.0], "predicted_classes": 1}
    assert evaluation.saved(full) == skewed | {"margin": 1.5}


def test_scores_equal_a_loop_over_images():
    """Precision over test images, recall over answers; micro F1; an image without a finite answer
    that counts as an answer, or not as a test image; a class that is never answered left out."""
    labels = torch.tensor([0] * 8 + [1] * 3 + [2] * 2 + [3])
    classes = torch.tensor([0, 0, 0, 0, 0, 1, 2, -1] + [1, 0, 1] + [1, 2] + [0])
    recall, f1 = [], []
    for k in range(4):
        hits = sum(int(a == b == k) for a, b in zip(classes.tolist(), labels.tolist()))
        answered, there = (classes == k).sum().item(), (labels == k).sum().item()
        r, p = hits / there, hits / answered if answered else 0.0
        recall.append(100 * r)
        f1.append(200 * r * p / (r + p) if r + p else 0.0)
    result = evaluation.count_accuracies(classes, labels, labels, GROUPS, CPU)
    assert result["balanced"] == pytest.approx(sum(recall) / 4, abs=1e-3)
    assert result["macro_f1"] == pytest.approx(sum(f1) / 4, abs=1e-3)
    assert result["per_class"] == pytest.approx(recall, abs=0.006)
    assert result["predicted_classes"] == 3
    right, answers = evaluation.count_answers(classes, labels, 4)
    assert (right.tolist(), answers.tolist()) == ([5, 2, 1, 0], [7, 4, 2, 0])
    _, precision, _ = evaluation.class_scores(right, answers, torch.bincount(labels))
    assert precision[:3].tolist() == pytest.approx([500 / 7, 50, 50]) and precision[3].isnan()


def test_a_balanced_test_set_keeps_its_columns():
    """Two more columns in the tables of the published sets."""
    labels = torch.arange(4).repeat(3)
    result = evaluation.count_accuracies(labels, labels, labels, GROUPS, CPU)
    assert "balanced" not in result and evaluation.columns({"avg": result}) == evaluation.COLUMNS
    assert evaluation.main_accuracy(result) == result["overall"] == 100


# ---- Which network to use ------------------------------------------------------------------------

def test_the_teacher_and_both_together_are_measured_on_the_students_test_images():
    """The teacher's own test set, its size or its clean labels missed; rows in another order."""
    data = small_data()                                         # 8, 4, 2, 2 images
    student = Student(torch.tensor([[9.0, 0, 0, 0]]), torch.tensor([[9.0, 0, 0, 0]]))
    teacher = Teacher(torch.tensor([[0.0, 99, 0, 0]]), 16)
    found = evaluation.evaluate_student(student, data, 32, 1.0, CPU)
    assert evaluation.with_teacher(found, student, None, data, 32, 1.0, CPU) is found
    rows = evaluation.with_teacher(found, student, teacher, data, 32, 1.0, CPU)
    assert list(rows) == ["teacher_avg", "cls", "dist", "avg", "avg+teacher"]
    assert rows["avg"] is found["avg"]
    assert teacher.images[0].shape == (16, 3, 16, 16)
    evaluation.with_teacher(found, student, teacher, data, 28, 0.875, CPU)
    assert torch.equal(student.images[-1], data.test_images[:, :, 2:30, 2:30] / 255)
    assert rows["teacher_avg"]["per_class"] == rows["avg+teacher"]["per_class"] == [0, 100, 0, 0]
    # By hand: class 0 (8 images): 0 only the teacher right, 8 only the student; class 1: 4 and 0.
    cells = [(0.5, 8.5, 10), (4.5, 0.5, 6), (0.5, 0.5, 4), (0.5, 0.5, 4)]
    variance = sum((b + c - (b - c) ** 2 / n) / n ** 2 for b, c, n in cells)
    expected = 100 * 1.96 * variance ** 0.5 / 4
    assert rows["teacher_avg"]["margin"] == pytest.approx(expected, abs=1e-3)


def test_two_processes_compare_student_and_teacher_on_all_images(monkeypatch):
    """An interval from one process's part of the images."""
    data, asked = small_data(), []
    data.test_labels = data.test_labels.roll(3)                 # no class is one process's alone
    student, teacher = Student(torch.eye(4)[:1], None), Teacher(torch.eye(4)[1:2], 32)
    expected = evaluation.with_teacher({}, student, teacher, data, 32, 1.0, CPU)

    def compare(rank):
        return evaluation.with_teacher({}, student, teacher, data, 32, 1.0,
                                       Runtime(torch.device("cpu"), rank=rank, world=2))
    monkeypatch.setattr(evaluation, "all_sum", lambda x, rt: (asked.append(x), x)[1])
    compare(1)                                                  # what the other one contributes
    monkeypatch.setattr(evaluation, "all_sum", lambda x, rt: x + asked.pop(0))
    assert compare(0) == expected and not asked


def test_both_together_are_compared_with_the_better_of_the_two():
    """With the student always, and "use both" where the teacher alone is as good."""
    data = small_data()
    data.test_images[:, 0] = data.test_labels.to(torch.uint8)[:, None, None]

    class Knows(Teacher):                               # all labels, from the first channel
        def forward(self, x):
            k = (x[:, 0, 0, 0] * 255).round().long()
            return 50 * nn.functional.one_hot(k, 4).float()
    student, teacher = Student(torch.eye(4)[:1], None), Knows(None, 32)
    found = evaluation.evaluate_student(student, data, 32, 1.0, CPU)
    rows = evaluation.with_teacher(found, student, teacher, data, 32, 1.0, CPU)
    assert rows["teacher_avg"]["overall"] == rows["avg+teacher"]["overall"] == 100
    # No image of which only one is right: half a one each way in every class.
    expected = 196 * sum(1 / (n + 2) ** 2 for n in (8, 4, 2, 2)) ** 0.5 / 4
    assert rows["avg+teacher"]["margin"] == pytest.approx(expected, abs=1e-3)


def test_the_margin_is_that_of_resampled_test_images():
    """Independent samples where the images are the same; a standard deviation for 1.96 of them."""
    rng = torch.Generator().manual_seed(0)
    n, better, worse = [400, 300], [0.2, 0.05], [0.1, 0.1]
    draws = []
    for size, b, c in zip(n, better, worse):
        u = torch.rand(4000, size, generator=rng, dtype=torch.double)
        difference = (u < b).double() - ((u >= b) & (u < b + c)).double()
        draws.append(difference.mean(dim=1))
    spread = 100 * 1.96 * (sum(draws) / 2).std().item()
    counts = [torch.tensor([p * size for p, size in zip(shares, n)]) for shares in (better, worse)]
    assert evaluation.margin(*counts, torch.tensor(n)) == pytest.approx(spread, rel=0.05)
    one = [torch.tensor([1]), torch.tensor([0]), torch.tensor([1])]
    assert evaluation.margin(*one) > 50                         # one image decides nothing


def rows_of(student, teacher, both, margin=2.0):
    rows = {"teacher_avg": teacher, "avg": student, "avg+teacher": both}
    rows = {name: dict(overall=100 - value, balanced=value, margin=margin)
            for name, value in rows.items()}
    return rows


RUN = dict(epochs=30, counts=[1000, 100], batch=64, repeats=1)         # settings of a run


@pytest.mark.parametrize("accuracies, use, more", [
    ((70.1, 73.4, 73.9), "Use the teacher: python analyze.py predict --checkpoint 't x' PICTURES",
     "--epochs 60, or more --minutes"),
    ((73.4, 70.1, 74.0), "Use the student: python analyze.py predict --checkpoint runs/y PICTURES",
     "+-2.0)"),
    ((73.4, 72.1, 74.0), "Use the student: python", "no clear difference"),
    ((72.1, 73.4, 74.0), "Use the teacher: python", "no clear difference"),
    ((72.1, 73.4, 75.5), "Use both together: python analyze.py predict --checkpoint "
     "'runs/y,t x' PICTURES", "both 75.5 %")])
def test_the_last_line_says_which_network_to_use(accuracies, use, more, tmp_path):
    """Accuracy where balanced accuracy decides; a difference by chance; a path that a shell cuts in
    two; a student recommended that is worse than its teacher."""
    line = evaluation.advice(rows_of(*accuracies), "runs/y", "t x", RUN)
    assert line.startswith(use) and more in line and "\n" not in line
    assert f"balanced accuracy on the test images: student {accuracies[0]} %" in line
    assert ("no clear difference" in line) == ("no clear difference" in more)
    line = evaluation.advice(rows_of(*accuracies), "runs/y", "t x", RUN | dict(holdout=0.2))
    assert "on the held-out images" in line
    settings = RUN | dict(teacher_norm="imagenet", teacher_size=32)
    line = evaluation.advice(rows_of(*accuracies), "runs/y", "t x", settings)
    assert ("--norm imagenet --size 32 PICTURES" in line) == ("t x" in line)
    (tmp_path / "t").mkdir()                            # a run says its own, and refuses others
    line = evaluation.advice(rows_of(*accuracies), "runs/y", str(tmp_path / "t"), settings)
    assert "--norm" not in line
    told = "measured with --teacher-norm imagenet --teacher-size 32, without it here" in line
    assert told == (not line.startswith("Use the student"))
    for teacher in ("t x", str(tmp_path / "t")):        # a file may have no names of its classes
        line = evaluation.advice(rows_of(*accuracies), "runs/y", teacher, RUN)
        assert ("x.classes.txt" in line) == (teacher == "t x" and "Use the student" not in line)


def test_the_advice_is_not_shorter_than_what_the_start_asked_for():
    """--epochs 16 at the end of a run that was told at its start that 125 are the fewest; the
    interval of these classes beside that of eval, which is of others too, without a word."""
    config = dict(counts=[100, 60, 32], batch=64, repeats=1)
    rows = rows_of(60.0, 70.0, 71.0, margin=3.0)
    for changes, epochs, fewest in ((dict(epochs=8), 167, 167), (dict(epochs=90), 180, 167),
                                    (dict(epochs=8, batch=9, repeats=3), 23, 23),
                                    (dict(epochs=8, counts=[1000], batch=10, repeats=3), 16, 7)):
        settings = config | changes
        line = evaluation.advice(rows, "runs/y", "t x", settings)
        assert f"catch up: --epochs {epochs}, or more --minutes." in line
        assert "95 % interval of the difference for these classes: +-3.0" in line
        n = sum(settings["counts"])
        if settings["repeats"] > 1:
            n = len(data_lt.repeated_augmentation(n, 0, 0, settings["repeats"]))
        steps = data_lt.steps_per_epoch(n, settings["batch"])
        assert training.fewest_epochs(steps) == fewest


def test_a_network_without_a_teacher_is_named_alone():
    """A teacher that there is none of; "balanced" of a test set that is balanced anyway."""
    line = evaluation.advice({"avg": dict(overall=52.04)}, "runs/vit", None, RUN)
    assert line == ("Use the network: python analyze.py predict --checkpoint runs/vit PICTURES "
                    "(accuracy 52.0 % on the test images)")


def test_a_teachers_smaller_images_are_smoothed():
    """Pixels left out instead: a teacher tested on other images than it was trained on."""
    x = torch.rand(2, 3, 32, 32)
    expected = F.interpolate(x, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(evaluation.teacher_input(x, 16), expected, rtol=0, atol=1e-2)
    jagged = F.interpolate(x, (16, 16), mode="bicubic").clamp(0, 1)
    assert (evaluation.teacher_input(x, 16) - jagged).abs().mean() > 0.05
