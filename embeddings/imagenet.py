"""How near the names of ImageNet's 1,000 classes are to the names of other classes.

Weights that were trained on ImageNet come with a classifier, and its classes have names: words like any others.
`imagenet/` holds the GloVe vectors of those names by the rule of `words.py` (a name's parts that have a vector; 23
names have none), made by the command in `imagenet/glove.json`.
"""

from collections.abc import Sequence

import numpy as np

from .loading import PACKAGE, SHIPPED, class_vectors
from .readers import read_class_table
from .words import words_for

TABLE = PACKAGE / "imagenet" / f"{SHIPPED}.npy"


def imagenet_similarity(categories: Sequence[str], unseen: Sequence[str], limit: float) -> np.ndarray:
    """Cosines between the names of a classifier's categories and those of unseen classes, float32 [1000, U].

    A category that could be an unseen class under another name is left out, a row of zeros: one that shares a word
    with any unseen class, or whose cosine with one is above `limit`. So is one without a vector.

    Args:
        categories: the classifier's names, in the order of its scores.
        unseen: names of the unseen classes.
        limit: cosine in [0, 1].

    Raises:
        UserError: for a class without a vector in the shipped GloVe.
    """
    listed, vectors = read_class_table(TABLE)
    row = dict(zip(listed, vectors))
    similarity = np.zeros((len(categories), len(unseen)), np.float32)
    targets = class_vectors(PACKAGE / TABLE.name, unseen)
    taboo = {word for name in unseen for word in words_for(name)}
    for i, category in enumerate(categories):
        if category in row and not taboo & {word.lower() for word in words_for(category)}:
            cosine = targets @ row[category]
            similarity[i] = cosine if cosine.max() <= limit else 0
    return similarity
