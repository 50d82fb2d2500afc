"""Word vectors of classes: where they come from, how they are averaged, how they are loaded."""

from .loading import load_class_embeddings
from .readers import EmbeddingError

__all__ = ["EmbeddingError", "load_class_embeddings"]
