"""Litter: what programs leave in folders unasked. It is never data, and is ignored wherever a folder is listed.

Nothing else is ignored silently. In particular unfinished downloads (``scan.png.part``) are no litter: they stand for
an image that should be there, and N must be right.
"""

from __future__ import annotations

_NAMES = frozenset(
    {
        "thumbs.db", "ehthumbs.db", "desktop.ini",  # Windows Explorer: thumbnails, folder settings
        "$recycle.bin", "system volume information",  # Windows: on every drive
        "__macosx", "icon\r",  # macOS: resource forks in a zip archive, a folder's own icon
        "@eadir", "#recycle", "@recycle",  # Synology and QNAP: thumbnails, deleted files
        "lost+found",  # ext4: at the root of a disk
    }
)  # fmt: skip


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is litter; what lies in a folder that is litter is litter, too.

    Beside the names above these are names that begin with a dot (``.DS_Store``, ``._scan.png`` of macOS,
    ``.ipynb_checkpoints``, ``.git``, ``.syncthing.scan.png.tmp``), that begin with ``~$`` (lock files of office
    programs), and that end with a tilde (back-up copies of editors).

    Args:
        name: of the file or folder alone, without its path. Upper and lower case are the same.
    """
    return name.startswith((".", "~$")) or name.endswith("~") or name.lower() in _NAMES
