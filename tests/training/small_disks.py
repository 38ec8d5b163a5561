"""A process with a mount namespace of its own that runs the command line in forks, on disks as small as asked for.

It is started by `unshare -rm`. A line is the JSON of a folder, of how many bytes the disk that is mounted there has
(null: none is, and what is there goes), of the arguments, and of where the output goes; the answer is the JSON of the
exit status and of the bytes in use. A disk that is there is made larger. Others see it below
`/proc/<this process>/root`.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from longtake.cli import main


def serve() -> None:
    """Answers each line until the input ends."""
    for line in sys.stdin:
        asked = json.loads(line)
        folder = Path(asked["folder"])
        _mount(folder, asked["bytes"])
        status = _forked(asked["arguments"], Path(asked["output"])) if asked["bytes"] is not None else 0
        print(json.dumps({"status": status, "used_bytes": shutil.disk_usage(folder).used}), flush=True)


def _mount(folder: Path, size: int | None) -> None:
    if size is None:
        command = ["umount", str(folder)]
    elif os.path.ismount(folder):
        command = ["mount", "-o", f"remount,size={size}", str(folder)]
    else:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(command, check=True)


def _forked(arguments: list[str], output: Path) -> int:
    child = os.fork()
    if child == 0:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os._exit(_run(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(arguments: list[str]) -> int:
    sys.argv = ["longtake", *arguments]
    try:
        main()
    except SystemExit as left:
        sys.stderr.flush()
        return left.code if isinstance(left.code, int) else 0
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    # one whole run here, so that what is imported late is there before the first fork
    first = sys.argv[1]
    for command in ("prepare", "train"):
        with contextlib.redirect_stdout(sys.stderr):
            assert _run([command, first]) == 0
    print(json.dumps("ready"), flush=True)
    serve()
