"""What the bundled tiny models reach on shots that no bundled weight was trained on.

    python benchmarks/tiny_models.py

Prints the VAE's PSNR at several sizes, of whole shots in one piece and of clips as long as the model's; and for a video
sampled by tiny-i2v from each unseen shot's first frame its PSNR against that shot, against the nearest other shot, and
that of a still image: the first frame repeated.
"""

import sys

import torch

from longtake.config.schema import ModelConfig
from longtake.data.video import Window, read_clip
from longtake.demo.clips import film, shots
from longtake.demo.demo import FRAMES, SIZE, UNSEEN_STARTS
from longtake.demo.quality import frame_psnr, reconstruct, unseen_shots
from longtake.models.wan import encoders, tiny
from longtake.models.wan.weights import load_transformer, locate
from longtake.sampling import SampleRequest, sample

CPU = torch.device("cpu")
SIZES = ((112, 64), SIZE, (224, 128))


def main() -> None:
    path = film(print)
    if path is None:
        sys.exit("the film is needed")
    vae = encoders.load_vae(tiny.bundled("tiny-i2v"), CPU)
    for size in SIZES:
        clips = [read_clip(path.resolve(), Window(start, 81, 16.0), size) for start in UNSEEN_STARTS]
        found = [frame_psnr(reconstruct(vae, clip), clip) for clip in clips]
        print(
            f"VAE at {size[0]}x{size[1]}, 81 frames: {sum(found) / len(found):.2f} dB "
            f"({', '.join(f'{x:.1f}' for x in found)})"
        )
    pieces = [
        frame_psnr(reconstruct(vae, shot[first : first + FRAMES]), shot[first : first + FRAMES])
        for shot in unseen_shots(path, 81).values()
        for first in range(0, 81 - FRAMES + 1, FRAMES - 1)
    ]
    print(f"VAE at {SIZE[0]}x{SIZE[1]}, clips of {FRAMES} frames: {sum(pieces) / len(pieces):.2f} dB")
    unseen = unseen_shots(path, FRAMES)
    captions = {shot["start"]: shot["caption"] for shot in shots()}
    files = locate(ModelConfig(name="tiny-i2v", dtype="fp32"), tiny.bundled, print)
    transformer = load_transformer(files, "transformer", torch.float32, CPU)
    for start, clip in unseen.items():
        request = SampleRequest(captions[start], clip[0], None, SIZE, FRAMES, 20, 1.0, 0, 3.0)
        spec = files.variant.spec
        video = sample(tiny.bundled("tiny-i2v"), spec, {"transformer": transformer}, request, CPU)
        others = max(frame_psnr(video, other) for key, other in unseen.items() if key != start)
        still = frame_psnr(clip[:1].expand_as(clip), clip)
        own = frame_psnr(video, clip)
        print(
            f"tiny-i2v, shot at {start} s: own {own:.1f} dB, nearest other {others:.1f} dB, still image {still:.1f} dB"
        )


if __name__ == "__main__":
    main()
