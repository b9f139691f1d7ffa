"""The journal of an unfinished conversion."""

import random

from fastdeit.pipelines.conversion.journal import Journal, Kept


def test_a_journal_is_cut_after_any_sample(tmp_path):
    """Against a list that is cut by hand."""
    from fastdeit.pipelines.conversion.workers import Reject
    from fastdeit.pipelines.formats.writer import Record

    rng = random.Random(0)
    for case in range(50):
        entries = [
            Reject(i, f"item {i}", "bad") if rng.random() < 0.4 else Kept(Record(1, 2, 3, 0, i, 5), ("resized",))
            for i in range(rng.randint(0, 30))
        ]
        kept = [i for i, entry in enumerate(entries) if isinstance(entry, Kept)]
        count = rng.randint(0, len(kept))
        expected = entries[: kept[count] if count < len(kept) else None]
        with Journal(tmp_path / f"{case}.journal") as journal:
            journal.begin({"case": case})
            rest = list(entries)
            while rest:
                size = rng.randint(1, 6)
                journal.append(rest[:size])
                rest = rest[size:]
            journal.cut(count)
            assert list(journal.entries()) == expected
            journal.append(entries)
        with open(tmp_path / f"{case}.journal", "ab") as file:
            file.write(b"12345678 [[1,2")
        with Journal(tmp_path / f"{case}.journal") as journal:
            assert journal.description() == {"case": case}
            assert list(journal.entries()) == expected + entries
            journal.remove()
        assert not (tmp_path / f"{case}.journal").exists()
