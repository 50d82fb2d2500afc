"""ImageNet's names and a multiple-instance classifier: evidence for classes without a label."""

import numpy as np
import torch

from model.class_evidence import ImageNetNames, fit_multiple_instance


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
