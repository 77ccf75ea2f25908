"""Keeps the tests off the network, off the user's caches and off most of the machine's cores."""

import os
import signal
import sys
import tempfile
from pathlib import Path

HOME = tempfile.TemporaryDirectory(prefix="gloss-to-pose-tests-")
for name in (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_TOKEN",
    "HF_TOKEN_PATH",
    "HF_HUB_CACHE",
):
    os.environ.pop(name, None)
os.environ.update(
    HF_HOME=HOME.name,
    HF_DATASETS_CACHE=f"{HOME.name}/datasets",
    HF_HUB_OFFLINE="1",
    CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    PYTHONDONTWRITEBYTECODE="1",
)
sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets  # noqa: E402 (it reads the variables when it is imported)
import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import SCRIPTS, set_in_both, write_bert  # noqa: E402

TEST_SECONDS = 300  # the longest took 47, beside two trainings

torch.set_num_threads(1)
datasets.disable_progress_bars()


def stop_a_test_that_hangs(number, frame):
    raise TimeoutError(f"a test took longer than {TEST_SECONDS} s")


def pytest_configure(config):
    config.option.maxfail = config.option.maxfail or 10  # where all hang, CI would end unheard


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """A test that hangs fails, and says where, in place of stopping the whole run."""
    signal.signal(signal.SIGALRM, stop_a_test_that_hangs)
    signal.alarm(TEST_SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Every test has an empty cache and a folder of its own, and gives the settings back."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS:
        script.open_poses.cache_clear()
    torch.manual_seed(0)
    yield
    set_in_both({})


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))
