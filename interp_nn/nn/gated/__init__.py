"""Gated networks: layers of gates, DGN and DLGN, their construction from ReLU networks, and training regimes."""
