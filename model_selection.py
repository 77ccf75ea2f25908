"""Which model suits the data? Short runs of the candidates on a small subset, for gloss -> pose on iSign.

    python model_selection.py

Reads the data set named below, or an embedded sample where iSign's hub id has no access token. Writes
selection_<model>.pt for every candidate into this folder, and the prepared clips into the cache of `datasets`.
"""
import contextlib
import copy
import functools
import glob
import hashlib
import io
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import get_token
from huggingface_hub.errors import HTTPError
from pose_format.numpy import NumPyPoseBody
from pose_format.pose_header import PoseHeader
from pose_format.utils.reader import BufferReader
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

# ---- SETTINGS: edit and run again
# Data
DATASET = "Exploration-Lab/iSign"    # hub id, a local folder of the same layout, or "sample"
CONFIG = "iSign_v1.1"                # the data set's configuration; None: its default
POSES = "iSign-poses_v1.1_part_*"    # archive parts within DATASET; or a path: parts, a zip, a folder of .pose files
VALIDATION_SHARE = 0.1               # share of the videos that validate, where the data has no such split
TRAIN_CLIPS, VALIDATION_CLIPS = 480, 120  # the subset, drawn by whole videos; 0: all
FPS = 25                             # frames per second that clips are brought to
MAX_FRAMES = 96                      # a longer clip is resampled to so many, not cut
POSE_DIM = 152                       # 76 keypoints x (x, y)
MAX_GLOSS_LEN = 16                   # glosses of a sentence; what is beyond is cut
MIN_GLOSS_COUNT = 2                  # rarer glosses of the training split become <unk>, so that <unk> is trained
PROCESSES = 2                        # that read and prepare clips
MAX_BAD_SHARE = 0.2                  # a larger share of clips that cannot be used ends the run
# Models
CANDIDATES = ["gru", "transformer"]  # "bert" is allowed, too
BERT_NAME = "bert-base-uncased"      # hub id, or a folder with a model and its tokenizer
EMBED_DIM = 256
HIDDEN_DIM = 512
DROPOUT = 0.1
# Training
EPOCHS = 6
PATIENCE = 2                         # epochs without a lower validation MSE before a run stops
BATCH_SIZE = 8
LR_GRU, LR_TRANSFORMER, LR_BERT = 1e-3, 5e-4, 2e-5  # BERT's decoder learns at the GRU's rate
WARMUP = 0.05                        # share of the steps in which the rates rise; after that they fall to 0
GRAD_CLIP = 1.0                      # largest norm of the gradient
DURATION_WEIGHT = 0.1                # of the error of the duration beside the MSE
AVERAGE = 0.999                      # of the moving average of the weights that is evaluated and saved; 0: the weights
SEED = 0

# ==== SHARED BLOCK: begin (the same bytes in both scripts, which a test compares)
# Shapes: B clips, S glosses or word pieces, T frames, D = 2 K pose numbers of K keypoints, H hidden size.
# Masks: True = real. A pose number that is NaN was not seen or is padding, and enters no loss, metric or statistic.

ISIGN = "Exploration-Lab/iSign"
HAND = ["WRIST", *(f"THUMB_{joint}" for joint in ("CMC", "MCP", "IP", "TIP")),
        *(f"{finger}_{joint}" for finger in ("INDEX_FINGER", "MIDDLE_FINGER", "RING_FINGER", "PINKY")
          for joint in ("MCP", "PIP", "DIP", "TIP"))]
BODY = ["NOSE", *(f"{side}_{part}" for part in ("EYE", "EAR", "SHOULDER", "ELBOW", "WRIST")
                  for side in ("LEFT", "RIGHT"))]
FACE = "61 291 17 0 70 105 107 300 334 336 161 158 33 163 153 133 388 385 263 390 380 362 9".split()
# The 76 keypoints of PoseStitch-SLT (EMNLP 2025), by the names they have in MediaPipe Holistic's .pose files
POINTS = [(f"{part}_LANDMARKS", name) for part, names in [("LEFT_HAND", HAND), ("RIGHT_HAND", HAND), ("POSE", BODY),
                                                          ("FACE", FACE)] for name in names]
SHOULDERS, HANDS_AND_WRISTS = [47, 48], [*range(42), 51, 52]
FAR = 10                # shoulder widths: a point farther out is an error of the detector
MAX_POSE_BYTES = 2**28  # of an unpacked .pose file; Holistic fills them in 25 minutes
CHUNK = 256             # clips in a file of the cache: what an interruption can cost
CLIP = datasets.Features({"gloss": datasets.Value("string"), "problem": datasets.Value("string"),
                          "seconds": datasets.Value("float32"), "pose": datasets.List(datasets.Value("float32"))})
PAD, UNK = 0, 1


class BadClip(Exception):
    """A clip that is left out; the message is the reason that it is counted under."""


def read_settings(script):
    """A script's globals() -> its settings, by their upper-case names; SystemExit for one that makes no sense."""
    settings = {name: value for name, value in script.items() if name.isupper()}
    whole = dict(MAX_FRAMES=1, POSE_DIM=2, MAX_GLOSS_LEN=1, MIN_GLOSS_COUNT=1, PROCESSES=1, EMBED_DIM=4, HIDDEN_DIM=2,
                 EPOCHS=1, PATIENCE=1, BATCH_SIZE=1, TRAIN_CLIPS=0, VALIDATION_CLIPS=0, SEED=0, LOADER_WORKERS=0)
    share = dict(VALIDATION_SHARE=(0.001, 0.9), MAX_BAD_SHARE=(0, 1), DROPOUT=(0, 0.9), WARMUP=(0, 0.9),
                 AVERAGE=(0, 0.99999), LR_GRU=(0, 1), LR_TRANSFORMER=(0, 1), LR_BERT=(0, 1), FPS=(1, 1000),
                 GRAD_CLIP=(0.0001, math.inf), DURATION_WEIGHT=(0, math.inf))
    for name in settings.keys() & (whole.keys() | share.keys()):
        value, step = settings[name], {"POSE_DIM": 2, "HIDDEN_DIM": 2, "EMBED_DIM": 4}.get(name, 1)
        kinds, low, high = ([int], whole[name], math.inf) if name in whole else ([int, float], *share[name])
        if type(value) not in kinds or not low <= value <= high or step > 1 and value % step:
            raise SystemExit(f"error: {name} = {value!r} makes no sense; it is a {'whole ' * (len(kinds) == 1)}number "
                             f"from {low} to {high}" + f", a multiple of {step}" * (step > 1))
    return SimpleNamespace(**settings)


def split_glosses(text):
    """A gloss sentence or English text -> its glosses: upper case, without the punctuation of sentences."""
    words = unicodedata.normalize("NFC", str(text or "")).upper().split()
    words = [word.strip(".,;:!?\"'“”„‘’«»()[]{}<>…।॥-–—*/\\|") for word in words]
    return [word for word in words if word]


def video_of(uid):
    """The video that a clip was cut from, by the three forms of iSign's uids; any other uid is a video by itself."""
    match = re.fullmatch(r"([0-9a-f]{12})-\d+|(.{11})--\d+|(.{11})_(?:w|d|e\d+)", uid)
    return next(filter(None, match.groups())) if match else uid


def hash_share(text):
    """Any text -> a number in [0, 1), spread evenly and the same in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


# ---- from rows to prepared clips

class JoinedParts(fsspec.spec.AbstractBufferedFile):
    """An archive that was cut into parts by size, as one seekable file that is read by ranges."""

    def __init__(self, fs, paths):
        self.parts, size = [], 0  # (file, its begin and its end in the archive)
        for path in paths:
            begin, size = size, size + fs.size(path)
            self.parts.append((fs.open(path, "rb", cache_type="none"), begin, size))
        self.last = (0, b"")  # the range that was read last: reads within it cost no request
        super().__init__(fs, paths[0], block_size=1, cache_type="none", size=size)

    def _fetch_range(self, start, end):
        first, data = self.last
        if not first <= start <= end <= first + len(data):
            first, pieces = start, []
            for file, begin, stop in self.parts:
                if start < stop and begin < end:
                    file.seek(max(start, begin) - begin)
                    pieces.append(file.read(min(end, stop) - max(start, begin)))
            data = b"".join(pieces)
            self.last = (start, data)
        return data[start - first:end - first]


@functools.cache  # once per process: the directory of iSign's archive has 127,237 entries
def open_poses(url, token):
    """Where the poses are (parts of a zip, a zip, or a folder; local or hf://) -> a function: uid -> .pose bytes."""
    fs, pattern = fsspec.core.url_to_fs(url, **({"token": token} if url.startswith("hf://") else {}))
    paths = sorted(fs.glob(f"{pattern}/*.pose" if fs.isdir(pattern) else pattern))
    if not paths:
        raise SystemExit(f"error: no poses at {url}; set POSES to the parts of a zip, a zip, or a folder of .pose")
    if fs.isdir(pattern):
        files = {Path(path).stem: path for path in paths}
    else:
        parts = JoinedParts(fs, paths)
        try:
            archive = zipfile.ZipFile(parts)
            if min(info.header_offset for info in archive.infolist()) < 0:
                raise zipfile.BadZipFile("it begins before the first part")
        except (zipfile.BadZipFile, ValueError) as error:
            raise SystemExit(f"error: {', '.join(paths)} do not make up one zip ({error}); is a part missing?")
        files = {Path(info.filename).stem: info for info in archive.infolist() if info.filename.endswith(".pose")}

    def read(uid):
        if uid not in files:
            raise BadClip("no .pose file")
        if isinstance(files[uid], str):
            return fs.cat_file(files[uid])
        info = files[uid]
        if info.file_size > MAX_POSE_BYTES:
            raise BadClip("too large")
        parts.seek(info.header_offset)  # all that zipfile is going to read of it, by one request
        parts.read(30 + len(info.orig_filename.encode()) + 64 + info.compress_size)
        try:
            return archive.read(info)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError):
            raise BadClip("damaged in the archive")
    return read


def read_keypoints(data):
    """The bytes of a .pose file -> keypoints (frames, K, 2), NaN = not seen, and its frames per second.

    The origin is the median midpoint of the shoulders, the unit their median distance: one pair for the whole clip.
    """
    try:
        reader = BufferReader(data)
        header = PoseHeader.read(reader)
        frames = int.from_bytes(data[reader.read_offset + 2:reader.read_offset + 4], "little")  # v0.1's, modulo 2 ** 16
        body = NumPyPoseBody.read(header, reader)
        points, confidence, fps = body.data.data[:, 0], body.confidence[:, 0], float(body.fps)
    except Exception as error:  # whatever the library's parser meets in a file that is none
        raise BadClip("not a readable .pose file") from error
    # The library takes the number of a v0.1 file's frames from its length, and so misreads one that was cut.
    if round(header.version, 3) == 0.1 and len(points) % 2**16 != frames or reader.read_offset != len(data):
        raise BadClip("cut short")
    if not 1 <= fps <= 1000:
        raise BadClip("no frame rate")
    names = [(part.name, name) for part in header.components for name in part.points]
    column = {name: i for i, name in enumerate(names)}
    columns = [column.get(point, -1) for point in POINTS]
    seen = (confidence.take(columns, 1) > 0) & (np.array(columns) >= 0)
    keypoints = np.where(seen[..., None], points.take(columns, 1)[..., :2], np.nan)
    shoulders = keypoints[:, SHOULDERS]
    shoulders = shoulders[np.isfinite(shoulders).all((1, 2))]
    width = np.median(np.linalg.norm(shoulders[:, 0] - shoulders[:, 1], axis=-1)) if len(shoulders) else 0
    if width == 0:
        raise BadClip("no shoulders")
    return (keypoints - np.median(shoulders.mean(1), 0)) / width, fps


def row_keypoints(pose):
    """A row's `pose` (frames, D), NaN or an exact (0, 0) = not seen -> keypoints (frames, K, 2)."""
    try:
        keypoints = np.asarray([np.asarray(frame) for frame in pose], np.float32).reshape(len(pose), -1, 2)
    except (TypeError, ValueError):
        raise BadClip("pose is not frames x numbers")
    return np.where((keypoints == 0).all(-1, keepdims=True), np.nan, keypoints)


def resample(keypoints, n):
    """(frames, K, 2) -> (n, K, 2) by linear interpolation; a point is seen where the nearest frame has seen it."""
    at = np.linspace(0, len(keypoints) - 1, n)
    low = np.floor(at).astype(int)
    part = (at - low).astype(np.float32)[:, None, None]
    before, after = keypoints[low], keypoints[np.minimum(low + 1, len(keypoints) - 1)]
    between = before * (1 - part) + after * part
    return np.where(np.isnan(between), np.where(part < 0.5, before, after), between)


def prepare_clip(row, poses, token, fps, max_frames, pose_dim):
    """A row -> an example of CLIP; one that cannot be used has a problem, and no pose."""
    try:
        keypoints, source_fps = ((row_keypoints(row["pose"]), fps) if "pose" in row else
                                 read_keypoints(open_poses(poses, token)(row["uid"])))
        if len(keypoints) and keypoints.shape[1] * 2 != pose_dim:
            raise SystemExit(f"error: POSE_DIM is {pose_dim}; the data has {keypoints.shape[1] * 2} numbers a frame")
        near = np.hypot(keypoints[..., :1], keypoints[..., 1:]) <= FAR  # not so NaN and infinity
        if not near.any():
            raise BadClip("nothing seen")
        seconds = len(keypoints) / source_fps
        pose = resample(np.where(near, keypoints, np.nan), max(1, min(max_frames, round(seconds * fps))))
        return {"gloss": row["gloss"], "problem": "", "seconds": seconds, "pose": pose.ravel().astype(np.float32)}
    except BadClip as problem:
        return {"gloss": row["gloss"], "problem": str(problem), "seconds": 0, "pose": np.empty(0, np.float32)}


def prepare_chunk(path, rows, how):
    """Prepare the rows (a Dataset) of one chunk into the Arrow file `path`, whole or not at all -> their number."""
    temporary = f"{path}.{os.getpid()}"
    with ArrowWriter(path=temporary, features=CLIP) as writer:
        for row in rows.with_format("numpy") if "pose" in rows.features else rows:
            try:
                clip = prepare_clip(row, **how)
            except (OSError, HTTPError) as error:  # the hub's library has tried again by now, with growing pauses
                reason = f"{error}".partition("\n")[0] or type(error).__name__
                raise SystemExit(f"error: the poses cannot be read any more, but what was prepared stays: {reason}")
            writer.write(clip)
        writer.finalize()
    os.replace(temporary, path)
    return len(rows)


def end_with_parent():
    """In a process that prepares: leave Ctrl-C to the parent, and end when it ends, even by `kill -9`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def prepare(rows, contents, processes, how):
    """Rows (a Dataset of gloss, and pose or uid) -> prepared clips, by memory map from the cache of `datasets`.

    `contents` names what each row holds. A chunk that lies in the cache under its contents, `how` they are prepared
    and the state of a local archive is not made again.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE, "gloss_to_pose")
    folder.mkdir(parents=True, exist_ok=True)
    stamp = [POINTS, FAR, sorted((name, value) for name, value in how.items() if name != "token")]
    stamp += [(file.st_size, file.st_mtime_ns) for file in map(os.stat, sorted(glob.glob(how["poses"])))]
    chunks, missing, pool = [], [], contextlib.nullcontext()
    for start in range(0, len(rows), CHUNK):
        part = range(start, min(start + CHUNK, len(rows)))
        name = hashlib.sha256(repr((stamp, contents[part.start:part.stop])).encode()).hexdigest()[:32]
        chunks.append(folder / f"{name}.arrow")
        if not chunks[-1].exists():
            missing.append((chunks[-1], rows.select(part), how))
    if min(processes, len(missing)) > 1:  # spawned, since a fork takes over this process's threads and connections
        pool = ProcessPoolExecutor(min(processes, len(missing)), get_context("spawn"), end_with_parent)
    with pool, tqdm(total=sum(len(job[1]) for job in missing), desc="preparing", unit=" clips", disable=None) as bar:
        try:
            for done in getattr(pool, "map", map)(prepare_chunk, *zip(*missing)) if missing else ():
                bar.update(done)
        except KeyboardInterrupt:
            for process in active_children():
                process.terminate()
            raise
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in chunks])


def split_by_video(videos, share):
    """Videos of the clips -> the set of those that validate, by the hash of their id; at least one on either side."""
    order = sorted(set(videos), key=hash_share)
    if len(order) < 2:
        raise SystemExit("error: the clips are of a single video, so that there is nothing to validate on")
    return set(order[:min(max(1, sum(hash_share(video) < share for video in order)), len(order) - 1)])


def draw_subset(videos, clips):
    """Videos of the clips -> indices of at least `clips` clips (0: all), by whole videos, the same ones every time."""
    left, chosen, sizes = clips or len(videos), set(), Counter(videos)
    for video in sorted(sizes, key=lambda video: hash_share(f"subset {video}")):
        if left > 0:
            chosen.add(video)
            left -= sizes[video]
    return [i for i, video in enumerate(videos) if video in chosen]


def load_rows(dataset, config, token):
    """The data set -> {split: Dataset with the columns gloss, and pose or uid}, and its name for the results."""
    if dataset == ISIGN and token is None:
        print("!" * 100, f"!!  NO ACCESS TOKEN: {ISIGN} is gated, so what follows is NOT iSign.",
              "!!  It runs on an embedded, synthetic SAMPLE. For iSign accept its terms on the hub and set HF_TOKEN",
              "!!  (see the README).", "!" * 100, sep="\n")
        dataset = "sample"
    if dataset == "sample":
        return {"train": sample_rows(320, 1), "validation": sample_rows(80, 2)}, "sample data"
    try:
        found = datasets.load_dataset(dataset, config, token=token)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, HTTPError) as error:
        advice = {"401 ": "the hub refuses the access token; make a new one and set HF_TOKEN",
                  "gated": f"accept its terms at https://huggingface.co/datasets/{dataset}, as the owner of the token",
                  "doesn't exist on|404 ": "the hub has no such data set, or the token may not see it",
                  "Couldn't reach": "it is not in the cache, and the hub cannot be reached; check the network"}
        text = str(error).strip()
        advice = next((advice[sign] for sign in advice if re.search(sign, text)), text.splitlines()[0])
        raise SystemExit(f"error: cannot load DATASET {dataset!r}, CONFIG {config!r}: {advice}")
    names = {"train": ["train"], "validation": ["validation", "valid", "val", "dev"]}
    rows = {split: found[name] for split in names for name in names[split] if name in found}
    for split, table in rows.items():
        text, pose = ("gloss" if "gloss" in table.features else "text"), ("pose" if "pose" in table.features else "uid")
        if not {text, pose} <= set(table.features):
            raise SystemExit(f"error: DATASET {dataset!r} has the columns {', '.join(table.features)}; it needs gloss "
                             "or text, and pose or uid")
        rows[split] = table.select_columns(sorted({text, pose, "uid"} & set(table.features)))
        rows[split] = rows[split] if text == "gloss" else rows[split].rename_column(text, "gloss")
    if "train" not in rows:
        raise SystemExit(f"error: DATASET {dataset!r} has no split `train`, only {', '.join(found)}")
    return rows, dataset


def load_clips(settings):
    """The data set -> {"train": ..., "validation": ...}: Datasets of usable CLIPs, and the data's name. Prints what
    there is and what was left out. Raises SystemExit with one line where the data cannot be used.
    """
    token = os.environ.get("HUGGINGFACE_HUB_TOKEN") or get_token()  # today's hub library does not read this variable
    dataset, poses = settings.DATASET, settings.POSES
    rows, name = load_rows(dataset, settings.CONFIG, token)
    if glob.glob(poses) or os.path.isdir(dataset):
        poses = os.path.abspath(poses if glob.glob(poses) else os.path.join(dataset, poses))
    else:
        poses = f"hf://datasets/{dataset}/{poses}"
    how = {"poses": poses, "token": token, "fps": settings.FPS, "max_frames": settings.MAX_FRAMES,
           "pose_dim": settings.POSE_DIM}
    has_uid, left_out, videos = "uid" in rows["train"].features, Counter(), {}
    for split, table in rows.items():  # videos[split]: the number of every row that is wanted -> its video
        videos[split], uids = {}, set()
        for i, (uid, gloss) in enumerate(zip(table["uid"][:] if has_uid else range(len(table)), table["gloss"][:])):
            if not split_glosses(gloss) or gloss == "nan ":
                left_out["no text"] += 1
            elif uid in uids:
                left_out["uid twice"] += 1
            else:
                videos[split][i] = video_of(str(uid))
                uids.add(uid)
    origin = "the data's own splits"
    if "validation" not in rows:
        origin = "split by video" if has_uid else "split by row, since there is no uid"
        rows["validation"], every = rows["train"], videos["train"]
        chosen = split_by_video(every.values(), settings.VALIDATION_SHARE)
        videos = {split: {i: video for i, video in every.items() if (video in chosen) == (split == "validation")}
                  for split in ("train", "validation")}
    clips = {}
    for split, limit in [("train", settings.TRAIN_CLIPS), ("validation", settings.VALIDATION_CLIPS)]:
        wanted = list(videos[split])
        numbers = [wanted[i] for i in draw_subset(videos[split].values(), limit)]
        videos[split] = {videos[split][i] for i in numbers}
        table = rows[split].select(numbers)
        contents = ([(rows[split]._fingerprint, i) for i in numbers] if "pose" in table.features else
                    list(zip(table["uid"][:], table["gloss"][:])))
        prepared = prepare(table, contents, settings.PROCESSES, how)
        problems = Counter(filter(None, prepared["problem"][:]))
        left_out += problems
        clips[split] = prepared.select([i for i, problem in enumerate(prepared["problem"][:]) if not problem])
        if not len(clips[split]) or problems.total() > settings.MAX_BAD_SHARE * len(prepared):
            reasons = ", ".join(f"{n} {reason}" for reason, n in problems.items())
            raise SystemExit(f"error: only {len(clips[split])} of {len(prepared)} {split} clips can be used, less than "
                             f"MAX_BAD_SHARE allows; something is wrong with the source: {reasons}")
    seconds = np.concatenate([clips[split]["seconds"][:] for split in clips])
    glosses = [gloss for split in clips for gloss in clips[split]["gloss"][:]]
    cut = sum(len(split_glosses(gloss)) > settings.MAX_GLOSS_LEN for gloss in glosses)
    both = f"{len(videos['train'] & videos['validation'])} videos in both" if has_uid else "no uid names the videos"
    print(f"data               {name}\n"
          f"  clips            {len(clips['train'])} train, {len(clips['validation'])} validation ({origin}; {both})\n"
          f"  left out         {', '.join(f'{n} {reason}' for reason, n in left_out.most_common()) or 'none'}\n"
          f"  glosses cut      in {cut} sentences of more than {settings.MAX_GLOSS_LEN}\n"
          f"  clips resampled  {sum(np.round(seconds * settings.FPS) > settings.MAX_FRAMES)} of more than "
          f"{settings.MAX_FRAMES} frames")
    return clips, name


def sample_rows(n, seed):
    """A synthetic Dataset of n rows with gloss and pose, the same in every run: every gloss has hand paths and hand
    shapes of its own; sentences of 1 to 4 are joined with co-articulation, and vary in speed and in detail.
    """
    words = "HELLO I YOU WANT GO SCHOOL HOUSE WATER EAT BOOK TEACHER GOOD NOT UNDERSTAND FAMILY WORK".split()
    rest = np.tile([0.45, 1.3, 1.4, 0.3, 0.3, 0.3, 0.3, 0.3], (2, 1))  # of an arm: wrist, turn of the hand, five curls
    mouth, brow = [-.1, -.55, .1, -.55, 0, -.5, 0, -.58], [-.18, -.94, -.12, -.97, -.05, -.94]
    eye, mirror = [-.14, -.86, -.1, -.88, -.17, -.85, -.14, -.83, -.1, -.83, -.06, -.85], np.tile([-1, 1], 6)
    head = np.concatenate([[0, -.75, .1, -.86, -.1, -.86, .21, -.8, -.21, -.8], mouth, brow, brow * mirror[:6], eye,
                           eye * mirror, [0, -.92]]).reshape(28, 2)
    signs, rows = {}, []
    for i, word in enumerate(words):
        rng, keys = np.random.default_rng(i), np.tile(rest, (3, 1, 1))
        keys[:, 1] = rng.uniform([-0.1, -0.5, -2.2] + [0] * 5, [0.7, 0.9, -0.6] + [1] * 5, (3, 8))
        if i % 3 == 0:  # a sign of both hands, which mirror each other
            keys[:, 0] = keys[:, 1]
        signs[word] = keys, rng.uniform(0.5, 0.9)
    rng, bend, finger = np.random.default_rng([seed, 1000]), np.linspace(0.25, 1, 4), np.arange(-2, 3)[:, None]
    for _ in range(n):
        glosses = [words[i] for i in rng.integers(0, len(words), rng.integers(1, 5))]
        keys, pauses = [rest], [0]
        for path, length in (signs[gloss] for gloss in glosses):
            keys += list(path + rng.normal(0, 0.03, path.shape))
            pauses += [0.25, length / 2, length / 2]
        times = np.cumsum(pauses + [0.3]) / rng.uniform(0.8, 1.25)
        keys, at = np.array(keys + [rest]), np.arange(0, times[-1], 1 / 25)
        before = np.searchsorted(times, at, side="right") - 1
        part = (0.5 - 0.5 * np.cos(np.pi * (at - times[before]) / np.diff(times)[before]))[:, None, None]
        arms = keys[before] * (1 - part) + keys[before + 1] * part  # (frames, left and right, 8); x grows outwards
        wrist, shoulder = arms[..., :2], np.broadcast_to([0.5, 0.0], arms[..., :2].shape)
        reach = wrist - shoulder
        length = np.linalg.norm(reach, axis=-1, keepdims=True).clip(0.1, 1.44)
        elbow = shoulder + reach / 2 + np.sqrt(0.73**2 - length**2 / 4) / length * reach[..., ::-1] * [1, -1]
        curl = arms[..., 3:, None]
        turn, size = arms[..., 2, None, None] + 0.25 * finger + 0.5 * curl * bend, (0.34 - 0.04 * abs(finger)) * bend
        joints = np.stack([np.cos(turn), np.sin(turn)], -1) * (size * (1 - 0.5 * curl * bend))[..., None]
        hands = np.concatenate([wrist[:, :, None], wrist[:, :, None] + joints.reshape(len(at), 2, 20, 2)], 2)
        sides, heads = np.array([[1, 1], [-1, 1]]), np.tile(head + rng.normal(0, 0.02, 2), (len(at), 1, 1))
        hands, arms = hands * sides[:, None], np.stack([shoulder, elbow, wrist], 1) * sides
        pose = np.concatenate([hands.reshape(-1, 42, 2), heads[:, :5], arms.reshape(-1, 6, 2), heads[:, 5:]], 1)
        pose += rng.normal(0, 0.004, pose.shape)
        lost = rng.integers(0, 4 * len(at))  # in every fourth clip the right hand is out of sight for a while
        pose[lost:lost + 8, 21:42] = np.nan
        rows.append({"gloss": " ".join(glosses), "pose": pose.reshape(len(at), -1).astype(np.float32)})
    return datasets.Dataset.from_list(rows)


# ---- from clips to batches

class Tokens:
    """Gloss sentences -> tokens: numbers of the training split's glosses (`vocabulary`, which begins with <pad> and
    <unk>), or the word pieces of a pretrained encoder (`tokenizer`, its JSON).
    """

    def __init__(self, vocabulary, tokenizer, max_gloss_len):
        self.number = {gloss: i for i, gloss in enumerate(vocabulary)}
        self.max_gloss_len, self.pieces = max_gloss_len, None
        if tokenizer:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "tokenizer.json")
                file.write_text(tokenizer, encoding="utf8")
                self.pieces = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))

    def __call__(self, sentences):
        """B sentences -> tokens (B, S), token_mask (B, S)."""
        glosses = [split_glosses(sentence)[:self.max_gloss_len] for sentence in sentences]
        if self.pieces:  # lower case, as pretrained encoders know their words
            text = [" ".join(words).lower() for words in glosses]
            rows = self.pieces(text, truncation=True, max_length=4 * self.max_gloss_len)["input_ids"]
        else:
            rows = [[self.number.get(gloss, UNK) for gloss in words] for words in glosses]
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)
        return tokens, torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def collate(clips, tokens, pose_dim):
    """Clips -> a batch. Frames behind a clip's end are NaN, as points that were not seen are."""
    poses = [torch.tensor(clip["pose"]).view(-1, pose_dim) for clip in clips]
    token_ids, token_mask = tokens([clip["gloss"] for clip in clips])
    return {"tokens": token_ids, "token_mask": token_mask, "n_frames": torch.tensor([len(pose) for pose in poses]),
            "seconds": torch.tensor([float(clip["seconds"]) for clip in clips]),
            "pose": nn.utils.rnn.pad_sequence(poses, batch_first=True, padding_value=math.nan)}  # (B, T, D)


def make_loaders(clips, tokens, settings, workers=0):
    """{split: clips} -> {split: loader}; the order of the training clips depends on the seed and the epoch alone."""
    loaders = {}
    for split, part in clips.items():
        order = DistributedSampler(part, 1, 0, shuffle=split == "train", seed=settings.SEED)
        loaders[split] = DataLoader(part.with_format("numpy"), settings.BATCH_SIZE, sampler=order, num_workers=workers,
                                    collate_fn=functools.partial(collate, tokens=tokens, pose_dim=settings.POSE_DIM),
                                    generator=torch.Generator(),  # so that it leaves the seeded one alone
                                    pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0)
    return loaders


def batches(loader, device):
    """The loader's batches on the device, but for n_frames: so the host knows the longest clip without waiting."""
    for batch in loader:
        yield {name: value if name == "n_frames" else value.to(device, non_blocking=True)
               for name, value in batch.items()}


def training_statistics(clips, pose_dim, min_count):
    """One pass over the training clips -> the statistics that a model keeps, and the vocabulary."""
    total, squares, count = np.zeros((3, pose_dim))
    words, frames, seconds = Counter(), 0, 0.0
    for rows in clips.with_format("numpy").iter(CHUNK):
        pose = np.concatenate(list(rows["pose"])).reshape(-1, pose_dim).astype(np.float64)
        total += np.nansum(pose, 0)
        squares += np.nansum(pose**2, 0)
        count += np.isfinite(pose).sum(0)
        frames, seconds = frames + len(pose), seconds + rows["seconds"].sum(dtype=np.float64)
        words.update(word for gloss in rows["gloss"] for word in split_glosses(gloss))
    mean = total / count.clip(1)  # of a point that no clip shows: 0, with a deviation of 1
    deviation = np.sqrt((squares / count.clip(1) - mean**2).clip(0))
    kept = sorted(word for word, n in words.items() if n >= min_count)
    print(f"  vocabulary       {len(kept)} glosses; {len(words) - len(kept)} rarer ones are <unk>\n"
          f"  points unseen    {100 * (1 - count.sum() / frames / pose_dim):.1f} % in the training clips")
    statistics = dict(mean=mean, deviation=np.where(deviation > 1e-4, deviation, 1), seen=count > 0,
                      seconds_per_gloss=seconds / words.total())
    return {name: torch.tensor(value).float() for name, value in statistics.items()}, ["<pad>", "<unk>", *kept]


# ---- models: model(tokens, token_mask, n_frames=None) -> pose (B, max_frames, D), seconds (B,)

def waves(x):
    """(...) -> (..., 11): a number with sines and cosines of it, so that a linear layer can resolve it finely."""
    angles = x[..., None] * math.pi * 2.0 ** torch.arange(5, device=x.device)
    return torch.cat([x[..., None], angles.sin(), angles.cos()], -1)


class TwoWayGRU(nn.Module):
    """(B, L, inputs) and a mask (B, L) -> (B, L, outputs); the way back begins at the last real element."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.there, self.back = (nn.GRU(inputs, outputs // 2, batch_first=True) for _ in range(2))

    def forward(self, x, mask):
        steps, lengths = torch.arange(x.shape[1], device=x.device), mask.sum(1, keepdim=True)
        turned = torch.where(steps < lengths, lengths - 1 - steps, steps)[..., None]
        back = self.back(x.gather(1, turned.expand_as(x)))[0]
        return torch.cat([self.there(x)[0], back.gather(1, turned.expand_as(back))], -1)


class PoseModel(nn.Module):
    """What the models share: glosses with durations, frames that are placed on them, poses in real units.

    Every gloss predicts a positive duration. Their sum is the clip's, their running sums give each gloss its stretch
    of the time line, and a frame reads the encoder through a soft window around these stretches. No frame depends on
    another one's result, so all are decoded in one call. Subclasses give `encode` and `decode`.
    """
    title, learning_rate = "GRU", "LR_GRU"

    def __init__(self, states_dim, query_dim, pose_dim, max_frames, fps, dropout):
        super().__init__()
        self.max_frames, self.fps = max_frames, fps
        self.duration = nn.Sequential(nn.Linear(states_dim, states_dim), nn.ReLU(), nn.Linear(states_dim, 1))
        self.log_softness = nn.Parameter(torch.tensor(-2.0))  # of a window's borders, in mean glosses
        self.query = nn.Linear(states_dim + 33, query_dim)
        self.output = nn.Linear(query_dim, pose_dim)
        self.dropout = nn.Dropout(dropout)
        for name in ("mean", "deviation", "seen"):  # see training_statistics
            self.register_buffer(name, torch.ones(pose_dim))
        self.register_buffer("seconds_per_gloss", torch.ones(()))

    def forward(self, tokens, token_mask, n_frames=None):
        """tokens, token_mask (B, S), n_frames (B,), None: by the predicted duration -> pose, seconds."""
        states = self.encode(tokens, token_mask)  # (B, S, H)
        # (B, S) in mean glosses; log(e - 1) lets them begin at 1
        durations = F.softplus(self.duration(states).squeeze(-1).float() + math.log(math.e - 1)) * token_mask
        seconds = durations.sum(1) * self.seconds_per_gloss
        if n_frames is None:
            n_frames = (seconds * self.fps).round().long().clamp(1, self.max_frames)
        longest, n_frames = int(n_frames.max()), n_frames.to(tokens.device, non_blocking=True)[:, None]
        step = torch.arange(longest, device=tokens.device)
        queries = self.place(states, token_mask, durations, step / self.max_frames, step / (n_frames - 1).clamp(min=1))
        hidden = self.decode(self.dropout(queries), step < n_frames, states, token_mask)
        pose = self.output(self.dropout(hidden)).float() * self.deviation + self.mean
        return F.pad(pose * (step < n_frames)[..., None], (0, 0, 0, self.max_frames - longest)), seconds

    def place(self, states, token_mask, durations, time, phase):
        """time (T,), phase (B, T): 0 at a clip's first frame, 1 at its last -> queries (B, T, H)."""
        ends = durations.cumsum(1)
        at = (phase.clamp(max=1) * ends[:, -1:])[..., None]
        starts, ends, softness = (ends - durations)[:, None], ends[:, None], self.log_softness.exp()
        nearness = F.logsigmoid((at - starts) / softness) + F.logsigmoid((ends - at) / softness)  # (B, T, S)
        window = nearness.masked_fill(~token_mask[:, None], -math.inf).softmax(-1)
        within = ((at - starts) / durations[:, None].clamp(min=0.01)).clamp(-0.5, 1.5)
        position = (window[..., None] * waves(within)).sum(2)
        return self.query(torch.cat([window.to(states.dtype) @ states, position, waves(phase),
                                     waves(time).expand(*phase.shape, -1)], -1))


class GRUModel(PoseModel):
    """A bidirectional GRU over the glosses, a GRU decoder over the frames."""

    def __init__(self, vocabulary, embed_dim, hidden_dim, dropout, **sizes):
        super().__init__(hidden_dim, hidden_dim, dropout=dropout, **sizes)
        self.embedding = nn.Embedding(vocabulary, embed_dim, PAD)
        self.encoder = TwoWayGRU(embed_dim, hidden_dim)
        self.decoder = TwoWayGRU(hidden_dim, hidden_dim)

    def encode(self, tokens, token_mask):
        return self.dropout(self.encoder(self.dropout(self.embedding(tokens)), token_mask))

    def decode(self, queries, frame_mask, states, token_mask):
        return queries + self.decoder(queries, frame_mask)


class TransformerModel(PoseModel):
    """A pre-norm Transformer: the frames' queries attend to each other and to all glosses."""
    title, learning_rate = "Transformer", "LR_TRANSFORMER"

    def __init__(self, vocabulary, embed_dim, hidden_dim, dropout, **sizes):
        super().__init__(embed_dim, embed_dim, dropout=dropout, **sizes)
        self.embedding = nn.Embedding(vocabulary, embed_dim, PAD)
        self.order = nn.Linear(11, embed_dim)
        layer = dict(nhead=4, dim_feedforward=hidden_dim, dropout=dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(embed_dim, **layer), 3, nn.LayerNorm(embed_dim),
                                             enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(embed_dim, **layer), 3, nn.LayerNorm(embed_dim))

    def encode(self, tokens, token_mask):
        order = self.order(waves(torch.arange(tokens.shape[1], device=tokens.device) / 32))
        return self.encoder(self.dropout(self.embedding(tokens) + order), src_key_padding_mask=~token_mask)

    def decode(self, queries, frame_mask, states, token_mask):
        return self.decoder(queries, states, tgt_key_padding_mask=~frame_mask, memory_key_padding_mask=~token_mask)


class BertModel(GRUModel):
    """A pretrained encoder, whose word pieces take the place of the glosses, with the GRU decoder."""
    title = "BERT"

    def __init__(self, bert_config, embed_dim, hidden_dim, dropout, **sizes):
        PoseModel.__init__(self, hidden_dim, hidden_dim, dropout=dropout, **sizes)
        self.pretrained = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**bert_config))
        self.pretrained.pooler = None  # nothing reads it
        self.bridge = nn.Linear(self.pretrained.config.hidden_size, hidden_dim)
        self.decoder = TwoWayGRU(hidden_dim, hidden_dim)

    def encode(self, tokens, token_mask):
        states = self.pretrained(input_ids=tokens, attention_mask=token_mask.long()).last_hidden_state
        return self.dropout(self.bridge(states))


MODELS = {"gru": GRUModel, "transformer": TransformerModel, "bert": BertModel}


def new_model(name, statistics, vocabulary, settings):
    """-> a fresh model, its Tokens, and what a checkpoint needs to build both again. BERT's weights come from
    BERT_NAME; SystemExit where there are none.
    """
    spelling = {"vocabulary": vocabulary, "tokenizer": "", "max_gloss_len": settings.MAX_GLOSS_LEN}
    names = "EMBED_DIM", "HIDDEN_DIM", "DROPOUT", "POSE_DIM", "MAX_FRAMES", "FPS"
    args = {name.lower(): getattr(settings, name) for name in names}
    if name == "bert":
        try:
            pretrained = transformers.AutoModel.from_pretrained(settings.BERT_NAME)
            tokenizer = transformers.AutoTokenizer.from_pretrained(settings.BERT_NAME)
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: no weights for BERT_NAME {settings.BERT_NAME!r}; set it to a hub id that can be "
                             f"reached or to a folder with a model and a tokenizer ({str(error).splitlines()[0]})")
        spelling["tokenizer"] = tokenizer.backend_tokenizer.to_str()
        args["bert_config"] = pretrained.config.to_dict()
    else:
        args["vocabulary"] = len(vocabulary)
    model = MODELS[name](**args)
    model.load_state_dict(statistics, strict=False)
    if name == "bert":
        model.pretrained.load_state_dict(pretrained.state_dict(), strict=False)  # but for the pooler
    return model, Tokens(**spelling), {"model": name, "model_args": args, "tokens": spelling}


def write_whole(path, data):
    """Write bytes to a temporary file and rename it: `path` is the old file or the new one, never half of one."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise SystemExit(f"error: {path} cannot be written ({error.strerror}); what was there before stays")


def save_checkpoint(path, contents):
    """Plain containers and tensors -> a checkpoint that loads with weights_only=True."""
    file = io.BytesIO()
    torch.save(contents, file)
    write_whole(path, file.getbuffer())


# ---- training

def pose_difference(pose, target):
    """pose (B, max_frames, D), target (B, T, D) -> pose - target, 0 where it was not seen, and where it was."""
    seen = target.isfinite()
    return torch.where(seen, pose[:, :target.shape[1]] - target, 0), seen


def training_loss(model, batch, duration_weight):
    """-> the loss: masked MSE over the variance of the training poses, and the squared error of the log duration; and
    the MSE's parts, the sum of squares and the number of what was seen.
    """
    pose, seconds = model(batch["tokens"], batch["token_mask"], batch["n_frames"])
    difference, seen = pose_difference(pose, batch["pose"])
    squares, count = difference.square().sum(), seen.sum()
    variance = (model.deviation**2 * model.seen).sum() / model.seen.sum()
    late = (seconds.clamp(min=0.001).log() - batch["seconds"].log()).square().mean()
    return squares / count.clamp(min=1) / variance + duration_weight * late, squares.detach(), count


class Trainer:
    """A model in training: its optimizer and schedule, and `averaged`, the moving average of its weights, which is what
    is evaluated and saved. The learning rates rise, then fall along half a cosine, over all `steps`.
    """

    def __init__(self, model, steps, settings, precision=torch.float32):
        self.model, self.averaged, self.settings = model, copy.deepcopy(model).requires_grad_(False), settings
        self.device, self.precision = model.mean.device, precision
        groups = [{"params": [], "lr": getattr(settings, model.learning_rate)}, {"params": [], "lr": settings.LR_BERT}]
        for name, value in model.named_parameters():
            groups[name.startswith("pretrained.")]["params"].append(value)
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        rise = max(1, settings.WARMUP * steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(
            1, (step + 1) / rise) * (0.5 + 0.5 * math.cos(math.pi * min(1, step / steps))))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)

    def epoch(self, loaders, number):
        """One epoch and its validation, reported by a line of fixed width -> the metrics."""
        began, label = time.time(), f"{self.model.title} epoch {number}/{self.settings.EPOCHS}"
        metrics = {"train_mse": self.train(loaders["train"], number, label),
                   **evaluate(self.averaged, loaders["validation"], self.device), "seconds": time.time() - began}
        print("{0:<23} train mse {train_mse:8.5f}   val mse {val_mse:8.5f}   mae {val_mae:7.5f}   motion {motion:5.2f}"
              "   duration error {duration_error:5.2f} s   {seconds:6.1f} s".format(label, **metrics), flush=True)
        return metrics

    def train(self, loader, epoch, label):
        """One pass over the training clips -> their MSE on the way. SystemExit where it is not finite."""
        self.model.train()
        loader.sampler.set_epoch(epoch)
        sums = torch.zeros(2, device=self.device, dtype=torch.float64)
        for batch in tqdm(batches(loader, self.device), label, len(loader), leave=False, disable=None):
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                loss, squares, count = training_loss(self.model, batch, self.settings.DURATION_WEIGHT)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.GRAD_CLIP)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            step = self.schedule.last_epoch  # the average's memory grows with the steps, up to 1 / (1 - average)
            follow = get_ema_multi_avg_fn(min(self.settings.AVERAGE, (1 + step) / (10 + step)))
            follow(list(self.averaged.parameters()), list(self.model.parameters()), step)
            sums += torch.stack([squares, count]).double()
        if not sums.isfinite().all():
            raise SystemExit(f"error: the loss is not finite any more in {label}; lower the learning rate")
        return (sums[0] / sums[1]).item()


@torch.no_grad()
def evaluate(model, loader, device):
    """-> the metrics over real frames and seen points, at the real lengths: val_mse, val_mae, mean_pose_mse in
    (squared) shoulder widths; motion, the path of the generated hands over that of the real; duration_error, seconds.
    """
    model.eval()
    sums, clips = torch.zeros(7, device=device, dtype=torch.float64), 0
    for batch in batches(loader, device):
        pose, seconds = model(batch["tokens"], batch["token_mask"], batch["n_frames"])
        difference, seen = pose_difference(pose, batch["pose"])
        at_mean, _ = pose_difference(model.mean.expand_as(pose), batch["pose"])
        moving = HANDS_AND_WRISTS if pose.shape[-1] == 2 * len(POINTS) else range(pose.shape[-1] // 2)
        both = (seen[:, 1:] & seen[:, :-1])[..., ::2][..., moving]  # (B, T - 1, points): seen before and after the step
        steps = [x[:, :seen.shape[1]].unflatten(-1, (-1, 2))[:, :, moving].diff(dim=1).norm(dim=-1)
                 for x in (pose, batch["pose"])]
        sums += torch.stack([difference.square().sum(), difference.abs().sum(), at_mean.square().sum(), seen.sum(),
                             *(torch.where(both, step, 0).sum() for step in steps),
                             (seconds - batch["seconds"]).abs().sum()]).double()
        clips += len(seconds)
    squares, absolute, at_mean, count, generated, real, late = sums.tolist()
    return {"val_mse": squares / count, "val_mae": absolute / count, "mean_pose_mse": at_mean / count,
            "motion": generated / max(real, 1e-9), "duration_error": late / clips}


# ==== SHARED BLOCK: end


def select(name, clips, statistics, vocabulary, device, settings):
    """A short run of one candidate -> the metrics of its best epoch, whose model is in selection_<model>.pt."""
    torch.manual_seed(settings.SEED)
    model, tokens, built = new_model(name, statistics, vocabulary, settings)
    loaders = make_loaders(clips, tokens, settings)
    trainer = Trainer(model.to(device), settings.EPOCHS * len(loaders["train"]), settings)
    best = {"val_mse": math.inf}
    for epoch in range(1, settings.EPOCHS + 1):
        metrics = trainer.epoch(loaders, epoch)
        if metrics["val_mse"] < best["val_mse"]:
            best = {**metrics, "epoch": epoch}
            contents = {**built, "metrics": best, "weights": trainer.averaged.state_dict()}
            save_checkpoint(f"selection_{name}.pt", contents)
        if epoch - best["epoch"] >= settings.PATIENCE:
            break
    return best


def main():
    settings = read_settings(globals())
    if not CANDIDATES or not set(CANDIDATES) <= MODELS.keys():
        raise SystemExit(f"error: CANDIDATES = {CANDIDATES!r} makes no sense: name some of {', '.join(MODELS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clips, data = load_clips(settings)
    statistics, vocabulary = training_statistics(clips["train"], POSE_DIM, MIN_GLOSS_COUNT)
    print(f"device             {device}", flush=True)
    results = {name: select(name, clips, statistics, vocabulary, device, settings) for name in CANDIDATES}
    winner = min(results, key=lambda name: results[name]["val_mse"])
    print("\nFINAL RESULTS" + f" ({data})" * (data == "sample data"))
    for name, best in results.items():
        print(f"{MODELS[name].title}: {best['val_mse']:.4f}")
    print(f"Mean pose: {results[winner]['mean_pose_mse']:.4f}")
    print(f"Next: python train_final_model.py --model {winner}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; checkpoints and prepared clips stay", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # the disk is full, a folder cannot be written, ...
        sys.exit(f"error: {error}")
