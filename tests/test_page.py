"""The page that plays signing: what is put into it, and what it does in Chromium."""

import contextlib
import io
import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import WORDS, write_checkpoint

import train_final_model as final

FACTS = {"model": "gru", "data": "none", "best_epoch": 7, "date": "2026-01-02"}
HOSTILE = [
    "a</script><img src=x>b",
    "a<!--<script>b",
    "a<script>document.title='x'</script>b",
    "__BELOW__",
    "__DATA__",
    "\u20ac&amp;",
]


# ---- what is put into it


def signing(signs, seconds=2.0):
    """A Generated of the sample's points -> with this plan."""
    pose = final.sample_rows(1, 5)[0]["pose"]
    pose = np.array(pose, np.float32).reshape(-1, 76, 2)[: round(25 * seconds)]
    return final.Generated(pose, np.ones(pose.shape[:2], np.float32), seconds, signs)


def item(sentence, signs, seconds=2.0, real_seconds=None, file=None):
    made = signing(signs, seconds)
    clips = [final.page_clip("generated", final.visible(made), seconds)]
    if real_seconds:
        clips.insert(0, final.page_clip("real", signing([], real_seconds).pose, real_seconds))
    plan = final.page_plan(sentence, made, final.gloss_tokenizer(WORDS), 16, 25)
    return {"label": "one", "facts": {"MSE": "0.5"}, "clips": clips, "file": file, **plan}


def write_page(items, path="page.html", **facts):
    Path(path).write_bytes(final.page("test", {**FACTS, **facts}, items, 25))
    return path


def test_a_word_whose_signs_last_less_than_a_frame_is_not_signed():
    plan = item("go the xyz want", [(3, 0.5), (1, 0.019), (0, 0.7), (1, 0.02), (2, 0.041)])
    words = [[word["word"], word["signed"], word["known"]] for word in plan["words"]]
    assert words == [
        ["GO", True, True],
        ["THE", False, False],
        ["XYZ", True, False],
        ["WANT", True, True],
    ]
    spans = [[sign["word"], sign["from"], sign["to"]] for sign in plan["signs"]]
    assert spans == [
        [3, 0, 0.5],
        [0, pytest.approx(0.519), pytest.approx(1.219)],
        [2, pytest.approx(1.239), pytest.approx(1.28)],
    ]
    assert plan["cut"] == 0 and item("go " * 1000, [(0, 1)])["cut"] == 984


def test_word_pieces_know_every_word(bert, monkeypatch):
    monkeypatch.setattr(final, "BERT_NAME", bert)
    _, tokenizer = final.load_pretrained()
    plan = final.page_plan("go xyz", signing([(0, 1), (1, 1)]), tokenizer, 16, 25)
    assert [word["known"] for word in plan["words"]] == [True, True]


def test_the_clips_shown_are_the_best_the_median_and_the_worst():
    errors = [i * 7 % 150 for i in range(150)]
    picked = final.pick_by_error(errors)
    assert [rank for rank, _ in picked] == [0, 1, 2, 3, 73, 74, 75, 76, 146, 147, 148, 149]
    assert [errors[i] for _, i in picked] == [rank for rank, _ in picked]
    for n in (1, 2, 5, 11, 12, 13):
        ranks = [rank for rank, _ in final.pick_by_error(range(n))]
        assert ranks == sorted(set(ranks)) and {0, n - 1} <= set(ranks) <= set(range(n))


def test_the_errors_of_the_clips_are_those_of_the_closing_block(tmp_path):
    model = write_checkpoint(tmp_path / "best_gru.pt")
    rows = []
    for i, row in enumerate(final.sample_rows(9, 1)):
        pose = np.array(row["pose"], np.float32)[: 30 + 5 * i]
        pose[3:9, 42:50] = math.nan
        rows.append({"gloss": row["gloss"], "pose": pose.ravel(), "seconds": len(pose) / 25})
    tokenizer = final.gloss_tokenizer(WORDS)
    batches = [final.collate(rows[i : i + 4], tokenizer) for i in (0, 4, 8)]
    errors, mean_errors = final.clip_errors(model, batches)
    seen = np.array([np.isfinite(row["pose"]).sum() for row in rows])
    metrics = final.evaluate(model, batches, torch.device("cpu"))
    assert (np.array(errors) * seen).sum() / seen.sum() == pytest.approx(metrics["val_mse"])
    whole = (np.array(mean_errors) * seen).sum() / seen.sum()
    assert whole == pytest.approx(metrics["mean_pose_mse"])
    assert len(set(errors)) == 9


def log_of(val_mse, motion=0.5):
    log = []
    for epoch, error in enumerate(val_mse, 1):
        line = {"epoch": epoch, "train_mse": 2 * error, "val_mse": error, "mean_pose_mse": 0.4}
        log.append({**line, "motion": motion})
    return log


@pytest.mark.parametrize(
    "val_mse", [[0.3, 0.02, 0.1], [0.1], [0.0, 0.0], [0.2 / n for n in range(1, 61)]]
)
def test_the_learning_curve_has_axes_that_its_curves_are_read_from(val_mse):
    log = log_of(val_mse)
    text = final.learning_curve(log)
    errors, motion = text.split("<svg")[1:]
    for svg, names, read in (
        (errors, ["train_mse", "val_mse", "mean_pose_mse"], math.log),
        (motion, ["motion"], float),
    ):
        ticks = re.findall(r'y="([\d.]+)" text-anchor="end">([\d.e-]+)<', svg)
        assert len(ticks) >= 4
        ticks = np.array([[float(y) - 4, read(float(value))] for y, value in ticks])
        slope, origin = np.polyfit(*ticks.T, 1)
        lines = re.findall('polyline points="([^"]*)"', svg)
        for name, points in zip(names, lines, strict=True):
            points = [[float(x) for x in point.split(",")] for point in points.split()]
            assert len(points) == len(log) + 1 and points == sorted(points)
            for line, (_, y) in zip(log, points, strict=False):
                value = read(max(line[name], 1e-6))
                assert slope * y + origin == pytest.approx(value, abs=0.05)
            assert f">{name}<" in svg  # the legend
        best = final.best_of(log)["epoch"]
        at = lines[0].split()[best - 1].split(",")[0]
        assert f'<text x="{at}" y="40" text-anchor="middle">best: {best}</text>' in svg
        assert ">epoch<" in svg
    assert "squared shoulder widths" in errors and "dropout" in text


# ---- in Chromium, driven by WebDriver


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

    def devtools(self, command, **options):
        body = {"cmd": command, "params": options}
        return self.call("POST", f"/session/{self.session}/goog/cdp/execute", body)

    def open(self, path, width=1280, dark=False, still=True):
        """still: as the system of someone who asks for reduced motion."""
        features = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        media = [{"name": name, "value": value} for name, value in features.items()]
        self.devtools("Emulation.setEmulatedMedia", features=media)
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.call("POST", f"/session/{self.session}/url", {"url": Path(path).resolve().as_uri()})

    def run(self, code):
        """What the code returns after the next frame has been drawn."""
        frame = "await new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
        script = f"return (async () => {{ {frame}; {code} }})()"
        return self.call(
            "POST", f"/session/{self.session}/execute/sync", {"script": script, "args": []}
        )

    def press(self, key, on="document.body", **keys):
        """-> whether the page took the key."""
        options = json.dumps({"key": key, "bubbles": True, "cancelable": True, **keys})
        return self.run(f"return !{on}.dispatchEvent(new KeyboardEvent('keydown', {options}))")

    def errors(self):
        log = self.call("POST", f"/session/{self.session}/se/log", {"type": "browser"})
        return [
            line
            for line in log
            if line["level"] in ("SEVERE", "WARNING") and "readback" not in line["message"]
        ]

    def ink(self, stage, code="true"):
        """Pixels of a stage's canvas that are drawn, of which `code` holds for x, y, r, g and b."""
        return self.run(f"""
const canvas = document.querySelectorAll("canvas")[{stage}], {{ width, height }} = canvas
const data = canvas.getContext("2d").getImageData(0, 0, width, height).data
const seen = []
for (let i = 0; i < data.length; i += 4) {{
  const x = i / 4 % width, y = Math.floor(i / 4 / width), [r, g, b] = data.slice(i, i + 3)
  if (data[i + 3] && ({code})) seen.push([x, y])
}}
const ys = seen.map(([, y]) => y), sum = seen.reduce((sum, [x, y]) => sum + x * y % 9973, 0)
return {{ count: seen.length, top: ys[0], bottom: ys.at(-1), height, sum }}""")

    def close(self):
        self.call("DELETE", f"/session/{self.session}")  # which ends Chromium
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not shutil.which("chromedriver"):
        pytest.skip("there is no Chromium: apt-get install chromium chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    """The browser, whose console must be empty after the test."""
    chromium.errors()
    yield chromium
    assert chromium.errors() == []


def test_the_page_plays_pauses_and_steps(browser):
    items = [
        item("go want", [(0, 1.0), (1, 1.0)]),
        item("hello", [(0, 2.0)]),
        item("a b", [(1, 2)]),
    ]
    browser.open(write_page(items), still=False)
    assert browser.run("return document.title") == "GRU (none), epoch 7, 2026-01-02: test"
    times = {browser.run("return time") for _ in range(10)}
    assert len(times) > 5 and browser.run("return play.textContent") == "Pause"

    browser.run("play.click()")
    held = browser.ink(0)
    time.sleep(0.3)
    assert browser.ink(0) == held and browser.run("return play.textContent") == "Play"
    browser.run("slider.value = 3, slider.oninput()")
    caption = "return document.querySelector('figcaption').textContent"
    assert browser.run(caption) == "generated: 0.12 of 2.00 s, frame 4 of 50"
    assert browser.ink(0) != held
    assert browser.press("ArrowRight") and "frame 5 of" in browser.run(caption)
    browser.run("back.click(), back.click()")
    assert browser.run(caption) == "generated: 0.08 of 2.00 s, frame 3 of 50"
    browser.run("forward.click()")
    assert "frame 4 of" in browser.run(caption)
    assert browser.press(" ") and browser.run("return playing")

    assert browser.press("ArrowDown")
    assert browser.run("return words.innerText").startswith("HELLO")
    browser.press("ArrowUp")
    browser.press("ArrowUp")
    assert browser.run("return choice.selectedIndex") == 2
    browser.run("choice.selectedIndex = 1, choice.onchange()")
    assert browser.run("return item.words[0].word") == "HELLO"
    browser.run("next.click(), next.click()")
    assert browser.run("return choice.selectedIndex") == 0
    browser.run("previous.click()")
    assert browser.run("return choice.selectedIndex") == 2


def test_nothing_moves_where_the_system_asks_for_reduced_motion(browser):
    browser.open(write_page([item("go", [(0, 2)])]))
    assert browser.run("return [time, play.textContent]") == [0, "Play"]
    time.sleep(0.2)
    assert browser.run("return time") == 0
    browser.run("play.click()")
    time.sleep(0.1)
    assert browser.run("return time") > 0


MARKED = """return [...{}.children].filter(word => word.ariaCurrent == "true")
.map(word => word.textContent)"""


def test_the_marked_word_follows_the_plan_and_a_click_jumps(browser):
    signs = [(2, 0.5), (0, 1.0), (1, 0.01), (2, 0.49)]
    browser.open(write_page([item("go the want", signs, real_seconds=2.5)]))
    for moment, sign, word in (
        (0.2, "WANT", "WANT0.99 s"),
        (1.0, "GO", "GO1.00 s"),
        (1.6, "WANT", "WANT0.99 s"),
    ):
        browser.run(f"time = {moment}")
        assert browser.run(MARKED.format("strip")) == [sign]
        assert browser.run(MARKED.format("words")) == [word]
    browser.run("time = 2.2")  # the real clip is longer
    assert browser.run(MARKED.format("strip")) == browser.run(MARKED.format("words")) == []
    assert browser.run("return [...strip.children].map(word => word.textContent)") == [
        "WANT",
        "GO",
        "WANT",
        "",
    ]
    shares = browser.run(
        "return [...strip.children].slice(0, 3).map(word => word.offsetWidth / strip.offsetWidth)"
    )
    assert shares == pytest.approx([0.5 / 2.5, 1 / 2.5, 0.49 / 2.5], abs=0.01)
    assert browser.run("return words.children[1].innerText.split('\\n')") == [
        "THE",
        "not signed, unknown word",
    ]
    assert browser.run("return words.children[1].disabled")
    for click, moment in (
        ("strip.children[1]", 0.5),
        ("strip.children[2]", 1.51),
        ("words.children[2]", 0),
    ):
        browser.run(f"{click}.click()")
        assert browser.run("return time") == pytest.approx(moment)
    now = browser.run("time = 1.25; return 1") and browser.run(
        "return document.getElementById('now').offsetLeft / strip.offsetWidth"
    )
    assert now == pytest.approx(0.5, abs=0.01)


def test_the_shorter_clip_says_that_it_has_ended_and_one_lies_over_the_other(browser):
    browser.open(write_page([item("go", [(0, 1.5)], 1.5, real_seconds=2.0)]))
    captions = "return [...document.querySelectorAll('figcaption')].map(text => text.textContent)"
    full = browser.ink(1)
    browser.run("time = 1.8")
    real, generated = browser.run(captions)
    assert (
        real == "real: 1.80 of 2.00 s, frame 46 of 50" and generated == "generated: ended at 1.50 s"
    )
    coloured = "Math.abs(r - b) > 40"
    browser.run("time = 0.6")
    assert browser.ink(1, coloured)["count"] > 100
    browser.run("overlay.click()")
    (caption,) = browser.run(captions)
    assert (
        caption == "real: 0.60 of 2.00 s, frame 16 of 50; generated: 0.60 of 1.50 s, frame 16 of 38"
    )
    assert browser.run("return overlay.ariaPressed") == "true"
    browser.run("item.clips[1].frames.forEach(frame => frame.fill(null))")  # what is left is grey
    assert browser.ink(0)["count"] > 1000 and browser.ink(0, coloured)["count"] < 50
    browser.run("overlay.click()")
    assert len(browser.run(captions)) == 2 and full["count"] > 1000


def test_hidden_hands_are_not_drawn_and_seen_ones_are_reached_by_their_arms(browser):
    made = item("go", [(0, 2)])
    left = np.array([[1.2 + 0.01 * i, -0.9 + 0.01 * i] for i in range(21)])
    clips = []
    for hidden in (range(21), range(21, 42)):
        pose = signing([]).pose.copy()
        pose[:, :21], pose[:, 21:42] = left, left * [-1, 1]
        pose[:, 51], pose[:, 52] = [0.7, 0.4], [-0.7, 0.4]  # the arms' wrists
        pose[:, hidden] = math.nan
        clips.append(final.page_clip("clip", pose, 2.0))
        frame = clips[-1]["frames"][9]
        assert {i for i, point in enumerate(frame) if point is None} == set(hidden)
    browser.open(write_page([{**made, "clips": clips}]))
    hands = {"left": "x > 0.8 * width && y < 0.25 * height"}
    hands["right"] = "x < 0.2 * width && y < 0.25 * height"
    arms = {"left": "Math.abs(x / width - 0.82) < 0.1 && Math.abs(y / height - 0.4) < 0.04"}
    arms["right"] = arms["left"].replace("0.82", "0.18")
    for stage, shown, hidden in ((0, "right", "left"), (1, "left", "right")):
        for places in (hands, arms):
            assert browser.ink(stage, places[shown])["count"] > 100
            assert browser.ink(stage, places[hidden])["count"] == 0


def test_keys_with_alt_or_control_and_a_focused_slider_are_left_alone(browser):
    browser.open(write_page([item("go", [(0, 2)]), item("want", [(0, 2)])]))
    state = "return [time, playing, choice.selectedIndex]"
    before = browser.run(state)
    for key in (" ", "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"):
        for held in ("altKey", "ctrlKey", "metaKey", "shiftKey"):
            assert not browser.press(key, **{held: True})
        assert not browser.press(key, on="slider") and not browser.press(key, on="choice")
    assert not browser.press("a") and not browser.press(" ", on="next")
    assert browser.run(state) == before
    assert browser.press("ArrowRight", on="next") and browser.run("return time") > 0


def test_a_phone_gets_no_overflow_and_targets_of_44_pixels(browser):
    items = [item("go " * 1000, [(i, 0.125) for i in range(16)], real_seconds=2.0, file="1.pose")]
    items.append(item("want" * 300, [(0, 2.0)]))
    browser.open(write_page(items, data="/a/very/long/" + "path" * 50), width=390)
    for i in range(2):
        browser.run(f"show({i})")
        assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [
            390,
            390,
        ]
        sizes = browser.run("""
return [...document.querySelectorAll("button, select, input, a")]
  .filter(target => !target.hidden && target.parentElement != strip)
  .map(target => [target.id, target.offsetWidth, target.offsetHeight])""")
        assert len(sizes) >= 9
        assert all(width >= 44 and height >= 44 for _, width, height in sizes), sizes
        assert browser.run("return strip.offsetHeight") >= 44
        sizes = browser.run("""
return [...document.querySelectorAll("button, figcaption, p, dd, small")]
  .map(text => parseFloat(getComputedStyle(text).fontSize))""")
        assert min(sizes) >= 12
    assert browser.run("return words.textContent").count("WANT") == 300
    browser.run("show(0)")
    assert browser.run("return words.lastChild.textContent") == "and 984 more, cut off"


def test_dark_mode(browser):
    path = write_page([item("go", [(0, 2)])])
    bright = "r > 200 && g > 200 && b > 200"
    dim = "r < 60 && g < 60 && b < 60"
    colours = """const { color, backgroundColor } = getComputedStyle(document.body)
return [color, backgroundColor].map(text => text.match(/\\d+/g).reduce((a, b) => +a + +b) / 3)"""
    browser.open(path)
    ink, paper = browser.run(colours)
    assert ink < 60 and paper == 255
    assert browser.ink(0, dim)["count"] > 50  # the face's lines
    browser.open(path, dark=True)
    ink, paper = browser.run(colours)
    assert ink > 200 and paper < 40
    assert browser.ink(0, bright)["count"] > 50


def test_a_hostile_gloss_does_no_harm(browser):
    items = [item(text, [(0, 2)]) for text in HOSTILE]
    browser.open(write_page(items, data="<img src=x>&__FACTS__\udcff"))
    for i, text in enumerate(HOSTILE):
        browser.run(f"show({i})")
        shown = browser.run("return words.querySelector('span').textContent")
        assert shown == final.split_glosses(text)[0]
        assert shown in browser.run(f"return choice.options[{i}].textContent")
    assert (
        browser.run("return document.querySelectorAll('img, script:not(:last-of-type)').length")
        == 0
    )
    assert (
        browser.run("return document.querySelector('dl').innerText").count("<img src=x>&__FACTS__")
        == 1
    )
    assert browser.run("return document.querySelector('h1').textContent").startswith("GRU (<img")


def test_predictions_link_the_pose_files(browser, tmp_path):
    write_checkpoint(tmp_path / "best_gru.pt")
    final.main(["--model", "gru", "--predict", "want go", "hello"])
    browser.open("predictions/index.html")
    for i, name in enumerate(("001_WANT_GO.pose", "002_HELLO.pose")):
        browser.run(f"show({i})")
        link = browser.run("return [file.href, file.textContent, file.hidden]")
        assert link == [(tmp_path / "predictions" / name).as_uri(), "The .pose file", False]
        assert browser.ink(0)["count"] > 500
        never_seen = browser.run("return item.clips[0].frames.map(frame => frame.slice(0, 21))")
        assert {point for frame in never_seen for point in map(str, frame)} == {"None"}
    assert browser.run("return [overlay.hidden, item.clips.length]") == [True, 1]


@pytest.fixture(scope="module")
def preview(tmp_path_factory):
    """A short training on some of the sample -> its preview, and the metrics that it prints."""
    folder, printed, sample_rows = (
        tmp_path_factory.mktemp("preview"),
        io.StringIO(),
        final.sample_rows,
    )
    settings = {"EMBED_DIM": 16, "HIDDEN_DIM": 16, "EPOCHS": 2, "PROCESSES": 0, "DATASET": "sample"}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(final, "sample_rows", lambda n, seed: sample_rows(n // 5, seed))
        for setting, value in settings.items():
            patch.setattr(final, setting, value)
        final.main(["--model", "gru"])
    block = printed.getvalue().split("\n\n")[-1].split("\nwarning")[0]
    return folder / "preview_gru.html", dict(line.split(": ", 1) for line in block.splitlines())


def test_the_preview_shows_clips_by_their_error_and_the_closing_metrics(browser, preview):
    path, closing = preview
    browser.open(path)
    shown = browser.run("""
return Object.fromEntries([...document.querySelectorAll("dt")]
  .map(name => [name.textContent, name.nextSibling.textContent]))""")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", shown.pop("date"))
    assert shown == closing and "val_dtw_mje" in shown
    title = browser.run("return document.querySelector('h1').textContent")
    assert title.startswith(f"GRU (sample data), epoch {closing['best_epoch']}, 2")

    texts = []
    for i in range(12):
        browser.run(f"show({i})")
        texts.append(browser.run("return about.textContent"))
    assert browser.run("return items.length") == 12
    form = r"(\w+), rank (\d+) of 16 by MSE\. MSE: ([\d.]+), ([\d.]+) of the mean pose's\. "
    form += r"DTW error: ([\d.]+)\. Duration: ([\d.]+) s, real ([\d.]+) s"
    found = [re.fullmatch(form, text).groups() for text in texts]
    assert [(text[0], int(text[1])) for text in found] == [
        *[("best", rank) for rank in (1, 2, 3, 4)],
        *[("median", rank) for rank in (7, 8, 9, 10)],
        *[("worst", rank) for rank in (13, 14, 15, 16)],
    ]
    errors = [float(text[2]) for text in found]
    assert errors == sorted(errors) and errors[0] < float(closing["val_mse"]) < errors[-1]
    seconds = browser.run("return items.map(item => item.clips.map(clip => clip.seconds))")
    for text, (real, generated) in zip(found, seconds, strict=True):
        assert [float(text[6]), float(text[5])] == pytest.approx([real, generated], abs=0.006)


def test_the_figure_fills_its_stage(browser, preview):
    browser.open(preview[0])
    for i in (0, 6, 11):
        browser.run(f"show({i}), time = item.seconds / 2")
        names = browser.run("return item.clips.map(clip => clip.name)")
        assert names == ["real", "generated"]
        for stage in (0, 1):
            ink = browser.ink(stage)
            assert ink["bottom"] - ink["top"] >= 0.6 * ink["height"], (i, names[stage], ink)
