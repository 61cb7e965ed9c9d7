"""What one trial depends on: the settings that a sweep may vary, and the one place of their defaults.

Python functions read them from `DEFAULTS`; the commands make their flags from these very fields, descriptions included.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from patchrank.config.base import ListOf, Seed, Share, Strict

MIN_REPAIR_IMAGES = 50  # a fifth of them chooses the ridge, and fewer than ten would choose by luck


NAMES = "entry of ours, timm:NAME, hf:REPO_OR_FOLDER, local-dir:FOLDER, open_clip:CONFIG.json or open_clip:NAME/TAG"


class ModelConfig(Strict):
    name: str = Field("patchrank_clip_digits", description=NAMES)
    checkpoint: str | None = Field(None, description="file of weights, whoever saved it (default: the model's own)")
    img_size: int | None = Field(None, ge=1, description="side of the images, in pixels (default: the model's own)")


class DataConfig(Strict):
    tasks: ListOf[str] = Field(("digits",), min_length=1, description="what is classified; results are means of tasks")
    root: str | None = Field(None, description="folder, list or tars of the images; embedded tasks need none")
    vocabulary: str | None = Field(None, description="YAML file of class names and templates")
    templates: Literal["plain", "openai7", "openai80"] | None = Field(None, description="templates in place of others")
    n_train: int | None = Field(256, ge=1, description="images of each task that rankings are fitted to")
    n_val: int | None = Field(128, ge=1, description="images of each task that choices are made on")
    n_test: int | None = Field(None, ge=0, description="images of each task that are reported on; 0: test is not read")
    n_oracle: int | None = Field(None, ge=1, description="first test images, which alone golden rankings are made for")


class GoldenConfig(Strict):
    # what is lost of the true class, of the answer, of the embedding
    metric: Literal["label", "confidence", "preservation"] = Field("preservation", description="which golden scores")
    window: int = Field(2, ge=1, description="golden scores: side of the removed square, in tokens")
    stride: int = Field(1, ge=1, description="golden scores: tokens from one square to the next")
    # first: the first of `pruning.locations`
    remove_at: int | Literal["first"] = Field(4, description="golden scores: layer, from 1, before which it leaves")
    rounds: int = Field(1, ge=1, description="golden scores: how often what is left is scored")


class PredictorConfig(Strict):
    name: str = Field("mix_mlp", description="mix_mlp, mlp, transformer, prior, or one of your own")
    dim: int = Field(16, ge=1, description="channels of the predictor")
    head: Literal["linear", "mean"] = Field("linear", description="how the channels of a token become its score")
    loss: str = Field("bce", description="bce, listwise or eq8")
    epochs: int = Field(50, ge=1, description="passes over the training images")
    lr: float = Field(0.01, gt=0, description="learning rate at the start")
    # own: each task has a predictor of its own; others: one of the other tasks; else one for all, fitted on these tasks
    fit_on: Literal["own", "others"] | Annotated[ListOf[str], Field(min_length=1)] = "own"


class PruningConfig(Strict):
    reducer: str = Field("predictor", description="who ranks patches")
    leftovers: str | None = Field(None, description="what becomes of patches that are not kept: drop (default), merge")
    keep_rate: Share = Field(1.0, description="share of patches that are left at the end")
    drop_counts: ListOf[int] | None = Field(None, description="patches that leave at each location; beats the others")
    locations: ListOf[int] = Field((4, 6, 8, 10), min_length=1, description="layers, from 1, before which they leave")
    budget: Share | None = Field(None, description="share of the whole tower's MACs to stay within; beats keep_rate")
    taper: Share = Field(1.0, description="what leaves at a location, as a share of what left at the one before")
    align: int = Field(1, ge=1, description="sequences behind each location are a multiple of this long, in tokens")
    metric: Literal["features", "keys"] = Field("features", description="by which patches are compared to merge")
    protection: float | None = Field(None, ge=0, description="weight of importance in matching (default: reducer's)")
    drop_share: float = Field(0.0, ge=0, le=1, description="of patches that leave, the share dropped and not merged")

    @model_validator(mode="after")
    def _counts_are_not_rounded(self) -> PruningConfig:
        if self.align != 1 and self.drop_counts is not None:
            counts = ", ".join(map(str, self.drop_counts))
            raise ValueError(
                f"align {self.align} rounds counts, but drop_counts {counts} say themselves what leaves; try align 1, "
                "or keep_rate or budget in place of counts"
            )
        return self


class PromptConfig(Strict):
    """How learned tokens are tuned; None: the preset's, or what the tower asks for (`patchrank.prompt.presets`)."""

    name: str = Field("coupled", description="the prompt layer, as it is registered")
    mode: Literal["none", "T", "V", "TV"] = Field("TV", description="whose tokens learn: text, visual or both")
    # distill: back to the whole image's embedding
    loss: Literal["cross_entropy", "distill"] = Field("cross_entropy", description="distill: mode V, without labels")
    norm_gains: bool = Field(False, description="the image tower's LayerNorms learn gains as well")
    num_tokens: int | None = Field(None, ge=1, description="learned tokens (default: 16, or 4 below 100 patches)")
    preset: Literal["coop", "maple", "digits", "distill"] | None = Field(
        None, description="default: coop in mode T, distill for that loss, digits for the embedded model, else maple"
    )
    shots: int = Field(16, ge=1, description="labelled images of each class")
    images: int | None = Field(None, ge=1, description="images that distillation sees, without labels (default: 1024)")
    epochs: int | None = Field(None, ge=1, description="passes over the training images (default: the preset's)")
    lr: float | None = Field(None, gt=0, description="learning rate (default: the preset's)")
    batch_size: int | None = Field(None, ge=1, description="images of a step (default: the preset's)")
    bias: bool = Field(False, description="gives the map to visual tokens a bias, as MaPLe does")
    class_specific: bool = Field(False, description="each class has tokens of its own, in mode T")
    words: str | None = Field(None, min_length=1, description="text to start from, in place of random tokens")
    augment: bool | None = Field(None, description="CoOp's crops and flips (default: for photographs)")
    patience: int | None = Field(None, ge=1, description="epochs that are no better on val before it stops")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the frozen towers; what is learned stays fp32")
    checkpointing: bool = Field(False, description="less memory: activations are computed twice")

    @model_validator(mode="after")
    def _parts_fit(self) -> PromptConfig:
        if self.loss == "distill" and self.mode not in ("none", "V"):
            raise ValueError(f"loss 'distill' learns visual tokens alone, so mode must be 'V', but is {self.mode!r}")
        if self.norm_gains and self.mode == "T":
            raise ValueError("norm_gains are the image tower's, so mode must be 'V' or 'TV', but is 'T'")
        if self.class_specific and self.mode not in ("none", "T"):
            need = "need mode 'T', since an image's class is not known"
            raise ValueError(f"class-specific prompts {need}; mode is {self.mode!r}")
        return self


class RepairConfig(Strict):
    """How the projection of a pruned tower is solved anew (`patchrank.layers.repair`)."""

    images: int = Field(1024, ge=MIN_REPAIR_IMAGES, description="training images that a repair is solved on")
    ridge: float | None = Field(
        None, gt=0, description="pull towards the old projection (default: by a held-out fifth)"
    )


class TrialConfig(Strict):
    """Everything that one trial depends on."""

    seed: Seed = Field(0, description="of all that is drawn at random")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    golden: GoldenConfig = GoldenConfig()
    predictor: PredictorConfig = PredictorConfig()
    pruning: PruningConfig = PruningConfig()
    controls: ListOf[Literal["random", "reversed"]] = Field((), description="other orders to drop as many patches in")
    prompt: PromptConfig | None = None
    repair: RepairConfig | None = None

    @model_validator(mode="after")
    def _sections_fit(self) -> TrialConfig:
        if self.repair is not None and self.prompt is not None and self.prompt.mode != "none":
            raise ValueError("repair and prompt exclude each other, since both change the embedding; try repair: null")
        if self.repair is not None and self.pruning.reducer == "golden":
            raise ValueError("repair needs a reducer that ranks by itself, but 'golden' is an oracle; try repair: null")
        return self


DEFAULTS = TrialConfig()
