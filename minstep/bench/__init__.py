"""Bench: how long decoding, a layer, reading and training take, beside torch and the hardware."""
