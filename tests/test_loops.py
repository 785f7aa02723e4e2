"""Section 8: the loss, the schedule, the optimiser step, and prediction, each against a plain version of itself."""

from __future__ import annotations

import copy
import math
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import PlainNetwork, TinyNetwork
from torch import Tensor, nn

import mura_anomaly_detection as mad

CPU = mad.Arithmetic(torch.device("cpu"), bf16=False, channels_last=False)
GREY = mad.Normalization("given", (0.4,) * 3, (0.2,) * 3)
STILL = {"flip": 0.0, "rotation": 0.0, "brightness": 0.0, "contrast": 0.0}  # no augmentation


def view(label: int, part: str = "XR_HAND", number: int = 0) -> mad.View:
    study = f"{part}/patient{number:05d}/study1_{'positive' if label else 'negative'}"
    return mad.View(f"{study}/image1.png", part, f"patient{number:05d}", study, label)


class Album:
    """Images in memory in the place of a MuraDataset: uint8 noise, brighter where the label is 1."""

    def __init__(self, count: int, seed: int = 0, size: int = 64) -> None:
        random = np.random.default_rng(seed)
        self.labels = random.integers(0, 2, count)
        noise = random.integers(0, 156, (count, 1, size, size)) + 100 * self.labels.reshape(-1, 1, 1, 1)
        self.pixels = torch.from_numpy(noise.astype(np.uint8))
        self.views = tuple(view(int(label), number=i) for i, label in enumerate(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Tensor:
        return self.pixels[torch.from_numpy(indices)]

    def whole(self, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All of it as one batch: images, labels, weights, and no augmentation."""
        weights = torch.from_numpy(np.random.default_rng(seed).uniform(0.2, 0.8, len(self))).float()
        still = mad.draw_variation(mad.Config(**STILL), len(self), 0, 0)
        return self.pixels, torch.from_numpy(self.labels).float(), weights, still


def quiet() -> SimpleNamespace:
    """Stop signals that never come."""
    return SimpleNamespace(signum=0, check=lambda: None)


def make_trainer(network: mad.Network, steps: int = 10, **options: object) -> mad.Trainer:
    torch.manual_seed(0)
    return mad.Trainer(network, mad.Config(**{**STILL, **options}), CPU, GREY, steps, mad.Processes())


@pytest.fixture
def plain() -> PlainNetwork:
    torch.manual_seed(3)
    return PlainNetwork("resnet50")


def gradients(network: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]


def same(left: list[Tensor], right: list[Tensor], tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=tolerance) for a, b in zip(left, right, strict=True))


# ----- the loss ------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    """p = 0.8: an abnormal image of weight 0.6 costs 0.6 log(1/0.8), a normal one of weight 0.4 0.4 log(1/0.2)."""
    logit = math.log(0.8 / 0.2)
    loss = mad.weighted_loss(torch.tensor([logit, logit]), torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.4]))
    assert loss.item() == pytest.approx(0.6 * math.log(1.25) + 0.4 * math.log(5), rel=1e-6)


def test_the_weights_are_those_of_the_paper() -> None:
    """1 abnormal and 3 normal hands: an abnormal one weighs 3/4, a normal one 1/4; elbows go by their own counts."""
    hands = [view(1)] + [view(0)] * 3
    elbows = [view(1, "XR_ELBOW")] * 2 + [view(0, "XR_ELBOW")] * 3
    weights = mad.loss_weights([*hands, *elbows], mad.class_weights([*hands, *elbows]))
    assert weights.tolist() == pytest.approx([0.75, 0.25, 0.25, 0.25, 0.6, 0.6, 0.4, 0.4, 0.4])
    assert weights.dtype == np.float32
    assert mad.loss_weights([view(1, "XR_KNEE")], {}).tolist() == [0.5]


LOGIT, WEIGHT = st.floats(-60, 60, width=32), st.floats(0, 1, width=32)


@given(st.lists(st.tuples(LOGIT, st.booleans(), WEIGHT), min_size=1, max_size=20))
def test_loss_and_gradient_against_numpy(rows: list[tuple[float, bool, float]]) -> None:
    """-w y log p - w (1 - y) log(1 - p), stable where p rounds to 0 or 1; its derivative is w (p - y)."""
    z, y, w = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    logits = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    loss = mad.weighted_loss(logits, torch.tensor(y).float(), torch.tensor(w).float())
    loss.backward()
    expected = (w * (y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z))).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), w * (1 / (1 + np.exp(-z)) - y), rtol=1e-4, atol=1e-6)


def test_the_loss_is_computed_in_fp32_whatever_comes_in() -> None:
    logits = torch.tensor([0.1234567], dtype=torch.bfloat16)
    assert mad.weighted_loss(logits, torch.ones(1), torch.ones(1)).dtype == torch.float32


# ----- the schedule --------------------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.floats(0, 0.9))
def test_the_learning_rate_rises_then_falls_to_zero(total: int, warmup: float) -> None:
    factors = [mad.quadratic_factor(step, total, warmup) for step in range(total + 1)]
    rise = round(warmup * total)
    assert all(0 < factor <= 1 for factor in factors[:total])
    assert max(factors[rise], *factors[:rise], 0) == 1
    assert factors[:rise] == sorted(factors[:rise])
    assert factors[rise:] == sorted(factors[rise:], reverse=True)
    assert factors[total] == pytest.approx(0, abs=1e-12) if rise < total else factors[total] == 1
    assert mad.quadratic_factor(2 * total + 5, total, warmup) == pytest.approx(0, abs=1e-12)
    for step in range(total - rise + 1):
        assert math.sqrt(factors[rise + step]) == pytest.approx(1 - step / max(1, total - rise))


def test_the_trainer_follows_the_schedule(plain: PlainNetwork) -> None:
    trainer = make_trainer(plain, steps=8, lr=0.01, warmup=0.25)
    rates = []
    for _ in range(8):
        rates.append(trainer.lr)
        trainer.update()
    assert rates == pytest.approx([0.01 * mad.quadratic_factor(step, 8, 0.25) for step in range(8)])


def test_plateau_divides_by_ten_when_the_loss_does_not_fall(plain: PlainNetwork) -> None:
    trainer = make_trainer(plain, lr=0.01, schedule="plateau")
    rates = []
    for loss in (0.6, 0.5, 0.55, 0.4):
        trainer.update()
        trainer.end_epoch({"val_loss": loss, "val_accuracy": 0.5})
        rates.append(trainer.lr)
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])


# ----- the optimiser step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network_class", [PlainNetwork, TinyNetwork])
def test_steps_equal_those_of_a_plain_loop(network_class: type[mad.Network]) -> None:
    """Three steps by hand: mean of the weighted losses, AdamW of torch, the rate of the schedule."""
    torch.manual_seed(5)
    network = network_class("resnet50").train()
    twin = copy.deepcopy(network)
    album = Album(12)
    images, labels, weights, drawn = album.whole()
    trainer = make_trainer(network, steps=3, lr=0.01, weight_decay=0.1, warmup=0.3)
    optimizer = torch.optim.AdamW(twin.parameters(), weight_decay=0.1)
    for step in range(3):
        loss_sum, correct = trainer.backward(images, labels, weights, drawn, len(album))
        trainer.update()
        logits = twin((images.expand(-1, 3, -1, -1) / 255 - 0.4) / 0.2)
        p = torch.sigmoid(logits)
        loss = (weights * -(labels * p.log() + (1 - labels) * (1 - p).log())).sum()
        assert loss_sum.item() == pytest.approx(loss.item(), rel=1e-5)
        assert correct.item() == int(((p > 0.5) == (labels == 1)).sum())
        optimizer.param_groups[0]["lr"] = 0.01 * mad.quadratic_factor(step, 3, 0.3)
        optimizer.zero_grad()
        (loss / len(album)).backward()
        optimizer.step()
    assert same(list(network.state_dict().values()), list(twin.state_dict().values()), 1e-5)


@pytest.mark.parametrize("count", [7, 8])
@pytest.mark.parametrize("parts", [2, 3, 8, 50])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(plain: PlainNetwork, parts: int, count: int) -> None:
    album = Album(count)
    whole = make_trainer(copy.deepcopy(plain), accumulate=1)
    pieces = make_trainer(plain, accumulate=parts)
    expected, found = whole.backward(*album.whole(), count), pieces.backward(*album.whole(), count)
    assert any(bool(g.abs().max() > 1e-4) for g in gradients(whole.network))
    assert same(gradients(pieces.network), gradients(whole.network))
    assert [value.item() for value in found] == pytest.approx([value.item() for value in expected], rel=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_mixup_by_hand(plain: PlainNetwork, parts: int) -> None:
    """arXiv 1710.09412: pixels and losses of an image and the next one are blended by one share; parts change nothing."""
    album, share = Album(5), 0.7
    images, labels, weights, drawn = album.whole()
    twin = copy.deepcopy(plain)
    loss_sum, correct = make_trainer(plain, accumulate=parts).backward(images, labels, weights, drawn, 5, share)
    logits, expected = [], torch.zeros(())
    for i in range(5):
        other = (i + 1) % 5
        blend = (share * images[i].float() + (1 - share) * images[other].float()) / 255
        logits.append(twin(((blend - 0.4) / 0.2).expand(1, 3, -1, -1))[0])
        for at, part in ((i, share), (other, 1 - share)):
            p = torch.sigmoid(logits[i])
            expected = expected - part * weights[at] * (p if labels[at] else 1 - p).log()
    assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert correct.item() == sum(bool(logit > 0) == bool(label) for logit, label in zip(logits, labels, strict=True))
    (expected / 5).backward()
    assert any(bool(g.abs().max() > 1e-4) for g in gradients(twin))
    assert same(gradients(plain), gradients(twin))


def test_mixup_blends_the_varied_images(plain: PlainNetwork) -> None:
    """Each is flipped, turned and changed by itself before."""
    album, seen, forward = Album(4), [], plain.forward
    images, labels, weights, _ = album.whole()
    drawn = mad.draw_variation(mad.Config(rotation=30), 4, 0, 0)
    plain.forward = lambda inputs: seen.append(inputs) or forward(inputs)
    make_trainer(plain).backward(images, labels, weights, drawn, 4, 0.6)
    varied = mad.augment(mad.to_unit(images), drawn)
    torch.testing.assert_close(seen[0], GREY(0.6 * varied + 0.4 * varied[[1, 2, 3, 0]]))


def test_the_shares_of_two_processes_add_up_to_the_whole(plain: PlainNetwork) -> None:
    """DDP averages gradients: each share is scaled so that the mean is the gradient of the global batch."""
    album, world = Album(7), 2
    whole = make_trainer(copy.deepcopy(plain))
    whole.backward(*album.whole(), 7)
    shares = []
    for rank in range(world):
        trainer = make_trainer(copy.deepcopy(plain))
        trainer.processes = mad.Processes(rank, world)
        trainer.backward(*(values[rank::world] for values in album.whole()), 7)
        shares.append(gradients(trainer.network))
    assert same([torch.stack(pair).mean(0) for pair in zip(*shares, strict=True)], gradients(whole.network))


def test_parts_bound_the_memory_of_augmentation(plain: PlainNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit as a whole is never made as a whole, mixed or not."""
    sizes: list[int] = []
    augment = mad.augment
    monkeypatch.setattr(mad, "augment", lambda images, drawn: sizes.append(len(images)) or augment(images, drawn))
    for own in (1.0, 0.8):
        make_trainer(plain, accumulate=3).backward(*Album(7).whole(), 7, own)
    assert sizes == [3, 2, 2, 3, 3, 2, 2, 2, 2]


def short_of_memory(monkeypatch: pytest.MonkeyPatch, network: mad.Network, fits: int, after: int = 0) -> list[int]:
    """Let the network fail as CUDA does for more than `fits` images, after some calls; gives the sizes of all calls."""
    sizes: list[int] = []
    forward = network.forward

    def limited(images: Tensor) -> Tensor:
        sizes.append(len(images))
        if len(images) > fits and len(sizes) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(images)

    monkeypatch.setattr(network, "forward", limited)
    return sizes


@pytest.mark.parametrize("after", [0, 1])
def test_short_memory_halves_the_parts_and_keeps_the_batch(
    plain: PlainNetwork, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], after: int
) -> None:
    """What a part before the failure has left in the gradients does not count twice."""
    album = Album(12)
    whole = make_trainer(copy.deepcopy(plain))
    whole.backward(*album.whole(), 12)
    sizes = short_of_memory(monkeypatch, plain, 3, after)
    trainer = make_trainer(plain, accumulate=2)
    trainer.backward(*album.whole(), 12)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("computed in ")[2].partition(" (")[0] for line in lines] == ["4 parts of at most 3 images"]
    assert sizes[-4:] == [3, 3, 3, 3]
    assert trainer.accumulate == 4
    assert same(gradients(plain), gradients(whole.network))
    trainer.backward(*album.whole(), 12)
    assert capsys.readouterr().err == "", "the next batch is cut as the last one, without another word"


def test_the_parts_named_are_the_parts_computed(
    plain: PlainNetwork, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = short_of_memory(monkeypatch, plain, 1)
    make_trainer(plain).backward(*Album(5).whole(), 5)
    assert [line.partition("computed in ")[2].partition(" (")[0] for line in capsys.readouterr().err.splitlines()] == [
        "2 parts of at most 3 images", "4 parts of at most 2 images", "5 parts of at most 1 images"]
    assert sizes[-5:] == [1] * 5


def test_one_image_that_does_not_fit_is_one_line(plain: PlainNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, plain, 0)
    with pytest.raises(mad.UserError, match="out of memory on cpu: use a smaller --image-size") as caught:
        make_trainer(plain).backward(*Album(4).whole(), 4)
    assert caught.value.exit_code == mad.EXIT_FAILED


def test_among_processes_short_memory_is_an_advice(plain: PlainNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process cannot change its parts alone: the others would wait for it."""
    short_of_memory(monkeypatch, plain, 1)
    trainer = make_trainer(plain)
    trainer.processes = mad.Processes(0, 2)
    with pytest.raises(mad.UserError, match="use --accumulate 2"):
        trainer.backward(*Album(4).whole(), 8)


def test_a_trainer_continues_from_its_state(plain: PlainNetwork) -> None:
    album = Album(6)
    first = make_trainer(plain, lr=0.01)
    for _ in range(2):
        first.backward(*album.whole(), 6)
        first.update()
    torch.manual_seed(99)
    second = make_trainer(PlainNetwork("resnet50"), lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for trainer in (first, second):
        trainer.backward(*album.whole(), 6)
        trainer.update()
    assert first.lr == second.lr
    assert all(torch.equal(a, b) for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True))


# ----- an epoch ------------------------------------------------------------------------------------------------------


def run_epoch(
    trainer: mad.Trainer, album: Album, batch_size: int, stop: object = None, after: object = lambda stopping: None
) -> None:
    trainer.config = replace(trainer.config, batch_size=batch_size, seed=4)
    feed = mad.Feed(album, CPU.device)
    mad.train_epoch(trainer, feed, np.full(len(album), 0.5, np.float32), stop or quiet(), after)


def test_an_epoch_sees_every_image_once(plain: PlainNetwork) -> None:
    album, trainer = Album(11), make_trainer(plain)
    seen: list[Tensor] = []
    backward = trainer.backward
    trainer.backward = lambda images, *rest: seen.append(images) or backward(images, *rest)
    run_epoch(trainer, album, 4)
    assert [len(images) for images in seen] == [4, 4, 3]
    found = sorted(images.numpy().tobytes() for images in torch.cat(seen))
    assert found == sorted(images.numpy().tobytes() for images in album.pixels)
    progress = trainer.progress
    assert (progress.batch, progress.seen) == (3, 11)
    assert 0 <= progress.correct <= 11
    assert progress.loss > 0


def test_no_two_images_are_varied_alike(plain: PlainNetwork) -> None:
    """Neither within a batch, nor from batch to batch, nor from epoch to epoch."""
    trainer, drawn = make_trainer(plain, rotation=10.0), []
    backward = trainer.backward
    trainer.backward = lambda *arguments: drawn.append(arguments[3]) or backward(*arguments)
    for trainer.progress.epoch in range(2):
        trainer.progress.batch = 0
        run_epoch(trainer, Album(8), 4)
    angles = torch.cat(drawn)[:, 1]
    assert len(angles) == len(angles.unique()) == 16


def test_an_epoch_draws_the_share_of_mixup_for_each_batch(plain: PlainNetwork) -> None:
    trainer, shares = make_trainer(plain, mixup=0.4), []
    backward = trainer.backward
    trainer.backward = lambda *arguments: shares.append(arguments[5]) or backward(*arguments)
    run_epoch(trainer, Album(11), 4)
    assert shares == [mad.draw_own_share(trainer.config, 0, batch) for batch in range(3)]
    assert len(set(shares)) == 3


def test_a_signal_stops_after_the_batch_in_hand(plain: PlainNetwork) -> None:
    album, trainer, stop = Album(12), make_trainer(plain), quiet()
    stop.check = lambda: (_ for _ in ()).throw(mad.Stopped(stop.signum)) if stop.signum else None

    def after(stopping: bool) -> None:
        assert stopping == (stop.signum != 0)
        stop.check()
        if trainer.progress.batch == 1:
            stop.signum = signal.SIGTERM

    with pytest.raises(mad.Stopped) as caught:
        run_epoch(trainer, album, 4, stop, after)
    assert trainer.progress.batch == 2
    assert caught.value.exit_code == 143


def test_processes_stop_only_together(plain: PlainNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that came after the processes have compared notes waits for the next batch; another's is obeyed."""
    album, trainer, stop = Album(16), make_trainer(plain), quiet()
    trainer.processes = mad.Processes(0, 2)
    told: list[tuple[bool, int]] = []

    def total(self: mad.Processes, values: Tensor) -> list[float]:
        sums = values.tolist()
        if not stop.signum:
            stop.signum = signal.SIGINT  # just too late
        return sums

    monkeypatch.setattr(mad.Processes, "total", total)
    run_epoch(trainer, album, 4, stop, lambda stopping: told.append((stopping, stop.signum)))
    assert told == [(False, signal.SIGINT)] + [(True, signal.SIGINT)] * 3
    told.clear()
    trainer.progress.batch, stop.signum = 2, 0
    monkeypatch.setattr(mad.Processes, "total", lambda self, values: [*values.tolist()[:3], signal.SIGTERM])
    run_epoch(trainer, album, 4, stop, lambda stopping: told.append((stopping, stop.signum)))
    assert told == [(True, signal.SIGTERM)] * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_no_weight_and_names_the_files(
    plain: PlainNetwork, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    album, trainer = Album(9), make_trainer(plain, lr=0.01)
    before: list[Tensor] = []
    backward = trainer.backward

    def poisoned(*arguments: object) -> tuple[Tensor, Tensor]:
        loss, correct = backward(*arguments)
        if trainer.progress.batch == 1:
            before.extend(p.detach().clone() for p in plain.parameters())
            loss = loss + bad
        return loss, correct

    monkeypatch.setattr(trainer, "backward", poisoned)
    with pytest.raises(mad.UserError, match="the loss is not finite in epoch 1") as caught:
        run_epoch(trainer, album, 3)
    assert caught.value.exit_code == mad.EXIT_FAILED
    batch = mad.epoch_batches(9, 3, seed=4, epoch=0)[1]
    assert {i for i in range(9) if f"patient{i:05d}/" in str(caught.value)} == set(batch.tolist())
    assert all(torch.equal(a, b) for a, b in zip(before, plain.parameters(), strict=True))
    assert trainer.progress.batch == 1


def test_more_processes_than_images_in_a_batch_is_refused(plain: PlainNetwork) -> None:
    trainer = make_trainer(plain)
    trainer.processes = mad.Processes(0, 4)
    with pytest.raises(mad.UserError, match="--batch-size 3: too small for 4 processes"):
        run_epoch(trainer, Album(9), 3)


# ----- statistics of batch normalisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [12, 5])
def test_settled_statistics_are_those_of_the_images_as_they_are(batch_size: int) -> None:
    """By hand, whatever training left: the mean over the batches of each batch's mean and (unbiased) variance."""
    network, album, done = TinyNetwork("resnet50"), Album(12), []
    trainer = make_trainer(network, rotation=90.0, brightness=0.5, contrast=0.5)
    run_epoch(trainer, album, 4)
    weights = [p.detach().clone() for p in network.parameters()]
    mad.settle_statistics(network, mad.Feed(album, CPU.device), CPU, GREY, batch_size, 100, seed=3, tick=done.append)
    assert sum(done) == 12
    assert same(weights, list(network.parameters()), 0)
    convolution, norm = network.backbone[:2]
    assert norm.momentum == 0.1
    order = np.random.default_rng([mad.STATISTICS, 3]).permutation(12)
    with torch.no_grad():
        maps = [convolution(GREY(mad.to_unit(album.batch(part)))) for part in np.array_split(order, -(-12 // batch_size))]
    mean, variance = (torch.stack([getattr(part, name)((0, 2, 3)) for part in maps]).mean(0) for name in ("mean", "var"))
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


def test_some_images_settle_the_statistics_and_the_seed_says_which() -> None:
    found, done = [], []
    for seed in (0, 0, 1):
        network = TinyNetwork("resnet50")
        network.load_state_dict({name: torch.ones_like(value) for name, value in network.state_dict().items()})
        nn.init.normal_(network.backbone[0].weight, generator=torch.Generator().manual_seed(0))
        mad.settle_statistics(network, mad.Feed(Album(40), CPU.device), CPU, GREY, 4, 8, seed, done.append)
        found.append(network.backbone[1].running_mean.clone())
    assert done == [4] * 6
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(("network_class", "images"), [(PlainNetwork, 4), (TinyNetwork, 0)])
def test_without_batch_normalisation_or_images_nothing_changes(network_class: type[mad.Network], images: int) -> None:
    network = network_class("resnet50")
    before = [value.clone() for value in network.state_dict().values()]
    feed = mad.Feed(Album(4), CPU.device)
    mad.settle_statistics(network, feed, CPU, GREY, 4, images, 0, lambda count: pytest.fail("looked at images"))
    assert all(map(torch.equal, before, network.state_dict().values()))


# ----- prediction ----------------------------------------------------------------------------------------------------


@pytest.fixture
def settled() -> TinyNetwork:
    """A network whose batch normalisation has running statistics of its own."""
    torch.manual_seed(2)
    network = TinyNetwork("resnet50").train()
    network(torch.randn(32, 3, 64, 64))
    return network


def one_by_one(network: mad.Network, album: Album, tta: bool) -> list[float]:
    network.eval()
    logits = []
    with torch.no_grad():
        for image in album.pixels:
            x = ((image / 255 - 0.4) / 0.2).expand(1, 3, -1, -1)
            logits.append(network(x).item() if not tta else (network(x).item() + network(x.flip(-1)).item()) / 2)
    return logits


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_prediction_equals_one_image_at_a_time(settled: TinyNetwork, batch_size: int, tta: bool) -> None:
    album, ticks = Album(10), []
    found = mad.predict_logits(settled, mad.Feed(album, CPU.device), CPU, GREY, batch_size, tta=tta, tick=ticks.append)
    np.testing.assert_allclose(found, one_by_one(settled, album, tta), rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float64
    assert sum(ticks) == 10


def test_mirroring_matters_to_this_network(settled: TinyNetwork) -> None:
    """Without it the comparison above would not tell --tta from its absence."""
    album = Album(10)
    assert not np.allclose(one_by_one(settled, album, False), one_by_one(settled, album, True), atol=1e-4)


def test_nothing_to_predict_is_an_empty_answer(settled: TinyNetwork) -> None:
    assert mad.predict_logits(settled, mad.Feed(Album(0), CPU.device), CPU, GREY, 8).shape == (0,)


def exchange(monkeypatch: pytest.MonkeyPatch, lists: list[list[np.ndarray]]) -> None:
    """Let all_gather_object hand out these lists, as if each process had sent its own."""
    monkeypatch.setattr(mad.dist, "all_gather_object", lambda into, mine: into.__setitem__(slice(None), lists))


def test_gather_interleaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The i-th item of process r becomes item i * world + r, also where the last round is not full."""
    a, b, c, d, e = (np.array([i]) for i in range(5))
    exchange(monkeypatch, [[a, d], [b, e], [c]])
    assert [int(item[0]) for item in mad.Processes(0, 3).gather([a, d])] == [0, 1, 2, 3, 4]
    exchange(monkeypatch, [[a], [], []])
    assert [int(item[0]) for item in mad.Processes(2, 3).gather([])] == [0]
    assert mad.Processes().gather([b, a]) == [b, a]


@pytest.mark.parametrize(("world", "count"), [(2, 10), (3, 10), (3, 7), (4, 3)])
def test_any_number_of_processes_predicts_each_image_once(
    settled: TinyNetwork, monkeypatch: pytest.MonkeyPatch, world: int, count: int
) -> None:
    album = Album(count)
    shares: list[list[np.ndarray]] = []
    monkeypatch.setattr(mad.Processes, "gather", lambda self, mine: shares.append(mine) or mine)
    for rank in range(world):
        mad.predict_logits(settled, mad.Feed(album, CPU.device), CPU, GREY, 2, processes=mad.Processes(rank, world))
    assert sum(len(batch) for share in shares for batch in share) == count
    monkeypatch.undo()
    exchange(monkeypatch, shares)
    whole = np.concatenate(mad.Processes(0, world).gather(shares[0]))
    np.testing.assert_allclose(whole, one_by_one(settled, album, False), rtol=1e-5, atol=1e-6)


def test_sigmoid_is_exact_and_does_not_overflow() -> None:
    z = np.array([-1e4, -3.0, 0.0, 3.0, 1e4])
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_allclose(mad.sigmoid(z), [0, 1 / (1 + math.e**3), 0.5, 1 / (1 + math.e**-3), 1], atol=1e-15)
    assert mad.sigmoid(np.array([2.0]), 4.0) == pytest.approx(mad.sigmoid(np.array([0.5])))
