"""Measure how near the program comes to its hardware, and print a table of ratios.

    python tests/benchmark.py --quick                     # small images: under three minutes on two cores
    python tests/benchmark.py                             # the paper's network at 320 px
    python tests/benchmark.py --only train-step predict   # some rows
    python tests/benchmark.py --quick --json speed.json   # the figures also as JSON

Each row sets the program against something that anybody can run, on phantom radiographs, with random weights. The two take
turns in one run and the ratio is the median over these rounds, so that what else the machine does hits both alike; a first
turn, in which memory is allocated and kernels are chosen, does not count. pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

SCRIPT = Path(__file__).resolve().parent.parent / "mura_anomaly_detection.py"
sys.path.insert(0, str(SCRIPT.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision import transforms  # noqa: E402

import mura_anomaly_detection as mura  # noqa: E402

IMAGENET = mura.Normalization("imagenet")


class PlainImages(torch.utils.data.Dataset[tuple[Tensor, float]]):
    """Images as most loops read them: opened, scaled and varied one by one in worker processes."""

    def __init__(self, records: Sequence[mura.ImageRecord], size: int, *, training: bool) -> None:
        self.records = records
        varied = (
            [transforms.RandomHorizontalFlip(), transforms.RandomRotation(30)] if training else []
        )
        normalized = [transforms.ToTensor(), transforms.Normalize(IMAGENET.mean, IMAGENET.std)]
        self.transform = transforms.Compose([transforms.Resize((size, size)), *varied, *normalized])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        record = self.records[index]
        return self.transform(Image.open(record.path).convert("RGB")), float(record.label)


class PlainLoop:
    """The ordinary loop: loaders whose workers stay alive, fp32, NCHW, eager, Adam, PyTorch's own settings.

    It lives in a process of its own (see `Bench.ordinary`), so that no setting of the program reaches it.
    """

    made: PlainLoop

    def __init__(
        self,
        records: Sequence[mura.ImageRecord],
        model: str,
        size: int,
        batch: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.network = getattr(torchvision.models, model)(num_classes=1).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-4)
        self.loader = {
            training: torch.utils.data.DataLoader(
                PlainImages(records, size, training=training),
                batch,
                shuffle=training,
                num_workers=min(mura.core_count(), 16),
                persistent_workers=True,
                pin_memory=device.type == "cuda",
            )
            for training in (True, False)
        }

    @classmethod
    def make(cls, *arguments: Any) -> None:
        cls.made = cls(*arguments)

    @classmethod
    def epoch(cls, training: bool) -> None:
        loop = cls.made
        loop.network.train(training)
        with torch.set_grad_enabled(training):
            for images, labels in loop.loader[training]:
                logits = loop.network(images.to(loop.device, non_blocking=True))[:, 0]
                if training:
                    truth = labels.to(loop.device).float()
                    loss = nn.functional.binary_cross_entropy_with_logits(logits, truth)
                    loop.optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    loop.optimizer.step()
                    loss.item()
                else:
                    logits.sigmoid().cpu()


class Bench:
    """What the rows share: options, device, phantoms, trainer; each made when it is first needed."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.folder, self.rounds, quick = folder, options.rounds, options.quick
        self.device = mura.choose_device(options.device)
        self.hardware = mura.choose_precision(self.device, "auto")
        cuda = self.device.type == "cuda"
        self.model = options.model or ("resnet50" if quick else "densenet169")
        self.size = options.size or ((128 if cuda else 96) if quick else 320)
        self.batch = options.batch_size or (64 if cuda else 16)
        self.steps = (16 if cuda else 3) if quick else (40 if cuda else 6)  # of an epoch
        self.config = mura.Config(
            image_size=self.size,
            batch_size=self.batch,
            tta=False,
            checkpoint=(folder / "bench.pth",),
        )
        self.caches = (folder / f"cache-{i}" for i in range(1000))

    def clock(self, work: Callable[[], object]) -> float:
        """Time a call in seconds, with all that it leaves to do on the device."""
        wait = (
            partial(torch.cuda.synchronize, self.device)
            if self.device.type == "cuda"
            else lambda: None
        )
        wait()
        began = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - began

    def versus(
        self, ours: Callable[[], object], other: Callable[[], object], rounds: int = 0
    ) -> tuple[float, float, float]:
        """Give the median of other / ours (above 1: ours is faster), and the median seconds of ours and other."""
        for side in (ours, other):
            side()
        both = [(self.clock(ours), self.clock(other)) for _ in range(rounds or self.rounds)]
        return (
            median(b / a for a, b in both),
            median(a for a, _ in both),
            median(b for _, b in both),
        )

    def rates(self, *seconds: float) -> str:
        return (
            " : ".join(f"{self.batch * self.steps / value:.1f}" for value in seconds) + " images/s"
        )

    @cached_property
    def root(self) -> Path:
        """Phantoms, larger than the network's input by as much as MURA's 512 px are larger than 320."""
        studies, side = self.batch * self.steps // 2 + 1, round(1.6 * self.size)
        return mura.write_phantoms(
            self.folder / "phantoms", studies, 2, ("XR_FOREARM", "XR_HUMERUS"), 0, side
        )

    @cached_property
    def scan(self) -> mura.Scan:
        """As many images as fill all batches of an epoch."""
        scan = mura.scan_split(self.root, "train")
        return replace(scan, records=scan.records[: self.batch * self.steps])

    @cached_property
    def trainer(self) -> mura.Trainer:
        """The program's trainer as --data-dir sets it up, cache warm."""
        caches = mura.decode_scan(self.scan, self.size, "stretch", next(self.caches), 0)
        train, val = mura.MuraDataset(caches), mura.MuraDataset(caches[:4])
        torch.manual_seed(0)
        return mura.Trainer(
            self.config,
            mura.Network(self.model),
            train,
            val,
            self.hardware,
            mura.Distributed(),
            mura.StopSignals(),
            {},
        )

    @cached_property
    def ordinary(self) -> ProcessPoolExecutor:
        given = (self.scan.records, self.model, self.size, self.batch, self.device)
        return ProcessPoolExecutor(
            1, get_context("spawn"), initializer=PlainLoop.make, initargs=given
        )

    def ordinary_epoch(self, *, training: bool) -> None:
        self.ordinary.submit(PlainLoop.epoch, training).result()

    def epoch(self) -> None:
        """Train an epoch as the program does."""
        self.trainer.train_epoch()
        self.trainer.state = mura.TrainState([*self.trainer.state.history, {}])

    def synthetic_epoch(self) -> None:
        """Take as many steps on one batch that is on the device already."""
        trainer, size = self.trainer, (self.batch, 1, self.size, self.size)
        trainer.network.train()
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, device=self.device)
        for _ in range(self.steps):
            trainer.backward(np.arange(self.batch), pixels)
            trainer.scaler.step(trainer.optimizer)
            trainer.scaler.update()
            trainer.optimizer.zero_grad()
            trainer.learning_rate()

    @cached_property
    def large_root(self) -> Path:
        """40,005 paths in MURA's layout and lists, all links to one tiny image."""
        root, pixel, kinds = (
            self.folder / "large",
            self.folder / "pixel.png",
            ("negative", "positive"),
        )
        Image.new("L", (8, 8), 7).save(pixel)
        studies = [
            f"train/XR_PART{i % 7}/patient{i // 2:05d}/study{i % 2 + 1}_{kinds[i % 3 == 0]}"
            for i in range(13335)
        ]
        images = [f"{study}/image{view}.png" for study in studies for view in (1, 2, 3)]
        for study in studies:
            (root / study).mkdir(parents=True)
        for image in images:
            os.link(pixel, root / image)
        labels = "".join(
            f"MURA-v1.1/{study}/,{int(study.endswith('positive'))}\n" for study in studies
        )
        (root / "train_labeled_studies.csv").write_text(labels)
        (root / "train_image_paths.csv").write_text(
            "".join(f"MURA-v1.1/{image}\n" for image in images)
        )
        return root

    def run(self, *command: object) -> float:
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, check=False, cwd=self.folder
        )
        return time.perf_counter() - began


Measured = tuple[float, str, str]  # the figure, the figure as shown, in absolute terms


def train_step(bench: Bench) -> Measured:
    """Training epoch, cache warm | the same steps on one batch on the device | CPU 0.97x, CUDA 0.95x."""
    ratio, *seconds = bench.versus(bench.epoch, bench.synthetic_epoch)
    return ratio, f"{ratio:.3f}x", bench.rates(*seconds)


def train_loop(bench: Bench) -> Measured:
    """Training epoch, cache warm | ordinary loop | CPU 1.0x, with bf16 units 1.7x, H200 4x."""
    ratio, *seconds = bench.versus(bench.epoch, partial(bench.ordinary_epoch, training=True))
    return ratio, f"{ratio:.2f}x", bench.rates(*seconds)


def score_loop(bench: Bench) -> Measured:
    """Scoring a split | ordinary loop | CPU with bf16 units 3x, H200 4x."""
    trainer = bench.trainer
    ensemble = mura.Ensemble([trainer.as_model()], bench.hardware)
    given = ([trainer.train_set], bench.batch, mura.Distributed(), lambda count: None)
    trainer.network.eval()
    ratio, *seconds = bench.versus(
        lambda: ensemble.predict_dataset(*given), partial(bench.ordinary_epoch, training=False)
    )
    return ratio, f"{ratio:.2f}x", bench.rates(*seconds)


def first_pass(bench: Bench) -> Measured:
    """First pass: decode and cache, 512 to 320 px | PIL decode and resize, one thread | 0.9 x cores."""
    root = mura.write_phantoms(bench.folder / "512", 60, 2, ("XR_FOREARM",), 1, 512)
    scan = mura.scan_split(root, "train")
    records = scan.records * 3  # enough that what is done once a cache file does not count
    scan = replace(scan, records=records)

    def other() -> None:
        for record in records:
            image = Image.open(record.path).convert("L")
            np.asarray(image.resize((320, 320), Image.Resampling.BILINEAR))

    ratio, ours, _ = bench.versus(
        lambda: mura.decode_scan(scan, 320, "stretch", next(bench.caches), 0), other, 5
    )
    of_cores = ratio / mura.core_count()
    return of_cores, f"{ratio:.2f}x = {of_cores:.2f} x cores", f"{len(records) / ours:.0f} images/s"


def second_start(bench: Bench) -> Measured:
    """Second start: open the cache | first start: decode | nothing decoded again."""
    full = next(bench.caches)
    decode = partial(mura.decode_scan, bench.scan, bench.size, "stretch", workers=0)
    decode(folder=full)
    with mock.patch.object(mura, "read_radiograph", side_effect=AssertionError("decoded again")):
        decode(folder=full)
    ratio, ours, other = bench.versus(
        lambda: decode(folder=full), lambda: decode(folder=next(bench.caches))
    )
    shown = f"{ours * 1e3:.0f} : {other * 1e3:.0f} ms, {len(bench.scan.records)} images"
    return ratio, f"{ratio:.0f}x, none decoded again", shown


def open_large(bench: Bench) -> Measured:
    """Second start: open the cache of 40,005 images | - | 0.5 s."""
    scan, folder = mura.scan_split(bench.large_root, "train"), next(bench.caches)
    blank = mura.Radiograph(np.zeros((16, 16), np.uint8))
    with mock.patch.object(mura, "read_radiograph", lambda path: blank):  # the rest is real
        mura.decode_scan(scan, 16, "stretch", folder, 0)
    times = [
        bench.clock(lambda: mura.decode_scan(scan, 16, "stretch", folder, 0)) for _ in range(5)
    ]
    return median(times), f"{median(times):.2f} s", ""


def index_large(bench: Bench) -> Measured:
    """Scan 40,005 paths | - | 2 s."""
    root = bench.large_root
    seconds = median(bench.clock(lambda: mura.scan_split(root, "train")) for _ in range(3))
    return seconds, f"{seconds:.2f} s", ""


def start_up(bench: Bench) -> Measured:
    """--help, and a mistyped flag | python -c pass | +0.15 s."""
    rounds = [
        [
            bench.run(*given)
            for given in ((SCRIPT, "--help"), (SCRIPT, "--epoch", 3), ("-c", "pass"))
        ]
        for _ in range(7)
    ]
    more, typing = (median(row[i] - row[2] for row in rounds) for i in (0, 1))
    return (
        max(more, typing),
        f"+{more:.2f} s, +{typing:.2f} s",
        f"pass: {median(row[2] for row in rounds):.2f} s",
    )


def predict(bench: Bench) -> Measured:
    """--predict of one image, figure saved | python -c "import torch, torchvision" | 1.5x."""
    checkpoint, figure = bench.folder / "model.pth", bench.folder / "figure.png"
    mura.write_checkpoint(
        checkpoint,
        {
            "kind": "model",
            "model": "densenet169",
            "image_size": 320,
            "resize": "stretch",
            "temperature": 1.0,
            "study_temperature": 1.0,
            "threshold": 0.5,
            "tta": True,
            "threshold_source": "default",
            "bad_images": 0,
            "body_parts": ["XR_FOREARM"],
            "patients": {"train": [], "val": []},
            "normalization": asdict(IMAGENET),
            "state_dict": mura.Network("densenet169").state_dict(),
        },
    )
    command = (
        SCRIPT,
        "--predict",
        bench.scan.records[0].path,
        "--checkpoint",
        checkpoint,
        "--figure",
        figure,
        "--overwrite",
        "--device",
        bench.device.type,
    )
    ratio, *seconds = bench.versus(
        lambda: bench.run(*command), lambda: bench.run("-c", "import torch, torchvision"), 2
    )
    if not figure.exists():
        raise SystemExit("benchmark: --predict saved no figure")
    return (
        1 / ratio,
        f"{1 / ratio:.2f}x",
        "{:.1f} : {:.1f} s, densenet169 at 320 px".format(*seconds),
    )


def fine_against_gradcam(bench: Bench) -> Measured:
    """--predict of one image with --cam fine | --cam gradcam | 1.3x."""
    predict(bench)  # writes the checkpoint
    command = (
        SCRIPT,
        "--predict",
        bench.scan.records[0].path,
        "--checkpoint",
        bench.folder / "model.pth",
        "--figure",
        bench.folder / "figure.png",
        "--overwrite",
        "--device",
        bench.device.type,
        "--cam",
    )
    ratio, *seconds = bench.versus(
        lambda: bench.run(*command, "fine"), lambda: bench.run(*command, "gradcam"), 3
    )
    return 1 / ratio, f"{1 / ratio:.2f}x", "{:.1f} : {:.1f} s".format(*seconds)


def explain(bench: Bench) -> Measured:
    """Fine maps of 64 images, fp32 | pytorch-grad-cam's LayerCAM of as many stages | 1x."""
    from pytorch_grad_cam import LayerCAM
    from pytorch_grad_cam.utils.model_targets import BinaryClassifierOutputTarget

    fp32 = replace(bench.hardware, precision="fp32")
    network = fp32.prepare(mura.Network(bench.model))
    shape = (64, 3, bench.size, bench.size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(bench.device)
    with torch.no_grad():
        network.train()(images[:8])  # the batch norms see images, and the maps get both signs
        nn.init.normal_(network.eval().head.weight, 0, 0.5)
    method = mura.CAM_METHODS["fine"]
    layers = [
        network.backbone.get_submodule(network.architecture.stages[index].layers.split()[-1])
        for index, _ in method.terms
    ]
    peer, targets = LayerCAM(network, layers), [BinaryClassifierOutputTarget(1)] * 64
    ratio, *seconds = bench.versus(
        lambda: mura.class_activation_map(network, images, method, 1.0)[1].cpu(),
        lambda: peer(images, targets),
        2,
    )
    return ratio, f"{ratio:.2f}x", "{:.1f} : {:.1f} s".format(*seconds)


def resample(bench: Bench) -> Measured:
    """All metrics of 3,197 images, 1,000 patient resamples | - | 5 s."""
    random, count, patients = np.random.default_rng(0), 3197, 783  # of MURA's valid/
    patient = np.sort(random.integers(patients, size=count))
    part, names = (
        np.array([f"{letter}{value:05d}" for value in values])
        for letter, values in (("XR_", patient % 7), ("patient", patient))
    )
    label = (patient % 5 < 2).astype(np.int64)
    paths, probability = np.arange(count).astype(str), 0.3 * label + 0.7 * random.random(count)
    predictions = mura.Predictions(paths, part, names, names, label, probability)
    seconds = bench.clock(lambda: mura.Evaluation(0.5).report(predictions))
    return seconds, f"{seconds:.2f} s", "images and studies, of all and of 7 parts"


ROWS: dict[str, Callable[[Bench], Measured]] = {
    "train-step": train_step,
    "train-loop": train_loop,
    "score-loop": score_loop,
    "first-pass": first_pass,
    "second-start": second_start,
    "open-large": open_large,
    "index-large": index_large,
    "start-up": start_up,
    "predict": predict,
    "cam-cost": fine_against_gradcam,
    "cam-batch": explain,
    "bootstrap": resample,
}


def machine(bench: Bench) -> str:
    """Describe processor, cores, load, versions, arithmetic, and the size of the task."""
    names = [platform.processor()]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [
            line.partition(": ")[2] for line in lines if line.startswith("model name")
        ] or names
    return (
        f"{mura.core_count()} cores {names[0]}, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}; "
        f"{bench.hardware}; {bench.model} at {bench.size} px, {bench.steps} batches of {bench.batch} an epoch"
    )


def main() -> None:
    """Measure the rows asked for and print each as soon as it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="resnet50, small images, short epochs")
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS)
    )
    parser.add_argument("--json", type=Path, metavar="F", help="also write the figures here")
    parser.add_argument("--device", default="auto", help="as of the program")
    parser.add_argument(
        "--model", choices=("densenet169", "resnet50"), help="of the training and CAM rows"
    )
    parser.add_argument(
        "--size", type=int, metavar="PX", help="its input (default: 320; quick 96, on CUDA 128)"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images a step (default: 16, on CUDA 64)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="turns of each side (default: 3)"
    )
    options, rows, line = parser.parse_args(), [], "{:<47} {:<43} {:<29} {:<41} {}"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        print(machine(bench))
        print(line.format("what", "against", "measured", "must reach", "absolute"), flush=True)
        for name in options.only:
            what, against, target = (
                piece.strip(" .") for piece in (ROWS[name].__doc__ or "").split("|")
            )
            began = time.perf_counter()
            figure, shown, absolute = ROWS[name](bench)
            print(line.format(what, against, shown, target, absolute), flush=True)
            rows.append(
                {
                    "name": name,
                    "what": what,
                    "against": against,
                    "figure": figure,
                    "measured": shown,
                    "must_reach": target,
                    "absolute": absolute,
                    "took_seconds": time.perf_counter() - began,
                }
            )
        if "ordinary" in vars(bench):
            bench.ordinary.shutdown()
        if options.json:
            options.json.write_text(
                json.dumps({"machine": machine(bench), "rows": rows}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
