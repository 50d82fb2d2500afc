"""What the evidence for unseen classes is made of: ImageNet's names, clusters, and fitting by steps.

ImageNet names come from ConSE (Norouzi et al., ICLR 2014): an image of a class that a classifier does not know lies, in
the space of words, among the classes that it takes the image for. Here for every cell of the trunk's features.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 8192  # rows that are worked on at a time: copies of a whole data set's features would be gigabytes
BATCH = 4096  # cells a step, at most, of whatever is fitted by steps


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
        self.register_buffer("tables", torch.stack([similarity, weight / weight.mean(dim=0)], dim=1))  # [1000, 2, U]

    def forward(self, categories: torch.Tensor) -> torch.Tensor:
        """M categories and their probabilities, [P, 2 M] -> both forms, less their means over the classes, [P, 2 U]."""
        index, probability = categories.chunk(2, dim=1)
        mean = (self.tables[index.long()] * probability[..., None, None]).sum(dim=1)
        evidence = torch.stack([mean[:, 0], (mean[:, 1] + 1e-3).log()], dim=1)
        return (evidence - evidence.mean(dim=2, keepdim=True)).flatten(1)


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
    """Mean of `values` [P, D] in each group (int64 [P]), [num_groups, D]; 0 for an empty one."""
    total = values.new_zeros(num_groups, values.shape[1]).index_add_(0, group, values)
    return total / group.bincount(minlength=num_groups).clamp(min=1)[:, None]


def kmeans(points: torch.Tensor, num_clusters: int, iterations: int = 10) -> torch.Tensor:
    """Spherical k-means: unit centroids [num_clusters, C] of unit points [P, C] in random order."""
    centroids = points[torch.arange(num_clusters, device=points.device) % len(points)]
    for _ in range(iterations):
        nearest = (points @ centroids.T).argmax(dim=1)
        centroids = F.normalize(mean_by_group(nearest, points, num_clusters), dim=1)
    return centroids
