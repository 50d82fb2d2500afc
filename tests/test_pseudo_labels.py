"""The frozen teacher: clusters, their classes, thresholds, and the labels that come of them."""

import pytest
import torch
import torch.nn.functional as F

from model.backbone import build_backbone
from model.pseudo_labels import ClusterPseudoLabeler, image_class, kmeans, log_uncertainty, mean_by_group
from model.segmenter import Segmenter


def two_groups(number=50):
    """Unit points around two directions, the first half around one."""
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(2, 6), dim=1).repeat_interleave(number, dim=0)
    return F.normalize(centres + 0.05 * torch.randn(2 * number, 6), dim=1)


def test_kmeans_finds_groups():
    points = two_groups()
    centroids = kmeans(points[torch.randperm(100)], 2)
    cluster = (points @ centroids.T).argmax(1)
    assert torch.allclose(centroids.norm(dim=1), torch.ones(2))
    assert len(set(cluster[:50].tolist())) == len(set(cluster[50:].tolist())) == 1 and cluster[0] != cluster[-1]
    assert kmeans(two_groups(1), 5).shape == (5, 6)  # fewer points than clusters


def test_mean_by_group():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]])
    assert mean_by_group(torch.tensor([0, 0, 2]), values, 3).tolist() == [[2.0, 3.0], [0.0, 0.0], [10.0, 20.0]]


def test_uncertainty_is_that_no_seen_class_is_likely():
    found = log_uncertainty(torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]), num_seen=2)
    assert found[0] < -5 and found[1] > -0.01


def test_class_of_an_image_is_that_of_its_best_cell():
    image, unseen = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 1, 0, 2])
    fit = torch.tensor([3.0, 1.0, 4.0, 0.5, -torch.inf])
    assert image_class(image, unseen, fit, 3).tolist() == [1, 1, 1, 0, 0]


IMAGES = torch.randint(0, 256, (2, 3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
ALL = torch.ones(3, 32, 32, dtype=torch.bool)
TARGET = [(image, ALL) for image in IMAGES]
SOURCE = [(image, (image[:, 0] > 127).to(torch.uint8)) for image in IMAGES]  # labels of classes 0 and 1


def student(seed=0):
    """A network of two seen and two unseen classes."""
    torch.manual_seed(seed)
    words = F.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    return Segmenter(build_backbone("small"), words)


def fitted(model=None, others=(), **options):
    model = model or student()
    labeler = ClusterPseudoLabeler(model, num_seen=2, num_clusters=3, **options)
    labeler.fit(model, TARGET, others, SOURCE)
    return labeler


def test_each_class_keeps_its_share_and_seen_pixels_their_class():
    labeler = fitted(keep=0.4, keep_seen=0.5)
    label, weight = labeler(IMAGES[0], ALL)
    assert label.shape == weight.shape == (3, 32, 32) and set(label.unique().tolist()) <= {0, 1, 2, 3, 255}
    unseen, seen = ((label >= 2) & (label < 255)).float().mean(), (label < 2).float().mean()
    assert 0.02 < unseen < 0.45 and 0.3 < seen < 0.6
    assert all(len(set(one.unique().tolist()) & {2, 3}) <= 1 for one in label)  # one unseen class an image
    label, weight = labeler(IMAGES[0], ~ALL)
    assert (label == 255).all() and (weight == 1).all()


def test_rare_classes_weigh_more():
    plain, rare = fitted(rare_power=0.0), fitted(rare_power=0.5)
    assert torch.equal(plain.class_weight, torch.ones(4)) and torch.equal(rare.class_weight[:2], torch.ones(2))
    assert torch.equal(plain.thresholds, rare.thresholds) and rare.class_weight.max() <= 5
    label, weight = rare(IMAGES[0], ALL)
    assert torch.equal(weight, rare.class_weight[label.masked_fill(label == 255, 0)])


def test_clusters_that_other_images_show_score_lower():
    alone, shared = fitted(), fitted(others=TARGET)
    torch.testing.assert_close(alone.cluster_score, shared.cluster_score, rtol=0, atol=1e-5)  # the same share in both
    half = fitted(others=TARGET[:1])
    assert not torch.allclose(half.cluster_score, alone.cluster_score, atol=1e-3)


def test_cluster_classes_do_not_depend_on_the_projection():
    model, other = student(), student(seed=9)
    other.backbone.load_state_dict(model.backbone.state_dict())
    assert torch.equal(fitted(model).cluster_class, fitted(other).cluster_class)


def test_evidence_decides_the_class_of_a_cluster():
    class Evidence(torch.nn.Module):
        def forward(self, features):
            return torch.stack([features[:, 0], -features[:, 0]], dim=1) * 1e6

    labeler = fitted(imagenet_evidence=Evidence())
    assert not torch.equal(labeler.cluster_evidence, fitted().cluster_evidence)


def test_feature_extractor_gives_the_features_of_the_clusters():
    extractor = build_backbone("small")
    labeler = fitted(feature_extractor=extractor)
    torch.testing.assert_close(labeler.feature_mean, fitted().feature_mean, rtol=0, atol=9)
    assert labeler.feature_extractor is extractor and not torch.equal(labeler.centroids, fitted().centroids)


def test_state_dict_holds_all_that_was_fitted():
    labeler, fresh = fitted(), ClusterPseudoLabeler(student(seed=3), num_seen=2, num_clusters=3)
    fresh.load_state_dict(labeler.state_dict())
    assert all(map(torch.equal, fresh(IMAGES[0], ALL), labeler(IMAGES[0], ALL)))


def test_teacher_never_trains():
    labeler = fitted()
    assert not labeler.train().training and not any(p.requires_grad for p in labeler.parameters())


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_precision_is_that_of_training(amp):
    torch.manual_seed(0)
    model = Segmenter(build_backbone("small"), torch.randn(4, 5), amp=amp)
    seen = []
    labeler = fitted(model)
    labeler.teacher.backbone.trunk.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    labeler(IMAGES[0], ALL)
    assert seen == [torch.bfloat16 if amp == "bf16" else torch.float32]
