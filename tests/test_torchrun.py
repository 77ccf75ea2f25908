"""Several processes on the CPU, as torchrun starts them: they learn and end as one process does."""

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, change, edited, outcome, small, start, until, write_bert

import train_final_model as final

# seen with 2.5.1, in a process that has trained; torchrun's own processes do not hang
OLD = "forked processes hang with an older torch"
hangs = pytest.mark.skipif(torch.__version__ < "2.13", reason=OLD)
SETTINGS = {"DATASET": "sample", "EMBED_DIM": 16, "HIDDEN_DIM": 16, "MAX_FRAMES": 16, "EPOCHS": 3}
SETTINGS |= {"BATCH_SIZE": 4, "DROPOUT": 0.0, "WORD_DROPOUT": 0.0}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """14 training and 5 validation clips, and nothing that is dropped at random."""
    bert = write_bert(tmp_path / "bert")
    config = Path(bert, "config.json").read_text().replace('dropout_prob": 0.1', 'dropout_prob": 0')
    Path(bert, "config.json").write_text(config)
    make = final.sample_rows
    monkeypatch.setattr(final, "sample_rows", lambda n, seed: make(14 if seed == 1 else 5, seed))
    monkeypatch.setattr(final.PretrainedEncoder, "hidden_share", 0.0)
    small(BERT_NAME=bert, WARMUP=0.05, SEED=0, **SETTINGS)


def train(world, *arguments, model="gru", stop=None):
    """By so many forked processes -> what each ends with. stop: the output before a Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if world > 1:
            variables["TORCHELASTIC_RUN_ID"] = "test"
        os.environ.update({name: str(value) for name, value in variables.items()})
        final.main(["--model", model, *arguments])

    files = [f"{rank}.txt" for rank in range(world)]
    children = [start(partial(work, i), file, file) for i, file in enumerate(files)]
    if stop:
        until(lambda: stop in said())
        for child in children:
            os.kill(child, signal.SIGINT)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def said(rank=0):
    return Path(f"{rank}.txt").read_text()


@hangs
@pytest.mark.parametrize("model", ["gru", "transformer", "bert"])
def test_two_processes_learn_what_one_learns(model, tiny, tmp_path, monkeypatch):
    """5 clips do not divide by 2, and 14 not by the batch size."""
    found = []
    for world in (1, 2):
        (tmp_path / f"{world}").mkdir()
        monkeypatch.chdir(tmp_path / f"{world}")
        assert train(world, model=model) == [0] * world, said()
        closing = said().partition("\ndata: ")[2].partition("training_seconds")[0]
        numbers = [float(line.split(": ")[1]) for line in closing.splitlines()[2:]]
        found.append((outcome(model), numbers))
    (one, its_numbers), (two, numbers) = found
    # Adam makes much of a gradient's rounding
    torch.testing.assert_close(two[0], one[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two[1], one[1], rtol=0, atol=1e-3)
    # of clips so short there is no tremble
    torch.testing.assert_close(numbers, its_numbers, rtol=1e-3, atol=1e-6, equal_nan=True)
    assert said().count("epoch 1/3") == 1 and said().count("\nval_mse: ") == 1
    assert said(1) == ""  # rank 0 alone prints


@hangs
def test_three_processes_that_start_at_once_read_each_clip_once_and_stop_early_together(
    tiny, monkeypatch
):
    """At a learning rate of 0 no epoch is better than the first one. One has no validation clip."""
    read = final.PoseRows.read

    def slow(source, group):
        with open("read.txt", "a") as file:
            file.writelines(f"{source.key(row)}\n" for row in group)
        time.sleep(1)
        return read(source, group)

    monkeypatch.setattr(final.PoseRows, "read", slow)
    change(EPOCHS=9, PATIENCE=2, LR_GRU=0.0, BATCH_SIZE=6, VALIDATION_CLIPS=2)
    assert train(3) == [0, 0, 0] and len(outcome()[0]) == 3
    prepared = Path("read.txt").read_text().splitlines()
    assert len(prepared) == len({*prepared}) == 14 + 2
    assert "\nstopped: no lower val_mse for 2 epochs\n" in said() and "\nbest_epoch: 1\n" in said()


def test_a_batch_that_cannot_be_shared_is_one_line(tiny):
    change(BATCH_SIZE=3)
    assert train(2) == [1, 1]
    assert said() == said(1) == "error: BATCH_SIZE = 3 cannot be shared by 2 processes\n"


def torchrun(folder, *arguments):
    """The script under torchrun, in a copy with other settings."""
    source = edited((ROOT / "train_final_model.py").read_text("utf8"), **{**SETTINGS, "EPOCHS": 6})
    source = source.replace("sample_rows(320, 1)", "sample_rows(14, 1)")
    (folder / "train_final_model.py").write_text(
        source.replace("sample_rows(80, 2)", "sample_rows(5, 2)"), "utf8"
    )
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [sys.executable, *launcher, "train_final_model.py", "--model", "gru", *arguments]
    with open("0.txt", "w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)


@hangs
def test_a_run_of_two_that_is_stopped_ends_and_goes_on(tiny, tmp_path, monkeypatch):
    """All get a Ctrl-C; in the next run one process of torchrun is killed."""
    change(EPOCHS=6)
    (tmp_path / "unbroken").mkdir()
    monkeypatch.chdir(tmp_path / "unbroken")
    assert train(2) == [0, 0]
    unbroken = outcome()

    def resume():
        assert "epoch 6/6" not in said()
        assert train(2, "--resume") == [0, 0]
        torch.testing.assert_close(outcome()[:2], unbroken[:2], rtol=1e-5, atol=1e-6)

    monkeypatch.chdir(tmp_path)
    assert 0 not in train(2, stop="epoch 2/6")
    resume()
    run = torchrun(tmp_path)
    until(lambda: "epoch 2/6" in said())
    found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout
    workers = [int(pid) for pid in found.split()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert run.wait(200) != 0
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    resume()
    train(1, "--resume")
    assert said().startswith(
        "resumed with other settings, so not bit by bit: processes was 2, is 1"
    )
