"""Engines: what runs a bundle's graphs. One file each, behind the Protocol of base.py."""
