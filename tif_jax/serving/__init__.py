"""Answers to single pictures, over HTTP: many requests share a batch."""
