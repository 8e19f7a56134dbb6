r"""Sharpness-Aware Minimization: find weights whose whole neighbourhood has a low loss.

Foret et al., ICLR 2021, arXiv 2010.01412.

    min_w  max_{||e||_2 <= rho}  L(w + e)
    e(w) = rho * g / ||g||_2,   g = grad L(w)          (1)  one norm over all parameters together
    w   <- step of the base optimizer from w with the gradient taken at w + e(w)              (2)

Two forward and backward passes per step, so about twice the cost. rho = 0 is the base optimizer.
Weight decay belongs to the base optimizer and acts at w; it is not part of e. DeiT-LT trains its
*teacher* with SAM: on few tail images a CNN ends in saddles and sharp minima, and flat minima give
better labels for tail classes (Rangwani et al., NeurIPS 2022, arXiv 2212.13827).

    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.8)
    loss(model(x), y).backward()
    sam.first_step()                                    # climb to w + e
    with frozen_batchnorm_statistics(model):
        loss(model(x), y).backward()                    # same batch, gradient at w + e
    sam.second_step()                                   # back to w, then the base optimizer's step

Several processes: DistributedDataParallel averages the gradient of the first pass too, so every
process climbs in the same direction, and N processes do what one does with the same global batch
(except for BatchNorm's statistics, class-weighted means and rounding). The paper perturbs on each
accelerator alone (m-sharpness): wrap the first pass in `model.no_sync()` for that. We average.
AMP: gradients are of the float32 weights, so bfloat16 autocast needs nothing special. With a
float16 loss scaler, unscale before each of the two steps; the scale cancels in (1), not in (2).
"""
from contextlib import contextmanager

import torch
from torch import nn


class SAM:
    """Wraps any torch optimizer; rho >= 0 is the radius of (1) and may be changed between steps."""

    def __init__(self, base_optimizer, rho):
        if rho < 0:
            raise ValueError(f"rho must be at least 0, not {rho}")
        self.base_optimizer, self.rho = base_optimizer, rho
        self.saved = None                   # between the two steps: (parameters, their values at w)

    @property
    def param_groups(self):
        return self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        """w <- w + e(w) by the gradients in `.grad`, which are then cleared. Returns ||g||."""
        if self.saved is not None:
            raise RuntimeError("first_step was called twice without second_step")
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            raise RuntimeError("there are no gradients: call backward before first_step")
        grads = [p.grad for p in params]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        # Keep w itself rather than e: (w + e) - e is not w in floating point.
        self.saved = params, torch._foreach_mul(params, 1.0)            # a copy of all, in one call
        e = torch._foreach_mul(grads, self.rho / (norm + 1e-12))        # (1)
        torch._foreach_add_(params, e)
        self.zero_grad()
        return norm

    @torch.no_grad()
    def second_step(self):
        """Return to w, step the base optimizer with the gradients taken at w + e, clear them."""
        self.restore()
        self.base_optimizer.step()                                      # (2)
        self.zero_grad()

    @torch.no_grad()
    def restore(self):
        """Return to w, bit for bit, without a step (also after a second pass that failed)."""
        if self.saved is None:
            raise RuntimeError("there is no first_step to return from")
        params, values = self.saved
        torch._foreach_copy_(params, values)
        self.saved = None

    def zero_grad(self):
        self.base_optimizer.zero_grad(set_to_none=True)

    def state_dict(self):
        """State of the base optimizer, and rho. Raises RuntimeError between the two steps."""
        if self.saved is not None:
            raise RuntimeError("the weights are perturbed: save before first_step or after "
                               "second_step")
        return {"base_optimizer": self.base_optimizer.state_dict(), "rho": self.rho}

    def load_state_dict(self, state):
        self.base_optimizer.load_state_dict(state["base_optimizer"])
        self.rho = state["rho"]


@contextmanager
def frozen_batchnorm_statistics(model):
    """BatchNorm still normalises with the batch, but its running statistics do not move.

    For the second pass, whose weights are perturbed: else its statistics leak into evaluation.
    """
    layers = [m for m in model.modules()
              if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
