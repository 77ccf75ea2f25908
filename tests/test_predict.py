"""From a checkpoint to signing that one can watch: --predict, .pose files, the page in Chromium."""

import csv
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, small
from pose_format import Pose

import model_selection as script
import train_final_model as final

WORDS = ["<pad>", "<unk>", "GO", "HELLO", "SCHOOL", "WANT"]
SENTENCES = [
    "WANT GO SCHOOL",
    "hello",
    "../../x go",
    "<img src=x onerror=alert(1)>",
    "Want, want; GO!",
    "WANT " * 1000,
]


def write_checkpoint(path, **changes):
    """A GRU that was not trained, with a left hand that no clip showed -> the model."""
    torch.manual_seed(3)
    seen = np.arange(152) >= 42
    rng = np.random.default_rng(0)
    values = {
        "mean": np.tile([0.2, 0.6], 76),
        "std": rng.uniform(0.2, 0.6, 152),
        "seen": seen,
        "seconds_per_gloss": 0.8,
    }
    statistics = {name: torch.tensor(value).float() for name, value in values.items()}
    small(MAX_FRAMES=96, **changes)
    model, _, built = script.new_model("gru", statistics, WORDS)
    for value in model.decoder.parameters():
        torch.nn.init.normal_(value, 0, 0.5)
    script.save(path, {**built, "data": "none", "metrics": {}, "weights": model.state_dict()})
    return model.eval()


@pytest.fixture
def predicted(tmp_path, capsys):
    """-> the model, what was printed, and the .pose files in order."""
    model = write_checkpoint(tmp_path / "best_gru.pt")
    final.main(["--model", "gru", "--predict", *SENTENCES])
    return model, capsys.readouterr().out, sorted((tmp_path / "predictions").glob("*.pose"))


@torch.no_grad()
def test_a_written_pose_file_holds_the_models_keypoints(predicted):
    model, out, files = predicted
    assert len(files) == len(SENTENCES)
    for sentence, path in zip(SENTENCES, files, strict=False):
        pose = Pose.read(path.read_bytes())
        tokenizer = script.gloss_tokenizer(WORDS)
        keypoints, seconds = model(*script.tokenize(tokenizer, [sentence], 16))
        n = int(model.frames(seconds))
        header = [(part.name, list(part.points)) for part in pose.header.components]
        assert header == [(part, list(names)) for part, names in script.PARTS.items()]
        assert all(
            len(part.limbs) > 5 and len(part.colors) == len(part.limbs)
            for part in pose.header.components
        )
        assert pose.body.data.shape == (n, 1, 76, 2)
        expected = keypoints[0, :n].view(n, 76, 2).numpy() * final.UNIT + final.ORIGIN
        seen = np.arange(76) >= 21
        assert (pose.body.confidence[:, 0] > 0).tolist() == [seen.tolist()] * n
        assert abs(pose.body.data.data[:, 0][:, seen] - expected[:, seen]).max() < 0.5
        assert abs(n / pose.body.fps - float(seconds)) < 1 / pose.body.fps
        assert pose.header.dimensions.width == pose.header.dimensions.height == final.CANVAS
    shoulders = pose.body.data.data[:, 0, script.SHOULDERS, 0]
    assert shoulders.shape == (n, 2)


def test_what_is_not_known_or_too_long_is_said_and_names_are_safe(predicted, tmp_path):
    _, out, files = predicted
    lines = out.splitlines()
    assert (
        "unknown" not in lines[0] + lines[1]
        and "unknown: X" in lines[2]
        and "cut to 16 glosses" in lines[5]
    )
    assert lines[0].startswith("predictions/001_WANT_GO_SCHOOL.pose   ") and len(lines) == 7
    assert all(re.fullmatch(r"\d{3}_[A-Z0-9_]{0,60}\.pose", path.name) for path in files)
    assert {path.name for path in tmp_path.iterdir()} >= {"best_gru.pt", "predictions"}
    assert not (tmp_path.parent / "x").exists() and not list(tmp_path.glob("x*"))


def test_the_page_holds_no_markup_of_a_gloss_and_needs_no_network(predicted, tmp_path):
    page = (tmp_path / "predictions" / "index.html").read_text("utf8")
    assert "<IMG" not in page.upper().replace("\\U003CIMG", "")
    assert not re.search(r"(src|href)\s*=", page.split("<script>")[0])
    assert "http" not in page.replace("\\u003c", "")
    items = json.loads(
        re.search(r"const items = (\[.*\])\nconst lines", page)[1].replace("NaN", "null")
    )
    assert [item["gloss"] for item in items] == [
        " ".join(script.split_glosses(sentence)) for sentence in SENTENCES
    ]


def test_sentences_from_stdin_and_bad_ones(tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "best_gru.pt")
    monkeypatch.setattr("sys.stdin", io.StringIO("want go\n\n  \nHELLO\n"))
    final.main(["--model", "gru", "--predict", "-"])
    assert len(list((tmp_path / "predictions").glob("*.pose"))) == 2
    shutil.rmtree(tmp_path / "predictions")
    for wrong, said in (([""], "''"), (["go", " ... "], "' ... '"), (["!?"], "'!?'")):
        line = f"error: --predict needs glosses, and {said} has none"
        with pytest.raises(SystemExit, match=f"^{re.escape(line)}$"):
            final.main(["--model", "gru", "--predict", *wrong])
    monkeypatch.setattr("sys.stdin", io.StringIO("\n \n"))
    with pytest.raises(
        SystemExit, match="^error: --predict - needs a sentence, and stdin has none$"
    ):
        final.main(["--model", "gru", "--predict", "-"])
    assert not (tmp_path / "predictions").exists()
    with pytest.raises(SystemExit, match="^error: best_bert.pt does not exist"):
        final.main(["--model", "bert", "--predict", "go"])
    (tmp_path / "predictions").write_text("a file")
    with pytest.raises(OSError, match="predictions"):  # which the script says in one line
        final.main(["--model", "gru", "--predict", "go"])


def test_prediction_reads_the_checkpoint_alone(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "best_gru.pt")
    for name in ("load_clips", "load_rows", "new_model"):
        monkeypatch.setattr(final, name, None)
    for setting, value in {
        "MAX_FRAMES": 5,
        "HIDDEN_DIM": 2,
        "DATASET": "nothing",
        "MAX_GLOSS_LEN": 1,
    }.items():
        monkeypatch.setattr(
            final, setting, value
        )  # today's constants are not those of the checkpoint
    final.main(["--model", "gru", "--predict", "want go school"])
    (path,) = (tmp_path / "predictions").glob("*.pose")
    assert len(Pose.read(path.read_bytes()).body.data) > 20


def test_more_sentences_than_fit_into_a_batch(tmp_path, capsys):
    write_checkpoint(tmp_path / "best_gru.pt")
    final.main(["--model", "gru", "--predict", *["go", "want hello"] * 35])
    assert (
        len(capsys.readouterr().out.splitlines()) == 71
        and len([*(tmp_path / "predictions").glob("*.pose")]) == 70
    )


def test_text_in_another_encoding_is_one_line(tmp_path):
    write_checkpoint(tmp_path / "best_gru.pt")
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        [sys.executable, ROOT / "train_final_model.py", "--model", "gru", "--predict", "-"],
        input=b"GO \xff\n",
        capture_output=True,
        env=strict,
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith(b"error: 'utf-8' codec")
        and done.stderr.count(b"\n") == 1
    )


# ---- the page in Chromium, driven by WebDriver


class Browser:
    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen(
            ["chromedriver", f"--port={self.port}"], stdout=subprocess.DEVNULL
        )
        options = {
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--window-size=900,900",
                f"--user-data-dir={folder}/profile",
            ]
        }
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        for _ in range(100):
            try:
                self.session = self.call(
                    "POST", "/session", {"capabilities": {"alwaysMatch": wanted}}
                )["sessionId"]
                break
            except OSError:  # it does not listen yet
                time.sleep(0.1)

    def call(self, method, path, body=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
        )
        return json.load(urllib.request.urlopen(request))["value"]

    def open(self, path):
        self.call("POST", f"/session/{self.session}/url", {"url": Path(path).resolve().as_uri()})

    def run(self, code):
        return self.call(
            "POST", f"/session/{self.session}/execute/sync", {"script": code, "args": []}
        )

    def press(self, key):
        self.run(
            "document.body.dispatchEvent(new KeyboardEvent('keydown', "
            f"{{key: {key!r}, bubbles: true}}))"
        )

    def errors(self):
        log = self.call("POST", f"/session/{self.session}/se/log", {"type": "browser"})
        return [
            line
            for line in log
            if line["level"] in ("SEVERE", "WARNING") and "readback" not in line["message"]
        ]

    def close(self):
        self.call("DELETE", f"/session/{self.session}")  # which ends Chromium
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromedriver"):
        pytest.skip("there is no Chromium: apt-get install chromium chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


INK = """const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data
let sum = 0, count = 0
for (let i = 3; i < data.length; i += 4)
  if (data[i]) sum = (sum * 31 + i * data[i]) % 1000003, count++
return [count, sum]"""


def test_the_page_plays_pauses_and_steps_in_a_real_browser(predicted, tmp_path, browser):
    browser.open(tmp_path / "predictions" / "index.html")
    assert browser.run("return document.title") == "Gloss to pose"
    assert browser.run("return gloss.textContent") == "WANT GO SCHOOL"
    count, first = browser.run(INK)
    assert count > 500
    frames = {browser.run("return +slider.value") for _ in range(10) if not time.sleep(0.1)}
    assert len(frames) > 3 and browser.run("return play.textContent") == "Pause"

    browser.run("play.click()")
    time.sleep(0.1)
    held = browser.run(INK)
    time.sleep(0.5)
    assert browser.run(INK) == held and browser.run("return play.textContent") == "Play"
    browser.run("slider.value = 3, slider.oninput()")
    time.sleep(0.1)
    moved = browser.run(INK)
    assert moved != held and browser.run("return count.value").startswith("4/")
    browser.press("ArrowRight")
    time.sleep(0.1)
    assert browser.run("return count.value").startswith("5/") and browser.run(INK) != moved
    browser.press("ArrowLeft")
    browser.press(" ")
    time.sleep(0.1)
    assert browser.run("return play.textContent") == "Pause"

    browser.press("ArrowDown")
    assert browser.run("return gloss.textContent") == "HELLO"
    browser.press("ArrowUp")
    browser.press("ArrowUp")
    assert browser.run("return sentence.selectedIndex") == len(SENTENCES) - 1
    browser.run("sentence.selectedIndex = 3, sentence.onchange()")
    assert "IMG" in browser.run("return gloss.textContent")
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert "IMG" in browser.run("return canvas.ariaLabel")
    browser.run("speed.value = 2")
    assert browser.errors() == []


def test_the_preview_shows_a_real_clip_beside_the_generated_one(browser, tmp_path, monkeypatch):
    sample_rows = final.sample_rows
    monkeypatch.setattr(final, "sample_rows", lambda n, seed: sample_rows(n // 20, seed))
    for setting, value in {
        "EMBED_DIM": 16,
        "HIDDEN_DIM": 16,
        "EPOCHS": 3,
        "PROCESSES": 0,
        "DATASET": "sample",
    }.items():
        monkeypatch.setattr(final, setting, value)
    final.main(["--model", "gru"])
    browser.open(tmp_path / "preview_gru.html")
    assert (
        browser.run("return items.map(item => item.clips.map(clip => clip[0]).join())")
        == ["real,generated"] * 4
    )
    browser.run("play.click()")
    half = INK.replace("(0, 0, canvas.width", "({}, 0, canvas.width / 2")
    assert all(browser.run(half.format(side))[0] > 500 for side in ("0", "canvas.width / 2"))
    real, sample = browser.run("return items[0].clips[0][1]"), sample_rows(4, 2)[0]["pose"]
    assert len(real) == round(25 * len(sample) / 25) and len(real[0]) == 76

    with open("log_gru.csv", newline="") as file:
        log = list(csv.DictReader(file))
    curves = [
        [[float(x) for x in point.split(",")] for point in points.split()]
        for points in browser.run(
            "return [...document.querySelectorAll('polyline')]"
            ".map(line => line.getAttribute('points'))"
        )
    ]
    top = max(
        float(line[name]) for line in log for name in ("train_mse", "val_mse", "mean_pose_mse")
    )
    for name, points in zip(("train_mse", "val_mse", "mean_pose_mse"), curves, strict=True):
        drawn = [(180 - y) / 170 * top for _, y in points[:3]]
        assert drawn == pytest.approx([float(line[name]) for line in log], abs=top / 999)
        assert points[0][0] < points[1][0] < points[2][0] and name in browser.run(
            "return document.querySelector('svg').textContent"
        )
    assert browser.errors() == []


def test_a_checkpoint_of_other_keypoints_is_said(tmp_path):
    small(POSE_DIM=8)
    statistics = {"mean": torch.zeros(8), "std": torch.ones(8), "seen": torch.ones(8)}
    model, _, built = script.new_model("gru", statistics, WORDS)
    script.save("best_gru.pt", {**built, "weights": model.state_dict()})
    line = "^error: best_gru.pt is no model of a .pose file's 76 keypoints$"
    with pytest.raises(SystemExit, match=line):
        final.main(["--model", "gru", "--predict", "go"])
