"""Measuring a model: validation loss and bits per byte."""
