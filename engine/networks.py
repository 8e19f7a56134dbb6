r"""Networks from a run's settings, and from files: this project's, the published ones, your own.

`load_network(path)` looks at the weights in a file, works out what they belong to, and loads them
with strict=True:

    keys in the file (without PREFIXES)               recognised as
    config, class_names, model                        a run of this project: last.pt, or its folder
    encoder_q.*, linear.weight (K,d)                  PaCo teacher: query encoder, its classifier
    layer3.*, linear.weight (64,K) without bias       ResNet-20 to -110, cosine classifier: LDAM
    layer3.*, linear.weight (K,64), linear.bias       the same: cross-entropy, vector scaling
    layer4.*, fc.weight (2048,K) without bias         ResNet-50, cosine classifier: LDAM
    patch_embed.*, blocks.*, head.*[, head_dist.*]    ViT, DeiT, DeiT-III, DeiT-LT, timm's too
    torchvision's keys of a classification network    that network, by its number of parameters

The weights may be the file itself or lie under one of WRAPPERS in it. Reading runs no code from the
file; argparse.Namespace and NumPy's numbers, which published files hold, are allowed by name. A
ResNet-50 with an ordinary classifier is taken for torchvision's, which it is: give `norm` for the
pixel statistics of iNaturalist.

`match_classes` puts outputs into the order of the data at hand: by class names where the file has
them ("class_names") or a text file beside it (x.pth -> x.classes.txt, a name a line), else by
numbers. A published teacher of ImageNet-LT or iNaturalist numbers classes as the data set does
(PaCo) or by descending training count (LDAM), DeiT-LT's students by descending count, in which
classes of equal counts may be in any order (NumPy's argsort): then names are needed. Of a user's
own folders nothing is published: where torchvision's ImageFolder would sort them otherwise than
here (1, 10, 2), names are needed, too.
"""
import hashlib
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from math import log

import torch
from torch import nn

import augment
import data_lt
import resnet
import vit
from engine.checkpoints import (are_names, check_tensors, is_run_checkpoint, load_checkpoint,
                                load_weights)
from engine.runtime import UserError, one_line
from images.files import class_name, shown, some

NORMALISATIONS = {  # mean and standard deviation of the pixels that a network was trained on
    "cifar": (resnet.CIFAR_MEAN, resnet.CIFAR_STD),
    "imagenet": (resnet.IMAGENET_MEAN, resnet.IMAGENET_STD),
    "inat": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),         # many of timm's ViTs
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
STEMS = {"patch": vit.PatchEmbed, "conv": vit.ConvStem, "fast": resnet.FastStem}    # of students
LARGEST = 4096      # side of a network's images, pixels
WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "model_ema", "state_dict_ema")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")


@dataclass
class Network:
    """A network from a file, on the CPU, in evaluation mode."""
    net: nn.Module
    kind: str                   # "teacher": logits; "student": (CLS logits, DIST logits or None)
    what: str                   # which network it is, for people
    config: dict                # a run's settings; empty for files from elsewhere
    class_names: list = None    # in the order of the outputs, or None
    counts: list = None         # training images of each of these; None: unknown, or they differ
    data: str = ""              # fingerprint of the data that a run was trained on
    numbering: str = "own"      # of outputs without names: as the data set's own, or by "count"
    white: int = 65535          # value of white in deep images, see images/decode.py
    weights: str = ""           # 16 hexadecimal digits that change with any weight
    unfinished: str = None      # how far an unfinished run is; "" if finished; None: unknown
    teacher: nn.Module = None   # what a student's answers are combined with, see `joined`
    configs: list = None        # of several, joined: the settings of each, in their order

    @property
    def num_classes(self):
        return last_layers(self)[0].out_features


class Mirrored(nn.Module):
    """A network whose logits are the mean over an image and its mirror image: twice the work."""

    def __init__(self, net):
        super().__init__()
        self.net, self.img_size = net, net.img_size

    def forward(self, x):
        logits, mirrored = self.net(x), self.net(x.flip(3))
        if not isinstance(logits, tuple):                               # a teacher's (B,K)
            return (logits + mirrored) / 2
        return tuple([a if a is None else (a + b) / 2 for a, b in zip(logits, mirrored)])


class Ensemble(nn.Module):
    """Several teachers as one: logits (B,K) are the log of the mean of their probabilities."""

    def __init__(self, nets):
        super().__init__()
        self.nets, self.img_size = nn.ModuleList(nets), nets[0].img_size

    def forward(self, x):
        log_p = [net(x).log_softmax(dim=1, dtype=torch.float32) for net in self.nets]
        return torch.stack(log_p).logsumexp(dim=0) - log(len(log_p))    # (n,B,K) -> (B,K)


# ---- From settings -------------------------------------------------------------------------------

def build_teacher(config, num_classes):
    """The untrained teacher of a run's settings (a dict). ValueError for an impossible `arch`."""
    mean, std = NORMALISATIONS[config.get("norm", "cifar")]
    arch, settings = config["arch"], dict(
        cosine=config["loss"] == "ldam", img_size=config.get("img_size", 32), mean=mean, std=std)
    if arch in resnet.NAMES:
        return resnet.make(arch, num_classes, **settings)
    from engine.torchvision_networks import TorchvisionNetwork     # late: it takes a second
    return TorchvisionNetwork(arch, num_classes, **settings)


def build_student(config, num_classes, distilled):
    """The untrained student of a run's settings (a dict), with or without the DIST token.

    Raises ValueError for sizes that do not fit together.
    """
    return vit.MODELS[config["model"]](
        img_size=config["img_size"], patch_size=config["patch_size"], num_classes=num_classes,
        drop_path=config["drop_path"], distilled=distilled,
        stem=STEMS[config.get("stem", "patch")], layer_scale=config.get("layer_scale") or None,
        checkpointing=config.get("checkpointing", False))


def whiten(net, data, device):
    """Compute the stem of a FastNet from 2,000 training images (at 32 px), evenly spread."""
    n = len(data.train_labels)
    count = min(n, max(1, 2000 * 32 ** 2 // net.img_size ** 2))
    index = torch.linspace(0, n - 1, count).long().to(device)
    images = augment.to_float(data.train_images[index])
    net.whiten(augment.resize(images, net.img_size))


def start_stem(net, teacher, data, rt):
    """Begin a student's FastStem with its teacher's blocks, if that has a FastNet.

    With another teacher, or None, with fresh blocks behind the stem that the training images give.
    """
    parts = teacher.modules() if teacher else []
    source = next((part for part in parts if isinstance(part, resnet.FastNet)), None)
    if source is None:
        rt.print("--stem fast: no teacher with a FastNet, so its blocks begin untrained")
        source = resnet.FastNet(1, img_size=net.img_size).to(rt.device)
        whiten(source, data, rt.device)
        source.blocks = net.patch_embed.blocks
    elif len(source.blocks) < len(net.patch_embed.blocks):
        rt.print(f"--stem fast: the teacher's FastNet has {len(source.blocks)} block(s) of "
                 f"{len(net.patch_embed.blocks)}; the others begin untrained")
    net.patch_embed.start_from(source, net.mean, net.std)


# ---- From files ----------------------------------------------------------------------------------

def load_network(path, norm=None, size=None):
    """Network of a file or run folder, recognised by its contents (see above).

    norm: one of NORMALISATIONS, instead of the network's own. size: side in pixels of the images
    that a CNN is to get, instead of the size it is known for. UserError for files that are not
    understood.
    """
    state = load_checkpoint(path, keys=())
    name = os.path.basename(os.path.normpath(path))
    try:
        if is_run_checkpoint(state):
            network = run_network(state, name)
        else:
            network = foreign_network(state, name)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:                               # known names, odd values or shapes
        text = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{name} holds no network that is known here ({text})") from None
    names = None
    if network.config:
        network.unfinished = unfinished(state, path)
    else:
        names = network.class_names = foreign_names(state, path, network.num_classes)
    network.weights = weights_digest(network.net, names)
    if network.net.img_size > LARGEST:
        raise UserError(f"{name} is damaged: it takes images of {network.net.img_size} px")
    if norm is not None:
        set_normalisation(network.net, norm)
    network.net.eval().requires_grad_(False)
    if size is not None and size != network.net.img_size:
        set_size(network, size, name)
    network.what += (f", {network.num_classes} classes, {network.net.img_size} px, "
                     f"{norm or normalisation_of(network.net)} normalisation")
    if network.unfinished:
        network.what += f", not finished: {network.unfinished}"
    return network


def run_network(state, name):
    """The network of one of this project's checkpoints."""
    config, weights, K = state["config"], state["model"], len(state["class_names"])
    check_tensors(weights, name)
    if "method" in config:
        kind, what = "student", f"{config['method']} {config['model']}"
        net = build_student(config, K, distilled="dist_token" in weights)
    else:
        kind, what = "teacher", f"teacher {config['arch']}, {config['loss']}"
        net = build_teacher(config, K)
    load_weights(net, weights, name)
    return Network(net, kind, f"this project's {what}", config, state["class_names"],
                   state.get("counts"), state.get("data", ""), white=state.get("white", 65535))


def foreign_network(state, name):
    """The network of a file from elsewhere."""
    weights = bare_weights(state)
    check_tensors(weights, name)
    if any(key.startswith("encoder_q.") for key in weights):
        network = paco_network(weights, name)
    elif "patch_embed.proj.weight" in weights:
        network = vit_network(weights, name)
    elif "linear.weight" in weights and "layer3.0.conv1.weight" in weights:
        network = published_resnet(weights, name, cosine="linear.bias" not in weights)
    elif "layer4.0.conv1.weight" in weights and has_cosine_fc(weights):
        network = published_resnet(weights, name, cosine=True)
        network.numbering = "count"
    else:
        from engine.torchvision_networks import network_of         # late: it takes a second
        net, arch = network_of(weights, name)
        network = Network(net, "teacher", f"torchvision's {arch}", {})
    if "tail_acc_avg" in state or "best_acc_avg" in state:              # DeiT-LT's own files
        network.numbering = "count"
    return network


def weights_digest(net, names=None):
    """16 hexadecimal digits that change with any weight, and with names of a file from elsewhere.

    A list beside a file can be corrected while a student is learning: that is another teacher.
    """
    digest = hashlib.sha256("\n".join(names or ()).encode(errors="backslashreplace"))
    for key, tensor in net.state_dict().items():
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def unfinished(state, path):
    """Where a run stands that is not finished, for people; empty for one that is."""
    epoch, epochs = state.get("epoch"), state["config"].get("epochs")
    if epoch is None or epochs is None:                                 # no training wrote this
        return ""
    if epoch < epochs:
        damaged = ", its last.pt is damaged" if "fallback" in state else ""
        return f"epoch {epoch} of {epochs}{damaged}"
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "result.json")):
        return "it has no result.json; its last.pt can be named instead"
    return ""


def foreign_names(state, path, num_classes):
    """Class names of a file from elsewhere, in it or in x.classes.txt beside it, or None.

    UserError for names that are not those of num_classes classes.
    """
    names = state.get("class_names")
    beside = os.path.splitext(path.removesuffix(".tar"))[0] + ".classes.txt"    # of x.pth.tar, too
    if not isinstance(names, (list, tuple)):        # another project's meaning of the word
        names = None
    where = f"class_names in {path}"
    if os.path.isfile(beside):
        listed = read_names(beside)
        if names is not None and list(names) != listed:
            raise UserError(f"{beside} differs from the class names in {path} itself: remove it, "
                            "or correct it")
        names, where = listed, beside
    if names is not None and (not are_names(names) or len(names) != num_classes):
        raise UserError(f"{where}: {num_classes} different names are needed, one for each output "
                        "of the network, in their order")
    return names


def read_names(path):
    """The lines of a text file, without empty ones."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [class_name(line.strip()) for line in file if line.strip()]
    except (OSError, ValueError) as error:                              # ValueError: not UTF-8
        raise UserError(f"{path} cannot be read as a text file of class names: {error}") from None


def bare_weights(state):
    """The tensors of a checkpoint by their names in the network, without WRAPPERS and PREFIXES."""
    def tensors(values):                            # n_averaged: of torch's AveragedModel
        return {str(k): v for k, v in values.items()
                if isinstance(v, torch.Tensor) and k != "n_averaged"}
    wrapped = [state[wrapper] for wrapper in WRAPPERS if isinstance(state.get(wrapper), dict)]
    weights = next(filter(None, map(tensors, wrapped)), tensors(state))
    while weights:
        common = [p for p in PREFIXES if all(k.startswith(p) for k in weights)]
        if not common:
            break
        weights = {k.removeprefix(common[0]): v for k, v in weights.items()}
    return {k.removeprefix("module."): v for k, v in weights.items()}


def has_cosine_fc(weights):
    """A ResNet-50's classifier (2048,K) without bias, where torchvision's is (K,2048)?"""
    fc = weights.get("fc.weight", torch.empty(0, 0))
    return "fc.bias" not in weights and len(fc) == 2048 and fc.shape[1] != 2048


def paco_network(weights, name):
    """PaCo's training wrapper: query encoder without its projection, and the classifier beside."""
    encoder = {k.removeprefix("encoder_q."): v for k, v in weights.items()
               if k.startswith("encoder_q.") and not k.startswith("encoder_q.fc.")}
    if "linear.weight" not in weights or "linear.bias" not in weights:
        raise UserError(f"{name} has PaCo's encoder but not its classifier, linear.weight and "
                        "linear.bias")
    last = "fc" if "layer4.0.conv1.weight" in encoder else "linear"
    encoder |= {f"{last}.{k}": weights[f"linear.{k}"] for k in ("weight", "bias")}
    network = published_resnet(encoder, name, cosine=False)
    network.what = f"PaCo teacher ({network.what})"
    return network


def published_resnet(weights, name, cosine):
    """ResNet-50, or CIFAR's ResNet-20 to -110, of the published repositories.

    With the pixel statistics of its data.
    """
    if "fc.weight" in weights:
        arch, last = "resnet50", weights["fc.weight"]
    elif "linear.weight" in weights:
        blocks = sum(k.startswith("layer1.") and k.endswith(".conv1.weight") for k in weights)
        arch, last = f"resnet{6 * blocks + 2}", weights["linear.weight"]
        if arch not in resnet.CIFAR_BLOCKS:
            raise UserError(f"{name} is a CIFAR ResNet of {blocks} blocks a stage; known are "
                            + ", ".join(resnet.CIFAR_BLOCKS))
    else:
        raise UserError(f"{name} has no classifier, fc.weight or linear.weight")
    K = last.shape[1] if cosine else last.shape[0]
    if arch != "resnet50":
        norm = "cifar"
    else:
        norm = "inat" if K == 8142 else "imagenet"
    mean, std = NORMALISATIONS[norm]
    net = resnet.make(arch, K, cosine=cosine, mean=mean, std=std)
    load_weights(net, weights, name)
    what = arch.replace("resnet", "ResNet-")
    return Network(net, "teacher", f"{what} with a cosine classifier" if cosine else what, {})


def vit_network(weights, name):
    """ViT of timm's and DeiT's layout. All sizes follow from the weights, with heads of 64."""
    weights = {k.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v
               for k, v in weights.items()}
    D, _, P, _ = weights["patch_embed.proj.weight"].shape
    K, hidden = len(weights["head.weight"]), len(weights["blocks.0.mlp.fc1.weight"])
    depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    distilled = "dist_token" in weights
    tokens, positions = 2 if distilled else 1, weights["pos_embed"].shape[1]
    if depth > 200:
        raise UserError(f"{name} is damaged: it has {depth} blocks")
    G = int(positions ** 0.5)           # G x G patches: a few tokens do not make it a larger square
    if positions == G * G:              # DeiT-III: only patches have a position
        zeros = weights["pos_embed"].new_zeros(1, tokens, D)
        weights["pos_embed"] = torch.cat([zeros, weights["pos_embed"]], dim=1)
    elif positions != G * G + tokens:
        raise UserError(f"{name}: {positions} positions are neither a square grid nor one and "
                        f"{tokens} more")
    if D % 64:
        raise UserError(f"{name}: a ViT {D} wide does not have heads of 64, and the file does not "
                        "say how many it has")
    H = 16 if D in (1280, 1408, 1664) else D // 64      # ViT-H, timm's giant and gigantic
    net = vit.VisionTransformer(
        img_size=G * P, patch_size=P, num_classes=K, embed_dim=D, depth=depth, num_heads=H,
        mlp_ratio=hidden / D, distilled=distilled,
        layer_scale=1.0 if "blocks.0.gamma_1" in weights else None)
    load_weights(net, weights, name)
    what = f"ViT {D} x {depth} x {H}, patch {P}"
    return Network(net, "student", f"distilled {what}" if distilled else what, {})


def set_size(network, size, name):
    """Let a CNN see images of another size. UserError if it cannot."""
    net = network.net
    if network.kind == "student" or hasattr(getattr(net, "body", None), "image_size"):
        raise UserError(f"{name}: {network.what} takes images of {net.img_size} px only")
    try:
        if not 0 < size <= LARGEST:
            raise ValueError(f"from 1 to {LARGEST} px are possible")
        net(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        text = one_line(error, 90)
        raise UserError(f"{name}: {network.what} cannot take {size} px ({text})") from None
    net.img_size = size


def set_normalisation(net, norm):
    """Normalise images otherwise: the published student loop fed CIFAR teachers "imagenet"."""
    if norm not in NORMALISATIONS:
        raise UserError(f"the normalisation is one of {', '.join(NORMALISATIONS)}, not {norm}")
    mean, std = NORMALISATIONS[norm]
    net.mean.copy_(torch.tensor(mean).view(3, 1, 1))
    net.std.copy_(torch.tensor(std).view(3, 1, 1))


def normalisation_of(net):
    """Name of a network's normalisation, or "own"."""
    for norm, (mean, _) in NORMALISATIONS.items():
        if torch.allclose(net.mean.flatten(), torch.tensor(mean)):
            return norm
    return "own"


# ---- Teachers of a student -----------------------------------------------------------------------

def teacher_files(path):
    """The files of a teacher: one, or several joined by commas. UserError for an empty name."""
    files = [path] if os.path.exists(path) else [file.strip() for file in path.split(",")]
    if not all(files):
        raise UserError(f"'{path}': a name is empty between the commas")
    return files


def short_name(path):
    """The name of a run or teacher in other runs' names and in pictures."""
    return "+".join(shown(os.path.basename(os.path.abspath(file))) for file in teacher_files(path))


def load_teacher(path, data, rt, norm=None, size=None):
    """A teacher from a run folder or file, ready to label the data's classes: (network, text).

    On the device, in evaluation mode, without gradients, its outputs in the order of the data's
    classes. Several files joined by commas are an Ensemble. network.origin: a dict about each file,
    see `origin`. norm, size: see load_network. Raises UserError if a file is no teacher, knows
    other classes, or takes another image size than the other files.
    """
    files = teacher_files(path)
    teachers = [load_network(file, norm, size) for file in files]
    for file, teacher in zip(files, teachers):
        if teacher.kind != "teacher":
            raise UserError(f"{file} is not a teacher: it is {teacher.what}")
        match_classes(teacher, data, f"the teacher {file}")
    net, text = mean_of(teachers, path)
    side = data.test_images.shape[-1]
    if net.img_size > side:
        text += f", its images enlarged from {side} px"
        if data.name in ("folder", *data_lt.LISTS):
            text += " (a larger --img-size shows it more)"
    net.origin = [origin(*pair) for pair in zip(files, teachers)]
    return net.to(rt.device, memory_format=torch.channels_last), text


def mean_of(teachers, path):
    """One network of several Networks, and which it is, for people. UserError for two sizes."""
    if len(teachers) == 1:
        return teachers[0].net, teachers[0].what
    sizes = sorted({teacher.net.img_size for teacher in teachers})
    if len(sizes) > 1:
        raise UserError(f"{path}: networks of one image size are needed, not of {sizes} px; in a "
                        "training --teacher-size gives them one")
    kinds = dict.fromkeys(teacher.what for teacher in teachers)         # each once, in order
    return (Ensemble([teacher.net for teacher in teachers]).eval(),
            f"the mean of {len(teachers)}, " + ", and ".join(kinds))


def joined(networks, path):
    """Several Networks, whose outputs are in one order, as one.

    Teachers become an Ensemble; with a student among them, the student's `teacher`, and answers are
    those of both (engine.evaluation.combined). UserError for two students.
    """
    if len(networks) == 1:
        return networks[0]
    students = [network for network in networks if network.kind == "student"]
    teachers = [network for network in networks if network.kind == "teacher"]
    if len(students) > 1:
        raise UserError(f"{path}: two students; name one, its teacher, or both together")
    net, what = mean_of(teachers, path)
    weights = "+".join(network.weights for network in networks)
    known = "+".join(sorted({network.data for network in networks} - {""}))
    about = dict(weights=weights, configs=[network.config for network in networks], data=known)
    if any(network.counts != networks[0].counts for network in networks):
        about["counts"] = None
    if not students:
        return replace(networks[0], net=net, what=what, **about)
    student, = students
    return replace(student, teacher=net, what=f"{student.what}; with {what}", **about)


def match_each_other(networks, files):
    """Put all Networks' outputs into the order of the first one's. UserError if that is unknown."""
    for file, network in zip(files, networks):
        if len(networks) > 1 and network.class_names is None:
            raise UserError(f"{file} has no class names to compare with the others': put them "
                            "beside it, one a line in the order of its outputs (x.pth: in "
                            "x.classes.txt)")
        if network is not networks[0]:
            match_classes(network, networks[0], file)


def origin(file, network):
    """What a run remembers of a network that it builds on, plain values."""
    return {"file": file, "weights": network.weights, "data": network.data,
            "unfinished": network.unfinished}


def retrained(config):
    """Files of the teachers in a run's config.json that have other weights now than they had."""
    changed, teachers = [], config.get("teachers")
    for known in teachers if isinstance(teachers, list) else []:
        with suppress(UserError, TypeError, KeyError):          # it is gone, or damaged
            if load_network(known["file"]).weights != known["weights"]:
                changed.append(known["file"])
    return changed


def check_origin(what, known, data, rt):
    """UserError if a network that a run is to build on (`known`: its origin) is not finished.

    If it was trained on other images than this run's, that is said, in a line on stderr.
    """
    if known["unfinished"]:
        raise UserError(f"{what} is not finished ({known['unfinished']}): finish it with --resume, "
                        "or name another")
    if known["data"] not in ("", data.fingerprint) and rt.main:
        print(f"warning: {what} was trained on other images than these (another folder, imbalance "
              "or holdout, or they have changed): the test images may have been its training "
              "images", file=sys.stderr, flush=True)


def start_from(net, path, data, rt):
    """Give a student the weights of a finished run's, its patches' positions resized to its grid.

    UserError if `path` is no finished student's run, of these classes, or does not fit.
    """
    what, start = f"--finetune {path}", load_network(path)
    if start.kind != "student" or not start.config:
        raise UserError(f"{what} is not a student's run: it is {start.what}")
    match_classes(start, data, what)            # of the same classes in another order too
    check_origin(what, origin(path, start), data, rt)
    weights, grid = start.net.state_dict(), net.img_size // net.patch_size
    try:
        weights["pos_embed"] = vit.resize_pos_embed(weights["pos_embed"], net.num_tokens, grid)
    except ValueError as error:
        raise UserError(f"{what} does not fit: {error}") from None
    load_weights(net, weights, what)


def match_classes(network, data, what):
    """Put a Network's outputs into the order of data.class_names, and return it.

    data: a data set, or another Network with names. what: the network's name in messages. Raises
    UserError if the classes are not the same, or if it is not known which output is which class.
    """
    names, known = list(data.class_names), network.class_names
    if network.num_classes != len(names):
        raise UserError(f"{what} knows {network.num_classes} classes, the data have {len(names)}")
    by_count = list(range(len(names)))
    if known is None:
        check_order_is_known(data, network, what)
        order = data.class_ids if network.numbering == "own" else by_count
    elif sorted(known) == sorted(names):
        place = {name: k for k, name in enumerate(known)}
        order = [place[name] for name in names]
    else:
        different = sorted(set(known) ^ set(names))
        raise UserError(f"{what} knows other classes than the data ({some(different)})")
    if order != by_count:
        for layer in last_layers(network):
            reorder_outputs(layer, torch.tensor(order))
        if network.counts:
            network.counts = [network.counts[k] for k in order]
    network.class_names = names
    return network


def check_order_is_known(data, network, what):
    """UserError if outputs without names may be in one order of the data's classes or another."""
    numbers = range(data.num_classes)
    own = sorted(numbers, key=lambda k: data.class_ids[k])              # as the data set has them
    own = [data.class_names[k] for k in own]
    differ = [k for k in numbers if own[k] != sorted(own)[k]]
    if sorted(data.class_ids) != list(numbers):
        reason = f"the data's own class numbers are not 0 to {data.num_classes - 1}"
    elif data.name == "folder" and differ:
        k = differ[0]
        reason = (f"output {k} may be class {own[k]} or, as torchvision's ImageFolder sorts, class "
                  f"{sorted(own)[k]}")
    elif data.name in data_lt.LISTS and network.what.startswith("torchvision's resnet50,"):
        reason = ("output 0 may be class 0 of the lists or, as Saddle-LongTail numbers them, the "
                  "most frequent one")
    elif (data.name in ("folder", *data_lt.LISTS) and network.numbering == "count"
          and len(set(data.counts)) < data.num_classes):
        reason = ("its outputs are sorted by the training images of their classes, of which some "
                  "have equally many: their order is not known")
    else:
        return
    raise UserError(f"{what} has no class names, and {reason}: put their names beside it, one a "
                    "line in the order of its outputs (x.pth: in x.classes.txt), or save "
                    "{'state_dict': ..., 'class_names': [...]}")


def last_layers(network):
    """A Network's classifiers: of a student one per head."""
    net = network.net
    if network.kind == "teacher":
        return [net.classifier]
    return [net.head, net.head_dist] if net.distilled else [net.head]


@torch.no_grad()
def reorder_outputs(layer, order):
    """Output k of a classifier becomes what output order[k] was."""
    if isinstance(layer, resnet.CosineClassifier):
        layer.weight.copy_(layer.weight[:, order].clone())              # (d,K)
    else:
        for p in layer.parameters():                                    # weight (K,d), bias (K,)
            p.copy_(p[order].clone())
