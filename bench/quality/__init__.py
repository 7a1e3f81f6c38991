"""How good a model is: perplexity, zero-shot tasks, probes, nearness to the dense model, and what differences mean."""
