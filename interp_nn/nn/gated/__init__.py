"""Gated networks: layers with gates, DGN and DLGN, conversion of ReLU networks, and training regimes."""
