"""Tiles: schema, shards, split, normalisation, augmentation, and the mock suite that makes them."""
