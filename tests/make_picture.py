"""The README's picture: python tests/make_picture.py (5 minutes on a CPU core).

Trains the GRU for EPOCHS epochs on the embedded sample, and draws a strip of frames of a validation
clip, the real one above the generated one, into .github/signing.svg. Of the clips of SIGNS signs in
which both hands move it is the one of the median error. Its colours can be read on white and on
black.
"""

import contextlib
import io
import itertools
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import datasets  # noqa: E402

import train_final_model as script  # noqa: E402

FILE = Path(__file__).parents[1] / ".github" / "signing.svg"
EPOCHS = 24
SIGNS = 3
FRAMES = 8  # of each clip
SCALE = 56  # pixels of a shoulder width
CELL = (108, 176)  # pixels of a frame: width and height
MIDDLE = (54, 68)  # pixels: where in it the middle of the shoulders is
LEFT, TOP = 92, 24  # pixels: what is beside and above the frames
TEXT = "#7d8590"  # a grey for white and for black


def path(points, style, closed=False):
    """Points (N, 2) in pixels -> a line through those that are seen."""
    shown = [f"{x:.1f} {y:.1f}" for x, y in points if np.isfinite(x + y)]
    return f'<path d="M{"L".join(shown)}{"Z" if closed else ""}" {style}/>' if shown else ""


def colour_of(part):
    return "#{:02x}{:02x}{:02x}".format(*script.COLOURS[list(script.PARTS).index(part)])


def limbs(pose, part):
    """A part's limbs, of a pose (K, 2) in pixels -> one path of all that are seen."""
    first = script.POINTS.index((part, script.PARTS[part][0]))
    lines = [np.array(line) + first for line in script.LINES[part]]
    pairs = [pair for line in lines for pair in zip(line, line[1:], strict=False)]
    if part == "POSE_LANDMARKS":
        pairs = [pair for pair in pairs if min(pair) >= script.SHOULDERS[0]]  # the head is below
    drawn = ""
    for start, end in (pose[list(pair)] for pair in pairs):
        if np.isfinite(start + end).all():
            drawn += f"M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}"
    width = {"POSE_LANDMARKS": 5, "FACE_LANDMARKS": 1.3}.get(part, 2)
    return f'<path d="{drawn}" stroke="{colour_of(part)}" stroke-width="{width}"/>'


def person(pose):
    """Head and torso, of a pose (K, 2) in pixels, where ears, nose and shoulders are seen."""
    at = {name: pose[script.POINTS.index(("POSE_LANDMARKS", name))] for name in script.BODY}
    nose, left, right = at["NOSE"], at["LEFT_SHOULDER"], at["RIGHT_SHOULDER"]
    width = np.linalg.norm(at["LEFT_EAR"] - at["RIGHT_EAR"])
    if not np.isfinite([*nose, *left, *right, width]).all():
        return ""
    middle = (left + right) / 2
    side, down = (left - right) / 2, np.array([0.0, SCALE])
    chin = nose + [0, 0.74 * width]
    bust = [chin + 0.2 * side, middle - 0.1 * down + 0.3 * side, left]
    bust += [middle + 0.75 * side + 1.2 * down, middle - 0.75 * side + 1.2 * down, right]
    bust += [middle - 0.1 * down - 0.3 * side, chin - 0.2 * side]
    style = f'stroke="{TEXT}" fill="{TEXT}" fill-opacity=".15"'
    size = f'rx="{0.55 * width:.1f}" ry="{0.78 * width:.1f}"'
    head = f'<ellipse cx="{nose[0]:.1f}" cy="{nose[1]:.1f}" {size} {style}/>'
    return path(bust, style, closed=True) + head


def figure(clip, at, since):
    """Frame `at` of a clip (T, K, 2) in pixels, and the way of its wrists since another frame."""
    pose, hands = clip[at], list(script.PARTS)[:2]
    parts = [person(pose), limbs(pose, "FACE_LANDMARKS"), limbs(pose, "POSE_LANDMARKS")]
    for part, wrist in zip(hands, script.WRISTS, strict=True):
        trail = f'stroke="{colour_of(part)}" stroke-width="5" stroke-opacity=".3"'
        parts += [path(clip[since : at + 1, wrist], trail), limbs(pose, part)]
    return "".join(parts)


def text(x, y, words, style=""):
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{words}</text>'


def row(clip, seconds, top):
    """A clip (T, K, 2) in shoulder widths -> FRAMES of its frames, side by side."""
    chosen = (len(clip) * (np.arange(FRAMES) + 0.5) / FRAMES).astype(int)
    parts = []
    for i, (since, at) in enumerate(itertools.pairwise([0, *chosen])):
        left = LEFT + i * CELL[0]
        pixels = clip * SCALE + np.array(MIDDLE)
        time = text(MIDDLE[0], CELL[1] - 4, f"{seconds * at / len(clip):.1f} s")
        drawn = figure(pixels, at, since) + time
        parts.append(f'<g transform="translate({left} {top})">{drawn}</g>')
    return "".join(parts)


def plan(made, top):
    """The words of a Generated's signs, each as wide as it lasts."""
    whole = sum(seconds for _, seconds in made.signs)
    parts, left = [], LEFT
    for number, seconds in made.signs:
        width = FRAMES * CELL[0] * seconds / whole
        box = f'x="{left + 1:.1f}" y="{top}" width="{max(width - 2, 1):.1f}" height="22" rx="4"'
        parts.append(f'<rect {box} fill="{TEXT}" fill-opacity=".2" stroke="none"/>')
        if width > 40:
            parts.append(text(left + width / 2, top + 15, made.words[number]))
        left += width
    return "".join(parts)


def strip(real, seconds, made):
    """A clip (T, K, 2), its seconds and the Generated of its sentence -> an SVG."""
    second, below = TOP + CELL[1], TOP + 2 * CELL[1] + 6
    width, height = LEFT + FRAMES * CELL[0] + 8, below + 30
    side = 'style="text-anchor:start;font-weight:600"'
    title = f"{' '.join(made.words)} (sample data: made-up signs)"
    parts = [
        text(8, 18, title, side),
        row(real, seconds, TOP),
        row(np.where(made.confidence[..., None] >= 0.5, made.pose, np.nan), made.seconds, second),
        text(8, TOP + CELL[1] / 2, "real", side),
        text(8, second + CELL[1] / 2, "generated", side),
        text(8, below + 15, "its plan", side),
        plan(made, below),
    ]
    shape = 'fill="none" stroke-linecap="round" stroke-linejoin="round"'
    style = f"text{{font:13px system-ui,sans-serif;fill:{TEXT};text-anchor:middle}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {shape}>'
        f"<title>{title}</title><style>{style}</style>{''.join(parts)}</svg>\n"
    )


def trained():
    """A short training in a folder of its own -> validation clips, and a Generated of each."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            script.main(["--model", "gru"])
            clips = script.load_clips()[0]["validation"]
        model, tokenizer, length, _ = script.load_model("best_gru.pt")
        made = list(script.generate(model, tokenizer, clips.glosses, length))
        clips.frames = clips.frames.clone()  # out of the folder that ends here
        os.chdir(FILE.parents[1])
    return clips, made


def main():
    script.DATASET, script.EPOCHS, script.PATIENCE = "sample", EPOCHS, EPOCHS
    clips, generated = trained()
    errors = {}
    for i, made in enumerate(generated):
        real = script.pose_of(clips, i)
        ways = np.abs(np.diff(real[:, script.WRISTS], axis=0)).sum(0).max(-1)  # shoulder widths
        if len(made.words) == SIGNS and ways.min() > 1:
            errors[i] = script.aligned_error(made.pose, real)
    i = sorted(errors, key=errors.get)[len(errors) // 2]
    svg = strip(script.pose_of(clips, i), clips.seconds[i].item(), generated[i])
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(svg, "utf8")
    print(f"{FILE} ({len(svg)} bytes): {clips.glosses[i]}, DTW-MJE {errors[i]:.4f}")


if __name__ == "__main__":
    main()
