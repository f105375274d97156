from adapt.config.decode import decode, encode
from adapt.config.load import Resolved, find, load, resolve, shipped_recipes
from adapt.config.schema import Recipe

__all__ = ["Recipe", "Resolved", "decode", "encode", "find", "load", "resolve", "shipped_recipes"]
