"""What touches a live Trainer: token clock, learning-rate phase, merged evaluation, logging."""
