"""All settings of a run: what they mean, what is allowed, and which source wins.

Settings come from, in rising precedence, the defaults here, a preset, a JSON file and the command line. Every
field carries its own description; `--help` and `docs/settings.md` are made from them.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from sheepop.utils.errors import ConfigError, did_you_mean
from sheepop.utils.files import read_json

# An integer for which 0 (or null in a file) asks for the value that the other settings imply; the resolved
# settings always hold the number itself.
Derived = Annotated[int, Field(ge=0), BeforeValidator(lambda value: 0 if value is None else value)]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "relu_squared", "swiglu", "geglu"]
GATED_ACTIVATIONS = ("swiglu", "geglu")


class Section(BaseModel):
    """Base of the sections: unknown keys, wrong types and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The network. `classic` and `modern` are points in this space; each setting can be switched alone."""

    vocab_size: PositiveInt = Field(
        8192, description="entries asked of a tokenizer trained on the way; then the tokenizer's own number"
    )
    d_model: PositiveInt = Field(256, description="width of the residual stream")
    num_layers: PositiveInt = Field(6, description="number of transformer blocks")
    num_heads: PositiveInt = Field(8, description="query heads of each attention layer")
    num_kv_heads: Derived = Field(
        0, description="key/value heads, shared by groups of query heads; 0: as many as num_heads"
    )
    head_dim: Derived = Field(0, description="width of one head; 0: d_model / num_heads")
    d_ff: Derived = Field(
        0, description="width inside the feed-forward; 0: 4 x d_model, or 8/3 x d_model (to 32) when gated"
    )
    max_seq_len: PositiveInt = Field(256, description="longest context in tokens")
    dropout: Fraction = Field(0.1, description="share of activations dropped in training")
    attention_dropout: Fraction | None = Field(
        None,
        description="share of attention weights dropped, which takes a CPU half as long again; null: as dropout",
    )
    activation: Activation = Field("gelu", description="feed-forward non-linearity; swiglu and geglu are gated")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="normalisation before each sub-layer")
    layer_norm_eps: float = Field(1e-5, gt=0, description="added to the variance in every norm")
    bias: bool = Field(False, description="biases in linear layers and layer norms")
    tie_weights: bool = Field(True, description="one matrix for token embedding and output head")
    positions: Literal["rotary", "sinusoidal", "learned", "none"] = Field(
        "rotary", description="how the order of tokens is told to the network"
    )
    ngram_order: PositiveInt = Field(
        1, description="embed the last 2, 3, ... up to so many tokens together as well, by look-ups; 1: none"
    )
    ngram_entries: PositiveInt = Field(
        16384, description="most rows of each table of such groups; where there are more groups they share rows"
    )
    conv_width: PositiveInt = Field(
        1, description="attention and feed-forward read so many last tokens mixed, each channel by itself; 1: none"
    )
    copy_width: Annotated[int, Field(ge=0)] = Field(
        0, description="the head can repeat tokens of the text, found by queries and keys of this width; 0: it cannot"
    )
    rotary_dim: Annotated[int, Field(ge=0)] = Field(
        0, description="numbers of each head that rotary positions turn, the first ones; 0: all of head_dim"
    )
    rope_theta: float = Field(10000.0, gt=1, description="base of the rotary wavelengths")
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = Field(
        "none", description="how rotary positions are stretched to contexts longer than trained"
    )
    rope_scaling_factor: float = Field(1.0, ge=1, description="how many times longer than the trained context")
    rope_trained_len: Annotated[int, Field(ge=0)] = Field(
        0, description="the context before it was stretched by yarn or llama3; 0: max_seq_len / rope_scaling_factor"
    )
    parallel_residual: bool = Field(
        False, description="attention and feed-forward read the same stream and are added together, as in GPT-NeoX"
    )
    qk_norm: bool = Field(False, description="RMS-normalise queries and keys of each head")
    sliding_window: Derived = Field(0, description="each token sees this many tokens back, itself included; 0: all")
    attention_sinks: Annotated[int, Field(ge=0)] = Field(
        0, description="the first so many tokens of a text stay in sight beside the sliding window"
    )
    attention: Literal["optimized", "reference"] = Field(
        "optimized", description="fused kernels, or the same attention written out to be read"
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        "none",
        description="bits in which the matrices are kept, for inference alone; sheepop quantize makes such a model",
    )
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    zero_init_outputs: bool = Field(
        False, description="projections into the residual stream begin at zero, so that each block begins as no change"
    )

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward multiplies its activation by a second projection."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def dropped_attention(self) -> float:
        """The share of attention weights dropped in training."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def turned_dim(self) -> int:
        """The numbers of each head that rotary positions turn."""
        return self.rotary_dim or self.head_dim

    @property
    def trained_seq_len(self) -> float:
        """The context that rotary positions were made for, before `rope_scaling` stretched it."""
        return self.rope_trained_len or self.max_seq_len / self.rope_scaling_factor

    @model_validator(mode="after")
    def _derive_and_check(self) -> "ModelConfig":
        if not self.head_dim:
            if self.d_model % self.num_heads:
                raise ValueError(
                    f"d_model ({self.d_model}) must be divisible by num_heads ({self.num_heads}); "
                    f"nearest: d_model {_nearest_multiple(self.d_model, self.num_heads)}, or set head_dim"
                )
            self.head_dim = self.d_model // self.num_heads
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}), "
                "because each key/value head serves an equal group of query heads"
            )
        if not self.d_ff:
            self.d_ff = -(-8 * self.d_model // 96) * 32 if self.is_gated else 4 * self.d_model
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"rotary positions turn pairs of numbers, so head_dim ({self.head_dim}) must be even; "
                "change d_model or num_heads, or choose positions 'learned'"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim ({self.rotary_dim}) must be even and at most head_dim ({self.head_dim})")
        if self.rotary_dim and self.positions != "rotary":
            raise ValueError(f"rotary_dim ({self.rotary_dim}) needs positions 'rotary', not '{self.positions}'")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"sinusoidal positions need an even d_model, not {self.d_model}")
        if self.rope_scaling != "none" and self.positions != "rotary":
            raise ValueError(f"rope_scaling '{self.rope_scaling}' needs positions 'rotary', not '{self.positions}'")
        if self.rope_trained_len and self.rope_scaling not in ("yarn", "llama3"):
            raise ValueError(
                f"rope_trained_len ({self.rope_trained_len}) is for rope_scaling 'yarn' or 'llama3', "
                f"not '{self.rope_scaling}'"
            )
        if (self.rope_scaling == "none") != (self.rope_scaling_factor == 1.0):
            raise ValueError(
                f"rope_scaling '{self.rope_scaling}' does not go with rope_scaling_factor "
                f"{self.rope_scaling_factor}: set both, or leave both"
            )
        if self.attention_sinks and not self.sliding_window:
            raise ValueError(
                f"attention_sinks ({self.attention_sinks}) needs a sliding_window above 0: without one each token "
                "sees the first tokens anyway"
            )
        return self


LENGTH_KEYS = ("max_epochs", "max_steps", "max_minutes")


class TrainingConfig(Section):
    """The optimisation. One optimizer step sees batch_size x gradient_accumulation_steps sequences."""

    batch_size: PositiveInt = Field(16, description="sequences per forward pass")
    max_epochs: PositiveInt | None = Field(None, description="length of the run in passes over the text (default 10)")
    max_steps: PositiveInt | None = Field(None, description="length of the run in optimizer steps")
    max_minutes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="length of the run in minutes, start and end included; its steps are decided on the way"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="adamw; or muon for the matrices inside the blocks, with adamw for all else"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1, description="the last learning rate over the peak")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "cosine", description="shape after warm-up; wsd is warm-up, stable, decay"
    )
    decay_fraction: float = Field(0.2, gt=0, le=1, description="share of the run that schedule 'wsd' decays over")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(100, description="steps of linear warm-up")
    token_noise: Fraction = Field(
        0.0, description="share of input tokens replaced by random ones of the text; against learning it by heart"
    )
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices; never of norms and biases")
    beta1: Fraction = Field(0.9, description="decay of AdamW's first moment")
    beta2: Fraction = Field(0.95, description="decay of AdamW's second moment")
    shared_spelling: bool = Field(
        False, description="tokens that are spelled alike also move together in the embedding; for rare ones"
    )
    muon_momentum: Fraction = Field(0.95, description="decay of Muon's running sum of gradients")
    muon_beta2: Fraction = Field(
        0.0, description="decay of the mean square of each row of Muon's updates, which it is divided by; 0: it is not"
    )
    muon_rounds: Annotated[int, Field(ge=3, le=5)] = Field(
        5, description="rounds that make Muon's update orthogonal; 3 are faster, for small batches of wide models"
    )
    muon_lr_ratio: float = Field(1.0, gt=0, description="Muon's learning rate over learning_rate")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to the root of AdamW's second moment")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="gradients are scaled down to this norm; null: never"
    )
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="micro-batches of one step, shared among the processes"
    )
    use_amp: bool = Field(True, description="mixed precision where the hardware computes in it")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description="auto follows use_amp, the device and the model's width; fp8 is bf16 with the products of large "
        "layers in 8 bits, on GPUs that have them",
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="how several processes share a model: each holds all of it (ddp) or a part (fsdp); auto is fsdp "
        "where a GPU could not hold all of it",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="compile the blocks with torch.compile; auto does where a compiler is there, measured steps are "
        "faster and the run is long enough to repay it",
    )
    weight_gradients: Literal["auto", "onednn", "blas"] = Field(
        "auto",
        description="the library for gradients of large fp32 weights on a CPU where oneDNN makes the other products, "
        "not on Intel's; auto measures which is faster where the run is long enough to repay it",
    )
    hidden_gradients: Literal["auto", "onednn", "blas"] = Field(
        "auto", description="the same for gradients of what such layers read"
    )
    attention_kernels: Literal["auto", "on", "off"] = Field(
        "auto",
        description="on a CPU let attention learn by kernels that numba compiles; auto does where numba is there and "
        "the run is long enough to repay that, from some three minutes on",
    )
    head_kernels: Literal["auto", "on", "off"] = Field(
        "auto", description="the same for the head's loss in fp32, and for what it copies"
    )
    activation_checkpointing: bool = Field(
        False, description="keep one activation a layer and compute the others again: less memory, a third more work"
    )
    on_bad_numbers: Literal["stop", "skip"] = Field(
        "stop", description="when loss or gradient is not finite: end the run, or leave the step out"
    )
    on_loss_spike: Literal["report", "skip", "ignore"] = Field(
        "report", description="when the loss jumps: say so, leave the step out too, or do not look"
    )
    spike_threshold: float = Field(
        6.0, gt=0, description="a loss so many standard deviations above the mean of the last 128 steps is a spike"
    )
    max_skipped_steps: PositiveInt = Field(10, description="steps left out in a row before the run ends")
    init_from: str | None = Field(
        None,
        description="checkpoint whose model the run begins with, with its settings and tokenizer; null: a new one",
    )
    save_dir: str = Field("checkpoints", min_length=1, description="the run's folder")
    save_interval: PositiveInt | None = Field(None, description="steps between extra checkpoints; null: epochs only")
    keep_last: PositiveInt = Field(
        3, description="step checkpoints that are kept; epochs and the best are never removed"
    )
    keep_every: PositiveInt | None = Field(
        None, description="checkpoints at multiples of so many steps are never removed; null: keep_last decides"
    )
    async_save: bool = Field(
        False, description="write checkpoints beside the training, from a copy of weights and moments"
    )
    log_interval: PositiveInt = Field(10, description="steps between lines of progress")
    eval_interval: PositiveInt | None = Field(
        250, description="steps between validations (one more at each epoch's end); null: ten over the run"
    )
    eval_max_tokens: PositiveInt = Field(
        100_000, description="validation tokens scored during training, spread evenly; `sheepop evaluate` scores all"
    )
    sample_interval: PositiveInt | None = Field(None, description="steps between samples; null: at each validation")
    sample_prompt: str = Field("", description="what the samples continue; empty: the beginning of a document")
    sample_tokens: Annotated[int, Field(ge=0)] = Field(64, description="tokens of a sample during training; 0: none")
    tensorboard: bool = Field(False, description="also write TensorBoard events (needs the 'tensorboard' extra)")

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        given = [key for key in LENGTH_KEYS if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both set the length of the run; keep one of them")
        if not given:
            self.max_epochs = 10
        return self


class DataConfig(Section):
    """Text and tokens."""

    path: str | None = Field(None, description="text files, folders, or a prepared folder (the command's --data)")
    data_dir: str = Field("data", min_length=1, description="where downloads and corpora prepared on the way are kept")
    tokenizer: str = Field("bpe", min_length=1, description="bpe, char or word to train one, or the PATH of one")
    max_length: Derived = Field(0, description="tokens of a training sequence; 0: model.max_seq_len")
    stride: Derived = Field(0, description="tokens from one sequence's start to the next; 0: max_length (no overlap)")
    shift_windows: bool = Field(
        True,
        description="from the second epoch on sequences begin elsewhere, in each epoch by another part of the stride, "
        "so that a text is not cut in the same places again (packing concatenate)",
    )
    num_workers: Annotated[int, Field(ge=0)] = Field(1, description="threads that load ahead; 0: none")
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="share of the text held out to validate")
    document_separator: str | None = Field(
        "<|endoftext|>", description="text that ends a document inside a file; null: one document a file"
    )
    packing: Literal["concatenate", "best_fit"] = Field(
        "concatenate",
        description="how documents fill sequences: one behind the other, cut wherever a sequence ends; or placed so "
        "that few are cut (Ding et al. 2024), which sets document_mask",
    )
    document_mask: bool = Field(False, description="tokens see only their own document")


class Config(Section):
    """A whole run."""

    preset: str | None = Field(None, description="named settings that lie under the file's own")
    model: ModelConfig = Field(default_factory=ModelConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    device: str = Field("auto", min_length=1, description="auto, cpu, cuda, cuda:N or mps")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(42, description="seed of every random choice")

    @model_validator(mode="after")
    def _derive_and_check(self) -> "Config":
        data, model = self.data, self.model
        data.max_length = data.max_length or model.max_seq_len
        data.stride = data.stride or data.max_length
        data.document_mask = data.document_mask or data.packing == "best_fit"
        if data.max_length > model.max_seq_len:
            raise ValueError(
                f"data.max_length ({data.max_length}) is longer than model.max_seq_len ({model.max_seq_len}); "
                "the model has no positions for the rest"
            )
        if data.stride > data.max_length:
            raise ValueError(
                f"data.stride ({data.stride}) is larger than data.max_length ({data.max_length}), "
                "so tokens between the sequences would never be trained on"
            )
        if data.packing == "best_fit" and data.stride != data.max_length:
            raise ValueError(
                f"data.stride ({data.stride}) is not data.max_length ({data.max_length}), but sequences that are "
                "packed (data.packing best_fit) cannot overlap; leave the stride out, or choose packing concatenate"
            )
        return self

    def with_training(self, **changes: Any) -> "Config":
        """Return these settings with some of the training's changed."""
        return self.model_copy(update={"training": self.training.model_copy(update=changes)})


# A preset's value may be a function of the other model settings, so that switching one of them alone still fits.
PRESETS: Mapping[str, Mapping[str, Mapping[str, object | Callable[[Mapping[str, Any]], object]]]] = {
    "classic": {},
    "modern": {
        "model": {
            "norm": "rmsnorm",
            "activation": "swiglu",
            "qk_norm": True,
            "dropout": 0.0,
            "num_kv_heads": lambda model: model["num_heads"] // 2 if model["num_heads"] % 2 == 0 else 0,
        },
    },
    # Small enough to see many words in two minutes on two cores; `sheepop demo` itself asks the dial.
    "demo": {
        "model": {
            "vocab_size": 4096,
            "d_model": 128,
            "num_layers": 4,
            "num_heads": 4,
            "max_seq_len": 256,
            "dropout": 0.0,
        },
        "training": {
            "batch_size": 4,
            "max_minutes": 2.8,
            "learning_rate": 3e-3,
            "min_learning_rate_ratio": 0.02,
            "warmup_steps": 30,
            "log_interval": 50,
            "eval_interval": None,
            "eval_max_tokens": 8_192,
            "sample_prompt": "ROMEO:\n",
            "sample_tokens": 70,
        },
        "data": {"val_fraction": 0.05},
    },
    # GPT-2 "small" as published (Radford et al. 2019): exports to transformers' GPT2LMHeadModel.
    "gpt2": {
        "model": {
            "vocab_size": 50257,
            "d_model": 768,
            "num_layers": 12,
            "num_heads": 12,
            "max_seq_len": 1024,
            "activation": "gelu_tanh",
            "positions": "learned",
            "bias": True,
        },
        "training": {"learning_rate": 6e-4, "warmup_steps": 2000},
    },
    # nanoGPT's CPU setting for characters: the size of the project's throughput benchmark.
    "nano": {
        "model": {"d_model": 128, "num_layers": 4, "num_heads": 4, "max_seq_len": 64, "dropout": 0.0},
        "training": {"batch_size": 12, "max_steps": 2000},
        "data": {"tokenizer": "char"},
    },
}

Nested = dict[str, Any]


def load_config(
    file: Path | None = None, *, preset: str | None = None, overrides: Mapping[str, object] | None = None
) -> Config:
    """Combine defaults, a preset, a JSON file and dotted command-line overrides into checked settings.

    Args:
        file: a JSON file with the sections of `Config`, all optional.
        preset: name of a preset; it wins over the one that the file names.
        overrides: e.g. `{"training.learning_rate": 3e-4}`.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible combination, with the key and what is allowed.
    """
    from_file = read_json(file, ConfigError) if file else {}
    from_command_line: Nested = {}
    for key, value in (overrides or {}).items():
        *sections, name = key.split(".")
        level = from_command_line
        for section in sections:
            level = level.setdefault(section, {})
        level[name] = value
    preset = preset or from_command_line.get("preset") or from_file.get("preset") or "classic"
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(
            f"There is no preset {preset!r}.{did_you_mean(str(preset), PRESETS)} Choose one of: {', '.join(PRESETS)}."
        )
    from_preset = {section: dict(values) for section, values in PRESETS[preset].items()}
    merged = _merge(from_preset, from_file, from_command_line)
    merged["preset"] = preset
    _keep_one_length(merged, (from_preset, from_file, from_command_line))
    _resolve_functions(merged)
    return parse_config(merged, source=str(file) if file else "the settings")


def parse_config(settings: Mapping[str, object], *, source: str) -> Config:
    """Check plain settings (as read from JSON) and fill in what they imply.

    Raises:
        ConfigError: names the key, the value, what is allowed and the nearest valid name.
    """
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
    raise ConfigError(f"In {source}: " + " ".join(problems))


def parse_value(text: str) -> object:
    """Read a command-line value: JSON where it is JSON (`3e-4`, `true`, `null`), else the text itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def parse_overrides(arguments: Sequence[str]) -> dict[str, object]:
    """Read `--section.key value` and `--section.key=value` into dotted settings; a bare `--section.key` means true.

    Raises:
        ConfigError: an unknown option or setting (with the nearest name), or a stray word.
    """
    names = setting_names()
    overrides: dict[str, object] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        key, equals, text = option.removeprefix("--").partition("=")
        if not option.startswith("--"):
            raise ConfigError(
                f"Cannot make sense of '{option}'. Settings are given as `--training.learning_rate 3e-4`."
            )
        if key not in names:
            by_last_word = {name.split(".")[-1]: name for name in names}
            nearest = did_you_mean(key, names) or did_you_mean(by_last_word.get(key, ""), names)
            raise ConfigError(f"There is no option '--{key}'.{nearest} `--help` lists all options and settings.")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        overrides[key] = parse_value(text)
    return overrides


def setting_names() -> list[str]:
    """Return every setting in dotted form, e.g. `training.learning_rate`."""
    return [name for name, *_ in describe_settings()]


def describe_settings() -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and description of every setting, in the order of the sections."""
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for key, inner in field.annotation.model_fields.items():
                yield f"{name}.{key}", _type_name(inner.annotation), json.dumps(inner.default), inner.description or ""
        else:
            yield name, _type_name(field.annotation), json.dumps(field.default), field.description or ""


def _merge(*levels: Mapping[str, Any]) -> Nested:
    merged: Nested = {}
    for level in levels:
        for key, value in level.items():
            is_section = isinstance(value, Mapping) and isinstance(merged.get(key, {}), Mapping)
            merged[key] = _merge(merged.get(key, {}), value) if is_section else value
    return merged


def _keep_one_length(merged: Nested, levels: Sequence[Mapping[str, Any]]) -> None:
    """Keep the length of the run that the highest level sets; lower levels must not add a second one."""
    for level in reversed(levels):
        training = level.get("training", {})
        given = [key for key in LENGTH_KEYS if isinstance(training, Mapping) and training.get(key) is not None]
        if given:
            for key in LENGTH_KEYS:
                if key not in given:
                    merged["training"].pop(key, None)
            return


def _resolve_functions(merged: Nested) -> None:
    model = merged.get("model")
    if not isinstance(model, dict):
        return
    defaults = {name: field.default for name, field in ModelConfig.model_fields.items()}
    for key, value in model.items():
        if callable(value):
            heads = {**defaults, **model}["num_heads"]
            model[key] = value({**defaults, **model}) if isinstance(heads, int) else 0


def _explain(problem: ErrorDetails) -> str:
    """Say in a sentence or two what is wrong with one setting."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    value = problem["input"]
    if problem["type"] == "extra_forbidden":
        names = setting_names()
        section = ".".join(location[:-1])
        siblings = [name.split(".")[-1] for name in names if name.rpartition(".")[0] == section]
        if not section:
            siblings = list(Config.model_fields)
        same_name = [name for name in names if name.split(".")[-1] == location[-1]]
        if same_name:  # the right name in the wrong section
            nearest = f" Did you mean '{same_name[0]}'?"
        else:
            known = names if section else [*siblings, *names]
            nearest = did_you_mean(key, known) or did_you_mean(location[-1], names)
        return f"there is no setting '{key}' (value {value!r}).{nearest} Allowed here: {', '.join(siblings)}."
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if problem["type"] == "value_error":
        return f"{message}."
    return f"'{key}' is {value!r}: {message[0].lower() + message[1:]}."


def _type_name(annotation: Any) -> str:
    arguments = get_args(annotation)
    if not arguments:
        return "null" if annotation is type(None) else annotation.__name__
    if getattr(annotation, "__origin__", None) is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if hasattr(annotation, "__metadata__"):
        return _type_name(arguments[0])
    return " | ".join(_type_name(argument) for argument in arguments)


def _nearest_multiple(value: int, of: int) -> int:
    return max(of, round(value / of) * of)
