"""What every job has around it: its stop signal, its secrets, its figures and its log lines."""
