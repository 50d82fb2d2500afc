"""Features -> scores of classes, through the space of word embeddings."""

import torch
import torch.nn.functional as F
from torch import nn


class EmbeddingProjection(nn.Module):
    """Projects features into the embedding space and scores them against the class embeddings.

    logits = projection(features) . class_embeddings^T

    Args:
        channels: depth C of the features.
        class_embeddings: float [K, D], a row a class, seen classes first. Kept L2-normalised, never trained.
        num_auxiliary: classes without a word, scored by a learnt 1x1 convolution, before the others.
    """

    def __init__(self, channels: int, class_embeddings: torch.Tensor, num_auxiliary: int = 0):
        super().__init__()
        self.auxiliary = nn.Conv2d(channels, num_auxiliary, kernel_size=1) if num_auxiliary else None
        self.project = nn.Conv2d(channels, class_embeddings.shape[1], kernel_size=1)
        self.register_buffer("class_embeddings", F.normalize(class_embeddings.float(), dim=1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w] -> logits [N, num_auxiliary + K, h, w]."""
        projection = self.project(features)  # [N, D, h, w]
        logits = F.conv2d(projection, self.class_embeddings[:, :, None, None])  # [N, K, h, w]
        return logits if self.auxiliary is None else torch.cat([self.auxiliary(features), logits], dim=1)
