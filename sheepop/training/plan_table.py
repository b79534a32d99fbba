"""A plan as a table for people."""

from sheepop.training.plan import Plan
from sheepop.training.plan_advice import describe_advice, describe_shortage
from sheepop.utils.logging import format_bytes, format_count, format_duration

Row = tuple[str, str, str]


def format_plan(plan: Plan) -> str:
    """Return the plan as lines: a heading for each part, then name, figure and remark in columns."""
    sections = {
        f"Model ({plan.config.preset})": parameter_rows(plan),
        "Computing": computing_rows(plan),
        f"Memory on {plan.device} in {plan.precision}": memory_rows(plan),
        "Time": time_rows(plan),
        "Disk": disk_rows(plan),
    }
    rows = [row for section in sections.values() for row in section]
    names, figures = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = []
    for title, section in sections.items():
        lines.append(title)
        lines += [f"  {name:<{names}}  {figure:>{figures}}  {remark}".rstrip() for name, figure, remark in section]
        lines.append("")
    if not plan.memory.fits:
        lines += [describe_shortage(plan.memory), *describe_advice(plan.advice), ""]
    needed = plan.disk_needed
    if needed is not None and needed > plan.disk_available:
        lines += [
            f"The checkpoints need {format_bytes(needed)} of disk and {format_bytes(plan.disk_available)} are free: "
            "lower training.keep_last or the number of epochs, or choose another disk with --output.",
            "",
        ]
    return "\n".join([*lines, *plan.missing]).rstrip()


def parameter_rows(plan: Plan) -> list[Row]:
    """Parameters by part."""
    counts, model = plan.parameters, plan.config.model
    parts = {
        "embedding": (counts.embedding, "also the head" if model.tie_weights else ""),
        "groups of tokens": (counts.ngrams, ""),
        "positions": (counts.positions, ""),
        "attention": (counts.attention, f"{model.num_layers} layers"),
        "feed-forward": (counts.feed_forward, ""),
        "short convolutions": (counts.convolutions, ""),
        "norms": (counts.norms, ""),
        "copying": (counts.copying, ""),
        "head": (counts.head, ""),
        "parameters": (counts.total, ""),
    }
    return [(name, format_count(count), remark) for name, (count, remark) in parts.items() if count]


def computing_rows(plan: Plan) -> list[Row]:
    """FLOPs and the length of the run."""
    per_token = plan.flops_per_token
    rows = [
        ("FLOPs a token", format_flops(per_token), "forward and backward"),
        ("FLOPs a step", format_flops(per_token * plan.tokens_per_step), f"{plan.tokens_per_step} tokens"),
    ]
    if plan.length is not None and plan.tokens is not None:
        rows.append(("FLOPs of the run", format_flops(per_token * plan.tokens), f"{format_count(plan.tokens)} tokens"))
        epochs = ""
        if plan.tokens_per_epoch is not None:
            epochs = (
                f"{plan.length.steps / plan.length.steps_per_epoch:.3g} epochs of {plan.length.steps_per_epoch} steps"
            )
        rows.append(("steps", str(plan.length.steps), epochs))
    return rows


def memory_rows(plan: Plan) -> list[Row]:
    """Bytes by part at the peak."""
    memory, tensors, model = plan.memory, plan.memory.tensors, plan.config.model
    rows = [
        ("weights", tensors.weights, ""),
        ("gradients", tensors.gradients, "come as activations go" if not tensors.gradients_at_start else ""),
        ("optimizer", tensors.optimizer, "moments of each weight"),
        ("activations", tensors.activations, f"of {plan.config.training.batch_size} sequences, kept for backward"),
        ("logits", tensors.logits, "of a part of the tokens, and the head's gradients"),
        ("allocator", memory.allocator, "freed blocks that do not fit again, about"),
        ("copy", memory.copy, "of the weights, to measure steps on for --minutes"),
        ("process", memory.process, "Python and libraries, measured"),
        ("peak, estimated", memory.estimate, ""),
        ("peak, measured", memory.measured or 0, "of real steps"),
        ("available", memory.available, "fits" if memory.fits else "DOES NOT FIT"),
    ]
    shown = [(name, format_bytes(size), remark) for name, size, remark in rows if size]
    cache = plan.generation_cache_bytes
    return [*shown, ("cache", format_bytes(cache), f"in generation, {model.max_seq_len} tokens of one text")]


def time_rows(plan: Plan) -> list[Row]:
    """Seconds by part."""
    times, seconds = plan.times, plan.seconds
    if times is None:
        return [("a step", "?", "not measured")]
    how = "measured" if times.is_whole_step else "from measured steps of fewer sequences"
    how += ", compiled" if times.compiling else ""
    speed = plan.tokens_per_step / times.step
    share = plan.flops_per_token * speed / times.peak_flops
    rows = [
        ("a step", format_seconds(times.step), how),
        ("tokens a second", format_count(speed), f"{share:.1%} of {format_flops(times.peak_flops)}FLOP/s at best"),
    ]
    if plan.length is not None and seconds is not None:
        length = plan.length
        if times.compiling:
            rows.append(("compiling", format_duration(seconds["compiling"]), "less where it was done before"))
        rows += [
            ("all steps", format_duration(seconds["steps"]), f"{length.steps} steps"),
            ("validations", format_duration(seconds["validations"]), f"{length.validations} times"),
            ("samples", format_duration(seconds["samples"]), f"{length.samples} times"),
            ("checkpoints", format_duration(seconds["checkpoints"]), f"at most {length.checkpoints} times"),
            ("the run", format_duration(sum(seconds.values())), ""),
        ]
    return rows


def disk_rows(plan: Plan) -> list[Row]:
    """Bytes of checkpoints."""
    rows = [("a checkpoint", format_bytes(plan.checkpoint_bytes), "weights and moments")]
    if plan.length is not None and plan.disk_needed is not None:
        remark = f"at most {plan.length.checkpoints_kept} kept, and one being written"
        rows.append(("checkpoints", format_bytes(plan.disk_needed), remark))
    return [*rows, ("free", format_bytes(plan.disk_available), "")]


def format_flops(number: float) -> str:
    """Return operations with the prefixes of physical units: a billion is a giga."""
    return format_count(number).replace("B", "G")


def format_seconds(seconds: float) -> str:
    """Return short times in milliseconds."""
    return (
        f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s" if seconds < 60 else format_duration(seconds)
    )
