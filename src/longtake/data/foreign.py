"""What a file is that is neither a video nor an image that can be read, told from how it begins."""

from io import BufferedReader
from typing import NoReturn

from longtake.data.regular_files import refusal

_GIVE = "give an intact mp4, mov, mkv, webm or avi, or a PNG or JPEG"
_HEAD_BYTES = 2**16
_ARCHIVES = (
    b"PK\x03\x04",
    b"Rar!\x1a\x07",
    b"7z\xbc\xaf\x27\x1c",
    b"\x1f\x8b\x08",
    b"\xfd7zXZ\x00",
    b"BZh",
    b"\x28\xb5\x2f\xfd",
)
_TAR_AT = 257
_FORMATS = (
    (b"GIF8", "GIF"),
    (b"%PDF", "PDF"),
    (b"8BPS", "Photoshop"),
    (b"FLV\x01", "Flash video"),
    (b"OggS", "Ogg"),
    (b"ID3", "MP3"),
    (b"\xff\xfb", "MP3"),
    (b"fLaC", "FLAC"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "Windows Media"),
    (b"\x00\x00\x01\xba", "MPEG program stream"),
    (b"\x00\x00\x01\xb3", "MPEG video"),
    (b"\x00\x00\x00\x01", "bare H.264"),
    (b"DKIF", "IVF"),
    (b"YUV4MPEG2", "Y4M"),
    (b".RMF", "RealMedia"),
    (b"\x06\x0e\x2b\x34", "MXF"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
)
_PACKET_BYTES = 188
"""Of an MPEG transport stream, each of which begins with the same byte."""
_PLAYLISTS = ("#extm3u", "ffconcat", "[playlist]", "v=0\n", "v=0\r\n", "<asx", "<smil")
_POINTER = "version https://git-lfs.github.com/"


def refuse_foreign(file: BufferedReader, name: str) -> NoReturn:
    """Raises DataError that says what the file is, as far as its first bytes tell."""
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    if not any(head):
        what = f"{name} is not a video: it has nothing but zeros"
        raise refusal(what, "", "copy it again: its place was taken and never filled", code="file-zeros")
    if head.startswith(_ARCHIVES) or head[_TAR_AT : _TAR_AT + 5] == b"ustar":
        raise refusal(f"{name} is not a video, but an archive", "", "unpack it", code="file-archive")
    if kind := _other_format(head):
        what = f"{name} is not a video or image of a kind that is read: it is {kind}"
        raise refusal(what, "", "convert it to mp4 or PNG", code="file-other-format")
    if (text := _text(head)) is not None:
        _refuse_text(text.lower(), name)
    what = f"{name} is not a video or image of any kind that is known"
    raise refusal(what, "", _GIVE, code="file-unknown")


def _other_format(head: bytes) -> str:
    if head[:1] == head[_PACKET_BYTES : _PACKET_BYTES + 1] == head[2 * _PACKET_BYTES : 2 * _PACKET_BYTES + 1] == b"G":
        return "an MPEG transport stream"
    if head[:4] == b"RIFF":
        return f"RIFF {head[8:12].decode('ascii', 'replace').strip()}"
    return next((kind for mark, kind in _FORMATS if head.startswith(mark)), "")


def _text(head: bytes) -> str | None:
    """The head as text; None where it is none."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = head[: len(head) & ~1].decode(encoding, "replace").lstrip()
    strange = sum(character == "\ufffd" or (character < " " and character not in "\t\n\r\f") for character in text)
    # in Latin-1 and the like some letters cannot be decoded, and they are few
    return text if text and strange <= len(text) // 10 else None


def _refuse_text(text: str, name: str) -> NoReturn:
    if text.startswith(_POINTER):
        what = f"{name} is not a video, but a pointer of Git LFS to one"
        raise refusal(what, "", "fetch the file itself: git lfs pull", code="file-pointer")
    if text.startswith(_PLAYLISTS) or "<mpd" in text[:1000]:
        what = f"{name} is not a video, but a playlist, which is not followed"
        raise refusal(what, "", "give the clips that it names", code="file-playlist")
    if "<svg" in text[:1000]:
        what = f"{name} is a drawing (SVG), which is not read"
        raise refusal(what, "", "convert it to PNG", code="file-other-format")
    if text.startswith(("<!doctype html", "<html")):
        what = f"{name} is not a video, but a web page"
        raise refusal(what, "", "download it again: the server has answered with a page", code="file-web-page")
    raise refusal(f"{name} is not a video, but text", "", _GIVE, code="file-text")
