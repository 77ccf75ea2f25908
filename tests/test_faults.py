"""Data that is damaged, misnamed or laid out oddly: what is said of it, and what is kept."""

import json
import resource
import struct
import zipfile

import datasets
import numpy as np
import pytest
from helpers import pose_bytes, positions, run, small, write_isign, zipped
from hub import Hub, wait_less

import model_selection as script

POSE = np.random.default_rng(0).normal(size=(5, 4)).tolist()  # 5 frames of two points
UIDS = [f"{i:012x}-1" for i in range(8)]
ADVICE = "Check the name"  # of the hub; it has no place beside a local path


def load(dataset, **settings):
    small(DATASET=str(dataset), **settings)
    return script.load_clips()[0]


def line(dataset, **settings):
    """The line that a run with this data ends with; its exit status is then 1."""
    with pytest.raises(SystemExit) as ended:
        load(dataset, **settings)
    said = ended.value.code
    assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said
    return said


def glosses(clips):
    return sorted([*clips["train"]["gloss"], *clips["validation"]["gloss"]])


def left_out(capsys):
    return capsys.readouterr().out.split("left out")[1].splitlines()[0].strip()


def clips_of(*uids):
    return {uid: pose_bytes(positions(3, seed)) for seed, uid in enumerate(uids)}


def write_rows(folder, rows, validation=None):
    """Rows of gloss and pose as two jsonl files -> the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (
        ("train", rows),
        ("validation", rows if validation is None else validation),
    ):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def rows_of(*poses, gloss="go"):
    return [{"gloss": gloss, "pose": pose} for pose in poses]


# ---- tables


LOCAL_TABLES = {
    "UTF-16": ("uid,text\na,go\n".encode("utf-16"), "'utf-8' codec can't decode byte 0xff"),
    "latin-1": (
        "uid,text\na,caf\u00e9\n".encode("latin-1"),
        "'utf-8' codec can't decode byte 0xe9",
    ),
    "empty": (b"", "No columns to parse from file"),
    "no row": (b"uid,text\n", "the train split of DATASET"),
    "null glosses": (
        b"uid,text\n" + b"".join(b"%d,\n" % i for i in range(4)),
        "no row of the train split has a text (",
    ),
    "no columns of ours": (b"name,words\na,b\n", "it has train with name, words"),
}


@pytest.mark.parametrize("table", LOCAL_TABLES)
def test_a_table_that_cannot_be_used_says_why(table, tmp_path):
    data, words = LOCAL_TABLES[table]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.csv").write_bytes(data)
    (folder / "validation.csv").write_bytes(b"uid,text\na,go\n")
    if table == "no columns of ours":
        (folder / "validation.csv").write_bytes(data)
    (folder / "poses").mkdir()
    (folder / "poses" / "a.pose").write_bytes(pose_bytes(positions(3)))
    said = line(folder, POSES=str(folder / "poses"))
    assert words in said and ADVICE not in said and ".." not in said


def test_an_empty_jsonl_is_one_line(tmp_path):
    folder = write_rows(tmp_path / "data", [], [])
    said = line(folder, POSE_DIM=4)
    assert f"error: cannot load DATASET '{folder}'" in said and ADVICE not in said


def test_half_a_letter_among_the_glosses_is_one_line(tmp_path):
    # several rows: a file of one line is read as a table of columns by the library's second try
    folder = write_rows(tmp_path / "data", rows_of(*[POSE] * 4, gloss="go \ud800"))
    said = line(folder, POSE_DIM=4)
    assert "surrogate" in said and ADVICE not in said


@pytest.mark.parametrize("error", [RuntimeError(), KeyError(""), ValueError(" \n")])
def test_an_exception_without_a_text_is_named(error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    folder = write_rows(tmp_path / "data", rows_of(POSE))
    monkeypatch.setattr(datasets, "load_dataset", fail)
    said = line(folder, POSE_DIM=4)
    name = "''" if isinstance(error, KeyError) else type(error).__name__
    assert said == f"error: cannot load DATASET '{folder}', CONFIG None: {name}"


def test_true_and_false_are_glosses(tmp_path):
    rows = [{"gloss": i % 2 == 0, "pose": POSE} for i in range(4)]
    clips = load(write_rows(tmp_path / "data", rows), POSE_DIM=4)
    assert clips["train"]["gloss"][:] == ["True", "False", "True", "False"]


def test_numbers_as_uids_beside_missing_ones(tmp_path, capsys):
    rows = [{"uid": uid, **rows_of(POSE)[0]} for uid in (3, None, None, None, 5, 6)]
    clips = load(write_rows(tmp_path / "data", rows), POSE_DIM=4)
    assert len(clips["train"]) == len(clips["validation"]) == 6 and left_out(capsys) == "none"


def test_uids_that_look_like_numbers_are_texts(tmp_path, capsys):
    uids = ["001", "1", "1e5", "100000", "0x10", "1.0", "007", "-0"]
    folder = write_isign(tmp_path / "data", [(uid, f"uid{uid}") for uid in uids], clips_of(*uids))
    clips = load(folder)
    assert glosses(clips) == sorted(f"uid{uid}" for uid in uids) and left_out(capsys) == "none"


def test_uids_that_are_words_for_nothing_are_texts(tmp_path, capsys):
    uids = ["NA", "null", "None", "nan", "N/A", "a", "b", "c"]
    folder = write_isign(tmp_path / "data", [(uid, f"uid {uid}") for uid in uids], {})
    (tmp_path / "poses").mkdir()
    for uid, data in clips_of(*(uid for uid in uids if "/" not in uid)).items():
        (tmp_path / "poses" / f"{uid}.pose").write_bytes(data)
    clips = load(folder, POSES=str(tmp_path / "poses"))
    assert len(glosses(clips)) == 7 and left_out(capsys) == "1 no .pose file"


def test_words_for_nothing_are_texts_and_nothing_is_none(tmp_path, capsys):
    texts = ["NA", "null", "None", 'a "quoted" word', "two\nlines", "1e5", "007", "True"]
    none = ["nan", "nan ", "", " "]
    uids = [f"{i:012x}-1" for i in range(len(texts) + len(none))]
    rows = list(zip(uids, texts + none, strict=True))
    clips = load(write_isign(tmp_path / "data", rows, clips_of(*uids)))
    assert glosses(clips) == sorted(texts) and left_out(capsys) == "4 no text"


@pytest.mark.parametrize("column", ["uid", "text"])
def test_10000_rows_of_nothing_do_not_make_a_column_of_numbers(column, tmp_path, capsys):
    uids = [f"{i:012x}-1" for i in range(6)]
    empty = ("", "go") if column == "uid" else ("x", "")
    rows = [empty] * 10_000 + [(uid, "home") for uid in uids]
    small(DATASET=write_isign(tmp_path / "data", rows, clips_of(*uids)))
    table = script.load_rows(script.DATASET, None)[0]
    assert table["uid"][-6:] == uids and table["gloss"][-6:] == ["home"] * 6
    assert table["gloss"][0] == empty[1]


def test_a_quote_that_swallows_rows_is_reported(tmp_path, capsys):
    uids = [f"{i:012x}-1" for i in range(10)]
    folder = write_isign(tmp_path / "data", [], clips_of(*uids))
    lines = [f"{uid},go" for uid in uids]
    lines[2] = f'{uids[2]},"go'
    lines[5] = f'{uids[5]},home"'
    (tmp_path / "data" / "iSign_v1.1.csv").write_text("\n".join(["uid,text", *lines]) + "\n")
    clips = load(folder)
    assert len(glosses(clips)) == 7
    said = capsys.readouterr().out
    assert "line breaks      in 1 texts: a quote left open in a CSV swallows its rows" in said


# ---- a pose of another form


@pytest.mark.parametrize(
    "pose, reason",
    [
        (np.ones((3, 6)).tolist(), "6 numbers a frame, POSE_DIM is 4"),
        ([[], []], "0 numbers a frame, POSE_DIM is 4"),
        ([[1.0, 2.0, 3.0, 4.0], [1.0]], "no table of frames"),
        ([], "no table of frames|nothing seen"),
        (None, "no table of frames"),
    ],
)
def test_one_row_of_another_form_is_left_out_and_all_of_them_end_the_run(
    pose, reason, tmp_path, capsys
):
    good = rows_of(*[POSE] * 7)
    clips = load(write_rows(tmp_path / "a", [*good, *rows_of(pose)], good), POSE_DIM=4)
    assert len(clips["train"]) == len(clips["validation"]) == 7
    assert left_out(capsys) in [f"1 {words}" for words in reason.split("|")]
    if pose is not None:  # a column of nothing but null has no type
        said = line(write_rows(tmp_path / "b", rows_of(*[pose] * 5)), POSE_DIM=4)
        assert "5 of 5 train clips cannot be used, more than MAX_BAD_SHARE = 0.9 allows" in said
        assert any(f": 5 {words}" in said for words in reason.split("|"))


# ---- the archive


def write_archive(folder, parts=4):
    clips = clips_of(*UIDS)
    return write_isign(folder, [(uid, "go") for uid in UIDS], clips, parts)


def swap(folder):
    first, second = folder / "iSign-poses_v1.1_part_ab", folder / "iSign-poses_v1.1_part_ac"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def lose(letter):
    return lambda folder: (folder / f"iSign-poses_v1.1_part_a{letter}").unlink()


def add(name, data=b"0123456789abcdef  iSign-poses_v1.1_part_aa\n"):
    return lambda folder: (folder / name).write_bytes(data)


def cut(letter):
    def shorten(folder):
        path = folder / f"iSign-poses_v1.1_part_a{letter}"
        path.write_bytes(path.read_bytes()[:-1000])

    return shorten


NO_ZIP = "do not make up one zip"
OUT_OF_PLACE = "does not go on where the part before it ends"
PARTS = {
    "two are swapped": (swap, OUT_OF_PLACE, "part_ab"),
    "the first is missing": (lose("a"), OUT_OF_PLACE, "part_ab"),
    "the second is missing": (lose("b"), OUT_OF_PLACE, "part_a"),
    "the third is missing": (lose("c"), OUT_OF_PLACE, "part_a"),
    "the last is missing": (lose("d"), NO_ZIP, "part_a"),
    "the second is cut": (cut("b"), OUT_OF_PLACE, "part_a"),
    "the last is cut": (cut("d"), NO_ZIP, "part_ad"),
    "a checksum of the first": (add("iSign-poses_v1.1_part_aa.md5"), OUT_OF_PLACE, "part_a"),
    "a checksum of the last": (add("iSign-poses_v1.1_part_ad.md5"), "part_ad.md5", "part_ad.md5"),
    "a foreign file ahead": (add("iSign-poses_v1.1_part_a0"), "part_a0", "part_a0"),
}


@pytest.mark.parametrize("fault", PARTS)
def test_parts_that_do_not_fit_are_named_at_the_start(fault, tmp_path, monkeypatch):
    spoil, words, name = PARTS[fault]
    folder = write_archive(tmp_path / "data")
    spoil(tmp_path / "data")

    def no_clip(*_, **__):
        raise AssertionError("a clip is read")

    monkeypatch.setattr(script, "prepare_clip", no_clip)
    said = line(folder)
    assert words in said and f"iSign-poses_v1.1_{name}" in said


@pytest.mark.parametrize("remote", [True, False])
def test_what_is_no_json_and_no_text_is_a_fault_of_the_hub_or_of_the_disk(remote, monkeypatch):
    answers = [json.JSONDecodeError("Expecting value", "", 0), UnicodeError("no text"), b"pose"]
    monkeypatch.setattr(script.time, "sleep", lambda _: None)
    monkeypatch.setattr(script, "is_local", lambda _: not remote)

    def read():
        answer = answers.pop(0)
        if isinstance(answer, bytes):
            return answer
        raise answer

    if remote:
        assert script.read_again(None, read) == b"pose"
        answers[:] = [ValueError("no length")] * 4
        with pytest.raises(OSError, match="what the hub sends cannot be right: no length"):
            script.read_again(None, read)
    else:
        with pytest.raises(script.BadClip, match="damaged in the archive"):
            script.read_again(None, read)


def test_a_json_beside_each_pose_changes_nothing(tmp_path, capsys):
    clips = clips_of(*UIDS)
    folder = write_isign(tmp_path / "data", [(uid, "go") for uid in UIDS], {})
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for uid, data in clips.items():
            archive.writestr(f"a/{uid}.pose", data)
            archive.writestr(f"a/{uid}.json", "{}")
    assert len(glosses(load(folder, POSES=str(tmp_path / "all.zip")))) == len(UIDS)
    (tmp_path / "poses").mkdir()
    for uid, data in clips.items():
        (tmp_path / "poses" / f"{uid}.pose").write_bytes(data)
        (tmp_path / "poses" / f"{uid}.xml").write_text("<xml/>")
    assert len(glosses(load(folder, POSES=str(tmp_path / "poses")))) == len(UIDS)
    assert capsys.readouterr().out.count("left out         none") == 2


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_are_read_however_they_are_compressed(method, tmp_path, capsys):
    folder = write_isign(tmp_path / "data", [(uid, "go") for uid in UIDS], {})
    with zipfile.ZipFile(tmp_path / "all.zip", "w", method) as archive:
        for uid, data in clips_of(*UIDS).items():
            archive.writestr(f"{uid}.pose", data)
    assert len(glosses(load(folder, POSES=str(tmp_path / "all.zip")))) == len(UIDS)
    assert left_out(capsys) == "none"


@pytest.mark.parametrize(
    "field, value",
    [("method", 9), ("method", 93), ("flags", 1)],
    ids=["deflate64", "zstandard", "encrypted"],
)
def test_members_that_no_library_reads_are_named(field, value, tmp_path):
    data = bytearray(zipped(clips_of(*UIDS)))
    local, central = {"method": (8, 10), "flags": (6, 8)}[field]
    for signature, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        at = data.find(signature)
        while at >= 0:
            struct.pack_into("<H", data, at + offset, value)
            at = data.find(signature, at + 4)
    folder = write_isign(tmp_path / "data", [(uid, "go") for uid in UIDS], {})
    (tmp_path / "all.zip").write_bytes(data)
    said = line(folder, POSES=str(tmp_path / "all.zip"))
    assert "encrypted or compressed in an unknown way" in said


# ---- paths


@pytest.mark.parametrize("name", ["run[1]", "what?", "a*b", "[ab]"])
@pytest.mark.parametrize("poses", ["within", "pattern", "zip", "folder"])
def test_paths_with_the_characters_of_patterns(name, poses, tmp_path, capsys):
    clips = clips_of(*UIDS)
    folder = tmp_path / name
    write_isign(folder, [(uid, "go") for uid in UIDS], clips, 3)
    (folder / "all.zip").write_bytes(zipped(clips))
    (folder / "poses").mkdir()
    for uid, data in clips.items():
        (folder / "poses" / f"{uid}.pose").write_bytes(data)
    where = {
        "within": script.POSES,
        "pattern": str(folder / script.POSES),
        "zip": str(folder / "all.zip"),
        "folder": str(folder / "poses"),
    }
    assert len(glosses(load(folder, POSES=where[poses]))) == len(UIDS)
    assert left_out(capsys) == "none"


@pytest.fixture
def prepared(monkeypatch):
    """The keys of the clips that are prepared, as they are."""
    keys, prepare_clip = [], script.prepare_clip

    def note(row, **how):
        keys.append(row["key"])
        return prepare_clip(row, **how)

    monkeypatch.setattr(script, "prepare_clip", note)
    return keys


@pytest.mark.parametrize("layout", ["isign", "splits", "a table"])
def test_what_a_run_writes_beside_its_data_is_no_data(layout, tmp_path, monkeypatch, prepared):
    folder = tmp_path / "data"
    if layout != "splits":
        write_archive(folder)
        settings = {}
        if layout == "a table":  # of any name, and nothing says that it is the one
            (folder / "README.md").unlink()
    else:
        write_rows(folder, rows_of(*[POSE] * 4))
        settings = {"POSE_DIM": 4}
    monkeypatch.chdir(folder)
    first = load(".", **settings)
    assert len(prepared) == len(first["train"]) + len(first["validation"])
    for name in ("selection_gru.pt", "final_gru.pt", "log_gru.csv", "preview_gru.html"):
        (folder / name).write_text("epoch,val_mse\n1,0.5\n")
    (folder / "predictions").mkdir()
    (folder / "predictions" / "index.json").write_text("{}")
    prepared.clear()
    script.open_poses.cache_clear()
    second = load(".", **settings)
    assert prepared == [] and glosses(second) == glosses(first)


@pytest.mark.parametrize("dataset", ["/", "//", "/tmp/.."])
def test_the_whole_disk_is_no_data_set(dataset):
    assert line(dataset) == f"error: DATASET '{dataset}' is the whole disk: name a folder of data"


def test_a_name_that_ends_with_dots_gets_no_more_of_them(tmp_path):
    (tmp_path / "dir..").mkdir()
    said = line(tmp_path / "dir..")
    assert "cannot load DATASET" in said and ADVICE not in said and not said.endswith("..")


# ---- a full disk: writing beyond a limit fails as there


@pytest.fixture
def full_disk():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_space_for_the_table_is_said_and_passes(tmp_path, full_disk):
    rows = rows_of(*[np.random.default_rng(i).normal(size=(90, 4)).tolist() for i in range(40)])
    folder = write_rows(tmp_path / "data", rows)
    full_disk(10_000)
    said = line(folder, POSE_DIM=4)
    assert "File too large" in said and ADVICE not in said
    full_disk(resource.RLIM_INFINITY)
    assert len(load(folder, POSE_DIM=4)["train"]) == 40


def test_no_space_for_the_clips_is_said_and_passes(tmp_path, full_disk):
    folder = write_archive(tmp_path / "data")
    script.datasets.load_dataset(str(folder))  # what the table needs is there
    full_disk(12_000)
    with pytest.raises((OSError, SystemExit)) as ended:  # run_script makes one line of an OSError
        load(folder)
    assert "File too large" in script.reason_of(ended.value)
    full_disk(resource.RLIM_INFINITY)
    script.open_poses.cache_clear()
    assert len(glosses(load(folder))) == len(UIDS)


# ---- the hub, by the real client


TOKEN = "hf_thisIsTheSecretToken"
TINY = {
    "CANDIDATES": ["gru"],
    "EMBED_DIM": 16,
    "HIDDEN_DIM": 16,
    "EPOCHS": 1,
    "MAX_FRAMES": 12,
    "MIN_GLOSS_COUNT": 1,
    "PROCESSES": 0,
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    write_archive(tmp_path / "files")
    files = {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}
    wait_less(tmp_path / "haste", monkeypatch)
    with Hub("Exploration-Lab/iSign", files, {TOKEN: None}) as hub:
        home = str(tmp_path / "home")
        for name, value in {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": home,
            "HF_DATASETS_CACHE": f"{home}/datasets",
            "HF_TOKEN": TOKEN,
        }.items():
            monkeypatch.setenv(name, value)
        yield hub


def test_a_table_of_the_hub_that_cannot_be_read_is_said_without_advice(hub, tmp_path):
    hub.files["iSign_v1.1.csv"] = "uid,text\na,caf\u00e9\n".encode("latin-1")
    said = one_line(run(tmp_path / "run", "model_selection.py", **TINY))
    assert "'utf-8' codec can't decode byte 0xe9" in said and ADVICE not in said


def test_the_hubs_csv_is_text_also_from_the_cache(hub, tmp_path, monkeypatch):
    uids = ["001", "1e5", "NA", "null", "1.0", "x"]
    rows = [(uid, "NA" if uid == "x" else None if uid == "1.0" else "go") for uid in uids]
    write_isign(tmp_path / "other", rows, clips_of(*uids))
    hub.files.clear()
    hub.files.update({path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()})
    for offline in ("0", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        done = run(tmp_path / "run", "model_selection.py", **TINY)
        assert done.code == 0 and "left out         1 no text\n" in done.out, done.err
        assert "4 train, 1 validation" in done.out


def one_line(done):
    """The line of a run that ended with status 1, without a traceback and without the token."""
    assert done.code == 1 and len(done.errors) == 1, done.err
    assert "Traceback" not in done.err and TOKEN not in done.out + done.err
    return done.errors[0]


@pytest.mark.parametrize("status", [429, 500])
def test_a_hub_that_refuses_the_archive_is_said(status, hub, tmp_path):
    hub.faults += [status] * 1000
    said = one_line(run(tmp_path / "run", "model_selection.py", **TINY))
    assert str(status) in said and NO_ZIP not in said


def test_a_token_that_expires_after_the_table_was_read(hub, tmp_path):
    first = run(tmp_path / "run", "model_selection.py", **TINY)
    assert first.code == 0, first.err
    hub.tokens[TOKEN] = 401
    said = one_line(run(tmp_path / "run", "model_selection.py", **{**TINY, "MAX_FRAMES": 10}))
    assert "401" in said and NO_ZIP not in said


def test_a_page_in_place_of_the_listing_is_said_and_not_kept(hub, tmp_path):
    first = run(tmp_path / "first", "model_selection.py", **{**TINY, "MAX_FRAMES": 10})
    assert first.code == 0, first.err
    hub.log_in_page = True
    said = one_line(run(tmp_path / "run", "model_selection.py", **TINY))
    assert "the poses at hf://" in said or "cannot load DATASET" in said
    hub.log_in_page = False
    again = run(tmp_path / "run", "model_selection.py", **TINY)
    assert again.code == 0 and "left out         none" in again.out, again.err
