"""Where the files of a dataset may lie: in CoOp's folder, in torchvision's, or straight under the root."""

from __future__ import annotations

from dataclasses import dataclass

from patchrank.io import exists, join
from patchrank.utils.errors import UserError


@dataclass(frozen=True)
class Places:
    """The places of one task.

    root: a path or an fsspec URL. folders: the dataset's own folder under the root, CoOp's name for it first.
    """

    task: str
    root: str
    folders: tuple[str, ...]

    def all(self) -> list[str]:
        """Every folder to look into, nearest to CoOp's layout first; the root may be the dataset's own folder."""
        inside = [folder.partition("/")[2] for folder in self.folders]
        return list(dict.fromkeys(join(self.root, *filter(None, [name])) for name in [*self.folders, *inside]))

    def find(self, *names: str, probe: str = "", why: str = "") -> str:
        """The path of a file, or of a folder that holds `probe`; of several names the first that is there.

        A folder is told by what lies in it, since `images` alone may belong to any dataset.

        Raises:
            UserError: it is nowhere; says where it was looked for, and `why` nothing can stand in for it.
        """
        tail = [probe] if probe else []
        for place in self.all():
            for name in names:
                if exists(join(place, name, *tail)):
                    return join(place, name)
        if not exists(self.root):
            raise UserError(f"{self.task}: data.root {self.root!r} does not exist; {how_to_get(self.task)}")
        wanted = " or ".join("/".join([name, *tail]) for name in names)
        looked = ", ".join(self.all())
        raise UserError(f"{self.task}: {wanted} not found, looked for in {looked}{why}; {how_to_get(self.task)}")


def how_to_get(task: str) -> str:
    """Ends a message about files that are missing."""
    return f"docs/data.md#{task} says how to get it"
