"""A figure of a traced model: modules as boxes, families of dimensions as colours, tensors as lines; SVG of our own making."""
