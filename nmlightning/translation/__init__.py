"""Translation: sentence pairs, tokenizer, networks, decoding, task and metrics."""
