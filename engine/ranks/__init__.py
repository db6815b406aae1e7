"""Ranks: world and collectives, rendezvous, signals."""
