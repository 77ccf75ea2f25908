"""Speed and memory of training and generation, by hand: python tests/bench_train.py (10 minutes).

Random clips of 96 frames and 8 glosses, the shipped widths. Beside the scripts' models stands the
common way to write this one: a GRU cell that is given the frame before, and steps through the
frames in Python.
"""

import contextlib
import io
import multiprocessing
import resource
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from helpers import small  # noqa: E402
from torch import nn  # noqa: E402

import model_selection as script  # noqa: E402

CLIPS, FRAMES, GLOSSES = 64, 96, 8


class Autoregressive(script.GRUModel):
    def __init__(self, hidden_dim, **sizes):
        super().__init__(hidden_dim=hidden_dim, **sizes)
        self.decoder = nn.GRUCell(hidden_dim + self.output.out_features, hidden_dim)

    def decode(self, queries, frame_mask, states, token_mask):
        hidden, pose = (
            queries.new_zeros(queries[:, 0].shape),
            queries.new_zeros(len(queries), len(self.mean)),
        )
        frames = []
        for query in queries.unbind(1):
            hidden = self.decoder(torch.cat([query, pose.to(query.dtype)], -1), hidden)
            pose = self.output(hidden)
            frames.append(hidden)
        return torch.stack(frames, 1)


def clips(n):
    rng, words = np.random.default_rng(0), [f"word{i}" for i in range(200)]
    return datasets.Dataset.from_list(
        [
            {
                "key": "",
                "gloss": " ".join(rng.choice(words, GLOSSES)),
                "problem": "",
                "seconds": FRAMES / 25,
                "pose": rng.normal(size=FRAMES * 152).astype(np.float32),
            }
            for _ in range(n)
        ],
        features=script.CLIP,
    )


class Training:
    """The training of a model on n clips."""

    def __init__(self, name, batch_size, n=CLIPS):
        small(
            MAX_FRAMES=FRAMES,
            EMBED_DIM=256,
            HIDDEN_DIM=512,
            BATCH_SIZE=batch_size,
            MIN_GLOSS_COUNT=1,
        )
        part = clips(n)
        with contextlib.redirect_stdout(io.StringIO()):
            statistics, vocabulary = script.training_statistics(part)
        script.MODELS["autoregressive"] = Autoregressive
        parts = {"train": part, "validation": part}
        self.run = script.new_run(name, parts, statistics, vocabulary, script.pick_device())
        self.schedule = script.new_schedule(self.run.optimizer, 10**6)

    def epoch(self):
        script.train_one_epoch(self.run, self.run.model, self.schedule, "")


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(*works, rounds=5):
    """The median time of each work, all of them in turn, after a round that warms up."""
    times = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, taken in zip(works, times, strict=False):
            wait()
            began = time.perf_counter()
            work()
            wait()
            taken.append(time.perf_counter() - began)
    return [float(np.median(taken[1:])) for taken in times]


def peak():
    """MB at the peak: of the GPU's memory, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(name, batch_size):
    training = Training(name, batch_size)
    run = training.run
    batches = [script.to_device(batch, run.device) for batch in run.loaders["train"]]

    def steps():
        """Forward, backward and optimizer alone, on batches that are there."""
        run.model.train()
        for batch in batches:
            with script.mixed_precision(run.device):
                loss, _ = script.training_loss(run.model, batch)
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            run.optimizer.step()

    @torch.no_grad()
    def generate():
        averaged = run.average.eval()
        for batch in batches:
            averaged(batch["tokens"], batch["token_mask"], batch["n_frames"])

    epoch, alone, generation = seconds(training.epoch, steps, generate)
    return CLIPS / epoch, CLIPS / generation, 100 * (1 - alone / epoch), peak()


def grow(times):
    return seconds(Training("gru", 8, CLIPS * times).epoch, rounds=1)[0], peak()


def apart(work, *arguments):
    """In a process of its own, so that its memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def main():
    hardware = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{hardware}, torch {torch.__version__}")
    print(
        f"{'':16}batch   training/s   generation/s   outside forward, backward, optimizer   peak MB"
    )
    for name in ("gru", "transformer", "autoregressive"):
        for batch_size in (8, 64):
            train, generate, outside, memory = apart(measure, name, batch_size)
            print(
                f"{name:16}{batch_size:5}{train:13.1f}{generate:15.1f}{outside:39.1f} %"
                f"{memory:10.0f}",
                flush=True,
            )
    for times in (1, 2, 4, 8):
        took, memory = apart(grow, times)
        print(
            f"an epoch of the GRU, {CLIPS * times:3} clips: {took:6.2f} s, peak {memory:.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
