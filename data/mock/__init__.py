"""Mock survey suite: theory spectra, full-sky fields, shape noise, HEALPix geometry, suite builder.

Only this package knows the sphere (ducc0); both training stages run without it.
"""
