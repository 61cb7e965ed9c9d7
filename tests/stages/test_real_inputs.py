"""Real CLIP on real files, end to end: random weights that open_clip saved, photographs on disk, every stage."""

import io
import json
import tarfile

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from patchrank import evaluate, fit, retrieval
from patchrank.config import TrialConfig
from patchrank.data.dataset_factory import load_split
from patchrank.golden import __main__ as golden
from patchrank.models.clip import create_clip
from patchrank.models.embed import embed_unpruned
from patchrank.models.pretrained import TEXT_CFGS
from patchrank.trial.check import check_trial
from patchrank.trial.identity import trial_id
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import run_trial
from patchrank.utils.errors import UserError

SHAPES = {  # vision width, layers, patch
    "patchrank_clip_xsmall16": (256, 10, 16),
    "patchrank_clip_b16": (768, 12, 16),
}


def photograph(rng: np.random.Generator, mode: str = "RGB") -> Image.Image:
    """A smooth coloured picture, larger than the model's and not square."""
    small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((300, 240), Image.BICUBIC).convert(mode)


@pytest.fixture
def photos(tmp_path):
    """Two classes of JPEGs, one of them grey."""
    rng = np.random.default_rng(0)
    for name in ("black_cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            photograph(rng, "L" if i == 4 else "RGB").save(tmp_path / "photos" / name / f"{i}.jpg", quality=90)
    return tmp_path / "photos"


def save_open_clip(name: str, path) -> open_clip.CLIP:
    """Random weights of a published shape, as open_clip saves them."""
    torch.manual_seed(0)
    (width, layers, patch), text = SHAPES[name], TEXT_CFGS[name]
    vision = open_clip.CLIPVisionCfg(layers=layers, width=width, patch_size=patch, image_size=224)
    words = open_clip.CLIPTextCfg(width=text["width"], heads=text["heads"], layers=text["layers"])
    model = open_clip.CLIP(text["output_dim"], vision, words, quick_gelu=name == "patchrank_clip_b16").eval()
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    return model


def row_of(capsys, *argv: str) -> dict:
    evaluate.main(argv)
    (line,) = capsys.readouterr().out.strip().splitlines()
    return json.loads(line)


@pytest.mark.parametrize(
    "name", ["patchrank_clip_xsmall16", pytest.param("patchrank_clip_b16", marks=pytest.mark.slow)]
)
def test_random_weights_of_open_clip_on_jpegs_give_one_row_and_the_same_embeddings(name, photos, tmp_path, capsys):
    theirs = save_open_clip(name, tmp_path / "clip.pt")
    flags = ["--model", name, "--checkpoint", f"{tmp_path}/clip.pt", "--data", "folder", "--data-root", f"{photos}"]
    row = row_of(capsys, *flags)
    assert (row["n_images"], row["agreement"], row["split"]) == (10, 100, "all") and row["cosine"] >= 1 - 1e-6
    clip, split = create_clip(name, checkpoint=tmp_path / "clip.pt"), load_split("folder", root=str(photos))
    preprocess = image_transform_v2(PreprocessCfg(size=224), is_train=False)
    pixels = torch.stack([preprocess(Image.open(photos / name)) for name in split.ids])
    with torch.no_grad():
        assert torch.equal(pixels, torch.cat([images for images, _ in split.batches(clip.transform(), 4)]))
        torch.testing.assert_close(embed_unpruned(clip, split), theirs.encode_image(pixels), atol=1e-4, rtol=0)
        head = clip.zero_shot_head(split.classes, split.templates)
        prompts = theirs.encode_text(open_clip.tokenize(["a photo of a black cat.", "a photo of a dog."]))
        torch.testing.assert_close(head, torch.nn.functional.normalize(prompts, dim=-1), atol=1e-5, rtol=0)


def test_unlabelled_images_go_through_every_stage(tmp_path, capsys):
    """The preservation score needs no labels, and cosine to the unpruned embedding no class names."""
    rng = np.random.default_rng(1)
    (tmp_path / "pile").mkdir()
    for i in range(24):
        photograph(rng).save(tmp_path / "pile" / f"{i:02}.jpg")
    data = ["--data", "folder", "--data-root", f"{tmp_path}/pile"]
    shards = {}
    for split in ("train", "test"):
        golden.main([*data, "--split", split, "--out", f"{tmp_path}/shards"])
        shards[split] = capsys.readouterr().out.strip()
    file = f"{tmp_path}/predictor.safetensors"
    fit.main(["--shards", shards["train"], "--val-shards", shards["test"], "--epochs", "2", "--out", file])
    assert "matching_rate" in json.loads(capsys.readouterr().out)
    row = row_of(capsys, *data, "--keep-rate", "0.5", "--predictor", file)
    assert "accuracy" not in row and "agreement" not in row and 0 < row["cosine"] < 1 and row["n_images"] == 24
    with pytest.raises(UserError, match="label' is not in shards .* known: preservation"):
        fit.main(["--shards", shards["train"], "--val-shards", shards["test"], "--metric", "label"])


def test_broken_images_are_counted_and_class_names_come_from_a_file(photos, tmp_path, capsys):
    (photos / "dog" / "9.jpg").write_bytes(b"no image")
    (tmp_path / "names.yaml").write_text("classes: {black_cat: panther}\ntemplates: ['the {}.', 'a {}.']\n")
    flags = ["--data", "folder", "--data-root", f"{photos}", "--vocabulary", f"{tmp_path}/names.yaml"]
    row = row_of(capsys, *flags, "--keep-rate", "0.5", "--reducer", "center", "--controls", "random")
    assert (row["n_images"], row["n_skipped"]) == (10, 1) and {"accuracy", "accuracy_random"} < row.keys()
    split = load_split("folder", root=str(photos), vocabulary=f"{tmp_path}/names.yaml")
    assert split.classes == ("panther", "dog") and split.templates == ("the {}.", "a {}.")


def test_retrieval_of_a_folder_and_an_index_that_is_kept(photos, tmp_path, capsys):
    flags = ["--task", "retrieval", "--data", "folder", "--data-root", f"{photos}", "--index", f"{tmp_path}/index.npy"]
    whole = row_of(capsys, *flags)
    assert whole["image_recall@1"] == 100 and whole["drift_max"] < 1e-5
    pruning = ["--keep-rate", "0.5", "--reducer", "random"]
    pruned = row_of(capsys, *flags, *pruning)
    assert pruned["drift_mean"] > whole["drift_mean"]
    retrieval.main([*flags[2:], *pruning, "--out", f"{tmp_path}/row.json"])
    assert json.loads(capsys.readouterr().out) == pruned == json.loads((tmp_path / "row.json").read_text())
    with pytest.raises(UserError, match="--index goes with --task retrieval"):
        evaluate.main(["--index", f"{tmp_path}/index.npy"])


def caltech(tmp_path, count: int = 12) -> str:
    """A made-up copy of CoOp's Caltech101: two classes of squares on noise."""
    rng = np.random.default_rng(2)
    rows: dict[str, list] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(["Faces", "accordion"]):
        folder = tmp_path / "caltech-101" / "101_ObjectCategories" / name
        folder.mkdir(parents=True)
        for i in range(3 * count):
            photograph(rng).save(folder / f"image_{i:04}.jpg")
            part = list(rows)[i % 3]
            rows[part].append([f"{name}/image_{i:04}.jpg", label, name.lower().removesuffix("s")])
    (tmp_path / "caltech-101" / "split_zhou_Caltech101.json").write_text(json.dumps(rows))
    return str(tmp_path)


def caltech_trial(root: str, **data) -> ResolvedTrial:
    config = TrialConfig.model_validate(
        {
            "data": {"tasks": ["caltech101"], "root": root, "n_train": 8, "n_val": 6, "n_test": 10, **data},
            "predictor": {"epochs": 2},
        }
    )
    return ResolvedTrial(config)


def test_a_trial_runs_on_a_named_dataset(tmp_path):
    trial = caltech_trial(caltech(tmp_path))
    check_trial(trial)
    inputs = load_inputs(trial.config.model, trial.config.data, heads=f"{tmp_path}/heads")
    record = run_trial(trial, inputs, f"{tmp_path}/run", f"{tmp_path}/shards", "test", quiet=True)
    metrics = record["metrics"]
    assert (metrics["n_train"], metrics["n_val"], metrics["n_images"]) == (8, 6, 10)
    assert set(np.unique(inputs.split("caltech101", "train").labels)) == {0, 1}  # the first few are of many classes


def test_where_images_lie_is_no_part_of_a_trial(tmp_path):
    here, there = caltech_trial(caltech(tmp_path / "a")), caltech_trial(caltech(tmp_path / "b"))
    other = caltech_trial(caltech(tmp_path / "c"), templates="plain", n_train=4)
    inputs = [load_inputs(trial.config.model, trial.config.data) for trial in (here, there, other)]
    ids = [trial_id(TrialContext(*pair)) for pair in zip((here, there, other), inputs)]
    assert ids[0] == ids[1] != ids[2]


def test_a_trial_needs_labels(tmp_path):
    (tmp_path / "pile").mkdir()
    for i in range(40):
        photograph(np.random.default_rng(i)).save(tmp_path / "pile" / f"{i}.jpg")
    with pytest.raises(UserError, match="'folder' in .* has no labels, and a trial measures accuracy"):
        check_trial(
            ResolvedTrial(TrialConfig.model_validate({"data": {"tasks": ["folder"], "root": f"{tmp_path}/pile"}}))
        )


def test_class_embeddings_are_kept_by_what_they_depend_on(clip, tmp_path, monkeypatch):
    assert clip.zero_shot_head(("one",), ("a {}.",)) is not None and not list(tmp_path.iterdir())
    monkeypatch.setattr("patchrank.models.zero_shot.KEEP_FROM", 2)
    clip.heads = f"{tmp_path}/heads"
    try:
        clip._heads.clear()
        made = clip.zero_shot_head(("one", "two"), ("a {}.",))
        clip._heads.clear()
        assert torch.equal(clip.zero_shot_head(("one", "two"), ("a {}.",)), made)
        clip.zero_shot_head(("one", "two"), ("the {}.",))
        assert len(list((tmp_path / "heads").iterdir())) == 2
        for file in (tmp_path / "heads").iterdir():
            save_file({"head": torch.zeros(2, 64)}, file)
        clip._heads.clear()
        assert not clip.zero_shot_head(("one", "two"), ("a {}.",)).any()  # it was read, not made again
        for file in (tmp_path / "heads").iterdir():
            file.write_bytes(b"damaged")
        clip._heads.clear()
        assert torch.equal(clip.zero_shot_head(("one", "two"), ("a {}.",)), made)
    finally:
        clip.heads = None
        clip._heads.clear()


@torch.no_grad()
def test_the_activation_is_part_of_what_is_kept(tmp_path, monkeypatch):
    """The same weights under another activation are another pair: other embeddings, and another fingerprint."""
    monkeypatch.setattr("patchrank.models.zero_shot.KEEP_FROM", 1)
    quick, plain = (create_clip("patchrank_clip_digits", act_layer=act) for act in ("quick_gelu", "gelu"))
    quick.heads = plain.heads = f"{tmp_path}/heads"
    heads = [clip.zero_shot_head(("one", "two"), ("a {}.",)) for clip in (quick, plain)]
    assert not torch.equal(*heads) and len(list((tmp_path / "heads").iterdir())) == 2
    assert quick.sha256() != plain.sha256() and quick.visual.blocks_sha256() != plain.visual.blocks_sha256()


def test_numbered_labels_need_names(tmp_path):
    rng = np.random.default_rng(3)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(30):
            buffer = io.BytesIO()
            photograph(rng).save(buffer, "JPEG")
            for name, content in ((f"{i}.jpg", buffer.getvalue()), (f"{i}.cls", str(i % 2).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    data = {"tasks": ["wds"], "root": f"{tmp_path}/a.tar"}
    with pytest.raises(UserError, match="labels of 'wds' in .* are numbers: name them by data.vocabulary"):
        check_trial(ResolvedTrial(TrialConfig.model_validate({"data": data})))
    (tmp_path / "names.yaml").write_text("classes: [cat, dog]\n")
    check_trial(ResolvedTrial(TrialConfig.model_validate({"data": data | {"vocabulary": f"{tmp_path}/names.yaml"}})))
