"""What a publisher says about a model: settings of ``dprandp export``, none of which changes the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dprandp.config.settings import OUTPUT, setting


@dataclass(frozen=True)
class Publication:
    """What an export states on the model card, in config.json and in the metadata of a graph. Public."""

    title: str | None = setting(None, "Title of the model card.", True, panel=OUTPUT, metavar="TEXT", line=True,
                                otherwise="image classifier for the data set's title")  # fmt: skip
    license: str | None = setting(
        None, "Licence of the exported model: an identifier such as mit or cc-by-4.0, or a sentence.", True,
        panel=OUTPUT, metavar="TEXT", line=True, otherwise="none stated",
    )  # fmt: skip
    contact: str | None = setting(None, "Who answers questions about the model.", True, panel=OUTPUT, metavar="TEXT",
                                  line=True, otherwise="none stated")  # fmt: skip
    intended_use: str | None = setting(None, "What the model is for, in a sentence.", True, panel=OUTPUT,
                                       metavar="TEXT", line=True, otherwise="none stated")  # fmt: skip

    def said(self) -> dict[str, str]:
        """What was given, by name."""
        return {name: text for name, text in dataclasses.asdict(self).items() if text is not None}
