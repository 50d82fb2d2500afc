"""Pseudo-labels of the target by a teacher: which pixels show an unseen class, and which one, pooled over clusters.

A class that nobody labels is still a cluster of pixels that look alike. The features of the ImageNet trunk, which
training does not move, put the target's pixels into clusters. A pixel is taken for unseen the more

    score = log r(cluster) + mean over the cluster of log u + log u(pixel)
    u     = 1 - highest probability of a seen class (or of the background where it is trained on)
    r     = share of the target's pixels in the cluster / share of the other images' pixels in it

so what the teacher knows from the source counts against it, and so does what images without an unseen class show as
well. Each cluster is assigned an unseen class: the one with the highest mean evidence over its pixels, by word
regression and ImageNet's names, which weigh the same. Each class then keeps the same share of the pixels that were
assigned to it (Zou et al., class-balanced self-training, ECCV 2018), so that a class of low scores gets labels too.
"""

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from model.backbone import Backbone
from model.class_evidence import CHUNK, ImageNetEvidence, standardise, with_constant, word_regression
from model.segmenter import Segmenter

CELLS = 100
"""Grid cells that are drawn from each image for clusters and thresholds."""

MOST_POINTS = 60_000
"""Of those cells, the most that k-means works on."""


class ClusterPseudoLabeler(nn.Module):
    """A frozen teacher that labels target pixels; its state belongs to the checkpoint.

    Args:
        student: the network; the teacher is a copy of it.
        num_seen: the first `num_seen` of its classes are seen (the background among them, if it is trained on).
        num_clusters: clusters of the target's features.
        keep: share of the pixels assigned to an unseen class that are labelled with it.
        keep_seen: share of all pixels, those with the lowest score, that are labelled with the teacher's seen class.
        rare_power: a pixel labelled with an unseen class weighs (mean count / the class's count) ** rare_power, at most
            5; one labelled with a seen class weighs 1.
        imagenet_evidence: added to that of `word_regression`; None: that alone.
        feature_extractor: gives the features of the clusters where the student's trunk is trained; None: a copy of the
            student's backbone.
    """

    def __init__(
        self,
        student: Segmenter,
        num_seen: int,
        num_clusters: int = 100,
        keep: float = 0.3,
        keep_seen: float = 0.5,
        rare_power: float = 0.5,
        imagenet_evidence: ImageNetEvidence | None = None,
        feature_extractor: Backbone | None = None,
    ):
        super().__init__()
        self.num_seen, self.imagenet_evidence = num_seen, imagenet_evidence
        self.keep, self.keep_seen, self.rare_power = keep, keep_seen, rare_power
        self.teacher = copy.deepcopy(student)
        self.feature_extractor = feature_extractor or self.teacher.backbone
        channels = self.feature_extractor.trunk_channels
        num_unseen = student.num_auxiliary + len(student.projection.class_embeddings) - num_seen
        self.register_buffer("feature_mean", torch.zeros(channels))
        self.register_buffer("feature_std", torch.ones(channels))
        self.register_buffer("centroids", torch.zeros(num_clusters, channels))
        self.register_buffer("cluster_class", torch.zeros(num_clusters, dtype=torch.long))
        self.register_buffer("cluster_evidence", torch.zeros(num_clusters))  # for that class
        self.register_buffer("cluster_score", torch.zeros(num_clusters))  # log r + mean of log u
        self.register_buffer("thresholds", torch.zeros(num_unseen))
        self.register_buffer("seen_threshold", torch.tensor(-torch.inf))
        self.register_buffer("class_weight", torch.ones(num_seen + num_unseen))
        self.requires_grad_(False).eval().to(next(student.parameters()).device, memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "ClusterPseudoLabeler":
        return super().train(False)  # a teacher never drops out

    @torch.no_grad()
    def fit(self, student: Segmenter, target: Iterable, others: Iterable, source: Iterable) -> None:
        """Makes the student the teacher, and clusters, their classes and thresholds from the data.

        Args:
            student: the network as stage 2 begins.
            target: batches of (image uint8 [N, 3, H, W], valid bool [N, H, W]) of the target images.
            others: the same of images known to show no unseen class; empty: r is 1.
            source: batches of (image uint8 [N, 3, H, W], label uint8 [N, H, W]), for `word_regression`.
        """
        self.teacher.load_state_dict(student.state_dict())
        features, logits, image = self._draw_cells(target, self._features_and_logits)
        self._make_clusters(features, others, source)
        cluster, uncertainty = self._cluster_of(features), log_uncertainty(logits, self.num_seen)
        self.cluster_score += mean_by_group(cluster, uncertainty, len(self.centroids))
        score, unseen, allowed = self._score(cluster, uncertainty, image)
        for c in range(len(self.thresholds)):
            scores = score[(unseen == c) & allowed]
            self.thresholds[c] = scores.quantile(1 - self.keep) if len(scores) else torch.inf
        if self.keep_seen:
            self.seen_threshold.copy_(score.quantile(self.keep_seen))
        labelled = unseen[allowed & (score >= self.thresholds[unseen])]
        count = labelled.bincount(minlength=len(self.thresholds)).clamp(min=1)
        self.class_weight[self.num_seen :] = (count.float().mean() / count).pow(self.rare_power).clamp(max=5)

    @torch.no_grad()
    def forward(
        self, image: torch.Tensor, valid: torch.Tensor, ignore_index: int = 255
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pseudo-labels of target images, where `valid`, and the weight of each pixel.

        Args:
            image: uint8 [N, 3, H, W].
            valid: bool [N, H, W].

        Returns:
            int64 and float32 [N, H, W].
        """
        features, logits = self._features_and_logits(image)  # [N, h, w, C], [N, h, w, K]
        cluster, uncertainty = self._cluster_of(features), log_uncertainty(logits, self.num_seen)  # [N, h, w] each
        inside = F.interpolate(valid[:, None].float(), size=cluster.shape[1:], mode="nearest-exact")[:, 0] > 0
        index = torch.arange(len(image), device=cluster.device)[:, None, None].expand_as(cluster)
        score, unseen, allowed = self._score(cluster, uncertainty, index, inside)
        label = torch.where(score <= self.seen_threshold, logits[..., : self.num_seen].argmax(-1), ignore_index)
        label = torch.where(allowed & (score >= self.thresholds[unseen]), unseen + self.num_seen, label)
        label = F.interpolate(label[:, None].float(), size=image.shape[-2:], mode="nearest-exact")[:, 0].long()
        label = label.masked_fill(~valid, ignore_index)
        return label, self.class_weight[label.masked_fill(label == ignore_index, 0)]

    def _features(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        """Trunk features [N, h, w, C] in training's precision."""
        with self.teacher.autocast(image.device):
            features = self.feature_extractor.features(image.contiguous(memory_format=torch.channels_last))
        return (features.permute(0, 2, 3, 1),)

    def _features_and_logits(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those and the teacher's logits of all classes [N, h, w, K]."""
        (features,), teacher = self._features(image), self.teacher
        with teacher.autocast(image.device):
            if self.feature_extractor is teacher.backbone:
                own = teacher.backbone.classifier(features.permute(0, 3, 1, 2))
            else:
                own = teacher.backbone(image.contiguous(memory_format=torch.channels_last))
        return features, teacher.projection(own.float()).permute(0, 2, 3, 1)

    def _draw_cells(
        self, batches: Iterable, compute: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], ignore_index: int = 255
    ) -> list[torch.Tensor]:
        """What `compute` gives, each [P, ...], of at most `CELLS` valid cells of each image, drawn by a fixed seed.

        Where a batch has labels in place of `valid`, valid is what is labelled, and the labels come next. The number of
        the image, [P], comes last.
        """
        draw, device = torch.Generator().manual_seed(0), self.centroids.device
        drawn = []
        for image, marks in batches:
            maps = list(compute(image.to(device)))  # [N, h, w, ...] each
            cells = F.interpolate(marks[:, None].float(), size=maps[0].shape[1:3], mode="nearest-exact")[:, 0]
            if marks.dtype != torch.bool:
                maps.append(cells.long().to(device))
            valid = cells > 0 if marks.dtype == torch.bool else cells != ignore_index
            for n, place in enumerate(valid.flatten(1)):
                place = place.nonzero()[:, 0]
                place = place[torch.randperm(len(place), generator=draw)[:CELLS]].to(device)
                drawn.append(
                    [*(values[n].flatten(0, 1)[place] for values in maps), place.new_full(place.shape, len(drawn))]
                )
        return [torch.cat(values) for values in zip(*drawn)]

    def _make_clusters(self, features: torch.Tensor, others: Iterable, source: Iterable) -> None:
        """Clusters of features [P, C], their classes, and r."""
        self.feature_mean.copy_(features.mean(0))
        self.feature_std.copy_(features.std(0).clamp(min=1e-6))
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MOST_POINTS]
        sample = self._normalise(features[order.to(features.device)])
        self.centroids.copy_(kmeans(sample, len(self.centroids)))
        cluster = self._cluster_of(features)
        in_target = cluster.bincount(minlength=len(self.centroids)).float()
        drawn = self._draw_cells(others, self._features)
        if drawn:
            in_others = self._cluster_of(drawn[0]).bincount(minlength=len(self.centroids)).float()
            shares = (in_target / in_target.sum() + 1e-5), (in_others / in_others.sum() + 1e-5)
            self.cluster_score.copy_(shares[0].log() - shares[1].log())
        to_unseen = self._word_regression(source)
        evidence = standardise(torch.cat([with_constant(self._centred(x)) @ to_unseen for x in features.split(CHUNK)]))
        if self.imagenet_evidence is not None:
            evidence = standardise(evidence + standardise(self.imagenet_evidence(features)))
        evidence = mean_by_group(cluster, evidence, len(self.centroids))
        best, unseen = evidence.max(dim=1)
        self.cluster_class.copy_(unseen)
        self.cluster_evidence.copy_(best)

    def _word_regression(self, source: Iterable) -> torch.Tensor:
        """The map of `word_regression` from centred features, by the labels of the source images."""
        features, label, _ = self._draw_cells(source, lambda image: (self._centred(*self._features(image)),))
        auxiliary = self.teacher.num_auxiliary
        words = self.teacher.projection.class_embeddings
        return word_regression(features, label, words, self.num_seen - auxiliary, auxiliary)

    def _centred(self, features: torch.Tensor) -> torch.Tensor:
        return (features.float() - self.feature_mean) / self.feature_std

    def _normalise(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(self._centred(features), dim=-1)

    def _cluster_of(self, features: torch.Tensor) -> torch.Tensor:
        """The nearest centroid of each row, [..., C] -> [...]."""
        rows = features.flatten(0, -2)
        nearest = [(self._normalise(x) @ self.centroids.T).argmax(-1) for x in rows.split(CHUNK)]
        return torch.cat(nearest).view(features.shape[:-1])

    def _score(
        self, cluster: torch.Tensor, uncertainty: torch.Tensor, image: torch.Tensor, inside: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The score of each cell, its unseen class counted from 0, and whether it may be labelled with that; all [...].

        At most one unseen class is labelled an image, since most images show one: that of the cell that fits best.

        Args:
            cluster, uncertainty: of each cell, [...].
            image: the number of each cell's image, int64 [...].
            inside: bool [...], the cells that count; None: all.
        """
        score, unseen = self.cluster_score[cluster] + uncertainty, self.cluster_class[cluster]
        fit = score + self.cluster_evidence[cluster]
        fit = fit if inside is None else fit.masked_fill(~inside, -torch.inf)
        return score, unseen, unseen == image_class(image, unseen, fit, len(self.thresholds))


def log_uncertainty(logits: torch.Tensor, num_seen: int) -> torch.Tensor:
    """log(1 - highest probability of a seen class), [..., K] -> [...]."""
    return torch.log(1 - logits.softmax(-1)[..., :num_seen].amax(-1) + 1e-3)


def image_class(image: torch.Tensor, unseen: torch.Tensor, fit: torch.Tensor, num_unseen: int) -> torch.Tensor:
    """For each cell the class of the cell of its image that fits best.

    Args:
        image: int64 [...], the number of each cell's image, below the number of cells.
        unseen: int64 [...] in [0, num_unseen).
        fit: [...], -inf for a cell that does not count.
    """
    best = fit.new_full((image.numel(), num_unseen), -torch.inf)  # more rows than images: no look at the device
    index = (image * num_unseen + unseen).flatten()
    best.view(-1).scatter_reduce_(0, index, fit.flatten(), "amax")
    return best.argmax(1)[image]


def mean_by_group(group: torch.Tensor, values: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Mean of `values` [P, ...] in each group (int64 [P]), [num_groups, ...]; 0 for an empty one."""
    total = values.new_zeros(num_groups, *values.shape[1:]).index_add_(0, group, values)
    size = group.bincount(minlength=num_groups).clamp(min=1)
    return total / size.view(-1, *[1] * (values.dim() - 1))


def kmeans(points: torch.Tensor, num_clusters: int, iterations: int = 10) -> torch.Tensor:
    """Spherical k-means: unit centroids [num_clusters, C] of unit points [P, C] in random order.

    It starts from the first points; of fewer points than clusters some are taken more than once.
    """
    centroids = points[torch.arange(num_clusters, device=points.device) % len(points)]
    for _ in range(iterations):
        nearest = (points @ centroids.T).argmax(1)
        total = torch.zeros_like(centroids).index_add_(0, nearest, points)
        empty = total.norm(dim=1, keepdim=True) < 1e-6
        centroids = torch.where(empty, centroids, F.normalize(total, dim=1))
    return centroids
