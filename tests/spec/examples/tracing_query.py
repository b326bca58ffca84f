graphs = recursive_trace(model)

# Query traced info
fx_graph = graphs[linear_layer]          # Get FX graph
failed = graphs.is_failed(conv_layer)    # Check if failed
