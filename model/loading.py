"""A network from a checkpoint: where model, split and file meet."""

from pathlib import Path

from dataset.splits import Split
from model.segmenter import Segmenter
from utils.checkpoint import describe_protocol, load_checkpoint
from utils.errors import UserError


def load_segmenter(path: Path) -> tuple[Segmenter, Split, dict]:
    """The network of a checkpoint on the CPU, the split that it is scored by, and the checkpoint without the weights.

    Raises:
        UserError: if the file is not a complete checkpoint of this project.
    """
    checkpoint = load_checkpoint(path)
    try:
        split = Split.from_dict(checkpoint["metadata"])
        describe_protocol(checkpoint["metadata"])  # raises where a key is missing
        model = Segmenter.from_weights(checkpoint["metadata"]["backbone"], checkpoint["model"])
        if (found := len(model.projection.class_embeddings)) != len(split.names):
            raise ValueError(f"{found} class embeddings for {len(split.names)} classes")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{path} is not a complete checkpoint ({error}): give a latest.pth or best.pth") from error
    return model, split, {key: value for key, value in checkpoint.items() if key not in ("model", "optimizer")}
