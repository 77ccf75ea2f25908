"""The models: masks, the plan, the time line, pretrained encoders, losses and metrics."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from helpers import change, small

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


def build(name, bert=None, **changes):
    settings = {"DROPOUT": 0.3, "POSE_DIM": D, "MAX_FRAMES": FRAMES, "MAX_GLOSS_LEN": 6}
    small(**{**settings, "BERT_NAME": str(bert), **changes})
    model, tokenizer, _ = script.new_model(name, statistics(), VOCABULARY)
    # a layer that begins as the identity would hide what its masks do
    for value in model.parameters():
        if value.dim() == 2 and not value.any():
            torch.nn.init.xavier_uniform_(value)

    def words(sentences):
        text = script.tokenize(tokenizer, sentences, 6)
        return text["input_ids"], text["attention_mask"].bool()

    words.tokenizer = tokenizer
    return model.eval(), words


def clips_of(sentences, poses, seconds=None):
    """Sentences, their poses (T, D) and seconds -> Clips."""
    frames = torch.tensor(np.concatenate(poses), dtype=torch.float32)
    pairs, first = [], 0
    for i, (sentence, pose) in enumerate(zip(sentences, poses, strict=True)):
        row = script.Row(str(i), sentence, None, "train", i)
        lasting = len(pose) / 25 if seconds is None else seconds[i]
        pairs.append((row, script.StoredClip(str(i), first, len(pose), lasting, 1, i, "")))
        first += len(pose)
    return script.Clips(pairs, SimpleNamespace(frames=lambda: frames))


def random_poses():
    rng, poses = np.random.default_rng(0), []
    for length in LENGTHS:
        pose = np.cumsum(rng.normal(size=(length, D)), 0)
        pose[rng.random((length, D // 2)).repeat(2, 1) < 0.2] = np.nan
        pose[:, -2:] = np.nan
        poses.append(pose)
    return poses


def batch_of(words, numbers=(0, 1, 2)):
    clips = clips_of(SENTENCES, random_poses()).with_tokens(words.tokenizer)
    return clips.batch(torch.tensor(numbers), CPU)


def loss_of(model, batch, duration=0.0, motion=0.0, confidence=0.0):
    change(DURATION_WEIGHT=duration, MOTION_WEIGHT=motion, CONFIDENCE_WEIGHT=confidence)
    loss, (squares, count) = script.training_loss(model, batch)
    return loss, squares / count


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([value.grad.ravel() for value in model.parameters() if value.grad is not None])


def test_a_batch_is_as_long_as_its_longest_clip_and_sentence():
    _, words = build("gru")
    batch, poses = batch_of(words, [2, 0]), random_poses()
    assert batch["pose"].shape == (2, 11, D) and batch["tokens"].tolist() == [[6, 4], [2, 0]]
    assert batch["token_mask"].tolist() == [[True, True], [True, False]]
    np.testing.assert_allclose(batch["pose"][0], poses[2], rtol=1e-6)
    np.testing.assert_allclose(batch["pose"][1, :5], poses[0], rtol=1e-6)
    assert batch["pose"][1, 5:].isnan().all() and batch["n_frames"].tolist() == [11, 5]
    assert batch["seconds"].tolist() == pytest.approx([0.44, 0.2])


def distances(pose, frames):
    """How far each point moves in so many frames; NaN where that is not known."""
    moved = pose[frames:] - pose[: len(pose[frames:])]
    return np.linalg.norm(moved.reshape(len(moved), D // 2, 2), axis=-1)


def test_the_losses_are_those_of_plain_numpy():
    model, words = build("gru")
    batch = batch_of(words)
    batch["seconds"][1] *= 2  # a clip that was resampled, of 12.5 frames a second
    model.output.weight.data *= 20  # so that the poses move
    made = model(batch["tokens"], batch["token_mask"], batch["n_frames"])
    poses, logits = made.pose.detach().numpy(), made.confidence.detach().numpy()
    wrong, chances, moved = [], [], np.zeros((4, 2))  # errors and squares of movement
    spans = [(3, 6, 12), (2, 3, 6), (3, 6, 12)]  # frames in .12, .24 and .48 s
    rows = zip(poses, logits, random_poses(), LENGTHS, spans, strict=True)
    for mine, chance, real, n, its_spans in rows:
        wrong += (mine[:n] - real).reshape(-1, 2).tolist()
        parts = [[np.diff(pose, axis=0) for pose in (mine[:n], real)]]
        parts += [[distances(pose, frames) for pose in (mine[:n], real)] for frames in its_spans]
        for sums, (mine_part, real_part) in zip(moved, parts, strict=True):
            sums += np.nansum((mine_part - real_part) ** 2), np.nansum(real_part**2)
        sure = 1 / (1 + np.exp(-chance[:n]))
        chances += np.log(np.where(np.isfinite(real[:, ::2]), sure, 1 - sure)).ravel().tolist()
    variance = (statistics()["std"][:-2] ** 2).mean().item()
    of_pose, mse = loss_of(model, batch)
    distance = np.nanmean(np.linalg.norm(wrong, axis=-1)) / math.sqrt(2 * variance)
    assert mse.item() == pytest.approx(np.nanmean(np.square(wrong)), rel=1e-4)
    assert of_pose.item() == pytest.approx(mse.item() / variance + distance / 2, rel=1e-4)
    apart = [
        loss_of(model, batch, *weights)[0].item() - of_pose.item()
        for weights in ((0.5, 0, 0), (0, 0.5, 0), (0, 0, 0.5))
    ]
    seconds = made.seconds.detach().numpy()
    durations = (np.log(seconds) - batch["seconds"].log().numpy()) ** 2
    errors = moved[:, 0] / moved[:, 1].clip(1e-6)
    assert apart[0] == pytest.approx(0.5 * durations.mean(), rel=1e-3)
    assert apart[1] == pytest.approx(0.5 * (errors[0] + errors[1:].sum() / 2), rel=1e-3)
    assert apart[2] == pytest.approx(-0.5 * np.mean(chances), rel=1e-3)


@names
def test_what_was_never_seen_gives_no_nan(name, bert):
    model, words = build(name, bert)
    unseen = np.full((3, D), np.nan)
    for poses in ([unseen, *random_poses()[:1]], [unseen], [np.zeros((5, D))]):
        clips = clips_of(SENTENCES[: len(poses)], poses).with_tokens(words.tokenizer)
        loss, _ = loss_of(model, clips.batch(torch.arange(len(poses)), CPU), 0.1, 0.2, 0.1)
        assert loss.isfinite() and gradient(model, loss).isfinite().all()


@names
@torch.no_grad()
def test_shapes_and_independence_from_padding(name, bert):
    model, words = build(name, bert)
    tokens, mask = words(SENTENCES)
    n_frames = torch.tensor(LENGTHS)
    wider = torch.nn.functional.pad(tokens, (0, 3)), torch.nn.functional.pad(mask, (0, 3))
    garbage = torch.where(wider[1], wider[0], 4)
    made, padded = model(tokens, mask, n_frames), model(garbage, wider[1], n_frames)
    assert made.pose.shape == (3, FRAMES, D) and made.confidence.shape == (3, FRAMES, D // 2)
    assert made.seconds.shape == (3,) and (made.seconds > 0).all()
    assert made.keys.shape == made.durations.shape == tokens.shape
    for i, n in enumerate(LENGTHS):
        assert (made.pose[i, n:] == 0).all() and (made.pose[i, :n, :-2] != 0).all()
        own, own_mask = words(SENTENCES[i : i + 1])
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


@torch.no_grad()
def test_two_way_gru_begins_its_way_back_at_the_last_real_element():
    gru, x = script.TwoWayGRU(3, 8), torch.randn(2, 6, 3)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    torch.testing.assert_close(gru(x, mask)[0, :4], gru(x[:1, :4], mask[:1, :4])[0])
    changed = x.clone()
    changed[0, 3] += 1  # it reaches the first
    assert ((gru(changed, mask) - gru(x, mask))[0, :4, 4:].abs().amax(-1) > 1e-5).all()


@names
@torch.no_grad()
def test_without_n_frames_the_predicted_duration_counts(name, bert):
    model, words = build(name, bert)
    tokens, mask = words(SENTENCES)
    for seconds_per_gloss in (0.001, 0.07, 9):  # at least one frame, at most FRAMES
        model.seconds_per_gloss.fill_(seconds_per_gloss)
        made = model(tokens, mask)
        n_frames = (made.seconds * 25).round().long().clamp(1, FRAMES)
        assert (made.pose[..., 0] != 0).sum(1).tolist() == n_frames.tolist()
        torch.testing.assert_close(model(tokens, mask, n_frames).pose, made.pose)
        assert (made.durations[mask] > 0).all() and (made.durations[~mask] == 0).all()
        torch.testing.assert_close(made.durations.sum(1), made.seconds)
    assert (n_frames == FRAMES).all()


@pytest.mark.parametrize("name", ["gru", "transformer"])
def test_frames_read_the_glosses_in_their_order(name, monkeypatch):
    """With even durations a frame reads the gloss that has its place."""
    model, words = build(name)
    tokens, mask = words(["hello", "I want go school"])
    signs, states = (made.detach().requires_grad_() for made in model.encoder(tokens, mask))
    monkeypatch.setattr(model.encoder, "forward", lambda *_: (signs, states))
    monkeypatch.setattr(model.decoder, "forward", lambda queries, *_: queries)
    torch.nn.init.zeros_(model.duration[-1].weight)
    torch.nn.init.zeros_(model.plan.move[-1].weight)
    pose = model(tokens, mask, torch.tensor([6, 20])).pose
    read = []
    for t in range(20):
        (of_signs,) = torch.autograd.grad(pose[1, t].square().sum(), signs, retain_graph=True)
        read.append(of_signs[1].norm(dim=-1).argmax().item())
    assert read == sorted(read) and set(read) == {0, 1, 2, 3}
    assert all(read.count(s) + 1 >= 19 / 4 for s in range(4))


def sentences_out_of_order(rng, n):
    """-> tokens (n, 7), the places of their words in signing order (n, 4), -1 after the last."""
    # the last of words 2 to 9 is written second; the article 1 is before some, and not signed
    tokens, orders = torch.zeros(n, 7, dtype=torch.long), torch.full((n, 4), -1)
    for row, order in zip(tokens, orders, strict=True):
        words, text = rng.permutation(range(2, 10))[: rng.integers(2, 5)].tolist(), []
        for word in [words[0], words[-1], *words[1:-1]]:
            text += [1, word] if len(text) < 5 and rng.random() < 0.3 else [word]
        row[: len(text)] = torch.tensor(text)
        order[: len(words)] = torch.tensor([text.index(word) for word in words])
    return tokens, orders


def test_a_plan_learns_another_order_and_passes_over_words_that_are_not_signed():
    """What a time line gives: the signed words, one after the other, each for 1 mean gloss."""
    rng, moment = np.random.default_rng(0), torch.arange(4)
    embedding, plan = torch.nn.Embedding(10, 16), script.Plan(16)
    optimizer = torch.optim.Adam([*embedding.parameters(), *plan.parameters()], 0.01)
    torch.nn.init.eye_(embedding.weight)

    def planned(tokens):
        durations = (tokens != 0) * torch.where(tokens == 1, 0.01, 1.0)
        return *plan(embedding(tokens), durations, tokens != 0), durations

    for _ in range(200):
        tokens, orders = sentences_out_of_order(rng, 16)
        _, order, durations = planned(tokens)
        ends = (order @ durations[..., None]).cumsum(1)
        # who signs in the middle of the i-th stretch?
        near = torch.sigmoid(4 * (ends - moment - 0.5)) * torch.sigmoid(4 * (moment + 1.5 - ends))
        read = (near / near.sum(1, keepdim=True)).mT @ order
        right = read.gather(2, orders.clamp(min=0)[..., None])[..., 0]
        optimizer.zero_grad()
        (-(right + 1e-6).log()[orders >= 0].sum()).backward()
        optimizer.step()
    tokens, orders = sentences_out_of_order(rng, 100)
    found, straight = [], []
    for row, places, order in zip(tokens, planned(tokens)[0].argsort(), orders, strict=True):
        order = order[order >= 0].tolist()
        found.append([place for place in places.tolist() if row[place] > 1] == order)
        straight.append(order == sorted(order))
    assert np.mean(found) > 0.9 and np.mean(straight) < 0.5


@torch.no_grad()
def test_a_plan_begins_with_the_order_of_the_text_and_reads_no_padding():
    plan, states = script.Plan(6), torch.randn(2, 4, 6)
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    keys, order = plan(states, torch.rand(2, 4) * mask, mask)
    torch.testing.assert_close(order.sum(-1), torch.ones(2, 4))
    assert (order[1, :, 2:] == 0).all() and (keys[1, 2:] > 100).all()
    assert keys[0].tolist() == order[0].argmax(-1).tolist() == [0, 1, 2, 3]


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


@pytest.mark.parametrize("name", ["gru", "transformer"])
@torch.no_grad()
def test_a_word_says_the_same_in_every_sentence_and_an_unknown_one_what_its_sentence_says(name):
    model, words = build(name)
    (one, in_one), (other, in_other) = (
        model.encoder(*words([text])) for text in ("go you", "hello go school")
    )
    torch.testing.assert_close(one[0, 0], other[0, 1])
    assert (in_one[0, 0] - in_other[0, 1]).abs().max() > 1e-3
    tokens, mask = words(["xyzzy you", "xyzzy school"])
    signs, states = model.encoder(tokens, mask)
    assert tokens[:, 0].tolist() == [script.UNK] * 2
    assert (signs[0, 0] - signs[1, 0]).abs().max() > 1e-3
    torch.testing.assert_close(signs[:, 0], states[:, 0])


@names
def test_words_are_dropped_or_hidden_in_training_alone(name, bert, monkeypatch):
    model, words = build(name, bert, WORD_DROPOUT=0.3)
    given, forward = [], model.encoder.forward
    layer = model.encoder
    if name == "bert":
        layer, forward = layer.pretrained, layer.pretrained.forward
    monkeypatch.setattr(
        layer, "forward", lambda *x, **y: given.append([*x, *y.values()]) or forward(*x, **y)
    )
    tokens, mask = words(["hello i you want go school", "go"] * 200)
    model.eval()(tokens, mask)
    model.train()(tokens, mask)
    (kept, kept_mask), (changed, changed_mask) = given
    assert torch.equal(kept, tokens) and torch.equal(kept_mask.bool(), mask)
    if name == "bert":  # the pieces stay, and some are hidden from the others
        lost = mask & ~changed_mask.bool()
        assert torch.equal(changed, tokens) and not lost[:, 0].any()
        lost, mask = lost[:, 1:], mask[:, 1:]
    else:
        lost = changed != tokens
        assert (changed[lost] == script.UNK).all()
    assert not lost[~mask].any() and 0.25 < lost[mask].float().mean() < 0.35


@names
@torch.no_grad()
def test_dropout_makes_no_motion(name, bert, monkeypatch):
    """In training, too, frames of the same hidden state have the same pose."""
    model, words = build(name, bert)
    tokens, mask = words(SENTENCES)
    model.train()
    monkeypatch.setattr(model.decoder, "forward", lambda queries, *_: torch.ones_like(queries))
    torch.nn.init.normal_(model.output.weight)
    poses = [model(tokens, mask, torch.full((3,), FRAMES)).pose for _ in range(2)]
    assert poses[0].diff(dim=1).abs().max() < 1e-5 < (poses[0] - poses[1]).abs().max()
    frames = torch.ones(3, 5, 400)
    dropped = model.drop_features(frames)
    assert (dropped == dropped[:, :1]).all() and (dropped[0] != dropped[1]).any()
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0, 1 / 0.7])
    assert torch.equal(model.eval().drop_features(frames), frames)
    assert torch.equal(model(tokens, mask).pose, model(tokens, mask).pose)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_bert_takes_the_weights_of_its_folder_and_trains_in_full_precision(stored, bert, tmp_path):
    own = transformers.AutoModel.from_pretrained(bert).to(stored)
    folder = shutil.copytree(bert, tmp_path / "bert")
    own.save_pretrained(folder)
    model, words = build("bert", folder, MAX_GLOSS_LEN=6)
    loaded = model.encoder.pretrained.state_dict()
    assert len(loaded) > 30
    assert all(torch.equal(x, own.state_dict()[key].float()) for key, x in loaded.items())
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    tokens, mask = words(["Hello, schools!"])  # [CLS] hello school ##s [SEP]
    assert tokens.tolist() == [[2, 5, 10, 16, 3]] and mask.all()
    tokens, mask = words([f"school{'s' * 40}"])  # 43 pieces, of which four are read for each gloss
    assert tokens.shape == (1, 24) and model(tokens, mask).pose.isfinite().all()


def test_an_encoder_gets_words_as_they_are_written_and_glosses_in_lower_case(bert):
    _, words = build("bert", bert)
    for sentence, expected in (
        ("Ich gehe nach Berlin.", ["Ich", "gehe", "nach", "Berlin"]),
        ("Die Straße, bitte!", ["Die", "Straße", "bitte"]),
        ("WANT GO SCHOOL", ["want", "go", "school"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
    ):
        assert script.words_for(words.tokenizer, sentence, 16) == expected
    glosses = script.gloss_tokenizer(VOCABULARY)
    assert script.words_for(glosses, "Die Straße", 16) == ["DIE", "STRASSE"]


def rename_weights(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights = {name.replace("attention", "attn"): value for name, value in weights.items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def make_smaller(folder):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind = transformers.BertConfig(vocab_size=9, intermediate_size=16, **sizes)
    transformers.AutoModel.from_config(kind).save_pretrained(folder)


def remove_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


@pytest.mark.parametrize("spoil", [rename_weights, make_smaller, remove_tokenizer, shutil.rmtree])
def test_an_encoder_that_does_not_serve_is_one_line(spoil, bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "bert")
    spoil(folder)
    line = "^error: BERT_NAME .* is no hub id .* folder with an encoder .*$"
    with pytest.raises(SystemExit, match=line) as error:
        build("bert", str(folder))
    assert "\n" not in str(error.value)


class Fixed(torch.nn.Module):
    """A model that gives known poses; the first token of a sentence is the number of its pose."""

    def __init__(self, poses, seconds, mean):
        super().__init__()
        self.poses, self.seconds, self.mean = poses, seconds, mean
        self.confidence = torch.randn(*poses.shape[:2], poses.shape[2] // 2)

    def forward(self, tokens, token_mask, n_frames=None, longest=None):
        some = tokens[:, 0]
        return script.Signing(
            self.poses[some], self.seconds[some], self.confidence[some], None, None
        )


def answers_of(poses, logits, lengths):
    """What hand_metrics reads of each Generated."""
    parts = poses.unflatten(-1, (-1, 2)).numpy(), logits.sigmoid().numpy(), lengths
    return [SimpleNamespace(pose=x[:n], confidence=y[:n]) for x, y, n in zip(*parts, strict=True)]


def hands_by_hand(poses, targets, likely, seconds):
    """-> path, trembling energy and reach of generated and of real hands, by definition"""
    path, energy, apart = np.zeros(2), np.zeros(2), ([], [])
    for pose, target, shown, lasting in zip(poses, targets, likely, seconds, strict=True):
        rate = len(target) / float(np.float32(lasting))
        offset = np.arange(-math.ceil(0.24 * rate), math.ceil(0.24 * rate) + 1)
        weights = np.exp(-((offset / (0.08 * rate)) ** 2) / 2)
        seen = np.isfinite(target[:, ::2])
        for i, (points, its) in enumerate([(pose, shown), (target, seen)]):
            for k in [*range(42), 51, 52]:
                edges = np.flatnonzero(np.diff(np.r_[0, seen[:, k].astype(int), 0]))
                for first, end in edges.reshape(-1, 2):
                    run, n = points[first:end, 2 * k : 2 * k + 2], end - first
                    if n >= max(8, 0.8 * rate):
                        padded = np.pad(run, ((len(offset) // 2,) * 2, (0, 0)), "edge")
                        smooth = [weights @ padded[t : t + len(offset)] for t in range(n)]
                        steps = np.diff(smooth, axis=0) / weights.sum()
                        path[i] += np.linalg.norm(steps, axis=1).sum()
                        waves = np.fft.rfft((run - run.mean(0)) * np.hanning(n)[:, None], axis=0)
                        energy[i] += (abs(waves[np.fft.rfftfreq(n, 1 / rate) >= 8]) ** 2).sum()
            for hand, arm in ((0, 51), (21, 52)):
                gap = points[:, 2 * hand : 2 * hand + 2] - points[:, 2 * arm : 2 * arm + 2]
                apart[i].extend(np.linalg.norm(gap, axis=1)[its[:, hand] & its[:, arm]])
    return path, energy, [np.percentile(distances, 99) for distances in apart]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_metrics_are_those_of_plain_numpy_at_every_batch_size(batch_size):
    rng, lengths, seconds, k = np.random.default_rng(4), [60, 96, 24], [2.4, 5.0, 0.96], 76
    real = [np.cumsum(rng.normal(0, 0.1, (n, 2 * k)), 0) for n in lengths]  # it moves
    made = rng.normal(0, 0.03, (3, 96, 2 * k)).cumsum(1) + rng.normal(0, 0.02, (3, 96, 2 * k))
    made[:, :30, 2 * 51 : 2 * 53] += 2  # where they are not likely seen, arms leave their hands
    for pose in real:
        pose[rng.random((len(pose), k)).repeat(2, 1) < 0.02] = np.nan
    small(POSE_DIM=2 * k, BATCH_SIZE=batch_size, MAX_FRAMES=96)
    mean = rng.normal(size=2 * k)
    model = Fixed(torch.tensor(made).float(), torch.ones(3), torch.tensor(mean).float())
    model.confidence[:, :30, 51:53] = -1
    clips = clips_of([*"012"], real, seconds).with_tokens(script.gloss_tokenizer([*"012"]))
    metrics = script.evaluate(model, clips, CPU)
    metrics |= final.hand_metrics(answers_of(model.poses, model.confidence, lengths), clips)

    cut = [pose[:n] for pose, n in zip(made, lengths, strict=True)]
    difference = np.concatenate(cut) - np.concatenate(real)
    expected = {
        "val_mse": np.nanmean(difference**2),
        "val_mae": np.nanmean(abs(difference)),
        "mean_pose_mse": np.nanmean((np.concatenate(real) - mean) ** 2),
        "duration_error": np.mean([1.4, 4.0, 0.04]),
    }
    likely = [x[:n] > 0 for x, n in zip(model.confidence.numpy(), lengths, strict=True)]
    shown = [np.isfinite(pose[:, ::2]) for pose in real]
    expected["seen_error"] = np.mean(np.concatenate(likely) != np.concatenate(shown))
    path, energy, reach = hands_by_hand(cut, real, likely, seconds)
    expected |= {"motion": path[0] / path[1], "reach": reach[0] / reach[1]}
    tremble = metrics.pop("tremble")
    assert metrics == pytest.approx(expected, rel=1e-4)
    # by the spectrum of x + iy, in which the highest frequency counts once, and not twice
    assert tremble == pytest.approx(math.sqrt(energy[0] / energy[1]), rel=0.01)


def test_an_arm_goes_to_its_hand_where_the_hand_is_shown():
    """Its elbow goes half as far; the hand itself, and what else there is, stays."""
    small(POSE_DIM=152, MAX_FRAMES=96)
    numbers = {name: torch.zeros(152) for name in ("mean", "std", "seen")}
    model = script.new_model("gru", {**numbers, "seconds_per_gloss": torch.ones(())}, VOCABULARY)[0]
    apart = torch.arange(152.0)
    model.mean.copy_(apart)
    moved = {}
    for logit in (-20, 0, 20):
        torch.nn.init.zeros_(model.confidence.weight)
        torch.nn.init.constant_(model.confidence.bias, logit - math.log(0.001 / 0.999))
        pose, _ = model.points(torch.zeros(1, 1, 16))
        moved[logit] = (pose[0, 0] - apart).unflatten(0, (-1, 2))[:, 0]
    gap = torch.zeros(76)
    gap[51], gap[52] = 0 - 2 * 51, 2 * 21 - 2 * 52
    gap[49], gap[50] = gap[51] / 2, gap[52] / 2
    for logit, share in ((-20, 0), (0, 1 / (1 + math.exp(-2))), (20, 1)):
        torch.testing.assert_close(moved[logit], share * gap, atol=1e-3, rtol=0)


@names
def test_under_mixed_precision_the_plan_the_grus_and_the_pose_are_in_float32(name, bert):
    """bfloat16 would round a pose by more than a hand moves in a frame."""
    model, words = build(name, bert)
    torch.nn.init.normal_(model.output.weight)
    exact = {model.output, model.confidence, model.of_place, model.plan.move}
    exact |= {layer for layer in model.modules() if isinstance(layer, torch.nn.GRU)}
    types = {True: set(), False: set()}
    for layer in model.modules():
        if layer in exact or isinstance(layer, torch.nn.Linear):

            def see(layer, given, made):
                made = made[0] if isinstance(made, tuple) else made
                types[layer in exact] |= {given[0].dtype, made.dtype}

            layer.register_forward_hook(see)
    with torch.autocast("cpu", torch.bfloat16):
        made = model(*words(SENTENCES), torch.tensor(LENGTHS))
    assert {made.pose.dtype, made.confidence.dtype} | types[True] == {torch.float32}
    assert torch.bfloat16 in types[False]


def test_the_motion_of_other_keypoints_is_that_of_all():
    small(POSE_DIM=160, MAX_FRAMES=24)
    target, poses = np.zeros((24, 160)), torch.zeros(1, 24, 160)
    target[8:, 150:152] = [3, 4]  # two points move once, neither of which would be a hand's
    target[16:, 158:] = [6, 8]
    poses[:, 8:, 159] = 3.0
    clips = clips_of(["<pad>"], [target])
    metrics = final.hand_metrics(answers_of(poses, torch.ones(1, 24, 80), [24]), clips)
    assert metrics["motion"] == pytest.approx(3 / 15, rel=0.01) and math.isnan(metrics["reach"])
