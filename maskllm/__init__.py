"""Learn, store and measure N:M masks for a frozen language model."""
