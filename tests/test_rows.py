"""From the data set's tables to the rows that are used: texts, uids, videos, splits, the report."""

import csv
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import change, pose_bytes, positions, shrink_sample, small, write_isign
from numpy.testing import assert_allclose

import model_selection as script
import train_final_model

POSE = np.random.default_rng(0).normal(size=(5, 4)).round(3).tolist()  # 5 frames of two points


def load(dataset, **settings):
    small(DATASET=str(dataset), **settings)
    return script.load_clips()[0]


def line(dataset, **settings):
    """The line that a run with this data ends with."""
    with pytest.raises(SystemExit) as ended:
        load(dataset, **settings)
    said = ended.value.code
    assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said
    return said


def poses(n):
    """n poses, each another one."""
    return [(np.array(POSE) + i / 20).tolist() for i in range(n)]


def rows_of(n, gloss="go", **columns):
    return [{"gloss": gloss, "pose": pose, **columns} for pose in poses(n)]


def write_rows(folder, train, validation=None):
    """Rows of gloss and pose as jsonl files -> the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", train), ("validation", validation)):
        if part is not None:
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{split}.jsonl").write_text(text)
    return folder


def write_csv(folder, rows, header=("uid", "text")):
    """A train.csv, and a folder of its own with a .pose file for each uid -> the folder."""
    folder.mkdir()
    with open(folder / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    (folder / "poses").mkdir()
    for seed, (uid, *_) in enumerate(rows):
        if uid and "/" not in uid:
            (folder / "poses" / f"{uid}.pose").write_bytes(pose_bytes(positions(3, seed)))
    change(POSES="poses")
    return folder


def report(capsys, name):
    """What a line of the report says."""
    out = capsys.readouterr().out
    return {line[:19].strip(): line[19:] for line in out.splitlines()}[name]


def glosses(clips):
    return sorted(clips["train"].glosses + clips["validation"].glosses)


# ---- text


@pytest.mark.parametrize(
    "text, words",
    [
        ("Where's the house?", ["Where's", "the", "house"]),
        ("  a,  B.\n(c) ", ["a", "B", "c"]),
        ("?! ... -", []),
        ("", []),
        ("cafe\u0301", ["caf\u00e9"]),
        ("go 😀!", ["go", "😀"]),
        ("नमस्ते, दुनिया।", ["नमस्ते", "दुनिया"]),
        ("¿Cómo? حالك؟ 学校。 go\u2010", ["Cómo", "حالك", "学校", "go"]),
        ("\ufeffgo \u200bhome\u200d. \u200e(now)\u200c", ["go", "home", "now"]),
        ("क\u094d\u200dष \u200b", ["क\u094d\u200dष"]),  # within a word a joiner has a meaning
    ],
)
def test_words_lose_the_marks_at_their_ends(text, words):
    assert script.split_words(text) == words
    assert script.split_glosses(text) == [word.upper() for word in words]


def test_uids_and_texts_of_a_csv_are_texts(tmp_path, capsys):
    uids = ["001", "1", "1e5", "0x10", "1.0", "NA", "null", "None", "nan", "-0"]
    folder = write_csv(tmp_path / "data", [(uid, f"uid{uid}") for uid in uids])
    assert glosses(load(folder, POSES="poses")) == sorted(f"uid{uid}" for uid in uids)
    assert report(capsys, "left out") == "none"


def test_words_for_nothing_are_texts_and_nothing_is_none(tmp_path, capsys):
    texts = ["NA", "null", 'a "quoted" word', "two\nlines", "1e5", "007", "True"]
    none = ["nan", "nan ", "", " ", "..."]
    rows = [(f"u{i}", text) for i, text in enumerate(texts + none)]
    folder = write_csv(tmp_path / "data", rows)
    assert glosses(load(folder, POSES="poses")) == sorted(texts)
    assert report(capsys, "left out") == "5 no text"


def test_a_comma_at_the_end_of_each_row_shifts_no_column(tmp_path):
    folder = write_csv(tmp_path / "data", [(f"u{i}", f"word{i}", "") for i in range(8)])
    assert glosses(load(folder, POSES="poses")) == [f"word{i}" for i in range(8)]


@pytest.mark.parametrize("first", [1, 2, 9])
def test_a_comma_without_quotes_cuts_no_text(first, tmp_path):
    folder = write_csv(tmp_path / "data", [(f"u{i}", "go") for i in range(10)])
    rows = [f"u{i},go" + ", home" * (i >= first - 1) for i in range(10)]
    (folder / "train.csv").write_text("\n".join(["uid,text", *rows]) + "\n")
    said = line(folder, POSES="poses")
    assert "a comma needs quotes" in said or f"Expected 2 fields in line {first + 1}, saw 3" in said


def test_10000_rows_of_nothing_do_not_make_a_column_of_numbers(tmp_path):
    small(DATASET=str(write_csv(tmp_path / "data", [("", "")] * 10_000 + [("u", "home")])))
    _, rows = script.list_rows("data", script.load_tables(script.DATASET)[0])
    assert [rows[-1].uid, rows[-1].gloss, rows[0].gloss] == ["u", "home", ""]


def test_a_quote_that_swallows_rows_is_reported(tmp_path, capsys):
    folder = write_csv(tmp_path / "data", [(f"u{i}", "go") for i in range(10)])
    rows = [f"u{i},go" for i in range(10)]
    rows[2], rows[5] = 'u2,"go', 'u5,home"'
    (folder / "train.csv").write_text("\n".join(["uid,text", *rows]) + "\n")
    assert len(glosses(load(folder, POSES="poses"))) == 7
    assert report(capsys, "line breaks").startswith("in 1 texts: a quote left open")


TABLES = {
    "latin-1": ("uid,text\na,caf\u00e9\n".encode("latin-1"), "'utf-8' codec can't decode"),
    "empty": (b"", "No columns to parse from file"),
    "null glosses": (b"uid,text\n" + b"a,\n" * 4, "no row of the train split has a text (4 no"),
    "no columns of ours": (b"name,words\na,b\n", "it has train with name, words"),
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_cannot_be_used_says_why(table, tmp_path):
    data, words = TABLES[table]
    folder = write_csv(tmp_path / "data", [("a", "go"), ("b", "go")])
    (folder / "train.csv").write_bytes(data)
    if table == "null glosses":
        (folder / "validation.csv").write_bytes(b"uid,text\na,go\n")
    said = line(folder, POSES="poses")
    assert words in said and "check the name" not in said


def test_a_column_that_one_file_alone_has_is_told(tmp_path):
    folder = write_csv(tmp_path / "data", [("a", "go"), ("b", "go")])
    (folder / "validation.csv").write_text("uid,text,signer\na,go,1\n")
    assert "all files need the same columns" in line(folder, POSES="poses")


@pytest.mark.parametrize("dataset", ["./nothing", "no/such/folder/here"])
def test_a_data_set_that_is_not_there_is_one_line(dataset):
    assert f"cannot load DATASET '{dataset}'" in line(dataset)


@pytest.mark.parametrize("gloss", [["go", "home"], {"a": 1}, 7, True])
def test_glosses_are_texts_or_numbers_and_else_their_type_is_named(gloss, tmp_path):
    folder = write_rows(tmp_path / "data", rows_of(3, gloss), rows_of(5, gloss)[3:])
    if isinstance(gloss, (list, dict)):
        assert "the column gloss holds" in line(folder, POSE_DIM=4)
    else:
        assert glosses(load(folder, POSE_DIM=4)) == [str(gloss)] * 5


@pytest.mark.parametrize(
    "kind, texts",
    [
        (datasets.ClassLabel(names=["go", "home"]), [0, 1]),
        (datasets.Value("binary"), [b"go", b"no"]),
    ],
)
def test_a_gloss_of_class_labels_or_bytes_is_named(kind, texts, tmp_path):
    kinds = datasets.Features({"gloss": kind, "pose": [[datasets.Value("float32")]]})
    rows = [{"gloss": texts[i % 2], "pose": pose} for i, pose in enumerate(poses(6))]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows, features=kinds).to_parquet(tmp_path / "data" / "train.parquet")
    said = line(tmp_path / "data", POSE_DIM=4)
    assert f"the column gloss holds {type(kind).__name__}" in said


# ---- videos and splits


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
        ("something-else", None),
        ("interview00_001", None),
        ("f68f0aa0e1ae-1\n", None),
    ],
)
def test_video_of(uid, video):
    assert script.video_of(uid) == video


def test_the_split_does_not_move_as_rows_are_added():
    videos = [f"video {i}" for i in range(200)]
    few = script.split_by_video(videos[:100] * 3, 0.2)
    many = script.split_by_video(videos[::-1], 0.2)
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


def test_limits_draw_whole_videos(tmp_path):
    uids = [f"{i:012x}-{j}" for i in range(8) for j in range(2)]
    clips = {uid: pose_bytes(positions(3, seed)) for seed, uid in enumerate(uids)}
    folder = write_isign(tmp_path / "isign", [(uid, uid[:12]) for uid in uids], clips)
    found = load(folder, TRAIN_CLIPS=3, VALIDATION_CLIPS=1)
    assert len(found["train"]) == 4 and len(set(found["train"].glosses)) == 2
    assert len(found["validation"]) == 2


def split_of(capsys):
    out = capsys.readouterr().out.splitlines()
    (split,) = [line[19:] for line in out if line.startswith("  split ")]
    return split, [line for line in out if line.startswith(("  videos unknown", "warning"))]


def test_videos_are_never_on_both_sides_and_the_report_says_what_is_known(tmp_path, capsys):
    """Uids of one's own naming: 'interview00_001' is no form of iSign's."""
    uids = [f"interview{i:02}_{j:03}" for i in range(10) for j in range(4)]
    videos = [uid.split("_")[0] for uid in uids]
    rows = [{"uid": uid, **row} for uid, row in zip(uids, rows_of(40), strict=True)]
    load(write_rows(tmp_path / "a", rows), POSE_DIM=4)
    split, notes = split_of(capsys)
    assert split.startswith("by video; ") and "videos in both" not in split
    assert notes == ["  videos unknown   of 40 clips: each counts as a video of its own"]

    rows = [{**row, "video": video} for row, video in zip(rows, videos, strict=True)]
    small(DATASET=str(write_rows(tmp_path / "b", rows)), POSE_DIM=4)
    _, listed = script.list_rows("b", script.load_tables(script.DATASET)[0])
    chosen, _ = script.choose_rows(listed, own_splits=False)
    apart = [{row.video for row in chosen[split]} for split in ("train", "validation")]
    assert not apart[0] & apart[1] and apart[0] | apart[1] == set(videos)
    split, notes = split_of(capsys)
    share = 100 * len(chosen["validation"]) / 40
    assert split == f"by video; 0 videos in both; {share:.1f} % of the clips validate"
    assert notes == []


def test_a_video_that_is_no_number_is_unknown(tmp_path, capsys):
    """As pandas leaves it where a table of numbers has a gap."""
    rows = [{"video": [1.0, math.nan, 2.0][i % 3], **row} for i, row in enumerate(rows_of(12))]
    load(write_rows(tmp_path / "data", rows), POSE_DIM=4)
    _, notes = split_of(capsys)
    assert notes[0] == "  videos unknown   of 4 clips: each counts as a video of its own"


@pytest.mark.parametrize("held_out, share", [(10, "0.33"), (1, "0.05")])
def test_a_share_that_became_another_is_warned_of(held_out, share, tmp_path, capsys):
    (video,) = script.split_by_video("abc", 0.1)
    videos = video * held_out + "abc".replace(video, "") * 10
    rows = [{"video": name, **row} for name, row in zip(videos, rows_of(30), strict=False)]
    load(write_rows(tmp_path / "data", rows), POSE_DIM=4, VALIDATION_SHARE=0.1)
    _, notes = split_of(capsys)
    assert notes == [f"warning: VALIDATION_SHARE = 0.1 has become {share} of the clips"]


def test_videos_in_both_of_the_datas_own_splits_are_counted(tmp_path, capsys):
    rows = [{"uid": f"{i % 6:012x}-{i}", **row} for i, row in enumerate(rows_of(12))]
    load(write_rows(tmp_path / "data", rows[:8], rows[8:]), POSE_DIM=4)
    split, notes = split_of(capsys)
    assert split == "the data's own splits; 4 videos in both; 33.3 % of the clips validate"
    assert notes == []


@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev"])
def test_rows_of_gloss_and_pose_with_official_splits(tmp_path, validation, capsys):
    pose = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    pose[:, 2, 2:] = 0
    pose[:, 3, :2] = np.nan
    files = ""
    (tmp_path / "data").mkdir()
    for split, chosen in (("train", range(4)), (validation, range(4, 6))):
        rows = [{"gloss": f"w{i}", "pose": pose[i].tolist()} for i in chosen]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data" / f"{split}.parquet")
        files += f"  - {{split: {split}, path: {split}.parquet}}\n"
    config = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"
    (tmp_path / "data" / "README.md").write_text(config)
    found = load(tmp_path / "data", POSE_DIM=4)
    assert [found[split].glosses for split in found] == [["w0", "w1", "w2", "w3"], ["w4", "w5"]]
    pose[:, 2, 2:] = np.nan
    np.testing.assert_allclose(found["validation"].pose(1), pose[5], rtol=1e-6)
    statistics, _ = script.training_statistics(found["train"])
    np.testing.assert_allclose(statistics["mean"], np.nanmean(pose[:4], (0, 1)), rtol=1e-4)
    assert report(capsys, "points unseen").startswith("20.0 %")
    assert "4 numbers a frame, POSE_DIM is 6" in line(tmp_path / "data", POSE_DIM=6)


def test_a_row_without_a_uid_is_no_repetition_and_one_with_it_twice_is(tmp_path, capsys):
    rows = rows_of(10)
    for row, uid in zip(rows, [3, None, None, 5, 3, None, "", 8, 9, 10], strict=True):
        row["uid"] = None if uid is None else str(uid)
    clips = load(write_rows(tmp_path / "data", rows, rows_of(12)[10:]), POSE_DIM=4)
    assert len(clips["train"]) == 9 and report(capsys, "left out") == "1 uid twice"


# ---- the same clips in both splits


def test_one_file_that_the_library_puts_into_both_splits_ends_the_run(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_list(rows_of(6))
    table.to_parquet(tmp_path / "data" / "train_val.parquet")
    said = line(tmp_path / "data", POSE_DIM=4)
    assert said == "error: both splits read the same file: no training clip is left"
    assert report(capsys, "files") == "train_val.parquet"


def test_training_clips_that_are_validation_clips_are_left_out_and_counted(tmp_path, capsys):
    train = rows_of(8) + rows_of(3, "other")
    clips = load(write_rows(tmp_path / "data", train, rows_of(10)[6:]), POSE_DIM=4)
    assert len(clips["train"]) == 9 and len(clips["validation"]) == 4
    assert report(capsys, "left out") == "2 in both splits"
    apart = [set(zip(clips[split].crcs, clips[split].glosses, strict=True)) for split in clips]
    assert not apart[0] & apart[1]


def test_clips_that_are_there_twice_are_counted_and_stay(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for name, part in (("train", rows_of(5)), ("train_backup", rows_of(5))):
        datasets.Dataset.from_list(part).to_parquet(tmp_path / "data" / f"{name}.parquet")
    datasets.Dataset.from_list(rows_of(7)[5:]).to_parquet(tmp_path / "data" / "validation.parquet")
    assert len(load(tmp_path / "data", POSE_DIM=4)["train"]) == 10
    out = capsys.readouterr().out
    assert "  files            train.parquet, train_backup.parquet, validation.parquet\n" in out
    assert "  clips twice      5 training clips are the same as another, and stay\n" in out


# ---- vocabulary


def test_vocabulary_and_statistics_come_from_the_training_clips_alone(tmp_path):
    poses = [[[1, math.nan], [3, 5]], [[8, 5]]]
    rows = [
        {"gloss": gloss, "pose": [[1.5, 2.5, *frame] for frame in pose]}
        for gloss, pose in zip(["go home cut cut", "Go rare cut"], poses, strict=True)
    ]
    folder = write_rows(tmp_path / "data", rows, rows_of(3, "unheard"))
    clips = load(folder, POSE_DIM=4, MAX_GLOSS_LEN=2)
    statistics, vocabulary = script.training_statistics(clips["train"])
    assert vocabulary == ["<pad>", "<unk>", "GO"]
    assert statistics["mean"].tolist() == [1.5, 2.5, 5.5, 5]
    np.testing.assert_allclose(statistics["seen"], [1, 1, 2 / 3, 2 / 3])  # of the 3 frames
    np.testing.assert_allclose(statistics["std"], [1, 1, 2.5, 1], rtol=1e-6)
    assert statistics["seconds_per_gloss"] == pytest.approx(3 / 25 / 4)
    tokenizer = script.gloss_tokenizer(vocabulary)
    text = script.tokenize(tokenizer, ["go! unheard", "go go go go go"], 3)
    assert text["input_ids"].tolist() == [[2, 1, 0], [2, 2, 2]]
    assert text["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_words_of_the_validation_that_training_does_not_have_are_told(tmp_path, capsys):
    clips = load(write_rows(tmp_path / "data", rows_of(6), rows_of(9, "other")[6:]), POSE_DIM=4)
    script.Run(
        "gru", clips, *script.training_statistics(clips["train"]), script.torch.device("cpu")
    )
    assert "warning: 100% of the words in validation are unknown" in capsys.readouterr().out


@pytest.mark.parametrize("unit, shift", [(1, 0), (300, 700), (0.2, 0.5)])
def test_rows_in_any_unit_are_the_same_clip(unit, shift, tmp_path):
    """Shoulder widths, pixels, 0 to 1."""
    row = script.sample_rows(1, 1)[0]
    here = np.array(row["pose"])
    there = here * unit + shift
    small(POSE_DIM=152)
    expected, _ = script.row_keypoints(here)
    keypoints, _ = script.row_keypoints(there.tolist())
    assert_allclose(keypoints, expected, atol=1e-3)
    left, right = np.nanmedian(keypoints[:, script.SHOULDERS], 0)
    assert_allclose(left - right, [1, 0], atol=0.01)
    assert_allclose(left + right, [0, 0], atol=0.01)


def test_a_row_without_shoulders_is_left_out():
    pose = np.array(script.sample_rows(1, 1)[0]["pose"])
    pose[:, 94:96] = math.nan
    small(POSE_DIM=152)
    with pytest.raises(script.BadClip, match="^no shoulders$"):
        script.row_keypoints(pose)


def test_of_other_keypoints_there_is_no_preview(tmp_path, capsys):
    small(DATASET=str(write_rows(tmp_path / "data", rows_of(6))), POSE_DIM=4, EPOCHS=1)
    train_final_model.main(["--model", "gru"])
    assert "checkpoint: best_gru.pt" in capsys.readouterr().out
    assert not Path("preview_gru.html").exists()


def test_clips_of_one_length_are_told_as_they_may_be_padded(tmp_path, capsys):
    rows = rows_of(6)
    load(write_rows(tmp_path / "data", rows), POSE_DIM=4)
    frames = len(rows[0]["pose"])
    assert report(capsys, "one length").startswith(f"all clips last {frames / 25:.2f} s")


@pytest.mark.parametrize("glosses, unknown", [("a b c d e f", 1), ("a a b c d e", 0.67)])
def test_words_that_are_all_or_mostly_unknown_are_named(glosses, unknown, tmp_path, capsys):
    rows = [{**row, "gloss": g} for row, g in zip(rows_of(6), glosses.split(), strict=True)]
    clips = load(write_rows(tmp_path / "data", rows, rows_of(8)[6:]), POSE_DIM=4)
    statistics, vocabulary = script.training_statistics(clips["train"])
    run = ("gru", clips, statistics, vocabulary, script.torch.device("cpu"))
    if unknown == 1:
        with pytest.raises(SystemExit, match="^error: no word .* MIN_GLOSS_COUNT = 2$"):
            script.Run(*run)
    else:
        script.Run(*run)
        assert "warning: 67% of the words in training are unknown, by MIN_GLOSS_COUNT = 2" in (
            capsys.readouterr().out
        )


# ---- the sample


def test_the_hub_id_without_a_token_runs_on_the_sample_and_says_so(capsys, monkeypatch):
    shrink_sample(monkeypatch, 40)
    small()
    clips, name = script.load_clips()
    assert name == "sample data" and [len(part) for part in clips.values()] == [8, 2]
    assert "NO ACCESS TOKEN" in capsys.readouterr().out


def test_the_sample_is_the_same_in_every_run_and_holds_every_point():
    first, second = script.sample_rows(6, 1), script.sample_rows(6, 1)
    assert json.dumps(first[:]) == json.dumps(second[:]) != json.dumps(script.sample_rows(6, 2)[:])
    for pose in first["pose"]:
        assert np.isfinite(np.array(pose)).any(0).all() and np.array(pose).shape[1] == 152
