"""Sizes and numbers of things as text."""

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
UNITS = {"TiB": TIB, "GiB": GIB, "MiB": MIB, "KiB": KIB}
ROUNDED_UP = 0.9995  # of a unit, from which a size is given in this unit; less would be shown as `1,024` of the next one


def size_text(num_bytes: float) -> str:
    """Return a size with three digits in the largest unit that fits, such as `1.5 GiB` or `16 MiB`."""
    for name, unit in UNITS.items():
        if num_bytes >= ROUNDED_UP * unit:
            number = num_bytes / unit
            return f"{number:,.0f} {name}" if number >= 100 else f"{number:.3g} {name}"
    return f"{num_bytes:.0f} B"


def counted(number: int, noun: str) -> str:
    """Return a number of things, such as `2 ranks`. noun: a regular one, in the singular."""
    return f"{number:,} {plural(noun, number)}"


def plural(noun: str, number: int) -> str:
    """Return a regular noun in the form that a number takes, without the number."""
    return noun if number == 1 else f"{noun}s"
