"""Objects saved to memory and loaded from it."""

import io

import torch


def reloaded(thing, save=torch.save, load=torch.load, **options):
    """Return what `load` makes of what `save` has written of a thing."""
    stream = io.BytesIO()
    save(thing, stream)
    stream.seek(0)
    return load(stream, **options)
