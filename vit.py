r"""Vision Transformer with a class token and a distillation token.

ViT: Dosovitskiy et al., ICLR 2021, arXiv 2010.11929. The second token, DeiT: Touvron et al.,
ICML 2021, arXiv 2012.12877. Stochastic depth: arXiv 1603.09382. LayerScale: arXiv 2103.17239.

    z_0      = [cls; dist; patch_1 E; ...; patch_N E] + pos              (1)
    z'_l     = z_{l-1} + gamma_1 * MSA(LN(z_{l-1}))                      (2)  l = 1..depth
    z_l      = z'_l    + gamma_2 * MLP(LN(z'_l))                         (3)  gamma: LayerScale
    f_c, f_d = head(LN(z_depth)[0]), head_dist(LN(z_depth)[1])           (4)  CLS and DIST logits

DeiT-LT (arXiv 2404.02900) trains f_c on the images' labels, which makes CLS the expert on frequent
classes, f_d on a CNN teacher's labels, re-weighted late in training, which makes DIST the expert on
rare ones, and predicts with (f_c + f_d) / 2. Both tokens pass through the same blocks: only the
tokens themselves, their position embeddings and their classifiers, head and head_dist, differ.

Shapes: B images, K classes, D = embed_dim, H attention heads, d = D/H, N patches, T = N + 2 tokens
(N + 1 without DIST). State-dict keys are timm's and DeiT's: published files load with strict=True.
Unlike there, images come in as [0, 1], and the network normalises them itself.
"""
from collections import OrderedDict
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PatchEmbed(nn.Module):
    """Cut an image into P x P patches and project each to D numbers: a convolution of stride P."""

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x)                                 # (B,3,S,S) -> (B,D,S/P,S/P)


class ConvStem(nn.Module):
    """The same grid by overlapping 3x3 convolutions (Xiao et al., NeurIPS 2021, arXiv 2106.14881).

    Stages of a convolution of stride 2 and (our addition) one of stride 1, whose channels double up
    to D, then a 1x1 convolution. ValueError unless P is 2, 4, 8, 16 or 32 and D a multiple of P/2.
    """

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        if patch_size not in (2, 4, 8, 16, 32) or embed_dim % (patch_size // 2):
            raise ValueError(f"no convolutional stem for {patch_size} px and {embed_dim} channels")
        layers, channels, width = [], 3, embed_dim // (patch_size // 2)
        while width <= embed_dim:                           # D/4, D/2, D for P = 8
            for stride in (2, 1):
                layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
                           nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            width *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, x):                                   # (B,3,S,S) -> (B,D,S/P,S/P)
        return self.layers(x.contiguous(memory_format=torch.channels_last))


class Attention(nn.Module):
    """Self-attention: softmax(q k^T / sqrt(d)) v in each of H heads, then a linear layer."""

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def split_heads(self, x):
        """Tokens (B,T,D) -> queries, keys, values (B,H,T,d) each."""
        return self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def attend(self, q, k):
        """Attention weights (B,H,Tq,Tk): row i is how much query i attends to each token."""
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1)       # q k^T / sqrt(d)

    def forward(self, x, keep=None):
        """Tokens (B,T,D) -> (B,T,D), or only the first `keep`, which attend to all T tokens."""
        q, k, v = self.split_heads(x)
        q = q[:, :, :keep]                                  # (B,H,keep,d)
        if self.training and x.device.type == "cpu":        # where the fused backward is slower
            x = self.attend(q, k) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)     # the same, no T x T weights stored
        return self.proj(x.transpose(1, 2).flatten(2))      # (B,H,keep,d) -> (B,keep,D)


def drop_path(branch, p, training):
    """Stochastic depth: drop a residual branch (B,T,D) of each image with probability p."""
    if not training or p == 0:
        return branch
    survives = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= p
    # Surviving branches are divided by 1 - p, so that the expectation is the same as in evaluation.
    scale = survives.to(branch.dtype) / (1 - p)             # (B,1,1)
    return branch * scale


class Block(nn.Module):
    """Pre-norm transformer block, equations (2) and (3)."""

    def __init__(self, embed_dim, num_heads, mlp_ratio=4, drop_prob=0.0, layer_scale=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        hidden = round(mlp_ratio * embed_dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(embed_dim, hidden), gelu=nn.GELU(),
                                             fc2=nn.Linear(hidden, embed_dim)))
        self.drop_prob, self.gamma_1, self.gamma_2 = drop_prob, None, None
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((embed_dim,), layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((embed_dim,), layer_scale))

    def residual(self, x, branch, gamma):
        if gamma is not None:
            branch = gamma * branch
        return x + drop_path(branch, self.drop_prob, self.training)

    def forward(self, x, keep=None):
        x = self.residual(x[:, :keep], self.attn(self.norm1(x), keep), self.gamma_1)        # (2)
        return self.residual(x, self.mlp(self.norm2(x)), self.gamma_2)                      # (3)


class VisionTransformer(nn.Module):
    """ViT whose forward returns `(cls_logits, dist_logits)`; dist_logits is None if not distilled.

    img_size, patch_size: side of the square image and of a patch, pixels. num_classes: K.
    embed_dim: D. depth: number of blocks. num_heads: H. mlp_ratio: hidden width of an MLP / D.
    distilled: with DIST and head_dist, else with CLS alone. stem: PatchEmbed or a class like it.
    drop_path: stochastic depth rate of the last block; block i has drop_path * i / (depth - 1).
    layer_scale: initial gamma of LayerScale (DeiT-III: 1e-4); None: without.
    checkpointing: store only the inputs of blocks, compute the rest again in the backward pass.
    Raises ValueError if sizes do not fit.
    """

    def __init__(self, img_size=224, patch_size=16, num_classes=1000, embed_dim=768, depth=12,
                 num_heads=12, mlp_ratio=4, distilled=True, stem=PatchEmbed, drop_path=0.0,
                 layer_scale=None, checkpointing=False):
        super().__init__()
        if img_size % patch_size or embed_dim % num_heads:
            raise ValueError(f"img_size {img_size} must be a multiple of patch_size {patch_size}, "
                             f"and embed_dim {embed_dim} of num_heads {num_heads}")
        self.img_size, self.patch_size = img_size, patch_size
        self.distilled, self.checkpointing = distilled, checkpointing
        self.num_tokens = 2 if distilled else 1             # tokens before the patches
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.patch_embed = stem(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        T = self.num_tokens + (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, T, embed_dim))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate, layer_scale)
                                    for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        if distilled:
            self.head_dist = nn.Linear(embed_dim, num_classes)
        # As in timm 0.8: N(0, 0.02^2) for linear weights, positions, DIST; biases 0; CLS nearly 0.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if distilled:
            nn.init.trunc_normal_(self.dist_token, std=0.02)

    def forward_features(self, x, return_attention=False, keep=None):
        """Images (B,3,S,S) in [0, 1] -> tokens (B,T,D) after the last norm, attention weights.

        Token 0 is CLS, token 1 DIST (if distilled), then the patches, row by row. keep: only the
        first `keep` tokens. return_attention: the list has (B,H,T,T) of each block; else empty.
        """
        if x.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"the network was built for {self.img_size} px, the images have "
                             f"{tuple(x.shape[-2:])}; resize them, or use resize_pos_embed")
        patches = self.patch_embed((x - self.mean) / self.std).flatten(2).mT        # (B,N,D)
        tokens = [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]
        tokens = [token.expand(x.shape[0], -1, -1) for token in tokens]             # (B,1,D) each
        x = torch.cat([*tokens, patches], dim=1) + self.pos_embed                   # (1) (B,T,D)
        attention = []
        for block in self.blocks:
            if return_attention:
                q, k, _ = block.attn.split_heads(block.norm1(x))
                attention.append(block.attn.attend(q, k))
            kept = keep if block is self.blocks[-1] else None       # the next one attends to all
            if self.checkpointing and self.training:    # not the stem: BatchNorm would count twice
                x = checkpoint(block, x, kept, use_reentrant=False)
            else:
                x = block(x, kept)
        return self.norm(x), attention

    def forward(self, x):
        tokens, _ = self.forward_features(x, keep=self.num_tokens)
        # In float32: bfloat16 logits often tie, and argmax takes the first, more frequent class.
        with torch.autocast(x.device.type, enabled=False):
            tokens = tokens.to(self.head.weight.dtype)      # (B,1 or 2,D)
            cls_logits = self.head(tokens[:, 0])            # (4) (B,K)
            dist_logits = self.head_dist(tokens[:, 1]) if self.distilled else None
        return cls_logits, dist_logits


def resize_pos_embed(pos_embed, num_tokens, new_grid):
    """Position embeddings (1,num_tokens+G*G,D) -> (1,num_tokens+new_grid**2,D), for another size.

    Those of the patches are resized bicubically as a G x G picture, those of CLS and DIST are kept
    (DeiT, section 3). Raises ValueError if the patches are not a square grid.
    """
    leading, grid = pos_embed[:, :num_tokens], pos_embed[:, num_tokens:]
    G = round(grid.shape[1] ** 0.5)
    if G * G != grid.shape[1]:
        raise ValueError(f"{grid.shape[1]} patch positions are not a square grid")
    grid = grid.mT.unflatten(2, (G, G))                     # (1,G*G,D) -> (1,D,G,G)
    grid = F.interpolate(grid, size=(new_grid, new_grid), mode="bicubic", align_corners=False)
    return torch.cat([leading, grid.flatten(2).mT], dim=1)


MODELS = {  # parameters at K = 1000, 224 px, patch 16, two tokens
    "micro": partial(VisionTransformer, embed_dim=96, depth=6, num_heads=3),    # built-in shapes
    "mini": partial(VisionTransformer, embed_dim=192, depth=6, num_heads=3),    # CIFAR on a CPU
    "tiny": partial(VisionTransformer, embed_dim=192, depth=12, num_heads=3),   # 5,910,800
    "small": partial(VisionTransformer, embed_dim=384, depth=12, num_heads=6),  # 22,436,432
    "base": partial(VisionTransformer, embed_dim=768, depth=12, num_heads=12),  # 87,338,192
}
