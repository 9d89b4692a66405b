"""The derivation of each op: what its docstring says and what docs/pencil.md adds, all of it evaluated (claims.py)."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from algebra import BAR, NotAFormula, normal, plain
from claims import Checked, FalseClaim, Scene, bar, cases, clauses

from tinydiff.engine import Op
from tinydiff.operators import OPS

PENCIL = Path(__file__).parents[1] / "pencil.md"

# What an op's page speaks of without a formula for it.
NAMES = {
    "normalize": {"w": "weight", "b": "bias"},
    "shift_normalize_silu": {"w": "weight", "b": "bias"},
}
GIVEN = {
    "normalize": {
        "m": "sum(x^0)",
        "c": "x - mean(x)",
        "var": "mean(c^2)",
        "r": "1 / sqrt(var + eps)",
        "xhat": "r c",
        "h": f"y{BAR} w",
    }
}

# What begins like the formula of a differential or an adjoint, and is a sentence.
SENTENCES = {
    normal(text)
    for text in (
        "x̄ = z̄ in the shape of x", "x̄ = z̄ with the inverse order", "x̄ = z̄ without the extra places",
        "each x̄ = its part of z̄", "dz = dx at the largest", "dz = dx at the smallest", "dz = dx[index]",
        "x̄ = zeros, with z̄ added at the index", "x̄ = z̄[index]", "dz = dx + dvalues at the index", "values̄ = z̄[index]",
    )
}  # fmt: skip


@dataclass
class Derivation:
    """What was evaluated for one op."""

    op: str
    paragraphs: list[str]
    pencil: str
    checked: list[Checked] = field(default_factory=list)
    method: str = ""
    generated: list[str] = field(default_factory=list)


def doc(name: str) -> list[str]:
    return (inspect.getdoc(getattr(OPS[name], "forward", OPS[name])) or "").split("\n\n")


def sections(text: str) -> dict[str, str]:
    """The parts under `## name`; a heading may name several."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        heading, _, body = part.partition("\n")
        for name in re.split(r",\s*", heading.strip()):
            found[name.strip("`")] = body.strip()
    return found


@cache
def pencil() -> dict[str, str]:
    return sections(PENCIL.read_text()) if PENCIL.exists() else {}


def blocks(text: str, kinds: str = "claims") -> list[tuple[str, str]]:
    """(kind, text) of the code blocks of these kinds, in order."""
    return re.findall(rf"^```({kinds})\n(.*?)^```", text, flags=re.M | re.S)


def out_name(name: str) -> str:
    """What the rule calls its output."""
    op = OPS[name]
    if not isinstance(op, Op) or op.rule is None:
        return "z"
    return list(inspect.signature(op.rule).parameters)[1].lstrip("_")


def derive(name: str, text: str | None = None, by_hand: str | None = None) -> Derivation:
    """Evaluate everything. text and by_hand: instead of the docstring and of pencil.md, for tests.

    Errors: FalseClaim for a formula that is false, or an input whose adjoint no formula gives.
    """
    paragraphs = doc(name) if text is None else text.split("\n\n")
    by_hand = pencil().get(name, "") if by_hand is None else by_hand
    made = Derivation(name, paragraphs, by_hand)
    shown: dict[str, Checked] = {}
    for case in cases(name):
        scene = Scene(case, out_name(name), NAMES.get(name, {}))
        for letter, formula in GIVEN.get(name, {}).items():
            scene.definitions[letter] = scene.read(formula)[0]
        made.method = scene.method
        proved: set[str] = set()
        story = module_story(name).split("\n\n") if name == "normalize" and text is None else []
        for paragraph in [*story, *paragraphs]:
            evaluate(scene, clauses(paragraph), shown, proved, strict=False)
        for kind, block in blocks(by_hand, "claims|python"):
            if kind == "python":
                scene.run(block)
            else:
                evaluate(scene, clauses(block), shown, proved, strict=True)
        told = any("dL = " in body for _, body in blocks(by_hand))
        lines = [] if told else generated(scene, paragraphs)
        evaluate(scene, [f"dL = {line}" for line in lines], {}, proved, strict=True)
        made.generated = lines
        op = OPS[name]
        if isinstance(op, Op):
            given = {aliases(name, letter) for letter in proved}
            missing = [x for x in case.inputs if bar(x) not in given]
            if missing:
                raise FalseClaim(
                    f"{name}: no formula that can be evaluated gives the adjoint of {', '.join(missing)}: write one "
                    f"into its docstring, or under `## {name}` into {PENCIL.name}"
                )
    made.checked = list(shown.values())
    return made


def aliases(name: str, letter: str) -> str:
    plain_letter, barred = plain(letter)
    plain_letter = NAMES.get(name, {}).get(plain_letter, plain_letter)
    return bar(plain_letter.lower() if len(plain_letter) == 1 else plain_letter) if barred else plain_letter


def evaluate(scene: Scene, found: list[str], shown: dict[str, Checked], proved: set[str], strict: bool) -> None:
    later: list[str] = []
    for clause in found:
        try:
            checked = scene.check(clause)
        except NotAFormula:
            if strict:
                raise
            later.append(clause)  # a sentence; or its letters are explained further on
            continue
        if checked is None:
            continue
        old = shown.get(checked.text)
        if old is None or checked.error > old.error:
            shown[checked.text] = checked
        if checked.left.kind == "name":
            proved.add(checked.left.parts[0])
    if later and len(later) < len(found):
        evaluate(scene, later, shown, proved, strict)
        return
    for clause in later:
        left = clause.split("=")[0].strip()
        if left in scene.values and (BAR in left or left.startswith("d")) and clause not in SENTENCES:
            raise FalseClaim(f"{scene.case.name}: {clause!r} looks like a formula and cannot be evaluated")


def generated(scene: Scene, paragraphs: list[str]) -> list[str]:
    """From dz = a dx + b dy and x̄ = .., ȳ = ..: the two lines between them."""
    out = next((k for k in scene.values if k.startswith("d") and bar(k[1:]) in scene.values and k[1:] in scene.moves
                and k[1:] not in scene.case.inputs), "")  # fmt: skip
    found = [c for p in paragraphs for c in clauses(p)]

    def of(name: str) -> str:
        for clause in found:
            left, _, right = clause.partition("=")
            if left.strip() == name and "..." not in right:
                try:
                    scene.check(f"{name} = {right}")
                except NotAFormula:
                    continue
                return right.rpartition("=")[2].strip()
        return ""

    z = out[1:]
    differential, adjoints = of(out), {x: of(bar(x)) for x in scene.case.inputs}
    if not differential or not all(adjoints.values()) or " where " in differential:
        return []
    used = [x for x in adjoints if re.search(rf"\bd{x}\b", differential)]
    if set(used) != set(adjoints):
        return []
    moved = " + ".join(f"({a}) · d{x}" for x, a in adjoints.items())
    return [f"{bar(z)} · d{z}", f"{bar(z)} · ({differential})", moved]


def module_story(name: str) -> str:
    """The docstring of the op's file, if it derives something."""
    module = inspect.getmodule(getattr(OPS[name], "forward", OPS[name]))
    return inspect.getdoc(module) or ""


def file_of_op(name: str) -> str:
    """Its file, from the root of the repository."""
    return OPS[name].__module__.replace(".", "/") + ".py"
