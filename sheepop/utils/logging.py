"""Words for the person at the terminal: to standard error, so that standard output stays the command's result."""

import sys


def log(message: str = "") -> None:
    """Print one line of progress or advice to standard error at once."""
    print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print a line that the reader should not miss."""
    log(f"warning: {message}")


def is_terminal() -> bool:
    """Say whether a person watches standard error, so that a progress bar makes sense."""
    return sys.stderr.isatty()


def format_duration(seconds: float) -> str:
    """Return `42s`, `3m05s` or `2h07m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_count(number: float) -> str:
    """Return a number in three digits with its unit: `950`, `12.3K`, `4.56M`, `1.20B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size * 0.9995:
            value = number / size
            return f"{value:.{max(0, 2 - (len(str(int(abs(value)))) - 1))}f}{unit}"
    return f"{number:.0f}"


def format_bytes(number: float) -> str:
    """Return bytes in three digits with a binary unit."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size * 0.9995:
            value = number / size
            return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"
    return f"{number:.0f} B"
