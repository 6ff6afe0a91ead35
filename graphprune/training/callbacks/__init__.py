"""Callbacks for Lightning and for the Trainer of transformers."""
