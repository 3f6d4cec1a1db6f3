"""Stage 2: neural posterior estimation on compressed tiles, and the Figure of Merit."""
