"""One page about a network: what it does, how far to believe it, and where it fails."""
