import io
import json
import re
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
from helpers import (
    FACE,
    LEFT,
    POINTS,
    POSE,
    RIGHT,
    pose_bytes,
    positions,
    small,
    write_isign,
    write_parts,
    zipped,
)
from pose_format import Pose
from pose_format.numpy import NumPyPoseBody
from pose_format.pose_header import PoseHeader, PoseHeaderComponent, PoseHeaderDimensions

import model_selection as script

UIDS = [
    "f68f0aa0e1ae-1",
    "f68f0aa0e1ae-2",
    "a-b_c--d_e---1",
    "_x-y_z-w_v-_w",
    "_x-y_z-w_v-_e12",
    "other",
]
TABLE = np.random.default_rng(0).normal(size=(5, 4))  # a clip of two points


def load(dataset, **changes):
    """A data set's clips, with tiny settings and others."""
    small(DATASET=dataset, **changes)
    return script.load_clips()[0]


def prepared_clip(row, poses="", **changes):
    """One row as `prepare_clip` makes it."""
    small(**{"MAX_FRAMES": 96, **changes})
    return script.prepare_clip({"key": "", "uid": "", "gloss": "A", **row}, str(poses), None)


def write_table(folder, splits):
    """Rows by split -> a data set of its own splits, as the hub holds them."""
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    files = "".join(f"  - {{split: {split}, path: {split}.parquet}}\n" for split in splits)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"
    )


def clips_of(*uids, frames=4):
    return {uid: pose_bytes(positions(frames, seed)) for seed, uid in enumerate(uids)}


def expected(where):
    raw = np.stack([where[point] for point in POINTS], 1)
    shoulders = raw[:, 47:49]
    centre = np.median(shoulders.mean(1), axis=0)
    return (raw - centre) / np.median(np.hypot(*(shoulders[:, 0] - shoulders[:, 1]).T))


# ---- .pose files


@pytest.mark.parametrize("layout", [576, 586, 553, "shuffled"])
@pytest.mark.parametrize("version", [0.1, 0.2])
def test_points_are_taken_by_name(layout, version):
    where = positions(5)
    keypoints, fps = script.read_keypoints(pose_bytes(where, layout, 29, version))
    assert fps == 29 and keypoints.shape == (5, 76, 2)
    np.testing.assert_allclose(keypoints, expected(where), atol=1e-4)


def test_what_was_not_seen_is_nan():
    where = positions(4)
    where[FACE, "291"][2] = np.nan  # some files hold NaN with a confidence above 0
    unseen = {(LEFT, "WRIST"), (RIGHT, "PINKY_TIP"), (FACE, "9")}
    keypoints, _ = script.read_keypoints(pose_bytes(where, unseen=unseen))
    missing = np.isnan(expected(where)).any(-1)
    missing[:, [POINTS.index(point) for point in unseen]] = True
    assert missing.sum() == 13 and (np.isnan(keypoints) == missing[..., None]).all()


def test_a_clip_has_one_centre_and_one_scale():
    where = positions(9)
    where[POSE, "LEFT_SHOULDER"][4:] += (50, 20)  # the signer turns: this must still be seen
    keypoints, _ = script.read_keypoints(pose_bytes(where))
    moved, _ = script.read_keypoints(
        pose_bytes({point: 3 * xy + (40, -70) for point, xy in where.items()})
    )
    np.testing.assert_allclose(keypoints, expected(where), atol=1e-4)
    np.testing.assert_allclose(keypoints, moved, atol=1e-4)
    assert keypoints[4:, 47].mean(0)[0] - keypoints[:4, 47].mean(0)[0] > 0.1


SHOULDERS = {(POSE, "LEFT_SHOULDER"), (POSE, "RIGHT_SHOULDER")}
FAULTS = {
    "no file at all": (lambda: b"", "not a readable .pose file"),
    "text": (lambda: b"<html>" * 999, "not a readable .pose file"),
    "v0.1, cut at a frame": (lambda: pose_bytes(positions(6))[: -2 * 576 * 16], "cut short"),
    "v0.1, cut in a frame": (lambda: pose_bytes(positions(6))[:-12345], "cut short"),
    "v0.1, cut in the header": (
        lambda: pose_bytes(positions(6))[:1000],
        "not a readable .pose file",
    ),
    "v0.2, cut": (
        lambda: pose_bytes(positions(6), version=0.2)[:-12345],
        "not a readable .pose file|cut short",
    ),
    "no frames": (lambda: pose_bytes(positions(0)), "no shoulders|nothing seen"),
    "fps 0": (lambda: pose_bytes(positions(3), fps=0), "no frame rate"),
    "no shoulders": (lambda: pose_bytes(positions(3), unseen=SHOULDERS), "no shoulders"),
    "all NaN": (
        lambda: pose_bytes({point: xy * np.nan for point, xy in positions(3).items()}),
        "no shoulders",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_has_a_reason_and_no_pose(fault, tmp_path, monkeypatch):
    data, reason = FAULTS[fault]
    (tmp_path / "poses").mkdir()
    (tmp_path / "poses" / "clip.pose").write_bytes(data())
    clip = prepared_clip({"uid": "clip"}, tmp_path / "poses")
    assert re.fullmatch(reason, clip["problem"]) and len(clip["pose"]) == 0


# ---- time


@pytest.mark.parametrize(
    "frames, fps, version, expected_frames, seconds",
    [
        (10, 25, 0.1, 10, 0.4),
        (20, 50, 0.1, 10, 0.4),
        (58, 29, 0.1, 50, 2),
        (10, 12.5, 0.2, 20, 0.8),
        (1, 25, 0.1, 1, 0.04),
        (1, 250, 0.1, 1, 0.004),
        (300, 25, 0.1, 96, 12),
        (97, 25, 0.1, 96, 3.88),
    ],
)
def test_the_frame_rate_and_at_most_max_frames(
    tmp_path, frames, fps, version, expected_frames, seconds
):
    (tmp_path / "clip.pose").write_bytes(pose_bytes(positions(frames), fps=fps, version=version))
    clip = prepared_clip({"uid": "clip"}, tmp_path)
    assert clip["problem"] == "" and clip["seconds"] == pytest.approx(seconds)
    assert np.asarray(clip["pose"]).size == expected_frames * 152


def test_a_long_clip_is_resampled_over_all_its_length():
    path = np.linspace(1, 5, 201)[:, None] * np.ones(4)
    clip = prepared_clip({"pose": path}, MAX_FRAMES=21, POSE_DIM=4)
    np.testing.assert_allclose(
        clip["pose"].reshape(-1, 4), np.linspace(1, 5, 21)[:, None] * np.ones(4), atol=1e-6
    )
    assert clip["seconds"] == pytest.approx(201 / 25)


def test_resample_interpolates_and_takes_the_nearest_frame_beside_unseen_ones():
    path = np.array([0.0, 10, np.nan, 30, 40])[:, None, None] * np.ones((1, 2))
    more = script.resample(path, 9)[:, 0, 0]
    np.testing.assert_array_equal(more[[0, 1, 2, 4, 6, 7, 8]], [0, 5, 10, np.nan, 30, 35, 40])
    np.testing.assert_array_equal(
        script.resample(path, 17)[[5, 7, 8, 9, 11], 0, 0], [10, np.nan, np.nan, np.nan, 30]
    )
    assert (
        script.resample(path[:1], 3)[:, 0, 0].tolist() == [0, 0, 0]
        and script.resample(path, 1)[0, 0, 0] == 0
    )


def test_rows_zero_pairs_and_nan_are_unseen():
    small(POSE_DIM=4)
    keypoints = script.row_keypoints([[0, 0, 0, 1], [2, 0, np.nan, 3]])
    assert (
        np.isnan(keypoints[0, 0]).all()
        and keypoints[0, 1].tolist() == [0, 1]
        and keypoints[1, 0].tolist() == [2, 0]
    )
    assert np.isnan(keypoints[1, 1]).any()


def test_a_point_far_out_is_an_error_of_the_detector():
    clip = prepared_clip({"pose": [[1.0, 2, 3, 99], [1, 2, np.inf, 4]]}, POSE_DIM=4)
    np.testing.assert_array_equal(clip["pose"], [1, 2, np.nan, np.nan, 1, 2, np.nan, np.nan])


@pytest.mark.parametrize(
    "pose, reason",
    [
        (None, "no table of frames"),
        ([1.0, 2.0], "no table of frames"),
        ([[1.0, 2.0], [1.0]], "no table of frames"),
        ("text", "no table of frames"),
        ([[1.0, 2.0, 3.0]], "3 numbers a frame, POSE_DIM is 2"),
        ([[], []], "0 numbers a frame, POSE_DIM is 2"),
        ([], "no table of frames"),
        ([[0.0, 0.0]], "nothing seen"),
    ],
)
def test_a_row_without_a_usable_pose_is_left_out(pose, reason):
    assert prepared_clip({"pose": pose}, POSE_DIM=2)["problem"] == reason


def test_a_clip_of_which_resampling_leaves_nothing_is_left_out():
    row = {"pose": [[0.0, 0.0]] * 30 + [[1.0, 2.0]] + [[0.0, 0.0]] * 30}
    problems = [prepared_clip(row, MAX_FRAMES=n, POSE_DIM=2)["problem"] for n in (96, 8)]
    assert problems == ["", "nothing seen"]


# ---- glosses, videos and splits


@pytest.mark.parametrize(
    "text, glosses",
    [
        ("Where's the house?", ["WHERE'S", "THE", "HOUSE"]),
        ("  a,  B.\n(c) ", ["A", "B", "C"]),
        ("?! ... -", []),
        ("", []),
        (None, []),
        ("cafe\u0301", ["CAF\u00c9"]),
        ("go 😀!", ["GO", "😀"]),
        ("नमस्ते, दुनिया।", ["नमस्ते", "दुनिया"]),
    ],
)
def test_split_glosses(text, glosses):
    assert script.split_glosses(text) == glosses


@pytest.mark.parametrize(
    "uid, video",
    [
        ("f68f0aa0e1ae-12", "f68f0aa0e1ae"),
        ("dQw4w9WgXcQ--3", "dQw4w9WgXcQ"),
        ("a-b_c--d_e---3", "a-b_c--d_e-"),
        ("-----------_w", "-----------"),
        ("dQw4w9WgXcQ_d", "dQw4w9WgXcQ"),
        ("_x-y_z-w_v-_e12", "_x-y_z-w_v-"),
        ("f68f0aa0e1a_w", "f68f0aa0e1a"),
        ("something-else", "something-else"),
        ("f68f0aa0e1ae-1\n", "f68f0aa0e1ae-1\n"),
    ],
)
def test_video_of(uid, video):
    assert script.video_of(uid) == video


def test_the_split_does_not_move_as_rows_are_added():
    videos = [f"video {i}" for i in range(200)]
    few, many = (
        script.split_by_video(videos[:100] * 3, 0.2),
        script.split_by_video(videos[::-1], 0.2),
    )
    assert many & set(videos[:100]) == few and 10 < len(few) < 30
    for share in (0.001, 0.9):
        assert len(script.split_by_video(["a", "b", "b"], share)) == 1
    with pytest.raises(SystemExit, match="^error: .*single video.*$"):
        script.split_by_video(["a", "a"], 0.1)


def test_a_subset_is_of_whole_videos_and_the_same_every_time():
    videos = [f"video {i % 20}" for i in range(100)]
    chosen = script.draw_subset(videos, 12)
    assert len(chosen) == 3 and chosen < set(videos)  # of 5 clips each
    assert chosen == script.draw_subset(videos[::-1], 12) < script.draw_subset(videos, 30)
    assert script.draw_subset(videos, 0) == script.draw_subset(videos, 1000) == set(videos)
    assert len(script.draw_subset(videos, 1)) == 1 and len(script.draw_subset(videos, 11)) == 3


def test_vocabulary_and_statistics_come_from_the_training_clips_alone():
    poses = [np.array([[1, np.nan, np.nan], [3, 5, np.nan]]), np.array([[8, 5, np.nan]])]
    clips = datasets.Dataset.from_list(
        [
            {"key": "", "gloss": gloss, "problem": "", "seconds": seconds, "pose": pose.ravel()}
            for gloss, seconds, pose in zip(
                ["go home cut cut", "Go rare cut"], [2, 1], poses, strict=False
            )
        ],
        features=script.CLIP,
    )
    small(POSE_DIM=3, MAX_GLOSS_LEN=2)
    statistics, vocabulary = script.training_statistics(clips)
    assert vocabulary == ["<pad>", "<unk>", "GO"]
    assert statistics["mean"].tolist() == [4, 5, 0]
    np.testing.assert_allclose(statistics["seen"], [1, 2 / 3, 0])  # of the 3 frames
    np.testing.assert_allclose(statistics["std"], [np.std([1, 3, 8]), 1, 1], rtol=1e-6)
    assert statistics["seconds_per_gloss"] == 0.75
    tokenizer = script.gloss_tokenizer(vocabulary)
    text = script.tokenize(tokenizer, ["go! unheard", "go go go go go"], 3)
    assert text["input_ids"].tolist() == [[2, 1, 0], [2, 2, 2]]
    assert text["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


# ---- the archive


@pytest.mark.parametrize("parts", [1, 2, 3, 600])
def test_parts_are_read_as_one_zip(tmp_path, parts):
    clips = clips_of(*UIDS[:3])
    read = script.open_poses(write_parts(tmp_path / "parts", zipped(clips), parts), None).read
    assert {
        uid: read(uid) for uid in reversed(clips)
    } == clips  # with 600 parts, all of the zip crosses borders
    with pytest.raises(script.BadClip, match="no .pose file"):
        read("nobody")


def test_uids_may_be_numbers(tmp_path):
    found = load(
        write_isign(
            tmp_path / "isign", [(i, "go") for i in range(9)], clips_of(*map(str, range(9)))
        )
    )
    assert len(found["train"]) + len(found["validation"]) == 9


def test_a_row_without_a_uid_is_no_repetition(tmp_path):
    write_table(
        tmp_path / "data",
        {
            "train": [
                {"uid": f"u{i}" if i % 2 else None, "gloss": "go", "pose": TABLE.tolist()}
                for i in range(8)
            ],
            "validation": [{"gloss": "go", "pose": TABLE.tolist()} for _ in range(3)],
        },
    )
    found = load(str(tmp_path / "data"), POSE_DIM=4)
    assert len(found["train"]) == 8 and len(found["validation"]) == 3


@pytest.mark.parametrize(
    "gloss, words", [(["go", "home"], None), (0, ["0"]), ("go home", ["GO", "HOME"])]
)
def test_glosses_are_text_or_numbers(gloss, words, tmp_path):
    rows = [{"gloss": gloss, "pose": TABLE.tolist()} for _ in range(3)]
    write_table(tmp_path / "data", {"train": rows, "validation": rows})
    with nullcontext() if words else pytest.raises(SystemExit, match="^error: .* gloss or text.*$"):
        found = load(str(tmp_path / "data"), POSE_DIM=4)
        assert [script.split_glosses(gloss) for gloss in found["train"]["gloss"]] == [words] * 3


@pytest.mark.parametrize("move", [0, 320])
def test_poses_in_pixels_end_the_run(move, tmp_path):
    pose = (np.random.default_rng(0).normal(size=(5, 4)) * 30 + move).tolist()
    rows = [{"gloss": "go", "pose": pose} for i in range(6)]
    write_table(tmp_path / "data", {"train": rows, "validation": rows})
    with pytest.raises(SystemExit, match="^error: .*6.*beyond 10 shoulder widths.*$"):
        load(str(tmp_path / "data"), POSE_DIM=4)


def test_local_tables_are_told_apart_and_read_anew(tmp_path):
    """The library's own cache knows a local folder by its name and its README alone."""
    seen = []
    for folder, scale, n in (("a", 1, 3), ("b", 2, 5), ("a", 1, 3), ("a", 3, 3)):
        rows = [{"gloss": "go", "pose": (TABLE * scale).tolist()} for _ in range(n)]
        if seen.count((folder, scale, n)) == 0:
            write_table(tmp_path / folder / "data", {"train": rows, "validation": rows})
        found = load(str(tmp_path / folder / "data"), POSE_DIM=4)["train"]
        np.testing.assert_allclose(found[0]["pose"], (TABLE * scale).ravel(), rtol=1e-6)
        assert len(found) == n
        seen.append((folder, scale, n))


def test_a_folder_whose_files_are_written_anew_is_prepared_anew(tmp_path):
    uids = [f"{i:012x}-1" for i in range(6)]
    folder, poses = (
        write_isign(tmp_path / "isign", [(uid, "go") for uid in uids], {}),
        tmp_path / "poses",
    )
    poses.mkdir()
    seen = []
    for seed in (0, 1, 1):
        for uid in uids * (len(seen) < 2):
            (poses / f"{uid}.pose").write_bytes(pose_bytes(positions(3, seed)))
        seen.append(load(folder, POSES=str(poses))["train"]["pose"][:])
    assert seen[0] != seen[1] == seen[2]


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_a_zip_and_a_folder_of_pose_files(tmp_path, form):
    clips = clips_of(*UIDS[:2])
    path = tmp_path / "poses"
    if form == "zip":
        path.write_bytes(zipped(clips))
    else:
        path.mkdir()
        for uid, data in clips.items():
            (path / f"{uid}.pose").write_bytes(data)
    read = script.open_poses(str(path), None).read
    assert {uid: read(uid) for uid in clips} == clips
    with pytest.raises(script.BadClip):
        read("nobody")


@pytest.mark.parametrize("missing", ["a", "b", "d", "abcd"])
def test_a_missing_part_is_one_line(tmp_path, missing):
    uids = [f"{i:012x}-1" for i in range(24)]
    folder = write_isign(tmp_path / "isign", [(uid, "go") for uid in uids], clips_of(*uids), 4)
    for letter in missing:
        (tmp_path / "isign" / f"iSign-poses_v1.1_part_a{letter}").unlink()
    with pytest.raises(SystemExit, match="^error: .+$"):
        load(folder, MAX_BAD_SHARE=script.MAX_BAD_SHARE)


def test_a_damaged_member_is_left_out_alone(tmp_path):
    clips = clips_of(*UIDS[:3])
    data = bytearray(zipped(clips))
    data[len(data) // 2 : len(data) // 2 + 100] = b"?" * 100
    read = script.open_poses(write_parts(tmp_path, bytes(data), 2), None).read
    assert read(UIDS[0]) == clips[UIDS[0]] and read(UIDS[2]) == clips[UIDS[2]]
    problems = [prepared_clip({"uid": uid}, tmp_path / "*part*")["problem"] for uid in UIDS[:3]]
    assert problems == ["", "damaged in the archive", ""]


# ---- whole data sets


def test_isign_layout_with_the_faults_of_a_real_release(tmp_path, capsys):
    videos = [f"{i:012x}" for i in range(8)] + [f"a-b_c-_d-{i:02}" for i in range(10, 14)]
    uids = [
        f"{video}-{i}" if len(video) == 12 else f"{video}--{i}" for video in videos for i in (1, 2)
    ]
    uids += ["a-b_c-_d-10_w"]
    clips = {uid: pose_bytes(positions(3 + 10 * (i == 4), i)) for i, uid in enumerate(uids)}
    rows = [(uid, f"{script.video_of(uid).replace('-', 'x')} clip") for uid in uids]
    clips.update(
        {
            "cut-1": clips[uids[0]][: -2 * 576 * 16],
            "text-1": b"no pose",
            "blind-1": pose_bytes(positions(3), unseen=SHOULDERS),
        }
    )
    rows += [
        ("cut-1", "a"),
        ("text-1", "b"),
        ("blind-1", "c"),
        ("gone-1", "d"),
        ("gone-2", "e"),
        ("null-1", None),
        ("nan-1", "nan "),
        ("dots-1", " ... "),
        (uids[0], "uid again"),
        (uids[5], "again"),
        (uids[6], "again"),
    ]
    found = load(write_isign(tmp_path / "isign", rows, clips), CONFIG="iSign_v1.1", MAX_GLOSS_LEN=1)
    video = {split: {gloss.split()[0] for gloss in found[split]["gloss"]} for split in found}
    assert (
        len(found["train"]) + len(found["validation"]) == len(uids)
        and not video["train"] & video["validation"]
    )
    assert len(video["train"]) + len(video["validation"]) == len(videos)
    report = capsys.readouterr().out
    assert set(report.split("left out")[1].splitlines()[0].strip().split(", ")) == {
        "3 no text",
        "3 uid twice",
        "2 no .pose file",
        "1 cut short",
        "1 not a readable .pose file",
        "1 no shoulders",
    }
    assert f"{len(found['train'])} train, {len(found['validation'])} validation" in report
    assert "0 videos in both" in report
    assert (
        f"glosses cut      in {len(uids)} sentences" in report
        and "clips resampled  1 of more than 12" in report
    )


@pytest.mark.parametrize("share, stops", [(0.6, False), (0.3, True)])
def test_too_many_bad_clips_end_the_run(tmp_path, share, stops):
    uids = [f"{i:012x}-1" for i in range(80)]
    folder = write_isign(tmp_path / "isign", [(uid, "go") for uid in uids], clips_of(*uids[::2]))
    with pytest.raises(SystemExit, match="^error: .*no .pose file.*$") if stops else nullcontext():
        load(folder, MAX_BAD_SHARE=share, VALIDATION_SHARE=0.5)


@pytest.mark.parametrize("text", [None, "nan ", "..."])
def test_a_split_without_a_usable_row_is_one_line(tmp_path, text):
    uids = [f"{i:012x}-1" for i in range(9)]
    validates = script.split_by_video([script.video_of(uid) for uid in uids], 0.3)
    rows = [(uid, text if script.video_of(uid) in validates else "go") for uid in uids]
    with pytest.raises(
        SystemExit, match=r"^error: no row of the validation split has a text \(.* no text\)$"
    ):
        load(write_isign(tmp_path / "isign", rows, clips_of(*uids)))


def test_limits_draw_whole_videos(tmp_path):
    uids = [f"{i:012x}-{j}" for i in range(8) for j in range(2)]
    folder = write_isign(tmp_path / "isign", [(uid, uid[:12]) for uid in uids], clips_of(*uids))
    found = load(folder, TRAIN_CLIPS=3, VALIDATION_CLIPS=1)
    assert (
        len(found["train"]) == 4
        and len(set(found["train"]["gloss"])) == 2
        and len(found["validation"]) == 2
    )


@pytest.mark.parametrize("validation", ["validation", "val", "dev"])
def test_rows_of_gloss_and_pose_with_official_splits(tmp_path, validation, capsys):
    pose = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    pose[:, 2, 2:] = 0
    pose[:, 3, :2] = np.nan
    write_table(
        tmp_path / "data",
        {
            split: [{"gloss": f"w{i}", "pose": pose[i].tolist()} for i in chosen]
            for split, chosen in (("train", range(4)), (validation, range(4, 6)))
        },
    )
    found = load(str(tmp_path / "data"), POSE_DIM=4)
    assert found["train"]["gloss"][:] == ["w0", "w1", "w2", "w3"] and found["validation"]["gloss"][
        :
    ] == ["w4", "w5"]
    pose[:, 2, 2:] = np.nan
    np.testing.assert_allclose(found["validation"][1]["pose"], pose[5].ravel(), rtol=1e-6)
    statistics, _ = script.training_statistics(found["train"])
    np.testing.assert_allclose(statistics["mean"], np.nanmean(pose[:4], (0, 1)), rtol=1e-4)
    assert "points unseen    20.0 %" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^error: .*POSE_DIM.*$"):
        load(str(tmp_path / "data"), POSE_DIM=6)


# ---- the cache


@pytest.fixture
def isign(tmp_path, monkeypatch):
    """A folder of 12 clips; chunks of 4."""
    monkeypatch.setattr(script, "SHARD", 4)
    uids = [f"{i:012x}-1" for i in range(12)]
    return write_isign(tmp_path / "isign", [(uid, f"word {uid}") for uid in uids], clips_of(*uids))


@pytest.fixture
def prepared(monkeypatch):
    """The uids of the clips that are prepared, as they are."""
    uids, prepare_clip = [], script.prepare_clip
    monkeypatch.setattr(
        script,
        "prepare_clip",
        lambda row, **how: uids.append(row["uid"]) or prepare_clip(row, **how),
    )
    return uids


def again(prepared, *arguments, **changes):
    """What another run prepares."""
    prepared.clear()
    script.open_poses.cache_clear()
    load(*arguments, **changes)
    return len(prepared)


def test_clips_are_prepared_once(isign, prepared, tmp_path):
    first = load(isign)
    assert len(set(prepared)) == len(prepared) == 12
    assert again(prepared, isign) == 0
    assert again(prepared, isign, MAX_FRAMES=3) == 12 and again(prepared, isign, MAX_FRAMES=3) == 0
    assert again(prepared, isign, FPS=10) == 12
    assert again(prepared, isign, VALIDATION_SHARE=0.6) == 0
    write_parts(
        tmp_path / "isign",
        zipped({f"{i:012x}-1": pose_bytes(positions(4, 99)) for i in range(12)}),
        3,
    )
    assert again(prepared, isign) == 12
    assert not np.allclose(load(isign)["train"]["pose"][0], first["train"]["pose"][0])


def test_a_killed_preparation_goes_on_after_the_last_whole_chunk(isign, prepared, monkeypatch):
    count_and_prepare = script.prepare_clip

    def killed(row, **how):
        if len(prepared) == 6:
            raise KeyboardInterrupt
        return count_and_prepare(row, **how)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "prepare_clip", killed)
        load(isign)
    assert len(prepared) == 6 and again(prepared, isign) == 8


def test_the_token_is_not_part_of_the_cache_nor_of_the_output(
    isign, prepared, tmp_path, monkeypatch, capfd
):
    load(isign)
    for name in ("HF_TOKEN", "HUGGINGFACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "hf_verysecret")
        assert again(prepared, isign) == 0
    assert again(prepared, isign, MAX_FRAMES=3) == 12
    files = list((tmp_path / "cache").rglob("*"))
    assert len(files) > 3 and not any("hf_verysecret" in str(path) for path in files)
    assert not any(b"hf_verysecret" in path.read_bytes() for path in files if path.is_file())
    assert "hf_verysecret" not in "".join(capfd.readouterr())


# ---- the hub


def test_the_hub_id_without_a_token_runs_on_the_sample_and_says_so(capsys, monkeypatch):
    sample_rows = script.sample_rows
    monkeypatch.setattr(script, "sample_rows", lambda n, seed: sample_rows(n // 40, seed))
    small()
    clips, name = script.load_clips()
    assert name == "sample data" and len(clips["train"]) == 8 and len(clips["validation"]) == 2
    assert "NO ACCESS TOKEN" in capsys.readouterr().out


@pytest.mark.parametrize(
    "variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"]
)
def test_with_a_token_there_is_no_sample(variable, monkeypatch, capfd):
    monkeypatch.setenv(variable, "hf_verysecret")
    with pytest.raises(SystemExit, match="^error: .*Exploration-Lab/iSign.*$") as error:
        load(script.ISIGN, CONFIG="iSign_v1.1")
    assert "hf_verysecret" not in f"{error.value}{capfd.readouterr()}" and "sample" not in str(
        error.value
    )


def test_the_sample_is_the_same_in_every_run_and_holds_every_point():
    first, second = script.sample_rows(6, 1), script.sample_rows(6, 1)
    assert json.dumps(first[:]) == json.dumps(second[:]) != json.dumps(script.sample_rows(6, 2)[:])
    assert all(
        np.isfinite(np.array(pose)).any(0).all() and np.array(pose).shape[1] == 152
        for pose in first["pose"]
    )


@pytest.mark.parametrize("points, form", [([], "XYC"), (["WRIST"], "XC")])
def test_a_pose_file_without_points_or_without_y_is_not_readable(points, form):
    part = PoseHeaderComponent("LEFT_HAND_LANDMARKS", points, [], [(0, 0, 0)], form)
    header = PoseHeader(0.2, PoseHeaderDimensions(10, 10, 0), [part])
    shape = (4, 1, len(points))
    body = NumPyPoseBody(25, np.ones((*shape, len(form) - 1), np.float32), np.ones(shape))
    file = io.BytesIO()
    Pose(header, body).write(file)
    with pytest.raises(script.BadClip, match="not a readable .pose file"):
        script.read_keypoints(file.getvalue())
