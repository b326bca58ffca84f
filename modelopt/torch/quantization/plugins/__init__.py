"""Plugins: one file per framework, imported when a model with classes of that framework arrives.

A plugin registers the quantized classes of its framework, and its `prepare(model)` is called before a model is converted.
"""
