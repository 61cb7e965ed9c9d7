"""What one trial depends on: the settings that a sweep may vary."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from patchrank.config.base import ListOf, Strict


class ModelConfig(Strict):
    name: str = "patchrank_clip_digits"
    checkpoint: str | None = None


class DataConfig(Strict):
    tasks: ListOf[str] = Field(("digits",), min_length=1)  # results are means over them
    root: str | None = None
    vocabulary: str | None = None  # YAML file of class names and templates
    templates: Literal["plain", "openai7", "openai80"] | None = None  # prompts in place of each task's own
    n_train: int | None = Field(256, ge=1)  # images of each task
    n_val: int | None = Field(128, ge=1)
    n_test: int | None = Field(None, ge=0)  # 0: trials do not look at test
    n_oracle: int | None = Field(None, ge=1)  # the first test images, which alone `golden` rankings are made for


class GoldenConfig(Strict):
    metric: Literal["label", "confidence", "preservation"] = "preservation"
    window: int = Field(2, ge=1)
    stride: int = Field(1, ge=1)
    remove_at: int | Literal["first"] = 4
    rounds: int = Field(1, ge=1)


class PredictorConfig(Strict):
    name: str = "mix_mlp"
    dim: int = Field(16, ge=1)
    head: Literal["linear", "mean"] = "linear"
    loss: str = "bce"
    epochs: int = Field(50, ge=1)
    lr: float = Field(0.01, gt=0)
    # each task its own predictor, or one for all, fitted on these tasks
    fit_on: Literal["own"] | Annotated[ListOf[str], Field(min_length=1)] = "own"


class PruningConfig(Strict):
    reducer: str = "predictor"
    leftovers: str = "drop"
    keep_rate: float = Field(0.6, gt=0, le=1)
    drop_counts: ListOf[int] | None = None
    locations: ListOf[int] = Field((4, 6, 8, 10), min_length=1)


class PromptConfig(Strict):
    """How learned tokens are tuned; None: the preset's, or what the tower asks for (`patchrank.prompt.presets`)."""

    name: str = "coupled"  # the prompt layer, as it is registered
    mode: Literal["none", "T", "V", "TV"] = "TV"
    loss: Literal["cross_entropy", "distill"] = "cross_entropy"  # distill: back to the whole image's embedding
    norm_gains: bool = False  # gains of the image tower's LayerNorms are learned as well
    num_tokens: int | None = Field(None, ge=1)
    preset: Literal["coop", "maple", "digits", "distill"] | None = None
    shots: int = Field(16, ge=1)  # images of each class, with their labels
    images: int | None = Field(None, ge=1)  # that distillation sees, without labels
    epochs: int | None = Field(None, ge=1)
    lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    batch_size: int | None = Field(None, ge=1)
    bias: bool = False  # of the map to visual tokens; the paper's has none, MaPLe's has
    class_specific: bool = False
    words: str | None = Field(None, min_length=1)  # to start from, in place of N(0, 0.02)
    augment: bool | None = None  # CoOp's crops and flips; None: photographs alone, since flips change digits
    patience: int | None = Field(None, ge=1)  # epochs that are no better on val, after which it stops
    precision: Literal["fp32", "bf16"] = "fp32"  # of the frozen towers; what is learned is fp32
    checkpointing: bool = False  # computes activations twice instead of keeping them

    @model_validator(mode="after")
    def _parts_fit(self) -> PromptConfig:
        if self.loss == "distill" and self.mode not in ("none", "V"):
            raise ValueError(f"loss 'distill' learns visual tokens alone, so mode must be 'V', but is {self.mode!r}")
        if self.norm_gains and self.mode == "T":
            raise ValueError("norm_gains are the image tower's, so mode must be 'V' or 'TV', but is 'T'")
        if self.class_specific and self.mode not in ("none", "T"):
            raise ValueError(
                f"class-specific prompts need mode 'T', since an image's class is not known; mode is {self.mode!r}"
            )
        return self


class TrialConfig(Strict):
    """Everything that one trial depends on."""

    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    golden: GoldenConfig = GoldenConfig()
    predictor: PredictorConfig = PredictorConfig()
    pruning: PruningConfig = PruningConfig()
    controls: ListOf[Literal["random", "reversed"]] = ()  # other orders in which a predictor's trial drops as much
    prompt: PromptConfig | None = None
