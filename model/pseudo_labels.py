"""Pseudo-labels of target images: what an unseen object looks like is learnt from held-out seen classes.

All is done once, before the first training step, on the cells of a coarse grid over the features of ImageNet's trunk:

1. Evidence. Source labels give linear classifiers of the known classes (background and seen) and of object against
   background. Images that show an unseen class, against images that show none, give a multiple-instance classifier of
   the unseen classes; the names of the ImageNet categories that an image looks like say which class it shows.
2. Episodes. In each of five episodes a fifth of the seen classes is held out: their cells become void, the images that
   show them play the target, and the same evidence is fitted anew. The labels of the held-out classes then say how far
   each piece of evidence is to be trusted: a small network, the scorer, learns that.
3. Labels. The scorer gives each cell the probability p that it shows the unseen class of its image. A pixel's label is
   drawn: that class with probability p, a known class c with (1 - p) p(c). So the mean loss is that of soft targets.
   The draw is the same each time.

It must be known which images show some unseen class (`--target-images unseen`); not where, and not which. Where every
image that shows a seen class has source labels (`--complete-labels`), what a target image without labels shows besides
its unseen object is background: p(background) = 1.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn

from model.backbone import Backbone
from model.class_evidence import (
    BATCH,
    ImageNetNames,
    fit_by_steps,
    fit_multiple_instance,
    in_chunks,
    log_mean_exp,
    mean_by_group,
)
from utils.errors import UserError

VOID = 255
GRID = 20  # cells a side that an image has at most: finer features are averaged
CLUSTERS = 100
NUM_EPISODES = 5
CATEGORIES = 30  # of ImageNet's, that are kept of a cell
SAMPLE = 60_000  # cells, drawn from all images, of which clusters and word evidence are made
IMAGES_A_CLASS, CELLS_A_CLASS = 200, 20_000  # at most so many of a held-out class teach the scorer
HIDDEN = 32  # units of the scorer
PART_OF_MEAN = 0.75
"""How much of a class's mean word evidence is removed. With all of it removed, every class is assigned as many
images as the others, be it rare or not; with nothing removed, a class whose word is near to all others is
assigned most (hubness). Chosen on held-out seen classes."""

SCALE = 20.0  # length of a feature vector, for which the learning rates below are made


@dataclass
class Cells:
    """Grid cells of N images, P = h w each."""

    features: torch.Tensor  # float16 [N, P, C], of length SCALE
    label: torch.Tensor  # int64 [N, P], of known classes; VOID where none is given
    valid: torch.Tensor  # bool [N, P], not padding
    target: torch.Tensor  # bool [N], the image shows an unseen class
    cluster: torch.Tensor  # int64 [N, P]
    categories: torch.Tensor  # float16 [N, P, 2 M]: the likeliest categories of ImageNet and their probabilities
    size: tuple[int, int]  # h, w

    def __getitem__(self, images: torch.Tensor | slice) -> "Cells":
        fields = (self.features, self.label, self.valid, self.target, self.cluster, self.categories)
        return Cells(*(field[images] for field in fields), self.size)


def hold_out(cells: Cells, held_out: Sequence[int], num_known: int) -> Cells:
    """The episode in which the classes `held_out` play the unseen ones: their cells are void, their images the target.

    The other classes keep their order and are numbered from 0 without gaps.
    """
    number = torch.full((VOID + 1,), VOID)
    kept = [c for c in range(num_known) if c not in held_out]
    number[kept] = torch.arange(len(kept))
    shown = torch.isin(cells.label, torch.tensor(held_out, device=cells.label.device))
    label = number.to(cells.label.device)[cells.label]
    return replace(cells, label=label, valid=cells.label != VOID, target=shown.any(dim=1))


class Evidence(nn.Module):
    """What is fitted in a task, an episode or the real one, without a label of an unseen class.

    Args:
        channels: C of the features.
        num_known: background (if it is trained on) and seen classes.
        has_background: known class 0 is the background.
        names: of the U unseen (or held-out) classes.
    """

    def __init__(self, channels: int, num_known: int, has_background: bool, names: ImageNetNames):
        super().__init__()
        num_unseen = names.similarity.shape[1]
        self.has_background, self.names = has_background, names
        self.known = nn.Linear(channels, num_known)
        self.objectness = nn.Linear(channels, 1)
        self.unseen = nn.Linear(channels, num_unseen)
        self.register_buffer("word_mean", torch.zeros(2 * num_unseen))
        self.register_buffer("word_std", torch.ones(2 * num_unseen))
        self.register_buffer("log_ratio", torch.zeros(CLUSTERS))  # of a cluster's share of target and other images
        self.register_buffer("cluster_evidence", torch.zeros(CLUSTERS, num_unseen))
        self.register_buffer("evidence_scale", torch.ones(()))
        self.requires_grad_(False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def fit(self, cells: Cells, sample: torch.Tensor, draw: torch.Generator) -> None:
        """Fits all of it.

        Args:
            cells: of the task; cells of its unseen classes are void.
            sample: int64 [S] in [0, N P), the cells of which means and deviations are taken.
            draw: of the samples of each step.
        """
        self._fit_known(cells, draw)
        masks = [cells.valid & chosen[:, None] for chosen in (cells.target, ~cells.target)]
        counts = [cells.cluster[mask].bincount(minlength=CLUSTERS).float() for mask in masks]
        in_target, in_others = ((count / count.sum() + 1e-5).log() for count in counts)
        self.log_ratio.copy_(in_target - in_others)
        own = sample[masks[0].flatten()[sample]]
        evidence = in_chunks(self.names, cells.categories.flatten(0, 1)[own])
        self.word_mean.copy_(PART_OF_MEAN * evidence.mean(dim=0))
        self.word_std.copy_(evidence.std(dim=0).clamp(min=1e-6))
        evidence = ((evidence - self.word_mean) / self.word_std).chunk(2, dim=1)[0]
        self.cluster_evidence.copy_(mean_by_group(cells.cluster.flatten()[own], evidence, CLUSTERS))
        self._fit_unseen(cells, draw)

    def _fit_known(self, cells: Cells, draw: torch.Generator) -> None:
        """Softmax over the known classes, and object against background.

        A class is drawn as often as the root of its number of cells; half of a batch is background.
        """
        features, label = cells.features.flatten(0, 1), cells.label.flatten()
        order, size = label.argsort(stable=True), min(BATCH, int((label != VOID).sum()))
        count = label[label != VOID].bincount(minlength=self.known.out_features)
        first = count.cumsum(0) - count  # place of each class in `order`
        share = count.float().sqrt().cpu()
        if self.has_background:
            share[0] = share[1:].sum()

        def loss() -> torch.Tensor:
            y = torch.multinomial(share, size, replacement=True, generator=draw).to(label.device)
            place = torch.rand(size, generator=draw, dtype=torch.float64).to(label.device)
            x = features[order[first[y] + (place * count[y]).long()]].float()
            total = F.cross_entropy(self.known(x), y)
            if self.has_background:
                total = total + F.binary_cross_entropy_with_logits(self.objectness(x)[:, 0], (y > 0).float())
            return total

        fit_by_steps([*self.known.parameters(), *self.objectness.parameters()], loss, 300, learning_rate=1e-2)

    def _fit_unseen(self, cells: Cells, draw: torch.Generator, num_rounds: int = 2, num_folds: int = 4) -> None:
        """The multiple-instance classifier, on image classes assigned by cross-fitting.

        A first assignment by words alone is corrected by classifiers that were not fitted to the image itself, twice.
        """
        target = cells[cells.target]
        rejected = (~cells.target[:, None] & cells.valid & (cells.label != VOID)).flatten().nonzero()[:, 0]
        negatives = cells.features.flatten(0, 1), rejected
        evidence = self.image_evidence(target)  # [T, U]
        self.evidence_scale /= evidence.std().clamp(min=1e-6)
        evidence, pooled = self.evidence_scale * evidence, torch.zeros_like(evidence)
        image_class = evidence.argmax(dim=1)
        fold = torch.arange(len(evidence), device=evidence.device) % num_folds
        for _ in range(num_rounds):
            for k in range(num_folds):
                rest, own = fold != k, fold == k
                if rest.any() and own.any():
                    bags = target.features[rest], target.valid[rest]
                    fit_multiple_instance(self.unseen, bags, image_class[rest], negatives, draw, steps=150)
                    pooled[own] = log_mean_exp(in_chunks(self.unseen, target.features[own]), target.valid[own])
            image_class = (pooled + evidence).argmax(dim=1)
        fit_multiple_instance(self.unseen, (target.features, target.valid), image_class, negatives, draw, steps=300)

    def image_evidence(self, cells: Cells) -> torch.Tensor:
        """How well each unseen class fits, by words, the cells of an image that are likely to show one, [N, U].

        A cell's own evidence finds rare classes; that of its cluster, of weight 4, is less noisy.
        """
        known = in_chunks(lambda x: self.known(x).softmax(dim=-1).amax(dim=-1, keepdim=True), cells.features)[..., 0]
        weight = cells.valid * torch.sigmoid((self.log_ratio[cells.cluster] + torch.log(1 - known + 1e-3)) / 2)
        own = (in_chunks(self.names, cells.categories) - self.word_mean) / self.word_std  # [N, P, 2 U]
        evidence = own.chunk(2, dim=-1)[1] + 4 * self.cluster_evidence[cells.cluster]  # [N, P, U]
        total = (evidence * weight[..., None]).sum(dim=1)
        return self.evidence_scale * total / weight.sum(dim=1, keepdim=True).clamp(min=1e-6)

    def image_class(self, cells: Cells) -> torch.Tensor:
        """The unseen class that each image is assigned, int64 [N] in [0, U)."""
        pooled = log_mean_exp(in_chunks(self.unseen, cells.features), cells.valid)
        return (pooled + self.image_evidence(cells)).argmax(dim=1)

    def cell_features(self, cells: Cells, image_class: torch.Tensor) -> torch.Tensor:
        """What the scorer knows of each cell and its image's class (int64 [N]), [N, P, `NUM_FEATURES`]."""

        def of_class(values: torch.Tensor) -> torch.Tensor:
            return values.gather(2, image_class[:, None, None].expand(*values.shape[:2], 1))[..., 0]

        objectness = in_chunks(self.objectness, cells.features)[..., 0]
        unseen = of_class(in_chunks(self.unseen, cells.features))
        return torch.stack([objectness, unseen, of_class(self.cluster_evidence[cells.cluster])], dim=-1)


NUM_FEATURES = 3


def fit_scorer(scorer: nn.Sequential, answers: list[tuple[torch.Tensor, torch.Tensor]], draw: torch.Generator) -> None:
    """Fits features [R, F] to answers, bool [R], of several classes, each drawn as often as the others."""
    x, y = (torch.cat(parts) for parts in zip(*answers))
    weight = torch.cat([torch.full((len(part),), 1 / max(1, len(part)), dtype=torch.float64) for _, part in answers])
    share = weight.cumsum(0)
    scorer[0].train()  # mean and deviation of the features

    def loss() -> torch.Tensor:
        place = torch.rand(min(BATCH // 2, len(x)), generator=draw, dtype=torch.float64) * share[-1]
        rows = torch.searchsorted(share, place).clamp(max=len(x) - 1).to(x.device)
        return F.binary_cross_entropy_with_logits(scorer(x[rows])[:, 0], y[rows].float())

    fit_by_steps(scorer.parameters(), loss, steps=400, learning_rate=3e-3)
    scorer.eval()


class EpisodePseudoLabeler(nn.Module):
    """Labels target images; its state belongs to the checkpoint.

    Args:
        feature_extractor: its trunk has ImageNet's weights, and no training moves it.
        num_known: labels below it are of the background or a seen class, the U = `num_unseen` next of the unseen ones.
        has_background: label 0 is the background.
        imagenet: the ImageNet classifier, features [P, C] -> logits [P, 1000], and a function from U labels to the
            similarity [1000, U] of the names of its categories to those of these classes.
    """

    def __init__(
        self,
        feature_extractor: Backbone,
        num_known: int,
        num_unseen: int,
        has_background: bool,
        imagenet: tuple[nn.Module, Callable[[Sequence[int]], torch.Tensor]],
    ):
        super().__init__()
        channels, self.imagenet = feature_extractor.trunk_channels, imagenet
        self.num_known, self.has_background = num_known, has_background
        self.unseen = list(range(num_known, num_known + num_unseen))
        self.feature_extractor = feature_extractor
        self.register_buffer("feature_mean", torch.zeros(channels))
        self.register_buffer("feature_std", torch.ones(channels))
        self.register_buffer("centroids", torch.zeros(CLUSTERS, channels))
        self.evidence = Evidence(channels, num_known, has_background, ImageNetNames(imagenet[1](self.unseen)))
        self.scorer = nn.Sequential(  # features of a cell -> logit of "it shows the unseen class of its image"
            nn.BatchNorm1d(NUM_FEATURES, affine=False, momentum=None),
            nn.Linear(NUM_FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1),
        )  # fmt: skip
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def fit(self, target: Iterable, shared: Iterable, others: Iterable) -> None:
        """Fits evidence and scorer; looks at each image once and keeps its features in float16, 0.8 KB a channel.

        Args:
            target: batches of images that show an unseen class, as `TargetDataset` makes them.
            shared: batches of (image, label uint8 [N, H, W]) of those among them that have source labels; may be empty.
            others: the same of the images that show no unseen class.

        Raises:
            UserError: if there are no other images.
        """
        looks = [list(self._look(batches)) for batches in (target, shared, others)]
        if not looks[2]:
            raise UserError(
                "--pseudo-labels episodes needs training images that show no unseen class: give --target-images unseen"
            )
        num_target, num_shared, _ = (sum(len(valid) for *_, valid in part) for part in looks)
        raw, label, valid = (torch.cat(parts) for parts in zip(*chain(*looks)))
        del looks
        draw = torch.Generator().manual_seed(0)
        sample = valid.flatten().nonzero()[:, 0]
        sample = sample[torch.randperm(len(sample), generator=draw)[:SAMPLE].to(sample.device)]
        sampled = raw.flatten(0, 2)[sample].float()
        self.feature_mean.copy_(sampled.mean(dim=0))
        self.feature_std.copy_(sampled.std(dim=0).clamp(min=1e-6))
        self.centroids.copy_(kmeans(self._normalise(sampled), CLUSTERS))
        del sampled
        cells = self._cells(raw, label, valid)
        with torch.random.fork_rng(devices=[]):  # for the scorer's initial weights
            torch.manual_seed(0)
            first = num_target * cells.label.shape[1]  # cells of the images that have labels follow
            self._fit_scorer(cells[num_target:], sample[sample >= first] - first, draw)
            cells.target[:num_target] = True
            cells.valid[num_target : num_target + num_shared] = False  # targets again: only their labels count
            self.evidence.load_state_dict(self._fit_evidence(cells, self.unseen, sample, draw).state_dict())

    def _fit_scorer(self, source: Cells, sample: torch.Tensor, draw: torch.Generator) -> None:
        """Episodes on source images, and the scorer on their answers; `sample` and `draw` as in `Evidence.fit`."""
        seen, answers = list(range(self.has_background, self.num_known)), []
        for held_out in (seen[j::NUM_EPISODES] for j in range(min(NUM_EPISODES, len(seen)))):
            episode = hold_out(source, held_out, self.num_known)
            if episode.target.any() and not episode.target.all():
                evidence = self._fit_evidence(episode, held_out, sample, draw)
                answers += [learn_from(evidence, episode, source.label == c, n, draw) for n, c in enumerate(held_out)]
        if not answers:
            raise UserError("--pseudo-labels episodes needs images that show different seen classes: give more images")
        fit_scorer(self.scorer, answers, draw)

    def _fit_evidence(self, cells: Cells, unseen: list[int], sample: torch.Tensor, draw: torch.Generator) -> Evidence:
        """The evidence of the task in which `unseen` are the unseen classes; arguments as in `Evidence.fit`."""
        num_known = self.num_known - sum(c < self.num_known for c in unseen)
        names = ImageNetNames(self.imagenet[1](unseen))
        evidence = Evidence(cells.features.shape[2], num_known, self.has_background, names).to(sample.device)
        evidence.fit(cells, sample, draw)
        return evidence

    @torch.no_grad()
    def forward(self, image: torch.Tensor, valid: torch.Tensor, may_show_seen: torch.Tensor) -> torch.Tensor:
        """Pseudo-labels, int64 [N, H, W], of target images.

        Args:
            image: uint8 [N, 3, H, W].
            valid: bool [N, H, W]; other pixels are `VOID`.
            may_show_seen: bool [N]; an image for which it is false shows background and its unseen class alone.
        """
        (look,) = self._look([(image, valid)])
        cells = self._cells(*look)
        image_class = self.evidence.image_class(cells)  # [N]
        logit = in_chunks(self.scorer, self.evidence.cell_features(cells, image_class))  # [N, P, 1]
        posterior = in_chunks(self.evidence.known, cells.features).softmax(dim=-1)

        def to_pixels(values: torch.Tensor, mode: str) -> torch.Tensor:
            return F.interpolate(values.float().view(-1, 1, *cells.size), size=image.shape[-2:], mode=mode)[:, 0]

        draw = torch.Generator().manual_seed(0)  # the same thresholds for each image, whatever is in its batch
        cell_draw = torch.rand(logit.shape[1], 1, generator=draw).to(image.device)
        pixel_draw = torch.rand(image.shape[-2:], generator=draw).to(image.device)
        known = (posterior.cumsum(dim=-1) < cell_draw).sum(dim=-1).clamp(max=self.num_known - 1)  # [N, P]
        if self.has_background:
            known = known * may_show_seen[:, None]
        p = to_pixels(torch.sigmoid(logit), "bilinear")
        unseen = (self.num_known + image_class)[:, None, None].expand_as(p)
        label = torch.where(p > pixel_draw, unseen, to_pixels(known, "nearest-exact").long())
        return label.masked_fill(~valid, VOID)

    def _look(self, batches: Iterable) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Raw features float16 [N, h, w, C], label int64 and valid bool [N, h, w] of each batch.

        Args:
            batches: of image uint8 [N, 3, H, W] and label uint8, or valid bool, [N, H, W]; more is ignored.
        """
        for image, marks, *_ in batches:
            image = image.to(self.centroids.device, memory_format=torch.channels_last)
            features = self.feature_extractor.features(image)
            size = [min(side, GRID) for side in features.shape[-2:]]
            features = F.adaptive_avg_pool2d(features.float(), size).permute(0, 2, 3, 1).half().contiguous()
            cells = F.interpolate(marks.to(image.device)[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()
            if marks.dtype == torch.bool:
                yield features, torch.full_like(cells, VOID), cells > 0
            else:
                yield features, cells, cells != VOID

    def _cells(self, features: torch.Tensor, label: torch.Tensor, valid: torch.Tensor) -> Cells:
        """Cells of what `_look` gives; it overwrites the features, of which a copy could be gigabytes."""
        size = label.shape[1:]
        features, label, valid = features.flatten(1, 2), label.flatten(1), valid.flatten(1)
        categories = in_chunks(self._likeliest_categories, features)
        cluster = torch.empty_like(label)
        for n in range(len(features)):
            unit = self._normalise(features[n].float())
            cluster[n] = (unit @ self.centroids.T).argmax(dim=-1)
            features[n] = SCALE * unit
        return Cells(features, label, valid, torch.zeros_like(valid[:, 0]), cluster, categories, tuple(size))

    def _likeliest_categories(self, features: torch.Tensor) -> torch.Tensor:
        """Raw features [R, C] -> input of `ImageNetNames`, float16 [R, 2 M]."""
        probability, index = self.imagenet[0](features).softmax(dim=1).topk(CATEGORIES)
        return torch.cat([index, probability], dim=1).half()  # float16 holds whole numbers below 2,048 as they are

    def _normalise(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize((features - self.feature_mean) / self.feature_std, dim=-1)


def learn_from(
    evidence: Evidence, episode: Cells, truth: torch.Tensor, held_out: int, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cell features [R, F] and answers, bool [R], of some images that show the episode's unseen class `held_out`.

    `truth` (bool [N, P]) is where the images of the episode show it.
    """
    images = truth.any(dim=1).nonzero()[:, 0]
    images = images[torch.randperm(len(images), generator=draw)[:IMAGES_A_CLASS].to(images.device)]
    cells = episode[images]
    x = evidence.cell_features(cells, torch.full_like(images, held_out))[cells.valid]
    chosen = torch.randperm(len(x), generator=draw)[:CELLS_A_CLASS].to(x.device)
    return x[chosen], truth[images][cells.valid][chosen]


def kmeans(points: torch.Tensor, num_clusters: int, iterations: int = 10) -> torch.Tensor:
    """Spherical k-means: unit centroids [num_clusters, C] of unit points [P, C] in random order.

    Of fewer points than clusters some are taken more than once.
    """
    centroids = points[torch.arange(num_clusters, device=points.device) % len(points)]
    for _ in range(iterations):
        nearest = (points @ centroids.T).argmax(dim=1)
        total = torch.zeros_like(centroids).index_add_(0, nearest, points)
        empty = total.norm(dim=1, keepdim=True) < 1e-6
        centroids = torch.where(empty, centroids, F.normalize(total, dim=1))
    return centroids
