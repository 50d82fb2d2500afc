"""The drawn set that tests of data and scripts run on, and a finished run of both stages on it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.drawn import write_dataset
from dataset.splits import VOID, Split
from dataset.voc import VOCFolder, evaluation_dataset
from helpers import tiny_network, train, use_network
from masks import mask_path, write_values

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """40 training and 8 evaluation images of 48 x 40 pixels in VOC layout. Read only: see `own_data`."""
    folder = tmp_path_factory.mktemp("drawn") / "set"
    write_dataset(folder, num_train=40, num_val=8, size=(48, 40), seed=3)
    return folder


@pytest.fixture
def own_data(data, tmp_path) -> Path:
    """A copy of the drawn set for a test that changes its files."""
    return shutil.copytree(data, tmp_path / "data")  # with its times of change, so its index stays good


@pytest.fixture
def folder(tmp_path) -> VOCFolder:
    """Three images of 12 x 8: a seen class of split 1, an unseen one, and both (with background and void)."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / name).mkdir(parents=True)
    for number, (image, values) in enumerate({"seen": [7], "unseen": [2], "both": [2, 7, 20]}.items()):
        grey = np.full((8, 12, 3), 40 + 60 * number, np.uint8)
        Image.fromarray(grey).save(tmp_path / "JPEGImages" / f"{image}.jpg")
        mask = np.zeros((8, 12), np.uint8)
        mask[0] = VOID
        for row, value in enumerate(values, start=2):
            mask[row] = value
        write_values(tmp_path / "SegmentationClass" / f"{image}.png", mask)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("seen\nunseen\nboth\n")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("both\n")
    return VOCFolder.open(tmp_path)


@pytest.fixture
def mixed(own_data):
    """Every third evaluation image lies on its side."""
    dataset = evaluation_dataset(own_data, Split.named(1))
    for name in dataset.ids[::3]:
        for path in (dataset.folder.image_path(name), mask_path(own_data, name)):
            with Image.open(path) as image:
                turned = image.transpose(Image.Transpose.ROTATE_90)
            turned.save(path)
    return own_data


@pytest.fixture
def tiny(monkeypatch):
    """`--backbone small` is the smallest network."""
    use_network(tiny_network, monkeypatch)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory) -> SimpleNamespace:
    """Stage 1 and stage 2 of split 1, run to the end. Read only."""
    output = tmp_path_factory.mktemp("finished")
    stage1 = train(1, data, output, draws=True, evaluate_every=2)
    stage2 = train(2, data, output, draws=True, restore_from_where="saved")
    return SimpleNamespace(data=data, output=output, stage1=stage1, stage2=stage2)
