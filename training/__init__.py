"""How the shipped demo weights and samples were made; nothing here is needed at run time."""
