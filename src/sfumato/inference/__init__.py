"""Transformers models as they are, on inputs that the parties never see: one call, or token by token."""
