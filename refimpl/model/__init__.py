r"""The substrate: a decoder of the Llama family, small enough to be read in one sitting.

Read `model.py` first; it uses `config.py`, `rope.py`, `cache.py` and `step.py`. `load.py` and
`config_json.py` read checkpoints, `generate.py` decodes.

Glossary
    batch, time   rows and tokens of one call
    heads         `n_heads` query heads, `n_kv_heads` key heads; query head h reads key head h // (n_heads / n_kv_heads)
    head_dim      size of a head; n_heads * head_dim need not be d_model
    length        tokens that a cache has seen, left padding included
    position      a token's index in its own row, counted from 0 after the left padding; negative for padding
    padding       `[batch]`, tokens of left padding in each row
    window        keys that a query of a sliding-window layer sees, itself included

Tensors are `[batch, heads, time, head_dim]` inside attention and `[batch, time, d_model]` outside.
"""
