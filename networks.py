r"""Networks from a run's settings, and from files: this project's, the published ones, and your own.

`load_network(path)` looks at the weights in a file, works out what they belong to, and loads them with strict=True:

    keys in the file (PREFIXES are dropped)          recognised as
    config, class_names, model                                a run of this project: its last.pt, or its folder
    encoder_q.*, linear.weight (K,d)                          PaCo teacher: the query encoder and its classifier are kept
    layer3.4.*, linear.weight (64,K) without bias             ResNet-32 with a cosine classifier: LDAM (Saddle-LongTail)
    layer3.4.*, linear.weight (K,64), linear.bias             ResNet-32: cross-entropy, vector scaling
    layer4.*, fc.weight (2048,K) without bias                 ResNet-50 with a cosine classifier: LDAM
    patch_embed.*, blocks.*, head.*[, dist_token, head_dist]  ViT, DeiT, DeiT-III, DeiT-LT, also as timm saves them
    torchvision's keys of any classification network          that network, found by its number of parameters

The weights may lie in the file itself or in it under one of WRAPPERS, their keys behind any of PREFIXES. Files are read with
weights_only=True, which runs no code from them; argparse.Namespace and NumPy's numbers, which published files hold, are allowed
by name. A ResNet-50 with an ordinary classifier (cross-entropy, vector scaling) is taken for torchvision's, which it is: for
iNaturalist's pixel statistics give `norm`.

Outputs are put into the order of the data at hand by `match_classes`: by class names where the file has them ("class_names"),
else by numbers. A published teacher of ImageNet-LT or iNaturalist counts classes as the data set does (PaCo), or by descending
training count (LDAM); DeiT-LT's students count by descending count.
"""
import os
from dataclasses import dataclass

import torch
from torch import nn

import resnet
import vit
from engine import UserError
from run_folder import load_checkpoint, load_weights

NORMALISATIONS = {  # mean and standard deviation of the pixels that a network was trained on
    "cifar": (resnet.CIFAR_MEAN, resnet.CIFAR_STD),
    "imagenet": (resnet.IMAGENET_MEAN, resnet.IMAGENET_STD),
    "inat": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
WRAPPERS = ("model", "state_dict", "model_state_dict", "net")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")


@dataclass
class Network:
    """A network out of a file, on the CPU, in evaluation mode."""
    net: nn.Module
    kind: str                   # "teacher": logits; "student": (CLS logits, DIST logits or None)
    what: str                   # for people
    config: dict                # a run's settings; empty for files from elsewhere
    class_names: list = None    # in the order of the outputs, or None
    data: str = ""              # fingerprint of the data that a run was trained on
    numbering: str = "own"      # without names, outputs are ordered: "own": as the data set numbers classes; "count": by count

    @property
    def num_classes(self):
        return (self.net.classifier if self.kind == "teacher" else self.net.head).out_features


class Mirrored(nn.Module):
    """A network, but its logits are the mean over an image and its mirror image: twice the work."""

    def __init__(self, net):
        super().__init__()
        self.net, self.img_size = net, net.img_size

    def forward(self, images):
        one, other = self.net(images), self.net(images.flip(3))
        if isinstance(one, tuple):                                        # a student's; the second may be None
            return tuple(a if a is None else (a + b) / 2 for a, b in zip(one, other))
        return (one + other) / 2


# ---- From settings -------------------------------------------------------------------------------------------------------

def build_teacher(config, num_classes):
    """The untrained teacher of a run's settings (a dict). Raises UserError for an `arch` that cannot be."""
    mean, std = NORMALISATIONS[config.get("norm", "cifar")]
    try:
        return resnet.make(config["arch"], num_classes, cosine=config["loss"] == "ldam", img_size=config.get("img_size", 32),
                           mean=mean, std=std)
    except (ValueError, AssertionError) as error:          # an assertion: a ViT whose patches do not fit
        raise UserError(f"--arch {config['arch']}: {error}") from None


def build_student(config, num_classes, distilled):
    """The untrained student of a run's settings (a dict), with or without the DIST token."""
    return vit.MODELS[config["model"]](img_size=config["img_size"], patch_size=config["patch_size"], num_classes=num_classes,
                                       drop_path=config["drop_path"], distilled=distilled, stem=config.get("stem", "patch"),
                                       layer_scale=config.get("layer_scale") or None,
                                       checkpointing=config.get("checkpointing", False))


# ---- From files ----------------------------------------------------------------------------------------------------------

def load_network(path, norm=None, size=None):
    """Network of a file or run folder, recognised by its contents (see above).

    norm: name of the normalisation to apply instead of the network's own, one of NORMALISATIONS. size: side in pixels of the
    images a CNN is to get, instead of the size it is known for. Raises UserError for files that are not understood.
    """
    state = load_checkpoint(path, keys=())
    path = os.path.basename(os.path.normpath(path))
    if is_own(state):
        found = own_network(state, path)
    else:
        weights = bare_weights(state)
        try:
            found = (paco_network if any(k.startswith("encoder_q.") for k in weights) else
                     vit_network if "patch_embed.proj.weight" in weights else
                     cifar_network if "linear.weight" in weights and "layer3.4.conv1.weight" in weights else
                     cosine_resnet50 if cosine_fc(weights) else
                     torchvision_network)(weights, path)
        except (KeyError, IndexError, TypeError, ValueError) as error:    # the right keys, but of shapes that no network has
            raise UserError(f"{path} holds no network that is known here ({type(error).__name__}: {error})") from None
        names = state.get("class_names")
        found.class_names = names if isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names) else None
        if "tail_acc_avg" in state or "best_acc_avg" in state:            # DeiT-LT's own files
            found.numbering = "count"
    if norm is not None:
        set_normalisation(found.net, norm)
    found.net.eval().requires_grad_(False)
    if size is not None and size != found.net.img_size:
        set_size(found, size, path)
    used = norm or next((name for name, (mean, _) in NORMALISATIONS.items()
                         if torch.allclose(found.net.mean.flatten(), torch.tensor(mean))), "own")
    found.what += f", {found.num_classes} classes, {found.net.img_size} px, {used} normalisation"
    return found


def is_own(state):
    """Is this a checkpoint of this project? It has weights, class names and the settings that say whose they are."""
    config = state.get("config")
    student, teacher = {"method", "model", "img_size", "patch_size", "drop_path"}, {"arch", "loss"}
    settings = config.keys() if isinstance(config, dict) else set()
    return "model" in state and "class_names" in state and (settings >= student or settings >= teacher)


def bare_weights(state):
    """The tensors of a checkpoint by their names in the network itself, without what training scripts put around them."""
    weights = next((state[k] for k in WRAPPERS if isinstance(state.get(k), dict)), state)
    weights = {str(k): v for k, v in weights.items() if isinstance(v, torch.Tensor)}
    while prefix := next((p for p in PREFIXES if weights and all(k.startswith(p) for k in weights)), None):
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return {k.removeprefix("module."): v for k, v in weights.items()}


def cosine_fc(weights):
    """A ResNet-50's classifier (2048,K) without bias, where torchvision's is (K,2048)?"""
    fc = weights.get("fc.weight", torch.empty(0, 0))
    return "layer4.0.conv1.weight" in weights and "fc.bias" not in weights and len(fc) == 2048 and fc.shape[1] != 2048


def own_network(state, path):
    config, weights, K = state["config"], state["model"], len(state["class_names"])
    if "method" in config:
        kind, net, what = "student", build_student(config, K, "dist_token" in weights), f"{config['method']} {config['model']}"
    else:
        kind, net, what = "teacher", build_teacher(config, K), f"teacher {config['arch']}, {config['loss']}"
    load_weights(net, weights, path)
    return Network(net, kind, f"this project's {what}", config, state["class_names"], state.get("data", ""))


def paco_network(weights, path):
    """PaCo's training wrapper: the query encoder without its projection, and the classifier beside it."""
    encoder = {k.removeprefix("encoder_q."): v for k, v in weights.items() if k.startswith("encoder_q.")}
    encoder = {k: v for k, v in encoder.items() if not k.startswith("fc.")}
    linear = {k: weights.get(f"linear.{k}") for k in ("weight", "bias")}
    if None in linear.values():
        raise UserError(f"{path} has PaCo's encoder but not its classifier, linear.weight and linear.bias")
    last = "fc" if "layer4.0.conv1.weight" in encoder else "linear"
    found = teacher(encoder | {f"{last}.{k}": v for k, v in linear.items()}, path, cosine=False)
    found.what = f"PaCo teacher ({found.what})"
    return found


def cifar_network(weights, path):
    return teacher(weights, path, cosine="linear.bias" not in weights)


def cosine_resnet50(weights, path):
    found = teacher(weights, path, cosine=True)
    found.numbering = "count"
    return found


def teacher(weights, path, cosine):
    """ResNet-32 or ResNet-50 of the published repositories, with the statistics of the data that they were trained on."""
    arch, last = ("resnet50", "fc") if "fc.weight" in weights else ("resnet32", "linear")
    if f"{last}.weight" not in weights:
        raise UserError(f"{path} has no classifier, fc.weight or linear.weight")
    K = weights[f"{last}.weight"].shape[1 if cosine else 0]
    norm = {"resnet32": "cifar", "resnet50": "inat" if K == 8142 else "imagenet"}[arch]
    mean, std = NORMALISATIONS[norm]
    net = resnet.make(arch, K, cosine=cosine, mean=mean, std=std)
    load_weights(net, weights, path)
    return Network(net, "teacher", {"resnet32": "ResNet-32", "resnet50": "ResNet-50"}[arch]
                   + (" with a cosine classifier" if cosine else ""), {})


def vit_network(weights, path):
    """ViT of timm's and DeiT's layout; all sizes follow from the weights, but for the heads: 64 wide as published."""
    weights = {k.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v for k, v in weights.items()}
    D, _, P, _ = weights["patch_embed.proj.weight"].shape
    distilled, depth = "dist_token" in weights, 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
    K, hidden = len(weights["head.weight"]), len(weights["blocks.0.mlp.fc1.weight"])
    tokens, positions = 1 + distilled, weights["pos_embed"].shape[1]
    G = int(positions ** 0.5)                                             # a square grid, and fewer tokens than make it larger
    if positions == G * G:                                                # DeiT-III: only patches have a position
        weights["pos_embed"] = torch.cat([weights["pos_embed"].new_zeros(1, tokens, D), weights["pos_embed"]], dim=1)
    elif positions != G * G + tokens:
        raise UserError(f"{path}: {positions} positions are not a square grid and {tokens} token{'s' * distilled}")
    if D % 64:
        raise UserError(f"{path}: a ViT {D} wide does not have heads of 64, and the file does not say how many it has")
    H = {1280: 16}.get(D, D // 64)                                        # ViT-H has heads 80 wide
    net = vit.VisionTransformer(img_size=G * P, patch_size=P, num_classes=K, embed_dim=D, depth=depth, num_heads=H,
                                mlp_ratio=hidden / D, distilled=distilled,
                                layer_scale=1.0 if "blocks.0.gamma_1" in weights else None)
    load_weights(net, weights, path)
    what = f"{'distilled ' if distilled else ''}ViT {D} x {depth} x {H}, patch {P}"
    return Network(net, "student", what, {})


def torchvision_network(weights, path):
    """A network whose weights torchvision's own model would load; found by its number of parameters but for the last layer."""
    from torchvision import models
    matrices = [k for k, v in weights.items() if v.ndim == 2 and k.endswith(".weight")]
    if not matrices:
        raise UserError(f"{path} holds no network that is known here ({', '.join(list(weights)[:3]) or 'no tensors'})")
    K, d = weights[matrices[-1]].shape
    buffers = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index", "relative_coords_table")
    bias = matrices[-1].removesuffix("weight") + "bias" in weights
    size = sum(v.numel() for k, v in weights.items() if not k.endswith(buffers)) + (1000 - K) * (d + bias)
    for arch in models.list_models(module=models):
        if models.get_model_weights(arch).DEFAULT.meta["num_params"] == size:
            mean, std = NORMALISATIONS["imagenet"]
            try:
                net = resnet.TorchvisionNetwork(arch, K, mean=mean, std=std)
            except ValueError as error:
                raise UserError(f"{path}: {error}") from None
            load_weights(net, net.from_torchvision(weights), path)
            return Network(net, "teacher", f"torchvision's {arch}", {})
    raise UserError(f"{path} holds no network that is known here ({', '.join(list(weights)[:3])}, ...)")


def set_size(found, size, path):
    """Let a CNN see images of another size. Raises UserError if it cannot."""
    if found.kind == "student" or hasattr(getattr(found.net, "body", None), "image_size"):
        raise UserError(f"{path}: {found.what} takes images of {found.net.img_size} px only")
    try:
        found.net(torch.zeros(1, 3, max(size, 0), max(size, 0)))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"{path}: {found.what} cannot take {size} px ({' '.join(str(error).split())[:90]})") from None
    found.net.img_size = size


def set_normalisation(net, name):
    """Let the network normalise its images otherwise, e.g. as the published student loop fed CIFAR teachers: "imagenet"."""
    if name not in NORMALISATIONS:
        raise UserError(f"the normalisation is one of {', '.join(NORMALISATIONS)}, not {name}")
    for buffer, values in zip((net.mean, net.std), NORMALISATIONS[name]):
        buffer.copy_(torch.tensor(values).view(3, 1, 1))


# ---- Classes -------------------------------------------------------------------------------------------------------------

def match_classes(found, data, what):
    """Put the outputs of a Network into the order of data.class_names. Raises UserError if they are not the same classes."""
    names, theirs = list(data.class_names), found.class_names
    if found.num_classes != len(names):
        raise UserError(f"{what} knows {found.num_classes} classes, the data have {len(names)}")
    if theirs is None and sorted(data.class_ids) != list(range(len(names))):
        raise UserError(f"the data's own class numbers are not 0 to {len(names) - 1}")
    if theirs is None:
        order = data.class_ids if found.numbering == "own" else list(range(len(names)))
    elif sorted(theirs) != sorted(names):
        odd = sorted(set(theirs) ^ set(names))
        raise UserError(f"{what} knows other classes than the data ({', '.join(odd[:3])}, ...)")
    else:
        order = [list(theirs).index(name) for name in names]
    if order != list(range(len(names))):
        net = found.net
        layers = [net.classifier] if found.kind == "teacher" else [net.head, net.head_dist] if net.distilled else [net.head]
        for layer in layers:
            reorder_outputs(layer, torch.tensor(order))
    found.class_names = names
    return found


@torch.no_grad()
def reorder_outputs(layer, order):
    """Output k of the last layer becomes what output order[k] was."""
    if isinstance(layer, resnet.CosineClassifier):
        layer.weight.copy_(layer.weight[:, order].clone())                # (d,K)
    else:
        for p in layer.parameters():                                      # weight (K,d) and, where there is one, bias (K,)
            p.copy_(p[order].clone())
