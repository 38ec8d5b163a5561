"""Odd clips that are well: what each is called, how it is made, and what `ffmpeg` has to be told of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

import boxes

WIDTH, HEIGHT, COUNT = 96, 64, 12
BT709, BT601, BT2020, HLG, FULL = 1, 6, 9, 18, 2
UNEVEN = (0, 40, 80, 240, 260, 280, 300, 500, 520, 600, 640, 680)


@dataclass(frozen=True)
class Odd:
    """A clip by name, and what `ffmpeg` has to be told of it.

    `matrix` is that of its colours where `ffmpeg` would take another than players do. `siting` is where its samples
    of colour lie: to the left by H.264 and its kin, which decoders say and `ffmpeg`'s scaler does not heed.
    """

    name: str
    make: Callable[[Path], object]
    matrix: str = ""
    siting: str = "left"


@dataclass(frozen=True)
class Film:
    """What `draw` draws. `times` are in milliseconds; `tags` are the codec context's, `options` the encoder's."""

    codec: str = "libx264"
    format: str = "yuv420p"
    rate: Fraction | int = 24
    size: tuple[int, int] = (WIDTH, HEIGHT)
    count: int = COUNT
    times: Sequence[int] = ()
    tags: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    container: dict[str, str] = field(default_factory=dict)
    degrees: int = 0
    mirrored: bool = False
    time_code: str = ""
    sounds: int = 0
    drawn_as: int = BT601


def scene(number: int, width: int, height: int) -> np.ndarray:
    """Slopes of colour, over which a square with sharp edges goes; its alpha falls from left to right."""
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([columns * 255 // width, rows * 255 // height, 255 - columns * 200 // width], 2)
    side, left = height // 3, 7 * number % (width - height // 3)
    picture[side : 2 * side, left : left + side] = (220, 30 + 10 * number, 40)
    return np.concatenate([picture, picture[:, ::-1, :1]], 2).astype(np.uint8)


def draw(path: Path, film: Film) -> Path:
    """Writes the film."""
    with av.open(str(path), "w", options=film.container) as output:
        stream = output.add_stream(film.codec, rate=film.rate, options={"crf": "8"} | film.options)
        stream.width, stream.height, stream.pix_fmt = *film.size, film.format
        base = Fraction(1, 1000) if film.times else 1 / Fraction(film.rate)
        stream.time_base = stream.codec_context.time_base = base
        stream.codec_context.thread_count = 1
        for name, value in film.tags.items():
            setattr(stream.codec_context, name, value)
        if film.degrees or film.mirrored:
            stream.set_display_rotation(film.degrees, hflip=film.mirrored)
        if film.time_code:
            stream.metadata["timecode"] = film.time_code
        sounds = [output.add_stream("aac", rate=8000, layout="mono") for _ in range(film.sounds)]
        for number in range(film.count):
            output.mux(stream.encode(_picture(film, number, base)))
        output.mux(stream.encode(None))
        for sound in sounds:
            add_tone(output, sound)
    return path


def _picture(film: Film, number: int, base: Fraction) -> av.VideoFrame:
    drawn = av.VideoFrame.from_ndarray(scene(number, *film.size), format="rgba")
    picture = drawn.reformat(
        format=film.format,
        dst_colorspace=film.tags.get("colorspace", film.drawn_as),
        dst_color_range=film.tags.get("color_range", 1),
    )
    picture.pts, picture.time_base = (film.times[number] if film.times else number), base
    return picture


def add_tone(output: Any, stream: Any) -> None:
    """A second of sound."""
    for index in range(8):
        tone = np.sin(np.arange(1000, dtype=np.float32) / 9)[None] / 4
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, index * 1000, Fraction(1, 8000)
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


def film(**options: Any) -> Callable[[Path], object]:
    return lambda path: draw(path, Film(**options))


def then(change: Callable[[bytes], bytes], **options: Any) -> Callable[[Path], object]:
    """With its bytes changed."""
    return lambda path: boxes.changed(draw(path, Film(**options)), change)


def edited(media_time: int, delay: int = 0, **options: Any) -> Callable[[Path], object]:
    """With an edit list that begins at `media_time` ticks of the pictures' clock, after `delay` milliseconds."""

    def make(path: Path) -> None:
        draw(path, Film(**options))
        pause = [(delay, -1)] if delay else []
        edits = [*pause, (COUNT * 1000 // 24 - media_time * 1000 // 12288, media_time)]
        lines = b"".join(
            length.to_bytes(4, "big") + begin.to_bytes(4, "big", signed=True) + b"\0\1\0\0" for length, begin in edits
        )
        boxes.replace(path, b"elst", boxes.of(b"elst", bytes(4) + len(edits).to_bytes(4, "big") + lines))

    return make


def with_open_end(content: bytes) -> bytes:
    """The box of pictures has no size, which means to the end of the file."""
    start, _ = boxes.box(content, b"mdat")
    return content[:start] + bytes(4) + content[start + 4 :]


ODD = (
    Odd("uneven.mp4", film(times=UNEVEN)),
    Odd("uneven.mkv", film(times=UNEVEN)),
    Odd("rate-24000-1001.mp4", film(rate=Fraction(24000, 1001))),
    Odd("rate-30000-1001.mkv", film(rate=Fraction(30000, 1001))),
    Odd("rate-60000-1001.webm", film(rate=Fraction(60000, 1001), codec="libvpx"), siting="center"),
    Odd("turned-90.mp4", film(degrees=90), siting="bottom"),
    Odd("turned-180.mov", film(format="yuv444p", degrees=180)),
    Odd("turned-270.mp4", film(format="yuv444p", degrees=-90)),
    Odd("mirrored.mp4", film(format="yuv444p", mirrored=True)),
    Odd("turned-and-mirrored.mp4", film(format="yuv444p", degrees=90, mirrored=True)),
    Odd("wide-pixels.mp4", film(tags={"sample_aspect_ratio": Fraction(4, 3)})),
    Odd("tall-pixels.mkv", film(tags={"sample_aspect_ratio": Fraction(8, 9)})),
    Odd("turned-wide-pixels.mp4", film(format="yuv444p", degrees=90, tags={"sample_aspect_ratio": Fraction(2, 1)})),
    Odd("10-bit.mp4", film(format="yuv420p10le")),
    Odd("10-bit.mkv", film(codec="ffv1", format="yuv422p10le"), siting="center"),
    Odd("12-bit.mkv", film(codec="ffv1", format="yuv444p12le")),
    Odd("444.mp4", film(format="yuv444p")),
    Odd("422.mov", film(codec="prores_ks", format="yuv422p10le", options={}), siting="center"),
    Odd("rgb.mkv", film(codec="libx264rgb", format="rgb24")),
    Odd("full-range.mp4", film(tags={"color_range": FULL})),
    Odd(
        "motion-jpeg.mov",
        film(codec="mjpeg", format="yuvj420p", options={"q": "1"}, tags={"color_range": FULL}),
        siting="center",
    ),
    Odd(
        "alpha.webm",
        film(codec="libvpx-vp9", format="yuva420p", options={"deadline": "realtime", "cpu-used": "8"}),
        siting="center",
    ),
    Odd("alpha.mov", film(codec="qtrle", format="argb")),
    Odd("alpha-png.mov", film(codec="png", format="rgba")),
    Odd("alpha.mkv", film(codec="ffv1", format="yuva420p"), siting="center"),
    Odd("odd-sides.mkv", film(codec="ffv1", size=(93, 61)), siting="center"),
    Odd("odd-sides.mp4", film(format="yuv444p", size=(93, 61))),
    Odd("cropped.mp4", film(size=(90, 58))),
    Odd("negative-start.mkv", film(times=[40 * number - 120 for number in range(COUNT)])),
    Odd(
        "negative-start.mp4",
        film(times=[40 * number - 120 for number in range(COUNT)], container={"avoid_negative_ts": "disabled"}),
    ),
    Odd("delayed.mp4", edited(1024, 500, options={"bf": "2"})),
    Odd("edited.mp4", edited(3072, options={"bf": "2"})),
    Odd("open-groups.mp4", film(options={"x264-params": "open-gop=1:keyint=5:bframes=2:scenecut=0"})),
    Odd("b-frames.mkv", film(options={"x264-params": "bframes=5:b-pyramid=2:b-adapt=0"})),
    Odd("LOUD.MP4", film()),
    Odd("drachen-🪁.mp4", film()),
    Odd("two\nlines.mp4", film()),
    Odd("a 'b' \"c\" 100%d %s.mp4", film()),
    Odd("-i.mp4", film()),
    Odd("fragments.mp4", film(options={"g": "4"}, container={"movflags": "frag_keyframe+empty_moov"})),
    Odd("written-live.mkv", film(container={"live": "1"})),
    Odd("appended.mp4", then(lambda content: content + bytes(9) + b"and more")),
    Odd("endlessly-free.mp4", then(lambda content: content + boxes.endless(b"free"))),
    Odd("cut-in-sound.mp4", then(lambda content: content[:-99], sounds=1, container={"movflags": "faststart"})),
    Odd("to-the-end.mp4", then(with_open_end, container={"movflags": "faststart"})),
    Odd("mpeg-4.avi", film(codec="mpeg4", options={"qscale": "2"})),
    Odd("phone.3gp", film(codec="h263", size=(176, 144), options={}), siting="center"),
    Odd("time-code.mov", film(time_code="01:00:00:00")),
    Odd("two-sounds.mkv", film(sounds=2)),
    Odd("late.mkv", film(times=[5000 + 40 * number for number in range(COUNT)])),
    Odd("bt709.mp4", film(tags={"colorspace": BT709, "color_primaries": BT709, "color_trc": BT709})),
    Odd("bt601.mp4", film(size=(1280, 64), tags={"colorspace": BT601})),
    Odd("bt2020.mp4", film(format="yuv420p10le", tags={"colorspace": BT2020, "color_trc": HLG})),
    Odd("hd.mp4", film(size=(1280, 64), drawn_as=BT709), matrix="bt709"),
    Odd("interlaced.mp4", film(options={"x264-params": "tff=1"})),
    Odd("grey.mkv", film(codec="ffv1", format="gray")),
    Odd("grey.mp4", film(format="gray")),
    Odd("hevc.mp4", film(codec="libx265", options={"x265-params": "log-level=none"})),
    Odd("av1.mp4", film(codec="libsvtav1", options={"preset": "12", "svtav1-params": "lp=1"}), siting="center"),
)
