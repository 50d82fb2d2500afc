"""Checkpoints: written whole or not at all, read without running code, checked before use.

A checkpoint is a dict of plain types and tensors with the keys of `KEYS`, so it is loaded with `weights_only=True`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError, atomic_write, one_line

FORMAT = 3  # the version of this layout, under the key "format"
KEYS = {
    "stage": int,  # 1 or 2
    "step": int,  # optimiser steps done
    "model": dict,  # a state dict, as are the next three
    "optimizer": dict,
    "scheduler": dict,
    "pseudo_labeler": dict,  # empty without one
    "best": (float, type(None)),  # the best score so far
    "selection": str,  # how this checkpoint was chosen: "last", or by which figure on the evaluation images
    "settings": dict,  # every setting of the run
    "metadata": dict,  # what rebuilds the network and says under which protocol it was trained, flat
}


def save_checkpoint(path: Path, **content: Any) -> None:
    """Writes `content` (`KEYS`) to `path`, whole or not at all; raises `UserError` if the disk does not take it."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)


def load_checkpoint(path: Path, hint: str = "") -> dict[str, Any]:
    """The checkpoint at `path`, on the CPU. Nothing in it is run.

    Raises `UserError` if it is missing (`hint`: how to get it), broken, or no checkpoint of this project.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}{': ' + hint if hint else ''}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises almost any type
        raise UserError(f"{path} is no readable checkpoint: give a latest.pth or best.pth of this project") from error
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    if checkpoint.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path} has format {checkpoint['format']} and this code reads {FORMAT}: train again")
    wrong = [key for key, kind in KEYS.items() if not isinstance(checkpoint.get(key, ...), kind)]
    if wrong:
        raise UserError(f"{path} is not a checkpoint of this project ({wrong[0]}): give a latest.pth or best.pth")
    checkpoint["settings"].setdefault("calibration", 0.0)  # which the first checkpoints of this format lack
    return checkpoint


def check_settings(path: Path, saved: dict[str, Any], wanted: dict[str, Any], names: Iterable[str]) -> None:
    """Raises `UserError` for the first of `names` whose value in the checkpoint `path` is not the one wanted now."""
    for name in names:
        if saved.get(name) != wanted[name]:
            flag = "--" + name.replace("_", "-")
            was, now = (" ".join(map(str, v)) if isinstance(v, list) else v for v in (saved.get(name), wanted[name]))
            raise UserError(f"{path} was made with {flag} {was}, not {now}: give the same {flag} or another checkpoint")


def load_model(model: torch.nn.Module, weights: dict[str, Any], path: Path) -> None:
    """Puts the `weights` of the checkpoint `path` into `model`. Raises `UserError` if they do not fit."""
    try:
        model.load_state_dict(weights)
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = one_line(error)[:300]
        raise UserError(f"{path} does not fit the network ({reason}): give a checkpoint of the same network") from error


def load_schedule(optimizer: torch.optim.Optimizer, scheduler: Any, checkpoint: dict[str, Any], path: Path) -> None:
    """Puts the checkpoint's optimiser and schedule into those of a run. Raises `UserError` if they do not fit."""
    saved, groups, steps = checkpoint["optimizer"], optimizer.param_groups, scheduler.total_iters
    try:
        # How a step is computed is the device's matter: a run may continue on another one.
        kept = [{**old, "fused": new["fused"]} for old, new in zip(saved["param_groups"], groups, strict=True)]
        optimizer.load_state_dict({**saved, "param_groups": kept})
        scheduler.load_state_dict(checkpoint["scheduler"])
        fits = all(v.shape in (parameter.shape, ()) for parameter, s in optimizer.state.items() for v in s.values())
    except (AttributeError, KeyError, TypeError, ValueError):
        fits = False
    if not fits or scheduler.total_iters != steps:
        hint = "give the same --max-steps, --num-epochs, --batch-size and training list, or another checkpoint"
        raise UserError(f"{path} does not fit the optimiser or its {steps} steps: {hint}")


def describe_protocol(metadata: dict[str, Any]) -> str:
    """One line on how a network was trained, for tables and logs."""
    pixels, images, backbone = (metadata[key] for key in ("target_pixels", "target_images", "backbone"))
    opened = {"all": "no target mask opened", "oracle": "ORACLE: target masks say where unseen pixels are"}[pixels]
    background = {"ignore": "background ignored", "score": "background a seen class",
                  "auxiliary": "background trained, not evaluated"}[metadata["background"]]  # fmt: skip
    method = f"target pixels {pixels} ({opened}), target images {images}"
    if metadata["supervised"]:
        method = "SUPERVISED with all labels"
    selected = ", SELECTED by unseen mIoU on the evaluation images" if metadata["select"] == "best" else ""
    words = " + ".join(metadata["embedding"])
    return f"split {metadata['split']}, {method}, {background}, {backbone}, {words}{selected}"
