"""What is timed: the operator (`ops`), whole training steps (`train`), and explanations (`explain`)."""
