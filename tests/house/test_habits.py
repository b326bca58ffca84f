"""Law 5: habits that are not ours, found in the syntax trees."""

from __future__ import annotations

import ast
import re

import pytest

from tests.house.test_floors import MODULES, ROOT, TREES

ALLOWED_TRY_IMPORT = {"modelopt.core.plugins"}


def functions_around(tree: ast.AST) -> dict[ast.AST, str]:
    """Map every node to the name of the function that it stands in."""
    around: dict[ast.AST, str] = {}

    def visit(node: ast.AST, name: str) -> None:
        around[node] = name
        inner = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else name
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(tree, "")
    return around


def narrows_a_type(test: ast.expr) -> bool:
    """Whether an assert only tells the type checker what the code around it guarantees."""
    if isinstance(test, ast.BoolOp):
        return all(narrows_a_type(v) for v in test.values)
    return ast.unparse(test).endswith(" is not None") or ast.unparse(test).startswith("isinstance(")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_habits(name):
    tree, wrong = TREES[name], []
    around = functions_around(tree)
    for node in ast.walk(tree):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
            wrong.append(f"{where} import *")
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if any(n.split(".")[0] in ("pickle", "dill", "cloudpickle", "marshal") for n in names):
                wrong.append(f"{where} pickle")
        if isinstance(node, ast.Assert) and not narrows_a_type(node.test):
            wrong.append(f"{where} assert")
        if isinstance(node, ast.ExceptHandler):
            kind = ast.unparse(node.type) if node.type else "everything"
            swallows = not any(isinstance(n, ast.Raise) for b in node.body for n in ast.walk(b))
            if kind in ("everything", "Exception", "BaseException") and swallows:
                wrong.append(f"{where} swallows {kind}")
        if isinstance(node, ast.Try) and name not in ALLOWED_TRY_IMPORT:
            if any(isinstance(b, ast.Import | ast.ImportFrom) for b in node.body):
                if any(
                    "ImportError" in ast.unparse(h.type or node) or "ModuleNotFound" in ast.unparse(h.type or node)
                    for h in node.handlers
                ):
                    wrong.append(f"{where} try: import")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            if not around[node].startswith("print_"):
                wrong.append(f"{where} print")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            if not any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords):
                wrong.append(f"{where} torch.load without weights_only=True")
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("eval", "exec", "yaml.load")
            and "Loader" not in ast.unparse(node)
        ):
            wrong.append(f"{where} {ast.unparse(node.func)}")
    assert wrong == []


def test_every_module_says_what_it_is_for():
    assert [n for n, t in TREES.items() if not ast.get_docstring(t)] == []


def test_class_assignment_happens_in_one_place():
    pattern = re.compile(r"\.__class__\s*=[^=]")
    assert [n for n, p in MODULES.items() if pattern.search(p.read_text()) and n != "modelopt.torch.opt.surgery"] == []


def test_the_project_speaks_of_itself_alone():
    stray = re.compile(r"/tmp/|/work/|/root/|\bthis session\b|\bsubagent|\bissue #?\d+\b", re.I)
    wrong = []
    for pattern in ("modelopt/**/*.py", "modelopt/**/*.yaml", "docs/**/*.md", "*.md", "examples/**/*.py", "benchmarks/**/*.py"):
        for path in ROOT.glob(pattern):
            wrong += [f"{path.name}: {line.strip()}" for line in path.read_text().splitlines() if stray.search(line)]
    assert wrong == []
