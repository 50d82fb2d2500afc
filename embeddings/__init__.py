"""Word vectors of classes: where they come from, how they are averaged, how they are loaded."""

from utils.errors import UserError

from .imagenet import imagenet_similarity
from .loading import load_class_embeddings
from .lookup import embed_words

__all__ = ["UserError", "embed_words", "imagenet_similarity", "load_class_embeddings"]
