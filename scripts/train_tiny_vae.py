"""Trains the bundled tiny AutoencoderKLWan on Big Buck Bunny and reports its PSNR on unseen shots.

    python scripts/train_tiny_vae.py --film bbb.mp4 --out build/tiny/vae

Trained on the windows of `shots.jsonl` except the unseen ones, and on seconds 130-350 of the film. Single frames
come first (they train the spatial part several times faster), then clips of 5 and 9 frames; then longer clips, as
large as the demo shows them: a causal network that has seen 9 frames at most falls from 24 to 17 dB behind the 15th,
where its caches hold more of the past than they ever did in training. At the end the decoder alone is trained on,
which leaves the latents as they are.
"""

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch.nn import functional

from longtake.data.video import Window, read_clip

FPS = 16
SIZE = (64, 112)
FULL_VIEW = (90, 160)
DEMO_VIEW = (96, 170)
DEMO = (96, 160)
UNSEEN_STARTS = (36.0, 84.5, 382.0, 446.5)
EXTRA_SECONDS = (130.0, 350.0)
SHOTS = Path(__file__).parents[1] / "src/longtake/demo/shots.jsonl"
CONFIG = {"base_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "z_dim": 16}


def spans(unseen: bool) -> list[tuple[float, float]]:
    """Seconds [start, end) of the film that training may use, or of the shots that it may not."""
    shots = [json.loads(line) for line in SHOTS.read_text().splitlines()]
    windows = [(shot["start"], shot["start"] + shot["frames"] / shot["fps"]) for shot in shots]
    if unseen:
        return [window for window in windows if window[0] in UNSEEN_STARTS]
    kept = [window for window in windows if window[0] not in UNSEEN_STARTS]
    trimmed = [(start, min([end, *(u for u in UNSEEN_STARTS if start < u)])) for start, end in kept]
    return [*trimmed, EXTRA_SECONDS]


def decode(film: Path, span: tuple[float, float], view: tuple[int, int]) -> torch.Tensor:
    """Frames of [start, end) at 16 fps, scaled as every clip is: uint8 [frames, 3, height, width]."""
    start, end = span
    return read_clip(film.resolve(), Window(start, int((end - start) * FPS), float(FPS)), (view[1], view[0]))


class Clips:
    """Random augmented clips out of decoded runs of frames; `zooming` draws them between the full view and 1:1."""

    def __init__(self, runs: list[torch.Tensor], seed: int, zooming: bool) -> None:
        self.runs = runs
        self.weights = [len(run) for run in runs]
        self.random = random.Random(seed)
        self.zooming = zooming

    def draw(self, batch: int, num_frames: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
        """[batch, 3, num_frames, height, width] in [-1, 1], flipped half the time."""
        return torch.stack([self._clip(num_frames, size) for _ in range(batch)])

    def _clip(self, num_frames: int, size: tuple[int, int]) -> torch.Tensor:
        run = self.random.choices(self.runs, self.weights)[0]
        first = self.random.randrange(len(run) - num_frames + 1)
        clip = run[first : first + num_frames].float() / 127.5 - 1
        full = clip.shape[-2] / size[0]
        scale = self.random.choice([full, self.random.uniform(1, full)]) if self.zooming else 1.0
        height, width = round(size[0] * scale), min(clip.shape[-1], round(size[1] * scale))
        top = self.random.randint(0, clip.shape[-2] - height)
        left = self.random.randint(0, clip.shape[-1] - width)
        clip = clip[:, :, top : top + height, left : left + width]
        clip = functional.interpolate(clip, size, mode="bilinear", antialias=True, align_corners=False)
        return (clip.flip(-1) if self.random.random() < 0.5 else clip).permute(1, 0, 2, 3)


def train(
    vae: AutoencoderKLWan, clips: Clips, unseen: list[torch.Tensor], minutes: float, peak: float, out: Path
) -> None:
    """Trains what requires a gradient for `minutes`; `vae` then holds the moving average of its weights."""
    average = copy.deepcopy(vae).requires_grad_(False)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4)
    started, step, report = time.time(), 0, time.time()
    while (done := (time.time() - started) / (minutes * 60)) < 1:
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 200) * cosine
        loss, error = step_loss(vae, clips.draw(*schedule(done, step, clips.zooming)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(0.998, (step + 1) / (step + 20))
        torch._foreach_lerp_([*average.parameters()], [*vae.parameters()], 1 - decay)
        if time.time() - report > 180:
            report = time.time()
            seen, held = -10 * math.log10(error / 4), psnr(average, unseen, 33)
            print(f"step {step} {100 * done:.0f} % train {seen:.2f} dB unseen {held:.2f} dB", flush=True)
            average.save_pretrained(out)
    vae.load_state_dict(average.state_dict())


def schedule(done: float, step: int, zooming: bool) -> tuple[int, int, tuple[int, int]]:
    """(batch, num_frames, size): single frames for the first tenth, then 5 and 9 frames; behind that 17, 33 and 49."""
    if not zooming:
        return [(1, 17, SIZE), (1, 33, (48, 64)), (1, 17, SIZE), (1, 49, (48, 48))][step % 4]
    if done < 0.1:
        return 4, 1, SIZE
    return (2, 9, SIZE) if step % 4 == 0 else (3, 5, SIZE)


def step_loss(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, float]:
    joint = next(vae.encoder.parameters()).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(joint):
            posterior = vae.encode(video).latent_dist
        reconstruction = vae.decode(posterior.sample() if joint else posterior.mean).sample
    residual = reconstruction.float() - video
    error = residual.square().mean()
    divergence = 1e-6 * posterior.kl().mean() / video.shape[2]
    return error + 0.05 * residual.abs().mean() + divergence, float(error.detach())


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, runs: list[torch.Tensor], num_frames: int) -> float:
    """Mean over shots and frames of each frame's PSNR (dB), posterior mean, values in [0, 255]."""
    values = []
    for run in runs:
        video = (run[:num_frames].float() / 127.5 - 1).permute(1, 0, 2, 3)[None]
        reconstruction = vae.decode(vae.encode(video).latent_dist.mean).sample.clamp(-1, 1)
        values.append(-10 * torch.log10((reconstruction - video).square().mean((0, 1, 3, 4)) / 4).mean().item())
    return sum(values) / len(values)


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan, clips: Clips) -> None:
    """Puts mean and standard deviation of each latent channel over training clips of 17 frames into the config."""
    latents = torch.cat([vae.encode(clips.draw(1, 17)).latent_dist.mean for _ in range(64)])
    mean, std = latents.mean((0, 2, 3, 4)).tolist(), latents.std((0, 2, 3, 4)).tolist()
    vae.register_to_config(latents_mean=mean, latents_std=std)


def refine_decoder(vae: AutoencoderKLWan, clips: Clips, unseen: list[torch.Tensor], minutes: float, out: Path) -> None:
    """Trains the decoder alone, so that latents that were cached before stay right."""
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    train(vae, clips, unseen, minutes, 5e-4, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--film", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a VAE to go on from, instead of the first phase")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--demo-minutes", type=float, default=24)
    parser.add_argument("--refine-minutes", type=float, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    def runs(view: tuple[int, int]) -> list[torch.Tensor]:
        return [decode(arguments.film, span, view) for span in spans(unseen=False)]

    unseen = [decode(arguments.film, span, DEMO) for span in spans(unseen=True)]
    if arguments.start:
        vae = AutoencoderKLWan.from_pretrained(arguments.start, torch_dtype=torch.float32)
    else:
        vae = AutoencoderKLWan(**CONFIG)
        full = Clips(runs(FULL_VIEW), arguments.seed, zooming=True)
        train(vae, full, unseen, arguments.minutes, 1.5e-3, arguments.out)
    clips = Clips(runs(DEMO_VIEW), arguments.seed, zooming=False)
    if arguments.demo_minutes:
        train(vae, clips, unseen, arguments.demo_minutes, 6e-4, arguments.out)
        set_latent_statistics(vae, clips)
        vae.to(torch.bfloat16).save_pretrained(arguments.out)
        vae.float()
    if arguments.refine_minutes:
        refine_decoder(vae, clips, unseen, arguments.refine_minutes, arguments.out)
    vae.to(torch.bfloat16).save_pretrained(arguments.out)
    vae.float()
    print(f"unseen shots: {psnr(vae, unseen, 17):.2f} dB over 17 frames, {psnr(vae, unseen, 81):.2f} dB over 81 frames")


if __name__ == "__main__":
    main()
