"""What a run writes and prints: log lines, args.json, losses without waiting."""

import json

import pytest
import torch

from utils.errors import UserError
from utils.logging import LossMeter, open_run_folder


def test_args_json_has_settings_versions_and_commit(tmp_path):
    open_run_folder(tmp_path, 0, {"learning_rate": 0.01}, metadata={"split": "1"})
    content = json.loads((tmp_path / "args.json").read_text())
    assert content["arguments"] == {"learning_rate": 0.01} and content["metadata"] == {"split": "1"}
    assert content["versions"]["torch"] == torch.__version__ and {"python", "torchvision"} <= set(content["versions"])
    assert content["commit"] is None or len(content["commit"]) >= 40


def test_losses_are_means_since_the_last_look():
    meter = LossMeter()
    for step, loss in enumerate([1.0, 3.0], start=1):
        meter.add(step, {"total": torch.tensor(loss), "ce": torch.tensor(2 * loss)})
    assert meter.means() == {"total": 2.0, "ce": 4.0} == meter.means() == meter.last
    meter.add(3, {"total": torch.tensor(5.0), "ce": torch.tensor(float("inf"))})
    with pytest.raises(UserError, match="loss ce is inf at step 3"):
        meter.means()
