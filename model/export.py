"""A network with its classes baked in, as a file that runs without this code."""

import copy
import io
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model.predictor import Predictor, save_head
from utils.errors import UserError, atomic_write


class ExportedNetwork(nn.Module):
    """uint8 image [N, 3, H, W] -> logits [N, K, H, W], as `Predictor`, by operations that every format has."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        # A network with the channels innermost can't be traced with free sizes.
        self.network = copy.deepcopy(predictor.network).cpu().to(memory_format=torch.contiguous_format)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = self.network.projection(self.network.backbone(image))
        return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=True)


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
    with torch.no_grad():
        program = torch.export.export(ExportedNetwork(predictor).eval(), (example,), dynamic_shapes=sizes)
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
