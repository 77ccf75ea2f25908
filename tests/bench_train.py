"""Speed and memory of training and generation, by hand: python tests/bench_train.py (some minutes on a CPU)."""
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import model_selection as script  # noqa: E402
from helpers import small  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLIPS, FRAMES, GLOSSES = 64, 96, 8


class Autoregressive(script.GRUModel):
    """The common way: a GRU cell that is given the frame before, in Python, one frame after the other."""

    def __init__(self, hidden_dim, **sizes):
        super().__init__(hidden_dim=hidden_dim, **sizes)
        self.decoder = nn.GRUCell(hidden_dim + self.output.out_features, hidden_dim)

    def decode(self, queries, frame_mask, states, token_mask):
        hidden, pose, frames = queries.new_zeros(queries[:, 0].shape), self.mean.expand(len(queries), -1), []
        for query in queries.unbind(1):
            hidden = self.decoder(torch.cat([query, pose.to(query.dtype)], -1), hidden)
            pose = self.output(hidden)
            frames.append(hidden)
        return torch.stack(frames, 1)


def clips(n):
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(200)]
    return datasets.Dataset.from_list([
        {"gloss": " ".join(rng.choice(words, GLOSSES)), "problem": "", "seconds": FRAMES / 25,
         "pose": rng.normal(size=FRAMES * 152).astype(np.float32)} for _ in range(n)], features=script.CLIP)


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(work, least=3.0):
    """Seconds of one call, after a first one that warms up."""
    work()
    wait()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < least:
        work()
        wait()
        calls += 1
    return (time.perf_counter() - began) / calls


def trainer_of(name, batch_size, n=CLIPS):
    settings = small(MAX_FRAMES=FRAMES, EMBED_DIM=256, HIDDEN_DIM=512, BATCH_SIZE=batch_size, EPOCHS=1000, MIN_GLOSS_COUNT=1)
    part = clips(n)
    statistics, vocabulary = script.training_statistics(part, 152, 1)
    script.MODELS["autoregressive GRU"] = Autoregressive
    model, tokens, _ = script.new_model(name, statistics, vocabulary, settings)
    loader = script.make_loaders({"train": part}, tokens, settings)["train"]
    precision = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    return script.Trainer(model.to(DEVICE), 10**6, settings, precision), loader


def main():
    import contextlib
    import io
    hardware = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{hardware}, torch {torch.__version__}; {GLOSSES} glosses, {FRAMES} frames; sentences per second")
    print(f"{'':20}{'batch':>6}{'training':>10}{'generation':>12}{'outside forward, backward, optimizer':>38}{'peak MB':>9}")
    for name in ("gru", "transformer", "autoregressive GRU"):
        for batch_size in (8, 64):
            with contextlib.redirect_stdout(io.StringIO()):
                trainer, loader = trainer_of(name, batch_size)
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            epoch = timed(lambda: trainer.train(loader, 1, ""))
            batch = {key: value.to(DEVICE) if key != "n_frames" else value for key, value in next(iter(loader)).items()}

            def step():
                with torch.autocast(DEVICE.type, trainer.precision, enabled=trainer.precision != torch.float32):
                    loss, *_ = script.training_loss(trainer.model, batch, trainer.settings)
                trainer.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                trainer.optimizer.step()
            trainer.model.train()
            alone = timed(step) * len(loader)
            peak = torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else float("nan")
            trainer.averaged.eval()
            with torch.no_grad():
                generation = timed(lambda: trainer.averaged(batch["tokens"], batch["token_mask"], batch["n_frames"]))
            print(f"{name:20}{batch_size:6}{CLIPS / epoch:10.1f}{batch_size / generation:12.1f}"
                  f"{max(0, 1 - alone / epoch):38.2f}{peak:9.0f}", flush=True)
    print("an epoch of the GRU at batch size 8 with 1, 2, 4 and 8 times the data:", end="")
    for times in (1, 2, 4, 8):
        with contextlib.redirect_stdout(io.StringIO()):
            trainer, loader = trainer_of("gru", 8, CLIPS * times)
        began = time.perf_counter()
        trainer.train(loader, 1, "")
        wait()
        print(f"  {time.perf_counter() - began:.1f} s", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
