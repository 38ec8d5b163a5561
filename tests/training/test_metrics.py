"""metrics.jsonl and TensorBoard's events, from the start and after an interruption."""

import importlib.util
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longtake.errors import ConfigError, RunError
from longtake.training.events import Events
from longtake.training.metrics import FILE, Metrics, read_metrics
from refusals import file_size_limit


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


def test_a_disk_that_refuses_a_line_is_named_and_the_log_goes_on_from_what_is_whole(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, None, "", {})
    metrics.write(1, {"loss": 1.0})
    with file_size_limit(1000), pytest.raises(RunError, match="are free there; make room") as raised:
        metrics.write(2, {"loss": 2.0, "note": "text" * 1000})
    metrics.close()
    (problem,) = raised.value.problems
    assert (problem.what, problem.where) == ("cannot write: File too large", str(tmp_path / FILE))
    assert (tmp_path / FILE).stat().st_size == 1000  # a part of the line
    assert [line["step"] for line in read_metrics(tmp_path / FILE)] == [1]
    write(tmp_path, range(2, 4), resumed=1)
    assert [line["step"] for line in read_metrics(tmp_path / FILE)] == [1, 2, 3]


def test_a_disk_that_refuses_an_event_is_named_and_later_files_are_read(tmp_path: Path) -> None:
    events = Events(tmp_path, 0)
    events.write(1, {"loss": 1.0})
    with file_size_limit(1000), pytest.raises(RunError, match=r"events\.out\.tfevents.*: cannot write: File too large"):
        events.write(2, {f"loss {number}": 2.0 for number in range(100)})
    events.close()
    write(tmp_path, range(2, 4), resumed=1)
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")] == [1, 2, 3]


@pytest.mark.parametrize("tail", [bytes(64), b"\xff\xfe" * 9, b'{"step": 4, "lo', b"\n\n"])
def test_what_a_loss_of_power_left_at_the_end_of_the_log_is_left_out(tmp_path: Path, tail: bytes) -> None:
    write(tmp_path, range(1, 4))
    with (tmp_path / FILE).open("ab") as file:
        file.write(tail)
    assert [line["step"] for line in read_metrics(tmp_path / FILE)] == [1, 2, 3]


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
