"""torchvision's classification networks as teachers, and which of them a file holds."""
import re
from collections import OrderedDict
from math import isqrt

from torch import nn
from torchvision import models

import resnet
from engine.checkpoints import load_weights
from engine.runtime import UserError, one_line


class TorchvisionNetwork(resnet.Teacher):
    """Any classification network of torchvision, untrained, with its last linear layer set apart.

    Keys: torchvision's behind "body.", the last layer's behind "classifier."; `from_torchvision`
    renames a plain state dict. Raises ValueError for a name that torchvision does not have, and for
    networks that do not end in a linear layer (SqueezeNet) or train with auxiliary classifiers
    (GoogLeNet, Inception).
    """

    def __init__(self, arch, num_classes, cosine=False, img_size=224, mean=resnet.IMAGENET_MEAN,
                 std=resnet.IMAGENET_STD):
        super().__init__(img_size, mean, std)
        if arch not in models.list_models(module=models):
            raise ValueError(f"there is no network {arch!r}: choose resnet32, resnet50 or another "
                             "of torchvision's, such as resnet18 or regnet_y_16gf")
        options = {"image_size": img_size} if arch.startswith("vit_") else {}
        self.body = models.get_model(arch, weights=None, num_classes=num_classes, **options)
        for name, module in self.body.named_modules():
            if not list(module.children()) and list(module.parameters()):
                self.last_name, last = name, module     # in the end, the last layer with parameters
        if not isinstance(last, nn.Linear) or hasattr(self.body, "aux_logits"):
            raise ValueError(f"{arch} cannot be a teacher here: it does not end in one linear "
                             "layer")
        self.classifier = resnet.CosineClassifier(last.in_features, num_classes) if cosine else last
        self.body.set_submodule(self.last_name, nn.Identity())

    def forward_features(self, x):
        return self.body(x)                                             # (B,3,S,S) -> (B,d)

    def from_torchvision(self, weights):
        """torchvision's keys -> the keys of this network."""
        renamed, last = OrderedDict(), self.last_name + "."
        for key, tensor in weights.items():
            # DenseNet's published files: denselayer1.norm.1.weight for denselayer1.norm1.weight.
            key = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)\.", r"\1\2.", key)
            if key.startswith(last):
                renamed["classifier." + key.removeprefix(last)] = tensor
            else:
                renamed["body." + key] = tensor
        renamed._metadata = {"body": {"version": self.body._version}}   # MNASNet reads it
        return renamed


def network_of(weights, name):
    """(network, its name) of torchvision that these weights are of, by its number of parameters.

    weights: {key: tensor}. UserError, about the file `name`, for weights of no such network.
    """
    known = one_line(", ".join(list(weights)[:3]) or "no tensors", 100)
    unknown = UserError(f"{name} holds no network that is known here ({known})")
    matrices = [k for k, v in weights.items() if v.ndim == 2 and k.endswith(".weight")]
    if not matrices:
        raise unknown
    K, d = weights[matrices[-1]].shape          # of the last layer; torchvision's has K = 1000
    has_bias = matrices[-1].removesuffix("weight") + "bias" in weights
    buffers = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index",
               "relative_coords_table")
    parameters = sum(v.numel() for k, v in weights.items() if not k.endswith(buffers))
    parameters += (1000 - K) * (d + 1 if has_bias else d)
    size, patch, positions = 224, None, weights.get("encoder.pos_embedding")    # of a ViT, (1,T,D)
    if positions is not None and "conv_proj.weight" in weights:
        patches, patch = positions.shape[1] - 1, weights["conv_proj.weight"].shape[-1]
        size = patch * isqrt(patches)
    for arch in models.list_models(module=models):
        default = models.get_model_weights(arch).DEFAULT
        count = default.meta["num_params"]
        if arch.startswith("vit_") and patch:           # its positions are those of these images
            count += (patches - (default.meta["min_size"][0] // patch) ** 2) * positions.shape[2]
        if count == parameters:
            used = default.transforms()         # mean 0.5, for a few
            try:
                net = TorchvisionNetwork(arch, K, img_size=size, mean=used.mean, std=used.std)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
            load_weights(net, net.from_torchvision(weights), name)
            return net, arch
    raise unknown
