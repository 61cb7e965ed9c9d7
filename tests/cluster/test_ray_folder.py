"""A TMPDIR as Slurm makes them, with a Ray for real."""

import os

import pytest
from helpers.small_sweep import rows, run, write_sweep


@pytest.mark.slow
def test_a_sweep_runs_where_tmpdir_is_too_long_for_rays_sockets(tmp_path):
    write_sweep(tmp_path, "seed: {grid: [0]}")
    slurm = tmp_path / "scratch/slurm/job.1234567" / ("a-long-name-" * 8)
    slurm.mkdir(parents=True)
    environment = {"TMPDIR": str(slurm)} | ({"RAY_TMPDIR": ""} if "RAY_TMPDIR" in os.environ else {})
    said = run(tmp_path, **environment)
    assert "Ray cannot keep its session there" in said and len(rows(tmp_path)) == 1
