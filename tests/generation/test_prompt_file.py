import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepop.generation.completion import Completion
from sheepop.generation.prompt_file import PromptOptions, count_finished, parse_prompt, read_prompts
from sheepop.generation.sampling import SamplingSettings
from sheepop.utils.errors import ConfigError, DataError

DEFAULTS = PromptOptions(SamplingSettings(0.8, top_p=0.95), max_new_tokens=20, seed=7, stop=("\n",))


def prompts_of(path: Path, *records: object) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return path


def test_a_line_says_what_it_wants_and_the_rest_is_as_on_the_command_line(tmp_path: Path) -> None:
    own = {"prompt": "b", "temperature": 0, "top_k": 3, "max_new_tokens": 2, "seed": 5, "num_samples": 2, "stop": "x"}
    first, second = read_prompts(prompts_of(tmp_path / "prompts", {"prompt": "羊", "id": [1]}, own), DEFAULTS)
    assert (first.text, first.record) == ("羊", {"prompt": "羊", "id": [1]})
    assert first.options.sampling == DEFAULTS.sampling
    assert (first.options.max_new_tokens, first.options.stop) == (20, ("\n",))
    sampling = SamplingSettings(0, top_k=3, top_p=0.95)
    assert second.options == PromptOptions(sampling, max_new_tokens=2, seed=5, num_samples=2, stop=("x",))


def test_the_same_prompt_twice_has_two_seeds_that_stay(tmp_path: Path) -> None:
    path = prompts_of(tmp_path / "prompts", *[{"prompt": "a"}] * 3)
    seeds = [prompt.options.seed for prompt in read_prompts(path, DEFAULTS)]
    assert len(set(seeds)) == 3
    assert seeds == [prompt.options.seed for prompt in read_prompts(path, DEFAULTS)]


def test_blank_lines_and_a_byte_order_mark_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b"}')
    assert [(prompt.text, prompt.line) for prompt in read_prompts(path, DEFAULTS)] == [("a", 1), ("b", 4)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"prompt": "a"} x', "not valid JSON: Extra data at column 17"),
        (b"[1]", "not an object in braces, but a list"),
        (b'{"text": "a"}', 'no text under "prompt"'),
        (b'{"prompt": 3}', 'no text under "prompt"'),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "id": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "score": NaN}', "NaN, which is not valid JSON"),
        (b'{"prompt": "a", "completions": []}', 'the key "completions"'),
        (b'{"prompt": "a", "temperature": "hot"}', '"temperature" must be a number, not "hot"'),
        (b'{"prompt": "a", "temperature": -1}', "'temperature' is -1"),
        (b'{"prompt": "a", "top_k": 1.5}', '"top_k" must be a whole number, not 1.5'),
        (b'{"prompt": "a", "max_new_tokens": true}', '"max_new_tokens" must be a whole number, not true'),
        (b'{"prompt": "a", "max_new_tokens": -1}', '"max_new_tokens" is -1'),
        (b'{"prompt": "a", "num_samples": 0}', '"num_samples" is 0'),
        (b'{"prompt": "a", "stop": [""]}', '"stop" must be'),
        (b'{"prompt": "a", "stop": 3}', '"stop" must be'),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "' + b"a" * 2**23 + b'"}', "bytes, of which 8388608 are the most"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_with_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(b'{"prompt": "a"}\n\n' + line + b'\n{"prompt": "b"}\n')
    with pytest.raises(DataError, match="nothing was run: line 3: ") as raised:
        read_prompts(path, DEFAULTS)
    assert message in str(raised.value)


def test_of_many_bad_lines_the_first_are_named(tmp_path: Path) -> None:
    path = prompts_of(tmp_path / "prompts", *range(14))
    with pytest.raises(DataError, match=r"line 1: .*; line 10: .*; and 4 more"):
        read_prompts(path, DEFAULTS)


def test_a_file_of_something_else_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = prompts_of(tmp_path / "prompts", *range(3000))
    with pytest.raises(DataError, match=r"line 10: .*; and at least 990 more"):
        read_prompts(path, DEFAULTS)


@pytest.mark.parametrize("content", [None, b"", b"\n \n"])
def test_a_file_that_is_missing_or_empty_is_said(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read" if content is None else "is empty"):
        read_prompts(path, DEFAULTS)


LINES = [
    parse_prompt(json.dumps({"prompt": prompt, "id": number}).encode(), DEFAULTS).with_result(
        [Completion(f"{prompt}\u2028\r\n", [1, number], "stop")]
    )
    for number, prompt in enumerate(["a", "羊🐑", "c"])
]
PROMPTS = [
    parse_prompt(json.dumps({"prompt": prompt, "id": number}).encode(), DEFAULTS)
    for number, prompt in enumerate(["a", "羊🐑", "c"])
]


def test_a_line_of_output_has_the_prompts_keys_its_settings_and_the_completions() -> None:
    record = json.loads(LINES[1])
    assert record["id"] == 1
    assert record["prompt"] == "羊🐑"
    assert record["settings"]["temperature"] == 0.8
    assert record["settings"]["seed"] == 7
    assert record["completions"] == [{"text": "羊🐑\u2028\r\n", "token_ids": [1, 1], "finish_reason": "stop"}]


@given(cut=st.integers(0, len(b"".join(LINES))))
def test_wherever_a_kill_cuts_the_whole_lines_stay(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("output") / "out.jsonl"
    path.write_bytes(b"".join(LINES)[:cut])
    finished = count_finished(path, PROMPTS)
    assert path.read_bytes() == b"".join(LINES[:finished])
    assert len(b"".join(LINES[: finished + 1])) > cut or finished == 3


def test_an_output_of_other_prompts_or_options_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    other = [parse_prompt(b'{"prompt": "other"}', DEFAULTS)]
    hotter = PromptOptions(SamplingSettings(0.9, top_p=0.95), max_new_tokens=20, seed=7, stop=("\n",))
    changed = [parse_prompt(json.dumps(prompt.record).encode(), hotter) for prompt in PROMPTS]
    for content, prompts, number in [
        (b"".join(LINES), other, 1),
        (b"".join(LINES), changed, 1),
        (b"".join(LINES), PROMPTS[:2], 3),
        (LINES[0] + b"wool\n" + LINES[1], PROMPTS, 2),
        (b"[]\n", PROMPTS, 1),
    ]:
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"Line {number} of .*out\.jsonl is not what these prompts"):
            count_finished(path, prompts)
        assert path.read_bytes() == content
    assert count_finished(tmp_path / "missing", PROMPTS) == 0
