"""Agents: the reply format, the prompt, the memory block, and one episode's state machine."""
