"""Speed and memory of training and generation, by hand: python tests/bench_train.py (10 minutes).

Random clips of 96 frames and 8 glosses, the shipped widths. The scripts' models are compared to the
common way to write this one: a GRU cell that reads the frame before, in a Python loop over frames.
"""

import contextlib
import io
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import train_final_model as script  # noqa: E402 (before torch, as it sets torch's threads)

# isort: split
import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

CLIPS = 64
GLOSSES = 8
MANY_STEPS = 10**6  # of the schedule, so that its rates hardly change


class CellDecoder(nn.Module):
    """A GRU cell that is given the pose that it made of the frame before."""

    def __init__(self, width, **_):
        super().__init__()
        self.cell = nn.GRUCell(width + script.POSE_DIM, width)
        self.pose = nn.Linear(width, script.POSE_DIM)

    def forward(self, queries, frame_mask, states, token_mask):
        hidden = torch.zeros_like(queries[:, 0])
        pose = queries.new_zeros(len(queries), script.POSE_DIM)
        frames = []
        for query in queries.unbind(1):
            hidden = self.cell(torch.cat([query, pose], -1), hidden)
            pose = self.pose(hidden)
            frames.append(hidden)
        return torch.stack(frames, 1)


def random_clips(n):
    """n Clips of MAX_FRAMES frames, whose store the process keeps when its folder is gone."""
    rng, words = np.random.default_rng(0), script.SAMPLE_WORDS.split()
    frames, seconds = script.MAX_FRAMES, script.MAX_FRAMES / script.FPS
    rows = []
    for i in range(n):
        rows.append(script.Row(str(i), " ".join(rng.choice(words, GLOSSES)), None, "train", i))
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(datasets.config, "HF_DATASETS_CACHE", folder),
    ):
        store = script.ClipStore("random")
        for row in rows:
            store.add([(row.uid, rng.normal(size=(frames, script.POSE_DIM)), seconds, 1, None)])
        return script.Clips([(row, store.clips[row.uid]) for row in rows], store)


class Training:
    """The training of a model on n random clips."""

    def __init__(self, name, batch_size, n=CLIPS):
        script.BATCH_SIZE = batch_size
        script.MIN_GLOSS_COUNT = 1
        script.MODELS["autoregressive"] = ("Autoregressive", script.GRUEncoder, CellDecoder)
        clips = random_clips(n)
        with contextlib.redirect_stdout(io.StringIO()):
            statistics, vocabulary = script.training_statistics(clips)
            device = script.pick_device()
            self.run = script.Run(name, {"train": clips}, statistics, vocabulary, device)
        self.clips = self.run.clips["train"]
        self.order = self.run.batches()
        self.batches = [self.clips.batch(numbers, device) for numbers in self.order]
        self.schedule = script.new_schedule(self.run.optimizer, MANY_STEPS, 0)

    def epoch(self):
        script.train_one_epoch(self.run, self.run.model, self.schedule, "")

    def steps(self):
        """Forward, backward and optimizer alone, on batches that are there."""
        run = self.run
        run.model.train()
        for batch in self.batches:
            with script.mixed_precision(run.device):
                loss, _ = script.training_loss(run.model, batch)
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            run.optimizer.step()

    @torch.no_grad()
    def generate(self):
        averaged = self.run.average.eval()
        for batch in self.batches:
            longest = batch["pose"].shape[1]
            averaged(batch["tokens"], batch["token_mask"], batch["n_frames"], longest)


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(*works, rounds=5):
    """The median time of each work, all of them in turn, after a round that warms up."""
    times = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, taken in zip(works, times, strict=True):
            wait()
            began = time.perf_counter()
            work()
            wait()
            taken.append(time.perf_counter() - began)
    return [float(np.median(taken[1:])) for taken in times]


def peak(work):
    """MB at the peak of a work: of the GPU's memory, or of this process until now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2**20
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(training, rounds=5):
    """Clips a second, and the MB at the peak."""
    generation_memory = peak(training.generate)  # first: a process's peak does not fall again
    training_memory = peak(training.epoch)
    epoch, steps, generation = seconds(
        training.epoch, training.steps, training.generate, rounds=rounds
    )
    clips = len(training.clips)
    return SimpleNamespace(
        training=clips / epoch,
        generation=clips / generation,
        outside=1 - steps / epoch,  # share of an epoch
        training_memory=training_memory,
        generation_memory=generation_memory,
    )


def apart(work, *arguments):
    """work(*arguments) in a forked process of its own, whose memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(work, *arguments).result()


def measure_anew(name, batch_size):
    return measure(Training(name, batch_size))


def grow(times):
    """An epoch of so many times the clips -> seconds, MB at the peak."""
    epoch = Training("gru", 8, CLIPS * times).epoch
    return seconds(epoch, rounds=1)[0], peak(epoch)


def main():
    where = "GPU" if torch.cuda.device_count() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}")
    print("| model | batch | training, clips/s | generation, clips/s | outside | peak MB | |")
    print("|---" * 7 + "|")
    for name in ("gru", "transformer", "autoregressive"):
        for batch_size in (8, 64):
            made = apart(measure_anew, name, batch_size)
            cells = [f"{made.training:.1f}", f"{made.generation:.1f}", f"{made.outside:.1%}"]
            cells += [f"{made.training_memory:.0f}", f"{made.generation_memory:.0f}"]
            print(f"| {name} | {batch_size} | {' | '.join(cells)} |", flush=True)
    for times in (1, 2, 4, 8):
        took, memory = apart(grow, times)
        print(f"an epoch of the GRU, {CLIPS * times} clips: {took:.2f} s, peak {memory:.0f} MB")


if __name__ == "__main__":
    main()
