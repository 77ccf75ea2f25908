"""What one would use instead of the models: python tests/bench_baselines.py DATA

DATA is a folder as DATASET takes it, or the word sample. Prints one table in Markdown. All rows are
about the same validation clips, and all figures come from the scripts' own functions:

- MSE / mean pose, motion (path of the hands over that of the real ones): at the length of the real
  clip, to which an answer of another length is resampled
- DTW-MJE, duration error: at the answer's own length

The rows:

- mean pose: the training split's, in all frames, at the length of the real clip
- nearest sentence: the training clip of the sentence with the lowest edit distance over glosses.
  Of clips equally near, one is drawn
- single-sign clips joined: for each gloss a training clip of that gloss alone, drawn, with six
  frames of linear interpolation between two clips, in the order of the text. A gloss that training
  never has alone begins the shortest run of glosses that is a whole training sentence ("THE TEA"),
  or is left out. If nothing is left, the nearest sentence's clip is taken
- autoregressive: the GRU with a cell that reads its own last frame instead of its decoder, see
  bench_ablation.py; trained for --epochs N (0: no such rows), as many at once as there are cores
- the models: each best_<model>.pt in the folders of --models (default: this one), a seed each

Clips as answers have all points in all frames, as the models do: a point moves straight from where
it was seen to where it is seen next, stays before and after that, and is at its mean if the clip
never shows it. Answers are judged on the points that the real clip shows.
"""

import argparse
import collections
import contextlib
import copy
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import bench_ablation  # noqa: E402
from bench_ablation import mean_and_spread, script  # noqa: E402

SEEDS = [0, 1, 2]  # of what is drawn, and of the autoregressive trainings
JOINT = 6  # frames between two clips that are joined
CPU = torch.device("cpu")


class Answer(NamedTuple):
    pose: np.ndarray  # (T, K, 2), no point unseen
    seconds: float


# ---- clips as answers
def fill_unseen(pose, mean):
    """(T, K, 2), NaN = not seen, and the mean pose (K, 2) -> (T, K, 2) without NaN."""
    filled = np.tile(mean, (len(pose), 1, 1))
    seen = np.isfinite(pose).all(-1)
    for k in range(pose.shape[1]):
        frames = np.flatnonzero(seen[:, k])
        if len(frames):
            for axis in (0, 1):
                known = pose[frames, k, axis]
                filled[:, k, axis] = np.interp(np.arange(len(pose)), frames, known)
    return filled


def join(takes):
    """Answers -> one of at most MAX_FRAMES frames, with JOINT frames between two of them."""
    frames = [takes[0].pose]
    for before, take in zip(takes, takes[1:], strict=False):
        frames.append(np.linspace(before.pose[-1], take.pose[0], JOINT + 2)[1:-1])
        frames.append(take.pose)
    pose = np.concatenate(frames)
    seconds = sum(take.seconds for take in takes) + JOINT * (len(takes) - 1) / script.FPS
    return Answer(script.resample(pose, min(len(pose), script.MAX_FRAMES)), seconds)


def edit_distance(one, other):
    """The fewest glosses to put in, leave out or replace, to make one sentence the other."""
    before = list(range(len(other) + 1))
    for i, gloss in enumerate(one, 1):
        current = [i]
        for j, its in enumerate(other, 1):
            replaced = before[j - 1] + (gloss != its)
            current.append(min(replaced, before[j] + 1, current[-1] + 1))
        before = current
    return before[-1]


def cut_into_runs(sentence, known):
    """Glosses -> runs of them that are known sentences, the shortest ones from the left on."""
    runs = []
    while sentence:
        lengths = [n for n in range(1, len(sentence) + 1) if sentence[:n] in known]
        if lengths:
            runs.append(sentence[: lengths[0]])
        sentence = sentence[lengths[0] if lengths else 1 :]
    return runs


class Library:
    """The training clips, by their sentences (tuples of glosses)."""

    def __init__(self, clips):
        self.clips = clips
        with contextlib.redirect_stdout(sys.stderr):
            self.mean = script.training_statistics(clips)[0]["mean"]  # (D,)
        self.numbers = collections.defaultdict(list)
        for i, text in enumerate(clips.glosses):
            self.numbers[tuple(script.split_glosses(text))].append(i)

    def take(self, sentence, rng):
        """A clip of one of the library's sentences, drawn -> Answer."""
        return self.answer(rng.choice(self.numbers[sentence]))

    def answer(self, i):
        pose = fill_unseen(script.pose_of(self.clips, i), self.mean.view(-1, 2).numpy())
        return Answer(pose, self.clips.seconds[i].item())

    def nearest(self, sentence):
        """-> the numbers of the clips of the nearest sentences."""
        distances = {known: edit_distance(sentence, known) for known in self.numbers}
        lowest = min(distances.values())
        nearest = [known for known, distance in distances.items() if distance == lowest]
        return [i for known in nearest for i in self.numbers[known]]


def report_runs(library, sentences, runs):
    """Print what the clips as answers are made of."""
    single = left_out = 0
    for sentence, its_runs in zip(sentences, runs, strict=True):
        single += len(its_runs) == len(sentence)
        left_out += 0 < sum(map(len, its_runs)) < len(sentence)
    print(f"validation clips: {len(sentences)}")
    print(f"- whose sentence training has: {sum(s in library.numbers for s in sentences)}")
    print(f"- for all of whose glosses training has single-sign clips: {single}")
    print(f"- of which the joined clip lacks a gloss: {left_out}")
    print(f"- for which the nearest sentence's clip stands in: {runs.count([])}")


# ---- the figures of answers
class Given(nn.Module):
    """A model that gives answers, for `evaluate`. A clip's only token is the clip's number."""

    def __init__(self, answers, mean):
        super().__init__()
        self.answers = answers
        self.mean = mean

    def forward(self, tokens, token_mask, n_frames, longest):
        answers = [self.answers[i] for i in tokens[:, 0].tolist()]
        pose = torch.zeros(len(tokens), longest, len(self.mean))
        for row, answer, n in zip(pose, answers, n_frames.tolist(), strict=True):
            row[:n] = torch.from_numpy(script.resample(answer.pose, n)).flatten(1)
        return script.Signing(
            pose=pose,
            seconds=torch.tensor([answer.seconds for answer in answers]),
            confidence=pose.new_zeros(len(tokens), longest, len(self.mean) // 2),
            keys=None,
            durations=None,
        )


def with_alignment(metrics, answers, clips):
    aligned = [
        script.aligned_error(one.pose, script.pose_of(clips, i)) for i, one in enumerate(answers)
    ]
    return {**metrics, "val_dtw_mje": np.mean(aligned)}


def figures_of(answers, mean, clips):
    """An Answer for each of the clips -> their figures."""
    numbered = copy.copy(clips)
    numbered.tokens = torch.arange(len(clips))[:, None]
    numbered.token_mask = torch.ones_like(numbered.tokens, dtype=torch.bool)
    return with_alignment(script.evaluate(Given(answers, mean), numbered, CPU), answers, clips)


# ---- the table: rows are {what: [figures of each seed]}
def draw(library, nearest, runs, seed):
    """-> for each sentence a clip of the nearest ones, and its runs' clips joined."""
    rng = np.random.default_rng(seed)
    retrieved = [library.answer(rng.choice(numbers)) for numbers in nearest]
    joined = []
    for its_runs, stand_in in zip(runs, retrieved, strict=True):
        takes = [library.take(run, rng) for run in its_runs]
        joined.append(join(takes) if takes else stand_in)
    return retrieved, joined


def rows_of_clips(clips):
    """-> the rows of the mean pose and of the training clips."""
    library, validation = Library(clips["train"]), clips["validation"]
    sentences = [tuple(script.split_glosses(text)) for text in validation.glosses]
    runs = [cut_into_runs(sentence, library.numbers) for sentence in sentences]
    report_runs(library, sentences, runs)
    nearest = [library.nearest(sentence) for sentence in sentences]
    draws = [draw(library, nearest, runs, seed) for seed in SEEDS]
    mean = library.mean.view(-1, 2).numpy()
    still = [Answer(np.tile(mean, (n, 1, 1)), math.nan) for n in validation.n_frames.tolist()]
    rows = {
        "mean pose": [still],
        "nearest sentence": [retrieved for retrieved, _ in draws],
        "single-sign clips joined": [joined for _, joined in draws],
    }
    return {
        what: [figures_of(answers, library.mean, validation) for answers in its_draws]
        for what, its_draws in rows.items()
    }


def rows_of_own_frames(data, epochs):
    """-> the rows of the autoregressive GRU, a training on each core."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of each training
    what = [row for row in bench_ablation.ROWS if row.startswith("autoregressive")]
    settings = {"DATASET": data, "EPOCHS": epochs}
    with ThreadPoolExecutor(script.CORES) as pool:
        runs = {
            row: [pool.submit(bench_ablation.run, row, "gru", seed, settings) for seed in SEEDS]
            for row in what
        }
    return {row: [run.result() for run in its_runs] for row, its_runs in runs.items()}


def rows_of_models(folders, clips, data):
    """-> the rows of the best_<model>.pt in the folders, without those of other data."""
    rows = collections.defaultdict(list)
    for name in script.MODELS:
        for path in (Path(folder, f"best_{name}.pt") for folder in folders):
            if not path.exists():
                continue
            model, tokenizer, max_gloss_len, facts = script.load_model(path)
            if Path(facts["data"]).name != Path(data).name:
                print(f"{path} is passed over: it was trained on {facts['data']}")
                continue
            title = model.title
            if name == "bert":
                config = model.encoder.pretrained.config
                title += f" ({config.num_hidden_layers} layers of {config.hidden_size})"
            metrics = script.evaluate(model, clips.with_tokens(tokenizer), CPU)
            made = script.generate(model, tokenizer, clips.glosses, max_gloss_len)
            rows[title].append(with_alignment(metrics, made, clips))
    return rows


def line_of(what, runs):
    """A row's figures, one for each seed -> a line of the table."""

    def values(name):
        return np.array([float(run[name]) for run in runs])

    cells = [
        mean_and_spread(values("val_mse") / values("mean_pose_mse")),
        mean_and_spread(values("val_dtw_mje")),
        mean_and_spread(values("motion"), 2),
        mean_and_spread(values("duration_error"), 2).replace("nan", "–"),
    ]
    return f"| {' | '.join([what, str(len(runs)), *cells])} |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder as DATASET takes it, or sample")
    parser.add_argument("--models", nargs="+", default=["."], metavar="FOLDER")
    parser.add_argument("--epochs", type=int, default=10, help="of the autoregressive GRU; 0: none")
    asked = parser.parse_args(argv)
    script.DATASET, script.CONFIG = bench_ablation.place_of(asked.data), None
    with contextlib.redirect_stdout(sys.stderr):
        clips, data = script.load_clips()
    rows = {}

    def add(part, *arguments):
        began = time.time()
        rows.update(part(*arguments))
        print(f"{part.__name__}: {time.time() - began:.0f} s", file=sys.stderr, flush=True)

    add(rows_of_clips, clips)
    if asked.epochs:
        add(rows_of_own_frames, script.DATASET, asked.epochs)
    add(rows_of_models, asked.models, clips["validation"], data)
    print("\n| what | seeds | MSE / mean pose | DTW-MJE | motion | duration error, s |")
    print("|---" * 6 + "|")
    for what, runs in rows.items():
        print(line_of(what, runs))


if __name__ == "__main__":
    main()
