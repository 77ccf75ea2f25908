"""Training steps on CUDA without a GPU: a CUDA build of torch has fake tensors.

They know their device and type, but hold no numbers: two devices in one operation are an error, and
so is each wait of the host for the GPU. A Linear stands in for cuDNN's GRU.
"""

import pytest
import torch
from helpers import small
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import train_final_model as script

NO_CUDA = torch.version.cuda is None or torch.__version__ < "2.13"  # 2.5.1 asks for a driver
pytestmark = pytest.mark.skipif(NO_CUDA, reason="needs a CUDA build of a newer torch")
CUDA = torch.device("cuda")


class FakeGRU(nn.Module):
    def __init__(self, inputs, outputs, batch_first):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x):
        assert x.dtype == torch.float32, f"cuDNN's GRU gets {x.dtype}"
        return self.linear(x), None


class FakeClips(list):
    """16 clips, which make two batches, of 10 tokens and 12 frames."""

    glosses = ["HI"]

    def with_tokens(self, tokenizer):
        return self

    def batch(self, numbers, device):
        whole = {"tokens": (8, 10), "n_frames": (8,)}
        whole = {
            x: torch.empty(shape, dtype=torch.long, device=device) for x, shape in whole.items()
        }
        shapes = {"pose": (8, 12, script.POSE_DIM), "seconds": (8,)}
        batch = {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
        return {**whole, **batch, "token_mask": whole["tokens"] > 0}


@pytest.fixture
def fake(monkeypatch):
    """The mode, without what asks a GPU, or cannot be faked."""
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
    # or autocast does nothing
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(nn, "GRU", FakeGRU)
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)  # which is there from the start
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    return FakeTensorMode()


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", script.MODELS)
def test_a_step_is_on_one_device_and_waits_for_nothing(name, mixed, fake, bert, monkeypatch):
    small(MIXED_PRECISION=mixed, BERT_NAME=bert)
    pretrained, tokenizer = script.load_pretrained()

    def backward(loss):
        assert (loss.dtype, loss.device.type) == (torch.float32, "cuda")
        for weight in run.model.parameters():
            weight.grad = torch.empty_like(weight)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with fake, CUDA:
        pretrained = type(pretrained)(pretrained.config)
        monkeypatch.setattr(script, "load_pretrained", lambda: (pretrained, tokenizer))
        run = script.Run(name, {"train": FakeClips(range(16))}, {}, ["<pad>", "<unk>", "HI"], CUDA)
        with script.mixed_precision(CUDA):
            made = nn.Linear(2, 2)(torch.empty(2, 2))
        assert made.dtype == (torch.bfloat16 if mixed else torch.float32)
    schedule = script.new_schedule(run.optimizer, 100, 0)
    with fake, pytest.raises(DataDependentOutputException):
        script.train_one_epoch(run, run.model, schedule, "")
    assert schedule.last_epoch == 2  # it waited after both steps
