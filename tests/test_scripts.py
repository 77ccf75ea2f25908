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
    clips_of,
    edited,
    set_in_both,
    shrink_sample,
    write_isign,
)

import model_selection
import train_final_model

TINY = {"EMBED_DIM": 16, "HIDDEN_DIM": 16, "EPOCHS": 2}
TINY |= {"TRAIN_CLIPS": 24, "VALIDATION_CLIPS": 8, "MAX_FRAMES": 24}
# model, epoch, epochs, train mse, val mse, mae and duration error; without the time
EPOCH = r"^(\w+) epoch (\d+)/(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +[\d.]+ s(?= +[\d.]+ s$)"


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


def test_the_selection_ends_with_the_results_and_says_the_same_again(bert, capsys):
    """Without a token the default DATASET runs on the sample."""
    set_in_both({"CANDIDATES": ["bert", "gru", "transformer"], "BERT_NAME": bert, **TINY})
    model_selection.main([])
    out = capsys.readouterr().out
    is_readable(out)
    assert "NO ACCESS TOKEN" in out
    found, lines = epochs(out), out.splitlines()
    assert lines[-7] == "FINAL RESULTS (sample data)" and lines[-8] == ""
    shown = dict(line.split(": ") for line in lines[-6:-2])
    assert list(shown) == ["BERT", "GRU", "Transformer", "Mean pose"]
    assert all(re.fullmatch(r"\d+\.\d{4}", value) for value in shown.values())
    lowest = {model: min(float(match[5]) for match in matches) for model, matches in found.items()}
    for title, error in lowest.items():
        assert float(shown[title]) == pytest.approx(error, abs=6e-5) and len(found[title]) == 2
        contents = torch.load(f"selection_{title.lower()}.pt", weights_only=True)
        kept = contents["metrics"]["val_mse"], contents["metrics"]["mean_pose_mse"]
        assert kept == pytest.approx((error, float(shown["Mean pose"])), abs=6e-5)
    winner = min(lowest, key=lowest.get).lower()
    assert lines[-2] == f"Next: python train_final_model.py --model {winner}"

    change(CANDIDATES=["gru", "transformer"])
    model_selection.main([])
    for model, matches in epochs(capsys.readouterr().out).items():
        assert [match[0] for match in matches] == [match[0] for match in found[model]]


def test_the_final_run_reports_its_best_epoch(tmp_path, capsys):
    set_in_both({**TINY, "DATASET": "sample"})
    train_final_model.main(["--model", "gru"])
    out = capsys.readouterr().out
    is_readable(out)
    block = out.split("\n\n")[-1].split("\nwarning")[0]
    closing = dict(line.split(": ") for line in block.splitlines())
    with open(tmp_path / "gru.log", newline="") as file:
        log = list(csv.DictReader(file))
    (matches,) = epochs(out).values()
    assert [line["epoch"] for line in log] == [match[2] for match in matches] == ["1", "2"]
    for line, match in zip(log, matches, strict=True):
        for i, key in enumerate(("train_mse", "val_mse", "val_mae")):
            assert float(match[4 + i]) == pytest.approx(float(line[key]), abs=1e-5)
    best = min(log, key=lambda line: float(line["val_mse"]))
    assert closing["best_epoch"] == best["epoch"]
    for key in best.keys() & closing.keys() - {"epoch"}:
        assert float(closing[key]) == pytest.approx(float(best[key]), abs=2e-5)
    model, *_ = train_final_model.load_model("best_gru.pt")
    assert sum(value.numel() for value in model.parameters()) == int(closing["parameters"])
    page = Path("preview_gru.html").read_text("ascii")
    facts = dict(re.findall("<dt>(.*?)<dd>([^<]*)", page))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts.pop("date"))
    assert facts.pop("train_mse") and facts == closing and "val_dtw_mje" in facts
    assert page.count("<polyline") == 2 and page.count('"name": "generated"') == 8


WRONG = [
    ({"MAX_FRAMES": 0}, "MAX_FRAMES"),
    ({"MAX_BAD_SHARE": 20}, "MAX_BAD_SHARE"),
    ({"PATIENCE": 0}, "PATIENCE"),
    ({"AVERAGE": 99.9}, "AVERAGE"),
    ({"POSE_DIM": 150}, "POSE_DIM"),
    ({"DATASET": "no/such/folder/here"}, "cannot load DATASET 'no/such/folder/here'"),
    ({"DATASET": "my_sings"}, "DATASET 'my_sings' is no folder here, and no hub id"),
    ({"CONFIG": "nope", "DATASET": "isign"}, "CONFIG 'nope'"),
    ({"POSES": "nothing_*", "DATASET": "isign"}, "no poses at .*nothing_"),
    ({"POSE_DIM": 8, "DATASET": "isign"}, "POSE_DIM"),
    ({"BERT_NAME": "./nothing", "CANDIDATES": ["bert"]}, "BERT_NAME './nothing' is no hub id"),
    ({"CANDIDATES": ["gru", "lstm"]}, "CANDIDATES"),
    ({"CANDIDATES": []}, "CANDIDATES"),
]


@pytest.mark.parametrize("wrong, said", WRONG)
def test_a_setting_that_makes_no_sense_is_one_line(wrong, said, monkeypatch, tmp_path):
    shrink_sample(monkeypatch)
    uids = ["f68f0aa0e1ae-1", "f68f0aa0e1af-1"]
    write_isign(tmp_path / "isign", [(uid, "go") for uid in uids], clips_of(*uids))
    set_in_both({**TINY, "DATASET": "sample", "CANDIDATES": ["gru"], **wrong})
    commands = {model_selection: [], train_final_model: ["--model", "gru"]}
    if said == "CANDIDATES":
        del commands[train_final_model]
    elif "BERT_NAME" in wrong:
        commands[train_final_model] = ["--model", "bert"]
    for module, arguments in commands.items():
        if "BERT_NAME" in wrong:  # which is told before the poses are prepared
            monkeypatch.setattr(module, "load_clips", None)
        with pytest.raises(SystemExit, match=rf"^error: .*{said}.*$") as error:
            module.main(arguments)
        assert "\n" not in str(error.value) and not [*tmp_path.glob("*.pt*")]


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    """As `python model_selection.py | head -1`."""
    source = edited((ROOT / "model_selection.py").read_text("utf8"), **TINY, CANDIDATES=["gru"])
    Path("model_selection.py").write_text(source, "utf8")
    command = f"{sys.executable} model_selection.py | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ)
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr, done.stderr
