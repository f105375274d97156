"""A trained model as a Hugging Face folder: written, loaded back and compared before it counts as done; and its way to
the Hub."""

from adapt.export.folder import export_folder
from adapt.export.push import push

__all__ = ["export_folder", "push"]
