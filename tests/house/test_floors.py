"""Law 1: who may import whom, read from the syntax trees; and no import cycles."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "modelopt").rglob("*.py"))
TECHNIQUES = ["quantization", "sparsity", "prune", "nas", "distill", "speculative"]
ROOMS = {
    "modelopt.core": 0,
    "modelopt.numerics": 1,
    "modelopt.torch.utils": 1,
    "modelopt.torch.kernels": 2,
    "modelopt.torch.trace": 3,
    "modelopt.torch.opt": 3,
    "modelopt.torch.calibration": 3,
    **{f"modelopt.torch.{t}": 4 for t in TECHNIQUES},
    "modelopt.torch.export": 5,
    "modelopt.torch._deploy": 5,
    "modelopt.onnx": 5,
    "modelopt.evaluate": 6,
    "modelopt.recipes": 6,
    "modelopt.deploy": 6,
    "modelopt.cli": 7,
}
SAME_FLOOR = {("modelopt.torch.opt", "modelopt.torch.trace"), ("modelopt.torch.calibration", "modelopt.torch.trace")}
# Kernels stand on numerics alone; the upper floors may use their neighbours, which `evaluate`, `recipes` and exports do.
OPEN_FLOORS = {5, 6, 7}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in FILES}
TREES = {name: ast.parse(p.read_text()) for name, p in MODULES.items()}


def type_checking_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def imports(name: str, nodes: list[ast.AST] | None = None) -> set[str]:
    """Every module of this project that `name` imports, anywhere in the file (or in `nodes` alone)."""
    tree, found = TREES[name], set()
    skip = type_checking_lines(tree)
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree) if nodes is None else nodes:
        if getattr(node, "lineno", 0) in skip:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1] + ([base] if base else []))
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return {f for f in found if f.split(".")[0] == "modelopt" and f != name}


def room(name: str) -> str | None:
    return next((r for r in ROOMS if name == r or name.startswith(r + ".")), None)


def test_every_file_lives_in_a_known_room():
    loose = {"modelopt", "modelopt.__main__", "modelopt.torch"}
    assert [n for n in MODULES if room(n) is None and n not in loose] == []


def test_nobody_imports_from_above_or_from_beside():
    wrong = []
    for name in MODULES:
        own = room(name)
        if own is None:
            continue
        for other in imports(name):
            theirs = room(other)
            if theirs is None or theirs == own:
                continue
            up = ROOMS[theirs] > ROOMS[own]
            beside = ROOMS[theirs] == ROOMS[own] and ROOMS[own] not in OPEN_FLOORS and (own, theirs) not in SAME_FLOOR
            kernels = own == "modelopt.torch.kernels" and theirs == "modelopt.torch.utils"
            if up or beside or kernels:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_core_never_imports_torch_and_triton_stays_in_its_files():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            tops = {n.split(".")[0] for n in names}
            if room(name) == "modelopt.core":
                assert "torch" not in tops, name
            if "triton" in tops:
                assert name.startswith("modelopt.torch.kernels.") and "triton" in name.rpartition(".")[2], name


def test_there_are_no_import_cycles():
    graph = {n: {o for o in imports(n, list(TREES[n].body)) if o in MODULES} for n in MODULES}
    state: dict[str, int] = {}
    cycles = []

    def visit(node: str, path: list[str]) -> None:
        state[node] = 1
        for other in sorted(graph[node]):
            if state.get(other) == 1:
                cycles.append(" -> ".join([*path[path.index(other) :], other]) if other in path else f"{node} -> {other}")
            elif other not in state:
                visit(other, [*path, other])
        state[node] = 2

    for name in sorted(graph):
        if name not in state:
            visit(name, [name])
    assert cycles == []
