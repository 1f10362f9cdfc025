"""Reading a head: two linear layers without a nonlinearity between them, whose coordinates are free."""
