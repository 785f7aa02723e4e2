#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.10", "torchvision>=0.25", "pillow>=11.0", "matplotlib>=3.9", "tqdm>=4.66", "numpy>=1.26"]
# ///
"""Train, judge and use an abnormality detector for bone X-rays (MURA, arXiv 1712.06957).

    mura_anomaly_detection.py --demo                                  # all of it, on drawn phantoms
    mura_anomaly_detection.py --data-dir MURA-v1.1 --tasks ELBOW --checkpoint elbow.pth
    mura_anomaly_detection.py --data-dir MURA-v1.1 --evaluate --checkpoint densenet.pth resnet.pth
    mura_anomaly_detection.py --predict image1.png --checkpoint elbow.pth
    mura_anomaly_detection.py --predict studies/ --checkpoint elbow.pth --output results.csv

They train and then score, score an ensemble, explain an image, classify a folder.

Terms. An *image* is one file and shows one *view*. A *study* is one examination of one *body part* (XR_ELBOW, ...):
1 to 13 views, one label (0 normal, 1 abnormal). A *patient* has one or more studies. The network gives each image a *logit*;
sigmoid(logit / temperature) is its *probability* of being abnormal; a study's probability is the mean over its views.
`train/` is split by patient into *train* and *val*; MURA's own `valid/` is the held-out *test* and is scored once.

For research and teaching, not for diagnosis.

Sections: 1 options - 2 index - 3 split and class weights - 4 decoding, cache, MuraDataset - 5 batches and augmentation -
6 model - 7 metrics - 8 train and predict loops - 9 files - 10 Grad-CAM - 11 figures - 12 phantoms - 13 training runs -
14 scoring - 15 prediction - 16 demo and export - 17 commands.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import math
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar

__version__ = "1.0.0"
EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_SOME_FAILED = 0, 1, 2, 3  # and 128 + n when stopped by signal n
PROGRAM = "mura_anomaly_detection"
RESEARCH_ONLY = "for research and teaching, not for diagnosis"
CLASSES = ("normal", "abnormal")  # index = label
PAPER_MODEL, PAPER_SIZE = "densenet169", 320  # architecture and input side in pixels: arXiv 1712.06957, section 3.1
FIGURE_SUFFIXES = ("", ".png", ".jpg", ".pdf", ".svg")  # of --figure; "" is a PNG, or a folder
HEATMAP_ENDING = "_heatmap.png"  # of figures that --predict names by itself


class UserError(Exception):
    """A failure that the user can mend; its text is the one line that is printed: the file or flag, and the remedy."""

    def __init__(self, message: str, exit_code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# ===== 1 options =====================================================================================================


def number(kind: type, low: float, high: float = 1e6, *, open_low: bool = False) -> Callable[[str], float]:
    """Make an argparse type for a finite number in [low, high], or in (low, high] with `open_low`."""

    def parse(text: str) -> float:
        """Parse one value; argparse prints the error."""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high) or (open_low and value == low):
            what = "a whole number" if kind is int else "a number"
            bounds = f"{'above' if open_low else 'of at least'} {low:g} and at most {high:.10g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bounds}")
        return value  # type: ignore[no-any-return]

    return parse


def threshold_value(text: str) -> float | str:
    """Parse --threshold: `auto`, or a probability strictly between 0 and 1."""
    return text if text == "auto" else number(float, 0, 1 - 1e-9, open_low=True)(text)


def normalization_value(text: str) -> str:
    """Parse --normalization: imagenet, dataset, image, or MEAN,STD in units of the 0 to 1 grey scale."""
    if text in ("imagenet", "dataset", "image"):
        return text
    try:
        mean, std = (float(part) for part in text.split(","))
    except ValueError:
        mean, std = math.nan, math.nan
    if not (0 <= mean <= 1 and 0 < std <= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is none of imagenet, dataset, image, MEAN,STD (such as 0.2,0.18)")
    return text


def device_name(text: str) -> str:
    """Parse --device: auto, cpu, mps, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, mps, cuda, cuda:N")
    return text


def option(group: str, default: object, text: str, **argparse_arguments: object) -> Any:
    """Declare one flag as a Config field: its group in --help, its default, its text, and what add_argument takes."""
    return field(default=default, metadata={"group": group, "help": text, "argparse": argparse_arguments})


COUNT, SHARE, PROBABILITY = number(int, 1), number(float, 0, 0.9, open_low=True), number(float, 0, 1)
DEMO_DEFAULTS: dict[str, Any] = {  # from random weights: with 2 epochs one of 3 seeds did not learn
    "weights": "none", "fit": "letterbox", "normalization": "image", "image_size": 96, "batch_size": 8, "lr": 1e-3, "epochs": 3,
}
PAPER_RECIPE: dict[str, Any] = {  # arXiv 1712.06957, section 3.1; Adam is AdamW without decay
    "image_size": PAPER_SIZE, "fit": "stretch", "normalization": "imagenet", "batch_size": 8, "lr": 1e-4, "schedule": "plateau",
    "weight_decay": 0.0, "flip": 0.5, "rotation": 30.0, "brightness": 0.0, "contrast": 0.0, "mixup": 0.0, "settle": 0,
    "tta": False,
}
LEARNING = ("data", "training")  # the groups of options that decide what is learnt: --resume refuses other values


@dataclass(frozen=True)
class Config:
    """All options: each hyper-parameter is stated here, once, with its unit and source. The flags are made from it."""

    data_dir: Path | None = option("files", None, "folder with train/ and valid/, or a parent of it", type=Path, metavar="DIR")
    checkpoint: tuple[Path, ...] = option(
        "files", (Path("mura_model.pth"),), "model file: training writes it and files named like it, --evaluate and --predict "
        "read it; several are an ensemble", nargs="+", type=Path, metavar="FILE")
    cache_dir: Path | None = option(
        "files", None, "where decoded images are kept (default: .mura_cache in the data folder, or the user's cache folder "
        "where that cannot be written)", type=Path, metavar="DIR")
    resume: str | None = option("files", None, "continue from STEM.last.pth; `auto` starts afresh where there is none",
                                nargs="?", const="required", choices=("auto", "required"))
    save_every: float = option("files", 10.0, "minutes between saved states within an epoch", type=number(float, 0),
                               metavar="MIN")
    tasks: tuple[str, ...] = option("data", (), "body parts to use, with or without XR_ (default: all)", nargs="+",
                                    metavar="PART")
    val_split: float = option("data", 0.2, "share of the patients of train/ kept for validation", type=SHARE, metavar="SHARE")
    image_size: int | None = option(
        "data", None, "side of the network's square input, pixels (default: the paper's 320, or the longest side of the "
        "training images where that is less)", type=number(int, 64, 2048), metavar="PX")
    fit: str = option("data", "stretch", "how an image becomes square: stretch (paper), or letterbox, which keeps the aspect",
                      choices=("stretch", "letterbox"))
    normalization: str = option(
        "data", "imagenet", "grey-level normalisation: imagenet, dataset (mean and deviation of the training images), image "
        "(of each image by itself) or MEAN,STD", type=normalization_value, metavar="KIND")
    on_bad_image: str | None = option(
        "data", None, "unreadable images are listed; then skip them, or stop (default: skip, but stop if over 1 %% are "
        "unreadable)", choices=("skip", "stop"))
    model: str | None = option("training", None, "architecture (default: densenet169; with a checkpoint, its own)",
                               choices=("densenet169", "resnet50"))
    recipe: str = option("training", "default", "what the other options are if not given: the defaults shown here, or the MURA "
                         "paper's", choices=("default", "paper"))
    weights: str = option(
        "training", "imagenet", "initial weights: imagenet (downloaded by torchvision), none (random), or a file (torchvision "
        "state_dict, or a checkpoint of this program)", metavar="SOURCE")
    epochs: int = option("training", 5, "passes over the training images", type=COUNT, metavar="N")
    batch_size: int = option("training", 8, "images per optimiser step, over all processes together (paper: 8); scoring takes "
                             "four times as many at once", type=COUNT, metavar="N")
    accumulate: int = option("training", 1, "parts that a batch is computed in, to fit a small card", type=COUNT, metavar="N")
    lr: float = option("training", 3e-4, "peak learning rate of Adam (paper: 0.0001)", type=number(float, 0, 10, open_low=True),
                       metavar="RATE")
    schedule: str = option(
        "training", "quadratic", "learning rate: quadratic (warm-up, then the square of what is left) or plateau (paper: a "
        "tenth when the validation loss does not fall)", choices=("quadratic", "plateau"))
    warmup: float = option("training", 0.1, "share of all steps in which quadratic rises to --lr", type=number(float, 0, 0.9),
                           metavar="SHARE")
    weight_decay: float = option("training", 0.01, "decoupled weight decay, per unit of learning rate (paper: 0)",
                                 type=number(float, 0, 10), metavar="RATE")
    flip: float = option("training", 0.5, "probability of a left-right flip", type=PROBABILITY, metavar="P")
    rotation: float = option("training", 10.0, "largest random rotation to either side, degrees (paper: 30)",
                             type=number(float, 0, 180), metavar="DEG")
    brightness: float = option("training", 0.1, "largest random shift of brightness, share of full scale", type=PROBABILITY,
                               metavar="X")
    contrast: float = option("training", 0.2, "largest random change of contrast, share", type=PROBABILITY, metavar="X")
    mixup: float = option(
        "training", 0.0, "blend each image with another of its batch, by shares from the beta distribution (X, X); 0 = never "
        "(paper), 0.2 for long runs", type=number(float, 0, 10), metavar="X")
    settle: int = option(
        "training", 256, "unvaried training images from which batch normalisation takes its statistics before validation; 0 = "
        "those that training left (paper)", type=number(int, 0), metavar="N")
    patience: int = option(
        "training", 0, "stop after N epochs without a better validation accuracy (or the same and a lower loss); 0 = never",
        type=number(int, 0), metavar="N")
    precision: str = option(
        "training", "auto", "arithmetic: auto (bf16 where the hardware gains from it, else fp32), bf16, tf32 (CUDA) or fp32",
        choices=("auto", "bf16", "tf32", "fp32"))
    seed: int = option("training", 0, "seed of weights, split, order, augmentation and bootstrap", type=number(int, 0, 2**31),
                       metavar="N")
    evaluate: bool = option("evaluation", False, "score saved models instead of training", action="store_true")
    split: str = option("evaluation", "valid", "which folder --evaluate scores", choices=("train", "valid"))
    threshold: float | str | None = option(
        "evaluation", None, "abnormal above this probability; `auto`, while training: the one with the best study kappa on val "
        "(default: 0.5 while training, later the one stored in the checkpoint)", type=threshold_value, metavar="P")
    tta: bool | None = option(
        "evaluation", None, "average each image's logit with that of its mirror image (default: while training, if --flip is "
        "above 0; later as stored in the checkpoint)", action=argparse.BooleanOptionalAction)
    bootstrap: int = option("evaluation", 1000, "patient resamples behind the 95 %% intervals", type=number(int, 100, 100_000),
                            metavar="N")
    predict: tuple[Path, ...] = option("prediction", (), "classify and explain images, folders and study folders", nargs="+",
                                       type=Path, metavar="PATH")
    output: Path | None = option("prediction", None, "also write the results to F.csv or F.json", type=Path, metavar="F")
    figure: Path | None = option(
        "prediction", None, "where original | heatmap | overlay go: a file for one input (default: NAME_heatmap.png), a folder "
        "for several (default: none)", type=Path, metavar="PATH")
    cam_class: str = option("prediction", "predicted", "class that the heatmap explains",
                            choices=("predicted", "abnormal", "normal"))
    save_cam: Path | None = option("prediction", None, "write the raw maps (evidence for abnormal, logits) to F.npz", type=Path,
                                   metavar="F")
    no_show: bool = option("prediction", False, "never open a window", action="store_true")
    export: Path | None = option("prediction", None, "write the network of --checkpoint to F.onnx or F.pt2", type=Path,
                                 metavar="F")
    demo: Path | None = option("general", None, "train, score and predict on generated phantoms in DIR (default: mura_demo)",
                               nargs="?", type=Path, const=Path("mura_demo"), metavar="DIR")
    device: str = option("general", "auto", "auto (CUDA, then MPS, then CPU), cpu, mps, cuda or cuda:N", type=device_name,
                         metavar="NAME")
    compile: bool = option("general", False, "compile the network with torch.compile for training", action="store_true")
    workers: int = option("general", 0, "threads that decode images; 0 = one per core", type=number(int, 0, 256), metavar="N")
    debug: bool = option("general", False, "show tracebacks", action="store_true")

    @property
    def stem(self) -> Path:
        """The first --checkpoint without its suffix: what the files of a run are named after."""
        return self.checkpoint[0].with_suffix("")

    @property
    def scoring_batch(self) -> int:
        """Images at once where nothing is learnt, over all processes: without gradients four times as many take less memory."""
        return max(1, 4 * self.batch_size // self.accumulate)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the nearest flag for a mistyped one."""

    def error(self, message: str) -> NoReturn:
        """Print the one line and exit with EXIT_USAGE."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        hint = f"did you mean {near[0]}?" if near else "see --help"
        self.exit(EXIT_USAGE, f"{self.prog}: error: {' '.join(message.split())} ({hint})\n")


def build_parser() -> Parser:
    """Make the parser from Config: a flag for each field, in groups, with the default shown."""
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog=f"{PROGRAM}.py", description=head, epilog="examples:\n" + rest.partition("\n\nThey train")[0],
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=100),
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    for title, items in itertools.groupby(fields(Config), lambda item: item.metadata["group"]):
        group = parser.add_argument_group(title)
        for item in items:
            shown, text = item.default, item.metadata["help"]
            if not any(shown is silent for silent in (None, False, ())):
                text += f" (default: {' '.join(map(str, shown)) if isinstance(shown, tuple) else shown})"
            group.add_argument("--" + item.name.replace("_", "-"), default=shown, help=text, **item.metadata["argparse"])
    return parser


def parse_options(arguments: Sequence[str]) -> Config:
    """Turn command-line arguments into a Config; wrong use prints one line and exits with EXIT_USAGE."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    if given.demo:
        parser.set_defaults(**DEMO_DEFAULTS, checkpoint=(given.demo / "demo.pth",))
    if given.recipe == "paper":
        parser.set_defaults(**PAPER_RECIPE)
    values = vars(parser.parse_args(arguments)).items()
    chosen: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values}
    config = Config(**chosen)
    if problem := usage_problem(config):
        parser.error(problem)
    return config


def usage_problem(config: Config) -> str | None:
    """Say what is wrong with a combination of flags, or None."""
    modes = [name for name in ("evaluate", "predict", "export", "demo") if getattr(config, name)]
    training = not modes or modes == ["demo"]
    problems = [
        (len(modes) > 1, f"--{' and --'.join(modes)} exclude each other"),
        (config.demo and config.data_dir, "--demo makes its own data: leave --data-dir out"),
        ((not modes or modes == ["evaluate"]) and not config.data_dir, "--data-dir DIR is needed, or --predict, or --demo"),
        (training and len(config.checkpoint) > 1, "training writes one --checkpoint"),
        (training and config.checkpoint[0].suffix != ".pth", f"--checkpoint {config.checkpoint[0]}: the name must end in .pth"),
        (training and config.checkpoint[0].name.endswith(".last.pth"),  # it would overwrite the state of another run
         f"--checkpoint {config.checkpoint[0]}: is the name of a saved state; give the model's, STEM.pth, and --resume"),
        (not training and config.threshold == "auto", "--threshold auto is chosen on val while training"),
        (bool(config.export) and len(config.checkpoint) > 1, "--export takes one --checkpoint"),
        (config.export and config.export.suffix not in (".onnx", ".pt2"), f"--export {config.export}: use .onnx or .pt2"),
        (config.output and config.output.suffix not in (".csv", ".json"), f"--output {config.output}: use .csv or .json"),
        (config.figure and not config.figure.is_dir() and config.figure.suffix.lower() not in FIGURE_SUFFIXES,
         f"--figure {config.figure}: use {', '.join(FIGURE_SUFFIXES[1:])}, or a folder for several inputs"),
        (config.save_cam and config.save_cam.suffix != ".npz", f"--save-cam {config.save_cam}: use .npz"),
        ((config.output or config.save_cam) and not config.predict, "--output and --save-cam go with --predict"),
        (config.figure and not (config.predict or config.demo), "--figure goes with --predict and --demo"),
        (config.split != "valid" and not config.evaluate, "--split goes with --evaluate"),
        (training and config.mixup and config.batch_size == 1, "--mixup blends images of a batch: --batch-size 1 has but one"),
        (config.demo and config.figure and config.figure.is_dir(), f"--figure {config.figure}: name a file, not a folder"),
    ]
    return next((text for wrong, text in problems if wrong), None)


if __name__ == "__main__":
    # Parsed before the heavy imports, on purpose: --help and typing errors answer at once. Until `main` takes over,
    # Ctrl-C ends the program the plain way instead of with a traceback out of an import.
    OPTIONS = parse_options(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import csv
import ctypes
import hashlib
import io
import json
import logging
import os
import pickle
import secrets
import stat
import struct
import tempfile
import textwrap
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import cached_property, lru_cache, partial
from statistics import NormalDist
from types import FrameType

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageFilter, ImageFont, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pydicom import Dataset


def is_first() -> bool:
    """Tell whether this is the process that prints and writes: the only one, or the first of a torchrun job."""
    return os.environ.get("RANK", "0") == "0"


def write_line(text: str, stream: Any) -> None:
    """Write a line above any progress bar; where the reader has gone, as `| head` does, the run goes on unheard."""
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """Print a result on stdout, above any progress bar."""
    if is_first():
        write_line(text, sys.stdout)


def note(text: str, *, failed: bool = False) -> None:
    """Print one line on stderr, above any progress bar; why it `failed` is told by every process, with its number."""
    if is_first() or failed:
        write_line(f"{PROGRAM}{'' if is_first() else ' (process ' + os.environ['RANK'] + ')'}: {text}", sys.stderr)


def progress_bar(**arguments: Any) -> Any:
    """Make a tqdm bar on stderr that leaves nothing behind, and none at all off a terminal."""
    return tqdm(file=sys.stderr, leave=False, dynamic_ncols=True, disable=None if is_first() else True, **arguments)


# ===== 2 index of the data set =======================================================================================

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".dcm")  # in any case


@dataclass(frozen=True)
class View:
    """One image of the set."""

    file: str  # its path as text: of 40,000 Paths, making alone would take half a second
    part: str  # XR_ELBOW, ...
    patient: str  # patient00011, ...: the same name in two body parts is taken for one patient
    study: str  # XR_ELBOW/patient00011/study1_negative, ...
    label: int  # 0 normal, 1 abnormal

    @cached_property
    def path(self) -> Path:
        """Where the image is."""
        return Path(self.file)

    @cached_property
    def name(self) -> str:
        """The path below train/ or valid/, with forward slashes: `study` and the file's name."""
        return f"{self.study}/{os.path.basename(self.file)}"  # noqa: PTH119


def find_data_root(folder: Path) -> Path:
    """Find the folder that holds train/ or valid/: `folder`, or up to two levels below it.

    Raises:
        UserError: the folder is missing, or nothing like MURA is in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --data-dir wants the unpacked MURA-v1.1")
    for candidate in (folder, *sorted(folder.glob("[!._]*/")), *sorted(folder.glob("[!._]*/[!._]*/"))):  # not __MACOSX
        if os.path.isdir(candidate / "train") or os.path.isdir(candidate / "valid"):  # noqa: PTH112 - never raises
            return candidate
    raise UserError(f"{folder}: neither it nor a folder in it holds train/ or valid/; --data-dir wants the unpacked MURA-v1.1")


def subfolders(folder: Path | str) -> list[str]:
    """List the names of the folders directly below `folder`, in natural order; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted((entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()), key=natural_key)


@lru_cache(1 << 15)  # MURA has 12,000 patients, and image1.png 15,000 times
def natural_key(text: str) -> list[tuple[int, str]]:
    """Sort key that puts image2 before image10.

    >>> sorted(["image10.png", "image2.png"], key=natural_key)
    ['image2.png', 'image10.png']
    """
    return [(int(piece) if piece.isdecimal() else -1, piece) for piece in re.split(r"(\d+)", text)]


def image_names(folder: Path | str) -> list[str]:
    """List the names in `folder` that look like images, in natural order.

    AppleDouble (._x) and other stray files are left out, and so is what --predict saved beside the images.
    """
    names = (name for name in os.listdir(folder) if name[0] != "." and not name.endswith(HEATMAP_ENDING))
    return sorted((name for name in names if name.lower().endswith(IMAGE_SUFFIXES)), key=natural_key)


def read_list(path: Path, split: str) -> dict[str, str]:
    """Read one of MURA's CSV lists: what follows `split`/ in each path, and the label behind it ("" in a list of images).

    >>> read_list(Path("no such file"), "train")
    {}

    Raises:
        UserError: a row is not `.../SPLIT/XR_PART/patient/study/...` (with `,0` or `,1` in a list of studies).
    """
    if not path.is_file():
        return {}
    endings = (["0"], ["1"]) if "labeled_studies" in path.name else ([],)
    listed: dict[str, str] = {}
    try:  # line by line, so that a stray quote does not swallow the lines behind it
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = [next(csv.reader([line]), []) if '"' in line else line.split(",") for line in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error}); restore it from the MURA archive or delete it") from error
    for count, row in enumerate(rows, 1):
        if not "".join(row).strip():
            continue
        _, found, name = ("/" + row[0].replace("\\", "/").strip("/ \t")).rpartition(f"/{split}/")
        label = [cell.strip() for cell in row[1:]]
        if not found or name.count("/") < 2 or label not in endings:
            raise UserError(f"{path}: line {count} is not like MURA's ({','.join(row)[:60]!r}); restore the file or delete it")
        listed[name] = "".join(label)
    return listed


def choose_parts(present: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """Match --tasks, with or without XR_ and in any case, against the body parts present.

    Raises:
        UserError: a task that is not present; the message lists those that are, and the nearest.
    """
    known = {part.upper().removeprefix("XR_"): part for part in present}
    chosen = []
    for task in tasks:
        key = task.upper().removeprefix("XR_")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--tasks {task}: no such body part; present are {', '.join(sorted(known)) or 'none'}{hint}")
        chosen.append(known[key])
    return sorted(set(chosen)) if tasks else list(present)


@dataclass(frozen=True)
class Index:
    """The images of one split, and what was noticed while looking for them (one line each)."""

    split: str
    views: tuple[View, ...]
    notes: tuple[str, ...]


def index_split(root: Path, split: str, tasks: Sequence[str] = ()) -> Index:
    """Index `root/split`: XR_*/patient*/study*/image*, as the CSV lists beside it say where there are any.

    The label of a study is the one in SPLIT_labeled_studies.csv, else that of its name (_positive, _negative); where
    SPLIT_image_paths.csv lists any, only the images in it count.

    Raises:
        UserError: no such folder, no image in it, an unknown body part, a list that cannot be read.
    """
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {root} must hold {split}/XR_*/patient*/study*/image*.png")
    listed = read_list(root / f"{split}_image_paths.csv", split)
    labels = read_list(root / f"{split}_labeled_studies.csv", split)
    parts = choose_parts([name for name in subfolders(folder) if name.startswith("XR_")], tasks)
    views: list[View] = []
    unlisted = unlabelled = conflicts = 0
    for part, patient, study in walk_studies(folder, parts):
        key = f"{part}/{patient}/{study}"
        named = {"positive": "1", "negative": "0"}.get(study.rpartition("_")[2].lower())
        label = labels.get(key, named)
        if label is None:
            unlabelled += 1
            continue
        conflicts += named not in (None, label)
        place = f"{folder}/{key}"
        found = [View(f"{place}/{name}", part, patient, key, int(label)) for name in image_names(place)]
        kept = [view for view in found if not listed or view.name in listed]
        unlisted += len(found) - len(kept)
        views += kept
    absent = sorted({name for name in listed if name.partition("/")[0] in parts} - {view.name for view in views})
    counts = {
        f"{unlisted} images are not in {split}_image_paths.csv and are left out": unlisted,
        f"{unlabelled} studies have no label (no _positive or _negative, not in the list) and are left out": unlabelled,
        f"{conflicts} studies are named otherwise than {split}_labeled_studies.csv says; the list counts": conflicts,
        f"{len(absent)} images of {split}_image_paths.csv are missing, such as {''.join(absent[:1])}": len(absent),
    }
    notes = [text for text, count in counts.items() if count]
    if not views:
        reason = "; ".join(notes) or "expected XR_*/patient*/study*_*/image*.png"
        raise UserError(f"{folder}: no images found; {reason}")
    return Index(split, tuple(views), tuple(f"{folder}: {text}" for text in notes))


def walk_studies(folder: Path, parts: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (part, patient, study) folder names below `folder`, in natural order."""
    for part in parts:
        for patient in subfolders(folder / part):
            for study in subfolders(f"{folder}/{part}/{patient}"):  # text: with thousands of patients, joining Paths shows
                yield part, patient, study


def digest_of(text: str) -> str:
    """Give the SHA-256 of a text, hexadecimal; names of files in it may be any bytes, and the locale does not count."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def describe(name: str, views: Sequence[View]) -> str:
    """Count images, studies and patients of each body part and class, a line each."""
    lines = [f"{name:<6}{'part':<14}{'images':>8}{'(abn.)':>8}{'studies':>9}{'(abn.)':>8}{'patients':>10}{'(abn.)':>8}"]
    parts = sorted({view.part for view in views})
    for part in [*parts, "all"] if len(parts) > 1 else parts:
        rows = [view for view in views if part in (view.part, "all")]
        studies = {view.study: view.label for view in rows}
        patients, ill = {view.patient for view in rows}, {view.patient for view in rows if view.label}
        images = f"{len(rows):>8}{sum(view.label for view in rows):>8}"
        lines.append(f"{'':<6}{part:<14}{images}{len(studies):>9}{sum(studies.values()):>8}{len(patients):>10}{len(ill):>8}")
    return "\n".join(lines)


# ===== 3 split and class weights =====================================================================================


def split_patients(views: Sequence[View], share: float, seed: int) -> tuple[list[View], list[View]]:
    """Split by patient, across body parts, into (train, val).

    A patient's rank follows from seed and name alone, so the order of the files does not matter, and a new patient
    moves at most one other. Patients with and without an abnormal study are split separately; where there are two of
    a kind or more, each side gets one.

    Raises:
        UserError: there are too few patients of either kind.
    """
    everyone, abnormal = {view.patient for view in views}, {view.patient for view in views if view.label}
    val: set[str] = set()
    for kind in (abnormal, everyone - abnormal):
        names = sorted(kind, key=lambda name: digest_of(f"{seed}/{name}"))
        val.update(names[:-1][: max(1, round(share * len(names)))])  # the last one stays in train
    if not val:
        raise UserError(f"--val-split {share:g}: {len(everyone)} patients cannot be split; use more patients or another share")
    return [view for view in views if view.patient not in val], [view for view in views if view.patient in val]


def class_weights(views: Sequence[View]) -> dict[str, tuple[float, float]]:
    """Give each body part's loss weights (w0, w1) of normal and abnormal images (arXiv 1712.06957, section 3.1).

    w1 = |N| / (|A| + |N|) and w0 = |A| / (|A| + |N|), with A and N the part's abnormal and normal training images.

    Raises:
        UserError: the images are all of one class.
    """
    for label, name in enumerate(CLASSES):
        if label not in {view.label for view in views}:
            raise UserError(f"the training images hold none that is {name}; training needs both classes")
    totals = Counter(view.part for view in views)
    counts = Counter((view.part, view.label) for view in views)
    return {part: (counts[part, 1] / total, counts[part, 0] / total) for part, total in totals.items()}


# ===== 4 decoding, cache, MuraDataset ================================================================================

IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")  # Pillow tries no other: EPS would start Ghostscript
MAX_PIXELS = 100_000_000  # a 43 x 43 cm detector at 100 um has 18 million; the header is judged before decoding
MAX_BYTES = 1 << 30  # holds MAX_PIXELS of 16-bit RGBA
BIT_DEPTHS = (8, 10, 12, 14, 16)  # of X-ray detectors
MIN_CONTRAST = 8  # grey levels between the 0.5th and 99.5th percentile: below, nothing was imaged
MAX_CHROMA = 16  # mean of max(R, G, B) - min(R, G, B), 0 to 255: a small coloured mark stays far below

# Decoders warn on stderr and may quote file contents (with DICOM, a patient's data); what matters becomes BadImage.
# Set once for the process: warnings.catch_warnings is not thread-safe, and images are decoded in threads.
warnings.filterwarnings("ignore", module=r"(PIL|pydicom|pylibjpeg|openjpeg|libjpeg)\b")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", message=r"Glyph \d+")  # matplotlib draws a box for what its font lacks in a file's name


class BadImage(Exception):  # noqa: N818 (reads as what it is where it is raised)
    """An image that cannot be used; the text is the reason, to which the caller adds the path."""


def read_radiograph(path: Path) -> np.ndarray:
    """Decode one image file into grey, (H, W) uint8; see `to_8_bit` for deep pixels.

    Raises:
        BadImage: why the file cannot be used: missing, no file, damaged, too large, several frames, ...
    """
    data = _read_bytes(path)
    is_dicom = data[128:132] == b"DICM" or path.suffix.lower() == ".dcm"
    try:
        with np.errstate(all="ignore"):  # the results are checked
            return np.ascontiguousarray(_decode_dicom(data) if is_dicom else _decode_picture(data))
    except BadImage:
        raise
    except MemoryError as error:
        raise BadImage("needs more memory than there is") from error
    except Exception as error:  # on damaged bytes the decoders raise a dozen kinds; their texts may quote the file
        raise BadImage("damaged, cut short or of an unsupported kind") from error


def _read_bytes(path: Path) -> bytes:
    try:
        status = path.stat()  # before opening: a FIFO would wait for its writer for ever
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("a folder, not an image" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        if not 0 < status.st_size <= MAX_BYTES:
            raise BadImage(f"larger than {MAX_BYTES >> 20} MiB" if status.st_size else "empty (0 bytes)")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadImage(str(getattr(error, "strerror", None) or "cannot be read").lower()) from error


def _check_size(width: int, height: int, frames: int) -> None:
    if frames > 1:
        raise BadImage("several frames in one file: save the wanted one by itself")
    if width * height > MAX_PIXELS:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} megapixels")


def _open_picture(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage("not an image of a known kind, or its header is damaged") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} megapixels") from error
    # MPO is a camera's JPEG with previews of the same picture behind it
    _check_size(*image.size, frames=1 if image.format == "MPO" else getattr(image, "n_frames", 1))
    return image


def _decode_picture(data: bytes) -> np.ndarray:
    image = _open_picture(data)
    deep_colour = image.mode[0] not in "IF" and ";16" in str(getattr(image, "tile", ""))
    if image.format == "PNG":
        _load_png(image, data)
    grey = _to_grey(image)
    if deep_colour and grey.max() < 64:  # Pillow keeps the upper 8 bits only: 12-bit values would come out black
        raise BadImage("16-bit colour that does not use its range: save it as 16-bit grey")
    orientation = 1
    with contextlib.suppress(Exception):  # a damaged EXIF block does not spoil the pixels
        orientation = image.getexif().get(0x0112, 1)
    if orientation in (5, 6, 7, 8):  # TIFF 6.0, tag 274
        grey = grey.T
    if orientation in (3, 4, 7, 8):
        grey = grey[::-1]
    return grey[:, ::-1] if orientation in (2, 3, 6, 7) else grey


def _load_png(image: Image.Image, data: bytes) -> None:
    """Decode with the two checks that loading omits: the checksums, and that every row is there."""
    try:
        _open_picture(data).verify()
    except SyntaxError as error:
        raise BadImage("damaged or cut short: a checksum is wrong") from error
    bands = len(image.getbands())
    image.im = Image.new(image.mode, image.size, (1,) * bands if bands > 1 else 1).im  # missing rows stay 1, not 0
    image.load()
    last = np.asarray(image.crop((0, max(0, image.height - 2), *image.size)))  # two rows, for interlaced files
    if any((row == 1).all() for row in last) and (np.asarray(_open_picture(data)) != np.asarray(image)).any():
        raise BadImage("cut short: rows are missing")


def _to_grey(image: Image.Image) -> np.ndarray:
    if image.mode[0] in "IF":  # I;16, I;16B, I, F
        pixels = np.array(image)
        if "transparency" in image.info:
            pixels[pixels == image.info["transparency"]] = 0
        white_is_zero = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(262) == 0
        return np.bitwise_not(to_8_bit(pixels)) if white_is_zero else to_8_bit(pixels)  # Pillow inverts up to 8 bits
    if not image.has_transparency_data:
        return np.array(image if image.mode == "L" else image.convert("RGB").convert("L"))
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema() == (0, 0):
        raise BadImage("wholly transparent")
    return np.array(Image.composite(image.convert("L"), Image.new("L", image.size), alpha))


def to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Reduce deep grey to uint8: white is the largest value of the smallest BIT_DEPTHS that holds the maximum.

    So a detector's zero and full scale stay put and the views of a study stay comparable; stretched between its own
    extremes, an image with one bright marker would darken the bone. Floats up to 1 have their white at 1. Negative or
    larger values have no usual scale: there the extremes are black and white.

    >>> to_8_bit(np.array([[0, 2048, 4095]])).tolist(), to_8_bit(np.array([[0, 257, 65535]])).tolist()
    ([[0, 128, 255]], [[0, 1, 255]])
    """
    low, high = float(pixels.min()), float(pixels.max())
    if 0 <= low <= high < 2 ** BIT_DEPTHS[-1]:
        is_unit = pixels.dtype.kind == "f" and high <= 1
        low, high = 0, 1 if is_unit else next(2**bits - 1 for bits in BIT_DEPTHS if high < 2**bits)
    return _scale(pixels, low, high)


def _scale(values: np.ndarray, black: float, white: float) -> np.ndarray:
    if not np.isfinite([values.min(), values.max()]).all():
        raise BadImage("holds values that are not finite")
    shown = (values.astype(np.float32) - np.float32(black)) * np.float32(255 / max(white - black, 1e-20))
    return np.asarray(np.clip(np.rint(shown), 0, 255), np.uint8)


def _decode_dicom(data: bytes) -> np.ndarray:
    try:
        import pydicom
        from pydicom.pixels.decoders.base import get_decoder
    except ImportError as error:
        raise BadImage("DICOM needs the optional package pydicom: pip install 'pydicom>=3'") from error
    if b"1.2.840.10008.1.2.1.99" in data[:1024]:  # would be unpacked whole, whatever its size
        raise BadImage("deflated DICOM is not supported: save it uncompressed")
    try:
        header = pydicom.dcmread(io.BytesIO(data))
    except pydicom.errors.InvalidDicomError as error:
        raise BadImage("not a DICOM file, or its header is damaged") from error
    if "PixelData" not in header:
        raise BadImage("a DICOM file without an image")
    _check_size(header.Columns, header.Rows, int(header.get("NumberOfFrames") or 1))
    if header.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise BadImage("colour DICOM: a radiograph is grey")
    syntax = header.file_meta.TransferSyntaxUID
    stream = header.PixelData.find(b"\xff\x4f\xff\x51")  # JPEG 2000 repeats the size, and its decoder believes that one
    if stream >= 0 and syntax.is_compressed:
        width, height = struct.unpack_from(">II", header.PixelData, stream + 8)
        _check_size(width, height, frames=1)
    if syntax.is_compressed and not get_decoder(syntax).is_available:
        decoder = "pylibjpeg-openjpeg" if "JPEG 2000" in syntax.name else "pylibjpeg-libjpeg"
        raise BadImage(f"this compressed DICOM needs a decoder: pip install pylibjpeg {decoder}")
    grey = _to_display(header.pixel_array.astype(np.float32), header)
    return np.bitwise_not(grey) if header.PhotometricInterpretation == "MONOCHROME1" else grey


def _to_display(values: np.ndarray, header: Dataset) -> np.ndarray:
    """Stored values -> modality -> values of interest, as uint8 (DICOM PS3.3, C.11.1 and C.11.2)."""
    if header.get("ModalityLUTSequence"):
        values, *_ = _look_up(values, header.ModalityLUTSequence[0])
    else:
        values = values * float(header.get("RescaleSlope") or 1) + float(header.get("RescaleIntercept") or 0)
    grey = np.zeros_like(values, np.uint8)
    keys = ("WindowCenter", "WindowWidth")
    window = [float(np.ravel(header[key].value)[0]) for key in keys if key in header and header[key].VM]
    if header.get("VOILUTSequence"):
        grey = _scale(*_look_up(values, header.VOILUTSequence[0]))
    elif len(window) == 2 and window[1] > 0:
        centre, width = window
        if header.get("VOILUTFunction") == "SIGMOID":
            grey = _scale(1 / (1 + np.exp(-4 * (values - centre) / width)), 0, 1)
        else:
            if header.get("VOILUTFunction") != "LINEAR_EXACT" and width >= 1:
                centre, width = centre - 0.5, width - 1  # LINEAR: C.11.2.1.2.1
            grey = _scale(values, centre - width / 2, centre + width / 2)
    # no window, or one that misses every pixel: the extremes become black and white
    return grey if np.ptp(grey) else _scale(values, float(values.min()), float(values.max()))


def _look_up(values: np.ndarray, item: Dataset) -> tuple[np.ndarray, float, float]:
    """Pass values through a DICOM table; also its black and white."""
    count, first, bits = item.LUTDescriptor
    table = item.LUTData
    if isinstance(table, bytes):
        table = np.frombuffer(table, np.uint8 if len(table) < 2 * (count or 1 << 16) else np.dtype("<u2"))
    table = np.asarray(table, np.float32)
    return table[np.clip(values - first, 0, len(table) - 1).astype(np.intp)], 0, 2**bits - 1


def letterbox_box(height: int, width: int, size: int, fit: str) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of an image's content inside the square of `size` pixels.

    >>> letterbox_box(100, 50, 320, "letterbox"), letterbox_box(100, 50, 320, "stretch")
    ((80, 0, 240, 320), (0, 0, 320, 320))
    """
    if fit == "stretch":
        return 0, 0, size, size
    wide, high = (max(1, round(side * size / max(height, width))) for side in (width, height))
    left, top = (size - wide) // 2, (size - high) // 2
    return left, top, left + wide, top + high


def fit_square(pixels: np.ndarray, size: int, fit: str) -> np.ndarray:
    """Scale (H, W) uint8 to (size, size) uint8, antialiased.

    `fit` is "stretch" (the paper: scaled to 320 x 320) or "letterbox" (aspect kept, centred, black around it).
    """
    left, top, right, bottom = letterbox_box(pixels.shape[0], pixels.shape[1], size, fit)
    # Pillow widens the bilinear filter with the reduction; the gap lets very large images be averaged in blocks first
    content = Image.fromarray(pixels).resize((right - left, bottom - top), Image.Resampling.BILINEAR, reducing_gap=3.0)
    square = np.zeros((size, size), np.uint8)
    square[top:bottom, left:right] = np.asarray(content)
    return square


def unlike_radiograph(path: Path, pixels: np.ndarray) -> str | None:
    """Say in a few words why an image is hardly a radiograph, or None; `pixels` as `read_radiograph` gave them.

    A drawing or screenshot is mostly flat and its steps are hard; noise and soft tissue keep radiographs from that,
    however wide their black borders.
    """
    dark, bright = np.percentile(pixels, (0.5, 99.5))
    if bright - dark < MIN_CONTRAST:
        return "blank"
    if _mean_chroma(path) > MAX_CHROMA:
        return "strongly coloured"
    steps = np.abs(np.diff(pixels.astype(np.int16), axis=1))
    changes = steps[steps > 0]
    if changes.size < steps.size / 2 and (changes > 32).sum() > changes.size / 4:
        return "screenshot-like: flat areas and hard edges"
    return None


def _mean_chroma(path: Path) -> float:
    try:
        image = _open_picture(_read_bytes(path))
        if image.mode in ("1", "L", "LA") or image.mode[0] in "IF":
            return 0.0
        small = image.convert("RGBA").resize((256, 256), Image.Resampling.NEAREST)
    except Exception:  # DICOM, where colour is refused already
        return 0.0
    pixels = np.asarray(small, np.float32)
    return float(np.mean(np.ptp(pixels[..., :3], axis=2) * pixels[..., 3] / 255))


Item = TypeVar("Item")
Done = TypeVar("Done")
PREPROCESSING_VERSION = 2  # raise it when decoding, resizing or shards change: caches made before are then not used
BAD_SHARE = 0.01  # of all images: more unreadable ones than this stop a run, unless it was told to skip them


@dataclass(frozen=True)
class Shard:
    """The decoded images of one body part of one split: FILE.npy, an array (n, S, S) uint8, and FILE.json beside it."""

    file: Path  # the .npy
    names: list[str]  # which images these are, in the order of the rows
    checksums: np.ndarray  # (n,) crc32 of each row
    bad: dict[str, str]  # name -> why, of the images that could not be decoded; their rows are black


def shard_file(folder: Path, views: Sequence[View], size: int, fit: str) -> Path:
    """Name the cache file of some images after all that decides its content: preprocessing, names, sizes, times of change."""
    key = [f"{PREPROCESSING_VERSION}|{size}|{fit}"]
    for view in views:
        state = "absent"
        with contextlib.suppress(OSError):
            status = os.stat(view.file)  # noqa: PTH116
            state = f"{status.st_size}|{status.st_mtime_ns}"
        key.append(f"{view.name}|{state}\n")
    return folder / f"{views[0].part}-{size}-{fit}-{digest_of(''.join(key))[:20]}.npy"


def array_header(count: int, size: int) -> bytes:
    """Make the .npy header of a (count, size, size) uint8 array."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size)})
    return header.getvalue()


def json_digest(content: object) -> str:
    """Compute the sha256 of what JSON can hold."""
    return digest_of(json.dumps(content))


def open_shard(file: Path, size: int) -> Shard | None:
    """Open a shard that is there already; None where it is absent, incomplete or damaged other than in its pixels."""
    try:
        kept = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        sound = kept.pop("sha256") == json_digest(kept)
        header = array_header(len(kept["names"]), size)
        with file.open("rb") as array:
            whole = array.read(len(header)) == header and file.stat().st_size == len(header) + len(kept["names"]) * size**2
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Shard(file, kept["names"], np.array(kept["crc32"], np.uint32), kept["bad"]) if sound and whole else None


def decode_square(path: Path, size: int, fit: str) -> np.ndarray | str:
    """Decode one image to (size, size) uint8, or say why that cannot be done."""
    try:
        return fit_square(read_radiograph(path), size, fit)
    except BadImage as error:
        return str(error)


def map_ahead(function: Callable[[Item], Done], items: Iterable[Item], workers: int, ahead: int) -> Iterator[Done]:
    """Yield function(item) in order, computed in `workers` threads, at most `ahead` (1 or more) before they are wanted."""
    waiting: deque[Future[Done]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def build_shard(file: Path, views: Sequence[View], size: int, config: Config, bar: Any, stop: StopSignals) -> Shard:
    """Decode images into a new shard.

    Raises:
        UserError: the cache folder is full or cannot be written.
    """
    names, workers = [view.name for view in views], config.workers or core_count()
    checksums: list[int] = []
    bad: dict[str, str] = {}
    squares = map_ahead(lambda view: decode_square(view.path, size, config.fit), views, workers, 8 * workers)
    with atomic_write(file) as out:
        out.write(array_header(len(names), size))
        for name, square in zip(names, squares, strict=True):
            if isinstance(square, str):
                bad[name] = square
            content = memoryview(bytes(size**2)) if isinstance(square, str) else square.data
            checksums.append(zlib.crc32(content))
            out.write(content)
            bar.update()
            stop.check()
    kept = {"names": names, "crc32": checksums, "bad": bad}
    with atomic_write(file.with_suffix(".json")) as out:
        out.write(json.dumps({**kept, "sha256": json_digest(kept)}).encode())
    return Shard(file, names, np.array(checksums, np.uint32), bad)


def cache_folder(config: Config, root: Path) -> Path:
    """Choose where the cache lives: --cache-dir, else beside the data, else in the user's cache folder."""
    if config.cache_dir:
        return config.cache_dir
    beside = root / ".mura_cache"
    if os.access(beside if beside.exists() else root, os.W_OK):
        return beside
    try:
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise UserError(f"{root}: cannot be written, and there is no home folder: give --cache-dir") from error
    return user / PROGRAM / digest_of(str(root.resolve()))[:12]


@dataclass(frozen=True)
class Decoded:
    """Decoded images of a split: the views that could be read, where their pixels are, and which could not be read."""

    views: tuple[View, ...]
    shards: tuple[Shard, ...]
    rows: np.ndarray  # (N, 2) int64: shard and row of each view
    bad: dict[str, str]  # name -> why


def open_cache(
    views: Sequence[View], size: int, config: Config, root: Path, stop: StopSignals, *, build: bool = True
) -> Decoded:
    """Decode each image once: open the shards that are there, build the others.

    A shard with unreadable images is decoded again when one of them has become readable.

    Raises:
        UserError: unreadable images, with --on-bad-image stop or more than 1 % of them; a cache that cannot be written.
    """
    folder = cache_folder(config, root)
    shards: list[Shard] = []
    with progress_bar(total=len(views), desc="decode", unit="image") as bar:
        for part in sorted({view.part for view in views}):
            chosen = [view for view in views if view.part == part]
            file = shard_file(folder, chosen, size, config.fit)
            shard = open_shard(file, size)
            bad = [view for view in chosen if shard and view.name in shard.bad]
            if not all(isinstance(decode_square(view.path, 32, config.fit), str) for view in bad):
                shard = None
            if shard:
                bar.update(len(chosen))
            elif not build:
                raise UserError(f"{file}: was not written by the first process", EXIT_FAILED)
            shards.append(shard or build_shard(file, chosen, size, config, bar, stop))
    unread = {name: why for shard in shards for name, why in shard.bad.items()}
    place = {name: (i, row) for i, shard in enumerate(shards) for row, name in enumerate(shard.names)}
    good = tuple(view for view in views if view.name not in unread)
    rows = np.array([place[view.name] for view in good], np.int64).reshape(-1, 2)
    return Decoded(good, tuple(shards), rows, unread)


def check_bad_images(decoded: Decoded, folder: Path, config: Config) -> None:
    """Report unreadable images: a line with the count, the first ten by name.

    Raises:
        UserError: with --on-bad-image stop, where more than 1 % are unreadable, or where nothing is left.
    """
    if not decoded.bad:
        return
    total = len(decoded.views) + len(decoded.bad)
    for name, why in list(decoded.bad.items())[:10]:
        note(f"{folder / name}: {why}")
    more = f"{len(decoded.bad)} of {total} images below {folder} cannot be read (the first are listed above)"
    too_many = config.on_bad_image is None and len(decoded.bad) > BAD_SHARE * total
    if config.on_bad_image == "stop" or too_many or not decoded.views:
        raise UserError(f"{more}; replace or remove them" + (", or add --on-bad-image skip" if too_many else ""), EXIT_FAILED)
    note(f"{more}; they are skipped")


def core_count() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class MuraDataset(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Radiographs as (image, label): image (1, S, S) uint8, label 0 normal or 1 abnormal.

    A batch is one gather from the memory-mapped cache: `batch(indices)`, which `torch.utils.data.DataLoader` reaches
    through `__getitems__`. It can be pickled to a worker process: the maps are opened anew there. Each image's checksum is
    verified when it is first read.

    Args:
        decoded: what `open_cache` returned.
        choice: the views to use, all of them in `decoded` (default: all).
    """

    def __init__(self, decoded: Decoded, choice: Sequence[View] | None = None) -> None:
        place = {view.name: i for i, view in enumerate(decoded.views)}
        self.views = tuple(view for view in (decoded.views if choice is None else choice) if view.name in place)
        self.labels = np.array([view.label for view in self.views], dtype=np.int64)
        self._shards = decoded.shards
        self._rows = decoded.rows[[place[view.name] for view in self.views]]
        self._verified = np.zeros(len(self.views), dtype=bool)
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Give the items of a whole batch; the DataLoader calls this."""
        return list(zip(self.batch(np.asarray(indices)), self.labels[indices].tolist(), strict=True))

    def fingerprint(self) -> str:
        """Tell this set from any other: a digest of names, labels and pixels."""
        checksums = [self._shards[shard].checksums[row] for shard, row in self._rows]
        lines = (f"{view.name},{view.label},{crc}\n" for view, crc in zip(self.views, checksums, strict=True))
        return digest_of("".join(lines))[:16]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def batch(self, indices: np.ndarray) -> Tensor:
        """Gather images, (B, 1, S, S) uint8.

        Raises:
            UserError: an image in the cache is damaged.
        """
        rows = self._rows[indices]
        pixels = np.stack([self._map(shard)[row] for shard, row in rows.tolist()])
        for i in np.flatnonzero(~self._verified[indices]):
            shard = self._shards[rows[i, 0]]
            if zlib.crc32(pixels[i].tobytes()) != shard.checksums[rows[i, 1]]:
                raise UserError(f"{shard.file}: damaged at image {self.views[indices[i]].name}; delete the file, the next run "
                                "decodes it again", EXIT_FAILED)
        self._verified[indices] = True
        return torch.from_numpy(pixels)[:, None]

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            file = self._shards[shard].file
            try:
                self._maps[shard] = np.load(file, mmap_mode="r")
            except OSError as error:
                raise UserError(f"{file}: cannot be opened any more; run again, which decodes anew", EXIT_FAILED) from error
        return self._maps[shard]


def choose_image_size(views: Sequence[View], asked: int | None) -> int:
    """Choose the input side, pixels: as asked, else 320 or, where smaller, the longest side found, rounded up to 32.

    The headers of up to 200 images, evenly spread, are looked at.
    """
    if asked:
        return asked
    longest = 0
    for view in views[:: max(1, -(-len(views) // 200))]:
        with contextlib.suppress(BadImage, OSError, ValueError):
            longest = max(longest, *_open_picture(_read_bytes(view.path)).size)
    return min(PAPER_SIZE, max(64, -(-longest // 32) * 32)) if longest else PAPER_SIZE


# ===== 5 batches and augmentation ====================================================================================

ORDER, VARIATION, STATISTICS, MIXTURE = 0, 1, 2, 3  # streams of random numbers


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffle 0..count-1 for an epoch (numbered from 0) and cut it into batches whose sizes differ by one at most.

    The order follows from seed and epoch alone, which is what makes a run resumable at any batch.

    >>> [len(batch) for batch in epoch_batches(10, 4, seed=0, epoch=0)]
    [4, 3, 3]
    """
    order = np.random.default_rng([ORDER, seed, epoch]).permutation(count)
    return np.array_split(order, -(-count // batch_size))


class Feed:
    """Brings batches of images to the device: from the device's memory where the data set fits there, else streamed.

    On CUDA a data set that takes at most an eighth of the free memory is copied there once: activations, gradients and the
    other split need theirs. Otherwise a thread gathers and pins batches two ahead.
    """

    def __init__(self, dataset: MuraDataset, device: torch.device) -> None:
        self.dataset, self.device = dataset, device
        self.resident: Tensor | None = None
        if device.type == "cuda" and len(dataset):
            image, _ = dataset[0]
            if len(dataset) * image.numel() <= torch.cuda.mem_get_info(device)[0] // 8:
                self.resident = torch.empty(len(dataset), *image.shape, dtype=torch.uint8, device=device)
                for block in np.array_split(np.arange(len(dataset)), -(-len(dataset) // 1024)):
                    self.resident[block[0] : block[-1] + 1] = dataset.batch(block).to(device)

    def __call__(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Yield the images of each batch of indices, (B, 1, S, S) uint8, on the device."""
        if self.resident is not None:
            for indices in batches:
                yield self.resident[torch.from_numpy(indices).to(self.device, non_blocking=True)]
            return
        for images in map_ahead(self._gather, batches, workers=1, ahead=2):
            yield images.to(self.device, non_blocking=True)

    def _gather(self, indices: np.ndarray) -> Tensor:
        images = self.dataset.batch(indices)
        return images.pin_memory() if self.device.type == "cuda" else images


def to_unit(images: Tensor) -> Tensor:
    """Scale (…) uint8 to float, 0 to 1."""
    return images.float() / 255


def draw_variation(config: Config, count: int, epoch: int, batch: int) -> Tensor:
    """Draw how each image is varied, (count, 4): mirrored (-1 or 1), angle in radians, brightness shift, contrast factor.

    The draw follows from seed, epoch and batch alone, so that a resumed run repeats it.
    """
    flip, *rest = np.random.default_rng([VARIATION, config.seed, epoch, batch]).random((count, 4)).T
    turn, shift, change = (2 * uniform - 1 for uniform in rest)
    columns = (np.where(flip < config.flip, -1, 1), np.deg2rad(config.rotation) * turn, config.brightness * shift,
               1 + config.contrast * change)
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def draw_own_share(config: Config, epoch: int, batch: int) -> float:
    """Draw what is left of each image of a batch when mixup blends it with another, 1/2 to 1 (arXiv 1710.09412, section 2)."""
    if not config.mixup:
        return 1.0
    share = np.random.default_rng([MIXTURE, config.seed, epoch, batch]).beta(config.mixup, config.mixup)
    return float(max(share, 1 - share))  # of two images blended either way, the greater share is the image's own


def augment(images: Tensor, drawn: Tensor) -> Tensor:
    """Flip, rotate (about the centre, black outside) and change brightness and contrast of a whole batch at once.

    Args:
        images: (B, 1, S, S) float, 0 to 1.
        drawn: (B, 4) from `draw_variation`, on the same device.

    Returns:
        (B, 1, S, S) float, 0 to 1. Contrast is changed about each image's mean.
    """
    mirrored, angle, shift, factor = drawn.unbind(1)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([torch.stack([mirrored * cos, -sin, zero], 1), torch.stack([mirrored * sin, cos, zero], 1)], 1)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    images = functional.grid_sample(images, grid, align_corners=False)
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * factor.view(-1, 1, 1, 1) + mean + shift.view(-1, 1, 1, 1)).clamp(0, 1)


@dataclass(frozen=True)
class Normalization:
    """Grey levels (0 to 1) to network input: three equal channels, (x - mean) / std."""

    kind: str  # imagenet, dataset, given, or image: each image by its own mean and deviation, not by those below
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of each channel; ImageNet's, as torchvision's weights expect
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise (B, 1, S, S) float in 0..1 to (B, 3, S, S)."""
        if self.kind == "image":
            std, mean = torch.std_mean(images, (1, 2, 3), keepdim=True)
            return ((images - mean) / std.clamp(min=1 / 255)).expand(-1, 3, -1, -1)  # a blank image stays finite
        given = (torch.tensor(values, dtype=images.dtype).view(1, 3, 1, 1) for values in (self.mean, self.std))
        mean, std = (values.to(images.device, non_blocking=True) for values in given)
        return (images - mean) / std


def choose_normalization(kind: str, dataset: MuraDataset) -> Normalization:
    """Make the normalisation of --normalization; `dataset` measures up to 2,000 training images, evenly spread."""
    if kind in ("imagenet", "image"):
        return Normalization(kind)
    if kind != "dataset":
        mean, std = (float(part) for part in kind.split(","))
        return Normalization("given", (mean,) * 3, (std,) * 3)
    chosen = np.arange(len(dataset))[:: max(1, -(-len(dataset) // 2000))]
    sums = np.zeros(3)
    for block in np.array_split(chosen, -(-len(chosen) // 64)):
        pixels = dataset.batch(block).double() / 255
        sums += (pixels.numel(), pixels.sum().item(), pixels.square().sum().item())
    count, total, squares = sums.tolist()  # a numpy number would not load with weights_only=True
    mean = total / count
    std = max(math.sqrt(max(squares / count - mean**2, 0)), 1 / 255)
    return Normalization("dataset", (mean,) * 3, (std,) * 3)


# ===== 6 model =======================================================================================================

MAP_STRIDE = 32  # input pixels to a cell of the last feature maps, of either architecture
STAGES = {  # torchvision's names for what comes before the pooling
    "densenet169": ("features",),  # arXiv 1608.06993
    "resnet50": ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),  # arXiv 1512.03385
}


class Network(nn.Module):
    """A torchvision classifier, cut where Grad-CAM needs it: features(x), then classify(features); no hooks.

    `features` are the rectified maps of the last convolutional stage, `classify` is mean pooling and one linear unit.
    torchvision's DenseNet rectifies them in place inside forward(); here that is a step of its own.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model
        if model == "densenet169":
            source: Any = torchvision.models.densenet169()
            self.backbone = nn.Sequential(source.features, nn.ReLU())
            width = source.classifier.in_features
        else:
            source = torchvision.models.resnet50(zero_init_residual=True)
            self.backbone = nn.Sequential(*(getattr(source, stage) for stage in STAGES[model]))
            width = source.fc.in_features
        self.head = nn.Linear(width, 1)

    def features(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, S, S) to rectified feature maps (B, C, S/32, S/32)."""
        maps: Tensor = self.backbone(images)
        return maps

    def classify(self, features: Tensor) -> Tensor:
        """Map feature maps (B, C, h, w) to logits (B,), positive towards abnormal; in fp32 also under autocast."""
        return (features.float().mean((2, 3)) * self.head.weight[0]).sum(1) + self.head.bias

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, S, S) to logits (B,)."""
        return self.classify(self.features(images))


def logits_of(network: nn.Module, images: Tensor, *, tta: bool) -> Tensor:
    """Map normalised images (B, 3, S, S) to logits (B,); with `tta` each is the mean with its mirror image's."""
    logits: Tensor = network(images)
    return (logits + network(images.flip(3))) / 2 if tta else logits


def build_network(model: str, weights: str, seed: int) -> Network:
    """Build a network with the weights of --weights; the head is always new, unless the file is a checkpoint of ours.

    Raises:
        UserError: the weights cannot be had, or do not fit.
    """
    torch.manual_seed(seed)
    network = Network(model)
    if weights == "imagenet":
        load_torchvision(network, imagenet_state(model), "the ImageNet weights")
    elif weights != "none":
        state = read_weights(Path(weights))
        if state.get("format") == PROGRAM:
            if state["model"] != model:
                raise UserError(f"--weights {weights}: is a {state['model']}, not a {model}; add --model {state['model']}")
            network.load_state_dict(state["state_dict"])
        else:
            load_torchvision(network, state, weights)
    return network


def imagenet_state(model: str) -> dict[str, Any]:
    """Fetch torchvision's ImageNet weights, from torch's hub folder where they are there already.

    Raises:
        UserError: no network; the message says which file to put where.
    """
    source = torchvision.models.get_model_weights(model).IMAGENET1K_V1
    file = Path(torch.hub.get_dir()) / "checkpoints" / source.url.rpartition("/")[2]
    try:
        state: dict[str, Any] = source.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
    except Exception as error:  # urllib, socket, hash and file errors, all with the same remedy
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"  # torch's may have several lines
        raise UserError(
            f"the ImageNet weights of {model} are not at hand ({reason}); fetch {source.url} elsewhere and put it at {file}, "
            "or give --weights FILE, or --weights none for a random start", EXIT_FAILED,
        ) from error
    return state


def load_torchvision(network: Network, state: dict[str, Any], name: str) -> None:
    """Load a torchvision state_dict into the backbone; its classifier is left out.

    Raises:
        UserError: it is of another architecture, or incomplete.
    """
    dotted = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")  # names in files from before torch 0.4 ...
    given = {dotted.sub(r"\1\2", key): value for key, value in state.items()}
    wanted, found = network.backbone.state_dict(), {}
    for key, value in wanted.items():
        place, _, rest = key.partition(".")
        optional = value if rest.endswith("num_batches_tracked") else None  # ... which count no batches
        found[key] = given.get(f"{STAGES[network.model][int(place)]}.{rest}", optional)
    missing = [key for key, value in wanted.items() if getattr(found[key], "shape", None) != value.shape]
    if missing:
        raise UserError(f"{name}: does not fit {network.model} ({len(missing)} of {len(wanted)} tensors are missing or of "
                        f"another shape); give weights of torchvision's {network.model}, or another --model")
    network.backbone.load_state_dict(found)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Choose the device: CUDA, then MPS, then CPU for `auto`; under torchrun each process takes its own CUDA device.

    Raises:
        UserError: the device asked for is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    kind, _, given = name.partition(":")
    index, count = int(given or local_rank), torch.cuda.device_count()
    if not {"cuda": cuda and index < count, "mps": mps, "cpu": True}[kind]:
        raise UserError(f"--device {name}: there is no such device here ({count} CUDA devices); use --device auto or cpu")
    return torch.device(kind, index) if kind == "cuda" else torch.device(kind)


@dataclass(frozen=True)
class Arithmetic:
    """How the network is computed on a device."""

    device: torch.device
    bf16: bool  # autocast to bfloat16: convolutions and products only, the loss stays in fp32
    channels_last: bool  # NHWC memory order

    def prepare(self, network: Network) -> Network:
        """Move a network to the device, in the memory order of choice."""
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        return network.to(device=self.device, memory_format=order)  # type: ignore[call-overload,no-any-return]

    def autocast(self) -> torch.autocast:
        """Give the context in which the network is to be called."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{torch.get_num_threads()} threads"
        tf32 = self.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        precision = "bf16" if self.bf16 else "tf32" if tf32 else "fp32"
        return f"{self.device} ({name}), {precision}{', channels_last' if self.channels_last else ''}"


def choose_arithmetic(device: torch.device, precision: str) -> Arithmetic:
    """Choose what pays on a device: bf16 on CUDA from compute capability 8 on and on CPUs with AMX, NHWC but on MPS.

    Only AMX counts: bf16 was measured at 0.7 times the speed of fp32 on an Intel CPU with avx512_bf16 alone (training and
    scoring, both architectures), and at a tenth on one with neither, so `auto` never takes it there.

    Raises:
        UserError: tf32 asked for where there is no CUDA device.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32: needs a CUDA device, this is {device.type}; use auto or fp32")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        fast = device.type == "cpu" and cpu_has_amx()
    return Arithmetic(device, precision == "bf16" or (precision == "auto" and fast), device.type != "mps")


def cpu_has_amx() -> bool:
    """Tell whether the CPU multiplies tiles of bfloat16 in hardware (AMX); False where that cannot be told."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
        flags = re.search(r"^flags[ \t]*:(.*)$", text, re.MULTILINE)
        return bool(flags and "amx_bf16" in flags[1].split())
    return False


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step; elsewhere do nothing.

    By default the activations of each step go back to Linux, which has to clear them anew: measured at a sixth of the
    CPU time of a step (DenseNet-169, 8 images of 256 px, a virtual machine), at the same peak of memory.
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((-4, 0), (-1, -1), (-2, 1 << 26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD (bytes)
            libc.mallopt(parameter, value)


# ===== 7 metrics =====================================================================================================

Floats = npt.NDArray[np.float64]
Drawn = dict[str, Floats]  # figure: its values in R resamples

METRICS = ("auroc", "kappa", "accuracy", "sensitivity", "specificity", "brier", "ece")
ECE_BINS = 15  # equal-width bins of the probability of abnormal (15 as in Guo et al. 2017, arXiv 1706.04599)
TAIL = 0.025  # left out at each end of an interval: 95 %
JACKKNIFE_GROUPS = 200  # groups of patients left out in turn; more would only sharpen a small correction
CHUNK = 2**19  # weights held at once (4 MB), whatever the number of images and resamples
TEMPERATURES = (0.05, 20.0)  # range searched
FOLDS = 5  # of patients, to see whether a temperature pays
MIN_PATIENTS = 20  # below this, four patients a fold, cross-validation tells nothing


@dataclass(frozen=True)
class Scored:
    """Labels and probabilities of N images, or of N studies once pooled; every field has length N."""

    path: tuple[str, ...]  # of the image, or of the study
    part: npt.NDArray[np.str_]  # "XR_ELBOW"
    patient: npt.NDArray[np.str_]  # the unit that is resampled
    study: npt.NDArray[np.str_]  # path of the study, unique across body parts
    label: npt.NDArray[np.int64]  # 1 = abnormal
    probability: Floats  # of abnormal

    def take(self, rows: npt.NDArray[Any]) -> Scored:
        """Return the given rows: (K,) integers, or a mask (N,)."""
        picked = {f.name: np.asarray(getattr(self, f.name))[rows] for f in fields(self)}
        return Scored(**picked | {"path": tuple(picked["path"].tolist())})


def pool_studies(images: Scored) -> Scored:
    """Average the probabilities of each study's views (arXiv 1712.06957, section 3), in order of first appearance.

    >>> pair = [np.array([x, x]) for x in ("XR_HAND", "patient1", "study1", 1)]
    >>> pool_studies(Scored(("1.png", "2.png"), *pair, np.array([0.2, 0.6]))).probability.tolist()
    [0.4]
    """
    _, first, study = np.unique(images.study, return_index=True, return_inverse=True)
    mean = np.bincount(study, images.probability) / np.bincount(study)
    order = np.argsort(first)
    pooled = images.take(first[order])
    return replace(pooled, path=tuple(pooled.study.tolist()), probability=mean[order])


def ratio(part: Floats, whole: Floats) -> Floats:
    """Divide, with NaN where the whole is zero."""
    quotient: Floats = np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)
    return quotient


def auroc(label: npt.NDArray[Any], probability: Floats, weight: Floats | None = None) -> Floats:
    """Return the area under the ROC curve for each row of weights (R, N): shape (R,), NaN where a class is absent.

    It is the chance that an abnormal case scores above a normal one, ties counting half (Hanley & McNeil 1982).

    >>> auroc(np.array([0, 1, 0, 1]), np.array([0.1, 0.3, 0.3, 0.9]))
    array([0.875])
    """
    weight = np.ones((1, len(label))) if weight is None else weight
    order = np.argsort(probability, kind="stable")
    ties = np.flatnonzero(np.diff(probability[order], prepend=-np.inf))
    weight, abnormal = weight[:, order], label[order]
    positive = np.add.reduceat(weight * abnormal, ties, axis=1)
    negative = np.add.reduceat(weight * (1 - abnormal), ties, axis=1)
    won = (positive * (np.cumsum(negative, axis=1) - negative / 2)).sum(axis=1)
    return ratio(won, positive.sum(axis=1) * negative.sum(axis=1))


def cohen_kappa(tp: Floats, fp: Floats, fn: Floats, tn: Floats) -> Floats:
    """Return agreement beyond chance (Cohen 1960); NaN where chance alone agrees fully. All of shape (R,)."""
    total = tp + fp + fn + tn
    chance = (tp + fp) * (tp + fn) + (tn + fn) * (tn + fp)
    return ratio(total * (tp + tn) - chance, total**2 - chance)


def ece_bin(probability: Floats) -> npt.NDArray[np.intp]:
    """Return the bin k of each probability: k / 15 <= p < (k + 1) / 15, and 1.0 in the last."""
    return np.minimum((probability * ECE_BINS).astype(np.intp), ECE_BINS - 1)


def score(label: npt.NDArray[Any], probability: Floats, threshold: float, weight: Floats | None = None) -> Drawn:
    """Return every figure for each row of weights (R, N), how often each case counts; each figure has shape (R,).

    Abnormal means probability > threshold (the paper's 'above 0.5'). ECE compares the mean probability of abnormal
    with the observed frequency in each `ece_bin` and averages the absolute gaps by the cases in the bins. Undefined
    figures are NaN.

    >>> float(score(np.array([0, 1, 1]), np.array([0.2, 0.4, 0.9]), 0.5)["sensitivity"][0])
    0.5
    """
    weight = np.ones((1, len(label))) if weight is None else weight
    called, gap = probability > threshold, label - probability
    binned = gap[:, None] * (ece_bin(probability)[:, None] == np.arange(ECE_BINS))
    cells = (called * label, called * (1 - label), ~called * label, ~called * (1 - label))
    sums = weight @ np.column_stack([*cells, gap**2, binned])
    tp, fp, fn, tn, brier = sums[:, :5].T
    total = tp + fp + fn + tn
    return {
        "auroc": auroc(label, probability, weight),
        "kappa": cohen_kappa(tp, fp, fn, tn),
        "accuracy": ratio(tp + tn, total),
        "sensitivity": ratio(tp, tp + fn),
        "specificity": ratio(tn, tn + fp),
        "brier": ratio(brier, total),
        "ece": ratio(np.abs(sums[:, 5:]).sum(axis=1), total),
    }


def score_resampled(rows: Scored, threshold: float, patient: npt.NDArray[Any], weight: npt.NDArray[Any]) -> Drawn:
    """Return `score` for weights of patients (R, P), a chunk at a time; `patient` (N,) holds each row's index in P."""
    chunks = np.array_split(weight, -(-len(weight) * len(patient) // CHUNK))
    scores = [score(rows.label, rows.probability, threshold, chunk[:, patient].astype(float)) for chunk in chunks]
    return {figure: np.concatenate([part[figure] for part in scores]) for figure in METRICS}


def bca_interval(value: float, drawn: Floats, left_out: Floats, patients: int) -> tuple[float, float]:
    """Return the bias-corrected and accelerated bootstrap interval (BCa; Efron 1987) of a figure.

    Plain percentiles cover too little near 1 and in small samples. BCa takes the bias from the resamples `drawn` and
    the skew from the jackknife `left_out`; its normal quantiles are widened to Student's t with n - 1 degrees of
    freedom, times sqrt(n / (n - 1)), for n patients (Hesterberg 2015, arXiv 1411.5279).
    """
    normal, n = NormalDist(), patients
    edge = normal.inv_cdf(1 - TAIL)
    edge *= (1 + (edge**2 + 1) / (4 * (n - 1))) * (n / (n - 1)) ** 0.5
    below = np.mean(drawn < value) + np.mean(drawn == value) / 2
    bias = normal.inv_cdf(float(np.clip(below, 0.5 / len(drawn), 1 - 0.5 / len(drawn))))
    pull = left_out.mean() - left_out
    skew = float((pull**3).sum() / max(6 * (pull**2).sum() ** 1.5, 1e-300))
    levels = [normal.cdf(bias + z / max(1 - skew * z, 1e-3)) for z in (bias - edge, bias + edge)]
    low, high = np.quantile(drawn, levels)
    return float(low), float(high)


def ece_interval(value: float, drawn: Floats) -> tuple[float, float]:
    """Return the interval of ECE, an average of absolute gaps, which noise can only raise.

    It is raised in the sample and once more in each resample. Where all of the gap is noise, resampling raises it by
    the factor sqrt(2): the bias lies between 0 and rise / (sqrt(2) - 1), and each end takes the bound safe for it.
    From about 100 patients on it covers 95 %; below, bins of one or two cases hide the noise (83 % with 30 patients).
    """
    rise = max(0.0, float(drawn.mean()) - value)
    low, high = np.quantile(drawn, [TAIL, 1 - TAIL]) - rise
    return max(0.0, float(low) - rise / (2**0.5 - 1)), float(high)


def value_and_interval(figure: str, value: float, drawn: Floats, left_out: Floats, rows: Scored) -> dict[str, float | None]:
    """Return {"value", "low", "high"} of a figure, None where undefined.

    Undefined resamples (a class is absent, say) are dropped; there is no interval where they are the majority, or with
    one patient. A faultless figure is faultless in every resample, too: its interval is the exact one, up to the
    error rate that stays unseen in so many patients with a chance of 2.5 % (Clopper & Pearson 1934).
    """
    defined, patients = drawn[np.isfinite(drawn)], len(np.unique(rows.patient))
    left_out = left_out[np.isfinite(left_out)]
    if np.isnan(value) or len(defined) < len(drawn) / 2 or not len(left_out):
        return {"value": None if np.isnan(value) else value, "low": None, "high": None}
    ends = ece_interval(value, defined) if figure == "ece" else bca_interval(value, defined, left_out, patients)
    low, high = min(value, *ends), max(value, *ends)
    if figure not in ("ece", "brier") and (value == 1 or (value == 0 and figure != "kappa")):
        abnormal, normal = (len(np.unique(rows.patient[rows.label == label])) for label in (1, 0))
        support = {"accuracy": patients, "sensitivity": abnormal, "specificity": normal}
        unseen = 1 - TAIL ** (1 / support.get(figure, min(abnormal, normal)))
        low, high = (min(low, 1 - unseen), high) if value > 0 else (low, max(high, unseen))
    return {"value": value, "low": low, "high": high}


def bootstrap(rows: Scored, threshold: float, resamples: int, seed: int) -> dict[str, Any]:
    """Return every figure with its 95 % interval from resampled patients, who bring all their images or studies.

    Also `count` and `positives` (of rows), `patients`, and `undefined`: the resamples that left some figure undefined.
    Patients are drawn in the order of their names, so the order of the rows does not matter.
    """
    names, patient = np.unique(rows.patient, return_inverse=True)
    n, random = len(names), np.random.default_rng(seed)
    value = score(rows.label, rows.probability, threshold)
    drawn = left_out = {figure: np.empty(0) for figure in METRICS}
    if n > 1:
        counts = [np.bincount(random.integers(n, size=n), minlength=n).astype(np.int16) for _ in range(resamples)]
        drawn = score_resampled(rows, threshold, patient, np.array(counts))
        group = np.arange(min(n, JACKKNIFE_GROUPS))[:, None]
        left_out = score_resampled(rows, threshold, patient, np.arange(n) % len(group) != group)
    undefined = np.isnan(np.stack(list(drawn.values()))).any(axis=0).sum()
    sizes = {"count": len(patient), "positives": rows.label.sum(), "patients": n, "undefined": undefined}
    return {name: int(size) for name, size in sizes.items()} | {
        name: value_and_interval(name, float(value[name][0]), drawn[name], left_out[name], rows) for name in METRICS
    }


def evaluate(images: Scored, threshold: float, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Return {"levels": {"image", "study"}, "parts": {part: {"image", "study"}}}, each as `bootstrap` describes."""

    def levels(chosen: Scored) -> dict[str, Any]:
        """Bootstrap images, and the studies they make up."""
        both = {"image": chosen, "study": pool_studies(chosen)}
        return {level: bootstrap(rows, threshold, resamples, seed) for level, rows in both.items()}

    parts = {str(part): levels(images.take(images.part == part)) for part in np.unique(images.part)}
    return {"levels": levels(images), "parts": parts}


def sigmoid(logits: Floats, temperature: float = 1.0) -> Floats:
    """Turn logits (N,) into probabilities of abnormal, calibrated by the temperature (arXiv 1706.04599)."""
    return 0.5 * (1 + np.tanh(0.5 * logits / temperature))  # the same as 1 / (1 + exp(-x)), without overflow


def likeliest_temperature(logit: Floats, label: npt.NDArray[Any]) -> float:
    """Return the T that minimises the log loss of logit / T, by bisection: the loss is convex in 1 / T."""
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    for _ in range(60):
        middle = (low + high) / 2
        slope = np.mean(logit * (sigmoid(logit, 1 / middle) - label))
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 2 / (low + high)


def fit_temperature(logit: Floats, label: npt.NDArray[Any], patient: npt.NDArray[Any]) -> float:
    """Return the temperature T that calibrates logit / T (Guo et al. 2017, arXiv 1706.04599), or 1.0.

    It is 1.0 unless it pays on patients that it was not fitted to: in FOLDS-fold cross-validation by patient the log
    loss has to fall, per patient, by more than its standard error. Also 1.0 with one class, few patients, or labels
    that the sign of the logit explains without fault, which leave T without a lower bound.
    """
    names, index = np.unique(patient, return_inverse=True)
    if len(names) < MIN_PATIENTS or len(np.unique(label)) < 2:
        return 1.0
    fold = (np.random.default_rng(0).permutation(len(names)) % FOLDS)[index]
    held_out = np.array([likeliest_temperature(logit[fold != k], label[fold != k]) for k in range(FOLDS)])[fold]
    wrong = np.where(label == 1, -logit, logit)
    gain = np.bincount(index, np.logaddexp(0, wrong) - np.logaddexp(0, wrong / held_out))
    fitted = likeliest_temperature(logit, label)
    bounded = TEMPERATURES[0] * 1.01 < fitted < TEMPERATURES[1] / 1.01
    return fitted if bounded and gain.mean() > gain.std(ddof=1) / len(names) ** 0.5 else 1.0


def best_threshold(label: npt.NDArray[Any], probability: Floats) -> float:
    """Return the threshold of highest kappa: midway between neighbouring probabilities, or 0.5 if none is better.

    Ties go to the one nearest to 0.5; meant for the pooled studies of val.

    >>> best_threshold(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.9]))
    0.25
    """
    levels = np.unique(probability)
    middle = (levels[1:] + levels[:-1]) / 2
    candidates = np.append(np.where(middle < levels[1:], middle, levels[:-1]), 0.5)
    abnormal, normal = (np.sort(probability[label == value]) for value in (1, 0))
    fn, tn = (np.searchsorted(group, candidates, side="right").astype(float) for group in (abnormal, normal))
    kappa = cohen_kappa(len(abnormal) - fn, len(normal) - tn, fn, tn)
    if not (len(abnormal) and len(normal)):  # kappa is 0 or undefined everywhere
        return 0.5
    best = candidates[kappa == np.nanmax(kappa)]
    return float(best[np.argmin(np.abs(best - 0.5))])


# ===== 8 train and predict loops =====================================================================================


class Stopped(BaseException):
    """Raised between batches after SIGINT or SIGTERM; a BaseException, so that no handler of errors takes it for one."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopSignals:
    """Notes SIGINT and SIGTERM instead of dying of them, so that the loops can stop between two batches.

    A second Ctrl-C ends the process the plain way; SIGTERM may come several times, from torchrun and from a scheduler.
    In a thread other than the main one nothing is installed.
    """

    def __init__(self) -> None:
        self.signum = 0
        with contextlib.suppress(ValueError):
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.signum:
            raise Stopped(self.signum)


@dataclass(frozen=True)
class Processes:
    """The processes of a torchrun job, or this one alone; torch.distributed's environment variables tell."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @staticmethod
    def from_environment() -> Processes:
        """Read what torchrun set."""
        given = os.environ
        return Processes(int(given.get("RANK", 0)), int(given.get("WORLD_SIZE", 1)), int(given.get("LOCAL_RANK", 0)))

    def start(self, device: torch.device) -> None:
        """Join the other processes: NCCL on CUDA, gloo elsewhere. The first may decode for hours while the others wait."""
        if self.world > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # NCCL's collectives of objects go by the current device
            patience = timedelta(hours=12)
            store, rank, world = next(dist.rendezvous("env://", timeout=patience))  # type: ignore[attr-defined]
            if os.environ.get("LOCAL_WORLD_SIZE") == str(world):  # one machine, so that all count alike
                # torchrun keeps one store for all its restarts, and a restart would meet the dead processes' addresses there
                attempt = f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
                store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def total(self, values: Tensor) -> list[float]:
        """Sum (n,) float64 values over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values.tolist()

    def gather(self, mine: list[np.ndarray]) -> list[np.ndarray]:
        """Interleave the processes' lists: the i-th item of process r becomes item i * world + r."""
        if self.world == 1:
            return mine
        lists: list[list[np.ndarray]] = [[] for _ in range(self.world)]
        dist.all_gather_object(lists, mine)
        return [item for items in itertools.zip_longest(*lists) for item in items if item is not None]

    def same_buffers(self, network: nn.Module) -> None:
        """Give every process the first one's running statistics, so that all evaluate the same network."""
        if self.world > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)


@dataclass
class Progress:
    """Where a training run stands: all that changes besides the tensors, as plain values that a checkpoint can hold."""

    epoch: int = 0  # epochs finished, validation included
    batch: int = 0  # batches finished in the current epoch
    loss: float = 0.0  # sums over the current epoch's images
    correct: float = 0.0
    seen: float = 0.0
    seconds: float = 0.0  # spent in the current epoch
    lr: float = 0.0  # of the last step
    best_epoch: int = 0
    history: list[dict[str, float | None]] = field(default_factory=list)

    def add(self, loss: float, correct: float, seen: float) -> None:
        """Count a batch in."""
        self.batch += 1
        self.loss, self.correct, self.seen = self.loss + loss, self.correct + correct, self.seen + seen

    def end_epoch(self, row: dict[str, float | None]) -> bool:
        """Close the epoch with its row of the history; tell whether it is the best: by val's accuracy, ties by its loss."""
        self.history.append(row)
        rank = [(entry["val_accuracy"] or 0, -(entry["val_loss"] or 0)) for entry in self.history]
        best = rank[-1] > max(rank[:-1], default=(-1, 0))
        self.epoch, self.batch, self.loss, self.correct, self.seen, self.seconds = self.epoch + 1, 0, 0, 0, 0, 0
        self.best_epoch = self.epoch if best else self.best_epoch
        return best


def loss_weights(views: Sequence[View], weights: dict[str, tuple[float, float]]) -> np.ndarray:
    """Look up each image's weight in the loss, (N,) float32; a body part without training images weighs 1/2 and 1/2."""
    return np.array([weights.get(view.part, (0.5, 0.5))[view.label] for view in views], dtype=np.float32)


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum -w1 y log p - w0 (1 - y) log(1 - p) over images (arXiv 1712.06957, section 3.1); all (B,), p = sigmoid(logits)."""
    return functional.binary_cross_entropy_with_logits(logits.float(), labels, weights, reduction="sum")


def quadratic_factor(step: int, total: int, warmup: float) -> float:
    """Give the learning rate of a step, counted from 0, as a share of its peak: a linear rise, then the square of what is left.

    It falls sooner than half a cosine, so that the networks of the last epochs, of which one is kept, are all near their best.

    >>> [round(quadratic_factor(step, 10, 0.2), 2) for step in range(10)]
    [0.5, 1.0, 1.0, 0.77, 0.56, 0.39, 0.25, 0.14, 0.06, 0.02]
    """
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / rise
    return (1 - min(1.0, (step - rise) / max(1, total - rise))) ** 2


class Trainer:
    """Takes optimiser steps; keeps the network, the optimiser, the schedule and the progress of a run.

    Args:
        network: on its device.
        config: the hyper-parameters.
        arithmetic: device and precision.
        normalization: of the images.
        steps: optimiser steps of the whole run.
        processes: this and the others; a batch is shared among them.
    """

    def __init__(
        self, network: Network, config: Config, arithmetic: Arithmetic, normalization: Normalization, steps: int,
        processes: Processes,
    ) -> None:
        self.network, self.arithmetic, self.normalization, self.processes = network, arithmetic, normalization, processes
        self.config, self.accumulate = config, config.accumulate
        self.progress = Progress()
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=arithmetic.device.type != "mps"
        )
        self.schedule: LambdaLR | ReduceLROnPlateau = ReduceLROnPlateau(self.optimizer, factor=0.1, patience=0)
        if config.schedule == "quadratic":
            self.schedule = LambdaLR(self.optimizer, partial(quadratic_factor, total=steps, warmup=config.warmup))
        self.forward: nn.Module = network
        if arithmetic.device.type == "cpu":
            keep_freed_memory()
        torch.backends.cudnn.benchmark = True  # trying kernels pays here: batches have two sizes at most
        if processes.world > 1:
            ids = [arithmetic.device] if arithmetic.device.type == "cuda" else None
            self.forward = nn.parallel.DistributedDataParallel(network, device_ids=ids)
        if config.compile:
            self.forward = torch.compile(self.forward)  # type: ignore[assignment]

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def backward(
        self, images: Tensor, labels: Tensor, weights: Tensor, drawn: Tensor, count: int, own: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradient of this process's share of a batch; the step itself is `update`.

        When the card's memory is short, the share is computed in twice as many parts: the same batch, the same gradient but
        for batch normalisation, which then sees smaller parts.

        Args:
            images: (b, 1, S, S) uint8.
            labels: (b,) float.
            weights: (b,) of the loss.
            drawn: (b, 4) augmentation.
            count: images of the batch over all processes.
            own: share that an image keeps of itself; the rest is the next one of `images`, in pixels and in the loss.

        Returns:
            The sum of the losses and the number of correct images, by their own labels, as tensors.

        Raises:
            UserError: out of memory where it cannot be helped.
        """
        while True:
            try:
                return self._accumulate((images, labels, weights, drawn), count, own)
            except torch.OutOfMemoryError as error:
                fits = -(-len(images) // (2 * self.accumulate))
                if self.processes.world > 1 or self.accumulate >= len(images):
                    splits = self.accumulate < len(images)
                    advice = f"--accumulate {2 * self.accumulate}" if splits else "a smaller --image-size"
                    raise UserError(f"out of memory on {self.arithmetic.device}: use {advice}", EXIT_FAILED) from error
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            self.accumulate = min(2 * self.accumulate, len(images))
            note(f"out of memory: batches are now computed in {self.accumulate} parts of at most {fits} images (as "
                 f"--accumulate {self.accumulate} does); the batch size stays")

    def _accumulate(self, batch: tuple[Tensor, ...], count: int, own: float) -> tuple[Tensor, Tensor]:
        parts = min(self.accumulate, len(batch[0]))
        following = [values.roll(-1, 0) for values in batch] if own < 1 else []
        pieces = list(zip(*(values.tensor_split(parts) for values in (*batch, *following)), strict=True))
        precise = torch.float32 if self.arithmetic.device.type == "mps" else torch.float64  # MPS has no float64
        loss_sum = correct = torch.zeros((), device=self.arithmetic.device, dtype=precise)
        for i, (pixels, truth, weight, variation, *following_piece) in enumerate(pieces):
            unsynced = self.processes.world > 1 and i < parts - 1
            with self.forward.no_sync() if unsynced else contextlib.nullcontext():  # type: ignore[operator]
                images = augment(to_unit(pixels), variation)
                if own < 1:
                    other, other_truth, other_weight, other_variation = following_piece
                    images = torch.lerp(augment(to_unit(other), other_variation), images, own)
                with self.arithmetic.autocast():
                    logits = self.forward(self.normalization(images))
                loss = weighted_loss(logits, truth, weight)
                if own < 1:
                    loss = torch.lerp(weighted_loss(logits, other_truth, other_weight), loss, own)
                torch.autograd.backward(loss * (self.processes.world / count))  # DDP averages over processes
            loss_sum = loss_sum + loss.detach()
            correct = correct + ((logits.detach() > 0) == (truth > 0.5)).sum()
        return loss_sum, correct

    def update(self) -> None:
        """Take the optimiser step, and the one of a schedule that goes by steps."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        if isinstance(self.schedule, LambdaLR):
            self.schedule.step()

    def end_epoch(self, row: dict[str, float | None]) -> bool:
        """Close the epoch with its row of the history, for a schedule that goes by it, too; tell whether it is the best."""
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(float(row["val_loss"] or 0))
        return self.progress.end_epoch(row)

    def state_dict(self) -> dict[str, Any]:
        """Give all that a continued run needs."""
        return {
            "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "accumulate": self.accumulate,
            "schedule": self.schedule.state_dict(), "progress": asdict(self.progress),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.accumulate, self.progress = max(self.accumulate, state["accumulate"]), Progress(**state["progress"])


def train_epoch(
    trainer: Trainer, feed: Feed, weights: np.ndarray, stop: StopSignals, after_batch: Callable[[bool], object]
) -> None:
    """Train on what is left of the current epoch.

    Args:
        trainer: its progress says where to begin, and is brought forward; its options hold batch size and seed.
        feed: the training images.
        weights: (N,) of each image in the loss.
        stop: a signal to any process stops all of them after the same batch.
        after_batch: called when a batch is done, with whether to stop, on which all processes agree; may raise to do so.

    Raises:
        UserError: the loss is not finite; the weights are as they were before that batch.
    """
    config, progress, processes, device = trainer.config, trainer.progress, trainer.processes, trainer.arithmetic.device
    trainer.network.train()
    batches = epoch_batches(len(feed.dataset), config.batch_size, config.seed, progress.epoch)
    if min(map(len, batches)) < processes.world:
        raise UserError(f"--batch-size {config.batch_size}: too small for {processes.world} processes")
    todo = range(progress.batch, len(batches))
    images = feed([batches[number][processes.rank :: processes.world] for number in todo])
    clock = time.perf_counter()
    for number, pixels in zip(todo, images, strict=True):
        batch = batches[number]
        mine = batch[processes.rank :: processes.world]
        drawn = draw_variation(config, len(batch), progress.epoch, number)[processes.rank :: processes.world]
        given = (torch.from_numpy(feed.dataset.labels[mine]).float(), torch.from_numpy(weights[mine]), drawn)
        labels, weight, drawn = (values.to(device, non_blocking=True) for values in given)  # none waits
        own = draw_own_share(config, progress.epoch, number)
        loss, correct = trainer.backward(pixels, labels, weight, drawn, len(batch), own)
        sums = processes.total(torch.stack([loss, correct, *loss.new_tensor([len(mine), stop.signum])]))
        if not math.isfinite(sums[0]):
            names = ", ".join(feed.dataset.views[i].name for i in batch)
            raise UserError(f"the loss is not finite in epoch {progress.epoch + 1}; nothing was changed by this batch: "
                            f"{names}. Try a new run with a lower --lr or --precision fp32, or see these files", EXIT_FAILED)
        progress.lr = trainer.lr
        trainer.update()
        progress.add(*sums[:3])
        now = time.perf_counter()
        progress.seconds, clock = progress.seconds + now - clock, now
        stopping = bool(sums[3] if processes.world > 1 else stop.signum)
        stop.signum = stop.signum or int(stopping and signal.SIGTERM)
        after_batch(stopping)


@torch.no_grad()
def settle_statistics(
    network: Network, feed: Feed, arithmetic: Arithmetic, normalization: Normalization, batch_size: int, images: int, seed: int,
    tick: Callable[[int], object] = lambda count: None,
) -> None:
    """Take the running statistics of batch normalisation anew, from training images as they are (arXiv 2105.07576, section 3).

    While the network learns they follow small batches of varied images. New images are not varied: they would meet statistics
    that are not theirs, and every logit would be shifted (14 networks on real knees: settled, accuracy on new patients rises by
    0.011 +- 0.003, the log loss falls by 0.041 +- 0.008, AUROC stays). The weights stay as they are.

    Args:
        network: it is put into training mode.
        feed: the training images.
        arithmetic: device and precision.
        normalization: of the images.
        batch_size: images at a time; the statistics are the mean over these batches.
        images: how many are used, at most; with 0 the statistics stay, too.
        seed: of the choice of images; equal in all processes, so that their statistics are.
        tick: called with the number of images done.
    """
    chosen = np.random.default_rng([STATISTICS, seed]).permutation(len(feed.dataset))[:images]
    if not len(chosen):
        return

    def inputs() -> Iterator[Tensor]:
        """Normalise batch after batch."""
        for pixels in feed(np.array_split(chosen, -(-len(chosen) // batch_size))):
            yield normalization(to_unit(pixels))
            tick(len(pixels))

    network.train()
    with arithmetic.autocast():
        torch.optim.swa_utils.update_bn(inputs(), network)


@torch.inference_mode()
def predict_logits(
    network: Network, feed: Feed, arithmetic: Arithmetic, normalization: Normalization, batch_size: int, *, tta: bool = False,
    processes: Processes = Processes(), tick: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """Compute the logit of every image, (N,) float64, exactly once each, however many processes share the work.

    Args:
        network: it is put into evaluation mode.
        feed: the images.
        arithmetic: device and precision.
        normalization: of the images.
        batch_size: images at a time, over all processes.
        tta: average with the logit of the mirror image.
        processes: batches are dealt out to them.
        tick: called with the number of images done.
    """
    network.eval()
    count, share = len(feed.dataset), max(1, batch_size // processes.world)
    batches = np.array_split(np.arange(count), -(-count // share))[processes.rank :: processes.world] if count else []
    mine: list[Tensor] = []
    for indices, pixels in zip(batches, feed(batches), strict=True):
        images = normalization(to_unit(pixels))
        with arithmetic.autocast():
            mine.append(logits_of(network, images, tta=tta))  # fetched at the end: fetching makes the device wait
        tick(len(indices))
    return np.concatenate([np.zeros(0), *processes.gather([logits.cpu().double().numpy() for logits in mine])])


def as_scored(views: Sequence[View], probability: np.ndarray) -> Scored:
    """Put views and their probabilities (N,) side by side for the metrics."""
    columns = ([getattr(view, name) for view in views] for name in ("part", "patient", "study", "label"))
    part, patient, study, label = (np.array(column) for column in columns)
    return Scored(tuple(view.name for view in views), part, patient, study, label.astype(np.int64), probability)


# ===== 9 files =======================================================================================================

CHECKSUM_MARK = b"sha256:"  # before the hexadecimal digits at the end of a checkpoint
STALE_SECONDS = 3600  # a temporary file this old was left by a process that was killed


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only when it is whole and on the disk; before that, the old one stays.

    Its mode follows the umask. Folders are made as needed.

    Raises:
        UserError: no space, no permission, not a folder; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")  # pids repeat among containers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{path.name}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # another process may be faster
                if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                    stale.unlink()
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it is gone where all went well
            temporary.unlink()


def unwritable(path: Path, error: OSError) -> UserError:
    """Make the error that names a file that cannot be written, and the remedy."""
    return UserError(f"{path}: cannot be written ({error.strerror or error}); free space or choose another place", EXIT_FAILED)


def require_place(path: Path) -> None:
    """See before long work that `atomic_write` will be able to make a file at its end.

    Raises:
        UserError: as there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError(None, "a folder")
    except OSError as error:
        raise unwritable(path, error) from error


def write_csv(path: Path, rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    """Write rows atomically; None and NaN become empty cells, floats come back as they were."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: None if value != value else value for key, value in row.items()})
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))  # a file's name may be any bytes


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically; NaN is refused rather than written."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write what torch.save can hold, with the sha256 of the whole file in the comment at the end of its zip archive.

    torch.load reads the file as it is; read_tensors verifies the checksum first.
    """
    buffer = io.BytesIO()
    torch.save({"format": PROGRAM, "version": __version__, **content}, buffer)
    data = buffer.getvalue()[:-2] + struct.pack("<H", len(CHECKSUM_MARK) + 64)  # the comment's length closes the archive
    with atomic_write(path) as file:
        file.write(data)
        file.write(CHECKSUM_MARK + hashlib.sha256(data).hexdigest().encode())


def read_tensors(path: Path, kind: str) -> dict[str, Any]:
    """Read a file of this program: "model" (STEM.pth) or "state" (STEM.last.pth). Never runs code from the file.

    Raises:
        UserError: missing, truncated, damaged by as much as one bit, or not of this program and kind.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{path}: cannot be read ({reason}); --checkpoint wants the .pth file that training wrote") from error
    archive, mark, checksum = data.rpartition(CHECKSUM_MARK)
    if not mark or len(checksum) != 64:
        raise UserError(f"{path}: is not a checkpoint of this program, or is truncated; use a file that training wrote")
    if hashlib.sha256(archive).hexdigest().encode() != checksum:
        raise UserError(f"{path}: damaged (its checksum does not match); restore it from a copy, or train again")
    content = load_safely(io.BytesIO(data), path)
    if content.get("format") != PROGRAM or content.get("kind") != kind:
        wanted = "a model (STEM.pth)" if kind == "model" else "a saved state (STEM.last.pth)"
        raise UserError(f"{path}: is not {wanted} of this program")
    return content


def read_weights(path: Path) -> dict[str, Any]:
    """Read the file of --weights: a torchvision state_dict, or a model of this program.

    Raises:
        UserError: missing, damaged, or neither.
    """
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file; give imagenet, none, or a file with a state_dict")
    with path.open("rb") as file:
        content = load_safely(file, path)
    return read_tensors(path, "model") if content.get("format") == PROGRAM else content  # ours: with its checksum verified


def load_safely(file: IO[bytes], path: Path) -> dict[str, Any]:
    """Unpickle tensors and plain values, nothing else: a pickle that would run code is refused and runs none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, key, type and runtime errors: torch.load names none of them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        if isinstance(error, pickle.UnpicklingError):
            reason = "holds other things than tensors and plain values"
        raise UserError(f"{path}: cannot be loaded as weights ({reason}); it is damaged, unsafe, or something else") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of weights by name")
    return content


@dataclass(frozen=True)
class Member:
    """A trained model as prediction needs it: alone, or one of an ensemble; each keeps its own preprocessing."""

    path: Path
    network: Network
    normalization: Normalization
    image_size: int
    fit: str
    temperature: float
    threshold: float
    threshold_source: str
    tta: bool  # a logit is the mean of those of the image and its mirror image
    bad_images: int  # of the training set, that could not be read
    parts: list[str]  # body parts of the training set
    patients: dict[str, list[str]]  # of train and val


def load_member(path: Path, arithmetic: Arithmetic, model: str | None = None) -> Member:
    """Load a model of this program, ready to predict.

    Raises:
        UserError: see read_tensors; or the file lacks something, or is not of the architecture `model`.
    """
    content = {"tta": False} | read_tensors(path, "model")  # models of before it was kept
    if model and content.get("model") != model:
        raise UserError(f"{path}: is a {content.get('model')}, but --model says {model}; leave --model out")
    try:
        with torch.device("meta"):  # no time spent on random weights
            network = Network(content["model"])
        network.load_state_dict(content["state_dict"], assign=True)
        given = content["normalization"]
        normalization = Normalization(given["kind"], tuple(given["mean"]), tuple(given["std"]))
        names = ("image_size", "fit", "temperature", "threshold", "threshold_source", "tta", "bad_images", "parts", "patients")
        member = Member(path, arithmetic.prepare(network).eval(), normalization, *(content[name] for name in names))
        known = content["model"] in ("densenet169", "resnet50") and member.fit in ("stretch", "letterbox")
        in_range = member.image_size > 0 and member.temperature > 0 and 0 <= member.threshold <= 1
        whole = {"train", "val"} <= set(member.patients) and len(normalization.mean) == len(normalization.std) == 3
        if not (known and in_range and whole):
            raise TypeError("holds what this version does not know")
        return member
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        version = content.get("version")
        raise UserError(f"{path}: written by another version of this program ({version}); train again") from error


# ===== 10 Grad-CAM ===================================================================================================


def grad_cam(network: Network, images: Tensor) -> tuple[Tensor, Tensor]:
    """Explain logits by Grad-CAM (arXiv 1610.02391, section 3), exactly and without hooks.

    With A the rectified feature maps (C, h, w) of the last stage, the weight of a channel is the mean over the map of
    d logit / dA, and the evidence is the sum over channels of weight * A. Grad-CAM's map of `abnormal` is relu(evidence), that
    of `normal`, whose score is -logit, relu(-evidence): one pass serves both. Only pooling and the linear unit are
    differentiated, so a batch costs no more than its forward pass.

    Args:
        network: in evaluation mode.
        images: (B, 3, S, S), normalised.

    Returns:
        logits (B,), and evidence (B, h, w) scaled by h * w to the unit of the logit: its mean is the logit less the bias.
    """
    with torch.no_grad():
        features = network.features(images).float()
    with torch.enable_grad():
        features.requires_grad_()
        logits = network.classify(features)
        (gradient,) = torch.autograd.grad(logits.sum(), features)
    weights = gradient.sum((2, 3), keepdim=True)  # h * w times the mean
    return logits.detach(), (weights * features.detach()).sum(1)


def heat_on_image(evidence: Tensor, size: int, fit: str, height: int, width: int) -> np.ndarray:
    """Bring evidence (h, w) from the network's square input of `size` px to the original's pixels, (height, width) float32."""
    left, top, right, bottom = letterbox_box(height, width, size, fit)
    square = functional.interpolate(evidence[None, None], (size, size), mode="bilinear", align_corners=False)
    content = square[:, :, top:bottom, left:right]
    return functional.interpolate(content, (height, width), mode="bilinear", align_corners=False)[0, 0].cpu().numpy()


# ===== 11 figures ====================================================================================================

FAINT = 4.0  # logits: what would move 0.5 to 0.98 if the whole map were so; weaker maps are shown on this scale


@dataclass(frozen=True)
class Panel:
    """One view to show: what was seen, what was said, and why."""

    pixels: np.ndarray  # (H, W) uint8, the original
    heat: np.ndarray  # (H, W) float, logits, >= 0
    title: str
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom of a known lesion, pixels


def draw_history(history: Sequence[dict[str, float | None]], file: IO[bytes]) -> None:
    """Draw loss and accuracy of train and val, and AUROC and kappa of val, over epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    curves = (("loss", ("train_loss", "val_loss")), ("accuracy", ("train_accuracy", "val_accuracy")),
              ("study level", ("val_auroc", "val_kappa")))
    epochs = np.array([row["epoch"] for row in history], float)
    for axes, (title, names) in zip(figure.subplots(1, 3), curves, strict=True):
        for name in names:
            values = np.array([row[name] for row in history], float)  # None becomes NaN, a gap
            axes.plot(epochs, values, marker="o", markersize=3, label=name.replace("_", " "))
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, format="png", dpi=120)


def draw_explanation(figure: Any, panels: Sequence[Panel], heading: str, heat_label: str) -> None:
    """Fill a matplotlib figure with a row of original | heatmap | overlay for each view.

    Heat is drawn on one scale, 0 to the strongest of these maps but no less than FAINT, so that a faint map stays faint and an
    empty one stays empty; the overlay's opacity follows the same scale.
    """
    from matplotlib.patches import Rectangle

    top = max(FAINT, *(float(panel.heat.max()) for panel in panels))
    # a $ in a file's name is no formula, and a name may be bytes that are no text
    figure.suptitle(heading.encode(errors="replace").decode(), fontsize=11, parse_math=False)
    grid = figure.subplots(len(panels), 3, squeeze=False)
    for row, panel in zip(grid, panels, strict=True):
        for axes, title in zip(row, (panel.title, "heatmap", "overlay"), strict=True):
            axes.set_title(title.encode(errors="replace").decode(), fontsize=9, parse_math=False)
            axes.set_axis_off()
        for axes in row[::2]:
            axes.imshow(panel.pixels, cmap="gray", vmin=0, vmax=255)
            if panel.box:
                left, upper, right, lower = panel.box
                axes.add_patch(Rectangle((left, upper), right - left, lower - upper, fill=False, edgecolor="cyan"))
        shown = row[1].imshow(panel.heat, cmap="inferno", vmin=0, vmax=top)
        row[2].imshow(panel.heat, cmap="inferno", vmin=0, vmax=top, alpha=0.65 * panel.heat / top)
    figure.colorbar(shown, ax=grid[:, 1:].ravel().tolist(), label=heat_label, shrink=0.8)


def require_matplotlib() -> None:
    """Import matplotlib before the long work, not only when its figures are due.

    Raises:
        UserError: MPLBACKEND names what matplotlib does not know; it then refuses even to save a file.
    """
    try:
        import matplotlib as mpl  # noqa: F401
    except ValueError as error:
        name = os.environ.get("MPLBACKEND")
        raise UserError(f"MPLBACKEND={name}: matplotlib knows no such backend; unset it, or set it to Agg") from error


def can_show(config: Config) -> bool:
    """Tell whether a window can open: a terminal, an interactive backend (MPLBACKEND counts), and no --no-show."""
    if config.no_show or not sys.stdout.isatty():
        return False
    from matplotlib import pyplot
    from matplotlib.backends.registry import BackendFilter, backend_registry

    backend = pyplot.get_backend()
    known: Any = backend_registry
    with contextlib.suppress(ImportError):  # what MPLBACKEND names may lack its display or its toolkit
        pyplot.switch_backend(backend)
        return backend.lower() in {name.lower() for name in known.list_builtin(BackendFilter.INTERACTIVE)}
    return False


def save_explanation(path: Path, panels: Sequence[Panel], heading: str, heat_label: str, *, show: bool) -> None:
    """Save the figure; with `show` also leave it open for pyplot.show()."""
    from matplotlib.figure import Figure

    shape = (10.5, 0.7 + 3.4 * len(panels))
    figure: Any = Figure(figsize=shape, layout="constrained")
    if show:
        from matplotlib import pyplot  # slow to import, and only windows need it

        figure = pyplot.figure(figsize=shape, layout="constrained")
    draw_explanation(figure, panels, heading, heat_label)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.lstrip(".") or "png", dpi=110)


HEADINGS = dict(zip(METRICS, ("AUROC", "kappa", "accuracy", "sensitivity", "specificity", "Brier", "ECE"), strict=True))
DECISION, RANKING = METRICS[1:5], ("auroc", "brier", "ece")  # figures that depend on the threshold, and that do not
PAPER = {"auroc": 0.929, "sensitivity": 0.815, "specificity": 0.887}  # arXiv 1712.06957, abstract
BLUE, RED, GREY = "#0072B2", "#D55E00", "#777777"  # Okabe and Ito 2008: distinct to the colour-blind
STYLE: dict[Any, Any] = {
    "font.size": 8, "axes.titlesize": 8, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "legend.fontsize": 6.5, "legend.edgecolor": "none", "pdf.fonttype": 42, "svg.fonttype": "none",  # text stays text
}


def format_figure(figure: dict[str, Any]) -> str:
    """Write a figure with its interval, or '-' where undefined.

    >>> format_figure({"value": 0.92912, "low": 0.9014, "high": 0.95})
    '0.929 [0.901,0.950]'
    """
    if figure["value"] is None:
        return "-"
    pattern = "{value:.3f}" if figure["low"] is None else "{value:.3f} [{low:.3f},{high:.3f}]"
    return pattern.format(**figure)


def shorten(name: str, width: int) -> str:
    """Cut the middle out of a name that is too long; its ends tell it apart."""
    return name if len(name) <= width else f"{name[: width // 2]}~{name[len(name) - (width - 1) // 2 :]}"


def table_lines(report: dict[str, Any], level: str, figures: tuple[str, ...], sizes: dict[str, str]) -> list[str]:
    """Write figures of one level: overall, each member of an ensemble, each part; `sizes` maps keys to headings."""
    members = [(f" {name}", levels) for name, levels in report.get("members", {}).items()]
    rows = [["", *(f"{size:>8}" for size in sizes.values()), *(HEADINGS[figure] for figure in figures)]]
    for name, levels in [("overall", report["levels"]), *members, *report["parts"].items()]:
        counts = [f"{levels[level][size]:>8}" for size in sizes]
        rows.append([shorten(name, 13), *counts, *(format_figure(levels[level][figure]) for figure in figures)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def format_table(report: dict[str, Any]) -> str:
    """Write every figure at study and at image level, and the notes, in at most 100 columns."""
    lines, threshold = [], f"{report['threshold']:.3g} (threshold: {report['threshold_source']})"
    for level, heading in (("study", "Studies (mean over their views)"), ("image", "Images")):
        sizes = {"count": "studies" if level == "study" else "images", "positives": "abnormal"}
        lines += [heading, *table_lines(report, level, RANKING, sizes), ""]
        lines += [f"{heading}, abnormal above {threshold}", *table_lines(report, level, DECISION, {}), ""]
    lines.append("[low,high]: 95 % interval, bootstrap over patients; -: undefined")
    for text in report["notes"]:
        lines += textwrap.wrap(text, 100)
    return "\n".join(lines)


def error_bars(figures: Sequence[dict[str, Any]]) -> tuple[Floats, Floats]:
    """Return values (N,), and how far their intervals reach below and above (2, N); NaN where there is none."""
    value, low, high = (np.array([figure[key] for figure in figures], float) for key in ("value", "low", "high"))
    return value, np.array([value - low, high - value])


def draw_roc(axes: Axes, report: dict[str, Any], studies: Scored) -> None:
    """Draw the ROC curve, the operating point with its intervals, and the paper's point."""
    found = report["levels"]["study"]
    order = np.argsort(-studies.probability, kind="stable")
    ties = np.flatnonzero(np.diff(studies.probability[order], append=-1))
    hits, alarms = (np.append(0, np.cumsum(studies.label[order] == value)[ties]) for value in (1, 0))
    axes.plot([0, 1], [0, 1], ":", color=GREY, linewidth=0.6)
    if hits[-1] and alarms[-1]:
        curve = f"this model: AUROC {format_figure(found['auroc'])}"
        axes.plot(alarms / alarms[-1], hits / hits[-1], color=BLUE, linewidth=1.2, label=curve)
        (y, x), reach = error_bars([found["sensitivity"], found["specificity"]])
        point = f"above {report['threshold']:.3g}: sensitivity {y:.3f}, specificity {x:.3f}"
        aside = reach[::-1, 1:]  # the other way round, as is 1 - specificity
        axes.errorbar(1 - x, y, reach[:, :1], aside, fmt="o", color=BLUE, markersize=5, elinewidth=0.8, label=point)
    else:
        axes.text(0.5, 0.3, "no curve: one class only", ha="center", color=GREY)
    paper = f"MURA paper, its hidden test set of 207 studies:\nanother test set (AUROC {PAPER['auroc']})"
    axes.errorbar(1 - PAPER["specificity"], PAPER["sensitivity"], fmt="*", color=RED, markersize=9, label=paper)
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", title="a  ROC", aspect="equal")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(loc="lower right", borderpad=0, borderaxespad=0.2)


def draw_confusion(axes: Axes, report: dict[str, Any], studies: Scored) -> None:
    """Draw counts and row percentages, labelled against called."""
    called = (studies.probability > report["threshold"]).astype(int)
    cells = np.bincount(2 * studies.label + called, minlength=4).reshape(2, 2)
    share = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(cells):
        percent = f"{100 * share[row, column]:.1f} %" if cells[row].any() else "-"
        colour = "white" if share[row, column] > 0.55 else "black"
        axes.text(column, row, f"{count}\n{percent}", ha="center", va="center", color=colour, fontsize=10)
    axes.set_xticks([0, 1], CLASSES)
    axes.set_yticks([0, 1], CLASSES, rotation=90, va="center")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=f"called (above {report['threshold']:.3g})", ylabel="label", title="b  Confusion matrix")


def draw_reliability(axes: Axes, below: Axes, report: dict[str, Any], studies: Scored) -> None:
    """Draw the observed fraction of abnormal against the probability, and the number of studies in each bin of ECE."""
    bins = ece_bin(studies.probability)
    counts = np.bincount(bins, minlength=ECE_BINS)
    used = counts > 0
    mean, observed = (np.bincount(bins, x, ECE_BINS)[used] / counts[used] for x in (studies.probability, studies.label))
    axes.plot([0, 1], [0, 1], ":", color=GREY, linewidth=0.6)
    axes.plot(mean, observed, "o-", color=BLUE, markersize=4, linewidth=1)
    axes.text(0, 1, f"ECE {format_figure(report['levels']['study']['ece'])}", va="top", fontsize=7)
    axes.set(ylim=(-0.03, 1.03), ylabel="fraction abnormal", title="c  Reliability")
    axes.tick_params(labelbottom=False)
    below.sharex(axes)
    bars = below.bar((np.arange(ECE_BINS) + 0.5) / ECE_BINS, counts, width=0.9 / ECE_BINS, color=BLUE)
    below.bar_label(bars, [str(count or "") for count in counts], fontsize=5.5, padding=1)
    below.set(xlabel="probability of abnormal", ylabel="studies", xlim=(-0.02, 1.02), ylim=(0, 1.3 * counts.max()))


def draw_kappa(axes: Axes, report: dict[str, Any]) -> None:
    """Draw kappa with its intervals, overall and by body part, of studies and of images."""
    rows = {"overall": report["levels"], **report["parts"]}
    for level, marker, colour, shift in (("study", "o", BLUE, -0.14), ("image", "s", GREY, 0.14)):
        kappa, reach = error_bars([levels[level]["kappa"] for levels in rows.values()])
        y = np.arange(len(rows)) + shift
        axes.errorbar(kappa, y, xerr=reach, fmt=marker, color=colour, markersize=4, elinewidth=1, label=f"{level} level")
        for place in y[np.isnan(kappa)]:
            axes.text(0.01, place, "undefined", va="center", color=colour, fontsize=6)
    names = [f"{shorten(name.removeprefix('XR_').lower(), 16)} ({levels['study']['count']})" for name, levels in rows.items()]
    axes.set_yticks(range(len(rows)), names)
    axes.axvline(0, color=GREY, linewidth=0.6, linestyle=":")
    axes.axhline(0.5, color=GREY, linewidth=0.4)
    axes.set(xlim=(min(-0.02, axes.get_xlim()[0]), 1.02), ylim=(len(rows) - 0.5, -0.5))
    axes.set(xlabel="Cohen's kappa, 95 % interval", ylabel="body part (studies)", title="d  Kappa")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)


def draw_report(report: dict[str, Any], images: Scored, target: Path | IO[bytes]) -> None:
    """Draw ROC, confusion matrix, reliability and kappa of the studies to a path, or as PNG to an open binary file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    studies, found = pool_studies(images), report["levels"]["study"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 7.2), layout="constrained")  # inches: two columns of a journal's page
        axes = figure.subplot_mosaic("ab;cd;nd", height_ratios=[4, 3, 1])
        draw_roc(axes["a"], report, studies)
        draw_confusion(axes["b"], report, studies)
        draw_reliability(axes["c"], axes["n"], report, studies)
        draw_kappa(axes["d"], report)
        sizes = f"{found['count']} studies ({found['positives']} abnormal), patients: {found['patients']}"
        figure.suptitle(f"Study level, {report['split']}: {sizes}", fontsize=9)
        figure.savefig(target, dpi=200)


# ===== 12 phantoms ===================================================================================================

Bone = tuple[float, float, float, float]  # offset across, half-width, start, end along; unit: half the long side
Field = np.ndarray[tuple[int, ...], np.dtype[np.float32]]  # (H, W) a value for each pixel
VALID_PATIENT = 11185  # first patient number of valid/, as in MURA
LESION_COLUMNS = ("path", "kind", "left", "top", "right", "bottom")  # of phantoms.csv
PHANTOM_LIST = "phantoms.csv"  # tells a folder of phantoms from radiographs, which are never written over
PHANTOM_BONES: dict[str, tuple[Bone, ...]] = {
    "XR_FOREARM": ((-0.20, 0.115, -2, 0.62), (0.20, 0.095, -2, 0.58), (-0.27, 0.12, 0.70, 0.93),
                   (0.0, 0.12, 0.69, 0.92), (0.25, 0.11, 0.68, 0.90)),
    "XR_HUMERUS": ((0.0, 0.165, -2, 0.62), (-0.15, 0.11, 0.72, 2), (0.16, 0.12, 0.68, 2)),
    "XR_WRIST": ((-0.21, 0.145, -2, 0.30), (0.22, 0.12, -2, 0.25), (-0.30, 0.13, 0.39, 0.62), (-0.02, 0.12, 0.38, 0.60),
                 (0.24, 0.12, 0.36, 0.60), (-0.26, 0.085, 0.69, 2), (0.0, 0.08, 0.67, 2), (0.25, 0.075, 0.68, 2)),
}  # fmt: skip


@dataclass(frozen=True)
class Lesion:
    """What makes a phantom abnormal: its kind and where it lies, in pixels of the image."""

    kind: str  # one of LESIONS
    box: tuple[int, int, int, int]  # left, top, right, bottom; right and bottom exclusive


def _tube(u: Field, v: Field, bone: Bone) -> Field:
    """Attenuation (H, W) of a hollow bone: the path through a cylinder less most of that through its marrow."""
    centre, width, start, end = bone
    inside = (np.abs(v - centre) < 1.5 * width) & (start < u) & (u < end)
    across, near_end = (v[inside] - centre) ** 2, np.minimum(u[inside] - start, end - u[inside]) / width
    flare = np.exp(-(np.minimum(near_end / 1.6, 9) ** 2))
    outer = width * (1 + 0.45 * flare) * np.sqrt(np.minimum(near_end / 0.6, 1))
    inner = np.maximum(outer - width * (0.38 - 0.26 * flare), 0)  # cortex: thick in the shaft, thin at the joint
    path = np.sqrt(np.maximum(outer**2 - across, 0)) - 0.8 * np.sqrt(np.maximum(inner**2 - across, 0))
    attenuation = np.zeros_like(u)
    attenuation[inside] = path * (1.35 / (width + 0.05))  # thick limbs are exposed longer
    return attenuation


def _fracture(rng: np.random.Generator, u: Field, v: Field, bone: Bone, at: float) -> tuple[Field, Field]:
    """Break the shaft along a jagged slanting line; the far fragment steps aside and tilts back to its joint."""
    centre, width, _, end = bone
    across = v - centre
    jag = 0.12 * width * np.sin(across * (rng.uniform(4, 8) / width) + rng.uniform(0, 6))
    beyond = u - at - rng.uniform(-0.7, 0.7) * across - jag
    step = float(rng.choice((-1, 1))) * rng.uniform(0.55, 0.95) * width
    moved = _tube(u, v - step * (beyond > 0) * (1 - (u - at) / (end - at)).clip(0, 1), bone)
    gap = np.exp(-((beyond / (rng.uniform(0.18, 0.3) * width)) ** 2))
    site = (np.abs(beyond) < 0.7 * width) & (np.abs(across - step / 2) < 1.1 * width + abs(step) / 2)
    return moved * (1 - 0.9 * gap) - _tube(u, v, bone), site


def _lytic(rng: np.random.Generator, u: Field, v: Field, bone: Bone, at: float) -> tuple[Field, Field]:
    """Eat a hole with a wavy rim out of marrow and cortex."""
    centre, width, _, _ = bone
    du, dv = u - at, v - centre - rng.uniform(-0.3, 0.3) * width
    angle = np.arctan2(dv, du)
    rim = 1 + sum(rng.uniform(0.03, 0.12) * np.sin(k * angle + rng.uniform(0, 6)) for k in (2, 3, 5))
    depth = (rim - np.hypot(du / rng.uniform(1.1, 1.7), dv) / (rng.uniform(0.75, 0.95) * width)) * 5
    return -0.9 * depth.clip(0, 1) * _tube(u, v, bone), (depth > 0) & (np.abs(v - centre) < width)


def _hardware(rng: np.random.Generator, u: Field, v: Field, bone: Bone, at: float) -> tuple[Field, Field]:
    """Lay a plate along one cortex, with screws that reach the other."""
    centre, width, _, _ = bone
    along, across = u - at, (v - centre) * float(rng.choice((-1, 1)))  # the plate lies where across is positive
    count, pitch = int(rng.integers(4, 7)), rng.uniform(0.75, 0.95) * width
    length = count * pitch / 2  # from the middle to either end
    plate = np.maximum(np.abs(along) - length, np.abs(across - 1.15 * width) - 0.2 * width)
    screw = np.maximum(np.abs((along + length) % pitch - pitch / 2) - 0.11 * width, np.abs(along) - length)
    metal = np.minimum(plate, np.maximum(screw, np.abs(across - 0.1 * width) - 1.15 * width))  # below 0 inside
    covered = (0.5 - metal / 0.008).clip(0, 1)  # the edge is about a pixel wide at 256 px
    return 5 * covered, covered > 0


LESIONS = {"fracture": _fracture, "lytic": _lytic, "hardware": _hardware}  # each: change of attenuation and its site, (H, W)


def _texture(rng: np.random.Generator, cells: int, shape: tuple[int, int]) -> Field:
    """Smooth random field (H, W) of about unit spread; `cells` across."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
    return np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC))


def _turned(rng: np.random.Generator, shape: tuple[int, int], degrees: float, shift: float) -> tuple[Field, Field]:
    """Coordinates (H, W) down and across axes turned and shifted by up to that; unit: half the image's long side."""
    angle = np.radians(rng.uniform(-degrees, degrees))
    y, x = (
        ((np.arange(n) - (n - 1) / 2) * (2 / max(shape)) - rng.uniform(-shift, shift)).astype(np.float32) for n in shape
    )
    c, s = np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32)
    return c * y[:, None] + s * x, c * x - s * y[:, None]


def _expose(rng: np.random.Generator, attenuation: Field, grain: Field) -> Image.Image:
    """Film of an attenuation (H, W): exposure, noise that grows with attenuation, collimation, blur."""
    height, width = attenuation.shape
    film = 1 - np.exp(-rng.uniform(0.75, 1.25) * attenuation)
    film = rng.uniform(0.02, 0.08) + 0.93 * film + rng.uniform(0.012, 0.03) * grain * (1 + 1.5 * film)
    for place, side in zip(_turned(rng, (height, width), 4, 0.04), (height, width), strict=True):
        edge = rng.uniform(0.84, 1.1) * side / max(height, width)  # beyond 1 no border shows
        film = 0.02 + (film - 0.02) * ((edge - np.abs(place)) * 60).clip(0, 1)
    image = Image.fromarray((film * 255).clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 0.9) * max(height, width) / 256))


def _draw_marker(rng: np.random.Generator, image: Image.Image) -> None:
    """Put a lead letter for the side of the body beside the limb."""
    place = float(rng.choice((0.12, 0.8))) * image.width, rng.uniform(0.12, 0.75) * image.height
    font = ImageFont.load_default(0.09 * max(image.size))
    ImageDraw.Draw(image).text(place, str(rng.choice(("L", "R"))), 235, font)


def draw_phantom(
    rng: np.random.Generator, abnormal: bool, size: int = 256, part: str = "XR_FOREARM", kind: str = ""
) -> tuple[np.ndarray, Lesion | None]:
    """Draw a radiograph (H, W) uint8 whose long side is `size`; with equal `rng`, normal and abnormal are twins.

    A lesion of `kind` (any of LESIONS if empty) is all that sets an abnormal image apart from its normal twin.
    """
    base, own = rng.spawn(2)  # the lesion's own draws leave pose, exposure, grain and marker as they are
    shape = size, int(size * base.uniform(0.72, 0.9))
    scale = base.uniform(0.95, 1.2)
    u, v = (axis / scale for axis in _turned(base, shape, 18, 0.1))
    v = v * float(base.choice((-1, 1))) + base.uniform(-0.05, 0.05) * u**2  # mirrored or not, slightly bowed
    bones = [(c, w * base.uniform(0.9, 1.12), a, b) for c, w, a, b in PHANTOM_BONES[part]]
    reach = max(abs(c) + w for c, w, _, _ in bones) * base.uniform(1.25, 1.5)
    reach = reach * (1 + 0.1 * np.sin(2 * u + base.uniform(0, 6)))  # muscle bulges
    flesh = 0.42 * np.sqrt((1 - (v / reach) ** 2).clip(0)) * (1 + 0.06 * _texture(base, 9, shape))
    spongy = 1 + 0.09 * _texture(base, size // 5, shape) + 0.05 * _texture(base, 12, shape)
    bony, lesion = np.sum([_tube(u, v, bone) for bone in bones], axis=0), None
    if abnormal:
        kind = kind or str(own.choice(list(LESIONS)))
        bone = bones[int(own.choice([i for i, bone in enumerate(bones) if bone[2] == -2]))]  # one of the shafts
        at = own.uniform(-0.45, min(0.25, bone[3] - 3 * bone[1]))  # clear of the joint
        change, site = LESIONS[kind](own, u, v, bone, at)
        bony += change
        lesion = Lesion(kind, Image.fromarray(site).getbbox())  # type: ignore[arg-type]  # None only for an empty site
    image = _expose(base, flesh + bony * spongy, base.standard_normal(shape, np.float32))
    if base.random() < 0.5:
        _draw_marker(base, image)
    return np.asarray(image), lesion


def _plan_studies(split: str, first: int, count: int, parts: Sequence[str], seed: int) -> Iterator[tuple[str, int]]:
    """Path of each study below the data set's parent, and its number of views; patients are numbered from `first`."""
    for order, part in enumerate(parts):
        rng = np.random.default_rng([seed, zlib.crc32(f"{split}/{part}".encode())])
        patient, study = first + order * count // 2, 1  # numbers of two parts overlap, as in MURA
        for label in rng.permutation(count) % 2:
            name = f"study{study}_{('negative', 'positive')[label]}"
            yield f"MURA-v1.1/{split}/{part}/patient{patient:05}/{name}", int(rng.integers(1, 4))
            patient, study = (patient, 2) if study == 1 and rng.random() < 0.2 else (patient + 1, 1)


def _write_phantom(folder: Path, path: str, seed: int, size: int) -> Lesion | None:
    """Draw and save the image of that path; nothing but path and seed decides what it shows."""
    study = path.rpartition("/")[0]
    view, examination = (np.random.default_rng([seed, zlib.crc32(name.encode())]) for name in (path, study))
    kind = str(examination.choice(list(LESIONS)))  # all views of a study show the same kind
    image, lesion = draw_phantom(view, study.endswith("positive"), size, study.split("/")[2], kind)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / path, compress_level=1)
    return lesion


def write_phantoms(
    folder: Path, train: int, valid: int, parts: Sequence[str] = tuple(PHANTOM_BONES), seed: int = 0, size: int = 256
) -> Path:
    """Write a data set in MURA's layout with `train` and `valid` studies of each part; return its folder.

    Beside MURA's four lists stands PHANTOM_LIST: where the lesion of each abnormal image lies (see Lesion).
    """
    root, lesions = folder / "MURA-v1.1", []
    root.mkdir(parents=True, exist_ok=True)
    (root / PHANTOM_LIST).touch()  # a demo that was stopped may be run again
    for split, first, count in (("train", 1, train), ("valid", VALID_PATIENT, valid)):
        studies = list(_plan_studies(split, first, count, parts, seed))
        images = [f"{study}/image{view}.png" for study, views in studies for view in range(1, views + 1)]
        with ThreadPoolExecutor() as pool:
            drawn = pool.map(lambda path: _write_phantom(folder, path, seed, size), images)
        lesions += [(path, lesion.kind, *lesion.box) for path, lesion in zip(images, drawn, strict=True) if lesion]
        (root / f"{split}_image_paths.csv").write_text("".join(f"{path}\n" for path in images))
        labels = [f"{study}/,{int(study.endswith('positive'))}\n" for study, _ in studies]
        (root / f"{split}_labeled_studies.csv").write_text("".join(labels))
    write_csv(root / PHANTOM_LIST, (dict(zip(LESION_COLUMNS, row, strict=True)) for row in lesions), LESION_COLUMNS)
    return root


# ===== 13 training runs ==============================================================================================


@dataclass(frozen=True)
class Run:
    """What every command that touches a data set works with."""

    config: Config
    root: Path
    processes: Processes
    arithmetic: Arithmetic
    stop: StopSignals

    def tick(self, bar: Any, count: int) -> None:
        """Move a progress bar, and stop if a signal has come."""
        bar.update(count)
        self.stop.check()


def start_run(config: Config, stop: StopSignals) -> Run:
    """Find data and device, and join the other processes of a torchrun job."""
    processes = Processes.from_environment()
    if not config.evaluate and processes.world > 1 and config.batch_size < 2 * processes.world:
        raise UserError(f"--batch-size {config.batch_size}: is of all processes together; {processes.world} need "
                        f"{2 * processes.world} or more")
    if processes.world > 1 and ":" in config.device:
        raise UserError(f"--device {config.device}: several processes cannot share a card; use --device cuda")
    arithmetic = choose_arithmetic(choose_device(config.device, processes.local_rank), config.precision)
    root = find_data_root(config.data_dir or Path())
    processes.start(arithmetic.device)
    say(f"device: {arithmetic}" + (f", {processes.world} processes" if processes.world > 1 else ""))
    return Run(config, root, processes, arithmetic, stop)


def announce(index: Index) -> None:
    """Print what was found in a split, and on stderr what was odd."""
    say(describe(index.split, index.views))
    for text in index.notes:
        note(text)


def decode_split(run: Run, index: Index, size: int, fit: str) -> Decoded:
    """Open or build the cache of a split; under torchrun the first process of each machine builds, the others wait."""
    config, builds = replace(run.config, fit=fit), run.processes.local_rank == 0
    if not builds:
        run.processes.wait()
    decoded = open_cache(index.views, size, config, run.root, run.stop, build=builds)
    if builds:
        run.processes.wait()
    check_bad_images(decoded, run.root / index.split, config)
    return decoded


def path_of(config: Config, ending: str) -> Path:
    """Name a file of a run: STEM and an ending such as .last.pth."""
    return Path(f"{config.stem}{ending}")


def write_split(config: Config, train_views: Sequence[View], val_views: Sequence[View]) -> None:
    """Write STEM.split.csv: the side of each patient."""
    sides = {view.patient: "train" for view in train_views} | {view.patient: "val" for view in val_views}
    rows = ({"patient": name, "split": sides[name]} for name in sorted(sides))
    write_csv(path_of(config, ".split.csv"), rows, ("patient", "split"))


def earlier_model(weights: str) -> dict[str, Any]:
    """Load what the model of this program given as --weights holds; an empty dict for any other source."""
    content = {} if weights in ("imagenet", "none") else read_weights(Path(weights))
    return content if content.get("format") == PROGRAM else {}


class Session:
    """A training run on disk: brings the trainer from epoch to epoch and keeps its files.

    Args:
        run: options, processes, device.
        network: with its initial weights.
        train: training images.
        val: validation images.
        size: input side, pixels.
        bad_images: how many images could not be read.
    """

    def __init__(
        self, run: Run, network: Network, train: MuraDataset, val: MuraDataset, size: int, bad_images: int
    ) -> None:
        self.run, self.config, self.size, self.train_set, self.val_set = run, run.config, size, train, val
        self.bad_images = bad_images
        earlier = earlier_model(run.config.weights)
        self.seen: set[str] = set().union(*earlier.get("patients", {}).values())
        again = self.seen & {view.patient for view in val.views}
        if again:
            note(f"--weights {run.config.weights}: that model has seen {len(again)} patients of val; validation, temperature "
                 "and the choice of the best epoch will be too hopeful")
        for name in ("fit", "normalization"):
            now = getattr(run.config, name)
            if (then := earlier.get("settings", {}).get(name, now)) != now:
                note(f"--weights {run.config.weights}: that model learnt with --{name} {then}, this run has {now}")
        self.weights = class_weights(train.views)
        self.batches = -(-len(train) // run.config.batch_size)  # of an epoch
        self.trainer = Trainer(
            run.arithmetic.prepare(network), run.config, run.arithmetic,
            choose_normalization(run.config.normalization, train), run.config.epochs * self.batches, run.processes,
        )
        self.tta = run.config.flip > 0 if run.config.tta is None else run.config.tta
        self.saved_at = time.monotonic()

    def settings(self) -> dict[str, Any]:
        """Give what must be the same when a run is continued: the flags that change the result, and the data."""
        flags = {item.name: getattr(self.config, item.name) for item in fields(Config)
                 if item.metadata["group"] in LEARNING and item.name not in ("accumulate", "recipe")}
        return flags | {  # --accumulate is a way out of too little memory, --recipe only sets other flags
            "threshold": self.config.threshold, "tta": self.tta,
            "model": self.trainer.network.model, "image_size": self.size,
            "tasks": sorted({task.upper().removeprefix("XR_") for task in self.config.tasks}),
            "data": "/".join(dataset.fingerprint() for dataset in (self.train_set, self.val_set)),
        }

    def resume(self) -> None:
        """Continue from STEM.last.pth, with --resume auto only if it is there.

        Raises:
            UserError: it is not there, cannot be continued from, or is not seen by all processes.
        """
        file = path_of(self.config, ".last.pth")
        if file.exists():
            self.take_over(file)
        elif self.config.resume == "required":
            raise UserError(f"--resume: there is no {file}; --resume auto starts afresh in such a case")
        progress = self.trainer.progress
        places = self.run.processes.gather([np.array([progress.epoch, progress.batch])])
        if len(np.unique(places, axis=0)) > 1:
            raise UserError("--resume: the processes stand at different batches; --checkpoint must be in a folder that all "
                            "machines share", EXIT_FAILED)

    def take_over(self, file: Path) -> None:
        """Take over the state of an earlier run.

        Raises:
            UserError: it belongs to other data, flags or another version.
        """
        state = read_tensors(file, "state")
        try:
            # a state from before a flag was there did what the flag's default says, and averaged no mirror images
            then = {item.name: item.default for item in fields(Config)} | {"tta": False} | state["settings"]
            other = [f"{name.replace('_', '-')} was {then.get(name)}, is {value}"
                     for name, value in self.settings().items() if then.get(name) != value]
            if other:
                raise UserError(f"--resume {file}: {'; '.join(other)}; give the same flags and data, or another --checkpoint")
            self.trainer.load_state_dict(state["trainer"])
        except (KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:
            version = state.get("version")
            raise UserError(f"--resume {file}: written by another version of this program ({version}); start afresh") from error
        progress, best = self.trainer.progress, self.config.checkpoint[0]
        if progress.best_epoch and not best.exists():
            raise UserError(f"--resume {file}: {best}, the best model so far, is missing; put it beside it")
        say(f"resumed from {file}: {progress.epoch} epochs and {progress.batch} batches are done")

    def save_state(self) -> None:
        """Write STEM.last.pth; the first process only."""
        self.saved_at = time.monotonic()
        if self.run.processes.rank == 0:
            state = {"kind": "state", "settings": self.settings(), "trainer": self.trainer.state_dict()}
            write_tensors(path_of(self.config, ".last.pth"), state)

    def pause(self, bar: Any, stopping: bool, count: int = 1) -> None:
        """Between two batches: save the state when it is time, or when the run is to stop; then stop."""
        bar.update(count)
        if stopping or time.monotonic() - self.saved_at > 60 * self.config.save_every:
            self.save_state()
        if stopping:
            self.run.processes.wait()  # torchrun ends all when the first leaves, which must not be before the state is saved
            self.run.stop.check()

    def train(self) -> None:
        """Run the epochs that are left."""
        weights = loss_weights(self.train_set.views, self.weights)
        feed, val_feed = (Feed(dataset, self.run.arithmetic.device) for dataset in (self.train_set, self.val_set))
        progress = self.trainer.progress
        while not self.finished():
            name = f"epoch {progress.epoch + 1}/{self.config.epochs}"
            with progress_bar(total=self.batches, initial=progress.batch, desc=name, unit="batch") as bar:
                train_epoch(self.trainer, feed, weights, self.run.stop, partial(self.pause, bar))
            began = time.perf_counter()
            logits = self.validate(feed, val_feed)
            self.end_epoch(logits, time.perf_counter() - began)
        if self.run.processes.rank == 0:
            with atomic_write(path_of(self.config, ".history.png")) as file:
                draw_history(progress.history, file)
        self.run.processes.wait()  # the others read the model next, which the first has written

    def finished(self) -> bool:
        """Tell whether all epochs are done, or --patience is spent."""
        progress = self.trainer.progress
        waited = progress.epoch - progress.best_epoch
        return progress.epoch >= self.config.epochs or (0 < self.config.patience <= waited)

    def validate(self, train_feed: Feed, val_feed: Feed) -> np.ndarray:
        """Make the network ready for new images and compute the logits of val, (N,)."""
        processes, config, network = self.run.processes, self.config, self.trainer.network
        alone = processes.world == 1  # several stop together, in the next epoch
        images = min(config.settle, len(self.train_set)) + len(self.val_set)
        with progress_bar(total=images, desc="validation", unit="image") as bar:
            def tick(count: int) -> None:
                """Count images done; stop here, with the state saved, where no other process waits."""
                self.pause(bar, alone and bool(self.run.stop.signum), count)

            given = self.run.arithmetic, self.trainer.normalization
            batch_size = replace(config, accumulate=self.trainer.accumulate).scoring_batch
            settle_statistics(network, train_feed, *given, min(batch_size, config.batch_size), config.settle, config.seed, tick)
            processes.same_buffers(network)
            return predict_logits(network, val_feed, *given, batch_size, tta=self.tta, processes=processes, tick=tick)

    def end_epoch(self, logits: np.ndarray, seconds: float) -> None:
        """Print the epoch, keep the model if it is the best so far, and write history and state."""
        trainer, progress = self.trainer, self.trainer.progress
        row = self.history_row(logits, seconds)
        best = trainer.end_epoch(row)
        say(epoch_line(row, self.config.epochs) + ("  best so far" if best else ""))
        if self.run.processes.rank == 0:
            if best:
                self.save_model(logits)
            write_csv(path_of(self.config, ".history.csv"), progress.history, list(row))
        self.save_state()

    def history_row(self, logits: np.ndarray, seconds: float) -> dict[str, float | None]:
        """Summarise an epoch: loss and accuracy per image, AUROC and kappa per study, at threshold 0.5."""
        progress, labels = self.trainer.progress, self.val_set.labels
        if not np.isfinite(logits).all():
            raise UserError(f"the network's output is not finite after epoch {progress.epoch + 1}; nothing was saved of it. "
                            "Try a new run with a lower --lr or --precision fp32", EXIT_FAILED)
        weights = torch.from_numpy(loss_weights(self.val_set.views, self.weights))
        loss = weighted_loss(torch.from_numpy(logits), torch.from_numpy(labels).float(), weights).item() / len(labels)
        studies = pool_studies(as_scored(self.val_set.views, sigmoid(logits)))
        figures = score(studies.label, studies.probability, 0.5)
        auroc, kappa = (None if np.isnan(figures[name]) else float(figures[name][0]) for name in ("auroc", "kappa"))
        return {
            "epoch": progress.epoch + 1,
            "train_loss": progress.loss / progress.seen, "train_accuracy": progress.correct / progress.seen,
            "val_loss": loss, "val_accuracy": float(((logits > 0) == labels).mean()),
            "val_auroc": auroc, "val_kappa": kappa, "lr": progress.lr,
            "images_per_second": progress.seen / progress.seconds, "seconds": progress.seconds + seconds,
        }

    def save_model(self, logits: np.ndarray) -> None:
        """Write STEM.pth, with the temperature, and where asked for the threshold, fitted on val."""
        temperature = fit_temperature(logits, self.val_set.labels, np.array([view.patient for view in self.val_set.views]))
        threshold, source = self.config.threshold or 0.5, "default" if self.config.threshold is None else "given"
        if threshold == "auto":
            studies = pool_studies(as_scored(self.val_set.views, sigmoid(logits, temperature)))
            threshold = best_threshold(studies.label, studies.probability)
            source = "val" if 0 < studies.label.mean() < 1 else "default"
        progress = self.trainer.progress
        write_tensors(self.config.checkpoint[0], {
            "kind": "model", "model": self.trainer.network.model, "image_size": self.size, "fit": self.config.fit,
            "normalization": asdict(self.trainer.normalization), "classes": list(CLASSES), "temperature": temperature,
            "threshold": float(threshold), "threshold_source": source, "tta": self.tta,
            "epoch": progress.epoch, "history": progress.history,
            "parts": sorted({view.part for view in self.train_set.views}), "settings": self.settings(),
            "patients": {"train": sorted(self.seen | {view.patient for view in self.train_set.views}),
                         "val": sorted({view.patient for view in self.val_set.views})},
            "bad_images": self.bad_images,
            "state_dict": self.trainer.network.state_dict(),
        })


def epoch_line(row: dict[str, float | None], epochs: int) -> str:
    """Format the permanent line of an epoch."""
    shown = {name: "undefined" if value is None else f"{value:.4f}" for name, value in row.items()}
    return (
        f"epoch {row['epoch']:>3}/{epochs}  train loss {shown['train_loss']} accuracy {shown['train_accuracy']}  "
        f"val loss {shown['val_loss']} accuracy {shown['val_accuracy']} AUROC {shown['val_auroc']} kappa {shown['val_kappa']}  "
        f"{row['images_per_second']:.1f} images/s {row['seconds']:.0f} s"
    )


# ===== 14 scoring ====================================================================================================

THRESHOLD_NOTES = {"default": "the default", "given": "given by hand", "val": "the one of highest study kappa on val",
                   "mixed": "the mean of the models' own"}


def load_members(config: Config, arithmetic: Arithmetic) -> list[Member]:
    """Load the models of --checkpoint; --tta and --no-tta count for all of them."""
    members = [load_member(path, arithmetic, config.model) for path in config.checkpoint]
    return members if config.tta is None else [replace(member, tta=config.tta) for member in members]


def choose_threshold(config: Config, members: Sequence[Member]) -> tuple[float, str]:
    """Give the threshold and where it is from: the flag, else the mean of those stored in the checkpoints."""
    if isinstance(config.threshold, float):
        return config.threshold, "given"
    kinds = {(member.threshold, member.threshold_source) for member in members}
    source = members[0].threshold_source if len(kinds) == 1 else "mixed"
    return float(np.mean([member.threshold for member in members])), source


def seen_in_training(members: Sequence[Member], patients: set[str], split: str) -> list[str]:
    """Say, a line each, which models have seen these patients."""
    lines = []
    for member in members:
        train, val = (len(patients & set(member.patients[side])) for side in ("train", "val"))
        if train or val:
            lines.append(f"{member.path}: {train} of the {len(patients)} patients of {split} were trained on and {val} used "
                         "for validation; these figures are not those of unseen patients")
    return lines


def new_parts(members: Sequence[Member], parts: set[str]) -> list[str]:
    """Say, a line each, which models have not learnt some of these body parts."""
    strange = [(member, sorted(parts - set(member.parts))) for member in members]
    return [f"{member.path}: learnt from {', '.join(member.parts)} alone, not from {', '.join(names)} (--tasks chooses)"
            for member, names in strange if names]


def report_notes(split: str, source: str, *, seen: bool, tta: bool) -> list[str]:
    """State, for the report, how the sets were separated, how it was computed, and what it cannot be compared with."""
    looked = f"None of the patients of {split}/ took part in that."
    if seen:
        looked = f"Patients of {split}/ took part in that: the figures are too hopeful."
    elif split == "valid":
        looked = "valid/ took no part in that: it is the held-out test. Each further look at it makes it less so."
    return [
        "The patients of the training set were divided into train and val across body parts; the epoch of highest validation "
        f"accuracy was kept, and its temperature fitted on val. {looked}",
        *(["A logit is the mean of those of the image and of its mirror image (--no-tta: of the image alone)."] if tta else []),
        "The loss weighs both classes of a body part alike, so a probability is that among as many normal as abnormal images.",
        f"The threshold is {THRESHOLD_NOTES[source]}; models of an ensemble are judged at the same one.",
        "Intervals: 95 %, bootstrap over patients. Resamples in which a figure is undefined are dropped; where they are the "
        "majority there is no interval. That of ECE covers less with fewer than about 100 patients.",
        f"{split}/ is not the hidden test set of 207 studies on which MURA's paper reports AUROC 0.929: the figures are not "
        "comparable.",
    ]


def write_report(run: Run, members: Sequence[Member], split: str, alone: Sequence[Scored], bad: dict[str, str]) -> None:
    """Evaluate members and ensemble; print the table and write STEM.valid.csv, STEM.report.json and STEM.report.png."""
    config, names = run.config, [str(member.path) for member in members]
    threshold, source = choose_threshold(config, members)
    images = replace(alone[0], probability=np.mean([scored.probability for scored in alone], axis=0))
    seen = seen_in_training(members, set(images.patient.tolist()), split)
    warned = seen + new_parts(members, set(images.part.tolist()))
    for text in warned:
        note(text)
    mirrored = [member.tta for member in members]
    judge = partial(evaluate, threshold=threshold, resamples=config.bootstrap, seed=config.seed)
    report: dict[str, Any] = {
        "split": split, "checkpoints": names, "threshold": threshold, "threshold_source": source,
        "temperature": [member.temperature for member in members], "tta": mirrored,
        "bad_images": {"training": [member.bad_images for member in members], split: bad},
        **judge(images), "notes": [*report_notes(split, source, seen=bool(seen), tta=any(mirrored)), *warned],
    }
    if len(members) > 1:
        report["members"] = {name: judge(scored)["levels"] for name, scored in zip(names, alone, strict=True)}
    say(format_table(report))
    table, written, figure = (path_of(config, ending) for ending in (f".{split}.csv", ".report.json", ".report.png"))
    columns = vars(images) | {"path": [f"{split}/{name}" for name in images.path]}
    rows = zip(*columns.values(), strict=True)
    write_csv(table, (dict(zip(columns, row, strict=True)) for row in rows), list(columns))
    write_json(written, report)
    with atomic_write(figure) as file:
        draw_report(report, images, file)
    say(f"written: {table}, {written}, {figure}")


def score_split(run: Run, members: Sequence[Member], split: str) -> None:
    """Score models, alone and as an ensemble, on a split; print the table and write CSV, report and figure."""
    config = run.config
    index = index_split(run.root, split, config.tasks)
    announce(index)
    by_name: list[dict[str, float]] = []
    bad: dict[str, str] = {}
    for member in members:
        decoded = decode_split(run, index, member.image_size, member.fit)
        bad |= decoded.bad
        dataset = MuraDataset(decoded)
        with progress_bar(total=len(dataset), desc=f"score {member.path.name}", unit="image") as bar:
            logits = predict_logits(
                member.network, Feed(dataset, run.arithmetic.device), run.arithmetic, member.normalization,
                config.scoring_batch, tta=member.tta, processes=run.processes, tick=partial(run.tick, bar),
            )
        by_name.append(dict(zip((view.name for view in dataset.views), sigmoid(logits, member.temperature), strict=True)))
    views = [view for view in index.views if all(view.name in scores for scores in by_name)]
    if run.processes.rank == 0:
        alone = [as_scored(views, np.array([scores[view.name] for view in views])) for scores in by_name]
        write_report(run, members, split, alone, bad)
    run.processes.wait()


# ===== 15 prediction =================================================================================================

RESULT_COLUMNS = ("path", "prediction", "confidence", "probability", "error")  # of --output
WINDOWS = 8  # figures opened at most, so that a folder does not bury the screen
FIGURE_ROWS = 16  # views in a figure at most: MURA's studies have up to 13, but any folder may be called study


Input = tuple[Path, tuple[Path, ...]]  # what is asked about: an image, or a study with its views; a folder without any has none
Look = tuple[float, Tensor, int, str]  # a model's: probability, evidence (h, w) in logits, size and fit of what it looked at


def collect_inputs(paths: Iterable[Path]) -> Iterator[Input]:
    """Expand files, folders and study folders, in the order given and natural order within folders."""
    for path in paths:
        if os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir, it never raises
            yield from list(search_folder(path)) or [(path, ())]
        else:
            yield path, (path,)


def search_folder(top: Path) -> Iterator[Input]:
    """Find images and studies: a folder named study1, study1_positive, ... is one, in any other each image is by itself.

    Links to folders are followed, each folder once; one that may not be read is an input without views.
    """
    closed: list[OSError] = []
    seen: set[str] = set()
    for folder, names, _ in os.walk(top, onerror=closed.append, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            names.clear()
            continue
        seen.add(place)
        inner = (name for name in names if name[0] != "." and not name.lower().endswith(IMAGE_SUFFIXES))
        names[:] = sorted(inner, key=natural_key)
        images = tuple(Path(folder) / name for name in image_names(folder))
        if images and re.fullmatch(r"study\d+(_\w+)?", Path(folder).resolve().name, re.IGNORECASE):
            yield Path(folder), images
        else:
            yield from ((image, (image,)) for image in images)
    yield from ((Path(error.filename), ()) for error in closed if Path(error.filename) != top)


@dataclass(frozen=True)
class Finding:
    """One view: what was read and what the models say of it, or why it could not be read.

    Attributes:
        path: of the image.
        pixels: (H, W) uint8.
        squares: network inputs (S, S) uint8, by size and fit.
        error: why it could not be read; all else is then empty.
        looks: one of each model.
    """

    path: Path
    pixels: np.ndarray
    squares: dict[tuple[int, str], np.ndarray]
    error: str = ""
    looks: tuple[Look, ...] = ()

    @property
    def probability(self) -> float:
        """Of abnormal: the mean over the models."""
        return float(np.mean([probability for probability, *_ in self.looks]))

    @property
    def evidence(self) -> np.ndarray:
        """For abnormal, on the original's pixels (H, W), logits: the mean over the models."""
        heat = [heat_on_image(evidence, size, fit, *self.pixels.shape) for _, evidence, size, fit in self.looks]
        return np.asarray(np.mean(heat, axis=0))


@dataclass(frozen=True)
class Result:
    """An input with its findings; a study's probability is the mean over its readable views."""

    path: Path
    findings: tuple[Finding, ...]
    threshold: float

    @property
    def readable(self) -> list[Finding]:
        """The views that have a probability."""
        return [finding for finding in self.findings if not finding.error]

    @property
    def probability(self) -> float:
        """Of abnormal; NaN where no view could be read."""
        return float(np.mean([finding.probability for finding in self.readable])) if self.readable else math.nan

    @property
    def label(self) -> int:
        """1 abnormal, 0 normal."""
        return int(self.probability > self.threshold)

    @property
    def confidence(self) -> float:
        """Probability of the class that was predicted."""
        return self.probability if self.label else 1 - self.probability

    @property
    def verdict(self) -> str:
        """Class and confidence in words; never "100.0%", which no probability below 1 means."""
        shown = f"{self.confidence:.1%}" if self.confidence < 0.9995 else "above 99.9%"
        return f"{CLASSES[self.label]}, confidence {shown}" + f" at threshold {self.threshold:g}" * (self.threshold != 0.5)

    @property
    def error(self) -> str:
        """Why the input, or some of its views, failed."""
        if len(self.findings) == 1:
            return self.findings[0].error
        failed = [f"{finding.path.name}: {finding.error}" for finding in self.findings if finding.error]
        return "; ".join(failed) if self.findings else "holds no images that may be read"

    def row(self) -> dict[str, Any]:
        """Give the row of --output."""
        said = (CLASSES[self.label], self.confidence, self.probability) if self.readable else (None, None, None)
        return dict(zip(RESULT_COLUMNS, (str(self.path), *said, self.error or None), strict=True))


def read_finding(path: Path, shapes: Iterable[tuple[int, str]]) -> Finding:
    """Decode an image for --predict and scale it to each (size, fit); warn about what does not look like a radiograph."""
    try:
        pixels = read_radiograph(path)
    except BadImage as error:
        return Finding(path, np.zeros((0, 0), np.uint8), {}, str(error))
    doubt = unlike_radiograph(path, pixels)
    if doubt:
        note(f"{path}: does not look like a radiograph ({doubt}); the result means little")
    return Finding(path, pixels, {(size, fit): fit_square(pixels, size, fit) for size, fit in shapes})


class Predictor:
    """Reads, classifies and explains images with the models of --checkpoint."""

    def __init__(self, config: Config, stop: StopSignals) -> None:
        self.config, self.stop = config, stop
        self.arithmetic = choose_arithmetic(choose_device(config.device), config.precision)
        self.members = load_members(config, self.arithmetic)
        self.threshold, _ = choose_threshold(config, self.members)

    def results(self, inputs: Sequence[Input]) -> Iterator[Result]:
        """Yield a result for each input, in order; images are decoded in threads while others are classified."""
        shapes = {(member.image_size, member.fit) for member in self.members}
        paths = (path for _, views in inputs for path in views)
        workers, ahead = self.config.workers or core_count(), self.config.scoring_batch
        found = self.classify(map_ahead(partial(read_finding, shapes=shapes), paths, workers, ahead))
        for path, views in inputs:
            yield Result(path, tuple(itertools.islice(found, len(views))), self.threshold)

    def classify(self, findings: Iterator[Finding]) -> Iterator[Finding]:
        """Have all models look at what could be read, a batch at a time; the order stays."""
        while batch := list(itertools.islice(findings, self.config.scoring_batch)):
            readable = [finding for finding in batch if not finding.error]
            looks = zip(*(self.look(member, readable) for member in self.members if readable), strict=True)
            self.stop.check()
            yield from (finding if finding.error else replace(finding, looks=next(looks)) for finding in batch)

    def look(self, member: Member, batch: Sequence[Finding]) -> list[Look]:
        """Look at a batch with one model, calibrated."""
        squares = np.stack([finding.squares[member.image_size, member.fit] for finding in batch])
        images = member.normalization(to_unit(torch.from_numpy(squares)[:, None].to(self.arithmetic.device)))
        with self.arithmetic.autocast():
            logits, evidence = grad_cam(member.network, images)
            if member.tta:
                mirrored, mirrored_evidence = grad_cam(member.network, images.flip(3))
                logits, evidence = (logits + mirrored) / 2, (evidence + mirrored_evidence.flip(2)) / 2
        probabilities = sigmoid(logits.cpu().double().numpy(), member.temperature).tolist()
        evidence = evidence / member.temperature
        return [(*pair, member.image_size, member.fit) for pair in zip(probabilities, evidence, strict=True)]


def require_targets(targets: dict[str, Path | None], inputs: Sequence[Input]) -> None:
    """See before the work that the files of --predict, by flag, can be written and that none is an input.

    Raises:
        UserError: which cannot, or would be replaced.
    """
    given = {flag: path for flag, path in targets.items() if path}
    read = {os.path.realpath(path) for _, views in inputs for path in views if given}
    for flag, path in given.items():
        if os.path.realpath(path) in read:
            raise UserError(f"--{flag} {path}: is an input, and would be replaced")
        require_place(path)


def figure_stem(path: Path) -> str:
    """Name a figure after its input; a name that has no room for an ending is cut."""
    stem = Path(os.path.realpath(path)).stem  # unlike Path.resolve, it takes links in a circle
    return stem if len(os.fsencode(stem)) <= 200 else shorten(stem, 50)  # bytes; file systems take 255


def print_result(result: Result) -> None:
    """Print an input, a line on stdout (and one for each view of a study), or on stderr why it failed."""
    if result.error:
        note(f"{result.path}: {result.error}")
    if not result.readable:
        return
    is_study = len(result.findings) > 1
    views = f", {len(result.findings)} views" if is_study else ""
    say(f"{result.path}: {result.verdict} (probability of abnormal {result.probability:.4f}{views})")
    for finding in result.readable if is_study else ():
        say(f"    {finding.path.name}: probability of abnormal {finding.probability:.4f}")


def explain_result(
    result: Result, file: Path, config: Config, *, show: bool, box: tuple[int, int, int, int] | None = None
) -> None:
    """Save original | heatmap | overlay of an input, a row a view."""
    part = next((piece for piece in result.path.resolve().parts if piece.upper().startswith("XR_")), "")
    explained = CLASSES[result.label] if config.cam_class == "predicted" else config.cam_class
    sign = 1 if explained == "abnormal" else -1
    heading = f"{'/'.join(result.path.parts[-4:])}   {part}\n{result.verdict} - {RESEARCH_ONLY}"
    panels = [
        Panel(seen.pixels, np.maximum(sign * seen.evidence, 0), f"{seen.path.name}   P(abnormal) {seen.probability:.3f}", box)
        for seen in result.readable[:FIGURE_ROWS]
    ]
    save_explanation(file, panels, heading, f"evidence for {explained}, logits", show=show)
    count = len(result.readable)
    say(f"    figure: {file}" + (f" (the first {FIGURE_ROWS} of {count} views)" if count > FIGURE_ROWS else ""))


def write_results(config: Config, rows: Sequence[dict[str, Any]], explained: dict[str, Finding]) -> None:
    """Write --output, as CSV or JSON by its suffix, and --save-cam, by the names of its maps, as far as they are asked for."""
    if config.output and config.output.suffix == ".json":
        write_json(config.output, rows)
    elif config.output:
        write_csv(config.output, rows, RESULT_COLUMNS)
    if config.save_cam:
        # as numpy.savez_compressed, which does not take an image of the name "file"
        with atomic_write(config.save_cam) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, finding in explained.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, finding.evidence)


def show_windows() -> None:
    """Open the figures that were kept, and wait until they are closed."""
    from matplotlib import pyplot

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the windows' loop would not notice the noted one
    pyplot.show()


# ===== 16 demo and export ============================================================================================

DEMO_STUDIES, DEMO_PARTS = (136, 36), ("XR_FOREARM", "XR_HUMERUS")  # of train and valid, of each part
EXPORT_TOLERANCE = 1e-4  # probability: how far an exported network may be from torch


def lesion_boxes(root: Path) -> dict[Path, tuple[int, int, int, int]]:
    """Read where the lesion of each abnormal phantom of valid/ lies: left, top, right, bottom, pixels."""
    with (root / PHANTOM_LIST).open(newline="") as file:
        return {
            root.parent / row["path"]: (int(row["left"]), int(row["top"]), int(row["right"]), int(row["bottom"]))
            for row in csv.DictReader(file) if "/valid/" in row["path"]
        }


def pointing_game(results: Sequence[Result], boxes: dict[Path, tuple[int, int, int, int]]) -> str:
    """Say how often the evidence for abnormal peaks on the lesion (arXiv 1608.00507), and how often chance would.

    A hit is a peak no farther from the box than half a cell of the network's map, which is as fine as a map can point;
    chance is the share of the image that counts as a hit.
    """
    hits, chance = [], []
    for result in results:
        evidence, (_, _, size, _) = result.findings[0].evidence, result.findings[0].looks[0]
        slack = max(evidence.shape) * MAP_STRIDE / size / 2
        left, top, right, bottom = np.array(boxes[result.path]) + slack * np.array((-1, -1, 1, 1))
        y, x = np.indices(evidence.shape)
        inside = (left <= x) & (x < right) & (top <= y) & (y < bottom)
        hits.append(inside.flat[evidence.argmax()])
        chance.append(inside.mean())
    return (f"heat peaks on the lesion in {sum(hits)} of {len(hits)} abnormal images that were called so ({np.mean(hits):.0%}; "
            f"chance {np.mean(chance):.0%})")


class Deployed(nn.Module):
    """A model with its preprocessing, as --export writes it: (B, 1, S, S) grey, 0 to 1, to probabilities of abnormal (B,)."""

    def __init__(self, member: Member) -> None:
        super().__init__()
        self.member, self.network = member, member.network

    def forward(self, images: Tensor) -> Tensor:
        """Map grey images (B, 1, S, S), 0 to 1, to probabilities (B,)."""
        logits = logits_of(self.network, self.member.normalization(images), tta=self.member.tta)
        return torch.sigmoid(logits / self.member.temperature)


def to_pt2(program: Any, about: dict[str, str]) -> bytes:
    """Give the content of a .pt2 file, torch's own format; `about` becomes the extra file about.json."""
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"about.json": json.dumps(about)})
    return content.getvalue()


def run_pt2(content: bytes, images: Tensor) -> np.ndarray:
    """Run a .pt2 file on images, to probabilities (B,)."""
    return np.asarray(torch.export.load(io.BytesIO(content)).module()(images))


def to_onnx(program: Any, about: dict[str, str]) -> bytes:
    """Give the content of an .onnx file; `about` becomes the model's metadata."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        exported: Any = torch.onnx.export(program, input_names=["images"], output_names=["probability"], dynamo=True)
    model = exported.model_proto
    for name, text in about.items():
        model.metadata_props.add(key=name, value=text)
    return bytes(model.SerializeToString())


def run_onnx(content: bytes, images: Tensor) -> np.ndarray:
    """Run an .onnx file on images, to probabilities (B,)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": images.numpy()})[0])


# ===== 17 commands ===================================================================================================


def train_command(config: Config, stop: StopSignals) -> int:
    """Train, keep the best model by validation accuracy, then score valid/ once."""
    run = start_run(config, stop)
    require_place(config.checkpoint[0])
    index = index_split(run.root, "train", config.tasks)
    announce(index)
    train_views, val_views = split_patients(index.views, config.val_split, config.seed)
    class_weights(train_views)  # both classes must be there: said before the long work
    has_test = (run.root / "valid").is_dir()
    if has_test:
        index_split(run.root, "valid", config.tasks)  # so is what would keep it from being scored
    state = path_of(config, ".last.pth")
    resumes = config.resume and state.exists()  # its weights replace the initial ones
    network = build_network(config.model or PAPER_MODEL, "none" if resumes else config.weights, config.seed)
    size = choose_image_size(index.views, config.image_size)
    decoded = decode_split(run, index, size, config.fit)
    train, val = MuraDataset(decoded, train_views), MuraDataset(decoded, val_views)
    for name, dataset in (("train", train), ("val", val)):
        if not len(dataset):
            raise UserError(f"{run.root}: none of the images of {name} can be read", EXIT_FAILED)
    say(f"train: {len(train)} images of {len({v.patient for v in train.views})} patients; "
        f"val: {len(val)} images of {len({v.patient for v in val.views})} patients; {size} x {size} px")
    session = Session(run, network, train, val, size, len(decoded.bad))
    if config.resume:
        session.resume()
    elif state.exists():
        say(f"{state}: holds an earlier run, which this one replaces; --resume would continue it")
    if run.processes.rank == 0:
        write_split(config, train_views, val_views)
    session.train()
    if has_test:
        score_split(run, load_members(config, run.arithmetic), "valid")
    else:
        note(f"{run.root}: has no valid/, so there is no held-out test to score")
    return EXIT_DONE


def evaluate_command(config: Config, stop: StopSignals) -> int:
    """Score saved models on a split."""
    run = start_run(config, stop)
    members = load_members(config, run.arithmetic)
    require_place(path_of(config, ".report.json"))
    score_split(run, members, config.split)
    return EXIT_DONE


def predict_command(config: Config, stop: StopSignals) -> int:
    """Classify and explain what --predict names."""
    inputs = list(collect_inputs(config.predict))
    predictor = Predictor(config, stop)
    single, figures = len(inputs) == 1, config.figure
    if single and (figures is None or figures.is_dir()):
        figures = (figures or Path()) / f"{figure_stem(inputs[0][0])}{HEATMAP_ENDING}"
    if figures and not single and (figures.suffix or figures.is_file()) and not figures.is_dir():
        raise UserError(f"--figure {figures}: is to be a folder for several inputs")
    require_targets({"output": config.output, "save-cam": config.save_cam, "figure": figures if single else None}, inputs)
    show = can_show(config)
    note(RESEARCH_ONLY)
    rows: list[dict[str, Any]] = []
    explained: dict[str, Finding] = {}
    try:
        with progress_bar(total=len(inputs), desc="predict", unit="input") as bar:
            for result in predictor.results(inputs):
                rows.append(result.row())
                print_result(result)
                for seen in result.readable if config.save_cam else ():
                    name = str(seen.path).encode(errors="backslashreplace").decode()  # a file's name may be any bytes
                    shape_only = np.broadcast_to(np.uint8(0), seen.pixels.shape)  # thousands of images do not fit in memory
                    explained[name] = replace(seen, pixels=shape_only, squares={})
                if figures and result.readable:
                    file = figures if single else figures / f"{len(rows):04d}_{figure_stem(result.path)}{HEATMAP_ENDING}"
                    explain_result(result, file, config, show=show and len(rows) <= WINDOWS)
                bar.update()
    finally:  # what was predicted before a stop is kept
        write_results(config, rows, explained)
    if show:
        show_windows()
    failed = any(row["error"] for row in rows)
    return EXIT_DONE if not failed else EXIT_SOME_FAILED if any(row["prediction"] for row in rows) else EXIT_FAILED


def demo_command(config: Config, stop: StopSignals) -> int:
    """Train, score and predict on generated phantoms; the figure of one abnormal image shows where its lesion is."""
    folder = config.demo or Path()
    began = time.perf_counter()
    there = folder / "MURA-v1.1"
    if there.exists() and not (there / PHANTOM_LIST).exists():
        raise UserError(f"--demo {folder}: {there} is there and no phantoms are in it; give another folder")
    figure = config.figure or folder / "demo_heatmap.png"
    require_place(figure)
    say(f"demo: drawing phantom radiographs in {folder}")
    root = write_phantoms(folder, DEMO_STUDIES[0], DEMO_STUDIES[1], DEMO_PARTS, config.seed)
    trained = replace(config, data_dir=root, demo=None)
    train_command(trained, stop)
    boxes = lesion_boxes(root)
    results = list(Predictor(trained, stop).results([(path, (path,)) for path in boxes]))
    found = [result for result in results if result.label]
    if found:
        say(pointing_game(found, boxes))
    show, shown = can_show(trained), (found or results)[0]
    print_result(shown)
    explain_result(shown, figure, trained, show=show, box=boxes[shown.path])
    say(f"demo: done in {time.perf_counter() - began:.0f} s; the box in the figure is the lesion that was drawn")
    if show:
        show_windows()
    return EXIT_DONE


def export_command(config: Config, stop: StopSignals) -> int:
    """Write the network of --checkpoint to ONNX or to torch's own .pt2, and compare the file's output with torch's.

    Raises:
        UserError: an optional package is missing, or the exported network differs by more than 1e-4.
    """
    target = config.export or Path()
    members = load_members(config, Arithmetic(torch.device("cpu"), bf16=False, channels_last=False))
    require_place(target)
    member, (threshold, _) = members[0], choose_threshold(config, members)
    model = Deployed(member).eval().requires_grad_(False)
    about = {
        "input": f"grey, float32 (batch, 1, {member.image_size}, {member.image_size}), 0 black to 1 white, fit: {member.fit}",
        "output": "probability of abnormal (batch,)", "normalization": f"inside the network: {member.normalization}",
        "temperature": str(member.temperature), "threshold": str(threshold), "tta": str(member.tta),
        "architecture": member.network.model, "program": f"{PROGRAM} {__version__}", "use": RESEARCH_ONLY,
    }
    probe = torch.rand(3, 1, member.image_size, member.image_size, generator=torch.Generator().manual_seed(1))
    program = torch.export.export(model, (probe[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    make, run = (to_onnx, run_onnx) if target.suffix == ".onnx" else (to_pt2, run_pt2)
    try:
        content = make(program, about)
    except ImportError as error:
        raise UserError(f"--export {target}: needs optional packages: pip install onnx onnxscript onnxruntime") from error
    with torch.inference_mode():
        gap = float(np.abs(run(content, probe) - model(probe).numpy()).max())
    if not gap <= EXPORT_TOLERANCE:
        raise UserError(f"{target}: not written, for it differs by {gap:.2g} from torch's; try the other format", EXIT_FAILED)
    with atomic_write(target) as file:
        file.write(content)
    say(f"written: {target}; largest difference from torch {gap:.1g}")
    return EXIT_DONE


def main(config: Config) -> int:
    """Run the command that the options ask for, and turn every outcome into an exit code."""
    stop = StopSignals()
    commands = {"demo": demo_command, "evaluate": evaluate_command, "predict": predict_command, "export": export_command}
    command = next((run for name, run in commands.items() if getattr(config, name)), train_command)
    try:
        if Processes.from_environment().world > 1 and command not in (train_command, evaluate_command):
            raise UserError("torchrun is for training and --evaluate: leave it out")
        require_matplotlib()
        code = command(config, stop)
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    except Stopped as stopped:
        note(str(stopped))
        return leave(stopped.exit_code)
    except UserError as error:
        if config.debug:
            traceback.print_exc()
        note(str(error), failed=True)
        return leave(error.exit_code)
    except Exception as error:
        if config.debug:
            traceback.print_exc()
        reason = next(iter(str(error).strip().splitlines()), "no message")
        if isinstance(error, torch.OutOfMemoryError):
            reason = "use a smaller --batch-size, of which scoring takes four times as many images at once"
        note(f"{type(error).__name__}: {reason}{'' if config.debug else ' (--debug shows where)'}", failed=True)
        return leave(EXIT_FAILED)


def leave(code: int) -> int:
    """Give back the exit code of a run that ended early; one of several processes leaves here and now.

    NCCL takes leave together: a process that failed would wait for others who wait for it, and torchrun would not hear of it.
    """
    if dist.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed
                stream.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    for closed in [name for name in ("stdout", "stderr") if getattr(sys, name) is None]:  # as by `>&-`: the run goes on unheard
        setattr(sys, closed, Path(os.devnull).open("w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    sys.exit(main(OPTIONS))
