"""`images.py` on real files, written here with Pillow: every pixel format a figure or radiograph comes in,
and damaged ones."""

import hashlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavamed_peft.errors import DataError
from llavamed_peft.storage import equal_images, images
from llavamed_peft.storage.equal_images import content_key
from llavamed_peft.storage.images import FORMATS, MAX_PIXELS, image_size, load_image

# What has to be done to an upright array [height, width] so that a viewer obeying the orientation shows it
# upright again (EXIF 2.3, tag 274: where row 0 and column 0 of the stored array lie in the picture).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1, :],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def pixels(path):
    image = load_image(path)
    assert image.mode == "RGB"
    assert image_size(path) == (image.height, image.width)
    return np.asarray(image)


def upright():
    """[32, 48, 3]: left half red, and the upper left quarter white, so that no turn or flip leaves it the
    same."""
    array = np.zeros((32, 48, 3), np.uint8)
    array[:, :24] = (255, 0, 0)
    array[:16, :24] = 255
    return array


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_size_and_pixels(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"turned.{suffix}"
    how = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(np.ascontiguousarray(STORED[orientation](upright()))).save(path, exif=exif, **how)
    assert image_size(path) == (32, 48)
    np.testing.assert_allclose(pixels(path), upright(), atol=8 if suffix == "jpg" else 0)


def test_damaged_exif_and_unknown_orientation_count_as_upright(tmp_path):
    for name, exif in {"damaged": b"Exif\0\0garbage", "nine": None}.items():
        if exif is None:
            exif = Image.Exif()
            exif[274] = 9
        Image.fromarray(upright()).save(tmp_path / f"{name}.png", exif=exif)
        np.testing.assert_array_equal(pixels(tmp_path / f"{name}.png"), upright())


def test_orientation_after_a_pngs_pixels_is_ignored_by_size_and_pixels_alike(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "late.png"
    Image.fromarray(upright()).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + whole[-12:])
    np.testing.assert_array_equal(pixels(path), upright())


# Of WebP the decoder wants the whole file, even for the size
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_size_needs_no_pixels(tmp_path, suffix):
    """Of each file only the header is left; loading it fails, its size is still known."""
    path = tmp_path / f"noise.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    # Pillow writes a TIFF's directory after its pixels; the pixels are overwritten there instead.
    Image.fromarray(noise).save(path, **({"compression": "tiff_lzw"} if suffix == "tif" else {}))
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"\xff" * 1000 + data[1008:] if suffix == "tif" else data[:2000])
    assert image_size(path) == (300, 400)
    with pytest.raises(DataError, match="cannot be decoded"):
        load_image(path)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_greyscale_is_scaled_not_clipped(tmp_path, suffix):
    values = np.linspace(1000, 5000, 64 * 5).round().astype(np.uint16).reshape(5, 64)
    path = tmp_path / f"radiograph.{suffix}"
    Image.fromarray(values).save(path)
    got = pixels(path)
    low, high = np.percentile(values, (0.5, 99.5), method="nearest")
    wanted = np.rint((values - float(low)) * 255 / (high - low)).clip(0, 255)
    for channel in range(3):
        np.testing.assert_array_equal(got[..., channel], wanted)
    assert got.min() == 0 and got.max() == 255
    assert len(np.unique(got)) > 200  # clipping, as Pillow does it, leaves one value


def test_big_endian_and_32_bit_and_negative_values(tmp_path):
    big = tmp_path / "big.tif"
    Image.frombytes("I;16B", (3, 1), struct.pack(">3H", 256, 512, 768)).save(big)
    np.testing.assert_array_equal(pixels(big)[0, :, 0], [0, 128, 255])
    hounsfield = tmp_path / "ct.tif"
    Image.fromarray(np.array([[-1000, 0, 1000]], np.int32)).save(hounsfield)
    np.testing.assert_array_equal(pixels(hounsfield)[0, :, 0], [0, 128, 255])
    huge = tmp_path / "huge.tif"
    Image.fromarray(np.array([[-(2**31), 0, 2**31 - 1]], np.int32)).save(huge)
    np.testing.assert_array_equal(pixels(huge)[0, :, 0], [0, 128, 255])


def test_deep_greyscale_that_fits_8_bits_is_left_alone(tmp_path):
    path = tmp_path / "dark.png"
    Image.fromarray(np.array([[0, 7, 200]], np.uint16)).save(path)
    np.testing.assert_array_equal(pixels(path)[0, :, 0], [0, 7, 200])


def test_deep_greyscale_of_one_value_is_black(tmp_path):
    path = tmp_path / "flat.png"
    Image.fromarray(np.full((2, 3), 4000, np.uint16)).save(path)
    assert pixels(path).max() == 0


def test_floats_are_scaled_and_not_finite_ones_are_black(tmp_path):
    path = tmp_path / "map.tif"
    Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan, np.inf]], np.float32)).save(path)
    np.testing.assert_array_equal(pixels(path)[0, :, 0], [0, 128, 255, 0, 0])
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(path)
    with pytest.raises(DataError) as caught:
        load_image(path)
    assert str(caught.value) == f"{path}: no pixel has a finite value; wanted an image."


def test_transparency_is_laid_on_white(tmp_path):
    """Half transparent black is grey and fully transparent is white, whatever colour hides under it."""
    rgba = np.array([[[0, 0, 0, 255], [0, 0, 0, 0], [200, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(pixels(tmp_path / "rgba.png")[0, :, 1], [0, 255, 255, 127])

    Image.fromarray(np.array([[[0, 255], [0, 0], [90, 255]]], np.uint8), "LA").save(tmp_path / "la.png")
    np.testing.assert_array_equal(pixels(tmp_path / "la.png")[0, :, 2], [0, 255, 90])

    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "plain.png")
    np.testing.assert_array_equal(
        pixels(tmp_path / "plain.png")[0], [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    )
    palette.save(tmp_path / "index.png", transparency=1)
    palette.save(tmp_path / "index.gif", transparency=1)
    palette.save(tmp_path / "table.png", transparency=bytes([255, 0, 255]))
    for name in ("index.png", "index.gif", "table.png"):
        np.testing.assert_array_equal(
            pixels(tmp_path / name)[0], [[10, 20, 30], [255, 255, 255], [70, 80, 90]]
        )

    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "colour.png", transparency=(1, 2, 3))
    np.testing.assert_array_equal(pixels(tmp_path / "colour.png")[0, 0], [255, 255, 255])


def test_one_bit_greyscale_and_cmyk(tmp_path):
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    bits.save(tmp_path / "bits.png")
    bits.save(tmp_path / "bits.tif", compression="group4")
    for name in ("bits.png", "bits.tif"):
        np.testing.assert_array_equal(pixels(tmp_path / name)[0, :, 0], [0, 255])

    Image.new("L", (2, 2), 77).save(tmp_path / "grey.png")
    assert (pixels(tmp_path / "grey.png") == 77).all()

    # No cyan, full magenta and yellow is red; a reader that misses Adobe's inversion shows cyan or black.
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    assert b"Adobe" in (tmp_path / "print.jpg").read_bytes()[:200]
    np.testing.assert_allclose(pixels(tmp_path / "print.jpg")[8, 8], [255, 0, 0], atol=6)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("moving.gif", "moving.webp", "pages.tif", "moving.png"):
        how = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **how)
        np.testing.assert_array_equal(pixels(tmp_path / name)[0, 0], [255, 0, 0])


def test_file_is_closed_and_may_go_away(tmp_path):
    path = tmp_path / "short-lived.png"
    Image.fromarray(upright()).save(path)
    image = load_image(path)
    path.unlink()
    np.testing.assert_array_equal(np.asarray(image), upright())


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp"])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_truncated_files_raise(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError) as caught:
        load_image(path)
    assert str(caught.value).startswith(f"{path}: ") and "; wanted " in str(caught.value)


def test_what_is_no_image(tmp_path):
    text, empty, missing, eps = (
        tmp_path / name for name in ("text.jpg", "empty.png", "missing.png", "program.jpg")
    )
    text.write_text("Not found")
    empty.touch()
    eps.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    names = ", ".join(FORMATS)
    wanted = {
        text: f"not an image that can be read; wanted one of {names}, or DICOM.",
        empty: f"not an image that can be read; wanted one of {names}, or DICOM.",
        eps: f"not an image that can be read; wanted one of {names}, or DICOM.",  # else Ghostscript
        missing: "no such file; wanted an image.",
        tmp_path: "a folder; wanted an image.",
    }
    for path, sentence in wanted.items():
        for read in (image_size, load_image):
            with pytest.raises(DataError) as caught:
                read(path)
            assert str(caught.value) == f"{path}: {sentence}"
    with pytest.raises(DataError, match=r"embedded null byte"):
        load_image("a\0b.png")


def test_an_image_of_another_user(tmp_path):
    path = tmp_path / "private.png"
    Image.new("L", (2, 2)).save(path)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        for read in (image_size, load_image, content_key):
            with pytest.raises(DataError) as caught:
                read(path)
            assert (
                str(caught.value)
                == f"{path}: may not be read (Permission denied); wanted an image that this user can open."
            )
    finally:
        os.seteuid(user)


def huge_png(path, width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("read", [image_size, load_image])
def test_decompression_bombs_are_refused_on_the_header(tmp_path, monkeypatch, read):
    path = tmp_path / "bomb.png"
    huge_png(path, 60_000, 60_000)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}: too large to decode safely: Image size (3600000000 pixels) exceeds limit of 178956970 "
        "pixels, could be decompression bomb DOS attack. Wanted at most 178,956,970 pixels."
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as other code in the process may have done
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}: 60000 x 60000 is 3,600,000,000 pixels, too many to decode safely; wanted at most "
        "178,956,970."
    )
    assert Image.MAX_IMAGE_PIXELS is None


def test_the_limit_is_ours_and_pillows_global_is_not_touched(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    path = tmp_path / "large.png"
    huge_png(path, MAX_PIXELS // 1000, 1000)
    with pytest.warns(Image.DecompressionBombWarning):
        assert image_size(path) == (1000, MAX_PIXELS // 1000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_content_key_is_the_sha256_of_the_bytes(tmp_path):
    for name, data in {"a.png": b"same", "b.png": b"same", "c.png": b"other"}.items():
        (tmp_path / name).write_bytes(data)
    assert (
        content_key(tmp_path / "a.png")
        == content_key(str(tmp_path / "b.png"))
        == hashlib.sha256(b"same").hexdigest()
    )
    assert content_key(tmp_path / "a.png") != content_key(tmp_path / "c.png")
    with pytest.raises(DataError) as caught:
        content_key(tmp_path / "none.png")
    assert str(caught.value) == f"{tmp_path / 'none.png'}: no such file; wanted an image."


def test_equal_files_have_one_name_and_only_such_as_look_alike_are_read_in_full(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        equal_images, "content_key", lambda path: read.append(Path(path).name) or content_key(path)
    )
    long = bytes(range(256)) * 100
    other = long[:9000] + b"!" + long[9001:]
    contents = {
        "a": long, "short": b"x", "b": other, "a again": long, "c": b"!" + long[1:],
        "d": long[:-1] + b"!", "longer": long + b"x",
        "short again": b"x", "b again": other, "empty": b"", "empty again": b"",
    }  # fmt: skip
    names = []
    for folder in (tmp_path / "here", tmp_path / "moved"):
        folder.mkdir()
        name_of = equal_images.ContentNames()
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        names.append({name: name_of(str(folder / name)) for name in (*contents, "a", "b again")})
        assert len({*names[-1].values()}) == 7
        assert all(names[-1][name] == names[-1][f"{name} again"] for name in ("a", "b", "short", "empty"))
    assert names[0] == names[1], "wherever they lie"
    assert {*read} == {"a", "a again", "b", "b again", "short", "short again", "empty", "empty again"}
    with pytest.raises(DataError, match="none: no such file"):
        equal_images.ContentNames()(str(tmp_path / "none"))


def test_a_file_that_vanished_is_no_fault_of_one_that_looks_like_it(tmp_path):
    name_of = equal_images.ContentNames()
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"same")
    first = name_of(str(tmp_path / "a"))
    (tmp_path / "a").unlink()
    assert first != name_of(str(tmp_path / "b")) == name_of(str(tmp_path / "c")), (
        "nobody knows whether it was the same"
    )


@pytest.mark.parametrize(
    "look", [image_size, load_image, content_key, lambda path: equal_images.ContentNames()(str(path))]
)
def test_pipes_and_loops_of_links_are_refused_at_once(look, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with pytest.raises(DataError, match=r"pipe\.png: a pipe or a device; wanted an image file\."):
        look(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"loop\.png: cannot be decoded \(.*symbolic links"):
        look(tmp_path / "loop.png")
