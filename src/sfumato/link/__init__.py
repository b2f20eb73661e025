"""Channels between parties: one interface, in-process and TLS implementations."""
