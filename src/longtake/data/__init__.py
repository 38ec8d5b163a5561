"""From clips and captions to cached, batched conditioning."""
