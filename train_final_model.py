"""Train one gloss -> pose model on iSign to the end, and let it sign.

    python train_final_model.py --model gru                             (or transformer, or bert)
    python train_final_model.py --model gru --resume                    go on with a stopped run
    python train_final_model.py --model gru --predict "WANT GO SCHOOL"  (several; -: lines of stdin)

Reads DATASET, or an embedded sample where there is no token for iSign. Writes best_<model>.pt
(lowest validation MSE, complete by itself), last_<model>.pt, <model>.log, preview_<model>.html and
left_out.log; with --predict a new folder predictions/ (then predictions-2/, ...).
"""

import argparse
import bisect
import collections
import contextlib
import copy
import errno
import fcntl
import functools
import glob
import hashlib
import html
import io
import itertools
import json
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

# Before torch is imported. Trainings that run side by side slow each other down if each has
# several threads. Set OMP_NUM_THREADS for more
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import fsspec
import huggingface_hub
import numpy as np
import pose_format
import tokenizers
import torch
import transformers
from pose_format.numpy import NumPyPoseBody
from pose_format.pose_header import PoseHeader, PoseHeaderComponent, PoseHeaderDimensions
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
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
TRAIN_CLIPS = 0  # train on so many, drawn by whole videos; 0: all
VALIDATION_CLIPS = 0
# ---- the models
BERT_NAME = "bert-base-uncased"  # hub id, or a folder with a model and its tokenizer
EMBED_DIM = 256  # of the glosses' embeddings, and the Transformer's width
HIDDEN_DIM = 512  # of the GRUs, and of the Transformer's feed-forward layers
DROPOUT = 0.1  # of the features
WORD_DROPOUT = 0.1  # of the glosses, which become <unk> (not with BERT)
# ---- the training
EPOCHS = 60  # at most
PATIENCE = 8  # epochs without a lower validation MSE before a run stops
BATCH_SIZE = 8  # clips of a step, over all processes
SEED = 0  # of all that is drawn
LR_GRU = 1e-3  # also of BERT's decoder
LR_TRANSFORMER = 5e-4
LR_BERT = 2e-5  # of the pretrained encoder
WARMUP = 0.05  # share of the steps in which the rates rise; then they fall to 0
GRAD_CLIP = 1.0  # the longest gradient; 0: any
DURATION_WEIGHT = 0.1  # of the error of the log duration, beside the MSE
MOTION_WEIGHT = 0.6  # of the errors of how the points move
CONFIDENCE_WEIGHT = 0.1  # of the error of which points are seen
AVERAGE = 0.999  # of the moving average of the weights, which is evaluated and saved; 0: no average
MIXED_PRECISION = True  # bfloat16 on GPUs that compute with it

# The shared block is the same as in model_selection.py, where it can be read as well
# ==== SHARED BLOCK: begin (the same bytes in both scripts, which a test compares)
# It reads in the order in which a clip travels: rows, poses, the store of prepared clips, batches,
# models, losses and metrics, training.
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
FACE = [61, 291, 17, 0, 70, 105, 107, 300, 334, 336, 161, 158]
FACE += [33, 163, 153, 133, 388, 385, 263, 390, 380, 362, 9]
# The 76 keypoints of PoseStitch-SLT (EMNLP 2025), by their names in MediaPipe's .pose files
PARTS = {
    "LEFT_HAND_LANDMARKS": HAND,
    "RIGHT_HAND_LANDMARKS": HAND,
    "POSE_LANDMARKS": BODY,
    "FACE_LANDMARKS": [str(number) for number in FACE],
}
POINTS = [(part, name) for part, names in PARTS.items() for name in names]
SHOULDERS = [POINTS.index(("POSE_LANDMARKS", f"{side}_SHOULDER")) for side in ("LEFT", "RIGHT")]
NOSE = POINTS.index(("POSE_LANDMARKS", "NOSE"))
WRISTS = [POINTS.index(("POSE_LANDMARKS", f"{side}_WRIST")) for side in ("LEFT", "RIGHT")]
ARM_WRISTS = slice(WRISTS[0], WRISTS[0] + 2)  # left and right stand side by side
HAND_WRISTS = slice(0, 2 * len(HAND), len(HAND))
ARMS = [WRISTS[0] - 2, 2, 2, len(POINTS) - WRISTS[0] - 2]  # before, elbows, wrists, after


def access_token():
    # HF_TOKEN first; the hub's library does not read the other one, which people are told to set
    given = os.environ.get("HF_TOKEN") or os.environ.get("HUGGINGFACE_HUB_TOKEN")
    return (given or huggingface_hub.get_token() or "").strip() or None


def reason_of(error):
    """An exception -> what caused it at the bottom, in one line, without an access token."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    if token := access_token():
        text = text.replace(token, "***").replace(repr(token)[1:-1], "***")
    text = re.sub(r"hf_[A-Za-z0-9]{16,}", "***", text)
    return " ".join(text.split())[:300] or type(error).__name__


def short_hash(what):
    return hashlib.sha256(repr(what).encode("utf8", "surrogatepass")).hexdigest()[:32]


def check_settings():
    """SystemExit for what is easily set wrongly, and would run on without a word."""
    if min(MAX_FRAMES, EPOCHS, PATIENCE) < 1:
        raise SystemExit("error: MAX_FRAMES, EPOCHS and PATIENCE must be at least 1")
    if not 0 <= MAX_BAD_SHARE <= 1 or not 0 <= AVERAGE <= 1:
        raise SystemExit("error: MAX_BAD_SHARE and AVERAGE must be from 0 to 1")


def save(path, contents):
    """Write bytes, or a checkpoint (a dict): the file is the old one or the new one, and whole."""
    if isinstance(contents, dict):
        buffer = io.BytesIO()  # not the file: torch makes a RuntimeError of a full disk
        torch.save(contents, buffer)
        contents = buffer.getbuffer()
    temporary = f"{path}.tmp"  # one name, so that kills leave one file: each path has one writer
    try:
        with open(temporary, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise SystemExit(f"error: {path} cannot be written: {error.strerror}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def lock_file(path, mode=fcntl.LOCK_EX):
    """-> the file, locked until it is closed. One process goes on where there are no locks."""
    file = open(path, "w")  # noqa: SIM115 (it stays open)
    try:
        fcntl.lockf(file, mode)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        said = f"the file system of {os.path.abspath(path)} has no locks ({error.strerror})"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise SystemExit(f"error: {said}, which torchrun needs (HF_HOME: the cache)") from None
        print(f"warning: {said}: start no second run at the same time")
    return file


def claim_folder(name):
    """Keep a second run of this name out of the folder -> the lock, which ends with the process."""
    try:
        return lock_file(f".{name}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"error: another run of {name} is at work in this folder") from None


# ---- rows: glosses, videos, splits
MARKS = ".,;:!?¿¡\"'“”„‘’‚‹›«»()[]{}<>…·।॥-‐‑–—*/\\|،؛؟۔。、，！？：；「」『』（）"
# soft hyphen, zero-width joiners, directions of writing, word joiner, byte order mark
MARKS += "\u00ad\u061c\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\ufeff"
COLUMNS = {"uid", "gloss", "text", "video", "pose"}  # that are read
# The splits, and the names that they may have; of several the last one counts
SPLITS = {"train": ["train"], "validation": ["dev", "val", "valid", "validation"], "test": ["test"]}
# A row of the data set's tables. gloss: "" without a word; video: the uid where it is not known, so
# that the clip counts as a video of its own; number: counted through all tables
Row = collections.namedtuple("Row", "uid gloss video split number")


def split_words(text):
    """Text -> its words as they are written, without the marks at their ends."""
    text = unicodedata.normalize("NFC", text).replace("\u200b", " ")  # a space of Khmer and Thai
    return [word.strip(MARKS) for word in text.split() if word.strip(MARKS)]


def split_glosses(text):
    """A gloss sentence or English text -> its glosses, in upper case."""
    return [word.upper() for word in split_words(text)]


def video_of(uid):
    """A clip's uid of one of iSign's forms -> the video that it was cut from; else None."""
    found = re.fullmatch(r"([0-9a-f]{12})-\d+|(.{11})(?:--\d+|_(?:w|d|e\d+))", uid)
    return found and (found[1] or found[2])


def draw_videos(videos, share=1, clips=math.inf, salt=""):
    """The videos of the clips -> a share of them, or some that hold so many clips or more."""
    sizes, drawn = collections.Counter(videos), []
    number = {video: random.Random(salt + video).random() for video in sizes}  # by its name alone
    for video in sorted(sizes, key=number.get):
        if drawn and (number[video] >= share or clips <= 0):
            break
        drawn.append(video)
        clips -= sizes[video]
    return drawn


def choose_dataset():
    """DATASET; or "sample", and a notice, where there is no token for iSign."""
    if DATASET != ISIGN or access_token():
        return str(DATASET)
    print(f"!!!!!!!!  NO ACCESS TOKEN: {ISIGN} is gated; what follows is NOT iSign, but")
    print("!!!!!!!!  a synthetic SAMPLE. Accept iSign's terms, and set HF_TOKEN (see the README)")
    return "sample"


def load_tables(dataset):
    """-> the data set's tables, {split: Dataset}, and their files; SystemExit for none."""
    if dataset == "sample":
        return {"train": sample_rows(320, 1), "validation": sample_rows(80, 2)}, []
    if "/" not in dataset and not os.path.exists(dataset):
        raise SystemExit(f"error: DATASET {dataset!r} is no folder here, and no hub id")
    try:
        return read_tables(dataset)
    except Exception as error:  # of the library, which has many kinds
        message = f"error: cannot load DATASET {dataset!r}, CONFIG {CONFIG!r}: {reason_of(error)}"
        if "Length of header" in message:
            message += " (a text with a comma needs quotes)"
        elif "Couldn't cast" in message or "same columns" in str(error):
            message += " (all files need the same columns)"
        elif not os.path.exists(dataset):
            message += " (check the name, the network, HF_TOKEN, and the data set's terms)"
        raise SystemExit(message) from None


def read_tables(dataset):
    """As load_tables, but a fault is an error of the library."""
    cache = f"{datasets.config.HF_DATASETS_CACHE}/gloss_to_pose_tables"
    builder = datasets.load_dataset_builder(dataset, CONFIG, cache_dir=cache, token=access_token())
    if hasattr(builder.config, "na_filter"):  # of a CSV: 001 and 1e5 are texts, NA is no gap
        builder.config.converters = dict.fromkeys(range(100), str)  # of each column, by its number
        builder.config.na_filter = False
        builder.config.index_col = False  # a comma at each row's end shifts no column
    files = [*itertools.chain(*(builder.config.data_files or {}).values())]
    output = None
    if os.path.isdir(dataset):  # the library's cache does not notice that its files changed
        state = [(path, os.stat(path).st_size, os.stat(path).st_mtime) for path in files]
        output = f"{cache}/{short_hash(state)}"
    with warnings.catch_warnings():  # of what pandas drops: texts after an unquoted comma
        warnings.filterwarnings("error", "Length of header")
        builder.download_and_prepare(output)
    return builder.as_dataset(), sorted({os.path.relpath(x, builder.base_path) for x in files})


def check_splits(dataset, tables, files):
    """SystemExit where file names or a column tell several splits, and the library reads one."""
    table, *others = tables.values()
    # beside train.csv the library does not read Val.csv
    kinds = {os.path.splitext(path)[1] for path in files}
    paths = glob.glob("**", root_dir=dataset, recursive=True)
    paths = [*files, *(path for path in paths if os.path.splitext(path)[1] in kinds)]
    names = "(?<![a-z])(train|val|valid|validation|dev|test)(?![a-z])"
    told = [{str(re.findall(names, path.lower())) for path in paths} - {"[]"}]
    told += [{*table[column][:]} for column in table.column_names if column.lower() == "split"]
    if not others and any(len(splits) > 1 for splits in told):
        raise SystemExit("error: unread splits: name their files train, validation and test")


def texts_of(table, column):
    """A column of texts or numbers -> texts; "" where there is none, or a NaN."""
    if column not in table.column_names:
        return [""] * len(table)
    kind = table.features[column]
    if not isinstance(kind, datasets.Value) or "binary" in kind.dtype:
        raise SystemExit(f"error: the column {column} holds {kind}, which is no text")
    return ["" if value is None or value != value else str(value) for value in table[column][:]]


def list_rows(dataset, tables):
    """-> {"train": Dataset, and "validation" and "test" where there are such}, and [Row]."""
    named = [(split, name) for split, names in SPLITS.items() for name in names if name in tables]
    used = {split: tables[name] for split, name in named}
    columns = [{*table.column_names} for table in used.values()]
    complete = all(some & {"gloss", "text"} and some & {"pose", "uid"} for some in columns)
    if "train" not in used or not complete:
        found = [f"{name} with {', '.join(tables[name].column_names)}" for name in tables]
        raise SystemExit(
            f"error: DATASET {dataset!r} needs a split train with the columns gloss or text, and "
            f"pose or uid; it has {'; '.join(found)}"
        )
    rows = []
    for split, table in used.items():
        read = [texts_of(table, column) for column in ("uid", "video", "gloss", "text")]
        for uid, video, *texts in zip(*read, strict=True):
            uid = uid or f"row {len(rows)}"  # a name that no uid has
            video = video or video_of(uid) or uid
            said = [text for text in texts if split_words(text) not in ([], ["nan"])]  # iSign's nan
            rows.append(Row(uid, said[0] if said else "", video, split, len(rows)))
    return used, rows


def hold_out(rows):
    """-> the rows, in which a share of the training videos has become the split validation."""
    videos = [row.video for row in rows if row.split == "train"]
    # one video at least stays to train on
    held_out = {*draw_videos(videos, share=VALIDATION_SHARE)[: len({*videos}) - 1]}
    return [
        row._replace(split="validation") if row.split == "train" and row.video in held_out else row
        for row in rows
    ]


def choose_rows(rows, source):
    """-> {split: [Row]} of those that are used, and [(uid, reason)] of those left out."""
    left_out, usable = [], {split: {} for split in SPLITS}
    for row in rows:
        key = source.key(row)
        if row.gloss and key not in usable[row.split]:
            usable[row.split][key] = row
        else:
            left_out.append((row.uid, "uid twice" if row.gloss else "no text"))
    for split, limit in (("train", TRAIN_CLIPS), ("validation", VALIDATION_CLIPS)):
        if not usable[split]:
            raise SystemExit(f"error: no text is left for {split}; a single video is not divided")
        if limit:
            videos = [row.video for row in usable[split].values()]
            drawn = {*draw_videos(videos, clips=limit, salt="subset ")}
            usable[split] = {x: row for x, row in usable[split].items() if row.video in drawn}
    return {split: [*some.values()] for split, some in usable.items() if some}, left_out


# The sample. Points are complex: x grows to the signer's left, y downwards, shoulders at -.5 and .5
SAMPLE_WORDS = """HELLO I YOU WANT GO SCHOOL HOUSE WATER
    EAT BOOK TEACHER GOOD NOT UNDERSTAND FAMILY WORK"""
SAMPLE_HEAD = """-.75j .1-.86j -.1-.86j .21-.8j -.21-.8j -.1-.55j .1-.55j -.5j -.58j -.18-.94j
    -.12-.97j -.05-.94j .18-.94j .12-.97j .05-.94j -.14-.86j -.1-.88j -.17-.85j -.14-.83j -.1-.83j
    -.06-.85j .14-.86j .1-.88j .17-.85j .14-.83j .1-.83j .06-.85j -.92j"""
ARM_AT_REST = [0.45, 1.3, 1.4, 0.8, 0.9, 1, 0.9, 0.8]  # wrist's x and y, hand's turn, five fingers


def sample_pose(arms):
    """Arms (T, left and right, 8 numbers as of ARM_AT_REST) -> a pose (T, D)."""
    fan = np.exp(0.25j * np.arange(-2, 3))[:, None] * np.linspace(0.1, 0.34, 4)  # fingers' joints
    wrist = arms[..., :1] + 1j * arms[..., 1:2]
    turn, reach = np.exp(1j * arms[..., 2:3]), arms[..., 3:]
    fingers = wrist[..., None] + fan * (turn * reach)[..., None]
    shoulder, elbow = 0.5 + 0 * wrist, 0.62 + 0.55j + wrist / 5
    sides = np.concatenate([shoulder, elbow, wrist, fingers.reshape(-1, 2, 20)], 2)
    sides[:, 1] = -sides[:, 1].conj()  # the right arm is the left one's mirror image
    body = sides[:, :, :3].swapaxes(1, 2).reshape(-1, 6)
    head = np.tile(np.array(SAMPLE_HEAD.split(), complex), (len(arms), 1))
    parts = [sides[:, 0, 2:], sides[:, 1, 2:], head[:, :5], body, head[:, 5:]]
    return np.concatenate(parts, 1).view(float)


def sample_rows(n, seed):
    """A synthetic Dataset of n rows of gloss and pose: 1 to 4 signs that flow into each other."""
    words = SAMPLE_WORDS.split()
    lowest, highest = [-0.1, -0.5, -2.2] + [0.2] * 5, [0.7, 0.9, -0.6] + [1] * 5
    signs = np.random.default_rng(0).uniform(lowest, highest, (len(words), 3, 2, 8))  # 3 moments
    signs[::3, :, 0] = signs[::3, :, 1]  # one in three is signed with both hands
    signs[1::3, :, 0] = signs[2::3, :, 0] = ARM_AT_REST
    rng = np.random.default_rng([seed, 1000])
    rows = []
    for _ in range(n):
        said = rng.integers(0, len(words), rng.integers(1, 5))
        shaken = signs[said] + rng.normal(0, 0.03, (len(said), 3, 2, 8))
        rest = [[ARM_AT_REST, ARM_AT_REST]]
        moments = np.concatenate([rest, *shaken, rest])
        times = np.cumsum([0, *[0.25, 0.35, 0.35] * len(said), 0.3]) / rng.uniform(0.8, 1.25)
        at = np.arange(0, times[-1], 1 / ROW_FPS)
        before = np.searchsorted(times, at, side="right") - 1
        phase = np.pi * (at - times[before]) / np.diff(times)[before]
        part = (0.5 - 0.5 * np.cos(phase))[:, None, None]
        pose = sample_pose(moments[before] * (1 - part) + moments[before + 1] * part)
        lost = rng.integers(0, 4 * len(at))  # a hand is unseen for a moment in every fourth clip
        pose[lost : lost + 8, 2 * len(HAND) : 4 * len(HAND)] = np.nan
        pose += rng.normal(0, 0.004, pose.shape)
        rows.append({"gloss": " ".join(words[i] for i in said), "pose": pose})
    return datasets.Dataset.from_list(rows)


# ---- poses: a column of the tables, or .pose files in a folder or an archive
ROW_FPS = 25  # frames per second of the poses in rows
MAX_DISTANCE = 10  # shoulder widths from the origin: a point farther out is a detector's error
MAX_FPS = 240  # a file that says more does not know its frame rate
MAX_CONFIDENCE = 1.5  # above it a number is no confidence, so that the file was cut short
WHOLE_RATES = (23, 29, 47, 59, 119)  # what version 0.1 stores for 23.976, 29.97, ... a second
GROUP_BYTES = 2**24  # of neighbours, which one request reads: the hub counts requests
HUB_THREADS = 12  # so many requests at once; the disk has a thread for each core
# those that this process may use, which macOS cannot tell
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class BadClip(Exception):
    """A clip that is left out; the message is the reason that it is counted under."""


class Damaged(BadClip):
    """Bytes that cannot be right, which the next run looks at again."""


class PoseRows:
    """Poses in a column of the tables. PoseFiles have the same attributes and methods."""

    threads = CORES

    def __init__(self, tables):
        self.name = [(table._fingerprint, table.cache_files) for table in tables.values()]
        poses = [table.select_columns("pose") for table in tables.values()]
        self.poses = datasets.concatenate_datasets(poses)

    def key(self, row):
        """What the store knows the row's clip by."""
        return str(row.number)

    def groups(self, rows):
        """-> lists of rows, each of which is read at once."""
        return [rows[i : i + 64] for i in range(0, len(rows), 64)]

    def read(self, group):
        """-> what prepare_pose is given for each row."""
        return self.poses[[row.number for row in group]]["pose"]


class JoinedFiles(fsspec.spec.AbstractBufferedFile):
    """The parts of an archive, or all files of a folder, as one file."""

    def __init__(self, fs, paths):
        self.paths = paths
        self.starts = [0, *itertools.accumulate(fs.size(path) for path in paths)]
        super().__init__(fs, paths[0], cache_type="readahead", size=self.starts[-1])

    def _fetch_range(self, start, end):
        """The bytes from start to end, by a request for each file that they lie in."""
        data, at = b"", start
        while at < end:
            i = bisect.bisect_right(self.starts, at) - 1
            first, stop = self.starts[i], min(end, self.starts[i + 1])
            # without "none" the hub's file system reads 5 MiB ahead for every clip
            data += self.fs.cat_file(self.paths[i], at - first, stop - first, cache_type="none")
            at = stop
        if len(data) != end - start:
            raise EOFError(f"{len(data)} bytes came, and not {end - start}")
        return data


# A .pose file. start, end: its bytes in the JoinedFiles; stamp: changes when the file does; info:
# its ZipInfo, in an archive; problem: why there is no such file, or None
PoseFile = collections.namedtuple("PoseFile", "start end stamp info problem", defaults=[None, None])


class PoseFiles:
    """.pose files in a folder or a zip, whole or cut into parts by size, on the disk or the hub."""

    def __init__(self, fs, place):
        self.fs = fs
        self.place = place
        self.remote = "file" not in fs.protocol
        self.name = place if self.remote else os.path.realpath(place)
        self.threads = HUB_THREADS if self.remote else CORES

    @functools.cached_property
    def files(self):
        """{a path within the folder or zip, or the name at its end: [PoseFile]}, without .pose"""
        place = self.fs._strip_protocol(self.place)
        folder = self.fs.isdir(place)
        pattern = f"{place}/**/*.pose" if folder else place
        # on the disk by glob, which follows links; some of them lead nowhere
        found = self.fs.glob(pattern) if self.remote else glob.glob(pattern, recursive=True)
        paths = sorted(path for path in found if self.remote or os.path.isfile(path))
        if not paths:
            raise SystemExit(f"error: no poses at {self.place}: name a zip, its parts or a folder")
        self.joined = JoinedFiles(self.fs, paths)
        files = self.files_of_folder(place) if folder else self.files_of_zip()
        by_path = {plain_name(path): file for path, file in files}
        by_name = collections.defaultdict(list)
        for path, file in by_path.items():
            by_name[os.path.basename(path)].append(file)
        return by_name | {path: [file] for path, file in by_path.items()}

    def files_of_folder(self, root):
        places = itertools.pairwise(self.joined.starts)
        for path, (start, end) in zip(self.joined.paths, places, strict=True):
            stamp = end - start, self.fs.info(path).get("mtime")
            yield os.path.relpath(path, root), PoseFile(start, end, stamp)

    def files_of_zip(self):
        try:
            archive = zipfile.ZipFile(self.joined)
        except zipfile.BadZipFile as error:
            if isinstance(error.__context__, OSError):  # of the hub, which zipfile takes for no zip
                raise error.__context__ from None
            raise SystemExit(f"error: {self.place} is no zip, or not all of it ({error})") from None
        members = sorted(archive.infolist(), key=lambda info: info.header_offset)
        starts = [*(info.header_offset for info in members), archive.start_dir]
        if starts[0] < 0:
            raise SystemExit(f"error: {self.place} is not all of a zip: a part is missing")
        for info, (start, end) in zip(members, itertools.pairwise(starts), strict=True):
            if info.filename.endswith(".pose"):
                yield info.filename, PoseFile(start, end, (info.file_size, info.CRC), info)

    def find(self, row):
        """-> the PoseFile of a row, whose uid is a path or, where only one has it, a name."""
        files = self.files.get(plain_name(row.uid), [])
        if len(files) == 1:
            return files[0]
        problem = "ambiguous name" if files else "no .pose file"
        return PoseFile(0, 0, problem, problem=problem)

    def key(self, row):
        """On the hub, whose files stay as they are, the name alone: that needs no list of files."""
        name = plain_name(row.uid)
        return name if self.remote else f"{name}: {self.find(row).stamp}"

    def groups(self, rows):
        """Rows whose files are neighbours, and so are read by one request."""
        groups, first, last = [], 0, None
        most = GROUP_BYTES if self.remote else GROUP_BYTES // 4  # the disk gains nothing by more
        for row in sorted(rows, key=lambda row: self.find(row).start):
            file = self.find(row)
            if file.start != last or last - first >= most:
                groups.append([])
                first = file.start
            groups[-1].append(row)
            last = file.end
        return groups

    def read(self, group):
        """-> the bytes of each row's file, or a BadClip."""
        files = [self.find(row) for row in group]
        if self.remote:
            return self.read_from_hub(group, files)
        data = self.joined._fetch_range(files[0].start, files[-1].end)
        return (self.unpack(file, data, files[0].start) for file in files)

    def read_from_hub(self, group, files):
        """As read, but asks again for damaged data, unless the same bytes come twice."""
        before = None
        for pause in (1, 3, 9, 0):  # seconds
            try:
                data = self.joined._fetch_range(files[0].start, files[-1].end)
            except EOFError:
                data = b""
            found = [self.unpack(file, data, files[0].start) for file in files]
            if data == before or not any(isinstance(one, Damaged) for one in found):
                return found
            before = data or before
            time.sleep(pause)
        raise OSError(f"what the hub sends of {group[0].uid} cannot be right")

    def unpack(self, file, data, first):
        """The joined bytes from `first` on -> a file's, or BadClip (zipfile copies them twice)."""
        if file.problem:
            return BadClip(file.problem)
        data, info = memoryview(data)[file.start - first : file.end - first], file.info
        if info is None:
            return bytes(data) if len(data) == file.end - file.start else Damaged("cut short")
        header = 30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
        data = data[header : header + info.compress_size]
        with contextlib.suppress(zlib.error):
            if info.compress_type == zipfile.ZIP_DEFLATED:
                data = zlib.decompress(data, -zlib.MAX_WBITS, info.file_size)
            if zlib.crc32(data) == info.CRC:
                return bytes(data)
        return Damaged("damaged in the archive")


def plain_name(path):
    """How a uid and the path of a .pose file are compared."""
    return unicodedata.normalize("NFC", path).strip().removesuffix(".pose").strip()


def find_poses(dataset, tables):
    """-> where the poses of the tables are."""
    if all("pose" in table.column_names for table in tables.values()):
        if isinstance(kind := tables["train"].features["pose"], datasets.Value):
            raise SystemExit(f"error: pose holds {kind.dtype}: give paths in the column uid")
        return PoseRows(tables)
    if 2 * len(POINTS) != POSE_DIM:
        raise SystemExit(f"error: POSE_DIM = {POSE_DIM}: .pose files give {2 * len(POINTS)}")
    disk = fsspec.filesystem("file")
    places = [str(POSES), os.path.join(dataset, POSES)]
    found = [place for place in places if disk.glob(place)]
    if found or os.path.isdir(dataset):
        return PoseFiles(disk, [*found, places[1]][0])  # which says so where there are none
    hub = huggingface_hub.HfFileSystem(token=access_token())
    return PoseFiles(hub, f"hf://datasets/{dataset}/{POSES}")


def hide_unseen(points):
    """Points (T, K, 2) -> with NaN for those not seen: without a number, or exactly at (0, 0)."""
    seen = np.isfinite(points).all(-1) & (points != 0).any(-1)
    return np.where(seen[..., None], points, np.float32(np.nan))


def normalise(keypoints):
    """(T, K, 2) in any unit -> in median shoulder widths, from the shoulders' median midpoint."""
    left, right, nose = keypoints[:, [*SHOULDERS, NOSE]].swapaxes(0, 1)
    both = np.isfinite(left + right).all(-1)
    width = np.median(np.linalg.norm(left - right, axis=-1)[both]) if both.any() else 0
    if width == 0:
        raise BadClip("no shoulders")
    nose = nose[np.isfinite(nose).all(-1)]
    if len(nose):  # x points right, y down: the nose is above, the left shoulder on the right
        (x, y), (right_x, right_y) = np.median(left[both], 0), np.median(right[both], 0)
        if x <= right_x or np.median(nose[:, 1]) >= min(y, right_y):
            raise BadClip("mirrored, turned or upside down")
    # one origin and one unit for the whole clip, so that the hands keep their place
    return (keypoints - np.median((left + right)[both] / 2, 0)) / width


def read_keypoints(data):
    """The bytes of a .pose file -> keypoints (T, K, 2) of one person, fps, and people seen."""
    try:
        pose = pose_format.Pose.read(data)
        confidence = np.asarray(pose.body.confidence)  # (T, people, points)
        fps, size = float(pose.body.fps), pose.header.dimensions
        names = [(part.name, name) for part in pose.header.components for name in part.points]
        column = {name: i for i, name in enumerate(names)}
        columns = np.array([column.get(point, -1) for point in POINTS])  # -1: it lacks this one
        keypoints = pose.body.data.data[:, :, columns[:, None], [0, 1]].astype(np.float32)
        seen = (confidence[:, :, columns] > 0) & (columns >= 0)
        keypoints = hide_unseen(np.where(seen[..., None], keypoints, np.nan))
        frames = np.isfinite(keypoints).any((2, 3)).sum(0)  # that show each person
        keypoints = keypoints[:, frames.argmax()]
    except Exception as error:  # whatever the library's parser meets in a file that is none
        raise BadClip("not a readable .pose file") from error
    if (columns < 0).all():
        raise BadClip("none of MediaPipe's points")
    # version 0.1 counts frames by the file's length: where it was cut, coordinates are confidences
    old = pose.header.version < 0.15
    if old and (confidence > MAX_CONFIDENCE).any():
        raise BadClip("cut short")
    if not 1 <= fps <= MAX_FPS:
        raise BadClip("no frame rate")
    fps = (fps + 1) / 1.001 if old and fps in WHOLE_RATES else fps
    numbers = keypoints[np.isfinite(keypoints)]
    if ((numbers >= 0) & (numbers <= 1)).sum() > 0.75 * len(numbers):  # of the width and height
        keypoints *= size.width, size.height
    return normalise(keypoints), fps, int((frames > 0).sum())


def row_keypoints(pose):
    """A row's `pose` (T, D), in which null is a frame that shows nothing -> as read_keypoints."""
    try:
        frames = [[np.nan] * POSE_DIM if frame is None else frame for frame in pose]
        frames = np.asarray(frames, np.float32).reshape(len(frames), -1)
    except (TypeError, ValueError) as error:
        raise BadClip("no table of frames") from error
    if frames.shape[1] != POSE_DIM:
        raise BadClip(f"{frames.shape[1]} numbers a frame, POSE_DIM is {POSE_DIM}")
    keypoints = hide_unseen(frames.reshape(len(frames), -1, 2))
    if keypoints.shape[1] == len(POINTS):  # of other points nobody knows the shoulders
        keypoints = normalise(keypoints)
    return keypoints, ROW_FPS, 1


def resample(keypoints, n):
    """(T, K, 2) -> (n, K, 2), linearly; a point is seen where the nearest frame has seen it."""
    at = np.linspace(0, len(keypoints) - 1, n)
    low = at.astype(int)
    high = np.minimum(low + 1, len(keypoints) - 1)
    part = (at - low).astype(np.float32)[:, None, None]
    between = keypoints[low] * (1 - part) + keypoints[high] * part
    nearest = np.where(part < 0.5, keypoints[low], keypoints[high])
    return np.where(np.isnan(between), nearest, between)


def prepare_pose(raw):
    """What was read of a clip -> pose (T, K, 2), T <= MAX_FRAMES, seconds, people; or BadClip."""
    if isinstance(raw, BadClip):
        raise raw
    keypoints, fps, people = (read_keypoints if isinstance(raw, bytes) else row_keypoints)(raw)
    distance = np.hypot(keypoints[..., 0], keypoints[..., 1])
    near = distance <= MAX_DISTANCE
    if (np.isfinite(distance) & ~near).sum() > near.sum():
        raise BadClip(f"most points beyond {MAX_DISTANCE} shoulder widths")
    keypoints[~near] = np.nan
    shown = np.flatnonzero(near.any(1))
    if len(shown) == 0:
        raise BadClip("nothing seen")
    keypoints = keypoints[shown[0] : shown[-1] + 1]  # frames at its ends may show nothing
    seconds = len(keypoints) / fps
    n = max(1, min(MAX_FRAMES, round(seconds * FPS)))
    return resample(keypoints, n), seconds, people


# ---- the store of prepared clips
PREPARATION = 5  # the version of the prepared clips: another one prepares all of them anew
# A line of the store's index. first: number of its first frame; people: how many it shows; crc: of
# its frames; problem: why the clip is left out, or ""
StoredClip = collections.namedtuple("StoredClip", "key first frames seconds people crc problem")


class ClipStore:
    """Prepared clips on the disk: poses.f32 has their frames (T, D), clips.jsonl a line for each.

    Both only grow, and serve other subsets and splits. A line follows when its frames are written.
    """

    def __init__(self, name):
        what = short_hash((PREPARATION, POINTS, FPS, MAX_FRAMES, POSE_DIM, name))
        self.folder = Path(datasets.config.HF_DATASETS_CACHE, "gloss_to_pose", what)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.poses = self.folder / "poses.f32"
        self.index = self.folder / "clips.jsonl"
        self.poses.touch()
        self.index.touch()
        self.adding = threading.Lock()
        self.read_index()

    def read_index(self):
        """Learn which clips are there, up to the first line that is not whole or lacks frames."""
        lines = self.index.read_bytes().split(b"\n")[:-1]
        there = self.poses.stat().st_size // (POSE_DIM * 4)  # frames; after the lines: it may grow
        self.clips, self.end, self.index_bytes = {}, 0, 0
        for line in lines:
            try:
                clip = StoredClip(**json.loads(line))
            except (ValueError, TypeError):  # a full disk cut a line, which the next one joined
                break
            if clip.first + clip.frames > there:  # a copy was cut
                break
            self.clips[clip.key] = clip
            self.end = clip.first + clip.frames
            self.index_bytes += len(line) + 1

    def lock(self):
        """Before clips are added: wait for another run that does so, and learn of its clips."""
        path = self.folder / "lock"
        try:
            lock = lock_file(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("  waiting for another run, which prepares these clips", flush=True)
            lock = lock_file(path)
        self.read_index()
        os.truncate(self.index, self.index_bytes)
        return lock

    def add(self, clips):
        """[(key, pose (T, K, 2), seconds, people, problem)] -> the disk. Any thread may call it."""
        with self.adding, open(self.poses, "r+b") as poses, open(self.index, "a") as index:
            poses.seek(self.end * POSE_DIM * 4)  # bytes of a float32
            lines = []
            for key, pose, seconds, people, problem in clips:
                frames = pose.astype(np.float32).tobytes()
                poses.write(frames)
                place = key, self.end, len(pose), seconds, people, zlib.crc32(frames)
                clip = self.clips[key] = StoredClip(*place, str(problem or ""))
                self.end += len(pose)
                if not isinstance(problem, Damaged):  # the next run looks again
                    lines.append(json.dumps(clip._asdict()) + "\n")
            poses.flush()
            os.fsync(poses.fileno())
            index.writelines(lines)

    def frames(self):
        """All frames (N, D), which are read from the disk as they are asked for."""
        return torch.from_file(str(self.poses), size=self.end * POSE_DIM).view(-1, POSE_DIM)


def prepare(rows, source):
    """-> a ClipStore that has the clips of all rows. What it lacks is read and added by threads."""
    store = ClipStore(source.name)
    try:
        row_of = {source.key(row): row for row in rows}
        if not row_of.keys() <= store.clips.keys():
            lock = store.lock()
            add_clips(store, source, [row for key, row in row_of.items() if key not in store.clips])
            lock.close()  # not after an error: threads may still add, until the process ends
    except (OSError, ValueError, EOFError, huggingface_hub.errors.HTTPError) as error:
        raise SystemExit(
            f"error: the poses cannot be prepared; what was prepared stays: {reason_of(error)}"
        ) from None
    return store


def add_clips(store, source, rows):
    """Threads read a group of rows at a time, prepare its clips, and add them to the store."""

    def work(group):
        clips = []
        for row, raw in zip(group, source.read(group), strict=True):
            try:
                clips.append((source.key(row), *prepare_pose(raw), None))
            except BadClip as problem:
                clips.append((source.key(row), np.empty(0), 0.0, 0, problem))
        store.add(clips)
        bar.update(len(group))

    bar = tqdm(total=len(rows), desc="preparing clips", disable=None)
    pool = ThreadPoolExecutor(source.threads, "preparing")
    try:
        for done in as_completed([pool.submit(work, group) for group in source.groups(rows)]):
            done.result()
    finally:  # after a Ctrl-C or an error what has not begun does not begin
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()


def load_clips(test=False):
    """-> {"train": Clips, "validation": Clips, and "test" if asked for and there}, data's name."""
    dataset = choose_dataset()
    name = "sample data" if dataset == "sample" else dataset
    print(f"data               {name}")
    tables, files = load_tables(dataset)
    print(f"  files            {', '.join(files) or 'none'}")
    check_splits(dataset, tables, files)
    loaded = tables
    tables, rows = list_rows(dataset, loaded)
    columns = {column for table in tables.values() for column in table.column_names} - COLUMNS
    splits = {name for name, table in loaded.items() if table not in tables.values()}
    for what, unread in (("splits", splits), ("columns", columns)):
        if unread:
            print(f"  {f'{what} unread':<17}{', '.join(sorted(unread))}")
    rows = [row for row in rows if test or row.split != "test"]
    print(f"  split            {'from the data' if 'validation' in tables else 'by video'}")
    if "validation" not in tables:
        rows = hold_out(rows)
    source = find_poses(dataset, tables)
    chosen, left_out = choose_rows(rows, source)
    store = prepare([*itertools.chain(*chosen.values())], source)
    usable, unusable = usable_clips(chosen, source, store)
    left_out += itertools.chain(*unusable.values())
    if os.environ.get("RANK", "0") == "0":  # torchrun's first process
        lines = [f"{uid}\t{reason}\n" for uid, reason in left_out]
        Path("left_out.log").write_text("".join(lines), "utf8", "backslashreplace")
    report_clips(usable, unusable, left_out)
    return {split: Clips(pairs, store) for split, pairs in usable.items()}, name


def usable_clips(chosen, source, store):
    """-> {split: [(Row, StoredClip)]} and, of the other rows, {split: [(uid, reason)]}."""
    usable, unusable, crcs = {}, {}, set()
    for split, rows in reversed(chosen.items()):  # a clip of two splits stays in the later one
        usable[split], unusable[split] = [], []
        for row in rows:
            clip = store.clips[source.key(row)]
            if reason := clip.problem or ("in two splits" if clip.crc in crcs else ""):
                unusable[split].append((row.uid, reason))
            else:
                usable[split].append((row, clip))
        crcs |= {clip.crc for _, clip in usable[split]}
    return {split: usable[split] for split in chosen}, unusable


def counted(left_out):
    """[(uid, reason)] -> how many there are of each reason, with an example."""
    counts = collections.Counter(reason for _, reason in left_out)
    example = {reason: uid for uid, reason in reversed(left_out)}
    said = [f"{n} {reason} (such as {example[reason]})" for reason, n in counts.most_common()]
    return ", ".join(said) or "none"


def report_clips(usable, unusable, left_out):
    """What usable_clips gives, and all rows left out -> a report, or SystemExit if too many are."""
    for split, bad in unusable.items():
        n = len(usable[split]) + len(bad)
        problems = sum(reason != "in two splits" for _, reason in bad)
        if problems > MAX_BAD_SHARE * n or not usable[split]:
            raise SystemExit(
                f"error: more clips cannot be used than MAX_BAD_SHARE = {MAX_BAD_SHARE} allows: "
                f"{len(bad)} of {n} {split} clips ({counted(bad)}); left_out.log names all"
            )
    train, pairs = usable["train"], [*itertools.chain(*usable.values())]
    sizes = [f"{len(some)} {split}" for split, some in usable.items()]
    videos = {row.video for row, _ in train} & {row.video for row, _ in pairs[len(train) :]}
    unknown = sum(row.video == row.uid for row, _ in pairs)  # see list_rows
    cut = sum(len(split_words(row.gloss)) > MAX_GLOSS_LEN for row, _ in pairs)
    long = sum(round(clip.seconds * FPS) > MAX_FRAMES for _, clip in pairs)
    one_length = len({clip.seconds for _, clip in pairs}) == 1
    print(f"  clips            {', '.join(sizes)}")
    print(f"  left out         {counted(left_out)}{'; see left_out.log' if left_out else ''}")
    if unknown < len(pairs):
        print(f"  videos in both   {len(videos)}")
    counts = {
        "clips of unknown videos: each counts as one of its own": unknown,
        f"sentences are cut to {MAX_GLOSS_LEN} glosses": cut,
        f"clips are resampled to {MAX_FRAMES} frames": long,
        "clips of a single frame": sum(clip.frames == 1 for _, clip in pairs),
        "training clips are the same as another": len(train) - len({x.crc for _, x in train}),
        "clips show several people: one is taken": sum(clip.people > 1 for _, clip in pairs),
        "texts break the line (a quote left open?)": sum("\n" in row.gloss for row, _ in pairs),
        "clips are of one length: pad them with NaN or 0": len(pairs) if one_length else 0,
    }
    for what, n in counts.items():
        if n:
            print(f"  notice           {n} {what}")


# ---- batches
class Clips:
    """The N usable clips of a split."""

    def __init__(self, pairs, store):
        self.glosses = [row.gloss for row, _ in pairs]
        self.crcs = [clip.crc for _, clip in pairs]
        self.places = [slice(clip.first, clip.first + clip.frames) for _, clip in pairs]
        self.n_frames = torch.tensor([clip.frames for _, clip in pairs])
        self.seconds = torch.tensor([clip.seconds for _, clip in pairs])
        self.frames = store.frames()

    def __len__(self):
        return len(self.glosses)

    def pose(self, i):
        """-> (T, D), NaN = not seen"""
        return self.frames[self.places[i]]

    def with_tokens(self, tokenizer):
        """The same clips, with the tokens of a tokenizer in their batches."""
        text = tokenize(tokenizer, self.glosses, MAX_GLOSS_LEN)
        clips = copy.copy(self)
        clips.tokens = text["input_ids"]  # (N, S)
        clips.token_mask = text["attention_mask"].bool()  # (N, S)
        return clips

    def batch(self, numbers, device):
        """The numbers of B clips -> a batch as long as its longest; after a clip's end are NaN."""
        token_mask, poses = self.token_mask[numbers], [self.pose(i) for i in numbers.tolist()]
        longest = token_mask.sum(1).max()
        batch = {
            "tokens": self.tokens[numbers, :longest],  # (B, S)
            "token_mask": token_mask[:, :longest],  # (B, S)
            "pose": nn.utils.rnn.pad_sequence(poses, True, math.nan),  # (B, T, D)
            "n_frames": self.n_frames[numbers],  # (B,)
            "seconds": self.seconds[numbers],  # (B,)
        }
        if device.type == "cuda":  # from other memory the host would wait for each copy
            batch = {name: value.pin_memory() for name, value in batch.items()}
        return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def training_statistics(clips):
    """One pass over the training clips -> the statistics that a model keeps, and the vocabulary."""
    total, squares, count = np.zeros((3, POSE_DIM))
    for i in range(len(clips)):
        pose = clips.pose(i).double().numpy()
        total += np.nansum(pose, 0)
        squares += np.nansum(pose**2, 0)
        count += np.isfinite(pose).sum(0)
    mean = total / count.clip(1)  # of a point that no clip shows: 0, with a std of 1
    std = np.sqrt((squares / count.clip(1) - mean**2).clip(0))
    seen = count / clips.n_frames.sum().item()
    words = collections.Counter()
    for gloss in clips.glosses:
        words.update(split_glosses(gloss)[:MAX_GLOSS_LEN])
    kept = sorted(word for word, n in words.items() if n >= MIN_GLOSS_COUNT)
    print(f"  vocabulary       {len(kept)} glosses; {len(words) - len(kept)} rarer ones are <unk>")
    print(f"  points unseen    {100 * (1 - seen.mean()):.1f} % in the training clips")
    for part in PARTS if 2 * len(POINTS) == POSE_DIM else ():
        if not any(seen[2 * i] for i, point in enumerate(POINTS) if point[0] == part):
            print(f"warning: no training clip shows any of the {part}")
    statistics = {
        "mean": torch.tensor(mean).float(),
        "std": torch.tensor(np.where(std > 1e-4, std, 1)).float(),
        "seen": torch.tensor(seen).float(),
        "seconds_per_gloss": clips.seconds.sum() / words.total(),
    }
    return statistics, ["<pad>", "<unk>", *kept]


PAD = 0
UNK = 1
PIECES_PER_GLOSS = 4  # word pieces that a pretrained encoder reads of a gloss, on average, at most


def gloss_tokenizer(vocabulary):
    """A tokenizer that numbers the glosses of a vocabulary; all others are <unk>."""
    numbers = {gloss: i for i, gloss in enumerate(vocabulary)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return load_tokenizer(words.to_str(), "<pad>", "<unk>")


def load_tokenizer(backend, pad_token, unk_token):
    """A tokenizer as a checkpoint keeps it -> the tokenizer."""
    backend = tokenizers.Tokenizer.from_str(backend)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad_token, unk_token=unk_token
    )


def words_for(tokenizer, sentence, max_gloss_len):
    """A sentence -> the words that a tokenizer is given; what is beyond max_gloss_len is cut."""
    words, glosses = split_words(sentence)[:max_gloss_len], split_glosses(sentence)[:max_gloss_len]
    if isinstance(tokenizer.backend_tokenizer.model, tokenizers.models.WordLevel):
        return glosses
    # a pretrained encoder gets glosses in lower case, and text as it is written
    return [word.lower() for word in words] if words == glosses else words


def known_pieces(tokenizer, words):
    """-> {word: the numbers of its pieces} of the words that the tokenizer knows."""
    pieces = tokenizer(words, add_special_tokens=False)["input_ids"]
    pairs = zip(words, map(tuple, pieces), strict=True)
    return {word: ids for word, ids in pairs if ids and tokenizer.unk_token_id not in ids}


def tokenize(tokenizer, sentences, max_gloss_len):
    """Sentences -> the tokenizer's output: tokens, masks, and where in the text they stand."""
    texts = [" ".join(words_for(tokenizer, sentence, max_gloss_len)) for sentence in sentences]
    pieces = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return tokenizer(
        # text that the tokenizer drops altogether is unknown
        [text if ids else tokenizer.unk_token for text, ids in zip(texts, pieces, strict=True)],
        padding=True,
        truncation=True,
        max_length=PIECES_PER_GLOSS * max_gloss_len,
        return_tensors="pt",
    )


# ---- models: model(tokens, token_mask, n_frames=None) -> Signing
WAVES = 5  # frequencies, each twice the one before
HALF_TURN = 32  # glosses or signs over which the slowest one makes half a turn
WAVE_DIM = 1 + 2 * WAVES


class Signing(NamedTuple):
    """What a model makes of B sentences of S tokens."""

    pose: torch.Tensor  # (B, max_frames, D) in shoulder widths, 0 after the end
    seconds: torch.Tensor  # (B,)
    confidence: torch.Tensor  # (B, max_frames, K), logits of the points' being seen
    keys: torch.Tensor  # (B, S), by which the tokens are sorted into signing order
    durations: torch.Tensor  # (B, S), seconds of each token, about 0 of one that is not signed


def sinusoidal_features(x, fading=1):
    """(...) -> (..., WAVE_DIM): x and its waves, each 1 / `fading` as strong as the one before."""
    times = 2.0 ** torch.arange(WAVES, device=x.device)
    angles = x[..., None] * math.pi * times
    strength = times ** -math.log2(fading)
    return torch.cat([x[..., None], angles.sin() * strength, angles.cos() * strength], -1)


class TwoWayGRU(nn.Module):
    """(B, L, inputs), mask (B, L) -> (B, L, outputs). The way back begins at the last real element.

    PyTorch does that for packed sequences alone, which are 1.7 times slower at batch 64.
    """

    def __init__(self, inputs, outputs):
        super().__init__()
        self.there = nn.GRU(inputs, outputs // 2, batch_first=True)
        self.back = nn.GRU(inputs, outputs - outputs // 2, batch_first=True)

    def forward(self, x, mask):
        with torch.autocast(x.device.type, enabled=False):  # which hands float16 to cuDNN's GRU
            x = x.float()
            steps = torch.arange(x.shape[1], device=x.device)
            lengths = mask.sum(1, keepdim=True)
            turned = torch.where(steps < lengths, lengths - 1 - steps, steps)[..., None]
            there, _ = self.there(x)
            back, _ = self.back(x.gather(1, turned.expand_as(x)))
            return torch.cat([there, back.gather(1, turned.expand_as(back))], -1)


# Encoders: tokens, token_mask (B, S) -> words and states (B, S, width), each token by itself and
# within its sentence. An unknown word says nothing by itself: what it is comes from the sentence.
class GRUEncoder(nn.Module):
    def __init__(self, vocabulary, embed_dim, width, dropout, **_):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embed_dim, PAD)
        self.word = nn.Linear(embed_dim, width)
        self.gru = TwoWayGRU(embed_dim, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens, token_mask):
        embedded = self.dropout(self.embedding(tokens))
        states = self.dropout(self.gru(embedded, token_mask))
        return torch.where((tokens == UNK)[..., None], states, self.word(embedded)), states


def pre_norm_layers(stack, kind, n, width, hidden_dim, dropout):
    """Attention whose layers begin as the identity, so that they learn from the first steps on."""
    heads = math.gcd(4, width)
    layer = kind(width, heads, hidden_dim, dropout, batch_first=True, norm_first=True)
    layers = stack(layer, n, nn.LayerNorm(width))
    for name, weight in layers.named_parameters():
        if "out_proj" in name or "linear2" in name:
            nn.init.zeros_(weight)
        elif weight.dim() > 1:
            nn.init.xavier_uniform_(weight)
    return layers


class TransformerEncoder(nn.Module):
    layers = 3

    def __init__(self, vocabulary, width, hidden_dim, dropout, **_):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, PAD)
        self.places = nn.Linear(WAVE_DIM, width)
        self.dropout = nn.Dropout(dropout)
        stack = functools.partial(nn.TransformerEncoder, enable_nested_tensor=False)
        sizes = self.layers, width, hidden_dim, dropout
        self.attention = pre_norm_layers(stack, nn.TransformerEncoderLayer, *sizes)

    def forward(self, tokens, token_mask):
        place = torch.arange(tokens.shape[1], device=tokens.device)
        places = self.places(sinusoidal_features(place / HALF_TURN))
        words = self.embedding(tokens)
        states = self.attention(self.dropout(words + places), src_key_padding_mask=~token_mask)
        return torch.where((tokens == UNK)[..., None], states, self.dropout(words)), states


class PretrainedEncoder(nn.Module):
    """A BERT, which reads word pieces, and knows none of them without its sentence."""

    hidden_share = 0.3  # of the pieces are hidden from the others, or it learns by heart

    def __init__(self, bert_config, width, dropout, **_):
        super().__init__()
        config = transformers.AutoConfig.for_model(**bert_config)
        self.pretrained = transformers.AutoModel.from_config(config)
        self.pretrained.pooler = None  # nothing reads it
        self.projection = nn.Linear(config.hidden_size, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens, token_mask):
        attended = token_mask
        if self.training:
            hidden = torch.rand(tokens.shape, device=tokens.device) < self.hidden_share
            attended = token_mask & ~hidden
            attended[:, 0] = True  # attention to none is not defined
        output = self.pretrained(input_ids=tokens, attention_mask=attended.long())
        states = self.dropout(self.projection(output.last_hidden_state))
        return states, states


# Decoders: queries (B, T, width), frame_mask, states (B, S, width), token_mask -> (B, T, width)
class GRUDecoder(nn.Module):
    def __init__(self, width, **_):
        super().__init__()
        self.gru = TwoWayGRU(width, width)

    def forward(self, queries, frame_mask, states, token_mask):
        return queries + self.gru(queries, frame_mask)


class TransformerDecoder(nn.Module):
    layers = 2  # a third one costs a fifth of the speed, and helps fingerspelling most
    neighbours = 11  # frames of a convolution: attention alone is a poor judge of what is near

    def __init__(self, width, hidden_dim, dropout, **_):
        super().__init__()
        self.near = nn.Conv1d(width, width, self.neighbours, padding="same")
        sizes = self.layers, width, hidden_dim, dropout
        layer = nn.TransformerDecoderLayer
        self.attention = pre_norm_layers(nn.TransformerDecoder, layer, *sizes)

    def forward(self, queries, frame_mask, states, token_mask):
        queries = queries * frame_mask[..., None]
        return self.attention(
            queries + self.near(queries.mT).mT.relu(),
            states,
            tgt_key_padding_mask=~frame_mask,
            memory_key_padding_mask=~token_mask,
        )


class Plan(nn.Module):
    """Tokens in the order of the text -> signs in signing order, as many as there are tokens.

    The signs are the tokens sorted by a key. It begins as the token's place in the text, so that
    for glosses in signing order nothing is to be learned, and is moved by the token's state and by
    how many tokens before and after it are signed: those that last about 0 s do not count. To have
    a gradient the sorting is soft (SoftSort, Prillo and Eisenschlos 2020): sign i reads the tokens
    whose keys are near the key of rank i.
    """

    step = 2  # places that a key is moved by an output of 1
    softness = 0.5  # places within which keys are near each other
    signed_from = 0.25  # mean glosses: from about this duration on a token counts as signed
    padding = 1e4  # a key after all others

    def __init__(self, width):
        super().__init__()
        self.counts = nn.Linear(2 * WAVE_DIM, width)
        self.move = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        nn.init.zeros_(self.move[-1].weight)
        nn.init.zeros_(self.move[-1].bias)

    def forward(self, states, durations, token_mask):
        """states (B, S, H), durations, token_mask (B, S) -> keys (B, S), sorting (B, S, S).

        sorting: how much of sign i is read from token j.
        """
        # without a gradient: that keys and durations pull at each other upsets a training
        signed = 1 - (-durations.detach() / self.signed_from).exp()
        before = signed.cumsum(1) - signed
        after = signed.sum(1, keepdim=True) - signed - before
        waves = [sinusoidal_features(count / HALF_TURN) for count in (before, after)]
        moved = self.move(states + self.counts(torch.cat(waves, -1))).squeeze(-1)
        keys = torch.arange(states.shape[1], device=states.device) + self.step * moved
        keys = keys.masked_fill(~token_mask, self.padding)
        ranked = keys.sort(1).values
        nearness = -(ranked[:, :, None] - keys[:, None]).abs() / self.softness
        return keys, nearness.masked_fill(~token_mask[:, None], -math.inf).softmax(-1)


class PoseModel(nn.Module):
    """Encode the text, plan its signs, place them on the time line, decode all frames in one call.

    What is signed comes from the word alone, when and how long from the sentence around it: else a
    model memorises which take of a sign belongs to which sentence. An unknown word's sign
    comes from the sentence, too, and so do all of BERT's.
    """

    def __init__(self, name, pose_dim, max_frames, fps, word_dropout, **sizes):
        super().__init__()
        self.title, encoder, decoder = MODELS[name]
        self.max_frames = max_frames
        self.fps = fps
        self.word_dropout = word_dropout
        width = sizes["embed_dim" if name == "transformer" else "hidden_dim"]
        self.encoder = encoder(width=width, **sizes)
        self.decoder = decoder(width=width, **sizes)
        self.dropout = nn.Dropout(sizes["dropout"])
        self.plan = Plan(width)
        self.duration = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        # of a window's borders, in mean glosses
        self.log_softness = nn.Parameter(torch.tensor(-2.0))
        self.of_sign = nn.Linear(width, width, bias=False)  # what a frame asks of its sign
        self.of_place = nn.Linear(3 * WAVE_DIM, width)  # and of where it is
        for weight in (self.of_sign.weight, *self.of_place.parameters()):  # as one layer
            nn.init.uniform_(weight, -1, 1).data /= math.sqrt(width + 3 * WAVE_DIM)
        self.output = nn.Linear(width, pose_dim)
        self.confidence = nn.Linear(width, pose_dim // 2)
        self.register_buffer("mean", torch.zeros(pose_dim))  # see training_statistics
        self.register_buffer("std", torch.ones(pose_dim))
        self.register_buffer("seen", torch.ones(pose_dim))  # share of the frames
        self.register_buffer("seconds_per_gloss", torch.ones(()))

    def forward(self, tokens, token_mask, n_frames=None, longest=None):
        """tokens, token_mask (B, S) -> Signing.

        n_frames (B,), None: by the predicted durations. longest: n_frames.max(), if it is known.
        """
        words, states = self.encoder(self.drop_words(tokens, token_mask), token_mask)
        float32 = torch.autocast(tokens.device.type, enabled=False)  # for times and poses
        with float32:
            words, states = words.float(), states.float()
            durations = self.durations_of(states, token_mask)
            keys, sorting = self.plan(states, durations, token_mask)
            seconds = durations.sum(1) * self.seconds_per_gloss
            n_frames = self.count_frames(seconds) if n_frames is None else n_frames
            longest = int(n_frames.max()) if longest is None else longest
            frame_mask = torch.arange(longest, device=tokens.device) < n_frames[:, None]  # (B, T)
            sign_durations = (sorting * durations[:, None]).sum(-1) * token_mask
            window, places = self.time_line(sign_durations, token_mask, n_frames, longest)
            queries = window @ self.of_sign(sorting @ words) + self.of_place(places)  # (B, T, H)
        hidden = self.decoder(self.drop_features(queries), frame_mask, states, token_mask)
        with float32:
            pose, confidence = self.points(self.drop_features(hidden.float()))
        after_the_end = (0, 0, 0, self.max_frames - longest)
        return Signing(
            pose=nn.functional.pad(pose * frame_mask[..., None], after_the_end),
            seconds=seconds,
            confidence=nn.functional.pad(confidence, after_the_end),
            keys=keys,
            durations=durations * self.seconds_per_gloss,
        )

    def durations_of(self, states, token_mask):
        """(B, S, H) -> (B, S), in mean glosses"""
        begin_at_1 = math.log(math.e - 1)  # softplus(begin_at_1) == 1
        return nn.functional.softplus(self.duration(states).squeeze(-1) + begin_at_1) * token_mask

    def points(self, hidden):
        """(B, T, H) -> pose (B, T, D) and confidence (B, T, K).

        The wrist of an arm goes to the wrist of its hand as far as the hand is likely to be shown,
        and the elbow half as far: an arm is the average over all clips, also those in which it
        hangs, but a hand is the average over those that show it.
        """
        usually_seen = self.seen.view(-1, 2)[:, 0].clamp(0.001, 0.999).logit()
        confidence = self.confidence(hidden) + usually_seen
        pose = self.output(hidden) * self.std + self.mean
        if len(usually_seen) != len(POINTS):  # of other points nobody knows the hands
            return pose, confidence
        points = pose.unflatten(-1, (-1, 2))
        # (B, T, 2): 0.88 for a logit of 0, from which on the hand is shown, and soon nearly 1
        shown = (4 * confidence[..., HAND_WRISTS] + 2).detach().sigmoid()
        gap = shown[..., None] * (points[:, :, HAND_WRISTS] - points[:, :, ARM_WRISTS])
        before, elbows, wrists, after = points.split(ARMS, 2)
        return torch.cat([before, elbows + gap / 2, wrists + gap, after], 2).flatten(2), confidence

    def count_frames(self, seconds):
        return (seconds * self.fps).round().long().clamp(1, self.max_frames)

    def time_line(self, durations, token_mask, n_frames, longest):
        """Durations (B, S) of the signs -> window (B, T, S), places (B, T, 3 * WAVE_DIM).

        Sign s lasts from start[s] to end[s] = durations[0] + ... + durations[s], and a frame is at
        phase * end[-1]. Its window over the signs is the softmax over s of
            log sigmoid((at - start[s]) / softness) + log sigmoid((end[s] - at) / softness):
        near 1 for the sign within which it lies, and soft at the borders.
        """
        step = torch.arange(longest, device=durations.device)
        phase = (step / (n_frames[:, None] - 1).clamp(min=1)).clamp(max=1)  # 0 to 1, first to last
        end = durations.cumsum(1)  # (B, S)
        at = (phase * end[:, -1:])[..., None]  # (B, T, 1)
        since_start = at - (end - durations)[:, None]  # (B, T, S)
        until_end = end[:, None] - at
        softness = self.log_softness.exp()
        log_sigmoid = nn.functional.logsigmoid
        nearness = log_sigmoid(since_start / softness) + log_sigmoid(until_end / softness)
        window = nearness.masked_fill(~token_mask[:, None], -math.inf).softmax(-1)
        shortest = 0.01  # mean glosses, so that nothing is divided by 0
        within = (since_start / durations[:, None].clamp(min=shortest)).clamp(-0.5, 1.5)
        # fast waves are weak, so that they are learned last: with few clips they would fit noise
        waves = functools.partial(sinusoidal_features, fading=2)
        position = (window[..., None] * waves(within)).sum(2)  # within its sign
        time = waves(step / self.max_frames).expand(*phase.shape, -1)
        return window, torch.cat([position, waves(phase), time], -1)

    def drop_features(self, features):
        """Dropout of the same features (B, T, H) in all frames: it must not look like motion."""
        return features * self.dropout(torch.ones_like(features[:, :1]))

    def drop_words(self, tokens, token_mask):
        """In training some glosses become <unk>, so that sentences are not learned by heart."""
        if not self.training or not self.word_dropout:
            return tokens
        dropped = torch.rand(tokens.shape, device=tokens.device) < self.word_dropout
        return tokens.masked_fill(dropped & token_mask, UNK)


MODELS = {  # by their names in commands and files
    "gru": ("GRU", GRUEncoder, GRUDecoder),
    "transformer": ("Transformer", TransformerEncoder, TransformerDecoder),
    "bert": ("BERT", PretrainedEncoder, GRUDecoder),
}


def load_pretrained():
    """-> the encoder BERT_NAME and its tokenizer; SystemExit if one of them cannot be used."""
    try:
        pretrained, report = transformers.AutoModel.from_pretrained(
            str(BERT_NAME), dtype=torch.float32, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(BERT_NAME))
        if missing := [name for name in report["missing_keys"] if "pooler" not in name]:
            raise ValueError(f"{len(missing)} weights are missing in its file, as {missing[0]}")
        pieces = pretrained.get_input_embeddings().num_embeddings
        if not len(tokenizer.all_special_ids) < len(tokenizer) <= pieces:
            raise ValueError("the tokenizer is missing or of another model")
    except (OSError, ValueError, ImportError, TypeError) as error:  # no network, no tokenizer, ...
        raise SystemExit(
            f"error: BERT_NAME {str(BERT_NAME)!r} is no hub id that can be reached, and no folder "
            f"with an encoder and its tokenizer ({reason_of(error)})"
        ) from None
    pretrained.pooler = None  # nothing reads it
    return pretrained, tokenizer


def new_model(name, statistics, vocabulary):
    """-> a fresh model (BERT's encoder from BERT_NAME), its tokenizer, and what rebuilds both."""
    args = {
        "name": name,
        "vocabulary": len(vocabulary),
        "embed_dim": EMBED_DIM,
        "hidden_dim": HIDDEN_DIM,
        "dropout": DROPOUT,
        "word_dropout": WORD_DROPOUT,
        "pose_dim": POSE_DIM,
        "max_frames": MAX_FRAMES,
        "fps": FPS,
    }
    if name == "bert":
        pretrained, tokenizer = load_pretrained()
        args["bert_config"] = pretrained.config.to_dict()
        args["word_dropout"] = 0.0  # it hides word pieces instead
        model = PoseModel(**args)
        model.encoder.pretrained = pretrained
    else:
        tokenizer = gloss_tokenizer(vocabulary)
        model = PoseModel(**args)
    model.load_state_dict(statistics, strict=False)
    packed = {
        "backend": tokenizer.backend_tokenizer.to_str(),
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.unk_token,
    }
    built = {"model_args": args, "tokenizer": packed, "max_gloss_len": MAX_GLOSS_LEN}
    return model, load_tokenizer(**packed), built


# ---- losses and metrics
SPANS = (0.12, 0.24, 0.48)  # seconds, over which movement can be foreseen


def mean_over_processes(value):
    """A tensor without gradient -> its mean over the processes that torchrun started."""
    if dist.is_initialized():
        value = value / dist.get_world_size()
        dist.all_reduce(value)
    return value


def error_of(made, real):
    """made - real, but 0 where real is NaN: not seen, or padding."""
    return torch.where(real.isfinite(), made - real.nan_to_num(), 0)


def distances(pose, rate, seconds):
    """Pose (B, T, D), frames per second (B,) -> how far each point moves in a time (B, T, K)."""
    frame = torch.arange(pose.shape[1], device=pose.device)
    later = frame + (seconds * rate).round().long().clamp(min=1)[:, None]  # (B, T)
    at = later.clamp(max=len(frame) - 1)[..., None].expand_as(pose)
    moved = (pose.gather(1, at) - pose).unflatten(-1, (-1, 2))
    distance = torch.linalg.vector_norm(moved, dim=-1)
    return distance.masked_fill((later >= len(frame))[..., None], math.nan)


def points_seen(batch):
    """-> (B, T, K): 1 = the clip shows the point, 0 = it does not, NaN = padding."""
    step = torch.arange(batch["pose"].shape[1], device=batch["pose"].device)
    padding = step >= batch["n_frames"][:, None]  # (B, T)
    return batch["pose"][..., ::2].isfinite().float().masked_fill(padding[..., None], math.nan)


def training_loss(model, batch):
    """-> the loss that is minimised; the pose's squared error and its count in this process."""
    target = batch["pose"]
    longest = target.shape[1]
    made = model(batch["tokens"], batch["token_mask"], batch["n_frames"], longest)
    pose, rate = made.pose[:, :longest], batch["n_frames"] / batch["seconds"]
    error, seen = error_of(pose, target), target.isfinite().sum()
    distance = torch.linalg.vector_norm(error.unflatten(-1, (-1, 2)), dim=-1)
    log_ratio = (made.seconds.clamp(min=0.001) / batch["seconds"]).log()
    shown = points_seen(batch)
    known = shown.isfinite()
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(
        made.confidence[:, :longest], shown.nan_to_num(), known.float(), reduction="sum"
    )
    losses = [  # sums, and what they are divided by
        (error.square().sum(), seen),
        (distance.sum(), seen / 2),
        (log_ratio.square().sum(), torch.ones_like(log_ratio).sum()),
        (cross_entropy, known.sum()),
    ]
    # each frame's step: this rewards what follows the real one, and punishes trembling
    movements = [(pose.diff(dim=1), target.diff(dim=1))]
    # how far each point moves: an average of several clips moves too little
    movements += [(distances(pose, rate, x), distances(target, rate, x)) for x in SPANS]
    for mine, real in movements:
        losses.append((error_of(mine, real).square().sum(), real.nan_to_num().square().sum()))
    sums, divisors = (torch.stack([*some]).float() for some in zip(*losses, strict=True))
    # by the mean divisor of all processes: DistributedDataParallel averages the gradients, which
    # makes it the sum of all sums over the sum of all divisors. A mean count may be 0.5
    means = sums / mean_over_processes(divisors).clamp(min=1e-6)
    mse, distance, duration, confidence, steps, *spans = means
    bare = getattr(model, "module", model)  # within DistributedDataParallel
    variance = bare.std.square().masked_fill(bare.seen == 0, math.nan).nanmean()
    # the MSE alone puts a point that is in one of two places between them
    loss = mse / variance + distance / (2 * variance).sqrt() / 2
    loss = loss + MOTION_WEIGHT * (steps + sum(spans) / 2)
    loss = loss + DURATION_WEIGHT * duration + CONFIDENCE_WEIGHT * confidence
    return loss, torch.stack([sums[0].detach(), divisors[0]])


METRICS = "val_mse", "val_mae", "mean_pose_mse", "duration_error", "seen_error"


@torch.no_grad()
def evaluate(model, clips, device, rank=0, world=1):
    """-> metrics over real frames and seen points, at the clips' real lengths.

    val_mse, val_mae and mean_pose_mse (of the training split's mean pose) in (squared) shoulder
    widths; duration_error in seconds; seen_error, the share of points in frames whose confidence is
    on the wrong side of 0.5. Sums over all clips and processes, divided once.
    """
    model.eval()
    sums = torch.zeros(len(METRICS), 2, dtype=torch.float64, device=device)
    batches = torch.arange(len(clips))[rank::world].split(BATCH_SIZE)
    for numbers in filter(len, batches):  # of few clips a process may have none
        batch = clips.batch(numbers, device)
        target = batch["pose"]
        longest = target.shape[1]
        made = model(batch["tokens"], batch["token_mask"], batch["n_frames"], longest)
        seen, shown = target.isfinite(), points_seen(batch)
        error = error_of(made.pose[:, :longest], target)
        mean_error = error_of(model.mean, target)
        duration_error = (made.seconds - batch["seconds"]).abs()
        mistaken = (made.confidence[:, :longest] > 0) != (shown == 1)
        pairs = [  # in the order of METRICS: what is averaged, and over how many
            (error.square(), seen),
            (error.abs(), seen),
            (mean_error.square(), seen),
            (duration_error, torch.ones_like(duration_error)),
            (mistaken & shown.isfinite(), shown.isfinite()),
        ]
        sums += torch.stack([torch.stack([x.sum(), n.sum()]).double() for x, n in pairs])
    totals = mean_over_processes(sums).tolist()
    return {name: total / n for name, (total, n) in zip(METRICS, totals, strict=True)}


# ---- training
class Run:
    """A model in training, in one of the `world` processes that torchrun started."""

    def __init__(self, name, clips, statistics, vocabulary, device, rank=0, world=1):
        """Before its first epoch: with the weights that SEED draws, or BERT's."""
        torch.manual_seed(SEED)
        self.name = name
        self.device = device
        self.rank = rank
        self.world = world
        self.log = []  # a line for each finished epoch
        self.model, tokenizer, self.built = new_model(name, statistics, vocabulary)
        self.model.to(device)
        # the moving average of the weights, which is evaluated and saved; .to lays out its GRUs
        self.average = copy.deepcopy(self.model).requires_grad_(False).to(device)
        self.optimizer = new_optimizer(name, self.model)
        self.clips = {split: part.with_tokens(tokenizer) for split, part in clips.items()}
        self.check_words(tokenizer)

    @property
    def epochs_done(self):
        return len(self.log)

    def check_words(self, tokenizer):
        """Report how many words the tokenizer does not know, or does not tell from another one."""
        for split, clips in self.clips.items():
            words = collections.Counter()
            for gloss in clips.glosses:
                words.update(words_for(tokenizer, gloss, MAX_GLOSS_LEN))
            known = known_pieces(tokenizer, [*words])
            share = 1 - sum(words[word] for word in known) / words.total()
            pieces = {word.upper(): ids for word, ids in known.items()}  # Go and go are one word
            alike = sum(n for n in collections.Counter(pieces.values()).values() if n > 1)
            said = f"{100 * share:.1f} % unknown in {split}, "
            said += f"{alike} share their pieces with another"
            if share > 0.5 or alike:
                print(f"warning: words     {said} (see MIN_GLOSS_COUNT, BERT_NAME)")
            else:
                print(f"  words            {said}")

    def batches(self):
        """-> the numbers of the clips in each batch of the next epoch, by SEED and the epoch."""
        generator = torch.Generator().manual_seed(SEED + EPOCH_SEED * (self.epochs_done + 1))
        order = torch.randperm(len(self.clips["train"]), generator=generator)
        order = order[: len(order) // self.world * self.world]  # as many for each process
        return order[self.rank :: self.world].split(BATCH_SIZE // self.world)


def pick_device():
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", 0))  # torchrun's
    if number >= torch.cuda.device_count():
        raise SystemExit("error: torchrun started more processes than there are GPUs")
    torch.cuda.set_device(number)
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")


def mixed_precision(device):
    """The context of a training step's forward pass: bfloat16 where the GPU computes with it."""
    usable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=MIXED_PRECISION and usable)


def new_optimizer(name, model):
    """AdamW, in which a pretrained encoder has a rate of its own."""
    # with a longer memory single gradients upset the Transformer's training for epochs
    rate, memory = (LR_TRANSFORMER, 0.98) if name == "transformer" else (LR_GRU, 0.999)
    pretrained = [*model.encoder.pretrained.parameters()] if name == "bert" else []
    fresh = [weight for weight in model.parameters() if weight not in {*pretrained}]
    groups = [{"params": fresh, "lr": rate, "initial_lr": rate}]
    groups += [{"params": pretrained, "lr": LR_BERT, "initial_lr": LR_BERT}] if pretrained else []
    return torch.optim.AdamW(groups, betas=(0.9, memory), fused=True)


def new_schedule(optimizer, steps, done):
    """The rates rise for a share WARMUP of the steps, then fall to 0. `done` steps are over."""
    warmup = round(WARMUP * steps)
    fall = transformers.get_polynomial_decay_schedule_with_warmup
    return fall(optimizer, warmup, steps, lr_end=0.0, power=2.0, last_epoch=done - 1)


def train_one_epoch(run, model, schedule, label):
    """One pass over the training clips -> their MSE in this epoch."""
    model.train()
    batches = run.batches()
    # by the epoch, so that a resumed run goes on as if it had not been stopped
    torch.manual_seed(SEED + EPOCH_SEED * (run.epochs_done + 1) + run.rank)
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    weights = [*zip(run.average.parameters(), run.model.parameters(), strict=True)]
    bar = tqdm(batches, label, leave=False, file=sys.stdout, disable=None)
    for step, numbers in enumerate(bar, run.epochs_done * len(batches)):
        batch = run.clips["train"].batch(numbers, run.device)
        with mixed_precision(run.device):
            loss, errors = training_loss(model, batch)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP or math.inf)
        run.optimizer.step()
        schedule.step()
        memory = min(AVERAGE, (1 + step) / (4 + step))  # at first of a third of the steps
        with torch.no_grad():
            for mean, weight in weights:
                mean.lerp_(weight, 1 - memory)
        sums += errors
    squares, count = mean_over_processes(sums).tolist()
    return squares / max(count, 1)


EPOCH_SEED = 1_000_003  # between the seeds of two epochs
HEADER = f"{'':<23} train mse   val mse      mae  duration      time"


def run_epoch(run, model, schedule):
    """Train and validate for one epoch, print a line about it, and add it to the log."""
    began, epoch = time.time(), run.epochs_done + 1
    label = f"{run.model.title} epoch {epoch}/{EPOCHS}"
    line = {"epoch": epoch, "train_mse": train_one_epoch(run, model, schedule, label)}
    line["learning_rate"] = schedule.get_last_lr()[0]
    line |= evaluate(run.average, run.clips["validation"], run.device, run.rank, run.world)
    line["seconds"] = time.time() - began
    if not math.isfinite(line["train_mse"] + line["val_mse"]):
        raise SystemExit(f"error: the loss of {label} is not finite: lower the learning rate")
    print(
        f"{label:<23}{line['train_mse']:>10.5f}{line['val_mse']:>10.5f}{line['val_mae']:>9.5f}"
        f"{line['duration_error']:>8.2f} s{line['seconds']:>8.1f} s",
        flush=True,
    )
    run.log.append(line)


def best_of(log):
    """The log's line of the lowest validation MSE."""
    return min(log, key=lambda line: line["val_mse"], default={"epoch": 0})


def train_epochs(run, keep):
    """Train until EPOCHS are done or PATIENCE is over, and call keep(run) after each epoch."""
    steps = len(run.batches())
    schedule = new_schedule(run.optimizer, EPOCHS * steps, done=run.epochs_done * steps)
    model = run.model
    if dist.is_initialized():
        model = DistributedDataParallel(model, broadcast_buffers=False)  # they are constant
    print(HEADER)
    while run.epochs_done < EPOCHS and run.epochs_done - best_of(run.log)["epoch"] < PATIENCE:
        run_epoch(run, model, schedule)
        keep(run)
    over = run.epochs_done >= EPOCHS
    print("stopped:", "all EPOCHS are done" if over else f"no lower val_mse for {PATIENCE} epochs")


def run_script(main):
    """main(), with one line instead of a traceback for what a user meets in ordinary use."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as a Ctrl-C
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    status, line = 1, None
    try:
        main()
        status = 0
    except KeyboardInterrupt as stop:
        again = "the same command starts again, with the clips that were prepared"
        status, line = 130, f"\nstopped: {str(stop) or again}"
    except RuntimeError as error:
        if not re.search("out of memory|ALLOC(ATION)?_FAILED", str(error)):  # torch's, cuBLAS's
            raise
        peak = torch.cuda.max_memory_allocated() // 2**20
        line = f"error: GPU full at {peak} MB; lower BATCH_SIZE = {BATCH_SIZE}"
    except (OSError, UnicodeError) as error:  # the disk is full, a terminal lacks a letter, ...
        line = f"error: {reason_of(error)}"
    except SystemExit as end:
        status, line = (1, end.code) if isinstance(end.code, str) else (end.code or 0, None)
    try:
        sys.stdout.flush()
        if line:
            print(line, file=sys.stderr, flush=True)
    except OSError:  # nobody reads it any more: keep Python from flushing it again
        sys.stdout = None
    # one of the preparation's threads may sleep in the hub's library, and not wake up
    if any(thread.name.startswith("preparing") for thread in threading.enumerate()):
        os._exit(status)
    sys.exit(status)


# ==== SHARED BLOCK: end


# ---- checkpoints
def settings(world):
    """The numbers among the constants, by which a resumed run goes on as it began."""
    constants = {name: value for name, value in globals().items() if name.isupper()}
    del constants["CORES"]  # of the machine
    numbers = {name: x for name, x in constants.items() if isinstance(x, (int, float))}
    return {"processes": world, **numbers}


def save_epoch(run, data, digest):
    """Write last_<model>.pt, and then what can be made of it again: see save_results."""
    if run.rank:
        return
    last = {
        "built": run.built,
        "settings": settings(run.world),
        "digest": digest,
        "log": run.log,
        "weights": run.model.state_dict(),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state_dict()["state"],
    }
    save(f"last_{run.name}.pt", last)
    save_results(run, data)


def save_results(run, data):
    """Write the log and, if the last epoch is the best one, best_<model>.pt."""
    line = run.log[-1]
    rows = [line.keys(), *(epoch.values() for epoch in run.log)]
    save(f"{run.name}.log", "".join(",".join(map(str, row)) + "\n" for row in rows).encode())
    if best_of(run.log) is line:
        best = {**run.built, "data": data, "date": time.strftime("%Y-%m-%d"), "metrics": line}
        save(f"best_{run.name}.pt", {**best, "weights": run.average.state_dict()})


def read_checkpoint(path):
    if not os.path.exists(path):
        raise SystemExit(
            f"error: {path} is not in this folder: put it back, or train anew with --model alone, "
            "which replaces the best_ and the last_ file"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of torch, which has many kinds
        reason = f"{type(error).__name__}: {reason_of(error)[:80]}"
        raise SystemExit(f"error: {path} is damaged or no checkpoint ({reason})") from None


def load_model(path):
    """A best_<model>.pt, without data and hub -> model, its tokenizer, most glosses, and facts."""
    contents = read_checkpoint(path)
    args, metrics = contents["model_args"], contents["metrics"]
    model = PoseModel(**args)
    model.load_state_dict(contents["weights"])
    facts = {"data": contents["data"], "model": args["name"], "best_epoch": metrics["epoch"]}
    hidden = ("epoch", "learning_rate", "seconds")
    facts |= {name: f"{x:.5f}" for name, x in metrics.items() if name not in hidden}
    facts["date"] = contents["date"]
    tokenizer = load_tokenizer(**contents["tokenizer"])
    return model.eval(), tokenizer, contents["max_gloss_len"], facts


def data_digest(clips):
    """Changes with any gloss, duration or pose of any split, and with their order."""
    parts = [(split, x.glosses, x.seconds.tolist(), x.crcs) for split, x in clips.items()]
    return short_hash(parts)


def differences(was, now):
    """Two nested dicts -> what differs of the names that both have, in words."""
    said = []
    for name in was.keys() & now.keys() - {"transformers_version", "_name_or_path"}:
        if type(was[name]) is type(now[name]) is dict:
            said += differences(was[name], now[name])
        elif was[name] != now[name]:
            values = f"was {was[name]!r}, is {now[name]!r}"
            said.append(f"{name} {values if len(values) < 80 else 'differs'}")
    return sorted(said)


def restore(run, last, data, digest):
    """Go on from a last_<model>.pt; SystemExit if it is of another model, other data or words."""
    path, best_path = f"last_{run.name}.pt", f"best_{run.name}.pt"
    if said := differences(last["built"], run.built):
        raise SystemExit(f"error: {path} does not fit: {'; '.join(said)}")
    if last["digest"] != digest:
        raise SystemExit(f"error: {path} does not fit: the data has changed")
    run.model.load_state_dict(last["weights"])
    run.average.load_state_dict(last["average"])
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": last["optimizer"]})
    run.log = last["log"]
    best = best_of(run.log)
    if best is run.log[-1]:  # the run may have been killed before it wrote this one
        if run.rank == 0:
            save_results(run, data)
    elif read_checkpoint(best_path)["metrics"]["val_mse"] != best["val_mse"]:
        raise SystemExit(f"error: {path} does not fit: {best_path} is of another run")


# ---- the training
def torchrun_process():
    """-> this process's rank and the number of processes. The first one alone prints."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if BATCH_SIZE % world:
        raise SystemExit(f"error: BATCH_SIZE = {BATCH_SIZE} cannot be shared by {world} processes")
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    return rank, world


def train(name, resume):
    """The full training of one model, its files and its report; as one of several with torchrun."""
    rank, world = torchrun_process()
    lock = claim_folder(name) if rank == 0 else None
    last = read_checkpoint(f"last_{name}.pt") if resume else None
    if resume and (said := differences(last["settings"], settings(world))):
        print(f"resumed with other settings, so not bit by bit: {'; '.join(said)}")
    device = pick_device()
    if name == "bert":
        load_pretrained()  # an error of it is told before the poses are prepared
    clips, data = load_clips(test=True)
    if world > 1:
        dist.init_process_group()  # not before: while one prepares, the others wait for the store
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"device             {hardware}", flush=True)
    run = Run(name, clips, *training_statistics(clips["train"]), device, rank, world)
    digest = data_digest(clips)
    if resume:
        restore(run, last, data, digest)
    del last  # it is as large as the run

    try:
        train_epochs(run, functools.partial(save_epoch, data=data, digest=digest))
        if world > 1:
            dist.destroy_process_group()
        if rank == 0:
            report(run, data)
            lock.close()
    except KeyboardInterrupt:
        again = "the same command with --resume goes on" if run.log else ""
        raise KeyboardInterrupt(again) from None


def report(run, data):
    """Print the closing metrics of best_<model>.pt, and write the preview."""
    path = f"best_{run.name}.pt"
    model, tokenizer, max_gloss_len, facts = load_model(path)  # what is reported is what it holds
    model.to(run.device)

    def metrics_of(clips):
        answers = generate(model, tokenizer, clips.glosses, max_gloss_len)
        aligned = [aligned_error(one.pose, pose_of(clips, i)) for i, one in enumerate(answers)]
        metrics = evaluate(model, clips, run.device)
        answers = generate(model, tokenizer, clips.glosses, max_gloss_len, clips.n_frames)
        metrics |= hand_metrics(answers, clips)
        return metrics | {"val_dtw_mje": np.mean(aligned)}, aligned

    clips = run.clips["validation"]
    metrics, aligned = metrics_of(clips)
    if "test" in run.clips:
        of_test, _ = metrics_of(run.clips["test"])
        for name in ("val_mse", "val_mae", "motion", "val_dtw_mje"):
            metrics[f"test_{name.removeprefix('val_')}"] = of_test[name]
    closing = {
        "data": data,
        "model": run.name,
        "parameters": sum(value.numel() for value in model.parameters()),
        "best_epoch": facts["best_epoch"],
        **{name: f"{value:.5f}" for name, value in metrics.items()},
        "training_seconds": round(sum(line["seconds"] for line in run.log)),
        "checkpoint": path,
    }
    if run.device.type == "cuda":
        closing["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() // 2**20
    if len(model.mean) == 2 * len(POINTS):  # of other points nobody knows the figure
        closing["preview"] = f"preview_{run.name}.html"
        items = preview_items(model, tokenizer, max_gloss_len, clips, aligned)
        text = page("validation clips", {**facts, **closing}, items, model.fps, run.log)
        save(closing["preview"], text)
    print("", *(f"{name}: {value}" for name, value in closing.items()), sep="\n")
    if metrics["val_mse"] > 0.95 * metrics["mean_pose_mse"]:
        print("warning: the model does not clearly beat the mean pose, so it has learned nothing")


HANDS = [*range(2 * len(HAND)), *WRISTS]
MOTION_SECONDS = 0.08  # width of the Gaussian that removes trembling before motion is measured
TREMBLE_HZ = 8  # from here on movement is a detector's noise, or trembling
SHORTEST_RUN = 0.8  # seconds of frames that show a point; shorter ones tell little


def pose_of(clips, i):
    """-> (T, K, 2)"""
    return clips.pose(i).unflatten(-1, (-1, 2)).numpy()


def aligned_error(generated, real):
    """DTW-MJE of generated (N, K, 2) and real (M, K, 2), in shoulder widths.

    A pair of frames costs the mean distance of the points seen. Of all alignments in time the one
    with the lowest sum counts, divided by its pairs. Frames that show nothing are left out.
    """
    seen = np.isfinite(real).all(-1)
    real, seen = real[seen.any(1)], seen[seen.any(1)]
    before = [(math.inf, 0)] * (len(real) + 1)  # of each cell the lowest sum, and its pairs
    before[0] = (0.0, 0)
    for frame in generated:  # one by one: for long clips a table of all pairs takes gigabytes
        distance = np.where(seen, np.linalg.norm(frame - real, axis=-1), 0)  # (M, K)
        current = [(math.inf, 0)]
        for j, cost in enumerate((distance.sum(-1) / seen.sum(-1)).tolist(), 1):
            total, pairs = min(before[j - 1], before[j], current[j - 1])
            current.append((total + cost, pairs + 1))
        before = current
    total, pairs = before[-1]
    return total / pairs


def hand_metrics(answers, clips):
    """A Generated as long as each clip -> how hands and wrists move, generated over real.

    motion: the path after a Gaussian of MOTION_SECONDS. tremble: the amplitude from TREMBLE_HZ on.
    reach: the 99th percentile of the distance between a hand's wrist and its arm's, where both are
    shown. NaN where there is nothing to measure; of other points than POINTS all count.
    """
    sums, gaps = np.zeros((2, 2)), ([], [])  # generated, real
    for i, one in enumerate(answers):
        made, real = (one.pose, one.confidence > 0.5), pose_of(clips, i)
        seen = np.isfinite(real).all(-1)
        known = seen.shape[1] == len(POINTS)
        hands = HANDS if known else slice(None)
        rate = len(real) / clips.seconds[i].item()
        for which, (pose, shown) in enumerate((made, (real, seen))):
            sums[which] += movement(pose[:, hands], seen[:, hands], rate)
            if known:
                distance = np.linalg.norm(pose[:, HAND_WRISTS] - pose[:, ARM_WRISTS], axis=-1)
                gaps[which].extend(distance[shown[:, HAND_WRISTS] & shown[:, ARM_WRISTS]])
    reach = [np.percentile(some, 99) if some else 0 for some in gaps]
    ratio = {"motion": sums[:, 0], "tremble": sums[:, 1] ** 0.5, "reach": reach}
    return {name: made / real if real else math.nan for name, (made, real) in ratio.items()}


def movement(points, seen, rate):
    """Points (T, K, 2), where they are seen (T, K), frames per second -> path and trembling."""
    width = MOTION_SECONDS * rate  # frames
    margin = math.ceil(3 * width)
    kernel = np.exp(-((np.arange(-margin, margin + 1) / width) ** 2) / 2)
    path = energy = 0.0
    for track, shown in zip(points.swapaxes(0, 1), seen.T, strict=True):
        edges = np.flatnonzero(np.diff(shown, prepend=False, append=False))
        for start, end in edges.reshape(-1, 2):
            if end - start < max(8, SHORTEST_RUN * rate):
                continue
            run = track[start:end] @ [1, 1j]  # x + iy
            smooth = np.convolve(np.pad(run, margin, "edge"), kernel / kernel.sum(), "valid")
            path += np.abs(np.diff(smooth)).sum()
            spectrum = np.fft.fft((run - run.mean()) * np.hanning(len(run)))
            fast = np.abs(np.fft.fftfreq(len(run), 1 / rate)) >= TREMBLE_HZ
            energy += (np.abs(spectrum[fast]) ** 2).sum()
    return path, energy


def preview_items(model, tokenizer, max_gloss_len, clips, aligned):
    """PREVIEW_CLIPS from the lowest to the highest error -> items of the page."""
    errors = []  # of each clip, and the mean pose's
    answers = generate(model, tokenizer, clips.glosses, max_gloss_len, clips.n_frames)
    for i, one in enumerate(answers):
        real, mean = pose_of(clips, i), model.mean.view(-1, 2).cpu().numpy()
        errors.append([np.nanmean(np.square(some - real)) for some in (one.pose, mean)])
    order = sorted(range(len(errors)), key=errors.__getitem__)
    ranks = sorted({*np.linspace(0, len(order) - 1, PREVIEW_CLIPS).round().astype(int).tolist()})
    glosses = [clips.glosses[order[rank]] for rank in ranks]
    answers = generate(model, tokenizer, glosses, max_gloss_len)
    items = []
    for rank, generated in zip(ranks, answers, strict=True):
        i = order[rank]
        error, mean_error = errors[i]
        label = f"rank {rank + 1} of {len(order)} by MSE"
        about = f"{label}: {error:.5f}, {100 * error / mean_error:.1f} % of the mean pose's. DTW "
        about += f"error {aligned[i]:.5f}. {generated.seconds:.2f} s, real {clips.seconds[i]:.2f} s"
        real = page_clip("real", pose_of(clips, i), clips.seconds[i])
        items.append(page_item(label, about, generated, model.fps, [real]))
    return items


# ---- poses that one can watch
HAND_LINES = "0-1-2-3-4 0-5-6-7-8 0-9-10-11-12 0-13-14-15-16 0-17-18-19-20 5-9-13-17"
BODY_LINES = "3-1-0-2-4 5-6 5-7-9 6-8-10"
FACE_LINES = "0-3-1-2-0 4-5-6 7-8-9 12-10-11-15-14-13-12 18-16-17-21-20-19-18"  # mouth, brows, eyes
LINES = {}  # of each part, by the numbers of its points
for part, text in zip(PARTS, (HAND_LINES, HAND_LINES, BODY_LINES, FACE_LINES), strict=True):
    LINES[part] = [[int(i) for i in line.split("-")] for line in text.split()]
COLOURS = [(43, 140, 222), (224, 112, 26), (138, 138, 138), (31, 158, 119)]  # of the parts
CANVAS = 1000  # pixels: width and height of a .pose file
UNIT = 200  # pixels of a shoulder width
ORIGIN = (500, 330)  # pixels: where the middle of the shoulders is
PREVIEW_CLIPS = 12


class Generated(NamedTuple):
    """A sentence as a model signs it."""

    words: list
    cut: int  # number of words beyond the model's limit
    unknown: set  # numbers of the words that it does not know
    signs: list  # (number of the word, seconds), in signing order
    seconds: float
    pose: np.ndarray  # (T, K, 2) in shoulder widths
    confidence: np.ndarray  # (T, K), 0 to 1: how likely each point is to be seen

    def lasting(self, i):
        """Seconds of a word's signs."""
        return sum(seconds for number, seconds in self.signs if number == i)


def word_numbers(words, encoding):
    """For each token of an encoding the number of its word, or None where it belongs to none."""
    ends = [*itertools.accumulate(len(word) + 1 for word in words[:-1]), math.inf]
    return [bisect.bisect_left(ends, end) if end else None for _, end in encoding.offsets]


def planned_signs(numbers, keys, durations):
    """The words, keys and durations of S tokens -> [(number of the word, seconds)]."""
    signs = []  # neighbouring tokens of one word are one; what is of no word joins its neighbour
    for token in sorted(range(len(keys)), key=keys.__getitem__):
        number, seconds = numbers[token], durations[token]
        if signs and (number is None or signs[-1][0] in (None, number)):
            before, its_seconds = signs.pop()
            number = before if number is None else number
            seconds += its_seconds
        signs.append((number, seconds))
    return [sign for sign in signs if sign[0] is not None]  # none where no token is of a word


@torch.no_grad()
def generate(model, tokenizer, sentences, max_gloss_len, n_frames=None):
    """Sentences -> a Generated of n_frames or, for None, of the predicted length for each."""
    device = model.mean.device
    for first in range(0, len(sentences), 64):
        some = sentences[first : first + 64]
        lengths = None if n_frames is None else n_frames[first : first + 64].to(device)
        text = tokenize(tokenizer, some, max_gloss_len)
        token_mask = text["attention_mask"].bool().to(device)
        output = model(text["input_ids"].to(device), token_mask, lengths)
        confidence = output.confidence.sigmoid().cpu().numpy()
        pose = output.pose.unflatten(-1, (-1, 2)).cpu().numpy()
        lengths = model.count_frames(output.seconds) if lengths is None else lengths
        for i, (sentence, n) in enumerate(zip(some, lengths.tolist(), strict=True)):
            words = words_for(tokenizer, sentence, max_gloss_len)
            known = known_pieces(tokenizer, words)
            size = sum(text[i].attention_mask)  # padding comes after it
            keys, durations = (x[i, :size].tolist() for x in (output.keys, output.durations))
            yield Generated(
                words=words,
                cut=len(split_words(sentence)) - len(words),
                unknown={i for i, word in enumerate(words) if word not in known},
                signs=planned_signs(word_numbers(words, text[i])[:size], keys, durations),
                seconds=output.seconds[i].item(),
                pose=pose[i, :n],
                confidence=confidence[i, :n],
            )


def pose_file(generated, fps):
    """A Generated -> the bytes of a .pose file (pose-format 0.2), in pixels."""
    parts = []
    for (part, names), colour in zip(PARTS.items(), COLOURS, strict=True):
        limbs = [pair for line in LINES[part] for pair in itertools.pairwise(line)]
        parts.append(PoseHeaderComponent(part, names, limbs, [colour] * len(limbs), "XYC"))
    header = PoseHeader(0.2, PoseHeaderDimensions(CANVAS, CANVAS, 0), parts)
    n = max(1, round(generated.seconds * fps))
    pose = resample(generated.pose, n) * UNIT + np.array(ORIGIN, np.float32)
    confidence = resample(generated.confidence[..., None], n)[..., 0]
    confidence[confidence < 0.5] = 0  # viewers draw every other point, also a made-up one
    body = NumPyPoseBody(fps, pose[:, None], confidence[:, None])  # one person
    file = io.BytesIO()
    pose_format.Pose(header, body).write(file)
    return file.getvalue()


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>__TITLE__</title>
<style>
  :root { color-scheme: light dark }
  body { font: 1rem/1.5 system-ui, sans-serif; max-width: 64rem; margin: auto; padding: 0 .8rem }
  h1 { font-size: 1.3rem; overflow-wrap: anywhere }
  button, select, #file { font: inherit; min-width: 44px; min-height: 44px; line-height: 1.2 }
  .row { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .5rem 0 }
  #words button { overflow-wrap: anywhere }
  #words small { display: block }
  #strip { position: relative; height: 1.6rem; background: #8882 }
  #strip span { position: absolute; height: 100%; overflow: hidden; border-left: 2px solid #888 }
  [aria-current=true] { background: #c80; color: #000 }
  figure { flex: 1; min-width: 0; margin: 0 }
  canvas { width: 100%; max-height: 62vh; border: 1px solid #8885 }
  #slider { width: 100%; height: 44px; margin: 0 }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem }
  dd { margin: 0; overflow-wrap: anywhere }
  svg { max-width: 30rem; border: 1px solid #8885; fill: none; stroke-width: 3 }
</style>
<h1>__TITLE__</h1>
<div class="row"><select id="choice" aria-label="Sentence" style="max-width: 100%"></select></div>
<div id="words" class="row"></div>
<div id="stages" class="row" style="flex-wrap: nowrap"></div>
<div id="strip" aria-hidden="true"></div>
<input id="slider" type="range" min="0" aria-label="Frame">
<div class="row">
  <button id="play">Play</button>
  <label>Speed
    <select id="speed"><option>0.25<option>0.5<option selected>1<option>2</select></label>
  <label>View <select id="view">
    <option>side by side<option>overlay<option>left hand<option>right hand</select></label>
  <a id="file" download>The .pose file</a>
</div>
<p id="about"></p>
<p>Left hand blue, right hand orange, a shade for each finger; points that were not seen are not
drawn. The overlay has the real clip in grey. A click on a word goes to its sign; the order of the
signs is below the figures. The arrow keys step while the slider has the focus.</p>
__CURVE__
<dl>__FACTS__</dl>
<script>
// Points are in 1/1000 of a shoulder width from the middle of the shoulders, null where one was not
// seen. A part's lines are the numbers of its points; the first two parts are the hands.
const { fps, parts, head, items } = __DATA__
const size = { width: 4000, height: 3500 }, middle = [0, 250]  // of what a stage shows
let item, stages, time = 0, before = 0
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches
const make = (tag, text, properties) =>
  Object.assign(document.createElement(tag), { textContent: text, ...properties })

function drawClip(pen, clip, grey) {
  const { width, height } = pen.canvas
  const at = Math.min(Math.floor(time / clip.seconds * clip.frames.length + 1e-6),
    clip.frames.length - 1)
  const points = clip.frames[at], [left, right, nose] = head.map(i => points[i])
  const knuckle = parts[view.selectedIndex - 2]?.lines[2][1]  // of a hand's middle finger
  const seen = knuckle && clip.frames.slice(0, at + 1).findLast(points => points[knuckle])
  const [x, y] = seen?.[knuckle] || middle, times = knuckle ? 4 : 1
  const scale = Math.min(width / size.width, height / size.height) * times
  pen.setTransform(scale, 0, 0, scale, width / 2 - scale * x, height / 2 - scale * y)
  pen.globalAlpha = time > clip.seconds ? 0.3 : 1
  const face = left && right ? left.map((x, i) => (x + right[i]) / 2) : nose
  pen.strokeStyle = grey || "#7d6bb0"
  pen.lineWidth = 20
  pen.beginPath()
  if (face) pen.ellipse(...face, 210, 290, 0, 0, 7)
  pen.stroke()
  for (const { style: [hue, saturation, thick], lines } of parts) lines.forEach((line, finger) => {
    pen.strokeStyle = grey || `hsl(${hue + 9 * finger} ${saturation}% ${38 + 5 * finger}%)`
    pen.lineWidth = thick / times ** .5
    pen.beginPath()
    line.forEach((i, place) => {
      if (points[i]) points[line[place - 1]] ? pen.lineTo(...points[i]) : pen.moveTo(...points[i])
    })
    pen.stroke()
  })
  return `${clip.name}: ${time > clip.seconds ? "ended at" : `${time.toFixed(2)} of`} ` +
    `${clip.seconds.toFixed(2)} s, frame ${at + 1} of ${clip.frames.length}`
}

function draw(now) {
  if (playing) time = (time + Math.min(now - before, 100) / 1000 * speed.value) % item.seconds
  before = now
  for (const { canvas, caption, clips } of stages) {
    const pen = canvas.getContext("2d")
    canvas.width = canvas.clientWidth * devicePixelRatio
    canvas.height = canvas.clientHeight * devicePixelRatio
    pen.lineCap = pen.lineJoin = "round"
    const said = clips.map((clip, i) => drawClip(pen, clip, i < clips.length - 1 && "#888"))
    caption.textContent = said.join("; ")
  }
  slider.value = Math.floor(time * fps + 1e-6)
  play.textContent = playing ? "Pause" : "Play"
  const current = item.signs.findIndex(({ from, to }) => from <= time && time < to)
  item.signs.forEach((_, i) => strip.children[i].ariaCurrent = i == current)
  item.words.forEach((_, i) => words.children[i].ariaCurrent = i == item.signs[current]?.word)
  requestAnimationFrame(draw)
}

function makeStages() {
  const overlaid = view.value == "overlay"
  stages = (overlaid ? [item.clips] : item.clips.map(clip => [clip])).map(clips => {
    const figure = make("figure"), canvas = make("canvas"), caption = make("figcaption")
    canvas.style.aspectRatio = size.width / size.height
    figure.append(canvas, caption)
    return { figure, canvas, caption, clips }
  })
  document.getElementById("stages").replaceChildren(...stages.map(({ figure }) => figure))
}

function show(i) {
  item = items[i]
  item.seconds = Math.max(...item.clips.map(clip => clip.seconds))
  time = 0
  slider.max = Math.max(1, Math.round(item.seconds * fps)) - 1
  choice.selectedIndex = i
  about.textContent = item.about
  file.hidden = !item.file
  file.href = item.file
  words.replaceChildren(...item.words.map(({ text, note }, i) => {
    const sign = item.signs.find(sign => sign.word == i)
    const button = make("button", text, { disabled: !sign, onclick: () => time = sign.from })
    button.append(make("small", note))
    return button
  }))
  if (item.cut) words.append(make("span", `and ${item.cut} more, cut off`))
  strip.replaceChildren(...item.signs.map(({ word, from, to }) => {
    const span = make("span", item.words[word].text)
    span.style.left = `${100 * from / item.seconds}%`
    span.style.width = `${100 * (to - from) / item.seconds}%`
    return span
  }))
  makeStages()
}

play.onclick = () => playing = !playing
view.onchange = makeStages
slider.oninput = () => {
  playing = false
  time = slider.value / fps
}
choice.onchange = () => show(choice.selectedIndex)
items.forEach(({ label }, i) => choice.add(new Option(`${i + 1}. ${label}`.slice(0, 70))))
show(0)
requestAnimationFrame(draw)
</script>
</html>"""


def page(what, facts, items, fps, log=()):
    """-> the bytes of a page that plays items, see page_item; facts of the model, {name: value}."""
    name = os.path.basename(os.path.normpath(facts["data"]))
    title = f"{MODELS[facts['model']][0]} ({name}), epoch {facts['best_epoch']}, {facts['date']}"
    rows = [f"<dt>{html.escape(name)}<dd>{html.escape(f'{x}')}" for name, x in facts.items()]
    # of a part: hue, saturation and thickness of its lines
    styles = [(205, 80, 26), (0, 80, 26), (250, 30, 70), (150, 80, 16)]
    parts = []
    for style, (part, lines) in zip(styles, LINES.items(), strict=True):
        first = POINTS.index((part, PARTS[part][0]))
        lines = [[first + i for i in line] for line in lines]
        if part == "POSE_LANDMARKS":
            lines = lines[1:]  # the head is drawn as an ellipse
        parts.append({"style": style, "lines": lines})
    head = [POINTS.index(("POSE_LANDMARKS", name)) for name in ("LEFT_EAR", "RIGHT_EAR", "NOSE")]
    data = {"fps": fps, "parts": parts, "head": head, "items": items}
    parts = {
        "TITLE": html.escape(f"{title}: {what}"),
        "CURVE": curve(log) if log else "",
        "FACTS": "".join(rows),
        "DATA": json.dumps(data).replace("<", "\\u003c"),
    }
    # in one pass, so that a gloss of __FACTS__ stays one
    text = re.sub("__([A-Z]+)__", lambda found: parts[found[1]], PAGE)
    return text.encode("ascii", "xmlcharrefreplace")


def page_clip(name, pose, seconds):
    """A pose (T, K, 2) in shoulder widths, NaN = not seen -> a clip of an item."""
    frames = []
    for points in (pose * 1000).round().tolist():
        frames.append([[int(x), int(y)] if math.isfinite(x + y) else None for x, y in points])
    return {"name": name, "seconds": float(seconds), "frames": frames}


def notes_of(generated, fps):
    """What a user should know of a Generated. A word that lasts less than a frame is not signed."""
    words = generated.words
    signed = [i for i, _ in generated.signs if generated.lasting(i) * fps >= 1]
    said = {
        "unknown": sorted(generated.unknown),
        "not signed": [i for i in range(len(words)) if i not in signed],
        "order": signed if signed != sorted(signed) else [],
    }
    notes = [f"{generated.seconds:.2f} s"]
    if len(generated.pose) < round(generated.seconds * fps):
        rate = len(generated.pose) / generated.seconds
        notes.append(f"{rate:.1f} of {fps} frames a second generated")
    if generated.cut:
        notes.append(f"cut to {len(words)} glosses")
    notes += [f"{what}: {' '.join(words[i] for i in some)}" for what, some in said.items() if some]
    return "   ".join(notes)


def page_item(label, about, generated, fps, clips=(), file=""):
    """A Generated, after other clips -> an item, which shows the points that are likely seen."""
    words = []
    for i, word in enumerate(generated.words):
        lasting = generated.lasting(i)
        note = f"{lasting:.2f} s" if lasting * fps >= 1 else "not signed"
        words.append({"text": word, "note": f"{note}, unknown" if i in generated.unknown else note})
    signs, start = [], 0.0
    for number, seconds in generated.signs:
        if generated.lasting(number) * fps >= 1:
            signs.append({"word": number, "from": start, "to": start + seconds})
        start += seconds
    shown = np.where(generated.confidence[..., None] >= 0.5, generated.pose, np.nan)
    return {
        "label": f"{label}: {' '.join(generated.words)}",
        "about": about,
        "words": words,
        "cut": generated.cut,
        "signs": signs,
        "clips": [*clips, page_clip("generated", shown, generated.seconds)],
        "file": file,
    }


def curve(log):
    """The errors of a run by epoch, over the mean pose's -> a small chart, as HTML."""
    lines, colours = "", {"train_mse": "#2b8cde", "val_mse": "#e0701a"}
    for name, colour in colours.items():
        points = "0,0"  # before the first epoch: the mean pose
        for line in log:
            share = min(line[name] / line["mean_pose_mse"], 1)
            points += f" {400 * line['epoch'] / len(log):.1f},{140 * (1 - share):.1f}"
        lines += f'<polyline points="{points}" stroke="{colour}"/>'
    caption = " and ".join(f'<b style="color:{x}">{name}</b>' for name, x in colours.items())
    caption += f" by epoch, 1 to {len(log)}, from the mean pose's error (top) to 0 (bottom). "
    caption += f"Best epoch: {best_of(log)['epoch']}."
    return f'<svg viewBox="0 0 400 140" role="img">{lines}</svg><p>{caption}</p>'


def predict(path, sentences):
    """Sentences (["-"]: stdin's lines) -> a .pose file each and index.html, in a folder."""
    model, tokenizer, max_gloss_len, facts = load_model(path)
    if len(model.mean) != 2 * len(POINTS):
        raise SystemExit(f"error: {path} is no model of a .pose file's {len(POINTS)} keypoints")
    print(f"{path}: trained on {facts['data']}, {facts['date']}, epoch {facts['best_epoch']}")
    if sentences == ["-"]:
        sentences = [line for line in sys.stdin.read().splitlines() if line.strip()]
    for sentence in sentences:
        sentence.encode()  # run_script makes one line of the error for what is no UTF-8
        if not split_words(sentence):
            print(f"skipped, since it has no word: {sentence!r}")
    sentences = [sentence for sentence in sentences if split_words(sentence)]
    if not sentences:
        raise SystemExit("error: --predict needs a sentence with a word")
    answers = generate(model.to(pick_device()), tokenizer, sentences, max_gloss_len)
    folder, items = new_folder(), []
    for i, (sentence, generated) in enumerate(zip(sentences, answers, strict=True), 1):
        file = f"{i:03}_{file_name(' '.join(split_glosses(sentence)))}.pose"
        notes = notes_of(generated, model.fps)
        save(f"{folder}/{file}", pose_file(generated, model.fps))
        items.append(page_item("new", notes, generated, model.fps, file=file))
        print(f"{folder}/{file}   {notes}")
    save(f"{folder}/index.html", page("new sentences", facts, items, model.fps))
    print(f"{folder}/index.html plays them")


def file_name(text):
    """-> its letters, marks and digits of any script, in at most 120 bytes; "_" for the rest."""
    kept = [x if unicodedata.category(x)[0] in "LMN" else " " for x in text]
    return "_".join("".join(kept).split()).encode()[:120].decode(errors="ignore")


def new_folder():
    """predictions/, or predictions-2/ and so on: the first that does not exist -> its name."""
    for i in itertools.count(1):
        folder = "predictions" if i == 1 else f"predictions-{i}"
        try:
            os.mkdir(folder)
        except FileExistsError:
            continue
        if i > 1:
            print(f"predictions/ holds the files of another call: these go to {folder}/")
        return folder


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, required=True)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with the run of last_<model>.pt")
    add("--predict", nargs="+", metavar="GLOSSES", help="let best_<model>.pt sign; -: from stdin")
    asked = parser.parse_args(argv)
    if asked.predict:
        predict(f"best_{asked.model}.pt", asked.predict)
    else:
        check_settings()
        train(asked.model, asked.resume)


if __name__ == "__main__":
    run_script(main)
