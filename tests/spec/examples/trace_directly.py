from modelopt.torch.trace import recursive_trace, analyze_symbols

model = MyModel()

# Trace the model
graphs = recursive_trace(model)

# Query traced information
print("Traced modules:")
for module in graphs:
    graph = graphs[module]
    print(f"  {type(module).__name__}: {len(list(graph.nodes))} nodes")
    
    if graphs.is_failed(module):
        print(f"    FAILED: {graphs.failure_msg(module)}")

# Analyze symbols
analyzer = analyze_symbols(model, graphs)

# Find cross-layer parameters
from modelopt.torch.trace import Symbol
for module, symbols in analyzer.named_modules():
    for sym_name, sym in symbols.named_dangling_symbols(module):
        print(f"Optimizable param: {module}.{sym_name}")
