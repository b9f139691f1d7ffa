"""The table of a conversion record."""

from benchmarks.render import Record, Table, fastest_first


def table(record: Record) -> Table:
    """Rates of all converters, and why others have none."""
    rows = [
        (
            name,
            figures["work"],
            f"{figures['images_per_second']:,.0f}",
            f"{figures['spread']:.0%}",
            f"{figures['megabytes']:,.0f}",
        )
        for name, figures in fastest_first(record["sides"])
    ]
    return Table(
        title=f"{record['images']:,} JPEGs of {record['mean_bytes'] / 1000:.0f} kB, {record['workers']} "
        f"process{'es' * (record['workers'] > 1)}, until all files are on disk; median of the windows.",
        columns=("converter", "work", "images/s", "spread", "MB"),
        align="llrrr",
        rows=[*rows, *({**record["missing"], **record["failed"]}).items()],
    )
