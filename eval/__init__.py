"""From a checkpoint to text and scores."""
