"""How text is decoded. One sampler a file (`ar`, `block_diffusion`); what they share:

base.py      what a sampler is given and gives back
sampling.py  logits -> candidate tokens with their confidence
rules.py     which candidates of a block are revealed
rows.py      prompts of unequal length as one left-padded batch; attention masks
terminal.py, verb.py   `adapt generate`
"""
