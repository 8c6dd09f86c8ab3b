"""The public code of each method, rewritten in PyTorch as a reference for tests.

The functions follow the cited files in value and gradient. Images and feature maps are float32
[B, C, h, w], linear weights [out, in] and convolution weights [out, in, kh, kw], as in PyTorch.
"""

import math

import torch
import torch.nn.functional as F


def torch_linear_bound(in_features):
    """Returns the bound b of U(-b, b), from which torch.nn.Linear draws its weight and bias.

    Source: pytorch/pytorch, torch/nn/modules/linear.py, `Linear.reset_parameters`.
    """
    return 1 / math.sqrt(in_features)


# DELTA


def delta_rises(network, conv, batches):
    """Returns the mean rise of the loss, [C], when one filter of `conv` at a time is zeroed.

    `batches` yields (images, labels); `network` maps images to logits and is in evaluation mode.
    Source: lixingjian/DELTA, channel_eval.py, `feature_weight` (4 batches of 32 images).
    """
    weight = conv.weight.data
    total, count = torch.zeros(len(weight)), 0
    with torch.no_grad():
        for images, labels in batches:
            whole = F.cross_entropy(network(images), labels)
            for channel in range(len(weight)):
                kept = weight[channel].clone()
                weight[channel] = 0
                total[channel] += F.cross_entropy(network(images), labels) - whole
                weight[channel] = kept
            count += 1
    return total / count


def delta_attention(rises):
    """Turns the rises of the loss of one layer, [C], into its channel weights, [C], which sum to 1.

    Source: lixingjian/DELTA, train.py, where `channel_weights` is filled.
    """
    standardized = (rises - rises.mean()) / rises.std(correction=0)
    return (standardized / 5).softmax(dim=0)


def delta_penalty(maps, maps0, weights):
    """Returns the penalty before its coefficient alpha: half a sum over layers, images, channels.

    `maps` and `maps0` are lists of [B, C, h, w] (convolutions' outputs before batch norm) and
    `weights` is a list of [C]. Source: lixingjian/DELTA, train.py, `reg_att_fea_map`; the same in
    thuml/Transfer-Learning-Library, tllib/regularization/delta.py.
    """
    total = torch.zeros(())
    for ours, theirs, weight in zip(maps, maps0, weights, strict=True):
        _, channels, height, width = ours.shape
        distances = (ours - theirs.detach()).square().sum(dim=(2, 3)) @ weight
        total = total + distances.sum() * channels / (2 * height * width)
    return total


def delta_head_penalty(weight, bias):
    """Returns half the squared norm of the head's weight and bias, before the coefficient beta.

    Source: lixingjian/DELTA, train.py, `reg_classifier`.
    """
    return (weight.square().sum() + bias.square().sum()) / 2


# MARS


def mars_project(weight, weight0, gamma):
    """Scales down each output row's difference to `weight0` whose 1-norm exceeds gamma.

    Each row is scaled by itself; pass None as `weight0` for the head, which is bounded around 0.
    Source: henrygouk/mars-finetuning, lipschitz.py, `LInfLipschitzConstraint`. A depthwise kernel
    has one row for each channel, as in PaddleTransfer; Keras's layout makes it a single row there.
    """
    start = torch.zeros_like(weight) if weight0 is None else weight0
    difference = (weight - start).flatten(1)
    norm = difference.abs().sum(dim=1, keepdim=True)
    return start + (difference / (norm / gamma).clamp(min=1)).view_as(weight)


def mars_project_batch_norm(scale, variance, scale0, variance0, gamma, eps=1e-6):
    """Keeps scale / sqrt(variance) of each channel within gamma of its value at the start.

    All tensors are [C]; the variances are the running ones. Source: henrygouk/mars-finetuning,
    lipschitz.py, `BatchNormLipschitzConstraint`.
    """
    deviation, deviation0 = (variance + eps).sqrt(), (variance0 + eps).sqrt()
    centre = scale0 / deviation0
    return (centre + (scale / deviation - centre).clamp(-gamma, gamma)) * deviation


def mars_sp_penalty(weights, weights0):
    """Returns the sum over layers of the largest row's 1-norm of weight - weight0 (MARS-SP).

    An entry of `weights0` is None for the head. Source: henrygouk/mars-finetuning, lipschitz.py,
    `_linf_norm` and `_create_penalty`.
    """
    total = torch.zeros(())
    for weight, weight0 in zip(weights, weights0, strict=True):
        difference = weight if weight0 is None else weight - weight0
        total = total + difference.abs().flatten(1).sum(dim=1).max()
    return total


# MMD


def mmd_loss(features, features0):
    """Returns the squared maximum mean discrepancy of two samples [n, D], diagonals included.

    The kernel is a sum of five Gaussians. Their bandwidth is computed from the features, and the
    gradient flows through it.
    Source: PaddlePaddle/PaddleTransfer, paddletransfer/finetuning/img_cls/mmd.py, `MMD_loss`.
    """
    n = len(features)
    rows = torch.cat([features, features0])
    distances = (rows[:, None] - rows[None, :]).square().sum(dim=-1)
    bandwidth = distances.sum() / (2 * n * (2 * n - 1))
    kernel = sum(torch.exp(-distances / (bandwidth * 2.0**power)) for power in range(-2, 3))
    signs = torch.cat([torch.ones(n), -torch.ones(n)])
    return signs @ kernel @ signs / n**2


def mmd_halves(maps):
    """Splits the pooled maps [B, C, h, w] of one batch into the two samples that are compared.

    An odd last image is dropped. Source: PaddlePaddle/PaddleTransfer,
    paddletransfer/finetuning/img_cls/mmd.py, `FinetuneMMD.loss`.
    """
    half = len(maps) // 2
    pooled = maps.mean(dim=(2, 3))
    return pooled[:half], pooled[half : 2 * half]


# SMILE


def smile_lambda(lam):
    """Reflects the one mixing weight of a batch, so that it is at least 1/2.

    Source: lixingjian/SMILE, finetune.py, `mixup_data`.
    """
    return max(lam, 1 - lam)


def smile_teacher(teacher, student, iteration, momentum=0.999):
    """Returns the teacher's parameters after an iteration; it moves at every tenth, from 0 on.

    Both are dicts of parameters by name, without batch statistics; those under 'fc.' stay. The
    student's are those before the optimizer's step. Source: lixingjian/SMILE, finetune.py,
    `mean_teacher_update`.
    """
    if iteration % 10:
        return dict(teacher)
    return {
        name: value if name.startswith('fc.') else torch.lerp(student[name], value, momentum)
        for name, value in teacher.items()
    }


def smile_loss(
    logits,
    source_logits,
    maps,
    teacher_maps,
    teacher_logits,
    labels,
    permutation,
    lam,
    feature_weight=0.01,
    source_weight=0.1,
):
    """Returns the loss of a mixed batch.

    `logits` [B, K], `source_logits` [B, K_0] and `maps` [B, C, h, w] are the student's for the
    mixed images; `teacher_maps` and `teacher_logits` are the teacher's for the unmixed ones. The
    distance of the maps is one norm over the batch. Source: lixingjian/SMILE, finetune.py,
    `FinetuneSMILE`.
    """
    target_loss = mixup_loss(logits, labels, labels[permutation], lam)
    mixed_maps = lam * teacher_maps + (1 - lam) * teacher_maps[permutation]
    distance = torch.linalg.vector_norm(mixed_maps.detach() - maps)
    soft = teacher_logits.detach().softmax(dim=1)
    mixed_soft = lam * soft + (1 - lam) * soft[permutation]
    source_loss = F.cross_entropy(source_logits, mixed_soft)
    positions = maps.shape[2] * maps.shape[3]
    return target_loss + feature_weight * distance / positions + source_weight * source_loss


# RIFLE


def rifle_head_lr(step, steps, peak, periods, cyclic=False):
    """Returns the head's learning rate: the backbone's cosine, unless `cyclic`.

    The source counts in epochs, and rounds their number down to a multiple of `periods`. Source:
    lixingjian/RIFLE, train.py, `train_model` (`--fc_lr_util` is 'none' by default).
    """
    length = steps // periods
    done = (step % length) / length if cyclic else step / (length * periods)
    return peak * (1 + math.cos(math.pi * done)) / 2


def rifle_reinitializes(step, steps, periods):
    """Tells whether the head is drawn anew after `step` (from 0), as torch.nn.Linear draws it.

    The source also draws it after the last epoch, once the test is over. Source: lixingjian/RIFLE,
    train.py, end of `train_model`.
    """
    return periods > 1 and (step + 1) % (steps // periods) == 0


# L2-SP


def l2sp_penalty(params, start, alpha, beta, everything=False):
    """Returns alpha / 2 ||w - w0||^2 + beta / 2 ||w_head||^2 over weights only.

    `params` and `start` are dicts by PyTorch name; the head's begin with 'fc.'. Vectors (biases,
    batch norm) count only if `everything`. Source: holyseven/TransferLearningClassification,
    model/network_base.py, `_decay`: mode 1, or mode 101 for everything.
    """
    backbone, head = torch.zeros(()), torch.zeros(())
    for name, value in params.items():
        if value.ndim == 1 and not everything:
            continue
        if name.startswith('fc.'):
            head = head + value.square().sum()
        else:
            backbone = backbone + (value - start[name]).square().sum()
    return alpha / 2 * backbone + beta / 2 * head


# StochNorm


def stochnorm2d(x, mean, variance, scale, bias, chosen, momentum=0.1, eps=1e-5):
    """Normalizes x [B, C, h, w] in training mode; returns (y, new mean, new variance).

    `chosen` [C] is 1 for channels normalized by the batch's statistics and 0 for those normalized
    by the running ones from before this call. The running statistics of every channel are updated,
    with the unbiased variance. Source:
    thuml/StochNorm, module/stoch_norm.py, `_StochNorm.forward`.
    """
    count = x.numel() // x.shape[1]
    batch_variance, batch_mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    used_mean = torch.where(chosen.bool(), batch_mean, mean)
    used_variance = torch.where(chosen.bool(), batch_variance, variance)

    def by_channel(vector):
        return vector[None, :, None, None]

    normalized = (x - by_channel(used_mean)) * by_channel((used_variance + eps).rsqrt())
    y = normalized * by_channel(scale) + by_channel(bias)
    unbiased = batch_variance.detach() * count / (count - 1)
    new_mean = (1 - momentum) * mean + momentum * batch_mean.detach()
    return y, new_mean, (1 - momentum) * variance + momentum * unbiased


# Bi-Tuning


def bituning_encode(features, projection):
    """Returns (h [B, D + 1], z [B, d]), rows of length 1; h has a one appended beforehand.

    Source: thuml/Transfer-Learning-Library, tllib/regularization/bi_tuning.py, `Classifier`.
    """
    ones = torch.ones(len(features), 1)
    return F.normalize(torch.cat([features, ones], dim=1)), F.normalize(projection)


def bituning_losses(h, z, h_key, z_key, labels, weight, bias, queues, temperature=0.07):
    """Returns (loss of z, loss of h, new queues): z is contrasted before the keys are enqueued.

    `h`, `z` and the keys are as from `bituning_encode`; `queues` is (h [K, L, D + 1],
    z [K, L, d], next place int [K]). `weight` [K, D] and `bias` [K] are the head's. Each loss is
    the divergence from the uniform distribution over the L + 1 positives, which is the
    cross-entropy less log(L + 1). Source: thuml/Transfer-Learning-Library,
    tllib/regularization/bi_tuning.py, `BiTuning.forward`, and examples/task_adaptation/
    image_classification/bi_tuning.py.
    """
    length = queues[0].shape[1]

    def divergence(current, queue_scores):
        losses = []
        for score, row, label in zip(current, queue_scores, labels, strict=True):
            log_total = torch.cat([score[None], row.flatten()]).div(temperature).logsumexp(0)
            positives = torch.cat([score[None], row[label]]) / temperature
            losses.append(log_total - positives.mean())
        return torch.stack(losses).mean() - math.log(length + 1)

    loss_z = divergence((z * z_key.detach()).sum(dim=1), torch.einsum('bd,kld->bkl', z, queues[1]))

    queue_h, queue_z, places = (queue.clone() for queue in queues)
    for i, label in enumerate(labels.tolist()):
        place = int(places[label])
        queue_h[label, place], queue_z[label, place] = h_key[i].detach(), z_key[i].detach()
        places[label] = (place + 1) % length

    columns = F.normalize(torch.cat([weight, bias[:, None]], dim=1).detach())
    own = columns[labels]
    loss_h = divergence((h * own).sum(dim=1), torch.einsum('bd,kld->bkl', own, queue_h))
    return loss_z, loss_h, (queue_h, queue_z, places)


# Co-Tuning, LWF, BSS, Co-Train


def cotuning_relationship(logits, labels, num_classes, scale=0.8840456604957581):
    """Returns p(y_s | y_t), [K_t, K_0]: the mean calibrated probabilities of each target class.

    The default scale is the one of ImageNet's ResNet-50. Source: thuml/CoTuning,
    module/relationship_learning.py, `direct_relationship_learning`;
    thuml/Transfer-Learning-Library, tllib/regularization/co_tuning.py, has scale 1.
    """
    probabilities = (scale * logits).softmax(dim=1)
    return torch.stack([probabilities[labels == c].mean(dim=0) for c in range(num_classes)])


def cotuning_loss(source_logits, relationship, labels):
    """Returns the cross-entropy with the translated labels, before its weight of 2.3.

    Source: thuml/CoTuning, train.py, `imagenet_loss`.
    """
    return -(relationship[labels] * source_logits.log_softmax(dim=1)).sum(dim=1).mean()


def lwf_loss(logits, teacher_logits, temperature):
    """Returns the mean divergence of the softened outputs, before its weight; no factor T^2.

    It is the cross-entropy less the teacher's entropy; T = 3 and weight 4 by default. Source:
    thuml/Transfer-Learning-Library, tllib/regularization/knowledge_distillation.py.
    """
    log_student = (logits / temperature).log_softmax(dim=1)
    log_teacher = (teacher_logits / temperature).log_softmax(dim=1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1).mean()


def bss_penalty(features, k):
    """Returns the sum of the k smallest squared singular values of [B, D], before its weight.

    Source: thuml/Batch-Spectral-Shrinkage, BSS.py (k = 1, weight 0.001).
    """
    return torch.linalg.svdvals(features)[-k:].square().sum()


def cotrain_loss(target_logits, target_labels, source_logits, source_labels):
    """Returns half of each domain's mean cross-entropy; the source head has all source classes.

    Source: ZYYSny/Selective-Joint-Fine-tuning, selective_joint_ft/joint_training/deploy.prototxt.
    """
    target_loss = F.cross_entropy(target_logits, target_labels)
    return (target_loss + F.cross_entropy(source_logits, source_labels)) / 2


# Mixup, CutMix


def mixup_batch(images, labels, lam, permutation):
    """Mixes a batch with itself by one lambda; returns (images, labels, the others' labels).

    Source: facebookresearch/mixup-cifar10, train.py, `mixup_data` (lambda is not reflected).
    """
    mixed = lam * images + (1 - lam) * images[permutation]
    return mixed, labels, labels[permutation]


def mixup_loss(logits, labels, other_labels, lam):
    """Returns the mean cross-entropy with both labels, weighted by lambda and 1 - lambda.

    CutMix uses the same loss. Source: facebookresearch/mixup-cifar10, train.py, `mixup_criterion`.
    """
    return lam * F.cross_entropy(logits, labels) + (1 - lam) * F.cross_entropy(logits, other_labels)


def cutmix_box(size_w, size_h, lam, cx, cy):
    """Returns the box (x1, y1, x2, y2), ends excluded, around an integer centre, clipped.

    Sides are rounded down to whole pixels, half sides again. Source: clovaai/CutMix-PyTorch,
    train.py, `rand_bbox`, where x is the first of the two spatial axes.
    """

    def interval(size, centre):
        half = int(size * math.sqrt(1 - lam)) // 2
        return max(centre - half, 0), min(centre + half, size)

    (x1, x2), (y1, y2) = interval(size_w, cx), interval(size_h, cy)
    return x1, y1, x2, y2


def cutmix_lam(box, size_w, size_h):
    """Returns the share of the image outside the box. Source: clovaai/CutMix-PyTorch, train.py."""
    x1, y1, x2, y2 = box
    return 1 - (x2 - x1) * (y2 - y1) / (size_w * size_h)


def cutmix_batch(images, box, permutation):
    """Pastes the same box of the permuted images into the images [B, C, w, h].

    Source: clovaai/CutMix-PyTorch, train.py, `train` (one box a batch).
    """
    x1, y1, x2, y2 = box
    inside = torch.zeros(images.shape[2:], dtype=torch.bool)
    inside[x1:x2, y1:y2] = True
    return torch.where(inside, images[permutation], images)


# FSP


def fsp_loss(maps_s, maps_t):
    """Returns the sum over consecutive maps of the mean squared difference of the flows.

    The lists of [B, C, h, h] begin with the stem's output; the larger map of a pair is pooled to
    the smaller one's size, also where sides are odd. Source: HobbitLong/RepDistiller,
    distiller_zoo/FSP.py.
    """

    def flow(before, after):
        side = min(before.shape[2], after.shape[2])
        before, after = (F.adaptive_avg_pool2d(maps, side) for maps in (before, after))
        return torch.einsum('bihw,bjhw->bij', before, after) / side**2

    total = torch.zeros(())
    for i in range(len(maps_s) - 1):
        difference = flow(*maps_s[i : i + 2]) - flow(*maps_t[i : i + 2])
        total = total + difference.square().mean()
    return total


# Re-estimated batch statistics


def precise_bn(means, variances, batch_size):
    """Returns the mean and the biased variance, [C] each, of all values of N batches together.

    `means` and the unbiased `variances` are [N, C]; `batch_size` (one number or [N]) counts the
    values of a channel in a batch, over images and positions. Source: facebookresearch/fvcore,
    fvcore/nn/precise_bn.py, `_PopulationVarianceEstimator`.
    """
    count = torch.as_tensor(batch_size, dtype=means.dtype).expand(len(means))[:, None]
    share = count / count.sum()
    mean = (share * means).sum(dim=0)
    square = (share * (means.square() + variances * (count - 1) / count)).sum(dim=0)
    return mean, square - mean.square()
