"""Pickles as data: nothing in them is run, and what they hold are records that can do nothing.

    file = pickles.read("network.pkl")            # plain values and records
    names = pickles.tensors(file.root)            # name -> Tensor, whose numbers are in the file
    weights = pickles.load(file, names)           # name -> torch's tensors, on the CPU

It reads bare pickles, with storages nested in them as NVlabs write them, and both forms of
torch.save. See docs/pickles.md for what it promises.
"""

from fewstep.pickles.files import Pickled, is_pickle, read
from fewstep.pickles.records import Array, Bytes, Name, Record, Skipped, Storage, Tensor
from fewstep.pickles.tensors import floats, load, module_tensors, named, stream, tensors

__all__ = [
    "Array",
    "Bytes",
    "Name",
    "Pickled",
    "Record",
    "Skipped",
    "Storage",
    "Tensor",
    "floats",
    "is_pickle",
    "load",
    "module_tensors",
    "named",
    "read",
    "stream",
    "tensors",
]
