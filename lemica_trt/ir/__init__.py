"""Nouns: the frozen values that flow between stages. Every on-disk format has its version here."""
