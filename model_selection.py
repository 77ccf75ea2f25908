"""Which model suits the data? Short runs of the candidates on a small subset, for gloss -> pose on iSign.

    python model_selection.py

Reads the data set named below, or an embedded sample where iSign's hub id has no access token. Writes
selection_<model>.pt for every candidate into this folder, and the prepared clips into the cache of `datasets`.
"""
import argparse, collections, copy, functools, glob, hashlib, io, math, os, pathlib, random, re
import signal, sys, tempfile, time, unicodedata, warnings, zipfile, zlib
if __name__ == "__mp_main__":  # a process that will prepare clips: Ctrl-C is not to interrupt its imports
    signal.signal(signal.SIGINT, signal.SIG_IGN)
import datasets, fsspec, huggingface_hub, numpy as np, pose_format, torch, transformers
from pose_format.numpy import NumPyPoseBody
from pose_format.pose_header import PoseHeader
from torch import distributed as dist, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

# ---- SETTINGS: edit and run again. Data
DATASET = "Exploration-Lab/iSign"    # hub id, a local folder of the same layout, or "sample"
CONFIG = "iSign_v1.1"                # the data set's configuration; None: its default
POSES = "iSign-poses_v1.1_part_*"    # archive parts within DATASET; or a path: parts, a zip, a folder of .pose files
VALIDATION_SHARE, MAX_BAD_SHARE = 0.1, 0.2  # of the videos, where no split is given; of clips that cannot be used
TRAIN_CLIPS, VALIDATION_CLIPS = 480, 120  # the subset, drawn by whole videos; 0: all
FPS, MAX_FRAMES = 25, 96             # frames per second; a longer clip is resampled to MAX_FRAMES, not cut
POSE_DIM = 152                       # 76 keypoints x (x, y)
MAX_GLOSS_LEN = 16                   # glosses of a sentence; what is beyond is cut
MIN_GLOSS_COUNT = 2                  # rarer glosses of the training split become <unk>, so that <unk> is trained
PROCESSES = 2                        # that prepare clips; 0: only the script itself
# Models
CANDIDATES = ["gru", "transformer"]  # "bert" is allowed, too
BERT_NAME = "bert-base-uncased"      # hub id, or a folder with a model and its tokenizer
EMBED_DIM, HIDDEN_DIM = 256, 512     # of the embeddings and the Transformer; of the GRUs and the feed-forward layers
DROPOUT, WORD_DROPOUT = 0.1, 0.1     # of the features; of the glosses, which become <unk> (not with BERT)
# Training
EPOCHS, PATIENCE = 6, 2              # at most; and without a lower validation MSE, before a run stops
BATCH_SIZE, SEED = 8, 0              # the clips of a step; of all that is drawn
LR_GRU, LR_TRANSFORMER, LR_BERT = 1e-3, 5e-4, 2e-5  # BERT's decoder learns at the GRU's rate
WARMUP, GRAD_CLIP = 0.05, 1.0        # share of the steps in which the rates rise, to fall to 0; gradient norm, 0: any
DURATION_WEIGHT, SPEED_WEIGHT = 0.1, 0.3  # of the errors of the duration and of the points' speeds beside the MSE
AVERAGE = 0.999                      # of the moving average of the weights that is evaluated and saved; 0: the weights

# ==== SHARED BLOCK: begin (the same bytes in both scripts, which a test compares)
# Shapes: B clips, S glosses or word pieces, T frames, D = 2 K pose numbers of K keypoints, H hidden size.
# Masks: True = real. A pose number that is NaN was not seen or is padding, and enters no loss, metric or statistic.
ISIGN = "Exploration-Lab/iSign"
HAND = "WRIST THUMB_CMC THUMB_MCP THUMB_IP THUMB_TIP".split() + [f"{finger}_{joint}" for finger in (
    "INDEX_FINGER", "MIDDLE_FINGER", "RING_FINGER", "PINKY") for joint in ("MCP", "PIP", "DIP", "TIP")]
BODY = ("NOSE" + "".join(f" LEFT_{x} RIGHT_{x}" for x in ("EYE", "EAR", "SHOULDER", "ELBOW", "WRIST"))).split()
FACE = "61 291 17 0 70 105 107 300 334 336 161 158 33 163 153 133 388 385 263 390 380 362 9".split()
# The 76 keypoints of PoseStitch-SLT (EMNLP 2025), by the names they have in MediaPipe Holistic's .pose files
PARTS = {"LEFT_HAND_LANDMARKS": HAND, "RIGHT_HAND_LANDMARKS": HAND, "POSE_LANDMARKS": BODY, "FACE_LANDMARKS": FACE}
POINTS = [(part, name) for part, names in PARTS.items() for name in names]
SHOULDERS, HANDS_AND_WRISTS, PAD, UNK = [47, 48], [*range(42), 51, 52], 0, 1
FAR, MAX_POSE_BYTES = 10, 2**28  # shoulder widths: a point farther out is an error; 25 minutes of MediaPipe Holistic
CHUNK = 256                      # clips in a file of the cache: what an interruption can cost
CLIP = datasets.Features({"gloss": datasets.Value("string"), "problem": datasets.Value("string"),
                          "seconds": datasets.Value("float32"), "pose": datasets.List(datasets.Value("float32"))})

class BadClip(Exception):
    """A clip that is left out; the message is the reason that it is counted under."""

def read_settings(script):
    """A script's globals() -> its settings, those above the shared block; SystemExit for one that makes no sense."""
    settings = {name: script[name] for name in list(script)[:list(script).index("ISIGN")] if name.isupper()}
    for name in settings.keys() - set("DATASET CONFIG POSES BERT_NAME MIXED_PRECISION CANDIDATES".split()):
        share, term = (re.search(x, name) for x in ("SHARE|DROPOUT|WARMUP|AVERAGE|LR_", "WEIGHT|GRAD_CLIP"))
        low = 0 if share or term or re.search("CLIPS|SEED|PROCESSES", name) else 1 + (name == "HIDDEN_DIM")
        kind, high = (float, 0.99999) if share else (float if term or name == "FPS" else int, 2**31)
        if type(settings[name]) not in (int, kind) or not low <= settings[name] <= high:
            raise SystemExit(f"error: {name} = {settings[name]!r} is no {kind.__name__} from {low} to {high}")
    return argparse.Namespace(**settings)

def split_glosses(text):
    """A gloss sentence or English text -> its glosses: upper case, without the punctuation of sentences."""
    words = unicodedata.normalize("NFC", "" if text is None else str(text)).upper().split()
    marks = ".,;:!?\"'“”„‘’«»()[]{}<>…।॥-–—*/\\|"
    return [word for word in (word.strip(marks) for word in words) if word]

def video_of(uid):
    """The video that a clip was cut from, by the three forms of iSign's uids; any other uid is a video by itself."""
    return re.sub(r"^(?:([0-9a-f]{12})-\d+|(.{11})(?:--\d+|_(?:w|d|e\d+)))\Z", r"\1\2", uid)

def write_whole(path, data, temporary=".tmp"):
    """Bytes, or a checkpoint as a dict -> a file, by a temporary one: `path` is the old or the new, and whole."""
    if isinstance(data, dict):
        torch.save(data, buffer := io.BytesIO())
        data = buffer.getbuffer()
    try:
        with open(f"{path}{temporary}", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as error:
        raise SystemExit(f"error: {path} cannot be written ({error.strerror}); what was there before stays")
    finally:
        pathlib.Path(f"{path}{temporary}").unlink(missing_ok=True)

# ---- from rows to prepared clips
class JoinedParts(fsspec.spec.AbstractBufferedFile):
    """An archive that was cut into parts by size, as one seekable file that is read by ranges."""
    def __init__(self, fs, paths):
        self.parts = [fs.open(path, "rb", cache_type="none") for path in paths]
        super().__init__(fs, paths[0], block_size=1, cache_type="none", size=sum(part.size for part in self.parts))
    def _fetch_range(self, start, end):
        data = b""
        for part in self.parts:
            data += part.read(max(0, min(end, part.size) - part.seek(min(max(start, 0), part.size))))
            start, end = start - part.size, end - part.size  # counted from where the next part begins
        return data

@functools.cache  # once per process: the directory of iSign's archive has 127,237 entries
def open_poses(url, token):
    """Where the poses are (parts of a zip, a zip, or a folder; local or hf://) -> a function: uid -> .pose bytes."""
    fs, pattern = fsspec.core.url_to_fs(url, **({"token": token} if url.startswith("hf://") else {}))
    folder = fs.isdir(pattern)
    paths = sorted(fs.glob(f"{pattern}/*.pose" if folder else pattern))
    if not paths:
        raise SystemExit(f"error: no poses at {url}; set POSES to the parts of a zip, a zip, or a folder of .pose")
    files = {pathlib.Path(path).stem: path for path in paths}
    if not folder:
        try:
            parts = JoinedParts(fs, paths)
            files = {pathlib.Path(info.filename).stem: info for info in zipfile.ZipFile(parts).infolist()}
        except (zipfile.BadZipFile, ValueError) as error:
            raise SystemExit(f"error: {', '.join(paths)} do not make up one zip ({error}); is a part missing?")
    def read(uid):
        if uid not in files:
            raise BadClip("no .pose file")
        file = files[uid]
        if (fs.size(file) if folder else max(file.file_size, file.compress_size)) > MAX_POSE_BYTES:
            raise BadClip("too large")
        if folder:
            return fs.cat_file(file)
        start, length = file.header_offset, 30 + len(file.orig_filename.encode()) + 256 + file.compress_size
        data = parts._fetch_range(start, min(start + length, parts.size))  # all that there is of it, by one request
        begin = 30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
        data = memoryview(data)[begin:begin + file.compress_size]
        data = zlib.decompressobj(-15).decompress(data, file.file_size) if file.compress_type else bytes(data)
        if zlib.crc32(data) != file.CRC:
            raise BadClip("damaged in the archive")
        return data
    return read

def read_keypoints(data):
    """The bytes of a .pose file -> keypoints (frames, K, 2), NaN = not seen, and its frames per second. The origin is
    the median midpoint of the shoulders, the unit their median distance: one pair for the whole clip."""
    try:
        reader = pose_format.utils.reader.BufferReader(data)
        header = PoseHeader.read(reader)
        frames = int.from_bytes(data[reader.read_offset + 2:reader.read_offset + 4], "little")  # v0.1's, modulo 2 ** 16
        body = NumPyPoseBody.read(header, reader)
        points, confidence, fps = body.data.data[:, 0], body.confidence[:, 0], float(body.fps)
    except Exception as error:  # whatever the library's parser meets in a file that is none
        raise BadClip("not a readable .pose file") from error
    # The library takes the number of a v0.1 file's frames from its length, and so misreads one that was cut.
    if round(header.version, 3) == 0.1 and len(points) % 2**16 != frames or reader.read_offset != len(data):
        raise BadClip("cut short")
    column = {name: i for i, name in enumerate((part.name, name) for part in header.components for name in part.points)}
    columns = np.array([column.get(point, -1) for point in POINTS])
    keypoints = points.take(columns, 1)[..., :2]
    keypoints[~(confidence.take(columns, 1) > 0) | (columns < 0)] = np.nan
    shoulders = keypoints[np.isfinite(keypoints[:, SHOULDERS]).all((1, 2))][:, SHOULDERS]
    width = np.median(np.linalg.norm(shoulders[:, 0] - shoulders[:, 1], axis=-1)) if len(shoulders) else 0
    if width == 0 or not 1 <= fps <= 1000:
        raise BadClip("no shoulders" if width == 0 else "no frame rate")
    return (keypoints - np.median(shoulders.mean(1), 0)) / width, fps

def row_keypoints(pose):
    """A row's `pose` (frames, D), NaN or an exact (0, 0) = not seen -> keypoints (frames, K, 2)."""
    keypoints = np.asarray([np.asarray(frame) for frame in pose], np.float32).reshape(len(pose), -1, 2)
    return np.where((keypoints == 0).all(-1, keepdims=True), np.nan, keypoints)

def resample(keypoints, n):
    """(frames, K, 2) -> (n, K, 2) by linear interpolation; a point is seen where the nearest frame has seen it."""
    at = np.linspace(0, len(keypoints) - 1, n)
    low = at.astype(int)
    part = (at - low).astype(np.float32)[:, None, None]
    before, after = keypoints[low], keypoints[np.minimum(low + 1, len(keypoints) - 1)]
    between = before * (1 - part) + after * part
    return np.where(np.isnan(between), np.where(part < 0.5, before, after), between)

def prepare_clip(row, poses, token, fps, max_frames, pose_dim):
    """A row -> an example of CLIP; one that cannot be used has a problem, and no pose."""
    clip = {"gloss": row["gloss"], "problem": "", "seconds": 0, "pose": np.empty(0, np.float32)}
    try:
        keypoints, source_fps = ((row_keypoints(row["pose"]), fps) if "pose" in row else
                                 read_keypoints(open_poses(poses, token)(str(row["uid"]))))
        if len(keypoints) and keypoints.shape[1] * 2 != pose_dim:
            raise SystemExit(f"error: POSE_DIM is {pose_dim}; the data has {keypoints.shape[1] * 2} numbers a frame")
        far = ~(np.hypot(keypoints[..., 0], keypoints[..., 1]) <= FAR)  # and what is infinite or unseen
        if (far & np.isfinite(keypoints).all(-1)).sum() > (~far).sum():
            raise BadClip(f"most points beyond {FAR} shoulder widths")
        keypoints[far] = np.nan
        seconds = len(keypoints) / source_fps
        pose = resample(keypoints, max(1, min(max_frames, round(seconds * fps)))) if seconds else keypoints
        if np.isnan(pose).all():
            raise BadClip("nothing seen")
        return {**clip, "seconds": seconds, "pose": pose.ravel()}
    except (BadClip, TypeError, ValueError, zlib.error) as problem:  # a pose that is no table, a damaged archive
        return {**clip, "problem": str(problem) if isinstance(problem, BadClip) else "not readable"}

def prepare_chunk(job):
    """(path, rows, how) -> the number of the rows, which are in the Arrow file `path` now, or a line: what is wrong."""
    (path, rows, how), file = job, io.BytesIO()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on, in a process of its own
    try:
        writer = datasets.arrow_writer.ArrowWriter(stream=file, features=CLIP)
        for row in rows.with_format("numpy") if "pose" in rows.features else rows:
            writer.write(prepare_clip(row, **how))
        writer.finalize(close_stream=False)
        write_whole(path, file.getbuffer(), f".{os.getpid()}")
        return len(rows)
    except SystemExit as error:
        return str(error)
    except (OSError, huggingface_hub.errors.HTTPError) as error:  # after the hub library's own tries
        return f"error: the poses cannot be read any more; what was prepared stays: {error!s:.200}".partition("\n")[0]

def state_of(*patterns):
    """Patterns of local paths -> a digest of the files' paths, sizes and times; [] where there are none."""
    files = sorted(path for pattern in patterns for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    state = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
    return state and hashlib.sha256(repr(state).encode()).hexdigest()[:32]

def prepare(rows, contents, state, processes, how):
    """Rows (a Dataset of gloss, and pose or uid) -> prepared clips, in chunks that the cache of `datasets` keeps."""
    folder, chunks, missing = pathlib.Path(datasets.config.HF_DATASETS_CACHE, "gloss_to_pose"), [], []
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, max(1, len(rows)), CHUNK):  # so that no rows are a Dataset, too
        part = range(start, min(start + CHUNK, len(rows)))
        stamp = repr((POINTS, FAR, state, sorted({**how, "token": 0}.items()), contents[part.start:part.stop]))
        chunks.append(folder / f"{hashlib.sha256(stamp.encode()).hexdigest()[:32]}.arrow")
        if not chunks[-1].exists():
            missing.append((chunks[-1], rows.select(part), how))
    with tqdm(total=sum(len(job[1]) for job in missing), desc="preparing", unit=" clips", disable=None) as bar:
        workers = min(processes, len(missing)) * (processes > 1)  # spawned: a fork takes over threads and connections
        for done in DataLoader(missing, None, num_workers=workers, collate_fn=prepare_chunk,
                               multiprocessing_context="spawn" if workers else None):
            if isinstance(done, str):
                raise SystemExit(done)
            bar.update(done)
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in chunks])

def split_by_video(videos, share):
    """Videos of the clips -> the set of those that validate, by the hash of their id; at least one on either side."""
    shares = {video: random.Random(video).random() for video in videos}
    order = sorted(shares, key=shares.get)
    if len(order) < 2:
        raise SystemExit("error: the clips are of a single video, so that there is nothing to validate on")
    return set(order[:min(max(1, sum(x < share for x in shares.values())), len(order) - 1)])

def draw_subset(videos, clips):
    """Videos of the clips -> the set of those that hold at least `clips` clips (0: all), the same ones every time."""
    sizes = collections.Counter(videos)
    order = sorted(sizes, key=lambda video: random.Random(f"subset {video}").random())
    return set(order[:np.cumsum([0, *(sizes[video] for video in order)]).searchsorted(clips or len(videos))])

def load_rows(dataset, config, token, state):
    """The data set -> a Dataset with the columns gloss, and pose or uid; and each row's split, or None."""
    cache = f"{datasets.config.HF_DATASETS_CACHE}/local_{state}" if state else None  # the library's forgets the path
    found = {"train": sample_rows(320, 1), "validation": sample_rows(80, 2)} if dataset == "sample" else None
    for offline in (True, datasets.config.HF_HUB_OFFLINE):  # what lies in the cache is not asked for again
        datasets.config.HF_HUB_OFFLINE = offline
        try:
            found = found or datasets.load_dataset(dataset, config, token=token, cache_dir=cache)
        except Exception as error:  # of the library, which has many kinds
            problem = str(error).strip()
    if found is None:
        raise SystemExit(f"error: cannot load DATASET {dataset!r}, CONFIG {config!r}: {problem.splitlines()[0]}. Check "
                         "the name, the network, HF_TOKEN, and that its owner accepted the data set's terms")
    own = next((split for split in ("validation", "valid", "val", "dev") if split in found), None)
    parts = [found[split] for split in ("train", own) if split in found]
    has = set.intersection(*({name for name, kind in part.features.items() if name == "pose" or isinstance(
        kind, datasets.Value)} for part in parts)) if "train" in found else set()
    text, pose = ("gloss" if "gloss" in has else "text"), ("pose" if "pose" in has else "uid")
    if not {text, pose} <= has:
        raise SystemExit(f"error: DATASET {dataset!r} needs a split train with gloss or text, and pose or uid; it has "
                         f"{', '.join(found)} with {', '.join(sorted(has))}")
    parts = [part.select_columns(sorted({text, pose, "uid"} & has)) for part in parts]
    rows = datasets.concatenate_datasets(parts).rename_columns({text: "gloss"} if text == "text" else {})
    return rows, ["train"] * len(parts[0]) + ["validation"] * len(parts[-1]) if own else None

def load_clips(settings):
    """The data set -> {"train": Dataset of usable CLIPs, "validation": ...}, and its name. Prints what there is."""
    token = os.environ.get("HUGGINGFACE_HUB_TOKEN") or huggingface_hub.get_token()  # which does not read this variable
    dataset, poses = str(settings.DATASET), str(settings.POSES)
    if dataset == ISIGN and token is None:
        print("!" * 100, f"!!  NO ACCESS TOKEN: {ISIGN} is gated, so what follows is NOT iSign, but an embedded,",
              "!!  synthetic SAMPLE. For iSign accept its terms, set HF_TOKEN (see the README).", "!" * 100, sep="\n")
        dataset = "sample"
    poses = poses if glob.glob(poses) else os.path.join(dataset, poses)
    poses = os.path.abspath(poses) if glob.glob(poses) or os.path.isdir(dataset) else f"hf://datasets/{poses}"
    how = dict(poses=poses, token=token, fps=settings.FPS, max_frames=settings.MAX_FRAMES, pose_dim=settings.POSE_DIM)
    state = state_of(os.path.join(glob.escape(dataset), "**"))
    rows, splits = load_rows(dataset, settings.CONFIG, token, state)
    state = (state or rows._fingerprint) if "pose" in rows.features else state_of(poses, os.path.join(poses, "*.pose"))
    left_out, usable, clips, drawn = collections.Counter(), {}, {}, {}
    has_uid, origin, glosses = "uid" in rows.features, "the data's own splits", rows["gloss"][:]
    uids = [i if uid is None else uid for i, uid in enumerate(rows["uid"][:] if has_uid else [None] * len(rows))]
    videos = [video_of(str(uid)) for uid in uids]
    if splits is None:
        origin, held = f"split by {'video' if has_uid else 'row'}", split_by_video(videos, settings.VALIDATION_SHARE)
        splits = ["validation" if video in held else "train" for video in videos]
    for i, (clip, gloss) in enumerate(zip(zip(uids, splits), glosses)):
        if not split_glosses(gloss) or gloss == "nan ":
            left_out["no text"] += 1
        elif usable.setdefault(clip, i) != i:
            left_out["uid twice"] += 1
    for split, limit in [("train", settings.TRAIN_CLIPS), ("validation", settings.VALIDATION_CLIPS)]:
        drawn[split] = draw_subset([videos[i] for i in usable.values() if splits[i] == split], limit)
    chosen = [i for i in usable.values() if videos[i] in drawn[splits[i]]]  # of both: the cache knows no split
    prepared = prepare(rows.select(chosen), [(uids[i], glosses[i]) for i in chosen], state, settings.PROCESSES, how)
    problems = prepared["problem"][:]
    for split in drawn:
        numbers = [n for n, i in enumerate(chosen) if splits[i] == split]
        clips[split] = prepared.select([n for n in numbers if not problems[n]])
        bad = collections.Counter(problems[n] for n in numbers if problems[n])
        left_out += bad
        if not len(clips[split]) or bad.total() > settings.MAX_BAD_SHARE * len(numbers):
            raise SystemExit(f"error: too few of {len(numbers)} {split} clips can be used (MAX_BAD_SHARE): {dict(bad)}")
    both = f"{len(drawn['train'] & drawn['validation'])} videos in both" if has_uid else "no uid names the videos"
    seconds = np.concatenate([part["seconds"][:] for part in clips.values()])
    cut = sum(len(split_glosses(text)) > settings.MAX_GLOSS_LEN for part in clips.values() for text in part["gloss"][:])
    name = "sample data" if dataset == "sample" else dataset
    print(f"data               {name}\n"
          f"  clips            {len(clips['train'])} train, {len(clips['validation'])} validation ({origin}; {both})\n"
          f"  left out         {', '.join(f'{n} {reason}' for reason, n in left_out.most_common()) or 'none'}\n"
          f"  glosses cut      in {cut} sentences of more than {settings.MAX_GLOSS_LEN}\n  clips resampled  "
          f"{sum(np.round(seconds * settings.FPS) > settings.MAX_FRAMES)} of more than {settings.MAX_FRAMES} frames")
    return clips, name

def sample_rows(n, seed):
    """A synthetic Dataset of n rows, the same in every run: sentences of 1 to 4 glosses that flow into each other."""
    words = "HELLO I YOU WANT GO SCHOOL HOUSE WATER EAT BOOK TEACHER GOOD NOT UNDERSTAND FAMILY WORK".split()
    head = """-.75j .1-.86j -.1-.86j .21-.8j -.21-.8j -.1-.55j .1-.55j -.5j -.58j -.18-.94j -.12-.97j -.05-.94j .18-.94j
        .12-.97j .05-.94j -.14-.86j -.1-.88j -.17-.85j -.14-.83j -.1-.83j -.06-.85j .14-.86j .1-.88j .17-.85j .14-.83j
        .1-.83j .06-.85j -.92j"""
    head, fan = np.array(head.split(), complex), np.exp(0.25j * np.arange(-2, 3))[:, None] * np.linspace(0.1, 0.34, 4)
    rest, rng, rows = np.array([0.45, 1.3, 1.4, 0.8, 0.9, 1, 0.9, 0.8]), np.random.default_rng(0), []
    # Three moments of each sign, for the left and the right arm: the wrist, the hand's turn, how far its fingers reach
    signs = rng.uniform([-0.1, -0.5, -2.2] + [0.2] * 5, [0.7, 0.9, -0.6] + [1] * 5, (len(words), 3, 2, 8))
    signs[::3, :, 0], signs[1::3, :, 0], signs[2::3, :, 0] = signs[::3, :, 1], rest, rest  # one in three is two-handed
    rng, still = np.random.default_rng([seed, 1000]), [[rest, rest]]
    for _ in range(n):
        said = rng.integers(0, len(words), rng.integers(1, 5))
        moments = np.concatenate([still, *(signs[said] + rng.normal(0, 0.03, (len(said), 3, 2, 8))), still])
        times = np.cumsum([0, *[0.25, 0.35, 0.35] * len(said), 0.3]) / rng.uniform(0.8, 1.25)
        at = np.arange(0, times[-1], 1 / 25)
        before = np.searchsorted(times, at, side="right") - 1
        part = (0.5 - 0.5 * np.cos(np.pi * (at - times[before]) / np.diff(times)[before]))[:, None, None]
        arms = moments[before] * (1 - part) + moments[before + 1] * part  # (frames, 2 arms, 8)
        wrist = arms[..., :1] + 1j * arms[..., 1:2]  # x grows outwards, y downwards; the shoulder is at 0.5
        fingers = wrist[..., None] + fan * (np.exp(1j * arms[..., 2:3]) * arms[..., 3:])[..., None]
        sides = np.concatenate([0.5 + 0 * wrist, 0.62 + 0.55j + wrist / 5, wrist, fingers.reshape(-1, 2, 20)], 2)
        sides[:, 1] = -sides[:, 1].conj()
        body, face = sides[:, :, :3].swapaxes(1, 2).reshape(-1, 6), np.tile(head, (len(at), 1))
        pose = np.concatenate([sides[:, 0, 2:], sides[:, 1, 2:], face[:, :5], body, face[:, 5:]], 1).view(float)
        pose[(lost := rng.integers(0, 4 * len(at))):lost + 8, 42:84] = np.nan  # in every fourth clip: out of sight
        rows.append({"gloss": " ".join(words[i] for i in said), "pose": pose + rng.normal(0, 0.004, pose.shape)})
    return datasets.Dataset.from_list(rows)

# ---- from clips to batches
class Tokens:
    """Gloss sentences -> tokens: numbers of the training split's glosses (`vocabulary`, which begins with <pad> and
    <unk>), or the word pieces of a pretrained encoder (`tokenizer`, its JSON); B sentences -> (B, S), mask (B, S)."""
    def __init__(self, vocabulary, tokenizer, max_gloss_len):
        self.number = {gloss: i for i, gloss in enumerate(vocabulary)}
        self.max_gloss_len, self.pieces = max_gloss_len, None
        if tokenizer:
            with tempfile.NamedTemporaryFile("w", encoding="utf8") as file:
                print(tokenizer, file=file, flush=True)
                self.pieces = transformers.PreTrainedTokenizerFast(tokenizer_file=file.name)
    def __call__(self, sentences):
        rows = [split_glosses(sentence)[:self.max_gloss_len] for sentence in sentences]
        if self.pieces:  # lower case, as pretrained encoders know their words
            rows = self.pieces([" ".join(words).lower() for words in rows], truncation=True,
                               max_length=4 * self.max_gloss_len)["input_ids"]
        else:
            rows = [[self.number.get(gloss, UNK) for gloss in words] for words in rows]
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)
        return tokens, torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]

def collate(clips, tokens, pose_dim):
    """Clips -> a batch. Frames behind a clip's end are NaN, as points that were not seen are."""
    poses = [torch.tensor(clip["pose"]).view(-1, pose_dim) for clip in clips]
    token_ids, token_mask = tokens([clip["gloss"] for clip in clips])
    return {"tokens": token_ids, "token_mask": token_mask, "n_frames": torch.tensor([len(pose) for pose in poses]),
            "seconds": torch.tensor([float(clip["seconds"]) for clip in clips]),
            "pose": nn.utils.rnn.pad_sequence(poses, batch_first=True, padding_value=math.nan)}  # (B, T, D)

def make_loaders(clips, tokens, settings, workers=0, rank=0, world=1):
    """{split: clips} -> {split: loader of this process's share}; the order depends on the seed and the epoch alone."""
    make = functools.partial(collate, tokens=tokens, pose_dim=settings.POSE_DIM)
    return {split: DataLoader(
        part.with_format("numpy"), settings.BATCH_SIZE // world, num_workers=workers, persistent_workers=workers > 0,
        sampler=DistributedSampler(part, world, rank, split == "train", settings.SEED), collate_fn=make,
        pin_memory=torch.cuda.is_available(), generator=torch.Generator()) for split, part in clips.items()}

def batches(loader, device):
    """The loader's batches on the device, but for n_frames: so the host knows the longest clip without waiting."""
    sampler = loader.sampler
    for i, batch in enumerate(loader, 1):
        if i == len(loader) and sampler.num_replicas * (len(sampler) - 1) + sampler.rank >= len(loader.dataset):
            batch["pose"][-1] = batch["seconds"][-1] = math.nan  # repeated, so that all processes have as many: unseen
        yield {name: x if name == "n_frames" else x.to(device, non_blocking=True) for name, x in batch.items()}

def training_statistics(clips, settings):
    """One pass over the training clips -> the statistics that a model keeps, and the vocabulary."""
    (total, squares, count), words, frames, seconds = np.zeros((3, settings.POSE_DIM)), collections.Counter(), 0, 0.0
    for rows in clips.with_format("numpy").iter(CHUNK):
        pose = np.concatenate(list(rows["pose"])).reshape(-1, settings.POSE_DIM).astype(np.float64)
        total += np.nansum(pose, 0)
        squares += np.nansum(pose**2, 0)
        count += np.isfinite(pose).sum(0)
        frames, seconds = frames + len(pose), seconds + rows["seconds"].sum(dtype=np.float64)
        words.update(word for gloss in rows["gloss"] for word in split_glosses(gloss)[:settings.MAX_GLOSS_LEN])
    mean = total / count.clip(1)  # of a point that no clip shows: 0, with a deviation of 1
    deviation = np.sqrt((squares / count.clip(1) - mean**2).clip(0))
    kept = sorted(word for word, n in words.items() if n >= settings.MIN_GLOSS_COUNT)
    print(f"  vocabulary       {len(kept)} glosses; {len(words) - len(kept)} rarer ones are <unk>\n"
          f"  points unseen    {100 * (1 - count.sum() / frames / len(mean)):.1f} % in the training clips")
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
        self.there, self.back = (nn.GRU(inputs, (outputs + i) // 2, batch_first=True) for i in range(2))
    def forward(self, x, mask):
        steps, lengths = torch.arange(x.shape[1], device=x.device), mask.sum(1, keepdim=True)
        turned = torch.where(steps < lengths, lengths - 1 - steps, steps)[..., None]
        back = self.back(x.gather(1, turned.expand_as(x)))[0]
        return torch.cat([self.there(x)[0], back.gather(1, turned.expand_as(back))], -1)

class PoseModel(nn.Module):
    """What the models share. Every gloss predicts a duration; their running sums give it its stretch of the time line,
    and a frame reads the encoder through a soft window around it. All frames are decoded in one call."""
    title, learning_rate = "GRU", "LR_GRU"
    def __init__(self, states_dim, query_dim, pose_dim, max_frames, fps, dropout, word_dropout):
        super().__init__()
        self.max_frames, self.fps, self.word_dropout = max_frames, fps, word_dropout
        self.duration = nn.Sequential(nn.Linear(states_dim, states_dim), nn.ReLU(), nn.Linear(states_dim, 1))
        self.log_softness = nn.Parameter(torch.tensor(-2.0))  # of a window's borders, in mean glosses
        self.query, self.output = nn.Linear(states_dim + 33, query_dim), nn.Linear(query_dim, pose_dim)
        self.dropout = nn.Dropout(dropout)
        for name in ("mean", "deviation", "seen"):  # see training_statistics
            self.register_buffer(name, torch.ones(pose_dim))
        self.register_buffer("seconds_per_gloss", torch.ones(()))
    def forward(self, tokens, token_mask, n_frames=None):
        """tokens, token_mask (B, S), n_frames (B,), None: by the predicted duration -> pose, seconds."""
        states = self.encode(tokens, token_mask)  # (B, S, H)
        raw = self.duration(states).squeeze(-1).float() + math.log(math.e - 1)  # so that durations begin at 1
        durations = nn.functional.softplus(raw) * token_mask  # (B, S) in mean glosses
        seconds = durations.sum(1) * self.seconds_per_gloss
        n_frames = self.frames(seconds) if n_frames is None else n_frames
        longest, n_frames = int(n_frames.max()), n_frames.to(tokens.device, non_blocking=True)[:, None]
        step = torch.arange(longest, device=tokens.device)
        queries = self.place(states, token_mask, durations, step / self.max_frames, step / (n_frames - 1).clamp(min=1))
        hidden = self.decode(self.dropout(queries), step < n_frames, states, token_mask)
        pose = (self.output(self.dropout(hidden)).float() * self.deviation + self.mean) * (step < n_frames)[..., None]
        return nn.functional.pad(pose, (0, 0, 0, self.max_frames - longest)), seconds
    def frames(self, seconds):
        return (seconds * self.fps).round().long().clamp(1, self.max_frames)
    def embed(self, tokens):
        if self.training:  # some glosses are <unk>, so that the others are not learned by heart together
            dropped = torch.rand(tokens.shape, device=tokens.device) < self.word_dropout
            tokens = tokens.masked_fill(dropped & (tokens != PAD), UNK)
        return self.embedding(tokens)
    def place(self, states, token_mask, durations, time, phase):
        """time (T,), phase (B, T): 0 at a clip's first frame, 1 at its last -> queries (B, T, H)."""
        ends = durations.cumsum(1)
        at = (phase.clamp(max=1) * ends[:, -1:])[..., None]
        starts, ends = (ends - durations)[:, None], ends[:, None]
        nearness = sum(nn.functional.logsigmoid(x / self.log_softness.exp()) for x in (at - starts, ends - at))
        window = nearness.masked_fill(~token_mask[:, None], -math.inf).softmax(-1)  # (B, T, S)
        within = ((at - starts) / durations[:, None].clamp(min=0.01)).clamp(-0.5, 1.5)
        position = (window[..., None] * waves(within)).sum(2)
        return self.query(torch.cat([window.to(states.dtype) @ states, position, waves(phase),
                                     waves(time).expand(*phase.shape, -1)], -1))

class GRUModel(PoseModel):
    """A bidirectional GRU over the glosses, another one over the frames, which adds to its input."""
    def __init__(self, vocabulary, embed_dim, hidden_dim, dropout, **sizes):
        super().__init__(hidden_dim, hidden_dim, dropout=dropout, **sizes)
        self.embedding = nn.Embedding(vocabulary, embed_dim, PAD)
        self.encoder, self.decoder = TwoWayGRU(embed_dim, hidden_dim), TwoWayGRU(hidden_dim, hidden_dim)
    def encode(self, tokens, token_mask):
        return self.dropout(self.encoder(self.dropout(self.embed(tokens)), token_mask))
    def decode(self, queries, frame_mask, states, token_mask):
        return queries + self.decoder(queries, frame_mask)

class TransformerModel(PoseModel):
    """A pre-norm Transformer: the frames' queries attend to each other and to all glosses."""
    title, learning_rate = "Transformer", "LR_TRANSFORMER"
    def __init__(self, vocabulary, embed_dim, hidden_dim, dropout, **sizes):
        super().__init__(embed_dim, embed_dim, dropout=dropout, **sizes)
        self.embedding, self.order = nn.Embedding(vocabulary, embed_dim, PAD), nn.Linear(11, embed_dim)
        warnings.filterwarnings("ignore", "enable_nested_tensor")  # which does not go with norm_first
        self.core = nn.Transformer(embed_dim, math.gcd(4, embed_dim), 3, 3, hidden_dim, dropout, batch_first=True,
                                   norm_first=True)
        for weight in [w for name, w in self.core.named_parameters() if re.search("out_proj|linear2", name)]:
            nn.init.zeros_(weight)  # every layer begins as the identity, and so learns from the first steps on
    def encode(self, tokens, token_mask):
        order = self.order(waves(torch.arange(tokens.shape[1], device=tokens.device) / 32))
        return self.core.encoder(self.dropout(self.embed(tokens) + order), src_key_padding_mask=~token_mask)
    def decode(self, queries, frame_mask, states, token_mask):
        return self.core.decoder(queries, states, tgt_key_padding_mask=~frame_mask, memory_key_padding_mask=~token_mask)

class BertModel(GRUModel):
    """A pretrained encoder, whose word pieces take the place of the glosses, with the GRU decoder."""
    title = "BERT"
    def __init__(self, bert_config, vocabulary, embed_dim, hidden_dim, dropout, **sizes):
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
    """-> a fresh model (BERT's from BERT_NAME), its Tokens, and what a checkpoint needs to build both again."""
    spelling = {"vocabulary": vocabulary, "tokenizer": "", "max_gloss_len": settings.MAX_GLOSS_LEN}
    names = "EMBED_DIM", "HIDDEN_DIM", "DROPOUT", "WORD_DROPOUT", "POSE_DIM", "MAX_FRAMES", "FPS"
    args = {"vocabulary": len(vocabulary), **{name.lower(): getattr(settings, name) for name in names}}
    if name == "bert":
        try:
            pretrained = transformers.AutoModel.from_pretrained(str(settings.BERT_NAME), dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(settings.BERT_NAME))
            spelling["tokenizer"] = tokenizer.backend_tokenizer.to_str()
            pretrained(input_ids=torch.zeros(1, 4 * settings.MAX_GLOSS_LEN, dtype=torch.long)).last_hidden_state
            if not len(tokenizer.all_special_ids) < len(tokenizer) <= pretrained.get_input_embeddings().num_embeddings:
                raise ValueError("the tokenizer is missing or of another model")
        except Exception as error:  # of the library, which has many kinds
            raise SystemExit(f"error: BERT_NAME {settings.BERT_NAME!r} is no hub id that can be reached, and no folder "
                             f"with an encoder and its tokenizer ({error!s:.200}".partition("\n")[0] + ")")
        args["bert_config"] = pretrained.config.to_dict()
        statistics = statistics | {f"pretrained.{key}": value for key, value in pretrained.state_dict().items()}
    model = MODELS[name](**args)
    model.load_state_dict(statistics, strict=False)  # the other weights are fresh, and BERT's pooler is left out
    return model, Tokens(**spelling), {"model": name, "model_args": args, "tokens": spelling}

# ---- training
def pose_difference(pose, target):
    """pose (B, max_frames, D), target (B, T, D) -> pose - target, 0 where it was not seen, and where it was."""
    seen = target.isfinite()
    return torch.where(seen, pose[:, :target.shape[1]] - target, 0), seen

def speeds(pose):
    """(B, T, D) -> (B, T - 1, K): how far each point moves in a frame; NaN where it was not seen before and after."""
    return (pose.diff(dim=1).unflatten(-1, (-1, 2)).square().sum(-1) + 1e-8).sqrt()  # whose gradient is finite at 0

def summed(sums):
    """A tensor -> its sum over the processes that torchrun started; it is written over."""
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums

def training_loss(model, batch, settings):
    """-> the loss: masked MSE over the variance of the training poses, relative squared error of the points' speeds,
    which an average of clips misses, squared error of the log duration; and the MSE's sum of squares and count."""
    pose, seconds = model(batch["tokens"], batch["token_mask"], batch["n_frames"])
    difference, seen = pose_difference(pose, batch["pose"])
    real, clip = speeds(batch["pose"]), batch["seconds"].isfinite()
    slow = torch.where(real.isfinite(), speeds(pose[:, :seen.shape[1]]) - real, 0)
    late = torch.where(clip, seconds.clamp(min=0.001).log() - batch["seconds"].log(), 0)
    squares = torch.stack([x.square().sum() for x in (difference, slow, late)])
    counts = summed(torch.stack([seen.sum(), real.square().nansum(), clip.sum(), torch.ones_like(clip.sum())]))
    mse, slow, late = squares / (counts[:3] / counts[3]).clamp(min=1e-6)  # since the processes' gradients are averaged
    model = getattr(model, "module", model)  # within DistributedDataParallel
    variance = (model.deviation**2 * model.seen).sum() / model.seen.sum()
    loss = mse / variance + settings.SPEED_WEIGHT * slow + settings.DURATION_WEIGHT * late
    return loss, squares[0].detach(), seen.sum()

class Trainer:
    """A model in training, and `averaged`, the moving average of its weights, which is what is evaluated and saved."""
    def __init__(self, model, steps, settings, precision=torch.float32):
        self.model, self.settings, self.device, self.precision = model, settings, model.mean.device, precision
        self.averaged = copy.deepcopy(model).requires_grad_(False).to(self.device)  # which lays GRUs out for cuDNN anew
        self.parallel = DistributedDataParallel(model, forward_sync_buffers=False) if dist.is_initialized() else model
        self.optimizer = torch.optim.AdamW([{"lr": rate, "params": [
            value for name, value in model.named_parameters() if name.startswith("pretrained.") == pretrained]}
            for pretrained, rate in enumerate([getattr(settings, model.learning_rate), settings.LR_BERT])], fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(
            1, (step + 1) / max(1, settings.WARMUP * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision != torch.float32)
    def epoch(self, loaders, number):
        """One epoch and its validation, reported by a line of fixed width -> the metrics."""
        began, label = time.time(), f"{self.model.title} epoch {number}/{self.settings.EPOCHS}"
        metrics = {"epoch": number, "train_mse": self.train(loaders["train"], number, label),
                   "learning_rate": self.schedule.get_last_lr()[0],
                   **evaluate(self.averaged, loaders["validation"], self.device), "seconds": time.time() - began}
        print("{0:<23} train mse {train_mse:8.5f}   val mse {val_mse:8.5f}   mae {val_mae:7.5f}   motion {motion:5.2f}"
              "   duration error {duration_error:5.2f} s   {seconds:6.1f} s".format(label, **metrics), flush=True)
        return metrics
    def train(self, loader, epoch, label):
        """One pass over the training clips -> their MSE on the way. SystemExit where the loss is not finite."""
        self.model.train()
        loader.sampler.set_epoch(epoch)
        torch.manual_seed(self.settings.SEED + 1000003 * epoch + loader.sampler.rank)  # by epoch, for --resume
        sums, bad = torch.zeros(2, device=self.device, dtype=torch.float64), torch.tensor(-1, device=self.device)
        bar = tqdm(batches(loader, self.device), label, len(loader), leave=False, file=sys.stdout, disable=None)
        for i, batch in enumerate(bar):
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                loss, squares, count = training_loss(self.parallel, batch, self.settings)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.GRAD_CLIP or math.inf)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            step = self.schedule.last_epoch  # the average's memory grows with the steps, up to 1 / (1 - average)
            follow = torch.optim.swa_utils.get_ema_multi_avg_fn(min(self.settings.AVERAGE, (1 + step) / (10 + step)))
            follow(list(self.averaged.parameters()), list(self.model.parameters()), step)
            sums += torch.stack([squares, count]).double()
            bad = torch.where((bad < 0) & ~loss.isfinite(), i, bad)  # the first one
            if (i % 20 == 19 or i + 1 == len(loader)) and (first := bad.item() + 1) > 0:  # seldom: the host waits here
                raise SystemExit(f"error: the loss of {label}, batch {first} is not finite: lower the learning rate")
        squares, count = summed(sums).tolist()
        return squares / max(count, 1)

@torch.no_grad()
def evaluate(model, loader, device):
    """-> the metrics over real frames and seen points, at real lengths: val_mse, val_mae, mean_pose_mse in (squared)
    shoulder widths; motion, the path of the generated hands over that of the real ones; duration_error in seconds."""
    model.eval()
    sums = torch.zeros(8, device=device, dtype=torch.float64)
    moving = [point for point in HANDS_AND_WRISTS if point < model.mean.numel() // 2]
    for batch in batches(loader, device):
        pose, seconds = model(batch["tokens"], batch["token_mask"], batch["n_frames"])
        difference, seen = pose_difference(pose, batch["pose"])
        at_mean, _ = pose_difference(model.mean.expand_as(pose), batch["pose"])
        steps = [speeds(x[:, :seen.shape[1]])[..., moving] for x in (pose, batch["pose"])]
        sums += torch.stack([difference.square().sum(), difference.abs().sum(), at_mean.square().sum(), seen.sum(),
                             torch.where(steps[1].isfinite(), steps[0], 0).sum(), steps[1].nansum(),
                             (seconds - batch["seconds"]).abs().nansum(), batch["seconds"].isfinite().sum()]).double()
    squares, absolute, at_mean, count, generated, real, late, clips = summed(sums).tolist()
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
            best = metrics
            write_whole(f"selection_{name}.pt", {**built, "metrics": best, "weights": trainer.averaged.state_dict()})
        if epoch - best["epoch"] >= settings.PATIENCE:
            break
    return best

def main():
    settings = read_settings(globals())
    if not isinstance(CANDIDATES, list) or not CANDIDATES or not set(CANDIDATES) <= MODELS.keys():
        raise SystemExit(f"error: CANDIDATES = {CANDIDATES!r} makes no sense: name some of {', '.join(MODELS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clips, data = load_clips(settings)
    statistics, vocabulary = training_statistics(clips["train"], settings)
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
    except torch.OutOfMemoryError:
        sys.exit(f"error: GPU full at {torch.cuda.max_memory_allocated() >> 20} MB; lower BATCH_SIZE = {BATCH_SIZE}")
    except OSError as error:  # the disk is full, a folder cannot be written, ...
        sys.exit(f"error: {error}")
