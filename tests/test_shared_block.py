"""The shared block: the same bytes in both scripts, closed, and all that a script needs."""

import ast
import builtins
import os
import re
import subprocess
import symtable
import sys

from helpers import ROOT, settings_of

NAMES = ("model_selection.py", "train_final_model.py")
FIRST, SECOND = ((ROOT / name).read_text("utf8") for name in NAMES)


def divide(source):
    """A script -> what is above its shared block, the block, and what is below."""
    parts = re.split(r"^#.*SHARED BLOCK.*\n", source, flags=re.M)
    assert len(parts) == 3 and source.count("SHARED BLOCK") == 2, "not one pair of sentinel lines"
    return parts


def imports(source):
    """-> {(module, its name or that of what is imported from it)}"""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            found |= {(module or alias.name, alias.asname or alias.name) for alias in node.names}
    return found


def used(table):
    """The global names that are read in a scope or in one within it."""
    names = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (table.get_type() == "module" or symbol.is_global())
    }
    return names.union(*map(used, table.get_children()))


def test_the_block_is_the_same_and_reads_nothing_that_one_script_alone_has():
    block, other = divide(FIRST)[1], divide(SECOND)[1]
    assert block == other
    table = symtable.symtable(block, "block", "exec")
    known = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}
    known |= {name for _, name in imports(FIRST) & imports(SECOND)} | {*dir(builtins)}
    known |= set(settings_of(FIRST)) & set(settings_of(SECOND))
    assert not used(table) - known


def test_a_script_imports_no_module_of_this_project():
    own = {path.stem for path in ROOT.iterdir()}
    assert not {module.split(".")[0] for module, _ in imports(FIRST) | imports(SECOND)} & own


def test_importing_the_scripts_prints_and_creates_nothing(tmp_path):
    program = "import model_selection, train_final_model"
    (tmp_path / "work").mkdir()
    home = {name: str(tmp_path) for name in ("HOME", "HF_HOME", "HF_DATASETS_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "work",
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **home},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
