"""The command's tables: rows, Markdown and pictures, and what it refuses before anything is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from patchrank.benchmark import command, golden_speed, main
from patchrank.benchmark.mode import Mode
from patchrank.benchmark.schedules import Asked
from patchrank.benchmark.table import leaving, markdown_page, methods_columns, text_table
from patchrank.utils.errors import UserError

ROOT = Path(__file__).parents[2]
FAST = ["--repeats", "3", "--batch-size", "2"]
COMMON = {"model", "method", "spread", "dtype", "hardware", "date", "repeats"}
TOLD = COMMON | {
    *("batch_size", "keep_rate", "drop_counts", "locations", "images_per_second", "ms", "gmacs", "gmacs_unpruned"),
    *("counted_speedup", "measured_speedup", "ratio", "reducer_share", "peak_memory", "compile", "cuda_graphs"),
}


@pytest.fixture
def unmeasured(monkeypatch):
    """Nothing may be measured."""

    def measured(*_, **__):
        raise AssertionError("measured")

    for name in ("create_base", "_one_tower"):
        monkeypatch.setattr(command, name, measured)


def test_methods_in_one_run(tmp_path, capsys):
    files = {name: tmp_path / f"rows.{name}" for name in ("json", "markdown", "out")}
    flags = ["--methods", "predictor,tome,evit", *FAST, *(f"--{name}={path}" for name, path in files.items())]
    main(flags)
    said, told = capsys.readouterr()
    rows = json.loads(files["json"].read_text())
    assert rows == json.loads(said) == json.loads(files["out"].read_text())
    assert [row["method"] for row in rows] == ["timm", "predictor", "tome", "evit"]
    for row in rows:
        assert set(row) >= TOLD and row["batch_size"] == 2 and row["peak_memory"] is None
        assert row["images_per_second"] == pytest.approx(1000 / row["ms"])
        assert row["measured_speedup"] == pytest.approx(rows[0]["ms"] / row["ms"])
        assert row["counted_speedup"] == pytest.approx(row["gmacs_unpruned"] / row["gmacs"])
        assert row["ratio"] == pytest.approx(row["measured_speedup"] / row["counted_speedup"])
        low, high = row["ms_quartiles"]
        assert low <= row["ms"] <= high and row["spread"] == pytest.approx((high - low) / row["ms"])
        assert (row["reducer_share"] > 0) == (row["method"] != "timm") == (row["keep_rate"] < 1)
    page = files["markdown"].read_text()
    assert f"python -m patchrank.benchmark --methods predictor,tome,evit {' '.join(FAST)}" in page
    assert page.count("\n| ") == 6 and "Batch size 2:" in page and rows[0]["hardware"]["cpu"] in page
    assert all(row["method"] in told for row in rows)


def test_scoring_beside_what_it_is_compared_with(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(golden_speed, "BATCH_SIZES", {"cpu": (7, 9)})
    monkeypatch.setattr(golden_speed, "COMPARED", {"cpu": 14})
    main(["--golden", "--repeats", "3", "--batch-size", "1", "--window", "6", "--markdown", str(tmp_path / "page.md")])
    rows = json.loads(capsys.readouterr()[0])
    ours, blocks, pixels = rows
    assert [row["method"] for row in rows] == ["golden scoring", "timm blocks", "from pixels"]
    assert ours["ratio"] == 1 and ours["sequences"] is None and {blocks["sequences"], pixels["sequences"]} <= {7, 9}
    assert blocks["ratio"] == pytest.approx(ours["windows_per_second"] / blocks["windows_per_second"])
    assert pixels["windows_per_second"] > 0 and set(ours) >= COMMON
    assert "a window of 6 x 6 removed before layer 4" in (tmp_path / "page.md").read_text()


def test_all_ways_to_score_have_one_compile_mode(tower, monkeypatch):
    compiled, scored = [], []

    def compile(run, **how):
        compiled.append(how)
        return run

    def score(tower, images, compile, **_):
        scored.append(compile)
        return SimpleNamespace(scores=None)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(golden_speed, "score_images", score)
    monkeypatch.setattr(golden_speed, "BATCH_SIZES", {"cpu": (2,)})
    monkeypatch.setattr(golden_speed, "COMPARED", {"cpu": 2})
    golden_speed.compare_scoring(tower, "toy", Mode(compile=True), 1, 6, 4, repeats=3)
    assert compiled == 2 * [{"fullgraph": True, "dynamic": False}] and set(scored) == {True}


def test_the_matrix_rate_is_that_of_golden_scoring_with_what_it_shares_counted_once(tower, monkeypatch):
    def share(layer):
        rows = golden_speed.compare_scoring(tower, "toy", Mode(), 1, 6, layer, repeats=3)
        assert [row["matmul_share"] is None for row in rows] == [False, True, True]
        return rows[0]["matmul_share"] * 1e12 / (2 * rows[0]["windows_per_second"])  # MACs of a window

    monkeypatch.setattr(Mode, "on_gpu", property(lambda _: True))
    monkeypatch.setattr(golden_speed, "matmul_rate", lambda _: 1e12)
    monkeypatch.setattr(golden_speed, "BATCH_SIZES", {"cuda": (2,)})
    monkeypatch.setattr(golden_speed, "COMPARED", {"cuda": 2})
    monkeypatch.setattr(Mode, "running", lambda _: torch.inference_mode())
    shared = share(11)
    monkeypatch.setattr(golden_speed, "shares_qkv", lambda *_: False)
    length = tower.num_leading_tokens + tower.num_patches - 36
    assert share(11) - shared == pytest.approx(3 * tower.embed_dim**2 * length)


def test_towers_in_bf16_are_scored_too(tower):
    mode = Mode(dtype="bf16")
    with mode.running():
        scores = golden_speed.score_images(mode.place(tower), mode.random(1, 3, 64, 64), window=6, remove_at=4).scores
    assert scores.shape[-1] == 64 and scores.isfinite().all()


def test_what_scoring_is_compared_with_gives_the_embeddings_that_scoring_compares(tower, images):
    """Otherwise it would be faster or slower for doing something else."""
    squares = golden_speed.windows((8, 8), 2)
    kept = golden_speed.kept_without(squares, tower)
    assert kept.shape == (49, 61) and (kept[:, 0] == 0).all() and not {1, 2, 9, 10} & set(kept[0].tolist())
    with torch.inference_mode():
        ours = golden_speed.score_images(tower, images[:1], metrics=["preservation"]).windows[0, 0]
        whole = torch.nn.functional.normalize(tower(images[:1]).double(), dim=-1)
        pieces = golden_speed.from_pixels(tower, images[:1].expand(49, -1, -1, -1), kept, 4)
        pieces = torch.nn.functional.normalize(pieces.double(), dim=-1)
    torch.testing.assert_close((whole - pieces).square().sum(-1) / 2, ours, atol=1e-6, rtol=1e-4)


def test_milliseconds_by_tokens(tmp_path, capsys):
    main(["--tokens", "5:13:4", *FAST, "--picture", str(tmp_path / "tokens.png")])
    rows = json.loads(capsys.readouterr()[0])
    assert [row["tokens"] for row in rows] == [5, 9, 13] and all(row["ms"] > 0 for row in rows)
    per_mac = {round(row["ms_by_macs"] / row["gmacs"], 9) for row in rows}
    assert len(per_mac) == 1 and rows[1]["gmacs"] / rows[0]["gmacs"] == pytest.approx(9 / 5, rel=0.02)
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--methods predictr", "method 'predictr' does not exist; did you mean 'predictor'"),
        ("--methods evit --keep-rates 0.5 --budget 0.5", "--keep-rates and --budget exclude each other"),
        ("--methods timm --golden", "--methods and --golden are benchmarks of their own"),
        ("--methods evit --reducer evit", "--methods does not read --reducer; try it without, or leave --methods out"),
        (
            "--golden --cuda-graphs",
            "--golden does not read --cuda-graphs; try it without, or --methods or --tokens instead of --golden",
        ),
        ("--keep-rates 0.5", "one tower does not read --keep-rates; try it without, or with --methods"),
        ("--batch-size 1,8", "one tower takes one, but there are 2; try --methods predictor"),
        ("--methods evit --dtype fp16", "--dtype fp16: CPUs run it too slowly"),
        ("--methods evit --cuda-graphs", "--cuda-graphs needs a GPU"),
        ("--methods evit --device cuda:9", "device 'cuda:9' cannot be used here"),
        ("--methods evit --json /", "cannot write /: it is a folder"),
        ("--methods evit --markdown /proc/none/table.md", "cannot write /proc/none"),
        ("--tokens 5:9:4 --picture /proc/none/x.png", "cannot write /proc/none"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_measured(flags, message, unmeasured):
    with pytest.raises(UserError, match=message):
        main(flags.split())


def test_a_picture_that_cannot_be_drawn_is_told_before_anything_is_measured(monkeypatch, unmeasured):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(UserError, match="--picture needs the package matplotlib .*; try pip install matplotlib"):
        main(["--tokens", "5:9:4", "--picture", "x.png"])


def test_rows_are_written_where_drawing_fails(tmp_path, capsys, monkeypatch):
    def fails(_):
        raise ValueError("no fonts")

    monkeypatch.setattr(command, "draw_tokens", fails)
    rows = tmp_path / "rows.json"
    with pytest.raises(ValueError, match="no fonts"):
        main(["--tokens", "5:9:4", *FAST, "--json", str(rows), "--picture", str(tmp_path / "x.png")])
    assert json.loads(rows.read_text()) == json.loads(capsys.readouterr()[0])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--methods evit --keep-rates 0.5,1.5", "--keep-rates: should be a number above 0 and at most 1, but is '1.5'"),
        ("--batch-size 1,x", "--batch-size: should be a valid integer"),
        ("--tokens 16:197", "--tokens: should be FIRST:LAST:STEP, such as 16:197:8, but is '16:197'"),
        ("--tokens 0:9:3", "--tokens: needs 1 <= FIRST <= LAST"),
        ("--methods evit --dtype fp8", "--dtype: invalid choice: 'fp8'"),
        ("--methods evit --repeats 2", "--repeats: should be greater than or equal to 3"),
    ],
)
def test_values_that_do_not_fit_are_told_with_their_flag(flags, message, capsys, unmeasured):
    with pytest.raises(SystemExit) as ended:
        main(flags.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_counts_and_layers_in_short():
    assert leaving((), ()) == "-" and leaving((20,) * 4, (4, 6, 8, 10)) == "20 at 4 6 8 10"
    assert leaving((3, 2, 2, 2, 1), (1, 2, 3, 4, 5)) == "3-1 at 1-5"


def test_counts_that_do_not_fall_over_many_layers_are_all_told():
    assert leaving((9, 8, 8), (4, 6, 10)) == "9 8 8 at 4 6 10"
    assert leaving((1, 8, 8, 8), (4, 6, 8, 10)) == "1 8 8 8 at 4 6 8 10"
    assert leaving((8, 1, 8, 1, 8), (1, 2, 3, 4, 5)) == "8 1 8 1 8 at 1-5"


def test_titles_name_all_that_was_asked_for():
    assert Asked(drop_counts=(80,), locations=(4,)).title == "Methods at the MACs of 80 tokens dropped at layer 4"
    aligned = Asked(locations=(4, 6), align=8).title
    assert aligned == (
        "Methods at the MACs of the paper's schedule at layers 4, 6, sequences a multiple of 8 long (align)"
    )


def test_memory_has_a_column_where_all_rows_have_it():
    row = {"method": "timm", "keep_rate": 1.0, "drop_counts": [], "locations": [], "ms": 20.0, "spread": 0.01}
    row |= {"images_per_second": 5000.0, "gmacs": 17.6, "counted_speedup": 1.0, "measured_speedup": 1.0, "ratio": 1.0}
    row |= {"reducer_share": 0.0, "peak_memory": 2**30, "batch_size": 8, "model": "m", "dtype": "bf16", "compile": True}
    row |= {"hardware": {"gpu": "NVIDIA H200", "torch": "2"}, "date": "today", "cudnn_attention": True}
    assert "1,024" in text_table(methods_columns([row]), [row]) and "peak MiB" not in methods_columns(
        [row, row | {"peak_memory": None}]
    )
    assert "m on NVIDIA H200; bf16, compile, cuDNN attention; torch 2; today." in markdown_page(
        "t", [], methods_columns([row]), [row]
    )


@pytest.mark.slow
def test_b16_on_random_weights_shows_what_the_issue_asks_for(tmp_path):
    out = tmp_path / "rows.json"
    main(
        [
            "--model",
            "patchrank_clip_b16",
            "--batch-size",
            "8",
            "--methods",
            "timm,predictor,tome,evit",
            "--json",
            str(out),
        ]
    )
    rows = {row["method"]: row for row in json.loads(out.read_text())}
    assert set(rows) == {"timm", "predictor", "tome", "evit"}
    assert rows["predictor"]["drop_counts"] == [20, 20, 20, 20]
    assert 17.5 < rows["timm"]["gmacs_unpruned"] < 17.6 and rows["predictor"]["measured_speedup"] > 1.1


@pytest.mark.slow
def test_towers_are_compiled_for_more_batch_sizes_than_torch_keeps_by_itself(capsys, monkeypatch):
    graphs, real = [], torch.compile

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda tower, **how: real(tower, backend=backend, **how))
    main(["--methods", "timm,predictor,cls_attention", "--compile", "--repeats", "3", "--batch-size", "1,2,3,4"])
    assert len(json.loads(capsys.readouterr()[0])) == len(graphs) == 12


@pytest.mark.slow
def test_the_gpu_check_runs_on_a_cpu_without_ray_and_open_clip(tmp_path):
    for name in ("ray", "open_clip", "optuna", "webdataset"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('is not here')")
    env = os.environ | {"DEVICE": "cpu", "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    out = tmp_path / "tables"
    subprocess.run([ROOT / ".ci/gpu_check.sh", out], env=env, check=True, timeout=600)
    rows = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    scoring = {"scoring", "scoring_compiled"}
    assert set(rows) == {*scoring, "predictor", "rankings", "merging", "graphs", "cudnn", "tokens"}
    assert all(rows.values())
    assert (out / "tables.md").read_text().count("```bash") == 8 and (out / "tokens.png").exists()


def test_the_gpu_check_refuses_a_step_that_it_does_not_have(tmp_path):
    found = subprocess.run([ROOT / ".ci/gpu_check.sh", tmp_path / "out", "speed"], capture_output=True, text=True)
    assert found.returncode == 2 and "no step is called 'speed'; try one of predictor" in found.stderr
    assert not (tmp_path / "out").exists()
