"""What a training step needs of memory and time under each strategy, before anything is rented."""
