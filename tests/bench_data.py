"""The data path, by hand: python tests/bench_data.py (5 minutes, 3 GB of temporary files)."""

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
HOME = tempfile.TemporaryDirectory(prefix="bench-")
if __name__ == "__main__":
    os.environ.update(
        HF_HOME=HOME.name, HF_DATASETS_CACHE=f"{HOME.name}/cache", HF_HUB_DISABLE_PROGRESS_BARS="1"
    )
    os.environ["HF_TOKEN"] = "token"
    from hub import Hub

    HUB = Hub("Exploration-Lab/iSign", {}, {"token": None}).__enter__()
    os.environ["HF_ENDPOINT"] = HUB.url

import datasets  # noqa: E402 (it reads the variables when it is imported)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from helpers import pose_bytes, positions, small, write_isign, write_parts  # noqa: E402
from pose_format import Pose  # noqa: E402

import model_selection as script  # noqa: E402

MANY, FRAMES = 2560, 215  # iSign's mean clip has 215 frames


def uid(i):
    return f"{i // 8:012x}-{i % 8}"


def prepare(n, processes, pattern, token=None):
    """Prepare n clips into an empty cache -> clips per second, and the bytes on disk."""
    datasets.config.HF_DATASETS_CACHE = Path(tempfile.mkdtemp(dir=HOME.name))
    script.open_poses.cache_clear()
    script.PROCESSES = processes
    columns = {"uid": [uid(i) for i in range(n)], "gloss": ["HELLO"] * n}
    rows = datasets.Dataset.from_dict({"key": columns["uid"], **columns})
    began = time.perf_counter()
    clips = script.prepare(rows, None, pattern, token)
    rate = n / (time.perf_counter() - began)
    assert len(clips) == n and not any(clips["problem"])
    files = Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")
    return rate, sum(path.stat().st_size for path in files)


def bare(path, n):
    began = time.perf_counter()
    with zipfile.ZipFile(path) as archive:
        for i in range(n):
            Pose.read(archive.read(f"iSign-poses_v1.1/{uid(i)}.pose"))
    return time.perf_counter() - began


def speed():
    folder = Path(HOME.name, "isign")
    folder.mkdir()
    with zipfile.ZipFile(
        folder / "whole.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1
    ) as archive:
        kinds = [pose_bytes(positions(FRAMES, seed)) for seed in range(4)]
        for i in range(MANY):
            archive.writestr(f"iSign-poses_v1.1/{uid(i)}.pose", kinds[i % 4])
    url = str(folder / "whole.zip")
    loop = MANY / bare(url, MANY)
    print(f"bare loop of Pose.read               {loop:8.1f} clips/s")
    one, size = prepare(MANY, 1, url)
    print(
        f"preparation, 1 process               {one:8.1f} clips/s   "
        f"{one / loop:.2f} of the bare loop"
    )
    two, _ = prepare(MANY, 2, url)
    print(
        f"preparation, 2 processes             {two:8.1f} clips/s   {two / one:.2f} of one process"
    )
    print(f"on disk                              {size / MANY:8.0f} bytes a clip")


def reading():
    n, file = 64, io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(n):
            archive.writestr(f"iSign-poses_v1.1/{uid(i)}.pose", pose_bytes(positions(60, i)))
        needed = sum(info.compress_size for info in archive.infolist())
    folder = Path(HOME.name, "hub")
    write_parts(folder, file.getvalue(), 4)
    HUB.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    prepare(n, 1, "hf://datasets/Exploration-Lab/iSign/iSign-poses_v1.1_part_*", "token")
    sent, requests = sum(size for _, _, size in HUB.ranges), len(HUB.ranges)
    print(
        f"read from the hub                    {sent / needed:8.3f} bytes per byte needed, "
        f"{requests / n:.2f} requests a clip"
    )


def loading():
    small(DATASET="sample", MAX_FRAMES=96, EMBED_DIM=256, HIDDEN_DIM=512)
    with contextlib.redirect_stdout(io.StringIO()):
        clips, _ = script.load_clips()
        statistics, vocabulary = script.training_statistics(clips["train"])
    run = script.new_run("gru", clips, statistics, vocabulary, torch.device("cpu"))
    schedule = script.new_schedule(run.optimizer, 9999)
    loader = run.loaders["train"]
    held = list(loader)

    class Held(list):
        sampler, dataset = loader.sampler, loader.dataset

    times = {"real": [], "held": []}
    loader.sampler.set_epoch = lambda epoch: None  # the same batches
    for _ in range(4):
        for name, source in [("real", loader), ("held", Held(held))]:
            began = time.perf_counter()
            run.loaders["train"] = source
            script.train_one_epoch(run, run.model, schedule, name)
            times[name].append((time.perf_counter() - began) / len(held))
    real, again = (float(np.median(times[name])) for name in ("real", "held"))
    print(
        f"a training batch, GRU, batch size 8  {1000 * real:8.1f} ms with the loader, "
        f"{1000 * again:.1f} ms with batches held in memory: {real / again:.2f}"
    )


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
    write_isign(folder, [(uid(i), "hello you") for i in range(n)], {}, 1)
    poses = folder / "poses"
    poses.mkdir()
    (folder / "one.pose").write_bytes(pose_bytes(positions(96), 576))
    for i in range(n):
        os.link(folder / "one.pose", poses / f"{uid(i)}.pose")
    small(DATASET=str(folder), POSES=str(poses), MAX_FRAMES=96, BATCH_SIZE=32, EPOCHS=1)
    clips, _ = script.load_clips()
    statistics, vocabulary = script.training_statistics(clips["train"])
    run = script.new_run("gru", clips, statistics, vocabulary, torch.device("cpu"))
    script.train_epochs(run, keep=lambda run: None)
    stop.set()
    print(f"PEAK {peak / 1024:.0f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        memory(int(sys.argv[2]))
    else:
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
        for part in (speed, reading, loading):
            part()
        for n in (2000, 20000):
            command = [sys.executable, __file__, "memory", str(n)]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            peak = out.split("PEAK ")[1].strip()
            print(
                f"private memory, {n:6} clips         {peak:>8} MB at the peak of preparing and "
                "training"
            )
    HUB.__exit__()
