"""Generated stubs of the aftertouch.v1 protocol; `make protos` writes them."""
