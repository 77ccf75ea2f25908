"""Poses: what is read of .pose files and rows, and where the files are found."""

import io
import re
import struct
import unicodedata
import zipfile

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

UIDS = [f"{i:012x}-1" for i in range(8)]
SHOULDERS = {(POSE, "LEFT_SHOULDER"), (POSE, "RIGHT_SHOULDER")}


def expected(where):
    raw = np.stack([where[point] for point in POINTS], 1)
    shoulders = raw[:, 47:49]
    centre = np.median(shoulders.mean(1), axis=0)
    return (raw - centre) / np.median(np.hypot(*(shoulders[:, 0] - shoulders[:, 1]).T))


def prepared(raw, **settings):
    """A .pose file's bytes or a row's pose -> its pose (T, K, 2) and seconds, or its problem."""
    small(**{"MAX_FRAMES": 96, **settings})
    try:
        return script.prepare_pose(raw)
    except script.BadClip as problem:
        return str(problem)


def clips_of(*uids, frames=4):
    return {uid: pose_bytes(positions(frames, seed)) for seed, uid in enumerate(uids)}


# ---- .pose files


@pytest.mark.parametrize("layout", [576, 586, 553, "shuffled"])
@pytest.mark.parametrize("version", [0.1, 0.2])
def test_points_are_taken_by_name(layout, version):
    where = positions(5)
    keypoints, fps = script.read_keypoints(pose_bytes(where, layout, 29, version))
    assert fps == 29 and keypoints.shape == (5, 76, 2)
    np.testing.assert_allclose(keypoints, expected(where), atol=1e-4)


@pytest.mark.parametrize("sure", [None, 1.0])
def test_what_was_not_seen_is_nan(sure):
    """Some files hold NaN with a confidence above 0, and some (0, 0) with a confidence of 1."""
    where = positions(4)
    where[FACE, "291"][2] = np.nan
    unseen = {(LEFT, "WRIST"), (RIGHT, "PINKY_TIP"), (FACE, "9")}
    keypoints, _ = script.read_keypoints(pose_bytes(where, unseen=unseen, confidence=sure))
    missing = np.isnan(expected(where)).any(-1)
    missing[:, [POINTS.index(point) for point in unseen]] = True
    assert missing.sum() == 13 and (np.isnan(keypoints) == missing[..., None]).all()


def test_points_of_confidence_0_and_points_that_a_file_lacks_are_unseen():
    confidence = np.ones(75)
    confidence[33] = 0  # the wrist of the left hand, behind 33 points of the body
    data = pose_bytes(positions(4), "no face", confidence=confidence)
    missing = np.isnan(script.read_keypoints(data)[0]).all((0, 2))
    assert missing.tolist() == [point == (LEFT, "WRIST") or point[0] == FACE for point in POINTS]


def test_a_confidence_that_is_no_number_is_an_unseen_point():
    confidence = np.ones(576)
    confidence[33 + 61] = np.nan  # of the face, behind 33 points of the body
    keypoints, _ = script.read_keypoints(pose_bytes(positions(4), confidence=confidence))
    assert np.isnan(keypoints).all((0, 2)).nonzero()[0].tolist() == [POINTS.index((FACE, "61"))]


def test_a_clip_has_one_centre_and_one_scale():
    where = positions(9)
    where[POSE, "LEFT_SHOULDER"][4:] += (50, 20)  # the signer turns: this must still be seen
    keypoints, _ = script.read_keypoints(pose_bytes(where))
    moved = {point: 3 * xy + (40, -70) for point, xy in where.items()}
    np.testing.assert_allclose(keypoints, expected(where), atol=1e-4)
    np.testing.assert_allclose(keypoints, script.read_keypoints(pose_bytes(moved))[0], atol=1e-4)
    assert keypoints[4:, 47].mean(0)[0] - keypoints[:4, 47].mean(0)[0] > 0.1


def other_points(names, form="XYC", frames=4):
    """A .pose file of other points than MediaPipe's."""
    part = PoseHeaderComponent("BODY_25", names, [], [(0, 0, 0)], form)
    header = PoseHeader(0.2, PoseHeaderDimensions(10, 10, 0), [part])
    shape = (frames, 1, len(names))
    body = NumPyPoseBody(25, np.ones((*shape, len(form) - 1), np.float32), np.ones(shape))
    file = io.BytesIO()
    Pose(header, body).write(file)
    return file.getvalue()


def nowhere(frames):
    return {point: xy * np.nan for point, xy in positions(frames).items()}


NOT_READABLE = "not a readable .pose file"
FAULTS = {
    "no file at all": (lambda: b"", NOT_READABLE),
    "text": (lambda: b"<html>" * 999, NOT_READABLE),
    "v0.1, cut at a frame": (lambda: pose_bytes(positions(6))[: -2 * 576 * 16], "cut short"),
    "v0.1, cut in a frame": (lambda: pose_bytes(positions(6))[:-12345], "cut short"),
    "v0.1, cut in the header": (lambda: pose_bytes(positions(6))[:1000], NOT_READABLE),
    "v0.2, cut": (lambda: pose_bytes(positions(6), version=0.2)[:-12345], NOT_READABLE),
    "no frames": (lambda: pose_bytes(positions(0)), "no shoulders"),
    "fps 0": (lambda: pose_bytes(positions(3), fps=0), "no frame rate"),
    "fps 1000, as of a webm": (lambda: pose_bytes(positions(3), fps=1000), "no frame rate"),
    "no shoulders": (lambda: pose_bytes(positions(3), unseen=SHOULDERS), "no shoulders"),
    "all NaN": (lambda: pose_bytes(nowhere(3)), "no shoulders"),
    "OpenPose's": (lambda: other_points(["Nose", "Neck"]), "none of MediaPipe's points"),
    "no points": (lambda: other_points([]), NOT_READABLE),
    "no y": (lambda: other_points(["Nose"], "XC"), NOT_READABLE),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_has_a_reason(fault):
    data, reason = FAULTS[fault]
    assert prepared(data()) == reason


def test_a_confidence_above_1_says_nothing_where_the_header_knows_the_frames():
    """As in public files of version 0.2, with up to 8.8. Those of 0.1 are then cut."""
    data = pose_bytes(positions(6), version=0.2, confidence=8.8)
    np.testing.assert_allclose(script.read_keypoints(data)[0], expected(positions(6)), atol=1e-4)
    assert prepared(pose_bytes(positions(6), confidence=8.8)) == "cut short"


def test_only_the_documented_error_comes_out_of_spoiled_files():
    files = [pose_bytes(positions(3), version=version) for version in (0.1, 0.2)]
    rng, problems = np.random.default_rng(0), set()
    for i in range(1500):
        data = bytearray(files[i % 2])
        if rng.random() < 0.3:
            data = data[: rng.integers(0, len(data) + 1)]
        else:
            for place in rng.integers(0, rng.choice([60, 200, 12000, len(data)]), 4):
                data[place] = rng.choice([0, 255, rng.integers(256)])
        try:
            keypoints, fps = script.read_keypoints(bytes(data))
            assert keypoints.shape[1:] == (76, 2) and len(keypoints) < 1000 and fps > 0
        except script.BadClip as problem:
            problems.add(str(problem))
    assert problems >= {NOT_READABLE, "cut short"}


# ---- rows


def test_zero_pairs_nan_and_null_are_unseen():
    pose, _ = prepared([[0, 0, 0, 1], [2, 0, None, 3], None, [5, 6, 4, 3]], POSE_DIM=4)
    unseen = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], bool)
    assert (np.isnan(pose) == unseen[..., None]).all()
    assert pose[0, 1].tolist() == [0, 1] and pose[1, 0].tolist() == [2, 0]


def test_frames_may_be_lists_of_points():
    pose, _ = prepared([[[1, 2], [3, 4]], [[5, 6], [4, 3]]], POSE_DIM=4)
    assert pose.tolist() == [[[1, 2], [3, 4]], [[5, 6], [4, 3]]]


@pytest.mark.parametrize(
    "pose, reason",
    [
        (None, "no table of frames"),
        ([1.0, 2.0], "no table of frames|1 numbers a frame, POSE_DIM is 2"),
        ([[1.0, 2.0], [1.0]], "no table of frames"),
        ("text", "no table of frames"),
        ([[1.0, 2.0, 3.0]], "3 numbers a frame, POSE_DIM is 2"),
        ([[], []], "0 numbers a frame, POSE_DIM is 2"),
        ([], "no table of frames"),
        ([[0.0, 0.0]], "nothing seen"),
        ([None, None], "nothing seen"),
        ([[300.0, 400.0]] * 3, "most points beyond 10 shoulder widths"),
    ],
)
def test_a_row_without_a_usable_pose_is_left_out(pose, reason):
    assert re.fullmatch(reason, prepared(pose, POSE_DIM=2))


def test_a_point_far_out_is_an_error_of_the_detector():
    pose, _ = prepared([[1.0, 2, 3, 99], [1, 2, np.inf, 4]], POSE_DIM=4)
    nan = np.nan
    np.testing.assert_array_equal(pose, [[[1, 2], [nan, nan]], [[1, 2], [nan, nan]]])


# ---- time


@pytest.mark.parametrize(
    "frames, fps, version, expected_frames, seconds",
    [
        (10, 25, 0.1, 10, 0.4),
        (20, 50, 0.1, 10, 0.4),
        (58, 29, 0.1, 50, 2),
        (10, 12.5, 0.2, 20, 0.8),
        (1, 25, 0.1, 1, 0.04),
        (2, 240, 0.1, 1, 1 / 120),
        (300, 25, 0.1, 96, 12),
        (97, 25, 0.1, 96, 3.88),
    ],
)
def test_the_frame_rate_and_at_most_max_frames(frames, fps, version, expected_frames, seconds):
    pose, lasting = prepared(pose_bytes(positions(frames), fps=fps, version=version))
    assert len(pose) == expected_frames and lasting == pytest.approx(seconds)


@pytest.mark.parametrize("fps, frames", [(25, 50), (12.5, 25), (50, 96)])
def test_a_rows_pose_has_25_frames_a_second_whatever_fps_is(fps, frames):
    pose, seconds = prepared(np.ones((50, 4)).tolist(), FPS=fps, POSE_DIM=4)
    assert (len(pose), seconds) == (frames, 2)


def test_a_long_clip_is_resampled_over_all_its_length():
    path = np.linspace(1, 5, 201)[:, None] * np.ones(4)
    pose, seconds = prepared(path.tolist(), MAX_FRAMES=21, POSE_DIM=4)
    wanted = np.linspace(1, 5, 21)[:, None, None] * np.ones((2, 2))
    np.testing.assert_allclose(pose, wanted, atol=1e-6)
    assert seconds == pytest.approx(201 / 25)


def test_resample_interpolates_and_takes_the_nearest_frame_beside_unseen_ones():
    path = np.array([0.0, 10, np.nan, 30, 40])[:, None, None] * np.ones((1, 2))
    more = script.resample(path, 9)[:, 0, 0]
    np.testing.assert_array_equal(more[[0, 1, 2, 4, 6, 7, 8]], [0, 5, 10, np.nan, 30, 35, 40])
    some = script.resample(path, 17)[[5, 7, 8, 9, 11], 0, 0]
    np.testing.assert_array_equal(some, [10, np.nan, np.nan, np.nan, 30])
    assert script.resample(path[:1], 3)[:, 0, 0].tolist() == [0, 0, 0]
    assert script.resample(path, 1)[0, 0, 0] == 0


@pytest.mark.parametrize("padding", [[0.0] * 4, [np.nan] * 4, None])
def test_padding_of_a_fixed_shape_is_no_part_of_a_clip(padding):
    seen = [[1.0, 2, 3, 4], [0, 0, 5, 6], [0.0] * 4, [1, 1, 1, 1]]
    pose, seconds = prepared([padding] * 2 + seen + [padding] * 30, POSE_DIM=4)
    assert len(pose) == 4 and seconds == pytest.approx(4 / 25)
    assert np.isnan(pose[2]).all() and pose[3].tolist() == [[1, 1], [1, 1]]


def test_frames_that_show_nothing_at_the_ends_of_a_file_are_no_part_of_the_clip():
    where = positions(9)
    for xy in where.values():
        xy[[0, 1, 4, 8]] = 0
    pose, seconds = prepared(pose_bytes(where))
    assert len(pose) == 6 and seconds == pytest.approx(6 / 25)
    assert np.isnan(pose[2]).all() and np.isfinite(pose[[0, 1, 3, 4, 5]]).all()


# ---- where files are found


def read_all(place, uids):
    """{uid: its file's bytes, or why there is none}, by threads' groups."""
    small(POSES=str(place))
    source = script.find_poses("nothing", {"train": script.datasets.Dataset.from_dict({"uid": []})})
    rows = [script.Row(uid, "go", None, "train", i) for i, uid in enumerate(uids)]
    found = {}
    for group in source.groups(rows):
        found.update(zip([row.uid for row in group], source.read(group), strict=True))
    return {uid: data if isinstance(data, bytes) else str(data) for uid, data in found.items()}


@pytest.mark.parametrize("parts", [1, 2, 3, 600])
def test_parts_are_read_as_one_zip(tmp_path, parts):
    """With 600 parts each member lies across borders."""
    clips = clips_of(*UIDS[:3])
    place = write_parts(tmp_path / "parts", zipped(clips), parts)
    wanted = {**clips, "nobody": "no .pose file"}
    assert read_all(place, reversed(wanted)) == wanted


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_a_zip_and_a_folder_of_pose_files(tmp_path, form):
    clips = clips_of(*UIDS[:3])
    place = tmp_path / "poses"
    if form == "zip":
        place.write_bytes(zipped(clips))
    else:
        place.mkdir()
        for uid, data in clips.items():
            (place / f"{uid}.pose").write_bytes(data)
            (place / f"{uid}.json").write_text("{}")
    wanted = {**clips, "nobody": "no .pose file"}
    assert read_all(place, wanted) == wanted


def write_named(folder, form, files):
    """{path: bytes} -> a zip or a folder of them."""
    if form == "zip":
        with zipfile.ZipFile(folder / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path, data in files.items():
                archive.writestr(path, data)
        return folder / "all.zip"
    for path, data in files.items():
        file = folder / "poses" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return folder / "poses"


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_two_files_of_one_name_are_told_apart_by_their_paths_or_ambiguous(form, tmp_path):
    names = ["train/0001", "validation/0001", "deep/down/0002", "0003", "other/0003"]
    files = {f"{name}.pose": data for name, data in clips_of(*names).items()}
    found = read_all(
        write_named(tmp_path, form, files),
        ["train/0001", "validation/0001", "0001", "0002", "down/0002", "0003", "n/0003"],
    )
    assert found == {
        "train/0001": files["train/0001.pose"],
        "validation/0001": files["validation/0001.pose"],
        "0001": "ambiguous name",
        "0002": files["deep/down/0002.pose"],
        "down/0002": files["deep/down/0002.pose"],
        "0003": files["0003.pose"],  # a whole path
        "n/0003": "no .pose file",
    }


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_uids_are_found_however_they_are_written(form, tmp_path):
    nfc = "caf\u00e9"
    files = {f"{nfc}.pose": pose_bytes(positions(2)), "b.pose": pose_bytes(positions(3))}
    uids = {unicodedata.normalize("NFD", nfc): nfc, "b.pose": "b", "b ": "b", " b.pose ": "b"}
    found = read_all(write_named(tmp_path, form, files), uids)
    assert found == {uid: files[f"{name}.pose"] for uid, name in uids.items()}


def load_isign(folder, clips, **settings):
    """iSign's layout -> the error or the counts of what was left out."""
    rows = [(uid, f"word {uid}") for uid in UIDS]
    small(DATASET=write_isign(folder, rows, clips, 4), **settings)
    return script.load_clips()


def test_what_is_not_found_is_counted_with_the_name_that_was_looked_for(tmp_path, capsys):
    load_isign(tmp_path / "data", clips_of(*UIDS[1:]))
    said = f"left out         1 no .pose file (such as {UIDS[0]}.pose)\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("share, stops", [(0.6, False), (0.3, True)])
def test_too_many_bad_clips_end_the_run(share, stops, tmp_path, capsys):
    rows = [(f"{i:012x}-1", "go") for i in range(80)]
    clips = clips_of(*(uid for uid, _ in rows[::2]))
    small(DATASET=write_isign(tmp_path / "isign", rows, clips), MAX_BAD_SHARE=share)
    if stops:
        with pytest.raises(SystemExit, match=r"^error: \d+ of \d+ train clips .*no .pose file.*$"):
            script.load_clips()
    else:
        script.load_clips()


# ---- archives that are damaged


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_as_they_are_and_deflated(method, tmp_path):
    clips = clips_of(*UIDS)
    with zipfile.ZipFile(tmp_path / "all.zip", "w", method) as archive:
        for uid, data in clips.items():
            archive.writestr(f"{uid}.pose", data)
    assert read_all(tmp_path / "all.zip", UIDS) == clips


@pytest.mark.parametrize(
    "field, value", [("method", 9), ("method", zipfile.ZIP_LZMA), ("flags", 1)]
)
def test_other_compressions_and_encryption_are_named(field, value, tmp_path):
    data = bytearray(zipped(clips_of(*UIDS)))
    local, central = {"method": (8, 10), "flags": (6, 8)}[field]
    for signature, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        at = data.find(signature)
        while at >= 0:
            struct.pack_into("<H", data, at + offset, value)
            at = data.find(signature, at + 4)
    (tmp_path / "all.zip").write_bytes(data)
    found = read_all(tmp_path / "all.zip", UIDS)
    assert set(found.values()) == {"encrypted or compressed in an unknown way"}


def test_a_damaged_member_is_left_out_alone(tmp_path):
    clips = clips_of(*UIDS[:3])
    data = bytearray(zipped(clips))
    data[len(data) // 2 : len(data) // 2 + 100] = b"?" * 100
    found = read_all(write_parts(tmp_path, bytes(data), 2), UIDS[:3])
    assert found == {**clips, UIDS[1]: "damaged in the archive"}


def test_a_member_that_is_too_large_is_not_read(tmp_path):
    data = bytearray(zipped(clips_of(*UIDS[:3])))
    entry = data.index(UIDS[1].encode(), data.index(b"PK\x01\x02"))
    start = data.rindex(b"PK\x01\x02", 0, entry)
    data[start + 24 : start + 28] = b"\xf0\xff\xff\xff"  # the directory says 4 GB
    (tmp_path / "all.zip").write_bytes(data)
    assert read_all(tmp_path / "all.zip", UIDS[:3])[UIDS[1]] == "too large"


def lose(letter):
    return lambda folder: (folder / f"iSign-poses_v1.1_part_a{letter}").unlink()


def swap(folder):
    first, second = folder / "iSign-poses_v1.1_part_ab", folder / "iSign-poses_v1.1_part_ac"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def empty(folder):
    for path in folder.glob("*part*"):
        path.unlink()


PARTS = {
    "two are swapped": (swap, "damaged in the archive"),
    "the first is missing": (lose("a"), "a part is missing"),
    "the second is missing": (lose("b"), "a part is missing"),
    "the last is missing": (lose("d"), "is no zip, or not all of it"),
    "all are missing": (empty, "no poses at .*part_"),
}


@pytest.mark.parametrize("fault", PARTS)
def test_parts_that_do_not_fit_end_the_run_with_one_line(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(script.time, "sleep", None)  # nothing on a disk gets better by waiting
    spoil, words = PARTS[fault]
    rows = [(uid, "go") for uid in UIDS]
    folder = write_isign(tmp_path / "data", rows, clips_of(*UIDS, frames=30), 4)
    spoil(tmp_path / "data")
    small(DATASET=folder, MAX_BAD_SHARE=0.2)
    with pytest.raises(SystemExit) as ended:
        script.load_clips()
    assert re.match(f"error: .*({words})", ended.value.code) and "\n" not in ended.value.code
