"""Pictures, captions and training data, from disk."""
