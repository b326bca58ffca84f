"""What tracing knows about other frameworks, one file each, loaded when a model of that framework arrives.

A plugin may define `candidate_inputs(model)` (an iterator of `(args, kwargs)`, the likeliest first), `fx_hopeless(model)` (the
reason why torch.fx need not be tried, or None), and may register leaves and symbols when it is imported.
"""
