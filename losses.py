r"""The losses of the student and of its teachers, for logits (B,K), in float32 or better.

Student, DeiT-LT (Rangwani et al., CVPR 2024, arXiv 2404.02900), for an image x with label y:

    y_t = argmax_k g(x)_k                           hard label of the teacher g for the same image x
    L   = (1 - alpha) CE(f_c(x), y) + alpha w[y_t] CE(f_d(x), y_t)                 (1)   alpha = 1/2
    w_k = K (1/E_k) / sum_j (1/E_j),    E_k = (1 - beta^n_k) / (1 - beta)          (2)

f_c, f_d: CLS and DIST logits; n_k: training images of class k; E_k: their "effective number" (Cui
et al., CVPR 2019, arXiv 1901.05555). Deferred re-weighting (DRW): w = 1 until late in the run, then
(2). With w = 1 throughout, (1) is DeiT's hard distillation (arXiv 2012.12877). In DeiT's soft one
tau^2 KL(softmax(g / tau) || softmax(f_d / tau)) takes the place of CE(f_d, y_t). With one token
f_d = f_c. A micro-batch's mean divides by its sum of w[y_t], as published, so (2)'s scale cancels.

Logit adjustment instead of weights (Menon et al., ICLR 2021, arXiv 2007.07314): if class k is the
label with frequency pi_k, train with CE(f + ln pi, y) and predict with f. By Bayes' rule softmax(f)
is then p(y|x) for equally frequent classes. For DIST, pi is the distribution of the teacher's
labels, which is not the data's; with soft labels tau ln pi is added, as the softmax divides by tau.

Teachers: LDAM (Cao et al., NeurIPS 2019, arXiv 1906.07413), on logits z_k = s cos(theta_k); vector
scaling (Kini et al., NeurIPS 2021, arXiv 2103.01550); focal loss (Lin et al., arXiv 1708.02002):

    L_LDAM  = w[y] CE(z - s m_y onehot(y), y),      m_k = m_max (n_min / n_k)^(1/4)         (3)
    L_VS    = w[y] CE(z_k / delta_k + tau ln pi_k, y),  delta_k = (n_max / n_k)^gamma       (4)
    L_focal = (1 - e^-l)^gamma l,                   l = w[y] CE(z, y)                       (5)

pi_k = n_k / N; theta_k: the features' angle to class vector k. gamma = 0: (4) is logit adjustment.

PaCo (Cui et al., ICCV 2021, arXiv 2107.12028): one of two views of image i gives logits z_ic and a
unit vector v_i, the anchor; the other, through a slowly following copy of the network (the key
encoder), a unit vector k_i, the key. An anchor is contrasted with the classes, logit-adjusted, and
with the rows of the bank = [v_1..v_B; k_1..k_B; a queue of earlier keys]. P_i: the rows, other than
i itself, that have i's label. T: a temperature. alpha, beta, gamma: PaCo's own, not those above.

    s_ic = z_ic + ln pi_c,    t_ia = v_i . bank_a / T                                       (6)
    Z_i  = sum_c e^s_ic + gamma sum_{a != i} e^t_ia                                         (7)
    L_i  = -[beta (s_iy - ln Z_i) + alpha sum_{a in P_i} (t_ia - ln Z_i)] / (beta + alpha |P_i|) (8)
"""
from copy import deepcopy

import torch
import torch.nn as nn
import torch.nn.functional as F


def full_precision(logits):
    """float32 at least, also under autocast: a softmax needs more than bfloat16's 8 bits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def class_balanced_weights(counts, beta=0.9999):
    """Weights (2) of counts (K,) -> (K,), sum K; beta = 0: ones. ValueError for a count of 0."""
    counts = torch.as_tensor(counts).double()
    if counts.min() < 1:
        raise ValueError("every class needs at least one training image")
    weights = (1 - beta) / (1 - beta ** counts)                         # 1 / E_k
    return (len(counts) * weights / weights.sum()).float()              # (2)


def drw_weights(counts, epoch, drw_epoch, beta=0.9999):
    """DRW: (2) from drw_epoch (0-based) on; before it, or if beta = 0, None: all weights are 1."""
    return class_balanced_weights(counts, beta) if epoch >= drw_epoch and beta > 0 else None


def cross_entropy(logits, target, weight=None):
    """Mean of -sum_k t_k log softmax(logits)_k for soft labels t (B,K) or class numbers y (B,).

    With class weights w (K,): sum_i w[y_i] l_i / sum_i w[y_i], l_i = -log softmax(logits_i)[y_i].
    """
    return F.cross_entropy(full_precision(logits), target, weight)


def soft_distillation(dist_logits, teacher_logits, tau=1.0, weight=None):
    """tau^2 KL(softmax(teacher / tau) || softmax(dist / tau)), mean over images (1503.02531).

    DeiT's code divides by K as well. weight (K,): each image has the weight of its teacher label.
    (The published code re-normalises weighted log-probabilities, which gives no distribution.)
    """
    log_p = (full_precision(teacher_logits) / tau).log_softmax(dim=1)
    log_q = (full_precision(dist_logits) / tau).log_softmax(dim=1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)                     # (B,)
    w = torch.ones_like(kl) if weight is None else weight[teacher_logits.argmax(dim=1)]
    return tau ** 2 * (w * kl).sum() / w.sum()


def distillation_loss(cls_logits, dist_logits, target, teacher_targets, alpha=0.5, weight=None,
                      tau=1.0):
    """Equation (1). Returns (loss, CLS loss, DIST loss), the last two without 1 - alpha and alpha.

    target: soft labels (B,K) or class numbers (B,). teacher_targets: hard labels y_t (B,), or the
    teacher's logits (B,K), which DIST then follows softly at temperature tau.
    """
    loss_cls = cross_entropy(cls_logits, target)
    if teacher_targets.ndim == 1:
        loss_dist = cross_entropy(dist_logits, teacher_targets, weight)
    else:
        loss_dist = soft_distillation(dist_logits, teacher_targets, tau, weight)
    return (1 - alpha) * loss_cls + alpha * loss_dist, loss_cls, loss_dist          # (1)


def teacher_label_distribution(teacher_targets, num_classes, tau=1.0):
    """(K,): mean over a batch of hard labels (B,) as one-hot, or of softmax(logits (B,K) / tau)."""
    if teacher_targets.ndim == 1:
        p = F.one_hot(teacher_targets, num_classes).float()             # (B,K)
    else:
        p = (full_precision(teacher_targets) / tau).softmax(dim=1)      # (B,K)
    return p.mean(dim=0)


class LDAMLoss(nn.Module):
    """Label-distribution-aware margins (3): the rarer a class, the wider the margin it must win by.

    counts (K,): training images per class. scale: s, the same as the cosine classifier's.
    max_margin: m_max, of the rarest class (published: CIFAR 0.5, ImageNet-LT and iNaturalist 0.3).
    """

    def __init__(self, counts, max_margin=0.5, scale=30.0):
        super().__init__()
        margins = torch.as_tensor(counts).double() ** -0.25
        self.register_buffer("margins", (max_margin * margins / margins.max()).float())     # m (K,)
        self.scale = scale

    def forward(self, logits, target, weight=None):
        """logits s*cos (B,K), target (B,), class weights (K,) or None -> scalar."""
        margins = self.margins[target, None] * F.one_hot(target, logits.shape[1])        # (B,K)
        return F.cross_entropy(full_precision(logits) - self.scale * margins, target, weight)  # (3)


class VSLoss(nn.Module):
    """Vector scaling (4). counts (K,): training images per class. Published: gamma 0.3, tau 1."""

    def __init__(self, counts, gamma=0.3, tau=1.0):
        super().__init__()
        counts = torch.as_tensor(counts).double()
        self.register_buffer("delta", ((counts.max() / counts) ** gamma).float())           # (K,)
        self.register_buffer("shift", (tau * (counts / counts.sum()).log()).float())        # (K,)

    def forward(self, logits, target, weight=None):
        """logits (B,K), target (B,) or (unweighted) (B,K), weights (K,) or None -> scalar."""
        z = full_precision(logits) / self.delta + self.shift
        return F.cross_entropy(z, target, weight)                       # (4)


def focal_loss(logits, target, weight=None, gamma=1.0):
    """(5), the plain mean over the batch: logits (B,K), target (B,), class weights (K,) or None."""
    loss = F.cross_entropy(full_precision(logits), target, weight, reduction="none")        # l (B,)
    return ((1 - torch.exp(-loss)) ** gamma * loss).mean()              # (5) as in LDAM-DRW's code


class PaCoLoss(nn.Module):
    """Equations (6) to (8). counts (K,): training images per class. Defaults: CIFAR-100's."""

    def __init__(self, counts, alpha=0.01, beta=1.0, gamma=1.0, temperature=0.05):
        super().__init__()
        counts = torch.as_tensor(counts).double()
        self.register_buffer("log_prior", (counts / counts.sum()).log().float())            # (K,)
        self.alpha, self.beta, self.gamma, self.temperature = alpha, beta, gamma, temperature

    def forward(self, logits, v, target, bank, bank_labels):
        """logits (B,K), anchors v (B,d), target (B,), bank (A,d), its labels (A,) -> scalar.

        The bank's first B rows are v. Label -1 (an empty place in the queue) is never a positive.
        """
        with torch.autocast(v.device.type, enabled=False):
            s = full_precision(logits) + self.log_prior                 # (6) (B,K)
            t = v @ bank.T / self.temperature                           # (6) (B,A)
        positive = (target[:, None] == bank_labels).fill_diagonal_(False)       # (B,A): a in P_i
        contrast = t.clone().fill_diagonal_(-torch.inf).logsumexp(dim=1)        # (7) without a = i
        log_z = torch.logaddexp(s.logsumexp(dim=1), contrast + torch.tensor(self.gamma).log())
        class_term = s.gather(1, target[:, None])[:, 0] - log_z         # (B,)
        pair_terms = ((t - log_z[:, None]) * positive).sum(dim=1)
        weight = self.beta + self.alpha * positive.sum(dim=1)
        return -((self.beta * class_term + self.alpha * pair_terms) / weight).mean()        # (8)


class PaCo(nn.Module):
    """A network with PaCo's additions for training: projections, key encoder, queue (as in MoCo).

    A step: keys() once; forward() and PaCoLoss, under SAM twice with the same keys; enqueue() once.
    net(x, return_features=True) -> logits (B,K), features (B,num_features). dim: of anchors, keys.
    queue: keys remembered, at first zeros of label -1 (published: random). momentum: the
    fraction of its weights that the key encoder keeps in a step.
    """

    def __init__(self, net, num_features, dim=32, queue=1024, momentum=0.999):
        super().__init__()
        self.net, self.momentum = net, momentum
        hidden, last = nn.Linear(num_features, num_features), nn.Linear(num_features, dim)
        for layer in (hidden, last):
            nn.init.kaiming_normal_(layer.weight)                       # as published
        self.projection = nn.Sequential(hidden, nn.BatchNorm1d(num_features), nn.ReLU(), last)
        self.key_net = deepcopy(net).requires_grad_(False)
        self.key_projection = deepcopy(self.projection).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(queue, dim))          # newest first
        self.register_buffer("queue_labels", torch.full([queue], -1))

    @staticmethod
    def unit(projection, features):
        with torch.autocast(features.device.type, enabled=False):       # (6) divides it by T
            return F.normalize(projection(full_precision(features)))

    def forward(self, images):
        """Query view (B,3,S,S) in [0,1] -> logits (B,K), anchors v (B,dim) of length 1."""
        logits, features = self.net(images, return_features=True)
        return logits, self.unit(self.projection, features)

    @torch.no_grad()
    def keys(self, images):
        """Let the key encoder follow the query encoder by a step; key view -> unit keys (B,dim).

        Only parameters follow: BatchNorm in the key encoder uses the statistics of its own batch.
        """
        key = [*self.key_net.parameters(), *self.key_projection.parameters()]
        query = [*self.net.parameters(), *self.projection.parameters()]
        torch._foreach_lerp_(key, query, 1 - self.momentum)
        _, features = self.key_net(images, return_features=True)
        return self.unit(self.key_projection, features)

    def bank(self, v, keys, labels):
        """The bank (2B+queue,dim) and its labels (2B+queue,); gradients reach v."""
        return torch.cat([v, keys, self.queue]), torch.cat([labels, labels, self.queue_labels])

    @torch.no_grad()
    def enqueue(self, keys, labels):
        """Put the keys (n,dim) and labels (n,) of all processes first; the n oldest drop out."""
        self.queue.copy_(torch.cat([keys, self.queue])[:len(self.queue)])
        self.queue_labels.copy_(torch.cat([labels, self.queue_labels])[:len(self.queue)])
