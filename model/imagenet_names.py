"""What the ImageNet classifier says of a pixel, told in the words of other classes.

ConSE (Norouzi et al., ICLR 2014): a picture of a class that a classifier does not know lies, in the space of words,
among the classes that it takes the picture for. Here for every cell of the trunk's features.
"""

import torch
from torch import nn


class ImageNetNames(nn.Module):
    """Expected nearness of a cell's ImageNet class to each unseen class.

    Args:
        head: features [P, C] -> ImageNet logits [P, 1000], the published classifier of the trunk's weights.
        similarity: [1000, U], see `embeddings.imagenet_similarity`; a row of zeros takes no part.
    """

    def __init__(self, head: nn.Module, similarity: torch.Tensor):
        super().__init__()
        self.head = head
        self.register_buffer("similarity", similarity)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features [P, C] of the ImageNet trunk -> evidence [P, U], each class with mean 0 and deviation 1."""
        # In parts: the probabilities of a whole data set's cells would be gigabytes.
        evidence = torch.cat([self.head(part).softmax(1) @ self.similarity for part in features.split(8192)])
        return (evidence - evidence.mean(0)) / evidence.std(0).clamp(min=1e-6)
