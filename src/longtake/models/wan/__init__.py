"""The Wan family: variants, files, encoders, conditioning."""
