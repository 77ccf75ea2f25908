"""Both scripts as a user runs them: what they print, the settings, what they say of wrong ones."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    change,
    edited,
    pose_bytes,
    positions,
    run,
    set_in_both,
    shrink_sample,
    write_isign,
)

import model_selection
import train_final_model

TINY = {"EMBED_DIM": 16, "HIDDEN_DIM": 16, "EPOCHS": 2}
TINY |= {"TRAIN_CLIPS": 24, "VALIDATION_CLIPS": 8, "MAX_FRAMES": 24}
# model, epoch, epochs, train mse, val mse, mae, motion and duration error; without the time
EPOCH = r"^(\w+) epoch (\d+)/(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +[\d.]+ +[\d.]+ s(?= +[\d.]+ s$)"
SCRIPTS = {
    "model_selection": (model_selection, []),
    "train_final_model": (train_final_model, ["--model", "gru"]),
}


def epochs(out):
    """{model: its epochs' lines, as matches, without the time that they took}"""
    found = {}
    for match in re.finditer(EPOCH, out, re.M):
        found.setdefault(match[1], []).append(match)
    return found


def is_readable(out):
    assert "\r" not in out and "\x1b" not in out
    lines = [line for line in out.splitlines() if " epoch " in line or "val mse" in line]
    assert {len(line) for line in lines} == {len(model_selection.HEADER)}
    narrow = [x for x in out.splitlines() if "data settings" not in x and "BERT_NAME" not in x]
    assert max(map(len, narrow)) <= 90


def test_the_selection_ends_with_the_results_and_says_the_same_again(
    bert, tmp_path, capsys, monkeypatch
):
    """Without a token the default DATASET runs on the sample."""
    settings = {"CANDIDATES": ["bert", "gru", "transformer"], "BERT_NAME": bert, **TINY}
    done = run(tmp_path, "model_selection.py", **settings)
    assert done.code == 0 and done.err == "", done.err
    is_readable(done.out)
    assert "NO ACCESS TOKEN" in done.out
    found, lines = epochs(done.out), done.out.splitlines()
    assert lines[-7] == "FINAL RESULTS (sample data)" and lines[-8] == ""
    shown = dict(line.split(": ") for line in lines[-6:-2])
    assert list(shown) == ["BERT", "GRU", "Transformer", "Mean pose"]
    assert all(re.fullmatch(r"\d+\.\d{4}", value) for value in shown.values())
    lowest = {model: min(float(match[5]) for match in matches) for model, matches in found.items()}
    for title, error in lowest.items():
        assert float(shown[title]) == pytest.approx(error, abs=6e-5) and len(found[title]) == 2
        contents = torch.load(tmp_path / f"selection_{title.lower()}.pt", weights_only=True)
        assert contents["metrics"]["val_mse"] == pytest.approx(error, abs=6e-6)
        mean_pose = contents["metrics"]["mean_pose_mse"]
        assert mean_pose == pytest.approx(float(shown["Mean pose"]), abs=6e-5)
    winner = min(lowest, key=lowest.get).lower()
    assert lines[-2] == f"Next: python train_final_model.py --model {winner}"
    assert lines[-1].startswith("Its data settings") and "must be the same" in lines[-1]

    set_in_both({"DATASET": "sample", **settings})
    change(CANDIDATES=["gru", "transformer"])
    model_selection.main([])
    for model, matches in epochs(capsys.readouterr().out).items():
        assert [match[0] for match in matches] == [match[0] for match in found[model]]


def test_the_final_run_reports_its_best_epoch(bert, tmp_path, capsys):
    done = run(tmp_path, "train_final_model.py", "--model", "gru", **{**TINY, "DATASET": "sample"})
    assert done.code == 0 and done.err == "", done.err
    is_readable(done.out)
    block = done.out.split("\n\n")[-1].split("\nwarning")[0]
    closing = dict(line.split(": ") for line in block.splitlines())
    keys = ["data", "model", "parameters", "best_epoch", "val_mse", "val_mae", "mean_pose_mse"]
    keys += ["motion", "tremble", "reach", "duration_error", "seen_error", "val_dtw_mje"]
    keys += ["training_seconds"]
    assert list(closing) == [*keys, "checkpoint", "preview"]
    assert closing["model"] == "gru" and closing["data"] == "sample data"
    assert closing["checkpoint"] == "best_gru.pt" and closing["preview"] == "preview_gru.html"
    with open(tmp_path / "gru.log", newline="") as file:
        log = list(csv.DictReader(file))
    (matches,) = epochs(done.out).values()
    assert [line["epoch"] for line in log] == [match[2] for match in matches] == ["1", "2"]
    for line, match in zip(log, matches, strict=True):
        for i, key in enumerate(("train_mse", "val_mse", "val_mae")):
            assert float(match[4 + i]) == pytest.approx(float(line[key]), abs=1e-5)
    best = min(log, key=lambda line: float(line["val_mse"]))
    assert closing["best_epoch"] == best["epoch"]
    for key in ("val_mse", "val_mae", "mean_pose_mse", "motion", "seen_error"):
        assert float(closing[key]) == pytest.approx(float(best[key]), abs=2e-5)
    model, *_ = train_final_model.load_model("best_gru.pt")
    assert sum(value.numel() for value in model.parameters()) == int(closing["parameters"])

    set_in_both({**TINY, "DATASET": "sample"})
    train_final_model.main(["--model", "gru"])
    (again,) = epochs(capsys.readouterr().out).values()
    assert [match[0] for match in again] == [match[0] for match in matches]


WRONG = [
    {"MAX_FRAMES": 0},
    {"MAX_BAD_SHARE": 20},
    {"AVERAGE": 99.9},
    {"POSE_DIM": 151},
    {"POSE_DIM": 150},
    {"DATASET": "no/such/folder/here"},
    {"DATASET": "./nothing"},
    {"CONFIG": "nope", "DATASET": "isign"},
    {"POSES": "nothing_*", "DATASET": "isign"},
    {"POSE_DIM": 8, "DATASET": "isign"},
    {"BERT_NAME": "./nothing"},
    {"CANDIDATES": ["gru", "lstm"]},
    {"CANDIDATES": []},
]
IN_WORDS = {"POSES": "no poses at .*nothing_"}


@pytest.mark.parametrize(
    "name, wrong",
    [
        (name, wrong)
        for name in SCRIPTS
        for wrong in WRONG
        if name == "model_selection" or "CANDIDATES" not in wrong
    ],
)
def test_a_setting_that_makes_no_sense_is_one_line(name, wrong, monkeypatch, tmp_path):
    module, arguments = SCRIPTS[name]
    shrink_sample(monkeypatch)
    uids = ["f68f0aa0e1ae-1", "f68f0aa0e1af-1"]
    clips = {uid: pose_bytes(positions(3)) for uid in uids}
    write_isign(tmp_path / "isign", [(uid, "go") for uid in uids], clips)
    set_in_both({**TINY, "DATASET": "sample", "CANDIDATES": ["gru"], **wrong})
    if "BERT_NAME" in wrong:
        monkeypatch.setattr(module, "load_clips", None)  # before the poses are prepared
        change(CANDIDATES=["bert"])
        arguments = arguments and ["--model", "bert"]
    words = IN_WORDS.get([*wrong][0], [*wrong][0])
    with pytest.raises(SystemExit, match=rf"^error: .*{words}.*$") as error:
        module.main(arguments)
    assert "\n" not in str(error.value) and not [*tmp_path.glob("*.pt*")]


def test_help_and_unknown_arguments(capsys):
    for module, arguments, code, words in (
        (model_selection, ["--help"], 0, "Short runs of the candidates"),
        (train_final_model, ["--help"], 0, "--predict"),
        (model_selection, ["--model", "gru"], 2, "unrecognized arguments: --model gru"),
        (train_final_model, ["--model", "nope"], 2, "invalid choice: 'nope'"),
        (train_final_model, [], 2, "--model"),
    ):
        with pytest.raises(SystemExit) as stopped:
            module.main(arguments)
        assert stopped.value.code == code
        assert words in "".join(capsys.readouterr())


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    """As `python model_selection.py | head -1`."""
    source = edited((ROOT / "model_selection.py").read_text("utf8"), **TINY, CANDIDATES=["gru"])
    Path("model_selection.py").write_text(source, "utf8")
    command = f"{sys.executable} model_selection.py | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ)
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr, done.stderr
