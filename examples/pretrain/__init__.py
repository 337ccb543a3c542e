"""Pretraining a Llama from scratch, with the optimizers that GaLore is compared with."""
