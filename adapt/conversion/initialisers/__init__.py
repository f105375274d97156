"""How the rows of new tokens start (tokenizer-extension spec, section C.1)."""
