"""resnet.py against torchvision's ResNet-50, ResNet-32 written out from its state dict, and
formulas written as loops."""
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision

from resnet import CosineClassifier, FastNet, FastStem, make, resnet32, resnet50

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def randomise_batchnorm(model):
    """A fresh BatchNorm is nearly the identity, which would hide a skipped or swapped one."""
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(std=0.3)
            m.running_mean.normal_(std=0.3)
            m.running_var.uniform_(0.5, 1.5)
    return model


def normalise(x, mean, std):
    """Mean and std are float32 numbers in the networks, so they are here."""
    return (x - torch.tensor(mean)[:, None, None].to(x)) / torch.tensor(std)[:, None, None].to(x)


# ---- sizes and names ----

@pytest.mark.parametrize("build, K, parameters", [(resnet32, 10, 464_154), (resnet32, 100, 470_004),
                                                  (resnet50, 1000, 25_557_032)])
def test_parameter_counts(build, K, parameters):
    """Convolution shortcuts (option B), biases beside BatchNorm, a wrong depth or width."""
    with torch.device("meta"):
        assert sum(p.numel() for p in build(K).parameters()) == parameters


def ldam_drw_layout(K, cosine):
    """Names and shapes of the state dict that LDAM-DRW and Saddle-LongTail save for CIFAR."""
    def batchnorm(name, C):
        vectors = {f"{name}.{t}": (C,) for t in ("weight", "bias", "running_mean", "running_var")}
        return vectors | {f"{name}.num_batches_tracked": ()}

    layout = {"conv1.weight": (16, 3, 3, 3)} | batchnorm("bn1", 16)
    for stage, C in ((1, 16), (2, 32), (3, 64)):
        for b in range(5):
            block, C_in = f"layer{stage}.{b}", C // 2 if b == 0 and stage > 1 else C
            layout |= {f"{block}.conv1.weight": (C, C_in, 3, 3),
                       f"{block}.conv2.weight": (C, C, 3, 3)}
            layout |= batchnorm(f"{block}.bn1", C) | batchnorm(f"{block}.bn2", C)
    if cosine:
        return layout | {"linear.weight": (64, K)}
    return layout | {"linear.weight": (K, 64), "linear.bias": (K,)}


@pytest.mark.parametrize("cosine", [False, True])
def test_resnet32_state_dict_is_ldam_drws(cosine):
    """A renamed tensor, a saved normalisation buffer, a cosine classifier with a bias or stored
    as (K,64)."""
    state = resnet32(10, cosine=cosine).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == ldam_drw_layout(10, cosine)


def test_cosine_resnet50_keeps_the_published_classifier_shape():
    """ImageNet-LT and iNaturalist teachers have `fc.weight` (2048,K) and no bias."""
    with torch.device("meta"):
        plain, cosine = resnet50(12).state_dict(), resnet50(12, cosine=True).state_dict()
    assert plain["fc.weight"].shape == (12, 2048) and cosine["fc.weight"].shape == (2048, 12)
    assert set(plain) - set(cosine) == {"fc.bias"} and set(cosine) <= set(plain)


def test_initialisation_is_kaimings():
    """Another gain, or fan-in for fan-out: sqrt(2 / fan) told apart on layers whose fans differ;
    4 standard errors."""
    torch.manual_seed(0)
    small, big = resnet32(100), resnet50(10)
    fan_in = [(small.layer3[0].conv1.weight, 9 * 32), (small.linear.weight, 64)]
    fan_out = [(big.layer1[0].conv3.weight, 256), (big.layer1[0].downsample[0].weight, 256),
               (big.layer2[0].conv2.weight, 9 * 128)]
    for weight, fan in fan_in + fan_out:
        assert abs(weight.std() / math.sqrt(2 / fan) - 1) < 4 / math.sqrt(2 * weight.numel())


# ---- the forward pass ----

@pytest.mark.parametrize("training", [True, False])
def test_resnet50_is_torchvisions(training):
    """Any difference: stride in the 1x1 (v1), a missing ReLU, pooling, the normalisation, the
    batch statistics."""
    torch.manual_seed(0)
    theirs = randomise_batchnorm(torchvision.models.resnet50(weights=None, num_classes=7))
    ours = resnet50(7)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)              # in both directions
    x = torch.rand(2, 3, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        logits = ours.double().train(training)(x)
        expected = theirs.double().train(training)(normalise(x, IMAGENET_MEAN, IMAGENET_STD))
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.layer4[2].bn3.running_var, theirs.layer4[2].bn3.running_var)


def resnet32_written_out(state, x, training):
    """He et al., section 4.2, from a state dict: (B,3,32,32) in [0, 1] -> logits (B,K) of the
    plain linear classifier."""
    def batchnorm(name, x):
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        else:
            mean, var = state[name + ".running_mean"], state[name + ".running_var"]
        scale = state[name + ".weight"] / torch.sqrt(var + 1e-5)
        shift = state[name + ".bias"] - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]

    def conv(name, x, stride):
        return F.conv2d(x, state[name + ".weight"], stride=stride, padding=1)

    x = batchnorm("bn1", conv("conv1", normalise(x, CIFAR_MEAN, CIFAR_STD), 1)).clamp(min=0)
    for stage in (1, 2, 3):
        for b in range(5):
            block, stride = f"layer{stage}.{b}", 2 if b == 0 and stage > 1 else 1
            out = batchnorm(f"{block}.bn1", conv(f"{block}.conv1", x, stride)).clamp(min=0)
            out = batchnorm(f"{block}.bn2", conv(f"{block}.conv2", out, 1))
            if stride == 2:  # option A: every 2nd pixel, C/2 zero channels around
                B, C, H, W = x.shape
                small = torch.zeros(B, 2 * C, H // 2, W // 2, dtype=x.dtype)
                for i in range(H // 2):
                    for j in range(W // 2):
                        small[:, C // 2:C // 2 + C, i, j] = x[:, :, 2 * i, 2 * j]
                x = small
            x = (x + out).clamp(min=0)
    return x.sum((2, 3)) / 64 @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize("training", [True, False])
def test_resnet32_is_the_papers_network(training):
    """A shortcut that pools or pads on one side, a ReLU in the wrong place, wrong statistics,
    wrong CIFAR mean or std."""
    torch.manual_seed(0)
    model = randomise_batchnorm(resnet32(10)).double().train(training)
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = resnet32_written_out(model.state_dict(), x, training)
        logits = model(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("build, stage, size", [(resnet32, "layer3", 32), (resnet50, "layer4", 64)])
def test_features_on_request_are_the_pooled_ones(build, stage, size):
    """Features from before pooling, a maximum instead of a mean, or logits that change when
    features are asked for."""
    torch.manual_seed(0)
    model, maps = build(10).eval(), []
    model.get_submodule(stage).register_forward_hook(
        lambda module, inputs, output: maps.append(output))
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        logits, features = model(x, return_features=True)
        assert torch.equal(logits, model(x))
    torch.testing.assert_close(features, maps[0].flatten(2).sum(2) / maps[0][0, 0].numel())
    weight, bias = list(model.parameters())[-2:]
    torch.testing.assert_close(logits, features @ weight.T + bias)


# ---- the cosine classifier ----

def test_cosine_classifier_is_its_formula():
    """Rows normalised instead of columns, a lost scale, an axis of the features mixed up; a class
    that wins by a long class vector."""
    torch.manual_seed(0)
    model, x = CosineClassifier(5, 3, scale=7.0).double(), torch.randn(4, 5, dtype=torch.float64)
    model.weight.data.normal_(std=10)
    logits, w = model(x).detach(), model.weight.detach()
    for b in range(4):
        for k in range(3):
            dot = sum(float(x[b, i] * w[i, k]) for i in range(5))
            lengths = math.hypot(*x[b].tolist()) * math.hypot(*w[:, k].tolist())
            assert logits[b, k].item() == pytest.approx(7 * dot / lengths, abs=1e-12)


@pytest.mark.parametrize("arch", ["resnet32", "resnet50", "fast"])
def test_cosine_classifier_sits_on_the_pooled_features(arch):
    """A cosine flag that is ignored, a classifier fed with something else, a scale other than 30;
    logits that FastNet's halved features change."""
    torch.manual_seed(0)
    model = make(arch, 4, cosine=True).eval()
    with torch.no_grad():
        logits, features = model(torch.rand(2, 3, 32, 32), return_features=True)
    weight = list(model.parameters())[-1]
    expected = 30 * F.cosine_similarity(features[:, :, None], weight[None], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cosine", [False, True])
def test_logits_are_not_rounded_to_bfloat16(cosine):
    """30 times a cosine of 8 bits ties now and then, and the arg max of a tie is the class that
    has more images."""
    net = resnet32(10, cosine=cosine).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, features = net(torch.rand(3, 3, 32, 32), return_features=True)
    with torch.no_grad():
        assert features.dtype == torch.bfloat16
        assert torch.equal(logits, net.classifier(features.float()))


def test_cosine_classifier_gradient():
    """A detached length: finite differences see that lengthening a feature changes nothing, so
    must the gradient."""
    torch.manual_seed(0)
    model = CosineClassifier(4, 3).double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def logits(x, weight):
        return torch.func.functional_call(model, {"weight": weight}, x)
    assert torch.autograd.gradcheck(logits, (x, model.weight))
    model(x)[:, 0].sum().backward()
    zeros = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close((x.grad * x).sum(1), zeros, rtol=0, atol=1e-12)


# ---- FastNet ----

def written_out(state, x, blocks):
    """FastNet's logits in evaluation mode, from its state dict, in plain functions."""
    def layer(x, conv, norm, pool):
        x = F.conv2d(x, state[f"{conv}.weight"], padding=1)
        if pool:
            x = F.max_pool2d(x, 2)
        gain = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-5).sqrt()
        x = (x - state[f"{norm}.running_mean"][:, None, None]) * gain[:, None, None]
        x = x + state[f"{norm}.bias"][:, None, None]
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2                # GELU

    x = F.conv2d(normalise(x, CIFAR_MEAN, CIFAR_STD), state["stem.weight"], state["stem.bias"])
    x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    for b in range(blocks):
        x = layer(x, f"blocks.{b}.conv1", f"blocks.{b}.bn1", pool=True)
        x = layer(x, f"blocks.{b}.conv2", f"blocks.{b}.bn2", pool=False)
    return x.flatten(2).max(dim=2).values / 2 @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("size, widths", [(16, [64, 128]), (32, [64, 128, 256]),
                                          (64, [64, 128, 256, 256])])
def test_fastnet_is_its_written_out_form(size, widths):
    """A pooling or BatchNorm in another place, a missing block, logits that are not halved."""
    torch.manual_seed(0)
    net = randomise_batchnorm(FastNet(7, img_size=size)).double().eval()
    assert [block.conv2.out_channels for block in net.blocks] == widths
    x = torch.rand(3, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(net(x), written_out(net.state_dict(), x, len(widths)))


def test_fastnets_stem_whitens_the_patches_of_the_images():
    """Components that are correlated or of another scale; a stem that training changes.

    The covariance of the whitened 2x2 patches is the identity but for the 5e-4 that bounds the
    gain of directions which the images hardly use.
    """
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(40, 3, 9, 9), size=16, mode="bicubic").clamp(0, 1)
    net = FastNet(5, img_size=16)
    net.whiten(images)
    out = net.stem(normalise(images, CIFAR_MEAN, CIFAR_STD)).double()   # (40,24,15,15)
    torch.testing.assert_close(out[:, 12:], -out[:, :12])
    white = out[:, :12].transpose(0, 1).flatten(1)                      # (12, patches)
    covariance = white @ white.T / white.shape[1]
    patches = F.unfold(normalise(images, CIFAR_MEAN, CIFAR_STD).double(), 2)
    patches = patches.transpose(0, 1).flatten(1)                        # (12, patches)
    variance = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1])
    expected = torch.diag(variance / (variance + 5e-4))
    torch.testing.assert_close(covariance, expected, atol=1e-4, rtol=0)
    net(images).sum().backward()
    assert net.stem.weight.grad is None and net.stem.bias.grad is None
    assert net.blocks[0].conv1.weight.grad.abs().sum() > 0


def test_fastnets_convolutions_begin_by_passing_their_input_on():
    """Dirac kernels in the wrong channels, or ones that normal initialisation overwrites."""
    net = FastNet(5)
    x = torch.randn(2, 24, 8, 8)
    out = net.blocks[0].conv1(x)                                        # 24 -> 64 channels
    torch.testing.assert_close(out[:, :24], x)
    assert out[:, 24:].abs().amax() > 0
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(net.blocks[0].conv2(x), x)


@pytest.mark.parametrize("P, size, blocks", [(2, 16, 1), (4, 32, 2), (8, 32, 3), (16, 32, 3)])
def test_a_students_stem_begins_as_its_teachers_blocks(P, size, blocks):
    """Weights copied into the wrong block, or pixels normalised twice or by the wrong network.

    The stem adds a row and a column in front of the image. A teacher of fewer blocks leaves the
    others at their Dirac kernels.
    """
    torch.manual_seed(0)
    net = randomise_batchnorm(FastNet(5, img_size=size)).double().eval()
    stem = FastStem(P, 12).double().eval()
    before = [block.conv1.weight.clone() for block in stem.blocks]
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    stem.start_from(net, mean.view(3, 1, 1).double(), std.view(3, 1, 1).double())
    x = torch.rand(2, 3, 4 * P, 4 * P, dtype=torch.float64)
    assert stem(normalise(x, IMAGENET_MEAN, IMAGENET_STD)).shape == (2, 12, 4, 4)
    padded = F.pad(normalise(x, CIFAR_MEAN, CIFAR_STD), (1, 0, 1, 0), mode="replicate")
    expected = F.gelu(net.stem(padded))
    for mine, theirs in zip(stem.blocks, net.blocks):
        expected = theirs(expected)
    for mine in stem.blocks[blocks:]:
        expected = mine(expected)
    torch.testing.assert_close(stem(normalise(x, IMAGENET_MEAN, IMAGENET_STD)),
                               stem.proj(expected))
    changed = [not torch.equal(old, block.conv1.weight) for old, block in zip(before, stem.blocks)]
    assert changed == [b < blocks for b in range(len(stem.blocks))]
    stem.train()(normalise(x, IMAGENET_MEAN, IMAGENET_STD)).square().sum().backward()
    assert stem.stem.weight.grad is None and stem.blocks[0].conv1.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no stem of FastNet for patches of 6 px"):
        FastStem(6, 12)


@pytest.mark.parametrize("network", [resnet32, FastNet])
def test_batchnorms_statistics_follow_in_about_ten_steps(network):
    """Statistics of a network that is long gone, in short runs."""
    layers = [m for m in network(10).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert layers and all((m.momentum, m.eps) == (0.1, 1e-5) for m in layers)
