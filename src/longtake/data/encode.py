"""`prepare`: clips and captions to cached conditioning, one encoder in memory at a time, resumable, by many ranks."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from longtake.config.schema import RunConfig
from longtake.data.buckets import Window
from longtake.data.cache import FORMAT, Cache, Entry, Kind, Manifest, digest
from longtake.data.claims import Claims
from longtake.data.dataset import Placed, cache_settings, place, read_sources
from longtake.data.hashes import clip_key, content_hashes
from longtake.data.metadata import usable
from longtake.data.video import read_clip, read_image
from longtake.errors import CacheError, DataError, ModelError, Problem
from longtake.memory_gauge import MemoryGauge
from longtake.models.spec import ModelSpec
from longtake.models.wan import encoders
from longtake.models.wan.component_files import besides
from longtake.models.wan.conditioning import image_condition
from longtake.models.wan.weights import ModelFiles
from longtake.progress import Reporter

Tensors = dict[str, torch.Tensor]
COUNT_SECONDS = 5.0
"""Least time between two looks at what other ranks have made."""


@dataclass(frozen=True)
class Work:
    """One entry to make: `kind` and `key` name it, `make` computes it given the loaded encoder."""

    kind: Kind
    key: str
    where: str
    make: Callable[[Any], Tensors]


def component_root(files: ModelFiles, name: str) -> Path:
    """The folder of VAE and encoders; raises ModelError where the model was given without."""
    if files.root is None:
        remedy = "set model.components to a folder or hub id that has vae, text_encoder and tokenizer"
        what = f"only a transformer was given; VAE and encoders are needed{besides(files.refused)}"
        raise ModelError(Problem(what, name, remedy, code="model-without-components"))
    return files.root


def encoder_fingerprints(root: Path, spec: ModelSpec) -> dict[str, str]:
    """Identity of each encoder that the task uses: its files', and the type it computes in where that is another."""
    names: list[encoders.ComponentName] = ["vae", "text_encoder", "tokenizer"]
    names += ["image_encoder", "image_processor"] if spec.image_tokens else []
    prints: dict[str, str] = {name: encoders.component_fingerprint(root, name, spec)[:16] for name in names}
    stored, computing = encoders.text_encoder_types(root, spec)
    if computing != stored:
        prints["text_encoder"] += f" in {str(computing).removeprefix('torch.')}"
    return prints


def load_manifest(config: RunConfig, spec: ModelSpec, root: Path, say: Callable[[str], None]) -> Manifest:
    """The manifest that `prepare` wrote for this config; raises CacheError where there is none."""
    sources = read_sources(config.data, spec, say)
    settings = cache_settings(config.data, spec, config.training.seed, encoder_fingerprints(root, spec), sources)
    return Cache(Path(config.data.cache)).read_manifest(settings)


def prepare(
    config: RunConfig, spec: ModelSpec, root: Path, device: torch.device, reporter: Reporter, ranks: tuple[int, int]
) -> Manifest:
    """Encodes what the cache lacks and writes the manifest; raises DataError where too many clips cannot be used.

    `ranks` is (rank, number of ranks). Each encodes its share, then what the others have not, and returns when all is
    there: the same on every rank. `data.claims` has how. The first says what goes on, another only what it leaves out.
    Raises CacheError where entries have vanished meanwhile.
    """
    cache = Cache(Path(config.data.cache))
    cache.remove_staged()
    shown = reporter if ranks[0] == 0 else Reporter(quiet=True)
    sources = read_sources(config.data, spec, shown.line)
    prints = encoder_fingerprints(root, spec)
    settings = cache_settings(config.data, spec, config.training.seed, prints, sources)
    placed = place(sources, config.data, spec, config.training.seed, shown.line)
    claims = Claims(cache.folder, *ranks, shown.line)
    keys = _Keys(spec, prints, content_hashes({item.clip.record.path for item in placed}, claims))
    entries = [keys.entry(item) for item in placed]
    failed: dict[str, Problem] = {}
    with closing(MemoryGauge(device)) as gauge:
        share = _Share(cache, claims, gauge, shown, reporter)
        for title, load, work in _passes(placed, keys, spec, root, device):
            share.make(title, load, work)
            failed |= share.rejected(work)
    manifest = Manifest(settings, tuple(_without(entries, placed, failed)), keys.text(""))
    if missing := cache.missing(manifest):
        what, remedy = f"{missing} entries are missing", "run `longtake prepare` again"
        raise CacheError(Problem(what, str(cache.folder), remedy, code="cache-entries-missing"))
    cache.write_manifest(manifest)
    return manifest


def _without(entries: Sequence[Entry], placed: Sequence[Placed], failed: Mapping[str, Problem]) -> list[Entry]:
    """The entries of the clips of which nothing failed; raises DataError where too many are left out."""
    problems = [
        replace(failed[key], where=entry.where)
        for entry in entries
        for key in (entry.latents, entry.image, entry.text)
        if key in failed
    ]
    unusable = {problem.where for problem in problems}
    records = {item.clip.record.where: item.clip.record for item in placed}
    usable([record for where, record in records.items() if where not in unusable], problems)
    return [entry for entry in entries if entry.where not in unusable]


class _Keys:
    """Keys of the entries: the clip's content and crop, the encoder's identity, the settings that matter, no more."""

    def __init__(self, spec: ModelSpec, prints: dict[str, str], hashes: dict[Path, str]) -> None:
        self.spec = spec
        self.prints = prints
        self.hashes = hashes

    def entry(self, item: Placed) -> Entry:
        bucket, record = item.clip.bucket, item.clip.record
        return Entry(
            latents=self.latents(item),
            image=self.image(item) if self.spec.image_tokens else "",
            text=self.text(record.prompt),
            bucket=(bucket.frames, bucket.height, bucket.width),
            stages=item.stages,
            clip=clip_key(self.hashes[record.path], record),
            prompt=record.prompt,
            where=record.where,
            split=item.split,
        )

    def latents(self, item: Placed) -> str:
        task = self.spec.task if self.spec.task in ("i2v", "flf2v") else "plain"
        return digest([FORMAT, self._crop(item), task, self.prints["vae"]])

    def image(self, item: Placed) -> str:
        identity = [self.prints["image_encoder"], self.prints["image_processor"]]
        return digest([FORMAT, self._crop(item), self.spec.image_tokens, identity])

    def text(self, prompt: str) -> str:
        identity = [self.prints["text_encoder"], self.prints["tokenizer"], self.spec.text_tokens]
        return digest([FORMAT, prompt, identity])

    def _crop(self, item: Placed) -> list[Any]:
        bucket, window = item.clip.bucket, item.clip.window
        content = self.hashes[item.clip.record.path]
        return [content, round(window.start, 6), window.frames, window.fps, bucket.width, bucket.height]


def _passes(
    placed: Sequence[Placed], keys: _Keys, spec: ModelSpec, root: Path, device: torch.device
) -> Iterator[tuple[str, Callable[[], Any], list[Work]]]:
    """(title, loader of the encoder, its work) for each encoder in turn."""
    latents = {
        keys.latents(item): Work("latents", keys.latents(item), item.clip.record.where, _latents_of(item, spec))
        for item in placed
    }
    yield "video latents", lambda: encoders.load_vae(root, device, spec), [*latents.values()]
    if spec.image_tokens:
        images = {
            keys.image(item): Work("images", keys.image(item), item.clip.record.where, _image_of(item, spec))
            for item in placed
        }
        yield "images", lambda: encoders.load_image_encoder(root, device, spec), [*images.values()]
    prompts = dict.fromkeys(["", *(item.clip.record.prompt for item in placed)])
    texts = [Work("texts", keys.text(prompt), "caption", _text_of(prompt)) for prompt in prompts]
    yield "captions", lambda: encoders.load_text_encoder(root, device, spec), texts


def _latents_of(item: Placed, spec: ModelSpec) -> Callable[[Any], Tensors]:
    def make(vae: Any) -> Tensors:
        clip, bucket = item.clip, item.clip.bucket
        path, size = clip.record.path, (bucket.width, bucket.height)
        frames = read_image(path, size)[None] if clip.info.is_image else read_clip(path, clip.window, size)
        video = encoders.normalise_pixels(frames).permute(1, 0, 2, 3)[None]
        tensors = {"latents": encoders.encode_video(vae, video)[0].float().cpu()}
        if spec.task in ("i2v", "flf2v"):
            last = frames[-1] if spec.task == "flf2v" else None
            tensors["condition"] = image_condition(vae, frames[0], last, bucket.frames).float().cpu()
        return tensors

    return make


def _image_of(item: Placed, spec: ModelSpec) -> Callable[[Any], Tensors]:
    def make(encoder: Any) -> Tensors:
        clip, bucket = item.clip, item.clip.bucket
        starts = [clip.window.start]
        if spec.task == "flf2v":
            starts.append(clip.window.start + (clip.window.frames - 1) / clip.window.fps)
        size = (bucket.width, bucket.height)
        pictures = [read_clip(clip.record.path, Window(start, 1, clip.window.fps), size)[0] for start in starts]
        tokens = [encoders.encode_image(encoder, picture).float().cpu() for picture in pictures]
        return {"image_embeds": torch.cat(tokens)}

    return make


def _text_of(prompt: str) -> Callable[[Any], Tensors]:
    return lambda encoder: {"prompt_embeds": encoders.encode_prompt(encoder, prompt).cpu()}


@dataclass(frozen=True)
class _Share:
    """What one rank does of each encoder's work; what it leaves out is said by `reporter`, the rest by `shown`."""

    cache: Cache
    claims: Claims
    gauge: MemoryGauge
    shown: Reporter
    reporter: Reporter

    def make(self, title: str, load: Callable[[], Any], work: Sequence[Work]) -> None:
        """Ends when all of `work` is made or rejected; the encoder is loaded where there is something to do."""
        for item in work if self.claims.world > 1 else ():
            if (problem := self.cache.rejection(item.kind, item.key)) is not None:
                self.shown.line(f"left out: {replace(problem, where=item.where)}")
        with closing(self.claims.turns(work, lambda item: f"{item.kind}/{item.key}", self._is_done)) as turns:
            first = next(turns, None)
            if first is None:
                self.shown.line(f"{title}: all {len(work) - len(self.rejected(work))} cached")
                return
            with self.gauge.stage(title, self.shown.line):
                self._encode(title, load(), work, chain([first], turns))
                encoders.release()

    def rejected(self, work: Sequence[Work]) -> dict[str, Problem]:
        """Why, by key, for what could not be made by any rank."""
        found = {item.key: self.cache.rejection(item.kind, item.key) for item in work}
        return {key: problem for key, problem in found.items() if problem is not None}

    def _encode(self, title: str, encoder: Any, work: Sequence[Work], turns: Iterable[Work]) -> None:
        """Writes the entries of `turns`, which are of `work`, or why they cannot be made."""
        unit = "captions" if title == "captions" else "clips"
        done = _Done(lambda: sum(map(self._is_done, work)), self.claims.world)
        with self.shown.bar(title, len(work), unit, done.count) as advance:
            for item in turns:
                try:
                    self.cache.write(item.kind, item.key, item.make(encoder))
                except (DataError, CacheError) as error:
                    self._reject(item, replace(error.problems[0], where=item.where))
                advance(done.after_one(), "")
            if done.count < len(work):
                advance(len(work), "")

    def _reject(self, item: Work, problem: Problem) -> None:
        self.cache.reject(item.kind, item.key, problem)
        self.reporter.line(f"{f'rank {self.claims.rank}: ' if self.claims.rank else ''}left out: {problem}")

    def _is_done(self, item: Work) -> bool:
        """Whether nothing is to be done: one rank alone tries again what was rejected before."""
        if self.cache.has(item.kind, item.key):
            return True
        return self.claims.world > 1 and self.cache.rejection(item.kind, item.key) is not None


class _Done:
    """How many entries are done; what other ranks do is looked up when that takes little of the time."""

    def __init__(self, look: Callable[[], int], world: int) -> None:
        self.look = look
        self.count = look()
        self.due = time.monotonic() + COUNT_SECONDS if world > 1 else float("inf")

    def after_one(self) -> int:
        """The count when this rank has done one more."""
        self.count += 1
        started = time.monotonic()
        if started >= self.due:
            self.count = self.look()
            self.due = time.monotonic() + max(COUNT_SECONDS, 20 * (time.monotonic() - started))
        return self.count
