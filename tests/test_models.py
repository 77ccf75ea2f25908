import math
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import ROOT, change, small, write_bert

import model_selection as script
import train_final_model as final

FRAMES, D = 20, 8  # the last point is never seen
CPU = torch.device("cpu")
VOCABULARY = ["<pad>", "<unk>", "HELLO", "I", "YOU", "WANT", "GO", "SCHOOL"]
SENTENCES, LENGTHS = ["hello", "I want go school you go", "go you"], [5, 20, 11]
names = pytest.mark.parametrize("name", script.MODELS)


def statistics():
    rng, seen = np.random.default_rng(1), np.arange(D) < D - 2
    values = {
        "mean": rng.normal(size=D) * seen,
        "std": np.where(seen, rng.uniform(0.5, 2, D), 1),
        "seen": seen,
        "seconds_per_gloss": np.array(0.15),
    }
    return {key: torch.tensor(value, dtype=torch.float32) for key, value in values.items()}


class Words:
    """Sentences -> tokens, token_mask, by a tokenizer."""

    def __init__(self, tokenizer, max_gloss_len=6):
        self.tokenizer, self.max_gloss_len = tokenizer, max_gloss_len

    def __call__(self, sentences):
        text = script.tokenize(self.tokenizer, sentences, self.max_gloss_len)
        return text["input_ids"], text["attention_mask"].bool()


def build(name, bert, **changes):
    settings = {"DROPOUT": 0.3, "POSE_DIM": D, "MAX_FRAMES": FRAMES, "MAX_GLOSS_LEN": 6}
    small(**{**settings, "BERT_NAME": str(bert), **changes})
    model, tokenizer, built = script.new_model(name, statistics(), VOCABULARY)
    # a layer that begins as the identity would hide what its masks do
    for value in model.parameters():
        if value.dim() == 2 and not value.any():
            torch.nn.init.xavier_uniform_(value)
    return model.eval(), Words(tokenizer), built


class Training(script.Run):
    """A script's run of a model that is there, for `steps` steps."""

    def __init__(self, model, steps):
        optimizer, average = script.new_optimizer(model), script.new_average(model, CPU)
        super().__init__("gru", model, average, optimizer, {}, CPU, {}, [])
        self.schedule = script.new_schedule(optimizer, steps)

    def train(self, loader, epoch):
        self.loaders, self.log = {"train": loader}, [{}] * (epoch - 1)
        return script.train_one_epoch(self, self.model, self.schedule, "epoch")

    def epoch(self, loaders, number):
        self.loaders, self.log = loaders, [{}] * (number - 1)
        return script.run_epoch(self, self.model, self.schedule)


def loaders_of(train, validation, tokens, **settings):
    change(POSE_DIM=D, **settings)
    return script.make_loaders({"train": train, "validation": validation}, tokens.tokenizer)


def clips(sentences=SENTENCES, lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for sentence, length in zip(sentences, lengths, strict=False):
        pose = np.cumsum(rng.normal(size=(length, D)), 0)
        pose[rng.random((length, D // 2)).repeat(2, 1) < 0.2] = np.nan
        pose[:, -2:] = np.nan
        made.append(
            {
                "key": "",
                "gloss": sentence,
                "problem": "",
                "seconds": length / 25,
                "pose": pose.ravel().astype(np.float32),
            }
        )
    return made


def loader_of(part, tokens, batch_size, pose_dim=D):
    part = datasets.Dataset.from_list(part, features=script.CLIP)
    change(POSE_DIM=pose_dim, BATCH_SIZE=batch_size)
    return script.make_loaders({"train": part, "validation": part}, tokens.tokenizer)["validation"]


def loss_of(model, batch, duration_weight, speed_weight=0, confidence_weight=0):
    change(
        DURATION_WEIGHT=duration_weight,
        SPEED_WEIGHT=speed_weight,
        CONFIDENCE_WEIGHT=confidence_weight,
    )
    return script.training_loss(model, batch)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([value.grad.ravel() for value in model.parameters() if value.grad is not None])


# ---- padding and masks


@names
def test_a_padded_batch_has_the_loss_and_the_gradient_of_its_clips_one_by_one(name, bert):
    model, tokens, _ = build(name, bert)
    batch = script.collate(clips(), tokens.tokenizer)
    loss, mse = loss_of(model, batch, 0.1)
    count = batch["pose"].isfinite().sum()
    alone, alone_mse = 0, 0
    for clip in clips():
        one = script.collate([clip], tokens.tokenizer)
        share = one["pose"].isfinite().sum() / count
        with_duration, one_mse = loss_of(model, one, 0.1)
        of_pose = loss_of(model, one, 0)[0]
        alone += of_pose * share + (with_duration - of_pose) / len(clips())
        alone_mse += one_mse * share
    torch.testing.assert_close(mse, alone_mse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient(model, loss), gradient(model, alone), rtol=1e-3, atol=1e-4)
    assert count == sum(np.isfinite(clip["pose"]).sum() for clip in clips()) and loss > 0


def test_what_was_not_seen_changes_no_loss_and_gets_no_gradient():
    target = torch.tensor(
        [[[1.0, 2, math.nan, math.nan], [3, 5, 7, 9]], [[1, 1, 1, 1], [math.nan] * 4]]
    )
    pose = torch.zeros(2, 5, 4, requires_grad=True)
    for loss, expected in (
        (script.pose_loss, (1 + 4 + 9 + 25 + 49 + 81 + 4) / 10),
        # of one step of one point, from (1, 2) to (3, 5), of which the pose makes none
        (script.speed_loss, 1),
    ):
        value = loss(pose, target)
        assert value.item() == pytest.approx(expected, rel=1e-3)
        (gradient,) = torch.autograd.grad(value, pose)
        assert gradient.isfinite().all() and not gradient[:, 2:].any() and not gradient[1, 1].any()
        assert not gradient[0, 0, 2:].any()
    seconds = torch.tensor([2.0, 3.0], requires_grad=True)
    value = script.duration_loss(seconds, torch.tensor([1.0, math.nan]))
    assert value.item() == pytest.approx(math.log(2) ** 2)
    assert torch.autograd.grad(value, seconds)[0][1] == 0


def test_the_loss_is_the_mean_of_the_squares_of_what_was_seen_over_the_variance(bert):
    model, tokens, _ = build("gru", bert)
    batch = script.collate(clips(), tokens.tokenizer)
    made = model(batch["tokens"], batch["token_mask"], batch["n_frames"])
    pose, seconds = made.pose.detach().numpy(), made.seconds.detach().numpy()
    squares = [
        (mine[:n] - clip["pose"].reshape(n, D)) ** 2
        for mine, clip, n in zip(pose, clips(), LENGTHS, strict=False)
    ]
    variance = (statistics()["std"][:-2] ** 2).mean().item()
    late = (np.log(seconds) - np.log(np.array(LENGTHS) / 25)) ** 2
    expected = np.nanmean(np.concatenate(squares)) / variance + 0.1 * late.mean()
    assert loss_of(model, batch, 0.1)[0].item() == pytest.approx(expected, rel=1e-4)


def test_the_speed_loss_is_the_relative_squared_error_of_the_speeds(bert):
    model, tokens, _ = build("gru", bert)
    batch = script.collate(clips(), tokens.tokenizer)
    pose = model(batch["tokens"], batch["token_mask"], batch["n_frames"])[0].detach().numpy()
    late = squares = 0
    for mine, clip, n in zip(pose, clips(), LENGTHS, strict=False):
        real = clip["pose"].reshape(n, D // 2, 2)
        speed = [
            np.linalg.norm(np.diff(x.reshape(n, D // 2, 2), axis=0), axis=-1)
            for x in (mine[:n], real)
        ]
        late += np.nansum((speed[0] - speed[1]) ** 2)
        squares += np.nansum(speed[1] ** 2)
    with_speed, without = (loss_of(model, batch, 0, weight)[0].item() for weight in (0.5, 0))
    assert with_speed - without == pytest.approx(0.5 * late / squares, rel=1e-3)
    ones, counts = [script.collate([clip], tokens.tokenizer) for clip in clips()], []
    for one in ones:  # the longest clip has no padding, the others have none by themselves
        counts.append(script.speeds(one["pose"]).square().nansum())
    alone = [loss_of(model, one, 0, 0.5)[0] - loss_of(model, one, 0)[0] for one in ones]
    together = sum(loss * count for loss, count in zip(alone, counts, strict=False)) / sum(counts)
    assert with_speed - without == pytest.approx(together.item(), rel=1e-3)
    still = [{**clips()[0], "pose": np.zeros(5 * D, np.float32)}]
    loss, *_ = loss_of(model, script.collate(still, tokens.tokenizer), 0.1, 0.5)
    assert loss.isfinite() and gradient(model, loss).isfinite().all()


@pytest.mark.parametrize("name", ["gru", "transformer"])
def test_word_dropout_makes_some_glosses_unknown_in_training_alone(name, bert, monkeypatch):
    model, tokens, _ = build(name, bert, WORD_DROPOUT=0.3)
    seen, embedding = [], model.embedding.forward
    monkeypatch.setattr(
        model.embedding, "forward", lambda tokens: seen.append(tokens) or embedding(tokens)
    )
    token_ids, mask = tokens(["hello i you want go school", "go"] * 200)
    model.eval().encode(token_ids, mask)
    assert torch.equal(seen[0], token_ids)
    model.train().encode(token_ids, mask)
    changed = seen[1] != token_ids
    assert (seen[1][changed] == script.UNK).all() and not changed[~mask].any()
    assert 0.25 < changed[mask].float().mean() < 0.35


def test_bert_hides_some_pieces_from_the_others_in_training_alone(bert, monkeypatch):
    model, tokens, _ = build("bert", bert)
    given, forward = [], model.pretrained.forward
    monkeypatch.setattr(
        model.pretrained, "forward", lambda **inputs: given.append(inputs) or forward(**inputs)
    )
    token_ids, mask = tokens(["hello i you want go school", "go"] * 200)
    model.eval().encode(token_ids, mask)
    _, states = model.train().encode(token_ids, mask)
    assert states.isfinite().all()
    assert all(torch.equal(inputs["input_ids"], token_ids) for inputs in given)
    evaluated, trained = [inputs["attention_mask"].bool() for inputs in given]
    assert torch.equal(evaluated, mask)
    assert trained[:, 0].all() and not trained[~mask].any()
    assert 0.25 < 1 - trained[:, 1:][mask[:, 1:]].float().mean() < 0.35


@names
def test_what_was_never_seen_gives_no_nan(name, bert):
    model, tokens, _ = build(name, bert)
    unseen = {**clips()[0], "pose": np.full(3 * D, np.nan, np.float32)}
    for batch in (
        script.collate(clips(), tokens.tokenizer),
        script.collate([unseen, clips()[0]], tokens.tokenizer),
        script.collate([unseen], tokens.tokenizer),
    ):
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
    made = model(token_ids, mask, n_frames)
    width = token_ids.shape[1]
    assert made.pose.shape == (3, FRAMES, D) and made.confidence.shape == (3, FRAMES, D // 2)
    assert made.seconds.shape == (3,) and (made.seconds > 0).all()
    assert made.keys.shape == made.durations.shape == (3, width)
    padded = model(garbage, wider[1], n_frames)
    for i, n in enumerate(LENGTHS):
        assert (made.pose[i, n:] == 0).all() and (made.pose[i, :n, :-2] != 0).all()
        own, own_mask = tokens(SENTENCES[i : i + 1])
        alone = model(own, own_mask, torch.tensor([n]))
        real, m = mask[i], own.shape[1]
        for other, row in ((padded, i), (alone, 0)):
            pairs = [
                (other.pose[row], made.pose[i]),
                (other.seconds[row], made.seconds[i]),
                (other.confidence[row, :n], made.confidence[i, :n]),
                (other.keys[row, :m], made.keys[i][real]),
                (other.durations[row, :m], made.durations[i][real]),
            ]
            for mine, expected in pairs:
                torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@names
@torch.no_grad()
def test_without_n_frames_the_predicted_duration_counts(name, bert):
    model, tokens, _ = build(name, bert)
    token_ids, mask = tokens(SENTENCES)
    for seconds_per_gloss in (0.001, 0.07, 9):  # at least one frame, at most FRAMES
        model.seconds_per_gloss.fill_(seconds_per_gloss)
        pose, seconds = model(token_ids, mask)[:2]
        n_frames = (seconds * 25).round().long().clamp(1, FRAMES)
        assert (pose[..., 0] != 0).sum(1).tolist() == n_frames.tolist()
        torch.testing.assert_close(model(token_ids, mask, n_frames)[0], pose)
    assert (n_frames == FRAMES).all()


@names
@torch.no_grad()
def test_durations_are_positive_and_sum_to_the_seconds(name, bert):
    model, tokens, _ = build(name, bert)
    token_ids, mask = tokens(SENTENCES)
    made = model(token_ids, mask)
    assert (made.durations[mask] > 0).all() and (made.durations[~mask] == 0).all()
    torch.testing.assert_close(made.durations.sum(1), made.seconds)


@names
@torch.no_grad()
def test_dropout_makes_no_motion(name, bert):
    """In training, too, frames of the same hidden state have the same pose."""
    model, tokens, _ = build(name, bert)
    token_ids, mask = tokens(SENTENCES)
    model.train()
    model.decode = lambda queries, *_: torch.ones_like(queries)
    torch.nn.init.normal_(model.output.weight)
    poses = [model(token_ids, mask, torch.full((len(mask),), FRAMES)).pose for _ in range(2)]
    assert poses[0].diff(dim=1).abs().max() < 1e-5 < (poses[0] - poses[1]).abs().max()
    frames = torch.ones(3, 5, 400)
    dropped = model.drop_features(frames)
    assert (dropped == dropped[:, :1]).all()
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0, 1 / 0.7])
    assert (dropped[0] != dropped[1]).any() and (dropped == 0).float().mean() == pytest.approx(
        0.3, abs=0.1
    )
    assert torch.equal(model.eval().drop_features(frames), frames)


@names
def test_frames_read_the_glosses_in_their_order(name, bert, monkeypatch):
    """With even durations a frame reads the gloss that has its place."""
    model, tokens, _ = build(name, bert)
    token_ids, mask = tokens(["hello", "I want go school"])
    words, states = (made.detach().requires_grad_() for made in model.encode(token_ids, mask))
    monkeypatch.setattr(model, "encode", lambda *_: (words, states), raising=False)
    monkeypatch.setattr(model, "decode", lambda queries, *_: queries, raising=False)
    torch.nn.init.zeros_(model.duration[-1].weight)
    torch.nn.init.zeros_(model.plan.move[-1].weight)
    pose = model(token_ids, mask, torch.tensor([6, 20])).pose
    n = int(mask[1].sum())
    read = [
        torch.autograd.grad(pose[1, t].square().sum(), words, retain_graph=True)[0][1]
        .norm(dim=-1)
        .argmax()
        .item()
        for t in range(20)
    ]
    assert read == sorted(read) and set(read) == set(range(n))
    assert all(19 / n <= (np.array(read) == s).sum() + 1 for s in range(n))


@names
@torch.no_grad()
def test_the_order_of_the_glosses_matters(name, bert):
    model, tokens, _ = build(name, bert)
    one, other = (model(*tokens([text]), torch.tensor([12])).pose for text in ("go you", "you go"))
    assert (one - other).abs().max() > 1e-3


# ---- the plan


@names
@torch.no_grad()
def test_a_fresh_plan_keeps_the_order_of_the_text(name, bert):
    model, tokens, _ = build(name, bert)
    torch.nn.init.zeros_(model.plan.move[-1].weight)  # as it is before `build`
    token_ids, mask = tokens(SENTENCES)
    _, states = model.encode(token_ids, mask)
    keys, order = model.plan(states, torch.rand(mask.shape) * mask, mask)
    torch.testing.assert_close(order.sum(-1), torch.ones(mask.shape))
    assert (order[~mask[:, None].expand_as(order)] == 0).all()
    for its_keys, its_order, n in zip(keys, order, mask.sum(1).tolist(), strict=True):
        assert its_keys[:n].tolist() == its_order[:n].argmax(-1).tolist() == list(range(n))
        assert (its_keys[n:] > 100).all()


def sentences_out_of_order(rng, n):
    """-> tokens (n, 7), mask, and for each sentence the places of its words in signing order.

    Of words 2 to 9 the last one of a sentence is written second, and the article 1, which is not
    signed, stands before some of them.
    """
    token_ids, orders = torch.zeros(n, 7, dtype=torch.long), []
    for row in token_ids:
        words, text = rng.permutation(range(2, 10))[: rng.integers(2, 5)].tolist(), []
        for word in [words[0], words[-1], *words[1:-1]]:
            text += [1, word] if len(text) < 5 and rng.random() < 0.3 else [word]
        row[: len(text)] = torch.tensor(text)
        orders.append([text.index(word) for word in words])
    return token_ids, token_ids != 0, orders


def test_a_plan_learns_another_order_and_passes_over_words_that_are_not_signed():
    """What a time line gives: the signed words, one after the other, each for 1 mean gloss."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    embedding, plan = torch.nn.Embedding(10, 16), script.Plan(16)
    parameters = [*embedding.parameters(), *plan.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.01)
    torch.nn.init.eye_(embedding.weight)
    for _ in range(200):
        token_ids, mask, orders = sentences_out_of_order(rng, 16)
        durations = mask * torch.where(token_ids == 1, 0.01, 1.0)
        order = plan(embedding(token_ids), durations, mask)[1]
        loss = 0
        for row, its_order, its_durations in zip(order, orders, durations, strict=True):
            ends = (row @ its_durations).cumsum(0)
            for i, place in enumerate(its_order):  # who signs in the middle of the i-th stretch?
                nearness = torch.sigmoid(4 * (ends - i - 0.5)) * torch.sigmoid(4 * (i + 1.5 - ends))
                loss = loss - torch.log((nearness / nearness.sum()) @ row[:, place] + 1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    token_ids, mask, orders = sentences_out_of_order(rng, 100)
    durations = mask * torch.where(token_ids == 1, 0.01, 1.0)
    planned = plan(embedding(token_ids), durations, mask)[0].argsort()
    found = [
        [place for place in row[:n].tolist() if token_ids[i, place] > 1] == orders[i]
        for i, (row, n) in enumerate(zip(planned, mask.sum(1).tolist(), strict=True))
    ]
    in_order = [its_order == sorted(its_order) for its_order in orders]
    assert np.mean(found) > 0.9 and np.mean(in_order) < 0.5


@torch.no_grad()
def test_a_word_that_is_not_signed_only_shifts_the_keys_behind_it():
    plan, states = script.Plan(6), torch.randn(1, 4, 6)
    torch.nn.init.normal_(plan.move[-1].weight)
    mask = torch.ones(1, 4, dtype=torch.bool)
    durations = torch.tensor([[1.0, 0.0, 0.7, 1.2]])
    spoken = [0, 2, 3]
    keys = plan(states, durations, mask)[0][:, spoken]
    signed_alone = plan(states[:, spoken], durations[:, spoken], mask[:, spoken])[0]
    torch.testing.assert_close(keys - signed_alone, torch.tensor([[0.0, 1.0, 1.0]]))
    longer = plan(states, durations + torch.tensor([0.0, 0.5, 0, 0]), mask)[0][:, spoken]
    assert (longer - keys).abs().min() > 1e-3


@pytest.mark.parametrize("name", ["gru", "transformer"])
@torch.no_grad()
def test_what_a_word_says_by_itself_is_the_same_in_every_sentence(name, bert):
    model, tokens, _ = build(name, bert)
    (one, in_one), (other, in_other) = (
        model.encode(*tokens([text])) for text in ("go you", "hello go school")
    )
    torch.testing.assert_close(one[0, 0], other[0, 1])
    assert (in_one[0, 0] - in_other[0, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gru", "transformer"])
@torch.no_grad()
def test_what_an_unknown_word_says_comes_from_its_sentence(name, bert):
    model, tokens, _ = build(name, bert)
    token_ids, mask = tokens(["xyzzy you", "xyzzy school"])
    words, states = model.encode(token_ids, mask)
    assert token_ids[:, 0].tolist() == [script.UNK] * 2
    assert (words[0, 0] - words[1, 0]).abs().max() > 1e-3
    torch.testing.assert_close(words[:, 0], states[:, 0])


# ---- confidence


def test_the_confidence_loss_is_over_points_of_real_frames(bert):
    model, tokens, _ = build("gru", bert)
    batch = script.collate(clips(), tokens.tokenizer)
    logits = model(batch["tokens"], batch["token_mask"], batch["n_frames"]).confidence
    losses = []
    for mine, clip, n in zip(logits.detach().numpy(), clips(), LENGTHS, strict=True):
        seen = np.isfinite(clip["pose"].reshape(n, D)[:, ::2])
        chance = 1 / (1 + np.exp(-mine[:n]))
        losses += (-np.log(np.where(seen, chance, 1 - chance))).ravel().tolist()
    with_it, without = (loss_of(model, batch, 0, 0, weight)[0].item() for weight in (0.5, 0))
    assert with_it - without == pytest.approx(0.5 * np.mean(losses), rel=1e-4)
    alone = model.confidence.weight, *model.output.parameters()
    loss = script.confidence_loss(logits, batch["pose"], script.real_frames(batch))
    of_head, *of_pose = torch.autograd.grad(loss, alone, allow_unused=True)
    assert of_head.any() and of_pose == [None, None]


@names
@torch.no_grad()
def test_confidence_begins_at_the_share_of_frames_that_show_a_point(name, bert):
    model, tokens, _ = build(name, bert)
    model.seen.copy_(torch.tensor([1, 1, 0.3, 0.3, 0.8, 0.8, 0, 0]))
    torch.nn.init.zeros_(model.confidence.weight)
    torch.nn.init.zeros_(model.confidence.bias)
    chance = model(*tokens(SENTENCES), torch.tensor(LENGTHS)).confidence[0, 0].sigmoid()
    torch.testing.assert_close(chance, torch.tensor([0.999, 0.3, 0.8, 0.001]))


@torch.no_grad()
def test_two_way_gru_begins_its_way_back_at_the_last_real_element():
    gru, x = script.TwoWayGRU(3, 8), torch.randn(2, 6, 3)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    torch.testing.assert_close(gru(x, mask)[0, :4], gru(x[:1, :4], mask[:1, :4])[0])
    changed = x.clone()
    changed[0, 3] += 1
    assert (
        (gru(changed, mask) - gru(x, mask))[0, :4, 4:].abs().amax(-1) > 1e-5
    ).all()  # it reaches the first


def test_bert_takes_the_weights_of_its_folder(bert):
    import transformers

    own = transformers.AutoModel.from_pretrained(bert).state_dict()
    model, tokens, _ = build("bert", bert)
    loaded = {
        key: value for key, value in model.pretrained.state_dict().items() if "pooler" not in key
    }
    assert len(loaded) > 30 and all(torch.equal(value, own[key]) for key, value in loaded.items())
    ids, mask = tokens(["Hello, schools!"])  # [CLS] hello school ##s [SEP]
    assert ids.tolist() == [[2, 5, 10, 16, 3]] and mask.all()
    groups = Training(model, 11).optimizer.param_groups
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


@pytest.mark.parametrize(
    "fault", ["no tokenizer", "too few positions", "another's tokenizer", "cut", "no encoder"]
)
def test_an_encoder_that_does_not_serve_is_one_line(fault, bert, tmp_path):
    import transformers

    folder = shutil.copytree(bert, tmp_path / "bert")
    if fault == "no tokenizer":
        for file in folder.glob("*token*"):
            file.unlink()
    elif fault == "cut":
        (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-100]
        )
    else:
        sizes = {
            "vocab_size": 9 if fault == "another's tokenizer" else 17,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 23 if fault == "too few positions" else 24,
        }
        kind = transformers.BertConfig(**sizes)
        if fault == "no encoder":
            kind = transformers.T5Config(
                vocab_size=17, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
            )
        transformers.AutoModel.from_config(kind).save_pretrained(folder)
    with pytest.raises(
        SystemExit, match="^error: BERT_NAME .* is no hub id .* folder with an encoder .*$"
    ) as error:
        build("bert", str(folder))
    assert "\n" not in str(error.value)


def test_word_pieces_are_cut_where_positions_may_end(bert):
    _, tokens, _ = build("bert", bert)
    ids, mask = tokens(["schools " * 9, "xyzzy " * 3])
    assert (
        ids.shape == mask.shape == (2, 14) and ids[0, -1] == 3
    )  # 6 words: [CLS], 12 pieces, [SEP]
    assert tokens([" ".join(["go.school.go.school.go.school"] * 6)])[0].shape == (1, 24)


# ---- training and metrics


class Fixed(torch.nn.Module):
    """A model that gives known poses, whatever it is asked."""

    def __init__(self, poses, seconds, mean):
        super().__init__()
        self.poses, self.seconds, self.mean = poses, seconds, mean
        self.confidence = torch.randn(*poses.shape[:2], poses.shape[2] // 2)

    def forward(self, tokens, token_mask, n_frames=None, longest=None):
        chosen = tokens[:, 0]
        return script.Signing(
            self.poses[chosen], self.seconds[chosen], self.confidence[chosen], None, None
        )


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_metrics_are_those_of_plain_numpy_at_every_batch_size(batch_size):
    rng, lengths, k = np.random.default_rng(3), [3, 7, 1, 5], 76
    poses, mean = rng.normal(size=(4, 10, 2 * k)), rng.normal(size=2 * k)
    targets = [rng.normal(size=(n, 2 * k)) for n in lengths]
    for target in targets:
        target[rng.random((len(target), k)).repeat(2, 1) < 0.3] = np.nan
        target[:, -2:] = np.nan
    model = Fixed(
        torch.tensor(poses).float(), torch.tensor([1.0, 2, 3, 4]), torch.tensor(mean).float()
    )
    made = [
        {
            "key": "",
            "gloss": str(i),
            "problem": "",
            "seconds": 2.5,
            "pose": np.float32(target.ravel()),
        }
        for i, target in enumerate(targets)
    ]
    words = Words(script.gloss_tokenizer(list("0123")))
    metrics = script.evaluate(model, loader_of(made, words, batch_size, 2 * k), CPU)

    difference = np.concatenate(
        [pose[:n] - target for pose, n, target in zip(poses, lengths, targets, strict=False)]
    )
    assert metrics["val_mse"] == pytest.approx(np.nanmean(difference**2), rel=1e-5)
    assert metrics["val_mae"] == pytest.approx(np.nanmean(abs(difference)), rel=1e-5)
    assert metrics["mean_pose_mse"] == pytest.approx(
        np.nanmean((np.concatenate(targets) - mean) ** 2), rel=1e-5
    )
    assert metrics["duration_error"] == pytest.approx(np.mean([1.5, 0.5, 0.5, 1.5]))
    wrong = points = 0
    for confidence, target, n in zip(model.confidence.numpy(), targets, lengths, strict=True):
        wrong += ((confidence[:n] > 0) != np.isfinite(target[:, ::2])).sum()
        points += n * k
    assert metrics["seen_error"] == pytest.approx(wrong / points)
    generated = real = 0
    for pose, target, n in zip(poses, targets, lengths, strict=False):
        for t in range(1, n):
            for point in [*range(42), 51, 52]:  # hands and wrists
                xy = slice(2 * point, 2 * point + 2)
                if np.isfinite(target[t - 1 : t + 1, xy]).all():
                    generated += math.dist(pose[t, xy], pose[t - 1, xy])
                    real += math.dist(target[t, xy], target[t - 1, xy])
    assert metrics["motion"] == pytest.approx(generated / real, rel=1e-4)


def table(sentences, lengths):
    return datasets.Dataset.from_list(clips(sentences, lengths), features=script.CLIP)


def train(name, bert, **changes):
    """-> the training MSE of every epoch, the Training, loaders {batch size: {split: loader}}."""
    model, tokens, _ = build(name, bert, DROPOUT=0)
    parts = table(SENTENCES * 4, LENGTHS * 4), table(SENTENCES, LENGTHS)
    loaders = {size: loaders_of(*parts, tokens, BATCH_SIZE=size) for size in (1, 4)}
    change(**{"AVERAGE": 0.5, **changes})
    training = Training(model, 36)
    losses = [training.train(loaders[4]["train"], epoch) for epoch in range(1, 13)]
    return losses, training, loaders


@names
def test_training_lowers_the_loss_and_evaluation_does_not_depend_on_the_batch_size(name, bert):
    losses, training, loaders = train(name, bert, LR_GRU=0.02, LR_TRANSFORMER=0.02, LR_BERT=0.02)
    assert losses[-1] < 0.9 * losses[0]
    averaged = training.average
    one, four = (script.evaluate(averaged, loaders[size]["validation"], CPU) for size in (1, 4))
    assert one == pytest.approx(four, rel=1e-4)


def in_bfloat16(monkeypatch):
    """Mixed precision, which is for GPUs, on the CPU."""
    monkeypatch.setattr(
        script, "mixed_precision", lambda device: torch.autocast("cpu", torch.bfloat16)
    )


@names
def test_mixed_precision_learns_alike(name, bert, monkeypatch):
    mse = {}
    for mixed in (False, True):
        torch.manual_seed(0)
        model, tokens, _ = build(name, bert, DROPOUT=0.0, WORD_DROPOUT=0.0, EPOCHS=2)
        part = datasets.Dataset.from_list(clips() * 20, features=script.CLIP)
        loaders = loaders_of(part, part, tokens, BATCH_SIZE=2)
        if mixed:
            in_bfloat16(monkeypatch)
        training = Training(model, 2 * len(loaders["train"]))
        log = [training.epoch(loaders, number) for number in (1, 2)]
        mse[mixed] = log[-1]["val_mse"]
        assert all(math.isfinite(line["train_mse"]) for line in log)
        assert mse[mixed] < 0.9 * log[0]["mean_pose_mse"]
    assert mse[True] != mse[False] and mse[True] == pytest.approx(mse[False], rel=0.1)


@pytest.mark.parametrize(
    "device, supported, wanted, enabled",
    [
        ("cuda", True, True, True),
        ("cuda", True, False, False),
        ("cuda", False, True, False),
        ("cpu", True, True, False),
    ],
)
def test_mixed_precision_is_bfloat16_on_gpus_that_have_it(
    device, supported, wanted, enabled, monkeypatch
):
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *x, enabled: asked.append((*x, enabled)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    change(MIXED_PRECISION=wanted)
    script.mixed_precision(torch.device(device))
    assert asked == [(device, torch.bfloat16, enabled)]


@pytest.mark.parametrize("limit", [0, 1e-9, 1e9])
def test_the_gradient_is_clipped_and_0_is_no_limit(limit, bert, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def seen(optimizer, *arguments, **changes):
        values = [
            value
            for group in optimizer.param_groups
            for value in group["params"]
            if value.grad is not None
        ]
        norms.append(torch.nn.utils.get_total_norm([value.grad for value in values]).item())
        return step(optimizer, *arguments, **changes)

    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    train("gru", bert, GRAD_CLIP=limit)
    assert max(norms) <= 1.001e-9 if limit == 1e-9 else min(norms) > 0.01


def test_under_mixed_precision_layers_compute_in_half_but_the_grus(bert, monkeypatch):
    kinds = {}
    model, tokens, _ = build("gru", bert, DROPOUT=0.0)
    for name, layer in (("linear", model.duration[0]), ("gru", model.decoder.there)):
        layer.register_forward_hook(
            lambda layer, x, y, name=name: kinds.update(
                {name: (y[0] if name == "gru" else y).dtype}
            )
        )
    part = datasets.Dataset.from_list(clips(), features=script.CLIP)
    loaders = loaders_of(part, part, tokens, BATCH_SIZE=3)
    in_bfloat16(monkeypatch)
    Training(model, 1).train(loaders["train"], 1)
    assert kinds == {"linear": torch.bfloat16, "gru": torch.float32}


@names
def test_dropout_is_at_work_in_training_alone(name, bert):
    model, tokens, _ = build(name, bert, DROPOUT=0.5, WORD_DROPOUT=0.0)
    batch = tokens(SENTENCES)
    assert torch.equal(model(*batch)[0], model(*batch)[0])
    model.train()
    if name == "bert":
        model.pretrained.eval()
    once, again = (
        model.decode(
            *(
                torch.ones(2, 5, model.output.in_features),
                torch.ones(2, 5, dtype=torch.bool),
                torch.ones(2, 3, model.output.in_features),
                torch.ones(2, 3, dtype=torch.bool),
            )
        )
        for _ in range(2)
    )
    assert torch.equal(once, again) == (
        name != "transformer"
    )  # the GRU's is before and behind its decoder
    once, again = (model(*batch, torch.tensor([9, 9, 9]))[0] for _ in range(2))
    changed = (once != again)[:, :9, :-2].float().mean()
    assert changed > 0.9


def test_the_average_is_laid_out_for_cudnn(monkeypatch):
    """Without a GPU all that can be seen is that PyTorch is asked to, as a mere copy does not."""
    laid_out = set()
    monkeypatch.setattr(torch.nn.GRU, "flatten_parameters", lambda gru: laid_out.add(gru))
    average = Training(build("gru", None)[0], 1).average
    grus = {module for module in average.modules() if isinstance(module, torch.nn.GRU)}
    assert len(grus) == 4 and grus <= laid_out


@pytest.mark.parametrize("average", [0, 0.999])
def test_what_is_evaluated_and_saved_is_the_average_of_the_weights(average):
    _, training, _ = train("gru", None, AVERAGE=average)
    averaged = list(training.average.parameters())
    pairs = zip(averaged, training.model.parameters(), strict=True)
    apart = sum((a - b).norm() for a, b in pairs)
    assert (apart == 0) == (average == 0) and apart < 1
    assert not any(value.requires_grad for value in averaged)


def test_the_averages_memory_grows_with_the_steps():
    model = torch.nn.Linear(1, 1, bias=False)
    change(AVERAGE=0.5)
    average = script.new_average(model, CPU)
    expected = model.weight.item()
    for step, value in enumerate([3.0, 7.0, -2.0, 11.0, 5.0, 1.0, 0.0, 4.0, 9.0, -5.0]):
        torch.nn.init.constant_(model.weight, value)
        script.follow(average, model, step)
        memory = min(0.5, (1 + step) / (6 + step))
        expected = memory * expected + (1 - memory) * value
        assert average.weight.item() == pytest.approx(expected, rel=1e-5)


def test_the_average_takes_a_step_with_each_of_the_training_and_counts_all_of_them(monkeypatch):
    taken = []
    follow = script.follow
    monkeypatch.setattr(script, "follow", lambda *given: [taken.append(given[2]), follow(*given)])
    train("gru", None)
    assert len(taken) > 12 and taken == list(range(len(taken)))


def test_a_loss_that_is_not_finite_is_one_line(monkeypatch):
    def infinite(model, batch):
        return model.output.weight.sum() * math.inf, torch.tensor(math.inf)

    monkeypatch.setattr(script, "training_loss", infinite)
    line = "^error: the loss of epoch, batch 1 is not finite: lower the learning rate$"
    with pytest.raises(SystemExit, match=line):
        train("gru", None)


@pytest.mark.parametrize(
    "steps, warmup", [(20, 0.05), (10, 0.1), (40, 0.05), (7, 0.3), (2, 0.5), (1, 0.05)]
)
def test_the_rate_rises_and_falls_to_0(steps, warmup):
    model = build("gru", None, WARMUP=warmup)[0]
    training, rates = Training(model, steps), []
    for _ in range(steps):
        rates.append(training.schedule.get_last_lr()[0])
        training.optimizer.step()
        training.schedule.step()
    top = rates.index(max(rates))
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    assert 0 < max(rates) <= 1e-3
    assert steps < 10 or (max(rates) > 9e-4 and rates[-1] < 1e-4)
    assert training.schedule.get_last_lr()[0] == pytest.approx(0)
    # a schedule that begins in the middle goes on where it was
    again = script.new_schedule(script.new_optimizer(model), steps, done=steps // 2)
    assert again.get_last_lr()[0] == pytest.approx(rates[steps // 2])


@names
def test_every_parameter_is_trained_once_with_its_models_rate_and_memory(name, bert):
    model = build(name, bert)[0]
    groups = script.new_optimizer(model).param_groups
    trained = [value for group in groups for value in group["params"]]
    assert len(trained) == len({*trained}) == len([*model.parameters()])
    rates = {"gru": [1e-3], "transformer": [5e-4], "bert": [1e-3, 2e-5]}
    assert [group["lr"] for group in groups] == rates[name]
    memory = 0.98 if name == "transformer" else 0.999
    assert all(group["betas"] == (0.9, memory) for group in groups)


def test_the_order_of_training_depends_on_the_seed_and_the_epoch_alone(monkeypatch):
    parts = table(["hello"] * 30, range(1, 31)), table(["hello"] * 5, range(1, 6))
    words = Words(script.gloss_tokenizer(VOCABULARY))

    def order(split, seed, epoch):
        loader = loaders_of(*parts, words, SEED=seed)[split]
        if split == "train":
            loader.sampler.set_epoch(epoch)
        torch.rand(seed + epoch)
        return [n for batch in loader for n in batch["n_frames"].tolist()]

    assert order("train", 0, 1) == order("train", 0, 1)
    assert sorted(order("train", 0, 1)) == list(range(1, 31))
    assert order("train", 0, 1) != order("train", 0, 2)
    assert order("train", 0, 1) != order("train", 1, 1)
    assert order("validation", 0, 1) == order("validation", 3, 4) == [1, 2, 3, 4, 5]
    seen, training_loss = [], script.training_loss

    def seeing(model, batch):
        seen.extend(batch["n_frames"].tolist())
        return training_loss(model, batch)

    monkeypatch.setattr(script, "training_loss", seeing)
    train("gru", None)
    assert seen[:12] != seen[12:24] and sorted(seen[:12]) == sorted(seen[12:24])


@pytest.mark.parametrize("n, world", [(5, 2), (7, 3), (4, 2), (3, 5)])
def test_the_processes_share_the_validation_clips(n, world):
    """Each clip is with one process, and none is repeated."""
    clips = table(["hello"] * n, range(1, n + 1))
    words, seen = Words(script.gloss_tokenizer(VOCABULARY)), []
    change(POSE_DIM=D, BATCH_SIZE=2 * world)
    for rank in range(world):
        parts = {"train": clips, "validation": clips}
        loader = script.make_loaders(parts, words.tokenizer, 0, rank, world)["validation"]
        seen += [frames for batch in loader for frames in batch["n_frames"].tolist()]
    assert sorted(seen) == list(range(1, n + 1))


def test_what_is_dropped_differs_by_process_and_epoch_and_not_by_run(monkeypatch):
    clips, drawn = table(["hello"] * 4, range(1, 5)), []

    def drawing(model, batch):
        drawn.append(torch.rand(3).tolist())
        return model.output.weight.sum(), torch.zeros(())

    monkeypatch.setattr(script, "training_loss", drawing)
    for rank, epoch in ((0, 1), (1, 1), (0, 2), (0, 1)):
        model, tokens, _ = build("gru", None, POSE_DIM=D, BATCH_SIZE=4)
        parts = {"train": clips, "validation": clips}
        loader = script.make_loaders(parts, tokens.tokenizer, 0, rank, 2)["train"]
        Training(model, 9).train(loader, epoch)
    assert drawn[0] == drawn[3] and len({str(x) for x in drawn}) == 3


# ---- checkpoints


def test_a_newer_library_or_a_moved_encoder_is_no_other_model(tmp_path):
    built = [build("bert", write_bert(tmp_path / name))[2] for name in ("here", "there")]
    assert built[0]["model_args"] == built[1]["model_args"]
    assert (
        not {"_name_or_path", "transformers_version"} & built[0]["model_args"]["bert_config"].keys()
    )


LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import train_final_model as final
poses = {}
for name in ("gru", "transformer", "bert"):
    model, tokenizer, length = final.load_checkpoint(f"{name}.pt")
    with torch.no_grad():
        text = final.tokenize(tokenizer, ["hello", "I want go school"], length)
        poses[name] = [*model(text["input_ids"], text["attention_mask"].bool())]
torch.save(poses, "loaded.pt")
"""


def test_a_checkpoint_is_complete_by_itself_in_a_fresh_process(tmp_path):
    folder, poses = write_bert(tmp_path / "bert"), {}
    for name in script.MODELS:
        model, tokens, built = build(name, folder)
        with torch.no_grad():
            poses[name] = [*model(*tokens(["hello", "I want go school"]))]
        script.save(f"{name}.pt", {**built, "weights": model.state_dict()})
        torch.load(f"{name}.pt", weights_only=True)
    (tmp_path / "bert").rename(tmp_path / "elsewhere")
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "bert.pt",
        "gru.pt",
        "transformer.pt",
    ]
    subprocess.run([sys.executable, "-c", LOAD, ROOT], cwd=tmp_path, check=True)
    loaded = torch.load("loaded.pt")
    for name, made in poses.items():
        assert made[0].abs().max() > 0.1
        torch.testing.assert_close(loaded[name], made)


class Code:
    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("contents", ["none", "cut", "text", "foreign", "other weights", "code"])
def test_a_file_that_is_no_checkpoint_is_one_line_and_runs_no_code(contents, tmp_path, bert):
    path = tmp_path / "best_gru.pt"
    built = build("gru", bert)[2]
    if contents in ("cut", "other weights", "code"):
        other = build("gru", bert, HIDDEN_DIM=8 if contents == "other weights" else 16)[0]
        torch.save(
            {
                **built,
                "weights": other.state_dict(),
                **({"note": Code()} if contents == "code" else {}),
            },
            path,
        )
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
    script.save("best.pt", {"epoch": 1})

    def interrupted(contents, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.save("best.pt", {"epoch": 2})
    assert torch.load("best.pt") == {"epoch": 1}


def test_the_layers_of_a_fresh_transformer_are_identities():
    small(POSE_DIM=D, MAX_FRAMES=FRAMES)
    model = script.new_model("transformer", statistics(), VOCABULARY)[0].eval()
    x, states = (
        torch.randn(2, 5, model.output.in_features),
        torch.randn(2, 3, model.output.in_features),
    )
    torch.testing.assert_close(model.core.encoder(x), model.core.encoder.norm(x))
    torch.testing.assert_close(model.core.decoder(x, states), model.core.decoder.norm(x))


@pytest.mark.parametrize(
    "change_args, reason",
    [
        ({"fps": 0}, "no frame rate"),
        ({"fps": -25}, "no frame rate"),
        ({"max_frames": 0}, "no frame rate or number of frames"),
        ({"max_frames": 2**31}, "no frame rate or number of frames"),
        ({"vocabulary": 5}, "another vocabulary"),
        ({"hidden_dim": 8}, "Error\\(s\\) in loading state_dict"),
    ],
)
def test_a_checkpoint_that_makes_no_sense_is_one_line(change_args, reason, bert):
    model, _, built = build("gru", bert)
    contents = {**built, "weights": model.state_dict()}
    contents["model_args"] = {**built["model_args"], **change_args}
    script.save("best_gru.pt", contents)
    line = rf"^error: best_gru.pt is damaged or no checkpoint of this script \(\w+: {reason}"
    with pytest.raises(SystemExit, match=line):
        final.load_checkpoint("best_gru.pt")


def test_a_checkpoint_of_weights_that_are_not_finite_is_one_line(bert):
    model, _, built = build("gru", bert)
    model.output.weight.data[0, 0] = math.nan
    script.save("best_gru.pt", {**built, "weights": model.state_dict()})
    with pytest.raises(SystemExit, match="^error: best_gru.pt is damaged .*weights that are not"):
        final.load_checkpoint("best_gru.pt")


def test_a_pretrained_encoder_whose_file_lacks_weights_is_one_line(bert, tmp_path):
    import safetensors.torch

    folder = shutil.copytree(bert, tmp_path / "renamed")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights = {name.replace("attention", "attn"): value for name, value in weights.items()}
    metadata = {"format": "pt"}
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata)
    with pytest.raises(SystemExit, match="^error: BERT_NAME .* weights are missing in its file"):
        build("bert", folder)
