"""Models that the project trained itself and ships: micro-gpt2."""

from tl_paramdecomp.pretrained.micro_gpt2 import (
    TaskPrompt,
    load_micro_gpt2,
    micro_gpt2_prompts,
    micro_gpt2_tokenizer,
    micro_gpt2_tokens,
)

__all__ = ["TaskPrompt", "load_micro_gpt2", "micro_gpt2_prompts", "micro_gpt2_tokenizer", "micro_gpt2_tokens"]
