r"""Vision Transformer with a class token and a distillation token.

ViT:    Dosovitskiy et al., ICLR 2021, arXiv 2010.11929.    DeiT (second token): Touvron et al., ICML 2021, arXiv 2012.12877.
Extras: stochastic depth, arXiv 1603.09382; LayerScale, arXiv 2103.17239; a convolutional stem, arXiv 2106.14881.

    z_0     = [cls; dist; patch_1 E; ...; patch_N E] + pos                 (1)
    z'_l    = z_{l-1} + gamma_1 * MSA(LN(z_{l-1}))                         (2)    gamma = 1 without LayerScale
    z_l     = z'_l    + gamma_2 * MLP(LN(z'_l))                            (3)    l = 1..depth
    f_c, f_d = head(LN(z_L)[0]), head_dist(LN(z_L)[1])                     (4)    CLS logits, DIST logits

DeiT-LT (arXiv 2404.02900) trains f_c on labels (the head-class expert) and f_d on a CNN teacher (the tail-class expert)
and predicts with (f_c + f_d) / 2. The two tokens pass through the same blocks: only tokens, positions and heads differ.

Shapes: B images, K classes, D = embed_dim, H heads, d = D/H, N patches, T = N + 2 tokens (N + 1 without distillation).
Parameters at K = 1000, 224 px, patch 16, two tokens: tiny 5,910,800, small 22,436,432, base 87,338,192.

State-dict keys and layouts are those of timm and facebookresearch/deit, so published checkpoints load with strict=True.
One difference from them: images come in as [0, 1] and the network normalises them itself (`mean`, `std`).
"""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PatchEmbed(nn.Module):
    """Cut an image into P x P patches and project each to D numbers; a stride-P convolution does both."""

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                    # (B,3,H,W) -> (B,D,H/P,W/P) -> (B,N,D)


class ConvStem(nn.Module):
    """The same grid of patches from overlapping 3 x 3 convolutions: each of log2(P) sizes has one of stride 2, which halves
    the image, and depth - 1 of stride 1; a 1 x 1 convolution ends it.

    Depth 1: early convolutions (Xiao et al., NeurIPS 2021, arXiv 2106.14881); depth 2 is ours. Widths double up to D. An edge
    is the same edge wherever in its patch it lies, which a projection of whole patches must learn place by place.
    Raises ValueError for a patch size that is not a power of two and at least 2, or a width that cannot be halved that often.
    """

    def __init__(self, patch_size, embed_dim, depth=1):
        super().__init__()
        halvings = patch_size.bit_length() - 1
        if patch_size != 2 ** halvings or halvings < 1 or embed_dim % 2 ** (halvings - 1):
            raise ValueError(f"a convolutional stem cannot make patches of {patch_size} px, {embed_dim} wide")
        layers, width = [], 3
        for i in reversed(range(halvings)):                               # D/4, D/2, D for P = 8
            for stride in [2] + [1] * (depth - 1):
                layers += [nn.Conv2d(width, embed_dim >> i, 3, stride, padding=1, bias=False),
                           nn.BatchNorm2d(embed_dim >> i), nn.ReLU()]
                width = embed_dim >> i
        self.layers = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        return self.layers(x).flatten(2).transpose(1, 2)                  # (B,3,H,W) -> (B,D,H/P,W/P) -> (B,N,D)


STEMS = {"patch": PatchEmbed, "conv": ConvStem, "conv2": partial(ConvStem, depth=2)}


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(d)) v in each of H heads, then one linear layer."""

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (embed_dim // num_heads) ** -0.5
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def split_heads(self, x):
        B, T, D = x.shape
        return self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)

    def weights(self, x):
        """Attention matrix of tokens x (B,T,D) -> (B,H,T,T); row i is what token i looks at, rows sum to 1."""
        q, k, _ = self.split_heads(x)                                     # (B,H,T,d) each
        return (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)

    def forward(self, x, keep=None):
        """Tokens (B,T,D) -> (B,T,D), or only the first `keep` of them, which have looked at all."""
        q, k, v = self.split_heads(x)                                     # (B,H,T,d) each
        q = q[:, :, :keep]                                                # (B,H,T,d) -> (B,H,keep,d)
        if self.training and x.device.type == "cpu":
            # The same formula written out: the fused kernel's bf16 backward is 1.4-1.75x slower on a CPU.
            x = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)                   # never stores the T x T matrix on a GPU
        return self.proj(x.transpose(1, 2).flatten(2))                    # (B,H,T or keep,d) -> (B,T or keep,D)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them, applied to every token."""

    def __init__(self, embed_dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: drop a whole residual branch with probability p, for each image separately.

    Kept branches are divided by 1 - p, so the expectation is the same in training and in evaluation.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.p        # (B,1,1)
        return x * keep.to(x.dtype) / (1 - self.p)


class Block(nn.Module):
    """Pre-norm transformer block, equations (2) and (3)."""

    def __init__(self, embed_dim, num_heads, mlp_ratio=4, drop_path=0.0, layer_scale=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = Mlp(embed_dim, int(mlp_ratio * embed_dim))
        self.drop_path = DropPath(drop_path)
        scaled = layer_scale is not None
        self.gamma_1 = nn.Parameter(torch.full((embed_dim,), layer_scale)) if scaled else 1.0
        self.gamma_2 = nn.Parameter(torch.full((embed_dim,), layer_scale)) if scaled else 1.0

    def forward(self, x, keep=None):
        x = x[:, :keep] + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), keep))               # (2)
        x = x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))    # (3)
        return x


class VisionTransformer(nn.Module):
    """ViT whose forward returns `(cls_logits, dist_logits)`; dist_logits is None when distilled=False.

    Args:
        img_size, patch_size: side of the square image and of a patch, in pixels; img_size % patch_size must be 0.
        num_classes: K.    embed_dim, depth, num_heads, mlp_ratio: D, number of blocks, H, MLP width / D.
        distilled: with the DIST token and its own head (DeiT) or without (ViT).
        stem: what makes the patches' tokens, "patch" (ViT's projection), "conv" or "conv2" (ConvStem, depth 1 or 2).
        drop_path: stochastic-depth rate of the last block; block i of `depth` has drop_path * i / (depth - 1).
        layer_scale: initial value of the per-channel branch scales (DeiT-III uses 1e-4); None for no scales.
        checkpointing: keep only what enters each block and compute the rest again in the backward pass: much less memory for a
            third more arithmetic, the same numbers. Not the stem: a second pass would move its BatchNorm's statistics twice.
        mean, std: of the RGB channels in [0, 1]; applied first in forward, not saved in the state dict.
    Raises ValueError for sizes that do not fit together.
    """

    def __init__(self, img_size=224, patch_size=16, num_classes=1000, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4,
                 distilled=True, stem="patch", drop_path=0.0, layer_scale=None, checkpointing=False, mean=IMAGENET_MEAN,
                 std=IMAGENET_STD):
        super().__init__()
        if img_size % patch_size or embed_dim % num_heads:
            raise ValueError(f"img_size {img_size} must be a multiple of patch_size {patch_size}, "
                             f"and embed_dim {embed_dim} of num_heads {num_heads}")
        self.img_size, self.patch_size, self.num_classes, self.distilled = img_size, patch_size, num_classes, distilled
        self.num_tokens = 2 if distilled else 1                           # tokens before the patches
        self.checkpointing = checkpointing
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

        num_patches = (img_size // patch_size) ** 2
        self.patch_embed = STEMS[stem](patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens + num_patches, embed_dim))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate, layer_scale) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        if distilled:
            self.head_dist = nn.Linear(embed_dim, num_classes)
        self.init_weights()

    def init_weights(self):
        """DeiT's initialisation: linear weights and positions ~ truncated N(0, 0.02^2), biases 0, CLS ~ N(0, 1e-6^2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.distilled:
            nn.init.trunc_normal_(self.dist_token, std=0.02)

    def forward_features(self, x, return_attention=False, keep=None):
        """Images (B,3,S,S) in [0, 1] -> final normalised tokens (B,T,D), or the first `keep` of them, list of attention maps.

        The list holds one (B,H,T,T) tensor per block if return_attention, else nothing. Token 0 is CLS, token 1 is
        DIST (when distilled), the rest are the patches, row by row.
        """
        if x.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"the network was built for {self.img_size} px, the images have {tuple(x.shape[-2:])}; "
                             "resize them, or the positions with resize_pos_embed")
        x = self.patch_embed((x - self.mean) / self.std)                  # (B,3,S,S) -> (B,N,D)
        tokens = [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]
        x = torch.cat([t.expand(x.shape[0], -1, -1) for t in tokens] + [x], dim=1) + self.pos_embed      # (1) (B,T,D)
        attention = []
        for i, block in enumerate(self.blocks, start=1):
            if return_attention:
                attention.append(block.attn.weights(block.norm1(x)))
            kept = keep if i == len(self.blocks) else None                # who is not asked for is left out of the last block
            x = checkpoint(block, x, kept, use_reentrant=False) if self.checkpointing and self.training else block(x, kept)
        return self.norm(x), attention

    def forward_heads(self, tokens):
        """Final tokens (B,T,D) -> (cls_logits, dist_logits), (B,K) each, equation (4)."""
        with torch.autocast(tokens.device.type, enabled=False):           # equal bfloat16 logits would go to the commoner class
            tokens = tokens.to(self.head.weight.dtype)
            return self.head(tokens[:, 0]), self.head_dist(tokens[:, 1]) if self.distilled else None

    def forward(self, x):
        tokens, _ = self.forward_features(x, keep=self.num_tokens)
        return self.forward_heads(tokens)


def resize_pos_embed(pos_embed, num_tokens, new_grid):
    """Positions (1, num_tokens + G*G, D) for another resolution -> (1, num_tokens + new_grid**2, D).

    The patch positions are resized bicubically as a G x G picture, the leading tokens' are kept (DeiT, section 3).
    Raises ValueError if the patch positions are not a square grid.
    """
    head, grid = pos_embed[:, :num_tokens], pos_embed[:, num_tokens:]     # (1,num_tokens,D), (1,G*G,D)
    G = int(grid.shape[1] ** 0.5 + 0.5)
    if G * G != grid.shape[1]:
        raise ValueError(f"{grid.shape[1]} patch positions are not a square grid")
    if G == new_grid:
        return pos_embed
    grid = grid.transpose(1, 2).unflatten(2, (G, G))                      # (1,D,G,G)
    grid = F.interpolate(grid, size=(new_grid, new_grid), mode="bicubic", align_corners=False)
    return torch.cat([head, grid.flatten(2).transpose(1, 2)], dim=1)


def vit_micro(**kwargs):
    """96 x 6 x 3: for the built-in shapes, in minutes on a CPU."""
    return VisionTransformer(**{"embed_dim": 96, "depth": 6, "num_heads": 3, **kwargs})


def vit_mini(**kwargs):
    """192 x 6 x 3: half of tiny, for a CPU and 32 px images."""
    return VisionTransformer(**{"embed_dim": 192, "depth": 6, "num_heads": 3, **kwargs})


def vit_tiny(**kwargs):
    """DeiT-Ti: 192 x 12 x 3."""
    return VisionTransformer(**{"embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs})


def vit_small(**kwargs):
    """DeiT-S: 384 x 12 x 6."""
    return VisionTransformer(**{"embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs})


def vit_base(**kwargs):
    """DeiT-B: 768 x 12 x 12."""
    return VisionTransformer(**{"embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs})


MODELS = {"micro": vit_micro, "mini": vit_mini, "tiny": vit_tiny, "small": vit_small, "base": vit_base}
