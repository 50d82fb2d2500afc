"""Word regression and ImageNet's names: evidence for classes without a label."""

import numpy as np
import torch
import torch.nn.functional as F

from model import class_evidence
from model.class_evidence import ImageNetEvidence, standardise, with_constant, word_regression


def test_word_regression_is_the_closed_form(monkeypatch):
    monkeypatch.setattr(class_evidence, "CHUNK", 7)
    draw = np.random.default_rng(0)
    x, label = draw.standard_normal((40, 5)), draw.integers(0, 4, 40)  # class 0 has no word
    words = draw.standard_normal((5, 6))
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    found = word_regression(*map(torch.tensor, (x, label, words)), num_seen=3, num_auxiliary=1)
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
    to_unseen = word_regression(features, label, words, num_seen=2, num_auxiliary=1)
    score = with_constant(torch.tensor([[0.0, 1.5, 1.5], [3.0, 0.0, 0.0]])) @ to_unseen
    assert score[0, 0] > score[0, 1] and score[0, 0] > score[1, 0] + 0.1


def test_imagenet_evidence_leaves_out_rows_of_zeros():
    similarity = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    features = 9 * torch.eye(4).repeat(5, 1)  # they are the logits of four ImageNet classes
    evidence = ImageNetEvidence(torch.nn.Identity(), similarity)(features)
    assert evidence[0].argmax() == 0 and evidence[1].argmax() == 1
    assert torch.allclose(evidence[2], evidence[3]) and torch.allclose(evidence.mean(0), torch.zeros(2), atol=1e-5)


def test_standardised_evidence_compares_classes():
    torch.manual_seed(0)
    plain = torch.randn(100, 4) * torch.tensor([1.0, 2, 3, 9])
    found = standardise(plain + torch.randn(100, 1) * 50)
    assert torch.allclose(found, standardise(plain), atol=1e-3)
    assert torch.allclose(found.mean(0), torch.zeros(4), atol=1e-5) and torch.allclose(found.std(0), torch.ones(4))
