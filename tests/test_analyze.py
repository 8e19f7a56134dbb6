"""The analyses: definitions on cases with a known answer, and every command from end to end on tiny runs."""
import csv
import json
import math
import re
import shutil
from argparse import Namespace
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F

import analyze
import augment
import data_lt
import engine
import figures
import quantities
import report
import train_student
import train_teacher
import vit
from conftest import script
from sam import SAM

PNG = b"\x89PNG\r\n\x1a\n"


# ---- Attention -----------------------------------------------------------------------------------------------------------

def test_rollout_of_known_attentions():
    """The residual's half, the order of the product, the mean over heads: identity, a uniform block, two tokens by hand."""
    eye = torch.eye(3).expand(1, 2, 3, 3)
    uniform = torch.full((1, 2, 3, 3), 1 / 3)
    assert torch.allclose(quantities.attention_rollout([eye, eye]), torch.eye(3)[None])
    assert torch.allclose(quantities.attention_rollout([uniform]), (torch.eye(3) + 1 / 3)[None] / 2)
    first = torch.tensor([[0.5, 0.5], [0.0, 1.0]]).expand(1, 1, 2, 2)
    second = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2)
    # (A1 + I)/2 = [.75 .25; 0 1], (A2 + I)/2 = [1 0; .25 .75]; product A2 A1 = [.75 .25; .1875 .8125]
    expected = torch.tensor([[0.75, 0.25], [0.1875, 0.8125]])
    assert torch.allclose(quantities.attention_rollout([first, second])[0], expected)
    heads = torch.cat([torch.eye(2)[None, None], torch.eye(2).flip(0)[None, None]], dim=1)     # they average to 1/2 everywhere
    assert torch.allclose(quantities.attention_rollout([heads])[0], torch.tensor([[0.75, 0.25], [0.25, 0.75]]))


def test_token_maps_lay_each_tokens_row_over_the_image():
    """CLS and DIST taken for patches, or rows and columns of the image exchanged: token 1 looks at patch (0, 2) only."""
    net = vit.vit_micro(img_size=24, patch_size=8)
    look = torch.eye(11).expand(1, 1, 11, 11).clone()
    look[0, 0, 1] = F.one_hot(torch.tensor(2 + 2), 11).float()            # DIST: the third patch of the first row
    net.forward_features = lambda images, return_attention: (None, [look])
    maps = quantities.token_maps(net, torch.zeros(1, 3, 24, 24))
    expected = torch.zeros(1, 3, 3)
    expected[0, 0, 2] = 0.5
    assert torch.equal(maps["dist"], expected) and maps["cls"].abs().max() == 0


def test_effective_patches_counts_them():
    """A sum in place of a mean, or an entropy that is not of the normalised map: k equal patches count as k, at any scale."""
    maps = torch.zeros(3, 2, 2)
    maps[0], maps[1, 0], maps[2, 1, 1] = 0.1, 7.0, 0.3
    assert torch.allclose(quantities.effective_patches(maps), torch.tensor([4.0, 2.0, 1.0]))


def test_cover_greys_the_patches_that_are_marked_most():
    """The least marked covered, or a transposed mask: of four patches only the upper right one loses its pixels."""
    images, maps = torch.rand(2, 3, 4, 4), torch.tensor([[[0.1, 0.9], [0.2, 0.3]]]).expand(2, 2, 2)
    covered = quantities.cover(images, maps, share=0.25)
    mean = images.mean(dim=(2, 3))[..., None, None].expand(2, 3, 2, 2)
    assert torch.equal(covered[:, :, :2, 2:], mean)
    assert torch.equal(covered[:, :, 2:], images[:, :, 2:]) and torch.equal(covered[:, :, :2, :2], images[:, :, :2, :2])


def test_drops_are_those_of_the_marked_patch(monkeypatch):
    """Probabilities of another class, a map that covers nothing, or the random cover counted as the map's.

    White upper left patch on black, logits (10 x its mean, 0). Covered with the image's mean, 1/4, they are (2.5, 0); the
    random cover is made to hit another patch, which changes nothing.
    """
    images = torch.zeros(1, 3, 4, 4)
    images[:, :, :2, :2] = 1
    elsewhere = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])
    monkeypatch.setattr(quantities, "token_maps", lambda net, x: {"cls": elsewhere, "dist": elsewhere.flip(1, 2)})
    monkeypatch.setattr(torch, "rand_like", lambda x: elsewhere)
    logits = lambda net, x: {k: F.pad(10 * x[:, 0, :2, :2].mean().view(1, 1), (0, 1)) for k in ("cls", "dist")}
    monkeypatch.setattr(train_student, "heads", logits)
    seen = figures.measure_maps(Namespace(net=None), images)
    drop = torch.sigmoid(torch.tensor(10.0)) - torch.sigmoid(torch.tensor(2.5))
    assert seen["dist"]["marked"].item() == pytest.approx(drop.item(), rel=1e-4) and seen["dist"]["random"].item() == 0
    assert seen["cls"]["marked"].item() == 0 and seen["dist"]["like CLS"].item() == 0 == seen["dist"]["predicted"].item()


def test_attention_distance_of_known_attentions():
    """Distances in patches instead of pixels, the leading tokens not left out, rows not scaled again, heads averaged away."""
    N = 196
    even, self_only = torch.full((1, 1, N, N), 1 / N), torch.eye(N).expand(1, 1, N, N)
    both = torch.cat([even, self_only], dim=1)                            # two heads
    assert quantities.attention_distance(both, G=14, P=16).tolist() == pytest.approx([116.5, 0.0], abs=0.05)
    # 2 x 2 patches of 8 px behind CLS and DIST. Patch 0 gives half of itself to CLS, a quarter to itself and to its right
    # neighbour, 8 px away: 4 px. Patch 3 looks at patch 0, 8 sqrt 2 px away; patches 1 and 2 at themselves. Mean of the four.
    a = torch.eye(6).view(1, 1, 6, 6).clone()
    a[0, 0, 2] = torch.tensor([0.5, 0, 0.25, 0.25, 0, 0])
    a[0, 0, 5] = torch.tensor([0, 0, 1.0, 0, 0, 0])
    assert quantities.attention_distance(a, G=2, P=8).item() == pytest.approx((4 + 8 * math.sqrt(2)) / 4, rel=1e-6)
    assert quantities.patch_distances(2, 8)[0].tolist() == pytest.approx([0, 8, 8, 8 * math.sqrt(2)])


# ---- Features ------------------------------------------------------------------------------------------------------------

def orthonormal(n, d, seed=0):
    """d orthonormal columns (n,d), orthogonal to the vector of ones too, so that subtracting a row's mean changes nothing."""
    x = torch.randn(n, d + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 0] = 1
    return torch.linalg.qr(x).Q[:, 1:]


def test_rank_and_reconstruction_error_of_a_matrix_with_known_singular_values():
    """Singular values not squared, the share of 99 % off by one, the wrong mean subtracted.

    Squares 60, 30, 9.5, 0.5: 99.5 % are in three directions, 90 in two. Unsquared, all four would be needed.
    """
    squares = torch.tensor([60.0, 30.0, 9.5, 0.5], dtype=torch.float64)
    X = orthonormal(50, 4) * squares.sqrt() @ orthonormal(20, 4, seed=1).T                            # (50,20)
    assert quantities.reconstruction_error(X)[:5].tolist() == pytest.approx([1, 0.4, 0.1, 0.005, 0], abs=1e-9)
    assert len(quantities.reconstruction_error(X)) == 21 and quantities.feature_rank(X) == 3
    assert quantities.feature_rank(X, kept=0.5) == 1 and quantities.feature_rank(X, kept=0.9999) == 4
    assert quantities.feature_rank(X + torch.arange(50.0)[:, None]) == 3  # a constant per row is subtracted,
    assert quantities.feature_rank(0 * X + orthonormal(20, 1)[:, 0]) == 1                             # a common vector is not
    assert quantities.feature_rank(0 * X + 5) == 0                        # a constant image's constant feature


def test_block_tokens_are_the_residual_stream():
    """The wrong tokens, blocks in another order, or hooks that stay: the last block's, normed, give the logits."""
    net = vit.vit_micro(img_size=32, patch_size=8, num_classes=10).eval()
    x = torch.rand(2, 3, 32, 32)
    tokens = quantities.block_tokens(net, x)
    assert tokens.shape == (6, 2, 2, 96)                                  # blocks, images, CLS and DIST, features
    assert torch.allclose(net.head_dist(net.norm(tokens[-1])[:, 1]), net(x)[1], atol=1e-5)
    first = net.blocks[0](torch.cat([t.expand(2, -1, -1) for t in (net.cls_token, net.dist_token)]
                                    + [net.patch_embed((x - net.mean) / net.std)], dim=1) + net.pos_embed)
    assert torch.allclose(tokens[0], first[:, :2], atol=1e-5)
    assert not any(block._forward_hooks for block in net.blocks)


# ---- Predictions and weights ---------------------------------------------------------------------------------------------

def test_entropy_of_known_distributions():
    """Bits instead of nats, NaN at probability 0: certain, no idea, one of two, and 1/2 1/4 1/4 (1.5 ln 2)."""
    p = torch.tensor([[1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0], [0.5, 0.25, 0.25, 0]])
    expected = [0, math.log(4), math.log(2), 1.5 * math.log(2)]
    assert quantities.entropy(p.log()).tolist() == pytest.approx(expected, abs=1e-6)


def bowl():
    """L(w) = 1/2 sum_i h_i w_i^2 with Hessian diag(1, 4, 9) at w = (2, 1, 0), in two parameters: (loss, parameters)."""
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([2.0], [1.0, 0.0]))
    return lambda: 0.5 * (a.square().sum() + 4 * b[0] ** 2 + 9 * b[1] ** 2), [a, b]


def test_the_loss_around_a_bowl_is_its_gradient_and_hessian():
    """L(w + r d) = L(w) + r g.d + r^2/2 d.Hd: here 4 + r 0.6 * 2 + r^2/2 (0.36 + 0.64 * 9), with d = (0.6, 0, 0.8).

    Steps that add up instead of starting from w, or a weight that does not come back, show.
    """
    loss, params = bowl()
    before = [p.detach().clone() for p in params]
    d = [torch.tensor([0.6], dtype=torch.float64), torch.tensor([0.0, 0.8], dtype=torch.float64)]
    losses = quantities.loss_along(loss, params, d, [0, 0.1, 1, 0])
    assert losses.tolist() == pytest.approx([4 + 1.2 * r + 3.06 * r * r for r in (0, 0.1, 1, 0)])
    assert all(torch.equal(p, b) for p, b in zip(params, before))


def test_the_gradient_direction_is_the_one_that_sam_climbs():
    """A norm per parameter, or parts of the loss that replace each other: g = (2, 4, 0), of length sqrt 20, from two halves."""
    loss, params = bowl()
    direction = quantities.gradient_direction((loss() / 2 for _ in range(2)), params)
    assert torch.cat(direction).tolist() == pytest.approx([2 / math.sqrt(20), 4 / math.sqrt(20), 0])
    before = [p.detach().clone() for p in params]
    climber = SAM(torch.optim.SGD(params, lr=1.0), rho=0.3)
    loss().backward()
    climber.first_step()
    assert all(torch.allclose(p.detach(), b + 0.3 * d) for p, b, d in zip(params, before, direction))


def test_random_directions_are_as_long_as_the_filters():
    """One length for the whole tensor, or biases that move: each filter of d is as long as that of w."""
    torch.manual_seed(0)
    w, bias = torch.randn(4, 3, 5, 5) * torch.tensor([0.1, 1, 10, 100]).view(4, 1, 1, 1), torch.randn(4)
    d, moved = quantities.random_direction([w, bias])
    assert torch.allclose(d.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1)) and not moved.any()
    assert F.cosine_similarity(d.flatten(1), w.flatten(1)).abs().max() < 0.5
    assert quantities.length([w, bias]).item() == pytest.approx(torch.cat([w.flatten(), bias]).norm().item())


def test_a_teacher_is_asked_about_the_students_images(tiny_cifar):
    """Labels of other images: a teacher that knows class 0 only is right on its images, clean or strong, and sure."""
    data = data_lt.load_data("cifar10", 4, "exp", tiny_cifar)

    class Zero(torch.nn.Module):
        img_size = 32

        def forward(self, x):
            return 100 * F.one_hot(torch.zeros(len(x), dtype=torch.long), 10).float()
    rt = engine.Runtime(torch.device("cpu"))
    seen = train_teacher.seen_by_student(Zero(), data, rt)
    n = len(data.train_labels)
    assert [len(right) for right, _ in seen.values()] == [n, n, n]
    assert int(seen["clean"][0].sum()) == data.counts[0] == int(seen["strong"][0].sum())
    assert all(float(entropy.max()) < 1e-6 for _, entropy in seen.values())
    assert train_teacher.on_training_images(Zero(), data, rt)["clean"] == {"accuracy": round(100 * 24 / n, 2), "entropy": 0.0}


# ---- Tables, pages, labels -----------------------------------------------------------------------------------------------

class Outside(HTMLParser):
    """Collects what a browser would fetch, and the cells of tables."""

    def __init__(self, page):
        super().__init__()
        self.fetched, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        addresses = [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        self.fetched += [v for v in addresses if not v.startswith(("data:", "#"))]

    def handle_data(self, text):
        self.text.append(text)


def test_a_page_is_whole_and_says_what_it_was_given():
    """A picture, style or font from outside; text taken for HTML; a column lost."""
    rows = [{"class": "<b>cat</b> & dog", "right %": 12.5, "n": 3}]
    page = report.page("run <1>", "lead", [report.Section("A section", "text", rows, PNG), report.Section("Other", table=rows)])
    seen = Outside(page)
    assert seen.fetched == [] and "url(" not in page and "@import" not in page and "<script" not in page
    assert "<b>cat" not in page and {"<b>cat</b> & dog", "12.5", "3", "right %", "run <1>"} <= set(seen.text)
    assert "data:image/png;base64,iVBORw0KGgo=" in page and 'href="#a-section"' in page and 'id="a-section"' in page


def test_text_tables_line_up():
    """A value under another column's heading: numbers end where the heading ends, text begins where it begins."""
    lines = analyze.as_text([{"run": "a", "value": 1.5, "n": 10}, {"run": "longer", "value": 22.25, "n": 7}]).splitlines()
    assert lines == ["run     value   n", "a         1.5  10", "longer  22.25   7"]


def test_labels_are_what_sets_names_apart():
    """Labels that are empty or the same for two runs would make a legend useless."""
    def short(*paths):
        return analyze.labels(Namespace(runs=list(paths), labels=None))
    assert short("runs/vit_mini_cifar10_s0", "runs/deit-lt_mini_cifar10_s0/") == ["vit", "deit-lt"]
    assert short("a/teacher_s0", "b/teacher_s0_rho0") == ["teacher_s0", "teacher_s0_rho0"]            # the first would be empty
    assert short("runs/alone") == [""]                                    # a legend of one says nothing


# ---- Commands on tiny runs -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def runs(tiny_cifar, tmp_path_factory):
    """Folders of a teacher, a DeiT-LT student and a plain ViT, and a bare ViT file, {name: path}."""
    root = tmp_path_factory.mktemp("analysed")
    common = ["--data-dir", tiny_cifar, "--imb", 4, "--batch", 32, "--eval-every", 1, "--epochs", 2, "--drw-epoch", 1]
    student = [*common, "--model", "micro"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_student, "draw_summary", lambda folder: None)
        script(train_teacher, patch, *common, "--out", root / "teacher", "--img-size", 16, "--rho", 0, "--lr", 0.01,
               "--amp", "none")
        script(train_student, patch, *student, "--out", root / "deit-lt", "--teacher", root / "teacher")
        script(train_student, patch, *student, "--out", root / "vit", "--method", "vit")
    torch.save({"model": vit.vit_tiny(img_size=32, patch_size=16, num_classes=10, depth=2).state_dict()}, root / "file.pth")
    return {path.name: path for path in root.iterdir()}


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def run(command, paths, tmp_path, monkeypatch, *flags):
    """Run a command that must leave a PNG and numbers beside it; returns the numbers."""
    script(analyze, monkeypatch, command, *paths, "--out", tmp_path / "out.png", *flags)
    picture = (tmp_path / "out.png").read_bytes()
    assert picture.startswith(PNG) and int.from_bytes(picture[16:20], "big") > 400                    # pixels wide
    return json.loads((tmp_path / "out.json").read_text()) if command == "rank" else rows_of(tmp_path / "out.csv")


def test_attention_of_two_networks(runs, tmp_path, monkeypatch):
    """A token forgotten, the wrong images measured, or shares beyond their range."""
    rows = run("attention", [runs["vit"], runs["deit-lt"]], tmp_path, monkeypatch, "--classes", "class8", "class9")
    assert [(r["run"], r["token"]) for r in rows] == [("vit", "CLS"), ("deit-lt", "CLS"), ("deit-lt", "DIST")]
    assert all(r["images"] == "12" and r["of"] == "16" and 1 <= float(r["patches"]) <= 16 for r in rows)
    result = json.loads((runs["deit-lt"] / "result.json").read_text())["per_class"]
    assert float(rows[2]["right %"]) == pytest.approx(sum(result["dist"][8:]) / 2, abs=0.1)


def test_attention_shows_chosen_images(runs, tmp_path, monkeypatch):
    """--index must show those images: their pixels, in that order."""
    shown = []
    monkeypatch.setattr(figures, "show", lambda axis, image, title="": shown.append((image, title)))
    run("attention", [runs["deit-lt"]], tmp_path, monkeypatch, "--index", 59, 0)
    data = data_lt.load_data("cifar10", 4, "exp", analyze.load_student(str(runs["deit-lt"]), engine.setup("cpu"))[1].data_dir)
    assert [title for _, title in shown] == ["class9", "class0"]
    assert torch.equal(shown[0][0], augment.to_float(data.test_images[59]))


def test_distance_has_every_head_of_every_block(runs, tmp_path, monkeypatch):
    """A head or block lost, or distances outside of the image: 4 x 4 patches of 8 px, spread evenly 16.06 px."""
    rows = run("distance", [runs["vit"], runs["deit-lt"]], tmp_path, monkeypatch)
    assert len(rows) == 2 * 6 * 3 and len({(r["run"], r["block"], r["head"]) for r in rows}) == 36
    assert all(0 < float(r["distance px"]) < 24 * math.sqrt(2) for r in rows)
    assert all(float(r["even px"]) == pytest.approx(16.06, abs=0.01) for r in rows)


def test_distance_does_not_depend_on_the_batches(runs, tmp_path, monkeypatch):
    """Means of means over batches of 25 and 5 images would weight the last five as much as the others."""
    whole = [float(r["distance px"]) for r in run("distance", [runs["vit"]], tmp_path, monkeypatch, "--classes", *CLASSES)]
    batches = figures.batches
    monkeypatch.setattr(figures, "batches", lambda subject, index: batches(subject, index, size=7))
    again = [float(r["distance px"]) for r in run("distance", [runs["vit"]], tmp_path, monkeypatch, "--classes", *CLASSES)]
    assert whole == pytest.approx(again, abs=2e-3) and len(set(whole)) > 1


def test_heads_are_those_of_the_run(runs, tmp_path, monkeypatch):
    """Another head, mean or image than what the run reported."""
    script(analyze, monkeypatch, "heads", runs["deit-lt"], "--out", tmp_path / "heads.csv")
    rows, result = rows_of(tmp_path / "heads.csv"), json.loads((runs["deit-lt"] / "result.json").read_text())["per_class"]
    for way, head in (("CLS", "cls"), ("DIST", "dist"), ("CLS + DIST, logits", "avg")):
        assert [float(row[way]) for row in rows] == pytest.approx(result[head], abs=17)      # one image of six: bfloat16
        assert sum(abs(float(row[way]) - r) for row, r in zip(rows, result[head])) < 50
    with pytest.raises(SystemExit):
        script(analyze, monkeypatch, "heads", runs["vit"])


def test_runs_are_listed_as_they_ended(runs, monkeypatch, capsys):
    """Another head or run than the average of each; a column that slips."""
    script(analyze, monkeypatch, "runs", runs["teacher"], runs["deit-lt"])
    title, _, *lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    for name, line in zip(("teacher", "deit-lt"), lines, strict=True):
        row, result = dict(zip(title, line, strict=True)), json.loads((runs[name] / "result.json").read_text())
        assert row["run"] == f"`{name}`" and row["command"] == f"`{result['command']}`" and row["date"] == result["date"]
        assert float(row["tail"]) == pytest.approx(result["avg"]["tail"], abs=0.05) and row["seed"] == "0"


CLASSES = [f"class{k}" for k in range(5)]


def test_rank_agrees_with_its_curve(runs, tmp_path, monkeypatch):
    """A rank read from other features than the curve: it is the first m that loses less than 1 %."""
    numbers = run("rank", [runs["vit"], runs["deit-lt"]], tmp_path, monkeypatch)
    assert [(r["run"], r["token"], r["images"], r["n"]) for r in numbers["rank"]] == [
        ("vit", "CLS", "all", 60), ("vit", "CLS", "tail", 18), ("deit-lt", "CLS", "all", 60), ("deit-lt", "DIST", "all", 60),
        ("deit-lt", "CLS", "tail", 18), ("deit-lt", "DIST", "tail", 18)]
    for ranks, curve in zip(numbers["rank"], numbers["reconstruction_error"]):
        assert ranks["block 6"] == next(m for m, e in enumerate(curve["error"]) if e < 0.01)


def test_entropy_repeats_what_the_teachers_run_measured(runs, tmp_path, monkeypatch, capsys):
    """Another draw, or other images, than those that result.json reports; a histogram that loses images."""
    rows = run("entropy", [runs["teacher"]], tmp_path, monkeypatch)
    for kind in ("clean", "strong", "mixed"):
        assert sum(float(r["share %"]) for r in rows if r["images"] == kind) == pytest.approx(100, abs=0.1)
    printed = {words[1]: words for words in map(str.split, capsys.readouterr().out.splitlines()) if words[0] == "teacher"}
    result = json.loads((runs["teacher"] / "result.json").read_text())["training_images"]
    for here, there in (("clean", "clean"), ("mixed", "strong")):
        accuracy, entropy = map(float, printed[here][-2:])
        assert accuracy == pytest.approx(result[there]["accuracy"], abs=0.8)
        assert entropy == pytest.approx(result[there]["entropy"], abs=0.01)


def test_sharpness_starts_at_the_teachers_own_loss(runs, tmp_path, monkeypatch):
    """Another loss than the trained one, weights that are not the run's, or a climb that goes down."""
    rows = run("sharpness", [runs["teacher"]], tmp_path, monkeypatch, "--images", 50)
    of = {(r["direction"], r["classes"], float(r["radius"])): float(r["loss"]) for r in rows}
    assert len(rows) == 2 * 2 * 7 and {r["loss name"] for r in rows} == {"ldam"}
    net, args, data = analyze.load(str(runs["teacher"]), engine.setup("cpu"))
    index = torch.cat([figures.of_classes(data.train_labels, [k], 5) for k in (7, 8, 9)])
    logits = net.net(train_teacher.teacher_images(augment.to_float(data.train_images[index]), net.net))
    own = train_teacher.LDAMLoss(data.counts, 0.5)(logits, data.train_labels[index]).item()
    assert of["SAM", "tail", 0] == of["random", "tail", 0] == pytest.approx(own, rel=1e-4)
    assert of["SAM", "all", 0.0025] > of["SAM", "all", 0]


def test_diversity_is_the_logs(runs, tmp_path, monkeypatch):
    """Similarity taken for distance, or the epochs of another run."""
    rows = run("diversity", [runs["deit-lt"]], tmp_path, monkeypatch)
    log = [json.loads(line) for line in (runs["deit-lt"] / "log.jsonl").read_text().splitlines()]
    assert [float(r["cosine distance"]) for r in rows] == pytest.approx([1 - r["cosine"] for r in log], abs=1e-3)
    assert [float(r["DIST tail %"]) for r in rows] == [r["dist"]["tail"] for r in log]
    assert [r["drw"] for r in rows] == ["False", "True"] and [r["epoch"] for r in rows] == ["1", "2"]


def test_a_log_says_which_data_it_came_from(runs, tmp_path):
    """A picture of a JPEG copy's results without that word: the label of result.json or, before it is there, the name."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"dataset": "cifar10", "imb": 100.0, "counts": [5000, 50]}))
    log = figures.Log("ours", str(tmp_path / "run"))
    assert (log.source, log.on, log.name) == ("ours: run", "cifar10 (imb 100, 5,050 images)", "ours")
    (tmp_path / "run" / "result.json").write_text(json.dumps({"dataset": "CIFAR-10 (JPEG copy)"}))
    assert log.on == "CIFAR-10 (JPEG copy) (imb 100, 5,050 images)" and figures.Log("", "a/run/").source == "run"


def test_the_table_of_diversity_shows_first_switch_and_last():
    """The epoch after the switch shown for the one before it."""
    rows = [{"epoch": e, "drw": e > 3} for e in range(1, 7)]
    assert [r["epoch"] for r in figures.first_switch_last(rows)] == [1, 3, 6]
    assert [r["epoch"] for r in figures.first_switch_last(rows[3:])] == [4, 6]


def test_imbalance_means_over_seeds(runs, tmp_path, monkeypatch, capsys):
    """Runs of two imbalances in one mean, or of two methods in one line."""
    folders = []
    for name, imb, seed, tail in (("vit", 10, 0, 40.0), ("vit", 10, 1, 50.0), ("vit", 100, 0, 5.0), ("deit-lt", 100, 0, 45.0)):
        result = json.loads((runs[name] / "result.json").read_text()) | {"imb": imb, "seed": seed}
        result["avg"]["tail"] = tail
        folders.append(tmp_path / f"{name}{imb}_{seed}")
        shutil.copytree(runs[name], folders[-1], ignore=shutil.ignore_patterns("*.pt"))               # no checkpoint is needed
        (folders[-1] / "result.json").write_text(json.dumps(result))
    rows = run("imbalance", folders, tmp_path, monkeypatch)
    assert sorted((r["series"], float(r["imbalance"]), float(r["tail %"])) for r in rows) == [
        ("deit-lt micro", 100, 45), ("vit micro", 10, 40), ("vit micro", 10, 50), ("vit micro", 100, 5)]
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:4]]
    assert ["vit", "micro", "10", "2", "45.0", "40.0", "50.0"] in table
    assert ["vit", "micro", "100", "1", "5.0", "5.0", "5.0"] in table


def test_curves_of_a_student_and_a_teacher(runs, tmp_path, monkeypatch):
    """Epochs of one run under another's name, or accuracies where none were measured."""
    rows = run("curves", [runs["deit-lt"], runs["teacher"]], tmp_path, monkeypatch)
    log = [json.loads(line) for line in (runs["teacher"] / "log.jsonl").read_text().splitlines()]
    mine = [r for r in rows if r["run"] == "teacher"]
    assert [float(r["loss"]) for r in mine] == [r["loss"] for r in log] and len(rows) == 4
    assert [float(r["tail"]) for r in mine] == [r["avg"]["tail"] for r in log]


def test_outputs_go_into_the_run_folder_or_where_out_says(runs, tmp_path, monkeypatch, capsys):
    """The numbers written over the picture, or into the second run's folder."""
    script(analyze, monkeypatch, "curves", runs["vit"], runs["deit-lt"])
    script(analyze, monkeypatch, "curves", runs["vit"], "--out", tmp_path / "a.b")
    written = [runs["vit"] / "curves.png", runs["vit"] / "curves.csv", tmp_path / "a.b.png", tmp_path / "a.b.csv"]
    assert [line for line in capsys.readouterr().out.splitlines() if "/" in line] == list(map(str, written))
    assert [path.read_bytes()[:4] == PNG[:4] for path in written] == [True, False, True, False]


def test_augment_asks_the_teacher(runs, tmp_path, monkeypatch):
    """Labels of other images, or "agrees" that does not compare the two."""
    rows = run("augment", [runs["deit-lt"]], tmp_path, monkeypatch, "--columns", 4)
    assert [r["view"] for r in rows] == ["clean"] * 4 + ["strong"] * 4 + ["mixed"] * 4
    assert all((r["teacher"] == r["label"]) == (r["agrees"] == "True") for r in rows[:8])
    net, args, data = analyze.load_student(str(runs["deit-lt"]), engine.setup("cpu"))
    torch.manual_seed(0)
    index = torch.randperm(len(data.train_labels))[:4]
    teacher, _ = train_teacher.load_teacher(str(runs["teacher"]), data, engine.setup("cpu"))
    says = train_student.teacher_logits(teacher, augment.to_float(data.train_images[index])).argmax(dim=1).tolist()
    assert [r["teacher"] for r in rows[:4]] == [data.class_names[k] for k in says]
    assert [r["label"] for r in rows[:4]] == [data.class_names[k] for k in data.train_labels[index]]


@pytest.mark.parametrize("name, sections", [
    ("deit-lt", ["Result", "Accuracy per class", "The course of the training", "How CLS and DIST part", "Where the tokens look",
                 "How far the heads look", "Rank of the features", "What the student trains on", "Settings"]),
    ("teacher", ["Result", "Accuracy per class", "The course of the training", "How sure the teacher is",
                 "Flatness of the minimum", "Settings"]),
    ("file.pth", ["Result", "Accuracy per class", "Where the tokens look", "How far the heads look", "Rank of the features",
                  "Left out"])])
def test_report_holds_what_applies(name, sections, runs, tiny_cifar, tmp_path, monkeypatch):
    """An analysis lost, or one that does not apply and ends the report; anything fetched from outside."""
    script(analyze, monkeypatch, "report", runs[name], "--out", tmp_path / "report.html", "--data-dir", tiny_cifar, "--imb", 4,
           "--images", 30)
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == sections
    assert Outside(page).fetched == [] and page.count("data:image/png;base64,iVBOR") == len(set(sections) - {
        "Result", "Settings", "Left out"})
    if name == "deit-lt":
        result = json.loads((runs[name] / "result.json").read_text())
        assert f"{result['avg']['overall']:.1f}" in Outside(page).text


@pytest.mark.parametrize("command, run_of, flags, says", [
    ("attention", ["teacher"], [], "is not a student"),
    ("sharpness", ["vit"], [], "is not a teacher"),
    ("curves", ["file.pth"], [], "has no log.jsonl"),
    ("imbalance", ["file.pth"], [], "has no result.json"),
    ("diversity", ["vit"], [], "no distances of CLS and DIST"),
    ("distance", ["vit"], ["--classes", "cow"], "there is no cow; the classes are class0"),
    ("attention", ["vit"], ["--index", "60"], "numbered from 0 to 59"),
    ("attention", ["vit"], ["--columns", "0"], "--columns must be from 1"),
    ("augment", ["file.pth"], [], "does not say how its student was trained"),
    ("curves", [], [], "name one run folder"),
    ("augment", ["vit", "deit-lt"], [], "name one run folder"),
    ("curves", ["vit", "deit-lt"], ["--labels", "a"], "one name for each of the 2 runs"),
])
def test_mistakes_end_with_one_line(command, run_of, flags, says, runs, tiny_cifar, monkeypatch, capsys):
    """A traceback, or a picture of something else, in place of a line that says what to do."""
    with pytest.raises(SystemExit) as stop:
        script(analyze, monkeypatch, command, *(runs[name] for name in run_of), "--data-dir", tiny_cifar, "--imb", 4, *flags)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and says in error.splitlines()[-1] and "Traceback" not in error
