"""What the tests make: .pose files, data sets in iSign's layout, a tiny BERT, edited scripts."""

import ast
import csv
import faulthandler
import io
import os
import re
import resource
import signal
import struct
import sys
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import torch
import transformers
from pose_format.numpy import NumPyPoseBody
from pose_format.pose_header import PoseHeader, PoseHeaderComponent, PoseHeaderDimensions

import model_selection
import train_final_model

ROOT = Path(__file__).parents[1]
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")

# MediaPipe Holistic, in the order of its own documentation
SIDES = ("LEFT", "RIGHT")
EYES = [f"{side}_EYE{where}" for side in SIDES for where in ("_INNER", "", "_OUTER")]
PAIRS = ["SHOULDER", "ELBOW", "WRIST", "PINKY", "INDEX", "THUMB"]
PAIRS += ["HIP", "KNEE", "ANKLE", "HEEL", "FOOT_INDEX"]
BODY = ["NOSE", *EYES, "LEFT_EAR", "RIGHT_EAR", "MOUTH_LEFT", "MOUTH_RIGHT"]
BODY += [f"{side}_{pair}" for pair in PAIRS for side in SIDES]
HAND = ["WRIST", "THUMB_CMC", "THUMB_MCP", "THUMB_IP", "THUMB_TIP"]
for finger in ("INDEX_FINGER", "MIDDLE_FINGER", "RING_FINGER", "PINKY"):
    HAND += [f"{finger}_MCP", f"{finger}_PIP", f"{finger}_DIP", f"{finger}_TIP"]
PARTS = ["POSE", "FACE", "LEFT_HAND", "RIGHT_HAND", "POSE_WORLD"]
POSE, FACE, LEFT, RIGHT, WORLD = (f"{part}_LANDMARKS" for part in PARTS)
NAMES = {POSE: BODY, FACE: [str(i) for i in range(478)], LEFT: HAND, RIGHT: HAND, WORLD: BODY}
LAYOUTS = {
    576: {POSE: 33, FACE: 468, LEFT: 21, RIGHT: 21, WORLD: 33},
    586: {POSE: 33, FACE: 478, LEFT: 21, RIGHT: 21, WORLD: 33},
    553: {POSE: 33, FACE: 478, LEFT: 21, RIGHT: 21},
    "no face": {POSE: 33, LEFT: 21, RIGHT: 21},
    "shuffled": {WORLD: 33, RIGHT: 21, FACE: 468, LEFT: 21, POSE: 33},
}
# The 76 points of DESIGN.md, by MediaPipe's numbers
OF_BODY = [0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16]
OF_FACE = [61, 291, 17, 0, 70, 105, 107, 300, 334, 336, 161, 158]
OF_FACE += [33, 163, 153, 133, 388, 385, 263, 390, 380, 362, 9]
POINTS = [(part, name) for part in (LEFT, RIGHT) for name in HAND]
POINTS += [(POSE, BODY[i]) for i in OF_BODY] + [(FACE, str(i)) for i in OF_FACE]


def positions(frames, seed=0):
    """Random pixels of every point, {(part, name): (frames, 2)}; shoulders 200 pixels apart."""
    rng = np.random.default_rng(seed)
    where = {
        (part, name): rng.uniform(100, 500, (frames, 2))
        for part, names in NAMES.items()
        for name in names
    }
    for side, x in (("LEFT", 400), ("RIGHT", 200)):
        where[POSE, f"{side}_SHOULDER"] = rng.normal((x, 300), 10, (frames, 2))
    where[POSE, "NOSE"][:, 1] -= 400  # above them
    return where


def pose_bytes(where, layout=576, fps=25, version=0.1, unseen=(), confidence=None):
    """A .pose file; `unseen` points have zeros, as trackers leave, and a confidence of 0.

    confidence: in its place, of all points.
    """
    parts = {part: NAMES[part][:n] for part, n in LAYOUTS[layout].items()}
    keys = [(part, name) for part, names in parts.items() for name in names]
    xy = np.stack([where[key] * (key not in unseen) for key in keys], 1)
    data = np.concatenate([xy, np.full((*xy.shape[:2], 1), 7.0)], -1)[:, None].astype("<f4")
    sure = np.array([key not in unseen for key in keys]) if confidence is None else confidence
    confidence = np.broadcast_to(sure, (len(data), 1, len(keys))).astype("<f4")
    components = [PoseHeaderComponent(part, names, [], [], "XYZC") for part, names in parts.items()]
    file = io.BytesIO()
    PoseHeader(version, PoseHeaderDimensions(640, 480, 0), components).write(file)
    if version == 0.2:
        NumPyPoseBody(fps, data, confidence).write(version, file)
        return file.getvalue()
    body = struct.pack("<HHH", fps, len(data), 1) + data.tobytes() + confidence.tobytes()
    return struct.pack("<f", version) + file.getvalue()[4:] + body  # the library writes 0.2 alone


def clips_of(*uids, frames=4, first=0):
    """{uid: the bytes of a .pose file, each of another clip}"""
    return {uid: pose_bytes(positions(frames, seed)) for seed, uid in enumerate(uids, first)}


def zipped(clips):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for uid, data in clips.items():
            archive.writestr(f"iSign-poses_v1.1/{uid}.pose", data)
    return file.getvalue()


def write_parts(folder, data, n):
    """Cut an archive into n parts -> the pattern of their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(data) // n)
    for i in range(n):
        letters = chr(97 + i // 26) + chr(97 + i % 26)
        (folder / f"iSign-poses_v1.1_part_{letters}").write_bytes(data[i * size : (i + 1) * size])
    return str(folder / "iSign-poses_v1.1_part_*")


def write_isign(folder, rows, clips, parts=3):
    """iSign's layout: rows (uid, text or None) in a CSV, clips {uid: bytes} in a zip in parts."""
    write_parts(folder, zipped(clips), parts)
    config = "{config_name: iSign_v1.1, data_files: iSign_v1.1.csv, default: true}"
    (folder / "README.md").write_text(f"---\nconfigs:\n- {config}\n---\nAs on the hub.\n")
    with open(folder / "iSign_v1.1.csv", "w", newline="") as file:
        csv.writer(file).writerows([("uid", "text"), *rows])
    return str(folder)


def settings_of(source):
    """The names above a script's shared block."""
    nodes = ast.parse(source[: source.index("SHARED BLOCK")]).body
    return [node.targets[0].id for node in nodes if isinstance(node, ast.Assign)]


SCRIPTS = (model_selection, train_final_model)
DEFAULTS = {
    script: {name: getattr(script, name) for name in settings_of(Path(script.__file__).read_text())}
    for script in SCRIPTS
}


def set_in_both(settings):
    """In both scripts, as if a user had edited them; those not named have their defaults."""
    for script in SCRIPTS:
        for name, value in {**DEFAULTS[script], **settings}.items():
            setattr(script, name, value)


def change(**settings):
    """More settings in both scripts, beside those that are set."""
    for script in SCRIPTS:
        for name, value in settings.items():
            setattr(script, name, value)


def small(**changes):
    """Tiny settings in both scripts; conftest.py takes them back after a test."""
    settings = {"CONFIG": None, "VALIDATION_SHARE": 0.3, "MAX_BAD_SHARE": 0.9, "SEED": 7}
    settings |= {"TRAIN_CLIPS": 0, "VALIDATION_CLIPS": 0, "MAX_FRAMES": 12}
    settings |= {"EMBED_DIM": 16, "HIDDEN_DIM": 16, "EPOCHS": 12, "WARMUP": 0.1}
    set_in_both({**settings, **changes})


def write_bert(folder):
    """A tiny BERT with a tokenizer."""
    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] "
    pieces += "hello i you want go school house water eat book good ##s"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 80}
    config = transformers.BertConfig(vocab_size=len(pieces.split()), **sizes)
    torch.manual_seed(5)
    transformers.BertModel(config).save_pretrained(folder)
    Path(folder, "vocab.txt").write_text(pieces.replace(" ", "\n"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    Path(folder, "vocab.txt").unlink()
    tokenizer.save_pretrained(folder)
    for file in ("vocab.txt", "special_tokens_map.json"):  # which transformers 4 writes, too
        Path(folder, file).unlink(missing_ok=True)
    return str(folder)


WORDS = ["<pad>", "<unk>", "GO", "HELLO", "SCHOOL", "WANT"]
METRICS = {"val_mse": 0.25, "val_mae": 0.375, "mean_pose_mse": 0.5}  # of no training
METRICS |= {"duration_error": 0.125, "seen_error": 0.0625}


def write_checkpoint(path, name="gru", **changes):
    """A model that was not trained, with a left hand that no clip showed -> the model."""
    rng, seen = np.random.default_rng(0), np.arange(152) >= 42
    values = {
        "mean": np.tile([0.2, 0.6], 76),
        "std": rng.uniform(0.2, 0.6, 152),
        "seen": seen,
        "seconds_per_gloss": 0.8,
    }
    statistics = {name: torch.tensor(value).float() for name, value in values.items()}
    small(MAX_FRAMES=96, **changes)
    torch.manual_seed(3)
    model, _, built = model_selection.new_model(name, statistics, WORDS)
    for value in model.decoder.parameters():
        torch.nn.init.normal_(value, 0, 0.5)
    torch.nn.init.uniform_(model.confidence.bias, -14, 0)  # some points are not likely seen
    metrics = {"epoch": 7, "train_mse": 0.5, "learning_rate": 1e-3, **METRICS, "seconds": 1.0}
    contents = {**built, "data": "none", "date": "2026-01-02", "metrics": metrics}
    model_selection.save(path, {**contents, "weights": model.state_dict()})
    return model.eval()


def outcome(model="gru"):
    """What a run leaves here: the log without the times, and the weights and moments."""
    with open(f"{model}.log", newline="") as file:
        rows = csv.DictReader(file)
        log = [[float(row[name]) for name in row if name != "seconds"] for row in rows]
    best, last = (torch.load(f"{x}_{model}.pt", weights_only=True) for x in ("best", "last"))
    return log, best["weights"], last["weights"], last["average"], last["optimizer"]


def shrink_sample(patch, times=20):
    """Make the sample of both scripts so many times smaller, in this process."""
    make = model_selection.sample_rows
    for script in SCRIPTS:
        patch.setattr(script, "sample_rows", lambda n, seed: make(n // times, seed))


def edited(source, **settings):
    """The script with other constants above its shared block, each on a line of its own."""
    for name, value in settings.items():
        before, _, after = re.split(f"^({name} = .*)", source, maxsplit=1, flags=re.M)
        source = f"{before}{name} = {value!r}{after}"
    return source


def until(condition, seconds=200):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


def start(work, out="out.txt", err="err.txt", limit=None):
    """work() in a process of its own, as a script runs it -> its number."""
    if child := os.fork():
        return child
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    faulthandler.dump_traceback_later(240, exit=True, file=sys.stderr)  # where it hangs
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        train_final_model.run_script(work)
    except SystemExit as end:
        os._exit(end.code)
    except BaseException:
        traceback.print_exc()
    os._exit(99)  # what run_script does not make a line of


def fork(work, when=None, number=signal.SIGKILL, limit=None):
    """work() as by start -> (status, or the signal below 0; stdout; stderr).

    when: a call after which it gets the signal; limit: of the files that it writes, in bytes.
    """
    child = start(work, limit=limit)
    if when:
        when()
        os.kill(child, number)
    _, status = os.waitpid(child, 0)
    out, err = (Path(name).read_text() for name in ("out.txt", "err.txt"))
    return os.waitstatus_to_exitcode(status), out, err
