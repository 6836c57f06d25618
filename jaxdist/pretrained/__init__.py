"""Hugging Face directories of GPT-2 and Llama: read straight into the shards of a run, and written.

`read_pretrained` and `write_pretrained` go by one table, `recipes` of `gpt2.py` and `llama.py`: which part of which
tensor each of our parameters is made of.
"""

from jaxdist.pretrained.read import check_pretrained, read_pretrained, shape_from_config
from jaxdist.pretrained.write import check_expressible, write_pretrained

__all__ = ["check_expressible", "check_pretrained", "read_pretrained", "shape_from_config", "write_pretrained"]
