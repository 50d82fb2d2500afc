"""One pass over the evaluation pictures: in batches of one size, from several views, and never over broken scores."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation_script
from dataset.loaders import evaluation_loader
from dataset.splits import Split
from dataset.voc import evaluation_dataset
from helpers import evaluate, failure, load, mask_path
from utils import evaluation
from utils.errors import UserError
from utils.evaluation import predictions
from utils.metrics import ZeroShotMetrics

SPLIT = Split.voc(1)


class Colours(torch.nn.Module):
    """Scores that say nothing but which colour a pixel has; notes the shapes of what it was shown."""

    def __init__(self, offset: float = 0.0):
        super().__init__()
        self.offset, self.shapes = offset, []

    def forward(self, image):
        assert not self.training and not torch.is_grad_enabled()
        self.shapes.append(tuple(image.shape))
        weights = torch.linspace(-1, 1, 3 * len(SPLIT.names)).view(-1, 3)
        return torch.einsum("kc,nchw->nkhw", weights, image.float()) + self.offset


def run(dataset, batch_size, model=None):
    loader = evaluation_loader(dataset, 0, batch_size)
    metrics = ZeroShotMetrics(SPLIT.names, SPLIT.num_seen)
    return evaluation.evaluate(model or Colours(), loader, metrics, torch.device("cpu"))


def test_sizes_are_those_of_the_pictures(mixed):
    dataset = evaluation_dataset(mixed, SPLIT)
    assert dataset.sizes() == [tuple(dataset[i][0].shape[:0:-1]) for i in range(len(dataset))]
    assert set(dataset.sizes()) == {(48, 40), (40, 48)}


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_batches_of_one_size_give_the_same_figures_in_the_same_order(mixed, batch_size):
    dataset, model = evaluation_dataset(mixed, SPLIT), Colours()
    found = run(dataset, batch_size, model)
    assert json.dumps(found) == json.dumps(run(dataset, 1))
    assert list(found["per_picture"]) == dataset.ids
    assert max(shape[0] for shape in model.shapes) == min(batch_size, 5) and len(model.shapes) < len(dataset)


def test_one_at_a_time_no_file_is_opened_for_its_size(data, monkeypatch):
    dataset = evaluation_dataset(data, SPLIT)
    monkeypatch.setattr(type(dataset), "sizes", lambda self: pytest.fail("asked for sizes"))
    assert len(evaluation_loader(dataset, 0, 1)) == len(dataset)


@pytest.mark.parametrize("offset", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_end_it(data, offset):
    with pytest.raises(UserError, match="not finite"):
        run(evaluation_dataset(data, SPLIT), 1, Colours(offset))


@pytest.mark.parametrize("place", [0, 7])
def test_a_single_broken_score_is_found(data, place):
    """The device is only looked at now and then, but never not at all."""

    class Broken(Colours):
        def forward(self, image):
            scores = super().forward(image)
            if len(self.shapes) == place + 1:
                scores[0, 3, 5, 5] = -math.inf
            return scores

    loader = evaluation_loader(evaluation_dataset(data, SPLIT), 0)
    meta = torch.device("cpu")
    with pytest.raises(UserError, match="not finite"):
        list(predictions(Broken(), loader, meta))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pass_on_a_gpu_waits_only_to_look_at_the_scores(data, monkeypatch):
    monkeypatch.setattr(evaluation, "_check_finite", lambda broken: None)
    metrics = ZeroShotMetrics(SPLIT.names, SPLIT.num_seen)
    pictures = [[tensor.cuda() for tensor in batch[:2]] + [batch[2]] for batch in
                evaluation_loader(evaluation_dataset(data, SPLIT), 0)]  # fmt: skip
    weights = torch.linspace(-1, 1, 3 * len(SPLIT.names)).view(-1, 3).cuda()
    model = torch.nn.Module()
    model.forward = lambda image: torch.einsum("kc,nchw->nkhw", weights, image.float())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _, label, _, logits in predictions(model, pictures, torch.device("cuda")):
            metrics.update(logits, label)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.gzsl.matrix.sum() > 0


@pytest.fixture
def lively(finished, tmp_path):
    """A checkpoint whose network names many classes: batch norms that raise what they see, a projection drawn anew."""
    checkpoint = load(finished.stage1 / "latest.pth")
    for key, tensor in checkpoint["model"].items():
        if key.startswith("projection.") and tensor.dim() == 4:
            checkpoint["model"][key] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        if key.endswith("running_var"):
            tensor.mul_(0.02)
    torch.save(checkpoint, tmp_path / "lively.pth")
    return tmp_path / "lively.pth"


def figures(checkpoint, data, path, *flags):
    assert evaluate(checkpoint, data, "--json", path, *flags) == 0
    return json.loads(path.read_text())


def test_evaluation_script_takes_pictures_of_one_size_together(lively, mixed, tmp_path):
    alone = figures(lively, mixed, tmp_path / "1.json")
    together = figures(lively, mixed, tmp_path / "3.json", "--evaluation-batch-size", 3)
    assert list(together["per_picture"]) == list(alone["per_picture"])
    # The network sums in another order for several pictures, so a pixel between two classes may go either way.
    assert (np.sum(alone["confusion"], axis=0) > 0).sum() > 3
    moved = np.abs(np.subtract(alone["confusion"], together["confusion"])).sum()
    assert moved <= 4 and np.sum(alone["confusion"]) == np.sum(together["confusion"])


def test_views_are_averaged(lively, data, tmp_path, capsys):
    plain, flipped, several = (
        figures(lively, data, tmp_path / f"{n}.json", *flags)
        for n, flags in enumerate([(), ("--flip",), ("--scales", 0.75, 1, 1.25, "--flip")])
    )
    assert plain["confusion"] != flipped["confusion"] != several["confusion"] != plain["confusion"]
    assert (plain["scales"], plain["flip"]) == ([1.0], False) and several["scales"] == [0.75, 1.0, 1.25]
    printed = capsys.readouterr().out
    assert "8 pictures\n" in printed and "8 pictures at scales 0.75 1 1.25 with flips\n" in printed


def test_flips_of_flipped_pictures_change_nothing(lively, own_data, tmp_path):
    """The mean over both directions can't tell them apart."""
    dataset = evaluation_dataset(own_data, SPLIT)
    for picture in dataset.ids:
        path = dataset.folder.image_path(picture)  # as PNG data, so that flipping is exact
        with Image.open(path) as image:
            image.convert("RGB").save(path, format="PNG")
    before = figures(lively, own_data, tmp_path / "before.json", "--flip")
    for picture in dataset.ids:
        for path in (dataset.folder.image_path(picture), mask_path(own_data, picture)):
            with Image.open(path) as image:
                turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            turned.save(path, format="PNG")
    after = figures(lively, own_data, tmp_path / "after.json", "--flip")
    assert np.abs(np.subtract(before["confusion"], after["confusion"])).sum() <= 4


def test_bad_scales_are_refused(capsys, finished):
    command = ["--checkpoint", finished.stage1 / "latest.pth", "--scales", 0]
    assert "--scales" in failure(capsys, evaluation_script.main, command)
