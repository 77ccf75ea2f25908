"""What only the final script does: the closing metrics, a training that survives, hostile files."""
import contextlib
import csv
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import model_selection as script
import train_final_model as final
from helpers import ROOT, edited, pose_bytes, positions, small, write_isign, write_parts, zipped

SETTINGS = dict(EMBED_DIM=16, HIDDEN_DIM=16, EPOCHS=4, TRAIN_CLIPS=0, VALIDATION_CLIPS=0, MAX_FRAMES=16, PROCESSES=0,
                DATASET="sample", BATCH_SIZE=4)
LAST, BEST, LOG = "last_gru.pt", "best_gru.pt", "log_gru.csv"


@pytest.fixture
def tiny(monkeypatch):
    """The final script with tiny settings, on a tiny sample."""
    sample_rows = final.sample_rows
    monkeypatch.setattr(final, "sample_rows", lambda n, seed: sample_rows(n // 20, seed))
    for setting, value in SETTINGS.items():
        monkeypatch.setattr(final, setting, value)


def fork(*arguments, kill_after=None, limit=None):
    """Run `main` in a process of its own -> (exit status, or the signal's number below 0; stdout; stderr).

    kill_after: seconds until `kill -9`; limit: the largest file that it may write, in bytes.
    """
    child = os.fork()
    if child == 0:
        code = 1
        with open("out.txt", "w") as out, open("err.txt", "w") as err:
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
        log = [{key: value for key, value in line.items() if key != "seconds"} for line in csv.DictReader(file)]
    best, last = (torch.load(path, weights_only=True) for path in (BEST, LAST))
    return log, best["weights"], last["model"], last["averaged"], last["optimizer"]["state"]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- the closing metrics

def test_aligned_errors_are_those_of_the_best_paths_whatever_the_padding():
    rng, b, longest = np.random.default_rng(0), 40, 6
    costs = rng.exponential(size=(b, longest, longest)).astype(np.float32)
    n, m = rng.integers(1, longest + 1, (2, b))

    def paths(cost, i, j):
        if i == j == 0:
            yield [cost[0, 0]]
        for k, l in ((i - 1, j - 1), (i - 1, j), (i, j - 1)):
            if k >= 0 and l >= 0:
                yield from (path + [cost[i, j]] for path in paths(cost, k, l))
    expected = [np.mean(min(paths(cost, i - 1, j - 1), key=sum)) for cost, i, j in zip(costs, n, m)]
    got = final.aligned_errors(torch.tensor(costs), torch.tensor(n), torch.tensor(m))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    wider = torch.nn.functional.pad(torch.tensor(costs), (0, 5, 0, 2), value=9)
    np.testing.assert_allclose(final.aligned_errors(wider, torch.tensor(n), torch.tensor(m)), expected, rtol=1e-5)


class Answers(torch.nn.Module):
    """Says, for the gloss that is the number i, poses[i], of lengths[i] frames."""

    def __init__(self, poses, lengths):
        super().__init__()
        self.poses, self.lengths = poses, torch.tensor(lengths)

    def forward(self, tokens, token_mask):
        chosen = tokens[:, 0] - 2
        return self.poses[chosen], self.lengths[chosen] / 25

    def frames(self, seconds):
        return (seconds * 25).round().long()


def test_recall_and_the_aligned_error_of_known_answers():
    rng, lengths, n = np.random.default_rng(1), [9, 12, 7, 30], 30
    real = [rng.normal(size=(length, 4)).cumsum(0).astype(np.float32) for length in lengths]
    clips = script.datasets.Dataset.from_list([
        {"gloss": f"w{i}", "problem": "", "seconds": length / 25, "pose": pose.ravel()}
        for i, (pose, length) in enumerate(zip(real, lengths))], features=script.CLIP)
    tokens = script.Tokens(["<pad>", "<unk>", *(f"W{i}" for i in range(4))], "", 3)
    loader = script.make_loaders({"validation": clips}, tokens, small(POSE_DIM=4, BATCH_SIZE=3))["validation"]
    padded = torch.stack([torch.nn.functional.pad(torch.tensor(pose), (0, 0, 0, n - len(pose))) for pose in real])
    device = torch.device("cpu")
    right = final.say_metrics(Answers(padded, lengths), loader, device)
    assert right == {"val_dtw_mje": pytest.approx(0, abs=1e-6), "recall_at_1": 1}
    swapped = final.say_metrics(Answers(padded[[1, 0, 2, 3]], [lengths[i] for i in (1, 0, 2, 3)]), loader, device)
    assert swapped["recall_at_1"] == 0.5 and swapped["val_dtw_mje"] > 0.1
    apart = final.say_metrics(Answers(padded + torch.tensor([3.0, 4, 3, 4]), lengths), loader, device)
    assert 0.1 < apart["val_dtw_mje"] <= 5.001


def test_frames_and_clips_that_show_nothing_change_no_closing_metric():
    rng, device, n = np.random.default_rng(2), torch.device("cpu"), 96
    real, metrics = rng.normal(size=(3, n, 4)).cumsum(1).astype(np.float32), {}
    answers = torch.tensor(real + rng.normal(size=real.shape).astype(np.float32))
    tokens = script.Tokens(["<pad>", "<unk>", "W0", "W1", "W2"], "", 3)
    for name, hidden in (("whole", []), ("gaps", [slice(10, 14), 50]), ("first half", [slice(0, 48)])):
        shown = np.ones(n, bool)
        for part in hidden:
            shown[part] = False
        poses = np.where(shown[:, None], real, np.nan)
        clips = script.datasets.Dataset.from_list([
            {"gloss": f"w{i}", "problem": "", "seconds": n / 25, "pose": pose.ravel()} for i, pose in enumerate(poses)],
            features=script.CLIP)
        loader = script.make_loaders({"validation": clips}, tokens, small(POSE_DIM=4, BATCH_SIZE=2))["validation"]
        metrics[name] = final.say_metrics(Answers(answers, [n] * 3), loader, device)
        made, seen = (x.unflatten(-1, (-1, 2)) for x in (answers, torch.tensor(real[:, shown])))
        costs = (made[:, :, None] - seen[:, None]).norm(dim=-1).mean(-1)
        expected = final.aligned_errors(costs, torch.tensor([n] * 3), torch.tensor([shown.sum()] * 3))
        assert metrics[name]["val_dtw_mje"] == pytest.approx(expected.mean().item(), rel=1e-5)
        assert metrics[name]["recall_at_1"] == 1
    barely = np.full((1, n, 4), np.nan, np.float32)  # but for two frames, none of the 32 that are compared
    barely[0, [1, 5]] = 3
    assert np.isnan(script.resample(barely[0].reshape(n, 2, 2), 32)).all()
    clips = script.datasets.concatenate_datasets([clips, script.datasets.Dataset.from_list([
        {"gloss": "rare", "problem": "", "seconds": n / 25, "pose": barely.ravel()}], features=script.CLIP)])
    loader = script.make_loaders({"validation": clips}, tokens, small(POSE_DIM=4, BATCH_SIZE=2))["validation"]
    answers = torch.cat([answers, torch.zeros(1, n, 4)])[[0, 1, 2, 3]]
    tokens.number["RARE"] = 5
    assert final.say_metrics(Answers(answers, [n] * 4), loader, device)["recall_at_1"] == 0.75


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_a_model_that_does_not_beat_the_mean_pose_is_named(rate, tiny, monkeypatch):
    monkeypatch.setattr(final, "LR_GRU", rate)
    code, out, err = fork()
    closing = dict(line.split(": ") for line in out.rpartition("\n\n")[2].splitlines() if "warning" not in line)
    learned = float(closing["val_mse"]) < float(closing["mean_pose_mse"])
    assert learned == (rate > 0)
    assert out.splitlines()[-1].startswith("warning: the model does not beat") == (not learned)


# ---- a run that is stopped goes on as if it had not been

def test_killed_at_any_moment_a_resumed_run_ends_as_an_unbroken_one(tiny, tmp_path, monkeypatch):
    (tmp_path / "unbroken").mkdir()
    monkeypatch.chdir(tmp_path / "unbroken")
    began = time.time()
    code, out, err = fork()
    took, expected = time.time() - began, outcome()
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_one_line_and_nothing_is_lost(number, tiny, tmp_path, monkeypatch):
    code, out, err = fork()
    expected = outcome()
    (tmp_path / "stopped").mkdir()
    monkeypatch.chdir(tmp_path / "stopped")
    source = edited((ROOT / "train_final_model.py").read_text("utf8"), **SETTINGS)
    for old, new in (("sample_rows(320, 1)", "sample_rows(16, 1)"), ("sample_rows(80, 2)", "sample_rows(4, 2)")):
        source = source.replace(old, new)
    line = "            self.optimizer.zero_grad(set_to_none=True)\n"
    kill = f"            if (epoch, i) == (3, 2):\n                os.kill(os.getpid(), {int(number)})\n"
    Path("train_final_model.py").write_text(source.replace(line, kill + line))
    done = subprocess.run([sys.executable, "train_final_model.py", "--model", "gru"], capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("stopped; finished epochs and prepared clips stay") and "--resume" in last
    assert len(torch.load(LAST, weights_only=True)["log"]) == 2 and not [*Path().glob("*.tmp")]
    assert fork("--resume")[0] == 0 and same(outcome(), expected)
    code, out, err = fork("--resume")  # there is nothing left to do
    assert code == 0 and " epoch " not in out.split("best_epoch")[0] and same(outcome(), expected)


def test_a_new_run_that_is_stopped_in_its_first_epoch_leaves_the_old_one(tiny, tmp_path, monkeypatch):
    assert fork()[0] == 0
    before, expected = {path: (tmp_path / path).read_bytes() for path in (BEST, LAST, LOG)}, outcome()
    with monkeypatch.context() as patch:
        patch.setattr(final.Trainer, "epoch", lambda *_: sys.exit("stopped"))
        assert fork()[0] == 1
    assert {path: (tmp_path / path).read_bytes() for path in before} == before
    assert fork("--resume")[0] == 0 and same(outcome(), expected)
    assert fork()[0] == 0 and same(outcome(), expected) and not [*tmp_path.glob("*.tmp")]


def test_ctrl_c_while_processes_start_that_prepare_is_one_line(tmp_path):
    """A terminal's Ctrl-C reaches all processes. Those that still import the script are not to print a traceback."""
    clips = {f"{i:012x}-1": pose_bytes(positions(3)) for i in range(20)}
    folder = write_isign(tmp_path / "isign", [(uid, "go") for uid in clips], clips)
    source = edited((ROOT / "train_final_model.py").read_text("utf8"), **{**SETTINGS, "PROCESSES": 2, "DATASET": folder})
    Path("train_final_model.py").write_text(source.replace("CHUNK = 256", "CHUNK = 2"))
    with open("out.txt", "w") as out, open("err.txt", "w") as err:
        run = subprocess.Popen([sys.executable, "train_final_model.py", "--model", "gru"], stdout=out, stderr=err,
                               start_new_session=True)
    ignoring, end = set(), time.time() + 120
    while len(ignoring) < 2:  # of the processes that it spawned
        assert run.poll() is None and time.time() < end, open("err.txt").read()
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                if int(fields["PPid"]) == run.pid and b"spawn_main" in (status.parent / "cmdline").read_bytes():
                    if int(fields["SigIgn"], 16) >> signal.SIGINT - 1 & 1:
                        ignoring.add(status.parent.name)
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(60) == 130
    assert "stopped; finished epochs" in open("out.txt").read() and "Traceback" not in open("err.txt").read()


def test_a_run_that_began_on_a_cpu_goes_on_where_there_is_a_scaler(tiny, monkeypatch):
    assert fork()[0] == 0
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))
    code, out, err = fork("--resume")
    assert code == 0, err
    assert torch.load(LAST, weights_only=True)["scaler"]["scale"] > 1


def test_what_does_not_fit_is_not_resumed(tiny, monkeypatch, tmp_path):
    code, out, err = fork("--resume")
    assert code == 1 and err.startswith("error: last_gru.pt does not exist") and err.count("\n") == 1
    assert fork()[0] == 0
    before = {path: (tmp_path / path).read_bytes() for path in (LAST, BEST, LOG)}
    for setting, value in (("BATCH_SIZE", 2), ("LR_GRU", 0.5), ("HIDDEN_DIM", 8)):
        with monkeypatch.context() as patch:
            patch.setattr(final, setting, value)
            code, out, err = fork("--resume")
        assert code == 1 and err.startswith("error: last_gru.pt does not fit") and f"{setting} was" in err, err
    sample_rows = final.sample_rows
    monkeypatch.setattr(final, "sample_rows", lambda n, seed: sample_rows(n, seed).map(lambda row: {
        "gloss": row["gloss"].lower().replace("i", "y")}))
    code, out, err = fork("--resume")
    assert code == 1 and "the data is another" in err
    monkeypatch.setattr(final, "sample_rows", lambda n, seed: sample_rows(n, seed).map(lambda row: {
        "pose": (2 * np.array(row["pose"])).tolist()}))
    code, out, err = fork("--resume")
    assert code == 1 and "the data is another" in err
    monkeypatch.setattr(final, "sample_rows", sample_rows)
    (tmp_path / LAST).write_bytes(before[LAST][:-1000])
    code, out, err = fork("--resume")
    assert code == 1 and err.startswith("error: last_gru.pt is damaged") and err.count("\n") == 1
    assert (tmp_path / BEST).read_bytes() == before[BEST]
    for setting, value in (("PROCESSES", 2), ("PATIENCE", 5)):  # these make no difference
        monkeypatch.setattr(final, setting, value)
    (tmp_path / LAST).write_bytes(before[LAST])
    assert fork("--resume")[0] == 0


# ---- disks and files

def test_a_disk_without_room_is_one_line_and_nothing_is_lost(tiny, tmp_path):
    assert fork()[0] == 0
    before = {path: (tmp_path / path).read_bytes() for path in (BEST, LAST, LOG)}
    code, out, err = fork(limit=50_000)  # less than last_gru.pt; more than the clips
    assert code == 1 and "last_gru.pt.tmp cannot be written" in err and err.count("\n") == 1, err
    assert " epoch " not in out  # before any training
    assert {path: (tmp_path / path).read_bytes() for path in before} == before
    assert not [*tmp_path.glob("*.tmp")]


@pytest.mark.parametrize("name", [LAST, BEST, LOG, "preview_gru.html"])
def test_a_folder_where_a_file_should_be_is_one_line(name, tiny, tmp_path):
    (tmp_path / name).mkdir()
    code, out, err = fork()
    assert code == 1 and err.startswith("error: ") and name in err and err.count("\n") == 1, err
    assert (" epoch " in out) == (name != LAST)  # which is written first


def test_a_full_gpu_is_one_line(tmp_path):
    """The script's own words; where the memory is counted there is no GPU, so that its peak is 0."""
    source = edited((ROOT / "train_final_model.py").read_text("utf8"), **{**SETTINGS, "TRAIN_CLIPS": 8})
    source = source.replace("self.model.train()", "raise torch.OutOfMemoryError('CUDA out of memory')", 1)
    (tmp_path / "train_final_model.py").write_text(source)
    done = subprocess.run([sys.executable, "train_final_model.py", "--model", "gru"], capture_output=True, text=True)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert line == "error: GPU full at 0 MB; lower BATCH_SIZE = 4"
    torch.load(LAST, weights_only=True)


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
    assert line.startswith("error: the loss of GRU epoch 2/4, batch 2 is not finite") and "learning rate" in line
    assert torch.load(BEST, weights_only=True)["metrics"]["epoch"] == 1


# ---- hostile files

def test_only_the_documented_error_comes_out_of_spoiled_pose_files():
    files = [pose_bytes(positions(3), 576, version=version) for version in (0.1, 0.2)]
    rng, problems = np.random.default_rng(0), set()
    for i in range(4000):
        data = bytearray(files[i % 2])
        if rng.random() < 0.3:
            data = data[:rng.integers(0, len(data) + 1)]
        else:
            for place in rng.integers(0, rng.choice([60, 200, 12000, len(data)]), rng.integers(1, 6)):
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
            spoiled = spoiled[:rng.integers(0, len(spoiled))]
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
    for change in ({"model": "bert"}, {"model": "transformer"}, {"model": 3}, {"weights": {}}, {"tokens": {}},
                   {"model_args": {**good["model_args"], "hidden_dim": 32}}, {"model_args": None}):
        torch.save({**good, **change}, "other.pt")
        with pytest.raises(SystemExit, match=r"^error: other.pt is damaged or no checkpoint of this script \(\w+\)$"):
            final.load_checkpoint("other.pt")
    for missing in ("model", "model_args", "tokens", "weights"):
        torch.save({key: value for key, value in good.items() if key != missing}, "other.pt")
        with pytest.raises(SystemExit, match="^error: other.pt is damaged"):
            final.load_checkpoint("other.pt")


def test_hostile_archives_and_tables(tmp_path, capsys):
    uids = [f"{i:012x}-1" for i in range(60)]
    clips = {uid: pose_bytes(positions(4, i % 3)) for i, uid in enumerate(uids)}
    texts = {uids[0]: "x" * 2**20, uids[1]: "WORD " * 10**5, uids[2]: "!!! ...", uids[3]: "😀 👍", uids[4]: "मैं स्कूल जाता हूँ",
             uids[5]: "a\x00b\u202ec", uids[6]: "../../etc/passwd", uids[7]: "<script>alert(1)</script>"}
    folder = write_isign(tmp_path / "isign", [(uid, texts.get(uid, "go")) for uid in uids], {})
    names = {**clips, "../../../outside": b"x", "/tmp/absolute": b"x", uids[8]: b"\0" * 2**20}
    data = bytearray(zipped(names))
    entry = data.index(uids[9].encode(), data.index(b"PK\x01\x02"))  # in the directory: its size is 4 GB
    start = data.rindex(b"PK\x01\x02", 0, entry)
    data[start + 24:start + 28] = b"\xf0\xff\xff\xff"
    for part in (tmp_path / "isign").glob("*part*"):
        part.unlink()
    write_parts(tmp_path / "isign", bytes(data), 2)
    before = {path for path in tmp_path.parent.rglob("outside*")}
    found, _ = script.load_clips(small(DATASET=folder, MAX_BAD_SHARE=0.2))
    assert len(found["train"]) + len(found["validation"]) == 57
    report = capsys.readouterr().out
    for reason in ("1 no text", "1 too large", "1 not a readable .pose file"):
        assert reason in report
    assert {path for path in tmp_path.parent.rglob("outside*")} == before
    glosses = {*found["train"]["gloss"], *found["validation"]["gloss"]}
    assert texts[uids[4]] in glosses and texts[uids[3]] in glosses
    script.Tokens(["<pad>", "<unk>"], "", 16)([*glosses])
