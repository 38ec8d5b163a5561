"""Configs from TOML: every key of the example loads, and whatever is wrong is named, with what was meant."""

import re
from pathlib import Path

import pytest

from longtake.config.load import Override, changed_keys, load_config, parse_set
from longtake.errors import ConfigError

EXAMPLE = """
[model]
name = "wan2.1-i2v-14b-480p"
dtype = "bf16"
expert = "both"

[data]
source = "clips/"
cache = "cache/"
validation = 0.05
caption_dropout = 0.1
num_frames = 81
size = [832, 480]
frames_schedule = [[0, 17], [200, 49], [500, 81]]

[lora]
rank = 32
alpha = 32
targets = ["attention", "ffn"]
dropout = 0.0

[training]
steps = 2000
global_batch_size = 4
micro_batch_size = 1
precision = "bf16"
seed = 0
ema = 0.0
learning_rate = 1e-4
schedule = "cosine"
warmup_steps = 50
clip_norm = 1.0
sigmas = "logit_normal"
shift = 3.0

[memory]
budget = "auto"
gradient_checkpointing = "block_keep_attention"
checkpoint_every = 1
activation_offload = "disk"
activation_offload_fraction = 1.0
block_swap = 0
block_swap_from = "disk"
slices = 1
attention_head_groups = 1
quantization = "nf4"
optimizer = "adamw8bit"
optimizer_offload = false
fallbacks = [{gradient_checkpointing = "block", slices = 2}]

[parallel]
strategy = "deepspeed_stage_3"
sp = 1
offload = "none"

[validation]
every = 250
samples = [{prompt = "a rabbit", image = "first.png"}]

[output]
run = "runs/my-lora"
save_every = 100
keep = 3
formats = ["comfyui"]
"""
SMALLEST = '[model]\nname = "tiny-t2v"\n[data]\nsource = "clips"\n[output]\nrun = "run"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str, *overrides: Override) -> list[str]:
    """What loading says, one line a problem, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    assert all("\n" not in str(problem) for problem in caught.value.problems)
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


def with_line(line: str, section: str = "training") -> str:
    """SMALLEST with one more line in a section."""
    header = f"[{section}]\n"
    return SMALLEST.replace(header, header + line + "\n") if header in SMALLEST else f"{SMALLEST}{header}{line}\n"


def test_every_key_of_the_example_loads(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, EXAMPLE))
    assert config.data.frames_schedule == ((0, 17), (200, 49), (500, 81))
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (32, 32.0, ("attention", "ffn"))
    assert config.training.learning_rate == 1e-4
    assert config.memory.fallbacks[0].slices == 2
    assert config.parallel.strategy == "deepspeed_stage_3"
    assert config.validation.samples[0].image == str(tmp_path / "first.png")


CHOICES = {
    "model": {"dtype": ["bf16", "fp16", "fp32"], "expert": ["both", "high", "low"]},
    "training": {"precision": ["bf16", "fp16", "fp32"], "schedule": ["constant", "cosine"]},
    "memory": {
        "gradient_checkpointing": ["none", "block", "block_keep_attention"],
        "activation_offload": ["none", "host", "disk"],
        "block_swap_from": ["host", "disk"],
        "quantization": ["none", "int8", "fp8", "nf4"],
        "optimizer": ["adamw", "adamw8bit"],
    },
    "parallel": {
        "strategy": ["auto", "single", "ddp", "fsdp2", *(f"deepspeed_stage_{stage}" for stage in (1, 2, 3))],
        "offload": ["none", "optimizer", "parameters"],
    },
}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [(section, key, v) for section, keys in CHOICES.items() for key, values in keys.items() for v in values],
)
def test_every_choice_loads(tmp_path: Path, section: str, key: str, value: str) -> None:
    config = load_config(write(tmp_path, with_line(f'{key} = "{value}"', section)))
    assert getattr(getattr(config, section), key) == value


def test_without_a_lora_section_all_weights_are_trained(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, SMALLEST)).lora is None
    assert load_config(write(tmp_path, f"{SMALLEST}[lora]\n")).lora is not None


def test_a_config_is_frozen(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SMALLEST))
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3  # type: ignore[misc]


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts").mkdir()
    monkeypatch.chdir(tmp_path.parent)
    text = with_line('path = "weights"\ncomponents = "parts"', "model")
    text = text.replace('source = "clips"', 'source = "../clips"\nvalidation = "held.csv"')
    samples = '[[validation.samples]]\nprompt = "x"\nimage = "a.png"\nlast_image = "/elsewhere/b.png"\n'
    config = load_config(write(tmp_path, text + samples))
    assert config.model.path == str(tmp_path / "weights")
    assert config.model.components == str(tmp_path / "parts")
    assert Path(config.data.source).resolve() == tmp_path.parent / "clips"
    assert config.data.cache == str(tmp_path / "cache")
    assert config.data.validation == str(tmp_path / "held.csv")
    assert config.output.run == str(tmp_path / "run")
    sample = config.validation.samples[0]
    assert (sample.image, sample.last_image) == (str(tmp_path / "a.png"), "/elsewhere/b.png")


def test_what_is_no_local_path_stays_as_it_is(tmp_path: Path) -> None:
    text = SMALLEST.replace('"clips"', '"https://host/clips.csv"').replace('"run"', '"~/run"')
    config = load_config(write(tmp_path, text.replace("[data]", 'components = "owner/name"\n[data]')))
    assert config.data.source == "https://host/clips.csv"
    assert config.model.components == "owner/name"
    assert config.model.path == ""
    assert config.output.run == str(Path.home() / "run")


@pytest.mark.parametrize("value", ['"a\\u0000b"', '"~nobody-of-that-name/x"'])
def test_what_cannot_be_a_path_is_named_with_its_key(tmp_path: Path, value: str) -> None:
    text = SMALLEST.replace('"clips"', value).replace('"run"', value)
    source, run = refused(tmp_path, text)
    assert source.startswith("data.source: ")
    assert run.startswith("output.run: ")
    assert "cannot be a path" in run


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (with_line("learning_rat = 1"), "run.toml:8: training.learning_rat: there is no such key; did you mean learn"),
        (with_line("rank = 8"), "run.toml:8: training.rank: there is no such key; did you mean lora.rank?"),
        (with_line("num_frames = 8", "output"), "output.num_frames: there is no such key; did you mean data.num_frame"),
        (with_line("frames = 8", "data"), "run.toml:4: data.frames: there is no such key; did you mean num_frames?"),
        (f"{SMALLEST}[trainin]\n", "run.toml:7: trainin: there is no such key; did you mean training?"),
        (f"{SMALLEST}[optimizer]\n", "run.toml:7: optimizer: there is no such key; did you mean training?"),
        (f"{SMALLEST}[output.data]\n", "run.toml:5: output.data: there is no such key; [data] is a section of its own"),
        (f"steps = 4\n{SMALLEST}", "run.toml:1: steps: there is no such key; did you mean training.steps?"),
        (f"{SMALLEST}[zzz]\n", "zzz: there is no such key; the sections are model, data, lora,"),
        (with_line("zzz = 1"), "training.zzz: there is no such key; the keys of [training] are steps, global_"),
        (with_line("fallbacks = [{slice = 1}]", "memory"), "memory.fallbacks[0].slice: there is no such key; did you "),
        (with_line("learning_rate = 0"), "run.toml:8: training.learning_rate: must be greater than 0, not 0"),
        (with_line("learning_rate = inf"), "training.learning_rate: must be a finite number, not inf"),
        (with_line('learning_rate = "1e-4"'), 'training.learning_rate: must be a valid number, not "1e-4"; write'),
        (with_line("steps = 2.5"), "training.steps: must be a valid integer, not 2.5"),
        (with_line("seed = true"), "training.seed: must be a valid integer, not true"),
        (with_line('precision = "fp8"'), 'training.precision: must be "bf16", "fp16" or "fp32", not "fp8"'),
        (with_line("size = [832]", "data"), "run.toml:4: data.size[1]: the array is too short"),
        (with_line("size = [1, 2, 3]", "data"), "data.size: must have at most 2 items, not 3"),
        (with_line("size = 832", "data"), "data.size: must be an array, not 832"),
        (with_line("frames_schedule = [[0, -1]]", "data"), "data.frames_schedule[0][1]: must be greater than 0, not"),
        (with_line("validation = 1.5", "data"), "data.validation: must be less than or equal to 1, not 1.5"),
        (with_line('validation = ""', "data"), "data.validation: must not be empty"),
        (with_line("targets = []", "lora"), "lora.targets: must have at least 1 items, not 0"),
        (SMALLEST.replace('"run"', '""'), "run.toml:6: output.run: must not be empty"),
        (SMALLEST.replace('run = "run"\n', ""), "run.toml:5: output.run: this key is required; add run = ... under ["),
        (SMALLEST.replace('[output]\nrun = "run"\n', ""), "output: this key is required; add a section [output]"),
        (SMALLEST.replace('name = "tiny-t2v"', ""), "run.toml:1: model: give name or path"),
        (f"lora = 3\n{SMALLEST}", "run.toml:1: lora: must be a section or a table, not 3"),
        (SMALLEST.replace("[data]", "[data"), "run.toml: this is no valid TOML: Expected ']' at the end of a table de"),
        (f'{SMALLEST}run = "again"\n', "run.toml: this is no valid TOML: Cannot overwrite a value (at line 7, col"),
        (f"{SMALLEST}x = {'[' * 3000}", "run.toml: tables or arrays are nested too deeply"),
    ],
)
def test_one_line_says_what_is_wrong_where_and_what_was_meant(tmp_path: Path, text: str, line: str) -> None:
    (said,) = refused(tmp_path, text)
    assert line in said


def test_an_entry_of_an_array_of_tables_is_named_by_its_own_keys(tmp_path: Path) -> None:
    text = f'{SMALLEST}[[validation.samples]]\nprompt = "x"\npromt = "y"\n'
    assert refused(tmp_path, text) == [
        "run.toml:7: validation.samples[0].promt: there is no such key; did you mean prompt? [config-unknown-key]"
    ]


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = with_line('steps = "many"\nlearning_rat = 3') + "[memroy]\n"
    assert [re.sub(r"[;,].*", "", line) for line in refused(tmp_path, text)] == [
        "run.toml:8: training.steps: must be a valid integer",
        "run.toml:9: training.learning_rat: there is no such key",
        "run.toml:10: memroy: there is no such key",
    ]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone.toml: there is no such file; make one with `longtake init`"):
        load_config(tmp_path / "gone.toml")
    with pytest.raises(ConfigError, match="cannot read the file: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(ConfigError, match=r"latin.toml: the file is not UTF-8; save it as UTF-8"):
        load_config(tmp_path / "latin.toml")


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(SMALLEST, encoding="utf-8-sig")
    assert load_config(tmp_path / "run.toml").model.name == "tiny-t2v"


def test_changed_keys_are_the_leaves_that_differ(tmp_path: Path) -> None:
    before = load_config(write(tmp_path, EXAMPLE))
    after = load_config(tmp_path / "run.toml", parse_set(["training.steps=3", "memory.slices=2"]))
    assert changed_keys(before, after) == {"training.steps": (2000, 3), "memory.slices": (1, 2)}
    without = load_config(write(tmp_path, EXAMPLE.replace("[lora]\nrank = 32\nalpha = 32\n", "[lora]\n")))
    assert changed_keys(before, without) == {}
    full = before.model_copy(update={"lora": None})
    assert changed_keys(before, full)["lora.rank"] == (32, None)
