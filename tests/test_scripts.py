"""Both scripts as a user runs them: edited copies, as subprocesses, the output going to files."""

import csv
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import ROOT, change, edited, pose_bytes, positions, run, write_isign

import model_selection
import train_final_model

TINY = {
    "EMBED_DIM": 16,
    "HIDDEN_DIM": 16,
    "EPOCHS": 2,
    "TRAIN_CLIPS": 24,
    "VALIDATION_CLIPS": 8,
    "MAX_FRAMES": 24,
    "PROCESSES": 0,
}
FINAL = {**TINY, "EPOCHS": 3, "DATASET": "sample"}
# model, epoch, epochs, train mse, val mse, mae, motion and duration error; without the time
EPOCH = r"^(\w+) epoch (\d+)/(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +[\d.]+ +[\d.]+ s(?= +[\d.]+ s$)"
SCRIPTS = {
    "model_selection": (model_selection, []),
    "train_final_model": (train_final_model, ["--model", "gru"]),
}
scripts = pytest.mark.parametrize("name", SCRIPTS)


def epochs(out):
    """{model: its epochs' lines, as matches, without the time that they took}"""
    found = {}
    for match in re.finditer(EPOCH, out, re.M):
        found.setdefault(match[1], []).append(match)
    return found


@pytest.fixture(scope="module")
def selection(tmp_path_factory, bert):
    """Without a token the default DATASET runs on the sample."""
    return run(
        tmp_path_factory.mktemp("selection"),
        "model_selection.py",
        CANDIDATES=["bert", "gru", "transformer"],
        BERT_NAME=bert,
        **TINY,
    )


@pytest.fixture(scope="module")
def final(tmp_path_factory, bert):
    """{model: its run}; the GRU's batches are made by other processes."""

    def train(name):
        return run(
            tmp_path_factory.mktemp(name),
            "train_final_model.py",
            "--model",
            name,
            BERT_NAME=bert,
            **{**FINAL, "PROCESSES": 2 if name == "gru" else 0},
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(
            zip(train_final_model.MODELS, pool.map(train, train_final_model.MODELS), strict=False)
        )


def test_the_selection_ends_with_the_results(selection):
    assert selection.code == 0, selection.err
    assert "NO ACCESS TOKEN" in selection.out and "sample" in selection.out.lower()
    found = epochs(selection.out)
    lines = selection.out.splitlines()
    assert lines[-7] == "FINAL RESULTS (sample data)" and lines[-8] == ""
    shown = dict(line.split(": ") for line in lines[-6:-2])
    assert list(shown) == ["BERT", "GRU", "Transformer", "Mean pose"]
    assert all(re.fullmatch(r"\d+\.\d{4}", value) for value in shown.values())
    lowest = {model: min(float(match[5]) for match in matches) for model, matches in found.items()}
    for title, model in (("BERT", "bert"), ("GRU", "gru"), ("Transformer", "transformer")):
        assert (
            float(shown[title]) == pytest.approx(lowest[title], abs=6e-5) and len(found[title]) == 2
        )
        contents = torch.load(selection.folder / f"selection_{model}.pt", weights_only=True)
        assert contents["metrics"]["val_mse"] == pytest.approx(lowest[title], abs=6e-6)
        assert contents["metrics"]["mean_pose_mse"] == pytest.approx(
            float(shown["Mean pose"]), abs=6e-5
        )
    winner = min(lowest, key=lowest.get).lower()
    assert lines[-2] == f"Next: python train_final_model.py --model {winner}"
    assert lines[-1].startswith("Its data settings") and "must be the same" in lines[-1]


def test_two_runs_with_one_seed_print_the_same_numbers(selection, tmp_path):
    again = run(tmp_path, "model_selection.py", **TINY, CANDIDATES=["gru", "transformer"])
    first, second = epochs(selection.out), epochs(again.out)
    assert list(second) == ["GRU", "Transformer"] and again.code == 0
    for model, matches in second.items():
        assert [match[0] for match in matches] == [match[0] for match in first[model]]


@pytest.mark.parametrize("name", train_final_model.MODELS)
def test_the_final_run_reports_its_best_epoch(final, name):
    done = final[name]
    assert done.code == 0, done.err
    closing = dict(
        line.split(": ")
        for line in done.out.split("\n\n")[-1].splitlines()
        if "warning" not in line
    )
    assert {
        "parameters",
        "best_epoch",
        "val_mse",
        "val_mae",
        "mean_pose_mse",
        "motion",
        "duration_error",
        "val_dtw_mje",
        "training_seconds",
    } <= set(closing)
    assert (
        closing["model"] == name
        and closing["data"] == "sample data"
        and closing["checkpoint"] == f"best_{name}.pt"
    )
    with open(done.folder / f"log_{name}.csv", newline="") as file:
        log = list(csv.DictReader(file))
    (matches,) = epochs(done.out).values()
    assert [line["epoch"] for line in log] == [match[2] for match in matches] == ["1", "2", "3"]
    for line, match in zip(log, matches, strict=False):
        for i, key in enumerate(("train_mse", "val_mse", "val_mae")):
            assert float(match[4 + i]) == pytest.approx(float(line[key]), abs=1e-5)
    best = min(log, key=lambda line: float(line["val_mse"]))
    assert closing["best_epoch"] == best["epoch"]
    for key in ("val_mse", "val_mae", "mean_pose_mse"):
        assert float(closing[key]) == pytest.approx(float(best[key]), abs=2e-5)
    model, *_ = train_final_model.load_checkpoint(done.folder / f"best_{name}.pt")
    contents = torch.load(done.folder / f"best_{name}.pt", weights_only=True)
    assert contents["metrics"]["epoch"] == int(best["epoch"])
    assert sum(value.numel() for value in model.parameters()) == int(closing["parameters"])


def test_two_final_runs_with_one_seed_print_the_same_numbers(final, tmp_path):
    """However many processes make the batches: two before, none here."""
    again = run(tmp_path, "train_final_model.py", "--model", "gru", **FINAL)
    first, second = (epochs(done.out)["GRU"] for done in (final["gru"], again))
    assert [match[0] for match in first] == [match[0] for match in second]


def test_output_to_a_file_is_readable(selection, final):
    for done in (selection, *final.values()):
        assert "\r" not in done.out + done.err and "\x1b" not in done.out + done.err
        lines = [line for line in done.out.splitlines() if " epoch " in line or "val mse" in line]
        assert {len(line) for line in lines} == {len(model_selection.HEADER)}
        assert max(len(line) for line in done.out.splitlines() if "data settings" not in line) <= 80
        assert "Traceback" not in done.err


# ---- in this process, for speed: `main` with changed settings


@pytest.fixture
def tiny(monkeypatch):
    """Both scripts with tiny settings, on a tiny sample."""
    for module, _ in SCRIPTS.values():
        sample_rows = module.sample_rows
        monkeypatch.setattr(
            module,
            "sample_rows",
            lambda n, seed, sample_rows=sample_rows: sample_rows(n // 20, seed),
        )
        for setting, value in {**TINY, "DATASET": "sample"}.items():
            monkeypatch.setattr(module, setting, value)
    monkeypatch.setattr(model_selection, "CANDIDATES", ["gru"])
    monkeypatch.setattr(train_final_model, "PROCESSES", 0)


def start(name):
    module, arguments = SCRIPTS[name]
    module.main(arguments)


@scripts
@pytest.mark.parametrize(
    "errors, stopped, best",
    [
        ([3, 2, 4, 5, 1, 1], 4, 2),
        ([3, 2, 2.5, 1, 2, 2], 6, 4),
        ([6, 5, 4, 3, 2, 1], 6, 6),
        ([2, 2, 2, 1, 1, 1], 3, 1),
    ],
)
def test_early_stopping_keeps_the_best_epoch(
    name, errors, stopped, best, tiny, monkeypatch, capsys, tmp_path
):
    module, _ = SCRIPTS[name]

    def train(run, model, schedule, label):
        run.average.mean.fill_(len(run.log) + 1)  # which marks the checkpoint
        return 0.5

    monkeypatch.setattr(module, "train_one_epoch", train)
    monkeypatch.setattr(
        module,
        "evaluate",
        lambda model, *rest: {
            "val_mse": float(errors[int(model.mean[0]) - 1]),
            "val_mae": 1.0,
            "mean_pose_mse": 9.0,
            "motion": 1.0,
            "duration_error": 0.0,
        },
    )
    monkeypatch.setattr(module, "EPOCHS", 6)
    monkeypatch.setattr(module, "PATIENCE", 2)
    start(name)
    out = capsys.readouterr().out
    assert len(epochs(out)["GRU"]) == stopped
    assert (
        f"GRU: {errors[best - 1]:.4f}" in out
        or f"best_epoch: {best}\nval_mse: {errors[best - 1]:.5f}" in out
    )
    (path,) = [*tmp_path.glob("best_*.pt"), *tmp_path.glob("selection_*.pt")]
    assert torch.load(path, weights_only=True)["weights"]["mean"].eq(best).all() and not [
        *tmp_path.glob("*.tmp")
    ]


WRONG = [
    {"MAX_FRAMES": 0},
    {"EPOCHS": "x"},
    {"BATCH_SIZE": 2.5},
    {"POSE_DIM": 151},
    {"POSE_DIM": 150},
    {"LR_GRU": -1},
    {"DROPOUT": 1.5},
    {"FPS": 0},
    {"PATIENCE": None},
    {"GRAD_CLIP": float("nan")},
    {"DATASET": "no/such/folder/here"},
    {"DATASET": "./nothing"},
    {"CONFIG": "nope", "DATASET": "isign"},
    {"POSES": "nothing_*", "DATASET": "isign"},
    {"BERT_NAME": "./nothing"},
    {"CANDIDATES": ["gru", "lstm"]},
    {"CANDIDATES": []},
    {"CANDIDATES": "gru"},
    {"CANDIDATES": None},
    {"CANDIDATES": 5},
    {"CANDIDATES": [["gru"]]},
    {"HIDDEN_DIM": 1},
    {"MAX_FRAMES": 2**31},
    {"EMBED_DIM": 2**31},
    {"HIDDEN_DIM": 2**31},
    {"EPOCHS": True},
    {"MIXED_PRECISION": "yes"},
    {"CONFIG": 5},
    {"DATASET": "/"},
    {"DATASET": None},
    {"POSES": None, "DATASET": "isign"},
    {"BERT_NAME": None},
]


@pytest.mark.parametrize(
    "name, wrong",
    [
        (name, wrong)
        for name in SCRIPTS
        for wrong in WRONG
        if name == "model_selection" or "CANDIDATES" not in wrong
    ],
)
def test_a_setting_that_makes_no_sense_is_one_line(name, wrong, tiny, monkeypatch, tmp_path):
    module, arguments = SCRIPTS[name]
    uids = ["f68f0aa0e1ae-1", "f68f0aa0e1af-1"]
    write_isign(
        tmp_path / "isign",
        [(uid, "go") for uid in uids],
        {uid: pose_bytes(positions(3)) for uid in uids},
    )
    for setting, value in wrong.items():
        monkeypatch.setattr(module, setting, value)
    if "BERT_NAME" in wrong:
        monkeypatch.setattr(model_selection, "CANDIDATES", ["bert"])
        arguments = arguments and ["--model", "bert"]
    with pytest.raises(SystemExit, match=rf"^error: .*{[*wrong][0]}.*$"):
        module.main(arguments)
    assert not [*tmp_path.glob("*.pt*")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_settings_at_the_edge_of_sense_are_taken(name):
    module, _ = SCRIPTS[name]
    edge = {
        "SPEED_WEIGHT": 2.5,
        "DURATION_WEIGHT": 3,
        "GRAD_CLIP": 0,
        "AVERAGE": 0,
        "WARMUP": 0.0,
        "FPS": 29.97,
        "PROCESSES": 0,
        "TRAIN_CLIPS": 0,
        "DROPOUT": 0,
        "WORD_DROPOUT": 0.9,
        "SEED": 0,
        "LR_BERT": 0,
        "EPOCHS": 1,
        "PATIENCE": 1,
        "BATCH_SIZE": 1,
    }
    change(**edge, DEVICE="cuda:7")  # and a constant of the user's own
    module.check_settings()


@pytest.mark.parametrize("setting", ["EPOCHS", "DATASET", "LR_BERT", "MIXED_PRECISION"])
@scripts
def test_a_setting_that_is_missing_is_one_line_at_the_start(name, setting, monkeypatch):
    module, arguments = SCRIPTS[name]
    monkeypatch.delattr(module, setting)
    monkeypatch.setattr(module, "load_clips", None)
    line = f"^error: name '{setting}' is not defined: it is a setting of this script's top$"
    with pytest.raises(SystemExit, match=line):
        module.main(arguments)


def test_help_and_unknown_arguments(tmp_path):
    shown = run(tmp_path / "help", "model_selection.py", "--help")
    assert shown.code == 0 and "Short runs of the candidates" in shown.out
    assert "NO ACCESS TOKEN" not in shown.out
    wrong = run(tmp_path / "wrong", "model_selection.py", "--model", "gru")
    assert wrong.code == 2 and "unrecognized arguments: --model gru" in wrong.err


def test_the_final_script_says_that_the_selection_was_made_on_other_data(tiny, capsys, monkeypatch):
    model_selection.main([])
    train_final_model.main(["--model", "gru"])
    assert "was made on DATASET" not in capsys.readouterr().out
    chosen = torch.load("selection_gru.pt", weights_only=True)
    torch.save({**chosen, "data": "elsewhere"}, "selection_gru.pt")
    train_final_model.main(["--model", "gru"])
    note = "note: selection_gru.pt was made on DATASET 'elsewhere', and this is 'sample data'\n"
    assert note in capsys.readouterr().out


def test_a_selection_on_the_sample_that_took_the_place_of_isign_is_other_data(
    tiny, capsys, monkeypatch
):
    """There was no token yet, so that DATASET is the same in both runs, and the data is not."""
    isign = model_selection.ISIGN
    monkeypatch.setattr(model_selection, "DATASET", isign)
    model_selection.main([])
    train_final_model.say_other_data("gru", isign)
    note = f"note: selection_gru.pt was made on DATASET 'sample data', and this is '{isign}'\n"
    assert capsys.readouterr().out.endswith(note)


def test_a_damaged_selection_is_said_and_ends_no_training(tiny, capsys):
    Path("selection_gru.pt").write_bytes(b"damaged")
    train_final_model.main(["--model", "gru"])
    out = capsys.readouterr().out
    assert "note: selection_gru.pt is damaged or no checkpoint of this script\n" in out
    assert Path("best_gru.pt").exists()


@scripts
def test_ctrl_c_while_libraries_are_imported_prints_nothing(name, tmp_path):
    source = (ROOT / f"{name}.py").read_text("utf8")
    (tmp_path / "script.py").write_text(source)
    for wait in (0.3, 1.0):
        run = subprocess.Popen(
            [sys.executable, "script.py", "--model", "gru"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        time.sleep(wait)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
        assert run.returncode == 130 and b"Traceback" not in out + err


def test_errors_as_a_user_sees_them(tmp_path):
    """150 numbers a frame come to light in the processes that prepare the clips."""
    wrong = run(
        tmp_path / "a",
        "model_selection.py",
        **{**TINY, "TRAIN_CLIPS": 0, "PROCESSES": 2, "POSE_DIM": 150},
    )
    assert wrong.code != 0 and re.fullmatch(r"error: .*POSE_DIM.*\n", wrong.err), wrong.err


def test_an_unknown_model_is_refused(capsys):
    for arguments in (["--model", "nope"], []):
        with pytest.raises(SystemExit) as stopped:
            train_final_model.main(arguments)
        error = capsys.readouterr().err
        assert (
            stopped.value.code == 2
            and "error:" in error
            and "--model" in error
            and "Traceback" not in error
        )


def test_the_settings_that_users_know_have_their_defaults():
    common = {
        "MAX_GLOSS_LEN": 16,
        "MAX_FRAMES": 96,
        "POSE_DIM": 152,
        "EMBED_DIM": 256,
        "HIDDEN_DIM": 512,
        "BATCH_SIZE": 8,
        "LR_GRU": 1e-3,
        "LR_TRANSFORMER": 5e-4,
        "LR_BERT": 2e-5,
        "DATASET": "Exploration-Lab/iSign",
        "CONFIG": "iSign_v1.1",
    }
    for module, settings in (
        (model_selection, common),
        (train_final_model, {**common, "EPOCHS": 60, "PATIENCE": 8}),
    ):
        assert {name: getattr(module, name) for name in settings} == settings
        source = (ROOT / f"{module.__name__}.py").read_text("utf8")
        assert edited(source, **settings).count("\n") == source.count(
            "\n"
        )  # all are above the shared block
