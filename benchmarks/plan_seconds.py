"""How long planning takes, and how much host memory: the full search for one bucket, and for twenty.

    python benchmarks/plan_seconds.py

Each repetition is a process of its own: it imports diffusers' Wan class and peft, which any program that trains Wan has
to, and then plans. The numbers are medians of three.
"""

import argparse
import json
import subprocess
import sys
import time
from statistics import median

MODEL, GPU = "wan2.1-i2v-14b-480p", "h100-sxm"
SIZE = (480, 832)
LONGEST = 129
REPETITIONS = 3
BUDGETS = (None, 16)
"""GiB; None is the whole device."""
MOST_SECONDS, MOST_MORE, MOST_BYTES = 5.0, 25.0, 1.5 * 2**30
GIB = 2**30


def child(budget: int | None, buckets: int) -> dict[str, float]:
    """Seconds of the imports and of the plan, and the process's greatest resident size, in this process."""
    began = time.perf_counter()
    from longtake.models.libraries import quiet_libraries

    quiet_libraries()
    import peft  # noqa: F401
    from diffusers import WanTransformer3DModel  # noqa: F401

    imported = time.perf_counter()
    from longtake.config.schema import LoraConfig, TrainingConfig
    from longtake.memory_gauge import peak_resident
    from longtake.models.wan.variants import variant
    from longtake.planner.candidates import Freedom
    from longtake.planner.hardware import DEVICES
    from longtake.planner.machine import Machine
    from longtake.planner.meta_model import Subject
    from longtake.planner.planning import Request, plan

    device = DEVICES[GPU]
    bytes_ = device.memory_bytes if budget is None else budget * GIB
    machine = Machine(device, 1, bytes_, 128 * GIB, 512 * GIB)
    shapes = tuple((LONGEST - 4 * index, *SIZE) for index in range(buckets))
    subject = Subject(variant(MODEL), LoraConfig(), TrainingConfig())
    report = plan(Request(subject, machine, shapes, Freedom()))
    assert report.chosen is not None
    assert buckets == 1 or len(report.plans[0].buckets) == buckets
    planned = time.perf_counter()
    # not ru_maxrss, which begins with what the process had that started this one
    return {"imports": imported - began, "plan": planned - imported, "bytes": peak_resident()}


def measured(budget: int | None, buckets: int) -> dict[str, float]:
    """Medians over new processes."""
    command = [sys.executable, __file__, "--child", str(budget or 0), str(buckets)]
    found = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(REPETITIONS)
    ]
    return {key: median(each[key] for each in found) for key in found[0]}


def main() -> None:
    """Prints the table; the exit status is 1 where a bound is exceeded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--child", nargs=2, type=int)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0] or None, options.child[1])))
        return
    print(f"{MODEL}, LoRA r32, {LONGEST} frames of {SIZE[1]}x{SIZE[0]}, {GPU}; medians of {REPETITIONS}\n")
    print("| budget | buckets | imports, s | plan, s | peak, GiB |")
    print("|---|--:|--:|--:|--:|")
    good, one = True, 0.0
    for budget, buckets in [*((budget, 1) for budget in BUDGETS), (16, 20)]:
        row = measured(budget, buckets)
        one = row["plan"] if buckets == 1 else one
        most = MOST_SECONDS if buckets == 1 else one + MOST_MORE
        good = good and row["plan"] <= most and row["bytes"] <= MOST_BYTES
        shown = f"{row['imports']:.2f} | {row['plan']:.2f} | {row['bytes'] / GIB:.2f}"
        print(f"| {f'{budget} GiB' if budget else 'the whole device'} | {buckets} | {shown} |", flush=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()
