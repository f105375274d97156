"""adapt: turn a pretrained causal language model into the model its user needs."""

__version__ = "0.1.0"
