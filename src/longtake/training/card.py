"""A run's model card: README.md in the hub's format, saying what was trained, how, and how to use it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
_DORA_IN_COMFYUI = "[wrongly](https://github.com/Comfy-Org/ComfyUI/pull/15458)"


@dataclass(frozen=True)
class Card:
    """What a card is made of; `files` are the names of what lies beside it, adapters or, if `whole`, full weights.

    They are in the format `form`. `samples` are paths of videos, relative to the card, with their prompts; `rank` is
    what an adapter was brought down to. What `write_card` sees in the folder: `others`, the same adapters in other
    formats, with these; `sharded`, whether full weights are folders of several files.
    """

    config: RunConfig
    variant: WanVariant
    files: tuple[str, ...]
    whole: bool
    samples: tuple[tuple[str, str], ...] = ()
    form: LoraFormat = "comfyui"
    rank: int | None = None
    others: tuple[tuple[str, LoraFormat], ...] = ()
    sharded: bool = False

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
        """The run folder's name, and whether that is of a DoRA."""
        return f"{Path(self.config.output.run).name}{' (DoRA)' if self.is_dora else ''}"

    @property
    def is_dora(self) -> bool:
        """Whether lengths of rows were trained too."""
        return self.config.lora is not None and self.config.lora.dora

    @property
    def of_one_expert(self) -> bool:
        """Whether the run trained one of the model's two transformers."""
        return len(self.components) < len(self.variant.spec.experts)

    @property
    def kind(self) -> str:
        """What the files are."""
        lora = self.config.lora
        if lora is None:
            return "fine-tuned weights"
        return f"{'DoRA' if lora.dora else 'LoRA'}{' merged into full weights' if self.whole else ''}"


def write_card(folder: Path, card: Card) -> Path:
    """Writes the card into `folder`, whatever README is there."""
    write_text(folder / FILE, written(_seen(folder, card)))
    return folder / FILE


def write_card_beside(folder: Path, card: Card, say: Callable[[str], None]) -> None:
    """Writes the card into `folder`, unless a README that is not ours is there."""
    if is_foreign(folder / FILE):
        say(f"{folder / FILE} is not one of longtake's: no model card is written")
        return
    write_card(folder, card)


def _seen(folder: Path, card: Card) -> Card:
    """The card with what only the folder tells."""
    if card.whole:
        return replace(card, sharded=any((folder / name).is_dir() for name in card.files))
    forms: tuple[LoraFormat, ...] = ("diffusers", "kohya")
    named = [(f"{Path(name).stem}-{form}.safetensors", form) for form in forms for name in card.files]
    return replace(card, others=tuple((name, form) for name, form in named if (folder / name).is_file()))


def is_foreign(path: Path) -> bool:
    """Whether a README is there that Longtake has not written."""
    return path.is_file() and MADE not in path.read_text(encoding="utf-8", errors="replace")


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
    names = [*card.files, *(name for name, _ in card.others)]
    rows = {"base model": card.base or card.variant.name, "files": ", ".join(f"`{name}`" for name in names)}
    if lora is not None:
        rows["adapter"] = "DoRA" if lora.dora else "LoRA"
        ranks = [f"{rank} in {_blocks(first, last)}" for first, last, rank in lora.block_ranks]
        brought = [f"brought down to {card.rank}"] if card.rank is not None else []
        rows["rank"] = ", ".join([str(lora.rank), *ranks, *brought])
        rows["alpha"] = f"{lora.alpha:g}{', rsLoRA' if lora.rslora else ''}"
        rows["targets"] = ", ".join(lora.targets)
        if training.lora_plus_ratio != 1:
            rows["lora_plus_ratio"] = f"{training.lora_plus_ratio:g}"
    rows |= {
        "steps": f"{_counted(training.steps, 'step')}, {_counted(training.global_batch_size, 'clip')} each",
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


def _blocks(first: int, last: int) -> str:
    return f"block {first}" if first == last else f"blocks {first} to {last}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


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
    if card.of_one_expert:
        noise = card.config.model.expert
        yield ""
        yield (
            f"The model has two transformers; this is for the {noise}-noise one alone (`{card.components[0]}`,"
            f" ComfyUI's {noise}-noise model)."
        )
    yield ""
    yield _comfyui(card)
    yield ""
    yield from _diffusers(card)


def _comfyui(card: Card) -> str:
    if card.whole and card.form == "diffusers":
        return "ComfyUI: `longtake export --format comfyui --merge` writes its file of the same weights."
    if card.sharded:
        return (
            "ComfyUI loads one file, not shards: `longtake export --format comfyui --merge` without"
            " `--max-shard-size` writes it."
        )
    if card.is_dora and not card.whole:
        return (
            f"ComfyUI scales a DoRA's rows {_DORA_IN_COMFYUI}, so that this adapter is not for it: `longtake export"
            " --format comfyui --merge` writes full weights with it, which are exact there."
        )
    if not card.whole and card.form == "diffusers":
        return "ComfyUI: `longtake export --format comfyui` writes its file of the same adapter."
    them = "it" if len(card.files) == 1 else "them"
    if card.whole:
        return f"ComfyUI: put {them} into `models/diffusion_models`{_as_expert(card, 'load')}."
    to = _as_expert(card, "attach")
    return f"ComfyUI: put {them} into `models/loras` and load {them} with the node LoraLoaderModelOnly{to}."


def _as_expert(card: Card, verb: str) -> str:
    """Which of ComfyUI's two models each file is for or is; empty where the model has one transformer."""
    experts = card.variant.spec.experts
    if len(experts) == 1:
        return ""
    join = "to" if verb == "attach" else "as"
    noises = ["low" if component == experts[-1] else "high" for component in card.components]
    if len(noises) == 1:
        return f"; {verb} it {join} the {noises[0]}-noise model"
    each = (f"`{name}` {join} the {noise}-noise model" for name, noise in zip(card.files, noises, strict=True))
    return f"; {verb} {', '.join(each)}"


def _diffusers(card: Card) -> Iterator[str]:
    if card.whole and card.form != "diffusers":
        yield "diffusers: `longtake export --format diffusers --merge` writes a transformer folder of the same weights."
        return
    names = card.files if card.whole else _loadable(card)
    if not names:
        kind = "a DoRA in its own format alone" if card.is_dora else "only some of kohya's files"
        yield (
            f"diffusers reads {kind}: `longtake export --format diffusers` writes its file of the same adapter, with"
            " `--merge` full weights."
        )
        return
    pipeline = _PIPELINES[card.variant.spec.task]
    yield "```python"
    yield "import torch"
    yield f"from diffusers import {pipeline}{', WanTransformer3DModel' if card.whole else ''}"
    yield ""
    base = card.base or "path/to/the/model"
    if card.whole:
        for name, component in zip(names, card.components, strict=True):
            yield f'{component} = WanTransformer3DModel.from_pretrained("{name}", torch_dtype=torch.bfloat16)'
        given = "".join(f"{name}={name}, " for name in card.components)
        yield f'pipeline = {pipeline}.from_pretrained("{base}", {given}torch_dtype=torch.bfloat16)'
    else:
        yield f'pipeline = {pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16)'
        for name, component in zip(names, card.components, strict=True):
            low = ", load_into_transformer_2=True" if component == "transformer_2" else ""
            yield f'pipeline.load_lora_weights(".", weight_name="{name}"{low})'
    yield "```"


def _loadable(card: Card) -> tuple[str, ...]:
    """The adapters that diffusers loads: its own, else plain LoRAs; kohya's where no layer of a block is left out."""
    lora = card.config.lora
    read = card.form == "comfyui" or (lora is not None and {"attention", "ffn"} <= {*lora.targets})
    if card.form == "diffusers" or (read and not card.is_dora):
        return card.files
    own = tuple(name for name, form in card.others if form == "diffusers")
    return own if len(own) == len(card.files) else ()


def _rights() -> Iterator[str]:
    yield "## License"
    yield ""
    yield f"The base model's is {_LICENSE}; what the clips allow is for whoever publishes this to say."
