"""The README's picture: python tests/make_picture.py (5 minutes on a CPU core).

Trains the GRU for EPOCHS epochs on the embedded sample, and draws a strip of frames of a validation
clip, the real one above the generated one, into .github/signing.svg. The clip is the one of the
median error among those of SIGNS signs. Its colours can be read on white and on black.
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
FRAMES = 9  # of each clip
SCALE = 44  # pixels of a shoulder width
CELL = (96, 124)  # pixels of a frame: width and height
MIDDLE = (48, 54)  # pixels: where in it the middle of the shoulders is
LEFT, TOP = 88, 30  # pixels: what is beside and above the frames
TEXT = "#7d8590"  # a grey for white and for black


def path(points, style, closed=False):
    """Points (N, 2) in pixels -> a line through those that are seen."""
    shown = [f"{x:.1f} {y:.1f}" for x, y in points if np.isfinite(x + y)]
    return f'<path d="M{"L".join(shown)}{"Z" if closed else ""}" {style}/>' if shown else ""


def limbs(pose, part):
    """A part's limbs (K, 2) in pixels -> one path of all that are seen."""
    first = script.POINTS.index((part, script.PARTS[part][0]))
    ends = np.array(script.LIMBS[part]) + first
    lines = [pose[pair] for pair in ends if np.isfinite(pose[pair]).all()]
    drawn = "".join(f"M{a[0]:.1f} {a[1]:.1f}L{b[0]:.1f} {b[1]:.1f}" for a, b in lines)
    width = {"POSE_LANDMARKS": 3.5, "FACE_LANDMARKS": 1}.get(part, 1.8)
    colour = "#{:02x}{:02x}{:02x}".format(*script.COLOURS[part])
    return f'<path d="{drawn}" stroke="{colour}" stroke-width="{width}"/>'


def figure(clip, at, since):
    """Frame `at` of a clip (T, K, 2) in pixels, and the way of its wrists since another frame."""
    pose = clip[at]
    body = {name: pose[script.POINTS.index(("POSE_LANDMARKS", name))] for name in script.BODY}
    ears = np.stack([body["LEFT_EAR"], body["RIGHT_EAR"]])
    parts = []
    if np.isfinite(ears).all():
        middle, width = ears.mean(0), np.linalg.norm(ears[0] - ears[1])
        outline = f'rx="{0.55 * width:.1f}" ry="{0.75 * width:.1f}" stroke="{TEXT}"'
        parts.append(f'<ellipse cx="{middle[0]:.1f}" cy="{middle[1]:.1f}" {outline}/>')
        shoulders = np.stack([body["LEFT_SHOULDER"], body["RIGHT_SHOULDER"]])
        neck = [middle + [0, 0.75 * width], shoulders.mean(0)]
        waist = shoulders * [0.75, 1] + np.array([0.25 * neck[1][0], 1.15 * SCALE])
        torso = [shoulders[0], waist[0], waist[1], shoulders[1]]
        parts.append(path(torso, f'stroke="{TEXT}" fill="{TEXT}" fill-opacity=".12"', closed=True))
        parts.append(path(neck, f'stroke="{TEXT}" stroke-width="3.5"'))
    for part, wrist in zip(list(script.PARTS)[:2], script.WRISTS, strict=True):
        colour = "#{:02x}{:02x}{:02x}".format(*script.COLOURS[part])
        trail = f'stroke="{colour}" stroke-width="5" stroke-opacity=".25"'
        parts.append(path(clip[since : at + 1, wrist], trail))
    order = ["FACE_LANDMARKS", "POSE_LANDMARKS", *list(script.PARTS)[:2]]
    return "".join([*parts, *(limbs(pose, part) for part in order)])


def text(x, y, words, style=""):
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{words}</text>'


def row(clip, seconds, top):
    """A clip (T, K, 2) in shoulder widths -> FRAMES of its frames, side by side."""
    chosen = np.linspace(0, len(clip) - 1, FRAMES + 2).round().astype(int)[1:-1]
    parts = []
    for i, (since, at) in enumerate(itertools.pairwise([0, *chosen])):
        left = LEFT + i * CELL[0]
        pixels = clip * SCALE + np.array(MIDDLE)
        time = text(MIDDLE[0], CELL[1] - 4, f"{seconds * at / len(clip):.1f} s")
        drawn = figure(pixels, at, since) + time
        parts.append(f'<g transform="translate({left} {top})">{drawn}</g>')
    return "".join(parts)


def plan(sentence, signs, top):
    """The words of a Generated's signs, each as wide as it lasts."""
    words = script.split_glosses(sentence)
    whole = sum(seconds for _, seconds in signs)
    parts, left = [], LEFT
    for number, seconds in signs:
        width = FRAMES * CELL[0] * seconds / whole
        box = f'x="{left + 1:.1f}" y="{top}" width="{max(width - 2, 1):.1f}" height="22" rx="4"'
        parts.append(f'<rect {box} fill="{TEXT}" fill-opacity=".2" stroke="none"/>')
        if width > 40:
            parts.append(text(left + width / 2, top + 15, words[number]))
        left += width
    return "".join(parts)


def strip(sentence, real, seconds, made):
    """A sentence, its clip (T, K, 2), its seconds and its Generated -> an SVG."""
    second, below = TOP + CELL[1], TOP + 2 * CELL[1] + 6
    width, height = LEFT + FRAMES * CELL[0] + 8, below + 30
    side = 'style="text-anchor:start;font-weight:600"'
    title = f"{sentence} (sample data, not a sign language)"
    parts = [
        text(8, 18, f"{title}: real above, generated below", side),
        row(real, seconds, TOP),
        row(script.visible(made), made.seconds, second),
        text(8, TOP + CELL[1] / 2, "real", side),
        text(8, second + CELL[1] / 2, "generated", side),
        text(8, below + 15, "its plan", side),
        plan(sentence, made.signs, below),
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
            clips, _ = script.load_clips()
        validation = clips["validation"].with_format("numpy")[:]
        model, tokenizer, length, *_ = script.load_checkpoint("best_gru.pt")
        cpu = next(model.parameters()).device
        made = script.generate(model, tokenizer, list(validation["gloss"]), length, cpu)
        os.chdir(FILE.parents[1])
    return validation, made


def main():
    script.DATASET, script.EPOCHS, script.PATIENCE = "sample", EPOCHS, EPOCHS
    script.check_settings()
    clips, generated = trained()
    real = [pose.reshape(-1, len(script.POINTS), 2) for pose in clips["pose"]]
    errors = {
        i: script.aligned_error(generated[i].pose, real[i])
        for i, gloss in enumerate(clips["gloss"])
        if len(script.split_glosses(gloss)) == SIGNS
    }
    i = sorted(errors, key=errors.get)[len(errors) // 2]
    svg = strip(clips["gloss"][i], real[i], float(clips["seconds"][i]), generated[i])
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(svg, "utf8")
    print(f"{FILE} ({len(svg)} bytes): {clips['gloss'][i]}, DTW-MJE {errors[i]:.4f}")


if __name__ == "__main__":
    main()
