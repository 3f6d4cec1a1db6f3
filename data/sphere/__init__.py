"""The sphere: spherical harmonics, shape noise, the twelve tiles of a sky. Only this, mock and ingest know it."""
