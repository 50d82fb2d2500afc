"""Class names -> class embeddings: word vectors, the words of a class, and how they are combined."""

from .loading import embed_words, find_sources, fold_name, imagenet_similarity, load_class_embeddings

__all__ = ["embed_words", "find_sources", "fold_name", "imagenet_similarity", "load_class_embeddings"]
