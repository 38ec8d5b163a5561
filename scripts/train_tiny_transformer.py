"""Trains the bundled tiny transformers with Longtake itself: full fine-tuning from random weights, in fp32.

    python scripts/train_tiny_transformer.py --film bbb.mp4 --vae build/tiny/vae --work build/tiny --steps 4000 tiny-i2v
    python scripts/train_tiny_transformer.py --film bbb.mp4 --vae build/tiny/vae --work build/tiny --steps 4000 tiny-t2v

Training clips are the windows of `shots.jsonl` except the unseen ones, as they are and mirrored; the unseen ones give
the validation loss alone. The result goes to `src/longtake/models/wan/weights`.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from longtake.config.dump import to_toml
from longtake.config.schema import (
    DataConfig,
    MemoryStrategy,
    ModelConfig,
    OutputConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from longtake.data.video import Window, read_clip, write_clip
from longtake.demo.clips import shots
from longtake.models.wan.tiny import build_tiny, write_shared_components

UNSEEN_STARTS = (36.0, 84.5, 382.0, 446.5)
WEIGHTS = Path(__file__).parents[1] / "src/longtake/models/wan/weights"
STORED = (320, 192)
FRAMES = 17
STRIDE = 16


def write_shots(film: Path, folder: Path) -> tuple[Path, Path]:
    """Each shot at twice the training size, and the JSONL files of training and unseen windows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[bool, list[dict[str, object]]] = {True: [], False: []}
    for shot in shots():
        unseen = shot["start"] in UNSEEN_STARTS
        length = min([shot["frames"], *(int((u - shot["start"]) * 16) for u in UNSEEN_STARTS if u > shot["start"])])
        frames = None
        for mirrored in (False,) if unseen else (False, True):
            path = folder / f"{shot['start']}{'-mirrored' if mirrored else ''}.mp4"
            if not path.exists():
                window = Window(shot["start"], length, 16.0)
                frames = read_clip(film.resolve(), window, STORED) if frames is None else frames
                write_clip(frames.flip(-1) if mirrored else frames, path, 16)
            for first in range(0, length - FRAMES + 1, 64 if unseen else STRIDE):
                row = {"video": path.name, "start": first / 16, "frames": FRAMES, "fps": 16}
                rows[unseen].append(row | {"caption": shot["caption"]})
    for unseen, name in ((False, "training.jsonl"), (True, "unseen.jsonl")):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows[unseen]))
    return folder / "training.jsonl", folder / "unseen.jsonl"


def write_config(name: str, work: Path, sources: tuple[Path, Path], steps: int) -> Path:
    config = RunConfig(
        model=ModelConfig(path=str((work / name).resolve()), dtype="fp32"),
        data=DataConfig(
            source=str(sources[0].resolve()),
            validation=str(sources[1].resolve()),
            cache=str((work / "cache").resolve()),
            num_frames=FRAMES,
            size=(160, 96),
        ),
        training=TrainingConfig(
            steps=steps,
            global_batch_size=8,
            micro_batch_size=8,
            precision="fp32",
            learning_rate=1.5e-3,
            warmup_steps=min(100, steps // 2),
            ema=0.995,
            sigmas="uniform",
            weight_decay=0.01,
        ),
        memory=MemoryStrategy(gradient_checkpointing="none"),
        validation=ValidationConfig(every=500),
        output=OutputConfig(run=str((work / f"run-{name}").resolve()), save_every=250),
    )
    path = work / f"{name}.toml"
    path.write_text(to_toml(config))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["tiny-t2v", "tiny-i2v"])
    parser.add_argument("--film", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    work, name = arguments.work, arguments.name
    write_shared_components(WEIGHTS, arguments.vae)
    if not (work / name).exists():
        build_tiny(name, work / name)
        shutil.rmtree(work / name / "vae")
        shutil.copytree(arguments.vae, work / name / "vae")
    config = write_config(name, work, write_shots(arguments.film, work / "shots"), arguments.steps)
    longtake = [sys.executable, "-m", "longtake"]
    subprocess.run([*longtake, "prepare", str(config)], check=True)
    run = work / f"run-{name}"
    subprocess.run([*longtake, "train", str(config), *(["--resume"] if run.exists() else [])], check=True)
    trained = WanTransformer3DModel.from_pretrained(run / "transformer")
    trained.to(torch.bfloat16).save_pretrained(WEIGHTS / name / "transformer")


if __name__ == "__main__":
    main()
