"""vit.py against torchvision's ViT, against the equations written as loops over numbers, and
against numbers done by hand."""
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

import vit
from vit import VisionTransformer, resize_pos_embed


def small_vit(**kwargs):
    """8 px images in 4 patches, D = 6, H = 2, two blocks; every parameter random, so that none
    hides behind a 0 or a 1."""
    torch.manual_seed(0)
    settings = dict(img_size=8, patch_size=4, num_classes=3, embed_dim=6, depth=2, num_heads=2,
                    mlp_ratio=4)
    model = VisionTransformer(**settings | kwargs)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


# ---- sizes and names ----

@pytest.mark.parametrize("name, parameters", [("tiny", 5_910_800), ("small", 22_436_432),
                                              ("base", 87_338_192), ("mini", 3_241_616)])
def test_parameter_counts_are_deits(name, parameters):
    """A missing bias, token, head or norm, or a wrong width. Head count has no parameters, so d
    = 64 is checked beside it. (mini: half of tiny's blocks.)"""
    with torch.device("meta"):
        model = vit.MODELS[name](num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.blocks) == (6 if name == "mini" else 12)
    assert all(b.attn.qkv.in_features == 64 * b.attn.num_heads for b in model.blocks)


def deit_base_layout(K):
    """Names and shapes of facebookresearch/deit's deit_base_distilled_patch16_224, in its own
    words."""
    layout = {"cls_token": (1, 1, 768), "dist_token": (1, 1, 768), "pos_embed": (1, 198, 768),
              "patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,)}
    for i in range(12):
        shapes = {"norm1": (768,), "attn.qkv": (2304, 768), "attn.proj": (768, 768),
                  "norm2": (768,), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
        for name, (out, *rest) in shapes.items():
            layout |= {f"blocks.{i}.{name}.weight": (out, *rest), f"blocks.{i}.{name}.bias": (out,)}
    for name, out in {"head": (K, 768), "head_dist": (K, 768), "norm": (768,)}.items():
        layout |= {f"{name}.weight": out, f"{name}.bias": out[:1]}
    return layout


def test_state_dict_is_exactly_deits():
    """A renamed, added (say, the normalisation buffers) or reshaped tensor, which would break
    strict loading."""
    with torch.device("meta"):
        state = vit.MODELS["base"](num_classes=10).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == deit_base_layout(10)
    assert len(state) == 155 and sum(t.numel() for t in state.values()) == 85_815_572


def test_options_add_and_remove_only_their_own_tensors():
    """A plain ViT that keeps a second token or head, or LayerScale under names other than
    DeiT-III's."""
    names = set(small_vit().state_dict())
    plain = small_vit(distilled=False).state_dict()
    assert names - set(plain) == {"dist_token", "head_dist.weight", "head_dist.bias"}
    assert plain["pos_embed"].shape[1] == 1 + 4
    scales = {f"blocks.{i}.gamma_{j}" for i in (0, 1) for j in (1, 2)}
    assert set(small_vit(layer_scale=1e-4).state_dict()) - names == scales


def test_initialisation_is_timms():
    """Any other distribution: PyTorch's default for linear layers, std 1, tokens of zeros, a
    truncation at 2 sigma."""
    torch.manual_seed(0)
    model = vit.MODELS["mini"](img_size=32, patch_size=4, num_classes=100, layer_scale=1e-4)
    sigmas = {"cls_token": 1e-6, "patch_embed.proj.weight": 48 ** -0.5 / 3 ** 0.5}  # 48 = 3 * 4 * 4
    for name, p in model.named_parameters():
        p, n = p.detach(), p.numel()
        sigma = sigmas.get(name, 0.02)
        if name == "patch_embed.proj.bias":  # PyTorch's default, uniform within 1 / sqrt(48)
            assert 0 < p.abs().max() < 48 ** -0.5
        elif name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif "gamma" in name:
            assert (p == 1e-4).all(), name
        else:
            assert abs(p.std() / sigma - 1) < 4 / (2 * n) ** 0.5, name    # 4 standard errors
            assert abs(p.mean()) < 4 * sigma / n ** 0.5, name
    weight = model.blocks[0].mlp.fc1.weight
    assert weight.abs().max() > 3.5 * 0.02  # trunc_normal_'s bounds are +-2, not +-2 sigma
    assert model.patch_embed.proj.weight.abs().max() <= 48 ** -0.5        # uniform, not normal


# ---- the forward pass ----

TORCHVISION_NAMES = {
    "conv_proj": "patch_embed.proj", "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed", "encoder.layers.encoder_layer_": "blocks.",
    "ln_1": "norm1", "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj", "ln_2": "norm2", "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2", "encoder.ln": "norm", "heads.head": "head",
}


@pytest.mark.parametrize("training", [True, False])
def test_without_distillation_it_is_torchvisions_vit(training):
    """Any difference from another implementation: order of q, k, v, of patches or norms, the
    scale, the normalisation, a gamma other than 1 where there is no LayerScale."""
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=256,
        num_classes=7).train(training)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in TORCHVISION_NAMES.items():
            name = name.replace(old, new)
        state[name] = tensor
    ours = VisionTransformer(32, 8, 7, embed_dim=64, depth=3, num_heads=4, distilled=False)
    ours.train(training).load_state_dict(state, strict=True)

    x = torch.rand(5, 3, 32, 32)
    normalised = torchvision.transforms.functional.normalize(x, (0.485, 0.456, 0.406),
                                                             (0.229, 0.224, 0.225))
    logits, none = ours(x)
    assert none is None and logits.std() > 0.1
    torch.testing.assert_close(logits, theirs(normalised), rtol=0, atol=1e-5)


def linear(layer, x):
    """One vector x (list) through an nn.Linear, number by number."""
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(weight, bias)]


def layer_norm(layer, x):
    mean = sum(x) / len(x)
    var = sum((v - mean) ** 2 for v in x) / len(x)
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [(v - mean) / math.sqrt(var + 1e-6) * w + b for v, w, b in zip(x, weight, bias)]


def gelu(v):
    return v * 0.5 * (1 + math.erf(v / math.sqrt(2)))


def softmax(x):
    return [math.exp(v) / sum(math.exp(u) for u in x) for v in x]


def vit_by_loops(model, image, D=6, H=2, P=4):
    """Equations (1)-(4) of vit.py for one image (3,8,8), token by token, head by head ->
    (cls_logits, dist_logits)."""
    image, d = image.tolist(), D // H
    kernel, bias = model.patch_embed.proj.weight.tolist(), model.patch_embed.proj.bias.tolist()
    places = [(c, r, s) for c in range(3) for r in range(P) for s in range(P)]
    mean = torch.tensor([0.485, 0.456, 0.406]).tolist()                     # ImageNet's, as float32
    std = torch.tensor([0.229, 0.224, 0.225]).tolist()
    z = [model.cls_token[0, 0].tolist(), model.dist_token[0, 0].tolist()]
    for top in (0, P):                                                    # patches row by row
        for left in (0, P):
            patch = [(image[c][top + r][left + s] - mean[c]) / std[c] for c, r, s in places]
            z.append([bias[j] + sum(kernel[j][c][r][s] * pixel
                                    for (c, r, s), pixel in zip(places, patch)) for j in range(D)])
    positions = model.pos_embed[0].tolist()
    z = [[v + p for v, p in zip(token, position)] for token, position in zip(z, positions)]    # (1)

    for block in model.blocks:
        qkv = [linear(block.attn.qkv, layer_norm(block.norm1, token)) for token in z]
        out = [[] for _ in z]
        for h in range(H):
            q, k, v = ([row[start + h * d:start + (h + 1) * d] for row in qkv]
                       for start in (0, D, 2 * D))
            for i in range(len(z)):
                a = softmax([sum(x * y for x, y in zip(q[i], key)) / math.sqrt(d) for key in k])
                out[i] += [sum(a[j] * v[j][c] for j in range(len(z))) for c in range(d)]
        gamma_1, gamma_2 = block.gamma_1.tolist(), block.gamma_2.tolist()
        for i, token in enumerate(z):
            attn = linear(block.attn.proj, out[i])
            token = [t + g * o for t, g, o in zip(token, gamma_1, attn)]                       # (2)
            hidden = [gelu(v) for v in linear(block.mlp.fc1, layer_norm(block.norm2, token))]
            mlp = linear(block.mlp.fc2, hidden)
            z[i] = [t + g * o for t, g, o in zip(token, gamma_2, mlp)]                         # (3)
    cls, dist = layer_norm(model.norm, z[0]), layer_norm(model.norm, z[1])
    return linear(model.head, cls), linear(model.head_dist, dist)                              # (4)


@pytest.mark.parametrize("training", [True, False])
def test_two_token_network_is_its_equations(training):
    """Swapped tokens or heads, a wrong eps, tanh GELU, a LayerScale on the wrong branch, in
    either attention path."""
    model = small_vit(layer_scale=1.0).double().train(training)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    cls, dist = model(images)
    for b in range(2):
        expected_cls, expected_dist = vit_by_loops(model, images[b])
        torch.testing.assert_close(cls[b].tolist(), expected_cls, rtol=0, atol=1e-12)
        torch.testing.assert_close(dist[b].tolist(), expected_dist, rtol=0, atol=1e-12)


def test_written_out_and_fused_attention_agree_with_their_gradients(monkeypatch):
    """The two paths of Attention.forward drifting apart, or the CPU no longer training through
    the faster one."""
    torch.manual_seed(0)
    attention, calls = vit.Attention(embed_dim=24, num_heads=3).double(), []
    fused = F.scaled_dot_product_attention

    def counting(*args):
        calls.append(1)
        return fused(*args)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    x, direction = torch.randn(2, 2, 7, 24, dtype=torch.float64).unbind()
    results = []
    for training in (True, False):
        attention.train(training).zero_grad()
        y = attention(x)
        (y * direction).sum().backward()
        results.append([y.detach()] + [p.grad.clone() for p in attention.parameters()])
        assert len(calls) == (0 if training else 1)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


def test_attention_maps_are_the_ones_the_blocks_used():
    """Maps taken at the wrong place (before the norm, after the block) or that do not belong to
    this forward pass."""
    model = small_vit(layer_scale=1.0).double().eval()
    seen = []  # [(input, output)] of every block
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    tokens, maps = model.forward_features(images, return_attention=True)
    assert len(maps) == 2
    for block, (x, y), A in zip(model.blocks, seen, maps):
        torch.testing.assert_close(A.sum(-1), torch.ones_like(A[..., 0]))
        assert (A > 0).all() and A.std() > 0.01
        values = block.attn.qkv(block.norm1(x))[..., 12:]               # after q and k
        values = values.unflatten(2, (2, 3))                            # (B,T,H,d)
        mixed = torch.einsum("bhij,bjhd->bihd", A, values).flatten(2)
        x = x + block.gamma_1 * block.attn.proj(mixed)
        torch.testing.assert_close(x + block.gamma_2 * block.mlp(block.norm2(x)), y)
    plain, nothing = model.forward_features(images)
    assert nothing == [] and torch.equal(plain, tokens)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("distilled", [True, False])
def test_a_last_block_without_patches_changes_no_logit_and_no_gradient(training, distilled):
    """Keys or values taken of the kept tokens only, patches left out of an earlier block, or a
    residual cut elsewhere."""
    model = small_vit(layer_scale=1.0, distilled=distilled).double().train(training)
    images, results, computed = torch.rand(2, 3, 8, 8, dtype=torch.float64), [], []
    model.blocks[-1].mlp.register_forward_hook(
        lambda module, inputs, output: computed.append(output.shape[1]))

    def all_tokens(images):
        tokens, _ = model.forward_features(images)
        heads = [model.head, model.head_dist] if distilled else [model.head]
        return [head(tokens[:, i]) for i, head in enumerate(heads)]
    for forward in (all_tokens, model):
        model.zero_grad()
        logits = [x for x in forward(images) if x is not None]
        sum((x * torch.arange(x.shape[1])).sum() for x in logits).backward()
        results.append([x.detach() for x in logits] + [p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)
    assert computed == [model.num_tokens + 4, model.num_tokens]


def test_checkpointing_gives_the_same_numbers_with_less_kept():
    """Other random branches dropped in the second computation of a block; nothing saved, or
    checkpoints in evaluation."""
    results, in_evaluation = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, kept = small_vit(drop_path=0.5, checkpointing=checkpointing).train(), []

        def keep(tensor):
            kept.append(tensor.numel())
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = torch.cat(model(torch.rand(8, 3, 8, 8)))
        logits.logsumexp(1).sum().backward()
        results.append((logits.detach(), [p.grad for p in model.parameters()], sum(kept)))
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.eval()(torch.rand(8, 3, 8, 8))
        in_evaluation.append(sum(kept))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))
    assert results[1][2] < results[0][2] / 2 and in_evaluation[0] == in_evaluation[1]


def test_logits_are_not_rounded_to_bfloat16():
    """Logits of 8 bits tie now and then, and the arg max of a tie is the class that has more
    images."""
    net = vit.MODELS["micro"](img_size=16, patch_size=8, num_classes=7).eval()
    tokens = torch.randn(3, 2, 96).to(torch.bfloat16)
    net.forward_features = lambda x, keep: (tokens, [])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = net(torch.rand(3, 3, 16, 16))
    with torch.no_grad():
        for row, i, head in zip(logits, (0, 1), (net.head, net.head_dist)):
            assert row.dtype == torch.float32 and torch.equal(row, head(tokens[:, i].float()))


def test_each_loss_term_reaches_its_own_head_only():
    """Logits that mix the heads: then the teacher's labels would train the class expert too."""
    for used, unused, term in [("head", "head_dist", 0), ("head_dist", "head", 1)]:
        model = small_vit()
        model(torch.rand(2, 3, 8, 8))[term].square().sum().backward()
        assert all(p.grad is None for p in getattr(model, unused).parameters())
        for name in ("cls_token", "dist_token", "patch_embed.proj.weight",
                     "blocks.0.attn.qkv.weight", used + ".weight"):    # trunk and tokens are shared
            assert model.get_parameter(name).grad.abs().max() > 1e-4, name


def test_sizes_that_do_not_fit_are_refused():
    """Images silently read at the wrong grid, or a constructor that rounds."""
    for size in ((16, 16), (8, 16), (16, 8), (4, 4)):
        with pytest.raises(ValueError, match="8 px"):
            small_vit()(torch.rand(1, 3, *size))
    with pytest.raises(ValueError, match="multiple"):
        small_vit(img_size=10)
    with pytest.raises(ValueError, match="multiple"):
        small_vit(num_heads=4)


# ---- convolutional stem ----

def stem_by_loops(stem, image):
    """[(3x3 of stride 2 or 1, BatchNorm's running statistics, ReLU) ..., 1x1] of one image,
    number by number -> (D,G,G)."""
    *convolutions, last = [m for m in stem.layers if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in stem.layers if isinstance(m, torch.nn.BatchNorm2d)]
    x = image.tolist()
    for n, (conv, norm) in enumerate(zip(convolutions, norms, strict=True)):
        w, side, stride = conv.weight.tolist(), len(x[0]), 1 if n % 2 else 2
        places = [(c, r, s) for c in range(len(x)) for r in range(3) for s in range(3)]

        def pixel(c, i, j):
            return x[c][i][j] if 0 <= i < side and 0 <= j < side else 0.0
        out = []
        for k in range(len(w)):
            mean, var = norm.running_mean[k].item(), norm.running_var[k].item()
            gamma, beta = norm.weight[k].item(), norm.bias[k].item()
            out.append([[0.0] * (side // stride) for _ in range(side // stride)])
            for i in range(side // stride):
                for j in range(side // stride):
                    v = sum(w[k][c][r][s] * pixel(c, stride * i + r - 1, stride * j + s - 1)
                            for c, r, s in places)
                    out[k][i][j] = max(0.0, beta + gamma * (v - mean) / math.sqrt(var + 1e-5))
        x = out
    w, bias, G = last.weight[:, :, 0, 0].tolist(), last.bias.tolist(), len(x[0])
    return [[[bias[k] + sum(w[k][c] * x[c][i][j] for c in range(len(x))) for j in range(G)]
             for i in range(G)] for k in range(len(w))]


@pytest.mark.parametrize("P, widths", [(2, [8, 8]), (4, [4, 4, 8, 8]), (8, [2, 2, 4, 4, 8, 8])])
def test_the_convolutional_stem_makes_the_same_grid(P, widths):
    """A grid of another size or order, widths that do not double, BatchNorm left out or after
    the ReLU, a missing border."""
    torch.manual_seed(0)
    stem = vit.ConvStem(P, 8).double()
    assert [m.num_features for m in stem.layers if isinstance(m, torch.nn.BatchNorm2d)] == widths
    for norm in stem.layers:
        if isinstance(norm, torch.nn.BatchNorm2d):
            for t, (low, high) in zip((norm.running_mean, norm.running_var, norm.weight, norm.bias),
                                      ((-0.2, 0.2), (0.5, 2), (0.5, 2), (-0.2, 0.2))):
                t.data.uniform_(low, high)
    image = torch.rand(3, 2 * P, 2 * P, dtype=torch.float64)
    out = stem.eval()(image[None])[0]
    assert out.shape == (8, 2, 2)
    expected = torch.tensor(stem_by_loops(stem, image), dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_a_network_with_a_convolutional_stem_learns_all_of_it():
    """A stem that the patches do not pass through, or that no gradient reaches."""
    model = small_vit(stem=vit.ConvStem).train()
    assert "patch_embed.proj.weight" not in model.state_dict()
    before = model.patch_embed.layers[1].running_mean.clone()
    sum(logits.square().sum() for logits in model(torch.rand(2, 3, 8, 8))).backward()
    assert all(p.grad.abs().max() > 0 for p in model.patch_embed.parameters() if p.ndim > 1)
    assert (model.patch_embed.layers[1].running_mean != before).any()
    for P, D in ((1, 6), (6, 6), (8, 6)):
        with pytest.raises(ValueError, match="stem"):
            vit.ConvStem(P, D)


# ---- stochastic depth ----

def test_drop_path_rests_in_evaluation_and_at_0():
    """Dropping while evaluating, or scaling by 1 / (1 - p) there."""
    x = torch.rand(50, 3, 2)
    assert torch.equal(vit.drop_path(x, 0.5, training=False), x)
    assert torch.equal(vit.drop_path(x, 0.0, training=True), x)


def test_drop_path_is_a_division_by_1_minus_p_or_a_zero():
    """A mask per token or per batch, p taken for 1 - p, a kept branch that is not scaled, or a
    gradient that reaches a dropped branch."""
    x = torch.randn(200, 3, 2, requires_grad=True)
    torch.manual_seed(0)
    keep = torch.rand(200, 1, 1) >= 0.1
    torch.manual_seed(0)
    y = vit.drop_path(x, 0.1, training=True)
    y.sum().backward()
    torch.testing.assert_close(y, torch.where(keep, x / 0.9, 0.0))
    torch.testing.assert_close(x.grad, torch.where(keep, torch.ones_like(x) / 0.9, 0.0))


def test_both_branches_of_a_block_are_dropped_independently():
    """Attention branch 1, MLP branch 10, p = 1/2: x + {0, 2} + {0, 20}. One shared mask or an
    undropped branch loses values."""
    torch.manual_seed(0)
    block = vit.Block(embed_dim=4, num_heads=2, drop_prob=0.5)
    with torch.no_grad():
        for layer, constant in [(block.attn.proj, 1), (block.mlp.fc2, 10)]:
            layer.weight.zero_()
            layer.bias.fill_(constant)
    values, counts = block.train()(torch.zeros(4000, 3, 4))[:, 0, 0].unique(return_counts=True)
    assert values.tolist() == [0, 2, 20, 22]
    assert (counts - 1000).abs().max() < 4 * 27.4                    # 27.4 = sqrt(4000 / 4 * 3 / 4)
    assert block.eval()(torch.zeros(2, 3, 4)).unique().tolist() == [11]


class Results(TorchDispatchMode):
    """Collects the results of all operations inside the block."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        self.shapes.append(result.shape)
        return result


@pytest.mark.parametrize("p, passes", [(0.0, 1), (0.1, 2)])
def test_a_residual_branch_is_passed_over_as_seldom_as_possible(p, passes):
    """`1.0 * branch` without LayerScale, or stochastic depth as a product and a quotient: on a GPU
    a pass over all activations waits for memory, twice a block, forward and backward."""
    x = torch.rand(2, 3, 4)
    block = vit.Block(embed_dim=4, num_heads=2, drop_prob=p)
    with Results() as results:
        block.residual(x, x, block.gamma_1)
    assert results.shapes.count(x.shape) == passes


def test_drop_path_rates_rise_linearly_from_0():
    """DeiT's rule: block i of 12 has 0.1 i / 11. Off by one (i / 12, or starting above 0), or
    one rate for all blocks."""
    model = small_vit(depth=12, drop_path=0.1)
    assert [b.drop_prob for b in model.blocks] == pytest.approx([0.1 * i / 11 for i in range(12)])
    assert [b.drop_prob for b in small_vit(depth=1, drop_path=0.1).blocks] == [0]


# ---- positions at another resolution ----

def test_resizing_positions_to_the_same_grid_changes_nothing():
    """An interpolation that is not the identity, or leading tokens resized with the grid."""
    pos = torch.randn(1, 2 + 25, 8)
    assert torch.equal(resize_pos_embed(pos, 2, 5), pos)


@pytest.mark.parametrize("G, new, tokens", [(4, 7, 2), (7, 4, 1), (14, 16, 2)])
def test_resized_positions_are_the_bicubic_picture_and_the_kept_tokens(G, new, tokens):
    """A mixed-up (G,G,D) layout, another filter (bilinear, antialiased), a half-pixel shift or
    aligned corners, lost or moved leading tokens."""
    torch.manual_seed(0)
    pos = torch.randn(1, tokens + G * G, 3)
    resized = resize_pos_embed(pos, tokens, new)
    assert resized.shape == (1, tokens + new * new, 3)
    assert torch.equal(resized[:, :tokens], pos[:, :tokens])
    for channel in range(3):
        picture = torch.tensor([[pos[0, tokens + r * G + c, channel] for c in range(G)]
                                for r in range(G)])
        expected = F.interpolate(picture[None, None], size=(new, new), mode="bicubic",
                                 align_corners=False)
        torch.testing.assert_close(resized[0, tokens:, channel], expected.flatten())


def test_positions_that_are_no_square_are_refused():
    """Forgetting the number of leading tokens: 2 + 16 positions read as 1 + 17."""
    with pytest.raises(ValueError, match="17"):
        resize_pos_embed(torch.zeros(1, 18, 4), 1, 8)


def test_micro_has_three_heads():
    """Another network on shapes."""
    with torch.device("meta"):
        blocks = vit.MODELS["micro"]().blocks
    assert {block.attn.num_heads for block in blocks} == {3}
