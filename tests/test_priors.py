"""analysis/priors.py: accuracy at the class frequencies of the field, logits adjusted to them."""
import math
from types import SimpleNamespace

import pytest
import torch

import analyze
from analysis import calibration, loading, priors
from conftest import script
from engine.runtime import UserError
from finished_runs import RT, runs  # noqa: F401: a fixture

GROUPS = {"head": [0], "mid": [1], "tail": [2]}
DATA = SimpleNamespace(num_classes=3, class_names=["cat", "c,3", "Bär"], counts=[70, 20, 10],
                       label="zoo", groups=GROUPS)


def test_uniform_and_train():
    """Counts for frequencies, or the frequencies of the test set."""
    assert priors.test_prior("uniform", DATA, None).tolist() == pytest.approx([1 / 3] * 3)
    assert priors.test_prior("train", DATA, DATA.counts).tolist() == pytest.approx([0.7, 0.2, 0.1])


@pytest.mark.parametrize("text", [
    'class,frequency\ncat,2\nBär,0\n"c,3",6\n', '"c,3",0.75\r\ncat, 0.25\r\n\r\nBär,0\r\n',
    '\ufeffBär,0\ncat ,1e1\n"c,3",30'])
def test_frequencies_of_a_file_go_to_their_classes(text, tmp_path):
    """The order of the file for that of the data; a header, a byte order mark or quotes in the way.
    """
    (tmp_path / "prior.csv").write_bytes(text.encode())
    assert priors.test_prior(str(tmp_path / "prior.csv"), DATA, None).tolist() == pytest.approx(
        [0.25, 0.75, 0])


@pytest.mark.parametrize("text, words", [
    ("cat,1\nBär,1", "missing: c,3"),
    ('cat,1\nBär,1\n"c,3",1\ndog,1', "not classes of these data: dog"),
    ('cat,1\nBär,1\n"c,3",1\ncat,2', "line 4: cat is there twice"),
    ('cat,-1\nBär,1\n"c,3",1', "line 1: 'cat,-1' is no class"),
    ('cat,1\nBär,many\n"c,3",1', "line 2"), ('cat,1\nBär,nan\n"c,3",1', "line 2"),
    ('cat,1\nBär,inf\n"c,3",1', "line 2"), ("cat,1\nBär,1\nc,3,1", "line 3: 'c,3,1' is no class"),
    ('cat,0\nBär,0\n"c,3",0', "all frequencies are 0"), ("class;frequency\ncat;1", "line 1"),
    ("", "missing: cat, c,3, Bär"), (b"\xff\xfe\x00", "uniform, train, or a CSV file"),
    (None, "uniform, train, or a CSV file")])
def test_a_file_of_frequencies_that_is_not_one_is_refused(text, words, tmp_path):
    """A class that counts as 0, one that is ignored, or a traceback."""
    if text is not None:
        text = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "prior.csv").write_bytes(text)
    with pytest.raises(UserError) as error:
        priors.test_prior(str(tmp_path / "prior.csv"), DATA, None)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_weighted_accuracies_equal_a_loop_over_images():
    """Weights per class for weights per image, or precision of the images as they are."""
    p = torch.tensor([0.1, 0.6, 0.3], dtype=torch.double)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    classes = torch.tensor([0, 0, 1, -1, 1, 2, 2])
    weight = [p[k].item() / (labels == k).sum().item() for k in labels.tolist()]
    pairs = list(zip(weight, classes.tolist(), labels.tolist()))
    result = priors.weighted_accuracies(classes, labels, p, GROUPS)
    assert result["overall"] == pytest.approx(100 * sum(w for w, a, b in pairs if a == b), abs=1e-3)
    f1 = []
    for k in range(3):
        hits = sum(w for w, a, b in pairs if a == b == k)
        precision, recall = hits / sum(w for w, a, b in pairs if a == k), hits / p[k].item()
        f1.append(200 * precision * recall / (precision + recall))
    assert result["macro_f1"] == pytest.approx(sum(f1) / 3, abs=1e-3)
    assert [result[name] for name in GROUPS] == [50, 50, 100]
    uniform = torch.full((3,), 1 / 3, dtype=torch.double)
    assert "macro_f1" in priors.weighted_accuracies(classes, labels, uniform, GROUPS)
    assert result["balanced"] == pytest.approx(200 / 3, abs=1e-3)


def test_a_class_that_does_not_occur_does_not_count():
    """A recall of 0 / 0 in the means."""
    p = torch.tensor([0.5, 0.5, 0], dtype=torch.double)
    result = priors.weighted_accuracies(torch.tensor([0, 1, 1]), torch.arange(3), p, GROUPS)
    assert result["balanced"] == result["overall"] == 100 and math.isnan(result["tail"])


def test_adjusted_logits_are_bayes_rule():
    """The prior subtracted, or the training's frequencies not taken out: an optimal network of one
    prior becomes that of another."""
    torch.manual_seed(0)
    likelihood = torch.rand(200, 3, dtype=torch.double)                 # p(x | k)
    pi, p = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6], dtype=torch.double)
    best = (likelihood * p).argmax(dim=1)
    for exponent in (0.0, 0.5, 1.0):
        logits = (likelihood * pi ** exponent).log() + torch.randn(200, 1)
        found = priors.adjusted(logits, p, DATA.counts, exponent)
        assert torch.equal(found, best) and not torch.equal(logits.argmax(dim=1), best)
    rare = torch.tensor([0.0, 0.5, 0.5], dtype=torch.double)
    assert 0 not in priors.adjusted(torch.tensor([[900.0, 0, 0]]), rare, DATA.counts, 0.0)
    assert priors.adjusted(torch.tensor([[math.nan, 9, 0]]), p, DATA.counts, 0.0).tolist() == [-1]


def test_the_scale_of_the_logits_does_not_decide():
    """Bayes' rule on logits whose softmax means nothing: the same network, three times as sure of
    itself or a third, is adjusted to other answers; a temperature that is not the image's own."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(200)
    logits = torch.randn(600, 3, generator=generator)
    logits[torch.arange(600), labels] += 1.0
    how = {"holdout": 0.2, "holdout_by": None}
    network = SimpleNamespace(config=how, configs=())
    data = SimpleNamespace(**vars(DATA), test_labels=labels)
    p, texts, raw = priors.test_prior("train", DATA, DATA.counts), [], []
    for factor in (1 / 3, 1.0, 3.0):
        scaled = factor * logits
        found = calibration.calibrate(network, SimpleNamespace(**how), data, RT, scaled)
        texts.append(priors.prior_text("train", p, [LA_TEACHER], DATA.counts, scaled, labels, DATA,
                                       found.temperatures))
        raw.append(priors.prior_text("train", p, [LA_TEACHER], DATA.counts, scaled, labels, DATA))
    assert len(set(texts)) == 1 and len(set(raw)) == 3
    assert "adjusted: logits / temperature + ln(test prior)" in texts[0]
    own = torch.tensor([2.0, 0.5])          # 2 / 2 < ln 9 - ln 1, 2 / 0.5 > it
    text = priors.prior_text("x", torch.tensor([0.1, 0.9, 0]).double(), [LA_TEACHER], DATA.counts,
                             torch.tensor([[2.0, 0, -9]] * 2), torch.tensor([1, 0]), DATA, own)
    assert text.splitlines()[3].split()[:2] == ["adjusted", "100.0"]


DRW = dict(beta=0.9999, drw_epoch=20, epochs=30)


@pytest.mark.parametrize("config, exponent", [
    (dict(loss="la", beta=0.0, epochs=3), 0), (dict(loss="paco", beta=0.0, epochs=3), 0),
    (dict(loss="vs", beta=0.0, epochs=3), 0), (dict(loss="ldam") | DRW, 0),
    (dict(loss="ldam") | DRW | dict(drw_epoch=30), 1), (dict(loss="ce", beta=0.0, epochs=3), 1),
    (dict(method="vit", distill="none") | DRW, 1),
    (dict(method="deit-lt", distill="hard") | DRW, 0.5),
    (dict(method="deit", distill="hard") | DRW | dict(beta=0.0), 1),
    (dict(method="deit-lt", distill="soft", logit_adjustment=True, beta=0.0, epochs=3), 0),
    (dict(method="vit-crt", distill="none") | DRW, 0),
    (dict(loss="la") | DRW, -1), (dict(loss="vs") | DRW | dict(drw_epoch=30), 0),
    (dict(method="deit-lt", distill="soft", logit_adjustment=True) | DRW, -0.5),
    (dict(method="vit", distill="none", logit_adjustment=True) | DRW, 0)])
def test_what_a_network_expects_follows_from_its_training(config, exponent):
    """A prior that is taken out twice, or not at all; DRW that the run never reached."""
    found, words = priors.assumed_prior(config)
    assert found == exponent and words


@pytest.mark.parametrize("name", ["deit-lt", "file.pth"])
def test_the_prior_of_training_is_the_networks_own(name, runs, tiny_cifar, tmp_path, monkeypatch):
    """That of other images which --imb names; none for a file that knows no counts."""
    given = []
    real = priors.test_prior
    monkeypatch.setattr(priors, "test_prior",
                        lambda text, data, counts: given.append(counts) or real(text, data, counts))
    network, _, data = loading.load(str(runs[name]), RT,
                                    data_flags={"imb": 2.0, "data_dir": str(tiny_cifar)})
    script(analyze, monkeypatch, "eval", runs[name], "--out", tmp_path / "x.csv", "--imb", 2,
           "--data-dir", tiny_cifar, "--test-prior", "train")
    assert (network.counts is None) == (name == "file.pth") and network.counts != data.counts
    assert given == [network.counts or data.counts]


def test_both_rows_are_shown():
    """One of two; a network of unknown training that is adjusted; classes without test images."""
    labels = torch.tensor([0] * 10 + [1])                               # class 2 has none
    logits = torch.tensor([[1.0, 0.0, 0.0]] * 6 + [[0.0, 0.5, 0.0]] * 5)
    p = priors.test_prior("train", DATA, DATA.counts)
    config = dict(loss="la", beta=0.0, epochs=3)
    text = priors.prior_text("train", p, [config], DATA.counts, logits, labels, DATA)
    title, head, first, second, last = text.splitlines()
    assert "train" in title and first.startswith("unadjusted")
    assert head.split()[:3] == ["prior", "balanced", "overall"]
    assert float(first.split()[2]) == pytest.approx(100 * (0.7 * 0.6 + 0.2) / 0.9, abs=0.051)
    assert float(second.split()[2]) == pytest.approx(100 * 0.7 / 0.9, abs=0.051)
    assert "10.0 % of the prior is of classes without test images" in last
    text = priors.prior_text("train", p, [{}], None, logits, labels, DATA)
    assert "\nadjusted" not in text and "is not known" in text
    text = priors.prior_text("f", torch.tensor([0.9, 0, 0.1]).double(), [config], DATA.counts,
                             logits, labels, DATA)
    assert text.endswith("left out, for their frequency is 0: 1")
    with pytest.raises(UserError, match="no test images"):
        priors.prior_text("f", torch.tensor([0.0, 0, 1]).double(), [{}], None, logits,
                          labels, DATA)


LA_TEACHER = dict(loss="la", beta=0.0, epochs=3)
LA_STUDENT = dict(method="deit-lt", distill="soft", logit_adjustment=True, beta=0.0, epochs=3)


def test_the_training_is_the_networks_not_that_of_the_images_at_hand():
    """Frequencies taken out that a folder got later, or those of another imbalance: no change."""
    likelihood = torch.tensor([[0.5, 0.3, 0.2]] * 3, dtype=torch.double)        # p(x | k)
    pi = torch.tensor([0.1, 0.1, 0.8], dtype=torch.double)      # of the training: it says class 2
    logits, labels = (likelihood * pi).log(), torch.arange(3)
    config, p = dict(loss="ce", beta=0.0, epochs=3), priors.test_prior("uniform", DATA, None)
    text = priors.prior_text("uniform", p, [config], [1, 1, 8], logits, labels, DATA)
    *_, first, second, _ = text.splitlines()
    assert first.split()[3:6] == ["0.0", "0.0", "100.0"]
    assert second.split()[3:6] == ["100.0", "0.0", "0.0"]
    text = priors.prior_text("uniform", p, [config] * 2, None, logits, labels, DATA)
    assert "not the same for all" in text and "\nadjusted" not in text


@pytest.mark.parametrize("configs, text", [
    ([LA_STUDENT, LA_TEACHER],
     "(logit adjustment); equal frequencies (the log prior in its loss))"),
    ([LA_TEACHER] * 2, "training: equal frequencies (the log prior in its loss))"),
    ([dict(method="deit-lt", distill="hard") | DRW, dict(loss="ldam") | DRW],
     "not adjusted: the networks expect different frequencies"),
    ([LA_STUDENT, {}], "not adjusted: which frequencies the network expects is not known")])
def test_networks_together_are_adjusted_by_what_all_expect(configs, text):
    """A student with its teacher, adjusted by what the student alone expects; two of one
    expectation that are not adjusted, since its reasons differ."""
    logits, labels = torch.eye(3), torch.arange(3)
    p = priors.test_prior("train", DATA, DATA.counts)
    found = priors.prior_text("train", p, configs, DATA.counts, logits, labels, DATA)
    assert found.endswith(text) and ("\nadjusted" in found) == ("not adjusted" not in text)
