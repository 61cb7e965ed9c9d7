import json

import pytest
import torch
from safetensors.torch import load_file

from patchrank import pretrain
from patchrank.utils.errors import UserError


@pytest.mark.slow
def test_resuming_equals_going_through(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "BATCH_SIZE", 8)
    monkeypatch.setattr(pretrain, "accuracy", lambda *_: 0.0)
    pretrain.train(tmp_path / "whole", steps=4, every=2)
    stopped = RuntimeError("stopped")

    def stop(path, *rest):
        save(path, *rest)
        raise stopped

    save = pretrain.save_checkpoint
    with monkeypatch.context() as context:
        context.setattr(pretrain, "save_checkpoint", stop)
        try:
            pretrain.train(tmp_path / "halves", steps=4, every=2)
        except RuntimeError as error:
            assert error is stopped
    pretrain.train(tmp_path / "halves", steps=4, every=2)
    whole, halves = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() and any(key.startswith("optim.") for key in whole)
    for key in whole:
        torch.testing.assert_close(halves[key], whole[key], atol=1e-6, rtol=1e-5)
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4]


def test_batches_depend_on_seed_and_step_alone():
    one, two = pretrain.CurriculumBatches()[7], pretrain.CurriculumBatches()[7]
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2] == two[2]
    assert not torch.equal(one[0], pretrain.CurriculumBatches(seed=1)[7][0])


def test_checkpoints_are_kept_in_a_local_folder():
    with pytest.raises(UserError, match="--out http://127.0.0.1:9/x: checkpoints are kept in a local folder"):
        pretrain.main(["--out", "http://127.0.0.1:9/x", "--steps", "1"])


def test_identical_captions_count_as_positives(clip):
    """With every image of one class, all of them are positives of one caption, and the loss is that of one row."""
    tokens = clip.tokenize([f"a {name}" for name in ("zero", "one")])
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        images = torch.nn.functional.normalize(clip.visual(clip.normalize(pixels.float() / 255)), dim=-1)
        texts = torch.nn.functional.normalize(clip.text(tokens), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * images @ texts.T
        expected = (-logits.log_softmax(1)[:, 0].mean() - logits[:, 0].log_softmax(0).mean()) / 2
        labels = torch.zeros(4, dtype=torch.long)
        torch.testing.assert_close(pretrain.contrastive_loss(clip, pixels, labels, tokens), expected)


def test_batches_travel_without_sockets():
    """Where TMPDIR is as long as Slurm's, tensors of another process would never arrive."""
    batch = pretrain.CurriculumBatches()[7]
    sent = pretrain.as_arrays(batch)
    assert not any(isinstance(part, torch.Tensor) for part in sent)
    assert torch.equal(torch.from_numpy(sent[0]), batch[0]) and torch.equal(torch.from_numpy(sent[1]), batch[1])
