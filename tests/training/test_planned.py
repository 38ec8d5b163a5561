"""A plan beside its run: what is written and said, the peak of the strategy in force, and the time that is left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from failing_allocator import FailingAllocator, Failure
from longtake.config.schema import MemoryStrategy, RunConfig
from longtake.data.cache import Entry
from longtake.data.loader import BucketSampler
from longtake.training.metrics import FILE, read_metrics
from longtake.training.planned import FILE as PLAN
from longtake.training.planned import Bucket, Forecast, Planned, PlannedStrategy, upcoming
from longtake.training.run import train
from runs import Recorder, Scene

Scenes = Callable[[str], Scene]
MIB = 2**20
SHORT: Bucket = (5, 32, 32)
LONG: Bucket = (9, 32, 32)
BLOCK, OFFLOADED = MemoryStrategy(), MemoryStrategy(activation_offload="host")
PLANNED = Planned(
    (
        PlannedStrategy(BLOCK, 900 * MIB, 0, 10.0, {SHORT: 4.0, LONG: 10.0}),
        PlannedStrategy(OFFLOADED, 700 * MIB, 300 * MIB, 12.0, {SHORT: 5.0, LONG: 12.0}),
    ),
    {"chosen": 0, "plans": [{"fits": True}]},
)


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Made:
    """A forecast of a run of which steps are made; each takes `between` seconds more on the clock than in itself."""

    def __init__(self, planned: Planned | None, clips: BucketSampler, steps: int, done: int = 0) -> None:
        self.clock = Clock()
        self.forecast = Forecast(planned, clips, steps, self.clock)
        self.forecast.begin(BLOCK)
        self.done = done

    def step(
        self,
        bucket: Bucket,
        seconds: float,
        memory: MemoryStrategy = BLOCK,
        whole: bool = True,
        between: float = 0.0,
    ) -> float | None:
        """What is left after it."""
        self.clock.now += seconds + between
        self.forecast.add(bucket, seconds, memory, whole)
        self.done += 1
        return self.forecast.left(self.done)


def sampler(*stages: tuple[int, dict[Bucket, int]]) -> BucketSampler:
    """A curriculum: from which step on, how many clips of which bucket."""
    entries = [
        Entry(f"{first}-{bucket}-{index}", "", "t", bucket, (first + 1,), f"{index}", "", "", "train")
        for first, clips in stages
        for bucket, count in clips.items()
        for index in range(count)
    ]
    return BucketSampler(entries, [(first, first + 1) for first, _ in stages], seed=0, global_batch_size=1)


ONE = sampler((0, {LONG: 3}))
CURRICULUM = sampler((0, {SHORT: 2}), (4, {LONG: 2}))


def test_a_strategy_is_found_whatever_its_budget_and_fallbacks() -> None:
    given = MemoryStrategy(budget="24GiB", activation_offload="host", fallbacks=(BLOCK,))
    assert PLANNED.under(given) is PLANNED.strategies[1]
    assert PLANNED.under(MemoryStrategy(slices=4)) is None


def test_a_bucket_that_the_plan_does_not_know_takes_as_long_as_the_largest() -> None:
    assert PLANNED.strategies[0].seconds(SHORT) == 4.0
    assert PLANNED.strategies[0].seconds((81, 480, 832)) == 10.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(41.3, "41 s"), (10.0, "10 s"), (7.16, "7.2 s"), (0.0523, "0.052 s"), (1234.0, "1234 s")]
)
def test_a_plan_in_words_has_its_peak_and_its_seconds(seconds: float, text: str) -> None:
    planned = Planned((PlannedStrategy(BLOCK, int(18.3 * 2**30), 0, seconds),), {})
    assert planned.described() == f"18.3 GiB on the device, {text} a step"


def test_the_steps_to_come_are_counted_by_stage_and_by_share_of_the_clips() -> None:
    mixed = sampler((0, {SHORT: 3}), (4, {SHORT: 1, LONG: 3}))
    assert upcoming(mixed, 0, 12) == {SHORT: 4 + 2, LONG: 6}
    assert upcoming(mixed, 3, 12) == {SHORT: 1 + 2, LONG: 6}
    assert upcoming(mixed, 8, 12) == {SHORT: 1, LONG: 3}
    assert upcoming(mixed, 0, 3) == {SHORT: 3}
    assert upcoming(mixed, 12, 12) == {}


@pytest.mark.parametrize("clips", [ONE, CURRICULUM, sampler((0, {SHORT: 2, LONG: 4}), (6, {LONG: 1}))])
def test_over_whole_laps_the_counts_are_those_of_the_sampler(clips: BucketSampler) -> None:
    buckets = [clips.batch(step)[0].entry.bucket for step in range(12)]
    assert upcoming(clips, 0, 12) == {bucket: buckets.count(bucket) for bucket in {*buckets}}


def test_the_time_left_is_the_planned_one_until_two_steps_are_measured() -> None:
    run = Made(PLANNED, CURRICULUM, steps=10)
    assert run.forecast.left(0) == 4 * 4.0 + 6 * 10.0
    assert run.step(SHORT, 2.0) == 3 * 4.0 + 6 * 10.0
    assert run.step(SHORT, 2.0) == 2 * 2.0 + 6 * 10.0 * 0.5, "what is measured, and in its ratio what is not yet"


def test_a_bucket_that_was_measured_needs_no_plan() -> None:
    run = Made(PLANNED, CURRICULUM, steps=10, done=2)
    for seconds in (2.0, 2.0):
        run.step(SHORT, seconds)
    assert run.step(LONG, 30.0) == pytest.approx(5 * 10.0 * 0.5), "one step may be an outlier"
    assert run.step(LONG, 20.0) == pytest.approx(4 * 25.0)


def test_a_single_slow_step_does_not_move_the_median() -> None:
    run = Made(PLANNED, ONE, steps=10)
    left = [run.step(LONG, seconds) for seconds in (9.0, 9.0, 90.0, 9.0)]
    assert left[-1] == pytest.approx(6 * 9.0)


def test_time_between_steps_is_expected_to_come_again() -> None:
    run = Made(PLANNED, ONE, steps=4)
    run.step(LONG, 10.0, between=5.0)
    assert run.step(LONG, 10.0, between=5.0) == pytest.approx(2 * 15.0)


def test_without_a_plan_the_time_left_is_known_after_two_steps() -> None:
    run = Made(None, CURRICULUM, steps=10)
    assert run.forecast.left(0) is None
    assert run.step(SHORT, 2.0) is None
    assert run.step(SHORT, 4.0) == pytest.approx(8 * 3.0)
    assert run.forecast.fields(2, SHORT) == {
        "planned_peak_bytes": None,
        "planned_step_seconds": None,
        "eta_seconds": pytest.approx(24.0),
    }
    assert run.forecast.comparison(MIB) is None


def test_after_a_fallback_its_own_plan_counts_and_the_steps_before_do_not() -> None:
    run = Made(PLANNED, ONE, steps=10)
    run.step(LONG, 20.0)
    run.step(LONG, 20.0)
    assert run.step(LONG, 70.0, OFFLOADED, whole=False) == 7 * 12.0
    assert run.forecast.fields(3, LONG) == {
        "planned_peak_bytes": 700 * MIB,
        "planned_step_seconds": 12.0,
        "eta_seconds": 7 * 12.0,
    }
    run.step(LONG, 24.0, OFFLOADED)
    assert run.step(LONG, 24.0, OFFLOADED) == pytest.approx(5 * 24.0)
    assert run.forecast.comparison(MIB) is None, "the peak is that of the strategy that failed"
    run.step(LONG, 5.0, MemoryStrategy(slices=16))
    assert run.forecast.fields(6, LONG) == {
        "planned_peak_bytes": None,
        "planned_step_seconds": None,
        "eta_seconds": None,
    }


def test_planned_stands_beside_measured_once_two_steps_are_made() -> None:
    run = Made(PLANNED, CURRICULUM, steps=10)
    run.step(SHORT, 3.0)
    assert run.forecast.comparison(800 * MIB) is None
    run.step(SHORT, 3.0)
    said = "device peak 800.0 MiB (planned 900.0 MiB), 3 s a step (planned 4 s)"
    assert run.forecast.comparison(800 * MIB) == said
    assert run.forecast.comparison(800 * MIB) is None


def start(
    scene: Scene, config: RunConfig, planned: Planned | None, resume: bool = False, said: Recorder | None = None
) -> tuple[Path, Recorder]:
    said = said or Recorder()
    scene.prepare(config)
    return train(config, resume, said, planned), said


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / FILE) if "loss" in line]


def test_a_planned_run_writes_the_plan_and_says_it_beside_what_it_measures(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    memory = {"budget": "1GiB", "fallbacks": ({"activation_offload": "host"},)}
    run, said = start(scene, scene.config(tmp_path / "run", memory=memory), PLANNED)
    assert json.loads((run / PLAN).read_text()) == PLANNED.report
    assert said.having("budget: ") == ["budget: 1.0 GiB (a CPU run is not held to it, but planned to stay below it)"]
    assert said.having("planned: ") == ["planned: 900.0 MiB on the device, 10 s a step"]
    (comparison,) = said.having("after step 2: device peak ")
    assert "(planned 900.0 MiB), " in comparison
    assert comparison.endswith(" a step (planned 4 s)")
    lines = steps_of(run)
    assert [line["planned_peak_bytes"] for line in lines] == [900 * MIB] * 2
    assert [line["planned_step_seconds"] for line in lines] == [4.0] * 2
    assert [line["eta_seconds"] for line in lines] == [4.0, 0.0]


def test_what_is_computed_does_not_depend_on_the_plan(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    run, _ = start(scene, scene.config(tmp_path / "planned", memory={"budget": "1GiB"}), PLANNED)
    plain, said = start(scene, scene.config(tmp_path / "plain"), None)
    assert (run / "adapter.safetensors").read_bytes() == (plain / "adapter.safetensors").read_bytes()
    assert not (plain / PLAN).exists()
    assert not said.having("planned")
    assert [line["planned_peak_bytes"] for line in steps_of(plain)] == [None, None]


def test_a_budget_below_the_plan_is_not_said_to_hold(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    _, said = start(scene, scene.config(tmp_path / "run", memory={"budget": "800MiB"}), PLANNED)
    assert said.having("budget: ") == ["budget: 800.0 MiB (a CPU run is not held to it)"]


def test_a_resumed_run_takes_the_new_plan(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    training = {"steps": 1, "schedule": "constant"}
    start(scene, scene.config(tmp_path / "run", training=training), PLANNED)
    again = Planned((PlannedStrategy(OFFLOADED, 600 * MIB, 0, 3.0),), {"chosen": 1})
    config = scene.config(tmp_path / "run", training={**training, "steps": 2}, memory={"activation_offload": "host"})
    run, _ = start(scene, config, again, resume=True)
    assert json.loads((run / PLAN).read_text()) == {"chosen": 1}
    assert [line["planned_peak_bytes"] for line in steps_of(run)] == [900 * MIB, 600 * MIB]


def test_after_running_out_of_memory_the_fallbacks_plan_is_recorded(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    fallbacks = ({"activation_offload": "host"}, {"slices": 2})
    config = scene.config(
        tmp_path / "run",
        training={"steps": 4, "micro_batch_size": 2},
        memory={"fallbacks": fallbacks},
    )
    with FailingAllocator([Failure(1, 0, "forward"), Failure(2, 0, "forward")]).installed() as said:
        run, _ = start(scene, config, PLANNED, said=said)
    assert [line["planned_peak_bytes"] for line in steps_of(run)] == [900 * MIB, 700 * MIB, None, None]
    assert not said.having("after step")
