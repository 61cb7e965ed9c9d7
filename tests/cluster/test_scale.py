"""What the driver itself takes: time a trial, memory, and what a second worker is worth. Measured; slow."""

import json
from pathlib import Path

import pytest
from helpers.small_sweep import records, start, wait_for, write_sweep

pytestmark = pytest.mark.slow
RATES = [round(0.2 + 0.03 * n, 2) for n in range(25)]


def rss(pid: int) -> float:
    """Memory of a process, in MiB."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def paces(folder: Path) -> float:
    """Seconds from one record to the next, from the first fifth on, when all workers are warm."""
    times = sorted(records(folder).values())
    first = len(times) // 5
    return (times[-1] - times[first]) / 1e9 / (len(times) - 1 - first)


def test_500_trivial_trials_cost_little_time_and_no_memory(tmp_path):
    write_sweep(tmp_path, f"pruning.keep_rate: {{grid: {RATES}}}\nseed: {{grid: {list(range(20))}}}")
    process, memory = start(tmp_path, "trial.data.n_test=0"), {}
    for count in (100, 200, 300, 400, 490):
        wait_for(lambda count=count: len(records(tmp_path)) >= count, process, seconds=400)
        memory[count] = rss(process.pid)
    assert process.wait(timeout=200) == 0
    found = [json.loads((tmp_path / "runs/small/trials" / name).read_text()) for name in records(tmp_path)]
    work = sum(sum(record["seconds"].values()) for record in found) / len(found)
    overhead = 2 * paces(tmp_path) - work  # two workers
    print(f"\noverhead a trial {overhead:.3f} s (work {work:.3f} s); driver's memory, MiB: {memory}")
    assert overhead <= 0.3
    assert memory[490] - memory[100] < 40


def test_two_workers_are_worth_nearly_twice_one(tmp_path):
    """One worker takes more than half of the CPUs, and still one thread."""
    found = {}
    for workers, cpu in ((1, 1.5), (2, 1.0)):
        folder = tmp_path / str(workers)
        write_sweep(folder, f"seed: {{grid: {list(range(24))}}}", reducer="predictor")
        process = start(folder, f"resources.cpu={cpu}", "trial.predictor.epochs=200", "trial.data.n_train=128")
        assert process.wait(timeout=500) == 0
        found[workers] = paces(folder)
    print(f"\nseconds a trial: {found}; two workers are worth {found[1] / found[2]:.2f}")
    assert found[1] / found[2] > 1.5
