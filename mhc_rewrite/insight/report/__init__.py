"""What a watched run shows: in words, as a page to send, and as pictures for a paper."""
