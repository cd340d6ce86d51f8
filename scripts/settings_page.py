"""Write ``docs/settings.md``: every setting of every stage, from its declaration in ``dprandp/config/schema.py``.

    python scripts/settings_page.py > docs/settings.md
"""

from __future__ import annotations

import dataclasses

from dprandp.config.declared import Publication
from dprandp.config.schema import STAGE_CONFIGS, default_text
from dprandp.config.settings import SLIP, Setting, choices_of, plain_type, settings_of, types_of

HEAD = """# Settings

Every setting of every stage. Each can stand in the stage's table of a `--config FILE.toml`; those with a flag can be
given on the command line, which overrides the file. This page is made from the declarations
(`python scripts/settings_page.py`).
"""

PUBLICATION = """What a publisher says about a model, on its card, in config.json and in the metadata of a graph. These
are flags of one command, and stand in no configuration file.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for stage, kind in STAGE_CONFIGS.items():
        parts += [f"## `[{stage}]`\n", str(kind.__doc__).splitlines()[0] + "\n", table(kind, stage)]
    parts += ["## `dprandp export`\n", PUBLICATION, table(Publication, None)]
    return "\n".join(parts)


def table(kind: type, stage: str | None) -> str:
    """The settings of a stage, or of a kind that belongs to none."""
    rows = ["| setting | flag | values | default | what it is |", "|---|---|---|---|---|"]
    for name, made in settings_of(kind).items():
        flag = f"`{made.flag}`" if made.flag else "`--size`" if name == "size" else ""
        default = (made.otherwise if stage is None else default_text(stage, name)) or default_of(kind, name)
        cells = (f"`{name}`", flag, values(types_of(kind)[name], made), default, made.help)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def default_of(kind: type, name: str) -> str:
    """Of a setting whose help states no default."""
    value = next(field.default for field in dataclasses.fields(kind) if field.name == name)
    return "no" if value is False else "none"


def values(hint: object, made: Setting) -> str:
    """Type, choices and range in words."""
    if choices := choices_of(hint):
        return ", ".join(f"`{choice}`" for choice in choices)
    words = {int: "whole number", float: "number", bool: "true, false", str: "text"}[plain_type(hint)]
    low = f"above {made.above:g}" if made.above is not None else None if made.low is None else f"{made.low:g} or more"
    high = f"below {made.below:g}" if made.below is not None else None
    if made.most is not None and made.most < SLIP:
        high = f"at most {made.most:g}"
    return ", ".join(filter(None, (words, low, high)))


if __name__ == "__main__":
    print(page(), end="")
