"""What ``overflowml run`` does: reads prompts, makes pictures in batches, and keeps what is done where a kill cannot undo it."""
