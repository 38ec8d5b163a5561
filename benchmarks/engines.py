"""How far 20 steps under each engine, on two ranks and on four, end from the same 20 steps in one process.

    python benchmarks/engines.py
    python benchmarks/engines.py --ranks 4

A row has the greatest relative difference of a loss and of a gradient's norm, and the greatest difference of a trained
weight after the last step. The exit status says whether all are within the bounds of `tests/engine_cases.py`, which has
the cases. Engines differ in the order of sums, so that on another machine the numbers are others of the same size.
"""

import argparse
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"


def main() -> int:
    """Reads the command line and prints the table."""
    sys.path.append(str(TESTS))
    from engine_cases import compared, matrix

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", type=int, choices=(2, 4), nargs="*", default=[2, 4])
    parser.add_argument("--seconds", type=float, default=5400, help="that one group of ranks may take")
    options = parser.parse_args()
    print("| ranks | engine and training | loss | norm | weight | |")
    print("|--:|---|--:|--:|--:|---|")
    outside = 0
    for ranks in options.ranks:
        for each in compared(ranks, matrix(ranks), options.seconds):
            numbers = " | ".join(f"{value:.1e}" for value in (each.loss, each.norm, each.weight))
            print(f"| {ranks} | {each.case} | {numbers} | {'' if each.agrees else 'outside'} |", flush=True)
            outside += not each.agrees
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
