"""Numerics over the moves: written once, for every protocol."""
