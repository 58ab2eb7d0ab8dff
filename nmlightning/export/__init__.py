"""Leave the project: fold batch norms, and write a network for programs that know none of this."""
