"""iSign's layout behind a gate, by the real client: what is read, kept, tried again, and said."""

import os
import zipfile
from types import SimpleNamespace

import datasets
import pytest
from helpers import pose_bytes, positions, run, write_isign
from hub import Hub, wait_less

import model_selection

TINY = {
    "CANDIDATES": ["gru"],
    "EMBED_DIM": 16,
    "HIDDEN_DIM": 16,
    "EPOCHS": 1,
    "MAX_FRAMES": 24,
    "MIN_GLOSS_COUNT": 1,
}
TOKEN = "hf_thisIsTheSecretToken"
UIDS = [f"{video:012x}-{clip}" for video in range(10) for clip in (1, 2, 3)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{path: bytes} of the data set, and {uid: compressed size of its member}."""
    folder = tmp_path_factory.mktemp("isign")
    clips = {uid: pose_bytes(positions(12, seed), 576) for seed, uid in enumerate(UIDS)}
    write_isign(folder, [(uid, f"hello word {uid[-1]}") for uid in UIDS], clips, parts=4)
    parts = b"".join(path.read_bytes() for path in sorted(folder.glob("*part*")))
    (folder / "whole.zip").write_bytes(parts)
    with zipfile.ZipFile(folder / "whole.zip") as archive:
        sizes = {info.filename[-19:-5]: info.compress_size for info in archive.infolist()}
    (folder / "whole.zip").unlink()
    return {path.name: path.read_bytes() for path in folder.iterdir()}, sizes


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    wait_less(tmp_path / "haste", monkeypatch)
    with Hub("Exploration-Lab/iSign", files[0], {TOKEN: None, "hf_noTerms": 403}) as hub:
        home = str(tmp_path / "home")
        for name, value in {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": home,
            "HF_DATASETS_CACHE": f"{home}/datasets",
            "HUGGINGFACE_HUB_TOKEN": TOKEN,
        }.items():
            monkeypatch.setenv(name, value)
        yield hub


def poses_read(hub):
    """Bytes of the archive that were sent."""
    return sum(size for name, _, size in hub.ranges if "part" in name)


def results(out):
    return out[out.index("FINAL RESULTS") :]


def test_reads_each_clip_once_keeps_little_and_tries_again(hub, files, tmp_path, monkeypatch):
    hub.faults += [None, None, None, None, 503, None, "cut", None, None, "cut"]
    first = run(tmp_path / "first", "model_selection.py", **TINY)
    assert first.code == 0, first.err
    assert hub.faults == [] and "NO ACCESS TOKEN" not in first.out
    directory = 30 * 200  # bytes, at most, of the entries of 30 members
    assert poses_read(hub) <= 1.3 * sum(files[1].values()) + directory
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not [path for path in kept if "part" in path.name]
    prepared = [path for path in kept if path.suffix == ".arrow" and "gloss_to_pose" in str(path)]
    assert prepared and sum(path.stat().st_size for path in prepared) <= 60_000 * len(UIDS)

    hub.ranges.clear()
    second = run(tmp_path / "second", "model_selection.py", **{**TINY, "BATCH_SIZE": 4})
    assert second.code == 0 and poses_read(hub) == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = run(tmp_path / "offline", "model_selection.py", **TINY)
    assert offline.code == 0, offline.err
    assert results(offline.out) == results(first.out)

    for told in (first, second, offline):
        assert TOKEN not in told.out + told.err
    written = kept + list(tmp_path.rglob("*.pt"))
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_a_subset_reads_its_own_clips_alone(hub, files, tmp_path):
    some = run(tmp_path / "some", "model_selection.py", TRAIN_CLIPS=4, VALIDATION_CLIPS=1, **TINY)
    assert some.code == 0, some.err
    assert "6 train, 3 validation" in some.out  # whole videos of three clips
    assert poses_read(hub) <= 1.3 * 9 * max(files[1].values()) + 30 * 200


def test_a_subset_and_then_all_read_each_member_once_and_for_both_scripts(hub, files, tmp_path):
    subset = {**TINY, "TRAIN_CLIPS": 4, "VALIDATION_CLIPS": 1}
    final = {name: value for name, value in TINY.items() if name != "CANDIDATES"}
    everything = {"TRAIN_CLIPS": 0, "VALIDATION_CLIPS": 0}
    for script, arguments, settings in (
        ("model_selection.py", [], subset),
        ("train_final_model.py", ["--model", "gru"], {**final, **everything}),
        ("model_selection.py", [], {**TINY, **everything}),
    ):
        done = run(tmp_path / script, script, *arguments, **settings)
        assert done.code == 0, done.err
    sizes = sorted(files[1].values())
    # what is smaller than any member is the directory and the look at each part's beginning
    read = sorted(size for name, _, size in hub.ranges if "part" in name and size > sizes[0] / 2)
    assert sum(read) <= 1.05 * sum(sizes) + 2 * 2**16
    assert len(hub.ranges) <= len(sizes) + 3 + 2 * 12  # 3 members lie across two parts


def test_the_selection_says_what_the_full_training_costs(hub, files, tmp_path):
    rows = "aaaaaaaaaaaa-1,\nbbbbbbbbbbbb-1,nan \ncccccccccccc-1,?!\n"  # without a text
    hub.files = {**files[0], "iSign_v1.1.csv": files[0]["iSign_v1.1.csv"] + rows.encode()}
    some = {**TINY, "TRAIN_CLIPS": 4, "VALIDATION_CLIPS": 1, "BATCH_SIZE": 4, "MAX_FRAMES": 24}
    done = run(tmp_path / "run", "model_selection.py", VALIDATION_SHARE=0.2, **some)
    assert done.code == 0, done.err
    told = done.out[done.out.index("full training ") : done.out.index("device ")].splitlines()
    parts = sum(len(data) for name, data in hub.files.items() if "part" in name)
    values = [line[:19].strip() + ": " + line[19:] for line in told]
    assert values == [
        "full training: what train_final_model.py costs on all 33 rows, about",
        "clips: 24 train, 6 validation",  # of 30 with a text, and not of the subset
        f"read: {parts / 2**30:.1f} GiB of poses from the hub, once",
        f"kept: at most {30 * 24 * 152 * 4 / 2**30:.1f} GiB in the cache",
        "steps: 6 in an epoch of 4 clips each",
    ]


@pytest.mark.parametrize("own_splits", [False, True])
def test_the_costs_of_the_full_training_are_those_of_isign(own_splits, monkeypatch, capsys):
    size = 42_547_000_000
    glosses = ["hello"] * 99_000 + [None, "nan ", " - "] + ["you"] * 1000
    table = datasets.Dataset.from_dict({"uid": [""] * len(glosses), "gloss": glosses})
    splits = ["train"] * 99_003 + ["validation"] * 1000 if own_splits else None
    fs = SimpleNamespace(size=lambda path: size)
    monkeypatch.setattr(
        model_selection, "locate_data", lambda: (model_selection.ISIGN, "hf://parts", None)
    )
    monkeypatch.setattr(model_selection, "load_rows", lambda dataset, token: (table, splits, None))
    monkeypatch.setattr(
        model_selection, "list_poses", lambda pattern, token: (fs, [*"abcd"], False)
    )
    model_selection.report_full_training()
    train = 99_000 if own_splits else 90_000
    assert [line[19:] for line in capsys.readouterr().out.splitlines()] == [
        "what train_final_model.py costs on all 100003 rows, about",
        f"{train} train, {100_000 - train} validation",
        "158.5 GiB of poses from the hub, once",
        "at most 5.4 GiB in the cache",  # 58,368 bytes each
        f"{train // 8} in an epoch of 8 clips each",
    ]


@pytest.mark.parametrize("fault", ["html", "wrong", "long"])
def test_a_passing_fault_of_the_hub_is_no_fault_of_a_clip(fault, hub, tmp_path):
    hub.faults += [None] * 12 + [fault] * 3
    first = run(tmp_path / "first", "model_selection.py", **TINY, PROCESSES=0)
    assert first.code == 0 and "left out         none" in first.out, first.err
    assert hub.faults == []


@pytest.mark.parametrize("fault", ["wrong", 403])
def test_a_fault_of_the_hub_that_stays_ends_the_run_and_is_not_kept(fault, hub, tmp_path):
    hub.faults += [None] * 12 + [fault] * 1000
    first = run(tmp_path / "first", "model_selection.py", **TINY, PROCESSES=0)
    assert first.code == 1 and len(first.errors) == 1 and "Traceback" not in first.err
    assert first.errors[0].startswith("error: the poses cannot be read any more; what was prepared")
    assert (str(fault) if isinstance(fault, int) else "what the hub sends") in first.errors[0]
    hub.faults.clear()
    second = run(tmp_path / "second", "model_selection.py", **TINY)
    assert second.code == 0 and "left out         none" in second.out, second.err


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_the_hub_says_of_the_archive_is_said(status, hub, tmp_path):
    hub.faults += [status] * 1000
    done = run(tmp_path / "run", "model_selection.py", **TINY)
    assert done.code == 1 and len(done.errors) == 1 and "Traceback" not in done.err
    assert "do not make up one zip" not in done.errors[0] and str(status) in done.errors[0]


def test_a_hub_that_stays_away_ends_the_run_with_one_line(hub, tmp_path):
    hub.faults += [None] * 12 + [503] * 1000
    result = run(tmp_path / "run", "model_selection.py", **TINY)
    assert (
        result.code == 1
        and len(result.errors) == 1
        and "stays: Server error '503" in result.errors[0]
    )
    assert "Traceback" not in result.err and TOKEN not in result.out + result.err


@pytest.mark.parametrize(
    "token, changes, said",
    [
        ("hf_wrong", {}, "401 Unauthorized"),
        (
            "hf_noTerms",
            {},
            "is a gated dataset on the Hub. Visit the dataset page at "
            "https://huggingface.co/datasets/Exploration-Lab/iSign",
        ),
        (TOKEN, {"DATASET": "Exploration-Lab/iSing"}, "'Exploration-Lab/iSing' doesn't exist"),
        (
            TOKEN,
            {"POSES": "nothing_part_*"},
            "no poses at hf://datasets/Exploration-Lab/iSign/nothing_part_*",
        ),
    ],
)
def test_access_that_is_missing_gets_its_own_line(hub, tmp_path, monkeypatch, token, changes, said):
    monkeypatch.setenv("HUGGINGFACE_HUB_TOKEN", token)
    result = run(tmp_path / "run", "model_selection.py", **TINY, **changes)
    assert result.code == 1 and len(result.errors) == 1 and said in result.errors[0]
    assert "Traceback" not in result.err and token not in result.out + result.err


def test_no_network_is_said_in_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(tmp_path / "run", "model_selection.py", **TINY)
    assert result.code == 1 and "Traceback" not in result.err
    assert len(result.errors) == 1 and "Couldn't reach 'Exploration-Lab/iSign'" in result.errors[0]
    assert os.environ["HUGGINGFACE_HUB_TOKEN"] not in result.err
