"""Decoder, sentence encoder, adapters, key-value cache, sharding and weights."""
