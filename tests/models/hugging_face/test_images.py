"""Images are prepared as the files of a model of transformers say, beside transformers' own processors."""

import json

import pytest
import torch
from helpers import toy_hub

from patchrank.models.hugging_face.images import read_images
from patchrank.models.pair import Clip
from patchrank.utils.errors import UserError

CROPPED = {"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
PROCESSORS = {
    "CLIPImageProcessor": CROPPED,
    "BitImageProcessor": CROPPED | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    "SiglipImageProcessor": {"size": {"height": 32, "width": 32}},
    "ViTImageProcessor": {"size": {"height": 32, "width": 32}},
}


def transform_of(images):
    """The transform of a pair whose tower has such a record."""
    tower = torch.nn.Module()
    tower.pretrained_cfg = images
    return Clip("toy", tower, None).transform()


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pictures_come_out_as_from_the_processor(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, kind)(**PROCESSORS[kind])
    processor.save_pretrained(tmp_path)
    found = transform_of(read_images(tmp_path, "vit", 99, "toy"))(toy_hub.picture())
    expected = processor(toy_hub.picture(), return_tensors="pt")["pixel_values"][0]
    assert found.shape == expected.shape == (3, 32, 32)
    grey_levels = (found - expected).abs() * torch.tensor(processor.image_std).view(3, 1, 1) * 255
    assert grey_levels.max() < 1.5 and grey_levels.mean() < 0.1  # that of torchvision rounds otherwise than Pillow
    assert (found - expected.flip(2)).abs().mean() > 0.05  # pictures that differ are told apart


@pytest.mark.parametrize(
    "model_type, side, crop, mode, mean",
    [
        ("clip_vision_model", 30, 1.0, "center", 0.48145466),
        ("siglip_vision_model", 30, 1.0, "squash", 0.5),
        ("dinov2_with_registers", 224, 224 / 256, "center", 0.485),
        ("vit", 30, 1.0, "squash", 0.5),
    ],
)
def test_a_folder_that_says_nothing_has_its_class_own(tmp_path, model_type, side, crop, mode, mean):
    found = read_images(tmp_path, model_type, 30, "toy")
    assert found["input_size"] == (3, side, side) and found["crop_pct"] == crop
    assert found["crop_mode"] == mode and found["mean"][0] == mean


def test_older_and_newer_files(tmp_path):
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old | {"resample": 3, "image_std": [0.3] * 3}))
    found = read_images(tmp_path, "clip", 30, "toy")
    assert (found["input_size"], found["crop_mode"], found["std"]) == ((3, 224, 224), "center", (0.3,) * 3)
    (tmp_path / "preprocessor_config.json").unlink()
    new = {"image_processor": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 40, "width": 40}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(new))
    assert read_images(tmp_path, "siglip", 30, "toy")["input_size"] == (3, 40, 40)


def test_timm_rounds_to_the_edge_that_is_meant(tmp_path):
    for edge in range(145, 700, 7):
        stated = {"size": {"shortest_edge": edge}, "do_center_crop": True, "crop_size": 144}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
        assert transform_of(read_images(tmp_path, "clip", 30, "toy")).transforms[1].size == edge


@pytest.mark.parametrize(
    "stated, message",
    [
        ({"do_resize": False}, "do_resize is False"),
        ({"rescale_factor": 1 / 127.5}, "scaled by 0.00784"),
        ({"size": {"height": 20, "width": 30}}, "no side of squares"),
        ({"size": {"shortest_edge": 40}}, "nothing is cropped"),
        ({"size": "big"}, "big is no side of squares"),
        ({"image_mean": [0.5]}, r"\[0.5\] are no values of three channels"),
        ({"resample": 9}, "do not make .9."),
        ([1], "must hold a mapping, but holds list"),
    ],
)
def test_what_no_transform_does(tmp_path, stated, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    with pytest.raises(UserError, match=f"^toy: preprocessor_config.json .*{message}") as caught:
        read_images(tmp_path, "vit", 32, "toy")
    assert "\n" not in str(caught.value)
