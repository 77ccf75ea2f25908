import math
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

import model_selection as script
import train_final_model as final
from helpers import ROOT, small, write_bert

FRAMES, D = 20, 8  # the last point is never seen
CPU = torch.device("cpu")
VOCABULARY = ["<pad>", "<unk>", "HELLO", "I", "YOU", "WANT", "GO", "SCHOOL"]
SENTENCES, LENGTHS = ["hello", "I want go school you go", "go you"], [5, 20, 11]
names = pytest.mark.parametrize("name", script.MODELS)


def statistics():
    rng, seen = np.random.default_rng(1), np.arange(D) < D - 2
    values = {"mean": rng.normal(size=D) * seen, "deviation": np.where(seen, rng.uniform(0.5, 2, D), 1), "seen": seen,
              "seconds_per_gloss": np.array(0.15)}
    return {key: torch.tensor(value, dtype=torch.float32) for key, value in values.items()}


def build(name, bert, **changes):
    settings = dict(DROPOUT=0.3, POSE_DIM=D, MAX_FRAMES=FRAMES, MAX_GLOSS_LEN=6, BERT_NAME=bert)
    model, tokens, built = script.new_model(name, statistics(), VOCABULARY, small(**{**settings, **changes}))
    for value in model.parameters():  # a layer that begins as the identity would hide what its masks do
        if value.dim() == 2 and not value.any():
            torch.nn.init.xavier_uniform_(value)
    return model.eval(), tokens, built


def clips(sentences=SENTENCES, lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for sentence, length in zip(sentences, lengths):
        pose = np.cumsum(rng.normal(size=(length, D)), 0)
        pose[rng.random((length, D // 2)).repeat(2, 1) < 0.2] = np.nan
        pose[:, -2:] = np.nan
        made.append({"gloss": sentence, "problem": "", "seconds": length / 25, "pose": pose.ravel().astype(np.float32)})
    return made


def loader_of(part, tokens, batch_size, pose_dim=D):
    part = datasets.Dataset.from_list(part, features=script.CLIP)
    settings = small(POSE_DIM=pose_dim, BATCH_SIZE=batch_size)
    return script.make_loaders({"validation": part}, tokens, settings)["validation"]


def loss_of(model, batch, duration_weight, speed_weight=0):
    return script.training_loss(model, batch, small(DURATION_WEIGHT=duration_weight, SPEED_WEIGHT=speed_weight))


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([value.grad.ravel() for value in model.parameters() if value.grad is not None])


# ---- padding and masks

@names
def test_a_padded_batch_has_the_loss_and_the_gradient_of_its_clips_one_by_one(name, bert):
    model, tokens, _ = build(name, bert)
    batch = script.collate(clips(), tokens, D)
    loss, squares, count = loss_of(model, batch, 0.1)
    alone, alone_squares = 0, 0
    for clip in clips():
        one = script.collate([clip], tokens, D)
        with_duration, one_squares, one_count = loss_of(model, one, 0.1)
        of_pose = loss_of(model, one, 0)[0]
        alone += of_pose * one_count / count + (with_duration - of_pose) / len(clips())
        alone_squares += one_squares
    torch.testing.assert_close(squares, alone_squares, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient(model, loss), gradient(model, alone), rtol=1e-3, atol=1e-4)
    assert count == sum(np.isfinite(clip["pose"]).sum() for clip in clips()) and loss > 0


def test_the_loss_is_the_mean_of_the_squares_of_what_was_seen_over_the_variance(bert):
    model, tokens, _ = build("gru", bert)
    batch = script.collate(clips(), tokens, D)
    pose, seconds = model(batch["tokens"], batch["token_mask"], batch["n_frames"])
    pose, seconds = pose.detach().numpy(), seconds.detach().numpy()
    squares = [(mine[:n] - clip["pose"].reshape(n, D)) ** 2 for mine, clip, n in zip(pose, clips(), LENGTHS)]
    variance = (statistics()["deviation"][:-2] ** 2).mean().item()
    late = (np.log(seconds) - np.log(np.array(LENGTHS) / 25)) ** 2
    expected = np.nanmean(np.concatenate(squares)) / variance + 0.1 * late.mean()
    assert loss_of(model, batch, 0.1)[0].item() == pytest.approx(expected, rel=1e-4)


def test_the_speed_loss_is_the_relative_squared_error_of_the_speeds(bert):
    model, tokens, _ = build("gru", bert)
    batch = script.collate(clips(), tokens, D)
    pose = model(batch["tokens"], batch["token_mask"], batch["n_frames"])[0].detach().numpy()
    late = squares = 0
    for mine, clip, n in zip(pose, clips(), LENGTHS):
        real = clip["pose"].reshape(n, D // 2, 2)
        speed = [np.linalg.norm(np.diff(x.reshape(n, D // 2, 2), axis=0), axis=-1) for x in (mine[:n], real)]
        late += np.nansum((speed[0] - speed[1]) ** 2)
        squares += np.nansum(speed[1] ** 2)
    with_speed, without = (loss_of(model, batch, 0, weight)[0].item() for weight in (0.5, 0))
    assert with_speed - without == pytest.approx(0.5 * late / squares, rel=1e-3)
    ones, counts = [script.collate([clip], tokens, D) for clip in clips()], []
    for one in ones:  # the longest clip has no padding, the others have none by themselves
        counts.append(script.speeds(one["pose"]).square().nansum())
    alone = [loss_of(model, one, 0, 0.5)[0] - loss_of(model, one, 0)[0] for one in ones]
    together = sum(loss * count for loss, count in zip(alone, counts)) / sum(counts)
    assert with_speed - without == pytest.approx(together.item(), rel=1e-3)
    still = [{**clips()[0], "pose": np.zeros(5 * D, np.float32)}]
    loss, *_ = loss_of(model, script.collate(still, tokens, D), 0.1, 0.5)
    assert loss.isfinite() and gradient(model, loss).isfinite().all()


@pytest.mark.parametrize("name", ["gru", "transformer"])
def test_word_dropout_makes_some_glosses_unknown_in_training_alone(name, bert, monkeypatch):
    model, tokens, _ = build(name, bert, WORD_DROPOUT=0.3)
    seen, embedding = [], model.embedding.forward
    monkeypatch.setattr(model.embedding, "forward", lambda tokens: seen.append(tokens) or embedding(tokens))
    token_ids, mask = tokens(["hello i you want go school", "go"] * 200)
    model.eval().encode(token_ids, mask)
    assert torch.equal(seen[0], token_ids)
    model.train().encode(token_ids, mask)
    changed = seen[1] != token_ids
    assert (seen[1][changed] == script.UNK).all() and not changed[~mask].any()
    assert 0.25 < changed[mask].float().mean() < 0.35


@names
def test_what_was_never_seen_gives_no_nan(name, bert):
    model, tokens, _ = build(name, bert)
    unseen = {**clips()[0], "pose": np.full(3 * D, np.nan, np.float32)}
    for batch in (script.collate(clips(), tokens, D), script.collate([unseen, clips()[0]], tokens, D),
                  script.collate([unseen], tokens, D)):
        loss, *_ = loss_of(model, batch, 0.1, 0.2)
        assert loss.isfinite() and gradient(model, loss).isfinite().all()
    metrics = script.evaluate(model, loader_of([*clips(), unseen], tokens, 3), CPU)
    assert all(map(math.isfinite, metrics.values()))


@names
@torch.no_grad()
def test_shapes_and_independence_from_padding(name, bert):
    model, tokens, _ = build(name, bert)
    token_ids, mask = tokens(SENTENCES)
    n_frames = torch.tensor(LENGTHS)
    wider = torch.nn.functional.pad(token_ids, (0, 3)), torch.nn.functional.pad(mask, (0, 3))
    garbage = torch.where(wider[1], wider[0], 4)
    pose, seconds = model(token_ids, mask, n_frames)
    assert pose.shape == (3, FRAMES, D) and seconds.shape == (3,) and (seconds > 0).all()
    torch.testing.assert_close(model(garbage, wider[1], n_frames), (pose, seconds), rtol=1e-4, atol=1e-4)
    for i, n in enumerate(LENGTHS):
        assert (pose[i, n:] == 0).all() and (pose[i, :n, :-2] != 0).all()
        own, own_mask = tokens(SENTENCES[i:i + 1])
        alone, its_seconds = model(own, own_mask, torch.tensor([n]))
        torch.testing.assert_close(alone[0], pose[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(its_seconds[0], seconds[i], rtol=1e-4, atol=1e-4)


@names
@torch.no_grad()
def test_without_n_frames_the_predicted_duration_counts(name, bert):
    model, tokens, _ = build(name, bert)
    token_ids, mask = tokens(SENTENCES)
    for seconds_per_gloss in (0.001, 0.07, 9):  # at least one frame, at most FRAMES
        model.seconds_per_gloss.fill_(seconds_per_gloss)
        pose, seconds = model(token_ids, mask)
        n_frames = (seconds * 25).round().long().clamp(1, FRAMES)
        assert (pose[..., 0] != 0).sum(1).tolist() == n_frames.tolist()
        torch.testing.assert_close(model(token_ids, mask, n_frames)[0], pose)
    assert (n_frames == FRAMES).all()


@names
@torch.no_grad()
def test_durations_are_positive_and_sum_to_the_seconds(name, bert, monkeypatch):
    model, tokens, _ = build(name, bert)
    seen, place = [], model.place
    monkeypatch.setattr(model, "place", lambda states, mask, durations, *rest: seen.append(durations) or
                        place(states, mask, durations, *rest), raising=False)
    token_ids, mask = tokens(SENTENCES)
    _, seconds = model(token_ids, mask)
    assert (seen[0][mask] > 0).all() and (seen[0][~mask] == 0).all()
    torch.testing.assert_close(seen[0].sum(1) * 0.15, seconds)


@names
def test_frames_read_the_glosses_in_their_order(name, bert, monkeypatch):
    """With even durations and no context, the first frames depend on the first gloss, the last on the last."""
    model, tokens, _ = build(name, bert)
    token_ids, mask = tokens(["hello", "I want go school"])
    states = model.encode(token_ids, mask).detach().requires_grad_()
    monkeypatch.setattr(model, "encode", lambda *_: states, raising=False)
    monkeypatch.setattr(model, "decode", lambda queries, *_: queries, raising=False)
    torch.nn.init.zeros_(model.duration[-1].weight)
    pose, _ = model(token_ids, mask, torch.tensor([6, 20]))
    n = int(mask[1].sum())
    read = [torch.autograd.grad(pose[1, t].square().sum(), states, retain_graph=True)[0][1].norm(dim=-1).argmax().item()
            for t in range(20)]
    assert read == sorted(read) and set(read) == set(range(n))
    assert all(19 / n <= (np.array(read) == s).sum() + 1 for s in range(n))


@names
@torch.no_grad()
def test_the_order_of_the_glosses_matters(name, bert):
    model, tokens, _ = build(name, bert)
    (one, _), (other, _) = (model(*tokens([text]), torch.tensor([12])) for text in ("go you", "you go"))
    assert (one - other).abs().max() > 1e-3


@torch.no_grad()
def test_two_way_gru_begins_its_way_back_at_the_last_real_element():
    gru, x = script.TwoWayGRU(3, 8), torch.randn(2, 6, 3)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    torch.testing.assert_close(gru(x, mask)[0, :4], gru(x[:1, :4], mask[:1, :4])[0])
    changed = x.clone()
    changed[0, 3] += 1
    assert ((gru(changed, mask) - gru(x, mask))[0, :4, 4:].abs().amax(-1) > 1e-5).all()  # it reaches the first


def test_bert_takes_the_weights_of_its_folder(bert):
    import transformers
    own = transformers.AutoModel.from_pretrained(bert).state_dict()
    model, tokens, _ = build("bert", bert)
    loaded = {key: value for key, value in model.pretrained.state_dict().items() if "pooler" not in key}
    assert len(loaded) > 30 and all(torch.equal(value, own[key]) for key, value in loaded.items())
    ids, mask = tokens(["Hello, schools!"])  # [CLS] hello school ##s [SEP]
    assert ids.tolist() == [[2, 5, 10, 16, 3]] and mask.all()
    groups = script.Trainer(model, 11, small()).optimizer.param_groups
    rate = {id(value): group["initial_lr"] for group in groups for value in group["params"]}
    assert {rate[id(value)] for value in model.pretrained.parameters()} == {2e-5}
    assert {rate[id(value)] for value in model.decoder.parameters()} == {1e-3}
    assert len(rate) == len([*model.parameters()])


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_an_encoder_that_is_stored_in_half_precision_trains_in_full(stored, bert, tmp_path):
    import transformers
    transformers.AutoModel.from_pretrained(bert).to(stored).save_pretrained(tmp_path / "half")
    for file in Path(bert).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "half")
    model, tokens, _ = build("bert", tmp_path / "half")
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert model(*tokens(["hello"]))[0].isfinite().all()


@pytest.mark.parametrize("fault", ["no tokenizer", "too few positions", "another's tokenizer", "cut", "no encoder"])
def test_an_encoder_that_does_not_serve_is_one_line(fault, bert, tmp_path):
    import transformers
    folder = shutil.copytree(bert, tmp_path / "bert")
    if fault == "no tokenizer":
        for file in folder.glob("*token*"):
            file.unlink()
    elif fault == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    else:
        sizes = dict(vocab_size=9 if fault == "another's tokenizer" else 17, hidden_size=16, num_hidden_layers=1,
                     num_attention_heads=2, intermediate_size=16,
                     max_position_embeddings=23 if fault == "too few positions" else 24)
        kind = transformers.BertConfig(**sizes)
        if fault == "no encoder":
            kind = transformers.T5Config(vocab_size=17, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        transformers.AutoModel.from_config(kind).save_pretrained(folder)
    with pytest.raises(SystemExit, match="^error: BERT_NAME .* is no hub id .* folder with an encoder .*$") as error:
        build("bert", str(folder))
    assert "\n" not in str(error.value)


def test_word_pieces_are_cut_where_positions_may_end(bert):
    _, tokens, _ = build("bert", bert)
    ids, mask = tokens(["schools " * 9, "xyzzy " * 3])
    assert ids.shape == mask.shape == (2, 14) and ids[0, -1] == 3  # 6 words: [CLS], 12 pieces, [SEP]
    assert tokens([" ".join(["go.school.go.school.go.school"] * 6)])[0].shape == (1, 24)


# ---- training and metrics

class Fixed(torch.nn.Module):
    """A model that gives known poses, whatever it is asked."""

    def __init__(self, poses, seconds, mean):
        super().__init__()
        self.poses, self.seconds, self.mean = poses, seconds, mean

    def forward(self, tokens, token_mask, n_frames=None):
        chosen = tokens[:, 0]
        return self.poses[chosen], self.seconds[chosen]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_metrics_are_those_of_plain_numpy_at_every_batch_size(batch_size):
    rng, lengths, k = np.random.default_rng(3), [3, 7, 1, 5], 76
    poses, mean = rng.normal(size=(4, 10, 2 * k)), rng.normal(size=2 * k)
    targets = [rng.normal(size=(n, 2 * k)) for n in lengths]
    for target in targets:
        target[rng.random((len(target), k)).repeat(2, 1) < 0.3] = np.nan
        target[:, -2:] = np.nan
    model = Fixed(torch.tensor(poses).float(), torch.tensor([1.0, 2, 3, 4]), torch.tensor(mean).float())
    made = [{"gloss": str(i), "problem": "", "seconds": 2.5, "pose": np.float32(target.ravel())}
            for i, target in enumerate(targets)]
    metrics = script.evaluate(model, loader_of(made, script.Tokens(list("0123"), "", 5), batch_size, 2 * k), CPU)

    difference = np.concatenate([pose[:n] - target for pose, n, target in zip(poses, lengths, targets)])
    assert metrics["val_mse"] == pytest.approx(np.nanmean(difference**2), rel=1e-5)
    assert metrics["val_mae"] == pytest.approx(np.nanmean(abs(difference)), rel=1e-5)
    assert metrics["mean_pose_mse"] == pytest.approx(np.nanmean((np.concatenate(targets) - mean) ** 2), rel=1e-5)
    assert metrics["duration_error"] == pytest.approx(np.mean([1.5, 0.5, 0.5, 1.5]))
    generated = real = 0
    for pose, target, n in zip(poses, targets, lengths):
        for t in range(1, n):
            for point in [*range(42), 51, 52]:  # hands and wrists
                xy = slice(2 * point, 2 * point + 2)
                if np.isfinite(target[t - 1:t + 1, xy]).all():
                    generated += math.dist(pose[t, xy], pose[t - 1, xy])
                    real += math.dist(target[t, xy], target[t - 1, xy])
    assert metrics["motion"] == pytest.approx(generated / real, rel=1e-4)


def table(sentences, lengths):
    return datasets.Dataset.from_list(clips(sentences, lengths), features=script.CLIP)


def train(name, bert, **changes):
    """-> the training MSE of every epoch, the trainer, and loaders {batch size: {split: loader}}."""
    model, tokens, _ = build(name, bert, DROPOUT=0)
    parts = {"train": table(SENTENCES * 4, LENGTHS * 4), "validation": table(SENTENCES, LENGTHS)}
    loaders = {size: script.make_loaders(parts, tokens, small(POSE_DIM=D, BATCH_SIZE=size)) for size in (1, 4)}
    trainer = script.Trainer(model, 36, small(**{"AVERAGE": 0.5, **changes}))
    return [trainer.train(loaders[4]["train"], epoch, "epoch") for epoch in range(12)], trainer, loaders


@names
def test_training_lowers_the_loss_and_evaluation_does_not_depend_on_the_batch_size(name, bert):
    losses, trainer, loaders = train(name, bert, LR_GRU=0.02, LR_TRANSFORMER=0.02, LR_BERT=0.02)
    assert losses[-1] < 0.9 * losses[0]
    one, four = (script.evaluate(trainer.averaged, loaders[size]["validation"], CPU) for size in (1, 4))
    assert one == pytest.approx(four, rel=1e-4)


@names
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_learns_alike_and_steps_that_the_scaler_skips_are_no_stop(name, precision, bert):
    settings, mse = small(POSE_DIM=D, BATCH_SIZE=2, EPOCHS=2, DROPOUT=0.0, WORD_DROPOUT=0.0), {}
    for kind in (torch.float32, precision):
        torch.manual_seed(0)
        model, tokens, _ = build(name, bert, DROPOUT=0.0)
        part = datasets.Dataset.from_list(clips() * 20, features=script.CLIP)
        loaders = script.make_loaders({"train": part, "validation": part}, tokens, settings)
        trainer = script.Trainer(model, 2 * len(loaders["train"]), settings, kind)
        scale, overflows = trainer.scaler.get_scale(), iter([math.inf] * 3)
        if kind != torch.float32:  # the first steps overflow
            model.output.bias.register_hook(lambda gradient: gradient * next(overflows, 1))
        log = [trainer.epoch(loaders, number) for number in (1, 2)]
        mse[kind] = log[-1]["val_mse"]
        assert all(math.isfinite(line["train_mse"]) for line in log) and mse[kind] < 0.9 * log[0]["mean_pose_mse"]
        assert trainer.scaler.is_enabled() == (kind != torch.float32)
    assert trainer.scaler.get_scale() <= scale / 8
    assert mse[precision] == pytest.approx(mse[torch.float32], rel=0.1)


@pytest.mark.parametrize("limit", [0, 1e-9, 1e9])
def test_the_gradient_is_clipped_and_0_is_no_limit(limit, bert, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def seen(optimizer, *arguments, **changes):
        values = [value for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
        norms.append(torch.nn.utils.get_total_norm([value.grad for value in values]).item())
        return step(optimizer, *arguments, **changes)
    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    train("gru", bert, GRAD_CLIP=limit)
    assert max(norms) <= 1.001e-9 if limit == 1e-9 else min(norms) > 0.01


def test_under_mixed_precision_gradients_are_clipped_at_their_real_size_and_layers_compute_in_half(bert, monkeypatch):
    norms, kinds, clip = [], set(), torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *x: norms.append(clip(*x).item()))
    for precision in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model, tokens, _ = build("gru", bert, DROPOUT=0.0)
        model.duration[0].register_forward_hook(lambda layer, x, y: kinds.add(y.dtype))
        part = datasets.Dataset.from_list(clips(), features=script.CLIP)
        loader = script.make_loaders({"train": part}, tokens, small(POSE_DIM=D, BATCH_SIZE=3))["train"]
        script.Trainer(model, 1, small(), precision).train(loader, 1, "")
        assert kinds == ({precision} if precision == torch.float32 else {torch.float32, precision})
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


@names
def test_dropout_is_at_work_in_training_alone(name, bert):
    model, tokens, _ = build(name, bert, DROPOUT=0.5, WORD_DROPOUT=0.0)
    batch = tokens(SENTENCES)
    assert torch.equal(model(*batch)[0], model(*batch)[0])
    model.train()
    if name == "bert":
        model.pretrained.eval()
    once, again = (model.decode(*(torch.ones(2, 5, model.output.in_features), torch.ones(2, 5, dtype=torch.bool),
                                  torch.ones(2, 3, model.output.in_features), torch.ones(2, 3, dtype=torch.bool)))
                   for _ in range(2))
    assert torch.equal(once, again) == (name != "transformer")  # the GRU's is before and behind its decoder
    once, again = (model(*batch, torch.tensor([9, 9, 9]))[0] for _ in range(2))
    changed = (once != again)[:, :9, :-2].float().mean()
    assert changed > 0.9


def test_the_average_is_laid_out_for_cudnn(monkeypatch):
    """Without a GPU all that can be seen is that PyTorch is asked to, which it is not when a model is copied."""
    laid_out = set()
    monkeypatch.setattr(torch.nn.GRU, "flatten_parameters", lambda gru: laid_out.add(gru))
    trainer = script.Trainer(build("gru", None)[0], 1, small())
    grus = {module for module in trainer.averaged.modules() if isinstance(module, torch.nn.GRU)}
    assert len(grus) == 4 and grus <= laid_out


@pytest.mark.parametrize("average", [0, 0.999])
def test_what_is_evaluated_and_saved_is_the_average_of_the_weights(average):
    _, trainer, _ = train("gru", None, AVERAGE=average)
    apart = sum((a - b).norm() for a, b in zip(trainer.averaged.parameters(), trainer.model.parameters()))
    assert (apart == 0) == (average == 0) and apart < 1
    assert not any(value.requires_grad for value in trainer.averaged.parameters())


def test_a_loss_that_is_not_finite_is_one_line(monkeypatch):
    monkeypatch.setattr(script, "training_loss", lambda model, batch, weight: (
        model.output.weight.sum() * math.inf, torch.tensor(math.inf), torch.tensor(1)))
    with pytest.raises(SystemExit, match="^error: .+$"):
        train("gru", None)


@pytest.mark.parametrize("steps, warmup", [(20, 0.05), (10, 0.1), (40, 0.05), (7, 0.3), (2, 0.5), (1, 0.05)])
def test_the_rate_rises_and_falls_to_0(steps, warmup):
    trainer, rates = script.Trainer(build("gru", None)[0], steps, small(WARMUP=warmup)), []
    for _ in range(steps):
        rates.append(trainer.schedule.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.schedule.step()
    top = rates.index(max(rates))
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True) and 0 < max(rates) <= 1e-3
    assert steps < 10 or max(rates) > 9e-4 and rates[-1] < 1e-4


def test_the_order_of_training_depends_on_the_seed_and_the_epoch_alone(monkeypatch):
    parts = {"train": table(["hello"] * 30, range(1, 31)), "validation": table(["hello"] * 5, range(1, 6))}

    def order(split, seed, epoch):
        loader = script.make_loaders(parts, script.Tokens(VOCABULARY, "", 6), small(POSE_DIM=D, SEED=seed))[split]
        loader.sampler.set_epoch(epoch)
        torch.rand(seed + epoch)
        return [n for batch in loader for n in batch["n_frames"].tolist()]

    assert order("train", 0, 1) == order("train", 0, 1) and sorted(order("train", 0, 1)) == list(range(1, 31))
    assert order("train", 0, 1) != order("train", 0, 2) and order("train", 0, 1) != order("train", 1, 1)
    assert order("validation", 0, 1) == order("validation", 3, 4) == [1, 2, 3, 4, 5]
    seen, training_loss = [], script.training_loss
    monkeypatch.setattr(script, "training_loss", lambda model, batch, weight: seen.extend(batch["n_frames"].tolist()) or
                        training_loss(model, batch, weight))
    train("gru", None)
    assert seen[:12] != seen[12:24] and sorted(seen[:12]) == sorted(seen[12:24])


def test_what_is_dropped_differs_by_process_and_epoch_and_not_by_run(monkeypatch):
    clips, drawn = table(["hello"] * 4, range(1, 5)), []
    monkeypatch.setattr(script, "training_loss", lambda model, batch, settings: (
        drawn.append(torch.rand(3).tolist()) or model.output.weight.sum(), torch.zeros(()), torch.ones(())))
    for rank, epoch in ((0, 1), (1, 1), (0, 2), (0, 1)):
        model, tokens, _ = build("gru", None)
        loader = script.make_loaders({"train": clips}, tokens, small(POSE_DIM=D, BATCH_SIZE=4), 0, rank, 2)["train"]
        script.Trainer(model, 9, small()).train(loader, epoch, "")
    assert drawn[0] == drawn[3] and len({str(x) for x in drawn}) == 3


# ---- checkpoints

LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import train_final_model as final
poses = {}
for name in ("gru", "transformer", "bert"):
    model, tokens = final.load_checkpoint(f"{name}.pt")
    with torch.no_grad():
        poses[name] = model(*tokens(["hello", "I want go school"]))
torch.save(poses, "loaded.pt")
"""


def test_a_checkpoint_is_complete_by_itself_in_a_fresh_process(tmp_path):
    folder, poses = write_bert(tmp_path / "bert"), {}
    for name in script.MODELS:
        model, tokens, built = build(name, folder)
        with torch.no_grad():
            poses[name] = model(*tokens(["hello", "I want go school"]))
        script.write_whole(f"{name}.pt", {**built, "weights": model.state_dict()})
        torch.load(f"{name}.pt", weights_only=True)
    (tmp_path / "bert").rename(tmp_path / "elsewhere")
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["bert.pt", "gru.pt", "transformer.pt"]
    subprocess.run([sys.executable, "-c", LOAD, ROOT], cwd=tmp_path, check=True)
    loaded = torch.load("loaded.pt")
    for name, (pose, seconds) in poses.items():
        assert pose.abs().max() > 0.1
        torch.testing.assert_close(loaded[name], (pose, seconds))


class Code:
    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("contents", ["none", "cut", "text", "foreign", "other weights", "code"])
def test_a_file_that_is_no_checkpoint_is_one_line_and_runs_no_code(contents, tmp_path, bert):
    path = tmp_path / "best_gru.pt"
    built = build("gru", bert)[2]
    if contents in ("cut", "other weights", "code"):
        other = build("gru", bert, HIDDEN_DIM=8 if contents == "other weights" else 16)[0]
        torch.save({**built, "weights": other.state_dict(), **({"note": Code()} if contents == "code" else {})}, path)
    if contents == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    elif contents == "text":
        path.write_text("no checkpoint")
    elif contents == "foreign":
        torch.save({"state_dict": {}}, path)
    with pytest.raises(SystemExit, match="^error: .*best_gru.pt.*$"):
        final.load_checkpoint(str(path))
    assert not (tmp_path / "executed").exists()


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    script.write_whole("best.pt", {"epoch": 1})

    def interrupted(contents, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.write_whole("best.pt", {"epoch": 2})
    assert torch.load("best.pt") == {"epoch": 1}


def test_the_layers_of_a_fresh_transformer_are_identities():
    model = script.new_model("transformer", statistics(), VOCABULARY, small(POSE_DIM=D, MAX_FRAMES=FRAMES))[0].eval()
    x, states = torch.randn(2, 5, model.output.in_features), torch.randn(2, 3, model.output.in_features)
    torch.testing.assert_close(model.core.encoder(x), model.core.encoder.norm(x))
    torch.testing.assert_close(model.core.decoder(x, states), model.core.decoder.norm(x))
