"""The studies: tables worked out by hand, runs that are done once, and both studies from end to end, but tiny."""

import json

import pytest
from utils.recipes import RECIPES

import eval as evaluation_script
import train_split_lambda
import train_st_split
from benchmarks import ablation, runs
from dataset.drawn import write_dataset

SCRIPTS = {
    "train_split_lambda.py": train_split_lambda,
    "train_st_split.py": train_st_split,
    "eval.py": evaluation_script,
}
TINY = ["--backbone", "small", "--backbone-weights", "none", "--embedding", "glove", "--num-workers", 0]
CROPS = ["--input-size", 32, "--batch-size", 2, "--learning-rate", 0.01]


def figures(seen, unseen):
    return {"miou_seen": seen, "miou_unseen": unseen, "hiou": 0.0, "miou_zsl": None, "bias": 1.0}


def test_results_are_means_and_standard_deviations_in_percent():
    table = runs.format_results({"ours": [figures(0.10, 0.2), figures(0.20, 0.2)], "other": [figures(0.5, 0.0)]})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["", "seen", "unseen", "hIoU", "ZSL", "bias", "seeds"]
    assert all(cell.strip("-") == ("" if i == 0 else ":") and len(cell) > 2 for i, cell in enumerate(rows[1]))
    assert rows[2] == ["ours", "15.0 ± 7.1", "20.0 ± 0.0", "0.0 ± 0.0", "-", "100.0 ± 0.0", "2"]
    assert rows[3] == ["other", "50.0", "0.0", "0.0", "-", "100.0", "1"]


def test_class_table_marks_unseen_and_averages_over_seeds():
    results = [{"per_class": {"cat": 0.2, "sofa": 0.0}}, {"per_class": {"cat": 0.4, "sofa": None}}]
    table = runs.format_classes({"ours": results}, marked=["sofa"])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[2:] == [["cat", "30.0"], ["sofa*", "-"]]


@pytest.fixture
def commands(monkeypatch):
    """Notes commands instead of running them; "fail" among a command's flags interrupts it."""
    noted = []

    def note(arguments, log):
        noted.append(list(map(str, arguments)))
        if "fail" in noted[-1]:
            raise SystemExit(1)

    monkeypatch.setattr(runs, "command", note)
    return noted


def test_a_finished_run_is_not_run_again_unless_its_flags_change(commands, tmp_path):
    runs.train("stage.py", ["--seed", 1], tmp_path / "run")
    runs.train("stage.py", ["--seed", 1], tmp_path / "run")
    assert commands == [["stage.py", "--seed", "1"]]
    runs.train("stage.py", ["--seed", 2], tmp_path / "run")
    assert commands[1:] == [["stage.py", "--seed", "2"]]


def test_an_interrupted_run_goes_on_and_other_flags_begin_anew(commands, tmp_path):
    for flags in (["fail"], ["fail"], ["fail", "--seed", "2"]):
        with pytest.raises(SystemExit):
            runs.train("stage.py", flags, tmp_path)
        (tmp_path / "latest.pth").touch()
    assert commands[1] == ["stage.py", "fail", "--restore-from-where", "continue"]
    assert commands[2] == ["stage.py", "fail", "--seed", "2"]


def test_a_run_that_other_flags_have_overwritten_is_run_again(commands, tmp_path):
    runs.train("stage.py", ["--seed", "1"], tmp_path)
    with pytest.raises(SystemExit):
        runs.train("stage.py", ["fail"], tmp_path)
    runs.train("stage.py", ["--seed", "1"], tmp_path)
    assert commands[2:] == [["stage.py", "--seed", "1"]]


def test_a_failing_command_ends_the_study_with_its_exit_code(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        runs.command(["eval.py", "--checkpoint", tmp_path / "none.pth"], tmp_path / "log.txt")
    assert end.value.code == 2
    assert "log.txt" in capsys.readouterr().err
    assert "none.pth" in (tmp_path / "log.txt").read_text()


@pytest.fixture
def in_process(monkeypatch):
    """Runs the scripts here instead of as commands of their own, whose start takes seconds each."""
    monkeypatch.setattr(runs, "command", lambda line, log: SCRIPTS[line[0]].main(list(map(str, line[1:]))))


@pytest.fixture
def small_ablation(in_process, tmp_path, monkeypatch):
    """On drawn pictures, one step a stage."""
    write_dataset(tmp_path / "data", 40, 20, size=(48, 48))
    monkeypatch.setattr(ablation, "SHARED", [*TINY, *CROPS, "--freeze-backbone"])
    monkeypatch.setattr(ablation, "STAGE1", ["--max-steps", 1, "--learning-rate", 2e-4])
    monkeypatch.setattr(ablation, "STAGE2", ["--max-steps", 1])


def test_ablation_trains_every_main_row_under_its_own_protocol(small_ablation, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES["best"][2], "imagenet_names", False)  # random weights know no ImageNet
    monkeypatch.setattr(ablation, "CHANGES", ())
    arguments = ["--data-path", tmp_path / "data", "--output-dir", tmp_path / "runs", "--seeds", 1]
    ablation.main([*map(str, arguments)])
    rows = capsys.readouterr().out
    assert all(f"| {row.name}" in rows for row in ablation.MAIN)
    pixels = {log.parts[-5] + log.parts[-2]: json.loads(log.read_text()) for log in tmp_path.rglob("log.jsonl")}
    assert {name for name, line in pixels.items() if line["target_pixels"] == "oracle"} == {
        "oraclestage1",
        "paper__oracle__stage_2stage2",
    }
    ablation.main([*map(str, arguments), "--only-table"])
    assert capsys.readouterr().out.strip() in rows


def test_ablation_chooses_gamma_on_held_out_seen_classes(small_ablation, tmp_path, capsys):
    arguments = ["--data-path", tmp_path / "data", "--output-dir", tmp_path / "runs", "--seeds", 1, "--rows"]
    arguments += ["source only", "source only, calibrated"]
    ablation.main([*map(str, arguments), "--splits", "4", "4-val"])
    printed = capsys.readouterr().out
    assert printed.count("| source only, calibrated") == 1  # a fold has none to choose on
    fold, chosen = (
        json.loads((tmp_path / f"runs/source_only/seed1/split{split}/stage1/{name}.json").read_text())
        for split, name in (("4-val", "calibrations"), ("4", "source_only__calibrated"))
    )
    assert chosen["calibration"] == fold["best_calibration"] and len(fold["calibrations"]) == len(ablation.GAMMAS)


def test_ablation_trains_end_to_end_where_it_is_told(small_ablation, tmp_path):
    arguments = ["--data-path", tmp_path / "data", "--output-dir", tmp_path / "runs", "--seeds", 1]
    ablation.main([*map(str, arguments), "--rows", "source only", "--end-to-end"])
    stage = tmp_path / "runs/source_only/seed1/split4/stage1"
    said = json.loads((stage / "args.json").read_text())["arguments"]
    assert not said["freeze_backbone"] and said["cache_features"] is None
    assert said["learning_rate"] == 5e-5 and said["head_factor"] == 40


def test_ablation_adds_rows_for_other_words(tmp_path, capsys):
    words = runs.ROOT / "embeddings/vocabulary/glove.npy"
    args = ablation.parse_arguments(["--data-path", "data", "--words", str(words)])
    assert [row.name for row in args.rows[-4:]] == [
        "source only, words glove", "best, words glove", "source only, words glove too", "best, words glove too",
    ]  # fmt: skip
    assert args.rows[-1].stage2 == ("--recipe", "best", "--embedding", "word2vec", "fasttext", words)
    with pytest.raises(SystemExit, match="2"):
        ablation.parse_arguments(["--data-path", "data", "--words", str(tmp_path / "none.npy")])
    assert "none.npy is no file" in capsys.readouterr().err


def test_ablation_names_the_rows_that_there_are(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        ablation.main(["--data-path", str(tmp_path), "--rows", "no such row"])
    assert end.value.code == 2 and "'source only'" in capsys.readouterr().err
