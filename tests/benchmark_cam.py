"""Measure where heatmaps lie, for a trained model and a data set in MURA's layout.

    python tests/benchmark_cam.py CHECKPOINT DATA [--methods fine gradcam] [--limit N] [--only ...]

pointing   peak in the lesion's box and share of the heat in it (phantoms.csv beside train/), or,
           without boxes, in the band of rows 40 to 65 % (knees: the joint); of images called abnormal
deletion   fall of the logit when the hottest 5 % of pixels are blurred away, less that of gradcam on
           the same images, with a 95 % interval over images
scale      median peak of the map in normal and in abnormal images
placement  distance between a bright square pasted into a radiograph and the half-maximum of the
           squared change of a stage's features, enlarged as a map; mean, as a share of the side
random     correlation with the original map when weights are reset stage by stage from the top
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent.parent / "mura_anomaly_detection.py"
sys.path.insert(0, str(SCRIPT.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402

import mura_anomaly_detection as mura  # noqa: E402

SIDES = (220, 250, 320)


class Study:
    """A model, the images of valid/, and where their lesions lie."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ensemble = mura.load(options.checkpoint, device=options.device).ensemble
        self.model = self.ensemble.models[0]
        root = mura.find_data_root(options.data)
        records = mura.scan_split(root, "valid").records
        step = max(1, len(records) // options.limit) if options.limit else 1
        self.records = records[::step]
        has_boxes = (root / "phantoms.csv").exists()
        self.boxes = mura.read_lesion_boxes(root) if has_boxes else None

    def results(self, method: str) -> Iterator[tuple[Any, Any]]:
        """Yield (record, result) of all images."""
        config = mura.Config(cam=method)
        predictor = mura.Predictor(config, self.ensemble)
        inputs = [mura.Study(Path(r.path), [Path(r.path)]) for r in self.records]
        yield from zip(self.records, predictor.studies(inputs), strict=True)

    def inside(self, record: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Return where the lesion is, (H, W) bool."""
        mask = np.zeros(shape, bool)
        if self.boxes is None:
            mask[round(0.40 * shape[0]) : round(0.65 * shape[0])] = True
        elif Path(record.path) in self.boxes:
            left, top, right, bottom = self.boxes[Path(record.path)]
            mask[top:bottom, left:right] = True
        return mask

    def logit(self, pixels: np.ndarray) -> float:
        """Return the logit of an image (H, W)."""
        square = mura.resize_square(pixels, *self.model.resizing)
        images = [torch.from_numpy(square)[None, None].to(self.ensemble.hardware.device)]
        return float(self.ensemble.logits(images)[0, 0])


def pointing(study: Study, method: str) -> None:
    """Print the pointing game of abnormal images that are called so, and the peaks' scale."""
    hits, shares, chance, peaks = [], [], [], {0: [], 1: []}
    for record, result in study.results(method):
        (heatmap,) = result.heatmaps
        peaks[record.label].append(heatmap.max())
        mask = study.inside(record, heatmap.shape)
        if record.label and result.label == "abnormal" and mask.any():
            hits.append(mask.flat[heatmap.argmax()])
            shares.append(heatmap[mask].sum() / max(heatmap.sum(), 1e-12))
            chance.append(mask.mean())
    print(f"{method:8} pointing: peak {np.mean(hits):.2f}, share {np.mean(shares):.2f} "
          f"(chance {np.mean(chance):.2f}, n {len(hits)}); scale: median peak normal "
          f"{np.median(peaks[0] or [0]):.2f}, abnormal {np.median(peaks[1]):.2f}", flush=True)


def deletion(study: Study, methods: list[str]) -> None:
    """Print the fall of the logit, less that of gradcam, paired."""
    falls: dict[str, list[float]] = {}
    for method in dict.fromkeys([*methods, "gradcam"]):
        falls[method] = []
        for record, result in study.results(method):
            (view,) = result.views
            if not record.label or result.label != "abnormal":
                continue
            heatmap, pixels = view.heatmap, view.pixels
            blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(max(pixels.shape) / 20))
            hottest = (heatmap >= np.quantile(heatmap, 0.95)) & (heatmap > 0)
            changed = np.where(hottest, np.asarray(blurred), pixels)
            falls[method].append(study.logit(pixels) - study.logit(changed))
    random = np.random.default_rng(0)
    for method in methods:
        difference = np.array(falls[method]) - np.array(falls["gradcam"])
        draws = random.choice(difference, (2000, len(difference))).mean(axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        print(f"{method:8} deletion: falls by {np.mean(falls[method]):.2f}, more than gradcam's by "
              f"{difference.mean():+.2f} [{low:+.2f}, {high:+.2f}], n {len(difference)}", flush=True)


def placement(study: Study, squares: int = 40) -> None:
    """Print the mean distance of a stage's change from the square that caused it."""
    network = study.model.network
    indices = sorted({index for index, _ in mura.CAM_METHODS["fine"].terms})
    random = np.random.default_rng(0)
    for side in SIDES:
        distances: dict[int, list[float]] = {index: [] for index in indices}
        for number in range(squares):
            record = study.records[number % len(study.records)]
            pixels = mura.resize_square(mura.read_radiograph(Path(record.path)).pixels, side, "stretch")
            width = int(side * random.uniform(0.06, 0.12))
            left, top = random.integers(0, side - width, 2)
            changed = pixels.copy()
            changed[top : top + width, left : left + width] = 255
            both = torch.from_numpy(np.stack([pixels, changed]))[:, None]
            features = study.model.normalization(mura.to_unit(both))
            with torch.no_grad():
                for index, stage in enumerate(network.architecture.stages):
                    if stage is network.architecture.stages[-1]:
                        unshifted, shifted = network.run_stage(stage, features), network.shift_last_stage(features)
                        outputs = torch.stack([unshifted, *shifted])
                        change = mura.stitch((outputs[:, 1:] - outputs[:, :1]).square().sum(2))
                        stage = replace(stage, stride=stage.stride // 2)
                    else:
                        features = network.run_stage(stage, features)
                        change = (features[1:] - features[:1]).square().sum(1)
                    if index not in indices:
                        continue
                    heat = mura.enlarge(change, side, stage)[0].numpy()
                    rows, columns = np.nonzero(heat >= heat.max() / 2)
                    centre = np.array([rows.mean(), columns.mean()])
                    wanted = np.array([top, left]) + (width - 1) / 2
                    distances[index].append(float(np.hypot(*(centre - wanted))) / side)
        shown = ", ".join(f"stride {network.architecture.stages[i].stride}: {np.mean(found):.3f}"
                          for i, found in distances.items())
        print(f"placement at {side} px: {shown}", flush=True)


def reset(network: Any, names: list[str]) -> None:
    """Draw the weights of these layers anew; those of the head where there are none."""
    chosen = [network.backbone.get_submodule(name) for name in names] or [network.head]
    for module in (module for part in chosen for module in part.modules()):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def randomised(study: Study, method: str, images: int = 12, draws: int = 12) -> None:
    """Print the correlation with the original map of maps of a network that is reset from the top.

    Maps are those that --predict saves, so an image that a reset network calls normal has a cold map,
    whose correlation is 0. The mean over images and draws, and the largest mean of a draw.
    """
    called = [(record, result.heatmaps[0]) for record, result in study.results(method)
              if record.label and result.label == "abnormal"][:images]
    study = copy.copy(study)
    study.records = [record for record, _ in called]
    stages = study.model.network.architecture.stages[::-1]
    layers: dict[str, list[str]] = {"head": []}
    layers |= {f"stride {stage.stride}": stage.layers.split() for stage in stages}
    found = np.zeros((draws, len(layers)))
    for draw in range(draws):
        torch.manual_seed(draw)
        model = replace(study.model, network=copy.deepcopy(study.model.network))
        study.ensemble = replace(study.ensemble, models=[model])
        for column, names in enumerate(layers.values()):
            reset(model.network, names)
            maps = [result.heatmaps[0] for _, result in study.results(method)]
            pairs = zip((heat.ravel() for _, heat in called), (heat.ravel() for heat in maps), strict=True)
            found[draw, column] = np.mean([np.corrcoef(a, b)[0, 1] if b.any() else 0 for a, b in pairs])
    shown = zip(layers, found.mean(axis=0), found.max(axis=0), strict=True)
    print(f"{method:8} randomised, {draws} draws: "
          + ", ".join(f"{name} {mean:+.2f} (up to {top:+.2f})" for name, mean, top in shown), flush=True)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--methods", nargs="+", default=["fine", "gradcam"])
    names = ("pointing", "deletion", "placement", "random")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="images, evenly spread")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    study = Study(options)
    for method in options.methods:
        if "pointing" in options.only:
            pointing(study, method)
    if "deletion" in options.only:
        deletion(study, [method for method in options.methods if method != "gradcam"])
    if "placement" in options.only:
        placement(study)
    for method in options.methods:
        if "random" in options.only:
            randomised(study, method)


if __name__ == "__main__":
    main()
