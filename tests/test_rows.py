"""From the data set's tables to the rows that are used: texts, uids, videos, splits, the report."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from helpers import change, pose_bytes, positions, small

import model_selection as script
import train_final_model

POSE = np.random.default_rng(0).normal(size=(5, 4)).round(3).tolist()  # 5 frames of two points


def load(dataset, test=False, **settings):
    small(DATASET=str(dataset), **settings)
    return script.load_clips(test)[0]


def line(dataset, **settings):
    """The line that a run with this data ends with."""
    with pytest.raises(SystemExit) as ended:
        load(dataset, **settings)
    said = ended.value.code
    assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said
    return said


def rows_of(n, gloss="go", **columns):
    """n rows, each with another pose."""
    poses = [(np.array(POSE) + i / 20).tolist() for i in range(n)]
    return [{"gloss": gloss, "pose": pose, **columns} for pose in poses]


def write_rows(folder, train, validation=None, **others):
    """Rows as jsonl files, one for each split -> the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in {"train": train, "validation": validation, **others}.items():
        if part is not None:
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
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


def report(capsys):
    """What the report's lines say, by their names; several of a name are joined by "; "."""
    said = {}
    for line in capsys.readouterr().out.splitlines():
        said.setdefault(line[:19].strip(), []).append(line[19:])
    return {name: "; ".join(texts) for name, texts in said.items()}


def glosses(clips):
    return sorted(gloss for part in clips.values() for gloss in part.glosses)


WORDS = {
    "Where's the house?": ["Where's", "the", "house"],
    "  a,  B.\n(c) ": ["a", "B", "c"],
    "?! ... -": [],
    "cafe\u0301 😀!": ["caf\u00e9", "😀"],
    "नमस्ते, दुनिया।": ["नमस्ते", "दुनिया"],
    "¿Cómo? حالك؟ 学校。 go\u2010": ["Cómo", "حالك", "学校", "go"],
    "\ufeffgo \u200bhome\u200d. \u200e(now)\u200c": ["go", "home", "now"],
    "ខ្ញុំ\u200bទៅ\u200bសាលា": ["ខ្ញុំ", "ទៅ", "សាលា"],
    "क\u094d\u200dष \u200b": ["क\u094d\u200dष"],  # within a word a joiner has a meaning
}


def test_words_lose_the_marks_at_their_ends():
    assert {text: script.split_words(text) for text in WORDS} == WORDS
    assert script.split_glosses("a, ß.") == ["A", "SS"]


@pytest.mark.parametrize("end", [[], [""]])
def test_uids_and_texts_of_a_csv_are_texts_and_nothing_is_none(end, tmp_path, capsys):
    """Also where a comma at the end of each row might shift the columns."""
    uids = ["001", "1", "1e5", "0x10", "1.0", "NA", "null", "None", "nan", "-0"]
    texts = ["NA", "null", 'a "quoted" word', "two\nlines", "1e5", "007", "True"]
    none = ["nan", "nan ", "", " ", "..."]
    rows = [(uid, f"uid{uid}", *end) for uid in uids]
    rows += [(f"u{i}", text, *end) for i, text in enumerate(texts + none)]
    found = glosses(load(write_csv(tmp_path / "data", rows), POSES="poses"))
    assert found == sorted(texts + [f"uid{uid}" for uid in uids])
    assert report(capsys)["left out"] == "5 no text (such as u7); see left_out.log"
    assert Path("left_out.log").read_text() == "".join(f"u{i}\tno text\n" for i in range(7, 12))


@pytest.mark.parametrize("first", [1, 2, 9])
def test_a_comma_without_quotes_cuts_no_text(first, tmp_path):
    folder = write_csv(tmp_path / "data", [(f"u{i}", "go") for i in range(10)])
    rows = [f"u{i},go" + ", home" * (i >= first - 1) for i in range(10)]
    (folder / "train.csv").write_text("\n".join(["uid,text", *rows]) + "\n")
    said = line(folder, POSES="poses")
    assert (
        "leads to a loss of data" in said or f"Expected 2 fields in line {first + 1}, saw 3" in said
    )


def test_a_gloss_without_a_word_gives_way_to_the_text(tmp_path):
    rows = [{"text": f"text {i}", **row} for i, row in enumerate(rows_of(8))]
    for row, gloss in zip(rows, ["", "nan ", None, " ", "?"], strict=False):
        row["gloss"] = gloss
    found = glosses(load(write_rows(tmp_path / "data", rows), POSE_DIM=4))
    assert found == ["go"] * 3 + [f"text {i}" for i in range(5)]


GO = "uid,text\na,go\nb,go\n"
ROWS = [json.dumps(row) + "\n" for row in rows_of(4)]
NO_SPLITS = "error: unread splits: name their files train, validation and test"
REFUSED = {
    "latin-1": ({"train.csv": b"uid,text\na,caf\xe9\n"}, "'utf-8' codec can't decode"),
    "no texts": ({"train.csv": "uid,text\na,\n", "val.csv": GO}, "no text is left for train"),
    "no columns of ours": ({"train.csv": "name,words\na,b\n"}, "it has train with name, words"),
    "other columns": ({"train.csv": GO, "dev.csv": "uid,text,x\na,go,1\n"}, "the same columns"),
    "paths": ({"train.csv": "gloss,pose\ngo,a.pose\n"}, "string: give paths in the column uid"),
    "a column Split": ({"train.csv": "uid,text,Split\na,go,1\nb,go,2\n"}, NO_SPLITS),
    "a table beside": ({"train.csv": GO, "Val.csv": GO}, NO_SPLITS),
    "names in upper case": ({"Train.csv": GO, "Val.csv": GO, "Test.csv": GO}, NO_SPLITS),
    "one video": (
        {"train.jsonl": "".join(json.dumps({**row, "video": "a"}) + "\n" for row in rows_of(4))},
        "no text is left for validation; a single video is not divided",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_cannot_be_used_says_why(case, tmp_path):
    files, words = REFUSED[case]
    for name, text in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "data" / "poses").mkdir()
    (tmp_path / "data" / "poses" / "a.pose").write_bytes(pose_bytes(positions(3)))
    said = line(tmp_path / "data", POSES="poses", POSE_DIM=4 if "jsonl" in str(files) else 152)
    assert words in said


def test_a_column_split_of_one_value_and_the_data_s_own_splits_are_read(tmp_path, capsys):
    rows = [{"split": "train", "start": 1.5, "fps": 25, **row} for row in rows_of(6)]
    load(write_rows(tmp_path / "a", None, **{"latest-train": rows}), POSE_DIM=4)
    assert report(capsys)["columns unread"] == "fps, split, start"
    rows[5]["split"] = "dev"
    load(write_rows(tmp_path / "b", rows[:4], rows[4:]), POSE_DIM=4)
    folder = write_rows(tmp_path / "c", rows[:4], rows[4:], dev=rows)
    files = [f"- {{split: {x}, path: {x}.jsonl}}" for x in ("dev", "train", "validation")]
    files = "\n  ".join(["---\nconfigs:\n- config_name: a\n  data_files:", *files])
    (folder / "README.md").write_text(f"{files}\n---\n")
    load(folder, POSE_DIM=4)
    assert report(capsys)["splits unread"] == "dev"


@pytest.mark.parametrize(
    "kind, gloss, said",
    [(Value("int64"), 7, "7"), (Value("bool"), True, "True")]
    + [(Value("binary"), b"go", "gloss holds Value('binary')")]
    + [(ClassLabel(names=["go"]), 0, "gloss holds ClassLabel")]
    + [([Value("string")], ["go"], "gloss holds List")],
)
def test_glosses_are_texts_or_numbers_and_else_their_type_is_named(kind, gloss, said, tmp_path):
    kinds = Features({"gloss": kind, "pose": [[Value("float32")]]})
    (tmp_path / "data").mkdir()
    table = Dataset.from_list(rows_of(6, gloss), features=kinds)
    table.to_parquet(tmp_path / "data" / "train.parquet")
    if len(said) < 5:
        assert glosses(load(tmp_path / "data", POSE_DIM=4)) == [said] * 6
    else:
        assert said in line(tmp_path / "data", POSE_DIM=4)


def test_the_video_that_a_uid_names():
    videos = {
        "f68f0aa0e1ae-12": "f68f0aa0e1ae",
        "dQw4w9WgXcQ--3": "dQw4w9WgXcQ",
        "a-b_c--d_e---3": "a-b_c--d_e-",
        "-----------_w": "-----------",
        "_x-y_z-w_v-_e12": "_x-y_z-w_v-",
        "f68f0aa0e1a_d": "f68f0aa0e1a",
        "interview00_001": None,
        "f68f0aa0e1ae-1\n": None,
    }
    assert {uid: script.video_of(uid) for uid in videos} == videos


def test_the_same_videos_are_drawn_as_ever_also_as_rows_are_added():
    videos = [f"video {i}" for i in range(200)]
    few = script.draw_videos(videos[:100] * 3, share=0.2)
    was = [0, 15, 25, 50, 53, 54, 56, 69, 75, 77, 78, 90, 95]
    assert sorted(few) == sorted(f"video {i}" for i in was)
    many = script.draw_videos(videos[::-1], share=0.2)
    assert set(many) & set(videos[:100]) == set(few)
    assert len(script.draw_videos(["a", "b", "b"], share=0.001)) == 1
    five = [f"video {i % 20}" for i in range(100)]  # of 5 clips each
    for order in (five, five[::-1]):
        chosen = script.draw_videos(order, clips=12, salt="subset ")
        assert chosen == ["video 4", "video 6", "video 2"]
    assert [len(script.draw_videos(five, clips=n)) for n in (1, 11, 30, 1000)] == [1, 3, 6, 20]


def test_videos_are_never_on_both_sides_and_the_report_says_what_is_known(tmp_path, capsys):
    """Uids of one's own naming: 'interview00_001' is no form of iSign's."""
    uids = [f"interview{i:02}_{j:03}" for i in range(10) for j in range(4)]
    rows = [{"uid": uid, **row} for uid, row in zip(uids, rows_of(40), strict=True)]
    load(write_rows(tmp_path / "a", rows), POSE_DIM=4)
    said = report(capsys)
    assert said["split"] == "by video" and "videos in both" not in said
    assert "40 clips of unknown videos: each counts as one of its own" in said["notice"]
    rows = [{**row, "video": row["uid"][:11], "gloss": row["uid"][:11]} for row in rows]
    found = load(write_rows(tmp_path / "b", rows), POSE_DIM=4)
    apart = [set(part.glosses) for part in found.values()]
    assert not apart[0] & apart[1] and len(apart[0] | apart[1]) == 10
    said = report(capsys)
    assert said["videos in both"] == "0" and "unknown" not in said["notice"]
    found = load(tmp_path / "b", POSE_DIM=4, TRAIN_CLIPS=3, VALIDATION_CLIPS=1)
    assert [len(part) for part in found.values()] == [4, 4]  # a subset has whole videos
    capsys.readouterr()
    # a number that pandas left out of a table of numbers is no video
    rows = [{"video": [1.0, math.nan, 2.0][i % 3], **row} for i, row in enumerate(rows_of(12))]
    load(write_rows(tmp_path / "c", rows), POSE_DIM=4)
    assert report(capsys)["notice"].startswith("4 clips of unknown videos: ")


@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev"])
def test_rows_of_gloss_and_pose_with_official_splits(tmp_path, validation, capsys):
    rows = [{**row, "gloss": f"w{i}"} for i, row in enumerate(rows_of(6))]
    for row in rows:
        row["pose"][2][2:], row["pose"][3][:2] = [0, 0], [math.nan] * 2
    folder = write_rows(tmp_path / "data", rows[:4], **{validation: rows[4:]})
    found = load(folder, POSE_DIM=4)
    assert [found[split].glosses for split in found] == [["w0", "w1", "w2", "w3"], ["w4", "w5"]]
    expected = np.array(rows[5]["pose"])
    expected[2, 2:] = math.nan
    np.testing.assert_allclose(found["validation"].pose(1), expected, rtol=1e-6)
    script.training_statistics(found["train"])
    assert report(capsys)["points unseen"].startswith("20.0 %")
    assert "4 numbers a frame, POSE_DIM is 6" in line(folder, POSE_DIM=6)


def test_a_test_split_is_a_third_part_that_nothing_else_holds(tmp_path, capsys):
    rows = rows_of(20)
    held_out = [{**row, "uid": f"{i:012x}-1", "gloss": "told"} for i, row in enumerate(rows[12:])]
    held_out.append({**rows_of(1, "")[0], "uid": "blank"})
    rows = [{**row, "uid": f"{i:012x}-1"} for i, row in enumerate(rows[:14])]
    folder = write_rows(tmp_path / "own", rows[:9] + rows[12:], rows[9:13], test=held_out)
    found = load(folder, test=True, POSE_DIM=4, TRAIN_CLIPS=100, VALIDATION_CLIPS=100)
    assert [*found] == ["train", "validation", "test"]
    crcs = [set(part.crcs) for part in found.values()]
    assert not crcs[0] & crcs[1] and not crcs[2] & (crcs[0] | crcs[1])
    said = report(capsys)
    assert said["clips"] == "9 train, 3 validation, 8 test"
    assert said["left out"].startswith("3 in two splits (such as 00000000000c-1), 1 no text (")
    assert said["split"] == "from the data" and said["videos in both"] == "8"
    assert [*load(folder, POSE_DIM=4)] == ["train", "validation"]
    folder = write_rows(tmp_path / "no validation", rows, test=held_out)
    found = load(folder, test=True, POSE_DIM=4)
    assert sum(map(len, found.values())) == 20 and len(found["test"]) == 8
    assert set(found["test"].glosses) == {"told"}
    folder = write_rows(tmp_path / "blank", rows[:9], rows[9:], test=held_out[-1:])
    assert [*load(folder, test=True, POSE_DIM=4)] == ["train", "validation"]


def test_a_uid_names_one_clip_but_for_rows_with_a_pose_of_their_own(tmp_path, capsys):
    rows = [{**row, "uid": str(i % 4)} for i, row in enumerate(rows_of(10))]
    rows[2]["uid"] = None
    found = load(write_rows(tmp_path / "data", rows, rows_of(12)[10:]), POSE_DIM=4)
    assert len(found["train"]) == 10 and report(capsys)["left out"] == "none"
    rows = [(f"u{i % 6}", f"go {i}") for i in range(8)] + [("u0.pose", "go")]
    load(write_csv(tmp_path / "csv", rows), POSES="poses")
    assert report(capsys)["left out"].startswith("3 uid twice (such as u0)")


def test_training_clips_that_are_validation_clips_are_left_out_and_counted(tmp_path, capsys):
    """Also under another text, and under another uid."""
    train = rows_of(8) + rows_of(9, "other", uid="elsewhere")[5:]
    folder = write_rows(tmp_path / "data", train, rows_of(10)[6:])
    clips = load(folder, POSE_DIM=4, MAX_BAD_SHARE=0.0)
    assert [len(part) for part in clips.values()] == [7, 4]
    said = report(capsys)
    assert said["left out"].startswith("5 in two splits (such as row 6)")
    assert "; 1 training clips are the same as another; " in said["notice"]
    assert not set(clips["train"].crcs) & set(clips["validation"].crcs)
    write_rows(tmp_path / "same", None, train_val=rows_of(6))  # which the library takes for both
    assert "6 of 6 train clips (6 in two splits " in line(tmp_path / "same", POSE_DIM=4)
    assert report(capsys)["files"] == "train_val.jsonl"


def test_what_looks_odd_is_one_notice(tmp_path, capsys):
    rows = rows_of(10, video="a")
    rows, validation = rows[:8], rows[8:]
    load(write_rows(tmp_path / "a", rows, validation), POSE_DIM=4)
    said = report(capsys)
    assert said["videos in both"] == "1"
    assert said["notice"] == "10 clips are of one length: pad them with NaN or 0"
    assert said["files"] == "train.jsonl, validation.jsonl"
    rows[0]["pose"] = rows[0]["pose"][:1]
    rows[1]["gloss"] = "go\nu1,home"  # as a quote that was left open makes it
    rows[2]["gloss"] = "go " * 17
    load(write_rows(tmp_path / "b", rows + rows[2:5], validation), POSE_DIM=4, MAX_FRAMES=4)
    assert report(capsys)["notice"].split("; ") == [
        "2 sentences are cut to 16 glosses",
        "12 clips are resampled to 4 frames",
        "1 clips of a single frame",
        "3 training clips are the same as another",
        "1 texts break the line (a quote left open?)",
    ]
    rows[1], rows[0]["pose"] = rows[2], POSE[:3]
    load(write_rows(tmp_path / "c", rows[:1] + rows[3:], validation), POSE_DIM=4)
    assert "notice" not in report(capsys)


def test_bad_clips_are_counted_by_their_split_and_named_in_a_file(tmp_path, monkeypatch):
    """Which one process of torchrun writes."""
    rows = [{**row, "uid": f"u{i}"} for i, row in enumerate(rows_of(12))]
    for row in (rows[0], rows[1], rows[10]):
        row["pose"] = None
    rows.append({**rows[4], "gloss": "", "uid": "silent"})
    folder = write_rows(tmp_path / "data", rows[:7] + rows[12:], rows[7:12])
    for rank in ("1", "0"):
        assert not Path("left_out.log").exists()
        monkeypatch.setenv("RANK", rank)
        assert line(folder, POSE_DIM=4, MAX_BAD_SHARE=0.2) == (
            "error: more clips cannot be used than MAX_BAD_SHARE = 0.2 allows: 2 of 7 train clips "
            "(2 no table of frames (such as u0)); left_out.log names all"
        )
    why = {"silent": "no text", **dict.fromkeys(["u10", "u0", "u1"], "no table of frames")}
    lines = Path("left_out.log").read_text().splitlines()
    assert dict(line.split("\t") for line in lines) == why


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


def test_parts_that_no_training_clip_shows_are_warned_of(tmp_path, capsys):
    rows = list(script.sample_rows(8, 1))
    for i, row in enumerate(rows):
        row["pose"] = np.array(row["pose"])
        row["pose"][:, : 42 if i < 6 else 0] = math.nan  # the left hand, which two clips show
        row["pose"][:, 106:] = math.nan  # the face
        row["pose"] = row["pose"].tolist()
    for split in (rows[:6], rows[:7]):
        clips = load(write_rows(tmp_path / f"{len(split)}", split, rows[7:]))
        script.training_statistics(clips["train"])
    said = [text for text in capsys.readouterr().out.splitlines() if text.startswith("warning")]
    parts = ("LEFT_HAND", "FACE", "FACE")
    assert said == [f"warning: no training clip shows any of the {x}_LANDMARKS" for x in parts]


def test_of_other_keypoints_there_is_no_preview_and_no_prediction(tmp_path, capsys):
    small(DATASET=str(write_rows(tmp_path / "data", rows_of(6))), POSE_DIM=4, EPOCHS=1)
    train_final_model.main(["--model", "gru"])
    assert "checkpoint: best_gru.pt" in capsys.readouterr().out
    assert not Path("preview_gru.html").exists()
    said = "^error: best_gru.pt is no model of a .pose file's 76 keypoints$"
    with pytest.raises(SystemExit, match=said):
        train_final_model.main(["--model", "gru", "--predict", "go"])


def test_the_sample_is_the_same_in_every_run_and_holds_every_point():
    first, second = script.sample_rows(6, 1), script.sample_rows(6, 1)
    assert json.dumps(first[:]) == json.dumps(second[:]) != json.dumps(script.sample_rows(6, 2)[:])
    for pose in first["pose"]:
        assert np.isfinite(np.array(pose)).any(0).all() and np.array(pose).shape[1] == 152
