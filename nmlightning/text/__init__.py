"""Text as tokens: the vocabulary, and batches of sentence pairs."""
