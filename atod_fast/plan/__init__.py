"""What a run needs before it starts: tokens, memory and seconds of a step."""
