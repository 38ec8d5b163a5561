"""A config written as TOML is the same config when it is read again."""

import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.config.dump import to_toml
from longtake.config.load import absolute, load_config
from longtake.config.schema import RunConfig

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
FILLED = TEXTS.filter(bool)
PATHS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0~"), min_size=1, max_size=20)
WHOLE = st.integers(0, 2**40)
POSITIVE = st.integers(1, 2**40)
FRACTIONS = st.floats(0, 1)
ABOVE_ZERO = st.floats(0, 1e300, exclude_min=True)
MEMORY: dict[str, st.SearchStrategy[Any]] = {
    "budget": TEXTS,
    "gradient_checkpointing": st.sampled_from(["none", "block", "block_keep_attention"]),
    "activation_offload": st.sampled_from(["none", "host", "disk"]),
    "activation_offload_fraction": FRACTIONS,
    "block_swap": WHOLE,
    "optimizer_offload": st.booleans(),
}
SECTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "model": {"name": FILLED, "path": st.just("") | PATHS, "components": st.just("") | PATHS},
    "data": {
        "source": PATHS,
        "cache": PATHS,
        "validation": FRACTIONS | PATHS,
        "size": st.tuples(POSITIVE, POSITIVE),
        "frames_schedule": st.lists(st.tuples(WHOLE, POSITIVE), max_size=3),
    },
    "lora": {
        "rank": POSITIVE,
        "alpha": ABOVE_ZERO,
        "targets": st.lists(FILLED, min_size=1, max_size=3),
        "block_ranks": st.lists(st.tuples(WHOLE, WHOLE, POSITIVE), max_size=3),
        "dora": st.booleans(),
        "start_from": st.lists(PATHS, max_size=2),
    },
    "training": {"steps": POSITIVE, "learning_rate": ABOVE_ZERO, "weight_decay": st.floats(0, 1e9), "seed": WHOLE},
    "memory": MEMORY | {"fallbacks": st.lists(st.fixed_dictionaries({}, optional=MEMORY), max_size=2)},
    "validation": {
        "samples": st.lists(
            st.fixed_dictionaries({"prompt": TEXTS}, optional={"image": PATHS, "last_image": PATHS}), max_size=2
        ),
        "guidance_scale": st.floats(1, 1e9),
    },
    "output": {"run": PATHS, "formats": st.lists(st.sampled_from(["comfyui", "diffusers", "kohya"]), max_size=3)},
}
TABLES = st.fixed_dictionaries(
    {name: st.fixed_dictionaries(SECTIONS[name]) for name in ("model", "data", "output")},
    optional={
        name: st.fixed_dictionaries({}, optional=SECTIONS[name])
        for name in ("lora", "training", "memory", "validation")
    },
)
SMALLEST = {"model": {"name": "tiny-t2v"}, "data": {"source": "clips"}, "output": {"run": "run"}}


@given(table=TABLES)
def test_every_config_comes_back_from_its_toml(table: dict[str, Any]) -> None:
    config = RunConfig.model_validate(table)
    for comments in (False, True):
        assert RunConfig.model_validate(tomllib.loads(to_toml(config, comments))) == config


@given(table=TABLES)
def test_what_was_loaded_from_a_file_is_loaded_again_from_what_is_written_elsewhere(table: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "a.toml"), Path(folder, "sub", "b.toml")
        second.parent.mkdir()
        first.write_text(to_toml(RunConfig.model_validate(table)), encoding="utf-8")
        config = load_config(first)
        second.write_text(to_toml(config), encoding="utf-8")
        assert load_config(second) == config == absolute(config, second.parent)


def test_comments_are_the_manual_of_each_key() -> None:
    lines = to_toml(RunConfig.model_validate(SMALLEST), comments=True).splitlines()
    place = lines.index("clip_norm = 1.0")
    assert lines[place - 1] == "# Greatest norm of the whole gradient; 0 switches clipping off."
    assert all(len(line) <= 110 for line in lines)
    plain = to_toml(RunConfig.model_validate(SMALLEST))
    assert "#" not in plain
    kept = [line for line in lines if not line.startswith("#")]
    assert set(plain.splitlines()) - set(kept) == {line[2:] for line in lines if line[2:] in left_open()}


def test_keys_of_memory_with_their_defaults_are_comments_and_so_left_to_the_planner() -> None:
    config = RunConfig.model_validate({**SMALLEST, "memory": {"slices": 4}})
    text = to_toml(config, comments=True)
    assert "\nslices = 4\n" in text
    assert "\n# block_swap = 0\n" in text
    assert '\nbudget = "auto"\n' in text
    loaded = tomllib.loads(text)
    assert loaded["memory"] == {"budget": "auto", "slices": 4}


def left_open() -> set[str]:
    """The lines of [memory] and [parallel] with their defaults, but the budget's."""
    text = to_toml(RunConfig.model_validate(SMALLEST))
    sections = [text.partition(f"[{name}]\n")[2].partition("\n\n")[0] for name in ("memory", "parallel")]
    return {line for section in sections for line in section.splitlines() if not line.startswith("budget")}


@pytest.mark.parametrize("section", RunConfig.model_fields)
def test_every_key_has_a_manual(section: str) -> None:
    table = {**SMALLEST, "lora": {}, "validation": {"samples": [{"prompt": "x"}]}}
    fields = type(getattr(RunConfig.model_validate(table), section)).model_fields
    assert [key for key, field in fields.items() if not field.description] == []


def test_a_section_that_is_absent_is_not_written() -> None:
    config = RunConfig.model_validate(SMALLEST)
    assert "[lora]" not in to_toml(config)
    assert "[lora]" in to_toml(RunConfig.model_validate({**SMALLEST, "lora": {}}))
