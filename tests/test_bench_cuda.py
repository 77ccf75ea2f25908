"""The benchmark for a GPU, tried on the CPU: a GPU may be at hand for minutes only."""

import os

import bench_cuda
import pytest


def test_a_dry_run_goes_through_the_steps_of_the_gru(capsys):
    words = ["use", "equality", "learning", "speed", "batches", "full"]
    failed = bench_cuda.main(["--dry", "--models", "gru", "--only", *words])
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.endswith(" s |")]
    assert not failed and text.endswith("; 0 steps failed\n"), text
    assert len(rows) == 1 + 1 + 1 + 4 + 4 + 2 + 1
    assert rows[1].startswith("| gru | ") and "002_HELLO.pose" in rows[1]
    assert rows[6].startswith("| gru, GPU, MIXED_PRECISION = False | 0.")
    assert "skipped: there is no GPU to fill" in rows[-1]


def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match=r"^error: no GPU here .--dry runs all of it on the CPU.$"):
        bench_cuda.main([])


def test_steps_that_fail_are_rows_and_the_others_go_on(capsys):
    def broken(sizes):
        raise ValueError("this | that\nmore")

    steps = {
        "broken": (broken,),
        "dead": (lambda sizes: os._exit(3),),
        "sound": (lambda sizes: "1",),
    }
    assert bench_cuda.carry_out(bench_cuda.Section("T", "step|made", steps), bench_cuda.DRY) == 2
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert rows[0].startswith("| broken | **error**: ValueError: this / that | ")
    assert rows[1].startswith("| dead | **error**: the process ended with 3 | ")
    assert rows[2].startswith("| sound | 1 | ")
