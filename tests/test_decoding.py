"""Section 4, decoding: every kind of image file becomes grey as a radiologist would see it, or a stated reason.

Most files are written here byte by byte, so that the expected pixels come from arithmetic and not from the decoder
under test; OpenCV's decoders and pydicom's own display functions are the independent oracles.
"""

from __future__ import annotations

import io
import itertools
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFile

import mura_anomaly_detection as mad

# The program silences the decoders once, at its head; pytest resets that for each test. Children check stderr below.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

HERE = Path(__file__).resolve().parent
KNEES = HERE.parents[1] / "shared" / "data" / "knee"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG colour types
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


# ---- hand-made files ----


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def pack_rows(values: np.ndarray, depth: int) -> bytes:
    """PNG scan lines, each behind filter byte 0."""
    lines = values.reshape(len(values), -1)
    if depth == 16:
        return b"".join(b"\0" + line.astype(">u2").tobytes() for line in lines)
    bits = np.unpackbits(lines.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
    return b"".join(b"\0" + np.packbits(line.ravel()).tobytes() for line in bits)


def png(values, depth=8, colour=GREY, extra=b"", interlaced=False, missing_rows=0, size=None) -> bytes:
    """Encode (H, W) or (H, W, C) values; optionally with rows missing at the end, or a size in the header that lies."""
    values = np.asarray(values)
    height, width = size or values.shape[:2]
    if interlaced:
        passes = (values[y::dy, x::dx] for y, x, dy, dx in ADAM7)
        raw = b"".join(pack_rows(part, depth) for part in passes if part.size)
    else:
        raw = pack_rows(values, depth)
    raw = raw[: len(raw) - missing_rows * len(pack_rows(values[:1], depth))]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(values: np.ndarray, order="<", white_is_zero=False) -> bytes:
    """One uncompressed strip; sample format from the dtype."""
    height, width = values.shape
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: int(not white_is_zero), 273: 8}
    tags |= {277: 1, 278: height, 279: len(pixels), 339: kind}
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    magic = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8 + len(pixels))
    return magic + pixels + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def pillow(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(folder: Path, data: bytes, name: str = "image1.png") -> np.ndarray:
    (folder / name).write_bytes(data)
    pixels = mad.read_radiograph(folder / name)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 2
    assert pixels.flags.writeable
    return pixels


def reason(path: Path) -> str:
    with pytest.raises(mad.BadImage) as caught:
        mad.read_radiograph(path)
    assert str(path) not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def reason_of(folder: Path, data: bytes, name: str = "image1.png") -> str:
    (folder / name).write_bytes(data)
    return reason(folder / name)


def noise(height: int, width: int, top: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, (height, width))


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601."""
    return np.asarray(rgb, float) @ [0.299, 0.587, 0.114]


# ---- PNG ----


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (13, 17), (1, 5000), (5000, 1)])
def test_grey_png_scales_its_full_range_to_255(tmp_path, depth, interlaced, shape):
    values = noise(*shape, top=2**depth)
    expected = values * 255 // (2**depth - 1)
    assert (read(tmp_path, png(values, depth, interlaced=interlaced)) == expected).all()


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("interlaced", [False, True])
def test_16_bit_png_is_shown_by_the_smallest_usual_depth(tmp_path, bits, interlaced):
    values = noise(9, 7, top=2**bits)
    values[0, :2] = 0, 2**bits - 1
    expected = np.rint(values * 255 / (2**bits - 1))
    got = read(tmp_path, png(values, 16, interlaced=interlaced))
    assert (got == expected).all()
    assert got[0, :2].tolist() == [0, 255]


@pytest.mark.parametrize(("brightest", "shown"), [(0, 0), (255, 255), (256, 64), (4095, 255), (4096, 64), (32767, 127)])
def test_a_16_bit_image_is_never_saturated_nor_black_for_its_depth(tmp_path, brightest, shown):
    assert read(tmp_path, png([[0, brightest]], 16)).tolist() == [[0, shown]]


def test_colour_png_becomes_luma_and_grey_stored_as_colour_stays_exact(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3))
    assert np.abs(read(tmp_path, png(colours, colour=RGB)) - luma(colours)).max() <= 0.51
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
    grey, alpha = noise(8, 8), np.where(noise(8, 8, 2, seed=1), noise(8, 8, seed=2), 0)
    values = np.dstack([grey] * (CHANNELS[colour] - 1) + [alpha]) * (257 if depth == 16 else 1)
    got = read(tmp_path, png(values, depth, colour))
    assert np.abs(got - grey * alpha / 255).max() <= 0.51
    assert not got[alpha == 0].any()


@pytest.mark.parametrize(("depth", "colour"), [(8, GREY), (16, GREY), (1, GREY), (8, RGB)])
def test_the_one_transparent_value_of_a_png_is_black(tmp_path, depth, colour):
    top = 2**depth - 1
    values = np.array([[top, 0], [top, 0]] if colour == GREY else [[[top] * 3, [7, 7, 7]]])
    trns = chunk(b"tRNS", struct.pack(">H", top) * (3 if colour == RGB else 1))
    expected = [[0, 0], [0, 0]] if colour == GREY else [[0, 7]]
    assert read(tmp_path, png(values, depth, colour, trns)).tolist() == expected


def test_never_a_silent_black_image(tmp_path):
    clear = np.dstack([noise(4, 4), np.zeros((4, 4), int)])
    assert "transparent" in reason_of(tmp_path, png(clear, colour=GREY_ALPHA))
    twelve_bit_colour = np.dstack([noise(4, 4, 4096)] * 3)
    assert "16-bit colour" in reason_of(tmp_path, png(twelve_bit_colour, 16, RGB))


def test_opencv_decodes_the_same_grey(tmp_path):
    cv2 = pytest.importorskip("cv2")
    grey = Image.fromarray(noise(40, 30).astype(np.uint8)).resize((160, 213), Image.Resampling.BICUBIC)
    colour = Image.merge("RGB", [grey.point(lambda v: 0.7 * v + 30), grey.point(lambda v: 0.8 * v + 20), grey])
    for image, kind in itertools.product((grey, colour), ("PNG", "JPEG", "TIFF", "BMP")):
        data = pillow(image, kind)
        expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
        tolerance = 2 * (kind == "JPEG") + (image is colour)
        assert np.abs(read(tmp_path, data) - expected.astype(int)).max() <= tolerance, (kind, image.mode)


# ---- JPEG, TIFF and others ----


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    inks = Image.new("CMYK", (16, 16), (0, 0, 0, 55))  # a fifth of black ink on white paper
    assert np.abs(read(tmp_path, pillow(inks, "JPEG", quality=100), "a.jpg").astype(int) - 200).max() <= 2


TURNED = {  # EXIF: where row 0 and column 0 of the stored [[1, 2, 3], [4, 5, 6]] belong on the screen
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
    assert (read(tmp_path, png(stored * 257, 16, extra=chunk(b"eXIf", exif))) == upright).all()
    large = Image.fromarray(np.kron(stored, np.ones((16, 16))).astype(np.uint8))
    photo = read(tmp_path, pillow(large, "JPEG", quality=100, exif=b"Exif\0\0" + exif), "a.jpg")
    assert np.abs(photo[8::16, 8::16].astype(int) - upright).max() <= 3
    scan = pillow(Image.fromarray(stored.astype(np.uint8)), "TIFF", tiffinfo={0x0112: orientation})
    assert (read(tmp_path, scan, "a.tif") == upright).all()


def test_a_damaged_exif_block_does_not_cost_the_image(tmp_path):
    values = noise(4, 6)
    for junk in (b"", b"II*\0\xff\xff\xff\xff", b"MM" + bytes(range(40))):
        assert (read(tmp_path, png(values, extra=chunk(b"eXIf", junk))) == values).all()


@pytest.mark.parametrize("order", "<>")
def test_16_bit_tiff_in_both_byte_orders_and_polarities(tmp_path, order):
    values = noise(6, 5, 4096).astype(np.uint16)
    values[0, 0] = 4095
    expected = np.rint(values * 255.0 / 4095)
    assert (read(tmp_path, tiff(values, order), "a.tif") == expected).all()
    if order == "<":
        assert (read(tmp_path, tiff(values, order, white_is_zero=True), "a.tif") == 255 - expected).all()
    else:  # Pillow does not know this kind: said, rather than shown as a negative
        assert "known kind" in reason_of(tmp_path, tiff(values, order, white_is_zero=True), "a.tif")
    small = (values >> 4).astype(np.uint8)
    assert (read(tmp_path, tiff(small, order, white_is_zero=True), "a.tif") == 255 - small).all()


def test_deep_tiff_kinds(tmp_path):
    ramp = np.arange(12).reshape(3, 4)
    signed = (ramp * 100 - 500).astype(np.int16)  # no usual scale: extremes black and white
    assert (read(tmp_path, tiff(signed), "a.tif") == np.rint((signed + 500) * 255.0 / 1100)).all()
    assert (read(tmp_path, tiff((ramp * 300).astype(np.int32)), "a.tif") == np.rint(ramp * 300 * 255.0 / 4095)).all()
    assert (read(tmp_path, tiff((ramp * 10**6).astype(np.int32)), "a.tif") == np.rint(ramp * 255.0 / 11)).all()
    assert (read(tmp_path, tiff((ramp / 16).astype(np.float32)), "a.tif") == np.rint(ramp / 16 * 255)).all()
    assert (read(tmp_path, tiff((ramp * 20.0).astype(np.float32)), "a.tif") == ramp * 20).all()
    assert "finite" in reason_of(tmp_path, tiff(np.array([[1, np.nan]], np.float32)), "a.tif")
    assert "finite" in reason_of(tmp_path, tiff(np.array([[1, np.inf]], np.float32)), "a.tif")
    vast = np.array([[-3e38, 0, 3e38]], np.float32)
    assert read(tmp_path, tiff(vast), "a.tif")[0, 0] == 0
    assert read(tmp_path, tiff(vast), "a.tif")[0, 2] == 255


@pytest.mark.parametrize("name", ["a.bmp", "a.gif", "a.webp", "a.tif", "a.JPG", "no_suffix"])
def test_other_formats_and_names(tmp_path, name):
    values = np.kron(noise(4, 4), np.ones((16, 16))).astype(np.uint8)
    kind = {"bmp": "BMP", "gif": "GIF", "webp": "WEBP", "tif": "TIFF", "JPG": "JPEG"}.get(name[2:], "PNG")
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    got = read(tmp_path, pillow(Image.fromarray(values), kind, **options), name)
    assert np.abs(got - values.astype(int)).max() <= (3 if kind == "JPEG" else 1)


def test_a_camera_jpeg_with_previews_shows_its_picture(tmp_path):
    main, preview = Image.new("L", (32, 24), 90), Image.new("L", (8, 6), 10)
    data = pillow(main, "MPO", save_all=True, append_images=[preview])
    assert np.abs(read(tmp_path, data, "a.jpg").astype(int) - np.full((24, 32), 90)).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_several_frames_are_refused(tmp_path, kind):
    frames = [Image.fromarray(noise(8, 8, seed=seed).astype(np.uint8)) for seed in range(3)]
    assert "several frames" in reason_of(tmp_path, pillow(frames[0], kind, save_all=True, append_images=frames[1:]))


# ---- what cannot be used ----


def test_reasons_for_files_that_are_no_images(tmp_path):
    assert "empty" in reason_of(tmp_path, b"")
    assert "not an image" in reason_of(tmp_path, b"these are words, not pixels\n" * 20)
    assert "not an image" in reason_of(tmp_path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # no Ghostscript
    assert "not an image" in reason_of(tmp_path, png([[1]])[:7])
    assert "damaged" in reason_of(tmp_path, png([[1]])[:20])
    assert "not a DICOM" in reason_of(tmp_path, b"words" * 99, "a.dcm") or "pydicom" in reason(tmp_path / "a.dcm")


def test_reasons_for_paths(tmp_path):
    (tmp_path / "image1.png").mkdir()
    assert "folder" in reason(tmp_path / "image1.png")
    assert "no such file" in reason(tmp_path / "missing.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    reason(tmp_path / "loop.png")
    reason(tmp_path / ("x" * 5000))
    reason(Path("a\0b.png"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFO on this system")
def test_fifo_socket_and_device_do_not_hang(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "image1.png")
    script = "import sys, pathlib, mura_anomaly_detection as m\ntry: m.read_radiograph(pathlib.Path(sys.argv[1]))\n"
    script += "except m.BadImage as e: print(e)"
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "image1.png"],
        capture_output=True, text=True, timeout=60, env=child_environment(),
    )  # fmt: skip
    assert done.stdout == "not a regular file\n", done
    assert "regular" in reason(Path(os.devnull))
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # socket names are short
        server.bind("s.png")
        assert "regular" in reason(tmp_path / "s.png")


def child_environment() -> dict[str, str]:
    paths = [str(Path(mad.__file__).parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX permissions")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork beside threads: this child only opens a file
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
                mad.read_radiograph(path)
            except BaseException as error:
                os.write(send, f"{type(error).__name__}: {error}".encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(send)
        with os.fdopen(receive) as pipe:
            assert pipe.read() == "BadImage: permission denied"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"])
def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path, kind):
    data = pillow(Image.fromarray(noise(20, 20).astype(np.uint8)), kind)
    whole, refused = read(tmp_path, data), 0
    for length in range(1, len(data)):
        (tmp_path / "cut").write_bytes(data[:length])
        try:
            assert (mad.read_radiograph(tmp_path / "cut") == whole).all(), length
        except mad.BadImage:
            refused += 1
    assert refused > 0.7 * len(data)  # what may be missing is only what follows the pixels


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colour", "depth"), [(GREY, 8), (GREY, 16), (GREY, 1), (RGB, 8), (RGBA, 8), (GREY_ALPHA, 8)])
def test_a_sound_stream_with_too_few_rows_is_not_shown_as_black(tmp_path, colour, depth, interlaced):
    values = np.full((16, 16, CHANNELS[colour]), 2**depth - 1)
    short = png(values, depth, colour, interlaced=interlaced, missing_rows=5)
    assert "rows are missing" in reason_of(tmp_path, short)
    assert (read(tmp_path, png(values, depth, colour, interlaced=interlaced)) == 255).all()
    ones = np.ones_like(values)  # looks like the mark of missing rows, but is whole
    if colour != RGBA and colour != GREY_ALPHA and depth == 8:
        assert (read(tmp_path, png(ones, depth, colour, interlaced=interlaced)) == 1).all()


def test_every_flipped_bit_of_png_pixels_is_noticed(tmp_path):
    data = png(noise(6, 6))
    start, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 4
    for bit in range(8 * start, 8 * end):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert "checksum" in reason_of(tmp_path, bytes(flipped))


def test_decompression_bombs_are_judged_by_their_header(tmp_path, monkeypatch):
    for size in ((10_001, 10_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1)):
        assert "100 megapixels" in reason_of(tmp_path, png([[0]], size=size))
    jpeg = bytearray(pillow(Image.new("L", (8, 8)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = b"\xff\xff\xff\xff"
    assert "100 megapixels" in reason_of(tmp_path, bytes(jpeg))
    wide = tiff(np.zeros((1, 8), np.uint8)).replace(
        struct.pack("<HHII", 256, 4, 1, 8), struct.pack("<HHII", 256, 4, 1, 2 * 10**8)
    )
    assert "100 megapixels" in reason_of(tmp_path, wide, "a.tif")
    if find_spec("pydicom"):
        codestream = bytearray(pillow(Image.fromarray(VALUES), "JPEG2000", no_jp2=True))
        size = codestream.index(b"\xff\x51") + 6
        for offset in (size, size + 16):  # of the image and of its tile
            codestream[offset : offset + 8] = struct.pack(">II", 60_000, 60_000)
        assert "100 megapixels" in reason_of(tmp_path, embedded(dicom(VALUES), bytes(codestream)), "a.dcm")
    monkeypatch.setattr(mad, "MAX_PIXELS", 10**6)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded before the size was judged"))
    assert "1 megapixels" in reason_of(tmp_path, png([[0]], size=(1001, 1000)))
    monkeypatch.setattr(mad, "MAX_BYTES", 100)
    assert "larger" in reason_of(tmp_path, bytes(101))


def test_pillow_is_left_as_it_was_found(tmp_path):
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    read(tmp_path, png(noise(3, 3)))
    reason_of(tmp_path, png([[0]], size=(20_000, 20_000)))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_threads_decode_the_same(tmp_path):
    for index in range(24):
        values = noise(64, 64, seed=index).astype(np.uint8)
        (tmp_path / f"{index}.png").write_bytes(pillow(Image.fromarray(values), "PNG") if index % 3 else b"junk")

    def outcome(index: int) -> object:
        try:
            return (mad.read_radiograph(tmp_path / f"{index}.png") == noise(64, 64, seed=index)).all()
        except mad.BadImage as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(outcome, list(range(24)) * 4))
    assert outcomes == [True if index % 3 else outcomes[0] for index in range(24)] * 4
    assert "not an image" in str(outcomes[0])


# ---- scaling to the square ----


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(8, 512))
def test_the_letterbox_keeps_the_aspect_and_is_centred(height, width, size):
    left, top, right, bottom = mad.letterbox_box(height, width, size, "letterbox")
    assert max(right - left, bottom - top) == size
    scale = size / max(height, width)
    assert abs((right - left) - max(1, width * scale)) <= 0.5
    assert abs((bottom - top) - max(1, height * scale)) <= 0.5
    assert 0 <= (size - right) - left <= 1
    assert 0 <= (size - bottom) - top <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (7, 9), (320, 320), (321, 500), (2000, 1500)])
@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_fit_square_fills_the_box_and_nothing_else(shape, fit):
    square = mad.fit_square(np.full(shape, 200, np.uint8), 320, fit)
    left, top, right, bottom = mad.letterbox_box(*shape, 320, fit)
    assert square.shape == (320, 320)
    assert square.dtype == np.uint8
    assert (square[top:bottom, left:right] == 200).all()
    assert square.sum(dtype=int) == 200 * (bottom - top) * (right - left)


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
@pytest.mark.parametrize("shape", [(400, 200), (200, 400), (1500, 1000), (90, 64)])
def test_a_mark_lands_where_the_box_says(shape, fit):
    pixels = np.zeros(shape, np.uint8)
    y, x = shape[0] - shape[0] // 10, shape[1] // 10  # the lower left
    pixels[y - shape[0] // 20 : y + shape[0] // 20, x - shape[1] // 20 : x + shape[1] // 20] = 255
    square = mad.fit_square(pixels, 320, fit).astype(float)
    left, top, right, bottom = mad.letterbox_box(*shape, 320, fit)
    rows, columns = np.mgrid[:320, :320] + 0.5
    found = (rows * square).sum() / square.sum(), (columns * square).sum() / square.sum()
    edges = np.argwhere(pixels)
    centre_y, centre_x = (edges.min(0) + edges.max(0) + 1) / 2
    expected = top + centre_y / shape[0] * (bottom - top), left + centre_x / shape[1] * (right - left)
    assert np.allclose(found, expected, atol=0.6)


def test_scaling_down_is_antialiased():
    stripes = np.zeros((1280, 1280), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(mad.fit_square(stripes, 320, "stretch").astype(int)[:, 2:-2] - 128).max() <= 2
    assert np.abs(mad.fit_square(noise(2600, 2600).astype(np.uint8), 320, "stretch").mean() - 127.5) < 1


def test_scaling_agrees_with_torch():
    torch = pytest.importorskip("torch")
    pixels = noise(600, 450).astype(np.uint8)
    scale = torch.nn.functional.interpolate
    expected = scale(torch.from_numpy(pixels)[None, None].float(), (320, 320), mode="bilinear", antialias=True)
    assert np.abs(mad.fit_square(pixels, 320, "stretch") - expected[0, 0].numpy()).max() <= 1.01


# ---- warnings about what is no radiograph ----


def saved(folder: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(folder / "image1.png")
    return folder / "image1.png"


def warning_for(folder: Path, pixels: np.ndarray) -> str | None:
    path = saved(folder, pixels)
    return mad.unlike_radiograph(path, mad.read_radiograph(path))


def soft_tissue(size: int = 200) -> np.ndarray:
    """Smooth shades with the noise of a detector."""
    y, x = np.mgrid[:size, :size] / size
    shade = 60 + 90 * np.exp(-((x - 0.5) ** 2) / 0.02) + 30 * y
    return (shade + np.random.default_rng(0).normal(0, 3, shade.shape)).clip(0, 255).astype(np.uint8)


def test_drawings_photographs_and_blanks_are_named(tmp_path):
    screen = Image.new("L", (300, 200), 245)
    draw = ImageDraw.Draw(screen)
    draw.rectangle((0, 0, 300, 24), fill=60)
    for row in range(8):
        draw.text((10, 40 + 18 * row), "Patient list - search - next - settings", fill=0)
    assert "screenshot" in (warning_for(tmp_path, np.asarray(screen)) or "")
    assert warning_for(tmp_path, np.full((50, 60), 128, np.uint8)) == "blank"
    assert warning_for(tmp_path, np.zeros((1, 1), np.uint8)) == "blank"
    tissue = soft_tissue()
    assert "coloured" in (warning_for(tmp_path, np.dstack([tissue, tissue // 2, tissue // 3])) or "")


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


@pytest.mark.skipif(not KNEES.is_dir(), reason="the real radiographs are not part of the project")
def test_no_real_radiograph_is_flagged_whole_or_collimated():
    paths = sorted(KNEES.rglob("*.png"))
    for path in paths:
        pixels = mad.read_radiograph(path)
        assert mad.unlike_radiograph(path, pixels) is None, path
        collimated = np.zeros_like(pixels)
        collimated[80:150, 90:140] = pixels[80:150, 90:140]
        assert mad.unlike_radiograph(path, collimated) is None, path
    assert len(paths) > 900


# ---- DICOM ----


def dicom(values: np.ndarray, photometric: str = "MONOCHROME2", **tags: object) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID, header.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    header.file_meta.MediaStorageSOPClassUID, header.file_meta.MediaStorageSOPInstanceUID = header.SOPClassUID, "1.2.3"
    header.PatientName, header.PatientID = "Secret^Name", "SECRET-ID"
    header.Rows, header.Columns = values.shape[-2:]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, photometric
    header.BitsAllocated = 8 * values.itemsize
    header.BitsStored = tags.pop("BitsStored", header.BitsAllocated)
    header.HighBit, header.PixelRepresentation = header.BitsStored - 1, int(values.dtype.kind == "i")
    for name, value in tags.items():
        setattr(header, name, value)
    header.PixelData = values.tobytes() + bytes(values.nbytes % 2)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, header, enforce_file_format=True)
    return buffer.getvalue()


def table(entries: np.ndarray, first: int, bits: int) -> list[object]:
    import pydicom

    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    return [item]


VALUES = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)


def test_dicom_without_a_window_shows_its_extremes_as_black_and_white(tmp_path):
    values = VALUES[2:6] + 5
    expected = np.rint((values - values.min()) * 255.0 / np.ptp(values))
    assert (read(tmp_path, dicom(values), "a.dcm") == expected).all()
    assert (read(tmp_path, dicom(values), "no_suffix") == expected).all()
    assert (read(tmp_path, dicom(values, "MONOCHROME1"), "a.dcm") == 255 - expected).all()
    signed = values.astype(np.int16) - 2000
    assert (read(tmp_path, dicom(signed, RescaleSlope=2, RescaleIntercept=-1000), "a.dcm") == expected).all()
    assert (read(tmp_path, dicom(signed, RescaleSlope=-1, RescaleIntercept=0), "a.dcm") == 255 - expected).all()


WINDOWS = {
    "linear": {"WindowCenter": 2048, "WindowWidth": 1000},
    "linear, the first of two": {"WindowCenter": [1500, 9], "WindowWidth": [3000, 9]},
    "a step": {"WindowCenter": 2048, "WindowWidth": 1},
    "exact": {"WindowCenter": 2048, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 2000, "WindowWidth": 800, "VOILUTFunction": "SIGMOID"},
    "after the slope": {"WindowCenter": 100, "WindowWidth": 300, "RescaleSlope": 0.1, "RescaleIntercept": -50},
    "wider than the data": {"WindowCenter": 2048, "WindowWidth": 20000},
}


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("tags", WINDOWS.values(), ids=WINDOWS)
def test_dicom_window_agrees_with_pydicom(tmp_path, tags, photometric):
    data = dicom(VALUES, photometric, BitsStored=12, **tags)
    from pydicom import dcmread
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    header = dcmread(io.BytesIO(data))
    shown = apply_voi_lut(apply_modality_lut(header.pixel_array, header), header)
    black, white = (end * tags.get("RescaleSlope", 1) + tags.get("RescaleIntercept", 0) for end in (0, 4095))
    expected = (shown - black) * 255 / (white - black)
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    assert np.abs(read(tmp_path, data, "a.dcm") - expected).max() <= 0.51


def test_dicom_tables(tmp_path):
    pytest.importorskip("pydicom")
    entries = (np.linspace(0, 1, 1000) ** 2 * 4095).astype(np.uint16)
    got = read(tmp_path, dicom(VALUES, VOILUTSequence=table(entries, 1500, 12)), "a.dcm")
    expected = entries[np.clip(VALUES.astype(int) - 1500, 0, 999)] * 255.0 / 4095
    assert np.abs(got - expected).max() <= 0.51
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    got = read(tmp_path, dicom(VALUES, ModalityLUTSequence=table(entries, 1500, 12), **window), "a.dcm")
    assert np.abs(got - expected).max() <= 1.01
    to_8_bits = (np.arange(4096) >> 4).astype(np.uint16)
    assert (read(tmp_path, dicom(VALUES, VOILUTSequence=table(to_8_bits, 0, 8)), "a.dcm") == VALUES >> 4).all()


def test_a_window_that_misses_every_pixel_does_not_make_a_silent_black_image(tmp_path):
    plain = read(tmp_path, dicom(VALUES), "a.dcm")
    for tags in ({"WindowCenter": 60000, "WindowWidth": 10}, {"WindowCenter": 0, "WindowWidth": 0}, {"WindowWidth": 5}):
        assert (read(tmp_path, dicom(VALUES, **tags), "a.dcm") == plain).all()


def test_dicom_that_is_refused(tmp_path):
    two = np.stack([VALUES, VALUES])
    refused = {
        "several frames": dicom(two, NumberOfFrames=2),
        "colour DICOM": dicom(VALUES.astype(np.uint8), "PALETTE COLOR"),
        "megapixels": dicom(VALUES, Rows=20_000, Columns=20_000),
        "damaged": dicom(VALUES, Rows=9),
    }
    import pydicom

    header = pydicom.dcmread(io.BytesIO(dicom(VALUES)))
    del header.PixelData
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, header)
    refused["without an image"] = buffer.getvalue()
    header = pydicom.dcmread(io.BytesIO(dicom(VALUES)))
    header.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, header)
    refused["deflated"] = buffer.getvalue()
    for why, data in refused.items():
        text = reason_of(tmp_path, data, "a.dcm")
        assert why in text
        assert "ecret" not in text.lower()


def test_dicom_without_the_optional_packages(tmp_path, monkeypatch):
    data = dicom(VALUES)
    from pydicom.pixels.decoders.base import Decoder
    from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

    monkeypatch.setattr(Decoder, "is_available", False)
    for syntax, package in ((JPEG2000Lossless, "pylibjpeg-openjpeg"), (JPEGBaseline8Bit, "pylibjpeg-libjpeg")):
        packed = data.replace(b"1.2.840.10008.1.2.1\0", syntax.encode().ljust(20, b"\0")[:20], 1)
        if len(syntax) > 20:  # the name of the syntax is longer than the one it replaces
            packed = renamed(data, syntax)
        assert reason_of(tmp_path, packed, "a.dcm").endswith(f"pip install pylibjpeg {package}")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    text = reason_of(tmp_path, data, "a.dcm")
    assert text == "DICOM needs the optional package pydicom: pip install 'pydicom>=3'"


def renamed(data: bytes, syntax: str) -> bytes:
    import pydicom
    from pydicom.encaps import encapsulate

    header = pydicom.dcmread(io.BytesIO(data))
    header.file_meta.TransferSyntaxUID = syntax
    header.PixelData = encapsulate([header.PixelData])
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, header)
    return buffer.getvalue()


def real_dicom(name: str) -> Path:
    """A real radiograph of the package pydicom-data (never downloaded)."""
    store = pytest.importorskip("data_store")
    path = Path(next(iter(store.__path__))) / "data" / name
    if not path.is_file():
        pytest.skip(f"{name} is not installed")
    return path


def test_a_real_tibia_shows_bone_bright_on_dark():
    """MONOCHROME1, 10 bits, a window: shown as stored, bone would be dark on a bright ground."""
    path = real_dicom("RG3_UNCR.dcm")
    pixels = mad.read_radiograph(path)
    assert pixels.shape == (1760, 1760)
    row = pixels[700].astype(int)  # across the shaft: air, muscle, cortex, marrow, ...
    air, bone = row[470:560], row[780:940]
    assert air.max() < 60
    assert np.percentile(bone, 90) > 140
    assert mad.unlike_radiograph(path, pixels) is None


@pytest.mark.parametrize("name", ["RG1", "RG3"])
def test_jpeg_2000_decodes_like_the_uncompressed_file(name):
    pytest.importorskip("openjpeg")
    plain = mad.read_radiograph(real_dicom(f"{name}_UNCR.dcm"))
    assert (mad.read_radiograph(real_dicom(f"{name}_J2KR.dcm")) == plain).all()
    lossy = mad.read_radiograph(real_dicom(f"{name}_J2KI.dcm"))
    assert np.abs(lossy - plain.astype(int)).mean() < 2


# ---- hostile bytes ----

CASES = {"png": 3000, "jpeg": 2000, "tiff": 800, "gif": 500, "dicom": 1000}


def seeds(kind: str) -> list[bytes]:
    grey = Image.fromarray(np.kron(noise(6, 5), np.ones((8, 8))).astype(np.uint8))
    if kind == "png":
        palette = chunk(b"PLTE", bytes(range(48))) + chunk(b"tRNS", bytes(range(16)))
        apng = pillow(grey, "PNG", save_all=True, append_images=[grey.rotate(90)])
        deep = png(noise(9, 9, 4096), 16, interlaced=True)
        return [pillow(grey, "PNG"), png(noise(7, 9, 16), 4, PALETTE, palette), deep, apng, png(noise(5, 5), extra=b"")]
    if kind == "jpeg":
        exif = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x0112, 3, 1, 6, 0)
        colour = Image.merge("RGB", [grey, grey.rotate(90, expand=False), grey])
        files = [pillow(grey, "JPEG", exif=b"Exif\0\0" + exif), pillow(colour, "JPEG", progressive=True)]
        return [*files, pillow(colour.convert("CMYK"), "JPEG")]
    if kind == "tiff":
        deep = tiff(noise(9, 9, 65536).astype(np.uint16), ">")
        return [
            tiff(noise(9, 9).astype(np.uint8)),
            deep,
            *(pillow(grey, "TIFF", compression=c) for c in ("tiff_lzw", "jpeg")),
        ]
    if kind == "gif":
        return [pillow(grey, "GIF"), pillow(grey, "GIF", save_all=True, append_images=[grey.rotate(90)])]
    lut = {"VOILUTSequence": table(np.arange(4096), 0, 12)}
    files = [dicom(VALUES, **lut), dicom(VALUES, "MONOCHROME1", WindowCenter=2048, WindowWidth=999, RescaleSlope=1)]
    compressed = renamed(dicom(VALUES), "1.2.840.10008.1.2.4.90")
    codestream = pillow(Image.fromarray(VALUES), "JPEG2000", no_jp2=True)
    return [*files, compressed, embedded(dicom(VALUES), codestream)]


def embedded(data: bytes, codestream: bytes) -> bytes:
    import pydicom
    from pydicom.encaps import encapsulate

    header = pydicom.dcmread(io.BytesIO(data))
    header.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    header.PixelData = encapsulate([codestream])
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, header)
    return buffer.getvalue()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, delete, repeat, cut; half of the damaged PNG files get fitting checksums again."""
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
            changed[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 70_000)))
        elif rng.random() < 0.3:
            del changed[at:]
        if not changed:
            return b""
    return with_fitting_checksums(bytes(changed)) if data[:4] == b"\x89PNG" and rng.random() < 0.5 else bytes(changed)


def with_fitting_checksums(data: bytes) -> bytes:
    out, at = data[:8], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        out += chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return out


def fuzz(folder: str) -> None:
    """Runs in a child with little memory; prints the numbers of images and refusals, and whatever should not be."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    mad.MAX_PIXELS = 2 * 10**5  # a mutated size would cost seconds rather than find anything
    for kind, cases in CASES.items():
        if kind == "dicom" and not find_spec("pydicom"):
            continue
        rng, files, outcomes = random.Random(kind), seeds(kind), [0, 0]
        path = Path(folder) / ("x.dcm" if kind == "dicom" else "x.png")
        for case in range(cases):
            path.write_bytes(mutated(rng.choice(files), rng) if case >= len(files) else files[case])
            try:
                pixels = mad.read_radiograph(path)
                assert pixels.ndim == 2 and pixels.dtype == np.uint8 and pixels.size
                mad.unlike_radiograph(path, pixels)
                outcomes[0] += 1
            except mad.BadImage as error:
                assert "ecret" not in str(error)
                outcomes[1] += 1
        print(kind, *outcomes)
        print("end of", kind, file=sys.stderr, flush=True)


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_fuzzed_files_give_an_image_or_a_reason_and_nothing_on_stderr(tmp_path, capsys):
    command = [sys.executable, "-c", f"import test_decoding; test_decoding.fuzz({str(tmp_path)!r})"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=child_environment(), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = {kind: (int(images), int(refused)) for kind, images, refused in map(str.split, done.stdout.splitlines())}
    assert set(counts) >= set(CASES) - {"dicom"}
    for kind, (images, refused) in counts.items():
        assert images + refused == CASES[kind]
        assert images > CASES[kind] // 50
        printed, _, done.stderr = done.stderr.partition(f"end of {kind}\n")
        if kind == "tiff":  # libtiff, below Python, writes lines such as "LZWDecode: Not enough data ..." by itself
            assert not [line for line in printed.splitlines() if "arning" in line or line.startswith(" ")]
        else:
            assert not printed, (kind, printed)
    with capsys.disabled():
        print(" fuzzed (images, refused):", counts, end=" ")
