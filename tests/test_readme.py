"""What the README says: its commands run and print what it shows, its settings are the scripts'.

Fences of bash and python are run in order and in one folder, each command in a process of its own,
with small models. A console fence shows, behind each of its `$ commands`, what that prints: the
lines and their keys are compared, not the figures; "..." stands for any lines. `NAME = value` in a
section's text is a setting that the reader is told to edit before the commands that follow.
"""

import ast
import csv
import os
import re
import subprocess
import sys
from typing import NamedTuple

import make_picture
import numpy as np
from helpers import DEFAULTS, ROOT, edited, pose_bytes, positions, shrink_sample, small

README = (ROOT / "README.md").read_text("utf8")
NAMES = ["model_selection.py", "train_final_model.py"]
TINY = {
    "EMBED_DIM": 16,
    "HIDDEN_DIM": 16,
    "EPOCHS": 2,
    "TRAIN_CLIPS": 24,
    "VALIDATION_CLIPS": 8,
    "MAX_FRAMES": 24,
}
RUN = ("bash", "console", "python")
NOT_RUN = {"bash token": "needs a token", "text": "no code"}
SKIPPED = {  # commands that are not run here, and why
    "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt": ".ci/run",
    "ruff format --check . && ruff check . && python -m pytest -q tests": ".ci/run",
    "export HF_TOKEN=hf_...": "needs a token: test_hub.py has another hub's",
    "torchrun --nproc_per_node=2 train_final_model.py --model gru": "test_torchrun.py",
    "python tests/make_picture.py": "takes minutes: see below",
    'pip install "pose-format[mediapipe]"': "fetches mediapipe",
    "video_to_pose --format mediapipe -i hello.mp4 -o my_poses/hello.pose": "needs a video",
    'python -c "import torch; print(torch.cuda.is_available())"': "needs a GPU",
}
TOO_SMALL = "warning: "  # the tests' models may not beat the mean pose
BENCHMARK = r"python tests/bench_\w+\.py.*"  # by hand, which takes its time
PROGRAMS = {"python", "python3", "pip", "ruff", "torchrun", "export", "echo", "video_to_pose"}


class Block(NamedTuple):
    """A fence of a text."""

    kind: str
    line: int  # its number
    indent: str
    lines: list
    settings: dict  # that its section tells to edit before


def spans(prose):
    """The inline code of lines."""
    return re.findall(r"`([^`]+)`", " ".join(" ".join(prose).split()))


def settings_in(prose):
    found = (re.fullmatch(r"([A-Z_]+) = (.+)", span) for span in spans(prose))
    return {match[1]: ast.literal_eval(match[2]) for match in found if match}


def read(text):
    """A text in Markdown -> its Blocks, and the inline code outside of them."""
    blocks, prose, inline, block = [], [], [], None
    for number, line in enumerate([*text.splitlines(), "## "], 1):
        fence = re.match(r"( *)```(.*)", line)
        if block and fence:
            blocks.append(block)
            block = None
        elif block:
            block.lines.append(line.removeprefix(block.indent))
        elif fence:
            block = Block(fence[2], number, fence[1], [], settings_in(prose))
        elif line.startswith("## "):
            inline += spans(prose)
            prose = []
        else:
            prose.append(line)
    assert block is None, f"the fence of line {block.line} is not closed"
    return blocks, inline


def commands_of(block):
    """A block of commands -> [(command, the lines of its output or None)]"""
    if block.kind == "python":
        return [("\n".join(block.lines), None)]
    if block.kind != "console":
        return [(line.partition("  #")[0].strip(), None) for line in block.lines]
    found = []
    for line in block.lines:
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def shape(line):
    """A line without what may differ between two runs: figures, the winner, notes on words."""
    line = re.sub(r"@@\w+:\w+@@|\d+(\.\d+)?", "#", line)
    line = re.sub(r"--model (gru|transformer)", "--model MODEL", line)
    line = re.sub(r"(\.pose +# s)   .*", r"\1", line)
    return " ".join(line.split())


def same_shape(shown, printed):
    """Whether lines that a README shows are of the shape of those that were printed."""
    pattern = "".join(
        "(?:.*\n)*?" if line == "..." else re.escape(shape(line)) + "\n" for line in shown
    )
    printed = [line for line in printed if not line.startswith(TOO_SMALL)]
    return re.fullmatch(pattern, "".join(shape(line) + "\n" for line in printed)) is not None


def write_own_data(folder):
    """What the README's workflow says that a reader has."""
    uids = [f"{video:012x}-{clip}" for video in range(10) for clip in range(3)]
    (folder / "my_signs").mkdir()
    (folder / "my_poses").mkdir()
    with open(folder / "my_signs/train.csv", "w", newline="") as file:
        csv.writer(file).writerows([("uid", "text"), *((uid, "hello you") for uid in uids)])
    for seed, uid in enumerate(uids):
        (folder / f"my_poses/{uid}.pose").write_bytes(pose_bytes(positions(12, seed)))


def execute(kind, command, settings, folder):
    """Run a command as a reader does, with scripts of other settings -> what it prints."""
    for name in NAMES:
        source = edited((ROOT / name).read_text("utf8"), **{**TINY, **settings})
        (folder / name).write_text(source, "utf8")
    program = [sys.executable, "-c", command]
    if kind != "python":
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (folder / "bin/python").chmod(0o755)
        program = ["bash", "-c", f"set -eo pipefail; {command}"]
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        program,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def follow(text, folder):
    """Do what a text says; AssertionError where a command fails, or prints what it does not show.

    -> all of its commands. One that was run with the same settings is not run again.
    """
    write_own_data(folder)
    blocks, inline = read(text)
    printed, commands = {}, []
    for block in blocks:
        assert block.kind in RUN or block.kind in NOT_RUN, f"line {block.line}: {block.kind!r}"
        if block.kind == "text":
            continue
        for command, shown in commands_of(block):
            commands.append(command)
            if command in SKIPPED:
                continue
            assert block.kind in RUN, f"line {block.line}: {command!r} is not known to be skipped"
            key = command, repr(block.settings)
            if key not in printed:
                printed[key] = execute(block.kind, command, block.settings, folder)
            if shown is not None:
                message = f"line {block.line} shows {command}, which prints\n{printed[key]}"
                assert same_shape(shown, printed[key].splitlines()), message
    for command in inline:
        if command.split()[0] in PROGRAMS:
            known = command in SKIPPED or re.fullmatch(BENCHMARK, command)
            run = any(command in ran for ran in commands)
            assert known or run, f"{command!r} is neither run nor known to be skipped"
            commands.append(command)
    return commands


def test_a_reader_who_follows_the_readme_gets_what_it_says(tmp_path):
    commands = follow(README, tmp_path)
    assert set(SKIPPED) <= set(commands)
    files = re.findall(r"`(\w+_gru\.\w+|gru\.log|predictions/index\.html)`", README)
    assert len(set(files)) == 5 and all((tmp_path / file).exists() for file in files)


def test_the_first_60_lines_lead_to_a_model_of_ones_own_rows():
    blocks = [block for block in read(README)[0] if block.line <= 60]
    trained = [
        block for block in blocks if "python train_final_model.py --model gru" in block.lines
    ]
    assert trained[0].settings == {"DATASET": "my_signs", "CONFIG": None, "POSES": "my_poses"}


def test_the_table_of_settings_is_that_of_the_scripts():
    section = README[README.index("## Settings") : README.index("## Metrics")]
    shown = {}
    for row in re.findall(r"^\| (`[A-Z_]+`.*?) \| (.+?) \|", section, re.M):
        names = re.findall(r"`(\w+)`", row[0])
        selection, _, final = row[1].partition("(step 3: ")
        values = [re.findall(r"`(.+?)`", part) for part in (selection, final or selection)]
        for name, *texts in zip(names, *values, strict=True):
            assert name not in shown
            shown[name] = [ast.literal_eval(text) for text in texts]
    first, second = DEFAULTS.values()
    assert set(shown) == {*first, *second}
    for name, values in shown.items():
        assert values[0] == first[name] and values[1] == second.get(name, values[1]), name


def test_the_readme_can_be_read():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]
    headings = {re.sub(r"\W+", "-", line[3:].lower()) for line in lines if line.startswith("## ")}
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert "://" in link or link[1:] in headings or (ROOT / link).exists(), link


def test_the_picture_is_drawn_from_the_sample(monkeypatch, tmp_path):
    shrink_sample(monkeypatch, 4)
    monkeypatch.setattr(make_picture, "FILE", tmp_path / "new" / "signing.svg")
    monkeypatch.setattr(make_picture, "EPOCHS", 1)
    small(BATCH_SIZE=4, MAX_FRAMES=24)
    make_picture.main()
    drawn = (tmp_path / "new" / "signing.svg").read_text("utf8")
    for svg in (drawn, (ROOT / ".github" / "signing.svg").read_text("utf8")):
        assert "sample data" in svg and ">real<" in svg and ">generated<" in svg
        assert svg.count("<g ") == 2 * make_picture.FRAMES and "nan" not in svg
        assert len(svg) < 60_000
    frame = make_picture.figure(np.full((2, 76, 2), np.nan), 1, 0)  # a frame that shows nothing
    assert "nan" not in frame
