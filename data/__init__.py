"""From text to batches: sources -> tokenizer -> shards -> loader."""
