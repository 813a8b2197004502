"""More than 8 bits a channel: one window for grey and colour, PNG and TIFF, whatever the byte order; and
files of several frames."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from checked import bases, build, collator_of
from llava_rows import row, write
from PIL import Image

from llavamed_peft.storage.images import image_header, image_size, load_image

CHANNELS = {"grey": 1, "grey with alpha": 2, "colour": 3, "colour with alpha": 4}
PNG_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


def png(path: Path, values: np.ndarray, chunks: bytes = b"") -> Path:
    """A PNG of 16 bits a channel; values: [height, width, channels]."""
    height, width, channels = values.shape
    raw = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, PNG_TYPES[channels], 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunks + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def tiff(
    path: Path,
    values: np.ndarray,
    photometric: int,
    order: str = "<",
    deflated: bool = False,
    signed: int = 1,
) -> Path:
    """A TIFF of one strip; values: [height, width, channels] of 8, 16 or 32 bits."""
    height, width, channels = values.shape
    strip = values.astype(values.dtype.newbyteorder(order)).tobytes()
    strip = zlib.compress(strip) if deflated else strip
    tags = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [values.itemsize * 8] * channels),
        259: (3, [8 if deflated else 1]),
        262: (3, [photometric]),
        273: (4, [8]),
        277: (3, [channels]),
        278: (4, [height]),
        279: (4, [len(strip)]),
        **({338: (3, [2])} if channels in (2, 4) else {}),
        339: (3, [signed] * channels),
    }
    after, ifd = 8 + len(strip) + len(strip) % 2, b""
    extra, end = b"", after + 2 + 12 * len(tags) + 4
    for tag, (kind, numbers) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            place, extra = struct.pack(f"{order}I", end + len(extra)), extra + packed
        else:
            place = packed.ljust(4, b"\0")
        ifd += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + place
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, after)
    body = strip + b"\0" * (len(strip) % 2) + struct.pack(f"{order}H", len(tags)) + ifd
    path.write_bytes(head + body + struct.pack(f"{order}I", 0) + extra)
    return path


def twelve_bits(channels: int) -> np.ndarray:
    """[20, 30, channels] uint16, alpha opaque."""
    values = np.random.default_rng(0).integers(0, 4096, (20, 30, channels)).astype(np.uint16)
    if channels in (2, 4):
        values[..., -1] = 65535
    return values


def windowed(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values, (0.5, 99.5), method="nearest").astype(float)
    return np.rint((values - low) * (255 / (high - low))).clip(0, 255)


@pytest.mark.parametrize("kind", CHANNELS)
def test_12_bit_data_in_16_bit_png_are_windowed(kind: str, tmp_path: Path) -> None:
    values = twelve_bits(CHANNELS[kind])
    shown = np.asarray(load_image(png(tmp_path / "a.png", values)))
    colours = values[..., :3] if CHANNELS[kind] >= 3 else values[..., :1]
    np.testing.assert_array_equal(shown, np.broadcast_to(windowed(colours), shown.shape))
    assert shown.max() == 255 and 100 < shown.mean() < 155


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["grey", "colour", "colour with alpha"])
def test_12_bit_data_in_16_bit_tiff_are_windowed(
    kind: str, order: str, deflated: bool, tmp_path: Path
) -> None:
    values = twelve_bits(CHANNELS[kind])
    path = tiff(tmp_path / "a.tif", values, 2 if CHANNELS[kind] >= 3 else 1, order, deflated)
    shown = np.asarray(load_image(path))
    colours = values[..., :3] if CHANNELS[kind] >= 3 else values
    np.testing.assert_array_equal(shown, np.broadcast_to(windowed(colours), shown.shape))


def test_what_is_transparent_in_16_bits_is_white(tmp_path: Path) -> None:
    for channels in (2, 4):
        values = twelve_bits(channels)
        values[:5, :, -1], values[5:10, :, -1] = 0, 32768
        shown = np.asarray(load_image(png(tmp_path / "a.png", values))).astype(float)
        colours = np.broadcast_to(windowed(values[5:, :, :-1]), (15, 30, 3))
        assert (shown[:5] == 255).all()
        np.testing.assert_allclose(shown[5:10], (colours[:5] + 255) / 2, atol=0.51)
        np.testing.assert_array_equal(shown[10:], colours[5:])
    values = twelve_bits(3)
    values[:5] = (1, 2, 3)
    shown = np.asarray(
        load_image(png(tmp_path / "b.png", values, chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))))
    )
    assert (shown[:5] == 255).all() and shown[5:].mean() < 160
    values = twelve_bits(1)
    values[:5] = 7
    shown = np.asarray(load_image(png(tmp_path / "c.png", values, chunk(b"tRNS", struct.pack(">H", 7)))))
    assert (shown[:5] == 255).all() and shown[5:].mean() < 160


@pytest.mark.parametrize(("dtype", "signed"), [(np.uint16, 1), (np.float32, 3)])
def test_white_is_zero_is_inverted_however_deep(dtype: type, signed: int, tmp_path: Path) -> None:
    """A radiograph exported with MONOCHROME1; 8 bits are inverted by Pillow."""
    values = twelve_bits(1).astype(dtype)
    kept, inverted = (
        np.asarray(load_image(tiff(tmp_path / "a.tif", values, photometric, signed=signed)))
        for photometric in (1, 0)
    )
    np.testing.assert_array_equal(inverted, 255 - kept)
    np.testing.assert_array_equal(kept[..., :1], windowed(values))
    eight = (values % 256).astype(np.uint8)
    plain, turned = (np.asarray(load_image(tiff(tmp_path / "8.tif", eight, p)))[..., :1] for p in (1, 0))
    np.testing.assert_array_equal(plain, eight)
    np.testing.assert_array_equal(turned, 255 - eight)


def test_unsigned_32_bits_do_not_wrap(tmp_path: Path) -> None:
    values = np.linspace(0, 2**32 - 1, 600).astype(np.uint32).reshape(20, 30, 1)
    shown = np.asarray(load_image(tiff(tmp_path / "a.tif", values, 1)))[..., 0].ravel()
    assert (np.diff(shown.astype(int)) >= 0).all() and shown[0] == 0 and shown[-1] == 255
    signed = tiff(tmp_path / "b.tif", (values.astype(np.int64) - 2**31).astype(np.int32), 1, signed=2)
    np.testing.assert_array_equal(np.asarray(load_image(signed))[..., 0].ravel(), shown)


def test_one_hot_pixel_does_not_darken_an_image(tmp_path: Path) -> None:
    values = twelve_bits(1)
    before = np.asarray(load_image(png(tmp_path / "a.png", values))).mean()
    values[3, 4] = 65535
    after = np.asarray(load_image(png(tmp_path / "a.png", values)))
    assert abs(after.mean() - before) < 1 and after[3, 4, 0] == 255


def test_a_few_bright_points_on_dark_ground_are_seen(tmp_path: Path) -> None:
    """A mask, or counts of photons: less than a percentile differs from the ground."""
    values = np.full((40, 40, 1), 300, np.uint16)
    values[7, 9] = 900
    shown = np.asarray(load_image(png(tmp_path / "a.png", values)))[..., 0]
    assert shown[7, 9] == 255 and shown.sum() == 255


def test_8_bit_values_in_16_bits_are_left_alone(tmp_path: Path) -> None:
    values = twelve_bits(3) // 32  # 0..127
    np.testing.assert_array_equal(np.asarray(load_image(png(tmp_path / "a.png", values))), values)


FRAMES = [Image.new("L", (30, 20), level) for level in (10, 100, 200)]


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.png", "a.webp"])
def test_files_of_several_frames_show_the_first_and_are_counted(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:])
    assert image_header(path) == ((20, 30), 3) and image_size(path) == (20, 30)
    assert np.asarray(load_image(path)).mean() == pytest.approx(10, abs=2)
    FRAMES[0].save(tmp_path / f"one {name}")
    assert image_header(tmp_path / f"one {name}").frames == 1


def test_several_frames_are_said_once_a_data_set(bases: dict[str, Path], tmp_path: Path) -> None:
    FRAMES[0].save(tmp_path / "a.tif", save_all=True, append_images=FRAMES[1:])
    Image.new("RGB", (30, 20)).save(tmp_path / "b.jpg")
    rows = [row(id=str(n), image=name) for n, name in enumerate(["b.jpg", "a.tif", "a.tif"])]
    with pytest.warns(UserWarning) as warned:
        build(write(tmp_path, rows), collator_of(bases["llava"]), tmp_path)
    assert [str(one.message) for one in warned] == [
        f"data.json: 1 image file(s) hold several frames, such as {tmp_path}/a.tif (3). The first of each is "
        "shown; name another one of a DICOM file as file.dcm#3."
    ]
