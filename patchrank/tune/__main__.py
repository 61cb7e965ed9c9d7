"""`python -m patchrank.tune SWEEP [key=value ...]`."""

from __future__ import annotations

import sys

from patchrank.utils.command import create_parser, run_command
from patchrank.utils.errors import UserError

DESCRIPTION = """Runs a sweep: plans, makes golden shards, runs what is missing with Ray Tune, writes the report.

  python -m patchrank.tune sweeps/locations.yaml
  python -m patchrank.tune sweeps/locations.yaml trial.pruning.keep_rate=0.5
  python -m patchrank.tune sweeps/locations.yaml --quick
  python -m patchrank.tune sweeps/pareto.yaml --best "gmacs<=0.03"
  python -m patchrank.tune sweeps/locations.yaml --status       (from another shell or machine, while it runs)
  python -m patchrank.tune sweeps/locations.yaml --stop 3fa9

Running again does only what is missing. Exit status: 0 done, 1 a trial failed, 2 bad input, 130 interrupted."""
OF_RUNS = ("fresh", "dry_run", "address", "wait", "dashboard", "best", "out")  # flags that go with no mere look


def main(argv: list[str] | None = None) -> None:
    parser = create_parser("tune", DESCRIPTION)
    parser.add_argument("sweep", help="sweep file, or the name of one that ships (locations, scores, ...)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, values read as YAML")
    parser.add_argument("--quick", action="store_true", help="a smoke run on few images, in a folder of its own")
    parser.add_argument("--fresh", action="store_true", help="ignore the records of earlier runs")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and what it takes, and stop")
    parser.add_argument("--address", help="Ray cluster: auto or host:port (default: RAY_ADDRESS, or none)")
    waiting = "that a cluster may take to get nodes"
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help=waiting)
    parser.add_argument("--dashboard", action="store_true", help="start Ray's dashboard, where Ray is started here")
    parser.add_argument("--best", metavar="BOUNDS", help='write the best model that keeps them, as in "gmacs<=12"')
    parser.add_argument("--out", metavar="FOLDER", help="where --best writes (default: best, below the sweep's root)")
    status = "say what is done, running, failed and best so far; changes nothing"
    parser.add_argument("--status", action="store_true", help=status)
    stop = "end one trial of a running sweep; the beginning of its id will do"
    parser.add_argument("--stop", metavar="ID", help=stop)
    args = parser.parse_intermixed_args(argv)
    run_command(lambda: _run(**vars(args)))


def _run(sweep: str, overrides: list[str], quick: bool, status: bool, stop: str | None, **options) -> int:
    """Runs a sweep, or looks at one, with the command's flags; returns the exit status."""
    print(f"reading {sweep} ...", file=sys.stderr, flush=True)  # the imports below take seconds

    if status or stop is not None:
        return _look(sweep, overrides, quick, status, stop, [name for name in OF_RUNS if options[name]])

    from patchrank.tune.driver import run_sweep

    return run_sweep(sweep, overrides, quick, **options).exit_code


def _look(sweep: str, overrides: list[str], quick: bool, status: bool, stop: str | None, others: list[str]) -> int:
    """Says how a sweep stands, or asks for the end of a trial; `others` are flags that were given beside."""
    flag, others = "--status" if status else "--stop", [*others, *(["stop"] if status and stop is not None else [])]
    if others:
        raise UserError(f"{flag} starts nothing, so --{others[0].replace('_', '-')} does not go with it; leave it out")
    from patchrank.tune.status import print_status
    from patchrank.tune.stop import stop_trial

    return print_status(sweep, overrides, quick) if status else stop_trial(sweep, overrides, quick, stop)


if __name__ == "__main__":
    main()
