"""How text is decoded. One sampler a file (`ar`, `block_diffusion`, `self_speculation`); what they share:

base.py      what a sampler is given and gives back
sampling.py  logits -> candidate tokens with their confidence
rules.py     which candidates of a block are revealed
contract.py  what a model's config says about its decoding; checks.py refuses what cannot be decoded
blocks.py    the block a batch is in, and the context it is denoised in: causal, block, document
stop.py      stop strings
rows.py      prompts of unequal length as one left-padded batch; attention masks
terminal.py, verb.py   `adapt generate`
"""
