"""From a checkpoint to signing: --predict, its .pose files, what it says, the alignment in time."""

import io
import os
import re
import shutil
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import METRICS, WORDS, fork, small, write_checkpoint
from pose_format import Pose

import model_selection as script
import train_final_model as final

LONG = "WANT " * 1000
SENTENCES = ["WANT GO SCHOOL", "hello", "../../x go", "<img src=x onerror=alert(1)>", LONG]
NAMES = ["WANT_GO_SCHOOL", "HELLO", "X_GO", "IMG_SRC_X_ONERROR_ALERT_1", "WANT_" * 24]


def predict(*sentences, model="gru"):
    final.main(["--model", model, "--predict", *sentences])


@pytest.fixture
def predicted(tmp_path, monkeypatch, capsys):
    """-> the model, what was printed, and the .pose files in order; by the checkpoint alone."""
    model = write_checkpoint(tmp_path / "best_gru.pt")
    small(MAX_FRAMES=5, HIDDEN_DIM=2, DATASET="nothing", MAX_GLOSS_LEN=1)  # not the checkpoint's
    for name in ("load_clips", "new_model"):
        monkeypatch.setattr(final, name, None)
    predict(*SENTENCES)
    return model, capsys.readouterr().out, sorted((tmp_path / "predictions").glob("*.pose"))


@torch.no_grad()
def test_a_written_pose_file_holds_the_models_keypoints(predicted):
    model, _, files = predicted
    assert len(files) == len(SENTENCES)
    for sentence, path in zip(SENTENCES, files, strict=True):
        pose = Pose.read(path.read_bytes())
        text = script.tokenize(script.gloss_tokenizer(WORDS), [sentence], 16)
        made = model(text["input_ids"], text["attention_mask"].bool())
        frames = int(model.count_frames(made.seconds))
        header = [(part.name, list(part.points)) for part in pose.header.components]
        assert header == [(part, list(names)) for part, names in script.PARTS.items()]
        for part in pose.header.components:
            assert len(part.limbs) > 5 and len(part.colors) == len(part.limbs)
        n = round(float(made.seconds) * 25)
        assert pose.body.fps == 25 and pose.body.data.shape == (n, 1, 76, 2)
        wanted = made.pose[0, :frames].view(-1, 76, 2).numpy() * final.UNIT + final.ORIGIN
        wanted = script.resample(wanted.astype(np.float32), n)
        seen = np.arange(76) >= 21
        confidence = made.confidence[0, :frames].sigmoid().numpy() * seen
        confidence = script.resample(confidence[..., None], n)[..., 0]
        confidence[confidence < 0.5] = 0  # what is likely not seen is not drawn
        assert abs(pose.body.confidence[:, 0] - confidence).max() < 0.001
        assert abs(pose.body.data.data[:, 0][:, seen] - wanted[:, seen]).max() < 0.5
        assert pose.header.dimensions.width == pose.header.dimensions.height == final.CANVAS


def test_what_was_asked_and_what_is_to_be_known_of_it_are_said(predicted, tmp_path):
    """96 frames of 16 words: other tools expect FPS, and the line says what they were made of."""
    _, out, files = predicted
    first, *lines, last = out.splitlines()
    assert first == "best_gru.pt: trained on none, 2026-01-02, epoch 7"
    assert last == "predictions/index.html plays them"
    for i, (line, name, path) in enumerate(zip(lines, NAMES, files, strict=True), 1):
        assert path.name == f"{i:03}_{name}.pose"
        assert re.match(rf"predictions/{path.name}   \d+\.\d\d s(   |$)", line)
    assert not (tmp_path.parent / "x").exists() and not list(tmp_path.glob("x*"))
    unknown = [re.findall("   unknown: (.*?)(?:   |$)", line) for line in lines]
    assert unknown == [[], [], ["X"], ["IMG SRC=X ONERROR=ALERT(1"], []]
    assert "   cut to 16 glosses" in lines[4]
    found = re.search(r"  ([\d.]+) s   ([\d.]+) of 25 frames", lines[4])
    seconds, rate = map(float, found.groups())
    assert rate == pytest.approx(96 / seconds, abs=0.1) and rate < 15
    pose = Pose.read(files[-1].read_bytes())
    assert pose.body.fps == 25 and len(pose.body.data) == round(25 * seconds)
    assert "frames a second generated" not in lines[0]
    page = (tmp_path / "predictions" / "index.html").read_text("ascii")
    assert "<title>GRU (none), epoch 7, 2026-01-02: new sentences</title>" in page
    assert f"<dt>val_mse<dd>{METRICS['val_mse']:.5f}" in page


def test_a_folder_holds_the_files_of_one_call(tmp_path, capsys):
    write_checkpoint(tmp_path / "best_gru.pt")
    for i, folder in enumerate(("predictions", "predictions-2", "predictions-3")):
        predict("want go")
        lines = capsys.readouterr().out.splitlines()
        files = ["001_WANT_GO.pose", "index.html"]
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == files
        assert lines[-2].startswith(f"{folder}/001_WANT_GO.pose   ")
        assert lines[-1] == f"{folder}/index.html plays them"
        note = f"predictions/ holds the files of another call: these go to {folder}/"
        assert lines[1:-2] == ([note] if i else [])


@pytest.mark.parametrize(
    "text, name",
    [("नमस्ते दुनिया!", "नमस्ते_दुनिया"), ("你好，世界", "你好_世界"), ("Xin chào", "XIN_CHÀO")]
    + [("a/b\0c..", "A_B_C"), ("श्री " * 99, "श्री_" * 9 + "श")],
)
def test_file_names_keep_the_letters_of_any_script(text, name):
    assert final.file_name(" ".join(script.split_glosses(text))) == name


def test_words_that_are_not_signed_and_another_order_are_said(tmp_path, capsys, monkeypatch):
    write_checkpoint(tmp_path / "best_gru.pt")
    planned = [(2, 0.03), (1, 0.03), (0, 0.5), (1, 0.02)]  # SCHOOL lasts less than a frame, of 0.04
    for signs, said in (
        (planned, "   unknown: XYZ   not signed: SCHOOL   order: XYZ WANT XYZ"),
        ([(0, 0.5), (1, 0.5), (2, 0.5)], "   unknown: XYZ"),
    ):
        monkeypatch.setattr(final, "planned_signs", lambda *_, signs=signs: signs)
        predict("want xyz school")
        assert f" s{said}\n" in capsys.readouterr().out


def test_signs_are_planned_by_the_keys_and_pieces_of_a_word_side_by_side_are_one():
    numbers = [None, 0, 0, 1, 2, None]  # [CLS] schoo ##ls go you [SEP]
    keys, durations = [0, 1, 2, 5, 3, 4], [0.25, 0.5, 0.5, 1, 2, 0.25]
    signs = final.planned_signs(numbers, keys, durations)
    assert signs == [(0, 1.25), (2, 2.25), (1, 1)]
    assert final.planned_signs([None, None], [0, 1], [1, 1]) == []


def test_bert_signs_words_that_are_longer_in_lower_case_and_tells_unknown_ones(bert, capsys):
    write_checkpoint("best_bert.pt", "bert", BERT_NAME=bert)
    model, tokenizer, length, _ = final.load_model("best_bert.pt")
    (made,) = final.generate(model, tokenizer, ["\u0130stanbul \u0130zmir go"], length)
    assert sorted(number for number, _ in made.signs) == [0, 1, 2] and made.unknown == {0, 1}
    assert sum(seconds for _, seconds in made.signs) == pytest.approx(made.seconds, rel=1e-5)
    predict("Hello xyzzy schools", model="bert")
    assert "   unknown: xyzzy" in capsys.readouterr().out


def test_sentences_from_stdin_and_those_without_a_word(tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "best_gru.pt")
    monkeypatch.setattr("sys.stdin", io.StringIO("want go\n\n  \n ... \nHELLO\n\u200c\n"))
    predict("-")
    names = ["001_WANT_GO.pose", "002_HELLO.pose", "index.html"]
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == names
    lines = capsys.readouterr().out.splitlines()
    skipped = [f"skipped, since it has no word: {text}" for text in ("' ... '", "'\\u200c'")]
    assert lines[1:3] == skipped and len(lines) == 6
    shutil.rmtree(tmp_path / "predictions")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n \n"))
    for wrong in ([""], ["-"], ["...", "!"]):
        with pytest.raises(SystemExit, match="^error: --predict needs a sentence with a word$"):
            predict(*wrong)
    assert not (tmp_path / "predictions").exists()


def test_more_sentences_than_fit_into_a_batch_are_signed_one_batch_after_the_other(tmp_path):
    model = write_checkpoint(tmp_path / "best_gru.pt")
    signed = []
    model.register_forward_hook(lambda model, given, made: signed.append(len(made.seconds)))
    tokenizer = script.gloss_tokenizer(WORDS)
    made = final.generate(model, tokenizer, ["GO SCHOOL"] * 200, 16)
    next(made)
    assert signed == [64] and len(list(made)) == 199 and signed == [64, 64, 64, 8]


def test_bytes_that_are_no_utf8_are_one_line(tmp_path, monkeypatch):
    """In the C locale stdin's bytes become surrogates, as those of arguments do."""
    write_checkpoint(tmp_path / "best_gru.pt")
    word = os.fsdecode(b"CAF\xe9")
    for argument, errors in ((word, "strict"), ("-", "strict"), ("-", "surrogateescape")):
        stdin = io.TextIOWrapper(io.BytesIO(b"GO CAF\xe9\n"), "utf8", errors)
        monkeypatch.setattr("sys.stdin", stdin)
        code, _, err = fork(partial(predict, argument))
        assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert not Path("predictions").exists()


def alignments(costs, i, j):
    """The costs along every way to align the first i + 1 frames with the first j + 1."""
    if i == j == 0:
        yield [costs[0, 0]]
    for k, m in ((i - 1, j - 1), (i - 1, j), (i, j - 1)):
        if k >= 0 and m >= 0:
            yield from ([*way, costs[i, j]] for way in alignments(costs, k, m))


def test_the_aligned_error_is_that_of_the_best_way_to_align():
    rng = np.random.default_rng(1)
    for n, m in ((1, 1), (1, 5), (5, 1), (4, 4), (5, 3), (6, 6)):
        made, real = rng.normal(size=(n, 3, 2)), rng.normal(size=(m, 3, 2))
        real[rng.random((m, 3)) < 0.3] = np.nan
        real[:, 0] = rng.normal(size=(m, 2))  # in each frame a point is seen
        costs = np.nanmean(np.linalg.norm(made[:, None] - real[None], axis=-1), -1)
        expected = np.mean(min(alignments(costs, n - 1, m - 1), key=sum))
        assert final.aligned_error(made, real) == pytest.approx(expected, rel=1e-5)
        gaps = np.insert(real, m // 2, np.nan, 0)  # a frame that shows nothing
        assert final.aligned_error(made, gaps) == pytest.approx(expected, rel=1e-5)
    still = real[:1].repeat(20, 0).cumsum(0)
    assert final.aligned_error(np.nan_to_num(still).repeat(2, 0), still) == pytest.approx(0)


def test_the_aligned_error_of_long_clips_needs_no_table_of_all_pairs():
    made, real = np.zeros((100, 8, 2), np.float32), np.ones((600, 8, 2), np.float32)
    tracemalloc.start()
    error = final.aligned_error(made, real)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert abs(error - 2**0.5) < 1e-5 and peak < 2**20  # all pairs take 4 MiB
