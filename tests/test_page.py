"""The page that plays signing: what is put into it, and what it does in Chromium."""

import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import WORDS, shrink_sample, small, write_checkpoint

import train_final_model as final

FACTS = {"model": "gru", "data": "none", "best_epoch": 7, "date": "2026-01-02"}
HOSTILE = ["a</script><img src=x>b", "a<!--<script>b", "__CURVE__", "__DATA__", "\u20ac&amp;"]


def signed(words, signs, seconds=2.0, unknown=()):
    """A Generated of the sample's points, with this plan."""
    pose = np.array(final.sample_rows(1, 5)[0]["pose"], np.float32).reshape(-1, 76, 2)
    pose = pose[: round(25 * seconds)]
    confidence = np.ones(pose.shape[:2], np.float32)
    return final.Generated(words.split(), 0, {*unknown}, signs, seconds, pose, confidence)


def item(words, signs, seconds=2.0, real_seconds=None, unknown=(), file=""):
    real = signed("", [], real_seconds or 1).pose
    clips = [final.page_clip("real", real, real_seconds)] if real_seconds else []
    return final.page_item("one", "", signed(words, signs, seconds, unknown), 25, clips, file)


def write_page(items, log=(), **facts):
    Path("page.html").write_bytes(final.page("test", {**FACTS, **facts}, items, 25, log))
    return "page.html"


def test_a_word_whose_signs_last_less_than_a_frame_is_not_signed_and_what_is_not_likely_is_hidden():
    signs = [(3, 0.5), (1, 0.019), (0, 0.7), (1, 0.02), (2, 0.041)]
    generated = signed("GO THE XYZ WANT", signs, unknown=[1, 2])
    generated.confidence[:, 3:5] = 0.49, 0.5
    plan = final.page_item("one", "", generated, 25)
    notes = {word["text"]: word["note"] for word in plan["words"]}
    assert notes == {
        "GO": "0.70 s",
        "THE": "not signed, unknown",
        "XYZ": "0.04 s, unknown",
        "WANT": "0.50 s",
    }
    spans = [[sign["word"], sign["from"], sign["to"]] for sign in plan["signs"]]
    wanted = [[3, 0, 0.5], [0, 0.519, 1.219], [2, 1.239, 1.28]]
    np.testing.assert_allclose(spans, wanted, atol=1e-6)
    (clip,) = plan["clips"]
    assert {i for frame in clip["frames"] for i, point in enumerate(frame) if not point} == {3}


def test_the_preview_has_clips_from_the_lowest_to_the_highest_error(monkeypatch, tmp_path):
    n, model = 16, write_checkpoint(tmp_path / "best_gru.pt")
    shrink_sample(monkeypatch, 4)
    small(DATASET="sample", MAX_FRAMES=96, BATCH_SIZE=4, VALIDATION_CLIPS=n)
    tokenizer = final.gloss_tokenizer(WORDS)
    clips = final.load_clips()[0]["validation"].with_tokens(tokenizer)
    mean, errors = model.mean.unflatten(0, (-1, 2)).numpy(), []
    for i, one in enumerate(final.generate(model, tokenizer, clips.glosses, 16, clips.n_frames)):
        real = final.pose_of(clips, i)
        errors.append([np.nanmean((some - real) ** 2) for some in (one.pose, mean)])
    errors = np.array(errors)
    seen = [clips.pose(i).isfinite().sum() for i in range(n)]
    metrics = final.evaluate(model, clips, torch.device("cpu"))
    assert np.average(errors[:, 0], weights=seen) == pytest.approx(metrics["val_mse"], rel=1e-5)

    items = final.preview_items(model, tokenizer, 16, clips, [0.25] * n)
    form = r"rank (\d+) of 16 by MSE: ([\d.]+), ([\d.]+) % of the mean pose's\. "
    form += r"DTW error 0.25000\. ([\d.]+) s, real ([\d.]+) s"
    found = np.array([re.fullmatch(form, one["about"]).groups() for one in items], float)
    ranks = found[:, 0].astype(int)
    assert len(ranks) == 12 and (np.diff([0, *ranks]) > 0).all() and ranks[-1] == n
    order = errors[errors[:, 0].argsort()][ranks - 1]
    assert found[:, 1] == pytest.approx(order[:, 0], abs=1e-5)
    assert found[:, 2] == pytest.approx(100 * order[:, 0] / order[:, 1], abs=0.06)
    seconds = [[clip["seconds"] for clip in one["clips"]][::-1] for one in items]
    np.testing.assert_allclose(found[:, 3:], seconds, atol=0.006)


def test_the_curve_goes_from_the_mean_poses_error_at_the_top_to_0_at_the_bottom():
    log = []
    for epoch, error in enumerate([0.3, 0.02, 0.1], 1):
        log.append({"epoch": epoch, "train_mse": 2 * error, "val_mse": error, "mean_pose_mse": 0.4})
    html = final.curve(log)
    found = re.findall('points="0,0 ([^"]*)"', html)
    points = np.array([[x.split(",") for x in line.split()] for line in found], float)
    shares = np.array([[1, 0.1, 0.5], [0.75, 0.05, 0.25]])
    np.testing.assert_allclose(points[..., 1], 140 * (1 - shares))
    np.testing.assert_allclose(points[..., 0], [[400 / 3, 800 / 3, 400]] * 2, atol=0.1)
    assert "1 to 3" in html and "Best epoch: 2." in html


def test_a_hostile_gloss_or_path_is_text_and_the_page_needs_no_network():
    items = [item("x", [(0, 2)]) for _ in HOSTILE]
    for one, text in zip(items, HOSTILE, strict=True):
        one["words"][0]["text"], one["label"] = text, f"one: {text}"
    page = Path(write_page(items, data="<img src=x>&__FACTS__\udcff")).read_text("ascii")
    tags, texts = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, options: tags.append((tag, dict(options)))
    parser.handle_data = texts.append
    parser.feed(page)
    names = [tag for tag, _ in tags]
    assert names.count("script") == 1 and "img" not in names and "<!--" not in page
    assert "http" not in page and not any({"src", "href"} & {*options} for _, options in tags)
    assert texts.count("<img src=x>&__FACTS__\ufffd") == 1
    (script,) = [text for text in texts if "const { fps" in text]
    data = json.loads(re.search(r"head, items } = (.*)\n", script)[1])
    assert data["items"] == items
    assert min(part["style"][1] for part in data["parts"]) >= 30  # no part is grey, as the real one


# ---- in Chromium, driven by WebDriver


class Browser:
    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        command = ["chromedriver", f"--port={self.url.rpartition(':')[2]}"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=900,900"]
        options = {"args": [*options, f"--user-data-dir={folder}/profile"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        wanted["goog:loggingPrefs"] = {"browser": "ALL"}
        for _ in range(100):
            try:
                made = self.call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
                self.url += f"/session/{made['sessionId']}"
                break
            except OSError:  # it does not listen yet
                time.sleep(0.1)

    def call(self, method, path, body=None):
        url = self.url + path if "/session/" in self.url else f"{self.url}/session"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, method=method, data=data)
        return json.load(urllib.request.urlopen(request))["value"]

    def devtools(self, command, **options):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": options})

    def open(self, path, width=1280, dark=False, still=True):
        """still: as the system of someone who asks for reduced motion."""
        features = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        media = [{"name": name, "value": value} for name, value in features.items()]
        self.devtools("Emulation.setEmulatedMedia", features=media)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        self.call("POST", "/url", {"url": Path(path).resolve().as_uri()})

    def run(self, code):
        """What the code returns after the next frame has been drawn."""
        frame = "await new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
        script = f"return (async () => {{ {frame}; {code} }})()"
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def errors(self):
        log = self.call("POST", "/se/log", {"type": "browser"})
        bad = [line for line in log if line["level"] in ("SEVERE", "WARNING")]
        return [line for line in bad if "readback" not in line["message"]]

    def ink(self, stage, code="true"):
        """Number, width and checksum of the drawn pixels for which code of x, y, r, g, b holds."""
        return self.run(f"""
const canvas = document.querySelectorAll("canvas")[{stage}], {{ width, height }} = canvas
const data = canvas.getContext("2d").getImageData(0, 0, width, height).data
const seen = []
for (let i = 0; i < data.length; i += 4) {{
  const x = i / 4 % width, y = Math.floor(i / 4 / width), [r, g, b] = data.slice(i, i + 3)
  if (data[i + 3] > 200 && ({code})) seen.push([x, y])
}}
const xs = seen.map(([x]) => x), sum = seen.reduce((sum, [x, y]) => sum + x * y % 9973, 0)
return [seen.length, Math.max(...xs) - Math.min(...xs), sum]""")

    def close(self):
        self.call("DELETE", "")  # which ends Chromium
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


CAPTIONS = "return [...document.querySelectorAll('figcaption')].map(text => text.textContent)"
MARKED = """return [words, strip].map(row => [...row.children]
  .filter(word => word.ariaCurrent == "true").map(word => word.textContent).join())"""
COLOURED = "Math.max(r, g, b) - Math.min(r, g, b) > 25"


def test_the_page_plays_pauses_steps_and_shows_the_plan(browser):
    signs = [(2, 0.5), (0, 1.0), (1, 0.01), (2, 0.49)]
    items = [item("GO THE WANT", signs, real_seconds=2.5), item("HELLO", [(0, 2.0)])]
    browser.open(write_page(items, data="/a/long/path/my_signs/"), still=False)
    assert browser.run("return document.title") == "GRU (my_signs), epoch 7, 2026-01-02: test"
    times = {browser.run("return time") for _ in range(10)}
    assert len(times) > 5 and browser.run("return play.textContent") == "Pause"
    browser.run("play.click()")
    held = browser.ink(0)
    time.sleep(0.3)
    assert browser.ink(0) == held and browser.run("return play.textContent") == "Play"
    browser.run("slider.value = 4, slider.oninput()")
    assert browser.run(CAPTIONS)[1] == "generated: 0.16 of 2.00 s, frame 5 of 50"
    assert browser.ink(0) != held

    way = "time = 0; playing = true; draw(before + 80); playing = false; return time"
    for speed, seconds in (("1", 0.08), ("0.25", 0.02), ("2", 0.16)):
        assert browser.run(f"speed.value = {speed}; {way}") == pytest.approx(seconds, abs=1e-3)
    want = "WANT0.99 s"
    for moment, word in ((0.2, want), (1.0, "GO1.00 s"), (1.6, want), (2.2, "")):
        browser.run(f"time = {moment}")
        assert browser.run(MARKED) == [word, word[:-6]]
    shares = "[...strip.children].map(word => word.offsetWidth / strip.offsetWidth)"
    wide = [0.5 / 2.5, 1 / 2.5, 0.49 / 2.5]
    assert browser.run(f"return {shares}") == pytest.approx(wide, abs=0.01)
    third = "words.children[1]"
    assert browser.run(f"return [{third}.innerText, {third}.disabled]") == ["THE\nnot signed", True]
    for click, moment in (("words.children[0]", 0.5), ("words.children[2]", 0)):
        assert browser.run(f"{click}.click(); return time") == pytest.approx(moment)
    browser.run("choice.selectedIndex = 1, choice.onchange()")
    assert browser.run("return words.innerText").startswith("HELLO")


def test_the_views_lay_one_clip_over_the_other_and_enlarge_the_hands(browser):
    items = [item("GO", [(0, 1.5)], 1.5, real_seconds=2.0)]
    pose = signed("", [], 2.0).pose.copy()
    pose[:, 21:42] = math.nan  # the real clip shows no right hand
    items[0]["clips"][0] = final.page_clip("real", pose, 2.0)
    browser.open(write_page(items))
    assert browser.run("return [time, play.textContent]") == [0, "Play"]  # reduced motion
    browser.run("time = 1.8")
    ended = "generated: ended at 1.50 s, frame 38 of 38"
    assert browser.run(CAPTIONS) == ["real: 1.80 of 2.00 s, frame 46 of 50", ended]
    browser.run("time = 0.6")
    orange, blue = "r > 2 * b", "b > 2 * r && b > 1.3 * g"
    assert browser.ink(0, orange)[0] < 20 < 100 < browser.ink(1, orange)[0]
    width = {hand: browser.ink(1, hand)[1] for hand in (orange, blue)}
    for view, hand in ((2, blue), (3, orange)):
        browser.run(f"view.selectedIndex = {view}; view.onchange()")
        assert browser.ink(1, hand)[1] > 3 * width[hand]
    browser.run("view.selectedIndex = 1; view.onchange()")
    one, other = "real: 0.60 of 2.00 s, frame 16 of 50", "generated: 0.60 of 1.50 s, frame 16 of 38"
    assert browser.run(CAPTIONS) == [f"{one}; {other}"]
    assert browser.ink(0, COLOURED)[0] > 1000
    browser.run("item.clips[1].frames.forEach(frame => frame.fill(null))")  # what is left is grey
    assert browser.ink(0)[0] > 1000 and browser.ink(0, COLOURED)[0] < 50


def test_a_phone_gets_no_overflow_and_targets_of_44_pixels_and_dark_mode(browser):
    signs = [(i, 0.125) for i in range(16)]
    items = [item("GO " * 16, signs, real_seconds=2.0, file="1.pose")]
    items += [item("WANT" * 300, [(0, 2.0)])]
    items[0]["cut"] = 984
    log = [{"epoch": 1, "train_mse": 0.1, "val_mse": 0.1, "mean_pose_mse": 0.4}]
    browser.open(write_page(items, log, data="path" * 50), width=390, dark=True)
    for i in (1, 0):
        browser.run(f"show({i})")
        assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [390] * 2
        sizes = browser.run("""
return [...document.querySelectorAll("button, select, input, a")].filter(target => !target.hidden)
  .map(target => Math.min(target.offsetWidth, target.offsetHeight))""")
        assert len(sizes) >= 6 and min(sizes) >= 44
    assert browser.run("return words.lastChild.textContent") == "and 984 more, cut off"
    assert browser.run("return getComputedStyle(document.body).color") == "rgb(255, 255, 255)"
