"""A rank that is refused one start after the other: of the run in `<argument>/host-<rank>`, its working directory."""

import os
import sys
from pathlib import Path

from longtake.config.load import load_config
from longtake.distributed.ranks import joined
from longtake.errors import LongtakeError
from longtake.models.libraries import quiet_libraries
from longtake.progress import Reporter
from longtake.training.run import train


def main() -> None:
    """Goes through them in one group of ranks; the first one says of each how it ended."""
    quiet_libraries()
    sys.path.insert(0, "/proc/self/cwd/libraries")  # where one may have libraries of its own
    with joined() as ranks:
        for scene in sys.argv[1:]:
            os.chdir(Path(scene) / f"host-{ranks.rank}")
            try:
                config = ranks.each(lambda: load_config(Path("run.toml")))
                train(config, False, Reporter(quiet=True), None, ranks)
                ended = ["no error"]
            except LongtakeError as error:
                ended = [f"{error.exit_status} {problem}" for problem in error.problems]
                if not error.agreed:  # the command line would say it on each rank
                    raise
            for line in ended if ranks.is_first else []:
                print(f"{Path(scene).name}: {line}", flush=True)


if __name__ == "__main__":
    main()
