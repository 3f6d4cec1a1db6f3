"""Simulated lightcones and full-sky maps to tiles."""
