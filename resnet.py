r"""The CNN teachers: ResNet-32 for 32 px images, ResNet-50 for 224 px, FastNet for short times.

He et al., CVPR 2016, arXiv 1512.03385.    y = ReLU(F(x) + shortcut(x))                       (1)

ResNet-32 is He et al.'s CIFAR network, 6n + 2 layers with n = 5, not an ImageNet ResNet cut down: a
3x3 stem without pooling and three stages of 16x32x32, 32x16x16, 64x8x8 (channels x height x width).
Its shortcuts have no parameters: where the size halves, they take every second pixel and pad the
new channels with zeros ("option A"). 464,154 parameters at K = 10. ResNet-50 is torchvision's v1.5:
bottlenecks with the stride in the 3x3 convolution, 1x1 convolutions as shortcuts. FastNet is not
residual: few wide convolutions, a good teacher after minutes on a CPU; FastStem makes its blocks
the stem of a student.

`make(arch, K)` builds a network by its name: these, or the CIFAR networks of other depths
(CIFAR_BLOCKS). torchvision's other networks are wrapped in engine/torchvision_networks.py.

State-dict keys: ResNet-32 as LDAM-DRW and Saddle-LongTail, ResNet-50 as torchvision. B images,
K classes. Like every network here they take images in [0, 1] and normalise them themselves;
`img_size` is the size they were made for.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# He et al.'s CIFAR networks: blocks of a stage, n.
CIFAR_BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}
NAMES = (*CIFAR_BLOCKS, "resnet50", "fast")         # that `make` knows


class CosineClassifier(nn.Module):
    """Logits scale * cos(feature, class vector): no class wins by the length of its vector.

    `weight` is (features, K), its columns are the class vectors, as in LDAM-DRW (arXiv 1906.07413).
    The published module returns the bare cosine. Here the scale is included, so that softmax and
    entropy of a teacher mean what they say.
    """

    def __init__(self, in_features, num_classes, scale=30.0):
        super().__init__()
        self.in_features, self.out_features, self.scale = in_features, num_classes, scale
        # Unit columns, as published: their length changes no logit, but long ones turn slowly.
        weight = torch.empty(in_features, num_classes).uniform_(-1, 1)
        self.weight = nn.Parameter(F.normalize(weight, dim=0))

    def forward(self, x):
        cosine = F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0)    # (B,d) @ (d,K) -> (B,K)
        return self.scale * cosine


class Teacher(nn.Module):
    """What the networks share: normalisation, then features, then the classifier."""

    def __init__(self, img_size, mean, std):
        super().__init__()
        self.img_size = img_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, x, return_features=False):
        """Images (B,3,S,S) in [0, 1] -> logits (B,K); with return_features also features (B,d)."""
        features = self.forward_features((x - self.mean) / self.std)
        # In float32: where bfloat16 logits tie, argmax takes the lower, more frequent class.
        with torch.autocast(x.device.type, enabled=False):
            logits = self.classifier(features.to(self.classifier.weight.dtype))
        return (logits, features) if return_features else logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with the parameter-free shortcut of option A, equation (1)."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.pad = stride, (channels - in_channels) // 2   # zero channels on each side

    def shortcut(self, x):
        if self.stride == 1:
            return x
        x = x[:, :, ::2, ::2]                                           # (B,C,H/2,W/2)
        return F.pad(x, (0, 0, 0, 0, self.pad, self.pad))               # (B,2C,H/2,W/2)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))                           # (1)


class CifarResNet(Teacher):
    """6n + 2 layers for 32 px images."""

    def __init__(self, n, num_classes, cosine=False, img_size=32, mean=CIFAR_MEAN, std=CIFAR_STD):
        super().__init__(img_size, mean, std)
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self.stage(n, 16, 16, stride=1)                   # (B,16,32,32)
        self.layer2 = self.stage(n, 16, 32, stride=2)                   # (B,32,16,16)
        self.layer3 = self.stage(n, 32, 64, stride=2)                   # (B,64,8,8)
        self.linear = CosineClassifier(64, num_classes) if cosine else nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def stage(n, in_channels, channels, stride):
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(n - 1)))

    @property
    def classifier(self):
        return self.linear

    def forward_features(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x.mean(dim=(2, 3))                                       # (B,64,8,8) -> (B,64)


class Bottleneck(nn.Module):
    """1x1 reduces, 3x3, 1x1 expands fourfold, equation (1).

    The shortcut is a 1x1 convolution where the shape changes.
    """

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.downsample = None
        if stride != 1 or in_channels != 4 * channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, 4 * channels, 1, stride, bias=False),
                nn.BatchNorm2d(4 * channels))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(out + shortcut)                                   # (1)


class ResNet50(Teacher):
    """Stages of 3, 4, 6, 3 bottlenecks behind a 7x7 stem with max pooling."""

    def __init__(self, num_classes, cosine=False, img_size=224, mean=IMAGENET_MEAN,
                 std=IMAGENET_STD):
        super().__init__(img_size, mean, std)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = self.stage(3, 64, 64, stride=1)                   # (B,256,56,56) at 224 px
        self.layer2 = self.stage(4, 256, 128, stride=2)                 # (B,512,28,28)
        self.layer3 = self.stage(6, 512, 256, stride=2)                 # (B,1024,14,14)
        self.layer4 = self.stage(3, 1024, 512, stride=2)                # (B,2048,7,7)
        self.fc = CosineClassifier(2048, num_classes) if cosine else nn.Linear(2048, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def stage(n, in_channels, channels, stride):
        first = Bottleneck(in_channels, channels, stride)
        return nn.Sequential(first, *(Bottleneck(4 * channels, channels, 1) for _ in range(n - 1)))

    @property
    def classifier(self):
        return self.fc

    def forward_features(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))                                       # (B,2048,7,7) -> (B,2048)


class FastBlock(nn.Module):
    """Two 3x3 convolutions, max pooling after the first: (B,i,S,S) -> (B,o,S/2,S/2).

    Each convolution begins with as many Dirac filters as it has input channels: they pass the input
    on (1706.00388).
    """

    def __init__(self, in_channels, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight[:conv.in_channels])

    def forward(self, x):
        x = F.gelu(self.bn1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.bn2(self.conv2(x)))


class FastNet(Teacher):
    """Wide blocks without shortcuts behind a stem that is computed from the data, not trained.

    After Jordan, "94% on CIFAR-10 in 3.29 seconds", arXiv 2404.00498. Blocks halve the image down
    to 2 to 5 pixels: 3 blocks at 32 px, 5 at 128. A training step of a 32 px image takes 0.39
    GFLOP (ResNet-32: 0.41), but in few large convolutions, which a CPU computes at nearly its full
    rate. Features are halved, so that a linear classifier learns more slowly than they do. What
    each part adds: experiments/fast_parts.py, results/README.md.
    """

    def __init__(self, num_classes, cosine=False, img_size=32, mean=CIFAR_MEAN, std=CIFAR_STD):
        super().__init__(img_size, mean, std)
        blocks = max(1, round(math.log2(img_size / 4)))
        widths = [24, 64, 128, *[256] * blocks][:blocks + 1]            # 24, 64, 128, 256 at 32 px
        self.stem = nn.Conv2d(3, 24, 2).requires_grad_(False)           # (B,24,31,31) at 32 px
        self.blocks = nn.Sequential(*(FastBlock(i, o) for i, o in zip(widths, widths[1:])))
        d = widths[-1]
        self.fc = CosineClassifier(d, num_classes) if cosine else nn.Linear(d, num_classes)

    @property
    def classifier(self):
        return self.fc

    @torch.no_grad()
    def whiten(self, images):
        """Compute the stem from images (n,3,S,S) in [0,1].

        Its channels are the 12 principal components of the 2x2 patches, scaled to a mean square of
        1 (below it where there is hardly any contrast), and their negatives.
        """
        patches = F.unfold((images - self.mean) / self.std, 2)          # (n,12,(S-1)^2)
        patches = patches.transpose(1, 2).flatten(0, 1)                 # (n (S-1)^2, 12)
        variance, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        white = (vectors / (variance + 5e-4).sqrt()).T.view(12, 3, 2, 2)
        self.stem.weight.copy_(torch.cat([white, -white]))
        self.stem.bias.zero_()

    def forward_features(self, x):
        x = self.blocks(F.gelu(self.stem(x)))
        return 0.5 * x.amax(dim=(2, 3))                                 # (B,256,3,3) -> (B,256)


class FastStem(nn.Module):
    """FastNet's stem and first blocks as the stem of a ViT: an image to a grid of tokens.

    patch_size: 2 for the output of the first block, 4, 8, 16 or 32; ValueError for another.
    embed_dim: D, numbers of a token. `start_from` copies the blocks of a trained FastNet (at 32 px
    with patch_size 8: all of them), so that a student begins with its teacher's features.
    """

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        if patch_size not in (2, 4, 8, 16, 32):
            raise ValueError(f"no stem of FastNet for patches of {patch_size} px")
        net = FastNet(1, img_size=4 * patch_size)                   # with log2(patch_size) blocks
        self.stem, self.blocks = net.stem, net.blocks
        self.proj = nn.Conv2d(net.fc.in_features, embed_dim, 1)

    def start_from(self, net, mean, std):
        """Copy a FastNet's stem and blocks. mean, std (3,1,1): of the ViT, which normalises."""
        # Images come as (x - m) / s; the FastNet had (x - m_t) / s_t, of which its stem makes
        # w (x - m_t) / s_t + b  =  (w s / s_t) (x - m) / s  +  b + sum w (m - m_t) / s_t.
        weight, first = net.stem.weight, self.stem
        first.weight.data = weight * std / net.std                  # (24,3,2,2)
        first.bias.data = net.stem.bias + (weight * (mean - net.mean) / net.std).sum((1, 2, 3))
        for mine, theirs in zip(self.blocks, net.blocks):
            mine.load_state_dict(theirs.state_dict())

    def forward(self, x):                                           # (B,3,S,S) -> (B,D,S/P,S/P)
        x = F.pad(x, (1, 0, 1, 0), mode="replicate")                # 2x2 kernels, still S x S
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        return self.proj(self.blocks(F.gelu(x)))


def resnet32(num_classes=10, **kwargs):
    """CIFAR ResNet-32 (n = 5): 0.41 GFLOP per image for a training step."""
    return CifarResNet(5, num_classes, **kwargs)


def resnet50(num_classes=1000, **kwargs):
    """ImageNet ResNet-50 v1.5: 25,557,032 parameters at K = 1000."""
    return ResNet50(num_classes, **kwargs)


def make(arch, num_classes, **kwargs):
    """The network called `arch`, one of NAMES."""
    if arch == "resnet50":
        return resnet50(num_classes, **kwargs)
    if arch == "fast":
        return FastNet(num_classes, **kwargs)
    return CifarResNet(CIFAR_BLOCKS[arch], num_classes, **kwargs)
