"""A finished sweep with made-up rows, for tests of reports."""

from __future__ import annotations

import json

import numpy as np

from patchrank.config import ReportConfig, TrialConfig
from patchrank.report import write_report
from patchrank.report.results import read_settings, read_trial
from patchrank.report.table import main_table

TASKS = ["digits", "digits_ink"]
DIGITS, SCENES, ORACLE = 40, 3, 40  # the oracles see one scene of every digit
CREDITS = dict.fromkeys(("digits", "digits_full", "digits_ink"), "Photographs by somebody.")
LOSSES = {"predictor": 0, "golden": 0, "prior": 4, "random": 12, "center": 6, "cls_attention": 3}


class Run:
    """A sweep's folder with made-up rows: `lost` of each task's 120 images turn wrong, all others stay right.

    Tasks whose names begin with "digits" show digits, images of others stand for themselves.
    """

    def __init__(self, root):
        self.root, self.rows = root, []
        (root / "trials").mkdir(parents=True)

    def add(self, lost=None, tasks=TASKS, controls=(), seed=0, seen=None, **settings):
        config = TrialConfig(pruning={"keep_rate": 0.6}).model_dump() | {"seed": seed}
        config["data"] |= {"tasks": list(tasks)}
        for path, value in settings.items():
            section, _, key = path.partition("__")
            config[section] = (config[section] or {}) | ({key: value} if key else value)
        lost = LOSSES[config["pruning"]["reducer"]] if lost is None else lost
        arrays = {"grid": np.array([4, 4])}
        for task in tasks:
            arrays |= {f"{task}.{name}": value for name, value in self._task(task, config, lost, controls).items()}
        name = f"{len(self.rows):04d}"
        np.savez(self.root / "trials" / f"{name}.npz", **arrays)
        self.rows.append(self._row(name, config, arrays))
        if seen:
            self.rows[-1]["metrics"] |= dict(zip(("n_prompt_images", "n_seen_images", "n_seen_labels"), seen))

    def _task(self, task, config, lost, controls):
        n = ORACLE if config["pruning"]["reducer"] == "golden" else DIGITS * SCENES
        right = np.arange(n) >= 6  # the first 6 images are wrong, pruned or not
        kept = right & (np.arange(n) < n - lost)
        found = {"cosine": np.full(n, 0.99), "right_unpruned": right, "right_pruned": kept}
        found |= {f"right_{name}": np.arange(n) < n // 2 for name in controls}
        found |= self._images(task, "test/", "", n) | self._images(task, "val/", "val_", 20)
        pictures = np.full((6, 16, 16, 3), 200, np.uint8)
        return found | {"pictures": pictures, "pictures_kept": np.tile(np.arange(8), (6, 1))}

    def _images(self, task, folder, prefix, count):
        """Ids, and what images are drawn by, as trials save it."""
        names = [f"{task}/{folder}{n % DIGITS:04d}-{n // DIGITS}" for n in range(count)]
        groups, unit = [f"{task}/{name}" for name in names], "image"
        if task.startswith("digits"):
            groups, unit = [f"digit/{folder}{n % DIGITS:04d}" for n in range(count)], "digit"
        return {f"{prefix}ids": np.array(names), f"{prefix}groups": np.array(groups), f"{prefix}unit": np.array(unit)}

    def _row(self, name, config, arrays):
        share = {key: 100 * np.mean([arrays[f"{task}.{key}"].mean() for task in config["data"]["tasks"]])
                 for key in ("right_pruned", "right_unpruned")}  # fmt: skip
        metrics = {"accuracy": share["right_pruned"], "accuracy_unpruned": share["right_unpruned"]}
        metrics |= {"agreement": 98.0, "cosine": 0.99, "gmacs": 0.034, "gmacs_unpruned": 0.0456, "n_val": 128}
        metrics |= {"gmacs_predictor": 0.0003, "n_train": 256, "val_accuracy": 95.5, "val_accuracy_unpruned": 96.5}
        if config["pruning"]["reducer"] == "predictor":
            metrics |= {"matching_rate": 80.0, "matching_prior": 70.0, "matching_chance": 51.5625, "kendall": 0.5}
        env = {"patchrank": "0.1.0", "torch": "2", "device": "cpu", "threads": 1}
        row = {"id": name, "sweep": "made-up", "date": "2026-11-22", "config": config, "metrics": metrics, "env": env}
        return json.loads(json.dumps(row))  # as it comes from disk

    def settings(self):
        return read_settings([read_trial(str(self.root), row) for row in self.rows])

    def table(self, axes, paper=None):
        """Head, and rows as mappings from the head's cells."""
        lines = main_table(self.settings(), axes, paper).splitlines()
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert {len(row) for row in rows} == {len(head)}
        return head, [dict(zip(head, row)) for row in rows]

    def report(self, axes, command="sweeps/made-up.yaml", table="made-up", unfinished=0, **config):
        config = ReportConfig(table=table, **config)
        return write_report(self.rows, str(self.root), config, axes, command, unfinished, credits=CREDITS)
