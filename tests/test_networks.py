"""networks.py against files in the published layouts (DeiT-LT's, Saddle-LongTail's, PaCo's,
DeiT's, timm's, torchvision's), which are written here from networks and forward passes of this
file's own, with random weights and BatchNorm statistics."""
import argparse
import os
import re
import unicodedata
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import data_lt
import resnet
from engine import networks, torchvision_networks
from engine.checkpoints import save_checkpoint
from engine.runtime import Runtime, UserError
from images.files import natural

CONSTANTS = {
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inat": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


# ---- plain networks and files, by hand ----

class Block(nn.Module):
    def __init__(self, c_in, c):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 3, c // c_in, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if x.shape != out.shape:  # option A: every second pixel between zero channels
            zeros = torch.zeros_like(out[:, :out.shape[1] // 4])
            x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
        return F.relu(out + x)


class Plain32(nn.Module):
    """CIFAR ResNet-32, or of another depth, up to its pooled features (B,64)."""

    def __init__(self, depth=32):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for i, (c_in, c) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            blocks = [Block(c_in, c), *(Block(c, c) for _ in range((depth - 2) // 6 - 1))]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))

    def forward(self, x):
        return self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))).mean((2, 3))


class Wrapper(nn.Module):
    """What PaCo trains: two encoders that end in a projection, two classifiers and a queue."""

    def __init__(self, encoder_q, encoder_k, d, K, dim=8):
        super().__init__()
        for encoder in (encoder_q, encoder_k):
            encoder.fc = nn.Sequential(nn.Linear(d, d), nn.BatchNorm1d(d), nn.ReLU(),
                                       nn.Linear(d, dim))
        self.encoder_q, self.encoder_k = encoder_q, encoder_k
        self.linear, self.linear_k = nn.Linear(d, K), nn.Linear(d, K)
        self.register_buffer("queue", torch.randn(16, dim))
        self.register_buffer("queue_l", torch.randint(0, K, (16,)))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))


def randomise(net):
    """A fresh BatchNorm is nearly the identity, which would hide a lost one."""
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(std=0.3)
            m.running_mean.normal_(std=0.3)
            m.running_var.uniform_(0.5, 1.5)
    return net.eval()


def resnet32_state(K, cosine=False, depth=32):
    state = dict(randomise(Plain32(depth)).state_dict())
    if cosine:
        return state | {"linear.weight": torch.randn(64, K)}
    return state | {"linear.weight": torch.randn(K, 64), "linear.bias": torch.randn(K)}


def vit_state(D=128, P=8, G=4, K=5, depth=2, distilled=False, deit3=False, hidden=None):
    """Random weights with the names and shapes of facebookresearch/deit; deit3: LayerScale, and
    positions of patches only."""
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, G * G + (0 if deit3 else 1 + distilled), D),
              "patch_embed.proj.weight": (D, 3, P, P), "patch_embed.proj.bias": (D,),
              "norm.weight": (D,), "norm.bias": (D,)}
    shapes |= {"dist_token": (1, 1, D)} if distilled else {}
    layers = {"head": (K, D)} | ({"head_dist": (K, D)} if distilled else {})
    for i in range(depth):
        b = f"blocks.{i}."
        layers |= {b + "attn.qkv": (3 * D, D), b + "attn.proj": (D, D)}
        layers |= {b + "mlp.fc1": (hidden or 4 * D, D), b + "mlp.fc2": (D, hidden or 4 * D)}
        vectors = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
        if deit3:
            vectors += ["gamma_1", "gamma_2"]
        shapes |= {b + name: (D,) for name in vectors}
    for name, (out, d) in layers.items():
        shapes |= {name + ".weight": (out, d), name + ".bias": (out,)}
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    for tensor in state.values():
        if tensor.ndim == 2:
            tensor *= 1.5 / tensor.shape[1] ** 0.5
        elif tensor.ndim == 4:
            tensor *= 0.1
    return state


def vit_by_hand(w, x, heads, norm="imagenet"):
    """Images (B,3,S,S) -> [CLS logits] or [CLS logits, DIST logits], from a state dict of
    vit_state."""
    w = {k: v.double() for k, v in w.items()}
    D, P = w["cls_token"].shape[2], w["patch_embed.proj.weight"].shape[2]
    d, depth = D // heads, sum(k.endswith("qkv.bias") for k in w)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def ln(x, name):
        return F.layer_norm(x, (D,), w[name + ".weight"], w[name + ".bias"], 1e-6)
    x = F.conv2d(normalise(x, norm), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], P)
    x = x.flatten(2).transpose(1, 2)
    tokens = [w[k].expand(len(x), 1, D) for k in ("cls_token", "dist_token") if k in w]
    if w["pos_embed"].shape[1] == x.shape[1]:                        # DeiT-III: CLS has no position
        x = torch.cat([*tokens, x + w["pos_embed"]], dim=1)
    else:
        x = torch.cat([*tokens, x], dim=1) + w["pos_embed"]
    for b in (f"blocks.{i}." for i in range(depth)):
        q, k, v = linear(ln(x, b + "norm1"), b + "attn.qkv").split(D, dim=2)
        seen = []
        for h in range(0, D, d):                                          # head after head
            attention = (q[..., h:h + d] @ k[..., h:h + d].mT / d ** 0.5).softmax(dim=2)
            seen.append(attention @ v[..., h:h + d])
        x = x + w.get(b + "gamma_1", 1) * linear(torch.cat(seen, dim=2), b + "attn.proj")
        hidden = F.gelu(linear(ln(x, b + "norm2"), b + "mlp.fc1"))
        x = x + w.get(b + "gamma_2", 1) * linear(hidden, b + "mlp.fc2")
    x = ln(x, "norm")
    heads = [head for head in ("head", "head_dist") if head + ".weight" in w]
    return [linear(x[:, i], head) for i, head in enumerate(heads)]


def normalise(x, norm):
    mean, std = (torch.tensor(c)[:, None, None].to(x) for c in CONSTANTS[norm])     # float32 first
    return (x - mean) / std


def images(size):
    return torch.rand(2, 3, size, size, dtype=torch.float64)


@torch.no_grad()
def features(plain, x, norm):
    return plain.double()(normalise(x, norm))


def resnet32_by_hand(state, x, norm="cifar", depth=32):
    plain = Plain32(depth).eval()
    plain.load_state_dict({k: v for k, v in state.items() if not k.startswith("linear")})
    f, weight = features(plain, x, norm), state["linear.weight"].double()
    if "linear.bias" not in state:
        return cosines(f, weight)
    return f @ weight.T + state["linear.bias"].double()


def cosines(f, weight):
    weight = weight.double()
    return 30 * F.cosine_similarity(f[:, :, None], weight[None], dim=1)     # (B,d), (d,K) -> (B,K)


def save(folder, state, name="published.pth", **how):
    torch.save(state, folder / name, **how)
    return str(folder / name)


def outputs(found, x):
    """What a loaded network says, in float64: [logits], or [CLS logits, DIST logits]."""
    out = found.net.double()(x)
    return [o for o in (out if found.kind == "student" else [out]) if o is not None]


def check(found, x, expected, *words, kind="teacher", numbering="own", names=None):
    """A loaded network says what it should, is ready to use, and its `what` has all of `words`."""
    K = expected[0].shape[1]
    assert (found.kind, found.numbering) == (kind, numbering)
    assert (found.class_names, found.num_classes) == (names, K)
    for word in (*words, f"{K} classes", f"{x.shape[-1]} px"):
        assert word in found.what
    assert not any(m.training for m in found.net.modules())
    assert not any(p.requires_grad for p in found.net.parameters())
    got = outputs(found, x)
    assert len(got) == len(expected) and all(e.std() > 0.1 for e in expected)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-7)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def in_module(state, folder="module."):
    return {folder + k: v for k, v in state.items()}


@pytest.fixture(scope="module")
def big():
    """(ResNet-50 of torchvision without its last layer, images, their pooled features); one for
    all tests, it is slow."""
    torch.manual_seed(0)
    net = randomise(torchvision.models.resnet50())
    net.fc, x = nn.Identity(), images(40)
    f = features(net, x, "imagenet")
    return net.float(), x, f


# ---- teachers ----

@pytest.mark.parametrize("cosine, prefix, names, zipped", [
    (True, "", None, True), (False, "module.", list("abcd"), False)])
def test_ldam_and_cross_entropy_teachers_for_cifar(tmp_path, cosine, prefix, names, zipped):
    """The (64,K) cosine weight read as (K,64) or a Linear taken for one (K is 64 too), bare
    cosines without the factor 30, a needless re-numbering of classes, a `module.` prefix, class
    names lost, a file of torch.save before 1.6."""
    K, x = 4 if names else 64, images(32)
    state = resnet32_state(K, cosine)
    optimizer = {"state": {0: {"momentum_buffer": torch.randn(3)}},
                 "param_groups": [{"lr": 0.1, "params": [0]}]}
    published = {"epoch": 200, "arch": "resnet32", "state_dict": in_module(state, prefix),
                 "class_names": names, "best_acc1": torch.tensor(80.0), "optimizer": optimizer}
    path = save(tmp_path, published, _use_new_zipfile_serialization=zipped)
    found = networks.load_network(path)
    check(found, x, [resnet32_by_hand(state, x)], "ResNet-32", "cifar norm", names=names)
    assert ("cosine" in found.what) == cosine


@pytest.mark.parametrize("depth, cosine", [(20, False), (44, True), (56, False), (110, False)])
def test_cifar_resnets_of_other_depths(tmp_path, depth, cosine):
    """Refused for lack of the fifth block of a stage, or taken for ResNet-32 with too many."""
    state, x = resnet32_state(4, cosine, depth), images(32)
    found = networks.load_network(save(tmp_path, {"state_dict": in_module(state)}))
    check(found, x, [resnet32_by_hand(state, x, depth=depth)], f"ResNet-{depth}", "cifar norm")


@pytest.mark.parametrize("depth", [26, 50])
def test_cifar_resnets_that_nobody_published_are_refused(tmp_path, depth):
    """CIFAR's 50 layers taken for ImageNet's ResNet-50."""
    refused(save(tmp_path, resnet32_state(4, depth=depth)), "blocks a stage")


def test_paco_teacher_for_cifar(tmp_path):
    """The key encoder or its classifier taken instead, the projection applied, module. not
    dropped, the queue in the way."""
    whole, x = randomise(Wrapper(Plain32(), Plain32(), 64, 7)), images(32)
    state = in_module(whole.state_dict())
    found = networks.load_network(save(tmp_path, {
        "epoch": 400, "arch": "resnet32", "state_dict": state, "optimizer": {}}))
    expected = whole.linear.double()(features(whole.encoder_q, x, "cifar")).detach()
    check(found, x, [expected], "PaCo", "ResNet-32", "cifar norm")


def test_paco_teacher_for_imagenet(tmp_path, big):
    """A ResNet-50 encoder without its fc taken for a cosine network, its classifier put in the
    wrong place, `acc` refused."""
    (net, x, f), linear = big, nn.Linear(2048, 6)
    fc = nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 8))
    linear.weight.data.mul_(10)
    state = {"queue": torch.randn(16, 8), "queue_l": torch.zeros(16), "queue_ptr": torch.zeros(1)}
    for which in ("encoder_q.", "encoder_k."):  # the key encoder's weights are the same here
        state |= in_module(net.state_dict(), which) | in_module(fc.state_dict(), which + "fc.")
    state |= in_module(linear.state_dict(), "linear.")
    state |= in_module(nn.Linear(2048, 6).state_dict(), "linear_k.")
    path = save(tmp_path, {"arch": "resnet50", "state_dict": in_module(state),
                           "acc": np.float64(57)})
    check(networks.load_network(path, size=40), x, [linear.double()(f).detach()], "PaCo",
          "ResNet-50", "imagenet norm")


def test_ldam_teacher_for_imagenet(tmp_path, big):
    """DataParallel's prefix, the (2048,K) weight, bare cosines; its outputs come by descending
    count."""
    (net, x, f), weight = big, torch.randn(2048, 6)
    state = in_module({**net.state_dict(), "fc.weight": weight})
    path = save(tmp_path, {"arch": "resnet50", "state_dict": state})
    found = networks.load_network(path, size=40)
    check(found, x, [cosines(f, weight)], "ResNet-50", "cosine", "imagenet norm", numbering="count")


def test_inaturalists_teachers_have_its_own_normalisation(tmp_path, big):
    """8142 classes fed with ImageNet's statistics. Each tensor is one number, expanded, so that
    the file is small."""
    flat = {k: v.flatten()[:1].clone().view([1] * v.ndim).expand(v.shape)
            for k, v in big[0].state_dict().items()}
    state = in_module(flat | {"fc.weight": torch.ones(1, 1).expand(2048, 8142)})
    found = networks.load_network(save(tmp_path, {"state_dict": state}))
    assert found.what.endswith("8142 classes, 224 px, inat normalisation")
    assert found.net.img_size == 224
    assert found.numbering == "count"
    for buffer, constants in zip((found.net.mean, found.net.std), CONSTANTS["inat"]):
        torch.testing.assert_close(buffer.flatten(), torch.tensor(constants))


def test_torchvisions_files_of_other_sizes_names_and_statistics(tmp_path):
    """DenseNet's published keys and ViTs of other images refused; a mean of 0.5 passed over."""
    state = torchvision.models.densenet121(num_classes=4).state_dict()
    published = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): tensor
                 for key, tensor in state.items()}
    assert published.keys() != state.keys()
    found = networks.load_network(save(tmp_path, published)).net.state_dict()
    assert torch.equal(found["body.features.denseblock1.denselayer1.conv1.weight"],
                       state["features.denseblock1.denselayer1.conv1.weight"])
    with torch.device("meta"):                              # of which only shapes are needed
        vit = torchvision.models.vit_b_32(num_classes=4, image_size=96).state_dict()
        large = torchvision.models.efficientnet_v2_l(num_classes=4).state_dict()

    class Asked(nn.Module):
        def __init__(self, *asked, **more):
            super().__init__()
            self.asked = *asked, *more.values()

        def from_torchvision(self, weights):
            return weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision_networks, "load_weights", lambda *_: None)
        patch.setattr(torchvision_networks, "TorchvisionNetwork", Asked)
        mean, std = (pytest.approx(values) for values in networks.NORMALISATIONS["imagenet"])
        net, _ = torchvision_networks.network_of(vit, "x.pth")
        assert net.asked == ("vit_b_32", 4, 96, mean, std)
        half = pytest.approx([0.5] * 3)
        net, _ = torchvision_networks.network_of(large, "x.pth")
        assert net.asked == ("efficientnet_v2_l", 4, 224, half, half)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "mnasnet0_5"])
def test_torchvisions_networks(tmp_path, arch):
    """A wrong architecture found, a last layer left behind, names ignored, weights of before
    num_batches_tracked refused."""
    net = randomise(torchvision.models.get_model(arch, num_classes=4))
    x, names = images(64), list("abcd")
    [p for p in net.parameters() if p.ndim == 2][-1].data.normal_()
    for m in net.modules():
        m.momentum = 1.0
    # else deep ones have the same logits for all images
    net.train()(normalise(images(64), "imagenet").float())
    state = net.eval().state_dict()
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    named = {"state_dict": old, "class_names": names}
    paths = [save(tmp_path, state, "bare.pth"), save(tmp_path, named, "named.pth")]
    expected = features(net, x, "imagenet")
    assert (expected[0] - expected[1]).abs().max() > 0.01
    for path, names in zip(paths, (None, names)):
        found = networks.load_network(path, size=64)
        check(found, x, [expected], arch, "imagenet norm", names=names)


def test_a_file_from_before_batchnorm_counted(tmp_path):
    """Published CIFAR networks of 2018, without num_batches_tracked, refused."""
    state, x = resnet32_state(4), images(32)
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    found = networks.load_network(save(tmp_path, {"state_dict": old, "best_prec1": 92.6}))
    check(found, x, [resnet32_by_hand(state, x)], "ResNet-32")


@pytest.mark.parametrize("norm", CONSTANTS)
def test_another_normalisation_and_size_on_request(tmp_path, norm):
    """norm= ignored, applied to the text only, or with other constants; size= ignored."""
    state, student, x = resnet32_state(4), vit_state(), images(40)
    found = networks.load_network(save(tmp_path, state), norm, 40)
    check(found, x, [resnet32_by_hand(state, x, norm)], f"{norm} norm")
    found, x = networks.load_network(save(tmp_path, student), norm=norm), images(32)
    check(found, x, vit_by_hand(student, x, 2, norm), f"{norm} norm", kind="student")


# ---- students ----

def test_deit_lts_student(tmp_path):
    """DIST lost, the EMA taken, argparse or NumPy objects refused, outputs taken to be in the
    data set's own order."""
    state, x = vit_state(distilled=True), images(32)
    rates = {f"{group}_acc_{head}": np.float64(80) for group in ("head", "med", "tail", "best")
             for head in ("avg", "cls", "dist")}
    path = save(tmp_path, {
        "model": state, "optimizer": {"state": {}, "param_groups": []},
        "lr_scheduler": {"t": [5e-4]}, "epoch": 1199, "model_ema": vit_state(distilled=True),
        "scaler": {"scale": 65536.0}, "args": argparse.Namespace(lr=5e-4, tag="x"),
        "best_acc_avg": np.float64(84.8), **rates})
    check(networks.load_network(path), x, vit_by_hand(state, x, 2), "distilled", "ViT", "128",
          "imagenet norm", kind="student", numbering="count")


@pytest.mark.parametrize("timm", [False, True])
@pytest.mark.parametrize("sizes", [
    dict(D=64, P=16, G=3), dict(D=192, P=8, G=3, depth=3, hidden=200, distilled=True),
    dict(D=64, P=2, G=14, deit3=True), dict(D=128, P=4, G=4, deit3=True, distilled=True)])
def test_vits_of_deit_deit_3_and_timm(tmp_path, sizes, timm):
    """Wrong heads, depth, patch or image size, tokens in the wrong order, the 196 positions of
    DeiT-III given to the wrong tokens, LayerScale lost or not found under timm's name; timm
    saves the weights bare, DeiT under "model"."""
    state, x = vit_state(**sizes), images(sizes["P"] * sizes["G"])
    named = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", k): v for k, v in state.items()}
    found = networks.load_network(save(tmp_path, named if timm else {"model": state}))
    expected = vit_by_hand(state, x, sizes["D"] // 64)
    check(found, x, expected, "ViT", str(sizes["D"]), "imagenet norm", kind="student")
    assert ("distilled" in found.what) == ("distilled" in sizes)


def test_vit_huge_has_16_heads(tmp_path):
    """DeiT-III's and timm's ViT-H/14 are 1280 wide with heads of 80: with 20 heads of 64 they
    load and say nonsense."""
    state, x = vit_state(1280, 14, G=2, depth=1, hidden=8, deit3=True), images(28)
    found = networks.load_network(save(tmp_path, state))
    check(found, x, vit_by_hand(state, x, 16), "1280", kind="student")


@pytest.mark.parametrize("D", [32, 96])
def test_vits_whose_heads_cannot_be_known_are_refused(tmp_path, D):
    """A width that 64 does not divide: no heads at all, or 96 numbers in one head where this
    project's `micro` has three."""
    refused(save(tmp_path, vit_state(D)))


# ---- this project's runs ----

@pytest.mark.parametrize("arch, loss", [("resnet32", "ce"), ("resnet32", "ldam"),
                                        ("shufflenet_v2_x0_5", "ce")])
def test_a_run_of_a_teacher(tmp_path, arch, loss):
    """The classifier or size of the settings ignored, names lost, the folder not understood as
    its last.pt, strict=False."""
    config = {"arch": arch, "loss": loss, "img_size": 40, "dataset": "shapes"}
    names, x = list("abcde"), images(40)
    net = randomise(networks.build_teacher(config, 5))
    net.classifier.weight.data.normal_()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    expected = resnet32_by_hand(state, x) if arch == "resnet32" else net.double()(x).detach()
    run = dict(paco=None, epoch=1, config=config, class_names=names)
    save_checkpoint(tmp_path / "last.pt", model=state, **run)
    for path in (tmp_path, tmp_path / "last.pt"):
        found = networks.load_network(str(path))
        check(found, x, [expected], arch, loss, "cifar norm", names=names)
        assert found.config == config
    for changed in (dict(list(state.items())[1:]), state | {"x": torch.ones(1)},
                    state | {"classifier.bias": torch.ones(4)}):
        save_checkpoint(tmp_path / "last.pt", model=changed, **run)
        refused(str(tmp_path))


@pytest.mark.parametrize("distilled", [False, True])
def test_a_run_of_a_student(tmp_path, distilled):
    """DIST expected where there is none or lost where there is one, heads guessed as 64 wide
    (micro's are 32)."""
    config = {"method": "deit-lt", "model": "micro", "img_size": 16, "patch_size": 4,
              "drop_path": 0.1}
    shapes = networks.build_student(config, 3, distilled).state_dict()
    x, names = images(16), list("abc")
    state = vit_state(96, 4, K=3, depth=6, distilled=distilled)
    assert {k: v.shape for k, v in shapes.items()} == {k: v.shape for k, v in state.items()}
    save_checkpoint(tmp_path / "last.pt", model=state, ema=None, epoch=1, config=config,
                    class_names=names)
    found = networks.load_network(str(tmp_path))
    check(found, x, vit_by_hand(state, x, 3), "micro", "deit-lt", kind="student", names=names)
    assert found.config == config


def test_a_fast_stem_that_its_teacher_cannot_fill_is_announced(capsys):
    """A 16 px teacher has two blocks: the third of a patch of 8 px stayed random in silence."""
    config = dict(model="micro", img_size=32, patch_size=8, drop_path=0, stem="fast")
    net, fast = networks.build_student(config, 3, True), resnet.make("fast", 3, img_size=16)
    networks.start_stem(net, fast, None, Runtime(torch.device("cpu")))
    assert "2 block(s) of 3; the others begin untrained" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["fast", "ensemble", "mirrored", "resnet32", "none"])
def test_a_students_fast_stem_is_its_teachers(kind, tmp_path):
    """Blocks that are not copied, or only from a teacher alone; a stem that stays random."""
    torch.manual_seed(0)
    config = dict(model="micro", img_size=32, patch_size=4, drop_path=0, stem="fast")
    net, fast = networks.build_student(config, 3, True), resnet.make("fast", 3)
    pixels = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)
    data = replace(long_tail("abc"), train_images=pixels, train_labels=torch.zeros(50).long())
    fast.whiten(torch.rand(20, 3, 32, 32))
    fast.blocks[0].bn1.running_mean.fill_(7)
    teacher = {"fast": fast, "ensemble": networks.Ensemble([resnet.make("resnet32", 3), fast]),
               "mirrored": networks.Mirrored(fast), "resnet32": resnet.make("resnet32", 3),
               "none": None}[kind]
    own = net.patch_embed.blocks[0].conv1.weight.clone()        # follows from the run's seed
    networks.start_stem(net, teacher, data, Runtime(torch.device("cpu")))
    if kind in ("resnet32", "none"):        # whitened by the training images, its own blocks
        assert torch.equal(net.patch_embed.blocks[0].conv1.weight, own)
        fast = resnet.make("fast", 3)
        fast.whiten(pixels / 255)
        assert net.patch_embed.blocks[0].bn1.running_mean.eq(0).all()
    else:
        assert net.patch_embed.blocks[0].bn1.running_mean.eq(7).all()
        for mine, theirs in zip(net.patch_embed.blocks.parameters(), fast.blocks.parameters()):
            assert torch.equal(mine, theirs)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(net.patch_embed.stem((x - net.mean) / net.std),
                               fast.stem((x - fast.mean) / fast.std), rtol=1e-4, atol=1e-4)
    save_checkpoint(tmp_path / "last.pt", model=net.state_dict(), config=config
                    | dict(method="deit-lt", format=3), class_names=list("abc"))
    found = networks.load_network(str(tmp_path)).net
    assert torch.equal(found.patch_embed.stem.weight, net.patch_embed.stem.weight)


def test_files_from_elsewhere_may_use_this_projects_words(tmp_path):
    """{"config", "class_names", "state_dict"} is no run of this project, which has "model", but
    is a file with names."""
    state, names, x = resnet32_state(3), list("abc"), images(32)
    path = save(tmp_path, {"config": {"lr": 0.1}, "class_names": names, "state_dict": state})
    check(networks.load_network(path), x, [resnet32_by_hand(state, x)], "ResNet-32", names=names)


# ---- the order of the classes ----

KINDS = {"linear": lambda: resnet32_state(4), "cosine": lambda: resnet32_state(4, cosine=True),
         "student": lambda: vit_state(K=4), "distilled": lambda: vit_state(K=4, distilled=True)}


def long_tail(names, class_ids=None):
    none, labels = torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.long)
    return data_lt.LongTailData("x", "x", none, labels, none, labels, list(names), [9] * len(names),
                                {}, class_ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how, names, order", [
    ("names", "abcd", [2, 0, 3, 1]), ("same names", "bdac", [0, 1, 2, 3]),
    ("own", "abcd", [3, 0, 1, 2]), ("count", "abcd", [0, 1, 2, 3])])
def test_outputs_are_put_into_the_order_of_the_data(tmp_path, kind, how, names, order):
    """The inverse permutation, the (d,K) weight permuted along d, a bias or DIST forgotten,
    numbers used in place of names."""
    state = {"model": KINDS[kind]()}
    if "names" in how:
        state["class_names"] = list("bdac")
    elif how == "count":
        state["tail_acc_avg"] = np.float64(1)
    path, x = save(tmp_path, state), images(32)
    before, found = outputs(networks.load_network(path), x), networks.load_network(path)
    assert networks.match_classes(found, long_tail(names, class_ids=[3, 0, 1, 2]), "it") is found
    after = outputs(found, x)
    assert len(after) == len(before) == (2 if kind == "distilled" else 1)
    for a, b in zip(after, before):
        torch.testing.assert_close(a, b[:, order], rtol=0, atol=1e-9)


@pytest.mark.parametrize("theirs, ours, word", [
    ("", "abc", 3), ("", "abcde", 5), ("abcd", "abc", 4), ("abcd", "abce", "d")])
def test_other_classes_are_refused(tmp_path, theirs, ours, word):
    """A teacher of other classes that labels the data all the same."""
    state = {"model": resnet32_state(4), "class_names": list(theirs) or None}
    found = networks.load_network(save(tmp_path, state))
    with pytest.raises(UserError, match=f"(?s)^the teacher X(?!.*\n).*{word}"):
        networks.match_classes(found, long_tail(ours), "the teacher X")


def own_folder(names):
    """A user's own data, classes by descending count: the reverse of the folders' order."""
    data = long_tail(names[::-1], class_ids=list(range(len(names)))[::-1])
    data.name = "folder"
    return data


NUMBERED = [str(k) for k in range(1, 13)]
ORDERS = {                                  # class folders in natural order
    "1 to 12": NUMBERED, "suffix": ["class 9", "class 10"], "date": ["2-b", "10-a", "x"]}


@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)
def test_a_foreign_teacher_whose_order_is_not_known_is_refused(tmp_path, names):
    """ImageFolder's 1, 10, 2 taken for 1, 2, 10: eleven of twelve classes permuted in silence."""
    found = networks.load_network(save(tmp_path, resnet32_state(len(names))))
    with pytest.raises(UserError, match=r"(?s)^the teacher X(?!.*\n).*x\.classes\.txt"):
        networks.match_classes(found, own_folder(sorted(names, key=natural)), "the teacher X")


@pytest.mark.parametrize("names", ["abc", ["01", "02", "10"], ["1", "2", "3"]])
def test_a_foreign_teacher_of_one_possible_order_is_taken(tmp_path, names):
    """A needless refusal; or descending count for the order of the folders."""
    path, x = save(tmp_path, resnet32_state(3)), images(32)
    before, found = outputs(networks.load_network(path), x), networks.load_network(path)
    networks.match_classes(found, own_folder(list(names)), "it")
    torch.testing.assert_close(outputs(found, x)[0], before[0].flip(1), rtol=0, atol=1e-9)


def test_published_numbers_stay_what_they_are(tmp_path):
    """ImageNet-LT's class 10 between 1 and 2, because text is sorted like that."""
    path, data, x = save(tmp_path, resnet32_state(12)), own_folder(NUMBERED), images(32)
    before = outputs(networks.load_network(path), x)[0]
    expected = before[:, data.class_ids]
    for data.name in ("cifar10", "imagenet_lt", "inat18", "shapes"):
        found = networks.load_network(path)
        networks.match_classes(found, data, "it")
        torch.testing.assert_close(outputs(found, x)[0], expected, rtol=0, atol=1e-9)


def test_a_plain_resnet50_may_be_in_two_orders(tmp_path):
    """Saddle-LongTail's CE-DRW network of ImageNet-LT: near chance in silence."""
    path = save(tmp_path, resnet.make("resnet50", 3).state_dict())
    data = own_folder("abc")
    data.name = "imagenet_lt"
    with pytest.raises(UserError, match="as Saddle-LongTail numbers them"):
        networks.match_classes(networks.load_network(path), data, "it")
    (tmp_path / "published.classes.txt").write_text("c\nb\na\n")
    networks.match_classes(networks.load_network(path), data, "it")
    other = tmp_path / "ckpt.best.pth.tar"                  # as LDAM-DRW and Saddle-LongTail do
    os.rename(path, other)
    with pytest.raises(UserError, match="as Saddle-LongTail numbers them"):
        networks.match_classes(networks.load_network(str(other)), data, "it")
    (tmp_path / "ckpt.best.classes.txt").write_text("c\nb\na\n")
    networks.match_classes(networks.load_network(str(other)), data, "it")


@pytest.mark.parametrize("counts, name, refused", [
    ([9, 5, 5], "imagenet_lt", True), ([9, 5, 5], "inat18", True), ([9, 5, 5], "folder", True),
    ([9, 5, 4], "imagenet_lt", False), ([9, 9, 9], "cifar10", False)])
def test_an_order_by_counts_that_are_equal_is_not_known(tmp_path, counts, name, refused):
    """DeiT-LT's students of ImageNet-LT, whose equally rare classes NumPy's argsort may have put in
    another order than ours: a far too low accuracy in silence; CIFAR's refused, whose order is
    published."""
    path = save(tmp_path, {"model": vit_state(K=3), "tail_acc_avg": np.float64(1)})
    data = own_folder("abc")
    data.counts, data.name = counts, name
    if refused:
        with pytest.raises(UserError, match="equally many: their order is not known"):
            networks.match_classes(networks.load_network(path), data, "it")
        Path(path).with_suffix(".classes.txt").write_text("b\na\nc\n")
    found = networks.match_classes(networks.load_network(path), data, "it")
    assert found.class_names == data.class_names


def test_a_list_of_names_beside_a_file_orders_its_outputs(tmp_path):
    """Names in the file's order read as the data's; the last line lost; a mark of Windows in the
    first name."""
    path, x = save(tmp_path, resnet32_state(12), "x.pth"), images(32)
    before, listed = outputs(networks.load_network(path), x)[0], sorted(NUMBERED)
    (tmp_path / "x.classes.txt").write_bytes("\r\n".join(listed).encode("utf-8-sig"))
    found, data = networks.load_network(path), own_folder(NUMBERED)
    assert found.class_names == listed
    networks.match_classes(found, data, "it")
    expected = before[:, [listed.index(name) for name in data.class_names]]
    torch.testing.assert_close(outputs(found, x)[0], expected, rtol=0, atol=1e-9)


def test_a_list_of_names_is_compared_in_one_unicode_form(tmp_path):
    """A list written on a Mac, whose "Bär" is refused as another class than the data's."""
    path = save(tmp_path, resnet32_state(2), "x.pth")
    (tmp_path / "x.classes.txt").write_bytes(unicodedata.normalize("NFD", "Bär\ncat").encode())
    assert networks.load_network(path).class_names == ["Bär", "cat"]


def test_other_names_make_another_teacher(tmp_path):
    """A list that is corrected while a student is learning, and a student of two teachers."""
    path, hashes = save(tmp_path, resnet32_state(3), "x.pth"), set()
    for names in ("abc", "acb", "abc"):
        (tmp_path / "x.classes.txt").write_text("\n".join(names))
        hashes.add(networks.load_network(path).weights)
    assert len(hashes) == 2


@pytest.mark.parametrize("text", [b"a\nb\n", b"a\nb\nb\n", b"", b"\xff\xfe", b"a\nb\nc\nd"])
def test_a_list_of_other_names_is_refused(tmp_path, text):
    """An IndexError in predict for too few; a class that can never be predicted for one twice."""
    path = save(tmp_path, resnet32_state(3), "x.pth")
    (tmp_path / "x.classes.txt").write_bytes(text)
    with pytest.raises(UserError, match="x.classes.txt"):
        networks.load_network(path)


def test_names_in_a_file_and_beside_it_must_agree(tmp_path):
    """One of the two ignored, and nobody knows which."""
    path = save(tmp_path, {"state_dict": resnet32_state(3), "class_names": list("abc")}, "x.pth")
    (tmp_path / "x.classes.txt").write_text("a\nb\nc\n")
    assert networks.load_network(path).class_names == list("abc")
    (tmp_path / "x.classes.txt").write_text("b\na\nc\n")
    with pytest.raises(UserError, match="differs"):
        networks.load_network(path)


# ---- teachers of a student ----

def teacher_run(folder, seed, data, **settings):
    """A run folder of a ResNet-32 with random weights, its classes in an order of its own."""
    torch.manual_seed(seed)
    config = {"arch": "resnet32", "loss": "ce"} | settings
    net = networks.build_teacher(config, len(data.class_names)).eval()
    torch.nn.init.normal_(net.classifier.weight, std=0.5)               # sure of what it says
    order = torch.randperm(len(data.class_names)).tolist()
    os.mkdir(folder)
    save_checkpoint(folder / "last.pt", model=net.state_dict(), config=config,
                    class_names=[data.class_names[k] for k in order])
    return net, order


def test_several_teachers_predict_the_mean_of_their_probabilities(tmp_path):
    """A mean of logits, the first teacher alone, classes in another's order; a loop in float64."""
    data, x = long_tail("abcdefg"), torch.rand(5, 3, 32, 32)
    files, expected = [tmp_path / f"t{i}" for i in range(3)], torch.zeros(5, 7, dtype=torch.double)
    for seed, file in enumerate(files):
        net, order = teacher_run(file, seed, data)
        expected[:, order] += net(x).double().softmax(dim=1).detach() / 3
    path, rt = ",".join(map(str, files)), Runtime(torch.device("cpu"))
    ensemble, text = networks.load_teacher(path, data, rt)
    torch.testing.assert_close(ensemble(x).double().exp(), expected, rtol=1e-3, atol=1e-4)
    assert ensemble.img_size == 32 and not any(p.requires_grad for p in ensemble.parameters())
    assert text.startswith("the mean of 3, ") and text.count("resnet32") == 1
    alone, text = networks.load_teacher(str(files[0]), data, rt)
    assert torch.equal(alone(x), ensemble.nets[0](x)) and text.startswith("this project's teacher")


def test_teachers_of_two_sizes_need_one_size(tmp_path):
    """Images of 40 px for a teacher of 32; or --teacher-size and --teacher-norm for one of them."""
    data, rt = long_tail("abc"), Runtime(torch.device("cpu"))
    teacher_run(tmp_path / "32", 0, data)
    teacher_run(tmp_path / "40", 1, data, img_size=40)
    path = f"{tmp_path}/32, {tmp_path}/40"
    with pytest.raises(UserError, match="--teacher-size"):
        networks.load_teacher(path, data, rt)
    ensemble, _ = networks.load_teacher(path, data, rt, norm="imagenet", size=48)
    for net in ensemble.nets:
        assert net.img_size == 48
        torch.testing.assert_close(net.mean.flatten(), torch.tensor(CONSTANTS["imagenet"][0]))


def test_a_student_or_other_classes_are_no_teacher(tmp_path):
    """A student's tuple taken for logits; a teacher of other classes that labels the data."""
    data, rt = long_tail("abc"), Runtime(torch.device("cpu"))
    student = save(tmp_path, {"model": vit_state(K=3)}, "student.pth")
    with pytest.raises(UserError, match="student.pth is not a teacher: it is ViT 128"):
        networks.load_teacher(student, data, rt)
    other = save(tmp_path, {"model": resnet32_state(4)}, "other.pth")
    with pytest.raises(UserError, match="other.pth knows 4 classes, the data have 3"):
        networks.load_teacher(other, data, rt)


def test_what_a_run_remembers_of_its_teachers(tmp_path):
    """A hash of the file, which a copy of the same weights in another one does not have, or of the
    weights once they are in the data's order; one weight that does not count."""
    data, rt, hashes = long_tail("abc"), Runtime(torch.device("cpu")), []
    teacher_run(tmp_path / "a", 0, data)
    state = torch.load(tmp_path / "a" / "last.pt")
    copies = {"b": state | {"data": "x"}, "c": state | {"class_names": list("bca")}}
    for name, copy in copies.items():
        save_checkpoint(tmp_path / f"{name}.pt", **copy)
    state["model"]["linear.bias"][2] += 1e-6
    save_checkpoint(tmp_path / "d.pt", **state)
    for file in ("a", "b.pt", "c.pt", "d.pt"):
        net, _ = networks.load_teacher(str(tmp_path / file), data, rt)
        known, = net.origin
        assert known["file"] == str(tmp_path / file)
        hashes.append(known["weights"])
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3] and len(hashes[0]) == 16
    both, _ = networks.load_teacher(f"{tmp_path}/b.pt,{tmp_path}/d.pt", data, rt)
    assert [known["weights"] for known in both.origin] == [hashes[0], hashes[3]]
    assert [known["data"] for known in both.origin] == ["x", ""]


@pytest.mark.parametrize("epoch, epochs, result, words", [
    (3, 5, True, "epoch 3 of 5"), (5, 5, False, "result.json"), (0, 1, False, "epoch 0 of 1"),
    (5, 5, True, ""), (6, 5, True, ""), (None, 5, False, None), (5, None, False, None)])
def test_whether_a_run_is_finished(tmp_path, epoch, epochs, result, words):
    """A teacher in the middle of its training; the checkpoint alone, whose folder says nothing."""
    data = long_tail("abc")
    teacher_run(tmp_path / "run", 0, data, **{} if epochs is None else {"epochs": epochs})
    state = torch.load(tmp_path / "run" / "last.pt")
    if epoch is not None:
        save_checkpoint(tmp_path / "run" / "last.pt", **state, epoch=epoch)
    if result:
        (tmp_path / "run" / "result.json").write_text("{}")
    network = networks.load_network(str(tmp_path / "run"))
    found = network.unfinished
    assert not found if not words else words in found
    assert ("not finished" in network.what) == bool(words)  # eval says so too
    alone = networks.load_network(str(tmp_path / "run" / "last.pt")).unfinished
    assert bool(alone) == (epoch is not None and epochs is not None and epoch < epochs)


def test_what_a_run_builds_on_is_finished_and_of_the_same_images(tmp_path, capsys):
    """A student of a teacher that has seen its test images, and no word of it."""
    data, rt = long_tail("abc"), Runtime(torch.device("cpu"))
    data.fingerprint = "one"
    known = {"file": "x", "weights": "", "data": "other", "unfinished": ""}
    networks.check_origin("the teacher x", known, data, rt)
    line, = capsys.readouterr().err.splitlines()
    assert "the teacher x" in line and "test images" in line
    for same in ("one", ""):
        networks.check_origin("the teacher x", known | {"data": same, "unfinished": None}, data, rt)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="the teacher x is not finished .epoch 3 of 5"):
        networks.check_origin("the teacher x", known | {"unfinished": "epoch 3 of 5"}, data, rt)


def test_names_of_teachers(tmp_path):
    """A comma in a folder's own name taken for two files; an empty name for the present folder."""
    assert networks.teacher_files("runs/a, runs/b") == ["runs/a", "runs/b"]
    assert networks.short_name("runs/a/,runs/b.pth") == "a+b.pth"
    comma = tmp_path / "a,b"
    comma.mkdir()
    assert networks.teacher_files(str(comma)) == [str(comma)]
    assert networks.short_name(str(comma)) == "a,b"
    for path in ("a,,b", "a,", ""):
        with pytest.raises(UserError, match="a name is empty"):
            networks.teacher_files(path)


@pytest.mark.parametrize("kind", ["linear", "student", "distilled"])
def test_mirrored_is_the_mean_over_both_sides(tmp_path, kind):
    """One side alone, or a student without DIST that gets one."""
    found, x = networks.load_network(save(tmp_path, {"model": KINDS[kind]()})), images(32)
    expected = [(a + b) / 2 for a, b in zip(outputs(found, x), outputs(found, x.flip(3)))]
    found.net = networks.Mirrored(found.net)
    got = outputs(found, x)
    assert len(got) == len(expected) and (got[0] - expected[0]).abs().max() == 0
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(outputs(found, x.flip(3)), expected)


# ---- files that are refused ----

def refused(path, *words):
    """One line that names the file, has all of `words`, and does not stop where its reason
    should be."""
    with pytest.raises(UserError) as error:
        networks.load_network(path)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in (os.path.basename(path), *words)), text
    assert not text.rstrip().endswith((":", "lacks")), text


def paco_state():
    return in_module(Wrapper(Plain32(), Plain32(), 64, 4).state_dict())


def torchvision_state(arch):
    return torchvision.models.get_model(arch, num_classes=4).state_dict()


LAYOUTS = {  # weights, a key that is taken out or cut, a key that is added
    "ldam": (lambda: resnet32_state(4, cosine=True), "layer2.0.bn1.weight",
             "layer2.0.downsample.weight"),
    "ce": (lambda: resnet32_state(4), "linear.bias", "layer3.5.bn1.running_var"),
    "paco": (paco_state, "module.encoder_q.bn1.running_mean",
             "module.encoder_q.layer3.5.bn1.weight"),
    "paco's classifier": (paco_state, "module.linear.weight", "module.encoder_q.linear.scale"),
    "vit": (vit_state, "blocks.1.norm1.weight", "blocks.0.gamma_2"),
    "deit": (lambda: vit_state(distilled=True), "head_dist.weight", "fc_norm.weight"),
    "deit-3": (lambda: vit_state(deit3=True), "pos_embed", "dist_token"),
    "shufflenet": (lambda: torchvision_state("shufflenet_v2_x0_5"), "conv5.1.running_var",
                   "fc2.weight"),
    "mobilenet": (lambda: torchvision_state("mobilenet_v3_small"), "classifier.3.weight", "x.bias"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loading_is_strict(tmp_path, layout):
    """strict=False: a key that is missing, left over or of another shape would leave random
    weights in a network."""
    build, key, more = LAYOUTS[layout]
    state = dict(build())
    networks.load_network(save(tmp_path, {"state_dict": state}))          # as it is, it is fine
    missing = {k: v for k, v in state.items() if k != key}
    cut = state[key][:, :-1] if key == "pos_embed" else state[key][:-1]
    for changed in (missing, state | {more: torch.randn(3, 3)}, state | {key: cut}):
        refused(save(tmp_path, {"state_dict": changed}))


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize("arch", ["resnet18", "googlenet"])
def test_what_cannot_be_a_teacher_is_refused(tmp_path, arch):
    """A traceback for a self-supervised ResNet, with neither fc.weight nor fc.bias as if it had
    a cosine classifier, or for GoogLeNet, which is found by its number of parameters but trains
    with auxiliary classifiers."""
    if arch == "resnet18":
        state = torchvision_state("resnet18")
        del state["fc.weight"], state["fc.bias"]
    else:
        state = torchvision.models.googlenet(num_classes=4, aux_logits=False,
                                             init_weights=False).state_dict()
    refused(save(tmp_path, state))


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.mkdir, np.savetxt, exec], ids=["os", "numpy", "builtin"])
def test_a_file_that_would_run_code_runs_none(tmp_path, function, zipped):
    """weights_only=False, or a fallback to it; one piece of evil among good weights is enough."""
    made = str(tmp_path / "made")
    call = {os.mkdir: (made,), np.savetxt: (made, [1.0]), exec: (f"open({made!r}, 'w')",)}[function]
    state = {"model": resnet32_state(3), "args": argparse.Namespace(x=Evil(function, call))}
    refused(save(tmp_path, state, "evil.pth", _use_new_zipfile_serialization=zipped))
    assert os.listdir(tmp_path) == ["evil.pth"]
    function(*call)
    assert os.path.exists(made)                                           # it would have been seen


@pytest.mark.parametrize("build", [lambda: Plain32(), lambda: {"model": nn.Linear(2, 2)}])
def test_a_pickled_module_is_refused(tmp_path, build):
    """A whole network would be rebuilt by running its code; the line says what to save instead."""
    refused(save(tmp_path, build()), "state_dict")


@pytest.mark.parametrize("content", [
    b"", b"not a checkpoint", 0.5, 0.99, [torch.ones(2)], 7, {}, {"epoch": 3, "model": {}},
    {"model": {"lr": 0.1}}, {0: torch.ones(2)}, {"a": torch.ones(2, 2)},
    {"a.weight": torch.ones(2, 2)},
    {"config": {"lr": 0.1}, "class_names": ["a", "b"], "model": {"a.weight": torch.ones(2, 2)}}])
def test_a_file_without_a_known_network_is_refused(tmp_path, content):
    """A traceback for a download that broke off (0.5: half of the file came) or for what else
    people save with torch.save."""
    path = tmp_path / "published.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, float):
        save(tmp_path, vit_state())
        path.write_bytes(path.read_bytes()[:int(content * path.stat().st_size)])
    else:
        save(tmp_path, content)
    refused(str(path))


def test_missing_files_and_unknown_normalisations_are_refused(tmp_path):
    """A traceback for a mistyped name; a folder without last.pt."""
    refused(str(tmp_path / "nothing.pth"))
    refused(str(tmp_path), "last.pt")
    with pytest.raises(UserError, match="cifar, imagenet"):
        networks.load_network(save(tmp_path, resnet32_state(3)), norm="caltech")


@pytest.mark.parametrize("wrapper", ["", "model", "state_dict", "model_state_dict", "net",
                                     "model_ema", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model."])
def test_what_training_scripts_put_around_weights_is_seen_through(tmp_path, wrapper, prefix):
    """A compiled, parallel or wrapped network; settings and class names of another project's
    kind are not mistaken for ours."""
    weights = in_module(torchvision_state("mnasnet0_5"), prefix)
    state = weights
    if wrapper:
        state = {wrapper: weights, "config": {"arch": "resnet18"}, "class_names": {0: "a"}}
    torch.save(state, tmp_path / "x.pth")
    found = networks.load_network(str(tmp_path / "x.pth"))
    assert found.what.startswith("torchvision's mnasnet0_5, 4 classes")
    assert found.class_names is None
    assert torch.equal(found.net.classifier.weight, weights[prefix + "classifier.1.weight"])


def test_averages_of_networks_are_read(tmp_path):
    """torch's AveragedModel, whose count of networks is no weight; the mean of state dicts, whose
    counts of batches are no integers; a wrapper that holds no tensor."""
    weights = torchvision_state("mnasnet0_5")
    averaged = {"n_averaged": torch.tensor(3)} | in_module(weights, "module.")
    mean = {k: v.float() / 2 + v.float() / 2 for k, v in weights.items()}
    for state in (averaged, {"model_ema": averaged}, mean,
                  {"model": {"arch": "mnasnet"}, "state_dict": weights}):
        torch.save(state, tmp_path / "x.pth")
        found = networks.load_network(str(tmp_path / "x.pth"))
        assert torch.equal(found.net.classifier.weight, weights["classifier.1.weight"])


@pytest.mark.parametrize("arch, size", [("shufflenet_v2_x0_5", -1), ("shufflenet_v2_x0_5", 0),
                                        ("densenet121", 20)])
def test_a_size_that_the_network_cannot_take_is_refused(tmp_path, arch, size):
    """A traceback for images of which pooling leaves nothing."""
    path = save(tmp_path, torchvision_state(arch))
    with pytest.raises(UserError, match=f"cannot take {size} px"):
        networks.load_network(path, size=size)


# ---- damaged and hostile files ----

STUDENT = {"method": "deit-lt", "model": "micro", "img_size": 16, "patch_size": 8,
           "drop_path": 0.1}
TEACHER = {"arch": "resnet32", "loss": "ce", "img_size": 32}


def own_run(settings, **changes):
    """The checkpoint of a run of this project, with three classes, and changes to it."""
    if "method" in settings:
        net = networks.build_student(settings, 3, distilled=True)
    else:
        net = networks.build_teacher(settings, 3)
    state = dict(model=net.state_dict(), config=settings, class_names=list("abc"), epoch=1)
    return state | changes


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("kind", ["student", "teacher", "vit", "shufflenet"])
def test_weights_that_are_not_finite_are_refused(tmp_path, kind, bad):
    """A network that calls every image class 0, the most frequent one, and scores with it."""
    if kind in ("student", "teacher"):
        state = own_run(STUDENT if kind == "student" else TEACHER)["model"]
    else:
        state = dict(vit_state() if kind == "vit" else torchvision_state("shufflenet_v2_x0_5"))
    key = [k for k, v in state.items() if v.is_floating_point()][-1]
    state = state | {key: state[key].double().index_fill(0, torch.tensor(0), bad)}
    whole = {"model": state}
    if kind in ("student", "teacher"):
        whole = own_run(STUDENT if kind == "student" else TEACHER, model=state)
    refused(save(tmp_path, whole), key.split(".")[-1], "not finite")


ENDLESS = torch.ones(1).expand(2 ** 40)                     # a terabyte in four bytes
TENSORS = {
    "complex": lambda t: t.to(torch.complex64), "whole numbers": lambda t: t.long(),
    "true or false": lambda t: t > 0, "sparse": lambda t: t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "without numbers": lambda t: t.to("meta"), "empty": lambda t: t[:0],
    "endless": lambda t: ENDLESS, "endless, two dimensions": lambda t: ENDLESS.view(2 ** 20, -1),
    "endless, as many": lambda t: ENDLESS[:1, None, None, None].expand(10 ** 5, 3, 700, 700),
    "text": lambda t: "text", "none": lambda t: None, "nested": lambda t: {"weight": t}}


@pytest.mark.parametrize("kind", TENSORS)
def test_weights_that_are_no_plain_numbers_are_refused(tmp_path, kind):
    """A traceback, weights cut to whole numbers, an imaginary part lost, a terabyte asked for."""
    change = TENSORS[kind]
    own, vit, cnn = own_run(STUDENT), vit_state(), torchvision_state("shufflenet_v2_x0_5")
    for key in ("pos_embed", "patch_embed.proj.weight", "head.weight"):
        changed = own["model"] | {key: change(own["model"][key])}
        refused(save(tmp_path, own | {"model": changed}))
        refused(save(tmp_path, vit | {key: change(vit[key])}))
    refused(save(tmp_path, cnn | {"fc.weight": change(cnn["fc.weight"])}))


SETTINGS = [dict(img_size="16"), dict(img_size=10 ** 9), dict(img_size=0), dict(img_size=-16),
            dict(img_size=16.0), dict(img_size=None), dict(img_size=[16]), dict(img_size=True),
            dict(patch_size=0), dict(patch_size=7), dict(patch_size=10 ** 12), dict(model="huge"),
            dict(model=None), dict(model=["micro"]), dict(model="base"), dict(drop_path="x"),
            dict(drop_path=float("nan")), dict(drop_path=-1), dict(stem="none"), dict(stem=3),
            dict(layer_scale="x"), dict(layer_scale=1e-4), dict(method={}), dict(eval_crop=1e-9),
            dict(eval_crop=None), dict(dataset=5), dict(data_dir=None), dict(imb="100"),
            dict(holdout=torch.ones(2)), dict(epochs=-1), {5: 5},
            dict(lr=[1]), dict(format=torch.ones(2))]


@pytest.mark.parametrize("changes", SETTINGS,
                         ids=lambda s: "-".join(f"{k}{v!s:.9}" for k, v in s.items()))
def test_a_students_settings_of_wrong_kinds_are_refused(tmp_path, changes):
    """A traceback, or 10^18 patches' positions asked for before the weights are looked at."""
    refused(save(tmp_path, own_run(STUDENT, config=STUDENT | changes)))


@pytest.mark.parametrize("changes", [
    dict(arch=None), dict(arch=7), dict(arch="resnet33"), dict(loss=[]),
    dict(arch="resnet110"), dict(arch="resnet50"), dict(loss="ldam"), dict(norm="x"),
    dict(norm=None), dict(img_size=10 ** 9), dict(img_size="a")],
    ids=lambda s: "-".join(f"{k}{v!s:.9}" for k, v in s.items()))
def test_a_teachers_settings_of_wrong_kinds_are_refused(tmp_path, changes):
    """A traceback; another network than the run's, with some of its weights."""
    refused(save(tmp_path, own_run(TEACHER, config=TEACHER | changes)))


@pytest.mark.parametrize("changes", [
    dict(class_names=None), dict(class_names="abc"), dict(class_names=[]), dict(model=None),
    dict(class_names=list("ab")), dict(class_names=list("abcd")), dict(class_names=list("aab")),
    dict(class_names=[1, 2, 3]), dict(class_names=dict(a=1, b=2, c=3)), dict(model=[1]),
    dict(model={}), dict(model={5: torch.ones(1)}), dict(model=torch.ones(3)), dict(epoch=-1),
    dict(epoch="3"), dict(epoch=2.5), dict(epoch=None), dict(epoch=10 ** 30), dict(step=-5),
    dict(data=5), dict(hardware=5), dict(amp=None), dict(white="x"), dict(white=0),
    dict(config=dict(STUDENT, model="micro\nerror: \x1b[2J", img_size=16))],
    ids=lambda s: "-".join(f"{k}{v!s:.9}" for k, v in s.items()))
def test_a_runs_checkpoint_of_wrong_kinds_is_refused(tmp_path, changes):
    """A traceback; names of another length, with which predict ends in an IndexError; training
    from epoch -1 on."""
    refused(save(tmp_path, own_run(STUDENT, **changes)))


@pytest.mark.parametrize("changes", [
    {"blocks.999999.attn.qkv.weight": torch.ones(2, 2)}, {"blocks.x.norm1.weight": torch.ones(2)},
    {f"blocks.{i}.norm1.weight": torch.ones(1) for i in range(3000)},
    {"patch_embed.proj.weight": torch.ones(128, 3, 0, 0)}, {"cls_token": torch.ones(3)},
    {"patch_embed.proj.weight": torch.ones(5)}, {"pos_embed": torch.ones(1, 17, 64)},
    {"pos_embed": torch.ones(17, 128)},
    {"blocks.0.mlp.fc1.weight": torch.ones(0, 128)}, {"head.weight": torch.ones(1, 1, 5)},
    {"head.weight": torch.tensor(3.0)}],
    ids=lambda s: next(iter(s)))
def test_a_vit_of_impossible_sizes_is_refused(tmp_path, changes):
    """A million blocks, heads of no width, a division by zero, positions of another width."""
    refused(save(tmp_path, {"model": vit_state() | changes}))


def test_a_packed_file_is_not_unpacked(tmp_path):
    """A file of a megabyte that is a terabyte of zeros in memory: torch.save packs nothing."""
    path = save(tmp_path, {"model": {"a.weight": torch.zeros(1000, 1000)}})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused(path, "not a readable checkpoint")


@pytest.mark.parametrize("names", [list("ab"), list("abcd"), list("aab"), [1, 2, 3], []])
def test_class_names_of_a_file_from_elsewhere_fit_its_outputs(tmp_path, names):
    """Names left out in silence, and outputs then ordered by a guess."""
    refused(save(tmp_path, {"state_dict": resnet32_state(3), "class_names": names}), "3 different")


def test_a_hidden_width_that_is_no_multiple_is_kept(tmp_path):
    """448 hidden units of a width of 122 for 447, by rounding down."""
    block = networks.vit.Block(122, 2, mlp_ratio=448 / 122)
    assert block.mlp.fc1.out_features == 448


def test_counts_follow_their_classes_into_another_order(tmp_path):
    """--test-prior with another class's frequency."""
    content = {"model": resnet32_state(3), "class_names": list("bca")}
    found = networks.load_network(save(tmp_path, content))
    found.counts = [5, 9, 1]                                # of b, c, a
    networks.match_classes(found, long_tail("abc"), "it")
    assert found.counts == [1, 5, 9]
