"""The training of both scripts: its steps, its checkpoints, runs that are stopped and resumed."""

import csv
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, change, fork, shrink_sample, small

import model_selection as script
import train_final_model as final

CPU = torch.device("cpu")
LAST, BEST, LOG = "last_gru.pt", "best_gru.pt", "gru.log"
names = pytest.mark.parametrize("name", script.MODELS)


@pytest.fixture
def tiny(monkeypatch, bert):
    """Both scripts with tiny settings, on 16 and 4 clips of the sample."""
    shrink_sample(monkeypatch)
    settings = {"EPOCHS": 4, "MAX_FRAMES": 16, "DATASET": "sample", "BATCH_SIZE": 4, "SEED": 0}
    small(BERT_NAME=bert, **settings)


def train(*arguments, model="gru"):
    final.main(["--model", model, *arguments])


def new_run(name="gru", **settings):
    change(**settings)
    clips, _ = script.load_clips()
    return script.Run(name, clips, *script.training_statistics(clips["train"]), CPU)


def epochs_of(run, n):
    steps = len(run.order())
    schedule = script.new_schedule(run.optimizer, n * steps, done=0)
    for _ in range(n):
        script.run_epoch(run, run.model, schedule)
    return run


# ---- steps


@names
def test_training_lowers_the_loss(name, tiny):
    run = new_run(name, LR_GRU=0.02, LR_TRANSFORMER=0.02, LR_BERT=0.02, DROPOUT=0.0)
    log = epochs_of(run, 8).log
    assert log[-1]["train_mse"] < 0.8 * log[0]["train_mse"]
    assert log[-1]["val_mse"] < log[-1]["mean_pose_mse"]


def in_bfloat16(monkeypatch):
    """Mixed precision, which is for GPUs, on the CPU."""
    monkeypatch.setattr(script, "mixed_precision", lambda _: torch.autocast("cpu", torch.bfloat16))


@names
def test_mixed_precision_learns_alike_and_leaves_the_grus_alone(name, tiny, monkeypatch):
    mse, kinds = {}, {}
    settings = {"DROPOUT": 0.0, "WORD_DROPOUT": 0.0, "LR_GRU": 5e-3, "LR_TRANSFORMER": 5e-3}
    monkeypatch.setattr(script.PretrainedEncoder, "hidden_share", 0.0)
    for mixed in (False, True):
        if mixed:
            in_bfloat16(monkeypatch)
        run = new_run(name, **settings)
        for key, layer in (("linear", run.model.duration[0]), ("gru", run.model.decoder)):
            layer = layer.gru.there if key == "gru" and name != "transformer" else layer
            layer.register_forward_hook(
                lambda _, x, y, key=key: kinds.update({key: (y[0] if key == "gru" else y).dtype})
            )
        mse[mixed] = epochs_of(run, 3).log[-1]["train_mse"]
    assert mse[True] != mse[False] and mse[True] == pytest.approx(mse[False], rel=0.1)
    assert kinds["linear"] == torch.bfloat16
    assert name == "transformer" or kinds["gru"] == torch.float32


@pytest.mark.parametrize(
    "device, supported, wanted, enabled",
    [
        ("cuda", True, True, True),
        ("cuda", True, False, False),
        ("cuda", False, True, False),
        ("cpu", True, True, False),
    ],
)
def test_mixed_precision_is_bfloat16_on_gpus_that_have_it(
    device, supported, wanted, enabled, monkeypatch
):
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *x, enabled: asked.append((*x, enabled)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    change(MIXED_PRECISION=wanted)
    script.mixed_precision(torch.device(device))
    assert asked == [(device, torch.bfloat16, enabled)]


@pytest.mark.parametrize("limit", [0, 1e-9, 1e9])
def test_the_gradient_is_clipped_and_0_is_no_limit(limit, tiny, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def seen(optimizer, *arguments, **options):
        values = [value for group in optimizer.param_groups for value in group["params"]]
        gradients = [value.grad for value in values if value.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    epochs_of(new_run(GRAD_CLIP=limit), 1)
    assert max(norms) <= 1.001e-9 if limit == 1e-9 else min(norms) > 0.01


@pytest.mark.parametrize("average", [0, 0.5])
def test_what_is_evaluated_is_the_average_of_the_weights_over_the_steps(average, tiny):
    run = new_run(AVERAGE=average)
    expected = [value.clone() for value in run.model.parameters()]
    steps = []

    def follow(*_):
        memory = min(average, (1 + len(steps)) / (6 + len(steps)))
        for value, weight in zip(expected, run.model.parameters(), strict=True):
            value.mul_(memory).add_(weight.detach(), alpha=1 - memory)
        steps.append(0)

    run.optimizer.register_step_post_hook(follow)
    epochs_of(run, 2)
    assert len(steps) == 2 * len(run.order())
    for mine, value, weight in zip(
        run.average.parameters(), expected, run.model.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, value, rtol=1e-5, atol=1e-6)
        assert not mine.requires_grad and (average == 0) == torch.equal(mine, weight)


@pytest.mark.parametrize(
    "steps, warmup", [(20, 0.05), (10, 0.1), (40, 0.05), (7, 0.3), (2, 0.5), (1, 0.05)]
)
def test_the_rate_rises_and_falls_to_0(steps, warmup):
    change(WARMUP=warmup)
    layer, rates = torch.nn.Linear(1, 1), []
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3)
    schedule = script.new_schedule(optimizer, steps, done=0)
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    top = rates.index(max(rates))
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    assert 0 < max(rates) <= 1e-3 and top == round(warmup * steps)
    assert steps < 10 or (max(rates) > 9e-4 and rates[-1] < 1e-4)
    assert schedule.get_last_lr()[0] == pytest.approx(0)
    again = script.new_schedule(torch.optim.AdamW(layer.parameters(), 1e-3), steps, steps // 2)
    assert again.get_last_lr()[0] == pytest.approx(rates[steps // 2])  # goes on in the middle


@names
def test_every_parameter_is_trained_once_with_its_models_rate_and_memory(name, tiny):
    run = new_run(name)
    groups = run.optimizer.param_groups
    trained = [value for group in groups for value in group["params"]]
    assert len(trained) == len({*trained}) == len([*run.model.parameters()])
    rates = {"gru": [1e-3], "transformer": [5e-4], "bert": [1e-3, 2e-5]}
    assert [group["lr"] for group in groups] == rates[name]
    memory = 0.98 if name == "transformer" else 0.999
    assert all(group["betas"] == (0.9, memory) for group in groups)
    if name == "bert":
        assert set(groups[1]["params"]) == set(run.model.encoder.pretrained.parameters())


def test_the_order_depends_on_the_seed_and_the_epoch_alone(tiny):
    run, other = new_run(SEED=0), new_run(SEED=0)
    torch.rand(7)
    first = torch.cat(run.order()).tolist()
    assert first == torch.cat(other.order()).tolist() and sorted(first) == list(range(16))
    other.log.append({})
    assert first != torch.cat(other.order()).tolist()
    change(SEED=1)
    assert first != torch.cat(run.order()).tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_clips_of_each_batch_and_have_as_many(world, tiny):
    run = new_run(BATCH_SIZE=6)
    whole = [sorted(batch.tolist()) for batch in run.order()]
    run.world, shares = world, []
    for rank in range(world):
        run.rank = rank
        shares.append([batch.tolist() for batch in run.order()])
    assert len({tuple(map(len, share)) for share in shares}) == 1
    together = [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)]
    assert together[:-1] == whole[:-1] and set(together[-1]) <= set(whole[-1])
    assert sum(map(len, together)) == 16 // world * world


def test_what_is_dropped_differs_by_process_and_epoch_and_not_by_run(tiny, monkeypatch):
    drawn = []

    def drawing(model, batch):
        drawn.append(torch.rand(3).tolist())
        return model.output.weight.sum(), torch.zeros(())

    monkeypatch.setattr(script, "training_loss", drawing)
    run = new_run(BATCH_SIZE=16)
    for rank, epoch in ((0, 1), (1, 1), (0, 2), (0, 1)):
        run.rank, run.log = rank, [{}] * (epoch - 1)
        schedule = script.new_schedule(run.optimizer, 9, done=0)
        script.train_one_epoch(run, run.model, schedule, "")
    assert drawn[0] == drawn[3] and len({str(x) for x in drawn}) == 3


@pytest.mark.parametrize("module", [script, final])
@pytest.mark.parametrize(
    "errors, stopped, best",
    [
        ([3, 2, 4, 5, 1, 1], 4, 2),
        ([3, 2, 2.5, 1, 2, 2], 6, 4),
        ([6, 5, 4, 3, 2, 1], 6, 6),
        ([2, 2, 2, 1, 1, 1], 3, 1),
    ],
)
def test_early_stopping_keeps_the_best_epoch(
    module, errors, stopped, best, tiny, monkeypatch, capsys, tmp_path
):
    def one_epoch(run, *_):
        run.average.mean.fill_(len(run.log) + 1)  # which marks the checkpoint
        return 0.5

    def evaluate(model, *_):
        keys = ("val_mae", "mean_pose_mse", "motion", "tremble", "reach")
        keys += ("duration_error", "seen_error")
        return {"val_mse": float(errors[int(model.mean[0]) - 1]), **dict.fromkeys(keys, 9.0)}

    monkeypatch.setattr(module, "train_one_epoch", one_epoch)
    monkeypatch.setattr(module, "evaluate", evaluate)
    change(EPOCHS=6, PATIENCE=2, CANDIDATES=["gru"])
    module.main([] if module is script else ["--model", "gru"])
    out = capsys.readouterr().out
    assert out.count("GRU epoch ") == stopped
    shown = f"GRU: {errors[best - 1]:.4f}", f"best_epoch: {best}\nval_mse: {errors[best - 1]:.5f}"
    assert shown[module is final] in out
    (path,) = [*tmp_path.glob("best_*.pt"), *tmp_path.glob("selection_*.pt")]
    assert torch.load(path, weights_only=True)["weights"]["mean"].eq(best).all()
    assert not [*tmp_path.glob("*.tmp")]


def test_a_loss_that_is_not_finite_is_one_line_and_keeps_the_best(tiny, monkeypatch):
    training_loss, steps = final.training_loss, []

    def infinite(*arguments):
        steps.append(0)
        loss, mse = training_loss(*arguments)
        return loss * (math.inf if len(steps) == 6 else 1), mse

    monkeypatch.setattr(final, "training_loss", infinite)
    line = "^error: the loss of GRU epoch 2/4 is not finite: lower the learning rate$"
    with pytest.raises(SystemExit, match=line):
        train()
    assert torch.load(BEST, weights_only=True)["metrics"]["epoch"] == 1


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_a_model_that_does_not_beat_the_mean_pose_is_named_by_both_scripts(rate, tiny, capsys):
    change(LR_GRU=rate, CANDIDATES=["gru"])
    train()
    out = capsys.readouterr().out
    closing = dict(re.findall("^(val_mse|mean_pose_mse): (.*)$", out, re.M))
    learned = float(closing["val_mse"]) < 0.95 * float(closing["mean_pose_mse"])
    assert learned == (rate > 0)
    assert ("warning: the model does not clearly beat the mean" in out) == (not learned)
    script.main([])
    warned = "warning: no model clearly beats the mean pose" in capsys.readouterr().out
    assert warned == (not learned)


# ---- checkpoints


LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import train_final_model as final
poses = {}
for name in ("gru", "transformer", "bert"):
    model, tokenizer, length, facts = final.load_model(f"best_{name}.pt")
    made = final.generate(model, tokenizer, ["hello", "I want go school"], length)
    poses[name] = [torch.tensor(one.pose) for one in made]
torch.save(poses, "loaded.pt")
"""


def test_a_checkpoint_is_complete_by_itself_in_a_fresh_process(tiny, bert, tmp_path):
    poses = {}
    change(BERT_NAME=shutil.copytree(bert, tmp_path / "bert"), EPOCHS=1)
    for name in script.MODELS:
        train(model=name)
        model, tokenizer, length, facts = final.load_model(f"best_{name}.pt")
        assert facts["model"] == name and facts["best_epoch"] == 1
        sentences = ["hello", "I want go school"]
        made = final.generate(model, tokenizer, sentences, length)
        poses[name] = [torch.tensor(one.pose) for one in made]
    shutil.rmtree(tmp_path / "bert")
    subprocess.run([sys.executable, "-c", LOAD, ROOT], check=True)
    loaded = torch.load("loaded.pt")
    for name, made in poses.items():
        assert made[1].abs().max() > 0.1
        torch.testing.assert_close(loaded[name], made)


class Code:
    def __reduce__(self):
        return open, ("executed", "w")


SPOILED = {
    "text": lambda best: b"no checkpoint",
    "foreign": lambda best: {"state_dict": {}},
    "other weights": lambda best: {**best, "weights": {}},
    "another width": lambda best: {**best, "model_args": {**best["model_args"], "hidden_dim": 8}},
    "another model": lambda best: {**best, "model_args": {**best["model_args"], "name": "bert"}},
    "no tokenizer": lambda best: {**best, "tokenizer": {}},
    "no metrics": lambda best: {key: best[key] for key in best if key != "metrics"},
    "code": lambda best: {**best, "note": Code()},
}


@pytest.mark.parametrize("fault", [*SPOILED, "cut"])
def test_a_file_that_is_no_checkpoint_is_one_line_and_runs_no_code(fault, tiny, tmp_path):
    change(EPOCHS=1)
    train()
    if fault == "cut":
        Path(BEST).write_bytes(Path(BEST).read_bytes()[:-2000])
    else:
        spoiled = SPOILED[fault](torch.load(BEST, weights_only=True))
        if isinstance(spoiled, bytes):
            Path(BEST).write_bytes(spoiled)
        else:
            torch.save(spoiled, BEST)
    line = r"^error: best_gru.pt is damaged or no checkpoint of this script \(\w+: .*\)$"
    with pytest.raises(SystemExit, match=line) as error:
        train("--predict", "go")
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    script.save("best.pt", {"epoch": 1})

    def interrupted(number):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.save("best.pt", {"epoch": 2})
    assert torch.load("best.pt") == {"epoch": 1} and not [*tmp_path.glob("*.tmp")]


@pytest.mark.parametrize("name", [LAST, BEST, LOG, "preview_gru.html"])
def test_a_folder_where_a_file_should_be_is_one_line(name, tiny, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(SystemExit, match=f"^error: {name} cannot be written: Is a directory$"):
        train()


# ---- a run that is stopped goes on as if it had not been


def outcome():
    """The log without the times, and the weights and moments of both checkpoints."""
    assert Path(LOG).read_bytes().endswith(b"\n")
    with open(LOG, newline="") as file:
        log = [{**line, "seconds": ""} for line in csv.DictReader(file)]
    best, last = (torch.load(path, weights_only=True) for path in (BEST, LAST))
    return log, best["weights"], last["weights"], last["average"], last["optimizer"]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def expected(tiny, tmp_path, monkeypatch):
    """The outcome of an unbroken run; then the folder is another one."""
    (tmp_path / "unbroken").mkdir()
    monkeypatch.chdir(tmp_path / "unbroken")
    train()
    unbroken = outcome()
    monkeypatch.chdir(tmp_path)
    return unbroken


def test_killed_at_any_moment_a_resumed_run_ends_as_an_unbroken_one(expected, tmp_path):
    began = time.monotonic()
    assert fork(train)[0] == 0
    took = time.monotonic() - began
    rng, kills, rounds = random.Random(5), 0, 0
    while kills < 20 or rounds < 2:
        for path in (BEST, LAST, LOG):
            (tmp_path / path).unlink(missing_ok=True)
        code = None
        while code != 0:
            resume = ["--resume"] * (tmp_path / LAST).exists()
            patience = rng.uniform(0.1, 0.8) * took if kills < 22 else None
            code, _, err = fork(partial(train, *resume), patience)
            assert code in (0, -signal.SIGKILL), err
            kills += code != 0
            for path in (BEST, LAST):
                if (tmp_path / path).exists():
                    torch.load(path, weights_only=True)
        assert same(outcome(), expected)
        rounds += 1
    assert kills >= 20


def test_killed_behind_any_file_a_resumed_run_ends_as_an_unbroken_one(tiny, tmp_path, monkeypatch):
    change(EPOCHS=2)
    save = final.save
    train()
    expected = outcome()
    for files in range(1, 2 * 3 + 1):  # best, log and last of two epochs, where each is the best
        (tmp_path / f"{files}").mkdir()
        monkeypatch.chdir(tmp_path / f"{files}")
        written = []

        def save_and_die(path, contents, files=files, written=written):
            save(path, contents)
            written.append(path)
            if len(written) == files:
                os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patch:
            patch.setattr(final, "save", save_and_die)
            assert fork(train)[0] == -signal.SIGKILL
        train(*["--resume"] * Path(LAST).exists())
        assert same(outcome(), expected), f"killed behind {files} files"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_one_line_and_nothing_is_lost(number, expected, monkeypatch):
    training_loss, steps = final.training_loss, []

    def stop_in_epoch_3(*arguments):
        steps.append(0)
        if len(steps) == 10:
            os.kill(os.getpid(), number)
        return training_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(final, "training_loss", stop_in_epoch_3)
        code, _, err = fork(train)
    assert (code, err) == (130, "\nstopped; what was prepared and saved stays\n")
    assert len(torch.load(LAST, weights_only=True)["log"]) == 2 and not [*Path().glob("*.tmp")]
    train("--resume")
    assert same(outcome(), expected)
    train("--resume")  # there is nothing left to do
    assert same(outcome(), expected)


def test_a_new_run_that_is_stopped_in_its_first_epoch_leaves_the_old_one(expected, monkeypatch):
    train()

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(final, "train_one_epoch", stop)
        assert fork(train)[0] == 130
    assert same(outcome(), expected)
    train("--resume")
    assert same(outcome(), expected)


def edit_sample(monkeypatch, edit, split):
    """Let the sample's rows, a list of dicts, be edited as they are made; split: 1 train, 2 not."""
    sample_rows = final.sample_rows

    def edited_rows(n, seed):
        rows = list(sample_rows(n, seed))
        return final.datasets.Dataset.from_list(edit(rows) if split == seed else rows)

    monkeypatch.setattr(final, "sample_rows", edited_rows)


def rotated(rows):
    """The glosses against their poses."""
    glosses = [row["gloss"] for row in rows]
    turned = zip(rows, glosses[1:] + glosses[:1], strict=True)
    return [{**row, "gloss": gloss} for row, gloss in turned]


def moved(rows):
    """All points but the shoulders are elsewhere."""
    shift = np.full(152, 0.5)
    shift[94:98] = 0
    return [{**row, "pose": (np.array(row["pose"]) + shift).tolist()} for row in rows]


def still(frames):
    """The first frame of each clip, so many times."""
    return lambda rows: [{**row, "pose": [row["pose"][0]] * frames} for row in rows]


@pytest.mark.parametrize(
    "edit, split",
    [(rotated, 1), (rotated, 2), (moved, 1), (moved, 2)]
    + [(lambda rows: rows[::-1], 2), (lambda rows: rows[:2], 2)],
)
def test_other_data_is_not_resumed(edit, split, tiny, monkeypatch):
    change(EPOCHS=1)
    train()
    before = {path: Path(path).read_bytes() for path in (LAST, BEST, LOG)}
    edit_sample(monkeypatch, edit, split)
    with pytest.raises(SystemExit, match="^error: last_gru.pt does not fit: the data is another$"):
        train("--resume")
    assert {path: Path(path).read_bytes() for path in before} == before


def test_other_durations_of_the_same_frames_are_other_data(tiny, monkeypatch):
    change(EPOCHS=1)
    edit_sample(monkeypatch, still(31), 1)  # of which every second one is taken
    train()
    edit_sample(monkeypatch, still(46), 1)
    with pytest.raises(SystemExit, match="the data is another$"):
        train("--resume")


def test_a_data_folder_that_was_copied_and_a_new_cache_are_resumed(tiny, tmp_path):
    for name, seed in (("train", 1), ("validation", 2)):
        (tmp_path / "here").mkdir(exist_ok=True)
        final.sample_rows(320, seed).to_parquet(tmp_path / "here" / f"{name}.parquet")
    change(DATASET=str(tmp_path / "here"), EPOCHS=1)
    train()
    shutil.move(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "cache")
    change(DATASET=str(tmp_path / "there"))
    train("--resume")


def test_settings_that_shape_the_model_or_the_clips_may_not_change(tiny, capsys):
    line = "^error: last_gru.pt does not exist: train first, with --model alone$"
    with pytest.raises(SystemExit, match=line):
        train("--resume")
    change(EPOCHS=1)
    train()
    capsys.readouterr()
    for setting, value in (("HIDDEN_DIM", 8), ("MAX_FRAMES", 8), ("FPS", 20), ("DROPOUT", 0.5)):
        was = getattr(final, setting)
        change(**{setting: value})
        line = f"^error: last_gru.pt does not fit: {setting} was {was!r}, is {value!r}$"
        with pytest.raises(SystemExit, match=line):
            train("--resume")
        change(**{setting: was})
    assert capsys.readouterr().out == ""  # before the data is loaded


def test_other_settings_may_change_and_are_said(tiny, capsys):
    train()
    capsys.readouterr()
    changes = {"EPOCHS": 6, "BATCH_SIZE": 2, "LR_GRU": 0.5, "GRAD_CLIP": 0.5, "PATIENCE": 3}
    change(**changes)
    train("--resume")
    out = capsys.readouterr().out
    assert "\nGRU epoch 5/6 " in out and "\nGRU epoch 4/6 " not in out
    (line,) = [line for line in out.splitlines() if line.startswith("resumed with other settings")]
    assert "so not bit by bit" in line and "BATCH_SIZE was 4, is 2" in line
    assert all(setting in line for setting in changes)
    last = torch.load(LAST, weights_only=True)
    del last["settings"]["AVERAGE"]  # as an older version of the script may have left it
    torch.save(last, LAST)
    train("--resume")


@pytest.mark.parametrize("what", ["settings", "optimizer", "weights", "log", "digest", "cut"])
def test_a_last_checkpoint_that_is_damaged_is_one_line(what, tiny):
    change(EPOCHS=1)
    train()
    if what == "cut":
        Path(LAST).write_bytes(Path(LAST).read_bytes()[:-1000])
    else:
        last = torch.load(LAST, weights_only=True)
        torch.save({key: last[key] for key in last if key != what}, LAST)
    best = Path(BEST).read_bytes()
    with pytest.raises(
        SystemExit, match="^error: last_gru.pt is damaged or no checkpoint"
    ) as error:
        train("--resume")
    assert "\n" not in str(error.value) and Path(BEST).read_bytes() == best


def test_a_best_checkpoint_of_another_run_or_none_is_told_before_the_training(tiny, monkeypatch):
    change(EPOCHS=1)
    train()
    other = torch.load(BEST, weights_only=True)
    change(SEED=5, EPOCHS=2)
    train()
    monkeypatch.setattr(final, "train_epochs", None)
    torch.save(other, BEST)
    with pytest.raises(SystemExit, match="does not fit: best_gru.pt is of another run$"):
        train("--resume")
    Path(BEST).unlink()
    with pytest.raises(SystemExit, match="^error: best_gru.pt does not exist"):
        train("--resume")


def test_another_encoder_of_the_same_size_is_not_resumed(tiny, bert, tmp_path):
    change(EPOCHS=1)
    train(model="bert")
    folder = shutil.copytree(bert, tmp_path / "moved")
    change(BERT_NAME=str(folder))
    train("--resume", model="bert")
    tokenizer = (folder / "tokenizer.json").read_text().replace("hello", "jello")
    (folder / "tokenizer.json").write_text(tokenizer)
    line = "^error: last_bert.pt does not fit: the words are numbered otherwise$"
    with pytest.raises(SystemExit, match=line):
        train("--resume", model="bert")


def test_a_second_run_of_a_model_in_a_folder_is_refused(tiny):
    lock = "import fcntl, sys, time; f = open('.gru.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    code = f"{lock}; print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(SystemExit, match="^error: another run of gru is at work in this folder$"):
        train()
    holder.kill()
    holder.wait()
    train()  # a lock ends with its process


# ---- what ends a script with one line


def test_a_disk_without_room_is_one_line_and_nothing_is_lost(expected):
    train()
    code, _, err = fork(train, limit=10_000)  # bytes, less than best_gru.pt
    assert (code, err) == (1, "error: best_gru.pt cannot be written: File too large\n")
    assert same(outcome(), expected) and not [*Path().glob("*.tmp")]


def raise_in_script(error):
    def main():
        print("before")
        raise error

    return fork(main)


def test_what_a_user_meets_is_one_line(tiny):
    """There is no GPU here, so that the peak of its memory is 0."""
    full = torch.OutOfMemoryError("CUDA out of memory")
    assert raise_in_script(full) == (
        1,
        "before\n",
        "error: GPU full at 0 MB; lower BATCH_SIZE = 4\n",
    )
    said = "error: [Errno 28] No space left on device\n"
    assert raise_in_script(OSError(28, "No space left on device")) == (1, "before\n", said)
    assert raise_in_script(SystemExit("error: x")) == (1, "before\n", "error: x\n")
    assert raise_in_script(SystemExit(2)) == (2, "before\n", "")
    assert raise_in_script(SystemExit()) == (0, "before\n", "")
    code, _, err = raise_in_script(ValueError("a bug"))
    assert code == 99 and err.endswith("ValueError: a bug\n")


def test_a_thread_that_sleeps_does_not_keep_a_script_that_ends():
    def main():
        pool = script.ThreadPoolExecutor(1)
        pool.submit(time.sleep, 60)
        raise KeyboardInterrupt

    began = time.monotonic()
    assert fork(main)[0] == 130 and time.monotonic() - began < 10
