"""How far 20 steps under each engine, on two ranks and on four, end from the same 20 steps in one process.

    python benchmarks/engines.py
    python benchmarks/engines.py --ranks 4

A row has the greatest relative difference of a loss and of a gradient's norm, and the greatest difference of a trained
weight after the last step; the last table has the greatest of each engine's rows. The exit status says whether all are
within the bounds of `tests/engine_cases.py`, which has the cases. Engines differ in the order of sums, so that on
another machine the numbers are others of the same size.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"


def greatest(found: list[Any]) -> dict[tuple[int, str], dict[str, tuple[float, float]]]:
    """(ranks, engine) -> precision -> the greatest differences of a loss and of a weight."""
    rows: dict[tuple[int, str], dict[str, tuple[float, float]]] = {}
    for each in found:
        row = rows.setdefault((each.outcome.ranks, each.case.engine), {})
        loss, weight = row.get(each.case.precision, (0.0, 0.0))
        row[each.case.precision] = max(loss, each.loss), max(weight, each.weight)
    return rows


def main() -> int:
    """Reads the command line and prints the tables."""
    sys.path.append(str(TESTS))
    from engine_cases import compared, matrix

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", type=int, choices=(2, 4), nargs="+", default=[2, 4])
    parser.add_argument("--seconds", type=float, default=5400, help="that one group of ranks may take")
    options = parser.parse_args()
    print("| ranks | engine and training | loss | norm | weight | |")
    print("|--:|---|--:|--:|--:|---|")
    found = []
    for ranks in options.ranks:
        for each in compared(ranks, matrix(ranks), options.seconds):
            numbers = " | ".join(f"{value:.1e}" for value in (each.loss, each.norm, each.weight))
            print(f"| {ranks} | {each.case} | {numbers} | {'' if each.agrees else 'outside'} |", flush=True)
            found.append(each)
    print("\n| ranks | engine | loss, fp32 | weight, fp32 | loss, bf16 | weight, bf16 |")
    print("|--:|---|--:|--:|--:|--:|")
    for (ranks, engine), row in greatest(found).items():
        numbers = " | ".join(f"{value:.1e}" for precision in ("fp32", "bf16") for value in row[precision])
        print(f"| {ranks} | {engine} | {numbers} |")
    return 0 if all(each.agrees for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
