"""What a converted model lives through: optimizers, saving and loading, export."""
