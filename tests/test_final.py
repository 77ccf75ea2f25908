"""What only the final script does: the closing metrics, a training that survives, hostile files."""

import contextlib
import csv
import faulthandler
import math
import multiprocessing.resource_sharer
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import ROOT, edited, pose_bytes, positions, small, write_isign, write_parts, zipped
from tqdm import tqdm

import model_selection as script
import train_final_model as final

SETTINGS = {
    "EMBED_DIM": 16,
    "HIDDEN_DIM": 16,
    "EPOCHS": 4,
    "TRAIN_CLIPS": 0,
    "VALIDATION_CLIPS": 0,
    "MAX_FRAMES": 16,
    "PROCESSES": 0,
    "DATASET": "sample",
    "BATCH_SIZE": 4,
}
LAST, BEST, LOG = "last_gru.pt", "best_gru.pt", "log_gru.csv"


@pytest.fixture
def tiny(monkeypatch):
    """The final script with tiny settings, on a tiny sample."""
    sample_rows = final.sample_rows
    monkeypatch.setattr(final, "sample_rows", lambda n, seed: sample_rows(n // 20, seed))
    for setting, value in SETTINGS.items():
        monkeypatch.setattr(final, setting, value)


def fork(*arguments, kill_after=None, limit=None):
    """Run `main` in a process of its own -> (status, or the signal below 0; stdout; stderr).

    kill_after: seconds until `kill -9`; limit: the largest file that it may write, in bytes.
    """
    child = os.fork()
    if child == 0:
        code = 1
        for bars in (tqdm, datasets.utils.tqdm):  # theirs is shared: who is killed would keep it
            bars.set_lock(threading.RLock())
        with open("out.txt", "w") as out, open("err.txt", "w") as err:
            faulthandler.dump_traceback_later(120, exit=True, file=err)  # where it hangs
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = out, err
            try:
                if limit:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                final.main(["--model", "gru", *arguments])
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else print(stop.code, file=err) or 1
            except BaseException as error:
                print("Traceback", repr(error), file=err)
            finally:
                out.flush()
                err.flush()
                os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), open("out.txt").read(), open("err.txt").read()


def outcome():
    """The log without the times, and the weights of both checkpoints."""
    assert Path(LOG).read_bytes().endswith(b"\n")
    with open(LOG, newline="") as file:
        log = [
            {key: value for key, value in line.items() if key != "seconds"}
            for line in csv.DictReader(file)
        ]
    best, last = (torch.load(path, weights_only=True) for path in (BEST, LAST))
    return log, best["weights"], last["weights"], last["average"], last["optimizer"]["state"]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- the closing metrics


def alignments(costs, i, j):
    """The costs along every way to align the first i + 1 frames with the first j + 1."""
    if i == j == 0:
        yield [costs[0, 0]]
    for k, m in ((i - 1, j - 1), (i - 1, j), (i, j - 1)):
        if k >= 0 and m >= 0:
            yield from ([*way, costs[i, j]] for way in alignments(costs, k, m))


@pytest.mark.parametrize("n, m", [(1, 1), (1, 5), (5, 1), (4, 4), (5, 3), (6, 6)])
def test_the_aligned_error_is_that_of_the_best_way_to_align(n, m):
    rng = np.random.default_rng(n + 10 * m)
    made, real = rng.normal(size=(n, 3, 2)), rng.normal(size=(m, 3, 2))
    real[rng.random((m, 3)) < 0.3] = np.nan
    real[:, 0] = rng.normal(size=(m, 2))  # in each frame a point is seen
    costs = np.nanmean(np.linalg.norm(made[:, None] - real[None], axis=-1), -1)
    expected = np.mean(min(alignments(costs, n - 1, m - 1), key=sum))
    assert final.aligned_error(made, real) == pytest.approx(expected, rel=1e-5)


def test_the_aligned_error_of_known_answers():
    rng = np.random.default_rng(1)
    real = rng.normal(size=(30, 2, 2)).cumsum(0).astype(np.float32)
    assert final.aligned_error(real, real) == pytest.approx(0, abs=1e-6)
    slow = real.repeat(2, 0)
    assert final.aligned_error(slow, real) == pytest.approx(0, abs=1e-6)
    assert 0.1 < final.aligned_error(real + np.array([3, 4]), real) <= 5.001
    gaps = np.concatenate([real[:10], np.full((5, 2, 2), np.nan), real[10:]])
    assert final.aligned_error(real + 1, gaps) == pytest.approx(final.aligned_error(real + 1, real))


def test_the_aligned_error_of_long_clips_needs_no_table_of_all_pairs():
    made, real = np.zeros((300, 8, 2), np.float32), np.ones((900, 8, 2), np.float32)
    tracemalloc.start()
    error = final.aligned_error(made, real)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert abs(error - 2**0.5) < 1e-5 and peak < 2**20  # all pairs take 16 MiB


def test_a_point_that_no_training_clip_shows_costs_nothing_in_the_aligned_error(tiny, monkeypatch):
    sample_rows = final.sample_rows

    def one_handed(n, seed):
        def hide(row):
            pose = np.array(row["pose"])
            pose[:, :42] = np.nan
            return {"pose": pose.tolist()}

        return sample_rows(n, seed).map(hide)

    monkeypatch.setattr(final, "sample_rows", one_handed)
    code, out, err = fork()
    assert code == 0, err
    assert 0 < float(re.search("val_dtw_mje: (.*)", out)[1]) < 2


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_a_model_that_does_not_beat_the_mean_pose_is_named(rate, tiny, monkeypatch):
    monkeypatch.setattr(final, "LR_GRU", rate)
    code, out, err = fork()
    closing = dict(
        line.split(": ") for line in out.rpartition("\n\n")[2].splitlines() if "warning" not in line
    )
    learned = float(closing["val_mse"]) < float(closing["mean_pose_mse"])
    assert learned == (rate > 0)
    assert out.splitlines()[-1].startswith("warning: the model does not beat") == (not learned)


# ---- a run that is stopped goes on as if it had not been


def test_killed_at_any_moment_a_resumed_run_ends_as_an_unbroken_one(tiny, tmp_path, monkeypatch):
    (tmp_path / "unbroken").mkdir()
    monkeypatch.chdir(tmp_path / "unbroken")
    began = time.monotonic()
    code, out, err = fork()
    took, expected = time.monotonic() - began, outcome()
    assert code == 0 and len(expected[0]) == 4, err

    monkeypatch.chdir(tmp_path)
    rng, kills, rounds = random.Random(5), 0, 0
    while kills < 20 or rounds < 3:
        for path in (BEST, LAST, LOG):
            (tmp_path / path).unlink(missing_ok=True)
        code = None
        while code != 0:
            resumable = (tmp_path / LAST).exists()
            patience = rng.uniform(0.1, 0.9) * took if kills < 24 else None
            code, out, err = fork(*["--resume"] * resumable, kill_after=patience)
            assert code in (0, -signal.SIGKILL), err
            kills += code != 0
            for path in (BEST, LAST):
                if (tmp_path / path).exists():
                    torch.load(path, weights_only=True)
            assert "Traceback" not in err
        assert same(outcome(), expected)
        rounds += 1
    assert kills >= 20


def test_killed_behind_any_file_a_resumed_run_ends_as_an_unbroken_one(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(final, "EPOCHS", 2)
    save = final.save
    assert fork()[0] == 0
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
            assert fork()[0] == -signal.SIGKILL
        code, out, err = fork(*["--resume"] * Path(LAST).exists())
        assert code == 0 and same(outcome(), expected), f"killed behind {files} files"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_one_line_and_nothing_is_lost(
    number, tiny, tmp_path, monkeypatch
):
    code, out, err = fork()
    expected = outcome()
    (tmp_path / "stopped").mkdir()
    monkeypatch.chdir(tmp_path / "stopped")
    source = edited((ROOT / "train_final_model.py").read_text("utf8"), **SETTINGS)
    for old, new in (
        ("sample_rows(320, 1)", "sample_rows(16, 1)"),
        ("sample_rows(80, 2)", "sample_rows(4, 2)"),
    ):
        source = source.replace(old, new)
    line = "        run.optimizer.zero_grad(set_to_none=True)\n"
    assert line in source
    kill = f"        if (epoch, step) == (3, 2):\n            os.kill(os.getpid(), {int(number)})\n"
    Path("train_final_model.py").write_text(source.replace(line, kill + line))
    done = subprocess.run(
        [sys.executable, "train_final_model.py", "--model", "gru"], capture_output=True, text=True
    )
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.endswith(
        "\nstopped; epochs 1 to 2 are kept, and this goes on with them:\n"
        "python train_final_model.py --model gru --resume\n"
    )
    assert len(torch.load(LAST, weights_only=True)["log"]) == 2 and not [*Path().glob("*.tmp")]
    assert fork("--resume")[0] == 0 and same(outcome(), expected)
    code, out, err = fork("--resume")  # there is nothing left to do
    assert code == 0 and " epoch " not in out.split("best_epoch")[0] and same(outcome(), expected)


def test_a_new_run_that_is_stopped_in_its_first_epoch_leaves_the_old_one(
    tiny, tmp_path, monkeypatch
):
    assert fork()[0] == 0
    before, expected = (
        {path: (tmp_path / path).read_bytes() for path in (BEST, LAST, LOG)},
        outcome(),
    )
    with monkeypatch.context() as patch:

        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr(final, "train_one_epoch", stop)
        code, out, err = fork()
    assert code == 130 and out.endswith("first epoch was over: there is nothing to resume\n")
    assert {path: (tmp_path / path).read_bytes() for path in before} == before
    assert fork("--resume")[0] == 0 and same(outcome(), expected)
    assert fork()[0] == 0 and same(outcome(), expected) and not [*tmp_path.glob("*.tmp")]


def test_a_run_that_is_stopped_while_it_saves_says_what_is_kept(tiny, monkeypatch):
    assert fork()[0] == 0
    expected, save_epoch = outcome(), final.save_epoch
    with monkeypatch.context() as patch:

        def stop(run, data, digest):
            if len(run.log) == 3:
                raise KeyboardInterrupt
            save_epoch(run, data, digest)

        patch.setattr(final, "save_epoch", stop)
        code, out, err = fork()
    assert code == 130 and "\nstopped; epochs 1 to 2 are kept, and this goes on with them:\n" in out
    assert len(torch.load(LAST, weights_only=True)["log"]) == 2
    assert fork("--resume")[0] == 0 and same(outcome(), expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_while_clips_are_prepared_is_one_line(number, tmp_path):
    """As a terminal's Ctrl-C and `timeout` send it. No traceback, and no process that is left."""
    clips = {f"{i:012x}-1": pose_bytes(positions(60)) for i in range(200)}
    folder = write_isign(tmp_path / "isign", [(uid, "go") for uid in clips], clips)
    settings = {**SETTINGS, "PROCESSES": 2, "DATASET": folder}
    source = edited((ROOT / "train_final_model.py").read_text("utf8"), **settings)
    slow = '    if "pose" in row:\n'
    assert source.count(slow) == 1
    Path("train_final_model.py").write_text(source.replace(slow, "    time.sleep(0.2)\n" + slow))
    with open("out.txt", "w") as out, open("err.txt", "w") as err:
        command = [sys.executable, "train_final_model.py", "--model", "gru"]
        run = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
    end = time.time() + 120
    while len(children_of(run.pid)) < 3:  # two that prepare, and one that hands on their results
        assert run.poll() is None and time.time() < end, Path("err.txt").read_text()
        time.sleep(0.01)
    time.sleep(1)
    children = children_of(run.pid)
    os.killpg(run.pid, number)
    assert run.wait(60) == 130
    assert Path("err.txt").read_text() == "\nstopped; what was prepared and saved stays\n"
    time.sleep(1)
    assert not [child for child in children if is_running(child)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_while_a_model_is_trained_is_one_line(number, tmp_path):
    settings = {**SETTINGS, "PROCESSES": 2, "EPOCHS": 1000, "PATIENCE": 1000}
    source = edited((ROOT / "train_final_model.py").read_text("utf8"), **settings)
    source = source.replace("sample_rows(320, 1)", "sample_rows(16, 1)")
    Path("train_final_model.py").write_text(
        source.replace("sample_rows(80, 2)", "sample_rows(4, 2)")
    )
    with open("out.txt", "w") as out, open("err.txt", "w") as err:
        command = [sys.executable, "train_final_model.py", "--model", "gru"]
        run = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
    end = time.time() + 120
    while not Path(LAST).exists():
        assert run.poll() is None and time.time() < end, Path("err.txt").read_text()
        time.sleep(0.01)
    children = children_of(run.pid)
    os.killpg(run.pid, number)
    assert run.wait(60) == 130 and Path("err.txt").read_text() == ""
    assert Path("out.txt").read_text().endswith("--model gru --resume\n")
    time.sleep(1)
    assert len(children) >= 2 and not [child for child in children if is_running(child)]


def test_a_forked_process_is_silent_about_a_lost_connection_and_about_nothing_else():
    """As a loader's process that hands its batches on, where a Ctrl-C ends the script first."""
    child = os.fork()
    if child == 0:
        with open("err.txt", "w") as err:
            sys.stderr, sys.excepthook = err, sys.__excepthook__
            final.after_fork()
            shared = multiprocessing.resource_sharer.DupFd(1)
            with socket.socket(socket.AF_UNIX) as script:
                script.connect(shared._id[0])
            time.sleep(0.5)
            sys.excepthook(ValueError, ValueError("a bug"), None)
            err.flush()
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert Path("err.txt").read_text() == "ValueError: a bug\n"


def test_a_ctrl_c_at_the_moment_in_which_a_process_ends_is_one_line():
    main = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import train_final_model

def main():
    signal.signal(signal.SIGCHLD, lambda *_: None)  # torch has one as well
    both = [signal.SIGINT, signal.SIGCHLD]
    signal.pthread_sigmask(signal.SIG_BLOCK, both)
    for number in both:
        os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
    time.sleep(60)

train_final_model.run_script(main)
"""
    done = subprocess.run([sys.executable, "-c", main, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "\nstopped; what was prepared and saved stays\n"


def test_a_process_that_is_ended_right_before_it_waits_for_a_lock_ends():
    """Python looks for signals between its own instructions: one that another thread is given,
    while the first one waits, is seen as late as one that comes right before the wait."""
    main = """
import multiprocessing, os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
import train_final_model

def end():
    time.sleep(0.5)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

def wait():
    threading.Thread(target=end).start()
    lock.acquire()

def main():
    process = multiprocessing.get_context("fork").Process(target=wait)
    process.start()
    process.join(30)
    print(process.exitcode, flush=True)
    os._exit(0)

lock = multiprocessing.get_context("fork").Lock()
lock.acquire()
train_final_model.run_script(main)
"""
    done = subprocess.run([sys.executable, "-c", main, str(ROOT)], capture_output=True, text=True)
    assert done.stdout == f"{-signal.SIGALRM}\n" and done.stderr == ""


@pytest.mark.parametrize("first", ["tqdm.tqdm", "datasets.utils.tqdm"])
def test_a_process_that_is_killed_keeps_no_lock_of_the_others(first):
    """Every batch that datasets formats takes the lock of its bars for a moment."""
    main = f"""
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import datasets, tqdm
import train_final_model

def main():
    signal.alarm(20)
    list({first}([]))
    for bars in (tqdm.tqdm, datasets.utils.tqdm):
        child = os.fork()
        if child == 0:
            bars.get_lock().acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        print(list(bars([1], file=sys.stdout, bar_format="bar")))
    os._exit(sys.stdout.flush() or 0)

train_final_model.run_script(main)
"""
    done = subprocess.run([sys.executable, "-c", main, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("[1]") == 2, done.stderr


def is_running(pid):
    """And is no zombie, which has no command line."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    return False


def children_of(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in found.split()]


def test_a_script_that_is_killed_while_clips_are_prepared_leaves_no_process(tmp_path):
    clips = {f"{i:012x}-1": pose_bytes(positions(60)) for i in range(40)}
    folder = write_isign(tmp_path / "isign", [(uid, "go") for uid in clips], clips)
    settings = {**SETTINGS, "PROCESSES": 2, "DATASET": folder}
    source = edited((ROOT / "train_final_model.py").read_text("utf8"), **settings)
    slow = '    if "pose" in row:\n'
    Path("train_final_model.py").write_text(source.replace(slow, "    time.sleep(0.2)\n" + slow))
    with open("err.txt", "w") as err:
        command = [sys.executable, "train_final_model.py", "--model", "gru"]
        run = subprocess.Popen(command, stdout=err, stderr=err, start_new_session=True)
    end = time.time() + 120
    while len(children_of(run.pid)) < 3:
        assert run.poll() is None and time.time() < end, Path("err.txt").read_text()
        time.sleep(0.01)
    children = children_of(run.pid)
    run.kill()
    run.wait()
    time.sleep(1)
    assert not [child for child in children if is_running(child)]


def edit_rows(monkeypatch, edit, split=None):
    """Let the sample's rows, a list of dicts, be edited as they are made; split: 1 train, 2 not."""
    sample_rows = final.sample_rows

    def edited_rows(n, seed):
        rows = list(sample_rows(n, seed))
        return final.datasets.Dataset.from_list(edit(rows) if split in (None, seed) else rows)

    monkeypatch.setattr(final, "sample_rows", edited_rows)


def rotated(rows):
    """The glosses against their poses."""
    glosses = [row["gloss"] for row in rows]
    turned = zip(rows, glosses[1:] + glosses[:1], strict=True)
    return [{**row, "gloss": gloss} for row, gloss in turned]


def doubled(rows):
    return [{**row, "pose": (2 * np.array(row["pose"])).tolist()} for row in rows]


@pytest.mark.parametrize(
    "edit, split",
    [(rotated, 1), (rotated, 2), (doubled, 1), (doubled, 2)]
    + [(lambda rows: rows[::-1], 2), (lambda rows: rows[:2], 2), (lambda rows: rows * 2, 2)],
)
def test_other_data_is_not_resumed(edit, split, tiny, monkeypatch):
    assert fork()[0] == 0
    before = {path: Path(path).read_bytes() for path in (LAST, BEST, LOG)}
    edit_rows(monkeypatch, edit, split)
    code, out, err = fork("--resume")
    assert (code, err) == (1, "error: last_gru.pt does not fit: the data is another\n")
    assert {path: Path(path).read_bytes() for path in before} == before


def test_settings_that_shape_the_model_or_the_clips_may_not_change(tiny, monkeypatch):
    code, out, err = fork("--resume")
    assert code == 1 and out == ""  # before the data is loaded
    assert err == "error: last_gru.pt does not exist: train first, with --model alone\n"
    assert fork()[0] == 0
    for setting, value in (("HIDDEN_DIM", 8), ("MAX_FRAMES", 8), ("FPS", 20), ("DROPOUT", 0.5)):
        with monkeypatch.context() as patch:
            was = getattr(final, setting)
            patch.setattr(final, setting, value)
            code, out, err = fork("--resume")
        assert code == 1 and out == ""
        line = f"error: last_gru.pt does not fit: {setting} was {was!r}, is {value!r}\n"
        assert err == line


def test_other_settings_may_change_and_are_said(tiny, monkeypatch):
    assert fork()[0] == 0
    last = torch.load(LAST, weights_only=True)
    monkeypatch.setattr(final, "PROCESSES", 2)  # it makes no difference
    code, out, err = fork("--resume")
    assert code == 0 and "resumed with other" not in out
    changes = {"EPOCHS": 6, "BATCH_SIZE": 2, "LR_GRU": 0.5, "GRAD_CLIP": 0.5, "PATIENCE": 3}
    for setting, value in changes.items():
        monkeypatch.setattr(final, setting, value)
    code, out, err = fork("--resume")
    assert code == 0, err
    assert "\nGRU epoch 5/6 " in out and "\nGRU epoch 4/6 " not in out
    line = next(line for line in out.splitlines() if line.startswith("resumed with other settings"))
    assert "so not bit by bit" in line and "BATCH_SIZE was 4, is 2" in line
    assert all(setting in line for setting in changes)
    groups = torch.load(LAST, weights_only=True)["optimizer"]["param_groups"]
    assert groups[0]["initial_lr"] == 0.5
    del last["settings"]["AVERAGE"]  # as an older version of the script may have left it
    torch.save(last, LAST)
    assert fork("--resume")[0] == 0


def moments(last):
    return last["optimizer"]["state"][0]


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda last: last["optimizer"]["state"].clear(), "no state of the optimizer"),
        (lambda last: last.pop("optimizer"), "KeyError: 'optimizer'"),
        (lambda last: last.pop("digest"), "no digest"),
        (
            lambda last: moments(last).update(exp_avg=torch.zeros(3)),
            "an optimizer's state of two shapes",
        ),
        (
            lambda last: moments(last).update(exp_avg=torch.zeros(3), exp_avg_sq=torch.zeros(3)),
            "an optimizer's state of another model",
        ),
        (lambda last: last.update(log=[{"epoch": 2, "val_mse": 1.0}]), "no log of a run"),
        (lambda last: last.update(log=[]), "no log of a run"),
        (lambda last: last.update(log="x"), "string indices"),
        (
            lambda last: last["weights"]["output.bias"].fill_(math.nan),
            "weights that are not finite",
        ),
        (lambda last: last["weights"].pop("output.bias"), "Error\\(s\\) in loading state_dict"),
    ],
)
def test_a_last_checkpoint_that_makes_no_sense_is_one_line(spoil, reason, tiny):
    assert fork()[0] == 0
    last = torch.load(LAST, weights_only=True)
    spoil(last)
    torch.save(last, LAST)
    code, out, err = fork("--resume")
    assert code == 1 and err.count("\n") == 1
    assert re.match(f"error: last_gru.pt is damaged .*{reason}", err), err


def test_a_cut_checkpoint_is_not_resumed(tiny):
    assert fork()[0] == 0
    best = Path(BEST).read_bytes()
    Path(LAST).write_bytes(Path(LAST).read_bytes()[:-1000])
    code, out, err = fork("--resume")
    assert code == 1 and err.startswith("error: last_gru.pt is damaged") and err.count("\n") == 1
    assert out == "" and Path(BEST).read_bytes() == best


def test_a_second_run_of_a_model_in_a_folder_is_refused(tiny):
    lock = "import fcntl, sys, time; f = open('.gru.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    script = f"{lock}; print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    holder.stdout.readline()
    code, out, err = fork()
    assert (code, err) == (1, "error: another run of gru is at work in this folder\n")
    holder.kill()
    holder.wait()
    assert fork()[0] == 0  # a lock ends with its process


def test_two_trainings_and_a_reader_in_one_folder_tear_nothing(tiny, tmp_path):
    code = (
        "import sys, train_final_model as f\n"
        "for i in range(150):\n"
        "    f.save('best_gru.pt', {'x': f.torch.full((9999,), i)})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    final.save(BEST, {"x": torch.zeros(9999)})
    command = [sys.executable, "-c", code]
    writers = [subprocess.Popen(command, cwd=tmp_path, env=environment) for _ in range(2)]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        values = torch.load(BEST, weights_only=True)["x"]
        assert (values == values[0]).all()
        reads += 1
    assert [writer.returncode for writer in writers] == [0, 0] and reads > 20
    assert not [*tmp_path.glob("*.tmp")]


# ---- disks and files


def test_a_disk_without_room_is_one_line_and_nothing_is_lost(tiny, tmp_path):
    assert fork()[0] == 0
    before = {path: (tmp_path / path).read_bytes() for path in (BEST, LAST, LOG)}
    code, out, err = fork(limit=10_000)  # bytes, less than best_gru.pt
    assert code == 1 and err.count("\n") == 1, err
    assert err.startswith("error: best_gru.pt cannot be written (File too large); what was there")
    assert {path: (tmp_path / path).read_bytes() for path in before} == before
    assert not [*tmp_path.glob("*.tmp")]


@pytest.mark.parametrize("name", [LAST, BEST, LOG, "preview_gru.html"])
def test_a_folder_where_a_file_should_be_is_one_line(name, tiny, tmp_path):
    (tmp_path / name).mkdir()
    code, out, err = fork()
    assert code == 1 and err.startswith("error: ") and name in err and err.count("\n") == 1, err


def test_a_full_gpu_is_one_line(tmp_path):
    """The script's own words; there is no GPU here, so that the peak of its memory is 0."""
    source = edited(
        (ROOT / "train_final_model.py").read_text("utf8"), **{**SETTINGS, "TRAIN_CLIPS": 8}
    )
    assert source.count("    model.train()\n") == 1
    source = source.replace("model.train()", "raise torch.OutOfMemoryError('CUDA out of memory')")
    (tmp_path / "train_final_model.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "train_final_model.py", "--model", "gru"], capture_output=True, text=True
    )
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert line == "error: GPU full at 0 MB; lower BATCH_SIZE = 4"


def test_a_loss_that_is_not_finite_names_its_batch(tiny, tmp_path, monkeypatch):
    assert fork()[0] == 0
    training_loss, steps = final.training_loss, []

    def infinite(*arguments):
        steps.append(0)
        loss, *rest = training_loss(*arguments)
        return loss * (math.inf if len(steps) == 6 else 1), *rest

    monkeypatch.setattr(final, "LR_GRU", 0.9)
    monkeypatch.setattr(final, "training_loss", infinite)
    code, out, err = fork()
    line = err.splitlines()[-1]
    assert code == 1 and err.count("error: ") == 1 and "Traceback" not in err
    assert (
        line.startswith("error: the loss of GRU epoch 2/4, batch 2 is not finite")
        and "learning rate" in line
    )
    assert torch.load(BEST, weights_only=True)["metrics"]["epoch"] == 1


# ---- hostile files


def test_only_the_documented_error_comes_out_of_spoiled_pose_files():
    files = [pose_bytes(positions(3), 576, version=version) for version in (0.1, 0.2)]
    rng, problems = np.random.default_rng(0), set()
    for i in range(4000):
        data = bytearray(files[i % 2])
        if rng.random() < 0.3:
            data = data[: rng.integers(0, len(data) + 1)]
        else:
            for place in rng.integers(
                0, rng.choice([60, 200, 12000, len(data)]), rng.integers(1, 6)
            ):
                data[place] = rng.choice([0, 255, rng.integers(256)])
        try:
            keypoints, fps = script.read_keypoints(bytes(data))
            assert keypoints.shape[1:] == (76, 2) and len(keypoints) < 1000 and fps > 0
        except script.BadClip as problem:
            problems.add(str(problem))
    assert problems >= {"not a readable .pose file", "cut short"}


def test_only_one_line_comes_out_of_spoiled_checkpoints(tiny, tmp_path):
    assert fork()[0] == 0
    data, rng, said = (tmp_path / BEST).read_bytes(), np.random.default_rng(0), 0
    for i in range(1000):
        spoiled = bytearray(data)
        if i % 3 == 0:
            spoiled = spoiled[: rng.integers(0, len(spoiled))]
        for place in rng.integers(0, max(1, len(spoiled)), rng.integers(0, 20)):
            if spoiled:
                spoiled[place] = rng.integers(256)
        (tmp_path / "spoiled.pt").write_bytes(spoiled)
        try:
            final.load_checkpoint("spoiled.pt")
        except SystemExit as error:
            assert str(error).startswith("error: spoiled.pt is damaged") and "\n" not in str(error)
            said += 1
    assert said > 500


def test_a_checkpoint_of_other_contents_is_one_line(tiny, tmp_path):
    assert fork()[0] == 0
    good = torch.load(BEST, weights_only=True)
    for change in (
        {"model": "bert"},
        {"model": "transformer"},
        {"model": 3},
        {"weights": {}},
        {"tokenizer": {}},
        {"model_args": {**good["model_args"], "hidden_dim": 32}},
        {"model_args": None},
    ):
        torch.save({**good, **change}, "other.pt")
        with pytest.raises(
            SystemExit,
            match=r"^error: other.pt is damaged or no checkpoint of this script \(.*\)$",
        ):
            final.load_checkpoint("other.pt")
    for missing in ("model", "model_args", "tokenizer", "max_gloss_len", "weights"):
        torch.save({key: value for key, value in good.items() if key != missing}, "other.pt")
        with pytest.raises(SystemExit, match="^error: other.pt is damaged"):
            final.load_checkpoint("other.pt")


def test_hostile_archives_and_tables(tmp_path, capsys):
    uids = [f"{i:012x}-1" for i in range(60)]
    clips = {uid: pose_bytes(positions(4, i % 3)) for i, uid in enumerate(uids)}
    texts = {
        uids[0]: "x" * 2**20,
        uids[1]: "WORD " * 10**5,
        uids[2]: "!!! ...",
        uids[3]: "😀 👍",
        uids[4]: "मैं स्कूल जाता हूँ",
        uids[5]: "a\x00b\u202ec",
        uids[6]: "../../etc/passwd",
        uids[7]: "<script>alert(1)</script>",
    }
    folder = write_isign(tmp_path / "isign", [(uid, texts.get(uid, "go")) for uid in uids], {})
    names = {**clips, "../../../outside": b"x", "/tmp/absolute": b"x", uids[8]: b"\0" * 2**20}
    data = bytearray(zipped(names))
    entry = data.index(
        uids[9].encode(), data.index(b"PK\x01\x02")
    )  # in the directory: its size is 4 GB
    start = data.rindex(b"PK\x01\x02", 0, entry)
    data[start + 24 : start + 28] = b"\xf0\xff\xff\xff"
    for part in (tmp_path / "isign").glob("*part*"):
        part.unlink()
    write_parts(tmp_path / "isign", bytes(data), 2)
    before = set(tmp_path.parent.rglob("outside*"))
    small(DATASET=folder, MAX_BAD_SHARE=0.2)
    found, _ = script.load_clips()
    assert len(found["train"]) + len(found["validation"]) == 57
    report = capsys.readouterr().out
    for reason in ("1 no text", "1 too large", "1 not a readable .pose file"):
        assert reason in report
    assert set(tmp_path.parent.rglob("outside*")) == before
    glosses = {*found["train"]["gloss"], *found["validation"]["gloss"]}
    assert texts[uids[4]] in glosses and texts[uids[3]] in glosses
    script.tokenize(script.gloss_tokenizer(["<pad>", "<unk>"]), [*glosses], 16)
