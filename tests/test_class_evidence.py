"""ImageNet's names: evidence for classes without a label."""

import numpy as np
import torch

from model.class_evidence import ImageNetNames


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
