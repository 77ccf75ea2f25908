"""What each choice is worth, by hand: python tests/bench_ablation.py DATA_FOLDER [--rows R ...] [--seeds 0 1 2]

Every row is train_final_model.py with one edit, run as a user runs it with EPOCHS = 10. A line per run goes to
ablation.jsonl; the table of all that it holds is printed. On a CPU core a run takes minutes.
"""
import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from helpers import ROOT, edited  # noqa: E402

LOSS = "    loss = mse / variance +"
DECODER = "self.encoder, self.decoder = TwoWayGRU(embed_dim, hidden_dim), TwoWayGRU(hidden_dim, hidden_dim)"
DECODE = "        return queries + self.decoder(queries, frame_mask)\n"
ENCODE = "        return self.dropout(self.encoder(self.dropout(self.embed(tokens)), token_mask))\n"
MODEL = '    pose, seconds = model(batch["tokens"], batch["token_mask"], batch["n_frames"])\n    difference'
RISE = "min(\n            1, (step + 1) / max(1, settings.WARMUP * steps))"
RATE = RISE + " * (0.5 + 0.5 * math.cos(math.pi * step / steps))"
AUTOREGRESSIVE = {DECODER: """self.encoder, self.own, self.calls = TwoWayGRU(embed_dim, hidden_dim), OWN, 0
        self.decoder = nn.GRU(hidden_dim + self.output.out_features, hidden_dim, batch_first=True)""",
                  DECODE: """
        if self.training:
            self.calls += 1
            real = ((self.teacher - self.mean) / self.deviation).nan_to_num()
            if not self.own:
                before = nn.functional.pad(real, (0, 0, 1, 0))[:, :queries.shape[1]]
                return queries + self.decoder(torch.cat([queries, before], -1))[0]
        before, hidden, made = queries.new_zeros(len(queries), 1, self.mean.numel()), None, []
        for t in range(queries.shape[1]):
            state, hidden = self.decoder(torch.cat([queries[:, t:t + 1], before], -1), hidden)
            made.append(queries[:, t:t + 1] + state)
            before = self.output(made[-1])
            if self.training:  # the share of its own frames rises to `own` in 500 steps
                mine = torch.rand(len(queries), 1, 1) < self.own * min(1, self.calls / 500)
                before = torch.where(mine, before.detach(), real[:, t:t + 1])
        return torch.cat(made, 1)
""", MODEL: "    model.teacher = batch['pose']\n" + MODEL}
AUGMENT = """    turn = 0.05 * torch.randn(len(batch["pose"])) if model.training else torch.zeros(len(batch["pose"]))
    grow = 1 + 0.05 * torch.randn(len(turn)) * model.training
    matrix = torch.stack([torch.stack([turn.cos(), -turn.sin()], -1), torch.stack([turn.sin(), turn.cos()], -1)], 1)
    points = batch["pose"].unflatten(-1, (-1, 2)) @ (matrix * grow[:, None, None])[:, None]
    batch = {**batch, "pose": points.flatten(2)}
"""
WARP = """    last, t = batch["n_frames"][:, None] - 1, torch.arange(batch["pose"].shape[1])[None]
    bend = (0.05 * torch.randn(len(last), 1)).clamp(-0.15, 0.15) * model.training
    at = torch.where(t < last, t + bend * last * (math.pi * t / last).sin(), t)[..., None]
    before, after = (torch.take_along_dim(batch["pose"], x.long(), 1) for x in (at.floor(), at.ceil()))
    batch = {**batch, "pose": before + (after - before) * (at - at.floor())}
"""
FREE = {"        self.dropout = nn.Dropout(dropout)\n":
        "        self.dropout, self.search = nn.Dropout(dropout), nn.Linear(22, states_dim)\n",
        "        window = nearness.masked_fill(~token_mask[:, None], -math.inf).softmax(-1)  # (B, T, S)\n": """
        search = self.search(torch.cat([waves(phase), waves(time).expand(*phase.shape, -1)], -1))
        scores = search @ states.transpose(1, 2) / math.sqrt(states.shape[-1]) + 0 * nearness
        window = scores.masked_fill(~token_mask[:, None], -math.inf).softmax(-1)
""", "        position = (window[..., None] * waves(within)).sum(2)\n":
        "        position = 0 * (window[..., None] * waves(within)).sum(2)\n"}
BEHIND = {DECODER: DECODER + "\n        self.attention = nn.MultiheadAttention(hidden_dim, 4, batch_first=True)",
          DECODE: """        frames = queries + self.decoder(queries, frame_mask)
        return frames + self.attention(frames, states, states, key_padding_mask=~token_mask)[0]
"""}
VELOCITY = """    real, own = batch["pose"].diff(dim=1), pose[:, :seen.shape[1]].diff(dim=1)
    extra = torch.where(real.isfinite(), own - real, 0).square().sum() / real.square().nansum()
"""
BONES = """    joints = [(21 * hand, 4 * finger, j) for hand in range(2) for finger in range(5) for j in range(1, 5)]
    parents = [hand + (0 if j == 1 else j - 1 + finger) for hand, finger, j in joints]
    children = [hand + finger + j for hand, finger, j in joints]
    real, own = (x.unflatten(-1, (-1, 2)) for x in (batch["pose"], pose[:, :seen.shape[1]]))
    real, own = (x[:, :, children] - x[:, :, parents] for x in (real, own))
    extra = torch.where(real.isfinite(), own - real, 0).square().sum() / real.square().nansum()
"""
# After the training: the MSE where one gloss of each validation sentence is one that training never had
UNKNOWN = """
import random, sys, torch, train_final_model as script
def spoil(clip):
    words = clip["gloss"].split()
    words[random.Random(clip["gloss"]).randrange(len(words))] = "NEVERSEEN"
    return {"gloss": " ".join(words)}
settings = script.read_settings(vars(script))
clips, _ = script.load_clips(settings)
model, tokens = script.load_checkpoint(sys.argv[1])
loaders = script.make_loaders({"validation": clips["validation"].map(spoil)}, tokens, settings)
print(script.evaluate(model, loaders["validation"], torch.device("cpu"))["val_mse"])
"""


def layers(n):
    """The decoder of the GRU and of BERT with n layers, each of which adds to its input."""
    stack = f"nn.ModuleList(TwoWayGRU(hidden_dim, hidden_dim) for _ in range({n}))"
    return {DECODER: f"self.encoder = TwoWayGRU(embed_dim, hidden_dim)\n        self.decoder = {stack}",
            "        self.decoder = TwoWayGRU(hidden_dim, hidden_dim)\n": f"        self.decoder = {stack}\n",
            DECODE: """        for layer in self.decoder:
            queries = queries + layer(queries, frame_mask)
        return queries
"""}


# A row's name -> its edits: constants, and pieces of the source
ROWS = {
    "as shipped": {},
    "no speed loss": dict(SPEED_WEIGHT=0.0),
    "no word dropout": dict(WORD_DROPOUT=0.0),
    "neither": dict(SPEED_WEIGHT=0.0, WORD_DROPOUT=0.0),
    "free attention, no durations": FREE,
    "free attention behind the decoder": BEHIND,
    "autoregressive, teacher forcing": {**AUTOREGRESSIVE, DECODER: AUTOREGRESSIVE[DECODER].replace("OWN", "0")},
    "autoregressive, scheduled sampling": {**AUTOREGRESSIVE, DECODER: AUTOREGRESSIVE[DECODER].replace("OWN", "0.5")},
    "no average of the weights": dict(AVERAGE=0.0),
    "dropout 0.3": dict(DROPOUT=0.3),
    "word dropout 0.2": dict(WORD_DROPOUT=0.2),
    "speed loss 0.1": dict(SPEED_WEIGHT=0.1),
    "speed loss 1": dict(SPEED_WEIGHT=1.0),
    "velocity loss 0.1 in its place": {LOSS: VELOCITY + LOSS + " 0.1 * extra +", "SPEED_WEIGHT": 0.0},
    "bone-vector loss 0.3": {LOSS: BONES + LOSS + " 0.3 * extra +"},
    "hands weigh double": {"    real, clip =": "    difference = difference * (1 + (torch.arange(152) < 84) * 0.4142)\n"
                           "    real, clip ="},
    "standardised loss": {"for x in (difference, slow, late)": "for x in (difference / getattr(model, 'module', model)"
                          ".deviation * 0.3, slow, late)"},
    "rotations and scales, 0.05": {MODEL: AUGMENT + MODEL},
    "time warp": {MODEL: WARP + MODEL},
    "warm-up of 1 %": dict(WARMUP=0.01),
    "constant rate after the warm-up": {RATE: RISE},
    "one-way decoder": {DECODER: "self.encoder = TwoWayGRU(embed_dim, hidden_dim)\n"
                        "        self.decoder = nn.GRU(hidden_dim, hidden_dim, batch_first=True)",
                        DECODE: "        return queries + self.decoder(queries)[0]\n"},
    "half the width": dict(HIDDEN_DIM=256, EMBED_DIM=128),
    "two decoder layers": layers(2),
    "three decoder layers": layers(3),
    "two encoder layers": {DECODER: DECODER + "\n        self.second = TwoWayGRU(hidden_dim, hidden_dim)",
                           ENCODE: "        states = self.encoder(self.dropout(self.embed(tokens)), token_mask)\n"
                           "        return self.dropout(states + self.second(self.dropout(states), token_mask))\n"},
    "a token before and behind": {
        "for gloss in words] for words in rows]": "for gloss in ['<s>', *words, '</s>']] for words in rows]",
        '["<pad>", "<unk>", *kept]': '["<pad>", "<unk>", "<s>", "</s>", *kept]'},
    "usual initialisation": {"            nn.init.zeros_(weight)": "            pass"},  # of the Transformer
    "three parts, equal shares": {  # of a gloss's duration, each with a state of its own
        "        self.dropout = nn.Dropout(dropout)\n":
        "        self.dropout, self.parts = nn.Dropout(dropout), nn.Linear(states_dim, 3 * states_dim)\n",
        "        seconds = durations.sum(1) * self.seconds_per_gloss\n":
        "        seconds = durations.sum(1) * self.seconds_per_gloss\n"
        "        states = self.parts(states).unflatten(-1, (3, -1)).flatten(1, 2)\n"
        "        token_mask, durations = (x.repeat_interleave(3, 1) for x in (token_mask, durations / 3))\n"},
    "three parts, each with its duration": {
        "        self.dropout = nn.Dropout(dropout)\n":
        "        self.dropout, self.parts = nn.Dropout(dropout), nn.Linear(states_dim, 3 * states_dim)\n",
        "        states = self.encode(tokens, token_mask)  # (B, S, H)\n":
        "        states = self.parts(self.encode(tokens, token_mask)).unflatten(-1, (3, -1)).flatten(1, 2)\n"
        "        token_mask = token_mask.repeat_interleave(3, 1)\n",
        "nn.functional.softplus(raw) * token_mask": "nn.functional.softplus(raw) / 3 * token_mask"},
    "time without phase": {"position, waves(phase),": "position, 0 * waves(phase),"},
}
SHOWN = {"MSE / mean pose": lambda r: float(r["val_mse"]) / float(r["mean_pose_mse"]),
         **{title: lambda r, key=key: float(r[key]) for title, key in [
             ("DTW-MJE", "val_dtw_mje"), ("motion", "motion"), ("recall@1", "recall_at_1"),
             ("duration error, s", "duration_error")]},
         "MSE, a gloss unknown": lambda r: float(r.get("unknown_mse", "nan")) / float(r["mean_pose_mse"])}


def with_edits(source, row, **settings):
    """The script with a row's edits and other settings."""
    constants = {name: value for name, value in ROWS[row].items() if name.isupper()}
    for old, new in ROWS[row].items():
        if old not in constants:
            assert source.count(old) == 1, f"{row}: the script has changed: {old}"
            source = source.replace(old, new)
    return edited(source, **{**settings, **constants})


def closing(model, row, data, seed, settings):
    """One run of the edited script -> its closing block as a dict."""
    source = with_edits((ROOT / "train_final_model.py").read_text("utf8"), row, DATASET=os.path.abspath(data),
                        CONFIG=None, SEED=seed, **settings)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train_final_model.py").write_text(source, "utf8")
        block = run(row, folder, "train_final_model.py", "--model", model)
        unknown = run(row, folder, "-c", UNKNOWN, f"best_{model}.pt")
    values = dict(line.split(": ", 1) for line in block.rpartition("\n\n")[2].splitlines() if ": " in line)
    return {**values, "unknown_mse": unknown.split()[-1]}


def run(row, folder, *what):
    """What Python prints, in a row's folder; SystemExit where it fails."""
    done = subprocess.run([sys.executable, *what], cwd=folder, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{row}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def table(file):
    runs = collections.defaultdict(list)
    for line in file.read_text().splitlines():
        run = json.loads(line)
        runs[Path(run["data"]).name, run["model"], run["epochs"], run["row"]].append(run)
    print("| data | model | epochs | edit | seeds |", *(f" {title} |" for title in SHOWN), sep="")
    print("|---" * (5 + len(SHOWN)) + "|")
    for key, group in sorted(runs.items(), key=lambda item: (item[0][:3], [*ROWS].index(item[0][3]))):
        values = [[show(run) for run in group] for show in SHOWN.values()]
        shown = [f"{np.mean(v):.3f}" + (f" ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else "") for v in values]
        print(f"| {' | '.join([*map(str, key), str(len(group)), *shown])} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="a folder with the columns gloss and pose; none: print the table alone")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="gru")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--bert", default="bert-base-uncased", help="BERT_NAME")
    asked, file = parser.parse_args(), Path("ablation.jsonl")
    for row in asked.rows if asked.data else ():
        for seed in asked.seeds:
            run = closing(asked.model, row, asked.data, seed, dict(EPOCHS=asked.epochs, BERT_NAME=asked.bert))
            with open(file, "a") as out:
                out.write(json.dumps({"row": row, "seed": seed, "epochs": asked.epochs, **run}) + "\n")
    table(file)


if __name__ == "__main__":
    main()
