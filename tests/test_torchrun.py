"""Several processes, as torchrun starts them, on the CPU: they end where one process ends."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, edited, write_bert

SETTINGS = {
    "DATASET": "sample",
    "EMBED_DIM": 16,
    "HIDDEN_DIM": 16,
    "MAX_FRAMES": 16,
    "EPOCHS": 3,
    "BATCH_SIZE": 4,
    "PROCESSES": 0,
    "DROPOUT": 0.0,
    "WORD_DROPOUT": 0.0,
}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


def start(folder, *arguments, processes=2, model="gru", **changes):
    """The script on 13 training and 5 validation clips, in a copy with other settings."""
    folder.mkdir(exist_ok=True)
    source = edited((ROOT / "train_final_model.py").read_text("utf8"), **{**SETTINGS, **changes})
    for old, new in (
        ("sample_rows(320, 1)", "sample_rows(13, 1)"),
        ("sample_rows(80, 2)", "sample_rows(5, 2)"),
        ("hidden_share = 0.3", "hidden_share = 0.0"),  # as DROPOUT, else one process hides others
    ):
        assert old in source
        source = source.replace(old, new)
    (folder / "train_final_model.py").write_text(source)
    command = [
        sys.executable,
        *TORCHRUN * (processes > 1),
        "train_final_model.py",
        "--model",
        model,
        *arguments,
    ]
    with open(folder / "out.txt", "w") as out, open(folder / "err.txt", "w") as err:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdout=out,
            stderr=err,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def said(folder):
    return (folder / "out.txt").read_text(), (folder / "err.txt").read_text()


def outcome(folder, model="gru"):
    """The log's numbers but for the times, and the weights of the best epoch as one vector."""
    with open(folder / f"log_{model}.csv", newline="") as file:
        log = [
            [float(value) for key, value in line.items() if key != "seconds"]
            for line in csv.DictReader(file)
        ]
    weights = torch.load(folder / f"best_{model}.pt", weights_only=True)["weights"]
    return torch.tensor(log), torch.cat([value.ravel().double() for value in weights.values()])


def until(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.parametrize("model", ["gru", "transformer", "bert"])
def test_two_processes_learn_what_one_learns(model, tmp_path):
    """13 and 5 clips do not divide by 2, nor by the batch size."""
    bert = write_bert(tmp_path / "bert")
    config = (tmp_path / "bert" / "config.json").read_text()
    (tmp_path / "bert" / "config.json").write_text(
        config.replace('dropout_prob": 0.1', 'dropout_prob": 0.0')
    )
    one, two = (start(tmp_path / str(n), processes=n, model=model, BERT_NAME=bert) for n in (1, 2))
    assert one.wait(200) == 0 and two.wait(200) == 0, said(tmp_path / "2")
    expected, got = outcome(tmp_path / "1", model), outcome(tmp_path / "2", model)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        got[1], expected[1], rtol=0, atol=3e-4
    )  # Adam makes much of a gradient's rounding
    out, err = said(tmp_path / "2")
    assert out.count("epoch 1/3") == 1 and out.count("\nval_mse: ") == 1  # rank 0 alone prints
    assert out.count("device             cpu\n") == 1 and "Warning" not in err
    assert "processes" not in said(tmp_path / "1")[0]
    closing = [
        said(tmp_path / str(n))[0].partition("\ndata: ")[2].partition("training_seconds")[0]
        for n in (1, 2)
    ]
    numbers = [[float(line.split(": ")[1]) for line in text.splitlines()[2:]] for text in closing]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    assert start(folder, EPOCHS=6).wait(200) == 0
    return outcome(folder)


@pytest.mark.parametrize("victim, number", [(1, signal.SIGKILL), (None, signal.SIGINT)])
def test_a_run_of_two_that_is_stopped_ends_and_goes_on_as_if_it_had_not_been(
    victim, number, unbroken, tmp_path
):
    broken = start(tmp_path, EPOCHS=6)
    until(lambda: "epoch 2/6" in said(tmp_path)[0])
    workers = subprocess.run(
        ["pgrep", "-P", str(broken.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(workers) == 2
    os.kill(broken.pid if victim is None else int(workers[victim]), number)
    assert broken.wait(60) != 0
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10)
    out, err = said(tmp_path)
    assert "epoch 6/6" not in out and 'train_final_model.py", line' not in err, err
    # Whichever reaches a process first: a signal, or the lost connection to the other one
    stopped = "\nstopped; epochs 1 to " in out or "\nstopped; what was prepared" in err
    assert stopped or "error: another process of this run is gone" in err, out + err
    assert start(tmp_path, "--resume", EPOCHS=6).wait(200) == 0
    for one, other in zip(outcome(tmp_path), unbroken, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_two_processes_stop_early_together(tmp_path):
    """At a learning rate of 0 no epoch is better than the first one."""
    assert start(tmp_path, EPOCHS=9, PATIENCE=2, LR_GRU=0.0).wait(200) == 0, said(tmp_path)
    assert len(outcome(tmp_path)[0]) == 3
    assert "\nbest_epoch: 1\n" in said(tmp_path)[0]


def test_a_batch_that_cannot_be_shared_is_one_line(tmp_path):
    assert start(tmp_path / "run", BATCH_SIZE=3).wait(100) != 0
    assert "error: BATCH_SIZE = 3 cannot be shared by 2 processes" in said(tmp_path / "run")[1]
    assert not (tmp_path / "run" / "last_gru.pt").exists()
