"""The real scripts on drawn images: what they leave, what decides their bits, every split, the best setting."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch

from dataset.drawn import write_dataset
from dataset.splits import Split
from helpers import ROOT, SHORT, STAGES, evaluate, load, read_log, same, train, weights

SPLIT = Split.named(1)
FIGURES = {"miou_seen", "miou_unseen", "hiou", "miou_zsl", "bias", "pixel_accuracy", "mean_accuracy", "fwiou"}


@pytest.mark.parametrize("stage, steps", [(1, [2, 3]), (2, [3])])
def test_a_run_leaves_its_files_and_a_log_line_an_evaluation(finished, stage, steps):
    folder = getattr(finished, f"stage{stage}")
    files = {path.name for path in folder.iterdir()}
    assert files == {"latest.pth", "best.pth", "log.jsonl", "args.json", "evaluation.json", "images"}
    latest, best, log = load(folder / "latest.pth"), load(folder / "best.pth"), read_log(folder)
    assert (latest["stage"], latest["step"], latest["selection"]) == (stage, 3, "last")
    assert latest["metadata"]["seen"] == list(SPLIT.seen) and latest["metadata"]["unseen"] == list(SPLIT.unseen)
    record = json.loads((folder / "args.json").read_text())
    assert latest["settings"] == record["arguments"] and record["versions"]["torch"] == torch.__version__
    assert record["commit"] is None or len(record["commit"]) >= 40
    scores = {line["step"]: line["miou_unseen"] for line in log}
    assert best["step"] == max(scores, key=scores.get) and "miou_unseen" in best["selection"]
    losses = {1: {"ce", "bias_source", "bias_target", "total"}, 2: {"ce", "self_training", "total"}}[stage]
    assert [line["step"] for line in log] == steps
    for line in log:
        assert {f"loss_{name}" for name in losses} | FIGURES | {"per_class"} <= set(line)
        assert (line["target_pixels"], line["target_images"], line["background"]) == ("all", "unseen", "ignore")
        assert tuple(line["per_class"]) == SPLIT.names


def test_stage_2_starts_from_the_checkpoint_of_stage_1(finished, tmp_path):
    """By default it looks where stage 1 of the same split wrote; a rate near 0 shows how it started."""
    shutil.copytree(finished.stage1, tmp_path / "split1" / "stage1")
    flags, frozen = ["--set", "weight_decay=0"], {"max_steps": 1, "learning_rate": 1e-30}
    first = weights(finished.stage1)
    second = weights(train(2, finished.data, tmp_path, *flags, **frozen, restore_from_where="saved"))
    trained = [name for name in first if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(first[name], second[name]) for name in trained)
    other = weights(train(2, finished.data, tmp_path / "other", *flags, **frozen))
    assert not torch.equal(other["projection.project.weight"], second["projection.project.weight"])


def test_training_learns(data, tmp_path):
    """CE falls well below chance within a few dozen steps."""
    changes = {"evaluate_every": 10, "max_steps": 40, "learning_rate": 0.02, "batch_size": 6, "target_batch_size": 2}
    losses = [line["loss_ce"] for line in read_log(train(1, data, tmp_path, "--set", "log_every=10", **changes))]
    assert losses[-1] < 0.9 * losses[0] and losses[-1] < math.log(len(SPLIT.names))


@pytest.mark.parametrize("stage", STAGES)
def test_the_seed_decides_every_bit_and_workers_none(finished, tmp_path, stage):
    plan = {"a": {"seed": 2**63 - 1}, "b": {"seed": 2**63 - 1, "num_workers": 2}, "c": {"seed": 0}}
    saved = {"restore_from_where": "saved", "stage1_checkpoint": finished.stage1 / "latest.pth"} if stage == 2 else {}
    first, again, other = (train(stage, finished.data, tmp_path / name, **saved | plan[name]) for name in plan)
    assert same(weights(first), weights(again)) and not same(weights(first), weights(other))
    assert read_log(first) == read_log(again)


@pytest.mark.parametrize("number, background", [(1, "score"), (2, "ignore"), (3, "auxiliary"), (4, "ignore")])
def test_every_split_runs_through_both_stages(data, tmp_path, tiny, number, background):
    changes = SHORT | {"split": number, "background": background, "max_steps": 1}
    train(1, data, tmp_path, **changes)
    folder = train(2, data, tmp_path, **changes, restore_from_where="saved")
    evaluate(folder / "latest.pth", data, "--json", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["per_class"]) == list(Split.named(number, background).names)
    assert ("background" in result["per_class"]) == (background == "score")
    words = {"ignore": "ignored", "score": "a seen class", "auxiliary": "trained, not evaluated"}[background]
    assert f"split {number}" in result["protocol"] and f"background {words}" in result["protocol"]


def test_the_best_setting_runs_with_nothing_switched_off(tmp_path, capsys):
    """configs/best_cpu.toml as it is, with word vectors that are in the repository, for two steps a stage."""
    pytest.importorskip("efficientnet_lite_pytorch")
    write_dataset(tmp_path / "data", num_train=24, num_val=2, size=(64, 48), seed=3)
    argv = ["--config", ROOT / "configs/best_cpu.toml", "--split", 4, "--embedding", "glove", "--max-steps", 2]
    argv += ["--data-path", tmp_path / "data", "--output-dir", tmp_path, "--cache-features", tmp_path / "cache"]
    for module in STAGES.values():
        assert module.main(list(map(str, [*argv, "--num-workers", 0]))) == 0
    checkpoint = load(tmp_path / "split4/stage2/latest.pth")
    settings, labeler = checkpoint["settings"], checkpoint["pseudo_labeler"]
    assert settings["complete_labels"] and settings["pseudo_labels"] == "episodes" and settings["freeze_backbone"]
    assert labeler and checkpoint["metadata"]["background"] == "auxiliary"
    assert evaluate(tmp_path / "split4/stage2/latest.pth", tmp_path / "data") == 0
    assert "background trained, not evaluated" in capsys.readouterr().out


@pytest.mark.parametrize("scripts, most", [("train_split_lambda", 20), ("train_split_lambda, train_st_split", 25)])
def test_the_scripts_load_few_files_of_the_project(scripts, most):
    program = f"import sys, {scripts}; print(*(getattr(m, '__file__', '') for m in sys.modules.values()), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = {path for path in done.stdout.splitlines() if path.startswith(f"{ROOT}/") and "site-packages" not in path}
    own = {path for path in paths if not path.endswith("__init__.py")}
    assert len(own) <= most, sorted(own)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_both_stages_run_on_a_gpu(data, tmp_path):
    train(1, data, tmp_path, device="cuda")
    assert train(2, data, tmp_path, device="cuda", restore_from_where="saved").is_dir()
