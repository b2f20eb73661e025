"""Parties as machines that hold handles to shares, and the clients that drive them."""
