"""Servers over a warm session: OpenIGTLink for simulators, HTTP and a page for people."""
