"""Every kind of file that a command reads, in one folder, and what reads it: to put something else in its place."""

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

import clips
from command_line import Outcome, run, small_run, succeed, write_config
from longtake.config.schema import ModelConfig
from longtake.data.cache import Cache
from longtake.files import MANIFEST
from longtake.lora import read_adapter
from longtake.models.wan import tiny
from longtake.models.wan.component_files import locate_component
from longtake.models.wan.encoders import load_image_encoder, load_text_encoder, load_vae
from longtake.models.wan.tokenizer_files import find_tokenizer, load_tokenizer
from longtake.models.wan.weights import load_transformer, locate
from longtake.training.checkpoint import load_newest
from releases import CLIP, T5, VAES, write_comfyui, write_release
from runs import CPU

STEP = "run/checkpoints/step-00000001"
CHECKPOINT = ("trained.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json")
WEIGHTS = "diffusion_pytorch_model.safetensors"
ENCODER = "comfyui/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
ENDINGS = ("safetensors", "pth", "pt", "bin", "ckpt", "sft")

DOCTOR = "doctor {folder}/t2v.toml --no-plan --set "
EXPORT = "export --run {folder}/run --format kohya --out {folder}/out.safetensors"
SAMPLE = "sample --prompt x --out {folder}/out.mp4 --model {folder}/t2v --size 32x32 --num-frames 5 --lora {path}"


@dataclass(frozen=True)
class Slot:
    """`path` is replaced, and what is `gone` is not there; `read` is a command, or what it would call.

    `{path}` and `{folder}` stand in a command for the file and all of the folder. `listed`: the manifest beside the
    file is mended, as whoever replaces a file on purpose would. `embedded`: the content becomes a tensor of it.
    """

    path: str
    read: str | Callable[[Path], object]
    gone: tuple[str, ...] = ()
    listed: bool = False
    embedded: str = ""


def transformer_slots() -> dict[str, Slot]:
    """Transformers, whatever they are called."""
    found = {f"inspect .{end}": Slot(f"model.{end}", "inspect {path}") for end in ENDINGS}
    found |= {f"model.path .{end}": Slot(f"model.{end}", DOCTOR + "model.path={path}") for end in ENDINGS}
    high = "model.path={folder}/a14b/transformer --set model.low_noise_path={path}"
    own, pickled = f"i2v/transformer/{WEIGHTS}", "i2v/transformer/diffusion_pytorch_model.bin"
    inspect = "inspect {folder}/i2v"
    return found | {
        "low_noise_path": Slot("low.safetensors", DOCTOR + high),
        "model index": Slot("i2v/model_index.json", inspect),
        "transformer": Slot(own, inspect),
        "transformer, pickled": Slot(pickled, inspect, gone=(own,)),
        "transformer, shards": Slot(own + ".index.json", inspect),
        "transformer, pickled shards": Slot(pickled + ".index.json", inspect, gone=(own,)),
        "transformer's config": Slot("i2v/transformer/config.json", load_i2v),
        "release's transformer": Slot(f"release/{WEIGHTS}", "inspect {folder}/release"),
    }


def component_slots() -> dict[str, Slot]:
    """VAE and encoders in each layout; a path begins with the name of the model's folder and of its config."""
    vae, text, image = f"i2v/vae/{WEIGHTS}", "i2v/text_encoder/model.safetensors", "i2v/image_encoder/model.safetensors"
    tokenizer = tuple(f"release/google/umt5-xxl/{name}" for name in ("tokenizer.json", "tokenizer_config.json"))
    return {
        "vae": Slot(vae, load_vae_around),
        "vae, pickled": Slot("i2v/vae/diffusion_pytorch_model.bin", load_vae_around, gone=(vae,)),
        "vae's config": Slot("i2v/vae/config.json", load_vae_around),
        "text encoder": Slot(text, load_texts_around),
        "text encoder, pickled": Slot("i2v/text_encoder/pytorch_model.bin", load_texts_around, gone=(text,)),
        "text encoder's config": Slot("i2v/text_encoder/config.json", load_texts_around),
        "image encoder": Slot(image, load_images_around),
        "image encoder, pickled": Slot("i2v/image_encoder/pytorch_model.bin", load_images_around, gone=(image,)),
        "image encoder's config": Slot("i2v/image_encoder/config.json", load_images_around),
        "image processor": Slot("i2v/image_processor/preprocessor_config.json", load_images_around),
        "tokenizer": Slot("i2v/tokenizer/tokenizer.json", load_tokenizer_around),
        "tokenizer's config": Slot("i2v/tokenizer/tokenizer_config.json", load_tokenizer_around),
        "release's vae": Slot(f"release/{VAES['tiny-i2v']}", load_vae_around),
        "release's text encoder": Slot(f"release/{T5}", load_texts_around),
        "release's image encoder": Slot(f"release/{CLIP}", load_images_around),
        "release's tokenizer": Slot(tokenizer[0], load_tokenizer_around, gone=tokenizer[1:]),
        "release's spiece.model": Slot("release/google/umt5-xxl/spiece.model", load_tokenizer_around, gone=tokenizer),
        "comfyui's vae": Slot("comfyui/vae/wan_2.1_vae.safetensors", load_vae_around),
        "comfyui's image encoder": Slot("comfyui/clip_vision/clip_vision_h.safetensors", load_images_around),
        "comfyui's text encoder": Slot(ENCODER, load_texts_around),
        "comfyui's embedded tokenizer": Slot(ENCODER, load_tokenizer_around, embedded="spiece_model"),
    }


def run_slots() -> dict[str, Slot]:
    """LoRA files, runs and caches."""
    found = {f"--lora .{end}": Slot(f"lora.{end}", SAMPLE) for end in ("safetensors", "pt")}
    adapter = ("run/adapter.safetensors",)
    for name in CHECKPOINT:
        found[f"checkpoint's {name}"] = Slot(f"{STEP}/{name}", EXPORT, adapter)
        found[f"checkpoint's {name}, listed"] = Slot(f"{STEP}/{name}", load_saved, listed=True)
    return found | {
        "lora.start_from": Slot("start.safetensors", read_adapter),
        "checkpoint's manifest": Slot(f"{STEP}/{MANIFEST}", EXPORT, adapter),
        "run's adapter": Slot(adapter[0], EXPORT),
        "run's config": Slot("run/config.toml", EXPORT),
        "cached latents": Slot("cache/i2v/latents/*.safetensors", read_cached),
        "cached images": Slot("cache/i2v/images/*.safetensors", read_cached),
        "cached captions": Slot("cache/i2v/texts/*.safetensors", read_cached),
        "cache's manifest": Slot("cache/t2v/manifests/*.json", "train {folder}/t2v.toml --set output.run={path}-run"),
        "config": Slot("other.toml", "doctor {path} --no-plan"),
        "source .csv": Slot("data/clips.csv", DOCTOR + "data.source={path}"),
        "source .json": Slot("data/clips.json", DOCTOR + "data.source={path}"),
        "source .jsonl": Slot("data/clips.jsonl", DOCTOR + "data.source={path}"),
        "--image": Slot("first.png", SAMPLE.replace("t2v", "i2v").replace("--lora", "--image")),
    }


def slow_slots() -> dict[str, Slot]:
    """What `prepare` and `train` read when they have done much else: the commands take longer."""
    prepared = component_slots()
    del prepared["release's vae"]  # without it the folder is taken for a transformer alone
    found = {
        f"prepare, {name}": replace(slot, read=f"prepare {{folder}}/{Path(slot.path).parts[0]}.toml")
        for name, slot in prepared.items()
    }
    begin, resume = "train {folder}/t2v.toml --set output.run={path}-run", "train {folder}/t2v.toml --resume"
    for name in CHECKPOINT:
        found[f"--resume, {name}"] = Slot(f"{STEP}/{name}", resume, listed=True)
    return found | {
        "lora.start_from, train": Slot("start.safetensors", begin + """ --set 'lora.start_from=["{path}"]'"""),
        "cached latents, train": Slot("cache/t2v/latents/*.safetensors", begin),
        "cached captions, train": Slot("cache/t2v/texts/*.safetensors", begin),
    }


@dataclass(frozen=True)
class Place:
    """The folder with all of these files, sound."""

    folder: Path

    @contextmanager
    def holding(self, slot: Slot, content: bytes) -> Iterator[Path]:
        """Inside the context `content` is in the slot."""
        path = next(self.folder.glob(slot.path)) if "*" in slot.path else self.folder / slot.path
        with _without([path, *(self.folder / name for name in slot.gone)], self.folder / "aside"):
            path.write_bytes(self._embedded(slot.embedded, content) if slot.embedded else content)
            with _listed(path) if slot.listed else nullcontext():
                yield path

    def run(self, command: str, path: Path) -> Outcome:
        """A slot's command."""
        return run(*(word.format(folder=self.folder, path=path) for word in shlex.split(command)))

    def _embedded(self, name: str, content: bytes) -> bytes:
        tensors = load_file(self.folder / "aside" / "0")
        return safetensors.torch.save(tensors | {name: torch.frombuffer(bytearray(content), dtype=torch.uint8)})


def every_file(folder: Path, tiny_root: Callable[[str], Path]) -> Place:
    """Makes the folder: models, prepared caches, and a run of one step."""
    (folder / "data").mkdir()
    (folder / "aside").mkdir()
    clips.write(folder / "data" / "a.mp4", clips.levels(8), fps=16)
    (folder / "data" / "a.txt").write_text("grey")
    for name, model in (("i2v", "tiny-i2v"), ("t2v", "tiny-t2v"), ("a14b", "tiny-i2v-a14b")):
        shutil.copytree(tiny_root(model), folder / name)
    write_release(folder / "release", folder / "i2v")
    for name in (VAES["tiny-i2v"], T5, CLIP):  # under these names too, and faster to read
        save_file(torch.load(folder / "release" / name, weights_only=True), folder / "release" / name)
    transformer = write_comfyui(folder / "comfyui", folder / "i2v")
    for name, path in (("i2v", ""), ("t2v", ""), ("release", ""), ("comfyui", str(transformer))):
        table = small_run(Path(path or folder / name), folder / "data", folder)
        table["data"]["cache"] = str(folder / "cache" / name)
        table["training"] |= {"steps": 1, "ema": 0.5}
        succeed("prepare", write_config(folder / f"{name}.toml", table))
    succeed("train", folder / "t2v.toml")
    return Place(folder)


def load_i2v(path: Path) -> object:
    """What a run does of the transformer in the folder of `path`."""
    files = locate(ModelConfig(path=str(path.parents[1])), tiny.bundled, print)
    return load_transformer(files, "transformer", torch.float32, CPU)


def load_vae_around(path: Path) -> object:
    """What `prepare` does of the VAE of the model that `path` is a file of; the others likewise."""
    return load_vae(_model_of(path), CPU)


def load_texts_around(path: Path) -> object:
    return load_text_encoder(_model_of(path), CPU)


def load_images_around(path: Path) -> object:
    return load_image_encoder(_model_of(path), CPU)


def load_tokenizer_around(path: Path) -> object:
    return load_tokenizer(find_tokenizer(_model_of(path), locate_component(_model_of(path), "text_encoder")))


def load_saved(path: Path) -> object:
    """What a resumed run does of the newest checkpoint, of which `path` is a file."""
    checkpoint = load_newest(path.parents[2], print)
    assert checkpoint is not None
    group: Any = path.stem
    return checkpoint.tensors(group)


def read_cached(path: Path) -> object:
    """What training does of a cached entry."""
    kind: Any = path.parent.name
    return Cache(path.parents[1]).read(kind, path.stem)


def _model_of(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name in ("i2v", "release", "comfyui"))


@contextmanager
def _without(paths: Sequence[Path], aside: Path) -> Iterator[None]:
    """Inside the context none of them is there; what is then there of their names is removed."""
    moved = {path: aside / str(index) for index, path in enumerate(paths) if path.exists()}
    for path, place in moved.items():
        path.rename(place)
    try:
        yield
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
        for path, place in moved.items():
            place.rename(path)


@contextmanager
def _listed(path: Path) -> Iterator[None]:
    """Inside the context the manifest beside the file says of it what is so."""
    manifest = path.parent / MANIFEST
    before = manifest.read_bytes()
    content = path.read_bytes()
    told = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(json.loads(before) | {path.name: told}))
    try:
        yield
    finally:
        manifest.write_bytes(before)
