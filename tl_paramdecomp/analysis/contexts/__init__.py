"""Where components are active: their top contexts, tokens and logits."""
