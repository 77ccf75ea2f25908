"""The training of both scripts: its steps, its checkpoints, runs that are stopped and resumed."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import METRICS, ROOT, change, fork, outcome, shrink_sample, small

import model_selection as script
import train_final_model as final

CPU = torch.device("cpu")
LAST, BEST, LOG = FILES = "last_gru.pt", "best_gru.pt", "gru.log"


def set_up(patch, bert):
    """Both scripts with tiny settings, on 16 and 4 clips of the sample."""
    shrink_sample(patch)
    settings = {"EPOCHS": 4, "MAX_FRAMES": 16, "DATASET": "sample", "BATCH_SIZE": 4, "SEED": 0}
    small(BERT_NAME=bert, **settings)


@pytest.fixture
def tiny(monkeypatch, bert):
    set_up(monkeypatch, bert)


def train(*arguments, model="gru"):
    final.main(["--model", model, *arguments])


def new_run(name="gru", **settings):
    change(**settings)
    clips, _ = script.load_clips()
    return script.Run(name, clips, *script.training_statistics(clips["train"]), CPU)


def epochs_of(run, n):
    steps = len(run.batches())
    schedule = script.new_schedule(run.optimizer, n * steps, done=0)
    for _ in range(n):
        script.run_epoch(run, run.model, schedule)
    return run


def edit_sample(patch, edit, split):
    """Let the sample's rows, a list of dicts, be edited as they are made; split: 1 train, 2 not."""
    make = final.sample_rows

    def edited_rows(n, seed):
        rows = list(make(n, seed))
        return final.datasets.Dataset.from_list(edit(rows) if split == seed else rows)

    for module in (script, final):
        patch.setattr(module, "sample_rows", edited_rows)


@pytest.mark.parametrize("name", ["gru", "transformer"])
def test_three_epochs_of_the_sample_reach_a_seventh_of_the_mean_poses_error(name):
    """.11 to .14 by 3 seeds; .15 to .17 without the place within a sign, .3 if all are alike."""
    rates = {"LR_GRU": 0.02, "LR_TRANSFORMER": 0.008}
    small(DATASET="sample", MAX_FRAMES=24, EMBED_DIM=64, HIDDEN_DIM=64, **rates)
    line = epochs_of(new_run(name), 3).log[-1]
    assert line["val_mse"] < 0.145 * line["mean_pose_mse"]


def test_mixed_precision_learns_alike(tiny, monkeypatch):
    """On the CPU, too. test_models.py has what stays in float32."""
    settings = {"DROPOUT": 0.0, "WORD_DROPOUT": 0.0, "LR_GRU": 5e-3}
    error = epochs_of(new_run(**settings), 2).log[-1]["train_mse"]
    monkeypatch.setattr(script, "mixed_precision", lambda _: torch.autocast("cpu", torch.bfloat16))
    mixed = epochs_of(new_run(**settings), 2).log[-1]["train_mse"]
    assert mixed != error and mixed == pytest.approx(error, rel=0.1)


def test_mixed_precision_is_bfloat16_on_gpus_that_have_it(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *x, enabled: asked.append((*x, bool(enabled))))
    for device, supported, wanted in itertools.product(("cuda", "cpu"), (0, 1), (0, 1)):
        has = lambda including_emulation, supported=supported: supported  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", has)
        change(MIXED_PRECISION=wanted)
        script.mixed_precision(torch.device(device))
        enabled = (device, supported, wanted) == ("cuda", 1, 1)
        assert asked.pop() == (device, torch.bfloat16, enabled)


@pytest.mark.parametrize("limit, average", [(0, 0), (1e-9, 0.5), (1e9, 0.5)])
def test_gradients_are_clipped_and_what_is_evaluated_is_the_average_of_the_weights(
    limit, average, tiny
):
    """GRAD_CLIP 0 is no limit, AVERAGE 0 no average; it is over the steps."""
    run = new_run(GRAD_CLIP=limit, AVERAGE=average)
    expected = [value.clone() for value in run.model.parameters()]
    norms = []

    def follow(*_):
        memory = min(average, (1 + len(norms)) / (4 + len(norms)))
        for value, weight in zip(expected, run.model.parameters(), strict=True):
            value.mul_(memory).add_(weight.detach(), alpha=1 - memory)
        gradients = [value.grad for value in run.model.parameters() if value.grad is not None]
        norms.append(torch.cat([value.ravel() for value in gradients]).norm().item())

    run.optimizer.register_step_post_hook(follow)
    epochs_of(run, 2)
    assert len(norms) == 2 * len(run.batches())
    assert max(norms) <= 1.001e-9 if limit == 1e-9 else min(norms) > 0.01
    torch.testing.assert_close([*run.average.parameters()], expected, rtol=1e-5, atol=1e-6)
    equal = map(torch.equal, run.average.parameters(), run.model.parameters())
    assert {*equal} == {average == 0}


@pytest.mark.parametrize("steps, warmup", [(20, 0.05), (40, 0.1), (7, 0.3), (1, 0.05)])
def test_the_rate_rises_and_falls_to_0(steps, warmup):
    change(WARMUP=warmup)
    weight, rates = torch.nn.Parameter(torch.zeros(1)), []
    groups = [{"params": [weight], "lr": 1e-3, "initial_lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups)
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
    again = script.new_schedule(torch.optim.AdamW(groups), steps, steps // 2)
    assert again.get_last_lr()[0] == pytest.approx(rates[steps // 2])  # goes on in the middle


@pytest.mark.parametrize("name", script.MODELS)
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


def test_the_order_is_by_seed_and_epoch_and_processes_share_each_batch(tiny):
    run = new_run(BATCH_SIZE=6)
    torch.rand(7)
    whole = [batch.tolist() for batch in run.batches()]
    assert whole == [batch.tolist() for batch in new_run().batches()]
    assert sorted(sum(whole, [])) == list(range(16))
    for world in (2, 3):
        run.world, shares = world, []
        for rank in range(world):
            run.rank = rank
            shares.append([batch.tolist() for batch in run.batches()])
        assert len({tuple(map(len, share)) for share in shares}) == 1
        together = [set(sum(parts, [])) for parts in zip(*shares, strict=True)]
        assert together[:-1] == [*map(set, whole[:-1])] and together[-1] <= set(whole[-1])
        assert sum(map(len, together)) == 16 // world * world
    run.rank, run.world = 0, 1
    run.log.append({})
    assert whole != [batch.tolist() for batch in run.batches()]
    assert whole != [batch.tolist() for batch in new_run(SEED=1).batches()]


@pytest.mark.parametrize("module", [script, final])
@pytest.mark.parametrize(
    "errors, stopped, best",
    [([3, 2, 4, 5, 1, 1], 4, 2), ([3, 2, 2.5, 1, 2, 2], 6, 4), ([0.4, 0.4, 0.4, 0.1], 3, 1)],
)
def test_early_stopping_keeps_the_best_epoch_and_says_why(
    module, errors, stopped, best, tiny, monkeypatch, capsys, tmp_path
):
    """And whether it beats the mean pose, whose MSE is 0.5 here."""

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
    reason = "no lower val_mse for 2 epochs" if stopped < 6 else "all EPOCHS are done"
    assert out.count(f"\nstopped: {reason}\n") == out.count("stopped") == 1
    error = errors[best - 1]
    shown = f"GRU: {error:.4f}", f"best_epoch: {best}\nval_mse: {error:.5f}"
    assert shown[module is final] in out
    warned = re.search("warning: .* clearly beats? the mean pose", out) is not None
    assert warned == (error > 0.5)
    (path,) = [*tmp_path.glob("best_*.pt"), *tmp_path.glob("selection_*.pt")]
    assert torch.load(path, weights_only=True)["weights"]["mean"].eq(best).all()
    assert not [*tmp_path.glob("*.tmp")]


def test_a_loss_that_is_not_finite_is_one_line_and_keeps_the_best(tiny, monkeypatch):
    one_epoch = final.train_one_epoch
    monkeypatch.setattr(
        final, "train_one_epoch", lambda run, *x: math.nan if run.log else one_epoch(run, *x)
    )
    line = "^error: the loss of GRU epoch 2/4 is not finite: lower the learning rate$"
    with pytest.raises(SystemExit, match=line):
        train()
    assert torch.load(BEST, weights_only=True)["metrics"]["epoch"] == 1


def test_words_that_a_tokenizer_drops_does_not_know_or_reads_as_others_are_told(
    tiny, bert, tmp_path, capsys, monkeypatch
):
    """A word without its marks is another word."""
    bare = shutil.copytree(bert, tmp_path / "bert")  # it adds no [CLS] and [SEP]
    contents = json.loads((bare / "tokenizer.json").read_text())
    (bare / "tokenizer.json").write_text(json.dumps({**contents, "post_processor": None}))
    for name, folder, text, unknown, alike in (
        ("bert", bert, "Hello hello HELLO", 0, 0),
        ("bert", bert, "school zebra", 50, 0),
        ("bert", bert, "wänt want", 0, 2),
        ("bert", bert, "\ufffd", 100, 0),
        ("bert", bare, "\ufffd", 100, 0),
        ("bert", bare, "\ufffd hello \ufffd", 66.7, 0),
        ("gru", bert, "house tree", 0, 0),
    ):
        with monkeypatch.context() as patch:
            edit_sample(patch, lambda rows, text=text: [{**x, "gloss": text} for x in rows], 1)
            run = new_run(name, BERT_NAME=folder)
        said = f"{unknown:.1f} % unknown in train, {alike} share their pieces with another"
        bad = unknown > 50 or alike > 0
        out = capsys.readouterr().out
        assert f"\n{'warning: words' if bad else '  words':<18} {said}" in out
        assert name == "bert" or "warning: words     100.0 % unknown in validation" in out
        tokenizer = final.load_tokenizer(**run.built["tokenizer"])
        (answer,) = final.generate(run.average.eval(), tokenizer, [text], 16)
        assert bool(answer.unknown) == (unknown > 0)


def test_a_checkpoint_is_complete_by_itself_in_a_fresh_process(tiny, bert, tmp_path):
    change(BERT_NAME=shutil.copytree(bert, tmp_path / "bert"), EPOCHS=1)
    for name in script.MODELS:
        train(model=name)
        train("--predict", "hello", "I want go school", model=name)
    shutil.rmtree(tmp_path / "bert")
    there = "predict = lambda name: f.main(['--model', name, '--predict', *sys.argv[1:]])"
    code = f"import sys, train_final_model as f; {there}; [*map(predict, f.MODELS)]"
    command = [sys.executable, "-c", code, "hello", "I want go school"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    files = [sorted(path.glob("*.pose")) for path in sorted(tmp_path.glob("predictions*"))]
    signed = [[path.read_bytes() for path in some] for some in files]
    assert len(signed) == 6 and signed[:3] == signed[3:] and len({*map(len, signed[0])}) == 2


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
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit, match="^error: folder cannot be written: Is a directory$"):
        script.save("folder", b"")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, bert):
    """The folder of a run that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        set_up(patch, bert)
        train()
        return Path.cwd()


@pytest.fixture
def finished(tiny, run_folder, tmp_path):
    """That run's files in this folder -> its outcome."""
    shutil.copytree(run_folder, tmp_path, dirs_exist_ok=True)
    return outcome()


same = partial(torch.testing.assert_close, rtol=0, atol=0)


def contents():
    return [Path(name).read_bytes() for name in FILES]


class Code:
    def __reduce__(self):
        return open, ("executed", "w")


def test_a_file_that_is_no_checkpoint_is_one_line_and_runs_no_code(finished, run_folder):
    for path, arguments in ((BEST, ["--predict", "go"]), (LAST, ["--resume"])):
        whole = Path(path).read_bytes()
        torch.save({**torch.load(path, weights_only=True), "note": Code()}, path)
        for spoiled in (Path(path).read_bytes(), b"no checkpoint", whole[:-2000]):
            Path(path).write_bytes(spoiled)
            before = contents()
            line = rf"^error: {path} is damaged or no checkpoint \(\w+: .*\)$"
            with pytest.raises(SystemExit, match=line) as error:
                train(*arguments)
            assert "\n" not in str(error.value) and not Path("executed").exists()
            assert contents() == before


def test_killed_after_any_file_a_resumed_run_ends_as_an_unbroken_one(tiny, tmp_path, monkeypatch):
    change(EPOCHS=2)
    save = final.save
    train()
    expected = outcome()
    for files in range(1, 2 * 3 + 1):  # last, log and best of two epochs, where each is the best
        saves = itertools.count(1)

        def save_and_die(path, contents, saves=saves, files=files):
            save(path, contents)
            if next(saves) == files:
                os.kill(os.getpid(), signal.SIGKILL)

        for path in FILES:
            Path(path).unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(final, "save", save_and_die)
            assert fork(train)[0] == -signal.SIGKILL
        left = {path: path.read_bytes() for path in map(Path, FILES) if path.exists()}
        train("--resume")
        same(outcome(), expected)
        if files % 3 == 1:  # with other settings no later epoch need be the best one
            Path(BEST).unlink()
            for path, data in left.items():
                path.write_bytes(data)
            change(BATCH_SIZE=2, LR_GRU=0.5)
            train("--resume")
            best, last = (torch.load(path, weights_only=True) for path in (BEST, LAST))
            assert best["metrics"] == final.best_of(last["log"]) and len(last["log"]) == 2
            train("--resume")
            change(BATCH_SIZE=4, LR_GRU=1e-3)


@pytest.mark.parametrize(
    "number, last_step", [(signal.SIGINT, 2), (signal.SIGINT, 10), (signal.SIGTERM, 10)]
)
def test_a_signal_ends_the_run_with_one_line_and_nothing_is_lost(
    number, last_step, finished, monkeypatch
):
    training_loss, steps = final.training_loss, itertools.count(1)

    def stop(*arguments):
        if next(steps) == last_step:
            os.kill(os.getpid(), number)
        return training_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(final, "training_loss", stop)
        code, _, err = fork(train)
    said = "the same command with --resume goes on"
    if last_step == 2:  # in the first epoch, so that the files of the run before stay
        said = "the same command starts again, with the clips that were prepared"
    assert (code, err) == (130, f"\nstopped: {said}\n") and not [*Path().glob("*.tmp")]
    assert len(torch.load(LAST, weights_only=True)["log"]) == (2 if last_step == 10 else 4)
    for _ in range(2):  # the second time there is nothing left to do
        train("--resume")
        same(outcome(), finished)


def test_the_digest_of_the_data_changes_with_all_that_a_run_learns_from():
    base = {"glosses": ["a", "b"], "seconds": torch.tensor([1.0, 2]), "crcs": [5, 6]}
    edits = [{}, {"glosses": ["b", "a"]}, {"seconds": torch.tensor([1.0, 3])}, {"crcs": [5, 7]}]
    edits.append({name: value[:1] for name, value in base.items()})
    edits.append({name: [*value][::-1] for name, value in base.items() if name != "seconds"})
    whole = SimpleNamespace(**base)
    digests = {final.data_digest({"train": whole})}
    for edit in edits:
        edited = SimpleNamespace(**{**base, **edit})
        digests.add(final.data_digest({"train": edited, "validation": whole}))
        digests.add(final.data_digest({"train": whole, "validation": edited}))
    assert len(digests) == 2 * len(edits)


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
    "settings, said",
    [({}, "the data has changed"), ({"HIDDEN_DIM": 8}, "hidden_dim was 16, is 8")]
    + [({"MAX_FRAMES": 8}, "max_frames was 16, is 8"), ({"FPS": 20}, "fps was 25, is 20")]
    + [({"DROPOUT": 0.5}, "dropout was 0.1, is 0.5")]
    + [({"MIN_GLOSS_COUNT": 9}, r"backend differs; vocabulary was \d+, is \d+")],
)
def test_other_data_and_what_shapes_the_model_or_the_clips_is_not_resumed(
    settings, said, finished, monkeypatch, capsys
):
    before = contents()
    change(**settings)
    if not settings:
        edit_sample(monkeypatch, lambda rows: [{**row, "gloss": "GO"} for row in rows], 2)
    with pytest.raises(SystemExit, match=f"^error: last_gru.pt does not fit: {said}$"):
        train("--resume")
    assert contents() == before
    for setting in settings:
        other = f"resumed with other settings, so not bit by bit: {setting} was "
        assert capsys.readouterr().out.startswith(other)


def test_other_settings_may_change_and_are_said(finished, capsys):
    changes = {"EPOCHS": 6, "BATCH_SIZE": 2, "LR_GRU": 0.5, "GRAD_CLIP": 0.5, "PATIENCE": 3}
    change(**changes)
    last = torch.load(LAST, weights_only=True)
    del last["settings"]["AVERAGE"]  # as an older version of the script may have left it
    last["log"][-1]["val_mse"] = 9.0  # so that the best epoch is an earlier one
    for line in last["log"]:
        line["seen_error"] = math.nan  # a metric that cannot be told
    best = torch.load(BEST, weights_only=True) | {"metrics": final.best_of(last["log"])}
    torch.save(last, LAST)
    torch.save(best, BEST)
    train("--resume")
    out = capsys.readouterr().out
    assert "\nGRU epoch 5/6 " in out and "\nGRU epoch 4/6 " not in out
    (line,) = [line for line in out.splitlines() if line.startswith("resumed with other settings")]
    assert "so not bit by bit" in line and "BATCH_SIZE was 4, is 2" in line
    assert all(setting in line for setting in changes)


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
    line = "^error: last_bert.pt does not fit: backend differs$"
    with pytest.raises(SystemExit, match=line):
        train("--resume", model="bert")


def test_a_second_run_of_a_model_in_a_folder_is_refused(tiny):
    lock = final.claim_folder("gru")
    said = "error: another run of gru is at work in this folder\n"
    assert fork(train) == (1, "", said)
    lock.close()
    fork(partial(final.claim_folder, "gru"))
    final.claim_folder("gru").close()  # a lock ends with its process


def test_a_disk_without_room_is_one_line_and_nothing_is_lost(finished):
    final.load_clips()  # there is room for these
    code, _, err = fork(train, limit=10_000)  # bytes, less than best_gru.pt
    assert (code, err) == (1, "error: last_gru.pt cannot be written: File too large\n")
    same(outcome(), finished)
    assert not [*Path().glob("*.tmp")]


def test_what_a_user_meets_is_one_line(tiny):
    """There is no GPU here, so that the peak of its memory is 0."""

    def fail(error):
        print("before")
        raise error

    full = "error: GPU full at 0 MB; lower BATCH_SIZE = 4\n"
    no_room = OSError(28, "No space left on device")
    for error, status, said in (
        (torch.OutOfMemoryError("CUDA out of memory"), 1, full),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublas...`"), 1, full),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), 1, full),
        (no_room, 1, "error: [Errno 28] No space left on device\n"),
        (SystemExit("error: x"), 1, "error: x\n"),
        (SystemExit(2), 2, ""),
        (SystemExit(), 0, ""),
    ):
        assert fork(partial(fail, error)) == (status, "before\n", said)
    for bug in (ValueError("a bug"), RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")):
        code, _, err = fork(partial(fail, bug))
        assert code == 99 and err.endswith(f"{type(bug).__name__}: {bug}\n")


def test_a_notebook_that_runs_a_script_by_run_goes_on():  # but see test_store.py
    def notebook():
        with pytest.raises(SystemExit, match="130"):
            final.run_script(lambda: signal.raise_signal(signal.SIGINT))
        os._exit(7)

    assert fork(notebook)[0] == 7


def test_processes_without_a_gpu_are_told_before_the_poses_are_prepared(tiny, monkeypatch):
    monkeypatch.setattr(final, "load_clips", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(
        SystemExit, match="^error: torchrun started more processes than there are GPUs"
    ):
        train()


def test_a_test_split_is_reported_once_and_neither_trained_on_nor_chosen_by(
    tiny, finished, monkeypatch, capsys
):
    load, evaluate, evaluated = final.load_clips, final.evaluate, []

    def load_three(test):
        clips, data = load()
        return {**clips, "test": clips["train"]}, data

    def counted(model, clips, *arguments):
        evaluated.append(len(clips))
        return evaluate(model, clips, *arguments)

    monkeypatch.setattr(final, "load_clips", load_three)
    monkeypatch.setattr(final, "evaluate", counted)
    train()
    same(outcome(), finished)
    assert evaluated == [4] * 5 + [16]
    epochs, block = capsys.readouterr().out.split("\n\n")
    closing = dict(re.findall("^(test_\\w+): ([0-9.]+)$", block, re.M))
    assert [*closing] == ["test_mse", "test_mae", "test_motion", "test_dtw_mje"]
    model, tokenizer, length, _ = final.load_model(BEST)
    clips = load()[0]["train"].with_tokens(tokenizer)
    answers = final.generate(model, tokenizer, clips.glosses, length, clips.n_frames)
    wanted = evaluate(model, clips, CPU) | final.hand_metrics(answers, clips)
    shown = [float(closing[f"test_{name}"]) for name in ("mse", "mae", "motion")]
    assert shown == pytest.approx([wanted[x] for x in ("val_mse", "val_mae", "motion")], abs=1e-5)
    assert "test_" not in epochs
