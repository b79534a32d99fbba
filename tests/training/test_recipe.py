import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.config import load_config
from sheepop.models.sizing import count_parameters
from sheepop.training.dial import Timed, explain
from sheepop.training.recipe import (
    FINALISTS,
    SHAPES,
    TOKENS_PER_ENTRY,
    TextFacts,
    TokenizerFacts,
    candidates,
    dropout_for,
    effective_tokens,
    finalists,
    muon_rounds_for,
    shape_of,
    usable_tokenizers,
    weight_decay_for,
    with_measured_step,
)
from sheepop.training.speed import MachineFacts, Probe, fit_machine, step_seconds, tokens_of_step
from sheepop.utils.errors import ConfigError

TOKENIZERS = (
    TokenizerFacts("char", 244, 1.0, 4096),
    TokenizerFacts("bpe", 512, 1.9, 512),
    TokenizerFacts("bpe", 1024, 2.4, 1024),
    TokenizerFacts("bpe", 4096, 3.3, 4096),
)
LAPTOP = MachineFacts("cpu", overhead=1e-3, speeds={"fp32": 1e11, "bf16": 3e11}, bandwidth=1e10)


def text_of(num_bytes, tokenizers=TOKENIZERS):
    return TextFacts(num_bytes, max(2, num_bytes // 9), 3.1, tokenizers)


def choice_for(minutes, num_bytes=1_000_000, machine=LAPTOP, **fixed):
    given_settings = {"training.max_minutes": minutes} | {key.replace("__", "."): v for key, v in fixed.items()}
    return candidates(text_of(num_bytes), machine, seconds=60 * minutes, fixed=given_settings)[0]


machines = st.builds(
    MachineFacts,
    device=st.just("cpu"),
    overhead=st.floats(1e-5, 1e-2),
    speeds=st.fixed_dictionaries({"fp32": st.floats(1e10, 1e13), "bf16": st.floats(1e10, 1e14)}),
    bandwidth=st.floats(1e9, 1e12),
)


def test_weights_forget_sooner_in_short_runs_and_in_text_that_is_read_again():
    assert weight_decay_for(0.0173, 1300, 0.7) == pytest.approx(0.1, rel=0.02)  # as measured for a first reading
    assert 0.2 < weight_decay_for(0.0173, 1300, 3) < 0.35  # ... and for the third
    assert weight_decay_for(0.01, 2000, 3) == pytest.approx(weight_decay_for(0.01, 1000, 3) / 2, rel=0.05)
    assert weight_decay_for(0.02, 10, 3) == weight_decay_for(0.02, 20, 3)  # no more than what was tried


def test_weights_forget_as_soon_at_a_rate_that_was_given():
    training = choice_for(10).config.training
    given_rate = choice_for(10, training__learning_rate=training.learning_rate / 2).config.training
    assert given_rate.weight_decay == pytest.approx(2 * training.weight_decay, rel=0.05)


def test_small_batches_take_fewer_rounds_of_muon():
    assert choice_for(10).config.training.muon_rounds == 3
    assert muon_rounds_for(768, 2**19) == 5


@settings(deadline=None, max_examples=25)
@given(
    machine=machines,
    num_bytes=st.integers(400, 10**10),
    minutes=st.floats(0.2, 3000),
    longer=st.floats(1.1, 20),
)
def test_what_is_chosen_can_be_run_and_more_time_never_promises_less(machine, num_bytes, minutes, longer):
    try:
        choice = choice_for(minutes, num_bytes, machine)
    except ConfigError:
        with pytest.raises(ConfigError, match="too short"):
            choice_for(minutes, num_bytes, machine)
        return
    config = load_config(preset="modern", overrides={**choice.settings, "training.max_minutes": minutes})
    assert config.training.max_minutes == minutes
    per_step = config.training.batch_size * config.training.gradient_accumulation_steps * config.data.max_length
    epoch_tokens = num_bytes / choice.tokenizer.bytes_per_token
    assert choice.tokens == choice.steps * per_step
    assert choice.epochs == pytest.approx(choice.tokens / epoch_tokens)
    assert config.training.warmup_steps < max(2, choice.steps)
    assert choice.steps * choice.seconds_per_step <= 60 * minutes
    assert config.data.max_length == 16 or 8 * config.data.max_length <= epoch_tokens
    smallest = min(entry.vocab_size for entry in TOKENIZERS)
    assert choice.tokenizer.vocab_size in (smallest, *range(int(epoch_tokens / TOKENS_PER_ENTRY) + 1))
    assert choice.loss == pytest.approx(choice.bits_per_byte * math.log(2) * choice.tokenizer.bytes_per_token)
    # Where a longer context or dropout sets in, a step costs more at once; hence the percent.
    assert choice_for(longer * minutes, num_bytes, machine).bits_per_byte <= 1.01 * choice.bits_per_byte


def test_more_time_more_text_and_a_faster_machine_make_larger_models():
    def size(choice):
        return count_parameters(choice.config.model).total

    sizes = [size(choice_for(minutes, 10**9)) for minutes in (0.3, 3, 30, 300, 3000)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 10 * sizes[0]
    faster = MachineFacts("cpu", overhead=1e-4, speeds={"fp32": 1e13, "bf16": 1e14}, bandwidth=1e12)
    assert size(choice_for(30, 10**9, faster)) > 5 * size(choice_for(30, 10**9))
    assert choice_for(300, 10**9).bits_per_byte < choice_for(300, 10**6).bits_per_byte


def test_what_was_given_is_kept_and_the_rest_is_chosen_around_it():
    choice = choice_for(3, model__d_model=80, model__num_layers=3, training__optimizer="adamw", data__max_length=48)
    model, training = choice.config.model, choice.config.training
    assert (model.d_model, model.num_layers, training.optimizer, choice.config.data.max_length) == (80, 3, "adamw", 48)
    assert not {"model.d_model", "model.num_layers", "training.optimizer"} & choice.settings.keys()
    assert training.learning_rate < 0.005  # AdamW's, not Muon's
    assert choice.steps * training.batch_size * 48 == choice.tokens
    with pytest.raises(ConfigError, match="divisible"):
        choice_for(3, model__d_model=80, model__num_heads=7)


def test_a_head_that_copies_sees_more_of_the_text():
    plain, copying = choice_for(10).config, choice_for(10, model__copy_width=64).config
    assert copying.data.max_length > 2 * plain.data.max_length
    assert (plain.model.sliding_window, copying.model.sliding_window) == (0, 128)
    assert choice_for(10, model__copy_width=64).bits_per_byte < 0.97 * choice_for(10).bits_per_byte
    given_too = choice_for(10, model__copy_width=64, data__max_length=48, model__sliding_window=9).config
    assert (given_too.data.max_length, given_too.model.sliding_window) == (48, 9)
    short = choice_for(10, 1_000, model__copy_width=64).config
    assert 8 * short.data.max_length <= 1_000


def test_a_model_that_does_not_fit_into_memory_is_not_chosen():
    everything = choice_for(3000, 10**9)
    small = MachineFacts("cpu", LAPTOP.overhead, LAPTOP.speeds, LAPTOP.bandwidth, memory=200_000_000)
    less = choice_for(3000, 10**9, small)
    assert count_parameters(less.config.model).total < count_parameters(everything.config.model).total
    assert less.config.training.gradient_accumulation_steps > 1  # the batch stays, in parts


def test_several_processes_share_the_micro_batches_of_a_step():
    four = MachineFacts("cpu", LAPTOP.overhead, LAPTOP.speeds, LAPTOP.bandwidth, num_processes=4)
    choice = choice_for(3, machine=four)
    assert choice.config.training.gradient_accumulation_steps % 4 == 0
    assert choice.bits_per_byte < choice_for(3).bits_per_byte


def test_a_tiny_text_gets_a_tiny_model_and_a_short_run_many_steps():
    assert count_parameters(choice_for(30, 1000).config.model).total < 60_000
    assert count_parameters(choice_for(3000, 100_000).config.model).total <= 200_000
    slow = MachineFacts("cpu", overhead=0.1, speeds={"fp32": 1e9, "bf16": 1e9}, bandwidth=1e8)
    assert choice_for(0.5, machine=slow).config.model.d_model == SHAPES[0][0]
    assert choice_for(3, model__d_model=512, num_bytes=1000).config.model.d_model == 512


def test_too_short_a_time_is_said():
    with pytest.raises(ConfigError, match="minutes are too short"):
        choice_for(0.01)


def test_a_vocabulary_must_be_filled_by_the_text():
    names = [[entry.vocab_size for entry in usable_tokenizers(text_of(size))] for size in (300, 150_000, 10**7)]
    assert names == [[244], [244, 512], [244, 512, 1024, 4096]]


def test_repeated_text_counts_less_and_less():
    assert effective_tokens(50, 100, 15.4) == 50
    worth = [effective_tokens(100 * epochs, 100, 15.4) for epochs in (1, 2, 4, 40, 4000)]
    assert worth == sorted(worth)
    assert 195 < worth[1] < 200  # a second reading is nearly as good as new text
    assert worth[-1] == pytest.approx(100 * 16.4)
    assert [dropout_for(epochs, 2.0) for epochs in (0.1, 3, 5, 50)] == [0, 0, 0.1, 0.2]
    assert dropout_for(50, 0.5) == 0


def probe(machine, width, layers, batch):
    config = load_config(
        preset="modern",
        overrides={
            "model.d_model": width,
            "model.num_layers": layers,
            "model.num_heads": width // 32,
            "model.max_seq_len": 128,
            "model.vocab_size": 512,
            "training.batch_size": batch,
            "training.precision": "fp32",
        },
    )
    return Probe(config, "fp32", step_seconds(config, machine))


@settings(deadline=None, max_examples=30)
@given(machine=machines)
def test_measured_steps_give_back_the_machine_that_made_them(machine):
    probes = [probe(machine, 64, 2, 2), probe(machine, 64, 2, 16), probe(machine, 192, 4, 8)]
    found = fit_machine(probes, speeds=machine.speeds, device="cpu", memory=10**9)
    wanted = probe(machine, 128, 3, 12)
    assert step_seconds(wanted.config, found) == pytest.approx(wanted.seconds, rel=0.01)


def test_products_that_are_slow_when_narrow_do_not_make_the_machine_faster():
    """Between the probes and beyond them, steps are told well enough where narrow products run below their speed."""

    def at_width(width):
        speed = LAPTOP.speeds["fp32"] * width / (width + 100)
        return MachineFacts("cpu", LAPTOP.overhead, {"fp32": speed}, LAPTOP.bandwidth)

    sizes = [(64, 2, 2), (64, 2, 16), (192, 4, 8), (256, 4, 8)]
    probes = [probe(at_width(width), width, layers, batch) for width, layers, batch in sizes]
    found = fit_machine(probes, speeds={"fp32": LAPTOP.speeds["fp32"]}, device="cpu", memory=10**9)
    for width, layers, batch in ((96, 3, 12), (128, 4, 12), (384, 6, 12), (512, 8, 12)):
        wanted = probe(at_width(width), width, layers, batch)
        assert step_seconds(wanted.config, found) == pytest.approx(wanted.seconds, rel=0.15)


def test_a_disturbed_measurement_gives_no_speed_below_zero():
    probes = [probe(LAPTOP, 64, 2, batch) for batch in (2, 16)]
    for factors in ((0.01, 1.0), (1.0, 0.01), (0.001, 0.001), (100.0, 1.0)):
        disturbed = [replace(one, seconds=one.seconds * factor) for one, factor in zip(probes, factors, strict=True)]
        found = fit_machine(disturbed, speeds=LAPTOP.speeds, device="cpu", memory=10**9)
        assert found.overhead >= 0
        assert found.bandwidth > 0


def test_the_finalists_are_shapes_near_the_best():
    given_settings = {"training.max_minutes": 20.0}
    ranked = candidates(text_of(10**7), LAPTOP, seconds=1200.0, fixed=given_settings)
    found = finalists(ranked)
    assert 2 <= len(found) <= FINALISTS
    assert found[0] == ranked[0]
    assert len({shape_of(choice) for choice in found}) == len(found)
    assert all(
        choice.bits_per_byte <= min(1.03 * found[0].bits_per_byte, other.bits_per_byte)
        for choice in found
        for other in ranked
        if shape_of(other) == shape_of(choice)
    )
    one = candidates(text_of(10**7), LAPTOP, seconds=1200.0, fixed=given_settings | {"model.d_model": 96})
    assert {shape_of(choice)[0] for choice in finalists(one)} == {96}


@settings(deadline=None, max_examples=10)
@given(believed=machines, real=machines, minutes=st.floats(3, 300))
def test_measured_steps_replace_the_cost_model(believed, real, minutes):
    text, limits = text_of(10**7), {"seconds": 60 * minutes, "fixed": {"training.max_minutes": minutes}}
    try:
        first = finalists(candidates(text, believed, **limits))
    except ConfigError:
        return
    for choice in first:
        assert with_measured_step(choice, choice.seconds_per_step, text, believed, **limits) == choice
        assert with_measured_step(choice, 60 * minutes, text, believed, **limits) is None
        measured = step_seconds(choice.config, real)
        again = with_measured_step(choice, measured, text, believed, **limits)
        if again is None:
            continue
        assert (shape_of(again), again.tokenizer) == (shape_of(choice), choice.tokenizer)
        assert again.steps * again.seconds_per_step <= 60 * minutes
        if tokens_of_step(again.config) == tokens_of_step(choice.config):
            assert again.seconds_per_step == pytest.approx(measured, rel=0.3)
        slower = with_measured_step(choice, 3 * measured, text, believed, **limits)
        assert slower is None or slower.tokens < again.tokens


def test_the_choice_is_explained_in_a_few_lines():
    choice = choice_for(3)
    said = explain(choice, text_of(1_000_000), LAPTOP)
    assert len(said) <= 6
    said = explain(choice, text_of(1_000_000), LAPTOP, [Timed(choice, 0.0421, replace(choice, bits_per_byte=1.2345))])
    (line,) = [line for line in said if line.startswith("timed: ")]
    for words in (f"width {choice.config.model.d_model}", "42.1 ms", "1.234 bits per byte"):
        assert words in line
    for word in ("GFLOP/s in fp32", "entries", f"width {choice.config.model.d_model}", "epochs", "bits per byte"):
        assert word in " ".join(said)
    assert all(shape[0] % (32 if shape[0] <= 128 else 64) == 0 for shape in SHAPES if shape[0] != 48)
