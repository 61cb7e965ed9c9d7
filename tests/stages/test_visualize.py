import io

import numpy as np
import pytest
import torch
from PIL import Image

from patchrank.data.dataset_factory import load_split
from patchrank.layers.reducers import REDUCERS
from patchrank.layers.schedule import num_kept
from patchrank.models.repair_files import save_repair
from patchrank.repair import fit_repair
from patchrank.utils.command import run_command
from patchrank.utils.errors import UserError
from patchrank.visualize import draw_rankings, kept_by, rank_pictures, read_pictures, split_pictures
from patchrank.visualize.__main__ import main
from patchrank.visualize.figure import CHANGES, STAYS, check_size, draw

RANKERS = ["label", "preservation", "predictor", "cls_attention", "center", "random"]


@pytest.fixture(scope="module")
def pictures():
    return split_pictures(load_split("digits", "val", 2))


@pytest.fixture(scope="module")
def rankings(pictures):
    import patchrank

    return rank_pictures(patchrank.create_clip("patchrank_clip_digits"), pictures, RANKERS, (0.8, 0.3), (4,))


@pytest.fixture(scope="module")
def photograph():
    """61 x 97, red at the top, blue at the bottom."""
    pixels = np.zeros((97, 61, 3), np.uint8)
    pixels[:48, :, 0], pixels[48:, :, 2] = 255, 255
    return Image.fromarray(pixels)


def test_every_ranker_keeps_as_many_places_as_the_rate_says(rankings):
    assert list(rankings.rows) == RANKERS
    for found in rankings.rows.values():
        for rate, kept in zip((0.8, 0.3), found):
            assert kept.places.shape == (2, num_kept(64, rate))
            assert len(set(kept.places[0].tolist())) == num_kept(64, rate)


def test_what_is_kept_is_what_the_tower_keeps(clip, rankings, pictures):
    images = torch.stack([clip.transform()(image) for image in pictures.images])
    head = clip.zero_shot_head(pictures.classes, pictures.templates)
    clip.visual.set_pruning(keep_rate=0.3, locations=(4,), reducer="predictor")
    expected = clip.visual.forward_pruned(images)
    assert (rankings.rows["predictor"][1].places == expected.kept.numpy()).all()
    assert (rankings.rows["predictor"][1].answers == (expected.embedding @ head.T).argmax(-1).numpy()).all()
    assert clip.visual.pruning.keep_rate == 0.3  # and looking at it changes nothing
    before = clip.visual.pruner
    kept_by(clip, images, head, "random", [0.5])
    assert clip.visual.pruner is before and clip.visual.pruning.reducer == "predictor"
    clip.visual.set_pruning(reducer="predictor")


DRAWN = sorted({*REDUCERS} - {"golden", "prior"})  # golden rows are named by their metric, and a prior needs its file


@pytest.mark.parametrize("ranker", DRAWN)
def test_every_ranker_can_be_drawn_and_shows_what_merged(clip, pictures, ranker):
    """Those that rank drop what they do not keep, unless it shall merge; others merge by their own rule."""
    few = {"rankers": [ranker], "keep_rates": [0.5], "locations": (4, 8)}
    first = rank_pictures(clip, pictures, **few)
    (kept,) = first.rows[ranker]
    assert (kept.source is not None) == REDUCERS[ranker].merges
    merged = rank_pictures(clip, pictures, **few, leftovers="merge")
    (other,) = merged.rows[ranker]
    if REDUCERS[ranker].merges:
        assert (other.source == kept.source).all()
    else:
        assert other.source.shape == (2, 64) and other.source.min() == 0  # nothing is dropped
    assert (np.take_along_axis(other.source, other.places, 1) == np.arange(other.places.shape[1])).all()
    texts = [" ".join(text.get_text().split()) for text in draw(merged).figure.texts]
    assert "patches that merged show the mean colour" in texts[-1]


def test_oracles_and_other_settings_merge_too(clip, pictures):
    few = {"keep_rates": [0.5], "locations": (4,), "leftovers": "merge"}
    rows = rank_pictures(clip, pictures, ["preservation", "center"], **few).rows
    assert all(kept.source.min() == 0 for (kept,) in rows.values())
    (some,) = rank_pictures(clip, pictures, ["center"], **few, drop_share=0.5).rows["center"]
    assert (some.source == -1).sum(1).tolist() == [16, 16]


def test_a_setting_that_no_row_reads_is_refused(clip, pictures):
    few = {"keep_rates": [0.5], "locations": (4, 8)}
    assert rank_pictures(clip, pictures, ["tome", "attention_merge"], **few, protection=3.0).rows.keys()
    with pytest.raises(
        UserError, match="protection 3.0 says nothing to tome, center; .* attention_merge, guided_merge"
    ):
        rank_pictures(clip, pictures, ["tome", "center"], **few, protection=3.0)
    with pytest.raises(UserError, match="drop_share 0.5 says nothing to center, golden; .* leftovers 'merge'"):
        rank_pictures(clip, pictures, ["center", "preservation"], **few, drop_share=0.5)


def test_a_repair_counts_for_the_row_that_it_was_solved_for(clip, pictures, tmp_path):
    clip.visual.set_pruning(reducer="center", keep_rate=0.5, locations=(4,))
    path = str(tmp_path / "r.safetensors")
    save_repair(fit_repair(clip, [load_split("digits", "adapt", 50)], quiet=True), path)
    clip.visual.set_pruning(reducer="predictor", keep_rate=1)
    (plain,) = rank_pictures(clip, pictures, ["center"], [0.5], (4,)).rows["center"]
    clip.visual.set_pruning(repair_path=path)
    found = rank_pictures(clip, pictures, ["center"], [0.5], (4,))
    assert "with a repair" in found.about
    assert (found.rows["center"][0].probabilities != plain.probabilities).all()
    with pytest.raises(UserError, match="solved for drops 32 before layer 4, but the pruning has drops 38"):
        rank_pictures(clip, pictures, ["center"], [0.4], (4,))
    clip.visual.set_pruning(repair_path=None)


def test_golden_rankings_are_the_golden_scores_order(clip, pictures, rankings):
    from patchrank.golden.scores import score_images

    images = torch.stack([clip.transform()(image) for image in pictures.images])
    head = clip.zero_shot_head(pictures.classes, pictures.templates)
    scale = clip.logit_scale.exp().item()
    scores = score_images(clip.visual, images, head, torch.tensor(pictures.labels), scale).scores[:, 2]
    assert set(rankings.rows["preservation"][1].places[0]) == set(scores[0].topk(num_kept(64, 0.3)).indices.tolist())


def test_a_tile_for_each_image_and_for_each_ranker_at_each_rate(rankings):
    sheet = draw(rankings)
    tiles = 2 * (1 + len(RANKERS) * 2)
    assert len(sheet.figure.images) == tiles and len(sheet.figure.artists + sheet.figure.patches) >= tiles - 2
    picture = np.asarray(Image.open(io.BytesIO(sheet.png())).convert("RGB"))
    assert picture.shape[1] == round(sheet.figure.get_figwidth() * sheet.tile)


def test_frames_say_whether_the_answer_stays(rankings):
    from matplotlib.colors import to_hex
    from matplotlib.patches import Rectangle

    frames = [artist for artist in draw(rankings).figure.get_children() if isinstance(artist, Rectangle)]
    colours = [to_hex(frame.get_edgecolor()) for frame in frames]
    stays = [kept.answers == rankings.unpruned.answers for row in rankings.rows.values() for kept in row]
    assert colours.count(STAYS) == np.sum(stays) and colours.count(CHANGES) == np.sum(np.logical_not(stays)) > 0


def test_texts_name_oracles_answers_and_labels(rankings):
    texts = "\n".join(text.get_text() for text in draw(rankings).figure.texts)
    label = rankings.pictures.classes[rankings.pictures.labels[0]]
    assert texts.count("\noracle") == 2 and f"label: {label}" in texts and "fitted to\npreservation" in texts
    assert "80 % kept" in texts and "80 %, 30 % kept: 51, 19 of 64" in " ".join(texts.split())


def test_many_images_go_on_below(clip):
    pictures = split_pictures(load_split("digits", "val", 14))
    sheet = draw(rank_pictures(clip, pictures, ["center"], [0.5]))
    wide, high = sheet.figure.get_size_inches()
    assert wide < 12 and high > 5 and len(sheet.figure.images) == 28
    with pytest.raises(UserError, match="1 to 1000 tiles"):
        check_size(100, 3, 6)
    with pytest.raises(UserError, match="1 to 1000 tiles"):
        check_size(2, 0, 6)


def test_a_seed_gives_the_same_bytes_twice_and_another_other_ones(clip, pictures):
    first, second, other = (draw_rankings(clip, pictures, ["random"], keep_rates=[0.5], seed=n) for n in (0, 0, 1))
    assert first == second != other and first.startswith(b"\x89PNG")


def test_own_images_of_odd_size_palette_and_turned(photograph, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # what is stored is to be turned by 90 degrees clockwise
    photograph.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    photograph.quantize(4).save(tmp_path / "palette.gif")
    see_through = photograph.convert("RGBA")
    see_through.putalpha(0)
    see_through.save(tmp_path / "clear.png")
    Image.fromarray((np.arange(97 * 61).reshape(97, 61) * 11).astype(np.uint16)).save(tmp_path / "deep.png")
    names = ["turned.png", "palette.gif", "clear.png", "deep.png"]
    turned, palette, clear, deep = read_pictures([tmp_path / name for name in names]).images
    for image in (turned, palette):
        assert image.size == (61, 97) and image.getpixel((30, 5))[0] > 250 and image.getpixel((30, 90))[2] > 250
    assert clear.getpixel((30, 5)) == (255, 255, 255)
    assert np.asarray(deep).std() > 50  # 16 bits are not clipped to white


def test_the_picture_shows_the_crop_that_the_model_sees(clip, photograph, tmp_path):
    photograph.save(tmp_path / "a.png")
    found = rank_pictures(clip, read_pictures([tmp_path / "a.png"]), ["center"])
    assert found.pixels.shape == (1, 64, 64, 3)
    assert found.pixels[0, 5, 30].tolist() == [255, 0, 0] and found.pixels[0, 60, 30].tolist() == [0, 0, 255]
    assert "label" not in rank_pictures(clip, read_pictures([tmp_path / "a.png"]), keep_rates=[0.5]).rows


def test_the_command_writes_one_picture_and_prints_its_path(photograph, tmp_path, capsys):
    photograph.save(tmp_path / "a$1$.png")
    out, image = tmp_path / "deep/in/out.png", str(tmp_path / "a$1$.png")
    answers = ["--classes", "red", "blue", "--template", "a photo of {}.", "--label", "red"]
    main(["--image", image, *answers, "--keep-rates", "0.5", "--out", str(out), "--rank", "label", "random"])
    assert capsys.readouterr().out.strip() == str(out)
    assert Image.open(out).format == "PNG" and len(list(out.parent.iterdir())) == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--image nowhere.png", "nowhere.png: cannot be read"),
        ("--image {text}", "in no image format"),
        ("--image {text} --data digits", "exclude each other"),
        ("--image {text} --limit 3", "--limit goes with --data"),
        ("--label zero", "--label goes with --image"),
        ("--data digit", "did you mean 'digits'"),
        ("--image {image} --label sewen", "did you mean 'seven'"),
        ("--image {image} --label one two", "one an image"),
        ("--image {image} --classes cat", "two or more"),
        ("--image {image} --classes cat dog --template photo", "one place for the class name"),
        ("--image {image} --model patchrank_clip_b16", "--classes is needed"),
        ("--image {image} --rank label", "needs the images' labels"),
        ("--image {image} --rank predicter", "did you mean 'predictor'"),
        ("--image {image} --rank golden", "known: "),
        ("--image {image} --keep-rates 1.5", "keep_rate"),
        ("--image {image} --rank tome --keep-rates 0.2 --locations 4", "try more locations"),
        ("--image {image} --rank center --leftovers melt", "leftovers 'melt' does not exist"),
        ("--image {image} --locations 13", "locations"),
        ("--image {image} --rank tome --protection 0.5", "protection 0.5 says nothing to tome"),
        ("--image {image} --rank center --repair {text}", "repair file"),
        ("--image {image} --locations 2 --rank predictor", "location 4"),
        ("--image {image} --predictor {text} --rank predictor", "predictor file"),
        ("--image {image} --rank preservation --window 9", "window"),
        ("--image {image} --out {text}/a.png", "cannot write"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, photograph, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("no image")
    photograph.save(tmp_path / "a.png")
    argv = argv.format(text=tmp_path / "note.txt", image=tmp_path / "a.png").split()
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main(["--out", str(tmp_path / "o.png"), *argv]))
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.startswith("error: ") and message in told and told.count("\n") == 1
    assert not (tmp_path / "o.png").exists()
