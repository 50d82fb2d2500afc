"""A network from a checkpoint: where model, split and file meet."""

from functools import partial
from pathlib import Path

import torch

from dataset.splits import Split
from model.segmenter import Segmenter
from utils.checkpoint import check_weights, describe_protocol, load_checkpoint, load_model
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
        class_embeddings = checkpoint["model"]["projection.class_embeddings"]
        if len(class_embeddings) != len(split.names):
            raise ValueError(f"{len(class_embeddings)} class embeddings for {len(split.names)} classes")
        backbone = checkpoint["metadata"]["backbone"]
        build = partial(
            Segmenter,
            backbone,
            class_embeddings,
            num_auxiliary=split.num_auxiliary,
        )
        with torch.device("meta"):  # names and shapes are compared before any memory is used
            check_weights(path, checkpoint["model"], build())
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{path} is not a complete checkpoint ({error}): give a latest.pth or best.pth") from error
    model = build()
    load_model(model, checkpoint, path)
    return model, split, {key: value for key, value in checkpoint.items() if key not in ("model", "optimizer")}
