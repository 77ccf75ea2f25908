"""What each choice is worth, by hand: python tests/bench_ablation.py DATA [--rows ROW ...]

A row is train_final_model.py with other settings, classes or functions, in a process of its own,
with EPOCHS = 10: some minutes on a CPU core. Each run adds a line to ablation.jsonl, of which the
table is printed. ABLATION.md has what was measured and decided.
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import train_final_model as script  # noqa: E402

shipped_layers = script.pre_norm_layers
shipped_loss = script.training_loss


# ---- the frames' queries and the decoder
class Unplaced(script.PoseModel):
    """Durations place nothing: a frame's query has its time and its phase alone."""

    def time_line(self, durations, token_mask, n_frames, longest):
        window, places = super().time_line(durations, token_mask, n_frames, longest)
        within_sign = torch.arange(places.shape[-1], device=places.device) < script.WAVE_DIM
        return torch.zeros_like(window), places.masked_fill(within_sign, 0)


class FreeAttention(script.GRUDecoder):
    """The frames search the words by attention."""

    def __init__(self, width, **sizes):
        super().__init__(width, **sizes)
        self.search = nn.Linear(width, width)

    def forward(self, queries, frame_mask, states, token_mask):
        scores = self.search(queries) @ states.mT / math.sqrt(states.shape[-1])
        window = scores.masked_fill(~token_mask[:, None], -math.inf).softmax(-1)
        return super().forward(queries + window @ states, frame_mask, states, token_mask)


class DropoutByFrames(script.PoseModel):
    """Each frame drops other features."""

    def drop_features(self, features):
        return self.dropout(features)


def usual_layers(*sizes):
    """Attention as PyTorch begins it: its layers are not the identity."""
    layers = shipped_layers(*sizes)
    for name, weight in layers.named_parameters():
        if weight.dim() == 2 and ("out_proj" in name or "linear2" in name):
            nn.init.xavier_uniform_(weight)
    return layers


# ---- a decoder that reads its own last frame
class OwnFrames(nn.Module):
    """A GRU cell that reads the query of a frame and the frame before it.

    In training it reads the real frame (teacher forcing) or, in a share of the frames that rises
    over the first steps, its own, without a gradient (scheduled sampling). Else always its own.
    """

    rise = 500  # steps

    def __init__(self, output, own_share):
        super().__init__()
        self.output = output  # the model's: a state -> a standardised frame
        self.own_share = own_share
        width = output.in_features
        self.gru = nn.GRU(width + output.out_features, width, batch_first=True)
        self.teacher = None  # (B, T, D), the batch's real frames, standardised
        self.steps = 0

    def forward(self, queries, frame_mask, states, token_mask):
        if self.training and not self.own_share:  # all frames in one call
            before = nn.functional.pad(self.teacher, (0, 0, 1, 0))[:, :-1]
            return queries + self.gru(torch.cat([queries, before], -1))[0]
        self.steps += self.training
        share = self.own_share * min(1, self.steps / self.rise)
        before = queries.new_zeros(len(queries), 1, self.output.out_features)
        memory, made = None, []
        for t, query in enumerate(queries.split(1, dim=1)):
            state, memory = self.gru(torch.cat([query, before], -1), memory)
            made.append(query + state)
            before = self.output(made[-1]).detach()
            if self.training:
                own = torch.rand(len(queries), 1, 1, device=queries.device) < share
                before = torch.where(own, before, self.teacher[:, t : t + 1])
        return torch.cat(made, 1)


class TeacherForcing(script.PoseModel):
    own_share = 0.0

    def __init__(self, **args):
        super().__init__(**args)
        self.decoder = OwnFrames(self.output, self.own_share)


class ScheduledSampling(TeacherForcing):
    own_share = 0.5


def loss_with_teacher(model, batch):
    """The training loss of a model whose decoder reads the real frames; unseen points: the mean."""
    standardised = (batch["pose"] - model.mean) / model.std
    model.decoder.teacher = standardised.nan_to_num()
    return shipped_loss(model, batch)


# ---- what is signed, and the plan
class SignsFromSentences(script.GRUEncoder):
    """What is signed comes from the word within its sentence, too."""

    def forward(self, tokens, token_mask):
        _, states = super().forward(tokens, token_mask)
        return states, states


class TextOrder(script.Plan):
    """No plan: the signs are the tokens in the order of the text."""

    def forward(self, states, durations, token_mask):
        order = torch.eye(states.shape[1], device=states.device).expand(len(states), -1, -1)
        return order.argmax(1), order


class KeysByPlaces(script.Plan):
    """Places of tokens move the keys, whether the tokens are signed or not."""

    def forward(self, states, durations, token_mask):
        return super().forward(states, token_mask.float(), token_mask)


class Attention(script.Plan):
    """Sign i reads the tokens by attention, and begins by reading token i."""

    def __init__(self, width):
        super().__init__(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.own_token = nn.Parameter(torch.tensor(3.0))

    def scores(self, states, token_mask):
        place = torch.arange(states.shape[1], device=states.device).expand(token_mask.shape)
        after = token_mask.sum(1, keepdim=True) - 1 - place
        waves = [script.sinusoidal_features(x / script.HALF_TURN) for x in (place, after)]
        placed = states + self.counts(torch.cat(waves, -1))
        scores = self.query(placed) @ self.key(placed).mT / math.sqrt(states.shape[-1])
        return scores + self.own_token * torch.eye(states.shape[1], device=states.device)

    def forward(self, states, durations, token_mask):
        scores = self.scores(states, token_mask)
        order = scores.masked_fill(~token_mask[:, None], -math.inf).softmax(-1)
        return order.argmax(1), order  # a token's key is the sign that reads it most


class Sinkhorn(Attention):
    """Normalises rows and columns of the attention in turn, so that no token is read twice."""

    def forward(self, states, durations, token_mask):
        real = token_mask[:, None] & token_mask[:, :, None]
        scores = self.scores(states, token_mask).masked_fill(~real, -1e4)
        for _ in range(4):
            for side in (1, 2):
                scores = scores - scores.logsumexp(side, keepdim=True)
        order = scores.exp() * real
        return order.argmax(1), order


# A row's name -> what replaces the script's own, by its name there
OWN_FRAMES = {"training_loss": loss_with_teacher}
ROWS = {
    "as shipped": {},
    "no loss of movement": {"MOTION_WEIGHT": 0.0},
    "no word dropout": {"WORD_DROPOUT": 0.0},
    "no average of the weights": {"AVERAGE": 0.0},
    "dropout 0.3": {"DROPOUT": 0.3},
    "word dropout 0.2": {"WORD_DROPOUT": 0.2},
    "warm-up of 1 %": {"WARMUP": 0.01},
    "half the width": {"HIDDEN_DIM": 256, "EMBED_DIM": 128},
    "free attention, no durations": {"PoseModel": Unplaced, "GRUDecoder": FreeAttention},
    "no plan": {"Plan": TextOrder},
    "keys by places alone": {"Plan": KeysByPlaces},
    "signs read by attention": {"Plan": Attention},
    "attention, each token read once": {"Plan": Sinkhorn},
    "signs from the sentence": {"GRUEncoder": SignsFromSentences},
    "dropout by frames": {"PoseModel": DropoutByFrames},
    "autoregressive, teacher forcing": {**OWN_FRAMES, "PoseModel": TeacherForcing},
    "autoregressive, scheduled sampling": {**OWN_FRAMES, "PoseModel": ScheduledSampling},
    "usual initialisation": {"pre_norm_layers": usual_layers},  # of the Transformer
}
SHOWN = {
    "MSE / mean pose": lambda run: float(run["val_mse"]) / float(run["mean_pose_mse"]),
    "DTW-MJE": lambda run: float(run["val_dtw_mje"]),
    "motion": lambda run: float(run["motion"]),
    "recall@1": lambda run: run["recall_at_1"],
    "duration error, s": lambda run: float(run["duration_error"]),
    "seen error": lambda run: float(run["seen_error"]),
    "MSE, a gloss unknown": lambda run: run["unknown_mse"] / float(run["mean_pose_mse"]),
}


def recall_at_1(model, tokenizer, max_gloss_len, clips):
    """Share of generated clips whose nearest real one, both at 32 frames, has the same gloss."""
    real = np.stack([script.resample(script.pose_of(clips, i), 32) for i in range(len(clips))])
    made = script.generate(model, tokenizer, clips.glosses, max_gloss_len)
    found = 0
    for gloss, signed in zip(clips.glosses, made, strict=True):
        error = np.nanmean((script.resample(signed.pose, 32) - real) ** 2, axis=(1, 2, 3))
        found += clips.glosses[int(error.argmin())] == gloss
    return found / len(clips)


def spoil(gloss):
    """Replace one gloss of a sentence by one that training never had."""
    words = gloss.split()
    words[random.Random(gloss).randrange(len(words))] = "NEVERSEEN"
    return " ".join(words)


def set_row(row):
    """Put what the row replaces into the script."""
    for name, value in ROWS[row].items():
        setattr(script, name, value)
    for name, (title, encoder, decoder) in script.MODELS.items():
        parts = [getattr(script, part.__name__) for part in (encoder, decoder)]
        script.MODELS[name] = (title, *parts)


def train(asked):
    """One run, in this process and folder: print its closing figures, and two more."""
    for name, value in asked["settings"].items():
        setattr(script, name, value)
    set_row(asked["row"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        script.main(["--model", asked["model"]])
        block = printed.getvalue().split("\n\n")[-1]
        clips = script.load_clips()[0]["validation"]
    values = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
    model, tokenizer, max_gloss_len, _ = script.load_model(f"best_{asked['model']}.pt")
    values["recall_at_1"] = recall_at_1(model, tokenizer, max_gloss_len, clips)
    spoiled = copy.copy(clips)
    spoiled.glosses = [spoil(gloss) for gloss in clips.glosses]
    metrics = script.evaluate(model, spoiled.with_tokens(tokenizer), torch.device("cpu"))
    print(json.dumps({**values, "unknown_mse": metrics["val_mse"]}))


def run(row, model, seed, settings):
    """One run in a process and a folder of its own -> its closing figures."""
    asked = {"row": row, "model": model, "settings": {**settings, "SEED": seed, "CONFIG": None}}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(asked)]
        done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{row}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def mean_and_spread(values, digits=3):
    """A value for each seed -> "0.123 ± 0.004"; of a single one without the spread."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def table(file):
    runs = collections.defaultdict(list)
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        runs[Path(entry["data"]).name, entry["model"], entry["epochs"], entry["row"]].append(entry)
    print("| data | model | epochs | row | seeds |", *(f" {title} |" for title in SHOWN), sep="")
    print("|---" * (5 + len(SHOWN)) + "|")
    for key, group in sorted(runs.items()):
        shown = [mean_and_spread([show(entry) for entry in group]) for show in SHOWN.values()]
        print(f"| {' | '.join([*map(str, key), str(len(group)), *shown])} |")


def place_of(data):
    """A DATASET that a run in another folder finds as well."""
    return data if data == "sample" else os.path.abspath(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="a folder, or sample; none: the table alone")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="gru")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--bert", default="bert-base-uncased", help="BERT_NAME")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked, file = parser.parse_args(), Path("ablation.jsonl")
    if asked.one:
        train(json.loads(asked.one))
        return
    settings = {"EPOCHS": asked.epochs, "BERT_NAME": asked.bert}
    for row in asked.rows if asked.data else ():
        settings["DATASET"] = place_of(asked.data)
        for seed in asked.seeds:
            figures = run(row, asked.model, seed, settings)
            entry = {"row": row, "seed": seed, "epochs": asked.epochs, **figures}
            with open(file, "a") as out:
                out.write(json.dumps(entry) + "\n")
    table(file)


if __name__ == "__main__":
    main()
