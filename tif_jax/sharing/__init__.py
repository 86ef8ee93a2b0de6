"""What others read: a folder of weights with a model card, the same on the Hugging Face hub, impacts as a data set."""
