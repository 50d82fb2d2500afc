"""What a network does to pictures while it is trained: sheets of the same pictures, one an evaluation.

The pictures lie in `pictures/` of the run's folder, with the step in their names, so that they can be leafed through.
What class indices mean on paper comes in as `drawing`, the keywords of `utils.pictures.contact_sheet`, and `to_mask`,
class indices -> mask values (a `Split` has both).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from utils.errors import UserError
from utils.pictures import contact_sheet

LOOKED_THROUGH = 200
"""Pictures that are opened, at most, to find one for each class."""


def pictures_showing(dataset: Dataset, classes: Iterable[int], share: float = 0.02) -> list[int]:
    """Indices of the first picture that shows each of `classes` on more than `share` of its pixels.

    Args:
        dataset: gives image, label [H, W] and index.
        classes: class indices. One that none of the first pictures shows is passed over.
    """
    wanted, found = set(classes), []
    for index in range(min(len(dataset), LOOKED_THROUGH)):
        label = dataset[index][1]
        shown = {c for c in wanted if (label == c).float().mean() > share}
        if shown:
            wanted -= shown
            found.append(index)
        if not wanted:
            break
    return found or list(range(min(len(dataset), 4)))


@torch.inference_mode()
def scores(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Logits [N, K, H, W] of uint8 images [N, 3, H, W], with the network in evaluation mode for the time."""
    training = model.training
    model.eval()
    try:
        return model(image.to(next(model.parameters()).device))
    finally:
        model.train(training)


def prediction_rows(model: nn.Module, dataset: Dataset, indices: Sequence[int], to_mask: Callable) -> list[tuple]:
    """(photo, truth, prediction) of each picture, for a contact sheet."""
    rows = []
    for index in indices:
        image, label, _ = dataset[index]
        prediction = scores(model, image[None])[0].argmax(dim=0).cpu().numpy()
        rows.append((image.permute(1, 2, 0).numpy(), to_mask(label.numpy()), to_mask(prediction)))
    return rows


def label_rows(image: torch.Tensor, labels: Mapping[str, torch.Tensor], to_mask: Callable) -> list[tuple]:
    """(photo, None, {heading: mask}) of each picture of a batch, image [N, 3, H, W] and labels [N, H, W]."""
    masks = {heading: to_mask(label.cpu().numpy()) for heading, label in labels.items()}
    photos = image.permute(0, 2, 3, 1).cpu().numpy()
    return [(photo, None, {h: mask[n] for h, mask in masks.items()}) for n, photo in enumerate(photos)]


def save_sheet(path: Path, rows: Sequence[tuple], title: str, drawing: Mapping[str, Any]) -> np.ndarray:
    """Writes a contact sheet of `rows` and returns it, uint8 [H, W, 3].

    Raises:
        UserError: if the disk does not take it.
    """
    sheet = contact_sheet(rows, title=title, **drawing)
    save_picture(sheet, path)
    return np.asarray(sheet)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture and the folder that it lies in. Raises `UserError` if the disk does not take it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)  # of a JPEG; a PNG passes over it
    except OSError as error:
        raise UserError(
            f"{path} can't be written ({error.strerror}): choose another folder, or free some disk"
        ) from error
