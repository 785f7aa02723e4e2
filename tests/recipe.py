"""Compare training recipes on patients that they never saw; makes the table of the README's section "The recipe".

    python tests/recipe.py --data-dir KNEE --out runs --model resnet50 --weights FILE --recipes default 'batch 16' paper

Only train/ is used, so that valid/ stays unseen: it is cut by patient into folds, and in fold k every recipe trains a
network with seed k on the other folds and scores the k-th. A recipe's AUROC and kappa (threshold 0.5) are the means over
the folds; its difference from the first recipe is paired, with a 95 % interval from resampled patients. That interval
holds the sampling of patients, not that of seeds: a difference near its edge is no difference. A name with a + is an
ensemble of recipes; `NAME@flip` also averages with the logit of the mirror image, as the program does by default;
`NAME@unsettled` keeps the statistics of batch normalisation that training left.

With --valid the program itself trains, with seed k and its own choice of the best epoch by val, and valid/ is scored:
for a claim, seldom. Each run is kept in OUT, and what is there already is not run again. Not run by the tests.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mura_anomaly_detection as mura


@dataclass(frozen=True)
class Recipe:
    """Flags that differ from the defaults, and what the program has no flag for because it did not pay."""

    flags: dict[str, Any] = field(default_factory=dict)
    sgd: bool = False  # Nesterov's momentum of 0.9 in the place of AdamW
    beta2: float = 0.999  # of AdamW
    linear: bool = False  # what is left instead of its square
    constant: bool = False  # neither warm-up nor decay
    hold: bool = False  # warm-up, but no decay
    head_lr: float = 1.0  # the head's learning rate, as a multiple of the upper layers'
    lower_lr: float = 1.0  # that of all up to layer2 (ResNet-50)
    clip: float = 0.0  # largest norm of a gradient
    smoothing: float = 0.0  # of labels: this share of each is 0.5
    first_size: float = 1.0  # side of the first epoch's images, as a share; grows to 1 in the middle of the epochs
    ema: float = 0.0  # decay of an exponential moving average of the weights, per step
    tail: float = 0.0  # from this share of the steps on, the mean of the weights is taken (arXiv 1803.05407)
    zoom: float = 0.0  # largest random change of scale, share
    shift: float = 0.0  # largest random shift, share of the side
    bicubic: bool = False  # interpolation of rotated images
    frozen: bool = False  # batch normalisation keeps its statistics
    settled_first: bool = False  # which are taken from radiographs before the training
    sam: float = 0.0  # radius of adaptive sharpness-aware minimisation (arXiv 2102.11600): two gradients a step
    twin: float = 0.0  # weight of the divergence between an image's answer and its mirror image's (arXiv 2106.14448)
    staged: bool = False  # the head sees the means of the last three stages, and starts from a logistic regression


STILL = {"rotation": 0.0, "brightness": 0.0, "contrast": 0.0}
STAGED = Recipe(staged=True, head_lr=0.1)  # Adam moves each of 3,584 standardised inputs' weights by the rate
FOLDS_ONLY = (  # what the program's own training cannot be made to do
    "ema", "tail", "zoom", "shift", "bicubic", "settled_first", "staged",
)
RECIPES = {
    "default": Recipe(),
    "paper": Recipe({name: value for name, value in mura.PAPER_RECIPE.items() if name != "image_size"}),
    "ordinary": Recipe({**STILL, "lr": 1e-4, "batch_size": 16, "weight_decay": 0.0, "settle": 0, "tta": False}, constant=True),
    "flips alone": Recipe(STILL),
    "flips alone, batch 4": Recipe({**STILL, "batch_size": 4}),
    "zoom": Recipe(zoom=0.15, shift=0.05),
    "label smoothing": Recipe(smoothing=0.1),
    "progressive size": Recipe(first_size=0.6),
    "10 epochs": Recipe({"epochs": 10}),
    "15 epochs": Recipe({"epochs": 15}),
    "batch 4": Recipe({"batch_size": 4}),
    "batch 16": Recipe({"batch_size": 16}),
    "lr 1e-4": Recipe({"lr": 1e-4}),
    "lr 6e-4": Recipe({"lr": 6e-4}),
    "linear": Recipe(linear=True),
    "lower layers slower": Recipe(lower_lr=0.3, head_lr=3),
    "SGD": Recipe({"lr": 0.01, "weight_decay": 1e-4}, sgd=True),
    "frozen": Recipe(frozen=True),
    "frozen, settled": Recipe(frozen=True, settled_first=True),
    "three stages": STAGED,
    "three stages, frozen, 1e-4": replace(STAGED, flags={"lr": 1e-4}, frozen=True),
    "three stages, regression alone": replace(STAGED, flags={"epochs": 0}, frozen=True),
    "SAM": Recipe(sam=0.5),
    "mirror": Recipe(twin=1.0),
    "lower layers faster": Recipe(lower_lr=3),
    "mixup": Recipe({"mixup": 0.2}),
    "bicubic": Recipe(bicubic=True),
    "mean of the second half": Recipe(tail=0.5),
    "mean of the second half, no decay": Recipe({"lr": 1.5e-4}, hold=True, tail=0.5),
    "image by image": Recipe({"normalization": "image"}),
    "15 epochs, mixup": Recipe({"epochs": 15, "mixup": 0.2}),
    "batch 16, lr 1e-3": Recipe({"batch_size": 16, "lr": 1e-3}),
    "batch 16, head x10": Recipe({"batch_size": 16}, head_lr=10),
    "batch 16, average": Recipe({"batch_size": 16}, ema=0.98),
    "batch 16, SGD": Recipe({"batch_size": 16, "lr": 0.02, "weight_decay": 1e-4}, sgd=True),
    "batch 16, mixup": Recipe({"batch_size": 16, "mixup": 0.2}),
    "batch 16, clipped": Recipe({"batch_size": 16}, beta2=0.99, clip=1.0),
}


class Candidate(mura.Trainer):
    """The program's trainer, with what a recipe adds."""

    def __init__(self, recipe: Recipe, network: mura.Network, config: mura.Config, *rest: Any) -> None:
        super().__init__(network, config, *rest)
        self.recipe, self.total, self.averaged = recipe, rest[2], None
        own = ("sgd", "beta2", "linear", "constant", "hold", "head_lr", "lower_lr")  # beyond the program
        if any(getattr(recipe, name) != getattr(Recipe(), name) for name in own):
            rates = {"lower": recipe.lower_lr, "upper": 1.0, "head": recipe.head_lr}
            stages = {"lower": network.backbone[:6], "upper": network.backbone[6:], "head": network.head}
            groups = [{"params": list(stages[name].parameters()), "lr": config.lr * rate} for name, rate in rates.items()]
            decay = {"lr": config.lr, "weight_decay": config.weight_decay}
            self.optimizer = (torch.optim.SGD(groups, momentum=0.9, nesterov=True, **decay) if recipe.sgd
                              else torch.optim.AdamW(groups, betas=(0.9, recipe.beta2), **decay))
            self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(self.factor, rest[2]))
        if recipe.ema:
            self.averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
        if recipe.tail:
            self.averaged = AveragedModel(network)

    def factor(self, total: int, step: int) -> float:
        """The learning rate of a step as a share of its peak."""
        if self.recipe.constant:
            return 1.0
        risen = step >= round(self.config.warmup * total)
        if self.recipe.hold and risen:
            return 1.0
        falls = self.recipe.linear and risen
        return mura.quadratic_factor(step, total, self.config.warmup) ** (0.5 if falls else 1)

    def backward(
        self, images: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, drawn: torch.Tensor, count: int,
        own: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.freeze()
        if self.recipe.first_size < 1:
            images = self.shrunk(images)
        labels = labels * (1 - self.recipe.smoothing) + self.recipe.smoothing / 2
        if self.recipe.sam:
            return self.sharpness_aware(images, labels, weights, drawn, count, own)
        if self.recipe.twin:
            return self.with_mirror(images, labels, weights, drawn, count)
        return super().backward(images, labels, weights, drawn, count, own)

    def sharpness_aware(self, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the gradient where the loss is highest nearby, distances measured in shares of each weight."""
        found = super().backward(*given)
        with torch.no_grad():
            moved = [(p, p.clone()) for p in self.network.parameters()]
            norm = torch.stack([(p.abs() * p.grad).norm() for p, _ in moved]).norm()
            for p, _ in moved:
                p += self.recipe.sam * p.square() * p.grad / norm
        self.optimizer.zero_grad()
        super().backward(*given)
        with torch.no_grad():
            for p, before in moved:
                p.copy_(before)
        return found

    def with_mirror(
        self, images: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, drawn: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Learn from each image and its mirror image, and that both have one answer."""
        pixels = self.normalization(mura.augment(mura.to_unit(images), drawn))
        logits = self.forward(torch.cat([pixels, pixels.flip(3)]))
        first, second = logits.chunk(2)
        apart = (torch.sigmoid(first) - torch.sigmoid(second)) * (first - second)  # of two Bernoullis, both ways
        loss = mura.weighted_loss(logits, labels.repeat(2), weights.repeat(2)) / 2 + self.recipe.twin * apart.sum() / 2
        torch.autograd.backward(loss / count)
        return loss.detach().double(), ((first.detach() > 0) == (labels > 0.5)).sum().double()

    def freeze(self) -> None:
        """Where the recipe says so, have batch normalisation keep its statistics."""
        for module in self.network.modules() if self.recipe.frozen else ():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()

    @torch.no_grad()
    def fit_head(self, feed: mura.Feed, labels: np.ndarray) -> None:
        """Start the head of `Staged` from the regression on the training images and their mirror images (arXiv 2202.10054)."""
        self.network.train()
        self.freeze()
        rows: list[list[np.ndarray]] = [[], []]
        for pixels in feed(np.array_split(np.arange(len(labels)), -(-len(labels) // self.config.batch_size))):
            for way, dims in zip(rows, ((), (3,)), strict=True):
                way.append(self.network.pool(self.normalization(mura.to_unit(pixels)).flip(dims)).cpu().numpy())
        pooled = np.concatenate([np.concatenate(way) for way in rows])
        center, spread = pooled.mean(0), np.maximum(pooled.std(0), 1e-4)
        found = LogisticRegression(C=1 / 300, max_iter=1000).fit((pooled - center) / spread, np.tile(labels, 2))
        for target, value in ((self.network.center, center), (self.network.spread, spread),
                              (self.network.head.weight[0], found.coef_[0]), (self.network.head.bias, found.intercept_)):
            target.copy_(torch.from_numpy(value))

    def shrunk(self, images: torch.Tensor) -> torch.Tensor:
        """Images of this epoch's size, a multiple of 16 px."""
        begun = min(1.0, self.progress.epoch / (self.config.epochs / 2))
        share = self.recipe.first_size + (1 - self.recipe.first_size) * begun
        size = 16 * round(images.shape[-1] * share / 16)
        return torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)

    def update(self) -> None:
        if self.recipe.clip:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip)
        super().update()
        if self.averaged and self.schedule.last_epoch >= self.recipe.tail * self.total:
            self.averaged.update_parameters(self.network)


class Staged(mura.Network):
    """A ResNet-50 whose head sees the standardised means of the maps of layer2, layer3 and layer4."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.head = torch.nn.Linear(512 + 1024 + 2048, 1)
        self.register_buffer("center", torch.zeros(self.head.in_features))
        self.register_buffer("spread", torch.ones(self.head.in_features))

    def pool(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images (B, 3, S, S) to the means (B, 3584)."""
        maps = [images]
        for stage in self.backbone:
            maps.append(stage(maps[-1]))
        return torch.cat([stage.mean((2, 3)) for stage in maps[-3:]], 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head((self.pool(images) - self.center) / self.spread)[:, 0]


def zoomed(recipe: Recipe, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Change scale and place of each image, then augment as the program does."""
    draw = 2 * torch.rand(3, len(images), 1) - 1
    matrix = torch.cat([1 + recipe.zoom * draw[0], torch.zeros(len(images), 1), recipe.shift * draw[1],
                        torch.zeros(len(images), 1), 1 + recipe.zoom * draw[0], recipe.shift * draw[2]], 1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return AUGMENT(torch.nn.functional.grid_sample(images, grid, align_corners=False), drawn)


def sharper(images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Augment as the program does, but for the interpolation: bilinear halves what is finest in an image."""
    with mock.patch.object(mura.functional, "grid_sample", partial(GRID_SAMPLE, mode="bicubic")):
        return AUGMENT(images, drawn)


AUGMENT, GRID_SAMPLE = mura.augment, mura.functional.grid_sample


def fold_of(patient: str, folds: int) -> int:
    """Deal patients out to folds by their names alone."""
    return int.from_bytes(hashlib.sha256(f"fold/{patient}".encode()).digest()[:4]) % folds


def train_fold(recipe: Recipe, config: mura.Config, decoded: mura.Decoded, fold: int, folds: int) -> dict[str, Any]:
    """Train on the other folds and give labels, patients and logits of this one: plain, with mirror, unsettled."""
    sides: dict[bool, list[mura.View]] = {True: [], False: []}
    for view in decoded.views:
        sides[fold_of(view.patient, folds) == fold].append(view)
    train, held_out = (mura.MuraDataset(decoded, sides[side]) for side in (False, True))
    arithmetic = mura.choose_arithmetic(mura.choose_device(config.device), config.precision)
    with mock.patch.object(mura, "Network", Staged if recipe.staged else mura.Network):
        network = arithmetic.prepare(mura.build_network(config.model or mura.PAPER_MODEL, config.weights, config.seed))
    normalization = mura.choose_normalization(config.normalization, train)
    steps = config.epochs * -(-len(train) // config.batch_size)
    trainer = Candidate(recipe, network, config, arithmetic, normalization, steps, mura.Processes())
    weights = mura.loss_weights(train.views, mura.class_weights(train.views))
    mura.augment = partial(zoomed, recipe) if recipe.zoom or recipe.shift else sharper if recipe.bicubic else AUGMENT
    feed, given = mura.Feed(train, arithmetic.device), (arithmetic, normalization, config.batch_size)
    if recipe.settled_first:
        mura.settle_statistics(network, feed, *given, config.settle, config.seed)
    if recipe.staged:
        trainer.fit_head(feed, train.labels)
    for _ in range(config.epochs):
        mura.train_epoch(trainer, feed, weights, mura.StopSignals(), lambda stopping: None)
        trainer.end_epoch({"val_accuracy": None, "val_loss": trainer.progress.loss / trainer.progress.seen})
    final = trainer.averaged.module if trainer.averaged else network
    predict = partial(mura.predict_logits, final, mura.Feed(held_out, arithmetic.device), *given)
    unsettled = predict()
    if not recipe.frozen:
        mura.settle_statistics(final, feed, *given, config.settle or 256, config.seed)
    return {"label": held_out.labels, "patient": np.array([view.patient for view in held_out.views]),
            "study": np.array([view.study for view in held_out.views]), "unsettled": unsettled, "plain": predict(),
            "flip": predict(tta=True)}


def train_for_valid(recipe: Recipe, config: mura.Config) -> dict[str, Any]:
    """Run the program's own training, then give labels, patients and logits of valid/: plain and with mirror."""
    with mock.patch.object(mura, "Trainer", partial(Candidate, recipe)):
        mura.train_command(config, mura.StopSignals())
    arithmetic = mura.choose_arithmetic(mura.choose_device(config.device), config.precision)
    member = mura.load_member(config.checkpoint[0], arithmetic)
    views = mura.index_split(config.data_dir, "valid").views
    valid = mura.MuraDataset(mura.open_cache(views, member.image_size, config, config.data_dir, mura.StopSignals()))
    predict = partial(mura.predict_logits, member.network, mura.Feed(valid, arithmetic.device), arithmetic,
                      member.normalization, config.batch_size)
    return {"label": valid.labels, "patient": np.array([view.patient for view in views]),
            "study": np.array([view.study for view in views]), "plain": predict(), "flip": predict(tta=True)}


def run_all(options: argparse.Namespace, shared: dict[str, Any]) -> None:
    """Train what is not in OUT yet, fold by fold, so that a table can be printed early."""
    root = mura.find_data_root(options.data_dir)
    index = mura.index_split(root, "train")
    names = sorted({name for blend in options.recipes for name in blend.partition("@")[0].split("+")}, key=list(RECIPES).index)
    for name in names if options.valid else ():
        if any(getattr(RECIPES[name], item) != getattr(Recipe(), item) for item in FOLDS_ONLY):
            raise SystemExit(f"recipe.py: {name}: not with --valid")
    for fold in range(options.take or options.folds):
        for name in names:
            file = options.out / f"{name}.{fold}.npz"
            if file.exists():
                continue
            config = replace(mura.Config(data_dir=root, seed=fold, **shared), **RECIPES[name].flags)
            began = time.perf_counter()
            if options.valid:
                found = train_for_valid(RECIPES[name], replace(config, checkpoint=(file.with_suffix(".pth"),)))
            else:
                size = mura.choose_image_size(index.views, config.image_size)
                decoded = mura.open_cache(index.views, size, config, root, mura.StopSignals())
                found = train_fold(RECIPES[name], config, decoded, fold, options.folds)
            np.savez(file, **found)
            area = float(mura.auroc(found["label"], found["plain"])[0])
            print(f"{name}, fold {fold}: AUROC {area:.4f} per image, {time.perf_counter() - began:.0f} s", flush=True)


def studies(options: argparse.Namespace, blend: str, fold: int) -> mura.Scored:
    """Load the studies of a fold with the mean probability of the recipes of a blend."""
    names, _, kind = blend.partition("@")
    runs = [np.load(options.out / f"{name}.{fold}.npz") for name in names.split("+")]
    probability = np.mean([mura.sigmoid(run[kind or "plain"]) for run in runs], axis=0)
    run = runs[0]
    part = np.full(len(run["label"]), "all")
    return mura.pool_studies(mura.Scored(tuple(run["study"]), part, run["patient"], run["study"], run["label"], probability))


def resampled(options: argparse.Namespace, blend: str, weights: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over folds of AUROC and kappa for each resample (R,); the first row is the sample itself."""
    areas, kappas = [], []
    for fold in range(options.take or options.folds):
        rows = studies(options, blend, fold)
        _, patient = np.unique(rows.patient, return_inverse=True)
        found = mura.score(rows.label, rows.probability, 0.5, weights[fold][:, patient])
        areas.append(found["auroc"])
        kappas.append(found["kappa"])
    return np.mean(areas, axis=0), np.mean(kappas, axis=0)


def table(options: argparse.Namespace) -> str:
    """Write a Markdown row for each recipe: AUROC, difference from the first, kappa, difference."""
    random, weights = np.random.default_rng(0), []
    for fold in range(options.take or options.folds):
        count = len(np.unique(studies(options, options.recipes[0], fold).patient))
        drawn = [np.bincount(random.integers(count, size=count), minlength=count) for _ in range(2000)]
        weights.append(np.array([np.ones(count), *drawn], dtype=float))
    if options.valid:
        weights = weights[:1] * len(weights)  # all seeds are scored on the same patients
    base = resampled(options, options.recipes[0], weights)
    lines = ["| recipe | AUROC | difference | kappa | difference |", "| --- | --- | --- | --- | --- |"]
    for blend in options.recipes:
        cells = []
        for ours, theirs in zip(resampled(options, blend, weights), base, strict=True):
            gap = ours - theirs
            low, high = np.quantile(gap[1:], [0.025, 0.975])
            cells += [f"{ours[0]:.3f}", "" if blend == options.recipes[0] else f"{gap[0]:+.3f} [{low:+.3f}, {high:+.3f}]"]
        lines.append(f"| {blend} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME")
    parser.add_argument("--valid", action="store_true", help="--folds seeds of the program's own training, scored on valid/")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--take", type=int, help="only the first of the folds, for screening")
    parser.add_argument("--threads", type=int, help="of torch, for two runs side by side")
    parser.add_argument("--table", action="store_true", help="only print the table of what was run")
    for name, kind in (("model", str), ("weights", str), ("image-size", int), ("epochs", int), ("normalization", str),
                       ("lr", float), ("batch-size", int)):
        parser.add_argument(f"--{name}", type=kind, help="as the program's, for all recipes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads or mura.core_count())
    given = ("model", "weights", "image_size", "epochs", "normalization", "lr", "batch_size")
    shared = {name: getattr(options, name) for name in given if getattr(options, name) is not None}
    if not options.table:
        run_all(options, {**shared, "cache_dir": options.out / "cache"})
    print(table(options))


if __name__ == "__main__":
    main()
