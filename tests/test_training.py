"""The training of both scripts: its steps, its checkpoints, runs that are stopped and resumed."""

import csv
import json
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
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import METRICS, ROOT, change, fork, shrink_sample, small

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
        layers = run.model.encoder.modules()
        linear = next(layer for layer in layers if isinstance(layer, torch.nn.Linear))
        for key, layer in (("linear", linear), ("gru", run.model.decoder)):
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
    [("cuda", 1, 1, True), ("cuda", 1, 0, False), ("cuda", 0, 1, False), ("cpu", 1, 1, False)],
)
def test_mixed_precision_is_bfloat16_on_gpus_that_have_it(
    device, supported, wanted, enabled, monkeypatch
):
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *x, enabled: asked.append((*x, bool(enabled))))
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
    torch.testing.assert_close([*run.average.parameters()], expected, rtol=1e-5, atol=1e-6)
    equal = map(torch.equal, run.average.parameters(), run.model.parameters())
    assert {*equal} == {average == 0}
    assert not any(value.requires_grad for value in run.average.parameters())


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
    [([3, 2, 4, 5, 1, 1], 4, 2), ([3, 2, 2.5, 1, 2, 2], 6, 4), ([2, 2, 2, 1, 1, 1], 3, 1)],
)
def test_early_stopping_keeps_the_best_epoch_and_says_why(
    module, errors, stopped, best, tiny, monkeypatch, capsys, tmp_path
):
    def one_epoch(run, *_):
        run.average.mean.fill_(len(run.log) + 1)  # which marks the checkpoint
        return 0.5

    def evaluate(model, *_):
        return {**METRICS, "val_mse": float(errors[int(model.mean[0]) - 1])}

    monkeypatch.setattr(module, "train_one_epoch", one_epoch)
    monkeypatch.setattr(module, "evaluate", evaluate)
    change(EPOCHS=6, PATIENCE=2, CANDIDATES=["gru"])
    module.main([] if module is script else ["--model", "gru"])
    out = capsys.readouterr().out
    assert out.count("GRU epoch ") == stopped
    reason = "no lower val_mse for 2 epochs" if stopped < 6 else "EPOCHS are over"
    assert out.count(f"\nstopped: {reason}\n") == out.count("stopped") == 1
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


@pytest.mark.parametrize(
    "text, unknown, alike",
    [("hello go", 0, 0), ("Hello hello HELLO", 0, 0), ("school zebra", 50, 0)]
    + [("wänt want", 0, 2), ("\ufffd", 100, 0), ("\ufffd hello \ufffd", 66.7, 0)],
)
@pytest.mark.parametrize("special", [True, False])
def test_words_that_a_tokenizer_drops_does_not_know_or_reads_as_others_are_told(
    special, text, unknown, alike, tiny, bert, tmp_path, capsys, monkeypatch
):
    """A word without its marks is another word. special: it adds [CLS] and [SEP]."""
    if not special:
        change(BERT_NAME=shutil.copytree(bert, tmp_path / "bert"))
        file = tmp_path / "bert" / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    edit_sample(monkeypatch, lambda rows: [{**row, "gloss": text} for row in rows], 1)
    change(EPOCHS=1)
    train(model="bert")
    out = capsys.readouterr().out
    said = f"{unknown:.1f} % unknown in train, {alike} share their pieces with another"
    bad = unknown > 50 or alike > 0
    assert f"\n{'warning: words' if bad else '  words':<18} {said}" in out
    train("--predict", text, model="bert")
    assert ("unknown: " in capsys.readouterr().out) == (unknown > 0)


# ---- checkpoints


LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import train_final_model as final
poses = {}
for name in ("gru", "transformer", "bert"):
    model, tokenizer, length, _ = final.load_model(f"best_{name}.pt")
    answers = final.generate(model, tokenizer, ["hello", "I want go school"], length)
    poses[name] = [torch.tensor(one.pose) for one in answers]
torch.save(poses, sys.argv[2])
"""


def test_a_checkpoint_is_complete_by_itself_in_a_fresh_process(tiny, bert, tmp_path, monkeypatch):
    change(BERT_NAME=shutil.copytree(bert, tmp_path / "bert"), EPOCHS=1)
    for name in script.MODELS:
        train(model=name)
        facts = final.load_model(f"best_{name}.pt")[3]
        assert facts["model"] == name and facts["best_epoch"] == 1
    monkeypatch.setattr(sys, "argv", ["", str(ROOT), "here.pt"])
    exec(LOAD, {})
    shutil.rmtree(tmp_path / "bert")
    subprocess.run([sys.executable, "-c", LOAD, ROOT, "there.pt"], check=True)
    here, there = torch.load("here.pt"), torch.load("there.pt")
    assert all(poses[1].abs().max() > 0.1 for poses in here.values())
    torch.testing.assert_close(there, here)


class Code:
    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("fault", ["text", "code", "cut"])
@pytest.mark.parametrize("path, arguments", [(BEST, ["--predict", "go"]), (LAST, ["--resume"])])
def test_a_file_that_is_no_checkpoint_is_one_line_and_runs_no_code(
    fault, path, arguments, tiny, tmp_path
):
    change(EPOCHS=1)
    train()
    if fault == "code":
        torch.save({**torch.load(path, weights_only=True), "note": Code()}, path)
    else:
        data = Path(path).read_bytes()[:-2000]
        Path(path).write_bytes(data if fault == "cut" else b"no checkpoint")
    files = [LAST, BEST, LOG]
    before = [Path(name).read_bytes() for name in files]
    line = rf"^error: {path} is damaged or no checkpoint \(\w+: .*\)$"
    with pytest.raises(SystemExit, match=line) as error:
        train(*arguments)
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()
    assert [Path(name).read_bytes() for name in files] == before


def test_an_interrupted_save_leaves_the_old_file_and_kills_leave_one(tmp_path, monkeypatch):
    script.save("best.pt", {"epoch": 1})
    kills = [lambda: os._exit(1)] * 2
    for kill in [*kills, lambda: (_ for _ in ()).throw(KeyboardInterrupt)]:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _, kill=kill: kill())
            fork(partial(script.save, "best.pt", {"epoch": 2}))
        assert torch.load("best.pt") == {"epoch": 1}
        left = [path.name for path in tmp_path.glob("*.tmp")]
        assert left == ["best.pt.tmp"] * (kill in kills)


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
    rng, kills = random.Random(5), 0
    while kills < 8:
        for path in (BEST, LAST, LOG):
            (tmp_path / path).unlink(missing_ok=True)
        code = None
        while code != 0:
            resume = ["--resume"] * (tmp_path / LAST).exists()
            patience = rng.uniform(0.1, 0.8) * took if kills < 10 else None
            code, _, err = fork(partial(train, *resume), patience)
            assert code in (0, -signal.SIGKILL), err
            kills += code != 0
        assert same(outcome(), expected)


@pytest.mark.parametrize("batch_size", [4, 2])
def test_killed_after_any_file_a_resumed_run_ends_as_an_unbroken_one(
    batch_size, tiny, tmp_path, monkeypatch
):
    """Also where it goes on with other settings, so that no later epoch need be the best one."""
    change(EPOCHS=2)
    save = final.save
    train()
    expected = outcome()
    for files in range(1, 2 * 3 + 1):  # last, log and best of two epochs, where each is the best
        (tmp_path / f"{files}").mkdir()
        monkeypatch.chdir(tmp_path / f"{files}")
        written = []

        def save_and_die(path, contents, files=files, written=written):
            save(path, contents)
            written.append(path)
            if len(written) == files:
                os.kill(os.getpid(), signal.SIGKILL)

        change(BATCH_SIZE=4)
        with monkeypatch.context() as patch:
            patch.setattr(final, "save", save_and_die)
            assert fork(train)[0] == -signal.SIGKILL
        change(BATCH_SIZE=batch_size, LR_GRU=1e-3 if batch_size == 4 else 0.5)
        train("--resume")
        best, log = torch.load(BEST, weights_only=True), torch.load(LAST, weights_only=True)["log"]
        assert best["metrics"] == final.best_of(log) and len(log) == 2
        assert batch_size != 4 or same(outcome(), expected), f"killed after {files} files"
        train("--resume")


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
    assert (code, err) == (130, "\nstopped: the same command with --resume goes on\n")
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
        code, _, err = fork(train)
    again = "the same command starts again, with the clips that were prepared"
    assert (code, err) == (130, f"\nstopped: {again}\n")
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
    turned = zip(rows, rows[1:] + rows[:1], strict=True)
    return [{**row, "gloss": other["gloss"]} for row, other in turned]


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
    [(rotated, 1), (rotated, 2), (moved, 1), (moved, 2), (lambda rows: rows[::-1], 2)]
    + [(lambda rows: rows[:2], 2), (still(46), 1)],
)
def test_other_data_is_not_resumed(edit, split, tiny, monkeypatch):
    change(EPOCHS=1)
    with monkeypatch.context() as patch:
        if split == 1:  # of 31 and of 46 frames each second or third one is taken: the same ones
            edit_sample(patch, still(31) if edit != rotated else lambda rows: rows, 1)
        train()
    before = {path: Path(path).read_bytes() for path in (LAST, BEST, LOG)}
    edit_sample(monkeypatch, edit, split)
    with pytest.raises(SystemExit, match="^error: last_gru.pt does not fit: the data is another$"):
        train("--resume")
    assert {path: Path(path).read_bytes() for path in before} == before


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


@pytest.mark.parametrize(
    "setting, value, said",
    [("HIDDEN_DIM", 8, "hidden_dim was 16, is 8"), ("MAX_FRAMES", 8, "max_frames was 16, is 8")]
    + [("FPS", 20, "fps was 25, is 20"), ("DROPOUT", 0.5, "dropout was 0.1, is 0.5")]
    + [("MIN_GLOSS_COUNT", 9, r"backend is another; vocabulary was \d+, is \d+")],
)
def test_settings_that_shape_the_model_or_the_clips_may_not_change(
    setting, value, said, tiny, capsys
):
    change(EPOCHS=1)
    train()
    change(**{setting: value})
    with pytest.raises(SystemExit, match=f"^error: last_gru.pt does not fit: {said}$"):
        train("--resume")
    assert (
        f"\nresumed with other settings, so not bit by bit: {setting} was "
        in capsys.readouterr().out
    )


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


def test_a_best_checkpoint_of_another_run_or_none_is_told_before_the_training(tiny, monkeypatch):
    for path, arguments in ((LAST, ["--resume"]), (BEST, ["--predict", "go"])):
        with pytest.raises(SystemExit, match=f"^error: {path} is not in this folder: put it back"):
            train(*arguments)
    change(PATIENCE=1, LR_GRU=0.0)  # epoch 2 is no better
    train()
    other = torch.load(BEST, weights_only=True)
    monkeypatch.setattr(final, "train_epochs", None)
    torch.save({**other, "metrics": {**other["metrics"], "val_mse": 9.0}}, BEST)
    with pytest.raises(SystemExit, match="does not fit: best_gru.pt is of another run$"):
        train("--resume")
    Path(BEST).unlink()
    with pytest.raises(SystemExit, match="^error: best_gru.pt is not in this folder: put it back"):
        train("--resume")


def test_an_updated_library_or_a_moved_encoder_is_resumed_and_another_is_not(tiny, bert, tmp_path):
    change(EPOCHS=1)
    train(model="bert")
    last = torch.load("last_bert.pt", weights_only=True)
    config = last["built"]["model_args"]["bert_config"]
    config |= {"transformers_version": "4.0", "_name_or_path": "there", "gone": 1}
    torch.save(last, "last_bert.pt")
    folder = shutil.copytree(bert, tmp_path / "moved")
    change(BERT_NAME=str(folder))
    train("--resume", model="bert")
    tokenizer = (folder / "tokenizer.json").read_text().replace("hello", "jello")
    (folder / "tokenizer.json").write_text(tokenizer)
    line = "^error: last_bert.pt does not fit: backend is another$"
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
    assert (code, err) == (1, "error: last_gru.pt cannot be written: File too large\n")
    assert same(outcome(), expected) and not [*Path().glob("*.tmp")]


def raise_in_script(error):
    def main():
        print("before")
        raise error

    return fork(main)


def test_what_a_user_meets_is_one_line(tiny):
    """There is no GPU here, so that the peak of its memory is 0."""
    full = "error: GPU full at 0 MB; lower BATCH_SIZE = 4\n"
    no_room = OSError(28, "No space left on device")
    for error, status, said in (
        (torch.OutOfMemoryError("CUDA out of memory"), 1, full),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublas...`"), 1, full),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), 1, full),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), 1, full),
        (no_room, 1, "error: [Errno 28] No space left on device\n"),
        (SystemExit("error: x"), 1, "error: x\n"),
        (SystemExit(2), 2, ""),
        (SystemExit(), 0, ""),
    ):
        assert raise_in_script(error) == (status, "before\n", said)
    for bug in (ValueError("a bug"), RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")):
        code, _, err = raise_in_script(bug)
        assert code == 99 and err.endswith(f"{type(bug).__name__}: {bug}\n")


@pytest.mark.parametrize("preparing", [True, False])
def test_the_process_ends_hard_only_where_a_thread_of_the_preparation_sleeps(preparing):
    """Of a notebook, which runs a script by %run, the process goes on."""

    def main():
        if preparing:
            rows = [SimpleNamespace()]
            source = SimpleNamespace(
                threads=1, groups=lambda rows: [rows], read=lambda group: time.sleep(60)
            )
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            script.add_clips(None, source, rows)
        raise KeyboardInterrupt

    def notebook():
        with pytest.raises(SystemExit, match="130"):
            final.run_script(main)
        os._exit(7)

    began = time.monotonic()
    assert fork(notebook)[0] == (130 if preparing else 7) and time.monotonic() - began < 10


def test_a_device_or_an_encoder_that_is_missing_is_told_before_the_poses_are_prepared(
    tiny, monkeypatch
):
    for module in (script, final):
        monkeypatch.setattr(module, "load_clips", None)
    change(BERT_NAME="./nothing", CANDIDATES=["bert"])
    for main, arguments in ((script.main, []), (final.main, ["--model", "bert"])):
        with pytest.raises(SystemExit, match="^error: BERT_NAME './nothing' is no hub id"):
            main(arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="^error: torchrun started more processes than 1 GPU"):
        train()


def test_a_test_split_is_reported_once_and_neither_trained_on_nor_chosen_by(
    tiny, monkeypatch, capsys
):
    load, evaluated = final.load_clips, []
    evaluate = final.evaluate

    def load_three(test):
        clips, data = load()
        return {**clips, "test": clips["train"]}, data

    def counted(model, clips, *arguments):
        evaluated.append(len(clips))
        return evaluate(model, clips, *arguments)

    outcomes, outs = [], []
    for load_clips in (load, load_three):
        monkeypatch.setattr(final, "load_clips", load_clips)
        monkeypatch.setattr(final, "evaluate", counted)
        train()
        outcomes.append(outcome())
        outs.append(capsys.readouterr().out)
    assert same(*outcomes) and evaluated == [4] * 5 + [4] * 5 + [16]
    closing = dict(re.findall("^(test_\\w+): ([0-9.]+)$", outs[1], re.M))
    assert [*closing] == ["test_mse", "test_mae", "test_motion", "test_dtw_mje"]
    model, tokenizer, length, _ = final.load_model(BEST)
    clips = load()[0]["train"].with_tokens(tokenizer)
    wanted = evaluate(model, clips, CPU)
    shown = [float(closing[f"test_{name}"]) for name in ("mse", "mae", "motion")]
    assert shown == pytest.approx([wanted[x] for x in ("val_mse", "val_mae", "motion")], abs=1e-5)
    assert "test_" not in outs[0] and "test_" not in outs[1].split("\n\n")[0]
