"""Word regression and ImageNet's names: evidence for classes without a label."""

import numpy as np
import torch
import torch.nn.functional as F

from model.class_evidence import (
    ImageNetNames,
    WordRegression,
    fit_multiple_instance,
)


def test_word_regression_is_the_closed_form():
    draw = np.random.default_rng(0)
    x, label = draw.standard_normal((40, 5)), draw.integers(0, 4, 40)  # class 0 has no word
    words = draw.standard_normal((5, 6))
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    found = WordRegression.fit(*map(torch.tensor, (x, label, words)), num_seen=3, num_auxiliary=1).weight
    x *= np.sqrt(5) / np.linalg.norm(x, axis=1, keepdims=True)
    x1, y = np.c_[x, np.ones(40)], np.eye(4)[label]
    d = (1 / y.sum(0))[label] / 4
    to_seen = np.linalg.solve(x1.T * d @ x1 + 0.1 * np.eye(6), x1.T * d @ y)[:, 1:]
    to_unseen = np.linalg.solve(words[:3] @ words[:3].T + np.eye(3), words[:3] @ words[3:].T)
    np.testing.assert_allclose(found.numpy(), to_seen @ to_unseen, atol=1e-5)


def test_word_regression_finds_a_class_between_two_others():
    """Of three directions of features two are labelled; the third is half of each, as its word is."""
    torch.manual_seed(0)
    words = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.1], [-1.0, 0.2, 0.0]]), dim=1)
    label = torch.randint(0, 3, (300,))
    features = 3 * F.one_hot(label, 3).float() + 0.1 * torch.randn(300, 3)
    to_unseen = WordRegression.fit(features, label, words, num_seen=2, num_auxiliary=1)
    score = to_unseen(torch.tensor([[0.0, 1.5, 1.5], [3.0, 0.0, 0.0]]))
    assert score[0, 0] > score[0, 1] and score[0, 0] > score[1, 0] + 0.1


def test_imagenet_names_are_the_equation():
    draw = np.random.default_rng(0)
    similarity, index = draw.random((50, 3)), draw.integers(0, 50, (4, 6))
    probability = draw.random((4, 6)) / 6
    found = ImageNetNames(torch.tensor(similarity))(torch.tensor(np.c_[index, probability]))
    weight = np.exp(3 * (similarity - similarity.mean(0)) / similarity.std(0, ddof=1))
    weight /= weight.mean(0)
    plain = (probability[..., None] * similarity[index]).sum(1)
    sharp = np.log((probability[..., None] * weight[index]).sum(1) + 1e-3)
    expected = np.c_[plain - plain.mean(1, keepdims=True), sharp - sharp.mean(1, keepdims=True)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_multiple_instance_classifier_finds_what_only_its_images_show():
    """Images 0-7 show direction 1, images 8-15 direction 2, once each among cells of direction 0, as all others do."""
    features = torch.eye(3)[torch.zeros(16, 5, dtype=torch.long)]
    image_class = torch.arange(16) // 8
    features[:, 0] = torch.eye(3)[1 + image_class]
    classifier, rows = torch.nn.Linear(3, 2), 20 * torch.eye(3)[:1]
    bags = 20 * features, torch.ones(16, 5, dtype=torch.bool)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        fit_multiple_instance(classifier, bags, image_class, (rows, torch.tensor([0])), draw, steps=60)
        logits = classifier(20 * torch.eye(3))
    assert logits[1].argmax() == 0 and logits[2].argmax() == 1
    assert logits[0].max() < logits[1, 0] and logits[0].max() < logits[2, 1]
