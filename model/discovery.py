"""Which target pixels show an unseen class, and which one: what a teacher doubts, pooled over clusters of pixels.

A class that nobody labels is still a cluster of pixels that look alike. The features of the ImageNet trunk, which
training does not move, put the target's pixels into clusters. A pixel is held for unseen the more

    score = log r(cluster) + mean over the cluster of log u + log u(pixel)
    u     = 1 - highest probability of a known class (seen, or the background where it is trained on)
    r     = share of the target's pixels in the cluster / share of the other pictures' pixels in it

so what the teacher knows from the source counts against it, and so does what pictures without an unseen class show
as well. The cluster is also what gets a name: the unseen class whose word fits its pixels best on average, by word
regression and ImageNet's classes, each as loud as the other and for no class louder than for another. Each class then
keeps the same portion of the pixels that were given to it (Zou et al., class-balanced self-training, ECCV 2018), so
that a class that is never sure of anything is not left without a label.
"""

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from model.backbone import Backbone
from model.imagenet_names import ImageNetNames
from model.segmenter import Segmenter
from model.word_regression import with_constant, word_regression

PIXELS = 100
"""Grid cells that are looked at in each picture to make clusters and cuts."""


class Discovery(nn.Module):
    """A teacher that labels target pixels, for a round of self-training; its state belongs into the checkpoint.

    Args:
        student: the network, as stage 2 begins with it; copied.
        num_seen: the first so many of its classes are seen (the background among them, if it is trained on).
        num_clusters: clusters of the target's pixels; 0 scores and names each pixel by itself.
        names: evidence of the ImageNet classifier, added to that of `word_regression`; None: that alone.
        one_name: label at most one unseen class a picture.
        picture_gate: no pixel outside its picture's highest `picture_gate` of scores is labelled unseen.
        eyes: what gives the features of the clusters, where the student's trunk is trained; None: a copy of that as the
            first round begins. A frozen trunk is its own.
    """

    def __init__(
        self, student: Segmenter, num_seen: int, num_clusters: int, names: ImageNetNames | None = None,
        one_name: bool = False, picture_gate: float = 1.0, eyes: Backbone | None = None,
    ):  # fmt: skip
        super().__init__()
        self.one_name, self.picture_gate = one_name, picture_gate
        num_unseen = student.num_auxiliary + len(student.projection.class_embeddings) - num_seen
        self.num_seen, self.num_clusters, self.names = num_seen, num_clusters, names
        self.teacher = copy.deepcopy(student)
        self.own_eyes = eyes is None  # not those of another network
        if eyes is None:
            eyes = self.teacher.backbone if student.backbone.frozen else copy.deepcopy(student.backbone)
        self.eyes = eyes
        self.requires_grad_(False).eval()
        with torch.no_grad():
            channels = self.eyes.trunk(torch.zeros_like(student.backbone.mean).expand(1, 3, 64, 64)).shape[1]
        self.register_buffer("round", torch.tensor(0))  # rounds begun
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("spread", torch.ones(channels))
        self.register_buffer("centroids", torch.zeros(max(num_clusters, 1), channels))
        self.register_buffer("cluster_name", torch.zeros(max(num_clusters, 1), dtype=torch.long))
        self.register_buffer("cluster_fit", torch.zeros(max(num_clusters, 1)))  # evidence for that name
        self.register_buffer("log_ratio", torch.zeros(max(num_clusters, 1)))
        self.register_buffer("cluster_doubt", torch.zeros(max(num_clusters, 1)))
        self.register_buffer("cuts", torch.zeros(num_unseen))
        self.register_buffer("known_cut", torch.tensor(-torch.inf))
        self.register_buffer("class_weight", torch.ones(num_seen + num_unseen))

    def train(self, mode: bool = True) -> "Discovery":
        return super().train(False)  # a teacher never drops out

    @torch.no_grad()
    def begin_round(
        self, student: Segmenter, target: Iterable, others: Iterable, source: Iterable, keep: float,
        keep_known: float = 0.0, rare_power: float = 0.0,
    ) -> None:  # fmt: skip
        """Takes the student for a teacher and sets the cuts by what it says of the target.

        Clusters, their names and r are made in the first round and stay: words named them before self-training
        could have moved what the network says.

        Args:
            student: the network.
            target: batches of (image uint8 [N, 3, H, W], valid bool [N, H, W]) of the target pictures.
            others: the same of pictures known to show no unseen class; empty: r is 1.
            source: batches of (image uint8 [N, 3, H, W], label uint8 [N, H, W]), for `word_regression`.
            keep: portion of the pixels given to an unseen class that are labelled with it.
            keep_known: portion of all pixels, those with the lowest score, that keep the teacher's known class.
            rare_power: in `class_weight` an unseen class has (mean count / its count) ** rare_power, at most 5, by the
                labels of the looked at cells; the known classes have 1.
        """
        self.teacher.load_state_dict(student.state_dict())
        first = self.round == 0
        if first and self.own_eyes:
            self.eyes.load_state_dict(student.backbone.state_dict())
        features, logits, picture = self._sample(target, self._look)
        self.round += 1
        if first and self.num_clusters:
            self._make_clusters(features, others, source)
        cluster = self._assign(features)
        doubt = log_doubt(logits, self.num_seen)
        if self.num_clusters:
            self.cluster_doubt.copy_(mean_by(cluster, doubt, len(self.centroids)))
        score, name = self._score(cluster, doubt), self._name(cluster, logits)
        allowed = self._allowed(picture, cluster, name, score)
        for c in range(len(self.cuts)):
            given = score[(name == c) & allowed]
            self.cuts[c] = given.quantile(1 - keep) if len(given) else torch.inf
        self.known_cut.copy_(score.quantile(keep_known) if keep_known else score.new_tensor(-torch.inf))
        count = name[allowed & (score >= self.cuts[name])].bincount(minlength=len(self.cuts)).clamp(min=1)
        self.class_weight[self.num_seen :] = (count.float().mean() / count).pow(rare_power).clamp(max=5)

    @torch.no_grad()
    def forward(self, image: torch.Tensor, valid: torch.Tensor, ignore_index: int = 255) -> torch.Tensor:
        """Pseudo-labels, int64 [N, H, W], of target pictures uint8 [N, 3, H, W], where `valid` (bool [N, H, W])."""
        features, logits = self._look(image)  # [N, h, w, C], [N, h, w, K]
        cluster, doubt = self._assign(features), log_doubt(logits, self.num_seen)
        score, name = self._score(cluster, doubt), self._name(cluster, logits)
        inside = F.interpolate(valid[:, None].float(), size=name.shape[1:], mode="nearest-exact")[:, 0] > 0
        picture = torch.arange(len(image), device=name.device)[:, None, None].expand_as(name)
        allowed = self._allowed(picture, cluster, name, score.masked_fill(~inside, -torch.inf))
        label = torch.full_like(name, ignore_index)
        label = torch.where(score <= self.known_cut, logits[..., : self.num_seen].argmax(-1), label)
        found = allowed & (score >= self.cuts[name])
        label = torch.where(found, name + self.num_seen, label)
        full = F.interpolate(label[:, None].float(), size=image.shape[-2:], mode="nearest-exact")[:, 0].long()
        return torch.where(valid, full, ignore_index)

    def _look(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Trunk features [N, h, w, C] and the teacher's logits of all classes [N, h, w, K]."""
        features = self.eyes.features(image)
        own = features if self.eyes is self.teacher.backbone else self.teacher.backbone.features(image)
        return features.permute(0, 2, 3, 1), self.teacher.score_features(own).permute(0, 2, 3, 1)

    def _eye_features(self, image: torch.Tensor) -> torch.Tensor:
        """Trunk features [N, h, w, C]."""
        return self.eyes.features(image).permute(0, 2, 3, 1)

    def _sample(
        self, batches: Iterable, look: Callable[[torch.Tensor], list[torch.Tensor]], ignore_index: int = 255
    ) -> list[torch.Tensor]:
        """What `look` says, each [P, ...], of at most `PIXELS` valid cells of each picture, drawn by a fixed seed.

        Where a batch has labels in place of `valid`, valid is what is labelled, and the labels come next. The number of
        the picture, [P], comes last.
        """
        draw = torch.Generator().manual_seed(0)
        kept = []
        for image, marks in batches:
            maps = list(look(image.to(self.centre.device)))  # [N, h, w, ...] each
            cell_marks = F.interpolate(marks[:, None].float(), size=maps[0].shape[1:3], mode="nearest-exact")[:, 0]
            if marks.dtype != torch.bool:
                maps.append(cell_marks.long().to(self.centre.device))
            valid = cell_marks > 0 if marks.dtype == torch.bool else cell_marks != ignore_index
            for i, cells in enumerate(valid.flatten(1)):
                cells = cells.nonzero()[:, 0]
                cells = cells[torch.randperm(len(cells), generator=draw)[:PIXELS]].to(self.centre.device)
                kept.append([*(values[i].flatten(0, 1)[cells] for values in maps), torch.full_like(cells, len(kept))])
        return [torch.cat(values) for values in zip(*kept)]

    def _make_clusters(self, features: torch.Tensor, others: Iterable, source: Iterable) -> None:
        self.centre.copy_(features.mean(0))
        self.spread.copy_(features.std(0).clamp(min=1e-6))
        self.centroids.copy_(kmeans(self._normalise(features), self.num_clusters))
        cluster = self._assign(features)
        in_target = cluster.bincount(minlength=self.num_clusters).float()
        found = self._sample(others, lambda image: [self._eye_features(image)])
        if found:
            in_others = self._assign(found[0]).bincount(minlength=self.num_clusters).float()
            self.log_ratio.copy_(
                (in_target / in_target.sum() + 1e-5).log() - (in_others / in_others.sum() + 1e-5).log()
            )
        evidence = standardise(with_constant(self._centred(features)) @ self._word_regression(source))
        if self.names is not None:
            evidence = standardise(evidence + standardise(self.names(features)))
        evidence = mean_by(cluster, evidence, self.num_clusters)
        self.cluster_name.copy_(evidence.argmax(1))
        self.cluster_fit.copy_(evidence.gather(1, self.cluster_name[:, None])[:, 0])

    def _word_regression(self, source: Iterable) -> torch.Tensor:
        """The map of `word_regression` from centred features, by the labels of the source pictures."""
        features, label, _ = self._sample(source, lambda image: [self._eye_features(image)])
        auxiliary = self.teacher.num_auxiliary
        words = self.teacher.projection.class_embeddings
        return word_regression(self._centred(features), label, words, self.num_seen - auxiliary, auxiliary)

    def _centred(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.centre) / self.spread

    def _normalise(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(self._centred(features), dim=-1)

    def _assign(self, features: torch.Tensor) -> torch.Tensor:
        """The nearest centroid of each row, [..., C] -> [...]."""
        if not self.num_clusters:
            return features.new_zeros(features.shape[:-1], dtype=torch.long)
        return (self._normalise(features) @ self.centroids.T).argmax(-1)

    def _score(self, cluster: torch.Tensor, doubt: torch.Tensor) -> torch.Tensor:
        return self.log_ratio[cluster] + self.cluster_doubt[cluster] + doubt

    def _allowed(
        self, picture: torch.Tensor, cluster: torch.Tensor, name: torch.Tensor, score: torch.Tensor
    ) -> torch.Tensor:
        """Which cells may be labelled with their unseen class, for what else their picture shows; all [...], bool."""
        allowed = torch.ones_like(name, dtype=torch.bool)
        if self.one_name:
            allowed = name == dominant_name(picture, name, score + self.cluster_fit[cluster], len(self.cuts))
        if self.picture_gate < 1:
            allowed &= share_above(picture, score) < self.picture_gate
        return allowed

    def _name(self, cluster: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return self.cluster_name[cluster] if self.num_clusters else logits[..., self.num_seen :].argmax(-1)


def log_doubt(logits: torch.Tensor, num_seen: int) -> torch.Tensor:
    """log(1 - highest probability of a known class), [..., K] -> [...]."""
    return torch.log(1 - logits.softmax(-1)[..., :num_seen].amax(-1) + 1e-3)


def centre_rows(evidence: torch.Tensor) -> torch.Tensor:
    """What speaks for one class rather than another, [P, U]: less the mean over the classes."""
    return evidence - evidence.mean(1, keepdim=True)


def standardise(evidence: torch.Tensor) -> torch.Tensor:
    """As `centre_rows`, then with mean 0 and unit deviation over the pixels for each class, [P, U].

    A word that is near to everything would else name most clusters (hubness; on seen classes held out as if unseen,
    this was worth more than any other change to the names).
    """
    evidence = centre_rows(evidence)
    return (evidence - evidence.mean(0)) / evidence.std(0).clamp(min=1e-6)


def dominant_name(picture: torch.Tensor, name: torch.Tensor, fit: torch.Tensor, num_names: int) -> torch.Tensor:
    """For each cell the name of the cell of its picture that fits best.

    Args:
        picture: int64 [...], the number of each cell's picture, below the number of cells.
        name: int64 [...] in [0, num_names).
        fit: [...], -inf for a cell that has no say.
    """
    best = fit.new_full((picture.numel(), num_names), -torch.inf)  # more rows than pictures: no look at the device
    index = (picture * num_names + name).flatten()
    best.view(-1).scatter_reduce_(0, index, fit.flatten(), "amax")
    return best.argmax(1)[picture]


def share_above(picture: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """For each cell the share of its picture's cells that score higher; all [...]; -inf: no cell of the picture."""
    shape, picture, score = score.shape, picture.flatten(), score.flatten()
    order = score.argsort(descending=True, stable=True)
    order = order[picture[order].argsort(stable=True)]  # picture by picture, the highest first
    zeros = torch.zeros_like(picture)  # more than pictures: no look at the device
    size = zeros.scatter_add(0, picture, torch.ones_like(picture))
    counted = zeros.scatter_add(0, picture, (score > -torch.inf).long())
    place = zeros.scatter(0, order, torch.arange(len(score), device=score.device))
    place = place - (size.cumsum(0) - size)[picture]
    return (place / counted[picture].clamp(min=1)).view(shape)


def mean_by(group: torch.Tensor, values: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Mean of `values` [P, ...] in each group (int64 [P]), [num_groups, ...]; 0 for an empty one."""
    total = values.new_zeros(num_groups, *values.shape[1:]).index_add_(0, group, values)
    size = group.bincount(minlength=num_groups).clamp(min=1)
    return total / size.view(-1, *[1] * (values.dim() - 1))


def kmeans(points: torch.Tensor, num_clusters: int, iterations: int = 10, limit: int = 60_000) -> torch.Tensor:
    """Spherical k-means: unit centroids [num_clusters, C] of unit points [P, C], from a fixed draw of them.

    At most `limit` points take part. Fewer points than clusters are taken more than once.
    """
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(len(points), generator=draw)[:limit].to(points.device)
    points = points[order]
    centroids = points[torch.arange(num_clusters, device=points.device) % len(points)]
    for _ in range(iterations):
        nearest = (points @ centroids.T).argmax(1)
        total = torch.zeros_like(centroids).index_add_(0, nearest, points)
        empty = total.norm(dim=1, keepdim=True) < 1e-6
        centroids = torch.where(empty, centroids, F.normalize(total, dim=1))
    return centroids


class ClusterTeacher(Discovery):
    """`Discovery` with the interface of the scripts: `fit` once, then (pseudo-label, weight) of a batch."""

    def __init__(self, args, student: Segmenter, num_seen: int, names: ImageNetNames | None):
        super().__init__(student, num_seen, args.num_clusters, names=names, one_name=True)
        self.keep, self.keep_seen, self.rare_power = args.keep, args.keep_seen, args.rare_power

    def fit(self, network: Segmenter, target: Iterable, others: Iterable, source: Iterable) -> None:
        self.begin_round(network, target, others, source, self.keep, self.keep_seen, self.rare_power)

    def forward(self, image: torch.Tensor, valid: torch.Tensor, ignore_index: int = 255):
        label = super().forward(image, valid, ignore_index)
        return label, self.class_weight[label * (label != ignore_index)]


def from_settings(args, student: Segmenter, split, device: torch.device) -> ClusterTeacher:
    """The teacher of `--pseudo-labels clusters`."""
    from embeddings import imagenet_similarity
    from model.backbone import IMAGENET_CLASSES, imagenet_head

    names = None
    if args.imagenet_names:
        similarity = imagenet_similarity(IMAGENET_CLASSES, split.unseen, 0.6)
        names = ImageNetNames(imagenet_head(args.backbone, args.backbone_weights), torch.from_numpy(similarity))
    return ClusterTeacher(args, student, split.num_trained_seen, names).to(device)
