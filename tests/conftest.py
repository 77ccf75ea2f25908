"""Keeps the tests off the network, off the user's caches and off most of the machine's cores.

The hub's address is a server on this machine (hub.py), so that its client runs as it is.
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from hub import Hub

HOME = tempfile.TemporaryDirectory(prefix="gloss-to-pose-tests-")
HUB = Hub()

for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
    os.environ.pop(name, None)
os.environ.update(
    HF_HOME=HOME.name,
    HF_DATASETS_CACHE=f"{HOME.name}/datasets",
    HF_ENDPOINT=HUB.url,
    CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    PYTHONDONTWRITEBYTECODE="1",
)
sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets  # noqa: E402 (it reads the variables when it is imported)
import huggingface_hub  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import set_in_both, write_bert  # noqa: E402

TEST_SECONDS = 300  # no test takes nearly so long

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
datasets.disable_progress_bars()


def stop_a_test_that_hangs(number, frame):
    raise TimeoutError(f"a test took longer than {TEST_SECONDS} s")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Every test has an empty cache and a folder of its own, and gives the settings back."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    signal.signal(signal.SIGALRM, stop_a_test_that_hangs)
    signal.alarm(TEST_SECONDS)
    yield
    signal.alarm(0)
    set_in_both({})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub, empty, and its token; pauses between tries are 20 times shorter."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 20))
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsTheSecretToken")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", tmp_path / "modules")
    huggingface_hub.HfFileSystem.clear_instance_cache()
    HUB.reset("Exploration-Lab/iSign", {"hf_thisIsTheSecretToken": None})
    return HUB


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))
