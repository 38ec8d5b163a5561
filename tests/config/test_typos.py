"""Sixty ways in which a config is misspelled or carried over from another trainer, and the key that was meant."""

from pathlib import Path

import pytest

from command_line import Outcome, run
from longtake.config.load import load_config
from longtake.config.meant import keys_at
from longtake.config.other_trainers import KEYS, NOTES, SECTIONS, key_for
from longtake.config.problems import CODES
from longtake.config.schema import RunConfig
from longtake.explanations import explanations

SMALLEST = '[model]\nname = "tiny-t2v"\n[data]\nsource = "clips"\n[lora]\n[output]\nrun = "run"\n'

TYPOS = {
    # letters that are missing, doubled, swapped, next to the right one, or of another spelling of the word
    "training.learning_rat = 1e-4": "learning_rate",
    "training.lerning_rate = 1e-4": "learning_rate",
    "training.learnig_rate = 1e-4": "learning_rate",
    "training.warmupp_steps = 10": "warmup_steps",
    "training.micro_bacth_size = 1": "micro_batch_size",
    "training.wieght_decay = 0.1": "weight_decay",
    "training.precison = 'bf16'": "precision",
    "training.sede = 1": "seed",
    "lora.rnak = 8": "rank",
    "lora.aplha = 8": "alpha",
    "lora.droupout = 0.1": "dropout",
    "data.num_farmes = 49": "num_frames",
    "memory.quantisation = 'int8'": "quantization",
    "memory.gradient_checkpoiting = 'block'": "gradient_checkpointing",
    "memory.optimiser = 'adamw'": "optimizer",
    # one for many, and many for one
    "training.step = 100": "steps",
    "lora.target = ['attention']": "targets",
    "data.num_frame = 49": "num_frames",
    "validation.sample = [{prompt = 'x'}]": "samples",
    "output.format = ['kohya']": "formats",
    # other ways to write words together
    "training.learning-rate = 1e-4": "learning_rate",
    "training.learningRate = 1e-4": "learning_rate",
    "data.numFrames = 49": "num_frames",
    "memory.blockSwap = 20": "block_swap",
    "training.Learning_Rate = 1e-4": "learning_rate",
    "training.SEED = 1": "seed",
    "training.warm_up_steps = 10": "warmup_steps",
    "lora.start_form = ['a.safetensors']": "start_from",
    # the section once more in the key
    "lora.lora_rank = 8": "rank",
    "data.data_source = 'clips'": "source",
    # a key of another section
    "training.rank = 8": "lora.rank",
    "training.num_frames = 49": "data.num_frames",
    "training.gradient_checkpointing = 'block'": "memory.gradient_checkpointing",
    "training.optimizer = 'adamw'": "memory.optimizer",
    "model.precision = 'bf16'": "training.precision",
    "training.save_every = 50": "output.save_every",
    "training.samples = [{prompt = 'x'}]": "validation.samples",
    "lora.learning_rate = 1e-4": "training.learning_rate",
    # above all sections
    "steps = 100": "training.steps",
    "learning_rate = 1e-4": "training.learning_rate",
    "lora_rank = 8": "lora.rank",
    "block_swap = 20": "memory.block_swap",
    # words of other trainers
    "training.lr = 1e-4": "learning_rate",
    "training.max_train_steps = 100": "steps",
    "training.num_train_epochs = 3": "steps",
    "training.mixed_precision = 'bf16'": "precision",
    "training.gradient_accumulation_steps = 4": "global_batch_size",
    "training.train_batch_size = 1": "micro_batch_size",
    "training.max_grad_norm = 1.0": "clip_norm",
    "training.discrete_flow_shift = 3.0": "shift",
    "training.blocks_to_swap = 20": "memory.block_swap",
    "training.output_dir = 'run'": "output.run",
    "output.save_every_n_steps = 50": "save_every",
    "lora.network_dim = 8": "rank",
    "lora.network_alpha = 8": "alpha",
    "data.resolution = [832, 480]": "size",
    "data.video_length = 49": "num_frames",
    # sections
    "trainig.steps = 100": "training",
    "dataset.source = 'clips'": "data",
    "network.rank = 8": "lora",
}
"""What a file has, as `section.key = value`, and what is to be suggested."""
SECTION_NAMES = {
    "train": "training",
    "Training": "training",
    "optimizer": "training",
    "datasets": "data",
    "adapter": "lora",
    "loras": "lora",
    "parallelism": "parallel",
    "eval": "validation",
    "checkpoints": "output",
    "outputs": "output",
}
VALUES = {
    "training.precision = 'bfloat16'": "bf16",
    "training.precision = 'BF16'": "bf16",
    "training.schedule = 'cosin'": "cosine",
    "training.schedule = 'Constant'": "constant",
    "training.sigmas = 'logit-normal'": "logit_normal",
    "memory.quantization = 'fp8_e4m3fn'": "fp8",
    "memory.optimizer = 'AdamW8bit'": "adamw8bit",
    "memory.gradient_checkpointing = true": "block",
    "memory.activation_offload = 'cpu'": "host",
    "parallel.strategy = 'zero3'": "deepspeed_stage_3",
    "parallel.strategy = 'deepspeed-stage-2'": "deepspeed_stage_2",
    "output.formats = ['diffuser']": "diffusers",
}


def config(folder: Path, assignment: str = "") -> Path:
    """SMALLEST with `section.key = value` in it: in its section where the file has that, else below or above all."""
    dotted, equals, value = assignment.partition(" = ")
    section, _, key = dotted.rpartition(".")
    header, line = f"[{section}]\n", f"{key}{equals}{value}\n"
    text = SMALLEST if header in SMALLEST or not section else f"{SMALLEST}{header}"
    text = text.replace(header, header + line) if section else f"{line}{text}"
    path = folder / "run.toml"
    path.write_text(text)
    return path


def is_suggested(outcome: Outcome, meant: str) -> bool:
    """Whether the one error suggests that and nothing else; status 2 and no traceback."""
    (line,) = outcome.errors
    return outcome.status == 2 and f"; did you mean {meant}?" in line and line.endswith("-key]")


def test_sixty_misspelled_keys_are_told_what_was_meant(tmp_path: Path) -> None:
    assert len(TYPOS) == 60
    missed = [typo for typo, meant in TYPOS.items() if not is_suggested(run("train", config(tmp_path, typo)), meant)]
    assert missed == []


def test_the_same_set_on_the_command_line_is_told_what_was_meant(tmp_path: Path) -> None:
    path, missed = config(tmp_path), []
    for typo, meant in TYPOS.items():
        dotted, _, value = typo.partition(" = ")
        section, _, key = dotted.rpartition(".")
        outcome = run("train", path, "--set", f"{dotted}={value}")
        full = f"{meant}.{key}" if meant in RunConfig.model_fields else meant
        missed += [] if is_suggested(outcome, full) or _is_unreadable(outcome, full, section) else [typo]
    assert missed == []


def _is_unreadable(outcome: Outcome, meant: str, section: str) -> bool:
    """`--set steps=3` has no section."""
    (line,) = outcome.errors
    return not section and f"write section.key=value; did you mean {meant}?" in line and outcome.status == 2


@pytest.mark.parametrize(("section", "meant"), SECTION_NAMES.items())
def test_another_name_of_a_section_is_told_which_was_meant(tmp_path: Path, section: str, meant: str) -> None:
    path = config(tmp_path)
    path.write_text(f"{SMALLEST}[{section}]\n")
    assert is_suggested(run("train", path), meant)


def test_the_keys_of_a_section_with_another_name_are_told_at_once(tmp_path: Path) -> None:
    path = config(tmp_path)
    path.write_text(f'{SMALLEST}[optimizer]\ntype = "adamw"\nlr = 1e-4\nweight_decay = 0.1\nbetas = [0.9, 0.99]\n')
    said = [line.partition("run.toml:")[2] for line in run("train", path).errors]
    assert said[:3] == [
        "8: optimizer: there is no such key; did you mean training? [config-unknown-key]",
        "9: optimizer.type: there is no such key; did you mean memory.optimizer? [config-unknown-key]",
        "10: optimizer.lr: there is no such key; did you mean training.learning_rate? [config-unknown-key]",
    ]
    assert said[3].startswith("12: optimizer.betas: there is no such key; the keys of [training] are steps, ")


def test_tables_that_are_a_value_are_no_section(tmp_path: Path) -> None:
    for line, meant in (("fallbacks = [{slices = 2}]", "memory.fallbacks"), ("steps = []", "training.steps")):
        assert is_suggested(run("train", config(tmp_path, line)), meant)


def test_what_is_like_nothing_is_told_what_there_is(tmp_path: Path) -> None:
    for typo, start in {
        "training.zzz = 1": "the keys of [training] are steps",
        "qqq.x = 1": "the sections are model",
    }.items():
        (line,) = run("train", config(tmp_path, typo)).errors
        assert start in line


@pytest.mark.parametrize(("assignment", "meant"), VALUES.items())
def test_a_value_that_is_no_choice_is_told_the_nearest(tmp_path: Path, assignment: str, meant: str) -> None:
    outcome = run("train", config(tmp_path, assignment))
    (line,) = outcome.errors
    assert f'; did you mean "{meant}"? [config-unknown-choice]' in line
    assert outcome.status == 2


@pytest.mark.parametrize(
    ("assignment", "line"),
    [
        ("training.steps = [1, 2]", "training.steps: must be a valid integer, not [1, 2] [config-wrong-type]"),
        ("training.steps = {x = 'a'}", 'training.steps: must be a valid integer, not {x = "a"} [config-wrong-type]'),
        ("training.steps = '20'", 'steps: must be a valid integer, not "20"; write 20, without quotes [config-wr'),
        ("training.learning_rate = '1e-4'", 'not "1e-4"; write 1e-4, without quotes [config-wrong-type]'),
        ("lora.dora = 'true'", 'must be a valid boolean, not "true"; write true, without quotes [config-wrong-type]'),
        ("training.steps = 2024-01-01", "must be a valid integer, not 2024-01-01 [config-wrong-type]"),
        ("data.size = [1, [2, 'x', true]]", 'data.size[1]: must be a valid integer, not [2, "x", true] [config-wr'),
        ("data.size = [1, [[[[[[[[[[2]]]]]]]]]]]", "data.size[1]: must be a valid integer, not [[[[[[[[...]]]]]]]] ["),
        ("training = 3", "training: must be a section or a table, not 3; write [training] and, under it, its keys: st"),
    ],
)
def test_a_refused_value_is_shown_as_toml(tmp_path: Path, assignment: str, line: str) -> None:
    (said,) = run("train", config(tmp_path, assignment)).errors
    assert line in said


def test_the_words_of_other_trainers_lead_to_what_there_is_and_each_to_one() -> None:
    words = [word for said in KEYS.values() for word in said.split()]
    homes = {f"{section}.{key}" for section in keys_at(()) for key in keys_at((section,))}
    assert KEYS.keys() | NOTES.keys() <= homes
    assert SECTIONS.keys() <= set(keys_at(()))
    assert sorted(set(words)) == sorted(words)
    assert [word for word in words if word in homes or key_for(word) not in homes] == []


def test_every_code_of_a_wrong_value_is_explained() -> None:
    assert set(CODES.values()) - set(explanations()) == set()


def test_the_smallest_config_is_one(tmp_path: Path) -> None:
    assert load_config(config(tmp_path)).model.name == "tiny-t2v"
