"""`python -m patchrank` lists the stages; with the name of one it runs it, as does the command `patchrank`."""

from __future__ import annotations

import os
import runpy
import sys

from patchrank.utils.command import run_command
from patchrank.utils.errors import UserError, near

STAGES = {
    "tune": "runs a sweep: scores, fits, tunes and evaluates what is missing, and writes a report",
    "recipe": "prunes a model of your own to a budget, from unlabelled images; writes a folder",
    "golden": "phase I: scores the patches of images by what their removal does to the embedding",
    "fit": "phase II: fits a predictor of the patches' ranking to golden scores",
    "repair": "solves a pruned tower's projection anew, from unlabelled images and in closed form",
    "prompt": "phase III: tunes prompts of both towers, with patches dropped",
    "evaluate": "measures accuracy, agreement, cosine and MACs with patches dropped",
    "benchmark": "measures milliseconds of an image, pruned and whole, of one tower or many methods",
    "export": "writes a pruned tower as one ONNX or torch.export file, and checks such files",
    "retrieval": "measures how search results change when queries come from a pruned tower",
    "visualize": "draws which patches each ranking keeps of an image",
    "report": "gathers the reports of finished sweeps under one index",
    "pretrain": "makes the embedded model's weights anew",
}


def main() -> None:
    """Runs the stage that the first argument names, just as `python -m patchrank.STAGE` would; without one, lists all.

    The process ends with the exit status of the stage, or 2 if there is no such stage.
    """
    run_command(_run_stage)


def _run_stage() -> int:
    stage, rest = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if stage in ("-h", "--help"):
        print("usage: patchrank STAGE ...     or     python -m patchrank.STAGE ...\n")
        print("stages, each with --help and an example:")
        for name, what in STAGES.items():
            print(f"  {name:10} {what}")
        return 0
    if stage not in STAGES:
        raise UserError(f"stage {stage!r} does not exist; {near(stage, STAGES)}")
    sys.argv[1:] = rest
    if os.getcwd() not in sys.path:  # `python -m` looks for modules here as well, such as those a sweep imports
        sys.path.insert(0, os.getcwd())
    runpy.run_module(f"patchrank.{stage}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    main()
