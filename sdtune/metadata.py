"""Leave metadata out of image files, which may be broken where the pixels are whole."""

import re
import struct

TEXT = "text"  # the kinds of metadata; this one is all that no viewer obeys
PROFILE = "profile"
EXIF = "exif"
TIFF_TEXT = {269, 270, 271, 272, 285, 305, 306, 315, 316, 330}  # names, dates, and other directories (TIFF 6.0)
TIFF_KINDS = {34665: EXIF, 34853: EXIF, 34675: PROFILE}


def without_metadata(encoded, kinds):
    """An image file without its metadata of these kinds: PNG, JPEG, WebP, TIFF and AVIF; any other as it is."""
    if encoded.startswith(b"\x89PNG"):
        return join_parts(png_parts(encoded), kinds)
    if encoded.startswith(b"\xff\xd8\xff"):
        return join_parts(jpeg_parts(encoded), kinds)
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        chunks = join_parts(webp_parts(encoded), kinds)
        return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks
    if encoded.startswith((b"II*\0", b"MM\0*")):
        return tiff_without(encoded, kinds)
    if encoded[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1"):
        return avif_without(encoded, kinds)
    return encoded


def join_parts(parts, kinds):
    """Puts the parts of a file together, pairs of kind and bytes, but those of these kinds."""
    return b"".join(part for kind, part in parts if kind not in kinds)


def png_parts(encoded):
    """Yields (kind of metadata or None, bytes) of each chunk of a PNG (PNG specification, sections 5.3 and 5.4)."""
    yield None, encoded[:8]
    place = 8
    while place < len(encoded):
        (length,) = struct.unpack(">I", encoded[place : place + 4].rjust(4, b"\0"))
        name = encoded[place + 4 : place + 8]
        kind = {b"iCCP": PROFILE, b"eXIf": EXIF, b"tRNS": None}.get(name, TEXT)
        is_needed = name[:1].isupper()  # as the specification has it
        yield None if is_needed else kind, encoded[place : place + 12 + length]
        place += 12 + length


def jpeg_parts(encoded):
    """Yields (kind of metadata or None, bytes) of each segment of a JPEG up to the pixels, and then these (ITU T.81,
    annex B)."""
    yield None, encoded[:2]
    place = 2
    while encoded[place : place + 1] == b"\xff" and encoded[place + 1 : place + 2] != b"\xda":
        marker = encoded[place + 1]
        if marker == 0xFF:  # which fills a gap
            place += 1
            continue
        (length,) = struct.unpack(">H", encoded[place + 2 : place + 4].rjust(2, b"\0"))
        segment = encoded[place : place + 2 + length]
        yield jpeg_kind(marker, segment), segment
        place += 2 + length
    yield None, encoded[place:]


def jpeg_kind(marker, segment):
    """The kind of metadata that a segment holds, or None."""
    if marker in (0xE0, 0xEE) and len(segment) >= 16:
        return None  # JFIF's and Adobe's, which tell how the colours are coded
    if marker == 0xE1 and segment[4:8] == b"Exif":
        return EXIF
    if marker == 0xE2 and segment[4:15] == b"ICC_PROFILE":
        return PROFILE
    return TEXT if 0xE0 <= marker <= 0xEF or marker == 0xFE else None


def webp_parts(encoded):
    """Yields (kind of metadata or None, bytes) of each chunk of a WebP (RFC 9649, section 2.7)."""
    place = 12
    while place < len(encoded):
        (length,) = struct.unpack("<I", encoded[place + 4 : place + 8].ljust(4, b"\0"))
        end = place + 8 + length + length % 2
        kind = {b"XMP ": TEXT, b"ICCP": PROFILE, b"EXIF": EXIF}.get(encoded[place : place + 4])
        yield kind, encoded[place:end]
        place = end


def tiff_without(encoded, kinds):
    """A TIFF without metadata of these kinds in its first directory, in which tags from 700 on are extensions."""
    order = "<" if encoded.startswith(b"II") else ">"
    (start,) = struct.unpack(f"{order}I", encoded[4:8])
    (number,) = struct.unpack(f"{order}H", encoded[start : start + 2].rjust(2, b"\0"))
    end, kept = start + 2 + 12 * number, []
    for place in range(start + 2, end, 12):
        (tag,) = struct.unpack(f"{order}H", encoded[place : place + 2].rjust(2, b"\0"))
        kind = TIFF_KINDS.get(tag, TEXT if tag >= 700 or tag in TIFF_TEXT else None)
        if kind not in kinds:
            kept.append(encoded[place : place + 12])
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + encoded[end : end + 4]
    return encoded[:start] + directory.ljust(end + 4 - start, b"\0") + encoded[end + 4 :]


def avif_without(encoded, kinds):
    """An AVIF in which items of these kinds are of a type that nobody reads (ISO 14496-12, section 8.11.6)."""
    for kind, name in ((EXIF, b"Exif"), (TEXT, b"mime")):
        if kind in kinds:
            encoded = re.sub(rb"(infe[\2\3](?:.{7}|.{9}))" + name, rb"\1skip", encoded, flags=re.DOTALL)
    return encoded
