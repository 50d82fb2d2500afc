"""Word vectors of classes: where they come from, how they are averaged, how they are loaded."""

from .imagenet import imagenet_similarity
from .loading import load_class_embeddings
from .lookup import embed_words
from .readers import EmbeddingError

__all__ = ["EmbeddingError", "embed_words", "imagenet_similarity", "load_class_embeddings"]
