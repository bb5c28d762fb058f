"""Text -> token shards: sources, tokenization on all cores, and the commands that start them."""
