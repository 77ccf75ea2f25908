"""The page that plays signing: what is put into it, and what it does in Chromium."""

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
from helpers import WORDS, shrink_sample, small, write_checkpoint

import train_final_model as final

FACTS = {"model": "gru", "data": "none", "best_epoch": 7, "date": "2026-01-02"}
HOSTILE = ["a</script><img src=x>b", "a<!--<script>b", "__CURVE__", "__DATA__", "\u20ac&amp;"]


# ---- what is put into it


def signing(words, signs, seconds=2.0, unknown=()):
    """A Generated of the sample's points, with this plan."""
    pose = np.array(final.sample_rows(1, 5)[0]["pose"], np.float32).reshape(-1, 76, 2)
    pose = pose[: round(25 * seconds)]
    confidence = np.ones(pose.shape[:2], np.float32)
    return final.Generated(words.split(), 0, {*unknown}, signs, seconds, pose, confidence)


def item(words, signs, seconds=2.0, real_seconds=None, **options):
    made = signing(words, signs, seconds, options.pop("unknown", ()))
    real = signing("", [], real_seconds or 1).pose
    clips = [final.page_clip("real", real, real_seconds)] if real_seconds else []
    return final.page_item("one", "MSE 0.5", made, 25, clips, **options)


def log_of(val_mse):
    log = []
    for epoch, error in enumerate(val_mse, 1):
        log.append({"epoch": epoch, "train_mse": 2 * error, "val_mse": error, "mean_pose_mse": 0.4})
    return log


def write_page(items, log=(), **facts):
    Path("page.html").write_bytes(final.page("test", {**FACTS, **facts}, items, 25, log))
    return "page.html"


def test_a_word_whose_signs_last_less_than_a_frame_is_not_signed():
    signs = [(3, 0.5), (1, 0.019), (0, 0.7), (1, 0.02), (2, 0.041)]
    plan = item("GO THE XYZ WANT", signs, unknown=[1, 2])
    assert [[word["text"], word["note"]] for word in plan["words"]] == [
        ["GO", "0.70 s"],
        ["THE", "not signed, unknown"],
        ["XYZ", "0.04 s, unknown"],
        ["WANT", "0.50 s"],
    ]
    spans = [[sign["word"], sign["from"], sign["to"]] for sign in plan["signs"]]
    assert spans == [
        [3, 0, 0.5],
        [0, pytest.approx(0.519), pytest.approx(1.219)],
        [2, pytest.approx(1.239), pytest.approx(1.28)],
    ]


def test_points_that_are_more_likely_not_seen_are_hidden():
    made = signing("GO", [(0, 2.0)])
    made.confidence[:, 3] = 0.49
    made.confidence[:, 4] = 0.5
    (clip,) = final.page_item("one", "", made, 25)["clips"]
    assert {i for frame in clip["frames"] for i, point in enumerate(frame) if not point} == {3}


def test_the_errors_of_the_clips_are_those_of_the_closing_block(tmp_path, monkeypatch):
    model = write_checkpoint(tmp_path / "best_gru.pt")
    shrink_sample(monkeypatch, 9)
    small(DATASET="sample", MAX_FRAMES=96, BATCH_SIZE=4)
    clips = final.load_clips()[0]["validation"].with_tokens(final.gloss_tokenizer(WORDS))
    errors = np.array(final.clip_errors(model, clips))
    seen = np.array([clips.pose(i).isfinite().sum() for i in range(len(clips))])
    metrics = final.evaluate(model, clips, torch.device("cpu"))
    together = (errors * seen[:, None]).sum(0) / seen.sum()
    wanted = [metrics["val_mse"], metrics["mean_pose_mse"]]
    assert together == pytest.approx(wanted, rel=1e-5) and len(set(errors[:, 0])) == 8


@pytest.mark.parametrize(
    "val_mse", [[0.3, 0.02, 0.1], [0.1], [0.9, 0.2], [0.2 / n for n in range(1, 61)]]
)
def test_the_curve_can_be_read_from_its_axis_and_has_room_for_its_labels(val_mse):
    log = log_of(val_mse)
    svg = final.curve(log)
    width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    ticks = re.findall(r'y="(\d+)" text-anchor="end">([\d.]+)<', svg)
    slope, origin = np.polyfit(*np.array([[float(y) - 4, float(x)] for y, x in ticks]).T, 1)
    for points, name in zip(
        re.findall('points="([^"]*)"', svg), ("train_mse", "val_mse"), strict=True
    ):
        points = [[float(x) for x in point.split(",")] for point in points.split()][1:]
        assert len(points) == len(log) and points == sorted(points) and points[-1][0] <= width
        for line, (_, y) in zip(log, points, strict=True):
            share = min(line[name] / 0.4, 1)
            assert slope * y + origin == pytest.approx(share, abs=0.01)
    assert f"best epoch: {final.best_of(log)['epoch']}<" in svg
    assert max(float(y) for y in re.findall(r'<text[^>]* y="(\d+)"', svg)) <= height - 5


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
    items = [item("GO WANT", [(0, 1.0), (1, 1.0)]), item("HELLO", [(0, 2.0)])]
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
    browser.run("choice.selectedIndex = 1, choice.onchange()")
    assert browser.run("return words.innerText").startswith("HELLO")


def test_a_slower_speed_takes_longer(browser):
    browser.open(write_page([item("GO", [(0, 2)])]))
    way = """const start = time; draw(before + 80); const way = time - start; return way"""
    for speed, seconds in (("1", 0.08), ("0.25", 0.02), ("2", 0.16)):
        browser.run(f"speed.value = '{speed}', time = 0, playing = true")
        assert browser.run(f"time = 0; {way}") == pytest.approx(seconds, abs=1e-3)
        browser.run("playing = false")


def test_nothing_moves_where_the_system_asks_for_reduced_motion(browser):
    browser.open(write_page([item("GO", [(0, 2)])]))
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
    browser.open(write_page([item("GO THE WANT", signs, real_seconds=2.5)]))
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
    shares = "[...strip.children].map(word => word.offsetWidth / strip.offsetWidth)"
    wide = [0.5 / 2.5, 1 / 2.5, 0.49 / 2.5]
    assert browser.run(f"return {shares}") == pytest.approx(wide, abs=0.01)
    assert browser.run("return words.children[1].innerText.split('\\n')") == ["THE", "not signed"]
    assert browser.run("return words.children[1].disabled")
    for click, moment in (("words.children[0]", 0.5), ("words.children[2]", 0)):
        browser.run(f"{click}.click()")
        assert browser.run("return time") == pytest.approx(moment)


def test_the_shorter_clip_says_that_it_has_ended_and_one_lies_over_the_other(browser):
    browser.open(write_page([item("GO", [(0, 1.5)], 1.5, real_seconds=2.0)]))
    captions = "return [...document.querySelectorAll('figcaption')].map(text => text.textContent)"
    browser.run("time = 1.8")
    assert browser.run(captions) == [
        "real: 1.80 of 2.00 s, frame 46 of 50",
        "generated: ended at 1.50 s, frame 38 of 38",
    ]
    coloured = "Math.abs(r - b) > 40"
    browser.run("time = 0.6")
    assert browser.ink(1, coloured)["count"] > 100
    browser.run("overlay.click()")
    assert browser.run(captions) == [
        "real: 0.60 of 2.00 s, frame 16 of 50; generated: 0.60 of 1.50 s, frame 16 of 38"
    ]
    browser.run("item.clips[1].frames.forEach(frame => frame.fill(null))")  # what is left is grey
    assert browser.ink(0)["count"] > 1000 and browser.ink(0, coloured)["count"] < 50
    browser.run("overlay.click()")
    assert len(browser.run(captions)) == 2


def test_hidden_hands_are_not_drawn(browser):
    made = item("GO", [(0, 2)])
    left = np.array([[1.2 + 0.01 * i, -0.9 + 0.01 * i] for i in range(21)])
    clips = []
    for hidden in (range(21), range(21, 42)):
        pose = signing("", []).pose.copy()
        pose[:, :21], pose[:, 21:42] = left, left * [-1, 1]
        pose[:, hidden] = math.nan
        clips.append(final.page_clip("clip", pose, 2.0))
    browser.open(write_page([{**made, "clips": clips}]))
    left, right = "x > 0.7 * width && y < 0.3 * height", "x < 0.3 * width && y < 0.3 * height"
    for stage, shown, hidden in ((0, right, left), (1, left, right)):
        assert browser.ink(stage, shown)["count"] > 100
        assert browser.ink(stage, hidden)["count"] == 0


def test_fingers_have_shades_of_their_own(browser):
    browser.open(write_page([item("GO", [(0, 2)])]))
    fingers = browser.run("return parts[0].lines.length")
    shades = browser.run("""
const seen = new Set(), stroke = CanvasRenderingContext2D.prototype.stroke
CanvasRenderingContext2D.prototype.stroke = function () {
  seen.add(this.strokeStyle), stroke.call(this)
}
drawClip(stages[0].canvas.getContext("2d"), item.clips[0], false)
CanvasRenderingContext2D.prototype.stroke = stroke
return seen.size""")
    assert fingers == 6 and shades >= 2 * 6 + 1


def test_keys_with_alt_or_control_and_a_focused_slider_are_left_alone(browser):
    browser.open(write_page([item("GO", [(0, 2)])]))
    state = "return [time, playing]"
    before = browser.run(state)
    for key in (" ", "ArrowLeft", "ArrowRight"):
        for held in ("altKey", "ctrlKey", "metaKey"):
            assert not browser.press(key, **{held: True})
        assert not browser.press(key, on="slider") and not browser.press(key, on="choice")
    assert not browser.press("a") and browser.run(state) == before


def test_a_phone_gets_no_overflow_and_targets_of_44_pixels(browser):
    signs = [(i, 0.125) for i in range(16)]
    items = [
        item("GO " * 16, signs, real_seconds=2.0, file="1.pose"),
        item("WANT" * 300, [(0, 2.0)]),
    ]
    items[0]["cut"] = 984
    log = log_of([0.3, 0.2, 0.1])
    browser.open(write_page(items, log, data="/a/very/long/" + "path" * 50), width=390)
    for i in range(2):
        browser.run(f"show({i})")
        page = browser.run("return [innerWidth, document.documentElement.scrollWidth]")
        assert page == [390, 390]
        sizes = browser.run("""
return [...document.querySelectorAll("button, select, input, a")].filter(target => !target.hidden)
  .map(target => [target.id, target.offsetWidth, target.offsetHeight])""")
        assert len(sizes) >= 7
        assert all(width >= 44 and height >= 44 for _, width, height in sizes), sizes
        sizes = browser.run("""
return [...document.querySelectorAll("button, figcaption, p, dd, small")]
  .map(text => parseFloat(getComputedStyle(text).fontSize))""")
        assert min(sizes) >= 12
    browser.run("show(0)")
    assert browser.run("return words.lastChild.textContent") == "and 984 more, cut off"


def test_dark_mode(browser):
    path = write_page([item("GO", [(0, 2)])])
    colours = """const { color } = getComputedStyle(document.body)
const back = getComputedStyle(document.documentElement).colorScheme
return [color.match(/\\d+/g).reduce((a, b) => +a + +b) / 3, back]"""
    browser.open(path)
    assert browser.run(colours) == [0, "light dark"]
    browser.open(path, dark=True)
    assert browser.run(colours) == [255, "light dark"]


def test_a_hostile_gloss_does_no_harm(browser):
    items = [item("x", [(0, 2)]) for _ in HOSTILE]
    for one, text in zip(items, HOSTILE, strict=True):
        one["words"][0]["text"], one["label"] = text, f"one: {text}"
    browser.open(write_page(items, data="<img src=x>&__FACTS__\udcff"))
    for i, text in enumerate(HOSTILE):
        browser.run(f"show({i})")
        assert browser.run("return words.firstChild.firstChild.textContent") == text
        assert text in browser.run(f"return choice.options[{i}].textContent")
    planted = "document.querySelectorAll('img, script:not(:last-of-type)').length"
    assert browser.run(f"return {planted}") == 0
    facts = browser.run("return document.querySelector('dl').innerText")
    assert facts.count("<img src=x>&__FACTS__") == 1
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


def test_the_preview_shows_clips_by_their_error_and_the_closing_metrics(
    browser, monkeypatch, capsys
):
    shrink_sample(monkeypatch, 5)
    small(DATASET="sample", EPOCHS=2)
    final.main(["--model", "gru"])
    block = capsys.readouterr().out.split("\n\n")[-1].split("\nwarning")[0]
    closing = dict(line.split(": ", 1) for line in block.splitlines())
    assert closing["preview"] == "preview_gru.html"
    browser.open(closing["preview"])
    shown = browser.run("""
return Object.fromEntries([...document.querySelectorAll("dt")]
  .map(name => [name.textContent, name.nextSibling.textContent]))""")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", shown.pop("date"))
    assert shown.pop("train_mse") and shown == closing and "val_dtw_mje" in shown
    assert browser.run("return document.querySelectorAll('svg polyline').length") == 2

    texts = [browser.run(f"show({i}); return about.textContent") for i in range(12)]
    assert browser.run("return items.length") == 12
    form = r"rank (\d+) of 16 by MSE: ([\d.]+), ([\d.]+) of the mean pose's\. "
    form += r"DTW error ([\d.]+)\. ([\d.]+) s, real ([\d.]+) s"
    found = [re.fullmatch(form, text).groups() for text in texts]
    ranks = [int(text[0]) for text in found]
    assert ranks == sorted(set(ranks)) and ranks[0] == 1 and ranks[-1] == 16
    errors = [float(text[1]) for text in found]
    assert errors == sorted(errors) and errors[0] < float(closing["val_mse"]) < errors[-1]
    seconds = browser.run("return items.map(item => item.clips.map(clip => clip.seconds))")
    for text, (real, generated) in zip(found, seconds, strict=True):
        assert [float(text[5]), float(text[4])] == pytest.approx([real, generated], abs=0.006)
    for stage in (0, 1):
        browser.run("time = item.seconds / 2")
        ink = browser.ink(stage)
        assert ink["bottom"] - ink["top"] >= 0.5 * ink["height"]


@pytest.mark.parametrize("n", [1, 2, 5, 11, 13])
def test_of_few_clips_none_is_shown_twice(n, monkeypatch, tmp_path):
    model = write_checkpoint(tmp_path / "best_gru.pt")
    shrink_sample(monkeypatch, 4)
    small(DATASET="sample", MAX_FRAMES=96, VALIDATION_CLIPS=n)
    tokenizer = final.gloss_tokenizer(WORDS)
    clips = final.load_clips()[0]["validation"].with_tokens(tokenizer)
    items = final.preview_items(model, tokenizer, 16, clips, [0.0] * n)
    ranks = [int(re.search(r"rank (\d+) of", item["about"])[1]) for item in items]
    assert ranks == sorted(set(ranks)) and {1, n} <= set(ranks) and len(ranks) == min(n, 12)
