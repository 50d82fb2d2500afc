"""A teacher's opinion of a picture, averaged over flips and scales, and where all of its views agree."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as pictures


@torch.no_grad()
def predict_views(
    teacher: Callable[[torch.Tensor], torch.Tensor],
    image: torch.Tensor,
    scales: Sequence[float] = (1.0,),
    flip: bool = True,
    classes: slice = slice(None),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean softmax over the views of each picture, and the pixels whose best class is the same in every view.

    A pseudo-label that a flip or another scale would change is likely wrong. Agreement over flips and the scales 1,
    1.5 and 1.75 is that of STRICT: Pastore et al., "A Closer Look at Self-training for Zero-Label Semantic
    Segmentation", arXiv 2104.11692, who let unseen classes alone compete.

    Args:
        teacher: uint8 pictures [N, 3, h, w] of any size -> logits [N, K, h, w]; called once a view, without gradients.
            Put its network into evaluation mode first.
        image: uint8 [N, 3, H, W].
        scales: the sizes of the views, as multiples of the picture's.
        flip: look at each scale mirrored left to right as well.
        classes: those that compete for a pixel's best class, `slice(num_seen, None)` for the unseen ones.

    Returns:
        The mean probability of all K classes, float32 [N, K, H, W], and `agree`, bool [N, H, W].

    Raises:
        ValueError: if there is no scale, or one is not above 0.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be one number or more, each above 0, not {tuple(scales)}")
    size = image.shape[-2:]
    total, first, agree = 0.0, None, None
    # One view at a time, summed at once: memory doesn't grow with their number.
    for scale in scales:
        scaled_size = [max(1, round(side * scale)) for side in size]
        scaled = image if scaled_size == list(size) else pictures.resize(image, scaled_size, antialias=True)
        for mirrored in (False, True) if flip else (False,):
            logits = teacher(scaled.flip(-1) if mirrored else scaled)  # [N, K, h, w]
            probability = logits.float().softmax(dim=1)
            if mirrored:
                probability = probability.flip(-1)
            if probability.shape[-2:] != size:
                # Pixel centres as in the resizing of the picture, which align_corners would shift.
                probability = F.interpolate(probability, size, mode="bilinear", align_corners=False, antialias=True)
            best = probability[:, classes].argmax(dim=1)  # [N, H, W]
            first = best if first is None else first
            agree = best == first if agree is None else agree & (best == first)
            total = total + probability
    return total / (len(scales) * (1 + flip)), agree
