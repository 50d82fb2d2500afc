"""Checkpoints: written whole or not at all, read without running code, checked before use.

A checkpoint is a dict of plain types and tensors:

    format      version of this layout
    stage       1 or 2
    step        optimiser steps done
    model       state dict
    optimizer   state dict
    scheduler   state dict
    best        the best score met so far, or None
    selection   how this checkpoint was chosen: "last", or by which figure on the evaluation pictures
    arguments   every flag of the run
    setting     what rebuilds the model and says under which protocol it was trained (a flat dict)
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from utils.errors import InputError

FORMAT = 1
KEYS = ("stage", "step", "model", "optimizer", "scheduler", "best", "selection", "arguments", "setting")


def save_checkpoint(path: Path, **content: Any) -> None:
    """Writes `content` (the keys of the module's docstring) to a temporary file and renames it to `path`.

    Raises:
        InputError: if the disk does not take it; what stood at `path` before is whole.
    """
    if set(content) != set(KEYS):
        raise ValueError(f"a checkpoint holds {KEYS}, not {tuple(content)}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{path} could not be written ({error}): the last checkpoint is kept; free some disk"
        ) from error


def load_checkpoint(path: Path, hint: str = "") -> dict[str, Any]:
    """The checkpoint at `path`, on the CPU.

    Args:
        path: a file written by `save_checkpoint`.
        hint: how to get the file where it is missing.

    Raises:
        InputError: if it is missing, broken, or no checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}{': ' + hint if hint else ''}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # there is hardly a type that a spoilt pickle does not end in
        raise InputError(f"{path} is no readable checkpoint: give a latest.pth or best.pth of this project") from error
    if not isinstance(checkpoint, dict) or not {"format", *KEYS} <= set(checkpoint):
        raise InputError(f"{path} is not a checkpoint of this project: give a latest.pth or best.pth")
    if checkpoint["format"] != FORMAT:
        raise InputError(f"{path} has checkpoint format {checkpoint['format']}, this code reads {FORMAT}")
    checkpoint["setting"].setdefault("scoring", "dot")  # what there was before it could be chosen
    return checkpoint


def check_setting(path: Path, saved: dict[str, Any], wanted: dict[str, Any], flags: Iterable[str]) -> None:
    """Refuses a checkpoint that was made with other values of `flags` than are wanted now.

    Args:
        path: named in the message.
        saved: the checkpoint's setting.
        wanted: the present setting.
        flags: the keys of both that must agree; the flag is the key with - for _.

    Raises:
        InputError: for the first that differs.
    """
    for key in flags:
        if saved.get(key) != wanted[key]:
            flag = "--" + key.replace("_", "-")
            raise InputError(
                f"{path} was made with {flag} {_shown(saved.get(key))}, not {_shown(wanted[key])}: "
                f"give the same {flag}, or another checkpoint"
            )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def load_model(model: torch.nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Puts the checkpoint's weights into `model`.

    Raises:
        InputError: if names or shapes differ.
    """
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(
            f"{path} does not fit the network ({reason}): give a checkpoint of the same network"
        ) from error
