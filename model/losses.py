"""The losses of both stages, as pure functions of logits.

Logits are [N, K, H, W] with the seen classes first; `valid` is bool [N, H, W]. A mean over no pixel is 0.

Where several processes share a batch, `joined` makes of a process's count the sum over all of them (with a gradient,
where it has one). Then what a loss returns is the process's part: the sum of these is the loss of the whole batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

EPSILON = 1e-5
"""Keeps the bias loss finite where no probability is left for the unseen classes."""

Joined = Callable[[torch.Tensor], torch.Tensor]
"""Turns the number (or the sum of weights) of the pixels that a loss sees into what their sum is divided by."""


def alone(count: torch.Tensor) -> torch.Tensor:
    """The `joined` of a process that has the batch for itself: a mean over its pixels."""
    return count


def undivided(count: torch.Tensor) -> torch.Tensor:
    """The `joined` that makes of a mean over pixels their sum, as a block of a batch's pixels gives it."""
    return torch.ones_like(count)


def cross_entropy(
    logits: torch.Tensor, label: torch.Tensor, ignore_index: int = 255, joined: Joined = alone
) -> torch.Tensor:
    """Mean cross-entropy over the labelled pixels; all K classes compete.

    Args:
        logits: [N, K, H, W].
        label: integer [N, H, W] of class indices; `ignore_index` is left out.
        joined: sums a count over processes.

    Returns:
        A scalar, 0 (with a gradient of 0) where no pixel is labelled.
    """
    label = label.long()
    if torch.are_deterministic_algorithms_enabled():  # a GPU has no such sum over pixels in one go
        loss = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="none").sum()
    else:
        loss = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="sum")
    return loss / joined((label != ignore_index).sum()).clamp(min=1)


def bias_loss(
    logits: torch.Tensor,
    num_seen: int,
    valid: torch.Tensor,
    gate: torch.Tensor | None = None,
    keep_shape: bool = False,
    joined: Joined = alone,
) -> torch.Tensor:
    """B = mean over valid pixels of -log( sum over unseen c of softmax_c + 1e-5 ).

    It pulls probability from the seen to the unseen classes without saying to which of them.

    Args:
        logits: [N, K, H, W].
        num_seen: the first so many of the K classes are seen.
        valid: bool [N, H, W].
        gate: [N, H, W] in [0, 1], the weight of each pixel in the mean, see `known_gate`; None: all count alike. Where
            the weights add up to less than one pixel the sum is not divided, so that B fades out with them.
        keep_shape: give all unseen logits of a pixel the same gradient (the mean of those of B), so that a step on them
            leaves their shares of the unseen probability alone. Plain B feeds most the one that is highest already.
        joined: sums a count over processes.

    Returns:
        A scalar, 0 (with a gradient of 0) where no pixel is valid.
    """
    if keep_shape:
        seen, unseen = logits[:, :num_seen], logits[:, num_seen:]
        mean = unseen.mean(dim=1, keepdim=True)
        logits = torch.cat([seen, unseen.detach() + (mean - mean.detach())], dim=1)  # the values are as before
    probability = logits.softmax(dim=1)[:, num_seen:].sum(dim=1)  # of the unseen classes together, [N, H, W]
    loss = -torch.log(probability + EPSILON)
    weight = valid if gate is None else valid * gate
    return (loss * weight).sum() / joined(weight.sum()).clamp(min=1)


@torch.no_grad()
def known_gate(logits: torch.Tensor, num_seen: int, gamma: float) -> torch.Tensor:
    """How little the network, calibrated, believes in any seen class: where B may act, without a mask.

    gate = 1 - max( 0, max over seen c of softmax_c - gamma ) / (1 - gamma)

    Args:
        logits: [N, K, H, W].
        num_seen: the first so many of the K classes are seen.
        gamma: in [0, 1]; a seen class that is no surer than that does not close the gate at all.

    Returns:
        Weights [N, H, W] in [0, 1], without a gradient: 0 where a seen class is certain.
    """
    known = logits.softmax(dim=1)[:, :num_seen].amax(dim=1)  # [N, H, W]
    return 1 - (known - gamma).clamp(min=0) / max(1 - gamma, EPSILON)


def semantic_consistency(
    projection: torch.Tensor,
    label: torch.Tensor,
    class_embeddings: torch.Tensor,
    ignore_index: int = 255,
    joined: Joined = alone,
) -> torch.Tensor:
    """Mean squared difference between the cosines of class prototypes and the cosines of their words.

    A prototype is the mean projection of a class's labelled pixels in the batch. Classes that no label shows are found
    by their words alone, so pictures should lie to each other as words do. The idea is the semantic consistency loss of
    JoEm (Baek et al., ICCV 2021), which compares softmaxes of distances; cosines need no temperature, and two classes.

    Args:
        projection: [N, D, h, w].
        label: integer [N, H, W] of class indices, read at the h x w points that upsampling with align_corners starts
            from; `ignore_index` is left out.
        class_embeddings: [K, D].
        joined: sums over processes, with a gradient.

    Returns:
        A scalar, 0 (with a gradient of 0) where fewer than two classes are labelled.
    """
    rows, columns = (
        torch.linspace(0, size - 1, points, device=label.device).round().long()
        for size, points in zip(label.shape[-2:], projection.shape[-2:])
    )
    label = label[:, rows][:, :, columns].flatten()  # [P], P = N h w
    classes = torch.arange(len(class_embeddings), device=label.device)
    member = (label == classes[:, None]).to(projection.dtype)  # [K, P]; nothing else is a class, so void is out
    count = joined(member.sum(dim=1, keepdim=True))  # [K, 1]
    prototype = joined(member @ projection.movedim(1, -1).flatten(0, -2)) / count.clamp(min=1)  # [K, D]
    pair = (count > 0) & (count > 0).T & (classes != classes[:, None])  # [K, K]
    units = F.normalize(prototype, dim=1), F.normalize(class_embeddings, dim=1)
    of_pixels, of_words = (unit @ unit.T for unit in units)
    loss = ((of_pixels - of_words).square() * pair).sum() / pair.sum().clamp(min=1)
    return loss / joined(torch.ones_like(loss))  # every process has it: each gives its share


@torch.no_grad()
def pseudo_labels(
    logits: torch.Tensor,
    num_seen: int,
    valid: torch.Tensor,
    keep: float = 0.6,
    ignore_index: int = 255,
    balanced: bool = False,
    joined: Joined = alone,
) -> torch.Tensor:
    """The best unseen class of each pixel, kept where its logit is among the highest.

    Args:
        logits: [N, K, H, W].
        num_seen: the first so many of the K classes are seen.
        valid: bool [N, H, W], the pixels to choose from.
        keep: share of pixels that get a label; equal logits at the cut are all kept.
        balanced: False keeps the highest `keep` of the batch's valid pixels, as published; True the highest `keep` of
            each class's own, so that a class whose logits are lower than another's is not left without a label
            (Zou et al., class-balanced self-training, ECCV 2018).
        joined: sums a count over processes, whose batches get one cut.

    Returns:
        Class indices, int64 [N, H, W], in [num_seen, K) or `ignore_index`.
    """
    best = best_unseen(logits, num_seen)
    return choose_labels(*best, num_seen, logits.shape[1], valid, keep, ignore_index, balanced, joined)


def best_unseen(logits: torch.Tensor, num_seen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest unseen logit of each pixel and whose it is, float32 and int64 [N, H, W], counted from `num_seen`."""
    return logits[:, num_seen:].float().max(dim=1)


def choose_labels(
    score: torch.Tensor, unseen: torch.Tensor, num_seen: int, num_classes: int, valid: torch.Tensor, keep: float,
    ignore_index: int = 255, balanced: bool = False, joined: Joined = alone,
) -> torch.Tensor:  # fmt: skip
    """`pseudo_labels`, from what `best_unseen` gives."""
    groups = [valid & (unseen == c) for c in range(num_classes - num_seen)] if balanced else [valid]
    chosen = torch.stack([_highest(score, group, keep, joined) for group in groups]).any(dim=0)
    return torch.where(chosen, unseen + num_seen, ignore_index)


def _highest(score: torch.Tensor, among: torch.Tensor, share: float, joined: Joined) -> torch.Tensor:
    """Where `score` is one of the highest `share` of its values `among`; bool, of the same shape."""
    kept = (joined(among.sum()) * share).long()
    return among & (score >= _value_of_rank(score.masked_fill(~among, -torch.inf), kept, joined)) & (kept > 0)


def _value_of_rank(score: torch.Tensor, rank: torch.Tensor, joined: Joined) -> torch.Tensor:
    """The `rank`-th highest value (1: the highest) of float32 `score`, a scalar; for rank 0 no number.

    It is found bit by bit, by counting how many values are not below it. So processes need to add up only counts, the
    device is never asked how many pixels there are, and on a CPU it takes a fraction of the time of sorting.
    """
    bits = score.view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats that they stand for
    cut = torch.full((), -(2**31), dtype=torch.int64, device=score.device)
    for bit in range(31, -1, -1):
        higher = cut + 2**bit
        cut = torch.where(joined((order >= higher).sum()) >= rank, higher, cut)
    cut = torch.where(cut < 0, cut ^ 0x7FFFFFFF, cut)
    return cut.to(torch.int32).view(torch.float32)
