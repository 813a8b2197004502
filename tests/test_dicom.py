"""DICOM files, made with pydicom itself: what a viewer would show first, and no text of their headers."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checked import bases, build, collator_of
from llava_rows import row, write
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from llavamed_peft.errors import DataError
from llavamed_peft.storage import images
from llavamed_peft.storage.equal_images import ContentNames, content_key, contents_among
from llavamed_peft.storage.images import image_header, load_image

SECRET = "Doe^Jane"


def dicom(path: Path, values: np.ndarray, kind: str = "MONOCHROME2", **more: Any) -> Path:
    """A file of one or several frames; values: [(frames,) height, width (, 3)]."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.PatientName, file.StudyDescription = SECRET, SECRET
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    colours = 3 if kind in ("RGB", "YBR_FULL") else 1
    file.Rows, file.Columns = values.shape[-3:-1] if colours == 3 else values.shape[-2:]
    if values.ndim - (colours == 3) == 3:
        file.NumberOfFrames = len(values)
    file.SamplesPerPixel, file.PhotometricInterpretation = colours, kind
    if colours == 3:
        file.PlanarConfiguration = 0
    file.BitsAllocated = file.BitsStored = values.itemsize * 8
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(values.dtype.kind == "i")
    file.PixelData = values.tobytes()
    for name, value in more.items():
        setattr(file, name, value)
    file.save_as(path, enforce_file_format=True)
    return path


HOUNSFIELD = np.arange(-1000, 1000, 5, dtype=np.int16).reshape(20, 20)  # stored as value + 1024


def ct(path: Path, **more: Any) -> Path:
    return dicom(
        path, (HOUNSFIELD + 1024).astype(np.uint16), **{"RescaleSlope": 1, "RescaleIntercept": -1024, **more}
    )


def shown(path: Path | str) -> np.ndarray:
    picture = load_image(path)
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def test_the_window_of_the_header_is_applied_after_the_rescale(tmp_path: Path) -> None:
    """C.11.2.1.2.1 of the standard: center 40, width 400 shows −160 … 239, the ends black and white."""
    grey = shown(ct(tmp_path / "a.dcm", WindowCenter=40, WindowWidth=400))[..., 0]
    wanted = np.rint(((HOUNSFIELD - 39.5) / 399 + 0.5).clip(0, 1) * 255)
    np.testing.assert_allclose(grey, wanted, atol=1)
    exact = shown(
        ct(tmp_path / "b.dcm", WindowCenter=[40, 9], WindowWidth=[400, 9], VOILUTFunction="LINEAR_EXACT")
    )
    np.testing.assert_allclose(
        exact[..., 0], np.rint(((HOUNSFIELD - 40) / 400 + 0.5).clip(0, 1) * 255), atol=1
    )
    curve = shown(ct(tmp_path / "c.dcm", WindowCenter=40, WindowWidth=400, VOILUTFunction="SIGMOID"))[..., 0]
    np.testing.assert_allclose(curve, np.rint(255 / (1 + np.exp(-4 * (HOUNSFIELD - 40) / 400))), atol=1)


@pytest.mark.parametrize("width", [None, 0, "nan"])
def test_without_a_window_percentiles_decide(width: Any, tmp_path: Path) -> None:
    more = {} if width is None else {"WindowCenter": 40, "WindowWidth": width}
    grey = shown(ct(tmp_path / "a.dcm", **more))[..., 0]
    low, high = np.percentile(HOUNSFIELD, (0.5, 99.5), method="nearest").astype(float)
    np.testing.assert_array_equal(grey, np.rint((HOUNSFIELD - low) * (255 / (high - low))).clip(0, 255))


def test_padding_does_not_decide_the_window(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(1000, 2000, (20, 20)).astype(np.uint16)
    values[:15] = 0
    grey = shown(dicom(tmp_path / "a.dcm", values, PixelPaddingValue=0))[..., 0]
    assert (grey[:15] == 0).all() and 100 < grey[15:].mean() < 155


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    one, two = (
        shown(ct(tmp_path / "a.dcm", kind=kind, WindowCenter=0, WindowWidth=900))
        for kind in ("MONOCHROME1", "MONOCHROME2")
    )
    np.testing.assert_array_equal(one, 255 - two)


def test_a_lookup_table_of_the_header_is_applied(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 8], np.array([0, 10, 200, 255], "<u2").tobytes()
    grey = shown(
        dicom(tmp_path / "a.dcm", np.array([[0, 1], [2, 3]], np.uint8), VOILUTSequence=Sequence([table]))
    )
    np.testing.assert_array_equal(grey[..., 0], [[0, 10], [200, 255]])


def test_colours(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    np.testing.assert_array_equal(shown(dicom(tmp_path / "a.dcm", values, "RGB")), values)
    grey = np.full((20, 30, 3), 128, np.uint8)
    grey[..., 0] = values[..., 0]  # YBR with neutral colour differences
    np.testing.assert_allclose(
        shown(dicom(tmp_path / "b.dcm", grey, "YBR_FULL")), np.broadcast_to(grey[..., :1], grey.shape), atol=1
    )


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    palette = {}
    for colour, entries in {"Red": [0, 65535, 0], "Green": [0, 0, 65535], "Blue": [0, 65535, 65535]}.items():
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        palette[f"{colour}PaletteColorLookupTableData"] = np.array(entries, "<u2").tobytes()
    values = np.arange(300, dtype=np.uint8).reshape(20, 15) % 3
    wanted = np.array([[0, 0, 0], [255, 0, 255], [0, 255, 255]])[values]
    np.testing.assert_array_equal(
        shown(dicom(tmp_path / "a.dcm", values, "PALETTE COLOR", **palette)), wanted
    )


@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1], ids=lambda u: u.keyword
)
def test_compressed_pixels(syntax: UID, tmp_path: Path) -> None:
    import gdcm

    values = np.random.default_rng(0).integers(0, 4096, (64, 64)).astype(np.uint16)
    path, compressed = dicom(tmp_path / "a.dcm", values), tmp_path / "b.dcm"
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(compressed))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write() and dcmread(compressed).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(shown(compressed), shown(path))


def test_frames_are_named_from_1_and_are_images_of_their_own(bases: dict[str, Path], tmp_path: Path) -> None:
    values = np.stack([np.full((20, 30), level, np.uint8) for level in (10, 100, 200)])
    path = dicom(tmp_path / "cine.dcm", values)
    assert image_header(path) == ((20, 30), 3) and image_header(f"{path}#2") == ((20, 30), 1)
    assert [shown(f"{path}#{n}").mean() for n in (1, 2, 3)] == [10, 100, 200] and shown(path).mean() == 10
    frames = [f"{path}#{n}" for n in (1, 2)]
    assert content_key(frames[0]) == content_key(path) + "#1" != content_key(frames[1])
    assert len({*map(ContentNames(), [str(path), *frames])}) == 3
    assert len(set(contents_among([str(path), *frames], lambda _: None).values())) == 3
    for wrong, message in {
        "4": r"has 3 frame\(s\); wanted frame 4. Frames are counted from 1",
        "0": "no such file",
        "x": "no such file",
    }.items():
        with pytest.raises(DataError, match=message):
            load_image(f"{path}#{wrong}")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"a.png#2: names frame 2, and only of DICOM files frames can be named"
    ):
        load_image(tmp_path / "a.png#2")
    names = ["cine.dcm#1", "cine.dcm#3", "cine.dcm#9", "none.dcm#1"]
    rows = [row(id=name, image=name) for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index, rejected = build(write(tmp_path, rows), collator_of(bases["llava"]), tmp_path)
    assert len(index) == 2 and [reject["row"] for reject in rejected] == [3, 4]
    assert len(set(index.column("prefix").tolist())) == 2, "different frames share no beginning"


def enhanced(path: Path) -> Path:
    """Each frame has a rescale and a window of its own, as Enhanced CT has."""
    groups = []
    for frame in range(2):
        look, real, group = Dataset(), Dataset(), Dataset()
        look.WindowCenter, look.WindowWidth = 100 * frame + 50, 100
        look.VOILUTFunction = "LINEAR_EXACT"
        real.RescaleSlope, real.RescaleIntercept = 1, 100 * frame
        group.FrameVOILUTSequence, group.PixelValueTransformationSequence = Sequence([look]), Sequence([real])
        groups.append(group)
    values = np.stack([np.arange(100, dtype=np.uint16).reshape(10, 10)] * 2)
    return dicom(path, values, PerFrameFunctionalGroupsSequence=Sequence(groups))


def test_each_frame_has_its_own_window(tmp_path: Path) -> None:
    path = enhanced(tmp_path / "a.dcm")
    wanted = np.rint(np.arange(100).reshape(10, 10) * 2.55)
    for frame in (1, 2):
        np.testing.assert_array_equal(shown(f"{path}#{frame}")[..., 0], wanted)


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    path = ct(tmp_path / "IM000001", WindowCenter=0, WindowWidth=900)
    assert image_header(path).size == (20, 20) and shown(path).shape == (20, 20, 3)


def test_no_text_of_the_header_is_in_any_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither where a file is damaged, nor where its header holds values that break the rules."""
    whole = ct(tmp_path / "a.dcm", WindowCenter=0, WindowWidth=900).read_bytes()
    faults = []
    for number, cut in enumerate(range(140, len(whole), 97)):
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(whole[:cut])
        try:
            load_image(path)
        except DataError as error:
            faults.append(error)
    assert faults and not any(SECRET in str(f) or f.__cause__ for f in faults)
    assert all("a DICOM file" in str(fault) for fault in faults)
    odd = ct(tmp_path / "odd.dcm", WindowCenter=0, WindowWidth=900)
    odd.write_bytes(odd.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.99999.1.2.1\0"))
    with pytest.raises(DataError, match=r"odd\.dcm: a DICOM file that cannot be decoded \(\w+\); wanted"):
        load_image(odd)
    assert SECRET not in "".join(capfd.readouterr())


def test_without_the_extra_the_rejection_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ct(tmp_path / "a.dcm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for read in (image_header, load_image):
        with pytest.raises(DataError) as raised:
            read(path)
        assert str(raised.value) == (
            f"{path}: a DICOM file, and pydicom is not installed; wanted the extra: pip install "
            "'llavamed-peft[dicom]'."
        )


def test_a_file_that_is_too_large_or_holds_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = ct(tmp_path / "report.dcm", Rows=0)
    with pytest.raises(DataError, match="a DICOM file without an image; wanted Rows and Columns"):
        image_header(report)
    monkeypatch.setattr(images, "MAX_PIXELS", 399)
    path = ct(tmp_path / "a.dcm")
    for read in (image_header, load_image):
        with pytest.raises(DataError, match="20 x 20 is 400 pixels, too many to decode safely"):
            read(path)
