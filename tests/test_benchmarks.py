"""The rows of the ablation still fit the script: each trains, is its own, and gives its figures."""

import bench_ablation
import pytest
from helpers import small

TINY = {"DATASET": "sample", "TRAIN_CLIPS": 8, "VALIDATION_CLIPS": 4, "BATCH_SIZE": 4, "EPOCHS": 1}


@pytest.mark.parametrize("row", bench_ablation.ROWS)
def test_a_row_trains(row, monkeypatch, capsys):
    script = bench_ablation.script
    sample_rows = script.sample_rows
    monkeypatch.setattr(script, "sample_rows", lambda n, seed: sample_rows(n // 20, seed))
    monkeypatch.setattr(script, "MODELS", dict(script.MODELS))
    monkeypatch.setattr(script, "Plan", script.Plan)
    small(**TINY)
    settings, classes = bench_ablation.ROWS[row]
    model = "transformer" if "transformer" in classes else "gru"
    asked = {"row": row, "model": model, "settings": {}}
    bench_ablation.train(asked)
    assert '"recall_at_1": ' in capsys.readouterr().out
    assert all(getattr(script, name) == value for name, value in settings.items())


OWN = {("Attention", "scores")}  # methods that the script's class does not have


@pytest.mark.parametrize("row", bench_ablation.ROWS)
def test_the_methods_of_a_row_replace_those_of_the_script(row):
    for made in bench_ablation.ROWS[row][1].values():
        for name in vars(made):
            if not name.startswith("__"):
                assert hasattr(made.__mro__[1], name) or (made.__name__, name) in OWN, name
