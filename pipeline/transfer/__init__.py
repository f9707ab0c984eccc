"""Files over the network: downloads of sources, uploads of films."""
