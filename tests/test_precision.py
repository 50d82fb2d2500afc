"""What makes a step faster changes no more of it than is said here; test_simulated_gpu.py has what waits for a GPU."""

import pytest
import torch

from helpers import STAGES, read_log, train, use_network
from model import backbone


def losses_of(patch, stage, data, output, **changes) -> torch.Tensor:
    """The loss of each of a run's first 20 steps, without dropout, which draws other pixels in another precision.

    At a rate higher than the published one, runs drift apart after any rounding.
    """

    def build():
        network = backbone.small(None)
        network.classifier[-1].p = 0.0
        return network

    use_network(build, patch)
    folder = train(stage, data, output, max_steps=20, evaluate_every=1, learning_rate=1e-4, **changes)
    return torch.tensor([line["loss_total"] for line in read_log(folder)])


@pytest.mark.parametrize("stage", STAGES)
def test_losses_agree_with_full_precision(stage, data, tmp_path, monkeypatch):
    """The first 20: half a percent in the mean, and each within 5 %."""
    full, bf16 = (losses_of(monkeypatch, stage, data, tmp_path / amp, amp=amp) for amp in ("off", "bf16"))
    assert not torch.equal(bf16, full) and len(bf16) == 20
    difference = (bf16 / full - 1).abs()
    assert difference.mean() < 0.005 and difference.max() < 0.05
