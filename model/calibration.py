"""Scores of seen and unseen classes made comparable after training."""

import torch


def calibrate(logits: torch.Tensor, num_seen: int, gamma: float) -> torch.Tensor:
    """Calibrated stacking: softmax, less `gamma` for the seen classes.

    A network that never had a label of an unseen class prefers the seen ones; gamma is how much surer of a seen class
    it must be (Chao et al., ECCV 2016; SPNet, Xian et al., CVPR 2019). The order among the seen classes stays, and that
    among the unseen ones.

    Args:
        logits: [N, K, H, W], seen classes first.
        num_seen: the first so many of the K classes are seen.
        gamma: in [0, 1]; 0 changes nothing, 1 lets no seen class win.

    Returns:
        Scores [N, K, H, W] for an argmax; they are no probabilities. With gamma 0 the logits themselves.
    """
    if gamma == 0:
        return logits
    scores = logits.softmax(dim=1)
    scores[:, :num_seen] -= gamma
    return scores
