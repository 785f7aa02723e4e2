"""Block 3, decoding: every kind of image file becomes right grey, or a reason.

Most files are written here byte by byte, and the values of DICOM are computed from the formulas of
the standard, so that what is expected never comes from the decoder under test. OpenCV is a second
oracle. DECODING.md says what is read how.
"""

from __future__ import annotations

import io
import itertools
import os
import random
import re
import socket
import struct
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFile

import mura_anomaly_detection as mura

# The program silences the decoders once, at its head; pytest resets that for each test.
pytestmark = pytest.mark.filterwarnings("ignore")

Array = npt.NDArray[np.generic]
KNEES = Path(__file__).resolve().parents[2] / "shared" / "data" / "knee"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG colour types
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
ADAM7 = (
    (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
    (1, 0, 2, 1),
)  # fmt: skip


# ---- hand-made files ----


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def pack_rows(values: Array, depth: int) -> bytes:
    """PNG scan lines, each behind filter byte 0."""
    lines = values.reshape(len(values), -1)
    if depth == 16:
        return b"".join(b"\0" + line.astype(">u2").tobytes() for line in lines)
    bits = np.unpackbits(lines.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
    return b"".join(b"\0" + np.packbits(line.ravel()).tobytes() for line in bits)


def png(
    values, depth=8, colour=GREY, extra=b"", interlaced=False, missing_rows=0, size=None, after=b""
) -> bytes:
    """Encode (H, W) or (H, W, C); optionally with rows missing at the end, or a size that lies."""
    values = np.asarray(values)
    height, width = size or values.shape[:2]
    if interlaced:
        passes = (values[y::dy, x::dx] for y, x, dy, dx in ADAM7)
        raw = b"".join(pack_rows(part, depth) for part in passes if part.size)
    else:
        raw = pack_rows(values, depth)
    raw = raw[: len(raw) - missing_rows * len(pack_rows(values[:1], depth))]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + after
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def tiff(values: Array, order="<", white_is_zero=False, tags=None, pixels=None) -> bytes:
    """One uncompressed strip; sample format from the dtype; `tags` and `pixels` replace its own."""
    height, width = values.shape[:2]
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes() if pixels is None else pixels
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    own = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: int(not white_is_zero)}
    own |= {273: 8, 277: 1, 278: height, 279: len(pixels), 339: kind} | (tags or {})
    tables, entries, end = b"", b"", 8 + len(pixels)  # values that do not fit lie behind the pixels
    for tag, value in sorted(own.items()):
        numbers = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, tables = struct.pack(order + "I", end + len(tables)), tables + packed
        entries += struct.pack(order + "HHI", tag, 4, len(numbers)) + packed
    magic = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, end + len(tables))
    return magic + pixels + tables + struct.pack(order + "H", len(own)) + entries + bytes(4)


def linked(*files: bytes, subfile: int = 0) -> bytes:
    """Little-endian TIFF files in one; all directories but the first get the NewSubfileType."""
    joined = bytearray(files[0])
    for file in files[1:]:
        at = len(joined)
        first = struct.unpack_from("<I", file, 4)[0]
        count = struct.unpack_from("<H", file, first)[0]
        entries = struct.pack("<HHII", 254, 4, 1, subfile)
        for entry in (file[first + 2 + 12 * i :][:12] for i in range(count)):
            tag, kind, number, value = struct.unpack("<HHII", entry)
            entries += struct.pack("<HHII", tag, kind, number, value + at * (tag == 273))
        struct.pack_into("<I", joined, last_link(joined), at + len(file))
        joined += file + struct.pack("<H", count + 1) + entries + bytes(4)
    return bytes(joined)


def last_link(data: bytearray) -> int:
    """Where a little-endian TIFF file says that no directory follows."""
    at = 4
    while (following := struct.unpack_from("<I", data, at)[0]) != 0:
        at = following + 2 + 12 * struct.unpack_from("<H", data, following)[0]
    return at


def pillow(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def radiograph(folder: Path, data: bytes, name: str = "image1.png") -> mura.Radiograph:
    (folder / name).write_bytes(data)
    got = mura.read_radiograph(folder / name)
    assert got.pixels.dtype == np.uint8
    assert got.pixels.ndim == 2
    assert got.pixels.flags.writeable
    return got


def read(folder: Path, data: bytes, name: str = "image1.png") -> npt.NDArray[np.int64]:
    return radiograph(folder, data, name).pixels.astype(int)


def reason(path: Path) -> str:
    with pytest.raises(mura.BadImage) as caught:
        mura.read_radiograph(path)
    text = str(caught.value)
    assert str(path) not in text
    assert "\n" not in text
    assert "ecret" not in text.lower()
    return text


def reason_of(folder: Path, data: bytes, name: str = "image1.png") -> str:
    (folder / name).write_bytes(data)
    return reason(folder / name)


def noise(height: int, width: int, top: int = 256, seed: int = 0) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, top, (height, width))


def stretched(values: Array, black: float | None = None, white: float | None = None) -> Array:
    """The grey of values between black and white, or between their extremes."""
    values = np.asarray(values, float)
    black = values.min() if black is None else black
    white = values.max() if white is None else white
    return ((values - black) * 255 / (white - black)).clip(0, 255)


def luma(rgb: Array) -> Array:
    """ITU-R 601."""
    return np.asarray(rgb, float) @ [0.299, 0.587, 0.114]


def close(got: Array, expected: Array, tolerance: float = 0.51) -> bool:
    return got.shape == np.shape(expected) and bool(np.abs(got - expected).max() <= tolerance)


# ---- PNG ----


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (13, 17), (1, 5000), (5000, 1)])
def test_grey_png_scales_its_full_range_to_255(tmp_path, depth, interlaced, shape):
    values = noise(*shape, top=2**depth)
    expected = values * 255 // (2**depth - 1)
    assert (read(tmp_path, png(values, depth, interlaced=interlaced)) == expected).all()


@pytest.mark.parametrize("top", [200, 1024, 4096, 65536])
@pytest.mark.parametrize("interlaced", [False, True])
def test_16_bit_png_is_shown_between_its_extremes_however_few_bits_it_uses(
    tmp_path, top, interlaced
):
    values = noise(9, 7, top)
    assert close(read(tmp_path, png(values, 16, interlaced=interlaced)), stretched(values))
    assert close(read(tmp_path, png(values + 65536 - top, 16)), stretched(values))


def view(brightest: int) -> npt.NDArray[np.int64]:
    """A smooth image of 100 x 100 from 0 to its brightest value."""
    return np.linspace(0, brightest, 10_000).round().astype(int).reshape(100, 100)


@pytest.mark.parametrize("power", range(8, 16))
def test_two_views_by_one_detector_stay_comparable(tmp_path, power):
    """No jump where the maximum crosses a power of two."""
    one, other = (read(tmp_path, png(view(round(2**power * f)), 16)) for f in (0.98, 1.02))
    assert close(one, other, 1)
    below, above = view(round(2**power * 0.95)), view(round(2**power * 1.05))
    bone = round(0.8 * 2**power)
    shades = [read(tmp_path, png(values, 16))[values >= bone].min() for values in (below, above)]
    assert abs(shades[0] - shades[1]) < 0.11 * 255


def test_hot_and_dead_pixels_set_neither_white_nor_black(tmp_path):
    plain = view(1000) + 500
    spoilt = plain.copy()
    spoilt[50, 30:38], spoilt[7, 7:15] = 65535, 0
    untouched = spoilt == plain
    shown, expected = read(tmp_path, png(spoilt, 16)), read(tmp_path, png(plain, 16))
    assert close(shown[untouched], expected[untouched], 1)
    assert (shown[50, 30:38] == 255).all()
    assert (shown[7, 7:15] == 0).all()
    assert close(expected, stretched(plain), 1)


def test_one_pixel_in_a_thousand_is_beyond_black_and_white(tmp_path):
    plain = 20_000 + np.arange(10_000).reshape(100, 100)
    for count, black, white in ((10, 20_010, 29_989), (11, 0, 65535)):
        values = plain.copy()
        values.ravel()[:count], values.ravel()[-count:] = 0, 65535
        assert close(read(tmp_path, png(values, 16)), stretched(values, black, white))


def test_a_16_bit_copy_looks_like_its_8_bit_original(tmp_path):
    eight = np.asarray(Image.fromarray(noise(8, 8).astype(np.uint8)).resize((200, 150)), int)
    eight = np.rint(stretched(eight)).astype(int)
    assert close(read(tmp_path, png(eight * 257, 16)), read(tmp_path, png(eight)), 3)


def test_colour_png_becomes_luma_and_grey_stored_as_colour_stays_exact(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3))
    assert close(read(tmp_path, png(colours, colour=RGB)), luma(colours))
    grey = noise(6, 5)
    assert (read(tmp_path, png(np.dstack([grey] * 3), colour=RGB)) == grey).all()
    assert (read(tmp_path, png(np.dstack([grey * 257] * 3), 16, colour=RGB)) == grey).all()


def test_palette(tmp_path):
    palette = np.array([[10, 10, 10], [200, 200, 200], [90, 90, 90]], np.uint8)
    plte = chunk(b"PLTE", palette.tobytes())
    indices = np.array([[0, 1], [2, 1]])
    assert read(tmp_path, png(indices, 2, PALETTE, plte)).tolist() == [[10, 200], [90, 200]]
    half_clear = plte + chunk(b"tRNS", bytes([255, 0, 51]))
    assert read(tmp_path, png(indices, 8, PALETTE, half_clear)).tolist() == [[10, 0], [18, 0]]


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour", [GREY_ALPHA, RGBA])
def test_transparency_lies_on_black_and_hidden_colour_never_leaks(tmp_path, colour, depth):
    alpha = np.where(noise(8, 8, 2, seed=1), noise(8, 8, seed=2), 0)
    grey = noise(8, 8)
    values = np.dstack([grey] * (CHANNELS[colour] - 1) + [alpha]) * (257 if depth == 16 else 1)
    got = read(tmp_path, png(values, depth, colour))
    assert close(got, grey * alpha / 255, 1.01)
    assert not got[alpha == 0].any()
    assert (got[alpha == 255] == grey[alpha == 255]).all()


@pytest.mark.parametrize(("depth", "colour"), [(8, GREY), (16, GREY), (1, GREY), (8, RGB)])
def test_the_one_transparent_value_of_a_png_is_black(tmp_path, depth, colour):
    top = 2**depth - 1
    values = np.array([[top, 0], [top, 1]] if colour == GREY else [[[top] * 3, [7, 7, 7]]])
    trns = chunk(b"tRNS", struct.pack(">H", top) * (3 if colour == RGB else 1))
    got = read(tmp_path, png(values % 2**depth, depth, colour, trns))
    assert not got[:, 0].any()
    assert got.any() == (depth > 1)


def test_never_a_silent_black_image(tmp_path):
    clear = np.dstack([noise(4, 4), np.zeros((4, 4), int)])
    assert "transparent" in reason_of(tmp_path, png(clear, colour=GREY_ALPHA))
    twelve_bits = np.dstack([noise(4, 4, 4096)] * 3)
    assert "16-bit" in reason_of(tmp_path, png(twelve_bits, 16, RGB))


def test_opencv_decodes_the_same_grey(tmp_path):
    cv2 = pytest.importorskip("cv2")
    grey = Image.fromarray(noise(40, 30).astype(np.uint8)).resize((160, 213))
    shades = [grey.point(lambda v: 0.7 * v + 30), grey.point(lambda v: 0.8 * v + 20), grey]
    colour = Image.merge("RGB", shades)
    for image, kind in itertools.product((grey, colour), ("PNG", "JPEG", "TIFF", "BMP")):
        data = pillow(image, kind)
        expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE).astype(int)
        tolerance = 2 * (kind == "JPEG") + (image is colour)
        assert close(read(tmp_path, data), expected, tolerance), (kind, image.mode)


METADATA = {
    "1.5 MB of ICC profile": chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_500_000))),
    "an ICC profile by an unknown method": chunk(b"iCCP", b"a\0\7junk"),
    "an empty ICC profile": chunk(b"iCCP", b""),
    "2 MB of compressed text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2_000_000))),
    "2 MB of international text": chunk(
        b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"a" * 2_000_000)
    ),
    "70 MB of text in all": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 70,
    "text that is not compressed": chunk(b"zTXt", b"Comment\0\0junk"),
    "gamma that is too short": chunk(b"gAMA", b"\0"),
    "a resolution that is too short": chunk(b"pHYs", b"\0"),
    "chromaticities that are too short": chunk(b"cHRM", b"\0"),
    "a private chunk": chunk(b"prVt", b"anything"),
    "a wrong checksum": chunk(b"tEXt", b"Comment\0hello")[:-1] + b"?",
    "a wrong checksum of EXIF": chunk(b"eXIf", b"II*\0\x08\0\0\0")[:-1] + b"?",
    "a damaged EXIF block": chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
    "an empty EXIF block": chunk(b"eXIf", b""),
    "a count of frames with a wrong checksum": chunk(b"acTL", bytes([0, 0, 0, 9] * 2))[:-1] + b"?",
}


@pytest.mark.parametrize("extra", METADATA.values(), ids=METADATA)
def test_png_metadata_never_condemns_pixels(tmp_path, extra):
    values = noise(6, 5)
    assert (read(tmp_path, png(values, extra=extra)) == values).all()
    assert (read(tmp_path, png(values, after=extra)) == values).all()


def test_a_png_without_its_end_or_with_something_behind_it_is_whole(tmp_path):
    values = noise(6, 5)
    data = png(values)
    for end in (data[:-12], data[:-6], data + b"\0", data + b"junk" * 9, data + data):
        assert (read(tmp_path, end) == values).all()


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE", b"tRNS", b"IDAT"])
def test_a_damaged_chunk_on_which_pixels_depend_is_refused(tmp_path, name):
    extra = chunk(b"PLTE", bytes(range(12))) + chunk(b"tRNS", b"\xff\xff\xff\xff")
    data = bytearray(png(noise(4, 4, 4), 8, PALETTE, extra))
    data[data.index(name) + 4] ^= 1
    assert "checksum" in reason_of(tmp_path, bytes(data))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("colour", "depth"),
    [(GREY, 8), (GREY, 16), (GREY, 1), (RGB, 8), (RGBA, 8), (GREY_ALPHA, 8), (PALETTE, 8)],
)
def test_a_sound_stream_with_too_few_rows_is_refused(tmp_path, colour, depth, interlaced):
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if colour == PALETTE else b""
    for height in (16, 17):  # interlaced, the last row or the one before it is the last to come
        values = np.full((height, 16, CHANNELS[colour]), 2**depth - 1)
        values[0, 0] = 0
        for missing in (1, 5):
            data = png(values, depth, colour, palette, interlaced, missing)
            why = reason_of(tmp_path, data)
            if interlaced:  # odd rows come last
                assert re.fullmatch(r"cut short: rows after \d+ are missing", why)
            else:
                assert why == f"cut short: rows after {height - missing} are missing"
        whole = read(tmp_path, png(values, depth, colour, palette, interlaced))
        assert whole[-1].all()


@pytest.mark.parametrize("value", [0, 1])
def test_a_whole_image_that_ends_in_the_marks_of_missing_rows_is_read(tmp_path, value):
    values = noise(9, 9)
    values[-3:] = value
    for interlaced in (False, True):
        assert (read(tmp_path, png(values, interlaced=interlaced)) == values).all()


def test_every_flipped_bit_of_png_pixels_is_noticed(tmp_path):
    data = png(noise(6, 6))
    start, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 4
    for bit in range(8 * start, 8 * end):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert "checksum" in reason_of(tmp_path, bytes(flipped))


# ---- JPEG ----


def shaded(height: int = 48, width: int = 64) -> Image.Image:
    return Image.fromarray(noise(6, 8).astype(np.uint8)).resize((width, height))


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    inks = Image.new("CMYK", (16, 16), (0, 0, 0, 55))  # a fifth of black ink on white paper
    got = read(tmp_path, pillow(inks, "JPEG", quality=100), "a.jpg")
    assert close(got, np.full((16, 16), 200), 2)


TURNED = {  # EXIF: how the stored [[1, 2, 3], [4, 5, 6]] looks on the screen
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_turn(tmp_path, orientation):
    stored, upright = np.array(TURNED[1]) * 40, np.array(TURNED[orientation]) * 40
    exif = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x0112, 3, 1, orientation, 0)
    assert (read(tmp_path, png(stored, extra=chunk(b"eXIf", exif))) == upright).all()
    deep = read(tmp_path, png(stored * 257, 16, extra=chunk(b"eXIf", exif)))
    assert close(deep, stretched(upright))
    large = Image.fromarray(np.kron(stored, np.ones((16, 16))).astype(np.uint8))
    photo = read(tmp_path, pillow(large, "JPEG", quality=100, exif=b"Exif\0\0" + exif), "a.jpg")
    assert close(photo[8::16, 8::16], upright, 3)
    small = stored.astype(np.uint8)
    for scan in (tiff(small, tags={274: orientation}), tiff(small, ">", tags={274: orientation})):
        assert (read(tmp_path, scan, "a.tif") == upright).all()


def test_a_camera_jpeg_with_previews_shows_its_picture(tmp_path):
    main, preview = Image.new("L", (32, 24), 90), Image.new("L", (8, 6), 10)
    data = pillow(main, "MPO", save_all=True, append_images=[preview])
    assert close(read(tmp_path, data, "a.jpg"), np.full((24, 32), 90), 1)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_without_its_end_mark_is_whole_if_its_rows_are(tmp_path, mode, options):
    data = pillow(shaded().convert(mode), "JPEG", quality=90, **options)
    whole = read(tmp_path, data)
    for end in (data[:-2], data[:-1], data + bytes(2000), data[:-2] + bytes(2)):
        assert (read(tmp_path, end) == whole).all()
    for missing in (12, len(data) // 3):
        why = reason_of(tmp_path, data[: len(data) - missing])
        assert re.fullmatch(r"cut short: rows after \d+ are missing", why)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_jpeg_that_is_cut_short_says_after_which_row(tmp_path, mode, count):
    """Each row of blocks ends with a restart mark; the file is cut within the next one."""
    data = pillow(shaded().convert(mode), "JPEG", quality=95, subsampling=0, restart_marker_rows=1)
    ends = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", data)]
    assert len(ends) == 5
    why = reason_of(tmp_path, data[: ends[count - 1] + 12])
    assert why == f"cut short: rows after {8 * count} are missing"


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_scan_header_of_0_to_0_means_0_to_63(tmp_path, mode):
    data = pillow(shaded().convert(mode), "JPEG")
    assert data.count(b"\0\x3f\0") == 1
    assert (read(tmp_path, data.replace(b"\0\x3f\0", b"\0\0\0")) == read(tmp_path, data)).all()


# ---- TIFF ----


@pytest.mark.parametrize("order", "<>")
def test_16_bit_tiff_in_both_byte_orders_and_polarities(tmp_path, order):
    values = noise(6, 5, 4096).astype(np.uint16)
    assert close(read(tmp_path, tiff(values, order), "a.tif"), stretched(values))
    negative = tiff(values, order, white_is_zero=True)
    if order == "<":
        assert close(read(tmp_path, negative, "a.tif"), 255 - stretched(values))
    else:  # Pillow does not know this kind: said, rather than shown as a negative
        why = reason_of(tmp_path, negative, "a.tif")
        assert why.startswith("16-bit TIFF is not supported (byte order MM, SampleFormat 1, Ph")
    small = (values >> 4).astype(np.uint8)
    assert (read(tmp_path, tiff(small, order, white_is_zero=True), "a.tif") == 255 - small).all()


@pytest.mark.parametrize(("dtype", "step"), [("i2", 100), ("i4", 10**6), ("f4", 0.25)])
def test_deep_tiff_is_shown_between_its_extremes(tmp_path, dtype, step):
    values = ((np.arange(12).reshape(3, 4) - 5) * step).astype(dtype)
    assert close(read(tmp_path, tiff(values), "a.tif"), stretched(values))


def test_floating_point_tiff(tmp_path):
    for odd in (np.nan, np.inf):
        assert "finite" in reason_of(tmp_path, tiff(np.array([[1, odd]], np.float32)), "a.tif")
    vast = read(tmp_path, tiff(np.array([[-3e38, 3e38]], np.float32)), "a.tif")
    assert vast.tolist() == [[0, 255]]
    assert not read(tmp_path, tiff(np.full((3, 3), 0.5, np.float32)), "a.tif").any()
    transparent_looking = np.array([[-1.0, 0.0, 1.0]], np.float32)
    assert close(read(tmp_path, tiff(transparent_looking), "a.tif"), stretched(transparent_looking))


@pytest.mark.parametrize("shape", [(6, 8), (5, 7)])
def test_12_bit_tiff(tmp_path, shape):
    values = noise(*shape, 4096)
    bits = (values[..., None] >> np.arange(11, -1, -1)) & 1
    rows = b"".join(np.packbits(row.ravel()).tobytes() for row in bits)
    data = tiff(values.astype(np.uint16), tags={258: 12}, pixels=rows)
    assert close(read(tmp_path, data, "a.tif"), stretched(values))
    for tags in ({}, {262: 0}):
        data = tiff(values.astype(np.uint16), ">", tags={258: 12} | tags, pixels=rows)
        why = reason_of(tmp_path, data, "a.tif")
        assert why.startswith("12-bit TIFF is not supported (byte order MM")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("depth", [8, 4])
def test_a_palette_of_0_to_255_is_as_bright_as_one_of_0_to_65535(tmp_path, depth, order):
    count = 2**depth
    indices = noise(6, 8, count)
    greys = np.random.default_rng(1).permutation(256)[:count]
    rows = pack_rows(indices, depth)
    rows = b"".join(rows[i + 1 : i + 1 + depth] for i in range(0, len(rows), depth + 1))
    for scale in (1, 257):
        tags = {258: depth, 262: 3, 320: tuple(int(grey) * scale for grey in greys) * 3}
        data = tiff(indices.astype(np.uint8), order, tags=tags, pixels=rows)
        assert (read(tmp_path, data, "a.tif") == greys[indices]).all()


def planar(values: Array, **tags: object) -> bytes:
    """(H, W, 3) in separate planes."""
    height, width = values.shape[:2]
    pixels = np.moveaxis(values, 2, 0).tobytes()
    size = height * width * values.itemsize
    bits = (8 * values.itemsize,) * 3
    offsets, lengths = (8, 8 + size, 8 + 2 * size), (size,) * 3
    layout = {258: bits, 262: 2, 273: offsets, 277: 3, 279: lengths, 284: 2, 339: (1, 1, 1)}
    return tiff(values[..., 0], tags=layout | tags, pixels=pixels)


def test_planes_of_8_bits_are_read_and_deeper_ones_refused(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3)).astype(np.uint8)
    assert close(read(tmp_path, planar(colours), "a.tif"), luma(colours))
    why = reason_of(tmp_path, planar(colours.astype(np.uint16) * 257), "a.tif")
    assert "16-bit" in why
    assert "not supported" in why
    assert "damaged" not in why
    grey_plane = tiff(noise(4, 4, 4096).astype(np.uint16), tags={284: 2})
    assert "16-bit" in reason_of(tmp_path, grey_plane, "a.tif")


@pytest.mark.parametrize(("dtype", "bits"), [("i1", "8-bit"), ("u4", "32-bit")])
@pytest.mark.parametrize("order", "<>")
def test_numbers_that_pillow_would_wrap_are_refused_for_the_true_reason(
    tmp_path, dtype, bits, order
):
    top = 2**31 + 5 if dtype == "u4" else 90
    why = reason_of(tmp_path, tiff(np.array([[0, top]]).astype(dtype), order), "a.tif")
    assert why.startswith(f"{bits} TIFF is not supported")


@pytest.mark.parametrize(
    ("dtype", "tags", "reason"),
    [
        ("f8", {}, "64-bit TIFF is not supported (byte order II, SampleFormat 3"),
        ("f2", {}, "16-bit TIFF is not supported (byte order II, SampleFormat 3"),
        ("u8", {}, "64-bit TIFF is not supported"),
        ("u2", {258: 10}, "10-bit TIFF is not supported"),
        ("u2", {258: 14}, "14-bit TIFF is not supported"),
        ("u1", {262: 8}, "PhotometricInterpretation 8, "),  # LAB of one channel
        ("u1", {262: 32803}, "PhotometricInterpretation 32803, "),  # colour filters of a camera
        ("u1", {259: 34712}, "Compression 34712)"),  # JPEG 2000
    ],
)
def test_kinds_of_tiff_that_pillow_does_not_know_are_named(tmp_path, dtype, tags, reason):
    why = reason_of(tmp_path, tiff(noise(4, 4).astype(dtype), tags=tags), "a.tif")
    assert reason in why
    assert "not supported" in why
    assert "damaged" not in why


def test_a_big_tiff_is_a_tiff(tmp_path):
    """Version 43: the offsets and counts have 64 bits."""
    values = noise(6, 5).astype(np.uint8)
    entries = {256: 5, 257: 6, 258: 8, 259: 1, 262: 1, 273: 16, 277: 1, 278: 6, 279: values.size}
    data = b"II" + struct.pack("<HHHQ", 43, 8, 0, 16 + values.size) + values.tobytes()
    data += struct.pack("<Q", len(entries))
    for tag, value in entries.items():
        data += struct.pack("<HHQQ", tag, 16, 1, value)
    assert (read(tmp_path, data + bytes(8), "a.tif") == values).all()
    assert mura.read_header(tmp_path / "a.tif") == mura.ImageHeader(5, 6)


def test_overviews_and_masks_of_a_tiff_are_no_frames(tmp_path):
    values = noise(12, 16).astype(np.uint8)
    small = tiff(values[::2, ::2])
    for subfile in (1, 4, 5):
        data = linked(tiff(values), small, tiff(values[::4, ::4]), subfile=subfile)
        assert (read(tmp_path, data, "a.tif") == values).all()
    mask = linked(tiff(values), tiff(values // 128), subfile=4)  # of the size of the image
    assert (read(tmp_path, mask, "a.tif") == values).all()
    page = tiff(values[:8])
    assert "several frames" in reason_of(tmp_path, linked(tiff(values), page), "a.tif")
    assert "several frames" in reason_of(tmp_path, linked(tiff(values), page, subfile=2), "a.tif")
    later = linked(linked(tiff(values), small, subfile=1), tiff(values))
    assert "several frames" in reason_of(tmp_path, later, "a.tif")
    deep = tiff(values.astype(np.float64))  # of a kind that cannot be decoded
    assert (read(tmp_path, linked(tiff(values), deep, subfile=1), "a.tif") == values).all()
    assert "several frames" in reason_of(tmp_path, linked(tiff(values), deep), "a.tif")
    packed = tiff(values[::2, ::2], tags={259: 34712})  # JPEG 2000; its shape is known all the same
    assert (read(tmp_path, linked(tiff(values), packed), "a.tif") == values).all()


@pytest.mark.parametrize("shape", [(12, 16), (101, 67), (9, 300)])
def test_a_smaller_directory_of_the_same_shape_is_an_overview_if_unmarked(tmp_path, shape):
    values = noise(*shape).astype(np.uint8)
    for step in (2, 3, 4):  # sides rounded up, and down
        small = values[::step, ::step]
        down = values[: shape[0] // step, : shape[1] // step]
        for overview in (small, down):
            data = linked(tiff(values), tiff(overview))
            assert (read(tmp_path, data, "a.tif") == values).all()
    larger = linked(tiff(values[::2, ::2]), tiff(values))
    assert "several frames" in reason_of(tmp_path, larger, "a.tif")
    assert "several frames" in reason_of(tmp_path, linked(tiff(values), tiff(values)), "a.tif")


@pytest.mark.parametrize("subfile", [0, 1])
def test_directories_without_end_are_not_counted(tmp_path, subfile):
    values = noise(4, 4).astype(np.uint8)
    first = tiff(values)
    count, entries = 60_000, first[8 + values.size :][2:-4]
    size = 2 + len(entries) + 12 + 4
    kind = struct.pack("<HHII", 254, 4, 1, subfile)
    directories = b"".join(
        struct.pack("<H", len(entries) // 12 + 1) + kind + entries
        + struct.pack("<I", len(first) + size * (number + 1) if number + 1 < count else 0)
        for number in range(count)
    )  # fmt: skip
    (tmp_path / "a.tif").write_bytes(first[:-4] + struct.pack("<I", len(first)) + directories)
    if subfile:
        assert (mura.read_radiograph(tmp_path / "a.tif").pixels == values).all()
    else:
        assert "several frames" in reason(tmp_path / "a.tif")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4"])
def test_libtiff_prints_nothing_about_damage(tmp_path, capfd, compression):
    image = shaded().convert("1") if compression == "group4" else shaded()
    data = pillow(image, "TIFF", compression=compression)
    rng = random.Random(compression)
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(4):
            changed[rng.randrange(8, len(changed))] = rng.randrange(256)
        (tmp_path / "a.tif").write_bytes(changed)
        outcome(tmp_path / "a.tif")
    assert capfd.readouterr() == ("", "")


# ---- other formats, names and paths ----


@pytest.mark.parametrize(
    "name", ["a.bmp", "a.gif", "a.webp", "a.tif", "a.JPG", "no_suffix", "a.dcm"]
)
def test_other_formats_and_names(tmp_path, name):
    values = np.kron(noise(4, 4), np.ones((16, 16))).astype(np.uint8)
    kinds = {"a.bmp": "BMP", "a.gif": "GIF", "a.webp": "WEBP", "a.tif": "TIFF", "a.JPG": "JPEG"}
    kind = kinds.get(name, "PNG")
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
    got = read(tmp_path, pillow(Image.fromarray(values), kind, **options), name)
    assert close(got, values.astype(int), 3 if kind == "JPEG" else 1)
    assert mura.read_header(tmp_path / name) == mura.ImageHeader(64, 64)


@pytest.mark.parametrize("size", [12, 40, 108, 124])
def test_a_bmp_of_every_version(tmp_path, size):
    """OS/2 1.x; Windows 3, 4 and 5, of which other programs write the last."""
    values = noise(5, 4)
    colours = np.dstack([values[::-1]] * 3).astype(np.uint8).tobytes()  # from the bottom up
    form = "<HHHH" if size == 12 else "<iiHH"
    header = struct.pack("<I", size) + struct.pack(form, 4, 5, 1, 24)
    header = header.ljust(size, b"\0")
    file = b"BM" + struct.pack("<IHHI", 14 + size + len(colours), 0, 0, 14 + size)
    assert (read(tmp_path, file + header + colours, "a.bmp") == values).all()
    assert mura.read_header(tmp_path / "a.bmp") == mura.ImageHeader(4, 5)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_several_frames_are_refused(tmp_path, kind):
    frames = [Image.fromarray(noise(8, 8, seed=seed).astype(np.uint8)) for seed in range(3)]
    for count in (2, 3):
        data = pillow(frames[0], kind, save_all=True, append_images=frames[1:count])
        assert "several frames" in reason_of(tmp_path, data)


def test_reasons_for_files_that_are_no_images(tmp_path):
    assert "empty" in reason_of(tmp_path, b"")
    assert "not an image" in reason_of(tmp_path, b"these are words, not pixels\n" * 20)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    assert "not an image" in reason_of(tmp_path, postscript)  # no Ghostscript
    assert "not an image" in reason_of(tmp_path, png([[1]])[:7])
    assert "damaged" in reason_of(tmp_path, png([[1]])[:20])
    assert "not an image" in reason_of(tmp_path, b"words" * 99, "a.dcm")


def test_reasons_for_paths(tmp_path):
    (tmp_path / "image1.png").mkdir()
    assert "folder" in reason(tmp_path / "image1.png")
    assert "no such file" in reason(tmp_path / "missing.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    reason(tmp_path / "loop.png")
    reason(tmp_path / ("x" * 5000))
    reason(Path("a\0b.png"))
    for path in (
        *tmp_path.iterdir(),
        tmp_path / "missing.png",
        tmp_path / ("x" * 5000),
        Path("\0"),
    ):
        assert mura.read_header(path) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFO on this system")
def test_fifo_socket_and_device_do_not_hang(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "image1.png")
    found = []

    def look() -> None:
        found.append(mura.read_header(tmp_path / "image1.png"))
        found.append(reason(tmp_path / "image1.png"))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(20)
    assert found[0] is None
    assert "not a regular file" in found[1]
    assert "regular" in reason(Path(os.devnull))
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # socket names are short
        server.bind("s.png")
        assert "regular" in reason(tmp_path / "s.png")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX permissions")
def test_no_permission():
    """The superuser may read anything: a forked child gives its rights up first."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "image1.png"
        path.write_bytes(png(noise(4, 4)))
        path.chmod(0)
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                assert mura.read_header(path) is None
                mura.read_radiograph(path)
            except BaseException as error:
                os.write(send, f"{type(error).__name__}: {error}".encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(send)
        with os.fdopen(receive) as pipe:
            assert pipe.read() == "BadImage: permission denied"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"])
def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path, kind):
    data = pillow(Image.fromarray(noise(12, 12).astype(np.uint8)), kind)
    whole, refused = read(tmp_path, data), 0
    lengths = range(1, len(data), len(data) // 400 + 1)
    for length in lengths:
        (tmp_path / "cut").write_bytes(data[:length])
        try:
            assert (mura.read_radiograph(tmp_path / "cut").pixels == whole).all(), length
        except mura.BadImage:
            refused += 1
    assert refused > 0.7 * len(lengths)  # what may be missing is only what follows the pixels


def test_each_file_is_read_and_decoded_once(tmp_path, monkeypatch):
    reads, decodes = [], []
    original, load = Path.read_bytes, ImageFile.ImageFile.load
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or original(path))

    def counted(image: ImageFile.ImageFile) -> object:
        decodes.extend([image] if image.tile else [])
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    colour = Image.merge("RGB", [shaded(), shaded().rotate(180), shaded()])
    for kind, image in itertools.product(("PNG", "JPEG", "BMP", "TIFF"), (shaded(), colour)):
        got = radiograph(tmp_path, pillow(image, kind), "image")
        mura.unlike_radiograph(got)
        assert (len(reads), len(decodes)) == (1, 1), kind
        reads.clear()
        decodes.clear()


def test_pillow_is_left_as_it_was_found(tmp_path):
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    read(tmp_path, png(noise(3, 3)))
    reason_of(tmp_path, png([[0]], size=(20_000, 20_000)))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_threads_decode_the_same(tmp_path):
    for index in range(24):
        values = noise(64, 64, seed=index).astype(np.uint8)
        junk = b"\x89PNG\r\n\x1a\njunk" + bytes(90)
        data = pillow(Image.fromarray(values), "PNG") if index % 3 else junk
        (tmp_path / f"{index}.png").write_bytes(data)

    def look(index: int) -> object:
        try:
            got = mura.read_radiograph(tmp_path / f"{index}.png").pixels
            return bool((got == noise(64, 64, seed=index)).all())
        except mura.BadImage as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(look, list(range(24)) * 4))
    assert outcomes == [True if index % 3 else outcomes[0] for index in range(24)] * 4
    assert "PNG" in str(outcomes[0])


# ---- limits ----


def peak_memory(work: Callable[[], object]) -> int:
    """MiB that the process holds at most while at work, above what it held before."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, *_ = memory("VmRSS")
        work()
        after, *_ = memory("VmHWM")
    except OSError:
        pytest.skip("needs Linux")
    return (after - before) >> 10


def memory(name: str) -> list[int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith(name)]


def test_sizes_are_judged_by_the_header(tmp_path, monkeypatch):
    jpeg = bytearray(pillow(Image.new("L", (8, 8)), "JPEG"))
    monkeypatch.setattr(
        Image.Image, "load", lambda self: pytest.fail("decoded before it was judged")
    )
    for size in ((10_001, 10_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1)):
        assert "megapixels" in reason_of(tmp_path, png([[0]], size=size))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = b"\xff\xff\xff\xff"
    assert "megapixels" in reason_of(tmp_path, bytes(jpeg))
    flat = np.zeros((1, 8), np.uint8)
    assert "megapixels" in reason_of(tmp_path, tiff(flat, tags={256: 2 * 10**8}), "a.tif")
    tile = {322: 40_000, 323: 40_000, 324: 8, 325: 8}
    assert "megapixels" in reason_of(tmp_path, tiff(flat, tags=tile), "a.tif")
    monkeypatch.setattr(mura, "MAX_PIXELS", 10**6)
    assert "1 megapixels" in reason_of(tmp_path, png([[0]], size=(1001, 1000)))
    monkeypatch.setattr(mura, "MAX_BYTES", 100)
    assert "larger" in reason_of(tmp_path, bytes(101))


def test_the_largest_radiographs_are_within_the_limits():
    assert mura.MAX_PIXELS >= 4728 * 5928  # mammography at 50 um
    assert mura.MAX_BYTES >= 8 * mura.MAX_PIXELS


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGBA", "PNG"),
        ("I;16", "PNG"),
        ("F", "TIFF"),
        ("RGB", "JPEG"),
        ("RGB", "WEBP"),
        ("P", "GIF"),
    ],
)
def test_a_small_file_takes_no_more_than_a_gigabyte(tmp_path, mode, kind):
    """Judged by a smaller one, for time: memory grows with the number of pixels."""
    image = Image.new(mode, (1500, 1500), 3)
    (tmp_path / "a").write_bytes(pillow(image, kind))
    share = image.width * image.height / mura.MAX_PIXELS
    assert peak_memory(lambda: outcome(tmp_path / "a")) < 20 + 1000 * share


def test_a_deflated_dicom_bomb_is_refused_packed(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    header = pydicom.dcmread(io.BytesIO(dicom(VALUES)))
    header.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, header)
    assert "deflated DICOM is not supported" in reason_of(tmp_path, buffer.getvalue(), "a.dcm")
    start = buffer.getvalue()
    meta = start[: 144 + struct.unpack_from("<I", start, 140)[0]]
    packer = zlib.compressobj(1, wbits=-15)
    zeros = b"".join(packer.compress(bytes(1 << 20)) for _ in range(400)) + packer.flush()
    (tmp_path / "b.dcm").write_bytes(meta + zeros)
    assert peak_memory(lambda: (reason(tmp_path / "b.dcm"), header_of(tmp_path / "b.dcm"))) < 100


def header_of(path: Path) -> mura.ImageHeader:
    header = mura.read_header(path)
    assert header is not None
    return header


def test_dicom_streams_that_claim_another_size_are_refused(tmp_path):
    codestream = bytearray(pillow(Image.fromarray(VALUES), "JPEG2000", no_jp2=True))
    size = codestream.index(b"\xff\x51") + 6
    for offset in (size, size + 16):  # of the image and of its tile
        codestream[offset : offset + 8] = struct.pack(">II", 60_000, 60_000)
    assert "megapixels" in reason_of(tmp_path, embedded(VALUES, bytes(codestream)), "a.dcm")
    for marker, options in ((b"\xff\xc0", {}), (b"\xff\xc2", {"progressive": True})):
        stream = bytearray(pillow(shaded(8, 8), "JPEG", **options))
        frame = stream.index(marker) + 5
        stream[frame : frame + 4] = b"\xff\xf0\xff\xf0"
        data = embedded(VALUES.astype(np.uint8), bytes(stream), JPEG_BASELINE)
        assert "megapixels" in reason_of(tmp_path, data, "a.dcm")
    smaller = embedded(VALUES.astype(np.uint8), pillow(shaded(4, 4), "JPEG"), JPEG_BASELINE)
    reason_of(tmp_path, smaller, "a.dcm")


# ---- what is no radiograph ----


def warning_for(folder: Path, pixels: Array) -> str | None:
    return mura.unlike_radiograph(radiograph(folder, pillow(Image.fromarray(pixels), "PNG")))


def soft_tissue(size: int = 200) -> npt.NDArray[np.uint8]:
    """Smooth shades with the noise of a detector."""
    y, x = np.mgrid[:size, :size] / size
    shade = 60 + 90 * np.exp(-((x - 0.5) ** 2) / 0.02) + 30 * y
    return (
        (shade + np.random.default_rng(0).normal(0, 3, shade.shape)).clip(0, 255).astype(np.uint8)
    )


def screenshot(width: int = 300, height: int = 200) -> npt.NDArray[np.uint8]:
    screen = Image.new("L", (width, height), 245)
    draw = ImageDraw.Draw(screen)
    draw.rectangle((0, 0, width, 24), fill=60)
    for row in range(8):
        draw.text((10, 40 + 18 * row), "Patient list - search - next - settings", fill=0)
    return np.asarray(screen)


def test_drawings_photographs_and_blanks_are_named(tmp_path):
    assert "screenshot" in (warning_for(tmp_path, screenshot()) or "")
    tall = np.vstack([screenshot()] * 11)
    assert "screenshot" in (warning_for(tmp_path, tall) or "")
    assert warning_for(tmp_path, np.full((50, 60), 128, np.uint8)) == "blank"
    assert warning_for(tmp_path, np.zeros((1, 1), np.uint8)) == "blank"
    tissue = soft_tissue()
    assert warning_for(tmp_path, tissue // 30) == "blank"
    assert warning_for(tmp_path, tissue // 12) is None
    assert "coloured" in (
        warning_for(tmp_path, np.dstack([tissue, tissue // 2, tissue // 3])) or ""
    )


@pytest.mark.parametrize("ground", [0, 128])
def test_a_lead_letter_on_an_empty_plate_is_no_anatomy(tmp_path, ground):
    """One pixel in 280 is white."""
    plate = np.full((200, 200), ground, np.uint8)
    plate[20:32, 170:182] = 255
    assert warning_for(tmp_path, plate) == "blank"


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (3, 2500)])
def test_images_of_one_line_are_judged_without_a_warning_on_stderr(tmp_path, capfd, shape):
    warning_for(tmp_path, noise(*shape).astype(np.uint8))
    assert capfd.readouterr() == ("", "")


def test_grey_images_pass_even_with_borders_and_small_coloured_marks(tmp_path):
    tissue = soft_tissue()
    assert warning_for(tmp_path, tissue) is None
    for border in (0, 255):
        framed = np.full((200, 200), border, np.uint8)
        framed[60:150, 80:140] = tissue[60:150, 80:140]
        assert warning_for(tmp_path, framed) is None
    marked = np.dstack([tissue] * 3)
    marked[5:15, 5:25] = 255, 255, 0
    assert warning_for(tmp_path, marked) is None
    unseen = np.dstack([tissue] * 3 + [np.full_like(tissue, 255)])
    unseen[:100] = 255, 0, 0, 0  # red, but transparent
    assert warning_for(tmp_path, unseen) is None


def test_chroma_is_the_mean_spread_of_the_channels(tmp_path):
    tissue = soft_tissue()
    assert radiograph(tmp_path, pillow(Image.fromarray(tissue), "PNG")).chroma == 0
    rgb = np.dstack([tissue, tissue // 2, tissue // 2])
    got = radiograph(tmp_path, pillow(Image.fromarray(rgb), "PNG")).chroma
    assert got == pytest.approx((tissue - tissue // 2).mean(), rel=0.05)


@pytest.mark.skipif(not KNEES.is_dir(), reason="the real radiographs are not part of the project")
def test_no_real_radiograph_is_flagged_whole_or_collimated():
    paths = sorted(KNEES.rglob("*.png"))[::10]
    for path in paths:
        pixels = mura.read_radiograph(path).pixels
        assert mura.unlike_radiograph(mura.Radiograph(pixels)) is None, path
        collimated = np.zeros_like(pixels)
        collimated[80:150, 90:140] = pixels[80:150, 90:140]
        assert mura.unlike_radiograph(mura.Radiograph(collimated)) is None, path
    assert len(paths) > 50


# ---- DICOM ----

JPEG_BASELINE, JPEG_EXTENDED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
JPEG_2000, NATIVE = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.1"
DIGITAL_X_RAY = "1.2.840.10008.5.1.4.1.1.1"
VALUES = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)


def dicom(
    values: Array, photometric: str = "MONOCHROME2", raw: bool = False, **tags: object
) -> bytes:
    """Encode (H, W), (H, W, 3) or, with NumberOfFrames, (N, H, W); `raw`: no preamble, no meta."""
    pydicom = pytest.importorskip("pydicom")
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = tags.pop("syntax", NATIVE)
    header.SOPClassUID, header.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    header.PatientName, header.PatientID = "Secret^Name", "SECRET-ID"
    samples = 3 if values.shape[-1] == 3 else 1
    header.Rows, header.Columns = values.shape[:2] if samples == 3 else values.shape[-2:]
    header.SamplesPerPixel, header.PhotometricInterpretation = samples, photometric
    if samples == 3:
        header.PlanarConfiguration = 0
    header.BitsAllocated = 8 * values.itemsize
    header.BitsStored = tags.pop("BitsStored", header.BitsAllocated)
    header.HighBit = tags.pop("HighBit", header.BitsStored - 1)
    header.PixelRepresentation = int(values.dtype.kind == "i")
    for name, value in tags.items():
        setattr(header, name, value)
    header.PixelData = tags.get("PixelData", values.tobytes() + bytes(values.nbytes % 2))
    if header.file_meta.TransferSyntaxUID.is_encapsulated:
        header["PixelData"].VR = "OB"
    buffer = io.BytesIO()
    if raw:
        implicit = header.file_meta.TransferSyntaxUID.is_implicit_VR
        del header.file_meta
        pydicom.dcmwrite(buffer, header, implicit_vr=implicit, little_endian=True)
    else:
        pydicom.dcmwrite(buffer, header, enforce_file_format=True)
    return buffer.getvalue()


def embedded(values: Array, stream: bytes, syntax: str = JPEG_2000, **tags: object) -> bytes:
    pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate

    return dicom(values, syntax=syntax, PixelData=encapsulate([stream]), **tags)


def retagged(data: bytes, keyword: str, value: bytes) -> bytes:
    """A DICOM file with other bytes as the value of one element of text, of the same length."""
    import pydicom

    old = pydicom.dcmread(io.BytesIO(data)).get_item(keyword).value
    assert len(value) <= len(old)
    assert data.count(old) == 1
    return data.replace(old, value.ljust(len(old)))


def table(entries: Array, first: int, bits: int, vr: str = "OW") -> list[object]:
    import pydicom

    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries) % 65536, first, bits])
    numbers = [int(entry) for entry in entries]
    item.add_new("LUTData", vr, numbers if vr == "US" else entries.astype("<u2").tobytes())
    return [item]


def looked_up(values: Array, entries: Array, first: int) -> Array:
    """PS3.3 C.11.2.1.1: values before the first entry have it, values behind the last have that."""
    return entries[np.clip(values.astype(int) - first, 0, len(entries) - 1)].astype(float)


def windowed(values: Array, centre: float, width: float, function: str = "LINEAR") -> Array:
    """PS3.3 C.11.2.1.2.1, C.11.2.1.3.1 and C.11.2.1.3.2, for an output of 0 to 255."""
    x = values.astype(float)
    if function == "SIGMOID":
        return 255 / (1 + np.exp(-4 * (x - centre) / width))
    if function == "LINEAR_EXACT":
        shown = ((x - centre) / width + 0.5) * 255
        return np.where(x <= centre - width / 2, 0, np.where(x > centre + width / 2, 255, shown))
    c, w = centre - 0.5, width - 1
    with np.errstate(all="ignore"):
        shown = ((x - c) / w + 0.5) * 255
    return np.where(x <= c - w / 2, 0, np.where(x > c + w / 2, 255, shown))


def test_dicom_without_a_window_shows_its_extremes_as_black_and_white(tmp_path):
    values = VALUES[2:6] + 5
    expected = stretched(values)
    assert close(read(tmp_path, dicom(values), "a.dcm"), expected)
    assert close(read(tmp_path, dicom(values), "no_suffix"), expected)
    assert close(read(tmp_path, dicom(values, "MONOCHROME1"), "a.dcm"), 255 - expected)
    signed = values.astype(np.int16) - 2000
    rescaled = dicom(signed, RescaleSlope=2, RescaleIntercept=-1000)
    assert close(read(tmp_path, rescaled, "a.dcm"), expected)
    falling = dicom(signed, RescaleSlope=-1, RescaleIntercept=0)
    assert close(read(tmp_path, falling, "a.dcm"), 255 - expected)
    assert not read(tmp_path, dicom(np.full((4, 4), 77, np.uint16)), "a.dcm").any()


def test_a_dicom_of_8_bits_without_a_window_is_shown_as_stored(tmp_path):
    values = noise(9, 8, 100).astype(np.uint8) + 40
    assert (read(tmp_path, dicom(values), "a.dcm") == values).all()
    assert (read(tmp_path, dicom(values, "MONOCHROME1"), "a.dcm") == 255 - values).all()
    deep = values.astype(np.uint16)
    assert (read(tmp_path, dicom(deep, BitsStored=8), "a.dcm") == values).all()
    six = values // 4
    expected = six.astype(int) * 255 / 63
    assert close(read(tmp_path, dicom(six, BitsStored=6), "a.dcm"), expected)
    signed = (values.astype(int) - 90).astype(np.int8)
    assert close(read(tmp_path, dicom(signed), "a.dcm"), stretched(signed))


WINDOWS = {
    "linear": {"WindowCenter": 2048, "WindowWidth": 1000},
    "linear, the first of two": {"WindowCenter": [1500, 9], "WindowWidth": [3000, 9]},
    "a step": {"WindowCenter": 2048, "WindowWidth": 1},
    "exact": {"WindowCenter": 2048, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 2000, "WindowWidth": 800, "VOILUTFunction": "SIGMOID"},
    "after the slope": {
        "WindowCenter": 100, "WindowWidth": 300, "RescaleSlope": 0.1, "RescaleIntercept": -50,
    },
    "after a falling slope": {
        "WindowCenter": -2000, "WindowWidth": 3000, "RescaleSlope": -1, "RescaleIntercept": 10,
    },
    "wider than the data": {"WindowCenter": 2048, "WindowWidth": 20000},
    "half beside the data": {"WindowCenter": 4000, "WindowWidth": 2000},
}  # fmt: skip


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("tags", WINDOWS.values(), ids=WINDOWS)
def test_dicom_window_agrees_with_the_standard(tmp_path, tags, photometric):
    x = VALUES * float(tags.get("RescaleSlope", 1)) + float(tags.get("RescaleIntercept", 0))
    centre, width = (np.ravel(tags[name])[0] for name in ("WindowCenter", "WindowWidth"))
    expected = windowed(x, centre, width, str(tags.get("VOILUTFunction", "LINEAR")))
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    for bits in (12, 16):
        data = dicom(VALUES, photometric, BitsStored=bits, **tags)
        assert close(read(tmp_path, data, "a.dcm"), expected)


def test_dicom_window_of_signed_and_of_8_bit_values(tmp_path):
    signed = VALUES.astype(np.int16) - 2048
    data = dicom(signed, BitsStored=12, WindowCenter=-100, WindowWidth=900)
    assert close(read(tmp_path, data, "a.dcm"), windowed(signed, -100, 900))
    small = (VALUES >> 4).astype(np.uint8)
    data = dicom(small, WindowCenter=100, WindowWidth=60)
    assert close(read(tmp_path, data, "a.dcm"), windowed(small, 100, 60))


CURVE = (np.linspace(0, 1, 1000) ** 2 * 4095).astype(np.uint16)


@pytest.mark.parametrize("vr", ["OW", "US"])
@pytest.mark.parametrize("bits", [12, 14, 16])
def test_white_is_where_the_values_of_a_voi_table_end(tmp_path, bits, vr):
    expected = looked_up(VALUES, CURVE, 1500) * 255 / 4095
    data = dicom(VALUES, VOILUTSequence=table(CURVE, 1500, bits, vr))
    assert close(read(tmp_path, data, "a.dcm"), expected)
    data = dicom(VALUES, "MONOCHROME1", VOILUTSequence=table(CURVE, 1500, bits, vr))
    assert close(read(tmp_path, data, "a.dcm"), 255 - expected)
    ten_bits = CURVE >> 2
    data = dicom(VALUES, VOILUTSequence=table(ten_bits, 1500, bits, vr), BitsStored=12)
    assert close(read(tmp_path, data, "a.dcm"), looked_up(VALUES, ten_bits, 1500) * 255 / 1023)


def test_a_voi_table_is_preferred_to_a_window_and_applied_after_the_slope(tmp_path):
    sequence = table(CURVE, 0, 12)
    sequence[0].add_new("LUTDescriptor", "SS", [len(CURVE), -500, 12])
    tags = {"VOILUTSequence": sequence, "RescaleSlope": 1, "RescaleIntercept": -1500}
    data = dicom(VALUES, WindowCenter=9, WindowWidth=9, **tags)
    expected = looked_up(VALUES.astype(int) - 1500, CURVE, -500) * 255 / 4095
    assert close(read(tmp_path, data, "a.dcm"), expected)


@pytest.mark.parametrize("vr", ["OW", "US"])
def test_table_of_8_bits_and_table_of_65536_entries(tmp_path, vr):
    to_8_bits = (np.arange(4096) >> 4).astype(np.uint16)
    data = dicom(VALUES, VOILUTSequence=table(to_8_bits, 0, 8, vr))
    assert (read(tmp_path, data, "a.dcm") == VALUES >> 4).all()
    full = np.arange(65536, dtype=np.uint16)
    data = dicom(VALUES * 16, VOILUTSequence=table(full, 0, 16))
    assert close(read(tmp_path, data, "a.dcm"), VALUES.astype(int) * 16 * 255 / 65535)


@pytest.mark.parametrize("vr", ["OW", "US"])
@pytest.mark.parametrize("first", [0, 100])
@pytest.mark.parametrize("count", [3001, 4096])
def test_a_table_of_8_bits_may_have_two_entries_in_a_word(tmp_path, vr, first, count):
    """PS3.3 C.11.2.1.1; the first of two is the low byte."""
    entries = np.random.default_rng(0).integers(0, 256, count).astype(np.uint8)
    entries[0] = 255
    packed = np.frombuffer(entries.tobytes() + bytes(count % 2), "<u2")
    sequence = table(packed, first, 8, vr)
    sequence[0].LUTDescriptor = [count, first, 8]
    data = dicom(VALUES, VOILUTSequence=sequence)
    assert (read(tmp_path, data, "a.dcm") == looked_up(VALUES, entries, first)).all()
    data = dicom(VALUES, ModalityLUTSequence=sequence, WindowCenter=128, WindowWidth=256)
    expected = windowed(looked_up(VALUES, entries, first), 128, 256)
    assert close(read(tmp_path, data, "a.dcm"), expected)


@pytest.mark.parametrize("keyword", ["VOILUTSequence", "ModalityLUTSequence"])
def test_a_table_of_a_big_endian_file(tmp_path, keyword):
    """The words of OW are in the byte order of the file (PS3.5 A.3)."""
    sequence = table(CURVE, 1500, 12)
    sequence[0].LUTData = CURVE.astype(">u2").tobytes()
    pixels = VALUES.astype(">u2").tobytes()
    data = dicom(
        VALUES, syntax="1.2.840.10008.1.2.2", PixelData=pixels, **{keyword: sequence})
    expected = looked_up(VALUES, CURVE, 1500)
    assert close(read(tmp_path, data, "a.dcm"), stretched(expected, 0, 4095))


@pytest.mark.parametrize("bits", [12, 16])
def test_modality_table(tmp_path, bits):
    entries = CURVE << (bits - 12)
    top = 2.0**bits
    sequence = table(entries, 1500, bits)
    expected = looked_up(VALUES, entries, 1500)
    window = {"WindowCenter": top / 2, "WindowWidth": top}
    data = dicom(VALUES, ModalityLUTSequence=sequence, **window)
    assert close(read(tmp_path, data, "a.dcm"), windowed(expected, top / 2, top))
    data = dicom(VALUES, "MONOCHROME1", ModalityLUTSequence=sequence)
    assert close(read(tmp_path, data, "a.dcm"), 255 - stretched(expected))


def test_an_attribute_that_cannot_be_understood_is_left_out(tmp_path):
    import pydicom

    window = {"WindowCenter": 2048, "WindowWidth": 1000}
    plain = read(tmp_path, dicom(VALUES, **window), "a.dcm")
    empty = pydicom.Dataset()
    empty.add_new("LUTDescriptor", "US", None)
    for keyword in ("ModalityLUTSequence", "VOILUTSequence"):
        for items in ([], [empty], [pydicom.Dataset()]):
            data = dicom(VALUES, **window, **{keyword: items})
            assert (read(tmp_path, data, "a.dcm") == plain).all()
    slope = {"RescaleSlope": "1.00", "RescaleIntercept": "0.00"}
    for keyword in slope:
        data = retagged(dicom(VALUES, **window, **slope), keyword, b"junk")
        assert (read(tmp_path, data, "a.dcm") == plain).all()
    unstretched = read(tmp_path, dicom(VALUES), "a.dcm")
    for keyword in window:
        data = retagged(
            dicom(VALUES, WindowCenter="2048.25", WindowWidth="1000.25"), keyword, b"junk"
        )
        assert (read(tmp_path, data, "a.dcm") == unstretched).all()
    broken = table(CURVE, 0, 12)
    broken[0].LUTData = b"short!"
    data = dicom(VALUES, VOILUTSequence=broken)
    assert (read(tmp_path, data, "a.dcm") == unstretched).all()


def test_a_decimal_comma_is_a_point(tmp_path):
    points = {"WindowCenter": "2000.5", "WindowWidth": "1000.5"}
    slope = {"RescaleSlope": "1.25", "RescaleIntercept": "-7.5"}
    data = dicom(VALUES, **points, **slope)
    expected = read(tmp_path, data, "a.dcm")
    assert close(expected, windowed(VALUES * 1.25 - 7.5, 2000.5, 1000.5))
    for keyword, text in (points | slope).items():
        data = retagged(data, keyword, text.replace(".", ",").encode())
        assert (read(tmp_path, data, "a.dcm") == expected).all()
    two = dicom(VALUES, WindowCenter=["2000.5", "9.5"], WindowWidth=["1000.5", "8.5"], **slope)
    two = retagged(two, "WindowCenter", b"2000,5\\9,5")
    assert (read(tmp_path, two, "a.dcm") == expected).all()


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 60000, "WindowWidth": 10},
        {"WindowCenter": -900, "WindowWidth": 10},
        {"WindowCenter": 0, "WindowWidth": 0},
        {"WindowCenter": 2048, "WindowWidth": -5},
        {"WindowWidth": 5},
        {"WindowCenter": 5},
    ],
)
def test_a_window_that_misses_every_pixel_makes_no_silent_black_image(tmp_path, tags):
    plain = read(tmp_path, dicom(VALUES), "a.dcm")
    assert (read(tmp_path, dicom(VALUES, **tags), "a.dcm") == plain).all()


def anatomy(dtype: str = "u2") -> Array:
    """Twelve bits of shades, 40 x 50."""
    return np.linspace(300, 3900, 2000).astype(dtype).reshape(40, 50)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("dtype", "padding"), [("u2", 65535), ("u2", 0), ("u2", 63536), ("i2", -32768), ("i2", -2000)]
)
@pytest.mark.parametrize("bits", [12, 16])
def test_padding_is_black_and_out_of_the_range(tmp_path, photometric, dtype, padding, bits):
    values = anatomy(dtype)
    values[:, :9] = padding
    values[20, 20] = 4095  # one hot pixel
    stored = 13 if bits == 12 and dtype == "i2" else bits
    data = dicom(values, photometric, BitsStored=stored, PixelPaddingValue=padding)
    shown = read(tmp_path, data, "a.dcm")
    assert not shown[:, :9].any()
    inside = anatomy(dtype)[:, 9:].astype(int)
    expected = stretched(inside)
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    different = np.abs(shown[:, 9:] - expected) > 2
    assert different.sum() <= 1  # the hot pixel


def test_padding_range_and_padding_with_a_window(tmp_path):
    values = anatomy()
    values[:, :9] = np.linspace(60000, 60100, 9).astype(np.uint16)
    limits = {"PixelPaddingValue": 60100, "PixelPaddingRangeLimit": 60000}
    for tags in (limits, dict(zip(limits, reversed(limits.values()), strict=True))):
        for extra in ({}, {"WindowCenter": 2100, "WindowWidth": 3600}):
            shown = read(tmp_path, dicom(values, **tags, **extra), "a.dcm")
            assert not shown[:, :9].any()
            expected = windowed(values, 2100, 3600) if extra else stretched(values, 316, 3900)
            assert close(shown[:, 9:], expected[:, 9:], 2)


def test_an_image_of_nothing_but_padding_is_refused(tmp_path):
    reason_of(tmp_path, dicom(np.full((4, 4), 9, np.uint16), PixelPaddingValue=9), "a.dcm")


@pytest.mark.parametrize(("stored", "high"), [(12, 15), (10, 15), (14, 15), (10, 13), (12, 13)])
@pytest.mark.parametrize("dtype", ["u2", "i2"])
def test_left_aligned_values_are_shifted_as_high_bit_says(tmp_path, stored, high, dtype):
    values = noise(9, 8, 2**stored).astype(np.uint16) - (2 ** (stored - 1) if dtype == "i2" else 0)
    values = values.astype(dtype)
    values[0, 0], values[0, 1] = values.min(), values.max()
    window = {"WindowCenter": 300, "WindowWidth": 500}
    shift = high + 1 - stored
    below = noise(9, 8, 2**shift, seed=1).astype(dtype)  # bits that are not part of the value
    shifted = (values << shift) + below
    right = dicom(values, BitsStored=stored, **window)
    left = dicom(shifted, BitsStored=stored, HighBit=high, **window)
    expected = read(tmp_path, right, "a.dcm")
    assert close(expected, windowed(values, 300, 500))
    assert (read(tmp_path, left, "a.dcm") == expected).all()
    lying = dicom(values, BitsStored=stored, HighBit=high, **window)
    assert (read(tmp_path, lying, "a.dcm") == expected).all()
    no_window = dicom(shifted, BitsStored=stored, HighBit=high)
    assert close(read(tmp_path, no_window, "a.dcm"), stretched(values), 1)


def test_bits_above_the_stored_ones_are_no_part_of_a_value(tmp_path):
    """PS3.5 8.1.1: overlays of old files lie there, and the sign may be missing from them."""
    window = {"WindowCenter": 100, "WindowWidth": 900}
    signed = noise(9, 8, 4096).astype(np.int16) - 2048
    expected = windowed(signed, 100, 900)
    plain = dicom(signed, BitsStored=12, **window)
    assert close(read(tmp_path, plain, "a.dcm"), expected)
    without_sign = dicom(signed & 4095, BitsStored=12, **window)
    assert close(read(tmp_path, without_sign, "a.dcm"), expected)
    overlay = VALUES + (noise(8, 8, 16).astype(np.uint16) << 12)
    for data in (dicom(VALUES, BitsStored=12), dicom(overlay, BitsStored=12)):
        assert close(read(tmp_path, data, "a.dcm"), stretched(VALUES))


def test_a_padding_value_of_the_other_sign(tmp_path):
    """US or SS is ambiguous in DICOM, and files mix them up."""
    values = anatomy("i2")
    values[:, :9] = -32768
    data = dicom(values, PixelPaddingValue=-32768)
    wrong = data.replace(b"\x28\0\x20\x01SS\2\0", b"\x28\0\x20\x01US\2\0")
    assert wrong != data
    for file in (data, wrong):
        shown = read(tmp_path, file, "a.dcm")
        assert not shown[:, :9].any()
        assert close(shown[:, 9:], stretched(anatomy()[:, 9:]), 2)


def test_left_aligned_padding(tmp_path):
    values = anatomy() << 4
    values[:, :9] = 65535
    data = dicom(values, BitsStored=12, HighBit=15, PixelPaddingValue=65535)
    shown = read(tmp_path, data, "a.dcm")
    assert not shown[:, :9].any()
    assert close(shown[:, 9:], stretched(anatomy()[:, 9:]), 2)


def test_two_dicom_views_stay_comparable(tmp_path):
    """As for PNG: BitsStored does not set white, since scanners store 12 bits in 16."""
    one, other = (
        read(tmp_path, dicom(view(top).astype(np.uint16)), "a.dcm") for top in (1000, 1100)
    )
    assert close(one, other, 1)
    bone = [stretched(np.array([0, 900, top]))[1] for top in (1000, 1100)]
    assert abs(bone[0] - bone[1]) < 25


def test_dicom_without_preamble_and_file_meta(tmp_path):
    window = {"WindowCenter": 2048, "WindowWidth": 1000, "StudyInstanceUID": "1.2.9"}
    expected = windowed(VALUES, 2048, 1000)
    for syntax in (NATIVE, "1.2.840.10008.1.2"):
        data = dicom(VALUES, raw=True, syntax=syntax, **window)
        assert data[:4] == b"\x08\0\x16\0"
        for name in ("a.dcm", "IM0001", "a.png"):
            assert close(read(tmp_path, data, name), expected)
            assert mura.read_header(tmp_path / name) == mura.ImageHeader(8, 8, "1.2.9")
        with_table = dicom(VALUES, raw=True, syntax=syntax, VOILUTSequence=table(CURVE, 1500, 12))
        shown = looked_up(VALUES, CURVE, 1500) * 255 / 4095
        assert close(read(tmp_path, with_table, "a.dcm"), shown)
    no_preamble = dicom(VALUES, **window)[132:]
    assert close(read(tmp_path, no_preamble, "IM0002"), expected)
    over_tiff = (
        b"II*\0" + dicom(VALUES, **window)[4:]
    )  # a preamble may be the header of a TIFF file
    assert close(read(tmp_path, over_tiff, "IM0003"), expected)


def test_study_and_body_part_come_with_the_image_and_nothing_else_does(tmp_path):
    tags = {"StudyInstanceUID": "1.2.840.9", "BodyPartExamined": "ELBOW"}
    got = radiograph(tmp_path, dicom(VALUES, **tags), "a.dcm")
    assert (got.body_part, got.warning) == ("ELBOW", "")
    header = mura.read_header(tmp_path / "a.dcm")
    assert header == mura.ImageHeader(8, 8, "1.2.840.9")
    assert "ecret" not in f"{got}{header}"
    bare = radiograph(tmp_path, dicom(VALUES, StudyInstanceUID=None, BodyPartExamined=""), "a.dcm")
    assert (bare.body_part, mura.read_header(tmp_path / "a.dcm").study_uid) == ("", "")


@pytest.mark.parametrize(
    ("photometric", "tags", "clause"),
    [
        ("MONOCHROME2", {"PresentationIntentType": "FOR PROCESSING"}, "FOR PROCESSING"),
        ("MONOCHROME2", {"PresentationIntentType": "FOR PRESENTATION"}, ""),
        ("MONOCHROME2", {"SOPClassUID": f"{DIGITAL_X_RAY}.1.1"}, "FOR PROCESSING"),
        ("MONOCHROME2", {"SOPClassUID": f"{DIGITAL_X_RAY}.2.1"}, "FOR PROCESSING"),  # mammography
        ("MONOCHROME1", {"SOPClassUID": f"{DIGITAL_X_RAY}.3.1"}, "FOR PROCESSING"),  # intra-oral
        ("MONOCHROME2", {"SOPClassUID": f"{DIGITAL_X_RAY}.1"}, ""),
        ("MONOCHROME1", {"PresentationLUTShape": "IDENTITY"}, "PresentationLUTShape"),
        ("MONOCHROME2", {"PresentationLUTShape": "INVERSE"}, "PresentationLUTShape"),
        ("MONOCHROME1", {"PresentationLUTShape": "INVERSE"}, ""),
        ("MONOCHROME2", {"PresentationLUTShape": "IDENTITY"}, ""),
    ],
)
def test_images_that_may_be_negatives_are_warned_about(tmp_path, photometric, tags, clause):
    got = radiograph(tmp_path, dicom(VALUES, photometric, **tags), "a.dcm")
    plain = radiograph(tmp_path, dicom(VALUES, photometric), "a.dcm")
    assert bool(got.warning) == bool(clause) and clause in got.warning
    assert (got.pixels == plain.pixels).all()


def test_colour_dicom_is_grey_if_its_channels_are(tmp_path):
    grey = noise(8, 10).astype(np.uint8)
    data = dicom(np.dstack([grey] * 3), "RGB")
    assert (read(tmp_path, data, "a.dcm") == grey).all()
    planes = np.stack([grey] * 3)
    data = dicom(np.dstack([grey] * 3), "RGB", PlanarConfiguration=1, PixelData=planes.tobytes())
    assert (read(tmp_path, data, "a.dcm") == grey).all()
    luminance = np.dstack([grey, np.full_like(grey, 128), np.full_like(grey, 128)])
    assert close(read(tmp_path, dicom(luminance, "YBR_FULL"), "a.dcm"), grey, 1)
    pairs = np.full((8, 5, 4), 128, np.uint8)  # two luminances, then the colour of both
    pairs[..., 0], pairs[..., 1] = grey[:, ::2], grey[:, 1::2]
    shared = dicom(luminance, "YBR_FULL_422", PixelData=pairs.tobytes())
    assert close(read(tmp_path, shared, "a.dcm"), grey, 1)
    short = dicom(luminance, "YBR_FULL_422", PixelData=pairs[:7].tobytes())
    assert "cut short: 140 of 160 bytes" in reason_of(tmp_path, short, "a.dcm")
    marked = np.dstack([np.kron(grey, np.ones((16, 16), np.uint8))] * 3)
    marked[:20, :20] = 255, 255, 0
    assert 0 < radiograph(tmp_path, dicom(marked, "RGB"), "a.dcm").chroma < 16
    photo = np.dstack([grey, grey // 3, grey // 5])
    assert "colour DICOM" in reason_of(tmp_path, dicom(photo, "RGB"), "a.dcm")
    assert "colour DICOM" in reason_of(tmp_path, dicom(grey, "PALETTE COLOR"), "a.dcm")


def test_the_first_of_undeclared_frames_is_shown(tmp_path):
    three = np.stack([VALUES, VALUES[::-1], VALUES.T])
    data = dicom(VALUES, PixelData=three.tobytes())
    assert close(read(tmp_path, data, "a.dcm"), stretched(VALUES))
    padded = dicom(VALUES, PixelData=VALUES.tobytes() + bytes(10))
    assert close(read(tmp_path, padded, "a.dcm"), stretched(VALUES))


def test_dicom_that_is_refused(tmp_path):
    import pydicom

    two = np.stack([VALUES, VALUES])
    refused = {
        "several frames": dicom(two, NumberOfFrames=2),
        "megapixels": dicom(VALUES, Rows=20_000, Columns=20_000),
        "cut short: 128 of 144 bytes": dicom(VALUES, Rows=9),
        "Rows is missing or 0": dicom(VALUES, Rows=0),
        "Columns is missing or 0": dicom(VALUES, Columns=0),
        "BitsAllocated is missing or 0": dicom(VALUES, BitsAllocated=0),
        "20 bits stored of 16": dicom(VALUES, BitsStored=20),
        "0 bits stored of 16": dicom(VALUES, BitsStored=0, HighBit=0),
        "transfer syntax is not known": dicom(VALUES).replace(
            b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.9.9\0"),
        "a side of more than 65535": png(np.zeros((65_536, 1), np.uint8)),
        "do not say where the pixels are": tiff(VALUES).replace(
            struct.pack("<HH", 273, 4), struct.pack("<HH", 65_000, 4)),
        "more than 16 bits": dicom(VALUES.astype(np.uint32)),
    }
    header = pydicom.dcmread(io.BytesIO(dicom(VALUES)))
    del header.PixelData
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, header)
    refused["without an image"] = buffer.getvalue()
    for why, data in refused.items():
        assert why in reason_of(tmp_path, data, "a.dcm")


@pytest.mark.parametrize("name", [
    "BitsStored", "HighBit", "SamplesPerPixel", "PixelRepresentation", "PhotometricInterpretation"])
@pytest.mark.parametrize("empty", [False, True])
def test_attributes_that_are_missing_have_their_usual_value(tmp_path, name, empty):
    """What the rest of the file says is enough; a polarity that is not known is told."""
    import pydicom

    header = pydicom.dcmread(io.BytesIO(dicom(VALUES)))
    setattr(header, name, None)
    if not empty:
        delattr(header, name)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, header)
    found = radiograph(tmp_path, buffer.getvalue(), "a.dcm")
    assert close(found.pixels, stretched(VALUES))
    told = "PhotometricInterpretation is missing: perhaps a negative"
    assert found.warning == (told if name == "PhotometricInterpretation" else "")


def test_a_slope_of_zero_is_no_slope(tmp_path):
    """It would make all pixels alike."""
    data = dicom(VALUES, RescaleSlope=0, RescaleIntercept=7)
    assert close(read(tmp_path, data, "a.dcm"), stretched(VALUES))


def test_what_a_decoder_returns_or_raises_is_a_reason(tmp_path, monkeypatch):
    import pydicom.pixels.utils as pydicom_pixels

    odd: list[object] = [
        np.zeros((3, 8, 8), np.uint16), np.zeros((8, 9), np.uint16), np.zeros((8, 8, 2), np.uint8),
        np.zeros(64, np.uint16), np.zeros((0, 0), np.uint16), None, np.zeros((8, 8), object),
    ]  # fmt: skip
    for result in odd:
        monkeypatch.setattr(pydicom_pixels, "pixel_array", lambda *_, result=result, **__: result)
        reason_of(tmp_path, dicom(VALUES), "a.dcm")
    for error in (TypeError, KeyError, RecursionError, MemoryError, AssertionError, struct.error):

        def fail(*_: object, error: type[Exception] = error, **__: object) -> None:
            raise error("Secret^Name")

        monkeypatch.setattr(pydicom_pixels, "pixel_array", fail)
        reason_of(tmp_path, dicom(VALUES), "a.dcm")
        monkeypatch.setattr(Image, "open", fail)
        reason_of(tmp_path, png(noise(4, 4)))
        assert mura.read_header(tmp_path / "image1.png") is not None
        monkeypatch.undo()


def test_dicom_without_the_optional_packages(tmp_path, monkeypatch):
    from pydicom.pixels import get_decoder

    streams = {JPEG_2000: "pylibjpeg-openjpeg", JPEG_BASELINE: "pylibjpeg-libjpeg"}
    for syntax, package in streams.items():
        monkeypatch.setattr(get_decoder(syntax), "_available", {})
        why = reason_of(tmp_path, embedded(VALUES, b"stream", syntax), "a.dcm")
        assert "pip install pylibjpeg " in why
        assert package in why
    monkeypatch.setitem(sys.modules, "pydicom", None)
    data = (tmp_path / "a.dcm").read_bytes()
    assert reason_of(tmp_path, data, "a.dcm").endswith("pip install 'pydicom>=3'")
    assert mura.read_header(tmp_path / "a.dcm") == mura.ImageHeader()


def test_jpeg_2000_in_dicom(tmp_path):
    pytest.importorskip("openjpeg")
    data = embedded(VALUES, pillow(Image.fromarray(VALUES), "JPEG2000", no_jp2=True), BitsStored=16)
    assert close(read(tmp_path, data, "a.dcm"), stretched(VALUES))


def twelve_bit_jpeg(greys: Array) -> bytes:
    """T.81 extended sequential, of blocks 8 x 8 that are each of one grey (0 to 4095)."""
    height, width = (8 * side for side in greys.shape)
    bits, previous = "", 0
    for level in (greys.ravel().astype(int) - 2048) * 8:
        difference, previous = int(level) - previous, int(level)
        size = abs(difference).bit_length()
        bits += f"{size:05b}"  # category `size` has the code `size`, see the table
        if size:
            bits += f"{difference if difference > 0 else difference + 2**size - 1:0{size}b}"
        bits += "0"  # end of block
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\0")

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(body)) + body

    of_dc = bytes([0, 0, 0, 0, 0, 17, *[0] * 11]) + bytes(range(17))  # 17 codes of 5 bits
    of_ac = bytes([0x10, 1, *[0] * 15]) + bytes(1)  # one code of 1 bit: end of block
    frame = struct.pack(">BHHB", 12, height, width, 1) + bytes([1, 0x11, 0])
    body = segment(0xDB, bytes([0]) + bytes([1] * 64)) + segment(0xC1, frame)
    body += segment(0xC4, of_dc) + segment(0xC4, of_ac) + segment(0xDA, bytes([1, 1, 0, 0, 63, 0]))
    return b"\xff\xd8" + body + scan + b"\xff\xd9"


def test_jpeg_extended_whose_scan_header_says_0_to_0(tmp_path):
    blocks = noise(4, 6, 4096).astype(np.uint16)
    stream = twelve_bit_jpeg(blocks)
    values = np.kron(blocks, np.ones((8, 8), np.uint16))
    odd = stream.replace(b"\x01\x01\0\0\x3f\0", b"\x01\x01\0\0\0\0")
    assert odd != stream
    for data in (stream, odd):
        data = embedded(values, data, JPEG_EXTENDED, BitsStored=12)
        (tmp_path / "a.dcm").write_bytes(data)
        assert mura.read_header(tmp_path / "a.dcm") == mura.ImageHeader(48, 32)
        try:
            import libjpeg  # noqa: F401
        except ImportError:
            assert "pip install pylibjpeg" in reason(tmp_path / "a.dcm")
            continue
        assert close(read(tmp_path, data, "a.dcm"), stretched(values), 1)


def real_dicom(name: str) -> Path:
    """A real radiograph of the package pydicom-data (never downloaded)."""
    store = pytest.importorskip("data_store")
    path = Path(next(iter(store.__path__))) / "data" / name
    if not path.is_file():
        pytest.skip(f"{name} is not installed")
    return path


def test_a_real_tibia_shows_bone_bright_on_dark():
    """MONOCHROME1, 10 bits, a window: as stored, bone would be dark on a bright ground."""
    got = mura.read_radiograph(real_dicom("RG3_UNCR.dcm"))
    assert got.pixels.shape == (1760, 1760)
    row = got.pixels[700].astype(int)  # across the shaft: air, muscle, cortex, marrow, ...
    air, bone = row[470:560], row[780:940]
    assert air.max() < 60
    assert np.percentile(bone, 90) > 140
    assert mura.unlike_radiograph(got) is None


def test_jpeg_2000_decodes_like_the_uncompressed_file():
    pytest.importorskip("openjpeg")
    plain = mura.read_radiograph(real_dicom("RG3_UNCR.dcm")).pixels
    assert (mura.read_radiograph(real_dicom("RG3_J2KR.dcm")).pixels == plain).all()
    lossy = mura.read_radiograph(real_dicom("RG3_J2KI.dcm")).pixels
    assert np.abs(lossy - plain.astype(int)).mean() < 2


# ---- read_header ----


def test_the_content_of_a_header_decides_and_its_name_does_not(tmp_path):
    (tmp_path / "a.png").write_bytes(dicom(VALUES))
    (tmp_path / "b.dcm").write_bytes(png(noise(3, 5)))
    (tmp_path / "c.dcm").write_bytes(b"words" * 99)
    (tmp_path / "d").write_bytes(planar(np.zeros((4, 6, 3), np.uint16)))
    found = [mura.read_header(path) for path in sorted(tmp_path.iterdir())]
    png_header, dicom_header = mura.ImageHeader(5, 3), mura.ImageHeader(8, 8)
    assert found == [dicom_header, png_header, None, mura.ImageHeader(6, 4)]


def test_a_damaged_image_is_still_an_image(tmp_path):
    for kind, data in {
        "PNG": png(noise(4, 4))[:20],
        "JPEG": pillow(shaded(), "JPEG")[:30],
        "TIFF": tiff(noise(4, 4).astype(np.float64))[:-9],
        "GIF": pillow(shaded(), "GIF")[:9],
    }.items():
        (tmp_path / "a").write_bytes(data)
        assert mura.read_header(tmp_path / "a") == mura.ImageHeader(), kind
        reason(tmp_path / "a")


def test_dicom_files_without_an_image_are_none(tmp_path):
    """DICOMDIR, reports and presentation states lie on every hospital's CD."""
    import pydicom

    header = pydicom.dcmread(io.BytesIO(dicom(VALUES)))
    for keyword in ("Rows", "Columns", "PixelData"):
        del header[keyword]
    header.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    pydicom.dcmwrite(tmp_path / "DICOMDIR", header)
    assert mura.read_header(tmp_path / "DICOMDIR") is None
    assert "without an image" in reason(tmp_path / "DICOMDIR")


def test_a_header_is_read_without_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    starts = {"a": png(noise(4, 4)), "b": tiff(noise(4, 4).astype(np.uint8)), "c": dicom(VALUES)}
    for name, data in starts.items():
        with (tmp_path / name).open("wb") as file:
            file.write(data)
            file.truncate(3 << 30)  # a hole of 3 GB
        assert peak_memory(lambda name=name: header_of(tmp_path / name)) < 20


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([0, 4, 8, 128]))
def test_garbage_has_no_header_and_a_reason(data, offset):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(data)
        reason(path)
        mura.read_header(path)
        for start in (b"\x89PNG\r\n\x1a\n", b"II*\0", b"\xff\xd8\xff", b"\x08\0\x16\0UI"):
            path.write_bytes(start + data)
            outcome(path)


# ---- hostile bytes ----

CASES = {"png": 400, "jpeg": 300, "tiff": 300, "gif": 100, "dicom": 250}


@cache
def seeds(kind: str) -> list[bytes]:
    grey = Image.fromarray(np.kron(noise(6, 5), np.ones((8, 8))).astype(np.uint8))
    if kind == "png":
        palette = chunk(b"PLTE", bytes(range(48))) + chunk(b"tRNS", bytes(range(16)))
        apng = pillow(grey, "PNG", save_all=True, append_images=[grey.rotate(90)])
        deep = png(noise(9, 9, 4096), 16, interlaced=True)
        return [pillow(grey, "PNG"), png(noise(7, 9, 16), 4, PALETTE, palette), deep, apng]
    if kind == "jpeg":
        exif = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x0112, 3, 1, 6, 0)
        colour = Image.merge("RGB", [grey, grey.rotate(90, expand=False), grey])
        files = [pillow(grey, "JPEG", exif=b"Exif\0\0" + exif)]
        files += [pillow(colour, "JPEG", progressive=True), pillow(colour.convert("CMYK"), "JPEG")]
        return [*files, files[0][:-2]]
    if kind == "tiff":
        small, deep = noise(9, 9).astype(np.uint8), noise(9, 9, 65536).astype(np.uint16)
        packed = [pillow(grey, "TIFF", compression=c) for c in ("tiff_lzw", "jpeg")]
        overview = linked(tiff(small), tiff(small[::2]), subfile=1)
        return [tiff(small), tiff(deep, ">"), overview, planar(np.dstack([small] * 3)), *packed]
    if kind == "gif":
        return [
            pillow(grey, "GIF"),
            pillow(grey, "GIF", save_all=True, append_images=[grey.rotate(90)]),
        ]
    lut = {"VOILUTSequence": table(np.arange(4096), 0, 12), "PixelPaddingValue": 64}
    window = {"WindowCenter": 2048, "WindowWidth": 999, "RescaleSlope": 1, "RescaleIntercept": 0}
    codestream = pillow(Image.fromarray(VALUES), "JPEG2000", no_jp2=True)
    photo = embedded(VALUES.astype(np.uint8), pillow(shaded(8, 8), "JPEG"), JPEG_BASELINE)
    files = [dicom(VALUES, **lut), dicom(VALUES, "MONOCHROME1", **window), photo]
    return [*files, dicom(VALUES, raw=True, **window), embedded(VALUES, codestream)]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, delete, repeat, cut; half of the PNG files get fitting checksums again."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(changed))
        kind = rng.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del changed[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            changed[at:at] = changed[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 70_000))
            changed[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)
        elif rng.random() < 0.3:
            del changed[at:]
        if not changed:
            return b""
    is_png = data[:4] == b"\x89PNG" and rng.random() < 0.5
    return with_fitting_checksums(bytes(changed)) if is_png else bytes(changed)


def with_fitting_checksums(data: bytes) -> bytes:
    out, at = data[:8], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        out += chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return out


def outcome(path: Path) -> bool:
    """Whether an image came out; anything but an image or a BadImage fails."""
    mura.read_header(path)
    try:
        got = mura.read_radiograph(path)
    except mura.BadImage as error:
        assert "ecret" not in str(error)
        return False
    assert got.pixels.ndim == 2
    assert got.pixels.dtype == np.uint8
    assert got.pixels.size
    mura.unlike_radiograph(got)
    return True


@pytest.mark.parametrize("kind", CASES)
def test_fuzzed_files_give_an_image_or_a_reason_and_nothing_on_stderr(
    tmp_path, monkeypatch, capfd, kind, request
):
    monkeypatch.setattr(mura, "MAX_PIXELS", 2 * 10**5)  # a size would cost seconds and find nothing
    cases = CASES[kind] * (20 if request.config.getoption("--many", False) else 1)
    rng, files, images = random.Random(kind), seeds(kind), 0
    path = tmp_path / "image"
    for case in range(cases):
        path.write_bytes(mutated(rng.choice(files), rng) if case >= len(files) else files[case])
        images += outcome(path)
    assert cases // 50 < images < cases
    assert capfd.readouterr() == ("", "")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_one_flipped_bit_or_a_cut_gives_an_image_or_a_reason(data):
    kind = data.draw(st.sampled_from(sorted(CASES)))
    changed = bytearray(data.draw(st.sampled_from(seeds(kind))))
    bit = data.draw(st.integers(0, 8 * len(changed) - 1))
    changed[bit // 8] ^= 1 << bit % 8
    end = data.draw(st.integers(1, len(changed)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        for content in (changed, changed[:end]):
            path.write_bytes(content)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(mura, "MAX_PIXELS", 2 * 10**5)
                outcome(path)
