"""Learning from held-out seen classes what an unseen object looks like, and the labels that come of it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import same
from model import pseudo_labels
from model.backbone import build_backbone, imagenet_head
from model.class_evidence import fit_by_steps, kmeans
from model.pseudo_labels import Cells, EpisodePseudoLabeler, Evidence, hold_out
from utils.errors import UserError

VOID = 255


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch):
    """A fifth of the steps: toy data is learnt in these."""

    def fewer(parameters, loss, steps, learning_rate):
        return fit_by_steps(parameters, loss, steps // 5, learning_rate)

    monkeypatch.setattr(pseudo_labels, "fit_by_steps", fewer)


def test_kmeans_finds_groups():
    torch.manual_seed(0)
    points = F.normalize(torch.randn(2, 6).repeat_interleave(50, dim=0) + 0.05 * torch.randn(100, 6), dim=1)
    centroids = kmeans(points[torch.randperm(100)], 2)
    cluster = (points @ centroids.T).argmax(1)
    assert torch.allclose(centroids.norm(dim=1), torch.ones(2))
    assert len(set(cluster[:50].tolist())) == len(set(cluster[50:].tolist())) == 1 and cluster[0] != cluster[-1]
    assert kmeans(points[:1], 5).shape == (5, 6)  # fewer points than clusters


def cells(num_images=12, channels=8, num_known=4):
    """Cells of 3 x 3 whose features are their class's direction; image n shows background and class 1 + n % 3."""
    draw = torch.Generator().manual_seed(0)
    shown = 1 + torch.arange(num_images) % (num_known - 1)
    label = torch.where(torch.rand(num_images, 9, generator=draw) < 0.5, shown[:, None], 0)
    label[:, :2] = torch.stack([shown, 0 * shown], dim=1)
    noise = torch.randn(num_images, 9, channels, generator=draw)
    features = 20 * F.normalize(torch.eye(channels)[label] + 0.05 * noise, dim=-1)
    valid = torch.ones_like(label, dtype=torch.bool)
    target, words = torch.zeros(num_images, dtype=torch.bool), features[..., [1, 2, 1, 2]]
    return Cells(features.half(), label, valid, target, label % 100, words)


def evidence_of_two():
    """Evidence for classes 1 and 2 of `cells`, whose words tell them apart."""
    names = nn.Identity()
    names.tables = torch.zeros(1000, 2, 2)
    return Evidence(8, num_known=4, has_background=True, names=names)


def test_held_out_cells_are_void_and_their_images_the_target():
    source = cells()
    episode = hold_out(source, [2])
    assert torch.equal(episode.label, torch.where(source.label == 2, VOID, source.label))
    assert torch.equal(episode.target, (source.label == 2).any(dim=1))


def test_nothing_fitted_in_an_episode_depends_on_the_held_out_labels():
    """Only the scorer may learn from them: which held-out class a cell shows changes no bit of the evidence."""
    source = cells()
    swapped = torch.tensor([0, 2, 1, 3])
    states = []
    for label in (source.label, swapped[source.label]):
        episode = hold_out(replace(source, label=label), [1, 2])
        evidence = evidence_of_two()
        evidence.fit(episode, torch.Generator().manual_seed(0))
        states.append(evidence.state_dict())
    assert same(*states)


def test_evidence_finds_the_class_of_an_image_and_its_cells():
    source = cells(24)
    episode = hold_out(source, [1, 2])
    evidence = evidence_of_two()
    evidence.fit(episode, torch.Generator().manual_seed(0))
    target = episode[episode.target]
    image_class = evidence.image_class(target)
    assert torch.equal(image_class, (source.label[episode.target] == 2).any(dim=1).long())
    logits = evidence.unseen(20 * torch.eye(8))  # background, the two held-out classes, a seen one
    assert logits[1, 0] > logits[[0, 2, 3], 0].max() and logits[2, 1] > logits[[0, 1, 3], 1].max()
    x = evidence.cell_features(target, image_class)
    is_object = source.label[episode.target] > 0
    assert (x[is_object].mean(dim=0) > x[~is_object].mean(dim=0)).all()


IMAGES = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
ALL = torch.ones(6, 32, 32, dtype=torch.bool)
MAY = torch.ones(6, dtype=torch.bool)
LABEL = (1 + torch.arange(6)[:, None, None] % 3) * (IMAGES[:, 0] > 127)  # background 0, one of three seen classes each


def similarity(classes):
    """Of 1,000 categories to classes."""
    return torch.rand(1000, 9, generator=torch.Generator().manual_seed(1))[:, classes]


def labeler(similarity=similarity, **options):
    """Of background, three seen and two unseen classes."""
    torch.manual_seed(0)
    options = {"num_known": 4, "num_unseen": 2, "has_background": True} | options
    return EpisodePseudoLabeler(
        build_backbone("small"), imagenet=(imagenet_head("small", "none"), similarity), **options
    )


def fitted(**options):
    found = labeler(**options)
    found.fit([(IMAGES, ALL)], [(IMAGES[:2], LABEL[:2].byte())], [(IMAGES, LABEL.byte())])
    return found


def test_labels_are_of_known_classes_or_the_unseen_class_of_the_image():
    found = fitted()
    label = found(IMAGES, ALL, MAY)
    assert label.shape == (6, 32, 32)
    assert all(len(set(one.unique().tolist()) & {4, 5}) <= 1 for one in label) and label.max() < 6
    half = ALL.clone()
    half[:, :16] = False
    assert (found(IMAGES, half, MAY)[:, :16] == VOID).all()


def test_an_image_without_seen_classes_gets_background_and_its_unseen_class():
    label = fitted()(IMAGES, ALL, ~MAY)
    assert set(label.unique().tolist()) <= {0, 4, 5}


def test_fit_is_reproducible_and_its_state_restores_the_labels():
    first, second = fitted(), labeler()
    assert same(first.state_dict(), fitted().state_dict())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(IMAGES, ALL, MAY), second(IMAGES, ALL, MAY))


def test_no_background_class():
    found = labeler(num_known=3, has_background=False)
    label = torch.where(LABEL == 0, VOID, LABEL - 1).byte()
    found.fit([(IMAGES, ALL)], [], [(IMAGES, label)])
    assert set(found(IMAGES, ALL, MAY).unique().tolist()) <= {0, 1, 2, 3, 4}


def test_imagenet_names_are_asked_for_the_classes_of_each_task():
    asked = []

    def recorded(classes):
        asked.append(list(classes))
        return similarity(classes)

    fitted(similarity=recorded)
    assert asked == [[4, 5], [1], [2], [3], [4, 5]]


def test_images_without_an_unseen_class_are_needed():
    with pytest.raises(UserError, match="target-images unseen"):
        labeler().fit([(IMAGES, ALL)], [(IMAGES, LABEL.byte())], [])


def test_a_class_that_no_image_shows_teaches_nothing():
    found = labeler()
    found.fit([(IMAGES, ALL)], [], [(IMAGES, LABEL.clamp(max=2).byte())])
    assert found.scorer[1].weight.isfinite().all()
    with pytest.raises(UserError, match="different seen classes"):
        labeler().fit([(IMAGES, ALL)], [], [(IMAGES, LABEL.clamp(max=1).byte())])
