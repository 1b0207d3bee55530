"""What is a picture, where a path of a row leads, and what is said of what is none."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from gemma_tune.base.errors import UserError
from gemma_tune.data.conversations.picture_files import (
    BROKEN,
    MISSING,
    Place,
    Unusable,
    decoded,
    examined,
    located,
    place_of,
    read,
    require_folder,
)
from gemma_tune.data.reading.rows import HUB, JSON, Description, Source
from support.picture_files import as_bytes, drawn, moving, save, turned

OWN, HUBS = Place((Path("data"),)), Place((Path("data"),), own=False)


def leads_to(path: str, place: Place) -> bytes:
    return read(located(path, place, {})[0])


def nowhere(path: str, place: Place) -> Unusable:
    return fault(located, path, place, {})


def fault(of, *args) -> Unusable:
    with pytest.raises(Unusable) as raised:
        of(*args)
    assert raised.value.fix
    return raised.value


MODES = {("PNG", ".png"): "RGB L 1 P RGBA LA I;16", ("JPEG", ".jpg"): "RGB L CMYK", ("WEBP", ".webp"): "RGB RGBA L P",
         ("GIF", ".gif"): "RGB L 1 P RGBA", ("BMP", ".bmp"): "RGB L 1 P", ("TIFF", ".tif"): "RGB L 1 P RGBA CMYK LAB I;16"}


@pytest.mark.parametrize("format, ending, mode", [(*format, mode) for format, modes in MODES.items() for mode in modes.split()])
def test_every_format_with_the_colours_that_it_can_have(format, ending, mode):
    image = Image.new(mode, (9, 9)) if mode in ("LAB", "I;16") else drawn().convert(mode)
    assert examined(as_bytes(image, format)) == (ending, False)


def test_a_jpeg_as_telephones_write_it():
    assert examined(turned()) == (".jpg", False)
    of_two = as_bytes(drawn(), "MPO", save_all=True, append_images=[drawn(1)])
    with Image.open(io.BytesIO(of_two)) as image:
        assert image.format == "MPO" and image.is_animated
    assert examined(of_two) == (".jpg", False), "the second picture is one for each eye, or a preview"


@pytest.mark.parametrize("format, ending", [("GIF", ".gif"), ("WEBP", ".webp"), ("PNG", ".png"), ("TIFF", ".tif")])
def test_frames_and_pages(format, ending):
    assert examined(moving(format)) == (ending, True)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_what_is_cut_off_is_found_at_once(format, share):
    image = Image.effect_noise((64, 64), 80).convert("RGB")  # which cannot be packed, so that every part of it matters
    content = as_bytes(image, format)
    found = fault(examined, content[:int(share * len(content))])
    assert found.code == BROKEN and found.reason.startswith("is damaged, ")


@pytest.mark.parametrize("content, said", [
    (b"", "is an empty file"), (b"<!DOCTYPE html><p>404", "is a web page"), (b"hello", "is text"), (b"%PDF-1.7", "is a PDF file"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
    (b"\0\0\0\x18ftypheic\0\0\0\0", "is a HEIC or AVIF picture"), (b"\0\0\0\x18ftypavif\0\0\0\0", "is a HEIC or AVIF picture")])
def test_what_is_no_picture_is_called_what_it_is(content, said):
    assert fault(examined, content).reason.startswith(said)


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG file whose header says whatever it likes."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_are_no_colours(mode):
    found = fault(examined, as_bytes(Image.new(mode, (9, 9)), "TIFF"))
    assert "nothing says which is white" in found.reason and "with the colours" in found.fix


def test_sizes_that_no_picture_has():
    assert fault(examined, png(0, 5)).reason == "is damaged, cut off, or without any pixel"
    assert "more than 178,956,970 pixels" in fault(examined, png(20_000, 20_000)).reason


def test_large_pictures_are_taken_without_a_word(recwarn):
    image = Image.new("1", (10_000, 9_000))  # more than Pillow warns of
    assert examined(as_bytes(image)) == (".png", False)
    assert not recwarn.list


def test_base64():
    assert decoded("aGVs\n bG8=") == b"hello"
    assert fault(decoded, "aGVs*bG8=").reason.startswith("is not Base64")


# --- places

def source(path: str, kind: str = JSON, described: str | None = None) -> Source:
    description = Description("mine", Path(described), "alpaca", (), ()) if described else None
    return Source(path, Path(path), kind, described=description)


PIPED = Path("runs/mine/inputs")


def test_where_relative_paths_begin():
    assert place_of(source("data/a.jsonl"), None, PIPED).folders == (Path("data"),)
    assert place_of(source("data/a.jsonl"), "img", PIPED).folders == (Path("img"), Path("data"))
    assert place_of(source("a.jsonl"), ".", PIPED).folders == (Path(),)
    assert place_of(source("data/deep/a.json", described="data/dataset_info.json"), None, PIPED).folders == (Path("data"),)
    assert place_of(source("runs/mine/inputs/stdin-1.jsonl"), None, PIPED).folders == (Path(),)
    assert place_of(source("runs/mine/inputs/hf-a.json", HUB), None, PIPED) == Place((), own=False)
    assert place_of(source("runs/mine/inputs/hf-a.json", HUB), "img", PIPED) == Place((Path("img"),), own=False)


def test_own_rows_name_any_file(tmp_path):
    content = save("data/img/a.png")
    save("b.png", content)
    for path in ("img/a.png", "./img//a.png", "../b.png", f"{tmp_path}/b.png"):
        assert leads_to(path, OWN) == content, path


def test_the_named_folder_comes_first_and_that_of_the_data_after_it():
    first, second = save("named/a.png", as_bytes(drawn(1))), save("data/b.png", as_bytes(drawn(2)))
    save("data/a.png", as_bytes(drawn(3)))
    both = Place((Path("named"), Path("data")))
    assert [leads_to(path, both) for path in ("a.png", "b.png")] == [first, second]
    assert nowhere("c.png", both).reason == "is not below named or data"


def test_where_it_was_looked_for_is_told():
    size = len(save("data/b.png"))
    tried = {}
    both = Place((Path("named"), Path("data")))
    located("b.png", both, tried)
    fault(located, "c.png", both, tried)
    named, data = both.folders
    assert tried == {(named, "b.png"): None, (data, "b.png"): (size, os.stat("data/b.png").st_mtime_ns), (named, "c.png"): None,
                     (data, "c.png"): None}


def test_rows_of_the_hub_name_what_lies_in_the_named_folder_alone(tmp_path):
    content = save("data/img/a.png")
    save("b.png")
    assert leads_to("img/../img/a.png", HUBS) == content
    assert leads_to("data/img/a.png", Place((Path(),), own=False)) == content
    save("data/..c.png", content)
    assert leads_to("..c.png", HUBS) == content
    for path in ("../b.png", "img/../../b.png", "../data2/b.png", f"{tmp_path}/b.png", f"{tmp_path}/data/img/a.png"):
        assert "nothing else of this machine" in nowhere(path, HUBS).reason
    none = nowhere("img/a.png", Place((), own=False))
    assert "name no files of this machine" in none.reason and "--pictures DIR" in none.fix


@pytest.mark.parametrize("path, said, code", [
    ("a.png", "is not below data", MISSING), ("img", "is a folder", BROKEN), ("", "is a folder", BROKEN),
    ("x/y.png", "is not below data", MISSING), ("/nowhere/a.png", "is not there", MISSING), ("img/a.png/b.png", "is not below data", MISSING),
    ("a\0b.png", "cannot be read", BROKEN), ("n" * 300, "cannot be read: File name too long", BROKEN)])
def test_paths_that_lead_nowhere(path, said, code):
    save("data/img/a.png")
    found = nowhere(path, OWN)
    assert found.reason.startswith(said) and found.code == code


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_not_waited_for():
    os.makedirs("data")
    os.mkfifo("data/a.png")
    assert nowhere("a.png", OWN).reason == "is no file"


def test_a_huge_file_is_not_read(monkeypatch):
    monkeypatch.setattr("gemma_tune.data.conversations.picture_files._LARGEST", 10)
    save("a.png")
    assert fault(read, Path("a.png")).reason.startswith("has more than")


def test_the_named_folder_is_there():
    save("a.png")
    require_folder(None)
    require_folder(".")
    for named, said in (("img", "img, is not there"), ("a.png", "a.png, is a file")):
        with pytest.raises(UserError, match=said):
            require_folder(named)
