r"""The losses: what DeiT-LT minimises, and what its teacher does.

Student, DeiT-LT (Rangwani et al., CVPR 2024, arXiv 2404.02900), for one image x with label y:

    y_t = argmax_k g(x)_k                                                  the teacher's hard label, of the same mixed image
    L   = (1 - alpha) * CE(f_c(x), y) + alpha * w[y_t] CE(f_d(x), y_t)     (1)    alpha = 1/2
    w_k = K / E_k / sum_j 1/E_j,    E_k = (1 - beta^n_k) / (1 - beta)      (2)    n_k training images of class k

f_c, f_d are the CLS and DIST logits. E_k is the "effective number" of images of class k (Cui et al., CVPR 2019,
arXiv 1901.05555). Deferred re-weighting (DRW): w = 1 until late in the run, then (2). With w = 1 throughout, (1) is DeiT's
hard distillation (arXiv 2012.12877); its soft one has tau^2 KL(g(x) / tau || f_d(x) / tau) for the second term, and a network
with one token has f_d = f_c. PyTorch's weighted mean divides by the sum of the batch's weights; so did the published code, and
so does this file.

Or logit adjustment instead of weights (Menon et al., ICLR 2021, arXiv 2007.07314), where a class k is the label with frequency
pi_k: CE(f + ln pi, y) in the loss, f alone at test time. By Bayes' rule softmax(f) is then p(y|x) for classes that are equally
frequent. For DIST they are the frequencies of the teacher's labels, which are not the data's; at temperature tau, the mean of
its probabilities, and f_d + tau ln pi.

Teacher, LDAM (Cao et al., NeurIPS 2019, arXiv 1906.07413), with the classifier's logits z_k = s cos(theta_k):

    L_LDAM = w[y] CE(z - s m_y onehot(y), y),    m_k = m_max * (n_min / n_k)^(1/4)                    (3)

and the other CNN rows of the paper's tables, with pi_k = n_k / N:

    L_VS    = w[y] CE(z_k / D_k + tau ln pi_k, y),   D_k = (n_max / n_k)^gamma                        (4)
    L_focal = (1 - e^-l)^gamma l,   l = w[y] CE(z, y)                                                 (5)

(4) is vector scaling (Kini et al., NeurIPS 2021, arXiv 2103.01550); with gamma = 0 it is logit adjustment (Menon et al.,
ICLR 2021, arXiv 2007.07314), with tau = 0 too plain cross-entropy. (5) is the focal loss (Lin et al., arXiv 1708.02002), with
the class weight inside the exponent as in LDAM-DRW's code; with the weights (2) from the first epoch on it is "CB-Focal".

Or teacher, PaCo: parametric contrastive learning (Cui et al., ICCV 2021, arXiv 2107.12028). Image i is seen in two views: one
gives logits z_ic and a unit vector v_i, the other, through a slowly following copy of the network, a unit key k_i. Each anchor
v_i is contrasted with the bank = [v_1..v_B; k_1..k_B; a queue of earlier keys] and with the classes, whose logits stand for
learnable class centres and are shifted by the log prior, so that rare classes must win by more:

    s_ic = z_ic + ln pi_c,    t_ia = v_i . bank_a / T                                                 (6)
    D_i  = sum_c e^s_ic + gamma sum_{a != i} e^t_ia                                                   (7)    never itself
    L_i  = -[ beta (s_iy - ln D_i) + alpha sum_{a in P_i} (t_ia - ln D_i) ] / (beta + alpha |P_i|)    (8)

P_i: the other entries of the bank with image i's label, its own key among them. alpha = 0 and gamma = 0 give logit adjustment.
At test time only the network is used, with its plain logits.

All functions take logits (B,K) and work in float32 or better, also under autocast.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F


def full_precision(logits):
    """bfloat16 and float16 -> float32, the rest as it is: a softmax needs more than 8 bits."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def class_balanced_weights(counts, beta=0.9999):
    """Class weights (2) from training counts (K,) -> float tensor (K,), sum K. beta = 0 gives ones.

    Raises ValueError for a class without images, whose weight would be infinite.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if counts.min() < 1:
        raise ValueError("every class needs at least one training image")
    effective = (1 - beta ** counts) / (1 - beta)                         # E_k
    weights = 1 / effective
    return (len(counts) * weights / weights.sum()).float()


def drw_weights(counts, epoch, drw_epoch, beta=0.9999):
    """Deferred re-weighting: None (no weights) before drw_epoch (0-based), the weights (2) from it on."""
    return class_balanced_weights(counts, beta) if epoch >= drw_epoch else None


def soft_cross_entropy(logits, target):
    """-sum_k target_k log softmax(logits)_k, mean over the batch.

    logits (B,K); target: soft labels (B,K) whose rows sum to 1, or class numbers (B,), which stand for their one-hot rows.
    """
    return F.cross_entropy(full_precision(logits), target)


def weighted_cross_entropy(logits, labels, weight=None):
    """sum_i w[y_i] l_i / sum_i w[y_i], l_i = -log softmax(logits_i)[y_i]; the second term of (1) where y is the teacher's.

    logits (B,K), labels (B,), class weights w (K,) or None for ones.
    """
    return F.cross_entropy(full_precision(logits), labels, weight=weight)


def binary_cross_entropy(logits, target):
    """DeiT-III's loss (arXiv 2204.07118): is class k in the image, yes or no? Mean over all B*K answers.

    logits (B,K); target: class numbers (B,), or soft labels (B,K), where every class with a share is a yes.
    """
    yes = target > 0 if target.ndim == 2 else F.one_hot(target, logits.shape[1])
    logits = full_precision(logits)
    return F.binary_cross_entropy_with_logits(logits, yes.to(logits.dtype))


def soft_distillation(dist_logits, teacher_logits, tau=1.0, weight=None):
    """tau^2 KL(softmax(teacher / tau) || softmax(dist / tau)), the mean over all B*K entries, as in DeiT's code.

    Divided by B alone it would be Hinton's (arXiv 1503.02531) loss, K times larger. With class weights (K,) the mean over
    images weighs each by that of the teacher's arg max, as the hard loss would. (The published code weighs log-probabilities
    and normalises them again, which makes no distribution.)
    """
    p = F.log_softmax(full_precision(teacher_logits) / tau, dim=1)
    q = F.log_softmax(full_precision(dist_logits) / tau, dim=1)
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(dim=1)     # (B,)
    w = torch.ones_like(kl) if weight is None else weight[teacher_logits.argmax(dim=1)]
    return tau ** 2 * (w * kl).sum() / (w.sum() * q.shape[1])


def distillation_loss(cls_logits, dist_logits, target, teacher, alpha=0.5, weight=None, tau=1.0, cls_loss=soft_cross_entropy):
    """Equation (1). Returns (loss, CLS part, DIST part).

    target: soft labels (B,K) or class numbers (B,), for cls_loss. teacher: its hard labels y_t (B,), or its logits (B,K), which
    DIST then follows softly, at temperature tau.
    """
    loss_cls = cls_loss(cls_logits, target)
    if teacher.ndim == 1:
        loss_dist = weighted_cross_entropy(dist_logits, teacher, weight)
    else:
        loss_dist = soft_distillation(dist_logits, teacher, tau, weight)
    return (1 - alpha) * loss_cls + alpha * loss_dist, loss_cls, loss_dist                            # (1)


class LDAMLoss(nn.Module):
    """Label-distribution-aware margin loss (3): the rarer the class, the wider the margin it must win by.

    counts (K,): training images per class. max_margin: m_max, of the rarest class (published: 0.5 on CIFAR, 0.3 on
    ImageNet-LT and iNaturalist). scale: s, the same as the cosine classifier's.
    """

    def __init__(self, counts, max_margin=0.5, scale=30.0):
        super().__init__()
        margins = torch.as_tensor(counts, dtype=torch.float64) ** -0.25
        self.register_buffer("margins", (max_margin * margins / margins.max()).float())               # m_k (K,)
        self.scale = scale

    def forward(self, logits, target, weight=None):
        """logits s*cos (B,K), target (B,), class weights (K,) or None -> scalar."""
        onehot = F.one_hot(target, logits.shape[1])
        z = full_precision(logits) - self.scale * self.margins[target][:, None] * onehot
        return F.cross_entropy(z, target, weight=weight)                  # (3)


class VSLoss(nn.Module):
    """Vector scaling (4): the logits of rare classes count for less and start lower, so that training must lift them.

    counts (K,): training images per class. Published: gamma 0.3, tau 1. At test time the plain logits are used.
    """

    def __init__(self, counts, gamma=0.3, tau=1.0):
        super().__init__()
        counts = torch.as_tensor(counts, dtype=torch.float64)
        self.register_buffer("delta", ((counts.max() / counts) ** gamma).float())                     # D_k (K,)
        self.register_buffer("shift", (tau * (counts / counts.sum()).log()).float())                  # tau ln pi_k (K,)

    def forward(self, logits, target, weight=None):
        """logits (B,K), target (B,), class weights (K,) or None -> scalar."""
        return F.cross_entropy(full_precision(logits) / self.delta + self.shift, target, weight=weight)   # (4)


def focal_loss(logits, target, weight=None, gamma=1.0):
    """Focal loss (5), the plain mean over the batch; logits (B,K), target (B,), class weights (K,) or None."""
    loss = F.cross_entropy(full_precision(logits), target, weight=weight, reduction="none")           # l (B,)
    return ((1 - torch.exp(-loss)) ** gamma * loss).mean()                                            # (5)


class PaCoLoss(nn.Module):
    """Equations (6) to (8). counts (K,): training images per class; the published CIFAR-100 values are the defaults."""

    def __init__(self, counts, alpha=0.01, beta=1.0, gamma=1.0, temperature=0.05):
        super().__init__()
        counts = torch.as_tensor(counts, dtype=torch.float64)
        self.register_buffer("log_prior", (counts / counts.sum()).log().float())                      # ln pi_c (K,)
        self.alpha, self.beta, self.gamma, self.temperature = alpha, beta, gamma, temperature

    def forward(self, logits, v, target, bank, bank_labels):
        """logits (B,K), anchors v (B,d), target (B,), bank (A,d) whose first B rows are v, labels (A,) -> scalar.

        A label of -1 marks a row that is nobody's positive (an empty place in the queue).
        """
        with torch.autocast(v.device.type, enabled=False):
            s = full_precision(logits) + self.log_prior                                               # (6) (B,K)
            t = full_precision(v) @ full_precision(bank).T / self.temperature                         # (6) (B,A)
        itself = torch.eye(*t.shape, dtype=torch.bool, device=t.device)
        positive = (target[:, None] == bank_labels) & ~itself                                         # P_i as a mask (B,A)
        contrast = t.masked_fill(itself, -torch.inf).logsumexp(dim=1)
        log_d = torch.logaddexp(s.logsumexp(dim=1), contrast + torch.tensor(self.gamma).log())        # (7) ln D_i (B,)
        class_term = s.gather(1, target[:, None])[:, 0] - log_d
        pair_terms = ((t - log_d[:, None]) * positive).sum(dim=1)
        weight = self.beta + self.alpha * positive.sum(dim=1)
        return -((self.beta * class_term + self.alpha * pair_terms) / weight).mean()                  # (8)


class PaCo(nn.Module):
    """What PaCo puts around a network while it trains: projections, the key encoder and the queue (as MoCo, 1911.05722).

    A step: keys() once, then forward() and PaCoLoss (twice under SAM, with the same keys), then enqueue() once.

    net: network whose call with return_features=True gives (logits (B,K), features (B,num_features)). dim: of v and the keys.
    queue: keys remembered. momentum: share of its old weights that the key encoder keeps in a step. The queue starts with rows
    of zeros, at right angles to everything, and labels -1, nobody's positive (published: random rows and labels).
    """

    def __init__(self, net, num_features, dim=32, queue=1024, momentum=0.999):
        super().__init__()
        self.momentum = momentum
        self.net = net
        self.projection = nn.Sequential(nn.Linear(num_features, num_features), nn.BatchNorm1d(num_features),
                                        nn.ReLU(inplace=True), nn.Linear(num_features, dim))
        self.key_net = copy.deepcopy(self.net).requires_grad_(False)
        self.key_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(queue, dim))                                        # newest first
        self.register_buffer("queue_labels", torch.full((queue,), -1))

    @staticmethod
    def unit(projection, features):
        with torch.autocast(features.device.type, enabled=False):         # at T = 0.05 a cosine in bfloat16 is too coarse
            return F.normalize(projection(full_precision(features)), dim=1)

    def forward(self, images):
        """Query view (B,3,S,S) in [0,1] -> logits (B,K), anchors v (B,dim) of length 1."""
        logits, features = self.net(images, return_features=True)
        return logits, self.unit(self.projection, features)

    @torch.no_grad()
    def keys(self, images):
        """Let the key encoder follow the query encoder by one step, then encode: key view -> keys (B,dim) of length 1.

        Only parameters follow. BatchNorm in the key encoder normalises with its own batch, like the query encoder's, so its
        running statistics, which its own passes move, are never used.
        """
        for follower, leader in ((self.key_net, self.net), (self.key_projection, self.projection)):
            torch._foreach_lerp_(list(follower.parameters()), list(leader.parameters()), 1 - self.momentum)
        _, features = self.key_net(images, return_features=True)
        return self.unit(self.key_projection, features)

    def bank(self, v, keys, labels):
        """What anchors are contrasted with: (2B+queue,dim) and the labels (2B+queue,); gradients reach v."""
        return torch.cat([v, keys, self.queue]), torch.cat([labels, labels, self.queue_labels])

    @torch.no_grad()
    def enqueue(self, keys, labels):
        """Put a step's keys (n,dim) and labels (n,), of all processes, at the front; as many old ones drop off the end."""
        self.queue.copy_(torch.cat([keys, self.queue])[:len(self.queue)])
        self.queue_labels.copy_(torch.cat([labels, self.queue_labels])[:len(self.queue)])
