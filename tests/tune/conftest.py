import pytest
import ray
from helpers.small_sweep import plan_of, write_record

from patchrank.tune.__main__ import main


@pytest.fixture
def plan(tmp_path):
    """Five trials, of which one is done and one has failed."""
    plan = plan_of(tmp_path, "pruning.keep_rate: {grid: [0.9, 0.8, 0.7, 0.6, 0.5]}")
    write_record(plan, {"pruning.keep_rate": 0.9})
    error = "RuntimeError: no patch\nis good enough\n"
    write_record(plan, {"pruning.keep_rate": 0.8}, ".error", status="error", error=error)
    plan.refresh()
    return plan


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command in the sweep's folder, where it must start no Ray; what it printed, or its error."""

    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("Ray was started"))
        with pytest.raises(SystemExit) as ended:
            main(["sweep.yaml", *arguments])
        said = capsys.readouterr()
        assert ended.value.code == code, said
        return said.err if code else said.out

    return run
