"""Watching a training run: figures of every site, written to a file as the run goes."""
