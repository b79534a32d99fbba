from typing import Any

from sheepop.generation.generate import generate_naive
from sheepop.learn.diagrams.control_flow import function_diagram, loop_diagram
from sheepop.training.step import train_step
from sheepop.training.trainer import finish_step, steps_of, train


def test_the_training_loop_decides_and_comes_back(read_mermaid: Any) -> None:
    chart = read_mermaid(loop_diagram(train))
    head = chart.named("for each step, learning")
    assert chart.shapes[head] == "{{"
    assert chart.after(head, "next") == {"no result?"}
    assert chart.after(chart.named("no result?"), "yes") == {"leave()"}
    assert chart.after(chart.named("finish_step()")) == {"done is total"}
    assert chart.after(chart.named("done is total"), "no") == {chart.lines[head][0]}
    leaving = [name for name, lines in chart.lines.items() if lines[0] == "leave()"]
    assert len(leaving) == 2
    assert not any(chart.after(name) for name in leaving)
    bad_step = next(name for name, lines in chart.lines.items() if "deal_with_bad_step()" in lines)
    assert bad_step in chart.optional
    assert " ".join(chart.lines[bad_step]).startswith("if result is not updated or result verdict is ‘spike’:")


def test_steps_are_made_at_once_or_told_later(read_mermaid: Any) -> None:
    chart = read_mermaid(loop_diagram(steps_of))
    head = chart.named("for each step, micro batches")
    assert chart.after(head, "next") == {"learning_rate_at()"}
    asks = chart.named("no refusals?")
    assert chart.after(asks, "yes") == chart.after(asks, "no") == {"train_step()"}
    assert chart.after(chart.named("no queued?"), "yes") == {chart.lines[head][0]}


def test_records_and_times_are_not_part_of_the_loop(read_mermaid: Any) -> None:
    said = str(read_mermaid(loop_diagram(train)).lines)
    assert not [name for name in ("metrics", "progress", "begin_part", "perf_counter", "flops") if name in said]


def test_a_step_goes_forward_and_backward_and_then_updates_once(read_mermaid: Any) -> None:
    chart = read_mermaid(function_diagram(train_step))
    head = chart.named("for each number, batch")
    assert chart.after(chart.named("micro_batch_loss()")) == {"backward()"}
    assert chart.after(chart.named("backward()")) == {"for each number, batch"}
    assert head in {start for start, label, _ in chart.arrows if label == "no more"}
    assert chart.after(chart.named("optimizer.step()")) == {"optimizer.zero_grad()"}
    assert chart.after(chart.named("result_of()")) == chart.after(chart.named("refusals.judge()")) == {"is updated?"}


def test_an_error_that_is_caught_has_a_way_of_its_own(read_mermaid: Any) -> None:
    chart = read_mermaid(function_diagram(finish_step))
    assert chart.after(chart.named("validate()"), "on StopAsked") == {"leave()"}


def test_a_loop_is_left_from_where_it_breaks(read_mermaid: Any) -> None:
    chart = read_mermaid(loop_diagram(generate_naive))
    assert chart.after(chart.named("model()")) == {"sample_token()"}
    assert chart.after(chart.named("token id is end of"), "yes") == {"continuations.append()"}
    assert chart.after(chart.named("token_ids.append()")) == {"on_token()?"}
    assert chart.after(chart.named("on_token()?"), "no") == {"for each length"}
    assert chart.after(chart.named("for each sample"), "no more") == {"return continuations"}
