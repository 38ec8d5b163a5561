"""A run's model card: README.md in the hub's format, saying what was trained, how, and how to use it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from longtake.config.schema import LoraFormat, RunConfig
from longtake.files import write_text
from longtake.models.hub import MODELSCOPE
from longtake.models.wan.variants import WanVariant

FILE = "README.md"
MADE = "<!-- written by longtake -->"
"""By which a card is known as our own, so that another README is never replaced."""
_LICENSE = "apache-2.0"
"""Of all weights that the Wan team has published."""
_PIPELINES = {
    "t2v": "WanPipeline",
    "i2v": "WanImageToVideoPipeline",
    "flf2v": "WanImageToVideoPipeline",
    "ti2v": "WanPipeline",
}


@dataclass(frozen=True)
class Card:
    """What a card is made of; `files` are the names of what lies beside it, adapters or, if `whole`, full weights.

    They are in the format `form`. `samples` are paths of videos, relative to the card, with their prompts; `rank` is
    what an adapter was brought down to.
    """

    config: RunConfig
    variant: WanVariant
    files: tuple[str, ...]
    whole: bool
    samples: tuple[tuple[str, str], ...] = ()
    form: LoraFormat = "comfyui"
    rank: int | None = None

    @property
    def base(self) -> str:
        """The hub's id of the model that was trained; empty where there is none."""
        name = self.config.model.name
        return name if "/" in name and not name.startswith(MODELSCOPE) else self.variant.hub_id

    @property
    def components(self) -> tuple[str, ...]:
        """The transformers of the pipeline that the files are of, in their order."""
        experts = self.variant.spec.experts
        chosen = {"high": experts[:1], "low": experts[-1:]}
        return chosen.get(self.config.model.expert, experts)

    @property
    def title(self) -> str:
        """The run folder's name."""
        return Path(self.config.output.run).name

    @property
    def kind(self) -> str:
        """What the files are."""
        lora = self.config.lora
        if lora is None:
            return "fine-tuned weights"
        return f"{'DoRA' if lora.dora else 'LoRA'}{' merged into full weights' if self.whole else ''}"


def write_card(folder: Path, card: Card) -> Path:
    """Writes the card into `folder`, whatever README is there."""
    write_text(folder / FILE, written(card))
    return folder / FILE


def write_card_beside(folder: Path, card: Card, say: Callable[[str], None]) -> None:
    """Writes the card into `folder`, unless a README that is not ours is there."""
    if is_foreign(folder / FILE):
        say(f"{folder / FILE} is not one of longtake's: no model card is written")
        return
    write_card(folder, card)


def is_foreign(path: Path) -> bool:
    """Whether a README is there that Longtake has not written."""
    return path.is_file() and MADE not in path.read_text(encoding="utf-8", errors="replace")


def run_samples(run: Path) -> tuple[tuple[str, str], ...]:
    """The videos of the last step that has some, relative to the run's folder, with their prompts."""
    found = sorted((run / "samples").glob("step-*-*.json"))
    told = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in found]
    last = max((entry["step"] for _, entry in told), default=None)
    videos = ((path.with_suffix(".mp4"), entry) for path, entry in told if entry["step"] == last)
    return tuple((path.relative_to(run).as_posix(), entry["prompt"]) for path, entry in videos if path.is_file())


def written(card: Card) -> str:
    """The card's text: YAML for the hub, then Markdown."""
    from huggingface_hub import ModelCard, ModelCardData

    task = card.variant.spec.task
    widget = [{"text": prompt, "output": {"url": path}} for path, prompt in card.samples]
    data = ModelCardData(
        base_model=card.base or None,
        base_model_relation=("adapter" if not card.whole else "finetune") if card.base else None,
        license=_LICENSE,
        library_name="diffusers",
        pipeline_tag="text-to-video" if task == "t2v" else "image-to-video",
        tags=["wan", task, *(["lora"] if card.config.lora and not card.whole else []), "longtake"],
        widget=widget or None,
    )
    sections = [_head(card), _settings(card), _prompts(card), _use(card), _rights()]
    body = "\n\n".join("\n".join(section) for section in map(list, sections) if section)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{MADE}\n\n{body}\n"))


def _head(card: Card) -> Iterator[str]:
    yield f"# {card.title}"
    yield ""
    yield f"A {card.kind} for {card.base or card.variant.name}, trained with Longtake."


def _settings(card: Card) -> Iterator[str]:
    config = card.config
    data, training, lora = config.data, config.training, config.lora
    rows = {"base model": card.base or card.variant.name, "files": ", ".join(f"`{name}`" for name in card.files)}
    if lora is not None:
        ranks = [f"{rank} in blocks {first} to {last}" for first, last, rank in lora.block_ranks]
        brought = [f"brought down to {card.rank}"] if card.rank is not None else []
        rows["rank"] = ", ".join([str(lora.rank), *ranks, *brought])
        rows["alpha"] = f"{lora.alpha:g}{', rsLoRA' if lora.rslora else ''}"
        rows["targets"] = ", ".join(lora.targets)
    rows |= {
        "steps": f"{training.steps} of {training.global_batch_size} clips",
        "resolution": f"{data.size[0]}x{data.size[1]}",
        "frames": f"{data.num_frames} at {card.variant.spec.fps:g} a second",
        "learning rate": f"{training.learning_rate:g}, {training.schedule}",
        "noise levels": f"{training.sigmas}, shift {training.shift:g}",
    }
    yield "## Training"
    yield ""
    yield "| | |"
    yield "| --- | --- |"
    yield from (f"| {key} | {value} |" for key, value in rows.items())


def _prompts(card: Card) -> Iterator[str]:
    """What was sampled while training: prompts that the model has learnt to follow."""
    shown = {prompt: path for path, prompt in card.samples}
    prompts = [sample.prompt for sample in card.config.validation.samples]
    if not prompts:
        return
    yield "## Prompts"
    for prompt in dict.fromkeys(prompts):
        yield ""
        yield f"> {' '.join(prompt.split())}"
        if prompt in shown:
            yield ""
            yield f'<video controls src="{shown[prompt]}"></video>'


def _use(card: Card) -> Iterator[str]:
    config, validation = card.config, card.config.validation
    yield "## Use"
    yield ""
    yield (
        f"Sample with a shift of {config.training.shift:g}, {validation.sample_steps} steps and a guidance of"
        f" {validation.guidance_scale:g}, at {config.data.size[0]}x{config.data.size[1]} and {config.data.num_frames}"
        " frames."
    )
    yield ""
    yield from _comfyui(card)
    yield ""
    yield from _diffusers(card)


def _comfyui(card: Card) -> Iterator[str]:
    if card.whole and card.form == "diffusers":
        yield "ComfyUI: `longtake export --format comfyui --merge` writes its file of the same weights."
        return
    if card.whole:
        yield "ComfyUI: put it into `models/diffusion_models`."
        return
    where = "; each to its own expert's model" if len(card.files) > 1 else ""
    yield f"ComfyUI: put it into `models/loras` and load it with the node LoraLoaderModelOnly{where}."


def _diffusers(card: Card) -> Iterator[str]:
    if card.whole and card.form != "diffusers":
        yield "diffusers: `longtake export --format diffusers --merge` writes a transformer folder of the same weights."
        return
    pipeline = _PIPELINES[card.variant.spec.task]
    yield "```python"
    yield "import torch"
    yield f"from diffusers import {pipeline}{', WanTransformer3DModel' if card.whole else ''}"
    yield ""
    base = card.base or "path/to/the/model"
    if card.whole:
        for name, component in zip(card.files, card.components, strict=True):
            yield f'{component} = WanTransformer3DModel.from_pretrained("{name}", torch_dtype=torch.bfloat16)'
        given = "".join(f"{name}={name}, " for name in card.components)
        yield f'pipeline = {pipeline}.from_pretrained("{base}", {given}torch_dtype=torch.bfloat16)'
    else:
        yield f'pipeline = {pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16)'
        for name, component in zip(card.files, card.components, strict=True):
            low = ", load_into_transformer_2=True" if component == "transformer_2" else ""
            yield f'pipeline.load_lora_weights(".", weight_name="{name}"{low})'
    yield "```"
    if card.config.lora is not None and card.config.lora.dora and not card.whole:
        yield ""
        yield (
            "diffusers reads a DoRA in its own format alone (`longtake export --format diffusers`); ComfyUI scales its"
            " rows [wrongly](https://github.com/Comfy-Org/ComfyUI/pull/15458) and is exact with merged weights."
        )


def _rights() -> Iterator[str]:
    yield "## License"
    yield ""
    yield f"The base model's is {_LICENSE}; what the clips allow is for whoever publishes this to say."
