"""Captured programs: from a torch module to a plan that says where each value lives, and its execution under
a protocol."""
