"""The README's commands run and print what it shows, and its settings are those of the scripts.

The commands of its fences are run in order and in one folder, with small models. A console fence
shows what each `$ command` prints: lines are compared without their figures; "..." stands for any
lines. `NAME = value` in a section's text is a setting to edit before the section's commands.
"""

import ast
import csv
import os
import re
import subprocess
import sys
import textwrap

from helpers import DEFAULTS, ROOT, edited, pose_bytes, positions

README = (ROOT / "README.md").read_text("utf8")
TINY = {"EMBED_DIM": 16, "HIDDEN_DIM": 16, "EPOCHS": 2, "MAX_FRAMES": 24}
TINY |= {"TRAIN_CLIPS": 24, "VALIDATION_CLIPS": 8}
SKIPPED = {  # commands that are not run here, and why
    "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt": ".ci/run",
    'pip install pytest "ruff~=0.17.6"': ".ci/run",
    "ruff format --check . && ruff check . && python -m pytest -q tests": ".ci/run",
    "export HF_TOKEN=hf_...": "needs a token: test_hub.py has another hub's",
    "torchrun --nproc_per_node=2 train_final_model.py --model gru": "test_torchrun.py",
    "python tests/make_picture.py": "takes minutes: test_benchmarks.py",
    'pip install "pose-format[mediapipe]"': "fetches mediapipe",
    "video_to_pose --format mediapipe -i hello.mp4 -o my_poses/hello.pose": "needs a video",
    'python -c "import torch; print(torch.cuda.is_available())"': "needs a GPU",
}
PROGRAM = "(python3?|pip|ruff|torchrun|export|video_to_pose) .+"
BENCHMARK = r"python tests/bench_\w+\.py.*"  # takes its time


def spans(text):
    """The inline code outside of the fences."""
    return re.findall(r"`([^`]+)`", " ".join(re.sub(r"```.*?```", "", text, flags=re.S).split()))


def fences(text):
    """-> [(kind, the lines within, {setting: value} of its section's text before it)]"""
    found = []
    for section in re.split(r"^## ", text, flags=re.M):
        for fence in re.finditer(r"^ *```(.*)\n((?:.*\n)*?) *```$", section, re.M):
            pairs = [span.split(" = ") for span in spans(section[: fence.start()])]
            settings = {x[0]: ast.literal_eval(x[1]) for x in pairs if x[0].isupper() and x[1:]}
            found.append((fence[1], textwrap.dedent(fence[2]).splitlines(), settings))
    return found


def commands_of(kind, lines):
    """-> [(command, the lines that it is shown to print)]"""
    if kind != "console":
        return [(line.partition("  #")[0].strip(), ["..."]) for line in lines]
    found = []
    for line in lines:
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def shape(line):
    """A line without what may differ between two runs: figures, the winner, notes on words."""
    line = re.sub(r"--model \w+", "--model MODEL", re.sub(r"\bnan\b|\d+(\.\d+)?", "#", line))
    return " ".join(re.sub(r"(\.pose +# s)   .*", r"\1", line).split()) + "\n"


def execute(command, settings, folder):
    """Run a command as a reader does -> the shape of what it prints."""
    for name in ("model_selection.py", "train_final_model.py"):
        source = edited((ROOT / name).read_text("utf8"), **{**TINY, **settings})
        (folder / name).write_text(source, "utf8")
    done = subprocess.run(
        command if isinstance(command, list) else ["bash", "-c", command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}"},
    )
    quiet = isinstance(command, list) or done.stderr == ""
    assert done.returncode == 0 and quiet, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    lines = done.stdout.splitlines()  # models so small may not beat the mean pose
    return "".join(shape(line) for line in lines if not line.startswith("warning: "))


def write_own_data(folder):
    """What the README's workflow says that a reader has; and `python`."""
    for name in ("my_signs", "my_poses", "bin"):
        (folder / name).mkdir()
    (folder / "bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin/python").chmod(0o755)
    uids = [f"{video:012x}-{clip}" for video in range(10) for clip in range(3)]
    with open(folder / "my_signs/train.csv", "w", newline="") as file:
        csv.writer(file).writerows([("uid", "text"), *((uid, "hello you") for uid in uids)])
    for seed, uid in enumerate(uids):
        (folder / f"my_poses/{uid}.pose").write_bytes(pose_bytes(positions(12, seed)))


def test_a_reader_who_follows_the_readme_gets_what_it_says(tmp_path):
    write_own_data(tmp_path)
    printed = {}
    for kind, lines, settings in fences(README):
        if kind == "python":
            execute([sys.executable, "-c", "\n".join(lines)], settings, tmp_path)
            continue
        for command, shown in commands_of(kind, lines) if kind != "text" else ():
            key = command, repr(settings)
            if key not in printed:
                run = command not in SKIPPED
                printed[key] = execute(command, settings, tmp_path) if run else ""
            pattern = "".join("(.*\n)*" if x == "..." else re.escape(shape(x)) for x in shown)
            assert re.fullmatch(pattern, printed[key]), f"{command} prints\n{printed[key]}"
    commands = [command for command, _ in printed]
    for span in spans(README):
        if re.fullmatch(PROGRAM, span) and not re.fullmatch(BENCHMARK, span):
            assert span in SKIPPED or any(span in command for command in commands), span
    assert set(SKIPPED) <= {*commands, *spans(README)}
    files = re.findall(r"`(\w+_gru\.\w+|gru\.log|predictions/index\.html)`", README)
    assert len(set(files)) == 5 and all((tmp_path / file).exists() for file in files)


def test_the_table_of_settings_is_that_of_the_scripts():
    section = README[README.index("## Settings") : README.index("## Metrics")]
    shown = {}
    for names, value in re.findall(r"^\| (`[A-Z_]+`.*?) \| (.+?) \|", section, re.M):
        selection, _, final = value.partition("(step 3: ")
        values = [re.findall(r"`(.+?)`", part) for part in (selection, final or selection)]
        for name, *texts in zip(re.findall(r"`(\w+)`", names), *values, strict=True):
            shown[name] = [ast.literal_eval(text) for text in texts]
    first, second = DEFAULTS.values()
    assert set(shown) == {*first, *second}
    for name, values in shown.items():
        assert values == [first.get(name), second.get(name, values[1])], name


def test_the_readme_can_be_read():
    lines = README.splitlines()
    assert len(lines) <= 200
    first = next(x for x in fences("\n".join(lines[:60])) if "--model gru" in x[1][0])
    assert first[2] == {"DATASET": "my_signs", "CONFIG": None, "POSES": "my_poses"}
    ci = (ROOT / ".ci" / "run").read_text("utf8").splitlines()
    assert {*[*SKIPPED][1:3]} <= {*ci}  # the commands for those who develop
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]
    headings = {re.sub(r"\W+", "-", line[3:].lower()) for line in lines if line.startswith("## ")}
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert "://" in link or link[1:] in headings or (ROOT / link).exists(), link
