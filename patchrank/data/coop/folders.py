"""Where the files of a dataset may lie: in CoOp's folder for it, in torchvision's, or straight under the root."""

from __future__ import annotations

from dataclasses import dataclass

from patchrank.io import exists, join
from patchrank.utils.errors import UserError


@dataclass(frozen=True)
class DatasetFolders:
    """Where the files of one dataset may lie.

    root: a path or an fsspec URL. names: of the dataset's own folder under the root, CoOp's first.
    """

    task: str
    root: str
    names: tuple[str, ...]

    def all(self) -> list[str]:
        """Every folder to look into, CoOp's first. The root is one, since it may be the dataset's own folder."""
        inside = [name.partition("/")[2] for name in self.names]
        return list(dict.fromkeys(join(self.root, name).rstrip("/") for name in [*self.names, *inside]))

    def find(self, *names: str, probe: str = "", why: str = "") -> str:
        """The path of a file or folder of the dataset; of several names the first that is there.

        Args:
            probe: a file that must lie in the folder, since a folder called `images` may belong to any dataset.
            why: ends the message: why nothing can stand in for the file.

        Raises:
            UserError: it is in none of the folders, which are named.
        """
        for folder in self.all():
            for name in names:
                path = join(folder, name)
                if exists(join(path, probe).rstrip("/")):
                    return path
        if not exists(self.root):
            raise UserError(f"{self.task}: data.root {self.root!r} does not exist; {how_to_get(self.task)}")
        wanted = " or ".join(join(name, probe).rstrip("/") for name in names)
        looked = ", ".join(self.all())
        raise UserError(f"{self.task}: {wanted} not found, looked for in {looked}{why}; {how_to_get(self.task)}")


def how_to_get(task: str) -> str:
    """Ends a message about files that are missing."""
    return f"docs/data.md#{task} says how to get it"
