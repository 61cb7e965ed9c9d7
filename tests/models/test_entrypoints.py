"""The table of published weights against what timm and open_clip publish, tags, and a hub that is out of reach."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg, save_for_hf

from patchrank.models import patchrank_clip
from patchrank.models.checkpoints import hub
from patchrank.models.pretrained import PUBLISHED, TEXT_CFGS, find_weights
from patchrank.utils.errors import UserError

ENTRIES = timm.list_models("patchrank_clip_*")
ON_HUB = [name for name, weights in PUBLISHED.items() if weights.hub_id]
TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2, "locations": (1,)}
REPO = "timm/vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"


def tiny(name: str, **kwargs) -> torch.nn.Module:
    return timm.create_model(name, **{**TINY, **kwargs}).eval()


def activation(model: torch.nn.Module) -> str:
    return {"QuickGELU": "quick_gelu", "GELU": "gelu"}[type(model.blocks[0].mlp.act).__name__]


# The table


@pytest.mark.parametrize("name", ON_HUB)
def test_weights_are_those_that_timm_publishes(name):
    weights = PUBLISHED[name]
    cfg = get_pretrained_cfg(weights.hub_id.removeprefix("timm/"), allow_unregistered=False)
    assert cfg.hf_hub_id in ("timm/", weights.hub_id)
    assert (cfg.num_classes, cfg.input_size[-1]) == (weights.num_classes, weights.image_size)
    assert (cfg.mean, cfg.std, cfg.interpolation) == (weights.mean, weights.std, "bicubic")
    assert cfg.license == (weights.license or "apache-2.0")  # which timm says of all that it says nothing of
    if "QuickGELU" in (cfg.notes or ("",))[0]:
        assert weights.quick_gelu


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="the table is of the tags of timm 1.0.31")
def test_no_tag_with_clip_embeddings_is_left_out():
    towers = {
        weights.hub_id.partition(".")[0].removeprefix("timm/") for weights in PUBLISHED.values() if weights.hub_id
    }
    published = {
        f"timm/{name}" for tower in towers for name in timm.list_pretrained(f"{tower}.*") if "_ft_" not in name
    }
    left_out = published - {weights.hub_id for weights in PUBLISHED.values()}
    assert left_out == {"timm/vit_large_patch14_clip_224.apple_mclip2_dfndr2b"}  # its text tower is not causal


@pytest.mark.parametrize("name", [name for name in ON_HUB if PUBLISHED[name].open_clip])
def test_weights_are_those_of_a_pair_of_open_clip(name):
    import open_clip

    weights = PUBLISHED[name]
    model, tag = weights.open_clip
    cfg, config = open_clip.get_pretrained_cfg(model, tag), open_clip.get_model_config(model)
    assert cfg.get("quick_gelu", False) == weights.quick_gelu == config.get("quick_gelu", False)
    assert (cfg["mean"], cfg["std"], cfg["interpolation"]) == (weights.mean, weights.std, "bicubic")
    assert config["vision_cfg"]["image_size"] == weights.image_size
    text = {key: value for key, value in config["text_cfg"].items() if key not in ("context_length", "vocab_size")}
    assert {**text, "output_dim": config["embed_dim"]} == TEXT_CFGS[weights.entry]


def test_every_weights_have_a_pair_and_every_entry_a_text_tower():
    assert list(TEXT_CFGS) == list(dict.fromkeys(weights.entry for weights in PUBLISHED.values()))
    assert sorted(TEXT_CFGS) == ENTRIES
    for weights in PUBLISHED.values():
        assert [weights.open_clip, weights.clip_repo, weights.file].count(None) == 2
        assert TEXT_CFGS[weights.entry]["output_dim"] == weights.num_classes


@pytest.mark.parametrize("name", [name for name in ENTRIES if find_weights(name).hub_id])
def test_towers_have_the_shape_of_timms(name):
    with torch.device("meta"):
        ours, theirs = timm.create_model(name), timm.create_model(find_weights(name).hub_id.removeprefix("timm/"))
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
    assert [m.eps for m in ours.modules() if isinstance(m, torch.nn.LayerNorm)] == [
        m.eps for m in theirs.modules() if isinstance(m, torch.nn.LayerNorm)
    ]


def test_find_weights():
    assert find_weights("patchrank_clip_b16").name == "patchrank_clip_b16.openai"
    assert find_weights("patchrank_clip_b16.laion2b").open_clip == ("ViT-B-16", "laion2b_s34b_b88k")
    with pytest.raises(UserError, match="did you mean 'patchrank_clip_b16.laion2b'"):
        find_weights("patchrank_clip_b16.laion2")
    with pytest.raises(UserError, match="did you mean 'patchrank_clip_b16'"):
        find_weights("patchrank_clip_b61.openai")


# Tags


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_tag_decides_activation_and_transform_without_its_weights_too(name):
    weights, model = PUBLISHED[name], tiny(name)
    assert activation(model) == weights.act_layer == timm.models.get_model_args(model)["act_layer"]
    assert model.pretrained_cfg["tag"] == weights.tag
    config = resolve_model_data_config(model)
    assert (config["mean"], config["std"], config["crop_pct"]) == (weights.mean, weights.std, 1.0)
    assert (config["interpolation"], config["crop_mode"]) == ("bicubic", "center")
    assert config["input_size"] == (3, weights.image_size, weights.image_size)


def test_the_default_tag_and_one_that_does_not_exist():
    for entry in ENTRIES:
        assert tiny(entry).pretrained_cfg["tag"] == find_weights(entry).tag
    assert activation(tiny("patchrank_clip_b16")) == "quick_gelu"
    with pytest.raises(UserError, match="did you mean 'patchrank_clip_b16.laion2b'"):
        tiny("patchrank_clip_b16.laion2")


@pytest.mark.parametrize(
    "expected, kwargs",
    [
        ("gelu", {"act_layer": "gelu"}),
        ("gelu", {"pretrained_cfg": "laion2b"}),
        ("gelu", {"pretrained_cfg": {"tag": "laion2b", "num_classes": 512}}),
        ("gelu", {"pretrained_cfg": get_pretrained_cfg("patchrank_clip_b16.laion2b")}),
        ("quick_gelu", {"pretrained_cfg": {"num_classes": 512}}),
        ("quick_gelu", {"pretrained_cfg": {"tag": "mine", "num_classes": 512}}),
        ("quick_gelu", {"pretrained_cfg_overlay": {"crop_pct": 0.9}}),
        ("gelu", {"pretrained_cfg_overlay": {"hf_hub_id": "timm/vit_base_patch16_clip_224.laion2b"}}),
        ("gelu", {"pretrained_cfg_overlay": {"hf_hub_id": "timm/vit_base_patch16_clip_224.laion2b@1234567"}}),
        ("gelu", {"pretrained_cfg_overlay": {"tag": "laion2b", "file": "my.safetensors"}}),
        ("quick_gelu", {"pretrained_cfg_overlay": {"file": "my.safetensors"}}),
    ],
)
def test_a_configuration_in_any_form_finds_its_activation(expected, kwargs):
    model = tiny("patchrank_clip_b16", **kwargs)
    assert activation(model) == expected and model.num_classes == 512


@pytest.mark.parametrize("kwargs", [{}, {"act_layer": "quick_gelu"}])
def test_the_activation_survives_being_saved_by_timm(kwargs, tmp_path):
    model = tiny("patchrank_clip_b16.laion2b", **kwargs)
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert activation(again) == kwargs.get("act_layer", "gelu")
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(again(images), model(images))
    assert activation(timm.create_model(f"local-dir:{tmp_path}", act_layer="quick_gelu")) == "quick_gelu"


# The hub


def write_cache(cache, filename="model.safetensors", **kwargs) -> torch.nn.Module:
    """A tower's weights as the hub's client keeps them of `REPO`."""
    model = tiny("patchrank_clip_xsmall16", **kwargs)
    folder, revision = cache / f"models--{REPO.replace('/', '--')}", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision).mkdir(parents=True)
    save_file(model.state_dict(), folder / "snapshots" / revision / filename)
    return model


@pytest.fixture
def online(monkeypatch):
    """As if nobody had said that there is no network; takes the hub's address, and a bound on seconds."""

    def set_endpoint(endpoint: str, timeout: float = 2.0) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(hub, "TIMEOUT", timeout)

    return set_endpoint


@pytest.fixture
def port():
    """Of a socket that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


@pytest.mark.slow
def test_without_network_or_cache_the_error_comes_soon_even_where_name_look_up_hangs(tmp_path):
    code = """
import socket, time, timm, patchrank
from patchrank.utils.errors import UserError
socket.getaddrinfo = lambda *args, **kwargs: time.sleep(600)
start = time.monotonic()
try:
    timm.create_model("patchrank_clip_b16", pretrained=True)
except UserError as error:
    print(f"{time.monotonic() - start} {error}")
"""
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE" and "proxy" not in key.lower()}
    env |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://hub.invalid"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    seconds, message = done.stdout.split(maxsplit=1)
    assert float(seconds) < 5
    assert len(message.splitlines()) == 1
    for part in ("timm/vit_base_patch16_clip_224.openai", "hub.invalid gives no answer", "checkpoint file", "HF_HOME"):
        assert part in message


def test_offline_by_wish():
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set: give a checkpoint file"):
        timm.create_model("patchrank_clip_b16", pretrained=True)


def test_a_hub_that_refuses_or_keeps_silent(online, port, tmp_path):
    online("http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be reached \(.*refused"):
        hub.ensure_reachable(REPO, ["model.safetensors"], tmp_path)
    online(f"http://127.0.0.1:{port}", timeout=0.2)
    start = time.monotonic()
    with pytest.raises(UserError, match=f"127.0.0.1:{port} (gives no answer within 0.2|cannot be reached)"):
        hub.ensure_reachable(REPO, ["model.safetensors"], tmp_path)
    assert time.monotonic() - start < 1.5


def test_any_answer_of_the_hub_will_do(online, tmp_path):
    asked = []

    class Forbidden(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(403)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Forbidden) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online(f"http://127.0.0.1:{server.server_port}", timeout=10)
        hub.ensure_reachable(REPO, ["model.safetensors"], tmp_path)
        server.shutdown()
    assert len(asked) == 1


def test_a_cached_file_is_found_without_asking(online, port, tmp_path):
    write_cache(tmp_path)
    online(f"http://127.0.0.1:{port}", timeout=0.2)
    hub.ensure_reachable(REPO, ["model.safetensors"], tmp_path)
    hub.ensure_reachable(REPO, ["other.bin", "model.safetensors"], tmp_path)
    hub.ensure_reachable(f"{REPO}@{'0' * 40}", ["model.safetensors"], tmp_path)
    for repo, name in [(REPO, "other.bin"), (f"{REPO}@other", "model.safetensors"), ("a/b", "model.safetensors")]:
        with pytest.raises(UserError, match=f"weights {repo} are not in the cache"):
            hub.ensure_reachable(repo, [name], tmp_path)


@torch.no_grad()
def test_cached_weights_load_by_name_without_a_network(tmp_path):
    model = write_cache(tmp_path)
    again = tiny("patchrank_clip_xsmall16", pretrained=True, cache_dir=tmp_path)
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(again(images), model(images))


def test_weights_at_hand_need_no_hub(tmp_path, monkeypatch):
    model = tiny("patchrank_clip_b16")
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    for overlay in ({"file": str(tmp_path / "mine.safetensors")}, {"state_dict": model.state_dict()}):
        again = tiny("patchrank_clip_b16", pretrained=True, pretrained_cfg_overlay=overlay)
        assert torch.equal(again.pos_embed, model.pos_embed)

    def asked(*args):
        raise AssertionError(args)

    monkeypatch.setattr(patchrank_clip, "ensure_reachable", asked)
    tiny("patchrank_clip_b16", pretrained=True, pretrained_cfg_overlay={"state_dict": model.state_dict()})
    timm.create_model("patchrank_clip_digits", pretrained=True)
    with pytest.raises(AssertionError, match=r"'model.safetensors', 'pytorch_model.bin'"):
        tiny("patchrank_clip_b16", pretrained=True)
    with pytest.raises(AssertionError, match=r"\('open_clip_model.safetensors',\)"):
        overlay = {"hf_hub_filename": "open_clip_model.safetensors"}
        tiny("patchrank_clip_b16", pretrained=True, pretrained_cfg_overlay=overlay)


@torch.no_grad()
def test_features_of_the_tower_that_ships_with_its_predictor():
    tower = timm.create_model("patchrank_clip_digits", pretrained=True, keep_rate=0.6).eval()
    features = timm.create_model(
        "patchrank_clip_digits", pretrained=True, keep_rate=0.6, features_only=True, out_indices=(5, 11)
    ).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = tower.forward_intermediates(images, indices=[5, 11], intermediates_only=True)
    for ours, theirs in zip(features(images), expected):
        assert ours.shape == (2, 64, 8, 8) and torch.equal(ours, theirs)
