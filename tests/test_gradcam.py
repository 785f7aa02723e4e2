"""Section 10, Grad-CAM: the same map as an independent program, as the formula, and on the right pixels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from torch import Tensor

import mura_anomaly_detection as mad

SIZE = 96  # pixels: maps of 3 x 3


@pytest.fixture(scope="module", params=["densenet169", "resnet50"])
def network(request: pytest.FixtureRequest) -> mad.Network:
    """Make a network whose maps and logits differ from image to image."""
    network: mad.Network = mad.build_network(request.param, "none", seed=7)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        network.train()(images(4, seed=2))  # the batch norms take up what runs through them
        network.head.weight.normal_(0, 0.5)
        network.head.bias.fill_(0.3)
    return network.eval()


def images(count: int, seed: int = 0) -> Tensor:
    """Draw normalised images with structure at several scales."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 6, 6, generator=random)
    return torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear") + 0.3 * torch.randn(
        count, 3, SIZE, SIZE, generator=random
    )


class Column(torch.nn.Module):
    """Give logits as (B, 1), as pytorch-grad-cam expects of a classifier."""

    def __init__(self, network: mad.Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Tensor) -> Tensor:
        return self.network(batch)[:, None]


def peer_maps(network: mad.Network, batch: Tensor, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """Run pytorch-grad-cam on sign * logit: raw maps (B, h, w), and its own result (B, S, S), scaled to 0..1."""

    def target(output: Tensor) -> Tensor:
        return sign * output[0]

    with GradCAM(model=Column(network), target_layers=[network.backbone]) as cam:
        scaled = cam(input_tensor=batch, targets=[target] * len(batch))
        kept: Any = cam.activations_and_grads
        raw = cam.get_cam_image(
            batch, network.backbone, [target], kept.activations[0].numpy(), kept.gradients[0].numpy()
        )
    network.zero_grad(set_to_none=True)
    return np.maximum(raw, 0), scaled


@pytest.mark.parametrize("sign", [1, -1], ids=["abnormal", "normal"])
def test_equals_pytorch_grad_cam(network: mad.Network, sign: int) -> None:
    """One pass serves both classes: relu(evidence) is the map of abnormal, relu(-evidence) that of normal."""
    batch = images(3)
    raw, scaled = peer_maps(network, batch, sign)
    evidence = mad.grad_cam(network, batch)[1].numpy()
    ours = np.maximum(sign * evidence, 0)
    assert ours.max() > 0
    assert ours.min() == 0 or raw.min() > 0
    np.testing.assert_allclose(ours / evidence[0].size, raw, atol=1e-5 * raw.max())  # the peer leaves out h * w
    ours_scaled = scale_cam_image(scale_cam_image(ours, (SIZE, SIZE)))
    np.testing.assert_allclose(ours_scaled, scaled, atol=1e-5)


def test_both_signs_occur(network: mad.Network) -> None:
    """Without it the comparison above could pass with an empty map for one class."""
    evidence = mad.grad_cam(network, images(3))[1]
    assert evidence.min() < 0 < evidence.max()


def test_equals_analytic_cam(network: mad.Network) -> None:
    """With mean pooling and one linear unit Grad-CAM is CAM (arXiv 1512.04150): the unit's weights times the maps."""
    batch = images(3)
    evidence = mad.grad_cam(network, batch)[1]
    with torch.no_grad():
        analytic = torch.einsum("c,bchw->bhw", network.head.weight[0], network.features(batch))
    torch.testing.assert_close(evidence, analytic, atol=1e-4, rtol=1e-4)


def test_mean_of_the_evidence_is_the_logit_less_the_bias(network: mad.Network) -> None:
    batch = images(3)
    logits, evidence = mad.grad_cam(network, batch)
    torch.testing.assert_close(evidence.mean((1, 2)), logits - network.head.bias, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(logits, network(batch), atol=1e-5, rtol=1e-5)


def test_hand_worked_map() -> None:
    """Two channels, one row of two cells: 2 * first - 3 * second; their mean and the bias of 10 make the logit. Two images."""

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(2, 1)
            self.head.weight.data = torch.tensor([[2.0, -3.0]])
            self.head.bias.data = torch.tensor([10.0])

        def features(self, batch: Tensor) -> Tensor:
            assert not torch.is_grad_enabled(), "the backbone is not differentiated: it would cost memory and time"
            return batch

        classify = mad.Network.classify

    maps = torch.tensor([[[[1.0, 0.0]], [[0.0, 4.0]]], [[[0.0, 2.0]], [[1.0, 0.0]]]])  # (2, 2, 1, 2)
    logits, evidence = mad.grad_cam(Small(), maps)
    assert evidence.tolist() == [[[2.0, -12.0]], [[-3.0, 4.0]]]
    assert logits.tolist() == [10 + (2 - 12) / 2, 10 + (4 - 3) / 2]


def test_batch_gives_what_single_images_give(network: mad.Network) -> None:
    batch = images(4)
    logits, evidence = mad.grad_cam(network, batch)
    for i in range(4):
        logit, single = mad.grad_cam(network, batch[i : i + 1])
        torch.testing.assert_close(logit[0], logits[i], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(single[0], evidence[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["no_grad", "enable_grad"])
def test_network_is_left_as_it_was(network: mad.Network, mode: str) -> None:
    """No gradients gathered, no flags turned, no hooks left, no graph kept alive by the results."""
    batch = images(1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with getattr(torch, mode)():
        results = mad.grad_cam(network, batch)
        assert torch.is_grad_enabled() is (mode == "enable_grad")
    assert all(not tensor.requires_grad for tensor in results)
    assert not network.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())
    assert not batch.requires_grad


def test_gathered_gradients_and_training_flag_survive() -> None:
    """An explanation in the midst of training must not disturb it."""
    network = mad.build_network("resnet50", "none", seed=0).train()
    network.head.weight.grad = torch.full_like(network.head.weight, 7.0)
    mad.grad_cam(network, images(2))
    assert network.training
    assert torch.equal(network.head.weight.grad, torch.full_like(network.head.weight, 7.0))
    assert network.backbone[0].weight.grad is None


def test_randomised_weights_destroy_the_map(network: mad.Network) -> None:
    """The sanity check of arXiv 1810.03292: a map that survives it shows the image, not what was seen in it."""
    batch = images(6)
    before = mad.grad_cam(network, batch)[1].flatten(1)
    for part in ("head", "backbone"):
        other = mad.build_network(network.model, "none", seed=99).eval()
        other.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith(part)}, strict=False)
        after = mad.grad_cam(other, batch)[1].flatten(1)
        centred = [maps - maps.mean(1, keepdim=True) for maps in (before, after)]
        alike = torch.cosine_similarity(centred[0], centred[1], dim=1)
        assert alike.mean() < 0.8, part


def test_zero_maps_give_zero_evidence_not_nan() -> None:
    network = mad.build_network("resnet50", "none", seed=0).eval()
    with torch.no_grad():
        network.backbone[-1][-1].bn3.bias.fill_(-1e9)  # the last ReLU lets nothing pass
    logits, evidence = mad.grad_cam(network, images(1))
    assert evidence.abs().max() == 0
    assert torch.equal(logits, network.head.bias)


def test_under_autocast_the_results_are_fp32() -> None:
    network = mad.build_network("resnet50", "none", seed=0).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, evidence = mad.grad_cam(network, images(1))
    assert logits.dtype == evidence.dtype == torch.float32
    torch.testing.assert_close(evidence.mean((1, 2)), logits - network.head.bias, atol=1e-4, rtol=1e-4)


# ----- heat on the pixels of the original


def heat_of_marker(height: int, width: int, row: int, column: int, fit: str, size: int = 320) -> np.ndarray:
    """Paint one pixel's neighbourhood bright, bring it through the preprocessing, reduce it to a map."""
    marker = np.zeros((height, width), np.uint8)
    reach = max(height, width) // 12
    marker[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1] = 255
    square = torch.from_numpy(mad.fit_square(marker, size, fit)).float()[None, None]
    maps = torch.nn.functional.avg_pool2d(square, 32)[0, 0]  # a stride of 32, as in both networks
    return mad.heat_on_image(maps, size, fit, height, width)


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
@pytest.mark.parametrize(("height", "width"), [(512, 300), (300, 512), (1500, 400), (64, 64), (97, 203)])
@pytest.mark.parametrize(
    ("down", "right"), [(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0), (0.5, 1), (0, 0.5), (1, 0.5), (0.5, 0.5)]
)
def test_marker_stays_where_it_is(fit: str, height: int, width: int, down: float, right: float) -> None:
    """Corners, edges and centre of the original, whatever its aspect: the heat's peak lies on the marker."""
    row, column = round(down * (height - 1)), round(right * (width - 1))
    heat = heat_of_marker(height, width, row, column, fit)
    assert heat.shape == (height, width)
    peak = np.unravel_index(heat.argmax(), heat.shape)
    # within a cell of the 10 x 10 map, measured in pixels of the original
    cell_high, cell_wide = (max(height, width),) * 2 if fit == "letterbox" else (height, width)
    reach = max(height, width) // 12
    assert abs(peak[0] - row) <= cell_high / 10 / 2 + reach + 1
    assert abs(peak[1] - column) <= cell_wide / 10 / 2 + reach + 1


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_two_aspects_of_one_gradient_keep_their_axes(fit: str) -> None:
    """Heat that grows to the right grows along columns only, up to the rim; rows and columns are not swapped."""
    ramp = torch.arange(10.0).expand(10, 10)
    heat = mad.heat_on_image(ramp, 320, fit, 200, 400)
    assert (np.diff(heat, axis=1) >= 0).all()
    assert np.abs(np.diff(heat, axis=0)).max() < 1e-5
    assert heat.mean() == pytest.approx(4.5, abs=1e-3)


@pytest.mark.parametrize("size", [8, 2])
def test_enlarging_by_hand(size: int) -> None:
    """Two cells, 0 and 4, over 8 pixels: flat up to their centres at 1.5 and 5.5, and 1 a pixel between.

    With a `size` of 8 it is the network's square that is enlarged, with 2 it is the original.
    """
    heat = mad.heat_on_image(torch.tensor([[0.0, 4.0], [0.0, 4.0]]), size, "stretch", 8, 8)
    assert heat.tolist() == [[0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4]] * 8


def test_letterbox_border_is_left_out() -> None:
    """Heat that lies in the black border belongs to no pixel of the original."""
    evidence = torch.zeros(10, 10)
    evidence[:2], evidence[-2:] = 100, 100  # a 400 x 200 image fills rows 80 to 240 of 320
    assert mad.heat_on_image(evidence, 320, "letterbox", 200, 400).max() == 0
    assert mad.heat_on_image(evidence, 320, "stretch", 200, 400).max() == 100


def test_heat_keeps_its_unit_and_sign() -> None:
    evidence = torch.full((7, 7), -2.5)
    heat = mad.heat_on_image(evidence, 224, "letterbox", 31, 77)
    np.testing.assert_allclose(heat, -2.5, rtol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_extreme_shapes_are_finite(height: int, width: int, fit: str) -> None:
    heat = mad.heat_on_image(torch.ones(3, 3), 96, fit, height, width)
    assert heat.shape == (height, width)
    np.testing.assert_allclose(heat, 1, rtol=1e-6)


# ---- faithful, not only pretty: what the demo's model, which was trained on phantoms, looks at ----------------------


@pytest.fixture(scope="module")
def found(demo: tuple[Path, str]) -> list[tuple[mad.Result, tuple[int, int, int, int]]]:
    """Abnormal phantoms of unseen patients that the demo's model calls abnormal, with the box of the lesion."""
    config = mad.parse_options(["--predict", str(demo[0]), "--checkpoint", str(demo[0] / "demo.pth"), "--device", "cpu"])
    boxes = mad.lesion_boxes(demo[0] / "MURA-v1.1")
    results = mad.Predictor(config, mad.StopSignals()).results([(path, (path,)) for path in boxes])
    called = [(result, boxes[result.path]) for result in results if result.label]
    assert len(called) >= 20
    return called


def test_heat_lies_on_the_lesion_far_more_often_than_by_chance(demo: tuple[Path, str]) -> None:
    line = next(line for line in demo[1].splitlines() if line.startswith("heat peaks on the lesion"))
    hit, chance = (int(text) / 100 for text in re.findall(r"(\d+)%", line))
    assert hit > chance + 0.05


def test_share_of_heat_in_the_lesion_box_exceeds_the_share_of_its_area(found: list[Any]) -> None:
    gains = []
    for result, (left, top, right, bottom) in found:
        heat = np.maximum(result.findings[0].evidence, 0)
        if heat.sum() > 0:
            gains.append(heat[top:bottom, left:right].sum() / heat.sum() - (right - left) * (bottom - top) / heat.size)
    assert np.mean(gains) > 3 * np.std(gains) / np.sqrt(len(gains)) > 0


def test_deleting_the_hottest_pixels_costs_more_than_deleting_the_coldest(demo: tuple[Path, str], found: list[Any]) -> None:
    """Deletion (arXiv 1806.07421): what the map calls evidence is what the network uses."""
    member = mad.load_member(demo[0] / "demo.pth", mad.choose_arithmetic(torch.device("cpu"), "fp32"))

    def logits(pixels: list[np.ndarray]) -> np.ndarray:
        squares = torch.from_numpy(np.stack([mad.fit_square(image, member.image_size, member.fit) for image in pixels]))
        with torch.inference_mode():
            return np.asarray(member.network(member.normalization(mad.to_unit(squares[:, None]))))

    def deleted(result: mad.Result, hottest: bool) -> np.ndarray:
        finding = result.findings[0]
        order = np.argsort(finding.evidence, axis=None)
        chosen = order[-finding.pixels.size // 5 :] if hottest else order[: finding.pixels.size // 5]
        blurred = np.asarray(Image.fromarray(finding.pixels).filter(ImageFilter.GaussianBlur(12)))
        pixels = finding.pixels.copy()
        pixels.flat[chosen] = blurred.flat[chosen]
        return pixels

    results = [result for result, _ in found]
    hottest, coldest = (logits([deleted(result, which) for result in results]) for which in (True, False))
    assert np.mean(hottest) < np.mean(coldest)


def test_random_weights_destroy_the_map(demo: tuple[Path, str], found: list[Any]) -> None:
    """Sanity check (arXiv 1810.03292): a map that survives random weights would show the image, not the network."""
    member = mad.load_member(demo[0] / "demo.pth", mad.choose_arithmetic(torch.device("cpu"), "fp32"))
    random = mad.build_network("densenet169", "none", 1).eval()
    squares = np.stack([mad.fit_square(result.findings[0].pixels, member.image_size, member.fit) for result, _ in found])
    images = member.normalization(mad.to_unit(torch.from_numpy(squares)[:, None]))
    own, other = (mad.grad_cam(network, images)[1].flatten(1).numpy() for network in (member.network, random))
    assert abs(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(own, other, strict=True)])) < 0.4
