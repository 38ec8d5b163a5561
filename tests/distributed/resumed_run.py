"""A rank that trains the runs of its arguments one after the other: `config.toml,resume,step after which it stops`."""

import sys
from pathlib import Path

from longtake.config.load import load_config
from longtake.distributed.ranks import joined
from longtake.errors import RunError
from longtake.models.libraries import quiet_libraries
from longtake.training.run import train
from runs import Recorder, Stopper


def main() -> None:
    """Runs them all in one group of ranks; says of each how it ended."""
    quiet_libraries()
    with joined() as ranks:
        for text in sys.argv[1:]:
            config, resume, stop = text.split(",")
            # on the last rank, so that the others have to hear of it
            stops = int(stop) and ranks.rank == ranks.world - 1
            reporter = Stopper(int(stop)) if stops else Recorder()
            try:
                train(load_config(Path(config)), bool(int(resume)), reporter, None, ranks)
                ended = "done"
            except RunError as error:
                ended = str(error) if error.agreed else "not by all ranks together"
            if ranks.is_first:
                print(f"{Path(config).parent.name}: {ended}", flush=True)


if __name__ == "__main__":
    main()
