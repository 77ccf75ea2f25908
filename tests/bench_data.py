"""The data path, by hand: python tests/bench_data.py (5 minutes, 3 GB of temporary files).

Preparing clips from the disk and through a hub that takes 0.1 s for each request, batches out of
the store, and the memory that preparing and training take.
"""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from hub import Hub  # noqa: E402

HOME = tempfile.TemporaryDirectory(prefix="bench-")
HUB = Hub()
if __name__ == "__main__":
    os.environ.update(HF_HOME=HOME.name, HF_ENDPOINT=HUB.url, HF_TOKEN="hf_token")

import datasets  # noqa: E402 (it reads the variables when it is imported)
import torch  # noqa: E402
from helpers import pose_bytes, positions, small, write_isign, write_parts  # noqa: E402
from pose_format import Pose  # noqa: E402

import model_selection as script  # noqa: E402

FRAMES = 215  # of iSign's mean clip
DELAY = 0.1  # seconds, of the hub's requests


def uid(i):
    return f"{i // 8:012x}-{i % 8}"


def archive(n, frames):
    """n clips of four kinds -> the bytes of a zip."""
    file = io.BytesIO()
    kinds = [pose_bytes(positions(frames, seed)) for seed in range(4)]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        for i in range(n):
            made.writestr(f"iSign-poses_v1.1/{uid(i)}.pose", kinds[i % 4])
    return file.getvalue()


def prepare(numbers, source):
    """Prepare clips into an empty store -> clips per second."""
    datasets.config.HF_DATASETS_CACHE = Path(tempfile.mkdtemp(dir=HOME.name))
    rows = [script.Row(uid(i), "HELLO", None, "train", i) for i in numbers]
    began = time.perf_counter()
    store = script.prepare(rows, source)
    rate = len(rows) / (time.perf_counter() - began)
    assert len(store.clips) == len(rows)
    assert not any(clip.problem for clip in store.clips.values())
    return rate


def from_disk(n=600):
    path = Path(HOME.name, "all.zip")
    path.write_bytes(archive(n, FRAMES))
    began = time.perf_counter()
    with zipfile.ZipFile(path) as file:
        for i in range(n):
            Pose.read(file.read(f"iSign-poses_v1.1/{uid(i)}.pose"))
    loop = n / (time.perf_counter() - began)
    rate = prepare(range(n), script.PoseFiles(script.fsspec.filesystem("file"), str(path)))
    print(f"disk: {rate:.0f} clips of {FRAMES} frames a second, {rate / loop:.2f} of a bare loop")


def from_hub(n=600, frames=60):
    """Neighbours, as in a full training, and every fourth clip, as in a subset."""
    write_parts(Path(HOME.name, "hub"), archive(4 * n, frames), 4)
    HUB.reset("a/b", {"hf_token": None})
    HUB.files = {path.name: path.read_bytes() for path in Path(HOME.name, "hub").iterdir()}
    HUB.delay = DELAY
    file_system = script.huggingface_hub.HfFileSystem
    for name, numbers in (("neighbours", range(n)), ("every fourth", range(0, 4 * n, 4))):
        file_system.clear_instance_cache()
        place = "hf://datasets/a/b/iSign-poses_v1.1_part_*"
        HUB.ranges.clear()
        rate = prepare(numbers, script.PoseFiles(file_system(token="hf_token"), place))
        sent = sum(size for _, _, size in HUB.ranges) / 2**20
        print(
            f"hub, {name}: {rate:.0f} clips of {frames} frames a second, {sent:.0f} MiB by "
            f"{len(HUB.ranges)} requests of {DELAY} s"
        )


def batches(clips):
    """How fast one thread makes batches, beside what a training step takes."""
    torch.set_num_threads(1)
    order = torch.arange(len(clips))
    for size in (8, 64):
        script.BATCH_SIZE, made, began = size, 0, time.perf_counter()
        while time.perf_counter() - began < 2:
            for numbers in order.split(size):
                made += len(clips.batch(numbers, torch.device("cpu"))["pose"])
        print(f"batches of {size}: {made / (time.perf_counter() - began):.0f} clips a second")


def memory(n):
    """In a process of its own: prepare and train on n clips -> its private memory's peak, MB."""
    peak, stop = 0, threading.Event()

    def watch():
        nonlocal peak
        while not stop.wait(0.02):
            status = Path("/proc/self/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))

    threading.Thread(target=watch, daemon=True).start()
    folder = Path(tempfile.mkdtemp(dir=HOME.name))
    write_isign(folder, [(uid(i), f"hello you {i}") for i in range(n)], {}, 1)
    poses = folder / "poses"
    poses.mkdir()
    (folder / "one.pose").write_bytes(pose_bytes(positions(96)))
    for i in range(n):
        os.link(folder / "one.pose", poses / f"{uid(i)}.pose")
    small(DATASET=str(folder), POSES=str(poses), MAX_FRAMES=96, BATCH_SIZE=32, EPOCHS=1)
    clips, _ = script.load_clips()
    statistics, vocabulary = script.training_statistics(clips["train"])
    run = script.Run("gru", clips, statistics, vocabulary, torch.device("cpu"))
    script.train_epochs(run, keep=lambda run: None)
    stop.set()
    print(f"PEAK {peak / 1024:.0f}")


def main():
    if sys.argv[1:2] == ["memory"]:
        memory(int(sys.argv[2]))
        return
    print(f"{script.cores()} cores, torch {torch.__version__}")
    from_disk()
    from_hub()
    small(DATASET="sample", MAX_FRAMES=96)
    with contextlib.redirect_stdout(io.StringIO()):
        clips = script.load_clips()[0]["train"]
    batches(clips.with_tokens(script.gloss_tokenizer(["<pad>", "<unk>"])))
    for n in (2000, 20000):
        command = [sys.executable, __file__, "memory", str(n)]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        peak = out.split("PEAK ")[1].strip()
        print(f"{n} clips: {peak} MB of private memory at the peak of preparing and training")


if __name__ == "__main__":
    main()
