"""What a user configures: the recipe's sections and DeepSpeed's JSON, read strictly."""
