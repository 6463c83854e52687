"""Kinds of tokenizers: one module for each library that reads them, all giving the same few things, see `Kind`."""

from tokenalign.kinds.kind import Added, Encoder, Kind, Spelled

__all__ = ["Added", "Encoder", "Kind", "Spelled"]
