"""Which model suits the data? Short runs of the candidates on a subset, gloss -> pose on iSign.

    python model_selection.py

Reads the data set named below, or an embedded sample where iSign's hub id has no access token.
Writes selection_<model>.pt for every candidate into this folder, and the prepared clips into the
cache of `datasets`. The settings are constants at the top of the file.
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import dataclasses
import fcntl
import functools
import glob
import hashlib
import io
import itertools
import lzma
import math
import os
import random
import re
import signal
import sys
import threading
import time
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while the libraries are imported, which takes seconds
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
elif __name__ == "__mp_main__":  # a process of the script's where they are spawned
    signal.signal(signal.SIGINT, signal.SIG_IGN)

import datasets
import fsspec
import huggingface_hub
import multiprocess
import numpy as np
import pose_format
import tokenizers
import torch
import transformers
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

# SETTINGS: edit them and run again
# ---- the data: the same in both scripts
DATASET = "Exploration-Lab/iSign"  # hub id, a local folder of the same layout, or "sample"
CONFIG = "iSign_v1.1"  # the data set's configuration; None: its default
POSES = "iSign-poses_v1.1_part_*"  # parts of a zip in DATASET; or a zip, or a folder of .pose
VALIDATION_SHARE = 0.1  # of the videos, where the data has no splits of its own
MAX_BAD_SHARE = 0.2  # of a split's clips that may be unusable before the run ends
FPS = 25  # frames per second
MAX_FRAMES = 96  # a longer clip is resampled to so many, not cut
POSE_DIM = 152  # 76 keypoints x (x, y)
MAX_GLOSS_LEN = 16  # glosses of a sentence; what is beyond is cut
MIN_GLOSS_COUNT = 2  # rarer glosses of the training split are <unk>, so that <unk> is trained
TRAIN_CLIPS = 480  # the subset, drawn by whole videos; 0: all
VALIDATION_CLIPS = 120
PROCESSES = 2  # that prepare clips; 0: only the script itself
# ---- the models
CANDIDATES = ["gru", "transformer"]  # "bert" is allowed, too
BERT_NAME = "bert-base-uncased"  # hub id, or a folder with a model and its tokenizer
EMBED_DIM = 256  # of the glosses' embeddings, and the Transformer's width
HIDDEN_DIM = 512  # of the GRUs, and of the Transformer's feed-forward layers
DROPOUT = 0.1  # of the features
WORD_DROPOUT = 0.1  # of the glosses, which become <unk> (not with BERT)
# ---- the training
EPOCHS = 6  # at most
PATIENCE = 2  # epochs without a lower validation MSE before a run stops
BATCH_SIZE = 8  # clips of a step
SEED = 0  # of all that is drawn
LR_GRU = 1e-3  # also of BERT's decoder
LR_TRANSFORMER = 5e-4
LR_BERT = 2e-5  # of the pretrained encoder
WARMUP = 0.05  # share of the steps in which the rates rise; then they fall to 0
GRAD_CLIP = 1.0  # the longest gradient; 0: any
DURATION_WEIGHT = 0.1  # of the error of the log duration, beside the MSE
SPEED_WEIGHT = 0.15  # of the error of the points' speeds, which keeps the hands moving
CONFIDENCE_WEIGHT = 0.1  # of the error of which points are seen
AVERAGE = 0.999  # of the moving average of the weights, which is evaluated and saved; 0: no average
MIXED_PRECISION = True  # bfloat16 on GPUs that compute with it

# ==== SHARED BLOCK: begin (the same bytes in both scripts, which a test compares)
# It reads in the order in which a clip travels: settings, rows, .pose files, preparing, batches,
# models, losses and metrics, training. Within a section helpers come first: load_clips is the way
# from the rows to the prepared clips, PoseModel.forward the way from glosses to poses, and
# train_epochs a training.
#
# B clips of a batch, S glosses or word pieces, T frames, K keypoints, D = 2 K pose numbers, H
# hidden size. Masks: True = real. A pose number that is NaN was not seen or is padding: it enters
# no loss, no metric and no statistic.
ISIGN = "Exploration-Lab/iSign"

FINGERS = ["INDEX_FINGER", "MIDDLE_FINGER", "RING_FINGER", "PINKY"]
HAND = ["WRIST", "THUMB_CMC", "THUMB_MCP", "THUMB_IP", "THUMB_TIP"]
HAND += [f"{finger}_{joint}" for finger in FINGERS for joint in ("MCP", "PIP", "DIP", "TIP")]
BODY = ["NOSE"]
for joint in ("EYE", "EAR", "SHOULDER", "ELBOW", "WRIST"):
    BODY += [f"LEFT_{joint}", f"RIGHT_{joint}"]
FACE_NUMBERS = [61, 291, 17, 0, 70, 105, 107, 300, 334, 336, 161, 158]
FACE_NUMBERS += [33, 163, 153, 133, 388, 385, 263, 390, 380, 362, 9]
FACE = [str(number) for number in FACE_NUMBERS]
# The 76 keypoints of PoseStitch-SLT (EMNLP 2025), by their names in MediaPipe's .pose files
PARTS = {
    "LEFT_HAND_LANDMARKS": HAND,
    "RIGHT_HAND_LANDMARKS": HAND,
    "POSE_LANDMARKS": BODY,
    "FACE_LANDMARKS": FACE,
}
POINTS = [(part, name) for part, names in PARTS.items() for name in names]
SHOULDERS = [POINTS.index(("POSE_LANDMARKS", f"{side}_SHOULDER")) for side in ("LEFT", "RIGHT")]
WRISTS = [POINTS.index(("POSE_LANDMARKS", f"{side}_WRIST")) for side in ("LEFT", "RIGHT")]
HANDS_AND_WRISTS = [*range(2 * len(HAND)), *WRISTS]

MAX_DISTANCE = 10  # shoulder widths from the origin: a point farther out is a detector's error
MAX_POSE_BYTES = 2**28  # of a .pose file: 25 minutes of MediaPipe Holistic
MAX_CONFIDENCE = 1.5  # above it a number is no confidence, so that the file was cut short
END_OF_ZIP = 22  # bytes of a zip's last record, of which a comment is the end
SHARD = 2000  # clips of one file of the cache: what a killed preparation can lose
PREPARATION = 1  # the version of the prepared clips: another one prepares all of them anew
CLIP = datasets.Features(
    {
        "key": datasets.Value("string"),  # of the row that it was made of
        "gloss": datasets.Value("string"),
        "problem": datasets.Value("string"),  # why the clip cannot be used, or ""
        "seconds": datasets.Value("float32"),
        "pose": datasets.List(datasets.Value("float32")),  # (T * D)
    }
)
PAD = 0
UNK = 1
PIECES_PER_GLOSS = 4  # word pieces that a pretrained encoder reads of a gloss, on average, at most


class BadClip(Exception):
    """A clip that is left out; the message is the reason that it is counted under."""


class FaultyRead(OSError):
    """What came is not what was asked for: too short, too long."""


def reason_of(error):
    """An exception -> the first line of what caused it at the bottom, on which libraries build."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def check_settings():
    """SystemExit with one line for a setting that is missing, or that no run can have."""
    try:
        whole_numbers = {  # name: value, lowest, highest
            "TRAIN_CLIPS": (TRAIN_CLIPS, 0, 10**9),
            "VALIDATION_CLIPS": (VALIDATION_CLIPS, 0, 10**9),
            "MAX_FRAMES": (MAX_FRAMES, 1, 10_000),
            "POSE_DIM": (POSE_DIM, 1, 10_000),
            "MAX_GLOSS_LEN": (MAX_GLOSS_LEN, 1, 10_000),
            "MIN_GLOSS_COUNT": (MIN_GLOSS_COUNT, 1, 10**9),
            "PROCESSES": (PROCESSES, 0, 1000),
            "EMBED_DIM": (EMBED_DIM, 1, 16_384),
            "HIDDEN_DIM": (HIDDEN_DIM, 2, 16_384),
            "EPOCHS": (EPOCHS, 1, 10**6),
            "PATIENCE": (PATIENCE, 1, 10**6),
            "BATCH_SIZE": (BATCH_SIZE, 1, 10**6),
            "SEED": (SEED, 0, 2**31),
        }
        numbers = {
            "VALIDATION_SHARE": (VALIDATION_SHARE, 0, 1),
            "MAX_BAD_SHARE": (MAX_BAD_SHARE, 0, 1),
            "FPS": (FPS, 1, 1000),
            "DROPOUT": (DROPOUT, 0, 0.99),
            "WORD_DROPOUT": (WORD_DROPOUT, 0, 0.99),
            "LR_GRU": (LR_GRU, 0, 1),
            "LR_TRANSFORMER": (LR_TRANSFORMER, 0, 1),
            "LR_BERT": (LR_BERT, 0, 1),
            "WARMUP": (WARMUP, 0, 1),
            "GRAD_CLIP": (GRAD_CLIP, 0, 10**9),
            "DURATION_WEIGHT": (DURATION_WEIGHT, 0, 10**9),
            "SPEED_WEIGHT": (SPEED_WEIGHT, 0, 10**9),
            "CONFIDENCE_WEIGHT": (CONFIDENCE_WEIGHT, 0, 10**9),
            "AVERAGE": (AVERAGE, 0, 0.99999),
        }
        texts = {"DATASET": DATASET, "POSES": POSES, "BERT_NAME": BERT_NAME}
        texts["CONFIG"] = "default" if CONFIG is None else CONFIG
        switches = {"MIXED_PRECISION": MIXED_PRECISION}
    except NameError as error:
        raise SystemExit(f"error: {error}: it is a setting of this script's top") from None
    for kind, types, settings in (
        ("whole number", int, whole_numbers),
        ("number", (int, float), numbers),
    ):
        for name, (value, low, high) in settings.items():
            right_type = isinstance(value, types) and not isinstance(value, bool)
            if not right_type or not low <= value <= high:
                raise SystemExit(f"error: {name} = {value!r} is no {kind} from {low} to {high}")
    for name, value in texts.items():
        if not isinstance(value, (str, os.PathLike)) or not str(value):
            raise SystemExit(f"error: {name} = {value!r} is no text")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise SystemExit(f"error: {name} = {value!r} is neither True nor False")


def save(path, contents):
    """Bytes, or a checkpoint (a dict) -> a file that is the old one or the new one, and whole.

    SystemExit where it cannot be written; what was there before stays.
    """
    if isinstance(contents, dict):
        buffer = io.BytesIO()  # not into the file: torch makes a RuntimeError of a full disk
        torch.save(contents, buffer)
        contents = buffer.getbuffer()
    temporary = f"{path}.{os.getpid()}.tmp"  # a name that no other run has
    try:
        with open(temporary, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        message = f"error: {path} cannot be written ({error.strerror}); what was there before stays"
        raise SystemExit(message) from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def claim_folder(name):
    """Keep a second run of this name out of the folder -> the lock, which ends with the process."""
    try:
        file = open(f".{name}.lock", "w")  # noqa: SIM115 (it stays open)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"error: another run of {name} is at work in this folder") from None
    return file


# ---- rows: glosses, videos, splits
def split_glosses(text):
    """A gloss sentence or English text -> its glosses: upper case, without sentence punctuation."""
    words = unicodedata.normalize("NFC", "" if text is None else str(text)).upper().split()
    marks = ".,;:!?\"'“”„‘’«»()[]{}<>…।॥-–—*/\\|"
    stripped = [word.strip(marks) for word in words]
    return [word for word in stripped if word]


def has_text(gloss):
    """Whether there is a text; iSign has "nan " for some that there are not."""
    return bool(split_glosses(gloss)) and str(gloss).strip() != "nan"


def video_of(uid):
    """A clip's uid -> the video it was cut from; a uid of another form than iSign's is its own."""
    forms = r"^(?:([0-9a-f]{12})-\d+|(.{11})(?:--\d+|_(?:w|d|e\d+)))\Z"
    return re.sub(forms, r"\1\2", uid)


def split_by_video(videos, share):
    """Videos of the clips -> those that validate, by their hash; there is one on each side."""
    shares = {video: random.Random(video).random() for video in videos}
    order = sorted(shares, key=shares.get)
    if len(order) < 2:
        raise SystemExit("error: the clips are of a single video: there is nothing to validate on")
    wanted = sum(value < share for value in shares.values())
    return set(order[: min(max(1, wanted), len(order) - 1)])


def draw_subset(videos, clips):
    """Videos of the clips -> some that hold `clips` clips or more (0: all), always the same."""
    sizes = collections.Counter(videos)
    drawn, held = set(), 0
    for video in sorted(sizes, key=lambda video: random.Random(f"subset {video}").random()):
        if clips and held >= clips:
            break
        drawn.add(video)
        held += sizes[video]
    return drawn


def locate_data():
    """-> where the rows are (or "sample"), the pattern of where the poses are, the access token."""
    # the hub's library does not read the variable that people are told to set
    token = os.environ.get("HUGGINGFACE_HUB_TOKEN") or huggingface_hub.get_token()
    dataset = str(DATASET)
    if dataset == ISIGN and token is None:
        print("!" * 80)
        print(f"!!  NO ACCESS TOKEN: {ISIGN} is gated; what follows is NOT iSign,")
        print("!!  but an embedded, synthetic SAMPLE. For iSign accept its terms, and set")
        print("!!  HF_TOKEN (see the README).")
        print("!" * 80)
        dataset = "sample"
    if os.path.isdir(dataset) and os.path.realpath(dataset) == os.path.realpath(os.sep):
        raise SystemExit(f"error: DATASET {dataset!r} is the whole disk: name a folder of data")
    pattern = str(POSES)
    if os.path.exists(pattern):
        return dataset, glob.escape(pattern), token
    folder, name = os.path.split(pattern)
    if os.path.isdir(folder):  # its name is no pattern, as in run[1]/part_*
        pattern = os.path.join(glob.escape(folder), name)
    if not glob.glob(pattern) and not os.path.isabs(pattern):
        if os.path.isdir(dataset):
            pattern = os.path.join(glob.escape(dataset), pattern)
        else:
            pattern = f"hf://datasets/{dataset}/{pattern}"
    return dataset, pattern, token


def cache_key(*values):
    return hashlib.sha256(repr(values).encode("utf8", "surrogatepass")).hexdigest()[:32]


def state_of(paths):
    """Local files -> a key that changes where one of them is replaced, added or removed."""
    files = []
    for path in sorted(paths):
        stat = os.stat(path)
        files.append((os.path.realpath(path), stat.st_size, stat.st_mtime_ns))
    return cache_key(files)


def path_for_library(folder):
    """A folder -> a path of it that `datasets` takes as it is.

    The library needs the folder's name, which "." lacks, takes every path for a pattern, so that it
    finds nothing in run[1], and takes a log beside a table for one more table: what it is to read
    of such folders is linked to in the cache.
    """
    folder = os.path.realpath(folder)
    logs = {f"log_{name}.csv" for name in MODELS}
    names = set(os.listdir(folder))
    if glob.escape(folder) == folder and not names & logs:
        return folder
    links = Path(datasets.config.HF_DATASETS_CACHE, f"links_{cache_key(folder)}")
    links.mkdir(parents=True, exist_ok=True)
    for name in names - logs:
        with contextlib.suppress(FileExistsError):
            (links / name).symlink_to(os.path.join(folder, name))
    return str(links)


def has_no_row(path):
    """Whether it is a CSV of a header alone, whose columns have no type for the library."""
    if not path.endswith(".csv"):
        return False
    with open(path, "rb") as file:
        return file.readline().strip() != b"" and not any(line.strip() for line in file)


def local_tables(folder):
    """A local folder -> its path for the library, and the state of the files that it will read."""
    path = path_for_library(folder)
    files_of = datasets.load_dataset_builder(path, CONFIG).config.data_files or {}
    for split, files in files_of.items():
        if all(has_no_row(file) for file in files):
            raise SystemExit(f"error: the {split} split of DATASET {folder!r} has no row")
    return path, state_of([file for files in files_of.values() for file in files])


def read_tables(path, options):
    """A data set's files -> {split: Dataset}.

    What is read of a CSV is text. The library would guess it from the values: 001 and 1e5 are uids
    and no numbers, NA is a uid and no gap, and 10,000 rows without a text are no numbers.
    """
    as_text = {"converters": {"uid": str, "text": str, "gloss": str}, "na_filter": False}
    try:
        return datasets.load_dataset(path, CONFIG, **options, **as_text)
    except ValueError:  # it is no CSV
        return datasets.load_dataset(path, CONFIG, **options)


def load_tables(dataset, token):
    """The data set's tables {split: Dataset}, and a key of the state of local files or None."""
    if dataset == "sample":
        return {"train": sample_rows(320, 1), "validation": sample_rows(80, 2)}, None
    path, state, options = dataset, None, {"token": token}
    advice = ". Check the name, the network, HF_TOKEN, and that you accepted the data set's terms"
    try:
        if os.path.isdir(dataset):  # the library's own cache knows a folder by its name alone
            path, state = local_tables(dataset)
            options["cache_dir"] = f"{datasets.config.HF_DATASETS_CACHE}/local_{state}"
        return read_tables(path, options), state
    except Exception as error:  # of the library, which has many kinds
        message = f"error: cannot load DATASET {dataset!r}, CONFIG {CONFIG!r}: {reason_of(error)}"
        is_read = isinstance(error, datasets.exceptions.DatasetGenerationError)
        if not is_read and not os.path.exists(dataset):
            message = message.rstrip(".") + advice
        raise SystemExit(message) from None


def is_plain(table, column):
    """Whether the table has this column, of texts or numbers."""
    return isinstance(table.features.get(column), datasets.Value)


def load_rows(dataset, token):
    """-> rows, a Dataset of key, uid, gloss (and pose); each one's split or None; their state."""
    tables, state = load_tables(dataset, token)
    held_out = next(
        (name for name in ("validation", "valid", "val", "dev") if name in tables), None
    )
    parts = [tables[name] for name in ("train", held_out) if name in tables]
    has_pose = all("pose" in part.column_names for part in parts)
    text = "gloss" if all("gloss" in part.column_names for part in parts) else "text"
    if "train" not in tables or not all(
        is_plain(part, text) and (has_pose or is_plain(part, "uid")) for part in parts
    ):
        found = [f"{name} with {', '.join(tables[name].column_names) or 'none'}" for name in tables]
        raise SystemExit(
            f"error: DATASET {dataset!r} needs a split train with the columns gloss or text, and "
            f"pose or uid; it has {'; '.join(found) or 'no split'}"
        )
    uids, glosses, splits = [], [], []
    for split, part in zip(("train", "validation"), parts, strict=False):
        uids += part["uid"][:] if is_plain(part, "uid") else [None] * len(part)
        glosses += part[text][:]
        splits += [split] * len(part)
    # a row without a uid is known by its place, and by a name that no uid has
    uids = [f"row {i}" if uid in (None, "") else str(uid) for i, uid in enumerate(uids)]
    glosses = [None if gloss is None else str(gloss) for gloss in glosses]
    keys = []
    for i, (uid, gloss) in enumerate(zip(uids, glosses, strict=True)):
        keys.append(cache_key(uid, gloss, i if has_pose else None))
    columns = {"key": keys, "uid": uids, "gloss": glosses}
    kinds = datasets.Features({name: datasets.Value("string") for name in columns})
    rows = datasets.Dataset.from_dict(columns, kinds)
    if has_pose:
        poses = datasets.concatenate_datasets([part.select_columns(["pose"]) for part in parts])
        state = state or poses._fingerprint
        rows = datasets.concatenate_datasets([rows, poses], axis=1)
    return rows, splits if held_out else None, state


def counted(reasons):
    return ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()) or "none"


def choose_rows(rows, splits):
    """Which rows are used -> {split: their numbers}, a Counter of what was left out, and a report.

    Without splits of the data's own the rows are split by video. TRAIN_CLIPS and VALIDATION_CLIPS
    draw whole videos.
    """
    uids, glosses = rows["uid"][:], rows["gloss"][:]
    videos = [video_of(uid) for uid in uids]
    named = not all(uid.startswith("row ") for uid in uids)
    origin = "the data's own splits"
    if splits is None:
        held_out = split_by_video(videos, VALIDATION_SHARE)
        splits = ["validation" if video in held_out else "train" for video in videos]
        origin = "split by video" if named else "split by row"
    left_out, seen = collections.Counter(), set()
    usable = {"train": [], "validation": []}
    for i, gloss in enumerate(glosses):
        if not has_text(gloss):
            left_out["no text"] += 1
        elif (splits[i], uids[i]) in seen:
            left_out["uid twice"] += 1
        else:
            seen.add((splits[i], uids[i]))
            usable[splits[i]].append(i)
    chosen, drawn = {}, {}
    for split, limit in (("train", TRAIN_CLIPS), ("validation", VALIDATION_CLIPS)):
        if not usable[split]:
            raise SystemExit(f"error: no row of the {split} split has a text ({counted(left_out)})")
        drawn[split] = draw_subset([videos[i] for i in usable[split]], limit)
        chosen[split] = [i for i in usable[split] if videos[i] in drawn[split]]
    both = f"{len(drawn['train'] & drawn['validation'])} videos in both"
    return chosen, left_out, f"{origin}; {both if named else 'no uid names the videos'}"


SAMPLE_WORDS = """HELLO I YOU WANT GO SCHOOL HOUSE WATER
    EAT BOOK TEACHER GOOD NOT UNDERSTAND FAMILY WORK"""
ARM_AT_REST = np.array([0.45, 1.3, 1.4, 0.8, 0.9, 1, 0.9, 0.8])
SAMPLE_HEAD = """-.75j .1-.86j -.1-.86j .21-.8j -.21-.8j -.1-.55j .1-.55j -.5j -.58j -.18-.94j
    -.12-.97j -.05-.94j .18-.94j .12-.97j .05-.94j -.14-.86j -.1-.88j -.17-.85j -.14-.83j -.1-.83j
    -.06-.85j .14-.86j .1-.88j .17-.85j .14-.83j .1-.83j .06-.85j -.92j"""


def sample_signs(rng, n):
    """-> (n, 3 moments, 2 arms, 8): the wrist's x and y, the hand's turn, the fingers' reach."""
    lowest = [-0.1, -0.5, -2.2] + [0.2] * 5
    highest = [0.7, 0.9, -0.6] + [1] * 5
    signs = rng.uniform(lowest, highest, (n, 3, 2, 8))
    signs[::3, :, 0] = signs[::3, :, 1]  # one in three is signed with both hands
    signs[1::3, :, 0] = ARM_AT_REST
    signs[2::3, :, 0] = ARM_AT_REST
    return signs


def sample_rows(n, seed):
    """A synthetic Dataset of n rows of gloss and pose, the same in every run.

    Sentences of 1 to 4 glosses flow into each other, at a speed of their own. Points are complex
    numbers here: x grows to the signer's left, y downwards, the shoulders are at -0.5 and 0.5.
    """
    words = SAMPLE_WORDS.split()
    head = np.array(SAMPLE_HEAD.split(), complex)
    fan = np.exp(0.25j * np.arange(-2, 3))[:, None] * np.linspace(0.1, 0.34, 4)  # a hand's fingers
    signs = sample_signs(np.random.default_rng(0), len(words))
    right_hand = slice(2 * len(HAND), 4 * len(HAND))  # numbers of a frame
    rest = [[ARM_AT_REST, ARM_AT_REST]]
    rng = np.random.default_rng([seed, 1000])
    rows = []
    for _ in range(n):
        said = rng.integers(0, len(words), rng.integers(1, 5))
        shaken = signs[said] + rng.normal(0, 0.03, (len(said), 3, 2, 8))
        moments = np.concatenate([rest, *shaken, rest])
        times = np.cumsum([0, *[0.25, 0.35, 0.35] * len(said), 0.3]) / rng.uniform(0.8, 1.25)
        at = np.arange(0, times[-1], 1 / 25)
        before = np.searchsorted(times, at, side="right") - 1
        part = 0.5 - 0.5 * np.cos(np.pi * (at - times[before]) / np.diff(times)[before])
        part = part[:, None, None]
        arms = moments[before] * (1 - part) + moments[before + 1] * part  # (frames, 2, 8)
        wrist = arms[..., :1] + 1j * arms[..., 1:2]
        turn, reach = np.exp(1j * arms[..., 2:3]), arms[..., 3:]
        fingers = wrist[..., None] + fan * (turn * reach)[..., None]
        shoulder, elbow = 0.5 + 0 * wrist, 0.62 + 0.55j + wrist / 5
        sides = np.concatenate([shoulder, elbow, wrist, fingers.reshape(-1, 2, 20)], 2)
        sides[:, 1] = -sides[:, 1].conj()  # the right arm is the left one's mirror image
        body = sides[:, :, :3].swapaxes(1, 2).reshape(-1, 6)
        face = np.tile(head, (len(at), 1))
        parts = [sides[:, 0, 2:], sides[:, 1, 2:], face[:, :5], body, face[:, 5:]]
        pose = np.concatenate(parts, 1).view(float)
        lost = rng.integers(0, 4 * len(at))  # in every fourth clip the right hand is out of sight
        pose[lost : lost + 8, right_hand] = np.nan
        pose += rng.normal(0, 0.004, pose.shape)
        rows.append({"gloss": " ".join(words[i] for i in said), "pose": pose})
    return datasets.Dataset.from_list(rows)


# ---- .pose files: where they are, and what is in them
class JoinedParts(fsspec.spec.AbstractBufferedFile):
    """An archive that was cut into parts by size, as one seekable file that is read by ranges."""

    def __init__(self, fs, paths):
        self.paths = paths
        sizes = [fs.size(path) for path in paths]
        self.starts = [0, *itertools.accumulate(sizes)]  # of each part, and the end of the last
        # the zip's directory stands at the end, and is found by a few small reads
        super().__init__(fs, paths[0], cache_type="readahead", block_size=2**16, size=sum(sizes))

    def _fetch_range(self, start, end):
        data = b""
        for path, first, last in zip(self.paths, self.starts, self.starts[1:], strict=False):
            low, high = max(start, first), min(end, last)
            if low < high:
                data += read_range(self.fs, path, low - first, high - first)
        return data

    def read_ahead(self, size):
        """Forget what was read, and read at least `size` bytes by the next request."""
        self.cache = fsspec.caching.ReadAheadCache(size, self._fetch_range, self.size)


def read_range(fs, path, start, end):
    """A file's bytes from start to end, opened anew: nothing is shared with forked processes."""
    data = fs.cat_file(path, start=start, end=end, cache_type="none")
    if len(data) != end - start:
        raise FaultyRead(f"{len(data)} bytes of {path} came instead of {end - start}")
    return data


# What the libraries raise where bytes are damaged: the zip's, and the hub's in its listings (a
# JSONDecodeError, which is a ValueError)
DAMAGED = (FaultyRead, EOFError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


def is_local(fs):
    return "file" in fs.protocol


def read_again(fs, read):
    """read() -> its bytes. What is damaged on the disk is a bad clip. What is damaged on its way
    from the hub says nothing about the clip: it is asked for again, and in the end an OSError."""
    for pause in (1, 3, 9, 0):
        try:
            return read()
        except DAMAGED as error:
            if is_local(fs):
                raise BadClip("damaged in the archive") from error
            problem = error
        except RuntimeError as error:  # of the zip library
            raise BadClip("encrypted or compressed in an unknown way") from error
        time.sleep(pause)
    raise OSError(f"what the hub sends cannot be right: {reason_of(problem)}")


class PoseArchive:
    """A zip of .pose files, whole or in parts. read(uid) -> the bytes of one, by one request."""

    def __init__(self, fs, paths):
        self.parts = JoinedParts(fs, paths)
        self.parts.seek(max(0, self.parts.size - END_OF_ZIP))  # where zipfile begins to read
        self.parts.read()  # since it takes an error of the hub for a file that is no zip
        try:
            self.zip = zipfile.ZipFile(self.parts)
        except zipfile.BadZipFile as error:
            raise SystemExit(
                f"error: {', '.join(paths)} do not make up one zip ({error}); is a part missing?"
            ) from None
        # glibc returns less memory to the system once a block of such a size was freed: without
        # this, fetching the memory of each clip anew takes an eighth of the time
        bytes(2**24)
        members = [info for info in self.zip.infolist() if info.filename.endswith(".pose")]
        self.check_parts(members)
        self.members = {Path(info.filename).stem: info for info in members}

    def is_member(self, offset):
        """Whether a member of the zip begins there."""
        if offset < 0:
            return False
        self.parts.read_ahead(0)
        self.parts.seek(offset)
        return self.parts.read(4) == b"PK\x03\x04"

    def check_ends(self, offsets):
        """SystemExit where the first or the last part is foreign: zipfile looks for the zip in
        what it is given, whatever stands before or behind it."""
        foreign = None
        if offsets and offsets[0] > 0 and self.is_member(offsets[0]):
            foreign = self.parts.paths[0]
        self.parts.read_ahead(0)
        self.parts.seek(-END_OF_ZIP - len(self.zip.comment), os.SEEK_END)
        if self.parts.read(4) != b"PK\x05\x06":
            foreign = self.parts.paths[-1]
        if foreign:
            raise SystemExit(f"error: {foreign} is no part of the zip that the other parts make up")

    def check_parts(self, members):
        """SystemExit where a part is missing, foreign or in another's place: where the directory
        has the first member of a part, there must be one."""
        offsets = sorted(info.header_offset for info in members)
        if len(self.parts.paths) > 1:
            self.check_ends(offsets)
        # zipfile moves all of them where the file is longer or shorter than the directory says
        moved = 0 if not offsets or self.is_member(offsets[0]) else offsets[0]
        bounds = zip(self.parts.paths, self.parts.starts, self.parts.starts[1:], strict=False)
        for path, start, end in bounds:
            within = (offset - moved for offset in offsets if start <= offset - moved < end)
            first = next(within, None)
            if first is not None and not self.is_member(first):
                raise SystemExit(
                    f"error: {path} does not go on where the part before it ends: is one of "
                    f"{', '.join(self.parts.paths)} missing, foreign or in another's place?"
                )

    def read(self, uid):
        if uid not in self.members:
            raise BadClip("no .pose file")
        info = self.members[uid]
        if max(info.file_size, info.compress_size) > MAX_POSE_BYTES:
            raise BadClip("too large")

        def read():
            # zipfile reads the local header and then the data: all of it by one request
            self.parts.read_ahead(info.compress_size + 512)
            return self.zip.read(info)

        return read_again(self.parts.fs, read)


class PoseFolder:
    """A folder of .pose files. read(uid) -> the bytes of one."""

    def __init__(self, fs, paths):
        self.fs = fs
        self.paths = {Path(path).stem: path for path in paths}

    def read(self, uid):
        if uid not in self.paths:
            raise BadClip("no .pose file")
        size = self.fs.size(self.paths[uid])
        if size > MAX_POSE_BYTES:
            raise BadClip("too large")
        return read_again(self.fs, lambda: read_range(self.fs, self.paths[uid], 0, size))


def list_poses(pattern, token):
    """A pattern, local or hf:// -> the file system, its paths, and whether they are .pose files."""
    if not pattern.startswith("hf://"):
        fs = fsspec.filesystem("file")
        paths = sorted(glob.glob(pattern))
        if len(paths) == 1 and os.path.isdir(paths[0]):
            return fs, sorted(glob.glob(f"{glob.escape(paths[0])}/*.pose")), True
        return fs, paths, False
    fs = huggingface_hub.HfFileSystem(token=token)
    folder = fs.isdir(pattern)
    return fs, sorted(fs.glob(f"{pattern}/*.pose" if folder else pattern)), folder


@functools.cache  # once per process: the directory of iSign's archive has 127,237 entries
def open_poses(pattern, token):
    """Parts of a zip, a zip, or a folder -> a PoseArchive or a PoseFolder; SystemExit for none."""
    try:
        fs, paths, folder = list_poses(pattern, token)
        if not paths:
            raise SystemExit(
                f"error: no poses at {pattern}; set POSES to the parts of a zip, a zip, or a "
                "folder of .pose files"
            )
        return PoseFolder(fs, paths) if folder else PoseArchive(fs, paths)
    except (OSError, ValueError, huggingface_hub.errors.HTTPError) as error:
        message = f"error: the poses at {pattern} cannot be read: {reason_of(error)}"
        raise SystemExit(message) from None


def read_keypoints(data):
    """The bytes of a .pose file -> keypoints (T, K, 2), NaN = not seen, and its frames per second.

    The origin is the median midpoint of the shoulders, the unit their median distance: one pair for
    the whole clip. BadClip where the file has none, or cannot be parsed.
    """
    try:
        pose = pose_format.Pose.read(data)
        points = pose.body.data.data[:, 0]
        confidence = np.asarray(pose.body.confidence)[:, 0]
        fps = float(pose.body.fps)
        names = [(part.name, name) for part in pose.header.components for name in part.points]
        column = {name: i for i, name in enumerate(names)}
        columns = np.array([column.get(point, -1) for point in POINTS])  # -1: it lacks this one
        keypoints = points[:, columns[:, None], [0, 1]].astype(np.float32)
        unseen = ~(confidence[:, columns] > 0) | (columns < 0)
    except Exception as error:  # whatever the library's parser meets in a file that is none
        raise BadClip("not a readable .pose file") from error
    # A file of version 0.1 has as many frames as fit into its length. Where it was cut, coordinates
    # are therefore read as confidences.
    if not (confidence <= MAX_CONFIDENCE).all():
        raise BadClip("cut short")
    keypoints[unseen] = np.nan
    shoulders = keypoints[:, SHOULDERS]
    shoulders = shoulders[np.isfinite(shoulders).all((1, 2))]
    if len(shoulders) == 0:
        raise BadClip("no shoulders")
    width = np.median(np.linalg.norm(shoulders[:, 0] - shoulders[:, 1], axis=-1))
    if width == 0:
        raise BadClip("no shoulders")
    if not 1 <= fps <= 1000:
        raise BadClip("no frame rate")
    return (keypoints - np.median(shoulders.mean(1), 0)) / width, fps


def row_keypoints(pose):
    """A row's `pose` (T, D), NaN or an exact (0, 0) = not seen -> keypoints (T, K, 2)."""
    try:
        frames = np.asarray([np.asarray(frame) for frame in pose], np.float32)
        numbers = frames.shape[1] if len(frames) else POSE_DIM
        if numbers != POSE_DIM:
            raise BadClip(f"{numbers} numbers a frame, POSE_DIM is {POSE_DIM}")
        keypoints = frames.reshape(len(frames), -1, 2)
    except (TypeError, ValueError, IndexError) as error:
        raise BadClip("no table of frames") from error
    return np.where((keypoints == 0).all(-1, keepdims=True), np.nan, keypoints)


# ---- preparing: a row becomes a clip of at most MAX_FRAMES frames, which the cache keeps
def resample(keypoints, n):
    """(T, K, 2) -> (n, K, 2), linearly; a point is seen where the nearest frame has seen it."""
    at = np.linspace(0, len(keypoints) - 1, n)
    low = at.astype(int)
    high = np.minimum(low + 1, len(keypoints) - 1)
    part = (at - low).astype(np.float32)[:, None, None]
    between = keypoints[low] * (1 - part) + keypoints[high] * part
    nearest = np.where(part < 0.5, keypoints[low], keypoints[high])
    return np.where(np.isnan(between), nearest, between)


def prepare_pose(row, pattern, token):
    """A row -> its pose (T, K, 2) of at most MAX_FRAMES frames, and its seconds; or BadClip."""
    if "pose" in row:
        keypoints, fps = row_keypoints(row["pose"]), FPS
    else:
        keypoints, fps = read_keypoints(open_poses(pattern, token).read(row["uid"]))
    distance = np.hypot(keypoints[..., 0], keypoints[..., 1])  # not finite: not seen
    near = distance <= MAX_DISTANCE
    if (np.isfinite(distance) & ~near).sum() > near.sum():
        raise BadClip(f"most points beyond {MAX_DISTANCE} shoulder widths")
    keypoints[~near] = np.nan
    seconds = len(keypoints) / fps
    frames = max(1, min(MAX_FRAMES, round(seconds * FPS)))
    pose = resample(keypoints, frames) if len(keypoints) else keypoints
    if np.isnan(pose).all():
        raise BadClip("nothing seen")
    return pose, seconds


def prepare_clip(row, pattern, token):
    """A row -> an example of CLIP; one that cannot be used has a problem, and no pose."""
    clip = {"key": row["key"], "gloss": row["gloss"], "problem": "", "seconds": 0.0}
    try:
        pose, seconds = prepare_pose(row, pattern, token)
        return {**clip, "seconds": seconds, "pose": pose.astype(np.float32).ravel()}
    except BadClip as problem:
        return {**clip, "problem": str(problem), "pose": np.empty(0, np.float32)}
    except (OSError, huggingface_hub.errors.HTTPError) as error:
        # after the hub library's own tries; and as an exception that a process can hand on
        raise ConnectionError(reason_of(error)) from None


def cached_clips(folder):
    """The prepared clips in the cache -> a Dataset of CLIP, and where in it each row's key is."""
    files = [datasets.Dataset.from_file(str(path)) for path in sorted(folder.glob("*.arrow"))]
    if not files:
        return None, {}
    clips = datasets.concatenate_datasets(files)
    return clips, {key: i for i, key in enumerate(clips["key"][:])}


def prepare(rows, state, pattern, token):
    """Rows -> prepared clips, a Dataset of CLIP in their order; the cache's are not read again.

    The cache keeps files of at most SHARD clips, in a folder for each state of the poses (of local
    ones; the hub's are taken to stay as they are) and of the settings that shape a clip. A row is
    known by its key, so that other subsets, other splits and added rows of an archive cost only
    what is new. SystemExit where the poses cannot be read any more.
    """
    what = cache_key(PREPARATION, POINTS, pattern, state, FPS, MAX_FRAMES, POSE_DIM)
    folder = Path(datasets.config.HF_DATASETS_CACHE, "gloss_to_pose", what)
    folder.mkdir(parents=True, exist_ok=True)
    clips, row_of = cached_clips(folder)
    keys = rows["key"][:]
    missing = [i for i, key in enumerate(keys) if key not in row_of]
    if missing and "pose" not in rows.column_names:
        open_poses(pattern, token)  # here, so that the processes inherit the archive's directory
    for first in range(0, len(missing), SHARD):
        numbers = missing[first : first + SHARD]
        name = cache_key([keys[i] for i in numbers])
        shard = rows.select(numbers)
        try:
            shard.with_format("numpy" if "pose" in rows.column_names else None).map(
                prepare_clip,
                fn_kwargs={"pattern": pattern, "token": token},
                features=CLIP,
                remove_columns=rows.column_names,
                num_proc=min(PROCESSES, len(numbers)) if PROCESSES > 1 else None,
                new_fingerprint=name,
                cache_file_name=str(folder / f"{name}.arrow"),
                writer_batch_size=100,
                desc=f"preparing, {first} of {len(missing)} clips done",
            )
        except ConnectionError as error:
            raise SystemExit(
                f"error: the poses cannot be read any more; what was prepared stays: {error}"
            ) from None
        except multiprocess.TimeoutError:  # what the library makes of a Ctrl-C
            raise KeyboardInterrupt from None
    if missing:
        clips, row_of = cached_clips(folder)
    return clips.select([row_of[key] for key in keys])


def load_clips():
    """The data set -> {"train": Dataset of usable CLIPs, "validation": ...}, and its name.

    Prints what there is and what was left out. SystemExit where too few clips can be used.
    """
    dataset, pattern, token = locate_data()
    rows, splits, state = load_rows(dataset, token)
    if "pose" not in rows.column_names:
        if len(POINTS) * 2 != POSE_DIM:
            raise SystemExit(f"error: POSE_DIM = {POSE_DIM}: .pose files give {len(POINTS) * 2}")
        is_remote = pattern.startswith("hf://")
        state = None if is_remote else state_of(list_poses(pattern, token)[1])
    chosen, left_out, origin = choose_rows(rows, splits)
    numbers = [*chosen["train"], *chosen["validation"]]
    prepared = prepare(rows.select(numbers), state, pattern, token)
    clips = {}
    for split, first in (("train", 0), ("validation", len(chosen["train"]))):
        part = prepared.select(range(first, first + len(chosen[split])))
        problems = part["problem"][:]
        bad = collections.Counter(problem for problem in problems if problem)
        left_out += bad
        clips[split] = part.select([i for i, problem in enumerate(problems) if not problem])
        if len(clips[split]) == 0 or bad.total() > MAX_BAD_SHARE * len(part):
            raise SystemExit(
                f"error: {bad.total()} of {len(part)} {split} clips cannot be used, more than "
                f"MAX_BAD_SHARE = {MAX_BAD_SHARE} allows: {counted(bad)}"
            )
    name = "sample data" if dataset == "sample" else dataset
    report_clips(name, clips, left_out, origin)
    return clips, name


def report_clips(name, clips, left_out, origin):
    glosses = [gloss for part in clips.values() for gloss in part["gloss"][:]]
    seconds = np.concatenate([part["seconds"][:] for part in clips.values()])
    cut = sum(len(split_glosses(gloss)) > MAX_GLOSS_LEN for gloss in glosses)
    long = int((np.round(seconds * FPS) > MAX_FRAMES).sum())
    broken = sum("\n" in gloss for gloss in glosses)
    print(f"data               {name}")
    print(f"  clips            {len(clips['train'])} train, {len(clips['validation'])} validation")
    print(f"  split            {origin}")
    print(f"  left out         {counted(left_out)}")
    print(f"  glosses cut      in {cut} sentences of more than {MAX_GLOSS_LEN}")
    print(f"  clips resampled  {long} of more than {MAX_FRAMES} frames")
    if broken:
        print(f"  line breaks      in {broken} texts: a quote left open in a CSV swallows its rows")


# ---- batches
def training_statistics(clips):
    """One pass over the training clips -> the statistics that a model keeps, and the vocabulary."""
    total, squares, count = np.zeros((3, POSE_DIM))
    words, frames, seconds = collections.Counter(), 0, 0.0
    for some in clips.with_format("numpy").iter(256):
        pose = np.concatenate(list(some["pose"])).reshape(-1, POSE_DIM).astype(np.float64)
        total += np.nansum(pose, 0)
        squares += np.nansum(pose**2, 0)
        count += np.isfinite(pose).sum(0)
        frames += len(pose)
        seconds += some["seconds"].sum(dtype=np.float64)
        for gloss in some["gloss"]:
            words.update(split_glosses(gloss)[:MAX_GLOSS_LEN])
    mean = total / count.clip(1)  # of a point that no clip shows: 0, with a std of 1
    std = np.sqrt((squares / count.clip(1) - mean**2).clip(0))
    std = np.where(std > 1e-4, std, 1)
    kept = sorted(word for word, n in words.items() if n >= MIN_GLOSS_COUNT)
    unseen = 100 * (1 - count.sum() / frames / POSE_DIM)
    print(f"  vocabulary       {len(kept)} glosses; {len(words) - len(kept)} rarer ones are <unk>")
    print(f"  points unseen    {unseen:.1f} % in the training clips")
    statistics = {
        "mean": mean,
        "std": std,
        "seen": count / frames,
        "seconds_per_gloss": seconds / words.total(),
    }
    statistics = {name: torch.tensor(value).float() for name, value in statistics.items()}
    return statistics, ["<pad>", "<unk>", *kept]


def gloss_tokenizer(vocabulary):
    """A tokenizer that numbers the glosses of a vocabulary; all others are <unk>."""
    numbers = {gloss: i for i, gloss in enumerate(vocabulary)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return pack_tokenizer(words.to_str(), "<pad>", "<unk>")


def pack_tokenizer(json, pad_token, unk_token):
    """A tokenizer as a checkpoint keeps it -> the tokenizer."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json),
        pad_token=pad_token,
        unk_token=unk_token,
    )


def knows_glosses(tokenizer):
    """Whether it numbers whole glosses, and is not a pretrained encoder's of word pieces."""
    return isinstance(tokenizer.backend_tokenizer.model, tokenizers.models.WordLevel)


def glosses_for(tokenizer, sentence, max_gloss_len):
    """A sentence -> the glosses that a tokenizer is given; what is beyond max_gloss_len is cut."""
    glosses = split_glosses(sentence)[:max_gloss_len]
    if knows_glosses(tokenizer):
        return glosses
    return [gloss.lower() for gloss in glosses]  # as pretrained encoders know their words


def tokenize(tokenizer, sentences, max_gloss_len):
    """Gloss sentences -> the tokenizer's output: tokens, mask and where in the text they stand."""
    return tokenizer(
        [" ".join(glosses_for(tokenizer, sentence, max_gloss_len)) for sentence in sentences],
        padding=True,
        truncation=True,
        max_length=PIECES_PER_GLOSS * max_gloss_len,
        return_tensors="pt",
    )


def collate(clips, tokenizer):
    """Clips -> a batch. Frames behind a clip's end are NaN, as points that were not seen are."""
    poses = [torch.tensor(clip["pose"]).view(-1, POSE_DIM) for clip in clips]
    text = tokenize(tokenizer, [clip["gloss"] for clip in clips], MAX_GLOSS_LEN)
    return {
        "tokens": text["input_ids"],  # (B, S)
        "token_mask": text["attention_mask"].bool(),  # (B, S)
        "pose": nn.utils.rnn.pad_sequence(poses, True, math.nan),  # (B, T, D)
        "n_frames": torch.tensor([len(pose) for pose in poses]),  # (B,)
        "seconds": torch.tensor([float(clip["seconds"]) for clip in clips]),  # (B,)
    }


def make_loaders(clips, tokenizer, workers=0, rank=0, world=1):
    """{split: clips} -> {split: loader of this process's share of them}.

    The order of training depends on SEED and the epoch alone.
    """
    options = {
        "batch_size": BATCH_SIZE // world,
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "collate_fn": functools.partial(collate, tokenizer=tokenizer),
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # so that a loader draws nothing from the models' generator
    }
    train = clips["train"].with_format("numpy")
    validation = clips["validation"].with_format("numpy")
    validation = validation.select(range(rank, len(validation), world))  # none twice
    sampler = DistributedSampler(train, world, rank, shuffle=True, seed=SEED)
    return {
        "train": DataLoader(train, sampler=sampler, **options),
        "validation": DataLoader(validation, **options),
    }


def to_device(batch, device):
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


# ---- models: model(tokens, token_mask, n_frames=None) -> Signing
WAVES = 5  # frequencies, each twice the one before
WAVE_DIM = 1 + 2 * WAVES


def sinusoidal_features(x):
    """(...) -> (..., WAVE_DIM): numbers with their sines and cosines, which resolve them finely."""
    angles = x[..., None] * math.pi * 2.0 ** torch.arange(WAVES, device=x.device)
    return torch.cat([x[..., None], angles.sin(), angles.cos()], -1)


class TwoWayGRU(nn.Module):
    """(B, L, inputs) and a mask (B, L) -> (B, L, outputs).

    The way back begins at the last real element. nn.GRU(bidirectional=True) does so on packed
    sequences alone, which take 1.7 times as long at batch 64, and need the lengths on the host.
    """

    def __init__(self, inputs, outputs):
        super().__init__()
        self.there = nn.GRU(inputs, outputs // 2, batch_first=True)
        self.back = nn.GRU(inputs, outputs - outputs // 2, batch_first=True)

    def forward(self, x, mask):
        with torch.autocast(x.device.type, enabled=False):  # it would hand float16 to cuDNN's GRU
            x = x.float()
            steps = torch.arange(x.shape[1], device=x.device)
            lengths = mask.sum(1, keepdim=True)
            turned = torch.where(steps < lengths, lengths - 1 - steps, steps)
            turned = turned[..., None]  # (B, L, 1)
            there, _ = self.there(x)
            back, _ = self.back(x.gather(1, turned.expand_as(x)))
            return torch.cat([there, back.gather(1, turned.expand_as(back))], -1)


class Signing(NamedTuple):
    """What a model makes of B sentences of S tokens."""

    pose: torch.Tensor  # (B, max_frames, D) in shoulder widths, 0 behind the end
    seconds: torch.Tensor  # (B,)
    confidence: torch.Tensor  # (B, max_frames, K), logits of the points' being seen
    keys: torch.Tensor  # (B, S), by which the tokens are sorted into signing order
    durations: torch.Tensor  # (B, S), seconds of each token, about 0 of one that is not signed


class Plan(nn.Module):
    """Tokens in the order of the text -> signs in signing order, as many as there are tokens.

    The signs are the tokens sorted by a key. It begins as the token's place in the text, so that
    for glosses in signing order nothing is to be learned, and is moved by the token's state and by
    how many tokens before and behind it are signed: those that last about 0 s do not count. To have
    a gradient the sorting is soft (SoftSort, Prillo and Eisenschlos 2020): sign i reads the tokens
    whose keys are near the key of rank i.
    """

    half_turn = 32  # signs over which the slowest wave makes half a turn
    step = 2  # places that a key is moved by an output of 1
    softness = 0.5  # places within which keys are near each other
    signed_from = 0.25  # mean glosses: from about this duration on a token counts as signed
    padding = 1e4  # a key behind all others

    def __init__(self, states_dim):
        super().__init__()
        self.counts = nn.Linear(2 * WAVE_DIM, states_dim)
        self.move = nn.Sequential(
            nn.Linear(states_dim, states_dim), nn.ReLU(), nn.Linear(states_dim, 1)
        )
        nn.init.zeros_(self.move[-1].weight)
        nn.init.zeros_(self.move[-1].bias)

    def forward(self, states, durations, token_mask):
        """states (B, S, H), durations (B, S), token_mask (B, S) -> keys (B, S), order (B, S, S).

        order: how much of sign i is read from token j.
        """
        # without a gradient: that keys and durations pull at each other upsets a training
        signed = 1 - (-durations.detach() / self.signed_from).exp()
        before = signed.cumsum(1) - signed
        behind = signed.sum(1, keepdim=True) - signed - before
        waves = [sinusoidal_features(count / self.half_turn) for count in (before, behind)]
        moved = self.move(states + self.counts(torch.cat(waves, -1))).squeeze(-1).float()
        keys = torch.arange(states.shape[1], device=states.device) + self.step * moved
        keys = keys.masked_fill(~token_mask, self.padding)
        ranked = keys.sort(1).values
        nearness = -(ranked[:, :, None] - keys[:, None]).abs() / self.softness
        return keys, nearness.masked_fill(~token_mask[:, None], -math.inf).softmax(-1)


class PoseModel(nn.Module):
    """What the models share: encode the text, plan its signs, place them on the time line, decode.

    What is signed comes from the word alone, when and how long from the sentence around it: else a
    model learns by heart which take of a sign it has met in which sentence. An unknown word's sign
    comes from the sentence, too, and so do all of BERT's, which knows no word without one. The
    Transformer's frames attend to the sentence as well.

    Running sums of the durations give each sign its stretch of the time line, and a frame reads the
    signs through a soft window around these stretches. No frame depends on a generated one, so that
    all are decoded in one call.

    Subclasses have encode(tokens, token_mask) -> words, states (B, S, states_dim), each token by
    itself and within its sentence; and decode(queries (B, T, query_dim), frame_mask, states,
    token_mask) -> (B, T, query_dim).
    """

    betas = (0.9, 0.999)  # of AdamW: its memory of the gradients and of their squares

    def __init__(self, states_dim, query_dim, pose_dim, max_frames, fps, dropout, word_dropout):
        super().__init__()
        self.max_frames = max_frames
        self.fps = fps
        self.word_dropout = word_dropout
        self.dropout = nn.Dropout(dropout)
        self.plan = Plan(states_dim)
        self.duration = nn.Sequential(
            nn.Linear(states_dim, states_dim), nn.ReLU(), nn.Linear(states_dim, 1)
        )
        # of a window's borders, in mean glosses
        self.log_softness = nn.Parameter(torch.tensor(-2.0))
        self.query = nn.Linear(states_dim + 3 * WAVE_DIM, query_dim)
        self.output = nn.Linear(query_dim, pose_dim)
        self.confidence = nn.Linear(query_dim, pose_dim // 2)
        self.register_buffer("mean", torch.zeros(pose_dim))  # see training_statistics
        self.register_buffer("std", torch.ones(pose_dim))
        self.register_buffer("seen", torch.ones(pose_dim))  # share of the frames
        self.register_buffer("seconds_per_gloss", torch.ones(()))

    def forward(self, tokens, token_mask, n_frames=None, longest=None):
        """tokens, token_mask (B, S) -> Signing.

        n_frames (B,), None: by the predicted durations. longest: n_frames.max(), where the caller
        knows it, so that the host need not wait for the GPU.
        """
        words, states = self.encode(tokens, token_mask)
        durations = self.durations(states) * token_mask
        seconds = durations.sum(1) * self.seconds_per_gloss
        keys, order = self.plan(states, durations, token_mask)
        signs = order.to(words.dtype) @ words
        sign_durations = (order * durations[:, None]).sum(-1) * token_mask
        if n_frames is None:
            n_frames = self.frames(seconds)
        if longest is None:
            longest = int(n_frames.max())
        step = torch.arange(longest, device=tokens.device)
        frame_mask = step < n_frames[:, None]  # (B, T)
        time = step / self.max_frames
        phase = (step / (n_frames[:, None] - 1).clamp(min=1)).clamp(max=1)  # 0 to 1, first to last
        queries = self.place_signs(signs, token_mask, sign_durations, time, phase)
        hidden = self.decode(self.drop_features(queries), frame_mask, states, token_mask)
        hidden = self.drop_features(hidden)
        pose = self.output(hidden).float() * self.std + self.mean
        pose = pose * frame_mask[..., None]
        behind = (0, 0, 0, self.max_frames - longest)
        return Signing(
            pose=nn.functional.pad(pose, behind),
            seconds=seconds,
            confidence=nn.functional.pad(self.seen_logits(hidden), behind),
            keys=keys,
            durations=durations * self.seconds_per_gloss,
        )

    def durations(self, states):
        """states (B, S, H) -> positive durations (B, S), in mean glosses; they begin at 1."""
        inverse_of_1 = math.log(math.e - 1)  # softplus of it is 1
        return nn.functional.softplus(self.duration(states).squeeze(-1).float() + inverse_of_1)

    def seen_logits(self, hidden):
        """hidden (B, T, H) -> (B, T, K); they begin at the share of frames that show a point."""
        usual = self.seen.view(-1, 2)[:, 0].clamp(0.001, 0.999).logit()
        return self.confidence(hidden).float() + usual

    def frames(self, seconds):
        return (seconds * self.fps).round().long().clamp(1, self.max_frames)

    def place_signs(self, signs, token_mask, durations, time, phase):
        """The time line: time (T,), phase (B, T) -> what each frame asks the decoder, (B, T, H).

        Sign s lasts from start[s] to end[s] = durations[0] + ... + durations[s], and a frame is at
        phase * end[-1]. Its window over the signs is the softmax over s of
            log sigmoid((at - start[s]) / softness) + log sigmoid((end[s] - at) / softness):
        near 1 for the sign within which it lies, and soft at the borders.
        """
        end = durations.cumsum(1)  # (B, S)
        at = (phase * end[:, -1:])[..., None]  # (B, T, 1)
        since_start = at - (end - durations)[:, None]  # (B, T, S)
        until_end = end[:, None] - at
        softness = self.log_softness.exp()
        log_sigmoid = nn.functional.logsigmoid
        nearness = log_sigmoid(since_start / softness) + log_sigmoid(until_end / softness)
        window = nearness.masked_fill(~token_mask[:, None], -math.inf).softmax(-1)  # (B, T, S)
        shortest = 0.01  # mean glosses, so that nothing is divided by 0
        within = (since_start / durations[:, None].clamp(min=shortest)).clamp(-0.5, 1.5)
        position = (window[..., None] * sinusoidal_features(within)).sum(2)  # within its sign
        time = sinusoidal_features(time).expand(*phase.shape, -1)
        places = torch.cat([position, sinusoidal_features(phase), time], -1)
        # self.query(cat([window @ signs, places])), but with the signs' part computed before they
        # are read: they are fewer than the frames
        of_signs, of_places = self.query.weight.split([signs.shape[-1], places.shape[-1]], 1)
        asked = nn.functional.linear(signs, of_signs)
        asked = window.to(asked.dtype) @ asked
        return asked + nn.functional.linear(places, of_places, self.query.bias)

    def drop_features(self, features):
        """Dropout of features (B, T, H): the same ones in all frames of a clip.

        What each frame drops by itself would pass for motion in training, and be missing later.
        """
        return features * self.dropout(torch.ones_like(features[:, :1]))

    def drop_words(self, tokens, token_mask):
        """In training some glosses are <unk>: the others are not learned by heart together."""
        if not self.training:
            return tokens
        dropped = torch.rand(tokens.shape, device=tokens.device) < self.word_dropout
        return tokens.masked_fill(dropped & token_mask, UNK)

    def param_groups(self):
        """[(learning rate, its parameters)]"""
        return [(LR_GRU, list(self.parameters()))]


class GRUModel(PoseModel):
    """A bidirectional GRU over the glosses, and one over the frames, which adds to its input."""

    title = "GRU"

    def __init__(self, vocabulary, embed_dim, hidden_dim, dropout, **sizes):
        super().__init__(hidden_dim, hidden_dim, dropout=dropout, **sizes)
        self.embedding = nn.Embedding(vocabulary, embed_dim, PAD)
        self.word = nn.Linear(embed_dim, hidden_dim)
        self.encoder = TwoWayGRU(embed_dim, hidden_dim)
        self.decoder = TwoWayGRU(hidden_dim, hidden_dim)

    def encode(self, tokens, token_mask):
        tokens = self.drop_words(tokens, token_mask)
        embedded = self.dropout(self.embedding(tokens))
        states = self.dropout(self.encoder(embedded, token_mask))
        return torch.where((tokens == UNK)[..., None], states, self.word(embedded)), states

    def decode(self, queries, frame_mask, states, token_mask):
        return queries + self.decoder(queries, frame_mask)


class TransformerModel(PoseModel):
    """A pre-norm Transformer: the frames' queries attend to each other and to all glosses.

    Before that, a convolution tells each frame what its neighbours ask: attention alone is a poor
    judge of which frames are near each other.
    """

    title = "Transformer"
    betas = (0.9, 0.98)  # with a longer memory, single gradients upset the training for epochs
    encoder_layers = 3
    decoder_layers = 2  # a third one costs a fifth of the speed, and helps fingerspelling most
    heads = 4  # where EMBED_DIM can be divided by it
    half_turn = 32  # glosses over which the slowest wave makes half a turn
    neighbours = 11  # frames of the convolution

    def __init__(self, vocabulary, embed_dim, hidden_dim, dropout, **sizes):
        super().__init__(embed_dim, embed_dim, dropout=dropout, **sizes)
        self.embedding = nn.Embedding(vocabulary, embed_dim, PAD)
        self.places = nn.Linear(WAVE_DIM, embed_dim)
        self.near = nn.Conv1d(embed_dim, embed_dim, self.neighbours, padding="same")
        warnings.filterwarnings("ignore", "enable_nested_tensor")  # it does not go with norm_first
        self.core = nn.Transformer(
            embed_dim,
            math.gcd(self.heads, embed_dim),
            self.encoder_layers,
            self.decoder_layers,
            hidden_dim,
            dropout,
            batch_first=True,
            norm_first=True,
        )
        # every layer begins as the identity, and so learns from the first steps on
        for name, weight in self.core.named_parameters():
            if "out_proj" in name or "linear2" in name:
                nn.init.zeros_(weight)

    def encode(self, tokens, token_mask):
        place = torch.arange(tokens.shape[1], device=tokens.device)
        places = self.places(sinusoidal_features(place / self.half_turn))
        tokens = self.drop_words(tokens, token_mask)
        words = self.embedding(tokens)
        states = self.core.encoder(self.dropout(words + places), src_key_padding_mask=~token_mask)
        return torch.where((tokens == UNK)[..., None], states, self.dropout(words)), states

    def decode(self, queries, frame_mask, states, token_mask):
        queries = queries * frame_mask[..., None]
        return self.core.decoder(
            queries + self.near(queries.mT).mT.relu(),
            states,
            tgt_key_padding_mask=~frame_mask,
            memory_key_padding_mask=~token_mask,
        )

    def param_groups(self):
        return [(LR_TRANSFORMER, list(self.parameters()))]


class BertModel(GRUModel):
    """A pretrained encoder, which reads word pieces in place of glosses, with the GRU decoder.

    In training a share of the pieces is hidden from the others (from their attention), so that
    sentences are not learned by heart. Each still knows itself, and is signed.
    """

    title = "BERT"
    hidden_share = 0.3

    def __init__(self, bert_config, vocabulary, embed_dim, hidden_dim, dropout, **sizes):
        PoseModel.__init__(self, hidden_dim, hidden_dim, dropout=dropout, **sizes)
        config = transformers.AutoConfig.for_model(**bert_config)
        self.pretrained = transformers.AutoModel.from_config(config)
        self.pretrained.pooler = None  # nothing reads it
        self.encoder_projection = nn.Linear(config.hidden_size, hidden_dim)
        self.decoder = TwoWayGRU(hidden_dim, hidden_dim)

    def encode(self, tokens, token_mask):
        attended = token_mask
        if self.training:
            hidden = torch.rand(tokens.shape, device=tokens.device) < self.hidden_share
            attended = token_mask & ~hidden
            attended[:, 0] = True  # attention to none is not defined
        output = self.pretrained(input_ids=tokens, attention_mask=attended.long())
        states = self.dropout(self.encoder_projection(output.last_hidden_state))
        return states, states

    def param_groups(self):
        pretrained = set(self.pretrained.parameters())
        fresh = [value for value in self.parameters() if value not in pretrained]
        return [(LR_GRU, fresh), (LR_BERT, list(self.pretrained.parameters()))]


MODELS = {"gru": GRUModel, "transformer": TransformerModel, "bert": BertModel}


def load_pretrained():
    """-> the encoder BERT_NAME and its tokenizer; SystemExit where one of them does not serve."""
    try:
        pretrained, report = transformers.AutoModel.from_pretrained(
            str(BERT_NAME), dtype=torch.float32, output_loading_info=True
        )
        missing = [key for key in report["missing_keys"] if "pooler" not in key]
        if missing:
            raise ValueError(
                f"{len(missing)} weights are missing in its file, such as {missing[0]}"
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(BERT_NAME))
        pieces = pretrained.get_input_embeddings().num_embeddings
        if not len(tokenizer.all_special_ids) < len(tokenizer) <= pieces:
            raise ValueError("the tokenizer is missing or of another model")
        longest = torch.zeros(1, PIECES_PER_GLOSS * MAX_GLOSS_LEN, dtype=torch.long)
        _ = pretrained(input_ids=longest).last_hidden_state  # some have too few positions, or none
    except Exception as error:  # of the library, which has many kinds
        raise SystemExit(
            f"error: BERT_NAME {str(BERT_NAME)!r} is no hub id that can be reached, and no folder "
            f"with an encoder and its tokenizer ({reason_of(error)})"
        ) from None
    return pretrained, tokenizer


def check_memory(name, device):
    """SystemExit where the weights of a model of these sizes do not fit into the memory, by far."""
    of_settings = "gru" if name == "bert" else name  # BERT's encoder is of a given size
    with torch.device("meta"):
        model = MODELS[of_settings](vocabulary=2, **model_sizes())
    copies = 5  # weights, gradients, two of AdamW's, the average
    needed = copies * sum(value.numel() * value.element_size() for value in model.parameters())
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise SystemExit(
            f"error: the {MODELS[name].title} needs {needed / 2**30:.1f} GiB for its weights, and "
            f"there are {free / 2**30:.1f}: lower HIDDEN_DIM or EMBED_DIM"
        )


def model_sizes():
    """The arguments of all models that come from the settings."""
    return {
        "embed_dim": EMBED_DIM,
        "hidden_dim": HIDDEN_DIM,
        "dropout": DROPOUT,
        "word_dropout": WORD_DROPOUT,
        "pose_dim": POSE_DIM,
        "max_frames": MAX_FRAMES,
        "fps": FPS,
    }


def new_model(name, statistics, vocabulary):
    """-> a fresh model (BERT's encoder from BERT_NAME), its tokenizer, and what rebuilds both."""
    args = {"vocabulary": len(vocabulary), **model_sizes()}
    if name == "bert":
        pretrained, tokenizer = load_pretrained()
        args["bert_config"] = pretrained.config.to_dict()
        for key in ("_name_or_path", "transformers_version"):  # may change where no weight does
            args["bert_config"].pop(key, None)
        model = MODELS[name](**args)
        lacking, _ = model.pretrained.load_state_dict(pretrained.state_dict(), strict=False)
        if lacking:
            raise SystemExit(f"error: BERT_NAME {str(BERT_NAME)!r} has no weights for {lacking[0]}")
    else:
        tokenizer = gloss_tokenizer(vocabulary)
        model = MODELS[name](**args)
    for key, value in statistics.items():
        getattr(model, key).copy_(value)
    built = {
        "model": name,
        "model_args": args,
        "tokenizer": {
            "json": tokenizer.backend_tokenizer.to_str(),
            "pad_token": tokenizer.pad_token,
            "unk_token": tokenizer.unk_token,
        },
        "max_gloss_len": MAX_GLOSS_LEN,
    }
    return model, pack_tokenizer(**built["tokenizer"]), built


# ---- losses and metrics
def mean_over_processes(value):
    """A tensor without gradient -> its mean over the processes that torchrun started."""
    if dist.is_initialized():
        value = value / dist.get_world_size()
        dist.all_reduce(value)
    return value


def masked_mean(values, mask):
    """The mean of values where mask is True, over all processes.

    Each process divides its own sum by the mean count of all: DistributedDataParallel averages the
    gradients, which makes it the sum of all sums over the sum of all counts.
    """
    count = mean_over_processes(mask.sum().float())
    return torch.where(mask, values, 0).sum() / count.clamp(min=1e-6)  # a mean count may be 0.5


def pose_loss(pose, target):
    """Mean squared error; pose (B, max_frames, D), target (B, T, D), NaN = not seen or padding."""
    seen = target.isfinite()
    return masked_mean((pose[:, : target.shape[1]] - target.nan_to_num()).square(), seen)


def speeds(pose):
    """(B, T, D) -> (B, T - 1, K): how far each point moves in a frame; NaN where it is unknown."""
    steps = pose.diff(dim=1).unflatten(-1, (-1, 2))
    return (steps.square().sum(-1) + 1e-8).sqrt()  # the gradient at 0 stays finite


def speed_loss(pose, target):
    """Squared error of the points' speeds over the sum of their squares.

    An average of several clips moves too little, which the squared error of the pose hardly shows.
    """
    real = speeds(target)
    known = real.isfinite()
    real = real.nan_to_num()
    error = speeds(pose[:, : target.shape[1]]) - real
    scale = mean_over_processes(real.square().sum())
    return torch.where(known, error, 0).square().sum() / scale.clamp(min=1e-6)


def duration_loss(seconds, target):
    """Mean squared error of the log duration; seconds, target (B,), NaN = no clip."""
    shortest = 0.001  # seconds, so that its logarithm is finite
    error = seconds.clamp(min=shortest).log() - target.nan_to_num(1.0).log()
    return masked_mean(error.square(), target.isfinite())


def points_seen(pose):
    """(B, T, D), NaN = not seen -> (B, T, K), True = seen."""
    return pose.unflatten(-1, (-1, 2)).isfinite().all(-1)


def confidence_loss(confidence, target, real):
    """Binary cross-entropy of the points' being seen, over real frames.

    confidence (B, max_frames, K) are logits; target (B, T, D); real (B, T).
    """
    seen = points_seen(target).float()
    error = nn.functional.binary_cross_entropy_with_logits(
        confidence[:, : target.shape[1]], seen, reduction="none"
    )
    return masked_mean(error, real[..., None].expand_as(error))


def real_frames(batch):
    """(B, T), True = a frame of a clip, of which any point may be unseen, and no padding."""
    step = torch.arange(batch["pose"].shape[1], device=batch["pose"].device)
    return (step < batch["n_frames"][:, None]) & batch["seconds"].isfinite()[:, None]


def training_loss(model, batch):
    """-> the loss that is minimised, and the MSE of the pose that is within it."""
    target = batch["pose"]
    made = model(batch["tokens"], batch["token_mask"], batch["n_frames"], longest=target.shape[1])
    bare = getattr(model, "module", model)  # within DistributedDataParallel
    variance = bare.std.square().masked_fill(bare.seen == 0, math.nan).nanmean()
    mse = pose_loss(made.pose, target)
    loss = mse / variance
    loss = loss + SPEED_WEIGHT * speed_loss(made.pose, target)
    loss = loss + DURATION_WEIGHT * duration_loss(made.seconds, batch["seconds"])
    confidence = confidence_loss(made.confidence, target, real_frames(batch))
    return loss + CONFIDENCE_WEIGHT * confidence, mse.detach()


@torch.no_grad()
def evaluate(model, loader, device):
    """-> metrics over real frames and seen points, at the clips' real lengths.

    val_mse, val_mae and mean_pose_mse (of the training split's mean pose) in (squared) shoulder
    widths; motion, the path of the generated hands over that of the real ones; duration_error in
    seconds; seen_error, the share of points in frames whose confidence is on the wrong side of 0.5.
    Sums over all clips and processes, divided once.
    """
    model.eval()
    points = [point for point in HANDS_AND_WRISTS if point < len(model.mean) // 2]
    names = ["squares", "absolute", "mean_squares", "numbers", "path", "real_path"]
    names += ["late", "clips", "mistaken", "points"]
    sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
    for batch in loader:
        batch = to_device(batch, device)
        target = batch["pose"]
        longest = target.shape[1]
        made = model(batch["tokens"], batch["token_mask"], batch["n_frames"], longest)
        pose = made.pose[:, :longest]
        seen = target.isfinite()
        error = torch.where(seen, pose - target, 0)
        sums["squares"] += error.square().sum()
        sums["absolute"] += error.abs().sum()
        sums["mean_squares"] += torch.where(seen, model.mean - target, 0).square().sum()
        sums["numbers"] += seen.sum()
        real = speeds(target)[..., points]
        sums["path"] += torch.where(real.isfinite(), speeds(pose)[..., points], 0).sum()
        sums["real_path"] += real.nansum()
        sums["late"] += (made.seconds - batch["seconds"]).abs().sum()
        sums["clips"] += len(target)
        in_clip = real_frames(batch)[..., None]
        mistaken = (made.confidence[:, :longest] > 0) != points_seen(target)
        sums["mistaken"] += (mistaken & in_clip).sum()
        sums["points"] += in_clip.expand_as(mistaken).sum()
    total = {name: mean_over_processes(value).item() for name, value in sums.items()}
    return {
        "val_mse": total["squares"] / total["numbers"],
        "val_mae": total["absolute"] / total["numbers"],
        "mean_pose_mse": total["mean_squares"] / total["numbers"],
        "motion": total["path"] / max(total["real_path"], 1e-9),
        "duration_error": total["late"] / total["clips"],
        "seen_error": total["mistaken"] / total["points"],
    }


# ---- training
def pick_device():
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # torchrun's
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")


def mixed_precision(device):
    """The context of a training step's forward pass: bfloat16 where the GPU computes with it."""
    usable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=MIXED_PRECISION and usable)


def new_optimizer(model):
    groups = [{"lr": rate, "params": values} for rate, values in model.param_groups()]
    return torch.optim.AdamW(groups, betas=model.betas, fused=True)


def new_schedule(optimizer, steps, done=0):
    """The rates rise for a share WARMUP of the steps, then fall to 0; `done` steps are over."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return transformers.get_cosine_schedule_with_warmup(
        optimizer, round(WARMUP * steps), steps, last_epoch=done - 1
    )


def new_average(model, device):
    """The moving average of the weights, a model of its own: it is evaluated and saved."""
    average = copy.deepcopy(model).requires_grad_(False)
    return average.to(device)  # which lays the copied GRUs out for cuDNN


def follow(average, model, steps):
    """One step of the average towards the weights, after `steps` others.

    torch's AveragedModel does the same, but makes the host wait for the GPU in every step.
    """
    memory = min(AVERAGE, (1 + steps) / (6 + steps))  # it grows with the steps
    get_ema_multi_avg_fn(memory)([*average.parameters()], [*model.parameters()], steps)


@dataclasses.dataclass
class Run:
    """A model in training, and what its training consists of."""

    name: str  # of the model, in MODELS
    model: nn.Module
    average: nn.Module  # of the model's weights
    optimizer: torch.optim.Optimizer
    loaders: dict  # by split
    device: torch.device
    built: dict  # what rebuilds the model and its tokenizer
    log: list  # a line for each finished epoch


def new_run(name, clips, statistics, vocabulary, device, workers=0, rank=0, world=1):
    """-> a Run before its first epoch: with the weights that SEED draws, or BERT's."""
    torch.manual_seed(SEED)
    model, tokenizer, built = new_model(name, statistics, vocabulary)
    model.to(device)
    return Run(
        name=name,
        model=model,
        average=new_average(model, device),
        optimizer=new_optimizer(model),
        loaders=make_loaders(clips, tokenizer, workers, rank, world),
        device=device,
        built=built,
        log=[],
    )


def train_one_epoch(run, model, schedule, label):
    """One pass over the training clips -> their MSE on the way. SystemExit where it is not finite.

    What is drawn depends on SEED, the epoch and the process alone, so that a resumed run goes on as
    if it had not been stopped.
    """
    model.train()
    loader = run.loaders["train"]
    sampler = loader.sampler
    epoch = len(run.log) + 1
    sampler.set_epoch(epoch)
    torch.manual_seed(SEED + 1_000_003 * epoch + sampler.rank)
    # so that all processes have as many clips, the sampler gives one of the first clips again to
    # the last of them, which leave it out of all sums
    repeats = sampler.total_size - len(loader.dataset)
    has_repeat = sampler.rank >= sampler.num_replicas - repeats
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    first_bad = torch.tensor(0, device=run.device)
    bar = tqdm(loader, label, leave=False, file=sys.stdout, disable=None)
    for step, batch in enumerate(bar, 1):
        if step == len(loader) and has_repeat:
            batch["pose"][-1] = math.nan
            batch["seconds"][-1] = math.nan
        batch = to_device(batch, run.device)
        with mixed_precision(run.device):
            loss, mse = training_loss(model, batch)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP or math.inf)
        run.optimizer.step()
        schedule.step()
        follow(run.average, run.model, (epoch - 1) * len(loader) + step - 1)
        count = mean_over_processes(batch["pose"].isfinite().sum().float())
        sums += torch.stack([mse * count, count]).double()
        first_bad = torch.where((first_bad == 0) & ~loss.isfinite(), step, first_bad)
        if (step % 20 == 0 or step == len(loader)) and first_bad:  # seldom: the host waits here
            raise SystemExit(
                f"error: the loss of {label}, batch {first_bad.item()} is not finite: lower the "
                "learning rate"
            )
    squares, count = mean_over_processes(sums).tolist()
    return squares / max(count, 1)


HEADER = f"{'':<23} train mse   val mse      mae  motion  duration      time"


def run_epoch(run, model, schedule):
    """One epoch and its validation, reported by a line -> the line of the log.

    model: the run's, or it within DistributedDataParallel.
    """
    began = time.time()
    epoch = len(run.log) + 1
    label = f"{run.average.title} epoch {epoch}/{EPOCHS}"
    train_mse = train_one_epoch(run, model, schedule, label)
    rate = schedule.get_last_lr()[0]
    metrics = evaluate(run.average, run.loaders["validation"], run.device)
    line = {"epoch": epoch, "train_mse": train_mse, "learning_rate": rate, **metrics}
    line["seconds"] = time.time() - began
    print(
        f"{label:<23}{train_mse:>10.5f}{line['val_mse']:>10.5f}{line['val_mae']:>9.5f}"
        f"{line['motion']:>8.2f}{line['duration_error']:>8.2f} s{line['seconds']:>8.1f} s",
        flush=True,
    )
    return line


def best_of(log):
    """The log's line of the lowest validation MSE."""
    return min(log, key=lambda line: line["val_mse"], default={"epoch": 0, "val_mse": math.inf})


def train_epochs(run, keep):
    """Epoch by epoch until EPOCHS or PATIENCE are over; keep(run) after each of them."""
    steps = len(run.loaders["train"])
    schedule = new_schedule(run.optimizer, EPOCHS * steps, done=len(run.log) * steps)
    model = run.model
    if dist.is_initialized():
        model = DistributedDataParallel(model, forward_sync_buffers=False)
    print(HEADER)
    while len(run.log) < EPOCHS and len(run.log) - best_of(run.log)["epoch"] < PATIENCE:
        run.log.append(run_epoch(run, model, schedule))
        keep(run)


def after_fork():
    """In a forked process: end with the script, even where that is killed (Linux), hold no lock of
    the others, and print no traceback for a connection that the script, being stopped, closed."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    # Python sees a signal that comes right before a wait for a lock only after it, so that a pool
    # would wait for this process for ever: wake up every second
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    # all processes share the lock of the progress bars: one that is killed while it holds the lock
    # would let the others wait for ever
    tqdm.set_lock(threading.RLock())
    print_error = sys.excepthook

    def print_other_errors(kind, error, trace):
        if not isinstance(error, ConnectionError | EOFError):
            print_error(kind, error, trace)

    sys.excepthook = print_other_errors


def run_script(main):
    """main() with one line in place of a traceback for what a user can cause.

    Ctrl-C and SIGTERM may reach the processes that the script forked, too. They leave the script
    the time to end them: a pool of processes hangs where one of them ends by itself.
    """
    script = os.getpid()

    def stop(number, frame):
        if os.getpid() == script:
            signal.signal(signal.SIGCHLD, lambda *_: None)  # else torch reports the processes' ends
            raise KeyboardInterrupt
        if number == signal.SIGTERM:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(1)  # which ends this process in a second

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    # tqdm makes its lock when it is first asked for one. Made here, it is also that of the bars of
    # datasets, which else make their own, so that after_fork replaces it for both
    tqdm.get_lock()
    os.register_at_fork(after_in_child=after_fork)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; what was prepared and saved stays", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        peak = torch.cuda.max_memory_allocated() // 2**20
        sys.exit(f"error: GPU full at {peak} MB; lower BATCH_SIZE = {BATCH_SIZE}")
    except (OSError, UnicodeError) as error:  # the disk is full, a terminal lacks a letter, ...
        sys.exit(f"error: {reason_of(error)}")
    finally:  # no second signal is to print a traceback while Python ends
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ==== SHARED BLOCK: end


def report_full_training():
    """What train_final_model.py costs on all rows, where their poses are read from the hub."""
    dataset, pattern, token = locate_data()
    rows, splits, _ = load_rows(dataset, token)
    if "pose" in rows.column_names or not pattern.startswith("hf://"):
        return
    try:
        fs, paths, _ = list_poses(pattern, token)
        read = sum(fs.size(path) for path in paths)
    except (OSError, huggingface_hub.errors.HTTPError):
        return  # without a network, all clips of this run having been prepared before
    usable = [has_text(gloss) for gloss in rows["gloss"][:]]
    if splits:
        train = sum(ok for ok, split in zip(usable, splits, strict=True) if split == "train")
    else:
        train = round(sum(usable) * (1 - VALIDATION_SHARE))
    kept = sum(usable) * MAX_FRAMES * POSE_DIM * 4  # bytes of a float32
    print(f"full training      what train_final_model.py costs on all {len(rows)} rows, about")
    print(f"  clips            {train} train, {sum(usable) - train} validation")
    print(f"  read             {read / 2**30:.1f} GiB of poses from the hub, once")
    print(f"  kept             at most {kept / 2**30:.1f} GiB in the cache")
    print(
        f"  steps            {math.ceil(train / BATCH_SIZE)} in an epoch of {BATCH_SIZE} clips each"
    )


def save_best(run, data):
    """selection_<model>.pt where this epoch is the best one."""
    if best_of(run.log) is run.log[-1]:
        weights = run.average.state_dict()
        contents = {**run.built, "data": data, "metrics": run.log[-1], "weights": weights}
        save(f"selection_{run.name}.pt", contents)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    check_settings()
    known = isinstance(CANDIDATES, list) and all(name in [*MODELS] for name in CANDIDATES)
    if not known or not CANDIDATES:
        raise SystemExit(f"error: CANDIDATES = {CANDIDATES!r} is no list of {', '.join(MODELS)}")
    lock = claim_folder("selection")
    device = pick_device()
    for name in CANDIDATES:
        check_memory(name, device)
    clips, data = load_clips()
    statistics, vocabulary = training_statistics(clips["train"])
    if data != "sample data":
        report_full_training()
    print(f"device             {device}", flush=True)
    results = {}
    for name in CANDIDATES:
        run = new_run(name, clips, statistics, vocabulary, device)
        train_epochs(run, keep=functools.partial(save_best, data=data))
        results[name] = best_of(run.log)
    lock.close()
    winner = min(results, key=lambda name: results[name]["val_mse"])
    print("\nFINAL RESULTS (sample data)" if data == "sample data" else "\nFINAL RESULTS")
    for name, best in results.items():
        print(f"{MODELS[name].title}: {best['val_mse']:.4f}")
    print(f"Mean pose: {results[winner]['mean_pose_mse']:.4f}")
    print(f"Next: python train_final_model.py --model {winner}")
    print("Its data settings, at the top of the file, must be the same as those of this script.")


if __name__ == "__main__":
    run_script(main)
