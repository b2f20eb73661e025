"""Ring words on torch tensors: kernels, fixed point, packing, keyed streams."""
