"""What an agent can look up: hints from failures, their index, and the choice of the k best."""
