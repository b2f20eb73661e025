"""Measuring: the cases that other systems are measured on, what a run takes, and what it could not take less of."""
