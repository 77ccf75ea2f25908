"""What one would use instead of the models: python tests/bench_baselines.py DATA

DATA is a folder as DATASET takes it, or the word sample. Prints one table in Markdown. All rows are
about the same validation clips, and all figures come from the scripts' own functions:

- MSE / mean pose, motion, tremble, reach: at the length of the real clip, to which an answer of
  another length is resampled
- DTW-MJE, duration error: at the answer's own length
- word error (--read, for text in signing order): glosses that recognisers read wrongly, left out or
  put in, over the glosses that were asked for; at the answer's own length. The recognisers learn
  from the training clips alone, so they have seen the takes of clips as answers, but not those of
  the models

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
import recogniser  # noqa: E402
from bench_ablation import mean_and_spread, script  # noqa: E402

SEEDS = [0, 1, 2]  # of what is drawn, and of the autoregressive trainings
JOINT = 6  # frames between two clips that are joined
CPU = torch.device("cpu")
SHOWN = {  # a column's title -> a figure's name, and its digits
    "DTW-MJE": ("val_dtw_mje", 3),
    "motion": ("motion", 2),
    "tremble": ("tremble", 2),
    "reach": ("reach", 2),
    "duration error, s": ("duration_error", 2),
    "word error": ("word_error", 3),
}


class Answer(NamedTuple):
    pose: np.ndarray  # (T, K, 2), no point unseen
    seconds: float
    confidence: np.ndarray  # (T, K): 1 where the clip shows the point, else 0


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
    frames, shown = [takes[0].pose], [takes[0].confidence]
    for before, take in zip(takes, takes[1:], strict=False):
        frames += [np.linspace(before.pose[-1], take.pose[0], JOINT + 2)[1:-1], take.pose]
        shown += [np.tile(before.confidence[-1] * take.confidence[0], (JOINT, 1)), take.confidence]
    pose = np.concatenate(frames)
    seconds = sum(take.seconds for take in takes) + JOINT * (len(takes) - 1) / script.FPS
    n = min(len(pose), script.MAX_FRAMES)
    confidence = script.resample(np.concatenate(shown)[..., None], n)[..., 0]
    return Answer(script.resample(pose, n), seconds, confidence.round())


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
        pose = script.pose_of(self.clips, i)
        shown = np.isfinite(pose).all(-1).astype(np.float32)
        filled = fill_unseen(pose, self.mean.view(-1, 2).numpy())
        return Answer(filled, self.clips.seconds[i].item(), shown)

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
    """A model that gives answers as long as the clips. A clip's only token is its number."""

    def __init__(self, answers, mean):
        super().__init__()
        self.answers = answers
        self.mean = mean

    def forward(self, tokens, token_mask, n_frames, longest):
        answers = [self.answers[i] for i in tokens[:, 0].tolist()]
        pose = torch.zeros(len(tokens), longest, len(self.mean))
        confidence = torch.zeros(len(tokens), longest, len(self.mean) // 2)
        for i, answer in enumerate(answers):
            pose[i, : len(answer.pose)] = torch.from_numpy(answer.pose).flatten(1)
            confidence[i, : len(answer.pose)] = torch.from_numpy(answer.confidence) - 0.5
        return script.Signing(
            pose=pose,
            seconds=torch.tensor([answer.seconds for answer in answers]),
            confidence=confidence,
            keys=None,
            durations=None,
        )


def at_own_length(answers, clips, readers):
    """Answers or Generated, one for each of the clips -> the figures at their own lengths."""
    answers = list(answers)
    aligned = [
        script.aligned_error(one.pose, script.pose_of(clips, i)) for i, one in enumerate(answers)
    ]
    shown = [np.where(one.confidence[..., None] >= 0.5, one.pose, np.nan) for one in answers]
    return {"val_dtw_mje": np.mean(aligned), "word_error": word_error(readers, shown, clips)}


def figures_of(answers, mean, clips, readers):
    """An Answer for each of the clips -> their figures."""
    numbered = copy.copy(clips)
    numbered.tokens = torch.arange(len(clips))[:, None]
    numbered.token_mask = torch.ones_like(numbered.tokens, dtype=torch.bool)
    as_long = []
    for one, n in zip(answers, clips.n_frames.tolist(), strict=True):
        shown = script.resample(one.confidence[..., None], n)[..., 0]
        as_long.append(Answer(script.resample(one.pose, n), one.seconds, shown))
    metrics = script.evaluate(Given(as_long, mean), numbered, CPU)
    metrics |= script.hand_metrics(as_long, clips)
    return {**metrics, **at_own_length(answers, clips, readers)}


# ---- reading
def train_readers(clips):
    """The training clips -> a recogniser for each seed."""
    poses = [script.pose_of(clips, i) for i in range(len(clips))]
    sentences = [script.split_glosses(text) for text in clips.glosses]
    return [recogniser.train(poses, sentences, seed) for seed in SEEDS]


def word_error(readers, poses, clips):
    """Glosses read wrongly over those asked for, by all readers; NaN for no readers."""
    wrong = asked = 0
    for reader in readers:
        for text, read in zip(clips.glosses, reader.read(poses), strict=True):
            sentence = [gloss for gloss in script.split_glosses(text) if gloss in reader.numbers]
            wrong += edit_distance(sentence, read)
            asked += len(sentence)
    return wrong / asked if asked else math.nan


def report_reading(readers, clips):
    """Print what can be asked of a reader: the word error of the real clips."""
    real = [script.pose_of(clips, i) for i in range(len(clips))]
    smooth = [recogniser.smoothed(pose, recogniser.SMOOTHING) for pose in real]
    print(f"word error of the real validation clips: {word_error(readers, real, clips):.3f}")
    print(f"- of the same, smoothed: {word_error(readers, smooth, clips):.3f}")


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


def rows_of_clips(clips, readers):
    """-> the rows of the mean pose and of the training clips."""
    library, validation = Library(clips["train"]), clips["validation"]
    sentences = [tuple(script.split_glosses(text)) for text in validation.glosses]
    runs = [cut_into_runs(sentence, library.numbers) for sentence in sentences]
    report_runs(library, sentences, runs)
    nearest = [library.nearest(sentence) for sentence in sentences]
    draws = [draw(library, nearest, runs, seed) for seed in SEEDS]
    mean = library.mean.view(-1, 2).numpy()
    still = [
        Answer(np.tile(mean, (n, 1, 1)), math.nan, np.ones((n, len(mean)), np.float32))
        for n in validation.n_frames.tolist()
    ]
    rows = {
        "mean pose": [still],
        "nearest sentence": [retrieved for retrieved, _ in draws],
        "single-sign clips joined": [joined for _, joined in draws],
    }
    return {
        what: [figures_of(answers, library.mean, validation, readers) for answers in its_draws]
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


def rows_of_models(folders, clips, data, readers):
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
            asked = model, tokenizer, clips.glosses, max_gloss_len
            metrics |= script.hand_metrics(script.generate(*asked, clips.n_frames), clips)
            metrics |= at_own_length(script.generate(*asked), clips, readers)
            rows[title].append(metrics)
    return rows


def line_of(what, runs):
    """A row's figures, one for each seed -> a line of the table."""

    def values(name):
        return np.array([float(run.get(name, math.nan)) for run in runs])

    cells = [mean_and_spread(values("val_mse") / values("mean_pose_mse"))]
    cells += [mean_and_spread(values(name), digits) for name, digits in SHOWN.values()]
    cells = [cell.replace("nan ± nan", "–").replace("nan", "–") for cell in cells]
    return f"| {' | '.join([what, str(len(runs)), *cells])} |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder as DATASET takes it, or sample")
    parser.add_argument("--models", nargs="+", default=["."], metavar="FOLDER")
    parser.add_argument("--epochs", type=int, default=10, help="of the autoregressive GRU; 0: none")
    parser.add_argument("--read", action="store_true", help="train recognisers: word error")
    asked = parser.parse_args(argv)
    script.DATASET, script.CONFIG = bench_ablation.place_of(asked.data), None
    with contextlib.redirect_stdout(sys.stderr):
        clips, data = script.load_clips()
    rows = {}

    def add(part, *arguments):
        began = time.time()
        rows.update(part(*arguments))
        print(f"{part.__name__}: {time.time() - began:.0f} s", file=sys.stderr, flush=True)

    readers = train_readers(clips["train"]) if asked.read else []
    if readers:
        report_reading(readers, clips["validation"])
    add(rows_of_clips, clips, readers)
    if asked.epochs:
        add(rows_of_own_frames, script.DATASET, asked.epochs)
    add(rows_of_models, asked.models, clips["validation"], data, readers)
    print(f"\n| what | seeds | MSE / mean pose | {' | '.join(SHOWN)} |")
    print("|---" * (3 + len(SHOWN)) + "|")
    for what, runs in rows.items():
        print(line_of(what, runs))


if __name__ == "__main__":
    main()
