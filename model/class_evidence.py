"""Evidence for unseen classes without a label of them: ImageNet's names, and a multiple-instance classifier.

ImageNet names come from ConSE (Norouzi et al., ICLR 2014): an image of a class that a classifier does not know lies, in
the space of words, among the classes that it takes the image for. Here for every cell of the trunk's features.

A multiple-instance classifier knows which class an image shows, and not where: a class's logit of the image is
log mean exp over its cells (Pinheiro & Collobert, CVPR 2015). It learns to reject every cell of the other images.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 8192
"""Rows that are worked on at a time: copies of a whole data set's features would be gigabytes."""

BATCH = 4096
"""Cells a step, at most, of whatever is fitted by steps."""


class ImageNetNames(nn.Module):
    """Evidence of ImageNet's categories i, of probability p_i, for unseen classes u, in two forms.

    sum_i p_i s_iu, to be averaged over a cluster, and the sharper log sum_i p_i exp(3 z_iu) / mean_j exp(3 z_ju) for a
    single cell, where z is the similarity s standardised for each class.

    Args:
        similarity: float [1000, U], of the names of categories and of unseen classes.
    """

    def __init__(self, similarity: torch.Tensor):
        super().__init__()
        standard = (similarity - similarity.mean(dim=0)) / similarity.std(dim=0).clamp(min=1e-6)
        weight = torch.exp(3 * standard)
        self.register_buffer("similarity", similarity)
        self.register_buffer("weight", weight / weight.mean(dim=0))

    def forward(self, categories: torch.Tensor) -> torch.Tensor:
        """M categories and their probabilities, [P, 2 M] -> both forms, less their means over the classes, [P, 2 U]."""
        index, probability = categories.chunk(2, dim=1)

        def mean(table: torch.Tensor) -> torch.Tensor:
            return (table[index.long()] * probability[..., None]).sum(dim=1)

        return torch.cat([centred(mean(self.similarity)), centred((mean(self.weight) + 1e-3).log())], dim=1)


def centred(evidence: torch.Tensor) -> torch.Tensor:
    """Evidence [P, U] less each row's mean."""
    return evidence - evidence.mean(dim=1, keepdim=True)


def log_mean_exp(logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Logits of cells [N, P, U], of which `valid` (bool [N, P]) count -> logits of images [N, U]."""
    total = logits.masked_fill(~valid[..., None], -1e4).logsumexp(dim=1)
    return total - valid.sum(dim=1, keepdim=True).clamp(min=1).log()


def fit_multiple_instance(
    classifier: nn.Linear,
    bags: tuple[torch.Tensor, torch.Tensor],
    image_class: torch.Tensor,
    negatives: tuple[torch.Tensor, torch.Tensor],
    draw: torch.Generator,
    steps: int,
) -> None:
    """Fits the multiple-instance classifier from zero: 16 images and as many rejected cells a step.

    Args:
        classifier: C -> U.
        bags: features [N, P, C] of images and which of their cells are valid, bool [N, P].
        image_class: int64 [N] in [0, U). Images are drawn by its count ** -0.5.
        negatives: features [R, C] and the rows among them that show no unseen class, int64.
        draw: of the images and cells.
        steps: of the optimiser.
    """
    (features, valid), (rows, rejected) = bags, negatives
    share = image_class.bincount(minlength=classifier.out_features).clamp(min=1).float().pow(-0.5)[image_class].cpu()
    nn.init.zeros_(classifier.weight)
    nn.init.constant_(classifier.bias, -3.0)  # most cells show no unseen class

    def loss() -> torch.Tensor:
        n = torch.multinomial(share, 16, replacement=True, generator=draw).to(features.device)
        image = log_mean_exp(classifier(features[n].float()), valid[n])  # [16, U]
        cells = rejected[torch.randint(len(rejected), (min(BATCH, len(rejected)),), generator=draw).to(rows.device)]
        target = F.one_hot(image_class[n], image.shape[1]).float()
        positive = F.binary_cross_entropy_with_logits(image, target, reduction="none").sum(dim=1).mean()
        return positive + F.softplus(classifier(rows[cells].float())).sum(dim=1).mean()

    fit_by_steps(classifier.parameters(), loss, steps, learning_rate=5e-3)


def fit_by_steps(
    parameters: Iterable[nn.Parameter], loss: Callable[[], torch.Tensor], steps: int, learning_rate: float
) -> None:
    """Lowers `loss`, which draws a new sample each time, by AdamW with a rate that falls to 0."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            schedule.step()
    for parameter in parameters:
        parameter.requires_grad_(False)


def in_chunks(function: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """`function` of features [..., C] of any precision, in float32 and `CHUNK` rows at a time."""
    rows = torch.cat([function(x.float()) for x in features.flatten(0, -2).split(CHUNK)])
    return rows.view(*features.shape[:-1], rows.shape[-1])


def mean_by_group(group: torch.Tensor, values: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Mean of `values` [P, ...] in each group (int64 [P]), [num_groups, ...]; 0 for an empty one."""
    total = values.new_zeros(num_groups, *values.shape[1:]).index_add_(0, group, values)
    size = group.bincount(minlength=num_groups).clamp(min=1)
    return total / size.view(-1, *[1] * (values.dim() - 1))
