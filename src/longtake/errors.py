"""The exceptions that Longtake raises on purpose, and the exit status that each one means."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, where it is, and what to do about it; prints as one line.

    `code` names the kind of problem, and never changes: `longtake explain CODE` says more, from `explanations/`.
    """

    what: str
    where: str = ""
    remedy: str = ""
    code: str = field(default="", kw_only=True)

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        line = f"{line}; {self.remedy}" if self.remedy else line
        line = f"{line} [{self.code}]" if self.code else line
        return " ".join(line.split())


class LongtakeError(Exception):
    """Anything that Longtake refuses or cannot do; `problems` has one entry a line to print."""

    exit_status = 1
    agreed = False
    """Whether every rank raised it, so that one of them has to say it."""

    def __init__(self, problems: Problem | str | Sequence[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def agreed(error: LongtakeError) -> LongtakeError:
    """`error`, which every rank raises."""
    error.agreed = True
    return error


class InputError(LongtakeError):
    """The user's input is wrong: exit status 2."""

    exit_status = 2


class ConfigError(InputError):
    """A config, a flag, or a combination of settings that cannot work."""


class DataError(InputError):
    """Clips, captions or images that cannot be used."""


class ModelError(InputError):
    """A checkpoint or a LoRA file that is damaged, unknown, or of another model."""


class CacheError(InputError):
    """A conditioning cache that is incomplete, damaged, or from other settings."""


class RunError(LongtakeError):
    """A failure at run time (disk full, non-finite loss, interrupted): exit status 1."""


class NothingFits(LongtakeError):
    """No memory strategy fits the budget: exit status 3."""

    exit_status = 3
