"""The HTTP ingress: what providers and browsers send us."""
