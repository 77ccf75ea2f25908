"""Poses: what is read of .pose files and rows, and where the files are found."""

import io
import os
import re
import struct
import unicodedata
import zipfile

import numpy as np
import pytest
from helpers import FACE, LEFT, POINTS, clips_of, pose_bytes, positions, small, write_parts, zipped
from numpy.testing import assert_allclose
from pose_format import Pose
from pose_format.numpy import NumPyPoseBody
from pose_format.pose_header import PoseHeader, PoseHeaderComponent, PoseHeaderDimensions

import model_selection as script

UIDS = [f"{i:012x}-1" for i in range(8)]
SHOULDERS = {*POINTS[47:49]}


def expected(where):
    raw = np.stack([where[point] for point in POINTS], 1)
    shoulders = raw[:, 47:49]
    centre = np.median(shoulders.mean(1), axis=0)
    return (raw - centre) / np.median(np.hypot(*(shoulders[:, 0] - shoulders[:, 1]).T))


def prepared(raw, **settings):
    """A .pose file's bytes or a row's pose -> its pose (T, K, 2) and seconds, or its problem."""
    small(**{"MAX_FRAMES": 96, **settings})
    try:
        return script.prepare_pose(raw)[:2]
    except script.BadClip as problem:
        return str(problem)


def keypoints_of(data):
    return script.read_keypoints(data)[0]


@pytest.mark.parametrize("layout", [576, 586, 553, "shuffled"])
@pytest.mark.parametrize("version, confidence", [(0.1, None), (0.2, 8.8)])
def test_points_are_taken_by_name(layout, version, confidence):
    """Public files of version 0.2 have confidences up to 8.8. Those of 0.1 are then cut."""
    where = positions(5)
    data = pose_bytes(where, layout, 30, version, confidence=confidence)
    keypoints, fps, people = script.read_keypoints(data)
    assert fps == 30 and people == 1 and keypoints.shape == (5, 76, 2)
    assert_allclose(keypoints, expected(where), atol=1e-4)


@pytest.mark.parametrize("sure", [None, 1.0])
def test_what_was_not_seen_is_nan(sure):
    """Some files hold NaN with a confidence above 0, and some (0, 0) with a confidence of 1."""
    where = positions(4)
    where[FACE, "291"][2] = np.nan
    unseen = {(LEFT, "WRIST"), (LEFT, "PINKY_TIP"), (FACE, "9")}
    keypoints = keypoints_of(pose_bytes(where, unseen=unseen, confidence=sure))
    missing = np.isnan(expected(where)).any(-1)
    missing[:, [POINTS.index(point) for point in unseen]] = True
    assert missing.sum() == 13 and (np.isnan(keypoints) == missing[..., None]).all()


@pytest.mark.parametrize("layout, unsure", [("no face", 0), (576, np.nan)])
def test_points_without_confidence_and_points_that_a_file_lacks_are_unseen(layout, unsure):
    confidence = np.ones(75 if layout == "no face" else 576)
    confidence[33] = unsure  # the left hand's wrist, or the face's first, after the body's 33
    missing = np.isnan(keypoints_of(pose_bytes(positions(4), layout, confidence=confidence)))
    wanted = [point == (LEFT, "WRIST") or point[0] == FACE for point in POINTS]
    if layout == 576:
        wanted = [point == (FACE, "0") for point in POINTS]
    assert missing.all((0, 2)).tolist() == wanted


def test_a_clip_has_one_centre_and_one_scale():
    where = positions(9)
    where[POINTS[47]][4:] += (50, 20)  # the signer turns: this must still be seen
    keypoints = keypoints_of(pose_bytes(where))
    moved = {point: 3 * xy + (40, -70) for point, xy in where.items()}
    assert_allclose(keypoints, expected(where), atol=1e-4)
    assert_allclose(keypoints, keypoints_of(pose_bytes(moved)), atol=1e-4)
    assert keypoints[4:, 47].mean(0)[0] - keypoints[:4, 47].mean(0)[0] > 0.1


def test_coordinates_of_0_to_1_are_of_the_headers_width_and_height():
    where = positions(6)
    shares = {point: (xy + (0, 400)) / (640, 1000) for point, xy in where.items()}
    data = bytearray(pose_bytes(shares))
    struct.pack_into("<HHH", data, 4, 640, 1000, 0)
    assert_allclose(keypoints_of(bytes(data)), expected(where), atol=1e-4)
    widths = {point: (xy - (300, 300)) / 200 for point, xy in where.items()}  # of shoulders
    assert_allclose(keypoints_of(pose_bytes(widths)), expected(where), atol=1e-4)


WRONG = "mirrored, turned or upside down"
LIES = {
    "as it should": ([[1, 0], [0, 1]], None),
    "leaning": ([[0.9, 0.4], [-0.4, 0.9]], None),
    "mirrored": ([[-1, 0], [0, 1]], WRONG),
    "y points up": ([[1, 0], [0, -1]], WRONG),
    "upside down": ([[-1, 0], [0, -1]], WRONG),
    "turned": ([[0, 1], [-1, 0]], WRONG),
}


@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("form", ["file", "row", "without a nose"])
def test_a_clip_that_lies_otherwise_is_left_out(lies, form):
    turn, problem = LIES[lies]
    row = np.array(script.sample_rows(1, 1)[0]["pose"]).reshape(-1, 76, 2)[:40]
    where = {point: 300 + 90 * row[:, i] @ turn for i, point in enumerate(POINTS)}
    where = positions(len(row)) | where
    raw = np.stack([where[point] for point in POINTS], 1)
    raw[3] = raw[3, ::-1]  # a frame of its own is no matter
    if form == "without a nose":
        raw[:, 42], problem = np.nan, None
    found = prepared(pose_bytes(where) if form == "file" else raw.reshape(-1, 152).tolist())
    assert found == problem if problem else isinstance(found, tuple)


def written(header, data, confidence):
    file = io.BytesIO()
    Pose(header, NumPyPoseBody(25, data, confidence)).write(file)
    return file.getvalue()


def test_of_several_people_the_one_seen_in_most_frames_is_taken():
    signer, passer_by = positions(9, 1), positions(9, 2)
    for xy in passer_by.values():
        xy[5:] = 0
    nobody = {point: xy * 0 for point, xy in signer.items()}
    for people, seen in (((passer_by, signer), 2), ((nobody, signer), 1), ((signer, nobody), 1)):
        poses = [Pose.read(pose_bytes(where, version=0.2)) for where in people]
        data = np.concatenate([pose.body.data.data for pose in poses], 1)
        confidence = np.concatenate([pose.body.confidence for pose in poses], 1)
        keypoints, _, n = script.read_keypoints(written(poses[0].header, data, confidence))
        assert n == seen
        assert_allclose(keypoints, expected(signer), atol=1e-4)


def other_points(names):
    """A .pose file of other points than MediaPipe's."""
    part = PoseHeaderComponent("BODY_25", names, [], [(0, 0, 0)], "XYC")
    header = PoseHeader(0.2, PoseHeaderDimensions(10, 10, 0), [part])
    data = np.ones((4, 1, len(names), 2), np.float32)
    return written(header, data, data[..., 0])


NOWHERE = {point: xy * np.nan for point, xy in positions(3).items()}
NOT_READABLE = "not a readable .pose file"
FAULTS = {
    "no file at all": (b"", NOT_READABLE),
    "v0.1, cut at a frame": (pose_bytes(positions(6))[: -2 * 576 * 16], "cut short"),
    "v0.1, cut in a frame": (pose_bytes(positions(6))[:-12345], "cut short"),
    "v0.1, with confidences above 1": (pose_bytes(positions(6), confidence=8.8), "cut short"),
    "v0.2, cut": (pose_bytes(positions(6), version=0.2)[:-12345], NOT_READABLE),
    "no frames": (pose_bytes(positions(0)), "no shoulders"),
    "fps 0": (pose_bytes(positions(3), fps=0), "no frame rate"),
    "fps 1000, as of a webm": (pose_bytes(positions(3), fps=1000), "no frame rate"),
    "no shoulders": (pose_bytes(positions(3), unseen=SHOULDERS), "no shoulders"),
    "all NaN": (pose_bytes(NOWHERE), "no shoulders"),
    "OpenPose's": (other_points(["Nose", "Neck"]), "none of MediaPipe's points"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_has_a_reason(fault):
    data, reason = FAULTS[fault]
    assert prepared(data) == reason


def test_zero_pairs_nan_and_null_are_unseen_and_frames_may_be_lists_of_points():
    pose, _ = prepared([[0, 0, 0, 1], [2, 0, None, 3], None, [5, 6, 4, 3]], POSE_DIM=4)
    unseen = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], bool)
    assert (np.isnan(pose) == unseen[..., None]).all()
    assert pose[0, 1].tolist() == [0, 1] and pose[1, 0].tolist() == [2, 0]
    points = [[[1, 2], [3, 4]], [[5, 6], [4, 3]]]
    assert prepared(points, POSE_DIM=4)[0].tolist() == points
    pose, _ = prepared([[1.0, 2, 3, 99], [1, 2, np.inf, 4]], POSE_DIM=4)  # a detector's errors
    np.testing.assert_array_equal(pose, [[[1, 2], [np.nan, np.nan]]] * 2)


@pytest.mark.parametrize("unit, shift", [(1, 0), (300, 700), (0.2, 0.5)])
def test_rows_in_any_unit_are_the_same_clip(unit, shift):
    """Shoulder widths, pixels, 0 to 1."""
    row = np.array(script.sample_rows(1, 1)[0]["pose"])
    (wanted, _), (pose, _) = prepared(row), prepared((row * unit + shift).tolist())
    assert_allclose(pose, wanted, atol=1e-3)
    left, right = np.nanmedian(pose[:, script.SHOULDERS], 0)
    assert_allclose([left - right, left + right], [[1, 0], [0, 0]], atol=0.01)
    row[:, 94:96] = np.nan
    assert prepared(row) == "no shoulders"


NO_TABLE = "no table of frames"


@pytest.mark.parametrize(
    "pose, reason",
    [(None, NO_TABLE), ([1.0, 2.0], f"{NO_TABLE}|1 numbers a frame, POSE_DIM is 2")]
    + [([[1.0, 2.0], [1.0]], NO_TABLE), ("text", NO_TABLE), ([], NO_TABLE)]
    + [([[1.0, 2.0, 3.0]], "3 numbers a frame, POSE_DIM is 2")]
    + [([[0.0, 0.0]], "nothing seen"), ([None, None], "nothing seen")]
    + [([[300.0, 400.0]] * 3, "most points beyond 10 shoulder widths")],
)
def test_a_row_without_a_usable_pose_is_left_out(pose, reason):
    assert re.fullmatch(reason, prepared(pose, POSE_DIM=2))


@pytest.mark.parametrize(
    "frames, fps, version, expected_frames, seconds",
    # version 0.1 stores 29.97, 23.976 and 59.94 as whole numbers
    [(60, 29, 0.1, 50, 2.002), (48, 23, 0.1, 50, 2.002), (60, 59, 0.1, 25, 1.001)]
    + [(58, 29, 0.2, 50, 2), (10, 12.5, 0.2, 20, 0.8), (10, 25, 0.1, 10, 0.4)]
    + [(1, 25, 0.1, 1, 0.04), (2, 240, 0.1, 1, 1 / 120), (300, 25, 0.1, 96, 12)],
)
def test_the_frame_rate_and_at_most_max_frames(frames, fps, version, expected_frames, seconds):
    pose, lasting = prepared(pose_bytes(positions(frames), fps=fps, version=version))
    assert len(pose) == expected_frames and lasting == pytest.approx(seconds)


@pytest.mark.parametrize("fps, frames", [(25, 50), (12.5, 25), (50, 96)])
def test_a_rows_pose_has_25_frames_a_second_whatever_fps_is(fps, frames):
    pose, seconds = prepared(np.ones((50, 4)).tolist(), FPS=fps, POSE_DIM=4)
    assert (len(pose), seconds) == (frames, 2)


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


def read_all(place, uids):
    """{uid: its file's bytes, or why there is none}, by threads' groups."""
    small(POSES=str(place))
    source = script.find_poses(".", {"train": script.datasets.Dataset.from_dict({"uid": []})})
    rows = [script.Row(uid, "go", None, "train", i) for i, uid in enumerate(uids)]
    found = {}
    for group in source.groups(rows):
        found.update(zip([row.uid for row in group], source.read(group), strict=True))
    return {uid: data if isinstance(data, bytes) else str(data) for uid, data in found.items()}


def write_named(folder, form, files):
    """{path: bytes} -> a zip, of members as they are, or a folder of them."""
    if form == "zip":
        with zipfile.ZipFile(folder / "all.zip", "w") as archive:
            for path, data in files.items():
                archive.writestr(path, data)
        return folder / "all.zip"
    for path, data in files.items():
        file = folder / "poses" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return folder / "poses"


@pytest.mark.parametrize("parts", [1, 2, 3, 600])
def test_parts_are_read_as_one_zip(tmp_path, parts):
    """With 600 parts each member lies across borders."""
    clips = clips_of(*UIDS[:3])
    place = write_parts(tmp_path / "parts", zipped(clips), parts)
    wanted = {**clips, "nobody": "no .pose file"}
    assert read_all(place, reversed(wanted)) == wanted


def test_members_after_4_gib_of_an_archive_are_read(tmp_path):
    (uid, data), *_ = clips_of(UIDS[0]).items()
    with open(tmp_path / "all.zip", "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("first.pose", data)
        file.seek(5 * 2**30)  # a hole, which takes no room on the disk
        archive.start_dir = file.tell()
        archive.writestr(f"{uid}.pose", data)
    assert os.stat(tmp_path / "all.zip").st_size > 5 * 2**30
    assert read_all(tmp_path / "all.zip", [uid]) == {uid: data}  # the first would read the hole


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_files_are_told_apart_by_their_paths_and_found_however_they_are_written(form, tmp_path):
    nfc = "caf\u00e9"
    names = ["train/0001", "validation/0001", "deep/down/0002", "0003", "other/0003", nfc, "b"]
    files = {f"{name}.pose": data for name, data in clips_of(*names).items()}
    wanted = {name: files[f"{name}.pose"] for name in (*names, "deep/down/0002")}
    wanted |= {"0002": files["deep/down/0002.pose"], "0001": "ambiguous name"}
    wanted |= dict.fromkeys(("down/0002", "n/0003", "nobody"), "no .pose file")
    wanted |= {unicodedata.normalize("NFD", nfc): files[f"{nfc}.pose"]}
    wanted |= dict.fromkeys(["b.pose", "b ", " b.pose "], files["b.pose"])
    place = write_named(tmp_path, form, {**files, "b.json": b"{}"})
    assert read_all(place, wanted) == wanted


def test_links_are_followed_and_one_that_leads_nowhere_is_no_file(tmp_path):
    clips = clips_of(*UIDS[:2])
    elsewhere = write_named(tmp_path, "folder", {f"{UIDS[0]}.pose": clips[UIDS[0]]})
    place = tmp_path / "linked"
    place.mkdir()
    (place / "more").symlink_to(elsewhere)
    (place / "dead.pose").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_bytes(clips[UIDS[1]])
    (place / f"{UIDS[1]}.pose").symlink_to(tmp_path / "file")
    wanted = {**clips, f"more/{UIDS[0]}": clips[UIDS[0]], "dead": "no .pose file"}
    assert read_all(place, wanted) == wanted
    (place / "round").symlink_to(place)
    assert read_all(place, [UIDS[1]]) == {UIDS[1]: clips[UIDS[1]]}


# ---- archives that are damaged


@pytest.mark.parametrize("compression", [9, zipfile.ZIP_LZMA])
def test_what_is_compressed_in_another_way_is_left_out(compression, tmp_path):
    data = bytearray(zipped(clips_of(*UIDS)))
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        for found in re.finditer(re.escape(signature), bytes(data)):
            struct.pack_into("<H", data, found.start() + offset, compression)
    (tmp_path / "all.zip").write_bytes(data)
    found = read_all(tmp_path / "all.zip", UIDS)
    assert set(found.values()) == {"damaged in the archive"}


BAD_PARTS = {  # which are there, in which order
    "acbd": "damaged in the archive",
    " bcd": "a part is missing",
    "a cd": "a part is missing",
    "abc ": "is no zip, or not all of it",
    "    ": "no poses at .*part_",
}


@pytest.mark.parametrize("left", BAD_PARTS)
def test_parts_that_do_not_fit_are_told(left, tmp_path, monkeypatch):
    monkeypatch.setattr(script.time, "sleep", None)  # nothing on a disk gets better by waiting
    place = write_parts(tmp_path, zipped(clips_of(*UIDS, frames=30)), 4)
    paths = sorted(tmp_path.glob("iSign*"))
    parts = {"abcd"[i]: path.read_bytes() for i, path in enumerate(paths)}
    for path, letter in zip(paths, left, strict=True):
        path.unlink()
        if letter in parts:
            path.write_bytes(parts[letter])
    if left == "acbd":
        assert BAD_PARTS[left] in read_all(place, UIDS).values()
    else:
        with pytest.raises(SystemExit, match=f"^error: .*{BAD_PARTS[left]}.*$"):
            read_all(place, UIDS)
