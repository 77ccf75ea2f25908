"""The store of prepared clips: what it keeps, what a run that is stopped loses, two at once."""

import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import threading
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import change, clips_of, fork, small, until, write_isign

import model_selection as script

UIDS = [f"{i:012x}-1" for i in range(12)]


def write(folder, uids=UIDS, **options):
    """A data set of these clips in three parts of a zip, for both scripts' settings."""
    rows = [(uid, f"word {uid}") for uid in uids]
    small(DATASET=write_isign(folder, rows, clips_of(*uids, **options)))
    return folder


@pytest.fixture
def prepared(monkeypatch):
    """A call that loads the clips with other settings -> how many are prepared for it."""
    read, count = script.prepare_pose, []
    monkeypatch.setattr(script, "prepare_pose", lambda raw: count.append(0) or read(raw))

    def again(**settings):
        count.clear()
        change(**settings)
        script.load_clips()
        return len(count)

    return again


def only_store(tmp_path):
    (folder,) = (tmp_path / "cache" / "gloss_to_pose").iterdir()
    return folder


def check(folder):
    """Whether each line of a store has its frames, and each key is there once -> the keys."""
    clips = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    frames = np.fromfile(folder / "poses.f32", np.float32)
    for clip in clips:
        first, last = clip["first"] * 152, (clip["first"] + clip["frames"]) * 152
        assert last <= len(frames) and zlib.crc32(frames[first:last].tobytes()) == clip["crc"]
    keys = [clip["key"] for clip in clips]
    assert len(keys) == len(set(keys))
    return keys


def test_clips_are_prepared_once_and_new_ones_cost_what_is_new(tmp_path, prepared, monkeypatch):
    write(tmp_path / "isign")
    assert prepared(TRAIN_CLIPS=3, VALIDATION_CLIPS=1) == 4  # a subset, and then all
    assert prepared(TRAIN_CLIPS=0, VALIDATION_CLIPS=0) == 8
    with monkeypatch.context() as patch:
        patch.setattr(script.ClipStore, "lock", None)  # who lacks nothing waits for nobody
        assert prepared() == prepared(VALIDATION_SHARE=0.6) == 0
    with open(tmp_path / "isign" / "iSign_v1.1.csv", "a") as table:
        table.write(f"{UIDS[0][:-1]}2,a new row\n")
    assert prepared() == 1  # its file is missing, which is known then
    assert prepared() == 0
    assert prepared(MAX_FRAMES=3) == 13 and prepared(MAX_FRAMES=12) == 0
    assert prepared(FPS=10) == 13
    for folder in (tmp_path / "cache" / "gloss_to_pose").iterdir():
        assert len(check(folder)) == 13


@pytest.mark.parametrize("poses", ["iSign-poses_v1.1_part_*", "poses"])
def test_only_clips_that_are_new_or_were_replaced_are_prepared(poses, tmp_path, prepared):
    def place(clips):
        write_isign(tmp_path / "isign", [(uid, f"word {uid}") for uid in UIDS], clips)
        for uid, data in clips.items():
            (tmp_path / "poses" / f"{uid}.pose").write_bytes(data)

    (tmp_path / "poses").mkdir()
    kept = clips_of(*UIDS[:9])
    write(tmp_path / "isign")
    place({**kept, **clips_of(UIDS[9], first=40)})
    assert prepared(POSES=poses) == 12
    before = script.load_clips()[0]
    if poses == "poses":
        kept = {}  # a file that is written anew is prepared anew
    place({**kept, **clips_of(*UIDS[9:], first=50)})
    assert prepared() == 3 and prepared() == 0
    after = script.load_clips()[0]
    crcs = [{*part["train"].crcs, *part["validation"].crcs} for part in (before, after)]
    assert len(crcs[0]) == 10 and len(crcs[1]) == 12 and len(crcs[0] & crcs[1]) == 9


def test_a_table_that_was_replaced_is_read_anew(tmp_path):
    """Also where it has the name and size of another one, and a README names it."""
    small(POSE_DIM=2, CONFIG=None)
    for folder, word in (("a", "go"), ("b", "no"), ("a", "so")):
        data = tmp_path / folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        config = "{config_name: one, data_files: x.jsonl}"
        (data / "README.md").write_text(f"---\nconfigs:\n- {config}\n---\n")
        rows = [{"gloss": word, "pose": [[ord(word[0]) / 99, i + 1]] * 2} for i in range(4)]
        (data / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        change(DATASET=str(data))
        clips, _ = script.load_clips()
        assert set(clips["train"].glosses) == {word}
        assert clips["train"].pose(0)[0, 0].item() == pytest.approx(ord(word[0]) / 99)


@pytest.mark.parametrize("fault", ["cut", "joined", "frames"])
def test_what_a_kill_a_full_disk_or_a_copy_cut_is_prepared_anew(fault, tmp_path, prepared):
    """The last line; also where another thread's line joined it; or frames."""
    write(tmp_path / "isign")
    assert prepared() == 12
    index, poses = (only_store(tmp_path) / name for name in ("clips.jsonl", "poses.f32"))
    lines, frames = index.read_bytes().splitlines(keepends=True), poses.read_bytes()
    if fault == "frames":
        poses.write_bytes(frames[: len(frames) // 4 + 5])
        some = prepared(TRAIN_CLIPS=2, VALIDATION_CLIPS=1)  # it is where others were
        assert prepared(TRAIN_CLIPS=0, VALIDATION_CLIPS=0) == 9 - some and 0 < some < 9
    else:
        index.write_bytes(b"".join(lines[:10]) + lines[10][:20] + lines[11] * (fault == "joined"))
        poses.write_bytes(frames + b"x" * 1000)
        assert prepared() == 2
    assert len(check(only_store(tmp_path))) == 12 and prepared() == 0


def test_clips_that_show_several_people_are_counted(tmp_path, prepared, capsys):
    write(tmp_path / "isign")
    read = script.read_keypoints
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "read_keypoints", lambda data: (*read(data)[:2], 2))
        assert prepared() == 12
    assert prepared() == 0
    said = "  notice           12 clips show several people: one is taken"
    assert capsys.readouterr().out.count(said) == 2  # also where the store knows it


def test_a_run_waits_for_another_one_that_prepares(tmp_path, prepared):
    """test_torchrun.py has several that start at once."""
    write(tmp_path / "isign")
    assert prepared(TRAIN_CLIPS=3, VALIDATION_CLIPS=1) == 4
    lock = script.lock_file(only_store(tmp_path) / "lock")
    change(TRAIN_CLIPS=0, VALIDATION_CLIPS=0)
    out, waits = Path("out.txt"), "waiting for another run, which prepares these clips"
    fork(script.load_clips, lambda: until(lambda: out.exists() and waits in out.read_text()))
    lock.close()
    assert prepared() == 8


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_one_process_goes_on_and_several_end_with_a_line(
    number, tmp_path, monkeypatch, capsys
):
    write(tmp_path / "isign")

    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(script.fcntl, "lockf", lockf)
    assert sum(map(len, script.load_clips()[0].values())) == 12
    said = f"the file system of {only_store(tmp_path)}/lock has no locks ({os.strerror(number)})"
    assert capsys.readouterr().out.count(f"warning: {said}") == 1
    script.claim_folder("gru").close()
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for claim in (script.load_clips, lambda: script.claim_folder("gru")):
        with pytest.raises(
            SystemExit, match="^error: the file system of .* has no locks .*HF_HOME"
        ):
            claim()


def test_killed_at_any_moment_a_store_is_whole_and_nothing_is_lost_but_what_it_was_at(
    tmp_path, monkeypatch
):
    write(tmp_path / "isign", [f"{i:012x}-1" for i in range(200)], frames=2)
    change(MAX_BAD_SHARE=0.0)
    monkeypatch.setattr(script, "GROUP_BYTES", 2**14)  # a few clips are read at once
    rng, kept, code = random.Random(3), 0, None
    for kills in range(6):
        when = partial(time.sleep, rng.uniform(0.05, 0.3)) if kills < 5 else None
        code, _, err = fork(script.load_clips, when)
        assert code in (0, -signal.SIGKILL), err
        stores = list((tmp_path / "cache").glob("gloss_to_pose/*"))
        keys = len(check(stores[0])) if stores else 0
        assert keys >= kept
        kept = keys
    assert code == 0 and kept == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_preparing_at_once_with_one_line_and_what_is_finished_stays(
    number, tmp_path, monkeypatch
):
    write(tmp_path / "isign", [f"{i:012x}-1" for i in range(300)], frames=2)
    read, calls = script.prepare_pose, itertools.count()

    def slow(raw):
        time.sleep(0 if next(calls) < 50 else 300)  # a thread that sleeps cannot be woken
        return read(raw)

    monkeypatch.setattr(script, "prepare_pose", slow)
    monkeypatch.setattr(script, "GROUP_BYTES", 2**14)

    def lines():
        return sum(path.read_text().count("\n") for path in tmp_path.glob("cache/*/*/clips.jsonl"))

    def run():
        with pytest.raises(SystemExit):
            script.run_script(script.load_clips)
        os._exit(7)  # it does not come so far

    code, _, err = fork(run, lambda: until(lambda: lines() > 5), number)
    assert code == 130 and err.startswith("\nstopped: the same command") and err.count("\n") == 2
    assert 5 < len(check(only_store(tmp_path))) <= 50


def test_no_space_for_the_clips_is_said_and_passes(tmp_path, prepared):
    write(tmp_path / "isign")
    script.load_tables(script.DATASET)  # what the table needs is there
    code, _, err = fork(script.load_clips, limit=12_000)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert "what was prepared stays: " in err and err.endswith("File too large\n")
    assert prepared() > 0 and prepared() == 0 and len(check(only_store(tmp_path))) == 12


def test_an_error_of_one_thread_ends_the_preparing(tmp_path, monkeypatch):
    write(tmp_path / "isign")

    def fail(raw):
        raise OSError("the line is dead")

    monkeypatch.setattr(script, "prepare_pose", fail)
    with pytest.raises(SystemExit, match="^error: .* the line is dead$") as ended:
        script.load_clips()
    # other threads may still add, so that no other run may yet, while `ended` holds the store
    mode = fcntl.LOCK_EX | fcntl.LOCK_NB
    assert fork(partial(script.lock_file, only_store(tmp_path) / "lock", mode))[0] == 1
    del ended
    until(lambda: not any(x.name.startswith("preparing") for x in threading.enumerate()))
