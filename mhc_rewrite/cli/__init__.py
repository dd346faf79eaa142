"""The command line: prints what the API returns, and computes nothing of its own."""
