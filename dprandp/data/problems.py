"""All that is wrong with a data set, found and told together: kinds and counts in public, names in private."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dprandp.errors import InputError


@dataclass(frozen=True)
class Problem:
    """One file, or one list, that cannot be used.

    Attributes:
        what: "train images", say. kind: what is wrong, such as "16-bit". fix: what to do.
        where: the file's name and more; private.
    """

    what: str
    kind: str
    fix: str
    where: str

    @classmethod
    def of(cls, error: InputError) -> Problem:
        """An error that was raised for a data set as a whole."""
        return cls("", error.problem, error.fix, error.private_detail or "")


class UnusableData(InputError):
    """Raised with every problem of a data set.

    Args:
        name: of the data set. problems: at least one.
        names_in: the private file that lists the names, if there is one.
    """

    def __init__(self, name: str, problems: Sequence[Problem], names_in: str | None = None) -> None:
        self.name, self.problems = name, tuple(problems)
        kinds = Counter((each.what, each.kind, each.fix) for each in problems)
        lines = []
        for (what, kind, fix), count in kinds.most_common():
            lines.append(f"  {f'{count} of the {what}: ' if what else ''}{kind}\n      {fix}")
        names = f"{names_in} names the files" if names_in else "--debug names the files"
        super().__init__(
            f"{name} cannot be used as it is\n" + "\n".join(lines),
            fix=f"mend what is listed, all at once; {names} (keep that private)",
            private_detail=listed(problems),
        )


def listed(problems: Sequence[Problem]) -> str:
    """A line for each problem, with the private name first."""
    return "\n".join(f"{each.where}: {f'{each.what}: ' if each.what else ''}{each.kind}" for each in problems)
