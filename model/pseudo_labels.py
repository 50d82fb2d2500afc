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
from model.class_evidence import BATCH, ImageNetNames, fit_by_steps, in_chunks, kmeans, mean_by_group
from utils.errors import UserError

VOID = 255
GRID = 20  # cells a side that an image has at most: finer features are averaged
CLUSTERS = 100
NUM_EPISODES = 5
CATEGORIES = 30  # of ImageNet's, that are kept of a cell
SAMPLE = 60_000  # cells, of which clusters are made
IMAGES_A_CLASS, CELLS_A_CLASS = 200, 20_000  # of a held-out class, that teach the scorer
PART_OF_MEAN = 0.6
"""How much of a class's mean word evidence is removed: with all of it, rare classes are assigned as many images as
common ones; with nothing, a class whose word is near to all others is assigned most (hubness)."""

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

    def __getitem__(self, images: torch.Tensor | slice) -> "Cells":
        return Cells(*(field[images] for field in vars(self).values()))


def hold_out(cells: Cells, held_out: Sequence[int]) -> Cells:
    """The episode in which the classes `held_out` play the unseen ones: void, and the images that show them targets."""
    shown = torch.isin(cells.label, torch.tensor(held_out, device=cells.label.device))
    label = cells.label.masked_fill(shown, VOID)
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
        num_unseen = names.tables.shape[2]
        self.has_background, self.names = has_background, names
        self.known = nn.Linear(channels, num_known)
        self.objectness = nn.Linear(channels, 1)
        self.unseen = nn.Linear(channels, num_unseen)
        self.register_buffer("word_mean", torch.zeros(2 * num_unseen))
        self.register_buffer("word_std", torch.ones(2 * num_unseen))
        self.register_buffer("cluster_evidence", torch.zeros(CLUSTERS, num_unseen))
        self.register_buffer("evidence_scale", torch.ones(()))
        self.requires_grad_(False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def fit(self, cells: Cells, draw: torch.Generator) -> None:
        """Fits all of it to a task, whose unseen classes are void; `draw` samples the cells and images of each step."""
        self._fit_known(cells, draw)
        self._fit_words(cells[cells.target])
        self._fit_unseen(cells, draw)

    def _fit_known(self, cells: Cells, draw: torch.Generator) -> None:
        """Softmax over the known classes, and object against background.

        A class is drawn as often as the root of its number of cells; half of a batch is background.
        """
        features, label = cells.features.flatten(0, 1), cells.label.flatten()
        labelled = (label != VOID).nonzero()[:, 0]
        count = label[labelled].bincount(minlength=self.known.out_features)
        share = count.sqrt()
        if self.has_background:
            share[0] = share[1:].sum()
        weight = (share / count.clamp(min=1))[label[labelled]].double().cumsum(dim=0)

        def loss() -> torch.Tensor:
            place = weight[-1] * torch.rand(BATCH, generator=draw, dtype=torch.float64).to(weight.device)
            rows = labelled[torch.searchsorted(weight, place).clamp(max=len(weight) - 1)]
            x, y = features[rows].float(), label[rows]
            total = F.cross_entropy(self.known(x), y)
            if self.has_background:
                total = total + F.binary_cross_entropy_with_logits(self.objectness(x)[:, 0], (y > 0).float())
            return total

        fit_by_steps([*self.known.parameters(), *self.objectness.parameters()], loss, 300, learning_rate=1e-2)

    def _fit_words(self, target: Cells) -> None:
        """Mean and deviation of word evidence over the cells of target images, and its mean in each cluster."""
        evidence = in_chunks(self.names, target.categories)[target.valid]
        self.word_mean.copy_(PART_OF_MEAN * evidence.mean(dim=0))
        self.word_std.copy_(evidence.std(dim=0).clamp(min=1e-6))
        smooth = ((evidence - self.word_mean) / self.word_std).chunk(2, dim=1)[0]
        self.cluster_evidence.copy_(mean_by_group(target.cluster[target.valid], smooth, CLUSTERS))
        self.evidence_scale /= self.image_evidence(target).std().clamp(min=1e-6)

    def _fit_unseen(self, cells: Cells, draw: torch.Generator) -> None:
        """The multiple-instance classifier (Pinheiro & Collobert, CVPR 2015): it knows what an image shows, not where.

        Image classes by words alone are corrected, twice, by classifiers that were not fitted to the image (4 folds).
        """
        images = cells.target.nonzero()[:, 0]
        evidence = self.image_evidence(cells[images])  # [T, U]
        pooled, image_class = torch.zeros_like(evidence), evidence.argmax(dim=1)
        fold = torch.arange(len(images), device=images.device) % 4
        for _ in range(2):
            for rest, own in ((fold != k, fold == k) for k in range(4)):
                if rest.any() and own.any():
                    self._fit_bags(cells, images[rest], image_class[rest], draw, steps=150)
                    pooled[own] = self._image_logits(cells[images[own]])
            image_class = (pooled + evidence).argmax(dim=1)
        self._fit_bags(cells, images, image_class, draw, steps=300)

    def _fit_bags(
        self, cells: Cells, images: torch.Tensor, image_class: torch.Tensor, draw: torch.Generator, steps: int
    ):
        """From zero: a step takes 16 of `images`, by the count ** -0.5 of their class, and 1,024 cells of others."""
        share = image_class.bincount().clamp(min=1).float().pow(-0.5)[image_class].cpu()
        others = (~cells.target).nonzero()[:, 0]
        nn.init.zeros_(self.unseen.weight)
        nn.init.constant_(self.unseen.bias, -3.0)  # most cells show no unseen class

        def loss() -> torch.Tensor:
            n = torch.multinomial(share, 16, replacement=True, generator=draw).to(images.device)
            image = self._image_logits(cells[images[n]])  # [16, U]
            answer = F.one_hot(image_class[n], image.shape[1]).float()
            positive = F.binary_cross_entropy_with_logits(image, answer, reduction="none").sum(dim=1).mean()
            row = others[torch.randint(len(others), (BATCH // 4,), generator=draw).to(others.device)]
            column = torch.randint(cells.label.shape[1], (BATCH // 4,), generator=draw).to(others.device)
            rejected = F.softplus(self.unseen(cells.features[row, column].float())).sum(dim=1)
            labelled = cells.valid[row, column] & (cells.label[row, column] != VOID)
            return positive + (rejected * labelled).sum() / labelled.sum().clamp(min=1)

        fit_by_steps(self.unseen.parameters(), loss, steps, learning_rate=5e-3)

    def image_evidence(self, cells: Cells) -> torch.Tensor:
        """How well each unseen class fits, by words, the cells of an image that look like no known class, [N, U].

        A cell's own evidence finds rare classes; that of its cluster, of weight 4, is less noisy.
        """
        known = in_chunks(lambda x: self.known(x).softmax(dim=-1).amax(dim=-1, keepdim=True), cells.features)
        weight = cells.valid[..., None] * (1 - known + 1e-3)  # [N, P, 1]
        own = (in_chunks(self.names, cells.categories) - self.word_mean) / self.word_std  # [N, P, 2 U]
        evidence = own.chunk(2, dim=-1)[1] + 4 * self.cluster_evidence[cells.cluster]  # [N, P, U]
        return self.evidence_scale * (evidence * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-6)

    def _image_logits(self, cells: Cells) -> torch.Tensor:
        logits = in_chunks(self.unseen, cells.features).masked_fill(~cells.valid[..., None], -1e4)
        return logits.logsumexp(dim=1) - cells.valid.sum(dim=1, keepdim=True).clamp(min=1).log()

    def image_class(self, cells: Cells) -> torch.Tensor:
        """The unseen class that each image is assigned, int64 [N] in [0, U)."""
        return (self._image_logits(cells) + self.image_evidence(cells)).argmax(dim=1)

    def cell_features(self, cells: Cells, image_class: torch.Tensor) -> torch.Tensor:
        """What the scorer knows of each cell and its image's class (int64 [N]), [N, P, 3].

        Objectness, the multiple-instance classifier's logit and the word evidence of the cell's cluster.
        """
        index = image_class[:, None, None].expand(*cells.label.shape, 1)
        unseen = in_chunks(self.unseen, cells.features).gather(2, index)
        words = self.cluster_evidence[cells.cluster].gather(2, index)
        return torch.cat([in_chunks(self.objectness, cells.features), unseen, words], dim=-1)

    def answers(self, cells: Cells, truth: torch.Tensor, c: int, draw: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Cell features [R, 3] of images that show unseen class c, and whether the cell does, bool [R].

        `truth`, bool [N, P], is where images show it: an episode knows it of its held-out classes.
        """
        images = truth.any(dim=1).nonzero()[:, 0]
        images = images[torch.randperm(len(images), generator=draw)[:IMAGES_A_CLASS].to(images.device)]
        cells = cells[images]
        x = self.cell_features(cells, torch.full_like(images, c))[cells.valid]
        chosen = torch.randint(len(x), (CELLS_A_CLASS,), generator=draw).to(x.device)
        return x[chosen], truth[images][cells.valid][chosen]


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
            nn.BatchNorm1d(3, affine=False, momentum=None), nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 1)
        )
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
                "--pseudo-labels episodes needs images without an unseen class: give --target-images unseen"
            )
        num_target, num_shared, _ = (sum(len(valid) for *_, valid in part) for part in looks)
        raw, label, valid = (torch.cat(parts) for parts in zip(*chain(*looks)))
        del looks
        draw = torch.Generator().manual_seed(0)
        rows = valid.flatten().nonzero()[:, 0]
        sample = raw.flatten(0, 2)[rows[torch.randperm(len(rows), generator=draw)[:SAMPLE].to(rows.device)]].float()
        self.feature_mean.copy_(sample.mean(dim=0))
        self.feature_std.copy_(sample.std(dim=0).clamp(min=1e-6))
        self.centroids.copy_(kmeans(self._normalise(sample), CLUSTERS))
        cells = self._cells(raw, label, valid)
        with torch.random.fork_rng(devices=[]):  # for the scorer's initial weights
            torch.manual_seed(0)
            self._fit_scorer(cells[num_target:], draw)
            cells.target[:num_target] = True
            cells.valid[num_target : num_target + num_shared] = False  # targets again: only their labels count
            self.evidence.load_state_dict(self._fit_evidence(cells, self.unseen, draw).state_dict())

    def _fit_scorer(self, source: Cells, draw: torch.Generator) -> None:
        """Episodes on source images, and the scorer on their answers."""
        seen, answers = list(range(self.has_background, self.num_known)), []
        for held_out in (seen[j::NUM_EPISODES] for j in range(min(NUM_EPISODES, len(seen)))):
            episode = hold_out(source, held_out)
            if episode.target.any() and not episode.target.all():
                evidence = self._fit_evidence(episode, held_out, draw)
                truths = [source.label == c for c in held_out]
                answers += [evidence.answers(episode, truth, n, draw) for n, truth in enumerate(truths) if truth.any()]
        if not answers:
            raise UserError("--pseudo-labels episodes needs images that show different seen classes: give more images")
        x, y = (torch.cat(parts) for parts in zip(*answers))

        def loss() -> torch.Tensor:
            rows = torch.randint(len(x), (BATCH // 2,), generator=draw).to(x.device)
            return F.binary_cross_entropy_with_logits(self.scorer(x[rows])[:, 0], y[rows].float())

        self.scorer.train()  # mean and deviation of the features
        fit_by_steps(self.scorer.parameters(), loss, steps=400, learning_rate=3e-3)
        self.scorer.eval()

    def _fit_evidence(self, cells: Cells, unseen: list[int], draw: torch.Generator) -> Evidence:
        """The evidence of the task in which `unseen` are the unseen classes."""
        names = ImageNetNames(self.imagenet[1](unseen))
        evidence = Evidence(cells.features.shape[2], self.num_known, self.has_background, names).to(cells.label.device)
        evidence.fit(cells, draw)
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
        size, cells = look[1].shape[1:], self._cells(*look)
        image_class = self.evidence.image_class(cells)  # [N]
        logit = in_chunks(self.scorer, self.evidence.cell_features(cells, image_class))  # [N, P, 1]
        posterior = in_chunks(self.evidence.known, cells.features).softmax(dim=-1)

        def to_pixels(values: torch.Tensor, mode: str) -> torch.Tensor:
            return F.interpolate(values.float().view(-1, 1, *size), size=image.shape[-2:], mode=mode)[:, 0]

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
            labelled = marks.dtype != torch.bool
            yield (
                features,
                cells if labelled else torch.full_like(cells, VOID),
                (cells != VOID) if labelled else cells > 0,
            )

    def _cells(self, features: torch.Tensor, label: torch.Tensor, valid: torch.Tensor) -> Cells:
        """Cells of what `_look` gives; it overwrites the features, of which a copy could be gigabytes."""
        features, label, valid = features.flatten(1, 2), label.flatten(1), valid.flatten(1)
        categories = in_chunks(self._likeliest_categories, features)
        cluster = torch.empty_like(label)
        for n in range(len(features)):
            unit = self._normalise(features[n].float())
            cluster[n] = (unit @ self.centroids.T).argmax(dim=-1)
            features[n] = SCALE * unit
        return Cells(features, label, valid, torch.zeros_like(valid[:, 0]), cluster, categories)

    def _likeliest_categories(self, features: torch.Tensor) -> torch.Tensor:
        """Raw features [R, C] -> input of `ImageNetNames`, float16 [R, 2 M]."""
        probability, index = self.imagenet[0](features).softmax(dim=1).topk(CATEGORIES)
        return torch.cat([index, probability], dim=1).half()  # float16 holds whole numbers below 2,048 as they are

    def _normalise(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize((features - self.feature_mean) / self.feature_std, dim=-1)
