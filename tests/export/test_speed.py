"""Speed: every file and every tower really runs, in turns, and on as many threads as the others."""

from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_exports import create_tower, pair_of, write_pt2

from patchrank.export import program_file, speed
from patchrank.export.answers import open_file
from patchrank.export.onnx_session import OnnxFile
from patchrank.export.speed import time_files

REPEATS, BATCH = 3, 5


@pytest.fixture
def runs(monkeypatch):
    """By path, the shape and type of what each run of a file was given; and sessions as they were made."""
    seen, sessions = {}, []

    class Counted(OnnxFile):
        def __init__(self, path, threads=None):
            super().__init__(path, threads)
            self.path = path
            sessions.append(self.session)

        def run(self, images):
            seen.setdefault(self.path, []).append((images.shape, str(images.dtype)))
            return super().run(images)

    real = program_file.load

    def load(path):
        module = real(path)
        module.register_forward_pre_hook(
            lambda _, args: seen.setdefault(path, []).append((tuple(args[0].shape), str(args[0].dtype)))
        )
        return module

    monkeypatch.setattr(speed, "OnnxFile", Counted)
    monkeypatch.setattr(program_file, "load", load)
    return seen, sessions


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_file_and_every_tower_runs_on_as_many_threads(answering, runs, two_threads, tmp_path):
    clip = pair_of(create_tower("center", depth=1, locations=(1,)))
    pt2 = write_pt2(tmp_path / "tower.pt2", clip, uint8=True)
    paths, clips = (answering.onnx, answering.int8, pt2), {pt2: clip, answering.onnx: answering.clip}
    files = [SimpleNamespace(path=path, about=open_file(path)[1]) for path in paths]
    (seen, sessions), towers = runs, []
    seen.clear()
    for each in (clip, answering.clip):
        each.visual.register_forward_pre_hook(lambda tower, args: towers.append(torch.get_num_threads()))
    rows = time_files(files, clips | {answering.int8: answering.clip}, BATCH, REPEATS, quiet=True)
    assert [row["file"] for row in rows[:3]] == list(paths) and len(rows) == 5
    assert {len(given) for given in seen.values()} == {len(towers) // 2} and len(towers) >= 2 * REPEATS
    floats, pixels = ((BATCH, 3, 32, 32), "float32"), ((BATCH, 32, 32, 3), "torch.uint8")
    assert {path: set(given) for path, given in seen.items()} == dict(zip(paths, ({floats}, {floats}, {pixels})))
    assert [session.get_session_options().intra_op_num_threads for session in sessions] == [2, 2]
    assert set(towers) == {2}
