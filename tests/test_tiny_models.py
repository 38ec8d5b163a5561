"""What the bundled tiny models can do on film that they were not trained on."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import films
from longtake.config.schema import (
    DataConfig,
    LoraConfig,
    MemoryStrategy,
    ModelConfig,
    OutputConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from longtake.data.encode import prepare
from longtake.data.video import Window, read_clip
from longtake.demo.clips import shots
from longtake.demo.demo import SIZE
from longtake.demo.quality import frame_psnr, nearest, reconstruct, unseen_shots
from longtake.lora import attach_adapter, read_adapter
from longtake.models.wan import encoders, tiny
from longtake.models.wan.variants import variant
from longtake.models.wan.weights import load_transformer, locate
from longtake.progress import Reporter
from longtake.sampling import SampleRequest, sample
from longtake.training.metrics import FILE, read_metrics
from longtake.training.outputs import ADAPTER
from longtake.training.run import train

CPU = torch.device("cpu")
FRAMES = 17
SPEC = variant("tiny-i2v").spec


def sampled(image: torch.Tensor, prompt: str, adapter: Path | None = None) -> torch.Tensor:
    """A video of the bundled tiny-i2v from a first frame, uint8 [frames, 3, height, width]."""
    files = locate(ModelConfig(name="tiny-i2v", dtype="fp32"), tiny.bundled, lambda _text: None)
    transformer = load_transformer(files, "transformer", torch.float32, CPU)
    if adapter is not None:
        attach_adapter(transformer, read_adapter(adapter))
    request = SampleRequest(prompt, image, None, SIZE, FRAMES, 20, 1.0, 0, 3.0)
    return sample(tiny.bundled("tiny-i2v"), SPEC, {"transformer": transformer}, request, CPU)


@pytest.mark.long
def test_the_bundled_vae_reconstructs_unseen_shots_at_22_db() -> None:
    """The first two seconds of each shot; the script in benchmarks measures the whole of them."""
    vae = encoders.load_vae(tiny.bundled("tiny-i2v"), CPU)
    shots = unseen_shots(films.big_buck_bunny(), 33).values()
    found = [frame_psnr(reconstruct(vae, shot), shot) for shot in shots]
    assert sum(found) / len(found) >= 22, found


@pytest.mark.long
def test_a_video_from_an_unseen_first_frame_is_nearest_to_its_own_shot() -> None:
    unseen = unseen_shots(films.big_buck_bunny(), FRAMES)
    captions = {shot["start"]: shot["caption"] for shot in shots()}
    film = films.big_buck_bunny()
    others = {
        shot["start"]: read_clip(film, Window(shot["start"], FRAMES, 16.0), SIZE)
        for shot in shots()
        if shot["start"] not in unseen
    }
    for start, shot in unseen.items():
        video = sampled(shot[0], captions[start])
        assert nearest(video, unseen | others, frames=5) == start
        assert nearest(video, unseen | others, frames=FRAMES) == start


@dataclass(frozen=True)
class Learnt:
    """A LoRA of one real clip, and what it was trained on."""

    clip: torch.Tensor
    prompt: str
    adapter: Path
    losses: list[float]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    """A LoRA trained on one second of a film that no bundled weight has seen."""
    folder = tmp_path_factory.mktemp("bikes")
    film = films.bikes()
    (folder / "bikes.mp4").write_bytes(film.read_bytes())
    row = {"video": "bikes.mp4", "start": 0.0, "frames": FRAMES, "fps": 16, "caption": "Cyclists ride along a street."}
    (folder / "clips.jsonl").write_text(json.dumps(row) + "\n")
    source = str(folder / "clips.jsonl")
    config = RunConfig(
        model=ModelConfig(name="tiny-i2v", dtype="fp32"),
        data=DataConfig(source=source, validation=source, cache=str(folder / "cache"), num_frames=FRAMES, size=SIZE),
        lora=LoraConfig(rank=32, alpha=32.0),
        training=TrainingConfig(
            steps=150,
            global_batch_size=4,
            micro_batch_size=4,
            precision="fp32",
            learning_rate=4e-3,
            warmup_steps=10,
            sigmas="uniform",
        ),
        memory=MemoryStrategy(gradient_checkpointing="none"),
        validation=ValidationConfig(every=150),
        output=OutputConfig(run=str(folder / "run")),
    )
    prepare(config, SPEC, tiny.bundled("tiny-i2v"), CPU, Reporter(quiet=True), (0, 1))
    run = train(config, resume=False, reporter=Reporter(quiet=True))
    losses = [line["validation_loss"] for line in read_metrics(run / FILE) if "validation_loss" in line]
    clip = read_clip(folder / "bikes.mp4", Window(0.0, FRAMES, 16.0), SIZE)
    return Learnt(clip, str(row["caption"]), run / ADAPTER, losses)


@pytest.mark.long
def test_a_lora_of_one_new_clip_lowers_its_validation_loss_by_30_percent(learnt: Learnt) -> None:
    assert learnt.losses[-1] <= 0.7 * learnt.losses[0], learnt.losses


@pytest.mark.long
def test_the_loras_video_is_nearer_to_its_clip_than_the_base_models(learnt: Learnt) -> None:
    image = learnt.clip[0]
    base, adapted = sampled(image, learnt.prompt), sampled(image, learnt.prompt, learnt.adapter)
    assert frame_psnr(adapted, learnt.clip) > frame_psnr(base, learnt.clip) + 0.3


@pytest.mark.long
def test_a_wrong_conditioning_image_makes_the_loras_video_worse(learnt: Learnt) -> None:
    wrong = unseen_shots(films.big_buck_bunny(), 1)[382.0][0]
    right = frame_psnr(sampled(learnt.clip[0], learnt.prompt, learnt.adapter), learnt.clip)
    assert frame_psnr(sampled(wrong, learnt.prompt, learnt.adapter), learnt.clip) < right - 1
