"""Measure, and write the table of the README's section Reliability."""

from pathlib import Path

from tests.reliability import hostile, interrupts, kills

README = Path(__file__).resolve().parents[2] / "README.md"
MARKERS = "<!-- reliability -->", "<!-- /reliability -->"
MEASURES = (kills, interrupts, hostile)
"""Each has figures() -> list[tuple[str, str]], rows of the table."""


def main() -> None:
    rows = [row for module in MEASURES for row in module.figures()]
    rows = [("what", "measured"), ("---", "---"), *rows]
    table = [f"| {what} | {said} |" for what, said in rows]
    before, rest = README.read_text(encoding="utf-8").split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    text = "\n".join([MARKERS[0], *table, MARKERS[1]])
    README.write_text(before + text + after, encoding="utf-8")


if __name__ == "__main__":
    main()
