"""Codecs: bytes and text from outside into the domain's types, and back."""
