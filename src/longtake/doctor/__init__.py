"""`longtake doctor`: what a dataset will be in training, told before anything is encoded."""
