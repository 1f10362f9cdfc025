"""Records of measurements: what they hold, and the tables and figures made of them."""
