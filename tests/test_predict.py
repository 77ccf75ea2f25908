"""From a checkpoint to signing: --predict, its .pose files, and what it says."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import METRICS, ROOT, WORDS, small, write_bert, write_checkpoint
from pose_format import Pose

import model_selection as script
import train_final_model as final

SENTENCES = [
    "WANT GO SCHOOL",
    "hello",
    "../../x go",
    "<img src=x onerror=alert(1)>",
    "Want, want; GO!",
    "WANT " * 1000,
]


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
    for sentence, path in zip(SENTENCES, files, strict=True):
        pose = Pose.read(path.read_bytes())
        tokenizer = script.gloss_tokenizer(WORDS)
        text = script.tokenize(tokenizer, [sentence], 16)
        made = model(text["input_ids"], text["attention_mask"].bool())
        n = int(model.frames(made.seconds))
        header = [(part.name, list(part.points)) for part in pose.header.components]
        assert header == [(part, list(names)) for part, names in script.PARTS.items()]
        assert all(
            len(part.limbs) > 5 and len(part.colors) == len(part.limbs)
            for part in pose.header.components
        )
        assert pose.body.data.shape == (n, 1, 76, 2)
        expected = made.pose[0, :n].view(n, 76, 2).numpy() * final.UNIT + final.ORIGIN
        seen = np.arange(76) >= 21
        confidence = made.confidence[0, :n].sigmoid().numpy() * seen
        assert abs(pose.body.confidence[:, 0] - confidence).max() < 0.001
        assert abs(pose.body.data.data[:, 0][:, seen] - expected[:, seen]).max() < 0.5
        assert abs(n / pose.body.fps - float(made.seconds)) < 1 / pose.body.fps
        assert pose.header.dimensions.width == pose.header.dimensions.height == final.CANVAS
    shoulders = pose.body.data.data[:, 0, script.SHOULDERS, 0]
    assert shoulders.shape == (n, 2)


def test_points_that_are_more_likely_not_seen_are_hidden():
    pose = np.ones((1, 3, 2), np.float32)
    made = final.Generated(pose, np.array([[0.49, 0.5, 1]], np.float32), 0.04, [(0, 0.04)])
    assert np.isnan(final.visible(made)).all(-1).tolist() == [[True, False, False]]
    assert (made.pose == 1).all()


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
    page = (tmp_path / "predictions" / "index.html").read_text("ascii")
    assert "<IMG" not in page.upper().replace("\\U003CIMG", "")
    assert not re.search(r"(src|href)\s*=", page.split("<script>")[0])
    assert "http" not in page.replace("\\u003c", "")
    items = json.loads(re.search(r"const { fps, items } = (.*)\n", page)[1])["items"]
    for item, sentence, path in zip(items, SENTENCES, predicted[2], strict=True):
        words = script.split_glosses(sentence)
        assert [word["word"] for word in item["words"]] == words[:16]
        assert item["cut"] == len(words[16:]) and item["file"] == path.name


def test_the_page_says_what_the_checkpoint_is(predicted, tmp_path):
    page = (tmp_path / "predictions" / "index.html").read_text("ascii")
    assert "<title>GRU (none), epoch 7, 2026-01-02: new sentences</title>" in page
    facts = dict(re.findall("<dt>(.*?)<dd>([^<]*)", page))
    assert facts.pop("best_epoch") == "7" and facts.pop("date") == "2026-01-02"
    assert facts.pop("model") == "gru" and facts.pop("data") == "none"
    assert facts == {name: f"{value:.5f}" for name, value in METRICS.items() if name != "epoch"}


def test_a_folder_holds_the_files_of_one_call(tmp_path, capsys):
    write_checkpoint(tmp_path / "best_gru.pt")
    (tmp_path / "predictions").mkdir()  # empty: it is taken
    lines = []
    for _ in range(3):
        final.main(["--model", "gru", "--predict", "want go"])
        lines.append(capsys.readouterr().out.splitlines())
    folders = ["predictions", "predictions-2", "predictions-3"]
    for folder, said in zip(folders, lines, strict=True):
        files = ["001_WANT_GO.pose", "index.html"]
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == files
        assert said[-2].startswith(f"{folder}/001_WANT_GO.pose   ")
        assert said[-1] == f"{folder}/index.html plays them"
    note = "predictions/ holds the files of another call: these go to {}/"
    assert [said[0] for said in lines[1:]] == [note.format(folder) for folder in folders[1:]]
    assert len(lines[0]) == 2


def test_words_that_are_not_signed_are_said(tmp_path, capsys, monkeypatch):
    write_checkpoint(tmp_path / "best_gru.pt")
    planned = [(2, 0.03), (1, 0.03), (0, 0.5), (1, 0.02)]  # SCHOOL lasts less than a frame, of 0.04
    monkeypatch.setattr(final, "planned_signs", lambda *_: planned)
    final.main(["--model", "gru", "--predict", "want xyz school"])
    line = capsys.readouterr().out.splitlines()[0]
    assert line.endswith(" s   unknown: XYZ   not signed: SCHOOL")


def test_bert_signs_words_that_are_longer_in_lower_case_and_those_it_has_no_piece_of(
    tmp_path, capsys
):
    bert = write_bert(tmp_path / "bert")
    model = write_checkpoint(tmp_path / "best_bert.pt", "bert", BERT_NAME=bert)
    _, tokenizer, length = final.load_checkpoint("best_bert.pt")
    sentences = ["\u0130stanbul \u0130zmir go", "\u200b", "go \u200b school"]
    made = list(final.generate(model, tokenizer, sentences, length, torch.device("cpu")))
    assert [sorted(number for number, _ in one.signs) for one in made] == [[0, 1, 2], [], [0, 2]]
    for one in (made[0], made[2]):
        assert sum(seconds for _, seconds in one.signs) == pytest.approx(one.seconds, rel=1e-5)
    final.main(["--model", "bert", "--predict", *sentences])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].endswith("   not signed: \u200b")


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


def test_a_checkpoint_of_other_keypoints_is_said(tmp_path):
    small(POSE_DIM=8)
    statistics = {"mean": torch.zeros(8), "std": torch.ones(8), "seen": torch.ones(8)}
    model, _, built = script.new_model("gru", statistics, WORDS)
    contents = {**built, "data": "none", "date": "2026-01-02", "metrics": METRICS}
    script.save("best_gru.pt", {**contents, "weights": model.state_dict()})
    line = "^error: best_gru.pt is no model of a .pose file's 76 keypoints$"
    with pytest.raises(SystemExit, match=line):
        final.main(["--model", "gru", "--predict", "go"])


def test_what_was_signed_is_not_kept_so_that_a_large_split_fits_into_memory(tmp_path):
    model = write_checkpoint(tmp_path / "best_gru.pt")
    signed = []
    model.register_forward_hook(lambda model, given, made: signed.append(len(made.seconds)))
    tokenizer = script.gloss_tokenizer(WORDS)
    made = final.generate(model, tokenizer, ["GO SCHOOL"] * 200, 16, torch.device("cpu"))
    next(made)
    assert signed == [64]
    assert len(list(made)) == 199 and signed == [64, 64, 64, 8]
