"""Protocols: seven moves on shares, and what is built on them."""
