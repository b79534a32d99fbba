import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.config import (
    PRESETS,
    Config,
    ModelConfig,
    describe_settings,
    load_config,
    parse_config,
    parse_overrides,
    parse_value,
)
from sheepop.utils.errors import ConfigError

FIRST_USERS_FILE = {
    "model": {
        "vocab_size": 50257,
        "d_model": 512,
        "num_layers": 6,
        "num_heads": 8,
        "d_ff": 2048,
        "max_seq_len": 512,
        "dropout": 0.1,
        "activation": "gelu",
        "layer_norm_eps": 1e-5,
        "bias": False,
        "tie_weights": True,
    },
    "training": {
        "batch_size": 32,
        "max_epochs": 10,
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "warmup_steps": 1000,
        "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 4,
        "use_amp": True,
        "save_dir": "./checkpoints",
        "log_interval": 100,
        "eval_interval": 1000,
    },
    "data": {"data_dir": "./data", "max_length": 512, "stride": 256, "num_workers": 4},
    "device": "cuda",
    "seed": 42,
}


def write(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_file_with_the_first_users_keys_runs_unchanged(tmp_path):
    config = load_config(write(tmp_path, FIRST_USERS_FILE)).model_dump()
    for section in ("model", "training", "data"):
        for key, value in FIRST_USERS_FILE[section].items():
            assert config[section][key] == value
    assert (config["device"], config["seed"], config["preset"]) == ("cuda", 42, "classic")


def test_precedence_is_defaults_preset_file_command_line(tmp_path):
    file = write(tmp_path, {"preset": "modern", "model": {"d_model": 96, "num_heads": 6}, "training": {"beta2": 0.9}})
    config = load_config(file, overrides={"model.num_heads": 4, "training.beta1": 0.8})
    assert config.preset == "modern"
    assert config.model.norm == "rmsnorm"  # from the preset
    assert config.model.d_model == 96  # from the file
    assert config.model.num_heads == 4  # from the command line
    assert config.model.num_kv_heads == 2  # the preset's rule follows the command line
    assert (config.training.beta1, config.training.beta2) == (0.8, 0.9)
    assert load_config(file, preset="classic").model.norm == "layernorm"


def test_resolved_settings_load_to_themselves(tmp_path):
    for preset in PRESETS:
        config = load_config(preset=preset)
        assert load_config(write(tmp_path, config.model_dump())) == config


@pytest.mark.parametrize(
    ("file", "overrides", "expected"),
    [
        ({}, {}, (10, None, None)),
        ({"training": {"max_epochs": 3}}, {}, (3, None, None)),
        ({"training": {"max_epochs": 3}}, {"training.max_steps": 7}, (None, 7, None)),
        ({"training": {"max_epochs": 3}}, {"training.max_minutes": 0.5}, (None, None, 0.5)),
        ({"preset": "nano", "training": {"max_epochs": 3}}, {}, (3, None, None)),
    ],
)
def test_the_highest_level_sets_the_length(tmp_path, file, overrides, expected):
    training = load_config(write(tmp_path, file), overrides=overrides).training
    assert (training.max_epochs, training.max_steps, training.max_minutes) == expected


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.d_modle": 64}, ["model.d_modle", "64", "Did you mean 'model.d_model'?", "num_layers"]),
        ({"model.learning_rate": 0.1}, ["model.learning_rate", "Did you mean 'training.learning_rate'?"]),
        ({"modle": {}}, ["'modle'", "Did you mean 'model'?"]),
        ({"model.d_model": 100, "model.num_heads": 8}, ["d_model (100)", "num_heads (8)", "divisible"]),
        ({"model.num_heads": 8, "model.num_kv_heads": 3}, ["num_heads (8)", "num_kv_heads (3)"]),
        ({"model.d_model": 30, "model.num_heads": 2}, ["head_dim (15)", "even"]),
        ({"model.activation": "gello"}, ["model.activation", "'gello'", "'swiglu'"]),
        ({"model.dropout": 1.0}, ["model.dropout", "1.0", "less than 1"]),
        ({"model.vocab_size": "many"}, ["model.vocab_size", "'many'", "integer"]),
        ({"model.bias": "perhaps"}, ["model.bias", "boolean"]),
        ({"model.num_layers": True}, ["model.num_layers", "True"]),
        ({"model.num_layers": 0}, ["model.num_layers", "greater than 0"]),
        ({"training.learning_rate": float("nan")}, ["training.learning_rate", "nan", "finite"]),
        ({"training.max_steps": 5, "training.max_epochs": 2}, ["max_epochs and max_steps"]),
        ({"model.attention_sinks": 4}, ["attention_sinks (4)", "sliding_window"]),
        ({"model.attention_sinks": -1, "model.sliding_window": 8}, ["model.attention_sinks", "-1"]),
        ({"model.rope_scaling": "linear"}, ["rope_scaling 'linear'", "rope_scaling_factor 1.0"]),
        (
            {"model.rope_scaling": "ntk", "model.rope_scaling_factor": 2.0, "model.positions": "learned"},
            ["rope_scaling 'ntk'", "rotary"],
        ),
        ({"data.max_length": 300, "model.max_seq_len": 200}, ["data.max_length (300)", "model.max_seq_len (200)"]),
        ({"data.max_length": 30, "data.stride": 31}, ["data.stride (31)", "never be trained on"]),
        (
            {"data.max_length": 30, "data.stride": 15, "data.packing": "best_fit"},
            ["data.stride (15)", "data.max_length (30)", "best_fit", "cannot overlap"],
        ),
        ({"model": 3}, ["'model' is 3"]),
    ],
)
def test_bad_settings_name_key_value_and_remedy(overrides, words):
    with pytest.raises(ConfigError) as error:
        load_config(overrides=overrides)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("preset", ["modem", 3])
def test_an_unknown_preset(tmp_path, preset):
    with pytest.raises(ConfigError, match="no preset"):
        load_config(write(tmp_path, {"preset": preset}))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": }', "\x00"])
def test_a_broken_file(tmp_path, content):
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(write(tmp_path, content))


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="There is no file"):
        load_config(tmp_path / "absent.json")


def test_overrides_from_the_command_line():
    words = "--training.learning_rate 3e-4 --model.bias --data.tokenizer=char --training.save_interval null".split()
    assert parse_overrides(words) == {
        "training.learning_rate": 3e-4,
        "model.bias": True,
        "data.tokenizer": "char",
        "training.save_interval": None,
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--training.learning_rat", "1"], "Did you mean 'training.learning_rate'"),
        (["--learning_rate", "1"], "Did you mean 'training.learning_rate'"),
        (["stray"], "'stray'"),
    ],
)
def test_unknown_options_name_the_nearest(words, expected):
    with pytest.raises(ConfigError, match=expected):
        parse_overrides(words)


@given(st.text())
@settings(deadline=None)
def test_any_text_is_a_value_or_itself(text):
    value = parse_value(text)
    assert value == text or not isinstance(value, str) or json.loads(text) == value


@given(
    heads=st.integers(1, 12),
    head_dim=st.integers(1, 16),
    activation=st.sampled_from(["gelu", "swiglu"]),
)
@settings(deadline=None)
def test_derived_sizes_fit(heads, head_dim, activation):
    settings_given = {"d_model": heads * head_dim, "num_heads": heads, "positions": "learned", "activation": activation}
    config = ModelConfig(**settings_given)
    assert (config.head_dim, config.num_kv_heads) == (head_dim, heads)
    assert config.d_ff >= config.d_model
    assert parse_config({"model": config.model_dump()}, source="test").model == config


def test_every_setting_is_described():
    rows = list(describe_settings())
    assert len(rows) == len({name for name, *_ in rows}) > 50
    for name, kind, default, description in rows:
        assert len(description) > 8, name
        assert kind, name
        json.loads(default)
    assert {name.split(".")[0] for name, *_ in rows} == set(Config.model_fields)
