"""iSign's layout behind a gate, by the real client: what is read, kept, tried again, and said."""

import re

import huggingface_hub
import pytest
from helpers import TOKENS, change, clips_of, small, write_isign

import model_selection as script

TOKEN = "hf_thisIsTheSecretToken"
NONE_LEFT_OUT = "  left out         none\n"
UIDS = [f"{video:012x}-{clip}" for video in range(10) for clip in (1, 2, 3)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{path: bytes} of the data set."""
    folder = tmp_path_factory.mktemp("isign")
    rows = [(uid, f"hello word {uid[-1]}") for uid in UIDS]
    write_isign(folder, rows, clips_of(*UIDS, frames=12), parts=4)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def isign(hub, files, monkeypatch):
    """The hub with iSign's layout on it; requests of 200 kB, so that there are some."""
    hub.files = dict(files)
    small(DATASET=script.ISIGN, CONFIG="iSign_v1.1")
    monkeypatch.setattr(script, "GROUP_BYTES", 200_000)
    return hub


def load(**settings):
    huggingface_hub.HfFileSystem.clear_instance_cache()  # as another process
    change(**settings)
    return script.load_clips()[0]


def line(**settings):
    """The line that a run ends with, without the token."""
    with pytest.raises(SystemExit) as ended:
        load(**settings)
    said = ended.value.code
    assert said.startswith("error: ") and "\n" not in said and TOKEN not in said
    return said


def parts_read(hub):
    """Bytes of the archive that were sent, and by how many requests."""
    sizes = [size for name, _, size in hub.ranges if "part" in name]
    return sum(sizes), len(sizes)


def archive_bytes(files):
    return sum(len(data) for name, data in files.items() if "part" in name)


@pytest.mark.parametrize("size", [200_000, 2**24])
def test_each_byte_is_read_once_and_neighbours_by_one_request(
    size, isign, files, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(script, "GROUP_BYTES", size)
    found = load()
    assert len(found["train"]) + len(found["validation"]) == 30
    read, requests = parts_read(isign)
    whole = archive_bytes(files)
    assert whole > 2**20 and read <= 1.05 * whole + 2**17  # and the directory
    assert requests <= whole / size * 1.5 + 4 + 3  # 3 borders of parts
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if "part" in path.name]
    assert not [path for path in kept if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in str(kept) + "".join(capsys.readouterr())


def test_a_subset_reads_its_own_clips_alone_and_what_is_prepared_needs_no_network(
    isign, files, monkeypatch
):
    some = load(TRAIN_CLIPS=4, VALIDATION_CLIPS=1)
    assert [len(part) for part in some.values()] == [6, 3]  # whole videos of three clips
    whole = archive_bytes(files)
    assert parts_read(isign)[0] <= 0.35 * whole + 2**17
    first = load(TRAIN_CLIPS=0, VALIDATION_CLIPS=0)
    assert parts_read(isign)[0] <= 1.05 * whole + 2 * 2**17
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(script.datasets.config, "HF_HUB_OFFLINE", True)
    isign.requests.clear()
    assert load()["train"].crcs == first["train"].crcs and isign.requests == []
    assert "check the name, the network, HF_TOKEN" in line(DATASET="Exploration-Lab/other")


@pytest.mark.parametrize("fault", [503, "cut", "html", "wrong", "long"])
def test_a_passing_fault_of_the_hub_is_no_fault_of_a_clip(fault, isign, capsys):
    isign.faults += [None] * 6 + [fault] * 3
    load()
    assert NONE_LEFT_OUT in capsys.readouterr().out and isign.faults == []


@pytest.mark.parametrize("good", [0, 6])  # requests; the first are of the archive's directory
@pytest.mark.parametrize("fault", ["html", "long", 401, 403, 404, 429, 503])
def test_a_fault_of_the_hub_that_stays_ends_the_run_and_is_not_kept(fault, good, isign, capsys):
    isign.faults += [None] * good + [fault] * 1000
    said = line()
    assert said.startswith("error: the poses cannot be prepared; what was prepared stays: ")
    assert "zip" not in said
    assert re.search(f"{fault}|bytes came|what the hub sends of .+-[123] cannot be right", said)
    isign.faults.clear()
    load()
    assert NONE_LEFT_OUT in capsys.readouterr().out


def test_a_clip_that_is_damaged_in_the_hubs_archive_is_left_out_alone(isign, files, capsys):
    """The same bytes come twice. The next run looks again."""
    name = "iSign-poses_v1.1_part_ab"
    isign.files[name] = files[name][:9000] + b"?" * 50 + files[name][9050:]
    isign.faults += [None] * 6 + ["cut"]
    load()
    assert re.search("left out +1 damaged in the archive", capsys.readouterr().out)
    isign.files[name] = files[name]
    isign.ranges.clear()
    load()
    assert NONE_LEFT_OUT in capsys.readouterr().out
    assert parts_read(isign)[0] < archive_bytes(files) / 4


def test_a_token_that_expired_or_a_page_instead_of_the_listing_is_said_and_not_kept(isign, capsys):
    load(MAX_FRAMES=10)  # so that the table is there
    isign.tokens[TOKEN] = 401
    assert "401" in line(MAX_FRAMES=12)
    isign.tokens[TOKEN], isign.log_in_page = None, True
    line()
    isign.log_in_page = False
    load()
    assert capsys.readouterr().out.count(NONE_LEFT_OUT) == 2


@pytest.mark.parametrize(
    "token, changes, said",
    [("hf_wrong", {}, "401"), ("hf_noTerms", {}, "is a gated dataset on the Hub")]
    + [(TOKEN, {"DATASET": "Exploration-Lab/iSing"}, "'Exploration-Lab/iSing' doesn't exist")]
    + [(TOKEN, {"POSES": "no_part_*"}, "no poses at hf://datasets/Exploration-Lab/iSign/no_part")],
)
def test_access_that_is_missing_gets_its_own_line(isign, monkeypatch, token, changes, said):
    isign.tokens["hf_noTerms"] = 403
    monkeypatch.setenv("HF_TOKEN", token)
    assert said in line(**changes)


def test_no_network_is_said_in_one_line(isign, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(script.datasets.config, "HF_HUB_OFFLINE", True)
    assert "Couldn't reach 'Exploration-Lab/iSign' on the Hub" in line()


@pytest.mark.parametrize("variable", TOKENS)
def test_with_a_token_there_is_no_sample(variable, isign, monkeypatch, capsys):
    """HF_TOKEN is taken first, and without the spaces around it."""
    monkeypatch.delenv("HF_TOKEN")
    if variable == "HF_TOKEN":
        monkeypatch.setenv("HUGGINGFACE_HUB_TOKEN", "hf_stale")
    monkeypatch.setenv(variable, f" {TOKEN}\n")
    load()
    out = capsys.readouterr().out
    assert "data               Exploration-Lab/iSign\n" in out and "SAMPLE" not in out


@pytest.mark.parametrize("token", ["hf_SECRET\n", "hf_SECRET\x00", "hf_SECRET\nX: y", "hf_SE CRET"])
def test_a_token_is_never_shown(token, isign, monkeypatch, capsys):
    """A line's end in it makes the client say what it is."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(script.huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(script.os, "environ", {**script.os.environ, "HUGGINGFACE_HUB_TOKEN": token})
    with pytest.raises(SystemExit) as ended:
        load()
    error = RuntimeError(f"Illegal header value b'Bearer {token.strip()}'")
    said = ended.value.code + "".join(capsys.readouterr()) + script.reason_of(error)
    assert "CRET" not in said
    said = "no room in /scratch/hf_home/hf_datasets_cache for hf_AbcDefGhiJklMnoPqrStuVwxYz0123"
    assert script.reason_of(OSError(said)) == said[:50] + "***"


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_the_hubs_poses_may_be_a_folder_or_one_zip(form, isign, files, tmp_path, capsys):
    parts = [isign.files.pop(name) for name in sorted(files) if "part" in name]
    if form == "zip":
        isign.files["poses.zip"] = b"".join(parts)
    else:
        for uid, data in clips_of(*UIDS, frames=12).items():
            isign.files[f"poses/{uid}.pose"] = data
    isign.faults += [None] * 6 + ["cut", "html"]
    load(POSES="poses.zip" if form == "zip" else "poses")
    assert NONE_LEFT_OUT in capsys.readouterr().out and isign.faults == []


@pytest.mark.parametrize("own", [0, 1])
def test_the_selection_says_what_the_full_training_costs(own, isign, capsys):
    isign.files["iSign_v1.1.csv"] += b"aaaaaaaaaaaa-1,\nbbbbbbbbbbbb-1,nan \n"  # without a text
    if own:  # splits
        isign.files["val.csv"] = f"uid,text\n{UIDS[0]},go\n".encode()
        splits = "[{split: train, path: iSign_v1.1.csv}, {split: val, path: val.csv}]"
        config = f"{{config_name: iSign_v1.1, data_files: {splits}}}"
        isign.files["README.md"] = f"---\nconfigs:\n- {config}\n---\n".encode()
    load(TRAIN_CLIPS=4, VALIDATION_CLIPS=1, BATCH_SIZE=4, MAX_FRAMES=24, VALIDATION_SHARE=0.2)
    capsys.readouterr()
    script.report_full_training(script.DATASET)
    train, validation = (30, 1) if own else (24, 6)
    told = [text[:19].strip() + ": " + text[19:] for text in capsys.readouterr().out.splitlines()]
    assert told == [
        f"full training: what train_final_model.py costs on all {32 + own} rows, about",
        f"clips: {train} train, {validation} validation",  # those with a text, not of the subset
        f"read: {archive_bytes(isign.files) / 2**30:.1f} GiB of poses from the hub, once",
        f"kept: at most {(30 + own) * 24 * 152 * 4 / 2**30:.1f} GiB in the cache",
        f"steps: {-(-train // 4)} in an epoch of 4 clips each",
    ]
