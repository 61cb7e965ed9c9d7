"""`patchrank.prune(model, FOLDER)`: what a recipe sets, what wins beside it, and what is refused."""

import json
import warnings

import pytest
import torch
from helpers import tiny_open_clip, toy_hosts
from helpers.tiny_clip import create_tower

import patchrank
from patchrank.layers.predictors import create_predictor, save_predictor
from patchrank.layers.repair import Repair, own_projection
from patchrank.models.recipe_files import read_recipe, write_recipe
from patchrank.models.repair_files import describe_repair, save_repair
from patchrank.utils.errors import UserError

PRUNING = dict(reducer="predictor", locations=(2, 3), drop_counts=(4, 4), leftovers="merge", metric="keys")
MODEL = {"name": "toy", "sha256": "0" * 64}
KINDS = {
    "timm": lambda: toy_hosts.create("timm siglip"),
    "transformers": lambda: toy_hosts.create("Dinov2Model"),
    "open_clip": lambda: tiny_open_clip.create(),
    "ours": lambda: create_tower(depth=4),
}


def create(kind):
    if kind == "transformers":
        pytest.importorskip("transformers")
    return KINDS[kind]()


def write_for(model, folder):
    """A recipe with a predictor and a repair that belong to a model, which comes back as it was."""
    tower = patchrank.find_tower(patchrank.prune(model, locations=PRUNING["locations"]))
    about = {"name": "toy", "sha256": tower.blocks_sha256()}
    folder.mkdir()
    predictor = create_predictor("mix_mlp", tower.embed_dim, tower.patch_embed.grid_size, dim=8)
    record = dict(name="mix_mlp", kwargs={"dim": 8, "head": "mlp"}, grid=list(tower.patch_embed.grid_size))
    record |= dict(embed_dim=tower.embed_dim, location=2, metric="preservation", model=about)
    record["kwargs"] = predictor.settings
    save_predictor(predictor, folder / "predictor.safetensors", record)
    patchrank.prune(model, predictor_path=folder / "predictor.safetensors", **PRUNING)
    weight, bias = own_projection(tower.head, tower.embed_dim)
    solved = describe_repair(tower, "toy") | {"images": 60, "ridge": 0.1, "data": []}
    save_repair(Repair(1.1 * weight, bias + 1, solved), folder / "repair.safetensors")
    write_recipe(folder, about, PRUNING, "predictor.safetensors", "repair.safetensors", gmacs=1.5)
    patchrank.unprune(model)


def write_free(folder, model=MODEL, img_size=None, **pruning):
    folder.mkdir(exist_ok=True)
    write_recipe(folder, model, dict(reducer="center", locations=(2, 3), keep_rate=0.5) | pruning, img_size=img_size)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_folder_says_all_of_a_models_pruning(kind, tmp_path):
    write_for(create(kind), tmp_path / "recipe")
    model, other = create(kind), create(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert patchrank.prune(model, tmp_path / "recipe") is model
    files = {f"{name}_path": tmp_path / "recipe" / f"{name}.safetensors" for name in ("predictor", "repair")}
    patchrank.prune(other, locations=(1,), keep_rate=0.9, reducer="center", protection=0.5)  # what was before is gone
    patchrank.prune(other, str(tmp_path / "recipe"))
    tower = patchrank.find_tower(model)
    expected = create(kind)
    patchrank.prune(expected, **PRUNING, **files)
    x = torch.randn(2, 3, *tower.patch_embed.img_size)
    found = tower(x)
    assert tower.drop_counts == (4, 4) and tower.repair is not None and tower.predictor is not None
    for same in (expected, other):
        assert torch.equal(patchrank.find_tower(same)(x), found)
    assert patchrank.find_tower(other).pruning == tower.pruning


@torch.no_grad()
def test_settings_beside_a_folder_win(tmp_path):
    model = toy_hosts.create("timm siglip")
    write_for(model, tmp_path / "recipe")
    with pytest.raises(UserError, match=r"solved for drops 4 before .* try it without a repair \(repair_path=None\)"):
        patchrank.prune(model, tmp_path / "recipe", keep_rate=0.25)
    patchrank.prune(model, tmp_path / "recipe", keep_rate=0.25, repair_path=None)  # and not the folder's drop_counts
    tower = patchrank.find_tower(model)
    assert tower.drop_counts == (6, 6) and tower.repair is None and tower.pruning.leftovers == "merge"
    mine = create_predictor("mix_mlp", toy_hosts.DIM, (4, 4), dim=8)
    patchrank.prune(model, tmp_path / "recipe", predictor=mine, repair_path=None)
    assert tower.predictor is mine and tower.drop_counts == (4, 4) and tower.pruning.predictor_path is None


@torch.no_grad()
def test_a_folder_of_another_model_is_refused_by_its_files_and_told_of_without_any(tmp_path):
    write_for(toy_hosts.create("timm siglip"), tmp_path / "recipe")
    other = toy_hosts.create("timm siglip", noise=0.1)
    modules = dict(other.named_modules())
    with pytest.raises(UserError, match="was fitted to toy with weights .*, but this tower's weights are"):
        patchrank.prune(other, tmp_path / "recipe")
    write_recipe(tmp_path / "recipe", MODEL, PRUNING, None, "repair.safetensors")
    with pytest.raises(UserError, match="repair.safetensors: solved"):
        patchrank.prune(other, tmp_path / "recipe", predictor=create_predictor("mix_mlp", toy_hosts.DIM, (4, 4), dim=8))
    assert dict(other.named_modules()) == modules
    with pytest.warns(UserWarning, match="was made for toy with weights 000000000000, but this model's are"):
        patchrank.prune(other, write_free(tmp_path / "free"))
    assert patchrank.find_tower(other).drop_counts == (4, 4)


@pytest.mark.filterwarnings("ignore:recipe .* was made for toy")
@torch.no_grad()
def test_a_recipe_says_the_size_of_the_images(tmp_path):
    pytest.importorskip("transformers")
    folder = write_free(tmp_path, img_size=(toy_hosts.SIDE, toy_hosts.SIDE))
    model, asked = (toy_hosts.create("Dinov2Model", image_size=96) for _ in range(2))
    patchrank.prune(model, folder)
    patchrank.prune(model, folder)
    patchrank.prune(asked, img_size=32, reducer="center", locations=(2, 3), keep_rate=0.5)
    x = toy_hosts.images()
    assert patchrank.find_tower(model).drop_counts == (4, 4)
    assert torch.equal(model(x).pooler_output, asked(x).pooler_output)
    with pytest.raises(UserError, match="img_size 96: recipe .* is for images of 32 x 32 pixels; try it without"):
        patchrank.prune(toy_hosts.create("Dinov2Model", image_size=96), folder, img_size=96)
    other = patchrank.prune(toy_hosts.create("Dinov2Model", image_size=96), locations=(2,))
    with pytest.raises(UserError, match="32 x 32 pixels, but this Dinov2Model takes 96 x 96; try patchrank.unprune"):
        patchrank.prune(other, folder)


@pytest.mark.filterwarnings("ignore:recipe .* was made for toy")
@pytest.mark.parametrize("kind", ["timm", "open_clip", "ours"])
def test_a_model_of_another_size_is_refused_with_both_sizes(kind, tmp_path):
    model = create(kind)
    module = model.visual if kind == "open_clip" else model.patch_embed
    height, width = getattr(module, "image_size" if kind == "open_clip" else "img_size")
    modules, way = dict(model.named_modules()), "force_image" if kind == "open_clip" else r"timm.create_model.NAME, img"
    told = f"is for images of 96 x 96 pixels, but this .* takes {height} x {width}; try .*{way}_size=96"
    with pytest.raises(UserError, match=told):
        patchrank.prune(model, write_free(tmp_path, img_size=[96, 96]))
    assert dict(model.named_modules()) == modules
    patchrank.prune(model, write_free(tmp_path, img_size=[height, width]), img_size=height)
    with pytest.raises(UserError, match=told):
        patchrank.prune(model, write_free(tmp_path, img_size=[96, 96]))
    assert patchrank.find_tower(model).drop_counts


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(schema=2), "has schema 2, but this version reads 1"),
        (dict(kind="card"), "is no recipe; try a folder that"),
        (dict(model="toy"), "model must hold a name and a sha256, but is 'toy'"),
        (dict(model={"name": "toy"}), "model must hold a name and a sha256"),
        (dict(pruning={"keep_rat": 0.5}), "pruning: key 'keep_rat' does not exist; did you mean 'keep_rate'"),
        (dict(pruning={"predictor_path": "/etc/passwd"}), "key 'predictor_path' does not exist"),
        (dict(pruning={"keep_rate": 2}), "pruning: keep_rate is 2, but should be a number above 0"),
        (dict(pruning=[1]), "pruning: must hold a mapping"),
        (dict(pruning={"reducer": "centre"}), "reducer 'centre' is not registered; did you mean 'center'"),
        (dict(predictor="../predictor.safetensors"), "predictor must name a file in the same folder"),
        (dict(repair="/tmp/repair.safetensors"), "repair must name a file in the same folder"),
        (dict(repair="s3:x"), "repair must name a file in the same folder"),
        (dict(img_size=[224]), "img_size must be height and width in pixels, such as .* but is .224."),
        (dict(img_size=[224, 0]), "img_size must be height and width"),
        (dict(img_size="224"), "img_size must be height and width"),
        (dict(repair=["r"]), "repair must name a file in the same folder"),
        (dict(predictor="none", pruning={"reducer": "predictor", "locations": [2]}), "/none: cannot be read"),
    ],
)
def test_damaged_recipes_are_refused(changes, told, tmp_path):
    write_free(tmp_path)
    found = json.loads((tmp_path / "recipe.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps(found | changes))
    model = toy_hosts.create("timm siglip")
    modules = dict(model.named_modules())
    with pytest.raises(UserError, match=told) as caught:
        patchrank.prune(model, tmp_path)
    assert "\n" not in str(caught.value) and dict(model.named_modules()) == modules


@pytest.mark.parametrize("content, told", [("{", "is not JSON"), ("[" * 10**5, "is not JSON"), ("[]", "is no recipe")])
def test_what_is_no_recipe_at_all(content, told, tmp_path):
    with pytest.raises(UserError, match="holds no recipe.json; try a folder that python -m patchrank.recipe wrote"):
        read_recipe(tmp_path)
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(UserError, match=told):
        read_recipe(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps({"schema": 1, "kind": "recipe", "model": MODEL}))
    with pytest.raises(UserError, match="lacks 'pruning'; a recipe has"):
        read_recipe(tmp_path)


def test_what_stands_in_the_place_of_a_folder(tmp_path):
    model = toy_hosts.create("timm siglip")
    with pytest.raises(UserError, match="folder of a recipe after the model, but got a .*; try predictor=..."):
        patchrank.prune(model, create_predictor("mix_mlp", toy_hosts.DIM, (4, 4), dim=8))
    with pytest.raises(UserError, match="but got a float; try keep_rate=..."):
        patchrank.prune(model, 0.6)


def test_only_what_can_be_read_is_written(tmp_path):
    with pytest.raises(UserError, match="predictor must name a file in the same folder"):
        write_recipe(tmp_path, MODEL, {}, predictor="a/b")
    with pytest.raises(UserError, match="'ratio' does not exist"):
        write_recipe(tmp_path, MODEL, {"ratio": 1})
    assert not list(tmp_path.iterdir())
    tower = create_tower(keep_rate=0.5, reducer="center")
    write_recipe(tmp_path, MODEL, dict(tower.pruning), accuracy=91.5)  # all fields of a tower's pruning
    assert read_recipe(tmp_path).pruning["locations"] == (2,)
    assert json.loads((tmp_path / "recipe.json").read_text())["accuracy"] == 91.5
