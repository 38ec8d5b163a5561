"""The run folder: begun once, continued only when asked and with what it was begun with, held by one process."""

from pathlib import Path
from typing import Any

import pytest

from longtake.config.load import load_config
from longtake.config.schema import RunConfig
from longtake.errors import ConfigError
from longtake.training.run_folder import CONFIG, open_run, record_config


def config(run: Path, **sections: dict[str, Any]) -> RunConfig:
    """A config of nothing but defaults and `sections`."""
    table: dict[str, Any] = {"model": {"name": "tiny-t2v"}, "output": {"run": str(run)}}
    table["data"] = {"source": "/clips", "cache": "/cache"}
    for name, changes in sections.items():
        table[name] = table.get(name, {}) | changes
    return RunConfig.model_validate(table)


def begin(chosen: RunConfig) -> None:
    """As far as a run that has begun."""
    with open_run(chosen, False, print) as run:
        record_config(chosen, run)


def refusal(chosen: RunConfig, resume: bool) -> str:
    """The lines with which the folder is refused."""
    with pytest.raises(ConfigError) as raised, open_run(chosen, resume, print):
        pytest.fail("it was opened")
    assert raised.value.exit_status == 2
    return str(raised.value)


def test_a_new_run_has_its_resolved_config(tmp_path: Path) -> None:
    chosen = config(tmp_path / "runs" / "a", data={"frames_schedule": ((0, 17), (5, 81)), "cache": "/cache"})
    begin(chosen)
    assert load_config(tmp_path / "runs" / "a" / CONFIG) == chosen


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    assert refusal(config(tmp_path), resume=False) == (
        f"{tmp_path}: the run folder is not empty; add --resume to continue it, or set another output.run"
        " [run-folder-not-empty]"
    )
    nothing = f"{tmp_path}: there is no run to resume; leave out --resume [run-nothing-to-resume]"
    assert refusal(config(tmp_path), resume=True) == nothing


def test_a_run_that_never_began_may_begin(tmp_path: Path) -> None:
    with open_run(config(tmp_path), False, print):
        (tmp_path / "scratch" / "activations-0123").mkdir(parents=True)  # its strategy was applied
        (tmp_path / f"{CONFIG}.staged-0123456789ab").touch()  # it was killed while it wrote its config
    begin(config(tmp_path))
    assert "add --resume" in refusal(config(tmp_path), resume=False)


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    begin(config(tmp_path))
    with open_run(config(tmp_path), True, print):
        line = f"{tmp_path}: another process trains in this folder; wait for it [run-in-use]"
        assert refusal(config(tmp_path), resume=True) == line
    with open_run(config(tmp_path), True, print):
        pass


def test_what_would_change_the_result_is_refused_key_by_key(tmp_path: Path) -> None:
    begin(config(tmp_path))
    other = config(
        tmp_path, training={"learning_rate": 5e-4, "seed": 3}, data={"caption_dropout": 0.3}, lora={"rank": 8}
    )
    lines = refusal(other, resume=True).splitlines()
    assert [line.split(":")[0] for line in lines][:1] == ["data.caption_dropout"]
    assert any(line.startswith("training.learning_rate: the run was started with 0.0001, not 0.0005") for line in lines)
    assert any(line.startswith("training.seed: the run was started with 0, not 3") for line in lines)
    assert any(line.startswith("lora") for line in lines)


def test_what_does_not_change_the_result_may_change_and_is_said(tmp_path: Path) -> None:
    begin(config(tmp_path))
    said: list[str] = []
    changed = config(
        tmp_path,
        output={"save_every": 7},
        memory={"activation_offload": "disk"},
        training={"micro_batch_size": 2, "steps": 3000},
        validation={"every": 9},
    )
    with open_run(changed, True, said.append):
        pass
    assert sorted(line.split(":")[0] for line in said) == [
        "resumed with another memory.activation_offload",
        "resumed with another output.save_every",
        "resumed with another training.micro_batch_size",
        "resumed with another training.steps",
        "resumed with another validation.every",
    ]


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path) -> None:
    begin(config(tmp_path))
    left = [tmp_path / "metrics.jsonl.staged-1", tmp_path / "samples" / "a.mp4.staged-2"]
    folder = tmp_path / "checkpoints" / "step-00000001.staged-3"
    folder.mkdir(parents=True)
    (folder / "trained.safetensors").touch()
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with open_run(config(tmp_path), True, print):
        assert not [path for path in (*left, folder) if path.exists()]
