"""Stage 1: the field-level compressor and its training."""
