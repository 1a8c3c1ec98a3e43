"""What holds for every test."""

import signal

# A shell ignores Ctrl-C in what it starts in the background, and children inherit that; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
