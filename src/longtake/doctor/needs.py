"""What training on a dataset's largest bucket needs, by the planner; what is heavy is imported when it is asked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from longtake.config.schema import RunConfig
from longtake.errors import LongtakeError


@dataclass(frozen=True)
class Needs:
    """The plan in one line, or why there is none; `report` is what `longtake plan --json` writes, None without one."""

    line: str
    report: dict[str, Any] | None = None


def needs_of(config: RunConfig, shapes: Sequence[tuple[int, int, int]], gpu: str) -> Needs:
    """The plan for the one of `shapes` (frames, height, width) with the most tokens; `gpu` as `plan` has it."""
    from longtake.models.libraries import quiet_libraries

    quiet_libraries()
    from longtake.planner.planning import plan
    from longtake.planner.report import to_json
    from longtake.planner.request import Where, request_of
    from longtake.planner.words import answer, bucket_words

    try:
        request, _ = request_of(config, Where(gpu), clips=False)
        request = replace(request, buckets=tuple(shapes))
        report = plan(replace(request, buckets=(request.worst,)))
    except LongtakeError as error:
        return Needs(f"no plan: {error.problems[0]}")
    what = f"{bucket_words(report.bucket)} ({report.tokens:,} tokens) on {report.gpus} x {report.gpu}"
    return Needs(f"{what}: {answer(report)}", to_json(report))
