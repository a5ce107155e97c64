"""Applications a user might write, measured under our supervisor, and a program that publishes."""
