"""The table beside the models: its figures are those of plain numpy, on a set of ten clips."""

import re
import shutil
from pathlib import Path

import bench_baselines
import datasets
import numpy as np
import pytest
import torch
from helpers import change, small

# sentences, and frames of their clips
TRAIN = {"I": 9, "YOU": 12, "GO": 20, "I YOU": 25, "THE BOOK": 14, "BOOK": 10}
VALIDATION = {"I YOU": 22, "I YOU GO": 31, "EAT THE BOOK": 17, "THE WATER": 11}
NEAREST = ["I YOU", "I YOU", "THE BOOK", "THE BOOK"]
JOINED = [["I", "YOU"], ["I", "YOU", "GO"], ["THE BOOK"], ["THE BOOK"]]
MOST_FRAMES = 40  # fewer than I, YOU and GO have together
HANDS = [*range(42), 51, 52]  # with the arms' wrists


def random_clip(frames, seed):
    """A slow walk of 76 points, some unseen at times, one that is never seen, one seen once."""
    rng = np.random.default_rng(seed)
    pose = rng.normal(size=(1, 76, 2)) + rng.normal(0, 0.05, (frames, 76, 2)).cumsum(0)
    unseen = rng.random((frames, 76)) < 0.2
    unseen[:, seed] = True
    unseen[:, seed + 20] = np.arange(frames) != 3
    unseen[[0, -1], -1] = False  # or frames would be cut off
    pose[unseen] = np.nan
    return pose.astype(np.float32)


@pytest.fixture
def tiny():
    """Writes the set into the folder `tiny` -> its clips, {sentence: (T, K, 2)} for each split."""
    small(MAX_FRAMES=MOST_FRAMES, MIN_GLOSS_COUNT=1, EPOCHS=1)
    clips = {}
    for split, sentences in (("train", TRAIN), ("validation", VALIDATION)):
        poses = [random_clip(n, len(clips) * 6 + i) for i, n in enumerate(sentences.values())]
        clips[split] = dict(zip(sentences, poses, strict=True))
        rows = [{"gloss": g, "pose": x.reshape(-1, 152)} for g, x in clips[split].items()]
        datasets.Dataset.from_list(rows).to_parquet(f"tiny/{split}.parquet")
    return clips


def mean_pose(clips):
    return np.nanmean(np.concatenate([*clips["train"].values()]), 0)


def without_gaps(clip, mean):
    made = clip.copy()
    for k, axis in np.ndindex(76, 2):
        of_point = clip[:, k, axis]
        seen = np.flatnonzero(np.isfinite(of_point))
        for t in range(len(clip)):
            before, behind = seen[seen <= t], seen[seen >= t]
            if len(seen) == 0:
                made[t, k, axis] = mean[k, axis]
            elif len(before) and len(behind) and before[-1] < behind[0]:
                part = (t - before[-1]) / (behind[0] - before[-1])
                made[t, k, axis] = (1 - part) * of_point[before[-1]] + part * of_point[behind[0]]
            else:
                made[t, k, axis] = of_point[before[-1] if len(before) else behind[0]]
    return made


def at_length(pose, n):
    at = np.linspace(0, len(pose) - 1, n)
    flat = pose.reshape(len(pose), -1)
    columns = [np.interp(at, np.arange(len(pose)), column) for column in flat.T]
    return np.stack(columns, 1).reshape(n, 76, 2)


def joined(takes):
    steps = np.arange(1, 7)[:, None, None] / 7
    made = takes[0]
    for take in takes[1:]:
        made = np.concatenate([made, made[-1] * (1 - steps) + take[0] * steps, take])
    return at_length(made, min(len(made), MOST_FRAMES)), len(made) / 25


def dtw_error(made, real):
    """The mean cost along the cheapest path."""
    costs = [[np.nanmean(np.linalg.norm(x - y, axis=-1)) for y in real] for x in made]
    table = {(-1, -1): (0, 0)}
    for i, j in np.ndindex(len(made), len(real)):
        before = [table.get(at, (np.inf, 0)) for at in ((i - 1, j - 1), (i - 1, j), (i, j - 1))]
        total, pairs = min(before)
        table[i, j] = total + costs[i][j], pairs + 1
    total, pairs = table[len(made) - 1, len(real) - 1]
    return total / pairs


def figures(answers, real, mean):
    """Answers (pose, seconds) -> MSE over the mean pose's, DTW-MJE, motion, duration error."""
    squares, mean_squares, path, real_path = 0, 0, 0, 0
    for (pose, _), clip in zip(answers, real, strict=True):
        pose = at_length(pose, len(clip))
        squares += np.nansum((pose - clip) ** 2)
        mean_squares += np.nansum((mean - clip) ** 2)
        steps = np.linalg.norm(np.diff(clip[:, HANDS], axis=0), axis=-1)
        own = np.linalg.norm(np.diff(pose[:, HANDS], axis=0), axis=-1)
        path += own[np.isfinite(steps)].sum()
        real_path += np.nansum(steps)
    dtw = np.mean([dtw_error(pose, clip) for (pose, _), clip in zip(answers, real, strict=True)])
    late = [abs(s - len(clip) / 25) for (_, s), clip in zip(answers, real, strict=True)]
    return squares / mean_squares, dtw, path / real_path, np.mean(late)


def table_of(printed):
    """{what: its cells, as numbers where they are some}; a spread is checked to be 0."""
    rows = {}
    for line in printed.splitlines():
        if line.startswith("| ") and not line.startswith("| what"):
            what, *cells = line.strip("| ").split(" | ")
            assert all(re.search(r"± [0.]+$", cell) for cell in cells if "±" in cell)
            rows[what] = [float(cell.split(" ±")[0].replace("–", "nan")) for cell in cells]
    return rows


def test_the_clips_rows_are_those_of_plain_numpy(tiny, capsys):
    bench_baselines.main(["tiny", "--epochs", "0"])
    printed = capsys.readouterr().out
    mean, real = mean_pose(tiny), [*tiny["validation"].values()]
    takes = {gloss: without_gaps(clip, mean) for gloss, clip in tiny["train"].items()}
    expected = {
        "mean pose": [(np.tile(mean, (len(clip), 1, 1)), np.nan) for clip in real],
        "nearest sentence": [(takes[gloss], TRAIN[gloss] / 25) for gloss in NEAREST],
        "single-sign clips joined": [joined([takes[g] for g in some]) for some in JOINED],
    }
    rows = table_of(printed)
    assert [*rows] == [*expected]
    for what, answers in expected.items():
        np.testing.assert_allclose(rows[what][1:], figures(answers, real, mean), atol=0.006)
        np.testing.assert_allclose(rows[what][1:3], figures(answers, real, mean)[:2], atol=0.0006)
    assert [row[0] for row in rows.values()] == [1, 3, 3]
    assert re.findall(r"\d+$", printed.split("\n\n")[0], re.M) == ["4", "1", "2", "1", "1"]


@pytest.mark.parametrize(("name", "title"), [("gru", "GRU"), ("bert", "BERT (2 layers of 16)")])
def test_a_models_row_has_the_figures_of_its_training(name, title, tiny, bert, capsys):
    change(DATASET="tiny", BERT_NAME=bert)
    bench_baselines.script.main(["--model", name])
    closing = dict(re.findall(r"^(\w+): ([\d.]+)$", capsys.readouterr().out, re.M))
    Path("other").mkdir()
    shutil.copy(f"best_{name}.pt", "other")
    foreign = torch.load(f"best_{name}.pt", weights_only=True) | {"data": "sample data"}
    Path("foreign").mkdir()
    torch.save(foreign, f"foreign/best_{name}.pt")
    bench_baselines.main(["tiny", "--epochs", "0", "--models", ".", "other", "foreign"])
    printed = capsys.readouterr().out
    share = float(closing["val_mse"]) / float(closing["mean_pose_mse"])
    expected = [2, share, *(float(closing[x]) for x in ("val_dtw_mje", "motion", "duration_error"))]
    np.testing.assert_allclose(table_of(printed)[title], expected, atol=0.0055)
    assert f"foreign/best_{name}.pt is passed over: it was trained on sample data" in printed


def test_the_autoregressive_rows_are_trained_by_the_ablation(tiny, monkeypatch, capsys):
    def run(row, model, seed, settings):
        asked.append((row, model, seed, settings))
        return {**figures, "val_mse": f"{rows.index(row) + 1 + seed / 10}", "mean_pose_mse": "2"}

    asked, rows = [], ["autoregressive, teacher forcing", "autoregressive, scheduled sampling"]
    small_settings = {"DATASET": "sample", "TRAIN_CLIPS": 8, "VALIDATION_CLIPS": 4, "EPOCHS": 1}
    small_settings |= {"EMBED_DIM": 16, "HIDDEN_DIM": 16, "MIN_GLOSS_COUNT": 1}
    figures = bench_baselines.bench_ablation.run(rows[1], "gru", 3, small_settings)
    monkeypatch.setattr(bench_baselines.bench_ablation, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bench_baselines.main(["tiny", "--epochs", "7"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].startswith(f"| {rows[0]} | 3 | 0.550 ± 0.050 |")
    assert lines[1].startswith(f"| {rows[1]} | 3 | 1.050 ± 0.050 |")
    for line in lines:
        names = [("val_dtw_mje", 3), ("motion", 2), ("duration_error", 2)]
        cells = [f"{float(figures[name]):.{n}f} ± {0:.{n}f}" for name, n in names]
        assert line.endswith(f"| {' | '.join(cells)} |")
    used = {"DATASET": str(Path("tiny").resolve()), "EPOCHS": 7}
    expected = [(row, "gru", seed, used) for row in rows for seed in (0, 1, 2)]
    assert sorted(map(repr, asked)) == sorted(map(repr, expected))


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ("WANT GO SCHOOL", "WANT GO SCHOOL", 0),
        ("WANT GO SCHOOL", "WANT SCHOOL", 1),
        ("GO SCHOOL WANT", "WANT GO SCHOOL", 2),
        ("WANT GO SCHOOL", "WANT EAT NOT SCHOOL", 2),
        ("HELLO", "WANT GO SCHOOL", 3),
    ],
)
def test_edit_distance(one, other, distance):
    assert bench_baselines.edit_distance(one.split(), other.split()) == distance
    assert bench_baselines.edit_distance(other.split(), one.split()) == distance


def test_of_clips_that_are_equally_near_one_is_drawn(tiny):
    change(DATASET="tiny")
    clips, _ = bench_baselines.script.load_clips()
    library = bench_baselines.Library(clips["train"])
    nearest = library.nearest(("YOU", "GO"))
    draws = [bench_baselines.draw(library, [nearest], [[]], seed)[0] for seed in range(20)]
    assert {len(clip.pose) for (clip,) in draws} == {TRAIN["YOU"], TRAIN["GO"]}
