"""*Less Is More: Undertraining Experts Improves Model Upcycling*, at the size of two CPU cores."""
