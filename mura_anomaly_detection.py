#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.10", "torchvision>=0.25", "pillow>=11.0", "matplotlib>=3.9", "tqdm>=4.66",
#     "numpy>=1.26",
# ]
# ///
"""Train, evaluate and use an abnormality detector for bone X-rays (MURA, arXiv 1712.06957).

  mura_anomaly_detection.py --demo                                   everything, on phantoms
  mura_anomaly_detection.py --data-dir MURA-v1.1 --checkpoint mura.pth           train and test
  mura_anomaly_detection.py --data-dir MURA-v1.1 --checkpoint mura.pth --resume  go on
  mura_anomaly_detection.py --data-dir MURA-v1.1 --evaluate --checkpoint a.pth b.pth   ensemble
  mura_anomaly_detection.py --predict image1.png --checkpoint mura.pth           explain an image

Terms. An *image* is one file and shows one *view*. A *study* is one examination of one body part:
one or more views, one label (0 normal, 1 abnormal). A *patient* has one or more studies. The
network maps an image to a *logit*; sigmoid(logit / temperature) is the *probability* of abnormal.
A study's probability is the mean of its views'. `train/` is split by patient into *train* and
*val*, which chooses the epoch; MURA's `valid/` folder is the *test* set.

For research and teaching, not for diagnosis.

Read in this order: 1 options, 2 console and files, 3 decoding, 4 data set, 5 transforms, 6 models,
7 metrics, 8 training, 9 plots, 10 evaluate, predict, export, 11 phantoms and demo, 12 Python API
and main.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import itertools
import math
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

__version__ = "2.0.0"
PROGRAM = "mura_anomaly_detection"
RESEARCH_ONLY = "for research and teaching, not for diagnosis"
CLASSES = ("normal", "abnormal")  # index = label
Content = dict[str, Any]  # options, or what a checkpoint, a report or a row holds
EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_SOME_FAILED = 0, 1, 2, 3  # 128 + n: stopped by signal n


class UserError(Exception):
    """A failure that the user can mend; its text is one line: the file or flag, and the remedy."""

    def __init__(self, message: str, exit_code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# ===== 1 options ==================================================================================

MODES = {"evaluate": "E", "predict": "P", "export": "X", "demo": "D"}  # else "T", training
FIGURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")  # of --figure; else a folder
PAPER_RECIPE: Content = {  # arXiv 1712.06957, section 3.1; Adam is AdamW without decay
    "image_size": 320, "lr": 1e-4, "lr_schedule": "plateau", "weight_decay": 0.0, "rotation": 30.0,
    "brightness": 0.0, "contrast": 0.0, "mixup": 0.0, "precise_bn": 0, "tta": False,
}
DEMO_DEFAULTS: Content = {
    "weights": "none", "resize": "letterbox", "normalization": "image", "image_size": 96,
    "lr": 1e-3,
}
# The choices of --select: 1 where more is better. Each is val_NAME in STEM.history.csv; all but
# loss and accuracy, which are per image, are METRICS of studies.
SELECTION = {"loss": -1, "accuracy": 1, "auroc": 1, "kappa": 1}
HINTS = {  # for flags that people try
    "--train": "training is what happens without --evaluate, --predict, --export or --demo",
    "--test": "use --evaluate; training tests on valid/ at its end by itself",
    "--gpu": "CUDA is used where there is one; --device cuda:1 chooses",
}


def option(modes: str, default: object, kind: Content, text: str) -> Any:
    """Declare a flag as a field of Config, refused in other modes than these letters of MODES.

    `kind` holds arguments of add_argument: the values it takes; -h shows `text` up to a semicolon.
    A flag of training is one of LEARNT, unless it is a path or stands in KEPT or FREE.
    """
    return field(default=default, metadata={"modes": modes, "kind": kind, "help": text})


training = partial(option, "TD")  # the demo trains, too


def some_path(text: str) -> Path:
    """Return a path; refuse "", which a shell variable without a value gives: it is no folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def path_to(metavar: str) -> Content:
    """Return the kind of a path; `metavar` shows the suffix that it wants."""
    return {"type": some_path, "metavar": metavar}


def one_of(names: str) -> Content:
    """Return the kind of one of some names, which spaces divide."""
    return {"choices": names.split()}


def number(low: float, high: float = 10**6) -> Content:
    """Return the kind of a number from `low` to `high`, of the type of `low`."""
    kind = type(low)

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(
            f"{text!r} is no {'whole ' * (kind is int)}number from {low:g} to {high:.10g}")

    return {"type": parse, "metavar": "N" if kind is int else "X"}


def matching(pattern: str, forms: str, metavar: str) -> Content:
    """Return the kind of a text that matches a pattern; a probability becomes a float."""

    def parse(text: str) -> float | str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is none of {forms}")
        return float(text) if re.fullmatch(PROBABILITY, text) else text

    return {"type": parse, "metavar": metavar}


PROBABILITY = r"0?\.\d*[1-9]\d*"  # above 0, below 1
COUNT = number(1)
COUNT_OR_OFF = number(0)
UNIT = number(0.0, 1.0)  # 0 and 1 included
INSIDE = number(1e-6, 1 - 1e-6)  # and excluded
RATE = number(0.0, 10.0)
NORMALIZATION = matching(
    rf"imagenet|dataset|image|([01]\.?0*|{PROBABILITY}),(1\.?0*|{PROBABILITY})",
    "imagenet, dataset, image, MEAN,STD (such as 0.2,0.18)", "KIND")
THRESHOLD = matching(
    f"auto|((sens|spec)=)?{PROBABILITY}", "auto, sens=P, spec=P, P (such as 0.5)", "P")
SWITCH = {"action": "store_true"}
SEVERAL = {"nargs": "+", "action": "extend"}
GROUPS = {  # first flag of each group in --help
    "data_dir": "files", "tasks": "data", "model": "training", "evaluate": "evaluation",
    "predict": "prediction", "demo": "general",
}
SHORT_HELP = (
    "data_dir checkpoint resume overwrite tasks val_split model epochs batch_size lr evaluate "
    "predict output figure demo device").split()
KEPT = (  # --resume takes these from the saved state where they are not given; see LEARNT
    "epochs grad_accum_steps patience on_bad_image drop_duplicates weights").split()
FREE = (  # and these never, nor paths
    "resume overwrite save_every bootstrap prevalence device compile workers debug").split()


@dataclass(frozen=True)
class Config:
    """All options: each hyper-parameter stands here once, with unit and source."""

    data_dir: Path | None = option(
        "TE", None, path_to("DIR"), "folder with train/ and valid/, or a parent of it; with "
        "--labels, root of relative paths")
    checkpoint: Sequence[Path] = option(
        "TEPXD", (Path("mura_model.pth"),), path_to("FILE.pth") | SEVERAL, "model file; training "
        "writes it, the other modes read it, several are an ensemble")
    cache_dir: Path | None = option(
        "TED", None, path_to("DIR"), "folder of decoded images (default: .mura_cache in "
        "--data-dir, or the user's cache folder where that is read-only)")
    resume: str | bool | None = option(
        "T", None, {"nargs": "?", "const": True, "choices": ("auto",), "metavar": "auto"},
        "continue from STEM.last.pth, with its settings; `auto` starts a new run without it")
    overwrite: bool = option("TEPXD", False, SWITCH, "replace files that are there")
    save_every: float = training(10.0, number(0.0), "minutes between saved states within an epoch")
    tasks: Sequence[str] = option(
        "TE", (), SEVERAL | {"metavar": "PART"}, "body parts to use, with or without XR_ (default: "
        "all)")
    labels: Path | None = option(
        "TE", None, path_to("FILE.csv"), "a table instead of MURA's folders: path,label and "
        "optionally patient,study,body_part,view")
    val_split: float = training(
        0.2, INSIDE, "fraction of the patients of train/ kept for validation")
    image_size: int | None = training(
        None, number(64, 2048), "side of the network's square input, pixels (default: the paper's "
        "320, or the longest side of the images where that is less)")
    resize: str = training(
        "stretch", one_of("stretch letterbox"), "how an image becomes square: stretch (paper), or "
        "letterbox, which keeps the aspect ratio")
    normalization: str = training(
        "imagenet", NORMALIZATION, "imagenet, dataset (mean and std of the training images), image "
        "(of each image) or MEAN,STD")
    on_bad_image: str | None = option(
        "TE", None, one_of("skip stop"), "what to do after listing unreadable images (default: "
        "skip, but stop if more than 1 %% are)")
    drop_duplicates: bool = option(
        "TE", False, SWITCH, "leave test images out that are also in training, or have "
        "contradicting labels (default: only report them)")
    model: str = training(
        "densenet169", one_of("densenet169 resnet50"), "architecture; --weights with a file of "
        "this program brings its own")
    recipe: str = option(
        "T", "default", one_of("default paper"), "values of flags that are not given: as shown "
        "here, or as in the MURA paper")
    weights: str = training(
        "imagenet", {"metavar": "SOURCE"}, "initial weights: imagenet (downloaded), none (random) "
        "or a file: a model of this program, of torchvision or of timm")
    epochs: int = training(5, COUNT, "passes over the training images")
    batch_size: int = option(
        "TEPD", 8, COUNT, "images per optimiser step; over all processes (paper: 8), four times as "
        "many without gradients")
    grad_accum_steps: int = training(
        1, COUNT, "micro-batches that a batch is computed in, to save memory")
    lr: float = training(3e-4, number(1e-12, 10.0), "peak learning rate of AdamW (paper: 1e-4)")
    lr_schedule: str = training(
        "poly", one_of("poly plateau"), "poly (linear warm-up, then polynomial decay of power 2) "
        "or plateau (paper: a tenth when the val loss does not fall)")
    warmup: float = training(0.1, UNIT, "fraction of all steps in which poly rises to --lr")
    weight_decay: float = training(0.01, RATE, "decoupled weight decay (paper: 0)")
    hflip: float = training(0.5, UNIT, "probability of a horizontal flip")
    rotation: float = training(
        10.0, number(0.0, 180.0), "largest rotation to either side, degrees (paper: 30)")
    brightness: float = training(0.1, UNIT, "largest shift of brightness, fraction of full scale")
    contrast: float = training(0.2, UNIT, "largest relative change of contrast")
    mixup: float = training(
        0.0, RATE, "alpha of mixup (arXiv 1710.09412); 0 is off, 0.2 suits 15 epochs and more")
    precise_bn: int = training(
        256, COUNT_OR_OFF, "training images that BatchNorm statistics are recomputed from before "
        "each validation (arXiv 2105.07576); 0 is off (paper)")
    select: str = training(
        "accuracy", one_of(" ".join(SELECTION)), "metric of val that chooses the epoch: "
        "accuracy, loss per image; auroc, kappa per study")
    patience: int = training(
        0, COUNT_OR_OFF, "stop after N epochs without a better --select; 0 is never")
    precision: str = option(
        "TEPD", "auto", one_of("auto bf16 fp16 tf32 fp32"), "auto: bf16 or fp16 where the hardware "
        "gains from it, else fp32")
    seed: int = option(
        "TED", 0, number(0, 2**31), "seed of weights, split, order, augmentation and bootstrap")
    evaluate: bool = option("E", False, SWITCH, "evaluate saved models instead of training")
    split: str = option("E", "valid", one_of("train valid"), "which folder --evaluate uses")
    threshold: float | str | None = option(
        "TEPXD", None, THRESHOLD, "abnormal above this probability; or auto (highest study kappa), "
        "sens=0.95 or spec=0.95, found on val, or on the evaluated images (default: 0.5 while "
        "training, then the model's)")
    tta: bool | None = option(
        "TEPXD", None, {"action": argparse.BooleanOptionalAction}, "horizontal-flip TTA: average "
        "the logits of an image and its flip (default: while training, if --hflip is above 0; then "
        "the model's)")
    bootstrap: int = option(
        "TED", 1000, number(100, 100_000), "patient resamples behind the 95 %% intervals")
    prevalence: float | None = option(
        "TEPD", None, INSIDE, "fraction of abnormal cases where the model is used: adds PPV, NPV "
        "and probabilities for it")
    predict: Sequence[Path] = option(
        "P", (), path_to("PATH") | SEVERAL, "classify and explain images, study folders and "
        "folders")
    output: Path | None = option(
        "PE", None, path_to("FILE.csv"), "also write the predictions to this .csv or .json; with "
        "--evaluate, the stem of its files")
    figure: Path | None = option(
        "PED", None, path_to("PATH"), "original | heatmap | overlay; a picture for one input "
        "(default: NAME_heatmap.png), a folder for several (default: none); with --evaluate, a "
        "folder for the most wrong images")
    cam: str = option(
        "PED", "fine", one_of("fine gradcam"), "heatmap: fine (maps of all stages, multiplied) "
        "or gradcam (the last stage)")
    cam_class: str = option(
        "PED", "abnormal", one_of("abnormal normal predicted"), "class that the heatmap explains")
    save_cam: Path | None = option(
        "P", None, path_to("FILE.npz"), "write the heatmaps, (H, W) float32 by path")
    no_show: bool = option("PD", False, SWITCH, "open no window")
    export: Path | None = option(
        "X", None, path_to("FILE.onnx"), "write the model as FILE.onnx or FILE.pt2")
    demo: Path | None = option(
        "D", None, path_to("DIR") | {"nargs": "?", "const": Path("mura_demo")}, "train, test "
        "and explain on generated phantoms; in DIR (default: mura_demo)")
    device: str = option(
        "TEPD", "auto",
        matching(r"auto|cpu|mps|cuda(:\d+)?", "auto, cpu, mps, cuda, cuda:N", "NAME"),
        "auto, cpu, mps, cuda or cuda:N; auto is CUDA, then MPS, then CPU")
    compile: bool = training(False, SWITCH, "compile the network with torch.compile")
    workers: int = option("TEPD", 0, COUNT_OR_OFF, "threads that decode images; 0 is one per core")
    debug: bool = option("TEPXD", False, SWITCH, "show tracebacks")
    given: frozenset[str] = frozenset()  # names of the flags on the command line
    command: tuple[str, ...] = ()  # that line

    @property
    def mode(self) -> str:
        """The letter of MODES, or "T"."""
        return next((letter for name, letter in MODES.items() if getattr(self, name)), "T")

    def file(self, ending: str) -> Path:
        """Return a file of the run: STEM and an ending such as .last.pth.

        STEM is the first --checkpoint without its suffix, or the --output of --evaluate.
        """
        named = (self.evaluate and self.output) or self.checkpoint[0]
        has_suffix = named.suffix in (".pth", ".csv", ".json")  # else a dot is of the name
        return Path(f"{named.with_suffix('') if has_suffix else named}{ending}")

    @property
    def eval_batch_size(self) -> int:
        """Images at once without gradients, over all processes."""
        return max(1, 4 * self.batch_size // self.grad_accum_steps)


OPTIONS = tuple(item for item in fields(Config) if item.metadata)
LEARNT = tuple(  # they decide what is learnt: --resume takes them from the saved state
    item.name for item in OPTIONS
    if "T" in item.metadata["modes"] and item.metadata["kind"].get("type") is not some_path
    and item.name not in (*KEPT, *FREE))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the nearest flag for a mistyped one."""

    def error(self, message: str) -> NoReturn:
        """Print the one line and exit with EXIT_USAGE."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        typed = unknown[1] if unknown else ""
        near = difflib.get_close_matches(typed, self._option_string_actions, 1, cutoff=0.7)
        hint = HINTS.get(typed) or (f"did you mean {near[0]}?" if near else "see --help")
        self.exit(EXIT_USAGE, f"{self.prog}: error: {' '.join(message.split())} ({hint})\n")


def flag_of(name: str) -> str:
    """Return the flag of a field of Config."""
    return "--" + name.replace("_", "-")


def build_parser(*, short: bool = False) -> Parser:
    """Return the parser made from Config; with `short` its help holds the few flags of -h."""
    head, examples, *_ = (__doc__ or "").split("\n\n")
    parser = Parser(
        prog=f"{PROGRAM}.py", description=head, epilog=f"examples:\n{examples}",
        allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS,
        usage="%(prog)s [--evaluate | --predict PATH | --export FILE | --demo] [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-h", action="help", help="this screen" if short else "the most used flags")
    parser.add_argument("--help", action="help", help="every flag")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    group: Any = parser
    for item in OPTIONS:
        text, default = item.metadata["help"], item.default
        if short:
            text = text.partition(";")[0] if item.name in SHORT_HELP else argparse.SUPPRESS
        elif default is not False and default not in (None, ()):
            text += f" (default: {default[0] if isinstance(default, tuple) else default})"
        if item.name in GROUPS and not short:
            group = parser.add_argument_group(GROUPS[item.name])
        group.add_argument(flag_of(item.name), help=text, **item.metadata["kind"])
    return parser


def parse_options(arguments: Sequence[str]) -> Config:
    """Return the Config of command-line arguments; wrong use prints one line and exits with 2."""
    parser = build_parser(short="-h" in arguments)
    given = vars(parser.parse_args(arguments))
    values = dict(PAPER_RECIPE) if given.get("recipe") == "paper" else {}
    if "demo" in given:
        values = DEMO_DEFAULTS | {"checkpoint": (given["demo"] / "demo.pth",)}
    config = Config(**(values | given), given=frozenset(given), command=tuple(arguments))
    if problem := usage_problem(config):
        parser.error(problem)
    return config


def usage_problem(config: Config) -> str | None:
    """Return what is wrong with a combination of flags, or None."""
    mode, given, figure, output = config.mode, config.given, config.figure, config.output
    chosen = [flag_of(name) for name in MODES if name in given] or ["training"]
    if len(chosen) > 1:
        return f"{' and '.join(chosen)} exclude each other"
    for item in OPTIONS:
        if item.name in given and mode not in item.metadata["modes"]:
            fixed = mode in "EPX" and item.name in LEARNT
            why = "the checkpoint fixes it" if fixed else "it would do nothing"
            return f"{flag_of(item.name)} does not go with {chosen[0]}: {why}"
    first, trains, threshold = config.checkpoint[0], mode in "TD", config.threshold
    is_picture = figure and figure.suffix.lower() in FIGURE_SUFFIXES
    problems = {
        "--data-dir DIR or --labels FILE.csv is needed (or --predict, or --demo)":
            mode in "TE" and not (config.data_dir or config.labels),
        "--split is for MURA's folders, not for --labels": config.labels and "split" in given,
        f"{chosen[0]} takes one --checkpoint": mode in "TDX" and len(config.checkpoint) > 1,
        "--checkpoint names a model twice": len({*config.checkpoint}) < len(config.checkpoint),
        f"--checkpoint {first}: the name must end in .pth, and not in .last.pth, a saved state's":
            trains and (first.suffix != ".pth" or first.stem.endswith(".last")),
        "--resume and --overwrite exclude each other": config.resume and config.overwrite,
        f"--threshold {threshold}: is found while training or by --evaluate":
            mode in "PX" and isinstance(threshold, str),
        f"--export {config.export}: the name must end in .onnx or .pt2":
            config.export and config.export.suffix not in (".onnx", ".pt2"),
        f"--output {output}: the name must end in .csv or .json":
            mode == "P" and output and output.suffix not in (".csv", ".json"),
        f"--save-cam {config.save_cam}: the name must end in .npz":
            config.save_cam and config.save_cam.suffix != ".npz",
        "--evaluate draws its heatmaps into the folder of --figure: name a folder":
            mode == "E" and (is_picture or (given & {"cam", "cam_class"} and not figure)),
        f"--figure {figure}: the name must end in {', '.join(FIGURE_SUFFIXES)}":
            mode == "D" and figure and not is_picture,
        "--mixup mixes the images of a batch: --batch-size 1 has but one":
            trains and config.mixup and config.batch_size == 1,
        "--warmup goes with --lr-schedule poly":
            "warmup" in given and config.lr_schedule == "plateau",
    }
    return next((text for text, wrong in problems.items() if wrong), None)


if __name__ == "__main__":
    # Parsed before the heavy imports: --help and typing errors answer at once. Until `main` takes
    # over, Ctrl-C ends the program the plain way instead of with a traceback out of an import.
    CONFIG = parse_options(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import csv
import ctypes
import hashlib
import io
import json
import logging
import os
import secrets
import shlex
import shutil
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from PIL import TiffImagePlugin as Tiff
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from pydicom import Dataset

Array = np.ndarray  # the docstring says shape and unit
Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]  # grey, 0 black to 255 white, (H, W)
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
Resizing = tuple[int, str]  # side in pixels and --resize: arguments of resize_square

# ===== 2 console and files ========================================================================

TEMPORARY = f".{PROGRAM}.{{}}.tmp"  # name of a file that is being written


class SafeStream:
    """A text stream whose failure (terminal gone, disk full, pipe closed) does not end the work.

    What comes afterwards goes nowhere; `lost` says whether any output was missed.
    """

    def __init__(self, stream: Any) -> None:
        self.lost = stream is None  # as by `>&-`
        self.stream = Path(os.devnull).open("w") if stream is None else stream  # noqa: SIM115

    def write(self, text: str) -> int:
        """Write and flush text; its length is returned even where it was lost."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.lost |= not isinstance(error, BrokenPipeError)  # `| head` has seen enough
            with contextlib.suppress(OSError, ValueError):
                descriptor = self.stream.fileno()
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        return len(text)

    def flush(self) -> None:
        """Do nothing: what was written is flushed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def printable(text: str) -> str:
    r"""Return text with control characters, newlines and bytes that are no text escaped.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return text if text.isprintable() else repr(text)[1:-1]


def shorten(name: str, width: int) -> str:
    """Return a name in at most `width` printable characters, the middle of a long one cut out.

    >>> shorten("patient00011", 8)
    'pati~011'
    """
    text, head = printable(name), width // 2
    return text if len(text) <= width else f"{text[:head]}~{text[len(text) - width + head + 1 :]}"


def log(text: str) -> None:
    """Print one line of results on stdout, above any progress bar; the first process only."""
    if is_main_process():
        tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()


def warn(text: str, *, failed: bool = False) -> None:
    """Print one line on stderr; why it `failed` is printed by every process, with its rank."""
    if is_main_process() or failed:
        rank = "" if is_main_process() else f" (rank {os.environ['RANK']})"
        tqdm.write(f"{PROGRAM}{rank}: {printable(text)}", file=sys.stderr)


class Progress(tqdm):  # type: ignore[type-arg]  # it takes none when it runs
    """A progress bar on a terminal and in a notebook; elsewhere a line a minute on stderr."""

    def __init__(self, total: int, title: str, units: str = "images", done: int = 0) -> None:
        self.is_drawn = "ipykernel" in sys.modules or sys.stderr.isatty()
        file, seconds = (sys.stderr, 0.1) if self.is_drawn else (io.StringIO(), 60)
        super().__init__(
            total=total, initial=done, desc=title, unit=f" {units}", file=file, mininterval=seconds,
            miniters=1, leave=False, dynamic_ncols=True, disable=not is_main_process())

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count more done; `note` is shown behind the bar or on the line."""
        self.set_postfix_str(note, refresh=False)
        if self.update(count) and not self.is_drawn:
            warn(str(self))


class Stopped(BaseException):
    """Raised after SIGINT or SIGTERM; a BaseException, so that no `except Exception` takes it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopSignals(contextlib.ExitStack):
    """A context in which SIGINT and SIGTERM raise Stopped, at once or, where deferred, at `check`.

    A second Ctrl-C ends the process the plain way; SIGTERM may come several times, from torchrun
    and from a scheduler. In a thread other than the main one nothing is installed.
    """

    signum = 0
    deferring = False

    def __enter__(self) -> Self:
        self.began = time.time()
        with contextlib.suppress(ValueError):  # a thread
            for signum in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(signum, self.handle)
                self.callback(signal.signal, signum, before)
        return self

    def handle(self, signum: int, frame: object) -> None:
        """Acknowledge a signal at once and act on it now or later."""
        if not self.signum and is_main_process():
            when = " after this batch; Ctrl-C again stops at once" if self.deferring else ""
            with contextlib.suppress(OSError):
                os.write(2, f"\n{PROGRAM}: stopping{when}\n".encode())
        self.signum = signum
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
        if not self.deferring:
            self.check()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it a signal waits for `check`: there is work to save first."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        self.check()

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.signum:
            raise Stopped(self.signum)


def is_distributed() -> bool:
    """Return whether torchrun started this process; a stray RANK alone does not count."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}


def is_main_process() -> bool:
    """Return whether this is the process that prints and writes."""
    return not is_distributed() or os.environ["RANK"] == "0"


class Distributed:
    """The processes of a torchrun job, or this one alone."""

    def __init__(self) -> None:
        self.rank, self.world_size, self.local_rank = 0, 1, 0
        if is_distributed():
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            self.rank, self.world_size, self.local_rank = (int(os.environ[n]) for n in names)
        self.slow_group: Any = None  # waits for decoding

    def start(self, device: torch.device) -> None:
        """Join the other processes: NCCL on CUDA, gloo elsewhere."""
        if self.world_size > 1:
            is_cuda = device.type == "cuda"
            if is_cuda:
                torch.cuda.set_device(device)  # NCCL's collectives of objects go by the current one
            peers = timedelta(minutes=10)  # a process that hangs ends the others after this
            dist.init_process_group("nccl" if is_cuda else "gloo", timeout=peers)
            self.slow_group = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier()

    def wait_for_decoding(self) -> None:
        """Wait for all processes, for as long as decoding may take."""
        if self.world_size > 1:
            arrival = dist.barrier(self.slow_group, async_op=True)
            while not arrival.is_completed():  # its `wait` would not hear a signal
                time.sleep(0.2)
            arrival.wait()  # raises what has failed

    def sum(self, values: Tensor) -> list[float]:
        """Return the sums of (n,) values over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values.tolist()

    def gather(self, mine: Sequence[Any]) -> list[Any]:
        """Return all processes' items: the i-th of rank r becomes item i * world_size + r."""
        lists = [list(mine)] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(lists, lists[0])
        rounds = itertools.zip_longest(*lists)
        return [item for items in rounds for item in items if item is not None]

    def broadcast_buffers(self, network: nn.Module) -> None:
        """Copy rank 0's BatchNorm statistics to all, so that all evaluate the same network."""
        if self.world_size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    def require_shared(self, file: Path) -> None:
        """Raise UserError where some machine does not see a file that rank 0 has made."""
        if not all(self.gather([file.exists()])):
            raise UserError(f"{file.parent}: is not shared by all machines; --checkpoint must be "
                            "in a folder that they share", EXIT_FAILED)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it an OSError becomes the UserError of a file that cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose another place",
                        EXIT_FAILED) from error


def sweep_temporaries(folder: Path) -> None:
    """Remove the temporary files that processes left which were killed an hour ago or earlier."""
    with contextlib.suppress(OSError):  # another process was faster
        for path in folder.glob(TEMPORARY.format("[0-9a-f]" * 12)):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yield a path in the same folder, whose file becomes `path` when it is whole and on the disk.

    A link's target is replaced, not the link; the mode of an earlier file stays. Errors of what the
    caller does with the file are the caller's.
    """
    target = Path(os.path.realpath(path))
    with writing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(target.parent)
    temporary = target.with_name(TEMPORARY.format(secrets.token_hex(6)))
    try:
        yield temporary
        with writing(path):
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, temporary)
            temporary.replace(target)
            if os.name == "posix":  # the name, too, has to reach the disk
                folder = os.open(target.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; UserError where there is no space or no permission."""
    with temporary_file(path) as temporary, writing(path):
        temporary.write_bytes(content)


def csv_text(rows: Iterable[Content], columns: Sequence[str]) -> bytes:
    """Return rows as CSV; None and NaN become empty cells, control characters are escaped."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_csv_cell(row.get(name)) for name in columns])
    return text.getvalue().encode(errors="surrogateescape")  # a file's name may be any bytes


def _csv_cell(value: Any) -> Any:
    if isinstance(value, str):
        return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: printable(found[0]), value)
    return None if value != value else value


def digest(content: str | bytes) -> str:
    """Return 16 digits of the SHA-256 of bytes or a text; file names in it may hold any bytes."""
    data = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]


def json_text(content: object) -> bytes:
    """Return indented JSON; NaN is refused rather than written."""
    return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"


def require_writable(path: Path) -> None:
    """Check before long work that `atomic_write` will be able to write a file; errors as there."""
    with writing(path):
        folder = Path(os.path.realpath(path)).parent
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if path.is_dir():
            raise IsADirectoryError(None, "a folder")


def require_new(paths: Iterable[Path], remedy: str) -> None:
    """Raise UserError where one of the files is there; `remedy` says what to do."""
    for path in paths:
        if os.path.lexists(path):
            raise UserError(f"{path}: is there already; {remedy}")


def is_ours(path: Path) -> bool:
    """Return whether a file carries this program's name."""
    return path.is_file() and PROGRAM.encode() in path.read_bytes()


@contextlib.contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Hold a lock that dies with the process; UserError where another process has it."""
    require_writable(path)
    if path.exists() and path.stat().st_size:  # ours is empty
        raise UserError(f"{path}: is in the way, and not of this program; use another --checkpoint")
    with path.open("ab") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise FileExistsError  # removed by its holder and made anew since it was opened
        except OSError as error:
            raise UserError(f"{path}: another run with this --checkpoint is under way; wait for "
                            "its end or use another --checkpoint", EXIT_FAILED) from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                path.unlink()


def write_checkpoint(path: Path, content: Content) -> str:
    """Write what torch.save can hold; returns the file's digest."""
    buffer = io.BytesIO()
    torch.save({"format": PROGRAM, "version": __version__, **content}, buffer)
    atomic_write(path, buffer.getvalue())
    return digest(buffer.getvalue())


def read_checkpoint(path: Path, kind: str) -> Content:
    """Return the content of a "model" (STEM.pth) or a "state" (STEM.last.pth) of this program.

    Raises:
        UserError: it is something else, or as of `read_weights`.
    """
    flag, ending = ("--checkpoint", ".pth") if kind == "model" else ("--resume", ".last.pth")
    remedy = f"{flag} wants the {ending} file that training wrote"
    content = read_weights(path, remedy)
    if content.get("format") != PROGRAM or content.get("kind") != kind:
        raise UserError(f"{path}: is another kind of file; {remedy}")
    return content


def read_weights(path: Path, remedy: str) -> Content:
    """Return the dict in a .pth or .safetensors file; never runs code from it.

    Raises:
        UserError: missing, damaged, unsafe, or not a dict; `remedy` says what is wanted.
    """
    try:
        if not path.is_file():  # before opening: a FIFO or a device would be read for ever
            raise FileNotFoundError(None, "no such file, or it is not a file")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            check_archive(file)
            return {**torch.load(file, map_location="cpu", weights_only=True)}
    except ImportError as error:
        raise UserError(f"{path}: needs an optional package: pip install safetensors") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error
    except Exception as error:  # of many kinds, none documented; torch's text advises to run code
        raise UserError(f"{path}: is damaged, no file of weights by name, or holds other things "
                        f"than tensors and plain values; {remedy}") from error


def check_archive(file: IO[bytes]) -> None:
    """Verify the checksums of a zip archive, which torch.load does not; OSError where wrong."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type for entry in archive.infolist()):
                raise OSError("compressed, which torch.save never does")
            if damaged := archive.testzip():
                raise OSError(f"damaged: the checksum of {damaged} is wrong")
    file.seek(0)


# ===== 3 decoding =================================================================================
# What is read how, and by which source, stands in tests/DECODING.md. A further format changes these
# three: its first bytes by Pillow's name, its suffix, and the version.

IMAGE_FORMATS = re.compile(  # first bytes, by Pillow's names; EPS would start Ghostscript
    # DICOM: with preamble, or from its first tag on
    rb"(?s)(?P<DICOM>.{128}DICM|[\x02\x08\x10\x18\x20\x28]\0.\0(?:[A-Z]{2}|.\0\0\0))"
    rb"|(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<JPEG>\xff\xd8\xff)|(?P<TIFF>II[*+]\0|MM\0[*+])"
    rb"|(?P<GIF>GIF8[79]a)|(?P<BMP>BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0)"
    rb"|(?P<WEBP>RIFF.{4}WEBP)"
)
# Files of these names are taken for images without opening them, while a folder is scanned.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".dcm")
CACHE_VERSION = 4  # raise it when decoding or resizing changes: older caches are then not used
HEAD_BYTES = 65_536  # holds the first bytes of every format and the file meta of DICOM
MAX_BYTES = 1 << 29  # holds MAX_PIXELS of 16-bit RGBA
MAX_PIXELS = 36_000_000  # 60 x 60 cm at 100 um: a gigabyte of memory; judged by the header
MAX_SIDE = 65_535  # as of JPEG and DICOM: reducing a longer side costs more than all its pixels
OUTLIERS = 1000  # one pixel of so many may be darker than black, and one brighter than white
MIN_CONTRAST = 8  # grey levels from the 0.5th to the 99.5th percentile: below, nothing was imaged
MAX_CHROMA = 16  # mean of max(R, G, B) - min(R, G, B): a small coloured mark stays below
JPEG_END = b"\xff\xd9"
NEW_SUBFILE_TYPE = 254  # TIFF 6.0; Pillow names the other tags
PNG_CHUNKS = b"IHDR PLTE tRNS IDAT".split()  # on which pixels depend
JPEG_SIZE = re.compile(  # T.81 SOF, T.800 SIZ
    rb"(?s)\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xf7]\0.[\x02-\x10](..)(..)"
    rb"|\xff\x4f\xff\x51.{4}(.{4})(.{4})"
)
DICOM_DEFAULTS = {  # where an attribute is missing
    "SamplesPerPixel": 1, "PixelRepresentation": 0, "PhotometricInterpretation": "MONOCHROME2"}
JPEG_SCAN = re.compile(rb"(?s)(\xff\xda\0(?:\x08\x01..|\x0c\x03.{6}))\0\0\0")  # T.81 SOS

OPTIONAL = contextlib.suppress(Exception)  # what is absent or not understood is left out

# Decoders warn on stderr and may quote a file, so also a patient's data; errors become BadImage.
# Set once for the process: warnings.catch_warnings is not thread-safe, and threads decode.
warnings.filterwarnings("ignore", module=r"(PIL|pydicom|pylibjpeg|openjpeg|libjpeg)\b")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with OPTIONAL:  # where libtiff is hidden in Pillow: Windows
    libtiff = ctypes.CDLL(Image.core.__file__)  # type: ignore[attr-defined]
    libtiff.TIFFSetWarningHandler(None)
    libtiff.TIFFSetErrorHandler(None)


class BadImage(Exception):  # noqa: N818 (reads as what it is where it is raised)
    """An image that cannot be used; the text is the reason, to which the caller adds the path."""


class ImageHeader(NamedTuple):
    """What an image file says about itself; width and height in pixels, 0 if not understood."""

    width: int = 0
    height: int = 0
    study_uid: str = ""  # DICOM StudyInstanceUID


@dataclass(frozen=True)
class Radiograph:
    """One decoded image and what its file says about it."""

    pixels: Pixels
    body_part: str = ""  # DICOM BodyPartExamined
    warning: str = ""  # a short clause
    chroma: float = 0.0  # mean of max(R, G, B) - min(R, G, B), 0 to 255


def read_header(path: Path) -> ImageHeader | None:
    """Return what the first bytes of an image file say, or None if they are of no image.

    The content decides, never the name. Pixels are not decoded, and nothing is raised.
    """
    kind = ""
    with OPTIONAL:  # damaged or not supported: decoding says so
        if path.is_file():  # opening a FIFO would wait for its writer for ever
            with path.open("rb") as file:
                kind = _image_format(file.read(HEAD_BYTES))
                file.seek(0)
                if kind == "DICOM":
                    header = _read_dicom(file, stop_before_pixels=True)
                    if header and "Rows" not in header:  # DICOMDIR, a report, ...
                        return None
                    study = str(header.get("StudyInstanceUID", ""))
                    return ImageHeader(header.Columns, header.Rows, study)
                return ImageHeader(*Image.open(file, formats=(kind,)).size)
    return ImageHeader() if kind else None


def _image_format(head: bytes) -> str:
    found = IMAGE_FORMATS.match(head)
    return (found and found.lastgroup) or ""


def read_radiograph(path: Path) -> Radiograph:
    """Decode one image file into grey.

    Raises:
        BadImage: why the file cannot be used: missing, damaged, too large, not supported, ...
    """
    data = _read_bytes(path)
    if not (kind := _image_format(data)):
        raise BadImage("not an image of a known kind")
    try:
        return _decode_dicom(data) if kind == "DICOM" else _decode_picture(data, kind)
    except BadImage:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} megapixels, or than memory") from error
    except Exception as error:  # decoders raise a dozen kinds, whose texts may quote the file
        raise BadImage(f"damaged, cut short or a {kind} that is not supported") from error


def _read_bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise BadImage("a folder or device, not a regular file")
        if not 0 < size <= MAX_BYTES:
            raise BadImage("larger than 512 MiB" if size else "empty (0 bytes)")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadImage((getattr(error, "strerror", "") or "cannot be read").lower()) from error


def _check_size(width: int, height: int, frames: int = 1) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} megapixels")
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"a side of more than {MAX_SIDE} pixels")
    if frames > 1:
        raise BadImage("several frames in one file: save the wanted one by itself")


def _open_picture(data: bytes, kind: str) -> Any:
    stream = io.BytesIO(data)
    return _TiffFile(stream) if kind == "TIFF" else Image.open(stream, formats=(kind,))


def _decode_picture(data: bytes, kind: str) -> Radiograph:
    """Decode what Pillow reads."""
    if kind == "PNG":
        data = _pixel_chunks(data)
    image = _open_picture(data, kind)
    several = _check_tiff(image) if kind == "TIFF" else getattr(image, "is_animated", False)
    several &= image.format != "MPO"  # a camera's previews
    _check_size(image.width, image.height, 1 + several)
    is_deep = ";16" in str(image.tile)
    other = None  # decoded with other pixels where some are missing
    if kind == "PNG":  # Pillow accepts a stream that ends early
        image.im = Image.new(image.mode, image.size, 1).im
        last_rows = np.asarray(image)[-2:]  # missing ones stay 1; 2, as the file may be interlaced
        if (last_rows == 1).all(axis=1).any():
            other = _open_picture(data, kind)  # here they are 0
    if kind == "JPEG" and JPEG_END not in data[-32:]:
        data = data.rstrip(b"\xff")
        image = _open_picture(data + JPEG_END, kind)
        other = _open_picture(data + b"\xfe\xfe\xfe\xfe" + JPEG_END, kind)
    if other:
        differ = (np.asarray(image) != np.asarray(other)).reshape(image.height, -1).any(axis=1)
        if differ.any():
            raise BadImage(f"cut short: rows after {differ.argmax()} are missing")
    image.load()
    with OPTIONAL:  # a damaged EXIF block does not spoil the pixels
        ImageOps.exif_transpose(image, in_place=True)
    grey, chroma = _to_grey(image)
    if is_deep and grey.max() < 64:  # Pillow cuts colour to 8 bits: 12-bit values would be black
        raise BadImage("16-bit values that do not use their range: save it as 16-bit grey")
    return Radiograph(grey, chroma=chroma)


def _pixel_chunks(data: bytes) -> bytes:
    """Return a PNG file without the chunks that no pixel needs: their damage does no harm."""
    kept, rest = bytearray(data[:8]), memoryview(data)[8:]
    while rest:
        length = 12 + int.from_bytes(rest[:4])
        chunk, rest = rest[:length], rest[length:]
        if zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:]):
            if chunk[4:8] in (*PNG_CHUNKS, b"acTL", b"eXIf"):
                kept += chunk
        elif chunk[4:8] in PNG_CHUNKS:
            raise BadImage("damaged or cut short: a checksum is wrong")
    return bytes(kept) + b"\0\0\0\0IEND\xaeB`\x82"


class _TiffFile(Tiff.TiffImageFile):
    """A TIFF file of which the tags are read, too, where Pillow cannot decode the pixels."""

    def _setup(self) -> None:
        self._mode = "L"
        self._size = self.tag_v2[Tiff.IMAGEWIDTH], self.tag_v2[Tiff.IMAGELENGTH]
        with OPTIONAL:  # else it has no tiles
            super()._setup()


def _check_tiff(image: _TiffFile) -> bool:
    """Return whether a TIFF file has further images, other than overviews and masks of its first.

    Those say so (NewSubfileType), or are smaller and of the same aspect ratio.

    Raises:
        BadImage: Pillow does not decode it, or otherwise than its tags say.
    """
    tags, (width, height), several = image.tag_v2, image.size, False
    _check_size(tags.get(Tiff.TILEWIDTH, 1), tags.get(Tiff.TILELENGTH, 1))
    if not {Tiff.STRIPOFFSETS, Tiff.TILEOFFSETS} & {*tags}:
        raise BadImage("damaged: its tags do not say where the pixels are")
    bits, sample = (tags.get(tag, (1,))[0] for tag in (Tiff.BITSPERSAMPLE, Tiff.SAMPLEFORMAT))
    planes = tags.get(Tiff.PLANAR_CONFIGURATION, 1)
    if not image.tile or (bits, sample) in ((8, 2), (32, 1)) or (planes == 2 and bits != 8):
        raise BadImage(f"{bits}-bit TIFF is not supported (byte order {tags.prefix.decode()}, "
                       f"SampleFormat {sample}, "
                       f"PhotometricInterpretation {tags.get(Tiff.PHOTOMETRIC_INTERPRETATION)}, "
                       f"PlanarConfiguration {planes}, Compression {tags.get(Tiff.COMPRESSION)})")
    with OPTIONAL:  # EOFError: that was the last
        for index in range(1, 16):  # one image has fewer overviews
            image.seek(index)
            wide, high = image.size
            is_overview = wide < width and abs(wide * height - high * width) < max(width, height)
            several |= not (is_overview or tags.get(NEW_SUBFILE_TYPE, 0) & 5)
    image.seek(0)
    return several


def _to_grey(image: Image.Image) -> tuple[Pixels, float]:
    """Return grey and the mean chroma."""
    tags = getattr(image, "tag_v2", {})
    if image.mode[0] in "IF":  # I;16, I;16B, I, F
        values = np.array(image)
        values[values == image.info.get("transparency", np.nan)] = 0
        grey = _scale(values, *_robust_range(values))
        is_negative = tags.get(Tiff.PHOTOMETRIC_INTERPRETATION) == 0  # white is zero
        return ~grey if is_negative else grey, 0.0
    if image.mode == "L" and not image.has_transparency_data:
        return np.array(image), 0.0
    if max(tags.get(Tiff.COLORMAP, (256,))) < 256:  # TIFF 6.0 has palettes of 0 to 65535
        image.putpalette(bytes(tags[Tiff.COLORMAP]), "RGB;L")
    colour = image.convert("RGB")
    if image.has_transparency_data:  # lies on black
        *colours, alpha = image.convert("RGBA").convert("RGBa").split()
        if not alpha.getbbox():
            raise BadImage("wholly transparent")
        colour = Image.merge("RGB", colours)
    chroma = np.ptp(np.asarray(colour)[::16, ::16], axis=2).mean()
    return np.array(colour.convert("L")), chroma


def _robust_range(values: Array) -> Array:
    """Return black and white for grey of any depth, (2,), where the file has no window.

    One pixel in a thousand is below black, one above white; of less than a thousand pixels, the
    extremes are black and white. So they follow the anatomy without a jump, and neither hot pixels
    nor the bits that hold the values set them: views by one detector stay comparable.

    >>> _robust_range(np.array([[7, 1000, 4095]])).tolist()
    [7, 4095]
    """
    if not np.isfinite(values).all():
        raise BadImage("holds values that are not finite")
    ranks = [values.size // OUTLIERS, -1 - values.size // OUTLIERS]
    return np.partition(values, ranks, axis=None)[ranks]


def _scale(values: Array, black: float, white: float) -> Pixels:
    span = float(white) - float(black) or 1.0
    shown = (values.astype(np.float32) - float(black)) * (255 / span) + 0.5
    return shown.clip(0, 255).astype(np.uint8)


def _read_dicom(file: IO[bytes], **options: Any) -> Dataset:
    try:
        import pydicom
    except ImportError as error:
        raise BadImage("DICOM needs an optional package: pip install 'pydicom>=3'") from error
    if b"1.2.840.10008.1.2.1.99" in file.read(HEAD_BYTES):  # pydicom unpacks it whole
        raise BadImage("deflated DICOM is not supported: save it uncompressed")
    file.seek(0)
    return pydicom.dcmread(file, force=True, **options)


def _decode_dicom(data: bytes) -> Radiograph:
    header = _read_dicom(io.BytesIO(data))
    for keyword in ("PixelData", "Rows", "Columns", "BitsAllocated"):
        if not header.get(keyword):
            raise BadImage(f"a DICOM file without an image: {keyword} is missing or 0")
    _check_size(header.Columns, header.Rows, header.get("NumberOfFrames") or 1)
    warning = _dicom_warning(header)
    for keyword, value in (*DICOM_DEFAULTS.items(), ("BitsStored", header.BitsAllocated)):
        if header.get(keyword) in (None, ""):
            setattr(header, keyword, value)
    bits = header.BitsStored
    if not 0 < bits <= header.BitsAllocated:
        raise BadImage(f"a DICOM file with {bits} bits stored of {header.BitsAllocated}")
    header.BitsStored = max(bits, (header.get("HighBit") or 0) + 1)  # pydicom clears what is above
    stored, chroma = _dicom_pixels(header), 0.0
    if stored.ndim == 3:
        grey, chroma = _to_grey(Image.fromarray(stored))
    else:
        grey = _dicom_grey(header, stored, bits)
    if chroma > MAX_CHROMA or header.PhotometricInterpretation == "PALETTE COLOR":
        raise BadImage("colour DICOM: a radiograph is grey")
    if grey.shape != (header.Rows, header.Columns):
        raise BadImage("its pixels are not Rows x Columns")
    part = str(header.get("BodyPartExamined", ""))
    return Radiograph(grey, part, warning, chroma)


def _dicom_pixels(header: Dataset) -> Array:
    """Return the stored values of the first frame, (Rows, Columns) or (Rows, Columns, 3)."""
    from pydicom.pixels.utils import get_expected_length, pixel_array

    found, expected = len(header.PixelData), get_expected_length(header)
    if found < expected and not header["PixelData"].is_undefined_length:  # not compressed
        raise BadImage(f"cut short: {found} of {expected} bytes of pixels")
    syntax = header.file_meta.setdefault("TransferSyntaxUID", "1.2.840.10008.1.2.1").value
    if syntax.name == str(syntax):  # a private or damaged one, perhaps with what follows it
        raise BadImage("its transfer syntax is not known")
    if "JPEG" in syntax.name and (size := JPEG_SIZE.search(header.PixelData)):
        _check_size(*(int.from_bytes(side) for side in size.groups() if side))  # it is believed
    if syntax.endswith(".4.51"):  # sequential JPEG has coefficients 0 to 63
        header.PixelData = JPEG_SCAN.sub(b"\\1\0\x3f\0", header.PixelData)
    try:
        return pixel_array(header, index=0)
    except RuntimeError as error:
        raise BadImage(
            f"{syntax.name}: damaged, or its decoder is missing: "
            "pip install pylibjpeg pylibjpeg-openjpeg pylibjpeg-libjpeg"
        ) from error


def _dicom_grey(header: Dataset, stored: Array, bits: int) -> Pixels:
    """Stored values -> modality -> values of interest -> grey (DICOM PS3.3 C.11.1 and C.11.2).

    All of it happens to a table of the values that a pixel can have.
    """
    if stored.itemsize > 2:
        raise BadImage("DICOM of more than 16 bits is not supported")
    codes = stored.astype(np.uint16)
    levels = np.arange(65_536).astype(stored.dtype).astype(int)
    is_padding = np.zeros(65_536, bool)
    with OPTIONAL:  # absent, or not understood; its sign is often confused, and it may be cleared
        first = header.PixelPaddingValue
        low, high = sorted([first, header.get("PixelPaddingRangeLimit", first)])
        is_padding = (levels - low) % (1 << header.BitsStored) <= high - low
    black, white = _robust_range(stored[~is_padding[codes]]).astype(np.uint16)
    if levels[white] >= 1 << bits:  # else nothing is shifted, whatever HighBit says
        levels >>= header.BitsStored - bits
    elif bits <= 8 and not header.PixelRepresentation:
        black, white = 0, (1 << bits) - 1  # shown as stored
    values, shown = _display(header, levels)
    if shown is None or shown[black] == shown[white]:  # no window, or one beside every pixel
        shown = _scale(values, *sorted(values[[black, white]]))
    if header.PhotometricInterpretation == "MONOCHROME1":
        shown = ~shown
    shown[is_padding] = 0
    return shown[codes]


def _display(header: Dataset, levels: Array) -> tuple[Array, Pixels | None]:
    """Return values after the modality, and grey as the VOI table or window says, if there is one.

    What is not understood is left out.
    """
    from pydicom.pixels.processing import apply_windowing

    for keyword in ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"):
        with OPTIONAL:  # absent, or no text
            setattr(header, keyword, header.get_item(keyword).value.decode().replace(",", "."))
    values, shown = levels, None
    with OPTIONAL:
        if header.RescaleSlope:  # 0 would make all pixels alike
            values = levels * header.RescaleSlope + header.RescaleIntercept
    with OPTIONAL:
        values = _look_up(levels, header.ModalityLUTSequence[0])
    for keyword in ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"):
        header.pop(keyword, None)
    header.BitsStored, header.PixelRepresentation = 8, 0  # the range of windowed values
    with OPTIONAL:
        windowed = apply_windowing(values, header)
        shown = None if windowed is values else _scale(windowed, 0, 255)
    with OPTIONAL:  # a table may declare more bits than it has
        looked_up = _look_up(values, header.VOILUTSequence[0])
        shown = _scale(looked_up, 0, looked_up.max())
    return values, shown


def _look_up(values: Array, table: Dataset) -> Array:
    """Return entries of a table of any number of bits, unlike pydicom (PS3.3 C.11.1.1)."""
    count, data = table.LUTDescriptor[0] or 65_536, table.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if table.original_encoding[1] else ">u2")
    if len(data) < count:  # two of 8 bits in a word
        data = np.array(data, "<u2").view(np.uint8)
    places = (values - table.LUTDescriptor[1]).clip(0, count - 1).astype(int)
    return np.asarray(np.take(data, places))


def _dicom_warning(header: Dataset) -> str:
    storage = getattr(header.get("SOPClassUID"), "name", "")
    if "FOR PROCESSING" in f"{header.get('PresentationIntentType')}, {storage}".upper():
        return "FOR PROCESSING: raw exposure, perhaps a negative"
    if not header.get("PhotometricInterpretation"):
        return "PhotometricInterpretation is missing: perhaps a negative"
    polarity = f"{header.PhotometricInterpretation} {header.get('PresentationLUTShape')}"
    if polarity in ("MONOCHROME1 IDENTITY", "MONOCHROME2 INVERSE"):
        return "PresentationLUTShape contradicts PhotometricInterpretation: perhaps a negative"
    return ""


def unlike_radiograph(radiograph: Radiograph) -> str | None:
    """Return in a few words why an image is hardly a radiograph, or None.

    A drawing or screenshot is mostly flat and its steps are hard; noise and soft tissue keep
    radiographs from that, however wide their black borders.
    """
    dark, bright = np.percentile(radiograph.pixels, (0.5, 99.5))
    if bright - dark < MIN_CONTRAST:
        return "blank"
    if radiograph.chroma > MAX_CHROMA:
        return "strongly coloured"
    steps = np.abs(np.diff(radiograph.pixels.astype(np.int16), axis=1))
    changing = (steps > 0).sum()
    if changing < steps.size / 2 and (steps > 32).sum() > changing / 4:
        return "screenshot-like: flat areas and hard edges"
    return None


# ===== 4 data set =================================================================================

MURA_IMAGES = {"train": 36_808, "valid": 3_197}  # in the lists of version 1.1
LAYOUT = "expected XR_*/patient*/study*_*/image*.png"
BAD_FRACTION = 0.01  # more unreadable images than this stop a run, unless told to skip them
LABEL_WORDS = "0 1 normal abnormal negative positive".split()  # 0, 1, 0, 1, 0, 1


@dataclass(frozen=True)
class ImageRecord:
    """One labelled image of a data set."""

    path: str  # text: of 40,000 Paths, making alone would take half a second
    name: str  # the path below train/ or valid/ with forward slashes, or as --labels has it
    body_part: str  # XR_ELBOW, ...
    patient: str  # patient00011, ...: the same name in two body parts is taken for one patient
    study: str  # XR_ELBOW/patient00011/study1_negative, ...
    label: int  # 0 normal, 1 abnormal


@dataclass(frozen=True)
class Scan:
    """The images of one split, and what was noticed while looking for them (one line each)."""

    split: str  # train, valid, or the file of --labels
    folder: Path  # what the images' names start from
    records: tuple[ImageRecord, ...]
    notes: tuple[str, ...]
    is_mura: bool = False  # its list has as many images as MURA's


def find_data_root(folder: Path) -> Path:
    """Return the folder that holds train/ or valid/: `folder`, or up to two levels below it.

    Raises:
        UserError: the folder is missing, or nothing like MURA is in it.
    """
    below = [sorted(folder.glob(pattern)) for pattern in ("[!._]*", "[!._]*/[!.]*")]  # no __MACOSX
    for candidate in (folder, *itertools.chain(*below)):
        if os.path.isdir(candidate / "train") or os.path.isdir(candidate / "valid"):
            return candidate
    raise UserError(f"{folder}: no such folder, or neither it nor a folder in it holds train/ or "
                    "valid/; --data-dir wants the unpacked MURA-v1.1")


def _list_folder(folder: Path | str, *, folders: bool) -> list[str]:
    """Return the names of the folders, or of the files, in a folder, in natural order.

    Hidden ones (AppleDouble) are left out; what cannot be read, as a loop of links, is named.
    """
    names = []
    try:
        visible = [entry for entry in os.scandir(folder) if entry.name[0] != "."]
    except OSError as error:
        warn(f"{folder}: skipped, it cannot be read ({error.strerror})")
        return []
    for entry in visible:
        try:
            if entry.is_dir() == folders:
                names.append(entry.name)
        except OSError as error:
            warn(f"{entry.path}: skipped ({error.strerror})")
    return sorted(names, key=natural_key)


subfolders = partial(_list_folder, folders=True)
file_names = partial(_list_folder, folders=False)


@lru_cache(1 << 15)  # MURA has 12,000 patients, and image1.png 15,000 times
def natural_key(text: str) -> str:
    """Return a sort key that puts image2 before image10.

    >>> sorted(["image10.png", "image2.png"], key=natural_key)
    ['image2.png', 'image10.png']
    """
    padded = re.sub(r"\d+", lambda found: found[0].zfill(20), text)
    return f"{padded}\0{text}"  # the text, since 1 and 01 are alike


def _read_table(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = f"cannot be read as CSV in UTF-8 ({error}); save it again"
        raise UserError(f"{path}: {why}") from error


def _read_mura_list(path: Path, split: str) -> dict[str, str]:
    """Return what follows SPLIT/ in each path of one of MURA's lists, with the label behind it.

    A header line and a pandas index column are passed over. The label is "" in a list of images.

    Raises:
        UserError: a row is not `.../SPLIT/XR_PART/patient/study/...`, with 0 or 1 in a list of
            studies.
    """
    listed: dict[str, str] = {}
    label = r"\s*,\s*([01])" if "labeled_studies" in path.name else "()"
    row = re.compile(rf'(?:\d*,)?"?(?:[^,]*/)?{split}/([^,"]+/[^,"]+/[^,"]*[^,"/])/*"?{label}')
    lines = _read_table(path).splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        text = line.replace("\\", "/").strip()
        if found := row.fullmatch(text):
            listed[found[1]] = found[2]
        elif text.strip(",") and (number > 1 or "/" in text):
            raise UserError(f"{path}: line {number} is not like MURA's ({line[:60]!r}); restore "
                            "the file from the archive or delete it")
    return listed


def _choose_body_parts(present: Iterable[str], tasks: Sequence[str]) -> list[str]:
    """Return the body parts that --tasks names, with or without XR_ and in any case.

    Raises:
        UserError: a task that is not present; the message lists those that are.
    """
    names = {part: part.upper().removeprefix("XR_") for part in sorted(present)}
    wanted = {task.upper().removeprefix("XR_") for task in tasks} or {*names.values()}
    if unknown := wanted.difference(names.values()):
        there = ", ".join(dict.fromkeys(names.values())) or "none"
        raise UserError(f"--tasks {min(unknown)}: no such body part; present are {there}")
    return [part for part, name in names.items() if name in wanted]


def scan_split(root: Path, split: str, tasks: Sequence[str] = ()) -> Scan:
    """Return the images of `root/split`: XR_*/patient*/study*/image*.

    A study's label is that in SPLIT_labeled_studies.csv, else its folder's name (_positive,
    _negative). Where SPLIT_image_paths.csv lists any, by any suffix, only the listed images count.
    UserError where there is no image or no such body part, or a list is not MURA's.
    """
    top = root / split
    image_list, study_list = f"{split}_image_paths.csv", f"{split}_labeled_studies.csv"
    labels = _read_mura_list(root / study_list, split)
    listed = {os.path.splitext(name)[0] for name in _read_mura_list(root / image_list, split)}
    every = subfolders(top)
    present = [name for name in every if name.upper().startswith("XR_")]
    parts = _choose_body_parts(present, tasks)
    missing = {name for name in listed if name.partition("/")[0] in parts}
    records, counts = list[ImageRecord](), Counter[str]()
    counts["folders are not called XR_..., left out"] = len(every) - len(present)
    studies = [(part, patient, study) for part in parts for patient in subfolders(top / part)
               for study in subfolders(f"{top}/{part}/{patient}")]
    for part, patient, study in studies:
        key = f"{part}/{patient}/{study}"
        named = {"positive": "1", "negative": "0"}.get(study.rpartition("_")[2].lower(), "")
        label = labels.get(key, named)
        counts[f"studies are named unlike {study_list}, which counts"] += named not in ("", label)
        for name in (f"{key}/{file}" for file in file_names(f"{top}/{key}")):
            bare, suffix = os.path.splitext(name)
            missing.discard(bare)
            if suffix.lower() not in IMAGE_SUFFIXES and not read_header(top / name):
                counts["files are no images, left out"] += 1
            elif listed and bare not in listed:
                counts[f"images are not in {image_list}, left out"] += 1
            elif not label:
                counts[f"images have no label in {study_list} or their study's name, left out"] += 1
            else:
                records.append(ImageRecord(f"{top}/{name}", name, part, patient, key, int(label)))
    counts[f"images of {image_list} are missing, such as {min(missing, default='')}"] = len(missing)
    notes = [f"{top}: {count} {text}" for text, count in counts.items() if count]
    if not records:
        raise UserError(f"{top}: no images found; {'; '.join(notes) or LAYOUT}")
    return Scan(split, top, tuple(records), tuple(notes), len(listed) == MURA_IMAGES.get(split))


def scan_labels(path: Path, folder: Path, tasks: Sequence[str] = ()) -> Scan:
    """Return the images of a table: path,label and optionally patient,study,body_part,view.

    Args:
        path: the CSV file, with a header line.
        folder: what relative paths start from.
        tasks: body parts to use.

    Raises:
        UserError: a wrong header, a missing file, an unknown label, two labels for one study, ...;
            the message names the line.
    """
    reader = csv.DictReader(io.StringIO(_read_table(path)), restval="", restkey="more")
    header = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    if not {"path", "label"} <= set(header):
        raise UserError(f"{path}: line 1 must be a header with path,label and optionally "
                        "patient,study,body_part,view, divided by commas")
    records: dict[str, ImageRecord] = {}
    labels: dict[str, int] = {}
    try:
        for row in reader:
            record = _table_record(row, folder)
            if record.path in records:
                raise UserError(f"{record.name} is listed twice; delete one of the lines")
            if labels.setdefault(record.study, record.label) != record.label:
                raise UserError(f"study {record.study} has two labels; correct one of them")
            records[record.path] = record
    except (csv.Error, UserError) as error:
        remedy = "" if isinstance(error, UserError) else "; it is no CSV here: save it again"
        raise UserError(f"{path}: line {reader.line_num}: {error}{remedy}") from error
    parts = _choose_body_parts({record.body_part for record in records.values()}, tasks)
    chosen = [record for record in records.values() if record.body_part in parts]
    if not chosen:
        raise UserError(f"{path}: lists no image")
    effects = {
        "patient": "each study is taken for a patient of its own: intervals are too narrow, and "
                   "the split may leak",
        "study": "each image is a study of its own"}
    notes = [f"{path}: no {name} column: {effects[name]}" for name in effects if name not in header]
    return Scan(path.name, folder, tuple(chosen), tuple(notes))


def _table_record(row: Mapping[str, str], folder: Path) -> ImageRecord:
    cells = defaultdict(str, {name: str(cell).strip() for name, cell in row.items()})
    name, word = cells["path"].replace("\\", "/"), cells["label"].lower()
    if word not in LABEL_WORDS or "more" in cells:
        raise UserError(f"label {word!r} is none of {', '.join(LABEL_WORDS)}, or there are more "
                        "cells than in the header")
    if not os.path.isfile(folder / name):
        raise UserError(f"{folder / name}: no such file; --data-dir says what relative paths start "
                        "from")
    if "patient" in cells and not cells["patient"]:
        raise UserError("names no patient; fill it in, or leave the column out")
    study = cells["study"] or name
    patient = cells["patient"] or study
    part = cells["body_part"] or "all"
    key = f"{part}/{patient}/{study}"  # study1 of a patient's elbow is not study1 of the hand
    label = LABEL_WORDS.index(word) % 2
    return ImageRecord(str(folder / name), name, part, patient, key, label)


def count_table(scan: Scan) -> list[str]:
    """Return lines with the images, studies and patients of each body part (and abnormal ones)."""
    lines = [f"{scan.split:<7} {'body part':<14}{'images':>16}{'studies':>16}{'patients':>16}"
             "  (abnormal)"]
    parts = sorted({record.body_part for record in scan.records})
    for part in [*parts, "all"] if len(parts) > 1 else parts:
        lines.append(f"{'':<8}{part:<14}")
        chosen = [record for record in scan.records if part in (record.body_part, "all")]
        for unit in ("path", "study", "patient"):
            every = {getattr(record, unit) for record in chosen}
            abnormal = {getattr(record, unit) for record in chosen if record.label}
            lines[-1] += f"{f'{len(every)} ({len(abnormal)})':>16}"
    return lines


def split_by_patient(
    records: Sequence[ImageRecord], fraction: float, seed: int
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Return (train, val), split by patient across body parts.

    A patient's rank follows from seed and name alone, so the order of the files does not matter,
    and a new patient moves at most one other. Patients with and without an abnormal study are split
    separately; where there are two of a kind or more, each side gets one.

    Raises:
        UserError: there are too few patients of either kind.
    """
    everyone = {record.patient for record in records}
    abnormal = {record.patient for record in records if record.label}
    val: set[str] = set()
    for kind in (abnormal, everyone - abnormal):
        names = sorted(kind, key=lambda name: digest(f"{seed}/{name}"))
        count = max(1, round(fraction * len(names)))
        val.update(names[:-1][:count])  # the last one stays in train
    if not val:
        raise UserError(f"--val-split {fraction:g}: {len(everyone)} patients cannot be split; use "
                        "more patients or another fraction")
    train = [record for record in records if record.patient not in val]
    return train, [record for record in records if record.patient in val]


def map_ahead(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int, ahead: int
) -> Iterator[Any]:
    """Yield function(item) in order, computed in threads at most `ahead` in advance.

    Zero `workers` are a thread for each core.
    """
    pool = ThreadPoolExecutor(workers or core_count())
    try:
        futures = (pool.submit(function, item) for item in items)
        waiting = deque(itertools.islice(futures, ahead))
        while waiting:
            waiting.extend(itertools.islice(futures, 1))
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def core_count() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def letterbox_box(height: int, width: int, size: int, resize: str) -> Box:
    """Return the box of an image's content in the square of `size` pixels.

    >>> letterbox_box(100, 50, 320, "letterbox"), letterbox_box(100, 50, 320, "stretch")
    ((80, 0, 240, 320), (0, 0, 320, 320))
    """
    if resize == "stretch":
        return 0, 0, size, size
    wide, high = (max(1, round(side * size / max(height, width))) for side in (width, height))
    left, top = (size - wide) // 2, (size - high) // 2
    return left, top, left + wide, top + high


def resize_square(pixels: Pixels, size: int, resize: str) -> Pixels:
    """Return (H, W) uint8 scaled to (size, size) uint8, antialiased.

    `resize` is "stretch" (the paper) or "letterbox" (aspect ratio kept, centred, black around it).
    """
    left, top, right, bottom = letterbox_box(pixels.shape[0], pixels.shape[1], size, resize)
    # Pillow widens the filter with the reduction; the gap averages large images in blocks first
    content = Image.fromarray(pixels).resize(
        (right - left, bottom - top), Image.Resampling.BILINEAR, reducing_gap=3.0)
    square = Image.new("L", (size, size))
    square.paste(content, (left, top))
    return np.array(square)


class CachedImage(NamedTuple):
    """A decoded image: a row of PATH.npy, (n, S, S) uint8, with what PATH.json knows of it."""

    record: ImageRecord
    path: Path  # the .npy
    row: int
    signature: str = ""  # size and time of change of the image's file when it was decoded
    checksum: str = ""  # of the pixels; "" if they are still to be decoded
    error: str = ""  # why it could not be decoded; its pixels are black


def open_cache(
    scan: Scan, size: int, resize: str, folder: Path, *, verify: bool
) -> Iterator[list[CachedImage]]:
    """Yield the images of a split, those of a body part together, as the cache has them.

    It has nothing of an image whose file has changed or, to `verify`, whose copy is damaged.
    """
    for part in sorted({record.body_part for record in scan.records}):
        records = [record for record in scan.records if record.body_part == part]
        key = digest("\n".join([f"{CACHE_VERSION}", *(record.name for record in records)]))
        name = re.sub(r"[^\w-]", "_", f"{part}-{size}-{resize}-{key}")
        path = folder / f"{name}.npy"
        unknown, images = [CachedImage(record, path, i) for i, record in enumerate(records)], []
        try:
            rows = json.loads(path.with_suffix(".json").read_bytes())
            squares = np.asarray(np.load(path, mmap_mode="r")).reshape(-1, size, size)
            for image, row, square in zip(unknown, rows, squares, strict=True):
                known = CachedImage(*image[:3], *row)
                usable = known.signature == _signature(image.record.path)
                if usable and verify and known.checksum != digest(square.tobytes()):
                    usable = False
                    warn(f"{path}: damaged at {image.record.name}, which is decoded again")
                images.append(known if usable else image)
        except Exception as error:  # of damaged files, many kinds
            if not isinstance(error, FileNotFoundError):
                warn(f"{path}: it or its .json is damaged, so its images are decoded again")
            images = unknown
        yield images


def _signature(path: str) -> str:
    """Return what changes when a file's content does: its size and time of change."""
    with OPTIONAL:
        status = os.stat(path)
        return f"{status.st_size}|{status.st_mtime_ns}"
    return "absent"


def decode_scan(
    scan: Scan, size: int, resize: str, folder: Path, workers: int
) -> list[CachedImage]:
    """Return the cached images of a split; what the cache does not have is decoded.

    Raises:
        UserError: the cache folder is full or cannot be written.
    """
    sweep_temporaries(folder)
    decode = partial(_decode_image, size=size, resize=resize)
    scanned: list[CachedImage] = []
    with Progress(len(scan.records), f"decode {scan.split}") as bar:
        for images in open_cache(scan, size, resize, folder, verify=True):
            todo = [image for image in images if not image.checksum]
            bar.advance(len(images) - len(todo))
            if todo:
                _write_part(images, size, map_ahead(decode, todo, workers, ahead=64), bar)
            scanned += images
    return scanned


def _write_part(
    images: list[CachedImage], size: int, decoded: Iterable[tuple[CachedImage, Pixels]],
    bar: Progress,
) -> None:
    """Write decoded images into the cache of a body part, and put them into `images`."""
    path, is_new = images[0].path, not any(image.checksum for image in images)
    whole = temporary_file(path) if is_new else contextlib.nullcontext(path)
    with whole as target, writing(path):
        if is_new:
            np.lib.format.open_memmap(target, "w+", np.uint8, (len(images), size, size))
        with target.open("r+b") as file:
            for image, square in decoded:
                # from the end: the length of the header of .npy does not matter
                file.seek((image.row - len(images)) * square.size, os.SEEK_END)
                file.write(square.tobytes())
                images[image.row] = image
                bar.advance()
    rows = [(image.signature, image.checksum, image.error) for image in images]
    atomic_write(path.with_suffix(".json"), json_text(rows))  # last: now the rows count


def _decode_image(image: CachedImage, size: int, resize: str) -> tuple[CachedImage, Pixels]:
    """Return what the cache is to know of an image, and its square, black if it is unreadable."""
    square, error = np.zeros((size, size), np.uint8), ""
    signature = _signature(image.record.path)
    try:
        square = resize_square(read_radiograph(Path(image.record.path)).pixels, size, resize)
    except BadImage as problem:
        error = str(problem)
        from_system = getattr(problem.__cause__, "errno", None)  # decoders' own errors have none
        if "pip install" in error or from_system:
            signature = ""  # it may become readable without a change
    checksum = digest(square.tobytes())
    return image._replace(signature=signature, checksum=checksum, error=error), square


def cache_folder(root: Path) -> Path:
    """Return where the cache lives without --cache-dir: beside the data, or in the user's cache."""
    beside = root / ".mura_cache"
    if os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return beside
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folder = home / PROGRAM / digest(str(root.resolve()))
    warn(f"{root}: is read-only; the cache is in {folder} (--cache-dir chooses)")
    return folder


def report_bad_images(
    scan: Scan, images: Sequence[CachedImage], on_bad_image: str | None
) -> dict[str, str]:
    """Return the unreadable images, name -> why, and warn of them: their count, the first ten.

    Raises:
        UserError: more than 1 % are unreadable (with --on-bad-image stop any, with skip all).
    """
    errors = {image.record.name: image.error for image in images if image.error}
    for name in list(errors)[:10]:
        warn(f"{scan.folder / name}: {errors[name]}")
    text = f"{len(errors)} of {len(images)} images below {scan.folder} cannot be read (see above)"
    allowed = {"skip": 1, "stop": 0}.get(on_bad_image or "", BAD_FRACTION) * len(images)
    if len(errors) > allowed or len(errors) == len(images):
        raise UserError(f"{text}; replace or remove them (--on-bad-image skip allows some)",
                        EXIT_FAILED)
    if errors:
        warn(f"{text}; they are skipped")
    return errors


class MuraDataset(torch.utils.data.Dataset[tuple[Any, int]]):
    """Radiographs as (image, label): image (1, S, S) uint8, label 0 normal or 1 abnormal.

    Pixels are read from the memory-mapped cache. It can be pickled to a worker process.

    Args:
        images: what `decode_scan` returned, or some of it; unreadable ones are left out.
        transform: applied to each image, if given.
    """

    def __init__(
        self, images: Iterable[CachedImage], transform: Callable[[Tensor], Any] | None = None
    ) -> None:
        self.images = [image for image in images if not image.error]
        self.records = tuple(image.record for image in self.images)
        self.labels = np.array([record.label for record in self.records], np.int64)
        self.transform, self.arrays = transform, dict[Path, Array]()

    @classmethod
    def from_folder(
        cls, data_dir: str | Path, split: str = "train", tasks: str | Sequence[str] = (),
        size: int = 320, resize: str = "stretch",
        transform: Callable[[Tensor], Any] | None = None,
    ) -> MuraDataset:
        """Return the images of DATA_DIR/SPLIT, cached as on the command line.

        Raises:
            UserError: the folder is not in MURA's layout, or its cache cannot be written.
        """
        root = find_data_root(Path(data_dir))
        scan = scan_split(root, split, [tasks] if isinstance(tasks, str) else tasks)
        for note in scan.notes:
            warn(note)
        images = decode_scan(scan, size, resize, cache_folder(root), 0)
        report_bad_images(scan, images, "skip")
        return cls(images, transform)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.batch(np.array([index]))[0]
        return self.transform(image) if self.transform else image, int(self.labels[index])

    def __getstate__(self) -> Content:
        return {**self.__dict__, "arrays": {}}  # mapped again in the worker process

    def batch(self, indices: Array) -> Tensor:
        """Return images, (B, 1, S, S) uint8."""
        chosen = [self.images[i] for i in indices.tolist()]
        for path in {image.path for image in chosen} - self.arrays.keys():
            self.arrays[path] = np.load(path, mmap_mode="r")
        return torch.from_numpy(np.stack([self.arrays[i.path][i.row] for i in chosen]))[:, None]

    def fingerprint(self) -> str:
        """Return a digest of names, labels and pixels, which tells this set from any other."""
        lines = [f"{image.record.name},{image.record.label},{image.checksum}\n"
                 for image in self.images]
        return digest("".join(lines))


def choose_image_size(records: Sequence[ImageRecord]) -> int:
    """Return the default input side, pixels: 320 or, where smaller, the longest side found.

    The headers of up to 200 images, evenly spread, are read; the side is rounded up to 32.
    """
    headers = [read_header(Path(record.path)) for record in records[:: len(records) // 200 + 1]]
    longest = max((max(found.width, found.height) for found in headers if found), default=320)
    return min(320, max(64, -(-longest // 32) * 32))


def find_duplicates(datasets: Mapping[str, MuraDataset]) -> tuple[list[str], dict[str, set[str]]]:
    """Return what is pixel-identical though it should not be, and the images that it concerns.

    Args:
        datasets: by the name of their split, decoded at one size.

    Returns:
        A clause for each kind: under different patients, in several splits, with contradicting
        labels; and by split the names of images in several splits or with contradicting labels.
    """
    groups: defaultdict[str, list[Content]] = defaultdict(list)
    for split, dataset in datasets.items():
        for image in dataset.images:
            groups[image.checksum].append({"split": split, **vars(image.record)})
    clauses, concerned = [], defaultdict(set)
    for kind in ("patient", "split", "label"):
        found = [group for group in groups.values() if len({one[kind] for one in group}) > 1]
        for one in itertools.chain(*found) if kind != "patient" else ():
            concerned[one["split"]].add(one["name"])
        if found:
            first = "; ".join(" = ".join(one["name"] for one in group) for group in found[:10])
            clauses.append(f"{len(found)} pixel-identical images differ in their {kind}: {first}")
    return clauses, dict(concerned)


# ===== 5 transforms ===============================================================================


def random_stream(name: str, *key: int) -> np.random.Generator:
    """Return the random numbers of one purpose; they follow from name and key, also on --resume."""
    return np.random.default_rng([zlib.crc32(name.encode()), *key])


def split_batches(indices: Array, batch_size: int) -> list[Array]:
    """Return indices in batches of at most this size, whose sizes differ by one at most."""
    return np.array_split(indices, -(-len(indices) // batch_size))


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[Array]:
    """Return 0..count-1 shuffled for an epoch, in batches.

    >>> [len(batch) for batch in epoch_batches(10, 4, seed=0, epoch=0)]
    [4, 3, 3]
    """
    return split_batches(random_stream("order", seed, epoch).permutation(count), batch_size)


def load_batches(
    dataset: MuraDataset, batches: Sequence[Array], device: torch.device
) -> Iterator[Tensor]:
    """Yield the images of each batch of indices, (B, 1, S, S) uint8; a thread reads two ahead."""
    def gather(indices: Array) -> Tensor:
        images = dataset.batch(indices)
        return images.pin_memory() if device.type == "cuda" else images

    for images in map_ahead(gather, batches, workers=1, ahead=2):
        yield images.to(device, non_blocking=True)


def to_unit(images: Tensor) -> Tensor:
    """Return uint8 images as float, 0 to 1."""
    return images.float() / 255


class Augmentation(NamedTuple):
    """A random change of an image; the flag of its name in Config is its strength."""

    draw: Callable[[Array, float], Array]  # uniform in [0, 1) (B,), strength: parameters (B,)
    warp: Callable[[Tensor], Tensor] | None = None  # parameters: (B, 2, 2), from output to input
    adjust: Callable[[Tensor, Tensor], Tensor] | None = None  # images, parameters (B, 1, 1, 1)


def symmetric(uniform: Array, strength: float) -> Array:
    """Return uniform numbers in [-strength, strength)."""
    return strength * (2 * uniform - 1)


def hflip_matrix(sign: Tensor) -> Tensor:
    """Return matrices that mirror left and right where the sign is -1."""
    return torch.diag_embed(torch.stack([sign, torch.ones_like(sign)], 1))


def rotation_matrix(degrees: Tensor) -> Tensor:
    """Return matrices that rotate about the centre."""
    angle = torch.deg2rad(degrees)
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)


def change_contrast(images: Tensor, change: Tensor) -> Tensor:
    """Return images whose distance from their own mean grows by the factor 1 + change."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (1 + change) + mean


AUGMENTATIONS = {  # in the order in which they are applied; each has a flag of the same name
    "hflip": Augmentation(lambda uniform, p: np.where(uniform < p, -1.0, 1.0), warp=hflip_matrix),
    "rotation": Augmentation(symmetric, warp=rotation_matrix),
    "contrast": Augmentation(symmetric, adjust=change_contrast),
    "brightness": Augmentation(symmetric, adjust=torch.add),
}


def draw_augmentation(config: Config, count: int, epoch: int, batch: int) -> Tensor:
    """Return the parameters of a batch's augmentation, (count, len(AUGMENTATIONS)) float32."""
    columns = []
    for name, augmentation in AUGMENTATIONS.items():
        uniform = random_stream(name, config.seed, epoch, batch).random(count)
        columns.append(augmentation.draw(uniform, getattr(config, name)))
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def augment(images: Tensor, parameters: Tensor) -> Tensor:
    """Return images (B, 1, S, S), 0 to 1, each augmented by its row of `draw_augmentation`."""
    matrix = torch.eye(2, device=images.device)
    steps = list(zip(AUGMENTATIONS.values(), parameters.unbind(1), strict=True))
    for augmentation, column in steps:
        if augmentation.warp:
            matrix = matrix @ augmentation.warp(column)
    matrix = functional.pad(matrix, (0, 1))  # no translation
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    images = functional.grid_sample(images, grid, align_corners=False)  # black outside
    for augmentation, column in steps:
        if augmentation.adjust:
            images = augmentation.adjust(images, column.view(-1, 1, 1, 1))
    return images.clamp(0, 1)


def draw_mixup(config: Config, epoch: int, batch: int) -> float:
    """Return mixup's lam, what an image keeps of itself, 1/2 to 1 (arXiv 1710.09412)."""
    if not config.mixup:
        return 1.0
    lam = float(random_stream("mixup", config.seed, epoch, batch).beta(config.mixup, config.mixup))
    return max(lam, 1 - lam)  # of two images mixed either way, the greater fraction is its own


@dataclass(frozen=True)
class Normalization:
    """Grey levels (0 to 1) to network input: three equal channels, (x - mean) / std."""

    kind: str  # --normalization; image is by each image's own mean and deviation
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of each channel, as in torchvision
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __call__(self, images: Tensor) -> Tensor:
        """Return (B, 3, S, S) of images (B, 1, S, S) float in 0..1."""
        if self.kind == "image":
            std, mean = torch.std_mean(images, (1, 2, 3), keepdim=True)
            scaled = (images - mean) / std.clamp(min=1 / 255)  # a blank image stays finite
            return scaled.expand(-1, 3, -1, -1)
        constants = torch.tensor([self.mean, self.std]).view(2, 3, 1, 1)
        mean, std = constants.to(images, non_blocking=True)
        return torch.div(images - mean, std)


def choose_normalization(kind: str, dataset: MuraDataset) -> Normalization:
    """Return that of --normalization; `dataset` measures up to 2,000 training images."""
    if kind in ("imagenet", "image"):
        return Normalization(kind)
    if kind == "dataset":
        chosen = np.arange(len(dataset))[:: -(-len(dataset) // 2000)]
        levels, counts = np.arange(256) / 255, np.zeros(256)
        for batch in split_batches(chosen, 64):
            counts += torch.bincount(dataset.batch(batch).flatten(), minlength=256).numpy()
        mean = float(np.average(levels, weights=counts))
        std = max(math.sqrt(np.average((levels - mean) ** 2, weights=counts)), 1 / 255)
    else:
        mean, std = map(float, kind.split(","))
    return Normalization(kind, (mean,) * 3, (std,) * 3)


# ===== 6 models ===================================================================================


@dataclass(frozen=True)
class Stage:
    """A part of a network: its layers, and where the cells of its output lie in the input."""

    layers: str  # names of submodules of the trunk, in order
    stride: int  # input pixels from one cell to the next
    offset: float  # input pixel at the centre of the first cell


@dataclass(frozen=True)
class Architecture:
    """How to build a torchvision classifier and cut it into stages, the last before pooling."""

    constructor: Callable[[], Any]
    trunk: str  # name of the submodule that holds the layers; "" is the classifier itself
    head: str  # name of its last linear layer
    stages: tuple[Stage, ...]


def build_densenet169() -> Any:
    """Return torchvision's DenseNet-169 (arXiv 1608.06993) whose pools round up.

    So it sees the border, too, where the side is no multiple of 32; else nothing changes.
    """
    network = torchvision.models.densenet169()
    for module in network.modules():
        if isinstance(module, nn.AvgPool2d):
            module.ceil_mode = True
    return network


# By torchvision's names, which are the choices of --model; each has four stages, of CAM_METHODS.
# A cell's centre follows from strides and padding: 0, 2, 6, 14 in DenseNet-169. In ResNet-50 it
# is 0, but what cells see lies 1 to 5 px right of and below it, as tests/benchmark_cam.py measures.
ARCHITECTURES = {
    "densenet169": Architecture(  # relu0 stands for torchvision's functional ReLU
        build_densenet169, "features", "classifier", (
            Stage("conv0 norm0 relu0 pool0 denseblock1 transition1.norm transition1.relu", 4, 0),
            Stage("transition1.conv transition1.pool denseblock2 transition2.norm "
                  "transition2.relu", 8, 2),
            Stage("transition2.conv transition2.pool denseblock3 transition3.norm "
                  "transition3.relu", 16, 6),
            Stage("transition3.conv transition3.pool denseblock4 norm5 relu0", 32, 14),
        )),
    "resnet50": Architecture(  # arXiv 1512.03385; each residual branch starts at zero
        partial(torchvision.models.resnet50, zero_init_residual=True), "", "fc", (
            Stage("conv1 bn1 relu maxpool layer1", 4, 1),
            Stage("layer2", 8, 3),
            Stage("layer3", 16, 4),
            Stage("layer4", 32, 5),
        )),
}


class Network(nn.Module):
    """A torchvision classifier cut into stages, then mean pooling and one linear unit; no hooks."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.architecture = name, ARCHITECTURES[name]
        source = self.architecture.constructor()
        width = source.get_submodule(self.architecture.head).in_features
        parent, _, leaf = self.architecture.head.rpartition(".")
        setattr(source.get_submodule(parent), leaf, nn.Identity())
        self.backbone = source.get_submodule(self.architecture.trunk)
        self.head = nn.Linear(width, 1)

    def run_stage(self, stage: Stage, features: Tensor) -> Tensor:
        """Return a stage's output (B, C, h, w) from that of the stage before it."""
        for layer in stage.layers.split():
            features = self.backbone.get_submodule(layer)(features)
        return features

    def shift_last_stage(self, features: Tensor) -> Sequence[Tensor]:
        """Return the last stage's outputs (B, C, h, w) for its input shifted by a cell.

        Left, up, and both: stitched to that of its input as it is (see `stitch`) they have twice
        the cells (arXiv 1411.4038, section 3.2).
        """
        inputs = [functional.pad(features, (0, right, 0, down), "replicate")[..., down:, right:]
                  for down, right in ((0, 1), (1, 0), (1, 1))]
        return self.run_stage(self.architecture.stages[-1], torch.cat(inputs)).chunk(3)

    def classify(self, features: Tensor) -> Tensor:
        """Return logits (B,) of the last stage's output; in fp32 also under autocast."""
        return (features.float().mean((2, 3)) * self.head.weight[0]).sum(1) + self.head.bias

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B,), positive for abnormal, of normalised images (B, 3, S, S)."""
        for stage in self.architecture.stages:
            images = self.run_stage(stage, images)
        return self.classify(images)


def imagenet_weights(name: str) -> Content:
    """Return torchvision's ImageNet weights; UserError without a network, with the remedy."""
    source = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    show = sys.stderr.isatty() and is_main_process()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # of what it tells
            return dict(source.get_state_dict(progress=show, check_hash=True, weights_only=True))
    except Exception as error:  # urllib, socket, hash and file errors, all with the same remedy
        file = Path(torch.hub.get_dir()) / "checkpoints" / source.url.rpartition("/")[2]
        reason, *_ = f"{type(error).__name__}: {error}".splitlines()
        raise UserError(
            f"the ImageNet weights of {name} are not available ({reason}); fetch {source.url} "
            f"elsewhere and put it at {file}, or give --weights FILE, or --weights none",
            EXIT_FAILED) from error


def load_backbone(network: Network, content: Content, source: str) -> None:
    """Load the backbone from a state_dict of torchvision or timm; UserError where it does not fit.

    Nesting as by Lightning ({"state_dict": ...}) and prefixes as by DataParallel ("module.") are
    looked through; the classifier is left out.
    """
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    # names in files from before torch 0.4 ("norm.1"), which torchvision still distributes
    dotted = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
    given = {dotted.sub(r"\1\2", str(key)): value for key, value in content.items()}
    wanted = network.backbone.state_dict()
    names = [f"{network.architecture.trunk}.{key}".strip(".") for key in wanted]
    firsts = [key for key in given if f".{key}".endswith(f".{names[0]}")]
    prefix = min(firsts, key=len, default="").removesuffix(names[0])
    found = {}
    for (key, value), name in zip(wanted.items(), names, strict=True):
        uncounted = value if key.endswith("num_batches_tracked") else None  # old files lack it
        found[key] = given.get(prefix + name, uncounted)
    wrong = [key for key in wanted if getattr(found[key], "shape", None) != wanted[key].shape]
    if wrong:
        misfit = f"{len(wrong)} of {len(wanted)} tensors are missing or of another shape"
        raise UserError(f"--weights {source}: {explain_misfit(network.name, given, misfit)}")
    require_finite(found, f"--weights {source}")
    network.backbone.load_state_dict(found)


def explain_misfit(name: str, given: Iterable[str], misfit: str) -> str:
    """Return why tensors of these names are not a backbone's, and what to do about it."""
    numbered = re.compile(r"(\D+\.)?0\.(\w+\.)?weight")
    if any(numbered.fullmatch(key) for key in given):
        return ("its layers are numbered, as in an nn.Sequential, so it is not known which is "
                f"which; save a {name}'s own state_dict")
    return (f"does not fit {name} ({misfit}); give weights of torchvision or timm for it, or the "
            "--model that they are of")


def require_finite(tensors: Content, source: str) -> None:
    """Refuse weights that hold NaN or infinity, in one line that names the tensor."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{source}: {name} holds numbers that are not finite; use another file")


@dataclass(frozen=True)
class DevicePrecision:
    """Where and how a network is computed."""

    device: torch.device
    precision: str  # bf16 and fp16 are of convolutions and products only, the loss stays in fp32
    order: torch.memory_format = torch.contiguous_format

    def prepare(self, network: Network) -> Network:
        """Return the network on the device, in the memory order of choice."""
        return network.to(self.device).to(memory_format=self.order)

    def autocast(self) -> torch.autocast:
        """Return the context in which the network is to be called."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, half, enabled=half is not None)

    def __str__(self) -> str:
        name = f"{torch.get_num_threads()} threads"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        return f"{self.device} ({name}), {self.precision}"


CPU = DevicePrecision(torch.device("cpu"), "fp32")  # for --export, which wants plain order


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device: CUDA, then MPS, then CPU for `auto`; each torchrun process has its own."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = [f"cuda:{index}" for index in range(cards)]
    available += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    kind = available[0].removesuffix(":0") if name == "auto" else name
    found = f"cuda:{local_rank}" if kind == "cuda" else kind
    if found not in available:
        raise UserError(f"--device {name}: there is no such device here ({cards} CUDA devices); "
                        "use --device auto or cpu")
    return torch.device(found)


def choose_precision(device: torch.device, precision: str) -> DevicePrecision:
    """Return how a device is to compute; UserError where tf32 has no CUDA device."""
    if precision == "auto":
        precision = auto_precision(device)
    if precision not in ("bf16", "fp16", "tf32", "fp32"):
        raise UserError(f"--precision {precision}: is none of auto, bf16, fp16, tf32, fp32")
    if device.type == "cuda":
        use_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = use_tf32
    elif precision == "tf32":
        raise UserError(f"--precision tf32: needs a CUDA device, this is {device.type}; use auto "
                        "or fp32")
    order = torch.contiguous_format if device.type == "mps" else torch.channels_last
    return DevicePrecision(device, precision, order)


def auto_precision(device: torch.device) -> str:
    """Return the precision that a device gains from: half where it has units for it, else fp32."""
    if device.type == "cuda":
        capability, _ = torch.cuda.get_device_capability(device)  # tensor cores from 7 on
        return "bf16" if capability >= 8 else "fp16" if capability == 7 else "fp32"
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    has_amx = cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text().split()
    return "bf16" if device.type == "cpu" and has_amx else "fp32"  # slower without AMX: measured


CamRule = Callable[[Tensor, Tensor], Tensor]  # activations, gradients (B, C, h, w): (B, h, w)


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return the sum over channels of mean gradient x activation, times h w (arXiv 1610.02391).

    Times h w its unit is that of the logit: its mean is the logit less the bias. Not clipped yet.
    """
    return (gradients.sum((2, 3), keepdim=True) * activations).sum(1)


def grad_cam_above_chance(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return Grad-CAM's sum over channels, less 1.5 standard deviations of that by chance.

    Chance is a random sign for each channel: what a head that has learnt nothing finds, or one
    whose weights were reset (sanity check, arXiv 1810.03292), is within them nearly everywhere.
    """
    contributions = gradients.sum((2, 3), keepdim=True) * activations
    return contributions.sum(1) - 1.5 * contributions.square().sum(1).sqrt()


def layer_cam(activations: Tensor, gradients: Tensor, negative: float = 0.0) -> Tensor:
    """Return the sum over channels of relu(gradient) x activation (10.1109/TIP.2021.3089943).

    Negative gradients count by the fraction `negative`: with 1 this is HiResCAM (arXiv 2011.08891).
    """
    weights = functional.leaky_relu(gradients, negative)
    return (weights * activations).sum(1)


@dataclass(frozen=True)
class CamMethod:
    """A class activation map: the product of maps of several stages, or one stage's map.

    Each map is placed cell by cell (the last stage has two for one, see `shift_last_stage`),
    averaged over flips and only then clipped at 0, so that what speaks for and against the class
    nearby cancels. The product's peak is the calibrated log odds of the explained class above the
    threshold, and it is 0 where that class was not predicted. A `classical` map is clipped first,
    enlarged bilinearly, and in logits by itself.
    """

    terms: tuple[tuple[int, CamRule], ...]  # stage and rule of each map
    unit: str = "peak: log odds above the threshold"
    classical: bool = False


CAM_METHODS = {  # the choices of --cam; why `fine` is this product: tests/BENCHMARKS.md
    "fine": CamMethod((
        (0, layer_cam), (1, partial(layer_cam, negative=0.5)),
        (2, partial(layer_cam, negative=0.5)), (3, grad_cam_above_chance))),
    "gradcam": CamMethod(((3, grad_cam),), "logits", classical=True),
}


@torch.no_grad()
def stage_maps(
    network: Network, images: Tensor, method: CamMethod, sign: float
) -> tuple[Tensor, Tensor]:
    """Return logits (B,) and the map of each term of a method on the pixels, (terms, B, S, S).

    One backward pass, back to the method's finest stage and no further, and not to weights.

    Args:
        network: in evaluation mode.
        images: normalised, (B, 3, S, S).
        method: of CAM_METHODS.
        sign: 1 explains "abnormal", -1 "normal".
    """
    stages, side = network.architecture.stages, images.shape[-1]
    first, last = min(index for index, _ in method.terms), len(stages) - 1
    outputs = [images]
    for index, stage in enumerate(stages):
        with torch.set_grad_enabled(index > first):
            outputs.append(network.run_stage(stage, outputs[-1]))
        if index == first:
            outputs[-1].requires_grad_()
    with torch.enable_grad():
        logits = network.classify(outputs[-1])
        gradients = torch.autograd.grad(sign * logits.sum(), outputs[first + 1 :])
    maps = []
    for index, rule in method.terms:
        stage, gradient = stages[index], gradients[index - first].float()
        if index == last and not method.classical:
            shifted = outputs[-1], *network.shift_last_stage(outputs[last])
            found = stitch(torch.stack([rule(output.float(), gradient) for output in shifted]))
            stage = replace(stage, stride=stage.stride // 2)
        else:
            found = rule(outputs[index + 1].float(), gradient)
        placed = enlarge(found.relu(), side) if method.classical else enlarge(found, side, stage)
        maps.append(placed)
    return logits.detach(), torch.stack(maps)


def stitch(maps: Tensor) -> Tensor:
    """Return maps (4, B, h, w) with their cells side by side, (B, 2h, 2w)."""
    return functional.pixel_shuffle(maps.transpose(0, 1), 2)[:, 0]


def enlarge(maps: Tensor, side: int, stage: Stage | None = None) -> Tensor:
    """Return maps (B, h, w) on the input's pixels, (B, side, side).

    With a stage each cell is spread around its place by a Gaussian of 0.6 cells, but of at least
    1/56 of the side, as finer heat is grain; without, bilinearly and as if cells covered the image.
    """
    if not stage:
        return functional.interpolate(maps[:, None], (side, side), mode="bilinear")[:, 0]
    positions = (torch.arange(side, device=maps.device) - stage.offset) / stage.stride
    spread = max(0.6, side / 56 / stage.stride)
    weights = []
    for count in maps.shape[1:]:  # beyond the outer cells the map stays as it is
        cells = torch.arange(count, device=maps.device)
        distance = positions.clamp(0, count - 1)[:, None] - cells
        weights.append((-0.5 * (distance / spread) ** 2).softmax(1))
    rows, columns = weights
    return rows @ maps @ columns.T


def peak_of_one(maps: Tensor) -> Tensor:
    """Return maps (..., H, W) clipped at 0 and scaled to a maximum of 1; NaN and infinity are 0."""
    maps = maps.nan_to_num(0, 0, 0).relu()
    return maps / maps.amax((-2, -1), keepdim=True).clamp(min=1e-30)


def class_activation_map(
    network: Network, images: Tensor, method: CamMethod, sign: float, *, tta: bool = False
) -> tuple[Tensor, Tensor]:
    """Return logits (B,) and heatmaps (B, S, S) of images (B, 3, S, S); see `stage_maps`.

    With `tta` logits and terms are the means of those of the images and of their horizontal flips.
    """
    logits, maps = stage_maps(network, images, method, sign)
    if tta:
        flipped_logits, flipped = stage_maps(network, images.flip(3), method, sign)
        logits, maps = (logits + flipped_logits) / 2, (maps + flipped.flip(3)) / 2
    return logits, maps[0] if method.classical else peak_of_one(peak_of_one(maps).prod(0))


def resize_map(heat: Array, height: int, width: int) -> Array:
    """Return a map (h, w) enlarged or reduced bilinearly to (height, width)."""
    tensor = torch.from_numpy(np.ascontiguousarray(heat, np.float32))[None, None]
    return functional.interpolate(tensor, (height, width), mode="bilinear")[0, 0].numpy()


def log_odds_above(probability: float, threshold: float) -> float:
    """Return how far a probability is above the threshold, as a difference of log odds."""
    p, t = to_logits(np.array([probability, threshold]).clip(1e-6, 1 - 1e-6))
    return float(p - t)


def strongest_region(heat: Array) -> Box | None:
    """Return the box of what hangs together with the peak above half of it; None of a cold map."""
    if not heat.max() > 0:
        return None
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    mask = Image.fromarray((heat >= heat.max() / 2).astype(np.uint8)).copy()  # writable
    ImageDraw.floodfill(mask, (int(x), int(y)), 2)
    return mask.point(lambda value: value == 2).getbbox()


@dataclass(frozen=True)
class LoadedModel:
    """A trained model with all that prediction needs; each keeps its own preprocessing."""

    path: Path
    network: Network
    normalization: Normalization
    image_size: int
    resize: str
    tta: bool  # the logit is the mean of those of the image and of its horizontal flip
    temperature: float = 1.0  # of an image's logit
    study_temperature: float = 1.0  # of a study's, see `pool_studies`
    threshold: float = 0.5
    threshold_source: str = "default"
    bad_images: int = 0  # of the training set, that could not be read
    body_parts: tuple[str, ...] = ()  # of the training set
    patients: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of train and val

    @property
    def resizing(self) -> Resizing:
        """What its input is resized to, and how."""
        return self.image_size, self.resize

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B,) of grey images (B, 1, S, S), 0 to 1."""
        inputs = self.normalization(images)
        logits: Tensor = self.network(inputs)
        return (logits + self.network(inputs.flip(3))) / 2 if self.tta else logits


STORED = (  # fields of LoadedModel that STEM.pth holds as they are
    "image_size resize tta temperature study_temperature threshold threshold_source bad_images "
    "body_parts patients").split()


def load_model(path: Path, hardware: DevicePrecision, tta: bool | None = None) -> LoadedModel:
    """Return a model of this program, ready to predict; `tta` overrules the model's own."""
    content = read_checkpoint(path, "model")
    try:
        with torch.device("meta"):  # no time spent on random weights
            network = Network(content["model"])
        network.load_state_dict(content["state_dict"], assign=True)
        normalization = Normalization(**content["normalization"])
        values = {name: content[name] for name in STORED}
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: written by another version of this program "
                        f"({content.get('version')}); train again") from error
    numbers = {name: torch.tensor(float(values[name])) for name in
               ("temperature", "study_temperature", "threshold")}
    require_finite(network.state_dict() | numbers, str(path))
    if tta is not None:
        values["tta"] = tta
    network = hardware.prepare(network).eval().requires_grad_(False)
    return LoadedModel(path, network, normalization, **values)


@dataclass(frozen=True)
class Ensemble:
    """The one way from pixels to answers: one or more models, whose probabilities are averaged.

    Validation, test, --evaluate, --predict and the Python API all come through here.
    """

    models: Sequence[LoadedModel]  # their networks are on the device of `hardware`
    hardware: DevicePrecision

    @property
    def study_temperature(self) -> float:
        """The geometric mean of the models' temperatures of studies."""
        return float(np.exp(np.mean([math.log(model.study_temperature) for model in self.models])))

    def logits(self, images: Sequence[Tensor]) -> Tensor:
        """Return logits (members, B) of a batch, given for each model as (B, 1, S, S) uint8."""
        with torch.inference_mode(), self.hardware.autocast():
            pairs = zip(self.models, images, strict=True)
            return torch.stack([model.logits(to_unit(batch)) for model, batch in pairs])

    def probabilities(self, logits: Array) -> Floats:
        """Return the members' calibrated probabilities of abnormal, (members, N).

        NaN where a logit is not finite: that of infinity would be a confident class.
        """
        temperatures = np.array([[model.temperature] for model in self.models])
        return np.where(np.isfinite(logits), sigmoid(logits / temperatures), np.nan)

    def explain(
        self, images: Sequence[Tensor], method: CamMethod, sign: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the logits (members, B) of a batch, and each member's heatmaps (B, S, S).

        Args:
            images: as of `logits`.
            method: of CAM_METHODS.
            sign: 1 explains "abnormal", -1 "normal".
        """
        rows, maps = [], []
        for model, batch in zip(self.models, images, strict=True):
            inputs = model.normalization(to_unit(batch))
            with self.hardware.autocast():
                logits, heat = class_activation_map(
                    model.network, inputs, method, sign, tta=model.tta)
            rows.append(logits)
            maps.append(heat / (model.temperature if method.classical else 1))
        return torch.stack(rows), maps

    def predict_dataset(
        self, datasets: Sequence[MuraDataset], batch_size: int, distributed: Distributed,
        update: Callable[[int], object],
    ) -> Array:
        """Return the logits (members, N) of a data set, which each model has in its own size.

        `batch_size` images at a time are shared out to all processes; `update` is called with the
        number of images that are done.
        """
        count, device = len(datasets[0]), self.hardware.device
        per_process = max(1, batch_size // distributed.world_size)
        batches = split_batches(np.arange(count), per_process)
        mine = batches[distributed.rank :: distributed.world_size]
        results: list[Tensor] = []
        for images in zip(*(load_batches(d, mine, device) for d in datasets), strict=True):
            results.append(self.logits(images))
            update(len(images[0]))
        # fetched at the end: fetching makes the device wait
        found = distributed.gather([logits.cpu().double().numpy() for logits in results])
        return np.concatenate(found, axis=1)


# ===== 7 metrics ==================================================================================

ECE_BINS = 15  # equal-width bins of the probability of abnormal (Guo et al. 2017, arXiv 1706.04599)
TAIL = 0.025  # left out at each end of an interval: 95 %
MIN_STUDIES = 10  # in each group of cases that a metric rests on; below, no interval
JACKKNIFE_GROUPS = 200  # groups of patients left out in turn; more only sharpen a small correction
CHUNK = 2**19  # weights held at once (4 MB), whatever the number of images and resamples
TEMPERATURES = np.geomspace(0.05, 20, 300)  # steps of 2 %, below its standard error
FOLDS = 5  # of patients, to see whether a temperature pays
MIN_PATIENTS = 20  # below this, four patients a fold, cross-validation tells nothing
INTERVAL_NOTE = (
    "Intervals: 95 %, bootstrap over patients (BCa; exact where no error was seen). Resamples in "
    f"which a metric is undefined are dropped. There is no interval where fewer than {MIN_STUDIES} "
    "studies of a class (for PPV and NPV: with that prediction) stand behind a metric, or where it "
    "does not vary. That of ECE covers less below about 100 patients.")


@dataclass(frozen=True)
class Predictions:
    """Labels and probabilities of N images, or of N studies once pooled; each field has N."""

    path: Array  # of the image, or of the study
    body_part: Array  # "XR_ELBOW"
    patient: Array  # the unit that is resampled
    study: Array  # path of the study, unique across body parts
    label: Array  # 1 = abnormal
    probability: Floats  # of abnormal

    def take(self, rows: Array) -> Predictions:
        """Return the given rows: (K,) integers, or a mask (N,)."""
        return Predictions(**{name: column[rows] for name, column in vars(self).items()})


def sigmoid(logits: Floats) -> Floats:
    """Return probabilities of abnormal."""
    return 0.5 * (1 + np.tanh(0.5 * logits))  # 1 / (1 + exp(-x)) without overflow


def to_logits(probability: Floats) -> Floats:
    """Return log(p / (1 - p)), finite for 0 and 1 too."""
    inside = np.clip(probability, 1e-300, 1 - 1e-16)
    return np.log(inside) - np.log1p(-inside)


def correct_prevalence(probability: Floats, prevalence: float) -> Floats:
    """Return the probabilities of a balanced model, corrected for a fraction of abnormal cases.

    The loss weighs both classes alike, so that the model's odds are those among as many normal as
    abnormal cases. By Bayes' rule the odds in use are p / (1 - p) * prevalence / (1 - prevalence).

    >>> float(correct_prevalence(np.array([0.5]), 0.25)[0])  # odds of 1 to 3
    0.25
    """
    abnormal, normal = probability * prevalence, (1 - probability) * (1 - prevalence)
    return abnormal / (abnormal + normal)


def pool_views(views: Sequence[float] | Floats, temperature: float = 1.0) -> float:
    """Return the probability of a study: the mean over its views, then the study temperature T.

    Views that err independently tell more together than their mean does. The logit of the mean of
    n views is divided by T + (1 - T) / n: T is 1 where all views err alike, 0 where each errs by
    itself (design effect of n correlated measurements, Kish 1965). One view stays as it is, and so
    does 0.5, at which the paper decides. T = 1 gives the plain mean (arXiv 1712.06957, section 3).
    """
    mean: Floats = np.mean(views, keepdims=True)
    divisor = study_divisor(temperature, len(views))
    return float(mean[0] if divisor == 1 else sigmoid(to_logits(mean) / divisor)[0])


def study_divisor(temperature: float | Floats, views: Array | float) -> Floats:
    """Return T + (1 - T) / views, exactly 1 for one view or T = 1; T for infinitely many views."""
    return np.asarray(1 - (1 - temperature) * (1 - 1 / views))


def pool_studies(images: Predictions, temperature: float = 1.0) -> Predictions:
    """Return the studies of these images, in order of first appearance; see `pool_views`.

    >>> pair = [np.array([x, x]) for x in ("image", "XR_HAND", "patient1", "study1", 1)]
    >>> images = Predictions(*pair, np.array([0.2, 0.6]))
    >>> pool_studies(images).probability.tolist()
    [0.4]
    """
    views = defaultdict(list)
    for row, study in enumerate(images.study.tolist()):
        views[study].append(row)
    studies = images.take(np.array([rows[0] for rows in views.values()]))
    pooled = [pool_views(images.probability[rows], temperature) for rows in views.values()]
    return replace(studies, path=studies.study, probability=np.array(pooled))


class Counts:
    """Weighted counts of cases in R resamples; every metric is a function of them.

    Each row of weights (R, N) says how often each of the N cases counts; without, R is 1 and each
    counts once. A curve (R, K + 1) has a column for each threshold: above all cases, then at the k
    highest distinct probabilities, each included.
    """

    def __init__(
        self, rows: Predictions, threshold: float, weight: Floats | None = None,
        prevalence: float | None = None,
    ) -> None:
        label, probability = rows.label, rows.probability
        weight = np.ones((1, len(label))) if weight is None else weight
        order = np.argsort(-probability)
        ends = np.flatnonzero(np.diff(probability[order], append=-1))  # of ties
        above = np.zeros((2, len(weight), len(ends) + 1))
        for curve, chosen in zip(above, (label, 1 - label), strict=True):
            curve[:, 1:] = np.cumsum((weight * chosen)[:, order], axis=1)[:, ends]
        predicted = np.sum(probability[order][ends] > threshold)
        (self.tp, self.fp), (abnormal, normal) = above[..., predicted], above[..., -1]
        self.fn, self.tn, self.total = abnormal - self.tp, normal - self.fp, abnormal + normal
        self.tp_curve, self.fp_curve = above
        self.tn_curve = normal[:, None] - self.fp_curve
        gap = label - probability
        self.squared_error = weight @ gap**2
        bins = np.minimum((probability * ECE_BINS).astype(int), ECE_BINS - 1)
        self.gaps = weight @ (gap[:, None] * (bins[:, None] == np.arange(ECE_BINS)))
        odds = prevalence / (1 - prevalence) if prevalence else math.nan
        self.odds = ratio(normal, abnormal) * odds  # what an abnormal case counts there


def ratio(part: Floats, whole: Floats) -> Floats:
    """Return part / whole, NaN where the whole is zero."""
    undefined = np.full(part.shape, np.nan)
    quotient: Floats = np.divide(part, whole, out=undefined, where=whole > 0)
    return quotient


def auroc(c: Counts) -> Floats:
    """Return the area under the ROC curve, ties counting half (Hanley & McNeil 1982)."""
    twice = (np.diff(c.fp_curve) * (c.tp_curve[:, 1:] + c.tp_curve[:, :-1])).sum(axis=1)
    return ratio(twice / 2, c.tp_curve[:, -1] * c.fp_curve[:, -1])


def average_precision(c: Counts) -> Floats:
    """Return the precision averaged over the steps of recall, not interpolated."""
    precision = c.tp_curve / np.maximum(c.tp_curve + c.fp_curve, 1e-300)
    return ratio((np.diff(c.tp_curve) * precision[:, 1:]).sum(axis=1), c.tp_curve[:, -1])


def cohen_kappa(tp: Floats, fp: Floats, fn: Floats, tn: Floats) -> Floats:
    """Return agreement beyond chance (Cohen 1960); NaN where chance alone agrees fully."""
    total = tp + fp + fn + tn
    chance = (tp + fp) * (tp + fn) + (tn + fn) * (tn + fp)
    return ratio(total * (tp + tn) - chance, total**2 - chance)


def best_rate(free: Floats, kept: Floats, at_least: float) -> Floats:
    """Return the highest rate of `free` at a threshold where that of `kept` is `at_least` so high.

    Both are curves of counts (R, K + 1). Only thresholds between cases count: no interpolation.
    """
    whole = kept.max(axis=1, keepdims=True)
    allowed = kept / np.maximum(whole, 1e-300) >= at_least
    return ratio((free * allowed).max(axis=1), free.max(axis=1) * (whole[:, 0] > 0))


def bca_interval(value: float, drawn: Floats, left_out: Floats, patients: int) -> Floats:
    """Return the bias-corrected and accelerated bootstrap interval (BCa; Efron 1987) of a metric.

    Plain percentiles cover too little near 1 and in small samples. BCa takes the bias from the
    resamples `drawn` and the skew from the jackknife `left_out`; its normal quantiles are widened
    to Student's t with n - 1 degrees of freedom, times sqrt(n / (n - 1)), for n patients
    (Hesterberg 2015, arXiv 1411.5279).
    """
    normal, n = NormalDist(), patients
    edge = normal.inv_cdf(1 - TAIL)
    edge *= (1 + (edge**2 + 1) / (4 * (n - 1))) * (n / (n - 1)) ** 0.5
    below = np.mean(drawn < value) + np.mean(drawn == value) / 2
    bias = normal.inv_cdf(float(np.clip(below, 0.5 / len(drawn), 1 - 0.5 / len(drawn))))
    pull = left_out.mean() - left_out
    skew = float((pull**3).sum() / max(6 * (pull**2).sum() ** 1.5, 1e-300))
    levels = [normal.cdf(bias + z / max(1 - skew * z, 1e-3)) for z in (bias - edge, bias + edge)]
    return np.quantile(drawn, levels)


def ece_interval(value: float, drawn: Floats, left_out: Floats, patients: int) -> Floats:
    """Return the interval of ECE, an average of absolute gaps, which noise can only raise.

    It is raised in the sample and once more in each resample. Where all of the gap is noise,
    resampling raises it by the factor sqrt(2): the bias lies between 0 and rise / (sqrt(2) - 1),
    and each end takes the bound safe for it. From about 100 patients on it covers 95 %; below, bins
    of one or two cases hide the noise (83 % with 30 patients).
    """
    rise = max(0.0, drawn.mean() - value)
    low, high = np.quantile(drawn, [TAIL, 1 - TAIL]) - rise
    return np.array([max(0.0, low - rise / (2**0.5 - 1)), high])


@dataclass(frozen=True)
class Metric:
    """One metric; report, intervals and terminal text follow from its entry in METRICS."""

    heading: str
    function: Callable[[Counts], Floats]  # value in each resample (R,), NaN where undefined
    groups: tuple[str, ...] = ("abnormal", "normal")  # of cases, that it rests on: see group_sizes
    bounds: tuple[float, float] = (0.0, 1.0)  # its worst and its best value
    interval: Callable[[float, Floats, Floats, int], Floats] = bca_interval
    at_prevalence: bool = False  # of the classes mixed as --prevalence says, where that is given


METRICS = {
    "auroc": Metric("AUROC", auroc),
    "kappa": Metric(
        "kappa", lambda c: cohen_kappa(c.tp, c.fp, c.fn, c.tn), bounds=(-1.0, 1.0)),
    "sensitivity": Metric(
        "sensitivity", lambda c: ratio(c.tp, c.tp + c.fn), groups=("abnormal",)),
    "specificity": Metric(
        "specificity", lambda c: ratio(c.tn, c.tn + c.fp), groups=("normal",)),
    "accuracy": Metric("accuracy", lambda c: ratio(c.tp + c.tn, c.total), groups=("all",)),
    "f1": Metric("F1", lambda c: ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn)),
    "ppv": Metric("PPV", lambda c: ratio(c.tp, c.tp + c.fp), groups=("predicted abnormal",)),
    "npv": Metric("NPV", lambda c: ratio(c.tn, c.tn + c.fn), groups=("predicted normal",)),
    "ppv_at_prevalence": Metric(
        "PPV at prevalence",
        lambda c: ratio(c.odds * c.tp, c.odds * c.tp + c.fp), at_prevalence=True),
    "npv_at_prevalence": Metric(
        "NPV at prevalence", lambda c: ratio(c.tn, c.tn + c.odds * c.fn), at_prevalence=True),
    "average_precision": Metric("average precision", average_precision),
    "sensitivity_at_specificity_90": Metric(
        "sensitivity at specificity 0.90",
        lambda c: best_rate(c.tp_curve, c.tn_curve, 0.90)),
    "sensitivity_at_specificity_95": Metric(
        "sensitivity at specificity 0.95",
        lambda c: best_rate(c.tp_curve, c.tn_curve, 0.95)),
    "specificity_at_sensitivity_90": Metric(
        "specificity at sensitivity 0.90",
        lambda c: best_rate(c.tn_curve, c.tp_curve, 0.90)),
    "specificity_at_sensitivity_95": Metric(
        "specificity at sensitivity 0.95",
        lambda c: best_rate(c.tn_curve, c.tp_curve, 0.95)),
    "brier": Metric(
        "Brier score", lambda c: ratio(c.squared_error, c.total),
        groups=("all",)),
    "ece": Metric(
        "ECE", lambda c: ratio(np.abs(c.gaps).sum(axis=1), c.total),
        groups=("all",), interval=ece_interval),
}
HEADLINE = ("auroc", "kappa", "sensitivity", "specificity")  # of body parts and of comparisons


def compute_metrics(
    rows: Predictions, threshold: float, weight: Floats | None = None,
    prevalence: float | None = None,
) -> dict[str, Floats]:
    """Return every metric for each row of weights, (R,), NaN where undefined; see `Counts`.

    Abnormal means probability > threshold (the paper's 'above 0.5'). ECE compares the mean
    probability of abnormal with the observed frequency in bins k / 15 <= p < (k + 1) / 15, of which
    the last has 1.0 too. A prevalence adds the metrics `at_prevalence`.

    >>> names = np.array(["a", "b", "c"])
    >>> label, probability = np.array([0, 1, 1]), np.array([0.2, 0.4, 0.9])
    >>> found = compute_metrics(Predictions(*[names] * 4, label, probability), threshold=0.5)
    >>> float(found["sensitivity"][0])
    0.5
    """
    counts = Counts(rows, threshold, weight, prevalence)
    return {
        name: metric.function(counts) for name, metric in METRICS.items()
        if prevalence or not metric.at_prevalence
    }


@dataclass(frozen=True)
class Evaluation:
    """How predictions become metrics with intervals."""

    threshold: float  # abnormal is above it, for images as for studies
    resamples: int = 1000  # of the patients, for the 95 % intervals
    seed: int = 0  # of the resamples
    prevalence: float | None = None  # of abnormal cases where the model is to be used

    def report(self, images: Predictions, study_temperature: float = 1.0) -> Content:
        """Return `prevalence`, `levels` and `body_parts.PART` of the report, see `levels`."""
        parts = {}
        for part in np.unique(images.body_part).tolist():
            chosen = images.take(images.body_part == part)
            parts[part] = self.levels(chosen, study_temperature)
        levels = self.levels(images, study_temperature)
        return {"prevalence": self.prevalence, "levels": levels, "body_parts": parts}

    def levels(self, images: Predictions, study_temperature: float) -> Content:
        """Return for `image` and `study` their numbers, and every metric as `with_interval` does.

        Probabilities are calibrated; for the temperature see `pool_views`.
        """
        levels = {}
        for name, rows in (("image", images), ("study", pool_studies(images, study_temperature))):
            sizes, values = self.group_sizes(rows), self.resample(rows)
            levels[name] = {
                "count": len(rows.label), "positives": int(rows.label.sum()),
                "patients": sizes["all"][0],
                **{k: self.with_interval(METRICS[k], v, sizes) for k, v in values.items()}}
        return levels

    def compare(self, reference: Predictions, other: Predictions) -> Content:
        """Return other - reference in each headline metric, as `with_interval` does, paired.

        They are the same studies in the same order, as two models see them.
        """
        first, second = self.resample(reference), self.resample(other)
        sizes, differences = self.group_sizes(reference), {}
        for name in HEADLINE:
            metric = replace(METRICS[name], bounds=(-2.0, 2.0))
            differences[name] = self.with_interval(metric, second[name] - first[name], sizes)
        return differences

    def resample(self, rows: Predictions) -> dict[str, Floats]:
        """Return every metric as it is, in R resamples of patients, and without G groups of them.

        A patient brings all images or studies. Patients are drawn in the order of their names, so
        the order of the rows does not matter, and two models get the same resamples.

        Returns:
            metric: (1 + R + G,)
        """
        names, patient = np.unique(rows.patient, return_inverse=True)
        n, random = len(names), np.random.default_rng(self.seed)
        drawn = [
            np.bincount(random.integers(n, size=n), minlength=n) for _ in range(self.resamples)]
        group = np.arange(min(n, JACKKNIFE_GROUPS))[:, None]
        left = np.arange(n) % len(group) != group
        weight = np.vstack([np.ones(n), *drawn, left]).astype(np.int16)
        found = [
            compute_metrics(
                rows, self.threshold, chunk[:, patient].astype(float), self.prevalence)
            for chunk in np.array_split(weight, -(-len(weight) * len(patient) // CHUNK))
        ]
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def group_sizes(self, rows: Predictions) -> dict[str, tuple[int, int]]:
        """Return the numbers of patients and of studies in each group that a metric may rest on."""
        predicted = rows.probability > self.threshold
        groups = {
            "all": rows.label >= 0, "abnormal": rows.label == 1, "normal": rows.label == 0,
            "predicted abnormal": predicted, "predicted normal": ~predicted}
        return {
            name: (len(np.unique(rows.patient[chosen])), len(np.unique(rows.study[chosen])))
            for name, chosen in groups.items()
        }

    def with_interval(
        self, metric: Metric, values: Floats, sizes: Mapping[str, tuple[int, int]]
    ) -> dict[str, float | None]:
        """Return {"value", "low", "high"}, None where undefined; see INTERVAL_NOTE.

        A faultless value is faultless in every resample: its interval is the exact one, up to the
        error rate that stays unseen in so many patients with a chance of 2.5 % (Clopper & Pearson
        1934). For the values see `resample`.
        """
        value, (drawn, left_out) = float(values[0]), np.split(values[1:], [self.resamples])
        defined, left_out = drawn[np.isfinite(drawn)], left_out[np.isfinite(left_out)]
        patients, studies = np.min([sizes[name] for name in metric.groups], axis=0)
        enough = studies >= MIN_STUDIES and len(left_out)
        exact = value in metric.bounds and not metric.at_prevalence
        if not enough or not (exact or np.ptp(defined) > 1e-9):
            return {"value": None if math.isnan(value) else value, "low": None, "high": None}
        unseen = 1 - TAIL ** (1 / patients) if exact else 0.0
        ends = metric.interval(value, defined, left_out, sizes["all"][0])
        ends = np.append(ends, [value - unseen, value + unseen]).clip(*metric.bounds)
        return {"value": value, "low": float(ends.min()), "high": float(ends.max())}


def fit_temperature(
    logits: Floats, label: Array, patient: Array, views: Array | float = math.inf
) -> float:
    """Return the temperature T of logits of images (arXiv 1706.04599) or of means of views, or 1.0.

    It is that of TEMPERATURES with the least log loss, log(1 + exp(-logit of the right class)). It
    is 1.0 unless it pays on patients that it was not fitted to: in FOLDS-fold cross-validation by
    patient the log loss has to fall, per patient, by more than its standard error. Also 1.0 with
    one class, few patients, or logits whose sign is always right or always wrong: T has no bound.
    """
    names, index = np.unique(patient, return_inverse=True)
    wrong = np.where(label == 1, -logits, logits)  # above 0 where the sign is wrong
    if len(names) < MIN_PATIENTS or len(np.unique(label)) < 2 or not wrong.min() < 0 < wrong.max():
        return 1.0
    losses = np.logaddexp(0, wrong / study_divisor(TEMPERATURES[:, None], views))  # (T, N)
    fold = (np.random.default_rng(0).permutation(len(names)) % FOLDS)[index]
    fitted = [losses[:, fold != k].mean(axis=1).argmin() for k in range(FOLDS)]
    held_out = losses[np.array(fitted)[fold], np.arange(len(fold))]
    gain = np.bincount(index, np.logaddexp(0, wrong) - held_out)
    pays = gain.mean() > gain.std(ddof=1) / len(names) ** 0.5
    return float(TEMPERATURES[losses.mean(axis=1).argmin()]) if pays else 1.0


def fit_study_temperature(images: Predictions) -> float:
    """Return the temperature of `pool_views`, 1.0 if none pays; images are calibrated before."""
    studies, views = pool_studies(images), Counter(images.study.tolist())  # in the same order
    return fit_temperature(to_logits(studies.probability), studies.label, studies.patient,
                           np.array(list(views.values())))


def choose_threshold(rule: str, studies: Predictions) -> float:
    """Return the threshold that a rule chooses on these studies; 0.5 where they are of one class.

    It lies midway between neighbouring probabilities, or at 0.5 where that divides the studies
    likewise; of equally good ones it is the nearest to 0.5.

    Args:
        rule: "auto": highest kappa. "sens=0.95": highest specificity with a sensitivity of at least
            0.95. "spec=0.95": highest sensitivity with a specificity of at least 0.95.
        studies: pooled and calibrated.

    >>> names = np.array(["a", "b", "c", "d"])
    >>> label, probability = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.9])
    >>> choose_threshold("auto", Predictions(*[names] * 4, label, probability))
    0.25
    """
    if len(np.unique(studies.label)) < 2:
        return 0.5
    counts = Counts(studies, 0.5)
    tp, tn = counts.tp_curve[0], counts.tn_curve[0]
    bounds = np.concatenate([[1.0], -np.unique(-studies.probability), [0.0]])
    upper, lower = bounds[:-1], bounds[1:]
    middle = (upper + lower) / 2
    thresholds = np.where(middle < upper, middle, lower)
    thresholds[(lower <= 0.5) & (upper > 0.5)] = 0.5
    goals = [cohen_kappa(tp, tn[0] - tn, tp[-1] - tp, tn)]
    if rule != "auto":
        name, wanted = rule.split("=")
        free, kept = tp / tp[-1], tn / tn[0]
        if name == "sens":
            free, kept = kept, free
        goals = [np.minimum(kept, float(wanted)), free, kept]
    ranks = list(zip(*goals, -np.abs(thresholds - 0.5), strict=True))
    return float(thresholds[ranks.index(max(ranks))])


def format_value(entry: Content, digits: int = 3) -> str:
    """Return a metric with its interval, '-' where undefined.

    >>> format_value({"value": 0.92912, "low": 0.9014, "high": 0.95})
    '0.929 [0.901,0.950]'
    """
    value, low, high = (
        "-" if entry[key] is None else f"{entry[key]:.{digits}f}"
        for key in ("value", "low", "high"))
    return value if low == "-" else f"{value} [{low},{high}]"


def format_report(report: Content) -> str:
    """Return the terminal text of a report, at most 100 columns; its notes stay in the file.

    Every metric of the studies, then a table of the headline metrics of whatever else there is.
    """
    study, image = report["levels"]["study"], report["levels"]["image"]
    lines = [
        f"{report['split']}: {study['count']} studies ({study['positives']} abnormal) of "
        f"{study['patients']} patients",
        f"abnormal above {report['threshold']:.3g} ({report['threshold_source']})"]
    for name in METRICS:
        if name in study:
            lines.append(f"{METRICS[name].heading:<34}{format_value(study[name])}")
    others = {} if image == study else {"images": image}
    if len(report["body_parts"]) > 1:
        for name, levels in report["body_parts"].items():
            others[f"{name} ({levels['study']['count']})"] = levels["study"]
    for name, levels in report.get("models", {}).items():
        others[name] = levels["study"]
    for name, difference in report.get("differences", {}).items():
        others[f"diff {name}"] = difference
    table = [["", *(METRICS[name].heading for name in HEADLINE)]] if others else []
    for name, entry in others.items():
        values = [format_value(entry[key], digits=2) for key in HEADLINE]
        table.append([shorten(name, 19), *values])
    lines += ["".join(cell.ljust(20) for cell in row).rstrip() for row in table]
    lines.append("[low,high]: 95 %, by patient; none if too few studies; -: undefined; diff: minus "
                 "the first model")
    return "\n".join(lines)


# ===== 8 training =================================================================================

STUDY_METRICS = [name for name in SELECTION if name not in ("loss", "accuracy")]
RUN_FILES = (".pth", ".last.pth", ".history.csv", ".history.png", ".split.csv", ".test.csv",
             ".report.json", ".report.png")
Row = dict[str, float]  # of STEM.history.csv; an undefined metric is NaN


def class_weights(records: Sequence[ImageRecord]) -> dict[tuple[str, int], float]:
    """Return the loss weight of each body part and label, twice that of the paper.

    With A abnormal and N normal training images of the part it is 2 A / (A + N) for normal and
    2 N / (A + N) for abnormal (arXiv 1712.06957, section 3.1): the loss at chance is log 2 = 0.69.
    """
    counts = Counter((record.body_part, record.label) for record in records)
    weights = {}
    for part, label in counts:
        others = counts[part, 1 - label]
        weights[part, label] = 2 * others / (others + counts[part, label])
        if not others:
            warn(f"{part}: all training images are {CLASSES[label]}, so they have no weight in the "
                 "loss; leave the body part out with --tasks")
    return weights


def loss_targets(
    records: Sequence[ImageRecord], weights: Mapping[tuple[str, int], float]
) -> Tensor:
    """Return labels and weights in the loss, (2, N); what is not in train weighs 1."""
    labels = [record.label for record in records]
    found = [weights.get((record.body_part, record.label), 1) for record in records]
    return torch.tensor([labels, found]).float()


def poly_factor(step: int, total: int, warmup: float) -> float:
    """Return the learning rate of a step, counted from 0, as a fraction of its peak.

    Linear warm-up, then polynomial decay of power 2: it falls sooner than half a cosine, so that
    the networks of the last epochs, of which one is kept, are all near their best.

    >>> [round(poly_factor(step, 10, 0.2), 2) for step in range(10)]
    [0.5, 1.0, 1.0, 0.77, 0.56, 0.39, 0.25, 0.14, 0.06, 0.02]
    """
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / rise
    return (1 - min(1.0, (step - rise) / max(1, total - rise))) ** 2


def choose_epoch(history: Sequence[Row], select: str) -> int:
    """Return the best epoch by --select, from 1; of equal ones the lower loss, then the first."""
    metrics = [SELECTION[select] * row[f"val_{select}"] for row in history]
    losses = [-row["val_loss"] for row in history]
    ranks = list(zip(np.nan_to_num(metrics, nan=-math.inf), losses, strict=True))
    return ranks.index(max(ranks)) + 1


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: clearing activations again is a sixth of a step's CPU time."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((-4, 0), (-1, -1), (-2, 1 << 26)):
            libc.mallopt(parameter, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD (bytes)


@dataclass
class TrainState:
    """All that changes during training besides tensors, as plain values that a file can hold."""

    history: list[Row] = field(default_factory=list)  # of the epochs finished, validation included
    best_epoch: int = 0
    model_digest: str = ""  # of STEM.pth
    batch: int = 0  # batches finished in the current epoch
    loss: float = 0.0  # sums over the current epoch's images
    correct: float = 0.0
    seen: int = 0
    seconds: float = 0.0  # spent in the current epoch

    @property
    def epoch(self) -> int:
        """The number of epochs finished."""
        return len(self.history)


@dataclass
class Trainer:
    """A training run: the network, its optimiser, and the files of the run."""

    config: Config
    network: Network  # with its initial weights
    train_set: MuraDataset
    val_set: MuraDataset
    hardware: DevicePrecision
    distributed: Distributed  # the processes that share each batch
    signals: StopSignals  # SIGINT and SIGTERM stop the run between two batches
    trained_on: Content  # stored with the model: patients, body parts, number of bad images

    def __post_init__(self) -> None:
        config, hardware, train = self.config, self.hardware, self.train_set
        weights = class_weights(train.records)
        self.train_targets = loss_targets(train.records, weights)
        self.val_targets = loss_targets(self.val_set.records, weights)
        self.mine = slice(self.distributed.rank, None, self.distributed.world_size)  # of a batch
        self.normalization = choose_normalization(config.normalization, train)
        self.forward: Any = hardware.prepare(self.network)
        if self.distributed.world_size > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.network)
        if config.compile:
            self.forward = torch.compile(self.forward)
        torch.backends.cudnn.benchmark = True  # pays here: batches have two sizes at most
        if hardware.device.type == "cpu":
            keep_freed_memory()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.lr, weight_decay=config.weight_decay,
            fused=hardware.device.type != "mps")
        self.scaler = torch.amp.GradScaler(
            hardware.device.type, enabled=hardware.precision == "fp16")
        self.state, self.batches = TrainState(), -(-len(train) // config.batch_size)
        self.saved_at, self.validation_seconds = time.monotonic(), 0.0
        data = "/".join(dataset.fingerprint() for dataset in (train, self.val_set))
        self.settings = {"data": data, **{name: getattr(config, name) for name in LEARNT}}

    def fit(self) -> None:
        """Run the epochs that are left."""
        with self.signals.deferred():
            while self.unfinished():
                self.train_epoch()
                self.end_epoch(self.validate())
        if self.state.epoch < self.config.epochs:
            log(f"no better val {self.config.select} since epoch {self.state.best_epoch}: ended by "
                f"--patience {self.config.patience}; --resume --patience 0 goes on")
        self.distributed.wait()  # the others read the model next, which rank 0 has written

    def unfinished(self) -> bool:
        """Return whether there are epochs left, and --patience, of which 0 is without end."""
        waited, patience = self.state.epoch - self.state.best_epoch, self.config.patience
        return self.state.epoch < self.config.epochs and (not patience or waited < patience)

    def train_epoch(self) -> None:
        """Train on what is left of the current epoch."""
        state, config = self.state, self.config
        batches = epoch_batches(len(self.train_set), config.batch_size, config.seed, state.epoch)
        left = batches[state.batch :]
        mine = [batch[self.mine] for batch in left]
        images = load_batches(self.train_set, mine, self.hardware.device)
        self.network.train()
        with Progress(len(batches), f"epoch {state.epoch + 1}/{config.epochs}", "batches",
                      state.batch) as bar:
            began = time.perf_counter() - state.seconds
            for batch, pixels in zip(left, images, strict=True):
                stopping = self.train_step(batch, pixels)
                state.seconds = time.perf_counter() - began
                bar.advance(note=self.progress_note())
                self.pause(stopping)

    def train_step(self, batch: Array, pixels: Tensor) -> bool:
        """Take one optimiser step; returns whether a signal has come to any process.

        `batch` holds indices of images of all processes, `pixels` this one's (b, 1, S, S) uint8. A
        loss that is not finite is a UserError; the weights are as they were before this batch.
        """
        state = self.state
        sums = self.backward(batch, pixels)
        signum = sums.new_full((1,), self.signals.signum)
        loss, correct, stopping = self.distributed.sum(torch.cat([sums, signum]))
        if not math.isfinite(loss):
            names = ", ".join(self.train_set.records[i].name for i in batch)
            raise UserError(f"the loss is not finite in epoch {state.epoch + 1}, at the batch of "
                            f"{names}; try a lower --lr or --precision fp32, or look at these "
                            "files", EXIT_FAILED)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        state.batch += 1
        state.loss += loss
        state.correct += correct
        state.seen += len(batch)
        return bool(stopping)

    def learning_rate(self) -> float:
        """Return the learning rate of the next step, which follows from what is done so far.

        The plateau schedule takes a tenth after each epoch whose val loss is not 1e-4 of it below
        the lowest before (arXiv 1712.06957, section 3.1; margin as in torch's ReduceLROnPlateau).
        """
        config, state = self.config, self.state
        if config.lr_schedule == "poly":
            step, total = state.epoch * self.batches + state.batch, config.epochs * self.batches
            return config.lr * poly_factor(step, total, config.warmup)
        rate, lowest = config.lr, math.inf
        for row in state.history:
            if row["val_loss"] < lowest * (1 - 1e-4):
                lowest = row["val_loss"]
            else:
                rate *= 0.1
        return rate

    def loss(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the sum of the weighted binary cross-entropies of images; all of shape (B,)."""
        return functional.binary_cross_entropy_with_logits(
            logits.float(), labels, weights, reduction="sum")

    def augmented(self, batch: Array, pixels: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return a batch as it is learnt from; for the arguments see `train_step`.

        Returns:
            images (b, 1, S, S), 0 to 1; their labels and weights (2, b); and mixup's lam: the rest
            of an image is the next one, in pixels and in the loss.
        """
        config, device, state = self.config, self.hardware.device, self.state
        parameters = draw_augmentation(config, len(batch), state.epoch, state.batch)[self.mine]
        images = augment(to_unit(pixels), parameters.to(device, non_blocking=True))
        targets = self.train_targets[:, batch[self.mine]].to(device, non_blocking=True)
        lam = draw_mixup(config, state.epoch, state.batch)
        return torch.lerp(images.roll(-1, 0), images, lam), targets, lam

    def backward(self, batch: Array, pixels: Tensor) -> Tensor:
        """Compute gradients of a batch as in `train_step`, in micro-batches.

        Returns:
            (2,) this process's sum of losses, and number of images right by their own labels.
        """
        config, state, world_size = self.config, self.state, self.distributed.world_size
        images, targets, lam = self.augmented(batch, pixels)
        seeds = random_stream(
            "dropout", config.seed, state.epoch, state.batch, self.distributed.rank)
        torch.manual_seed(int(seeds.integers(2**63)))  # networks that have it resume exactly
        steps = min(config.grad_accum_steps, len(images))
        pieces = zip(images.tensor_split(steps), targets.tensor_split(steps, 1),
                     targets.roll(-1, 1).tensor_split(steps, 1), strict=True)
        sums = images.new_zeros(2)
        for step, (inputs, target, partner) in enumerate(pieces, 1):
            delays = world_size > 1 and step < steps  # gradients are summed over processes once
            with self.forward.no_sync() if delays else contextlib.nullcontext():
                with self.hardware.autocast():
                    logits = self.forward(self.normalization(inputs))
                loss = torch.lerp(self.loss(logits, *partner), self.loss(logits, *target), lam)
                mean = loss * (world_size / len(batch))  # DDP averages gradients over processes
                torch.autograd.backward(self.scaler.scale(mean))
            sums[0] += loss.detach()
            sums[1] += ((logits.detach() > 0) == (target[0] > 0.5)).sum()
        return sums

    def progress_note(self) -> str:
        """Return running loss and accuracy, learning rate, and the time left of the whole run."""
        state, epochs = self.state, self.config.epochs - self.state.epoch
        rate = self.optimizer.param_groups[0]["lr"]
        left = (epochs * self.batches - state.batch) * state.seconds / state.batch
        left += epochs * self.validation_seconds
        return (f"loss {state.loss / state.seen:.3f} accuracy {state.correct / state.seen:.3f} "
                f"lr {rate:.1e}, run {timedelta(seconds=round(left))} left")

    def pause(self, stopping: bool) -> None:
        """Between two batches save the state when it is time, or when the run is to stop."""
        if stopping or time.monotonic() - self.saved_at > 60 * self.config.save_every:
            self.save_state()
        if stopping:
            self.distributed.wait()  # torchrun ends all when the first leaves
            raise Stopped(self.signals.signum or signal.SIGTERM)

    def validate(self) -> Floats:
        """Recompute BatchNorm statistics and return the logits of val, (N,)."""
        began, alone = time.perf_counter(), self.distributed.world_size == 1
        count = min(self.config.precise_bn, len(self.train_set))
        with Progress(count + len(self.val_set), "validation") as bar:
            def update(done: int) -> None:
                bar.advance(done)
                self.pause(alone and bool(self.signals.signum))  # else in the next epoch, together

            if count:
                self.recompute_statistics(count, update)
            self.distributed.broadcast_buffers(self.network)
            self.network.eval()
            (logits,) = Ensemble([self.as_model()], self.hardware).predict_dataset(
                [self.val_set], self.config.eval_batch_size, self.distributed, update)
        if not np.isfinite(logits).all():
            raise UserError("the network's output is not finite after epoch "
                            f"{self.state.epoch + 1}; try a lower --lr or --precision "
                            "fp32", EXIT_FAILED)
        self.validation_seconds = time.perf_counter() - began
        return np.asarray(logits)

    @torch.no_grad()
    def recompute_statistics(self, count: int, update: Callable[[int], object]) -> None:
        """Recompute BatchNorm statistics from training images as they are (arXiv 2105.07576).

        While the network learns, they follow small batches of augmented images, which new images
        are not: every logit would be shifted. All processes use the same images.
        """
        config = self.config
        order = random_stream("statistics", config.seed).permutation(len(self.train_set))
        batches = split_batches(order[:count], min(config.eval_batch_size, config.batch_size))

        def inputs() -> Iterator[Tensor]:
            for pixels in load_batches(self.train_set, batches, self.hardware.device):
                yield self.normalization(to_unit(pixels))
                update(len(pixels))

        torch.manual_seed(config.seed)  # as in `backward`
        with self.hardware.autocast():
            torch.optim.swa_utils.update_bn(inputs(), self.network)

    def as_model(self, **calibration: Any) -> LoadedModel:
        """Return the network as it is now, as prediction takes it."""
        config = self.config
        return LoadedModel(
            config.checkpoint[0], self.network, self.normalization, config.image_size or 0,
            config.resize, bool(config.tta), **self.trained_on, **calibration)

    def end_epoch(self, logits: Floats) -> None:
        """Print the epoch, keep the model if it is the best so far, and write history and state."""
        config, row = self.config, self.history_row(logits)
        history = [*self.state.history, row]
        kept = choose_epoch(history, config.select)
        self.state = TrainState(history, kept, self.state.model_digest)
        best = kept == len(history)
        log_epoch(row, config.epochs, best=best)
        if self.distributed.rank == 0:
            if best:
                self.save_model(logits)
            atomic_write(config.file(".history.csv"), csv_text(history, list(row)))
            atomic_write(config.file(".history.png"), plot_history(history, kept))
        self.save_state()

    def history_row(self, logits: Floats) -> Row:
        """Return an epoch's row: loss and accuracy per image, other metrics per study, at 0.5."""
        state = self.state
        loss = self.loss(torch.from_numpy(logits), *self.val_targets)
        studies = pool_studies(as_predictions(self.val_set.records, sigmoid(logits)))
        metrics = compute_metrics(studies, 0.5)
        val = {name: float(values[0]) for name, values in metrics.items()}
        val["loss"] = loss.item() / len(logits)
        val["accuracy"] = float(((logits > 0) == self.val_set.labels).mean())
        return {
            "epoch": state.epoch + 1,
            "train_loss": state.loss / state.seen, "train_accuracy": state.correct / state.seen,
            **{f"val_{name}": val[name] for name in SELECTION},
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": state.seen / state.seconds,
            "seconds": state.seconds + self.validation_seconds,
        }

    def save_model(self, logits: Floats) -> None:
        """Write STEM.pth, with temperatures and threshold found on val."""
        images = as_predictions(self.val_set.records, sigmoid(logits))
        temperature = fit_temperature(logits, images.label, images.patient)
        images = replace(images, probability=sigmoid(logits / temperature))
        study_temperature = fit_study_temperature(images)
        rule = self.config.threshold
        threshold, source = rule or 0.5, "default" if rule is None else "given"
        if isinstance(rule, str):
            studies = pool_studies(images, study_temperature)
            threshold, source = choose_threshold(rule, studies), f"{rule} on val"
        model = self.as_model(
            temperature=temperature, study_temperature=study_temperature,
            threshold=float(threshold), threshold_source=source)
        self.state.model_digest = write_checkpoint(model.path, {
            "kind": "model", "model": self.network.name,
            **{name: getattr(model, name) for name in STORED},
            "normalization": asdict(self.normalization), "settings": self.settings,
            "epoch": self.state.epoch, "state_dict": self.network.state_dict(),
        })

    def save_state(self) -> None:
        """Write STEM.last.pth; rank 0 only."""
        self.saved_at = time.monotonic()
        if self.distributed.rank == 0:
            write_checkpoint(self.config.file(".last.pth"), {
                "kind": "state", "settings": self.settings, "trained_on": self.trained_on,
                "kept": {name: getattr(self.config, name) for name in KEPT},
                "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "state": asdict(self.state),
            })

    def resume(self, content: Content) -> None:
        """Go on from the content of STEM.last.pth; UserError where data or STEM.pth do not fit."""
        path, model = self.config.file(".last.pth"), self.config.checkpoint[0]
        if content["settings"]["data"] != self.settings["data"]:
            raise UserError(f"--resume {path}: images, labels or split have changed since; start a "
                            "new run with another --checkpoint")
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.state = state = TrainState(**content["state"])
        if state.epoch and not self.owns_model(model):
            raise UserError(f"--resume {path}: {model}, the best model so far, is missing or of "
                            "another run; put the right one there")
        log(f"resumed from {path}: {state.epoch} epochs and {state.batch} batches are done")
        before, epochs = content["kept"]["epochs"], self.config.epochs
        if epochs <= state.epoch:
            log(f"--epochs {epochs}: {state.epoch} are done, so none is left; a larger number goes "
                "on")
        elif self.config.lr_schedule == "poly" and epochs != before:
            log(f"--epochs {before} -> {epochs}: the schedule is fitted to it; the learning rate "
                f"goes on at {self.learning_rate():.2e}")

    def owns_model(self, path: Path) -> bool:
        """Return whether STEM.pth is of this run: the state's, or saved just before a crash."""
        if not path.exists():
            return False
        if digest(path.read_bytes()) == self.state.model_digest:
            return True
        found = read_checkpoint(path, "model")
        return bool(found["settings"] == self.settings and found["epoch"] > self.state.epoch)


def log_epoch(row: Row, epochs: int, *, best: bool) -> None:
    """Print the two lines of an epoch: metrics per image, and metrics per study."""
    shown = {name: f"{value:.4f}".replace("nan", "undefined") for name, value in row.items()}
    title = f"epoch {row['epoch']}/{epochs}"
    log(f"{title}  images: train loss {shown['train_loss']} accuracy {shown['train_accuracy']}, "
        f"val loss {shown['val_loss']} accuracy {shown['val_accuracy']}")
    studies = [f"{METRICS[name].heading} {shown[f'val_{name}']}" for name in STUDY_METRICS]
    log(f"{'':<{len(title)}}  studies: val {' '.join(studies)}   "
        f"{row['images_per_second']:.1f} images/s, {row['seconds']:.0f} s"
        f"{'   best so far' if best else ''}")


def as_predictions(records: Sequence[ImageRecord], probability: Floats) -> Predictions:
    """Return images and their probabilities (N,) for the metrics."""
    columns = {name: np.array([getattr(record, name) for record in records])
               for name in ("name", "body_part", "patient", "study", "label")}
    return Predictions(columns.pop("name"), **columns, probability=probability)


def resumed_config(config: Config, content: Content) -> Config:
    """Return the options of a run that goes on; UserError where one would change what is learnt."""
    saved = content["settings"] | content["kept"]
    differ = []
    for name in (*LEARNT, "weights"):  # others than in the state would do nothing
        if name in config.given and getattr(config, name) != saved[name]:
            shown = " ".join(saved[name]) or "all" if name == "tasks" else saved[name]
            differ.append(f"{flag_of(name)} was {'not given' if shown is None else shown}")
    if differ:
        raise UserError(f"--resume: {', '.join(differ)}: leave it out, or start a new run with "
                        "another --checkpoint")
    names = {*LEARNT, *KEPT} - config.given
    return replace(config, **{name: saved[name] for name in names})


# ===== 9 plots ====================================================================================

# The overlay: colours from no heat to the top of the scale, ever lighter and none of them white, so
# that heat shows on dark and on white bone; opacity grows with heat and is 0 where there is none.
HEAT_COLORS = {
    "abnormal": ("#000000", "#5b0f6b", "#c4264f", "#f4601a", "#ffb000"),
    "normal": ("#000000", "#0d2a7a", "#0a63c8", "#0fa3c8", "#20dcb0"),
}
HEAT_OPACITY, OPAQUE_FROM = 0.7, 0.6  # the highest opacity, and the part of the scale it begins at
FAINT_HEAT = 4.0  # log odds, from 0.5 to 0.98: the colour scale reaches at least this far
CONTOUR_COLOR, LESION_COLOR = "#00ffff", "#7cfc00"  # strongest region; known lesion
SCREEN_INCHES = 14.2, 8.2  # of the pictures at most: fits a screen of 1920 x 1080 at DPI
DPI = 110
LINE_PIXELS = 3
FIGURE_PIXELS = 1400  # side of a square of as many pixels as matplotlib is given for all pictures
SHEET_TILES = 12  # of the gallery
BLUE, RED = "#0072B2", "#D55E00"  # distinct to the colour-blind (Okabe and Ito 2008)
CHANCE = {"color": "gray", "linestyle": ":"}
STYLE: dict[Any, Any] = {
    "font.size": 8, "axes.titlesize": 8, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "lines.linewidth": 1, "lines.markersize": 4, "legend.fontsize": 7,
    "legend.frameon": False, "figure.titlesize": 9, "text.parse_math": False,  # a $ is no formula
}


def new_figure(**style: Any) -> Any:
    """Return an empty figure."""
    from matplotlib.figure import Figure

    return Figure(**style)


def save_figure(figure: Any, suffix: str = ".png", dpi: int = 180) -> bytes:
    """Return a figure as the content of a file of that suffix."""
    file, kind = io.BytesIO(), suffix.lower()[1:]
    mark: Content = {"metadata": {"Creator": PROGRAM}}
    if kind in ("jpg", "jpeg"):
        mark = {"pil_kwargs": {"comment": PROGRAM}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in a script that the font lacks
        figure.savefig(file, format=kind, dpi=dpi, **mark)
    return file.getvalue()


# ---- history and report ----


def plot_history(history: Sequence[Row], best_epoch: int) -> bytes:
    """Return a PNG of loss, accuracy, and study-level AUROC and kappa over epochs.

    The kept epoch, counted from 1, is marked; NaN makes a gap.
    """
    import matplotlib as mpl

    panels = {
        "loss": ["train_loss", "val_loss"],
        "accuracy of images": ["train_accuracy", "val_accuracy"],
        "val metrics of studies": [f"val_{name}" for name in STUDY_METRICS],
    }
    epochs = [row["epoch"] for row in history]
    with mpl.rc_context(STYLE):
        figure = new_figure(figsize=(9.6, 3.2), layout="constrained")
        for axes, title in zip(figure.subplots(1, 3), panels, strict=True):
            for name in panels[title]:
                values = [row[name] for row in history]
                axes.plot(epochs, values, ".-", label=name.replace("_", " "))
            axes.axvline(best_epoch, **CHANCE, label=f"kept: epoch {best_epoch}")
            axes.set(title=title, xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
        return save_figure(figure)


def metric_points(metric: Content) -> Floats:
    """Return value, low and high (3,), NaN where undefined."""
    return np.array([metric[key] for key in ("value", "low", "high")], float)


def draw_point(axes: Any, x: Any, y: Any, **style: Any) -> None:
    """Draw a point with its intervals; x and y: value, low and high (3,)."""
    (point,) = axes.plot(x[0], y[0], "o", **style)
    axes.plot(x[1:], y[[0, 0]], x[[0, 0]], y[1:], color=point.get_color())


def wilson_interval(label: Array) -> Floats:
    """Return the fraction of abnormal and the ends of its 95 % interval (3,) (Wilson 1927)."""
    fraction, z2 = label.mean(), 1.96**2 / len(label)
    half = math.sqrt(z2 * (fraction * (1 - fraction) + z2 / 4))
    low, high = fraction + z2 / 2 - half, fraction + z2 / 2 + half
    return np.array([fraction, low / (1 + z2), high / (1 + z2)])


def draw_curves(
    roc: Any, recall: Any, report: Content, images: Predictions, studies: Predictions
) -> None:
    """Draw ROC and precision-recall curves, the operating point and what chance reaches."""
    for level, found, color in (("images", images, "silver"), ("studies", studies, BLUE)):
        counts = Counts(found, report["threshold"])
        hits, alarms = counts.tp_curve[0], counts.fp_curve[0]
        sensitivity, precision = ratio(hits, hits[-1]), ratio(hits, hits + alarms)
        precision[0] = precision[1]
        roc.plot(ratio(alarms, alarms[-1]), sensitivity, color=color, label=level)
        recall.step(sensitivity, precision, color=color, label=level)
    metrics = report["levels"]["study"]
    point = {"color": BLUE, "label": f"studies, threshold {report['threshold']:.3g}"}
    sensitivity = metric_points(metrics["sensitivity"])
    draw_point(roc, 1 - metric_points(metrics["specificity"]), sensitivity, **point)
    draw_point(recall, sensitivity, metric_points(metrics["ppv"]), **point)
    if report["is_mura"]:  # arXiv 1712.06957, abstract
        label = "MURA paper, hidden test set,\n207 studies: AUROC 0.929"
        roc.plot(1 - 0.887, 0.815, "*", color=RED, label=label)
    roc.axline((0, 0), (1, 1), **CHANCE)
    recall.axhline(studies.label.mean(), **CHANCE, label="prevalence")
    title = f"a  ROC: AUROC {format_value(metrics['auroc'])}"
    roc.set(xlabel="1 - specificity", ylabel="sensitivity", title=title)
    title = f"b  Average precision {format_value(metrics['average_precision'])}"
    recall.set(xlabel="sensitivity (recall)", ylabel="PPV (precision)", title=title)
    for axes in (roc, recall):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2))


def draw_confusion(axes: Any, report: Content, studies: Predictions) -> None:
    """Draw counts and row percentages, label against prediction."""
    predicted = studies.probability > report["threshold"]
    cells = np.bincount(2 * studies.label + predicted, minlength=4).reshape(2, 2)
    fraction = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
    axes.imshow(fraction, cmap="Blues", vmin=0, vmax=2)  # no darker than black text can be read on
    for (row, column), count in np.ndenumerate(cells):
        text = f"{count}\n{fraction[row, column]:.1%}"
        axes.text(column, row, text, ha="center", va="center", fontsize=10)
    axes.set_xticks([0, 1], CLASSES)
    axes.set_yticks([0, 1], CLASSES, rotation=90, va="center")
    axes.set(xlabel="prediction", ylabel="label", title="c  Confusion matrix")


def draw_reliability(axes: Any, studies: Predictions) -> None:
    """Draw the observed fraction of abnormal in ten bins, its interval, and the bins' sizes."""
    bins = np.minimum((10 * studies.probability).astype(int), 9)
    means, sizes = [], []
    for place in np.unique(bins):
        found = studies.take(bins == place)
        means.append(found.probability.mean())
        sizes.append(len(found.label))
        draw_point(axes, np.full(3, means[-1]), wilson_interval(found.label), color=BLUE)
    axes.axline((0, 0), (1, 1), **CHANCE)
    axes.secondary_xaxis("top").set_xticks(means, sizes, fontsize=6)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.03, 1.03), ylabel="fraction abnormal")
    axes.set(xlabel="probability of abnormal", title="d  Reliability, 95 % interval (top: studies)")


def draw_kappa(axes: Any, report: Content) -> None:
    """Draw the kappa of studies with its interval as point and number, overall and by body part."""
    names: list[str] = []
    numbers: list[str] = []
    for name, levels in [("overall", report["levels"]), *report["body_parts"].items()]:
        metrics = levels["study"]
        draw_point(axes, metric_points(metrics["kappa"]), np.full(3, len(names)), color=BLUE)
        names.append(f"{shorten(name.removeprefix('XR_').lower(), 16)} ({metrics['count']})")
        numbers.append(format_value(metrics["kappa"]))
    axes.set_yticks(range(len(names)), names)
    axes.secondary_yaxis("right").set_yticks(range(len(names)), numbers)
    axes.axvline(0, **CHANCE)
    axes.set(xlabel="Cohen's kappa [95 % interval]", title="e  Kappa by body part (studies)")
    axes.invert_yaxis()


def plot_report(report: Content, images: Predictions, studies: Predictions) -> bytes:
    """Return a PNG of ROC, precision-recall, confusion matrix, reliability and kappa.

    Args:
        report: the content of STEM.report.json, with `date` and `is_mura`.
        images: predictions of the images.
        studies: the same, pooled.
    """
    import matplotlib as mpl

    found = report["levels"]["study"]
    names = shorten(", ".join(Path(path).name for path in report["checkpoints"]), 90)
    sizes = "{count} studies ({positives} abnormal), {patients} patients".format(**found)
    heights = 4.6, max(2.4, 0.25 * len(report["body_parts"]))
    with mpl.rc_context(STYLE):
        figure = new_figure(figsize=(9, sum(heights)), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=heights)
        upper.suptitle(f"{names}, {report['date'][:10]}\nStudy level, {report['split']}: {sizes}")
        roc, recall, confusion = upper.subplots(1, 3)
        reliability, kappa = lower.subplots(1, 2, width_ratios=[4, 5])
        draw_curves(roc, recall, report, images, studies)
        draw_confusion(confusion, report, studies)
        draw_reliability(reliability, studies)
        draw_kappa(kappa, report)
        return save_figure(figure)


# ---- explanation and gallery ----


@dataclass(frozen=True)
class HeatScale:
    """How the heatmaps of a figure are shown, all alike: from no heat to `top`."""

    cam_class: str  # the class that the heat speaks for
    unit: str
    top: float

    @property
    def colormap(self) -> Any:
        """Matplotlib's colour map of the class."""
        from matplotlib.colors import LinearSegmentedColormap

        return LinearSegmentedColormap.from_list(self.cam_class, HEAT_COLORS[self.cam_class])


def heat_scale(cam_class: str, unit: str, heatmaps: Iterable[Array]) -> HeatScale:
    """Return the scale of these maps, on which faint heat stays faint."""
    return HeatScale(cam_class, unit, max([FAINT_HEAT, *(float(heat.max()) for heat in heatmaps)]))


def show_heat(
    pixels: Pixels, heat: Array, side: float, scale: HeatScale
) -> tuple[Image.Image, Image.Image, Image.Image, Array]:
    """Return radiograph, heat in colours and overlay, the longer side `side`, and the heat in it.

    The overlay is the radiograph as it is where there is no heat. Pixels and heat are (H, W), but
    the heat may be of another size; pixels are averaged or interpolated.
    """
    image = Image.fromarray(pixels)
    width, height = (max(1, round(side * edge / max(image.size))) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
    original, heat = image.convert("RGB"), resize_map(heat, height, width)
    color = Image.fromarray(scale.colormap(heat / scale.top, bytes=True)).convert("RGB")
    opacity = 255 * HEAT_OPACITY * np.minimum(heat / scale.top / OPAQUE_FROM, 1)
    overlay = Image.composite(color, original, Image.fromarray(opacity.astype(np.uint8)))
    return original, color, overlay, heat


def outline_region(overlay: Image.Image, heat: Any, box: Any) -> None:
    """Draw the contour at half of the maximum of the heat (H, W), inside a box, on its overlay."""
    hot = Image.fromarray(heat >= heat.max() / 2).convert("L")
    region = Image.new("L", hot.size)
    region.paste(hot.crop(box), box[:2])
    line = region.filter(ImageFilter.FIND_EDGES).filter(ImageFilter.MaxFilter(LINE_PIXELS))
    overlay.paste(CONTOUR_COLOR, mask=line)


def draw_tiles(
    figure: Any, tiles: Sequence[tuple[Image.Image, str]], group: int, heading: str,
    scale: HeatScale,
) -> None:
    """Fill a figure with pictures (of the same longer side), titles and the colour bar of heat.

    Its size is set; `group` pictures stay side by side. For the rest see `draw_explanation`.
    """
    import matplotlib as mpl

    width, height = np.max([picture.size for picture, _ in tiles], axis=0)
    columns = group * (round(math.sqrt(1.6 * len(tiles)) / group) or 1)
    rows = math.ceil(len(tiles) / columns)
    inch = min(SCREEN_INCHES[0] / columns / width, (SCREEN_INCHES[1] / rows - 0.35) / height)
    step_x, step_y = inch * width + 0.1, inch * height + 0.35  # 0.35 inches for the title
    size_x, size_y = columns * step_x + 0.9, rows * step_y + 0.5
    figure.set_size_inches(size_x, size_y)
    with mpl.rc_context(STYLE):
        axes = figure.add_axes((0, 0, 1, 1))  # in inches
        for index, (picture, title) in enumerate(tiles):
            row, column = divmod(index, columns)
            x, y = column * step_x + 0.1, row * step_y + 0.8
            axes.imshow(picture, extent=(x, x + inch * picture.width, y + inch * picture.height, y))
            lines = [shorten(line, int(16 * inch * width)) for line in title.split("\n")]
            axes.text(x, y - 0.05, "\n".join(lines))
        axes.set(xlim=(0, size_x), ylim=(size_y, 0), aspect="auto")
        axes.set_axis_off()
        lines = [shorten(line, int(14 * size_x)) for line in heading.split("\n")]
        figure.suptitle("\n".join(lines))
        shown = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, scale.top), scale.colormap)
        bar = figure.add_axes((1 - 0.7 / size_x, 0.1, 0.15 / size_x, 0.7))
        figure.colorbar(shown, bar, label=f"heat for {scale.cam_class}, {scale.unit}")


def draw_explanation(
    figure: Any, views: Sequence[ViewResult], heading: Sequence[str], scale: HeatScale,
    lesion: Box | None = None,
) -> None:
    """Fill a figure with original | heatmap | overlay of each view, all on one scale.

    The strongest region is outlined where the view has a box.

    Args:
        figure: empty; its size is set.
        views: that could be read.
        heading: lines of the figure's title.
        scale: of the heat.
        lesion: the known one of each view, pixels of the original.
    """
    side = int(FIGURE_PIXELS / math.sqrt(3 * len(views)))
    tiles: list[tuple[Image.Image, str]] = []
    for view in views:
        factor = side / max(view.pixels.shape)
        original, color, overlay, heat = show_heat(view.pixels, view.cam, side, scale)
        if view.box:
            outline_region(overlay, heat, tuple(round(factor * edge) for edge in view.box))
        if lesion:
            for picture in (original, overlay):
                box = [factor * edge for edge in lesion]
                ImageDraw.Draw(picture).rectangle(box, outline=LESION_COLOR, width=LINE_PIXELS)
        title = f"{printable(view.path.name)}: abnormal {percent(view.probability)}"
        heat_title = f"heat: {scale.cam_class}" if heat.any() else f"heat: {scale.cam_class}, none"
        tiles += [(original, title), (color, heat_title), (overlay, "overlay")]
    draw_tiles(figure, tiles, 3, "\n".join(map(printable, heading)), scale)


def save_explanation(*explanation: Any, suffix: str = ".png", window: str = "") -> bytes:
    """Return `draw_explanation` as a file of that suffix; with a window's title, keep it open."""
    figure: Any = new_figure()
    if window:
        from matplotlib import pyplot  # slow to import, and only windows need it

        figure = pyplot.figure(dpi=DPI)
        figure.canvas.manager.set_window_title(printable(window))
    draw_explanation(figure, *explanation)
    return save_figure(figure, suffix, DPI)


def gallery_sheet(
    tiles: Sequence[tuple[Pixels, Array, str]], heading: str, scale: HeatScale
) -> bytes:
    """Return a PNG of overlays; a tile is a radiograph, its heat (both (H, W)) and a caption."""
    figure, side = new_figure(), FIGURE_PIXELS / math.sqrt(len(tiles))
    overlays = [(show_heat(pixels, heat, side, scale)[2], caption)
                for pixels, heat, caption in tiles]
    draw_tiles(figure, overlays, 1, heading, scale)
    return save_figure(figure, dpi=DPI)


def tile_caption(images: Predictions, row: int) -> str:
    """Return what stands above an image of the gallery: end of its path, label, probability."""
    tail = "/".join(images.path[row].split("/")[-3:])
    label = CLASSES[images.label[row]]
    return f"{printable(tail)}\nlabel {label}, p {percent(images.probability[row])}"


GALLERY = {  # name and heading of each group's sheets, of which there are at most two
    "false_positives": "Most confident false positives",
    "false_negatives": "Most confident false negatives",
    "least_certain": "Least certain", "right": "Right, for comparison",
}


def gallery_pages(images: Predictions, threshold: float) -> Iterator[tuple[str, str, Any]]:
    """Yield the sheets of the gallery: file name, heading, and rows of `images`, worst first."""
    confident = np.argsort(-abs(images.probability - threshold), kind="stable")
    predicted = (images.probability > threshold)[confident]
    wrong = predicted != images.label[confident]
    right = confident[~wrong]
    groups = {
        "false_positives": confident[wrong & predicted],
        "false_negatives": confident[wrong & ~predicted],
        "least_certain": confident[::-1][:SHEET_TILES],
        "right": right[:: math.ceil(len(right) / SHEET_TILES) or 1],
    }
    for name, rows in groups.items():
        for start in range(0, min(len(rows), 2 * SHEET_TILES), SHEET_TILES):
            page = start // SHEET_TILES + 1
            chosen = rows[start : start + SHEET_TILES]
            heading = f"{GALLERY[name]} ({page}); p: probability of abnormal"
            yield f"{name}_{page}.png", heading, chosen


# ---- windows ----


def choose_backend() -> None:
    """Let matplotlib start where MPLBACKEND names a backend that cannot be imported.

    A notebook's kernel exports its own to every command. To be called before any other import of
    matplotlib, which fails at such a name.
    """
    name = os.environ.pop("MPLBACKEND", "")
    from matplotlib import rcParams
    from matplotlib.backends.registry import backend_registry

    registry: Any = backend_registry
    if name:
        try:
            registry.load_backend_module(name)
        except (ImportError, RuntimeError, ValueError):
            warn(f"MPLBACKEND={name}: cannot be imported; figures are saved, no window opens")
            name = "Agg"
        os.environ["MPLBACKEND"] = rcParams["backend"] = name


def can_show(no_show: bool) -> bool:
    """Return whether a window can open: a terminal, an interactive backend, and no --no-show."""
    if no_show or not sys.stdout.isatty():
        return False
    from matplotlib import pyplot
    from matplotlib.backends.registry import backend_registry

    registry: Any = backend_registry
    backend = pyplot.get_backend()
    try:
        pyplot.switch_backend(backend)
    except ImportError:  # it lacks its display or its toolkit
        return False
    return registry.resolve_backend(backend)[1] is not None


def show_windows() -> None:
    """Open the figures that were made with a window, and wait until they are closed."""
    from matplotlib import pyplot

    pyplot.show()


# ===== 10 evaluate, predict, export ===============================================================

HEATMAP_ENDING = "_heatmap.png"  # of figures that --predict names by itself
FIGURE_ROWS = 16  # views in a figure at most; MURA's studies have up to 13
CAM_SIDE = 1024  # pixels: maps of larger images are kept at this size, and enlarged where wanted
WINDOWS = 8  # figures opened at most, so that a folder does not bury the screen
SIGNS = {"abnormal": 1.0, "normal": -1.0}  # of a class in the logit
DATE_FORMAT = "%Y-%m-%dT%H:%M:%S%z"
STUDY_FOLDER = re.compile(r"(?i)study\d+(_\w+)?")  # study1, study1_positive, ...
EXPORT_TOLERANCE = 1e-4  # probability: how far an exported model may be from torch
OUTPUT_COLUMNS = (
    "path", "prediction", "confidence", "probability", "error", "left", "top", "right", "bottom",
    "view", "study_uid", "probability_at_prevalence", "threshold", "model", "version", "date")
REPORT_NOTES = (
    "train/ was split by patient into train and val across body parts; val chose the epoch, and "
    "the temperatures were fitted on it. MURA's valid/ is the test: each further look makes it "
    "less so.",
    "The loss weighs both classes of a body part alike, so a probability is that among as many "
    "normal as abnormal images; --prevalence corrects it.",
    "With TTA a logit is the mean of those of the image and of its horizontal flip.",
    INTERVAL_NOTE)
PAPER_NOTE = ("MURA's paper reports AUROC 0.929 on a hidden test set of 207 studies, which this is "
              "not: the numbers are not comparable.")


def load_ensemble(config: Config, hardware: DevicePrecision) -> Ensemble:
    """Return the models of --checkpoint."""
    models = [load_model(path, hardware, config.tta) for path in config.checkpoint]
    return Ensemble(models, hardware)


def decision_threshold(config: Config, models: Sequence[LoadedModel]) -> tuple[float, str]:
    """Return the threshold and its source: --threshold, else the models' own, or their mean."""
    if isinstance(config.threshold, float):
        return config.threshold, "given"
    source = models[0].threshold_source if len(models) == 1 else "the mean of the models' own"
    return float(np.mean([model.threshold for model in models])), source


def body_part_warnings(models: Sequence[LoadedModel], body_part: str) -> list[str]:
    """Return a warning where no model was trained on a body part."""
    parts = [body_part, *(part for model in models for part in model.body_parts)]
    name, *known = (part.upper().removeprefix("XR_") for part in parts)
    if name in ("", "ALL", *known) or "ALL" in known:
        return []
    return [f"shows a body part ({body_part}) that the model was not trained on (it was on "
            f"{', '.join(sorted(set(known)))}); the result is unreliable"]


# ---- evaluate ----


def evaluate_ensemble(
    config: Config, ensemble: Ensemble, scan: Scan, distributed: Distributed, signals: StopSignals
) -> None:
    """Evaluate models, alone and together, on a split; print the report and write its files.

    Batches are shared by all processes; rank 0 reports.
    """
    models = ensemble.models
    decoded = [shared_decode(config, scan, model.resizing, distributed) for model in models]
    bad_images = report_bad_images(scan, decoded[0], config.on_bad_image)
    data = [MuraDataset(images) for images in decoded]
    first = data[0]
    with Progress(len(first), f"evaluate {scan.split}") as bar:
        def update(count: int) -> None:
            """Count images; Python drops what a signal raises inside of a destructor."""
            bar.advance(count)
            signals.check()

        logits = ensemble.predict_dataset(data, config.eval_batch_size, distributed, update)
    if distributed.rank == 0:
        wrong = np.flatnonzero(~np.isfinite(logits).all(axis=0))
        if len(wrong):
            path = first.records[wrong[0]].path
            raise UserError(f"{path}: the model's output is not finite; use --precision fp32 or "
                            "another model", EXIT_FAILED)
        notes, dropped = check_duplicates(config, scan, first, models[0].resizing)
        kept = np.array([record.name not in dropped for record in first.records])
        members = [as_predictions(first.records, row).take(kept)
                   for row in ensemble.probabilities(logits)]
        report, images, studies = make_report(config, ensemble, scan, members, notes)
        report["bad_images"] = bad_images
        write_report(config, report, images, studies)
        if config.mode == "E" and config.figure:
            config = replace(config, threshold=report["threshold"])
            write_gallery(Predictor(config, ensemble), scan.folder, images)
    distributed.wait()


def check_duplicates(
    config: Config, scan: Scan, tested: MuraDataset, resizing: Resizing
) -> tuple[list[str], set[str]]:
    """Return what the report is to say of duplicates, and the names of images to leave out."""
    datasets, train, missing = {scan.split: tested}, None, 0
    if scan.split == "valid":
        with contextlib.suppress(UserError):  # there is no train/, or nothing of these body parts
            train = scan_split(scan.folder.parent, "train", config.tasks)
    if train:
        folder = config.cache_dir or Path()
        if config.drop_duplicates and not is_distributed():  # the others would wait too long
            decode_scan(train, *resizing, folder, config.workers)
        parts = open_cache(train, *resizing, folder, verify=False)
        known = [image for image in itertools.chain(*parts) if image.checksum]
        missing = len(train.records) - len(known)
        datasets["training"] = MuraDataset(known)
    notes, concerned = find_duplicates(datasets)
    if missing:
        notes.append(f"{missing} images of train/ are not in the cache at this size, so they were "
                     "not compared: --drop-duplicates decodes them")
    names = concerned.get(scan.split, set())
    if not names:
        return notes, names
    text = f"{len(names)} duplicate images of {scan.split}"
    if not config.drop_duplicates:
        return [*notes, f"{text} are kept: --drop-duplicates leaves them out"], set()
    if len(names) == len(tested):
        raise UserError(f"{scan.split}: all images are duplicates; leave --drop-duplicates out")
    return [*notes, f"{text} were left out"], names


def make_report(
    config: Config, ensemble: Ensemble, scan: Scan, members: Sequence[Predictions],
    notes: Sequence[str],
) -> tuple[Content, Predictions, Predictions]:
    """Return the report, and the ensemble's images and studies, from each model's images."""
    models = ensemble.models
    mean = np.mean([images.probability for images in members], axis=0)
    images = replace(members[0], probability=mean)
    studies = pool_studies(images, ensemble.study_temperature)
    threshold, source = decision_threshold(config, models)
    notes = [*notes, *training_warnings(models, images, scan.split), *scan.notes]
    for note in notes:
        warn(note)
    if config.mode == "E" and isinstance(config.threshold, str):
        threshold, source = choose_threshold(config.threshold, studies), f"{config.threshold} here"
        notes.append("The threshold was chosen on these studies: metrics at it are optimistic.")
    evaluation = Evaluation(threshold, config.bootstrap, config.seed, config.prevalence)
    report = {
        **report_subject(config, scan), "version": __version__,
        "date": time.strftime(DATE_FORMAT), "is_mura": scan.is_mura,
        "threshold": threshold, "threshold_source": source,
        "notes": [*REPORT_NOTES, *notes, *[PAPER_NOTE] * scan.is_mura],
        **evaluation.report(images, ensemble.study_temperature)}
    if len(models) > 1:
        pooled = {}
        report |= {"models": {}, "differences": {}}
        for model, member in zip(models, members, strict=True):
            name, temperature = str(model.path), model.study_temperature
            report["models"][name] = evaluation.levels(member, temperature)
            pooled[name] = pool_studies(member, temperature)
        first, *others = (pooled | {"ensemble": studies}).items()
        for name, other in others:
            report["differences"][name] = evaluation.compare(first[1], other)
    return report, images, studies


def training_warnings(models: Sequence[LoadedModel], images: Predictions, split: str) -> list[str]:
    """Return warnings of patients that the models have seen, and body parts that they have not."""
    patients, texts = set(images.patient.tolist()), []
    for model in models:
        train, val = (len(patients & set(model.patients[side])) for side in ("train", "val"))
        if train or val:
            texts.append(f"{model.path}: {train} of the {len(patients)} patients of {split} were "
                         f"trained on, {val} used for validation: metrics are optimistic (leakage)")
    for part in np.unique(images.body_part):
        texts += [f"{split} {text}" for text in body_part_warnings(models, part)]
    return texts


def report_files(config: Config, split: str) -> list[Path]:
    """Return STEM.report.json, STEM.report.png and the table of images."""
    table = ".train.csv" if split == "train" else ".test.csv"
    return [config.file(ending) for ending in (".report.json", ".report.png", table)]


def write_report(
    config: Config, report: Content, images: Predictions, studies: Predictions
) -> None:
    """Print the report and write its files; in the table, absolute_error is how wrong a row is."""
    columns, split = dict(vars(images)), report["split"]
    if split in ("train", "valid"):
        columns["path"] = [f"{split}/{name}" for name in images.path]
    columns["absolute_error"] = np.abs(images.label - images.probability)
    if config.prevalence:
        corrected = correct_prevalence(images.probability, config.prevalence)
        columns["probability_at_prevalence"] = corrected
    cells = zip(*columns.values(), strict=True)
    rows = [dict(zip(columns, row, strict=True)) for row in cells]
    for line in format_report(report).splitlines():
        log(line)
    picture, table = plot_report(report, images, studies), csv_text(rows, list(columns))
    files = report_files(config, split)
    for file, content in zip(files, (json_text(report), picture, table), strict=True):
        atomic_write(file, content)
    log(f"written: {', '.join(map(str, files))}")


def gallery_files(config: Config) -> list[Path]:
    """Return all sheets that a gallery may have."""
    names = [f"{name}_{page}.png" for name in GALLERY for page in (1, 2)]
    return [Path(config.figure or "", name) for name in names]


def write_gallery(predictor: Predictor, folder: Path, images: Predictions) -> None:
    """Write contact sheets of the most wrong images below a folder, with heatmaps, to --figure."""
    old = {*gallery_files(predictor.config)}
    for name, title, rows in gallery_pages(images, predictor.threshold):
        paths = [folder / images.path[row] for row in rows]
        (sheet,) = predictor.studies([Study(folder, paths)])  # one scale for all, as of a study
        tiles = [(view.pixels, view.cam, tile_caption(images, row))
                 for view, row in zip(sheet.views, rows, strict=True) if not view.error]
        file = Path(predictor.config.figure or "", name)
        atomic_write(file, gallery_sheet(tiles, title, sheet.scale))
        log(f"written: {file}")
        old.discard(file)
    for file in filter(is_ours, old):  # it would be taken for a sheet of this model
        file.unlink()


def report_subject(config: Config, scan: Scan) -> Content:
    """Return what a report is about: its split, models, names and labels, and what was chosen."""
    chosen = config.given & {"threshold", "tta", "drop_duplicates"} if config.mode == "E" else ()
    options = {name: getattr(config, name) for name in sorted(chosen)}
    models = [os.path.realpath(path) for path in config.checkpoint]
    lines = [f"{record.name},{record.label}\n" for record in scan.records]
    data = digest("".join([os.path.realpath(scan.folder), *lines]))
    return {"split": scan.split, "checkpoints": models, "data": data, "options": options}


def require_own_report(config: Config, scan: Scan) -> None:
    """Refuse to replace a report that is about something else, or foreign pictures.

    Raises:
        UserError: such a file is there, and --overwrite is not given.
    """
    files, is_own = report_files(config, scan.split), config.overwrite
    require_writable(files[0])
    if config.figure:
        if config.cam_class == "predicted":
            raise UserError("--cam-class predicted: a sheet of --evaluate has one scale; use "
                            "abnormal or normal")
        require_targets(config, "figure", gallery_files(config))
    with contextlib.suppress(OSError, ValueError, AttributeError):  # absent, or foreign
        earlier = json.loads(files[0].read_text())
        subject = report_subject(config, scan)
        is_own |= all(earlier.get(key) == value for key, value in subject.items())
    if not is_own:
        require_new(files, "it is of another split, model, data or options, or not of this "
                           "program: use another --output, or --overwrite")


# ---- predict: records ----


@dataclass
class ViewResult:
    """One image: what was read and what the models answered, or why it failed."""

    path: Path
    pixels: Pixels = field(repr=False)  # (H, W) of the original
    probability: float = math.nan  # of abnormal, the mean of the models
    # heatmap of the class explained, at most CAM_SIDE px a side; see CamMethod
    cam: Any = field(default=None, repr=False)
    box: Box | None = None  # of the strongest region, in the original's pixels
    error: str = ""
    warnings: Sequence[str] = ()
    # of each model, (S, S), only while it is answered; maps are by the class they explain
    inputs: Sequence[Pixels] = field(default=(), repr=False)
    maps: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)

    @property
    def heatmap(self) -> Array:
        """The heatmap at the original's pixels, (H, W)."""
        return resize_map(self.cam, *self.pixels.shape)


@dataclass
class Study:
    """An input: an image, or a study with its views, and what the models answered."""

    path: Path
    files: list[Path] = field(default_factory=list)
    uid: str = ""  # DICOM StudyInstanceUID
    error: str = ""
    views: Sequence[ViewResult] = ()
    probability: float = math.nan  # of abnormal, pooled from the readable views, if there are any
    threshold: float = 0.5
    scale: Any = None  # the HeatScale of its heatmaps

    @property
    def name(self) -> str:
        """Its path, and its StudyInstanceUID where files are a study by that."""
        return f"{self.path} ({self.uid})" if self.uid and len(self.files) > 1 else str(self.path)

    @property
    def readable(self) -> list[ViewResult]:
        """The views that have a probability."""
        return [view for view in self.views if not view.error]

    @property
    def label(self) -> str:
        """The predicted class, "normal" or "abnormal"; "" where no view could be read."""
        is_answered = not math.isnan(self.probability)
        return CLASSES[int(self.probability > self.threshold)] if is_answered else ""

    @property
    def confidence(self) -> float:
        """Probability of the predicted class."""
        return self.probability if self.label == "abnormal" else 1 - self.probability

    def at_prevalence(self, prevalence: float) -> float:
        """Return the probability where this fraction is abnormal."""
        return float(correct_prevalence(np.array(self.probability), prevalence))

    @property
    def heatmaps(self) -> list[Array]:
        """The heatmap of each readable view, (H, W)."""
        return [view.heatmap for view in self.readable]

    @property
    def summary(self) -> str:
        """Class and confidence in words; the probability at a threshold other than 0.5."""
        if self.threshold == 0.5:
            return f"{self.label}, confidence {percent(self.confidence)}"
        return f"{self.label}, threshold {self.threshold:.3g}"

    @property
    def explanation(self) -> tuple[Any, ...]:
        """Views, lines of the heading, and the scale of its figure."""
        heading = ["/".join(Path(self.name).parts[-4:]), f"{self.summary} - {RESEARCH_ONLY}"]
        return self.readable[:FIGURE_ROWS], heading, self.scale

    def figure(self) -> Any:
        """Return a matplotlib figure with original | heatmap | overlay of each view."""
        figure = new_figure()
        draw_explanation(figure, *self.explanation)
        return figure


def percent(probability: float) -> str:
    """Return a probability as text, never 100 % or 0 %, which none means."""
    if probability >= 0.9995:
        return "above 99.9%"
    return f"{probability:.1%}" if probability >= 0.0005 else "below 0.1%"


# ---- predict: inputs ----


def collect_inputs(paths: Iterable[Path]) -> Iterator[Study]:
    """Yield files, folders and study folders in the order given, natural within folders."""
    for path in paths:
        if os.path.isdir(path):  # unlike Path.is_dir, it never raises
            yield from search_folder(path) or [Study(path, error="holds no images")]
        else:
            header = read_header(path) or ImageHeader()
            yield Study(path, [path], uid=header.study_uid)


def search_folder(top: Path) -> list[Study]:
    """Return the images and studies in a folder, judged by their content.

    A folder named study1, study1_positive, ... is a study (several, where its DICOM files have
    several StudyInstanceUIDs), and so are the DICOM files elsewhere of one StudyInstanceUID; any
    other image stands for itself. What is left out is counted.
    """
    closed, skipped, uids = list[OSError](), list[str](), dict[Path, str]()
    uids_in: defaultdict[Path, set[str]] = defaultdict(set)
    for path in walk_files(top, closed.append):
        if header := input_header(path):
            uids[path] = header.study_uid
            uids_in[path.parent] |= {header.study_uid} - {""}
        else:
            skipped.append(path.name)
    found: dict[object, Study] = {}
    for path, uid in uids.items():
        folder, place = path.parent, path
        key: object = uid or path
        if STUDY_FOLDER.fullmatch(os.path.basename(os.path.realpath(folder))):
            if len(uids_in[folder]) == 1:
                (uid,) = uids_in[folder]  # also of its files that have none
            key, place = (folder, uid), folder
        study = found.setdefault(key, Study(place, uid=uid))
        if study.files:
            study.path = Path(os.path.commonpath([study.path, folder]))
        study.files.append(path)
    if skipped:
        warn(f"{top}: {len(skipped)} of the files are no images, left out, such as {skipped[0]}")
    errors = [Study(Path(error.filename), error=f"cannot be read ({error.strerror})")
              for error in closed]
    return [*found.values(), *errors]


def input_header(path: Path) -> ImageHeader | None:
    """Return what a file in a folder says about itself, or None if it is to be left out.

    That is what --predict saved there, and what is no image; but a damaged file with an image's
    suffix is an input, which fails.
    """
    if path.name.endswith(HEATMAP_ENDING) and is_ours(path):
        return None
    header = read_header(path)
    if header or path.suffix.lower() not in IMAGE_SUFFIXES:
        return header
    is_report = False
    with OPTIONAL:
        if path.is_file():
            with path.open("rb") as file:
                is_report = _image_format(file.read(HEAD_BYTES)) == "DICOM"
    return None if is_report else ImageHeader()


def walk_files(top: Path, onerror: Callable[[OSError], object]) -> Iterator[Path]:
    """Yield the files below a folder, but hidden ones; links are followed, each folder once."""
    seen: set[str] = set()
    for folder, *children in os.walk(top, onerror=onerror, followlinks=True):
        place = os.path.realpath(folder)
        for names in children:
            visible = [name for name in names if name[0] != "." and place not in seen]
            names[:] = sorted(visible, key=natural_key)
        seen.add(place)
        yield from (Path(folder, name) for name in children[1])


# ---- predict: from files to results ----


class Predictor:
    """Reads, classifies and explains images with an ensemble.

    Args:
        config: threshold, heatmap method and class, batch size and number of decoding threads.
        ensemble: the models.
    """

    def __init__(self, config: Config, ensemble: Ensemble) -> None:
        self.config, self.ensemble, self.method = config, ensemble, CAM_METHODS[config.cam]
        self.threshold, _ = decision_threshold(config, ensemble.models)

    def predict(self, path: str | Path) -> Study:
        """Return the result of an image or of a study's folder, as --predict finds it there.

        Raises:
            UserError: nothing in it can be read, or it holds several images or studies.
        """
        inputs = list(collect_inputs([Path(path)]))
        if len(inputs) > 1:
            raise UserError(f"{path}: holds {len(inputs)} images or studies; name one image, or "
                            "put each study into a folder of its own called study1, study2, ...")
        (study,) = self.studies(inputs)
        if not study.label:
            raise UserError(f"{path}: {study.error}", EXIT_FAILED)
        return study

    def studies(self, studies: Sequence[Study]) -> Iterator[Study]:
        """Yield each input with its answer, in order; images are decoded ahead."""
        size, workers = self.config.eval_batch_size, self.config.workers
        paths = (path for study in studies for path in study.files)
        views = self.classify(map_ahead(self.read, paths, workers, size))
        for study in studies:
            found = list(itertools.islice(views, len(study.files)))
            yield self.pool(replace(study, views=found))  # a copy: its images go when it goes

    def read(self, path: Path) -> ViewResult:
        """Return a decoded image with each model's input, or why it cannot be read."""
        try:
            radiograph = read_radiograph(path)
        except (BadImage, OSError) as error:
            return ViewResult(path, np.zeros((0, 0), np.uint8), error=str(error))
        models, found = self.ensemble.models, [radiograph.warning] if radiograph.warning else []
        if doubt := unlike_radiograph(radiograph):
            found.append(f"does not look like a radiograph ({doubt}); the result is unreliable")
        named = re.findall(r"(?i)\bXR_\w+", str(path.absolute().parent))
        found += body_part_warnings(models, radiograph.body_part or "".join(named[-1:]))
        inputs = [resize_square(radiograph.pixels, *model.resizing) for model in models]
        return ViewResult(path, radiograph.pixels, warnings=found, inputs=inputs)

    def classify(self, views: Iterator[ViewResult]) -> Iterator[ViewResult]:
        """Yield images with what the models answer, a batch at a time, in order."""
        while batch := list(itertools.islice(views, self.config.eval_batch_size)):
            if readable := [view for view in batch if not view.error]:
                self.answer(readable)
            yield from batch

    def answer(self, views: Sequence[ViewResult]) -> None:
        """Set the probabilities of a batch, and the models' maps."""
        ensemble, explained = self.ensemble, self.config.cam_class
        device = ensemble.hardware.device
        batches = zip(*(view.inputs for view in views), strict=True)
        images = [torch.from_numpy(np.stack(batch)[:, None]).to(device) for batch in batches]
        for name in [explained] if explained in SIGNS else SIGNS:
            logits, maps = ensemble.explain(images, self.method, SIGNS[name])
            for view, *heats in zip(views, *maps, strict=True):
                view.maps[name] = heats
        mean = ensemble.probabilities(logits.cpu().double().numpy()).mean(axis=0)
        for view, probability in zip(views, mean.tolist(), strict=True):
            view.probability = probability
            if not math.isfinite(view.probability):
                view.error = "the model's output is not finite"

    def pool(self, study: Study) -> Study:
        """Return an input with its answer, from its views, whose heatmaps and boxes are set."""
        each = [view.probability for view in study.readable]
        if each:
            study.probability = pool_views(each, self.ensemble.study_temperature)
        study.threshold, explained = self.threshold, self.config.cam_class
        if explained == "predicted":
            explained = study.label
        for view in study.readable:
            self.place_heatmap(view, explained)
        heatmaps = [view.cam for view in study.readable]
        study.scale = heat_scale(explained, self.method.unit, heatmaps)
        errors = [f"{view.path.name}: {view.error}" for view in study.views if view.error]
        if errors:
            study.error = "; ".join(errors) if len(study.views) > 1 else study.views[0].error
        return study

    def place_heatmap(self, view: ViewResult, explained: str) -> None:
        """Set the heatmap of a class, and the box of an image."""
        sign, (height, width) = SIGNS[explained], view.pixels.shape
        scale = min(1, CAM_SIDE / max(height, width))
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
        maps = []
        for heat, model in zip(view.maps[explained], self.ensemble.models, strict=True):
            left, top, right, bottom = letterbox_box(height, width, *model.resizing)
            maps.append(resize_map(heat[top:bottom, left:right].cpu().numpy(), rows, columns))
        view.cam = np.mean(maps, axis=0)
        view.inputs, view.maps = (), {}
        above = sign * log_odds_above(view.probability, self.threshold)
        if not self.method.classical:
            view.cam *= np.float32(max(above, 0) / max(view.cam.max(), 1e-30))
        box = strongest_region(view.cam)
        if box and sign > 0 and above > 0:
            left, top, right, bottom = (round(edge / scale) for edge in box)
            view.box = left, top, min(right, width), min(bottom, height)


def load_predictor(config: Config) -> Predictor:
    """Return what answers for the models of --checkpoint."""
    hardware = choose_precision(choose_device(config.device), config.precision)
    return Predictor(config, load_ensemble(config, hardware))


# ---- predict: the command ----


def predict_command(config: Config, signals: StopSignals) -> int:
    """Classify and explain what --predict names; returns the exit code."""
    inputs = list(collect_inputs(config.predict))
    for flag, path in (("output", config.output), ("save-cam", config.save_cam)):
        if path:
            require_targets(config, flag, [path], inputs)
    figures, predictor = figure_files(config, inputs), load_predictor(config)
    draw = config.figure or len(inputs) == 1
    show = draw and can_show(config.no_show)
    warn(RESEARCH_ONLY)
    rows: list[Content] = []
    output_due = time.monotonic() + 1
    bar = Progress(len(inputs), "predict", "inputs")
    try:
        with bar, open_maps(config.save_cam) as archive:
            for study, figure in zip(predictor.studies(inputs), figures, strict=True):
                rows.append(full_row(config, study))
                print_result(study, config.prevalence)
                if archive:
                    save_maps(archive, study)
                if study.label:
                    explain_result(study, figure, show=show and len(rows) <= WINDOWS)
                bar.advance()
                signals.check()
                if time.monotonic() > output_due:
                    output_due = write_output(config.output, rows)
    finally:  # what was predicted before a stop is kept
        write_output(config.output, rows)
    if show:
        warn("the program ends when its windows are closed")
        show_windows()
    if not any(row["error"] for row in rows):
        return EXIT_DONE
    return EXIT_SOME_FAILED if any(row["prediction"] for row in rows) else EXIT_FAILED


def figure_files(config: Config, inputs: Sequence[Study]) -> list[Path | None]:
    """Return the file of each input's figure; None for several inputs without --figure.

    Nor is there one where the default figure of one input cannot be written, which is told.

    Raises:
        UserError: one picture is named for several inputs, or as of `require_targets`.
    """
    figure, several = config.figure, len(inputs) > 1
    if several and not figure:
        return [None] * len(inputs)
    # unlike Path.resolve, realpath takes links in a circle; file systems take 255 bytes
    stems = [Path(os.path.realpath(study.path)).stem for study in inputs]
    names = [os.fsdecode(os.fsencode(stem)[:200]) + HEATMAP_ENDING for stem in stems]
    if several:
        names = [f"{i:04d}_{name}" for i, name in enumerate(names, 1)]
    files = [Path(figure or "", name) for name in names]
    if figure and figure.suffix.lower() in FIGURE_SUFFIXES:
        if several:
            raise UserError(f"--figure {figure}: name a folder for several inputs")
        files = [figure]
    try:
        require_targets(config, "figure", files, inputs)
    except UserError as error:
        if figure:
            raise
        warn(f"{error}; the figure is not saved")
        return [None]
    return [*files]


def require_targets(
    config: Config, flag: str, paths: Sequence[Path], inputs: Iterable[Study] = ()
) -> None:
    """Check before the work that the files of a flag can be written and replace nothing foreign.

    Raises:
        UserError: one is read, cannot be written, or is there and not of this program.
    """
    read = {*map(os.path.realpath, config.checkpoint)}
    for study in inputs:
        read.update(map(os.path.realpath, study.files))
    require_writable(paths[0])
    for path in paths:
        if os.path.realpath(path) in read:
            raise UserError(f"--{flag} {path}: is an input, and would be replaced")
        if path.exists() and not config.overwrite and not is_ours(path):
            raise UserError(f"--{flag} {path}: is there and not a file of this program; choose "
                            "another name, or --overwrite")


def output_row(config: Config, study: Study) -> Content:
    """Return what --output says of an input, or of one of its views."""
    row: Content = dict.fromkeys(OUTPUT_COLUMNS) | {
        "path": str(study.path), "error": study.error or None, "study_uid": study.uid or None,
        "threshold": study.threshold, "model": " ".join(map(str, config.checkpoint)),
        "version": f"{PROGRAM} {__version__}", "date": time.strftime(DATE_FORMAT)}
    if study.label:
        row |= {"prediction": study.label, "confidence": study.confidence,
                "probability": study.probability}
        if config.prevalence:
            row["probability_at_prevalence"] = study.at_prevalence(config.prevalence)
    if study.label == "abnormal":
        strongest = max(study.readable, key=lambda view: view.probability)
        row["view"] = strongest.path.name
        if strongest.box:
            row |= zip(("left", "top", "right", "bottom"), strongest.box, strict=True)
    return row


def full_row(config: Config, study: Study) -> Content:
    """Return the row of an input, with the rows of its views."""
    views = [replace(study, path=view.path, views=[view], probability=view.probability,
                     error=view.error) for view in study.views]
    return output_row(config, study) | {"views": [output_row(config, view) for view in views]}


def write_output(path: Path | None, rows: Sequence[Content]) -> float:
    """Write --output, if it is asked for and there are rows, as its suffix says.

    Returns:
        When to do so again, by `time.monotonic`: all rows are written each time, so the next time
        is after a second, or ten times as long as it took.
    """
    began = time.monotonic()
    if path and rows:
        is_json = path.suffix == ".json"
        atomic_write(path, json_text(rows) if is_json else csv_text(rows, OUTPUT_COLUMNS))
    ended = time.monotonic()
    return ended + max(1, 10 * (ended - began))


def print_result(study: Study, prevalence: float | None) -> None:
    """Print an input, a line on stdout (and one a view of a study), or on stderr why it failed."""
    for view in study.views:
        for text in view.warnings:
            warn(f"{view.path}: {text}")
    if study.error:
        warn(f"{study.name}: {study.error}")
    if not study.label:
        return
    notes = f"probability of abnormal {percent(study.probability)}"
    if prevalence:
        notes += f", {percent(study.at_prevalence(prevalence))} at --prevalence"
    several = len(study.views) > 1
    if several:
        notes += f", {len(study.readable)} of {len(study.views)} views"
    log(f"{study.name}: {study.summary} ({notes})")
    for view in study.readable if several else ():
        log(f"    {view.path.name}: probability of abnormal {percent(view.probability)}")


@contextlib.contextmanager
def open_maps(path: Path | None) -> Iterator[zipfile.ZipFile | None]:
    """Yield the archive of --save-cam, if it is asked for.

    An OSError within is the archive's: that of an input is its result, of another file a UserError.
    """
    if not path:
        yield None
        return
    stop = None
    with (temporary_file(path) as temporary, writing(path),
          zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive):
        archive.comment = PROGRAM.encode()
        try:
            yield archive
        except Stopped as stopped:  # the maps before it are kept
            stop = stopped
    if stop:
        raise stop


def save_maps(archive: zipfile.ZipFile, study: Study) -> None:
    """Add a result's heatmaps to the .npz archive, by the path of their images.

    As numpy.savez_compressed does, which does not take an image of the name "file".
    """
    for view in study.readable:
        name = str(view.path).encode(errors="backslashreplace").decode() + ".npy"  # any bytes
        if name not in archive.NameToInfo:  # else given twice
            with archive.open(name, "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, view.heatmap)


def explain_result(
    study: Study, file: Path | None, *, show: bool, lesion: Box | None = None
) -> None:
    """Draw original | heatmap | overlay of an input, a row a view: a file, a window or both."""
    if not (file or show):
        return
    content = save_explanation(
        *study.explanation, lesion, suffix=file.suffix if file else ".png",
        window=study.path.name if show else "")
    if file:
        atomic_write(file, content)
        count = len(study.readable)
        rest = f" (the first {FIGURE_ROWS} of {count} views)" if count > FIGURE_ROWS else ""
        log(f"    figure: {file}{rest}")


# ---- export ----


class ExportedModel(nn.Module):
    """A model with its preprocessing as --export writes it."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.model, self.network = model, model.network  # a module of this one, so exported

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities (B,) of grey images (B, 1, S, S), 0 to 1."""
        return torch.sigmoid(self.model.logits(images) / self.model.temperature)


def to_pt2(program: Any, about: Mapping[str, str], images: Tensor) -> tuple[bytes, Array]:
    """Return a .pt2 file, which holds `about` as about.json, and its output for images."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"about.json": json.dumps(about)})
    content = file.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()(images).numpy(force=True)


def to_onnx(program: Any, about: Mapping[str, str], images: Tensor) -> tuple[bytes, Array]:
    """Return an .onnx file, whose metadata is `about`, and its output for images."""
    import onnx  # noqa: F401
    import onnxruntime
    import onnxscript  # noqa: F401

    quiet = warnings.catch_warnings(action="ignore")
    with quiet, contextlib.redirect_stdout(io.StringIO()):
        exported: Any = torch.onnx.export(
            program, input_names=["images"], output_names=["probability"], dynamo=True)
    model = exported.model_proto  # a new one at each call
    for name, text in about.items():
        model.metadata_props.add(key=name, value=text)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, session.run(None, {"images": images.numpy()})[0]


def export_command(config: Config, signals: StopSignals) -> int:
    """Write the model of --checkpoint as ONNX or .pt2, and compare the file's output with torch's.

    Raises:
        UserError: an optional package is missing, or the outputs differ by more than 1e-4.
    """
    target = config.export or Path()
    require_targets(config, "export", [target])
    (model,) = load_ensemble(config, CPU).models
    side = model.image_size
    about = {
        "input": f"grey, float32 (batch, 1, {side}, {side}), 0 black to 1 white, resize: "
                 f"{model.resize}",
        "output": "probability of abnormal (batch,)", "use": RESEARCH_ONLY,
        "threshold": str(decision_threshold(config, [model])[0]),
        "architecture": model.network.name, "program": f"{PROGRAM} {__version__}"}
    for name in ("normalization", "tta", "temperature", "study_temperature"):
        about[name] = str(getattr(model, name))
    probe = torch.rand(3, 1, side, side, generator=torch.Generator().manual_seed(1))
    module, shapes = ExportedModel(model).eval(), ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(module, (probe[:2],), dynamic_shapes=shapes)
    convert = to_onnx if target.suffix == ".onnx" else to_pt2
    try:
        content, output = convert(program, about, probe)
    except ImportError as error:
        raise UserError(f"--export {target}: needs optional packages: pip install onnx onnxscript "
                        "onnxruntime") from error
    gap = float(np.abs(output - module(probe).numpy(force=True)).max())
    if not gap <= EXPORT_TOLERANCE:
        raise UserError(f"{target}: not written, for it differs by {gap:.2g} from torch's output; "
                        "try the other format", EXIT_FAILED)
    atomic_write(target, content)
    log(f"written: {target}; largest difference from torch {gap:.1g}")
    return EXIT_DONE


# ---- commands on data sets ----


def command_line(arguments: Sequence[str]) -> str:
    """Return the command that starts this program with these arguments, for a shell."""
    is_found = shutil.which("python") == sys.executable
    return shlex.join(["python" if is_found else sys.executable, sys.argv[0], *arguments])


def start(config: Config) -> tuple[DevicePrecision, Distributed]:
    """Choose the device, and join the other processes of a torchrun job."""
    distributed = Distributed()
    processes = distributed.world_size
    if config.mode == "T" and processes > 1 and config.batch_size < 2 * processes:
        raise UserError(f"--batch-size {config.batch_size}: is of all processes together; "
                        f"{processes} need {2 * processes} or more")
    device = choose_device(config.device, distributed.local_rank)
    hardware = choose_precision(device, config.precision)
    distributed.start(device)
    log(f"device: {hardware}, {processes} process{'es' * (processes > 1)}")
    return hardware, distributed


def scan_data(config: Config, split: str) -> tuple[Config, Scan]:
    """Return the images of a split or of --labels; the options get their and the cache's folder."""
    if config.labels:
        root = config.data_dir or config.labels.parent
        scan = scan_labels(config.labels, root, config.tasks)
    else:
        root = find_data_root(config.data_dir or Path())
        scan = scan_split(root, split, config.tasks)
    for line in count_table(scan):
        log(line)
    return replace(config, data_dir=root, cache_dir=config.cache_dir or cache_folder(root)), scan


def shared_decode(
    config: Config, scan: Scan, resizing: Resizing, distributed: Distributed
) -> list[CachedImage]:
    """Return the decoded images of a scan; one process of each machine decodes, the others wait."""
    folder, builds = config.cache_dir or Path(), distributed.local_rank == 0
    if not builds:
        distributed.wait_for_decoding()
    caches = decode_scan(scan, *resizing, folder, config.workers)
    if builds:
        distributed.wait_for_decoding()
    return caches


def evaluate_command(config: Config, signals: StopSignals) -> int:
    """Evaluate saved models on a split."""
    hardware, distributed = start(config)
    config, scan = scan_data(config, config.split)
    require_own_report(config, scan)
    ensemble = load_ensemble(config, hardware)
    evaluate_ensemble(config, ensemble, scan, distributed, signals)
    return EXIT_DONE


def train_command(config: Config, signals: StopSignals) -> int:
    """Train, keep the best model by --select, then evaluate it once on valid/."""
    lock = run_lock(config.file(".lock")) if is_main_process() else contextlib.nullcontext()
    with lock:
        content = saved_state(config)
        if content:
            config = resumed_config(config, content)
        require_writable(config.checkpoint[0])
        hardware, distributed = start(config)
        distributed.require_shared(config.file(".lock"))
        config, scan = scan_data(config, "train")
        for text in scan.notes:
            warn(text)
        test = None
        if not config.labels and (scan.folder.parent / "valid").is_dir():
            _, test = scan_data(config, "valid")
        trainer = make_trainer(config, content, scan, hardware, distributed, signals)
        if test:  # before the work: images that cannot be read may end the run
            resizing = trainer.config.image_size or 0, config.resize
            decoded = shared_decode(config, test, resizing, distributed)
            report_bad_images(test, decoded, config.on_bad_image)
        trainer.fit()
        if test:
            ensemble = load_ensemble(config, hardware)
            evaluate_ensemble(config, ensemble, test, distributed, signals)
        else:
            warn("no valid/ of this data, so no test; --evaluate --labels tests on other images")
        model, state = config.checkpoint[0], trainer.state
        log(f"best model: {model} (epoch {state.best_epoch} of {state.epoch}, by val "
            f"{config.select})")
        log(f"next: {command_line(['--predict', 'IMAGE', '--checkpoint', str(model)])}")
    return EXIT_DONE


def saved_state(config: Config) -> Content:
    """Return the content of STEM.last.pth where --resume goes on with it; empty for a new run.

    Raises:
        UserError: it is not there, or not usable; or a new run would replace another.
    """
    path = config.file(".last.pth")
    if config.resume and path.exists():
        content = read_checkpoint(path, "state")
        if not {*LEARNT, *KEPT} <= content["settings"].keys() | content["kept"].keys():
            raise UserError(f"--resume {path}: written by another version of this program "
                            f"({content['version']}); start a new run")
        return content
    if config.resume and config.resume != "auto":
        raise UserError(f"--resume: there is no {path}; --resume auto starts a new run in such a "
                        "case")
    if not config.overwrite and is_main_process():
        goes_on = "--resume continues that run, " if path.exists() else ""
        require_new(map(config.file, RUN_FILES), f"{goes_on}--overwrite replaces it, or use "
                    "another --checkpoint")
    return {}


def make_trainer(
    config: Config, content: Content, scan: Scan, hardware: DevicePrecision,
    distributed: Distributed, signals: StopSignals,
) -> Trainer:
    """Return the trainer of a new run, or of one that goes on from the `content` of its state."""
    sides = split_by_patient(scan.records, config.val_split, config.seed)
    for label in {0, 1}.difference(record.label for record in sides[0]):
        raise UserError(f"no training image is {CLASSES[label]}; training needs both classes")
    network, seen = initial_network(config, resumed=bool(content))
    size = config.image_size or choose_image_size(scan.records)
    tta = config.hflip > 0 if config.tta is None else config.tta
    config = replace(config, image_size=size, model=network.name, tta=tta)
    caches = shared_decode(config, scan, (size, config.resize), distributed)
    bad_images = report_bad_images(scan, caches, config.on_bad_image)
    train, val = (MuraDataset(image for image in caches if image.record in side)
                  for side in map(set, sides))
    patients = {}
    for name, dataset in (("train", train), ("val", val)):
        patients[name] = sorted({record.patient for record in dataset.records})
        if not patients[name]:
            raise UserError(f"{scan.folder}: no image of {name} can be read; replace the bad "
                            "ones, or change --val-split", EXIT_FAILED)
        log(f"{name}: {len(dataset)} images of {len(patients[name])} patients, {size} x {size} px")
    if leaked := seen.intersection(patients["val"]):
        warn(f"--weights {config.weights}: has seen {len(leaked)} patients of val: validation, "
             "temperature and the choice of the epoch are optimistic (leakage)")
    trained_on = content.get("trained_on") or {
        "bad_images": len(bad_images),
        "patients": patients | {"train": sorted(seen.union(patients["train"]))},
        "body_parts": sorted({record.body_part for record in train.records})}
    trainer = Trainer(config, network, train, val, hardware, distributed, signals, trained_on)
    if content:
        trainer.resume(content)
    else:
        trainer.save_state()  # first, and over that of a run that is replaced
    if distributed.rank == 0:
        split = [{"patient": patient, "split": name}
                 for name, names in patients.items() for patient in names]
        atomic_write(config.file(".split.csv"), csv_text(split, ("patient", "split")))
    return trainer


def initial_network(config: Config, *, resumed: bool) -> tuple[Network, set[str]]:
    """Return a network with the weights of --weights, and the patients that these have seen.

    Raises:
        UserError: the weights are not available, or do not fit.
    """
    torch.manual_seed(config.seed)
    source = "none" if resumed else config.weights
    content: Content = {}
    if source == "imagenet":
        content = imagenet_weights(config.model)
    elif source != "none":
        content = read_weights(Path(source), "--weights wants imagenet, none, or a file of weights")
    if content.get("format") != PROGRAM:
        network = Network(config.model)
        if source != "none":
            load_backbone(network, content, source)
        return network, set()
    try:
        network = Network(content["model"])
        network.load_state_dict(content["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise UserError(f"--weights {source}: is not a model (STEM.pth) of this version of this "
                        "program") from error
    require_finite(content["state_dict"], f"--weights {source}")
    if "model" in config.given and config.model != network.name:
        raise UserError(f"--weights {source}: is a {network.name}, not a {config.model}; leave "
                        "--model out")
    return network, {*itertools.chain(*content["patients"].values())}


# ===== 11 phantoms and demo =======================================================================

Rng = np.random.Generator
Field = Array  # (H, W), a value for each pixel
PHANTOM_LIST = "phantoms.csv"  # its presence tells a folder of phantoms from one of radiographs
PHANTOM_BONES = {
    # Rows of bones from top to bottom: count, half width, lower end; unit: half the image height.
    # The first row are the shafts: they come in over the upper edge and have the lesions.
    "XR_FOREARM": ((2, 0.105, 0.60), (3, 0.12, 0.92)),
    "XR_HUMERUS": ((1, 0.165, 0.62), (2, 0.13, 3.0)),
}


class Bone(NamedTuple):
    """A hollow bone that runs down the image; unit: half the image height."""

    center: float  # across, from the middle of the limb
    half_width: float
    top: float
    bottom: float


class Change(NamedTuple):
    """What a lesion does to a bone, a value for each pixel."""

    shift: Field | float = 0  # displacement sideways, in half widths of the bone
    loss: Field | float = 0  # fraction of the bone that is gone
    metal: Field | float = 0  # attenuation that is added


def _fracture(rng: Rng, along: Field, across: Field) -> Change:
    """Return a jagged oblique break, below which the bone is displaced and tilted back."""
    jags = 0.12 * np.sin(6 * across + rng.uniform(0, 6))
    below = along - rng.uniform(-0.7, 0.7) * across - jags
    displaced = (below > 0) * rng.choice((-0.75, 0.75))
    tilt = (1 - along / 4).clip(0, 1)
    return Change(shift=displaced * tilt, loss=0.9 * np.exp(-16 * below**2))


def _lytic(rng: Rng, along: Field, across: Field) -> Change:
    """Return a hole with a wavy rim, in marrow and cortex."""
    along = along / rng.uniform(1.1, 1.7)
    across = across - rng.uniform(-0.3, 0.3)
    angle = np.arctan2(across, along)
    rim = rng.uniform(0.75, 0.95) + 0.08 * np.sin(rng.integers(2, 5) * angle)
    depth = 4 * (rim - np.hypot(along, across))
    return Change(loss=0.85 * depth.clip(0, 1))


def _hardware(rng: Rng, along: Field, across: Field) -> Change:
    """Return a plate on one side of the bone, with screws through both cortices."""
    across = across * rng.choice((-1, 1))
    pitch = 0.85  # distance between screws
    half_length = rng.integers(4, 7) * pitch / 2
    plate = np.abs(across - 1.15) < 0.2
    to_screw = (along + half_length) % pitch - pitch / 2
    screws = (np.abs(to_screw) < 0.11) & (np.abs(across) < 1.1)
    return Change(metal=5 * (plate | screws) * (np.abs(along) < half_length))


# Each gets the distances along and across the bone from the middle of the lesion, in half widths.
LESIONS = {"fracture": _fracture, "lytic": _lytic, "hardware": _hardware}


def _place_bones(rng: Rng, body_part: str) -> list[Bone]:
    """Return the bones of a body part, a little different each time."""
    bones, top = [], -2.0
    for count, half_width, bottom in PHANTOM_BONES[body_part]:
        for number in range(count):
            center = 0.8 * ((number + 0.5) / count - 0.5)
            bones.append(Bone(center, half_width * rng.uniform(0.85, 1.15), top, bottom))
        top = bottom + 0.08
    return bones


def _draw_bone(bone: Bone, down: Field, across: Field) -> Field:
    """Return the attenuation of a bone: thick cortex in the shaft, thin at the wider ends."""
    to_end = np.minimum(down - bone.top, bone.bottom - down).clip(0) / bone.half_width
    flare = np.exp(-(to_end**2) / 2.5)
    outer = (1 + 0.45 * flare) * np.sqrt(np.minimum(to_end / 0.6, 1))
    inner = (outer - 0.38 + 0.26 * flare).clip(0)
    offset = (across - bone.center) / bone.half_width
    solid = np.sqrt((outer**2 - offset**2).clip(0))  # path of a ray through a cylinder
    marrow = np.sqrt((inner**2 - offset**2).clip(0))
    attenuation: Field = solid - 0.8 * marrow
    return attenuation


def _draw_lesion(
    rng: Rng, kind: str, bone: Bone, down: Field, across: Field
) -> tuple[Field, Field]:
    """Return the attenuation of a bone with a lesion, and where the lesion is."""
    width = bone.half_width
    middle = rng.uniform(-0.45, bone.bottom - 3 * width)
    offset = (across - bone.center) / width
    change = LESIONS[kind](rng, (down - middle) / width, offset)
    displaced = _draw_bone(bone, down, across - width * change.shift)
    site = (change.loss + change.metal > 0.1) & (np.abs(offset) < 1.5)
    return displaced * (1 - change.loss) + change.metal, site


def _expose(rng: Rng, attenuation: Field) -> Image.Image:
    """Return the film: exposure, noise that grows with attenuation, blur, lead letter."""
    height, width = attenuation.shape
    signal = 1 - np.exp(-rng.uniform(0.75, 1.3) * attenuation)
    noise = rng.uniform(0.012, 0.03) * rng.standard_normal(signal.shape) * (1 + 1.5 * signal)
    film = 0.05 + signal + noise
    image = Image.fromarray((255 * film).clip(0, 255).astype(np.uint8))
    place = rng.choice((12, 85)) * width // 100, rng.integers(height - 12)
    font = ImageFont.load_default_imagefont()  # bitmaps: the same on every machine
    ImageDraw.Draw(image).text(place, "LR "[rng.integers(3)], 235, font)
    return image.filter(ImageFilter.GaussianBlur(height / 400))


def draw_phantom(
    rng: Rng, size: int = 256, body_part: str = "XR_FOREARM", kind: str = ""
) -> tuple[Pixels, Box | None]:
    """Return a phantom radiograph of `size` rows, and the box of its lesion, if it has one.

    With an equal `rng` images differ in the lesion alone; `kind` is a key of LESIONS, or "".
    """
    limb_rng, lesion_rng = rng.spawn(2)
    width = int(size * limb_rng.uniform(0.72, 0.9))
    down = np.linspace(-1, 1, size)[:, None]
    across = np.linspace(-1, 1, width) * width / size
    across = across + limb_rng.uniform(-0.05, 0.05) * down**2  # slightly bowed
    bones = _place_bones(limb_rng, body_part)
    shadows = [_draw_bone(bone, down, across) for bone in bones]
    site = np.zeros((size, width), bool)
    if kind:
        chosen = lesion_rng.integers(PHANTOM_BONES[body_part][0][0])
        shadows[chosen], site = _draw_lesion(lesion_rng, kind, bones[chosen], down, across)
    reach = limb_rng.uniform(0.46, 0.58) - 0.06 * down
    flesh = 0.42 * np.sqrt((1 - (across / reach) ** 2).clip(0))
    coarse = Image.fromarray(limb_rng.standard_normal((size // 5, size // 5), np.float32))
    texture = 1 + 0.08 * np.asarray(coarse.resize((width, size)))
    film = _expose(limb_rng, flesh + sum(shadows) * texture)
    angle = limb_rng.uniform(-18, 18)
    turned_site = Image.fromarray(site).rotate(angle)
    return np.asarray(film.rotate(angle, Image.Resampling.BILINEAR)), turned_site.getbbox()


def _plan_images(folder: str, first_patient: int, count: int) -> dict[str, str]:
    """Return, for the image paths of so many studies, the kind of lesion (empty: normal)."""
    images, kinds = {}, list(LESIONS)
    for number in range(count):
        patient = first_patient + number - (number + 1) // 5  # every fourth patient has two studies
        study = 2 if number % 5 == 4 else 1
        kind = kinds[number // 2 % len(kinds)] if number % 2 else ""
        label = "positive" if kind else "negative"
        name = f"{folder}/patient{patient:05}/study{study}_{label}"
        for view in range(1, 2 + zlib.crc32(name.encode()) % 3):
            images[f"{name}/image{view}.png"] = kind
    return images


def _write_phantom(image: tuple[str, str], folder: Path, size: int, seed: int) -> str:
    """Draw and save one image, as path, kind and seed decide; return its row of PHANTOM_LIST."""
    path, kind = image
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    pixels, box = draw_phantom(rng, size, path.split("/")[2], kind)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / path, compress_level=1)
    return f"{path},{kind},{','.join(map(str, box))}" if box else ""


def write_phantoms(
    folder: Path, train: int, valid: int, parts: Sequence[str] = tuple(PHANTOM_BONES),
    seed: int = 0, size: int = 256,
) -> Path:
    """Write phantoms, `size` pixels high, in MURA's layout; returns the new folder MURA-v1.1.

    It holds so many studies of each body part in train/ and valid/, half of them abnormal, and
    PHANTOM_LIST, which says where lesions are (see read_lesion_boxes).
    """
    root = folder / "MURA-v1.1"
    root.mkdir(parents=True, exist_ok=True)
    (root / PHANTOM_LIST).touch()  # first of all: a demo that was stopped may run again
    lesions = ["path,kind,left,top,right,bottom"]
    write = partial(_write_phantom, folder=folder, size=size, seed=seed)
    for split, first_patient, count in (("train", 1, train), ("valid", 11185, valid)):  # as in MURA
        for order, part in enumerate(parts):  # some patients come with two body parts, as in MURA
            patient = first_patient + order * count // 2
            images = _plan_images(f"{root.name}/{split}/{part}", patient, count)
            lesions += filter(None, map_ahead(write, images.items(), workers=0, ahead=64))
    (root / PHANTOM_LIST).write_text("\n".join(lesions))
    return root


def read_lesion_boxes(root: Path) -> dict[Path, Box]:
    """Return the lesion's box of each abnormal image in valid/ of a data set of phantoms."""
    boxes = {}
    with (root / PHANTOM_LIST).open() as file:
        for path, _, left, top, right, bottom in csv.reader(file):
            if "/valid/" in path:
                boxes[root.parent / path] = int(left), int(top), int(right), int(bottom)
    return boxes


# ---- demo ----

DEMO_STUDIES = (136, 36)  # of train and valid, of each body part


def pointing_game(
    results: Sequence[Study], boxes: Mapping[Path, Box]
) -> str:
    """Return how often the heatmap peaks in the lesion's box, and how much of it lies there.

    The pointing game of arXiv 1608.00507, on images that were called abnormal; chance is the box's
    fraction of the image.
    """
    hits, fractions, chances = [], [], []
    for result in results:
        (heatmap,) = result.heatmaps
        left, top, right, bottom = boxes[result.path]
        inside = np.zeros(heatmap.shape, bool)
        inside[top:bottom, left:right] = True
        hits.append(inside.flat[heatmap.argmax()])
        fractions.append(heatmap[inside].sum() / max(heatmap.sum(), 1e-12))
        chances.append(inside.mean())
    return (f"heatmap: peak in the lesion's box in {np.mean(hits):.0%} of {len(hits)} abnormal "
            f"images that were called so, {np.mean(fractions):.0%} of the heat in it (by chance "
            f"{np.mean(chances):.0%})")


def demo_command(config: Config, signals: StopSignals) -> int:
    """Train, test and predict on generated phantoms; the figure shows where a lesion was drawn."""
    folder = config.demo or Path()
    began = time.perf_counter()
    there = folder / "MURA-v1.1"
    if there.exists() and not (there / PHANTOM_LIST).exists():
        raise UserError(f"--demo {folder}: {there} holds no phantoms; give another folder")
    figure = config.figure or folder / "demo_heatmap.png"
    require_targets(config, "figure", [figure])
    if not config.overwrite:
        require_new(map(config.file, RUN_FILES), "--overwrite replaces it")
    log(f"demo: drawing phantom radiographs in {folder}")
    root = write_phantoms(folder, *DEMO_STUDIES, seed=config.seed)
    config = replace(config, data_dir=root)
    train_command(config, signals)
    boxes = read_lesion_boxes(root)
    inputs = [Study(path, [path]) for path in boxes]
    results = list(load_predictor(config).studies(inputs))
    called = [result for result in results if result.label == "abnormal"]
    if called:
        log(pointing_game(called, boxes))
    shown = (called or results)[0]
    print_result(shown, config.prevalence)
    show = can_show(config.no_show)
    explain_result(shown, figure, show=show, lesion=boxes[shown.path])
    log(f"demo: done in {time.perf_counter() - began:.0f} s; look at {figure} (the box is the "
        f"lesion that was drawn), {config.file('.report.png')} and {config.file('.history.png')}")
    if show:
        show_windows()
    return EXIT_DONE


# ===== 12 Python API and main =====================================================================


def load(
    *checkpoints: str | Path, device: str = "auto", precision: str = "auto",
    threshold: float | None = None,
) -> Predictor:
    """Return trained models, ready to predict; several are an ensemble.

    >>> model = load("mura.pth")  # doctest: +SKIP
    >>> result = model.predict("study1_positive")  # doctest: +SKIP
    >>> result.label, result.probability  # doctest: +SKIP
    ('abnormal', 0.93)

    Args:
        checkpoints: files that training wrote (default: as --checkpoint); UserError where one
            cannot be loaded.
        device: as --device.
        precision: as --precision.
        threshold: abnormal above this probability (default: the models').
    """
    if threshold is not None and not 0 < (threshold := float(threshold)) < 1:
        raise UserError(f"threshold {threshold:g}: is not above 0 and below 1")
    paths = tuple(map(Path, checkpoints)) or Config.checkpoint
    config = Config(
        checkpoint=paths, device=str(device), precision=precision, threshold=threshold)
    return load_predictor(config)


def main(config: Config) -> int:
    """Run the mode that the options ask for; every outcome becomes an exit code.

    A failure is one line on stderr. One of several processes then ends here and now: NCCL takes
    leave together, so it would wait for others, who wait for it.
    """
    commands = {"T": train_command, "E": evaluate_command, "P": predict_command,
                "X": export_command, "D": demo_command}
    with StopSignals() as signals:
        try:
            if is_distributed() and config.mode not in "TE":
                raise UserError("torchrun is for training and --evaluate: leave it out")
            choose_backend()
            code = commands[config.mode](config, signals)
            if dist.is_initialized():
                dist.destroy_process_group()
            return code
        except Stopped as stopped:
            code = stopped.exit_code
            warn(f"{stopped}{how_to_go_on(config, signals.began)}")
        except Exception as error:
            code = error.exit_code if isinstance(error, UserError) else EXIT_FAILED
            if config.debug:
                traceback.print_exc()
            warn(describe_error(error, config), failed=True)
        if dist.is_initialized():
            os._exit(code)
        return code


def how_to_go_on(config: Config, began: float) -> str:
    """Return where the state of a run is that `began` then, and the command that goes on."""
    state = config.file(".last.pth")
    if config.mode != "T" or not state.exists():
        return ""
    if config.overwrite and state.stat().st_mtime < began:  # still that of the run to be replaced
        return ""
    words = list(config.command)
    if not config.resume:
        words = [word for word in words if word != "--overwrite"] + ["--resume"]
    command = command_line(words)
    if is_distributed():
        command = "the same torchrun command with --resume"
    return f"; the state is in {state}; to go on: {command}"


def describe_error(error: Exception, config: Config) -> str:
    """Return the line for an error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        smaller = "a larger --grad-accum-steps" if config.mode in "TD" else "a smaller --batch-size"
        return f"out of memory: use {smaller}, or --device cpu"
    reason = str(error).strip().partition("\n")[0] or "no message"
    hint = "" if config.debug else " (--debug shows where)"
    return f"{type(error).__name__}: {reason}{hint}"


def run_as_script(config: Config) -> int:
    """Run `main` with streams whose failure does not end the work, but shows in the exit code."""
    streams: list[Any] = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if isinstance(stream.buffer, io.RawIOBase):  # unbuffered: a full pipe raises nothing
                stream = open(  # noqa: SIM115
                    stream.fileno(), "w", encoding=stream.encoding, closefd=False)
            stream.reconfigure(errors="backslashreplace")  # names that the encoding lacks
        streams.append(SafeStream(stream))
    sys.stdout, sys.stderr = streams
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal has gone: the run goes on
    code = main(config)
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        if stream.lost:
            warn(f"{name}: could not be written, so lines are missing there")
            code = code or EXIT_FAILED
    return code


if __name__ == "__main__":
    sys.exit(run_as_script(CONFIG))
