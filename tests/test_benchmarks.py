"""The rows of the ablation still fit the script: each trains, and gives its figures."""

import json
from types import SimpleNamespace

import bench_ablation
import pytest
import torch
from helpers import small

TINY = {"DATASET": "sample", "TRAIN_CLIPS": 8, "VALIDATION_CLIPS": 4, "BATCH_SIZE": 4, "EPOCHS": 1}


@pytest.mark.parametrize("row", bench_ablation.ROWS)
def test_a_row_trains(row, monkeypatch, capsys):
    script, edits = bench_ablation.script, bench_ablation.ROWS[row]
    sample_rows = script.sample_rows
    monkeypatch.setattr(script, "sample_rows", lambda n, seed: sample_rows(n // 20, seed))
    monkeypatch.setattr(script, "MODELS", dict(script.MODELS))
    for name in edits:
        monkeypatch.setattr(script, name, getattr(script, name))
    small(**TINY)
    model = "transformer" if "pre_norm_layers" in edits else "gru"
    bench_ablation.train({"row": row, "model": model, "settings": {}})
    assert '"recall_at_1": ' in capsys.readouterr().out
    assert all(getattr(script, name) == value for name, value in edits.items())
    parts = {part.__name__: part for part in script.MODELS[model][1:]}
    assert {value for name, value in edits.items() if name in parts} <= {*parts.values()}


OWN = {("Attention", "scores"), ("TeacherForcing", "own_share")}  # which the script's lacks


@pytest.mark.parametrize("row", bench_ablation.ROWS)
def test_the_methods_of_a_row_replace_those_of_the_script(row):
    for made in bench_ablation.ROWS[row].values():
        for name in vars(made) if isinstance(made, type) else ():
            if not name.startswith("__"):
                assert hasattr(made.__mro__[1], name) or (made.__name__, name) in OWN, name


def test_a_run_is_started_with_its_seed_and_settings(monkeypatch):
    def start(command, **_):
        asked.update(json.loads(command[-1]))
        return SimpleNamespace(returncode=0, stdout="lines before\n{}\n")

    asked = {}
    monkeypatch.setattr(bench_ablation.subprocess, "run", start)
    assert bench_ablation.run("no plan", "bert", 5, {"EPOCHS": 2}) == {}
    settings = {"EPOCHS": 2, "SEED": 5, "CONFIG": None}
    assert asked == {"row": "no plan", "model": "bert", "settings": settings}


def test_a_decoder_reads_the_frame_that_it_made_or_the_real_one():
    output = torch.nn.Linear(8, 6)
    queries, real = torch.randn(2, 5, 8), torch.randn(2, 5, 6)
    forced = bench_ablation.OwnFrames(output, own_share=0.0)
    sampled = bench_ablation.OwnFrames(output, own_share=1.0)
    sampled.load_state_dict(forced.state_dict())
    own = forced.eval()(queries, None, None, None)
    forced.train().teacher = output(own)  # real frames that are just those that it makes
    torch.testing.assert_close(forced(queries, None, None, None), own)
    forced.teacher = sampled.teacher = real
    of_real = forced(queries, None, None, None)
    assert not torch.isclose(of_real[:, 1:], own[:, 1:]).all(-1).any()
    torch.testing.assert_close(of_real[:, 0], own[:, 0])  # no frame is before it
    sampled.rise = 10**9  # at first it reads real frames
    torch.testing.assert_close(sampled(queries, None, None, None), of_real)
    sampled.rise = 1  # later its own
    torch.testing.assert_close(sampled(queries, None, None, None), own)
