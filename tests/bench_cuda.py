"""What a GPU alone can tell: python tests/bench_cuda.py (some 6 minutes).

    --dry             on the CPU, with tiny sizes: it only shows that every step runs
    --models gru ...  without the others

Prints tables for BENCHMARKS.md. A row is measured in processes of its own: if one fails, its row
says so, and the others go on. It needs no hub.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

HOME = tempfile.TemporaryDirectory(prefix="bench-cuda-")
DRY = "--dry" in sys.argv
if __name__ == "__main__":  # the libraries read these when they are imported
    os.environ.update(HF_HOME=HOME.name, HF_DATASETS_CACHE=HOME.name, HF_HUB_OFFLINE="1")
    os.environ["NCCL_DEBUG"] = "VERSION"  # NCCL says that it is at work
    if DRY:
        os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")

sys.path.insert(0, str(Path(__file__).parent))
import bench_train  # noqa: E402
import torch  # noqa: E402
from helpers import ROOT, edited, write_bert  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

script = bench_train.script
LIMIT = 150  # seconds after which a process has failed
SENTENCES = ["WANT GO SCHOOL", "HELLO"]


class Sizes(NamedTuple):
    """How much is done."""

    settings: dict  # of the script
    encoder: dict  # BERT's
    steps: int  # of an epoch that is timed


FULL = Sizes({}, {}, steps=8)  # bert-base
TINY = Sizes(
    {"EMBED_DIM": 16, "HIDDEN_DIM": 16, "MAX_FRAMES": 8, "TRAIN_CLIPS": 16, "VALIDATION_CLIPS": 8},
    {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    steps=1,
)


# ---- the script as a user runs it
def write_script(sizes, name, **settings):
    """train_final_model.py with other settings, in a folder of its own -> the folder."""
    folder = Path(HOME.name, name)
    folder.mkdir(exist_ok=True)
    source = (ROOT / "train_final_model.py").read_text("utf8")
    settings = {"DATASET": "sample", "BERT_NAME": f"{HOME.name}/bert"} | sizes.settings | settings
    (folder / "train_final_model.py").write_text(edited(source, **settings), "utf8")
    return folder


def start(folder, *arguments, launcher=(), **variables):
    process = subprocess.Popen(
        [sys.executable, *launcher, "train_final_model.py", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )
    timer = threading.Timer(LIMIT, process.kill)
    timer.daemon = True
    timer.start()
    return process


def finish(process, status=0):
    """-> stdout, and the lines of stderr; RuntimeError if the process ends with another status."""
    out, err = process.communicate()
    lines = [line for line in err.splitlines() if line.strip()]
    if process.returncode != status:
        raise RuntimeError(f"status {process.returncode}: {lines[-1:]}")
    return out, lines


def closing(out):
    """The `name: value` lines that a training ends with."""
    return dict(re.findall(r"^(\w+): (.*)$", out, re.M))


def errors_of(folder, model):
    """The validation MSE of each finished epoch."""
    names, *rows = [line.split(",") for line in (folder / f"{model}.log").read_text().split()]
    return [f"{float(row[names.index('val_mse')]):.5f}" for row in rows]


def one_line(lines):
    return f"{len(lines)} lines: {lines[0][:150]}" if lines else "none"


def use(sizes, model):
    """Train for two epochs, Ctrl-C, --resume for one more, --predict."""
    folder = write_script(sizes, f"use-{model}")
    training = start(folder, "--model", model)
    for line in training.stdout:
        if "epoch 2/" in line:
            training.send_signal(signal.SIGINT)
            break
    _, said = finish(training, status=130)
    done = len(errors_of(folder, model))
    write_script(sizes, f"use-{model}", EPOCHS=done + 1)
    out, more = finish(start(folder, "--model", model, "--resume"))
    _, most = finish(start(folder, "--model", model, "--predict", *SENTENCES))
    return [
        f"{done}, {re.search(r'epoch ([0-9]+)/', out)[1]}",
        ", ".join(errors_of(folder, model)),
        closing(out).get("peak_gpu_memory_mb", "no GPU"),
        ", ".join(path.name for path in sorted((folder / "predictions").iterdir())),
        one_line(said[:-1] + more + most),  # the last line says that it was stopped
    ]


def learn(sizes, model, mixed, gpus=None):
    """The closing figures of a short training; gpus: the numbers of those that it sees."""
    settings = {"MIXED_PRECISION": mixed, "EPOCHS": 1 if DRY else 3}
    folder = write_script(sizes, f"learn-{model}-{mixed}-{gpus}", **settings)
    hidden = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    out, _ = finish(start(folder, "--model", model, **hidden))
    figures = closing(out)
    return [figures[name] for name in ("val_mse", "mean_pose_mse", "motion", "duration_error")]


def torchrun(sizes, processes):
    """A process for each GPU, by NCCL; on the CPU by gloo."""
    folder = write_script(sizes, f"torchrun-{processes}", EPOCHS=2, DROPOUT=0.0, WORD_DROPOUT=0.0)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    out, said = finish(start(folder, "--model", "gru", launcher=launcher))
    nccl = re.search(r"NCCL version \S+", "\n".join([out, *said]))
    said = [line for line in said if "NCCL version" not in line]
    return [nccl[0] if nccl else "gloo", ", ".join(errors_of(folder, "gru")), one_line(said)]


def fill(sizes):
    """Layers so wide that no GPU holds what a batch of the whole sample makes of them."""
    if not torch.cuda.is_available():
        return ["skipped: there is no GPU to fill"]
    folder = write_script(sizes, "full", BATCH_SIZE=320, HIDDEN_DIM=2**19)
    _, said = finish(start(folder, "--model", "transformer"), status=1)
    if not said[-1].startswith("error: GPU full"):
        raise RuntimeError(said[-1])
    return [f"`{said[-1]}`; before it: {one_line(said[:-1])}"]


# ---- speed, memory and waiting
def measure_apart(sizes, *arguments):
    """measure() in a process of its own, whose memory is its own."""
    asked = [sizes.settings, sizes.steps, *arguments]
    command = [sys.executable, __file__, "--measure", json.dumps(asked), *["--dry"] * DRY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        raise RuntimeError(done.stderr.splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure(settings, steps, bert, model, batch_size):
    """Figures of a model's training and generation, in the order of the table's columns."""
    vars(script).update(settings, BERT_NAME=bert)
    training = bench_train.Training(model, batch_size, steps * batch_size)
    made = bench_train.measure(training, rounds=1 if DRY else 3)
    waits, busy = waiting(training)
    script.MIXED_PRECISION = False
    slower = bench_train.seconds(training.epoch, rounds=1 if DRY else 3)[0]
    return [
        f"{made.training:.0f}",
        f"{len(training.clips) / slower:.0f}",
        f"{made.generation:.0f}",
        f"{100 * made.outside:.0f} %",
        f"{100 * (1 - busy * made.training / len(training.clips)):.0f} %",
        f"{waits / steps:.1f}",
        f"{made.training_memory:.0f}",
        f"{made.generation_memory:.0f}",
    ]


def waiting(training):
    """Of an epoch: how often the host waits for the GPU, and seconds in which the GPU works.

    The profiler slows the host, but not the GPU: compare the seconds to an epoch without it.
    """
    with torch.profiler.profile() as profiler:
        training.epoch()
        bench_train.wait()
    waits, busy = 0, 0
    for event in profiler.events():
        waits += re.fullmatch(r"cuda(Stream|Device|Event)Synchronize", event.name) is not None
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            busy += event.time_range.elapsed_us() / 1e6
    return waits, busy


# ---- all of it
def machine():
    gpu = ["none", "", ""]
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        gpu = [f"{torch.cuda.device_count()} x {found.name}", f"{found.total_memory / 2**30:.1f}"]
        gpu.append("yes" if bfloat16 else "no")
    versions = [version(name) for name in ("torch", "transformers", "datasets", "pose-format")]
    return [
        *gpu,
        f"{torch.version.cuda}",
        f"{os.cpu_count()}",
        platform.python_version(),
        *versions,
    ]


def table(title, columns, rows, at_once=1):
    """Print a table of rows, {name: (function, *arguments)} -> how many of them failed."""
    print(f"\n### {title}\n\n| {columns.replace('|', ' | ')} |")
    print("|---" * len(columns.split("|")) + "|")
    failed = 0
    with ThreadPoolExecutor(at_once) as pool:
        started = {name: pool.submit(*work) for name, work in rows.items()}
        for name, row in started.items():
            try:
                cells = row.result()
            except Exception as error:
                failed += 1
                cells = [f"**error**: {type(error).__name__}: {error}".replace("\n", " ")]
            print("|", " | ".join([name, *cells]), "|", flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--models", nargs="+", choices=script.MODELS, default=[*script.MODELS])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    asked, sizes, gpus = parser.parse_args(), TINY if DRY else FULL, torch.cuda.device_count()
    if asked.measure:
        print(json.dumps(measure(*json.loads(asked.measure))))
        return 0
    if not DRY and not gpus:
        sys.exit("error: no GPU here (--dry runs all of it on the CPU)")
    bert = write_bert(Path(HOME.name, "bert"))
    BertModel(BertConfig(**sizes.encoder)).save_pretrained(bert)  # larger; its weights are random
    began = time.perf_counter()
    failed = table(
        "Machine",
        "|GPU|GiB|bfloat16|CUDA|cores|Python|torch|transformers|datasets|pose-format",
        {"here": (machine,)},
    )
    failed += table(
        "Use: train for two epochs, Ctrl-C, --resume for one more, --predict",
        "model|epochs, resumed at|val_mse|peak MB|predictions|stderr",
        {model: (use, sizes, model) for model in asked.models},
        at_once=3,
    )
    learning = {}
    for model in asked.models:
        learning[f"{model}, CPU"] = (learn, sizes, model, True, "")
        learning[f"{model}, GPU"] = (learn, sizes, model, True)
        learning[f"{model}, GPU, MIXED_PRECISION = False"] = (learn, sizes, model, False)
    failed += table(
        "Learning: a short training",
        "training|val_mse|mean_pose_mse|motion|duration_error",
        learning,
        at_once=3,
    )
    failed += table(
        "Speed: sentences a second, peak memory in MB, waiting",
        "model, batch|training|with MIXED_PRECISION = False|generation"
        "|outside forward, backward, optimizer|GPU idle in training|waits of the host in a step"
        "|peak in training|in generation",
        {
            f"{model}, {batch_size}": (measure_apart, sizes, bert, model, batch_size)
            for model in [*asked.models, "autoregressive"]
            for batch_size in (8, 64)
        },
    )
    failed += table(
        "torchrun: the GRU without dropout",
        "processes|by|val_mse|stderr",
        {f"{n}": (torchrun, sizes, n) for n in sorted({1, gpus or 2})},
    )
    failed += table("Full GPU", "model|what is printed", {"transformer": (fill, sizes)})
    print(f"\nIn all {time.perf_counter() - began:.0f} s; {failed} steps failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
