"""metrics.jsonl and TensorBoard's events, from the start and after an interruption."""

import importlib.util
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longtake.errors import ConfigError
from longtake.training.metrics import FILE, Metrics, read_metrics


def write(run: Path, steps: range, resumed: int | None = None) -> None:
    """A log of `steps` whose loss is the step."""
    metrics = Metrics(run, resumed, "", {})
    for step in steps:
        metrics.write(step, {"loss": float(step), "note": "text"})
    metrics.close()


def test_each_step_is_a_line_of_json_and_an_event(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    assert read_metrics(tmp_path / FILE) == [{"step": s, "loss": float(s), "note": "text"} for s in (1, 2, 3)]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_line_is_there_at_once(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, None, "", {})
    metrics.write(1, {"loss": 0.5})
    metrics.flush()
    assert read_metrics(tmp_path / FILE) == [{"step": 1, "loss": 0.5}]
    metrics.close()


def test_lines_after_the_checkpoint_are_dropped_and_come_once(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    write(tmp_path, range(4, 8), resumed=3)
    assert [line["step"] for line in read_metrics(tmp_path / FILE)] == [1, 2, 3, 4, 5, 6, 7]
    scalars = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5, 6, 7]


def test_without_a_checkpoint_every_line_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    write(tmp_path, range(2), resumed=None)
    assert [line["step"] for line in read_metrics(tmp_path / FILE)] == [0, 1]


def test_a_line_cut_off_by_a_kill_is_no_line(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    file = tmp_path / FILE
    file.write_text(file.read_text()[:-9])
    assert [line["step"] for line in read_metrics(file)] == [1, 2]
    write(tmp_path, range(3, 5), resumed=2)
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 3, 4]


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, None, "", {})
    metrics.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "rate": 0.5})
    metrics.close()
    (text,) = (tmp_path / FILE).read_text().splitlines()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None, "rate": 0.5}


def test_it_knows_which_validations_are_there(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, None, "", {})
    metrics.write(0, {"validation_loss": 1.0})
    metrics.write(1, {"loss": 1.0})
    metrics.close()
    resumed = Metrics(tmp_path, 1, "", {})
    assert [resumed.has_validation(step) for step in (0, 1, 2)] == [True, False, False]
    resumed.close()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="Weights & Biases is installed")
def test_weights_and_biases_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"output\.wandb: wandb is not installed; pip install"):
        Metrics(tmp_path, None, "project", {})
