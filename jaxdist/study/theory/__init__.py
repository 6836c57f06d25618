"""Measured against predicted: convex problems with known answers, one file a family of laws (`jaxdist theory`)."""
