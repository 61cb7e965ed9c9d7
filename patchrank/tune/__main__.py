"""`python -m patchrank.tune SWEEP [key=value ...]`."""

from __future__ import annotations

import sys

from patchrank.utils.command import create_parser, run_command

DESCRIPTION = """Runs a sweep: plans, makes golden shards, runs what is missing with Ray Tune, writes the report.

  python -m patchrank.tune sweeps/locations.yaml
  python -m patchrank.tune sweeps/locations.yaml trial.pruning.keep_rate=0.5
  python -m patchrank.tune sweeps/locations.yaml --quick
  python -m patchrank.tune sweeps/pareto.yaml --best "gmacs<=0.03"

Running again does only what is missing. Exit status: 0 done, 1 a trial failed, 2 bad input, 130 interrupted."""


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
    args = parser.parse_intermixed_args(argv)
    run_command(lambda: _run(**vars(args)))


def _run(sweep: str, **options) -> int:
    """Runs a sweep with the command's flags; returns the exit status."""
    print(f"reading {sweep} ...", file=sys.stderr, flush=True)  # the imports below take seconds

    from patchrank.tune.driver import run_sweep

    return run_sweep(sweep, **options).exit_code


if __name__ == "__main__":
    main()
