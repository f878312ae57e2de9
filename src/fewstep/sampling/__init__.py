"""Sampling pictures with a model: settings, request, generation, the folder of pictures."""
