"""`modelopt trace`: the graph of a model, its families of dimensions, what keeps its size and why; tables, JSON or a figure."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelopt.cli import options as o
from modelopt.cli.console import out, print_json, print_line, table
from modelopt.cli.plan import print_facts
from modelopt.core.errors import ConfigError, ModelOptError
from modelopt.core.files import staged_file

if TYPE_CHECKING:
    from torch import fx, nn

    from modelopt.torch.trace import Analyzer, GraphCollection

SHOWN = 24


def trace(
    model: Annotated[
        str,
        typer.Argument(
            help="A directory with config.json (no weights are read), timm:NAME, torchvision:NAME or package.module:callable.",
            show_default=False,
        ),
    ],
    module: Annotated[str, typer.Option("--module", "-m", help="The submodule to show, such as model.layers.0.mlp.")] = "",
    aten: Annotated[bool, typer.Option("--aten", help="Show ATen operators instead of modules and functions.")] = False,
    svg: Annotated[
        str, typer.Option("--svg", help="Write a figure: boxes are modules, colours are families of dimensions.")
    ] = "",
    depth: Annotated[int, typer.Option("--depth", min=1, help="Levels of boxes within boxes in the figure.")] = 8,
    overwrite: o.Overwrite = False,
    trust_remote_code: o.Trust = False,
    every: o.Every = False,
    json: o.Json = False,
) -> None:
    """Show how a model computes, which of its dimensions go together, and which cannot be changed."""
    if svg and Path(svg).exists() and not overwrite:
        raise ConfigError(f"{svg} exists. Pass --overwrite to replace it.")
    if svg and not Path(svg).absolute().parent.is_dir():
        raise ConfigError(f"The directory of {svg} does not exist. Make it, or choose another file.")
    from modelopt.torch.trace import analyze_symbols, recursive_trace

    built = build_model(model, trust_remote_code)
    graphs = recursive_trace(built)
    graphs.module(module)
    analyzer = analyze_symbols(built, graphs)
    graph = graphs.aten(module) if aten else _graph(graphs, module)
    if svg:
        from modelopt.torch.trace.draw import draw

        with staged_file(Path(svg), overwrite) as stage:
            stage.write_text(draw(graphs, analyzer, module=module, depth=depth), encoding="utf-8")
    if json:
        print_json(to_dict(model, graphs, analyzer, graph, module))
        return
    _print(model, graphs, analyzer, graph, module, every)
    if svg:
        print_line(f"Wrote {svg}.", "bold")


def build_model(name: str, trust_remote_code: bool = False) -> nn.Module:
    """Return the model that a command line names, in eval mode and with random weights or none.

    Raises ConfigError or CheckpointError for a name that leads nowhere.
    """
    from torch import nn

    if ":" not in name:
        from modelopt.recipes.source import find_model, meta_model, open_config

        source = open_config(find_model(name, weights=False))
        return meta_model(source, source.dtype, trust_remote_code)
    where, _, what = name.partition(":")
    made = _library_model(where, what) if where in ("timm", "torchvision") else _call(where, what)
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"{name} gave a {type(made).__name__}, not a model. Name a function or class that returns an nn.Module."
        )
    return made.eval()


def _library_model(library: str, name: str) -> Any:
    from modelopt.core.errors import did_you_mean
    from modelopt.core.plugins import require

    package = require(library, library, "to build the model")
    known = package.list_models() if library == "timm" else package.models.list_models()
    if name.split(".")[0] not in known:
        raise ConfigError(f'{library} has no model "{name}".{did_you_mean(name, known)}')
    return package.create_model(name) if library == "timm" else package.models.get_model(name, weights=None)


def _call(where: str, what: str) -> Any:
    from modelopt.core.plugins import has

    if not where or not what or not has(where):
        raise ConfigError(f'There is no module "{where}" to import. Write package.module:callable, or a model directory.')
    target: Any = importlib.import_module(where)
    for part in what.split("."):
        if not hasattr(target, part):
            raise ConfigError(f'{where} has no "{what}". Write package.module:callable.')
        target = getattr(target, part)
    try:
        return target() if callable(target) and not _is_module(target) else target
    except TypeError as error:
        raise ConfigError(f"{where}:{what} cannot be called without arguments: {error}") from error


def _is_module(value: Any) -> bool:
    from torch import nn

    return isinstance(value, nn.Module)


def _graph(graphs: GraphCollection, module: str) -> fx.Graph:
    """Return the recorded graph, which has shapes, or what there is."""
    try:
        found = graphs.recording.graphs.get(graphs.module(module))
    except ModelOptError:
        found = None
    return found if found is not None else graphs[module]


def rows_of(graph: fx.Graph) -> list[dict[str, str]]:
    """Return the nodes of a graph as text: name, what it does, what it reads, the shape that comes out."""
    rows = []
    for node in graph.nodes:
        target = node.target if isinstance(node.target, str) else _function_name(node.target)
        does = {"placeholder": "input", "get_attr": f"parameter {target}", "output": "output"}.get(node.op, target)
        if node.op == "call_module":
            does = f"{node.meta.get('cls', '')} {target}".strip()
        shape = node.meta.get("shape")
        dtype = str(node.meta.get("dtype", "")).removeprefix("torch.")
        reads = ", ".join(n.name for n in node.all_input_nodes)
        rows.append(
            {"name": node.name, "does": does, "reads": reads, "shape": f"{dtype}{list(shape)}" if shape is not None else ""}
        )
    return rows


def _function_name(target: Any) -> str:
    return str(target) if "OpOverload" in type(target).__name__ else getattr(target, "__name__", str(target))


def families_of(analyzer: Analyzer) -> list[dict[str, Any]]:
    """Return the families: name, kind, size, in how many parameter dimensions each lives."""
    from modelopt.torch.trace.draw import families

    return [{"name": n, "kind": k, "size": size, "slots": slots} for n, k, size, slots in families(analyzer)]


def to_dict(model: str, graphs: GraphCollection, analyzer: Analyzer, graph: fx.Graph, module: str) -> dict[str, Any]:
    """Return everything that the command found as plain data."""
    from modelopt.torch.trace.sharing import shared_inputs

    axes = analyzer.axes
    return {
        "model": model,
        "class": type(graphs.root).__name__,
        "module": module,
        "traced_by": graphs.source(module) if module or graphs.root in graphs else "",
        "note": graphs.failure_msg(module) or "",
        "nodes": rows_of(graph),
        "families": families_of(analyzer),
        "frozen": [] if axes is None else [
            {"parameter": f.parameter, "dim": f.dim, "reason": f.reason, "where": f.where} for f in axes.frozen
        ],
        "unknown_ops": {} if axes is None else dict(axes.unknown_ops),
        "shared_inputs": [list(g) for g in shared_inputs(graphs)],
    }  # fmt: skip


def _print(model: str, graphs: GraphCollection, analyzer: Analyzer, graph: fx.Graph, module: str, every: bool) -> None:
    from modelopt.torch.trace.draw import pattern_of

    rows = [[r["name"], r["does"], r["reads"], r["shape"]] for r in rows_of(graph)]
    title = f"{module or model} ({type(graphs.module(module)).__name__})"
    out().print(table(["Node", "Does", "Reads", "Shape"], rows, title=title, wide=("Reads",)))
    print_line("")
    found = families_of(analyzer)
    grouped: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        grouped.setdefault(one["name"] if every else pattern_of(one["name"]), []).append(one)
    shown = [
        [name, g[0]["kind"], str(len(g)), "/".join(map(str, sorted({x["size"] for x in g}))), str(g[0]["slots"])]
        for name, g in grouped.items()
    ]
    columns = ["First parameter dimension", "Kind", "Count", "Size", "Dimensions"]
    out().print(table(columns, shown, right=("Count", "Dimensions"), title="Families of dimensions"))
    print_line("")
    _print_frozen(analyzer, every)
    parameters = sum(p.numel() for p in graphs.root.parameters())
    facts = [("parameters", f"{parameters:,}"), ("graph", graphs.source(module)), ("modules with a graph", str(len(graphs)))]
    if analyzer.note:
        facts.append(("note", analyzer.note))
    if analyzer.axes is not None and analyzer.axes.unknown_ops:
        facts.append(("operators without a rule", ", ".join(f"{n} x{c}" for n, c in analyzer.axes.unknown_ops.items())))
    print_facts(facts)


def _print_frozen(analyzer: Analyzer, every: bool) -> None:
    from modelopt.torch.trace.draw import pattern_of

    if analyzer.axes is None:
        return
    found: Counter[tuple[str, str, str]] = Counter()
    for f in analyzer.axes.frozen:
        name = f"{f.parameter}.{f.dim}"
        where = f.where.replace("\\", "/").rpartition("/")[2]
        found[name if every else pattern_of(name), f.reason, where] += 1
    if not found:
        return
    rows = [[name, str(count), reason, where] for (name, reason, where), count in found.items()]
    cut = rows if every else rows[:SHOWN]
    columns = ["Parameter dimension", "Count", "Why", "Where"]
    out().print(table(columns, cut, right=("Count",), title="Keep their size", wide=("Where",)))
    if len(rows) > len(cut):
        print_line(f"and {len(rows) - len(cut)} more; --all shows them")
    print_line("")
