"""What only concerns metadata never costs an image, nor its orientation where that can be read."""

import io
import struct
import zlib

import numpy as np
import pytest
from image_data import encoded, make_image
from PIL import Image

from sdtune.images import open_image

IMAGE = make_image(3, (40, 24))
PIXELS = np.asarray(IMAGE)
TURNED = np.rot90(PIXELS, -1)  # what orientation 6 asks for
JUNK = b"no metadata at all"
TEXT_OF_3_MB = zlib.compress(b"x" * 3_000_000)


def exif_of(orientation):
    """EXIF as files hold it: "Exif" and a TIFF of one directory."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"  # AVIF keeps the first one elsewhere
    return exif.tobytes()


def png(*chunks, behind=False):
    """A PNG with these chunks, pairs of name and data, in front of its pixels or behind them."""
    whole = encoded(IMAGE)
    place = whole.index(b"IEND") - 4 if behind else 33
    added = b""
    for name, data, *checksum in chunks:
        checksum = checksum[0] if checksum else zlib.crc32(name + data)
        added += struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)
    return whole[:place] + added + whole[place:]


def jpeg(*segments):
    """A JPEG with these segments, pairs of marker and data, at its start, and its pixels."""
    whole, added = encoded(IMAGE, "jpg", quality=95), b""
    for marker, data in segments:
        added += bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data
    return whole[:2] + added + whole[2:]


def tiff(tag, kind, number, value):
    """A TIFF with one more tag in its directory, which stands at the end."""
    whole = encoded(IMAGE, "tif")
    (start,) = struct.unpack("<I", whole[4:8])
    (count,) = struct.unpack("<H", whole[start : start + 2])
    entries = [whole[place : place + 12] for place in range(start + 2, start + 2 + 12 * count, 12)]
    entries = [entry for entry in entries if entry[:2] != struct.pack("<H", tag)]
    entries.append(struct.pack("<HHI", tag, kind, number) + value)
    entries.sort(key=lambda entry: struct.unpack("<H", entry[:2]))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return whole[:4] + struct.pack("<I", len(whole)) + whole[8:] + directory


PNGS = {
    "text for EXIF": ((b"eXIf", JUNK),),
    "EXIF that breaks off": ((b"eXIf", exif_of(6)[6:20]),),
    "EXIF as text that is none": ((b"tEXt", b"Raw profile type exif\0\nexif\n9\nno hex"),),
    "EXIF as text without its head": ((b"tEXt", b"Raw profile type exif\0\nexif\n4\n45786966"),),
    "long text": ((b"zTXt", b"workflow\0\0" + TEXT_OF_3_MB),),
    "long international text": ((b"iTXt", b"workflow\0\1\0\0\0" + TEXT_OF_3_MB),),
    "much text": ((b"tEXt", b"workflow\0" + bytes(66_000_000)),),
    "text with a wrong checksum": ((b"tEXt", b"author\0me", 1),),
    "a profile of 3 MB": ((b"iCCP", b"name\0\0" + TEXT_OF_3_MB),),
    "an empty profile": ((b"iCCP", b""),),
    "a short size": ((b"pHYs", b"1"),),
    "XMP in no encoding": ((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe<x"),),
}


@pytest.mark.parametrize("chunks", PNGS.values(), ids=PNGS)
@pytest.mark.parametrize("behind", [False, True])
def test_broken_metadata_of_png(chunks, behind):
    assert np.array_equal(open_image(png(*chunks, behind=behind)), PIXELS)


JPEGS = {
    "text for EXIF": (0xE1, b"Exif\0\0" + JUNK),
    "EXIF that breaks off": (0xE1, exif_of(6)[:20]),
    "a text for the resolution": (0xE1, b"Exif\0\0MM\0*" + bytes.fromhex("00000008 0001 011a 0007 00000001 61626364")),
    "a text for the orientation": (
        0xE1,
        b"Exif\0\0MM\0*" + bytes.fromhex("00000008 0001 0112 0002 00000004 73697800"),
    ),
    "a short JFIF": (0xE0, b"JFIF\0"),
    "a short Adobe": (0xEE, b"Adobe"),
    "an empty profile": (0xE2, b"ICC_PROFILE\0"),
    "a text for a profile": (0xE2, b"ICC_PROFILE\0\1\1" + JUNK),
    "a list of pictures that is none": (0xE2, b"MPF\0" + JUNK),
    "a Photoshop block that breaks off": (0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed"),
    "empty XMP": (0xE1, b"http://ns.adobe.com/xap/1.0/\0"),
}


@pytest.mark.parametrize("segment", JPEGS.values(), ids=JPEGS)
def test_broken_metadata_of_jpeg(segment):
    assert np.array_equal(open_image(jpeg(segment)), Image.open(io.BytesIO(jpeg())))


@pytest.mark.parametrize("place", [b"abcd", b"\xff\xff\xff\x7f", bytes([1, 0, 0, 0])])
@pytest.mark.parametrize("kind, number", [(1, 50), (2, 4), (4, 1), (99, 1)])
@pytest.mark.parametrize("tag", [270, 282, 330, 700, 33723, 34377, 34665, 34675, 34853])
def test_broken_metadata_of_tiff(tag, kind, number, place):
    """Description, resolution, further directories, XMP, IPTC, Photoshop, EXIF, profile and GPS, of wrong types and at
    places where nothing is."""
    assert np.array_equal(open_image(tiff(tag, kind, number, place)), PIXELS)


def test_broken_metadata_of_webp():
    plain = encoded(IMAGE, "webp", lossless=True)
    assert np.array_equal(open_image(plain), PIXELS)
    broken = {"exif": b"Exif\0\0" + JUNK, "icc_profile": JUNK, "xmp": b"\xff" + JUNK}
    assert np.array_equal(open_image(encoded(IMAGE, "webp", lossless=True, **broken)), PIXELS)
    for kind in ("exif", "xmp"):  # the last chunk of a file
        whole = encoded(IMAGE, "webp", lossless=True, **{kind: exif_of(6)})
        assert np.array_equal(open_image(whole[:-4]), PIXELS)


def test_broken_metadata_of_avif():
    plain = open_image(encoded(IMAGE, "avif", quality=90))
    whole = encoded(IMAGE, "avif", quality=90, exif=exif_of(6))
    assert np.array_equal(open_image(whole), np.rot90(plain, -1))
    start = whole.rindex(b"MM\0*")
    for broken in (whole.replace(b"MM\0*", b"JUNK"), whole[: start - 4] + b"\xff\xff\xff\x7f" + whole[start:]):
        assert open_image(broken).size in (plain.size, plain.size[::-1])  # the file may turn it by itself too
    assert np.array_equal(open_image(encoded(IMAGE, "avif", quality=90, icc_profile=JUNK, xmp=JUNK)), plain)


def test_orientation_is_obeyed_beside_metadata_that_is_broken():
    exif = (b"eXIf", exif_of(6)[6:])
    assert np.array_equal(open_image(png(exif)), TURNED)
    for chunk in ((b"zTXt", b"workflow\0\0" + TEXT_OF_3_MB), (b"iCCP", b"name\0\0" + TEXT_OF_3_MB)):
        assert np.array_equal(open_image(png(chunk, exif)), TURNED)
        assert np.array_equal(open_image(png(exif, chunk)), TURNED)
    upright = np.asarray(open_image(jpeg()))
    for segment in ((0xE2, b"ICC_PROFILE\0"), (0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed")):
        assert np.array_equal(open_image(jpeg(segment, (0xE1, exif_of(6)))), np.rot90(upright, -1))
    whole = encoded(IMAGE, "webp", lossless=True, exif=exif_of(6), xmp=JUNK)
    assert np.array_equal(open_image(whole[:-4]), TURNED)


def test_a_profile_is_obeyed_beside_text_that_is_broken():
    from test_images import BLUE, GREEN, RED, colour_profile

    swapped = zlib.compress(colour_profile(GREEN, RED, BLUE))
    found = open_image(png((b"zTXt", b"a\0\0" + TEXT_OF_3_MB), (b"iCCP", b"name\0\0" + swapped)))
    assert np.abs(np.asarray(found).astype(int)[..., [1, 0, 2]] - PIXELS).max() < 12
    assert np.abs(np.asarray(found).astype(int) - PIXELS).max() > 60


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "avif"])
def test_half_of_the_pixels_stay_an_error(suffix):
    """Whatever metadata is left out."""
    whole = encoded(make_image(1, (200, 200)), suffix, exif=exif_of(6))
    with pytest.raises((OSError, ValueError, SyntaxError)):
        open_image(whole[: len(whole) // 2])
