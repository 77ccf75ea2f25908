"""The benchmarks still fit the scripts: a small run of each."""

import re

import bench_ablation
import bench_baselines
import bench_cuda
import bench_data
import bench_train
import make_picture
import pytest
from helpers import shrink_sample, small

import train_final_model as script


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(script, "MODELS", dict(script.MODELS))
    shrink_sample(monkeypatch, 4)
    small(DATASET="sample", TRAIN_CLIPS=8, VALIDATION_CLIPS=4, BATCH_SIZE=4, EPOCHS=1)


@pytest.mark.parametrize("row", bench_ablation.ROWS)
def test_a_row_of_the_ablation(row, monkeypatch, capsys):
    own = {"__module__", "__doc__", "scores", "own_share"}  # which the script's classes do not have
    for name, value in bench_ablation.ROWS[row].items():
        monkeypatch.setattr(script, name, getattr(script, name))
        if isinstance(value, type):
            assert all(hasattr(value.__base__, x) for x in vars(value).keys() - own)
    model = "transformer" if row == "usual initialisation" else "gru"
    bench_ablation.train({"row": row, "model": model, "settings": {}})
    assert '"recall_at_1": ' in capsys.readouterr().out


def test_baselines(monkeypatch, capsys):
    script.main(["--model", "gru"])
    figures = dict(re.findall(r"^(\w+): ([\d.]+)$", capsys.readouterr().out, re.M))
    monkeypatch.setattr(bench_baselines.recogniser, "EPOCHS", 1)
    bench_baselines.main(["sample", "--epochs", "0", "--read"])
    printed = capsys.readouterr().out
    assert re.search(r"\| mean pose \| 1 \| 1.000 \| 0\.\d+ \| 0.00 \| – \|", printed)
    assert re.search(r"\| nearest sentence \| 3 \| .* \| [\d.]+ ± [\d.]+ \|$", printed, re.M)
    error, motion = float(figures["val_dtw_mje"]), float(figures["motion"])
    assert re.search(rf"\| GRU \| 1 \| .* \| {error:.3f} \| {motion:.2f} \| ", printed)


def test_cuda(bert, monkeypatch):
    monkeypatch.setattr(bench_cuda, "STEPS", 1)
    monkeypatch.setattr(bench_cuda, "SETTINGS", {})
    assert float(bench_cuda.measure(bert, "bert", "4")[0]) > 0


def test_data(hub, monkeypatch, capsys):
    monkeypatch.setattr(bench_data, "HUB", hub)
    bench_data.from_disk(8)
    bench_data.from_hub(8)
    assert len(re.findall(r"^(?:disk|hub, .*): \d+ clips", capsys.readouterr().out, re.M)) == 3


def test_train():
    assert bench_train.measure(bench_train.Training("autoregressive", 2, 4), 1).training > 0


def test_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(make_picture, "FILE", tmp_path / "new" / "signing.svg")
    monkeypatch.setattr(make_picture, "EPOCHS", 1)
    monkeypatch.setattr(script, "VALIDATION_CLIPS", 0)
    make_picture.main()
    svg = make_picture.FILE.read_text("utf8")
    assert "sample data" in svg and svg.count("<g ") == 2 * make_picture.FRAMES
    assert "nan" not in svg and len(svg) < 60_000
