"""What a GPU alone can tell: python tests/bench_cuda.py (some 6 minutes).

    --dry             on the CPU, with tiny sizes: it only shows that every step runs
    --models gru ...  without the others

Prints tables for BENCHMARKS.md. A row is measured in processes of its own: if one fails, its row
says so, and the others go on. It needs no hub.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
import transformers  # noqa: E402
from helpers import ROOT, edited, write_bert  # noqa: E402

script = bench_train.script
LIMIT = 150  # seconds after which a process has failed
SETTINGS = {"DATASET": "sample", "BERT_NAME": f"{HOME.name}/bert"}
BERT = {}  # its sizes: bert-base's
STEPS = 8  # of an epoch that is timed
ROUNDS = 3
if DRY:
    SETTINGS |= {"EMBED_DIM": 16, "HIDDEN_DIM": 16, "MAX_FRAMES": 8, "TRAIN_CLIPS": 16}
    BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    STEPS = ROUNDS = 1


# ---- the script as a user runs it
def write_script(name, **settings):
    """train_final_model.py with other settings, in a folder of its own -> the folder."""
    folder = Path(HOME.name, name)
    folder.mkdir(exist_ok=True)
    source = edited((ROOT / "train_final_model.py").read_text("utf8"), **{**SETTINGS, **settings})
    (folder / "train_final_model.py").write_text(source, "utf8")
    return folder


def run(folder, *command, status=0, **variables):
    """Python with a command -> stdout, and the lines of stderr."""
    pipes = {"capture_output": True, "text": True, "timeout": LIMIT}
    variables = os.environ | variables
    done = subprocess.run([sys.executable, *command], cwd=folder, env=variables, **pipes)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode != status:
        raise RuntimeError(f"status {done.returncode}: {lines[-1:]}")
    return done.stdout, lines


def closing(out):
    """The `name: value` lines that a training ends with."""
    return dict(re.findall(r"^(\w+): (.*)$", out, re.M))


def errors_of(folder, model):
    """The validation MSE of each finished epoch."""
    names, *rows = [line.split(",") for line in (folder / f"{model}.log").read_text().split()]
    return [f"{float(row[names.index('val_mse')]):.5f}" for row in rows]


def first_of(lines):
    return f"{len(lines)} lines: {lines[0][:150]}" if lines else "none"


def use(model):
    """Train for two epochs, Ctrl-C, --resume for one more, --predict."""
    folder = write_script(f"use-{model}")
    command = ["train_final_model.py", "--model", model]
    started = [sys.executable, *command]
    with subprocess.Popen(started, cwd=folder, stdout=subprocess.PIPE, text=True) as training:
        next(line for line in training.stdout if "epoch 2/" in line)
        training.send_signal(signal.SIGINT)
    if training.returncode != 130:
        raise RuntimeError(f"Ctrl-C ended it with {training.returncode}")
    done = len(errors_of(folder, model))
    write_script(f"use-{model}", EPOCHS=done + 1)
    out, said = run(folder, *command, "--resume")
    _, more = run(folder, *command, "--predict", "WANT GO SCHOOL", "HELLO")
    return [
        f"{done}, {re.search(r'epoch ([0-9]+)/', out)[1]}",
        ", ".join(errors_of(folder, model)),
        closing(out).get("peak_gpu_memory_mb", "no GPU"),
        ", ".join(path.name for path in sorted((folder / "predictions").iterdir())),
        first_of(said + more),
    ]


def learn(model, mixed, variables):
    """The closing figures of a short training."""
    name = f"learn-{model}-{mixed}-{len(variables)}"
    folder = write_script(name, MIXED_PRECISION=mixed, EPOCHS=ROUNDS)
    figures = closing(run(folder, "train_final_model.py", "--model", model, **variables)[0])
    return [figures[name] for name in ("val_mse", "mean_pose_mse", "motion", "duration_error")]


def torchrun(processes):
    """A process for each GPU, by NCCL; on the CPU by gloo."""
    folder = write_script(f"torchrun-{processes}", EPOCHS=2, DROPOUT=0.0, WORD_DROPOUT=0.0)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    out, said = run(folder, *launcher, "train_final_model.py", "--model", "gru")
    nccl = re.search(r"NCCL version \S+", "\n".join([out, *said]))
    said = [line for line in said if "NCCL version" not in line]
    return [nccl[0] if nccl else "gloo", ", ".join(errors_of(folder, "gru")), first_of(said)]


def fill():
    """Layers so wide that no GPU holds what a batch of the whole sample makes of them."""
    folder = write_script("full", BATCH_SIZE=320, HIDDEN_DIM=2**19)
    _, said = run(folder, "train_final_model.py", "--model", "transformer", status=1)
    return [said[-1]]


# ---- speed, memory and waiting
def measure_apart(*arguments):
    """measure() in a process of its own, whose memory is its own."""
    out, _ = run(HOME.name, __file__, "--measure", *arguments, *["--dry"] * DRY)
    return json.loads(out.splitlines()[-1])


SPEED = "model, batch|training|with MIXED_PRECISION = False|generation|GPU idle in training"
SPEED += "|outside forward, backward, optimizer|waits of the host in a step|peak in training"
SPEED += "|in generation"


def measure(bert, model, batch_size):
    """The figures of a row of SPEED."""
    vars(script).update(SETTINGS, BERT_NAME=bert)
    training = bench_train.Training(model, int(batch_size), STEPS * int(batch_size))
    made = bench_train.measure(training, ROUNDS)
    waits, busy = waiting(training)
    script.MIXED_PRECISION = False
    epoch = bench_train.seconds(training.epoch, rounds=ROUNDS)[0]
    return [
        f"{made.training:.0f}",
        f"{len(training.clips) / epoch:.0f}",
        f"{made.generation:.0f}",
        f"{100 * (1 - busy * made.training / len(training.clips)):.0f} %",
        f"{100 * made.outside:.0f} %",
        f"{waits / STEPS:.1f}",
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
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    asked, gpus = parser.parse_args(), torch.cuda.device_count()
    if asked.measure:
        print(json.dumps(measure(*asked.measure)))
        return
    if not DRY and not gpus:
        sys.exit("error: no GPU here (--dry runs all of it on the CPU)")
    bert = write_bert(Path(HOME.name, "bert"))
    larger = transformers.BertModel(transformers.BertConfig(**BERT))  # with random weights
    larger.save_pretrained(bert)
    began = time.perf_counter()
    name = torch.cuda.get_device_name() if gpus else "no GPU"
    print(f"{gpus} x {name}, torch {torch.__version__}, transformers {transformers.__version__}")
    failed = table(
        "Use: train for two epochs, Ctrl-C, --resume for one more, --predict",
        "model|epochs, resumed at|val_mse|peak MB|predictions|stderr",
        {model: (use, model) for model in asked.models},
        at_once=3,
    )
    learning = {}
    for model in asked.models:
        learning[f"{model}, CPU"] = (learn, model, True, {"CUDA_VISIBLE_DEVICES": ""})
        learning[f"{model}, GPU"] = (learn, model, True, {})
        learning[f"{model}, GPU, MIXED_PRECISION = False"] = (learn, model, False, {})
    columns = "training|val_mse|mean_pose_mse|motion|duration_error"
    failed += table("Learning: a short training", columns, learning, at_once=3)
    speed = {}
    for model in [*asked.models, "autoregressive"]:
        for batch_size in ("8", "64"):
            speed[f"{model}, {batch_size}"] = (measure_apart, bert, model, batch_size)
    failed += table("Speed: sentences a second, peak memory in MB, waiting", SPEED, speed)
    processes = {f"{n}": (torchrun, n) for n in sorted({1, gpus or 2})}
    failed += table("torchrun: the GRU", "processes|by|val_mse|stderr", processes)
    if gpus:
        failed += table("A full GPU", "model|what is printed", {"transformer": (fill,)})
    print(f"\nIn all {time.perf_counter() - began:.0f} s; {failed} steps failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
