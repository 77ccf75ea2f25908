"""The shared block: the same bytes in both scripts, complete, and closed.

Of what surrounds it it reads the settings that both scripts have, and what both import.
"""

import ast
import builtins
import os
import re
import subprocess
import symtable
import sys

import pytest
from helpers import ROOT, edited, settings_of

SCRIPTS = ["model_selection.py", "train_final_model.py"]
FIRST, SECOND = ((ROOT / name).read_text("utf8") for name in SCRIPTS)
EXPECTED = """check_settings save claim_folder split_words split_glosses video_of draw_videos
    load_tables list_rows choose_rows sample_rows PoseRows PoseFiles read_keypoints
    row_keypoints resample prepare_pose ClipStore prepare load_clips Clips training_statistics
    tokenize TwoWayGRU GRUEncoder TransformerEncoder PretrainedEncoder GRUDecoder TransformerDecoder
    Plan PoseModel MODELS new_model masked_mean pose_loss speed_loss duration_loss confidence_loss
    training_loss evaluate Run train_one_epoch run_epoch train_epochs run_script"""


def divide(source):
    """A script -> what is above its shared block, the block, and what is below."""
    parts = re.split(r"^#.*SHARED BLOCK.*\n", source, flags=re.M)
    assert len(parts) == 3 and source.count("SHARED BLOCK") == 2, "not one pair of sentinel lines"
    return parts


def imports(source):
    """The names that a script imports at its top level, each with where it is from."""
    nodes = [
        node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    return {
        (alias.asname or alias.name.split(".")[0], getattr(node, "module", None), alias.name)
        for node in nodes
        for alias in node.names
    }


def assigned(block):
    table = symtable.symtable(block, "block", "exec")
    return {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}


def used(table):
    """The global names that are read in a scope or in one within it."""
    top = table.get_type() == "module"
    names = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (top or symbol.is_global())
    }
    return names.union(*map(used, table.get_children()))


def check(first, second):
    block, other = divide(first)[1], divide(second)[1]
    assert block == other, "the blocks differ"
    own = assigned(block)
    missing = {*EXPECTED.split()} - own
    assert not missing, f"missing: {missing}"
    settings = set(settings_of(first)) & set(settings_of(second))
    common = {name for name, *_ in imports(divide(first)[0]) & imports(divide(second)[0])}
    known = own | common | settings | set(dir(builtins)) - {"globals", "vars", "eval", "exec"}
    assert used(symtable.symtable(block, "block", "exec")) <= known, (
        "the block reads a name from outside"
    )


def test_the_shared_block():
    check(FIRST, SECOND)


def test_both_scripts_have_the_same_data_settings_in_the_same_order():
    first, second = (ast.parse(source).body for source in (divide(FIRST)[0], divide(SECOND)[0]))
    values = [
        [ast.unparse(node) for node in body if isinstance(node, ast.Assign)][:10]
        for body in (first, second)
    ]
    assert values[0] == values[1] and values[0][-1] == "MIN_GLOSS_COUNT = 2"


def in_both(old, new):
    def change(first, second):
        assert first.count(old) == second.count(old) == 1
        return first.replace(old, new), second.replace(old, new)

    return change


LOSS = "def training_loss(model, batch):"


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda first, second: (first, second.replace(LOSS, LOSS + " ")), "differ"),
        (in_both(LOSS, LOSS + "\n    CANDIDATES"), "from outside"),
        (in_both(LOSS, LOSS + "\n    [CANDIDATES for _ in ()]"), "from outside"),
        (in_both(LOSS, LOSS.replace("batch)", "batch=CANDIDATES)")), "from outside"),
        (
            in_both(LOSS, LOSS + "\n    html"),
            "from outside",
        ),  # which one script alone imports
        (in_both(LOSS, LOSS + "\n    globals()"), "from outside"),
        (in_both(LOSS, "class Extra:\n    fps = CANDIDATES\n\n\n" + LOSS), "from outside"),
        (in_both("def resample(", "def resampled("), "missing: {'resample'}"),
        (
            lambda first, second: (
                first.replace("import math\n", "import cmath as math\n"),
                second,
            ),
            "from outside",
        ),
        (
            lambda first, second: (first + "# SHARED BLOCK\n", second + "# SHARED BLOCK\n"),
            "one pair",
        ),
    ],
)
def test_the_check_of_the_shared_block_finds(change, reason):
    with pytest.raises(AssertionError, match=reason):
        check(*change(FIRST, SECOND))


@pytest.mark.parametrize("source", [FIRST, SECOND], ids=SCRIPTS)
def test_a_script_stands_alone(source):
    local = {path.stem for path in ROOT.glob("*.py")} | {
        path.name for path in ROOT.iterdir() if path.is_dir()
    }
    nodes = [*ast.walk(ast.parse(source))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {
        "." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)
    }
    assert not {module.split(".")[0] for module in modules} & (local | {""})
    head = source[: source.index("SHARED BLOCK")]
    assert (
        re.search(r"^[A-Z_]+ = ", head, re.M) and edited(source, MAX_FRAMES=7, LR_GRU=0.5) != source
    )


def test_importing_the_scripts_prints_and_creates_nothing(tmp_path):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "import model_selection, train_final_model"],
        cwd=work,
        capture_output=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HOME": str(home),
            "HF_HOME": str(home),
            "HF_DATASETS_CACHE": str(home / "datasets"),
        },
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not [*work.iterdir()] and not [path for path in home.rglob("*") if path.is_file()]
