"""The rows of the ablation still fit the script that they edit."""
import pytest

from bench_ablation import ROWS, with_edits
from helpers import ROOT


@pytest.mark.parametrize("row", ROWS)
def test_a_row_edits_the_script_as_it_is(row):
    source = (ROOT / "train_final_model.py").read_text("utf8")
    script = with_edits(source, row)
    compile(script, row, "exec")
    assert (script == source) == (row == "as shipped")
