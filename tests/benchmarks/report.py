"""The tables of docs/performance.md, from the lines that the benchmarks wrote:

    python tests/benchmarks/report.py RESULTS.jsonl            prints them
    python tests/benchmarks/report.py RESULTS.jsonl --write    puts them between the markers in docs/performance.md

Where a case was measured more than once, the last line counts.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from measure import geometric_mean

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
Record = dict[str, Any]


# ---------------------------------------------------------------- on the terminal


def line(record: Record) -> str:
    """A case on one line: each rival's median, and the ratio with its quartiles."""
    values = [f"{name} {number(statistics.median(times))}" for name, times in record["times"].items()]
    text = f"{record['case']:52} {record['unit']:>3}  {'  '.join(values)}  ratio {ratio(record)}"
    return text + "".join(f"\n    {name}: {why}" for name, why in record["unavailable"].items())


def means(records: list[Record]) -> Iterator[str]:
    """The geometric mean over the shapes of each op."""
    for family, those in families(records).items():
        if family in OPS and len(those) > 1 and all(r["ratio"] for r in those):
            yield f"{family}: geometric mean of {len(those)} ratios {mean_ratio(those):.2f}"


def mean_ratio(records: list[Record]) -> float:
    return geometric_mean([r["ratio"]["median"] for r in records])


def ratio(record: Record, to: str = "ratio") -> str:
    r = record[to]
    return f"{r['median']:.2f} ({r['q1']:.2f} to {r['q3']:.2f})" if r else "-"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def families(records: Iterable[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["case"].split("/")[0], []).append(record)
    return found


# ---------------------------------------------------------------- in the docs

OPS = ("conv2d", "conv_transpose2d", "group_norm+silu", "attention", "softmax", "layer_norm", "adam")
SECTIONS = {  # marker: families
    "nets": ("step", "sample"),
    "ops": OPS,
    "tiny": ("tiny", "import"),
    "scaling": ("scaling",),
    "memory": ("memory",),
}


def sections(records: list[Record]) -> dict[str, str]:
    """The text of each marked section of which there is a record."""
    found = {}
    for backend, suffix in (("numpy", ""), ("cupy", "-gpu")):
        by_family = families(r for r in records if r["backend"] == backend)
        for marker, wanted in SECTIONS.items():
            those = [r for family in wanted for r in by_family.get(family, [])]
            if those:
                table = scaling(those) if marker == "scaling" else rows(those)
                found[marker + suffix] = f"{table}\n\n{provenance(those)}"
    return found


def rows(records: list[Record]) -> str:
    """One table per unit, with one column per rival, and the ratio; families of ops end with their mean."""
    tables = []
    graph = any(r["ratio_to_graph"] for r in records)
    for unit in dict.fromkeys(r["unit"] for r in records):
        those = [r for r in records if r["unit"] == unit]
        rivals = list(dict.fromkeys(name for r in those for name in [*r["times"], *r["unavailable"]]))
        goals = any(r["goal"] for r in those)
        head = [
            f"{unit}, median",
            *rivals,
            "ratio (quartiles)",
            *["at most"] * goals,
            *["ratio to PyTorch's graph"] * graph,
        ]
        lines = [head, ["---"] * len(head)]
        for family, members in families(those).items():
            has_mean = family in OPS and len(members) > 1
            for r in members:
                cells = [number(statistics.median(r["times"][n])) if n in r["times"] else "-" for n in rivals]
                goal = [f"{r['goal']:.2f}" if r["goal"] else ""] if goals and not has_mean else [""] * goals
                to_graph = [ratio(r, "ratio_to_graph")] * graph
                lines.append([r["case"].replace("/", " "), *cells, ratio(r), *goal, *to_graph])
            if has_mean and all(r["ratio"] for r in members):
                mean = f"**{mean_ratio(members):.2f}**"
                goal = [f"{members[0]['goal']:.2f}" if members[0]["goal"] else ""] * goals
                lines.append([f"**{family}**, geometric mean", *[""] * len(rivals), mean, *goal, *[""] * graph])
        tables.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
        whys = {(name, why) for r in those for name, why in r["unavailable"].items()}
        tables += [f"{name}: {why}." for name, why in sorted(whys)]
    return "\n\n".join(tables)


def scaling(records: list[Record]) -> str:
    """Time per sample: one row per batch, one column per thread count for tinydiff and for PyTorch's better format."""
    found = {tuple(r["case"].split("/")[1:]): r for r in records}
    threads = list(dict.fromkeys(t for t, _ in found))
    lines = [
        [
            "batch",
            *(f"{who}, {t}" for who in ("tinydiff", "PyTorch") for t in threads),
            *(f"ratio, {t}" for t in threads),
        ]
    ]
    lines.append(["---"] * len(lines[0]))
    for n in dict.fromkeys(n for _, n in found):
        cells = []
        for who in ("tinydiff", "torch"):
            for t in threads:
                r = found.get((t, n))
                best = r["counts"][who] if r else None
                cells.append(number(statistics.median(r["times"][best])) if r and best else "-")
        cells += [ratio(found[t, n]) if (t, n) in found else "-" for t in threads]
        lines.append([n, *cells])
    return "ms per sample:\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def provenance(records: list[Record]) -> str:
    """Under what circumstances, once for all that share them."""
    seen = dict.fromkeys(
        f"`{r['command']}`, {r['rounds']} rounds, {r['date']}; {r['machine']['gpu'] or r['machine']['cpu']}, "
        + ", ".join(f"{name} {version}" for name, version in r["versions"].items())
        for r in records
    )
    return "\n".join(f"Measured by {text}." for text in seen)


def replaced(page: str, found: dict[str, str]) -> str:
    """The page with new text between <!-- name --> and <!-- end of name -->. Errors: ValueError if it lacks one."""
    for marker, text in found.items():
        pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end of {marker} -->)", re.S)
        if not pattern.search(page):
            raise ValueError(f"{PAGE} has no place for {marker!r}: <!-- {marker} --> and <!-- end of {marker} -->")
        page = pattern.sub(lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    if not args.results.exists():
        sys.exit(f"there is no {args.results}: python tests/benchmarks --out {args.results} makes it")
    lines = [json.loads(text) for text in args.results.read_text().splitlines() if text]
    found = sections(list({(r["case"], r["backend"]): r for r in lines}.values()))
    if args.write:
        PAGE.write_text(replaced(PAGE.read_text(), found))
    else:
        print("\n\n".join(f"## {marker}\n\n{text}" for marker, text in found.items()))


if __name__ == "__main__":
    main()
