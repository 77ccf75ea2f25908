"""What each choice is worth, by hand: python tests/bench_ablation.py DATA [--rows R ...]

Every row is train_final_model.py with other settings, or with another class in place of one of its
own, run in a process of its own with EPOCHS = 10. A line per run goes to ablation.jsonl; the table
of all that it holds is printed. On a CPU core a run takes minutes. What was measured and decided
stands in ABLATION.md.
"""

import argparse
import collections
import contextlib
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

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import train_final_model as script  # noqa: E402


class FreeAttention(script.GRUModel):
    """Frames search the glosses by their time and phase alone; durations place nothing."""

    def __init__(self, hidden_dim, **sizes):
        super().__init__(hidden_dim=hidden_dim, **sizes)
        self.search = torch.nn.Linear(2 * script.WAVE_DIM, hidden_dim)

    def place_signs(self, signs, token_mask, durations, time, phase):
        time = script.sinusoidal_features(time).expand(*phase.shape, -1)
        phase = script.sinusoidal_features(phase)
        search = self.search(torch.cat([phase, time], -1))
        scores = search @ signs.transpose(1, 2) / math.sqrt(signs.shape[-1])
        window = scores.masked_fill(~token_mask[:, None], -math.inf).softmax(-1)
        nowhere = torch.zeros_like(phase)
        return self.query(torch.cat([window @ signs, nowhere, phase, time], -1))


class TwoDecoderLayers(script.GRUModel):
    def __init__(self, hidden_dim, **sizes):
        super().__init__(hidden_dim=hidden_dim, **sizes)
        self.second = script.TwoWayGRU(hidden_dim, hidden_dim)

    def decode(self, queries, frame_mask, states, token_mask):
        queries = super().decode(queries, frame_mask, states, token_mask)
        return queries + self.second(queries, frame_mask)


class SignsFromSentences(script.GRUModel):
    """What is signed, too, comes from the word within its sentence."""

    def encode(self, tokens, token_mask):
        _, states = super().encode(tokens, token_mask)
        return states, states


class TextOrder(script.Plan):
    """No plan: the signs are the tokens in the order of the text."""

    def forward(self, states, durations, token_mask):
        places = torch.arange(states.shape[1]).expand(token_mask.shape)
        return places, torch.eye(states.shape[1]).expand(len(states), -1, -1)


class KeysByPlaces(script.Plan):
    """Keys are moved by the places of the tokens, signed or not."""

    def forward(self, states, durations, token_mask):
        return super().forward(states, token_mask.float(), token_mask)


class Attention(script.Plan):
    """Sign i reads the tokens by attention, and begins by reading token i."""

    def __init__(self, states_dim):
        super().__init__(states_dim)
        self.query = torch.nn.Linear(states_dim, states_dim)
        self.key = torch.nn.Linear(states_dim, states_dim)
        self.own_token = torch.nn.Parameter(torch.tensor(3.0))

    def scores(self, states, token_mask):
        place = torch.arange(states.shape[1]).expand(token_mask.shape)
        behind = token_mask.sum(1, keepdim=True) - 1 - place
        waves = [script.sinusoidal_features(x / self.half_turn) for x in (place, behind)]
        placed = states + self.counts(torch.cat(waves, -1))
        scores = self.query(placed) @ self.key(placed).mT / math.sqrt(states.shape[-1])
        return scores + self.own_token * torch.eye(states.shape[1])

    def forward(self, states, durations, token_mask):
        scores = self.scores(states, token_mask)
        order = scores.masked_fill(~token_mask[:, None], -math.inf).softmax(-1)
        return order.argmax(1), order  # a token's key is the sign that reads it most


class Sinkhorn(Attention):
    """The attention's rows and columns are normalised in turn, so that no token is read twice."""

    def forward(self, states, durations, token_mask):
        real = token_mask[:, None] & token_mask[:, :, None]
        scores = self.scores(states, token_mask).masked_fill(~real, -1e4)
        for _ in range(4):
            for side in (1, 2):
                scores = scores - scores.logsumexp(side, keepdim=True)
        order = scores.exp() * real
        return order.argmax(1), order


class DropoutByFrames(script.GRUModel):
    """Every frame drops features by itself."""

    def drop_features(self, frames):
        return self.dropout(frames)


class UsualInitialisation(script.TransformerModel):
    """PyTorch's own, whose layers do not begin as the identity."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        for name, weight in self.core.named_parameters():
            if weight.dim() == 2 and ("out_proj" in name or "linear2" in name):
                torch.nn.init.xavier_uniform_(weight)


# A row's name -> other settings, and other classes by the model's name or in the Plan's place
ROWS = {
    "as shipped": ({}, {}),
    "no speed loss": ({"SPEED_WEIGHT": 0.0}, {}),
    "no word dropout": ({"WORD_DROPOUT": 0.0}, {}),
    "no average of the weights": ({"AVERAGE": 0.0}, {}),
    "dropout 0.3": ({"DROPOUT": 0.3}, {}),
    "word dropout 0.2": ({"WORD_DROPOUT": 0.2}, {}),
    "speed loss 0.3": ({"SPEED_WEIGHT": 0.3}, {}),
    "speed loss 1": ({"SPEED_WEIGHT": 1.0}, {}),
    "warm-up of 1 %": ({"WARMUP": 0.01}, {}),
    "half the width": ({"HIDDEN_DIM": 256, "EMBED_DIM": 128}, {}),
    "free attention, no durations": ({}, {"gru": FreeAttention}),
    "no plan": ({}, {"Plan": TextOrder}),
    "keys by places alone": ({}, {"Plan": KeysByPlaces}),
    "signs read by attention": ({}, {"Plan": Attention}),
    "attention, each token read once": ({}, {"Plan": Sinkhorn}),
    "signs from the sentence": ({}, {"gru": SignsFromSentences}),
    "dropout by frames": ({}, {"gru": DropoutByFrames}),
    "dropout by frames, speed loss 0.3": ({"SPEED_WEIGHT": 0.3}, {"gru": DropoutByFrames}),
    "two decoder layers": ({}, {"gru": TwoDecoderLayers}),
    "usual initialisation": ({}, {"transformer": UsualInitialisation}),
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
    glosses = clips["gloss"][:]
    made = script.generate(model, tokenizer, glosses, max_gloss_len, torch.device("cpu"))
    poses = [clip["pose"].reshape(-1, model.mean.numel() // 2, 2) for clip in clips]
    real = np.stack([script.resample(pose, 32) for pose in poses])
    found = 0
    for gloss, signed in zip(glosses, made, strict=True):
        error = np.nanmean((script.resample(signed.pose, 32) - real) ** 2, axis=(1, 2, 3))
        found += glosses[int(np.nanargmin(error))] == gloss
    return found / len(glosses)


def spoil(clip):
    """One gloss of a sentence becomes one that training never had."""
    words = clip["gloss"].split()
    words[random.Random(clip["gloss"]).randrange(len(words))] = "NEVERSEEN"
    return {"gloss": " ".join(words)}


def train(asked):
    """One run, in this process and folder -> prints its closing block, with two figures more."""
    settings, classes = ROWS[asked["row"]]
    for name, value in {**asked["settings"], **settings}.items():
        setattr(script, name, value)
    script.Plan = classes.get("Plan", script.Plan)
    script.MODELS.update({name: made for name, made in classes.items() if name != "Plan"})
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        script.main(["--model", asked["model"]])
        clips, _ = script.load_clips()
    block = printed.getvalue().split("\n\n")[-1].split("\ndata  ")[0]
    values = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
    model, tokenizer, length = script.load_checkpoint(f"best_{asked['model']}.pt")
    validation = clips["validation"].with_format("numpy")
    values["recall_at_1"] = recall_at_1(model, tokenizer, length, validation)
    spoiled = {**clips, "validation": clips["validation"].map(spoil)}
    loader = script.make_loaders(spoiled, tokenizer)["validation"]
    values["unknown_mse"] = script.evaluate(model, loader, torch.device("cpu"))["val_mse"]
    print(json.dumps(values))


def run(row, model, seed, settings):
    """One run in a process and a folder of its own -> its closing figures."""
    asked = {"row": row, "model": model, "settings": {**settings, "SEED": seed, "CONFIG": None}}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(asked)]
        done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{row}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(file):
    runs = collections.defaultdict(list)
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        runs[Path(entry["data"]).name, entry["model"], entry["epochs"], entry["row"]].append(entry)
    print("| data | model | epochs | edit | seeds |", *(f" {title} |" for title in SHOWN), sep="")
    print("|---" * (5 + len(SHOWN)) + "|")
    for key, group in sorted(runs.items()):
        shown = []
        for show in SHOWN.values():
            values = [show(entry) for entry in group]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            shown.append(f"{np.mean(values):.3f}{spread}")
        print(f"| {' | '.join([*map(str, key), str(len(group)), *shown])} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="a folder of gloss and pose; none: the table alone")
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
        settings["DATASET"] = os.path.abspath(asked.data)
        for seed in asked.seeds:
            figures = run(row, asked.model, seed, settings)
            entry = {"row": row, "seed": seed, "epochs": asked.epochs, **figures}
            with open(file, "a") as out:
                out.write(json.dumps(entry) + "\n")
    table(file)


if __name__ == "__main__":
    main()
