"""The teacher of its own in stage 2: clusters, names, cuts, and what it means for a run."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import train_st_split
from dataset.splits import Split
from helpers import load, mask_path, read_log, same_bits, target_only, train, weights
from model.backbone import build_backbone
from model.discovery import (
    Discovery,
    dominant_name,
    kmeans,
    log_doubt,
    mean_by,
    share_above,
    standardise,
)
from model.imagenet_names import ImageNetNames
from model.segmenter import Segmenter
from model.word_regression import with_constant, word_regression

TAUGHT = {"teacher": "frozen", "num_clusters": 4, "keep": 0.3, "keep_known": 0.4, "rare_power": 0.5}


def two_groups(number: int = 50) -> torch.Tensor:
    """Unit points around two directions, the first half around one."""
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(2, 6), dim=1).repeat_interleave(number, dim=0)
    return F.normalize(centres + 0.05 * torch.randn(2 * number, 6), dim=1)


def test_kmeans_finds_groups_and_gives_unit_centroids():
    points = two_groups()
    centroids = kmeans(points, 2)
    cluster = (points @ centroids.T).argmax(1)
    assert torch.allclose(centroids.norm(dim=1), torch.ones(2))
    assert len(set(cluster[:50].tolist())) == len(set(cluster[50:].tolist())) == 1 and cluster[0] != cluster[-1]
    assert torch.equal(centroids, kmeans(points, 2))


def test_fewer_points_than_clusters_do():
    assert kmeans(two_groups(1), 5).shape == (5, 6)


def test_mean_by_group():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]])
    assert mean_by(torch.tensor([0, 0, 2]), values, 4).tolist() == [[2.0, 3.0], [0.0, 0.0], [10.0, 20.0], [0.0, 0.0]]


def test_doubt_is_that_no_known_class_is_likely():
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    doubt = log_doubt(logits, num_seen=2)
    assert doubt[0] < -5 and doubt[1] > -0.01


def test_evidence_is_between_classes():
    evidence = standardise(torch.randn(100, 4) * torch.tensor([1.0, 2, 3, 9]) + torch.randn(100, 1) * 50)
    assert torch.allclose(evidence.mean(0), torch.zeros(4), atol=1e-5) and torch.allclose(
        evidence.std(0), torch.ones(4)
    )
    plain = torch.randn(100, 4)
    assert torch.allclose(standardise(plain + torch.randn(100, 1) * 50), standardise(plain), atol=1e-3)


EVIDENCE = torch.tensor([[3.0, 0.0, 0.0], [2.0, 1.9, 0.0], [2.0, 0.0, 1.8], [2.5, 0.0, 0.0]])


def test_imagenet_names_leave_out_rows_of_zeros():
    head = torch.nn.Identity()  # features are the scores of four categories
    similarity = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    features = 9 * torch.eye(4).repeat(5, 1)
    evidence = ImageNetNames(head, similarity)(features)
    assert evidence[0].argmax() == 0 and evidence[1].argmax() == 1
    assert torch.allclose(evidence[2], evidence[3]) and torch.allclose(evidence.mean(0), torch.zeros(2), atol=1e-5)


def source_of(pictures):
    """The same images with labels, of classes 0 and 1."""
    return [(image, (image[:, 0] > 127).to(torch.uint8)) for image, _ in pictures]


@pytest.fixture
def discovery():
    """A teacher of two known classes, two unseen ones, and its pictures."""
    torch.manual_seed(0)
    model = Segmenter("small", F.normalize(torch.randn(4, 5), dim=1))
    pictures = [(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), torch.ones(3, 32, 32).bool())] * 2
    return model, Discovery(model, num_seen=2, num_clusters=3), pictures


def test_each_class_keeps_its_portion_and_known_pixels_their_class(discovery):
    model, teacher, pictures = discovery
    teacher.begin_round(model, pictures, [], source_of(pictures), keep=0.2, keep_known=0.5)
    image, valid = pictures[0]
    label = teacher(image, valid)
    assert label.shape == (3, 32, 32) and set(label.unique().tolist()) <= {0, 1, 2, 3, 255}
    unseen, known = ((label >= 2) & (label < 255)).float().mean(), (label < 2).float().mean()
    assert 0.05 < unseen < 0.4 and 0.3 < known < 0.6
    assert (teacher(image, ~valid) == 255).all()


def test_clusters_that_other_pictures_show_too_score_lower(discovery):
    model, teacher, pictures = discovery
    teacher.begin_round(model, pictures, pictures, source_of(pictures), keep=0.2, keep_known=0.5)
    assert torch.allclose(teacher.log_ratio, torch.zeros(3), atol=1e-6)


def test_a_regression_names_what_the_labels_and_words_say():
    """Of three directions of features two are labelled; the third is half of each, as its word is."""
    torch.manual_seed(0)
    words = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.1], [-1.0, 0.2, 0.0]]), dim=1)
    label = torch.randint(0, 3, (300,))  # 0: no word
    features = 3 * F.one_hot(label, 3).float() + 0.1 * torch.randn(300, 3)
    to_unseen = word_regression(features, label, words, num_seen=2, num_auxiliary=1)
    assert to_unseen.shape == (4, 2)
    score = with_constant(torch.tensor([[0.0, 1.5, 1.5], [3.0, 0.0, 0.0]])) @ to_unseen
    assert score[0, 0] > score[0, 1] and score[0, 0] > score[1, 0] + 0.1


def test_a_regression_lets_rare_classes_count_alike():
    torch.manual_seed(0)
    words = F.normalize(torch.randn(4, 6), dim=1)
    features, label = torch.randn(40, 5), torch.arange(40) % 3
    often = torch.cat([torch.arange(40), torch.arange(40)[label == 0].repeat(9)])
    fit = [word_regression(features[at], label[at], words, 3) for at in (torch.arange(40), often)]
    assert torch.allclose(*fit, atol=1e-5)


def test_cluster_names_do_not_depend_on_the_projection(discovery):
    model, _, pictures = discovery
    source = source_of(pictures)
    named = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        other = Segmenter("small", model.projection.class_embeddings)
        other.backbone.load_state_dict(model.backbone.state_dict())  # the same eyes, another projection
        teacher = Discovery(other, num_seen=2, num_clusters=3)
        teacher.begin_round(other, pictures, [], source, keep=0.2, keep_known=0.5)
        named.append(teacher.cluster_name)
    assert torch.equal(*named)


def test_a_picture_is_called_by_what_fits_best():
    picture = torch.tensor([0, 0, 0, 1, 1])
    name, fit = torch.tensor([0, 1, 1, 0, 2]), torch.tensor([3.0, 1.0, 4.0, 0.5, -torch.inf])
    assert dominant_name(picture, name, fit, 3).tolist() == [1, 1, 1, 0, 0]


def test_the_share_above_is_of_the_picture_and_of_what_counts():
    picture = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]])
    score = torch.tensor([[0.1, 9.0], [0.4, 7.0], [0.2, -torch.inf], [0.3, -torch.inf]])
    assert share_above(picture, score)[:, 0].tolist() == [0.75, 0.0, 0.5, 0.25]
    assert share_above(picture, score)[:2, 1].tolist() == [0.0, 0.5] and (share_above(picture, score)[2:, 1] >= 1).all()


def test_one_name_a_picture_and_a_gate_of_its_own(discovery):
    model, _, pictures = discovery
    image, valid = pictures[0]
    labels = {}
    for one_name, gate in ((False, 1.0), (True, 1.0), (False, 0.25)):
        teacher = Discovery(model, num_seen=2, num_clusters=3, one_name=one_name, picture_gate=gate)
        teacher.begin_round(model, pictures, [], source_of(pictures), keep=1.0, keep_known=0.0)
        teacher.cluster_name.copy_(torch.tensor([0, 1, 0]))
        teacher.cuts.fill_(-torch.inf)
        labels[one_name, gate] = teacher(image, valid).flatten(1)
    unseen = [{*label.tolist()} - {255} for label in labels[False, 1.0]]
    assert any(len(found) == 2 for found in unseen)  # else there is nothing to choose
    assert all(len({*label.tolist()} - {255}) == 1 for label in labels[True, 1.0])
    assert all(0.1 < (label != 255).float().mean() <= 0.25 for label in labels[False, 0.25])


def test_a_teacher_never_trains(discovery):
    _, teacher, _ = discovery
    assert not teacher.train().training and not any(p.requires_grad for p in teacher.parameters())


# Runs


def test_a_taught_run_goes_on_exactly(data, tmp_path):
    changes = TAUGHT | {"rounds": 2, "max_steps": 4, "save_every": 1}
    whole = train(2, data, tmp_path / "whole", **changes)
    stopped = stop_after(3, data, tmp_path / "stopped", changes)
    assert load(stopped / "latest.pth")["step"] == 3
    train(2, data, tmp_path / "stopped", **changes | {"restore_from_where": "continue"})
    assert same_bits(weights(whole), weights(stopped))


@pytest.mark.parametrize("published", [True, False])
def test_clusters_are_of_imagenet_features_where_the_backbone_is_trained(data, tmp_path, published):
    """Of weights from a file; without any, of what stage 1 made of the network. Never of random ones."""
    torch.save(build_backbone("small", "none").trunk.state_dict(), tmp_path / "imagenet.pth")
    weights_from = {"backbone_weights": tmp_path / "imagenet.pth" if published else "none"}
    first = train(1, data, tmp_path / "runs", **weights_from)
    changes = TAUGHT | weights_from | {"restore_from_where": "saved", "save_every": 1}
    second = train(2, data, tmp_path / "runs", **changes | {"stage1_checkpoint": first / "latest.pth"})
    eyes = part_of(load(second / "latest.pth")["teacher"], "eyes.trunk.")
    trained = part_of(weights(first), "backbone.trunk.")
    assert same_bits(eyes, torch.load(tmp_path / "imagenet.pth") if published else trained)
    assert not same_bits(trained, torch.load(tmp_path / "imagenet.pth"))
    stopped = stop_after(2, data, tmp_path / "stopped", changes | {"stage1_checkpoint": first / "latest.pth"})
    train(2, data, tmp_path / "stopped", **changes | {"restore_from_where": "continue"})
    assert same_bits(weights(second), weights(stopped))


def part_of(state: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def stop_after(step: int, data, output, changes):
    """A run that dies as its step after `step` begins."""
    steps, original = itertools.count(), train_st_split.train_step

    def mortal(*args, **kwargs):
        if next(steps) == step:
            raise ZeroDivisionError
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train_st_split, "train_step", mortal)
        train(2, data, output, **changes)
    return output / "split1" / "stage2"


def test_target_masks_say_nothing_to_a_teacher(data, own_data, tmp_path):
    first = train(2, data, tmp_path / "with", **TAUGHT)
    for picture in target_only(own_data, Split.voc(1)):
        mask_path(own_data, picture).unlink()
    second = train(2, own_data, tmp_path / "without", **TAUGHT)
    assert same_bits(weights(first), weights(second))


@pytest.mark.parametrize(
    "changes",
    [{"picture_gate": 0.2}, {"keep": 0.9}, {"rare_power": 0}, {"num_clusters": 0}],
)
def test_each_flag_of_a_taught_run_changes_the_network(taught, data, tmp_path, changes):
    assert not same_bits(weights(taught), weights(train(2, data, tmp_path, **TAUGHT | changes)))


def test_one_name_a_picture_changes_the_network(taught, data, tmp_path):
    assert not same_bits(weights(taught), weights(train(2, data, tmp_path, "--one-name", **TAUGHT)))


@pytest.fixture(scope="module")
def taught(data, tmp_path_factory):
    return train(2, data, tmp_path_factory.mktemp("taught"), **TAUGHT)


# The background that is trained on and not scored, and the supervised ceiling


def test_an_auxiliary_background_is_trained_on_and_not_scored(data, tmp_path):
    folder = train(1, data, tmp_path, "--auxiliary-background")
    plain = train(1, data, tmp_path / "plain")
    assert "projection.auxiliary.weight" in weights(folder) and "projection.auxiliary.weight" not in weights(plain)
    assert list(read_log(folder)[-1]["per_class"]) == list(read_log(plain)[-1]["per_class"])


def test_supervised_is_marked_and_no_stage_2_begins_there(data, tmp_path, capsys):
    folder = train(1, data, tmp_path, "--supervised")
    assert "SUPERVISED" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        train(2, data, tmp_path / "two", restore_from_where="saved", stage1_checkpoint=folder / "latest.pth")
    assert end.value.code == 2 and "--supervised" in capsys.readouterr().err
