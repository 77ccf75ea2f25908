"""Can the signing be read? A recogniser of glosses, for bench_baselines.py --read.

A convolution, a GRU and CTC, trained on the real training clips alone, which are shown at other
speeds, turned, scaled, shifted, with noise, smoothed, and without a hand. It must never enter the
training of a model, and never choose a checkpoint.
"""

import numpy as np
import torch
from bench_ablation import script
from torch import nn

WIDTH = 192
BATCH = 16  # clips
EPOCHS = 50
RATE = 2e-3
SMOOTHING = 2  # frames: width of a Gaussian that removes a tracker's noise


def smoothed(pose, width):
    """(T, K, 2), NaN = not seen -> the same after a Gaussian of so many frames."""
    offset = np.arange(len(pose))
    weights = np.exp(-(((offset[:, None] - offset) / width) ** 2) / 2)
    seen = np.isfinite(pose)
    total = np.einsum("ts,skx->tkx", weights, np.nan_to_num(pose))
    return np.where(seen, total / np.einsum("ts,skx->tkx", weights, seen).clip(1e-6), np.nan)


def altered(pose, rng):
    """A training clip (T, K, 2) -> as another signer or another tracker could have it."""
    n = max(6, int(len(pose) * rng.uniform(0.7, 1.3)))
    pose = script.resample(pose, n)
    angle = rng.uniform(-0.15, 0.15)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    pose = pose @ (turn * rng.uniform(0.85, 1.15, 2)) + rng.uniform(-0.08, 0.08, 2)
    pose = pose + rng.normal(0, 0.02, (1, *pose.shape[1:])) + rng.normal(0, 0.01, pose.shape)
    if rng.random() < 0.3:  # a hand is lost in some frames
        first = rng.integers(2) * len(script.HAND)
        pose[rng.random(n) < 0.3, first : first + len(script.HAND)] = np.nan
    if rng.random() < 0.5:
        pose = smoothed(pose, rng.integers(1, SMOOTHING + 1))
    return pose


class Recogniser(nn.Module):
    """Poses -> log probabilities (B, T, glosses and blank) for each frame."""

    def __init__(self, poses, glosses):
        super().__init__()
        self.numbers = {gloss: i for i, gloss in enumerate(glosses, 1)}  # 0: CTC's blank
        frames = np.concatenate(poses)
        seen = np.isfinite(frames)
        count = seen.sum(0).clip(1)
        mean = np.where(seen, frames, 0).sum(0) / count
        std = np.sqrt((np.where(seen, frames - mean, 0) ** 2).sum(0) / count) + 1e-3
        self.mean, self.std, self.shown = mean, std, seen.any(0)
        inputs = 5 * mean.shape[0]  # of each point: x, y, their speeds, and whether it is seen
        self.input = nn.Sequential(nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Dropout(0.3))
        self.near = nn.Conv1d(WIDTH, WIDTH, 5, padding=2)
        self.gru = script.TwoWayGRU(WIDTH, 256)
        self.output = nn.Sequential(nn.Dropout(0.3), nn.Linear(256, 1 + len(glosses)))

    def features(self, pose):
        seen = np.isfinite(pose) & self.shown
        pose = np.where(seen, (np.nan_to_num(pose) - self.mean) / self.std, 0)
        speed = np.diff(pose, axis=0, prepend=pose[:1]) * (seen & np.roll(seen, 1, 0))
        parts = [pose.reshape(len(pose), -1), 3 * speed.reshape(len(pose), -1), seen[..., 0]]
        return torch.tensor(np.concatenate(parts, 1), dtype=torch.float32)

    def forward(self, poses):
        features = [self.features(pose) for pose in poses]
        lengths = torch.tensor([len(x) for x in features])
        hidden = self.input(nn.utils.rnn.pad_sequence(features, batch_first=True))
        mask = torch.arange(hidden.shape[1]) < lengths[:, None]
        hidden = hidden * mask[..., None]
        hidden = hidden + self.near(hidden.mT).mT.relu()
        return self.output(self.gru(hidden, mask)).log_softmax(-1), lengths

    def read(self, poses):
        """Poses [(T, K, 2)], NaN = not shown -> the glosses that are read off each."""
        sentences, glosses = [], [None, *self.numbers]
        for first in range(0, len(poses), 64):
            with torch.no_grad():
                output, lengths = self(poses[first : first + 64])
            for best, length in zip(output.argmax(-1).tolist(), lengths.tolist(), strict=True):
                pairs = zip(best[:length], [0, *best], strict=False)
                sentences.append([glosses[i] for i, before in pairs if i not in (0, before)])
        return sentences


def train(poses, sentences, seed):
    """Real training clips [(T, K, 2)] and their glosses -> Recogniser."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = Recogniser(poses, sorted({gloss for sentence in sentences for gloss in sentence}))
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=1e-2)
    steps = EPOCHS * -(-len(poses) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for _ in range(EPOCHS):
        for numbers in torch.randperm(len(poses)).split(BATCH):
            output, lengths = net([altered(poses[i], rng) for i in numbers.tolist()])
            said = [[net.numbers[gloss] for gloss in sentences[i]] for i in numbers.tolist()]
            targets = torch.tensor([number for sentence in said for number in sentence])
            sizes = torch.tensor([len(sentence) for sentence in said])
            loss = nn.functional.ctc_loss(
                output.transpose(0, 1), targets, lengths, sizes, zero_infinity=True
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return net.eval()
