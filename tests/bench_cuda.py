"""All that is to be seen on CUDA: python tests/bench_cuda.py (at most 6 minutes on one GPU).

    --dry               on the CPU, with tiny sizes: it only shows that every step runs
    --only WORD ...     the tables with one of these words in their titles, and the first
    --models gru ...    without the others

Prints tables for BENCHMARKS.md, a row as soon as it is there, the most important first. Each row is
a step in a process of its own: where it fails, its row says so, and the others go on. It needs no
hub, torch 2.8 or later, and transformers 5.0 or later.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

HOME = tempfile.TemporaryDirectory(prefix="bench-cuda-")
if __name__ == "__main__":  # the libraries read these when they are imported
    os.environ.update(
        HF_HOME=HOME.name,
        HF_DATASETS_CACHE=f"{HOME.name}/datasets",
        HF_HUB_OFFLINE="1",
        NCCL_DEBUG="VERSION",  # it says that it is at work
        PYTHONDONTWRITEBYTECODE="1",
        PYTORCH_NVML_BASED_CUDA_CHECK="1",  # a look for a GPU must not start CUDA before the forks
        TOKENIZERS_PARALLELISM="false",
    )
    if "--dry" in sys.argv:
        os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", KINETO_LOG_LEVEL="6")

# small wheels of pure Python, which a machine with a GPU may lack: {module: wheel}
WHEELS = {name: name for name in ("datasets", "dill", "multiprocess")}
WHEELS["pose_format"] = "pose-format"
missing = [wheel for name, wheel in WHEELS.items() if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"error: not installed: {', '.join(missing)}")

sys.path.insert(0, str(Path(__file__).parent))
import bench_train  # noqa: E402 (before torch, as it says itself)

# isort: split
import datasets  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401 (else each step's first optimizer imports it anew)
import transformers  # noqa: E402
from torch import nn  # noqa: E402
from transformers import BertConfig, BertModel, BertTokenizer  # noqa: E402

script = bench_train.script
MODELS = ["gru", "transformer", "bert"]
STEP_SECONDS = 150  # after which a step has failed
CLOSE = 1e-3  # to which both devices must agree in float32
BATCH_SIZES = (8, 64)


class Sizes(NamedTuple):
    """How much is done."""

    settings: dict  # of the scripts
    rows: tuple  # of the sample's training and validation split
    learning: dict  # settings of the trainings whose metrics are compared
    encoder: dict  # bert-base's, where nothing is said
    steps: int  # of an epoch that is timed
    rounds: int


FULL = Sizes(
    settings={},
    rows=(320, 80),
    learning={"TRAIN_CLIPS": 160, "EPOCHS": 3},
    encoder={},
    steps=8,
    rounds=3,
)
DRY = Sizes(
    settings={"EMBED_DIM": 16, "HIDDEN_DIM": 16, "MAX_FRAMES": 8},
    rows=(16, 8),
    learning={"EPOCHS": 1},
    encoder={
        "vocab_size": 100,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    },
    steps=1,
    rounds=1,
)


class Section(NamedTuple):
    """A table. A step gives a row, whose first cell is the step's name."""

    title: str
    columns: str  # with | between them
    steps: dict  # {name: (function of Sizes and more -> cells, *more)}
    together: bool = False  # all steps at the same time, where no time is measured


# ---- 1. the machine
def machine(sizes):
    gpu = ["none", "", ""]
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        gpu = [
            f"{torch.cuda.device_count()} x {found.name}",
            f"{found.total_memory / 2**30:.1f}",
            "yes" if bfloat16 else "no",
        ]
    torches = [torch.__version__, f"{torch.version.cuda}", f"{torch.backends.cudnn.version()}"]
    packages = [version(name) for name in ("transformers", "datasets", "pose-format")]
    return [*gpu, f"{os.cpu_count()}", platform.python_version(), *torches, *packages]


def write_encoder(sizes):
    """A random encoder of bert-base's shape with a tokenizer of few word pieces."""
    words = script.SAMPLE_WORDS.lower().split()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    tokenizer.save_pretrained(f"{HOME.name}/encoder")
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(**sizes.encoder))
    encoder.save_pretrained(f"{HOME.name}/encoder")
    return [f"{sum(value.numel() for value in encoder.parameters())}"]


def settings_of(sizes, more):
    """{name: value}, for the scripts."""
    ours = {"DATASET": "sample", "BERT_NAME": f"{HOME.name}/encoder"}
    return ours | sizes.settings | more


def set_up(sizes, **settings):
    """The settings and the sample of this process, in which a step is at work."""
    vars(script).update(settings_of(sizes, settings))
    sample = script.sample_rows
    script.sample_rows = lambda n, seed: sample(sizes.rows[seed - 1], seed)


# ---- 2. does it work: the script as a user runs it
def write_script(sizes, name, replaced=(), **settings):
    """train_final_model.py with other settings, and other text -> its folder."""
    source = Path(script.__file__).read_text("utf8")
    for setting, value in settings_of(sizes, settings).items():
        line = re.search(rf"^{setting} = .*$", source, re.MULTILINE)
        assert line, f"the script has no setting {setting}"
        source = source.replace(line[0], f"{setting} = {value!r}", 1)
    train, validation = sizes.rows
    rows = [
        ("sample_rows(320, 1)", f"sample_rows({train}, 1)"),
        ("sample_rows(80, 2)", f"sample_rows({validation}, 2)"),
    ]
    for old, new in [*rows, *replaced]:
        assert old in source, f"the script has no {old}"
        source = source.replace(old, new)
    folder = Path(HOME.name, name)
    folder.mkdir(exist_ok=True)
    (folder / "train_final_model.py").write_text(source, "utf8")
    return folder


def start(folder, *arguments, launcher=()):
    return subprocess.Popen(
        [sys.executable, *launcher, "train_final_model.py", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, status=0):
    """-> stdout, and the lines of stderr; RuntimeError where it ends with another status."""
    out, err = process.communicate()
    lines = [line for line in err.splitlines() if line.strip()]
    if process.returncode != status:
        raise RuntimeError(f"status {process.returncode}: {lines[-1:]}")
    return out, lines


def log_of(folder, model):
    """The epochs in a run's log, as [{column: text}]."""
    path = folder / f"{model}.log"
    rows = [line.split(",") for line in path.read_text().splitlines()] if path.exists() else [[]]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def saved(folder, model, epochs):
    """Whether a run has saved so many epochs: its log, and then last_<model>.pt."""
    if len(log_of(folder, model)) < epochs:
        return False
    log, last = folder / f"{model}.log", folder / f"last_{model}.pt"
    return last.stat().st_mtime_ns >= log.stat().st_mtime_ns


def use(sizes, model):
    """Train two epochs, Ctrl-C, --resume for another one, --predict."""
    folder = write_script(sizes, f"use-{model}")
    training = start(folder, "--model", model)
    while training.poll() is None and not saved(folder, model, epochs=2):
        time.sleep(0.02)
    training.send_signal(signal.SIGINT)
    _, said = finish(training, status=130)
    done = len(log_of(folder, model))
    write_script(sizes, f"use-{model}", EPOCHS=done + 1)
    out, more = finish(start(folder, "--model", model, "--resume"))
    resumed = re.search(r"epoch (\d+)/", out)[1]
    memory = re.search(r"peak_gpu_memory_mb: (\d+)", out)
    sentences = ["WANT GO SCHOOL", "HELLO"]
    _, most = finish(start(folder, "--model", model, "--predict", *sentences))
    files = [path.name for path in sorted((folder / "predictions").iterdir())]
    errors = [line["val_mse"] for line in log_of(folder, model)]
    return [
        f"{done}, {resumed}",
        ", ".join(f"{float(error):.4f}" for error in errors),
        memory[1] if memory else "no GPU",
        ", ".join(files),
        one_line(said[:-1] + more + most),  # the last says that it was stopped
    ]


def one_line(lines):
    return f"{len(lines)} lines: {lines[0][:150]}" if lines else "none"


# ---- 2. does it compute the same
def compare(sizes, model):
    """Outputs and gradients of the same weights on both devices, without dropout.

    In float32, which must be close, and as the script trains: TF32 and, where it can, bfloat16.
    """
    set_up(sizes)
    with contextlib.redirect_stdout(io.StringIO()):
        clips, _ = script.load_clips()
        statistics, vocabulary = script.training_statistics(clips["train"])
        run = script.Run(model, clips, statistics, vocabulary, torch.device("cpu"))
    with torch.no_grad():  # some layers begin with weights of 0, which would say nothing
        for weight in run.model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    drop_nothing(run.model)
    numbers = torch.arange(8)
    batch = run.clips["train"].batch(numbers, torch.device("cpu"))
    expected = answers(run.model, batch, contextlib.nullcontext())
    device = script.pick_device()
    run.model.to(device)
    batch = run.clips["train"].batch(numbers, device)
    as_trained = differences(answers(run.model, batch, script.mixed_precision(device)), expected)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    exact = differences(answers(run.model, batch, contextlib.nullcontext()), expected)
    shown = [f"{exact[name]:.1e}, {as_trained[name]:.1e}" for name in exact]
    if not max(exact.values()) <= CLOSE:  # it may be NaN
        raise RuntimeError(f"float32 differs by more than {CLOSE}: {'; '.join(shown)}")
    return shown


def drop_nothing(model):
    model.word_dropout = 0
    model.encoder.hidden_share = 0
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0
        if isinstance(layer, nn.MultiheadAttention):
            layer.dropout = 0


def answers(model, batch, precision):
    """-> {name: tensor on the CPU} of what a model makes of a batch, and the loss's gradient."""
    model.train()
    model.zero_grad()
    with precision:
        loss, _ = script.training_loss(model, batch)
        made = model(batch["tokens"], batch["token_mask"], batch["n_frames"])
    loss.backward()
    gradients = [value.grad.ravel() for value in model.parameters() if value.grad is not None]
    tensors = {
        "loss": loss,
        "pose": made.pose,
        "seconds": made.seconds,
        "confidence": made.confidence,
        "keys": made.keys[batch["token_mask"]],
        "durations": made.durations,
        "gradient": torch.cat(gradients),
    }
    return {name: value.detach().float().cpu() for name, value in tensors.items()}


def differences(got, expected):
    """-> {name: the largest difference as a share of the largest number}"""
    return {
        name: ((got[name] - value).abs().max() / value.abs().max()).item()
        for name, value in expected.items()
    }


# ---- 2. does it learn the same
TRAININGS = {  # device, SEED, MIXED_PRECISION
    "CPU": ("cpu", 0, True),
    "CPU, another seed": ("cpu", 1, True),
    "GPU": ("gpu", 0, True),
    "GPU, MIXED_PRECISION = False": ("gpu", 0, False),
}


def learn(sizes, model, training):
    """The metrics of a training's last epoch on the sample."""
    device, seed, mixed = TRAININGS[training]
    torch.set_num_threads(max(1, os.cpu_count() // 4))  # other trainings are at work
    set_up(sizes, SEED=seed, MIXED_PRECISION=mixed, **sizes.learning)
    with contextlib.redirect_stdout(io.StringIO()):
        clips, _ = script.load_clips()
        statistics, vocabulary = script.training_statistics(clips["train"])
        device = script.pick_device() if device == "gpu" else torch.device("cpu")
        run = script.Run(model, clips, statistics, vocabulary, device)
        script.train_epochs(run, keep=lambda run: None)
    last = run.log[-1]
    names = ("train_mse", "val_mse", "val_mae", "mean_pose_mse", "motion", "duration_error")
    return [f"{last[name]:.5f}" for name in names]


# ---- 3. speed, memory and waiting
def measure(sizes, model, batch_size):
    set_up(sizes)
    training = bench_train.Training(model, batch_size, sizes.steps * batch_size)
    made = bench_train.measure(training, sizes.rounds)
    waits, busy = waiting(training)
    epoch = len(training.clips) / made.training
    idle = held = "no GPU"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        held = f"{(total - free) / 2**20:.0f}"
        idle = f"{100 * (1 - busy / epoch):.0f} %"
    script.MIXED_PRECISION = False
    slower = bench_train.seconds(training.epoch, rounds=sizes.rounds)[0]
    return [
        f"{made.training:.0f}",
        f"{len(training.clips) / slower:.0f}",
        f"{made.generation:.0f}",
        f"{100 * made.outside:.0f} %",
        idle,
        f"{waits / sizes.steps:.1f}",
        f"{made.training_memory:.0f}",
        f"{made.generation_memory:.0f}",
        held,
    ]


def waiting(training):
    """Of an epoch: how often the host waits for the GPU, and seconds in which the GPU is at work.

    The profiler slows the host, but not the GPU: hold the seconds against an epoch without it.
    """
    with torch.profiler.profile(acc_events=True) as profiler:  # without it some torches warn
        training.epoch()
        bench_train.wait()
    kinds = torch.autograd.DeviceType
    kind = kinds.CUDA if training.run.device.type == "cuda" else kinds.CPU
    waits, spans = 0, []
    for event in profiler.events():
        waits += re.fullmatch(r"cuda(Stream|Device|Event)Synchronize", event.name) is not None
        if event.device_type == kind and not event.is_user_annotation:
            spans.append((event.time_range.start, event.time_range.end))
    if not spans:
        raise RuntimeError("the profiler saw nothing of the GPU")
    busy, until = 0, 0
    for begin, end in sorted(spans):  # microseconds; some overlap
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    return waits, busy / 1e6


# ---- 4. batches
class Served:
    """In the place of a training's Clips: the batches of an epoch come from elsewhere."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def batch(self, numbers, device):
        return next(self.coming)


def from_store(clips, order, device):
    for numbers in order:
        yield clips.batch(numbers, device)


def made_ahead(clips, order, device):
    """One thread makes the next batch while the GPU is at work on this one."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(clips.batch, order[0], device)
        for numbers in order[1:]:
            batch = coming.result()
            coming = pool.submit(clips.batch, numbers, device)
            yield batch
        yield coming.result()


def pinned(clips, order, device):
    """From memory out of which the GPU copies by itself, so that the host need not wait."""
    for numbers in order:
        batch = clips.batch(numbers, torch.device("cpu"))
        if device.type == "cuda":
            batch = {name: value.pin_memory() for name, value in batch.items()}
        yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def batches(sizes, batch_size):
    """Milliseconds of the GRU's step by where its batches come from."""
    set_up(sizes)
    training = bench_train.Training("gru", batch_size, sizes.steps * batch_size)
    clips, order, device = training.clips, training.order, training.run.device
    served = training.run.clips["train"] = Served(clips)

    def at_hand(*_):
        return iter(training.batches)

    def epoch_of(way):
        def epoch():
            served.coming = way(clips, order, device)
            training.epoch()

        return epoch

    works = [epoch_of(way) for way in (at_hand, from_store, made_ahead, pinned)]
    works.append(lambda: list(from_store(clips, order, torch.device("cpu"))))
    taken = bench_train.seconds(*works, rounds=sizes.rounds)
    return [f"{1000 * seconds / len(order):.2f}" for seconds in taken]


# ---- 5. several processes
def torchrun(sizes, processes):
    """One process on each GPU, by NCCL; where there are too few, all on the first, by gloo."""
    gpus = torch.cuda.device_count()
    replaced = []
    if 0 < gpus < processes:
        replaced.append(('int(os.environ.get("LOCAL_RANK", 0))', "0"))
        replaced.append(("dist.init_process_group(", 'dist.init_process_group("gloo", '))
    settings = {"EPOCHS": 2, "DROPOUT": 0.0, "WORD_DROPOUT": 0.0}
    folder = write_script(sizes, f"torchrun-{processes}", replaced, **settings)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    out, said = finish(start(folder, "--model", "gru", launcher=launcher))
    by = "gloo"
    if gpus >= processes:
        nccl = re.search(r"NCCL version \S+", "\n".join([out, *said]))
        by = nccl[0] if nccl else "no word of NCCL"
    errors = [line["val_mse"] for line in log_of(folder, "gru")]
    return [
        by,
        ", ".join(f"{float(error):.5f}" for error in errors),
        one_line([line for line in said if "NCCL version" not in line]),
    ]


# ---- 6. a full GPU
def fill(sizes):
    """All clips of a larger sample in a batch, and layers so wide that no GPU holds them."""
    larger = sizes._replace(rows=(1280, 80))
    folder = write_script(larger, "full", BATCH_SIZE=1280, HIDDEN_DIM=2**17)
    if not torch.cuda.is_available():
        return ["skipped: there is no GPU to fill"]
    _, said = finish(start(folder, "--model", "transformer"), status=1)
    if not said[-1].startswith("error: GPU full"):
        raise RuntimeError(said[-1])
    return [f"`{said[-1]}`; before it: {one_line(said[:-1])}"]


# ---- all of it
def sections(models):
    """In the order of what is worth the most, should the time be cut."""
    encoder = {"random": (write_encoder,)} if "bert" in models else {}
    learning = {f"{model}, {name}": (learn, model, name) for model in models for name in TRAININGS}
    speeds = {
        f"{model}, {batch_size}": (measure, model, batch_size)
        for model in [*models, "autoregressive"]
        for batch_size in BATCH_SIZES
    }
    return [
        Section(
            "1. Machine",
            "|GPU|GiB|bfloat16|cores|Python|torch|CUDA|cuDNN|transformers|datasets|pose-format",
            {"here": (machine,)},
        ),
        Section("1. Encoder in the place of BERT", "|parameters", encoder),
        Section(
            "2. Use: train, Ctrl-C after two epochs, --resume for another, --predict",
            "model|epochs, resumed at|val_mse|peak MB|predictions|stderr",
            {model: (use, model) for model in models},
            together=True,
        ),
        Section(
            "2. Equality: the GPU's largest difference from the CPU's float32, over the largest"
            " number; in float32, and as the script trains",
            "model|loss|pose|seconds|confidence|keys|durations|gradient",
            {model: (compare, model) for model in models},
            together=True,
        ),
        Section(
            "2. Learning: the last epoch of a short training on the sample",
            "training|train_mse|val_mse|val_mae|mean_pose_mse|motion|duration_error",
            learning,
            together=True,
        ),
        Section(
            "3. Speed: sentences a second, peak memory in MB, waiting",
            "model, batch|training|with MIXED_PRECISION = False|generation"
            "|outside forward, backward, optimizer|GPU idle in training|host's waits in a step"
            "|peak in training|in generation|held by the process and CUDA",
            speeds,
        ),
        Section(
            "4. Batches: milliseconds of the GRU's step, by where they come from",
            "batch|on the GPU before|the store|a thread ahead|pinned memory|making one, no step",
            {f"{batch_size}": (batches, batch_size) for batch_size in BATCH_SIZES},
        ),
        Section(
            "5. torchrun: the GRU without dropout",
            "processes|by|val_mse|stderr",
            {f"{processes}": (torchrun, processes) for processes in (1, 2)},
            together=True,
        ),
        Section("6. Full GPU", "|what is printed", {"transformer": (fill,)}),
    ]


def start_steps(section, sizes):
    """-> (name, when it began, the step at work), one by one or all at once."""
    steps = (
        (name, time.perf_counter(), bench_train.Apart(work, sizes, *more))
        for name, (work, *more) in section.steps.items()
    )
    return list(steps) if section.together else steps


def carry_out(section, sizes):
    """Print a section, each row as soon as it is there -> the number of steps that failed."""
    columns = [*section.columns.split("|"), "after"]
    print(f"\n### {section.title}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    failed = 0
    for name, began, step in start_steps(section, sizes):
        try:
            cells = step.result(STEP_SECONDS)
        except RuntimeError as error:
            failed += 1
            cells = [f"**error**: {error}"]
        cells = [cell.replace("|", "/") for cell in cells]
        print(f"| {' | '.join([name, *cells])} | {time.perf_counter() - began:.1f} s |", flush=True)
    return failed


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="WORD")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    asked = parser.parse_args(argv)
    if not asked.dry and not bench_train.Apart(torch.cuda.is_available).result():
        sys.exit("error: no GPU here (--dry runs all of it on the CPU)")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    print("## CUDA\n\n`python tests/bench_cuda.py`")
    if asked.dry:
        print("--dry: the CPU in the GPU's place, and tiny sizes, so that no figure says anything")
    began, failed = time.perf_counter(), 0
    for section in sections(asked.models):
        wanted = asked.only is None or section.title.startswith("1.")
        if wanted or any(word.lower() in section.title.lower() for word in asked.only):
            failed += carry_out(section, DRY if asked.dry else FULL)
    print(f"\nIn all {time.perf_counter() - began:.0f} s; {failed} steps failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
