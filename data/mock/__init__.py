"""Mock survey suite: theory spectra, full-sky fields, shape noise, suite builder."""
