"""What the command line sets: every flag in both spellings, and `--set`, beat the file and are printed."""

import re
from ast import literal_eval
from pathlib import Path
from typing import Any

import pytest

from command_line import run
from longtake.config.flags import Flags, overrides
from longtake.config.load import Override, load_config, parse_set
from longtake.config.schema import RunConfig
from longtake.errors import ConfigError

TOML = """
[model]
name = "tiny-t2v"
[data]
source = "clips"
size = [128, 64]
[lora]
rank = 32
[training]
micro_batch_size = 2
global_batch_size = 2
[memory]
gradient_checkpointing = "none"
[output]
run = "run"
"""

FLAGS: list[tuple[list[str], dict[str, Any]]] = [
    (["--num-frames", "49"], {"data.num_frames": 49}),
    (["--height", "96"], {"data.size": (128, 96)}),
    (["--width", "96"], {"data.size": (96, 64)}),
    (["--use-gradient-checkpointing"], {"memory.gradient_checkpointing": "block"}),
    (
        ["--use-gradient-checkpointing-offload"],
        {"memory.gradient_checkpointing": "block", "memory.activation_offload": "host"},
    ),
    (["--training-strategy", "single"], {"parallel.strategy": "single"}),
    (["--lora-rank", "8"], {"lora.rank": 8}),
    (["--lora-target-modules", "q,k, v,o,ffn.0,ffn.2"], {"lora.targets": ("q", "k", "v", "o", "ffn.0", "ffn.2")}),
    (["--learning-rate", "1e-5"], {"training.learning_rate": 1e-5}),
    (["--gradient-accumulation-steps", "3"], {"training.global_batch_size": 6}),
    (["--budget", "24GiB"], {"memory.budget": "24GiB"}),
    (["--set", "training.seed=7"], {"training.seed": 7}),
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    return path


def given_by(config: Path, *arguments: object) -> tuple[RunConfig, str]:
    """The config that `longtake train` resolves, from what it prints of each flag; it goes no further than that."""
    outcome = run("train", config, *arguments, "--set", "training.warmup_steps=9999")
    assert [line.split(":")[0] for line in outcome.errors] == ["training.warmup_steps"]
    printed = re.findall(r"^(\S+) = (.*)  \((--.*)\)$", outcome.err, re.MULTILINE)
    return load_config(config, [Override(key, literal_eval(value), flag) for key, value, flag in printed]), outcome.err


def get(loaded: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(loaded, section), name)


def refused(path: Path, *given: Override) -> list[str]:
    """What loading says with `given` on top, one line a problem."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, given)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("underscores", [False, True])
@pytest.mark.parametrize(("flag", "expected"), FLAGS, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_every_flag_reaches_the_config_in_both_spellings_and_is_printed(
    config: Path, flag: list[str], expected: dict[str, Any], underscores: bool
) -> None:
    name = "--" + flag[0][2:].replace("-", "_") if underscores else flag[0]
    loaded, printed = given_by(config, name, *flag[1:])
    before = load_config(config)
    for key, value in expected.items():
        assert get(loaded, key) == value != get(before, key)
        shown = list(value) if isinstance(value, tuple) else value
        assert any(line.startswith(f"{key} = {shown!r}  ({flag[0]}") for line in printed.splitlines())


@pytest.mark.parametrize(
    "strategy", ["auto", "ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
)
def test_every_training_strategy_is_known(config: Path, strategy: str) -> None:
    given = overrides(Flags(training_strategy=strategy), config)
    assert load_config(config, given).parallel.strategy == strategy


def test_all_flags_together(config: Path) -> None:
    loaded, _ = given_by(config, *(word for flag, _ in FLAGS for word in flag))
    values = {key: value for _, expected in FLAGS for key, value in expected.items()} | {"data.size": (96, 96)}
    assert {key: get(loaded, key) for key in values} == values


def test_a_flag_beats_set_which_beats_the_file(config: Path) -> None:
    sets = ["--set", "training.learning_rate=2e-5", "--set", "lora.rank=2"]
    loaded, _ = given_by(config, "--learning-rate", 3e-5, *sets)
    assert get(loaded, "training.learning_rate") == 3e-5
    assert get(loaded, "lora.rank") == 2


def test_what_a_flag_leaves_open_is_taken_from_set_and_then_from_the_file(config: Path) -> None:
    flags = Flags(width=32, gradient_accumulation_steps=2)
    given = parse_set(["data.size=[16, 48]", "training.micro_batch_size=4"])
    values = {override.key: override.value for override in overrides(flags, config, given)}
    assert values == {"data.size": [32, 48], "training.global_batch_size": 8}
    assert {o.key: o.value for o in overrides(flags, config, world_size=3)}["training.global_batch_size"] == 12


def test_without_a_size_in_the_file_the_other_half_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(TOML.replace("size = [128, 64]", ""))
    (override,) = overrides(Flags(height=64), path)
    assert override == Override("data.size", [832, 64], "--height")
    (override,) = overrides(Flags(height=64, width=32), path)
    assert override == Override("data.size", [32, 64], "--width/--height")


def test_no_flag_sets_nothing(config: Path) -> None:
    assert overrides(Flags(), config) == []


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (Flags(num_frames=0), "--num-frames: must be greater than 0, not 0"),
        (Flags(width=0), "--width: must be greater than 0, not 0"),
        (Flags(learning_rate=-1.0), "--learning-rate: must be greater than 0, not -1.0"),
        (Flags(gradient_accumulation_steps=0), "--gradient-accumulation-steps: must be greater than 0, not 0"),
        (Flags(lora_target_modules=" , "), "--lora-target-modules: must have at least 1 items, not 0"),
        (Flags(training_strategy="zero3"), '--training-strategy: must be "auto", "single", "ddp", "fsdp2", '),
    ],
)
def test_a_wrong_value_is_named_by_its_flag(config: Path, flags: Flags, line: str) -> None:
    (said,) = refused(config, *overrides(flags, config))
    assert said.startswith(line)


@pytest.mark.parametrize("old", ["size = [128, 64]", "micro_batch_size = 2"])
def test_a_flag_hides_no_mistake_of_the_file(config: Path, old: str) -> None:
    key = old.split(" =")[0]
    config.write_text(TOML.replace(old, f'{key} = "x"'))
    (line,) = refused(config, *overrides(Flags(width=32, gradient_accumulation_steps=2), config))
    assert re.search(rf"run.toml:\d+: \w+\.{key}: must be ", line)
    config.write_text(TOML.replace("[data]", "[data"))
    assert "valid TOML" in refused(config, *overrides(Flags(width=32), config))[0]


def test_set_reads_toml_values_and_takes_anything_else_as_text(config: Path) -> None:
    texts = [
        "data.size=[64, 32]",
        "training.learning_rate = 1e-5",
        "model.name=tiny-i2v",
        "data.source=",
        "lora.rank=4",
    ]
    values = {override.key: override.value for override in parse_set(texts)}
    assert values == {
        "data.size": [64, 32],
        "training.learning_rate": 1e-5,
        "model.name": "tiny-i2v",
        "data.source": "",
        "lora.rank": 4,
    }
    loaded = load_config(config, parse_set([text for text in texts if "source" not in text]))
    assert (loaded.data.size, loaded.training.learning_rate, loaded.model.name) == ((64, 32), 1e-5, "tiny-i2v")
    assert loaded.lora is not None
    assert (loaded.lora.rank, loaded.lora.targets) == (4, ("attention", "ffn"))


def test_set_that_cannot_be_read_is_refused_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_set(["steps=3", "training.steps", "training.steps=3"])
    assert [str(problem) for problem in caught.value.problems] == [
        "--set: cannot read 'steps=3'; write section.key=value; did you mean training.steps? [config-set-unreadable]",
        "--set: cannot read 'training.steps'; write section.key=value [config-set-unreadable]",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("training.steps=x", '--set training.steps: must be a valid integer, not "x" [config-wrong-type]'),
        ("training.stps=3", "--set training.stps: there is no such key; did you mean steps? [config-unknown-key]"),
        (
            "trainin.ema=0",
            "--set trainin.ema: there is no such key; did you mean training.ema? [config-unknown-key]",
        ),
        ("data.size=[64]", "--set data.size: the array is too short, this item is missing [config-array-length]"),
        ("training.steps.x=3", "--set training.steps.x: must be a valid integer, not {x = 3} [config-wrong-type]"),
        ("model.name.x=3", "--set model.name.x: name is no section; write section.key=value [config-not-a-section]"),
    ],
)
def test_a_problem_of_the_command_line_is_named_as_it_was_written(config: Path, text: str, line: str) -> None:
    assert refused(config, *parse_set([text])) == [line]
